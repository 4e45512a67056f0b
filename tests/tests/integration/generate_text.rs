//! Text generation: stop strings, end tokens, and the tokenizer that an adapter brings.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use rekindle::engine::{EngineConfig, Request};
use rekindle::{
    ChatPrompt, DeviceKind, FastLanguageModel, GenerationConfig, LoraConfig, Model, StopReason, Tokenizer,
    generate_text_on,
};

fn base() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/quickstart/base")
}

fn load(dir: &Path) -> (Model, Tokenizer) {
    FastLanguageModel::from_pretrained(dir).device(DeviceKind::Cpu).load().expect("the quickstart's base loads")
}

const QUESTION: &str = "Jack bought three brown balls at the fair. What did Jack buy?";

/// Every substring of an answer as a stop string: most begin or end within a token.
#[test]
fn a_stop_string_is_cut_exactly_wherever_it_is() {
    let (model, tokenizer) = load(&base());
    let prompt = ChatPrompt::new(None, QUESTION).encode(&tokenizer).expect("a chat model");
    let eos_ids = model.end_tokens(Some(&tokenizer)).expect("its files are valid");
    let config = GenerationConfig { eos_ids, max_new_tokens: 40, ..GenerationConfig::default() };
    let run = |stop: &[&str]| {
        let stop: Vec<String> = stop.iter().map(|&text| text.to_owned()).collect();
        let mut streamed = String::new();
        let done = model.generate_text(&tokenizer, &prompt, &config, &stop, |piece| {
            assert!(!piece.is_empty());
            streamed += piece;
            true
        });
        let done = done.expect("the prompt fits");
        assert_eq!(streamed, done.text, "{stop:?}");
        done
    };
    let whole = run(&[]);
    assert_eq!((whole.stop_reason(), whole.generated.stop), ("end_token", StopReason::EndToken));
    assert_eq!(whole.generated.prompt_tokens, prompt.len());
    let text = whole.text.clone();
    assert!(text.len() > 12 && text.is_ascii(), "{text}");
    for start in (0..text.len()).step_by(3) {
        for end in [start + 1, start + 4, text.len()].into_iter().filter(|end| *end <= text.len()) {
            let stop = &text[start..end];
            let done = run(&["\u{7}", stop]);
            let at = text.find(stop).expect("it is a part");
            assert_eq!((done.text.as_str(), done.stop_string.as_deref()), (&text[..at], Some(stop)));
            assert_eq!(done.stop_reason(), "stop_string");
            // No token is made beyond the one that completes it.
            let ids = &done.generated.ids;
            assert_eq!(*ids, whole.generated.ids[..ids.len()]);
            let shown = |ids: &[u32]| tokenizer.decode(ids, true).expect("decodable").len();
            assert!(shown(ids) >= at + stop.len() && shown(&ids[..ids.len() - 1]) < at + stop.len());
        }
    }
    // One that never comes holds back its beginning until the end.
    let never = run(&[&format!("{}!", &text[text.len() - 2..])]);
    assert_eq!((never.text.as_str(), never.stop_reason()), (text.as_str(), "end_token"));
}

/// Texts, tokens and reasons are those of one prompt at a time, with stop strings that end some of them.
#[test]
fn a_batch_is_answered_as_one_prompt_at_a_time() {
    let (model, tokenizer) = load(&base());
    let questions = [QUESTION, "What is a whale?", "Anna has a cat.", "Who sold the fish?", "Where is the red ball?"];
    let prompts: Vec<Vec<u32>> = questions
        .iter()
        .map(|question| ChatPrompt::new(None, question).encode(&tokenizer).expect("a chat model"))
        .collect();
    let eos_ids = model.end_tokens(Some(&tokenizer)).expect("its files are valid");
    for (temperature, stop) in
        [(0.0, vec![]), (0.0, vec!["e b".to_owned()]), (1.0, vec!["a".to_owned(), " t".to_owned()])]
    {
        let config = GenerationConfig {
            eos_ids: eos_ids.clone(),
            max_new_tokens: 30,
            temperature,
            seed: 40,
            ..GenerationConfig::default()
        };
        let mut answers = BTreeMap::new();
        let limits = EngineConfig { max_sequences: 2, ..EngineConfig::default() };
        let numbered = prompts.iter().cloned().enumerate();
        model
            .generate_batch(Some(&tokenizer), numbered, &config, &stop, limits, |index, answer| {
                answers.insert(index, answer);
                Ok(true)
            })
            .expect("the prompts fit");
        assert_eq!(answers.len(), prompts.len());
        for (index, answer) in answers {
            let config = GenerationConfig { seed: 40 + index as u64, ..config.clone() };
            let want = model.generate_text(&tokenizer, &prompts[index], &config, &stop, |_| true).expect("it fits");
            assert_eq!((&answer.text, &answer.stop_string), (&want.text, &want.stop_string));
            assert_eq!((&answer.generated.ids, answer.generated.stop), (&want.generated.ids, want.generated.stop));
        }
    }
    let mut count = 0;
    let config = GenerationConfig { max_new_tokens: 3, ..GenerationConfig::default() };
    let numbered = prompts.iter().cloned().enumerate();
    let ended = model.generate_batch(None, numbered, &config, &[], EngineConfig::default(), |_, answer| {
        count += 1;
        assert_eq!((answer.text.as_str(), answer.generated.ids.len()), ("", 3));
        Ok(count < 2)
    });
    assert!(ended.is_ok() && count == 2, "{count}");
}

/// Answers equal those without an engine, and a turn computes only the tokens that the last one did not.
#[test]
fn a_conversation_on_an_engine_computes_only_what_is_new() {
    let (model, tokenizer) = load(&base());
    let eos_ids = model.end_tokens(Some(&tokenizer)).expect("its files are valid");
    let config = GenerationConfig { eos_ids, max_new_tokens: 30, ..GenerationConfig::default() };
    let mut prompt = ChatPrompt::new(None, QUESTION).encode(&tokenizer).expect("a chat model");
    let mut engine = model.engine(EngineConfig { max_sequences: 1, ..EngineConfig::default() }).expect("it has room");
    for stop in [vec![], vec!["e b".to_owned()]] {
        let mut pieces = String::new();
        let answer = generate_text_on(&mut engine, &tokenizer, &prompt, &config, &stop, |piece| {
            pieces += piece;
            true
        });
        let answer = answer.expect("the prompt fits");
        let want = model.generate_text(&tokenizer, &prompt, &config, &stop, |_| true).expect("the prompt fits");
        assert_eq!((&answer.text, &answer.stop_string), (&want.text, &want.stop_string));
        assert_eq!((&answer.generated.ids, answer.generated.stop), (&want.generated.ids, want.generated.stop));
        assert_eq!(pieces, answer.text);
        prompt.extend(answer.generated.ids);
        prompt.extend(tokenizer.encode("<|im_start|>user\nAnd a cat?<|im_end|>", false).expect("encodable"));
    }
    let before = engine.stats();
    let stopped = generate_text_on(&mut engine, &tokenizer, &prompt, &config, &[], |_| false).expect("it fits");
    assert_eq!((stopped.stop_reason(), stopped.generated.ids.len()), ("caller", 1));
    let (after, page) = (engine.stats(), 16);
    assert!(after.computed_tokens - before.computed_tokens < prompt.len() as u64 / 2, "{before:?} {after:?}");
    assert_eq!((after.prefix_hits - before.prefix_hits) % page, 0, "whole pages are found");
    engine.submit(Request::new(prompt.clone())).expect("it fits");
    let busy = generate_text_on(&mut engine, &tokenizer, &prompt, &config, &[], |_| true);
    assert!(busy.expect_err("the engine is busy").to_string().contains("other requests"));
}

#[test]
fn the_caller_can_end_it() {
    let (model, tokenizer) = load(&base());
    let prompt = tokenizer.encode("A whale is", true).expect("encodable");
    let mut pieces = 0;
    let done = model.generate_text(&tokenizer, &prompt, &GenerationConfig::default(), &[], |_| {
        pieces += 1;
        pieces < 3
    });
    let done = done.expect("the prompt fits");
    assert_eq!((pieces, done.stop_reason(), done.generated.ids.len()), (3, "caller", 3));
}

/// The end tokens of the checkpoint come first, then the tokenizer's and the template's.
#[test]
fn end_tokens_are_those_that_are_trained() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for entry in fs::read_dir(base()).expect("it is there").map(|entry| entry.expect("it can be read")) {
        fs::copy(entry.path(), dir.path().join(entry.file_name())).expect("the disk has room");
    }
    let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).expect("the disk has room");
    let ends = || {
        let (model, tokenizer) = load(dir.path());
        let ends = |tokenizer| model.end_tokens(tokenizer).expect("valid files");
        (ends(None), ends(Some(&tokenizer)))
    };
    assert_eq!(ends(), (vec![2, 0], vec![2, 0]));
    write("generation_config.json", r#"{"eos_token_id": 7}"#);
    write("tokenizer_config.json", r#"{"eos_token": "<|endoftext|>"}"#);
    assert_eq!(ends(), (vec![7], vec![7, 0, 2]), "of the file, eos_token, of the template");
    fs::remove_file(dir.path().join("generation_config.json")).expect("it is there");
    assert_eq!(ends(), (vec![2], vec![2, 0]), "of config.json");
    write("chat_template.jinja", "{% for m in messages %}{{ m.content }}{% endfor %}");
    assert_eq!(ends(), (vec![2], vec![2, 0]), "a template without ends of turns adds none");
}

/// However it arrives, an adapter's tokenizer is the model's, and is what saving writes.
#[test]
fn an_adapter_brings_its_tokenizer_to_a_loaded_model() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let [adapter, again] = ["adapter", "again"].map(|name| scratch.path().join(name));
    let (model, _) = load(&base());
    model.get_peft_model(LoraConfig::new(2)).expect("valid").save_pretrained(&adapter).expect("the disk has room");
    let template = |dir: &Path| fs::read_to_string(dir.join("chat_template.jinja")).expect("it comes along");
    let changed = template(&adapter).replace("assistant", "model");
    fs::write(adapter.join("chat_template.jinja"), &changed).expect("the disk has room");

    let (model, _) = load(&base());
    let model = model.load_adapter(&adapter).expect("it is of this model");
    let notice = model.notices().iter().find(|notice| notice.contains("has another chat template"));
    assert!(notice.is_some_and(|notice| notice.contains("the adapter's")), "{:?}", model.notices());
    let tokenizer = model.load_tokenizer().expect("valid").expect("the adapter has one");
    let prompt = ChatPrompt::new(None, "Q").encode(&tokenizer).expect("it has a template");
    assert!(tokenizer.decode(&prompt, false).expect("decodable").ends_with("<|im_start|>model\n"));
    model.save_pretrained(&again).expect("the disk has room");
    assert_eq!(template(&again), changed);

    // In the place of another, and beside one, which stays.
    let mut both = load(&adapter).0;
    both.load_adapter_as("second", &again).expect("it is of this model");
    assert!(!both.notices().iter().any(|notice| notice.contains("template")), "{:?}", both.notices());
    fs::write(again.join("chat_template.jinja"), "{{ messages }}").expect("the disk has room");
    both.load_adapter_as("third", &again).expect("it is of this model");
    assert!(both.notices().iter().any(|notice| notice.contains("the latter's")), "{:?}", both.notices());
    let replaced = load(&adapter).0.load_adapter(&again).expect("it is of this model");
    replaced.save_pretrained(scratch.path().join("replaced")).expect("the disk has room");
    assert_eq!(template(&scratch.path().join("replaced")), "{{ messages }}");
}
