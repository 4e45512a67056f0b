//! Softmax of a chunk of logits on wgpu; the formulas stand in [`super`]. Everything is `f32`.
//!
//! The product h·Wᵀ is Burn's. A workgroup computes one row: the first kernel reads the logits once for their maximum and
//! their sums, each unit over every 256th logit with an online rescaling, and the second writes the gradient in their place.
//! Bytes a logit: 4 + 8. Burn's operations take about 12 launches, and hold up to three more matrices of the size of the
//! logits.

use burn::tensor::{DType, Tensor, TensorData};
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::LmHead;
use super::token_log_probs::RowStatistics;
use crate::ops::matmul::{Form, portable::product};
use crate::tensor::wgpu::{arg, cubes, empty, floats, of_burn, result, words};

/// Units of a workgroup.
const UNITS: usize = 256;

/// Values of a row's statistics: the target's logit, maximum, Σ e, Σ e·(x − max) with e = exp(x − max).
const FIELDS: usize = 4;

/// [`super::portable::forward`].
pub(super) fn forward(h: &Tensor<2>, head: &LmHead, targets: &[u32]) -> Option<Vec<f32>> {
    let rows = statistics(h, head, targets)?;
    Some(rows.into_iter().map(RowStatistics::nll).collect())
}

/// [`super::portable::statistics`].
pub(super) fn statistics(h: &Tensor<2>, head: &LmHead, targets: &[u32]) -> Option<Vec<RowStatistics>> {
    let logits = Logits::of(h, head, targets)?;
    Some(rows(logits.statistics()))
}

/// [`super::portable::forward_dlogits`].
pub(super) fn forward_dlogits(
    h: &Tensor<2>,
    head: &LmHead,
    targets: &[u32],
    weights: &[f32],
) -> Option<(Vec<f32>, Tensor<2>)> {
    let logits = Logits::of(h, head, targets)?;
    let statistics = logits.statistics();
    let dlogits = logits.gradient(&statistics, weights);
    Some((rows(statistics).into_iter().map(RowStatistics::nll).collect(), dlogits))
}

/// [`super::portable::dlogits`].
pub(super) fn dlogits(
    h: &Tensor<2>,
    head: &LmHead,
    targets: &[u32],
    weights: &[f32],
    statistics: &[RowStatistics],
) -> Option<Tensor<2>> {
    let logits = Logits::of(h, head, targets)?;
    let values = statistics.iter().flat_map(|row| [row.logit, row.max, row.sum, row.shifted]).collect();
    let data = TensorData::new(values, [statistics.len(), FIELDS]);
    let statistics = of_burn(&Tensor::<2>::from_data(data, (&h.device(), DType::F32)))?;
    Some(logits.gradient(&statistics, weights))
}

/// Reads the statistics back.
fn rows(statistics: CubeTensor) -> Vec<RowStatistics> {
    let values = result::<2>(statistics).into_burn().into_data_dtype(DType::F32);
    let values = values.try_into_vec::<f32>().expect("cast to f32 just before");
    let row = |&[logit, max, sum, shifted]: &[f32; FIELDS]| RowStatistics { logit, max, sum, shifted };
    values.as_chunks().0.iter().map(row).collect()
}

/// h·Wᵀ of some rows, before the multiplier and the cap.
struct Logits {
    values: CubeTensor,
    targets: Vec<u32>,
    vocab: usize,
    multiplier: f32,
    softcap: Option<f32>,
}

impl Logits {
    fn of(h: &Tensor<2>, head: &LmHead, targets: &[u32]) -> Option<Self> {
        // Before the product, which the portable path would repeat.
        of_burn(&h.clone().narrow(0, 0, 1))?;
        let values = of_burn(&product(h, head.weight.burn(), Form::Nt))?;
        let (multiplier, softcap) = (head.multiplier, head.softcap);
        Some(Self { values, targets: targets.to_vec(), vocab: head.vocab(), multiplier, softcap })
    }

    /// `[rows, 4]`.
    fn statistics(&self) -> CubeTensor {
        let statistics = empty(&self.values, [self.targets.len(), FIELDS]);
        // SAFETY: the kernel reads and writes rows below `rows` alone, and targets are below `vocab`.
        #[allow(unsafe_code)]
        unsafe {
            statistics_kernel::launch_unchecked(
                &self.values.client,
                cubes(self.targets.len()),
                CubeDim::new_1d(UNITS as u32),
                arg(&self.values),
                words(&self.values, &self.targets),
                arg(&statistics),
                self.targets.len() as u32,
                self.vocab as u32,
                self.multiplier,
                self.softcap.unwrap_or(1.0),
                self.softcap.is_some(),
            );
        }
        statistics
    }

    /// The gradient of Σ weights · nll to h·Wᵀ, in the memory of the logits.
    fn gradient(self, statistics: &CubeTensor, weights: &[f32]) -> Tensor<2> {
        // SAFETY: as above; nothing else refers to the logits.
        #[allow(unsafe_code)]
        unsafe {
            gradient_kernel::launch_unchecked(
                &self.values.client,
                cubes(self.targets.len()),
                CubeDim::new_1d(UNITS as u32),
                arg(&self.values),
                words(&self.values, &self.targets),
                arg(statistics),
                floats(&self.values, weights),
                self.targets.len() as u32,
                self.vocab as u32,
                self.multiplier,
                self.softcap.unwrap_or(1.0),
                self.softcap.is_some(),
            );
        }
        result::<2>(self.values).into_burn()
    }
}

#[cube(launch_unchecked)]
fn statistics_kernel(
    logits: &[f32],
    targets: &[u32],
    statistics: &mut [f32],
    rows: u32,
    vocab: u32,
    multiplier: f32,
    softcap: f32,
    #[comptime] has_softcap: bool,
) {
    let row = CUBE_POS;
    if row < rows as usize {
        let width = vocab as usize;
        let first = row * width;
        let unit = UNIT_POS as usize;
        // Every unit begins with the row's first logit, so that none has an empty maximum.
        let mut max = shaped(logits[first], multiplier, softcap, has_softcap);
        let mut sum = 0.0f32;
        let mut shifted = 0.0f32;
        let mut i = unit;
        while i < width {
            let x = shaped(logits[first + i], multiplier, softcap, has_softcap);
            if x > max {
                let factor = (max - x).exp();
                shifted = factor * (shifted + (max - x) * sum);
                sum *= factor;
                max = x;
            }
            let e = (x - max).exp();
            sum += e;
            shifted += e * (x - max);
            i += UNITS;
        }

        let mut maxima = Shared::<[f32]>::new_slice(UNITS);
        let mut sums = Shared::<[f32]>::new_slice(UNITS);
        let mut moments = Shared::<[f32]>::new_slice(UNITS);
        maxima[unit] = max;
        sums[unit] = sum;
        moments[unit] = shifted;
        sync_cube();
        let mut half = comptime!(UNITS / 2).runtime();
        while half > 0 {
            if unit < half {
                let (a, b) = (maxima[unit], maxima[unit + half]);
                let max = a.max(b);
                let (to_a, to_b) = (a - max, b - max);
                let (of_a, of_b) = (to_a.exp(), to_b.exp());
                moments[unit] = of_a * (moments[unit] + to_a * sums[unit])
                    + of_b * (moments[unit + half] + to_b * sums[unit + half]);
                sums[unit] = of_a * sums[unit] + of_b * sums[unit + half];
                maxima[unit] = max;
            }
            sync_cube();
            half /= 2;
        }
        if unit == 0 {
            let at = row * FIELDS;
            let target = logits[first + targets[row] as usize];
            statistics[at] = shaped(target, multiplier, softcap, has_softcap);
            statistics[at + 1] = maxima[0];
            statistics[at + 2] = sums[0];
            statistics[at + 3] = moments[0];
        }
    }
}

#[cube(launch_unchecked)]
fn gradient_kernel(
    logits: &mut [f32],
    targets: &[u32],
    statistics: &[f32],
    weights: &[f32],
    rows: u32,
    vocab: u32,
    multiplier: f32,
    softcap: f32,
    #[comptime] has_softcap: bool,
) {
    let row = CUBE_POS;
    if row < rows as usize {
        let width = vocab as usize;
        let first = row * width;
        let target = targets[row] as usize;
        let weight = weights[row];
        let (max, sum) = (statistics[row * FIELDS + 1], statistics[row * FIELDS + 2]);
        let mut i = UNIT_POS as usize;
        while i < width {
            let x = shaped(logits[first + i], multiplier, softcap, has_softcap);
            let mut p = (x - max).exp() / sum;
            if i == target {
                p -= 1.0;
            }
            let mut gradient = p * weight;
            if comptime!(has_softcap) {
                // d(c·tanh(z / c))/dz = 1 − tanh²(z / c).
                gradient *= 1.0 - (x / softcap) * (x / softcap);
            }
            logits[first + i] = gradient;
            i += UNITS;
        }
    }
}

/// A logit with its multiplier and cap.
#[cube]
fn shaped(logit: f32, multiplier: f32, softcap: f32, #[comptime] has_softcap: bool) -> f32 {
    let x = logit * multiplier;
    if comptime!(has_softcap) { (x / softcap).tanh() * softcap } else { x }
}
