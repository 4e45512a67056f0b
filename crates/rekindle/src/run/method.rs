//! `method` in `[train]`, with the keys of its loss.

use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use super::nearest::hint;
use super::sections::{SectionReader, fields_of};
use crate::{
    Cpo, Dpo, Grpo, GrpoAdvantages, Kto, Method, Orpo, ReferenceArguments, RewardModel, Rloo, RlooAdvantages,
    RolloutArguments, SftConfig, WithReference, WithRollouts,
};

/// The keys of `[train]` that only some methods have, with the names of these methods.
fn keys_of_methods() -> [(Vec<&'static str>, &'static [&'static str]); 11] {
    [
        (fields_of::<Dpo>(), &["dpo", "ipo"]),
        (fields_of::<Kto>(), &["kto"]),
        (fields_of::<Orpo>(), &["orpo"]),
        (fields_of::<Cpo>(), &["cpo", "simpo"]),
        (fields_of::<RewardModel>(), &["reward"]),
        (fields_of::<ReferenceArguments>(), &["dpo", "ipo", "kto"]),
        (fields_of::<Grpo>(), &["grpo"]),
        (fields_of::<GrpoAdvantages>(), &["grpo"]),
        (fields_of::<Rloo>(), &["rloo"]),
        (fields_of::<RlooAdvantages>(), &["rloo"]),
        (fields_of::<RolloutArguments>(), &["grpo", "rloo"]),
    ]
}

/// Returns the keys of `[train]`, with those of every method.
pub(super) fn train_keys() -> Vec<&'static str> {
    let mut keys = fields_of::<SftConfig>();
    keys.push("method");
    for key in keys_of_methods().into_iter().flat_map(|(keys, _)| keys) {
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    keys
}

/// Takes `method` and the keys of its loss from `[train]`. Keys of other methods are problems.
pub(super) fn take_method(reader: &mut SectionReader, train: &mut Table) -> Method {
    let method = train.remove("method").unwrap_or_else(|| "sft".into());
    let Some(name) = method.as_str().filter(|name| Method::NAMES.contains(name)) else {
        let word = method.as_str().unwrap_or_default();
        let known = Method::NAMES.join(", ");
        let problem = format!("[train] key \"method\" = {method}: expected one of {known}");
        reader.problems.push(problem + &near(word));
        take_foreign(&mut Vec::new(), train, None);
        return Method::Sft;
    };
    take_foreign(&mut reader.problems, train, Some(name));
    if let (Some(loss), true) = (train.get("loss_type"), ["ipo", "simpo"].contains(&name)) {
        let general = if name == "ipo" { "dpo" } else { "cpo" };
        let problem = format!(
            "[train] key \"loss_type\" = {loss}: method = \"{name}\" is method = \"{general}\" with loss_type = \"{name}\"; \
             remove loss_type, or set method = \"{general}\""
        );
        reader.problems.push(problem);
        train.remove("loss_type");
    }
    let mut preset = |key: &str, value: Value| _ = train.entry(key).or_insert(value);
    match name {
        "ipo" => preset("loss_type", "ipo".into()),
        "simpo" => {
            preset("loss_type", "simpo".into());
            preset("cpo_alpha", 0.0.into());
        }
        _ => {}
    }
    match name {
        "dpo" | "ipo" => Method::Dpo(WithReference { loss: take(reader, train), reference: take(reader, train) }),
        "kto" => Method::Kto(WithReference { loss: take(reader, train), reference: take(reader, train) }),
        "orpo" => Method::Orpo(take(reader, train)),
        "cpo" | "simpo" => Method::Cpo(take(reader, train)),
        "grpo" => {
            let (loss, advantages) = (take(reader, train), take(reader, train));
            Method::Grpo(Box::new(WithRollouts { loss, advantages, rollouts: take(reader, train) }))
        }
        "rloo" => {
            let (loss, advantages) = (take(reader, train), take(reader, train));
            Method::Rloo(Box::new(WithRollouts { loss, advantages, rollouts: take(reader, train) }))
        }
        "reward" => Method::Reward(take(reader, train)),
        _ => Method::Sft,
    }
}

fn near(word: &str) -> String {
    super::nearest(word, Method::NAMES).map(|_| hint(word, &Method::NAMES)).unwrap_or_default()
}

/// Reads the keys of `T` in `[train]`, and removes them.
fn take<T: DeserializeOwned + Default>(reader: &mut SectionReader, train: &mut Table) -> T {
    let mut table = Table::new();
    for key in fields_of::<T>() {
        table.extend(train.remove_entry(key));
    }
    reader.read("train", table)
}

/// Removes keys of methods other than `name`, with a problem for each.
fn take_foreign(problems: &mut Vec<String>, train: &mut Table, name: Option<&str>) {
    let of_methods = keys_of_methods();
    let given: Vec<String> = train.keys().cloned().collect();
    for key in given {
        let methods = of_methods.iter().filter(|(keys, _)| keys.contains(&key.as_str()));
        let methods: Vec<&str> = methods.flat_map(|(_, methods)| methods.iter().copied()).collect();
        if methods.is_empty() || name.is_some_and(|name| methods.contains(&name)) {
            continue;
        }
        train.remove(&key);
        let name = name.unwrap_or_default();
        let methods = methods.iter().map(|method| format!("\"{method}\"")).collect::<Vec<_>>().join(", ");
        problems.push(format!(
            "[train] key \"{key}\" has no effect with method = \"{name}\"; it is for method = {methods}"
        ));
    }
}

/// Writes `[train]` with the method's keys beside the others.
pub(super) fn serialize<S: serde::Serializer>(config: &SftConfig, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Section<'a> {
        #[serde(flatten)]
        method: &'a Method,
        #[serde(flatten)]
        config: &'a SftConfig,
    }
    match &config.method {
        Method::Sft => config.serialize(serializer),
        method => Section { method, config }.serialize(serializer),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::RunConfig;
    use crate::{CpoLoss, DpoLoss};

    fn parse(train: &str) -> Result<RunConfig, String> {
        let text = format!("model = \"m\"\n[lora]\nr = 4\n[data]\ntrain = \"t\"\n[train]\n{train}");
        RunConfig::from_toml(&text, &[]).map_err(|error| error.to_string())
    }

    #[test]
    fn methods_are_read_and_written() {
        let config = parse("method = \"dpo\"\nbeta = 0.3\nloss_type = [\"sigmoid\", \"sft\"]\nloss_weights = [1, 0.5]");
        let config = config.unwrap();
        let Method::Dpo(dpo) = &config.train.method else { panic!("{:?}", config.train.method) };
        assert_eq!((dpo.loss.beta, &dpo.loss.loss_type.0[..]), (0.3, &[DpoLoss::Sigmoid, DpoLoss::Sft][..]));
        for train in [
            "method = \"ipo\"\nbeta = 0.2\nmax_steps = 4",
            "method = \"kto\"\ndesirable_weight = 1.5\nprecompute_ref_log_probs = true",
            "method = \"orpo\"",
            "method = \"dpo\"\nuse_weighting = true\nsync_ref_model = true\nref_model_mixup_alpha = 0.5",
            "method = \"reward\"\ncenter_rewards_coefficient = 0.01",
            "method = \"simpo\"\nsimpo_gamma = 1.0\nbeta = 2.0",
            "method = \"grpo\"\nloss_type = \"dr_grpo\"\nscale_rewards = false\nnum_generations = 4",
            "method = \"rloo\"\nreward_clip_range = [-1, 1]\ntop_p = 0.9",
            "lr_scheduler_type = \"cosine_with_min_lr\"\nmethod = \"dpo\"\nlr_scheduler_kwargs = { min_lr_rate = 0.1 }",
        ] {
            let config = parse(train).unwrap();
            let again = RunConfig::from_toml(&config.to_toml(), &[]).unwrap();
            assert_eq!(again.train, config.train, "{}", config.to_toml());
        }
        let Method::Grpo(grpo) = parse("method = \"grpo\"\nscale_rewards = false\nbeta = 0.04").unwrap().train.method
        else {
            panic!("grpo")
        };
        let GrpoAdvantages { num_generations, scale_rewards, .. } = grpo.advantages;
        assert_eq!((grpo.loss.beta, num_generations, scale_rewards), (0.04, 8, crate::ScaleRewards::None));
        let Method::Cpo(simpo) = parse("method = \"simpo\"").unwrap().train.method else { panic!("simpo is cpo") };
        assert_eq!(simpo, Cpo::simpo());
        let Method::Cpo(cpo) = parse("method = \"cpo\"\nloss_type = \"simpo\"").unwrap().train.method else {
            panic!("cpo")
        };
        assert_eq!((cpo.loss_type, cpo.cpo_alpha), (CpoLoss::Simpo, 1.0));
        let Method::Dpo(ipo) = parse("method = \"ipo\"").unwrap().train.method else { panic!("ipo is dpo") };
        assert_eq!(ipo.loss.loss_type, DpoLoss::Ipo.into());
        assert!(!parse("max_steps = 3").unwrap().to_toml().contains("method"));
    }

    #[test]
    fn mistakes_are_answered() {
        for (train, expected) in [
            (
                "method = \"dop\"",
                "[train] key \"method\" = \"dop\": expected one of sft, dpo, ipo, kto, orpo, cpo, simpo, grpo, rloo, reward",
            ),
            (
                "beta = 0.1",
                "[train] key \"beta\" has no effect with method = \"sft\"; it is for method = \"dpo\", \"ipo\", \"kto\"",
            ),
            (
                "method = \"dpo\"\nsimpo_gamma = 1",
                "\"simpo_gamma\" has no effect with method = \"dpo\"; it is for method = \"cpo\", \"simpo\"",
            ),
            ("method = \"dpo\"\nloss_type = \"sigmoidal\"", "expected one of sigmoid, sigmoid_norm, hinge, ipo"),
            ("method = \"dpo\"\nloss_type = [\"sigmoid\", \"x\"]", "expected one of sigmoid"),
            ("method = \"dpo\"\nbeta = 0", "[train] beta is 0; it must be above 0"),
            ("method = \"dpo\"\nbeta = \"x\"", "\"beta\" = \"x\": expected a number"),
            ("method = \"simpo\"\nloss_type = \"hinge\"", "method = \"simpo\" is method = \"cpo\" with loss_type"),
            ("method = \"dpo\"\nloss_type = \"exo_pair\"", "\"exo_pair\" needs label_smoothing above 0"),
            ("method = \"dpo\"\nlabel_smoothing = 0.1", "has an effect only with loss_type exo_pair, robust"),
            ("method = \"dpo\"\nloss_weights = [1, 2]", "loss_weights has 2 values for 1 of loss_type"),
            ("method = \"dpo\"\nneftune_noise_alpha = 5", "neftune_noise_alpha is for method = \"sft\""),
            ("method = \"kto\"\nper_device_train_batch_size = 1", "must be at least 2"),
            ("method = \"dpo\"\nmax_prompt_length = 512", "write max_seq_length in [model]"),
            ("method = \"dpo\"\nrpo_alpha = 1", "loss_type = [\"sigmoid\", \"sft\"]"),
            ("method = \"dpo\"\nreference_free = true", "method = \"cpo\""),
            ("method = \"reward\"\ncenter_rewards_coefficient = -1", "center_rewards_coefficient is -1; it must be"),
            ("method = \"reward\"\nbeta = 1", "\"beta\" has no effect with method = \"reward\""),
            ("method = \"reward\"\nsample_prompts = [\"q\"]", "writes no text; remove eval_samples and sample_prompts"),
            ("method = \"dpo\"\nbetaa = 1", "nearest: \"beta\""),
            (
                "method = \"dpo\"\nuse_weighting = true\nloss_type = \"aot\"",
                "use_weighting = true gives each pair a weight",
            ),
            ("method = \"kto\"\nref_model_sync_steps = 4", "has no effect without sync_ref_model = true"),
            (
                "method = \"dpo\"\nsync_ref_model = true\nref_model_mixup_alpha = 0",
                "ref_model_mixup_alpha is 0; it must be",
            ),
            (
                "method = \"dpo\"\nsync_ref_model = true\nprecompute_ref_log_probs = true",
                "cannot be computed before training",
            ),
            ("method = \"orpo\"\nsync_ref_model = true", "\"sync_ref_model\" has no effect with method = \"orpo\""),
            (
                "method = \"grpo\"\nnum_generations = 1",
                "num_generations is 1; it must be at least 2, because an advantage",
            ),
            (
                "method = \"grpo\"\nnum_generations = 3",
                "per_device_train_batch_size · gradient_accumulation_steps is 8, the number of completions that are sampled \
                 together; it must be a multiple of num_generations = 3",
            ),
            (
                "method = \"grpo\"\ngeneration_batch_size = 24\ngradient_accumulation_steps = 2",
                "generation_batch_size is 24, the number of completions that are sampled together; it must be a multiple of \
                 the 16 of a step",
            ),
            (
                "method = \"grpo\"\ngeneration_batch_size = 16\nsteps_per_generation = 2",
                "set the same; remove one of them",
            ),
            ("method = \"grpo\"\nscale_rewards = \"all\"", "expected one of group, batch, none"),
            ("method = \"grpo\"\nloss_type = \"cispo\"", "\"cispo\" needs epsilon_high"),
            ("method = \"grpo\"\ntop_p = 0.9\ntemperature = 0.7", "set importance_sampling_correction = false"),
            ("method = \"grpo\"\npacking = true", "packing has no effect"),
            ("method = \"grpo\"\nnormalize_advantages = true", "it is for method = \"rloo\""),
            ("method = \"rloo\"\nreward_clip_range = [1, 0]", "the first must be below the second"),
            ("method = \"grpo\"\nvllm_importance_sampling_cap = 2", "the key is \"importance_sampling_clip_max\""),
            ("method = \"rloo\"\nrloo_k = 4", "the key is \"num_generations\""),
            ("method = \"grpo\"\nreward_weights = [1]", "write weight in each section [[rewards]]"),
            ("method = \"grpo\"\nuse_vllm = true", "completions are sampled in the same process"),
        ] {
            let error = parse(train).unwrap_err();
            assert!(error.contains(expected), "{train}: {error}");
        }
    }
}
