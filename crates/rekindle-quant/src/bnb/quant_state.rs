//! The JSON of `quant_state.bitsandbytes__nf4`, byte for byte as Python's `json.dumps` writes it.

use serde::Deserialize;

use super::raw::stored;
use crate::element::parse_float;
use crate::{Blocksize, Dtype, Error, QuantType};

/// The metadata of a 4-bit weight.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct QuantState {
    pub(super) quant_type: QuantType,
    pub(super) blocksize: Blocksize,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) nested: Option<Nested>,
}

/// The metadata that double quantization adds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Nested {
    pub(super) blocksize: Blocksize,
    pub(super) offset: f32,
}

/// The maximum length in bytes, far more than any valid state: a few names, a shape and a number.
const LONGEST: usize = 4096;

impl QuantState {
    /// Parses the JSON; `key` names the tensor in messages.
    ///
    /// # Errors
    /// [`Error::Stored`] and the errors of its values for anything bitsandbytes would not have written.
    pub(super) fn parse(bytes: &[u8], key: &str) -> Result<Self, Error> {
        if bytes.len() > LONGEST {
            return Err(stored(key, format!("has {} bytes, expected a JSON object of at most {LONGEST}", bytes.len())));
        }
        let json: Json = serde_json::from_slice(bytes)
            .map_err(|e| stored(key, format!("is not the JSON of a bitsandbytes quant_state: {e}")))?;
        let nested = match (json.nested_blocksize, json.nested_dtype, json.nested_offset) {
            (None, None, None) => None,
            (Some(blocksize), Some(dtype), Some(offset)) => {
                if dtype != Dtype::F32.torch_name() {
                    return Err(stored(key, format!("has nested_dtype {dtype:?}, expected \"float32\"")));
                }
                // JSON numbers are f64; the offset was written from an f32.
                Some(Nested { blocksize: Blocksize::try_from(blocksize)?, offset: offset as f32 })
            }
            _ => {
                let names = "nested_blocksize, nested_dtype and nested_offset";
                return Err(stored(key, format!("has only some of {names}; expected all or none of them")));
            }
        };
        Ok(Self {
            quant_type: json.quant_type.parse()?,
            blocksize: Blocksize::try_from(json.blocksize)?,
            dtype: parse_float(&json.dtype)?,
            shape: json.shape,
            nested,
        })
    }

    pub(super) fn to_json(&self) -> String {
        let shape = self.shape.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        let nested = self.nested.map_or_else(String::new, |nested| {
            format!(
                r#", "nested_blocksize": {}, "nested_dtype": "float32", "nested_offset": {}"#,
                nested.blocksize.get(),
                python_float(f64::from(nested.offset))
            )
        });
        format!(
            r#"{{"quant_type": "{}", "blocksize": {}, "dtype": "{}", "shape": [{shape}]{nested}}}"#,
            self.quant_type.name(),
            self.blocksize.get(),
            self.dtype.torch_name()
        )
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Json {
    quant_type: String,
    blocksize: u64,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<u64>,
    nested_dtype: Option<String>,
    nested_offset: Option<f64>,
}

/// Formats like `float.__repr__`: the shortest digits that round-trip, with an exponent below 1e-4 and from 1e16.
fn python_float(value: f64) -> String {
    if !value.is_finite() {
        return if value.is_nan() {
            "NaN"
        } else if value > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        }
        .to_owned();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').expect("LowerExp writes an exponent");
    let exponent: i32 = exponent.parse().expect("LowerExp writes a decimal exponent");
    if value == 0.0 || (-4..16).contains(&exponent) {
        return format!("{value:?}");
    }
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NESTED: &str = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [896, 4864], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.04512467235326767}"#;

    #[test]
    fn json_round_trips_byte_for_byte() {
        let single = r#"{"quant_type": "fp4", "blocksize": 4096, "dtype": "float16", "shape": [7]}"#;
        for json in [NESTED, single] {
            assert_eq!(QuantState::parse(json.as_bytes(), "k").expect("valid").to_json(), json);
        }
    }

    #[test]
    fn floats_are_formatted_as_in_python() {
        for (value, text) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (1e-300, "1e-300"),
            (123456789.125, "123456789.125"),
            (9999999999999998.0, "9999999999999998.0"),
            (1e16, "1e+16"),
            (1.2345e17, "1.2345e+17"),
            (f64::from(0.1f32), "0.10000000149011612"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-Infinity"),
        ] {
            assert_eq!(python_float(value), text);
        }
    }

    #[test]
    fn errors_name_the_value() {
        for (from, to, message) in [
            (r#""nf4""#, r#""int4""#, r#"unknown quant_type "int4""#),
            (": 64", ": 16", "blocksize 16 is not supported"),
            (": 64", ": -64", "invalid value"),
            ("bfloat16", "float64", r#"dtype "float64" cannot be quantized"#),
            ("[896, 4864]", "null", "invalid type: null"),
            ("[896, 4864]", "[896, 99999999999999999999]", "invalid type"),
            ("nested_dtype", "n_dtype", "unknown field `n_dtype`"),
            (r#", "nested_dtype": "float32""#, "", "expected all or none"),
            (r#""float32""#, r#""float16""#, r#"nested_dtype "float16""#),
            (r#""shape""#, r#""dtype""#, "duplicate field `dtype`"),
        ] {
            let error = QuantState::parse(NESTED.replace(from, to).as_bytes(), "w.quant_state").expect_err(to);
            assert!(error.to_string().contains(message), "{to}: {error}");
        }
        let long = format!("{NESTED}{}", " ".repeat(LONGEST));
        assert!(QuantState::parse(long.as_bytes(), "k").is_err());
    }

    /// Truncations and changed bytes give a state or an error, and every accepted state round-trips.
    #[test]
    fn mutations_never_panic() {
        let valid = NESTED.as_bytes();
        let mut accepted = 0;
        for at in 0..valid.len() {
            assert!(QuantState::parse(&valid[..at], "k").is_err(), "cut at {at}");
            for byte in 0..=255 {
                let mut bytes = valid.to_vec();
                bytes[at] = byte;
                if let Ok(state) = QuantState::parse(&bytes, "k") {
                    accepted += 1;
                    let again = QuantState::parse(state.to_json().as_bytes(), "k");
                    assert!(state.nested.is_some_and(|n| n.offset.is_infinite()) || again == Ok(state));
                }
            }
        }
        assert!(accepted > valid.len(), "digits and blanks can change: {accepted}");
    }
}
