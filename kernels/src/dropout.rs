//! Dropout from a counter-based generator: y = x ∘ keep / (1 − p).
//!
//! Whether an element is kept is a function of (seed, step, row of the step, position, site, channel) alone,
//! so that recomputation, accumulation and packing see the same mask without any of it being stored.
//! The bits are Philox4x32-10 (Salmon et al., SC 2011): the key is the seed mixed with the site, the counter
//! is (channel / 4, position, row, step), word channel mod 4.
//!
//! # Shapes
//! x, y `[tokens, features]`.
//!
//! # Gradients
//! dx = dy ∘ keep / (1 − p): the same function. Saved: nothing.

use burn::tensor::{DType, Tensor as BurnTensor, TensorData};
use rayon::prelude::*;

use crate::cuda::{Ints, ops};
use crate::philox::philox;
use crate::{Device, Tensor, cpu};

/// One token's coordinates within an optimizer step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// The row (document) it belongs to, counted over the whole optimizer step.
    pub row: u32,
    /// Its place in the row.
    pub position: u32,
}

/// The coordinates of a batch's tokens, where masks are made.
#[derive(Clone, Debug)]
pub struct Tokens {
    host: Vec<Token>,
    /// Rows and positions.
    cuda: Option<[Ints; 2]>,
}

impl Tokens {
    /// Takes `tokens` to `device`.
    pub fn new(tokens: Vec<Token>, device: &Device) -> Self {
        let cuda = match device {
            Device::Burn(_) => None,
            Device::Cuda(cuda) => {
                let rows: Vec<u32> = tokens.iter().map(|token| token.row).collect();
                let positions: Vec<u32> = tokens.iter().map(|token| token.position).collect();
                Some([rows, positions].map(|list| Ints::from_slice(cuda, &list, "token coordinates")))
            }
        };
        Self { host: tokens, cuda }
    }

    pub(crate) fn host(&self) -> &[Token] {
        &self.host
    }

    /// Rows and positions on the device.
    pub(crate) fn cuda(&self) -> Option<&[Ints; 2]> {
        self.cuda.as_ref()
    }
}

/// Everything a mask depends on besides the site and the channel.
#[derive(Clone, Copy, Debug)]
pub struct Key<'a> {
    /// Probability of dropping an element, in [0, 1).
    pub p: f32,
    /// Seed of the run.
    pub seed: u64,
    /// Number of the optimizer step.
    pub step: u32,
    /// The tokens of this batch.
    pub tokens: &'a Tokens,
}

/// `x ∘ keep / (1 − p)` for the mask of `site`, a number that tells the layers' inputs apart.
pub fn apply(x: &Tensor<2>, key: Key<'_>, site: u32) -> Tensor<2> {
    if key.p == 0.0 {
        return x.clone();
    }
    let [tokens, width] = x.dims();
    assert_eq!(tokens, key.tokens.host.len(), "one key for every token");
    match (x, &key.tokens.cuda) {
        (Tensor::Cuda(x), Some([rows, positions])) => {
            ops::dropout::apply(x, key.p, key.seed, key.step, rows, positions, site).into()
        }
        _ => {
            let x = x.burn();
            let data = TensorData::new(mask(key, site, width), [tokens, width]);
            let mask = BurnTensor::<2>::from_data(data, (&x.device(), DType::F32));
            (x.clone() * mask.cast(x.dtype())).into()
        }
    }
}

/// 0 or 1 / (1 − p) for every element.
fn mask(key: Key<'_>, site: u32, width: usize) -> Vec<f32> {
    let threshold = (f64::from(key.p) * 2f64.powi(32)) as u32;
    let keep = 1.0 / (1.0 - key.p);
    let mixed = key.seed ^ u64::from(site).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut mask = vec![0.0; key.tokens.host.len() * width];
    mask.par_chunks_exact_mut(width).zip(&key.tokens.host).for_each(|(row, token)| {
        cpu::simd(
            #[inline(always)]
            || {
                for (i, four) in row.chunks_mut(4).enumerate() {
                    let bits = philox([i as u32, token.position, token.row, key.step], mixed);
                    for (m, bits) in four.iter_mut().zip(bits) {
                        *m = if bits >= threshold { keep } else { 0.0 };
                    }
                }
            },
        );
    });
    mask
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_depends_on_the_token_not_on_its_place_in_the_batch() {
        let token = |row, position| Token { row, position };
        let tokens = [token(0, 0), token(0, 1), token(3, 0), token(3, 1)];
        let mask = |tokens: &[Token], site, width| {
            let tokens = Tokens::new(tokens.to_vec(), &Device::cpu());
            super::mask(Key { p: 0.25, seed: 7, step: 2, tokens: &tokens }, site, width)
        };
        let whole = mask(&tokens, 5, 13);
        assert_eq!(mask(&tokens[2..], 5, 13), whole[26..]);
        assert_ne!(mask(&tokens, 6, 13), whole, "another site");
        let many: Vec<Token> = (0..400).map(|i| token(i, 0)).collect();
        let kept = mask(&many, 0, 256).iter().filter(|&&m| m != 0.0).count();
        // 102,400 draws with p = 0.25: standard deviation 139; five of them.
        assert!(kept.abs_diff(76_800) < 700, "{kept} kept");
        assert!(whole.iter().all(|&m| m == 0.0 || m == 1.0 / 0.75));
    }
}
