use serde_json::{Value, json};

use super::*;
use crate::test_support::{
    BRACKETS, CHATML, DEFAULT_SYSTEM, HEADERS, THINKING, checkpoint, save_tokenizer, tokenizer, write_json,
};

fn example(tokenizer: &Tokenizer, row: Value) -> Encoded {
    encode(RowContent::from_json(row).expect("a valid row"), 1, Some(tokenizer)).expect("encodable")
}

/// The text of all tokens of a row, and of those whose label counts.
fn texts(tokenizer: &Tokenizer, row: Value) -> (String, String) {
    let example = example(tokenizer, row);
    assert_eq!(example.labels.len(), example.input_ids.len());
    let mut trained = Vec::new();
    for (&id, &label) in example.input_ids.iter().zip(&example.labels) {
        if label != IGNORED {
            assert_eq!(i64::from(label), i64::from(id));
            trained.push(id);
        }
    }
    let decode = |ids: &[u32]| tokenizer.decode(ids, false).expect("decodable");
    (decode(&example.input_ids), decode(&trained))
}

fn pair(all: &str, trained: &str) -> (String, String) {
    (all.to_owned(), trained.to_owned())
}

/// Contents with merges across words, several bytes a character, leading, trailing and inner white space, and markup.
const CONTENTS: [&str; 8] = [
    "hello world",
    "x",
    "  two  spaces",
    "grüße 🦀 日本",
    "line\n\nline",
    "a\n",
    "<|im_start|>user\nno",
    "[INST] hell",
];

/// What is trained of a chat is the contents of its assistant turns with their end tokens, whatever stands beside them.
#[test]
fn assistant_turns_and_nothing_else_count() {
    type Turn = fn(&str) -> String;
    let styles: [(&str, Turn); 5] = [
        (CHATML, |text| format!("{text}<|im_end|>\n")),
        (DEFAULT_SYSTEM, |text| format!("{text}<|im_end|>\n")),
        (HEADERS, |text| format!("{}<|eot|>", text.trim())),
        (BRACKETS, |text| format!(" {} <|im_end|>", text.trim())),
        (THINKING, |text| format!("{text}<|im_end|>\n")),
    ];
    for (source, turn) in styles {
        let (_dir, tokenizer) = tokenizer(source);
        for count in [2, 4, 6] {
            for shift in 0..CONTENTS.len() {
                let text = |i: usize| CONTENTS[(i * 3 + shift) % CONTENTS.len()];
                let role = |i: usize| ["user", "assistant"][i % 2];
                let messages: Vec<Value> = (0..count).map(|i| json!({"role": role(i), "content": text(i)})).collect();
                let mut turns: Vec<String> = (1..count).step_by(2).map(|i| turn(text(i))).collect();
                if source == THINKING
                    && let Some(last) = turns.last_mut()
                {
                    last.insert_str(0, "<think>\n\n</think>\n\n");
                }
                let (_, trained) = texts(&tokenizer, json!({"messages": messages}));
                assert_eq!(trained, turns.concat(), "{messages:?} with {source}");
            }
        }
    }
}

#[test]
fn the_template_writes_all_special_tokens() {
    let (_dir, tokenizer) = tokenizer(BRACKETS);
    let row = json!({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]});
    assert_eq!(texts(&tokenizer, row), pair("<s>[INST] Q [/INST] A <|im_end|>", " A <|im_end|>"));
}

#[test]
fn only_the_completion_of_a_list_counts() {
    let (_dir, tokenizer) = tokenizer(CHATML);
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let row = json!({
        "prompt": [turn("user", "Q"), turn("assistant", "A"), turn("user", "R")],
        "completion": [turn("assistant", "B")],
    });
    assert_eq!(texts(&tokenizer, row).1, "B<|im_end|>\n");
}

/// The tokenizer's post-processor trims offsets, which would move the spaces before "A" into the completion.
#[test]
fn spaces_before_the_completion_are_the_prompts() {
    let (_dir, tokenizer) = tokenizer(CHATML);
    let row = json!({"prompt": "Q:   ", "completion": "A"});
    assert_eq!(texts(&tokenizer, row), pair("<s>Q:   A<|im_end|>", "A<|im_end|>"));
}

#[test]
fn a_token_across_the_border_is_the_prompts() {
    let (_dir, tokenizer) = tokenizer(CHATML);
    let row = json!({"prompt": "say hel", "completion": "lo!"});
    assert_eq!(texts(&tokenizer, row), pair("<s>say hello!<|im_end|>", "!<|im_end|>"));
}

#[test]
fn an_end_token_is_added_once() {
    let (dir, tokenizer) = tokenizer(CHATML);
    let ended = pair("<s>hello<|im_end|>", "hello<|im_end|>");
    assert_eq!(texts(&tokenizer, json!({"text": "hello"})), ended);
    assert_eq!(texts(&tokenizer, json!({"text": "hello<|im_end|>"})), ended);
    // A post-processor that ends texts itself.
    save_tokenizer(dir.path(), &["<s>", "$A", "<|im_end|>"]);
    let tokenizer = Tokenizer::from_dir(dir.path()).expect("valid");
    assert_eq!(texts(&tokenizer, json!({"text": "hello"})), ended);
    assert_eq!(texts(&tokenizer, json!({"prompt": "he", "completion": "!"})), pair("<s>he!<|im_end|>", "!<|im_end|>"));
    // A checkpoint that names no end token.
    write_json(dir.path(), "tokenizer_config.json", &json!({}));
    save_tokenizer(dir.path(), &["$A"]);
    let tokenizer = Tokenizer::from_dir(dir.path()).expect("valid");
    assert_eq!(texts(&tokenizer, json!({"text": "hello"})), pair("hello", "hello"));
}

#[test]
fn ids_are_taken_as_given() {
    let row = |value| encode(RowContent::from_json(value).expect("valid"), 4, None).expect("encodable");
    let all = row(json!({"input_ids": [1, 2, 3]}));
    assert_eq!(all, Encoded { input_ids: vec![1, 2, 3], labels: vec![1, 2, 3], line: 4 });
    let some = row(json!({"input_ids": [1, 2, 3], "labels": [1, -100, 3]}));
    assert_eq!(some.labels, [1, IGNORED, 3]);
    assert_eq!(some.trained_tokens(), 1);
}

#[test]
fn other_rows_need_a_tokenizer_and_a_template() {
    let content =
        || RowContent::from_json(json!({"messages": [{"role": "assistant", "content": "A"}]})).expect("valid");
    assert_eq!(
        encode(content(), 1, None).expect_err("no tokenizer"),
        "this kind of row needs a tokenizer; only \"input_ids\" does without"
    );
    let dir = checkpoint();
    let tokenizer = Tokenizer::from_dir(dir.path()).expect("valid");
    let error = encode(content(), 1, Some(&tokenizer)).expect_err("no template");
    assert!(error.contains("has no chat template; add a chat_template.jinja, or use rows with"), "{error}");
}
