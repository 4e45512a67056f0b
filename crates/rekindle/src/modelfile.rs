//! Ollama's `Modelfile`.

use rekindle_data::{ChatPrompt, Tokenizer};

use crate::Error;

/// A format of chats that Ollama's template language can express, and that many models use.
struct ChatFormat {
    /// A conversation of a system prompt "S", a user's message "U" and the beginning of an answer.
    rendered: &'static str,
    /// The same without a system prompt.
    without_system: &'static str,
    /// Ollama's template.
    template: &'static str,
}

/// The formats. A template is used only if the model's own template renders both conversations as here.
const FORMATS: [ChatFormat; 7] = [
    ChatFormat {
        rendered: "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n",
        without_system: "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n",
        template: "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n",
    },
    ChatFormat {
        rendered: "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nU\
                   <|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        without_system: "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|><|start_header_id|>assistant\
                         <|end_header_id|>\n\n",
        template: "{{ range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>\
                   {{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n",
    },
    ChatFormat {
        rendered: "<start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\n",
        without_system: "<start_of_turn>user\nU<end_of_turn>\n<start_of_turn>model\n",
        template: "{{ range $i, $m := .Messages }}{{ if eq $m.Role \"user\" }}<start_of_turn>user\n{{ if and $.System \
                   (le $i 1) }}{{ $.System }}\n\n{{ end }}{{ $m.Content }}<end_of_turn>\n{{ else if eq $m.Role \
                   \"assistant\" }}<start_of_turn>model\n{{ $m.Content }}<end_of_turn>\n{{ end }}{{ end }}<start_of_turn>\
                   model\n",
    },
    ChatFormat {
        rendered: "<|system|>\nS<|end|>\n<|user|>\nU<|end|>\n<|assistant|>\n",
        without_system: "<|user|>\nU<|end|>\n<|assistant|>\n",
        template: "{{ range .Messages }}<|{{ .Role }}|>\n{{ .Content }}<|end|>\n{{ end }}<|assistant|>\n",
    },
    ChatFormat {
        rendered: "<|im_start|>system<|im_sep|>S<|im_end|><|im_start|>user<|im_sep|>U<|im_end|><|im_start|>assistant\
                   <|im_sep|>",
        without_system: "<|im_start|>user<|im_sep|>U<|im_end|><|im_start|>assistant<|im_sep|>",
        template: "{{ range .Messages }}<|im_start|>{{ .Role }}<|im_sep|>{{ .Content }}<|im_end|>{{ end }}<|im_start|>\
                   assistant<|im_sep|>",
    },
    ChatFormat {
        rendered: "[gMASK]<sop><|system|>\nS<|user|>\nU<|assistant|>",
        without_system: "[gMASK]<sop><|user|>\nU<|assistant|>",
        template: "[gMASK]<sop>{{ range .Messages }}<|{{ .Role }}|>\n{{ .Content }}{{ end }}<|assistant|>",
    },
    ChatFormat {
        rendered: "<|start_of_role|>system<|end_of_role|>S<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>U\
                   <|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        without_system: "<|start_of_role|>user<|end_of_role|>U<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        template: "{{ range .Messages }}<|start_of_role|>{{ .Role }}<|end_of_role|>{{ .Content }}<|end_of_text|>\n{{ end }}\
                   <|start_of_role|>assistant<|end_of_role|>",
    },
];

/// Returns the text of a `Modelfile` that begins with the lines `weights`, and a notice if it has no template.
pub(crate) fn modelfile(weights: &str, tokenizer: &Tokenizer, ends: &[u32]) -> Result<(String, Option<String>), Error> {
    let mut text = weights.to_owned();
    let format = format_of(tokenizer)?;
    if let Some(format) = format {
        text.push_str(&format!("TEMPLATE \"\"\"{}\"\"\"\n", format.template));
    }
    for end in ends {
        if let Some(token) = tokenizer.id_to_token(*end) {
            text.push_str(&format!("PARAMETER stop {token:?}\n"));
        }
    }
    let notice = (format.is_none() && tokenizer.has_chat_template()).then(|| {
        "the Modelfile has no TEMPLATE, because Ollama's form of this model's chat template is not known: Ollama uses the \
         template in the GGUF file if it recognizes it"
            .to_owned()
    });
    Ok((text, notice))
}

/// Returns the format that the model's template renders.
fn format_of(tokenizer: &Tokenizer) -> Result<Option<&'static ChatFormat>, Error> {
    if !tokenizer.has_chat_template() {
        return Ok(None);
    }
    let bos = tokenizer.bos_id().and_then(|id| tokenizer.id_to_token(id)).unwrap_or_default();
    let render = |system: Option<&str>| -> Option<String> {
        // A template may refuse a system prompt.
        let ids = ChatPrompt::new(system, "U").encode(tokenizer).ok()?;
        let text = tokenizer.decode(&ids, false).ok()?;
        Some(text.strip_prefix(&bos).unwrap_or(&text).to_owned())
    };
    let (with, without) = (render(Some("S")), render(None));
    Ok(FORMATS.iter().find(|format| {
        with.as_deref().is_none_or(|with| with == format.rendered) && without.as_deref() == Some(format.without_system)
    }))
}
