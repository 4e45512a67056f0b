//! Noise on embeddings (NEFTune: Jain et al., arXiv:2310.05914): y = x + u · α / √(L · d), u uniform in [−1, 1).
//!
//! L is the length of the token's document and d the width. As with [`dropout`](crate::ops::dropout) u is a function of
//! (seed, step, row of the step, position, channel) alone, so that accumulation and packing see the same noise: Philox4x32-10
//! with the seed mixed with a number that no layer has, counter (channel / 4, position, row, step), word channel mod 4.
//!
//! # Shapes
//! x, y `[tokens, hidden]`.
//!
//! # Dtypes
//! Added in `f32`, rounded once to the dtype of x.
//!
//! # Gradients
//! dx = dy. Saved: nothing.

mod cuda;

use burn::tensor::{DType, Tensor as BurnTensor, TensorData};
use rayon::prelude::*;

use crate::ops::dropout::Tokens;
use crate::rng::{NEFTUNE_LAYER, philox};
use crate::runtime::{Ints, MemoryUse};
use crate::{RngKey, Tensor, host};

/// Everything the noise depends on besides the channel.
#[derive(Clone, Copy, Debug)]
pub struct Noise<'a> {
    /// α; 0 is no noise.
    pub alpha: f32,
    /// The step's random numbers.
    pub key: RngKey,
    /// The tokens of this batch.
    pub tokens: &'a Tokens,
    /// Length of each token's document.
    pub lengths: &'a [u32],
}

/// Returns `x` with noise.
pub fn apply(x: Tensor<2>, noise: Noise<'_>) -> Tensor<2> {
    let [tokens, width] = x.dims();
    assert_eq!(
        (tokens, tokens),
        (noise.tokens.host().len(), noise.lengths.len()),
        "a key and a length for every token"
    );
    let largest = |&length: &u32| (f64::from(noise.alpha) / (f64::from(length) * width as f64).sqrt()) as f32;
    let largest: Vec<f32> = noise.lengths.iter().map(largest).collect();
    let key = noise.key.for_layer(NEFTUNE_LAYER);
    match x {
        Tensor::Cuda(x) => {
            let [rows, positions] = noise.tokens.cuda();
            let bits: Vec<u32> = largest.into_iter().map(f32::to_bits).collect();
            let largest = Ints::from_slice(x.cuda(), &bits, MemoryUse::Inputs);
            cuda::apply(&x, key, noise.key.step, rows, positions, &largest).into()
        }
        Tensor::Burn(x) => {
            let data = TensorData::new(values(noise, key, &largest, width), [tokens, width]);
            let noise = BurnTensor::<2>::from_data(data, (&x.device(), DType::F32));
            let dtype = x.dtype();
            (x.cast(DType::F32) + noise).cast(dtype).into()
        }
        Tensor::Meta(x) => {
            let noise = x.f32_sized(x.dims());
            let dtype = x.dtype();
            let sum = x.cast(DType::F32).elementwise();
            drop(noise);
            sum.cast(dtype).into()
        }
    }
}

fn values(noise: Noise<'_>, key: u64, largest: &[f32], width: usize) -> Vec<f32> {
    let mut values = vec![0.0; largest.len() * width];
    let rows = values.par_chunks_exact_mut(width).zip(noise.tokens.host()).zip(largest);
    rows.for_each(|((row, token), &largest)| {
        host::simd(
            #[inline(always)]
            || {
                for (i, four) in row.chunks_mut(4).enumerate() {
                    let bits = philox([i as u32, token.position, token.row, noise.key.step], key);
                    for (value, bits) in four.iter_mut().zip(bits) {
                        // The upper 24 bits, exactly.
                        *value = ((bits >> 8) as f32 * 2f32.powi(-23) - 1.0) * largest;
                    }
                }
            },
        );
    });
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::dropout::Token;
    use crate::{Device, from_f32, to_f32};

    fn noise(tokens: &[Token], lengths: &[u32], step: u32, width: usize) -> Vec<f32> {
        let tokens = Tokens::new(tokens.to_vec(), &Device::cpu());
        let x = from_f32(vec![0.0; lengths.len() * width], [lengths.len(), width], &Device::cpu(), DType::F32);
        to_f32(apply(x, Noise { alpha: 5.0, key: RngKey { seed: 7, step }, tokens: &tokens, lengths }))
    }

    #[test]
    fn noise_depends_on_the_token_not_on_its_place_in_the_batch() {
        let token = |row, position| Token { row, position };
        let tokens = [token(0, 0), token(0, 1), token(3, 0), token(3, 1), token(3, 2)];
        let whole = noise(&tokens, &[2, 2, 3, 3, 3], 2, 13);
        assert_eq!(noise(&tokens[2..], &[3, 3, 3], 2, 13), whole[26..]);
        assert_ne!(noise(&tokens, &[2, 2, 3, 3, 3], 3, 13), whole, "another step");
        assert_ne!(whole[26..39], whole[39..52], "another position");
    }

    #[test]
    fn noise_is_uniform_within_alpha_over_the_root_of_length_and_width() {
        let tokens: Vec<Token> = (0..400).map(|position| Token { row: 1, position }).collect();
        let values = noise(&tokens, &[400; 400], 0, 256);
        let bound = 5.0 / (400.0 * 256.0f32).sqrt();
        assert!(values.iter().all(|v| v.abs() <= bound) && values.iter().any(|v| v.abs() > 0.999 * bound));
        // 102,400 draws: the mean has a standard deviation of bound / √(3n), the mean square one of bound² · √(4/45n).
        let n = values.len() as f64;
        let scaled: Vec<f64> = values.iter().map(|v| f64::from(v / bound)).collect();
        let (mean, square) = (scaled.iter().sum::<f64>() / n, scaled.iter().map(|v| v * v).sum::<f64>() / n);
        assert!(mean.abs() < 5.0 / (3.0 * n).sqrt(), "mean {mean}");
        assert!((square - 1.0 / 3.0).abs() < 5.0 * (4.0 / (45.0 * n)).sqrt(), "mean square {square}");
    }
}
