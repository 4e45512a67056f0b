//! A report on the CUDA installation of this machine.

use std::path::PathBuf;

use super::{DeviceProps, Library, context, find, nccl, nvrtc};

/// The state of the machine.
#[derive(Clone, Debug)]
pub struct Report {
    /// One entry for each of [`Library::ALL`].
    pub libraries: Vec<Finding>,
    /// NCCL, which only runs on several devices need.
    pub nccl: Finding,
    /// The headers that Burn's own kernels need, unlike ours: their directory, or what to do.
    pub headers: Result<PathBuf, String>,
    /// The devices that the driver lists.
    pub devices: Vec<DeviceProps>,
}

/// One library.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The library.
    pub library: Library,
    /// Its version and file, or what is missing and how to get it.
    pub state: Result<(String, Option<PathBuf>), String>,
}

/// Looks for every library and device.
pub fn report() -> Report {
    let finding = |library| Finding { library, state: state(library) };
    let (libraries, nccl) = (Library::ALL.map(finding).to_vec(), finding(Library::Nccl));
    let devices = (0..context::count()).filter_map(|index| context::device_props(index).ok()).collect();
    Report { libraries, nccl, headers: find::headers(), devices }
}

impl Report {
    /// Returns true if the kernels can run.
    pub fn is_complete(&self) -> bool {
        self.libraries.iter().all(|finding| finding.state.is_ok()) && !self.devices.is_empty()
    }
}

impl core::fmt::Display for Report {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        for finding in self.libraries.iter().chain([&self.nccl]) {
            match &finding.state {
                Ok((version, Some(path))) => writeln!(f, "{}: {version}, {}", finding.library, path.display())?,
                Ok((version, None)) => writeln!(f, "{}: {version}", finding.library)?,
                Err(missing) => writeln!(f, "{missing}")?,
            }
        }
        match &self.headers {
            Ok(directory) => writeln!(f, "headers for Burn's own kernels: {}", directory.display())?,
            Err(missing) => writeln!(f, "{missing}")?,
        }
        for (index, device) in self.devices.iter().enumerate() {
            writeln!(f, "cuda:{index}: {device}")?;
        }
        if self.devices.is_empty() {
            writeln!(f, "no CUDA device; device \"cpu\" works everywhere")?;
        }
        Ok(())
    }
}

fn state(library: Library) -> Result<(String, Option<PathBuf>), String> {
    find::ensure(library).map_err(|error| error.to_string())?;
    let version = match library {
        Library::Driver => {
            let version = context::driver_version().map_err(|error| error.to_string())?;
            format!("CUDA {}.{}", version / 1000, version % 1000 / 10)
        }
        Library::Nvrtc => {
            let (major, minor) = nvrtc::version().map_err(|error| error.to_string())?;
            format!("{major}.{minor}")
        }
        Library::CublasLt => {
            // SAFETY: no arguments; the library was found above.
            let version = unsafe { cudarc::cublaslt::sys::cublasLtGetVersion() };
            format!("{}.{}.{}", version / 10000, version / 100 % 100, version % 100)
        }
        Library::Nccl => nccl::nccl_version().map_err(|error| error.to_string())?,
    };
    Ok((version, find::loaded_from(library)))
}
