//! An engine whose prompts say what it answers.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rekindle_serve::{
    ChatFormat, ChatInput, Engine, EngineError, EngineErrorKind, EngineEvent, EngineLimits, EngineRequest, EngineStats,
    EventSink, FinishReason, RenderedChat, RequestId, ServedModel, StopMatch, TokenLogprob, ToolFormat, Vocabulary,
};

/// The end token.
const END: u32 = 256;

/// Tokens after the 256 bytes.
const WORDS: [&str; 5] = ["\u{0}end", "<tool_call>", "</tool_call>", "<think>", "</think>"];

pub(crate) const VOCAB: usize = 256 + WORDS.len();
pub(crate) const MAX_LEN: usize = 2000;

/// Every byte is a token. The text after the last "user: " is a command:
///
/// | command | answer |
/// |---|---|
/// | `say X` | X |
/// | `slow X` | X, 5 ms for each token |
/// | `letters` | `a` up to `max_tokens` |
/// | `hang` | nothing until the request is aborted |
/// | `fail X` | X and then an error |
///
/// A constraint is followed at random.
#[derive(Default)]
pub(crate) struct Scripted {
    next: AtomicU64,
    aborted: Arc<Mutex<HashSet<RequestId>>>,
    pub(crate) running: Arc<AtomicUsize>,
    adapters: Mutex<Vec<String>>,
    /// Requests as they came, in `Debug` form.
    pub(crate) requests: Mutex<Vec<String>>,
}

pub(crate) fn bytes(id: u32) -> Vec<u8> {
    match id {
        0..=255 => vec![id as u8],
        id => WORDS.get(id as usize - 256).map(|word| word.as_bytes().to_vec()).unwrap_or_default(),
    }
}

fn encode(text: &str) -> Vec<u32> {
    let mut ids = Vec::new();
    let mut rest = text.as_bytes();
    while let Some(&byte) = rest.first() {
        let word = WORDS.iter().position(|word| rest.starts_with(word.as_bytes()));
        let (id, length) = word.map_or((u32::from(byte), 1), |at| (256 + at as u32, WORDS[at].len()));
        ids.push(id);
        rest = &rest[length..];
    }
    ids
}

fn text(ids: &[u32]) -> String {
    String::from_utf8_lossy(&ids.iter().flat_map(|&id| bytes(id)).collect::<Vec<_>>()).into_owned()
}

fn logprob(id: u32, top: usize) -> TokenLogprob {
    let top = (0..top as u32).map(|rank| ((id + rank) % VOCAB as u32, -0.5 - rank as f32)).collect();
    TokenLogprob { id, logprob: -0.5, top }
}

impl Engine for Scripted {
    fn models(&self) -> Vec<ServedModel> {
        let base = ServedModel { name: "base/model".into(), root: "/models/base".into(), parent: None };
        let adapters = self.adapters.lock().unwrap();
        let adapters = adapters.iter().map(|name| ServedModel {
            name: name.clone(),
            root: format!("/adapters/{name}"),
            parent: Some("base/model".into()),
        });
        [base].into_iter().chain(adapters).collect()
    }

    fn limits(&self) -> EngineLimits {
        EngineLimits { max_model_len: MAX_LEN, vocab_size: VOCAB }
    }

    fn encode(&self, text: &str, _add_special_tokens: bool) -> Result<Vec<u32>, EngineError> {
        Ok(encode(text))
    }

    fn decode(&self, ids: &[u32], _skip_special_tokens: bool) -> Result<String, EngineError> {
        Ok(text(ids))
    }

    fn token_bytes(&self, id: u32) -> Vec<u8> {
        bytes(id)
    }

    fn render_chat(&self, chat: &ChatInput) -> Result<RenderedChat, EngineError> {
        let mut text = String::new();
        if let Some(tools) = &chat.tools {
            text += &format!("tools: {tools}\n");
        }
        for turn in &chat.messages {
            let content = turn.get("content").and_then(|content| content.as_str()).unwrap_or_default();
            if content == "refuse" {
                return Err(EngineError::invalid("the chat template refuses: no refusals"));
            }
            text += &format!("{}: {content}\n", turn["role"].as_str().unwrap());
        }
        if chat.add_generation_prompt {
            text += "assistant: ";
        }
        if chat.kwargs.get("open_thinking").is_some() {
            text += "<think>\n";
        }
        Ok(RenderedChat { ids: encode(&text), text })
    }

    fn chat_format(&self) -> ChatFormat {
        ChatFormat { thinks: true, tools: Some(ToolFormat::Hermes) }
    }

    fn vocabulary(&self) -> Result<Arc<Vocabulary>, EngineError> {
        let mut tokens: Vec<Vec<u8>> = (0..VOCAB as u32).map(bytes).collect();
        tokens[END as usize] = b"\xff<|end|>".to_vec();
        Ok(Arc::new(Vocabulary::new(tokens, &[END]).unwrap()))
    }

    fn submit(&self, mut request: EngineRequest, events: EventSink) -> Result<RequestId, EngineError> {
        let id = RequestId(self.next.fetch_add(1, Ordering::SeqCst));
        self.requests.lock().unwrap().push(format!("{request:?}"));
        let prompt = text(&request.prompt);
        let command = prompt.rsplit("user: ").next().unwrap_or_default();
        let command = command.split("\nassistant: ").next().unwrap_or_default().to_owned();
        if command.starts_with("reject") {
            return Err(EngineError::new(EngineErrorKind::Overloaded, "too many requests wait"));
        }
        let (aborted, running) = (self.aborted.clone(), self.running.clone());
        running.fetch_add(1, Ordering::SeqCst);
        std::thread::spawn(move || {
            if let Some(top) = request.prompt_logprobs {
                let tokens = request.prompt.iter().enumerate();
                let found = tokens.map(|(at, &id)| (at > 0).then(|| logprob(id, top))).collect();
                events.send(0, EngineEvent::Prompt(found));
            }
            for sample in 0..request.n {
                answer(&mut request, &command, sample, &events, &|| aborted.lock().unwrap().contains(&id));
            }
            running.fetch_sub(1, Ordering::SeqCst);
        });
        Ok(id)
    }

    fn abort(&self, id: RequestId) {
        self.aborted.lock().unwrap().insert(id);
    }

    fn load_adapter(&self, name: &str, path: &str, replace: bool) -> Result<(), EngineError> {
        let mut adapters = self.adapters.lock().unwrap();
        if path == "/missing" {
            return Err(EngineError::new(EngineErrorKind::NotFound, "/missing has no adapter"));
        }
        if adapters.iter().any(|known| known == name) {
            let taken = || EngineError::invalid(format!("an adapter {name:?} is loaded already"));
            return if replace { Ok(()) } else { Err(taken()) };
        }
        adapters.push(name.to_owned());
        Ok(())
    }

    fn unload_adapter(&self, name: &str) -> Result<(), EngineError> {
        let mut adapters = self.adapters.lock().unwrap();
        let at = adapters.iter().position(|known| known == name);
        let at = at.ok_or_else(|| EngineError::new(EngineErrorKind::NotFound, format!("no adapter {name:?}")))?;
        adapters.remove(at);
        Ok(())
    }

    fn stats(&self) -> EngineStats {
        EngineStats { running: self.running.load(Ordering::SeqCst), ..EngineStats::default() }
    }
}

/// Sends the events of one sample.
fn answer(
    request: &mut EngineRequest,
    command: &str,
    sample: usize,
    events: &EventSink,
    is_aborted: &dyn Fn() -> bool,
) {
    let (verb, rest) = command.split_once(' ').unwrap_or((command, ""));
    let mut ids = match verb {
        _ if request.constraint.is_some() => random(request, sample),
        "hang" => {
            while !is_aborted() {
                std::thread::sleep(Duration::from_millis(2));
            }
            return;
        }
        "letters" => vec![u32::from(b'a'); request.max_tokens],
        "think" => [encode("<think>\nhm\n</think>\n\nyes"), vec![END]].concat(),
        "call" => {
            let call = "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1, \"b\": 2}}\n</tool_call>";
            [encode(call), vec![END]].concat()
        }
        _ => [encode(rest), vec![END]].concat(),
    };
    let mut stop = None;
    let stop_string = request.stops.strings.iter().find_map(|stop| Some((text(&ids).find(stop.as_str())?, stop)));
    if let Some((at, string)) = stop_string {
        ids.truncate(at);
        stop = Some(StopMatch::Text(string.clone()));
    }
    let is_cut = ids.len() > request.max_tokens || ids.last() != Some(&END) && stop.is_none();
    ids.truncate(request.max_tokens);
    let mut held = Vec::new();
    for id in ids {
        if verb == "slow" {
            std::thread::sleep(Duration::from_millis(5));
        }
        if is_aborted() {
            return;
        }
        let logprobs = request.logprobs.map(|top| logprob(id, top)).into_iter().collect();
        held.extend(if id == END { Vec::new() } else { bytes(id) });
        // An incomplete character waits for its last byte.
        let text = match String::from_utf8(std::mem::take(&mut held)) {
            Ok(text) => text,
            Err(error) => {
                held = error.into_bytes();
                String::new()
            }
        };
        events.send(sample, EngineEvent::Tokens { text, ids: vec![id], logprobs });
    }
    if verb == "fail" {
        let error = EngineError::new(EngineErrorKind::Internal, "the device failed");
        events.send(sample, EngineEvent::Failed(error));
        return;
    }
    let reason = if is_cut { FinishReason::Length } else { FinishReason::Stop };
    events.send(sample, EngineEvent::Finished { reason, stop, cached_tokens: 3 });
}

/// Returns tokens that the constraint allows, chosen at random; where the text may end, it ends.
fn random(request: &mut EngineRequest, sample: usize) -> Vec<u32> {
    let mut constraint = request.constraint.clone().unwrap();
    let mut state = request.sampling.seed.unwrap_or(1).wrapping_add(sample as u64);
    let mut ids = Vec::new();
    while ids.len() < request.max_tokens {
        let mask = constraint.allowed().unwrap();
        let allowed = |id: u32| mask[id as usize / 32] >> (id % 32) & 1 == 1;
        let among = |ids: &mut dyn Iterator<Item = u32>| ids.filter(|&id| allowed(id)).collect::<Vec<u32>>();
        // Quotes, brackets and `</think>` end something; white space is taken only where nothing else may come.
        let closing = among(&mut b"\"}]".iter().map(|&byte| u32::from(byte)).chain([260]));
        let shown = among(&mut (u32::from(b'!')..=u32::from(b'~')).chain([257, 258, 259]));
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let draw = (state >> 33) as usize;
        let from = match (closing, shown) {
            _ if allowed(END) => vec![END],
            (closing, _) if !closing.is_empty() && draw.is_multiple_of(3) => closing,
            (_, shown) if !shown.is_empty() => shown,
            _ => among(&mut (0..VOCAB as u32)),
        };
        let id = from[draw / 3 % from.len()];
        constraint.accept(id).unwrap();
        ids.push(id);
        if id == END {
            break;
        }
    }
    ids
}
