//! Fine-tune language models in Rust.
//!
//! Load a checkpoint, add a LoRA adapter, train it, and save it in PEFT's format:
//!
//! ```no_run
//! use rekindle::{DataSource, FastLanguageModel, LoraConfig, SftConfig, SftTrainer};
//!
//! # fn main() -> Result<(), rekindle::Error> {
//! let (model, tokenizer) = FastLanguageModel::from_pretrained("Qwen/Qwen3-0.6B").max_seq_length(2048).load()?;
//! let mut model = model.get_peft_model(LoraConfig::new(16).lora_alpha(32.0))?;
//! let config = SftConfig { max_steps: Some(60), ..SftConfig::default() };
//! let report = SftTrainer::new(&mut model, &tokenizer, DataSource::new("train.jsonl"), config).train()?;
//! println!("final loss {:.3}", report.steps.last().map_or(f64::NAN, |step| step.loss));
//! model.save_pretrained("out")?;
//! # Ok(())
//! # }
//! ```
//!
//! [`run`] reads the run files of the `rekindle` command and runs them.
//!
//! The feature `network`, which is on by default, adds names on the Hugging Face hub; without it, models are
//! directories and no HTTP client is built.
//!
//! The underlying crates can be used on their own: `rekindle-kernels`, `rekindle-rope`, `rekindle-lora`,
//! `rekindle-models`, `rekindle-data`, `rekindle-train` and `rekindle-hub`.

#![warn(missing_docs)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod adapters;
mod answer;
mod data_source;
mod describe;
mod dtype;
mod end_tokens;
mod error;
mod export;
mod export_metrics;
mod fp8;
mod generate;
mod generate_batch;
mod gguf_model;
mod inspect;
mod merge;
mod model;
mod model_reward;
mod model_source;
mod modelfile;
mod preflight;
mod pretrained;
mod prompts;
#[cfg(feature = "network")]
mod push;
mod quantize;
pub mod run;
mod sft;
mod skip;
mod stop_strings;
mod suggest;
mod text_stream;
mod time_estimate;

pub use data_source::DataSource;
pub use dtype::Dtype;
pub use error::{Error, ErrorKind};
pub use export::{GgufExport, GgufFile};
pub use export_metrics::{MetricsFormat, export_metrics};
pub use fp8::Fp8;
pub use generate::{Generated, GeneratedText, generate_text_on};
pub use inspect::{Inspection, inspect};
pub use merge::{Merge, Verified};
pub use model::Model;
pub use model_source::{FetchedFiles, HubAccess, HubToken, ModelSource};
pub use pretrained::{EncodedRows, FastLanguageModel, Loader, ModelFiles, RankShares, RowEncoder, RunPlanner};
#[cfg(feature = "network")]
pub use push::{PreparedPush, Push, Pushed};
pub use quantize::quantize;
pub use sft::{SftTrainer, TrainingRows};
pub use suggest::{Suggestion, suggest};
pub use text_stream::{TextPiece, TextStream};
pub use time_estimate::{TimeEstimate, TokenTime};

pub use rekindle_data::{
    ChatPrompt, Columns, Dataset, Example, IGNORED, LoadReport, Message, NotShown, Overlong, Packs, PromptEnd, RawRow,
    RenderOptions, RowFormat, RowNumber, RowPart, RowSample, RowTask, Thinking, Tokenizer, TrainOn, Untrained,
    chat_template_sources, counted,
};
/// Batched generation: the engine, its requests and events.
pub use rekindle_dist as dist;
pub use rekindle_engine as engine;
pub use rekindle_gguf::{Error as GgufError, GgufFileType, Importance, read_importance};
pub use rekindle_hub::write_atomic;
#[cfg(feature = "network")]
pub use rekindle_hub::{HubErrorKind, cache};
pub use rekindle_kernels::runtime::count as cuda_device_count;
pub use rekindle_kernels::runtime::{Report as CudaReport, report as cuda_report};
pub use rekindle_kernels::{DeviceKind, parse_device};
pub use rekindle_lora::{
    BLOCK_LINEARS, Bias, Combination, Error as LoraError, InitLoraWeights, LoftqConfig, LoraConfig, TargetModules,
};
pub use rekindle_models::objective::{
    Cpo, CpoLoss, Divergence, Dpo, DpoLoss, Grpo, GrpoLoss, ImportanceSamplingLevel, ImportanceSamplingMode, Kto,
    KtoLoss, OneOrMany, Orpo, RewardModel, Rloo,
};
pub use rekindle_models::{
    CausalLm, ContextExtension, DEFAULT_ADAPTER, GenerationConfig, GradientCheckpointing, LoadIn, MemoryClass,
    MemoryLine, MemoryReport, ModelConfig, NonFinite, Positions, RopeError, RopeScaling, StopReason, is_quantized,
};
pub use rekindle_quant::{Blocksize, Error as QuantError, QuantConfig, QuantType};
/// Rewards of completions, as `[[rewards]]` of a run file has them.
pub use rekindle_rewards as rewards;
pub use rekindle_train::{
    BestEvaluation, Diverged, EvalMetrics, EvalStrategy, Evaluation, GrpoAdvantages, LrCurve, LrSchedulerKwargs,
    LrSchedulerType, Method, MetricValues, MultiObjectiveAggregation, Optim, OptimizerConfig, PromptSample,
    ReferenceArguments, ReportTo, Resume, RlooAdvantages, RolloutArguments, RowLoss, RunHistory, SaveStrategy,
    ScaleRewards, SftConfig, StepCount, StepMetrics, Timetable, TokenLoss, TrainEnd, TrainEvent, TrainReport,
    TrainerArguments, WithReference, WithRollouts,
};
pub use rekindle_train::{MemoryChange, MemoryFit, MemoryPlan, PassRows, show_bytes};
