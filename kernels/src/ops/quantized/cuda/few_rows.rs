//! Products of at most [`MOST`] rows with a 4-bit weight, which is not decoded into memory; see `few_rows_4bit.cu`.

use crate::params::quantized::cuda::{FourBitBlocks, QuantizedArray, TILE};
use crate::runtime::op::{blocks, check_dims, int};
use crate::runtime::{Array, DType, args, entry};

/// Rows that the kernel takes; from there on, decoding and a product of cuBLASLt are faster.
const MOST: usize = 32;

/// Returns true if the kernel computes `x · wᵀ`.
pub(crate) fn takes(x: &Array, w: &QuantizedArray) -> bool {
    (1..=MOST).contains(&x.rows())
        && x.dtype() != DType::F32
        && x.is_aligned()
        && w.dims()[0].is_multiple_of(TILE)
        && w.four_bit_blocks().is_some()
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
    let kernel = x.cuda().kernel(
        entry!("few_rows_4bit.cu", "few_rows_4bit"),
        &[
            ("T", dtype.name()),
            ("DOUBLE", if double.is_some() { "1" } else { "0" }),
            ("GROUPS", groups),
            ("WARPS", if warps == 10 { "10" } else { "8" }),
        ],
    );
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
