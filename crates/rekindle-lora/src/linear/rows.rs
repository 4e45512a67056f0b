//! Adapters of some rows of a batch each.

use std::collections::HashMap;

use rekindle_kernels::{DType, Device, Params, Tensor, from_f32, matmul};

use super::LinearGroup;
use super::pass::sum;
use crate::{Adapter, LoraFactors};

/// The factors of an adapter on a device, for batches whose rows have different adapters ([`LinearContext::rows`]).
///
/// The base's products are computed for all rows at once; x·Aᵀ and its product with B are computed for the rows of each
/// adapter. On the CPU a row gets the same bits as in a pass with its adapter alone.
///
/// [`LinearContext::rows`]: super::LinearContext::rows
#[derive(Debug)]
pub struct RowAdapter {
    /// By the name of a group's first linear.
    groups: HashMap<String, GroupFactors>,
}

/// The factors of one group.
#[derive(Debug)]
struct GroupFactors {
    /// The A's of adapted linears below each other, `[Σ r, in]`.
    a: Tensor<2>,
    /// For each linear, if it is adapted: r, B `[out, r]` and s.
    parts: Vec<Option<(usize, Tensor<2>, f32)>>,
}

/// Rows of a batch that have an adapter.
#[derive(Clone, Copy, Debug)]
pub struct AdapterRows<'a> {
    /// The first row.
    pub first: usize,
    /// The number of rows.
    pub count: usize,
    /// Their adapter.
    pub adapter: &'a RowAdapter,
}

impl RowAdapter {
    /// Copies the factors of `adapter` for `groups` to a device. Returns `None` for an adapter that consists of more: of DoRA's
    /// magnitudes, biases, whole modules, or factors of linears outside these groups.
    pub fn new<'a>(
        adapter: &Adapter,
        groups: impl Iterator<Item = &'a LinearGroup>,
        device: &Device,
        dtype: DType,
    ) -> Option<Self> {
        let Adapter { config, factors, biases, saved, tables } = adapter;
        let has_magnitude = factors.values().any(|factors| factors.magnitude.is_some());
        if has_magnitude || !(biases.is_empty() && saved.is_empty() && tables.is_empty()) {
            return None;
        }
        let mut placed = 0;
        let mut by_group = HashMap::new();
        for group in groups {
            let (mut a_values, mut rows, mut parts) = (Vec::new(), 0, Vec::new());
            for linear in &group.linears {
                let [out, _] = linear.weight.dims();
                parts.push(factors.get(&linear.name).map(|LoraFactors { r, a, b, .. }| {
                    a_values.extend_from_slice(a);
                    rows += r;
                    placed += 1;
                    let b = from_f32(b.clone(), [out, *r], device, dtype);
                    (*r, b, config.lora().scale_of(&linear.name) as f32)
                }));
            }
            if rows > 0 {
                let [_, input] = group.linears[0].weight.dims();
                let a = from_f32(a_values, [rows, input], device, dtype);
                by_group.insert(group.linears[0].name.clone(), GroupFactors { a, parts });
            }
        }
        (placed == factors.len()).then_some(Self { groups: by_group })
    }
}

impl LinearGroup {
    /// The results of the base with those of each row's adapter.
    pub(super) fn run_rows(
        &self,
        params: &Params,
        rows: &[AdapterRows<'_>],
        x: &Tensor<2>,
        onto: Option<&Tensor<2>>,
    ) -> Vec<Tensor<2>> {
        let name = &self.linears[0].name;
        // Each adapter of this group with its rows and x·Aᵀ.
        let adapted: Vec<_> = rows
            .iter()
            .filter_map(|rows| Some((rows, rows.adapter.groups.get(name)?)))
            .map(|(rows, factors)| (rows, factors, matmul::nt(&x.rows(rows.first, rows.count), &factors.a)))
            .collect();
        let ys = self.base_products(params, x).into_iter().enumerate().map(|(index, y)| {
            let mut parts = Vec::new();
            let mut end = 0;
            for (rows, factors, xa) in &adapted {
                let Some((r, b, scale)) = &factors.parts[index] else { continue };
                if rows.first > end {
                    parts.push(y.rows(end, rows.first - end));
                }
                let before: usize = factors.parts[..index].iter().flatten().map(|(r, ..)| r).sum();
                parts.push(matmul::nt_add(y.rows(rows.first, rows.count), *scale, &xa.columns(before, *r), b));
                end = rows.first + rows.count;
            }
            let [all, _] = y.dims();
            if parts.is_empty() {
                return sum(y, onto);
            }
            if end < all {
                parts.push(y.rows(end, all - end));
            }
            sum(Tensor::cat_rows(parts), onto)
        });
        self.split(ys.collect())
    }
}
