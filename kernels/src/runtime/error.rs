//! Errors of the CUDA runtime.

use super::MemoryUse;

/// A failure of the CUDA runtime.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// A shared library is not on this machine.
    #[error("{library} was not found (looked {looked}); {}", library.remedy())]
    LibraryMissing {
        /// The missing library.
        library: Library,
        /// Where.
        looked: String,
    },
    /// The driver is older than the functions that are called.
    #[error(
        "the NVIDIA driver supports CUDA {found}, but at least {needed} is needed; update the driver to release 570 \
         or newer"
    )]
    DriverTooOld {
        /// The CUDA version of the driver.
        found: String,
        /// The oldest that will do.
        needed: &'static str,
    },
    /// There is no device of that index.
    #[error("device \"cuda:{index}\" is not on this machine ({found} found); use another index or device \"cpu\"")]
    NoDevice {
        /// The index.
        index: usize,
        /// The number of devices.
        found: usize,
    },
    /// The kernels are not for a card this old.
    #[error(
        "cuda:{index} ({name}) has compute capability {capability}, but the kernels need 7.5 or newer (Turing); use \
         another index or device \"cpu\""
    )]
    CardTooOld {
        /// The index.
        index: usize,
        /// The product's name.
        name: String,
        /// Its compute capability.
        capability: String,
    },
    /// A call of a library failed.
    #[error("{operation}: {call} failed with {code} ({text})")]
    Call {
        /// The operation that was asked for.
        operation: String,
        /// The function of the library.
        call: &'static str,
        /// Its status.
        code: i32,
        /// The status in words.
        text: String,
    },
    /// A kernel did not compile.
    #[error("kernels/cu/{file} does not compile for {arch} with [{options}] under NVRTC {nvrtc}:\n{log}")]
    Compile {
        /// The source file.
        file: String,
        /// The architecture.
        arch: String,
        /// The definitions.
        options: String,
        /// The compiler's version.
        nvrtc: String,
        /// The compiler's output.
        log: String,
    },
    /// A file that is not among the embedded sources, or one that has no version for this device.
    #[error("kernel {entry} of kernels/cu/{file}: {reason}")]
    Kernel {
        /// The source file.
        file: String,
        /// The entry point.
        entry: String,
        /// The problem.
        reason: String,
    },
    /// Memory of the device is used up.
    #[error(
        "out of memory: {usage} needs {}, but only {} of {} is free on the device; this process uses {} ({users}); \
         use a smaller batch, shorter sequences, use_gradient_checkpointing, or end other programs on the device",
        bytes(*asked), bytes(*free), bytes(*total), bytes(*arena)
    )]
    OutOfMemory {
        /// The use of the memory.
        usage: MemoryUse,
        /// Bytes requested.
        asked: usize,
        /// Bytes free.
        free: usize,
        /// Bytes of the device.
        total: usize,
        /// Bytes in use in the arena.
        arena: usize,
        /// The largest users among them, by label.
        users: String,
    },
    /// An operation was called in a way that cannot work.
    #[error("{operation}: {reason}")]
    Usage {
        /// The operation.
        operation: String,
        /// The problem and what to do.
        reason: String,
    },
}

/// The shared libraries that the runtime uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Library {
    /// The driver's `libcuda`.
    Driver,
    /// The run-time compiler `libnvrtc`.
    Nvrtc,
    /// The matrix products of `libcublasLt`.
    CublasLt,
    /// The sums over several devices of `libnccl`.
    Nccl,
}

impl Library {
    /// Those that every run on a CUDA device needs, in this order.
    pub const ALL: [Library; 3] = [Library::Driver, Library::Nvrtc, Library::CublasLt];

    /// Returns how to get the library.
    pub fn remedy(self) -> &'static str {
        match self {
            Library::Driver => "install the NVIDIA driver, or use device \"cpu\"",
            Library::Nvrtc => "`pip install nvidia-cuda-nvrtc` in an active environment or install the CUDA toolkit",
            Library::CublasLt => "`pip install nvidia-cublas` in an active environment or install the CUDA toolkit",
            Library::Nccl => {
                "`pip install nvidia-nccl-cu13` (or nvidia-nccl-cu12 for a driver of CUDA 12) in an active environment, or \
                 install NCCL"
            }
        }
    }
}

impl core::fmt::Display for Library {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Library::Driver => "the NVIDIA driver (libcuda)",
            Library::Nvrtc => "NVRTC (libnvrtc)",
            Library::CublasLt => "cuBLASLt (libcublasLt)",
            Library::Nccl => "NCCL (libnccl)",
        })
    }
}

/// A number of bytes for people, in binary units.
pub(super) fn bytes(n: usize) -> String {
    const UNITS: [&str; 4] = ["B", "KiB", "MiB", "GiB"];
    let unit = (n.max(1).ilog2() as usize / 10).min(UNITS.len() - 1);
    match unit {
        0 => format!("{n} B"),
        _ => format!("{:.1} {}", n as f64 / (1u64 << (10 * unit)) as f64, UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(5 << 30), "5.0 GiB");
        assert_eq!(bytes(5 << 40), "5120.0 GiB");
    }

    #[test]
    fn out_of_memory_says_who_uses_what() {
        let error = CudaError::OutOfMemory {
            usage: MemoryUse::Logits,
            asked: 3 << 30,
            free: 1 << 20,
            total: 80 << 30,
            arena: 79 << 30,
            users: "weights 40.0 GiB, activations 39.0 GiB".into(),
        };
        assert_eq!(
            error.to_string(),
            "out of memory: logits needs 3.0 GiB, but only 1.0 MiB of 80.0 GiB is free on the device; this process uses 79.0 GiB \
             (weights 40.0 GiB, activations 39.0 GiB); use a smaller batch, shorter sequences, \
             use_gradient_checkpointing, or end other programs on the device"
        );
    }
}
