use std::sync::{Barrier, Mutex};
use std::thread;

use super::*;
use crate::host::tests::noise;
use crate::params::quantized::{Absmax, BlockCodec, Fp8Scaling, QuantizedData, QuantizedFormat};
use crate::{DType, Params, from_f32, to_f32};

/// Ranks on threads of one process.
#[derive(Debug)]
struct ThreadRank {
    rank: usize,
    ranks: Arc<(Barrier, Mutex<Vec<Vec<u8>>>)>,
    size: usize,
}

impl ShardExchange for ThreadRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_gather(&self, own: &[u8]) -> Option<Vec<Vec<u8>>> {
        let (barrier, bytes) = &*self.ranks;
        bytes.lock().expect("no rank panics")[self.rank] = own.to_vec();
        barrier.wait();
        let all = bytes.lock().expect("no rank panics").clone();
        barrier.wait();
        Some(all)
    }
}

/// Runs `work` on a thread for each rank.
fn on_ranks<T: Send>(size: usize, work: impl Fn(usize, Arc<FrozenShards>) -> T + Sync) -> Vec<T> {
    let ranks = Arc::new((Barrier::new(size), Mutex::new(vec![Vec::new(); size])));
    thread::scope(|scope| {
        let rank = |rank| {
            let (exchange, work) = (ThreadRank { rank, ranks: Arc::clone(&ranks), size }, &work);
            scope.spawn(move || work(rank, FrozenShards::new(Arc::new(exchange), &Device::cpu())))
        };
        let threads: Vec<_> = (0..size).map(rank).collect();
        threads.into_iter().map(|thread| thread.join().expect("no rank panics")).collect()
    })
}

fn codes(seed: u64, n: usize) -> Vec<u8> {
    noise(seed, n).into_iter().map(|x| (x * 128.0) as i8 as u8).collect()
}

fn four_bit(seed: u64, [rows, cols]: [usize; 2], nested: Option<usize>) -> Weight {
    let blocks = rows * cols / 32;
    let absmax = match nested {
        None => Absmax::Single(noise(seed + 1, blocks)),
        Some(blocksize) => Absmax::Double {
            codes: codes(seed + 2, blocks),
            map: Box::new(noise(3, 256).try_into().expect("256 values")),
            nested: noise(seed + 4, blocks.div_ceil(blocksize)),
            blocksize,
            offsets: noise(seed + 5, 1),
        },
    };
    let table = noise(6, 16).try_into().expect("16 values");
    let format = QuantizedFormat::FourBit { codes: codes(seed, rows * cols / 2), table, blocksize: 32, absmax };
    Weight::Quantized(QuantizedWeight::new(QuantizedData { dims: [rows, cols], format }, &Device::cpu()))
}

fn int8(seed: u64, [rows, cols]: [usize; 2]) -> Weight {
    let int8 = noise(seed, rows * cols).into_iter().map(|x| (x * 128.0) as i8).collect();
    let format = QuantizedFormat::Int8 { codes: int8, scales: noise(seed + 1, rows), factor: 1.0 / 127.0 };
    Weight::Quantized(QuantizedWeight::new(QuantizedData { dims: [rows, cols], format }, &Device::cpu()))
}

fn fp8(seed: u64, dims: [usize; 2]) -> Weight {
    let codes = codes(seed, dims[0] * dims[1]).into_iter().map(|code| code & 0xf7).collect();
    let scaling = Fp8Scaling::Row;
    let format = QuantizedFormat::Fp8 { codes, scales: noise(seed + 1, dims[0]), scaling, section: dims[0] };
    Weight::Quantized(QuantizedWeight::new(QuantizedData { dims, format }, &Device::cpu()))
}

/// Blocks of four elements: a scale and four codes.
fn blocks(seed: u64, [rows, cols]: [usize; 2]) -> Weight {
    const CODEC: BlockCodec = BlockCodec {
        name: "five bytes",
        elements: 4,
        bytes: 5,
        decode: |blocks, out| {
            for (block, out) in blocks.chunks(5).zip(out.chunks_mut(4)) {
                out.iter_mut().zip(&block[1..]).for_each(|(out, code)| *out = f32::from(block[0]) * f32::from(*code));
            }
        },
    };
    let format = QuantizedFormat::Blocks { bytes: codes(seed, rows * cols / 4 * 5), codec: CODEC };
    Weight::Quantized(QuantizedWeight::new(QuantizedData { dims: [rows, cols], format }, &Device::cpu()))
}

fn dense(seed: u64, dims: [usize; 2], dtype: DType) -> Weight {
    Weight::Frozen(from_f32(noise(seed, dims[0] * dims[1]), dims, &Device::cpu(), dtype))
}

/// A block with a weight of every format; no number of bytes is a multiple of all numbers of ranks.
fn block(seed: u64) -> Vec<Weight> {
    vec![
        dense(seed, [5, 7], DType::F32),
        dense(seed + 10, [3, 5], DType::BF16),
        four_bit(seed + 20, [4, 40], None),
        four_bit(seed + 30, [4, 64], Some(4)),
        int8(seed + 40, [3, 11]),
        blocks(seed + 50, [3, 8]),
        fp8(seed + 60, [3, 7]),
    ]
}

fn push(shards: &Arc<FrozenShards>, seed: u64) -> Vec<Weight> {
    let mut weights = block(seed);
    shards.push_block(weights.iter_mut().collect());
    weights
}

/// The values of weights in bits.
fn bits(weights: &[Weight]) -> Vec<Vec<u32>> {
    let params = Params::none(&Device::cpu(), DType::F32);
    weights.iter().map(|w| to_f32(w.matrix(&params)).into_iter().map(f32::to_bits).collect()).collect()
}

/// Gathers the next block of a pass.
fn next(pass: &mut BlockPass, weights: &[Weight]) -> Vec<Vec<u32>> {
    let mut weights = weights.to_vec();
    pass.place_next(weights.iter_mut().collect());
    bits(&weights)
}

#[test]
fn gathered_weights_have_the_bits_of_whole_ones() {
    let whole = [bits(&block(100)), bits(&block(200))];
    for size in [1, 2, 3, 5] {
        on_ranks(size, |_, shards| {
            let blocks = [push(&shards, 100), push(&shards, 200)];
            let mut forward = shards.begin(0..2, false);
            assert_eq!(next(&mut forward, &blocks[0]), whole[0], "{size} ranks");
            assert_eq!(next(&mut forward, &blocks[1]), whole[1], "{size} ranks");
            drop(forward);
            let mut backward = shards.begin(0..2, true);
            assert_eq!(next(&mut backward, &blocks[1]), whole[1], "{size} ranks, backward");
            assert_eq!(next(&mut backward, &blocks[0]), whole[0], "{size} ranks, backward");
            drop(backward);
            shards.finish();
        });
    }
}

/// Each rank holds its share of the bytes, and the shares are the whole.
#[test]
fn a_rank_holds_a_share() {
    let bytes = |weights: &[Weight]| -> usize {
        weights.iter().map(|w| if let Weight::Sharded(w) = w { w.own_bytes() } else { 0 }).sum()
    };
    for size in [2, 3] {
        let held = on_ranks(size, |_, shards| bytes(&push(&shards, 7)));
        let (f32, bf16, single, double, int8, fp8, blocks) = (140, 30, 80 + 20, 128 + 8 + 8, 33 + 12, 21 + 12, 30);
        let whole = f32 + bf16 + single + double + int8 + fp8 + blocks;
        assert_eq!(held.iter().sum::<usize>(), whole, "{size} ranks");
        assert!(held.iter().all(|held| held.abs_diff(whole / size) <= 6 * size), "{size} ranks: {held:?}");
    }
}

/// Ranks with different numbers and kinds of passes, one of which ends early, and single weights in between.
#[test]
fn ranks_with_other_work_take_part() {
    let whole = [bits(&block(100)), bits(&block(200)), bits(&block(300))];
    on_ranks(3, |rank, shards| {
        let blocks = [100, 200, 300].map(|seed| push(&shards, seed));
        let through = |blocks: &[Vec<Weight>], range: Range<usize>, is_backward: bool, stop: usize| {
            let mut pass = shards.begin(range.clone(), is_backward);
            let order: Vec<usize> = if is_backward { range.rev().collect() } else { range.collect() };
            for index in order.into_iter().take(stop) {
                assert_eq!(next(&mut pass, &blocks[index]), whole[index], "rank {rank}, block {index}");
            }
        };
        for _ in 0..rank {
            through(&blocks, 0..3, false, 3);
            through(&blocks, 1..3, true, 2);
        }
        if rank == 1 {
            through(&blocks, 0..3, false, 1);
        }
        if rank != 1 {
            assert_eq!(bits(&blocks[2][3..4]), whole[2][3..4], "rank {rank}, a single weight");
        }
        shards.finish();
        through(&blocks, 2..3, true, 1);
        shards.finish();
    });
}

/// After a failure of the ranks, passes end with weights of the right shapes, and nothing waits.
#[test]
fn a_failure_ends_all_passes() {
    #[derive(Debug)]
    struct Broken;
    impl ShardExchange for Broken {
        fn rank(&self) -> usize {
            1
        }
        fn size(&self) -> usize {
            2
        }
        fn all_gather(&self, _: &[u8]) -> Option<Vec<Vec<u8>>> {
            None
        }
    }
    let shards = FrozenShards::new(Arc::new(Broken), &Device::cpu());
    let weights = push(&shards, 1);
    let mut pass = shards.begin(0..1, false);
    let values = next(&mut pass, &weights);
    let shapes = |values: &[Vec<u32>]| values.iter().map(Vec::len).collect::<Vec<_>>();
    assert_eq!(shapes(&values), shapes(&bits(&block(1))));
    assert!(values.iter().flatten().all(|bits| f32::from_bits(*bits).is_finite()));
    drop(pass);
    shards.finish();
}

#[test]
fn announcements_come_back() {
    for weight in [None, Some(0), Some(5)] {
        let sent = Announcement { first: 3, count: 2, is_backward: weight.is_some(), weight };
        assert_eq!(Announcement::from_bytes(&sent.to_bytes()), sent);
    }
    assert_eq!(Announcement::from_bytes(&[1, 2]), Announcement::NOTHING);
}
