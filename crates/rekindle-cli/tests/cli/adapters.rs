//! Adapters on the command line: every option in a run file, merging, and what this machine lacks for CUDA.

use crate::{Scratch, golden, rekindle, run};

#[test]
fn a_run_is_merged_and_verified() {
    let scratch = Scratch::new();
    scratch.train(&["lora.use_dora=true", "lora.bias=all", "lora.modules_to_save=[\"lm_head\"]"]).ok();
    let (run_dir, out) = (scratch.path("out"), scratch.path("merged"));
    let merge = ["merge", run_dir.to_str().unwrap(), "--out", out.to_str().unwrap(), "--verify", "--device", "cpu"];
    let done = rekindle(merge).ok();
    assert_eq!(done.stdout.trim(), out.display().to_string());
    assert!(done.stderr.contains("the losses of the adapter and the merged model differ by"), "{}", done.stderr);
    // What is there is never replaced, and the name of a device means nothing where nothing is computed.
    rekindle(merge).fails(2, &["merged is not empty; choose a new directory"]);
    run(&format!("merge {} --out elsewhere --device cpu", run_dir.display())).fails(2, &["--verify"]);
    // The same losses by the other command, to what f32 sums in another order differ by.
    let rows = golden("qwen3-tied/rows.jsonl");
    let loss = |more: String| {
        let line = format!("eval --device cpu --json --data {} {more}", rows.display());
        run(&line).json()["loss"].as_f64().unwrap()
    };
    let base = golden("qwen3-tied");
    let adapted = loss(format!("--model {} --adapter {}", base.display(), scratch.path("out/adapter").display()));
    let merged = loss(format!("--model {}", out.display()));
    assert!((adapted - merged).abs() <= 1e-5 * adapted, "{adapted} and {merged}");
    assert_ne!(merged, loss(format!("--model {}", base.display())));
}

/// The same combination in evaluation and in merging.
#[test]
fn several_adapters_become_one() {
    let scratch = Scratch::new();
    let (base, rows) = (golden("qwen3-tied"), golden("qwen3-tied/rows.jsonl"));
    let adapter = |name: &str| golden("lora-options/qwen3-tied/adapters").join(name).display().to_string();
    let [one, two] = [adapter("plain"), adapter("rslora")];
    let eval = |more: &str| run(&format!("eval --device cpu --json --data {} {more}", rows.display()));
    let on_base = |more: &str| eval(&format!("--model {} {more}", base.display()));
    let loss = |done: crate::Done| done.json()["loss"].as_f64().unwrap();
    let alone = loss(on_base(&format!("--adapter {one}")));
    assert_eq!(loss(on_base(&format!("--adapter {one} --adapter-weights 1"))), alone);
    let halved = loss(on_base(&format!("--adapter {one} --adapter-weights 0.5")));
    assert_ne!(halved, alone);
    let both = format!("--adapter {one} --adapter {two}");
    let mut losses = vec![alone, halved, loss(on_base(&both))];
    for how in ["--adapter-weights 0.7,-0.4", "--combine linear", "--combine svd:2 --adapter-weights 0.7,-0.4"] {
        let combined = loss(on_base(&format!("{both} {how}")));
        let out = scratch.path(&losses.len().to_string());
        let line = format!("merge {one} {two} {how} --model {} --out {} --verify", base.display(), out.display());
        assert_eq!(run(&line).ok().stdout.trim(), out.display().to_string());
        let merged = loss(eval(&format!("--model {}", out.display())));
        assert!((merged - combined).abs() <= 1e-5 * combined, "{how}: {merged} and {combined}");
        losses.push(combined);
    }
    for (i, loss) in losses.iter().enumerate() {
        assert!(losses[..i].iter().all(|other| (loss - other).abs() > 1e-4), "{losses:?}");
    }

    on_base(&format!("{both} --adapter-weights 1")).fails(2, &["--adapter-weights has 1 numbers", "2 adapters"]);
    on_base(&format!("{both} --combine linaer")).fails(2, &["\"linaer\"", "nearest: \"linear\""]);
    on_base(&format!("{both} --adapter {} --combine linear", adapter("patterns")))
        .fails(2, &["adapters of equal rank", "svd"]);
    on_base(&format!("{both} --adapter {}", adapter("dora"))).fails(2, &["(use_dora)", "merge it into the base"]);
}

/// Saved before it was trained: nothing is wrong with the file, and it does nothing.
#[test]
fn an_adapter_that_changes_nothing_is_reported() {
    let scratch = Scratch::new();
    let rows = golden("qwen3-tied/rows.jsonl").display().to_string();
    let eval = |more: &str| {
        run(&format!("eval --device cpu --json --data {rows} --model {} {more}", golden("qwen3-tied").display())).ok()
    };
    scratch.train(&["train.learning_rate=0"]).ok();
    let adapter = scratch.path("out/adapter").display().to_string();
    let idle = eval(&format!("--adapter {adapter}"));
    let said = format!("{adapter}: this adapter is untrained");
    assert!(idle.stderr.contains(&said), "{}", idle.stderr);
    assert_eq!(idle.json(), eval("").json());
    let alone = run(&format!("eval --device cpu --json --data {rows} --model {adapter}")).ok();
    assert!(alone.stderr.contains(&said), "{}", alone.stderr);
    let again = scratch.train(&[&format!("lora.init_from={adapter}"), &format!("output_dir={adapter}-2")]).ok();
    assert!(again.stderr.contains(&said), "{}", again.stderr);
    let trained = eval(&format!("--adapter {adapter}-2/adapter"));
    assert!(!trained.stderr.contains("B·A"), "{}", trained.stderr);
}

/// Tables with other rows than the base has.
#[test]
fn an_adapter_of_another_vocabulary_is_merged() {
    let scratch = Scratch::new();
    scratch.train(&["model.resize_model_vocab=140", "lora.modules_to_save=[\"lm_head\"]"]).ok();
    let (run_dir, out) = (scratch.path("out"), scratch.path("merged"));
    let done = run(&format!("merge {} --out {} --verify", run_dir.display(), out.display())).ok();
    assert!(done.stderr.contains("the losses of the adapter and the merged model differ by"), "{}", done.stderr);
    let ids = "--prompt-ids 1,139 --max-new-tokens 4 --json --device cpu";
    let generated = |model: &std::path::Path| run(&format!("generate --model {} {ids}", model.display())).answer();
    assert_eq!(generated(&run_dir.join("adapter")), generated(&out));
    run(&format!("generate --model {} {ids}", golden("qwen3-tied").display())).fails(3, &["139", "vocabulary of 131"]);
}

/// Adapters that start from the weights are saved and merged for the base as it was.
#[test]
fn starts_from_weights_are_run_and_merged() {
    for (number, arguments) in [
        &["lora.init_lora_weights=pissa_niter_4"][..],
        &["lora.init_lora_weights=olora", "lora.use_rslora=true"],
        &["lora.init_lora_weights=loftq", "model.load_in_4bit=true"],
    ]
    .iter()
    .enumerate()
    {
        let scratch = Scratch::new();
        scratch.train(arguments).ok();
        let (run_dir, out) = (scratch.path("out"), scratch.path("merged"));
        let done = run(&format!("merge {} --out {} --verify --device cpu", run_dir.display(), out.display())).ok();
        assert!(done.stderr.contains("the losses of the adapter and the merged model differ by"), "{}", done.stderr);
        let resolved = std::fs::read_to_string(run_dir.join("run.toml")).unwrap();
        let name = arguments[0].split('=').next_back().unwrap();
        assert!(resolved.contains(&format!("init_lora_weights = \"{name}\"")), "{resolved}");
        let rows = golden("qwen3-tied/rows.jsonl");
        let adapter = run_dir.join("adapter");
        let eval = |more: &str| {
            let model = golden("qwen3-tied");
            let (model, adapter, rows) = (model.display(), adapter.display(), rows.display());
            run(&format!("eval --device cpu --json --data {rows} --model {model} --adapter {adapter}{more}"))
        };
        let merged =
            run(&format!("eval --device cpu --json --data {} --model {}", rows.display(), out.display())).json();
        let adapted = if number == 2 {
            eval(" --load-in-8bit").fails(2, &["initialized by LoftQ", "load_in_4bit"]);
            let asked = eval(" --load-in-4bit").json();
            assert_eq!(eval("").json(), asked, "the adapter says how its base is loaded");
            asked
        } else {
            eval("").json()
        };
        let (adapted, merged) = (adapted["loss"].as_f64().unwrap(), merged["loss"].as_f64().unwrap());
        assert!((adapted - merged).abs() <= 1e-5 * adapted, "{arguments:?}: {adapted} and {merged}");
    }
}

#[test]
fn what_is_seldom_meant_is_said_and_done() {
    let scratch = Scratch::new();
    let done = scratch.train(&["lora.lora_alpha=32", "lora.target_modules=[\"q_proj\"]"]).ok();
    for part in [
        "[lora] target_modules covers only attention",
        "[lora] lora_alpha is 32 at r = 2, a scale of 16; usual are r and 2r: 2 or 4",
        "parameters are trained (",
        " of optimizer state",
    ] {
        assert!(done.stderr.contains(part), "{part}: {}", done.stderr);
    }
    let done = scratch.train(&["lora.lora_alpha=4", "--overwrite"]).ok();
    assert!(!done.stderr.contains("[lora]"), "{}", done.stderr);
}

#[test]
fn merging_what_is_no_adapter_is_refused() {
    let scratch = Scratch::new();
    let base = golden("qwen2");
    let out = scratch.path("merged");
    let line = format!("merge {} --out {}", base.display(), out.display());
    run(&line).fails(1, &["adapter_config.json"]);
    assert!(!out.exists());
}

#[test]
fn arguments_that_cannot_be_met_name_the_nearest() {
    let scratch = Scratch::new();
    for (argument, parts) in [
        ("lora.target_modules=[\"q_porj\"]", ["\"q_porj\" matches no linear", "nearest: \"q_proj\""]),
        ("lora.exclude_modules=[\"v_porj\"]", ["exclude_modules \"v_porj\"", "nearest: \"v_proj\""]),
        ("lora.rank_pattern={\"q_porj\"=4}", ["rank_pattern key \"q_porj\"", "nearest: \"q_proj\""]),
        ("lora.modules_to_save=[\"lm_haed\"]", ["modules_to_save \"lm_haed\"", "nearest: \"lm_head\""]),
        ("lora.layers_to_transform=[99]", ["layers_to_transform 99", "nearest: 2"]),
        ("lora.finetune_last_n_layers=9", ["finetune_last_n_layers is 9", "has only 3 layers"]),
        ("lora.bias=some", ["bias \"some\"", "\"lora_only\""]),
        ("lora.lora_dropout=1.5", ["lora_dropout is 1.5", "below 1"]),
        ("lora.r=0", ["r is 0", "at least 1"]),
        ("lora.init_lora_weights=pisa", ["init_lora_weights \"pisa\" is not supported", "nearest: \"pissa\""]),
        ("lora.init_lora_weights=pissa_niter_x", ["\"pissa_niter_N\" with a number", "nearest: \"pissa_niter_16\""]),
        ("lora.init_lora_weights=loftq", ["is not quantized", "load_in_4bit"]),
        ("lora.target_modules=[]", ["target_modules is empty", "usual: \"all-linear\""]),
        (
            "lora.target_modules=q_proj",
            ["\"q_proj\" matches the whole name of no linear", "[\"q_proj\"] or \".*q_proj\""],
        ),
        ("lora.target_modules=all-linaer", ["\"all-linaer\"", "\"all-linear\""]),
        ("lora.bias=lora", ["bias \"lora\"", "nearest: \"lora_only\""]),
        ("lora.lora_alpha=0", ["lora_alpha is 0", "usual: r = 2"]),
        ("lora.lora_dropout=1", ["lora_dropout is 1;", "usual: 0 to 0.1"]),
        ("lora.r=-4", ["r", "-4"]),
        ("lora.lora_alfa=4", ["\"lora_alfa\"", "\"lora_alpha\""]),
        ("lora.loftq_config={loftq_iter=2}", ["loftq_iter is 2", "only 1"]),
        ("lora.use_gradient_checkpointing=\"offload\"", ["use_gradient_checkpointing", "unsloth"]),
    ] {
        scratch.train(&[argument]).fails(2, &parts);
    }
}

#[test]
fn doctor_ends_in_a_verdict() {
    let done = run("doctor");
    let verdict = done.stdout.lines().last().unwrap();
    assert!(done.stdout.starts_with("CPU "), "{}", done.stdout);
    if done.stdout.contains("none from NVIDIA") {
        assert_eq!((done.code, verdict), (0, "Verdict  ready: runs use the CPU"));
        assert!(!done.stdout.contains("NVRTC"), "libraries do not matter without a GPU: {}", done.stdout);
    } else if done.code == 0 {
        assert_eq!(verdict, "Verdict  ready: runs use cuda:0");
    } else {
        assert!(done.stderr.contains("device \"cpu\" can be used"), "{}", done.stderr);
    }
}
