use std::borrow::Cow;

use super::raw::{RawTensor, stored};
use super::{SCB, WEIGHT_FORMAT};
use crate::{Dtype, Error, Int8Tensor};

/// Reads the LLM.int8() weight of `module` (`…q_proj`), or returns `None` if the checkpoint has none. `find` returns
/// the tensor of a key.
///
/// # Errors
/// [`Error::MissingKey`] and [`Error::Stored`] for companion tensors that are absent or have another type or layout,
/// and [`Error::Length`] for scales that do not match the rows.
pub fn read_int8<'a>(module: &str, find: impl Fn(&str) -> Option<RawTensor<'a>>) -> Result<Option<Int8Tensor>, Error> {
    let scb_key = format!("{module}{SCB}");
    let Some(scb) = find(&scb_key) else { return Ok(None) };
    let format_key = format!("{module}{WEIGHT_FORMAT}");
    // Files of early versions lack the format; they are row-major.
    if let Some(format) = find(&format_key) {
        format.expect(Dtype::U8, &format_key)?;
        if *format.bytes != [0] {
            let found = &format.bytes[..format.bytes.len().min(4)]; // a few bytes suffice for the message
            let reason = format!("is {found:?}, expected [0] (row-major); save the model again with bitsandbytes");
            return Err(stored(&format_key, reason));
        }
    }
    let key = format!("{module}.weight");
    let weight = find(&key).ok_or_else(|| Error::MissingKey { name: scb_key.clone(), key: key.clone() })?;
    weight.expect(Dtype::I8, &key)?;
    let shape: [usize; 2] = weight
        .shape
        .as_slice()
        .try_into()
        .map_err(|_| stored(&key, format!("has shape {:?}, expected [out, in]", weight.shape)))?;
    let codes = weight.bytes.iter().map(|&byte| byte as i8).collect();
    Int8Tensor::from_parts(shape, codes, scb.to_f32(&scb_key)?).map(Some)
}

/// Returns the tensors to write, by the suffix appended to the module's name.
pub fn write_int8(tensor: &Int8Tensor) -> Vec<(&'static str, RawTensor<'_>)> {
    let bytes = Cow::Borrowed(bytemuck::cast_slice(tensor.codes()));
    vec![
        (".weight", RawTensor { dtype: Dtype::I8, shape: tensor.shape().to_vec(), bytes }),
        (SCB, RawTensor::f32(tensor.scb())),
        (WEIGHT_FORMAT, RawTensor::u8(Vec::new(), &[0])),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(tensors: &[(&str, RawTensor<'static>)]) -> Result<Option<Int8Tensor>, Error> {
        read_int8("m", |key| {
            let suffix = key.strip_prefix('m')?;
            tensors.iter().find(|(s, _)| *s == suffix).map(|(_, raw)| raw.clone())
        })
    }

    fn tensors() -> (Int8Tensor, Vec<(&'static str, RawTensor<'static>)>) {
        let tensor = Int8Tensor::quantize(&[0.5f32, -1.0, 0.25, 3.0, 0.0, 2.0], [2, 3]).expect("shape fits");
        let owned = |(suffix, raw): (&'static str, RawTensor<'_>)| {
            let bytes = Cow::Owned(raw.bytes.into_owned());
            (suffix, RawTensor { dtype: raw.dtype, shape: raw.shape, bytes })
        };
        let tensors = write_int8(&tensor).into_iter().map(owned).collect();
        (tensor, tensors)
    }

    #[test]
    fn weights_round_trip() {
        let (tensor, tensors) = tensors();
        assert_eq!(read(&tensors), Ok(Some(tensor.clone())));
        assert_eq!(read(&tensors[..2]), Ok(Some(tensor)), "weight_format is optional");
        assert_eq!(read(&tensors[..1]), Ok(None), "no SCB");
    }

    #[test]
    fn errors_name_the_key_and_the_problem() {
        let (_, tensors) = tensors();
        let broken = |index: usize, change: fn(&mut RawTensor<'static>)| {
            let mut tensors = tensors.clone();
            change(&mut tensors[index].1);
            read(&tensors).expect_err("broken").to_string()
        };
        assert!(broken(0, |t| t.shape = vec![6]).contains(r#""m.weight" has shape [6], expected [out, in]"#));
        assert!(broken(0, |t| t.dtype = Dtype::F16).contains("is stored as F16, expected I8"));
        assert!(broken(0, |t| t.shape = vec![3, 2]).contains("shape [3, 2] with int8 rows needs 3 SCB values, got 2"));
        assert!(broken(2, |t| t.bytes.to_mut()[0] = 2).contains(r#""m.weight_format" is [2], expected [0]"#));
        let error = read(&tensors[1..]).expect_err("no weight").to_string();
        assert!(error.contains(r#"no "m.weight", which "m.SCB" needs"#), "{error}");
    }
}
