//! Attention over pages as kernels: single tokens, whole prompts, and parts of prompts have one each.

use std::sync::{Arc, Mutex, PoisonError};

use super::{FixedLists, PAGE, PagedBatch, PagedSequence};
use crate::attention::Heads;
use crate::ops::attention::cuda::{self as attention, Engine};
use crate::runtime::op::{blocks, int, kernel, lanes};
use crate::runtime::{Arch, Array, Cuda, DType, Entry, Ints, Kernel, MemoryUse, PagedTiles, args, elementwise, entry};

/// Query heads of a tile of the decoding kernel.
const TILE_HEADS: usize = 16;

/// The most blocks that share a sequence: their results are merged by one block.
const MAX_SPLITS: usize = 64;

/// Words of an entry of the kernels' lists.
const ENTRY: usize = 4;

/// The lists of a batch on the device, by the heads of the layers that use them.
#[derive(Debug, Default)]
pub(super) struct ListsByHeads(Mutex<Vec<(Heads, Arc<Lists>)>>);

impl ListsByHeads {
    fn get(&self, heads: Heads, make: impl FnOnce() -> Lists) -> Arc<Lists> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, lists)) = known.iter().find(|(of, _)| *of == heads) {
            return Arc::clone(lists);
        }
        let lists = Arc::new(make());
        known.push((heads, Arc::clone(&lists)));
        lists
    }
}

/// The work of a batch, as the kernels read it.
#[derive(Debug)]
struct Lists {
    words: Ints,
    /// New tokens as (row, position, start of the block table): those of single tokens first.
    singles: usize,
    others: usize,
    /// Parts of prompts with earlier tokens, as (first row, queries, position, start of the block table).
    tiles: usize,
    /// The first word of the tiles, and of the block tables.
    tiles_at: usize,
    tables_at: usize,
    /// Blocks that have ended, for each tile of heads of a sequence that several blocks share.
    counters: Ints,
    /// Blocks that share a sequence of a single token.
    splits: usize,
    /// Whole prompts, which attend to their own rows.
    prompts: Option<attention::Plan>,
}

/// Tiles of the kernels on tensor cores; `None` where there are none for these heads.
fn tiles(cuda: &Cuda, heads: Heads, dtype: DType) -> Option<PagedTiles> {
    let tiles = match Engine::fastest(cuda.props(), dtype, heads.head_dim) {
        Engine::Plain => return None,
        Engine::Sm90 | Engine::MmaSync => {
            PagedTiles::of(heads.head_dim as u32, Arch::new(cuda.props().major, cuda.props().minor))
        }
    };
    (heads.heads / heads.kv_heads <= tiles.rows()).then_some(tiles)
}

/// Returns the tiles of heads that a sequence has in the decoding kernel.
fn head_tiles(heads: Heads) -> usize {
    heads.kv_heads * (heads.heads / heads.kv_heads).div_ceil(TILE_HEADS)
}

/// Returns the number of blocks that share each of `sequences`, the longest of which has `pages` pages: as many as give
/// every multiprocessor one. More cost more to merge than they gain.
fn splits(cuda: &Cuda, tiles: &PagedTiles, heads: Heads, sequences: usize, pages: usize) -> usize {
    let wanted = cuda.props().sm_count as usize / (head_tiles(heads) * sequences.max(1));
    wanted.min(pages.div_ceil(tiles.warps as usize)).clamp(1, MAX_SPLITS)
}

impl Lists {
    fn new(cuda: &Cuda, heads: Heads, dtype: DType, batch: &PagedBatch) -> Self {
        let tensor_cores = tiles(cuda, heads, dtype);
        // Counters of the blocks that share a sequence, and how many do.
        let shared = |sequences: usize, pages: usize| {
            let splits = tensor_cores.as_ref().map_or(1, |tiles| splits(cuda, tiles, heads, sequences, pages));
            let counters = if splits > 1 { sequences * head_tiles(heads) } else { 0 };
            (Ints::from_slice(cuda, &vec![0u32; counters], MemoryUse::Inputs), splits)
        };
        if let Some(FixedLists { words, tables_at, pages }) = &batch.fixed {
            let (words, singles, tables_at) = (words.clone(), batch.rows, *tables_at);
            let (counters, splits) = shared(singles, *pages);
            return Self {
                words,
                singles,
                others: 0,
                tiles: 0,
                tiles_at: 0,
                tables_at,
                counters,
                splits,
                prompts: None,
            };
        }
        let (singles, others): (Vec<_>, Vec<_>) = batch.sequences.iter().partition(|sequence| sequence.new == 1);
        let mut tables = Vec::new();
        let mut rows = Vec::new();
        let mut tiles = Vec::new();
        let mut prompts = Vec::new();
        for sequence in singles.iter().chain(&others) {
            let &&PagedSequence { row, new, past, ref pages } = sequence;
            let table = tables.len();
            tables.extend_from_slice(pages);
            rows.extend((0..new).flat_map(|token| [row + token, past + token, table, 0]));
            match &tensor_cores {
                Some(_) if new > 1 && past == 0 => prompts.push(row..row + new),
                Some(kernels) if new > 1 => {
                    let queries = kernels.rows() / (heads.heads / heads.kv_heads);
                    let starts = (0..new).step_by(queries);
                    tiles.extend(starts.flat_map(|t| [row + t, queries.min(new - t), past + t, table]));
                }
                _ => {}
            }
        }
        let longest = singles.iter().map(|sequence| sequence.pages.len()).max().unwrap_or(0);
        let (counters, splits) = shared(singles.len(), longest);
        let (tiles_at, tables_at) = (rows.len(), rows.len() + tiles.len());
        let words: Vec<u32> = rows.iter().chain(&tiles).map(|&word| word as u32).collect();
        let words = [words, tables].concat();
        Self {
            words: Ints::from_slice(cuda, &words, MemoryUse::Inputs),
            singles: singles.len(),
            others: batch.rows - singles.len(),
            tiles: tiles.len() / ENTRY,
            tiles_at,
            tables_at,
            counters,
            splits,
            prompts: (!prompts.is_empty())
                .then(|| attention::Plan::of_prompts(cuda, &prompts, batch.rows, heads, dtype)),
        }
    }
}

/// The operands of a call, and where its kernels are.
struct Call<'a> {
    q: Array,
    k: Array,
    v: Array,
    sinks: Option<Array>,
    pools: [&'a Array; 2],
    heads: Heads,
    lists: &'a Lists,
}

pub(super) fn forward(
    [q, k, v]: [&Array; 3],
    sinks: Option<&Array>,
    pools: [&Array; 2],
    heads: Heads,
    batch: &PagedBatch,
    pad_cols: usize,
) -> Array {
    let cuda = q.cuda();
    let lists = batch.lists.get(heads, || Lists::new(cuda, heads, q.dtype(), batch));
    let [q, k, v] = [q, k, v].map(Array::aligned);
    let o = Array::padded(cuda, q.dims(), pad_cols, q.dtype(), MemoryUse::Activations);
    let call = Call { q, k, v, sinks: sinks.map(Array::contiguous), pools, heads, lists: &lists };
    match tiles(cuda, heads, call.q.dtype()) {
        Some(tiles) => {
            call.write(lists.singles, lists.others);
            call.decode(&tiles, &o);
            if let Some(plan) = &lists.prompts {
                attention::forward_onto(&call.q, &call.k, &call.v, call.sinks.as_ref(), &o, plan);
            }
            call.chunks(&tiles, &o);
        }
        None => {
            call.write(0, lists.singles + lists.others);
            call.plain(&o);
        }
    }
    o
}

impl Call<'_> {
    /// Returns a kernel with the options of the scores.
    fn kernel<'d>(&self, entry: Entry, mut defines: Vec<(&'d str, &'d str)>) -> Kernel {
        let Heads { window, softcap, .. } = self.heads;
        let options = [("WINDOW", window.is_some()), ("SOFTCAP", softcap.is_some()), ("SINKS", self.sinks.is_some())];
        defines.extend(options.into_iter().filter(|(_, used)| *used).map(|(name, _)| (name, "")));
        self.q.cuda().kernel(entry, &defines)
    }

    /// Returns window, softcap and sinks as the kernels' arguments.
    fn options(&self) -> (i32, f32, u64) {
        let Heads { window, softcap, .. } = self.heads;
        (window.map_or(0, int), softcap.unwrap_or(1.0), self.sinks.as_ref().map_or(0, Array::ptr))
    }

    /// Returns the address of the block tables.
    fn tables(&self) -> u64 {
        self.lists.words.ptr_at(self.lists.tables_at)
    }

    /// Writes keys and values of some of the listed rows.
    fn write(&self, first: usize, count: usize) {
        let [k_pool, v_pool] = self.pools;
        let (width, dtype) = (self.k.cols(), self.k.dtype());
        kernel(self.q.cuda(), entry!("paged_write.cu", "paged_write"), dtype).launch(
            [blocks((count * (width / lanes(dtype))).div_ceil(256)), 2, 1],
            [256, 1, 1],
            0,
            args![
                self.k.ptr(),
                self.v.ptr(),
                k_pool.ptr(),
                v_pool.ptr(),
                self.lists.words.ptr_at(first * ENTRY),
                self.tables(),
                int(count),
                int(width),
                int(self.k.ld()),
                int(self.v.ld()),
                int(k_pool.ld())
            ],
        );
    }

    /// Computes the rows of single tokens, and writes their keys and values.
    fn decode(&self, tiles: &PagedTiles, o: &Array) {
        let &Lists { ref words, ref counters, singles, splits, .. } = self.lists;
        if singles == 0 {
            return;
        }
        let (cuda, heads) = (self.q.cuda(), self.heads);
        let Heads { heads: n, kv_heads, head_dim, scale, .. } = heads;
        let merged = if splits > 1 { singles * head_tiles(heads) * splits * TILE_HEADS } else { 0 };
        let scratch = |cols| Array::dense(cuda, [merged, cols], DType::F32, MemoryUse::Scratch);
        let (partial, stats) = (scratch(head_dim), scratch(2));
        let (window, softcap, sinks) = self.options();
        let [k_pool, v_pool] = self.pools;
        let defines = tiles.defines(self.q.dtype().name(), head_dim as u32);
        self.kernel(entry!("paged_attention.cu", "paged_decode"), defines).early().launch(
            [blocks(head_tiles(heads)), blocks(singles), blocks(splits)],
            [32 * tiles.warps, 1, 1],
            tiles.decode_shared(head_dim as u32),
            args![
                self.q.ptr(),
                self.k.ptr(),
                self.v.ptr(),
                k_pool.ptr(),
                v_pool.ptr(),
                o.ptr(),
                partial.ptr(),
                stats.ptr(),
                counters.ptr(),
                words.ptr(),
                self.tables(),
                int(self.q.ld()),
                int(self.k.ld()),
                int(self.v.ld()),
                int(o.ld()),
                int(k_pool.ld()),
                int(n),
                int(kv_heads),
                int(splits),
                scale,
                window,
                softcap,
                sinks
            ],
        );
    }

    /// Computes the rows of parts of prompts, whose keys and values are in the pages.
    fn chunks(&self, tiles: &PagedTiles, o: &Array) {
        let &Lists { ref words, tiles: count, tiles_at, .. } = self.lists;
        let Heads { heads: n, kv_heads, head_dim, scale, .. } = self.heads;
        if count == 0 {
            return;
        }
        let (window, softcap, sinks) = self.options();
        let [k_pool, v_pool] = self.pools;
        let defines = tiles.defines(self.q.dtype().name(), head_dim as u32);
        self.kernel(entry!("paged_attention.cu", "paged_chunk"), defines).launch(
            [blocks(count * kv_heads), 1, 1],
            [32 * tiles.warps, 1, 1],
            tiles.chunk_shared(head_dim as u32),
            args![
                self.q.ptr(),
                k_pool.ptr(),
                v_pool.ptr(),
                o.ptr(),
                words.ptr_at(tiles_at),
                self.tables(),
                int(self.q.ld()),
                int(o.ld()),
                int(k_pool.ld()),
                int(n),
                int(kv_heads),
                scale,
                window,
                softcap,
                sinks
            ],
        );
    }

    /// Computes all rows without tensor cores; their keys and values are in the pages.
    fn plain(&self, o: &Array) {
        let Heads { heads: n, kv_heads, head_dim, scale, .. } = self.heads;
        let rows = self.lists.singles + self.lists.others;
        let (window, softcap, sinks) = self.options();
        let [k_pool, v_pool] = self.pools;
        let digits = head_dim.to_string();
        let defines = vec![("T", self.q.dtype().name()), ("HEAD_DIM", digits.as_str())];
        self.kernel(entry!("paged_attention_plain.cu", "paged_attention_plain"), defines).launch(
            [blocks((rows * n).div_ceil(4)), 1, 1],
            [128, 1, 1],
            0,
            args![
                self.q.ptr(),
                k_pool.ptr(),
                v_pool.ptr(),
                o.ptr(),
                self.lists.words.ptr(),
                self.tables(),
                int(rows),
                int(self.q.ld()),
                int(o.ld()),
                int(k_pool.ld()),
                int(n),
                int(kv_heads),
                scale,
                window,
                softcap,
                sinks
            ],
        );
    }
}

/// Copies the rows of a page.
pub(super) fn copy_page(pool: &Array, from: usize, to: usize) {
    elementwise::copy_into(&pool.row_range(from * PAGE, PAGE), &pool.row_range(to * PAGE, PAGE));
}
