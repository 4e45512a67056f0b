//! Fuzz tests of the readers of quantization metadata. Damaged input must give an error or a value, never a panic, and
//! must not use more memory than the input justifies.
//!
//! The damage comes from a seeded generator, so a reported case can be reproduced.

use std::alloc::{GlobalAlloc, Layout, System};
use std::borrow::Cow;
use std::cell::Cell;

use rekindle_quant::bnb::{FourBitWeight, QuantizationConfig, RawTensor, StoredWeight, read_int8, write_int8};
use rekindle_quant::{
    Blocksize, Dtype, Fp8Scaling, Fp8Tensor, Fp8Weight, Int8Tensor, QuantConfig, QuantFormat, QuantType,
    QuantizedTensor,
};

/// Number of damaged inputs per reader.
const CASES: u64 = 20_000;

#[test]
fn damaged_four_bit_weights() {
    let seeds: Vec<Checkpoint> = QuantType::ALL
        .into_iter()
        .flat_map(|quant_type| [false, true].map(|double_quant| (quant_type, double_quant)))
        .map(|(quant_type, double_quant)| {
            let config = QuantConfig { quant_type, blocksize: Blocksize::ALL[0], double_quant };
            let tensor = QuantizedTensor::quantize(&weights(35 * 17), &[35, 17], &config).expect("shape fits");
            FourBitWeight::new(tensor)
                .write()
                .into_iter()
                .map(|(suffix, raw)| (format!("w{suffix}"), owned(raw)))
                .collect()
        })
        .collect();
    let mut accepted = 0;
    damaged(&seeds, |checkpoint| {
        let read = FourBitWeight::read("w", |key| find(checkpoint, key));
        if let Ok(Some(weight)) = read {
            accepted += 1;
            // An accepted weight can be decoded and is written back unchanged, except that the code table is compared
            // by value, where -0 equals 0.
            assert_eq!(weight.tensor.dequantize::<f32>().len(), weight.tensor.elements());
            for (suffix, raw) in weight.write() {
                if !suffix.contains("quant_state") && suffix != ".quant_map" {
                    assert_eq!(find(checkpoint, &format!("w{suffix}")).map(|raw| raw.bytes), Some(raw.bytes));
                }
            }
        }
    });
    assert!(accepted > CASES / 10, "only {accepted} were accepted");
}

#[test]
fn damaged_int8_weights() {
    let tensor = Int8Tensor::quantize(&weights(11 * 23), [11, 23]).expect("shape fits");
    let seed = write_int8(&tensor).into_iter().map(|(suffix, raw)| (format!("w{suffix}"), owned(raw))).collect();
    let mut accepted = 0;
    damaged(&[seed], |checkpoint| {
        if let Ok(Some(tensor)) = read_int8("w", |key| find(checkpoint, key)) {
            accepted += 1;
            assert_eq!(tensor.dequantize::<f32>().len(), tensor.codes().len());
        }
        let either = StoredWeight::read("w.weight", |key| find(checkpoint, key));
        assert!(either.is_err() || either.is_ok_and(|weight| weight.is_none_or(|weight| !weight.shape().is_empty())));
    });
    assert!(accepted > CASES / 10, "only {accepted} were accepted");
}

#[test]
fn damaged_fp8_weights() {
    let seeds = [Fp8Scaling::Tensor, Fp8Scaling::Row, Fp8Scaling::Block].map(|scaling| {
        let tensor = Fp8Tensor::quantize(&weights(130 * 9), [130, 9], scaling).expect("shape fits");
        let mut tensors: Checkpoint =
            Fp8Weight::new(tensor).write("w.weight").into_iter().map(|(key, raw)| (key, owned(raw))).collect();
        let unused = RawTensor { dtype: Dtype::F32, shape: vec![1], bytes: Cow::Owned(vec![0; 4]) };
        tensors.push(("w.input_scale".to_owned(), unused));
        tensors
    });
    let mut accepted = 0;
    damaged(&seeds, |checkpoint| {
        if let Ok(Some(weight)) = Fp8Weight::read("w.weight", |key| find(checkpoint, key)) {
            accepted += 1;
            assert!(weight.tensor.dequantize::<f32>().iter().all(|value| !value.is_nan()));
            for (key, raw) in weight.write("w.weight") {
                assert_eq!(find(checkpoint, &key), Some(raw), "{key}");
            }
        }
    });
    assert!(accepted > CASES / 10, "only {accepted} were accepted");
}

/// Damages the text of `quantization_config` both as bytes and as JSON.
#[test]
fn damaged_quantization_configs() {
    let skip = ["lm_head", "model.layers.1", r"model\.layers\.\d+\.mlp"].map(str::to_owned).to_vec();
    let four_bit = QuantFormat::FourBit(QuantConfig::default());
    let dtype = Dtype::BF16;
    let fp8 = QuantFormat::Fp8(Fp8Scaling::Block);
    let fine_grained = r#"{"activation_scheme":"dynamic","modules_to_not_convert":["lm_head","model.layers.1"],"quant_method":"fp8","weight_block_size":[128,128]}"#;
    let seeds = [(four_bit, Some(skip)), (QuantFormat::Int8, None), (fp8, None)];
    let seeds = seeds.map(|(format, skip)| QuantizationConfig::new(format, dtype, skip));
    let mut seeds = seeds.map(|config| config.to_json().to_string().into_bytes()).to_vec();
    seeds.push(fine_grained.as_bytes().to_vec());
    let mut accepted = 0;
    for case in 0..2 * CASES {
        let mut random = Random::new(case);
        let mut text = seeds[random.below(seeds.len())].clone();
        for _ in 0..=random.below(3) {
            damage_json(&mut text, &mut random);
        }
        let Ok(value) = serde_json::from_slice(&text) else { continue };
        let (read, memory) = measured(|| QuantizationConfig::parse(&value));
        // Keys and values are kept for writing; serde_json's map uses about 100 bytes for an entry of 5.
        let justified = 8192 + 64 * text.len();
        assert!(memory <= justified, "case {case}: {memory} bytes for {} of text", text.len());
        if let Ok(config) = read {
            accepted += 1;
            assert_eq!(config.to_json(), value, "case {case}");
            config.skips("model.layers.11.mlp.up_proj");
        }
    }
    assert!(accepted > CASES / 20, "only {accepted} were accepted");
}

#[test]
fn the_allocator_counts_memory() {
    assert_eq!(measured(|| drop(vec![0u8; 1000])).1, 1000);
    assert_eq!(measured(|| (vec![0u8; 1000], Box::new(7u64))).1, 1008);
}

type Checkpoint = Vec<(String, RawTensor<'static>)>;

/// Calls `read` with checkpoints that have one to three faults each.
fn damaged(seeds: &[Checkpoint], mut read: impl FnMut(&Checkpoint)) {
    for case in 0..CASES {
        let mut random = Random::new(case);
        let mut checkpoint = seeds[random.below(seeds.len())].clone();
        for _ in 0..=random.below(3) {
            damage(&mut checkpoint, &mut random);
        }
        let bytes: usize = checkpoint.iter().map(|(key, raw)| key.len() + raw.bytes.len() + 8 * raw.shape.len()).sum();
        let ((), memory) = measured(|| read(&checkpoint));
        // A byte holds two codes, which decode to 8 bytes; the rest is for copies and messages.
        let justified = 16_384 + 12 * bytes;
        assert!(memory <= justified, "case {case}: {memory} bytes for {bytes} of tensors");
    }
}

fn damage(checkpoint: &mut Checkpoint, random: &mut Random) {
    let at = random.below(checkpoint.len());
    let other = checkpoint[random.below(checkpoint.len())].1.clone();
    let several = checkpoint.len() > 1;
    let (key, raw) = &mut checkpoint[at];
    let bytes = raw.bytes.to_mut();
    match random.below(10) {
        0 | 1 if !bytes.is_empty() => {
            let at = random.below(bytes.len());
            bytes[at] ^= 1 << random.below(8);
        }
        2 => bytes.truncate(random.below(bytes.len() + 1)),
        3 => bytes.extend(std::iter::repeat_n(random.next() as u8, random.below(64))),
        4 => raw.dtype = Dtype::ALL[random.below(Dtype::ALL.len())],
        5 => raw.shape = (0..random.below(4)).map(|_| ABSURD_SIZES[random.below(ABSURD_SIZES.len())]).collect(),
        6 => raw.shape.reverse(),
        7 => *raw = other,
        8 if several && random.below(8) == 0 => drop(checkpoint.remove(at)),
        _ if key.contains("quant_state") => damage_json(bytes, random),
        _ => {}
    }
}

const ABSURD_SIZES: [usize; 7] = [0, 1, 2, 595, 1 << 32, usize::MAX / 2, usize::MAX];

/// Invalid values: out of range for integers and floats, of the wrong type, or deeply nested.
const ABSURD_JSON: [&str; 16] = [
    "0",
    "-1",
    "3",
    "64",
    "1e999",
    "1e308",
    "-0.0",
    "18446744073709551615",
    "99999999999999999999999999",
    "null",
    "true",
    "\"\"",
    "\"nf4\"",
    "[]",
    "{}",
    "[9223372036854775807, 9223372036854775807, 4]",
];

fn damage_json(text: &mut Vec<u8>, random: &mut Random) {
    let at = random.below(text.len() + 1);
    match random.below(6) {
        // Replaces the value after a colon, or the whole text.
        0..=2 => {
            let colons: Vec<usize> = (0..text.len()).filter(|&i| text[i] == b':').collect();
            let absurd = ABSURD_JSON[random.below(ABSURD_JSON.len())].as_bytes();
            let Some(&colon) = colons.get(random.below(colons.len().max(1))) else { return };
            let value = colon + 1;
            let list = text[value..].iter().take_while(|&&byte| byte == b' ').count();
            let end = if text.get(value + list) == Some(&b'[') { b"]}" } else { b",}" };
            let len = text[value..].iter().position(|byte| end.contains(byte)).unwrap_or(0);
            let len = if end[0] == b']' { (len + 1).min(text.len() - value) } else { len };
            text.splice(value..value + len, absurd.iter().copied());
        }
        3 if at < text.len() => text[at] = random.next() as u8,
        4 => text.truncate(at),
        _ => {
            let depth = random.below(200);
            let nested = [b"[".repeat(depth), b"]".repeat(depth)].concat();
            text.splice(at..at, nested);
        }
    }
}

fn find<'a>(checkpoint: &'a Checkpoint, key: &str) -> Option<RawTensor<'a>> {
    let (_, raw) = checkpoint.iter().find(|(k, _)| k == key)?;
    Some(RawTensor { dtype: raw.dtype, shape: raw.shape.clone(), bytes: Cow::Borrowed(&raw.bytes) })
}

fn owned(raw: RawTensor<'_>) -> RawTensor<'static> {
    RawTensor { dtype: raw.dtype, shape: raw.shape, bytes: Cow::Owned(raw.bytes.into_owned()) }
}

fn weights(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * 0.7).sin() * 0.03).collect()
}

struct Random(u64);

impl Random {
    fn new(case: u64) -> Self {
        let mut random = Self(case.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15));
        random.next();
        random
    }

    /// Returns the next number of xorshift64*.
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

/// Returns the result of `work` and its peak memory on this thread.
fn measured<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = HELD.get();
    MOST.set(before);
    let result = work();
    (result, MOST.get().saturating_sub(before))
}

thread_local! {
    static HELD: Cell<usize> = const { Cell::new(0) };
    static MOST: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[expect(unsafe_code, reason = "the trait is unsafe; every call is forwarded unchanged to the system allocator")]
// SAFETY: every call is forwarded unchanged to `System`.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.get().saturating_add(layout.size());
        HELD.set(held);
        MOST.set(MOST.get().max(held));
        // SAFETY: guaranteed by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.set(HELD.get().saturating_sub(layout.size()));
        // SAFETY: guaranteed by the caller.
        unsafe { System.dealloc(pointer, layout) }
    }
}
