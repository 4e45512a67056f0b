//! Rows as users have them: several files, other formats, other columns, and mistakes.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::{Done, Scratch, golden, rekindle};

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
    let done = scratch.train(&["--overwrite", &train, "data.columns={input_ids=\"ids\"}"]).ok();
    assert!(
        done.stderr.contains("5 rows of 3 files (input_ids), 13 tokens, 8 trained; longest row 4 ("),
        "{}",
        done.stderr
    );
    let resolved = fs::read_to_string(scratch.path("out/run.toml")).unwrap();
    assert!(resolved.contains("[data.columns]\ninput_ids = \"ids\"\n"), "{resolved}");

    let eval = scratch.train(&["--overwrite", &format!("data.eval={}", parquet("ids.parquet").display())]).ok();
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
    scratch.train(&["--overwrite", &format!("data.train={rows}"), &format!("model={}", quickstart().display())])
}

#[test]
fn tables_of_other_programs_are_rows() {
    let scratch = Scratch::new();
    let preview = |data: &str| {
        let (file, train) = (scratch.path("run.toml").display().to_string(), format!("data.train={data}"));
        let model = format!("model={}", quickstart().display());
        rekindle(["data", "preview", &file, &train, &model, "data.not_shown=allow", "--rows", "1"]).ok()
    };
    let csv = scratch.write("rows.csv", "instruction,input,output\n\"Add, please\",,2\n,How high?,8849\n");
    let done = preview(&csv);
    assert!(done.stderr.contains("rows.csv: 2 rows (instruction + output (alpaca))"), "{}", done.stderr);
    assert!(done.stdout.contains("Add, please<|im_end|>") && done.stdout.contains("⟦2<|im_end|>"), "{}", done.stdout);
    let arrow = |name: &str| parquet("../arrow").join(name).display().to_string();
    for (name, said) in [
        ("chat_stream.arrow", "2 rows (messages)"),
        ("text.feather", "5 rows (prompt + completion)"),
        ("saved", "5 rows of 2 files (prompt + completion)"),
        ("saved_dict", "3 rows (prompt + completion)"),
    ] {
        let done = preview(&arrow(name));
        assert!(done.stderr.contains(said), "{name}: {}", done.stderr);
    }
    assert!(preview(&arrow("saved_dict")).stderr.contains("split \"train\" of "));
    let damaged = scratch.write("rows.arrow", &fs::read(arrow("chat_file.arrow")).unwrap()[..900]);
    train(&scratch, &damaged).fails(3, &["rows.arrow: is a damaged Arrow file: it is cut short"]);
    let named = scratch.write("none.csv", "q,a\nb,c\n");
    train(&scratch, &named).fails(3, &["none.csv: has no column that Rekindle reads; its columns: \"q\", \"a\""]);
}

#[test]
fn test_files_of_a_folder_are_not_trained_on() {
    let scratch = Scratch::new();
    fs::create_dir_all(scratch.path("rows/data")).unwrap();
    let row = |id: u32| format!("{{\"input_ids\": [{id}, 2, 3]}}\n");
    scratch.write("rows/train.jsonl", row(1).repeat(3));
    scratch.write("rows/data/test-00000-of-00001.jsonl", row(7).repeat(2));
    scratch.write("rows/data/validation-00000-of-00001.jsonl", row(9));
    let folder = scratch.path("rows").display().to_string();
    let [train, eval] = [format!("data.train={folder}"), format!("data.eval={folder}")];
    let done = scratch.train(&["--overwrite", &train, &eval]).ok();
    for said in [
        "rows: 3 rows (input_ids)",
        "split \"train\", 1 file of ",
        "left out: \"data/test-00000-of-00001.jsonl\", \"data/validation-00000-of-00001.jsonl\"",
        "rows: 2 rows (input_ids)",
        "split \"test\", 1 file of ",
    ] {
        assert!(done.stderr.contains(said), "{said}: {}", done.stderr);
    }
    let done = scratch.train(&["--overwrite", &train, "data.split=validation"]).ok();
    assert!(done.stderr.contains("rows: 1 row (input_ids)"), "{}", done.stderr);
    scratch
        .train(&["--overwrite", &train, "data.split=dev2"])
        .fails(3, &["has no split \"dev2\"; it has", "\"train\""]);
}

#[test]
fn rows_can_be_held_out_and_limited() {
    let scratch = Scratch::new();
    let rows: String = (0..100).map(|i| format!("{{\"input_ids\": [{i}, 2, 3]}}\n")).collect();
    let train = format!("data.train={}", scratch.write("rows.jsonl", rows));
    let done = scratch.train(&["--overwrite", &train, "data.eval_fraction=0.05"]).ok();
    assert!(done.stderr.contains("rows.jsonl: 95 rows (input_ids), 285 tokens"), "{}", done.stderr);
    assert!(done.stderr.contains("of 100 rows, 5 held out (eval_fraction = 0.05)"), "{}", done.stderr);
    assert!(done.stderr.contains("rows.jsonl: 5 rows (input_ids), 15 tokens"), "{}", done.stderr);
    let resolved = fs::read_to_string(scratch.path("out/run.toml")).unwrap();
    assert!(resolved.contains("eval_fraction = 0.05\n"), "{resolved}");

    let file = scratch.path("run.toml").display().to_string();
    let ids = |more: &[&str]| {
        let done = rekindle(["data", "preview", &file, &train, "--json", "--rows", "100"].iter().chain(more)).ok();
        let first = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["input_ids"][0].clone();
        done.stdout.lines().map(first).collect::<Vec<_>>()
    };
    let held = ids(&["data.eval_fraction=10", "--eval"]);
    let kept = ids(&["data.eval_fraction=10", "data.max_rows=40"]);
    assert_eq!((held.len(), kept.len()), (10, 30));
    assert!(kept.iter().all(|id| !held.contains(id)));
    assert_eq!(
        held,
        ids(&["data.eval_fraction=10", "data.max_rows=40", "seed=1", "--eval"]),
        "whatever the run's seed"
    );
    assert_ne!(held, ids(&["data.eval_fraction=10", "data.sample_seed=1", "--eval"]));
    let both = [&*train, &format!("data.eval={}", golden("qwen3-tied/rows.jsonl").display()), "data.eval_fraction=0.1"];
    scratch.train(&both).fails(2, &["[data] eval and eval_fraction exclude each other"]);
    scratch
        .train(&["--overwrite", &train, "data.eval_fraction=1.5"])
        .fails(2, &["[data] eval_fraction = 1.5 is neither a fraction"]);
    scratch
        .train(&["--overwrite", &train, "data.eval_fraction=100"])
        .fails(2, &["eval_fraction = 100 of 100 rows leaves none"]);
    scratch.train(&["--overwrite", &train, "data.max_rows=0"]).fails(2, &["[data] max_rows = 0"]);
}

#[test]
fn paths_are_never_looked_for_on_the_hub() {
    let scratch = Scratch::new();
    for path in [
        "data/train.csv",
        "data/rows.txt",
        "data/rows.json.zst",
        "./data/rows",
        "../data/rows",
        "~/rows",
        "data/rows/",
        "/no/rows",
    ] {
        let done = scratch.train(&["--overwrite", &format!("data.train={path}")]);
        done.fails(3, &[path, "No such file or directory"]);
        assert!(!done.stderr.contains("127.0.0.1"), "{}", done.stderr);
    }
    // What can be a name may be a path all the same.
    let code = if cfg!(feature = "network") { 5 } else { 2 };
    scratch.train(&["--overwrite", "data.train=data/rows"]).fails(code, &["data/rows: ", "no such file or directory"]);
}

#[test]
fn faults_are_counted() {
    let scratch = Scratch::new();
    let good = "{\"instruction\": \"Q\", \"output\": \"A\"}\n";
    let bad = "{\"instruction\": \"\", \"input\": \"\", \"output\": \"A\"}\n";
    let file = scratch.write("rows.jsonl", [good, bad, good, bad, "{\"text\": 3}\n", bad].concat());
    train(&scratch, &file)
        .fails(3, &["rows.jsonl:2: \"instruction\" and \"input\" are empty", "(3 of 6 rows have this fault)"]);
}

#[test]
fn text_beside_a_chat_template_is_said() {
    let scratch = Scratch::new();
    let file = scratch.write("rows.jsonl", "{\"prompt\": \"Q\", \"completion\": \"A\"}\n{\"text\": \"T\"}\n");
    let done = train(&scratch, &file).ok();
    let said = "1 row has its prompt and completion as plain text: the chat template is not applied; for chats, write";
    assert!(done.stderr.contains(said), "{}", done.stderr);
    let file = scratch.write("qa.jsonl", "{\"question\": \"Q\", \"answer\": \"A\"}\n");
    train(&scratch, &file).fails(3, &["columns = { instruction = \"question\", output = \"answer\" }"]);
    let (file, columns) = (format!("data.train={file}"), "data.columns={instruction=\"question\",output=\"answer\"}");
    let done = scratch.train(&["--overwrite", &file, columns, &format!("model={}", quickstart().display())]).ok();
    assert!(!done.stderr.contains("plain text"), "{}", done.stderr);
}

#[test]
fn the_end_token_of_texts_can_be_left_out() {
    let scratch = Scratch::new();
    let file = scratch.write("rows.jsonl", "{\"text\": \"a whale\"}\n{\"text\": \"a whale <|im_end|>\"}\n");
    let tokens = |more: &[&str]| {
        let (model, data) = (quickstart().display().to_string(), file.clone());
        let args = ["eval", "--device", "cpu", "--model", &model, "--data", &data, "--json"];
        rekindle(args.iter().chain(more)).json()["rows"]
            .as_array()
            .unwrap()
            .iter()
            .map(|row| row["tokens"].as_u64().unwrap())
            .collect::<Vec<_>>()
    };
    let (with, without) = (tokens(&[]), tokens(&["--no-end-token"]));
    assert_eq!(without[0] + 1, with[0]);
    assert_eq!(without[1], with[1], "an explicit end token is kept");
    let run_file = scratch.path("run.toml").display().to_string();
    let preview = |more: &str| {
        let [train, model] = [format!("data.train={file}"), format!("model={}", quickstart().display())];
        rekindle(["data", "preview", &run_file, &train, &model, "--row", "1", more]).ok().stdout
    };
    assert!(
        preview("data.text_end_token=true").contains("whale<|im_end|>⟧"),
        "{}",
        preview("data.text_end_token=true")
    );
    assert!(!preview("data.text_end_token=false").contains("<|im_end|>"));
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
        ("no.parquet", good.into(), &["no.parquet: is not a Parquet file"]),
        (
            "qa.jsonl",
            b"{\"q\": \"Q\", \"a\": \"A\"}".to_vec(),
            &[
                "qa.jsonl:1: unknown kind of row; its keys: \"q\", \"a\"",
                "columns = { instruction = \"q\", output = \"a\" }",
            ],
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
        scratch.train(&["--overwrite", &train, &columns, &format!("model={}", quickstart().display())])
    };
    mapped("{text=\"body\"}").fails(3, &["good.jsonl:1: has no \"body\" (for \"text\"); its keys: \"messages\""]);
    mapped("{txt=\"body\"}").fails(2, &["[data] columns: \"txt\" is not a key of a row", "text"]);
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
        let done = scratch.train(&["--overwrite", &more[0], &more[1], "model.max_seq_length=18"]).ok();
        assert!(done.stderr.contains(what), "{}", done.stderr);
    }
}
