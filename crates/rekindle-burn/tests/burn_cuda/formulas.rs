//! Plain formulas in operations of Burn.

use burn::tensor::{DType, Device, Int, Tensor, TensorData, activation};

pub(crate) fn rms_norm(x: Tensor<3>, gamma: Tensor<1>) -> Tensor<3> {
    let rstd = (x.clone().powi_scalar(2).mean_dim(2) + 1e-5).sqrt().recip();
    x * rstd * gamma.unsqueeze::<3>()
}

/// Rotates both halves of each head; `cos` and `sin` are those of [`tables`].
pub(crate) fn rotate(x: Tensor<3>, head_dim: usize, [cos, sin]: [Tensor<4>; 2]) -> Tensor<3> {
    let ([batch, seq, width], half) = (x.dims(), head_dim / 2);
    let x = x.reshape([batch, seq, width / head_dim, head_dim]);
    let (a, b) = (x.clone().narrow(3, 0, half), x.narrow(3, half, half));
    let y = [a.clone() * cos.clone() - b.clone() * sin.clone(), b * cos + a * sin];
    Tensor::cat(y.to_vec(), 3).reshape([batch, seq, width])
}

/// Cosines and sines `[1, seq, 1, head_dim / 2]`.
pub(crate) fn tables(seq: usize, head_dim: usize, theta: f64, device: &Device, dtype: DType) -> [Tensor<4>; 2] {
    let half = head_dim / 2;
    let frequency = |i: usize| f64::from(theta.powf(-2.0 * i as f64 / head_dim as f64) as f32);
    let angles: Vec<f64> = (0..seq * half).map(|at| (at / half) as f64 * frequency(at % half)).collect();
    [f64::cos, f64::sin].map(|f| {
        let values: Vec<f64> = angles.iter().map(|&angle| f(angle)).collect();
        let values = TensorData::new(values, [1, seq, 1, half]).try_cast(dtype).unwrap();
        Tensor::from_data(values, (device, dtype))
    })
}

/// A mask `[1, 1, seq, seq]` to add to scores.
pub(crate) fn causal(seq: usize, device: &Device, dtype: DType) -> Tensor<4> {
    let mask: Vec<f32> = (0..seq * seq).map(|at| if at % seq <= at / seq { 0.0 } else { -1e30 }).collect();
    crate::common::tensor(&mask, [1, 1, seq, seq], device, dtype)
}

/// Causal attention with all scores.
pub(crate) fn attend([q, k, v]: [Tensor<3>; 3], head_dim: usize, mask: Tensor<4>) -> Tensor<3> {
    let [batch, seq, width] = q.dims();
    let (heads, kv_heads) = (width / head_dim, k.dims()[2] / head_dim);
    let split = |x: Tensor<3>, n: usize| {
        let x = x.reshape([batch, seq, n, 1, head_dim]).repeat_dim(3, heads / n);
        x.reshape([batch, seq, heads, head_dim]).swap_dims(1, 2) // [batch, heads, seq, head_dim]
    };
    let (q, k, v) = (split(q, heads), split(k, kv_heads), split(v, kv_heads));
    let scores = q.matmul(k.swap_dims(2, 3)) * (head_dim as f64).sqrt().recip() + mask;
    activation::softmax(scores, 3).matmul(v).swap_dims(1, 2).reshape([batch, seq, width])
}

/// The mean cross-entropy of h·Wᵀ, W `[vocab, hidden]`.
pub(crate) fn cross_entropy(hidden: Tensor<3>, weight: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let ([batch, seq, width], [rows]) = (hidden.dims(), targets.dims());
    let logits = hidden.reshape([batch * seq, width]).matmul(weight.transpose()).cast(DType::F32);
    activation::log_softmax(logits, 1).gather(1, targets.reshape([rows, 1])).mean().neg()
}
