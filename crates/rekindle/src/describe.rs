//! The description of a run in `report.html` and in the model card.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use rekindle_data::LoadReport;
use rekindle_train::{ModelCard, RunDescription, data_line, show_bytes};
use serde_json::Value;

use crate::{EncodedRows, Model};

pub(crate) fn describe(
    model: &Model,
    train: &EncodedRows,
    eval: Option<&EncodedRows>,
    seed: u64,
    output_dir: Option<&Path>,
    run_name: Option<&str>,
    configuration: String,
) -> RunDescription {
    let lm = model.causal_lm();
    let name = model.name();
    let memory = model.memory_report();
    let how = match (lm.lora(), memory.bits_per_quantized_weight()) {
        (None, _) => "all weights".to_owned(),
        (Some(lora), None) => format!("LoRA r = {}", lora.r),
        (Some(lora), Some(bits)) => format!("LoRA r = {} over {bits:.1} bits per weight", lora.r),
    };
    let trained = lm.params().numel();
    let all = lm.num_parameters() + if lm.lora().is_some() { trained } else { 0 };
    let mut facts = vec![
        ("model", format!("{name}, {}, {} parameters", lm.config().architecture, millions(lm.num_parameters()))),
        (
            "trained",
            format!(
                "{} of {} parameters ({:.2} %)",
                millions(trained),
                millions(all),
                100.0 * trained as f64 / all as f64
            ),
        ),
    ];
    if let Some(lora) = lm.lora() {
        let targets = serde_json::to_value(&lora.target_modules).map_or_else(|_| String::new(), |value| names(&value));
        let (r, alpha, scale) = (lora.r, lora.lora_alpha, lora.scale());
        facts.push(("adapter", format!("r {r}, lora_alpha {alpha}, scale {scale}, on {targets}")));
    }
    facts.push(("training data", train.to_string()));
    facts.extend(eval.map(|rows| ("evaluation data", rows.to_string())));
    facts.push(("weights", format!("{} in memory", show_bytes(memory.bytes() as usize))));
    facts.push(("device", format!("{}, {}", model.device(), format!("{:?}", lm.dtype()).to_lowercase())));
    facts.push(("longest row", format!("up to {} tokens (max_seq_length)", lm.max_seq_length())));
    facts.extend(lm.context_extension().map(|extension| ("rope_scaling", extension.to_string())));
    facts.push(("seed", seed.to_string()));
    facts.push(("started", utc(SystemTime::now())));
    RunDescription {
        title: run_name.map_or_else(|| format!("{name}, {how}"), |run| format!("{run}: {name}, {how}")),
        facts: facts.into_iter().map(|(name, text)| (name.to_owned(), text)).collect(),
        usage: output_dir.map(|dir| usage(name, lm.lora().is_some(), dir)).unwrap_or_default(),
        configuration,
    }
}

/// Returns the data of the model card: names and sizes, without paths of this machine.
pub(crate) fn model_card(title: Option<&str>, train: &EncodedRows, eval: Option<&EncodedRows>, seed: u64) -> ModelCard {
    let line = |what: &str, rows: &EncodedRows| {
        let LoadReport { examples, tokens, trained_tokens, .. } = rows.report;
        data_line(what, &rows.source.names().join(", "), examples, tokens, trained_tokens)
    };
    let mut data = vec![line("Training data", train)];
    data.extend(eval.map(|eval| line("Evaluation data", eval)));
    ModelCard { title: title.map(str::to_owned), datasets: train.source.names_on_hub(), data, seed: Some(seed) }
}

/// Returns the ways to load the result in `dir`, in Rekindle and in Python.
fn usage(base: &str, is_adapter: bool, dir: &Path) -> Vec<(String, String)> {
    let result = dir.join(if is_adapter { "adapter" } else { "model" });
    let quoted = |text: &str| if text.contains([' ', '\'', '$']) { format!("{text:?}") } else { text.to_owned() };
    let (base, path, dir) = (quoted(base), quoted(&result.display().to_string()), quoted(&dir.display().to_string()));
    let python = result.display().to_string();
    let (command, class) = if is_adapter {
        let command = format!(
            "rekindle generate --model {base} --adapter {path} --chat \"…\"\n\
             rekindle merge {dir} --out merged"
        );
        (command, "from peft import AutoPeftModelForCausalLM as Model")
    } else {
        let command = format!("rekindle generate --model {path} --chat \"…\"");
        (command, "from transformers import AutoModelForCausalLM as Model")
    };
    let pair = |with: &str, lines: String| (with.to_owned(), lines);
    vec![
        pair("Command line", command),
        pair("Python", format!("{class}\nmodel = Model.from_pretrained({python:?})")),
        pair("Rust", format!("let (model, tokenizer) = FastLanguageModel::from_pretrained({python:?}).load()?;")),
    ]
}

/// Formats a number of parameters.
fn millions(count: usize) -> String {
    format!("{:.2} M", count as f64 / 1e6)
}

/// Formats a list, or a text.
fn names(value: &Value) -> String {
    let name = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    value.as_array().map_or_else(|| name(value), |list| list.iter().map(name).collect::<Vec<_>>().join(", "))
}

/// Formats a time as `2026-11-26 22:16 UTC`.
fn utc(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (mut day, mut year) = (seconds / 86_400, 1970);
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let mut month = 1;
    for length in [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if day < length {
            break;
        }
        day -= length;
        month += 1;
    }
    let (hour, minute) = (seconds / 3600 % 24, seconds / 60 % 60);
    format!("{year}-{month:02}-{:02} {hour:02}:{minute:02} UTC", day + 1)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dates() {
        let at = |seconds| utc(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01 00:00 UTC");
        assert_eq!(at(951_782_399), "2000-02-28 23:59 UTC");
        assert_eq!(at(951_868_799), "2000-02-29 23:59 UTC");
        assert_eq!(at(1_798_761_540), "2026-12-31 23:59 UTC");
        assert_eq!(at(1_798_761_600), "2027-01-01 00:00 UTC");
    }

    #[test]
    fn commands_take_any_path() {
        let lines = usage("org/base", true, Path::new("out/my run"));
        assert!(
            lines[0].1.starts_with("rekindle generate --model org/base --adapter \"out/my run/adapter\" "),
            "{lines:?}"
        );
        assert!(lines[1].1.contains("AutoPeftModelForCausalLM") && lines[1].1.ends_with("(\"out/my run/adapter\")"));
        assert!(usage("b", false, Path::new("out"))[0].1.starts_with("rekindle generate --model out/model "));
    }
}
