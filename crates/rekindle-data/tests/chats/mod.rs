//! Conversations as transformers renders, tokenizes and masks them: `goldens/chats/chats.jsonl`, made by `goldens/chats/make.py`.

use std::ops::Range;
use std::path::Path;

use rekindle_data::{ChatTemplate, Dataset, EncodeOptions, IGNORED, Message, NotShown, RenderOptions, Tokenizer};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

/// The file: what is rendered, and by which templates.
pub(crate) struct Goldens {
    /// Names of this project's own templates.
    pub(crate) ours: Vec<String>,
    conversations: Vec<Value>,
    /// A template each, with its cases.
    pub(crate) templates: Vec<Value>,
}

impl Goldens {
    pub(crate) fn read() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/chats/chats.jsonl");
        let text = std::fs::read_to_string(path).expect("the golden is there");
        let mut lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("the golden is JSON"));
        let head = lines.next().expect("the first line says what is rendered");
        let list = |name: &str| head[name].as_array().expect("a list").clone();
        Goldens {
            ours: list("ours").iter().map(|name| text_of(name).to_owned()).collect(),
            conversations: list("conversations"),
            templates: lines.collect(),
        }
    }

    /// Checks all cases of one template, whose source this is, and gives what differs.
    pub(crate) fn check(&self, golden: &Value, source: &str) -> Vec<String> {
        let name = text_of(&golden["template"]);
        if digest([source]) != text_of(&golden["sha256"]) {
            return vec![format!("{name}: another template than the golden's; its sha256 is {}", digest([source]))];
        }
        let dir = checkpoint(golden, source);
        let tokenizer = Tokenizer::from_dir(dir.path()).expect("a valid tokenizer");
        let template = match tokenizer.chat_template() {
            Ok(template) => template,
            Err(error) => return vec![format!("{name}: {error}")],
        };
        let cases = golden["cases"].as_array().expect("a list of cases");
        assert_eq!(cases.len(), self.conversations.len(), "{name} has every conversation");
        let check = |case: &Value| {
            let chat = &self.conversations[case["chat"].as_u64().expect("a number") as usize];
            let job = Job { case, chat, source, template, tokenizer: &tokenizer };
            job.compare().err().map(|problem| format!("{name}, {}: {problem}", chat["name"]))
        };
        cases.iter().filter_map(check).collect()
    }
}

/// One conversation by one template.
struct Job<'a> {
    case: &'a Value,
    chat: &'a Value,
    source: &'a str,
    template: &'a ChatTemplate,
    tokenizer: &'a Tokenizer,
}

impl Job<'_> {
    fn compare(&self) -> Result<(), String> {
        let Job { case, chat, source, template, tokenizer } = self;
        let messages: Vec<Message> = chat["messages"].as_array().expect("a list").iter().map(message).collect();
        let rendered = template.render_marked(&messages, &options(chat, source));
        if let Some(error) = case["error"].as_str() {
            return match rendered {
                // How Python words its own errors is Python's.
                Err(_) => Ok(()),
                Ok(marked) => Err(format!("transformers refuses it ({error}), here it is {:?}", marked.text)),
            };
        }
        let marked = rendered.map_err(|error| error.to_string())?;
        if let Some(date) = case["date"].as_str() {
            let text = marked.text.replace(&today(date), "DATE");
            return equal("digest of the text", &digest_lines([&*text]), &case["text_sha256"]);
        }
        let ids = tokenizer.encode(&marked.text, false).map_err(|error| error.to_string())?;
        if case["text"].is_null() {
            let (ids, spans) = (json!(ids).to_string(), json!(chars(&marked.text, &marked.spans)).to_string());
            let mut parts = vec![&*marked.text, &*ids];
            if case["marked"] == true {
                parts.push(&spans);
            }
            return equal("digest", &digest_lines(parts.clone()), &case["sha256"])
                .map_err(|error| format!("{error}\n{parts:?}"));
        }
        equal("text", &marked.text, &case["text"])?;
        equal("ids", &ids, &case["ids"])?;
        self.compare_mask(&ids)
    }

    /// The labels of a row with this conversation.
    fn compare_mask(&self, ids: &[u32]) -> Result<(), String> {
        let expected = match self.case["mask"].as_array() {
            _ if self.chat["add_generation_prompt"] == true => return Ok(()),
            Some(ranges) => ranges.iter().map(|range| index(&range[0])..index(&range[1])).collect(),
            // Markup that a user writes is markup to the tokenizer.
            None if self.chat["name"] == "white space, other scripts and markup" => return Ok(()),
            None => self.turns_by_headers(ids),
        };
        let dataset = self.load(&self.chat["messages"])?;
        let example = dataset.example(0);
        if example.input_ids != ids {
            // A row's arguments are parsed for a template that would encode them again, which transformers leaves to it.
            let parsed = with_parsed_arguments(&self.chat["messages"]).ok_or("the row has other ids than its text")?;
            let dataset = self.load(&parsed)?;
            let of_objects = dataset.example(0);
            return match (of_objects.input_ids, of_objects.labels) == (example.input_ids, example.labels) {
                true => Ok(()),
                false => Err("the row has neither the ids of its text nor those of parsed arguments".to_owned()),
            };
        }
        let trained = |place: &usize| expected.iter().any(|range| range.contains(place));
        let labels: Vec<i32> =
            (0..ids.len()).map(|place| if trained(&place) { ids[place] as i32 } else { IGNORED }).collect();
        if example.labels == labels {
            Ok(())
        } else {
            Err(format!("mask:\n  here {:?}\n  expected {labels:?}", example.labels))
        }
    }

    /// A row with these messages. Templates that leave something out are compared as they are.
    fn load(&self, messages: &Value) -> Result<Dataset, String> {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("row.jsonl");
        let RenderOptions { tools, kwargs, .. } = options(self.chat, self.source);
        let row = json!({"messages": messages, "tools": tools, "chat_template_kwargs": kwargs});
        std::fs::write(&path, row.to_string()).expect("written");
        let options = EncodeOptions { not_shown: NotShown::Allow, ..EncodeOptions::default() };
        let loaded = Dataset::load(&path, Some(self.tokenizer), &options);
        loaded.map(|(dataset, _)| dataset).map_err(|error| error.to_string())
    }

    /// Returns the text between the header of an assistant turn and its end token, for templates without marks, by token
    /// ids alone. A generation prompt that closes the thought belongs to the header.
    fn turns_by_headers(&self, ids: &[u32]) -> Vec<Range<usize>> {
        let encode = |text: &str| self.tokenizer.encode(text, false).expect("encodable");
        let llama = self.source.contains("<|start_header_id|>");
        let (header, end, after) = if llama {
            (encode("<|start_header_id|>assistant<|end_header_id|>\n\n"), encode("<|eot_id|>"), vec![])
        } else {
            (encode("<|im_start|>assistant\n"), encode("<|im_end|>"), encode("\n"))
        };
        let closed = encode("<think>\n\n</think>\n\n");
        let prompts_close = self.source.contains("enable_thinking") && self.chat["kwargs"]["enable_thinking"] == false;
        let mut turns = Vec::new();
        for at in 0..ids.len() {
            if !ids[at..].starts_with(&header) {
                continue;
            }
            let mut start = at + header.len();
            if prompts_close && ids[start..].starts_with(&closed) {
                start += closed.len();
            }
            let mut stop = start + ids[start..].iter().position(|&id| id == end[0]).expect("every turn ends") + 1;
            if ids[stop..].starts_with(&after) {
                stop += after.len();
            }
            turns.push(start..stop);
        }
        turns
    }
}

/// A directory with the tokenizer of the goldens and this template.
fn checkpoint(golden: &Value, source: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/chats/tokenizer.json");
    std::fs::copy(tokenizer, dir.path().join("tokenizer.json")).expect("copied");
    let special = json!({"bos_token": golden["bos_token"], "eos_token": golden["eos_token"]});
    std::fs::write(dir.path().join("tokenizer_config.json"), special.to_string()).expect("written");
    std::fs::write(dir.path().join("chat_template.jinja"), source).expect("written");
    dir
}

/// The messages with the arguments of calls as objects, where they are text.
fn with_parsed_arguments(messages: &Value) -> Option<Value> {
    let mut messages = messages.clone();
    let mut found = false;
    for call in messages.as_array_mut()?.iter_mut().filter_map(|message| message.get_mut("tool_calls")?.as_array_mut())
    {
        for arguments in call.iter_mut().filter_map(|call| call.get_mut("function")?.get_mut("arguments")) {
            if let Some(parsed) = arguments.as_str().and_then(|text| serde_json::from_str(text).ok()) {
                *arguments = parsed;
                found = true;
            }
        }
    }
    found.then_some(messages)
}

/// Byte ranges as ranges of characters, which Python counts.
fn chars(text: &str, spans: &[Range<usize>]) -> Vec<[usize; 2]> {
    let count = |end: usize| text[..end].chars().count();
    spans.iter().map(|span| [count(span.start), count(span.end)]).collect()
}

fn today(format: &str) -> String {
    let template = ChatTemplate::new(&format!("{{{{ strftime_now({format:?}) }}}}")).expect("valid");
    template.render(&[], &RenderOptions::default()).expect("a date")
}

fn equal<T: serde::Serialize>(what: &str, ours: &T, theirs: &Value) -> Result<(), String> {
    let ours = json!(ours);
    if ours == *theirs { Ok(()) } else { Err(format!("{what}:\n  here         {ours}\n  transformers {theirs}")) }
}

/// The inputs of a template besides the messages; Llama's templates read the date from a variable of their own.
fn options(chat: &Value, source: &str) -> RenderOptions {
    let mut kwargs: Map<String, Value> = chat["kwargs"].as_object().cloned().unwrap_or_default();
    if source.contains("date_string") {
        kwargs.insert("date_string".to_owned(), json!("26 Jul 2024"));
    }
    RenderOptions {
        add_generation_prompt: chat["add_generation_prompt"] == true,
        tools: Some(chat["tools"].clone()).filter(|tools| !tools.is_null()),
        kwargs,
    }
}

fn message(value: &Value) -> Message {
    let mut extra = value.as_object().expect("an object").clone();
    let mut take = |name: &str| text_of(&extra.shift_remove(name).expect("role and content")).to_owned();
    let (role, content) = (take("role"), Some(take("content")));
    Message { role, content, extra }
}

fn text_of(value: &Value) -> &str {
    value.as_str().expect("a text")
}

fn index(value: &Value) -> usize {
    value.as_u64().expect("a number") as usize
}

fn digest<'a>(parts: impl IntoIterator<Item = &'a str>) -> String {
    let mut hash = Sha256::new();
    parts.into_iter().for_each(|part| hash.update(part));
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn digest_lines<'a>(parts: impl IntoIterator<Item = &'a str>) -> String {
    digest(parts.into_iter().flat_map(|part| [part, "\n"]))
}
