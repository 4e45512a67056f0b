//! Device memory at fixed addresses.
//!
//! One range of addresses as long as the device's memory is reserved at the start; physical chunks are mapped to its
//! end as they are needed. So memory never moves, never fragments between allocations of different owners, and grows
//! without a copy. Blocks go first fit to the lowest address: the same calls in the same order get the same addresses,
//! which tensor maps rely on.
//!
//! **The rule of reuse.** A block goes back the moment its [`Buffer`] is dropped, while the device may still be working
//! on it. That is right because whoever gets it next uses it on the same stream, after that work. The copy stream is
//! the exception: what it reads or writes is owned by a [`super::Ticket`], which orders the streams before it lets go.

use cudarc::driver::sys;

use super::blocks::{ALIGN, Blocks};
use super::driver::{Failed, driver, lock};
use super::error::bytes as show;
use super::{Cuda, CudaError, MemoryLedger, MemoryStats, MemoryUse};

/// Chunks are at least this long, since mapping costs about as much for a small one as for a large one.
const CHUNK: usize = 64 << 20;

/// A block of device memory. Dropping it gives the block back at once (see the rule of reuse above).
pub struct Buffer {
    cuda: Cuda,
    address: u64,
    bytes: usize,
    usage: MemoryUse,
    /// The owner of memory that is not of the arena.
    owner: Option<Box<dyn Send + Sync>>,
}

pub(super) struct Arena {
    base: u64,
    reserved: usize,
    granularity: usize,
    /// `None` where nothing is mapped: the arena then only gives out addresses.
    device: Option<sys::CUdevice>,
    chunks: Vec<usize>,
    blocks: Blocks,
    ledger: MemoryLedger,
    /// Bytes in blocks, less those of the beginning, and their maximum, while work is measured.
    measured: Option<(isize, isize)>,
    /// While work is recorded, the memory that blocks come from: its address and its parts.
    recorded: Option<(u64, Blocks)>,
    /// True if recorded work found no space there.
    outgrown: bool,
}

impl Cuda {
    /// Memory that is not initialized. `usage` appears in [`MemoryStats`] and in the message of an error.
    ///
    /// When there is not enough, the error sticks and the buffer has no memory.
    pub fn alloc(&self, bytes: usize, usage: MemoryUse) -> Buffer {
        let mut buffer = Buffer { cuda: self.clone(), address: 0, bytes, usage, owner: None };
        if bytes > 0 && !self.has_failed() {
            let taken = self.bind().and_then(|()| lock(&self.0.arena).alloc(block_size(bytes), usage));
            match taken {
                Ok(address) => buffer.address = address,
                Err(failed) => self.fail(self.out_of_memory(failed, bytes, usage)),
            }
        }
        buffer
    }

    /// Returns how much memory is used, and for what.
    pub fn memory(&self) -> MemoryStats {
        lock(&self.0.arena).memory()
    }

    /// Begins a new measurement of [`MemoryStats::high_water`].
    pub fn reset_high_water(&self) {
        lock(&self.0.arena).reset_high_water();
    }

    /// Bytes that were in buffers when the first one for `usage` came, since the start or
    /// [`Cuda::reset_high_water`].
    pub fn in_use_before(&self, usage: MemoryUse) -> Option<usize> {
        lock(&self.0.arena).ledger.in_use_before(usage)
    }

    /// Free and total memory of the device, as the driver counts them.
    pub fn device_memory(&self) -> (usize, usize) {
        let (mut free, mut total) = (0, 0);
        if self.is_planned() {
            let total = self.0.props.total_memory;
            return (total.saturating_sub(lock(&self.0.arena).blocks.in_use()), total);
        }
        let asked = self.bind().and_then(|()| driver!(cuMemGetInfo_v2(&mut free, &mut total)));
        asked.map_or((0, self.0.props.total_memory), |()| (free, total))
    }

    /// Gives unused memory at the end of the arena, and page-locked memory that nobody uses, back to the driver, after
    /// waiting for the device.
    pub fn trim(&self) {
        if self.synchronize().is_ok() {
            lock(&self.0.pinned).release();
            self.run("giving memory back", || lock(&self.0.arena).trim());
        }
    }

    pub(super) fn out_of_memory(&self, failed: Failed, bytes: usize, usage: MemoryUse) -> CudaError {
        if failed.status != sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return failed.during(format!("allocating {} for {usage}", show(bytes)));
        }
        let (free, total) = self.device_memory();
        let MemoryStats { in_use, mapped, by_use, .. } = self.memory();
        let users: Vec<_> = by_use.iter().take(6).map(|(usage, bytes)| format!("{usage} {}", show(*bytes))).collect();
        let users = if users.is_empty() { "nothing".to_owned() } else { users.join(", ") };
        // What is mapped and not in use is free too, if in pieces that are too short.
        CudaError::OutOfMemory { usage, asked: bytes, free: free + mapped - in_use, total, arena: in_use, users }
    }
}

impl Buffer {
    /// Memory of another library, which `owner` keeps.
    pub(super) fn foreign(
        cuda: &Cuda,
        address: u64,
        bytes: usize,
        usage: MemoryUse,
        owner: Box<dyn Send + Sync>,
    ) -> Self {
        Self { cuda: cuda.clone(), address, bytes, usage, owner: Some(owner) }
    }

    /// Returns whether the memory belongs to another library.
    pub(super) fn is_foreign(&self) -> bool {
        self.owner.is_some()
    }

    /// The device address; 0 in an empty buffer and after an error.
    pub fn ptr(&self) -> u64 {
        self.address
    }

    /// The length that was asked for.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The device that the memory is on.
    pub fn cuda(&self) -> &Cuda {
        &self.cuda
    }

    /// The use of the memory.
    pub fn usage(&self) -> MemoryUse {
        self.usage
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.address != 0 && !self.is_foreign() {
            lock(&self.cuda.0.arena).free(self.address, block_size(self.bytes), self.usage);
        }
    }
}

impl core::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Buffer({} at {:#x} for {})", show(self.bytes), self.address, self.usage)
    }
}

impl Arena {
    /// Reserves addresses for the whole of the device's memory, and no memory.
    pub(super) fn reserve(device: sys::CUdevice, total: usize) -> Result<Self, Failed> {
        let mut granularity = 0;
        let recommended = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
        driver!(cuMemGetAllocationGranularity(&mut granularity, &chunk_properties(device), recommended))?;
        let reserved = total.next_multiple_of(granularity);
        let mut base = 0;
        driver!(cuMemAddressReserve(&mut base, reserved, granularity, 0, 0))?;
        Ok(Self::new(base, reserved, granularity, Some(device)))
    }

    /// Addresses without memory, more of them than any device has.
    pub(super) fn unmapped() -> Self {
        Self::new(1 << 40, 1 << 46, 2 << 20, None)
    }

    fn new(base: u64, reserved: usize, granularity: usize, device: Option<sys::CUdevice>) -> Self {
        let (chunks, blocks, ledger) = Default::default();
        let (measured, recorded, outgrown) = (None, None, false);
        Self { base, reserved, granularity, device, chunks, blocks, ledger, measured, recorded, outgrown }
    }

    /// Begins to measure how much memory is held at a time.
    pub(super) fn begin_measurement(&mut self) {
        self.measured = Some((0, 0));
    }

    /// Returns the most bytes held since the measurement began, beyond those of the beginning.
    pub(super) fn end_measurement(&mut self) -> usize {
        self.measured.take().map_or(0, |(_, most)| most.unsigned_abs())
    }

    /// Gives out parts of one block until [`end_recording`](Self::end_recording).
    pub(super) fn begin_recording(&mut self, address: u64, bytes: usize) {
        let mut parts = Blocks::default();
        parts.grow(bytes / ALIGN * ALIGN);
        (self.recorded, self.outgrown) = (Some((address, parts)), false);
    }

    /// Returns whether the block sufficed, and all parts came back.
    pub(super) fn end_recording(&mut self) -> bool {
        self.recorded.take().is_some_and(|(_, parts)| parts.in_use() == 0) && !self.outgrown
    }

    pub(super) fn alloc(&mut self, size: usize, usage: MemoryUse) -> Result<u64, Failed> {
        if let Some((now, most)) = &mut self.measured {
            *now += size as isize;
            *most = (*most).max(*now);
        }
        if let Some((address, parts)) = &mut self.recorded {
            if let Some(offset) = parts.take(size) {
                return Ok(*address + offset as u64);
            }
            self.outgrown = true;
        }
        let offset = match self.blocks.take(size) {
            Some(offset) => offset,
            None => {
                self.grow(size - self.blocks.tail().map_or(0, |(_, free)| free))?;
                self.blocks.take(size).expect("the tail was grown to this size")
            }
        };
        self.ledger.charge(usage, size);
        Ok(self.base + offset as u64)
    }

    pub(super) fn free(&mut self, address: u64, size: usize, usage: MemoryUse) {
        if let Some((now, _)) = &mut self.measured {
            *now -= size as isize;
        }
        if let Some((start, parts)) = &mut self.recorded
            && (*start..*start + parts.end() as u64).contains(&address)
        {
            return parts.give((address - *start) as usize, size);
        }
        self.blocks.give((address - self.base) as usize, size);
        self.ledger.release(usage, size);
    }

    fn memory(&self) -> MemoryStats {
        MemoryStats { mapped: self.blocks.end(), extent: self.blocks.extent(), ..self.ledger.stats() }
    }

    fn reset_high_water(&mut self) {
        self.blocks.reset_extent();
        self.ledger.reset();
    }

    /// Maps at least `need` more bytes, and some to spare where there are any.
    fn grow(&mut self, need: usize) -> Result<(), Failed> {
        let need = need.next_multiple_of(self.granularity);
        let generous = need.max(CHUNK.next_multiple_of(self.granularity));
        match self.map(generous) {
            Err(failed) if failed.status == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY && generous > need => {
                self.map(need)
            }
            done => done,
        }
    }

    fn map(&mut self, size: usize) -> Result<(), Failed> {
        let end = self.blocks.end();
        if size > self.reserved - end {
            return Err(Failed { call: "cuMemCreate", status: sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY });
        }
        let address = self.base + end as u64;
        let Some(device) = self.device else {
            self.blocks.grow(size);
            return Ok(());
        };
        let mut chunk = 0;
        driver!(cuMemCreate(&mut chunk, size, &chunk_properties(device), 0))?;
        let mapped = driver!(cuMemMap(address, size, 0, chunk, 0));
        // The mapping keeps the chunk alive.
        driver!(cuMemRelease(chunk))?;
        mapped?;
        if let Err(failed) = driver!(cuMemSetAccess(address, size, &access(device), 1)) {
            let _ = driver!(cuMemUnmap(address, size));
            return Err(failed);
        }
        self.chunks.push(size);
        self.blocks.grow(size);
        Ok(())
    }

    fn trim(&mut self) -> Result<(), Failed> {
        while let (Some(&chunk), Some((_, free))) = (self.chunks.last(), self.blocks.tail())
            && chunk <= free
        {
            driver!(cuMemUnmap(self.base + (self.blocks.end() - chunk) as u64, chunk))?;
            self.chunks.pop();
            self.blocks.shrink(chunk);
        }
        Ok(())
    }

    /// Gives everything back. The device must have finished.
    pub(super) fn release(&mut self) {
        let mut address = self.base;
        for &chunk in &self.chunks {
            let _ = driver!(cuMemUnmap(address, chunk));
            address += chunk as u64;
        }
        let _ = driver!(cuMemAddressFree(self.base, self.reserved));
    }
}

fn block_size(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGN)
}

/// The properties of a chunk: pinned memory of the device.
fn chunk_properties(device: sys::CUdevice) -> sys::CUmemAllocationProp {
    // SAFETY: integers, a null pointer and enums that have a variant of value zero.
    let mut properties: sys::CUmemAllocationProp = unsafe { core::mem::zeroed() };
    properties.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    set_location(&mut properties.location, device);
    properties
}

fn access(device: sys::CUdevice) -> sys::CUmemAccessDesc {
    // SAFETY: as above.
    let mut access: sys::CUmemAccessDesc = unsafe { core::mem::zeroed() };
    access.flags = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    set_location(&mut access.location, device);
    access
}

/// Names the device. Its index stands after the kind, in a field of its own up to CUDA 13.1 and in a union since.
fn set_location(location: &mut sys::CUmemLocation, device: sys::CUdevice) {
    const { assert!(size_of::<sys::CUmemLocation>() == 8) };
    location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
    // SAFETY: the second of the two 32-bit words of the structure.
    unsafe { (&raw mut *location).cast::<i32>().add(1).write(device) };
}
