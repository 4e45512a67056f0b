//! The output of `eval` and `generate`.

use crate::{Scratch, expect, golden, run};

/// A row's sum may be off by 1e-5 of itself: what the order of f32 summation is allowed (see the goldens' README).
const RELATIVE: f64 = 1e-5;

#[test]
fn eval_gives_the_losses_of_transformers() {
    for (model, adapter) in
        [("qwen3-tied", None), ("qwen3-untied-sharded", None), ("llama3", None), ("qwen3-tied", Some("qv-rslora"))]
    {
        let dir = golden(model);
        let mut line = format!("eval --device cpu --json --model {0} --data {0}/rows.jsonl", dir.display());
        let mut expected = expect(model);
        if let Some(adapter) = adapter {
            line += &format!(" --adapter {}/adapters/{adapter}", dir.display());
            expected = expected["adapters"][adapter].take();
        }
        let result = run(&line).json();
        let (rows, expected) = (result["rows"].as_array().unwrap(), expected["rows"].as_array().unwrap());
        assert_eq!(rows.len(), expected.len());
        let (mut sum, mut tokens) = (0.0, 0);
        for (row, expected) in rows.iter().zip(expected) {
            let (nll, truth) = (row["nll"].as_f64().unwrap(), expected["sum"].as_f64().unwrap());
            assert!((nll - truth).abs() <= RELATIVE * truth, "{model} {adapter:?}: {nll} for {truth}");
            assert_eq!(row["tokens"], expected["tokens"]);
            sum += nll;
            tokens += row["tokens"].as_u64().unwrap();
        }
        let loss = result["loss"].as_f64().unwrap();
        // The same f64 numbers added in the same order, printed so that they read back the same.
        assert_eq!((loss, result["tokens"].as_u64()), (sum / tokens as f64, Some(tokens)));
        assert_eq!(result["perplexity"].as_f64(), Some(loss.exp()));
    }
}

#[test]
fn eval_prints_a_table_for_people() {
    let dir = golden("qwen3-tied");
    let done = run(&format!("eval --device cpu --per-row --model {0} --data {0}/rows.jsonl", dir.display())).ok();
    let lines: Vec<&str> = done.stdout.lines().collect();
    let columns: Vec<f64> = lines[1].split_whitespace().map(|column| column.parse().unwrap()).collect();
    let truth = expect("qwen3-tied")["rows"][0]["sum"].as_f64().unwrap();
    assert_eq!(columns[..2], [1.0, 18.0], "{}", lines[1]);
    for (column, truth) in columns[2..].iter().zip([truth, truth / 18.0]) {
        // Five places are printed.
        assert!((column - truth).abs() <= RELATIVE * truth + 1e-5, "{column} for {truth}");
    }
    assert!(lines.last().unwrap().starts_with("loss "), "{}", done.stdout);
    let scratch = Scratch::new();
    let one = scratch.write("one.jsonl", "{\"input_ids\": [1, 2]}\n");
    let done = run(&format!("eval --device cpu --model {} --data {one}", dir.display())).ok();
    assert!(done.stdout.ends_with("(1 token of 1 row)\n"), "{}", done.stdout);
}

#[test]
fn generate_gives_the_tokens_of_transformers() {
    for model in ["qwen3-tied", "qwen2", "llama3"] {
        for case in expect(model)["generate"].as_array().unwrap() {
            let numbers = |key: &str| {
                let ids: Vec<String> = case[key].as_array().unwrap().iter().map(ToString::to_string).collect();
                ids.join(",")
            };
            let line = format!(
                "generate --device cpu --model {} --prompt-ids {} --max-new-tokens 24",
                golden(model).display(),
                numbers("prompt")
            );
            let result = run(&format!("{line} --json")).json();
            assert_eq!(result["ids"], case["ids"], "{model}");
            assert!(result["text"].is_null(), "without a tokenizer there is no text");
            assert_eq!(run(&line).ok().stdout, format!("{}\n", numbers("ids")));
        }
    }
}

#[test]
fn the_seed_decides_what_is_drawn() {
    let line = format!(
        "generate --device cpu --json --model {} --prompt-ids 5,6 --temperature 1.5 --max-new-tokens 16 --seed",
        golden("qwen3-tied").display()
    );
    let draw = |seed: u32| run(&format!("{line} {seed}")).json()["ids"].clone();
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
}

#[test]
fn dry_run_prints_a_run_file_and_writes_nothing() {
    let scratch = Scratch::new();
    let done = scratch.train(&["--dry-run", "train.max_steps=5"]).ok();
    assert!(!scratch.path("out").exists());
    // q, k, v, o, gate, up and down of three blocks, r · (in + out) each.
    let (hidden, q, kv, mlp) = (40, 96, 48, 52);
    let one = (hidden + q) + 2 * (hidden + kv) + (q + hidden) + 2 * (hidden + mlp) + (mlp + hidden);
    assert!(done.stdout.contains(&format!("# {} of ", 3 * 2 * one)), "{}", done.stdout);
    for part in [
        "max_steps = 5",
        "max_seq_length = 256",
        "learning_rate = 0.0002",
        "# 5 steps of 2 rows, 1.25 epochs of 4 steps; 0 steps of warm-up",
        "7 rows",
    ] {
        assert!(done.stdout.contains(part), "{part}: {}", done.stdout);
    }
    let again = scratch.write("again.toml", &done.stdout);
    let second = run(&format!("train {again} --dry-run")).ok();
    // A pass is timed.
    let untimed =
        |text: &str| text.lines().filter(|line| !line.starts_with("# the run takes ")).collect::<Vec<_>>().join("\n");
    assert_eq!(untimed(&second.stdout), untimed(&done.stdout));
    assert!(done.stdout.lines().any(|line| line.starts_with("# the run takes ") && line.contains("(estimate: ")));
}
