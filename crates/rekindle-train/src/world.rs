//! Values that the ranks of a run share.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use rekindle_dist::Communicator;
use rekindle_kernels::DType;
use rekindle_kernels::optimizer::StateTensor;
use rekindle_models::CausalLm;
use rekindle_models::objective::{Metric, MetricKind};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Error, Optimizer, TensorWorld};

/// The summed loss of a batch, or of several, and the metrics beside it.
pub(crate) type LossSum = (f64, Vec<Metric>);

/// A [`LossSum`] with the bits of its numbers, which JSON would lose where they are not finite.
type LossBits = (u64, Vec<MetricBits>);

/// A metric likewise: its name, sum, count and kind.
type MetricBits = (String, u64, usize, MetricKind);

/// Returns the value of rank 0.
///
/// # Errors
/// [`Error::Ranks`] if a rank failed.
pub(crate) fn share<T: Serialize + DeserializeOwned>(world: &dyn Communicator, value: T) -> Result<T, Error> {
    if world.size() == 1 {
        return Ok(value);
    }
    decode(&world.broadcast(encode(&value))?)
}

/// Returns the losses of all ranks, in the order of the ranks.
///
/// # Errors
/// [`Error::Ranks`] if a rank failed.
pub(crate) fn gather_losses(world: &dyn Communicator, own: Vec<LossSum>) -> Result<Vec<Vec<LossSum>>, Error> {
    if world.size() == 1 {
        return Ok(vec![own]);
    }
    let bits = |(loss, metrics): &LossSum| -> LossBits {
        let bits = |metric: &Metric| (metric.name.to_owned(), metric.sum.to_bits(), metric.count, metric.kind());
        (loss.to_bits(), metrics.iter().map(bits).collect())
    };
    let sum = |(loss, metrics): LossBits| -> LossSum {
        let metric = |(name, sum, count, kind): MetricBits| {
            Metric::new(interned(name), f64::from_bits(sum), count).combined_as(kind)
        };
        (f64::from_bits(loss), metrics.into_iter().map(metric).collect())
    };
    let own: Vec<LossBits> = own.iter().map(bits).collect();
    let all = world.all_gather(&encode(&own))?;
    all.iter().map(|bytes| Ok(decode::<Vec<LossBits>>(bytes)?.into_iter().map(sum).collect())).collect()
}

/// Returns rows that were dealt in batches of `batch_size`, one batch to each rank in turn, in their order. `own` are the
/// rows of this rank with the numbers that describe each.
///
/// # Errors
/// [`Error::Ranks`] if a rank failed.
pub(crate) fn gather_rows<const N: usize>(
    world: &dyn Communicator,
    own: &[[u64; N]],
    rows: usize,
    batch_size: usize,
) -> Result<Vec<[u64; N]>, Error> {
    let bytes: Vec<u8> = own.iter().flatten().flat_map(|number| number.to_le_bytes()).collect();
    let all = world.all_gather(&bytes)?;
    let mut of_ranks: Vec<_> = all.iter().map(|bytes| bytes.as_chunks::<8>().0.as_chunks::<N>().0.iter()).collect();
    let row = |row: usize| {
        let numbers = of_ranks[row / batch_size % world.size()].next().ok_or_else(other_version)?;
        Ok(numbers.map(u64::from_le_bytes))
    };
    (0..rows).map(row).collect()
}

/// Replaces the trained parameters by those of rank 0.
///
/// # Errors
/// [`Error::Ranks`] if a rank failed, [`Error::Config`] if the ranks train other parameters.
pub(crate) fn share_parameters(tensors: &TensorWorld, model: &mut CausalLm) -> Result<(), Error> {
    let world = tensors.ranks();
    if world.size() == 1 {
        return Ok(());
    }
    let other = || {
        let problem = "this rank trains other parameters than rank 0; start all ranks with the same model";
        Error::Config(vec![problem.to_owned()])
    };
    if share(world, model.params().numel())? != model.params().numel() {
        return Err(other());
    }
    if tensors.broadcast_on_device(model.params_mut()) {
        // No rank may end its part while another still receives.
        model.device().synchronize().map_err(rekindle_models::Error::from)?;
        return Ok(world.barrier()?);
    }
    let own = if world.is_first() { join(&model.params().to_bytes()) } else { Vec::new() };
    let shared = world.broadcast(own)?;
    if world.is_first() || split(&shared).is_some_and(|bytes| model.params_mut().restore(&bytes)) {
        return Ok(());
    }
    Err(other())
}

/// The description of a tensor of the optimizer: name, whether it has 8 bits, shape.
type TensorHeader = (String, bool, Vec<usize>);

/// Replaces the state of the optimizer by `saved`, the whole state that rank 0 has restored.
///
/// # Errors
/// [`Error::Ranks`] if a rank failed, [`Error::Config`] if the ranks have other optimizers.
pub(crate) fn share_optimizer(optimizer: &mut Optimizer, saved: Vec<StateTensor>) -> Result<(), Error> {
    let tensors = optimizer.world().clone();
    let world = tensors.ranks();
    if world.size() == 1 {
        return Ok(());
    }
    let header = |tensor: &StateTensor| (tensor.name.clone(), tensor.dtype == DType::U8, tensor.shape.clone());
    let headers: Vec<TensorHeader> = saved.iter().map(header).collect();
    let (steps, headers) = share(world, (optimizer.steps(), headers))?;
    let mut saved = saved.into_iter();
    let mut state = Vec::with_capacity(headers.len());
    for (name, is_u8, shape) in headers {
        let own = saved.next().map_or_else(Vec::new, |tensor| tensor.bytes);
        let bytes = world.broadcast(own)?;
        if !world.is_first() {
            state.push(StateTensor { name, dtype: if is_u8 { DType::U8 } else { DType::F32 }, shape, bytes });
        }
    }
    if world.is_first() {
        return Ok(());
    }
    optimizer.resume(steps, state).map_err(|error| Error::Config(vec![error.to_string()]))
}

/// Joins the pieces of a divided state on rank 0, tensor by tensor; the other ranks get `None`.
///
/// # Errors
/// [`Error::Ranks`] if a rank failed, and those of `own`.
pub(crate) fn gather_state(
    world: &dyn Communicator,
    own: impl Iterator<Item = Result<StateTensor, Error>>,
) -> Result<Option<Vec<StateTensor>>, Error> {
    let mut all = world.is_first().then(Vec::new);
    for tensor in own {
        let StateTensor { name, dtype, shape, bytes } = tensor?;
        if let Some((all, pieces)) = all.as_mut().zip(world.gather(bytes)?) {
            all.push(StateTensor { name, dtype, shape, bytes: pieces.concat() });
        }
    }
    Ok(all)
}

/// Returns a name that lives as long as the process. The names are those of the objectives, so there are few.
fn interned(name: String) -> &'static str {
    static NAMES: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = names.get(&*name) {
        return known;
    }
    let name: &'static str = Box::leak(name.into_boxed_str());
    names.insert(name);
    name
}

pub(crate) fn encode(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("numbers and texts serialize")
}

pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(bytes).map_err(|_| other_version())
}

pub(crate) fn other_version() -> Error {
    Error::Config(vec![
        "the ranks do not understand each other; start all with the same version of Rekindle".to_owned(),
    ])
}

/// Joins pieces into one, each with its length in front.
fn join(pieces: &[Vec<u8>]) -> Vec<u8> {
    pieces.iter().flat_map(|piece| [&(piece.len() as u64).to_le_bytes()[..], piece].concat()).collect()
}

/// Returns the pieces of [`join`], or `None` for other bytes.
fn split(mut bytes: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut pieces = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk() {
        let (piece, rest) = rest.split_at_checked(u64::from_le_bytes(*length) as usize)?;
        pieces.push(piece.to_vec());
        bytes = rest;
    }
    bytes.is_empty().then_some(pieces)
}

#[cfg(test)]
mod tests {
    use rekindle_dist::OneRank;

    use super::*;

    #[test]
    fn pieces_come_back() {
        let pieces = [vec![1, 2], Vec::new(), vec![3; 70]];
        let mut bytes = join(&pieces);
        assert_eq!(split(&bytes).unwrap(), pieces);
        bytes.pop();
        assert_eq!(split(&bytes), None);
        assert_eq!(split(&[]).unwrap(), Vec::<Vec<u8>>::new());
    }

    #[test]
    fn one_rank_has_its_own_values() {
        assert_eq!(share(&OneRank, 7).unwrap(), 7);
        let losses = vec![(f64::NAN, vec![Metric::new("kl", 1.0, 2)])];
        assert!(gather_losses(&OneRank, losses).unwrap()[0][0].0.is_nan());
        assert_eq!(gather_rows(&OneRank, &[[1, 2], [3, 4], [5, 6]], 3, 2).unwrap(), [[1, 2], [3, 4], [5, 6]]);
        assert!(gather_rows(&OneRank, &[[1, 2]], 3, 2).is_err());
        assert!(std::ptr::eq(interned("kl".to_owned()), interned("kl".to_owned())));
    }
}
