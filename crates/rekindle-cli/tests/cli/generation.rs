//! `generate` and its ends: end tokens that were trained, stop strings, conversations, and numbers that are not finite.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::{Value, json};

use crate::{Done, Scratch, command, golden, rekindle};

const QUESTION: &str = "Jack bought three brown balls at the fair. What did Jack buy?";
const TURN_END: u64 = 2;

fn quickstart() -> PathBuf {
    golden("../../examples/quickstart")
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The quickstart's model as a base model is: its end token is `<|endoftext|>`, and its template ends turns with
/// `<|im_end|>`.
fn base_model(scratch: &Scratch) -> String {
    let dir = scratch.path("base");
    copy(&quickstart().join("base"), &dir);
    for (file, key, value) in [
        ("config.json", "eos_token_id", json!(0)),
        ("generation_config.json", "eos_token_id", json!(0)),
        ("tokenizer_config.json", "eos_token", json!("<|endoftext|>")),
        ("special_tokens_map.json", "eos_token", json!("<|endoftext|>")),
    ] {
        let mut content = read(&dir.join(file));
        content[key] = value;
        fs::write(dir.join(file), content.to_string()).unwrap();
    }
    dir.display().to_string()
}

/// A run file for a step on a few rows of the quickstart; `more` goes into `[model]`, `data` into `[data]`.
fn run_file(scratch: &Scratch, model: &str, more: &str, data: &str) -> String {
    let rows = fs::read_to_string(quickstart().join("train.jsonl")).unwrap();
    let rows: Vec<&str> = rows.lines().take(8).collect();
    let (rows, out) = (scratch.write("rows.jsonl", rows.join("\n")), scratch.path("tuned"));
    let text = format!(
        "output_dir = {out:?}\ndevice = \"cpu\"\n[model]\nname_or_path = {model:?}\n{more}[data]\ntrain = {rows:?}\n\
         {data}[train]\nmax_steps = 1\nper_device_train_batch_size = 2\n"
    );
    scratch.write("tuned.toml", text)
}

const LORA: &str = "[lora]\nr = 2\n";

fn generate(model: &str, more: &[&str]) -> Done {
    let args = ["generate", "--device", "cpu", "--max-new-tokens", "60", "--model", model];
    rekindle(args.iter().chain(more))
}

#[test]
fn a_base_model_stops_at_the_end_of_a_turn() {
    let scratch = Scratch::new();
    let base = base_model(&scratch);
    let answer = generate(&base, &["--chat", QUESTION, "--json"]).json();
    let ids: Vec<u64> = answer["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
    assert_eq!(ids.iter().position(|&id| id == TURN_END), Some(ids.len() - 1), "{answer}");
    assert_eq!((&answer["stop_reason"], &answer["new_tokens"]), (&json!("end_token"), &json!(ids.len())));
    assert!(!answer["text"].as_str().unwrap().contains("im_end"), "{answer}");

    // And so do a run's adapter, and what is merged from it.
    let done = rekindle(["train", &run_file(&scratch, &base, LORA, "")]).ok();
    let notice = "the chat template ends turns with <|im_end|> (id 2), and the base model ends at <|endoftext|> (id 0)";
    assert!(done.stderr.contains(notice), "{}", done.stderr);
    let adapter = scratch.path("tuned/adapter");
    assert_eq!(read(&adapter.join("generation_config.json"))["eos_token_id"], json!([0, 2]));
    let merged = scratch.path("merged").display().to_string();
    rekindle(["merge", scratch.path("tuned").to_str().unwrap(), "--out", &merged]).ok();
    let config = read(&Path::new(&merged).join("generation_config.json"));
    assert_eq!(config, json!({"do_sample": false, "eos_token_id": [0, 2], "pad_token_id": 0}));
}

#[test]
fn whole_models_and_samples_know_the_end_of_a_turn() {
    let scratch = Scratch::new();
    let base = base_model(&scratch);
    // Without a generation_config.json the ids of config.json are what counts.
    fs::remove_file(scratch.path("base/generation_config.json")).unwrap();
    let eval = format!("eval = {:?}\n", quickstart().join("heldout.jsonl"));
    let file = run_file(&scratch, &base, "full_finetuning = true\n", &eval);
    let more =
        ["train.eval_samples=1", "train.sample_max_new_tokens=60", "train.save_steps=1", "train.learning_rate=0"];
    let done = rekindle(["train", &file].iter().chain(&more)).ok();
    assert!(done.stderr.contains("the base model ends at <|endoftext|>"), "{}", done.stderr);
    let expected = json!({"eos_token_id": [0, 2], "pad_token_id": 0});
    for place in ["tuned/model", "tuned/checkpoint-1"] {
        assert_eq!(read(&scratch.path(place).join("generation_config.json")), expected, "{place}");
    }
    let metrics = fs::read_to_string(scratch.path("tuned/metrics.jsonl")).unwrap();
    let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let samples: Vec<&Value> = lines.iter().filter(|line| line["output"].is_string()).collect();
    assert!(!samples.is_empty(), "{metrics}");
    for sample in samples {
        assert_eq!(sample["ended"], json!(true), "{sample}");
        assert!(!sample["output"].as_str().unwrap().contains("im_end"), "{sample}");
    }
}

/// If the checkpoint names all of them, there is no notice, and its file is copied unchanged.
#[test]
fn a_chat_model_is_left_as_it_is() {
    let scratch = Scratch::new();
    let base = quickstart().join("base");
    let done = rekindle(["train", &run_file(&scratch, base.to_str().unwrap(), LORA, "")]).ok();
    assert!(!done.stderr.contains("ends at any of them"), "{}", done.stderr);
    let files = [base, scratch.path("tuned/adapter")].map(|dir| fs::read(dir.join("generation_config.json")).unwrap());
    assert_eq!(files[0], files[1]);
}

#[test]
fn one_tokenizer_and_template_however_an_adapter_arrives() {
    let scratch = Scratch::new();
    let base = quickstart().join("base").display().to_string();
    let file = run_file(&scratch, &base, LORA, "");
    rekindle(["train", &file]).ok();
    let adapter = scratch.path("tuned/adapter");
    let template = fs::read_to_string(adapter.join("chat_template.jinja")).unwrap();
    let changed = template.replace("'<|im_start|>' + message", "'<|im_start|>X ' + message");
    fs::write(adapter.join("chat_template.jinja"), changed).unwrap();
    let (adapter, rows) = (adapter.display().to_string(), scratch.path("rows.jsonl").display().to_string());
    let eval = |more: &[&str]| rekindle(["eval", "--device", "cpu", "--json", "--data", &rows].iter().chain(more)).ok();
    let [alone, beside] = [eval(&["--model", &adapter]), eval(&["--model", &base, "--adapter", &adapter])];
    let said = format!("adapter {adapter} has another chat template than {base}: the adapter's");
    for done in [&alone, &beside] {
        assert_eq!(done.stderr.matches(&said).count(), 1, "{}", done.stderr);
    }
    let (alone, beside, plain) = (alone.json(), beside.json(), eval(&["--model", &base]));
    assert_eq!(alone, beside);
    assert!(!plain.stderr.contains("tokenizer and template are used"), "{}", plain.stderr);
    assert_ne!(alone["loss"], plain.json()["loss"]);

    let [start, out] = [format!("lora.init_from={adapter}"), format!("output_dir={}", scratch.path("more").display())];
    let preview = rekindle(["data", "preview", &file, "--rows", "1", &start]).ok();
    assert!(preview.stdout.contains("<|im_start|>X user") && preview.stderr.contains(&said), "{}", preview.stderr);
    let done = rekindle(["train", &file, &start, &out]).ok();
    assert!(done.stderr.contains(&said), "{}", done.stderr);
    let saved = fs::read_to_string(scratch.path("more/adapter/chat_template.jinja")).unwrap();
    assert!(saved.contains("<|im_start|>X "), "{saved}");
}

#[test]
fn a_stop_string_is_cut_off() {
    let base = quickstart().join("base").display().to_string();
    let whole = generate(&base, &["--chat", QUESTION, "--json"]).json();
    let text = whole["text"].as_str().unwrap();
    assert!(text.len() > 12, "{whole}");
    let stop = &text[5..9];
    let at = text.find(stop).unwrap();
    let args = ["--chat", QUESTION, "--stop", "never", "--stop", stop];
    let cut = generate(&base, &[&args[..], &["--json"]].concat()).json();
    let found = (cut["text"].as_str(), cut["stop_reason"].as_str(), cut["stop"].as_str());
    assert_eq!(found, (Some(&text[..at]), Some("stop_string"), Some(stop)));
    assert!(cut["new_tokens"].as_u64() < whole["new_tokens"].as_u64(), "{cut}");
    let streamed = generate(&base, &args).ok();
    assert_eq!(streamed.stdout, format!("{}\n", &text[..at]));
    assert!(streamed.stderr.contains("ended by: stop string"), "{}", streamed.stderr);
    assert_eq!(generate(&base, &["--chat", QUESTION]).ok().stdout, format!("{text}\n"));

    let second = whole["ids"][1].as_u64().unwrap().to_string();
    let by_id = generate(&base, &["--chat", QUESTION, "--stop-ids", &second, "--json"]).json();
    assert_eq!((&by_id["new_tokens"], &by_id["stop_reason"]), (&json!(2), &json!("end_token")));
    let special = generate(&base, &["--prompt", "Say: a", "--stop", "<|im_start|>", "--json"]).json();
    assert!(special["text"].is_string(), "a special token alone is an end token");
    for (stop, part) in [("", "is empty"), ("a<|im_end|>", "special token <|im_end|>")] {
        generate(&base, &["--prompt", "a", "--stop", stop]).fails(2, &[part]);
    }
    generate(&base, &["--prompt", "a", "--stop-ids", "1049"]).fails(2, &["--stop-ids 1049", "vocabulary of 1049"]);
    let ids = golden("qwen3-tied").display().to_string();
    generate(&ids, &["--prompt-ids", "5", "--stop", "a"]).fails(2, &["--stop-ids"]);
}

#[test]
fn a_conversation_is_answered() {
    let scratch = Scratch::new();
    let base = quickstart().join("base").display().to_string();
    let turns = json!([{"role": "system", "content": "Be kind."}, {"role": "user", "content": QUESTION}]);
    let file = scratch.write("chat.json", turns.to_string());
    let answer = |args: &[&str]| {
        let answer = generate(&base, &[args, &["--json"]].concat()).json();
        (answer["ids"].clone(), answer["prompt_tokens"].clone())
    };
    let expected = answer(&["--chat", QUESTION, "--system", "Be kind."]);
    assert_eq!(answer(&["--messages", &file]), expected);
    assert_ne!(answer(&["--chat", QUESTION]).1, expected.1);
    let row = scratch.write("row.json", json!({"messages": turns, "tools": []}).to_string());
    assert_eq!(answer(&["--messages", &row]), expected);
    let mut child = command()
        .args(["generate", "--device", "cpu", "--model", &base, "--max-new-tokens", "60", "--messages", "-", "--json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(turns.to_string().as_bytes()).unwrap();
    let piped: Value = serde_json::from_slice(&child.wait_with_output().unwrap().stdout).unwrap();
    assert_eq!(piped["ids"], expected.0);

    let answered = scratch.write("done.json", r#"[{"role": "assistant", "content": "A"}]"#);
    generate(&base, &["--messages", &answered]).fails(3, &["done.json", "nothing to answer"]);
    generate(&base, &["--messages", "no-such.json"]).fails(1, &["no-such.json"]);
}

#[test]
fn json_says_how_it_went() {
    let base = quickstart().join("base").display().to_string();
    let args = ["generate", "--device", "cpu", "--model", &base, "--prompt", "A whale is", "--json"];
    let run = |more: &[&str]| rekindle(args.iter().chain(more)).json();
    let answer = run(&["--max-new-tokens", "4"]);
    assert_eq!((&answer["stop_reason"], &answer["new_tokens"]), (&json!("length"), &json!(4)));
    assert!(answer["prompt_tokens"].as_u64().unwrap() > 0 && answer["prompt_seconds"].as_f64().unwrap() > 0.0);
    assert!(answer["tokens_per_second"].as_f64().unwrap() > 0.0, "{answer}");
    let one = run(&["--max-new-tokens", "1"]);
    assert!(one.get("tokens_per_second").is_none() && one.get("stop").is_none(), "no speed of one token: {one}");
    // The penalty reaches greedy decoding: what was said is not said again.
    let ids = |answer: &Value| answer["ids"].clone();
    let penalized = run(&["--max-new-tokens", "12", "--repetition-penalty", "1000"]);
    let list: Vec<u64> = ids(&penalized).as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
    let unique: std::collections::BTreeSet<&u64> = list.iter().collect();
    assert_eq!(unique.len(), list.len(), "{penalized}");
    let hot = ["--max-new-tokens", "12", "--temperature", "3", "--min-p", "1"];
    assert_eq!(ids(&run(&hot)), ids(&run(&["--max-new-tokens", "12"])), "only the most likely token is left");
    for (argument, value) in [("--min-p", "1.5"), ("--repetition-penalty", "0"), ("--top-p", "0")] {
        let name = argument.trim_start_matches('-').replace('-', "_");
        rekindle(args.iter().chain(&[argument, value])).fails(2, &[&name]);
    }
}

/// Whoever reads only the beginning ends the command, without an error.
#[test]
fn nobody_reads_on() {
    let base = quickstart().join("base").display().to_string();
    let mut child = command()
        .args(["generate", "--device", "cpu", "--model", &base, "--prompt", "A whale is", "--max-new-tokens", "200"])
        .args(["--temperature", "1", "--repetition-penalty", "1.1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0; 1];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let done = child.wait_with_output().unwrap();
    assert_eq!(done.status.code(), Some(0), "{}", String::from_utf8_lossy(&done.stderr));
}

#[test]
fn eval_tells_the_loss_of_every_token() {
    let scratch = Scratch::new();
    let base = quickstart().join("base").display().to_string();
    let rows = fs::read_to_string(quickstart().join("heldout.jsonl")).unwrap();
    let rows = scratch.write("rows.jsonl", rows.lines().take(2).collect::<Vec<_>>().join("\n"));
    let eval = |more: &[&str]| {
        let args = ["eval", "--device", "cpu", "--json", "--model", &base, "--data", &rows];
        rekindle(args.iter().chain(more)).json()
    };
    let (mut detailed, plain) = (eval(&["--per-token"]), eval(&[]));
    for row in detailed["rows"].as_array_mut().unwrap() {
        let tokens = row.as_object_mut().unwrap().remove("token_nll").unwrap();
        let tokens = tokens.as_array().unwrap();
        assert_eq!(json!(tokens.len()), row["tokens"]);
        // Added up in the same order.
        assert_eq!(json!(tokens.iter().map(|token| token["nll"].as_f64().unwrap()).sum::<f64>()), row["nll"]);
        let text: String = tokens.iter().map(|token| token["token"].as_str().unwrap()).collect();
        assert!(text.starts_with('{') && text.ends_with("}<|im_end|>\n"), "{text}");
        let positions: Vec<u64> = tokens.iter().map(|token| token["position"].as_u64().unwrap()).collect();
        assert!(positions[0] > 1 && positions.windows(2).all(|pair| pair[1] == pair[0] + 1), "{positions:?}");
        assert!(tokens.iter().any(|token| token["id"] == json!(TURN_END)));
    }
    assert_eq!(detailed, plain);
}

#[test]
fn what_is_not_finite_ends_with_6() {
    let scratch = Scratch::new();
    let dir = scratch.path("broken");
    copy(&quickstart().join("base"), &dir);
    let (file, tensor) = (dir.join("model.safetensors"), "model.layers.0.mlp.up_proj.weight");
    let mut bytes = fs::read(&file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let start = 8 + length + header[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[start..start + 2].copy_from_slice(&[0xc0, 0x7f]);
    fs::write(&file, bytes).unwrap();
    let (model, rows) = (dir.display().to_string(), quickstart().join("heldout.jsonl").display().to_string());
    for json in [&[][..], &["--json"]] {
        let eval = ["eval", "--device", "cpu", "--model", &model, "--data", &rows];
        rekindle(eval.iter().chain(json)).fails(6, &[tensor, "heldout.jsonl:1"]);
        for prompt in [["--prompt", "A whale is"], ["--chat", QUESTION], ["--prompt-ids", "5,6"]] {
            generate(&model, &[&prompt[..], json].concat()).fails(6, &[tensor, "logits of new token 1 "]);
        }
    }
    let out = scratch.path("quantized");
    rekindle(["quantize", "--model", &model, "--to", "nf4", "--out", out.to_str().unwrap()]).fails(6, &[tensor]);
    assert!(!out.exists());
    let eval = ["eval", "--device", "cpu", "--load-in-4bit", "--model", &model, "--data", &rows];
    rekindle(eval).fails(6, &[tensor]);
}

/// Reads a file of JSON lines.
fn lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_file_of_prompts_is_answered_row_by_row() {
    let scratch = Scratch::new();
    let model = quickstart().join("base").display().to_string();
    let rows = [
        json!({"messages": [{"role": "user", "content": QUESTION}], "id": "first"}),
        json!({"prompt": "A whale is"}),
        json!({"prompt": [{"role": "user", "content": "What is a whale?"}]}),
        json!({"prompt_ids": [5, 6, 7]}),
        json!({"messages": [{"role": "user", "content": QUESTION}]}),
    ];
    let text: Vec<String> = rows.iter().map(Value::to_string).collect();
    let data = scratch.write("prompts.jsonl", format!("{}\n\n{}\n", text[0], text[1..].join("\n")));
    let out = scratch.path("answers.jsonl");
    let answer = |more: &[&str]| {
        let rows = ["--data", &data, "--out", out.to_str().unwrap()];
        generate(&model, &rows.into_iter().chain(more.iter().copied()).collect::<Vec<_>>())
    };
    let done = answer(&[]).ok();
    assert_eq!(done.stdout.trim(), out.to_str().unwrap());
    assert!(done.stderr.contains("5 rows, 0 of them answered before"), "{}", done.stderr);
    let mut answers = lines(&out);
    answers.sort_by_key(|answer| answer["row"].as_u64());
    let numbers: Vec<u64> = answers.iter().map(|answer| answer["row"].as_u64().unwrap()).collect();
    assert_eq!(numbers, [1, 3, 4, 5, 6], "an empty line has no answer");
    assert!(answers.iter().map(|answer| &answer["input"]).eq(&rows));
    // They are the answers of single prompts.
    let single = generate(&model, &["--chat", QUESTION, "--json"]).json();
    for key in ["text", "ids", "stop_reason", "prompt_tokens", "new_tokens"] {
        assert_eq!((&answers[0][key], &answers[4][key]), (&single[key], &single[key]), "{key}");
    }
    let single = generate(&model, &["--prompt-ids", "5,6,7", "--json"]).json();
    assert_eq!(answers[3]["ids"], single["ids"]);

    // A command that was killed while it wrote its third answer.
    let whole = fs::read_to_string(&out).unwrap();
    let kept: Vec<&str> = whole.lines().take(2).collect();
    fs::write(&out, format!("{}\n{}", kept.join("\n"), &whole.lines().nth(2).unwrap()[..20])).unwrap();
    let done = answer(&["--batch-size", "2"]).ok();
    assert!(done.stderr.contains("5 rows, 2 of them answered before"), "{}", done.stderr);
    let mut again = lines(&out);
    again.sort_by_key(|answer| answer["row"].as_u64());
    assert_eq!(again, answers);

    // Other rows, and rows that cannot be answered.
    let other = scratch.write("other.jsonl", json!({"prompt": "Another"}).to_string());
    let out = out.to_str().unwrap();
    generate(&model, &["--data", &other, "--out", out]).fails(2, &["answers another row 1"]);
    for (row, message) in [
        ("{}", "none of prompt, messages and prompt_ids"),
        ("[1]", "not an object"),
        ("{\"prompt\": 1}", "neither a text nor a list"),
        ("{\"prompt_ids\": [99999999]}", "vocabulary"),
        ("{", "invalid JSON"),
        ("", "has no rows"),
    ] {
        let wrong = scratch.write("wrong.jsonl", row);
        generate(&model, &["--data", &wrong, "--out", "/no/such/directory/out.jsonl"]).fails(3, &[message]);
    }
}
