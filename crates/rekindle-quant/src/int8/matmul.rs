//! The product of LLM.int8() for inference (arXiv:2208.07339, §3).

use half::f16;
use rayon::prelude::*;

use super::{Int8Tensor, QuantizedActivations, decoded};
use crate::Element;
use crate::simd::dispatch;

/// Number of weight rows per task of the thread pool.
const TASK: usize = 32;

/// Number of weight rows that share each load of the activations.
const GROUP: usize = 4;

/// Number of sums kept in parallel, so that the compiler can vectorize.
const LANES: usize = 32;

/// The number of columns whose products fit an i32: 2¹⁶ · 128 · 127 < 2³¹.
const EXACT: usize = 1 << 16;

/// 1/127² with bitsandbytes' digits.
const DEQUANT: f32 = 6.200_012e-5;

impl Int8Tensor {
    /// Computes `out = x · Wᵀ` with 8-bit activations and the outlier decomposition, like `bitsandbytes.matmul` for x
    /// of type `T`:
    ///
    /// out = f16(Σ code_x · code_w · SCA · SCB / 127²) + Σ over outlier columns of x · w
    ///
    /// The first sum is exact in integers. In the second, x and the decoded w are of type `T`, and their products and
    /// sums are f32. The result is rounded once to `T`. LLM.int8() uses threshold 6; 0 disables the decomposition.
    /// [`QuantizedActivations`] defines outliers.
    ///
    /// # Shapes
    /// `x` `[tokens, in]`, `out` `[tokens, out]`, for a weight `[out, in]`.
    ///
    /// # Dtypes
    /// On the goldens every bit equals bitsandbytes'. With outlier columns this is not guaranteed in general: cuBLAS
    /// sums over them in its own order, which can change the last bits of the f32 sum.
    ///
    /// # Panics
    /// If the length of `x` or `out` does not match.
    ///
    /// Tested by `goldens/int8_matmul.safetensors`.
    pub fn matmul<T: Element>(&self, x: &[T], threshold: f32, out: &mut [T]) {
        let [rows, columns] = self.shape;
        let activations = QuantizedActivations::quantize(x, columns, threshold);
        let tokens = activations.sca().len();
        assert_eq!(out.len(), tokens * rows, "products of {tokens} tokens and a weight of shape {:?}", self.shape);
        // Vector instructions multiply 16-bit integers.
        let wide: Vec<i16> = activations.codes().iter().map(|&code| i16::from(code)).collect();
        let outliers = gather(x, columns, activations.outlier_columns());
        // A task owns some columns of `out`, as one slice per token.
        let mut tasks: Vec<Vec<&mut [T]>> = Vec::new();
        tasks.resize_with(rows.div_ceil(TASK), || Vec::with_capacity(tokens));
        for row in out.chunks_mut(rows) {
            tasks.iter_mut().zip(row.chunks_mut(TASK)).for_each(|(task, piece)| task.push(piece));
        }
        let weights = self.codes.par_chunks(TASK * columns).zip(self.scb.par_chunks(TASK));
        tasks.into_par_iter().zip(weights).for_each(|(mut out, (codes, scb))| {
            dispatch(
                #[inline(always)]
                || {
                    integer_products(&wide, activations.sca(), codes, scb, &mut out);
                    if !activations.outlier_columns().is_empty() {
                        add_outliers(&outliers, activations.outlier_columns(), codes, scb, &mut out);
                    }
                },
            );
        });
    }
}

/// Collects the outlier columns of `x` as `[tokens, outliers]`.
fn gather<T: Element>(x: &[T], columns: usize, outliers: &[usize]) -> Vec<f32> {
    let mut gathered = vec![0.0; x.len() / columns * outliers.len()];
    if !outliers.is_empty() {
        for (row, to) in x.chunks(columns).zip(gathered.chunks_mut(outliers.len())) {
            to.iter_mut()
                .zip(outliers)
                .for_each(|(to, &column)| T::to_f32_slice(&row[column..=column], std::slice::from_mut(to)));
        }
    }
    gathered
}

/// Writes f16(Σ code_x · code_w · SCA · SCB / 127²) to the slices of `out`.
#[inline(always)]
fn integer_products<T: Element>(x: &[i16], sca: &[f32], codes: &[i8], scb: &[f32], out: &mut [&mut [T]]) {
    let columns = codes.len() / scb.len();
    let mut wide = vec![0i16; GROUP * columns];
    for (group, (codes, scb)) in codes.chunks(GROUP * columns).zip(scb.chunks(GROUP)).enumerate() {
        // The missing rows of a short group keep the codes of an earlier group; their products are discarded.
        wide.iter_mut().zip(codes).for_each(|(wide, &code)| *wide = i16::from(code));
        for ((x, &sca), out) in x.chunks(columns).zip(sca).zip(&mut *out) {
            let sums = dots(x, &wide);
            for ((out, sum), &scb) in out[group * GROUP..].iter_mut().zip(sums).zip(scb) {
                // The kernel adds a bias of 0, which turns −0 into 0.
                *out = T::from_f32(f16::from_f32(sum as f32 * sca * scb * DEQUANT + 0.0).to_f32());
            }
        }
    }
}

/// Adds x · w over the outlier columns.
#[inline(always)]
fn add_outliers<T: Element>(x: &[f32], outliers: &[usize], codes: &[i8], scb: &[f32], out: &mut [&mut [T]]) {
    let columns = codes.len() / scb.len();
    let mut weights = vec![0.0; outliers.len()];
    for (row, (codes, &scb)) in codes.chunks(columns).zip(scb).enumerate() {
        for (weight, &column) in weights.iter_mut().zip(outliers) {
            T::to_f32_slice(&[T::from_f32(decoded(codes[column], scb))], std::slice::from_mut(weight));
        }
        for (x, out) in x.chunks(outliers.len()).zip(&mut *out) {
            let mut sum = [0.0];
            T::to_f32_slice(&out[row..=row], &mut sum);
            out[row] = T::from_f32(sum[0] + dot(x, &weights));
        }
    }
}

/// Returns Σ x·w for each row of `weights`.
#[inline(always)]
fn dots(x: &[i16], weights: &[i16]) -> [i64; GROUP] {
    std::array::from_fn(|row| {
        let row = &weights[row * x.len()..][..x.len()];
        x.chunks(EXACT).zip(row.chunks(EXACT)).map(|(x, row)| i64::from(exact_dot(x, row))).sum()
    })
}

/// Returns an inner product; the inputs are short enough that it cannot overflow.
#[inline(always)]
fn exact_dot(x: &[i16], w: &[i16]) -> i32 {
    let mut lanes = [0i32; LANES];
    let ((x, x_rest), (w, w_rest)) = (x.as_chunks::<LANES>(), w.as_chunks::<LANES>());
    for (x, w) in x.iter().zip(w) {
        for lane in 0..LANES {
            lanes[lane] = lanes[lane].wrapping_add(i32::from(x[lane]) * i32::from(w[lane]));
        }
    }
    let rest = x_rest.iter().zip(w_rest).map(|(&x, &w)| i32::from(x) * i32::from(w));
    lanes.into_iter().chain(rest).fold(0, i32::wrapping_add)
}

/// Returns Σ a·b, using 16 partial sums.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (a, b) in a.iter().zip(b) {
        lanes = std::array::from_fn(|i| lanes[i] + a[i] * b[i]);
    }
    lanes.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_by_hand() {
        // Row scales 2 and 4: codes 127, −64 (of −63.5), 0 and 0, 127, 32 (of 31.75).
        let weight = Int8Tensor::quantize(&[2.0f32, -1.0, 0.0, 0.0, 4.0, 1.0], [2, 3]).expect("two rows of three");
        assert_eq!(weight.codes(), [127, -64, 0, 0, 127, 32]);
        // Column 2 is an outlier; the other codes are 127 and 64, with scale 1.
        let mut out = [0.0f32; 2];
        weight.matmul(&[1.0f32, 0.5, 8.0], 6.0, &mut out);
        let integer = |sum: i32, scb: f32| f16::from_f32(sum as f32 * scb * DEQUANT).to_f32();
        assert_eq!(out[0], integer(127 * 127 - 64 * 64, 2.0));
        assert_eq!(out[1], integer(64 * 127, 4.0) + 8.0 * decoded(32, 4.0));
    }

    #[test]
    fn results_do_not_depend_on_tasks_and_groups() {
        let (rows, columns, tokens) = (2 * TASK + GROUP + 1, 37, 3);
        let noise = |len: usize| (0..len).map(|i| ((i * 7919) % 997) as f32 / 100.0 - 4.9).collect::<Vec<f32>>();
        let weight = Int8Tensor::quantize(&noise(rows * columns), [rows, columns]).expect("shape fits");
        let x = noise(tokens * columns);
        let mut out = vec![0.0; tokens * rows];
        weight.matmul(&x, 4.8, &mut out);
        for row in 0..rows {
            let codes = weight.codes()[row * columns..][..columns].to_vec();
            let one = Int8Tensor::from_parts([1, columns], codes, vec![weight.scb()[row]]).expect("one row");
            let mut products = vec![0.0; tokens];
            one.matmul(&x, 4.8, &mut products);
            assert!((0..tokens).all(|token| products[token] == out[token * rows + row]), "row {row}");
        }
    }

    /// The weight has more columns than one i32 sum can hold.
    #[test]
    fn sums_over_many_columns_do_not_overflow() {
        let columns = 2 * EXACT + 5;
        let weight = Int8Tensor::from_parts([1, columns], vec![127; columns], vec![1e-4]).expect("one row");
        let mut out = [0.0f32];
        weight.matmul(&vec![1.0f32; columns], 6.0, &mut out);
        assert_eq!(out[0], f16::from_f32(columns as f32 * 1e-4).to_f32());
    }
}
