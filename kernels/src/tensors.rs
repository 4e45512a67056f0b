//! Moving `f32` values between the host and tensors.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

/// A tensor of `dtype` on `device` holding `values`, row-major.
pub fn from_f32<const D: usize>(values: Vec<f32>, shape: [usize; D], device: &Device, dtype: DType) -> Tensor<D> {
    let data = TensorData::new(values, shape);
    let data = if dtype == DType::F32 { data } else { data.try_cast(dtype).expect("floats cast to floats") };
    Tensor::from_data(data, (device, dtype))
}

/// The values of `tensor` as `f32`, row-major. Waits for the device.
pub fn to_f32<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data_dtype(DType::F32).try_into_vec::<f32>().expect("cast to f32 just before")
}

/// Row numbers for `select` and `select_assign`, beside `like` and outside its autodiff graph.
pub(crate) fn indices(rows: impl Iterator<Item = usize>, like: &Tensor<2>) -> Tensor<1, Int> {
    let rows: Vec<i32> = rows.map(|row| row as i32).collect();
    let count = rows.len();
    Tensor::from_data(TensorData::new(rows, [count]), (&like.device().inner(), DType::I32))
}
