//! `rekindle doctor`.

use std::fmt::Display;
use std::fs;
use std::path::Path;
use std::thread::available_parallelism;

use rekindle::{CudaReport, counted};

use crate::failure::Failure;
use crate::output;

pub(crate) fn run() -> Result<(), Failure> {
    let report = rekindle::cuda_report();
    let has_gpu = !report.devices.is_empty() || has_nvidia_gpu(Path::new("/sys/bus/pci/devices"));
    let threads = available_parallelism().map_or(1, usize::from);
    output::line(&row("CPU", counted(threads, "thread")))?;
    for line in gpu_lines(&report, has_gpu) {
        output::line(&line)?;
    }
    match verdict(&report, has_gpu) {
        Ok(ready) => output::line(&row("Verdict", ready)),
        Err(problem) => Err(Failure::Missing(problem)),
    }
}

/// Returns a line with a name and a value.
fn row(name: &str, value: impl Display) -> String {
    format!("{name:<9}{value}")
}

/// Describes the GPUs and the libraries for them. Without a GPU, the libraries do not matter.
fn gpu_lines(report: &CudaReport, has_gpu: bool) -> Vec<String> {
    if !has_gpu {
        return vec![row("GPU", "none from NVIDIA")];
    }
    let mut lines: Vec<String> =
        report.devices.iter().enumerate().map(|(index, device)| row(&format!("cuda:{index}"), device)).collect();
    if lines.is_empty() {
        lines.push(row("GPU", "one from NVIDIA is installed, but no driver lists it"));
    }
    for finding in &report.libraries {
        match &finding.state {
            Ok((version, Some(path))) => lines.push(format!("{}: {version}, {}", finding.library, path.display())),
            Ok((version, None)) => lines.push(format!("{}: {version}", finding.library)),
            Err(missing) => lines.push(format!("missing: {missing}")),
        }
    }
    lines.push(match &report.nccl.state {
        Ok((version, Some(path))) => format!("{}: {version}, {}", report.nccl.library, path.display()),
        Ok((version, None)) => format!("{}: {version}", report.nccl.library),
        Err(missing) => format!("for several GPUs: {missing}"),
    });
    lines
}

/// Returns the device that runs use by default, or the problem with the GPU.
fn verdict(report: &CudaReport, has_gpu: bool) -> Result<String, String> {
    if report.is_complete() {
        return Ok("ready: runs use cuda:0".to_owned());
    }
    if !has_gpu {
        return Ok("ready: runs use the CPU".to_owned());
    }
    let missing = report.libraries.iter().filter(|finding| finding.state.is_err());
    let missing: Vec<String> = missing.map(|finding| finding.library.to_string()).collect();
    Err(match missing.is_empty() {
        true => "the driver lists no GPU; check `nvidia-smi`; device \"cpu\" can be used".to_owned(),
        false => format!(
            "the GPU cannot be used without {}; install what is listed as missing; device \"cpu\" can be used",
            missing.join(" and ")
        ),
    })
}

/// Returns true if the bus lists a display controller of NVIDIA.
fn has_nvidia_gpu(devices: &Path) -> bool {
    fs::read_dir(devices).into_iter().flatten().flatten().any(|device| {
        let read = |name: &str| fs::read_to_string(device.path().join(name)).unwrap_or_default();
        read("vendor").trim() == "0x10de" && read("class").starts_with("0x03")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_without_a_driver_is_noticed() {
        let scratch = tempfile::tempdir().unwrap();
        let device = |name: &str, vendor: &str, class: &str| {
            let dir = scratch.path().join(name);
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join("vendor"), vendor).unwrap();
            fs::write(dir.join("class"), class).unwrap();
        };
        device("audio", "0x10de\n", "0x040300\n");
        device("display", "0x8086\n", "0x030000\n");
        assert!(!has_nvidia_gpu(scratch.path()) && !has_nvidia_gpu(Path::new("/no/such/bus")));
        device("gpu", "0x10de\n", "0x030200\n");
        assert!(has_nvidia_gpu(scratch.path()));
    }

    #[test]
    fn the_verdict_follows_from_what_is_there() {
        let nccl = rekindle::cuda_report().nccl;
        let none = CudaReport { libraries: Vec::new(), nccl, headers: Err(String::new()), devices: Vec::new() };
        assert_eq!(verdict(&none, false), Ok("ready: runs use the CPU".to_owned()));
        assert_eq!(gpu_lines(&none, false), ["GPU      none from NVIDIA"]);
        assert!(verdict(&none, true).unwrap_err().contains("nvidia-smi"));
        let found = rekindle::cuda_report();
        if found.libraries.iter().any(|finding| finding.state.is_err()) {
            let problem = verdict(&found, true).unwrap_err();
            assert!(problem.starts_with("the GPU cannot be used without "), "{problem}");
            assert!(gpu_lines(&found, true).iter().any(|line| line.starts_with("missing: ")));
        }
        if found.nccl.state.is_err() {
            let last = gpu_lines(&found, true).pop().unwrap();
            assert!(last.starts_with("for several GPUs: NCCL (libnccl) was not found"), "{last}");
        }
    }
}
