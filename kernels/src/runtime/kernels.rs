//! Loads kernels from the embedded sources: compiled once per machine, loaded once per process.

use core::num::NonZero;
use std::collections::HashMap;
use std::ffi::CString;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;

use cudarc::driver::sys;

use super::cache;
use super::driver::{Handle, driver, lock};
use super::launch::Function;
use super::{Arch, Cuda, CudaError, Entry, Kernel, Source, nvrtc};

/// A file of [`super::SOURCES`] and the definitions to compile it with, `("HEAD_DIM", "128")`.
pub type KernelSpec<'a> = (&'a str, &'a [(&'a str, &'a str)]);

/// Loaded modules and functions, by the hash of their file, entry and definitions.
#[derive(Default)]
pub(super) struct Kernels {
    modules: Mutex<HashMap<u128, Handle<sys::CUmodule>>>,
    functions: Mutex<HashMap<u128, Arc<Function>>>,
}

impl Cuda {
    /// Returns a kernel by its entry point and the definitions that its file is compiled with.
    ///
    /// The first call for a file and definitions compiles them, or reads what an earlier process compiled; later calls
    /// take a fraction of a microsecond. When there is no such kernel, the error sticks and the kernel does nothing.
    pub fn kernel(&self, entry: Entry, defines: &[(&str, &str)]) -> Kernel {
        if self.is_planned() {
            return Kernel::new(self, None);
        }
        let Entry { file, name } = entry;
        let key = key(file, name, defines);
        let known = lock(&self.0.kernels.functions).get(&key).cloned();
        let function = known.or_else(|| {
            let function = (!self.has_failed()).then(|| self.function(file, name, defines))?;
            let function = function.map(Arc::new).map_err(|error| self.fail(error)).ok()?;
            lock(&self.0.kernels.functions).insert(key, Arc::clone(&function));
            Some(function)
        });
        Kernel::new(self, function)
    }

    /// Compiles and loads several files at once, on as many threads as there are processors.
    pub fn prepare(&self, specs: &[KernelSpec<'_>]) {
        if self.is_planned() {
            return;
        }
        let next = AtomicUsize::new(0);
        let work = || {
            while let Some((file, defines)) = specs.get(next.fetch_add(1, Relaxed))
                && !self.has_failed()
            {
                if let Err(error) = self.module(file, "", defines) {
                    self.fail(error);
                }
            }
        };
        let threads = thread::available_parallelism().map_or(1, NonZero::get).min(specs.len());
        thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    }

    fn function(&self, file: &str, entry: &str, defines: &[(&str, &str)]) -> Result<Function, CudaError> {
        let module = self.module(file, entry, defines)?;
        let refused =
            |reason: &str| CudaError::Kernel { file: file.into(), entry: entry.into(), reason: reason.into() };
        let name = CString::new(entry).map_err(|_| refused("the name has a zero byte"))?;
        let mut function = core::ptr::null_mut();
        let found = self.bind().and_then(|()| driver!(cuModuleGetFunction(&mut function, module.0, name.as_ptr())));
        found.map_err(|_| refused("the file has no such entry point"))?;
        Function::new(entry, function).map_err(|failed| failed.during(entry))
    }

    fn module(&self, file: &str, entry: &str, defines: &[(&str, &str)]) -> Result<Handle<sys::CUmodule>, CudaError> {
        let key = key(file, "", defines);
        if let Some(&module) = lock(&self.0.kernels.modules).get(&key) {
            return Ok(module);
        }
        let arch = Arch::new(self.0.props.major, self.0.props.minor);
        let refused = |reason: String| CudaError::Kernel { file: file.into(), entry: entry.into(), reason };
        let source = Source::named(file).ok_or_else(|| refused("the file is not among the embedded sources".into()))?;
        if (source.variants)(arch).is_empty() {
            return Err(refused(format!("the file has no version for this device, {arch}")));
        }
        let code = compiled(source, arch, &definitions(defines))?;
        let mut module = core::ptr::null_mut();
        self.bind()
            .and_then(|()| driver!(cuModuleLoadData(&mut module, code.as_ptr().cast())))
            .map_err(|failed| failed.during(format!("loading kernels/cu/{file}")))?;
        let mut modules = lock(&self.0.kernels.modules);
        // Two threads may have loaded the same file; both modules work, and one is enough.
        if let Some(&first) = modules.get(&key) {
            let _ = driver!(cuModuleUnload(module));
            return Ok(first);
        }
        modules.insert(key, Handle(module));
        Ok(Handle(module))
    }
}

impl Kernels {
    /// Unloads every module. No kernel may be launched afterwards.
    pub(super) fn unload(&self) {
        lock(&self.functions).clear();
        for (_, module) in lock(&self.modules).drain() {
            let _ = driver!(cuModuleUnload(module.0));
        }
    }
}

/// `NAME=VALUE`, or `NAME` where there is no value.
pub(super) fn definitions(defines: &[(&str, &str)]) -> Vec<String> {
    let define = |&(name, value): &(&str, &str)| if value.is_empty() { name.into() } else { format!("{name}={value}") };
    defines.iter().map(define).collect()
}

/// Machine code from the cache or the compiler.
fn compiled(source: &Source, arch: Arch, defines: &[String]) -> Result<Vec<u8>, CudaError> {
    let (major, minor) = nvrtc::version()?;
    let text = source.text();
    let cached = cache::Entry::of(&[&text, &arch.to_string(), &defines.join(" "), &format!("{major}.{minor}")]);
    if let Some(code) = cached.read() {
        return Ok(code);
    }
    let image = nvrtc::compile(source.file, &text, arch, defines)?;
    cached.write(&image.code);
    Ok(image.code)
}

fn key(file: &str, entry: &str, defines: &[(&str, &str)]) -> u128 {
    let defines = defines.iter().flat_map(|&(name, value)| [name.as_bytes(), value.as_bytes()]);
    cache::hash([file.as_bytes(), entry.as_bytes()].into_iter().chain(defines))
}
