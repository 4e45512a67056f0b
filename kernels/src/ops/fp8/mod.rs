//! Products of rows with frozen fp8 weights, in fp8: e4m3 codes times e4m3 codes, sums in f32.
//!
//! A row v of f32 values becomes codes q = e4m3(v / s) with one scale s = max|v| / 448, rounded to nearest, ties to even. The
//! weight has codes c and a scale for each of its rows, W\[n, k\] = w\[n\]·c\[n, k\]. Then
//!
//! - y\[t, n\] = s\[t\]·w\[n\]·Σ_k q\[t, k\]·c\[n, k\] + bias\[n\], where q and s are those of x's row t;
//! - dx\[t, k\] = s\[t\]·Σ_n q\[t, n\]·c\[n, k\], where q and s are those of the row dy\[t, n\]·w\[n\].
//!
//! The gradient to x takes the scales of the weight into the rows that are rounded, because they belong to the index that it
//! sums over. Linears that read the same input are one weight here: a row of dy is that of all of them.
//!
//! # Shapes
//! W `[out, in]`; x, dx `[tokens, in]`; y, dy `[tokens, out]`.
//!
//! # Dtypes
//! x, y and their gradients of the compute dtype; codes e4m3, scales and sums f32. On CUDA the tensor cores sum the products of
//! codes, and keep fewer bits of each partial sum than f32 has; elsewhere the values of the codes are multiplied in f32.
//!
//! # Gradients
//! To x alone, as if nothing was rounded (straight through). Nothing is saved.
//!
//! # Sources
//! Micikevicius et al., arXiv:2209.05433 (the format); torchao's row-wise recipe has the same scales.

pub(crate) mod cuda;
mod rounding;

use std::sync::Arc;

use crate::params::quantized::{Fp8Scaling, Place, QuantizedData, QuantizedFormat};
use crate::runtime::limits::MAX_FP8_ROW;
use crate::{Backend, DType, Device, QuantizedWeight, Tensor, Weight, from_f32, to_f32};

/// The products of frozen linears that are computed in fp8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fp8Products {
    /// Those of the forward pass. Gradients are multiplied with the decoded weight.
    Forward,
    /// Those of the forward pass and of the gradient to the input.
    ForwardAndBackward,
}

/// Rows of codes on CUDA begin at multiples of this many bytes.
const ROW_BYTES: usize = 16;

/// The most rows that the weights of linears with the same input have together, and the most columns.
pub const MAX_ROWS: usize = MAX_FP8_ROW;

/// Returns why the products with a weight cannot be in fp8, or `None` if they can.
pub fn refusal(weight: &Weight) -> Option<String> {
    let weight = match weight {
        Weight::Quantized(weight) => weight,
        Weight::Frozen(_) => {
            return Some(
                "is dense; fp8 products need every linear in fp8: load a dense checkpoint, without skip_modules"
                    .to_owned(),
            );
        }
        Weight::Sharded(_) => {
            return Some("is divided among the ranks; fp8 products need shard_base = false".to_owned());
        }
        Weight::Trained(_) => {
            return Some("is trained, and fp8 products are for frozen weights; train an adapter".to_owned());
        }
    };
    let ([out, input], on_cuda) = (weight.dims(), weight.cuda().is_some());
    if on_cuda && !(out.is_multiple_of(ROW_BYTES) && input.is_multiple_of(ROW_BYTES)) {
        return Some(format!("is {out} × {input}; fp8 products on CUDA take multiples of {ROW_BYTES}"));
    }
    if out.max(input) > MAX_ROWS {
        return Some(format!("is {out} × {input}; fp8 products take up to {MAX_ROWS} rows and columns"));
    }
    let scales = match &format_of(weight)?.format {
        QuantizedFormat::Fp8 { scaling: Fp8Scaling::Row, .. } => return None,
        QuantizedFormat::Fp8 { scaling: Fp8Scaling::Block, .. } => "a scale for each block of 128 × 128",
        QuantizedFormat::Fp8 { scaling: Fp8Scaling::Tensor, .. } => "a single scale",
        other => return Some(format!("is kept in {}; fp8 products take a dense checkpoint", other.name())),
    };
    Some(format!("has {scales}, and fp8 products take one for each row; use a dense checkpoint"))
}

/// The format of a weight, whose codes may be missing; `None` for one without values.
fn format_of(weight: &QuantizedWeight) -> Option<Arc<QuantizedData>> {
    match &weight.0 {
        Place::Meta(_) => None,
        Place::Cuda(_, rest) => Some(Arc::clone(rest)),
        Place::Host(_) | Place::Copied(..) | Place::Burn(_) => Some(weight.data()),
    }
}

/// Returns true if a device has products in fp8: compute capability 9.0, or the CPU and other devices of Burn, where values
/// are rounded as there and multiplied in f32.
pub fn is_on(device: &Device) -> bool {
    match device {
        Device::Cuda(cuda) => cuda::has_products(cuda),
        Device::Burn(_) | Device::Meta(_) => true,
    }
}

/// Returns `x · Wᵀ + bias` in fp8, for a weight that [`refusal`] has nothing against.
pub fn nt(weight: &QuantizedWeight, x: &Tensor<2>, bias: Option<&Tensor<1>>) -> Tensor<2> {
    match Backend::of(x) {
        Backend::Meta => weight.nt(x, bias),
        Backend::Cuda => unreachable!("products in fp8 on CUDA are those of stacked weights"),
        Backend::Cpu | Backend::Portable => {
            let bias = bias.map(|bias| bias.clone().cast(DType::F32));
            weight.nt(&rounded_rows(x), bias.as_ref()).cast(x.dtype())
        }
    }
}

/// Returns `Σ_j dy_j · W_j` in fp8, the gradient to the common input of linears.
pub fn input_gradient(weights: &[&QuantizedWeight], dys: &[Tensor<2>]) -> Tensor<2> {
    let dtype = dys[0].dtype();
    if Backend::of(&dys[0]) == Backend::Meta {
        let dx = weights.iter().zip(dys).fold(None, |dx, (weight, dy)| Some(weight.nn(dy, dx)));
        return dx.expect("there is a linear");
    }
    let device = dys[0].device();
    let scales_of = |weight: &&QuantizedWeight| match &weight.data().format {
        QuantizedFormat::Fp8 { scales, .. } => scales.clone(),
        other => unreachable!("{} were refused", other.name()),
    };
    let scales: Vec<f32> = weights.iter().flat_map(scales_of).collect();
    let row = |values: Vec<f32>| from_f32::<1>(values, [scales.len()], &device, DType::F32);
    let dy = Tensor::cat_columns(dys.to_vec()).cast(DType::F32);
    let rounded = rounded_rows(&dy.scale_columns(&row(scales.clone())));
    // A weight is multiplied with its scales, which the rows have already.
    let rounded = rounded.scale_columns(&row(scales.iter().map(|scale| scale.recip()).collect()));
    let mut first = 0;
    let dx = weights.iter().fold(None, |dx, weight| {
        let [out, _] = weight.dims();
        first += out;
        Some(weight.nn(&rounded.columns(first - out, out), dx))
    });
    dx.expect("there is a linear").cast(dtype)
}

/// Returns x with every row rounded to codes and decoded again, in f32.
fn rounded_rows(x: &Tensor<2>) -> Tensor<2> {
    let (dims @ [_, cols], device) = (x.dims(), x.device());
    let mut values = to_f32(x.clone());
    values.chunks_mut(cols.max(1)).for_each(rounding::round_row);
    from_f32(values, dims, &device, DType::F32)
}
