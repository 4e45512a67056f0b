//! The options of requests: ends, constraints, adapters, and what is refused.

use rekindle_engine::{
    AdapterChoice, CacheSize, Engine, EngineConfig, Event, FinishReason, NewToken, Request, SamplingParams,
    TokenConstraint, TokenMask,
};
use rekindle_lora::LoraConfig;
use rekindle_tests::{Golden, poisoned};

use super::{alone, beginning, configurations, greedy, ids, prompts, run, sampled};

#[test]
fn a_sample_ends_at_stop_ids_but_not_before_min_tokens() {
    let golden = Golden::open("llama2");
    let model = golden.load();
    let expected = &golden.expect["generate"][0];
    let (prompt, text) = (ids(&expected["prompt"]), ids(&expected["ids"]));
    let stop = text[3];
    let at = text.iter().position(|&id| id == stop).expect("it is there");
    let request = |min_tokens| Request { stop_ids: vec![stop], min_tokens, ..greedy(prompt.clone(), 12) };
    let answer = &alone(&model, request(0))[0];
    assert_eq!((answer.ids(), answer.end), (text[..=at].to_vec(), Some(FinishReason::Stop(stop))));
    let answer = &alone(&model, request(at + 2))[0];
    assert_eq!(answer.ids()[..at], text[..at]);
    assert!(answer.tokens.len() > at + 1 && !answer.ids()[..at + 2].contains(&stop), "{answer:?}");
}

/// Only even and odd ids in turns, then the end.
#[derive(Clone, Debug)]
struct Turns {
    vocab: usize,
    chosen: Vec<u32>,
}

impl TokenConstraint for Turns {
    fn allowed(&mut self) -> Result<TokenMask, String> {
        if self.chosen.len() == 6 {
            return Err("six tokens are enough".to_owned());
        }
        let mut mask = TokenMask::none(self.vocab);
        (0..self.vocab as u32).filter(|id| *id as usize % 2 == self.chosen.len() % 2).for_each(|id| mask.set(id));
        Ok(mask)
    }

    fn accept(&mut self, id: u32) -> Result<(), String> {
        self.chosen.push(id);
        Ok(())
    }

    fn fork(&self) -> Box<dyn TokenConstraint> {
        Box::new(self.clone())
    }
}

#[test]
fn constraints_restrict_every_sample_by_itself() {
    let golden = Golden::open("qwen2");
    let model = golden.load();
    let constraint = Turns { vocab: model.config().vocab_size(), chosen: Vec::new() };
    let request = Request { n: 3, constraint: Some(Box::new(constraint)), ..sampled(beginning(&golden, 20), 9, 4) };
    let answers = alone(&model, request);
    assert_eq!(answers.len(), 3);
    for answer in &answers {
        assert!(answer.ids().iter().enumerate().all(|(i, id)| *id as usize % 2 == i % 2), "{answer:?}");
        assert_eq!(answer.tokens.len(), 6);
        assert!(answer.error.as_ref().is_some_and(|error| error.contains("six tokens are enough")), "{answer:?}");
    }
}

/// Base, active and inactive adapters in one batch are what they are alone, and share no prefixes.
#[test]
fn a_request_chooses_its_adapter() {
    let golden = Golden::open("qwen3-tied");
    let load = || {
        let mut model = golden.load();
        for name in ["first", "second"] {
            let adapters = golden.adapters();
            let dir = &adapters[usize::from(name == "second")];
            model.load_adapter_as(name, &golden.dir.join("adapters").join(dir)).expect("a golden adapter loads");
        }
        model
    };
    let request = |adapter| Request { adapter, ..sampled(beginning(&golden, 40), 10, 3) };
    let named = |name: &str| AdapterChoice::Named(name.to_owned());
    let choices = [AdapterChoice::Active, AdapterChoice::Base, named("first"), named("second")];

    let mut model = load();
    assert_eq!(model.active_adapter(), Some("second"));
    let second = alone(&model, request(AdapterChoice::Active));
    let base = alone(&model, request(AdapterChoice::Base));
    let mut borrowed = Engine::new(&model, EngineConfig::default()).expect("a valid configuration");
    assert!(borrowed.submit(request(named("first"))).is_err_and(|error| error.to_string().contains("first")));
    model.set_adapter("first").expect("it is known");
    let first = alone(&model, request(AdapterChoice::Active));
    assert!(first != base && second != base && first != second);
    model.disable_adapter().expect("it can be read");
    assert_eq!(alone(&model, request(AdapterChoice::Active)), base);

    let mut engine = Engine::new(load(), EngineConfig::default()).expect("a valid configuration");
    for _ in 0..2 {
        choices.iter().for_each(|choice| assert!(engine.submit(request(choice.clone())).is_ok()));
        let (answers, _) = run(&mut engine);
        let tokens: Vec<_> = answers.values().map(|answer| &answer.tokens).collect();
        assert_eq!(tokens, [&second[0].tokens, &base[0].tokens, &first[0].tokens, &second[0].tokens]);
        assert_eq!(engine.model().active_adapter(), Some("second"), "one batch for all, so none was activated");
    }
    let error = engine.submit(request(named("third"))).expect_err("it is unknown").to_string();
    assert!(error.contains("\"third\"") && error.contains("first"), "{error}");
    // A changed model computes running texts again, and shares nothing with before.
    engine.submit(request(named("first"))).expect("it is known");
    engine.step();
    engine.with_model(|model| model.delete_adapter("first")).expect("it is known");
    let (answers, _) = run(&mut engine);
    assert!(answers.into_values().next().and_then(|answer| answer.error).is_some_and(|error| error.contains("first")));
}

/// A step computes samples of the base and of several adapters in one batch, whatever the lengths of their prompts and the
/// order in which they run. On the CPU in f32 each request has the bits that it has alone.
#[test]
fn samples_with_different_adapters_run_in_one_batch() {
    for (name, dirs) in [("qwen3-tied", ["all-linear", "qv-rslora"]), ("families/phi3", ["all-linear", "all-linear"])] {
        let golden = Golden::open(name);
        let known = golden.adapters();
        let dirs =
            dirs.map(|dir| if known.iter().any(|known| known == dir) { dir.to_owned() } else { known[0].clone() });
        let mut model = golden.load();
        for (name, dir) in ["first", "second"].into_iter().zip(dirs) {
            model.load_adapter_as(name, &golden.dir.join("adapters").join(dir)).expect("a golden adapter loads");
        }
        let choices = [Some("first"), None, Some("second")];
        let requests = || {
            let prompts = prompts(&golden).into_iter().zip(choices.into_iter().cycle()).enumerate();
            prompts.map(|(seed, (prompt, choice))| (choice, sampled(prompt, 9 + seed % 4, seed as u64)))
        };
        let mut want = Vec::new();
        for (choice, request) in requests() {
            let adapter = if choice.is_some() { AdapterChoice::Active } else { AdapterChoice::Base };
            choice.into_iter().for_each(|name| model.set_adapter(name).expect("it is known"));
            want.extend(alone(&model, Request { adapter, ..request }));
        }
        model.set_adapter("second").expect("it is known");
        let mut model = Some(model);
        for config in configurations() {
            let mut engine = Engine::new(model.take().expect("it came back"), config).expect("a valid configuration");
            for (choice, request) in requests() {
                let adapter = choice.map_or(AdapterChoice::Base, |name| AdapterChoice::Named(name.to_owned()));
                assert!(engine.submit(Request { adapter, ..request }).is_ok());
            }
            let (answers, _) = run(&mut engine);
            assert_eq!(answers.len(), want.len());
            for (got, want) in answers.into_values().zip(&want) {
                assert_eq!((&got.tokens, got.end), (&want.tokens, want.end), "{name} {config:?}");
            }
            let mut back = engine.into_model();
            back.set_adapter("second").expect("it is known");
            model = Some(back);
        }
    }
}

/// An adapter with more than factors has batches of its own, beside a batch of the others.
#[test]
fn an_adapter_that_cannot_be_mixed_runs_by_itself() {
    let golden = Golden::open("qwen3-tied");
    let mut model = golden.load();
    for (name, use_dora) in [("plain", false), ("other", false), ("dora", true)] {
        let config = LoraConfig { use_dora, ..LoraConfig::new(4) };
        model.add_adapter_as(name, &config).expect("a valid configuration");
    }
    assert!(model.row_adapter("dora").expect("it is known").is_none());
    assert!(model.row_adapter("plain").expect("it is known").is_some());
    assert!(model.row_adapter("none").is_err_and(|error| error.to_string().contains("none")));
    let request = |adapter| Request { adapter, ..sampled(beginning(&golden, 20), 6, 1) };
    let base = alone(&model, request(AdapterChoice::Base));
    let mut engine = Engine::new(model, EngineConfig::default()).expect("a valid configuration");
    for name in ["plain", "dora", "other"] {
        engine.submit(request(AdapterChoice::Named(name.to_owned()))).expect("it is known");
    }
    let (answers, _) = run(&mut engine);
    // Untrained adapters change nothing; DoRA's magnitudes are rounded.
    for ((_, answer), exact) in answers.iter().zip([true, false, true]) {
        assert_eq!(answer.ids(), base[0].ids());
        assert!(!exact || answer.tokens == base[0].tokens);
    }
}

#[test]
fn a_sleeping_engine_has_no_cache_and_loses_no_request() {
    let golden = Golden::open("llama3");
    let model = golden.load();
    let request = || sampled(beginning(&golden, 20), 12, 8);
    let want = alone(&model, request());
    let mut engine = Engine::new(&model, EngineConfig::default()).expect("a valid configuration");
    engine.submit(request()).expect("a valid request");
    let mut tokens = Vec::new();
    for _ in 0..5 {
        tokens.extend(engine.step());
    }
    engine.sleep();
    assert!(engine.stats().is_asleep && !engine.has_work() && engine.step().is_empty());
    engine.wake().expect("there is memory");
    while engine.has_work() {
        tokens.extend(engine.step());
    }
    let tokens: Vec<NewToken> = tokens
        .into_iter()
        .filter_map(|event| if let Event::Token { token, .. } = event { Some(token) } else { None })
        .collect();
    assert_eq!(tokens, want[0].tokens);
}

#[test]
fn requests_that_cannot_run_are_refused() {
    let golden = Golden::open("llama3");
    let model = golden.load();
    let config = EngineConfig { cache: CacheSize::Pages(2), max_waiting: 3, ..EngineConfig::default() };
    let mut engine = Engine::new(&model, config).expect("a valid configuration");
    let sampling = SamplingParams { top_p: 0.0, ..SamplingParams::default() };
    for (request, message) in [
        (Request::new(Vec::new()), "the prompt has 0 tokens"),
        (Request::new(vec![1; 500]), "max_seq_length"),
        (Request::new(vec![u32::MAX]), "vocabulary"),
        (Request::new(vec![1; 32]), "the key/value cache 32"),
        (Request { n: 0, ..Request::new(vec![1]) }, "n is 0"),
        (Request { n: 4, ..Request::new(vec![1]) }, "max_waiting is 3"),
        (Request { sampling, ..Request::new(vec![1]) }, "top_p is 0"),
    ] {
        let error = engine.submit(request).expect_err(message).to_string();
        assert!(error.contains(message), "{error}");
    }
    assert!(!engine.has_work());
    // The text ends where the cache does.
    engine.submit(greedy(vec![1; 20], 100)).expect("a valid request");
    let (answers, _) = run(&mut engine);
    let answer = answers.values().next().expect("one answer");
    assert_eq!((answer.tokens.len(), answer.end), (12, Some(FinishReason::Length)));
    for (config, message) in [
        (EngineConfig { max_batch_tokens: 8, ..config }, "max_batch_tokens is 8"),
        (EngineConfig { cache: CacheSize::Bytes(10), ..config }, "no page"),
        (EngineConfig { max_sequences: 0, ..config }, "max_sequences is 0"),
    ] {
        let error = Engine::new(&model, config).expect_err(message).to_string();
        assert!(error.contains(message), "{error}");
    }
}

/// Weights that are not finite fail the sample with their name.
#[test]
fn logits_that_are_not_finite_fail_the_sample() {
    let name = "model.layers.1.mlp.down_proj.weight";
    let (_dir, golden) = poisoned("qwen3-tied", name, 5);
    let answer = alone(&golden.load(), greedy(vec![1, 2, 3], 4)).remove(0);
    assert!(answer.error.as_ref().is_some_and(|error| error.contains(name)), "{answer:?}");
}
