use core::fmt;

use serde_json::{Map, Value, json};

use crate::config::{native_parameters, one_problem};
use crate::positions::describe;
use crate::{Error, Positions, RopeConfig, RopeScaling, Scaling};

/// The largest extension `auto` allows, as a multiple of the window.
pub const MAX_AUTO_FACTOR: f64 = 4.0;

/// An extension of a model's context window.
#[derive(Debug, Clone, PartialEq)]
pub struct ContextExtension {
    /// The previous window: `max_position_embeddings` after the native scaling.
    pub from: usize,
    /// The window and parameters that replace the model's own.
    pub positions: Positions,
    /// The parameters as a [`RopeScaling::Table`] that reproduces this extension for the same length.
    pub request: Map<String, Value>,
}

impl fmt::Display for ContextExtension {
    /// Formats as `yarn, factor 4: window 256 -> 1024`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        describe(&self.request, f)?;
        write!(f, ": window {} -> {}", self.from, self.positions.max_position_embeddings)
    }
}

/// Computes the positions of a model extended to `length` tokens, or `None` if its own window suffices.
///
/// `config` is the model's `config.json` and `window` its `max_position_embeddings`, called W below. W includes the
/// native scaling. A native yarn reaches at least P · factor, whatever `max_position_embeddings` says, where P is
/// `original_max_position_embeddings`. Up to W nothing changes unless a table is given. Beyond W, let s = length / W.
/// With `auto`, or the name of the native type, the native scaling is extended and all other parameters are kept:
///
/// | native | extended | effect |
/// |---|---|---|
/// | llama3 | factor · s | pairs slower than `low_freq_factor` turns in P reach the same angles at `length` as before at W; pairs faster than `high_freq_factor` are unchanged |
/// | yarn | factor · s, and the attention factor derived from it unless one is given | the same, with `beta_slow` and `beta_fast` |
/// | longrope | factor · s; pair i's `long_factor` λᵢ · s^γᵢ, γᵢ = ln λᵢ / ln factor, clamped to 0..1 | unscaled pairs stay unscaled, fully scaled pairs are scaled by s more, the others in proportion |
/// | dynamic | its own rule, at `length` | |
/// | linear | an error | `config.json` does not say whether W includes its factor |
/// | none | `linear` and `dynamic` with factor s, `yarn` with factor s and P = W; `auto`: [`RopeScaling::BEST`] | |
///
/// Naming a method other than the native one is an error: only a table replaces a native scaling. In a table, P
/// defaults to the native value or W, and `factor` of linear, dynamic, yarn and longrope defaults to the value that
/// `length` needs.
///
/// dynamic and longrope depend on a length, which is fixed here to `length`. The result for dynamic is type `default`
/// with the theta that dynamic has at `length`; for longrope, the short factors are set to the long ones. Rows of any
/// length, later runs, and programs that choose per batch therefore use the same frequencies.
///
/// # Errors
/// [`Error::TooFar`] for `auto` beyond [`MAX_AUTO_FACTOR`] · W, [`Error::NothingToScale`] for a named method within W,
/// [`Error::Replaces`] and [`Error::UnknownWindow`] for a native scaling that cannot be extended this way,
/// [`Error::BeyondSaved`], and [`Error::Parameters`] for an invalid table.
pub fn extend_context(
    config: &Value,
    head_dim: usize,
    window: usize,
    length: usize,
    choice: &RopeScaling,
) -> Result<Option<ContextExtension>, Error> {
    let model = Model::new(config, head_dim, window)?;
    let name = match choice {
        RopeScaling::Table(table) => return model.table(table, length).map(Some),
        RopeScaling::Saved(saved) => return model.saved(saved, length).map(Some),
        RopeScaling::Auto if length <= model.window => return Ok(None),
        RopeScaling::Auto => {
            model.check_auto(length)?;
            None
        }
        RopeScaling::Linear => Some("linear"),
        RopeScaling::Dynamic => Some("dynamic"),
        RopeScaling::Yarn => Some("yarn"),
    };
    if let Some(name) = name
        && length <= model.window
    {
        return Err(Error::NothingToScale { name: name.to_owned(), length, window: model.window });
    }
    let native = model.rope.scaling().name();
    let parameters = match (native, name) {
        ("default", Some(name)) => model.unscaled(name, length),
        ("default", None) => match RopeScaling::BEST {
            RopeScaling::Linear => model.unscaled("linear", length),
            RopeScaling::Dynamic => model.unscaled("dynamic", length),
            _ => model.unscaled("yarn", length),
        },
        (native, Some(name)) if name != native => {
            return Err(Error::Replaces { name: name.to_owned(), native: native.to_owned() });
        }
        ("linear", _) => return Err(model.unknown_window(length)),
        _ => model.extended_native(length),
    };
    model.finish(parameters, length).map(Some)
}

/// The position settings of a model, normalized.
struct Model {
    head_dim: usize,
    rope: RopeConfig,
    /// Native parameters in the layout of transformers 5, with `rope_theta`, P and the factor filled in where implied.
    parameters: Map<String, Value>,
    /// The window after the native scaling.
    window: usize,
    /// `max_position_embeddings`, which dynamic scales from.
    max_position_embeddings: usize,
}

impl Model {
    fn new(config: &Value, head_dim: usize, window: usize) -> Result<Self, Error> {
        let mut config = config.clone();
        if let Value::Object(fields) = &mut config {
            fields.insert("max_position_embeddings".to_owned(), window.into());
        }
        let rope = RopeConfig::from_config(&config, head_dim)?;
        let mut parameters = native_parameters(&config, &rope);
        let mut reach = window;
        if let Some(original) = rope.scaling().original() {
            parameters.insert(ORIGINAL.to_owned(), original.into());
            let factor = number(&parameters, "factor").unwrap_or(window as f64 / original as f64);
            parameters.insert("factor".to_owned(), factor.into());
            if matches!(rope.scaling(), Scaling::Yarn { .. }) {
                reach = reach.max((factor * original as f64).round() as usize);
            }
        }
        Ok(Self { head_dim, rope, parameters, window: reach, max_position_embeddings: window })
    }

    fn check_auto(&self, length: usize) -> Result<(), Error> {
        if length as f64 <= MAX_AUTO_FACTOR * self.window as f64 {
            return Ok(());
        }
        let native = self.rope.scaling().name();
        let explicit = match native {
            "default" => "set rope_scaling to a method (linear, dynamic or yarn)".to_owned(),
            "dynamic" | "yarn" => format!("set rope_scaling = \"{native}\""),
            _ => format!("give its parameters with rope_scaling = {{ rope_type = \"{native}\", ... }}"),
        };
        Err(Error::TooFar { length, window: self.window, explicit })
    }

    fn unknown_window(&self, length: usize) -> Error {
        let factor = number(&self.parameters, "factor").unwrap_or(1.0);
        let grown = factor * self.growth(length);
        Error::UnknownWindow { length, window: self.window, factor: factor.to_string(), grown: grown.to_string() }
    }

    /// Returns s, the growth of the window.
    fn growth(&self, length: usize) -> f64 {
        length as f64 / self.window as f64
    }

    /// Returns the parameters of `name` for a model without a native scaling.
    fn unscaled(&self, name: &str, length: usize) -> Map<String, Value> {
        let mut parameters =
            Map::from_iter([("rope_type".to_owned(), name.into()), ("factor".to_owned(), self.growth(length).into())]);
        if name == "yarn" {
            parameters.insert(ORIGINAL.to_owned(), self.window.into());
        }
        parameters
    }

    /// Returns the native parameters extended to `length`.
    fn extended_native(&self, length: usize) -> Map<String, Value> {
        let mut parameters = self.parameters.clone();
        let growth = self.growth(length);
        if let Scaling::Dynamic { .. } = self.rope.scaling() {
            return parameters;
        }
        let factor = number(&parameters, "factor").unwrap_or(1.0);
        parameters.insert("factor".to_owned(), (factor * growth).into());
        if let Scaling::LongRope { long_factor, .. } = self.rope.scaling() {
            let stretch = |divisor: f64| {
                let share = if factor > 1.0 { (divisor.ln() / factor.ln()).clamp(0.0, 1.0) } else { 1.0 };
                divisor * growth.powf(share)
            };
            let wider: Vec<f64> = long_factor.iter().map(|&divisor| stretch(divisor)).collect();
            parameters.insert("short_factor".to_owned(), json!(wider));
            parameters.insert("long_factor".to_owned(), json!(wider));
        }
        parameters
    }

    fn table(&self, table: &Map<String, Value>, length: usize) -> Result<ContextExtension, Error> {
        let mut table: Map<String, Value> = table.clone();
        table.retain(|_, value| !value.is_null());
        if let Some(name) = table.remove("type") {
            table.entry("rope_type").or_insert(name);
        }
        let Some(name) = table.get("rope_type").cloned() else {
            return Err(one_problem("rope_scaling.rope_type is missing"));
        };
        let native = self.rope.scaling();
        let reach = self.window.max(length) as f64;
        match name.as_str().unwrap_or_default() {
            "linear" if !table.contains_key("factor") && *native == Scaling::Default => {
                table.insert("factor".to_owned(), (reach / self.window as f64).into());
            }
            "dynamic" => {
                if length <= self.max_position_embeddings {
                    let window = self.max_position_embeddings;
                    return Err(Error::NothingToScale { name: "dynamic".to_owned(), length, window });
                }
                table.entry("factor").or_insert_with(|| (reach / self.max_position_embeddings as f64).into());
            }
            "yarn" | "longrope" | "llama3" => {
                let original = native.original().unwrap_or(self.window);
                let original = table.entry(ORIGINAL).or_insert_with(|| original.into()).as_f64();
                if name != "llama3"
                    && let Some(original) = original
                {
                    table.entry("factor").or_insert_with(|| (reach / original).into());
                }
            }
            _ => {}
        }
        self.finish(table, length)
    }

    fn saved(&self, saved: &Positions, length: usize) -> Result<ContextExtension, Error> {
        if length > saved.max_position_embeddings {
            return Err(Error::BeyondSaved { length, window: saved.max_position_embeddings });
        }
        saved.rope(self.head_dim)?;
        Ok(ContextExtension { from: self.window, positions: saved.clone(), request: saved.parameters.clone() })
    }

    /// Adds the model's theta and partial rotary factor to `parameters`, validates them, and fixes them to `length`.
    fn finish(&self, mut parameters: Map<String, Value>, length: usize) -> Result<ContextExtension, Error> {
        for key in ["rope_theta", "partial_rotary_factor"] {
            if let Some(own) = self.parameters.get(key) {
                parameters.entry(key).or_insert_with(|| own.clone());
            }
        }
        let parameters = in_order(parameters);
        let config = json!({
            "max_position_embeddings": self.max_position_embeddings,
            "rope_scaling": parameters,
        });
        let rope = RopeConfig::from_config(&config, self.head_dim)?;
        let mut fixed = parameters.clone();
        match rope.scaling() {
            Scaling::Dynamic { .. } => {
                fixed.insert("rope_type".to_owned(), "default".into());
                fixed.insert("rope_theta".to_owned(), rope.theta_at(length).into());
                fixed.remove("factor");
            }
            Scaling::LongRope { original, .. } if length > *original => {
                fixed.insert("short_factor".to_owned(), parameters["long_factor"].clone());
            }
            Scaling::LongRope { .. } => {
                fixed.insert("long_factor".to_owned(), parameters["short_factor"].clone());
            }
            _ => {}
        }
        let positions = Positions { max_position_embeddings: self.window.max(length), parameters: fixed };
        positions.rope(self.head_dim)?;
        Ok(ContextExtension { from: self.window, positions, request: parameters })
    }
}

const ORIGINAL: &str = "original_max_position_embeddings";

/// Sorts the most important keys first and the rest by name, since tables read from files are unordered.
fn in_order(parameters: Map<String, Value>) -> Map<String, Value> {
    let first = ["rope_type", "rope_theta", "factor"];
    let mut entries: Vec<(String, Value)> = parameters.into_iter().collect();
    entries.sort_by_key(|(key, _)| (first.iter().position(|name| name == key).unwrap_or(first.len()), key.clone()));
    entries.into_iter().collect()
}

fn number(parameters: &Map<String, Value>, key: &str) -> Option<f64> {
    parameters.get(key).and_then(Value::as_f64)
}

#[cfg(test)]
mod tests;
