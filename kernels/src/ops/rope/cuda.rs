//! Rotary position embedding, with the per-head norm before it where there is one.
//!
//! q and k go through one launch; a single matrix goes as a q without a k. Saved by a forward with a norm: x and rstd.

use crate::ops::rms_norm::GainForm;
use crate::runtime::limits::MAX_HEAD_DIM;
use crate::runtime::op::{blocks, check_dims, int, like, target};
use crate::runtime::{Array, DType, Entry, Ints, Kernel, MemoryUse, args, entry, reduce};

/// Tokens that one block sums for the gradient of a norm's weight.
const CHUNK: usize = 32;

/// Angles by position, and the positions of a batch.
#[derive(Clone, Debug)]
pub(crate) struct Angles {
    /// Cosines, f32 `[max_pos, rotary_dim / 2]`, nothing between the rows.
    pub(crate) cos: Array,
    /// Sines, the same.
    pub(crate) sin: Array,
    /// Each token's place in its document, below `max_pos`.
    pub(crate) positions: Ints,
}

/// The rotation of every head, and where a channel's partner is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rotation<'a> {
    /// Each token's angles.
    pub(crate) angles: &'a Angles,
    /// True if channels 2i and 2i + 1 are rotated together.
    pub(crate) interleaved: bool,
}

/// A norm of heads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadNorm<'a> {
    /// `[1, head_dim]`.
    pub(crate) weight: &'a Array,
    /// The form of the factor.
    pub(crate) form: GainForm,
    /// Added to the mean square.
    pub(crate) eps: f32,
}

/// `(y, rstd)`; rstd f32 `[tokens, heads]` if there is a norm.
pub(crate) fn forward(
    x: &Array,
    head_dim: usize,
    norm: Option<HeadNorm<'_>>,
    rotation: Option<Rotation<'_>>,
) -> (Array, Option<Array>) {
    let x = x.aligned();
    let q = Forward::new(&x, like(&x), head_dim, norm);
    launch_forward(&q, None, head_dim, norm, rotation);
    (q.y, q.rstd)
}

/// [`forward`] of q and k: `(q, k, rstds of q and k)`; both norms have one form and one eps. Without them the results are
/// in the memory of q and k where they may be, also if v lies in the same.
pub(crate) fn forward_qk(
    [q, k, v]: [&Array; 3],
    head_dim: usize,
    norms: Option<[HeadNorm<'_>; 2]>,
    rotation: Option<Rotation<'_>>,
) -> (Array, Array, Option<(Array, Array)>) {
    let free = norms.is_none() && Array::are_unique(&[q, k, v]) && q.is_aligned() && k.is_aligned();
    let (q, k) = (q.aligned(), k.aligned());
    let [to_q, to_k] = [&q, &k].map(|x| if free { x.clone() } else { like(x) });
    let q = Forward::new(&q, to_q, head_dim, norms.map(|norms| norms[0]));
    let k = Forward::new(&k, to_k, head_dim, norms.map(|norms| norms[1]));
    launch_forward(&q, Some(&k), head_dim, norms.map(|norms| norms[0]), rotation);
    (q.y, k.y, q.rstd.zip(k.rstd))
}

/// Tensors that the backward needs of a norm.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SavedNorm<'a> {
    /// The norm.
    pub(crate) norm: HeadNorm<'a>,
    /// The forward's input.
    pub(crate) x: &'a Array,
    /// The forward's rstd.
    pub(crate) rstd: &'a Array,
}

/// `(dx, dweight)`: dx in the memory of dy where it may be, the norm's f32 `[1, head_dim]` where it is wanted.
pub(crate) fn backward(
    dy: Array,
    head_dim: usize,
    norm: Option<SavedNorm<'_>>,
    rotation: Option<Rotation<'_>>,
    want_weight_grad: bool,
) -> (Array, Option<Array>) {
    let y = target(&dy);
    let q = Backward::new(dy, y, head_dim, norm);
    let grads = (want_weight_grad && norm.is_some()).then(|| weight_grads(&q, None, head_dim, rotation));
    launch_backward(&q, None, head_dim, rotation);
    (q.dx, grads.map(|[dw, _]| dw))
}

/// [`backward`] of q and k: `(dq, dk, gradients to the weights of q's and k's norm)`. dv may lie in the same memory.
pub(crate) fn backward_qk(
    dq: Array,
    dk: Array,
    dv: &Array,
    head_dim: usize,
    norms: Option<[SavedNorm<'_>; 2]>,
    rotation: Option<Rotation<'_>>,
    want_weight_grads: bool,
) -> (Array, Array, Option<(Array, Array)>) {
    // The gradients may be columns of one matrix, and then reach their memory together.
    let free = Array::are_unique(&[&dq, &dk, dv]) && dq.is_aligned() && dk.is_aligned();
    let [q_to, k_to] = [&dq, &dk].map(|d| if free { d.clone() } else { target(d) });
    let q = Backward::new(dq, q_to, head_dim, norms.map(|norms| norms[0]));
    let k = Backward::new(dk, k_to, head_dim, norms.map(|norms| norms[1]));
    let wanted = want_weight_grads && norms.is_some();
    let grads = wanted.then(|| weight_grads(&q, Some(&k), head_dim, rotation)).map(|[q, k]| (q, k));
    launch_backward(&q, Some(&k), head_dim, rotation);
    (q.dx, k.dx, grads)
}

/// One matrix of a forward launch.
struct Forward {
    x: Array,
    weight: Option<Array>,
    y: Array,
    rstd: Option<Array>,
}

/// One matrix of a backward launch.
struct Backward {
    dy: Array,
    saved: Option<Saved>,
    dx: Array,
}

struct Saved {
    weight: Array,
    form: GainForm,
    x: Array,
    rstd: Array,
}

impl Forward {
    fn new(x: &Array, y: Array, head_dim: usize, norm: Option<HeadNorm<'_>>) -> Self {
        let heads = heads(x, head_dim);
        let weight = norm.map(|norm| checked(norm.weight, x, head_dim));
        let rstd =
            weight.as_ref().map(|_| Array::dense(x.cuda(), [x.rows(), heads], DType::F32, MemoryUse::Activations));
        Self { x: x.clone(), weight, y, rstd }
    }
}

impl Backward {
    fn new(dy: Array, dx: Array, head_dim: usize, norm: Option<SavedNorm<'_>>) -> Self {
        let saved = norm.map(|SavedNorm { norm: HeadNorm { weight, form, .. }, x, rstd }| {
            check_dims("x", x, dy.dims());
            check_dims("rstd", rstd, [x.rows(), heads(x, head_dim)]);
            Saved { weight: checked(weight, x, head_dim), form, x: x.aligned(), rstd: rstd.contiguous() }
        });
        Self { dy: dy.aligned(), saved, dx }
    }

    fn form(&self) -> Option<GainForm> {
        self.saved.as_ref().map(|saved| saved.form)
    }

    /// `[weight, x, rstd]`, and x's stride.
    fn saved(&self) -> ([u64; 3], usize) {
        self.saved.as_ref().map_or(([0; 3], 0), |s| ([s.weight.ptr(), s.x.ptr(), s.rstd.ptr()], s.x.ld()))
    }
}

fn launch_forward(
    q: &Forward,
    k: Option<&Forward>,
    head_dim: usize,
    norm: Option<HeadNorm<'_>>,
    rotation: Option<Rotation<'_>>,
) {
    let [tokens, _] = q.x.dims();
    let address = |array: Option<&Array>| array.map_or(0, Array::ptr);
    let stride = |array: Option<&Array>| int(array.map_or(0, Array::ld));
    let (kx, ky) = (k.map(|k| &k.x), k.map(|k| &k.y));
    let (q_heads, k_heads) = (heads(&q.x, head_dim), kx.map_or(0, |k| heads(k, head_dim)));
    let shape = Shape::of(&q.x, head_dim, rotation);
    let [cos, sin, positions] = shape.angles;
    shape.kernel(shape.kernels.forward, &q.x, norm.map(|norm| norm.form)).early().launch(
        shape.grid(tokens, q_heads + k_heads),
        [256, 1, 1],
        0,
        args![
            q.x.ptr(),
            address(kx),
            address(q.weight.as_ref()),
            address(k.and_then(|k| k.weight.as_ref())),
            cos,
            sin,
            positions,
            q.y.ptr(),
            address(ky),
            address(q.rstd.as_ref()),
            address(k.and_then(|k| k.rstd.as_ref())),
            int(tokens),
            int(q_heads),
            int(k_heads),
            int(head_dim),
            int(shape.rotary_dim),
            int(q.x.ld()),
            stride(kx),
            int(q.y.ld()),
            stride(ky),
            norm.map_or(0.0, |norm| norm.eps)
        ],
    );
}

fn launch_backward(q: &Backward, k: Option<&Backward>, head_dim: usize, rotation: Option<Rotation<'_>>) {
    let [tokens, _] = q.dy.dims();
    let (q_heads, k_heads) = (heads(&q.dy, head_dim), k.map_or(0, |k| heads(&k.dy, head_dim)));
    let ([wq, xq, rstd_q], ldq) = q.saved();
    let ([wk, xk, rstd_k], ldk) = k.map_or(([0; 3], 0), Backward::saved);
    let [dk, dk_out] = k.map_or([0; 2], |k| [k.dy.ptr(), k.dx.ptr()]);
    let [lddk, lddko] = k.map_or([0; 2], |k| [int(k.dy.ld()), int(k.dx.ld())]);
    let shape = Shape::of(&q.dy, head_dim, rotation);
    let [cos, sin, positions] = shape.angles;
    shape.kernel(shape.kernels.backward, &q.dy, q.form()).launch(
        shape.grid(tokens, q_heads + k_heads),
        [256, 1, 1],
        0,
        args![
            q.dy.ptr(),
            dk,
            xq,
            xk,
            wq,
            wk,
            rstd_q,
            rstd_k,
            cos,
            sin,
            positions,
            q.dx.ptr(),
            dk_out,
            int(tokens),
            int(q_heads),
            int(k_heads),
            int(head_dim),
            int(shape.rotary_dim),
            int(q.dy.ld()),
            lddk,
            int(ldq),
            int(ldk),
            int(q.dx.ld()),
            lddko
        ],
    );
}

/// The gradients to the weights of both norms; the second is empty without k. Reads dy, so it goes before the backward.
fn weight_grads(q: &Backward, k: Option<&Backward>, head_dim: usize, rotation: Option<Rotation<'_>>) -> [Array; 2] {
    let (cuda, tokens) = (q.dy.cuda(), q.dy.rows());
    let (q_heads, k_heads) = (heads(&q.dy, head_dim), k.map_or(0, |k| heads(&k.dy, head_dim)));
    let ([_, xq, rstd_q], ldq) = q.saved();
    let ([_, xk, rstd_k], ldk) = k.map_or(([0; 3], 0), Backward::saved);
    let (dk, lddk) = k.map_or((0, 0), |k| (k.dy.ptr(), k.dy.ld()));
    let chunks = tokens.div_ceil(CHUNK);
    let [width_q, width_k] = [head_dim, if k.is_some() { head_dim } else { 0 }];
    let partials = [width_q, width_k].map(|width| Array::dense(cuda, [chunks, width], DType::F32, MemoryUse::Scratch));
    let shape = Shape::of(&q.dy, head_dim, rotation);
    let [cos, sin, positions] = shape.angles;
    shape.kernel(shape.kernels.weight_grads, &q.dy, q.form()).launch(
        [blocks(chunks), if k.is_some() { 2 } else { 1 }, 1],
        [256, 1, 1],
        0,
        args![
            q.dy.ptr(),
            dk,
            xq,
            xk,
            rstd_q,
            rstd_k,
            cos,
            sin,
            positions,
            partials[0].ptr(),
            partials[1].ptr(),
            int(tokens),
            int(q_heads),
            int(k_heads),
            int(head_dim),
            int(shape.rotary_dim),
            int(q.dy.ld()),
            int(lddk),
            int(ldq),
            int(ldk),
            int(CHUNK)
        ],
    );
    partials.map(|partial| {
        let grad = Array::zeros(cuda, [1, partial.cols()], DType::F32, MemoryUse::Activations);
        reduce::sum_partials(&partial, &grad);
        grad
    })
}

/// The kernels for one size of heads.
#[derive(Clone, Copy)]
struct Kernels {
    forward: Entry,
    backward: Entry,
    weight_grads: Entry,
    /// True if they are made for this size, or take any size.
    sized: bool,
}

/// The kernels whose names end in a suffix.
macro_rules! sized {
    ($suffix:literal) => {
        Kernels {
            forward: entry!("qk_norm_rope.cu", concat!("qk_norm_rope_fwd", $suffix)),
            backward: entry!("qk_norm_rope.cu", concat!("qk_norm_rope_bwd", $suffix)),
            weight_grads: entry!("qk_norm_rope.cu", concat!("qk_norm_rope_dw", $suffix)),
            sized: true,
        }
    };
}

/// The size of the rotation, and the kernels for it.
struct Shape {
    rotary_dim: usize,
    interleaved: bool,
    /// Addresses of cosines, sines and positions; 0 without a rotation.
    angles: [u64; 3],
    kernels: Kernels,
}

impl Shape {
    fn of(x: &Array, head_dim: usize, rotation: Option<Rotation<'_>>) -> Self {
        let rotary_dim = rotation.map_or(0, |Rotation { angles, .. }| {
            assert_eq!(angles.positions.len(), x.rows(), "a position for every token");
            assert_eq!(angles.cos.dims(), angles.sin.dims(), "shapes of cos and sin");
            assert!(
                angles.cos.is_contiguous() && angles.sin.is_contiguous(),
                "cos and sin have nothing between their rows"
            );
            2 * angles.cos.cols()
        });
        assert!(
            rotary_dim <= head_dim && head_dim.is_multiple_of(2) && head_dim <= MAX_HEAD_DIM,
            "heads of {head_dim} channels, {rotary_dim} of which are rotated; the kernels take even sizes up to {MAX_HEAD_DIM}"
        );
        let kernels = match (head_dim == rotary_dim, head_dim) {
            (true, 64) => sized!("_64"),
            (true, 128) => sized!("_128"),
            (true, 256) => sized!("_256"),
            _ => Kernels { sized: false, ..sized!("") },
        };
        let addresses =
            |Rotation { angles, .. }: Rotation<'_>| [angles.cos.ptr(), angles.sin.ptr(), angles.positions.ptr()];
        Self {
            rotary_dim,
            interleaved: rotation.is_some_and(|rotation| rotation.interleaved),
            angles: rotation.map_or([0; 3], addresses),
            kernels,
        }
    }

    /// The kernel for x's dtype and a norm.
    fn kernel(&self, entry: Entry, x: &Array, form: Option<GainForm>) -> Kernel {
        let gain = match form {
            Some(GainForm::OnePlus) => "ONE_PLUS",
            // y is rounded once in any case.
            Some(GainForm::Plain | GainForm::RoundedAfter) | None => "PLAIN",
            Some(GainForm::None) => unreachable!("the norm of a head has a weight"),
        };
        let pairs = if self.interleaved { "INTERLEAVED" } else { "HALVES" };
        x.cuda().kernel(entry, &[("T", x.dtype().name()), ("GAIN", gain), ("PAIRS", pairs)])
    }

    /// Returns the grid of the forward and the backward.
    fn grid(&self, tokens: usize, heads: usize) -> [u32; 3] {
        match self.kernels.sized {
            true => [blocks(tokens.div_ceil(8)), blocks(heads.div_ceil(16)), 1],
            false => [blocks((tokens * heads).div_ceil(8)), 1, 1],
        }
    }
}

fn heads(x: &Array, head_dim: usize) -> usize {
    assert!(x.cols().is_multiple_of(head_dim), "{} columns are not heads of {head_dim}", x.cols());
    x.cols() / head_dim
}

fn checked(weight: &Array, x: &Array, head_dim: usize) -> Array {
    check_dims("the norm's weight", weight, [1, head_dim]);
    assert_eq!(weight.dtype(), x.dtype(), "dtype of the norm's weight");
    weight.aligned()
}
