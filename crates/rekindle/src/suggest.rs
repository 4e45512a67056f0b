//! A first configuration for a model, rows and a device.

mod estimate;
mod lengths;

#[cfg(test)]
pub(crate) use estimate::tests::qwen3_4b;

use rekindle_data::LoadReport;
use rekindle_hub::Checkpoint;
use rekindle_kernels::{DeviceKind, open_device};
use rekindle_lora::GradientCheckpointing;
use rekindle_models::ModelConfig;
use rekindle_train::{SamplePrompt, SftConfig, StepCount};

use crate::time_estimate::{Work, token_time};
use crate::{DataSource, Error, Loader, TimeEstimate};
use estimate::{Shape, estimated_bytes};
use lengths::{Fitted, fitted};

/// What a first run might look like, and the facts that say so.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Suggestion {
    /// What was found in the rows.
    pub rows: LoadReport,
    /// What was found in the rows to evaluate, if there are any.
    pub eval_rows: Option<LoadReport>,
    /// Whether rows to evaluate have prompts that can be answered.
    pub has_prompts: bool,
    /// 99 of 100 rows have at most this many tokens.
    pub most: usize,
    /// The longest row that is allowed.
    pub max_seq_length: usize,
    /// Rows that are longer, of both files; they would be left out.
    pub longer: usize,
    /// What the model was made for.
    pub window: usize,
    /// Where it would run.
    pub device: DeviceKind,
    /// Bytes that are free there, if anyone counts them.
    pub free: Option<u64>,
    /// What the run takes there, roughly.
    pub estimated: u64,
    /// What it would take with everything kept in 16 bits (32 on the CPU), roughly.
    pub estimated_dense: u64,
    /// Whether that leaves a tenth of what is free.
    pub fits: bool,
    /// Whether an adapter was given, which is gone on with.
    pub is_adapter: bool,
    /// Whether the checkpoint is quantized already.
    pub is_quantized: bool,
    /// Whether the linears are quantized while loading.
    pub load_in_4bit: bool,
    /// What becomes of activations.
    pub use_gradient_checkpointing: GradientCheckpointing,
    /// Rank of the adapter.
    pub r: usize,
    /// Batches, epochs and what is due when.
    pub train: SftConfig,
    /// Optimizer steps of that.
    pub steps: usize,
    /// How long they take, where there are figures for the device.
    pub time: Option<TimeEstimate>,
}

/// Rows of one optimizer step, where there are enough of them.
const ROWS_PER_STEP: usize = 16;

/// What may be used of the memory that is free.
const USABLE: f64 = 0.9;

/// Reads a model's configuration, the rows and the device, and chooses what fits all three.
///
/// No weight is read, but a name on the hub is downloaded whole.
///
/// # Errors
/// Those of [`Loader::fetch`], [`Error::Data`] for rows that cannot be used, [`Error::Device`].
pub fn suggest(
    mut model: Loader,
    device: DeviceKind,
    train: &DataSource,
    eval: Option<&DataSource>,
) -> Result<Suggestion, Error> {
    let files = model.fetch()?.clone();
    let checkpoint = Checkpoint::open(&files.model)?;
    let config = ModelConfig::from_checkpoint(&checkpoint)?;
    let is_quantized = checkpoint.config().get("quantization_config").is_some_and(|config| !config.is_null());
    let tokenizer = files.load_tokenizer()?;

    // Whatever the longest row is: how long rows may be is what is to be found out.
    let load = |source: &DataSource| source.encode(tokenizer.as_ref(), usize::MAX, config.vocab_size());
    let (dataset, rows) = load(train)?;
    let eval = eval.map(load).transpose()?;
    let has_prompts = eval
        .as_ref()
        .is_some_and(|(dataset, _)| dataset.examples().any(|example| SamplePrompt::of_example(&example).is_some()));
    let lengths = dataset.examples().map(|example| example.input_ids.len()).collect();
    let held_out = eval.iter().flat_map(|(dataset, _)| dataset.examples()).map(|example| example.input_ids.len());
    let Fitted { most, max_seq_length, longer } = fitted(lengths, held_out.collect(), config.max_position_embeddings);

    let (opened, device) = open_device(device)?;
    let free = opened.free_memory().map(|bytes| bytes as u64);
    let room = free.map(|free| (USABLE * free as f64) as u64);
    let shape = Shape {
        config: &config,
        on_cuda: matches!(device, DeviceKind::Cuda(_)),
        coded: is_quantized,
        checkpointing: GradientCheckpointing::Off,
        r: RANK,
        tokens: max_seq_length,
    };
    let choice = choose(&shape, rows.examples, room);
    let Choice { load_in_4bit, use_gradient_checkpointing, batch, bytes, dense, fits } = choice;

    let mut numbers = numbers(rows.examples, batch);
    let steps = numbers.timetable(rows.examples).total;
    if eval.is_some() {
        numbers.eval_steps = Some(StepCount::Steps(steps.div_ceil(10).max(1)));
        numbers.eval_samples = if has_prompts { 2 } else { 0 };
    }
    numbers.save_steps = (steps >= 100).then(|| StepCount::Steps(steps.div_ceil(5)));
    numbers.logging_steps = StepCount::Steps(steps.div_ceil(100).clamp(1, 10));
    let work = Work { config: &config, full: false, recomputes: use_gradient_checkpointing.recomputes() };
    let eval_tokens = eval.as_ref().map_or(0, |(_, report)| report.tokens);
    let token_time = token_time(&work, &opened);
    let time = token_time.map(|time| time.run(&numbers, &numbers.timetable(rows.examples), rows.tokens, eval_tokens));
    Ok(Suggestion {
        time,
        has_prompts,
        most,
        max_seq_length,
        longer,
        window: config.max_position_embeddings,
        device,
        free,
        estimated: bytes,
        estimated_dense: dense,
        fits,
        is_adapter: files.adapter.is_some(),
        is_quantized,
        load_in_4bit,
        use_gradient_checkpointing,
        r: RANK,
        train: numbers,
        steps,
        eval_rows: eval.map(|(_, report)| report),
        rows,
    })
}

/// What decides over memory, and how much it takes.
#[derive(Debug, PartialEq, Eq)]
struct Choice {
    load_in_4bit: bool,
    use_gradient_checkpointing: GradientCheckpointing,
    batch: usize,
    bytes: u64,
    /// With dense weights and everything kept.
    dense: u64,
    fits: bool,
}

/// The fastest settings that fit into `room` bytes, or those that take least. `shape` is of one row.
///
/// Fastest first: weights as they are, then in 4 bits; activations kept, then made again; a row alone at last.
fn choose(shape: &Shape<'_>, examples: usize, room: Option<u64>) -> Choice {
    let recomputed = if shape.on_cuda { GradientCheckpointing::Host } else { GradientCheckpointing::Block };
    let mut choices = Vec::new();
    for batches in [&[8, 4, 2][..], &[1]] {
        for load_in_4bit in [false, true] {
            for use_gradient_checkpointing in [GradientCheckpointing::Off, recomputed] {
                for &batch in batches.iter().filter(|&&batch| batch == 1 || batch <= examples) {
                    let bytes = |coded, checkpointing| {
                        let coded = coded || shape.coded;
                        estimated_bytes(&Shape { coded, checkpointing, tokens: batch * shape.tokens, ..*shape })
                    };
                    let (bytes, dense) =
                        (bytes(load_in_4bit, use_gradient_checkpointing), bytes(false, GradientCheckpointing::Off));
                    let fits = room.is_none_or(|room| bytes <= room);
                    choices.push(Choice { load_in_4bit, use_gradient_checkpointing, batch, bytes, dense, fits });
                }
            }
        }
    }
    choices.retain(|choice| !(shape.coded && choice.load_in_4bit));
    let chosen = choices.iter().position(|choice| choice.fits);
    let least = || (0..choices.len()).min_by_key(|&i| choices[i].bytes).unwrap_or(0);
    choices.swap_remove(chosen.unwrap_or_else(least))
}

/// PEFT's 8 is little for all seven linears' work; what more would bring shows after a first run.
const RANK: usize = 16;

/// Batches and epochs for so many examples.
fn numbers(examples: usize, batch: usize) -> SftConfig {
    let rows_per_step = ROWS_PER_STEP.min((examples / 8).max(1)).max(batch);
    SftConfig {
        per_device_train_batch_size: batch,
        per_device_eval_batch_size: batch,
        gradient_accumulation_steps: rows_per_step / batch,
        // Few rows are seen more often; from ten thousand on once is usual.
        num_train_epochs: Some(match examples {
            0..2_000 => 3.0,
            2_000..10_000 => 2.0,
            _ => 1.0,
        }),
        learning_rate: Some(2e-4),
        lr_scheduler_type: rekindle_train::LrSchedulerType::Cosine,
        warmup_steps: StepCount::Share(0.03),
        ..SftConfig::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_free_decides() {
        let config = estimate::tests::qwen3_4b();
        let row = estimate::tests::shape(&config, 2048);
        let chosen = |gb: f64| {
            let choice = choose(&row, 1000, Some((gb * 1e9) as u64));
            (choice.load_in_4bit, choice.use_gradient_checkpointing, choice.batch, choice.fits)
        };
        use GradientCheckpointing::{Host, Off};
        assert_eq!(chosen(80.0), (false, Off, 8, true));
        assert_eq!(chosen(24.0), (false, Off, 2, true));
        assert_eq!(chosen(12.0), (false, Host, 2, true));
        assert_eq!(chosen(8.0), (true, Host, 4, true));
        assert_eq!(chosen(3.0), (true, Host, 1, false));
        let quantized = choose(&Shape { coded: true, ..row }, 1000, Some(8_000_000_000));
        assert!(!quantized.load_in_4bit && quantized.fits, "{quantized:?}");
        assert_eq!(choose(&row, 1, None).batch, 1, "there is one row");
    }

    #[test]
    fn few_rows_make_small_steps_and_many_are_seen_once() {
        let of = |examples, batch| {
            let config = numbers(examples, batch);
            config.validate().unwrap();
            (config.rows_per_step(), config.epochs())
        };
        assert_eq!(of(20, 2), (2, 3.0));
        assert_eq!(of(400, 8), (16, 3.0));
        assert_eq!(of(400, 1), (16, 3.0));
        assert_eq!(of(50_000, 4), (16, 1.0));
        assert_eq!(of(1, 1), (1, 3.0));
    }
}
