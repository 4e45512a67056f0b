//! The model card that a run uploads to the Hugging Face hub.

use super::{MARK, line, yaml};

/// A run's result on the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishedCard {
    /// `organization/name` of the repository.
    pub name: String,
    /// The form of the result.
    pub form: PublishedForm,
    /// The base model's name on the hub. Without it, the metadata names no base.
    pub base: Option<String>,
    /// True if the directory of the card has `loss.svg`.
    pub has_plot: bool,
}

/// The form of a published result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PublishedForm {
    /// An adapter in PEFT's format.
    Adapter,
    /// A whole checkpoint.
    Model,
    /// GGUF files of these names.
    Gguf(Vec<String>),
}

impl PublishedCard {
    /// Rewrites the card of a run: the metadata, the part about use and the plot become those of the repository. A README
    /// that Rekindle did not write is returned unchanged.
    ///
    /// The path of a base model on this machine is replaced by the base's name, or by the last part of the path.
    pub fn rewrite(&self, card: &str) -> String {
        let parts = card.strip_prefix("---\n").and_then(|rest| rest.split_once("---\n"));
        let Some((header, body)) = parts.filter(|_| card.contains(MARK)) else { return card.to_owned() };
        let written = header.lines().find_map(|line| line.strip_prefix("base_model: ")).map(unquoted);
        let mut text = "---\n".to_owned();
        let mut header = self.header(header).join("\n");
        header.push_str("\n---");
        line(&mut text, &header);
        let mut body = self.with_use(body);
        if let Some(written) = written {
            let last = written.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_owned();
            let base = self.base.as_ref().unwrap_or(&last);
            body = body.replace(&format!("`{written}`"), &format!("`{base}`"));
            // The default title ends with the base.
            body = body.replace(&format!(" for {written}\n"), &format!(" for {base}\n"));
            body = body.replace(&format!(" of {written}\n"), &format!(" of {base}\n"));
        }
        if self.form != PublishedForm::Adapter {
            body = body.replace("A LoRA adapter for ", "A fine-tuned version of ");
        }
        body = body.lines().map(|line| without_directory(line) + "\n").collect();
        if self.has_plot {
            line(&mut body, "\n![Losses over steps](loss.svg)");
        }
        text + &body
    }

    /// Returns the lines of the metadata.
    fn header(&self, written: &str) -> Vec<String> {
        let library = match self.form {
            PublishedForm::Adapter => "peft",
            PublishedForm::Model => "transformers",
            PublishedForm::Gguf(_) => "gguf",
        };
        let relation = if self.form == PublishedForm::Adapter { "adapter" } else { "finetune" };
        let lines = written.lines().filter_map(|line| {
            let tag = line.strip_prefix("- ").map(unquoted);
            match tag.as_deref() {
                Some(tag) if tag.starts_with("base_model:") => {
                    Some(format!("- {}", yaml(&format!("base_model:{relation}:{}", self.base.as_ref()?))))
                }
                Some("lora") if self.form != PublishedForm::Adapter => None,
                Some("transformers") if matches!(self.form, PublishedForm::Gguf(_)) => None,
                _ if line.starts_with("base_model: ") => Some(format!("base_model: {}", yaml(self.base.as_ref()?))),
                _ if line.starts_with("library_name: ") => Some(format!("library_name: {library}")),
                _ => Some(line.to_owned()),
            }
        });
        lines.collect()
    }

    /// Returns the body with another part about use.
    fn with_use(&self, body: &str) -> String {
        const HEADING: &str = "## Use\n";
        let Some((before, rest)) = body.split_once(HEADING) else { return body.to_owned() };
        let after = rest.find("\n## ").map_or("", |start| &rest[start..]);
        let python = |library: &str, class: &str| {
            format!(
                "```python\nfrom {library} import {class}\n\nmodel = {class}.from_pretrained(\"{}\")\n```",
                self.name
            )
        };
        let text = match &self.form {
            PublishedForm::Adapter => python("peft", "AutoPeftModelForCausalLM"),
            PublishedForm::Model => python("transformers", "AutoModelForCausalLM"),
            PublishedForm::Gguf(files) => {
                let files: Vec<String> = files.iter().map(|file| format!("- `{file}`")).collect();
                format!("```sh\nllama-cli -hf {}\n```\n\nFiles:\n\n{}", self.name, files.join("\n"))
            }
        };
        format!("{before}{HEADING}\n{text}\n{after}")
    }
}

/// Shortens the absolute path of a file of rows, as in `- Training data: /home/ada/rows.jsonl, 9 rows`, to its name.
fn without_directory(line: &str) -> String {
    let shorten = || {
        let (what, rest) = line.strip_prefix("- ")?.split_once(": /")?;
        let (path, counts) = rest.split_once(", ").unwrap_or((rest, ""));
        let name = path.rsplit('/').next()?;
        let comma = if counts.is_empty() { "" } else { ", " };
        Some(format!("- {what}: {name}{comma}{counts}"))
    };
    shorten().unwrap_or_else(|| line.to_owned())
}

/// Returns the text of a YAML scalar that [`yaml`] wrote.
fn unquoted(scalar: &str) -> String {
    serde_json::from_str(scalar).unwrap_or_else(|_| scalar.to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::ModelCard;
    use super::*;

    fn card(base: &str, lora: bool) -> String {
        let config = rekindle_lora::LoraConfig::new(8);
        let card = ModelCard {
            data: vec!["Training data: /home/ada/rows.jsonl, 1 row with 2 tokens".into()],
            ..ModelCard::default()
        };
        card.text(base, lora.then_some(&config), None)
    }

    fn published(form: PublishedForm, base: Option<&str>) -> PublishedCard {
        PublishedCard { name: "ada/tuned".into(), form, base: base.map(str::to_owned), has_plot: true }
    }

    #[test]
    fn an_adapters_card_names_the_repository() {
        let text = published(PublishedForm::Adapter, Some("Qwen/Qwen3-0.6B")).rewrite(&card("Qwen/Qwen3-0.6B", true));
        for part in [
            "---\nbase_model: Qwen/Qwen3-0.6B\nlibrary_name: peft\n",
            "- base_model:adapter:Qwen/Qwen3-0.6B\n- lora\n",
            "from_pretrained(\"ada/tuned\")",
            "A LoRA adapter for `Qwen/Qwen3-0.6B`",
            "\n## Data\n\n- Training data: rows.jsonl, 1 row with 2 tokens\n",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(text.ends_with("\n\n![Losses over steps](loss.svg)\n"), "{text}");
        assert!(!text.contains("path/to"), "{text}");
    }

    #[test]
    fn a_path_of_this_machine_is_not_published() {
        for lora in [true, false] {
            let written = card("/home/ada/models/base 2", lora);
            assert!(written.contains("/home/ada"));
            let text = published(PublishedForm::Model, None).rewrite(&written);
            assert!(!text.contains("/home") && !text.contains("base_model"), "{text}");
            assert!(text.contains("library_name: transformers") && text.contains("version of `base 2`"), "{text}");
            let named = published(PublishedForm::Model, Some("org/base")).rewrite(&written);
            assert!(named.contains("base_model: org/base\n") && named.contains("- base_model:finetune:org/base\n"));
            assert!(!named.contains("/home") && !named.contains("- lora\n"), "{named}");
        }
    }

    #[test]
    fn a_card_of_gguf_files_lists_them() {
        let form = PublishedForm::Gguf(vec!["tuned-Q4_K_M.gguf".into()]);
        let text = published(form, None).rewrite(&card("org/base", true));
        assert!(text.contains("library_name: gguf") && text.contains("llama-cli -hf ada/tuned"), "{text}");
        assert!(text.contains("- `tuned-Q4_K_M.gguf`\n\n## "), "{text}");
    }

    #[test]
    fn another_readme_is_kept() {
        let own = "---\nlicense: mit\n---\n\n# Mine\n";
        assert_eq!(published(PublishedForm::Adapter, None).rewrite(own), own);
    }
}
