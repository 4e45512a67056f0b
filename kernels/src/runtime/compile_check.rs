//! Compiles every embedded kernel without a device, for machines that have none.

use core::num::NonZero;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use super::driver::lock;
use super::kernels::definitions;
use super::{Arch, CudaError, Library, SOURCES, Source, Usage, find, nvrtc};

/// One file compiled for one architecture with one set of definitions.
#[derive(Clone, Debug)]
pub struct Checked {
    /// The file.
    pub file: &'static str,
    /// The architecture.
    pub arch: Arch,
    /// The definitions, `NAME=VALUE`.
    pub defines: Vec<String>,
    /// Entry points that the host names and the file lacks, or the file has and the host does not name.
    pub unmatched: Vec<String>,
    /// Resources of each entry point, or the compiler's error.
    pub result: Result<Vec<Usage>, CudaError>,
    /// Warnings of the compiler.
    pub warnings: Vec<String>,
    /// Time it took.
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
            let unmatched = result.as_ref().map_or_else(|_| Vec::new(), |usages| unmatched(source, usages));
            let checked =
                Checked { unmatched, file: source.file, arch: *arch, defines: defines.clone(), result, warnings, time };
            lock(&results).push((index, checked));
        }
    };
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(jobs.len());
    thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    let mut results = results.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    results.sort_by_key(|(index, _)| *index);
    Ok(results.into_iter().map(|(_, checked)| checked).collect())
}

/// Entry points that are either listed or compiled, but not both.
fn unmatched(source: &Source, usages: &[Usage]) -> Vec<String> {
    let compiled = |name: &&&str| usages.iter().any(|usage| usage.entry == **name);
    let missing = source.entries.iter().filter(|name| !compiled(name));
    let missing = missing.map(|name| format!("{name} is listed in sources.rs but not defined in the file"));
    let unnamed = usages.iter().filter(|usage| !source.entries.contains(&usage.entry.as_str()));
    missing.chain(unnamed.map(|usage| format!("{} is not listed in sources.rs", usage.entry))).collect()
}
