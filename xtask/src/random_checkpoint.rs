//! Checkpoints with random weights.

use std::error::Error;
use std::path::Path;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rekindle_hub::{DEFAULT_MAX_SHARD_SIZE, Dtype, TensorSpec, write_atomic, write_f32, write_sharded};
use rekindle_models::{ModelConfig, ParameterSpec};
use serde_json::Value;

/// Writes `config.json` and weights into the existing directory `dir`: norms are 1, biases 0, and matrices normally
/// distributed with standard deviation 0.02.
pub(crate) fn write(dir: &Path, config: &Value, seed: u64) -> Result<(), Box<dyn Error>> {
    let model = ModelConfig::from_json(config).map_err(|problems| problems.join("; "))?;
    write_atomic(&dir.join("config.json"), format!("{config:#}\n").as_bytes())?;
    let tensors: Vec<_> =
        model.parameters().into_iter().map(|tensor| TensorSpec::new(tensor.name, Dtype::F32, tensor.shape)).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    write_sharded(dir, DEFAULT_MAX_SHARD_SIZE, &metadata, &tensors, |index, out| {
        let tensor = &tensors[index];
        let vector = tensor.shape.len() == 1;
        let constant = if tensor.name.ends_with(".bias") { 0.0 } else { 1.0 };
        for _ in 0..tensor.shape.iter().product::<usize>() {
            let value = if vector { constant } else { 0.02 * normal(&mut rng) };
            out.write_all(&value.to_le_bytes())?;
        }
        Ok(())
    })?;
    Ok(())
}

/// Writes `config.json` and 16-bit weights for a model of any size at the speed of the disk, with experts in MXFP4 if the
/// configuration says so. Matrices are slices of one table of normal numbers, which does not affect the time and memory of
/// their readers.
pub(crate) fn write_bf16(dir: &Path, config: &Value, seed: u64) -> Result<(), Box<dyn Error>> {
    const TABLE: usize = 1 << 22;
    let model = ModelConfig::from_json(config).map_err(|problems| problems.join("; "))?;
    write_atomic(&dir.join("config.json"), format!("{config:#}\n").as_bytes())?;
    let has_mxfp4 = config["quantization_config"]["quant_method"] == "mxfp4";
    let stored = |tensor: ParameterSpec| match tensor.shape[..] {
        [out, input] if has_mxfp4 && tensor.role.expert().is_some() => {
            let blocks = TensorSpec::new(format!("{}_blocks", tensor.name), Dtype::U8, vec![out, input / 32, 16]);
            let scales = TensorSpec::new(format!("{}_scales", tensor.name), Dtype::U8, vec![out, input / 32]);
            vec![blocks, scales]
        }
        _ => vec![TensorSpec::new(tensor.name, Dtype::BF16, tensor.shape)],
    };
    let tensors: Vec<_> = model.parameters().into_iter().flat_map(stored).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..TABLE).map(|_| 0.02 * normal(&mut rng)).collect();
    let mut table = Vec::with_capacity(2 * TABLE);
    write_f32(&mut table, Dtype::BF16, &values)?;
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    write_sharded(dir, DEFAULT_MAX_SHARD_SIZE, &metadata, &tensors, |index, out| {
        let tensor = &tensors[index];
        let elements = tensor.shape.iter().product::<usize>();
        if tensor.shape.len() == 1 {
            return write_f32(out, Dtype::BF16, &vec![1.0; elements]);
        }
        if tensor.name.ends_with("_scales") {
            // 2⁻⁷: values up to 6 · 2⁻⁷.
            return out.write_all(&vec![120; elements]);
        }
        let bytes = if tensor.dtype == Dtype::U8 { elements } else { 2 * elements };
        // Starts anywhere in the table and wraps around.
        let (mut at, mut left) = (2 * rng.random_range(0..TABLE), bytes);
        while left > 0 {
            let piece = left.min(table.len() - at);
            out.write_all(&table[at..at + piece])?;
            (at, left) = (0, left - piece);
        }
        Ok(())
    })?;
    Ok(())
}

/// Returns a standard normal number (Box–Muller).
fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let u: f64 = 1.0 - rng.random::<f64>();
    let v: f64 = rng.random();
    ((-2.0 * u.ln()).sqrt() * (core::f64::consts::TAU * v).cos()) as f32
}
