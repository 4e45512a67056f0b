use burn::tensor::DType;

use super::*;
use crate::expert_act::{self, ExpertActivation};
use crate::host::tests::noise;
use crate::quantized::{Absmax, QuantizedData, QuantizedFormat};
use crate::routing::{self, RoutingForm};
use crate::{Device, Params, ParamsBuilder, QuantizedWeight, Weight, from_f32, to_f32};

fn matrix(seed: u64, dims: [usize; 2]) -> Tensor<2> {
    from_f32(noise(seed, dims[0] * dims[1]), dims, &Device::cpu(), DType::F32)
}

fn dispatch(chosen: &[u32], experts: usize, top_k: usize) -> Dispatch {
    Dispatch::of(chosen, experts, top_k, &Device::cpu())
}

/// An expert with many rows, one with a single row, two without any.
fn uneven() -> Dispatch {
    dispatch(&[0, 4, 0, 2, 4, 0, 0, 4], 5, 2)
}

/// The sum over an expert's rows in f64, of `a_row · b_row` elements.
fn naive_nt(x: &[f32], w: &[f32], [n, k]: [usize; 2], dispatch: &Dispatch, by_token: bool) -> Vec<f64> {
    let host = dispatch.to_host();
    let expert_of = host.chosen();
    let mut y = Vec::new();
    for &selection in &host.sorted {
        let expert = expert_of[selection as usize] as usize;
        let row = if by_token { selection as usize / dispatch.top_k() } else { y.len() / n };
        for i in 0..n {
            let terms = (0..k).map(|j| f64::from(x[row * k + j]) * f64::from(w[(expert * n + i) * k + j]));
            y.push(terms.sum());
        }
    }
    y
}

fn assert_close(got: &[f32], want: &[f64], terms: usize) {
    assert_eq!(got.len(), want.len());
    let bound = terms as f64 * 2f64.powi(-23) + 1e-6;
    for (got, want) in got.iter().zip(want) {
        assert!((f64::from(*got) - want).abs() <= bound, "{got} {want}");
    }
}

#[test]
fn products_match_plain_loops_on_every_path() {
    let [n, k] = [6, 9];
    // Nine experts for four tokens: each is computed by one thread where there are two.
    for dispatch in [uneven(), dispatch(&[8, 7, 6, 5, 4, 3, 2, 1], 9, 2), dispatch(&[1, 0], 2, 2)] {
        let w = matrix(1, [dispatch.experts() * n, k]);
        let (rows, tokens) = (matrix(2, [dispatch.rows(), k]), matrix(3, [dispatch.tokens(), k]));
        let dy = matrix(4, [dispatch.rows(), n]);
        let weights = to_f32(w.clone());
        for (x, by_token) in [(GroupedRows::Sorted(&rows), false), (GroupedRows::Tokens(&tokens), true)] {
            let want = naive_nt(&to_f32(x.tensor().clone()), &weights, [n, k], &dispatch, by_token);
            assert_close(&to_f32(nt(x, &w, &dispatch)), &want, k);
            assert_close(&to_f32(Backend::portable_only(|| nt(x, &w, &dispatch))), &want, k);
            let wide = matrix(5, [dispatch.rows(), n + 3]);
            let old = to_f32(wide.clone());
            let sum: Vec<f64> = (0..dispatch.rows() * (n + 3))
                .map(|i| {
                    let (row, column) = (i / (n + 3), i % (n + 3));
                    f64::from(old[i])
                        + if column < 2 || column >= n + 2 { 0.0 } else { 0.5 * want[row * n + column - 2] }
                })
                .collect();
            assert_close(&to_f32(nt_add(wide.clone(), 2, 0.5, x, &w, &dispatch)), &sum, k);
            let portable = Backend::portable_only(|| nt_add(wide.clone(), 2, 0.5, x, &w, &dispatch));
            assert_close(&to_f32(portable), &sum, k);
        }
        // dy · W against W read the other way round.
        let turned: Vec<f32> = weights
            .chunks_exact(n * k)
            .flat_map(|w| (0..n * k).map(|i| w[i % n * k + i / n]).collect::<Vec<_>>())
            .collect();
        let want = naive_nt(&to_f32(dy.clone()), &turned, [k, n], &dispatch, false);
        let dy_rows = GroupedRows::Sorted(&dy);
        assert_close(&to_f32(nn(dy_rows, &w, &dispatch)), &want, n);
        assert_close(&to_f32(Backend::portable_only(|| nn(dy_rows, &w, &dispatch))), &want, n);
        let sum: Vec<f64> =
            to_f32(rows.clone()).iter().zip(&want).map(|(x, product)| f64::from(*x) - 2.0 * product).collect();
        assert_close(&to_f32(nn_add(rows.clone(), -2.0, dy_rows, &w, &dispatch)), &sum, 2 * n);
    }
}

#[test]
fn gradients_of_matrices_are_those_of_their_rows() {
    let ([n, k], dispatch) = ([6, 9], uneven());
    let mut builder = ParamsBuilder::new(&Device::cpu(), DType::F32);
    builder.push("before", &[3], false, &[0.0; 3]);
    let at = builder.push("w", &[5 * n, k], true, &vec![0.0; 5 * n * k]);
    let params = builder.build();
    let (x, dy) = (matrix(2, [dispatch.tokens(), k]), matrix(4, [dispatch.rows(), n]));
    let host = dispatch.to_host();
    let (xs, dys) = (to_f32(x.clone()), to_f32(dy.clone()));
    let mut want = vec![0.0; 5 * n * k];
    for (row, &selection) in host.sorted.iter().enumerate() {
        let (expert, token) = (host.chosen()[selection as usize] as usize, selection as usize / 2);
        for i in 0..n * k {
            want[expert * n * k + i] += 3.0 * f64::from(dys[row * n + i / k]) * f64::from(xs[token * k + i % k]);
        }
    }
    let run = || {
        let mut grads = params.zero_grads();
        grads.add_grouped_tn(at, 1.0, GroupedRows::Sorted(&dy), GroupedRows::Tokens(&x), &dispatch);
        grads.add_grouped_tn(at, 2.0, GroupedRows::Sorted(&dy), GroupedRows::Tokens(&x), &dispatch);
        grads.values(at)
    };
    assert_close(&run(), &want, 12);
    assert_close(&Backend::portable_only(run), &want, 12);
    assert!(run()[n * k..2 * n * k].iter().all(|&g| g == 0.0), "expert 1 has no rows");
}

/// Packing relies on it.
#[test]
fn a_row_does_not_depend_on_which_rows_are_beside_it() {
    for [n, k] in [[4, 40], [96, 40], [40, 512]] {
        let experts = 3;
        let w = matrix(1, [experts * n, k]);
        let x = matrix(2, [210, k]);
        let chosen: Vec<u32> = (0..210).map(|token| u32::from(token % 7 == 0) + u32::from(token == 77)).collect();
        let of_all = dispatch(&chosen, experts, 1);
        let by_token = |y: Tensor<2>, dispatch: &Dispatch| to_f32(routing::sum_slots(&y, dispatch, None));
        let whole = by_token(nt(GroupedRows::Tokens(&x), &w, &of_all), &of_all);
        let dy = matrix(3, [210, n]);
        let back = by_token(nn(GroupedRows::Tokens(&dy), &w, &of_all), &of_all);
        // 76..79 are one token of each expert; 77 is the only one of its expert anyway.
        for tokens in [76..79, 0..2, 3..100, 77..79] {
            let part = dispatch(&chosen[tokens.clone()], experts, 1);
            let y = nt(GroupedRows::Tokens(&x.rows(tokens.start, tokens.len())), &w, &part);
            assert_eq!(by_token(y, &part), whole[tokens.start * n..tokens.end * n], "{tokens:?} of {n} × {k}");
            let dx = nn(GroupedRows::Tokens(&dy.rows(tokens.start, tokens.len())), &w, &part);
            assert_eq!(by_token(dx, &part), back[tokens.start * k..tokens.end * k], "{tokens:?} of {n} × {k}");
        }
    }
}

#[test]
fn quantized_experts_are_their_decoded_matrices() {
    let ([n, k], dispatch) = ([10, 32], uneven());
    let elements = 5 * n * k;
    let bytes: Vec<u8> = noise(7, elements / 2).iter().map(|x| (x * 127.0) as i8 as u8).collect();
    let table = noise(8, 16).try_into().expect("16 values");
    let absmax = Absmax::Single(noise(9, elements / 32));
    let format = QuantizedFormat::FourBit { codes: bytes, table, blocksize: 32, absmax };
    let quantized = QuantizedWeight::new(QuantizedData { dims: [5 * n, k], format }, &Device::cpu());
    let dense = Weight::Frozen(quantized.decode(DType::F32));
    let quantized = Weight::Quantized(quantized);
    let params = Params::none(&Device::cpu(), DType::F32);
    let (x, dy) = (matrix(2, [dispatch.tokens(), k]), matrix(4, [dispatch.rows(), n]));
    let dx = matrix(5, [dispatch.rows(), k]);
    let run = |weight: &Weight| {
        let y = weight.grouped_nt(&params, GroupedRows::Tokens(&x), &dispatch);
        let one = weight.grouped_nn(&params, GroupedRows::Sorted(&dy), None, &dispatch);
        let two = weight.grouped_nn(&params, GroupedRows::Sorted(&dy), Some(dx.clone()), &dispatch);
        [y, one, two].map(to_f32)
    };
    let portable = Backend::portable_only(|| run(&quantized));
    for ((got, portable), want) in run(&quantized).iter().zip(&portable).zip(run(&dense)) {
        let want: Vec<f64> = want.into_iter().map(f64::from).collect();
        assert_close(got, &want, k);
        assert_close(portable, &want, k);
    }
}

/// A whole mixture against Burn's operations: the weights act before the last product, and their gradient comes from there.
#[test]
fn weights_before_the_last_product_weigh_its_results() {
    let [tokens, experts, top_k, width, hidden] = [5, 4, 2, 3, 6];
    let logits = matrix(1, [tokens, experts]);
    let routed = routing::forward(logits, top_k, RoutingForm::SoftmaxTopK { normalize: false });
    let (d, w) = (&routed.dispatch, &routed.weights);
    let gate_up = matrix(2, [d.rows(), 2 * width]);
    let down = matrix(3, [experts * hidden, width]);
    let act = expert_act::forward(&gate_up, w, d, ExpertActivation::Silu);
    let y = to_f32(routing::sum_slots(&nt(GroupedRows::Sorted(&act), &down, d), d, None));
    // Without weights, and then weighted row by row.
    let ones = from_f32(vec![1.0; tokens * top_k], [tokens, top_k], &Device::cpu(), DType::F32);
    let plain = expert_act::forward(&gate_up, &ones, d, ExpertActivation::Silu);
    let rows = to_f32(nt(GroupedRows::Sorted(&plain), &down, d));
    let (host, weights) = (d.to_host(), to_f32(w.clone()));
    let mut want = vec![0.0; tokens * hidden];
    for (row, &selection) in host.sorted.iter().enumerate() {
        for i in 0..hidden {
            let term = f64::from(weights[selection as usize]) * f64::from(rows[row * hidden + i]);
            want[selection as usize / top_k * hidden + i] += term;
        }
    }
    assert_close(&y, &want, 2 * width);
    // ⟨dy, row⟩ is the gradient to the weight.
    let dy = matrix(4, [tokens, hidden]);
    let dact = nn(GroupedRows::Tokens(&dy), &down, d);
    let grads = expert_act::backward(dact, gate_up, w, d, ExpertActivation::Silu);
    let dys = to_f32(dy);
    let mut dw = vec![0.0; tokens * top_k];
    for (row, &selection) in host.sorted.iter().enumerate() {
        let token = selection as usize / top_k;
        let terms = (0..hidden).map(|i| f64::from(dys[token * hidden + i]) * f64::from(rows[row * hidden + i]));
        dw[selection as usize] = terms.sum();
    }
    assert_close(&to_f32(grads.weights), &dw, 4 * hidden);
    assert_eq!(to_f32(grads.act), to_f32(act));
}
