//! `f32` on the CPU: loops over slices of the backend's own storage, split over threads by rows.
//!
//! Results do not depend on timing: each output element is computed by one thread in a fixed order,
//! and sums over rows are taken over chunks of fixed size.
#![allow(unsafe_code)]

pub(crate) mod exp;
mod view;

use rayon::prelude::*;
pub(crate) use view::{View, from_vec, into_vec, with_mut};

/// Rows handed to one thread at a time; also the unit of sums over rows, so fixed.
pub(crate) const ROWS: usize = 32;

/// Elements of a flat buffer handed to one thread at a time.
pub(crate) const CHUNK: usize = 16 * 1024;

/// Runs `f` compiled for the widest vector instructions of this processor.
///
/// Closures handed to it are `#[inline(always)]`: one that stays a function of its own is compiled for the
/// baseline, where a fused multiply-add is a call into the C library.
#[inline(always)]
pub(crate) fn simd<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// Calls `f(first_row, rows)` for blocks of [`ROWS`] rows of `data`, in parallel.
pub(crate) fn for_rows(data: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    data.par_chunks_mut(ROWS * width.max(1)).enumerate().for_each(|(i, rows)| {
        simd(
            #[inline(always)]
            || f(i * ROWS, rows),
        )
    });
}

/// Returns the most that tasks of these sizes take at a time, one on each thread of the pool.
pub(crate) fn most_at_once(mut sizes: Vec<usize>) -> usize {
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    sizes.iter().take(rayon::current_num_threads()).sum()
}

/// `Σ a·b` in sixteen interleaved partial sums, which vectorizes.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let (ca, cb) = (a.chunks_exact(16), b.chunks_exact(16));
    let tail: f32 = ca.remainder().iter().zip(cb.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in ca.zip(cb) {
        for i in 0..16 {
            lanes[i] = x[i].mul_add(y[i], lanes[i]);
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// A pointer into an output that tasks write at disjoint places.
#[derive(Clone, Copy)]
pub(crate) struct Shared(*mut f32);
// SAFETY: every user writes a set of elements that no other task touches; see the call sites.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    pub(crate) fn new(data: &mut [f32]) -> Self {
        Self(data.as_mut_ptr())
    }

    /// # Safety
    /// `offset` lies within the slice this was made from.
    pub(crate) unsafe fn at(self, offset: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(offset) }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    /// Repeatable numbers in (−1, 1).
    pub(crate) fn noise(seed: u64, n: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((state >> 40) as f32 / (1u64 << 24) as f32) * 2.0 - 1.0
            })
            .collect()
    }
}
