//! Launches of `gated_delta.cu` and `gated_delta_bwd.cu`.

use super::{CHUNK, DeltaHeads, GradsIn, InputsIn};
use crate::runtime::op::{blocks, int};
use crate::runtime::{Arg, Array, Cuda, DType, Entry, Ints, Kernel, MemoryUse, args, entry, reduce};

/// Channels of a head that the kernels take.
pub(super) const DIMS: [usize; 4] = [16, 32, 64, 128];

type Inputs<'a> = InputsIn<'a, Array, Array>;

/// The chunks of a batch's documents.
#[derive(Clone, Debug)]
pub(crate) struct Chunks {
    /// First token and number of tokens of each chunk.
    chunks: Ints,
    /// First chunk and number of chunks of each document that has tokens, the longest first.
    documents: Ints,
    /// Position of each token in its document.
    positions: Ints,
    tokens: usize,
}

impl Chunks {
    pub(super) fn new(cuda: &Cuda, cu_seqlens: &[u32]) -> Self {
        let (mut chunks, mut documents, mut positions) = (Vec::new(), Vec::new(), Vec::new());
        for w in cu_seqlens.windows(2).filter(|w| w[0] < w[1]) {
            let length = w[1] - w[0];
            documents.push([(chunks.len() / 2) as u32, length.div_ceil(CHUNK as u32)]);
            for first in (w[0]..w[1]).step_by(CHUNK) {
                chunks.extend([first, (w[1] - first).min(CHUNK as u32)]);
            }
            positions.extend(0..length);
        }
        documents.sort_by_key(|&[_, count]| core::cmp::Reverse(count));
        let ints = |values: &[u32]| Ints::from_slice(cuda, values, MemoryUse::Inputs);
        let tokens = positions.len();
        Self { chunks: ints(&chunks), documents: ints(documents.as_flattened()), positions: ints(&positions), tokens }
    }

    fn chunks(&self) -> usize {
        self.chunks.len() / 2
    }

    fn documents(&self) -> usize {
        self.documents.len() / 2
    }

    /// The address of each token's position in its document.
    pub(crate) fn positions(&self) -> u64 {
        self.positions.ptr()
    }
}

pub(super) fn forward(inputs: &Inputs<'_>, heads: DeltaHeads, chunks: &Chunks) -> Array {
    let step = Step::new(inputs, heads, chunks);
    let prepared = step.prepare();
    let o = step.values();
    step.scan_outputs(&prepared, &o, 0, 0);
    o
}

pub(super) fn forward_cached(
    inputs: &Inputs<'_>,
    heads: DeltaHeads,
    chunks: &Chunks,
    state: Option<Array>,
) -> (Array, Array) {
    let step = Step::new(inputs, heads, chunks);
    let DeltaHeads { key_heads, value_heads, key_dim, value_dim } = heads;
    let o = step.values();
    let cuda = step.qkv.cuda();
    let dims = [value_heads * key_dim, value_dim];
    // Kernels read the state as rows that touch.
    let before = state.map(|state| state.contiguous());
    if step.qkv.rows() == 1 {
        let state = before.filter(Array::is_unique).unwrap_or_else(|| zero_state(cuda, dims));
        let Operands { q, k, v } = step.operands();
        step.kernel(entry!("gated_delta.cu", "gated_delta_step")).launch(
            [blocks(value_heads), 1, 1],
            [blocks(value_dim.next_multiple_of(32)), 1, 1],
            0,
            args![
                q.ptr(),
                k.ptr(),
                v.ptr(),
                step.b.ptr(),
                step.a.ptr(),
                step.a_log.ptr(),
                step.dt_bias.ptr(),
                state.ptr(),
                o.ptr(),
                int(key_heads),
                int(value_heads)
            ],
        );
        return (o, state);
    }
    let after = Array::dense(cuda, dims, DType::F32, MemoryUse::KvCache);
    let prepared = step.prepare();
    step.scan_outputs(&prepared, &o, before.as_ref().map_or(0, Array::ptr), after.ptr());
    (o, after)
}

pub(super) fn backward(d_o: &Array, inputs: &Inputs<'_>, heads: DeltaHeads, chunks: &Chunks) -> GradsIn<Array, Array> {
    let step = Step::new(inputs, heads, chunks);
    let d_o = d_o.aligned();
    let DeltaHeads { key_heads, value_heads, key_dim, .. } = heads;
    let dtype = step.qkv.dtype();
    let cuda = step.qkv.cuda();
    let like = |x: &Array| Array::empty(cuda, x.dims(), x.dtype(), MemoryUse::Activations);
    let (dqkv, db, da) = (like(&step.qkv), like(&step.b), like(&step.a));
    let Operands { q, k, v } = step.operands();
    let Operands { q: dq, k: dk, v: dv } = Operands::of(&dqkv, heads);
    let prepared = step.prepare();
    let states = step.states(dtype);
    let ends = step.states(dtype);
    let delta = Array::dense(cuda, [chunks.tokens, heads.value_width()], dtype, MemoryUse::Scratch);
    let Prepared { solve, scores, cum, factors, decays, rq, rk } = &prepared;
    let (kh, vh, tokens) = (int(key_heads), int(value_heads), int(chunks.tokens));
    let scan = step.scan_shape();
    scan.launch(
        &step,
        entry!("gated_delta.cu", "gated_delta_states"),
        1,
        args![
            k.ptr(),
            v.ptr(),
            solve.ptr(),
            factors.ptr(),
            decays.ptr(),
            chunks.chunks.ptr(),
            chunks.documents.ptr(),
            states.ptr(),
            delta.ptr(),
            kh,
            vh,
            tokens,
            int(k.ld()),
            int(v.ld())
        ],
    );
    scan.launch(
        &step,
        entry!("gated_delta.cu", "gated_delta_bwd_scan"),
        2,
        args![
            q.ptr(),
            k.ptr(),
            d_o.ptr(),
            solve.ptr(),
            scores.ptr(),
            factors.ptr(),
            decays.ptr(),
            chunks.chunks.ptr(),
            chunks.documents.ptr(),
            ends.ptr(),
            dv.ptr(),
            kh,
            vh,
            tokens,
            int(q.ld()),
            int(k.ld()),
            int(d_o.ld()),
            int(dv.ld())
        ],
    );
    let partial = || Array::dense(cuda, [chunks.chunks(), value_heads], DType::F32, MemoryUse::Scratch);
    let (by_log, by_bias) = (partial(), partial());
    step.grads_kernel().launch(
        [blocks(chunks.chunks()), blocks(key_heads), 1],
        [blocks(4 * key_dim.min(CHUNK)), 1, 1],
        step.grads_shared(),
        args![
            q.ptr(),
            k.ptr(),
            v.ptr(),
            step.b.ptr(),
            step.a.ptr(),
            step.a_log.ptr(),
            step.dt_bias.ptr(),
            d_o.ptr(),
            dv.ptr(),
            states.ptr(),
            ends.ptr(),
            delta.ptr(),
            cum.ptr(),
            factors.ptr(),
            rq.ptr(),
            rk.ptr(),
            chunks.chunks.ptr(),
            dq.ptr(),
            dk.ptr(),
            db.ptr(),
            da.ptr(),
            by_log.ptr(),
            by_bias.ptr(),
            kh,
            vh,
            tokens,
            int(q.ld()),
            int(k.ld()),
            int(v.ld()),
            int(step.b.ld()),
            int(step.a.ld()),
            int(d_o.ld()),
            int(dv.ld()),
            int(dq.ld()),
            int(dk.ld()),
            int(db.ld()),
            int(da.ld())
        ],
    );
    let sum = |partial: &Array| {
        let sum = Array::zeros(cuda, [1, value_heads], DType::F32, MemoryUse::Activations);
        reduce::sum_partials(partial, &sum);
        sum
    };
    GradsIn { qkv: dqkv, b: db, a: da, a_log: sum(&by_log), dt_bias: sum(&by_bias) }
}

fn zero_state(cuda: &Cuda, dims: [usize; 2]) -> Array {
    Array::zeros(cuda, dims, DType::F32, MemoryUse::KvCache)
}

/// Queries, keys and values, columns of one matrix.
struct Operands {
    q: Array,
    k: Array,
    v: Array,
}

impl Operands {
    fn of(qkv: &Array, heads: DeltaHeads) -> Self {
        let (keys, values) = (heads.key_width(), heads.value_width());
        Self { q: qkv.columns(0, keys), k: qkv.columns(keys, keys), v: qkv.columns(2 * keys, values) }
    }
}

/// The quantities of the chunks that do not depend on the state.
struct Prepared {
    solve: Array,
    scores: Array,
    cum: Array,
    factors: Array,
    decays: Array,
    rq: Array,
    rk: Array,
}

/// The operands with aligned rows.
struct Step<'a> {
    qkv: Array,
    b: Array,
    a: Array,
    a_log: &'a Array,
    dt_bias: &'a Array,
    heads: DeltaHeads,
    chunks: &'a Chunks,
}

/// The split of a value head's channels over the scans.
#[derive(Clone, Copy)]
struct ScanShape {
    /// Channels of a block.
    columns: usize,
    /// Chunks in shared memory at a time.
    stages: usize,
}

impl<'a> Step<'a> {
    fn new(inputs: &Inputs<'a>, heads: DeltaHeads, chunks: &'a Chunks) -> Self {
        let &InputsIn { qkv, b, a, a_log, dt_bias } = inputs;
        for (name, vector) in [("a_log", a_log), ("dt_bias", dt_bias)] {
            assert_eq!(vector.dtype(), qkv.dtype(), "dtype of {name}");
        }
        let [qkv, b, a] = [qkv, b, a].map(Array::aligned);
        Self { qkv, b, a, a_log, dt_bias, heads, chunks }
    }

    fn operands(&self) -> Operands {
        Operands::of(&self.qkv, self.heads)
    }

    /// An uninitialized o.
    fn values(&self) -> Array {
        let dims = [self.qkv.rows(), self.heads.value_width()];
        Array::empty(self.qkv.cuda(), dims, self.qkv.dtype(), MemoryUse::Activations)
    }

    /// One uninitialized state for each chunk.
    fn states(&self, dtype: DType) -> Array {
        let DeltaHeads { value_heads, key_dim, value_dim, .. } = self.heads;
        let rows = self.chunks.chunks() * value_heads * key_dim;
        Array::dense(self.qkv.cuda(), [rows, value_dim], dtype, MemoryUse::Scratch)
    }

    /// A kernel of `gated_delta.cu` that is no scan.
    fn kernel(&self, entry: Entry) -> Kernel {
        self.kernel_with(entry, self.scan_shape().defines())
    }

    fn kernel_with(&self, entry: Entry, more: [(&'static str, usize); 2]) -> Kernel {
        let DeltaHeads { key_dim, value_dim, .. } = self.heads;
        let sizes = [("DK", key_dim), ("DV", value_dim), more[0], more[1]].map(|(name, size)| (name, size.to_string()));
        let mut defines = vec![("T", self.qkv.dtype().name())];
        defines.extend(sizes.iter().map(|(name, size)| (*name, size.as_str())));
        self.qkv.cuda().kernel(entry, &defines)
    }

    /// Bytes of a row of so many elements in shared memory.
    fn row(&self, elements: usize) -> usize {
        elements * self.qkv.dtype().bytes() + 16
    }

    fn prepare(&self) -> Prepared {
        let DeltaHeads { key_heads, value_heads, key_dim, .. } = self.heads;
        let (cuda, tokens) = (self.qkv.cuda(), self.chunks.tokens);
        let scratch = |rows, cols, dtype| Array::dense(cuda, [rows, cols], dtype, MemoryUse::Scratch);
        let square = || scratch(self.chunks.chunks() * value_heads * CHUNK, CHUNK, self.qkv.dtype());
        let row = |heads| scratch(heads, tokens, DType::F32);
        // Elements of the sums of g: f64 with operands of f32.
        let wide = if self.qkv.dtype() == DType::F32 { 2 } else { 1 };
        let (solve, scores, cum) = (square(), square(), row(wide * value_heads));
        let (factors, decays) = (row(FACTORS * value_heads), scratch(self.chunks.chunks(), value_heads, DType::F32));
        let (rq, rk) = (row(key_heads), row(key_heads));
        let Operands { q, k, .. } = self.operands();
        let tiles = 2 * CHUNK * self.row(key_dim);
        let triangles = 2 * CHUNK * (CHUNK + 4) * 4;
        self.kernel(entry!("gated_delta.cu", "gated_delta_prep")).launch(
            [blocks(self.chunks.chunks()), blocks(key_heads), 1],
            [128, 1, 1],
            blocks(tiles.max(triangles)),
            args![
                q.ptr(),
                k.ptr(),
                self.b.ptr(),
                self.a.ptr(),
                self.a_log.ptr(),
                self.dt_bias.ptr(),
                self.chunks.chunks.ptr(),
                solve.ptr(),
                scores.ptr(),
                cum.ptr(),
                factors.ptr(),
                decays.ptr(),
                rq.ptr(),
                rk.ptr(),
                int(key_heads),
                int(value_heads),
                int(tokens),
                int(q.ld()),
                int(k.ld()),
                int(self.b.ld()),
                int(self.a.ld())
            ],
        );
        Prepared { solve, scores, cum, factors, decays, rq, rk }
    }

    /// o; `start` and `end` are addresses of states or 0.
    fn scan_outputs(&self, prepared: &Prepared, o: &Array, start: u64, end: u64) {
        let Prepared { solve, scores, factors, decays, .. } = prepared;
        let Operands { q, k, v } = self.operands();
        self.scan_shape().launch(
            self,
            entry!("gated_delta.cu", "gated_delta_fwd"),
            2,
            args![
                q.ptr(),
                k.ptr(),
                v.ptr(),
                solve.ptr(),
                scores.ptr(),
                factors.ptr(),
                decays.ptr(),
                self.chunks.chunks.ptr(),
                self.chunks.documents.ptr(),
                start,
                end,
                o.ptr(),
                int(self.heads.key_heads),
                int(self.heads.value_heads),
                int(self.chunks.tokens),
                int(q.ld()),
                int(k.ld()),
                int(v.ld()),
                int(o.ld())
            ],
        );
    }

    /// The widest share of a head whose scans fill the device and fit its shared memory.
    fn scan_shape(&self) -> ScanShape {
        let scans = self.chunks.documents() * self.heads.value_heads;
        let (limit, dv) = (self.shared_limit(), self.heads.value_dim);
        let shapes =
            [2, 1].into_iter().flat_map(|stages| [128, 64, 32, 16].map(|columns| ScanShape { columns, stages }));
        let fitting = || shapes.clone().filter(|shape| shape.columns <= dv && shape.shared(self, 2) <= limit);
        // A block for each of a Hopper's 132 multiprocessors, nearly.
        let filling = fitting().find(|shape| scans * (dv / shape.columns) >= 96);
        let narrowest = || fitting().filter(|shape| shape.columns <= 32.min(dv)).find(|shape| shape.columns >= 16);
        // Where nothing fits, the launch fails with the device's reason.
        filling.or_else(narrowest).unwrap_or(ScanShape { columns: 16, stages: 1 })
    }

    /// Returns whether whole states fit the shared memory of the kernel that makes the gradients.
    fn grads_wide(&self) -> bool {
        self.grads_shared_with(true) <= self.shared_limit()
    }

    fn grads_kernel(&self) -> Kernel {
        let DeltaHeads { key_dim, value_dim, .. } = self.heads;
        let [dk, dv, wide] = [key_dim, value_dim, usize::from(self.grads_wide())].map(|n| n.to_string());
        let defines = [("T", self.qkv.dtype().name()), ("DK", &dk), ("DV", &dv), ("WIDE", &wide)];
        self.qkv.cuda().kernel(entry!("gated_delta_bwd.cu", "gated_delta_bwd"), &defines)
    }

    fn grads_shared(&self) -> u32 {
        blocks(self.grads_shared_with(self.grads_wide()))
    }

    fn grads_shared_with(&self, wide: bool) -> usize {
        let DeltaHeads { key_dim, value_dim, .. } = self.heads;
        let keys = 2 * CHUNK * self.row(key_dim) + CHUNK * self.row(value_dim) + 2 * CHUNK * self.row(CHUNK);
        if wide {
            return keys + 2 * value_dim * self.row(key_dim) + 2 * CHUNK * self.row(value_dim);
        }
        keys + value_dim * self.row(key_dim.min(CHUNK))
    }

    fn shared_limit(&self) -> usize {
        // What the kernels take beside what a launch gives them, at most.
        let fixed = if self.qkv.dtype() == DType::F32 { 25 << 10 } else { 8 << 10 };
        self.qkv.cuda().props().shared_per_block - fixed
    }
}

/// Factors of a token that `gated_delta_prep` makes.
const FACTORS: usize = 4;

impl ScanShape {
    fn defines(self) -> [(&'static str, usize); 2] {
        [("DVS", self.columns), ("STAGES", self.stages)]
    }

    /// Bytes of shared memory, with one (keys) or two (keys and queries) of the operands and squares of each chunk.
    fn shared(self, step: &Step<'_>, operands: usize) -> usize {
        let rows = operands * (step.row(step.heads.key_dim) + step.row(CHUNK)) + step.row(self.columns);
        self.stages * CHUNK * rows
    }

    fn launch(self, step: &Step<'_>, entry: Entry, operands: usize, arguments: &[Arg<'_>]) {
        let heads = step.heads;
        step.kernel_with(entry, self.defines()).launch(
            [blocks(step.chunks.documents()), blocks(heads.value_heads), blocks(heads.value_dim / self.columns)],
            [blocks(2 * self.columns), 1, 1],
            blocks(self.shared(step, operands)),
            arguments,
        );
    }
}
