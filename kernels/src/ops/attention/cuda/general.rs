//! Attention on mma.sync and without tensor cores: kernels with one list of arguments.

use super::tables::Table;
use super::{Engine, Inputs, Plan, arch};
use crate::runtime::op::{blocks, int, lanes};
use crate::runtime::{Array, AttentionKernel, Kernel, Tiles, args, entry};

pub(super) fn forward(q: &Array, k: &Array, v: &Array, sinks: Option<&Array>, o: &Array, lse: &Array, plan: &Plan) {
    let step = Step::of(plan, AttentionKernel::Fwd, plan.forward, sinks.is_some());
    let Plan { heads, tokens, .. } = plan;
    let (window, softcap) = plan.option_args();
    step.kernel.launch(
        step.grid(heads.heads),
        [step.threads, 1, 1],
        step.shared,
        args![
            q.ptr(),
            k.ptr(),
            v.ptr(),
            o.ptr(),
            lse.ptr(),
            step.tiles,
            int(q.ld()),
            int(k.ld()),
            int(v.ld()),
            int(o.ld()),
            int(heads.heads),
            int(heads.kv_heads),
            int(tokens[0]),
            heads.scale,
            window,
            softcap,
            sinks.map_or(0, Array::ptr)
        ],
    );
}

pub(super) fn backward(inputs: &Inputs, [dq, dk, dv]: &[Array; 3], plan: &Plan) {
    let Inputs { q, k, v, o, d_o, lse, delta } = inputs;
    let Plan { heads, tokens, .. } = plan;
    let (n, kv_heads, rows) = (int(heads.heads), int(heads.kv_heads), int(tokens[0]));
    let (window, softcap) = plan.option_args();
    row_sums(o, d_o, delta, plan);
    let step = Step::of(plan, AttentionKernel::BwdDq, plan.dq, false);
    step.kernel.launch(
        step.grid(heads.heads),
        [step.threads, 1, 1],
        step.shared,
        args![
            q.ptr(),
            k.ptr(),
            v.ptr(),
            d_o.ptr(),
            lse.ptr(),
            delta.ptr(),
            dq.ptr(),
            step.tiles,
            int(q.ld()),
            int(k.ld()),
            int(v.ld()),
            int(d_o.ld()),
            int(dq.ld()),
            n,
            kv_heads,
            rows,
            heads.scale,
            window,
            softcap
        ],
    );
    let step = Step::of(plan, AttentionKernel::BwdDkdv, plan.dkdv, false);
    step.kernel.launch(
        step.grid(heads.kv_heads),
        [step.threads, 1, 1],
        step.shared,
        args![
            q.ptr(),
            k.ptr(),
            v.ptr(),
            d_o.ptr(),
            lse.ptr(),
            delta.ptr(),
            dk.ptr(),
            dv.ptr(),
            step.tiles,
            int(q.ld()),
            int(k.ld()),
            int(v.ld()),
            int(d_o.ld()),
            int(dk.ld()),
            int(dv.ld()),
            n,
            kv_heads,
            rows,
            heads.scale,
            window,
            softcap
        ],
    );
}

pub(super) fn row_sums(o: &Array, d_o: &Array, delta: &Array, plan: &Plan) {
    let Plan { cuda, heads, dtype, tokens, .. } = plan;
    let threads = heads.head_dim.div_ceil(lanes(*dtype)).next_power_of_two().min(32);
    let head_dim = heads.head_dim.to_string();
    let defines = [("T", dtype.name()), ("HEAD_DIM", &head_dim)];
    cuda.kernel(entry!("attention_delta.cu", "attention_delta"), &defines).launch(
        [blocks((tokens[0] * heads.heads * threads).div_ceil(256)), 1, 1],
        [256, 1, 1],
        0,
        args![o.ptr(), d_o.ptr(), delta.ptr(), int(o.ld()), int(d_o.ld()), int(heads.heads), int(tokens[0])],
    );
}

/// A kernel and how it is launched.
struct Step {
    kernel: Kernel,
    /// The address of its table.
    tiles: u64,
    count: usize,
    threads: u32,
    shared: u32,
}

impl Step {
    fn of(plan: &Plan, kernel: AttentionKernel, table: Table, sinks: bool) -> Self {
        let Plan { cuda, dtype, engine, .. } = plan;
        let (tensor_cores, plain) = match kernel {
            AttentionKernel::Fwd => {
                (entry!("attention_fwd.cu", "attention_fwd"), entry!("attention_f32.cu", "attention_fwd"))
            }
            AttentionKernel::BwdDq => {
                (entry!("attention_bwd_dq.cu", "attention_bwd_dq"), entry!("attention_f32.cu", "attention_bwd_dq"))
            }
            AttentionKernel::BwdDkdv => (
                entry!("attention_bwd_dkdv.cu", "attention_bwd_dkdv"),
                entry!("attention_f32.cu", "attention_bwd_dkdv"),
            ),
        };
        let head_dim = plan.heads.head_dim;
        let (kernel, threads, shared) = if *engine == Engine::Plain {
            // Rows of f32 in shared memory, 16 bytes longer than a head.
            let rows = if kernel == AttentionKernel::Fwd { 80 } else { 96 };
            let digits = head_dim.to_string();
            let mut defines = vec![("T", dtype.name()), ("HEAD_DIM", digits.as_str())];
            defines.extend(plan.options(sinks));
            (cuda.kernel(plain, &defines), 128, blocks(rows * (head_dim + 4) * 4))
        } else {
            let options = plan.options(sinks);
            let tiles = Tiles::of(kernel, head_dim as u32, arch(cuda), !options.is_empty());
            let mut defines = tiles.defines(dtype.name(), head_dim as u32);
            defines.extend(options);
            (cuda.kernel(tensor_cores, &defines), 32 * tiles.warps, tiles.shared(kernel, head_dim as u32))
        };
        Self { kernel, tiles: plan.tables.ptr_at(table.first), count: table.tiles, threads, shared }
    }

    fn grid(&self, heads: usize) -> [u32; 3] {
        [blocks(self.count * heads), 1, 1]
    }
}
