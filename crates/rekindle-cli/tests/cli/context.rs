//! Contexts longer than the model's window.

use std::fs;

use crate::{Scratch, golden, rekindle, run};

#[test]
fn a_longer_run_says_what_it_did_and_is_opened_alike() {
    let scratch = Scratch::new();
    let rows = golden("qwen3-tied/rows.jsonl");
    let eval = format!("data.eval={}", rows.display());
    let done = scratch.train(&["model.max_seq_length=512", "train.learning_rate=1e-2", &eval]).ok();
    assert_eq!(done.stderr.matches("rope_scaling yarn, factor 2: window 256 -> 512").count(), 1, "{}", done.stderr);
    let resolved = fs::read_to_string(scratch.path("out/run.toml")).unwrap();
    for part in ["max_seq_length = 512", "[model.rope_scaling]", "rope_type = \"yarn\"", "factor = 2.0"] {
        assert!(resolved.contains(part), "{part}: {resolved}");
    }
    let metrics = fs::read_to_string(scratch.path("out/metrics.jsonl")).unwrap();
    let last: serde_json::Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();

    let (model, adapter) = (golden("qwen3-tied"), scratch.path("out/adapter"));
    let line = format!("--device cpu --model {} --adapter {}", model.display(), adapter.display());
    let found = run(&format!("eval {line} --json --data {}", rows.display())).json();
    assert_eq!(found["loss"], last["eval_loss"], "the run's own model");
    let done = run(&format!("generate {line} --prompt-ids 1,2,3 --max-new-tokens 4")).ok();
    assert!(done.stderr.contains("yarn, factor 2: window 256 -> 512"), "{}", done.stderr);
    run(&format!("generate {line} --prompt-ids 1 --max-seq-length 513")).fails(2, &["513", "window of 512"]);
    run(&format!("generate {line} --prompt-ids 1 --max-seq-length 512 --rope-scaling linear"))
        .fails(2, &["was trained with RoPE yarn, factor 2", "has linear, factor 2"]);
    let inspected = run(&format!("inspect {}", adapter.display())).ok().stdout;
    assert!(inspected.contains("positions {\"max_position_embeddings\":512"), "{inspected}");

    let merged = scratch.path("merged");
    let run_dir = scratch.path("out");
    rekindle(["merge", run_dir.to_str().unwrap(), "--out", merged.to_str().unwrap(), "--verify"]).ok();
    let inspected = run(&format!("inspect {}", merged.display())).ok().stdout;
    for part in ["max_position_embeddings 512", "rope_type \"yarn\""] {
        assert!(inspected.contains(part), "{part}: {inspected}");
    }

    // Going on with the adapter needs no word about its positions, and the resolved file gives the same run.
    let start = format!("lora.init_from={}", adapter.display());
    let on = format!("output_dir={}", scratch.path("on").display());
    let done = scratch.train(&[&start, &on, "lora.r=2"]).ok();
    assert!(done.stderr.contains("yarn, factor 2: window 256 -> 512"), "{}", done.stderr);
    let dry = run(&format!("train {} --dry-run", scratch.path("out/run.toml").display())).ok();
    assert!(dry.stdout.contains("# rope_scaling yarn, factor 2: window 256 -> 512"), "{}", dry.stdout);
    assert!(dry.stdout.starts_with(resolved.trim_end()), "{}\n{resolved}", dry.stdout);
}

#[test]
fn all_weights_are_written_with_their_positions() {
    let scratch = Scratch::new();
    let file = fs::read_to_string(scratch.path("run.toml")).unwrap().replace("[lora]\nr = 2\n", "");
    let file = scratch.write("full.toml", file);
    let line = "model.full_finetuning=true model.max_seq_length=1024 model.rope_scaling=dynamic";
    run(&format!("train {file} {line}")).ok();
    let config = fs::read_to_string(scratch.path("out/model/config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    // 1e6 · (4·4 − 3)^(24/22), at every length.
    let theta = config["rope_parameters"]["rope_theta"].as_f64().unwrap();
    assert!((theta / (1e6 * 13f64.powf(24.0 / 22.0)) - 1.0).abs() < 1e-12, "{config}");
    assert_eq!(
        (&config["rope_parameters"]["rope_type"], &config["max_position_embeddings"]),
        (&"default".into(), &1024.into())
    );
}

#[test]
fn what_cannot_be_is_refused_with_a_way_out() {
    let scratch = Scratch::new();
    let far = "model.max_seq_length=2000";
    scratch
        .train(&[far])
        .fails(2, &["max_seq_length is 2000, 7.8 times the window of 256", "set rope_scaling to a method"]);
    let done = scratch.train(&[far, "model.rope_scaling=linear", "--dry-run"]).ok();
    assert!(done.stdout.contains("# rope_scaling linear, factor 7.8125: window 256 -> 2000"), "{}", done.stdout);
    for (argument, parts) in [
        ("model.rope_scaling=yran", ["\"yran\": expected one of auto, linear, dynamic, yarn", "nearest: \"yarn\""]),
        ("model.rope_scaling=4", ["rope_scaling", "{ rope_type = \"yarn\", factor = 4.0 }"]),
        ("model.rope_scaling={type=\"yarn\",fcator=8}", ["rope_scaling.fcator has no effect", "\"yarn\""]),
        ("model.rope_scaling={factor=8}", ["rope_scaling.rope_type is missing", ""]),
        ("model.rope_scalling=yarn", ["\"rope_scalling\" is unknown", "nearest: \"rope_scaling\""]),
    ] {
        scratch.train(&[far, argument]).fails(2, &parts);
    }
    scratch.train(&["model.rope_scaling=yarn"]).fails(2, &["nothing to scale", "256", "raise max_seq_length"]);

    let rows = golden("qwen3-tied/rows.jsonl");
    let eval = |model: &str, more: &str| {
        run(&format!("eval --device cpu --model {} --data {} {more}", golden(model).display(), rows.display()))
    };
    eval("qwen3-tied", "--max-seq-length 512 --rope-scaling yran")
        .fails(2, &["--rope-scaling", "\"yran\" is not a method", "nearest: \"yarn\""]);
    eval("qwen3-tied", "--max-seq-length 512 --rope-scaling {rope_type=\"linear\",factor=\"x\"}")
        .fails(2, &["rope_scaling.factor is \"x\""]);
    eval("llama3", "--max-seq-length 512 --rope-scaling linear")
        .fails(2, &["would replace the llama3 scaling", "use \"auto\" to keep and extend it"]);
    let done = eval("qwen3-tied", "--max-seq-length 512 --rope-scaling {rope_type=\"linear\",factor=3}").ok();
    assert!(done.stderr.contains("rope_scaling linear, factor 3: window 256 -> 512"), "{}", done.stderr);
}
