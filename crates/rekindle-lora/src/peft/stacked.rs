//! The factors of all experts as two matrices, as PEFT saves adapters on `target_parameters`.
//!
//! For a parameter `[experts, out, in]` the file has A `[experts · r, in]`, expert by expert, and B `[out, r · experts]`,
//! whose columns are ordered by rank first and by expert last. PEFT before 0.20 had `in` and `out` of Qwen's and Mixtral's
//! experts the wrong way round: A `[experts · r, out]` and B `[in, r · experts]` stand for ΔW_e = s·A_eᵀ·B_eᵀ there. The
//! shapes tell which it is.
//!
//! Where several parameters of one module have adapters, each wrapper is inside the next: the first parameter's key has
//! the most `base_layer` segments.

use crate::{ExpertProjection, LoraFactors};

/// The modules that the keys of parameters name, given in the order in which their modules have them.
pub(crate) fn key_modules(parameters: &[String]) -> Vec<String> {
    let module = |parameter: &String| parameter.rsplit_once('.').map_or(String::new(), |(module, _)| module.to_owned());
    let modules: Vec<String> = parameters.iter().map(module).collect();
    let key = |(index, module): (usize, &String)| {
        let outside = modules[index + 1..].iter().filter(|other| *other == module).count();
        format!("{module}{}", ".base_layer".repeat(outside))
    };
    modules.iter().enumerate().map(key).collect()
}

/// The parameter that holds the linears of this name of all experts in transformers 5, and the expert's index.
pub(crate) fn parameter_of(linear: &str) -> Option<(String, usize)> {
    let (rest, last) = linear.rsplit_once('.')?;
    let (module, expert) = rest.rsplit_once('.')?;
    // Mixtral's modules and linears have other names in its checkpoints.
    let renamed = match last {
        "w1_w3" => Some("gate_up_proj"),
        "w2" => Some("down_proj"),
        _ => None,
    };
    let module = if renamed.is_some() { module.replace(".block_sparse_moe.", ".mlp.") } else { module.to_owned() };
    let last = renamed.unwrap_or(last);
    module.ends_with("experts").then_some((format!("{module}.{last}"), expert.parse().ok()?))
}

/// The shapes of A and B in a file.
pub(crate) fn shapes(projection: &ExpertProjection, r: usize) -> [[usize; 2]; 2] {
    let ranks = projection.experts * r;
    [[ranks, projection.input], [projection.names.width(), ranks]]
}

/// The shapes where `in` and `out` are the wrong way round.
pub(crate) fn swapped_shapes(projection: &ExpertProjection, r: usize) -> [[usize; 2]; 2] {
    let ranks = projection.experts * r;
    [[ranks, projection.names.width()], [projection.input, ranks]]
}

/// The factors of every expert from those of all.
pub(crate) fn split(projection: &ExpertProjection, r: usize, a: &[f32], b: &[f32], swapped: bool) -> Vec<LoraFactors> {
    let experts = projection.experts;
    let (input, out) = (projection.input, projection.names.width());
    let (columns, rows) = if swapped { (out, input) } else { (input, out) };
    let factors = |expert: usize| {
        let a = a[expert * r * columns..][..r * columns].to_vec(); // [r, columns]
        let of_b = |row: usize| (0..r).map(move |k| b[row * r * experts + k * experts + expert]);
        let b: Vec<f32> = (0..rows).flat_map(of_b).collect(); // [rows, r]
        let (a, b) = if swapped { (transposed(&b, rows, r), transposed(&a, r, columns)) } else { (a, b) };
        LoraFactors { r, a, b, magnitude: None }
    };
    (0..experts).map(factors).collect()
}

/// The factors of all experts from those of each, in their order.
pub(crate) fn join(factors: &[&LoraFactors]) -> (Vec<f32>, Vec<f32>) {
    let (experts, r) = (factors.len(), factors.first().map_or(1, |factors| factors.r));
    let a = factors.iter().flat_map(|factors| &factors.a).copied().collect();
    let rows = factors.first().map_or(0, |factors| factors.b.len() / r);
    let row = |row: usize| (0..r).flat_map(move |k| factors.iter().map(move |factors| factors.b[row * r + k]));
    let mut b = Vec::with_capacity(rows * r * experts);
    (0..rows).for_each(|index| b.extend(row(index)));
    (a, b)
}

fn transposed(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols).map(|i| values[i % rows * cols + i / rows]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ExpertNames;

    fn projection() -> ExpertProjection {
        let names = ExpertNames {
            module: "mlp.experts".into(),
            outputs: vec![("gate_proj", 1), ("up_proj", 2)],
            joined: "gate_up_proj",
            parameter: "mlp.experts.gate_up_proj".into(),
        };
        ExpertProjection { names, experts: 2, input: 4, is_only_stacked: false }
    }

    #[test]
    fn columns_of_b_are_ordered_by_rank_and_then_by_expert() {
        let a: Vec<f32> = (0..16).map(|i| i as f32).collect(); // [2 experts · 2 ranks, 4]
        let b: Vec<f32> = (0..12).map(|i| i as f32).collect(); // [3, 2 ranks · 2 experts]
        let [first, second]: [LoraFactors; 2] = split(&projection(), 2, &a, &b, false).try_into().unwrap();
        assert_eq!((&first.a[..], &second.a[..]), (&a[..8], &a[8..]));
        assert_eq!(first.b, [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(second.b, [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]);
        assert_eq!(join(&[&first, &second]), (a, b));
    }

    #[test]
    fn swapped_factors_are_the_transposed_product() {
        let projection = projection();
        let a: Vec<f32> = (0..12).map(|i| i as f32 - 4.0).collect(); // [2 · 2, out 3]
        let b: Vec<f32> = (0..16).map(|i| i as f32 * 0.5 - 3.0).collect(); // [in 4, 2 · 2]
        for (expert, factors) in split(&projection, 2, &a, &b, true).iter().enumerate() {
            for out in 0..3 {
                for input in 0..4 {
                    let ours: f32 = (0..2).map(|k| factors.b[out * 2 + k] * factors.a[k * 4 + input]).sum();
                    let theirs: f32 =
                        (0..2).map(|k| a[(expert * 2 + k) * 3 + out] * b[input * 4 + k * 2 + expert]).sum();
                    assert_eq!(ours, theirs);
                }
            }
        }
        assert_eq!(shapes(&projection, 2), [[4, 4], [3, 4]]);
        assert_eq!(swapped_shapes(&projection, 2), [[4, 3], [4, 4]]);
    }

    #[test]
    fn wrappers_nest_where_a_module_has_several() {
        let parameters = ["a.experts.gate_up_proj", "a.experts.down_proj", "b.experts.down_proj"].map(str::to_owned);
        assert_eq!(key_modules(&parameters), ["a.experts.base_layer", "a.experts", "b.experts"]);
        assert_eq!(key_modules(&parameters[1..]), ["a.experts", "b.experts"]);
        let of = |linear| parameter_of(linear).unwrap();
        assert_eq!(of("layers.0.mlp.experts.7.gate_up_proj"), ("layers.0.mlp.experts.gate_up_proj".to_owned(), 7));
        assert_eq!(of("layers.0.block_sparse_moe.experts.2.w2"), ("layers.0.mlp.experts.down_proj".to_owned(), 2));
        assert_eq!(
            of("layers.0.block_sparse_moe.experts.2.w1_w3"),
            ("layers.0.mlp.experts.gate_up_proj".to_owned(), 2)
        );
        // Granite's modules keep their names.
        let granite = "layers.0.block_sparse_moe.experts.3.down_proj";
        assert_eq!(of(granite), ("layers.0.block_sparse_moe.experts.down_proj".to_owned(), 3));
        assert_eq!(parameter_of("layers.0.self_attn.q_proj"), None);
    }
}
