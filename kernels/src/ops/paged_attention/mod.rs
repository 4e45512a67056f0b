//! Attention of new tokens over the pages that hold the keys and values of their sequences.
//!
//! A pool has pages of [`PAGE`] tokens. A sequence owns a list of pages, its block table: token j is slot j mod 16 of page
//! `pages[j / 16]`. The operation writes the keys and values of the new tokens into the pool, then computes for each new
//! query at position i of its sequence o = Σ_j p_j·v_j over the keys j ≤ i, which are new or from earlier calls, with the
//! grouped heads, scale, window, softcap and sinks of [`attention`](crate::attention).
//!
//! A batch holds any mix of whole prompts, parts of prompts and single tokens. Sequences may share pages, as long as no
//! token that is written lies in a shared page.
//!
//! # Shapes
//! q, o `[new tokens, heads · head_dim]`; k, v `[new tokens, kv_heads · head_dim]`; the pool
//! `[pages · 16, kv_heads · head_dim]` each for keys and values; sinks `[heads]`.
//!
//! # Dtypes
//! Keys and values are stored in the compute dtype. Scores, softmax and sums in f32.
//!
//! # Gradients
//! None.
//!
//! On the CPU in f32, the sums of a query depend only on its position, so the result has the same bits however a prompt
//! is split over calls and whatever else is in the batch. The layout of pages is that of vLLM (Kwon et al.,
//! arXiv:2309.06180).

mod cpu;
mod cuda;
mod meta;
mod portable;

use core::ops::Range;
use std::sync::Arc;

use burn::tensor::DType;

use crate::attention::Heads;
use crate::runtime::{Array, Ints, MemoryUse};
use crate::tensor::{MetaTensor, cuda_dtype};
use crate::{Backend, Device, DeviceError, Tensor, from_f32, unfilled};

/// Tokens of a page.
pub const PAGE: usize = 16;

/// The keys and values of one layer, in pages that sequences own or share.
#[derive(Debug)]
pub struct KvPages {
    /// `[pages · 16, kv_heads · head_dim]`, on a GPU with one page more, which belongs to no sequence.
    k: Tensor<2>,
    v: Tensor<2>,
    pages: usize,
}

impl KvPages {
    /// Allocates a pool of pages for a layer with these heads.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] where the device's memory does not suffice.
    pub fn new(pages: usize, heads: Heads, device: &Device, dtype: DType) -> Result<Self, DeviceError> {
        let spare = usize::from(matches!(device, Device::Cuda(_)));
        let shape = [(pages + spare) * PAGE, heads.kv_heads * heads.head_dim];
        let tensor = || match device {
            // A list of zeros is written in place from the first call on; Burn's own zeros would be copied once.
            Device::Burn(_) if dtype == DType::F32 => from_f32(vec![0.0; shape[0] * shape[1]], shape, device, dtype),
            Device::Burn(_) => unfilled(shape, device, dtype),
            Device::Cuda(cuda) => Array::empty(cuda, shape, cuda_dtype(dtype), MemoryUse::KvCache).into(),
            Device::Meta(meta) => MetaTensor::new(meta, shape, dtype, MemoryUse::KvCache).into(),
        };
        let pool = Self { k: tensor(), v: tensor(), pages };
        device.check()?;
        Ok(pool)
    }

    /// Returns the bytes of one page of a layer with these heads.
    pub fn page_bytes(heads: Heads, dtype: DType) -> usize {
        2 * PAGE * heads.kv_heads * heads.head_dim * dtype.size()
    }

    /// Returns the number of pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Copies all tokens of page `from` to page `to`.
    ///
    /// # Panics
    /// If the pool has no such page.
    pub fn copy_page(&mut self, from: u32, to: u32) {
        let [from, to] = [from, to].map(|page| page as usize);
        assert!(from.max(to) < self.pages(), "pages {from} and {to} of {}", self.pages());
        for pool in [&mut self.k, &mut self.v] {
            match Backend::of(pool) {
                Backend::Cpu => cpu::copy_page(pool.burn_mut(), from, to),
                Backend::Portable => portable::copy_page(pool.burn_mut(), from, to),
                Backend::Cuda => cuda::copy_page(pool.cuda(), from, to),
                Backend::Meta => {}
            }
        }
    }
}

/// New tokens of several sequences, which lie one after another in the rows of a batch.
#[derive(Clone, Debug, Default)]
pub struct PagedBatch {
    sequences: Vec<PagedSequence>,
    rows: usize,
    /// The place of the sequences on a GPU, if they are not in `sequences`.
    fixed: Option<FixedLists>,
    /// The lists that the kernels of a GPU read, made on first use.
    lists: Arc<cuda::ListsByHeads>,
}

/// One token of each of some sequences, in lists that change in place.
#[derive(Clone, Debug)]
struct FixedLists {
    /// Rows as (row, position, start of the block table, 0), and the block tables further on.
    words: Ints,
    tables_at: usize,
    /// The most pages of a sequence.
    pages: usize,
}

/// The part of a batch that belongs to one sequence.
#[derive(Clone, Debug)]
struct PagedSequence {
    /// First row in the batch.
    row: usize,
    /// Number of new tokens.
    new: usize,
    /// Tokens before the new ones.
    past: usize,
    pages: Vec<u32>,
}

impl PagedBatch {
    /// Adds the next `new` tokens of a sequence that has `past` tokens. `pages` holds all of them.
    ///
    /// # Panics
    /// If there are too few pages.
    pub fn push(&mut self, past: usize, new: usize, pages: &[u32]) {
        let needed = (past + new).div_ceil(PAGE);
        assert!(pages.len() >= needed, "{} pages for {} tokens", pages.len(), past + new);
        self.sequences.push(PagedSequence { row: self.rows, new, past, pages: pages[..needed].to_vec() });
        self.rows += new;
        self.lists = Arc::default();
    }

    /// Returns a batch of one token of each of `rows` sequences in lists on a GPU: (row, position, start of the block table,
    /// 0) of each, and block tables of at most `pages` pages from `tables_at` on.
    pub(crate) fn at(words: Ints, rows: usize, tables_at: usize, pages: usize) -> Self {
        Self { rows, fixed: Some(FixedLists { words, tables_at, pages }), ..Self::default() }
    }

    /// Returns the number of new tokens.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns the position of each new token in its sequence.
    pub fn positions(&self) -> Vec<u32> {
        self.sequences.iter().flat_map(|s| (s.past..s.past + s.new).map(|position| position as u32)).collect()
    }
}

impl PagedSequence {
    /// Returns the row of a token in the pool.
    fn pool_row(&self, token: usize) -> usize {
        self.pages[token / PAGE] as usize * PAGE + token % PAGE
    }

    /// Returns the tokens that lie in one page one after another, as ranges of tokens with their first row in the pool.
    fn runs(&self, tokens: Range<usize>) -> impl Iterator<Item = (Range<usize>, usize)> + '_ {
        let end = tokens.end;
        let firsts = core::iter::successors(Some(tokens.start), |first| Some((first / PAGE + 1) * PAGE));
        firsts.take_while(move |&first| first < end).map(move |first| {
            let last = end.min((first / PAGE + 1) * PAGE);
            (first..last, self.pool_row(first))
        })
    }
}

/// Writes the keys and values of the new tokens into `cache`; returns the attention of the new queries, on CUDA with
/// `pad_cols` spare columns behind each row.
///
/// # Panics
/// For shapes that do not belong together, and for pages that the pool does not have.
pub fn forward(
    [q, k, v]: [&Tensor<2>; 3],
    sinks: Option<&Tensor<1>>,
    heads: Heads,
    cache: &mut KvPages,
    batch: &PagedBatch,
    pad_cols: usize,
) -> Tensor<2> {
    super::attention::check(q, k, v, sinks, heads);
    assert_eq!(q.dims()[0], batch.rows, "rows of q");
    assert_eq!(k.dims()[0], batch.rows, "rows of k");
    assert_eq!(k.dims()[1], cache.k.dims()[1], "width of the pool");
    let highest = batch.sequences.iter().flat_map(|sequence| &sequence.pages).max();
    assert!(highest.is_none_or(|&page| (page as usize) < cache.pages()), "{highest:?} of {} pages", cache.pages());
    let KvPages { k: k_pool, v: v_pool, .. } = cache;
    match Backend::of(q) {
        Backend::Cpu => {
            cpu::write(k.burn(), k_pool.burn_mut(), batch);
            cpu::write(v.burn(), v_pool.burn_mut(), batch);
            cpu::forward(q.burn(), k_pool.burn(), v_pool.burn(), sinks.map(Tensor::burn), heads, batch).into()
        }
        Backend::Portable => {
            portable::write(k.burn(), k_pool.burn_mut(), batch);
            portable::write(v.burn(), v_pool.burn_mut(), batch);
            portable::forward(q.burn(), k_pool.burn(), v_pool.burn(), sinks.map(Tensor::burn), heads, batch).into()
        }
        Backend::Cuda => {
            let pools = [k_pool.cuda(), v_pool.cuda()];
            cuda::forward([q, k, v].map(Tensor::cuda), sinks.map(Tensor::cuda), pools, heads, batch, pad_cols).into()
        }
        Backend::Meta => meta::forward(q.meta(), heads, batch).into(),
    }
}
