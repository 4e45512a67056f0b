//! The losses that `cargo xtask bench train` measures, each with its rows and its steps.

use std::error::Error;
use std::time::Instant;

use clap::{Args, ValueEnum};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rekindle::rewards::{Reward, RewardError, RewardSet, Sample};
use rekindle_data::{Dataset, EncodeOptions, RowTask};
use rekindle_kernels::runtime::Cuda;
use rekindle_models::objective::{Dpo, Grpo};
use rekindle_models::{Answer, Batch, CausalLm, IGNORED, Objective, Sft};
use rekindle_train::{
    GrpoAdvantages, Method, Optimizer, OptimizerConfig, RolloutArguments, RolloutTask, SftConfig, StepMetrics,
    TrainEvent, Trainer, WithRollouts,
};
use serde_json::{Value, json};

use super::super::random_batch;
use super::{IDS, Train, print_profile};

/// Unmeasured steps; the first one compiles kernels and selects GEMM algorithms.
pub(super) const WARMUP: usize = 3;

/// The loss of a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Loss {
    /// The negative log-likelihood of all tokens.
    #[default]
    Sft,
    /// DPO on pairs: rows 2i and 2i + 1 are the answers to a prompt of `--prompt` tokens. The reference is the model without
    /// its adapter, computed in every step.
    Dpo,
    /// GRPO with a constant reward: `--batch` completions of `--seq` − `--prompt` tokens, none of which ends earlier, are
    /// sampled, scored and trained on in every step.
    Grpo,
}

/// The arguments of losses other than `sft`.
#[derive(Args, Clone, Debug)]
pub(crate) struct LossArguments {
    /// Tokens of each prompt, which have no loss.
    #[arg(long, default_value_t = 256)]
    prompt: usize,
    /// Completions of each prompt (grpo).
    #[arg(long, default_value_t = 8)]
    generations: usize,
    /// Forward and backward passes of a step (grpo).
    #[arg(long, default_value_t = 1)]
    passes: usize,
    /// The weight of the divergence from the reference model (grpo); 0 computes no reference.
    #[arg(long, default_value_t = 0.0)]
    beta: f64,
}

impl LossArguments {
    /// The arguments of jobs that do not read them.
    pub(super) const UNUSED: Self = Self { prompt: 0, generations: 1, passes: 1, beta: 0.0 };

    /// Returns them for a command line.
    pub(super) fn options(&self) -> [(&'static str, String); 4] {
        [
            ("--prompt", self.prompt.to_string()),
            ("--generations", self.generations.to_string()),
            ("--passes", self.passes.to_string()),
            ("--beta", self.beta.to_string()),
        ]
    }
}

/// The steps of a job.
#[derive(Debug, Default)]
pub(super) struct MeasuredSteps {
    /// Seconds of the first step.
    pub(super) first: f64,
    /// Seconds of each measured step.
    pub(super) times: Vec<f64>,
    /// The loss of every step.
    pub(super) losses: Vec<f64>,
    /// Milliseconds of each part of a step, medians.
    pub(super) parts: Option<Value>,
}

impl MeasuredSteps {
    fn add(&mut self, step: usize, warmup: usize, seconds: f64, loss: f64) {
        match step {
            0 => self.first = seconds,
            _ if step >= warmup => self.times.push(seconds),
            _ => {}
        }
        self.losses.push((loss * 1e4).round() / 1e4);
    }
}

/// Returns the middle of some numbers, the upper one of two.
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Runs the steps of a job.
pub(super) fn measure(
    job: &Train,
    config: SftConfig,
    model: &mut CausalLm,
    cuda: Option<&Cuda>,
) -> Result<MeasuredSteps, Box<dyn Error>> {
    match job.loss {
        Loss::Sft => known_rows(job, &config, model, cuda, &Sft, |rng| random_batch(rng, [job.batch, job.seq], IDS)),
        Loss::Dpo => known_rows(job, &config, model, cuda, &Dpo::default(), |rng| pairs(rng, job)),
        Loss::Grpo => sampled_rows(job, config, model),
    }
}

/// Runs steps on rows that are known before the step.
fn known_rows(
    job: &Train,
    config: &SftConfig,
    model: &mut CausalLm,
    cuda: Option<&Cuda>,
    objective: &dyn Objective,
    batch: impl Fn(&mut ChaCha8Rng) -> Batch,
) -> Result<MeasuredSteps, Box<dyn Error>> {
    let mut optimizer = Optimizer::new(model, OptimizerConfig::from(config), 0)?;
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let mut measured = MeasuredSteps::default();
    for step in 0..WARMUP + job.steps {
        let batch = batch(&mut rng);
        let began = Instant::now();
        let result = optimizer.step(model, objective, &[batch], 1e-4)?;
        measured.add(step, WARMUP, began.elapsed().as_secs_f64(), result.loss);
    }
    if let Some(cuda) = cuda.filter(|_| job.profile) {
        let batch = batch(&mut rng);
        let (stepped, entries) = cuda.profile(|| optimizer.step(model, objective, &[batch], 1e-4))?;
        stepped?;
        print_profile(&entries);
    }
    Ok(measured)
}

/// Returns pairs of answers of random tokens to prompts of random tokens.
fn pairs(rng: &mut ChaCha8Rng, job: &Train) -> Batch {
    let mut tokens = |count: usize| -> Vec<u32> { (0..count).map(|_| rng.random_range(IDS)).collect() };
    let mut rows = Vec::new();
    for _ in 0..job.batch / 2 {
        let prompt = tokens(job.arguments.prompt);
        for _ in 0..2 {
            let answer = tokens(job.seq - job.arguments.prompt);
            let mut labels = vec![IGNORED; prompt.len()];
            labels.extend(answer.iter().map(|&id| id as i32));
            rows.push(([&prompt[..], &answer].concat(), labels));
        }
    }
    let answers = (0..rows.len()).map(|row| Answer { preferred: row % 2 == 0, reference: None }).collect();
    Batch { answers, ..Batch::from_rows(rows.iter().map(|(ids, labels)| (&ids[..], &labels[..])), 0) }
}

/// A reward that is 1 for every completion.
struct Constant;

impl Reward for Constant {
    fn name(&self) -> &str {
        "constant"
    }

    fn score(&mut self, samples: &[Sample]) -> Result<Vec<Option<f64>>, RewardError> {
        Ok(vec![Some(1.0); samples.len()])
    }
}

/// Runs steps on completions that the model samples. Only the first one, which compiles, is not measured.
fn sampled_rows(job: &Train, config: SftConfig, model: &mut CausalLm) -> Result<MeasuredSteps, Box<dyn Error>> {
    let LossArguments { prompt, generations, passes, beta } = job.arguments;
    let steps = 1 + job.steps;
    let prompts = {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let scratch = tempfile::tempdir()?;
        let path = scratch.path().join("prompts.jsonl");
        let row = |_| {
            let ids: Vec<u32> = (0..prompt).map(|_| rng.random_range(IDS)).collect();
            format!("{{\"prompt_ids\": {ids:?}}}\n")
        };
        std::fs::write(&path, (0..steps * job.batch / generations).map(row).collect::<String>())?;
        let options = EncodeOptions { max_seq_length: job.seq, task: RowTask::Prompts, ..EncodeOptions::default() };
        Dataset::load(&path, None, &options)?.0
    };
    let method = Method::Grpo(Box::new(WithRollouts {
        loss: Grpo { beta, max_completion_length: job.seq - prompt, ..Grpo::default() },
        advantages: GrpoAdvantages { num_generations: generations, ..GrpoAdvantages::default() },
        rollouts: RolloutArguments { max_sequences: job.batch, ..RolloutArguments::default() },
    }));
    let config = SftConfig {
        method,
        per_device_train_batch_size: job.batch / passes,
        gradient_accumulation_steps: passes,
        max_steps: Some(steps),
        learning_rate: Some(1e-4),
        use_gradient_checkpointing: job.checkpointing.setting(),
        ..config
    };
    let mut rewards = RewardSet::new();
    rewards.push(Box::new(Constant), 1.0)?;
    let task = RolloutTask { rewards, columns: Default::default(), stop_ids: Vec::new(), tokenizer: None };
    let mut measured = MeasuredSteps::default();
    let mut all: Vec<StepMetrics> = Vec::new();
    let trainer = Trainer {
        rollouts: Some(task),
        on_event: Box::new(|event| {
            if let TrainEvent::Step { metrics, .. } = event {
                all.push(metrics.clone());
            }
        }),
        ..Trainer::new(model, prompts, config)
    };
    trainer.train()?;
    let seconds = |step: &StepMetrics| step.tokens as f64 / step.tokens_per_second;
    for (index, step) in all.iter().enumerate() {
        measured.add(index, 1, seconds(step), step.loss);
    }
    let part = |of: &dyn Fn(&StepMetrics) -> f64| 1e3 * median(all.iter().skip(1).map(of).collect());
    let named = |name: &'static str| part(&move |step| step.metrics.get(name).unwrap_or(f64::NAN));
    let of = |step: &StepMetrics, name: &str| step.metrics.get(name).unwrap_or(f64::NAN);
    measured.parts = Some(json!({
        "sampling": named("time/sampling"),
        "scoring, beside sampling": named("time/scoring"),
        "log-probabilities": named("time/log_probs"),
        "update": part(&|step| seconds(step) - of(step, "time/sampling") - of(step, "time/log_probs")),
        "sampled tokens/s": (job.batch * (job.seq - prompt)) as f64 * 1e3 / named("time/sampling"),
        "largest difference of sampler and training": part(&|step| 1e-3 * of(step, "sampling/sampling_logp_difference/max")),
        "completion length": part(&|step| 1e-3 * of(step, "completions/min_length")),
    }));
    Ok(measured)
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use rekindle::LoraConfig;
    use rekindle_hub::Checkpoint;
    use rekindle_kernels::{DType, Device};
    use rekindle_models::LoadOptions;

    use super::*;
    use crate::random_checkpoint;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        job: Train,
    }

    /// Every loss takes its steps on a tiny model, with pairs and completions of the lengths of the command line.
    #[test]
    fn every_loss_takes_its_steps() -> Result<(), Box<dyn Error>> {
        let dir = tempfile::tempdir()?;
        let shape = json!({
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 2048,
            "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 64, "tie_word_embeddings": true,
            "hidden_act": "silu",
        });
        random_checkpoint::write(dir.path(), &shape, 1)?;
        for (loss, first) in [("sft", f64::ln(2048.0)), ("dpo", f64::ln(2.0)), ("grpo", 0.0)] {
            let words = "bench --batch 8 --seq 16 --steps 2 --prompt 6 --generations 4 --passes 2 --beta 0.1 --loss";
            let job = Command::parse_from(words.split(' ').chain([loss])).job;
            let options = LoadOptions::new(Device::cpu(), DType::F32, 16);
            let mut model = CausalLm::load(&Checkpoint::open(dir.path())?, &options, &mut |_| ())?;
            model.add_adapter(&LoraConfig::new(4))?;
            let measured = measure(&job, SftConfig::default(), &mut model, None)?;
            assert_eq!(measured.times.len(), 2, "{loss}");
            assert!((measured.losses[0] - first).abs() < 0.1, "{loss}: {:?}", measured.losses);
            if let Some(parts) = measured.parts {
                assert_eq!(parts["completion length"], 10.0, "{parts}");
                assert!(parts.as_object().is_some_and(|parts| parts.values().all(Value::is_f64)), "{parts}");
            }
        }
        Ok(())
    }
}
