//! Plans for matrix products, and cuBLASLt that runs them.
//!
//! A product is planned once for its shape: descriptors are made, cuBLASLt proposes algorithms, and each of the first
//! [`CANDIDATES`] is timed on the operands at hand. A planned product is one look-up and one call. Shapes of nearly the
//! same size share what was timed ([`Key::class`]): a run whose batches all differ in their tokens stops timing soon.
//!
//! cuBLASLt counts columns first. A row-major matrix is its transpose to it, so `d = a·b` is asked for as `dᵀ = bᵀ·aᵀ`:
//! the operands change places and nothing is copied.

use core::ffi::c_void;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use cudarc::cublaslt::sys as lt;

use super::driver::{Handle, lock};
use super::gemm::{check, name, refused};
use super::{Cuda, CudaError, DType, Form, Gemm, Library, MemoryUse, Operand, find};

/// Number of cuBLASLt's proposals that are timed.
const CANDIDATES: usize = 8;

/// Time that the device is kept busy before products are timed.
const WARM_UP_MS: f32 = 20.0;
const WARM_UP_CALLS: usize = 20;

/// Plans that are kept. Making one again out of what was timed takes the host microseconds.
const PLANS: usize = 4096;

/// Scratch memory for split sums, which large products on Hopper use up to 32 MiB of.
pub(super) const WORKSPACE: usize = 64 << 20;

/// The library's handle, the scratch memory and the plans of one device.
pub(super) struct Blas {
    handle: Handle<lt::cublasLtHandle_t>,
    workspace: u64,
    plans: Mutex<HashMap<Key, Arc<Plan>>>,
    /// The fastest of each class of shapes.
    timed: Mutex<HashMap<Key, lt::cublasLtMatmulAlgo_t>>,
}

/// Everything that the choice of an algorithm depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    form: Form,
    shape: [usize; 3],
    ld: [usize; 4],
    dtypes: [DType; 3],
    /// Addresses modulo 16, as the alignment that they leave.
    alignments: [u8; 4],
    accumulates: bool,
    has_bias: bool,
    /// Plans chosen by time are not used in deterministic mode.
    deterministic: bool,
}

struct Plan {
    descriptor: Mutex<Handle<lt::cublasLtMatmulDesc_t>>,
    /// Layouts of b, a, c and d, in the library's order.
    layouts: [Handle<lt::cublasLtMatrixLayout_t>; 4],
    algorithm: lt::cublasLtMatmulAlgo_t,
}

impl Key {
    fn of(gemm: &Gemm, deterministic: bool) -> Self {
        let operands = [gemm.a, gemm.b, gemm.addend(), gemm.d];
        Self {
            form: gemm.form,
            shape: [gemm.m, gemm.n, gemm.k],
            ld: operands.map(|operand| operand.ld),
            dtypes: [gemm.a, gemm.b, gemm.d].map(|operand| operand.dtype),
            alignments: operands.map(|operand| alignment(operand.ptr)),
            accumulates: gemm.beta != 0.0,
            has_bias: gemm.bias.is_some(),
            deterministic,
        }
    }

    /// The key of all shapes that share an algorithm: each size rounded up to one of eight within its power of two.
    fn class(self) -> Self {
        let round = |size: usize| size.next_multiple_of((size.next_power_of_two() / 16).max(1));
        Self { shape: self.shape.map(round), ..self }
    }
}

impl Blas {
    pub(super) fn new(cuda: &Cuda) -> Result<Self, CudaError> {
        find::ensure(Library::CublasLt)?;
        cuda.bind().map_err(|failed| failed.during("starting cuBLASLt"))?;
        let mut handle = core::ptr::null_mut();
        // SAFETY: a place for the handle; the context is current.
        status(unsafe { lt::cublasLtCreate(&mut handle) }).map_err(|status| CudaError::Call {
            operation: "starting cuBLASLt".into(),
            call: "cublasLtCreate",
            code: status as i32,
            text: words(status),
        })?;
        // Not a `Buffer`, which would keep the device open for ever: it goes with the arena.
        let workspace = lock(&cuda.0.arena).alloc(WORKSPACE, MemoryUse::Workspace);
        let workspace = workspace.map_err(|failed| cuda.out_of_memory(failed, WORKSPACE, MemoryUse::Workspace))?;
        Ok(Self { handle: Handle(handle), workspace, plans: Mutex::default(), timed: Mutex::default() })
    }

    /// Queues a product, planned before or now.
    pub(super) fn queue(&self, cuda: &Cuda, gemm: &Gemm) -> Result<(), CudaError> {
        let key = Key::of(gemm, cuda.is_deterministic());
        let known = lock(&self.plans).get(&key).cloned();
        let plan = match known {
            Some(plan) => plan,
            None => {
                let plan = Arc::new(self.plan(cuda, gemm, key)?);
                let mut plans = lock(&self.plans);
                if plans.len() >= PLANS {
                    plans.clear();
                }
                plans.insert(key, Arc::clone(&plan));
                plan
            }
        };
        let queued = status(self.matmul(cuda, &plan, &plan.algorithm, gemm));
        queued.map_err(|status| failed(gemm, "cublasLtMatmul", status))
    }

    fn matmul(
        &self,
        cuda: &Cuda,
        plan: &Plan,
        algorithm: &lt::cublasLtMatmulAlgo_t,
        gemm: &Gemm,
    ) -> lt::cublasStatus_t {
        // Locked for the bias, whose address is a property of the descriptor.
        let descriptor = lock(&plan.descriptor);
        if let Some(bias) = gemm.bias {
            let attribute = lt::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            if let Err(status) = set(descriptor.0, attribute, bias) {
                return status;
            }
        }
        let [b, a, c, d] = plan.layouts.map(|layout| layout.0);
        let address = |operand: Operand| operand.ptr as *mut c_void;
        // SAFETY: descriptors and layouts are alive; the scalars are f32, as the descriptor says; the workspace has the
        // size given; addresses are the device's business.
        unsafe {
            lt::cublasLtMatmul(
                self.handle.0,
                descriptor.0,
                (&raw const gemm.alpha).cast(),
                address(gemm.b),
                b,
                address(gemm.a),
                a,
                (&raw const gemm.beta).cast(),
                address(gemm.addend()),
                c,
                address(gemm.d),
                d,
                algorithm,
                self.workspace as *mut c_void,
                WORKSPACE,
                cuda.compute().cast(),
            )
        }
    }

    fn plan(&self, cuda: &Cuda, gemm: &Gemm, key: Key) -> Result<Plan, CudaError> {
        check(gemm)?;
        let mut plan = Plan::describe(gemm).map_err(|status| failed(gemm, "cublasLtMatmulDescCreate", status))?;
        if key.deterministic {
            plan.algorithm = self.candidates(&plan, gemm)?[0];
            return Ok(plan);
        }
        let class = key.class();
        let timed = lock(&self.timed).get(&class).copied();
        if let Some(algorithm) = timed
            && self.takes(&plan, &algorithm)
        {
            plan.algorithm = algorithm;
            return Ok(plan);
        }
        let candidates = self.candidates(&plan, gemm)?;
        plan.algorithm = candidates[self.fastest(cuda, &plan, &candidates, gemm)?];
        lock(&self.timed).insert(class, plan.algorithm);
        Ok(plan)
    }

    /// Returns whether an algorithm that was proposed for another product can compute this one.
    fn takes(&self, plan: &Plan, algorithm: &lt::cublasLtMatmulAlgo_t) -> bool {
        let [b, a, c, d] = plan.layouts.map(|layout| layout.0);
        let descriptor = lock(&plan.descriptor);
        // SAFETY: integers, and an array of integers.
        let mut result: lt::cublasLtMatmulHeuristicResult_t = unsafe { core::mem::zeroed() };
        // SAFETY: live handles, and a place for the result.
        let asked = status(unsafe {
            lt::cublasLtMatmulAlgoCheck(self.handle.0, descriptor.0, b, a, c, d, algorithm, &mut result)
        });
        asked.is_ok() && result.workspaceSize <= WORKSPACE
    }

    /// Returns cuBLASLt's proposals, best first by its own estimate; never empty.
    fn candidates(&self, plan: &Plan, gemm: &Gemm) -> Result<Vec<lt::cublasLtMatmulAlgo_t>, CudaError> {
        use lt::cublasLtMatmulPreferenceAttributes_t as P;
        let propose = || -> Result<Vec<_>, lt::cublasStatus_t> {
            let mut preference = core::ptr::null_mut();
            // SAFETY: a place for the handle.
            status(unsafe { lt::cublasLtMatmulPreferenceCreate(&mut preference) })?;
            let prefer = |attribute, value: &[u8]| {
                // SAFETY: a live preference, and as many bytes as said.
                status(unsafe {
                    lt::cublasLtMatmulPreferenceSetAttribute(preference, attribute, value.as_ptr().cast(), value.len())
                })
            };
            let align = |operand: Operand| u32::from(alignment(operand.ptr)).to_ne_bytes();
            let in_f32 = lt::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
            // SAFETY: every value of these types is a run of plain integers.
            let mut proposals: [lt::cublasLtMatmulHeuristicResult_t; CANDIDATES] = unsafe { core::mem::zeroed() };
            let mut count = 0;
            let asked = prefer(P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &(WORKSPACE as u64).to_ne_bytes())
                // Parts of a split sum are added in f32, not in the dtype of d.
                .and_then(|()| prefer(P::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &in_f32.to_ne_bytes()))
                .and_then(|()| prefer(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &align(gemm.b)))
                .and_then(|()| prefer(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &align(gemm.a)))
                .and_then(|()| prefer(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &align(gemm.addend())))
                .and_then(|()| prefer(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &align(gemm.d)))
                .and_then(|()| {
                    let [b, a, c, d] = plan.layouts.map(|layout| layout.0);
                    let descriptor = lock(&plan.descriptor);
                    // SAFETY: live handles; room for as many proposals as said.
                    status(unsafe {
                        lt::cublasLtMatmulAlgoGetHeuristic(
                            self.handle.0,
                            descriptor.0,
                            b,
                            a,
                            c,
                            d,
                            preference,
                            CANDIDATES as i32,
                            proposals.as_mut_ptr(),
                            &mut count,
                        )
                    })
                });
            // SAFETY: made above.
            unsafe { lt::cublasLtMatmulPreferenceDestroy(preference) };
            asked?;
            let usable = proposals.iter().take(count as usize);
            let usable = usable.filter(|proposal| proposal.state == lt::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
            Ok(usable.map(|proposal| proposal.algo).collect())
        };
        let candidates = propose().map_err(|status| failed(gemm, "cublasLtMatmulAlgoGetHeuristic", status))?;
        match candidates.is_empty() {
            true => Err(refused(gemm, "cuBLASLt has no algorithm for it")),
            false => Ok(candidates),
        }
    }

    /// Times each candidate twice, in both orders: under large products the clock falls until the limit of power is met,
    /// which would favour whoever comes first.
    fn fastest(
        &self,
        cuda: &Cuda,
        plan: &Plan,
        candidates: &[lt::cublasLtMatmulAlgo_t],
        gemm: &Gemm,
    ) -> Result<usize, CudaError> {
        if candidates.len() == 1 {
            return Ok(0);
        }
        let mut trial = *gemm;
        if gemm.beta != 0.0 && gemm.c.is_none() {
            // What is added to d must vanish when it is rounded, and not be a zero that might be skipped.
            trial.alpha = f32::from_bits(1);
            trial.beta = 1.0;
            trial.bias = None;
        }
        // Milliseconds of two runs, after one that brings code and operands near.
        let time = |algorithm: &lt::cublasLtMatmulAlgo_t| -> Result<f32, CudaError> {
            if status(self.matmul(cuda, plan, algorithm, &trial)).is_err() {
                return Ok(f32::INFINITY);
            }
            let start = cuda.event();
            for _ in 0..2 {
                self.matmul(cuda, plan, algorithm, &trial);
            }
            cuda.event().milliseconds_since(&start)
        };
        // From idle to the clock under load.
        let mut warm = 0.0;
        for _ in 0..WARM_UP_CALLS {
            warm += time(&candidates[0])?;
            if warm > WARM_UP_MS {
                break;
            }
        }
        let mut times = vec![0.0; candidates.len()];
        for index in (0..candidates.len()).chain((0..candidates.len()).rev()) {
            times[index] += time(&candidates[index])?;
        }
        let fastest = (0..times.len()).min_by(|&a, &b| times[a].total_cmp(&times[b]));
        Ok(fastest.expect("there are candidates"))
    }
}

impl Plan {
    fn describe(gemm: &Gemm) -> Result<Self, lt::cublasStatus_t> {
        use lt::cublasLtMatmulDescAttributes_t as D;
        let (compute, scale) = (lt::cublasComputeType_t::CUBLAS_COMPUTE_32F, lt::cudaDataType_t::CUDA_R_32F);
        let mut descriptor = core::ptr::null_mut();
        // SAFETY: a place for the handle.
        status(unsafe { lt::cublasLtMatmulDescCreate(&mut descriptor, compute, scale) })?;
        let null = Handle(core::ptr::null_mut());
        // From here on `Plan` destroys what was made.
        let mut plan = Self {
            descriptor: Mutex::new(Handle(descriptor)),
            layouts: [null; 4],
            algorithm: lt::cublasLtMatmulAlgo_t { data: [0; 8] },
        };
        let Gemm { form, m, n, k, a, b, d, .. } = *gemm;
        let (b_transposed, a_transposed) = (form == Form::Nt, form == Form::Tn);
        set(descriptor, D::CUBLASLT_MATMUL_DESC_TRANSA, i32::from(b_transposed))?;
        set(descriptor, D::CUBLASLT_MATMUL_DESC_TRANSB, i32::from(a_transposed))?;
        if gemm.bias.is_some() {
            set(descriptor, D::CUBLASLT_MATMUL_DESC_EPILOGUE, lt::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32)?;
            set(descriptor, D::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, data_type(d.dtype) as u32)?;
        }
        // Rows and columns as cuBLASLt sees them: of the transposes.
        let b_shape = if b_transposed { [k, n] } else { [n, k] };
        let a_shape = if a_transposed { [m, k] } else { [k, m] };
        for (layout, ([rows, columns], operand)) in
            plan.layouts.iter_mut().zip([(b_shape, b), (a_shape, a), ([n, m], gemm.addend()), ([n, m], d)])
        {
            let (rows, columns, ld) = (rows as u64, columns as u64, operand.ld as i64);
            // SAFETY: a place for the handle.
            status(unsafe {
                lt::cublasLtMatrixLayoutCreate(&mut layout.0, data_type(operand.dtype), rows, columns, ld)
            })?;
        }
        Ok(plan)
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        for layout in self.layouts.iter().filter(|layout| !layout.0.is_null()) {
            // SAFETY: made in `describe`, destroyed once.
            unsafe { lt::cublasLtMatrixLayoutDestroy(layout.0) };
        }
        // SAFETY: as above.
        unsafe { lt::cublasLtMatmulDescDestroy(lock(&self.descriptor).0) };
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        lock(&self.plans).clear();
        // SAFETY: made in `new`, destroyed once, after its stream was waited for.
        unsafe { lt::cublasLtDestroy(self.handle.0) };
    }
}

/// The largest power of two up to 16 that divides an address; kernels profit from no more.
fn alignment(address: u64) -> u8 {
    1 << address.trailing_zeros().min(4)
}

fn data_type(dtype: DType) -> lt::cudaDataType_t {
    match dtype {
        DType::Bf16 => lt::cudaDataType_t::CUDA_R_16BF,
        DType::F16 => lt::cudaDataType_t::CUDA_R_16F,
        DType::F32 => lt::cudaDataType_t::CUDA_R_32F,
    }
}

fn set<T>(
    descriptor: lt::cublasLtMatmulDesc_t,
    attribute: lt::cublasLtMatmulDescAttributes_t,
    value: T,
) -> Result<(), lt::cublasStatus_t> {
    // SAFETY: a live descriptor; the value is an integer of the size that the library knows for the attribute.
    status(unsafe {
        lt::cublasLtMatmulDescSetAttribute(descriptor, attribute, (&raw const value).cast(), size_of::<T>())
    })
}

fn status(status: lt::cublasStatus_t) -> Result<(), lt::cublasStatus_t> {
    match status {
        lt::cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
        status => Err(status),
    }
}

fn words(status: lt::cublasStatus_t) -> String {
    format!("{status:?}").trim_start_matches("CUBLAS_STATUS_").to_lowercase().replace('_', " ")
}

fn failed(gemm: &Gemm, call: &'static str, status: lt::cublasStatus_t) -> CudaError {
    CudaError::Call { operation: name(gemm), call, code: status as i32, text: words(status) }
}
