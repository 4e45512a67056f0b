//! Advantages and metrics of completions against TRL.

use std::path::Path;

use serde_json::Value;

use rekindle_dist::OneRank;

use super::*;
use crate::rollout::{GrpoAdvantages, RlooAdvantages};

/// The tolerance relative to 1 or to the value if it is larger; TRL computes in float32.
const TOLERANCE: f64 = 1e-5;
/// Completions of each prompt in the golden.
const GENERATIONS: usize = 4;
/// The end token.
const END: u32 = 130;

fn golden(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/grpo").join(name);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn rule(arguments: &Value) -> AdvantageRule {
    let mut of_rule = arguments.as_object().unwrap().clone();
    let names = ["scale_rewards", "multi_objective_aggregation", "normalize_advantages", "reward_clip_range"];
    of_rule.retain(|name, _| names.contains(&name.as_str()));
    match arguments["method"].as_str() {
        Some("rloo") => AdvantageRule::Rloo(serde_json::from_value::<RlooAdvantages>(of_rule.into()).unwrap()),
        _ => AdvantageRule::Grpo(serde_json::from_value::<GrpoAdvantages>(of_rule.into()).unwrap()),
    }
}

fn table(rollouts: &Value, weights: &[f64], divergences: Vec<f64>) -> RewardTable {
    let rows = rollouts["rows"].as_array().unwrap();
    let column = |reward: usize| rows.iter().map(|row| row["rewards"][reward].as_f64()).collect::<Vec<_>>();
    let columns = vec![column(0), column(1)];
    let total = |row: usize| {
        let known = columns.iter().zip(weights).filter_map(|(column, weight)| Some(weight * column[row]?));
        known.reduce(|sum, term| sum + term)
    };
    RewardTable { totals: (0..rows.len()).map(total).collect(), columns, weights: weights.to_vec(), divergences }
}

fn assert_close(what: &str, got: f64, want: f64) {
    let error = (got - want).abs() / want.abs().max(1.0);
    assert!(error <= TOLERANCE, "{what} is {got}, not {want}: off by {error:.1e}");
}

#[test]
fn advantages_and_metrics_are_those_of_trl() {
    let (golden, rollouts) = (golden("expect.json"), golden("rollouts.json"));
    let weights: Vec<f64> = serde_json::from_value(golden["weights"].clone()).unwrap();
    let names = ["first".to_owned(), "second".to_owned()];
    let completions: Vec<Sampled> = rollouts["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| {
            let ids: Vec<u32> = serde_json::from_value(row["completion_ids"].clone()).unwrap();
            Sampled { truncated: ids.last() != Some(&END), ids, log_probs: Vec::new() }
        })
        .collect();
    for case in golden["cases"].as_array().unwrap() {
        let arguments = &case["arguments"];
        let divergences = serde_json::from_value(case["divergences"].clone()).unwrap_or_default();
        let table = table(&rollouts, &weights, divergences);
        let is_rloo = arguments["method"] == "rloo";
        let beta = arguments["beta"].as_f64().unwrap_or(if is_rloo { 0.05 } else { 0.0 });
        let found = advantages(&rule(arguments), &table, GENERATIONS, beta);
        for (index, want) in case["advantages"].as_array().unwrap().iter().enumerate() {
            assert_close(&format!("{arguments}: advantage {index}"), found.values[index], want.as_f64().unwrap());
        }
        let mut metrics = reward_metrics(&names, &table, found.zero_std);
        metrics.extend(lengths(completions.iter()));
        let mut compared = 0;
        for (name, want) in case["metrics"].as_object().unwrap() {
            if name.starts_with("reward") || name.starts_with("frac") || name.starts_with("completions/") {
                let (_, got) = metrics.iter().find(|(known, _)| known == name).unwrap_or_else(|| panic!("no {name}"));
                assert_close(&format!("{arguments}: {name}"), *got, want.as_f64().unwrap());
                compared += 1;
            }
        }
        assert_eq!((compared, metrics.len()), (14, 14), "{arguments}");
    }
}

#[test]
fn a_generation_is_used_in_parts() {
    let row = |example| RolloutRow {
        example,
        ids: vec![7],
        masked: false,
        advantage: 0.0,
        old_log_probs: None,
        sampler_log_probs: None,
        reference_log_probs: None,
    };
    let mut generation = Generation { used: 0, mean_tokens: 1.0, rows: (0..6).map(row).collect() };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("prompts.jsonl");
    std::fs::write(&path, "{\"prompt_ids\": [1, 2]}\n".repeat(6)).unwrap();
    let options = rekindle_data::EncodeOptions {
        task: rekindle_data::RowTask::Prompts,
        ..rekindle_data::EncodeOptions::default()
    };
    let dataset = Dataset::load(&path, None, &options).unwrap().0;
    let mut examples = || {
        let step = generation.next_step(&dataset, 3, 1, OneRank.position());
        assert_eq!((step.batches.len(), &step.batches[1].input_ids[..]), (2, &[1, 2, 7][..]));
        assert_eq!((&step.batches[1].rows[..], &step.batches[1].targets[..]), (&[1][..], &[IGNORED, 7, IGNORED][..]));
        step.examples
    };
    assert_eq!([examples(), examples(), examples(), examples()], [[0, 1], [2, 3], [4, 5], [0, 1]]);
    // Every row of a step is dealt to one rank, with its number in the step.
    let dealt = |rank: usize| {
        let position = RankPosition { rank, world_size: 2, local_rank: rank, local_world_size: 2 };
        let step = generation.clone().next_step(&dataset, 1, 2, position);
        assert_eq!(step.batches.len(), 3);
        step.own().iter().flat_map(|batch| batch.rows.clone()).collect::<Vec<u32>>()
    };
    assert_eq!([dealt(0), dealt(1)], [[0, 2, 4], [1, 3, 5]]);
    let before = generation.clone();
    generation.shuffle(3, 8);
    let mut order: Vec<usize> = generation.rows.iter().map(|row| row.example).collect();
    assert_ne!(order, [0, 1, 2, 3, 4, 5]);
    order.sort_unstable();
    assert_eq!(order, [0, 1, 2, 3, 4, 5]);
    let saved = serde_json::to_string(&before).unwrap();
    assert_eq!(serde_json::from_str::<Generation>(&saved).unwrap(), before);
}
