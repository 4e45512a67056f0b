use std::collections::BTreeSet;

use regex::Regex;

use crate::error::nearest_hint;
use crate::{Error, LoraConfig, TargetModules};

/// The linears of a model that get an adapter, in the model's order.
///
/// `linears` are the full names of all linears of the model, such as `model.layers.3.self_attn.q_proj` or `lm_head`.
/// The rules are PEFT's: a name in the list selects the linear of exactly that name, in every layer, and the linears
/// that end with a dot and the name, in `layers_to_transform`; a string is a regular expression for whole names;
/// `"all-linear"` is every linear but `lm_head`.
///
/// # Errors
/// [`Error::Targets`] with one sentence for each name that selects nothing in any layer (PEFT ignores it when another
/// name selects something), for each layer that the model has not, and for a regular expression that does not compile.
pub fn match_targets<S: AsRef<str>>(config: &LoraConfig, linears: &[S]) -> Result<Vec<String>, Error> {
    let linears: Vec<&str> = linears.iter().map(AsRef::as_ref).collect();
    let selected = match &config.target_modules {
        TargetModules::AllLinear => linears.iter().copied().filter(|name| !is_output_layer(name)).collect(),
        TargetModules::Regex(pattern) => match_pattern(pattern, &linears)?,
        TargetModules::Names(names) => match_names(names, config.layers_to_transform.as_deref(), &linears)?,
    };
    if selected.is_empty() {
        return Err(problems(vec!["target_modules selects no linear of this model".to_owned()]));
    }
    Ok(selected.into_iter().map(str::to_owned).collect())
}

fn match_names<'a>(names: &[String], layers: Option<&[usize]>, linears: &[&'a str]) -> Result<Vec<&'a str>, Error> {
    let unmatched = names.iter().filter(|name| !linears.iter().any(|linear| is_named(linear, name)));
    let mut found: Vec<String> = unmatched.map(|name| no_match(name, linears)).collect();
    // PEFT takes an empty list of layers for "all".
    let layers = layers.filter(|layers| !layers.is_empty());
    found.extend(layers.into_iter().flat_map(|layers| missing_layers(layers, linears)));
    if !found.is_empty() {
        return Err(problems(found));
    }
    let in_layers = |linear: &str| match layers {
        Some(layers) => layer_index(linear).is_some_and(|layer| layers.contains(&layer)),
        None => true,
    };
    let selects = |linear: &str, name: &String| linear == name || (is_named(linear, name) && in_layers(linear));
    Ok(linears.iter().copied().filter(|linear| names.iter().any(|name| selects(linear, name))).collect())
}

fn match_pattern<'a>(pattern: &str, linears: &[&'a str]) -> Result<Vec<&'a str>, Error> {
    let regex = Regex::new(&format!(r"\A(?:{pattern})\z")).map_err(|_| {
        // The compiler's own message quotes the pattern with our anchors; name the pattern as it was written.
        let reason = Regex::new(pattern).err().map(|error| error.to_string()).unwrap_or_default();
        problems(vec![format!(
            "target_modules \"{pattern}\" is not a regular expression without look-around: {reason}"
        )])
    })?;
    let selected: Vec<&str> = linears.iter().copied().filter(|linear| regex.is_match(linear)).collect();
    if selected.is_empty() {
        let meant = linears.iter().any(|linear| is_named(linear, pattern));
        let hint = if meant {
            format!("; a string is a regular expression for whole names: write [\"{pattern}\"] or \".*{pattern}\"")
        } else {
            format!("; names look like \"{}\"", linears.first().unwrap_or(&""))
        };
        return Err(problems(vec![format!(
            "target_modules \"{pattern}\" matches no linear of this model from its first to its last letter{hint}"
        )]));
    }
    Ok(selected)
}

/// `linear` is `name` or ends with `.name`.
fn is_named(linear: &str, name: &str) -> bool {
    linear.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn is_output_layer(linear: &str) -> bool {
    is_named(linear, "lm_head")
}

/// The number of the first segment that is a number and has two segments before it and one behind it, as
/// in `model.layers.3.mlp.up_proj`.
fn layer_index(linear: &str) -> Option<usize> {
    let segments: Vec<&str> = linear.split('.').collect();
    let inner = segments.get(2..segments.len().checked_sub(1)?)?;
    inner.iter().find(|segment| !segment.is_empty() && segment.bytes().all(|b| b.is_ascii_digit()))?.parse().ok()
}

fn missing_layers(layers: &[usize], linears: &[&str]) -> Vec<String> {
    let known: BTreeSet<usize> = linears.iter().filter_map(|linear| layer_index(linear)).collect();
    let last = known.last().copied().unwrap_or(0);
    let missing = layers.iter().filter(|layer| !known.contains(layer));
    missing
        .map(|layer| {
            format!("layers_to_transform {layer} is not in this model of {} layers; nearest: {last}", known.len())
        })
        .collect()
}

fn no_match(name: &str, linears: &[&str]) -> String {
    if name.eq_ignore_ascii_case("all-linear") {
        return "target_modules [\"all-linear\"] is a list of one name; write \"all-linear\" without the brackets"
            .to_owned();
    }
    // Compare like with like: "q_porj" with last segments, "self_attn.q_porj" with last pairs of segments.
    let depth = name.split('.').count();
    let endings: BTreeSet<&str> = linears.iter().map(|linear| ending(linear, depth)).collect();
    format!("target_modules \"{name}\" matches no linear of this model{}", nearest_hint(name, endings))
}

/// The last `depth` segments of a dotted name.
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
    fn a_layer_out_of_range_is_named() {
        let text = message(&targets(["q_proj"]).layers_to_transform([1, 99]));
        assert_eq!(text, "layers_to_transform 99 is not in this model of 3 layers; nearest: 2");
    }

    #[test]
    fn a_bare_name_as_a_string_is_explained() {
        let text = message(&targets("q_proj"));
        assert!(text.ends_with("write [\"q_proj\"] or \".*q_proj\""), "{text}");
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
