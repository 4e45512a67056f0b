//! Choosing the next token from logits.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{Error, GenerationConfig};

/// Draws tokens: greedy at temperature 0, else from softmax(logits / temperature) cut to `top_k` and `top_p`.
pub(crate) struct Sampler {
    temperature: f32,
    top_k: usize,
    top_p: f32,
    rng: ChaCha8Rng,
}

impl Sampler {
    pub(crate) fn new(config: &GenerationConfig) -> Result<Self, Error> {
        let GenerationConfig { temperature, top_k, top_p, seed, .. } = *config;
        if !(temperature >= 0.0 && temperature.is_finite()) {
            return Err(Error::Argument(format!("temperature is {temperature}; it must be 0 (greedy) or above")));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::Argument(format!("top_p is {top_p}; it must be above 0 and at most 1")));
        }
        Ok(Self { temperature, top_k, top_p, rng: ChaCha8Rng::seed_from_u64(seed) })
    }

    /// The next token; ties go to the lower id.
    pub(crate) fn next(&mut self, logits: &[f32]) -> u32 {
        if self.temperature == 0.0 {
            return argmax(logits);
        }
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
        if self.top_k > 0 {
            order.truncate(self.top_k);
        }
        let max = logits[order[0] as usize];
        let weight = |&id: &u32| f64::from((logits[id as usize] - max) / self.temperature).exp();
        let weights: Vec<f64> = order.iter().map(weight).collect();
        let kept = nucleus(&weights, f64::from(self.top_p));
        let total: f64 = weights[..kept].iter().sum();
        let mut left = self.rng.random::<f64>() * total;
        for (id, weight) in order.iter().zip(&weights[..kept]) {
            left -= weight;
            if left < 0.0 {
                return *id;
            }
        }
        order[kept - 1]
    }
}

/// How many of the weights, largest first, reach the share `top_p`; at least one.
fn nucleus(weights: &[f64], top_p: f64) -> usize {
    let target = weights.iter().sum::<f64>() * top_p;
    let mut sum = 0.0;
    weights
        .iter()
        .position(|w| {
            sum += w;
            sum >= target
        })
        .map_or(weights.len(), |last| last + 1)
}

fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_and_shares() {
        let config = GenerationConfig { temperature: 1.0, top_k: 2, seed: 1, ..GenerationConfig::default() };
        let logits = [0.0, 3f32.ln(), 0.5f32.ln(), 0.0];
        let mut sampler = Sampler::new(&config).unwrap();
        let draws: Vec<u32> = (0..4000).map(|_| sampler.next(&logits)).collect();
        let count = |id| draws.iter().filter(|&&d| d == id).count();
        assert_eq!(count(2) + count(3), 0, "outside the top 2 (ties go to the lower id)");
        // 4,000 draws with p = 3/4: standard deviation 27; five of them.
        assert!(count(1).abs_diff(3000) < 137, "{}", count(1));
        assert_eq!(nucleus(&[0.5, 0.3, 0.2], 0.5), 1);
        assert_eq!(nucleus(&[0.5, 0.3, 0.2], 0.51), 2);
        assert_eq!(nucleus(&[0.5, 0.3, 0.2], 1.0), 3);
        let mut greedy = Sampler::new(&GenerationConfig::default()).unwrap();
        assert_eq!(greedy.next(&[1.0, 2.0, 2.0]), 1);
        assert!(Sampler::new(&GenerationConfig { top_p: 0.0, ..config }).is_err());
    }
}
