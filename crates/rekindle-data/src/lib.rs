//! Training rows, chat templates and loss masks: everything between files of rows and token ids.
//!
//! [`Tokenizer`] reads a checkpoint's tokenizer and [`ChatTemplate`]; [`DataFiles`] finds files of rows, in every
//! [`RowFormat`]; [`Dataset::load`] encodes each row into an [`Example`], token ids with labels; [`Order`] is the order
//! of the examples. This crate knows no tensors.
//!
//! A label has the position of the token that it equals: the label of position `i` is predicted from the tokens before
//! `i`. Therefore the first label of an example never counts; [`IGNORED`] marks others that do not.
//!
//! ```
//! use rekindle_data::{Dataset, EncodeOptions, Order};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let dir = tempfile::tempdir()?;
//! let path = dir.path().join("train.jsonl");
//! std::fs::write(&path, "{\"input_ids\": [5, 6, 7, 2], \"labels\": [-100, -100, 7, 2]}\n{\"input_ids\": [8, 9]}\n")?;
//!
//! // Pretokenized rows need no tokenizer; `messages`, `prompt` + `completion` and `text` do.
//! let options = EncodeOptions { max_seq_length: 512, vocab_size: Some(16), ..EncodeOptions::default() };
//! let (dataset, report) = Dataset::load(&path, None, &options)?;
//! assert_eq!((report.rows, report.tokens, report.trained_tokens), (2, 6, 3));
//!
//! for index in Order::new(dataset.len(), true, 42).epoch(0) {
//!     let example = dataset.example(index);
//!     assert_eq!(example.input_ids.len(), example.labels.len());
//! }
//! # Ok(())
//! # }
//! ```

mod cache;
mod chat_prompt;
mod columns;
mod counted;
mod data_files;
mod dataset;
mod encode;
mod error;
mod example;
mod files;
mod hash;
mod mask;
mod message;
mod numbers;
mod options;
mod order;
mod overlong;
mod packing;
mod raw_rows;
mod report;
mod row;
mod sample;
mod stream;
mod template;
#[cfg(test)]
mod test_support;
mod tokenizer;
mod trained_spans;

pub use cache::default_cache_dir;
pub use chat_prompt::{ChatPrompt, PromptEnd};
pub use columns::Columns;
pub use counted::counted;
pub use data_files::DataFiles;
pub use dataset::Dataset;
pub use error::{Error, ErrorKind, Result};
pub use example::{Example, IGNORED};
pub use files::is_file_name;
pub use mask::{NotShown, Thinking, TrainOn, Untrained};
pub use message::Message;
pub use options::{EncodeOptions, RowTask};
pub use order::Order;
pub use overlong::Overlong;
pub use packing::Packs;
pub use raw_rows::RawRow;
pub use report::{CacheUse, LoadReport, RowChange, RowPlace};
pub use row::{RowFormat, RowNumber};
pub use sample::{RowPart, RowSample};
pub use stream::StreamDecoder;
pub use template::{ChatTemplate, MarkedRendering, RenderOptions};
pub use tokenizer::{Tokenizer, chat_template_sources, eos_token_ids};
