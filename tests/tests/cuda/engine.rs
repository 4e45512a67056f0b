//! The engine on a GPU.

use std::collections::BTreeMap;

use rekindle_engine::{CacheSize, Engine, EngineConfig, Event, NewToken, Request, SamplingParams};
use rekindle_kernels::Device;
use rekindle_models::CausalLm;
use rekindle_tests::Golden;

use crate::{MODELS, on};

/// Requests that run together have the tokens and log-probabilities that the CPU's engine gives each of them, and draw with
/// their seeds. Prompts are computed in parts beside single tokens. Steps that began before a sample was known to have ended
/// change nothing.
pub(crate) fn requests(device: &Device) {
    let limits = |max_batch_tokens, max_sequences, pages| EngineConfig {
        max_batch_tokens,
        max_sequences,
        cache: CacheSize::Pages(pages),
        ..EngineConfig::default()
    };
    let (tight, roomy) = (limits(7, 5, 24), limits(512, 16, 200));
    for name in MODELS {
        let golden = Golden::open(name);
        let prompts = || {
            golden.rows.iter().take(6).enumerate().map(|(index, row)| {
                let length = row.input_ids.len().min(3 + 11 * index);
                Request { max_tokens: 9, n: 1 + index % 2, ..Request::new(row.input_ids[..length].to_vec()) }
            })
        };
        let answers = |model: &CausalLm, limits, temperature: f32, stop_ids: &[u32]| {
            let mut engine = Engine::new(model, limits).expect("valid limits");
            for request in prompts() {
                let sampling = SamplingParams { temperature, seed: 3, ..SamplingParams::default() };
                let stop_ids = stop_ids.to_vec();
                engine.submit(Request { sampling, stop_ids, ..request }).expect("a valid request");
            }
            let mut answers = BTreeMap::<_, Vec<NewToken>>::new();
            while engine.has_work() {
                for event in engine.step() {
                    match event {
                        Event::Token { request, sample, token } => {
                            answers.entry((request, sample)).or_default().push(token);
                        }
                        Event::Failed { error, .. } => panic!("{name}: {error}"),
                        Event::Prompt { .. } | Event::Finished { .. } => {}
                    }
                }
            }
            assert_eq!(engine.steps_refusal(), None, "{name}: steps are recorded");
            assert_eq!(engine.stats().pages_used, 0, "{name}: pages come back");
            answers
        };
        let (on_cpu, on_gpu) = (golden.load(), on(device, &golden));
        let (want, got) = (answers(&on_cpu, tight, 0.0, &[]), answers(&on_gpu, tight, 0.0, &[]));
        assert_eq!(got.len(), want.len(), "{name}");
        for (got, want) in got.values().flatten().zip(want.values().flatten()) {
            assert_eq!(got.id, want.id, "{name}");
            let near = (got.log_prob - want.log_prob).abs() <= 1e-4 * want.log_prob.abs().max(1.0);
            assert!(near, "{name}: {got:?} is not {want:?}");
        }
        let ids = |answers: &BTreeMap<_, Vec<NewToken>>| -> Vec<Vec<u32>> {
            answers.values().map(|tokens| tokens.iter().map(|token| token.id).collect()).collect()
        };
        // Every request ends early with one of its tokens.
        let stop_ids: Vec<u32> = ids(&want).iter().map(|ids| ids[3]).collect();
        let stopped = |ids: Vec<u32>| {
            let end = ids.iter().position(|id| stop_ids.contains(id)).map_or(ids.len(), |last| last + 1);
            ids[..end].to_vec()
        };
        let stops: Vec<Vec<u32>> = ids(&want).into_iter().map(stopped).collect();
        assert_eq!(ids(&answers(&on_gpu, roomy, 0.0, &stop_ids)), stops, "{name}");
        let drawn = answers(&on_gpu, tight, 1.0, &[]);
        assert_eq!(drawn, answers(&on_gpu, tight, 1.0, &[]), "{name}: seeds reproduce");
        assert_ne!(drawn, got, "{name}: not greedy");
        for token in drawn.values().flatten() {
            let same = (token.sampling_log_prob - token.log_prob).abs() <= 1e-4 * token.log_prob.abs().max(1.0);
            assert!(same, "{name}: at temperature 1 without filters, {token:?}");
        }
    }
}
