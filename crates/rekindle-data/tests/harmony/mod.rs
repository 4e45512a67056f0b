//! gpt-oss's conversations as transformers masks them: `goldens/chats/harmony.json`, made by `goldens/chats/harmony.py`.

use std::path::Path;

use rekindle_data::{Dataset, EncodeOptions, IGNORED, Tokenizer};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokenizers::AddedToken;

/// Compares the trained tokens of every conversation, and returns the differences.
///
/// The template with marks trains the tokens that transformers' `assistant_masks` has. The template without marks leaves
/// out the generation prompt, and the tokens that end earlier turns.
pub(crate) fn check(templates: &Path) -> Vec<String> {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/chats");
    let text = std::fs::read_to_string(goldens.join("harmony.json")).expect("the golden exists");
    let golden: Value = serde_json::from_str(&text).expect("the golden is JSON");
    let mut problems = Vec::new();
    for (name, has_marks) in [("gptoss", false), ("gptoss_training", true)] {
        let source = std::fs::read_to_string(templates.join(format!("{name}.jinja"))).expect("a readable template");
        let digest: String = Sha256::digest(&source).iter().map(|byte| format!("{byte:02x}")).collect();
        if golden["sha256"][name] != *digest {
            problems.push(format!("{name}: another template than the golden's; its sha256 is {digest}"));
            continue;
        }
        let dir = checkpoint(&goldens, &golden, &source);
        let tokenizer = Tokenizer::from_dir(dir.path()).expect("a valid tokenizer");
        for chat in golden["conversations"].as_array().expect("a list") {
            let expected: Vec<&str> = chat["trained"].as_array().expect("a list").iter().map(text_of).collect();
            let expected = if has_marks { expected } else { expected.into_iter().map(generated).collect() };
            match trained(&tokenizer, dir.path(), chat) {
                Ok(runs) if runs == expected => {}
                found => problems.push(format!("{name}, {}:\n  {found:?}\n  expected {expected:?}", chat["name"])),
            }
        }
    }
    problems
}

/// Returns the tokens of a marked turn that the model generates after the generation prompt.
fn generated(turn: &str) -> &str {
    let turn = turn.strip_prefix("<|start|>assistant").expect("a turn begins with its header");
    turn.strip_suffix("<|end|>").unwrap_or(turn)
}

/// Returns the text of every run of trained tokens in a row.
fn trained(tokenizer: &Tokenizer, dir: &Path, chat: &Value) -> Result<Vec<String>, String> {
    let path = dir.join("row.jsonl");
    let row = json!({"messages": chat["messages"], "tools": chat["tools"]});
    std::fs::write(&path, row.to_string()).expect("written");
    let options = EncodeOptions::default();
    let (dataset, _) = Dataset::load(&path, Some(tokenizer), &options).map_err(|error| error.to_string())?;
    let example = dataset.example(0);
    let runs = example.labels.split(|&label| label == IGNORED).filter(|run| !run.is_empty());
    let decode = |run: &[i32]| {
        let ids: Vec<u32> = run.iter().map(|&id| id as u32).collect();
        tokenizer.decode(&ids, false).expect("decodable")
    };
    Ok(runs.map(decode).collect())
}

/// Returns a directory with a tokenizer that knows harmony's tokens, gpt-oss's end tokens, and the template.
fn checkpoint(goldens: &Path, golden: &Value, source: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let write = |name: &str, text: String| std::fs::write(dir.path().join(name), text).expect("written");
    let mut tokenizer = tokenizers::Tokenizer::from_file(goldens.join("tokenizer.json")).expect("a tokenizer");
    let special = golden["special"].as_array().expect("a list").iter().map(text_of);
    tokenizer
        .add_special_tokens(special.map(|text| AddedToken::from(text, true)).collect::<Vec<_>>())
        .expect("new tokens");
    tokenizer.save(dir.path().join("tokenizer.json"), false).expect("written");
    let ends = ["<|return|>", "<|endoftext|>", "<|call|>"].map(|text| tokenizer.token_to_id(text));
    write("generation_config.json", json!({"eos_token_id": ends}).to_string());
    write("tokenizer_config.json", json!({"eos_token": "<|return|>"}).to_string());
    write("chat_template.jinja", source.to_owned());
    dir
}

fn text_of(value: &Value) -> &str {
    value.as_str().expect("a text")
}
