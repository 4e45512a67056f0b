//! Tests of `from_pretrained`: an adapter in place of a model, resized vocabularies, and refused arguments.

use std::fs;
use std::path::Path;

use rekindle::engine::EngineConfig;
use rekindle::{
    DataSource, DeviceKind, Dtype, ErrorKind, FastLanguageModel, Loader, LoraConfig, Merge, Model, SftConfig,
    SftTrainer, Tokenizer,
};
use rekindle_tests::{Golden, read_json, tensors};
use serde_json::json;

const NO_TOKENIZER: Option<&Tokenizer> = None;
const EMBED: &str = "model.embed_tokens.weight";

fn loader(dir: &Path) -> Loader<'static> {
    FastLanguageModel::from_pretrained(dir).device(DeviceKind::Cpu).dtype(Dtype::F32).max_seq_length(128)
}

fn loss(model: &Model, golden: &Golden) -> f64 {
    let rows = DataSource::new(golden.dir.join("rows.jsonl"));
    model.evaluate(None, &rows, &mut |_| ()).expect("golden rows fit").loss
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

#[test]
fn an_adapter_path_loads_its_base_and_the_adapter() {
    let golden = Golden::open("qwen3-tied");
    let (out, rows) = (scratch(), DataSource::new(golden.dir.join("rows.jsonl")));
    let mut model = loader(&golden.dir).load_model().expect("a golden checkpoint loads");
    model = model.get_peft_model(LoraConfig::new(4)).expect("a valid configuration");
    let config = SftConfig { max_steps: Some(2), learning_rate: Some(1e-2), ..SftConfig::default() };
    SftTrainer::new(&mut model, NO_TOKENIZER, rows, config).train().expect("golden rows can be trained on");
    let adapter = out.path().join("adapter");
    model.save_pretrained(&adapter).expect("the disk has space");

    let again = loader(&adapter).load_model().expect("its base is named");
    assert_eq!(loss(&again, &golden), loss(&model, &golden));
    assert_eq!(again.path(), golden.dir);
    again.save_pretrained(out.path().join("again")).expect("the disk has space");
    let files =
        |dir: &Path| (read_json(&dir.join("adapter_config.json")), tensors(&dir.join("adapter_model.safetensors")));
    assert_eq!(files(&out.path().join("again")), files(&adapter));

    let error = loader(&adapter).full_finetuning(true).load_model().expect_err("an adapter cannot be fully fine-tuned");
    assert_eq!(error.kind(), ErrorKind::Configuration);
    assert!(error.to_string().contains(&golden.dir.display().to_string()), "{error}");
}

#[test]
fn the_tokenizer_of_an_adapter_takes_precedence_over_the_base() {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/quickstart/base");
    let load = |dir: &Path| FastLanguageModel::from_pretrained(dir).device(DeviceKind::Cpu).load();
    let (model, tokenizer) = load(&base).expect("the quickstart's base loads");
    let model = model.get_peft_model(LoraConfig::new(2)).expect("a valid configuration");
    let out = scratch();
    model.save_pretrained(out.path()).expect("the disk has space");
    fs::write(out.path().join("chat_template.jinja"), "another").expect("written");
    let rendered = |dir: &Path| {
        let (model, tokenizer) = load(dir).expect("an adapter loads");
        let again = scratch();
        model.save_pretrained(again.path()).expect("the disk has space");
        let template = fs::read_to_string(again.path().join("chat_template.jinja")).expect("it is saved too");
        (template, tokenizer.eos_ids().to_vec())
    };
    assert_eq!(rendered(out.path()), ("another".to_owned(), tokenizer.eos_ids().to_vec()));
    fs::remove_file(out.path().join("tokenizer.json")).expect("it was written");
    assert_ne!(rendered(out.path()).0, "another", "files of two tokenizers are not mixed");
}

#[test]
fn new_tokens_get_the_mean_of_the_old_ones() {
    for (name, tied) in [("qwen3-tied", true), ("qwen3-untied-sharded", false)] {
        let golden = Golden::open(name);
        let before = loader(&golden.dir).load_model().expect("a golden checkpoint loads");
        let (vocab, hidden) = (before.causal_lm().config().vocab_size(), before.causal_lm().config().hidden_size());
        let model = loader(&golden.dir).resize_model_vocab(vocab + 3).load_model().expect("rows can be added");
        // Three more logits slightly reduce every token's probability.
        let (was, is) = (loss(&before, &golden), loss(&model, &golden));
        assert!(was < is && is - was < 0.1, "{name}: {was} and {is}");

        // The table of a quantized model is dense like any other.
        let quantized = loader(&golden.dir).load_in_4bit(true).resize_model_vocab(vocab + 3).load_model();
        quantized.expect("rows can be added").save_pretrained(scratch().path()).expect("the disk has space");
        let full = loader(&golden.dir).full_finetuning(true).resize_model_vocab(vocab + 3);
        let out = scratch();
        full.load_model().expect("rows can be added").save_pretrained(out.path()).expect("the disk has space");
        assert_eq!(read_json(&out.path().join("config.json"))["vocab_size"], json!(vocab + 3));
        let written = tensors(&out.path().join("model.safetensors"));
        let heads: &[&str] = if tied { &[EMBED] } else { &[EMBED, "lm_head.weight"] };
        for head in heads {
            let (shape, values) = &written[*head];
            assert_eq!(shape, &[vocab + 3, hidden]);
            let (old, new) = values.split_at(vocab * hidden);
            for (column, value) in new.iter().enumerate() {
                let mean =
                    old.iter().skip(column % hidden).step_by(hidden).map(|v| f64::from(*v)).sum::<f64>() / vocab as f64;
                assert_eq!(*value, mean as f32, "{head} {column}");
            }
        }
        // The saved checkpoint has the new size and can be resized again.
        let shrunk = loader(out.path()).resize_model_vocab(vocab).load_model().expect("rows can be taken away");
        assert_eq!(loss(&shrunk, &golden), was, "{name}");
    }
}

#[test]
fn a_vocabulary_mismatch_is_reported() {
    let golden = Golden::open("qwen3-tied");
    let error = loader(&golden.dir).resize_model_vocab(0).load_model().expect_err("a vocabulary cannot be empty");
    assert_eq!(error.kind(), ErrorKind::Configuration);
    assert!(error.to_string().contains("resize_model_vocab is 0") && error.to_string().contains("131"), "{error}");

    let resized = || loader(&golden.dir).resize_model_vocab(140).load_model().expect("rows can be added");
    let lora = LoraConfig::new(2).modules_to_save(["embed_tokens"]);
    let model = resized().get_peft_model(lora).expect("a valid configuration");
    let out = scratch();
    model.save_pretrained(out.path()).expect("the disk has space");
    assert_eq!(loss(&resized().load_adapter(out.path()).expect("it fits"), &golden), loss(&model, &golden));
    // The adapter records the vocabulary size, whether it is loaded alone or onto a model.
    assert_eq!(loss(&loader(out.path()).load_model().expect("its base is named"), &golden), loss(&model, &golden));
    let beside =
        loader(&golden.dir).for_adapter(out.path()).load_model().and_then(|base| base.load_adapter(out.path()));
    assert_eq!(loss(&beside.expect("it fits"), &golden), loss(&model, &golden));
    let base = loader(&golden.dir).load_model().expect("a golden checkpoint loads");
    let error = base.load_adapter(out.path()).expect_err("131 rows are not 140").to_string();
    assert!(error.contains("trained with 140 token ids, but this model has 131"), "{error}");
    assert!(error.contains("resize_model_vocab = 140"), "{error}");
}

/// Merges from disk to disk, from a model to disk, and in memory.
#[test]
fn a_resized_vocabulary_is_merged() {
    for (name, saved) in [("qwen3-tied", "lm_head"), ("qwen3-untied-sharded", "embed_tokens")] {
        let golden = Golden::open(name);
        let rows = DataSource::new(golden.dir.join("rows.jsonl"));
        let resized = loader(&golden.dir).resize_model_vocab(140).load_model().expect("rows can be added");
        let lora = LoraConfig::new(2).modules_to_save([saved]);
        let mut model = resized.get_peft_model(lora).expect("a valid configuration");
        let config = SftConfig { max_steps: Some(2), learning_rate: Some(1e-2), ..SftConfig::default() };
        SftTrainer::new(&mut model, NO_TOKENIZER, rows, config).train().expect("golden rows can be trained on");
        let out = scratch();
        let (adapter, merged) = (out.path().join("adapter"), |number: u8| out.path().join(format!("merged-{number}")));
        model.save_pretrained(&adapter).expect("the disk has space");
        let merge = Merge::new(&adapter);
        merge.write(merged(0), &mut |_, _| ()).expect("the disk has space");
        let found = merge.verify(merged(0), DeviceKind::Cpu).expect("within the bound");
        println!("{name}: {found:?}");
        model.save_pretrained_merged(merged(1), Dtype::Auto).expect("the disk has space");
        let trained = loss(&model, &golden);
        model.merge_and_unload().expect("there is an adapter").save_pretrained(merged(2)).expect("the disk has space");
        for number in 0..3 {
            assert_eq!(read_json(&merged(number).join("config.json"))["vocab_size"], json!(140));
            let again = loss(&loader(&merged(number)).load_model().expect("it was just written"), &golden);
            assert!((again - trained).abs() <= 1e-5 * trained, "{name} {number}: {again} and {trained}");
        }
        // Without saved tables only the model records the vocabulary size.
        let plain = loader(&golden.dir).resize_model_vocab(140).load_model().expect("rows can be added");
        let plain = plain.get_peft_model(LoraConfig::new(2)).expect("a valid configuration");
        plain.save_pretrained_merged(merged(3), Dtype::Auto).expect("the disk has space");
        let again = loss(&loader(&merged(3)).load_model().expect("it was just written"), &golden);
        assert_eq!(again, loss(&plain, &golden), "B is zero");
    }
}

/// Every device has the engine, so that the argument changes nothing.
#[test]
fn fast_inference_needs_the_engine() {
    let golden = Golden::open("qwen3-tied");
    let [with, without] =
        [true, false].map(|on| loader(&golden.dir).fast_inference(on).load_model().expect("the CPU has the engine"));
    assert!(with.engine(EngineConfig::default()).is_ok());
    assert_eq!(loss(&with, &golden), loss(&without, &golden));
}
