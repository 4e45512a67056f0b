//! The form of reasoning and tool calls, as a chat template shows it.

/// The form of reasoning and tool calls in a model's answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChatFormat {
    /// Answers may begin with reasoning between `<think>` and `</think>`.
    pub thinks: bool,
    /// The form of tool calls; `None` if the template shows none that is known.
    pub tools: Option<ToolFormat>,
}

/// The form of tool calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, once for each call: Hermes, Qwen 2.5, Qwen 3.
    Hermes,
    /// The answer is `{"name": …, "parameters": {…}}`, perhaps after `<|python_tag|>`; several are separated by `;`:
    /// Llama 3.
    Llama,
    /// `[TOOL_CALLS]` and a list of `{"name": …, "arguments": {…}}`: Mistral.
    Mistral,
}

impl ToolFormat {
    /// Returns the text before the calls, if there is one.
    pub(crate) fn marker(self) -> Option<&'static str> {
        match self {
            Self::Hermes => Some("<tool_call>"),
            Self::Llama => None,
            Self::Mistral => Some("[TOOL_CALLS]"),
        }
    }

    /// Returns the key of the arguments.
    pub(crate) fn arguments_key(self) -> &'static str {
        match self {
            Self::Llama => "parameters",
            Self::Hermes | Self::Mistral => "arguments",
        }
    }
}

impl ChatFormat {
    /// Finds the form in the source of a chat template.
    ///
    /// ```
    /// use rekindle_serve::{ChatFormat, ToolFormat};
    ///
    /// let source = "… {{- '<tool_call>\\n{\"name\": \"' }} … {{- '<think>\\n\\n</think>\\n\\n' }}";
    /// assert_eq!(ChatFormat::of_template(source), ChatFormat { thinks: true, tools: Some(ToolFormat::Hermes) });
    /// ```
    pub fn of_template(source: &str) -> Self {
        let tools = if source.contains("[TOOL_CALLS]") {
            Some(ToolFormat::Mistral)
        } else if source.contains("<tool_call>") && !source.contains("<function=") && !source.contains("<arg_key>") {
            Some(ToolFormat::Hermes)
        } else if source.contains("ipython") && source.contains("\"parameters\"") {
            Some(ToolFormat::Llama)
        } else {
            None
        };
        Self { thinks: source.contains("<think>") || source.contains("</think>"), tools }
    }
}
