//! Tests the statistics of `lora_dropout` through an adapter that is the identity.
//!
//! `splits.rs` tests that the mask is the same in recomputation and in any split, and that evaluation has no dropout.

use rekindle_kernels::dropout::{Dropout, Token, Tokens};
use rekindle_kernels::{DType, Device, Params, ParamsBuilder, RngKey, Weight, from_f32, to_f32};
use rekindle_lora::{Linear, LinearContext, LinearGroup, LoraFactors, LoraInit};

const WIDTH: usize = 64;
const TOKENS: usize = 2000;

/// Returns two linears with the same input. With `through_adapter` W is zero and B·A the identity, otherwise vice
/// versa.
fn group(through_adapter: bool) -> (LinearGroup, Params) {
    let device = Device::cpu();
    let identity: Vec<f32> = (0..WIDTH * WIDTH).map(|at| f32::from(u8::from(at / WIDTH == at % WIDTH))).collect();
    let zeros = vec![0.0; WIDTH * WIDTH];
    let (w, b) = if through_adapter { (zeros, identity.clone()) } else { (identity.clone(), zeros) };
    let linear =
        |name: &str| Linear::new(name, Weight::Frozen(from_f32(w.clone(), [WIDTH, WIDTH], &device, DType::F32)), None);
    let mut group = LinearGroup::new(vec![linear("q_proj"), linear("k_proj")]);
    let mut params = ParamsBuilder::new(&device, DType::F32);
    group.adapt(&mut params, 0, |_| {
        let factors = LoraFactors { r: WIDTH, a: identity.clone(), b: b.clone(), magnitude: None };
        LoraInit { factors: Some((factors, 1.0)), bias: None }
    });
    (group, params.build())
}

/// Returns the outputs of the linears for an input of ones.
fn results(through_adapter: bool, p: f32, step: u32) -> Vec<Vec<f32>> {
    let (group, params) = group(through_adapter);
    let tokens = (0..TOKENS as u32).map(|t| Token { row: t / 50, position: t % 50 }).collect();
    let tokens = Tokens::new(tokens, &Device::cpu());
    let x = from_f32(vec![1.0; TOKENS * WIDTH], [TOKENS, WIDTH], &Device::cpu(), DType::F32);
    let dropout = Dropout { p, key: RngKey { seed: 7, step }, tokens: &tokens };
    let (ys, _) = group.forward(LinearContext::new(&params).with_dropout(Some(dropout)), &x);
    ys.into_iter().map(to_f32).collect()
}

/// Returns five standard deviations of the fraction of `n` draws.
fn five_sigma(p: f64, n: usize) -> f64 {
    5.0 * (p * (1.0 - p) / n as f64).sqrt()
}

#[test]
fn elements_are_kept_with_the_right_probability_and_scaled() {
    for p in [0.05f32, 0.1, 0.375, 0.5, 0.9] {
        let (keep, scale) = (1.0 - f64::from(p), 1.0 / (1.0 - p));
        let ys = results(true, p, 3);
        assert_eq!(ys[0], ys[1], "linears of a group share a mask");
        let y = &ys[0];
        assert!(y.iter().all(|&y| y == 0.0 || (y / scale - 1.0).abs() < 1e-6), "p {p}: 0 or 1 / (1 − p)");
        let kept = |values: &mut dyn Iterator<Item = &f32>| values.filter(|y| **y != 0.0).count() as f64;
        let rate = kept(&mut y.iter()) / y.len() as f64;
        let mean = y.iter().map(|y| f64::from(*y)).sum::<f64>() / y.len() as f64;
        println!("p {p}: {rate:.5} kept of {keep:.5}, mean {mean:.5}; 5σ {:.5}", five_sigma(keep, y.len()));
        assert!((rate - keep).abs() < five_sigma(keep, y.len()), "p {p}: {rate} kept");
        assert!((mean - 1.0).abs() < five_sigma(keep, y.len()) / keep + 1e-6, "p {p}: the mean of ones is {mean}");
        // Every channel and every token is dropped equally often.
        for channel in 0..WIDTH {
            let rate = kept(&mut y.iter().skip(channel).step_by(WIDTH)) / TOKENS as f64;
            assert!((rate - keep).abs() < five_sigma(keep, TOKENS), "p {p}: channel {channel} keeps {rate}");
        }
        let spread = y.chunks_exact(WIDTH).map(|token| (kept(&mut token.iter()) / WIDTH as f64 - keep).powi(2));
        let variance = spread.sum::<f64>() / TOKENS as f64 / (keep * (1.0 - keep) / WIDTH as f64);
        // The sum of squares of 2,000 nearly normal numbers has the standard deviation √(2 / 2,000) = 0.032.
        assert!((variance - 1.0).abs() < 0.16, "p {p}: tokens vary by {variance} of what independent elements would");
    }
}

#[test]
fn steps_drop_independently() {
    let (p, keep) = (0.375, 0.625);
    let both =
        results(true, p, 3)[0].iter().zip(&results(true, p, 4)[0]).filter(|(a, b)| **a != 0.0 && **b != 0.0).count();
    let rate = both as f64 / (TOKENS * WIDTH) as f64;
    assert!((rate - keep * keep).abs() < five_sigma(keep * keep, TOKENS * WIDTH), "{rate} are kept in both steps");
}

#[test]
fn the_base_has_no_dropout() {
    assert!(results(false, 0.5, 3).iter().flatten().all(|&y| y == 1.0), "dropout applies only to the input of A");
}
