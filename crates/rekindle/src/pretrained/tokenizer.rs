//! The choice of a model's tokenizer and chat template.

use std::path::Path;

use rekindle_data::{Tokenizer, chat_template_sources};
use rekindle_hub::read_json;
use serde_json::Value;

use super::ModelFiles;
use crate::Error;

impl ModelFiles {
    /// Returns the adapter whose tokenizer and chat template are used.
    pub(crate) fn adapter_in_use(&self) -> Option<&Path> {
        self.beside.as_deref().or(self.adapter.as_deref())
    }

    /// Returns the directory of the tokenizer and chat template in use: the adapter's if it has a `tokenizer.json`,
    /// else the checkpoint's. Files of both are never mixed.
    pub fn tokenizer(&self) -> &Path {
        self.adapter_in_use().filter(|adapter| has_tokenizer(adapter)).unwrap_or(&self.model)
    }

    /// Reads the tokenizer and its chat template; `None` if there is no `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Data`] for an invalid tokenizer.
    pub fn load_tokenizer(&self) -> Result<Option<Tokenizer>, Error> {
        let dir = self.tokenizer();
        Ok(has_tokenizer(dir).then(|| Tokenizer::from_dir(dir)).transpose()?)
    }

    /// Uses the tokenizer and the chat template of an adapter that is attached. If `replaces` is false and there is
    /// another adapter, that one's remain. Returns a notice for the user if they differ.
    pub(crate) fn put_adapter(&mut self, adapter: &Path, replaces: bool) -> Option<String> {
        match self.adapter_in_use() {
            Some(now) if same(now, adapter) => None,
            Some(now) if !replaces => difference(adapter, now, now),
            _ => {
                self.beside = Some(adapter.to_owned());
                self.notice()
            }
        }
    }

    /// Returns a notice if the tokenizer or template is not the checkpoint's.
    pub(crate) fn notice(&self) -> Option<String> {
        let adapter = self.adapter_in_use()?;
        difference(adapter, &self.model, adapter)
    }
}

fn has_tokenizer(dir: &Path) -> bool {
    dir.join("tokenizer.json").is_file()
}

fn same(a: &Path, b: &Path) -> bool {
    a == b || a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b))
}

/// Returns a notice if the tokenizer or chat template of `adapter` differs from that of `other`; `used` is the one in
/// use.
fn difference(adapter: &Path, other: &Path, used: &Path) -> Option<String> {
    // A template that cannot be read is an error for who needs it.
    let [own, others] = [adapter, other].map(|dir| chat_template_sources(dir).unwrap_or_default());
    let name = adapter.display();
    if !has_tokenizer(adapter) {
        let ignored = !own.is_empty() && own != others;
        return ignored.then(|| {
            format!(
                "adapter {name} has a chat template but no tokenizer.json: the tokenizer and template of {} are \
                 used",
                other.display()
            )
        });
    }
    if !has_tokenizer(other) {
        return None;
    }
    let what = match (own.is_empty(), others.is_empty()) {
        (true, false) => "has a tokenizer without a chat template, unlike",
        (false, true) => "has a tokenizer with a chat template, unlike",
        _ if own != others => "has another chat template than",
        _ if tokenizers_differ(adapter, other) => "has another tokenizer than",
        _ => return None,
    };
    let whose = if used == adapter { "the adapter's" } else { "the latter's" };
    Some(format!("adapter {name} {what} {}: {whose} tokenizer and template are used", other.display()))
}

/// Returns true if both directories have a tokenizer, and they encode or end texts differently.
fn tokenizers_differ(a: &Path, b: &Path) -> bool {
    if !has_tokenizer(a) || !has_tokenizer(b) {
        return false;
    }
    let [bytes_a, bytes_b] = [a, b].map(|dir| std::fs::read(dir.join("tokenizer.json")).ok());
    let [ends_a, ends_b] = [a, b].map(special_tokens);
    if bytes_a == bytes_b {
        return ends_a != ends_b;
    }
    // Programs write the same tokenizer with other spaces, and with the padding of their last call.
    let content = |bytes: Option<Vec<u8>>| {
        let mut content: Value = serde_json::from_slice(&bytes?).ok()?;
        let fields = content.as_object_mut()?;
        ["padding", "truncation"].iter().for_each(|key| drop(fields.shift_remove(*key)));
        Some(content)
    };
    ends_a != ends_b || content(bytes_a) != content(bytes_b)
}

/// Returns the texts of `bos_token` and `eos_token`.
fn special_tokens(dir: &Path) -> [Option<String>; 2] {
    let files = ["tokenizer_config.json", "special_tokens_map.json"];
    let files = files.map(|file| read_json::<Value>(&dir.join(file)).unwrap_or_default());
    ["bos_token", "eos_token"].map(|name| {
        let text = |file: &Value| file[name].as_str().or_else(|| file[name]["content"].as_str()).map(str::to_owned);
        files.iter().find_map(text)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// Returns a checkpoint with a tokenizer and a template, and an adapter with these files.
    fn files(adapter: &[(&str, &str)]) -> (tempfile::TempDir, ModelFiles) {
        let scratch = tempfile::tempdir().unwrap();
        let base = [
            ("tokenizer.json", r#"{"model": 1, "padding": null}"#),
            ("tokenizer_config.json", r#"{"eos_token": "<e>"}"#),
            ("chat_template.jinja", "T"),
        ];
        for (dir, files) in [("base", &base[..]), ("adapter", adapter)] {
            fs::create_dir(scratch.path().join(dir)).unwrap();
            for (name, text) in files {
                fs::write(scratch.path().join(dir).join(name), text).unwrap();
            }
        }
        let [base, adapter] = ["base", "adapter"].map(|name| scratch.path().join(name));
        (scratch, ModelFiles::of(&base, &adapter))
    }

    /// Returns the directory of the tokenizer in use, and the notice.
    fn chosen(adapter: &[(&str, &str)]) -> (String, String) {
        let (_scratch, files) = files(adapter);
        (files.tokenizer().file_name().unwrap().to_str().unwrap().to_owned(), files.notice().unwrap_or_default())
    }

    #[test]
    fn an_adapter_that_brings_a_tokenizer_is_noticed_where_it_differs() {
        let tokenizer = ("tokenizer.json", r#"{"model":1}"#);
        let config = ("tokenizer_config.json", r#"{"eos_token": {"content": "<e>"}}"#);
        let other_end = ("tokenizer_config.json", r#"{"eos_token": "<f>", "chat_template": "T"}"#);
        let template = ("chat_template.jinja", "T");
        for (adapter, whose, said) in [
            (&[][..], "base", ""),
            (&[template], "base", ""),
            (&[("chat_template.jinja", "X")], "base", "has a chat template but no tokenizer.json"),
            (&[tokenizer, config, template], "adapter", ""),
            (&[tokenizer, config], "adapter", "has a tokenizer without a chat template, unlike"),
            (&[tokenizer, config, ("chat_template.jinja", "X")], "adapter", "has another chat template than"),
            (&[tokenizer, other_end], "adapter", "has another tokenizer than"),
            (&[("tokenizer.json", r#"{"model": 2}"#), config, template], "adapter", "has another tokenizer than"),
        ] {
            let (used, notice) = chosen(adapter);
            assert_eq!((used.as_str(), notice.is_empty()), (whose, said.is_empty()), "{adapter:?}: {notice}");
            assert!(notice.contains(said), "{adapter:?}: {notice}");
        }
    }

    #[test]
    fn the_first_of_several_adapters_counts() {
        let (scratch, mut files) = files(&[("tokenizer.json", "{}"), ("chat_template.jinja", "X")]);
        let (first, second) = (scratch.path().join("adapter"), scratch.path().join("second"));
        fs::create_dir(&second).unwrap();
        fs::write(second.join("tokenizer.json"), "{}").unwrap();
        fs::write(second.join("chat_template.jinja"), "Y").unwrap();
        assert_eq!(files.put_adapter(&scratch.path().join("base/../adapter"), false), None);
        let notice = files.put_adapter(&second, false).unwrap();
        assert!(notice.contains("the latter's") && notice.contains(first.to_str().unwrap()), "{notice}");
        assert_eq!(files.tokenizer(), first);
        let notice = files.put_adapter(&second, true).unwrap();
        assert!(notice.contains("the adapter's") && notice.contains("base"), "{notice}");
        assert_eq!(files.tokenizer(), second);
    }
}
