//! The engine: tokens of transformers, independence of what runs beside a request, log-probabilities of training, and
//! pages that come back.

mod requests;

use std::collections::BTreeMap;

use rekindle_engine::{
    CacheSize, Engine, EngineConfig, EngineHandle, EngineModel, Event, FinishReason, NewToken, PromptToken, Request,
    RequestId, SamplingParams,
};
use rekindle_kernels::Backend;
use rekindle_models::{Batch, CausalLm, GenerationConfig};
use rekindle_tests::{Golden, MODELS};
use serde_json::Value;

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("a list of ids")
}

/// Everything that a sample returned.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    tokens: Vec<NewToken>,
    end: Option<FinishReason>,
    error: Option<String>,
    cached: usize,
}

impl Answer {
    fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }
}

/// The log-probabilities of prompts.
type Prompts = BTreeMap<RequestId, Vec<Option<PromptToken>>>;

/// Runs until nothing is left to do; returns the answers by request and sample, and the prompts' log-probabilities.
fn run<M: EngineModel>(engine: &mut Engine<M>) -> (BTreeMap<(RequestId, usize), Answer>, Prompts) {
    let (mut answers, mut prompts) = (BTreeMap::<_, Answer>::new(), BTreeMap::new());
    while engine.has_work() {
        for event in engine.step() {
            match event {
                Event::Prompt { request, tokens } => {
                    assert!(prompts.insert(request, tokens).is_none(), "one for each request");
                }
                Event::Token { request, sample, token } => {
                    let answer = answers.entry((request, sample)).or_default();
                    assert_eq!((token.index, answer.end), (answer.tokens.len(), None));
                    answer.tokens.push(token);
                }
                Event::Finished { request, sample, reason, usage } => {
                    let answer = answers.entry((request, sample)).or_default();
                    assert_eq!(usage.new_tokens, answer.tokens.len());
                    answer.cached = usage.cached_tokens;
                    assert_eq!(answer.end.replace(reason), None);
                }
                Event::Failed { request, sample, error } => {
                    answers.entry((request, sample)).or_default().error = Some(error.to_string());
                }
            }
        }
    }
    let stats = engine.stats();
    assert_eq!((stats.pages_used, stats.running, stats.waiting), (0, 0, 0), "nothing is left behind");
    (answers, prompts)
}

/// Answers one request alone.
fn alone(model: &CausalLm, request: Request) -> Vec<Answer> {
    let mut engine = Engine::new(model, EngineConfig::default()).expect("a valid configuration");
    engine.submit(request).expect("a valid request");
    run(&mut engine).0.into_values().collect()
}

fn greedy(prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request { max_tokens, ..Request::new(prompt) }
}

fn sampled(prompt: Vec<u32>, max_tokens: usize, seed: u64) -> Request {
    let sampling = SamplingParams { temperature: 1.0, seed, ..SamplingParams::default() };
    Request { sampling, top_log_probs: 3, ..greedy(prompt, max_tokens) }
}

/// The first tokens of a row that is long enough.
fn beginning(golden: &Golden, length: usize) -> Vec<u32> {
    let mut rows = golden.rows.iter().map(|row| &row.input_ids);
    rows.find(|row| row.len() >= length).expect("a row is long enough")[..length].to_vec()
}

/// All prompts of a model are answered in one batch.
#[test]
fn greedy_tokens_are_those_of_transformers() {
    let goldens = MODELS.iter().map(|name| Golden::open(name)).chain(Golden::families());
    for golden in goldens {
        let model = golden.load();
        let mut engine = Engine::new(&model, EngineConfig::default()).expect("a valid configuration");
        let mut expected = Vec::new();
        for answer in golden.expect["generate"].as_array().expect("a list") {
            let want = ids(&answer["ids"]);
            let id = engine.submit(greedy(ids(&answer["prompt"]), want.len())).expect("golden prompts fit");
            expected.push((id, want));
        }
        let (answers, _) = run(&mut engine);
        for (id, want) in expected {
            assert_eq!(answers[&(id, 0)].ids(), want, "{}", golden.name);
        }
    }
}

/// Prompts of many lengths, some of which begin alike.
fn prompts(golden: &Golden) -> Vec<Vec<u32>> {
    let rows: Vec<&Vec<u32>> = golden.rows.iter().map(|row| &row.input_ids).collect();
    let mut prompts: Vec<Vec<u32>> = rows.iter().map(|row| row[..row.len().min(60)].to_vec()).collect();
    prompts.extend(rows.iter().map(|row| row[..row.len().min(37)].to_vec()));
    prompts.extend(rows.iter().map(|row| [&row[..row.len().min(35)], &[5, 6, 7]].concat()));
    prompts.push(vec![3]);
    prompts
}

/// Configurations that split prompts anywhere, and one whose cache is too small for all.
fn configurations() -> Vec<EngineConfig> {
    let config = |max_batch_tokens, max_sequences, pages| EngineConfig {
        max_batch_tokens,
        max_sequences,
        cache: CacheSize::Pages(pages),
        ..EngineConfig::default()
    };
    vec![config(512, 64, 600), config(7, 3, 40), config(23, 16, 100), config(33, 12, 11)]
}

/// On the CPU in f32: tokens and log-probabilities in the same bits, alone or beside others, whatever the configuration.
#[test]
fn a_request_does_not_depend_on_what_runs_beside_it() {
    let (mut preemptions, mut hits) = (0, 0);
    for name in ["qwen3-tied", "families/gemma3", "families/mistral-window"] {
        let golden = Golden::open(name);
        let model = golden.load_adapted("all-linear");
        let requests = || {
            prompts(&golden).into_iter().enumerate().map(|(seed, prompt)| sampled(prompt, 12 + seed % 5, seed as u64))
        };
        let want: Vec<Answer> = requests().flat_map(|request| alone(&model, request)).collect();
        for config in configurations() {
            let mut engine = Engine::new(&model, config).expect("a valid configuration");
            requests().for_each(|request| assert!(engine.submit(request).is_ok()));
            let (answers, _) = run(&mut engine);
            assert_eq!(answers.len(), want.len());
            for (got, want) in answers.into_values().zip(&want) {
                let want = Answer { cached: got.cached, tokens: want.tokens.clone(), end: want.end, error: None };
                assert_eq!(got, want, "{name} {config:?}");
            }
            preemptions += engine.stats().preemptions;
            hits += engine.stats().prefix_hits;
        }
    }
    assert!(preemptions > 0, "the small cache makes samples give up their pages");
    assert!(hits > 0, "samples that start later find the prefixes of others");
}

/// The engine and the simple loop choose the same tokens.
#[test]
fn one_request_is_generated_as_without_the_engine() {
    let golden = Golden::open("llama3");
    let model = golden.load();
    for (seed, temperature) in [(1, 0.0), (2, 0.7), (3, 1.5)] {
        let prompt = beginning(&golden, 9);
        let config = GenerationConfig {
            max_new_tokens: 20,
            temperature,
            top_k: 30,
            top_p: 0.95,
            repetition_penalty: 1.2,
            seed,
            ..GenerationConfig::default()
        };
        let (want, _) = model.generate(&prompt, &config, |_| true).expect("it fits");
        let request = Request { sampling: config.sampling(), ..greedy(prompt, 20) };
        assert_eq!(alone(&model, request)[0].ids(), want);
    }
}

#[test]
fn samples_of_a_prompt_share_its_pages_and_differ_by_their_stream() {
    let golden = Golden::open("qwen3-tied");
    let model = golden.load();
    for length in [40, 48] {
        let request = |n| Request { n, ..sampled(beginning(&golden, length), 20, 5) };
        let eight = alone(&model, request(8));
        assert_eq!(alone(&model, request(3)), eight[..3]);
        let mut texts: Vec<Vec<u32>> = eight.iter().map(Answer::ids).collect();
        texts.sort_unstable();
        texts.dedup();
        assert!(texts.len() > 6, "{} of 8 are distinct", texts.len());
        // Fewer places than samples, and too few pages for all.
        for (max_sequences, pages) in [(3, 100), (8, 7)] {
            let cache = CacheSize::Pages(pages);
            let config = EngineConfig { max_sequences, cache, ..EngineConfig::default() };
            let mut engine = Engine::new(&model, config).expect("a valid configuration");
            engine.submit(request(8)).expect("a valid request");
            let (answers, _) = run(&mut engine);
            let answers: Vec<_> = answers.into_values().map(|answer| (answer.tokens, answer.end)).collect();
            let want: Vec<_> = eight.iter().map(|answer| (answer.tokens.clone(), answer.end)).collect();
            assert_eq!(answers, want, "{config:?}");
            let stats = engine.stats();
            assert!(stats.computed_tokens < (length + 8 * 40 + 8 * 20) as u64, "the prompt is shared: {stats:?}");
        }
    }
}

/// The bound between sampler and trainer on the CPU in f32.
const LOG_PROB: f32 = 1e-5;

#[test]
fn log_probabilities_are_those_of_training() {
    let mut worst = 0f32;
    for golden in [Golden::open("qwen3-tied"), Golden::open("llama3"), Golden::open("families/gemma2")] {
        let model = golden.load_adapted("all-linear");
        let config = EngineConfig { max_batch_tokens: 11, max_sequences: 4, ..EngineConfig::default() };
        let mut engine = Engine::new(&model, config).expect("a valid configuration");
        let requests: Vec<(RequestId, Vec<u32>)> = golden
            .rows
            .iter()
            .map(|row| {
                let prompt = row.input_ids[..row.input_ids.len().min(50)].to_vec();
                let request = Request { prompt_log_probs: Some(2), ..sampled(prompt.clone(), 15, 9) };
                (engine.submit(request).expect("a valid request"), prompt)
            })
            .collect();
        let (answers, prompt_tokens) = run(&mut engine);
        for (id, prompt) in requests {
            let answer = &answers[&(id, 0)];
            let text = [prompt.clone(), answer.ids()].concat();
            let labels: Vec<i32> = text.iter().map(|&id| id as i32).collect();
            let nll = model.nll(&Batch::from_rows([(text.as_slice(), labels.as_slice())], 0)).expect("it fits");
            let prompt_tokens = &prompt_tokens[&id];
            assert_eq!((prompt_tokens.len(), &prompt_tokens[0]), (prompt.len(), &None));
            let of_prompt = prompt_tokens[1..].iter().map(|token| {
                let token = token.as_ref().expect("it has a context");
                assert_eq!(token.top.len(), 2);
                assert!(token.top[0].log_prob >= token.log_prob.max(token.top[1].log_prob));
                (token.id, token.log_prob)
            });
            let of_text = answer.tokens.iter().map(|token| {
                let difference = (token.sampling_log_prob - token.log_prob).abs();
                assert!(difference <= 1e-6, "temperature 1 without filters: {token:?}");
                (token.id, token.log_prob)
            });
            let got: Vec<(u32, f32)> = of_prompt.chain(of_text).collect();
            assert_eq!(got.len() + 1, text.len());
            for (i, (id, log_prob)) in got.into_iter().enumerate() {
                assert_eq!(id, text[i + 1]);
                worst = worst.max((log_prob + nll[i]).abs());
            }
        }
    }
    println!("log-probabilities off by {worst:.1e}");
    assert!(worst <= LOG_PROB, "{worst:e}");
}

/// 0 new tokens: only the prompt's log-probabilities, as for scoring.
#[test]
fn prompts_can_be_scored_without_new_tokens() {
    let golden = Golden::open("qwen3-tied");
    let model = golden.load();
    let mut engine = Engine::new(&model, EngineConfig::default()).expect("a valid configuration");
    let prompt = beginning(&golden, 20);
    // The pages of the first request would serve the second, whose log-probabilities need every token.
    engine.submit(greedy(prompt.clone(), 1)).expect("a valid request");
    let id = engine.submit(Request { prompt_log_probs: Some(0), ..greedy(prompt, 0) }).expect("a valid request");
    let (answers, prompts) = run(&mut engine);
    assert_eq!((answers[&(id, 0)].tokens.len(), answers[&(id, 0)].end), (0, Some(FinishReason::Length)));
    assert_eq!(prompts[&id].iter().flatten().count(), 19);
}

/// A small generator for tests.
struct Lcg(u64);

impl Lcg {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % n
    }
}

#[test]
fn ten_thousand_requests_leave_no_page_behind() {
    let golden = Golden::open("qwen3-tied");
    let model = golden.load();
    let cache = CacheSize::Pages(48);
    let config = EngineConfig { cache, max_sequences: 32, max_batch_tokens: 128, ..EngineConfig::default() };
    let mut engine = Engine::new(&model, config).expect("a valid configuration");
    let mut random = Lcg(1);
    let vocab = model.config().vocab_size();
    for _ in 0..10 {
        for _ in 0..1000 {
            let length = 1 + random.below(20);
            let prompt = (0..length).map(|i| if i < 16 { i as u32 } else { random.below(vocab) as u32 }).collect();
            engine.submit(greedy(prompt, 1 + random.below(2))).expect("a valid request");
        }
        let (answers, _) = run(&mut engine);
        assert!(answers.values().all(|answer| answer.end == Some(FinishReason::Length)));
    }
    let stats = engine.stats();
    assert_eq!((stats.finished, stats.pages_used), (10_000, 0));
    assert!(stats.pages_cached <= 48 && stats.prefix_hits > 0, "{stats:?}");
}

#[test]
fn streams_cut_at_random_leave_no_page_behind() {
    let golden = Golden::open("qwen3-tied");
    let engine = Engine::new(golden.load(), EngineConfig { max_sequences: 20, ..EngineConfig::default() });
    let handle = EngineHandle::spawn(engine.expect("a valid configuration")).expect("a thread");
    let clients: Vec<_> = (0..64usize)
        .map(|client| {
            let (handle, prompt) = (handle.clone(), beginning(&golden, 3 + client % 30));
            std::thread::spawn(move || {
                let n = 1 + client % 3;
                let mut stream = handle.submit(Request { n, ..sampled(prompt, 60, client as u64) }).expect("it runs");
                // A quarter is read to the end, the others are dropped: some before their first event.
                let events = Lcg(client as u64).below(40);
                if client % 4 == 0 {
                    assert_eq!(stream.by_ref().filter(Event::ends_sample).count(), n);
                } else {
                    assert!(stream.by_ref().take(events).count() <= events);
                }
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().expect("a client does not fail"));
    // Aborts of dropped streams were sent before this call.
    let stats = handle.stats().expect("the engine runs");
    assert_eq!((stats.running, stats.waiting, stats.pages_used, stats.failed), (0, 0, 0, 0), "{stats:?}");
    let samples = (0..64).map(|client| 1 + client % 3).sum::<u64>();
    assert!(stats.aborted > 0 && stats.finished + stats.aborted == samples, "{stats:?}");
}

#[test]
fn the_portable_path_runs_the_same_engine() {
    let golden = Golden::open("families/gemma3");
    let model = golden.load();
    Backend::portable_only(|| {
        for expected in golden.expect["generate"].as_array().expect("a list") {
            let want = ids(&expected["ids"]);
            assert_eq!(alone(&model, greedy(ids(&expected["prompt"]), want.len()))[0].ids(), want);
        }
    });
}
