//! Frozen weights that several ranks hold together.
//!
//! Each of N ranks keeps 1/N of the bytes of every frozen matrix of a model's blocks: of its values, or of its codes and
//! scales. A pass through the blocks gathers one block at a time, which is freed before the next, so a rank needs the memory
//! of its share and of one block. Gathered weights have the bits of whole ones (FSDP, arXiv:2304.11277; codes are gathered,
//! not decoded values).
//!
//! **Order.** A gather takes all ranks, but ranks do different things: one has fewer batches, another answers prompts. Each
//! rank therefore announces the blocks that its next pass reads. The announcement of the lowest rank with work decides; ranks
//! with the same one compute, and the others only give their parts and announce again. A rank without work does the same in
//! [`FrozenShards::finish`] until no rank has any, which must be before its next collective of another kind.

mod layout;

use core::fmt;
use core::ops::Range;
use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::tensor::MetaMemory;
use crate::{Device, MemoryUse, QuantizedWeight, Tensor, Weight, from_le_bytes, to_le_bytes, unfilled};
use layout::QuantizedLayout;

/// The ranks that hold the parts of frozen weights.
pub trait ShardExchange: fmt::Debug + Send + Sync {
    /// Returns the number of this rank, from 0.
    fn rank(&self) -> usize;

    /// Returns the number of ranks.
    fn size(&self) -> usize;

    /// Returns the bytes of all ranks in their order; waits for all ranks. `None` after a failure, which the next operation of
    /// the ranks returns.
    fn all_gather(&self, own: &[u8]) -> Option<Vec<Vec<u8>>>;
}

/// The frozen weights of a model's blocks, of which this rank holds a part.
#[derive(Debug)]
pub struct FrozenShards {
    exchange: Arc<dyn ShardExchange>,
    device: Device,
    blocks: Mutex<Vec<Arc<[Shard]>>>,
    /// True while a pass is not at its end.
    is_passing: AtomicBool,
    /// Set when an exchange failed, after which weights have undefined values.
    failed: OnceLock<()>,
}

/// A weight of which this rank holds a part.
#[derive(Clone, Debug)]
pub struct ShardedWeight {
    shards: Arc<FrozenShards>,
    block: usize,
    index: usize,
    dims: [usize; 2],
}

/// The part of a weight that a rank holds.
#[derive(Debug)]
struct Shard {
    dims: [usize; 2],
    layout: ShardLayout,
    /// Bytes of the whole weight.
    bytes: usize,
    own: ShardBytes,
}

#[derive(Debug)]
enum ShardLayout {
    Dense(crate::DType),
    Quantized(Box<QuantizedLayout>),
}

#[derive(Debug)]
enum ShardBytes {
    Host(Vec<u8>),
    /// On a device without values.
    Planned {
        _memory: Box<Tensor<2>>,
    },
}

/// The blocks that a pass reads, in its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Announcement {
    first: u32,
    count: u32,
    is_backward: bool,
    /// A single weight of the block instead of all.
    weight: Option<u32>,
}

/// A pass through blocks, which gathers their weights one block after another.
///
/// Dropping it early gives the other ranks their parts of the blocks that are left.
#[derive(Debug)]
pub struct BlockPass {
    shards: Arc<FrozenShards>,
    left: Announcement,
}

impl FrozenShards {
    /// Returns the shards of a model on `device` without blocks.
    pub fn new(exchange: Arc<dyn ShardExchange>, device: &Device) -> Arc<Self> {
        let (blocks, is_passing, failed) = Default::default();
        Arc::new(Self { exchange, device: device.clone(), blocks, is_passing, failed })
    }

    /// Returns the number of ranks.
    pub fn ranks(&self) -> usize {
        self.exchange.size()
    }

    /// Returns the bytes of all divided weights, on all ranks together.
    pub fn bytes(&self) -> usize {
        let blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        blocks.iter().flat_map(|block| block.iter()).map(|shard| shard.bytes).sum()
    }

    /// Keeps this rank's part of the frozen weights of the next block, which all ranks have in the same order.
    pub fn push_block(self: &Arc<Self>, weights: Vec<&mut Weight>) {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let block = blocks.len();
        let mut shards = Vec::new();
        for weight in weights {
            let Some(shard) = self.shard(weight) else { continue };
            let (index, dims) = (shards.len(), shard.dims);
            *weight = Weight::Sharded(ShardedWeight { shards: Arc::clone(self), block, index, dims });
            shards.push(shard);
        }
        blocks.push(shards.into());
    }

    /// Returns this rank's part of a weight; `None` for one that is trained.
    fn shard(&self, weight: &Weight) -> Option<Shard> {
        let is_planned = self.device.is_planned();
        let (layout, bytes, all) = match weight {
            Weight::Trained(_) | Weight::Sharded(_) => return None,
            Weight::Frozen(tensor) => {
                let bytes = tensor.dims().iter().product::<usize>() * tensor.dtype().size();
                let all = if is_planned { Vec::new() } else { to_le_bytes(tensor.clone()) };
                (ShardLayout::Dense(tensor.dtype()), bytes, all)
            }
            Weight::Quantized(weight) if is_planned => {
                let (codes, scales) = weight.bytes();
                (ShardLayout::Quantized(Box::new(QuantizedLayout::planned(weight))), codes + scales, Vec::new())
            }
            Weight::Quantized(weight) => {
                let (layout, all) = QuantizedLayout::split(&weight.data());
                (ShardLayout::Quantized(Box::new(layout)), all.len(), all)
            }
        };
        let range = self.range(bytes, self.exchange.rank());
        let own = match is_planned {
            true => {
                // The largest part, in elements of four bytes.
                let elements = self.range(bytes, 0).len().div_ceil(4).next_multiple_of(64);
                ShardBytes::Planned { _memory: Box::new(unfilled([1, elements], &self.device, crate::DType::F32)) }
            }
            false => ShardBytes::Host(all[range].to_vec()),
        };
        Some(Shard { dims: weight.dims(), layout, bytes, own })
    }

    /// Returns the part of so many bytes that a rank holds.
    fn range(&self, bytes: usize, rank: usize) -> Range<usize> {
        let part = bytes.div_ceil(self.exchange.size());
        (rank * part).min(bytes)..((rank + 1) * part).min(bytes)
    }

    fn block(&self, block: usize) -> Arc<[Shard]> {
        Arc::clone(&self.blocks.lock().unwrap_or_else(PoisonError::into_inner)[block])
    }

    /// Begins a pass through these blocks, upwards in a forward pass and downwards in a backward pass. First takes part in the
    /// passes of other ranks.
    ///
    /// # Panics
    /// Within another pass.
    pub fn begin(self: &Arc<Self>, blocks: Range<usize>, is_backward: bool) -> BlockPass {
        let (first, count) = (blocks.start as u32, blocks.len() as u32);
        self.begin_announced(Announcement { first, count, is_backward, weight: None })
    }

    fn begin_announced(self: &Arc<Self>, own: Announcement) -> BlockPass {
        assert!(!self.is_passing.swap(true, Ordering::SeqCst), "a pass through the blocks ends before the next begins");
        if own.count > 0 {
            while let Some(decided) = self.decide(own).filter(|decided| *decided != own) {
                self.serve(decided);
            }
        }
        BlockPass { shards: Arc::clone(self), left: own }
    }

    /// Takes part in the passes of other ranks until no rank has any left. Must come before every collective of the ranks that
    /// is not a gather of weights.
    ///
    /// # Panics
    /// Within a pass.
    pub fn finish(&self) {
        assert!(!self.is_passing.load(Ordering::SeqCst), "a pass through the blocks ends before other collectives");
        while let Some(decided) = self.decide(Announcement::NOTHING) {
            self.serve(decided);
        }
    }

    /// Announces the next pass of this rank, and returns that of the lowest rank that has one. `None` if none has, or after a
    /// failure.
    fn decide(&self, own: Announcement) -> Option<Announcement> {
        if self.device.is_planned() {
            return Some(own).filter(|own| own.count > 0);
        }
        let all = self.all_gather(&own.to_bytes())?;
        all.iter().map(|bytes| Announcement::from_bytes(bytes)).find(|other| other.count > 0)
    }

    /// Gives the other ranks this rank's parts of a pass.
    fn serve(&self, pass: Announcement) {
        for block in pass.blocks() {
            let shards = self.block(block);
            self.exchange_parts(pass.of(&shards));
        }
    }

    fn all_gather(&self, own: &[u8]) -> Option<Vec<Vec<u8>>> {
        if self.failed.get().is_some() {
            return None;
        }
        let all = self.exchange.all_gather(own);
        if all.is_none() {
            let _ = self.failed.set(());
        }
        all
    }

    /// Returns the parts of all ranks of these weights, each rank's one after another.
    fn exchange_parts(&self, shards: &[Shard]) -> Option<Vec<Vec<u8>>> {
        let own: Vec<u8> = shards.iter().flat_map(|shard| shard.own.bytes()).copied().collect();
        let all = self.all_gather(&own)?;
        let expected = |rank| shards.iter().map(|shard| self.range(shard.bytes, rank).len()).sum::<usize>();
        if all.iter().enumerate().any(|(rank, parts)| parts.len() != expected(rank)) {
            // Another rank is at another operation, which the next collective finds.
            let _ = self.failed.set(());
            return None;
        }
        Some(all)
    }

    /// Returns these weights whole, each with the bits that it was pushed with; with codes and values of 0 after a failure.
    fn gather(&self, shards: &[Shard]) -> Vec<Weight> {
        if self.device.is_planned() {
            // The parts of all ranks are there beside the weights.
            let parts = self.planned_parts(shards);
            let weights = shards.iter().map(|shard| shard.zeros(&self.device)).collect();
            drop(parts);
            return weights;
        }
        let Some(parts) = self.exchange_parts(shards) else {
            return shards.iter().map(|shard| shard.zeros(&self.device)).collect();
        };
        let mut rest: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        let weight = |shard: &Shard| {
            let mut bytes = Vec::with_capacity(shard.bytes);
            for (rank, rest) in rest.iter_mut().enumerate() {
                let (part, after) = rest.split_at(self.range(shard.bytes, rank).len());
                bytes.extend_from_slice(part);
                *rest = after;
            }
            shard.whole(bytes, &self.device)
        };
        shards.iter().map(weight).collect()
    }

    fn planned_parts(&self, shards: &[Shard]) -> Option<MetaMemory> {
        self.device.charge(MemoryUse::Weights, shards.iter().map(|shard| shard.bytes).sum())
    }
}

impl ShardedWeight {
    /// Returns rows and columns.
    pub fn dims(&self) -> [usize; 2] {
        self.dims
    }

    /// Returns the bytes that this rank holds.
    pub fn own_bytes(&self) -> usize {
        let bytes = self.shards.block(self.block)[self.index].bytes;
        self.shards.range(bytes, self.shards.exchange.rank()).len()
    }

    /// Returns true if the whole weight is quantized.
    pub fn is_quantized(&self) -> bool {
        matches!(self.shards.block(self.block)[self.index].layout, ShardLayout::Quantized(_))
    }

    /// Returns the whole weight, which takes all ranks: the others must be in [`FrozenShards::finish`], or ask for the same.
    pub(crate) fn gather(&self) -> Weight {
        let (first, weight) = (self.block as u32, Some(self.index as u32));
        let mut pass = self.shards.begin_announced(Announcement { first, count: 1, is_backward: false, weight });
        pass.next_block().pop().expect("a pass through one weight")
    }

    /// Returns whether it holds no values.
    pub(crate) fn is_planned(&self) -> bool {
        self.shards.device.is_planned()
    }
}

impl Weight {
    /// Returns the weight with all its values: itself, or gathered from all ranks, which must ask for the same weight or be in
    /// [`FrozenShards::finish`].
    pub fn whole(&self) -> Cow<'_, Self> {
        match self {
            Self::Sharded(weight) => Cow::Owned(weight.gather()),
            _ => Cow::Borrowed(self),
        }
    }
}

impl Shard {
    fn whole(&self, bytes: Vec<u8>, device: &Device) -> Weight {
        match &self.layout {
            ShardLayout::Dense(dtype) => Weight::Frozen(from_le_bytes(&bytes, self.dims, device, *dtype)),
            ShardLayout::Quantized(layout) => Weight::Quantized(QuantizedWeight::new(layout.join(bytes), device)),
        }
    }

    fn zeros(&self, device: &Device) -> Weight {
        match &self.layout {
            ShardLayout::Dense(dtype) => Weight::Frozen(unfilled(self.dims, device, *dtype)),
            ShardLayout::Quantized(layout) => layout.zeros(self.bytes, device),
        }
    }
}

impl ShardBytes {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Host(bytes) => bytes,
            Self::Planned { .. } => &[],
        }
    }
}

impl BlockPass {
    /// Replaces the sharded ones among the weights of the next block by whole ones.
    ///
    /// # Panics
    /// After the last block.
    pub fn place_next(&mut self, weights: Vec<&mut Weight>) {
        let mut whole: Vec<Option<Weight>> = self.next_block().into_iter().map(Some).collect();
        for weight in weights {
            if let Weight::Sharded(sharded) = weight {
                *weight = whole[sharded.index].take().expect("each weight is in a block once");
            }
        }
    }

    /// Returns the weights of the next block, in the order in which they were pushed.
    fn next_block(&mut self) -> Vec<Weight> {
        let block = self.left.take().expect("a block is left in the pass");
        let shards = self.shards.block(block);
        self.shards.gather(self.left.of(&shards))
    }
}

impl Drop for BlockPass {
    fn drop(&mut self) {
        if !self.shards.device.is_planned() && !std::thread::panicking() {
            self.shards.serve(self.left);
        }
        self.shards.is_passing.store(false, Ordering::SeqCst);
    }
}

impl Announcement {
    const NOTHING: Self = Self { first: 0, count: 0, is_backward: false, weight: None };

    fn to_bytes(self) -> Vec<u8> {
        let Self { first, count, is_backward, weight } = self;
        let numbers = [first, count, is_backward.into(), weight.map_or(0, |weight| weight + 1)];
        numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
    }

    /// Returns what [`to_bytes`](Self::to_bytes) gave; nothing for other bytes.
    fn from_bytes(bytes: &[u8]) -> Self {
        let numbers: Vec<u32> = bytes.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
        match numbers[..] {
            [first, count, is_backward, weight] => {
                Self { first, count, is_backward: is_backward == 1, weight: weight.checked_sub(1) }
            }
            _ => Self::NOTHING,
        }
    }

    /// The blocks in the order of the pass.
    fn blocks(mut self) -> impl Iterator<Item = usize> {
        core::iter::from_fn(move || self.take())
    }

    /// Takes the next block.
    fn take(&mut self) -> Option<usize> {
        self.count = self.count.checked_sub(1)?;
        if self.is_backward {
            return Some((self.first + self.count) as usize);
        }
        self.first += 1;
        Some(self.first as usize - 1)
    }

    /// The weights of a block that it reads.
    fn of(self, shards: &[Shard]) -> &[Shard] {
        match self.weight {
            None => shards,
            Some(index) => &shards[index as usize..][..1],
        }
    }
}

#[cfg(test)]
mod tests;
