use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

use minijinja::value::Serde;
use minijinja::{Environment, context};
use serde_json::json;
use tokenizers::Tokenizer;

use super::*;

/// The committed instruction set.
fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/quickstart")
}

fn trained(rows: usize, folder: &Path) -> Tokenizer {
    let corpus_file = folder.join("corpus.jsonl");
    write_lines(&corpus_file, corpus(rows)).expect("the corpus is written");
    train_tokenizer(&corpus_file, folder).expect("the tokenizer is trained");
    Tokenizer::from_file(folder.join("tokenizer.json")).expect("the tokenizer loads")
}

#[test]
fn corpus_is_the_same_twice_and_has_both_kinds_of_rows() {
    let rows: Vec<String> = corpus(500).map(|row| row.to_string()).collect();
    assert_eq!(rows, corpus(500).map(|row| row.to_string()).collect::<Vec<_>>());
    let texts = rows.iter().filter(|row| row.starts_with("{\"text\":")).count();
    let chats = rows.iter().filter(|row| row.starts_with("{\"messages\":")).count();
    assert!(texts > 150 && chats > 200 && texts + chats == 500, "{texts} texts, {chats} chats");
}

#[test]
fn corpus_never_answers_a_chat_in_json_nor_tells_a_held_out_story() {
    let held_out = Sets::new(SEED).held_out;
    let stories: HashSet<&str> = held_out
        .iter()
        .filter(|row| matches!(row.scene, scene::Scene::Purchase { .. } | scene::Scene::Trip { .. }))
        .map(|row| row.question.as_str())
        .collect();
    assert_eq!(stories.len(), 24);
    for row in corpus(CORPUS_ROWS) {
        for message in row["messages"].as_array().into_iter().flatten() {
            let content = message["content"].as_str().expect("a message has content");
            assert!(!content.contains('{'), "{content}");
            assert!(!stories.contains(content), "{content}");
        }
    }
}

#[test]
fn committed_instructions_are_what_the_script_writes() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write_instructions(folder.path()).expect("the instructions are written");
    for name in ["train.jsonl", "heldout.jsonl"] {
        let [written, committed] = [folder.path(), &examples()]
            .map(|folder| fs::read_to_string(folder.join(name)).expect("the instructions can be read"));
        assert!(written == committed, "{name} differs; run `cargo xtask quickstart`");
    }
}

#[test]
fn tokenizer_files_are_the_same_twice() {
    let folders = [(); 2].map(|()| tempfile::tempdir().expect("a temporary folder"));
    let files = folders.each_ref().map(|folder| {
        trained(12_000, folder.path());
        let entries = fs::read_dir(folder.path()).expect("the folder can be listed");
        entries
            .map(|entry| {
                let path = entry.expect("an entry").path();
                (path.file_name().map(ToOwned::to_owned), fs::read(&path).expect("the file can be read"))
            })
            .collect::<BTreeMap<_, _>>()
    });
    assert_eq!(files[0].len(), 6);
    assert!(files[0] == files[1]);
}

#[test]
fn chat_template_renders_and_each_special_token_is_one_id() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let tokenizer = trained(12_000, folder.path());
    let template = fs::read_to_string(folder.path().join("chat_template.jinja")).expect("the template is there");
    let environment = Environment::new();
    let messages = json!([{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Mia."}]);
    let render = |messages: &Value, add_generation_prompt: bool| {
        let messages = minijinja::Value::from(Serde(messages));
        environment.render_str(&template, context! { messages, add_generation_prompt }).expect("the template renders")
    };
    let whole = render(&messages, false);
    assert_eq!(whole, "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMia.<|im_end|>\n");
    // Assistant turns are found by rendering prefixes, so the prompt must be a prefix of the whole text.
    assert!(whole.starts_with(&render(&json!([messages[0]]), true)));

    let ids = tokenizer.encode(whole.as_str(), false).expect("the text is encoded").get_ids().to_vec();
    let special: Vec<u32> = ids.iter().copied().filter(|&id| id < 3).collect();
    assert_eq!(special, [1, 2, 1, 2]);
    assert_eq!(tokenizer.encode("<|endoftext|>", false).expect("the text is encoded").get_ids(), [0]);
    assert_eq!(tokenizer.decode(&ids, false).expect("the ids are decoded"), whole);
}

#[test]
fn every_word_of_an_answer_is_one_token() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let tokenizer = trained(12_000, folder.path());
    let mut words: Vec<&str> = world::ANIMALS.iter().flat_map(|a| [a.name, a.kind, a.home, a.food]).collect();
    words.extend(world::PEOPLE.iter().map(|person| person.name));
    for list in [&world::GOODS[..], &world::COLOURS, &world::SHOPS, &world::PLACES, &world::DAYS, &world::MOVES] {
        words.extend(list);
    }
    let split: Vec<String> = words
        .into_iter()
        .flat_map(|word| [word.to_owned(), format!(" {word}")])
        .filter(|word| tokenizer.encode(word.as_str(), false).expect("the word is encoded").len() != 1)
        .collect();
    assert!(split.is_empty(), "words of several tokens: {split:?}");
}
