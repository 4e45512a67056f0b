//! A loaded model as the engine of a server.

use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rekindle::engine::EngineConfig;
use rekindle::{ChatPrompt, Message, Model, PromptEnd, Tokenizer, chat_template_sources};
use rekindle_serve::{
    ChatFormat, ChatInput, Engine, EngineError, EngineErrorKind, EngineLimits, EngineRequest, EngineStats, EventSink,
    RenderedChat, RequestId, ServedModel, Vocabulary,
};
use serde_json::{Map, Value};

use crate::args::NamedAdapter;
use crate::failure::Failure;

use super::invalid;
use super::worker::Worker;

/// A model, its tokenizer and its adapters.
pub(super) struct ModelEngine {
    /// Lives as long as the process, as the engine's thread may.
    tokenizer: &'static Tokenizer,
    format: ChatFormat,
    limits: EngineLimits,
    end_tokens: Vec<u32>,
    vocabulary: OnceLock<Result<Arc<Vocabulary>, String>>,
    base: String,
    adapters: Mutex<Vec<ServedAdapter>>,
    /// Adapters that were unloaded while requests used them.
    retired: Mutex<Vec<ServedAdapter>>,
    worker: Worker,
}

/// An adapter that requests can name.
struct ServedAdapter {
    /// The name in requests.
    name: String,
    /// The name in the model.
    inner: String,
    root: String,
    /// A clone for each request that uses it.
    users: Arc<()>,
}

impl ServedAdapter {
    fn new(name: &str, inner: &str, root: String) -> Self {
        Self { name: name.to_owned(), inner: inner.to_owned(), root, users: Arc::new(()) }
    }
}

impl ModelEngine {
    /// Moves a model to a thread of its own. `base` is its name in requests; `own` is an adapter that was loaded with
    /// it, with its name in the model and that in requests.
    pub(super) fn start(
        model: Model,
        tokenizer: Tokenizer,
        base: String,
        own: Option<(String, String)>,
        adapters: &[NamedAdapter],
        config: EngineConfig,
    ) -> Result<Self, Failure> {
        let end_tokens = model.end_tokens(Some(&tokenizer))?;
        let limits = EngineLimits {
            max_model_len: model.causal_lm().max_seq_length(),
            vocab_size: model.causal_lm().config().vocab_size(),
        };
        let own = own.map(|(inner, name)| ServedAdapter::new(&name, &inner, name.clone()));
        let named = adapters
            .iter()
            .map(|adapter| ServedAdapter::new(&adapter.name, &adapter.name, adapter.path.display().to_string()));
        let served: Vec<ServedAdapter> = own.into_iter().chain(named).collect();
        let mut names: Vec<&str> = served.iter().map(|adapter| adapter.name.as_str()).chain([base.as_str()]).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Failure::Configuration(format!(
                "two models would be called {:?}; give another name with --adapter NAME=DIR or --served-model-name",
                pair[0]
            )));
        }
        let format = chat_format(&tokenizer);
        let tokenizer: &'static Tokenizer = Box::leak(Box::new(tokenizer));
        let worker = Worker::start(model, tokenizer, end_tokens.clone(), config);
        let worker = worker.map_err(|error| Failure::Configuration(error.to_string()))?;
        Ok(Self {
            tokenizer,
            format,
            limits,
            end_tokens,
            vocabulary: OnceLock::new(),
            base,
            adapters: Mutex::new(served),
            retired: Mutex::default(),
            worker,
        })
    }

    /// Removes an adapter from the model, and those of earlier calls, once no request uses them.
    fn retire(&self, adapter: Option<ServedAdapter>) -> Result<(), EngineError> {
        let mut retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        retired.extend(adapter);
        let (unused, used) = retired.drain(..).partition(|adapter| Arc::strong_count(&adapter.users) == 1);
        *retired = used;
        let unused: Vec<ServedAdapter> = unused;
        drop(retired);
        for adapter in unused {
            self.worker.change(move |model| model.delete_adapter(&adapter.inner))?;
        }
        Ok(())
    }

    fn adapters(&self) -> std::sync::MutexGuard<'_, Vec<ServedAdapter>> {
        self.adapters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the form of answers in the tokenizer's chat templates; a broken template has none and fails when it is used.
fn chat_format(tokenizer: &Tokenizer) -> ChatFormat {
    let sources = tokenizer_dir(tokenizer).and_then(|dir| chat_template_sources(&dir).ok()).unwrap_or_default();
    ChatFormat::of_template(&sources.into_values().collect::<String>())
}

/// Returns the directory of the tokenizer's files.
fn tokenizer_dir(tokenizer: &Tokenizer) -> Option<std::path::PathBuf> {
    tokenizer.files().iter().find(|file| file.ends_with("tokenizer.json"))?.parent().map(Path::to_owned)
}

impl Engine for ModelEngine {
    fn models(&self) -> Vec<ServedModel> {
        let base = ServedModel { name: self.base.clone(), root: self.base.clone(), parent: None };
        let adapters = self.adapters();
        let adapters = adapters.iter().map(|adapter| ServedModel {
            name: adapter.name.clone(),
            root: adapter.root.clone(),
            parent: Some(self.base.clone()),
        });
        [base].into_iter().chain(adapters).collect()
    }

    fn limits(&self) -> EngineLimits {
        self.limits
    }

    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, EngineError> {
        self.tokenizer.encode(text, add_special_tokens).map_err(invalid)
    }

    fn encode_prompt(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, EngineError> {
        let limit = self.limits.max_model_len;
        let ids = self.tokenizer.encode_at_most(text, add_special_tokens, limit).map_err(invalid)?;
        ids.ok_or_else(|| {
            let message = format!("the maximum context length is {limit} tokens, and the prompt has more; shorten it");
            EngineError::new(EngineErrorKind::TooLong, message)
        })
    }

    fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, EngineError> {
        self.tokenizer.decode(ids, skip_special_tokens).map_err(invalid)
    }

    fn token_bytes(&self, id: u32) -> Vec<u8> {
        match self.vocabulary() {
            Ok(vocabulary) => vocabulary.bytes(id).to_vec(),
            Err(_) => self.tokenizer.decode(&[id], false).unwrap_or_default().into_bytes(),
        }
    }

    fn render_chat(&self, chat: &ChatInput) -> Result<RenderedChat, EngineError> {
        let end = match (chat.add_generation_prompt, chat.continue_final_message) {
            (_, true) => PromptEnd::Text,
            (true, false) => PromptEnd::AssistantStart,
            (false, false) => PromptEnd::Turn,
        };
        let prompt = ChatPrompt {
            messages: chat.messages.iter().map(message).collect(),
            tools: chat.tools.clone(),
            kwargs: chat.kwargs.clone(),
            chat_template: None,
            end,
        };
        let text = prompt.render(self.tokenizer).map_err(invalid)?;
        let ids = self.encode_prompt(&text, false)?;
        Ok(RenderedChat { text, ids })
    }

    fn chat_format(&self) -> ChatFormat {
        self.format
    }

    fn vocabulary(&self) -> Result<Arc<Vocabulary>, EngineError> {
        let read = || {
            let dir = tokenizer_dir(self.tokenizer).ok_or("the tokenizer has no tokenizer.json")?;
            let text = std::fs::read(dir.join("tokenizer.json")).map_err(|error| error.to_string())?;
            let file: Value = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
            Vocabulary::from_tokenizer_json(&file, self.limits.vocab_size, &self.end_tokens).map(Arc::new)
        };
        self.vocabulary
            .get_or_init(read)
            .clone()
            .map_err(|message| EngineError::new(EngineErrorKind::Internal, message))
    }

    fn submit(&self, mut request: EngineRequest, events: EventSink) -> Result<RequestId, EngineError> {
        let mut user = None;
        if let Some(name) = &request.adapter {
            let adapters = self.adapters();
            let found = adapters.iter().find(|adapter| adapter.name == *name);
            let unloaded = || EngineError::new(EngineErrorKind::NotFound, format!("the adapter {name:?} was unloaded"));
            let found = found.ok_or_else(unloaded)?;
            user = Some(found.users.clone());
            request.adapter = Some(found.inner.clone());
        }
        self.worker.submit(request, events, user)
    }

    fn abort(&self, id: RequestId) {
        self.worker.abort(id);
    }

    fn load_adapter(&self, name: &str, path: &str, replace: bool) -> Result<(), EngineError> {
        let known = self.adapters().iter().position(|adapter| adapter.name == name);
        if name == self.base {
            return Err(EngineError::invalid(format!("{name:?} is the base model; choose another lora_name")));
        }
        if known.is_some() && !replace {
            let way_out = "unload it first, or set load_inplace";
            return Err(EngineError::invalid(format!("an adapter {name:?} is loaded already; {way_out}")));
        }
        self.retire(None)?;
        let (wanted, path) = (name.to_owned(), path.to_owned());
        let root = path.clone();
        let inner = self.worker.change(move |model| {
            // The one that is replaced stays until its requests have ended.
            let known = model.adapters();
            let mut names = (2..).map(|number| format!("{wanted}-{number}"));
            let is_free = |name: &String| !known.contains(&name.as_str());
            let inner = Some(wanted.clone()).filter(is_free).or_else(|| names.find(is_free)).unwrap_or_default();
            model.load_adapter_as(&inner, path)?;
            Ok(inner)
        })?;
        let added = ServedAdapter::new(name, &inner, root);
        let mut adapters = self.adapters();
        let replaced = match adapters.iter().position(|adapter| adapter.name == name) {
            Some(at) => Some(std::mem::replace(&mut adapters[at], added)),
            None => {
                adapters.push(added);
                None
            }
        };
        drop(adapters);
        self.retire(replaced)
    }

    fn unload_adapter(&self, name: &str) -> Result<(), EngineError> {
        let mut adapters = self.adapters();
        let Some(at) = adapters.iter().position(|adapter| adapter.name == name) else {
            let message = format!("there is no adapter {name:?}");
            return Err(EngineError::new(EngineErrorKind::NotFound, message));
        };
        let removed = adapters.remove(at);
        drop(adapters);
        self.retire(Some(removed))
    }

    fn stats(&self) -> EngineStats {
        self.worker.stats()
    }
}

fn message(turn: &Map<String, Value>) -> Message {
    let mut extra = turn.clone();
    let role = extra.shift_remove("role").and_then(|role| role.as_str().map(str::to_owned));
    let content = extra.shift_remove("content").and_then(|content| content.as_str().map(str::to_owned));
    Message { role: role.unwrap_or_default(), content, extra }
}
