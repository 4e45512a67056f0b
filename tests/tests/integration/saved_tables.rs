//! Adapters that bring their base's embedding table and head along, against PEFT: `goldens/saved-tables`.

use std::path::PathBuf;

use rekindle::{FastLanguageModel, Merge};
use rekindle_hub::Dtype;
use rekindle_kernels::DType;
use rekindle_kernels::DeviceKind;
use rekindle_lora::{Adapter, Combination, LoraConfig, saved_rows, weighted};
use rekindle_models::{Batch, CausalLm};
use rekindle_tests::{Golden, RowLosses, assert_nll, goldens, read_json, tensors, worst_nll};
use serde_json::Value;

const BASES: [&str; 2] = ["qwen3-tied", "llama3"];

/// One of PEFT's adapters, and what PEFT makes of it.
struct Case {
    base: &'static str,
    name: String,
    dir: PathBuf,
    expect: Value,
    batch: Batch,
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for base in BASES {
        let dir = goldens().join("saved-tables").join(base);
        for (name, expect) in read_json(&dir.join("expect.json")).as_object().expect("adapters by name") {
            let ids = |row: &Value| -> Vec<u32> { serde_json::from_value(row["input_ids"].clone()).expect("ids") };
            let labels = |row: &Value| -> Vec<i32> { serde_json::from_value(row["labels"].clone()).expect("labels") };
            let rows = expect["rows"].as_array().expect("rows");
            let rows: Vec<_> = rows.iter().map(|row| (ids(row), labels(row))).collect();
            let batch = Batch::from_rows(rows.iter().map(|(ids, labels)| (&**ids, &**labels)), 0);
            cases.push(Case { base, name: name.clone(), dir: dir.join(name), expect: expect.clone(), batch });
        }
    }
    assert_eq!(cases.len(), 9, "adapters that make.py lists");
    cases
}

impl Case {
    /// The base with as many rows as the adapter's tables have.
    fn base(&self) -> CausalLm {
        let rows = saved_rows(&self.dir).expect("readable");
        Golden::open(self.base).load_with(|options| options.resize_model_vocab = rows)
    }

    fn check(&self, what: &str, model: &CausalLm, key: &str) {
        let what = format!("{}/{}, {what}", self.base, self.name);
        let (nll, want) = (self.nll(model), RowLosses::list(&self.expect[key]));
        println!("{what}: off by {:.1e}", worst_nll(&self.batch, &nll, &want));
        assert_nll(&what, &self.batch, &nll, &want);
    }

    fn nll(&self, model: &CausalLm) -> Vec<f32> {
        model.nll(&self.batch).expect("the rows fit")
    }
}

#[test]
fn tables_replace_those_of_the_base_as_in_peft() {
    for case in cases() {
        let mut model = case.base();
        let bare = case.nll(&model);
        model.load_adapter(&case.dir).expect("PEFT's adapter loads");
        case.check("loaded", &model, "losses");
        assert!(!model.adapter_changes_nothing());
        let adapted = case.nll(&model);
        let trained = model.params().numel();

        model.disable_adapter().expect("the device works");
        assert!(case.nll(&model) == bare, "{}: the base's own tables are back", case.name);
        model.set_adapter("default").expect("it waits");
        assert!(case.nll(&model) == adapted && model.params().numel() == trained, "{}: bit for bit", case.name);

        let dir = tempfile::tempdir().expect("a temporary directory");
        model.adapter().expect("one is on it").save(dir.path()).expect("saved");
        let mut again = case.base();
        again.load_adapter(dir.path()).expect("what was saved loads");
        assert!(case.nll(&again) == adapted, "{}: saved and loaded again", case.name);

        model.merge_and_unload().expect("the device works");
        case.check("merged in memory", &model, "merged");
    }
}

#[test]
fn tables_are_not_trained() {
    for case in cases().into_iter().filter(|case| case.name != "beside-saved-embed") {
        let mut model = case.base();
        model.load_adapter(&case.dir).expect("PEFT's adapter loads");
        let factors = model.adapter().expect("one is on it").factors;
        let scalars: usize = factors.values().map(|factors| factors.a.len() + factors.b.len()).sum();
        assert_eq!(model.params().numel(), scalars, "{}", case.name);
    }
}

#[test]
fn merged_files_have_the_tables_and_their_rows() {
    for case in cases() {
        let out = tempfile::tempdir().expect("a temporary directory");
        let merge = Merge::new(&case.dir).base(goldens().join(case.base));
        merge.write(out.path().join("merged"), &mut |_, _| ()).expect("merged");
        let found = merge.verify(out.path().join("merged"), DeviceKind::Cpu).expect("within the bound");
        println!("{}/{}: {found:?}", case.base, case.name);
        let loader = FastLanguageModel::from_pretrained(out.path().join("merged")).device(DeviceKind::Cpu);
        let model = loader.load_model().expect("the merged model loads");
        case.check("merged", model.causal_lm(), "merged");
        let rows = saved_rows(&case.dir).expect("readable").expect("it has tables");
        assert_eq!(model.causal_lm().config().vocab_size(), rows);
    }
}

/// The rows that an adapter was trained with are in its files, so that every program reads it as it was trained.
#[test]
fn an_adapter_on_a_resized_base_carries_the_tables() {
    for (base, tables) in [("qwen3-tied", &["model.embed_tokens"][..]), ("llama3", &["lm_head", "model.embed_tokens"])]
    {
        let golden = Golden::open(base);
        let rows = golden.load().config().vocab_size() + 3;
        let resized = || golden.load_with(|options| options.resize_model_vocab = Some(rows));
        let mut model = resized();
        let lora = LoraConfig::new(2).target_modules(["q_proj"]);
        model.add_adapter(&lora).expect("valid");
        let mut carried = model.carried_tables();
        carried.sort_unstable();
        assert_eq!(carried, tables);
        assert!(model.adapter_changes_nothing(), "the tables are the base's");

        let dir = tempfile::tempdir().expect("a temporary directory");
        model.adapter().expect("one is on it").save(dir.path()).expect("saved");
        let stored = tensors(&dir.path().join("adapter_model.safetensors"));
        let key = |name: &str| format!("base_model.model.{name}.weight");
        for name in tables {
            assert_eq!(stored[&key(name)].0[0], rows, "{base}: {name}");
        }
        assert_eq!(stored.keys().filter(|key| !key.contains(".lora_")).count(), tables.len());
        assert_eq!(saved_rows(dir.path()).expect("readable"), Some(rows));

        let ids = [1, rows as u32 - 1, 2];
        let batch = Batch::from_rows([(&ids[..], &ids.map(|id| id as i32)[..])], 0);
        let want = model.nll(&batch).expect("the new rows are there");
        let loader = FastLanguageModel::from_pretrained(&golden.dir).device(DeviceKind::Cpu).for_adapter(dir.path());
        let again = loader.load_model().expect("the base loads").load_adapter(dir.path()).expect("the adapter loads");
        assert!(again.causal_lm().nll(&batch).expect("the new rows came along") == want, "{base}");
        assert!(
            golden
                .load()
                .nll(&batch)
                .expect_err("beyond the vocabulary")
                .to_string()
                .contains(&format!("load the model with resize_model_vocab = {rows}"))
        );

        // What is trained whole is not carried as well; a tied head that it leaves behind is.
        for (saved, expected) in [
            (&["embed_tokens"][..], &["lm_head"][..]),
            (&["lm_head"], &["model.embed_tokens"]),
            (&["embed_tokens", "lm_head"], &[]),
        ] {
            let mut model = resized();
            let mut lora = lora.clone().modules_to_save(saved.iter().copied());
            lora.ensure_weight_tying = true;
            if model.config().tie_word_embeddings() {
                model.add_adapter(&lora).expect("valid");
                assert!(model.carried_tables().is_empty(), "{base}: {saved:?} is both");
            }
            lora.ensure_weight_tying = false;
            model.add_adapter(&lora).expect("valid");
            assert_eq!(model.carried_tables(), expected, "{base}: {saved:?}");
            let held = model.adapter().expect("one is on it");
            let dir = tempfile::tempdir().expect("a temporary directory");
            held.save(dir.path()).expect("saved");
            let loaded = Adapter::load(dir.path(), &model.modules()).expect("it loads");
            assert_eq!((loaded.tables, loaded.saved), (held.tables, held.saved), "{base}: {saved:?}");
        }
        let mut plain = golden.load();
        plain.add_adapter(&lora).expect("valid");
        assert!(plain.carried_tables().is_empty(), "{base}: nothing was resized");
    }
}

#[test]
fn tables_are_written_in_the_dtype_that_they_are_computed_in() {
    let mut model = Golden::open("qwen3-tied").load_with(|options| {
        options.dtype = DType::BF16;
        options.resize_model_vocab = Some(140);
    });
    model.add_adapter(&LoraConfig::new(2)).expect("valid");
    let adapter = model.adapter().expect("one is on it");
    assert_eq!(adapter.tables["model.embed_tokens"].dtype, Dtype::BF16);
    let dir = tempfile::tempdir().expect("a temporary directory");
    adapter.save(dir.path()).expect("saved");
    assert_eq!(Adapter::load(dir.path(), &model.modules()).expect("it loads").tables, adapter.tables);
}

#[test]
fn adapters_with_different_tables_are_not_added_up() {
    let cases = cases();
    let load = |name: &str| {
        let case = cases.iter().find(|case| case.base == "llama3" && case.name == name).expect("a golden");
        Adapter::load(&case.dir, &case.base().modules()).expect("it loads")
    };
    let modules = Golden::open("llama3").load().modules();
    let (embed, head) = (load("embed-alone"), load("head-alone"));
    let mut bare = embed.clone();
    bare.tables.clear();
    let error =
        weighted(&[("a", &embed, 1.0), ("b", &head, 1.0)], Combination::Cat, &modules).expect_err("they differ");
    assert!(error.to_string().contains("adapters \"a\" and \"b\" have different embedding tables"), "{error}");
    let both = weighted(&[("a", &bare, 1.0), ("b", &embed, 0.5)], Combination::Cat, &modules).expect("one has tables");
    assert_eq!(both.tables, embed.tables);
}
