//! Kernels on wgpu; the formulas stand in [`super`]. Everything is `f32`.
//!
//! A workgroup computes one row: each unit sums every [`units`]-th channel, the sums meet in shared memory, and a second pass
//! over the row, which is in cache, writes the result. Burn's operations take 8 launches each way, with the
//! residual, and write the row between them. Bytes a row: forward 2·hidden·4 read and written, with the residual 4·hidden·4;
//! backward 3·hidden·4, or 4·hidden·4 with a residual.

use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{Gain, GainForm};
use crate::Tensor;
use crate::tensor::wgpu::{arg, buffer, cubes, empty, result, total};

/// [`super::forward`].
pub(super) fn forward(x: &Tensor<2>, gain: &Gain, eps: f64) -> Option<(Tensor<2>, Tensor<1>)> {
    let [tokens, hidden] = x.dims();
    let x = buffer(x)?;
    let (weight, form) = factor(gain, &x)?;
    let (y, rstd) = (empty(&x, [tokens, hidden]), empty(&x, [tokens]));
    let units = units(hidden);
    // SAFETY: the kernel reads and writes rows below `tokens` alone.
    #[allow(unsafe_code)]
    unsafe {
        forward_kernel::launch_unchecked(
            &x.client,
            cubes(tokens),
            CubeDim::new_1d(units as u32),
            arg(&x),
            arg(&weight),
            arg(&y),
            arg(&rstd),
            tokens as u32,
            hidden as u32,
            eps as f32,
            form,
            units,
        );
    }
    Some((result(y), result(rstd)))
}

/// [`super::add_forward`].
pub(super) fn add_forward(
    x: &Tensor<2>,
    delta: &Tensor<2>,
    gain: &Gain,
    eps: f64,
) -> Option<(Tensor<2>, Tensor<2>, Tensor<1>)> {
    let [tokens, hidden] = x.dims();
    let (x, delta) = (buffer(x)?, buffer(delta)?);
    let (weight, form) = factor(gain, &x)?;
    let (sum, y, rstd) = (empty(&x, [tokens, hidden]), empty(&x, [tokens, hidden]), empty(&x, [tokens]));
    let units = units(hidden);
    // SAFETY: as above.
    #[allow(unsafe_code)]
    unsafe {
        add_forward_kernel::launch_unchecked(
            &x.client,
            cubes(tokens),
            CubeDim::new_1d(units as u32),
            arg(&x),
            arg(&delta),
            arg(&weight),
            arg(&sum),
            arg(&y),
            arg(&rstd),
            tokens as u32,
            hidden as u32,
            eps as f32,
            form,
            units,
        );
    }
    Some((result(sum), result(y), result(rstd)))
}

/// [`super::recompute`].
pub(super) fn recompute(x: &Tensor<2>, gain: &Gain, rstd: &Tensor<1>) -> Option<Tensor<2>> {
    let [tokens, hidden] = x.dims();
    let (x, rstd) = (buffer(x)?, buffer(rstd)?);
    let (weight, form) = factor(gain, &x)?;
    let y = empty(&x, [tokens, hidden]);
    let units = units(hidden);
    // SAFETY: as above.
    #[allow(unsafe_code)]
    unsafe {
        recompute_kernel::launch_unchecked(
            &x.client,
            cubes(tokens),
            CubeDim::new_1d(units as u32),
            arg(&x),
            arg(&weight),
            arg(&rstd),
            arg(&y),
            tokens as u32,
            hidden as u32,
            form,
            units,
        );
    }
    Some(result(y))
}

/// [`super::backward`].
pub(super) fn backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    gain: &Gain,
    rstd: &Tensor<1>,
    residual: Option<&Tensor<2>>,
) -> Option<Tensor<2>> {
    let [tokens, hidden] = x.dims();
    let (dy, x, rstd) = (buffer(dy)?, buffer(x)?, buffer(rstd)?);
    let (weight, form) = factor(gain, &x)?;
    let has_residual = residual.is_some();
    let residual = residual.map_or(Some(x.clone()), buffer)?;
    let dx = empty(&x, [tokens, hidden]);
    let units = units(hidden);
    // SAFETY: as above.
    #[allow(unsafe_code)]
    unsafe {
        backward_kernel::launch_unchecked(
            &x.client,
            cubes(tokens),
            CubeDim::new_1d(units as u32),
            arg(&dy),
            arg(&x),
            arg(&weight),
            arg(&rstd),
            arg(&residual),
            arg(&dx),
            tokens as u32,
            hidden as u32,
            form,
            has_residual,
            units,
        );
    }
    Some(result(dx))
}

/// The buffer of the weight, or any where there is none.
pub(crate) fn factor(gain: &Gain, x: &CubeTensor) -> Option<(CubeTensor, Factor)> {
    let form = match gain.form() {
        GainForm::Plain | GainForm::RoundedAfter => Factor::Weight,
        GainForm::OnePlus => Factor::OnePlusWeight,
        GainForm::None => Factor::One,
    };
    Some((gain.weight().map_or(Some(x.clone()), buffer)?, form))
}

/// g.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Factor {
    One,
    Weight,
    OnePlusWeight,
}

/// Units that share a row: a power of two.
fn units(hidden: usize) -> usize {
    if hidden <= 1024 { 64 } else { 256 }
}

#[cube(launch_unchecked)]
fn forward_kernel(
    x: &[f32],
    weight: &[f32],
    y: &mut [f32],
    rstd: &mut [f32],
    tokens: u32,
    hidden: u32,
    eps: f32,
    #[comptime] factor: Factor,
    #[comptime] units: usize,
) {
    let row = CUBE_POS;
    if row < tokens as usize {
        let width = hidden as usize;
        let first = row * width;
        let mut squares = 0.0f32;
        let mut i = UNIT_POS as usize;
        while i < width {
            let value = x[first + i];
            squares += value * value;
            i += units;
        }
        let r = root(squares, rstd, row, width, eps, units);
        scale_row(x, weight, y, first, width, r, factor, units);
    }
}

#[cube(launch_unchecked)]
fn add_forward_kernel(
    x: &[f32],
    delta: &[f32],
    weight: &[f32],
    sum: &mut [f32],
    y: &mut [f32],
    rstd: &mut [f32],
    tokens: u32,
    hidden: u32,
    eps: f32,
    #[comptime] factor: Factor,
    #[comptime] units: usize,
) {
    let row = CUBE_POS;
    if row < tokens as usize {
        let width = hidden as usize;
        let first = row * width;
        let mut squares = 0.0f32;
        let mut i = UNIT_POS as usize;
        while i < width {
            let value = x[first + i] + delta[first + i];
            sum[first + i] = value;
            squares += value * value;
            i += units;
        }
        let r = root(squares, rstd, row, width, eps, units);
        // A unit reads what it wrote.
        scale_row(&*sum, weight, y, first, width, r, factor, units);
    }
}

#[cube(launch_unchecked)]
fn recompute_kernel(
    x: &[f32],
    weight: &[f32],
    rstd: &[f32],
    y: &mut [f32],
    tokens: u32,
    hidden: u32,
    #[comptime] factor: Factor,
    #[comptime] units: usize,
) {
    let row = CUBE_POS;
    if row < tokens as usize {
        let width = hidden as usize;
        scale_row(x, weight, y, row * width, width, rstd[row], factor, units);
    }
}

/// Returns 1 / √(mean + eps) of a row whose squares the units have summed, and writes it.
#[cube]
fn root(squares: f32, rstd: &mut [f32], row: usize, width: usize, eps: f32, #[comptime] units: usize) -> f32 {
    let r = 1.0 / (total(squares, units) / width as f32 + eps).sqrt();
    if UNIT_POS == 0 {
        rstd[row] = r;
    }
    r
}

/// y = g ∘ x·r of the row from `first` on.
#[cube]
fn scale_row(
    x: &[f32],
    weight: &[f32],
    y: &mut [f32],
    first: usize,
    width: usize,
    r: f32,
    #[comptime] factor: Factor,
    #[comptime] units: usize,
) {
    let mut i = UNIT_POS as usize;
    while i < width {
        y[first + i] = x[first + i] * r * gain(weight, i, factor);
        i += units;
    }
}

#[cube(launch_unchecked)]
fn backward_kernel(
    dy: &[f32],
    x: &[f32],
    weight: &[f32],
    rstd: &[f32],
    residual: &[f32],
    dx: &mut [f32],
    tokens: u32,
    hidden: u32,
    #[comptime] factor: Factor,
    #[comptime] has_residual: bool,
    #[comptime] units: usize,
) {
    let row = CUBE_POS;
    if row < tokens as usize {
        let width = hidden as usize;
        let first = row * width;
        let r = rstd[row];
        let mut along = 0.0f32;
        let mut i = UNIT_POS as usize;
        while i < width {
            along += dy[first + i] * gain(weight, i, factor) * (x[first + i] * r);
            i += units;
        }
        let along = total(along, units) / hidden as f32;
        let mut i = UNIT_POS as usize;
        while i < width {
            let mut value = r * (dy[first + i] * gain(weight, i, factor) - x[first + i] * r * along);
            if comptime!(has_residual) {
                value += residual[first + i];
            }
            dx[first + i] = value;
            i += units;
        }
    }
}

/// g of channel `i`.
#[cube]
pub(crate) fn gain(weight: &[f32], i: usize, #[comptime] factor: Factor) -> f32 {
    match comptime!(factor) {
        Factor::One => 1.0f32.runtime(),
        Factor::Weight => weight[i],
        Factor::OnePlusWeight => 1.0 + weight[i],
    }
}
