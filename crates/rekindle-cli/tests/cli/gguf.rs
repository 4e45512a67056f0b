//! A GGUF file in the place of a model directory, in every command.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::run;

fn quickstart(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/quickstart").join(name).display().to_string()
}

#[test]
fn a_gguf_file_is_a_base_in_every_command() {
    let scratch = tempfile::tempdir().unwrap();
    let here = scratch.path().display();
    let base = quickstart("base");
    run(&format!("export gguf {base} --quant q8_0,f32 --out {here}/gguf --name small --split-max-size 2MB")).ok();
    let of = |start: &str| {
        let mut files: Vec<_> = fs::read_dir(scratch.path().join("gguf")).unwrap().map(|f| f.unwrap().path()).collect();
        files.retain(|path| path.file_name().unwrap().to_str().unwrap().starts_with(start));
        files.sort();
        files[0].display().to_string()
    };
    let (exact, small) = (of("small-F32-00001-of-"), of("small-Q8_0"));

    // The losses of the exact file are those of the checkpoint, and those of the other are near them.
    let rows = quickstart("heldout.jsonl");
    let loss = |model: &str, more: &str| {
        let line = run(&format!("eval --device cpu --json --model {model} --data {rows}{more}")).json();
        line["loss"].as_f64().unwrap()
    };
    let (stored, read, quantized) = (loss(&base, ""), loss(&exact, ""), loss(&small, ""));
    assert_eq!(stored, read);
    assert_eq!(read, loss(&of("small-F32-00002-of-"), ""), "any file of a split model stands for it");
    assert!((stored - quantized).abs() < 2e-2, "{stored} {quantized}");
    // Decoding while loading does not change the values.
    assert!((quantized - loss(&small, " --load-in-16bit")).abs() < 1e-5);

    let ask = |model: &str| {
        let line = format!("generate --device cpu --json --model {model} --chat whale --max-new-tokens 8");
        run(&line).json()["text"].as_str().unwrap().to_owned()
    };
    assert_eq!(ask(&base), ask(&exact));

    let train = quickstart("train.jsonl");
    let run_file = format!(
        "output_dir = \"{here}/out\"\ndevice = \"cpu\"\n[model]\nname_or_path = {small:?}\nmax_seq_length = 128\n\
         [lora]\nr = 4\n[data]\ntrain = {train:?}\neval = {rows:?}\n[train]\nmax_steps = 4\nlearning_rate = 8e-3\n"
    );
    fs::write(scratch.path().join("run.toml"), run_file).unwrap();
    let plan = run(&format!("plan {here}/run.toml --json")).json();
    assert!(plan["plan"]["bytes"]["weights"].as_u64().unwrap() > 0, "{plan}");
    run(&format!("train {here}/run.toml")).ok();
    let config = fs::read_to_string(scratch.path().join("out/adapter/adapter_config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["base_model_name_or_path"], small.as_str());
    assert!(scratch.path().join("out/adapter/tokenizer.json").is_file());

    // The adapter finds its base, and merged with it gives the same losses.
    let tuned = loss(&format!("{here}/out/adapter"), "");
    assert!(tuned < quantized - 0.1, "{tuned} {quantized}");
    run(&format!("merge {here}/out --out {here}/merged --dtype f32")).ok();
    assert!((loss(&format!("{here}/merged"), "") - tuned).abs() < 1e-4);
    assert!(!scratch.path().join("merged/gguf.json").exists());
    run(&format!("export gguf {here}/out --quant f32 --out {here}/again --name tuned")).ok();
    assert!((loss(&format!("{here}/again/tuned-F32.gguf"), "") - tuned).abs() < 1e-4);

    run(&format!("export gguf {here}/out --adapter-only --out {here}/lora --name tuned")).ok();
    let modelfile = fs::read_to_string(scratch.path().join("lora/Modelfile-adapter")).unwrap();
    let base = Path::new(&small).canonicalize().unwrap();
    let expected = format!("FROM {}\nADAPTER ./tuned-adapter-F16.gguf\nTEMPLATE", base.display());
    assert!(modelfile.starts_with(&expected), "{modelfile}");
    assert!(scratch.path().join("lora/tuned-adapter-F16.gguf").is_file());
    run(&format!("export gguf {here}/out --adapter-only --merge-adapters --out {here}/lora"))
        .fails(2, &["cannot be used"]);

    run(&format!("inspect {small}")).ok();
    run(&format!("quantize --model {exact} --to nf4 --out {here}/nf4")).ok();
    assert!((loss(&format!("{here}/nf4"), "") - stored).abs() < 0.5);
}

#[test]
fn a_damaged_gguf_file_is_an_error() {
    let scratch = tempfile::tempdir().unwrap();
    let here = scratch.path().display();
    run(&format!("export gguf {} --quant q8_0 --out {here} --name small", quickstart("base"))).ok();
    let whole = fs::read(scratch.path().join("small-Q8_0.gguf")).unwrap();
    for length in [0, 3, 23, 1000, whole.len() / 2, whole.len() - 1] {
        fs::write(scratch.path().join("cut.gguf"), &whole[..length]).unwrap();
        let done = run(&format!("eval --device cpu --model {here}/cut.gguf --data {}", quickstart("heldout.jsonl")));
        done.fails(1, &["cut.gguf", "is not a valid GGUF file"]);
    }
}
