//! The head and the loss together.

use burn::tensor::DType;
use rekindle_kernels::linear_cross_entropy::{self, IGNORED, LmHead, TokenWeights};
use rekindle_kernels::{ParamsBuilder, Tensor, to_f32};

use super::{Case, Oracle, Place, Results, grad, noise, rounded, values, widened};

pub(crate) struct LinearCrossEntropy {
    vocab: usize,
    hidden: usize,
    targets: Vec<i32>,
    h: Vec<f32>,
    weight: Vec<f32>,
    multiplier: f32,
    softcap: Option<f32>,
    /// A weight for each token, or none where all have [`GRAD_SCALE`].
    token_weights: Option<Vec<f32>>,
}

const GRAD_SCALE: f32 = 0.3;

impl LinearCrossEntropy {
    /// Targets spread over the vocabulary where `counts` says so. Logits reach past ±8.
    pub(crate) fn new([tokens, hidden, vocab]: [usize; 3], dtype: DType, counts: impl Fn(usize) -> bool) -> Self {
        let targets =
            (0..tokens).map(|t| if counts(t) { ((t * 7919 + vocab - 1) % vocab) as i32 } else { IGNORED }).collect();
        let h = noise(1, tokens * hidden).iter().map(|x| 4.0 * x).collect();
        Self {
            vocab,
            hidden,
            targets,
            h: rounded(h, dtype),
            weight: rounded(noise(2, vocab * hidden), dtype),
            multiplier: 1.0,
            softcap: None,
            token_weights: None,
        }
    }

    /// With a multiplier on the logits and a cap that many of them are near.
    pub(crate) fn capped(self, multiplier: f32, softcap: Option<f32>) -> Self {
        Self { multiplier, softcap, ..self }
    }

    /// With a weight of its own for each token, some of them negative.
    pub(crate) fn weighted(self) -> Self {
        let token_weights = Some(noise(3, self.targets.len()));
        Self { token_weights, ..self }
    }

    fn token_weights(&self) -> TokenWeights<'_> {
        self.token_weights.as_deref().map_or(TokenWeights::Uniform(GRAD_SCALE), TokenWeights::from)
    }
}

impl Case for LinearCrossEntropy {
    fn naive(&self, dtype: DType) -> Results {
        let (tokens, vocab) = (self.targets.len(), self.vocab);
        let oracle = Oracle::new(dtype);
        let (mut one_hot, mut counted, mut weights) = (vec![0.0; tokens * vocab], vec![0.0; tokens], vec![0.0; tokens]);
        for (t, &target) in self.targets.iter().enumerate().filter(|(_, target)| **target != IGNORED) {
            one_hot[t * vocab + target as usize] = 1.0;
            counted[t] = 1.0;
            weights[t] = self.token_weights().of(t);
        }
        let counted = oracle.constant(&counted, [tokens, 1]);
        let h = oracle.leaf(&self.h, [tokens, self.hidden]);
        let weight = oracle.leaf(&self.weight, [vocab, self.hidden]);
        let mut logits = h.clone().matmul(weight.clone().transpose()) * self.multiplier;
        if let Some(cap) = self.softcap {
            logits = (logits / cap).tanh() * cap;
        }
        let max = logits.clone().max_dim(1).detach();
        let exps = (logits.clone() - max.clone()).exp();
        let sum = exps.clone().sum_dim(1);
        let lse = sum.clone().log() + max;
        let entropy = (lse.clone() - (exps / sum * logits.clone()).sum_dim(1)) * counted.clone();
        let logit = (logits * oracle.constant(&one_hot, [tokens, vocab])).sum_dim(1);
        let nll = (lse - logit) * counted;
        let grads = (nll.clone() * oracle.constant(&weights, [tokens, 1])).sum().backward();
        vec![
            ("nll", values(nll)),
            ("entropy", values(entropy)),
            ("dh", grad(&h, &grads)),
            ("dw", grad(&weight, &grads)),
        ]
    }

    fn ours(&self, place: &Place) -> Results {
        let h = place.matrix(&self.h, [self.targets.len(), self.hidden]);
        let weight = place.matrix(&self.weight, [self.vocab, self.hidden]);
        let head = LmHead { weight, multiplier: self.multiplier, softcap: self.softcap };
        let mut builder = ParamsBuilder::new(&place.device, place.dtype);
        builder.push("before", &[3], true, &[0.0; 3]);
        let at = builder.push("lm_head.weight", &[self.vocab, self.hidden], true, &self.weight);
        let params = builder.build();
        let weights = self.token_weights();
        let alone = linear_cross_entropy::forward(&h, &head, &self.targets).values();
        let mut grads = params.zero_grads();
        let (nll, dh) =
            linear_cross_entropy::forward_backward(&h, &head, &self.targets, weights, Some((&mut grads, at)));
        let frozen = linear_cross_entropy::forward_backward(&h, &head, &self.targets, weights, None);
        let nll = nll.values();
        let frozen = (frozen.0.values(), to_f32(frozen.1));
        assert_eq!((&nll, to_f32(dh.clone())), (&frozen.0, frozen.1), "a frozen head changes nothing else");
        for (t, _) in self.targets.iter().enumerate().filter(|(_, target)| **target == IGNORED) {
            let row = to_f32(dh.rows(t, 1));
            assert!(nll[t] == 0.0 && row.iter().all(|&g| g == 0.0), "row {t} does not count");
        }

        let saved = linear_cross_entropy::log_probs(&h, &head, &self.targets);
        let mut later_grads = params.zero_grads();
        let later = linear_cross_entropy::backward(&h, &head, &saved, weights, Some((&mut later_grads, at)));
        assert_eq!(to_f32(later), to_f32(dh.clone()), "dh of weights that are known after the forward");
        assert_eq!(later_grads.values(at), grads.values(at), "dw of weights that are known after the forward");
        let log_probs = saved.values();
        let again: Vec<f32> = log_probs.log_probs.iter().map(|log_prob| -log_prob).collect();
        vec![
            ("nll", widened(alone)),
            ("nll", widened(nll)),
            ("nll", widened(again)),
            ("entropy", widened(log_probs.entropy)),
            ("dh", values(dh)),
            ("dw", widened(grads.values(at))),
        ]
    }
}

impl std::fmt::Debug for LinearCrossEntropy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let counted = self.targets.iter().filter(|&&target| target != IGNORED).count();
        let (tokens, hidden, vocab) = (self.targets.len(), self.hidden, self.vocab);
        write!(f, "linear_cross_entropy {tokens} × {hidden} × {vocab}, {counted} counted")?;
        if self.multiplier != 1.0 || self.softcap.is_some() {
            write!(f, ", multiplier {}, softcap {:?}", self.multiplier, self.softcap)?;
        }
        f.write_str(if self.token_weights.is_some() { ", weighted" } else { "" })
    }
}

/// Logits that are known, of 6 token ids: all equal, a tie of two, one that is certain, and one that is impossible.
pub(crate) fn log_probs_of_known_logits(place: &Place) {
    let logits: [[f32; 6]; 4] =
        [[2.0; 6], [1.0, 3.0, 3.0, -1.0, 0.0, 0.5], [0.0, 0.0, 240.0, 0.0, 0.0, 0.0], [0.0, 0.0, 240.0, 0.0, 0.0, 0.0]];
    let identity: Vec<f32> = (0..16).map(|i| if i % 5 == 0 { 1.0 } else { 0.0 }).collect();
    let weight: Vec<f32> = (0..24).map(|i| logits[i % 4][i / 4]).collect();
    let h: Tensor<2> = place.matrix(&identity, [4, 4]);
    let head = LmHead::new(place.matrix(&weight, [6, 4]));
    let of = |targets: [i32; 4]| linear_cross_entropy::log_probs(&h, &head, &targets).values();
    let values = of([5, 1, 2, 0]);
    let near =
        |got: f32, want: f64| assert!((f64::from(got) - want).abs() <= 1e-5 * want.abs().max(1.0), "{got} not {want}");
    let sum: f64 = logits[1].iter().map(|&x| (f64::from(x) - 3.0).exp()).sum();
    let shifted: f64 = logits[1].iter().map(|&x| (f64::from(x) - 3.0) * (f64::from(x) - 3.0).exp()).sum();
    for (got, want) in values.log_probs.iter().zip([-6f64.ln(), -sum.ln(), 0.0, -240.0]) {
        near(*got, want);
    }
    for (got, want) in values.entropy.iter().zip([6f64.ln(), sum.ln() - shifted / sum, 0.0, 0.0]) {
        near(*got, want);
    }
    assert_eq!(values.is_argmax, [true, true, true, false]);
    let values = of([IGNORED, 2, IGNORED, 2]);
    assert_eq!(values.is_argmax, [false, true, false, true]);
    assert_eq!((values.log_probs[0], values.entropy[2]), (0.0, 0.0));
}
