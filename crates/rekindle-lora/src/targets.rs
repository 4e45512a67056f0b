use std::collections::BTreeSet;

use regex::Regex;

use crate::error::{nearest, nearest_hint};
use crate::{BLOCK_LINEARS, Error, FUSED_LINEARS, LoraConfig, TargetModules};

/// The value of `target_modules` for every linear but the output layer.
const ALL_LINEAR: &str = "all-linear";

/// Returns the linears of a model that get an adapter, in the model's order.
///
/// `linears` are the full names of all linears of the model, such as `model.layers.3.self_attn.q_proj` or `lm_head`.
/// The rules are PEFT's: a name in the list selects the linear of exactly that name, in every layer, and the linears
/// that end with a dot and the name, in `layers_to_transform`; a string is a regular expression for whole names;
/// `"all-linear"` is every linear but `lm_head` and the routers of mixtures. `gate_proj`, `up_proj` and `down_proj` also
/// select the experts' linears that a family names differently (Mixtral's `w1`, `w3` and `w2`). On a model with fused
/// linears, the default list selects all linears of a layer.
///
/// # Errors
/// [`Error::Targets`] with one sentence for each name that selects nothing in any layer (PEFT ignores it when another
/// name selects something), for each layer that the model does not have, and for a regular expression that does not compile.
pub fn match_targets<S: AsRef<str>>(config: &LoraConfig, linears: &[S]) -> Result<Vec<String>, Error> {
    let linears: Vec<&str> = linears.iter().map(AsRef::as_ref).collect();
    let mut selected = match &config.target_modules {
        TargetModules::AllLinear => {
            linears.iter().copied().filter(|name| !is_output_layer(name) && !is_router(name)).collect()
        }
        TargetModules::Regex(pattern) => match_pattern("target_modules", pattern, &linears)?,
        TargetModules::Names(names) if is_default_of_fused(names, &linears) => {
            let layers = Layers::of(config);
            let of_layers = |name: &&str| !is_output_layer(name) && !is_router(name) && layers.contains(name);
            linears.iter().copied().filter(of_layers).collect()
        }
        TargetModules::Names(names) => match_names(names, &Layers::of(config), &linears)?,
    };
    if let Some(n) = config.finetune_last_n_layers {
        let layers = linears.iter().filter_map(|linear| layer_index(linear)).max().map_or(0, |last| last + 1);
        if n > layers {
            let problem = format!("finetune_last_n_layers is {n}, but this model has only {layers} layers");
            return Err(problems(vec![problem]));
        }
        selected.retain(|linear| layer_index(linear).is_some_and(|layer| layer >= layers - n));
    }
    if let Some(excluded) = &config.exclude_modules {
        let excluded = exclusions(excluded, &linears)?;
        let excluded: BTreeSet<&str> = excluded.into_iter().collect();
        selected.retain(|linear| !excluded.contains(linear));
    }
    if selected.is_empty() && config.target_parameters.is_empty() {
        return Err(problems(vec!["target_modules selects no linear of this model".to_owned()]));
    }
    let wrong = [
        config.rank_pattern.problems("rank_pattern", &selected),
        config.alpha_pattern.problems("alpha_pattern", &selected),
    ];
    let wrong: Vec<String> = wrong.into_iter().flatten().collect();
    if !wrong.is_empty() {
        return Err(problems(wrong));
    }
    Ok(selected.into_iter().map(str::to_owned).collect())
}

/// Returns true if `names` are the default, [`BLOCK_LINEARS`], and some of those linears are fused in this model. The
/// default then selects every linear of a layer.
fn is_default_of_fused(names: &[String], linears: &[&str]) -> bool {
    let is_missing = |name: &String| !linears.iter().any(|linear| is_named(linear, name));
    names == BLOCK_LINEARS && names.iter().any(is_missing) && linears.iter().any(|linear| is_fused(linear))
}

/// Returns true if a linear replaces several of [`BLOCK_LINEARS`].
pub(crate) fn is_fused(linear: &str) -> bool {
    FUSED_LINEARS.iter().any(|name| is_named(linear, name))
}

/// Returns the linears that `exclude_modules` names.
fn exclusions<'a>(excluded: &TargetModules, linears: &[&'a str]) -> Result<Vec<&'a str>, Error> {
    match excluded {
        TargetModules::AllLinear => Err(problems(vec![
            "exclude_modules \"all-linear\" leaves nothing to adapt; name the linears to exclude".to_owned(),
        ])),
        TargetModules::Regex(pattern) => match_pattern("exclude_modules", pattern, linears),
        TargetModules::Names(names) => {
            let unmatched = names.iter().filter(|name| !linears.iter().any(|linear| is_named(linear, name)));
            let found: Vec<String> = unmatched.map(|name| no_match("exclude_modules", name, linears)).collect();
            if !found.is_empty() {
                return Err(problems(found));
            }
            let named = |linear: &&str| names.iter().any(|name| is_named(linear, name));
            Ok(linears.iter().copied().filter(named).collect())
        }
    }
}

/// The blocks in which the names of `target_modules` are searched.
struct Layers<'a> {
    /// `None` for all. PEFT also reads an empty list so.
    wanted: Option<&'a [usize]>,
    /// The segments before the block number; empty if it is the third segment of a name.
    patterns: &'a [String],
}

impl<'a> Layers<'a> {
    fn of(config: &'a LoraConfig) -> Self {
        let wanted = config.layers_to_transform.as_deref().filter(|layers| !layers.is_empty());
        Self { wanted, patterns: config.layers_pattern.as_deref().unwrap_or_default() }
    }

    fn index(&self, linear: &str) -> Option<usize> {
        if self.patterns.is_empty() {
            return layer_index(linear);
        }
        let number = |pattern: &String| {
            let segments: Vec<&str> = linear.split('.').collect();
            // There is a segment before the pattern and one after the number, as in PEFT's regular expression.
            let inner = segments.get(1..segments.len().checked_sub(1)?)?;
            inner.windows(2).find(|pair| pair[0] == pattern)?[1].parse().ok()
        };
        self.patterns.iter().find_map(number)
    }

    fn contains(&self, linear: &str) -> bool {
        self.wanted.is_none_or(|layers| self.index(linear).is_some_and(|layer| layers.contains(&layer)))
    }

    /// Returns one sentence for each block that the model does not have.
    fn missing(&self, linears: &[&str]) -> Vec<String> {
        let known: BTreeSet<usize> = linears.iter().filter_map(|linear| self.index(linear)).collect();
        if known.is_empty() && self.wanted.is_some() {
            let patterns = self.patterns.join("\", \"");
            return vec![format!(
                "layers_pattern \"{patterns}\" precedes no block number in the names of this model; \
                 nearest: \"layers\""
            )];
        }
        let last = known.last().copied().unwrap_or(0);
        let missing = self.wanted.into_iter().flatten().filter(|layer| !known.contains(layer));
        missing
            .map(|layer| {
                format!("layers_to_transform {layer} is not in this model of {} layers; nearest: {last}", known.len())
            })
            .collect()
    }
}

fn match_names<'a>(names: &[String], layers: &Layers<'_>, linears: &[&'a str]) -> Result<Vec<&'a str>, Error> {
    let unmatched = names.iter().filter(|name| !linears.iter().any(|linear| is_named(linear, name)));
    let mut found: Vec<String> = unmatched.map(|name| no_match("target_modules", name, linears)).collect();
    found.extend(layers.missing(linears));
    if !found.is_empty() {
        return Err(problems(found));
    }
    let selects = |linear: &str, name: &String| linear == name || (is_named(linear, name) && layers.contains(linear));
    Ok(linears.iter().copied().filter(|linear| names.iter().any(|name| selects(linear, name))).collect())
}

fn match_pattern<'a>(argument: &str, pattern: &str, linears: &[&'a str]) -> Result<Vec<&'a str>, Error> {
    let regex = Regex::new(&format!(r"\A(?:{pattern})\z")).map_err(|_| {
        // The compiler's own message quotes the pattern with our anchors; name the pattern as it was written.
        let reason = Regex::new(pattern).err().map(|error| error.to_string()).unwrap_or_default();
        problems(vec![format!("{argument} \"{pattern}\" is not a regular expression without look-around: {reason}")])
    })?;
    let selected: Vec<&str> = linears.iter().copied().filter(|linear| regex.is_match(linear)).collect();
    if selected.is_empty() {
        let meant = linears.iter().any(|linear| is_named(linear, pattern));
        let ends: BTreeSet<&str> = linears.iter().map(|linear| ending(linear, 1)).chain([ALL_LINEAR]).collect();
        let hint = match nearest(pattern, ends).filter(|_| !meant) {
            _ if meant => {
                format!("; a string is a regular expression for whole names: write [\"{pattern}\"] or \".*{pattern}\"")
            }
            Some(ALL_LINEAR) => format!("; nearest: \"{ALL_LINEAR}\""),
            Some(name) => format!("; nearest: [\"{name}\"]"),
            None => format!("; names look like \"{}\"", linears.first().unwrap_or(&"")),
        };
        return Err(problems(vec![format!(
            "{argument} \"{pattern}\" matches the whole name of no linear in this model{hint}"
        )]));
    }
    Ok(selected)
}

/// Returns true if `linear` is `name` or ends with `.name`, or with another family's name for it.
fn is_named(linear: &str, name: &str) -> bool {
    let ends_with = |name: &str| linear.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
    ends_with(name) || own_name(name).is_some_and(|own| is_of_expert(linear) && ends_with(own))
}

/// The usual names of an expert's linears, and Mixtral's names for them.
const EXPERT_NAMES: [(&str, &str); 3] = [("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")];

fn own_name(name: &str) -> Option<&'static str> {
    EXPERT_NAMES.iter().find(|(usual, _)| *usual == name).map(|(_, own)| *own)
}

fn is_of_expert(linear: &str) -> bool {
    linear.contains(".experts.")
}

/// Returns `targets` with the names of the selected `modules` themselves, for programs that know no others.
pub(crate) fn spelled_out(targets: TargetModules, modules: &[String]) -> TargetModules {
    let TargetModules::Names(names) = targets else { return targets };
    let is_literal = |name: &str| {
        modules
            .iter()
            .any(|linear| linear.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')))
    };
    let spelled = names.into_iter().map(|name| match own_name(&name) {
        Some(own) if !is_literal(&name) && is_literal(own) => own.to_owned(),
        _ => name,
    });
    TargetModules::Names(spelled.collect())
}

/// Returns true for the linears that choose or weigh experts.
fn is_router(linear: &str) -> bool {
    ["gate", "shared_expert_gate", "mlp.router", "router.layer"].iter().any(|name| is_named(linear, name))
}

fn is_output_layer(linear: &str) -> bool {
    is_named(linear, "lm_head")
}

/// Returns the number of the first segment that is a number with two segments before it and one after it, as in
/// `model.layers.3.mlp.up_proj`.
fn layer_index(linear: &str) -> Option<usize> {
    let segments: Vec<&str> = linear.split('.').collect();
    let inner = segments.get(2..segments.len().checked_sub(1)?)?;
    inner.iter().find(|segment| !segment.is_empty() && segment.bytes().all(|b| b.is_ascii_digit()))?.parse().ok()
}

fn no_match(argument: &str, name: &str, linears: &[&str]) -> String {
    if name.eq_ignore_ascii_case(ALL_LINEAR) {
        return format!("{argument} [\"all-linear\"] is a list of one name; write \"all-linear\" without the brackets");
    }
    // Compare like with like: "q_porj" with last segments, "self_attn.q_porj" with last pairs of segments.
    let depth = name.split('.').count();
    let endings: BTreeSet<&str> = linears.iter().map(|linear| ending(linear, depth)).collect();
    format!("{argument} \"{name}\" matches no linear of this model{}", nearest_hint(name, endings))
}

/// Returns the last `depth` segments of a dotted name.
fn ending(linear: &str, depth: usize) -> &str {
    let dots = linear.rmatch_indices('.').map(|(at, _)| at + 1);
    dots.take(depth).nth(depth - 1).map_or(linear, |start| &linear[start..])
}

fn problems(problems: Vec<String>) -> Error {
    Error::Targets { problems }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linears() -> Vec<String> {
        let blocks = (0..3).flat_map(|layer| {
            ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"]
                .map(|linear| format!("model.layers.{layer}.{linear}"))
        });
        blocks.chain(["lm_head".to_owned()]).collect()
    }

    fn selected(config: &LoraConfig) -> Vec<String> {
        match_targets(config, &linears()).expect("something is selected")
    }

    fn message(config: &LoraConfig) -> String {
        match_targets(config, &linears()).expect_err("the targets are wrong").to_string()
    }

    fn targets(target_modules: impl Into<TargetModules>) -> LoraConfig {
        LoraConfig::new(4).target_modules(target_modules)
    }

    #[test]
    fn names_match_whole_segments_from_the_end() {
        let expected =
            ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.q_proj"];
        assert_eq!(selected(&targets(["q_proj"])), expected);
        assert_eq!(selected(&targets(["self_attn.q_proj"])), expected);
        assert_eq!(
            selected(&targets(["lm_head", "model.layers.1.mlp.up_proj"])),
            ["model.layers.1.mlp.up_proj", "lm_head"]
        );
        assert!(message(&targets(["proj"])).contains("\"proj\" matches no linear"));
    }

    #[test]
    fn all_linear_leaves_the_output_layer_out() {
        assert_eq!(selected(&targets("all-linear")), linears()[..9]);
    }

    #[test]
    fn the_default_covers_fused_linears() {
        let phi3: Vec<String> = (0..2)
            .flat_map(|layer| {
                ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
                    .map(|linear| format!("model.layers.{layer}.{linear}"))
            })
            .chain(["lm_head".to_owned()])
            .collect();
        let default = LoraConfig::new(4);
        assert_eq!(match_targets(&default, &phi3).unwrap(), phi3[..8]);
        let second = match_targets(&default.clone().layers_to_transform([1]), &phi3).unwrap();
        assert_eq!(second, phi3[4..8]);
        let text = match_targets(&targets(["q_proj"]), &phi3).unwrap_err().to_string();
        assert!(text.contains("\"q_proj\" matches no linear of this model; nearest: \"qkv_proj\""), "{text}");
    }

    #[test]
    fn a_regular_expression_matches_whole_names() {
        let expected = ["model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"];
        assert_eq!(selected(&targets(r"model\.layers\.[02]\.mlp\..*|model")), expected);
    }

    #[test]
    fn layers_restrict_suffixes_but_not_exact_names() {
        let config = targets(["q_proj", "model.layers.0.mlp.up_proj"]).layers_to_transform([2]);
        assert_eq!(selected(&config), ["model.layers.0.mlp.up_proj", "model.layers.2.self_attn.q_proj"]);
    }

    #[test]
    fn an_unmatched_name_comes_with_the_nearest() {
        let text = message(&targets(["q_porj", "v_proj", "mlp.upproj"]));
        assert_eq!(
            text,
            "target_modules \"q_porj\" matches no linear of this model; nearest: \"q_proj\"; \
             target_modules \"mlp.upproj\" matches no linear of this model; nearest: \"mlp.up_proj\""
        );
    }

    #[test]
    fn exclusions_and_last_layers_narrow_the_targets() {
        let config = targets("all-linear").exclude_modules(["v_proj", "model.layers.1.mlp.up_proj"]);
        assert_eq!(selected(&config).len(), 5);
        let config = targets(["q_proj", "up_proj"]).finetune_last_n_layers(1).exclude_modules(r".*up_.*");
        assert_eq!(selected(&config), ["model.layers.2.self_attn.q_proj"]);
        let text = message(&targets("all-linear").exclude_modules(["v_porj"]));
        assert!(
            text.contains("exclude_modules \"v_porj\" matches no linear of this model; nearest: \"v_proj\""),
            "{text}"
        );
        let text = message(&targets("all-linear").finetune_last_n_layers(9));
        assert!(text.contains("finetune_last_n_layers is 9, but this model has only 3 layers"), "{text}");
    }

    #[test]
    fn a_pattern_says_where_block_numbers_stand() {
        let mut config = targets(["q_proj"]).layers_to_transform([1]);
        config.layers_pattern = Some(vec!["layers".to_owned()]);
        assert_eq!(selected(&config), ["model.layers.1.self_attn.q_proj"]);
        config.layers_pattern = Some(vec!["h".to_owned()]);
        assert!(message(&config).contains("layers_pattern \"h\" precedes no block number"));
    }

    #[test]
    fn a_layer_out_of_range_is_named() {
        let text = message(&targets(["q_proj"]).layers_to_transform([1, 99]));
        assert_eq!(text, "layers_to_transform 99 is not in this model of 3 layers; nearest: 2");
    }

    #[test]
    fn a_bare_name_as_a_string_is_explained() {
        let text = message(&targets("q_proj"));
        assert!(text.ends_with("write [\"q_proj\"] or \".*q_proj\""), "{text}");
        let text = message(&targets("all-linaer"));
        assert!(text.ends_with("; nearest: \"all-linear\""), "{text}");
        let text = message(&targets("q_porj"));
        assert!(text.ends_with("; nearest: [\"q_proj\"]"), "{text}");
        let text = message(&targets("[0-9]+"));
        assert!(text.contains("; names look like \"model.layers.0"), "{text}");
    }

    #[test]
    fn a_broken_expression_is_named() {
        let text = message(&targets("(q_proj"));
        assert!(text.starts_with("target_modules \"(q_proj\" is not a regular expression"), "{text}");
    }

    #[test]
    fn layer_numbers_stand_in_the_third_segment_or_later() {
        assert_eq!(layer_index("model.layers.12.mlp.experts.3.up_proj"), Some(12));
        assert_eq!(layer_index("layers.0.up_proj"), None);
        assert_eq!(layer_index("model.layers.4"), None);
        assert_eq!(layer_index("lm_head"), None);
    }
}
