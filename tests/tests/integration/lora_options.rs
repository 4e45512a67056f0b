//! Compares every LoRA option with PEFT: losses of its adapters, saved files, merges, and optimizer steps.

use std::path::PathBuf;

use rekindle_hub::{Checkpoint, Dtype};
use rekindle_lora::LoraConfig;
use rekindle_models::{CausalLm, LoadIn, MergeOptions, merge};
use rekindle_tests::{Golden, RowLosses, Trajectory, assert_nll, goldens, read_json, tensors, worst_nll};
use serde_json::Value;

/// A base model with the adapters that PEFT created for it.
struct Options {
    base: Golden,
    dir: PathBuf,
    expect: Value,
}

impl Options {
    fn open(base: &str) -> Self {
        let dir = goldens().join("lora-options").join(base);
        Self { base: Golden::open(base), expect: read_json(&dir.join("expect.json")), dir }
    }

    fn all() -> impl Iterator<Item = Self> {
        ["qwen3-tied", "qwen2", "llama3", "llama-bias"].into_iter().map(Self::open)
    }

    fn adapters(&self) -> Vec<String> {
        self.expect["adapters"].as_object().expect("adapters by name").keys().cloned().collect()
    }

    fn path(&self, adapter: &str) -> PathBuf {
        self.dir.join("adapters").join(adapter)
    }

    fn with(&self, adapter: &str) -> CausalLm {
        let mut model = self.base.load();
        model.load_adapter(&self.path(adapter)).unwrap_or_else(|error| panic!("{adapter}: {error}"));
        model
    }

    fn check(&self, what: &str, model: &CausalLm, rows: &Value) {
        let batch = self.base.packed();
        let nll = model.nll(&batch).expect("golden rows fit");
        let expected = RowLosses::list(rows);
        println!("{}/{what}: off by {:.1e}", self.base.name, worst_nll(&batch, &nll, &expected));
        assert_nll(&format!("{}/{what}", self.base.name), &batch, &nll, &expected);
    }
}

/// Adapters on other modules than the linears of the blocks, and the resulting errors.
const REFUSED: [(&str, &str); 3] = [
    ("save-norms", "modules_to_save \"norm\" is not a module that can be saved"),
    ("target-lm-head", "lm_head.lora_A.weight\" matches no adapted module"),
    ("target-embed-tokens", "embed_tokens.lora_embedding_A\" matches no adapted module"),
];

fn is_refused(adapter: &str) -> bool {
    REFUSED.iter().any(|(name, _)| *name == adapter)
}

#[test]
fn every_option_gives_the_losses_of_peft() {
    let mut seen = 0;
    for options in Options::all() {
        for adapter in options.adapters().iter().filter(|adapter| !is_refused(adapter)) {
            options.check(adapter, &options.with(adapter), &options.expect["adapters"][adapter]["rows"]);
            seen += 1;
        }
    }
    assert_eq!(seen, 28, "supported adapters in expect.json");
}

#[test]
fn unsupported_adapters_are_named() {
    let options = Options::open("llama3");
    for (adapter, message) in REFUSED {
        let error = options.base.load().load_adapter(&options.path(adapter)).expect_err(adapter).to_string();
        assert!(error.contains(message), "{adapter}: {error}");
    }
}

/// Saving an adapter that PEFT wrote gives the same tensors.
#[test]
fn loaded_adapters_are_saved_unchanged() {
    for options in Options::all() {
        for adapter in options.adapters().iter().filter(|adapter| !is_refused(adapter)) {
            let out = tempfile::tempdir().expect("a temporary directory");
            let model = options.with(adapter);
            model.adapter().expect("just loaded").save(out.path()).expect("the disk has space");
            let file = |dir: &std::path::Path| tensors(&dir.join("adapter_model.safetensors"));
            assert_eq!(file(out.path()), file(&options.path(adapter)), "{adapter}");
            let config = |dir: &std::path::Path| read_json(&dir.join("adapter_config.json"));
            assert_eq!(config(out.path()), config(&options.path(adapter)), "{adapter}");
        }
    }
}

#[test]
fn removing_an_adapter_restores_the_base() {
    for options in Options::all() {
        let batch = options.base.packed();
        let losses = |model: &CausalLm| model.nll(&batch).expect("golden rows fit");
        let base = losses(&options.base.load());
        for adapter in options.adapters().iter().filter(|adapter| !is_refused(adapter)) {
            let mut model = options.with(adapter);
            assert_ne!(losses(&model), base, "{adapter}");
            model.remove_adapter();
            assert_eq!(losses(&model), base, "{adapter}");
        }
    }
}

/// Merging rounds once more; PEFT's own merges are up to 1.4e-6 from its unmerged losses.
#[test]
fn a_merged_model_gives_the_losses_of_the_unmerged_one() {
    for options in Options::all() {
        for adapter in options.adapters().iter().filter(|adapter| !is_refused(adapter)) {
            let rows = &options.expect["adapters"][adapter]["merged"]["rows"];
            let mut model = options.with(adapter);
            let loaded = model.adapter().expect("just loaded");
            model.merge_and_unload().expect("the CPU has enough memory");
            assert!(model.adapter().is_none());
            options.check(&format!("{adapter} merged"), &model, rows);
            // The same for merging from disk to disk, and for the model in memory.
            let (out, saved) = (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
            let checkpoint = Checkpoint::open(&options.base.dir).expect("a golden checkpoint opens");
            merge(&checkpoint, &loaded, MergeOptions::default(), out.path(), &mut |_| ()).expect("the disk has space");
            model.save(saved.path(), Dtype::F32).expect("the disk has space");
            for dir in [out.path(), saved.path()] {
                let golden = Golden { dir: dir.to_owned(), ..Golden::open(&options.base.name) };
                options.check(&format!("{adapter} merged on disk"), &golden.load(), rows);
            }
        }
    }
}

#[test]
fn adapters_merge_onto_dequantized_weights() {
    let golden = Golden::open("quantized/qwen3-tied-nf4-double");
    let batch = golden.packed();
    let mut model = golden.load_adapted("all-linear");
    let adapter = model.adapter().expect("just loaded");
    let out = tempfile::tempdir().expect("a temporary directory");
    let checkpoint = Checkpoint::open(&golden.dir).expect("a golden checkpoint opens");
    merge(&checkpoint, &adapter, MergeOptions::default(), out.path(), &mut |_| ()).expect("the disk has space");
    let merged = Golden { dir: out.path().to_owned(), ..Golden::open("quantized/qwen3-tied-nf4-double") };
    for model in [merged.load(), {
        model.merge_and_unload().expect("the CPU has enough memory");
        model
    }] {
        let nll = model.nll(&batch).expect("golden rows fit");
        assert_nll("merged onto dequantized weights", &batch, &nll, &golden.adapter_losses("all-linear"));
        assert!(model.memory_report().bits_per_quantized_weight().is_none(), "the result is dense");
    }
}

#[test]
fn every_option_works_over_quantized_weights() {
    let batch = Golden::open("llama-bias").packed();
    let config = || LoraConfig::new(3).lora_alpha(6.0).target_modules("all-linear");
    let configs = [
        config().use_dora(true),
        config().bias(rekindle_lora::Bias::All),
        config().modules_to_save(["embed_tokens", "lm_head"]),
        config().rank_pattern([("q_proj", 1), ("up_proj", 5)]).alpha_pattern([("q_proj", 4.0)]),
        config().use_rslora(true).exclude_modules(["down_proj"]).finetune_last_n_layers(1),
    ];
    for load_in in [LoadIn::FourBit(None), LoadIn::EightBit] {
        let base = Golden::open("llama-bias").load_with(|options| options.load_in = Some(load_in));
        let expected = base.nll(&batch).expect("golden rows fit");
        for config in &configs {
            let mut model = Golden::open("llama-bias").load_with(|options| options.load_in = Some(load_in));
            model.add_adapter(config).expect("a valid configuration");
            // B is zero, so a new adapter changes nothing except that DoRA's magnitudes are rounded once.
            for (got, want) in model.nll(&batch).expect("golden rows fit").iter().zip(&expected) {
                assert!((got - want).abs() <= 3e-6 * want.abs().max(1.0), "{config:?}: {got}, not {want}");
            }
            let mut grads = model.params().zero_grads();
            model.forward_backward(&batch, 1.0, &mut grads, None).expect("golden rows fit").sum();
            assert!(grads.norm() > 0.0);
        }
    }
}

#[test]
fn optimizer_steps_equal_those_of_peft() {
    for (base, run) in [
        ("qwen3-tied", "rslora"),
        ("qwen3-tied", "dora"),
        ("qwen3-tied", "patterns"),
        ("qwen3-tied", "save-embed-tokens-ensure-tying"),
        ("qwen2", "bias-all"),
        ("llama-bias", "bias-all"),
        ("llama-bias", "bias-lora-only"),
        ("llama-bias", "dora-bias-all"),
        ("llama3", "save-lm-head"),
        ("llama3", "save-embed-tokens"),
        ("llama3", "save-both"),
    ] {
        let options = Options::open(base);
        let trajectory = Trajectory::open(&options.dir.join("train").join(run));
        let mut model = options.with(trajectory.adapter().expect("an adapter is trained"));
        trajectory.check(&format!("{base}/{run}"), &options.base, &mut model, "adapter_model.safetensors");
    }
}
