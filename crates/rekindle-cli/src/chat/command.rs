//! The commands of a chat.

use std::path::PathBuf;

pub(super) const HELP: &str = "\
/system TEXT       set the system prompt; /system off removes it, /system shows it
/adapter NAME      answer with this adapter; off: with the base model, on: with the last adapter; alone: show them
/retry             answer the last message again, for example with another adapter
/reset             begin a new conversation
/save FILE         append the conversation to a file of rows (JSON lines)
/exit              end the program, as Ctrl-D does
A line that ends with \\ is continued in the next one. // at the beginning stands for a / in the message.";

/// A line that the user entered.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ChatCommand {
    Say(String),
    System(Option<String>),
    Adapter(AdapterRequest),
    Retry,
    Reset,
    Save(PathBuf),
    Help,
    Exit,
}

/// The argument of `/adapter`.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum AdapterRequest {
    Show,
    On,
    Off,
    Named(String),
}

impl ChatCommand {
    /// Reads a line; an empty one is none.
    ///
    /// # Errors
    /// A message for an unknown command.
    pub(super) fn read(line: &str) -> Result<Option<Self>, String> {
        let line = line.trim();
        if line.is_empty() {
            return Ok(None);
        }
        let Some(command) = line.strip_prefix('/') else { return Ok(Some(Self::Say(line.to_owned()))) };
        if command.starts_with('/') {
            return Ok(Some(Self::Say(command.to_owned())));
        }
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        let takes_nothing = |command| match rest {
            "" => Ok(Some(command)),
            _ => Err(format!("/{name} takes no argument")),
        };
        match name {
            "system" => Ok(Some(Self::System((!rest.is_empty()).then(|| rest.to_owned())))),
            "adapter" => Ok(Some(Self::Adapter(match rest {
                "" => AdapterRequest::Show,
                "on" => AdapterRequest::On,
                "off" => AdapterRequest::Off,
                name => AdapterRequest::Named(name.to_owned()),
            }))),
            "save" if rest.is_empty() => Err("/save needs the name of a file".to_owned()),
            "save" => Ok(Some(Self::Save(rest.into()))),
            "retry" => takes_nothing(Self::Retry),
            "reset" => takes_nothing(Self::Reset),
            "help" => takes_nothing(Self::Help),
            "exit" | "quit" => takes_nothing(Self::Exit),
            _ => Err(format!("there is no command /{name}; /help lists them, and // begins a message with /")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_messages_or_commands() {
        let read = |line| ChatCommand::read(line).unwrap();
        assert_eq!(read("  "), None);
        assert_eq!(read(" hello /x "), Some(ChatCommand::Say("hello /x".to_owned())));
        assert_eq!(read("//etc"), Some(ChatCommand::Say("/etc".to_owned())));
        assert_eq!(read("/system  Be brief. "), Some(ChatCommand::System(Some("Be brief.".to_owned()))));
        assert_eq!(read("/system"), Some(ChatCommand::System(None)));
        assert_eq!(read("/adapter off"), Some(ChatCommand::Adapter(AdapterRequest::Off)));
        assert_eq!(read("/adapter sql"), Some(ChatCommand::Adapter(AdapterRequest::Named("sql".to_owned()))));
        assert_eq!(read("/save a b.jsonl"), Some(ChatCommand::Save("a b.jsonl".into())));
        for (line, part) in
            [("/rest", "no command /rest"), ("/save", "the name of a file"), ("/reset x", "no argument")]
        {
            let problem = ChatCommand::read(line).unwrap_err();
            assert!(problem.contains(part), "{problem}");
        }
    }
}
