//! Routing over slices; the formulas stand in [`super`].

use std::sync::Arc;

use burn::tensor::Tensor as BurnTensor;
use rayon::prelude::*;

use super::dispatch::DispatchPlace;
use super::{Dispatch, HostDispatch, RoutingForm};
use crate::Tensor;
use crate::host::exp::{exp_shifted, sigmoid};
use crate::host::{ROWS, View, for_rows, from_vec};

pub(super) fn forward(logits: &BurnTensor<2>, top_k: usize, form: RoutingForm) -> (Tensor<2>, Dispatch) {
    let [tokens, experts] = logits.dims();
    let view = View::of(logits);
    let logits = view.as_slice();
    let chosen = choose(logits, experts, top_k);
    let mut weights = vec![0.0; tokens * top_k];
    for_rows(
        &mut weights,
        top_k,
        #[inline(always)]
        |first, rows| {
            let mut scores = vec![0.0; experts];
            for (token, row) in (first..).zip(rows.chunks_exact_mut(top_k)) {
                let logits = &logits[token * experts..][..experts];
                let chosen = &chosen[token * top_k..][..top_k];
                weigh(logits, chosen, form, &mut scores, row);
            }
        },
    );
    let host = HostDispatch::of(&chosen, experts);
    let dispatch = Dispatch::new(tokens, experts, top_k, DispatchPlace::Host(Arc::new(host)));
    (from_vec(weights, [tokens, top_k]).into(), dispatch)
}

/// The experts with the largest logits of every token, `[tokens · top_k]`, in falling order.
pub(super) fn choose(logits: &[f32], experts: usize, top_k: usize) -> Vec<u32> {
    let mut chosen = vec![0_u32; logits.len() / experts * top_k];
    chosen.par_chunks_mut(ROWS * top_k).zip(logits.par_chunks(ROWS * experts)).for_each(|(chosen, logits)| {
        let mut free = vec![0.0; experts];
        for (chosen, logits) in chosen.chunks_exact_mut(top_k).zip(logits.chunks_exact(experts)) {
            free.copy_from_slice(logits);
            for slot in chosen {
                let mut best = 0;
                for (expert, value) in free.iter().enumerate().skip(1) {
                    // `total_cmp` gives NaN a place, so that the choice is one of the experts whatever the logits are.
                    if value.total_cmp(&free[best]).is_gt() {
                        best = expert;
                    }
                }
                *slot = best as u32;
                free[best] = -f32::NAN;
            }
        }
    });
    chosen
}

/// The weights of one token's experts. `scores` is scratch memory.
#[inline(always)]
fn weigh(logits: &[f32], chosen: &[u32], form: RoutingForm, scores: &mut [f32], weights: &mut [f32]) {
    let of_chosen = |scores: &[f32], weights: &mut [f32]| {
        for (weight, &expert) in weights.iter_mut().zip(chosen) {
            *weight = scores[expert as usize];
        }
    };
    let sum = match form {
        RoutingForm::Sigmoid => {
            of_chosen(logits, weights);
            return weights.iter_mut().for_each(|weight| *weight = sigmoid(*weight));
        }
        RoutingForm::TopKSoftmax => {
            of_chosen(logits, weights);
            exp_shifted(weights).1
        }
        RoutingForm::SoftmaxTopK { normalize } => {
            scores.copy_from_slice(logits);
            let (_, all) = exp_shifted(scores);
            of_chosen(scores, weights);
            // The sum over all experts cancels where the weights are divided by their own.
            if normalize { weights.iter().sum() } else { all }
        }
    };
    weights.iter_mut().for_each(|weight| *weight /= sum);
}

pub(super) fn backward(
    logits: Option<&BurnTensor<2>>,
    weights: &BurnTensor<2>,
    dispatch: &Dispatch,
    form: RoutingForm,
    dweights: &BurnTensor<2>,
) -> BurnTensor<2> {
    let (tokens, experts, top_k) = (dispatch.tokens(), dispatch.experts(), dispatch.top_k());
    let chosen = dispatch.host().chosen();
    let logits = logits.map(View::of);
    let logits = logits.as_ref().map(View::as_slice);
    let [weights, dweights] = [weights, dweights].map(View::of);
    let (weights, dweights) = (weights.as_slice(), dweights.as_slice());
    let mut dlogits = vec![0.0; tokens * experts];
    for_rows(
        &mut dlogits,
        experts,
        #[inline(always)]
        |first, rows| {
            for (token, row) in (first..).zip(rows.chunks_exact_mut(experts)) {
                let slots = token * top_k..(token + 1) * top_k;
                let (w, dw, chosen) = (&weights[slots.clone()], &dweights[slots.clone()], &chosen[slots]);
                let mean: f32 = w.iter().zip(dw).map(|(w, dw)| w * dw).sum();
                if let Some(logits) = logits {
                    row.copy_from_slice(&logits[token * experts..][..experts]);
                    let (_, sum) = exp_shifted(row);
                    row.iter_mut().for_each(|p| *p = *p / sum * -mean);
                }
                for ((&w, &dw), &expert) in w.iter().zip(dw).zip(chosen) {
                    row[expert as usize] = match form {
                        RoutingForm::Sigmoid => w * (1.0 - w) * dw,
                        _ => w * (dw - mean),
                    };
                }
            }
        },
    );
    from_vec(dlogits, [tokens, experts])
}

pub(super) fn sum_slots(y: &BurnTensor<2>, dispatch: &Dispatch, onto: Option<&BurnTensor<2>>) -> BurnTensor<2> {
    let ([_, width], top_k) = (y.dims(), dispatch.top_k());
    let tokens = dispatch.tokens();
    let rows = &dispatch.host().rows;
    let (y, onto) = (View::of(y), onto.map(View::of));
    let (y, onto) = (y.as_slice(), onto.as_ref().map(View::as_slice));
    let mut sums = vec![0.0; tokens * width];
    for_rows(
        &mut sums,
        width,
        #[inline(always)]
        |first, out| {
            for (token, sum) in (first..).zip(out.chunks_exact_mut(width)) {
                for &row in &rows[token * top_k..][..top_k] {
                    let y = &y[row as usize * width..][..width];
                    sum.iter_mut().zip(y).for_each(|(sum, y)| *sum += y);
                }
                if let Some(onto) = onto {
                    sum.iter_mut().zip(&onto[token * width..]).for_each(|(sum, onto)| *sum += onto);
                }
            }
        },
    );
    from_vec(sums, [tokens, width])
}
