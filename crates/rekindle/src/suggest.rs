//! A first configuration for a model, rows and a device.

mod lengths;

use rekindle_data::LoadReport;
use rekindle_kernels::{DeviceKind, open_device};
use rekindle_lora::LoraConfig;
use rekindle_models::{GradientCheckpointing, ModelConfig, is_quantized, open_checkpoint};
use rekindle_train::{PassRows, SamplePrompt, SftConfig, StepCount};

use crate::pretrained::supported_length;
use crate::time_estimate::{Work, token_time};
use crate::{DataSource, Error, Loader, RunPlanner, TimeEstimate};
use lengths::{Fitted, fitted};

/// A suggested configuration of a first run, with its reasons.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Suggestion {
    /// The report about the rows.
    pub rows: LoadReport,
    /// The report about the rows to evaluate, if there are any.
    pub eval_rows: Option<LoadReport>,
    /// True if rows to evaluate have prompts to answer.
    pub has_prompts: bool,
    /// The 99th percentile of row lengths in tokens.
    pub most: usize,
    /// The maximum length of a row.
    pub max_seq_length: usize,
    /// Longer rows, in training and evaluation, which would be dropped.
    pub longer: usize,
    /// The model's window.
    pub window: usize,
    /// The device of the run.
    pub device: DeviceKind,
    /// Free bytes of the device, if known.
    pub free: Option<u64>,
    /// The planned peak of the run.
    pub estimated: u64,
    /// The planned peak with dense weights in 16 bits (32 on the CPU).
    pub estimated_dense: u64,
    /// True if a tenth of the free memory remains.
    pub fits: bool,
    /// True if the model is an adapter, whose training the run continues.
    pub is_adapter: bool,
    /// True if the checkpoint is quantized already.
    pub is_quantized: bool,
    /// True if the linears are quantized while loading.
    pub load_in_4bit: bool,
    /// Gradient checkpointing.
    pub use_gradient_checkpointing: GradientCheckpointing,
    /// Rank of the adapter.
    pub r: usize,
    /// Batches, epochs, evaluations and checkpoints.
    pub train: SftConfig,
    /// Optimizer steps of the run.
    pub steps: usize,
    /// The duration of the run, for devices with figures.
    pub time: Option<TimeEstimate>,
}

/// Rows of one optimizer step, if there are enough of them.
const ROWS_PER_STEP: usize = 16;

/// The share of the free memory that a run may use.
const USABLE: f64 = 0.9;

/// Suggests a configuration for a model, rows and a device.
///
/// The memory is planned as for a run ([`RunPlanner`]). No weight is read, but a name on the hub is downloaded
/// completely.
///
/// # Errors
/// Those of [`Loader::fetch`], [`Error::Data`] for rows that cannot be used, [`Error::Device`].
pub fn suggest(
    mut model: Loader<'_>,
    device: DeviceKind,
    train: &DataSource,
    eval: Option<&DataSource>,
) -> Result<Suggestion, Error> {
    let files = model.fetch()?.clone();
    let checkpoint = open_checkpoint(&files.model)?;
    let config = ModelConfig::from_checkpoint(&checkpoint)?;
    let is_quantized = is_quantized(checkpoint.config());
    let tokenizer = files.load_tokenizer()?;

    // Without a limit, because the limit is chosen from the lengths.
    let load = |source: &DataSource| source.encode(tokenizer.as_ref(), usize::MAX, config.vocab_size());
    let (dataset, rows) = load(train)?;
    let eval = eval.map(load).transpose()?;
    let has_prompts = eval
        .as_ref()
        .is_some_and(|(dataset, _)| dataset.examples().any(|example| SamplePrompt::of_example(&example).is_some()));
    let lengths = dataset.examples().map(|example| example.input_ids.len()).collect();
    let held_out = eval.iter().flat_map(|(dataset, _)| dataset.examples()).map(|example| example.input_ids.len());
    let window = supported_length(&config);
    let Fitted { most, max_seq_length, longer } = fitted(lengths, held_out.collect(), window);

    let (opened, device) = open_device(device)?;
    let free = opened.free_memory().map(|bytes| bytes as u64);
    let mut plans = Plans::new(model.device(device), max_seq_length, is_quantized, None)?;
    let choice = plans.choose(rows.examples)?;
    let Choice { load_in_4bit, use_gradient_checkpointing, batch, bytes, fits } = choice;
    let dense = plans.peak(false, GradientCheckpointing::Off, batch)?;

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
        window,
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

/// The settings that determine the memory, and the planned peak.
#[derive(Debug, PartialEq, Eq)]
struct Choice {
    load_in_4bit: bool,
    use_gradient_checkpointing: GradientCheckpointing,
    batch: usize,
    bytes: u64,
    fits: bool,
}

/// Memory plans of LoRA runs on one model.
struct Plans {
    dense: RunPlanner,
    /// With linears quantized while loading; `None` if the checkpoint is quantized already.
    in_4bit: Option<RunPlanner>,
    max_seq_length: usize,
}

impl Plans {
    /// Builds the model without values, dense and in 4 bits. `memory` replaces the free memory of the device.
    fn new(model: Loader<'_>, max_seq_length: usize, is_quantized: bool, memory: Option<usize>) -> Result<Self, Error> {
        let plan = |model: &Loader<'_>| model.planner(Some(LoraConfig::new(RANK)), SftConfig::default(), memory);
        let model = model.max_seq_length(max_seq_length);
        let dense = plan(&model)?;
        let in_4bit = if is_quantized { None } else { Some(plan(&model.load_in_4bit(true))?) };
        Ok(Self { dense, in_4bit, max_seq_length })
    }

    /// Returns the peak of a run whose rows all have the maximum length.
    fn peak(&mut self, load_in_4bit: bool, checkpointing: GradientCheckpointing, batch: usize) -> Result<u64, Error> {
        let planner = self.in_4bit.as_mut().filter(|_| load_in_4bit).unwrap_or(&mut self.dense);
        Ok(planner.plan_with(&PassRows::equal(batch, self.max_seq_length), checkpointing)?.peak as u64)
    }

    /// Chooses the fastest settings that fit into the usable memory, or those with the lowest peak.
    ///
    /// The order, fastest first, is: dense weights, then 4 bits; activations kept, then recomputed; single rows last.
    fn choose(&mut self, examples: usize) -> Result<Choice, Error> {
        let usable = self.dense.available().map(|bytes| (USABLE * bytes as f64) as u64);
        let on_cuda = matches!(self.dense.device(), DeviceKind::Cuda(_));
        let recomputed = if on_cuda { GradientCheckpointing::Host } else { GradientCheckpointing::Block };
        let mut least: Option<Choice> = None;
        for batches in [&[8, 4, 2][..], &[1]] {
            for load_in_4bit in [false, true] {
                if load_in_4bit && self.in_4bit.is_none() {
                    continue;
                }
                for use_gradient_checkpointing in [GradientCheckpointing::Off, recomputed] {
                    for &batch in batches.iter().filter(|&&batch| batch == 1 || batch <= examples) {
                        let bytes = self.peak(load_in_4bit, use_gradient_checkpointing, batch)?;
                        let fits = usable.is_none_or(|usable| bytes <= usable);
                        let choice = Choice { load_in_4bit, use_gradient_checkpointing, batch, bytes, fits };
                        if fits {
                            return Ok(choice);
                        }
                        if least.as_ref().is_none_or(|least| bytes < least.bytes) {
                            least = Some(choice);
                        }
                    }
                }
            }
        }
        Ok(least.expect("one row is always tried"))
    }
}

/// The rank. PEFT's default of 8 is low for all seven linears; a first run shows if more is needed.
const RANK: usize = 16;

/// Returns batches and epochs for a number of examples.
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
pub(crate) mod tests {
    use super::*;
    use crate::FastLanguageModel;

    pub(crate) fn qwen3_4b_json() -> serde_json::Value {
        serde_json::json!({
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "vocab_size": 151_936,
            "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40_960, "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000.0, "tie_word_embeddings": true, "attention_bias": false
        })
    }

    #[test]
    fn what_is_free_decides() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = qwen3_4b_json();
        let choose = |config: &serde_json::Value, examples, gb: f64| {
            std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
            let model = FastLanguageModel::from_pretrained(dir.path()).device(DeviceKind::Cuda(0));
            Plans::new(model, 2048, is_quantized(config), Some((gb * 1e9) as usize)).unwrap().choose(examples).unwrap()
        };
        let chosen = |gb| {
            let choice = choose(&config, 1000, gb);
            (choice.load_in_4bit, choice.use_gradient_checkpointing, choice.batch, choice.fits)
        };
        use GradientCheckpointing::{Host, Off};
        let all: Vec<_> = [80.0, 24.0, 12.0, 8.0, 3.0].map(chosen).into_iter().collect();
        let expected = [
            (false, Off, 8, true),
            (false, Host, 8, true),
            (false, Host, 4, true),
            (true, Host, 8, true),
            (true, Host, 1, false),
        ];
        assert_eq!(all, expected);
        assert_eq!(choose(&config, 1, 80.0).batch, 1, "there is one row");
        config["quantization_config"] = serde_json::json!({
            "quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": true, "bnb_4bit_compute_dtype": "bfloat16"
        });
        let quantized = choose(&config, 1000, 8.0);
        assert!(!quantized.load_in_4bit && quantized.fits, "{quantized:?}");
    }

    #[test]
    fn rows_are_within_an_attention_window_that_is_not_computed() {
        use rekindle_models::spec::AttentionMask;
        let mut config = ModelConfig::from_json(&qwen3_4b_json()).unwrap();
        assert_eq!(supported_length(&config), 40_960);
        for layer in &mut config.spec.layers {
            layer.attention_mut().expect("softmax attention").mask = AttentionMask::Chunked(4096);
        }
        assert_eq!(supported_length(&config), 4096);
        config.max_position_embeddings = 2048;
        assert_eq!(supported_length(&config), 2048, "no document exceeds the chunks");
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
