//! What `train` writes.

use std::fs;

use serde_json::Value;

use crate::{Scratch, golden, run};

#[test]
fn a_run_leaves_adapter_metrics_plot_and_configuration() {
    let scratch = Scratch::new();
    let out = scratch.path("out");
    let eval = format!("data.eval={}", golden("qwen3-tied/rows.jsonl").display());
    let done = scratch.train(&["train.learning_rate=1e-2", &eval, "train.logging_steps=2"]).ok();

    assert_eq!(done.stdout, format!("{}\n", out.join("adapter").display()));
    for part in ["step 1/2  loss ", "step 2/2  loss ", " tok/s  eta 0s", "eval after step 2"] {
        assert!(done.stderr.contains(part), "{part}: {}", done.stderr);
    }
    let mut names: Vec<String> =
        fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    assert_eq!(names, ["adapter", "loss.svg", "metrics.jsonl", "report.html", "run.toml", "tensorboard"]);
    let metrics: Vec<Value> = fs::read_to_string(out.join("metrics.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(metrics.iter().map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 2]);
    assert_eq!(metrics[0]["learning_rate"], 1e-2);
    let resolved = fs::read_to_string(out.join("run.toml")).unwrap();
    assert!(resolved.contains("learning_rate = 0.01") && resolved.contains("weight_decay = 0.01"), "{resolved}");

    // The adapter is used: its loss is the one that the run measured at its end.
    let model = golden("qwen3-tied");
    let line = format!("eval --device cpu --json --model {0} --data {0}/rows.jsonl", model.display());
    let base = run(&line).json();
    let adapted = run(&format!("{line} --adapter {}/adapter", out.display())).json();
    assert_eq!(adapted["loss"], metrics[2]["eval_loss"]);
    assert!(adapted["loss"].as_f64() < base["loss"].as_f64(), "{adapted} {base}");
}

#[test]
fn a_resolved_configuration_gives_the_same_bits_and_is_kept() {
    let scratch = Scratch::new();
    scratch.train(&[]).ok();
    let out = scratch.path("out");
    let read = |name: &str| fs::read(out.join(name)).unwrap();
    let (first, run_file) = (read("adapter/adapter_model.safetensors"), read("run.toml"));
    fs::remove_dir_all(out.join("adapter")).unwrap();
    run(&format!("train {}", out.join("run.toml").display())).ok();
    assert!(read("adapter/adapter_model.safetensors") == first);
    assert_eq!(read("run.toml"), run_file);
    assert_eq!(read("run.resolved.toml"), run_file);
}

#[test]
fn an_adapter_can_be_gone_on_with() {
    let scratch = Scratch::new();
    scratch.train(&[]).ok();
    let second = format!("output_dir={}", scratch.path("second").display());
    let from = format!("lora.init_from={}", scratch.path("out/adapter").display());
    scratch.train(&[&second, &from, "lora.use_gradient_checkpointing=true"]).ok();
    let resolved = fs::read_to_string(scratch.path("second/run.toml")).unwrap();
    for part in ["init_from = ", "r = 2\n", "use_gradient_checkpointing = true"] {
        assert!(resolved.contains(part), "{part}: {resolved}");
    }
    scratch.train(&[&second, &from, "lora.r=3"]).fails(2, &["r = 3 but it has 2", "init_from"]);
}

#[test]
fn all_weights_become_a_model() {
    let scratch = Scratch::new();
    let model = golden("qwen2");
    let text = format!(
        "output_dir = {:?}\ndevice = \"cpu\"\n[model]\nname_or_path = {model:?}\nfull_finetuning = true\n[data]\n\
         train = {:?}\n[train]\nmax_steps = 1\n",
        scratch.path("full"),
        model.join("rows.jsonl")
    );
    let file = scratch.write("full.toml", text);
    let done = run(&format!("train {file}")).ok();
    assert_eq!(done.stdout, format!("{}\n", scratch.path("full/model").display()));
    let line = format!("eval --device cpu --json --model {} --data {}/rows.jsonl", done.stdout.trim(), model.display());
    assert!(run(&line).json()["loss"].is_f64());
}
