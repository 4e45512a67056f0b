//! `rekindle plan`, and what `train` does with the same plan.

use std::fs;

use serde_json::{Value, json};

use crate::{Done, Scratch, golden, rekindle};

impl Scratch {
    /// `rekindle plan` on the run file with more arguments.
    fn plan(&self, more: &[&str]) -> Done {
        let file = self.path("run.toml").display().to_string();
        rekindle(["plan", &file].iter().chain(more))
    }

    /// A directory with nothing but the `config.json` of a Qwen3 of this width and depth.
    fn outline(&self, hidden: usize, layers: usize) -> String {
        fs::create_dir_all(self.path("outline")).unwrap();
        let config = json!({
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151_936,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "max_position_embeddings": 40_960,
            "tie_word_embeddings": true,
            "hidden_act": "silu"
        });
        self.write("outline/config.json", config.to_string());
        format!("model.name_or_path={:?}", self.path("outline"))
    }
}

#[test]
fn a_plan_is_a_table_or_json() {
    let scratch = Scratch::new();
    let text = scratch.plan(&[]).ok().stdout;
    for part in [
        "cpu; 2 rows, ",
        "weights",
        "adapters",
        "gradients",
        "optimizer",
        "saved activations",
        "peak",
        "mapped files",
        "available",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let json = scratch.plan(&["--json"]).json();
    assert_eq!(json["fits"], true);
    assert_eq!(json["plan"]["rows"], 2);
    let bytes: u64 = json["plan"]["bytes"].as_object().unwrap().values().map(|bytes| bytes.as_u64().unwrap()).sum();
    assert_eq!(json["plan"]["peak"].as_u64(), Some(bytes));
    // The file, but for its header.
    let file = fs::metadata(golden("qwen3-tied/model.safetensors")).unwrap().len();
    let mapped = json["plan"]["mapped"].as_u64().unwrap();
    assert!(mapped <= file && file - mapped < 1 << 14, "{mapped} of {file}");
    assert!(json["largest_batch"].as_u64() > Some(2), "{json}");
}

#[test]
fn what_does_not_fit_is_told_with_what_to_change() {
    let scratch = Scratch::new();
    let done = scratch.plan(&["--device-memory", "100KiB"]);
    assert_eq!(done.code, 4, "{}", done.stderr);
    assert!(done.stdout.contains("peak "), "{}", done.stdout);
    for part in
        ["error: the run needs ", "but 100.0 KiB is available", "use_gradient_checkpointing = true", "load_in_4bit"]
    {
        assert!(done.stderr.contains(part), "{part}: {}", done.stderr);
    }
}

/// The shapes of a 4-billion model, for a card that is not there, from its `config.json` alone.
#[test]
fn a_card_that_is_not_there_is_planned_for() {
    let scratch = Scratch::new();
    let model = scratch.outline(2560, 36);
    let plan = |more: &[&str]| -> Value {
        let given = ["--json", "device=cuda", &model, "model.max_seq_length=2048"];
        let done = scratch.plan(&[&given, more].concat());
        assert!([0, 4].contains(&done.code), "{}", done.stderr);
        serde_json::from_str(&done.stdout).unwrap()
    };
    let peak = |json: &Value| json["plan"]["peak"].as_u64().unwrap();
    let dense = plan(&["--device-memory", "80GiB"]);
    assert_eq!(dense["fits"], true, "{dense}");
    let coded = plan(&["--device-memory", "80GiB", "model.load_in_4bit=true"]);
    assert!(peak(&coded) + (3 << 30) < peak(&dense), "{coded} {dense}");
    let offloaded = plan(&["--device-memory", "80GiB", "lora.use_gradient_checkpointing=\"unsloth\""]);
    assert!(offloaded["plan"]["host"].as_u64() > Some(0), "{offloaded}");
    assert!(peak(&offloaded) < peak(&dense));

    let small = plan(&["--device-memory", "8GiB"]);
    assert_eq!((&small["fits"], &small["changes_suffice"]), (&json!(false), &json!(true)), "{small}");
    let changes = small["changes"].as_array().unwrap();
    assert!(changes[0]["set"].as_str().unwrap().contains("unsloth"), "{small}");
}

/// Full fine-tuning divides the optimizer's state; the bytes sent are 2 · (N − 1)/N of the f32 gradients.
#[test]
fn several_gpus_divide_the_optimizer_state() {
    let scratch = Scratch::new();
    scratch.plan(&["--gpus", "2"]).fails(2, &["--gpus: the device of the run is cpu"]);
    let model = scratch.outline(1024, 2);
    let lora = ["device=cuda", &*model, "--device-memory", "80GiB", "--json"];
    let one = scratch.plan(&lora).json();
    assert_eq!(one.get("ranks"), None);
    let four = scratch.plan(&[&lora[..], &["--gpus", "4"]].concat()).json();
    assert_eq!(four["ranks"]["shard_optimizer"], false);
    let (whole, divided) = (&four["ranks"]["peak_whole_state"], &four["ranks"]["peak_divided_state"]);
    assert!(divided.as_u64() <= whole.as_u64(), "{four}");
    let state = one["plan"]["bytes"]["gradients"].as_u64().unwrap();
    let sent = four["ranks"]["bytes_per_step"].as_u64().unwrap();
    assert!(sent.abs_diff(state * 2 * 3 / 4) < 64, "{sent} bytes of {state}");

    let text = fs::read_to_string(scratch.path("run.toml")).unwrap();
    scratch.write("run.toml", text.replace("[lora]\nr = 2\n", ""));
    let full = ["model.full_finetuning=true", "device=cuda", &*model, "--device-memory", "80GiB", "--gpus", "4"];
    let json = scratch.plan(&[&full[..], &["--json"]].concat()).json();
    assert_eq!(json["ranks"]["shard_optimizer"], true, "{json}");
    let peak = |name: &str| json["ranks"][name].as_u64().unwrap();
    let values = peak("bytes_per_step") / 6;
    // Three quarters of the two f32 moments are elsewhere.
    let saved = peak("peak_whole_state") - peak("peak_divided_state");
    assert!(saved.abs_diff(6 * values) < values / 10, "{saved} of {values} values");
    assert_eq!(json["plan"]["peak"], json["ranks"]["peak_divided_state"]);
    let text = scratch.plan(&full).ok().stdout;
    assert!(text.contains("with 1/4 of it (shard_optimizer = true)") && text.contains("as this run does"), "{text}");
    assert!(text.contains("fits with everything on each GPU") && !text.contains("shard_base"), "{text}");
    let in_place = scratch.plan(&[&full[..], &["model.stochastic_rounding=true"]].concat()).ok().stdout;
    assert!(!in_place.contains("with 1/4"), "{in_place}");
}

/// A base that is too large for a GPU is divided among those of two machines.
#[test]
fn several_gpus_divide_the_base() {
    let scratch = Scratch::new();
    let model = scratch.outline(4096, 24);
    let job = ["device=cuda", &*model, "model.max_seq_length=64", "--gpus", "4", "--nodes", "2", "--device-memory"];
    let plan = |memory: &str, more: &[&str]| scratch.plan(&[&job[..], &[memory], more].concat());
    let roomy = plan("80GiB", &["--json"]).json();
    let ranks = &roomy["ranks"];
    assert_eq!(
        (&ranks["gpus"], &ranks["nodes"], &ranks["choice"]),
        (&json!(8), &json!(2), &json!("replicate")),
        "{roomy}"
    );
    let number = |name: &str| ranks[name].as_u64().unwrap();
    // q, k, v, o and the three linears of the feed-forward half, in bf16.
    let block = 2 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 3 * 4096 * 4096);
    let saved = number("peak_whole_state") - number("peak_divided_base");
    // Of 24 blocks a GPU holds an eighth, and one or two whole ones.
    let expected = 24 * block - 24 * block / 8;
    assert!(saved < expected && saved > expected - 3 * block, "{saved} of {expected} bytes");
    assert_eq!(number("gathered_bytes_per_step") % (2 * 24 * block / 8 * 7), 0);
    let memory = format!("{}", number("peak_divided_base") + (1 << 28));
    let tight = plan(&memory, &["--json"]);
    assert_eq!(
        serde_json::from_str::<Value>(&tight.stdout).unwrap()["ranks"]["choice"],
        "shard_base",
        "{}",
        tight.stdout
    );
    let text = plan(&memory, &[]).stdout;
    for part in ["8 GPUs on 2 machines", "1/8 of the frozen weights", "fits only with shard_base = true"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let least = plan("2GiB", &[]).stdout;
    assert!(least.contains("does not fit, whatever is divided"), "{least}");
}

#[test]
fn a_run_that_cannot_fit_does_not_start() {
    let scratch = Scratch::new();
    let model = scratch.outline(65_536, 200);
    let done = scratch.train(&[&model]);
    done.fails(4, &["the run needs ", "is available", "one after the other"]);
    assert!(!scratch.path("out").exists(), "nothing was written");
}

#[test]
fn auto_is_decided_once_and_written_down() {
    let scratch = Scratch::new();
    let done = scratch.train(&["lora.use_gradient_checkpointing=auto"]).ok();
    assert!(done.stderr.contains("use_gradient_checkpointing = \"auto\" is false"), "{}", done.stderr);
    assert!(done.stderr.contains("memory: peak "), "{}", done.stderr);
    let resolved = fs::read_to_string(scratch.path("out/run.toml")).unwrap();
    assert!(resolved.contains("use_gradient_checkpointing = false"), "{resolved}");
    let done = scratch.train(&["lora.use_gradient_checkpointing=often"]);
    done.fails(2, &["true, false, \"unsloth\" or \"auto\""]);
}
