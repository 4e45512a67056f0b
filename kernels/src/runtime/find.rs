//! Finds the shared libraries of CUDA.
//!
//! cudarc opens them by name (`libnvrtc.so`, `libnvrtc.so.13`, …). Where the system's loader knows the name there is
//! nothing to do. Else the file is searched for and opened here by its path: the loader remembers it under its soname,
//! `libnvrtc.so.13`, and gives it to whoever asks for that name later, which cudarc does.

use core::ffi::{CStr, c_void};
use std::env;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::driver::Handle;
use super::{CudaError, Library};

/// Makes a library ready to be called.
pub(super) fn ensure(library: Library) -> Result<(), CudaError> {
    static READY: [OnceLock<bool>; 4] = [const { OnceLock::new() }; 4];
    let ready = READY[library as usize].get_or_init(|| known_to_loader(library) || preload(library));
    if *ready { Ok(()) } else { Err(CudaError::LibraryMissing { library, looked: looked(library) }) }
}

/// The file that a library was loaded from, once it is loaded.
pub(super) fn loaded_from(library: Library) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let path = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    path.into_iter().find(|path| is_file_of(library, path)).map(Path::to_owned)
}

/// Returns the address of a function of NCCL, which cudarc does not find under the name that its wheel has.
pub(super) fn nccl_function(name: &CStr) -> Option<*mut c_void> {
    ensure(Library::Nccl).ok()?;
    symbol(NCCL.get()?, name)
}

/// NCCL, once it is open.
static NCCL: OnceLock<Handle<*mut c_void>> = OnceLock::new();

/// The soname of every NCCL since 2.0.
const NCCL_NAME: &str = "libnccl.so.2";

/// The headers of CUDA where Burn's own kernels look for them; else what to do.
pub(super) fn headers() -> Result<PathBuf, String> {
    let has_headers = |root: &PathBuf| root.join("include/cuda_fp16.h").is_file();
    // The first that exists is taken, with headers or without.
    let looked = env::var_os("CUDA_PATH")
        .map(PathBuf::from)
        .or_else(|| ["/usr/local/cuda", "/opt/cuda"].map(PathBuf::from).into_iter().find(|root| root.exists()));
    if let Some(root) = looked.filter(has_headers) {
        return Ok(root.join("include"));
    }
    let mut wheels = pythons().into_iter().flat_map(|root| site_packages(&root));
    let wheel = wheels.find_map(|site| list(&site.join("nvidia")).into_iter().find(has_headers));
    let remedy = match wheel {
        Some(root) => format!("set CUDA_PATH={}", root.display()),
        None => "install the CUDA toolkit and set CUDA_PATH to its directory".to_owned(),
    };
    Err(format!("Burn's own CUDA kernels need the toolkit's headers and panic without them; {remedy}"))
}

fn known_to_loader(library: Library) -> bool {
    // SAFETY: opens and closes a library of NVIDIA, whose initializers have no preconditions.
    unsafe {
        match library {
            Library::Driver => cudarc::driver::sys::is_culib_present(),
            Library::Nvrtc => cudarc::nvrtc::sys::is_culib_present(),
            Library::CublasLt => cudarc::cublaslt::sys::is_culib_present(),
            Library::Nccl => NCCL.get().is_some() || open(library, Path::new(NCCL_NAME)),
        }
    }
}

fn preload(library: Library) -> bool {
    let files = directories(library).into_iter().flat_map(|directory| files_of(library, &directory));
    files.into_iter().any(|file| open(library, &file)) && known_to_loader(library)
}

fn open(library: Library, file: &Path) -> bool {
    let Some(handle) = load(file) else { return false };
    if library == Library::Nccl {
        let _ = NCCL.set(handle);
    }
    // NVRTC opens its builtins by name while compiling, which the loader would not find either.
    if library == Library::Nvrtc {
        let siblings = file.parent().into_iter().flat_map(list);
        siblings.filter(|path| name(path).starts_with("libnvrtc-builtins.so")).for_each(|path| {
            load(&path);
        });
    }
    true
}

/// Opens a library by its path, or by a name that the loader knows. It is never closed.
#[cfg(target_os = "linux")]
fn load(file: &Path) -> Option<Handle<*mut c_void>> {
    use core::ffi::{c_char, c_int};
    use std::ffi::CString;
    use std::os::unix::ffi::OsStrExt as _;

    unsafe extern "C" {
        fn dlopen(file: *const c_char, mode: c_int) -> *mut c_void;
    }
    const RTLD_NOW: c_int = 2;

    let file = CString::new(file.as_os_str().as_bytes()).ok()?;
    // SAFETY: a terminated string; the libraries of NVIDIA have initializers without preconditions.
    let handle = unsafe { dlopen(file.as_ptr(), RTLD_NOW) };
    (!handle.is_null()).then_some(Handle(handle))
}

#[cfg(target_os = "linux")]
fn symbol(library: &Handle<*mut c_void>, name: &CStr) -> Option<*mut c_void> {
    use core::ffi::c_char;

    unsafe extern "C" {
        fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    }
    // SAFETY: an open library and a terminated string.
    let address = unsafe { dlsym(library.0, name.as_ptr()) };
    (!address.is_null()).then_some(address)
}

#[cfg(not(target_os = "linux"))]
fn load(_: &Path) -> Option<Handle<*mut c_void>> {
    None
}

#[cfg(not(target_os = "linux"))]
fn symbol(_: &Handle<*mut c_void>, _: &CStr) -> Option<*mut c_void> {
    None
}

/// Returns the directories that are searched for the libraries after the loader's own, best first.
fn directories(library: Library) -> Vec<PathBuf> {
    if library == Library::Driver {
        // The driver belongs to the system: a copy among toolkits or wheels would not match the kernel's module.
        return ["/usr/lib/wsl/lib", "/run/opengl-driver/lib", "/usr/local/nvidia/lib64"].map(PathBuf::from).to_vec();
    }
    let toolkits = ["CUDA_PATH", "CUDA_HOME"].iter().filter_map(env::var_os).map(PathBuf::from);
    let mut installed: Vec<_> =
        list(Path::new("/usr/local")).into_iter().filter(|path| name(path).starts_with("cuda")).collect();
    installed.sort_by(|a, b| b.cmp(a));
    let mut found: Vec<PathBuf> = toolkits
        .chain(installed)
        .flat_map(|root| {
            ["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"].map(|lib| root.join(lib))
        })
        .collect();
    // `nvidia/cu13/lib` since CUDA 13, `nvidia/cuda_nvrtc/lib` and the like before.
    for site in pythons().iter().flat_map(|python| site_packages(python)) {
        found.extend(list(&site.join("nvidia")).into_iter().map(|wheel| wheel.join("lib")));
    }
    found.retain(|directory| directory.is_dir());
    found
}

/// Roots of Python environments: the active one, and those of the `python` on the path.
fn pythons() -> Vec<PathBuf> {
    let mut roots: Vec<PathBuf> =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(env::var_os).map(PathBuf::from).collect();
    let path = env::var_os("PATH").unwrap_or_default();
    for directory in env::split_paths(&path).filter(|directory| directory.join("python3").exists()) {
        // `root/bin/python3`, or a link to it.
        roots.extend(directory.parent().map(Path::to_owned));
        let target = directory.join("python3").canonicalize().ok();
        roots.extend(target.and_then(|file| Some(file.parent()?.parent()?.to_owned())));
    }
    roots.extend(env::var_os("HOME").map(|home| Path::new(&home).join(".local")));
    let mut seen = std::collections::HashSet::new();
    roots.retain(|root| seen.insert(root.clone()));
    roots
}

fn site_packages(root: &Path) -> Vec<PathBuf> {
    let versions = ["lib", "lib64", "local/lib"].into_iter().flat_map(|lib| list(&root.join(lib)));
    versions
        .filter(|path| name(path).starts_with("python3"))
        .flat_map(|path| [path.join("site-packages"), path.join("dist-packages")])
        .collect()
}

fn files_of(library: Library, directory: &Path) -> Vec<PathBuf> {
    list(directory).into_iter().filter(|path| is_file_of(library, path)).collect()
}

fn is_file_of(library: Library, path: &Path) -> bool {
    let stem = match library {
        Library::Driver => "libcuda.so",
        Library::Nvrtc => "libnvrtc.so",
        Library::CublasLt => "libcublasLt.so",
        Library::Nccl => "libnccl.so",
    };
    name(path).starts_with(stem)
}

fn looked(library: Library) -> String {
    let directories: Vec<_> = directories(library).iter().map(|path| path.display().to_string()).collect();
    let asked = match library {
        Library::Driver => "",
        _ => ", CUDA_PATH, /usr/local/cuda*, Python environments",
    };
    match directories.join(", ") {
        none if none.is_empty() => format!("in the system's library path{asked}"),
        some => format!("in the system's library path{asked}, {some}"),
    }
}

/// The sorted entries of a directory; none where there is no such directory.
fn list(directory: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<_> = std::fs::read_dir(directory).into_iter().flatten().flatten().map(|e| e.path()).collect();
    entries.sort();
    entries
}

fn name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_libraries() {
        assert!(is_file_of(Library::Nvrtc, Path::new("/x/libnvrtc.so.13")));
        assert!(!is_file_of(Library::Nvrtc, Path::new("/x/libnvrtc-builtins.so.13.2")));
        assert!(is_file_of(Library::CublasLt, Path::new("/x/libcublasLt.so.13")));
        assert!(!is_file_of(Library::Driver, Path::new("/x/libcudart.so.13")));
        assert!(is_file_of(Library::Nccl, Path::new("/x/nvidia/nccl/lib/libnccl.so.2")));
    }
}
