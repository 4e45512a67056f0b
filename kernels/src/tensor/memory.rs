//! Memory that a device has in use.

use burn::tensor::Device as BurnDevice;

use crate::Device;

/// Bytes in use and the most that were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Now.
    pub in_use: u64,
    /// The most so far.
    pub peak: u64,
}

impl Device {
    /// Returns the memory in use: on CUDA the buffers of the arena, on the CPU the resident memory of the process as Linux
    /// reports it. `None` on wgpu, and on the CPU of other systems.
    pub fn memory(&self) -> Option<DeviceMemory> {
        match self {
            Self::Cuda(cuda) => {
                let memory = cuda.memory();
                Some(DeviceMemory { in_use: memory.in_use as u64, peak: memory.high_water as u64 })
            }
            Self::Meta(device) => {
                let memory = device.memory();
                Some(DeviceMemory { in_use: memory.in_use as u64, peak: memory.high_water as u64 })
            }
            Self::Burn(device) if *device == BurnDevice::flex() => {
                resident(&std::fs::read_to_string("/proc/self/status").ok()?)
            }
            Self::Burn(_) => None,
        }
    }

    /// Bytes that are free: of a CUDA device as its driver counts them, of the host where the CPU computes. `None` where
    /// nobody tells.
    pub fn free_memory(&self) -> Option<usize> {
        match self {
            Self::Cuda(cuda) => Some(cuda.device_memory().0),
            Self::Meta(_) => Self::cpu().free_memory(),
            Self::Burn(device) if *device == BurnDevice::flex() => {
                available(&std::fs::read_to_string("/proc/meminfo").ok()?)
            }
            Self::Burn(_) => None,
        }
    }
}

/// Reads the memory that is available without swapping from a `/proc/meminfo`.
fn available(meminfo: &str) -> Option<usize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok().map(|kib| kib << 10)
}

/// The resident sizes in a `/proc/PID/status`.
fn resident(status: &str) -> Option<DeviceMemory> {
    let bytes = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        Some(1024 * line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?)
    };
    Some(DeviceMemory { in_use: bytes("VmRSS")?, peak: bytes("VmHWM")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_the_kernels_account() {
        let status = "Name:\trekindle\nVmPeak:\t  900 kB\nVmHWM:\t  300 kB\nVmRSS:\t  200 kB\nThreads:\t2\n";
        assert_eq!(resident(status), Some(DeviceMemory { in_use: 204_800, peak: 307_200 }));
        assert_eq!(resident("Name:\trekindle\n"), None);
        assert_eq!(available("MemTotal:  9 kB\nMemAvailable:    5 kB\n"), Some(5120));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_is_allocated_is_counted() {
        let before = Device::cpu().memory().expect("Linux counts");
        let held = vec![1u8; 64 << 20];
        let after = Device::cpu().memory().expect("Linux counts");
        // Other tests of this process may give memory back meanwhile, but never out of the peak.
        assert!(after.peak >= before.peak.max(held.len() as u64) && after.peak >= after.in_use, "{before:?} {after:?}");
    }
}
