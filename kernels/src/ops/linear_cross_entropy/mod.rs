//! The head and the loss together: nll = −log softmax(h · Wᵀ) at the target, without ever holding all logits.
//!
//! Only rows whose target counts are touched. They go through in chunks: logits, log-sum-exp, and, when
//! gradients are wanted, dlogits = grad_scale · (softmax − onehot) in place, dh = dlogits · W and
//! dW += dlogitsᵀ · h (the idea of Wijmans et al., arXiv:2411.09009, and of Liger's fused linear cross-entropy).
//!
//! # Shapes
//! h, dh `[tokens, hidden]`; W `[vocab, hidden]`; targets `[tokens]`, −100 = not counted.
//!
//! # Dtypes
//! Logits and everything after them in `f32`.

mod cpu;
mod cuda;
mod meta;
mod portable;

use burn::tensor::{IndexingUpdateOp, Tensor as BurnTensor};

use crate::runtime::Array;
use crate::tensor::indices;
use crate::{Backend, Grads, ParamRef, Tensor};

/// The target of a row that does not count.
pub const IGNORED: i32 = -100;

/// Logits held at once on the CPU and in Burn's operations, but never fewer than 64 rows of them: 8 Mi values, 32 MiB.
const CHUNK_LOGITS: usize = 8 << 20;

/// The negative log-likelihood of every target, 0 where it does not count. On CUDA it is still on its way.
#[derive(Clone, Debug)]
pub struct Losses(Storage);

#[derive(Clone, Debug)]
enum Storage {
    Host(Vec<f32>),
    Cuda(Array),
}

impl Losses {
    /// Returns one number for every token. Waits for the device; after an error of the device they are NaN.
    pub fn values(self) -> Vec<f32> {
        match self.0 {
            Storage::Host(nll) => nll,
            Storage::Cuda(nll) => crate::to_f32(Tensor::<1>::Cuda(nll)),
        }
    }

    /// Returns their sum, in `f64`.
    pub fn sum(self) -> f64 {
        self.values().iter().map(|&x| f64::from(x)).sum()
    }
}

/// Returns the losses of `targets`, `[tokens]`.
pub fn forward(h: &Tensor<2>, weight: &Tensor<2>, targets: &[i32]) -> Losses {
    match Backend::of(h) {
        Backend::Cpu => in_chunks(h.burn(), weight.burn(), targets, cpu::forward),
        Backend::Portable => in_chunks(h.burn(), weight.burn(), targets, portable::forward),
        Backend::Cuda => Losses(Storage::Cuda(cuda::forward(h.cuda(), weight.cuda(), targets))),
        Backend::Meta => {
            meta::forward(h.meta(), weight.meta(), targets);
            Losses(Storage::Host(vec![0.0; targets.len()]))
        }
    }
}

/// As [`forward`], and the gradient of `grad_scale · Σ nll` to h; that to W goes to `weight_grad`.
pub fn forward_backward(
    h: &Tensor<2>,
    weight: &Tensor<2>,
    targets: &[i32],
    grad_scale: f32,
    weight_grad: Option<(&mut Grads, ParamRef)>,
) -> (Losses, Tensor<2>) {
    match Backend::of(h) {
        Backend::Cpu => {
            let chunk =
                |h: &BurnTensor<2>, w: &BurnTensor<2>, targets: &[u32]| cpu::forward_dlogits(h, w, targets, grad_scale);
            gradient_in_chunks(h.burn(), weight.burn(), targets, chunk, weight_grad)
        }
        Backend::Portable => {
            let chunk = |h: &BurnTensor<2>, w: &BurnTensor<2>, targets: &[u32]| {
                portable::forward_dlogits(h, w, targets, grad_scale)
            };
            gradient_in_chunks(h.burn(), weight.burn(), targets, chunk, weight_grad)
        }
        Backend::Cuda => {
            let dw = weight_grad.map(|(grads, at)| grads.array(at));
            let (nll, dh) = cuda::forward_backward(h.cuda(), weight.cuda(), targets, grad_scale, dw.as_ref());
            (Losses(Storage::Cuda(nll)), dh.into())
        }
        Backend::Meta => {
            let dh = meta::forward_backward(h.meta(), weight.meta(), targets, weight_grad);
            (Losses(Storage::Host(vec![0.0; targets.len()])), dh.into())
        }
    }
}

/// The losses of the counted rows, a chunk of logits at a time.
fn in_chunks(
    h: &BurnTensor<2>,
    weight: &BurnTensor<2>,
    targets: &[i32],
    chunk: impl Fn(&BurnTensor<2>, &BurnTensor<2>, &[u32]) -> Vec<f32>,
) -> Losses {
    let mut nll = vec![0.0; targets.len()];
    for rows in counted(targets).chunks(chunk_rows(weight.dims()[0])) {
        let (h, targets) = pick(h, targets, rows);
        scatter(&mut nll, rows, chunk(&h, weight, &targets));
    }
    Losses(Storage::Host(nll))
}

/// As [`in_chunks`], where `chunk` also returns the gradient to the logits.
fn gradient_in_chunks(
    h: &BurnTensor<2>,
    weight: &BurnTensor<2>,
    targets: &[i32],
    chunk: impl Fn(&BurnTensor<2>, &BurnTensor<2>, &[u32]) -> (Vec<f32>, BurnTensor<2>),
    mut weight_grad: Option<(&mut Grads, ParamRef)>,
) -> (Losses, Tensor<2>) {
    let rows = counted(targets);
    let mut nll = vec![0.0; targets.len()];
    let mut parts = Vec::new();
    for rows in rows.chunks(chunk_rows(weight.dims()[0])) {
        let (hidden, targets) = pick(h, targets, rows);
        let (losses, dlogits) = chunk(&hidden, weight, &targets);
        scatter(&mut nll, rows, losses);
        let dlogits = Tensor::from(dlogits);
        parts.push(crate::ops::matmul::nn(&dlogits, &weight.clone().into()).into_burn());
        if let Some((grads, param)) = weight_grad.as_mut() {
            grads.add_tn(*param, 1.0, &dlogits, &hidden.into());
        }
    }
    let nll = Losses(Storage::Host(nll));
    if rows.len() == targets.len() && !rows.is_empty() {
        return (nll, BurnTensor::cat(parts, 0).into());
    }
    let device = h.device();
    let zeros = BurnTensor::zeros(h.dims(), (&device, h.dtype()));
    if rows.is_empty() {
        return (nll, zeros.into());
    }
    let dh = BurnTensor::cat(parts, 0);
    let dh = zeros.select_assign(0, indices(rows.iter().copied(), h), dh, IndexingUpdateOp::Add);
    (nll, dh.into())
}

/// Rows of one chunk of logits: bounded by their size, a multiple of 64 where more than one chunk is needed.
fn chunk_rows(vocab: usize) -> usize {
    (CHUNK_LOGITS / vocab).max(64) / 64 * 64
}

fn counted(targets: &[i32]) -> Vec<usize> {
    (0..targets.len()).filter(|&t| targets[t] != IGNORED).collect()
}

fn pick(h: &BurnTensor<2>, targets: &[i32], rows: &[usize]) -> (BurnTensor<2>, Vec<u32>) {
    let (first, last) = (rows[0], rows[rows.len() - 1]);
    let hidden = if last - first + 1 == rows.len() {
        h.clone().narrow(0, first, rows.len())
    } else {
        h.clone().select(0, indices(rows.iter().copied(), h))
    };
    (hidden, rows.iter().map(|&t| targets[t] as u32).collect())
}

fn scatter(nll: &mut [f32], rows: &[usize], losses: Vec<f32>) {
    for (&row, loss) in rows.iter().zip(losses) {
        nll[row] = loss;
    }
}
