//! Compiles CUDA C++ for one architecture.

use std::ffi::{CStr, CString, c_char};

use cudarc::nvrtc::sys;

use super::{CudaError, Library, find};

/// An architecture to compile for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Arch {
    /// 10 × major + minor of the compute capability.
    pub sm: u32,
}

/// Machine code, or PTX for the driver to finish, with what the compiler said.
#[derive(Debug)]
pub(super) struct Image {
    /// Ends with a zero byte, which PTX must have and machine code may.
    pub(super) code: Vec<u8>,
    pub(super) log: String,
}

/// Resources of one kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// The entry point.
    pub entry: String,
    /// Registers a thread.
    pub registers: u32,
    /// Bytes a thread keeps in local memory.
    pub stack: u32,
    /// Bytes of registers written to local memory.
    pub spill_stores: u32,
    /// Bytes of registers read from local memory.
    pub spill_loads: u32,
    /// Bytes of static shared memory.
    pub shared: u32,
}

impl Arch {
    /// The architecture of a device by its compute capability.
    pub fn new(major: u32, minor: u32) -> Self {
        Self { sm: 10 * major + minor }
    }
}

impl core::fmt::Display for Arch {
    /// `sm_90a` where there are instructions that only that architecture has, `sm_80` and so on elsewhere.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "sm_{}{}", self.sm, if self.sm == 90 { "a" } else { "" })
    }
}

/// Compiles a file. `defines` are `NAME=VALUE`. `text` is everything, since there are no headers.
///
/// Where the compiler is older than the card, it makes PTX of the newest architecture that it knows, which the driver
/// finishes.
pub(super) fn compile(file: &str, text: &str, arch: Arch, defines: &[String]) -> Result<Image, CudaError> {
    let (major, minor) = version()?;
    let (target, is_code) = target(arch);
    let options: Vec<_> = [format!("--gpu-architecture={target}"), "--std=c++17".into(), "--ptxas-options=-v".into()]
        .into_iter()
        .chain(defines.iter().map(|define| format!("-D{define}")))
        .collect();
    let compiled = Program::new(file, text).and_then(|program| program.compile(&options, is_code));
    compiled.map_err(|log| CudaError::Compile {
        file: file.to_owned(),
        arch: target,
        options: defines.join(", "),
        nvrtc: format!("{major}.{minor}"),
        log: log.trim().to_owned(),
    })
}

/// The compiler's version.
pub(super) fn version() -> Result<(i32, i32), CudaError> {
    find::ensure(Library::Nvrtc)?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: two integers to write to.
    match unsafe { sys::nvrtcVersion(&mut major, &mut minor) } {
        sys::nvrtcResult::NVRTC_SUCCESS => Ok((major, minor)),
        status => Err(CudaError::Call {
            operation: "asking NVRTC's version".into(),
            call: "nvrtcVersion",
            code: status as i32,
            text: format!("{status:?}"),
        }),
    }
}

/// Reads the output of `--ptxas-options=-v` for each entry point.
pub(super) fn usages(log: &str) -> Vec<Usage> {
    let mut usages: Vec<Usage> = Vec::new();
    for line in log.lines() {
        if let Some(entry) = line.split("Compiling entry function '").nth(1).and_then(|rest| rest.split('\'').next()) {
            usages.push(Usage { entry: entry.to_owned(), ..Usage::default() });
        }
        let Some(usage) = usages.last_mut() else { continue };
        let number = |words: &str| {
            let before = line.split(words).next().filter(|before| before.len() < line.len())?;
            before.rsplit([' ', ',']).find(|word| !word.is_empty())?.parse().ok()
        };
        for (words, field) in [
            (" registers", &mut usage.registers),
            (" bytes stack frame", &mut usage.stack),
            (" bytes spill stores", &mut usage.spill_stores),
            (" bytes spill loads", &mut usage.spill_loads),
            (" bytes smem", &mut usage.shared),
        ] {
            *field = number(words).unwrap_or(*field);
        }
    }
    usages
}

/// Returns the compiler's target, and whether it is machine code.
fn target(arch: Arch) -> (String, bool) {
    if super::context::stands_for().is_some() {
        return (format!("compute_{}", arch.sm), false);
    }
    let mut count = 0;
    // SAFETY: an integer to write to.
    unsafe { sys::nvrtcGetNumSupportedArchs(&mut count) };
    let mut known = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: room for as many integers as there are.
    unsafe { sys::nvrtcGetSupportedArchs(known.as_mut_ptr()) };
    let known = known.iter().map(|sm| sm.unsigned_abs());
    match known.filter(|&sm| sm <= arch.sm).max() {
        Some(sm) if sm < arch.sm => (format!("compute_{sm}"), false),
        _ => (arch.to_string(), true),
    }
}

struct Program(sys::nvrtcProgram);

impl Program {
    fn new(file: &str, text: &str) -> Result<Self, String> {
        let c_string = |s: &str| CString::new(s).map_err(|_| "the source has a zero byte".to_owned());
        let (text, name) = (c_string(text)?, c_string(file)?);
        let mut program = core::ptr::null_mut();
        let none = core::ptr::null();
        // SAFETY: terminated strings, which are copied; no headers.
        let status = unsafe { sys::nvrtcCreateProgram(&mut program, text.as_ptr(), name.as_ptr(), 0, none, none) };
        ok(status).map(|()| Self(program))
    }

    fn compile(self, options: &[String], is_code: bool) -> Result<Image, String> {
        let options: Vec<CString> = options.iter().filter_map(|o| CString::new(o.as_str()).ok()).collect();
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: as many terminated strings as said.
        let status = unsafe { sys::nvrtcCompileProgram(self.0, pointers.len() as i32, pointers.as_ptr()) };
        let log = self.read(sys::nvrtcGetProgramLogSize, sys::nvrtcGetProgramLog)?;
        let log = CStr::from_bytes_until_nul(&log).map(|log| log.to_string_lossy().into_owned()).unwrap_or_default();
        ok(status).map_err(|status| if log.trim().is_empty() { status } else { log.clone() })?;
        let code = match is_code {
            true => self.read(sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN)?,
            false => self.read(sys::nvrtcGetPTXSize, sys::nvrtcGetPTX)?,
        };
        Ok(Image { code, log })
    }

    /// One of the program's results, and a zero byte.
    fn read(
        &self,
        size: unsafe fn(sys::nvrtcProgram, *mut usize) -> sys::nvrtcResult,
        get: unsafe fn(sys::nvrtcProgram, *mut c_char) -> sys::nvrtcResult,
    ) -> Result<Vec<u8>, String> {
        let mut bytes = 0;
        // SAFETY: an integer to write to.
        ok(unsafe { size(self.0, &mut bytes) })?;
        let mut result = vec![0u8; bytes + 1];
        // SAFETY: room for as many bytes as said.
        ok(unsafe { get(self.0, result.as_mut_ptr().cast()) })?;
        Ok(result)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made in `new` and destroyed once.
        unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

fn ok(status: sys::nvrtcResult) -> Result<(), String> {
    match status {
        sys::nvrtcResult::NVRTC_SUCCESS => Ok(()),
        status => Err(format!("{status:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_architectures() {
        assert_eq!([(8, 0), (9, 0), (12, 0)].map(|(a, b)| Arch::new(a, b).to_string()), ["sm_80", "sm_90a", "sm_120"]);
    }

    #[test]
    fn reads_the_assembler() {
        let log = "ptxas info    : 11 bytes gmem\n\
            ptxas info    : Compiling entry function 'a' for 'sm_90a'\n\
            ptxas info    : Function properties for a\n    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n\
            ptxas info    : Used 168 registers, used 1 barriers, 8 bytes cumulative stack size, 1024 bytes smem\n\
            ptxas info    : Compiling entry function 'b' for 'sm_90a'\n\
            ptxas info    : Function properties for b\n    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
            ptxas info    : Used 32 registers, used 0 barriers\n";
        let a = Usage { entry: "a".into(), registers: 168, stack: 8, spill_stores: 4, spill_loads: 12, shared: 1024 };
        assert_eq!(usages(log), [a, Usage { entry: "b".into(), registers: 32, ..Usage::default() }]);
    }
}
