//! Blocks of GGUF files, MXFP4 and fp8.

#[path = "fp8.rs"]
pub(super) mod fp8;

use rekindle::{GgufExport, GgufFileType};
use rekindle_gguf::GgmlType;
use rekindle_hub::Dtype;
use rekindle_kernels::quantized::{BlockCodec, QuantizedData, QuantizedFormat};
use rekindle_kernels::{DType, Device, QuantizedWeight, from_f32, to_f32};
use rekindle_lora::LoraConfig;
use rekindle_models::{Batch, CausalLm, LoadOptions, open_checkpoint, unpack_gguf};
use rekindle_tests::{Golden, assert_nll, goldens, relative_distance};

/// Bound of gradients on CUDA, relative to those on the CPU.
const GRADIENTS: f64 = 1e-4;

/// Every format decodes to the values of its codec, to the bit in f32 and rounded once in 16 bits.
pub(super) fn decoding(device: &Device) {
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for kind in GgmlType::SUPPORTED.into_iter().filter(|kind| kind.is_quantized()) {
        let codec = codec(kind);
        // The last has several thread blocks, the last of which is not full.
        for [rows, columns] in [[1, 1], [5, 3], [33, 37]].map(|[rows, blocks]| [rows, blocks * codec.elements]) {
            let bytes = blocks(kind, rows * columns / codec.elements, &mut random);
            let mut expected = vec![0.0; rows * columns];
            (codec.decode)(&bytes, &mut expected);
            let data = QuantizedData { dims: [rows, columns], format: QuantizedFormat::Blocks { bytes, codec } };
            let weight = QuantizedWeight::new(data.clone(), device);
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let rounded = to_f32(from_f32(expected.clone(), [rows, columns], device, dtype));
                let got = to_f32(weight.decode(dtype));
                let differ = got.iter().zip(&rounded).position(|(got, want)| got.to_bits() != want.to_bits());
                if let Some(at) = differ {
                    panic!(
                        "{kind} [{rows}, {columns}] in {dtype:?}: element {at} is {} instead of {}",
                        got[at], rounded[at]
                    );
                }
            }
            assert!(*weight.data() == data, "{kind}: the blocks come back unchanged");
            assert_eq!(weight.bytes(), data.bytes());
        }
    }
}

/// Models over kept blocks, of linears and of experts, compute as on the CPU.
pub(super) fn models(device: &Device) {
    let [dense, experts] = ["llama-bias", "families/qwen2-moe"].map(|name| goldens().join(name));
    let ids: Vec<u32> = (0..40).map(|at| at * 37 % 80 + 3).collect();
    let labels: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
    let batch = Batch::from_rows([(ids.as_slice(), labels.as_slice())], 0);
    for (base, file_type) in [
        (&dense, GgufFileType::Q8_0),
        (&dense, GgufFileType::Q4_0),
        (&dense, GgufFileType::Q4_1),
        (&dense, GgufFileType::IQ4_NL),
        (&experts, GgufFileType::Q8_0),
    ] {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        let written = GgufExport::new(base).name("tiny").write(scratch.path(), &[file_type], &mut |_, _| ());
        let file = written.expect("it is supported")[0].paths[0].clone();
        unpack_gguf(&file, scratch.path()).expect("it is supported");
        let checkpoint = open_checkpoint(scratch.path()).expect("it was just written");
        let [cpu, ours] = [&Device::cpu(), device].map(|device| {
            let options = LoadOptions::new(device.clone(), DType::F32, 128);
            let mut model = CausalLm::load(&checkpoint, &options, &mut |_| ()).expect("it loads");
            model.add_adapter(&LoraConfig::new(4)).expect("a valid configuration");
            model
        });
        assert_eq!(ours.memory_report(), cpu.memory_report(), "{file_type}: blocks stay");
        let [want, got] = [&cpu, &ours].map(|model| model.nll(&batch).expect("it fits"));
        let off = want.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let error = relative_distance(&gradient(&ours, &batch), &gradient(&cpu, &batch));
        println!("{} {file_type}: losses off by {off:.1e}, gradients by {error:.1e}", base.display());
        assert!(off <= 1e-4 && error <= GRADIENTS);
    }
}

/// gpt-oss over MXFP4, against transformers, and the gradients of adapters on its experts against the CPU.
pub(super) fn experts_in_mxfp4(device: &Device) {
    let golden = Golden::open("families/gpt-oss/mxfp4");
    let batch = golden.packed();
    let mut model = golden.load_with(|options| options.device = device.clone());
    assert_nll("base", &batch, &model.nll(&batch).expect("golden rows fit"), &golden.base_losses());
    for adapter in golden.adapters() {
        model = golden.load_with(|options| options.device = device.clone());
        model.load_adapter(&golden.dir.join("adapters").join(&adapter)).expect("a golden adapter loads");
        let nll = model.nll(&batch).expect("golden rows fit");
        assert_nll(&adapter, &batch, &nll, &golden.adapter_losses(&adapter));
        let error = relative_distance(&gradient(&model, &batch), &gradient(&golden.load_adapted(&adapter), &batch));
        println!("{adapter}: gradients off by {error:.1e}");
        assert!(error <= GRADIENTS, "{adapter}: the gradient is off by {error:e}");
    }
}

fn gradient(model: &CausalLm, batch: &Batch) -> Vec<f32> {
    let mut grads = model.params().zero_grads();
    model.forward_backward(batch, 0.01, &mut grads, None).expect("it fits").sum();
    grads.all_values()
}

fn codec(kind: GgmlType) -> BlockCodec {
    let Dtype::Blocks(format) = kind.dtype() else { unreachable!("{kind} is quantized") };
    let decode = format.decode.expect("supported types have a decoder");
    BlockCodec { name: format.name, elements: format.elements, bytes: format.bytes, decode }
}

/// Returns random blocks whose f16 factors are smaller than 2, some of them subnormal.
fn blocks(kind: GgmlType, count: usize, random: &mut u64) -> Vec<u8> {
    let factors: &[usize] = match kind {
        GgmlType::MXFP4 => &[],
        GgmlType::Q2_K => &[80, 82],
        GgmlType::Q3_K => &[108],
        GgmlType::Q6_K => &[208],
        GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4_K | GgmlType::Q5_K => &[0, 2],
        _ => &[0],
    };
    let mut next = || {
        *random ^= *random << 13;
        *random ^= *random >> 7;
        *random ^= *random << 17;
        (*random >> 32) as u8
    };
    let mut bytes: Vec<u8> = (0..count * kind.block_bytes()).map(|_| next()).collect();
    for block in bytes.chunks_exact_mut(kind.block_bytes()) {
        factors.iter().for_each(|at| block[at + 1] &= !0x40);
    }
    bytes
}
