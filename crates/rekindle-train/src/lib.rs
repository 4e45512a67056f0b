//! The trainer: optimizer step, schedules, evaluation, metrics and the training loop.
//!
//! [`Trainer`] runs a whole job over a [`Dataset`](rekindle_data::Dataset); [`Optimizer`] performs one optimizer step
//! over given micro-batches, for custom loops; [`evaluate`] computes the loss of a dataset.
//!
//! The loss of a step is Σ nll ÷ counted tokens of the whole step, so every split of the same rows into micro-batches
//! gives the same gradient.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod axis;
mod batches;
mod checkpoint;
mod companion;
mod config;
mod diverged;
mod error;
mod evaluate;
mod event;
mod loss_scaler;
mod method;
mod metrics;
mod model_card;
mod optim;
mod optimizer;
mod plan;
mod plot;
pub mod protobuf;
mod recorder;
mod reference;
mod report;
mod report_to;
mod rollout;
mod sampler;
mod save;
mod schedule;
mod shard_ranks;
mod stopping;
mod tensor_world;
mod tensorboard;
mod trainer;
mod world;

pub use batches::Batches;
pub use checkpoint::BestEvaluation;
pub use companion::Companion;
pub use config::{EvalStrategy, SaveStrategy, SftConfig, StepCount, Timetable};
pub use diverged::Diverged;
pub use error::Error;
pub use evaluate::{Evaluation, RowLoss, TokenLoss, evaluate, evaluate_tokens};
pub use event::{TrainEnd, TrainEvent, TrainReport};
pub use loss_scaler::LossScaler;
pub use method::{Method, ReferenceArguments, WithReference, WithRollouts};
pub use metrics::{
    EvalMetrics, MetricValues, MetricsFile, PromptSample, RecordedUntil, RewardedCompletion, RunHistory, StepMetrics,
};
pub use model_card::{ModelCard, PublishedCard, PublishedForm, data_line};
pub use optim::Optim;
pub use optimizer::{Optimizer, OptimizerConfig, StepBatches, StepResult};
pub use plan::{
    MemoryBytes, MemoryCategory, MemoryChange, MemoryFit, MemoryPlan, MemoryVerdict, PassRows, PlannedRun, Planner,
    show as show_bytes,
};
pub use plot::{PlotSeries, lines_svg, loss_svg};
pub use recorder::{Recorder, eval_scalars, step_scalars};
pub use report::{RunDescription, report_html};
pub use report_to::ReportTo;
pub use rollout::{
    GrpoAdvantages, MultiObjectiveAggregation, PromptColumns, PromptRow, RlooAdvantages, RolloutArguments, RolloutTask,
    ScaleRewards,
};
pub use sampler::{SamplePrompt, Sampler};
pub use save::{save_adapter, save_adapters, save_result, write_result};
pub use schedule::{LrCurve, LrSchedulerKwargs, LrSchedulerType, Schedule};
pub use shard_ranks::ShardRanks;
pub use tensor_world::TensorWorld;
pub use tensorboard::EventFile;
pub use trainer::{Preflight, Resume, Trainer, TrainerArguments, check_output_dir};
