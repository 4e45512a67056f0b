//! The example that ships with the binary.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::{Scratch, rekindle};

/// Loss of the held-out rows and the shown answers, before and after.
fn looks(stdout: &str) -> Vec<(f64, Vec<&str>)> {
    let mut looks: Vec<(f64, Vec<&str>)> = Vec::new();
    for line in stdout.lines() {
        if let Some(rest) = line.strip_prefix("   held-out loss ") {
            looks.push((rest.split(';').next().unwrap().parse().unwrap(), Vec::new()));
        } else if let Some(answer) = line.strip_prefix("   A  ") {
            looks.last_mut().unwrap().1.push(answer);
        }
    }
    looks
}

#[test]
fn quickstart_teaches_the_model_to_answer_in_json() {
    let scratch = Scratch::new();
    let dir = scratch.path("demo");
    let done = rekindle(["quickstart", "--out", &dir.display().to_string()]).ok();
    let looks = looks(&done.stdout);
    let [(before, plain), (after, json)] = looks.as_slice() else { panic!("{}", done.stdout) };
    assert!(after < before, "{}", done.stdout);
    assert_eq!((plain.len(), json.len()), (3, 3), "{}", done.stdout);
    assert!(plain.iter().all(|answer| !answer.starts_with('{')), "{}", done.stdout);
    assert!(json.iter().all(|answer| answer.starts_with("{\"")), "{}", done.stdout);
    for name in
        ["adapter/adapter_config.json", "adapter/tokenizer.json", "metrics.jsonl", "report.html", "base/config.json"]
    {
        assert!(dir.join(name).is_file(), "{name}");
    }

    // The commands that it ends with work.
    let [model, adapter, run_file] = ["base", "adapter", "run.toml"].map(|name| dir.join(name).display().to_string());
    for part in [format!("generate --model {model} --adapter {adapter} --chat"), format!("train {run_file} ")] {
        assert!(done.stdout.contains(&part), "{part}: {}", done.stdout);
    }
    let ask = |text: &str| rekindle(["generate", "--model", &model, "--adapter", &adapter, "--chat", text]).ok().stdout;
    assert!(ask("What is a whale?").starts_with("{\""));
    check_samples(&dir, ask);
    let again = rekindle(["train", &run_file, "train.max_steps=1", "--overwrite"]).ok();
    assert_eq!(Path::new(again.stdout.trim()), dir.join("adapter"));
    assert!(fs::read_to_string(dir.join("run.toml")).unwrap().starts_with("# Written by"), "the run file is kept");
}

/// Three prompts were answered before the first step and at six evaluations, at the last as `generate` answers them.
fn check_samples(dir: &Path, ask: impl Fn(&str) -> String) {
    let metrics = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let lines = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let samples: Vec<Value> = lines.filter(|line| line["sample"].is_u64()).collect();
    assert_eq!(samples.len(), 3 * (1 + 6), "{metrics}");
    let report = fs::read_to_string(dir.join("report.html")).unwrap();
    let rows = fs::read_to_string(dir.join("heldout.jsonl")).unwrap();
    for (sample, row) in samples[18..].iter().zip(rows.lines()) {
        let row: Value = serde_json::from_str(row).unwrap();
        let [question, right] = [0, 1].map(|turn| row["messages"][turn]["content"].as_str().unwrap());
        assert_eq!(sample["step"], 120);
        assert!(sample["prompt"].as_str().unwrap().contains(question), "{sample}");
        assert_eq!(sample["expected"], right);
        assert_eq!(sample["output"].as_str().unwrap(), ask(question).trim_end_matches('\n'));
        assert!(report.contains(question), "{question}");
    }
    assert!(report.contains("All 120 steps") && report.contains("lora_alpha = 16"), "the configuration is in it");
}

#[test]
fn streamed_text_is_the_whole_text() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/quickstart/base").display().to_string();
    for prompt in [["--chat", "What is a whale?"], ["--prompt", "On Monday"]] {
        let mut line = vec!["generate", "--device", "cpu", "--model", &model, "--max-new-tokens", "24"];
        line.extend(prompt);
        let streamed = rekindle(&line).ok().stdout;
        let whole = rekindle(line.iter().chain(&["--json"])).json();
        assert_eq!(
            Some(streamed.trim_end_matches('\n')),
            whole["text"].as_str().map(|text| text.trim_end_matches('\n'))
        );
        assert!(!whole["ids"].as_array().unwrap().is_empty());
    }
}

#[test]
fn quickstart_spares_other_files() {
    let scratch = Scratch::new();
    let dir = scratch.path("mine");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("notes.txt"), "kept").unwrap();
    rekindle(["quickstart", "--out", &dir.display().to_string()]).fails(2, &["mine", "--out"]);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
}
