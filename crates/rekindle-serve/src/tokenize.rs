//! `/tokenize` and `/detokenize`.

use serde_json::{Value, json};

use crate::chat::ChatRequest;
use crate::error::ApiError;
use crate::fields::Fields;
use crate::state::ServerState;

/// Returns the ids of `prompt`, or of `messages` in the chat template.
pub(crate) fn tokenize(state: &ServerState, mut fields: Fields) -> Result<Value, ApiError> {
    let engine = &state.engine;
    let limits = engine.limits();
    if let Some(model) = fields.string("model")? {
        state.adapter(&model)?;
    }
    let shows_tokens = fields.boolean("return_token_strs")?.unwrap_or(false);
    let ids = match fields.string("prompt")? {
        Some(text) => {
            let add_special_tokens = fields.boolean("add_special_tokens")?.unwrap_or(true);
            fields.finish(&[])?;
            engine.encode(&text, add_special_tokens)?
        }
        None => {
            let chat = ChatRequest::read_conversation(&mut fields)?;
            fields.finish(&[])?;
            engine.render_chat(&chat)?.ids
        }
    };
    let text = |&id: &u32| String::from_utf8_lossy(&engine.token_bytes(id)).into_owned();
    let mut answer = json!({"count": ids.len(), "max_model_len": limits.max_model_len, "tokens": ids});
    if shows_tokens {
        answer["token_strs"] = ids.iter().map(text).collect();
    }
    Ok(answer)
}

/// Returns the text of `tokens`.
pub(crate) fn detokenize(state: &ServerState, mut fields: Fields) -> Result<Value, ApiError> {
    if let Some(model) = fields.string("model")? {
        state.adapter(&model)?;
    }
    let ids = fields.ids("tokens", state.engine.limits().vocab_size)?;
    let ids = ids.ok_or_else(|| fields.error("tokens", "is missing"))?;
    fields.finish(&[])?;
    Ok(json!({"prompt": state.engine.decode(&ids, false)?}))
}
