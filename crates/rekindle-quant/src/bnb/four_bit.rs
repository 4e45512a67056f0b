use std::borrow::Cow;

use super::quant_state::{Nested, QuantState};
use super::raw::{RawTensor, stored};
use super::{ABSMAX, NESTED_ABSMAX, NESTED_QUANT_MAP, QUANT_MAP, quant_state_suffix};
use crate::{Absmax, DoubleQuant, Dtype, DynamicMap, Error, QuantType, QuantizedTensor, four_bit};

/// A 4-bit weight of a checkpoint: the tensor and the storage layout of its codes.
///
/// Reading and writing are inverses: every tensor round-trips byte for byte.
#[derive(Debug, Clone, PartialEq)]
pub struct FourBitWeight {
    /// The weight.
    pub tensor: QuantizedTensor,
    pub(crate) storage: Dtype,
    pub(crate) packed_shape: Vec<usize>,
}

impl FourBitWeight {
    /// Wraps a weight for writing in the default storage layout, u8 `[⌈n/2⌉, 1]`.
    pub fn new(tensor: QuantizedTensor) -> Self {
        let packed_shape = vec![tensor.codes().len(), 1];
        Self { tensor, storage: Dtype::U8, packed_shape }
    }

    /// Reads the weight `name`, or returns `None` if the checkpoint has no 4-bit weight of that name. `find` returns
    /// the tensor of a key.
    ///
    /// # Errors
    /// [`Error::MissingKey`] and [`Error::Stored`] for companion tensors that are absent or have the wrong type,
    /// [`Error::Length`] for those that do not match the shape, and the errors of a quant_state with an unknown
    /// `quant_type`, `blocksize` or `dtype`.
    pub fn read<'a>(name: &str, find: impl Fn(&str) -> Option<RawTensor<'a>>) -> Result<Option<Self>, Error> {
        let state = QuantType::ALL.into_iter().find_map(|quant_type| {
            let key = format!("{name}{}", quant_state_suffix(quant_type));
            find(&key).map(|raw| (quant_type, key, raw))
        });
        let Some((quant_type, key, raw)) = state else { return Ok(None) };
        raw.expect(Dtype::U8, &key)?;
        let state = QuantState::parse(&raw.bytes, &key)?;
        if state.quant_type != quant_type {
            return Err(stored(
                &key,
                format!("has quant_type {:?}, which differs from the one in its key", state.quant_type.name()),
            ));
        }
        let parts = Parts { name, find: &find };
        parts.check_quant_map(quant_type)?;
        let absmax = match state.nested {
            None => Absmax::Single(parts.f32(ABSMAX)?),
            Some(nested) => Absmax::Double(parts.double_quant(nested)?),
        };
        let RawTensor { dtype: storage, shape: packed_shape, bytes } = parts.get("")?;
        let (shape, dtype) = (state.shape, state.dtype);
        let codes = bytes.into_owned();
        let tensor = QuantizedTensor::from_parts(shape, dtype, quant_type, state.blocksize, codes, absmax)?;
        Ok(Some(Self { tensor, storage, packed_shape }))
    }

    /// Returns the tensors to write, by the suffix appended to the weight's name (empty for the codes).
    pub fn write(&self) -> Vec<(&'static str, RawTensor<'_>)> {
        let config = self.tensor.config();
        let codes = Cow::Borrowed(self.tensor.codes());
        let codes = RawTensor { dtype: self.storage, shape: self.packed_shape.clone(), bytes: codes };
        let mut tensors = vec![("", codes), (QUANT_MAP, RawTensor::f32(&quant_map(config.quant_type)))];
        let nested = match self.tensor.absmax() {
            Absmax::Single(absmax) => {
                tensors.push((ABSMAX, RawTensor::f32(absmax)));
                None
            }
            Absmax::Double(double) => {
                tensors.push((ABSMAX, RawTensor::u8(vec![double.codes().len()], double.codes())));
                tensors.push((NESTED_ABSMAX, RawTensor::f32(double.nested_absmax())));
                tensors.push((NESTED_QUANT_MAP, RawTensor::f32(double.map().values())));
                Some(Nested { blocksize: double.blocksize(), offset: double.offset() })
            }
        };
        let json = QuantState {
            quant_type: config.quant_type,
            blocksize: config.blocksize,
            dtype: self.tensor.dtype(),
            shape: self.tensor.shape().to_vec(),
            nested,
        }
        .to_json()
        .into_bytes();
        let state = RawTensor { dtype: Dtype::U8, shape: vec![json.len()], bytes: Cow::Owned(json) };
        tensors.push((quant_state_suffix(config.quant_type), state));
        tensors
    }
}

/// The tensors of one weight.
struct Parts<'n, F> {
    name: &'n str,
    find: F,
}

impl<'a, F: Fn(&str) -> Option<RawTensor<'a>>> Parts<'_, F> {
    fn key(&self, suffix: &str) -> String {
        format!("{}{suffix}", self.name)
    }

    fn get(&self, suffix: &str) -> Result<RawTensor<'a>, Error> {
        let key = self.key(suffix);
        (self.find)(&key).ok_or_else(|| Error::MissingKey { name: self.name.to_owned(), key })
    }

    fn f32(&self, suffix: &str) -> Result<Vec<f32>, Error> {
        self.get(suffix)?.to_f32(&self.key(suffix))
    }

    /// Checks the code table, which is fixed by the type; a different table means an unknown format.
    fn check_quant_map(&self, quant_type: QuantType) -> Result<(), Error> {
        let (found, expected) = (self.f32(QUANT_MAP)?, quant_map(quant_type));
        if found == expected {
            return Ok(());
        }
        let found = &found[..found.len().min(17)]; // one more than expected shows that there are too many
        let reason = format!("is {found:?}, expected the values of {}: {expected:?}", quant_type.name());
        Err(stored(&self.key(QUANT_MAP), reason))
    }

    fn double_quant(&self, nested: Nested) -> Result<DoubleQuant, Error> {
        let codes = self.get(ABSMAX)?;
        codes.expect(Dtype::U8, &self.key(ABSMAX))?;
        let map = self.f32(NESTED_QUANT_MAP)?;
        let map: [f32; 256] = map.try_into().map_err(|map: Vec<f32>| {
            stored(&self.key(NESTED_QUANT_MAP), format!("has {} values, expected 256", map.len()))
        })?;
        let (codes, nested_absmax) = (codes.bytes.into_owned(), self.f32(NESTED_ABSMAX)?);
        let map = DynamicMap::from_values(map)?;
        DoubleQuant::from_parts(codes, nested_absmax, nested.blocksize, nested.offset, map)
    }
}

/// Returns the code table as stored in files, where both zeros are positive.
fn quant_map(quant_type: QuantType) -> [f32; 16] {
    four_bit::values(quant_type).map(|value| value + 0.0)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::{Blocksize, QuantConfig};

    fn weight(config: QuantConfig) -> FourBitWeight {
        let values: Vec<f32> = (0..35 * 17).map(|i| (i as f32 * 0.7).sin() * 0.03).collect();
        FourBitWeight::new(QuantizedTensor::quantize(&values, &[35, 17], &config).expect("shape fits"))
    }

    fn read(tensors: &HashMap<String, RawTensor<'static>>) -> Result<Option<FourBitWeight>, Error> {
        FourBitWeight::read("w", |key| tensors.get(key).cloned())
    }

    fn stored_tensors(weight: &FourBitWeight) -> HashMap<String, RawTensor<'static>> {
        let owned = |(suffix, raw): (&str, RawTensor<'_>)| {
            let bytes = Cow::Owned(raw.bytes.into_owned());
            (format!("w{suffix}"), RawTensor { dtype: raw.dtype, shape: raw.shape, bytes })
        };
        weight.write().into_iter().map(owned).collect()
    }

    #[test]
    fn every_format_round_trips() {
        for quant_type in QuantType::ALL {
            for double_quant in [false, true] {
                let blocksize = Blocksize::new(32).expect("supported");
                let written = weight(QuantConfig { quant_type, blocksize, double_quant });
                let tensors = stored_tensors(&written);
                assert_eq!(tensors.len(), if double_quant { 6 } else { 4 });
                assert_eq!(read(&tensors), Ok(Some(written)));
            }
        }
        assert_eq!(read(&HashMap::new()), Ok(None));
    }

    #[test]
    fn any_storage_type_is_viewed_as_bytes() {
        let mut tensors = stored_tensors(&weight(QuantConfig::default()));
        let codes = tensors.get_mut("w").expect("codes");
        (codes.dtype, codes.shape) = (Dtype::BF16, vec![codes.bytes.len() / 2, 1]);
        let stored = codes.clone();
        let read = read(&tensors).expect("readable").expect("present");
        assert_eq!(read.tensor, weight(QuantConfig::default()).tensor);
        assert_eq!(read.write()[0], ("", stored));
    }

    #[test]
    fn errors_name_the_key_and_the_problem() {
        let tensors = stored_tensors(&weight(QuantConfig::default()));
        for (suffix, change, message) in [
            ("", Change::Truncate, "shape [35, 17] with blocksize 64 needs 298 packed bytes, got 297"),
            (ABSMAX, Change::Truncate, "shape [35, 17] with blocksize 64 needs 10 absmax values, got 9"),
            (ABSMAX, Change::Remove, r#"checkpoint has no "w.absmax", which "w" needs"#),
            (ABSMAX, Change::Type, r#""w.absmax" is stored as I16, expected U8"#),
            (QUANT_MAP, Change::Truncate, r#""w.quant_map" has 63 bytes"#),
            (QUANT_MAP, Change::Flip, r#""w.quant_map" is ["#),
            (NESTED_ABSMAX, Change::Remove, r#"no "w.nested_absmax""#),
            (NESTED_QUANT_MAP, Change::Type, r#""w.nested_quant_map" is stored as I16"#),
            (".quant_state.bitsandbytes__nf4", Change::Truncate, "is not the JSON of a bitsandbytes quant_state"),
        ] {
            let mut tensors = tensors.clone();
            let key = format!("w{suffix}");
            let raw = tensors.get_mut(&key).expect("written");
            match change {
                Change::Truncate => drop(raw.bytes.to_mut().pop()),
                Change::Flip => raw.bytes.to_mut()[3] ^= 0x80,
                Change::Type => raw.dtype = Dtype::I16,
                Change::Remove => drop(tensors.remove(&key)),
            }
            let error = read(&tensors).expect_err(message).to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    enum Change {
        Truncate,
        Flip,
        Type,
        Remove,
    }
}
