//! Inverse frequencies and attention factors against transformers (`goldens/rope.json`, made by `goldens/make.py`).

use rekindle_rope::RopeConfig;
use serde_json::Value;

/// transformers computes in f32: `theta^(2i/d)` there carries the rounding of the exponent, up to
/// `ln(theta) · 2⁻²⁵` = 4e-7 relative for theta 1e6, and three or four more roundings of 6e-8, which the blend of
/// llama3 and yarn amplifies. The largest difference in this grid is 8.1e-7 (llama3, factor 32); of the types
/// without a blend, 3.1e-7.
const TOLERANCE: f64 = 1e-6;

#[test]
fn frequencies_and_attention_factors_equal_transformers() {
    let golden: Value = serde_json::from_str(include_str!("../goldens/rope.json")).expect("the golden is JSON");
    let cases = golden["cases"].as_array().expect("a list of cases");
    assert_eq!(cases.len(), 84, "21 variants, two head sizes, two thetas");
    for case in cases {
        let head_dim = case["head_dim"].as_u64().expect("head_dim") as usize;
        for config in case["configs"].as_array().expect("two spellings") {
            let rope = RopeConfig::from_config(config, head_dim).unwrap_or_else(|e| panic!("{}: {e}", case["name"]));
            for result in case["results"].as_array().expect("a list of results") {
                check(&rope, result, &format!("{}, head_dim {head_dim}", case["name"]));
            }
        }
    }
}

fn check(rope: &RopeConfig, result: &Value, name: &str) {
    let attention_factor = result["attention_factor"].as_f64().expect("attention_factor");
    assert_close(rope.attention_factor(), attention_factor, &format!("{name}: attention_factor"));
    let expected: Vec<f64> =
        result["inv_freq"].as_array().expect("inv_freq").iter().filter_map(Value::as_f64).collect();
    for seq_len in result["seq_lens"].as_array().expect("seq_lens") {
        let seq_len = seq_len.as_u64().expect("a length") as usize;
        let got = rope.inv_freq(seq_len);
        assert_eq!(got.len(), rope.rotary_dim() / 2);
        assert_eq!(got.len(), expected.len(), "{name}");
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert_close(f64::from(*got), *expected, &format!("{name}, length {seq_len}: inv_freq[{i}]"));
        }
    }
}

fn assert_close(got: f64, expected: f64, what: &str) {
    let error = (got - expected).abs() / expected.abs();
    assert!(error <= TOLERANCE, "{what}: {got:e} instead of {expected:e}, off by {error:e}");
}
