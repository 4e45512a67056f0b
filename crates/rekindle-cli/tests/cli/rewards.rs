//! `rekindle rewards`.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::{Done, Scratch, golden, rekindle};

/// A run file for the quickstart's base model, with `rewards` at its end. Returns its path.
fn run_file(scratch: &Scratch, rows: &[Value], rewards: &str) -> String {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/quickstart/base").canonicalize().unwrap();
    let rows: Vec<String> = rows.iter().map(Value::to_string).collect();
    let train = scratch.write("rows.jsonl", rows.join("\n"));
    let text = format!("model = {base:?}\n[lora]\nr = 4\n[data]\ntrain = {train:?}\n{rewards}");
    scratch.write("run.toml", text)
}

fn test(scratch: &Scratch, rows: &[Value], rewards: &str, more: &[&str]) -> Done {
    let run = run_file(scratch, rows, rewards);
    rekindle([&["rewards", "test", &run], more].concat())
}

fn sums() -> Vec<Value> {
    vec![
        json!({"prompt": "2 + 2", "completion": "It is 4", "answer": 4}),
        json!({"prompt": "2 + 3", "completion": "It is 6", "answer": 5}),
        json!({"prompt": [{"role": "user", "content": "1 + 1"}], "completion": [{"role": "assistant", "content": "2"}],
               "answer": "two"}),
    ]
}

const NUMERIC: &str = "[[rewards]]\ntype = \"numeric\"\ncolumn = \"answer\"\nweight = 2\n";

#[test]
fn rows_are_scored_with_their_own_answers() {
    let scratch = Scratch::new();
    let length = "[[rewards]]\ntype = \"length\"\nmax = 2\nunit = \"words\"\n";
    let done = test(&scratch, &sums(), &format!("{NUMERIC}{length}"), &[]).ok();
    let lines: Vec<Vec<&str>> = done.stdout.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["reward", "weight", "mean", "std", "min", "max", "nulls"]);
    assert_eq!(lines[1], ["numeric", "2", "0.500", "0.500", "0.000", "1.000", "1"]);
    assert_eq!(lines[2], ["length", "1", "0.333", "0.471", "0.000", "1.000", "0"]);
    assert_eq!(lines[3], ["total", "1.000", "0.816", "0.000", "2.000", "0"]);
    assert!(done.stdout.contains("highest: row 1, total 2.000: It is 4\n"), "{}", done.stdout);
    assert!(done.stdout.contains("lowest: row 2, total 0.000: It is 6\n"), "{}", done.stdout);
}

#[test]
fn completions_of_a_file_are_scored() {
    let scratch = Scratch::new();
    let lines = [json!({"row": 2, "text": "5"}), json!({"row": 2, "completion": "6", "ids": [1, 2, 3]})];
    let file = scratch.write("answers.jsonl", lines.map(|line| line.to_string()).join("\n"));
    let overlong = "[[rewards]]\ntype = \"soft_overlong\"\nmax_completion_len = 4\nsoft_punish_cache = 2\n";
    let rewards = format!("{NUMERIC}{overlong}");
    let done = test(&scratch, &sums(), &rewards, &["--completions", &file, "--json"]).ok();
    let scored: Vec<Value> = done.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(scored[0]["rewards"]["numeric"], json!(1.0));
    assert_eq!(scored[1]["rewards"], json!({"numeric": 0.0, "soft_overlong": -0.5}));
    assert_eq!((&scored[1]["row"], &scored[1]["total"]), (&json!(2), &json!(-0.5)));
    let missing = scratch.write("answers.jsonl", json!({"row": 9, "text": "5"}).to_string());
    let done = test(&scratch, &sums(), &rewards, &["--completions", &missing]);
    done.fails(3, &["answers.jsonl:1: row 9 is not among the 3 rows"]);
}

#[test]
fn the_template_of_a_command_runs() {
    let template = rekindle(["rewards", "template", "python"]).ok().stdout;
    assert!(template.contains("def reward(prompts, completions, **columns):"), "{template}");
    assert!(template.lines().count() <= 20, "{template}");
    let scratch = Scratch::new();
    let program = scratch.write("reward.py", template);
    let command = format!("[[rewards]]\ntype = \"command\"\nname = \"judge\"\ncommand = [\"python3\", {program:?}]\n");
    let done = test(&scratch, &sums(), &command, &[]).ok();
    assert!(done.stdout.contains("judge"), "{}", done.stdout);
    fs::write(&program, "raise SystemExit('no such model')").unwrap();
    let done = test(&scratch, &sums(), &command, &[]);
    done.fails(1, &["reward \"judge\": python3 after 2 restarts: the command ended without a reply", "no such model"]);
}

/// A reward model is planned, trained and evaluated, and its adapter is merged into a sequence classifier.
#[test]
fn a_reward_model_is_trained_and_merged() {
    let scratch = Scratch::new();
    let pairs = golden("reward").join("pairs.jsonl").display().to_string();
    let [train, eval] = ["train", "eval"].map(|key| format!("data.{key}={pairs:?}"));
    scratch.train(&["train.method=\"reward\"", "train.eval_steps=2", &train, &eval]).ok();
    let metrics = fs::read_to_string(scratch.path("out/metrics.jsonl")).unwrap();
    assert!(metrics.contains("\"eval_accuracy\":") && metrics.contains("\"mean_reward\":"), "{metrics}");
    let (adapter, merged) = (scratch.path("out/adapter").display().to_string(), scratch.path("merged"));
    rekindle(["merge", &adapter, "--out", &merged.display().to_string()]).ok();
    let config: Value = serde_json::from_str(&fs::read_to_string(merged.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["architectures"], json!(["Qwen3ForSequenceClassification"]));
}

#[test]
fn mistakes_are_answered() {
    let scratch = Scratch::new();
    test(&scratch, &sums(), "", &[]).fails(2, &["has no rewards; add a section [[rewards]]"]);
    let exact = "[[rewards]]\ntype = \"exact\"\ncolumn = \"gold\"\n";
    test(&scratch, &sums(), exact, &[]).fails(1, &["reward \"exact\": completion 0: the row has no column \"gold\""]);
    let unanswered = [json!({"prompt": "2 + 2"})];
    test(&scratch, &unanswered, exact, &[]).fails(3, &["line 1: the row has no answer of its own", "--completions"]);
    test(&scratch, &sums(), "[[rewards]]\ntype = \"exakt\"\n", &[]).fails(2, &["[[rewards]] 1", "`exakt`"]);
}
