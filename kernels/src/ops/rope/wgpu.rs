//! Kernels on wgpu: the norm of a head and its rotation in one launch; the formulas stand in [`super`]. Everything is `f32`.
//!
//! A workgroup of 64 units computes one head of one token, a unit every 64th pair of channels and every 64th channel that
//! passes through. A head is read twice, from cache the second time, and written once.

use burn::tensor::Tensor as BurnTensor;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{Angles, AnglesIn, HeadNorm, Rotated, Rotation, SavedNorm};
use crate::Tensor;
use crate::ops::rms_norm::wgpu::{Factor, factor, gain};
use crate::tensor::wgpu::{arg, buffer, cubes, empty, of_burn, result, total};

/// Units of a workgroup.
const UNITS: usize = 64;

/// [`super::forward`].
pub(super) fn forward(
    x: &Tensor<2>,
    head_dim: usize,
    norm: Option<&HeadNorm>,
    rotation: Option<Rotation<'_>>,
) -> Option<Rotated> {
    let [tokens, width] = x.dims();
    let heads = width / head_dim;
    let x = buffer(x)?;
    let tables = Tables::of(rotation, &x)?;
    let (weight, gain) = norm.map_or(Some((x.clone(), Factor::One)), |norm| factor(&norm.gain, &x))?;
    let (y, rstd) = (empty(&x, [tokens, width]), empty(&x, [tokens * heads]));
    let shape = Shape { head_dim, half: tables.half, interleaved: tables.interleaved, has_norm: norm.is_some(), gain };
    // SAFETY: the kernel reads and writes heads below `rows` alone.
    #[allow(unsafe_code)]
    unsafe {
        forward_kernel::launch_unchecked(
            &x.client,
            cubes(tokens * heads),
            CubeDim::new_1d(UNITS as u32),
            arg(&x),
            arg(&weight),
            arg(&tables.cos),
            arg(&tables.sin),
            arg(&y),
            arg(&rstd),
            (tokens * heads) as u32,
            heads as u32,
            norm.map_or(0.0, |norm| norm.eps as f32),
            shape,
        );
    }
    Some((result(y), norm.map(|_| result(rstd))))
}

/// [`super::backward`] without the gradient to the weight.
pub(super) fn backward(
    dy: &Tensor<2>,
    head_dim: usize,
    saved: Option<&SavedNorm<'_>>,
    rotation: Option<Rotation<'_>>,
) -> Option<Tensor<2>> {
    let [tokens, width] = dy.dims();
    let heads = width / head_dim;
    let dy = buffer(dy)?;
    let tables = Tables::of(rotation, &dy)?;
    let ((weight, gain), x, rstd) = match saved {
        None => ((dy.clone(), Factor::One), dy.clone(), dy.clone()),
        Some((norm, x, rstd)) => (factor(&norm.gain, &dy)?, buffer(x)?, buffer(rstd)?),
    };
    let dx = empty(&dy, [tokens, width]);
    let shape = Shape { head_dim, half: tables.half, interleaved: tables.interleaved, has_norm: saved.is_some(), gain };
    // SAFETY: as above.
    #[allow(unsafe_code)]
    unsafe {
        backward_kernel::launch_unchecked(
            &dy.client,
            cubes(tokens * heads),
            CubeDim::new_1d(UNITS as u32),
            arg(&dy),
            arg(&x),
            arg(&weight),
            arg(&rstd),
            arg(&tables.cos),
            arg(&tables.sin),
            arg(&dx),
            (tokens * heads) as u32,
            heads as u32,
            shape,
        );
    }
    Some(result(dx))
}

/// The angles of a rotation, or any buffer where there is none.
struct Tables {
    cos: CubeTensor,
    sin: CubeTensor,
    half: usize,
    interleaved: bool,
}

impl Tables {
    fn of(rotation: Option<Rotation<'_>>, x: &CubeTensor) -> Option<Self> {
        let Some(Rotation { angles: Angles(AnglesIn::Burn(angles)), interleaved }) = rotation else {
            return rotation.is_none().then(|| Self { cos: x.clone(), sin: x.clone(), half: 0, interleaved: false });
        };
        let [_, half] = angles.cos.dims();
        let table = |table: &BurnTensor<2>| if half == 0 { Some(x.clone()) } else { of_burn(table) };
        Some(Self { cos: table(&angles.cos)?, sin: table(&angles.sin)?, half, interleaved })
    }
}

/// The sizes of a head and the options that change the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    head_dim: usize,
    half: usize,
    interleaved: bool,
    has_norm: bool,
    gain: Factor,
}

#[cube(launch_unchecked)]
fn forward_kernel(
    x: &[f32],
    weight: &[f32],
    cos: &[f32],
    sin: &[f32],
    y: &mut [f32],
    rstd: &mut [f32],
    rows: u32,
    heads: u32,
    eps: f32,
    #[comptime] shape: Shape,
) {
    let row = CUBE_POS;
    if row < rows as usize {
        let head_dim = comptime!(shape.head_dim);
        let half = comptime!(shape.half);
        let first = row * head_dim;
        let token = row / heads as usize;
        let mut scale = 1.0f32;
        if comptime!(shape.has_norm) {
            let mut squares = 0.0f32;
            let mut i = UNIT_POS as usize;
            while i < head_dim {
                squares += x[first + i] * x[first + i];
                i += UNITS;
            }
            scale = 1.0 / (total(squares, UNITS) / comptime!(head_dim as f32) + eps).sqrt();
            if UNIT_POS == 0 {
                rstd[row] = scale;
            }
        }
        let mut pair = UNIT_POS as usize;
        while pair < half {
            let (a, b) = members(pair, shape);
            let (c, s) = (cos[token * half + pair], sin[token * half + pair]);
            let u = x[first + a] * scale * gain(weight, a, shape.gain);
            let v = x[first + b] * scale * gain(weight, b, shape.gain);
            y[first + a] = u * c - v * s;
            y[first + b] = v * c + u * s;
            pair += UNITS;
        }
        let mut i = comptime!(2 * shape.half) + UNIT_POS as usize;
        while i < head_dim {
            y[first + i] = x[first + i] * scale * gain(weight, i, shape.gain);
            i += UNITS;
        }
    }
}

#[cube(launch_unchecked)]
fn backward_kernel(
    dy: &[f32],
    x: &[f32],
    weight: &[f32],
    rstd: &[f32],
    cos: &[f32],
    sin: &[f32],
    dx: &mut [f32],
    rows: u32,
    heads: u32,
    #[comptime] shape: Shape,
) {
    let row = CUBE_POS;
    if row < rows as usize {
        let head_dim = comptime!(shape.head_dim);
        let half = comptime!(shape.half);
        let first = row * head_dim;
        let token = row / heads as usize;
        let mut scale = 1.0f32;
        if comptime!(shape.has_norm) {
            scale = rstd[row];
        }
        // dx first holds the gradient to the normalized row; its product with the row is summed meanwhile.
        let mut product = 0.0f32;
        let mut pair = UNIT_POS as usize;
        while pair < half {
            let (a, b) = members(pair, shape);
            let (c, s) = (cos[token * half + pair], sin[token * half + pair]);
            let u = (dy[first + a] * c + dy[first + b] * s) * gain(weight, a, shape.gain);
            let v = (dy[first + b] * c - dy[first + a] * s) * gain(weight, b, shape.gain);
            if comptime!(shape.has_norm) {
                product += u * (x[first + a] * scale) + v * (x[first + b] * scale);
            }
            dx[first + a] = u;
            dx[first + b] = v;
            pair += UNITS;
        }
        let mut i = comptime!(2 * shape.half) + UNIT_POS as usize;
        while i < head_dim {
            let u = dy[first + i] * gain(weight, i, shape.gain);
            if comptime!(shape.has_norm) {
                product += u * (x[first + i] * scale);
            }
            dx[first + i] = u;
            i += UNITS;
        }
        if comptime!(shape.has_norm) {
            let along = total(product, UNITS) / comptime!(head_dim as f32);
            // The same elements as above: a unit reads what it wrote.
            let mut pair = UNIT_POS as usize;
            while pair < half {
                let (a, b) = members(pair, shape);
                dx[first + a] = scale * (dx[first + a] - x[first + a] * scale * along);
                dx[first + b] = scale * (dx[first + b] - x[first + b] * scale * along);
                pair += UNITS;
            }
            let mut i = comptime!(2 * shape.half) + UNIT_POS as usize;
            while i < head_dim {
                dx[first + i] = scale * (dx[first + i] - x[first + i] * scale * along);
                i += UNITS;
            }
        }
    }
}

/// The two channels of a pair.
#[cube]
fn members(pair: usize, #[comptime] shape: Shape) -> (usize, usize) {
    if comptime!(shape.interleaved) { (2 * pair, 2 * pair + 1) } else { (pair, pair + shape.half) }
}
