//! Policy gradients: loss, metrics and gradient norm of every loss against TRL; runs that sample, stop and resume.

mod model_reward;
mod ranks;
mod runs;

use rekindle_models::objective::{Grpo, Rloo};
use rekindle_models::{Batch, CausalLm, IGNORED, Objective, SampledCompletion};
use rekindle_tests::{Golden, goldens, read_json};
use rekindle_train::{Optimizer, OptimizerConfig, SftConfig, StepResult};
use serde_json::{Map, Value};

/// The tolerance for losses, metrics and gradient norms, relative to 1 or to the value if it is larger. TRL computes in
/// float32.
const TOLERANCE: f64 = 1e-5;

/// Arguments that are not those of a loss.
const OF_ROLLOUTS: [&str; 9] = [
    "method",
    "old",
    "sampler",
    "rows",
    "scale_rewards",
    "multi_objective_aggregation",
    "mask_truncated_completions",
    "normalize_advantages",
    "reward_clip_range",
];

/// The end token of the golden's completions.
const END: u32 = 130;

fn list(value: &Value) -> &Vec<Value> {
    value.as_array().expect("a list")
}

fn number(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

fn floats(value: &Value) -> Vec<f32> {
    list(value).iter().map(|value| number(value) as f32).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("token ids")
}

fn policy() -> CausalLm {
    Golden::open("qwen3-tied").load_adapted("all-linear")
}

fn is_set(arguments: &Value, name: &str) -> bool {
    arguments[name].as_bool().unwrap_or(false)
}

/// Returns the loss of a case.
fn objective(arguments: &Value) -> Box<dyn Objective> {
    let mut loss = arguments.as_object().expect("a map").clone();
    OF_ROLLOUTS.iter().for_each(|name| _ = loss.remove(*name));
    loss.insert("max_completion_length".to_owned(), 9.into());
    let loss = Value::Object(loss);
    match arguments["method"].as_str() {
        Some("rloo") => Box::new(serde_json::from_value::<Rloo>(loss).expect("arguments of RLOO")),
        _ => Box::new(serde_json::from_value::<Grpo>(loss).expect("arguments of GRPO")),
    }
}

/// Returns the completions of a case as micro-batches of these numbers of documents.
fn batches(model: &CausalLm, case: &Value, rollouts: &Value, parts: &[usize]) -> Vec<Batch> {
    let arguments = &case["arguments"];
    let temperature = arguments["temperature"].as_f64().unwrap_or(1.0) as f32;
    let (mut documents, mut completions) = (Vec::new(), Vec::new());
    for (row, advantage) in list(&rollouts["rows"]).iter().zip(list(&case["advantages"])) {
        let mut input_ids = ids(&rollouts["prompts"][row["prompt"].as_u64().expect("a number") as usize]);
        let completion = ids(&row["completion_ids"]);
        let mut labels = vec![IGNORED; input_ids.len()];
        let is_masked = is_set(arguments, "mask_truncated_completions") && completion.last() != Some(&END);
        labels.extend(completion.iter().map(|&id| if is_masked { IGNORED } else { id as i32 }));
        input_ids.extend(&completion);
        let alone = Batch::from_rows([(&input_ids[..], &labels[..])], 0);
        let values = model.log_probs_at(&alone, temperature).expect("it fits").values();
        let counted = (0..alone.tokens()).filter(|&token| alone.targets[token] != IGNORED);
        let exact: Vec<f32> = counted.map(|token| values.log_probs[token]).collect();
        let with = |base: &[f32], noise: &str| -> Vec<f32> {
            base.iter().zip(floats(&row[noise])).map(|(value, noise)| value + noise).collect()
        };
        let old = if is_set(arguments, "old") { with(&exact, "old_noise") } else { exact };
        completions.push(SampledCompletion {
            advantage: number(advantage),
            mean_tokens: 0.0,
            sampler_log_probs: is_set(arguments, "sampler").then(|| with(&old, "sampler_noise")),
            old_log_probs: is_set(arguments, "old").then_some(old),
            reference_log_probs: None,
        });
        documents.push((input_ids, labels));
    }
    let all = Batch::from_rows(documents.iter().map(|(ids, labels)| (&ids[..], &labels[..])), 0);
    let mean_tokens = all.counted() as f64 / all.rows.len() as f64;
    completions.iter_mut().for_each(|completion| completion.mean_tokens = mean_tokens);
    let mut first = 0;
    let batch = |&count: &usize| {
        let rows = first..first + count;
        first += count;
        let of = documents[rows.clone()].iter().map(|(ids, labels)| (&ids[..], &labels[..]));
        Batch { completions: completions[rows.clone()].to_vec(), ..Batch::from_rows(of, rows.start as u32) }
    };
    parts.iter().map(batch).collect()
}

fn step(model: &mut CausalLm, objective: &dyn Objective, batches: &[Batch]) -> StepResult {
    let mut optimizer = Optimizer::new(model, OptimizerConfig::from(&SftConfig::default()), 1).expect("an adapter");
    optimizer.step(model, objective, batches, 0.0).expect("golden rows fit")
}

/// Asserts that two numbers agree; returns their difference.
fn assert_close(what: &str, got: f64, want: f64, tolerance: f64) -> f64 {
    let error = (got - want).abs() / want.abs().max(1.0);
    assert!(error <= tolerance, "{what} is {got}, not {want}: off by {error:.1e}");
    error
}

/// Returns true for the metrics of a loss.
fn is_of_loss(name: &str, arguments: &Value) -> bool {
    let is_rloo = arguments["method"] == "rloo";
    ["clip_ratio/", "cispo", "vespo", "sampling/", "entropy"].iter().any(|prefix| name.starts_with(prefix))
        || name == "kl" && !is_rloo
}

fn assert_metrics(name: &str, got: &[(&str, f64)], case: &Value) -> f64 {
    let want: &Map<String, Value> = case["metrics"].as_object().expect("a map");
    let want = want.iter().filter(|(key, _)| is_of_loss(key, &case["arguments"]));
    let errors = want.map(|(key, want)| {
        let (_, got) = got.iter().find(|(known, _)| known == key).unwrap_or_else(|| panic!("{name}: no {key}"));
        assert_close(&format!("{name}: {key}"), *got, number(want), TOLERANCE)
    });
    errors.fold(0.0, f64::max)
}

/// Every loss with its metrics and gradient norm, in one micro-batch, in one for each completion, and in two.
#[test]
fn losses_are_those_of_trl() {
    let golden = read_json(&goldens().join("grpo/expect.json"));
    let rollouts = read_json(&goldens().join("grpo/rollouts.json"));
    let mut model = policy();
    for case in list(&golden["cases"]) {
        let name = case["arguments"].to_string();
        let objective = objective(&case["arguments"]);
        let rows = case["arguments"]["rows"].as_u64().map_or(12, |rows| rows as usize);
        let mut worst = 0.0f64;
        for parts in [vec![rows], vec![1; rows], vec![5, rows - 5]] {
            let batches = batches(&model, case, &rollouts, &parts);
            let result = step(&mut model, &*objective, &batches);
            let name = format!("{name} in {} parts", parts.len());
            worst =
                worst.max(assert_close(&format!("{name}: the loss"), result.loss, number(&case["loss"]), TOLERANCE));
            let norm = number(&case["grad_norm"]);
            worst = worst.max(assert_close(&format!("{name}: grad_norm"), result.grad_norm, norm, TOLERANCE));
            worst = worst.max(assert_metrics(&name, &result.metrics, case));
        }
        println!("{name}: off by {worst:.1e}");
    }
}
