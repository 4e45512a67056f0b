//! Attention, over documents and over pages.

use burn::tensor::DType;
use rekindle_kernels::Device;
use rekindle_kernels::runtime::{Arch, Cuda, SOURCES};

use super::common::attention::Attention;
use super::common::{LOW_DTYPES, Place, paged_attention, properties};
use super::{ALL_DTYPES, F32, FLOOR, Lost, Suite, owned};

/// Compiles the attention kernels on all processors, instead of one after another when they are used.
fn compile_attention(cuda: &Cuda) {
    let arch = Arch::new(cuda.props().major, cuda.props().minor);
    let files = SOURCES.iter().filter(|source| source.file.contains("attention_"));
    let mut variants: Vec<_> =
        files.flat_map(|source| (source.variants)(arch).into_iter().map(|v| (source.file, v))).collect();
    // What runs without tensor cores below.
    for (dtype, head_dim) in
        [("f32", "24"), ("bf16", "24"), ("f16", "24"), ("f32", "64"), ("f32", "128"), ("f32", "256")]
    {
        for count in 0..4 {
            let options = [("WINDOW", ""), ("SOFTCAP", ""), ("SINKS", "")].into_iter().take(count);
            variants.push((
                "attention_f32.cu",
                [("T", dtype), ("HEAD_DIM", head_dim)].into_iter().chain(options).collect(),
            ));
        }
    }
    let specs: Vec<_> = variants.iter().map(|(file, defines)| (*file, defines.as_slice())).collect();
    cuda.prepare(&specs);
}

pub(crate) fn attentions(suite: &mut Suite) -> Result<(), Lost> {
    if "attention".contains(&suite.filter) || suite.filter.contains("attention") {
        compile_attention(&suite.cuda);
    }
    // Tiles have 16, 64 or 128 rows: documents shorter than one, as long as one, and longer. A batch of single tokens is
    // below: its true gradients to q and k are zero, and so are the plain formula's, which leaves no measure of error.
    let batches: [(&[usize], usize, usize); 5] =
        [(&[1, 1, 5], 2, 2), (&[17, 1, 30], 4, 2), (&[33, 16], 4, 1), (&[128, 129], 2, 1), (&[2, 300, 3], 4, 2)];
    for head_dim in [24, 64, 128, 256] {
        for (lengths, heads, kv_heads) in batches {
            suite.dtypes(|dtype| Attention::new(lengths, heads, kv_heads, head_dim, dtype))?;
        }
        // Windows of one key, inside a tile, as long as one, over several, and as long as a document and longer. With a
        // window of 1 the gradients to q and k are zero unless there is a sink.
        let long = |dtype| Attention::new(&[2, 500, 65], 4, 2, head_dim, dtype);
        suite.dtypes(|dtype| long(dtype).window(1).softcap(50.0).sinks())?;
        for window in [2, 63, 64, 128, 200, 499, 500, 501] {
            suite.dtypes(|dtype| long(dtype).window(window))?;
        }
        for softcap in [1.0, 50.0] {
            suite.dtypes(|dtype| long(dtype).window(300).softcap(softcap).sinks())?;
        }
        if head_dim == 64 {
            suite.dtypes(|dtype| long(dtype).softcap(2.0))?;
            suite.dtypes(|dtype| long(dtype).sinks())?;
        }
        suite.dtypes(|dtype| Attention::new(&[1, 1, 5], 2, 2, head_dim, dtype).window(2).softcap(3.0).sinks())?;
        suite.dtypes(|dtype| Attention::new(&[300, 129], 8, 1, head_dim, dtype).window(100).softcap(3.0).sinks())?;
        for dtype in ALL_DTYPES {
            let place = |device: &Device| owned(device, dtype);
            let named = |what: &str| format!("attention: {what}, heads of {head_dim} {dtype:?}");
            suite.property(&named("documents without tokens change nothing"), |device| {
                properties::documents_without_tokens_change_nothing(|| place(device), head_dim);
            })?;
            suite.property(&named("lonely tokens see themselves"), |device| {
                properties::lonely_tokens_see_themselves(|| place(device), head_dim);
            })?;
            suite.property(&named("later tokens do not reach earlier ones"), |device| {
                properties::later_tokens_do_not_reach_earlier_ones(|| place(device), head_dim);
            })?;
        }
    }
    Ok(())
}

pub(crate) fn paged_attentions(suite: &mut Suite) -> Result<(), Lost> {
    // Whole prompts, parts of prompts and single tokens, in pages and shares of a block that are full and that are not.
    let lengths = [1, 16, 17, 75, 700];
    for head_dim in [24, 64, 128, 256] {
        for dtype in ALL_DTYPES {
            let floor = LOW_DTYPES.into_iter().find(|(low, _)| *low == dtype).map_or(FLOOR, |(_, rounding)| rounding);
            let case = |heads, kv_heads| Attention::new(&lengths, heads, kv_heads, head_dim, dtype);
            let cases = [
                case(4, 4),
                case(4, 2).window(1),
                case(7, 1).window(20),
                case(8, 2).softcap(3.0).sinks(),
                case(20, 1).window(300).softcap(2.0).sinks(),
            ];
            for case in cases {
                suite.property(&format!("paged attention: {case:?} {dtype:?}"), |device| {
                    let place = |layout| Place::new(device.clone(), dtype, layout);
                    paged_attention::check(&case, dtype, floor, place);
                })?;
            }
        }
    }
    for dtype in [F32, DType::BF16] {
        suite.property(&format!("paged attention: copied pages part {dtype:?}"), |device| {
            paged_attention::copied_pages_part(|| owned(device, dtype));
        })?;
    }
    Ok(())
}
