//! A step of decoding on a GPU: one token of each of several sequences, from its id to the choice of the next one.
//!
//! [`StepInputs`] holds everything that changes from step to step, at fixed addresses, so that a step is recorded once and
//! replayed by one call ([`RecordedStep`]): a model of 36 layers queues about 300 kernels for a token, and the host needs
//! longer to queue them than the device to run them.
//!
//! [`draw`] chooses tokens from logits that stay on the device. Its distributions are those of the sampler on the CPU, whose
//! random numbers it is given; it finds the token of a random number in another order, so the same seed draws other
//! tokens.
//!
//! # Shapes
//! Hidden states `[rows, hidden]`, one row for each choice.

mod cuda;
mod recorded;

use crate::linear_cross_entropy::LmHead;
use crate::paged_attention::PagedBatch;
use crate::rope::{Angles, RopeTables};
use crate::runtime::{Ints, MemoryUse, ReadBack, elementwise};
use crate::{Device, DeviceError, Tensor, matmul};

pub use crate::runtime::Workspace;
pub use recorded::RecordedStep;

/// The choice of one token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// 0 takes the most likely token; above, logits are divided by it.
    pub temperature: f32,
    /// Draw from the k most likely tokens only; 0 for all.
    pub top_k: usize,
    /// Draw from the smallest set of most likely tokens whose probabilities reach this sum.
    pub top_p: f32,
    /// Draw only from tokens whose probability is at least this share of the most likely token's.
    pub min_p: f32,
    /// The random number, in [0, 1).
    pub uniform: f64,
}

impl Draw {
    /// Takes the most likely token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, uniform: 0.0 };
}

/// A token that was chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drawn {
    /// The token.
    pub id: u32,
    /// ln p of the token by the logits as they are.
    pub log_prob: f32,
    /// ln p of the token in the distribution that it was drawn from; 0 for a greedy choice.
    pub sampling_log_prob: f32,
    /// False if a logit is infinite or not a number; the rest then means nothing.
    pub is_finite: bool,
}

/// The id of a token in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepId {
    /// An id that the host knows.
    Known(u32),
    /// The token that the step before this one chose in this row.
    Chosen(usize),
}

/// The token of a sequence in a step.
#[derive(Clone, Copy, Debug)]
pub struct StepToken<'a> {
    /// Its id.
    pub id: StepId,
    /// Its position in the sequence.
    pub position: usize,
    /// The pages of the sequence, this token's included.
    pub pages: &'a [u32],
    /// The choice of the token after it.
    pub draw: Draw,
}

/// The inputs and results of a step at fixed addresses of a GPU.
#[derive(Debug)]
pub struct StepInputs {
    words: Ints,
    rows: usize,
    /// Words of all block tables.
    tables: usize,
    batch: PagedBatch,
    drawn: Ints,
}

/// Words of a row: in the list of tokens, of its draw, and of its result.
const ENTRY: usize = 4;
const DRAW: usize = 8;
const DRAWN: usize = 4;

/// Words of an address.
const ADDRESS: usize = 2;

impl StepInputs {
    /// Allocates inputs for `rows` tokens, whose sequences have `pages` pages at most.
    ///
    /// # Panics
    /// On other devices than a GPU.
    pub fn new(device: &Device, rows: usize, pages: usize) -> Self {
        let Device::Cuda(cuda) = device else { panic!("steps at fixed addresses are for CUDA") };
        let tables = rows * pages;
        let words = Ints::unfilled(cuda, Self::tables_at(rows) + tables, MemoryUse::Inputs);
        let batch = PagedBatch::at(words.clone(), rows, Self::tables_at(rows), pages);
        let drawn = Ints::unfilled(cuda, rows * DRAWN, MemoryUse::Inputs);
        Self { words, rows, tables, batch, drawn }
    }

    /// Returns the first words of ids, positions, draws, the address of earlier results, and block tables behind the list
    /// of tokens.
    const fn parts(rows: usize) -> [usize; 5] {
        let draws = rows * ENTRY;
        let ids = draws + rows * DRAW;
        [ids, ids + rows, draws, ids + 2 * rows, ids + 2 * rows + ADDRESS]
    }

    const fn tables_at(rows: usize) -> usize {
        Self::parts(rows)[4]
    }

    /// Returns the number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Writes the tokens of the next step, some of which `previous` chose. Rows without one compute a token of their own
    /// page `unused`, which belongs to no sequence.
    ///
    /// # Panics
    /// If there are more tokens than rows, more pages than there is space for, or a row that `previous` does not have.
    pub fn write(&self, tokens: &[StepToken<'_>], unused: u32, previous: Option<&Self>) {
        assert!(tokens.len() <= self.rows, "{} tokens in {} rows", tokens.len(), self.rows);
        let fill = StepToken { id: StepId::Known(0), position: 0, pages: &[unused], draw: Draw::GREEDY };
        let tokens: Vec<_> = tokens.iter().copied().chain(core::iter::repeat(fill)).take(self.rows).collect();
        let mut words: Vec<u32> = Vec::new();
        let mut table = 0;
        for (row, token) in tokens.iter().enumerate() {
            let source = match token.id {
                StepId::Known(_) => 0,
                StepId::Chosen(row) => {
                    assert!(previous.is_some_and(|step| row < step.rows), "row {row} of the step before");
                    row + 1
                }
            };
            words.extend([row as u32, token.position as u32, table as u32, source as u32]);
            table += token.pages.len();
        }
        assert!(table <= self.tables, "{table} pages in {} words", self.tables);
        tokens.iter().for_each(|token| words.extend(cuda::draw_words(&token.draw)));
        words.extend(tokens.iter().map(|token| match token.id {
            StepId::Known(id) => id,
            StepId::Chosen(_) => 0,
        }));
        words.extend(tokens.iter().map(|token| token.position as u32));
        let results = previous.map_or(0, |step| step.drawn.ptr());
        words.extend([results as u32, (results >> 32) as u32]);
        tokens.iter().for_each(|token| words.extend_from_slice(token.pages));
        self.words.write(&words);
    }

    /// Returns the rows of an embedding table for the tokens, `[rows, hidden]`.
    pub fn embed(&self, table: &Tensor<2>) -> Tensor<2> {
        let [ids, _, _, previous, _] = Self::parts(self.rows);
        cuda::step_ids(&self.words, ids, previous, self.rows);
        elementwise::gather_rows(table.cuda(), self.words.ptr_at(ids), self.rows).into()
    }

    /// Returns the angles of the tokens.
    pub fn angles(&self, tables: &RopeTables) -> Angles {
        let [_, positions, ..] = Self::parts(self.rows);
        tables.angles_at(self.words.part(positions, self.rows))
    }

    /// Returns the tokens as a batch for attention over pages.
    pub fn batch(&self) -> &PagedBatch {
        &self.batch
    }

    /// Chooses a token from each of `rows` hidden states; [`drawn`](Self::drawn) copies them to the host.
    pub fn choose(&self, head: &LmHead, hidden: &Tensor<2>) {
        let [_, _, draws, ..] = Self::parts(self.rows);
        let logits = matmul::nt(hidden, &head.weight);
        cuda::sample(logits.cuda(), head, self.words.ptr_at(draws), &self.drawn);
    }

    /// Begins to copy the tokens of the first `count` rows to the host, behind everything queued so far.
    pub fn drawn(&self, count: usize) -> DrawnTokens {
        DrawnTokens(self.drawn.part(0, count * DRAWN).read_back())
    }
}

/// Tokens on their way to the host.
#[derive(Debug)]
pub struct DrawnTokens(ReadBack);

impl DrawnTokens {
    /// Waits for the tokens and returns them.
    ///
    /// # Errors
    /// The first error of the device.
    pub fn wait(self) -> Result<Vec<Drawn>, DeviceError> {
        Ok(cuda::drawn(&self.0.wait()?))
    }
}

/// Chooses a token from each row of hidden states.
///
/// # Errors
/// The first error of the device.
///
/// # Panics
/// If there are not as many rows as draws, and on other devices than a GPU.
pub fn draw(head: &LmHead, hidden: &Tensor<2>, draws: &[Draw]) -> Result<Vec<Drawn>, DeviceError> {
    assert_eq!(hidden.dims()[0], draws.len(), "a row of hidden states for each draw");
    let cuda = hidden.cuda().cuda().clone();
    let words: Vec<u32> = draws.iter().flat_map(cuda::draw_words).collect();
    let words = Ints::from_slice(&cuda, &words, MemoryUse::Inputs);
    let drawn = Ints::unfilled(&cuda, draws.len() * DRAWN, MemoryUse::Inputs);
    let logits = matmul::nt(hidden, &head.weight);
    cuda::sample(logits.cuda(), head, words.ptr(), &drawn);
    Ok(cuda::drawn(&drawn.to_vec()?))
}
