//! `rekindle chat`: a conversation in the terminal.

mod command;
mod input;

use std::fs::OpenOptions;
use std::io::{IsTerminal, Write, stdout};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rekindle::engine::{Engine, EngineConfig};
use rekindle::{
    ChatPrompt, Error, GeneratedText, GenerationConfig, Message, Model, StopReason, Tokenizer, generate_text_on,
};
use serde_json::{Value, json};

use crate::args::ChatArgs;
use crate::failure::Failure;
use crate::{open, output, signals};

use command::{AdapterRequest, ChatCommand};
use input::{Input, Line};

/// The tags around a model's reasoning.
const THINK: [&str; 2] = ["<think>", "</think>"];

pub(crate) fn run(args: &ChatArgs) -> Result<(), Failure> {
    let (model, tokenizer) = open::open_named(&args.model, &args.adapter, &args.load)?;
    let tokenizer = open::need_tokenizer(&model, tokenizer)?;
    tokenizer.chat_template().map_err(Error::from)?;
    let interrupted = Arc::new(AtomicBool::new(false));
    signals::raise_on_interrupt(&interrupted).map_err(Failure::Signals)?;
    let eos_ids = model.end_tokens(Some(&tokenizer))?;
    let config = GenerationConfig {
        max_new_tokens: args.max_new_tokens.unwrap_or(usize::MAX),
        temperature: args.temperature,
        seed: args.seed,
        eos_ids,
        ..args.filters.config()
    };
    let adapter = model.active_adapter().map(str::to_owned);
    let limits = EngineConfig { max_sequences: 1, ..EngineConfig::for_device(model.causal_lm().device()) };
    let chat = Chat {
        engine: Engine::new(model, limits).map_err(Error::from)?,
        tokenizer,
        config,
        system: args.system.clone(),
        turns: Vec::new(),
        adapter,
        interrupted: interrupted.clone(),
    };
    chat.run(Input::start(interrupted))
}

/// A conversation and the model that answers.
struct Chat {
    /// Keeps the keys and values of the conversation, so that a turn computes only what is new.
    engine: Engine<Model>,
    tokenizer: Tokenizer,
    config: GenerationConfig,
    system: Option<String>,
    turns: Vec<Message>,
    /// The adapter that `/adapter on` activates.
    adapter: Option<String>,
    interrupted: Arc<AtomicBool>,
}

impl Chat {
    fn run(mut self, input: Input) -> Result<(), Failure> {
        let is_terminal = input.is_terminal();
        if is_terminal {
            eprintln!("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends the program");
        }
        loop {
            let line = match input.next() {
                Line::Text(line) => line,
                Line::Interrupted => {
                    eprintln!("\nCtrl-D or /exit ends the program");
                    continue;
                }
                Line::End => return Ok(()),
            };
            let command = match ChatCommand::read(&line) {
                Ok(Some(ChatCommand::Exit)) => return Ok(()),
                Ok(Some(command)) => self.obey(command),
                Ok(None) => continue,
                Err(problem) => Err(Failure::Configuration(problem)),
            };
            match command {
                Ok(true) => {}
                // The reader of the answers has gone.
                Ok(false) => return Ok(()),
                Err(failure) if is_terminal => eprintln!("error: {failure}"),
                Err(failure) => return Err(failure),
            }
        }
    }

    /// Carries out a command; returns false if nobody reads the answers any more.
    fn obey(&mut self, command: ChatCommand) -> Result<bool, Failure> {
        match command {
            ChatCommand::Say(text) => {
                self.turns.push(Message::new("user", text));
                let answered = self.answer();
                if answered.is_err() {
                    self.turns.pop();
                }
                return answered;
            }
            ChatCommand::Retry => {
                let said = self.turns.pop_if(|turn| turn.role == "assistant");
                if self.turns.is_empty() {
                    return Err(Failure::Configuration("there is no question to answer again".to_owned()));
                }
                let answered = self.answer();
                if answered.is_err() {
                    self.turns.extend(said);
                }
                return answered;
            }
            ChatCommand::System(None) => eprintln!("{}", self.system.as_deref().unwrap_or("no system prompt")),
            ChatCommand::System(text) => self.system = text.filter(|text| text != "off"),
            ChatCommand::Adapter(request) => self.choose_adapter(request)?,
            ChatCommand::Reset => self.turns.clear(),
            ChatCommand::Save(path) => self.save(&path)?,
            ChatCommand::Help => eprintln!("{}", command::HELP),
            ChatCommand::Exit => {}
        }
        Ok(true)
    }

    /// Activates an adapter, or prints the active one.
    fn choose_adapter(&mut self, request: AdapterRequest) -> Result<(), Failure> {
        let name = match request {
            AdapterRequest::Show => None,
            AdapterRequest::Off => {
                if self.engine.model().active_adapter().is_some() {
                    self.engine.with_model(Model::disable_adapter)?;
                }
                None
            }
            AdapterRequest::On => {
                let missing = || "there is no adapter; start with --adapter NAME=DIR".to_owned();
                Some(self.adapter.clone().ok_or_else(|| Failure::Configuration(missing()))?)
            }
            AdapterRequest::Named(name) => Some(name),
        };
        if let Some(name) = name {
            let known = self.engine.model().adapters();
            if !known.contains(&name.as_str()) {
                let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                return Err(Failure::Configuration(format!("there is no adapter {name:?}; loaded: {known}")));
            }
            self.engine.with_model(|model| model.set_adapter(&name))?;
            self.adapter = Some(name);
        }
        let model = self.engine.model();
        let active = model.active_adapter();
        let list = model.adapters().into_iter().map(|name| {
            let mark = if active == Some(name) { " (active)" } else { "" };
            format!("{name}{mark}")
        });
        let list: Vec<String> = list.collect();
        eprintln!("{}", if list.is_empty() { "no adapter".to_owned() } else { list.join(", ") });
        Ok(())
    }

    /// Answers the last turn; returns false if nobody reads the answer.
    fn answer(&mut self) -> Result<bool, Failure> {
        let prompt = ChatPrompt { messages: self.messages(), ..ChatPrompt::default() };
        let text = prompt.render(&self.tokenizer).map_err(Error::from)?;
        let ids = self.tokenizer.encode(&text, false).map_err(Error::from)?;
        let limit = self.engine.model().causal_lm().max_seq_length();
        if ids.len() >= limit {
            return Err(Failure::Configuration(format!(
                "the conversation has {} tokens, and --max-seq-length is {limit}; /reset begins a new one",
                ids.len()
            )));
        }
        let is_reasoning = text.trim_end().ends_with(THINK[0]);
        let mut dimmer = Dimmer { is_terminal: stdout().is_terminal() };
        let mut shown = output::piece(&dimmer.begin(is_reasoning));
        let interrupted = self.interrupted.clone();
        let answered = generate_text_on(&mut self.engine, &self.tokenizer, &ids, &self.config, &[], |piece| {
            shown = output::piece(&dimmer.piece(piece));
            matches!(shown, Ok(true)) && !interrupted.load(Ordering::Relaxed)
        });
        let is_stopped = self.interrupted.swap(false, Ordering::Relaxed);
        let is_read = shown? && output::piece(&format!("{}\n", dimmer.end()))?;
        let GeneratedText { text, generated, .. } = answered?;
        // The next answer draws other numbers.
        self.config.seed = self.config.seed.wrapping_add(1);
        match generated.stop {
            StopReason::Caller if is_stopped => eprintln!("(stopped)"),
            StopReason::Length => eprintln!("(cut: --max-new-tokens or --max-seq-length {limit} is reached)"),
            _ => {}
        }
        self.turns.push(turn(&text, is_reasoning));
        Ok(is_read)
    }

    fn messages(&self) -> Vec<Message> {
        let system = self.system.as_deref().map(|text| Message::new("system", text));
        system.into_iter().chain(self.turns.iter().cloned()).collect()
    }

    /// Appends the conversation to a file of rows.
    fn save(&self, path: &Path) -> Result<(), Failure> {
        if self.turns.is_empty() {
            return Err(Failure::Configuration("there is nothing to save yet".to_owned()));
        }
        let messages = self.messages().into_iter().map(|message| {
            let mut fields = json!({"role": message.role, "content": message.content});
            for (name, value) in message.extra {
                fields[name] = value;
            }
            fields
        });
        let row = json!({"messages": messages.collect::<Vec<Value>>()});
        let file = OpenOptions::new().create(true).append(true).open(path);
        let written = file.and_then(|mut file| file.write_all(format!("{row}\n").as_bytes()));
        written.map_err(|source| Failure::File { path: path.to_owned(), source })?;
        eprintln!("appended the conversation to {} as a row of a dataset", path.display());
        Ok(())
    }
}

/// Returns the assistant's turn, with its reasoning apart.
fn turn(text: &str, is_reasoning: bool) -> Message {
    let Some((reasoning, content)) = text.split_once(THINK[1]) else { return Message::new("assistant", text) };
    let reasoning = reasoning.trim_start();
    let tagged = reasoning.strip_prefix(THINK[0]);
    if tagged.is_none() && !is_reasoning {
        return Message::new("assistant", text);
    }
    let mut turn = Message::new("assistant", content.trim_start());
    let reasoning = tagged.unwrap_or(reasoning).trim();
    if !reasoning.is_empty() {
        turn.extra.insert("reasoning_content".to_owned(), Value::from(reasoning));
    }
    turn
}

/// Shows reasoning dimly on a terminal.
struct Dimmer {
    is_terminal: bool,
}

impl Dimmer {
    fn begin(&mut self, is_reasoning: bool) -> String {
        if self.is_terminal && is_reasoning { "\x1b[2m".to_owned() } else { String::new() }
    }

    fn piece(&mut self, piece: &str) -> String {
        if !self.is_terminal {
            return piece.to_owned();
        }
        let [open, close] = THINK;
        piece.replace(open, &format!("\x1b[2m{open}")).replace(close, &format!("{close}\x1b[0m"))
    }

    fn end(&mut self) -> &'static str {
        if self.is_terminal { "\x1b[0m" } else { "" }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasoning_is_apart_from_the_content() {
        let parts = |text: &str, is_reasoning| {
            let turn = turn(text, is_reasoning);
            (turn.content.unwrap(), turn.extra.get("reasoning_content").map(|text| text.as_str().unwrap().to_owned()))
        };
        assert_eq!(parts("<think>\nhm\n</think>\n\nyes", false), ("yes".to_owned(), Some("hm".to_owned())));
        assert_eq!(parts("hm\n</think>\n\nyes", true), ("yes".to_owned(), Some("hm".to_owned())));
        assert_eq!(parts("<think>\n\n</think>\n\nyes", false), ("yes".to_owned(), None));
        for text in ["yes", "a </think> b", "<think>hm"] {
            assert_eq!(parts(text, false), (text.to_owned(), None));
        }
    }
}
