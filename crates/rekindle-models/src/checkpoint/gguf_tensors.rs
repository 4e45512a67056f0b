//! The tensors of a GGUF file that a parameter becomes, and the changes of its values on the way.

use rekindle_gguf::{GgufArchitecture, GgufPart, interleave_rows};

use super::gguf::rotates_halves;
use super::gguf_decoder::{norm_shift, tensor_name};
use crate::parameters::{ExpertRole, ExpertStack, ParameterSpec};
use crate::spec::{GatedDeltaSpec, MixerSpec};
use crate::{Error, LayerRole, LinearRole, ModelConfig, Role};

/// A tensor of a GGUF file, as a part of a parameter.
#[derive(Clone, Debug)]
pub(super) struct GgufTensorPart {
    /// The name in the file.
    pub(super) name: String,
    /// The shape in the file; of one expert where the file has those of all in one tensor.
    pub(super) shape: Vec<usize>,
    pub(super) change: ValueChange,
}

/// The change of a matrix's values from a checkpoint to a file: first of the numbers, then of their order.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct ValueChange {
    number: NumberChange,
    /// The source row of each row; `None` for the same order.
    pub(super) rows: Option<Vec<usize>>,
    /// The source column of each column; `None` for the same order.
    pub(super) columns: Option<Vec<usize>>,
}

/// The change of a number.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum NumberChange {
    #[default]
    None,
    Add(f32),
    /// −exp(x).
    NegativeExp,
}

impl ValueChange {
    /// Returns a change of the order alone.
    pub(super) fn of_order(rows: Option<Vec<usize>>, columns: Option<Vec<usize>>) -> Self {
        Self { number: NumberChange::None, rows, columns }
    }

    pub(super) fn is_identity(&self) -> bool {
        *self == Self::default()
    }

    /// Returns the changed values of a matrix with this number of columns.
    pub(super) fn apply(&self, mut values: Vec<f32>, columns: usize) -> Vec<f32> {
        match self.number {
            NumberChange::None => {}
            NumberChange::Add(shift) => values.iter_mut().for_each(|value| *value += shift),
            NumberChange::NegativeExp => values.iter_mut().for_each(|value| *value = -value.exp()),
        }
        if let Some(rows) = &self.rows {
            values = rows.iter().flat_map(|row| &values[row * columns..][..columns]).copied().collect();
        }
        if let Some(order) = &self.columns {
            values = values.chunks_exact(columns).flat_map(|row| order.iter().map(|&column| row[column])).collect();
        }
        values
    }
}

impl ValueChange {
    /// Returns the order of rows if that is all that changes.
    pub(super) fn of_rows_alone(&self) -> Option<&[usize]> {
        let is_alone = self.number == NumberChange::None && self.columns.is_none();
        self.rows.as_deref().filter(|_| is_alone)
    }

    /// Returns the values of a checkpoint from those of a file, in a matrix with this number of columns.
    pub(super) fn undo(&self, mut values: Vec<f32>, columns: usize) -> Vec<f32> {
        if let Some(order) = &self.columns {
            values = values.chunks_exact(columns).flat_map(|row| in_place(row, order, 1)).collect();
        }
        if let Some(rows) = &self.rows {
            values = in_place(&values, rows, columns);
        }
        match self.number {
            NumberChange::None => {}
            NumberChange::Add(shift) => values.iter_mut().for_each(|value| *value -= shift),
            NumberChange::NegativeExp => values.iter_mut().for_each(|value| *value = (-*value).ln()),
        }
        values
    }
}

/// Puts the items of `width` elements back in the places from which `order` took them.
pub(super) fn in_place<T: Copy + Default>(items: &[T], order: &[usize], width: usize) -> Vec<T> {
    let mut out = vec![T::default(); items.len()];
    for (item, &to) in items.chunks_exact(width.max(1)).zip(order) {
        out[to * width..][..width].copy_from_slice(item);
    }
    out
}

/// Returns the tensors that a parameter becomes: one, or two for gate and up in one parameter whose rows alternate.
///
/// # Errors
/// [`Error::Argument`] for parts that no supported architecture has.
pub(super) fn tensors_of(
    architecture: &GgufArchitecture,
    config: &ModelConfig,
    needed: &ParameterSpec,
) -> Result<Vec<GgufTensorPart>, Error> {
    let shape = &needed.shape;
    let every_second = |extent: usize, first: usize| Some((first..extent).step_by(2).collect());
    let halves = |kind: &str, shape: Vec<usize>, change: &dyn Fn(usize) -> ValueChange| {
        let Role::Layer(layer, _) = needed.role else { unreachable!("experts are in layers") };
        let part = |(first, part): (usize, GgufPart)| GgufTensorPart {
            name: part.tensor_name(kind),
            shape: shape.clone(),
            change: change(first),
        };
        [GgufPart::ExpertGates(layer), GgufPart::ExpertUps(layer)].into_iter().enumerate().map(part).collect()
    };
    match (needed.role, &shape[..]) {
        (Role::Layer(_, LayerRole::Expert(ExpertRole::GateUp, _)), &[rows, columns]) => {
            let change = |first| ValueChange::of_order(every_second(rows, first), None);
            return Ok(halves("weight", vec![rows / 2, columns], &change));
        }
        (Role::Layer(_, LayerRole::ExpertBias(ExpertStack::GateUp)), &[experts, columns]) => {
            let change = |first| ValueChange::of_order(None, every_second(columns, first));
            return Ok(halves("bias", vec![experts, columns / 2], &change));
        }
        _ => {}
    }
    let mut shape = shape.clone();
    if let Role::Layer(_, LayerRole::ShortConv) = needed.role {
        shape.retain(|extent| *extent != 1);
    }
    let name = tensor_name(architecture, needed.role)?;
    Ok(vec![GgufTensorPart { name, shape, change: change(architecture, config, needed) }])
}

/// Returns the change of a parameter that becomes one tensor.
pub(super) fn change(architecture: &GgufArchitecture, config: &ModelConfig, needed: &ParameterSpec) -> ValueChange {
    let mut change = ValueChange::default();
    let shift = norm_shift(config, needed.role);
    if shift != 0.0 {
        change.number = NumberChange::Add(shift);
    }
    if architecture.rotates_pairs() && rotates_halves(config, needed) {
        change.rows = Some(interleave_rows(needed.shape[0], config.head_dim()).collect());
    }
    let Role::Layer(layer, role) = needed.role else { return change };
    if let MixerSpec::GatedDelta(delta) = config.spec.layers[layer].mixer {
        let (values, keys) = (delta.value_dim, 2 * delta.key_heads * delta.key_dim);
        match role {
            LayerRole::Weight(LinearRole::DeltaQkv) | LayerRole::ShortConv => {
                let of_values = value_order(delta, values).into_iter().map(|row| keys + row);
                change.rows = Some((0..keys).chain(of_values).collect());
            }
            LayerRole::Weight(LinearRole::DeltaGate) => change.rows = Some(value_order(delta, values)),
            LayerRole::Weight(LinearRole::DeltaBeta | LinearRole::DeltaDecay) | LayerRole::DecayBias => {
                change.rows = Some(value_order(delta, 1));
            }
            LayerRole::DecayRate => {
                change.rows = Some(value_order(delta, 1));
                change.number = NumberChange::NegativeExp;
            }
            LayerRole::Weight(LinearRole::DeltaOutput) => change.columns = Some(value_order(delta, values)),
            _ => {}
        }
    }
    change
}

/// Returns the source of each channel of the value heads: checkpoints have the heads of one key head together, files the
/// first head of every key head, then the second.
fn value_order(delta: GatedDeltaSpec, channels: usize) -> Vec<usize> {
    let each = delta.value_heads / delta.key_heads;
    let heads = (0..each).flat_map(|turn| (0..delta.key_heads).map(move |key| key * each + turn));
    heads.flat_map(|head| (0..channels).map(move |channel| head * channels + channel)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn value_heads_take_turns() {
        let delta = GatedDeltaSpec { key_heads: 2, value_heads: 4, key_dim: 1, value_dim: 2, conv_width: 4, eps: 1e-6 };
        assert_eq!(value_order(delta, 2), [0, 1, 4, 5, 2, 3, 6, 7]);
        assert_eq!(value_order(GatedDeltaSpec { value_heads: 2, ..delta }, 1), [0, 1]);
    }

    #[test]
    fn numbers_change_before_their_order() {
        let change = ValueChange { number: NumberChange::NegativeExp, rows: Some(vec![1, 0]), columns: Some(vec![1]) };
        assert_eq!(change.apply(vec![1.0, 0.0, 2.0, f32::NEG_INFINITY], 2), [0.0, -1.0]);
        assert!(!change.is_identity() && ValueChange::default().is_identity());
        let changes = [
            ValueChange { number: NumberChange::Add(1.0), rows: Some(vec![2, 0, 1]), columns: None },
            ValueChange { number: NumberChange::NegativeExp, rows: None, columns: Some(vec![1, 0]) },
        ];
        for change in changes {
            let values = vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0];
            let undone = change.undo(change.apply(values.clone(), 2), 2);
            assert!(undone.iter().zip(&values).all(|(a, b)| (a - b).abs() < 1e-6), "{undone:?}");
        }
    }
}
