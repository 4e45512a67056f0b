//! The portable path in bf16 and f16: no result is further from the truth (`f64`, from the same rounded
//! inputs) than twice the plain computation in that dtype is.

mod common;

use burn::tensor::DType;
use common::attention::Attention;
use common::causal_conv::CausalConv;
use common::center::Center;
use common::embedding::Embedding;
use common::gated_activation::{ACTIVATIONS, GatedActivation};
use common::gated_delta::GatedDelta;
use common::gated_norm::GatedNorm;
use common::linear::Linear;
use common::linear_cross_entropy::LinearCrossEntropy;
use common::output_gate::OutputGate;
use common::rms_norm::{AddedNorm, Form, RmsNorm};
use common::rope::Rope;
use common::{Case, LOW_DTYPES, Layout, Place, judge};
use rekindle_kernels::Device;

fn check<C: Case>(case: impl Fn(DType) -> C) {
    for (dtype, rounding) in LOW_DTYPES {
        let case = case(dtype);
        let (truth, naive) = (case.naive(DType::F64), case.naive(dtype));
        for layout in [Layout::Owned, Layout::Shared, Layout::Columns, Layout::Transposed] {
            let place = Place::new(Device::cpu(), dtype, layout);
            let what = format!("{case:?} {dtype:?} {layout:?}");
            judge(&what, &case.ours(&place), &naive, &truth, 2.0, rounding);
            place.assert_unchanged();
        }
    }
}

#[test]
fn linear() {
    check(|dtype| Linear::new([3, 5, 7], dtype));
    check(|dtype| Linear::new([40, 33, 65], dtype));
}

#[test]
fn rms_norm() {
    for form in Form::ALL {
        check(|dtype| RmsNorm::with(form, [5, 24], false, dtype));
        check(|dtype| RmsNorm::with(form, [40, 129], true, dtype));
        check(|dtype| AddedNorm::new(form, [40, 129], dtype));
    }
    for form in [Form::Plain, Form::RoundedAfter, Form::OnePlus] {
        check(|dtype| RmsNorm::with(form, [5, 24], false, dtype).wide());
        check(|dtype| RmsNorm::with(form, [40, 129], true, dtype).wide());
        check(|dtype| AddedNorm::new(form, [40, 129], dtype).wide());
    }
}

#[test]
fn center() {
    check(|dtype| Center::new([40, 129], dtype));
}

#[test]
fn rope() {
    check(|dtype| Rope::new([9, 3, 24], 16, false, dtype));
    check(|dtype| Rope::new([21, 2, 64], 64, true, dtype));
    check(|dtype| Rope::new([21, 2, 64], 64, true, dtype).form(Form::OnePlus));
    check(|dtype| Rope::new([9, 3, 24], 16, false, dtype).interleaved());
}

#[test]
fn gated_activation() {
    for activation in ACTIVATIONS {
        check(|dtype| GatedActivation::new(activation, [3, 7], dtype));
        check(|dtype| GatedActivation::new(activation, [40, 33], dtype));
    }
}

#[test]
fn attention_over_pages() {
    for (dtype, rounding) in LOW_DTYPES {
        for case in [
            Attention::new(&[1, 16, 40], 4, 2, 24, dtype),
            Attention::new(&[50, 17], 4, 1, 16, dtype).window(20).softcap(3.0).sinks(),
        ] {
            let place = |layout| Place::new(Device::cpu(), dtype, layout);
            common::paged_attention::check(&case, dtype, rounding, place);
        }
    }
}

#[test]
fn attention() {
    check(|dtype| Attention::new(&[7, 1, 30], 4, 2, 24, dtype));
    check(|dtype| Attention::new(&[130], 2, 1, 64, dtype));
    check(|dtype| Attention::new(&[130], 2, 1, 64, dtype).window(50).softcap(3.0).sinks());
}

#[test]
fn gated_delta() {
    check(|dtype| CausalConv::new(&[2, 1, 30], 7, 4, dtype));
    check(|dtype| GatedDelta::new(&[3, 70], [1, 2], [8, 6], dtype));
    check(|dtype| GatedNorm::new([40, 3, 16], dtype));
    check(|dtype| OutputGate::new([37, 4, 16], dtype));
}

#[test]
fn embedding() {
    check(|dtype| Embedding::new(11, 7, &[3, 10, 3, 0, 3, 9], dtype));
}

#[test]
fn linear_cross_entropy() {
    check(|dtype| LinearCrossEntropy::new([9, 5, 13], dtype, |_| true));
    check(|dtype| LinearCrossEntropy::new([41, 33, 70], dtype, |t| t % 3 != 1));
    check(|dtype| LinearCrossEntropy::new([41, 33, 70], dtype, |_| true).capped(0.7, Some(3.0)).weighted());
}
