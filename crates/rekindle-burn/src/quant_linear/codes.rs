//! The codes of a quantized weight as a module.

use std::sync::Arc;

use burn::module::{
    Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor, Param, ParamId,
};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use rekindle_kernels::QuantizedWeight;
use rekindle_kernels::quantized::{Absmax, QuantizedData, QuantizedFormat};

use crate::device::{burn, operations_on};

/// The codes and scales of a quantized weight `[out, in]`.
///
/// Records hold them as bytes: `codes`, `scales` and, with double quantization, `nested`. They are read and written as
/// lazily initialized integer parameters, so that visiting or mapping a network copies them only where they are asked for.
#[derive(Clone, Debug)]
pub struct QuantizedCodes {
    weight: QuantizedWeight,
    device: Device,
    ids: [ParamId; 3],
}

/// The parts of a weight in a record.
const PARTS: [&str; 3] = ["codes", "scales", "nested"];

/// The name of this module in the paths of visitors.
const CONTAINER: &str = "Struct:QuantizedCodes";

impl QuantizedCodes {
    pub(super) fn new(codes: QuantizedData, device: &Device) -> Self {
        let ids = core::array::from_fn(|_| ParamId::new());
        Self { weight: on_device(codes, device), device: device.clone(), ids }
    }

    /// Returns the weight for products.
    pub(crate) fn weight(&self) -> &QuantizedWeight {
        &self.weight
    }

    /// Returns the weight decoded and transposed, `[in, out]`, on a device without autodiff.
    pub(crate) fn dequantize(&self) -> Tensor<2> {
        burn(self.weight.decode(DType::F32)).transpose()
    }

    /// The parts that the format has, as parameters on the CPU that hold nothing until they are read.
    fn params(&self) -> impl Iterator<Item = (usize, Param<Tensor<1, Int>>)> + '_ {
        let data = self.weight.data();
        (0..PARTS.len()).filter_map(move |part| {
            let length = part_len(&data, part)?;
            let weight = self.weight.clone();
            let init = move |device: &Device, _: bool| {
                let bytes = part_bytes(&weight.data(), part);
                Tensor::from_data(TensorData::new(bytes, [length]), (device, DType::U8))
            };
            Some((part, Param::uninitialized(self.ids[part], init, Device::flex(), false, [length].into())))
        })
    }

    fn moved(self, device: &Device) -> Self {
        if self.device == *device {
            return Self { device: device.clone(), ..self };
        }
        let data = Arc::unwrap_or_clone(self.weight.data());
        Self { weight: on_device(data, device), device: device.clone(), ids: self.ids }
    }
}

fn on_device(codes: QuantizedData, device: &Device) -> QuantizedWeight {
    QuantizedWeight::new(codes, &operations_on(device))
}

/// The bytes of a part, or `None` for one that the format does not have.
fn part_len(data: &QuantizedData, part: usize) -> Option<usize> {
    match (&data.format, part) {
        (QuantizedFormat::FourBit { codes, .. }, 0) => Some(codes.len()),
        (QuantizedFormat::FourBit { absmax: Absmax::Single(absmax), .. }, 1) => Some(4 * absmax.len()),
        (QuantizedFormat::FourBit { absmax: Absmax::Double { codes, .. }, .. }, 1) => Some(codes.len()),
        (QuantizedFormat::FourBit { absmax: Absmax::Double { map, nested, offsets, .. }, .. }, 2) => {
            Some(4 * (map.len() + nested.len() + offsets.len()))
        }
        (QuantizedFormat::Int8 { codes, .. }, 0) => Some(codes.len()),
        (QuantizedFormat::Int8 { scales, .. } | QuantizedFormat::Fp8 { scales, .. }, 1) => Some(4 * scales.len()),
        (QuantizedFormat::Fp8 { codes, .. }, 0) => Some(codes.len()),
        (QuantizedFormat::Blocks { bytes, .. }, 0) => Some(bytes.len()),
        _ => None,
    }
}

fn part_bytes(data: &QuantizedData, part: usize) -> Vec<u8> {
    let floats = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    match (&data.format, part) {
        (QuantizedFormat::FourBit { codes, .. }, 0) => codes.clone(),
        (QuantizedFormat::FourBit { absmax: Absmax::Single(absmax), .. }, 1) => floats(absmax),
        (QuantizedFormat::FourBit { absmax: Absmax::Double { codes, .. }, .. }, 1) => codes.clone(),
        (QuantizedFormat::FourBit { absmax: Absmax::Double { map, nested, offsets, .. }, .. }, 2) => {
            floats(&[&map[..], nested, offsets].concat())
        }
        (QuantizedFormat::Int8 { codes, .. }, 0) => codes.iter().map(|code| code.cast_unsigned()).collect(),
        (QuantizedFormat::Int8 { scales, .. } | QuantizedFormat::Fp8 { scales, .. }, 1) => floats(scales),
        (QuantizedFormat::Fp8 { codes, .. }, 0) => codes.clone(),
        (QuantizedFormat::Blocks { bytes, .. }, 0) => bytes.clone(),
        _ => Vec::new(),
    }
}

/// Replaces a part by bytes of the same length.
fn set_part(data: &mut QuantizedData, part: usize, bytes: Vec<u8>) {
    assert_eq!(Some(bytes.len()), part_len(data, part), "bytes of {} in a quantized weight", PARTS[part]);
    let floats = |bytes: &[u8]| -> Vec<f32> {
        bytes.as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value)).collect()
    };
    match (&mut data.format, part) {
        (QuantizedFormat::FourBit { codes, .. }, 0) => *codes = bytes,
        (QuantizedFormat::FourBit { absmax: Absmax::Single(absmax), .. }, 1) => *absmax = floats(&bytes),
        (QuantizedFormat::FourBit { absmax: Absmax::Double { codes, .. }, .. }, 1) => *codes = bytes,
        (QuantizedFormat::FourBit { absmax: Absmax::Double { map, nested, offsets, .. }, .. }, 2) => {
            let values = floats(&bytes);
            let (of_map, rest) = values.split_at(map.len());
            let (of_nested, of_offsets) = rest.split_at(nested.len());
            map.copy_from_slice(of_map);
            nested.copy_from_slice(of_nested);
            offsets.copy_from_slice(of_offsets);
        }
        (QuantizedFormat::Int8 { codes, .. }, 0) => *codes = bytes.into_iter().map(u8::cast_signed).collect(),
        (QuantizedFormat::Int8 { scales, .. } | QuantizedFormat::Fp8 { scales, .. }, 1) => *scales = floats(&bytes),
        (QuantizedFormat::Fp8 { codes, .. }, 0) => *codes = bytes,
        (QuantizedFormat::Blocks { bytes: blocks, .. }, 0) => *blocks = bytes,
        _ => unreachable!("a part with a length is one of the above"),
    }
}

impl Module for QuantizedCodes {
    fn collect_devices(&self, mut devices: Devices) -> Devices {
        if !devices.contains(&self.device) {
            devices.push(self.device.clone());
        }
        devices
    }

    fn fork(self, device: &Device) -> Self {
        self.moved(device)
    }

    fn to_device(self, device: &Device) -> Self {
        self.moved(device)
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        for (part, param) in self.params() {
            visitor.enter_module(PARTS[part], CONTAINER);
            visitor.visit_int(&param);
            visitor.exit_module(PARTS[part], CONTAINER);
        }
    }

    fn map<M: ModuleMapper>(mut self, mapper: &mut M) -> Self {
        let mut changed: Option<QuantizedData> = None;
        let params: Vec<_> = self.params().collect();
        for (part, param) in params {
            mapper.enter_module(PARTS[part], CONTAINER);
            let param = mapper.map_int(param);
            mapper.exit_module(PARTS[part], CONTAINER);
            self.ids[part] = param.id;
            // A mapper that did not read the parameter did not change it.
            if param.is_initialized() {
                let bytes = param.val().into_data_as::<u8>().try_into_vec().expect("cast to u8 just before");
                let data = changed.get_or_insert_with(|| Arc::unwrap_or_clone(self.weight.data()));
                set_part(data, part, bytes);
            }
        }
        if let Some(data) = changed {
            self.weight = on_device(data, &self.device);
        }
        self
    }

    fn train(self) -> Self {
        self
    }

    fn valid(&self) -> Self {
        self.clone()
    }

    fn materialize(self) -> Self {
        self
    }
}

impl ModuleDisplayDefault for QuantizedCodes {
    fn content(&self, content: Content) -> Option<Content> {
        let [out, input] = self.weight.dims();
        let format = match &self.weight.data().format {
            QuantizedFormat::FourBit { .. } => "4 bits",
            QuantizedFormat::Int8 { .. } => "8 bits",
            QuantizedFormat::Fp8 { .. } => "fp8",
            QuantizedFormat::Blocks { codec, .. } => codec.name,
        };
        content.add_formatted(&format!("{input} x {out} in {format}")).optional()
    }
}

impl ModuleDisplay for QuantizedCodes {}
