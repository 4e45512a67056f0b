//! The dtype that a user requests, and its conversions to compute and storage dtypes.

use rekindle_kernels::{DType, Device, DeviceKind};
use serde::{Deserialize, Serialize};

use crate::Error;

/// A requested dtype of frozen weights and activations, or of a written checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// f32 on the CPU and wgpu; on CUDA bf16, or f16 where the GPU has no bf16. For a written checkpoint: the dtype of each
    /// tensor.
    #[default]
    Auto,
    /// bfloat16.
    #[serde(alias = "bfloat16")]
    Bf16,
    /// IEEE half precision.
    #[serde(alias = "float16")]
    F16,
    /// Single precision.
    #[serde(alias = "float32")]
    F32,
}

impl Dtype {
    /// Returns the compute dtype on `device`.
    pub(crate) fn resolve(self, device: &Device, kind: DeviceKind) -> Result<DType, Error> {
        let dtype = match self {
            Self::Auto if matches!(kind, DeviceKind::Cuda(_)) && device.supports_dtype(DType::BF16) => DType::BF16,
            Self::Auto if matches!(kind, DeviceKind::Cuda(_)) => DType::F16,
            Self::Auto | Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        };
        if !device.supports_dtype(dtype) {
            let other = if device.supports_dtype(DType::F16) { "f16" } else { "f32" };
            return Err(Error::Argument(format!(
                "dtype {dtype:?} is not supported by device \"{kind}\"; use dtype \"{other}\""
            )));
        }
        Ok(dtype)
    }

    /// Returns the dtype on disk, or `None` for that of each tensor.
    pub(crate) fn stored(self) -> Option<rekindle_hub::Dtype> {
        match self {
            Self::Auto => None,
            Self::F32 => Some(rekindle_hub::Dtype::F32),
            Self::Bf16 => Some(rekindle_hub::Dtype::BF16),
            Self::F16 => Some(rekindle_hub::Dtype::F16),
        }
    }
}

impl From<DType> for Dtype {
    fn from(compute: DType) -> Self {
        match compute {
            DType::BF16 => Self::Bf16,
            DType::F16 => Self::F16,
            _ => Self::F32,
        }
    }
}
