//! The tensors that the operations take: Burn's, or arrays of the CUDA runtime.

mod backend;
mod device;
mod memory;
mod meta;
mod offload;
#[cfg(feature = "wgpu")]
pub(crate) mod wgpu;

pub use backend::Backend;
pub use device::{Device, DeviceError, DeviceKind, DeviceLimits, open as open_device, parse as parse_device};
pub use memory::DeviceMemory;
pub use meta::{MetaDevice, MetaMemory, MetaTensor};
pub use offload::Offloaded;

use burn::tensor::{DType, Int, Tensor as BurnTensor, TensorData};

use crate::runtime::{self, Array, MemoryUse, elementwise};

/// Returns from an operation with the result of its kernel on wgpu, if it has one for these operands.
macro_rules! on_wgpu {
    ($result:expr) => {
        #[cfg(feature = "wgpu")]
        if let Some(result) = $result {
            return result;
        }
    };
}
pub(crate) use on_wgpu;

/// Activations, weights or statistics: a matrix or a vector of floats on a device.
///
/// On the CPU and on wgpu this is a tensor of Burn; on CUDA it is an array in the arena of [`runtime`]. All operands of an
/// operation are on one device. Cloning shares the memory.
///
/// ```
/// use burn::tensor::{Device, Tensor as BurnTensor};
/// use rekindle_kernels::{Tensor, matmul};
///
/// let x = BurnTensor::<2>::ones([3, 4], &Device::flex());
/// let y = matmul::nt(&Tensor::from(x.clone()), &Tensor::from(x));
/// assert_eq!(BurnTensor::from(y).dims(), [3, 3]);
/// ```
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "the small one is the hot one, and it is moved, not stored in bulk")]
pub enum Tensor<const D: usize> {
    /// A tensor of Burn.
    Burn(BurnTensor<D>),
    /// An array on a CUDA device; a vector is a matrix of one row.
    Cuda(Array),
    /// A shape without values ([`Device::Meta`]).
    Meta(MetaTensor),
}

impl<const D: usize> Tensor<D> {
    /// Returns the shape.
    pub fn dims(&self) -> [usize; D] {
        match self {
            Self::Burn(tensor) => tensor.dims(),
            Self::Cuda(array) => axes(array.dims()),
            Self::Meta(tensor) => axes(tensor.dims()),
        }
    }

    /// Returns the dtype.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Burn(tensor) => tensor.dtype(),
            Self::Cuda(array) => burn_dtype(array.dtype()),
            Self::Meta(tensor) => tensor.dtype(),
        }
    }

    /// Returns the device.
    pub fn device(&self) -> Device {
        match self {
            Self::Burn(tensor) => Device::Burn(tensor.device()),
            Self::Cuda(array) => Device::Cuda(array.cuda().clone()),
            Self::Meta(tensor) => Device::Meta(tensor.device().clone()),
        }
    }

    /// Returns `self + other`, in this tensor's memory unless it is shared. The sum of an f32 and a 16-bit tensor is f32.
    #[must_use]
    pub fn plus(self, other: &Self) -> Self {
        match (self.dtype(), other.dtype()) {
            (own, others) if own == others => {}
            (DType::F32, _) => return self.plus_narrow(other),
            (_, DType::F32) => return other.clone().plus_narrow(&self),
            (own, others) => panic!("no sum of {own:?} and {others:?}"),
        }
        match self {
            Self::Burn(a) => Self::Burn(a + other.burn().clone()),
            Self::Cuda(a) => Self::Cuda(elementwise::add(a, other.cuda())),
            Self::Meta(a) => Self::Meta(a.elementwise()),
        }
    }

    /// `self + other` of an f32 tensor and one of 16 bits.
    fn plus_narrow(self, other: &Self) -> Self {
        match self {
            Self::Burn(a) => Self::Burn(a + other.burn().clone().cast(DType::F32)),
            Self::Cuda(a) => Self::Cuda(elementwise::add_narrow(a, other.cuda())),
            Self::Meta(a) => {
                let _wide = other.meta().clone().cast(DType::F32);
                Self::Meta(a.elementwise())
            }
        }
    }

    /// Returns the values in a dtype, rounded to nearest; this tensor itself if it has the dtype.
    #[must_use]
    pub fn cast(self, dtype: DType) -> Self {
        match self {
            Self::Burn(a) if a.dtype() == dtype => Self::Burn(a),
            Self::Burn(a) => Self::Burn(a.cast(dtype)),
            Self::Cuda(a) => Self::Cuda(elementwise::cast(&a, cuda_dtype(dtype), MemoryUse::Activations)),
            Self::Meta(a) => Self::Meta(a.cast(dtype)),
        }
    }

    /// Returns `self · factor`.
    #[must_use]
    pub fn scale(self, factor: f32) -> Self {
        match self {
            Self::Burn(a) => Self::Burn(a * factor),
            Self::Cuda(a) => Self::Cuda(elementwise::scale(a, factor)),
            Self::Meta(a) => Self::Meta(a.elementwise()),
        }
    }

    /// Returns the elementwise product.
    #[must_use]
    pub fn times(self, other: &Self) -> Self {
        match self {
            Self::Burn(a) => Self::Burn(a * other.burn().clone()),
            Self::Cuda(a) => Self::Cuda(elementwise::mul(a, other.cuda())),
            Self::Meta(a) => Self::Meta(a.elementwise()),
        }
    }

    /// Returns Burn's tensor, for operations of that backend.
    pub(crate) fn burn(&self) -> &BurnTensor<D> {
        match self {
            Self::Burn(tensor) => tensor,
            Self::Cuda(_) | Self::Meta(_) => two_devices(),
        }
    }

    /// Returns the tensor of [`burn`](Self::burn) by value.
    pub(crate) fn into_burn(self) -> BurnTensor<D> {
        match self {
            Self::Burn(tensor) => tensor,
            Self::Cuda(_) | Self::Meta(_) => two_devices(),
        }
    }

    /// Returns the tensor of [`burn`](Self::burn) mutably.
    pub(crate) fn burn_mut(&mut self) -> &mut BurnTensor<D> {
        match self {
            Self::Burn(tensor) => tensor,
            Self::Cuda(_) | Self::Meta(_) => two_devices(),
        }
    }

    /// Returns the array, for operations on CUDA.
    pub(crate) fn cuda(&self) -> &Array {
        match self {
            Self::Burn(_) | Self::Meta(_) => two_devices(),
            Self::Cuda(array) => array,
        }
    }

    /// Returns the array of [`cuda`](Self::cuda) by value.
    pub(crate) fn into_cuda(self) -> Array {
        match self {
            Self::Burn(_) | Self::Meta(_) => two_devices(),
            Self::Cuda(array) => array,
        }
    }

    /// Returns the tensor without values, for operations that only count memory.
    pub(crate) fn meta(&self) -> &MetaTensor {
        match self {
            Self::Burn(_) | Self::Cuda(_) => two_devices(),
            Self::Meta(tensor) => tensor,
        }
    }

    /// Returns the tensor of [`meta`](Self::meta) by value.
    pub(crate) fn into_meta(self) -> MetaTensor {
        match self {
            Self::Burn(_) | Self::Cuda(_) => two_devices(),
            Self::Meta(tensor) => tensor,
        }
    }
}

pub(crate) fn two_devices() -> ! {
    panic!("the operands of one operation lie on one device")
}

/// The two results of a backend as tensors.
pub(crate) fn pair<const A: usize, const B: usize>(
    (a, b): (impl Into<Tensor<A>>, impl Into<Tensor<B>>),
) -> (Tensor<A>, Tensor<B>) {
    (a.into(), b.into())
}

/// The three results of a backend as tensors.
pub(crate) fn triple<T: Into<Tensor<2>>>((a, b, c): (T, T, T)) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    (a.into(), b.into(), c.into())
}

impl Tensor<2> {
    /// Returns the values in a dtype as [`cast`](Self::cast) does; on CUDA a new matrix has `pad_cols` spare columns behind
    /// each row.
    #[must_use]
    pub fn cast_padded(self, dtype: DType, pad_cols: usize) -> Self {
        match self {
            Self::Cuda(a) => Self::Cuda(elementwise::cast_padded(&a, cuda_dtype(dtype), pad_cols)),
            other => other.cast(dtype),
        }
    }

    /// Returns some columns, sharing memory.
    pub fn columns(&self, first: usize, count: usize) -> Self {
        match self {
            Self::Burn(tensor) => Self::Burn(tensor.clone().narrow(1, first, count)),
            Self::Cuda(array) => Self::Cuda(array.columns(first, count)),
            Self::Meta(tensor) => Self::Meta(tensor.columns(first, count)),
        }
    }

    /// Returns some rows, sharing memory.
    pub fn rows(&self, first: usize, count: usize) -> Self {
        match self {
            Self::Burn(tensor) => Self::Burn(tensor.clone().narrow(0, first, count)),
            Self::Cuda(array) => Self::Cuda(array.row_range(first, count)),
            Self::Meta(tensor) => Self::Meta(tensor.row_range(first, count)),
        }
    }

    /// Returns the values in memory of their own on CUDA, so that the matrix that the columns belong to can be freed.
    #[must_use]
    pub fn detached(self) -> Self {
        match self {
            Self::Burn(tensor) => Self::Burn(tensor),
            Self::Cuda(array) if array.is_unique() && array.is_whole() => Self::Cuda(array),
            Self::Cuda(array) => Self::Cuda(elementwise::copy(&array)),
            Self::Meta(tensor) => Self::Meta(tensor),
        }
    }

    /// Multiplies every row by `factors` `[columns]`, element by element.
    #[must_use]
    pub fn scale_columns(self, factors: &Tensor<1>) -> Self {
        match self {
            Self::Burn(x) => Self::Burn(x * factors.burn().clone().unsqueeze::<2>()),
            Self::Cuda(x) => Self::Cuda(elementwise::scale_columns(x, factors.cuda())),
            Self::Meta(x) => Self::Meta(x.elementwise()),
        }
    }

    /// Adds `row` `[columns]` to every row.
    #[must_use]
    pub fn add_row(self, row: &Tensor<1>) -> Self {
        match self {
            Self::Burn(x) => Self::Burn(x + row.burn().clone().unsqueeze::<2>()),
            Self::Cuda(x) => Self::Cuda(elementwise::add_bias(x, row.cuda())),
            Self::Meta(x) => Self::Meta(x.elementwise()),
        }
    }

    /// Concatenates matrices of equal height along columns; without a copy if they are already adjacent in memory.
    pub fn cat_columns(mut parts: Vec<Self>) -> Self {
        if parts.len() == 1 {
            return parts.remove(0);
        }
        match parts[0] {
            Self::Burn(_) => Self::Burn(BurnTensor::cat(parts.into_iter().map(Self::into_burn).collect(), 1)),
            Self::Cuda(_) => {
                let parts: Vec<Array> = parts.into_iter().map(Self::into_cuda).collect();
                Self::Cuda(Array::side_by_side(&parts, 0))
            }
            Self::Meta(_) => {
                let parts: Vec<MetaTensor> = parts.into_iter().map(Self::into_meta).collect();
                let cols = parts.iter().map(|part| part.dims()[1]).sum();
                let whole = parts[0].sized([parts[0].dims()[0], cols]);
                // Burn gathers what is not contiguous before it joins the parts.
                let _gathered: Vec<MetaTensor> = parts.iter().map(MetaTensor::contiguous).collect();
                Self::Meta(whole)
            }
        }
    }

    /// Matrices of one width below each other, in new memory.
    pub fn cat_rows(mut parts: Vec<Self>) -> Self {
        if parts.len() == 1 {
            return parts.remove(0).detached();
        }
        match &parts[0] {
            Self::Burn(_) => Self::Burn(BurnTensor::cat(parts.into_iter().map(Self::into_burn).collect(), 0)),
            Self::Cuda(first) => {
                let rows = parts.iter().map(|part| part.dims()[0]).sum();
                let dims = [rows, first.cols()];
                let whole = Array::empty(first.cuda(), dims, first.dtype(), MemoryUse::Activations);
                let mut row = 0;
                for part in &parts {
                    let part = part.cuda();
                    elementwise::copy_into(part, &whole.row_range(row, part.rows()));
                    row += part.rows();
                }
                Self::Cuda(whole)
            }
            Self::Meta(first) => {
                let rows = parts.iter().map(|part| part.dims()[0]).sum();
                Self::Meta(first.sized([rows, first.dims()[1]]))
            }
        }
    }

    /// Returns the one row as a vector.
    pub fn row_vector(self) -> Tensor<1> {
        match self {
            Self::Burn(tensor) => Tensor::Burn(tensor.squeeze_dim(0)),
            Self::Cuda(array) => {
                assert_eq!(array.rows(), 1, "a vector has one row");
                Tensor::Cuda(array)
            }
            Self::Meta(tensor) => {
                assert_eq!(tensor.dims()[0], 1, "a vector has one row");
                Tensor::Meta(tensor)
            }
        }
    }
}

impl Tensor<1> {
    /// Returns the vector as a matrix of one row.
    pub fn as_row(self) -> Tensor<2> {
        match self {
            Self::Burn(tensor) => Tensor::Burn(tensor.unsqueeze()),
            Self::Cuda(array) => Tensor::Cuda(array),
            Self::Meta(tensor) => Tensor::Meta(tensor),
        }
    }
}

impl<const D: usize> From<MetaTensor> for Tensor<D> {
    fn from(tensor: MetaTensor) -> Self {
        Self::Meta(tensor)
    }
}

impl<const D: usize> From<BurnTensor<D>> for Tensor<D> {
    fn from(tensor: BurnTensor<D>) -> Self {
        Self::Burn(tensor)
    }
}

impl<const D: usize> From<Tensor<D>> for BurnTensor<D> {
    /// The tensor itself, or the values of an array in a tensor on the CPU.
    fn from(tensor: Tensor<D>) -> Self {
        let (shape, dtype) = (tensor.dims(), tensor.dtype());
        match tensor {
            Tensor::Burn(tensor) => tensor,
            Tensor::Cuda(_) | Tensor::Meta(_) => from_f32(to_f32(tensor), shape, &Device::cpu(), dtype).into_burn(),
        }
    }
}

impl<const D: usize> From<Array> for Tensor<D> {
    fn from(array: Array) -> Self {
        Self::Cuda(array)
    }
}

/// A tensor of `dtype` on `device` holding `values`, row-major.
pub fn from_f32<const D: usize>(values: Vec<f32>, shape: [usize; D], device: &Device, dtype: DType) -> Tensor<D> {
    match device {
        Device::Cuda(cuda) => {
            Array::from_f32(cuda, &values, matrix(shape), cuda_dtype(dtype), MemoryUse::Weights).into()
        }
        Device::Burn(device) => {
            let data = TensorData::new(values, shape);
            let data = if dtype == DType::F32 { data } else { data.try_cast(dtype).expect("floats cast to floats") };
            BurnTensor::from_data(data, (device, dtype)).into()
        }
        Device::Meta(device) => MetaTensor::new(device, matrix(shape), dtype, MemoryUse::Weights).into(),
    }
}

/// A tensor of `dtype` on `device` from its own bits, little-endian and row-major.
pub fn from_le_bytes<const D: usize>(bytes: &[u8], shape: [usize; D], device: &Device, dtype: DType) -> Tensor<D> {
    match device {
        Device::Cuda(cuda) => {
            Array::from_bytes(cuda, bytes, matrix(shape), cuda_dtype(dtype), MemoryUse::Weights).into()
        }
        Device::Burn(device) => {
            let data = TensorData::from_bytes_vec(bytes.to_vec(), shape, dtype);
            BurnTensor::from_data(data, (device, dtype)).into()
        }
        Device::Meta(device) => MetaTensor::new(device, matrix(shape), dtype, MemoryUse::Weights).into(),
    }
}

/// A tensor whose values do not matter: in the memory of [`from_le_bytes`] on CUDA, zeros elsewhere.
pub fn unfilled<const D: usize>(shape: [usize; D], device: &Device, dtype: DType) -> Tensor<D> {
    match device {
        Device::Cuda(cuda) => Array::unfilled(cuda, matrix(shape), cuda_dtype(dtype), MemoryUse::Weights).into(),
        Device::Burn(device) => BurnTensor::zeros(shape, (device, dtype)).into(),
        Device::Meta(device) => MetaTensor::new(device, matrix(shape), dtype, MemoryUse::Weights).into(),
    }
}

/// The values of `tensor` as `f32`, row-major. Waits for the device.
///
/// After an error of a CUDA device the values are NaN, and [`Device::check`] says what happened.
pub fn to_f32<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    let numel = tensor.dims().iter().product();
    match tensor {
        Tensor::Burn(tensor) => {
            tensor.into_data_dtype(DType::F32).try_into_vec::<f32>().expect("cast to f32 just before")
        }
        Tensor::Cuda(array) => array.to_f32().unwrap_or_else(|_| vec![f32::NAN; numel]),
        Tensor::Meta(_) => vec![0.0; numel],
    }
}

/// The bits of `tensor`, little-endian and row-major, as [`from_le_bytes`] takes them. Waits for the device.
pub fn to_le_bytes<const D: usize>(tensor: Tensor<D>) -> Vec<u8> {
    if let Tensor::Burn(tensor) = tensor {
        return tensor.into_data().as_bytes().to_vec();
    }
    let dtype = tensor.dtype();
    // Exact for values that were rounded to 16 bits.
    let values = to_f32(tensor).into_iter();
    match dtype {
        DType::BF16 => values.flat_map(|value| burn::tensor::bf16::from_f32(value).to_le_bytes()).collect(),
        DType::F16 => values.flat_map(|value| burn::tensor::f16::from_f32(value).to_le_bytes()).collect(),
        _ => values.flat_map(f32::to_le_bytes).collect(),
    }
}

/// Row numbers for `select` and `select_assign`, beside `like` and outside its autodiff graph.
pub(crate) fn indices(rows: impl Iterator<Item = usize>, like: &BurnTensor<2>) -> BurnTensor<1, Int> {
    let rows: Vec<i32> = rows.map(|row| i32::try_from(row).expect("row numbers fit i32")).collect();
    let count = rows.len();
    BurnTensor::from_data(TensorData::new(rows, [count]), (&like.device().inner(), DType::I32))
}

/// The axes of a tensor from the rows and columns of its matrix; a vector has one row.
fn axes<const D: usize>([rows, cols]: [usize; 2]) -> [usize; D] {
    core::array::from_fn(|axis| if axis + 1 == D { cols } else { rows })
}

/// Rows and columns; a vector has one row.
fn matrix<const D: usize>(shape: [usize; D]) -> [usize; 2] {
    match *shape.as_slice() {
        [cols] => [1, cols],
        [rows, cols] => [rows, cols],
        _ => panic!("tensors have one or two axes, not {shape:?}"),
    }
}

/// The runtime's name of a dtype.
pub(crate) fn cuda_dtype(dtype: DType) -> runtime::DType {
    match dtype {
        DType::BF16 => runtime::DType::Bf16,
        DType::F16 => runtime::DType::F16,
        DType::F32 => runtime::DType::F32,
        other => panic!("activations are f32, f16 or bf16, not {other:?}"),
    }
}

fn burn_dtype(dtype: runtime::DType) -> DType {
    match dtype {
        runtime::DType::Bf16 => DType::BF16,
        runtime::DType::F16 => DType::F16,
        runtime::DType::F32 => DType::F32,
    }
}
