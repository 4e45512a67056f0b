//! Errors of quantizing with their exit codes, and files that it never overwrites.

use std::fs;
use std::path::Path;

use crate::{Scratch, golden, run};

#[test]
fn arguments_that_contradict_are_2() {
    let (model, rows) = (golden("qwen3-tied"), golden("qwen3-tied/rows.jsonl"));
    let line = format!("eval --device cpu --model {} --data {}", model.display(), rows.display());
    for (flags, parts) in [
        ("--load-in-4bit --load-in-8bit", ["load_in_4bit and load_in_8bit", "exclude each other"]),
        ("--load-in-8bit --load-in-fp8", ["load_in_8bit and load_in_fp8", "exclude each other"]),
        ("--load-in-fp8 --quant-type fp4", ["quant_type", "apply only with load_in_4bit"]),
        ("--load-in-4bit --load-in-16bit", ["load_in_4bit and load_in_16bit", "exclude each other"]),
        ("--quant-type fp4", ["quant_type", "apply only with load_in_4bit"]),
        ("--load-in-8bit --blocksize 64", ["blocksize", "apply only with load_in_4bit"]),
        ("--load-in-4bit --blocksize 48", ["blocksize 48", "64, 128"]),
        ("--load-in-4bit --quant-type nf5", ["\"nf5\"", "\"nf4\""]),
        ("--load-in-4bit --skip-modules q_porj,v_proj", ["skip_modules \"q_porj\" matches no module", "q_proj"]),
        ("--skip-modules v_proj", ["skip_modules", "load_in_4bit or load_in_8bit"]),
    ] {
        run(&format!("{line} {flags}")).fails(2, &parts);
    }
    let scratch = Scratch::new();
    scratch
        .train(&["model.load_in_4bit=true", "model.load_in_8bit=true"])
        .fails(2, &["[model] load_in_4bit and load_in_8bit exclude each other"]);
    scratch.train(&["model.quant_type=nf4"]).fails(2, &["[model] quant_type", "apply only with load_in_4bit"]);
    scratch.train(&["model.load_in_4bit=true", "model.blocksize=100"]).fails(2, &["[model] blocksize 100"]);
    scratch.train(&["model.bnb_4bit_quant_type=nf4"]).fails(2, &["quant_type = \"nf4\""]);
    scratch.train(&["model.load_in_4bt=true"]).fails(2, &["load_in_4bt", "nearest: \"load_in_4bit\""]);
}

#[test]
fn a_quantized_checkpoint_loads_as_it_is_or_not_at_all() {
    let scratch = Scratch::new();
    let nf4 = scratch.quantize("nf4", "");
    let rows = golden("qwen3-tied/rows.jsonl");
    for (flags, asked) in [
        ("--load-in-8bit", "load_in_8bit"),
        ("--load-in-16bit", "load_in_16bit"),
        ("--load-in-4bit --quant-type fp4", "quant_type \"fp4\""),
        ("--load-in-4bit --double-quant false", "double_quant = false"),
        ("--load-in-4bit --skip-modules v_proj", "skip_modules"),
    ] {
        let line = format!("eval --device cpu --model {nf4} --data {} {flags}", rows.display());
        run(&line).fails(2, &["is already quantized, 4-bit (nf4)", asked, "16-bit checkpoint"]);
    }
    let dense = format!("model.name_or_path={nf4}");
    scratch.train(&[&dense, "model.load_in_16bit=true"]).fails(2, &["already quantized", "load_in_16bit"]);
    run(&format!("quantize --model {nf4} --to int8 --out {nf4}-again")).fails(2, &["is already quantized"]);
    assert!(!scratch.path("nf4-again").exists());
}

#[test]
fn quantize_refuses_what_it_cannot_do() {
    let scratch = Scratch::new();
    let (model, out) = (golden("qwen3-tied"), scratch.path("new"));
    let line = |more: &str| run(&format!("quantize --model {} --out {} {more}", model.display(), out.display()));
    line("--to int4").fails(2, &["int4", "nf4, fp4, int8"]);
    line("--to nf4 --blocksize 48").fails(2, &["blocksize 48", "64, 128"]);
    line("--to int8 --blocksize 64").fails(2, &["--blocksize", "nf4"]);
    line("--to int8 --double-quant true").fails(2, &["--double-quant", "nf4"]);
    line("--to nf4 --skip-modules q_porj").fails(2, &["\"q_porj\" matches no module", "q_proj"]);
    line("").fails(2, &["--to"]);
    assert!(!out.exists());
    run(&format!("quantize --model /no/such/model --to nf4 --out {}", out.display())).fails(1, &["/no/such/model"]);
}

#[test]
fn quantize_spares_what_it_did_not_make() {
    let scratch = Scratch::new();
    let golden = golden("qwen3-tied");
    let model = scratch.path("model");
    fs::create_dir(&model).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(golden.join(name), model.join(name)).unwrap();
    }
    let to = |out: &Path| run(&format!("quantize --model {} --to nf4 --out {}", model.display(), out.display()));
    // Its own source first of all.
    to(&model).fails(1, &["contains an unquantized checkpoint", "choose a new directory"]);
    assert!(fs::read(model.join("model.safetensors")).unwrap() == fs::read(golden.join("model.safetensors")).unwrap());
    scratch.write("notes.txt", "kept");
    to(scratch.path("notes.txt").parent().unwrap()).fails(1, &["which saving would remove", "choose a new directory"]);
    assert_eq!(fs::read_to_string(scratch.path("notes.txt")).unwrap(), "kept");
}
