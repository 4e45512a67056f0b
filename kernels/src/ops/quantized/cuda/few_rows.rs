//! Products of at most [`MOST`] rows with a 4-bit weight, which is not decoded into memory; see `few_rows_4bit.cu`.

use crate::ops::routing::Dispatch;
use crate::params::quantized::cuda::{FourBitBlocks, QuantizedArray, TILE};
use crate::runtime::op::{blocks, check_dims, int};
use crate::runtime::{Array, DType, Kernel, args, entry};

/// Rows that the kernel takes; from there on, decoding and a product of cuBLASLt are faster.
const MOST: usize = 32;

/// Selections of experts that the kernel takes. It reads the codes of an expert again for each.
const MOST_SELECTIONS: usize = 128;

/// Returns true if the kernel computes `x · wᵀ`.
pub(crate) fn takes(x: &Array, w: &QuantizedArray) -> bool {
    (1..=MOST).contains(&x.rows())
        && x.dtype() != DType::F32
        && x.is_aligned()
        && w.dims()[0].is_multiple_of(TILE)
        && w.four_bit_blocks().is_some()
}

/// Returns true if the kernel computes the products of selections with experts of `n` rows each.
pub(crate) fn takes_experts(x: &Array, w: &QuantizedArray, n: usize, dispatch: &Dispatch) -> bool {
    (1..=MOST_SELECTIONS).contains(&dispatch.rows())
        && x.dtype() != DType::F32
        && x.is_aligned()
        && n.is_multiple_of(TILE)
        && w.four_bit_blocks().is_some()
}

/// `y_e = x_e · W_eᵀ` for `w` `[experts · n, k]`, with the rows of x in the order of the dispatch, or `by_token`.
pub(crate) fn experts(y: &Array, x: &Array, by_token: bool, w: &QuantizedArray, dispatch: &Dispatch) {
    let ([rows, n], k, dtype) = (y.dims(), x.cols(), x.dtype());
    assert_eq!((rows, y.dtype()), (dispatch.rows(), dtype), "rows and dtype of the result");
    let blocks_of =
        w.four_bit_blocks().unwrap_or_else(|| panic!("a weight of {:?} without blocks for the kernel", w.dims()));
    let FourBitBlocks { codes, scales, table, double } = blocks_of;
    let [map, nested, offsets] = double.map_or([0; 3], |double| [double.map, double.nested, double.offsets]);
    let device = dispatch.cuda();
    // Blocks that run at once, two to a multiprocessor, divided among the rows.
    let resident = (x.cuda().props().sm_count as usize * 2).div_ceil(rows);
    kernel(x, double.is_some(), "1", "10", true).launch(
        [blocks((n / TILE).min(resident)), blocks(rows), 1],
        [320, 1, 1],
        65_536 + 512 * 10,
        args![
            x.ptr(),
            codes,
            scales,
            map,
            nested,
            offsets,
            table,
            0u64,
            0u64,
            y.ptr(),
            1i32,
            int(n),
            int(k),
            int(x.ld()),
            0i32,
            int(y.ld()),
            double.map_or(0, |double| double.shift as i32),
            int(double.map_or(1, |double| double.section / TILE)),
            device.sorted(),
            device.chosen(),
            if by_token { int(dispatch.top_k()) } else { 0 }
        ],
    );
}

/// `y = x · wᵀ + bias + onto`; y may be `onto`.
pub(crate) fn linear(y: &Array, x: &Array, w: &QuantizedArray, bias: Option<&Array>, onto: Option<&Array>) {
    let ([m, k], [n, _], dtype) = (x.dims(), w.dims(), x.dtype());
    check_dims("the result", y, [m, n]);
    assert!([y].into_iter().chain(bias).chain(onto).all(|array| array.dtype() == dtype), "dtypes of the product");
    let Some(FourBitBlocks { codes, scales, table, double }) = w.four_bit_blocks() else {
        panic!("a weight of {:?} without blocks for the kernel", w.dims())
    };
    // Groups of eight rows, warps of a block, blocks of an SM.
    let (groups, warps, resident) = match m {
        ..=8 => ("1", 10, 2),
        9..=16 => ("2", 8, 2),
        _ => ("4", 8, 1),
    };
    let kernel = kernel(x, double.is_some(), groups, if warps == 10 { "10" } else { "8" }, false);
    let [map, nested, offsets] = double.map_or([0; 3], |double| [double.map, double.nested, double.offsets]);
    let [bias, onto_ptr] = [bias, onto].map(|array| array.map_or(0, Array::ptr));
    kernel.early().launch(
        [blocks(n / TILE).min(x.cuda().props().sm_count * resident), 1, 1],
        [32 * warps, 1, 1],
        65_536 + 512 * warps * m.div_ceil(8).next_power_of_two() as u32,
        args![
            x.ptr(),
            codes,
            scales,
            map,
            nested,
            offsets,
            table,
            bias,
            onto_ptr,
            y.ptr(),
            int(m),
            int(n),
            int(k),
            int(x.ld()),
            int(onto.map_or(0, Array::ld)),
            int(y.ld()),
            double.map_or(0, |double| double.shift as i32),
            int(double.map_or(1, |double| double.section / TILE))
        ],
    );
}

fn kernel(x: &Array, double: bool, groups: &'static str, warps: &'static str, experts: bool) -> Kernel {
    let double = if double { "1" } else { "0" };
    let mut defines = vec![("T", x.dtype().name()), ("DOUBLE", double), ("GROUPS", groups), ("WARPS", warps)];
    if experts {
        defines.push(("EXPERTS", ""));
    }
    x.cuda().kernel(entry!("few_rows_4bit.cu", "few_rows_4bit"), &defines)
}
