//! Attention over pages against attention over whole documents.

use burn::tensor::DType;
use rekindle_kernels::paged_attention::{self, KvPages, PAGE, PagedBatch};
use rekindle_kernels::{Tensor, embedding, to_f32};

use super::attention::Attention;
use super::{Case, Layout, Place, judge, widened};

/// Returns block tables for sequences of these lengths: pages in no order, none of them shared.
fn tables(lengths: &[usize]) -> Vec<Vec<u32>> {
    let counts: Vec<usize> = lengths.iter().map(|length| length.div_ceil(PAGE)).collect();
    let total: usize = counts.iter().sum();
    // A step that shares no divisor with the number of pages visits each once.
    let step = (total / 2 + 1..).find(|step| gcd(*step, total) == 1).expect("there are primes");
    let mut pages = (0..total).map(|i| (i * step % total) as u32);
    counts.into_iter().map(|count| pages.by_ref().take(count).collect()).collect()
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// A cache for the documents of `case`, empty.
struct Paged<'a> {
    case: &'a Attention,
    operands: [Tensor<2>; 3],
    sinks: Option<Tensor<1>>,
    tables: Vec<Vec<u32>>,
    cache: KvPages,
    past: Vec<usize>,
}

impl<'a> Paged<'a> {
    fn new(case: &'a Attention, operands: [Tensor<2>; 3], sinks: Option<Tensor<1>>) -> Self {
        let lengths: Vec<usize> = case.cu_seqlens.windows(2).map(|w| (w[1] - w[0]) as usize).collect();
        let tables = tables(&lengths);
        let pages = tables.iter().map(Vec::len).sum();
        let (device, dtype) = (operands[0].device(), operands[0].dtype());
        let cache = KvPages::new(pages, case.heads, &device, dtype).expect("the device has the operation");
        Self { case, operands, sinks, past: vec![0; tables.len()], tables, cache }
    }

    /// Appends `count` tokens to each of these documents in one batch; returns the rows of o, with those of the whole.
    fn append(&mut self, parts: &[(usize, usize)]) -> Vec<(usize, Vec<f32>)> {
        let mut batch = PagedBatch::default();
        let mut rows = Vec::new();
        for &(document, count) in parts {
            batch.push(self.past[document], count, &self.tables[document]);
            let first = self.case.cu_seqlens[document] as usize + self.past[document];
            rows.extend(first..first + count);
            self.past[document] += count;
        }
        assert_eq!(batch.rows(), rows.len());
        let pick = |tensor: &Tensor<2>| {
            let ids: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
            embedding::forward(tensor, &ids)
        };
        let [q, k, v] = self.operands.each_ref().map(pick);
        let o =
            paged_attention::forward([&q, &k, &v], self.sinks.as_ref(), self.case.heads, &mut self.cache, &batch, 0);
        let width = o.dims()[1];
        let values = to_f32(o);
        rows.into_iter().zip(values.chunks(width).map(<[f32]>::to_vec)).collect()
    }

    /// Returns the documents whose tokens are not all there, with their number of missing tokens.
    fn missing(&self) -> Vec<(usize, usize)> {
        let length = |document: usize| (self.case.cu_seqlens[document + 1] - self.case.cu_seqlens[document]) as usize;
        let left = self.past.iter().enumerate().map(|(document, past)| (document, length(document) - past));
        left.filter(|(_, left)| *left > 0).collect()
    }
}

/// Calls of [`paged_attention::forward`] that compute all tokens: documents and counts of their next tokens.
pub(crate) type Schedule = Vec<Vec<(usize, usize)>>;

/// Returns the ways in which the documents are computed: all at once, each by itself, and in parts of mixed sizes.
pub(crate) fn schedules(case: &Attention) -> Vec<Schedule> {
    let lengths: Vec<usize> = case.cu_seqlens.windows(2).map(|w| (w[1] - w[0]) as usize).collect();
    let all: Vec<(usize, usize)> = lengths.iter().copied().enumerate().collect();
    let alone = all.iter().map(|&part| vec![part]).collect();
    // Parts begin and end anywhere in a page, and single tokens run beside long parts.
    let mut left = lengths;
    let mut mixed = Vec::new();
    for size in [7, 1, 16, 40, 3, 64, 1, 1, 33].into_iter().cycle() {
        let next = |(document, left): (usize, &mut usize)| {
            let count = if document % 2 == mixed.len() % 2 { size } else { 1 }.min(*left);
            *left -= count;
            (count > 0).then_some((document, count))
        };
        let parts: Vec<_> = left.iter_mut().enumerate().filter_map(next).collect();
        if parts.is_empty() {
            break;
        }
        mixed.push(parts);
    }
    vec![vec![all], alone, mixed]
}

/// Returns o of all rows, computed in the calls of `schedule`.
pub(crate) fn run(case: &Attention, place: &Place, schedule: &Schedule) -> Vec<f32> {
    let (wide, narrow) = case.shapes();
    let operands = [place.matrix(&case.q, wide), place.matrix(&case.k, narrow), place.matrix(&case.v, narrow)];
    let sinks = case.sinks.as_ref().map(|sinks| place.vector(sinks));
    let mut paged = Paged::new(case, operands, sinks);
    let mut o = vec![f32::NAN; wide[0] * wide[1]];
    for parts in schedule {
        for (row, values) in paged.append(parts) {
            o[row * wide[1]..][..wide[1]].copy_from_slice(&values);
        }
    }
    assert_eq!(paged.missing(), []);
    o
}

/// Judges attention over pages by the plain formula of whole documents.
pub(crate) fn check(case: &Attention, dtype: DType, floor: f64, place: impl Fn(Layout) -> Place) {
    let [truth, naive] = [DType::F64, dtype].map(|dtype| vec![case.naive(dtype).swap_remove(0)]);
    for schedule in schedules(case) {
        for layout in [Layout::Owned, Layout::Columns] {
            let o = widened(run(case, &place(layout), &schedule));
            let what = format!("{case:?}, {} calls {layout:?}", schedule.len());
            judge(&what, &vec![("o", o)], &naive, &truth, 2.0, floor);
        }
    }
}

/// A page that was copied holds what the original holds, and writing to one leaves the other as it is.
pub(crate) fn copied_pages_part(place: impl Fn() -> Place) {
    let case = Attention::new(&[PAGE + 5], 4, 2, 8, place().dtype);
    let (wide, narrow) = case.shapes();
    let place = place();
    let [q, k, v] = [place.matrix(&case.q, wide), place.matrix(&case.k, narrow), place.matrix(&case.v, narrow)];
    let mut cache = KvPages::new(4, case.heads, &q.device(), q.dtype()).expect("the device has the operation");
    let mut run = |first: usize, count: usize, pages: &[u32], by: f32, copy: Option<[u32; 2]>| {
        if let Some([from, to]) = copy {
            cache.copy_page(from, to);
        }
        let mut batch = PagedBatch::default();
        batch.push(first, count, pages);
        let [q, k, v] = [&q, &k, &v].map(|tensor| tensor.rows(first, count).scale(by));
        to_f32(paged_attention::forward([&q, &k, &v], None, case.heads, &mut cache, &batch, 0))
    };
    run(0, PAGE + 4, &[3, 1], 1.0, None);
    let other = run(PAGE + 4, 1, &[3, 0], -2.0, Some([1, 0]));
    let last = run(PAGE + 4, 1, &[3, 1], 1.0, None);
    assert_ne!(other, last);
    let whole = self::run(&case, &place, &vec![vec![(0, PAGE + 5)]]);
    for (got, want) in last.iter().zip(&whole[(PAGE + 4) * wide[1]..]) {
        assert!((got - want).abs() <= 1e-6, "{got} is not {want}");
    }
}
