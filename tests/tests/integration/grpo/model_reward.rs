//! Rewards that are reward models.

use std::path::{Path, PathBuf};

use rekindle::run::{ConfigOverride, RunConfig, TrainOptions};
use rekindle::{ChatPrompt, DeviceKind, FastLanguageModel};
use rekindle_data::{Dataset, EncodeOptions, RowTask};
use rekindle_lora::LoraConfig;
use rekindle_models::Batch;
use rekindle_rewards::Sample;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

/// Returns the run file of the example, with a reward model instead of its rewards and few steps.
fn example(scratch: &Path, model: &Path) -> RunConfig {
    let text = std::fs::read_to_string(root().join("examples/grpo/run.toml")).expect("an example");
    let (before, _) = text.split_once("[[rewards]]").expect("it has a reward");
    let reward = format!("[[rewards]]\ntype = \"model\"\nmodel = {:?}\n", model.display().to_string());
    let paths = [
        ("output_dir", scratch.join("grpo")),
        ("model.name_or_path", root().join("examples/quickstart/base")),
        ("data.train", root().join("examples/grpo/train.jsonl")),
        ("data.eval", root().join("examples/grpo/heldout.jsonl")),
    ];
    let paths = paths.map(|(key, path)| format!("{key}={:?}", path.display().to_string()));
    let others = [
        "device=\"cpu\"",
        "data.cache=false",
        "train.max_steps=2",
        "train.eval_steps=2",
        "train.eval_samples=0",
        "train.num_generations=4",
        "train.num_generations_eval=2",
        "train.per_device_train_batch_size=8",
    ];
    let overrides: Vec<ConfigOverride> =
        paths.iter().map(String::as_str).chain(others).map(|text| text.parse().expect("a key and a value")).collect();
    RunConfig::from_toml(&(before.to_owned() + &reward), &overrides).expect("a valid run file")
}

/// An adapter and a whole checkpoint score sampled completions as they score the rows that reward models are trained on, the
/// rest of the assistant's turn included, and a run uses them.
#[test]
fn completions_have_the_scores_of_rows() {
    let scratch = tempfile::tempdir().expect("a directory");
    let base = root().join("examples/quickstart/base");
    let row = "{\"prompt\": [{\"role\": \"user\", \"content\": \"What is a whale?\"}], \
               \"chosen\": \"A whale is an animal.\", \"rejected\": \"No\"}\n";
    let file = scratch.path().join("pairs.jsonl");
    std::fs::write(&file, row).expect("writable");
    for full in [false, true] {
        let loader = FastLanguageModel::from_pretrained(&base).max_seq_length(128).device(DeviceKind::Cpu);
        let (mut model, tokenizer) = loader.full_finetuning(full).score_head(3).load().expect("it loads");
        if !full {
            model = model.get_peft_model(LoraConfig::new(4)).expect("a valid configuration");
        }
        let dir = scratch.path().join(if full { "full" } else { "adapter" });
        model.save_pretrained(&dir).expect("writable");

        let options = EncodeOptions { max_seq_length: 128, task: RowTask::ScoredPairs, ..EncodeOptions::default() };
        let pairs = Dataset::load(&file, Some(&tokenizer), &options).expect("it loads").0;
        let expected = model
            .causal_lm()
            .scores(&Batch::from_rows(pairs.examples().map(|example| (example.input_ids, example.labels)), 0));
        let expected = expected.expect("rows fit");
        let prompt = ChatPrompt::new(None, "What is a whale?").encode(&tokenizer).expect("it has a template");
        let ends = model.end_tokens(Some(&tokenizer)).expect("it has an end token");
        let completions: Vec<&[u32]> = pairs
            .examples()
            .map(|example| {
                let end = example.input_ids.iter().rposition(|id| ends.contains(id)).expect("a turn ends");
                assert!(end + 1 < example.input_ids.len(), "the template goes on after the end token");
                assert_eq!(example.input_ids[..prompt.len()], prompt);
                &example.input_ids[prompt.len()..=end]
            })
            .collect();

        let config = example(scratch.path(), &dir);
        let mut rewards = config.reward_set(Some(&tokenizer), &()).expect("it loads");
        let (columns, messages) = (serde_json::Map::new(), serde_json::json!([]));
        let samples = completions.iter().map(|completion_ids| Sample {
            prompt: "",
            prompt_ids: &prompt,
            completion: "",
            completion_ids,
            truncated: false,
            row: &columns,
            messages: Some(&messages),
        });
        let scores = rewards.score(&samples.collect::<Vec<_>>()).expect("it scores");
        for (got, want) in scores.totals.iter().zip(&expected) {
            super::assert_close("the score", got.expect("a number"), *want, 1e-6);
        }
        assert!((expected[0] - expected[1]).abs() > 1e-3, "{expected:?}");

        let report = config.train(TrainOptions { overwrite: true, ..TrainOptions::default() }, &()).expect("it runs");
        let of = |name: &str| report.steps[0].metrics.get(name).expect("it is reported");
        assert_eq!(of("rewards/model/mean"), of("reward"));
        assert!(of("rewards/model/std") > 0.0 && report.steps[0].grad_norm > 0.0);
        assert!(report.evals[0].metrics.get("eval_rewards/model/mean").is_some());
    }
}

#[test]
fn other_models_are_no_rewards() {
    let scratch = tempfile::tempdir().expect("a directory");
    let error = |model: &Path| {
        let config = example(scratch.path(), model);
        config.train(TrainOptions::default(), &()).expect_err("refused").to_string()
    };
    let text = error(&root().join("examples/quickstart/base"));
    assert!(
        text.contains("reward \"model\": model = ") && text.contains("has no score head; name an adapter"),
        "{text}"
    );
    let text = error(&scratch.path().join("nothing"));
    assert!(text.contains("reward \"model\"") && text.contains("nothing"), "{text}");
}
