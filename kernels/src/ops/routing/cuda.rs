//! Routing on CUDA. The host never learns how many rows an expert has.

use super::dispatch::DispatchPlace;
use super::{Dispatch, HostDispatch, RoutingForm};
use crate::Tensor;
use crate::runtime::op::{blocks, check_dims, int, kernel, lanes};
use crate::runtime::{Array, Cuda, CudaError, DType, Ints, MemoryUse, args, entry};

/// The most experts that the kernels take.
const MAX_EXPERTS: usize = 512;

/// The most experts of a token.
const MAX_TOP_K: usize = 32;

/// Selections that one block counts or places.
const CHUNK: usize = 1024;

/// A dispatch in the memory of a device.
#[derive(Clone, Debug)]
pub(crate) struct DeviceDispatch {
    /// The expert of each selection.
    chosen: Ints,
    /// The first row of each expert, and the number of rows at the end.
    offsets: Ints,
    /// The selection of each row.
    sorted: Ints,
    /// The row of each selection.
    rows: Ints,
}

impl DeviceDispatch {
    pub(super) fn upload(cuda: &Cuda, host: &HostDispatch) -> Self {
        let HostDispatch { offsets, sorted, rows } = host;
        let place = |values: &[u32]| Ints::from_slice(cuda, values, MemoryUse::Activations);
        Self { chosen: place(&host.chosen()), offsets: place(offsets), sorted: place(sorted), rows: place(rows) }
    }

    pub(super) fn download(&self) -> Result<HostDispatch, CudaError> {
        Ok(HostDispatch { offsets: self.offsets.to_vec()?, sorted: self.sorted.to_vec()?, rows: self.rows.to_vec()? })
    }

    /// The address of the first rows of the experts, `[experts + 1]`.
    pub(crate) fn offsets(&self) -> u64 {
        self.offsets.ptr()
    }

    /// The address of the experts of the selections.
    pub(crate) fn chosen(&self) -> u64 {
        self.chosen.ptr()
    }

    /// The address of the selections of the rows.
    pub(crate) fn sorted(&self) -> u64 {
        self.sorted.ptr()
    }

    /// Sorts the selections by expert.
    fn of(cuda: &Cuda, chosen: Ints, experts: usize) -> Self {
        let n = chosen.len();
        let ints = |n| Ints::unfilled(cuda, n, MemoryUse::Activations);
        let dispatch = Self { chosen, offsets: ints(experts + 1), sorted: ints(n), rows: ints(n) };
        let Self { chosen, offsets, sorted, rows } = &dispatch;
        let chunks = n.div_ceil(CHUNK);
        let counts = Ints::unfilled(cuda, chunks * experts, MemoryUse::Scratch);
        let (grid, block) = ([blocks(chunks), 1, 1], [1024, 1, 1]);
        let [selections, n_experts] = [int(n), int(experts)];
        kernel(cuda, entry!("routing.cu", "dispatch_count"), DType::F32).launch(
            grid,
            block,
            0,
            args![chosen.ptr(), counts.ptr(), selections, n_experts],
        );
        kernel(cuda, entry!("routing.cu", "dispatch_scan"), DType::F32).launch(
            [1, 1, 1],
            [512, 1, 1],
            0,
            args![counts.ptr(), offsets.ptr(), int(chunks), n_experts],
        );
        kernel(cuda, entry!("routing.cu", "dispatch_place"), DType::F32).launch(
            grid,
            block,
            blocks(64 * experts),
            args![chosen.ptr(), counts.ptr(), sorted.ptr(), rows.ptr(), selections, n_experts],
        );
        dispatch
    }
}

/// The kernels' number of a form.
fn form_number(form: RoutingForm) -> i32 {
    match form {
        RoutingForm::SoftmaxTopK { normalize: false } => 0,
        // Divided by their sum, the chosen of a softmax are a softmax of their own.
        RoutingForm::SoftmaxTopK { normalize: true } | RoutingForm::TopKSoftmax => 1,
        RoutingForm::Sigmoid => 2,
    }
}

pub(super) fn forward(logits: &Array, top_k: usize, form: RoutingForm) -> (Tensor<2>, Dispatch) {
    let (cuda, [tokens, experts]) = (logits.cuda(), logits.dims());
    assert!(
        experts <= MAX_EXPERTS && top_k <= MAX_TOP_K,
        "{top_k} of {experts} experts; at most {MAX_TOP_K} of {MAX_EXPERTS}"
    );
    let weights = Array::dense(cuda, [tokens, top_k], DType::F32, MemoryUse::Activations);
    let chosen = Ints::unfilled(cuda, tokens * top_k, MemoryUse::Activations);
    kernel(cuda, entry!("routing.cu", "router_fwd"), logits.dtype()).launch(
        warps(tokens),
        [256, 1, 1],
        0,
        args![
            logits.ptr(),
            weights.ptr(),
            chosen.ptr(),
            int(tokens),
            int(experts),
            int(top_k),
            form_number(form),
            int(logits.ld())
        ],
    );
    let place = DispatchPlace::Cuda(DeviceDispatch::of(cuda, chosen, experts));
    (weights.into(), Dispatch::new(tokens, experts, top_k, place))
}

pub(super) fn backward(
    logits: Option<&Array>,
    weights: &Array,
    dispatch: &Dispatch,
    form: RoutingForm,
    dweights: &Array,
    dtype: DType,
) -> Array {
    let (cuda, tokens, experts) = (weights.cuda(), dispatch.tokens(), dispatch.experts());
    let dlogits = Array::empty(cuda, [tokens, experts], dtype, MemoryUse::Activations);
    let (weights, dweights) = (weights.contiguous(), dweights.contiguous());
    kernel(cuda, entry!("routing.cu", "router_bwd"), dtype).launch(
        warps(tokens),
        [256, 1, 1],
        0,
        args![
            logits.map_or(0, Array::ptr),
            weights.ptr(),
            dispatch.cuda().chosen.ptr(),
            dweights.ptr(),
            dlogits.ptr(),
            int(tokens),
            int(experts),
            int(dispatch.top_k()),
            form_number(form),
            int(logits.map_or(0, Array::ld)),
            int(dlogits.ld())
        ],
    );
    dlogits
}

pub(super) fn sum_slots(y: &Array, dispatch: &Dispatch, onto: Option<&Array>) -> Array {
    let (tokens, width) = (dispatch.tokens(), y.cols());
    check_dims("rows of the experts", y, [dispatch.rows(), width]);
    let (y, onto) = (y.aligned(), onto.map(Array::aligned));
    if let Some(onto) = &onto {
        check_dims("the addend", onto, [tokens, width]);
    }
    let sum = Array::empty(y.cuda(), [tokens, width], y.dtype(), MemoryUse::Activations);
    kernel(y.cuda(), entry!("routing.cu", "sum_slots"), y.dtype()).launch(
        pieces(tokens, &y),
        [256, 1, 1],
        0,
        args![
            y.ptr(),
            dispatch.cuda().rows.ptr(),
            onto.as_ref().map_or(0, Array::ptr),
            sum.ptr(),
            int(tokens),
            int(width),
            int(dispatch.top_k()),
            int(y.ld()),
            int(onto.as_ref().map_or(0, Array::ld)),
            int(sum.ld())
        ],
    );
    sum
}

pub(super) fn spread(values: &Array, dispatch: &Dispatch, dtype: DType) -> Array {
    let (cuda, values) = (values.cuda(), values.contiguous());
    let (tokens, experts) = (dispatch.tokens(), dispatch.experts());
    let all = Array::empty(cuda, [tokens, experts], dtype, MemoryUse::Activations);
    let [n, width, top_k, ld] = [tokens, experts, dispatch.top_k(), all.ld()].map(int);
    kernel(cuda, entry!("routing.cu", "router_spread"), dtype).launch(
        warps(tokens),
        [256, 1, 1],
        0,
        args![values.ptr(), dispatch.cuda().chosen.ptr(), all.ptr(), n, width, top_k, ld],
    );
    all
}

pub(super) fn pick(all: &Array, dispatch: &Dispatch) -> Array {
    let picked = [dispatch.tokens(), dispatch.top_k()];
    let values = Array::dense(all.cuda(), picked, DType::F32, MemoryUse::Activations);
    kernel(all.cuda(), entry!("routing.cu", "router_pick"), all.dtype()).launch(
        [blocks(dispatch.rows().div_ceil(256)), 1, 1],
        [256, 1, 1],
        0,
        args![
            all.ptr(),
            dispatch.cuda().chosen.ptr(),
            values.ptr(),
            int(dispatch.rows()),
            int(picked[1]),
            int(all.ld())
        ],
    );
    values
}

/// Adds the sum of each expert's rows to its row of `sums`, `[experts, n]` in f32.
pub(super) fn add_expert_rows(sums: &Array, dy: &Array, dispatch: &Dispatch) {
    assert!(sums.is_contiguous(), "the sums of the biases have gaps between their rows");
    let (n, experts) = (dy.cols(), dispatch.experts());
    kernel(dy.cuda(), entry!("routing.cu", "expert_row_sums"), dy.dtype()).launch(
        [blocks(n.div_ceil(32)), blocks(experts), 1],
        [256, 1, 1],
        0,
        args![dy.ptr(), dispatch.cuda().offsets.ptr(), sums.ptr(), int(n), int(dy.ld())],
    );
}

/// A grid of a warp for each token, 8 in a block.
fn warps(tokens: usize) -> [u32; 3] {
    [blocks(tokens.div_ceil(8)), 1, 1]
}

/// A grid of a thread for every 16 bytes of each token's row.
fn pieces(tokens: usize, x: &Array) -> [u32; 3] {
    [blocks((tokens * x.cols().div_ceil(lanes(x.dtype()))).div_ceil(256)), 1, 1]
}
