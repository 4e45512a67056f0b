//! Compiles every embedded kernel without a device, for machines that have none.

use core::num::NonZero;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use super::driver::lock;
use super::kernels::definitions;
use super::{Arch, CudaError, Library, SOURCES, Usage, find, nvrtc};

/// One file compiled for one architecture with one set of definitions.
#[derive(Clone, Debug)]
pub struct Checked {
    /// The file.
    pub file: &'static str,
    /// The architecture.
    pub arch: Arch,
    /// The definitions, `NAME=VALUE`.
    pub defines: Vec<String>,
    /// What each entry point uses, or why there is none.
    pub result: Result<Vec<Usage>, CudaError>,
    /// What the compiler said besides, such as warnings.
    pub warnings: Vec<String>,
    /// How long it took.
    pub time: Duration,
}

/// Compiles every file of [`SOURCES`] in each of its variants for those of `archs` that it is for. The results are in
/// the order of the table.
///
/// # Errors
/// [`CudaError::LibraryMissing`] without NVRTC. What does not compile is in the results.
pub fn compile_check(archs: &[Arch]) -> Result<Vec<Checked>, CudaError> {
    find::ensure(Library::Nvrtc)?;
    let mut jobs = Vec::new();
    for source in SOURCES {
        for &arch in archs {
            jobs.extend((source.variants)(arch).iter().map(|variant| (source, arch, definitions(variant))));
        }
    }
    let results = Mutex::new(Vec::with_capacity(jobs.len()));
    let next = AtomicUsize::new(0);
    let work = || {
        while let (index, Some((source, arch, defines))) = {
            let i = next.fetch_add(1, Relaxed);
            (i, jobs.get(i))
        } {
            let start = Instant::now();
            let image = nvrtc::compile(source.file, &source.text(), *arch, defines);
            let time = start.elapsed();
            let log = image.as_ref().map_or("", |image| &image.log);
            let warnings = log.lines().filter(|line| line.contains("arning")).map(str::to_owned).collect();
            let result = image.as_ref().map(|image| nvrtc::usages(&image.log)).map_err(Clone::clone);
            let checked = Checked { file: source.file, arch: *arch, defines: defines.clone(), result, warnings, time };
            lock(&results).push((index, checked));
        }
    };
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(jobs.len());
    thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    let mut results = results.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    results.sort_by_key(|(index, _)| *index);
    Ok(results.into_iter().map(|(_, checked)| checked).collect())
}
