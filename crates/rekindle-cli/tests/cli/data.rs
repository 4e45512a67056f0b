//! Rows as users have them: several files, other formats, other columns, and mistakes.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::{Done, Scratch, golden};

fn parquet(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../rekindle-data/goldens/parquet").join(name).canonicalize().unwrap()
}

/// A checkpoint with a tokenizer and a chat template.
fn quickstart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/quickstart/base").canonicalize().unwrap()
}

#[test]
fn several_files_and_formats_make_one_dataset() {
    let scratch = Scratch::new();
    fs::create_dir(scratch.path("rows")).unwrap();
    scratch.write("rows/a.json", "{\"data\": [{\"ids\": [1, 2, 3]}, {\"ids\": [4, 5]}]}");
    scratch.write("rows/b.jsonl", "{\"ids\": [6, 7, 8, 9]}\n");
    let more = scratch.write("more.jsonl", "{\"ids\": [10, 11]}\n{\"ids\": [12, 13]}\n");
    let train = format!("data.train=[{:?}, {more:?}]", scratch.path("rows/*.json*").display().to_string());
    let done = scratch.train(&[&train, "data.columns={input_ids=\"ids\"}"]).ok();
    assert!(
        done.stderr.contains("5 rows of 3 files (input_ids), 13 tokens, 8 trained; longest row 4 ("),
        "{}",
        done.stderr
    );
    let resolved = fs::read_to_string(scratch.path("out/run.toml")).unwrap();
    assert!(resolved.contains("[data.columns]\ninput_ids = \"ids\"\n"), "{resolved}");

    let eval = scratch.train(&[&format!("data.eval={}", parquet("ids.parquet").display()), "--overwrite"]).ok();
    assert!(
        eval.stderr.contains("80 rows (input_ids), 200 tokens, 120 trained; longest row 3 (row 1)"),
        "{}",
        eval.stderr
    );
}

#[test]
fn conversations_of_every_format_are_named() {
    let scratch = Scratch::new();
    let rows = [
        "{\"instruction\": \"Name a whale.\", \"input\": \"\", \"output\": \"Orca\"}",
        "{\"conversations\": [{\"from\": \"human\", \"value\": \"Q\"}, {\"from\": \"gpt\", \"value\": \"A\"}]}",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"Q\"}, {\"role\": \"assistant\", \"content\": \"A\"}]}",
        "{\"prompt\": \"Q\", \"completion\": \"A\"}",
        "{\"text\": \"A\"}",
    ];
    let file = scratch.write("rows.jsonl", rows.join("\n"));
    let done = train(&scratch, &file).ok();
    let named = "5 rows (messages; conversations (sharegpt); prompt + completion; instruction + output (alpaca); text)";
    assert!(done.stderr.contains(named), "{}", done.stderr);
}

#[test]
fn a_second_run_maps_what_the_first_one_encoded() {
    let scratch = Scratch::new();
    let cache = scratch.path("cache");
    let train = |more: &[&str]| {
        let file = scratch.path("run.toml").display().to_string();
        crate::done(crate::command().env("REKINDLE_CACHE", &cache).args(["train", &file, "--overwrite"]).args(more))
            .ok()
    };
    let weights = || fs::read(scratch.path("out/adapter/adapter_model.safetensors")).unwrap();
    let first = train(&["data.cache=false"]);
    let unused = weights();
    assert!(!cache.exists() && !first.stderr.contains("cache"), "{}", first.stderr);
    assert!(!train(&[]).stderr.contains("; from the cache"));
    assert!(weights() == unused);
    assert_eq!(fs::read_dir(cache.join("datasets")).unwrap().count(), 1);
    assert!(train(&[]).stderr.contains("; from the cache"));
    assert!(weights() == unused);
    // A cache that cannot be written is no reason to stop.
    fs::remove_dir_all(&cache).unwrap();
    fs::write(&cache, "").unwrap();
    assert!(train(&[]).stderr.contains("; not cached: "));
    assert!(weights() == unused);
}

fn train(scratch: &Scratch, rows: &str) -> Done {
    scratch.train(&[&format!("data.train={rows}"), &format!("model={}", quickstart().display())])
}

#[test]
fn malformed_rows_are_3_with_file_and_row() {
    let scratch = Scratch::new();
    let good =
        "{\"messages\": [{\"role\": \"user\", \"content\": \"Q\"}, {\"role\": \"assistant\", \"content\": \"A\"}]}";
    let turn = |role: &str, text: &str| format!("{good}\n{}\n", good.replace("assistant", role).replace("\"A\"", text));
    let cut = |name: &str, keep: usize| fs::read(parquet(name)).unwrap()[..keep].to_vec();
    let cases: [(&str, Vec<u8>, &[&str]); 14] = [
        (
            "role.jsonl",
            turn("asistant", "\"A\"").into(),
            &["role.jsonl:2: messages[1].role \"asistant\" is unknown", "assistant"],
        ),
        (
            "turn.jsonl",
            turn("assistant", "\" \"").into(),
            &["turn.jsonl:2: messages[1] (assistant) is empty", "remove the row"],
        ),
        ("none.jsonl", turn("user", "\"A\"").into(), &["none.jsonl:2: \"messages\" has no assistant turn"]),
        ("null.jsonl", turn("assistant", "null").into(), &["null.jsonl:2: messages[1] (assistant) has no \"content\""]),
        (
            "utf8.jsonl",
            b"{\"text\": \"gr\xfc\xdfe\"}\n".to_vec(),
            &["utf8.jsonl:1: not UTF-8 at byte 13", "save the file as UTF-8"],
        ),
        (
            "text.jsonl",
            format!("{good}\n{good}{good}\n").into(),
            &["text.jsonl:2: invalid JSON at column", "trailing characters"],
        ),
        ("empty.jsonl", b"\n\n".to_vec(), &["empty.jsonl: the dataset is empty"]),
        ("empty.json", b"[]".to_vec(), &["empty.json: the dataset is empty"]),
        (
            "list.json",
            format!("[{good}, 7, {good}]").into(),
            &["list.json, row 2: expected a JSON object, found a number"],
        ),
        (
            "half.json",
            format!("[{good}, {{\"mess").into(),
            &["half.json, row 2: invalid JSON at line 1, column", "EOF"],
        ),
        ("cut.parquet", cut("chat.parquet", 900), &["cut.parquet: is a damaged Parquet file: "]),
        ("no.parquet", good.into(), &["no.parquet: is no Parquet file"]),
        (
            "qa.jsonl",
            b"{\"q\": \"Q\", \"a\": \"A\"}".to_vec(),
            &["qa.jsonl:1: unknown kind of row; its keys: \"q\", \"a\"", "columns = { prompt ="],
        ),
        (
            "tools.jsonl",
            good.replacen('{', "{\"tools\": \"none\", ", 1).into(),
            &["tools.jsonl:1: \"tools\" is a string, but not the JSON"],
        ),
    ];
    for (name, bytes, parts) in cases {
        train(&scratch, &scratch.write(name, bytes)).fails(3, parts);
    }
    train(&scratch, &scratch.path("*.csv").display().to_string()).fails(3, &["*.csv: no file matches this pattern"]);
    train(&scratch, &quickstart().display().to_string()).fails(3, &["quickstart/base"]);
    let file = scratch.write("good.jsonl", good);
    let mapped = |columns: &str| {
        let [train, columns] = [format!("data.train={file}"), format!("data.columns={columns}")];
        scratch.train(&[&train, &columns, &format!("model={}", quickstart().display())])
    };
    mapped("{text=\"body\"}").fails(3, &["good.jsonl:1: has no \"body\" (for \"text\"); its keys: \"messages\""]);
    mapped("{txt=\"body\"}").fails(2, &["[data] columns: \"txt\" is no key of a row", "text"]);
    assert!(!scratch.path("out/adapter").exists());
}

#[test]
fn a_row_of_two_million_characters_is_refused_soon() {
    let scratch = Scratch::new();
    for (name, piece) in [("words.jsonl", "a whale "), ("one.jsonl", "a"), ("spaces.jsonl", " ")] {
        let text = piece.repeat(2_000_000 / piece.len());
        let turns = format!(
            "[{{\"role\": \"user\", \"content\": \"Q\"}}, {{\"role\": \"assistant\", \"content\": \"A{text}\"}}]"
        );
        let file = scratch.write(name, format!("{{\"messages\": {turns}}}\n"));
        let began = Instant::now();
        train(&scratch, &file).fails(3, &[&format!("{name}:1: has "), "more than max_seq_length", "data.overlong"]);
        // Unoptimized and beside other tests; what grows with the square takes an hour.
        assert!(began.elapsed() < Duration::from_secs(120), "{name}: {:?}", began.elapsed());
    }
}

#[test]
fn overlong_rows_are_counted_and_named() {
    let scratch = Scratch::new();
    let rows = golden("qwen3-tied/rows.jsonl");
    for (overlong, what) in [("drop", "dropped (line 1"), ("truncate", "truncated (line 1"), ("split", "split (line 1")]
    {
        let more = [format!("data.train={}", rows.display()), format!("data.overlong={overlong}")];
        let done = scratch.train(&[&more[0], &more[1], "model.max_seq_length=18", "--overwrite"]).ok();
        assert!(done.stderr.contains(what), "{}", done.stderr);
    }
}
