//! Memory of attention over pages.

use super::{PagedBatch, cpu};
use crate::attention::Heads;
use crate::tensor::MetaTensor;

pub(super) fn forward(q: &MetaTensor, heads: Heads, batch: &PagedBatch) -> MetaTensor {
    let _view = q.contiguous();
    let o = q.like();
    let _scratch = q.device().scratch(cpu::scratch(heads, batch));
    o
}
