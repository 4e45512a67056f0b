//! Combines several adapters into one.

use core::fmt;
use core::str::FromStr;
use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;

use crate::error::nearest_hint;
use crate::init::from_weights::factors;
use crate::init::svd::{Triplets, of_product};
use crate::{AdaptableModules, Adapter, Error, LoraFactors, TargetModules};

/// A method of combining adapters; see [`weighted`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Combination {
    /// The exact sum of the products, whose rank is the sum of the ranks.
    #[default]
    Cat,
    /// The sums of A and of B. It keeps the rank, which must be equal for all, but is not the sum of the products.
    Linear,
    /// The best approximation of the sum of the products with this rank; `None` is the largest rank of the adapters.
    Svd(Option<usize>),
}

/// Returns an adapter of scale 1 that computes or approximates Σ w·(adapter).
///
/// For each linear, from the factors and scales of the adapters that adapt it:
///
/// - [`Combination::Cat`]: A = \[w₁·s₁·A₁; w₂·s₂·A₂; …\], B = \[B₁, B₂, …\], so that B·A = Σ w·s·B·A;
/// - [`Combination::Linear`]: A = Σ sign(w)·√|w·s|·A, B = Σ √|w·s|·B;
/// - [`Combination::Svd`]: with the singular triplets u, σ, v of Σ w·s·B·A, largest first, A = vᵀ, B = u·σ.
///
/// A single adapter is always combined linearly. Unused rows of A and columns of B are zero.
///
/// # Dtypes
/// Factors in `f32`; sums and singular values in `f64`, rounded once.
///
/// Equal to PEFT's `add_weighted_adapter` (tested against `tests/goldens/lora-options`), except that the result never has
/// `use_rslora`. PEFT keeps the value of the first adapter with `lora_alpha` = r, so that its result is √r times the sum.
///
/// # Errors
/// [`Error::Config`] with one sentence for each weight that is not finite, and for each adapter that cannot be combined:
/// one with DoRA's magnitudes, trained biases or saved modules, one for a differently quantized base or, for
/// [`Combination::Linear`], one of another rank.
pub fn weighted(
    adapters: &[(&str, &Adapter, f64)],
    combination: Combination,
    modules: &AdaptableModules,
) -> Result<Adapter, Error> {
    let combination = if adapters.len() == 1 { Combination::Linear } else { combination };
    let problems = problems(adapters, combination);
    let Some((_, first, _)) = adapters.first().filter(|_| problems.is_empty()) else {
        return Err(Error::Config { problems });
    };
    let ranks = || adapters.iter().map(|(_, adapter, _)| rank(adapter));
    let r = match combination {
        Combination::Cat => ranks().sum(),
        Combination::Svd(Some(r)) => r,
        Combination::Linear | Combination::Svd(None) => ranks().max().unwrap_or(0),
    };
    let names: BTreeSet<&String> = adapters.iter().flat_map(|(_, adapter, _)| adapter.factors.keys()).collect();
    let combined = names.par_iter().map(|&name| {
        let parts: Vec<WeightedFactors<'_>> =
            adapters.iter().filter_map(|part| WeightedFactors::of(part, name)).collect();
        let first = parts[0].factors;
        let shape = [first.b.len() / first.r, first.a.len() / first.r];
        let combined = match combination {
            Combination::Cat => cat(&parts, shape, r),
            Combination::Linear => linear(&parts, r),
            Combination::Svd(_) => svd(&parts, shape, r),
        };
        (name.clone(), combined)
    });
    let combined: BTreeMap<String, LoraFactors> = combined.collect();
    let mut config = first.config.combined(r, targets(&combined, modules));
    if let Some(codes) = adapters.iter().find_map(|(_, adapter, _)| adapter.config.codes()) {
        config.set_codes(codes.clone());
    }
    let tables = adapters.iter().map(|(_, adapter, _)| &adapter.tables).find(|tables| !tables.is_empty());
    let tables = tables.cloned().unwrap_or_default();
    Ok(Adapter { config, factors: combined, biases: BTreeMap::new(), saved: BTreeMap::new(), tables })
}

/// An adapter's factors on one linear, and the weight of their product.
struct WeightedFactors<'a> {
    factors: &'a LoraFactors,
    weight: f64,
}

impl<'a> WeightedFactors<'a> {
    /// Returns the factors and the weight of an adapter on a linear, if it adapts it.
    fn of((_, adapter, weight): &(&str, &'a Adapter, f64), linear: &str) -> Option<Self> {
        let scale = adapter.config.lora().scale_of(linear);
        Some(Self { factors: adapter.factors.get(linear)?, weight: weight * scale })
    }
}

fn cat(parts: &[WeightedFactors<'_>], [out, input]: [usize; 2], r: usize) -> LoraFactors {
    let (mut a, mut b) = (Vec::with_capacity(r * input), vec![0.0; out * r]);
    let mut first = 0;
    for WeightedFactors { factors, weight } in parts {
        a.extend(factors.a.iter().map(|a| (f64::from(*a) * weight) as f32));
        for (row, from) in b.chunks_exact_mut(r).zip(factors.b.chunks_exact(factors.r)) {
            row[first..][..factors.r].copy_from_slice(from);
        }
        first += factors.r;
    }
    a.resize(r * input, 0.0);
    LoraFactors { r, a, b, magnitude: None }
}

fn linear(parts: &[WeightedFactors<'_>], r: usize) -> LoraFactors {
    let sum = |of: fn(&LoraFactors) -> &[f32], weight: fn(f64) -> f64| {
        let mut sum = vec![0.0; of(parts[0].factors).len()];
        for part in parts {
            let weight = weight(part.weight);
            sum.iter_mut().zip(of(part.factors)).for_each(|(sum, x)| *sum += weight * f64::from(*x));
        }
        sum.into_iter().map(|x: f64| x as f32).collect()
    };
    // signum is 1 at zero, where the root is zero.
    let a = sum(|factors| &factors.a, |weight| weight.signum() * weight.abs().sqrt());
    LoraFactors { r, a, b: sum(|factors| &factors.b, |weight| weight.abs().sqrt()), magnitude: None }
}

fn svd(parts: &[WeightedFactors<'_>], [out, input]: [usize; 2], r: usize) -> LoraFactors {
    let ranks = || parts.iter().flat_map(|part| (0..part.factors.r).map(move |k| (part, k)));
    let column = |(part, k): (&WeightedFactors<'_>, usize)| -> Vec<f64> {
        part.factors.b.iter().skip(k).step_by(part.factors.r).map(|b| f64::from(*b)).collect()
    };
    let row = |(part, k): (&WeightedFactors<'_>, usize)| -> Vec<f64> {
        part.factors.a[k * input..][..input].iter().map(|a| f64::from(*a) * part.weight).collect()
    };
    let (columns, rows) = (ranks().map(column).collect(), ranks().map(row).collect());
    let Triplets { u, s, v } = of_product(&columns, &rows, r);
    factors([out, input], r, s.len(), |row, column| v[row][column], |row, column| u[column][row] * s[column])
}

fn problems(adapters: &[(&str, &Adapter, f64)], combination: Combination) -> Vec<String> {
    let mut problems = Vec::new();
    if adapters.is_empty() {
        problems.push("no adapters to combine; pass at least one".to_owned());
    }
    if combination == Combination::Svd(Some(0)) {
        problems.push("the rank of svd is 0; it must be at least 1".to_owned());
    }
    for (name, adapter, weight) in adapters {
        let lora = adapter.config.lora();
        if !weight.is_finite() {
            problems.push(format!("the weight of adapter \"{name}\" is {weight}; expected a finite number"));
        }
        let mut alone = |what: &str| {
            problems
                .push(format!("adapter \"{name}\" has {what}, which cannot be combined; merge it into the base first"));
        };
        if lora.use_dora {
            alone("DoRA magnitudes (use_dora)");
        }
        if !adapter.biases.is_empty() {
            alone("trained biases (bias)");
        }
        if !adapter.saved.is_empty() {
            alone("modules trained whole (modules_to_save)");
        }
        let mixed = adapter.factors.values().map(|factors| factors.r).find(|r| *r != rank(adapters[0].1));
        if let (Combination::Linear, Some(r)) = (combination, mixed) {
            problems.push(format!(
                "linear combines only adapters of equal rank; adapter \"{name}\" has rank {r}, not {}; use cat or svd",
                rank(adapters[0].1)
            ));
        }
    }
    let parameters =
        |adapter: &Adapter| adapter.config.lora().target_parameters.iter().cloned().collect::<BTreeSet<_>>();
    if let Some((name, first, _)) = adapters.first()
        && let Some((other, ..)) = adapters.iter().find(|(_, other, _)| parameters(other) != parameters(first))
    {
        problems.push(format!(
            "adapters \"{name}\" and \"{other}\" differ in target_parameters, so that gate and up of an expert share an \
             adapter in one of them alone; merge one of them into the base first"
        ));
    }
    let mut tables = adapters.iter().filter(|(_, adapter, _)| !adapter.tables.is_empty());
    if let Some((name, first, _)) = tables.next()
        && let Some((other, ..)) = tables.find(|(_, adapter, _)| adapter.tables != first.tables)
    {
        problems.push(format!(
            "adapters \"{name}\" and \"{other}\" have different embedding tables; merge one of them into the base \
             first"
        ));
    }
    let mut codes = adapters.iter().filter_map(|(name, adapter, _)| Some((name, adapter.config.codes()?)));
    if let Some((name, first)) = codes.next()
        && let Some((other, _)) = codes.find(|(_, codes)| *codes != first)
    {
        problems.push(format!(
            "adapters \"{name}\" and \"{other}\" were initialized by LoftQ for bases that are quantized differently; \
             combine adapters of one base"
        ));
    }
    problems
}

/// The largest rank of an adapter.
fn rank(adapter: &Adapter) -> usize {
    adapter.factors.values().map(|factors| factors.r).max().unwrap_or(0)
}

/// The linears as `target_modules`: by the last parts of their names where that says the same.
fn targets(factors: &BTreeMap<String, LoraFactors>, modules: &AdaptableModules) -> TargetModules {
    let last = |name: &str| name.rsplit('.').next().unwrap_or_default().to_owned();
    // Those of `target_parameters` are named there.
    let is_linear = |name: &&String| modules.linear(name).is_some();
    let factors: BTreeMap<&String, &LoraFactors> = factors.iter().filter(|(name, _)| is_linear(name)).collect();
    let ends: BTreeSet<String> = factors.keys().map(|name| last(name)).collect();
    let says_the_same = modules.linears.iter().filter(|linear| ends.contains(&last(&linear.name))).count();
    if says_the_same == factors.len() {
        Vec::from_iter(ends).into()
    } else {
        Vec::from_iter(factors.into_keys()).into()
    }
}

impl Combination {
    /// The words that stand for one.
    pub const NAMES: [&str; 3] = ["cat", "linear", "svd"];
}

impl FromStr for Combination {
    type Err = Error;

    /// `cat`, `linear`, `svd`, or `svd:N` with a rank.
    fn from_str(text: &str) -> Result<Self, Error> {
        let rank = text.strip_prefix("svd:").map(str::parse);
        match (text, rank) {
            ("cat", _) => Ok(Self::Cat),
            ("linear", _) => Ok(Self::Linear),
            ("svd", _) => Ok(Self::Svd(None)),
            (_, Some(Ok(rank))) => Ok(Self::Svd(Some(rank))),
            _ => {
                let hint = nearest_hint(text, Self::NAMES);
                let problem = format!(
                    "\"{text}\" is not a combination; use \"cat\", \"linear\", \"svd\" or \
                     \"svd:N\"{hint}"
                );
                Err(Error::Config { problems: vec![problem] })
            }
        }
    }
}

impl fmt::Display for Combination {
    /// Writes the form that `FromStr` reads.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cat => f.write_str("cat"),
            Self::Linear => f.write_str("linear"),
            Self::Svd(None) => f.write_str("svd"),
            Self::Svd(Some(rank)) => write!(f, "svd:{rank}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peft::AdapterConfig;
    use crate::{LinearModule, LoraConfig, merge};

    const SHAPE: [usize; 2] = [7, 5];

    fn name(layer: usize) -> String {
        format!("model.layers.{layer}.mlp.up_proj")
    }

    fn modules() -> AdaptableModules {
        let linear = |layer| LinearModule { name: name(layer), input: SHAPE[1], out: SHAPE[0], has_bias: false };
        AdaptableModules { linears: (0..3).map(linear).collect(), ..AdaptableModules::default() }
    }

    fn adapter(r: usize, alpha: f64, layers: &[usize], step: f32) -> Adapter {
        let wave = |n: usize, step: f32| (0..n).map(|i| (i as f32 * step).sin()).collect();
        let factors = |layer: usize| LoraFactors {
            r,
            a: wave(r * SHAPE[1], step + layer as f32),
            b: wave(SHAPE[0] * r, 2.0 * step),
            magnitude: None,
        };
        let lora = LoraConfig::new(r).lora_alpha(alpha).target_modules(["up_proj"]);
        Adapter {
            config: AdapterConfig::new(&lora, Some("base"), &[]),
            factors: layers.iter().map(|layer| (name(*layer), factors(*layer))).collect(),
            biases: BTreeMap::new(),
            saved: BTreeMap::new(),
            tables: BTreeMap::new(),
        }
    }

    /// s·B·A of one linear, dense.
    fn product(adapter: &Adapter, layer: usize) -> Vec<f32> {
        let mut w = vec![0.0; SHAPE[0] * SHAPE[1]];
        if let Some(factors) = adapter.factors.get(&name(layer)) {
            merge(&mut w, SHAPE, factors, adapter.config.lora().scale_of(&name(layer)), None);
        }
        w
    }

    fn distance(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
    }

    #[test]
    fn cat_and_svd_are_the_sum_of_the_products() {
        let (one, two) = (adapter(2, 3.0, &[0, 1, 2], 0.7), adapter(1, 4.0, &[0, 2], 1.1));
        let adapters = [("one", &one, 0.5), ("two", &two, -2.0)];
        for (combination, r) in [(Combination::Cat, 3), (Combination::Svd(Some(3)), 3), (Combination::Svd(Some(9)), 9)]
        {
            let sum = weighted(&adapters, combination, &modules()).unwrap();
            let lora = sum.config.lora();
            assert_eq!((lora.r, lora.lora_alpha, &lora.target_modules), (r, r as f64, &["up_proj"].into()));
            for layer in 0..3 {
                let (one, two) = (product(&one, layer), product(&two, layer));
                let wanted: Vec<f32> = one.iter().zip(two).map(|(a, b)| 0.5 * a - 2.0 * b).collect();
                let error = distance(&product(&sum, layer), &wanted);
                assert!(error < 3e-6, "{combination} {layer}: {error:e}");
            }
        }
    }

    /// Eckart and Young: what is left is what the smaller singular values say, and no rank-2 matrix leaves less.
    #[test]
    fn svd_leaves_no_more_than_it_must() {
        let (one, two) = (adapter(3, 3.0, &[0], 0.7), adapter(4, 4.0, &[0], 1.1));
        let adapters = [("one", &one, 1.0), ("two", &two, 1.0)];
        // More ranks than columns: 7 of 5.
        let all = weighted(&adapters, Combination::Svd(Some(5)), &modules()).unwrap();
        let two_of_them = weighted(&adapters, Combination::Svd(Some(2)), &modules()).unwrap();
        let b = &all.factors[&name(0)].b;
        let left: f64 = (2..5).flat_map(|k| b.iter().skip(k).step_by(5)).map(|b| f64::from(*b).powi(2)).sum();
        let error = distance(&product(&all, 0), &product(&two_of_them, 0));
        assert!(left.sqrt() > 0.1 && (error - left.sqrt()).abs() < 1e-5, "{error} beside {}", left.sqrt());
        let largest = weighted(&adapters, Combination::Svd(None), &modules()).unwrap();
        assert_eq!(largest.config.lora().r, 4);
    }

    #[test]
    fn one_adapter_is_scaled() {
        let one = adapter(2, 3.0, &[0, 1, 2], 0.7);
        for weight in [0.3, -0.3] {
            let scaled = weighted(&[("one", &one, weight)], Combination::Cat, &modules()).unwrap();
            assert_eq!(scaled.config.lora().r, 2);
            let wanted: Vec<f32> = product(&one, 1).iter().map(|x| x * weight as f32).collect();
            assert!(distance(&product(&scaled, 1), &wanted) < 1e-6);
        }
    }

    #[test]
    fn targets_are_short_where_that_says_the_same() {
        let (some, all) = (adapter(2, 2.0, &[0, 2], 0.7), adapter(2, 2.0, &[1], 0.7));
        let targets = |adapters: &[(&str, &Adapter, f64)]| {
            weighted(adapters, Combination::Cat, &modules()).unwrap().config.lora().target_modules.clone()
        };
        assert_eq!(targets(&[("some", &some, 1.0), ("some", &some, 1.0)]), [name(0), name(2)].into());
        assert_eq!(targets(&[("some", &some, 1.0), ("all", &all, 1.0)]), ["up_proj"].into());
    }

    #[test]
    fn what_cannot_be_added_up_is_named() {
        let (mut odd, plain) = (adapter(3, 3.0, &[0], 0.7), adapter(2, 2.0, &[0], 0.7));
        let message = |odd: &Adapter, weight: f64, combination| {
            weighted(&[("plain", &plain, weight), ("odd", odd, 1.0)], combination, &modules()).unwrap_err().to_string()
        };
        let text = message(&odd, f64::NAN, Combination::Linear);
        assert!(text.contains("the weight of adapter \"plain\" is NaN"), "{text}");
        assert!(text.contains("adapters of equal rank; adapter \"odd\" has rank 3, not 2; use cat or svd"), "{text}");
        odd.config.lora_mut().use_dora = true;
        odd.biases.insert(name(0), vec![0.0; 7]);
        odd.saved.insert("lm_head".to_owned(), ([1, 1], vec![0.0]));
        let text = message(&odd, 1.0, Combination::Svd(Some(0)));
        for part in ["(use_dora)", "(bias)", "(modules_to_save)", "the rank of svd is 0"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let text = weighted(&[], Combination::Cat, &modules()).unwrap_err().to_string();
        assert_eq!(text, "no adapters to combine; pass at least one");
    }

    #[test]
    fn combinations_are_written_as_they_are_read() {
        for text in ["cat", "linear", "svd", "svd:8"] {
            assert_eq!(text.parse::<Combination>().unwrap().to_string(), text);
        }
        let error = "linaer".parse::<Combination>().unwrap_err().to_string();
        assert!(error.ends_with("nearest: \"linear\""), "{error}");
        assert!("svd:x".parse::<Combination>().is_err());
    }
}
