//! The adapter whose training a run continues, and its agreement with `[lora]`.

use std::path::{Path, PathBuf};

use rekindle_hub::read_config;
use rekindle_lora::match_targets;
use rekindle_models::ModelConfig;
use toml::{Table, Value};

use super::{LoraArguments, RunConfig, RunObserver};
use crate::pretrained::saved_lora_config;
use crate::{Error, Loader, LoraConfig, Model, TargetModules};

/// Keys that select the adapted linears.
const TARGET_KEYS: [&str; 5] =
    ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "finetune_last_n_layers"];

/// Returns the configuration of the adapter that the run continues: that of `init_from`, in the directory `start`, or
/// the one given as the model. Keys of `[lora]` that contradict it are an error.
pub(super) fn continued_adapter(
    config: &RunConfig,
    loader: &mut Loader<'_>,
    start: Option<&Path>,
) -> Result<Option<LoraConfig>, Error> {
    let Some(lora) = &config.lora else { return Ok(None) };
    let files = loader.fetch()?;
    let (dir, name) = match (&files.adapter, start.zip(lora.init_from.as_ref())) {
        (None, None) => return Ok(None),
        (None, Some((dir, name))) => (dir, name),
        (Some(dir), None) => (dir.as_path(), &config.model.name_or_path),
        (Some(_), Some(_)) => {
            return Err(Error::Argument(format!(
                "[model] name_or_path {} is an adapter, which the run continues; remove init_from, or set name_or_path to \
                 the adapter's base",
                config.model.name_or_path.display()
            )));
        }
    };
    let saved = saved_lora_config(dir)?;
    let problems = contradictions(lora, &saved, &linears(&files.model)?);
    if problems.is_empty() {
        return Ok(Some(saved));
    }
    Err(Error::Argument(format!(
        "[lora] contradicts the adapter in {}: {}; remove these keys to continue the adapter, or {} to start a new one",
        name.display(),
        problems.join(", "),
        if files.adapter.is_some() { "set name_or_path to its base" } else { "remove init_from" }
    )))
}

/// Attaches a new adapter to the model, or the one that the run continues (`saved`). Afterwards `lora` describes it.
pub(super) fn attach(
    mut model: Model,
    lora: &mut LoraArguments,
    start: Option<PathBuf>,
    saved: Option<LoraConfig>,
    observer: &dyn RunObserver,
) -> Result<Model, Error> {
    let Some(saved) = saved else {
        lora.config.advice().iter().for_each(|advice| observer.notice(&format!("[lora] {advice}")));
        let model = model.get_peft_model(lora.config.clone())?;
        model.notices().iter().for_each(|notice| observer.notice(notice));
        return Ok(model);
    };
    if let Some(dir) = start {
        model = model.load_adapter(dir)?;
        model.notices().iter().for_each(|notice| observer.notice(notice));
    }
    lora.config = LoraConfig { random_state: lora.config.random_state, ..saved };
    Ok(model)
}

/// Returns the full names of the linears of the model in `dir`.
fn linears(dir: &Path) -> Result<Vec<String>, Error> {
    let config = ModelConfig::from_json(&read_config(dir)?)
        .map_err(|problems| rekindle_models::Error::Config { path: dir.join("config.json"), problems })?;
    Ok(config.modules().names().into_iter().map(str::to_owned).collect())
}

/// Lists the keys that the run file sets and the saved adapter has otherwise.
///
/// Keys that select linears agree if they select the same of the model's `linears`: `"all-linear"` is saved as a list
/// of names.
fn contradictions(lora: &LoraArguments, saved: &LoraConfig, linears: &[String]) -> Vec<String> {
    let selected = |config: &LoraConfig| match_targets(config, linears).ok();
    let same_linears = selected(saved).is_some_and(|names| selected(&lora.config) == Some(names));
    let (ours, theirs) = (comparable(&lora.config), comparable(saved));
    let differs = |key: &&String| ours.get(*key) != theirs.get(*key);
    let agrees = |key: &&String| same_linears && TARGET_KEYS.contains(&key.as_str());
    let show = |value: Option<&Value>| value.map_or_else(|| "none".to_owned(), Value::to_string);
    let differing = lora.given.iter().filter(|key| differs(key) && !agrees(key));
    differing
        .map(|key| {
            format!(
                "{key} = {}, but the adapter has \
         {}",
                show(ours.get(key)),
                show(theirs.get(key))
            )
        })
        .collect()
}

/// Returns the keys that describe an adapter, without the seed, which each run chooses.
fn comparable(config: &LoraConfig) -> Table {
    let mut config = config.clone();
    if let TargetModules::Names(names) = &mut config.target_modules {
        names.sort_unstable();
    }
    let mut table = Table::try_from(config).expect("a configuration is a table");
    table.remove("random_state");
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(text: &str) -> LoraArguments {
        let text = format!("[model]\nname_or_path = \"m\"\n[data]\ntrain = \"t\"\n[lora]\ninit_from = \"a\"\n{text}");
        RunConfig::from_toml(&text, &[]).unwrap().lora.unwrap()
    }

    /// Returns the linears of a model with two layers.
    fn linears(names: &[&str]) -> Vec<String> {
        let names = |layer| names.iter().map(move |name| format!("model.layers.{layer}.{name}"));
        (0..2).flat_map(names).collect()
    }

    const PHI3: [&str; 4] = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"];
    const QWEN3: [&str; 7] = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ];

    #[test]
    fn only_what_is_given_can_contradict() {
        let loaded = LoraConfig::new(8).lora_alpha(32.0).target_modules(["v_proj", "q_proj"]);
        let contradictions = |text: &str| contradictions(&section(text), &loaded, &linears(&QWEN3));
        assert_eq!(contradictions(""), Vec::<String>::new());
        let agrees =
            "r = 8\ntarget_modules = [\"q_proj\", \"v_proj\"]\nrandom_state = 9\nuse_gradient_checkpointing = true";
        assert_eq!(contradictions(agrees), Vec::<String>::new());
        assert_eq!(
            contradictions("r = 4\nlora_alpha = 16\ntarget_modules = [\"q_proj\"]"),
            [
                "lora_alpha = 16.0, but the adapter has 32.0",
                "r = 4, but the adapter has 8",
                "target_modules = [\"q_proj\"], but the adapter has [\"q_proj\", \"v_proj\"]",
            ]
        );
    }

    #[test]
    fn targets_agree_if_they_select_the_same_linears() {
        for (names, saved) in [
            (&PHI3[..], vec!["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]),
            (&QWEN3, vec!["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ] {
            let linears = linears(names);
            let saved = LoraConfig::new(16).target_modules(saved);
            let given = section("target_modules = \"all-linear\"");
            assert_eq!(contradictions(&given, &saved, &linears), Vec::<String>::new());
            let fewer = saved.clone().target_modules(["o_proj"]);
            assert_eq!(
                contradictions(&given, &fewer, &linears),
                ["target_modules = \"all-linear\", but the adapter has [\"o_proj\"]"]
            );
            // Full names, as they are saved for some layers.
            let last = saved.target_modules(linears[names.len()..].to_vec());
            let given = section("finetune_last_n_layers = 1");
            assert_eq!(contradictions(&given, &last, &linears), Vec::<String>::new());
        }
    }
}
