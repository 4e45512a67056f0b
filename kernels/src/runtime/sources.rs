//! The embedded kernel files: their text, and what they are compiled with.
//!
//! A new file needs one entry in the table; [`super::compile_check`] then compiles every variant of it for every
//! architecture.

use super::attention_tiles::digits;
use super::{Arch, AttentionKernel, PagedTiles, Tiles};

/// A kernel file.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// Its name in `kernels/cu/`.
    pub file: &'static str,
    /// Its entry points.
    pub entries: &'static [&'static str],
    /// Every list of definitions that it is used with on an architecture; none where it is not for it.
    pub variants: fn(Arch) -> Vec<Defines>,
    /// The headers before it, and its own text.
    parts: &'static [&'static str],
}

/// Definitions for the compiler, name and value.
pub type Defines = Vec<(&'static str, &'static str)>;

macro_rules! sources {
    ($($file:literal $(after $($header:literal),+)? with $variants:expr, [$($entry:literal),* $(,)?];)*) => {
        /// All of them.
        pub const SOURCES: &[Source] = &[$(Source {
            file: $file,
            entries: &[$($entry),*],
            variants: $variants,
            parts: &[
                include_str!("../../cu/prelude.cuh"),
                $($(include_str!(concat!("../../cu/", $header)),)+)?
                include_str!(concat!("../../cu/", $file)),
            ],
        }),*];
    };
}

sources! {
    "add_factors.cu" after "mma.cuh", "few_rows.cuh" with add_factors, ["add_factors"];
    "attention_bwd_256_sm90.cu" after "attention_scores.cuh", "sm90.cuh" with attention_bwd_256_sm90, [
        "attention_bwd_dkdv_256_sm90", "attention_bwd_dq_256_sm90"
    ];
    "attention_bwd_dkdv.cu" after "attention_scores.cuh", "mma.cuh", "mma_sync.cuh" with |arch| attention(AttentionKernel::BwdDkdv, arch), [
        "attention_bwd_dkdv"
    ];
    "attention_bwd_dq.cu" after "attention_scores.cuh", "mma.cuh", "mma_sync.cuh" with |arch| attention(AttentionKernel::BwdDq, arch), [
        "attention_bwd_dq"
    ];
    "attention_bwd_sm90.cu" after "attention_scores.cuh", "sm90.cuh" with attention_bwd_sm90, [
        "attention_bwd_delta_sm90", "attention_bwd_dq_sm90", "attention_bwd_sm90"
    ];
    "attention_delta.cu" with any_head_dim, ["attention_delta"];
    "attention_f32.cu" after "attention_scores.cuh" with attention_f32, [
        "attention_bwd_dkdv", "attention_bwd_dq", "attention_fwd"
    ];
    "attention_fwd.cu" after "attention_scores.cuh", "mma.cuh", "mma_sync.cuh" with |arch| attention(AttentionKernel::Fwd, arch), ["attention_fwd"];
    "attention_fwd_sm90.cu" after "attention_scores.cuh", "sm90.cuh" with attention_fwd_sm90, ["attention_fwd_sm90"];
    "attention_sinks.cu" with any_dtype, ["attention_bwd_sinks"];
    "causal_conv.cu" with conv_widths, ["causal_conv_bwd", "causal_conv_fwd"];
    "center.cu" with any_dtype, ["center"];
    "cross_entropy.cu" with with_softcap_and_without, [
        "cross_entropy_bwd", "cross_entropy_fwd", "cross_entropy_fwd_bwd", "cross_entropy_statistics"
    ];
    "dequant.cu" after "chosen_experts.cuh" with any_dtype, [
        "dequant_4bit", "dequant_4bit_double", "dequant_4bit_stacked", "dequant_int8"
    ];
    "dequant_blocks.cu" after "chosen_experts.cuh" with block_formats, ["dequant_blocks"];
    "dequant_fp8.cu" with any_dtype, ["dequant_fp8_block", "dequant_fp8_row", "dequant_fp8_tensor"];
    "dropout.cu" after "philox.cuh" with any_dtype, ["dropout", "neftune"];
    "elementwise.cu" with any_dtype, [
        "add_f32", "cast_bf16", "cast_f16", "cast_f32", "mul",
        "scale", "scale_columns", "scatter_rows"
    ];
    "embedding.cu" with any_dtype, ["embedding_bwd", "embedding_fwd"];
    "expert_act.cu" with any_dtype, [
        "expert_act_bwd", "expert_act_fwd", "expert_clamped_bwd", "expert_clamped_fwd"
    ];
    "few_rows.cu" after "mma.cuh", "few_rows.cuh" with few_rows, ["few_rows"];
    "few_rows_4bit.cu" after "mma.cuh", "few_rows.cuh" with few_rows_4bit, ["few_rows_4bit"];
    "few_rows_4bit_sm90.cu" after "sm90.cuh" with few_rows_4bit_sm90, ["few_rows_4bit_sm90"];
    "fp8_linear_sm90.cu" after "sm90.cuh" with fp8_linear_sm90, ["fp8_linear_sm90"];
    "fp8_rows.cu" after "fp8.cuh" with fp8_rows, ["fp8_rows", "fp8_transpose"];
    "gated_activation.cu" after "gated_activation.cuh" with any_activation, ["gated_activation_bwd", "gated_activation_fwd"];
    "gated_activation_fp8.cu" after "fp8.cuh", "gated_activation.cuh" with gated_activation_fp8, ["gated_activation_fp8_fwd"];
    "magnitude.cu" with any_dtype, ["magnitude_bwd", "magnitude_fwd", "magnitude_gain", "row_norms"];
    "grouped.cu" after "mma.cuh" with grouped, ["grouped"];
    "grouped_grad_sm90.cu" after "sm90.cuh" with grouped_grad_sm90, ["grouped_grad_sm90"];
    "grouped_sm90.cu" after "sm90.cuh" with grouped_sm90, ["grouped_sm90"];
    "gated_delta.cu" after "mma.cuh", "delta_tiles.cuh" with delta_scans, [
        "gated_delta_bwd_scan", "gated_delta_fwd", "gated_delta_prep", "gated_delta_states", "gated_delta_step"
    ];
    "gated_delta_bwd.cu" after "mma.cuh", "delta_tiles.cuh" with delta_grads, ["gated_delta_bwd"];
    "gated_norm.cu" with any_dtype, ["gated_norm_bwd", "gated_norm_fwd"];
    "narrow.cu" after "mma.cuh", "few_rows.cuh" with narrow, ["narrow"];
    "optimizer.cu" with any_dtype, ["adamw", "lion", "sgd", "sum_squares", "sum_squares_finish"];
    "optimizer_8bit.cu" with f32_alone, ["adamw_8bit", "lion_8bit", "sgd_8bit"];
    "output_gate.cu" with any_dtype, ["output_gate_fwd", "output_gate_join", "output_gate_queries"];
    "paged_attention.cu" after "attention_scores.cuh", "mma.cuh", "mma_sync.cuh" with paged_attention, ["paged_chunk", "paged_decode"];
    "paged_attention_plain.cu" after "attention_scores.cuh" with paged_attention_plain, ["paged_attention_plain"];
    "paged_write.cu" with any_dtype, ["paged_write"];
    "param_copies.cu" with any_dtype, ["param_copies"];
    "qk_norm_rope.cu" with qk_norm_rope, [
        "qk_norm_rope_bwd", "qk_norm_rope_bwd_128", "qk_norm_rope_bwd_256", "qk_norm_rope_bwd_64",
        "qk_norm_rope_dw", "qk_norm_rope_dw_128", "qk_norm_rope_dw_256", "qk_norm_rope_dw_64",
        "qk_norm_rope_fwd", "qk_norm_rope_fwd_128", "qk_norm_rope_fwd_256", "qk_norm_rope_fwd_64"
    ];
    "reduce.cu" with any_dtype, ["add", "add_row_bias", "column_sums", "copy_2d", "sum_partials"];
    "rms_norm.cu" with any_gain, [
        "rms_norm_add", "rms_norm_bwd", "rms_norm_dw", "rms_norm_fwd", "rms_norm_recompute"
    ];
    "rms_norm_mixed.cu" with low_dtypes_gain, [
        "rms_norm_mixed_bwd", "rms_norm_mixed_dw", "rms_norm_mixed_fwd", "rms_norm_mixed_recompute", "rms_norm_post_bwd",
        "rms_norm_post_dw"
    ];
    "routing.cu" with any_dtype, [
        "dispatch_count", "dispatch_place", "dispatch_scan", "expert_row_sums", "router_bwd", "router_fwd", "router_pick",
        "router_spread", "sum_slots"
    ];
    "sample.cu" with with_softcap_and_without, ["sample"];
    "step_ids.cu" with f32_alone, ["step_ids"];
    "stochastic.cu" after "philox.cuh" with any_dtype, ["store_4bit", "store_bf16", "store_int8"];
}

/// The block formats that `dequant_blocks.cu` decodes: the name, and the elements and bytes of a block.
pub const BLOCK_FORMATS: [(&str, usize, usize); 12] = [
    ("Q8_0", 32, 34),
    ("Q4_0", 32, 18),
    ("Q4_1", 32, 20),
    ("Q5_0", 32, 22),
    ("Q5_1", 32, 24),
    ("Q2_K", 256, 84),
    ("Q3_K", 256, 110),
    ("Q4_K", 256, 144),
    ("Q5_K", 256, 176),
    ("Q6_K", 256, 210),
    ("IQ4_NL", 32, 18),
    ("MXFP4", 32, 17),
];

/// An entry point of a kernel file. A name that the file does not list does not compile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub(super) file: &'static str,
    pub(super) name: &'static str,
}

impl Entry {
    /// Names an entry point.
    ///
    /// # Panics
    /// If [`SOURCES`] does not list it; in a constant, that is an error of compilation.
    pub const fn new(file: &'static str, name: &'static str) -> Self {
        let mut source = 0;
        while source < SOURCES.len() {
            if same(SOURCES[source].file, file) {
                let entries = SOURCES[source].entries;
                let mut entry = 0;
                while entry < entries.len() {
                    if same(entries[entry], name) {
                        return Self { file, name };
                    }
                    entry += 1;
                }
            }
            source += 1;
        }
        panic!("the file has no such entry point")
    }
}

/// An [`Entry`] by the names of its file and of itself, checked while compiling.
macro_rules! entry {
    ($file:literal, $name:expr) => {
        const { $crate::runtime::Entry::new($file, $name) }
    };
}
pub(crate) use entry;

/// `a == b`, in constants.
const fn same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut i = 0;
    while i < a.len() && i < b.len() && a[i] == b[i] {
        i += 1;
    }
    i == a.len() && i == b.len()
}

impl Source {
    /// The entry of a file.
    pub fn named(file: &str) -> Option<&'static Source> {
        SOURCES.iter().find(|source| source.file == file)
    }

    /// Returns the text for the compiler.
    pub fn text(&self) -> String {
        self.parts.concat()
    }
}

/// `T`, the dtype of activations.
fn any_dtype(arch: Arch) -> Vec<Defines> {
    let dtypes = match arch.sm {
        80.. => &["bf16", "f16", "f32"][..],
        // Compute capability 7.5 has no bf16.
        75.. => &["f16", "f32"],
        _ => &[],
    };
    dtypes.iter().map(|&dtype| vec![("T", dtype)]).collect()
}

/// Every dtype, with logits that are capped and not.
fn with_softcap_and_without(arch: Arch) -> Vec<Defines> {
    let plain = any_dtype(arch);
    let capped = |defines: &Defines| [defines.clone(), vec![("SOFTCAP", "")]].concat();
    plain.iter().map(capped).chain(plain.iter().cloned()).collect()
}

/// Every dtype with each of these values of a definition.
fn any_dtype_with(arch: Arch, name: &'static str, values: &[&'static str]) -> Vec<Defines> {
    let with = |&value| any_dtype(arch).into_iter().map(move |defines| [defines, vec![(name, value)]].concat());
    values.iter().flat_map(with).collect()
}

fn block_formats(arch: Arch) -> Vec<Defines> {
    any_dtype_with(arch, "FORMAT", &BLOCK_FORMATS.map(|(name, ..)| name))
}

/// The dtypes of 16 bits with these values of a definition.
fn low_dtypes_with(arch: Arch, name: &'static str, values: &[&'static str]) -> Vec<Defines> {
    any_dtype_with(arch, name, values).into_iter().filter(|defines| !defines.contains(&("T", "f32"))).collect()
}

fn few_rows(arch: Arch) -> Vec<Defines> {
    let with_warps = low_dtypes_with(arch, "WARPS", &["4", "8"]).into_iter();
    with_warps.map(|defines| [defines, vec![("GROUPS", "1")]].concat()).collect()
}

/// Conversions to e4m3 exist from compute capability 8.9 on.
fn fp8_rows(arch: Arch) -> Vec<Defines> {
    if arch.sm >= 89 { low_dtypes_with(arch, "VECS", &["2", "4", "8", "16"]) } else { Vec::new() }
}

fn gated_activation_fp8(arch: Arch) -> Vec<Defines> {
    if arch.sm >= 89 { low_dtypes_with(arch, "ACTIVATION", &ACTIVATIONS) } else { Vec::new() }
}

fn fp8_linear_sm90(arch: Arch) -> Vec<Defines> {
    if arch.sm == 90 { low_dtypes_with(arch, "FORM", &["0", "1"]) } else { Vec::new() }
}

fn narrow(arch: Arch) -> Vec<Defines> {
    let groups = low_dtypes_with(arch, "GROUPS", &["1", "2"]).into_iter().filter(|_| arch.sm >= 90);
    groups.map(|defines| [defines, vec![("WARPS", "8")]].concat()).collect()
}

fn add_factors(arch: Arch) -> Vec<Defines> {
    let groups = low_dtypes_with(arch, "GROUPS", &["1", "2", "4", "8"]);
    groups.into_iter().map(|defines| [defines, vec![("WARPS", "8")]].concat()).collect()
}

fn few_rows_4bit(arch: Arch) -> Vec<Defines> {
    let shapes = [("1", "10"), ("2", "8"), ("4", "8")];
    let with = |(groups, warps)| {
        let low = low_dtypes_with(arch, "DOUBLE", &["0", "1"]).into_iter();
        low.map(move |defines| [defines, vec![("GROUPS", groups), ("WARPS", warps)]].concat())
    };
    let mut all: Vec<Defines> = shapes.into_iter().flat_map(with).collect();
    all.extend(with(shapes[0]).map(|defines| [defines, vec![("EXPERTS", "")]].concat()));
    all
}

fn few_rows_4bit_sm90(arch: Arch) -> Vec<Defines> {
    let groups = low_dtypes_with(arch, "GROUPS", &["2", "4", "8"]).into_iter().filter(|_| arch.sm == 90);
    crossed(&groups.collect::<Vec<_>>(), &[&[("DOUBLE", "0")], &[("DOUBLE", "1")]])
}

const GAINS: [&str; 4] = ["PLAIN", "ROUNDED_AFTER", "ONE_PLUS", "NO_WEIGHT"];

fn any_gain(arch: Arch) -> Vec<Defines> {
    any_dtype_with(arch, "GAIN", &GAINS)
}

fn low_dtypes_gain(arch: Arch) -> Vec<Defines> {
    low_dtypes_with(arch, "GAIN", &GAINS)
}

/// The combinations that models have.
fn qk_norm_rope(arch: Arch) -> Vec<Defines> {
    let all = [("PLAIN", "HALVES"), ("ONE_PLUS", "HALVES"), ("PLAIN", "INTERLEAVED")];
    let with = |(gain, pairs)| {
        let added = vec![("GAIN", gain), ("PAIRS", pairs)];
        any_dtype(arch).into_iter().map(move |defines| [defines, added.clone()].concat())
    };
    all.into_iter().flat_map(with).collect()
}

const ACTIVATIONS: [&str; 3] = ["SILU", "GELU_TANH", "CLAMPED_SWIGLU"];

fn any_activation(arch: Arch) -> Vec<Defines> {
    any_dtype_with(arch, "ACTIVATION", &ACTIVATIONS)
}

/// Every dtype, with the width that models have.
fn conv_widths(arch: Arch) -> Vec<Defines> {
    any_dtype(arch).into_iter().map(|defines| [defines, vec![("W", "4")]].concat()).collect()
}

/// Every dtype, with the heads that models have and the smallest, and the shares of a head that scans take.
fn delta_scans(arch: Arch) -> Vec<Defines> {
    let shapes = [("128", "128", "2"), ("128", "32", "2"), ("128", "32", "1"), ("16", "16", "2")];
    delta_heads(
        arch,
        &shapes.map(|(dim, columns, stages)| vec![("DK", dim), ("DV", dim), ("DVS", columns), ("STAGES", stages)]),
    )
}

/// The same heads, with whole states in shared memory and without.
fn delta_grads(arch: Arch) -> Vec<Defines> {
    let shapes = [("128", "1"), ("128", "0"), ("16", "1")];
    delta_heads(arch, &shapes.map(|(dim, wide)| vec![("DK", dim), ("DV", dim), ("WIDE", wide)]))
}

fn delta_heads(arch: Arch, shapes: &[Defines]) -> Vec<Defines> {
    let with = |defines: Defines| shapes.iter().map(move |shape| [defines.clone(), shape.clone()].concat());
    any_dtype(arch).into_iter().flat_map(with).collect()
}

/// The variants of a file that does not use `T`.
fn f32_alone(arch: Arch) -> Vec<Defines> {
    if arch.sm >= 75 { vec![vec![("T", "f32")]] } else { Vec::new() }
}

/// Every dtype, with the sizes of heads that models have; 80 stands for the unusual ones.
fn any_head_dim(arch: Arch) -> Vec<Defines> {
    let with =
        |head_dim| any_dtype(arch).into_iter().map(move |defines| [defines, vec![("HEAD_DIM", head_dim)]].concat());
    ["64", "80", "128", "256"].into_iter().flat_map(with).collect()
}

/// Options of `attention_scores.cuh`: the most used one and all together. A backward has none for sinks.
const FWD_SCORES: [&[&str]; 2] = [&["WINDOW"], &["WINDOW", "SOFTCAP", "SINKS"]];
const BWD_SCORES: [&[&str]; 2] = [&["WINDOW"], &["WINDOW", "SOFTCAP"]];

/// Each of `plain` with each of `options`.
fn with_each(plain: &[Defines], options: [&[&'static str]; 2]) -> Vec<Defines> {
    let with = |options: &[&'static str], defines: &Defines| {
        defines.iter().copied().chain(options.iter().map(|&name| (name, ""))).collect()
    };
    plain.iter().flat_map(|defines| options.iter().map(move |options| with(options, defines))).collect()
}

fn attention_f32(arch: Arch) -> Vec<Defines> {
    let all = any_head_dim(arch);
    let unusual: Vec<_> = all.iter().filter(|defines| defines.contains(&("HEAD_DIM", "80"))).cloned().collect();
    [all, with_each(&unusual, FWD_SCORES), with_each(&unusual, BWD_SCORES)].concat()
}

/// The tensor cores' dtypes and sizes of heads.
const TENSOR_CORES: [(&str, u32); 6] =
    [("bf16", 64), ("bf16", 128), ("bf16", 256), ("f16", 64), ("f16", 128), ("f16", 256)];

/// Those of an architecture.
fn tensor_cores(arch: Arch) -> impl Iterator<Item = (&'static str, u32)> {
    TENSOR_CORES.into_iter().filter(move |(dtype, _)| arch.sm >= 80 || (arch.sm == 75 && *dtype == "f16"))
}

fn attention(kernel: AttentionKernel, arch: Arch) -> Vec<Defines> {
    let variants = |options: bool| -> Vec<Defines> {
        let all = tensor_cores(arch);
        all.map(|(dtype, head_dim)| Tiles::of(kernel, head_dim, arch, options).defines(dtype, head_dim)).collect()
    };
    let scores = if kernel == AttentionKernel::Fwd { FWD_SCORES } else { BWD_SCORES };
    [variants(false), with_each(&variants(true), scores)].concat()
}

fn paged_attention(arch: Arch) -> Vec<Defines> {
    let all = tensor_cores(arch);
    let plain: Vec<Defines> =
        all.map(|(dtype, head_dim)| PagedTiles::of(head_dim, arch).defines(dtype, head_dim)).collect();
    [plain.clone(), with_each(&plain, FWD_SCORES)].concat()
}

fn paged_attention_plain(arch: Arch) -> Vec<Defines> {
    let all = any_head_dim(arch);
    let unusual: Vec<_> = all.iter().filter(|defines| defines.contains(&("HEAD_DIM", "80"))).cloned().collect();
    [all, with_each(&unusual, FWD_SCORES)].concat()
}

/// wgmma exists on compute capability 9.0 alone.
fn sm90(arch: Arch, scores: [&[&'static str]; 2], takes: impl Fn(u32) -> bool) -> Vec<Defines> {
    let all = TENSOR_CORES.into_iter().filter(|&(_, head_dim)| arch.sm == 90 && takes(head_dim));
    let plain: Vec<_> = all.map(|(dtype, head_dim)| vec![("T", dtype), ("HEAD_DIM", digits(head_dim))]).collect();
    [plain.clone(), with_each(&plain, scores)].concat()
}

fn attention_fwd_sm90(arch: Arch) -> Vec<Defines> {
    sm90(arch, FWD_SCORES, |_| true)
}

fn attention_bwd_256_sm90(arch: Arch) -> Vec<Defines> {
    sm90(arch, BWD_SCORES, |head_dim| head_dim == 256)
}

fn attention_bwd_sm90(arch: Arch) -> Vec<Defines> {
    let deterministic = |defines: &Defines| [defines.clone(), vec![("DETERMINISTIC", "")]].concat();
    let plain = sm90(arch, BWD_SCORES, |head_dim| head_dim < 256);
    plain.iter().map(deterministic).chain(plain.iter().cloned()).collect()
}

/// Every dtype and form of a grouped product.
fn grouped(arch: Arch) -> Vec<Defines> {
    crossed(&any_dtype(arch), &[&[("FORM", "0")], &[("FORM", "1")], &[("FORM", "2")]])
}

/// The dtypes and widths of the grouped products with wgmma.
fn grouped_widths(arch: Arch) -> Vec<Defines> {
    let dtypes = ["bf16", "f16"].into_iter().filter(|_| arch.sm == 90).map(|dtype| vec![("T", dtype)]);
    crossed(&dtypes.collect::<Vec<_>>(), &[&[("BN", "64")], &[("BN", "256")]])
}

fn grouped_sm90(arch: Arch) -> Vec<Defines> {
    let forms = crossed(&grouped_widths(arch), &[&[("FORM", "0")], &[("FORM", "1")]]);
    crossed(&crossed(&forms, &[&[], &[("ADD", "")]]), &[&[], &[("GATHER", "")]])
}

fn grouped_grad_sm90(arch: Arch) -> Vec<Defines> {
    let mut widths = grouped_widths(arch);
    let alone = |list: &Defines| list.contains(&("BN", "256")).then(|| [list.as_slice(), &[("CLUSTER", "1")]].concat());
    widths.extend(widths.iter().filter_map(alone).collect::<Vec<_>>());
    crossed(&crossed(&widths, &[&[], &[("GATHER_DY", "")]]), &[&[], &[("GATHER_X", "")]])
}

/// Each list followed by each of some others.
fn crossed(lists: &[Defines], more: &[&[(&'static str, &'static str)]]) -> Vec<Defines> {
    let with = |list: &Defines| more.iter().map(|more| [list.as_slice(), more].concat()).collect::<Vec<_>>();
    lists.iter().flat_map(with).collect()
}
