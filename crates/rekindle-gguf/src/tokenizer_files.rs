//! From the tokenizer of a file to `tokenizer.json` and the files beside it.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::tokenizer::{BYTE, CONTROL, NORMAL, PRE_TOKENIZERS, PreTokenizer, SPACE, UNKNOWN, UNUSED, USER_DEFINED};
use crate::{Error, GgufModel, MetadataArray, MetadataValue};

/// The name of the chat template that is used unless another is asked for.
const DEFAULT_TEMPLATE: &str = "default";

/// Control tokens that end a generation in llama.cpp whatever the file says.
const ENDS: [&str; 11] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<EOT>",
    "_<EOT>",
];

/// A tokenizer of a file, in the form that transformers has.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufTokenizerFiles {
    /// The content of `tokenizer.json`.
    pub tokenizer: Value,
    /// The content of `tokenizer_config.json`.
    pub config: Value,
    /// Chat templates by name; `default` is the one that is used unless another is asked for.
    pub chat_templates: BTreeMap<String, String>,
    /// The token before a text.
    pub bos: Option<u32>,
    /// The tokens that end a generation.
    pub ends: Vec<u32>,
    /// The token of padding.
    pub padding: Option<u32>,
}

/// The behaviour of a pre-tokenizer of llama.cpp.
struct Behaviour {
    steps: &'static PreTokenizer,
    ignore_merges: bool,
    /// True if a text begins with BOS unless the file says something else.
    adds_bos: bool,
    /// True if the models that it belongs to bring texts into Unicode's form NFC, which llama.cpp leaves out.
    nfc: bool,
}

/// Returns the behaviour of a value of `tokenizer.ggml.pre`. llama.cpp has several names for some.
fn behaviour(pre: &str) -> Option<Behaviour> {
    let (name, ignore_merges, adds_bos) = match pre {
        "gpt-2" | "phi-2" | "mpt" | "olmo" | "jais" | "trillion" | "exaone4" | "granite-docling" => {
            ("gpt-2", false, false)
        }
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b" => {
            ("smollm", false, false)
        }
        "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "falcon-h1" | "pixtral" | "midm-2.0" | "lfm2" => {
            ("llama-bpe", true, true)
        }
        "glm4" => ("llama-bpe", true, false),
        "dbrx" | "smaug-bpe" | "chatglm-bpe" => ("dbrx", false, false),
        "qwen2" | "deepseek-r1-qwen" | "megrez" | "stablelm2" | "hunyuan" | "grok-2" | "solar-open" => {
            ("qwen2", false, false)
        }
        "qwen35" => ("qwen35", false, false),
        "tekken" => ("tekken", true, true),
        "gpt-4o" | "llama4" => ("gpt-4o", false, false),
        "deepseek-v3" | "hunyuan-dense" => ("deepseek-v3", false, false),
        "deepseek-coder" => ("deepseek-coder", false, false),
        "seed-coder" => ("seed-coder", false, false),
        _ => return None,
    };
    let steps = PRE_TOKENIZERS.iter().find(|known| known.name == name)?;
    Some(Behaviour { steps, ignore_merges, adds_bos, nfc: matches!(pre, "qwen2" | "qwen35") })
}

impl GgufTokenizerFiles {
    /// Reads the tokenizer of a file; `None` if there is none.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a tokenizer that is inconsistent; [`Error::Model`] for a kind of tokenizer or a
    /// pre-tokenizer that is not supported.
    pub fn read(model: &GgufModel) -> Result<Option<Self>, Error> {
        let reader = TokenizerReader { model };
        match reader.text("model") {
            None | Some("none" | "no_vocab") => Ok(None),
            Some("gpt2") => reader.byte_level().map(Some),
            Some("llama") => reader.sentencepiece().map(Some),
            Some(other) => Err(Error::Model(format!(
                "{} has a tokenizer of the kind \"{other}\", which cannot be loaded; supported: gpt2 (byte-level BPE) and \
                 llama (SentencePiece)",
                model.path().display()
            ))),
        }
    }
}

struct TokenizerReader<'a> {
    model: &'a GgufModel,
}

impl<'a> TokenizerReader<'a> {
    fn get(&self, key: &str) -> Option<&'a MetadataValue> {
        self.model.metadata(&format!("tokenizer.ggml.{key}"))
    }

    fn text(&self, key: &str) -> Option<&'a str> {
        self.get(key)?.as_str()
    }

    fn malformed(&self, reason: String) -> Error {
        Error::malformed(self.model.path(), reason)
    }

    fn tokens(&self) -> Result<&'a [String], Error> {
        match self.get("tokens").and_then(MetadataValue::as_strings) {
            Some(tokens) if !tokens.is_empty() => Ok(tokens),
            _ => Err(self.malformed("tokenizer.ggml.tokens is not a list of texts".to_owned())),
        }
    }

    /// Returns the types of `count` tokens.
    fn types(&self, count: usize) -> Result<Vec<i32>, Error> {
        let Some(value) = self.get("token_type") else { return Ok(vec![NORMAL; count]) };
        let types = value.as_integers().filter(|types| types.len() == count);
        let types =
            types.ok_or_else(|| self.malformed(format!("tokenizer.ggml.token_type is no list of {count} types")))?;
        Ok(types.into_iter().map(|kind| i32::try_from(kind).unwrap_or(NORMAL)).collect())
    }

    /// Returns the id under a key, if the vocabulary has it.
    fn id(&self, key: &str, tokens: &[String]) -> Result<Option<u32>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(id) if id < tokens.len() as u64 => Ok(Some(id as u32)),
            // llama.cpp's own mark of a token that does not exist.
            Some(id) if id == u64::from(u32::MAX) => Ok(None),
            _ => Err(self.malformed(format!("tokenizer.ggml.{key} is {value} and there are {} tokens", tokens.len()))),
        }
    }

    fn flag(&self, key: &str, default: bool) -> bool {
        self.get(key).and_then(MetadataValue::as_bool).unwrap_or(default)
    }

    fn byte_level(&self) -> Result<GgufTokenizerFiles, Error> {
        let pre = self.text("pre").unwrap_or("default");
        let Some(Behaviour { steps, ignore_merges, adds_bos, nfc }) = behaviour(pre) else {
            return Err(Error::Model(format!(
                "{} has the pre-tokenizer \"{pre}\", whose expressions Rekindle does not know; load the model from its \
                 checkpoint in the Hugging Face layout",
                self.model.path().display()
            )));
        };
        let tokens = self.tokens()?;
        let merges = self.get("merges").and_then(MetadataValue::as_strings);
        let merges = merges.ok_or_else(|| self.malformed("tokenizer.ggml.merges is not a list of texts".to_owned()))?;
        let pairs = merges.iter().map(|merge| match merge.split_once(' ') {
            Some((a, b)) if !a.is_empty() && !b.is_empty() => Ok(json!([a, b])),
            _ => Err(self.malformed(format!("tokenizer.ggml.merges has {merge:?}; expected two parts with a space"))),
        });
        let pairs: Vec<Value> = pairs.collect::<Result<_, _>>()?;
        let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let mut pre_tokenizers: Vec<Value> = steps.splits.iter().map(|pattern| split(pattern)).collect();
        if steps.digits {
            pre_tokenizers.push(json!({"type": "Digits", "individual_digits": true}));
        }
        let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": use_regex});
        pre_tokenizers.push(byte_level(steps.gpt2));
        let kinds = self.types(tokens.len())?;
        let vocabulary = vocabulary(tokens, &kinds);
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": added_tokens(tokens, &kinds),
            "normalizer": if nfc { json!({"type": "NFC"}) } else { Value::Null },
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers},
            "post_processor": self.post_processor(tokens, adds_bos)?,
            "decoder": byte_level(true),
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": ignore_merges,
                "vocab": vocabulary, "merges": pairs,
            },
        });
        self.files(json, tokens, adds_bos)
    }

    fn sentencepiece(&self) -> Result<GgufTokenizerFiles, Error> {
        let tokens = self.tokens()?;
        let scores = match self.get("scores") {
            Some(MetadataValue::Array(MetadataArray::F32(scores))) if scores.len() == tokens.len() => scores,
            _ => {
                let count = tokens.len();
                return Err(self.malformed(format!("tokenizer.ggml.scores is no list of {count} numbers")));
            }
        };
        let kinds = self.types(tokens.len())?;
        // The file's own tokens of spaces alone are of marks in the vocabulary.
        let is_spaces = |token: &str| token.chars().all(|letter| letter == ' ');
        let written: Vec<String> = tokens
            .iter()
            .zip(&kinds)
            .map(|(token, kind)| match *kind {
                USER_DEFINED if is_spaces(token) => token.replace(' ', SPACE),
                _ => token.clone(),
            })
            .collect();
        let vocabulary = vocabulary(&written, &kinds);
        let merges = merges_by_score(&written, &kinds, scores, &vocabulary);
        let unknown = self
            .id("unknown_token_id", tokens)?
            .or_else(|| kinds.iter().position(|kind| *kind == UNKNOWN).map(|id| id as u32));
        let prefix = self.flag("add_space_prefix", true);
        let mut added = added_tokens(&written, &kinds);
        for token in added.iter_mut().filter(|_| !prefix) {
            // Tokens of marks alone are found where the normalizer has written marks for spaces.
            let is_marks = token["content"].as_str().is_some_and(|content| content.replace(SPACE, "").is_empty());
            token["normalized"] = is_marks.into();
        }
        let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})];
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if prefix {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": null,
            "post_processor": self.post_processor(tokens, true)?,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": unknown.map(|id| tokens[id as usize].clone()),
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true,
                "ignore_merges": false, "vocab": vocabulary, "merges": merges,
            },
        });
        self.files(json, tokens, true)
    }

    /// Returns the tokens around a text, as `tokenizer.json` has them.
    fn post_processor(&self, tokens: &[String], adds_bos: bool) -> Result<Value, Error> {
        let bos = self.id("bos_token_id", tokens)?.filter(|_| self.flag("add_bos_token", adds_bos));
        let eos = self.id("eos_token_id", tokens)?.filter(|_| self.flag("add_eos_token", false));
        if bos.is_none() && eos.is_none() {
            return Ok(Value::Null);
        }
        let token = |id: u32| &tokens[id as usize];
        let around = |sequence: &str, kind: u32| {
            let special = |id: u32| json!({"SpecialToken": {"id": token(id), "type_id": kind}});
            let text = json!({"Sequence": {"id": sequence, "type_id": kind}});
            bos.map(special).into_iter().chain([text]).chain(eos.map(special)).collect::<Vec<Value>>()
        };
        let specials = bos.into_iter().chain(eos);
        let specials: Map<String, Value> = specials
            .map(|id| (token(id).clone(), json!({"id": token(id), "ids": [id], "tokens": [token(id)]})))
            .collect();
        let pair = [around("A", 0), around("B", 1)].concat();
        Ok(json!({"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": specials}))
    }

    fn files(&self, tokenizer: Value, tokens: &[String], adds_bos: bool) -> Result<GgufTokenizerFiles, Error> {
        let [bos, eos, eot, unknown, padding] =
            ["bos", "eos", "eot", "unknown", "padding"].map(|name| self.id(&format!("{name}_token_id"), tokens));
        let (bos, eos, eot, unknown, padding) = (bos?, eos?, eot?, unknown?, padding?);
        let mut config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false,
            "add_bos_token": self.flag("add_bos_token", adds_bos), "add_eos_token": self.flag("add_eos_token", false),
        });
        for (name, id) in [("bos_token", bos), ("eos_token", eos), ("unk_token", unknown), ("pad_token", padding)] {
            if let Some(id) = id {
                config[name] = tokens[id as usize].clone().into();
            }
        }
        let kinds = self.types(tokens.len())?;
        let named = tokens.iter().zip(&kinds).enumerate();
        let named = named.filter(|(_, (token, kind))| **kind == CONTROL && ENDS.contains(&token.as_str()));
        let mut ends: Vec<u32> = Vec::new();
        for id in eos.into_iter().chain(eot).chain(named.map(|(id, _)| id as u32)) {
            if !ends.contains(&id) {
                ends.push(id);
            }
        }
        Ok(GgufTokenizerFiles { tokenizer, config, chat_templates: self.chat_templates(), bos, ends, padding })
    }

    /// Returns the chat templates whose names can be those of files.
    fn chat_templates(&self) -> BTreeMap<String, String> {
        let mut templates = BTreeMap::new();
        for (key, value) in self.model.all_metadata() {
            let Some(rest) = key.strip_prefix("tokenizer.chat_template") else { continue };
            let name = if rest.is_empty() { Some(DEFAULT_TEMPLATE) } else { rest.strip_prefix('.') };
            let is_name = |name: &&str| {
                !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte))
            };
            if let (Some(name), Some(text)) = (name.filter(is_name), value.as_str()) {
                templates.insert(name.to_owned(), text.to_owned());
            }
        }
        templates
    }
}

/// Returns the ids of tokens by their text; the first of equal ones.
fn vocabulary(tokens: &[String], kinds: &[i32]) -> Map<String, Value> {
    let mut ids = Map::new();
    for (id, (token, kind)) in tokens.iter().zip(kinds).enumerate() {
        // Rows of the embedding table without a token.
        let is_filler = *kind == UNUSED && *token == format!("[PAD{id}]");
        if !is_filler && !ids.contains_key(token) {
            ids.insert(token.clone(), id.into());
        }
    }
    ids
}

/// Returns the tokens that are found in a text before it is split.
fn added_tokens(tokens: &[String], kinds: &[i32]) -> Vec<Value> {
    let is_added = |kind: i32| matches!(kind, CONTROL | USER_DEFINED | UNKNOWN);
    let added = tokens.iter().zip(kinds).enumerate().filter(|(_, (token, kind))| is_added(**kind) && !token.is_empty());
    added
        .map(|(id, (token, kind))| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": *kind != USER_DEFINED,
            })
        })
        .collect()
}

/// Returns the merges that make each token of two others, the highest score first. SentencePiece merges the pair whose
/// token has the highest score, which is the order of merges in BPE.
fn merges_by_score(tokens: &[String], kinds: &[i32], scores: &[f32], vocabulary: &Map<String, Value>) -> Vec<Value> {
    let is_merged = |id: &usize| !matches!(kinds[*id], CONTROL | UNKNOWN | BYTE | UNUSED);
    let mut order: Vec<usize> = (0..tokens.len()).filter(is_merged).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    let id = |part: &str| vocabulary.get(part).and_then(Value::as_u64);
    let mut merges = Vec::new();
    for token in order.into_iter().map(|id| &tokens[id]) {
        let borders = token.char_indices().map(|(at, _)| at).skip(1);
        let mut pairs: Vec<(u64, u64, &str, &str)> = borders
            .filter_map(|at| {
                let (a, b) = token.split_at(at);
                Some((id(a)?, id(b)?, a, b))
            })
            .collect();
        pairs.sort_unstable();
        merges.extend(pairs.into_iter().map(|(_, _, a, b)| json!([a, b])));
    }
    merges
}
