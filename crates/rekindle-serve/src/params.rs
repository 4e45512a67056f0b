//! The parameters that chat and text completions have in common.

use serde_json::{Map, Value};

use crate::constraint::Grammar;
use crate::engine::{EngineLimits, Sampling, Stops};
use crate::error::ApiError;
use crate::fields::{Fields, type_name};

/// Fields without an effect on the answer.
pub(crate) const IGNORED: [&str; 11] = [
    "cache_salt",
    "metadata",
    "prediction",
    "priority",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "spaces_between_special_tokens",
    "store",
    "user",
];

/// Fields that other servers know, with the way to say the same here.
const RENAMED: [(&str, &str); 9] = [
    ("guided_json", "use response_format or structured_outputs.json"),
    ("guided_regex", "use structured_outputs.regex"),
    ("guided_choice", "use structured_outputs.choice"),
    ("guided_grammar", "use structured_outputs.grammar"),
    ("functions", "use tools"),
    ("function_call", "use tool_choice"),
    ("lora_path", "use model with the name of an adapter"),
    ("prompt_logprobs", "use echo with logprobs in /v1/completions"),
    ("chat_template", "the server renders the template of its model only"),
];

/// The most samples of one prompt.
const MAX_N: usize = 128;

/// The most stop strings.
const MAX_STOPS: usize = 16;

/// The most tokens of `logprobs` and `top_logprobs`.
pub(crate) const MAX_LOGPROBS: usize = 20;

/// The common parameters of a request.
#[derive(Debug)]
pub(crate) struct Params {
    /// The name as the client wrote it.
    pub(crate) model: String,
    pub(crate) n: usize,
    pub(crate) sampling: Sampling,
    pub(crate) stops: Stops,
    pub(crate) skip_special_tokens: bool,
    pub(crate) stream: Option<StreamOptions>,
    pub(crate) return_token_ids: bool,
    pub(crate) grammar: Option<Grammar>,
    /// The parameter that asked for `grammar`.
    pub(crate) grammar_param: &'static str,
}

/// The options of a streamed answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StreamOptions {
    /// Send the usage in a chunk of its own at the end.
    pub(crate) include_usage: bool,
    /// Send the usage so far in every chunk.
    pub(crate) continuous_usage: bool,
}

impl Params {
    /// Takes the common parameters from the fields of a body.
    pub(crate) fn take(fields: &mut Fields, limits: EngineLimits) -> Result<Self, ApiError> {
        for (name, way_out) in RENAMED {
            if fields.take(name).is_some() {
                return Err(fields.error(name, format_args!("is not supported; {way_out}")));
            }
        }
        let model = fields.required_string("model")?;
        let n = fields.count("n", 1, MAX_N)?.unwrap_or(1);
        if let Some(best_of) = fields.count("best_of", 1, MAX_N)?
            && best_of != n
        {
            return Err(fields.error("best_of", format_args!("is {best_of}; only the value of n ({n}) is supported")));
        }
        let sampling = sampling(fields, limits)?;
        let (grammar, grammar_param) = grammar(fields)?;
        let stops = stops(fields, limits)?;
        let skip_special_tokens = fields.boolean("skip_special_tokens")?.unwrap_or(true);
        let stream = stream(fields)?;
        let return_token_ids = fields.boolean("return_token_ids")?.unwrap_or(false);
        Ok(Self { model, n, sampling, stops, skip_special_tokens, stream, return_token_ids, grammar, grammar_param })
    }
}

fn sampling(fields: &mut Fields, limits: EngineLimits) -> Result<Sampling, ApiError> {
    let unlimited = f64::INFINITY;
    let top_p = fields.number("top_p", 0.0, 1.0)?.unwrap_or(1.0);
    if top_p == 0.0 {
        return Err(fields.error("top_p", "is 0; it must be above 0 and at most 1"));
    }
    let repetition_penalty = fields.number("repetition_penalty", 0.0, unlimited)?.unwrap_or(1.0);
    if repetition_penalty == 0.0 {
        return Err(fields.error("repetition_penalty", "is 0; it must be above 0, and 1 is none"));
    }
    Ok(Sampling {
        temperature: fields.number("temperature", 0.0, 2.0)?.unwrap_or(1.0) as f32,
        // vLLM's name of "all tokens" is -1.
        top_k: fields.integer("top_k", -1, i64::MAX)?.unwrap_or(0).max(0) as usize,
        top_p: top_p as f32,
        min_p: fields.number("min_p", 0.0, 1.0)?.unwrap_or(0.0) as f32,
        repetition_penalty: repetition_penalty as f32,
        presence_penalty: fields.number("presence_penalty", -2.0, 2.0)?.unwrap_or(0.0) as f32,
        frequency_penalty: fields.number("frequency_penalty", -2.0, 2.0)?.unwrap_or(0.0) as f32,
        logit_bias: logit_bias(fields, limits)?,
        seed: fields.integer("seed", i64::MIN, i64::MAX)?.map(|seed| seed as u64),
    })
}

/// Takes `logit_bias`, an object from token ids to numbers.
fn logit_bias(fields: &mut Fields, limits: EngineLimits) -> Result<Vec<(u32, f32)>, ApiError> {
    let biases: Map<String, Value> = fields.object("logit_bias")?.unwrap_or_default();
    let read = |(id, bias): (&String, &Value)| {
        let id = id.parse::<u32>().ok().filter(|&id| (id as usize) < limits.vocab_size);
        let bias = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        Some((id?, bias? as f32))
    };
    let wrong = biases.iter().find(|bias| read(*bias).is_none());
    if let Some((id, bias)) = wrong {
        return Err(fields.error(
            "logit_bias",
            format_args!(
                "has {id:?}: {bias}; keys are token ids below {}, and values numbers from -100 to 100",
                limits.vocab_size
            ),
        ));
    }
    Ok(biases.iter().filter_map(read).collect())
}

fn stops(fields: &mut Fields, limits: EngineLimits) -> Result<Stops, ApiError> {
    let strings = match fields.take("stop") {
        None => Vec::new(),
        Some(Value::String(stop)) => vec![stop],
        Some(Value::Array(stops)) => {
            let strings = stops.into_iter().map(|stop| match stop {
                Value::String(stop) => Ok(stop),
                other => Err(fields.error("stop", format_args!("has {} in it, not a string", type_name(&other)))),
            });
            strings.collect::<Result<_, _>>()?
        }
        Some(other) => {
            return Err(fields.error("stop", format_args!("is {}, not a string or a list", type_name(&other))));
        }
    };
    if strings.len() > MAX_STOPS {
        return Err(fields.error("stop", format_args!("has {} strings; {MAX_STOPS} at most", strings.len())));
    }
    if strings.iter().any(String::is_empty) {
        return Err(fields.error("stop", "has an empty string, at which nothing ends; leave it out"));
    }
    Ok(Stops {
        strings,
        ids: fields.ids("stop_token_ids", limits.vocab_size)?.unwrap_or_default(),
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
        min_tokens: fields.count("min_tokens", 0, limits.max_model_len)?.unwrap_or(0),
        include_stop: fields.boolean("include_stop_str_in_output")?.unwrap_or(false),
    })
}

fn stream(fields: &mut Fields) -> Result<Option<StreamOptions>, ApiError> {
    let is_stream = fields.boolean("stream")?.unwrap_or(false);
    let Some(mut options) = fields.fields("stream_options")? else {
        return Ok(is_stream.then(StreamOptions::default));
    };
    if !is_stream {
        return Err(fields.error("stream_options", "is set without stream = true"));
    }
    let found = StreamOptions {
        include_usage: options.boolean("include_usage")?.unwrap_or(false),
        continuous_usage: options.boolean("continuous_usage_stats")?.unwrap_or(false),
    };
    options.finish(&["include_obfuscation"])?;
    Ok(Some(found))
}

/// Takes the form of the answer, from OpenAI's `response_format` or vLLM's `structured_outputs`.
fn grammar(fields: &mut Fields) -> Result<(Option<Grammar>, &'static str), ApiError> {
    let format = fields.fields("response_format")?.map(response_format).transpose()?.flatten();
    let structured = fields.fields("structured_outputs")?.map(structured_outputs).transpose()?;
    match (format, structured) {
        (Some(_), Some(_)) => Err(fields.error("structured_outputs", "and response_format both constrain the answer")),
        (None, Some(grammar)) => Ok((Some(grammar), "structured_outputs")),
        (format, None) => Ok((format, "response_format")),
    }
}

fn response_format(mut format: Fields) -> Result<Option<Grammar>, ApiError> {
    let kind = format.required_string("type")?;
    let grammar = match kind.as_str() {
        "text" => None,
        "json_object" => Some(Grammar::JsonSchema(serde_json::json!({"type": "object"}))),
        "json_schema" => {
            let Some(mut schema) = format.fields("json_schema")? else {
                return Err(format.error("json_schema", "is missing"));
            };
            schema.required_string("name")?;
            let value = schema.take("schema").ok_or_else(|| schema.error("schema", "is missing"))?;
            if !value.is_object() && !value.is_boolean() {
                return Err(schema.error("schema", format_args!("is {}, not an object", type_name(&value))));
            }
            // Answers always match the schema.
            schema.boolean("strict")?;
            schema.finish(&["description"])?;
            Some(Grammar::JsonSchema(value))
        }
        "regex" => Some(Grammar::Regex(pattern(&mut format, &["regex", "pattern"])?)),
        "grammar" => {
            if let Some(syntax) = format.string("syntax")?.filter(|syntax| syntax != "lark") {
                return Err(format.error("syntax", format_args!("is {syntax:?}; it must be \"lark\"")));
            }
            Some(Grammar::Lark(pattern(&mut format, &["grammar"])?))
        }
        other => {
            let known = "\"text\", \"json_object\", \"json_schema\", \"regex\" or \"grammar\"";
            return Err(format.error("type", format_args!("is {other:?}; it must be {known}")));
        }
    };
    format.finish(&[])?;
    Ok(grammar)
}

fn pattern(format: &mut Fields, names: &[&str]) -> Result<String, ApiError> {
    for name in names {
        if let Some(text) = format.string(name)? {
            return Ok(text);
        }
    }
    Err(format.error(names[0], "is missing"))
}

fn structured_outputs(mut outputs: Fields) -> Result<Grammar, ApiError> {
    let mut found = Vec::new();
    match outputs.take("json") {
        None => {}
        Some(Value::String(text)) => match serde_json::from_str(&text) {
            Ok(schema) => found.push(Grammar::JsonSchema(schema)),
            Err(error) => return Err(outputs.error("json", format_args!("is not JSON: {error}"))),
        },
        Some(schema) => found.push(Grammar::JsonSchema(schema)),
    }
    if outputs.boolean("json_object")?.unwrap_or(false) {
        found.push(Grammar::JsonSchema(serde_json::json!({"type": "object"})));
    }
    found.extend(outputs.string("regex")?.map(Grammar::Regex));
    found.extend(outputs.string("grammar")?.map(Grammar::Lark));
    if let Some(choices) = outputs.list("choice")? {
        let texts = choices.iter().map(|choice| choice.as_str().filter(|text| !text.is_empty()).map(str::to_owned));
        match texts.collect::<Option<Vec<_>>>().filter(|texts| !texts.is_empty()) {
            Some(texts) => found.push(Grammar::Choice(texts)),
            None => return Err(outputs.error("choice", "must be a list of texts that are not empty")),
        }
    }
    let message = "needs exactly one of json, json_object, regex, choice and grammar";
    let one = <[Grammar; 1]>::try_from(found).map_err(|_| ApiError::field("structured_outputs", message));
    outputs.finish(&[])?;
    one.map(|[grammar]| grammar)
        .map_err(|error| ApiError { message: format!("structured_outputs {}", error.message), ..error })
}
