//! Memory of products through the `gemm` crate.

use super::{Form, cpu};
use crate::tensor::{MetaMemory, MetaTensor};

pub(crate) fn product(a: &MetaTensor, b: &MetaTensor, form: Form) -> MetaTensor {
    let (m, n, _) = form.sizes(a.dims(), b.dims());
    let out = a.sized([m, n]);
    let _scratch = scratch(a, b, form);
    out
}

pub(super) fn product_add(y: MetaTensor, a: &MetaTensor, b: &MetaTensor, form: Form) -> MetaTensor {
    let y = y.owned();
    let _scratch = scratch(a, b, form);
    y
}

/// The scratch memory of a product, while it is held.
pub(crate) fn scratch(a: &MetaTensor, b: &MetaTensor, form: Form) -> MetaMemory {
    a.device().scratch(cpu::scratch(form.sizes(a.dims(), b.dims()), form))
}
