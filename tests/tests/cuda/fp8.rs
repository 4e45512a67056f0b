//! fp8 weights.

use rekindle_hub::{Checkpoint, Dtype};
use rekindle_kernels::quantized::{Fp8Scaling, QuantizedData, QuantizedFormat};
use rekindle_kernels::{DType, Device, QuantizedWeight, to_f32};
use rekindle_tests::{Golden, Trajectory, assert_nll};

use crate::{ADAPTER, CUDA_F32, on};

pub(crate) fn all(device: &Device) {
    decoding(device);
    models(device);
}

/// Every code and every kind of scales decodes to the CPU's values, to the bit, stacked weights and odd widths included.
fn decoding(device: &Device) {
    for [section, cols] in [[1, 1], [7, 13], [130, 264], [300, 1000], [257, 129]] {
        for parts in [1, 3] {
            for scaling in [Fp8Scaling::Tensor, Fp8Scaling::Row, Fp8Scaling::Block] {
                let rows = parts * section;
                let codes: Vec<u8> =
                    (0..rows * cols).map(|i: usize| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
                let codes =
                    codes.into_iter().map(|code| if code & 0x7f == 0x7f { code & 0xf0 } else { code }).collect();
                let scales =
                    (0..parts * scaling.scales([section, cols])).map(|i| 0.01 + (i as f32 * 0.7).sin()).collect();
                let format = QuantizedFormat::Fp8 { codes, scales, scaling, section };
                let data = QuantizedData { dims: [rows, cols], format };
                let [ours, cpu] = [device, &Device::cpu()].map(|device| QuantizedWeight::new(data.clone(), device));
                for dtype in [DType::F32, DType::BF16, DType::F16] {
                    let same = to_f32(ours.decode(dtype)) == to_f32(cpu.decode(dtype));
                    assert!(same, "{parts} × {section} × {cols}, {scaling:?}, {dtype:?}");
                }
                assert!(*ours.data() == data);
            }
        }
    }
}

/// Losses of every layout, checkpoints saved as they were read, and twelve steps of an adapter.
fn models(device: &Device) {
    for name in ["block", "block-ue8m0", "tensor-static", "fbgemm", "channel", "compressed-block"] {
        let golden = Golden::open(&format!("fp8/{name}"));
        let (model, batch) = (on(device, &golden), golden.packed());
        assert_nll(name, &batch, &model.nll(&batch).expect("golden rows fit"), &golden.base_losses());
        let out = tempfile::tempdir().expect("a temporary directory");
        model.save(out.path(), Dtype::F32).expect("the disk has space");
        let all = |dir: &std::path::Path| {
            let checkpoint = Checkpoint::open(dir).expect("a checkpoint opens");
            let names: Vec<String> = checkpoint.names().map(str::to_owned).collect();
            names.into_iter().map(|name| checkpoint.get(&name).expect("listed").data.to_vec()).collect::<Vec<_>>()
        };
        assert!(all(out.path()) == all(&golden.dir), "{name}: fp8 tensors are saved unchanged");
    }
    for name in ["fp8/block", "fp8/channel"] {
        let golden = Golden::open(name);
        let mut model = on(device, &golden);
        model.load_adapter(&golden.dir.join("adapters/all-linear")).expect("a golden adapter loads");
        let trajectory = Trajectory::open(&golden.dir.join("train/lora"));
        trajectory.check_within(CUDA_F32, name, &golden, &mut model, ADAPTER);
    }
}
