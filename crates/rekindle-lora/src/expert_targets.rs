//! Adapters on the experts of mixtures: what they are on, and what they must agree on.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::nearest_hint;
use crate::{AdaptableModules, Error, ExpertNames, InitLoraWeights, LinearModule, LoraConfig, match_targets};

/// A projection of the experts of a layer, which adapters can be on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertProjection {
    /// Its names and the widths of its outputs.
    pub names: ExpertNames,
    /// Number of experts.
    pub experts: usize,
    /// Width of its input.
    pub input: usize,
    /// True if the experts have no linears of their own outside of this program.
    pub is_only_stacked: bool,
}

impl ExpertProjection {
    /// The linears of all experts, those of an expert one after another.
    pub fn linears(&self) -> impl Iterator<Item = LinearModule> + '_ {
        let of =
            move |expert| self.names.outputs.iter().map(move |&(output, width)| self.module(expert, output, width));
        (0..self.experts).flat_map(of)
    }

    /// The outputs of each expert taken together.
    pub fn joined(&self) -> impl Iterator<Item = LinearModule> + '_ {
        (0..self.experts).map(move |expert| self.module(expert, self.names.joined, self.names.width()))
    }

    fn module(&self, expert: usize, output: &str, out: usize) -> LinearModule {
        LinearModule { name: self.names.linear(expert, output), input: self.input, out, has_bias: false }
    }

    /// Returns true if one of `target_parameters` names it.
    pub(crate) fn is_named(&self, target_parameters: &[String]) -> bool {
        let parameter = &self.names.parameter;
        let is_end = |rest: &str| rest.is_empty() || rest.ends_with('.');
        target_parameters.iter().any(|name| parameter.strip_suffix(name.as_str()).is_some_and(is_end))
    }
}

impl AdaptableModules {
    /// Every module that an adapter can be on by its full name.
    pub fn by_name(&self) -> BTreeMap<&str, &LinearModule> {
        self.linears.iter().chain(&self.joined).map(|module| (module.name.as_str(), module)).collect()
    }

    /// Returns true if this is a linear of an expert.
    pub fn is_expert(&self, linear: &str) -> bool {
        let below = |module: &str| linear.strip_prefix(module).is_some_and(|rest| rest.starts_with('.'));
        self.experts.iter().any(|projection| below(&projection.names.module))
    }

    /// The linears that an adapter of `config` is on, in the model's order: those of `target_modules`, and the experts'
    /// projections of `target_parameters`, each expert's outputs taken together.
    ///
    /// # Errors
    /// [`Error::Targets`] for names that select nothing and for experts that do not agree.
    pub fn targets(&self, config: &LoraConfig) -> Result<Vec<String>, Error> {
        let mut targets = match_targets(config, &self.names())?;
        let stacked: Vec<&ExpertProjection> =
            self.experts.iter().filter(|projection| projection.is_named(&config.target_parameters)).collect();
        let problems = self.unknown_parameters(&config.target_parameters);
        if !problems.is_empty() {
            return Err(Error::Targets { problems });
        }
        let separate: BTreeSet<String> =
            stacked.iter().flat_map(|projection| projection.linears()).map(|module| module.name).collect();
        targets.retain(|target| !separate.contains(target));
        targets.extend(stacked.iter().flat_map(|projection| projection.joined()).map(|module| module.name));
        self.check_experts(config, &targets)?;
        Ok(targets)
    }

    /// Returns `config` with the experts among `targets` in `target_parameters` where PEFT knows no other way to name them:
    /// gpt-oss has gate and up of all experts in one parameter, and none of an expert.
    pub fn with_target_parameters(&self, config: &LoraConfig, targets: &[String]) -> LoraConfig {
        let mut config = config.clone();
        for ExpertProjection { names, .. } in self.experts.iter().filter(|projection| projection.is_only_stacked) {
            let end = names.parameter.split('.').rev().take(3).collect::<Vec<_>>();
            let end = end.into_iter().rev().collect::<Vec<_>>().join(".");
            let is_target = targets.contains(&names.linear(0, names.joined));
            if is_target && !config.target_parameters.iter().any(|name| end.ends_with(name.as_str())) {
                config.target_parameters.push(end);
            }
        }
        config
    }

    /// One sentence for each of `target_parameters` that this model does not have.
    fn unknown_parameters(&self, target_parameters: &[String]) -> Vec<String> {
        let known = || self.experts.iter().map(|projection| projection.names.parameter.as_str());
        let is_unknown = |name: &&String| {
            let alone = core::slice::from_ref(*name);
            !self.experts.iter().any(|projection| projection.is_named(alone))
        };
        let problem = |name: &String| {
            let depth = name.split('.').count();
            let ends = known().map(|known| {
                let dots = known.rmatch_indices('.').map(|(at, _)| at + 1);
                dots.take(depth).nth(depth - 1).map_or(known, |start| &known[start..])
            });
            let hint = nearest_hint(name, ends.collect::<BTreeSet<_>>());
            format!("target_parameters \"{name}\" is no parameter of this model's experts{hint}")
        };
        target_parameters.iter().filter(is_unknown).map(problem).collect()
    }

    /// Refuses adapters on experts that cannot be one parameter for all of them, and options that experts do not take.
    ///
    /// # Errors
    /// [`Error::Targets`] with one sentence for each.
    pub fn check_experts(&self, config: &LoraConfig, targets: &[String]) -> Result<(), Error> {
        if self.experts.is_empty() {
            return Ok(());
        }
        let targets: BTreeSet<&str> = targets.iter().map(String::as_str).collect();
        let (mut problems, mut any) = (Vec::new(), false);
        for ExpertProjection { names, experts, .. } in &self.experts {
            for (part, ..) in names.parts() {
                let linears: Vec<String> = (0..*experts).map(|expert| names.linear(expert, part)).collect();
                let count = linears.iter().filter(|name| targets.contains(name.as_str())).count();
                any |= count > 0;
                if count > 0 && count < *experts {
                    problems.push(format!(
                        "{} has {experts} experts, and {part} of {count} of them has an adapter; all of a layer have one, \
                         or none",
                        names.module
                    ));
                    continue;
                }
                let of = |name: &String| (config.rank_of(name), config.scale_of(name));
                if count > 0 && linears.iter().any(|name| of(name) != of(&linears[0])) {
                    problems.push(format!(
                        "rank_pattern or alpha_pattern give the experts of {} different values for {part}; they have one \
                         rank and one lora_alpha",
                        names.module
                    ));
                }
            }
        }
        if any && config.use_dora {
            problems.push(format!("use_dora is not supported on experts; {LEAVE_OUT}"));
        }
        let init = &config.init_lora_weights;
        if any && (init.changes_base() || *init == InitLoraWeights::Loftq) {
            let init = serde_json::json!(init);
            problems.push(format!("init_lora_weights {init} is not supported on experts; use true, or {LEAVE_OUT}"));
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::Targets { problems }) }
    }

    /// Refuses dropout before adapters on experts, which experts do not take.
    ///
    /// # Errors
    /// [`Error::Targets`].
    pub fn check_expert_dropout(&self, config: &LoraConfig, targets: &[String]) -> Result<(), Error> {
        if config.lora_dropout == 0.0 || !targets.iter().any(|target| self.is_expert(target)) {
            return Ok(());
        }
        let dropout = config.lora_dropout;
        let problem =
            format!("lora_dropout is {dropout}, and adapters on experts have none; set it to 0, or {LEAVE_OUT}");
        Err(Error::Targets { problems: vec![problem] })
    }

    /// Returns a notice if experts are adapted: the number of experts, and their share of the trained parameters.
    pub fn expert_advice(&self, config: &LoraConfig, targets: &[String]) -> Option<String> {
        let by_name = self.by_name();
        let (mut on_experts, mut elsewhere) = (0, 0);
        for target in targets {
            let module = by_name.get(target.as_str())?;
            let size = config.rank_of(target) * (module.input + module.out);
            *(if self.is_expert(target) { &mut on_experts } else { &mut elsewhere }) += size;
        }
        let adapted = |projection: &&ExpertProjection| {
            let first = projection.names.parts().into_iter().map(|(part, ..)| projection.names.linear(0, part));
            first.into_iter().any(|name| targets.contains(&name))
        };
        let layers: BTreeSet<&str> =
            self.experts.iter().filter(adapted).map(|projection| projection.names.module.as_str()).collect();
        let experts = self.experts.iter().map(|projection| projection.experts).max()?;
        (on_experts > 0).then(|| {
            format!(
                "every one of {experts} experts in {} layers gets an adapter: {} of {} trained parameters; without \
                 gate_proj, up_proj and down_proj in target_modules it is {}",
                layers.len(),
                grouped(on_experts),
                grouped(on_experts + elsewhere),
                grouped(elsewhere)
            )
        })
    }
}

const LEAVE_OUT: &str = "leave gate_proj, up_proj and down_proj out of target_modules";

/// A number with commas.
fn grouped(n: usize) -> String {
    let digits = n.to_string();
    let parts: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().filter_map(|part| core::str::from_utf8(part).ok()).collect();
    parts.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two layers with three experts each, and attention.
    pub(crate) fn modules() -> AdaptableModules {
        let (mut linears, mut experts, mut joined) = (Vec::new(), Vec::new(), Vec::new());
        for layer in 0..2 {
            let attention = format!("model.layers.{layer}.self_attn.q_proj");
            linears.push(LinearModule { name: attention, input: 8, out: 8, has_bias: false });
            linears.push(LinearModule {
                name: format!("model.layers.{layer}.mlp.gate"),
                input: 8,
                out: 3,
                has_bias: false,
            });
            let module = format!("model.layers.{layer}.mlp.experts");
            for (outputs, joined_name, input) in
                [(vec![("gate_proj", 4), ("up_proj", 4)], "gate_up_proj", 8), (vec![("down_proj", 8)], "down_proj", 4)]
            {
                let parameter = format!("{module}.{joined_name}");
                let names = ExpertNames { module: module.clone(), outputs, joined: joined_name, parameter };
                let projection = ExpertProjection { names, experts: 3, input, is_only_stacked: false };
                linears.extend(projection.linears());
                if projection.names.outputs.len() > 1 {
                    joined.extend(projection.joined());
                }
                experts.push(projection);
            }
        }
        AdaptableModules { linears, experts, joined, ..AdaptableModules::default() }
    }

    fn targets(config: &LoraConfig) -> Vec<String> {
        modules().targets(config).unwrap()
    }

    fn message(config: &LoraConfig) -> String {
        modules().targets(config).unwrap_err().to_string()
    }

    #[test]
    fn names_of_projections_mean_the_experts_and_not_the_router() {
        let config = LoraConfig::new(2).target_modules(["q_proj", "gate_proj"]);
        let selected = targets(&config);
        assert_eq!(selected.len(), 2 + 2 * 3);
        assert_eq!(selected[1], "model.layers.0.mlp.experts.0.gate_proj");
        let all = targets(&LoraConfig::new(2).target_modules("all-linear"));
        assert_eq!(all.len(), 2 + 2 * 9, "{all:?}");
        assert_eq!(targets(&LoraConfig::new(2).target_modules(["gate"])).len(), 2);
        let advice = modules().expert_advice(&config, &selected).unwrap();
        assert!(
            advice.starts_with("every one of 3 experts in 2 layers gets an adapter: 144 of 208 trained"),
            "{advice}"
        );
        assert_eq!(modules().expert_advice(&config, &["model.layers.0.self_attn.q_proj".to_owned()]), None);
    }

    #[test]
    fn target_parameters_take_the_outputs_of_an_expert_together() {
        let config = LoraConfig::new(2)
            .target_modules(["q_proj", "gate_proj", "down_proj"])
            .target_parameters(["mlp.experts.gate_up_proj"]);
        let selected = targets(&config);
        assert!(selected.contains(&"model.layers.1.mlp.experts.2.gate_up_proj".to_owned()));
        assert!(selected.contains(&"model.layers.1.mlp.experts.2.down_proj".to_owned()));
        assert!(!selected.iter().any(|name| name.ends_with(".gate_proj")), "{selected:?}");
        let none = LoraConfig::new(2).target_modules(Vec::<String>::new());
        assert_eq!(targets(&none.target_parameters(["experts.down_proj"])).len(), 6);
        let text =
            message(&LoraConfig::new(2).target_modules(["q_proj"]).target_parameters(["mlp.experts.gate_up_porj"]));
        assert!(text.ends_with("nearest: \"mlp.experts.gate_up_proj\""), "{text}");
    }

    #[test]
    fn experts_agree_or_the_adapter_is_refused() {
        let some = LoraConfig::new(2).target_modules(r".*experts\.1\.up_proj");
        assert!(message(&some).contains("model.layers.0.mlp.experts has 3 experts, and up_proj of 1 of them has"));
        let ranks = LoraConfig::new(2).target_modules(["up_proj"]).rank_pattern([(r"experts\.1\.up_proj", 4)]);
        assert!(message(&ranks).contains("different values for up_proj"), "{}", message(&ranks));
        let of_all = LoraConfig::new(2).target_modules(["up_proj"]).rank_pattern([("experts.up_proj", 4)]);
        assert_eq!(of_all.rank_of(&targets(&of_all)[0]), 4, "a key without the index is for all experts");
        let dora = LoraConfig::new(2).target_modules(["up_proj"]).use_dora(true);
        assert!(message(&dora).contains("use_dora is not supported on experts"));
        let pissa = LoraConfig::new(2).target_modules(["up_proj"]).init_lora_weights(InitLoraWeights::Pissa);
        assert!(message(&pissa).contains("init_lora_weights \"pissa\" is not supported on experts"));
        let dropout = LoraConfig::new(2).target_modules(["up_proj"]).lora_dropout(0.1);
        let error = modules().check_expert_dropout(&dropout, &targets(&dropout)).unwrap_err().to_string();
        assert!(error.starts_with("lora_dropout is 0.1, and adapters on experts have none"), "{error}");
    }
}
