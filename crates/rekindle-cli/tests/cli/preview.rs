//! `data preview` and `data stats`, and the keys of `[data]` that choose what is trained.

use serde_json::json;

use crate::{Scratch, golden, rekindle};

const CHAT: &str = r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "So?"}, {"role": "assistant", "content": "No"}]}
{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A longer answer than the others are."}]}
{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A longer answer than the others are."}]}
"#;

/// A run file for the model of the quickstart, whose weights are taken away: no command here needs them.
pub(crate) fn chat() -> (Scratch, String) {
    let scratch = Scratch::new();
    let rows = scratch.write("chat.jsonl", CHAT);
    let base = golden("../../examples/quickstart/base");
    std::fs::create_dir(scratch.path("model")).unwrap();
    for entry in std::fs::read_dir(base).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "json" || extension == "jinja") {
            std::fs::copy(&path, scratch.path("model").join(path.file_name().unwrap())).unwrap();
        }
    }
    let text = format!("model = {:?}\n[lora]\n[data]\ntrain = {rows:?}\n", scratch.path("model"));
    let run_file = scratch.write("chat.toml", text);
    (scratch, run_file)
}

#[test]
fn preview_marks_what_is_trained() {
    let (_scratch, run_file) = chat();
    let preview = |more: &[&str]| rekindle(["data", "preview", &run_file].iter().chain(more)).ok().stdout;
    let text = preview(&[]);
    assert!(text.starts_with("row 1 of 3, ") && text.contains("chat.jsonl line 1: "), "{text}");
    assert!(text.contains("⟦Yes<|im_end|>↵⟧\n") && text.contains("⟦No<|im_end|>↵⟧\n"), "{text}");
    assert!(!text.contains('\u{1b}'), "no colours in a pipe: {text}");
    let last = preview(&["--rows", "1", "data.train_on=last_assistant"]);
    assert!(!last.contains("⟦Yes") && last.contains("⟦No<|im_end|>↵⟧") && !last.contains("row 2"), "{last}");
    let second = preview(&["--row", "2"]);
    assert!(second.starts_with("row 2 of 3, ") && !second.contains("row 1 of"), "{second}");
    let missing = rekindle(["data", "preview", &run_file, "--row", "4"]);
    missing.fails(2, &["--row 4 is out of range; the rows are 1 to 3"]);
}

#[test]
fn preview_as_json() {
    let (_scratch, run_file) = chat();
    let text = rekindle(["data", "preview", &run_file, "--json", "--rows", "2"]).ok().stdout;
    let rows: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((rows.len(), &rows[1]["index"], &rows[1]["line"]), (2, &json!(2), &json!(2)));
    assert!(rows[0]["file"].as_str().unwrap().ends_with("chat.jsonl"));
    let trained: Vec<_> =
        rows[0]["pieces"].as_array().unwrap().iter().filter(|piece| piece["trained"] == true).collect();
    assert_eq!(
        trained.iter().map(|piece| piece["text"].as_str().unwrap()).collect::<Vec<_>>(),
        ["Yes<|im_end|>\n", "No<|im_end|>\n"]
    );
    let count = |key: &str| rows[0][key].as_array().unwrap().len();
    assert_eq!((json!(count("input_ids")), count("labels")), (rows[0]["tokens"].clone(), count("input_ids")));
    let tokens: u64 = trained.iter().map(|piece| piece["tokens"].as_u64().unwrap()).sum();
    assert_eq!(rows[0]["trained_tokens"], json!(tokens));
}

#[test]
fn stats_count_what_there_is() {
    let (_scratch, run_file) = chat();
    let stats = rekindle(["data", "stats", &run_file, "--json"]).json();
    assert_eq!((&stats["rows"], &stats["duplicates"]), (&json!(3), &json!(1)));
    let [first, second] = [0, 1].map(|i| stats["first_duplicate"][i].as_str().unwrap());
    assert!(first.ends_with("chat.jsonl line 2") && second.ends_with("chat.jsonl line 3"), "{first} {second}");
    let tokens = stats["tokens"].as_u64().unwrap();
    assert!(stats["trained_tokens"].as_u64().unwrap() < tokens);
    assert_eq!((&stats["packing"]["rows"], &stats["packing"]["packed_rows"]), (&json!(3), &json!(1)));
    let text = rekindle(["data", "stats", &run_file]).ok().stdout;
    for part in ["chat.jsonl: 3 rows (messages), ", "tokens a row: min ", "chat.jsonl line 3 as ", " % over 1 row\n"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // Rows that training would refuse are counted.
    let text = rekindle(["data", "stats", &run_file, "model.max_seq_length=12"]).ok().stdout;
    assert!(text.contains("rows longer than max_seq_length = 12: training refuses such rows"), "{text}");
}

#[test]
fn what_cannot_be_trained_ends_with_3() {
    let (scratch, run_file) = chat();
    let template = scratch.path("model/chat_template.jinja");
    let had = std::fs::read_to_string(&template).unwrap_or_default();
    scratch.write(
        "model/chat_template.jinja",
        "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}",
    );
    let preview = rekindle(["data", "preview", &run_file]);
    preview.fails(3, &["chat.jsonl", "1", "ends messages[1] (assistant) without an end token", "<|im_end|>"]);
    scratch.write("model/chat_template.jinja", "{{ raise_exception('not like this') }}");
    rekindle(["data", "preview", &run_file]).fails(3, &["chat.jsonl", "the chat template failed: not like this"]);
    scratch.write("model/chat_template.jinja", had);
    let texts = scratch.write("texts.jsonl", "{\"text\": \"hello\"}\n");
    for name in ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"] {
        std::fs::write(scratch.path("model").join(name), "{}").unwrap();
    }
    let config = std::fs::read_to_string(scratch.path("model/config.json")).unwrap();
    scratch.write("model/config.json", config.replace("\"eos_token_id\"", "\"was_eos_token_id\""));
    let train = format!("data.train={texts}");
    rekindle(["data", "preview", &run_file, &train]).fails(3, &["texts.jsonl", "rows of text need an end token"]);
}
