//! Initial values of A and B.

pub(crate) mod from_weights;
pub(crate) mod svd;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{InitLoraWeights, LoraConfig, LoraFactors};

/// Returns A and B of a new adapter for the linear `module` with a weight of `[out, in]`.
///
/// A is uniform in ±1/√in (Kaiming-uniform with a = √5, as PEFT), normal with standard deviation 1/r for
/// `"gaussian"`; B is zero, or uniform in ±1/√r with `init_lora_weights = false`.
///
/// The numbers come from a ChaCha stream keyed by `random_state` and the module's name, so that adding a target changes
/// no other adapter's initial values.
pub fn initial_factors(config: &LoraConfig, module: &str, in_features: usize, out_features: usize) -> LoraFactors {
    let r = config.rank_of(module);
    let mut rng = stream(config, module);
    let mut uniform = |n: usize, bound: f64| -> Vec<f32> {
        (0..n).map(|_| ((rng.random::<f64>() * 2.0 - 1.0) * bound) as f32).collect()
    };
    let a_bound = 1.0 / (in_features as f64).sqrt();
    match &config.init_lora_weights {
        InitLoraWeights::Random => {
            let a = uniform(r * in_features, a_bound);
            let b = uniform(out_features * r, 1.0 / (r as f64).sqrt());
            LoraFactors { r, a, b, magnitude: None }
        }
        InitLoraWeights::Gaussian => {
            let a = (0..r * in_features).map(|_| (normal(&mut rng) / r as f64) as f32).collect();
            LoraFactors { r, a, b: vec![0.0; out_features * r], magnitude: None }
        }
        // `from_weights.rs` initializes methods that use the weight; adapters of other methods are only loaded.
        _ => {
            let (a, b) = (uniform(r * in_features, a_bound), vec![0.0; out_features * r]);
            LoraFactors { r, a, b, magnitude: None }
        }
    }
}

/// Returns the random stream of `module`.
pub(crate) fn stream(config: &LoraConfig, module: &str) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(config.random_state);
    rng.set_stream(fnv1a(module));
    rng
}

/// Returns a standard normal number (Box–Muller).
pub(crate) fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let u: f64 = 1.0 - rng.random::<f64>();
    let v: f64 = rng.random();
    (-2.0 * u.ln()).sqrt() * (core::f64::consts::TAU * v).cos()
}

/// Returns the 64-bit FNV-1a hash.
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_depends_on_the_module_alone() {
        let config = LoraConfig::new(4);
        let one = initial_factors(&config, "model.layers.0.self_attn.q_proj", 16, 8);
        assert_eq!(
            one,
            initial_factors(&config.clone().target_modules(["q_proj"]), "model.layers.0.self_attn.q_proj", 16, 8)
        );
        assert_ne!(one.a, initial_factors(&config, "model.layers.1.self_attn.q_proj", 16, 8).a);
        assert_ne!(one.a, initial_factors(&config.random_state(1), "model.layers.0.self_attn.q_proj", 16, 8).a);
        assert!(one.a.iter().all(|a| a.abs() <= 0.25) && one.a.iter().any(|a| a.abs() > 0.2));
        assert!(one.b.iter().all(|&b| b == 0.0));
    }

    #[test]
    fn gaussian_has_the_documented_deviation() {
        let config = LoraConfig::new(8).init_lora_weights(InitLoraWeights::Gaussian);
        let a = initial_factors(&config, "q_proj", 4096, 1).a;
        let variance = a.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>() / a.len() as f64;
        // 32,768 samples: the relative error of a variance has deviation √(2/n) = 0.8 %; five of them.
        assert!((variance * 64.0 - 1.0).abs() < 0.04, "{variance}");
    }
}
