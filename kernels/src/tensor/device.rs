//! The words that name devices, and opening what they name.

use burn::tensor::{DType, Device as BurnDevice};

use super::{MetaDevice, MetaMemory};
use crate::runtime::{self, CUDA_CONTEXT_BYTES, Cuda, CudaError, MemoryStats, MemoryUse, limits};

/// A device that tensors are on and operations run on.
#[derive(Clone, Debug)]
pub enum Device {
    /// The CPU or a GPU through wgpu: a device of Burn.
    Burn(BurnDevice),
    /// An NVIDIA GPU, through kernels and cuBLASLt.
    Cuda(Cuda),
    /// The CPU without values: its memory is counted and nothing is computed.
    Meta(MetaDevice),
}

impl Device {
    /// Returns the CPU.
    pub fn cpu() -> Self {
        Self::Burn(BurnDevice::flex())
    }

    /// A device that counts the memory that the CPU would take.
    pub fn meta() -> Self {
        Self::Meta(MetaDevice::default())
    }

    /// Returns whether this is the CPU, or stands for it.
    pub fn is_cpu(&self) -> bool {
        match self {
            Self::Burn(device) => *device == BurnDevice::flex(),
            Self::Cuda(_) => false,
            Self::Meta(_) => true,
        }
    }

    /// `cpu`, `cuda` or `wgpu`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Cuda(_) => "cuda",
            Self::Burn(_) if self.is_cpu() => "cpu",
            Self::Burn(_) => "wgpu",
            Self::Meta(_) => "cpu",
        }
    }

    /// Returns whether activations can have this dtype.
    pub fn supports_dtype(&self, dtype: DType) -> bool {
        match self {
            Self::Burn(device) => device.supports_dtype(dtype),
            Self::Cuda(cuda) => match dtype {
                DType::F32 | DType::F16 => true,
                DType::BF16 => cuda.props().major >= 8,
                _ => false,
            },
            Self::Meta(_) => Self::cpu().supports_dtype(dtype),
        }
    }

    /// Returns whether memory is counted and nothing is computed ([`Cuda::planned`], [`Device::Meta`]).
    pub fn is_planned(&self) -> bool {
        match self {
            Self::Burn(_) => false,
            Self::Cuda(cuda) => cuda.is_planned(),
            Self::Meta(_) => true,
        }
    }

    /// Returns a device that counts the memory of computations as they would run on this one, and computes nothing.
    #[must_use]
    pub fn planned(&self) -> Self {
        match self {
            Self::Burn(_) | Self::Meta(_) => Self::meta(),
            Self::Cuda(cuda) => Self::Cuda(Cuda::planned(cuda.props().clone())),
        }
    }

    /// Returns how much of the memory that this device counts is in use, and for what. A device of Burn counts none.
    pub fn memory_stats(&self) -> MemoryStats {
        match self {
            Self::Burn(_) => MemoryStats::default(),
            Self::Cuda(cuda) => cuda.memory(),
            Self::Meta(device) => device.memory(),
        }
    }

    /// Begins a new measurement of the most that is in use, after giving back what nothing uses.
    pub fn reset_memory_stats(&self) {
        match self {
            Self::Burn(_) => {}
            Self::Cuda(cuda) => {
                cuda.trim();
                cuda.reset_high_water();
            }
            Self::Meta(device) => device.reset_high_water(),
        }
    }

    /// Returns the bytes that were in use when the first tensor for `usage` came, since the last reset.
    pub fn in_use_before(&self, usage: MemoryUse) -> Option<usize> {
        match self {
            Self::Burn(_) => None,
            Self::Cuda(cuda) => cuda.in_use_before(usage),
            Self::Meta(device) => device.in_use_before(usage),
        }
    }

    /// Returns the bytes of host memory that activations and optimizer states of a GPU are in.
    pub fn pinned_bytes(&self) -> usize {
        match self {
            Self::Burn(_) | Self::Meta(_) => 0,
            Self::Cuda(cuda) => cuda.pinned_bytes(),
        }
    }

    /// Returns the bytes that a process takes of the device beside its tensors.
    pub fn context_bytes(&self) -> usize {
        match self {
            Self::Burn(_) | Self::Meta(_) => 0,
            Self::Cuda(_) => CUDA_CONTEXT_BYTES,
        }
    }

    /// Counts memory that is no tensor's, on a device that only counts, until the result is dropped.
    pub fn charge(&self, usage: MemoryUse, bytes: usize) -> Option<MetaMemory> {
        match self {
            Self::Burn(_) | Self::Cuda(_) => None,
            Self::Meta(device) => Some(device.charge(usage, bytes)),
        }
    }

    /// Returns what operations on this device can take.
    pub fn limits(&self) -> DeviceLimits {
        match self {
            Self::Burn(_) | Self::Meta(_) => DeviceLimits { trains_in_place: self.is_cpu(), ..DeviceLimits::NONE },
            Self::Cuda(_) => DeviceLimits::CUDA,
        }
    }

    /// The first error of a CUDA device, which stays; a device of Burn reports its own where they happen.
    ///
    /// Operations on CUDA do not return errors: after the first one nothing more runs, and what is read back is NaN.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub fn check(&self) -> Result<(), DeviceError> {
        match self {
            Self::Burn(_) | Self::Meta(_) => Ok(()),
            Self::Cuda(cuda) => cuda.check().map_err(DeviceError::from),
        }
    }

    /// Waits for everything queued so far.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        match self {
            Self::Burn(_) | Self::Meta(_) => Ok(()),
            Self::Cuda(cuda) => cuda.synchronize().map_err(DeviceError::from),
        }
    }
}

/// Sizes that operations can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceLimits {
    /// The widest row that RMSNorm takes, if there is a limit.
    pub max_hidden_size: Option<usize>,
    /// The most channels of an attention head, if there is a limit.
    pub max_head_dim: Option<usize>,
    /// Channels of an attention head are a multiple of this.
    pub head_dim_multiple: usize,
    /// True if weights can be trained in place, without an f32 copy.
    pub trains_in_place: bool,
    /// Columns of a weight that is trained in place are a multiple of this.
    pub in_place_cols_multiple: usize,
}

impl DeviceLimits {
    const NONE: Self = Self {
        max_hidden_size: None,
        max_head_dim: None,
        head_dim_multiple: 1,
        trains_in_place: true,
        in_place_cols_multiple: 1,
    };

    const CUDA: Self = Self {
        max_hidden_size: Some(limits::MAX_NORM_WIDTH),
        max_head_dim: Some(limits::MAX_HEAD_DIM),
        head_dim_multiple: limits::HEAD_DIM_MULTIPLE,
        trains_in_place: true,
        in_place_cols_multiple: limits::ROW_MULTIPLE,
    };

    /// Returns whether attention takes heads of this many channels.
    pub fn takes_head_dim(&self, head_dim: usize) -> bool {
        head_dim.is_multiple_of(self.head_dim_multiple) && self.max_head_dim.is_none_or(|most| head_dim <= most)
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
    /// Returns the CPU.
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
    #[error("device \"{0}\" is unknown; use one of auto, cpu, cuda, cuda:N, wgpu, wgpu:N")]
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
        /// The requested device.
        name: String,
        /// Number of devices of the kind.
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
/// `auto` is the first NVIDIA GPU of compute capability 7.5 or newer, and the CPU where there is none. wgpu is taken by
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
            let Some(index) = runtime::first().map_err(unusable)? else { return open(DeviceKind::Cpu) };
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
