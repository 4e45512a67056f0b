//! Rotary position embedding, with the per-head RMSNorm that Qwen3 puts before it.
//!
//! Each head is a row of `head_dim` channels; channel i of the first half and channel i of the second
//! half turn together by the angle of the token's position (Su et al., arXiv:2104.09864, in the
//! "rotate half" layout of transformers):
//! y₁ = x₁·cos − x₂·sin, y₂ = x₂·cos + x₁·sin. Channels beyond twice the tables' width pass through.
//! The backward turns the other way.
//!
//! # Shapes
//! x, y `[tokens, heads · head_dim]`; cos, sin `[tokens, rotary_dim / 2]`; norm weight `[head_dim]`.
//!
//! # Gradients
//! To x and to the norm's weight. Saved: x and rstd if there is a norm, nothing otherwise.

use burn::tensor::{DType, Tensor as BurnTensor};

use crate::cuda::{Array, Ints, ops};
use crate::{Device, Path, Tensor, cpu, from_f32, portable};

/// Cosines and sines of every position up to the longest document, made once for a model.
#[derive(Clone, Debug)]
pub struct Tables {
    /// Cosines and sines, `[positions, half]`, row-major.
    host: [Vec<f32>; 2],
    half: usize,
    device: Device,
    cuda: Option<[Array; 2]>,
}

impl Tables {
    /// Tables of `half` angles for each position; `cos` and `sin` are row-major.
    ///
    /// # Panics
    /// When they are not equally long, or no whole number of rows.
    pub fn new(cos: Vec<f32>, sin: Vec<f32>, half: usize, device: &Device) -> Self {
        assert_eq!(cos.len(), sin.len(), "a cosine and a sine for every angle");
        let positions = cos.len() / half.max(1);
        assert_eq!(positions * half, cos.len(), "rows of {half} angles");
        let host = [cos, sin];
        // Kernels read rows that touch, which a matrix of any width does not have.
        let upload = |values: &Vec<f32>| {
            let flat = from_f32(values.clone(), [values.len()], device, DType::F32);
            flat.into_cuda().part(0, [positions, half])
        };
        let cuda = matches!(device, Device::Cuda(_)).then(|| host.each_ref().map(upload));
        Self { host, half, device: device.clone(), cuda }
    }

    /// The longest document.
    pub fn positions(&self) -> usize {
        self.host[0].len() / self.half.max(1)
    }

    /// The angles of tokens at these positions.
    pub fn angles(&self, positions: &[u32]) -> Angles {
        if let (Device::Cuda(cuda), Some([cos, sin])) = (&self.device, &self.cuda) {
            let positions = Ints::from_slice(cuda, positions, "positions");
            return Angles(Place::Cuda(ops::rope::Angles { cos: cos.clone(), sin: sin.clone(), positions }));
        }
        let rows = |table: &[f32]| {
            let row = |&position: &u32| &table[position as usize * self.half..][..self.half];
            let values = positions.iter().flat_map(row).copied().collect();
            from_f32(values, [positions.len(), self.half], &self.device, DType::F32).into_burn()
        };
        let [cos, sin] = self.host.each_ref().map(|table| rows(table));
        Angles(Place::Burn(Turns { cos, sin }))
    }
}

/// Cosines and sines of the angles of every token of a batch.
#[derive(Clone, Debug)]
pub struct Angles(Place);

#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "one a batch")]
enum Place {
    Burn(Turns),
    Cuda(ops::rope::Angles),
}

/// `[tokens, rotary_dim / 2]` each, in `f32`.
#[derive(Clone, Debug)]
pub(crate) struct Turns {
    pub(crate) cos: BurnTensor<2>,
    pub(crate) sin: BurnTensor<2>,
}

impl Angles {
    fn burn(&self) -> &Turns {
        match &self.0 {
            Place::Burn(turns) => turns,
            Place::Cuda(_) => panic!("the operands of one operation lie on one device"),
        }
    }

    fn cuda(&self) -> &ops::rope::Angles {
        match &self.0 {
            Place::Burn(_) => panic!("the operands of one operation lie on one device"),
            Place::Cuda(angles) => angles,
        }
    }
}

/// The norm before the rotation.
#[derive(Clone, Debug)]
pub struct Norm {
    /// `[head_dim]`.
    pub weight: Tensor<1>,
    /// Added to the mean square.
    pub eps: f64,
}

/// Normalizes (if asked) and turns every head: `(y, rstd)`, rstd `[tokens · heads]`.
pub fn forward(x: Tensor<2>, head_dim: usize, norm: Option<&Norm>, angles: &Angles) -> (Tensor<2>, Option<Tensor<1>>) {
    if let Tensor::Cuda(x) = &x {
        let norm = norm.map(|norm| (norm.weight.cuda(), norm.eps as f32));
        let (y, rstd) = ops::rope::forward(x, head_dim, norm, angles.cuda());
        return (y.into(), rstd.map(Into::into));
    }
    let [tokens, width] = x.dims();
    let x = x.into_burn();
    let (x, rstd) = match norm {
        None => (x, None),
        Some(norm) => {
            let rows = x.reshape([tokens * width / head_dim, head_dim]);
            let (y, rstd) = crate::rms_norm::forward(&rows.into(), &norm.weight, norm.eps, 0);
            (y.into_burn().reshape([tokens, width]), Some(rstd))
        }
    };
    (turn(x, head_dim, angles, Direction::Forward).into(), rstd)
}

/// The gradient to x, and to the norm's weight when `weight_grad`.
///
/// `saved` is x and rstd when [`forward`] had a norm.
pub fn backward(
    dy: Tensor<2>,
    head_dim: usize,
    saved: Option<(&Norm, Tensor<2>, &Tensor<1>)>,
    angles: &Angles,
    weight_grad: bool,
) -> (Tensor<2>, Option<Tensor<1>>) {
    let [tokens, width] = dy.dims();
    if let Tensor::Cuda(dy) = dy {
        let norm = saved.as_ref().map(|(norm, x, rstd)| ops::rope::SavedNorm {
            weight: norm.weight.cuda(),
            x: x.cuda(),
            rstd: rstd.cuda(),
        });
        let (dx, dw) = ops::rope::backward(dy, head_dim, norm, angles.cuda(), weight_grad);
        return (dx.into(), dw.map(Into::into));
    }
    let dx = turn(dy.into_burn(), head_dim, angles, Direction::Backward);
    let Some((norm, x, rstd)) = saved else { return (dx.into(), None) };
    let heads = [tokens * width / head_dim, head_dim];
    let (dy, x) = (Tensor::from(dx.reshape(heads)), Tensor::from(x.into_burn().reshape(heads)));
    let dw = weight_grad.then(|| crate::rms_norm::weight_grad(&dy, &x, rstd));
    let dx = crate::rms_norm::backward(&dy, &x, &norm.weight, rstd, None, 0);
    (dx.into_burn().reshape([tokens, width]).into(), dw)
}

/// q or k as the linears made it, with the rstd of its norm if there was one.
pub type Turned = (Tensor<2>, Option<Tensor<1>>);

/// [`forward`] of queries and keys together, which are one launch on CUDA. `norms` are theirs. Without norms they are
/// turned in their own memory where nothing holds it but them and `v`, which may be columns of the same matrix.
pub fn forward_qk(
    q: Tensor<2>,
    k: Tensor<2>,
    v: &Tensor<2>,
    head_dim: usize,
    norms: Option<&[Norm; 2]>,
    angles: &Angles,
) -> [Turned; 2] {
    if let (Tensor::Cuda(q), Tensor::Cuda(k)) = (&q, &k) {
        let weights = norms.map(|[q, k]| (q.weight.cuda(), k.weight.cuda(), q.eps as f32));
        let (q, k, rstd) = ops::rope::forward_qk([q, k, v.cuda()], head_dim, weights, angles.cuda());
        let (rstd_q, rstd_k) = rstd.map_or((None, None), |(q, k)| (Some(q.into()), Some(k.into())));
        return [(q.into(), rstd_q), (k.into(), rstd_k)];
    }
    let [norm_q, norm_k] = norms.map_or([None, None], |[q, k]| [Some(q), Some(k)]);
    [forward(q, head_dim, norm_q, angles), forward(k, head_dim, norm_k, angles)]
}

/// [`backward`] of queries and keys together, in their own memory where nothing holds it but them and `dv`. `saved` is x
/// and rstd of each when there were norms.
pub fn backward_qk(
    [dq, dk]: [Tensor<2>; 2],
    dv: &Tensor<2>,
    head_dim: usize,
    saved: Option<[(&Norm, Tensor<2>, &Tensor<1>); 2]>,
    angles: &Angles,
    weight_grads: bool,
) -> [Turned; 2] {
    if let Tensor::Cuda(_) = dq {
        // By value: where nothing else holds them, the gradients are turned in their own memory.
        let (dq, dk) = (dq.into_cuda(), dk.into_cuda());
        let norms = saved.as_ref().map(|saved| {
            saved.each_ref().map(|(norm, x, rstd)| ops::rope::SavedNorm {
                weight: norm.weight.cuda(),
                x: x.cuda(),
                rstd: rstd.cuda(),
            })
        });
        let (dq, dk, dw) = ops::rope::backward_qk(dq, dk, dv.cuda(), head_dim, norms, angles.cuda(), weight_grads);
        let (dw_q, dw_k) = dw.map_or((None, None), |(q, k)| (Some(q.into()), Some(k.into())));
        return [(dq.into(), dw_q), (dk.into(), dw_k)];
    }
    let [saved_q, saved_k] = saved.map_or([None, None], |[q, k]| [Some(q), Some(k)]);
    [backward(dq, head_dim, saved_q, angles, weight_grads), backward(dk, head_dim, saved_k, angles, weight_grads)]
}

/// Which way to turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Forward,
    Backward,
}

fn turn(x: BurnTensor<2>, head_dim: usize, angles: &Angles, direction: Direction) -> BurnTensor<2> {
    match Path::of_burn(&x) {
        Path::Cpu => cpu::rope::turn(x, head_dim, angles.burn(), direction),
        _ => portable::rope::turn(x, head_dim, angles.burn(), direction),
    }
}
