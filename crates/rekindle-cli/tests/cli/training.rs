//! The files that `train` writes.

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
    let parts = ["eval before step 1", "step 1/2  loss ", "step 2/2  loss ", " tok/s  eta 0s", "eval after step 2"];
    for part in parts {
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
    assert_eq!(metrics.iter().map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2, 2]);
    assert_eq!(metrics[1]["learning_rate"], 1e-2);
    let resolved = fs::read_to_string(out.join("run.toml")).unwrap();
    assert!(resolved.contains("learning_rate = 0.01") && resolved.contains("weight_decay = 0.01"), "{resolved}");

    // The adapter is used: its loss is the one that the run measured at its end.
    let model = golden("qwen3-tied");
    let line = format!("eval --device cpu --json --model {0} --data {0}/rows.jsonl", model.display());
    let base = run(&line).json();
    let adapted = run(&format!("{line} --adapter {}/adapter", out.display())).json();
    assert_eq!((&adapted["loss"], &base["loss"]), (&metrics[3]["eval_loss"], &metrics[0]["eval_loss"]));
    let loss = |line: &Value| format!("{:.3}", line["eval_loss"].as_f64().unwrap());
    let summary = format!("evaluation loss {} -> {}", loss(&metrics[0]), loss(&metrics[3]));
    assert!(done.stderr.contains(&summary), "{summary}: {}", done.stderr);
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
    let third = format!("output_dir={}", scratch.path("third").display());
    scratch.train(&[&third, &from, "lora.r=3"]).fails(2, &["r = 3, but the adapter has 2", "init_from"]);
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

#[test]
fn a_finished_adapter_is_replaced_only_when_asked() {
    let scratch = Scratch::new();
    scratch.train(&["train.save_steps=1"]).ok();
    let adapter = scratch.path("out/adapter/adapter_model.safetensors");
    let first = fs::read(&adapter).unwrap();
    scratch.train(&["seed=1"]).fails(2, &["checkpoint-2 is a checkpoint of an earlier run", "--resume", "--overwrite"]);
    for step in ["checkpoint-1", "checkpoint-2"] {
        fs::remove_dir_all(scratch.path("out").join(step)).unwrap();
    }
    for more in [&["seed=1"][..], &["seed=1", "--resume"]] {
        scratch.train(more).fails(2, &["adapter is the result of an earlier run", "--overwrite", "another output_dir"]);
    }
    assert!(fs::read(&adapter).unwrap() == first, "it is as it was");
    let dry = scratch.train(&["seed=1", "--dry-run"]).ok();
    assert!(
        dry.stdout.contains("# the run would be refused: ") && dry.stdout.contains("--overwrite"),
        "{}",
        dry.stdout
    );
    scratch.train(&["seed=1", "train.save_steps=2", "--overwrite"]).ok();
    assert!(fs::read(&adapter).unwrap() != first);
    // The checkpoints of a run that is replaced go with it.
    scratch.train(&["seed=2", "train.save_steps=1", "train.max_steps=1", "--overwrite"]).ok();
    assert!(scratch.path("out/checkpoint-1").exists() && !scratch.path("out/checkpoint-2").exists());
}

/// A model whose weights cannot be read: whatever is refused with another error is refused before they are.
#[test]
fn what_needs_no_weights_is_checked_before_they_load() {
    let scratch = Scratch::new();
    let trained = scratch.train(&["train.save_steps=1"]).ok();
    assert_eq!(trained.code, 0);
    let broken = scratch.path("broken");
    fs::create_dir(&broken).unwrap();
    fs::copy(golden("qwen3-tied/config.json"), broken.join("config.json")).unwrap();
    fs::write(broken.join("model.safetensors"), "no weights").unwrap();
    let (model, elsewhere) = (
        format!("model.name_or_path={}", broken.display()),
        format!("output_dir={}", scratch.path("elsewhere").display()),
    );
    let train = |more: &[&str]| scratch.train(&[&[model.as_str()], more].concat());
    let anew = |more: &[&str]| train(&[&[elsewhere.as_str()], more].concat());
    anew(&[]).fails(1, &["model.safetensors"]);
    anew(&["model.max_seq_length=16"]).fails(3, &["19 tokens", "max_seq_length = 16"]);
    anew(&["data.eval=no/such.jsonl"]).fails(3, &["no/such.jsonl"]);
    anew(&["train.sample_prompts=[\"hello\"]"]).fails(2, &["sample_prompts needs a tokenizer"]);
    anew(&["train.report_to=wandb"]).fails(2, &["report_to", "is not supported; use"]);
    anew(&["train.embedding_learning_rate=1e-5"]).fails(2, &["embedding_learning_rate needs"]);
    anew(&["train.optimizer_in_bwd=true"]).fails(2, &["optimizer_in_bwd"]);
    let wsd = ["train.lr_scheduler_type=warmup_stable_decay", "train.lr_scheduler_kwargs={num_decay_steps=9}"];
    anew(&wsd).fails(2, &["a decay of 9 steps is longer than the 2 that remain of 2 steps"]);
    let from = format!("lora.init_from={}", scratch.path("out/adapter").display());
    anew(&[&from, "lora.r=3"]).fails(2, &["r = 3, but the adapter has 2"]);
    train(&[]).fails(2, &["checkpoint-2 is a checkpoint of an earlier run"]);
    train(&["--resume=latest", "train.weight_decay=0.5"]).fails(2, &["weight_decay was 0.01 and is now 0.5"]);
    train(&["--resume=latest", "train.max_steps=1"]).fails(1, &["is at step 2, but the run has only 1"]);
    assert!(!scratch.path("elsewhere").exists(), "nothing was written");
}

#[test]
fn a_readme_says_what_was_trained() {
    let scratch = Scratch::new();
    let eval = format!("data.eval={}", golden("qwen3-tied/rows.jsonl").display());
    scratch.train(&[&eval, "train.save_steps=1", "train.run_name=first try"]).ok();
    let read = |name: &str| fs::read_to_string(scratch.path("out").join(name)).unwrap();
    let card = read("adapter/README.md");
    let base = golden("qwen3-tied").display().to_string();
    for part in [
        &format!("---\nbase_model: {base}\nlibrary_name: peft\n"),
        &format!("- base_model:adapter:{base}\n"),
        "# first try\n",
        "- Training data: rows.jsonl, 7 rows with ",
        "- Evaluation data: rows.jsonl, 7 rows with ",
        "- max_steps: 2\n",
        "- r: 2\n",
        "| 0 | 0.00 | - | ",
    ] {
        assert!(card.contains(part), "{part}: {card}");
    }
    assert!(!card.contains(&scratch.path("").display().to_string()), "no paths of results: {card}");
    assert!(read("checkpoint-1/README.md").contains("| 1 | ") && !read("checkpoint-1/README.md").contains("| 2 | "));
    assert!(read("report.html").contains("first try: "), "the name is in the report's title");
    // A card is written again; what someone wrote in its place is kept.
    scratch.train(&["seed=2", "--overwrite"]).ok();
    assert!(read("adapter/README.md").contains("- seed: 2\n"));
    fs::write(scratch.path("out/adapter/README.md"), "# Mine\n").unwrap();
    scratch.train(&["seed=3", "--overwrite"]).ok();
    assert_eq!(read("adapter/README.md"), "# Mine\n");
}

#[test]
fn keys_of_transformers_5_are_read_and_resolved() {
    let scratch = Scratch::new();
    let eval = format!("data.eval={}", golden("qwen3-tied/rows.jsonl").display());
    let keys = [
        eval.as_str(),
        "train.max_steps=10",
        "train.num_train_epochs=3",
        "train.warmup_ratio=0.2",
        "train.eval_strategy=steps",
        "train.eval_steps=0.5",
        "train.save_strategy=epoch",
        "train.logging_steps=0.3",
        "train.logging_first_step=false",
        "train.eval_on_start=false",
        "train.metric_for_best_model=eval_loss",
        "train.group_by_length=false",
    ];
    let done = scratch.train(&keys).ok();
    assert!(done.stderr.contains("max_steps = 10 overrides num_train_epochs = 3"), "{}", done.stderr);
    let lines: Vec<&str> = done.stderr.lines().filter(|line| line.starts_with("step ")).collect();
    let steps: Vec<&str> = lines.iter().map(|line| line.split("  ").next().unwrap()).collect();
    assert_eq!(steps, ["step 3/10", "step 6/10", "step 9/10", "step 10/10"]);
    let evals: Vec<&str> = done.stderr.lines().filter(|line| line.starts_with("eval ")).collect();
    assert!(evals.len() == 2 && evals[0].starts_with("eval after step 5 "), "{evals:?}");
    // Seven rows in twos: four steps an epoch.
    for step in [4, 8, 10] {
        assert!(scratch.path(&format!("out/checkpoint-{step}")).exists(), "{step}");
    }
    let resolved = fs::read_to_string(scratch.path("out/run.toml")).unwrap();
    for part in ["max_steps = 10\n", "warmup_steps = 0.2\n", "eval_steps = 0.5\n", "logging_steps = 0.3\n"] {
        assert!(resolved.contains(part), "{part}: {resolved}");
    }
    for part in ["num_train_epochs", "warmup_ratio", "metric_for_best_model"] {
        assert!(!resolved.contains(part), "{part}: {resolved}");
    }
    scratch.train(&["train.eval_strategy=epoch"]).fails(2, &["eval_strategy needs evaluation rows"]);
    scratch.train(&["train.max_length=512"]).fails(2, &["max_seq_length in [model]"]);
}
