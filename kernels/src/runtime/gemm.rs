//! Matrix products of row-major matrices.

use std::borrow::Cow;

use super::blaslt::Blas;
use super::{Cuda, CudaError, Library, find};

/// The dtype of an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 8 bits of exponent, 7 of mantissa.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
}

/// The operand that is transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// `d = a · bᵀ`: a `[m, k]`, b `[n, k]`.
    Nt,
    /// `d = a · b`: a `[m, k]`, b `[k, n]`.
    Nn,
    /// `d = aᵀ · b`: a `[k, m]`, b `[k, n]`.
    Tn,
}

/// A row-major matrix on the device.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    /// The address of its first element.
    pub ptr: u64,
    /// Elements from row to row.
    pub ld: usize,
    /// The dtype of its elements.
    pub dtype: DType,
}

/// A product: `d = alpha · op(a) · op(b) + beta · c + bias`, with c and d `[m, n]`; c is d unless it is given.
///
/// a and b have one dtype; c and d have theirs or f32. Sums are f32, and f32 operands are multiplied in f32, not in
/// TF32. Into a d of 16 bits with `beta` other than 0, cuBLASLt's algorithms for Hopper round the product before they
/// add it: the error is that of a product and a sum, each rounded. Into f32 there is one rounding.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    /// The operand that is transposed.
    pub form: Form,
    /// Rows of d.
    pub m: usize,
    /// Columns of d.
    pub n: usize,
    /// The length of the sums.
    pub k: usize,
    /// The left operand.
    pub a: Operand,
    /// The right operand.
    pub b: Operand,
    /// The addend, if it is not d.
    pub c: Option<Operand>,
    /// The result.
    pub d: Operand,
    /// The factor of the product.
    pub alpha: f32,
    /// The factor of c; with 0 it is not read.
    pub beta: f32,
    /// The address of `[n]` values in the dtype of d, added to every row.
    pub bias: Option<u64>,
}

impl Gemm {
    /// A product with `alpha` 1, `beta` 0 and no bias.
    pub fn new(form: Form, [m, n, k]: [usize; 3], a: Operand, b: Operand, d: Operand) -> Self {
        Self { form, m, n, k, a, b, c: None, d, alpha: 1.0, beta: 0.0, bias: None }
    }
}

impl Gemm {
    /// c.
    pub(super) fn addend(&self) -> Operand {
        self.c.unwrap_or(self.d)
    }
}

impl Cuda {
    /// Queues a product on the compute stream.
    ///
    /// The first call of a shape plans it and waits for the device, unless [`Cuda::set_deterministic`] is on; planning
    /// leaves no trace in d. Without cuBLASLt, or with a shape that it refuses, the error sticks.
    pub fn gemm(&self, gemm: &Gemm) {
        if self.has_failed() || gemm.m == 0 || gemm.n == 0 {
            return;
        }
        if self.is_planned() {
            return self.plan_product(gemm);
        }
        let Some(blas) = self.0.blas.get_or_init(|| Blas::new(self).map_err(|error| self.fail(error)).ok()) else {
            // Also after the error was taken: the library did not come.
            self.fail(find::ensure(Library::CublasLt).err().unwrap_or_else(|| refused(gemm, "cuBLASLt did not start")));
            return;
        };
        let mut queued = Ok(());
        let operation = if self.is_profiling() { Cow::Owned(name(gemm)) } else { Cow::Borrowed("gemm") };
        self.run(&operation, || {
            queued = blas.queue(self, gemm);
            Ok(())
        });
        if let Err(error) = queued {
            self.fail(error);
        }
    }
}

impl DType {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            DType::Bf16 | DType::F16 => 2,
            DType::F32 => 4,
        }
    }

    /// Its name in kernels, the value of `T`.
    pub fn name(self) -> &'static str {
        match self {
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::F32 => "f32",
        }
    }
}

/// Checks what cuBLASLt would refuse without a reason.
pub(super) fn check(gemm: &Gemm) -> Result<(), CudaError> {
    let Gemm { form, m, n, k, a, b, d, .. } = *gemm;
    let [a_columns, b_columns] = match form {
        Form::Nt => [k, k],
        Form::Nn => [k, n],
        Form::Tn => [m, n],
    };
    let c = gemm.addend();
    for (name, operand, columns) in [("a", a, a_columns), ("b", b, b_columns), ("c", c, n), ("d", d, n)] {
        if operand.ld < columns {
            return Err(refused(gemm, &format!("{name} has {columns} columns and its rows are {} apart", operand.ld)));
        }
        if !operand.ptr.is_multiple_of(operand.dtype.bytes() as u64) {
            return Err(refused(
                gemm,
                &format!(
                    "the address {:#x} of {name} is not aligned to its \
                 elements",
                    operand.ptr
                ),
            ));
        }
    }
    match a.dtype == b.dtype && (d.dtype == a.dtype || d.dtype == DType::F32) && c.dtype == d.dtype && k > 0 {
        true => Ok(()),
        false => Err(refused(gemm, "k must not be 0, a and b must have one dtype, and c and d that dtype or f32")),
    }
}

pub(super) fn name(gemm: &Gemm) -> String {
    let Gemm { form, m, n, k, a, d, .. } = gemm;
    format!("gemm {form:?} m {m}, n {n}, k {k}, {} to {}", a.dtype.name(), d.dtype.name()).to_lowercase()
}

pub(super) fn refused(gemm: &Gemm, reason: &str) -> CudaError {
    CudaError::Usage { operation: name(gemm), reason: reason.into() }
}
