//! The words that name devices, and opening what they name.

use burn::tensor::{DType, Device as BurnDevice};

use crate::cuda::{self, Cuda, CudaError};

/// Where tensors lie and operations run.
#[derive(Clone, Debug)]
pub enum Device {
    /// The CPU or a GPU through wgpu: a device of Burn.
    Burn(BurnDevice),
    /// An NVIDIA GPU, through kernels and cuBLASLt.
    Cuda(Cuda),
}

impl Device {
    /// The CPU.
    pub fn cpu() -> Self {
        Self::Burn(BurnDevice::flex())
    }

    /// Whether this is the CPU.
    pub fn is_cpu(&self) -> bool {
        matches!(self, Self::Burn(device) if *device == BurnDevice::flex())
    }

    /// `cpu`, `cuda` or `wgpu`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Cuda(_) => "cuda",
            Self::Burn(_) if self.is_cpu() => "cpu",
            Self::Burn(_) => "wgpu",
        }
    }

    /// Whether activations can have this dtype.
    pub fn supports_dtype(&self, dtype: DType) -> bool {
        match self {
            Self::Burn(device) => device.supports_dtype(dtype),
            Self::Cuda(_) => matches!(dtype, DType::F32 | DType::F16 | DType::BF16),
        }
    }

    /// Whether nothing is computed, and only memory accounted for ([`Cuda::planned`]).
    pub fn is_planned(&self) -> bool {
        matches!(self, Self::Cuda(cuda) if cuda.is_planned())
    }

    /// The first error of a CUDA device, which stays; a device of Burn reports its own where they happen.
    ///
    /// Operations on CUDA do not return errors: after the first one nothing more runs, and what is read back is NaN.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub fn check(&self) -> Result<(), DeviceError> {
        match self {
            Self::Burn(_) => Ok(()),
            Self::Cuda(cuda) => cuda.check().map_err(DeviceError::from),
        }
    }

    /// Waits for everything queued so far.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        match self {
            Self::Burn(_) => Ok(()),
            Self::Cuda(cuda) => cuda.synchronize().map_err(DeviceError::from),
        }
    }
}

impl From<BurnDevice> for Device {
    fn from(device: BurnDevice) -> Self {
        Self::Burn(device)
    }
}

/// A device's name: `auto`, `cpu`, `cuda[:N]`, `wgpu[:N]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// The first NVIDIA GPU that the kernels are for, and the CPU where there is none.
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU by index.
    Cuda(usize),
    /// A GPU through wgpu; without an index, the one that wgpu prefers.
    Wgpu(Option<usize>),
}

impl core::fmt::Display for DeviceKind {
    /// The word that [`parse`] reads.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
            Self::Wgpu(None) => f.write_str("wgpu"),
            Self::Wgpu(Some(index)) => write!(f, "wgpu:{index}"),
        }
    }
}

/// A device that cannot be named or opened.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DeviceError {
    /// Not one of the words.
    #[error("device \"{0}\" is unknown; it is one of auto, cpu, cuda, cuda:N, wgpu, wgpu:N")]
    Unknown(String),
    /// This binary was built without the backend.
    #[error("device \"{0}\" is not in this build; build with `--features {0}` or use device \"cpu\"")]
    NotBuilt(&'static str),
    /// The CUDA runtime refuses, or an operation on the device failed.
    #[error("{0}")]
    Cuda(Box<CudaError>),
    /// `auto` found an NVIDIA GPU that cannot be used.
    #[error("device \"auto\" found an NVIDIA driver or GPU that cannot be used: {0}; or use device \"cpu\"")]
    Auto(Box<CudaError>),
    /// The backend is there, the device is not.
    #[error("device \"{name}\" is not on this machine ({found} found); use device \"cpu\" or another index")]
    Absent {
        /// What was asked for.
        name: String,
        /// How many devices of the kind there are.
        found: usize,
    },
}

impl From<CudaError> for DeviceError {
    fn from(error: CudaError) -> Self {
        Self::Cuda(Box::new(error))
    }
}

/// Reads a device's name.
///
/// # Errors
/// [`DeviceError::Unknown`] for anything but the words of [`DeviceKind`].
pub fn parse(name: &str) -> Result<DeviceKind, DeviceError> {
    let unknown = || DeviceError::Unknown(name.to_owned());
    let (word, index) = match name.split_once(':') {
        Some((word, index)) => (word, Some(index.parse::<usize>().map_err(|_| unknown())?)),
        None => (name, None),
    };
    match (word, index) {
        ("auto", None) => Ok(DeviceKind::Auto),
        ("cpu", None) => Ok(DeviceKind::Cpu),
        ("cuda", index) => Ok(DeviceKind::Cuda(index.unwrap_or(0))),
        ("wgpu", index) => Ok(DeviceKind::Wgpu(index)),
        _ => Err(unknown()),
    }
}

/// Opens a device; also says which kind it is, never [`DeviceKind::Auto`].
///
/// `auto` is the first NVIDIA GPU of compute capability 8.0 or newer, and the CPU where there is none. wgpu is taken by
/// name: it also lists software renderers that are slower than the CPU's own path.
///
/// # Errors
/// [`DeviceError::NotBuilt`] when the backend's feature is off, [`DeviceError::Absent`], [`DeviceError::Cuda`] and
/// [`DeviceError::Auto`] when the machine has no such device or cannot use it: a GPU that is there is not passed over
/// in silence.
pub fn open(kind: DeviceKind) -> Result<(Device, DeviceKind), DeviceError> {
    let device = match kind {
        DeviceKind::Auto => {
            let unusable = |error| DeviceError::Auto(Box::new(error));
            let Some(index) = cuda::first().map_err(unusable)? else { return open(DeviceKind::Cpu) };
            let cuda = Cuda::open(index).map_err(unusable)?;
            return Ok((Device::Cuda(cuda), DeviceKind::Cuda(index)));
        }
        DeviceKind::Cpu => Device::cpu(),
        DeviceKind::Cuda(index) => Device::Cuda(Cuda::open(index)?),
        DeviceKind::Wgpu(index) => Device::Burn(wgpu(index)?),
    };
    Ok((device, kind))
}

#[cfg(feature = "wgpu")]
fn wgpu(index: Option<usize>) -> Result<BurnDevice, DeviceError> {
    use burn::tensor::{DeviceKind, DeviceType};
    let found = BurnDevice::enumerate(DeviceType::Wgpu).into_vec();
    match index {
        None if !found.is_empty() => Ok(BurnDevice::wgpu(DeviceKind::DefaultDevice)),
        Some(index) if index < found.len() => Ok(found[index].clone()),
        _ => Err(DeviceError::Absent {
            name: index.map_or_else(|| "wgpu".to_owned(), |i| format!("wgpu:{i}")),
            found: found.len(),
        }),
    }
}

#[cfg(not(feature = "wgpu"))]
fn wgpu(_: Option<usize>) -> Result<BurnDevice, DeviceError> {
    Err(DeviceError::NotBuilt("wgpu"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words() {
        assert_eq!(parse("cuda:3"), Ok(DeviceKind::Cuda(3)));
        assert_eq!(parse("wgpu"), Ok(DeviceKind::Wgpu(None)));
        for word in ["auto", "cpu", "cuda:1", "wgpu", "wgpu:2"] {
            assert_eq!(parse(word).map(|kind| kind.to_string()), Ok(word.to_owned()));
        }
        for bad in ["gpu", "cuda:x", "cpu:0", "", "auto:1"] {
            assert_eq!(parse(bad), Err(DeviceError::Unknown(bad.to_owned())));
        }
    }
}
