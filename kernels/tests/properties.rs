//! Properties that hold for any values.

mod common;

use burn::tensor::{DType, Tensor as BurnTensor};
use common::attention::Attention;
use common::linear_cross_entropy::LinearCrossEntropy;
use common::{F32_FLOOR, Layout, Oracle, Place, grad, noise, properties, widened};
use rekindle_kernels::dropout::{self, Dropout, Token, Tokens};
use rekindle_kernels::gated_activation::{self, Activation};
use rekindle_kernels::{Backend, Device, ParamsBuilder, RngKey, Tensor, from_f32, to_f32};

const F32: DType = DType::F32;

/// Runs a test on both paths.
fn on_both_paths(test: impl Fn()) {
    test();
    Backend::portable_only(test);
}

fn cpu() -> Place {
    Place::new(Device::cpu(), F32, Layout::Owned)
}

#[test]
fn a_document_does_not_reach_its_neighbours() {
    on_both_paths(|| properties::documents_do_not_reach_their_neighbours(cpu, 24));
}

#[test]
fn later_tokens_do_not_reach_earlier_ones() {
    on_both_paths(|| properties::later_tokens_do_not_reach_earlier_ones(cpu, 24));
}

#[test]
fn documents_without_tokens_change_nothing() {
    on_both_paths(|| properties::documents_without_tokens_change_nothing(cpu, 8));
}

#[test]
fn lonely_tokens_see_themselves() {
    on_both_paths(|| properties::lonely_tokens_see_themselves(cpu, 24));
}

/// Plain heads, and every option of attention. Lengths are below, at and above whole pages and blocks of queries.
fn paged_cases() -> Vec<Attention> {
    let lengths = [1, 16, 17, 75, 150];
    let case = |heads, kv_heads, head_dim| Attention::new(&lengths, heads, kv_heads, head_dim, F32);
    vec![
        case(1, 1, 1),
        case(4, 2, 24),
        case(4, 4, 8).window(1),
        case(6, 2, 33).window(20),
        case(4, 1, 16).softcap(3.0).sinks(),
        case(4, 2, 16).window(16).softcap(2.0).sinks(),
    ]
}

#[test]
fn attention_over_pages_is_that_of_whole_documents() {
    for case in paged_cases() {
        on_both_paths(|| {
            let place = |layout| Place::new(Device::cpu(), F32, layout);
            common::paged_attention::check(&case, F32, F32_FLOOR, place);
        });
    }
}

/// Sampling relies on it: the tokens of a request do not depend on its neighbours, nor on how its prompt was split.
#[test]
fn attention_over_pages_has_the_same_bits_in_any_batch() {
    for case in paged_cases() {
        let bits = |schedule| {
            let o = common::paged_attention::run(&case, &cpu(), schedule);
            o.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        let schedules = common::paged_attention::schedules(&case);
        let whole = bits(&schedules[0]);
        for schedule in &schedules[1..] {
            assert_eq!(bits(schedule), whole, "{case:?} in {} calls", schedule.len());
        }
    }
}

#[test]
fn copied_pages_part() {
    on_both_paths(|| common::paged_attention::copied_pages_part(cpu));
}

/// Runs twice on the CPU.
#[test]
fn values_in_place_come_out_the_same_again() {
    properties::values_in_place_are_those_of_the_cpu(&Device::cpu());
}

#[test]
fn gradients_that_are_not_finite_change_nothing() {
    on_both_paths(|| properties::gradients_that_are_not_finite_change_nothing(&Device::cpu()));
}

#[test]
fn gated_activations_saturate_without_nan() {
    on_both_paths(|| {
        let row = |values: [f32; 4]| cpu().matrix(&values, [1, 4]);
        for activation in [Activation::Silu, Activation::GeluTanh] {
            // The cube of the last overflows.
            let (gate, up) = (row([-1e14, -100.0, 100.0, 1e14]), row([2.0, -3.0, 2.0, -3.0]));
            let act = gated_activation::forward(activation, &gate, &up, 0);
            assert_eq!(flushed(act), [0.0, 0.0, 200.0, -3e14], "{activation:?}");
            let (dgate, dup, _) = gated_activation::backward(activation, row([1.0; 4]), gate, up);
            assert_eq!(flushed(dgate), [0.0, 0.0, 2.0, -3.0], "{activation:?}");
            assert_eq!(flushed(dup), [0.0, 0.0, 100.0, 1e14], "{activation:?}");
        }
    });
}

/// Clamped gates and ups keep their value and get no gradient; those at the bound do.
#[test]
fn what_is_clamped_gets_no_gradient() {
    on_both_paths(|| {
        let row = |values: [f32; 4]| cpu().matrix(&values, [1, 4]);
        let clamped = Activation::ClampedSwiglu { alpha: 0.0, limit: 7.0 };
        let (gate, up) = (row([8.0, 7.0, -9.0, 2.0]), row([1.0, -8.0, 7.0, 9.0]));
        let act = gated_activation::forward(clamped, &gate, &up, 0);
        // The sigmoid of 0 is ½.
        assert_eq!(to_f32(act), [7.0, -21.0, -36.0, 8.0]);
        let (dgate, dup, _) = gated_activation::backward(clamped, row([1.0; 4]), gate, up);
        assert_eq!(to_f32(dgate), [0.0, -3.0, 4.0, 4.0]);
        assert_eq!(to_f32(dup), [3.5, 0.0, -4.5, 0.0]);
    });
}

/// Flushes tiny values to zero: with the exponential clamped at e^±88, silu(−10¹⁴) is up to −6e-25.
fn flushed(tensor: Tensor<2>) -> Vec<f32> {
    to_f32(tensor).into_iter().map(|x| if x.abs() < 1e-24 { 0.0 } else { x }).collect()
}

#[test]
fn the_norm_of_gradients() {
    // Three chunks of 16,384 and values of very different sizes.
    let values: Vec<f32> = noise(1, 40_000).iter().enumerate().map(|(i, x)| x * 10f32.powi(i as i32 % 7 - 3)).collect();
    let truth = values.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
    let naive = f64::from(values.iter().map(|g| g * g).sum::<f32>().sqrt());
    let norm = || {
        let mut builder = ParamsBuilder::new(&Device::cpu(), F32);
        let at = builder.push("w", &[40, 1000], true, &vec![0.0; 40_000]);
        let mut grads = builder.build().zero_grads();
        grads.add(at, from_f32(values.clone(), [40, 1000], &Device::cpu(), F32));
        grads.norm()
    };
    // A sum of n squares in f64: n units of 2⁻⁵³ at most, half of that after the root.
    assert!((norm() - truth).abs() <= 40_000.0 * 2f64.powi(-54) * truth);
    let portable = Backend::portable_only(norm);
    assert!((portable - truth).abs() <= 2.0 * (naive - truth).abs() + F32_FLOOR * truth, "{portable} not {truth}");
    assert_eq!(ParamsBuilder::new(&Device::cpu(), F32).build().zero_grads().norm(), 0.0);
}

#[test]
fn dropout_is_linear() {
    let tokens: Vec<Token> = (0..37).map(|t| Token { row: t / 20, position: t % 20 }).collect();
    let tokens = Tokens::new(tokens, &Device::cpu());
    let key = Dropout { p: 0.375, key: RngKey { seed: 11, step: 3 }, tokens: &tokens };
    let shape = [37, 29];
    let (x, dy) = (noise(1, 37 * 29), noise(2, 37 * 29));
    let apply = |values: &[f32]| to_f32(dropout::apply(&cpu().matrix(values, shape), key, 5));
    let mask = apply(&[1.0; 37 * 29]);
    assert!(mask.iter().all(|&m| m == 0.0 || m == 1.6), "1 / (1 − 0.375) = 1.6");
    assert!(mask.contains(&0.0) && mask.contains(&1.6));
    let by_mask: Vec<f32> = x.iter().zip(&mask).map(|(x, m)| x * m).collect();
    assert_eq!(apply(&x), by_mask);

    let oracle = Oracle::new(F32);
    let leaf = oracle.leaf(&x, shape);
    let y = BurnTensor::from(dropout::apply(&leaf.clone().into(), key, 5));
    let grads = (y * oracle.constant(&dy, shape)).sum().backward();
    let by_hand: Vec<f64> = widened(apply(&dy));
    assert_eq!(grad(&leaf, &grads), by_hand, "the gradient is the same function");

    let low: Tensor<2> = from_f32(x.clone(), shape, &Device::cpu(), DType::BF16);
    let kept = to_f32(dropout::apply(&low, key, 5));
    assert!(kept.iter().zip(&by_mask).all(|(a, b)| (*a == 0.0) == (*b == 0.0)), "the dtype does not move the mask");
    assert_eq!(to_f32(dropout::apply(&cpu().matrix(&x, shape), Dropout { p: 0.0, ..key }, 5)), x);
}

#[test]
fn the_same_input_gives_the_same_bits() {
    properties::the_same_input_gives_the_same_bits(&Attention::new(&[150, 61], 4, 2, 24, F32), cpu);
    let case = LinearCrossEntropy::new([90, 33, 70], F32, |t| t % 4 != 2);
    properties::the_same_input_gives_the_same_bits(&case, cpu);
}
