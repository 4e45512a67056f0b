//! Products of a few rows with a 4-bit weight, which is not decoded into memory; see `few_rows_4bit.cu` and, for compute
//! capability 9.0, `few_rows_4bit_sm90.cu`.

use crate::ops::routing::Dispatch;
use crate::params::quantized::cuda::{FourBitBlocks, QuantizedArray, TILE};
use crate::runtime::op::{blocks, check_dims, int};
use crate::runtime::{Array, DType, Kernel, args, entry};

/// Rows that the kernels take; from there on, decoding and a product of cuBLASLt are faster.
const MOST: usize = 32;
const MOST_SM90: usize = 64;

/// Rows up to which `few_rows_4bit.cu` is faster than `few_rows_4bit_sm90.cu`.
const VERY_FEW: usize = 8;

/// Returns true if `few_rows_4bit_sm90.cu` runs on the GPU of x.
fn is_sm90(x: &Array) -> bool {
    let props = x.cuda().props();
    [props.major, props.minor] == [9, 0]
}

/// Selections of experts that the kernel takes. It reads the codes of an expert again for each.
const MOST_SELECTIONS: usize = 128;

/// Returns true if a kernel computes `x · wᵀ`.
pub(crate) fn takes(x: &Array, w: &QuantizedArray) -> bool {
    (1..=if is_sm90(x) { MOST_SM90 } else { MOST }).contains(&x.rows())
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
    let FourBitBlocks { codes, scales, table, double } = blocks_of(w);
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

fn blocks_of(w: &QuantizedArray) -> FourBitBlocks {
    w.four_bit_blocks().unwrap_or_else(|| panic!("a weight of {:?} without blocks for the kernel", w.dims()))
}

/// `y = x · wᵀ + bias + onto`; y may be `onto`.
pub(crate) fn linear(y: &Array, x: &Array, w: &QuantizedArray, bias: Option<&Array>, onto: Option<&Array>) {
    let ([m, k], [n, _], dtype) = (x.dims(), w.dims(), x.dtype());
    check_dims("the result", y, [m, n]);
    assert!([y].into_iter().chain(bias).chain(onto).all(|array| array.dtype() == dtype), "dtypes of the product");
    let FourBitBlocks { codes, scales, table, double } = blocks_of(w);
    let use_wgmma = is_sm90(x) && m > VERY_FEW;
    let Launch { kernel, grid, threads, shared } =
        if use_wgmma { wgmma(x, n, double.is_some()) } else { mma(x, n, double.is_some()) };
    let [map, nested, offsets] = double.map_or([0; 3], |double| [double.map, double.nested, double.offsets]);
    let [bias, onto_ptr] = [bias, onto].map(|array| array.map_or(0, Array::ptr));
    // Rows of a section, by the kernel for every GPU in tiles.
    let unit = if use_wgmma { 1 } else { TILE };
    kernel.early().launch(
        grid,
        [threads, 1, 1],
        shared,
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
            int(double.map_or(1, |double| double.section / unit))
        ],
    );
}

/// A kernel and how it is launched.
struct Launch {
    kernel: Kernel,
    grid: [u32; 3],
    threads: u32,
    shared: u32,
}

/// `few_rows_4bit.cu`, for every GPU.
fn mma(x: &Array, n: usize, double: bool) -> Launch {
    // Groups of eight rows, warps of a block, blocks of an SM.
    let (groups, warps, resident) = match x.rows() {
        ..=8 => ("1", 10, 2),
        9..=16 => ("2", 8, 2),
        _ => ("4", 8, 1),
    };
    Launch {
        kernel: kernel(x, double, groups, if warps == 10 { "10" } else { "8" }, false),
        grid: [blocks(n / TILE).min(x.cuda().props().sm_count * resident), 1, 1],
        threads: 32 * warps,
        shared: 65_536 + 512 * warps * x.rows().div_ceil(8).next_power_of_two() as u32,
    }
}

/// Rows of the weight and values of k that a block of `few_rows_4bit_sm90.cu` takes at a time.
const WGMMA_TILE: usize = 128;
const STEP: usize = 128;

/// `few_rows_4bit_sm90.cu`.
fn wgmma(x: &Array, n: usize, double: bool) -> Launch {
    let [m, k] = x.dims();
    let groups = m.div_ceil(8).next_power_of_two();
    let (tiles, steps) = (n.div_ceil(WGMMA_TILE), k.div_ceil(STEP));
    let splits = splits(tiles, steps, x.cuda().props().sm_count as usize);
    let defines = [
        ("T", x.dtype().name()),
        ("DOUBLE", if double { "1" } else { "0" }),
        ("GROUPS", ["1", "2", "4", "8"][groups.ilog2() as usize]),
    ];
    let buffers = if groups == 8 { 2 } else { 4 };
    Launch {
        kernel: x.cuda().kernel(entry!("few_rows_4bit_sm90.cu", "few_rows_4bit_sm90"), &defines).cluster(splits as u32),
        grid: [splits as u32, blocks(tiles), 1],
        threads: 256,
        shared: (65_536 + buffers * 2048 * groups + 1024 * steps.div_ceil(splits)) as u32,
    }
}

/// Returns the number of blocks that share k, for the least time of the busiest SM. A block takes the time of three steps beside
/// its own; blocks on one SM at the same time take 0.65 of the time that they take one after another. Clusters of other
/// sizes than powers of two leave SMs idle.
fn splits(tiles: usize, steps: usize, sms: usize) -> usize {
    let cost = |splits: &usize| {
        let resident = (tiles * splits).div_ceil(sms);
        let share = if resident == 1 { 100 } else { 65 * resident };
        share * (steps.div_ceil(*splits) + 3)
    };
    [1, 2, 4, 8].into_iter().filter(|&splits| splits <= steps.max(1)).min_by_key(cost).expect("one block is enough")
}

fn kernel(x: &Array, double: bool, groups: &'static str, warps: &'static str, experts: bool) -> Kernel {
    let double = if double { "1" } else { "0" };
    let mut defines = vec![("T", x.dtype().name()), ("DOUBLE", double), ("GROUPS", groups), ("WARPS", warps)];
    if experts {
        defines.push(("EXPERTS", ""));
    }
    x.cuda().kernel(entry!("few_rows_4bit.cu", "few_rows_4bit"), &defines)
}

#[cfg(test)]
mod tests {
    use super::splits;

    #[test]
    fn clusters_are_those_that_were_fastest_on_an_h200() {
        // The linears of Qwen3-4B: q, k and v; o; gate and up (4 is as fast); down.
        let shapes = [(6144, 2560), (2560, 4096), (19_456, 2560), (2560, 9728)];
        assert_eq!(shapes.map(|(n, k): (usize, usize)| splits(n.div_ceil(128), k.div_ceil(128), 132)), [4, 8, 2, 8]);
        assert_eq!(splits(1, 1, 132), 1);
    }
}
