use serde_json::{Value, json};

use super::*;
use crate::mask::{NotShown, Thinking};
use crate::test_support::{
    BRACKETS, CHATML, DEFAULT_SYSTEM, HEADERS, MARKED, THINKING, checkpoint, save_tokenizer, tokenizer, write_json,
};

fn try_encode(tokenizer: &Tokenizer, row: Value, options: &EncodeOptions) -> Result<Encoded, String> {
    encode(RowContent::from_json(row).expect("a valid row"), 1, Some(tokenizer), options)
}

/// Returns the text of all tokens of a row, and of those whose label counts.
fn texts(tokenizer: &Tokenizer, row: Value) -> (String, String) {
    texts_with(tokenizer, row, &EncodeOptions::default())
}

fn texts_with(tokenizer: &Tokenizer, row: Value, options: &EncodeOptions) -> (String, String) {
    let example = try_encode(tokenizer, row, options).expect("encodable");
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

fn turn(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

fn pair(all: &str, trained: &str) -> (String, String) {
    (all.to_owned(), trained.to_owned())
}

/// Contents with merges across words, multi-byte characters, leading, trailing and inner white space, and markup.
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

/// The loss of a chat covers the contents of its assistant turns with their end tokens, whatever else the chat
/// contains.
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
    let row = json!({
        "prompt": [turn("user", "Q"), turn("assistant", "A"), turn("user", "R")],
        "completion": [turn("assistant", "B")],
    });
    assert_eq!(texts(&tokenizer, row).1, "B<|im_end|>\n");
}

/// The tokenizer's post-processor trims offsets, which would assign the spaces before "A" to the completion.
#[test]
fn spaces_before_the_completion_are_the_prompts() {
    let (_dir, tokenizer) = tokenizer(CHATML);
    let row = json!({"prompt": "Q:   ", "completion": "A"});
    assert_eq!(texts(&tokenizer, row), pair("<s>Q:   A<|im_end|>", "A<|im_end|>"));
}

/// "hello" and " w" are one token each. The model receives the text before the completion, and must generate exactly
/// the completion.
#[test]
fn a_token_across_the_border_is_two() {
    let (_dir, tokenizer) = tokenizer(CHATML);
    for (prompt, completion) in [("say hel", "lo!"), ("say hel", "lo"), ("It is ", "w")] {
        let row =
            try_encode(&tokenizer, json!({"prompt": prompt, "completion": completion}), &EncodeOptions::default());
        let row = row.expect("encodable");
        let given = row.labels.iter().position(|&label| label != IGNORED).expect("something is trained");
        assert_eq!(row.input_ids[..given], tokenizer.encode(prompt, true).expect("encodable"), "{prompt:?}");
        let mut made = tokenizer.encode(completion, false).expect("encodable");
        made.extend(tokenizer.eos_id());
        assert_eq!(row.input_ids[given..], made, "{completion:?}");
        assert!(row.notes.joined);
    }
    let row = json!({"prompt": "say ", "completion": "no"});
    assert!(!try_encode(&tokenizer, row, &EncodeOptions::default()).expect("encodable").notes.joined);
    // Trained as one text, all of it counts.
    let row = json!({"prompt": "say hel", "completion": "lo!"});
    let all = try_encode(&tokenizer, row, &train_on(TrainOn::All)).expect("encodable");
    assert_eq!((all.input_ids.len(), all.notes.joined), (8, false));
}

#[test]
fn a_generation_prompt_that_ends_in_a_space() {
    let source = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content }}<|im_end|>{% endfor %}\
                  {% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}";
    let (_dir, tokenizer) = tokenizer(source);
    let row =
        json!({"messages": [turn("user", "w"), turn("assistant", "w"), turn("user", "w"), turn("assistant", "w!")]});
    let encoded = try_encode(&tokenizer, row.clone(), &EncodeOptions::default()).expect("encodable");
    assert!(encoded.notes.joined);
    assert_eq!(texts(&tokenizer, row.clone()).1, "w<|im_end|>w!<|im_end|>");
    assert_eq!(texts_with(&tokenizer, row.clone(), &train_on(TrainOn::LastAssistant)).1, "w!<|im_end|>");
    // The template's own marks are transformers' masks, where a token counts of which any part is marked.
    let marked = source.replace(
        "{{ m.role ~ ': ' ~ m.content }}<|im_end|>",
        "{{ m.role ~ ': ' }}\
                                {% generation %}{{ m.content }}<|im_end|>{% endgeneration %}",
    );
    let marked = marked.replace("{% for m in messages %}", "{% for m in messages if m.role == 'assistant' %}");
    let (_dir, tokenizer) = crate::test_support::tokenizer(&marked);
    let row = json!({"messages": [turn("assistant", "w")]});
    let encoded = try_encode(&tokenizer, row.clone(), &EncodeOptions::default()).expect("encodable");
    assert_eq!((texts(&tokenizer, row).1.as_str(), encoded.notes.joined), (" w<|im_end|>", false));
}

/// A tokenizer that adds a space before every text cannot encode the completion separately.
#[test]
fn where_the_parts_read_otherwise_the_whole_stays() {
    let (dir, _) = tokenizer(CHATML);
    let path = dir.path().join("tokenizer.json");
    let mut file: Value = serde_json::from_str(&std::fs::read_to_string(&path).expect("there")).expect("JSON");
    file["pre_tokenizer"]["add_prefix_space"] = json!(true);
    std::fs::write(&path, file.to_string()).expect("written");
    let tokenizer = Tokenizer::from_dir(dir.path()).expect("valid");
    let row = json!({"prompt": "It is ", "completion": "w"});
    let encoded = try_encode(&tokenizer, row.clone(), &EncodeOptions::default()).expect("encodable");
    assert_eq!((texts(&tokenizer, row).1.as_str(), encoded.notes.joined), (" w<|im_end|>", true));
}

/// The white space after the reasoning may share a token with the answer.
#[test]
fn a_token_of_thought_and_answer_is_trained() {
    let source = "{% for m in messages %}{{ m.role ~ ':' ~ m.content }}<|im_end|>{% endfor %}\
                  {% if add_generation_prompt %}assistant:{% endif %}";
    let (_dir, tokenizer) = tokenizer(source);
    let row = json!({"messages": [turn("user", "Q"), turn("assistant", "<think>so</think> w")]});
    assert_eq!(texts_with(&tokenizer, row.clone(), &thinking(Thinking::Mask)).1, " w<|im_end|>");
    let all = EncodeOptions { train_on: TrainOn::All, ..thinking(Thinking::Mask) };
    assert_eq!(texts_with(&tokenizer, row, &all).1, "user:Q<|im_end|>assistant: w<|im_end|>");
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
    let tokenizer = Tokenizer::from_dir(dir.path()).expect("valid");
    let error = try_encode(&tokenizer, json!({"text": "hello"}), &EncodeOptions::default()).expect_err("no end");
    assert!(error.starts_with("rows of text need an end token, and the checkpoint names none"), "{error}");
}

#[test]
fn there_is_never_a_second_bos() {
    // The tokenizer puts <s> before a text.
    let (_dir, tokenizer) = tokenizer(BRACKETS);
    let once = pair("<s>hello<|im_end|>", "hello<|im_end|>");
    assert_eq!(texts(&tokenizer, json!({"text": "hello"})), once);
    assert_eq!(texts(&tokenizer, json!({"text": "<s>hello"})).0, once.0);
    let row = json!({"prompt": "<s>hel", "completion": "lo<|im_end|>"});
    assert_eq!(texts(&tokenizer, row).0, once.0);
    // The template writes it; one in the messages is one too many.
    let row = |text: &str| json!({"messages": [turn("system", text), turn("user", "Q"), turn("assistant", "A")]});
    assert!(texts(&tokenizer, row("S")).0.starts_with("<s>[INST] <<SYS>>"));
    let (_dir, tokenizer) =
        crate::test_support::tokenizer("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>");
    let error = try_encode(&tokenizer, row("<s>S"), &EncodeOptions::default()).expect_err("two of them");
    assert!(error.starts_with("begins with two BOS tokens"), "{error}");
}

#[test]
fn ids_are_taken_as_given() {
    let row = |value| {
        let content = RowContent::from_json(value).expect("valid");
        encode(content, 4, None, &EncodeOptions::default()).expect("encodable")
    };
    let all = row(json!({"input_ids": [1, 2, 3]}));
    assert_eq!(
        all,
        Encoded {
            input_ids: vec![1, 2, 3],
            labels: vec![1, 2, 3],
            line: 4,
            notes: RowNotes::default(),
            preferred: None
        }
    );
    let some = row(json!({"input_ids": [1, 2, 3], "labels": [1, -100, 3]}));
    assert_eq!(some.labels, [1, IGNORED, 3]);
    assert_eq!(some.trained_tokens(), 1);
}

#[test]
fn other_rows_need_a_tokenizer_and_a_template() {
    let content =
        || RowContent::from_json(json!({"messages": [{"role": "assistant", "content": "A"}]})).expect("valid");
    assert_eq!(
        encode(content(), 1, None, &EncodeOptions::default()).expect_err("no tokenizer"),
        "this kind of row needs a tokenizer; without one, use rows of \"input_ids\""
    );
    let dir = checkpoint();
    let tokenizer = Tokenizer::from_dir(dir.path()).expect("valid");
    let error = encode(content(), 1, Some(&tokenizer), &EncodeOptions::default()).expect_err("no template");
    assert!(error.contains("has no chat template; add a chat_template.jinja, or use rows with"), "{error}");
}

fn train_on(train_on: TrainOn) -> EncodeOptions {
    EncodeOptions { train_on, ..EncodeOptions::default() }
}

fn thinking(thinking: Thinking) -> EncodeOptions {
    EncodeOptions { thinking, ..EncodeOptions::default() }
}

#[test]
fn turns_are_chosen() {
    let (_dir, tokenizer) = tokenizer(CHATML);
    let row =
        json!({"messages": [turn("user", "Q"), turn("assistant", "A"), turn("user", "R"), turn("assistant", "B")]});
    let trained = |options: &EncodeOptions| texts_with(&tokenizer, row.clone(), options).1;
    assert_eq!(trained(&train_on(TrainOn::Assistant)), "A<|im_end|>\nB<|im_end|>\n");
    assert_eq!(trained(&train_on(TrainOn::LastAssistant)), "B<|im_end|>\n");
    let all = texts_with(&tokenizer, row.clone(), &train_on(TrainOn::All));
    assert_eq!(all.0, all.1);
    // A prompt counts with "all", and only then.
    let row = json!({"prompt": "Q: ", "completion": "A"});
    assert_eq!(texts_with(&tokenizer, row.clone(), &train_on(TrainOn::All)).1, "Q: A<|im_end|>");
    assert_eq!(texts_with(&tokenizer, row, &train_on(TrainOn::LastAssistant)).1, "A<|im_end|>");
}

#[test]
fn a_turn_may_say_that_it_is_not_trained() {
    let (_dir, tokenizer) = tokenizer(CHATML);
    let untrained = json!({"role": "assistant", "content": "A", "train": false});
    let row = json!({"messages": [turn("user", "Q"), untrained, turn("user", "R"), turn("assistant", "B")]});
    assert_eq!(texts(&tokenizer, row.clone()).1, "B<|im_end|>\n");
    let (all, trained) = texts_with(&tokenizer, row, &train_on(TrainOn::All));
    assert_eq!(trained, all.replacen("A<|im_end|>\n", "", 1));
}

#[test]
fn thoughts_are_kept_stripped_or_masked() {
    let (_dir, tokenizer) = tokenizer(THINKING);
    let row = json!({"messages": [
        turn("user", "Q"), turn("assistant", "<think>\nwhy\n</think>\n\nA"),
        turn("user", "R"), json!({"role": "assistant", "content": "B", "reasoning_content": "so"}),
    ]});
    let of = |how: Thinking| texts_with(&tokenizer, row.clone(), &thinking(how));
    let (kept, stripped, masked) = (of(Thinking::Keep), of(Thinking::Strip), of(Thinking::Mask));
    // The template shows only the last turn's, and an empty one where there is none.
    assert_eq!(kept.1, "A<|im_end|>\n<think>\nso\n</think>\n\nB<|im_end|>\n");
    assert_eq!(stripped.1, "A<|im_end|>\n<think>\n\n</think>\n\nB<|im_end|>\n");
    assert_eq!(masked, (kept.0, "A<|im_end|>\nB<|im_end|>\n".to_owned()));
    let all = EncodeOptions { train_on: TrainOn::All, ..thinking(Thinking::Mask) };
    let (all, trained) = texts_with(&tokenizer, row.clone(), &all);
    assert_eq!(trained, all.replacen("<think>\nso\n</think>\n\n", "", 1));
}

#[test]
fn marked_turns_count_without_what_follows_them() {
    let (_dir, tokenizer) = tokenizer(MARKED);
    let row = json!({"messages": [turn("user", "Q"), turn("assistant", " A")]});
    assert_eq!(texts(&tokenizer, row).1, "A<|im_end|>");
}

/// As gpt-oss's: turns within a conversation end with a token that generation does not stop at, and the reasoning of
/// earlier turns is dropped.
#[test]
fn an_inner_end_of_turn_is_not_trained() {
    let source = "{% for m in messages %}{% if m.role == 'assistant' %}\
                  {% if loop.last and m.thinking %}{{ '#analysis ' ~ m.thinking ~ '</s>' }}{% endif %}\
                  {{ '#final ' ~ m.content ~ ('<|im_end|>' if loop.last else '</s>') }}\
                  {% else %}{{ '#user ' ~ m.content ~ '</s>' }}{% endif %}{% endfor %}\
                  {% if add_generation_prompt %}{{ '#' }}{% endif %}";
    let (_dir, tokenizer) = tokenizer(source);
    let thinking = |content: &str| json!({"role": "assistant", "content": content, "thinking": "hm"});
    let row = json!({"messages": [turn("user", "Q"), thinking("A"), turn("user", "R"), thinking("B")]});
    let encode = |options: &EncodeOptions| texts_with(&tokenizer, row.clone(), options);
    let (text, trained) = encode(&train_on(TrainOn::Assistant));
    assert_eq!(text, "#user Q</s>#final A</s>#user R</s>#analysis hm</s>#final B<|im_end|>");
    assert_eq!(trained, "final Aanalysis hm</s>#final B<|im_end|>");
    assert_eq!(encode(&train_on(TrainOn::LastAssistant)).1, "analysis hm</s>#final B<|im_end|>");
    let (text, all) = encode(&train_on(TrainOn::All));
    assert!(text.ends_with(&all) && all.contains("A</s>"), "{all}");
}

/// A model that never sees an end token after an answer does not learn to stop.
#[test]
fn every_turn_ends_with_an_end_token() {
    let row =
        json!({"messages": [turn("user", "Q"), turn("assistant", "A"), turn("user", "R"), turn("assistant", "B")]});
    let error = |source: &str, options: &EncodeOptions| {
        let (dir, tokenizer) = tokenizer(source);
        let error = try_encode(&tokenizer, row.clone(), options).err();
        error.map(|error| error.replace(&dir.path().display().to_string(), "DIR"))
    };
    let turns = |end: &str| format!("{{% for m in messages %}}{{{{ m.role ~ ': ' ~ m.content }}}}{end}{{% endfor %}}");
    let assistant = train_on(TrainOn::Assistant);
    let stop = "so the model would not learn to stop";
    let way_out = "let it write <|im_end|> after every assistant turn, or train the last turn alone with \
                   data.train_on = \"last_assistant\" where that one ends so";
    assert_eq!(
        error(&turns("{{ '\\n' }}"), &assistant).expect("no end token"),
        format!(
            "the chat template DIR/chat_template.jinja ends messages[1] (assistant) without an end token, {stop}; {way_out}"
        )
    );
    // Only the last turn has one.
    let last = turns("{{ '<|im_end|>' if loop.last else ';' }}");
    assert!(error(&last, &assistant).is_some_and(|error| error.contains("messages[1]")));
    assert_eq!(error(&last, &train_on(TrainOn::LastAssistant)), None);
    // The text after it would be trained as well.
    assert!(error(&turns("<|im_end|> ok?"), &assistant).is_some());
    // The template's own, which the checkpoint does not stop at.
    assert_eq!(error(&turns("<|eot|>"), &assistant), None);
    // One that neither knows.
    let other = turns("{{ '</s>' if m.content == 'B' else '<|im_end|>' }}");
    let found = error(&other, &assistant).expect("another token");
    assert!(found.contains("ends messages[3] (assistant) with </s>, "), "{found}");
    // Marks that leave it out.
    let marked = turns("").replace("m.role ~ ': ' ~ m.content", "m.role") + "{{ '<|im_end|>' }}";
    let marked = marked.replace("{{ m.role }}", "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>");
    let marked = marked.replace("{% for m in messages %}", "{% for m in messages if m.role == 'assistant' %}");
    let found = error(&marked, &assistant).expect("marks before the end token");
    assert!(found.ends_with("put <|im_end|> before {% endgeneration %}"), "{found}");
}

#[test]
fn what_the_template_leaves_out_is_an_error_or_counted() {
    let (dir, tokenizer) = tokenizer(CHATML);
    let error = |row: Value, options: &EncodeOptions| {
        try_encode(&tokenizer, row, options).expect_err("left out").replace(&dir.path().display().to_string(), "DIR")
    };
    let call = json!({"role": "assistant", "content": null, "tool_calls": [{"name": "clock", "arguments": {}}]});
    let row = json!({"messages": [turn("user", "Q"), call, turn("tool", "5"), turn("assistant", "A")]});
    assert_eq!(
        error(row.clone(), &EncodeOptions::default()),
        "the chat template DIR/chat_template.jinja does not render messages[1].tool_calls[0]; use a template that does, or \
         set data.not_shown = \"drop\" to drop such rows or \"allow\" to train them without it"
    );
    for not_shown in [NotShown::Drop, NotShown::Allow] {
        let options = EncodeOptions { not_shown, ..EncodeOptions::default() };
        assert!(try_encode(&tokenizer, row.clone(), &options).expect("encodable").notes.not_shown);
    }
    // Reasoning can be omitted on purpose.
    let row =
        json!({"messages": [turn("user", "Q"), {"role": "assistant", "content": "A", "reasoning_content": "why"}]});
    for how in [Thinking::Keep, Thinking::Mask] {
        let found = error(row.clone(), &thinking(how));
        assert!(
            found.contains("messages[1].reasoning_content; use a template that does, or set data.thinking = \"strip\""),
            "{found}"
        );
    }
    let stripped = try_encode(&tokenizer, row.clone(), &thinking(Thinking::Strip)).expect("encodable");
    assert!(!stripped.notes.not_shown);
    // That of a turn that is not trained is nobody's loss.
    let mut untrained = row;
    untrained["messages"][1]["train"] = json!(false);
    untrained["messages"].as_array_mut().expect("a list").extend([turn("user", "R"), turn("assistant", "B")]);
    assert!(!try_encode(&tokenizer, untrained, &EncodeOptions::default()).expect("encodable").notes.not_shown);
}
