//! The operations on wgpu, forward and backward, against the same truth as the CPU's.
//!
//! Arguments are parts of the names of cases to run, such as `attention`; without one, all run.
//!
//! A binary of its own: without an adapter it says so instead of passing. `REKINDLE_REQUIRE_WGPU=1` makes
//! that a failure. It prefers a software adapter (Debian's `mesa-vulkan-drivers`), which every machine can have.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use burn::tensor::{DType, Device as BurnDevice, DeviceKind, DeviceType};
use common::attention::Attention;
use common::causal_conv::CausalConv;
use common::center::Center;
use common::embedding::Embedding;
use common::gated_activation::{ACTIVATIONS, GatedActivation};
use common::gated_delta::GatedDelta;
use common::gated_norm::GatedNorm;
use common::linear::Linear;
use common::linear_cross_entropy::LinearCrossEntropy;
use common::optimizer::{By, RULES, Steps, some_steps};
use common::output_gate::OutputGate;
use common::quantized::{Kind, Packed};
use common::rms_norm::{AddedNorm, Form, RmsNorm};
use common::rope::Rope;
use common::{Case, Layout, Place, judge};
use rekindle_kernels::Device;
use rekindle_kernels::optimizer::{StateFormat, UpdateRule};

const F32: DType = DType::F32;

/// The factor of the house rule.
const FACTOR: f64 = 2.0;

/// Twelve units in the last place of the largest value, instead of the CPU's four: Vulkan lets `exp` be off
/// by 3 + 2·|x| units. Measured on Mesa 22.3's llvmpipe: at most 6.2 (dgate of SwiGLU with gates up to 8).
const FLOOR: f64 = 3.0 * common::F32_FLOOR;

fn main() -> ExitCode {
    let Some(device) = adapter() else {
        println!("not run: no Vulkan adapter");
        let required = std::env::var_os("REKINDLE_REQUIRE_WGPU").is_some_and(|value| value == "1");
        return if required { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    };
    if let Some(identity) = device.identity() {
        println!("on {} ({})", identity.name, identity.fingerprint);
    }
    let mut tally = Tally { only: std::env::args().skip(1).collect(), ..Tally::default() };
    let device = device.into();
    let mut check = |case: &dyn Case| tally.add(case, &device);

    check(&Linear::new([3, 5, 7], F32));
    check(&Linear::new([129, 33, 65], F32));
    for kind in Kind::ALL {
        check(&Packed::new([3, 5, 7], kind, F32));
        check(&Packed::new([4, 96, 130], kind, F32));
    }
    check(&Center::new([70, 129], F32));
    check(&RmsNorm::new([3, 5], false, F32));
    check(&RmsNorm::new([70, 129], true, F32));
    check(&RmsNorm::with(Form::OnePlus, [70, 129], true, F32));
    check(&AddedNorm::new(Form::OnePlus, [70, 129], F32));
    check(&Rope::new([5, 3, 6], 6, false, F32));
    check(&Rope::new([37, 2, 24], 16, true, F32));
    check(&Rope::new([37, 2, 24], 16, true, F32).form(Form::OnePlus).interleaved());
    for activation in ACTIVATIONS {
        check(&GatedActivation::new(activation, [3, 7], F32));
        check(&GatedActivation::new(activation, [130, 127], F32));
    }
    check(&Attention::new(&[17, 1, 30], 4, 2, 24, F32));
    check(&Attention::new(&[2, 150], 4, 1, 64, F32));
    check(&Attention::new(&[2, 150], 4, 1, 64, F32).window(40).softcap(3.0).sinks());
    check(&Attention::new(&[33, 1, 40], 6, 2, 73, F32).window(33));
    check(&Attention::new(&[35], 2, 2, 128, F32).softcap(3.0));
    // Wider than the kernels take.
    check(&Attention::new(&[5, 9], 2, 1, 136, F32));
    check(&CausalConv::new(&[2, 1, 30], 7, 4, F32));
    check(&GatedDelta::new(&[3, 70], [1, 2], [8, 6], F32));
    check(&GatedNorm::new([40, 3, 16], F32));
    check(&OutputGate::new([37, 4, 16], F32));
    check(&Embedding::new(11, 7, &[3, 10, 3, 0, 3, 9], F32));
    check(&LinearCrossEntropy::new([9, 5, 13], F32, |t| t % 3 != 1));
    check(&LinearCrossEntropy::new([41, 33, 70], F32, |_| true));
    check(&LinearCrossEntropy::new([5, 3, 7], F32, |_| false));
    check(&LinearCrossEntropy::new([41, 33, 70], F32, |t| t % 3 != 1).capped(0.7, Some(3.0)).weighted());
    for rule in RULES {
        let params = &[(7, true), (30, false), (2000, true)];
        check(&Steps { rule, params, weight_decay: 0.1, max_grad_norm: None });
    }

    for rule in RULES {
        tally.add_blocks(rule, &device);
    }

    println!("{} passed, {} failed", tally.passed, tally.failed);
    if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The software adapter, or the first other one.
fn adapter() -> Option<BurnDevice> {
    let found = BurnDevice::enumerate(DeviceType::Wgpu).into_vec();
    let software = BurnDevice::wgpu(DeviceKind::Cpu);
    if found.contains(&software) { Some(software) } else { found.into_iter().next() }
}

#[derive(Default)]
struct Tally {
    only: Vec<String>,
    passed: usize,
    failed: usize,
}

impl Tally {
    /// 8-bit states are changed on the host: the bits of the CPU. The small parameter and all of SGD without momentum have
    /// an f32 state, which [`Steps`] is for.
    fn add_blocks(&mut self, rule: UpdateRule, device: &Device) {
        if !self.only.is_empty() {
            return;
        }
        let of = |device: &Device| {
            let (_, state) = some_steps(device, rule, StateFormat::Blockwise8, By::All);
            state.into_iter().filter(|tensor| !tensor.name.starts_with("p2.")).collect::<Vec<_>>()
        };
        if of(device) == of(&Device::cpu()) {
            println!("ok      states in blocks, {rule:?}");
            self.passed += 1;
        } else {
            println!("FAILED  states in blocks, {rule:?}");
            self.failed += 1;
        }
    }

    fn add(&mut self, case: &dyn Case, device: &Device) {
        let name = format!("{case:?}");
        if !self.only.is_empty() && !self.only.iter().any(|part| name.contains(part)) {
            return;
        }
        let (truth, naive) = (case.naive(DType::F64), case.naive(F32));
        for layout in [Layout::Owned, Layout::Shared, Layout::Columns, Layout::Transposed] {
            let what = format!("{name} {layout:?}");
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                let place = Place::new(device.clone(), F32, layout);
                let worst = judge(&what, &case.ours(&place), &naive, &truth, FACTOR, FLOOR);
                place.assert_unchanged();
                worst
            }));
            match outcome {
                Ok(worst) => {
                    println!("ok      {what}: {worst:.1} × the CPU's plain error");
                    self.passed += 1;
                }
                Err(_) => {
                    println!("FAILED  {what}");
                    self.failed += 1;
                }
            }
        }
    }
}
