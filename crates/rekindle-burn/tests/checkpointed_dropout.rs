//! Random numbers of modules that recompute their activations.
//!
//! This test has a process of its own: Burn has one generator for all threads, and other tests draw from it.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use burn::module::Module;
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::Tensor;
use common::{bits, device};
use rekindle_burn::Checkpointed;

/// dx of a sum is the mask and its factor, and so is y of ones.
#[test]
fn dropout_drops_the_same_elements_in_both_computations() {
    let device = device();
    device.seed(7);
    let dropout = Checkpointed::new(DropoutConfig::new(0.5).init());
    let mask = || {
        let x = Tensor::<2>::ones([16, 16], &device).require_grad();
        let y = dropout.forward(x.clone(), Dropout::forward);
        let dx = x.grad(&y.clone().sum().backward()).unwrap();
        assert_eq!(bits(y.clone()), bits(dx));
        bits(y)
    };
    let (first, second) = (mask(), mask());
    let kept = first.iter().filter(|&&bits| f32::from_bits(bits) == 2.0).count();
    // 128 of 256 with a standard deviation of 8.
    assert!((80..=176).contains(&kept), "{kept}");
    assert_ne!(first, second, "each call has its own mask");
    device.seed(7);
    assert_eq!(mask(), first, "the seed of the device determines the masks");
    let y = dropout.valid().forward(Tensor::<2>::ones([2, 2], &device), Dropout::forward);
    assert_eq!(bits(y), [1f32.to_bits(); 4]);
}
