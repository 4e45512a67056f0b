use std::borrow::Cow;

use half::{bf16, f16};

use super::{Fp8Scaling, Fp8Tensor};
use crate::bnb::RawTensor;
use crate::{Dtype, Error, mxfp4};

const SCALE_INV: &str = "_scale_inv";
const SCALE: &str = "_scale";
const ZERO_POINT: &str = "_zero_point";

/// The ends of keys that begin with the name of the weight.
pub(crate) const WEIGHT_SUFFIXES: [&str; 3] = [SCALE_INV, SCALE, ZERO_POINT];

/// The ends of keys that begin with the name of the module.
pub(crate) const MODULE_SUFFIXES: [&str; 3] = [".activation_scale", ".input_scale", ".input_scale_ub"];

/// An fp8 weight as a checkpoint has it: the weight, and how its scales are stored.
///
/// Scales of activations (`activation_scale`, `input_scale`, `input_scale_ub`) are kept as they were read and not used:
/// activations are not quantized.
#[derive(Debug, Clone, PartialEq)]
pub struct Fp8Weight {
    /// The codes and scales.
    pub tensor: Fp8Tensor,
    /// The other properties of the stored tensors.
    pub(crate) layout: Fp8Layout,
}

/// The properties of the stored tensors besides their values.
#[derive(Debug, Clone, PartialEq)]
pub struct Fp8Layout {
    /// The end of the key of the scales.
    suffix: &'static str,
    scale_dtype: Dtype,
    scale_shape: Vec<usize>,
    /// Tensors that are not used, by the end of their key.
    unused: Vec<(&'static str, RawTensor<'static>)>,
}

impl Fp8Weight {
    /// Creates a weight to be stored as compressed-tensors does: `weight_scale` in f32.
    pub fn new(tensor: Fp8Tensor) -> Self {
        let scale_shape = match tensor.scaling() {
            Fp8Scaling::Tensor => vec![1],
            scaling => scaling.grid(tensor.shape()).to_vec(),
        };
        let layout = Fp8Layout { suffix: SCALE, scale_dtype: Dtype::F32, scale_shape, unused: Vec::new() };
        Self { tensor, layout }
    }

    /// Reads the weight `name` (`…q_proj.weight`), or returns `None` if the checkpoint has no scales of an fp8 weight of
    /// that name. `find` returns the tensor of a key.
    ///
    /// # Errors
    /// [`Error::MissingKey`] for scales alone, [`Error::Stored`] for another dtype or shape, two kinds of scales, or a zero
    /// point, and those of [`Fp8Tensor::from_parts`].
    pub fn read<'a>(name: &str, find: impl Fn(&str) -> Option<RawTensor<'a>>) -> Result<Option<Self>, Error> {
        let [inv_key, scale_key] = [SCALE_INV, SCALE].map(|suffix| format!("{name}{suffix}"));
        let (suffix, key, scale) = match (find(&inv_key), find(&scale_key)) {
            (None, None) => return Ok(None),
            (Some(scale), None) => (SCALE_INV, inv_key, scale),
            (None, Some(scale)) => (SCALE, scale_key, scale),
            (Some(_), Some(_)) => {
                let reason = format!("is stored beside \"{scale_key}\"; an fp8 weight has one of them");
                return Err(Error::Stored { key: inv_key, reason });
            }
        };
        let stored = |key: &str, reason: String| Error::Stored { key: key.to_owned(), reason };
        let weight = find(name).ok_or_else(|| Error::MissingKey { name: key.clone(), key: name.to_owned() })?;
        weight.expect(Dtype::F8E4M3, name)?;
        let shape: [usize; 2] = weight
            .shape
            .as_slice()
            .try_into()
            .map_err(|_| stored(name, format!("has shape {:?}, expected [out, in]", weight.shape)))?;
        let scaling = scaling(shape, &scale.shape).ok_or_else(|| {
            let [rows, cols] = Fp8Scaling::Block.grid(shape);
            let [out, input] = shape;
            stored(
                &key,
                format!(
                    "has shape {:?}; for a weight {shape:?} it is [], [1], [{out}, 1] or, in blocks of 128 × 128, \
                     [{rows}, {cols}]; supported are no other groups of in = {input}",
                    scale.shape
                ),
            )
        })?;
        let scales = scale_values(&scale).ok_or_else(|| {
            let reason = format!(
                "is stored as {} with {} bytes, expected F32, BF16, F16 or F8_E8M0",
                scale.dtype.name(),
                scale.bytes.len()
            );
            stored(&key, reason)
        })?;
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let mut unused = Vec::new();
        for (suffix, key) in MODULE_SUFFIXES
            .map(|suffix| (suffix, format!("{module}{suffix}")))
            .into_iter()
            .chain([(ZERO_POINT, format!("{name}{ZERO_POINT}"))])
        {
            let Some(RawTensor { dtype, shape, bytes }) = find(&key) else { continue };
            if suffix == ZERO_POINT && bytes.iter().any(|&byte| byte != 0) {
                return Err(stored(&key, "is not zero; only symmetric fp8 weights are supported".to_owned()));
            }
            unused.push((suffix, RawTensor { dtype, shape, bytes: Cow::Owned(bytes.into_owned()) }));
        }
        let tensor = Fp8Tensor::from_parts(shape, weight.bytes.into_owned(), scales, scaling)?;
        let layout = Fp8Layout { suffix, scale_dtype: scale.dtype, scale_shape: scale.shape, unused };
        Ok(Some(Self { tensor, layout }))
    }

    /// Returns the tensors to write, by key, as they were read.
    pub fn write(&self, name: &str) -> Vec<(String, RawTensor<'_>)> {
        let Fp8Layout { suffix, scale_dtype, scale_shape, unused } = &self.layout;
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let codes = RawTensor {
            dtype: Dtype::F8E4M3,
            shape: self.tensor.shape().to_vec(),
            bytes: Cow::Borrowed(self.tensor.codes()),
        };
        let scales = RawTensor {
            dtype: *scale_dtype,
            shape: scale_shape.clone(),
            bytes: Cow::Owned(scale_bytes(self.tensor.scales(), *scale_dtype)),
        };
        let mut tensors = vec![(name.to_owned(), codes), (format!("{name}{suffix}"), scales)];
        for (suffix, raw) in unused {
            let prefix = if suffix.starts_with('.') { module } else { name };
            tensors.push((format!("{prefix}{suffix}"), raw.clone()));
        }
        tensors
    }
}

/// Returns the elements that share a scale, from the shape of the scales.
fn scaling([rows, cols]: [usize; 2], scale: &[usize]) -> Option<Fp8Scaling> {
    if scale.len() <= 2 && scale.iter().all(|&extent| extent == 1) {
        return Some(Fp8Scaling::Tensor);
    }
    if scale == [rows] || scale == [rows, 1] {
        return Some(Fp8Scaling::Row);
    }
    (scale == Fp8Scaling::Block.grid([rows, cols])).then_some(Fp8Scaling::Block)
}

/// The values of stored scales; `None` for another dtype, or bytes that are not whole elements.
fn scale_values(scale: &RawTensor<'_>) -> Option<Vec<f32>> {
    let bytes: &[u8] = &scale.bytes;
    let halves = || bytes.as_chunks::<2>().0.iter().map(|&b| u16::from_le_bytes(b));
    let values: Vec<f32> = match scale.dtype {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        Dtype::BF16 => halves().map(|bits| bf16::from_bits(bits).to_f32()).collect(),
        Dtype::F16 => halves().map(|bits| f16::from_bits(bits).to_f32()).collect(),
        // 255 stands for NaN.
        Dtype::F8E8M0 | Dtype::U8 => {
            bytes.iter().map(|&byte| if byte == 255 { f32::NAN } else { mxfp4::power(byte) }).collect()
        }
        _ => return None,
    };
    (values.len() * scale.dtype.size() == bytes.len()).then_some(values)
}

/// The bytes that [`scale_values`] read.
fn scale_bytes(scales: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => scales.iter().flat_map(|&scale| bf16::from_f32(scale).to_le_bytes()).collect(),
        Dtype::F16 => scales.iter().flat_map(|&scale| f16::from_f32(scale).to_le_bytes()).collect(),
        Dtype::F8E8M0 | Dtype::U8 => scales.iter().map(|scale| (scale.to_bits() >> 23) as u8).collect(),
        _ => scales.iter().flat_map(|scale| scale.to_le_bytes()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Tensors = Vec<(String, RawTensor<'static>)>;

    fn stored(scale_dtype: Dtype, scale_shape: &[usize], suffix: &str) -> Tensors {
        let count = scale_shape.iter().product::<usize>();
        let scales: Vec<f32> = (0..count).map(|i| 0.5_f32.powi(i as i32 % 7 - 3)).collect();
        let raw = |dtype, shape: &[usize], bytes| RawTensor { dtype, shape: shape.to_vec(), bytes: Cow::Owned(bytes) };
        let codes = (0..130 * 200).map(|i| (i % 251) as u8 & 0xf7).collect();
        vec![
            ("m.weight".to_owned(), raw(Dtype::F8E4M3, &[130, 200], codes)),
            (format!("m.weight{suffix}"), raw(scale_dtype, scale_shape, scale_bytes(&scales, scale_dtype))),
        ]
    }

    fn read(tensors: &Tensors) -> Result<Option<Fp8Weight>, Error> {
        Fp8Weight::read("m.weight", |key| tensors.iter().find(|(name, _)| name == key).map(|(_, raw)| raw.clone()))
    }

    #[test]
    fn every_layout_is_written_as_it_was_read() {
        for (shape, scaling) in [
            (&[][..], Fp8Scaling::Tensor),
            (&[1], Fp8Scaling::Tensor),
            (&[130, 1], Fp8Scaling::Row),
            (&[130], Fp8Scaling::Row),
            (&[2, 2], Fp8Scaling::Block),
        ] {
            for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F8E8M0, Dtype::U8] {
                for suffix in [SCALE, SCALE_INV] {
                    let mut tensors = stored(dtype, shape, suffix);
                    let activation =
                        RawTensor { dtype: Dtype::F32, shape: Vec::new(), bytes: Cow::Owned(vec![0, 0, 128, 63]) };
                    tensors.push(("m.activation_scale".to_owned(), activation));
                    let weight = read(&tensors).expect("valid").expect("fp8");
                    assert_eq!(weight.tensor.scaling(), scaling, "{shape:?}");
                    assert_eq!(weight.tensor.scales()[0], 8.0);
                    assert_eq!(weight.write("m.weight"), tensors);
                }
            }
        }
        assert_eq!(read(&Vec::new()), Ok(None));
        assert_eq!(read(&stored(Dtype::F32, &[1], "_other")), Ok(None));
    }

    #[test]
    fn errors_name_the_key_and_the_problem() {
        let broken = |change: fn(&mut Tensors)| {
            let mut tensors = stored(Dtype::F32, &[2, 2], SCALE_INV);
            change(&mut tensors);
            read(&tensors).expect_err("broken").to_string()
        };
        let scale = r#""m.weight_scale_inv""#;
        assert!(broken(|t| drop(t.remove(0))).contains(r#"no "m.weight", which "m.weight_scale_inv" needs"#));
        assert!(broken(|t| t[0].1.dtype = Dtype::F8E5M2).contains("is stored as F8_E5M2, expected F8_E4M3"));
        assert!(broken(|t| t[0].1.shape = vec![26000]).contains("has shape [26000], expected [out, in]"));
        let error = broken(|t| t[1].1.shape = vec![4, 1]);
        assert!(error.starts_with(&format!("{scale} has shape [4, 1]; for a weight [130, 200] it is")), "{error}");
        assert!(broken(|t| t[1].1.dtype = Dtype::I32).contains("is stored as I32 with 16 bytes, expected F32"));
        assert!(broken(|t| t[1].1.bytes.to_mut().truncate(15)).contains("with 15 bytes"));
        assert!(broken(|t| t[0].1.bytes.to_mut()[5] = 0x7f).contains("\"code\" 5 is NaN"));
        assert!(
            broken(|t| t[1].1.bytes.to_mut()[..4].copy_from_slice(&[0, 0, 192, 127])).contains("\"scale\" 0 is NaN")
        );
        let twice = broken(|t| {
            let raw = t[1].1.clone();
            t.push(("m.weight_scale".to_owned(), raw));
        });
        assert!(twice.contains("is stored beside \"m.weight_scale\""), "{twice}");
        let zero = broken(|t| {
            let raw = RawTensor { dtype: Dtype::I8, shape: vec![1], bytes: Cow::Owned(vec![3]) };
            t.push(("m.weight_zero_point".to_owned(), raw));
        });
        assert!(zero.contains("\"m.weight_zero_point\" is not zero"), "{zero}");
    }
}
