use crate::{Dtype, LrSchedulerType, Overlong};

use super::*;

const LEAST: &str = "[model]\nname_or_path = \"m\"\n[lora]\n[data]\ntrain = \"t.jsonl\"\n";

fn parse(text: &str) -> Result<RunConfig, Vec<String>> {
    RunConfig::parse(text, "first", &[])
}

#[test]
fn the_least_file_has_every_default() {
    let config = parse(LEAST).unwrap();
    assert_eq!(config.output_dir, Path::new("outputs/first"));
    assert_eq!((config.seed, config.device.as_str()), (3407, "auto"));
    assert_eq!((config.model.dtype, config.model.full_finetuning, config.data.shuffle), (Dtype::Auto, false, true));
    assert_eq!(config.lora.unwrap().config, LoraConfig::default());
    assert_eq!(config.train, SftConfig::default());
}

#[test]
fn what_is_written_is_read_back() {
    let text = "output_dir = \"o\"\nseed = 5\ndevice = \"cpu\"\n[model]\nname_or_path = \"m\"\nmax_seq_length = 64\n\
                dtype = \"bf16\"\n[lora]\nr = 4\ntarget_modules = \"all-linear\"\ninit_from = \"a\"\n[data]\n\
                train = \"t.jsonl\"\neval = \"e.jsonl\"\nshuffle = false\noverlong = \"split\"\n[train]\nmax_steps = 3\n\
                lr_scheduler_type = \"cosine\"\nlearning_rate = 1e-3\neval_steps = 2\n";
    let config = parse(text).unwrap();
    let again = parse(&config.to_toml()).unwrap();
    assert_eq!(again.to_toml(), config.to_toml());
    let lora = again.lora.unwrap();
    assert_eq!((lora.config.r, lora.config.random_state), (4, 5), "the run's seed is the adapter's");
    assert_eq!(lora.init_from.as_deref(), Some(Path::new("a")));
    assert_eq!((again.train.lr_scheduler_type, again.train.max_steps), (LrSchedulerType::Cosine, Some(3)));
    assert_eq!((again.data.overlong, again.data.shuffle), (Overlong::Split, false));
}

#[test]
fn overrides_come_last_and_may_add_a_section() {
    let text = "[model]\nname_or_path = \"m\"\n[data]\ntrain = \"t.jsonl\"\n[train]\nmax_steps = 3\n";
    let overrides: Vec<ConfigOverride> =
        ["lora.r=2", "train.max_steps=9", "output_dir=x/y"].iter().map(|text| text.parse().unwrap()).collect();
    let config = RunConfig::parse(text, "first", &overrides).unwrap();
    assert_eq!((config.lora.unwrap().config.r, config.train.max_steps), (2, Some(9)));
    assert_eq!(config.output_dir, Path::new("x/y"));
}

#[test]
fn a_model_may_be_its_name_alone() {
    let text = LEAST.replace("[model]\nname_or_path = \"m\"", "model = \"org/model\"");
    assert_eq!(parse(&text).unwrap().model.name_or_path, Path::new("org/model"));
    let file = LEAST.replace("\"m\"", "\"m\"\nmax_seq_length = 64");
    let overrides = ["model=org/other".parse().unwrap(), "model.revision=v1".parse().unwrap()];
    for text in [&text, &file] {
        let model = RunConfig::parse(text, "first", &overrides).unwrap().model;
        assert_eq!((model.name_or_path.as_path(), model.revision.as_deref()), (Path::new("org/other"), Some("v1")));
        assert_eq!(model.max_seq_length, text.contains("64").then_some(64), "the rest of the section stays");
    }
}

#[test]
fn gradient_checkpointing_is_read_from_its_older_places() {
    use crate::GradientCheckpointing::{Auto, Block, Host, Off};
    let of = |text: &str, overrides: &[&str]| {
        let overrides: Vec<ConfigOverride> = overrides.iter().map(|text| text.parse().unwrap()).collect();
        RunConfig::parse(text, "first", &overrides).map(|config| config.train.use_gradient_checkpointing)
    };
    let in_lora = LEAST.replace("[lora]", "[lora]\nuse_gradient_checkpointing = \"unsloth\"");
    let in_model = LEAST.replace("[lora]", "use_gradient_checkpointing = \"auto\"\n[lora]");
    let in_train = format!("{LEAST}[train]\nuse_gradient_checkpointing = true\n");
    assert_eq!([&in_lora, &in_model, &in_train].map(|text| of(text, &[]).unwrap()), [Host, Auto, Block]);
    // An override counts wherever the file has the key.
    assert_eq!(of(&in_train, &["lora.use_gradient_checkpointing=false"]).unwrap(), Off);
    assert_eq!(of(&in_lora, &["train.use_gradient_checkpointing=true"]).unwrap(), Block);
    let twice = format!("{in_lora}[train]\nuse_gradient_checkpointing = \"unsloth\"\n");
    assert_eq!(of(&twice, &[]).unwrap(), Host);
    let problem = of(
        &twice
            .replace("[train]\nuse_gradient_checkpointing = \"unsloth\"", "[train]\nuse_gradient_checkpointing = true"),
        &[],
    );
    assert_eq!(
        problem.unwrap_err(),
        ["use_gradient_checkpointing is \"unsloth\" in [lora] and true elsewhere; keep one of them, in [train]"]
    );
    let written = RunConfig::parse(&in_lora, "first", &[]).unwrap().to_toml();
    assert!(written.contains("[train]") && written.matches("use_gradient_checkpointing").count() == 1, "{written}");
}

#[test]
fn a_configuration_can_be_built_without_a_file() {
    let config = RunConfig {
        model: ModelArguments::new("org/model"),
        lora: Some(LoraConfig::new(4).into()),
        data: DataArguments::new("t.jsonl"),
        ..RunConfig::default()
    };
    config.check().unwrap();
    assert_eq!(RunConfig::from_toml(&config.to_toml(), &[]).unwrap().to_toml(), config.to_toml());
    let broken = RunConfig { device: "gpu".to_owned(), lora: None, ..config };
    let error = broken.check().unwrap_err().to_string();
    assert!(error.contains("device \"gpu\" is unknown") && error.contains("nothing to train"), "{error}");
}

#[test]
fn a_token_is_read_and_not_written() {
    let config = parse(&LEAST.replace("\"m\"", "\"m\"\ntoken = \"hf_secret\"")).unwrap();
    assert_eq!(config.model.token.as_ref().map(|token| token.as_str()), Some("hf_secret"));
    assert!(!format!("{config:?}").contains("hf_secret"), "{config:?}");
    assert!(!config.to_toml().contains("hf_secret"), "{}", config.to_toml());
}

#[test]
fn what_other_programs_take_is_explained() {
    let text = LEAST.replace(
        "\"m\"",
        "\"m\"\ntrust_remote_code = true\ndevice_map = \"auto\"\ngpu_memory_utilization = 0.9\nrandom_state = 1",
    );
    assert_eq!(
        parse(&text).unwrap_err(),
        [
            "[model] key \"device_map\" is unknown; a model is on one device; write device at the top of the file",
            "[model] key \"gpu_memory_utilization\" is unknown; memory is allocated on demand; nothing is reserved for \
             an engine",
            "[model] key \"random_state\" is unknown; random_state belongs in [lora]",
            "[model] key \"trust_remote_code\" is unknown; code in a checkpoint is never run; unknown architectures \
             are refused",
        ]
    );
    let config = parse(&LEAST.replace("\"m\"", "\"m\"\nfast_inference = true")).unwrap();
    assert!(config.model.fast_inference && config.to_toml().contains("fast_inference = true"));
}

#[test]
fn neither_or_both_ways_of_training_are_errors() {
    let neither = parse("[model]\nname_or_path = \"m\"\n[data]\ntrain = \"t.jsonl\"\n").unwrap_err();
    assert!(neither[0].contains("[lora]") && neither[0].contains("full_finetuning = true"), "{neither:?}");
    let both = parse(&LEAST.replace("\"m\"", "\"m\"\nfull_finetuning = true")).unwrap_err();
    assert!(both[0].contains("exclude each other"), "{both:?}");
    let full = "[model]\nname_or_path = \"m\"\nfull_finetuning = true\n[data]\ntrain = \"t.jsonl\"\n";
    assert!(parse(full).unwrap().lora.is_none());
}

#[test]
fn all_problems_are_listed() {
    let text =
        "devise = \"cpu\"\nlora = 3\n[model]\nfull_finetunning = true\ntrain = \"t\"\n[trian]\n[data]\nsuffle = 1\n";
    assert_eq!(
        parse(text).unwrap_err(),
        [
            "key \"devise\" is unknown; nearest: \"device\"",
            "key \"lora\" = 3: expected a section",
            "key \"trian\" is unknown; nearest: \"train\"",
            "[model] key \"full_finetunning\" is unknown; nearest: \"full_finetuning\"",
            "[model] key \"train\" is unknown; train belongs in [data]",
            "[data] key \"suffle\" is unknown; nearest: \"shuffle\"",
        ]
    );
}

#[test]
fn what_is_missing_or_out_of_range_is_named() {
    let text = "device = \"gpu\"\n[lora]\nr = 0\n[train]\nlogging_steps = 0\neval_steps = 5\neval_samples = 1\nlr_scheduler_type = \"constant\"\nwarmup_steps = 3\n";
    let problems = parse(text).unwrap_err().join("\n");
    for part in [
        "[model] name_or_path is missing",
        "[data] train is missing",
        "device \"gpu\" is unknown",
        "[lora] r is 0",
        "[train] logging_steps is 0",
        "eval_steps needs evaluation rows",
        "eval_samples takes its prompts",
        "\"constant\" has no warm-up",
    ] {
        assert!(problems.contains(part), "{part}: {problems}");
    }
}

#[test]
fn broken_toml_names_the_line() {
    let problem = parse("seed = 1\ndevice = \n").unwrap_err().join("");
    assert!(problem.contains("line 2"), "{problem}");
}
