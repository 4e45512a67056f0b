//! Grouped products with wgmma and the bulk copy engine.

use super::{Form, Product, Rows};
use crate::ops::routing::Dispatch;
use crate::runtime::op::{blocks, int};
use crate::runtime::{Array, DType, TensorMap, args, entry};

/// The most experts whose tables fit beside the tiles in shared memory.
const MAX_EXPERTS: usize = 512;

/// Threads of a block: a warpgroup that copies, two that compute.
const THREADS: [u32; 3] = [384, 1, 1];

/// Returns true for operands that the kernels take: 16 bits on compute capability 9.0.
pub(super) fn takes(operand: &Array, dispatch: &Dispatch) -> bool {
    let props = operand.cuda().props();
    [props.major, props.minor] == [9, 0] && operand.dtype() != DType::F32 && dispatch.experts() <= MAX_EXPERTS
}

/// Columns of a tile.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Width {
    /// 64, for the rank of adapters.
    Narrow,
    /// 256, by clusters of two blocks.
    Wide,
}

impl Width {
    fn of(columns: usize) -> Self {
        if columns <= 64 { Self::Narrow } else { Self::Wide }
    }

    fn columns(self) -> usize {
        match self {
            Self::Narrow => 64,
            Self::Wide => 256,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Narrow => "64",
            Self::Wide => "256",
        }
    }

    /// Bytes of the stages of tiles 64 deep, and of their barriers.
    fn shared(self) -> usize {
        let stages = match self {
            Self::Narrow => 8,
            Self::Wide => 4,
        };
        stages * (2 * 64 * (128 + self.columns()) + 16)
    }
}

pub(super) fn product(product: Product<'_>) {
    let offsets = product.offsets();
    let Product { form, x, w, y, n, k, alpha, add, dispatch, experts } = product;
    let (cuda, experts, width) = (w.cuda(), experts.len(), Width::of(n));
    let mut defines = vec![("T", w.dtype().name()), ("FORM", form.name()), ("BN", width.name())];
    if add {
        defines.push(("ADD", ""));
    }
    if x.of_tokens {
        defines.push(("GATHER", ""));
    }
    let w_rows = match (form, width) {
        // Rows of W are columns of y, copied in halves of a tile, or as many as there are.
        (Form::Nt, Width::Wide) => 128,
        (Form::Nt, Width::Narrow) => n.next_multiple_of(8),
        // They are summed over.
        _ => 64,
    };
    let [x_map, w_map] = [map(&x.array, 64), map(&w, w_rows)];
    cuda.kernel(entry!("grouped_sm90.cu", "grouped_sm90"), &defines).launch(
        [cuda.props().sm_count / 2 * 2, 1, 1],
        THREADS,
        blocks(width.shared() + 8 * 2048 + 8 * (experts + 1)),
        args![
            x_map,
            w_map,
            x_map,
            w_map,
            y.ptr(),
            offsets,
            x.array.ptr(),
            x.selections(dispatch),
            int(dispatch.top_k()),
            int(x.array.ld()),
            int(experts),
            int(n),
            int(k),
            0i32,
            int(y.ld()),
            alpha
        ],
    );
}

pub(super) fn add_tn(grad: &Array, alpha: f32, [dy, x]: [&Rows; 2], [n, k]: [usize; 2], dispatch: &Dispatch) {
    let (cuda, experts, width) = (grad.cuda(), dispatch.experts(), Width::of(k));
    let mut defines = vec![("T", x.array.dtype().name()), ("BN", width.name())];
    if width == Width::Wide && n <= 128 {
        // The second block of a cluster would have nothing to do.
        defines.push(("CLUSTER", "1"));
    }
    for (rows, name) in [(dy, "GATHER_DY"), (x, "GATHER_X")] {
        if rows.of_tokens {
            defines.push((name, ""));
        }
    }
    let selections = dy.selections(dispatch).max(x.selections(dispatch));
    cuda.kernel(entry!("grouped_grad_sm90.cu", "grouped_grad_sm90"), &defines).launch(
        [cuda.props().sm_count / 2 * 2, 1, 1],
        THREADS,
        blocks(width.shared() + 4 * (experts + 1)),
        args![
            map(&dy.array, 64),
            map(&x.array, 64),
            grad.ptr(),
            dispatch.cuda().offsets(),
            dy.array.ptr(),
            x.array.ptr(),
            selections,
            int(dispatch.top_k()),
            int(dy.array.ld()),
            int(x.array.ld()),
            int(experts),
            int(n),
            int(k),
            alpha
        ],
    );
}

/// A matrix, copied in boxes of `rows` by 64 columns.
fn map(x: &Array, rows: usize) -> TensorMap {
    let [height, width] = x.dims();
    x.cuda().tensor_map(
        x.ptr(),
        x.dtype(),
        [1, height, width],
        [(height * x.ld()).next_multiple_of(8), x.ld()],
        [1, rows, 64],
    )
}
