//! Products of rows with frozen fp8 weights on compute capability 9.0; the formulas are in [`super`].

use std::sync::Arc;

use crate::params::quantized::cuda::QuantizedArray;
use crate::runtime::limits::MAX_FP8_ROW;
use crate::runtime::op::{blocks, check_dims, int, like};
use crate::runtime::{Array, Buffer, Cuda, Form, Fp8Rows, MemoryUse, TensorMap, args, elementwise, entry};

/// Shared memory of a block: four stages, the tiles on their way out, the barriers.
const SHARED_BYTES: u32 = 4 * 49_152 + 16_384 + 64;

/// The low-rank part of a product: x2·W2ᵀ, or x2·W2 in a gradient.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LowRank<'a> {
    pub(crate) x: &'a Array,
    pub(crate) w: &'a Array,
}

/// A matrix of e4m3 codes.
#[derive(Clone, Copy)]
struct Codes {
    ptr: u64,
    rows: usize,
    cols: usize,
    /// Bytes from row to row.
    ld: usize,
}

/// Returns true if the device has the instructions that the kernels use.
pub(crate) fn has_products(cuda: &Cuda) -> bool {
    [cuda.props().major, cuda.props().minor] == [9, 0]
}

/// `onto + x·Wᵀ + low-rank part + bias`; a new matrix has `pad_cols` spare columns behind each row.
pub(crate) fn forward(
    x: &Array,
    weight: &QuantizedArray,
    low_rank: Option<LowRank<'_>>,
    bias: Option<&Array>,
    onto: Option<Array>,
    pad_cols: usize,
) -> Array {
    let [out, input] = weight.dims();
    check_dims("x", x, [x.rows(), input]);
    if let Some(onto) = onto.as_ref().filter(|onto| onto.dtype() != x.dtype()) {
        return elementwise::add_narrow(onto.clone(), &forward(x, weight, low_rank, bias, None, 0));
    }
    let codes = weight.fp8().expect("the weight is kept in fp8");
    let w = Codes { ptr: codes.codes, rows: out, cols: input, ld: input };
    let onto = onto.map(|onto| onto.aligned());
    let y = match &onto {
        Some(onto) if onto.is_unique() => onto.clone(),
        Some(onto) => like(onto),
        None => Array::padded(x.cuda(), [x.rows(), out], pad_cols, x.dtype(), MemoryUse::Activations),
    };
    let rows = quantize(x, 0);
    launch(&y, &rows, w, codes.scales, Form::Nt, low_rank, bias, onto.as_ref());
    y
}

/// `dy·W + low-rank part`.
pub(crate) fn backward(dy: &Array, weight: &QuantizedArray, low_rank: Option<LowRank<'_>>) -> Array {
    let [out, input] = weight.dims();
    check_dims("dy", dy, [dy.rows(), out]);
    let codes = weight.fp8().expect("the weight is kept in fp8");
    let rows = quantize(dy, codes.scales);
    let transposed = transpose(dy.cuda(), codes.codes, [out, input]);
    let w = Codes { ptr: transposed.ptr(), rows: input, cols: out, ld: out };
    let dx = Array::empty(dy.cuda(), [dy.rows(), input], dy.dtype(), MemoryUse::Activations);
    launch(&dx, &rows, w, 0, Form::Nn, low_rank, None, None);
    dx
}

/// The rows of x as codes; `by` is the address of f32 factors of its columns, or 0.
fn quantize(x: &Array, by: u64) -> Arc<Fp8Rows> {
    if let Some(codes) = x.codes().filter(|_| by == 0) {
        return codes;
    }
    let x = x.aligned();
    let cuda = x.cuda();
    let [rows, cols] = x.dims();
    let (vectors, name) = match cols {
        0..=4096 => (2, "2"),
        4097..=8192 => (4, "4"),
        8193..=32_768 => (8, "8"),
        _ => (16, "16"),
    };
    assert!(cols <= MAX_FP8_ROW, "rows of {cols} values; the kernel takes up to {MAX_FP8_ROW}");
    let ld = cols.next_multiple_of(16);
    let made = empty_rows(cuda, [rows, cols]);
    let defines = [("T", x.dtype().name()), ("VECS", name)];
    cuda.kernel(entry!("fp8_rows.cu", "fp8_rows"), &defines).launch(
        [blocks(rows), 1, 1],
        [blocks(cols.div_ceil(8 * vectors).next_multiple_of(32)), 1, 1],
        0,
        args![x.ptr(), by, made.codes.ptr(), made.scales.ptr(), int(rows), int(cols), int(x.ld()), int(ld)],
    );
    Arc::new(made)
}

/// Codes that are not there yet.
pub(crate) fn empty_rows(cuda: &Cuda, dims @ [rows, cols]: [usize; 2]) -> Fp8Rows {
    let codes = cuda.alloc(rows * cols.next_multiple_of(16), MemoryUse::Activations);
    let scales = cuda.alloc(4 * rows, MemoryUse::Activations);
    Fp8Rows { codes, scales, dims }
}

/// The codes of a matrix `[rows, cols]`, transposed.
fn transpose(cuda: &Cuda, codes: u64, [rows, cols]: [usize; 2]) -> Buffer {
    let transposed = cuda.alloc(rows * cols, MemoryUse::DecodedWeights);
    let defines = [("T", "bf16"), ("VECS", "2")];
    cuda.kernel(entry!("fp8_rows.cu", "fp8_transpose"), &defines).launch(
        [blocks(cols.div_ceil(128)), blocks(rows.div_ceil(128)), 1],
        [256, 1, 1],
        0,
        args![codes, transposed.ptr(), int(rows), int(cols), int(cols), int(rows)],
    );
    transposed
}

/// Queues the product; `w_scales` is the address of the scales of W's rows, or 0.
#[allow(clippy::too_many_arguments, reason = "the operands of one kernel")]
fn launch(
    y: &Array,
    x: &Fp8Rows,
    w: Codes,
    w_scales: u64,
    form: Form,
    low_rank: Option<LowRank<'_>>,
    bias: Option<&Array>,
    onto: Option<&Array>,
) {
    let (cuda, [rows, cols]) = (y.cuda(), x.dims);
    assert_eq!(cols, w.cols, "inner sizes of a product in fp8");
    check_dims("the product", y, [rows, w.rows]);
    let bias = bias.map(Array::aligned);
    if let Some(bias) = &bias {
        check_dims("the bias", bias, [1, w.rows]);
    }
    let x_scales = x.scales.ptr();
    let x = Codes { ptr: x.codes.ptr(), rows, cols, ld: cols.next_multiple_of(16) };
    let [x_map, w_map] = [(x, 64), (w, 128)].map(|(codes, rows)| {
        let strides = [codes.rows * codes.ld, codes.ld];
        cuda.tensor_map_of_bytes(codes.ptr, [1, codes.rows, codes.cols], strides, [1, rows, 128])
    });
    let low_rank = low_rank.map(|part| [part.x.aligned(), part.w.aligned()]);
    let (x2_map, w2_map, rank) = match &low_rank {
        None => (x_map, w_map, 0),
        Some([x2, w2]) => {
            check_dims("x of the low-rank part", x2, [rows, x2.cols()]);
            check_dims(
                "W of the low-rank part",
                w2,
                if form == Form::Nt { [w.rows, x2.cols()] } else { [x2.cols(), w.rows] },
            );
            (map(x2, 64), map(w2, if form == Form::Nt { 128 } else { 64 }), x2.cols())
        }
    };
    let form = if form == Form::Nt { "0" } else { "1" };
    cuda.kernel(entry!("fp8_linear_sm90.cu", "fp8_linear_sm90"), &[("T", y.dtype().name()), ("FORM", form)]).launch(
        [cuda.props().sm_count / 2 * 2, 1, 1],
        [384, 1, 1],
        SHARED_BYTES,
        args![
            x_map,
            w_map,
            x2_map,
            w2_map,
            x_scales,
            w_scales,
            bias.as_ref().map_or(0, Array::ptr),
            onto.map_or(0, Array::ptr),
            y.ptr(),
            int(rows),
            int(w.rows),
            int(w.cols),
            int(rank),
            int(onto.map_or(0, Array::ld)),
            int(y.ld())
        ],
    );
}

/// A matrix, copied in boxes of `rows` by 64 columns.
fn map(x: &Array, rows: usize) -> TensorMap {
    let [height, width] = x.dims();
    let strides = [(height * x.ld()).next_multiple_of(8), x.ld()];
    x.cuda().tensor_map(x.ptr(), x.dtype(), [1, height, width], strides, [1, rows, 64])
}
