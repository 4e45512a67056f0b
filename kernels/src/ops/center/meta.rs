//! Memory of rows without their mean over slices.

use crate::tensor::MetaTensor;

pub(super) fn forward(x: &MetaTensor) -> MetaTensor {
    let _x = x.contiguous();
    x.like()
}
