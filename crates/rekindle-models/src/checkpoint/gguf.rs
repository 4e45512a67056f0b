//! From a checkpoint, and an adapter merged into it, to GGUF files.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rekindle_gguf::{
    GgmlType, GgufFileType, GgufTensorSpec, Importance, MetadataValue, Recipe, RecipeModel, interleave_rows,
    write_gguf_files,
};
use rekindle_hub::{Checkpoint, TensorView};
use rekindle_lora::Adapter;
use rekindle_rope::Positions;

use super::gguf_decoder::{GgufModelSpec, is_rotated, norm_shift, tensor_name};
use super::merge::MergedTensors;
use crate::parameters::ParameterSpec;
use crate::{Error, ModelConfig, NonFinite};

/// Elements that are decoded and quantized at a time: 64 MiB in f32.
const PIECE: usize = 1 << 24;

/// The content of a GGUF file beside the weights and the description of the decoder.
#[derive(Clone, Copy, Debug, Default)]
pub struct GgufOptions<'a> {
    /// The positions that the adapter was trained with.
    pub positions: Option<&'a Positions>,
    /// Rows of the embedding table and the head.
    pub resize_model_vocab: Option<usize>,
    /// Keys to add: the tokenizer and the name of the model.
    pub metadata: &'a [(String, MetadataValue)],
    /// Weights of the columns of tensors, by name in the file.
    pub importance: Option<&'a Importance>,
    /// Bytes of tensors in a file at most; `None` for one file.
    pub max_file_bytes: Option<u64>,
}

/// A written GGUF model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufTotals {
    /// The files.
    pub files: Vec<PathBuf>,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Number of weights.
    pub weights: u64,
    /// Differences that llama.cpp's computation has.
    pub notices: Vec<String>,
}

/// Writes `base`, with `adapter` merged into it if there is one, as a GGUF model at `path`.
///
/// The merge is that of [`merge`](super::merge::merge()), in f32, and is quantized without a 16-bit step. Pieces of
/// tensors of up to 64 MiB are decoded at a time, adapted tensors as a whole, and quantized on all cores. `progress`
/// receives the bytes of the base that were read.
///
/// # Errors
/// [`Error::Gguf`] for a model that llama.cpp does not compute, and if a file cannot be written; otherwise those of
/// [`merge`](super::merge::merge()).
pub fn export_gguf(
    base: &Checkpoint,
    adapter: Option<&Adapter>,
    file_type: GgufFileType,
    options: GgufOptions<'_>,
    path: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<GgufTotals, Error> {
    let source = MergedTensors::open(base, adapter, options.resize_model_vocab)?;
    let mut config = source.config.clone();
    if let Some(positions) = options.positions {
        positions.apply(config.decoder_json_mut());
        config = ModelConfig::from_json(&config.json).map_err(|problems| Error::Argument(problems.join("; ")))?;
    }
    let spec = GgufModelSpec::new(&config)?;
    let recipe = Recipe::new(
        file_type,
        RecipeModel {
            layers: spec.decoder.layers.len() as u64,
            heads_per_kv_head: spec.decoder.heads / spec.decoder.kv_heads.max(1),
            experts: spec.decoder.experts.map_or(0, |experts| experts.count),
            tied: config.tie_word_embeddings() && !source.unties(),
            is_70b: spec.architecture.is_70b(&spec.decoder),
            has_importance: options.importance.is_some(),
        },
    )?;
    let mut tensors = Vec::new();
    let mut contents = Vec::new();
    for (name, values) in &spec.description.vectors {
        tensors.push(GgufTensorSpec::new(name.clone(), GgmlType::F32, [values.len() as u64]));
        contents.push(TensorContent::Vector(values));
    }
    for parts in source.stacks() {
        let name = tensor_name(parts[0].role)?;
        let mut shape: Vec<u64> = parts[0].shape.iter().map(|&extent| extent as u64).collect();
        if parts[0].role.expert().is_some() {
            shape.insert(0, parts.len() as u64);
        }
        tensors.push(GgufTensorSpec::new(name.clone(), recipe.tensor_type(&name, &shape), shape));
        contents.push(TensorContent::Parameters(parts));
    }
    let mut metadata = vec![
        ("general.architecture".to_owned(), spec.architecture.name().into()),
        ("general.type".to_owned(), "model".into()),
        ("general.file_type".to_owned(), file_type.id().into()),
        ("general.quantization_version".to_owned(), 2_u32.into()),
    ];
    metadata.extend(spec.description.metadata.iter().cloned());
    metadata.extend(options.metadata.iter().cloned());

    let interleaves = |needed: &ParameterSpec| spec.architecture.rotates_pairs() && rotates_halves(&config, needed);
    let mut refused = None;
    let written = write_gguf_files(path, options.max_file_bytes, &metadata, &tensors, |index, out| {
        let tensor = &tensors[index];
        let result = match &contents[index] {
            TensorContent::Vector(values) => put(tensor, values, None, out),
            TensorContent::Parameters(parts) => {
                let importance = options.importance.and_then(|all| all.get(&tensor.name)).map(Vec::as_slice);
                let columns = tensor.shape.last().map_or(1, |&columns| columns as usize);
                parts.iter().enumerate().try_for_each(|(index, needed)| {
                    // An importance matrix has the columns of every expert.
                    let importance = importance.map(|all| all.get(index * columns..).unwrap_or(all));
                    let importance = importance.map(|rest| rest.get(..columns).unwrap_or(rest));
                    let head_dim = interleaves(needed).then_some(config.head_dim());
                    let shift = norm_shift(&config, needed.role);
                    let done = put_parameter(&source, needed, tensor, shift, head_dim, importance, out);
                    progress(source.bytes(needed));
                    done
                })
            }
        };
        result.map_err(|error| match error {
            PutError::Io(error) => error,
            PutError::Model(error) => {
                refused = Some(error);
                io::Error::other("a tensor cannot be exported")
            }
        })
    });
    if let Some(error) = refused {
        return Err(error);
    }
    Ok(GgufTotals {
        files: written?,
        bytes: tensors.iter().filter_map(GgufTensorSpec::bytes).sum(),
        weights: tensors.iter().map(|tensor| tensor.shape.iter().product::<u64>()).sum(),
        notices: spec.description.notices,
    })
}

/// A tensor of the file.
enum TensorContent<'a> {
    Vector(&'a [f32]),
    /// A parameter, or the linears of all experts one after another.
    Parameters(Vec<ParameterSpec>),
}

/// The reason that a tensor was not written: the file, or the model.
enum PutError {
    Io(io::Error),
    Model(Error),
}

impl From<io::Error> for PutError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Error> for PutError {
    fn from(error: Error) -> Self {
        Self::Model(error)
    }
}

/// Returns true for queries and keys of a model whose halves of heads rotate together.
pub(super) fn rotates_halves(config: &ModelConfig, needed: &ParameterSpec) -> bool {
    let mut ropes = config.spec.layers.iter().filter_map(|layer| layer.attention()?.rope);
    let is_interleaved = ropes.all(|rope| rope.interleaved);
    is_rotated(needed.role) && !is_interleaved
}

fn put_parameter(
    source: &MergedTensors<'_>,
    needed: &ParameterSpec,
    tensor: &GgufTensorSpec,
    shift: f32,
    interleaved_heads: Option<usize>,
    importance: Option<&[f32]>,
    out: &mut dyn Write,
) -> Result<(), PutError> {
    let columns = needed.shape.last().copied().unwrap_or(1).max(1);
    if let Some(view) = source.unchanged(needed).filter(|_| interleaved_heads.is_none() && shift == 0.0) {
        let rows = (PIECE / columns).max(1);
        let (block, size) = (view.dtype.block_elements(), view.dtype.size());
        for bytes in view.data.chunks(rows * columns / block * size) {
            let shape = [bytes.len() / size * block];
            let values = TensorView { data: bytes, shape: &shape, ..view }.to_f32().map_err(Error::from)?;
            put(tensor, &values, importance, out)?;
        }
        return Ok(());
    }
    let mut values = source.merged(needed)?;
    if shift != 0.0 {
        values.iter_mut().for_each(|value| *value += shift);
    }
    if let Some(head_dim) = interleaved_heads {
        values = interleaved(&values, needed.shape[0], head_dim);
    }
    put(tensor, &values, importance, out)
}

/// Returns the rows of queries or keys in the order of a rotation of pairs.
pub(super) fn interleaved(values: &[f32], rows: usize, head_dim: usize) -> Vec<f32> {
    let width = values.len() / rows.max(1);
    interleave_rows(rows, head_dim).flat_map(|row| &values[row * width..][..width]).copied().collect()
}

/// Quantizes and writes values of whole rows.
fn put(
    tensor: &GgufTensorSpec,
    values: &[f32],
    importance: Option<&[f32]>,
    out: &mut dyn Write,
) -> Result<(), PutError> {
    if let Some(value) = values.iter().find(|value| !value.is_finite()) {
        let found = Some(NonFinite::Weight { name: tensor.name.clone(), trained: false, rows: Vec::new() });
        let what = format!("\"{}\" cannot be exported: it has the value {value}", tensor.name);
        return Err(Error::NonFinite { what, found }.into());
    }
    // Halves of precision store F16 itself, and the scales of quantized blocks.
    if !matches!(tensor.kind, GgmlType::F32 | GgmlType::BF16)
        && let Some(value) = values.iter().find(|value| value.abs() >= 65_520.0)
    {
        let what =
            format!("{value:e} in \"{}\" is beyond the range of {}: export to bf16 or f32", tensor.name, tensor.kind);
        return Err(Error::NonFinite { what, found: None }.into());
    }
    let columns = tensor.shape.last().map_or(1, |&columns| columns as usize);
    let bytes = tensor.kind.quantize(values, columns, importance).map_err(Error::from)?;
    Ok(out.write_all(&bytes)?)
}
