use super::*;

/// Written by PEFT 0.21.2: `get_peft_model(LlamaForCausalLM(…), LoraConfig(task_type="CAUSAL_LM", r=4,
/// lora_alpha=8, target_modules=["q_proj", "down_proj"])).save_pretrained(…)`.
const WRITTEN_BY_PEFT: &str = r#"{
  "alora_invocation_tokens": null,
  "alpha_pattern": {},
  "arrow_config": null,
  "auto_mapping": null,
  "base_model_name_or_path": null,
  "bias": "none",
  "corda_config": null,
  "ensure_weight_tying": false,
  "eva_config": null,
  "exclude_modules": null,
  "fan_in_fan_out": false,
  "inference_mode": true,
  "init_lora_weights": true,
  "kasa_config": null,
  "layer_replication": null,
  "layers_pattern": null,
  "layers_to_transform": null,
  "loftq_config": {},
  "lora_alpha": 8,
  "lora_bias": false,
  "lora_dropout": 0.0,
  "lora_ga_config": null,
  "megatron_config": null,
  "megatron_core": "megatron.core",
  "modules_to_save": null,
  "monteclora_config": null,
  "peft_type": "LORA",
  "peft_version": "0.21.2",
  "qalora_group_size": 16,
  "r": 4,
  "rank_pattern": {},
  "revision": null,
  "target_modules": [
    "q_proj",
    "down_proj"
  ],
  "target_parameters": null,
  "task_type": "CAUSAL_LM",
  "trainable_token_indices": null,
  "use_bdlora": null,
  "use_dora": false,
  "use_qalora": false,
  "use_rslora": false,
  "velora_config": null
}"#;

fn with(changes: Value) -> Result<AdapterConfig, Error> {
    let mut fields: Map<String, Value> = serde_json::from_str(WRITTEN_BY_PEFT).expect("JSON");
    fields.extend(changes.as_object().expect("an object").clone());
    AdapterConfig::from_json(&Value::Object(fields).to_string())
}

fn message(changes: Value) -> String {
    with(changes).expect_err("the file must be refused").to_string()
}

#[test]
fn a_file_by_peft_is_read_and_written_back_byte_for_byte() {
    let config = AdapterConfig::from_json(WRITTEN_BY_PEFT).expect("valid");
    let expected = LoraConfig::new(4).lora_alpha(8.0).target_modules(["q_proj", "down_proj"]);
    assert_eq!(config.lora(), &expected);
    assert_eq!(config.unknown_fields(), Vec::<&str>::new());
    assert_eq!(config.to_json(), WRITTEN_BY_PEFT);
}

#[test]
fn a_new_file_has_the_values_that_peft_writes() {
    let lora = LoraConfig::new(4).lora_alpha(8.0).target_modules(["q_proj", "down_proj"]);
    let ours = AdapterConfig::new(&lora, None, &[]).fields;
    let theirs: Map<String, Value> = serde_json::from_str(WRITTEN_BY_PEFT).expect("JSON");
    for (key, value) in &ours {
        assert_eq!(Some(value), theirs.get(key), "{key}");
    }
    // What is left out must be off, so that PEFT's default stands for it.
    let left_out = theirs.iter().filter(|(key, value)| !ours.contains_key(*key) && is_set(value));
    let left_out: Vec<&str> = left_out.map(|(key, _)| key.as_str()).collect();
    assert_eq!(left_out, ["megatron_core", "peft_version", "qalora_group_size"]);
}

#[test]
fn a_new_file_reads_back_as_it_was() {
    let lora = LoraConfig::new(8).lora_alpha(12.5).use_rslora(true).lora_dropout(0.1).target_modules(["q_proj"]);
    let lora = lora.layers_to_transform([1, 2]).init_lora_weights(InitLoraWeights::Gaussian);
    let config = AdapterConfig::new(&lora, Some("Qwen/Qwen3-0.6B"), &[]);
    let again = AdapterConfig::from_json(&config.to_json()).expect("valid");
    assert_eq!(again.lora(), &lora);
    assert_eq!(again.base_model_name_or_path(), Some("Qwen/Qwen3-0.6B"));
}

#[test]
fn all_linear_is_written_as_a_list() {
    let modules = ["model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"];
    let lora = LoraConfig::new(4).target_modules("all-linear");
    let config = AdapterConfig::new(&lora, None, &modules.map(str::to_owned));
    assert_eq!(config.lora().target_modules, ["q_proj", "up_proj"].into());
    assert_eq!(config.fields["target_modules"], json!(["q_proj", "up_proj"]));
}

#[test]
fn an_adapter_of_a_reward_model_saves_its_score() {
    let lora = LoraConfig::new(4).modules_to_save(["score"]);
    let config = AdapterConfig::new(&lora, None, &["model.layers.0.mlp.up_proj".to_owned()]);
    assert!(config.is_reward_model());
    assert_eq!(
        (&config.fields["task_type"], &config.fields["modules_to_save"]),
        (&json!("SEQ_CLS"), &json!(["score"]))
    );
    // As PEFT 0.21 writes it.
    let text = json!({"peft_type": "LORA", "task_type": "SEQ_CLS", "target_modules": ["q_proj"],
                      "modules_to_save": ["score", "classifier", "score"]});
    let config = AdapterConfig::from_json(&text.to_string()).unwrap();
    assert_eq!(config.lora().modules_to_save, ["score"]);
}

#[test]
fn every_unsupported_field_is_listed() {
    let text = message(json!({
        "use_qalora": true, "bias": "some", "rank_pattern": { "q_proj": "8" },
        "task_type": "TOKEN_CLS", "init_lora_weights": "pissa_niter_16", "r": "4",
        "target_modules": ".*q_proj", "layers_to_transform": 0
    }));
    for part in [
        "use_qalora = true is not supported",
        "layers_to_transform needs target_modules to be a list",
        "bias \"some\" is unknown; use \"none\", \"all\" or \"lora_only\"",
        "rank_pattern is {\"q_proj\":\"8\"}; expected ranks by name",
        "task_type = \"TOKEN_CLS\" is not supported",
        "init_lora_weights = \"pissa_niter_16\" changes the base weights",
        "r is \"4\"; expected a rank of at least 1",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
}

#[test]
fn patterns_that_mean_nothing_are_refused() {
    let text = message(json!({
        "rank_pattern": { "q_proj(?=x)": 4, "v_proj": 0 }, "alpha_pattern": { "[": 4.0 }
    }));
    for part in [
        "rank_pattern key \"q_proj(?=x)\" is not a regular expression without look-around",
        "rank_pattern \"v_proj\" is 0; expected a rank of at least 1",
        "alpha_pattern key \"[\" is not a regular expression",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
}

#[test]
fn each_unsupported_field_is_refused_alone_and_accepted_when_empty() {
    for key in UNSUPPORTED {
        let text = message(json!({ key: { "x": 1 } }));
        assert_eq!(text, format!("adapter_config.json: {key} = {{\"x\":1}} is not supported"));
        assert!(with(json!({ key: [] })).is_ok(), "{key}");
    }
}

#[test]
fn initializations_that_leave_the_base_alone_are_kept() {
    for name in ["eva", "orthogonal", "mica"] {
        let config = with(json!({ "init_lora_weights": name })).expect("valid");
        assert_eq!(config.fields["init_lora_weights"], name);
    }
}

#[test]
fn unknown_fields_are_kept_and_named() {
    let config = with(json!({ "from_the_future": { "a": 1 }, "off": false })).expect("valid");
    assert_eq!(config.unknown_fields(), ["from_the_future"]);
    assert!(config.to_json().contains("\"from_the_future\": {\n    \"a\": 1\n  }"));
}

#[test]
fn absent_fields_have_pefts_defaults() {
    let config = AdapterConfig::from_json(r#"{"peft_type": "LORA", "target_modules": "all-linear"}"#);
    let config = config.expect("valid");
    assert_eq!((config.lora().r, config.lora().lora_alpha), (8, 8.0));
    assert_eq!(config.lora().target_modules, TargetModules::AllLinear);
    let text = AdapterConfig::from_json("{}").expect_err("empty").to_string();
    assert_eq!(text, "adapter_config.json: peft_type is missing; target_modules is missing");
    let text = AdapterConfig::from_json("[").expect_err("malformed").to_string();
    assert!(text.starts_with("adapter_config.json: not a JSON object: "), "{text}");
}
