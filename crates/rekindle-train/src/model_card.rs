//! `README.md` beside saved files: the model card that the Hugging Face hub shows.

mod published;

use core::fmt::Write as _;
use std::path::Path;

use rekindle_data::counted;
use rekindle_hub::write_atomic;
use rekindle_lora::LoraConfig;
use rekindle_models::CausalLm;
use serde_json::Value;

use crate::{Error, EvalMetrics, Method, SftConfig, StepMetrics};

pub use published::{PublishedCard, PublishedForm};

/// The file's name.
pub(crate) const README: &str = "README.md";

/// The line that distinguishes a model card from a user's README.
const MARK: &str = "<!-- Written by Rekindle; a README.md without this line is kept. -->";

/// Rows of the table of results.
const RESULTS: usize = 20;

/// The contents of a model card besides the run's metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelCard {
    /// The title. Default: the kind of result.
    pub title: Option<String>,
    /// Datasets on the hub that the model was trained on.
    pub datasets: Vec<String>,
    /// The training and the evaluation data, one line each.
    pub data: Vec<String>,
    /// Seed of the run.
    pub seed: Option<u64>,
}

/// A run up to the save.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CardRun<'a> {
    pub(crate) config: &'a SftConfig,
    pub(crate) steps: &'a [StepMetrics],
    pub(crate) evals: &'a [EvalMetrics],
}

impl ModelCard {
    /// Writes the card of `model`'s adapter with the configuration `lora`, or of all its weights, into `dir`.
    pub(crate) fn write(
        &self,
        model: &CausalLm,
        lora: Option<&LoraConfig>,
        run: Option<CardRun<'_>>,
        dir: &Path,
    ) -> Result<(), Error> {
        let text = self.text(model.name_or_path(), lora, run);
        Ok(write_atomic(&dir.join(README), text.as_bytes())?)
    }

    /// Returns the text of the card. It does not depend on the time, place or speed of the run.
    fn text(&self, base: &str, lora: Option<&LoraConfig>, run: Option<CardRun<'_>>) -> String {
        let method = run.map_or("sft", |run| run.config.method.name());
        let mut text = self.header(base, lora.is_some(), method);
        let what = match lora {
            Some(_) => format!("A LoRA adapter for `{base}`"),
            None => format!("A fine-tuned version of `{base}`"),
        };
        let title = self.title.clone().unwrap_or_else(|| what.replace('`', ""));
        let version = env!("CARGO_PKG_VERSION");
        line(&mut text, &format!("\n{MARK}\n\n# {title}\n\n{what}, trained with Rekindle {version}."));
        let class = if lora.is_some() {
            ("peft", "AutoPeftModelForCausalLM")
        } else {
            ("transformers", "AutoModelForCausalLM")
        };
        line(
            &mut text,
            &format!(
                "\n## Use\n\n```python\nfrom {0} import {1}\n\nmodel = {1}.from_pretrained(\"path/to/this/directory\")\n```",
                class.0, class.1
            ),
        );
        if !self.data.is_empty() {
            line(&mut text, "\n## Data\n");
            self.data.iter().for_each(|data| line(&mut text, &format!("- {data}")));
        }
        let parameters = self.parameters(lora, run.map(|run| run.config));
        if !parameters.is_empty() {
            line(&mut text, "\n## Hyperparameters\n");
            parameters.iter().for_each(|(name, value)| line(&mut text, &format!("- {name}: {value}")));
        }
        if let Some(run) = run.filter(|run| !run.steps.is_empty()) {
            line(&mut text, "\n## Results\n\n| Step | Epoch | Training loss | Evaluation loss |\n|---|---|---|---|");
            results(run).iter().for_each(|row| line(&mut text, row));
        }
        text
    }

    /// Returns the metadata for the hub, as PEFT writes it.
    fn header(&self, base: &str, is_adapter: bool, method: &str) -> String {
        let mut text = "---\n".to_owned();
        line(&mut text, &format!("base_model: {}", yaml(base)));
        if !self.datasets.is_empty() {
            line(&mut text, "datasets:");
            self.datasets.iter().for_each(|name| line(&mut text, &format!("- {}", yaml(name))));
        }
        line(&mut text, if is_adapter { "library_name: peft" } else { "library_name: transformers" });
        line(&mut text, "pipeline_tag: text-generation\ntags:");
        match is_adapter {
            true => line(&mut text, &format!("- {}\n- lora", yaml(&format!("base_model:adapter:{base}")))),
            false => line(&mut text, &format!("- {}", yaml(&format!("base_model:finetune:{base}")))),
        }
        line(&mut text, &format!("- rekindle\n- {method}\n- transformers\n---"));
        text
    }

    fn parameters(&self, lora: Option<&LoraConfig>, config: Option<&SftConfig>) -> Vec<(String, String)> {
        const TRAIN: [&str; 16] = [
            "learning_rate",
            "embedding_learning_rate",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "packing",
            "num_train_epochs",
            "max_steps",
            "lr_scheduler_type",
            "warmup_steps",
            "optim",
            "adam_beta1",
            "adam_beta2",
            "weight_decay",
            "max_grad_norm",
            "neftune_noise_alpha",
            "router_aux_loss_coef",
        ];
        const LORA: [&str; 8] = [
            "r",
            "lora_alpha",
            "lora_dropout",
            "target_modules",
            "modules_to_save",
            "use_rslora",
            "use_dora",
            "init_lora_weights",
        ];
        let mut parameters = Vec::new();
        let mut add = |json: Value, names: &[&str]| {
            for name in names {
                if let Some(value) = json.get(name).filter(|value| !is_off(value)) {
                    parameters
                        .push(((*name).to_owned(), value.as_str().map_or_else(|| value.to_string(), str::to_owned)));
                }
            }
        };
        if let Some(config) = config {
            let mut config = config.clone();
            config.resolve(lora.is_none(), false);
            if config.method != Method::Sft {
                let json = serde_json::to_value(&config.method).unwrap_or_default();
                let names: Vec<String> = json.as_object().into_iter().flat_map(|map| map.keys().cloned()).collect();
                add(json, &names.iter().map(String::as_str).collect::<Vec<_>>());
            }
            add(serde_json::to_value(&config).unwrap_or_default(), &TRAIN);
        }
        if let Some(lora) = lora {
            add(serde_json::to_value(lora).unwrap_or_default(), &LORA);
        }
        parameters.extend(self.seed.filter(|_| config.is_some()).map(|seed| ("seed".to_owned(), seed.to_string())));
        parameters
    }
}

/// Returns true if a value means that an option is not used.
fn is_off(value: &Value) -> bool {
    matches!(value, Value::Null | Value::Bool(false)) || value.as_array().is_some_and(Vec::is_empty)
}

/// Returns the first step, those with an evaluation and the last one, at most [`RESULTS`] of them.
fn results(run: CardRun<'_>) -> Vec<String> {
    let CardRun { steps, evals, .. } = run;
    let last = steps.last().map_or(0, |step| step.step);
    let mut places: Vec<usize> = evals.iter().map(|eval| eval.step).chain([1, last]).collect();
    places.sort_unstable();
    places.dedup();
    let apart = places.len().div_ceil(RESULTS);
    let kept = places.iter().enumerate().filter(|(i, step)| i % apart == 0 || **step == last).map(|(_, step)| *step);
    kept.map(|place| {
        let step = steps.iter().find(|step| step.step == place);
        let eval = evals.iter().find(|eval| eval.step == place);
        let loss = |loss: Option<f64>| loss.map_or_else(|| "-".to_owned(), |loss| format!("{loss:.4}"));
        format!(
            "| {place} | {:.2} | {} | {} |",
            step.map_or(0.0, |step| step.epoch),
            loss(step.map(|step| step.loss)),
            loss(eval.map(|eval| eval.eval_loss))
        )
    })
    .collect()
}

/// Returns a text as a YAML scalar: plain if that is unambiguous, else in JSON's quotes, which YAML accepts.
fn yaml(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-:".contains(c);
    let begins = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/' || c == '.');
    let is_word = ["true", "false", "null", "yes", "no", "on", "off"].contains(&text.to_lowercase().as_str());
    if begins && text.chars().all(is_plain) && !text.ends_with(':') && !is_word && text.parse::<f64>().is_err() {
        return text.to_owned();
    }
    Value::from(text).to_string()
}

/// Returns true if the file at `path` is a card written by this program.
pub(crate) fn is_card(path: &Path) -> bool {
    std::fs::read_to_string(path).is_ok_and(|text| text.contains(MARK))
}

/// Keeps a user's README in `old`, the directory that `new` replaces.
pub(crate) fn keep_readme(old: &Path, new: &Path) -> Result<(), Error> {
    let (old, new) = (old.join(README), new.join(README));
    if !old.is_file() || is_card(&old) {
        return Ok(());
    }
    std::fs::copy(&old, &new).map(|_| ()).map_err(|source| Error::Io { path: new, source })
}

/// Returns a line of the card about rows: their kind and number.
pub fn data_line(what: &str, name: &str, rows: usize, tokens: usize, trained_tokens: usize) -> String {
    format!(
        "{what}: {name}, {} with {}, {} of them in the loss",
        counted(rows, "row"),
        counted(tokens, "token"),
        trained_tokens
    )
}

fn line(text: &mut String, more: &str) {
    writeln!(text, "{more}").expect("writing to a string");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::tests::{eval, step};

    #[test]
    fn an_adapters_card_has_the_header_of_peft_and_the_run() {
        let card = ModelCard {
            title: Some("SQL".into()),
            datasets: vec!["org/rows".into()],
            data: vec![data_line("Training data", "org/rows", 1, 9, 4)],
            seed: Some(7),
        };
        let config = SftConfig { max_steps: Some(8), warmup_ratio: 0.25, ..SftConfig::default() };
        let steps: Vec<_> = (1..=8).map(step).collect();
        let evals = [eval(0), eval(4), eval(8)];
        let run = CardRun { config: &config, steps: &steps, evals: &evals };
        let lora = LoraConfig::new(4);
        let text = card.text("org/base", Some(&lora), Some(run));
        let header = "---\nbase_model: org/base\ndatasets:\n- org/rows\nlibrary_name: peft\npipeline_tag: text-generation\n\
                      tags:\n- base_model:adapter:org/base\n- lora\n- rekindle\n- sft\n- transformers\n---\n";
        assert!(text.starts_with(header), "{text}");
        for part in [
            "# SQL\n",
            "AutoPeftModelForCausalLM",
            "- Training data: org/rows, 1 row with 9 tokens, 4 of them in the loss\n",
            "- learning_rate: 0.0002\n",
            "- max_steps: 8\n",
            "- warmup_steps: 0.25\n",
            "- r: 4\n",
            "- seed: 7\n",
            "| 0 | 0.00 | - | 2.2500 |\n| 1 | 0.12 | 3.0000 | - |\n| 4 | 0.50 | 2.2500 | 2.2500 |\n| 8 | 1.00 | 2.1250 | 2.2500 |\n",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("num_train_epochs") && !text.contains("modules_to_save"), "{text}");
    }

    #[test]
    fn a_models_card_is_for_transformers_and_a_long_run_has_a_short_table() {
        let text = ModelCard::default().text("C:\\a model", None, None);
        let header = "---\nbase_model: \"C:\\\\a model\"\nlibrary_name: transformers\n";
        assert!(text.starts_with(header) && text.contains("AutoModelForCausalLM"), "{text}");
        assert!(!text.contains("## Results") && !text.contains("## Data"), "{text}");
        let (steps, evals): (Vec<_>, Vec<_>) = (1..=500).map(|n| (step(n), eval(n))).unzip();
        let run = CardRun { config: &SftConfig::default(), steps: &steps, evals: &evals };
        let rows = results(run);
        assert!(rows.len() <= RESULTS + 1, "{}", rows.len());
        assert!(rows[0].starts_with("| 1 |") && rows[rows.len() - 1].starts_with("| 500 |"), "{rows:?}");
    }

    #[test]
    fn scalars_are_quoted_where_yaml_would_read_something_else() {
        for (text, written) in [
            ("org/base-1.5", "org/base-1.5"),
            ("/models/base", "/models/base"),
            ("no", "\"no\""),
            ("1e3", "\"1e3\""),
            ("a: b", "\"a: b\""),
            ("- x", "\"- x\""),
            ("", "\"\""),
        ] {
            assert_eq!(yaml(text), written);
        }
    }

    #[test]
    fn a_readme_that_someone_wrote_is_kept() {
        let [old, new] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let read = || std::fs::read_to_string(new.path().join(README)).unwrap();
        std::fs::write(new.path().join(README), "ours").unwrap();
        keep_readme(old.path(), new.path()).unwrap();
        std::fs::write(old.path().join(README), ModelCard::default().text("b", None, None)).unwrap();
        keep_readme(old.path(), new.path()).unwrap();
        assert_eq!(read(), "ours", "an earlier card is replaced");
        std::fs::write(old.path().join(README), "# Mine").unwrap();
        keep_readme(old.path(), new.path()).unwrap();
        assert_eq!(read(), "# Mine");
    }
}
