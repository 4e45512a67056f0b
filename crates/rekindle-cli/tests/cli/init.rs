//! `init`: what it writes can be run.

use std::fs;
use std::path::{Path, PathBuf};

use crate::{Scratch, golden, rekindle, run};

fn quickstart(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/quickstart").join(name).canonicalize().unwrap()
}

/// Runs `init` on the CPU and gives the text of the run file.
fn init(scratch: &Scratch, model: &Path, data: &Path, more: &[&str]) -> String {
    let [model, data, out] = [model.to_owned(), data.to_owned(), scratch.path("first.toml")];
    let line =
        format!("init --device cpu --model {} --data {} --out {}", model.display(), data.display(), out.display());
    let done = rekindle(line.split(' ').chain(more.iter().copied())).ok();
    assert_eq!(done.stdout, format!("{}\n", out.display()));
    for part in [" rows (", "the run takes about ", "--dry-run"] {
        assert!(done.stderr.contains(part), "{part}: {}", done.stderr);
    }
    fs::read_to_string(out).unwrap()
}

fn has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.lines().any(|line| line.starts_with(part)), "{part:?} begins no line of: {text}");
    }
}

#[test]
fn what_it_writes_passes_a_dry_run_and_is_kept() {
    let scratch = Scratch::new();
    let eval = quickstart("heldout.jsonl").display().to_string();
    let text = init(&scratch, &quickstart("base"), &quickstart("train.jsonl"), &["--eval", &eval]);
    has(
        &text,
        &[
            "output_dir = \"outputs/first\"",
            "max_seq_length = 128 ",
            "load_in_4bit = false ",
            "r = 16 ",
            "overlong = \"error\" ",
            "per_device_train_batch_size = 8 ",
            "gradient_accumulation_steps = 2 ",
            "num_train_epochs = 3 ",
            "eval_steps = 8 ",
            "eval_samples = 2 ",
        ],
    );
    let settings = text.lines().filter(|line| line.contains(" = ") && !line.starts_with('#'));
    assert!(settings.clone().count() > 15 && settings.clone().all(|line| line.contains(" # ")), "{text}");

    let file = scratch.path("first.toml").display().to_string();
    let dry = run(&format!("train {file} --dry-run")).ok();
    assert!(dry.stdout.contains("75 steps of 16 rows, 3.00 epochs of 25 steps; 3 steps of warm-up"), "{}", dry.stdout);

    let line = format!("init --model {0}/base --data {0}/train.jsonl --out {file}", quickstart("").display());
    run(&line).fails(2, &["first.toml already exists", "--out"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), text);
}

#[test]
fn rows_that_are_far_longer_are_dropped_and_said() {
    let scratch = Scratch::new();
    let mut rows = String::new();
    for n in 0..150 {
        let ids: Vec<u32> = (0..if n == 77 { 200 } else { 20 + n % 9 }).map(|id| 1 + id % 100).collect();
        rows += &format!("{{\"input_ids\": {ids:?}}}\n");
    }
    let data = scratch.write("rows.jsonl", rows);
    let text = init(&scratch, &golden("qwen3-tied"), Path::new(&data), &[]);
    has(&text, &["max_seq_length = 64 ", "overlong = \"drop\" ", "eval_fraction = 0.05 ", "eval_steps = "]);
    assert!(text.contains("# 8 rows held out to evaluate"), "{text}");
    assert!(text.contains("omitted: 1 longer row;"), "{text}");
    let dry = run(&format!("train {} --dry-run", scratch.path("first.toml").display())).ok();
    assert!(dry.stdout.contains("1 dropped"), "{}", dry.stdout);
}

#[test]
fn quantized_checkpoints_and_adapters_stay_what_they_are() {
    let scratch = Scratch::new();
    let nf4 = scratch.quantize("nf4", "");
    let rows = golden("qwen3-tied/rows.jsonl");
    let text = init(&scratch, Path::new(&nf4), &rows, &[]);
    // So few rows are all trained on.
    has(&text, &["# load_in_4bit ", "# eval = \"heldout.jsonl\""]);
    assert!(!text.contains("eval_s"), "nothing to evaluate: {text}");
    let file = scratch.path("first.toml").display().to_string();
    run(&format!("train {file} --dry-run")).ok();

    fs::remove_file(&file).unwrap();
    scratch.train(&[]).ok();
    let text = init(&scratch, &scratch.path("out/adapter"), &rows, &[]);
    has(&text, &["# r "]);
    assert!(!text.contains("lora_alpha"), "{text}");
    let dry = run(&format!("train {file} --dry-run")).ok();
    assert!(dry.stdout.contains("\nr = 2\n"), "{}", dry.stdout);
}

#[test]
fn what_cannot_be_read_leaves_no_file() {
    let scratch = Scratch::new();
    let out = scratch.path("none.toml");
    let line = |model: &str, data: &str| format!("init --model {model} --data {data} --out {}", out.display());
    let model = quickstart("base").display().to_string();
    let rows = scratch.write("rows.jsonl", "{\"text\": 3}\n");
    run(&line(&model, &rows)).fails(3, &["rows.jsonl"]);
    run(&line("/no/such/model", &rows)).fails(1, &["/no/such/model"]);
    assert!(!out.exists());
}
