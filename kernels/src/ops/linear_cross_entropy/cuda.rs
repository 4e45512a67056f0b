//! The head and the loss together; logits exist for one chunk of rows at a time.
//!
//! Only rows that count go through. They are gathered into chunks of a few sizes, filled up with rows that do not count,
//! so that the number of counted rows, which differs from batch to batch, makes no new shapes of products.

use super::IGNORED;
use crate::ops::matmul::cuda as matmul;
use crate::runtime::op::{blocks, int, kernel};
use crate::runtime::{Array, Cuda, DType, Form, Ints, MemoryUse, args, elementwise, entry};

/// The f32 logits held at once take no more than this: 512 rows of a vocabulary of 152 k. At 2,560 channels that is a
/// product of 0.4 TFLOP, against which its launch is nothing.
const LOGITS_BYTES: usize = 320 << 20;

/// Chunks are multiples of this many rows, the tile of the products' kernels; one of them is the least.
const ROWS: usize = 128;

/// The negative log-likelihood of every target, f32 `[1, tokens]`, 0 where it is −100.
pub(crate) fn forward(h: &Array, weight: &Array, targets: &[i32]) -> Array {
    run(h, weight, targets, None).0
}

/// [`forward`], and the gradient of `grad_scale · Σ nll` to h; that to the weight is added to `weight_grad`, f32.
pub(crate) fn forward_backward(
    h: &Array,
    weight: &Array,
    targets: &[i32],
    grad_scale: f32,
    weight_grad: Option<&Array>,
) -> (Array, Array) {
    let (nll, dh) = run(h, weight, targets, Some((grad_scale, weight_grad)));
    (nll, dh.expect("a gradient was asked for"))
}

fn run(h: &Array, weight: &Array, targets: &[i32], backward: Option<(f32, Option<&Array>)>) -> (Array, Option<Array>) {
    let (cuda, tokens, vocab) = (h.cuda(), h.rows(), weight.rows());
    assert_eq!(targets.len(), tokens, "targets of {tokens} tokens");
    let in_range = |&target: &i32| target == IGNORED || (0..vocab as i64).contains(&i64::from(target));
    assert!(targets.iter().all(in_range), "targets are {IGNORED} or below {vocab}");

    let plan = Plan::of(targets, chunk_rows(vocab));
    let scale = backward.map_or(0.0, |(scale, _)| scale);
    let lists = plan.upload(cuda, scale);
    let all = plan.is_whole();
    // Where all count, every element is written.
    let new = |dims, dtype| {
        if all {
            Array::empty(cuda, dims, dtype, MemoryUse::Activations)
        } else {
            Array::zeros(cuda, dims, dtype, MemoryUse::Activations)
        }
    };
    let nll = new([1, tokens], DType::F32);
    let dh = backward.map(|_| new(h.dims(), h.dtype()));

    for Chunk { first, live, rows } in plan.chunks() {
        let places = lists.ptr_at(first);
        let hidden = if all { h.row_range(first, rows) } else { elementwise::gather_rows(h, places, rows) };
        let logits = Logits::of(&hidden, weight);
        let losses = if all {
            column(&nll, first, rows)
        } else {
            Array::dense(cuda, [rows, 1], DType::F32, MemoryUse::Activations)
        };
        let targets = lists.ptr_at(plan.places.len() + first);
        match (&dh, backward) {
            (Some(dh), Some((_, weight_grad))) => {
                let dlogits = logits.losses_and_gradient(targets, lists.ptr_at(2 * plan.places.len()), &losses);
                if let Some(out) = weight_grad {
                    matmul::accumulate(out, 1.0, &dlogits, &hidden, Form::Tn);
                }
                if all {
                    matmul::product_into(&dh.row_range(first, rows), &dlogits, weight, Form::Nn);
                } else {
                    let part = matmul::product(&dlogits, weight, Form::Nn);
                    elementwise::scatter_rows(&part.row_range(0, live), places, dh);
                }
            }
            _ => logits.losses(targets, &losses),
        }
        if !all {
            elementwise::scatter_rows(&losses.row_range(0, live), places, &column(&nll, 0, tokens));
        }
    }
    (nll, dh)
}

/// Elements of a vector `[1, n]` as rows of one.
fn column(vector: &Array, first: usize, rows: usize) -> Array {
    vector.part(first, [rows, 1])
}

/// Rows of a chunk, at most.
fn chunk_rows(vocab: usize) -> usize {
    (LOGITS_BYTES / (4 * vocab.next_multiple_of(8))).max(ROWS) / ROWS * ROWS
}

/// The rows that are computed, in chunks.
struct Plan {
    /// The row of each counted target; when some targets do not count, rows of padding at the end, which name row 0.
    places: Vec<u32>,
    /// Their targets; −100 in the padding.
    targets: Vec<i32>,
    /// Number of rows that are not padding.
    live: usize,
    /// Rows there are.
    tokens: usize,
    /// Rows of a chunk.
    step: usize,
}

/// Places `first..first + rows`, of which the first `live` are not padding.
struct Chunk {
    first: usize,
    live: usize,
    rows: usize,
}

impl Plan {
    fn of(targets: &[i32], step: usize) -> Self {
        let counted = || targets.iter().zip(0u32..).filter(|&(&target, _)| target != IGNORED);
        let mut places: Vec<u32> = counted().map(|(_, place)| place).collect();
        let mut kept: Vec<i32> = counted().map(|(&target, _)| target).collect();
        let live = places.len();
        if live < targets.len() {
            places.resize(live.next_multiple_of(ROWS), 0);
            kept.resize(places.len(), IGNORED);
        }
        Self { places, targets: kept, live, tokens: targets.len(), step }
    }

    /// Returns whether every row is computed, so that nothing is gathered.
    fn is_whole(&self) -> bool {
        self.live == self.tokens
    }

    fn chunks(&self) -> impl Iterator<Item = Chunk> {
        (0..self.places.len()).step_by(self.step).map(|first| Chunk {
            first,
            live: self.step.min(self.live - first),
            rows: self.step.min(self.places.len() - first),
        })
    }

    /// Places, targets and the factor of the gradient, in one upload.
    fn upload(&self, cuda: &Cuda, scale: f32) -> Ints {
        let targets = self.targets.iter().map(|target| target.cast_unsigned());
        let words: Vec<u32> = self.places.iter().copied().chain(targets).chain([scale.to_bits()]).collect();
        Ints::from_slice(cuda, &words, MemoryUse::Targets)
    }
}

/// The f32 logits of a chunk.
struct Logits {
    logits: Array,
    dtype: DType,
}

impl Logits {
    fn of(hidden: &Array, weight: &Array) -> Self {
        let logits = Array::empty(hidden.cuda(), [hidden.rows(), weight.rows()], DType::F32, MemoryUse::Logits);
        matmul::product_into(&logits, hidden, weight, Form::Nt);
        Self { logits, dtype: hidden.dtype() }
    }

    fn losses(&self, targets: u64, nll: &Array) {
        let Self { logits, dtype } = self;
        kernel(logits.cuda(), entry!("cross_entropy.cu", "cross_entropy_fwd"), *dtype).launch(
            [blocks(logits.rows()), 1, 1],
            [512, 1, 1],
            0,
            args![logits.ptr(), targets, nll.ptr(), int(logits.cols()), int(logits.ld())],
        );
    }

    /// The gradient lies over the logits, each row in the end of its row.
    fn losses_and_gradient(self, targets: u64, scale: u64, nll: &Array) -> Array {
        let Self { logits, dtype } = self;
        let gradient = logits.row_ends_as(dtype);
        kernel(logits.cuda(), entry!("cross_entropy.cu", "cross_entropy_fwd_bwd"), dtype).launch(
            [blocks(logits.rows()), 1, 1],
            [512, 1, 1],
            0,
            args![
                logits.ptr(),
                targets,
                scale,
                nll.ptr(),
                gradient.ptr(),
                int(logits.cols()),
                int(logits.ld()),
                int(gradient.ld())
            ],
        );
        gradient
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_fit_the_budget() {
        assert_eq!(chunk_rows(151_936), 512);
        assert_eq!(chunk_rows(2_000_000), 128);
        for vocab in [32_000, 128_256, 256_000] {
            assert!(chunk_rows(vocab) * vocab * 4 <= LOGITS_BYTES);
        }
    }

    #[test]
    fn counted_rows_are_padded_and_others_left_out() {
        let mut targets = vec![5; 300];
        targets[1] = IGNORED;
        let plan = Plan::of(&targets, 256);
        assert_eq!((plan.live, plan.places.len(), plan.is_whole()), (299, 384, false));
        assert_eq!(plan.places[..3], [0, 2, 3]);
        let chunks: Vec<_> = plan.chunks().map(|chunk| (chunk.first, chunk.live, chunk.rows)).collect();
        assert_eq!(chunks, [(0, 256, 256), (256, 43, 128)]);
        let plan = Plan::of(&targets[2..7], 256);
        assert!(plan.is_whole());
        assert_eq!(plan.places.len(), 5);
        assert_eq!(Plan::of(&[IGNORED; 9], 256).chunks().count(), 0);
    }
}
