//! Statuses of the driver, and its handles as values that threads may share.

use std::ffi::CStr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys;

/// A failed call: the function and its status.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failed {
    pub(super) call: &'static str,
    pub(super) status: sys::CUresult,
}

/// Calls a function of the driver. The caller's `unsafe` duty is that the handles among the arguments are alive and
/// that pointers are valid for what the function reads and writes; it is met by the types that own the handles.
macro_rules! driver {
    ($function:ident($($argument:expr),* $(,)?)) => {{
        #[allow(unused_unsafe)]
        // SAFETY: handles are owned by the caller's type and alive; pointers are to locals or to slices of the length given.
        let status = unsafe { cudarc::driver::sys::$function($($argument),*) };
        match status {
            cudarc::driver::sys::CUresult::CUDA_SUCCESS => Ok(()),
            status => Err($crate::runtime::driver::Failed { call: stringify!($function), status }),
        }
    }};
}
pub(super) use driver;

impl Failed {
    /// Returns the error of an operation.
    pub(super) fn during(self, operation: impl Into<String>) -> super::CudaError {
        super::CudaError::Call {
            operation: operation.into(),
            call: self.call,
            code: self.status as i32,
            text: words(self.status),
        }
    }
}

/// A handle of the driver. The driver allows every handle on every thread that has its context current.
#[derive(Clone, Copy)]
pub(super) struct Handle<T>(pub(super) T);
// SAFETY: see the type.
unsafe impl<T> Send for Handle<T> {}
// SAFETY: see the type.
unsafe impl<T> Sync for Handle<T> {}

/// Locks, also after a panic elsewhere: what these locks guard is consistent between any two statements.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn words(status: sys::CUresult) -> String {
    let mut text = core::ptr::null();
    match driver!(cuGetErrorString(status, &mut text)) {
        // SAFETY: a static string of the driver.
        Ok(()) if !text.is_null() => unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned(),
        _ => format!("{status:?}"),
    }
}
