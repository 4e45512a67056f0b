//! Trainable parameters and their gradients: flat `f32` buffers with named views.
//!
//! One buffer for all values and one for all gradients make the optimizer, the global norm and (later)
//! the reduction over ranks one pass each. Layers keep [`ParamRef`]s, not tensors: a view is made where
//! it is read and gone before the optimizer writes, so that the write happens in place.

use core::ops::Range;

use burn::tensor::{DType, Tensor as BurnTensor};

use crate::cuda::{Array, ops};
use crate::matmul::Form;
use crate::tensor::cuda_dtype;
use crate::{Device, Path, Tensor, cpu, from_f32, matmul, optimizer, to_f32};

/// Where a parameter lies: a row-major matrix in the flat buffers. Vectors have one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParamRef {
    offset: usize,
    rows: usize,
    cols: usize,
}

impl ParamRef {
    /// Rows and columns.
    pub fn dims(self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// The elements in the flat buffers.
    pub fn range(self) -> Range<usize> {
        self.offset..self.offset + self.rows * self.cols
    }

    /// `self` and `next` as one matrix with the rows of both, if they touch and are equally wide.
    pub fn join(self, next: Self) -> Option<Self> {
        (self.range().end == next.offset && self.cols == next.cols)
            .then_some(Self { rows: self.rows + next.rows, ..self })
    }
}

/// A parameter's name and properties.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamInfo {
    /// Full name, such as `layers.0.q_proj.lora_A.weight`.
    pub name: String,
    /// Shape as saved; one or two axes.
    pub shape: Vec<usize>,
    /// Where it lies.
    pub at: ParamRef,
    /// Whether weight decay applies.
    pub decays: bool,
    /// Whose learning rate it has.
    pub group: Group,
}

/// Parameters that share a learning rate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Group {
    /// All but those of another group.
    #[default]
    Default,
    /// The embedding table and the output layer.
    Embedding,
}

/// Collects parameters before the flat buffer is made.
#[derive(Debug)]
pub struct ParamsBuilder {
    device: Device,
    dtype: DType,
    infos: Vec<ParamInfo>,
    values: Vec<f32>,
    mirrors: Vec<ops::mirror::Mirror>,
}

impl ParamsBuilder {
    /// For parameters on `device`, whose views are read in `dtype`.
    pub fn new(device: &Device, dtype: DType) -> Self {
        Self { device: device.clone(), dtype, infos: Vec::new(), values: Vec::new(), mirrors: Vec::new() }
    }

    /// The dtype that views are read in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Appends a parameter of one or two axes to [`Group::Default`].
    ///
    /// # Panics
    /// When `values` do not fill `shape`.
    pub fn push(&mut self, name: impl Into<String>, shape: &[usize], decays: bool, values: &[f32]) -> ParamRef {
        self.push_in(Group::Default, name, shape, decays, values)
    }

    /// Appends a parameter of one or two axes to a group.
    ///
    /// # Panics
    /// When `values` do not fill `shape`.
    pub fn push_in(
        &mut self,
        group: Group,
        name: impl Into<String>,
        shape: &[usize],
        decays: bool,
        values: &[f32],
    ) -> ParamRef {
        let (rows, cols) = match *shape {
            [n] => (1, n),
            [rows, cols] => (rows, cols),
            _ => panic!("a parameter has one or two axes, not {shape:?}"),
        };
        assert_eq!(values.len(), rows * cols, "values of shape {shape:?}");
        let at = ParamRef { offset: self.values.len(), rows, cols };
        self.values.extend_from_slice(values);
        self.infos.push(ParamInfo { name: name.into(), shape: shape.to_vec(), at, decays, group });
        at
    }

    /// Whether nothing was pushed.
    pub fn is_empty(&self) -> bool {
        self.infos.is_empty()
    }

    /// Keeps `scale` times a parameter in `target` too, on a CUDA device.
    pub(crate) fn mirror(&mut self, at: ParamRef, scale: f32, target: &Array) {
        self.mirrors.push(ops::mirror::Mirror { first: at.offset, scale, target: target.clone() });
    }

    /// Moves everything to the device.
    pub fn build(self) -> Params {
        let Self { device, dtype, infos, values, mirrors } = self;
        let numel = values.len();
        let values = from_f32(values, [numel], &device, DType::F32);
        let mirrors = match &device {
            Device::Cuda(cuda) if !mirrors.is_empty() => Some(ops::mirror::Mirrors::new(cuda, mirrors)),
            _ => None,
        };
        let mut params = Params { infos, values, dtype, compute: None, mirrors };
        params.refresh();
        params
    }
}

/// The trainable parameters of a model, `f32`.
#[derive(Clone, Debug)]
pub struct Params {
    infos: Vec<ParamInfo>,
    values: Tensor<1>,
    dtype: DType,
    /// On CUDA, the values in the compute dtype where that is not `f32`: views of it cost nothing.
    compute: Option<Array>,
    /// On CUDA, where else some of them are kept.
    mirrors: Option<ops::mirror::Mirrors>,
}

impl Params {
    /// No parameters.
    pub fn none(device: &Device, dtype: DType) -> Self {
        ParamsBuilder::new(device, dtype).build()
    }

    /// Names, shapes and places, in order.
    pub fn infos(&self) -> &[ParamInfo] {
        &self.infos
    }

    /// The dtype that views are read in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of trainable scalars.
    pub fn numel(&self) -> usize {
        self.values.dims()[0]
    }

    /// A parameter as a matrix in the compute dtype.
    pub fn matrix(&self, at: ParamRef) -> Tensor<2> {
        match (&self.values, &self.compute) {
            (Tensor::Burn(values), _) => values.clone().slice([at.range()]).reshape(at.dims()).cast(self.dtype).into(),
            (Tensor::Cuda(values), compute) => {
                compute.as_ref().unwrap_or(values).part(at.range().start, at.dims()).into()
            }
        }
    }

    /// The values of a parameter on the host.
    pub fn values(&self, at: ParamRef) -> Vec<f32> {
        part(&self.values, at)
    }

    /// All values on the host, in order.
    pub fn all_values(&self) -> Vec<f32> {
        to_f32(self.values.clone())
    }

    /// Replaces all values; `values` has [`numel`](Self::numel) elements.
    pub fn set_all_values(&mut self, values: Vec<f32>) {
        let numel = self.numel();
        assert_eq!(values.len(), numel, "one value for every parameter");
        self.values = from_f32(values, [numel], &self.values.device(), DType::F32);
        self.refresh();
    }

    /// Zero gradients for every parameter.
    pub fn zero_grads(&self) -> Grads {
        Grads { flat: zeros(self.numel(), &self.values.device(), "gradients") }
    }

    /// All values, for the optimizer; [`refresh`](Self::refresh) comes after it.
    pub(crate) fn flat_mut(&mut self) -> &mut Tensor<1> {
        &mut self.values
    }

    /// Brings the copies of the values up to date.
    pub(crate) fn refresh(&mut self) {
        let Tensor::Cuda(values) = &self.values else { return };
        if self.dtype != DType::F32 {
            match &self.compute {
                Some(compute) => ops::elementwise::copy_into(values, compute),
                None => self.compute = Some(ops::elementwise::cast(values, cuda_dtype(self.dtype))),
            }
        }
        if let Some(mirrors) = &self.mirrors {
            mirrors.refresh(values);
        }
    }
}

/// Gradients of [`Params`], summed over whatever is added before the optimizer reads them.
#[derive(Debug)]
pub struct Grads {
    flat: Tensor<1>,
}

impl Grads {
    /// Adds a gradient.
    pub fn add(&mut self, at: ParamRef, grad: Tensor<2>) {
        assert_eq!(grad.dims(), at.dims(), "gradient and parameter shapes");
        match grad {
            Tensor::Burn(grad) => self.update(at, |old| old + grad.cast(DType::F32)),
            Tensor::Cuda(grad) => ops::elementwise::accumulate(&self.array(at), &grad),
        }
    }

    /// Adds `alpha · aᵀ · b`, the gradient of a weight `[out, in]` from `[rows, out]` and `[rows, in]`.
    pub fn add_tn(&mut self, at: ParamRef, alpha: f32, a: &Tensor<2>, b: &Tensor<2>) {
        match (&mut self.flat, Path::of(a)) {
            (Tensor::Cuda(_), _) => {
                ops::matmul::accumulate(&self.array(at), alpha, a.cuda(), b.cuda(), Form::Tn.into());
            }
            (Tensor::Burn(flat), Path::Cpu) if Path::of_burn(flat) == Path::Cpu => cpu::with_mut(flat, |flat| {
                cpu::matmul::into_slice(&mut flat[at.range()], 1.0, alpha, a.burn(), b.burn(), Form::Tn);
            }),
            _ => {
                let grad = matmul::tn(a, b).into_burn().cast(DType::F32);
                self.update(at, |old| old + grad * alpha);
            }
        }
    }

    /// Adds the sum over the rows of `dy`, the gradient of a bias.
    pub fn add_row_sum(&mut self, at: ParamRef, dy: &Tensor<2>) {
        match dy {
            Tensor::Burn(dy) => self.add(at, dy.clone().cast(DType::F32).sum_dim(0).into()),
            Tensor::Cuda(dy) => ops::reduce::add_column_sums(dy, &self.array(at)),
        }
    }

    /// √Σ g²; on [`Path::Cpu`] summed in `f64` over chunks of fixed size. Waits for the device.
    pub fn norm(&self) -> f64 {
        optimizer::norm(&self.flat)
    }

    /// A gradient on the host.
    pub fn values(&self, at: ParamRef) -> Vec<f32> {
        part(&self.flat, at)
    }

    /// All gradients on the host, in the order of the parameters.
    pub fn all_values(&self) -> Vec<f32> {
        to_f32(self.flat.clone())
    }

    pub(crate) fn flat(&self) -> &Tensor<1> {
        &self.flat
    }

    /// The place of a gradient on a CUDA device.
    pub(crate) fn array(&self, at: ParamRef) -> Array {
        self.flat.cuda().part(at.range().start, at.dims())
    }

    fn update(&mut self, at: ParamRef, f: impl FnOnce(BurnTensor<2>) -> BurnTensor<2>) {
        let Tensor::Burn(flat) = &mut self.flat else { panic!("the operands of one operation lie on one device") };
        let old = flat.clone().slice([at.range()]).reshape(at.dims());
        let new = f(old).reshape([at.rows * at.cols]);
        flat.inplace(|flat| flat.slice_assign([at.range()], new));
    }
}

/// A flat buffer of zeros; `label` names its use in reports of a CUDA device's memory.
pub(crate) fn zeros(numel: usize, device: &Device, label: &'static str) -> Tensor<1> {
    match device {
        Device::Burn(device) => BurnTensor::zeros([numel], (device, DType::F32)).into(),
        Device::Cuda(cuda) => Array::zeros(cuda, [1, numel], crate::cuda::DType::F32, label).into(),
    }
}

/// Some elements of a flat buffer on the host.
fn part(flat: &Tensor<1>, at: ParamRef) -> Vec<f32> {
    to_f32(match flat {
        Tensor::Burn(flat) => Tensor::<1>::Burn(flat.clone().slice([at.range()])),
        Tensor::Cuda(flat) => Tensor::Cuda(flat.part(at.range().start, [1, at.range().len()])),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_add_up_where_they_belong() {
        let device = Device::cpu();
        let mut builder = ParamsBuilder::new(&device, DType::F32);
        let a = builder.push("a", &[2, 3], true, &[0.0; 6]);
        let b = builder.push("b", &[1, 3], true, &[1.0; 3]);
        let c = builder.push("c", &[3], false, &[2.0; 3]);
        assert_eq!(a.join(b).map(ParamRef::dims), Some([3, 3]));
        assert_eq!(a.join(c), None, "they do not touch");
        let params = builder.build();
        let mut grads = params.zero_grads();
        let dy = from_f32(vec![1.0, 2.0, 3.0, 4.0], [2, 2], &device, DType::F32);
        let x = from_f32(vec![1.0, 0.0, 1.0, 0.0, 1.0, 1.0], [2, 3], &device, DType::F32);
        grads.add_tn(a, 2.0, &dy, &x);
        grads.add_row_sum(c, &x);
        grads.add_row_sum(c, &x);
        assert_eq!(grads.all_values(), [2.0, 6.0, 8.0, 4.0, 8.0, 12.0, 0.0, 0.0, 0.0, 2.0, 2.0, 4.0]);
        assert!((grads.norm() - 352f64.sqrt()).abs() < 1e-12);
        assert_eq!(params.values(b), [1.0; 3]);
    }
}
