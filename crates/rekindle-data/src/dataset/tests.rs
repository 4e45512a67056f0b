use std::path::Path;

use super::*;
use crate::error::Result;
use crate::test_support::{BRACKETS, CHATML, checkpoint, tokenizer, write_json, write_rows};
use crate::{DataFiles, EncodeOptions, ErrorKind, LoadReport, Overlong, RowTask, Tokenizer, Untrained};

const ROWS: &str =
    "{\"input_ids\": [1, 2, 3]}\n\n{\"input_ids\": [1, 2, 3, 4, 5, 6], \"labels\": [-100, -100, -100, 4, 5, 6]}\n";

fn load(rows: &str, options: EncodeOptions) -> Result<(Dataset, LoadReport), String> {
    let (_dir, path) = write_rows(rows);
    Dataset::load(&path, None, &options).map_err(|error| {
        assert_eq!(error.kind(), ErrorKind::Data);
        error.to_string().replace(&path.display().to_string(), "rows.jsonl")
    })
}

fn at_most(max_seq_length: usize, overlong: Overlong) -> EncodeOptions {
    EncodeOptions { max_seq_length, overlong, ..EncodeOptions::default() }
}

fn vocabulary(size: usize) -> EncodeOptions {
    EncodeOptions { vocab_size: Some(size), ..EncodeOptions::default() }
}

#[test]
fn the_report_counts() {
    let (dataset, report) = load(ROWS, at_most(6, Overlong::Error)).expect("loads");
    assert_eq!(dataset.examples().map(|example| example.row.get()).collect::<Vec<_>>(), [1, 3]);
    assert_eq!(report.to_string(), "2 rows (input_ids), 9 tokens, 5 trained; longest row 6 (line 3)");
}

const PAIRS: &str = "{\"prompt_ids\": [1, 2], \"chosen_ids\": [3, 4], \"rejected_ids\": [5]}\n\
     {\"prompt_ids\": [1, 2], \"chosen_ids\": [3], \"rejected_ids\": [3]}\n\
     {\"prompt_ids\": [1, 2, 3], \"chosen_ids\": [6, 7, 8], \"rejected_ids\": [6, 7, 9]}\n";

fn pairs(max_seq_length: usize, overlong: Overlong) -> EncodeOptions {
    EncodeOptions { task: RowTask::Pairs, ..at_most(max_seq_length, overlong) }
}

#[test]
fn pairs_are_two_examples_and_those_without_a_difference_are_counted() {
    let (dataset, report) = load(PAIRS, pairs(6, Overlong::Error)).expect("loads");
    let of = |index: usize| {
        let example = dataset.example(index);
        (example.input_ids.to_vec(), example.labels.to_vec(), example.preferred, example.row.get())
    };
    assert_eq!(of(0), (vec![1, 2, 3, 4], vec![-100, -100, 3, 4], Some(true), 1));
    assert_eq!(of(1), (vec![1, 2, 5], vec![-100, -100, 5], Some(false), 1));
    assert_eq!((of(3).2, of(3).3, dataset.len(), dataset.task()), (Some(false), 3, 4, RowTask::Pairs));
    assert_eq!((report.rows, report.examples, report.identical, report.preferred), (3, 4, 1, Some(2)));
    assert!(report.to_string().contains("1 dropped because chosen and rejected are the same (line 2)"), "{report}");
    // The long pair differs only in its last token.
    let (dataset, report) = load(PAIRS, pairs(5, Overlong::Truncate)).expect("loads");
    assert_eq!((dataset.len(), report.truncated, report.identical), (2, 0, 2));
    let (dataset, report) = load(PAIRS, pairs(3, Overlong::Truncate)).expect("loads");
    assert_eq!((dataset.len(), report.truncated, report.dropped), (2, 1, 1), "the prompt of the last is too long");
    let (dataset, report) = load(PAIRS, pairs(5, Overlong::Drop)).expect("loads");
    assert_eq!((dataset.len(), report.dropped), (2, 1));
    let same = PAIRS.lines().nth(1).expect("the second row");
    assert_eq!(
        load(same, pairs(6, Overlong::Error)).expect_err("nothing is left"),
        "rows.jsonl: no row is left: the chosen and the rejected answer are the same in all of them"
    );
    let error = load(PAIRS, at_most(6, Overlong::Error)).expect_err("not for supervised fine-tuning");
    assert!(error.contains("unknown kind of row"), "{error}");
    let error = load(ROWS, pairs(6, Overlong::Error)).expect_err("no pairs");
    assert!(error.contains("has no \"chosen\", and this method compares a chosen with a rejected answer"), "{error}");
}

#[test]
fn labelled_answers_are_counted_and_pairs_are_two_of_them() {
    let rows = format!("{{\"prompt_ids\": [1], \"completion_ids\": [2], \"label\": false}}\n{PAIRS}");
    let options = EncodeOptions { task: RowTask::Labelled, ..at_most(6, Overlong::Error) };
    let (dataset, report) = load(&rows, options).expect("loads");
    let preferred: Vec<_> = dataset.examples().map(|example| example.preferred).collect();
    assert_eq!(preferred, [Some(false), Some(true), Some(false), Some(true), Some(false)]);
    assert!(report.to_string().contains("; 2 desirable and 3 undesirable"), "{report}");
}

#[test]
fn preferences_are_cached() {
    let (_dir, path) = write_rows(PAIRS);
    let cache = tempfile::tempdir().expect("a directory");
    let files = DataFiles::find([&path]).expect("a file").cache_dir(cache.path());
    let options = pairs(6, Overlong::Error);
    let (made, _) = files.load(None, &options).expect("loads");
    let (read, report) = files.load(None, &options).expect("loads");
    assert!(matches!(report.cache, crate::CacheUse::Read(_)), "{:?}", report.cache);
    assert!(made.examples().eq(read.examples()) && read.task() == RowTask::Pairs);
    assert_eq!(report.preferred, Some(2));
}

#[test]
fn preferences_of_texts_and_conversations_are_encoded_as_completions_are() {
    let encode = |tokenizer: &Tokenizer, row: &str, task: RowTask| {
        let (_dir, path) = write_rows(row);
        let options = EncodeOptions { task, ..EncodeOptions::default() };
        Dataset::load(&path, Some(tokenizer), &options).expect("loads").0
    };
    let turn = |role: &str, content: &str| format!("{{\"role\": \"{role}\", \"content\": \"{content}\"}}");
    let (user, good, bad) = (turn("user", "Q?"), turn("assistant", "good"), turn("assistant", "bad"));
    let (_dir, with_template) = tokenizer(CHATML);
    let plain = checkpoint();
    let without = Tokenizer::from_dir(plain.path()).expect("a valid tokenizer");
    for (tokenizer, pair, sides) in [
        (
            &with_template,
            format!("{{\"chosen\": [{user}, {good}], \"rejected\": [{user}, {bad}]}}"),
            [&good, &bad].map(|answer| format!("{{\"prompt\": [{user}], \"completion\": [{answer}]}}")),
        ),
        (
            &without,
            "{\"prompt\": \"Q? \", \"chosen\": \"good\", \"rejected\": \"bad\"}".to_owned(),
            ["good", "bad"].map(|answer| format!("{{\"prompt\": \"Q? \", \"completion\": \"{answer}\"}}")),
        ),
    ] {
        let pairs = encode(tokenizer, &pair, RowTask::Pairs);
        for (index, side) in sides.iter().enumerate() {
            let alone = encode(tokenizer, side, RowTask::Sft);
            let (ours, theirs) = (pairs.example(index), alone.example(0));
            assert_eq!((ours.input_ids, ours.labels), (theirs.input_ids, theirs.labels), "{side}");
        }
    }
    // Texts that contain their prompt: it ends where their tokens differ.
    let pairs = encode(&without, "{\"chosen\": \"Q? yes\", \"rejected\": \"Q? no\"}", RowTask::Pairs);
    for example in pairs.examples() {
        let shared = example.labels.iter().take_while(|label| **label == -100).count();
        assert_eq!(without.decode(&example.input_ids[..shared], true).expect("decodes").trim_end(), "Q?");
    }
}

#[test]
fn a_long_row_is_an_error_that_names_the_choices() {
    assert_eq!(
        load(ROWS, at_most(5, Overlong::Error)).expect_err("too long"),
        "rows.jsonl:3: has 6 tokens, more than max_seq_length = 5; raise it, or set data.overlong = \"drop\" | \
         \"truncate\" | \"split\""
    );
}

#[test]
fn long_rows_can_be_dropped() {
    let (dataset, report) = load(ROWS, at_most(5, Overlong::Drop)).expect("loads");
    assert_eq!(dataset.len(), 1);
    assert_eq!(
        report.to_string(),
        "2 rows (input_ids), 3 tokens, 2 trained; longest row 6 (line 3); 1 dropped (line 3)"
    );
}

#[test]
fn long_rows_can_be_cut() {
    let (dataset, report) = load(ROWS, at_most(5, Overlong::Truncate)).expect("loads");
    assert_eq!(dataset.example(1).labels, [-100, -100, -100, 4, 5]);
    assert_eq!((report.truncated, report.dropped), (1, 0));
    // Nothing to learn is left of the second row.
    let (dataset, report) = load(ROWS, at_most(3, Overlong::Truncate)).expect("loads");
    assert_eq!((dataset.len(), report.truncated, report.dropped), (1, 0, 1));
}

#[test]
fn long_rows_can_be_split() {
    let (dataset, report) = load(ROWS, at_most(4, Overlong::Split)).expect("loads");
    let pieces: Vec<_> = dataset.examples().skip(1).map(|piece| (piece.input_ids, piece.row.get())).collect();
    assert_eq!(pieces, [(&[1, 2, 3, 4][..], 3), (&[4, 5, 6][..], 3)]);
    assert_eq!(
        report.to_string(),
        "2 rows (input_ids), 10 tokens, 5 trained; longest row 6 (line 3); 1 split (line 3); 3 examples"
    );
}

#[test]
fn a_row_without_a_label_is_named_and_a_file_of_them_too() {
    let none = "{\"input_ids\": [1, 2], \"labels\": [1, -100]}\n";
    assert_eq!(
        load(&format!("{ROWS}{none}"), EncodeOptions::default()).expect_err("no token to train on"),
        "rows.jsonl:4: the row has no token to train on (the first token is never trained); remove it, or set \
         data.untrained = \"drop\""
    );
    let options = EncodeOptions { untrained: Untrained::Drop, ..EncodeOptions::default() };
    let (dataset, report) = load(&format!("{ROWS}{none}"), options).expect("loads");
    assert_eq!((dataset.len(), report.rows, report.untrained), (2, 3, 1));
    assert!(report.to_string().ends_with("; 1 dropped because they have no token to train (line 4)"), "{report}");
    assert_eq!(
        load(&none.repeat(3), EncodeOptions::default()).expect_err("no token to train on"),
        "rows.jsonl: no row has a token to train on: all labels are ignored"
    );
}

#[test]
fn ids_beyond_the_vocabulary_are_named() {
    load(ROWS, vocabulary(7)).expect("6 is the largest id");
    assert_eq!(
        load(ROWS, vocabulary(6)).expect_err("beyond"),
        "rows.jsonl:3: token id 6 is outside the model's vocabulary of 6 (0 to 5); check that the row was made with \
         this model's tokenizer"
    );
    let error = load("{\"input_ids\": [1, 2], \"labels\": [-100, 9]}", vocabulary(6)).expect_err("beyond");
    assert!(error.starts_with("rows.jsonl:1: label 9 is outside the model's vocabulary of 6 (0 to 5)"), "{error}");
}

#[test]
fn nothing_to_load_is_an_error() {
    assert_eq!(
        load("\n", EncodeOptions::default()).expect_err("empty"),
        "rows.jsonl: the dataset is empty; expected rows, such as one JSON object per line"
    );
    assert_eq!(
        load(ROWS, at_most(2, Overlong::Drop)).expect_err("all dropped"),
        "rows.jsonl: no row is left: each is longer than max_seq_length = 2 (the longest has 6 tokens)"
    );
}

#[test]
fn a_length_that_leaves_nothing_to_predict_is_refused() {
    let error = Dataset::load(Path::new("x"), None, &at_most(1, Overlong::Drop)).expect_err("an option");
    assert_eq!(error.kind(), ErrorKind::Options);
    assert_eq!(error.to_string(), "max_seq_length = 1 leaves nothing to predict; it must be at least 2");
}

#[test]
fn kinds_of_rows_may_be_mixed() {
    let (_dir, tokenizer) = tokenizer(CHATML);
    let (_rows, path) = write_rows(
        "{\"text\": \"ab\"}\n{\"prompt\": \"a\", \"completion\": \"b\"}\n\
         {\"messages\": [{\"role\": \"user\", \"content\": \"Q\"}, {\"role\": \"assistant\", \"content\": \"A\"}]}\n",
    );
    let (_, report) = Dataset::load(&path, Some(&tokenizer), &vocabulary(tokenizer.vocab_size())).expect("loads");
    // "ab" and "b" with an end token each, "A" with end token and newline.
    assert_eq!((report.formats.len(), report.trained_tokens), (3, 3 + 2 + 3));
}

#[test]
fn a_row_that_the_template_refuses_is_a_data_error() {
    let (_dir, tokenizer) = tokenizer(BRACKETS);
    let (_rows, path) = write_rows("{\"messages\": [{\"role\": \"assistant\", \"content\": \"A\"}]}");
    let error = Dataset::load(&path, Some(&tokenizer), &EncodeOptions::default()).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Data);
    let expected =
        "rows.jsonl:1: the chat template failed: user and assistant must take turns (line 10 of the template)";
    assert!(error.to_string().ends_with(expected), "{error}");
}

#[test]
fn what_the_checkpoint_lacks_is_not_the_rows_fault() {
    let dir = checkpoint();
    let tokenizer = Tokenizer::from_dir(dir.path()).expect("valid");
    let (_rows, path) = write_rows("{\"messages\": [{\"role\": \"assistant\", \"content\": \"A\"}]}");
    let error = Dataset::load(&path, Some(&tokenizer), &EncodeOptions::default()).expect_err("no template");
    assert_eq!(error.kind(), ErrorKind::Tokenizer);
    assert!(error.to_string().contains("this checkpoint has no chat template"), "{error}");
    let error = Dataset::load(&path, None, &EncodeOptions::default()).expect_err("no tokenizer");
    assert_eq!(error.kind(), ErrorKind::Tokenizer);
    assert!(error.to_string().starts_with("tokenizer.json: the checkpoint has none"), "{error}");

    write_json(dir.path(), "tokenizer_config.json", &serde_json::json!({}));
    let tokenizer = Tokenizer::from_dir(dir.path()).expect("valid");
    let (_rows, path) = write_rows("{\"text\": \"ab\"}");
    let error = Dataset::load(&path, Some(&tokenizer), &EncodeOptions::default()).expect_err("no end token");
    assert_eq!(error.kind(), ErrorKind::Data);
    assert!(error.to_string().contains("rows of text need an end token, and the checkpoint names none"), "{error}");
}

#[test]
fn files_are_read_in_their_order_and_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).expect("written");
    write("b.jsonl", ROWS);
    write("a.json", "[{\"input_ids\": [7, 8]}, {\"input_ids\": [1, 2, 3, 4, 5, 6, 7]}]");
    let (dataset, report) = Dataset::load(dir.path(), None, &at_most(5, Overlong::Drop)).expect("loads");
    let places = dataset.examples().map(|example| (example.path.file_name().expect("a file").to_owned(), example.row));
    assert_eq!(
        places.collect::<Vec<_>>(),
        [("a.json".into(), RowNumber::Row(1)), ("b.jsonl".into(), RowNumber::Line(1))]
    );
    let report = report.to_string().replace(&format!("{}/", dir.path().display()), "");
    assert_eq!(
        report,
        "4 rows of 2 files (input_ids), 5 tokens, 3 trained; longest row 7 (a.json, row 2); 2 dropped (a.json, row 2, \
         b.jsonl:3)"
    );
    // One of them is empty: a mistake, whatever the others hold.
    write("c.jsonl", "");
    let error = Dataset::load(dir.path(), None, &at_most(9, Overlong::Drop)).expect_err("empty");
    assert!(error.to_string().contains("c.jsonl: the dataset is empty"), "{error}");
}

#[test]
fn the_first_wrong_row_is_the_error_however_many_are_wrong() {
    let row = |i: usize| format!("{{\"input_ids\": [1, {}]}}\n", if i % 700 == 699 { "\"x\"" } else { "2" });
    let rows: String = (0..5_000).map(row).collect();
    let cut = format!("{}{{\"input_ids\": [1,", row(0));
    for (text, first) in [(rows, 700), (cut, 2)] {
        let error = load(&text, EncodeOptions::default()).expect_err("wrong rows");
        assert!(error.starts_with(&format!("rows.jsonl:{first}: ")), "{error}");
    }
}

#[test]
fn only_the_first_of_many_changed_rows_are_named() {
    let (_, report) = load(&"{\"input_ids\": [1, 2, 3]}\n".repeat(9), at_most(2, Overlong::Truncate)).expect("loads");
    assert!(report.to_string().ends_with("; 9 truncated (line 1, line 2, line 3, …)"), "{report}");
}

#[test]
fn an_alpaca_row_follows_the_checkpoint() {
    let (_rows, path) = write_rows("{\"instruction\": \"Q\", \"input\": \"\", \"output\": \"A\"}");
    let text = |tokenizer: &Tokenizer| {
        let (dataset, report) = Dataset::load(&path, Some(tokenizer), &EncodeOptions::default()).expect("loads");
        assert!(report.to_string().starts_with("1 row (instruction + output (alpaca)), "), "{report}");
        tokenizer.decode(dataset.example(0).input_ids, false).expect("decodable")
    };
    let (_dir, chat) = tokenizer(CHATML);
    assert_eq!(text(&chat), "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n");
    let dir = checkpoint();
    let plain = Tokenizer::from_dir(dir.path()).expect("valid");
    assert!(text(&plain).ends_with("### Instruction:\nQ\n\n### Response:\nA<|im_end|>"), "{}", text(&plain));
}

#[test]
fn mapped_columns_that_are_nowhere_are_an_error() {
    let load = |pairs: &[(&str, &str)]| {
        let (_dir, path) = write_rows("{\"ids\": [1, 2]}\n{\"ids\": [3, 4], \"mask\": [-100, 4]}");
        let pairs = pairs.iter().map(|(key, column)| ((*key).to_owned(), (*column).to_owned()));
        let files = DataFiles::find([&path]).and_then(|files| files.columns(pairs.collect()));
        let loaded = files.and_then(|files| files.load(None, &EncodeOptions::default()));
        loaded.map_err(|error| error.to_string().replace(&path.display().to_string(), "rows.jsonl"))
    };
    assert_eq!(load(&[("input_ids", "ids"), ("labels", "mask")]).expect("loads").0.len(), 2);
    assert_eq!(
        load(&[("input_ids", "ids"), ("labels", "masks")]).expect_err("nowhere"),
        "rows.jsonl: no row has \"masks\" (for \"labels\"); correct columns, or remove \"labels\""
    );
    assert_eq!(
        load(&[("input_ids", "tokens")]).expect_err("nowhere"),
        "rows.jsonl:1: has no \"tokens\" (for \"input_ids\"); its keys: \"ids\""
    );
}

/// Integers in arguments, tools (also as text) and variables, in JSON lines and in JSON lists.
#[test]
fn integers_keep_their_digits_from_the_file_to_the_template() {
    let source = "{{ tools[0].function.name }} {{ tools[0].function.parameters.max }};{{ low }};{% for m in messages %}{{ m.content }}\
                  {% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>{% endfor %}";
    let (_dir, tokenizer) = crate::test_support::tokenizer(source);
    let tools = r#"[{"function": {"name": "pay", "parameters": {"max": 340282366920938463463374607431768211456}}}]"#;
    let row = |tools: &str, arguments: &str| {
        format!(
            r#"{{"messages": [{{"role": "user", "content": "q"}}, {{"role": "assistant", "content": "", "tool_calls":
               [{{"function": {{"name": "pay", "arguments": {arguments}}}}}]}}], "tools": {tools},
               "chat_template_kwargs": {{"low": -9223372036854775809}}}}"#
        )
        .replace('\n', " ")
    };
    let arguments = r#"{"wei": 25000000000000000000, "rate": 1e-5}"#;
    let as_text = |json: &str| serde_json::Value::from(json).to_string();
    let rows = [row(tools, arguments), row(&as_text(tools), &as_text(arguments))];
    let files = [("rows.jsonl", rows.join("\n")), ("rows.json", format!("[{}]", rows.join(", ")))];
    let options = EncodeOptions { not_shown: crate::NotShown::Allow, ..EncodeOptions::default() };
    for (name, text) in files {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join(name), text).expect("written");
        let (dataset, _) = Dataset::load(&dir.path().join(name), Some(&tokenizer), &options).expect("encodable");
        for example in dataset.examples() {
            assert_eq!(
                tokenizer.decode(example.input_ids, false).expect("decodable"),
                "pay 340282366920938463463374607431768211456;-9223372036854775809;q<|im_end|>{\"wei\": 25000000000000000000, \
                 \"rate\": 1e-05}<|im_end|>",
                "{name}"
            );
        }
    }
    // Where a number has no place, it is one.
    let error = |row: &str| {
        let (_dir, path) = write_rows(row);
        Dataset::load(&path, Some(&tokenizer), &options).expect_err("refused").to_string()
    };
    assert!(error(r#"{"text": 25000000000000000000}"#).ends_with("\"text\" is a number, not a string"));
    assert!(
        error(r#"{"input_ids": [25000000000000000000]}"#).contains("input_ids[0] is 25000000000000000000; expected")
    );
    assert!(error(r#"{"messages": [25000000000000000000]}"#).contains("messages[0] is a number, not an object"));
    assert!(error("25000000000000000000").ends_with("expected a JSON object, found a number"));
}

/// A template that exceeds its budget is run once, not for every row.
#[test]
fn rows_after_one_that_is_stopped_are_not_tried() {
    let source = "{% for i in range(20000) %}{% for j in range(20000) %}x{% endfor %}{% endfor %}";
    let (_dir, tokenizer) = crate::test_support::tokenizer(source);
    let row =
        "{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", \"content\": \"a\"}]}\n";
    let (_dir, path) = write_rows(row.repeat(3_000));
    let started = std::time::Instant::now();
    let error = Dataset::load(&path, Some(&tokenizer), &EncodeOptions::default()).expect_err("stopped").to_string();
    assert!(error.contains("rows.jsonl:1: the chat template"), "{error}");
    assert!(error.contains("steps, the limit for a conversation of this size"), "{error}");
    assert!(started.elapsed().as_secs() < 60, "{:?}", started.elapsed());
}
