//! The head and the loss together; logits exist for one chunk of rows at a time.
//!
//! Only rows that count go through. They are gathered into chunks of a few sizes, filled up with rows that do not count,
//! so that the number of counted rows, which differs from batch to batch, makes no new shapes of products.

use super::{IGNORED, LmHead};
use crate::ops::matmul::cuda as matmul;
use crate::runtime::op::{blocks, int};
use crate::runtime::{Array, Cuda, DType, Entry, Form, Gemm, Ints, Kernel, MemoryUse, args, elementwise, entry};

/// The f32 logits held at once take no more than this: 512 rows of a vocabulary of 152 k. At 2,560 channels that is a
/// product of 0.4 TFLOP, against which its launch is nothing.
const LOGITS_BYTES: usize = 320 << 20;

/// Chunks are multiples of this many rows, the tile of the products' kernels; one of them is the least.
const ROWS: usize = 128;

/// The negative log-likelihood of every target, f32 `[1, tokens]`, 0 where it is −100.
pub(super) fn forward(h: &Array, head: &LmHead, targets: &[i32]) -> Array {
    let rows = Rows::new(h, head, targets, &[]);
    let nll = rows.array([1, rows.plan.tokens], DType::F32);
    for chunk in rows.plan.chunks() {
        let losses = rows.losses_of(&nll, &chunk);
        Logits::of(&rows.hidden(h, &chunk), head).losses(rows.targets(&chunk), &losses);
        rows.place_losses(&losses, &nll, &chunk);
    }
    nll
}

/// [`forward`], and the gradient of Σ w·nll to h; that to W is added to `weight_grad`, f32. `weights` are those of the
/// counted rows, times the multiplier of the head.
pub(super) fn forward_backward(
    h: &Array,
    head: &LmHead,
    targets: &[i32],
    weights: &[f32],
    weight_grad: Option<&Array>,
) -> (Array, Array) {
    let rows = Rows::new(h, head, targets, weights);
    let nll = rows.array([1, rows.plan.tokens], DType::F32);
    let dh = rows.array(h.dims(), h.dtype());
    for chunk in rows.plan.chunks() {
        let hidden = rows.hidden(h, &chunk);
        let losses = rows.losses_of(&nll, &chunk);
        let logits = Logits::of(&hidden, head);
        let dlogits = logits.losses_and_gradient(rows.targets(&chunk), rows.weights(&chunk), &losses);
        rows.gradients(&dlogits, &hidden, head, &dh, weight_grad, &chunk);
        rows.place_losses(&losses, &nll, &chunk);
    }
    (nll, dh)
}

/// The statistics of the counted rows, f32 `[rows, 4]`, and of the rows of padding behind them.
pub(super) fn statistics(h: &Array, head: &LmHead, targets: &[i32]) -> Array {
    let rows = Rows::new(h, head, targets, &[]);
    let count = rows.plan.places.len().max(1);
    let statistics = Array::dense(h.cuda(), [count, 4], DType::F32, MemoryUse::Activations);
    for chunk in rows.plan.chunks() {
        let logits = Logits::of(&rows.hidden(h, &chunk), head);
        logits.statistics(rows.targets(&chunk), &statistics.row_range(chunk.first, chunk.rows));
    }
    statistics
}

/// The gradients of [`forward_backward`], from the [`statistics`] of the same arguments.
pub(super) fn backward(
    h: &Array,
    head: &LmHead,
    targets: &[i32],
    weights: &[f32],
    statistics: &Array,
    weight_grad: Option<&Array>,
) -> Array {
    let rows = Rows::new(h, head, targets, weights);
    let dh = rows.array(h.dims(), h.dtype());
    for chunk in rows.plan.chunks() {
        let hidden = rows.hidden(h, &chunk);
        let statistics = statistics.row_range(chunk.first, chunk.rows);
        let logits = Logits::of(&hidden, head);
        let dlogits = logits.gradient(rows.targets(&chunk), rows.weights(&chunk), &statistics);
        rows.gradients(&dlogits, &hidden, head, &dh, weight_grad, &chunk);
    }
    dh
}

/// The rows that are computed, and the lists that kernels read of them.
struct Rows {
    plan: Plan,
    /// Places, targets and, for a gradient, weights.
    lists: Ints,
    cuda: Cuda,
}

impl Rows {
    fn new(h: &Array, head: &LmHead, targets: &[i32], weights: &[f32]) -> Self {
        let vocab = head.vocab();
        assert_eq!(targets.len(), h.rows(), "targets of {} tokens", h.rows());
        let in_range = |&target: &i32| target == IGNORED || (0..vocab as i64).contains(&i64::from(target));
        assert!(targets.iter().all(in_range), "targets are {IGNORED} or below {vocab}");
        let plan = Plan::of(targets, chunk_rows(vocab));
        let lists = plan.upload(h.cuda(), weights);
        Self { plan, lists, cuda: h.cuda().clone() }
    }

    /// A result for every token. Where all rows are computed, every element is written.
    fn array(&self, dims: [usize; 2], dtype: DType) -> Array {
        if self.plan.is_whole() {
            Array::empty(&self.cuda, dims, dtype, MemoryUse::Activations)
        } else {
            Array::zeros(&self.cuda, dims, dtype, MemoryUse::Activations)
        }
    }

    fn places(&self, chunk: &Chunk) -> u64 {
        self.lists.ptr_at(chunk.first)
    }

    fn targets(&self, chunk: &Chunk) -> u64 {
        self.lists.ptr_at(self.plan.places.len() + chunk.first)
    }

    fn weights(&self, chunk: &Chunk) -> u64 {
        self.lists.ptr_at(2 * self.plan.places.len() + chunk.first)
    }

    /// The rows of `h` of a chunk.
    fn hidden(&self, h: &Array, chunk: &Chunk) -> Array {
        if self.plan.is_whole() {
            h.row_range(chunk.first, chunk.rows)
        } else {
            elementwise::gather_rows(h, self.places(chunk), chunk.rows)
        }
    }

    /// Returns the array that the losses of a chunk are written to first.
    fn losses_of(&self, nll: &Array, chunk: &Chunk) -> Array {
        if self.plan.is_whole() {
            column(nll, chunk.first, chunk.rows)
        } else {
            Array::dense(&self.cuda, [chunk.rows, 1], DType::F32, MemoryUse::Activations)
        }
    }

    fn place_losses(&self, losses: &Array, nll: &Array, chunk: &Chunk) {
        if !self.plan.is_whole() {
            let all = column(nll, 0, self.plan.tokens);
            elementwise::scatter_rows(&losses.row_range(0, chunk.live), self.places(chunk), &all);
        }
    }

    /// The gradients to h and W from that to the products of a chunk.
    fn gradients(
        &self,
        dlogits: &Array,
        hidden: &Array,
        head: &LmHead,
        dh: &Array,
        weight_grad: Option<&Array>,
        chunk: &Chunk,
    ) {
        let weight = head.weight.cuda();
        if let Some(out) = weight_grad {
            matmul::accumulate(out, 1.0, dlogits, hidden, Form::Tn);
        }
        if self.plan.is_whole() {
            matmul::product_into(&dh.row_range(chunk.first, chunk.rows), dlogits, weight, Form::Nn);
        } else {
            let part = matmul::product(dlogits, weight, Form::Nn);
            elementwise::scatter_rows(&part.row_range(0, chunk.live), self.places(chunk), dh);
        }
    }
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
    /// The targets of these rows; −100 in the padding.
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

    /// Places, targets and weights, in one upload. Rows of padding have the weight 0.
    fn upload(&self, cuda: &Cuda, weights: &[f32]) -> Ints {
        let targets = self.targets.iter().map(|target| target.cast_unsigned());
        let places = self.places.iter().copied();
        let mut words: Vec<u32> = places.chain(targets).chain(weights.iter().map(|weight| weight.to_bits())).collect();
        if !weights.is_empty() {
            words.resize(3 * self.places.len(), 0);
        }
        Ints::from_slice(cuda, &words, MemoryUse::Targets)
    }
}

/// The f32 products of a chunk with its head, before the cap.
struct Logits {
    logits: Array,
    dtype: DType,
    softcap: Option<f32>,
}

impl Logits {
    fn of(hidden: &Array, head: &LmHead) -> Self {
        let weight = head.weight.cuda();
        let logits = Array::empty(hidden.cuda(), [hidden.rows(), weight.rows()], DType::F32, MemoryUse::Logits);
        let shape = [hidden.rows(), weight.rows(), hidden.cols()];
        let gemm = Gemm::new(Form::Nt, shape, hidden.operand(), weight.operand(), logits.operand());
        hidden.cuda().gemm(&Gemm { alpha: head.multiplier, ..gemm });
        Self { logits, dtype: hidden.dtype(), softcap: head.softcap }
    }

    fn losses(&self, targets: u64, nll: &Array) {
        let Self { logits, .. } = self;
        self.kernel(entry!("cross_entropy.cu", "cross_entropy_fwd")).launch(
            [blocks(logits.rows()), 1, 1],
            [512, 1, 1],
            0,
            args![logits.ptr(), targets, nll.ptr(), int(logits.cols()), int(logits.ld()), self.cap()],
        );
    }

    fn statistics(&self, targets: u64, statistics: &Array) {
        let Self { logits, .. } = self;
        self.kernel(entry!("cross_entropy.cu", "cross_entropy_statistics")).launch(
            [blocks(logits.rows()), 1, 1],
            [512, 1, 1],
            0,
            args![logits.ptr(), targets, statistics.ptr(), int(logits.cols()), int(logits.ld()), self.cap()],
        );
    }

    /// Writes the losses to `nll` and returns the gradient.
    fn losses_and_gradient(self, targets: u64, weights: u64, nll: &Array) -> Array {
        self.launch_gradient(entry!("cross_entropy.cu", "cross_entropy_fwd_bwd"), targets, weights, nll)
    }

    /// Returns the gradient, from known statistics.
    fn gradient(self, targets: u64, weights: u64, statistics: &Array) -> Array {
        self.launch_gradient(entry!("cross_entropy.cu", "cross_entropy_bwd"), targets, weights, statistics)
    }

    /// Launches a kernel that writes the gradient over the logits, each row in the end of its row. `rows` has its values
    /// for each row.
    fn launch_gradient(self, entry: Entry, targets: u64, weights: u64, rows: &Array) -> Array {
        let Self { logits, .. } = &self;
        let gradient = logits.row_ends_as(self.dtype);
        self.kernel(entry).launch(
            [blocks(logits.rows()), 1, 1],
            [512, 1, 1],
            0,
            args![
                logits.ptr(),
                targets,
                weights,
                rows.ptr(),
                gradient.ptr(),
                int(logits.cols()),
                int(logits.ld()),
                int(gradient.ld()),
                self.cap()
            ],
        );
        gradient
    }

    fn kernel(&self, entry: Entry) -> Kernel {
        let defines = [("T", self.dtype.name()), ("SOFTCAP", "")];
        self.logits.cuda().kernel(entry, if self.softcap.is_some() { &defines } else { &defines[..1] })
    }

    /// The cap, which kernels without one do not read.
    fn cap(&self) -> f32 {
        self.softcap.unwrap_or(0.0)
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
