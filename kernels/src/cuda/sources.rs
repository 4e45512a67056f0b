//! The embedded kernel files: their text, and what they are compiled with.
//!
//! A new file needs one entry in the table; [`super::compile_check`] then compiles every variant of it for every
//! architecture.

use super::{Arch, AttentionKernel, Tiles};

/// A kernel file.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// Its name in `kernels/cu/`.
    pub file: &'static str,
    /// Every list of definitions that it is used with on an architecture; none where it is not for it.
    pub variants: fn(Arch) -> Vec<Defines>,
    /// What stands before it, and it.
    parts: &'static [&'static str],
}

/// Definitions for the compiler, name and value.
pub type Defines = Vec<(&'static str, &'static str)>;

macro_rules! sources {
    ($($file:literal $(after $header:literal)? with $variants:expr;)*) => {
        /// All of them.
        pub const SOURCES: &[Source] = &[$(Source {
            file: $file,
            variants: $variants,
            parts: &[
                include_str!("../../cu/prelude.cuh"),
                $(include_str!(concat!("../../cu/", $header)),)?
                include_str!(concat!("../../cu/", $file)),
            ],
        }),*];
    };
}

sources! {
    "attention_bwd_dkdv.cu" after "mma_sync.cuh" with |arch| attention(AttentionKernel::BwdDkdv, arch);
    "attention_bwd_dq.cu" after "mma_sync.cuh" with |arch| attention(AttentionKernel::BwdDq, arch);
    "attention_bwd_sm90.cu" after "sm90.cuh" with attention_bwd_sm90;
    "attention_delta.cu" with any_head_dim;
    "attention_f32.cu" with any_head_dim;
    "attention_fwd.cu" after "mma_sync.cuh" with |arch| attention(AttentionKernel::Fwd, arch);
    "attention_fwd_sm90.cu" after "sm90.cuh" with attention_sm90;
    "cross_entropy.cu" with any_dtype;
    "dequant.cu" with any_dtype;
    "dropout.cu" after "philox.cuh" with any_dtype;
    "elementwise.cu" with any_dtype;
    "embedding.cu" with any_dtype;
    "mirror.cu" with any_dtype;
    "optimizer.cu" with any_dtype;
    "optimizer_8bit.cu" with f32_alone;
    "qk_norm_rope.cu" with any_dtype;
    "reduce.cu" with any_dtype;
    "rms_norm.cu" with any_dtype;
    "stochastic.cu" after "philox.cuh" with any_dtype;
    "swiglu.cu" with any_dtype;
}

impl Source {
    /// The entry of a file.
    pub fn named(file: &str) -> Option<&'static Source> {
        SOURCES.iter().find(|source| source.file == file)
    }

    /// What the compiler is given.
    pub fn text(&self) -> String {
        self.parts.concat()
    }
}

/// `T`, the dtype of activations.
fn any_dtype(arch: Arch) -> Vec<Defines> {
    let dtypes = if arch.sm >= 80 { &["bf16", "f16", "f32"][..] } else { &[] };
    dtypes.iter().map(|&dtype| vec![("T", dtype)]).collect()
}

/// Where `T` does not occur.
fn f32_alone(arch: Arch) -> Vec<Defines> {
    if arch.sm >= 80 { vec![vec![("T", "f32")]] } else { Vec::new() }
}

/// Every dtype, with the sizes of heads that models have; 80 stands for the unusual ones.
fn any_head_dim(arch: Arch) -> Vec<Defines> {
    let with =
        |head_dim| any_dtype(arch).into_iter().map(move |defines| [defines, vec![("HEAD_DIM", head_dim)]].concat());
    ["64", "80", "128"].into_iter().flat_map(with).collect()
}

/// The tensor cores' dtypes and sizes of heads.
const TENSOR_CORES: [(&str, u32); 4] = [("bf16", 64), ("bf16", 128), ("f16", 64), ("f16", 128)];

fn attention(kernel: AttentionKernel, arch: Arch) -> Vec<Defines> {
    let all = TENSOR_CORES.into_iter().filter(|_| arch.sm >= 80);
    all.map(|(dtype, head_dim)| Tiles::of(kernel, head_dim, arch).defines(dtype, head_dim)).collect()
}

/// wgmma exists on compute capability 9.0 alone.
fn attention_sm90(arch: Arch) -> Vec<Defines> {
    let all = TENSOR_CORES.into_iter().filter(|_| arch.sm == 90);
    all.map(|(dtype, head_dim)| vec![("T", dtype), ("HEAD_DIM", if head_dim == 64 { "64" } else { "128" })]).collect()
}

fn attention_bwd_sm90(arch: Arch) -> Vec<Defines> {
    let deterministic = |defines: &Defines| [defines.clone(), vec![("DETERMINISTIC", "")]].concat();
    let plain = attention_sm90(arch);
    plain.iter().map(deterministic).chain(plain.iter().cloned()).collect()
}
