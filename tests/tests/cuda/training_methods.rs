//! Preference losses, policy gradients and runs that sample, against TRL's numbers and the CPU.

use std::sync::{Arc, Mutex};

use rekindle_data::{Dataset, EncodeOptions, RowTask};
use rekindle_kernels::Device;
use rekindle_lora::LoraConfig;
use rekindle_models::objective::{Cpo, Dpo, Grpo, Kto, Orpo, Rloo};
use rekindle_models::{Batch, CausalLm, IGNORED, Objective, SampledCompletion};
use rekindle_rewards::{Reward, RewardError, RewardSet, Sample};
use rekindle_tests::{Golden, goldens, read_json};
use rekindle_train::{
    Batches, GrpoAdvantages, Method, Optimizer, OptimizerConfig, RolloutArguments, RolloutTask, SftConfig, StepResult,
    TrainEvent, Trainer, WithRollouts,
};
use serde_json::{Value, json};

use super::{cuda, on};

fn close(what: &str, got: f64, want: f64, tolerance: f64) {
    let error = (got - want).abs() / want.abs().max(1.0);
    assert!(error <= tolerance, "{what} is {got}, not {want}: off by {error:.1e}");
}

fn policy(device: &Device) -> CausalLm {
    let golden = Golden::open("qwen3-tied");
    let mut model = on(device, &golden);
    model.load_adapter(&golden.dir.join("adapters/all-linear")).expect("a golden adapter loads");
    model
}

fn step(model: &mut CausalLm, objective: &dyn Objective, batches: &[Batch]) -> StepResult {
    let mut optimizer = Optimizer::new(model, OptimizerConfig::from(&SftConfig::default()), 1).expect("an adapter");
    optimizer.step(model, objective, batches, 0.0).expect("golden rows fit")
}

/// Loss, metrics and gradient norm of every preference loss are those of TRL.
pub(super) fn preferences(device: &Device) {
    let golden = read_json(&goldens().join("preferences/expect.json"));
    let cases = golden["losses"].as_array().expect("a list");
    let mut model = policy(device);
    for case in cases {
        let name = case["arguments"].to_string();
        let mut loss = case["arguments"].clone();
        loss.as_object_mut().expect("a map").remove("method");
        let valid = "arguments of the loss";
        let method: Method = match case["arguments"]["method"].as_str().expect("a name") {
            "dpo" => serde_json::from_value::<Dpo>(loss).expect(valid).into(),
            "kto" => serde_json::from_value::<Kto>(loss).expect(valid).into(),
            "orpo" => serde_json::from_value::<Orpo>(loss).expect(valid).into(),
            "cpo" => serde_json::from_value::<Cpo>(loss).expect(valid).into(),
            other => panic!("{other}"),
        };
        let file = if method.task() == RowTask::Labelled { "labelled" } else { "pairs" };
        let options = EncodeOptions { max_seq_length: 128, task: method.task(), ..EncodeOptions::default() };
        let path = goldens().join(format!("preferences/{file}.jsonl"));
        let dataset = Dataset::load(&path, None, &options).expect("the golden's rows load").0;
        let rows = dataset.len() / dataset.task().examples_per_row();
        let config = SftConfig { method, per_device_train_batch_size: rows, ..SftConfig::default() };
        let all: Vec<usize> = (0..dataset.len()).collect();
        let batch = Batches::new(&dataset, &config, 128).batch(&all, 0);
        let result = step(&mut model, &*config.method.objective(), &[batch]);
        close(&format!("{name}: the loss"), result.loss, case["loss"].as_f64().expect("a number"), 1e-4);
        close(&format!("{name}: grad_norm"), result.grad_norm, case["grad_norm"].as_f64().expect("a number"), 1e-3);
        for (key, want) in case["metrics"].as_object().expect("a map") {
            if let Some((_, got)) = result.metrics.iter().find(|(known, _)| known == key) {
                close(&format!("{name}: {key}"), *got, want.as_f64().expect("a number"), 1e-4);
            }
        }
    }
    println!("{} preference losses", cases.len());
}

/// Completions of the golden's rows after three tokens, with log-probabilities that differ from the model's by up to 0.2.
fn completions() -> Batch {
    let golden = Golden::open("qwen3-tied");
    let model = policy(&Device::cpu());
    let mut documents = Vec::new();
    for row in golden.rows.iter().filter(|row| row.input_ids.len() > 4) {
        let labels = row.input_ids.iter().enumerate();
        let labels: Vec<i32> = labels.map(|(place, &id)| if place < 3 { IGNORED } else { id as i32 }).collect();
        documents.push((row.input_ids.clone(), labels));
    }
    let mut batch = Batch::from_rows(documents.iter().map(|(ids, labels)| (&ids[..], &labels[..])), 0);
    let values = model.log_probs_at(&batch, 0.9).expect("golden rows fit").values().log_probs;
    let mean_tokens = batch.counted() as f64 / batch.rows.len() as f64;
    for (number, document) in batch.documents().enumerate().collect::<Vec<_>>() {
        let tokens: Vec<usize> = document.filter(|&token| batch.targets[token] != IGNORED).collect();
        let with = |by: f32| tokens.iter().map(|&t| values[t] + by * ((t % 5) as f32 - 2.0)).collect();
        batch.completions.push(SampledCompletion {
            advantage: number as f64 % 3.0 - 0.8,
            mean_tokens,
            old_log_probs: Some(with(0.1)),
            sampler_log_probs: Some(with(0.09)),
            reference_log_probs: Some(with(-0.05)),
        });
    }
    batch
}

/// Loss, metrics and gradient norm of policy gradients are those of the CPU.
pub(super) fn policy_gradients(device: &Device) {
    let batch = completions();
    let of = |arguments: Value| -> Box<dyn Objective> {
        let mut arguments = arguments;
        arguments["temperature"] = json!(0.9);
        arguments["beta"] = json!(0.04);
        Box::new(serde_json::from_value::<Grpo>(arguments).expect("arguments of GRPO"))
    };
    let mut losses: Vec<Box<dyn Objective>> = [
        json!({"loss_type": "grpo"}),
        json!({"loss_type": "bnpo"}),
        json!({"loss_type": "dr_grpo"}),
        json!({"loss_type": "dapo", "epsilon_high": 0.28}),
        json!({"loss_type": "cispo", "epsilon_high": 5.0}),
        json!({"loss_type": "sapo"}),
        json!({"loss_type": "luspo", "importance_sampling_level": "sequence"}),
        json!({"loss_type": "vespo", "importance_sampling_mode": "token_truncate"}),
        json!({"loss_type": "grpo", "importance_sampling_level": "sequence"}),
        json!({"top_entropy_quantile": 0.5}),
    ]
    .map(of)
    .into();
    losses.push(Box::new(Rloo { temperature: 0.9, ..Rloo::default() }));
    let (mut ours, mut cpu) = (policy(device), policy(&Device::cpu()));
    for objective in &losses {
        let batches = std::slice::from_ref(&batch);
        let got = step(&mut ours, &**objective, batches);
        let want = step(&mut cpu, &**objective, batches);
        let name = format!("{objective:?}");
        assert!(want.grad_norm > 0.0, "{name}");
        close(&format!("{name}: the loss"), got.loss, want.loss, 1e-4);
        close(&format!("{name}: grad_norm"), got.grad_norm, want.grad_norm, 1e-3);
        for ((key, got), (_, want)) in got.metrics.iter().zip(&want.metrics) {
            close(&format!("{name}: {key}"), *got, *want, 1e-4);
        }
    }
    println!("{} policy gradients", losses.len());
}

/// The share of even token ids.
struct Even;

impl Reward for Even {
    fn name(&self) -> &str {
        "even"
    }

    fn score(&mut self, samples: &[Sample]) -> Result<Vec<Option<f64>>, RewardError> {
        let share = |ids: &[u32]| ids.iter().filter(|id| **id % 2 == 0).count() as f64 / ids.len() as f64;
        Ok(samples.iter().map(|sample| Some(share(sample.completion_ids))).collect())
    }
}

/// A run samples on the weights that it trains: the sampler and the training pass agree in every step, the reward rises, and
/// memory stays the same.
pub(super) fn rollouts(device: &Device) {
    let scratch = tempfile::tempdir().expect("a directory");
    let path = scratch.path().join("prompts.jsonl");
    let row = |index: usize| {
        let ids: Vec<usize> = (0..3 + index % 4).map(|place| (17 * index + 29 * place) % 128).collect();
        format!("{{\"prompt_ids\": {ids:?}}}\n")
    };
    std::fs::write(&path, (0..7).map(row).collect::<String>()).expect("writable");
    let options = EncodeOptions { max_seq_length: 64, task: RowTask::Prompts, ..EncodeOptions::default() };
    let prompts = Dataset::load(&path, None, &options).expect("they load").0;
    let mut model = on(device, &Golden::open("qwen3-tied"));
    model.add_adapter(&LoraConfig::new(4)).expect("a valid configuration");
    let method = Method::Grpo(Box::new(WithRollouts {
        loss: Grpo { beta: 0.01, max_completion_length: 24, ..Grpo::default() },
        advantages: GrpoAdvantages::default(),
        rollouts: RolloutArguments { max_sequences: 16, ..RolloutArguments::default() },
    }));
    let config = SftConfig {
        method,
        per_device_train_batch_size: 16,
        gradient_accumulation_steps: 2,
        max_steps: Some(20),
        learning_rate: Some(2e-2),
        ..SftConfig::default()
    };
    let mut rewards = RewardSet::new();
    rewards.push(Box::new(Even), 1.0).expect("a new name");
    let task = RolloutTask { rewards, columns: Default::default(), stop_ids: vec![130], tokenizer: None };
    let mapped = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&mapped);
    let of_cuda = cuda(device).clone();
    let trainer = Trainer {
        rollouts: Some(task),
        on_event: Box::new(move |event| {
            if let TrainEvent::Step { .. } = event {
                seen.lock().expect("no panic before").push(of_cuda.memory().in_use);
            }
        }),
        ..Trainer::new(&mut model, prompts, config)
    };
    let report = trainer.train().expect("the run finishes");
    for step in &report.steps {
        let difference = step.metrics.get("sampling/sampling_logp_difference/max").expect("it is reported");
        assert!(difference < 1e-3, "step {}: sampler and training differ by {difference}", step.step);
    }
    let reward = |index: usize| report.steps[index].metrics.get("reward").expect("it is reported");
    println!("reward {:.3} -> {:.3}", reward(0), reward(19));
    assert!(reward(19) > reward(0) + 0.15, "{} -> {}", reward(0), reward(19));
    let memory = mapped.lock().expect("no panic before");
    assert!(memory[5..].iter().all(|bytes| *bytes == memory[5]), "bytes in use by step: {memory:?}");
}
