//! Every hand-written forward and backward in `f32` on the CPU, on both paths and in every layout, against
//! Burn's autodiff of the plain formula: the error against `f64` is at most twice that of the plain `f32`
//! computation (see `common::judge`).

mod common;

use burn::tensor::DType::F32;
use common::attention::Attention;
use common::causal_conv::{self, CausalConv};
use common::center::Center;
use common::embedding::Embedding;
use common::experts::{Activation, Clamped, Probabilities, Router};
use common::fp8::Fp8Stack;
use common::gated_activation::{ACTIVATIONS, GatedActivation};
use common::gated_delta::{self, GatedDelta};
use common::gated_norm::GatedNorm;
use common::grouped::Grouped;
use common::linear::Linear;
use common::linear_cross_entropy::LinearCrossEntropy;
use common::optimizer::{By, RULES, Steps, some_steps};
use common::output_gate::OutputGate;
use common::quantized::{Kind, Packed};
use common::rms_norm::{AddedNorm, Form, RmsNorm};
use common::rope::Rope;
use common::{Layout, Place, check, check_in};
use rekindle_kernels::fp8::Fp8Products;
use rekindle_kernels::optimizer::StateFormat;
use rekindle_kernels::routing::RoutingForm;
use rekindle_kernels::{Backend, Device};

#[test]
fn linear() {
    // Below and above the size from which threads share a product, split by rows and by columns.
    for sizes in [[1, 1, 1], [3, 5, 7], [1, 200, 40], [129, 33, 65], [100, 49, 70], [33, 250, 48]] {
        check(&Linear::new(sizes, F32));
    }
}

#[test]
fn packed() {
    // Odd widths put block borders and nibbles anywhere in a row; the last is several scratches long on the CPU.
    for kind in Kind::ALL {
        for sizes in [[1, 1, 1], [3, 5, 7], [2, 33, 65], [33, 64, 40]] {
            check(&Packed::new(sizes, kind, F32));
        }
        check_in(&Packed::new([4, 700, 1001], kind, F32), &[Layout::Owned]);
    }
}

#[test]
fn fp8_products() {
    let cases: [(&[(usize, usize)], _); 3] =
        [(&[(16, 0)], [3, 48]), (&[(48, 0), (16, 0), (32, 0)], [7, 80]), (&[(256, 0)], [33, 160])];
    for (linears, size) in cases {
        check(&Fp8Stack::new(size, linears, Fp8Products::ForwardAndBackward, F32).without_factors());
    }
}

#[test]
fn rms_norm() {
    // Rows are handed out by 32, channels summed by 16.
    for shape in [[1, 2], [3, 5], [33, 16], [64, 40], [70, 129]] {
        for form in Form::ALL {
            check(&RmsNorm::with(form, shape, false, F32));
            check(&RmsNorm::with(form, shape, true, F32));
            check(&AddedNorm::new(form, shape, F32));
        }
    }
}

#[test]
fn rope() {
    for (shape, rotary_dim) in [([1, 1, 2], 2), ([5, 3, 6], 6), ([37, 2, 24], 16), ([33, 4, 64], 64), ([7, 5, 10], 2)] {
        check(&Rope::new(shape, rotary_dim, false, F32));
        check(&Rope::new(shape, rotary_dim, true, F32));
        check(&Rope::new(shape, rotary_dim, false, F32).interleaved());
        check(&Rope::new(shape, rotary_dim, true, F32).form(Form::OnePlus));
        check(&Rope::new(shape, rotary_dim, true, F32).form(Form::RoundedAfter).interleaved());
        check(&Rope::new(shape, 0, true, F32));
    }
}

#[test]
fn gated_activation() {
    // The last is more than one chunk of 16,384 elements.
    for shape in [[1, 1], [3, 7], [40, 33], [130, 127]] {
        for activation in ACTIVATIONS {
            check(&GatedActivation::new(activation, shape, F32));
        }
    }
}

#[test]
fn attention() {
    // Blocks hold 128 queries: 128 fills one, 129 and 300 need more.
    check(&Attention::new(&[1], 1, 1, 1, F32));
    check(&Attention::new(&[1, 1, 5], 2, 2, 24, F32));
    check(&Attention::new(&[17, 1, 30], 4, 2, 24, F32));
    check(&Attention::new(&[33, 16], 4, 1, 64, F32));
    check_in(&Attention::new(&[128, 129], 2, 1, 24, F32), &[Layout::Owned, Layout::Columns]);
    check_in(&Attention::new(&[2, 300, 3], 4, 2, 64, F32), &[Layout::Owned, Layout::Columns]);
}

#[test]
fn attention_with_a_window() {
    // Windows that end inside a block of queries, at a document's end and beyond it. With a window of 1 the gradients to
    // q and k are zero unless there is a sink, which leaves no measure of error.
    let two = || Attention::new(&[17, 1, 30], 4, 2, 24, F32);
    check(&Attention::new(&[1, 1, 5], 2, 2, 24, F32).window(2));
    check(&two().window(1).sinks());
    for window in [3, 29, 30, 31] {
        check(&two().window(window));
    }
    for window in [2, 100, 128, 299] {
        check_in(&Attention::new(&[2, 300, 3], 4, 2, 64, F32).window(window), &[Layout::Owned, Layout::Columns]);
    }
}

#[test]
fn attention_with_a_softcap_and_sinks() {
    // Scores are in (−4, 4): the first cap bends nearly all of them, the last nearly none.
    for softcap in [1.0, 3.0, 50.0] {
        check(&Attention::new(&[17, 1, 30], 4, 2, 24, F32).softcap(softcap));
    }
    check(&Attention::new(&[1], 1, 1, 1, F32).sinks());
    check(&Attention::new(&[1, 1, 5], 2, 2, 24, F32).sinks());
    check(&Attention::new(&[33, 16], 4, 1, 64, F32).sinks());
    let all = Attention::new(&[128, 129], 2, 1, 24, F32).window(50).softcap(3.0).sinks();
    check_in(&all, &[Layout::Owned, Layout::Columns]);
    check_in(&Attention::new(&[2, 300, 3], 4, 2, 256, F32).softcap(3.0).sinks(), &[Layout::Owned, Layout::Columns]);
}

#[test]
fn causal_conv() {
    // Rows are handed out by 32: documents end inside a block, at its end and in the next one, and are shorter than the taps.
    for lengths in [&[1][..], &[2, 1, 3, 4, 5], &[32, 31, 33], &[70, 1]] {
        for (channels, width) in [(1, 4), (7, 4), (33, 3)] {
            check(&CausalConv::new(lengths, channels, width, F32));
        }
    }
    for place in [false, true] {
        let run = || causal_conv::rows_continue_a_document(&Device::cpu(), F32);
        if place { Backend::portable_only(run) } else { run() }
    }
}

#[test]
fn gated_delta() {
    // Chunks have 64 tokens.
    check(&GatedDelta::new(&[1], [1, 1], [1, 1], F32));
    check(&GatedDelta::new(&[1, 2, 5], [1, 2], [3, 5], F32));
    check_in(&GatedDelta::new(&[63, 64, 1, 65], [2, 4], [8, 6], F32), &[Layout::Owned, Layout::Columns]);
    check_in(&GatedDelta::new(&[130, 7], [1, 3], [16, 24], F32), &[Layout::Owned, Layout::Shared]);
    check_in(&GatedDelta::new(&[200], [2, 4], [128, 128], F32), &[Layout::Owned]);
    for place in [false, true] {
        let run = || gated_delta::states_continue_a_document(&Device::cpu(), F32, [16, 8], 2e-5);
        if place { Backend::portable_only(run) } else { run() }
    }
}

#[test]
fn gated_norm() {
    for shape in [[2, 3, 4], [3, 2, 5], [40, 3, 16], [33, 2, 129]] {
        check(&GatedNorm::new(shape, F32));
    }
}

#[test]
fn output_gate() {
    for shape in [[1, 1, 1], [3, 2, 5], [37, 4, 16]] {
        check(&OutputGate::new(shape, F32));
    }
}

#[test]
fn embedding() {
    check(&Embedding::new(1, 1, &[0], F32));
    check(&Embedding::new(11, 7, &[3, 10, 3, 0, 3, 9], F32));
    check(&Embedding::new(50, 33, &(0..70).map(|t| t * t % 50).collect::<Vec<_>>(), F32));
}

#[test]
fn linear_cross_entropy() {
    let counted: [fn(usize) -> bool; 6] = [|_| true, |t| t >= 3, |t| t < 6, |t| t % 3 != 1, |t| t == 4, |_| false];
    for counts in counted {
        check(&LinearCrossEntropy::new([9, 5, 13], F32, counts));
        check(&LinearCrossEntropy::new([41, 33, 70], F32, counts));
    }
    check(&LinearCrossEntropy::new([1, 1, 1], F32, |_| true));
}

#[test]
fn linear_cross_entropy_with_weights_multiplier_and_softcap() {
    let counted: [fn(usize) -> bool; 3] = [|_| true, |t| t % 3 != 1, |_| false];
    for counts in counted {
        for (multiplier, softcap) in [(1.0, None), (0.375, None), (1.0, Some(5.0)), (0.7, Some(3.0))] {
            check(&LinearCrossEntropy::new([9, 5, 13], F32, counts).capped(multiplier, softcap).weighted());
            check(&LinearCrossEntropy::new([41, 33, 70], F32, counts).capped(multiplier, softcap).weighted());
        }
    }
}

#[test]
fn log_probs_of_known_logits() {
    let place = || Place::new(Device::cpu(), F32, Layout::Owned);
    common::linear_cross_entropy::log_probs_of_known_logits(&place());
    Backend::portable_only(|| common::linear_cross_entropy::log_probs_of_known_logits(&place()));
}

#[test]
fn linear_cross_entropy_in_several_chunks() {
    // From 65,537 entries on a chunk is 64 rows: 150 rows are three chunks, 130 counted ones too.
    for counts in [|_| true, |t: usize| t % 10 > 1 || t > 130] {
        check_in(&LinearCrossEntropy::new([150, 8, 65_600], F32, counts), &[Layout::Owned]);
        let capped = LinearCrossEntropy::new([150, 8, 65_600], F32, counts).capped(0.5, Some(4.0)).weighted();
        check_in(&capped, &[Layout::Owned]);
    }
}

#[test]
fn grouped_products() {
    for (rows, sizes) in [(&[1][..], [1, 1]), (&[3, 0, 5], [5, 7]), (&[0, 1, 33, 0], [40, 24]), (&[70, 64], [33, 65])] {
        check(&Grouped::with_rows(rows, sizes, F32));
    }
    check(&Grouped::of_tokens(1, 3, 3, [4, 5], F32));
    check(&Grouped::of_tokens(37, 8, 3, [24, 16], F32));
}

#[test]
fn center() {
    for shape in [[1, 1], [3, 5], [70, 129], [33, 300]] {
        check(&Center::new(shape, F32));
    }
}

#[test]
fn experts() {
    let forms = [
        RoutingForm::SoftmaxTopK { normalize: false },
        RoutingForm::SoftmaxTopK { normalize: true },
        RoutingForm::TopKSoftmax,
        RoutingForm::Sigmoid,
    ];
    for form in forms {
        for (tokens, experts, top_k) in [(3, 5, 2), (33, 8, 8), (70, 40, 4)] {
            check(&Router::new(tokens, experts, top_k, form, F32));
        }
    }
    for (tokens, experts) in [(1, 1), (3, 5), (70, 40)] {
        check(&Probabilities::new(tokens, experts, F32));
    }
    for (tokens, experts, top_k, width) in [(1, 1, 1, 1), (3, 5, 2, 7), (37, 8, 3, 40)] {
        check(&Activation::new(tokens, experts, top_k, width, F32));
        check(&Clamped::new(tokens, experts, top_k, width, F32));
    }
}

#[test]
fn optimizer() {
    let params: &[_] = &[(7, true), (1, true), (30, false), (9, true), (20_000, false), (17_000, true)];
    for rule in RULES {
        for weight_decay in [0.0, 0.1] {
            check_in(&Steps { rule, params, weight_decay, max_grad_norm: None }, &[Layout::Owned]);
            check_in(&Steps { rule, params, weight_decay, max_grad_norm: Some(1.0) }, &[Layout::Owned]);
            check_in(&Steps { rule, params: &[(5, false)], weight_decay, max_grad_norm: None }, &[Layout::Owned]);
        }
    }
}

#[test]
fn optimizer_in_blocks() {
    for rule in RULES {
        let cpu = some_steps(&Device::cpu(), rule, StateFormat::Blockwise8, By::All);
        let portable = Backend::portable_only(|| some_steps(&Device::cpu(), rule, StateFormat::Host8, By::All));
        // What is in blocks has the same bits; the small parameter and all of SGD without momentum are in f32.
        for (ours, theirs) in cpu.1.iter().zip(&portable.1).filter(|(_, theirs)| !theirs.name.starts_with("p2.")) {
            assert_eq!(ours, theirs, "{rule:?}");
        }
        assert_eq!(cpu.1.len(), portable.1.len());
        let worst = cpu.0.iter().zip(&portable.0).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= 4.0 * f32::EPSILON, "{rule:?}: values up to 0.3 differ by {worst:e}");
    }
}

#[test]
fn optimizer_on_values_from_elsewhere() {
    for rule in RULES {
        for format in [StateFormat::F32, StateFormat::Blockwise8] {
            let of = |by| some_steps(&Device::cpu(), rule, format, by);
            assert_eq!(of(By::Parameter), of(By::All), "{rule:?} {format:?}");
            let portable = |by| Backend::portable_only(|| of(by));
            assert_eq!(portable(By::Parameter), portable(By::All), "portable {rule:?} {format:?}");
        }
    }
}
