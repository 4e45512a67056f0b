//! Compares every format bit for bit with the output of bitsandbytes' CUDA backend for the same input.
//!
//! `goldens/make.py` wrote the files; `goldens/goldens.json` records the versions used. fp8 is compared with PyTorch's casts,
//! whose files `goldens/fp8.py` wrote.

use std::path::PathBuf;

use half::{bf16, f16};
use rekindle_quant::Dtype as StoredDtype;
use rekindle_quant::bnb::{FourBitWeight, RawTensor};
use rekindle_quant::int8::QuantizedActivations;
use rekindle_quant::{
    Absmax, Blocksize, DoubleQuant, DynamicMap, Element, Fp8Scaling, Fp8Tensor, Int8Tensor, QuantConfig, QuantType,
    QuantizedTensor, blockwise, four_bit,
};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

#[test]
fn four_bit_codes_and_scales_equal_bitsandbytes() {
    let file = Golden::open("four_bit");
    for case in file.cases() {
        match file.input_dtype(&case) {
            Dtype::F32 => four_bit_case::<f32>(&file, &case),
            Dtype::F16 => four_bit_case::<f16>(&file, &case),
            dtype => {
                assert_eq!(dtype, Dtype::BF16);
                four_bit_case::<bf16>(&file, &case);
            }
        }
    }
}

fn four_bit_case<T: GoldenElement>(file: &Golden, case: &Case) {
    let quant_type: QuantType = case.text("quant_type").parse().expect("a known type");
    let config = QuantConfig { quant_type, blocksize: case.blocksize(), double_quant: case.flag("double_quant") };
    let (shape, values) = file.input::<T>(case);
    let (codes, absmax) = four_bit::encode(&values, quant_type, config.blocksize);
    same_bytes(case, "packed", &codes, file.bytes(case, "packed"));

    let absmax = if config.double_quant {
        let offset = file.floats(case, "offset")[0];
        let ours = DoubleQuant::quantize(&absmax);
        let ulps = ours.offset().to_bits().abs_diff(offset.to_bits());
        assert!(ulps <= 2, "{}: offset {} differs from {offset} by {ulps} ulp", case.name(), ours.offset());
        let double = DoubleQuant::with_offset(&absmax, offset);
        same_bytes(case, "absmax", double.codes(), file.bytes(case, "absmax"));
        same_floats(case, "nested_absmax", double.nested_absmax(), &file.floats(case, "nested_absmax"));
        Absmax::Double(double)
    } else {
        same_floats(case, "absmax", &absmax, &file.floats(case, "absmax"));
        Absmax::Single(absmax)
    };
    let tensor = QuantizedTensor::from_parts(shape, T::DTYPE, quant_type, config.blocksize, codes, absmax)
        .expect("lengths match the shape");
    if file.has(case, "decoded") {
        same_elements(case, "decoded", &tensor.dequantize::<T>(), &file.elements::<T>(case, "decoded"));
    }
    round_trip(file, case, tensor);
}

/// Checks that the stored tensors read as `tensor` and are written back byte for byte.
fn round_trip(file: &Golden, case: &Case, tensor: QuantizedTensor) {
    let storage = match case.text("quant_storage") {
        "uint8" => StoredDtype::U8,
        "float16" => StoredDtype::F16,
        "bfloat16" => StoredDtype::BF16,
        other => {
            assert_eq!(other, "float32");
            StoredDtype::F32
        }
    };
    let packed_shape = case.shape("packed_shape");
    let find = |key: &str| {
        if key == "w" {
            let bytes = file.bytes(case, "packed").into();
            return Some(RawTensor { dtype: storage, shape: packed_shape.clone(), bytes });
        }
        let (name, field) = match key.strip_prefix("w.")? {
            "nested_quant_map" => ("nested_quant_map".to_owned(), ""),
            state if state.starts_with("quant_state.") => {
                if !state.ends_with(case.text("quant_type")) {
                    return None;
                }
                (format!("{}.quant_state", case.name()), "")
            }
            field => (format!("{}.", case.name()), field),
        };
        let view = file.tensors().tensor(&format!("{name}{field}")).ok()?;
        let dtype = if view.dtype() == Dtype::U8 { StoredDtype::U8 } else { StoredDtype::F32 };
        Some(RawTensor { dtype, shape: view.shape().to_vec(), bytes: view.data().to_vec().into() })
    };
    let weight = FourBitWeight::read("w", find).expect("readable").expect("present");
    // Compares bytes, because a scale can be infinite and a decoded scale NaN.
    assert_eq!(weight.tensor.codes(), tensor.codes(), "{}", case.name());
    assert_eq!(weight.tensor.shape(), tensor.shape(), "{}", case.name());
    assert_eq!(weight.tensor.config(), tensor.config(), "{}", case.name());
    for (suffix, written) in weight.write() {
        assert_eq!(Some(written), find(&format!("w{suffix}")), "{} {suffix}", case.name());
    }
}

#[test]
fn dynamic_maps_codes_and_scales_equal_bitsandbytes() {
    let file = Golden::open("dynamic");
    let maps = [("signed", DynamicMap::signed()), ("unsigned", DynamicMap::unsigned())];
    for (name, map) in &maps {
        let view = file.tensors().tensor(&format!("map.{name}")).expect("both maps are stored");
        let stored: Vec<f32> = view.data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
        assert_eq!(map.values()[..], stored, "{name} map");
    }
    for case in file.cases() {
        let map = &maps.iter().find(|(name, _)| *name == case.text("map")).expect("a known map").1;
        match file.input_dtype(&case) {
            Dtype::F32 => dynamic_case::<f32>(&file, &case, map),
            Dtype::F16 => dynamic_case::<f16>(&file, &case, map),
            dtype => {
                assert_eq!(dtype, Dtype::BF16);
                dynamic_case::<bf16>(&file, &case, map);
            }
        }
    }
}

fn dynamic_case<T: GoldenElement>(file: &Golden, case: &Case, map: &DynamicMap) {
    let (_, values) = file.input::<T>(case);
    let (codes, absmax) = blockwise::encode(&values, map, case.blocksize());
    same_bytes(case, "codes", &codes, file.bytes(case, "codes"));
    same_floats(case, "absmax", &absmax, &file.floats(case, "absmax"));
    if file.has(case, "decoded") {
        let mut decoded = vec![T::default(); values.len()];
        blockwise::decode(&codes, &absmax, map, case.blocksize(), &mut decoded);
        same_elements(case, "decoded", &decoded, &file.elements::<T>(case, "decoded"));
    }
}

#[test]
fn int8_codes_and_scales_equal_bitsandbytes() {
    let file = Golden::open("int8");
    for case in file.cases() {
        match file.input_dtype(&case) {
            Dtype::F32 => int8_case::<f32>(&file, &case),
            Dtype::F16 => int8_case::<f16>(&file, &case),
            dtype => {
                assert_eq!(dtype, Dtype::BF16);
                int8_case::<bf16>(&file, &case);
            }
        }
    }
}

fn int8_case<T: GoldenElement>(file: &Golden, case: &Case) {
    let (shape, values) = file.input::<T>(case);
    let tensor = Int8Tensor::quantize(&values, [shape[0], shape[1]]).expect("shape fits");
    let codes: Vec<u8> = tensor.codes().iter().map(|&code| code as u8).collect();
    same_bytes(case, "codes", &codes, file.bytes(case, "codes"));
    same_floats(case, "SCB", tensor.scb(), &file.floats(case, "SCB"));
    if file.has(case, "decoded") {
        same_elements(case, "decoded", &tensor.dequantize::<f32>(), &file.elements::<f32>(case, "decoded"));
    }
}

/// PyTorch's casts, instead of bitsandbytes.
#[test]
fn fp8_codes_and_values_equal_pytorch() {
    let file = Golden::at("fp8", "fp8.json");
    let mut cases = 0;
    for case in file.cases() {
        cases += 1;
        match file.input_dtype(&case) {
            Dtype::F32 => fp8_case::<f32>(&file, &case),
            Dtype::F16 => fp8_case::<f16>(&file, &case),
            _ => fp8_case::<bf16>(&file, &case),
        }
    }
    assert_eq!(cases, 35);
}

fn fp8_case<T: GoldenElement>(file: &Golden, case: &Case) {
    let scaling = match case.text("scaling") {
        "tensor" => Fp8Scaling::Tensor,
        "row" => Fp8Scaling::Row,
        _ => Fp8Scaling::Block,
    };
    let (shape, values) = file.input::<T>(case);
    let shape = [shape[0], shape[1]];
    let fp8 = Fp8Tensor::quantize(&values, shape, scaling).expect("the values are finite");
    same_floats(case, "scales", fp8.scales(), &file.floats(case, "scales"));
    same_bytes(case, "codes", fp8.codes(), file.bytes(case, "codes"));
    same_elements(case, "decoded", &fp8.dequantize::<T>(), &file.elements::<T>(case, "decoded"));
    let bytes: Vec<u8> = file.input_view(case).data().to_vec();
    let read = Fp8Tensor::quantize_le_bytes(&bytes, T::DTYPE, shape, scaling);
    assert_eq!(read, Ok(fp8));
}

#[test]
fn int8_activations_and_products_equal_bitsandbytes() {
    let file = Golden::open("int8_matmul");
    for case in file.cases() {
        match file.input_dtype(&case) {
            Dtype::F32 => int8_matmul_case::<f32>(&file, &case),
            Dtype::F16 => int8_matmul_case::<f16>(&file, &case),
            dtype => {
                assert_eq!(dtype, Dtype::BF16);
                int8_matmul_case::<bf16>(&file, &case);
            }
        }
    }
}

fn int8_matmul_case<T: GoldenElement>(file: &Golden, case: &Case) {
    let (shape, x) = file.input::<T>(case);
    let threshold = case.0["threshold"].as_f64().expect("a threshold") as f32;
    let quantized = QuantizedActivations::quantize(&x, shape[1], threshold);
    let codes: Vec<u8> = quantized.codes().iter().map(|&code| code as u8).collect();
    same_bytes(case, "CA", &codes, file.bytes(case, "CA"));
    same_floats(case, "SCA", quantized.sca(), &file.floats(case, "SCA"));
    if file.has(case, "columns") {
        let columns = file.bytes(case, "columns").as_chunks().0.iter().map(|&b| i64::from_le_bytes(b) as usize);
        assert_eq!(quantized.outlier_columns(), columns.collect::<Vec<_>>(), "{}", case.name());
    }
    if !file.has(case, "out") {
        return;
    }
    let scb = file.floats(case, "SCB");
    let codes = file.bytes(case, "CB").iter().map(|&byte| byte as i8).collect();
    let weight = Int8Tensor::from_parts([scb.len(), shape[1]], codes, scb).expect("lengths match");
    let mut out = vec![T::default(); shape[0] * weight.shape()[0]];
    weight.matmul(&x, threshold, &mut out);
    // Holds with outliers too: cuBLAS sums them in its own order, but its f32 sum rounds to the same bits.
    same_elements(case, "out", &out, &file.elements::<T>(case, "out"));
}

fn same_bytes(case: &Case, field: &str, ours: &[u8], theirs: &[u8]) {
    assert_eq!(ours.len(), theirs.len(), "{} {field}: length", case.name());
    let differing: Vec<_> = (0..ours.len()).filter(|&i| ours[i] != theirs[i]).collect();
    if let Some(&first) = differing.first() {
        panic!(
            "{} {field}: {} of {} bytes differ, first at {first}: {:#04x}, bitsandbytes has {:#04x}",
            case.name(),
            differing.len(),
            ours.len(),
            ours[first],
            theirs[first]
        );
    }
}

fn same_floats(case: &Case, field: &str, ours: &[f32], theirs: &[f32]) {
    assert_eq!(ours.len(), theirs.len(), "{} {field}: length", case.name());
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!(a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan(), "{} {field}[{i}]: {a} is not {b}", case.name());
    }
}

fn same_elements<T: GoldenElement>(case: &Case, field: &str, ours: &[T], theirs: &[T]) {
    same_floats(case, field, &wide(ours), &wide(theirs));
}

fn wide<T: GoldenElement>(values: &[T]) -> Vec<f32> {
    let mut wide = vec![0.0; values.len()];
    T::to_f32_slice(values, &mut wide);
    wide
}

/// A golden file.
struct Golden {
    name: &'static str,
    index: &'static str,
    bytes: Vec<u8>,
}

struct Case(Value);

trait GoldenElement: Element {
    fn from_bytes(bytes: &[u8]) -> Vec<Self>;
}

impl GoldenElement for f32 {
    fn from_bytes(bytes: &[u8]) -> Vec<Self> {
        bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
    }
}

impl GoldenElement for f16 {
    fn from_bytes(bytes: &[u8]) -> Vec<Self> {
        bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b)).collect()
    }
}

impl GoldenElement for bf16 {
    fn from_bytes(bytes: &[u8]) -> Vec<Self> {
        bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b)).collect()
    }
}

impl Golden {
    fn open(name: &'static str) -> Self {
        Self::at(name, "goldens.json")
    }

    /// The file of this name, whose cases are in `index`.
    fn at(name: &'static str, index: &'static str) -> Self {
        let path = folder().join(format!("{name}.safetensors"));
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self { name, index, bytes }
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).expect("a safetensors file")
    }

    fn cases(&self) -> Vec<Case> {
        let path = folder().join(self.index);
        let json = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let index: Value = serde_json::from_str(&json).expect("JSON");
        let cases = index[self.name].as_array().expect("a list of cases");
        assert!(!cases.is_empty(), "no cases of {}", self.name);
        cases.iter().cloned().map(Case).collect()
    }

    fn view(&self, case: &Case, field: &str) -> Option<safetensors::tensor::TensorView<'_>> {
        let tensors = SafeTensors::deserialize(&self.bytes).expect("a safetensors file");
        tensors.tensor(&format!("{}.{field}", case.name())).ok()
    }

    fn has(&self, case: &Case, field: &str) -> bool {
        self.view(case, field).is_some()
    }

    fn bytes(&self, case: &Case, field: &str) -> &[u8] {
        self.view(case, field).unwrap_or_else(|| panic!("{} has no {field}", case.name())).data()
    }

    fn floats(&self, case: &Case, field: &str) -> Vec<f32> {
        self.elements(case, field)
    }

    fn elements<T: GoldenElement>(&self, case: &Case, field: &str) -> Vec<T> {
        T::from_bytes(self.bytes(case, field))
    }

    fn input_view(&self, case: &Case) -> safetensors::tensor::TensorView<'_> {
        let tensors = SafeTensors::deserialize(&self.bytes).expect("a safetensors file");
        tensors.tensor(&format!("input.{}", case.text("input"))).expect("inputs are stored")
    }

    fn input_dtype(&self, case: &Case) -> Dtype {
        self.input_view(case).dtype()
    }

    fn input<T: GoldenElement>(&self, case: &Case) -> (Vec<usize>, Vec<T>) {
        let view = self.input_view(case);
        (view.shape().to_vec(), T::from_bytes(view.data()))
    }
}

impl Case {
    fn name(&self) -> &str {
        self.text("name")
    }

    fn text(&self, key: &str) -> &str {
        self.0[key].as_str().unwrap_or_else(|| panic!("case {} has no text {key}", self.0))
    }

    fn flag(&self, key: &str) -> bool {
        self.0[key].as_bool().unwrap_or_else(|| panic!("case {} has no flag {key}", self.0))
    }

    fn blocksize(&self) -> Blocksize {
        let size = self.0["blocksize"].as_u64().unwrap_or_else(|| panic!("case {} has no blocksize", self.0));
        Blocksize::try_from(size).expect("supported")
    }

    fn shape(&self, key: &str) -> Vec<usize> {
        let sizes = self.0[key].as_array().unwrap_or_else(|| panic!("case {} has no {key}", self.0));
        sizes.iter().map(|size| size.as_u64().expect("a size") as usize).collect()
    }
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("goldens")
}
