//! The tensors that the operations take: Burn's, or arrays of the CUDA runtime.

use burn::tensor::{DType, Int, Tensor as BurnTensor, TensorData};

use crate::Device;
use crate::cuda::{self, Array, ops};

/// Activations, weights or statistics: a matrix or a vector of floats on a device.
///
/// On the CPU and on wgpu this is a tensor of Burn; on CUDA an array in the arena of [`cuda`]. Operands of one operation
/// lie on one device. Cloning shares the memory.
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
}

impl<const D: usize> Tensor<D> {
    /// The extents.
    pub fn dims(&self) -> [usize; D] {
        match self {
            Self::Burn(tensor) => tensor.dims(),
            Self::Cuda(array) => {
                let [rows, cols] = array.dims();
                // A vector has one row.
                core::array::from_fn(|axis| if axis + 1 == D { cols } else { rows })
            }
        }
    }

    /// The dtype of the elements.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Burn(tensor) => tensor.dtype(),
            Self::Cuda(array) => burn_dtype(array.dtype()),
        }
    }

    /// Where it lies.
    pub fn device(&self) -> Device {
        match self {
            Self::Burn(tensor) => Device::Burn(tensor.device()),
            Self::Cuda(array) => Device::Cuda(array.cuda().clone()),
        }
    }

    /// `self + other`, into this tensor's memory where nothing else holds it.
    #[must_use]
    pub fn plus(self, other: &Self) -> Self {
        match (self, other) {
            (Self::Burn(a), Self::Burn(b)) => Self::Burn(a + b.clone()),
            (Self::Cuda(a), Self::Cuda(b)) => Self::Cuda(ops::elementwise::add(a, b)),
            _ => two_devices(),
        }
    }

    /// `self · factor`.
    #[must_use]
    pub fn scale(self, factor: f32) -> Self {
        match self {
            Self::Burn(a) => Self::Burn(a * factor),
            Self::Cuda(a) => Self::Cuda(ops::elementwise::scale(a, factor)),
        }
    }

    /// The product element by element.
    #[must_use]
    pub fn times(self, other: &Self) -> Self {
        match (self, other) {
            (Self::Burn(a), Self::Burn(b)) => Self::Burn(a * b.clone()),
            (Self::Cuda(a), Self::Cuda(b)) => Self::Cuda(ops::elementwise::mul(a, b)),
            _ => two_devices(),
        }
    }

    /// Burn's tensor, where the operation has no other path.
    pub(crate) fn burn(&self) -> &BurnTensor<D> {
        match self {
            Self::Burn(tensor) => tensor,
            Self::Cuda(_) => two_devices(),
        }
    }

    /// As [`burn`](Self::burn), by value.
    pub(crate) fn into_burn(self) -> BurnTensor<D> {
        match self {
            Self::Burn(tensor) => tensor,
            Self::Cuda(_) => two_devices(),
        }
    }

    /// The array, where the operation runs on CUDA.
    pub(crate) fn cuda(&self) -> &Array {
        match self {
            Self::Burn(_) => two_devices(),
            Self::Cuda(array) => array,
        }
    }

    /// As [`cuda`](Self::cuda), by value.
    pub(crate) fn into_cuda(self) -> Array {
        match self {
            Self::Burn(_) => two_devices(),
            Self::Cuda(array) => array,
        }
    }
}

fn two_devices() -> ! {
    panic!("the operands of one operation lie on one device")
}

impl Tensor<2> {
    /// Some columns, sharing memory.
    pub fn columns(&self, first: usize, count: usize) -> Self {
        match self {
            Self::Burn(tensor) => Self::Burn(tensor.clone().narrow(1, first, count)),
            Self::Cuda(array) => Self::Cuda(array.columns(first, count)),
        }
    }

    /// Some rows, sharing memory.
    pub fn rows(&self, first: usize, count: usize) -> Self {
        match self {
            Self::Burn(tensor) => Self::Burn(tensor.clone().narrow(0, first, count)),
            Self::Cuda(array) => Self::Cuda(array.row_range(first, count)),
        }
    }

    /// The same values in memory of their own size, which nothing else reaches, on CUDA: columns that stay while the
    /// matrix they belong to may go.
    #[must_use]
    pub fn detached(self) -> Self {
        match self {
            Self::Cuda(array) if !(array.is_unique() && array.is_whole()) => Self::Cuda(ops::elementwise::copy(&array)),
            other => other,
        }
    }

    /// Every row multiplied by `factors` `[columns]`, element by element.
    #[must_use]
    pub fn scale_columns(self, factors: &Tensor<1>) -> Self {
        match (self, factors) {
            (Self::Burn(x), Tensor::Burn(factors)) => Self::Burn(x * factors.clone().unsqueeze::<2>()),
            (Self::Cuda(x), Tensor::Cuda(factors)) => Self::Cuda(ops::elementwise::scale_columns(x, factors)),
            _ => two_devices(),
        }
    }

    /// `row` `[columns]` added to every row.
    #[must_use]
    pub fn add_row(self, row: &Tensor<1>) -> Self {
        match (self, row) {
            (Self::Burn(x), Tensor::Burn(row)) => Self::Burn(x + row.clone().unsqueeze::<2>()),
            (Self::Cuda(x), Tensor::Cuda(row)) => Self::Cuda(ops::elementwise::add_bias(x, row)),
            _ => two_devices(),
        }
    }

    /// Matrices of one height side by side; the same memory where they lie so already.
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
        }
    }

    /// The one row as a vector.
    pub fn row_vector(self) -> Tensor<1> {
        match self {
            Self::Burn(tensor) => Tensor::Burn(tensor.squeeze_dim(0)),
            Self::Cuda(array) => {
                assert_eq!(array.rows(), 1, "a vector has one row");
                Tensor::Cuda(array)
            }
        }
    }
}

impl Tensor<1> {
    /// The vector as a matrix of one row.
    pub fn as_row(self) -> Tensor<2> {
        match self {
            Self::Burn(tensor) => Tensor::Burn(tensor.unsqueeze()),
            Self::Cuda(array) => Tensor::Cuda(array),
        }
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
            Tensor::Cuda(_) => {
                let device = burn::tensor::Device::flex();
                from_f32(to_f32(tensor), shape, &Device::Burn(device), dtype).into_burn()
            }
        }
    }
}

impl<const D: usize> From<Array> for Tensor<D> {
    fn from(array: Array) -> Self {
        Self::Cuda(array)
    }
}

/// What memory of the CUDA arena holds when nothing more is known.
const LABEL: &str = "weights and inputs";

/// A tensor of `dtype` on `device` holding `values`, row-major.
pub fn from_f32<const D: usize>(values: Vec<f32>, shape: [usize; D], device: &Device, dtype: DType) -> Tensor<D> {
    match device {
        Device::Cuda(cuda) => Array::from_f32(cuda, &values, matrix(shape), cuda_dtype(dtype), LABEL).into(),
        Device::Burn(device) => {
            let data = TensorData::new(values, shape);
            let data = if dtype == DType::F32 { data } else { data.try_cast(dtype).expect("floats cast to floats") };
            BurnTensor::from_data(data, (device, dtype)).into()
        }
    }
}

/// A tensor of `dtype` on `device` from its own bits, little-endian and row-major.
pub fn from_le_bytes<const D: usize>(bytes: &[u8], shape: [usize; D], device: &Device, dtype: DType) -> Tensor<D> {
    match device {
        Device::Cuda(cuda) => Array::from_bytes(cuda, bytes, matrix(shape), cuda_dtype(dtype), LABEL).into(),
        Device::Burn(device) => {
            let data = TensorData::from_bytes_vec(bytes.to_vec(), shape, dtype);
            BurnTensor::from_data(data, (device, dtype)).into()
        }
    }
}

/// A tensor whose values do not matter: in the memory of [`from_le_bytes`] on CUDA, zeros elsewhere.
pub fn unfilled<const D: usize>(shape: [usize; D], device: &Device, dtype: DType) -> Tensor<D> {
    match device {
        Device::Cuda(cuda) => Array::unfilled(cuda, matrix(shape), cuda_dtype(dtype), LABEL).into(),
        Device::Burn(device) => BurnTensor::zeros(shape, (device, dtype)).into(),
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
    }
}

/// Row numbers for `select` and `select_assign`, beside `like` and outside its autodiff graph.
pub(crate) fn indices(rows: impl Iterator<Item = usize>, like: &BurnTensor<2>) -> BurnTensor<1, Int> {
    let rows: Vec<i32> = rows.map(|row| i32::try_from(row).expect("row numbers fit i32")).collect();
    let count = rows.len();
    BurnTensor::from_data(TensorData::new(rows, [count]), (&like.device().inner(), DType::I32))
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
pub(crate) fn cuda_dtype(dtype: DType) -> cuda::DType {
    match dtype {
        DType::BF16 => cuda::DType::Bf16,
        DType::F16 => cuda::DType::F16,
        DType::F32 => cuda::DType::F32,
        other => panic!("activations are f32, f16 or bf16, not {other:?}"),
    }
}

fn burn_dtype(dtype: cuda::DType) -> DType {
    match dtype {
        cuda::DType::Bf16 => DType::BF16,
        cuda::DType::F16 => DType::F16,
        cuda::DType::F32 => DType::F32,
    }
}
