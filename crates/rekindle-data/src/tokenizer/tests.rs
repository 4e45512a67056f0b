use serde_json::json;

use super::*;
use crate::ErrorKind;
use crate::test_support::{CHATML, SPECIAL, checkpoint, save_tokenizer, write, write_json};

fn load(dir: &Path) -> Tokenizer {
    Tokenizer::from_dir(dir).expect("a valid tokenizer")
}

fn error(dir: &Path) -> String {
    let error = Tokenizer::from_dir(dir).expect_err("a broken tokenizer");
    assert_eq!(error.kind(), ErrorKind::Tokenizer);
    error.to_string().replace(&dir.display().to_string(), "DIR")
}

#[test]
fn text_survives_the_round_trip() {
    let dir = checkpoint();
    let tokenizer = load(dir.path());
    for text in ["", "hello world", " leading", "日本語 🦀\r\n\n  x", "a<|im_end|>b"] {
        let ids = tokenizer.encode(text, false).expect("encodable");
        assert_eq!(tokenizer.decode(&ids, false).expect("decodable"), text);
    }
    let ids = tokenizer.encode("hello<|im_end|>", true).expect("encodable");
    let special = |token| tokenizer.token_to_id(token).expect("known");
    assert_eq!(ids, [special("<s>"), special("hello"), special("<|im_end|>")]);
    assert_eq!(tokenizer.decode(&ids, true).expect("decodable"), "hello");
}

#[test]
fn a_text_is_encoded_up_to_a_limit() {
    let dir = checkpoint();
    let tokenizer = load(dir.path());
    for piece in ["hello ", "é", "🦀 日本", "a", "  "] {
        for count in [1, 9, 40, 900] {
            let text = piece.repeat(count);
            let ids = tokenizer.encode(&text, true).expect("encodable");
            for limit in [0, 1, ids.len() - 1, ids.len(), ids.len() + 1] {
                let some = tokenizer.encode_at_most(&text, true, limit).expect("encodable");
                assert_eq!(some, (ids.len() <= limit).then(|| ids.clone()), "{count} times {piece:?}, {limit}");
            }
        }
    }
}

#[test]
fn sizes_and_special_ids() {
    let dir = checkpoint();
    let tokenizer = load(dir.path());
    // 256 bytes, 7 merges and the special tokens.
    assert_eq!(tokenizer.vocab_size(), 263 + SPECIAL.len());
    assert_eq!(tokenizer.bos_id(), Some(263));
    assert_eq!((tokenizer.eos_id(), tokenizer.eos_ids()), (Some(266), &[266][..]));
    assert!(!tokenizer.has_chat_template());
}

#[test]
fn padding_and_truncation_of_the_file_are_ignored() {
    let dir = checkpoint();
    let path = dir.path().join("tokenizer.json");
    let mut value: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).expect("there")).expect("JSON");
    value["truncation"] = json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
    value["padding"] = json!({"strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "!"});
    write_json(dir.path(), "tokenizer.json", &value);
    assert_eq!(load(dir.path()).encode("abcdefgh", true).expect("encodable").len(), 9);
}

#[test]
fn end_tokens_come_from_the_generation_config_first() {
    let dir = checkpoint();
    write_json(dir.path(), "config.json", &json!({"eos_token_id": 7}));
    assert_eq!(load(dir.path()).eos_ids(), [7]);
    write_json(dir.path(), "generation_config.json", &json!({"temperature": 1.0}));
    assert_eq!(load(dir.path()).eos_ids(), [7]);
    write_json(dir.path(), "generation_config.json", &json!({"eos_token_id": [8, 9]}));
    assert_eq!(load(dir.path()).eos_ids(), [8, 9]);
    // What ends a text is still the tokenizer's.
    assert_eq!(load(dir.path()).eos_id(), Some(266));
    write_json(dir.path(), "generation_config.json", &json!({"eos_token_id": "</s>"}));
    assert_eq!(
        error(dir.path()),
        "DIR/generation_config.json: eos_token_id is \"</s>\"; expected a token id or a list of them"
    );
}

#[test]
fn special_tokens_may_stand_in_their_own_file() {
    let dir = checkpoint();
    write_json(dir.path(), "tokenizer_config.json", &json!({"add_bos_token": true, "bos_token": null}));
    write_json(
        dir.path(),
        "special_tokens_map.json",
        &json!({"bos_token": "<|begin|>", "eos_token": {"content": "</s>"}}),
    );
    let tokenizer = load(dir.path());
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(268), Some(264)));
}

#[test]
fn templates_from_the_file_beside_or_the_config() {
    let dir = checkpoint();
    let message = [crate::Message::new("user", "Q")];
    let render =
        || load(dir.path()).chat_template().expect("valid").render(&message, &Default::default()).expect("renders");
    write_json(dir.path(), "tokenizer_config.json", &json!({"chat_template": "single {{ messages[0].content }}"}));
    assert_eq!(render(), "single Q");
    let named = json!([{"name": "rag", "template": "rag"}, {"name": "default", "template": "default"}]);
    write_json(dir.path(), "tokenizer_config.json", &json!({"chat_template": named, "bos_token": "<s>"}));
    assert_eq!(render(), "default");
    write(dir.path(), "chat_template.jinja", "beside {{ bos_token }}");
    assert_eq!(render(), "beside <s>");
}

/// The same choice as transformers' `apply_chat_template`.
#[test]
fn one_of_several_templates_is_chosen() {
    let dir = checkpoint();
    let chosen = |name: Option<&str>, tools: bool| {
        let tokenizer = load(dir.path());
        let template = tokenizer.chat_template_for(name, tools);
        let dir = dir.path().display().to_string();
        template
            .map(|template| template.render(&[], &Default::default()).expect("renders"))
            .map_err(|error| error.to_string().replace(&dir, "DIR"))
    };
    let text = |text: &str| Ok(text.to_owned());
    let config = |names: &[&str]| {
        let named: Vec<_> = names.iter().map(|name| json!({"name": name, "template": name})).collect();
        write_json(dir.path(), "tokenizer_config.json", &json!({"chat_template": named}));
    };
    config(&["tool_use", "default", "rag"]);
    assert_eq!([chosen(None, false), chosen(None, true)], [text("default"), text("tool_use")]);
    assert_eq!([chosen(Some("rag"), false), chosen(Some("default"), true)], [text("rag"), text("default")]);
    assert_eq!(
        chosen(Some("tools"), true),
        Err("data.chat_template = \"tools\": this checkpoint has no such template, only: \"tool_use\", \"default\", \
             \"rag\""
            .to_owned())
    );
    config(&["default", "rag"]);
    assert_eq!(chosen(None, true), text("default"));
    config(&["rag"]);
    assert_eq!(chosen(None, true), text("rag"));
    config(&["rag", "tool_use"]);
    assert_eq!(chosen(None, true), text("tool_use"));
    assert_eq!(
        chosen(None, false),
        Err("DIR: none of the chat templates is called \"default\", only: \"rag\", \"tool_use\"; choose one with \
             data.chat_template"
            .to_owned())
    );

    // Files come before the configuration.
    write(dir.path(), "chat_template.jinja", "the file");
    assert_eq!(chosen(None, true), text("the file"));
    std::fs::create_dir(dir.path().join("additional_chat_templates")).expect("created");
    write(dir.path(), "additional_chat_templates/tool_use.jinja", "with tools");
    write(dir.path(), "additional_chat_templates/broken.jinja", "{% if %}");
    write(dir.path(), "additional_chat_templates/notes.txt", "");
    assert_eq!([chosen(None, false), chosen(None, true)], [text("the file"), text("with tools")]);
    let broken = chosen(Some("broken"), false).expect_err("does not parse");
    assert!(broken.contains("additional_chat_templates/broken.jinja (broken): chat template: "), "{broken}");
    std::fs::remove_file(dir.path().join("chat_template.jinja")).expect("removed");
    assert_eq!(chosen(None, true), text("with tools"));
}

#[test]
fn files_lists_what_is_there() {
    let dir = checkpoint();
    write(dir.path(), "chat_template.jinja", CHATML);
    write(dir.path(), "model.safetensors", "");
    let files = load(dir.path()).files();
    let names: Vec<_> = files.iter().filter_map(|path| path.file_name()?.to_str()).collect();
    assert_eq!(names, ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]);
}

#[test]
fn a_broken_template_only_hurts_who_needs_it() {
    let dir = checkpoint();
    write(dir.path(), "chat_template.jinja", "{% if %}");
    let tokenizer = load(dir.path());
    assert!(tokenizer.has_chat_template());
    let error = tokenizer.chat_template().expect_err("broken");
    assert_eq!(error.kind(), ErrorKind::Tokenizer);
    assert!(error.to_string().contains("chat_template.jinja: chat template: "), "{error}");
}

#[test]
fn errors_name_the_file() {
    assert_eq!(error(Path::new("no/such")), "DIR: there is no such directory");
    let dir = tempfile::tempdir().expect("a directory");
    assert_eq!(error(dir.path()), "DIR: has no tokenizer.json");
    write(dir.path(), "tokenizer.model", "");
    assert!(error(dir.path()).starts_with("DIR: has a tokenizer.model but no tokenizer.json"));
    write(dir.path(), "tokenizer.json", "{}");
    assert!(error(dir.path()).starts_with("DIR/tokenizer.json: not a tokenizer: "));

    save_tokenizer(dir.path(), &["$A"]);
    write(dir.path(), "tokenizer_config.json", "{");
    assert!(error(dir.path()).starts_with("DIR/tokenizer_config.json: invalid JSON: "));
    write_json(dir.path(), "tokenizer_config.json", &json!({"eos_token": "<end>"}));
    assert_eq!(error(dir.path()), "DIR: eos_token \"<end>\" is not in the vocabulary of tokenizer.json");
    write_json(dir.path(), "tokenizer_config.json", &json!({"chat_template": 3}));
    assert!(error(dir.path()).ends_with("chat_template is neither a string nor a list of named ones"));
}
