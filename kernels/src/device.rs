//! The words that name devices, and opening what they name.

use burn::tensor::Device;

/// A device by name: `auto`, `cpu`, `cuda[:N]`, `wgpu[:N]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// CUDA where this build and this machine have it, else the CPU.
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
    /// The backend is there, the device is not.
    #[error("device \"{name}\" is not on this machine ({found} found); use device \"cpu\" or another index")]
    Absent {
        /// What was asked for.
        name: String,
        /// How many devices of the kind there are.
        found: usize,
    },
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
/// `auto` is the first CUDA device, else the CPU: wgpu also lists software renderers, which are slower than the
/// CPU's own path, so it is only taken by name.
///
/// # Errors
/// [`DeviceError::NotBuilt`] when the backend's feature is off, [`DeviceError::Absent`] when the machine
/// has no such device.
pub fn open(kind: DeviceKind) -> Result<(Device, DeviceKind), DeviceError> {
    let device = match kind {
        DeviceKind::Auto => return open(DeviceKind::Cuda(0)).or_else(|_| open(DeviceKind::Cpu)),
        DeviceKind::Cpu => Device::flex(),
        DeviceKind::Cuda(index) => cuda(index)?,
        DeviceKind::Wgpu(index) => wgpu(index)?,
    };
    Ok((device, kind))
}

#[cfg(feature = "cuda")]
fn cuda(index: usize) -> Result<Device, DeviceError> {
    let found = Device::enumerate(burn::tensor::DeviceType::Cuda).into_vec().len();
    if index < found {
        Ok(Device::cuda(index))
    } else {
        Err(DeviceError::Absent { name: format!("cuda:{index}"), found })
    }
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: usize) -> Result<Device, DeviceError> {
    Err(DeviceError::NotBuilt("cuda"))
}

#[cfg(feature = "wgpu")]
fn wgpu(index: Option<usize>) -> Result<Device, DeviceError> {
    use burn::tensor::{DeviceKind, DeviceType};
    let found = Device::enumerate(DeviceType::Wgpu).into_vec();
    match index {
        None if !found.is_empty() => Ok(Device::wgpu(DeviceKind::DefaultDevice)),
        Some(index) if index < found.len() => Ok(found[index].clone()),
        _ => Err(DeviceError::Absent {
            name: index.map_or_else(|| "wgpu".to_owned(), |i| format!("wgpu:{i}")),
            found: found.len(),
        }),
    }
}

#[cfg(not(feature = "wgpu"))]
fn wgpu(_: Option<usize>) -> Result<Device, DeviceError> {
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
