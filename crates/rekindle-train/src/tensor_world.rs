//! Collectives over the tensors of a run's ranks.

use core::ops::Range;
use core::time::Duration;
use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::thread;

use rekindle_dist::{Communicator, OneRank};
use rekindle_kernels::optimizer::Clip;
use rekindle_kernels::runtime::{Array, Cuda, NcclComm, NcclId, nccl_version};
use rekindle_kernels::{Device, DeviceError, Grads, Params};
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::world::{decode, encode};

/// The ranks of a run with the device of this one: gradients and parameters go through NCCL between CUDA devices, and
/// through the [`Communicator`] between CPUs. Everything else (counts, losses, files) always takes the communicator.
#[derive(Clone, Debug)]
pub struct TensorWorld {
    world: Arc<dyn Communicator>,
    nccl: Option<Arc<NcclComm>>,
    /// True if collectives do nothing.
    is_planned: bool,
}

/// The device of a rank, as the other ranks learn of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct RankDevice {
    /// `cpu`, `cuda`, …
    name: String,
    uuid: Option<[u8; 16]>,
    /// The version of NCCL, or why there is none.
    nccl: Option<Result<String, String>>,
}

impl Default for TensorWorld {
    /// A run of one rank.
    fn default() -> Self {
        Self { world: Arc::new(OneRank), nccl: None, is_planned: false }
    }
}

impl TensorWorld {
    /// Connects the devices of all ranks. Every rank calls it.
    ///
    /// If a rank fails later, operations that wait in NCCL end, and the device has an undefined result; the next operation
    /// of `world` returns the failure.
    ///
    /// # Errors
    /// [`Error::Config`] for ranks on different kinds of devices, two ranks on one GPU, or a missing or different NCCL;
    /// [`Error::Ranks`] if another rank failed, [`Error::Model`] if NCCL does not connect.
    pub fn connect(world: Arc<dyn Communicator>, device: &Device) -> Result<Self, Error> {
        if world.size() == 1 {
            return Ok(Self { world, ..Self::default() });
        }
        let nccl = match device {
            Device::Cuda(_) => Some(nccl_version().map_err(|error| error.to_string())),
            Device::Burn(_) | Device::Meta(_) => None,
        };
        let uuid = if let Device::Cuda(cuda) = device { cuda.uuid() } else { None };
        let own = RankDevice { name: device.name().to_owned(), uuid, nccl };
        let all = world.all_gather(&encode(&own))?;
        let all: Vec<RankDevice> = all.iter().map(|bytes| decode(bytes)).collect::<Result<_, _>>()?;
        check_devices(&all).map_err(|problem| Error::Config(vec![problem]))?;
        let Device::Cuda(cuda) = device else { return Ok(Self { world, ..Self::default() }) };
        let nccl = connect_nccl(&world, cuda)?;
        Ok(Self { world, nccl: Some(nccl), ..Self::default() })
    }

    /// Returns a rank on a device without values, whose collectives do nothing.
    pub(crate) fn planned() -> Self {
        Self { is_planned: true, ..Self::default() }
    }

    /// Returns the ranks.
    pub fn ranks(&self) -> &dyn Communicator {
        &*self.world
    }

    /// Replaces gradients by their sums over all ranks. On CUDA, the host does not wait.
    ///
    /// # Errors
    /// [`Error::Ranks`] if a rank failed, [`Error::Config`] for gradients that are not in one buffer.
    pub fn all_reduce(&self, grads: &mut Grads) -> Result<(), Error> {
        if self.is_planned {
            return Ok(());
        }
        if let Some((nccl, values)) = self.nccl.as_ref().zip(grads.cuda_values()) {
            nccl.all_reduce_sum(values);
            return Ok(());
        }
        Ok(grads.with_values_mut(|values| self.world.all_reduce_sum(values)).ok_or_else(no_sums)??)
    }

    /// Replaces the gradients of this rank's shard by their sums over all ranks; the others are undefined afterwards.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    pub(crate) fn reduce_scatter(&self, grads: &mut Grads, shards: &[Range<usize>]) -> Result<(), Error> {
        if self.is_planned {
            return Ok(());
        }
        if let Some((nccl, values)) = self.nccl.as_ref().zip(grads.cuda_values()) {
            nccl.reduce_scatter_sum(values, shards);
            return Ok(());
        }
        Ok(grads.with_values_mut(|values| self.world.reduce_scatter_sum(values, shards)).ok_or_else(no_sums)??)
    }

    /// Clips by the norm of all gradients after [`reduce_scatter`](Self::reduce_scatter).
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    pub(crate) fn clip(
        &self,
        grads: &Grads,
        shards: &[Range<usize>],
        max_norm: f64,
        device: &Device,
    ) -> Result<Clip, Error> {
        let shard = shards[self.world.rank()].clone();
        if self.is_planned {
            return Ok(Clip::of_norm(grads.norm_of(shard), 1.0, max_norm, device));
        }
        if let Some(nccl) = &self.nccl {
            return Ok(Clip::of_shards(grads, shard, max_norm, nccl));
        }
        let own = grads.norm_of(shard);
        let all = self.world.all_gather(&own.to_le_bytes())?;
        let norms = all.iter().map(|bytes| f64::from_le_bytes(bytes.as_slice().try_into().unwrap_or([0xff; 8])));
        Ok(Clip::of_norm(norms.map(|norm| norm * norm).sum::<f64>().sqrt(), 1.0, max_norm, device))
    }

    /// Replaces the parameters of every shard by those of its rank.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    pub(crate) fn all_gather(&self, params: &mut Params, shards: &[Range<usize>]) -> Result<(), Error> {
        if self.is_planned {
            return Ok(());
        }
        if let Some(nccl) = &self.nccl {
            return params.with_cuda_values(|values| nccl.all_gather(values, shards)).ok_or_else(no_sums);
        }
        Ok(params.with_values_mut(|values| self.world.all_gather_shards(values, shards)).ok_or_else(no_sums)??)
    }

    /// Replaces parameters in one buffer on CUDA devices by those of rank 0. Returns false if they are elsewhere.
    pub(crate) fn broadcast_on_device(&self, params: &mut Params) -> bool {
        let Some(nccl) = &self.nccl else { return false };
        params.with_cuda_values(|values: &Array| nccl.broadcast(values)).is_some()
    }
}

/// Refuses devices that the ranks cannot use together.
fn check_devices(all: &[RankDevice]) -> Result<(), String> {
    let (first, mut seen) = (&all[0], BTreeMap::new());
    for (rank, device) in all.iter().enumerate() {
        if device.name != first.name {
            return Err(format!(
                "rank {rank} is on device \"{}\" and rank 0 on \"{}\"; set device to \"cpu\" or \"cuda\" on all hosts",
                device.name, first.name
            ));
        }
        if !matches!(&*device.name, "cpu" | "cuda") {
            return Err(format!(
                "several ranks train on CPUs or on NVIDIA GPUs, and not on device \"{}\"; set device = \"cpu\" or train \
                 with one rank",
                device.name
            ));
        }
        if let Some(other) = device.uuid.and_then(|uuid| seen.insert(uuid, rank)) {
            return Err(format!(
                "ranks {other} and {rank} have the same GPU; start one rank for each GPU, and let the launcher set \
                 LOCAL_RANK or CUDA_VISIBLE_DEVICES"
            ));
        }
        match (&device.nccl, &first.nccl) {
            (Some(Err(missing)), _) => {
                return Err(format!("several GPUs need NCCL on every host; rank {rank}: {missing}"));
            }
            (Some(Ok(version)), Some(Ok(other))) if version != other => {
                return Err(format!(
                    "rank {rank} has NCCL {version} and rank 0 has {other}; install the same version on all hosts"
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Connects the GPUs, and starts to watch for failures.
fn connect_nccl(world: &Arc<dyn Communicator>, cuda: &Cuda) -> Result<Arc<NcclComm>, Error> {
    let failed = |error| Error::from(rekindle_models::Error::from(DeviceError::from(error)));
    let id = if world.is_first() { NcclId::new().map_err(failed)?.to_bytes().to_vec() } else { Vec::new() };
    let id = NcclId::from_bytes(&world.broadcast(id)?).ok_or_else(crate::world::other_version)?;
    let comm = NcclComm::connect(cuda, id, world.rank(), world.size(), || world.failure().is_some());
    let comm = match (comm, world.failure()) {
        (Err(_), Some(failure)) => return Err(rekindle_dist::Error::from(failure).into()),
        (comm, _) => Arc::new(comm.map_err(failed)?),
    };
    let (watched, of_world) = (Arc::downgrade(&comm), Arc::downgrade(world));
    let started = thread::Builder::new().name("NCCL watch".to_owned()).spawn(move || watch(&watched, &of_world));
    started.map_err(|error| Error::Config(vec![format!("the watch over NCCL cannot be started: {error}")]))?;
    Ok(comm)
}

/// Ends the operations in NCCL when a rank fails, and reports its errors to the other ranks.
fn watch(comm: &Weak<NcclComm>, world: &Weak<dyn Communicator>) {
    loop {
        thread::sleep(WATCH);
        let Some((comm, world)) = comm.upgrade().zip(world.upgrade()) else { return };
        if world.failure().is_some() {
            return comm.abort();
        }
        if let Some(error) = comm.async_error() {
            world.fail(&error.to_string());
            return comm.abort();
        }
    }
}

/// The time between looks at the ranks.
const WATCH: Duration = Duration::from_millis(50);

fn no_sums() -> Error {
    Error::Config(vec![
        "the trained values are not in one buffer, which several ranks need; train with one rank".to_owned(),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_that_do_not_fit_together_are_refused() {
        let device = |name: &str, uuid: Option<u8>, nccl: Option<Result<&str, &str>>| RankDevice {
            name: name.to_owned(),
            uuid: uuid.map(|byte| [byte; 16]),
            nccl: nccl.map(|nccl| nccl.map(str::to_owned).map_err(str::to_owned)),
        };
        let cuda = |uuid, version| device("cuda", Some(uuid), Some(Ok(version)));
        let cpu = device("cpu", None, None);
        assert_eq!(check_devices(&[cpu.clone(), cpu.clone()]), Ok(()));
        assert_eq!(check_devices(&[cuda(1, "2.27.3"), cuda(2, "2.27.3")]), Ok(()));
        let refused = |devices: &[RankDevice], part: &str| {
            let problem = check_devices(devices).unwrap_err();
            assert!(problem.contains(part), "{problem}");
        };
        refused(&[cuda(1, "2.27.3"), cpu.clone()], "rank 1 is on device \"cpu\" and rank 0 on \"cuda\"");
        refused(&[device("wgpu", None, None), device("wgpu", None, None)], "not on device \"wgpu\"");
        refused(&[cuda(1, "2.27.3"), cuda(2, "2.27.3"), cuda(1, "2.27.3")], "ranks 0 and 2 have the same GPU");
        refused(&[cuda(1, "2.27.3"), cuda(2, "2.28.1")], "rank 1 has NCCL 2.28.1 and rank 0 has 2.27.3");
        refused(&[cuda(1, "2.27.3"), device("cuda", Some(2), Some(Err("was not found")))], "rank 1: was not found");
    }

    #[test]
    fn one_rank_connects_nothing() {
        let world = TensorWorld::connect(Arc::new(OneRank), &Device::cpu()).unwrap();
        assert!(world.nccl.is_none() && world.ranks().size() == 1);
    }
}
