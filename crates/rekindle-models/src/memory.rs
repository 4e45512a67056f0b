//! The size of a model's weights by class, in memory or in a checkpoint.

use core::fmt;

use rekindle_hub::{CheckpointHeaders, Dtype};
use rekindle_kernels::Weight;
use rekindle_quant::bnb;
use serde::Serialize;

use crate::checkpoint::checkpoint_headers;
use crate::parameters::{LayerRole, Parameter};
use crate::{CausalLm, ModelConfig, Role};

/// A kind of weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryClass {
    /// Quantized data of linears.
    PackedCodes,
    /// Scales of quantized linears, with the code tables and metadata of a file.
    Scales,
    /// Linears of the blocks that are not quantized, without those of experts.
    DenseLinears,
    /// Experts that are not quantized.
    DenseExperts,
    /// The embedding table and the output layer.
    EmbeddingsAndHead,
    /// Vectors.
    NormsAndBiases,
    /// Trainable factors of adapters.
    Adapter,
}

impl MemoryClass {
    const ALL: [Self; 7] = [
        Self::PackedCodes,
        Self::Scales,
        Self::DenseLinears,
        Self::DenseExperts,
        Self::EmbeddingsAndHead,
        Self::NormsAndBiases,
        Self::Adapter,
    ];

    fn label(self) -> &'static str {
        match self {
            Self::PackedCodes => "packed codes",
            Self::Scales => "scales",
            Self::DenseLinears => "dense linears",
            Self::DenseExperts => "dense experts",
            Self::EmbeddingsAndHead => "embeddings and head",
            Self::NormsAndBiases => "norms and biases",
            Self::Adapter => "adapter",
        }
    }

    /// The class of a dense tensor of the model.
    fn of(role: Role) -> Self {
        match role {
            _ if role.is_vocabulary() => Self::EmbeddingsAndHead,
            Role::Layer(_, LayerRole::Expert(..) | LayerRole::Experts(_)) => Self::DenseExperts,
            _ if role.is_linear() => Self::DenseLinears,
            _ => Self::NormsAndBiases,
        }
    }
}

/// One line of a [`MemoryReport`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryLine {
    /// The class.
    pub class: MemoryClass,
    /// The number of the model's scalars; 0 for scales, which belong to counted weights.
    pub weights: u64,
    /// The size in bytes.
    pub bytes: u64,
}

/// Bytes of a model's weights, by class; empty classes are omitted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MemoryReport {
    /// The lines, in the order of [`MemoryClass`].
    pub lines: Vec<MemoryLine>,
}

impl MemoryReport {
    /// Returns the sizes of a checkpoint's tensors on disk.
    pub fn of_headers(headers: &CheckpointHeaders, config: &ModelConfig) -> Self {
        let mut report = Self::default();
        let tensors = checkpoint_headers(headers, config);
        let owners: std::collections::BTreeSet<String> = tensors.keys().filter_map(|name| bnb::owner(name)).collect();
        for needed in config.parameters() {
            let Some(tensor) = tensors.get(&needed.name) else { continue };
            let is_blocks = matches!(tensor.dtype, Dtype::Blocks(_)) && needed.role.is_linear();
            let quantized = is_blocks || owners.contains(&needed.name);
            let class = if quantized { MemoryClass::PackedCodes } else { MemoryClass::of(needed.role) };
            report.add(class, needed.numel(), tensor.bytes as usize);
        }
        for (_, tensor) in tensors.iter().filter(|(name, _)| bnb::owner(name).is_some()) {
            report.add(MemoryClass::Scales, 0, tensor.bytes as usize);
        }
        report
    }

    /// Returns the total size in bytes.
    pub fn bytes(&self) -> u64 {
        self.lines.iter().map(|line| line.bytes).sum()
    }

    /// Returns the total number of scalars.
    pub fn weights(&self) -> u64 {
        self.lines.iter().map(|line| line.weights).sum()
    }

    /// Returns the bits per quantized weight, scales included, or `None` if nothing is quantized.
    pub fn bits_per_quantized_weight(&self) -> Option<f64> {
        let codes = self.line(MemoryClass::PackedCodes)?;
        let scales = self.line(MemoryClass::Scales).map_or(0, |line| line.bytes);
        Some(8.0 * (codes.bytes + scales) as f64 / codes.weights as f64)
    }

    /// Returns the fraction of a 16-bit model's bytes that is saved; negative for wider weights.
    pub fn saving(&self) -> f64 {
        1.0 - self.bytes() as f64 / (2.0 * self.weights() as f64)
    }

    /// Returns the line of a class.
    pub fn line(&self, class: MemoryClass) -> Option<&MemoryLine> {
        self.lines.iter().find(|line| line.class == class)
    }

    fn add(&mut self, class: MemoryClass, weights: usize, bytes: usize) {
        let (weights, bytes) = (weights as u64, bytes as u64);
        match self.lines.iter_mut().find(|line| line.class == class) {
            Some(line) => {
                line.weights += weights;
                line.bytes += bytes;
            }
            None => self.lines.push(MemoryLine { class, weights, bytes }),
        }
        self.lines.sort_by_key(|line| MemoryClass::ALL.iter().position(|class| *class == line.class));
    }
}

impl CausalLm {
    /// Returns the sizes of this model's weights in memory. Trained weights count their `f32` values, without gradients.
    pub fn memory_report(&self) -> MemoryReport {
        let mut report = MemoryReport::default();
        let size = self.dtype().size();
        let mut trained = 0;
        self.decoder.parameters(&mut |Parameter { role, weight }| {
            let elements = weight.dims().iter().product::<usize>();
            match weight {
                Weight::Quantized(packed) => {
                    let (codes, scales) = packed.bytes();
                    report.add(MemoryClass::PackedCodes, elements, codes);
                    report.add(MemoryClass::Scales, 0, scales);
                }
                Weight::Sharded(sharded) if sharded.is_quantized() => {
                    report.add(MemoryClass::PackedCodes, elements, sharded.own_bytes());
                }
                Weight::Sharded(sharded) => report.add(MemoryClass::of(role), elements, sharded.own_bytes()),
                Weight::Frozen(_) => report.add(MemoryClass::of(role), elements, size * elements),
                Weight::Trained(at) => {
                    trained += elements;
                    match self.params.quantized(*at) {
                        Some(packed) => {
                            let (codes, scales) = packed.bytes();
                            report.add(MemoryClass::PackedCodes, elements, codes);
                            report.add(MemoryClass::Scales, 0, scales);
                        }
                        None => report.add(MemoryClass::of(role), elements, self.params.bytes_of(*at)),
                    }
                }
            }
        });
        let adapter = self.params.numel() - trained;
        if adapter > 0 {
            report.add(MemoryClass::Adapter, adapter, Dtype::F32.size() * adapter);
        }
        report
    }
}

impl fmt::Display for MemoryReport {
    /// Writes a table.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<20} {:>14} {:>12} {:>12}", "", "weights", "bytes", "bits/weight")?;
        for line in &self.lines {
            let bits = match line.class {
                MemoryClass::Scales => self.line(MemoryClass::PackedCodes).map(|codes| (line.bytes, codes.weights)),
                _ => Some((line.bytes, line.weights)),
            };
            let bits =
                bits.map_or_else(String::new, |(bytes, weights)| format!("{:.3}", 8.0 * bytes as f64 / weights as f64));
            let weights = if line.weights == 0 { String::new() } else { line.weights.to_string() };
            writeln!(f, "{:<20} {weights:>14} {:>12} {bits:>12}", line.class.label(), size(line.bytes))?;
        }
        let bits = 8.0 * self.bytes() as f64 / self.weights() as f64;
        write!(f, "{:<20} {:>14} {:>12} {bits:>12.3}", "total", self.weights(), size(self.bytes()))?;
        match 100.0 * self.saving() {
            saved if saved >= 0.05 => write!(f, "  {saved:.1} % less than at 16 bits"),
            _ => Ok(()),
        }
    }
}

/// Formats bytes of memory in powers of 1,024.
fn size(bytes: u64) -> String {
    match bytes {
        0..0x10_0000 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
        _ => format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_by_hand() {
        let mut report = MemoryReport::default();
        report.add(MemoryClass::EmbeddingsAndHead, 1000, 2000);
        report.add(MemoryClass::Scales, 0, 125);
        report.add(MemoryClass::PackedCodes, 8000, 4000);
        assert_eq!((report.weights(), report.bytes()), (9000, 6125));
        assert_eq!(report.bits_per_quantized_weight(), Some(8.0 * 4125.0 / 8000.0));
        assert_eq!(report.saving(), 1.0 - 6125.0 / 18000.0);
        let text = report.to_string();
        assert!(text.contains("packed codes                   8000      3.9 KiB        4.000\n"), "{text}");
        assert!(text.contains("scales                                   0.1 KiB        0.125\n"), "{text}");
        assert!(text.ends_with("66.0 % less than at 16 bits"), "{text}");
    }
}
