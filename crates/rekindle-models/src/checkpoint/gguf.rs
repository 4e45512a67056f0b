//! From a checkpoint, and an adapter merged into it, to GGUF files.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rekindle_gguf::{
    GgmlType, GgufFileType, GgufTensorSpec, Importance, MetadataValue, Recipe, RecipeModel, write_gguf_files,
};
use rekindle_hub::{Checkpoint, TensorView};
use rekindle_lora::Adapter;
use rekindle_quant::mxfp4;
use rekindle_rope::Positions;

use super::gguf_decoder::{GgufModelSpec, is_rotated};
use super::gguf_tensors::{ValueChange, tensors_of};
use super::merge::MergedTensors;
use crate::parameters::ParameterSpec;
use crate::{Error, LayerRole, ModelConfig, NonFinite, Role};

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
    let is_tied = config.tie_word_embeddings() && !source.unties();
    let spec = GgufModelSpec::new(&config, is_tied)?;
    let recipe = Recipe::new(
        file_type,
        RecipeModel {
            layers: spec.decoder.layers.len() as u64,
            heads_per_kv_head: spec.decoder.heads / spec.decoder.kv_heads.max(1),
            experts: spec.decoder.experts.map_or(0, |experts| experts.count),
            tied: is_tied,
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
    for parameters in source.stacks() {
        let is_stacked = parameters[0].role.expert().is_some();
        let keeps_mxfp4 = keeps_mxfp4(file_type) && parameters.iter().all(|needed| source.mxfp4(needed).is_some());
        for (index, part) in tensors_of(&spec.architecture, &config, &parameters[0])?.into_iter().enumerate() {
            let mut shape: Vec<u64> = part.shape.iter().map(|&extent| extent as u64).collect();
            if is_stacked {
                shape.insert(0, parameters.len() as u64);
            }
            let kind = if keeps_mxfp4 { GgmlType::MXFP4 } else { recipe.tensor_type(&part.name, &shape) };
            tensors.push(GgufTensorSpec::new(part.name, kind, shape));
            contents.push(TensorContent::Parameters {
                parameters: parameters.clone(),
                change: part.change,
                keeps_mxfp4,
                is_first: index == 0,
            });
        }
    }
    let mut metadata = vec![
        ("general.architecture".to_owned(), spec.architecture.name().into()),
        ("general.type".to_owned(), "model".into()),
        ("general.file_type".to_owned(), file_type.id().into()),
        ("general.quantization_version".to_owned(), 2_u32.into()),
    ];
    metadata.extend(spec.description.metadata.iter().cloned());
    metadata.extend(options.metadata.iter().cloned());

    let mut refused = None;
    let written = write_gguf_files(path, options.max_file_bytes, &metadata, &tensors, |index, out| {
        let tensor = &tensors[index];
        let result = match &contents[index] {
            TensorContent::Vector(values) => put(tensor, values, None, out),
            TensorContent::Parameters { parameters, change, keeps_mxfp4, is_first } => {
                let importance = options.importance.and_then(|all| all.get(&tensor.name)).map(Vec::as_slice);
                let columns = tensor.shape.last().map_or(1, |&columns| columns as usize);
                parameters.iter().enumerate().try_for_each(|(index, needed)| {
                    if let Some(blocks) = source.mxfp4(needed).filter(|_| *keeps_mxfp4) {
                        out.write_all(&repacked(blocks, columns, change))?;
                    } else {
                        // An importance matrix has the columns of every expert.
                        let importance = importance.map(|all| all.get(index * columns..).unwrap_or(all));
                        let importance = importance.map(|rest| rest.get(..columns).unwrap_or(rest));
                        put_parameter(&source, needed, tensor, change, importance, out)?;
                    }
                    if *is_first {
                        progress(source.bytes(needed));
                    }
                    Ok(())
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
    /// A parameter, or the linears of all experts one after another; or a part of each.
    Parameters {
        parameters: Vec<ParameterSpec>,
        change: ValueChange,
        /// True if the blocks of the base are written as they are.
        keeps_mxfp4: bool,
        /// True for the first tensor of the parameters.
        is_first: bool,
    },
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

/// Returns true for file types that keep the experts of a checkpoint in MXFP4: no other type holds their values exactly in
/// as few bytes.
fn keeps_mxfp4(file_type: GgufFileType) -> bool {
    use GgufFileType as T;
    matches!(file_type, T::F32 | T::F16 | T::BF16 | T::MXFP4_MOE)
}

/// Returns the blocks of a GGUF file for rows in MXFP4: a scale, then the codes of elements j and j + 16 in byte j. The
/// codes of a checkpoint are those of elements 2j and 2j + 1.
fn repacked((codes, scales): (&[u8], &[u8]), columns: usize, change: &ValueChange) -> Vec<u8> {
    let per_row = columns / mxfp4::BLOCK;
    let all: Vec<usize> = (0..scales.len() / per_row.max(1)).collect();
    let rows = change.rows.as_ref().unwrap_or(&all);
    let mut out = Vec::with_capacity(rows.len() * per_row * (1 + mxfp4::BLOCK / 2));
    for block in rows.iter().flat_map(|row| row * per_row..(row + 1) * per_row) {
        out.push(scales[block]);
        let codes = &codes[block * mxfp4::BLOCK / 2..][..mxfp4::BLOCK / 2];
        let code = |element: usize| codes[element / 2] >> (element % 2 * 4) & 15;
        out.extend((0..mxfp4::BLOCK / 2).map(|j| code(j) | code(j + mxfp4::BLOCK / 2) << 4));
    }
    out
}

fn put_parameter(
    source: &MergedTensors<'_>,
    needed: &ParameterSpec,
    tensor: &GgufTensorSpec,
    change: &ValueChange,
    importance: Option<&[f32]>,
    out: &mut dyn Write,
) -> Result<(), PutError> {
    let columns = match needed.role {
        // One channel of the convolution.
        Role::Layer(_, LayerRole::ShortConv) => needed.shape[1..].iter().product(),
        _ if needed.shape.len() == 1 && change.rows.is_some() => 1,
        _ => needed.shape.last().copied().unwrap_or(1),
    };
    let columns: usize = columns.max(1);
    if let Some(view) = source.unchanged(needed).filter(|view| change.is_identity() && view.is_row_major()) {
        let rows = (PIECE / columns).max(1);
        let (block, size) = (view.dtype.block_elements(), view.dtype.size());
        for bytes in view.data.chunks(rows * columns / block * size) {
            let shape = [bytes.len() / size * block];
            let values = TensorView { data: bytes, shape: &shape, ..view }.to_f32().map_err(Error::from)?;
            put(tensor, &values, importance, out)?;
        }
        return Ok(());
    }
    put(tensor, &change.apply(source.merged(needed)?, columns), importance, out)
}

/// Quantizes and writes values of whole rows.
fn put(
    tensor: &GgufTensorSpec,
    values: &[f32],
    importance: Option<&[f32]>,
    out: &mut dyn Write,
) -> Result<(), PutError> {
    // The bits of absolute values have their order; those of infinity and NaN are the largest.
    let largest = values.iter().fold(0, |largest, value| (value.to_bits() & i32::MAX as u32).max(largest));
    let first_of = |least: f32| {
        let is_beyond = |value: &&f32| value.to_bits() & i32::MAX as u32 >= least.to_bits();
        if largest >= least.to_bits() { values.iter().find(is_beyond) } else { None }
    };
    if let Some(value) = first_of(f32::INFINITY) {
        let found = Some(NonFinite::Weight { name: tensor.name.clone(), trained: false, rows: Vec::new() });
        let what = format!("\"{}\" cannot be exported: it has the value {value}", tensor.name);
        return Err(Error::NonFinite { what, found }.into());
    }
    // Halves of precision store F16 itself, and the scales of quantized blocks.
    if !matches!(tensor.kind, GgmlType::F32 | GgmlType::BF16)
        && let Some(value) = first_of(65_520.0)
    {
        let what =
            format!("{value:e} in \"{}\" is beyond the range of {}: export to bf16 or f32", tensor.name, tensor.kind);
        return Err(Error::NonFinite { what, found: None }.into());
    }
    let columns = tensor.shape.last().map_or(1, |&columns| columns as usize);
    let bytes = tensor.kind.quantize(values, columns, importance).map_err(Error::from)?;
    Ok(out.write_all(&bytes)?)
}
