//! From a `tokenizer.json` to the tokenizer of a file.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::{Error, MetadataValue};

/// Types of tokens.
pub(crate) const NORMAL: i32 = 1;
pub(crate) const UNKNOWN: i32 = 2;
pub(crate) const CONTROL: i32 = 3;
pub(crate) const USER_DEFINED: i32 = 4;
pub(crate) const UNUSED: i32 = 5;
pub(crate) const BYTE: i32 = 6;

/// SentencePiece's mark of a space.
pub(crate) const SPACE: &str = "\u{2581}";

/// A byte-level pre-tokenizer of llama.cpp.
pub(crate) struct PreTokenizer {
    /// The value of `tokenizer.ggml.pre`.
    pub(crate) name: &'static str,
    /// The regular expressions of the splits before the byte level, in order.
    pub(crate) splits: &'static [&'static str],
    /// True if single digits are split off.
    pub(crate) digits: bool,
    /// True if the byte level splits with GPT-2's expression.
    pub(crate) gpt2: bool,
    /// True if a word that is a token is not merged from its bytes; `None` if both are read.
    pub(crate) ignore_merges: Option<bool>,
}

/// The expression of GPT-4, as OLMo 2, Phi-4 and others write it. Both forms split the same texts.
const CL100K: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const CL100K_POSSESSIVE: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

const BYTE_LEVEL: PreTokenizer =
    PreTokenizer { name: "gpt-2", splits: &[], digits: false, gpt2: true, ignore_merges: None };

/// The pre-tokenizers, by their expressions: llama.cpp has them compiled in, and a file names one.
pub(crate) static PRE_TOKENIZERS: [PreTokenizer; 13] = [
    BYTE_LEVEL,
    PreTokenizer { name: "smollm", digits: true, ..BYTE_LEVEL },
    PreTokenizer { name: "llama-bpe", splits: &[CL100K], gpt2: false, ignore_merges: Some(true), ..BYTE_LEVEL },
    PreTokenizer { name: "dbrx", splits: &[CL100K], gpt2: false, ignore_merges: Some(false), ..BYTE_LEVEL },
    PreTokenizer {
        name: "llama-bpe",
        splits: &[CL100K_POSSESSIVE],
        gpt2: false,
        ignore_merges: Some(true),
        ..BYTE_LEVEL
    },
    PreTokenizer { name: "dbrx", splits: &[CL100K_POSSESSIVE], gpt2: false, ignore_merges: Some(false), ..BYTE_LEVEL },
    PreTokenizer {
        name: "qwen2",
        splits: &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        gpt2: false,
        ..BYTE_LEVEL
    },
    PreTokenizer {
        name: "qwen35",
        splits: &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        gpt2: false,
        ..BYTE_LEVEL
    },
    PreTokenizer {
        name: "tekken",
        splits: &[
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        gpt2: false,
        ..BYTE_LEVEL
    },
    PreTokenizer {
        name: "gpt-4o",
        splits: &[
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        gpt2: false,
        ..BYTE_LEVEL
    },
    PreTokenizer {
        name: "deepseek-v3",
        splits: &[
            r"\p{N}{1,3}",
            r"[一-龥぀-ゟ゠-ヿ]+",
            "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
        ],
        gpt2: false,
        ..BYTE_LEVEL
    },
    PreTokenizer {
        name: "deepseek-coder",
        splits: &["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+"],
        digits: true,
        gpt2: false,
        ..BYTE_LEVEL
    },
    PreTokenizer {
        name: "seed-coder",
        splits: &[
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
        ],
        gpt2: false,
        ..BYTE_LEVEL
    },
];

/// A tokenizer to describe in a file.
#[derive(Clone, Copy, Debug)]
pub struct GgufTokenizer<'a> {
    /// The content of `tokenizer.json`.
    pub json: &'a Value,
    /// Rows of the embedding table; ids without a token become unused ones.
    pub vocab_size: usize,
    /// The token before a text.
    pub bos: Option<u32>,
    /// The token after a text.
    pub eos: Option<u32>,
    /// The token after an answer of a chat, if it is another.
    pub eot: Option<u32>,
    /// The token of padding.
    pub padding: Option<u32>,
    /// True if texts begin with `bos`.
    pub adds_bos: bool,
    /// True if texts end with `eos`.
    pub adds_eos: bool,
    /// The chat template, in Jinja.
    pub chat_template: Option<&'a str>,
    /// A value of `tokenizer.ggml.pre`, for a pre-tokenizer that is not known here.
    pub pre: Option<&'a str>,
}

impl GgufTokenizer<'_> {
    /// Returns the metadata of the tokenizer.
    ///
    /// The pre-tokenizer is found by its regular expressions, so that added tokens do not matter.
    ///
    /// # Errors
    /// [`Error::Model`] for a tokenizer that llama.cpp does not have, and for one with more tokens than `vocab_size`.
    pub fn metadata(&self) -> Result<Vec<(String, MetadataValue)>, Error> {
        let model = &self.json["model"];
        let kind = model["type"].as_str().unwrap_or("BPE");
        if kind != "BPE" {
            return Err(Error::Model(format!("tokenizers of type {kind} cannot be exported to GGUF; BPE can")));
        }
        let is_sentencepiece = model["byte_fallback"].as_bool() == Some(true);
        let vocabulary = self.vocabulary(is_sentencepiece)?;
        let mut out = Vec::new();
        let mut set = |key: &str, value: MetadataValue| out.push((format!("tokenizer.{key}"), value));
        set("ggml.model", if is_sentencepiece { "llama" } else { "gpt2" }.into());
        let pre = match self.pre {
            Some(pre) => pre.to_owned(),
            None if is_sentencepiece => "default".to_owned(),
            None => self.pre_tokenizer()?,
        };
        set("ggml.pre", pre.into());
        let merges = merges(model)?;
        if is_sentencepiece {
            set("ggml.scores", self.scores(&vocabulary.tokens, &merges).into());
            set("ggml.add_space_prefix", self.adds_space_prefix().into());
        } else {
            let joined = merges.iter().map(|[a, b]| format!("{} {}", without_spaces(a), without_spaces(b)));
            set("ggml.merges", joined.collect::<Vec<_>>().into());
        }
        let unknown = model["unk_token"].as_str().and_then(|token| vocabulary.id(token));
        set("ggml.tokens", vocabulary.tokens.into());
        set("ggml.token_type", vocabulary.types.into());
        let ids = [
            ("bos", self.bos),
            ("eos", self.eos),
            ("eot", self.eot.filter(|eot| Some(*eot) != self.eos)),
            ("unknown", unknown),
            ("padding", self.padding),
        ];
        for (name, id) in ids {
            if let Some(id) = id {
                set(&format!("ggml.{name}_token_id"), id.into());
            }
        }
        set("ggml.add_bos_token", self.adds_bos.into());
        set("ggml.add_eos_token", self.adds_eos.into());
        if let Some(template) = self.chat_template {
            set("chat_template", template.into());
        }
        Ok(out)
    }

    fn vocabulary(&self, is_sentencepiece: bool) -> Result<Vocabulary, Error> {
        let words = self.json["model"]["vocab"].as_object();
        let words = words.ok_or_else(|| Error::Model("tokenizer.json has no model.vocab".to_owned()))?;
        let mut by_id: BTreeMap<u64, (String, i32)> = BTreeMap::new();
        let unknown = self.json["model"]["unk_token"].as_str();
        for (word, id) in words {
            let Some(id) = id.as_u64() else { continue };
            let kind = match word.as_str() {
                word if Some(word) == unknown => UNKNOWN,
                word if is_sentencepiece && is_byte(word) => BYTE,
                _ => NORMAL,
            };
            by_id.insert(id, (word.clone(), kind));
        }
        for added in self.json["added_tokens"].as_array().into_iter().flatten() {
            let (Some(id), Some(text)) = (added["id"].as_u64(), added["content"].as_str()) else { continue };
            let is_special = added["special"].as_bool() == Some(true) || looks_special(text);
            let entry = match by_id.get(&id) {
                // The unknown token stays what it is.
                Some((_, UNKNOWN)) if is_sentencepiece => continue,
                _ if is_special => (text.to_owned(), CONTROL),
                _ => (text.replace(SPACE, " "), USER_DEFINED),
            };
            by_id.insert(id, entry);
        }
        let most = by_id.last_key_value().map_or(0, |(id, _)| id + 1);
        if most > self.vocab_size as u64 {
            return Err(Error::Model(format!(
                "the tokenizer has {most} token ids and the model has rows for {}; set resize_model_vocab = {most} when \
                 training",
                self.vocab_size
            )));
        }
        let token = |id: u64| by_id.remove(&id).unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED));
        let (tokens, types) = (0..self.vocab_size as u64).map(token).unzip();
        Ok(Vocabulary { tokens, types })
    }

    /// Returns SentencePiece's scores: minus the rank of the merge that makes a token. llama.cpp merges the pair whose
    /// token has the highest score first, which is the order of merges.
    fn scores(&self, tokens: &[String], merges: &[[String; 2]]) -> Vec<f32> {
        let mut ranks: BTreeMap<String, usize> = BTreeMap::new();
        for (rank, [a, b]) in merges.iter().enumerate() {
            ranks.entry(format!("{a}{b}")).or_insert(rank);
        }
        let lowest = merges.len();
        tokens.iter().map(|token| -(ranks.get(token).copied().unwrap_or(lowest) as f32)).collect()
    }

    /// Returns true if a space is put before texts.
    fn adds_space_prefix(&self) -> bool {
        let normalizers = flatten(&self.json["normalizer"], "normalizers");
        let prepends = normalizers.iter().any(|step| step["type"] == "Prepend" && step["prepend"] == SPACE);
        let pre_tokenizers = flatten(&self.json["pre_tokenizer"], "pretokenizers");
        let metaspace = pre_tokenizers.iter().find(|step| step["type"] == "Metaspace");
        prepends || metaspace.is_some_and(|step| step["prepend_scheme"] != "never" && step["add_prefix_space"] != false)
    }

    /// Returns the name of the pre-tokenizer.
    fn pre_tokenizer(&self) -> Result<String, Error> {
        let steps = flatten(&self.json["pre_tokenizer"], "pretokenizers");
        let (mut splits, mut digits, mut gpt2, mut byte_level) = (Vec::new(), false, false, false);
        let mut unknown = Vec::new();
        for step in &steps {
            match step["type"].as_str().unwrap_or_default() {
                "Split" => match step["pattern"]["Regex"].as_str() {
                    Some(regex) if regex == r"\p{N}" || regex == r"\d" => digits = true,
                    Some(regex) => splits.push(regex),
                    None => unknown.push(step.to_string()),
                },
                "Digits" if step["individual_digits"] == true => digits = true,
                "ByteLevel" => {
                    byte_level = true;
                    gpt2 = step["use_regex"] != false;
                }
                _ => unknown.push(step.to_string()),
            }
        }
        let ignores = self.json["model"]["ignore_merges"].as_bool() == Some(true);
        let fits = |pre: &&PreTokenizer| {
            let merges = pre.ignore_merges.is_none_or(|wanted| wanted == ignores);
            merges && pre.digits == digits && pre.gpt2 == gpt2 && pre.splits == splits
        };
        match PRE_TOKENIZERS.iter().find(fits) {
            Some(found) if byte_level && unknown.is_empty() => Ok(found.name.to_owned()),
            _ => Err(Error::Model(format!(
                "llama.cpp has no pre-tokenizer with these steps, as far as Rekindle knows: {}; name one for \
                 tokenizer.ggml.pre if llama.cpp has it",
                self.json["pre_tokenizer"]
            ))),
        }
    }
}

/// Tokens and their types by id.
struct Vocabulary {
    tokens: Vec<String>,
    types: Vec<i32>,
}

impl Vocabulary {
    fn id(&self, token: &str) -> Option<u32> {
        self.tokens.iter().position(|known| known == token).map(|id| id as u32)
    }
}

/// Returns the steps of a sequence, or a single step.
fn flatten<'a>(step: &'a Value, key: &str) -> Vec<&'a Value> {
    match step[key].as_array() {
        Some(steps) => steps.iter().flat_map(|step| flatten(step, key)).collect(),
        None if step.is_null() => Vec::new(),
        None => vec![step],
    }
}

/// Returns the merges, which are strings with a space or pairs.
fn merges(model: &Value) -> Result<Vec<[String; 2]>, Error> {
    let list = model["merges"].as_array().map(Vec::as_slice).unwrap_or_default();
    let merge = |merge: &Value| match merge {
        Value::String(text) => text.split_once(' ').map(|(a, b)| [a.to_owned(), b.to_owned()]),
        Value::Array(pair) => match &pair[..] {
            [Value::String(a), Value::String(b)] => Some([a.clone(), b.clone()]),
            _ => None,
        },
        _ => None,
    };
    list.iter()
        .map(|value| merge(value).ok_or_else(|| Error::Model(format!("tokenizer.json has the invalid merge {value}"))))
        .collect()
}

/// Replaces spaces in a part of a merge, which a space separates from the other.
fn without_spaces(part: &str) -> String {
    part.replace(' ', "\u{120}")
}

/// Returns true for SentencePiece's tokens of bytes: `<0x00>` to `<0xFF>`.
fn is_byte(word: &str) -> bool {
    let digits = word.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// Returns true for tokens that mark structure although they are not declared special.
fn looks_special(text: &str) -> bool {
    (text.starts_with("<|") && text.ends_with("|>"))
        || (text.starts_with("<｜") && text.ends_with("｜>"))
        || (text.starts_with("<unused") && text.ends_with('>'))
        || ["<pad>", "<mask>", "<2mass>", "[@BOS@]"].contains(&text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn tokenizer(json: &Value) -> GgufTokenizer<'_> {
        GgufTokenizer {
            json,
            vocab_size: 8,
            bos: None,
            eos: Some(3),
            eot: Some(4),
            padding: None,
            adds_bos: false,
            adds_eos: false,
            chat_template: Some("{{ messages }}"),
            pre: None,
        }
    }

    fn byte_level() -> Value {
        json!({
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": CL100K}, "behavior": "Isolated", "invert": false},
                {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false},
            ]},
            "added_tokens": [
                {"id": 3, "content": "<|end|>", "special": true},
                {"id": 4, "content": "<|fim|>", "special": false},
                {"id": 6, "content": "<think>", "special": false},
            ],
            "model": {"type": "BPE", "ignore_merges": true, "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
        })
    }

    fn get(metadata: &[(String, MetadataValue)], key: &str) -> Option<MetadataValue> {
        metadata.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone())
    }

    #[test]
    fn a_byte_level_tokenizer() {
        let json = byte_level();
        let found = tokenizer(&json).metadata().unwrap();
        let text = |key: &str| get(&found, key).unwrap().as_str().unwrap().to_owned();
        assert_eq!((text("tokenizer.ggml.model"), text("tokenizer.ggml.pre")), ("gpt2".into(), "llama-bpe".into()));
        let tokens = get(&found, "tokenizer.ggml.tokens").unwrap();
        assert_eq!(tokens.as_strings().unwrap(), ["a", "b", "ab", "<|end|>", "<|fim|>", "[PAD5]", "<think>", "[PAD7]"]);
        let types = get(&found, "tokenizer.ggml.token_type").unwrap().as_integers().unwrap();
        assert_eq!(types, [1, 1, 1, 3, 3, 5, 4, 5]);
        assert_eq!(get(&found, "tokenizer.ggml.merges").unwrap().as_strings().unwrap(), ["a b"]);
        assert_eq!(get(&found, "tokenizer.ggml.eot_token_id"), Some(4_u32.into()));
        assert_eq!(get(&found, "tokenizer.ggml.bos_token_id"), None);
        assert_eq!(text("tokenizer.chat_template"), "{{ messages }}");
    }

    #[test]
    fn a_sentencepiece_tokenizer() {
        let json = json!({
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ]},
            "added_tokens": [
                {"id": 0, "content": "<unk>", "special": true},
                {"id": 7, "content": "▁▁", "special": false},
            ],
            "model": {
                "type": "BPE", "byte_fallback": true, "unk_token": "<unk>",
                "vocab": {"<unk>": 0, "<0x0A>": 1, "ab": 2, "▁ab": 3, "a": 4, "b": 5, "▁": 6},
                "merges": ["a b", "▁ ab", "▁a b"],
            },
        });
        let found = tokenizer(&json).metadata().unwrap();
        assert_eq!(get(&found, "tokenizer.ggml.model"), Some("llama".into()));
        assert_eq!(get(&found, "tokenizer.ggml.add_space_prefix"), Some(true.into()));
        let types = get(&found, "tokenizer.ggml.token_type").unwrap().as_integers().unwrap();
        assert_eq!(types, [2, 6, 1, 1, 1, 1, 1, 4]);
        let scores = MetadataValue::from(vec![-3.0_f32, -3.0, -0.0, -1.0, -3.0, -3.0, -3.0, -3.0]);
        assert_eq!(get(&found, "tokenizer.ggml.scores"), Some(scores));
        assert_eq!(get(&found, "tokenizer.ggml.tokens").unwrap().as_strings().unwrap()[7], "  ");
        assert_eq!(get(&found, "tokenizer.ggml.unknown_token_id"), Some(0_u32.into()));
    }

    #[test]
    fn what_llama_cpp_does_not_have_is_refused() {
        let mut json = byte_level();
        json["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "x+".into();
        let error = tokenizer(&json).metadata().unwrap_err().to_string();
        assert!(error.contains("no pre-tokenizer") && error.contains("x+"), "{error}");
        let named = GgufTokenizer { pre: Some("viking"), ..tokenizer(&json) }.metadata().unwrap();
        assert_eq!(get(&named, "tokenizer.ggml.pre"), Some("viking".into()));
        let mut json = byte_level();
        let small = GgufTokenizer { vocab_size: 5, ..tokenizer(&json) }.metadata().unwrap_err().to_string();
        assert!(small.contains("7 token ids and the model has rows for 5"), "{small}");
        json["model"]["type"] = "Unigram".into();
        assert!(tokenizer(&json).metadata().unwrap_err().to_string().contains("Unigram"));
    }

    #[test]
    fn every_known_pre_tokenizer_is_found_by_its_steps() {
        for PreTokenizer { name, splits, digits, gpt2, ignore_merges } in &PRE_TOKENIZERS {
            let mut steps: Vec<Value> =
                splits.iter().map(|regex| json!({"type": "Split", "pattern": {"Regex": regex}})).collect();
            if *digits {
                steps.push(json!({"type": "Digits", "individual_digits": true}));
            }
            steps.push(json!({"type": "ByteLevel", "use_regex": gpt2}));
            let mut json = byte_level();
            json["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": steps});
            json["model"]["ignore_merges"] = ignore_merges.unwrap_or(false).into();
            assert_eq!(tokenizer(&json).pre_tokenizer().unwrap(), *name);
        }
    }
}
