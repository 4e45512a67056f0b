//! Dropout from a counter-based generator: y = x ∘ keep / (1 − p).
//!
//! Whether an element is kept depends on (seed, step, row of the step, position, layer, channel) alone, so that
//! recomputation, accumulation and packing see the same mask without storing any of it. The bits are Philox4x32-10: the
//! key is the seed mixed with the layer's number, the counter is (channel / 4, position, row, step), word channel mod 4.
//!
//! # Shapes
//! x, y `[tokens, features]`.
//!
//! # Gradients
//! dx = dy ∘ keep / (1 − p): the same function. Saved: nothing.

mod cuda;

use burn::tensor::{DType, Tensor as BurnTensor, TensorData};
use rayon::prelude::*;

use crate::rng::philox;
use crate::runtime::{Ints, MemoryUse};
use crate::tensor::two_devices;
use crate::{Device, RngKey, Tensor, host};

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
            Device::Burn(_) | Device::Meta(_) => None,
            Device::Cuda(cuda) => {
                let rows: Vec<u32> = tokens.iter().map(|token| token.row).collect();
                let positions: Vec<u32> = tokens.iter().map(|token| token.position).collect();
                Some([rows, positions].map(|list| Ints::from_slice(cuda, &list, MemoryUse::Inputs)))
            }
        };
        Self { host: tokens, cuda }
    }

    pub(crate) fn host(&self) -> &[Token] {
        &self.host
    }

    /// Rows and positions on a CUDA device.
    pub(crate) fn cuda(&self) -> &[Ints; 2] {
        self.cuda.as_ref().unwrap_or_else(|| two_devices())
    }
}

/// Dropout in one optimizer step: everything a mask depends on besides the layer and the channel.
#[derive(Clone, Copy, Debug)]
pub struct Dropout<'a> {
    /// Probability of dropping an element, in [0, 1).
    pub p: f32,
    /// The step's random numbers.
    pub key: RngKey,
    /// The tokens of this batch.
    pub tokens: &'a Tokens,
}

impl Dropout<'_> {
    /// Random bits below this drop an element.
    fn threshold(&self) -> u32 {
        (f64::from(self.p) * 2f64.powi(32)) as u32
    }

    /// The factor of an element that is kept.
    fn keep(&self) -> f32 {
        1.0 / (1.0 - self.p)
    }
}

/// Returns `x ∘ keep / (1 − p)` for the mask of `layer_id`, a number that tells the layers' inputs apart.
pub fn apply(x: &Tensor<2>, dropout: Dropout<'_>, layer_id: u32) -> Tensor<2> {
    if dropout.p == 0.0 {
        return x.clone();
    }
    let [tokens, width] = x.dims();
    assert_eq!(tokens, dropout.tokens.host.len(), "coordinates of every token");
    match x {
        Tensor::Cuda(x) => cuda::apply(x, dropout, layer_id).into(),
        Tensor::Burn(x) => {
            let data = TensorData::new(mask(dropout, layer_id, width), [tokens, width]);
            let mask = BurnTensor::<2>::from_data(data, (&x.device(), DType::F32));
            (x.clone() * mask.cast(x.dtype())).into()
        }
        // The result lies where the mask lay.
        Tensor::Meta(x) => x.f32_sized(x.dims()).cast(x.dtype()).into(),
    }
}

/// 0 or 1 / (1 − p) for every element.
fn mask(dropout: Dropout<'_>, layer_id: u32, width: usize) -> Vec<f32> {
    let (threshold, keep, step) = (dropout.threshold(), dropout.keep(), dropout.key.step);
    let key = dropout.key.for_layer(layer_id);
    let mut mask = vec![0.0; dropout.tokens.host.len() * width];
    mask.par_chunks_exact_mut(width).zip(&dropout.tokens.host).for_each(|(row, token)| {
        host::simd(
            #[inline(always)]
            || {
                for (i, four) in row.chunks_mut(4).enumerate() {
                    let bits = philox([i as u32, token.position, token.row, step], key);
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
        let mask = |tokens: &[Token], layer_id, width| {
            let tokens = Tokens::new(tokens.to_vec(), &Device::cpu());
            super::mask(Dropout { p: 0.25, key: RngKey { seed: 7, step: 2 }, tokens: &tokens }, layer_id, width)
        };
        let whole = mask(&tokens, 5, 13);
        assert_eq!(mask(&tokens[2..], 5, 13), whole[26..]);
        assert_ne!(mask(&tokens, 6, 13), whole, "another layer");
        let many: Vec<Token> = (0..400).map(|i| token(i, 0)).collect();
        let kept = mask(&many, 0, 256).iter().filter(|&&m| m != 0.0).count();
        // 102,400 draws with p = 0.25: standard deviation 139; five of them.
        assert!(kept.abs_diff(76_800) < 700, "{kept} kept");
        assert!(whole.iter().all(|&m| m == 0.0 || m == 1.0 / 0.75));
    }
}
