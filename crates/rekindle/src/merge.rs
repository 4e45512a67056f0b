//! An adapter merged into its base, from directory to directory.

use std::path::{Path, PathBuf};

use rekindle_hub::Checkpoint;
use rekindle_kernels::DeviceKind;
use rekindle_lora::Adapter;
use rekindle_models::{Batch, ModelConfig, Positions, saved_positions};
use rekindle_train::write_result;

use crate::source::{Access, find};
use crate::{Dtype, Error, FastLanguageModel, Files, Model};

/// What to merge, and how.
#[derive(Clone, Debug)]
pub struct Merge {
    adapter: PathBuf,
    base: Option<PathBuf>,
    dtype: Dtype,
}

/// How far the losses of a merged model are from those of its base with the adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verified {
    /// The mean over tokens of |Δ nll|.
    pub mean: f64,
    /// The largest |Δ nll|.
    pub largest: f64,
    /// The bound that the mean was held to.
    pub bound: f64,
}

impl Merge {
    /// The adapter in `adapter`: a directory in PEFT's format, a run's output directory that holds one, or a name on the
    /// hub.
    pub fn new(adapter: impl Into<PathBuf>) -> Self {
        let adapter = adapter.into();
        let inside = adapter.join("adapter");
        let adapter = if inside.join(rekindle_lora::peft::CONFIG_FILE).exists() { inside } else { adapter };
        Self { adapter, base: None, dtype: Dtype::Auto }
    }

    /// The base's directory or name. Default: what the adapter says it was trained on. A base in 4 or 8 bits is decoded, since
    /// that is what the adapter was trained against; give the 16-bit original here to merge onto that.
    #[must_use]
    pub fn base(mut self, base: impl Into<PathBuf>) -> Self {
        self.base = Some(base.into());
        self
    }

    /// The dtype of the result. Default: that of each tensor of the base.
    #[must_use]
    pub fn dtype(mut self, dtype: Dtype) -> Self {
        self.dtype = dtype;
        self
    }

    /// Finds the adapter and its base, downloading what is missing; what is done here begins with this. `on_download` is
    /// told the bytes that are here, and those of all files that are being downloaded, of one after the other.
    ///
    /// What is returned is for the user: the hub was out of reach, and the cache was taken instead.
    ///
    /// # Errors
    /// [`Error::File`] for what is not there, [`Error::Argument`] for an adapter that does not name its base,
    /// [`Error::AdapterBase`] when that cannot be had.
    pub fn fetch(&mut self, on_download: &mut dyn FnMut(u64, u64)) -> Result<Vec<String>, Error> {
        let access = Access::default();
        let adapter = find(&self.adapter, None, &access, on_download)?;
        let base = match &self.base {
            Some(base) => find(base, None, &access, on_download)?,
            None => {
                let (name, revision) = named_base(&adapter.path)?;
                let found = find(Path::new(&name), revision.as_deref(), &access, on_download);
                found.map_err(|error| Error::AdapterBase { adapter: self.adapter.clone(), source: Box::new(error) })?
            }
        };
        self.adapter = adapter.path;
        self.base = Some(base.path);
        Ok(adapter.notice.into_iter().chain(base.notice).collect())
    }

    /// Writes the merged checkpoint to `out`, the tokenizer's files included. One tensor is in memory at a time.
    /// `progress` is told the bytes read so far and in all.
    ///
    /// `out` appears whole or not at all; what is there already is never replaced.
    ///
    /// # Errors
    /// [`Error::File`] and [`Error::Model`] for an adapter or a base that is missing, broken or does not fit,
    /// [`Error::Train`] when the result cannot be written.
    pub fn write(&self, out: impl AsRef<Path>, progress: &mut dyn FnMut(u64, u64)) -> Result<(), Error> {
        let (base, adapter) = self.directories()?;
        let checkpoint = Checkpoint::open(&base)?;
        let modules = ModelConfig::from_checkpoint(&checkpoint)?.modules();
        let positions = saved_positions(&adapter)?;
        let companions = Files::of(&base, &adapter).companions();
        let adapter = Adapter::load(&adapter, &modules).map_err(rekindle_models::Error::from)?;
        write_merged(&checkpoint, &adapter, positions.as_ref(), &companions, self.dtype, out.as_ref(), progress)
    }

    /// Compares the losses of the checkpoint in `merged` with those of the base with the adapter, on rows of
    /// pseudo-random tokens in `f32`.
    ///
    /// # Errors
    /// [`Error::Argument`] when the mean difference is above what one rounding to the dtype can explain, and those of
    /// loading.
    pub fn verify(&self, merged: impl AsRef<Path>, device: DeviceKind) -> Result<Verified, Error> {
        let load = |dir: &Path| FastLanguageModel::from_pretrained(dir).dtype(Dtype::F32).device(device);
        let (base, adapter) = self.directories()?;
        // One model in memory at a time.
        let base = load(&base).for_adapter(&adapter).load_model()?;
        let expected = losses(&base.load_adapter(&adapter)?)?;
        let got = losses(&load(merged.as_ref()).load_model()?)?;
        let differences: Vec<f64> = expected.iter().zip(&got).map(|(a, b)| f64::from((a - b).abs())).collect();
        let mean = differences.iter().sum::<f64>() / differences.len().max(1) as f64;
        let largest = differences.iter().copied().fold(0.0, f64::max);
        let bound = bound(merged.as_ref())?;
        let verified = Verified { mean, largest, bound };
        if mean <= bound {
            return Ok(verified);
        }
        Err(Error::Argument(format!(
            "the merged model's losses are {mean:.2e} from the adapter's on the mean, more than the {bound:.0e} that \
             rounding explains; merge in a wider dtype, or onto the base that the adapter was trained on"
        )))
    }

    /// Of the base and the adapter.
    fn directories(&self) -> Result<(PathBuf, PathBuf), Error> {
        let mut found = self.clone();
        found.fetch(&mut |_, _| ())?;
        Ok((found.base.expect("fetch finds it"), found.adapter))
    }
}

/// The base that the adapter in `dir` names, and its revision.
fn named_base(dir: &Path) -> Result<(String, Option<String>), Error> {
    let json: serde_json::Value = rekindle_hub::read_json(&dir.join(rekindle_lora::peft::CONFIG_FILE))?;
    let text = |key: &str| json.get(key).and_then(|value| value.as_str()).filter(|text| !text.is_empty());
    let Some(name) = text("base_model_name_or_path") else {
        return Err(Error::Argument(format!("{} does not say what its base model is; name it", dir.display())));
    };
    Ok((name.to_owned(), text("revision").map(str::to_owned)))
}

impl Model {
    /// The model with its adapter added into the weights, and no adapter.
    ///
    /// # Errors
    /// [`Error::Model`] when the device fails, as for lack of memory.
    pub fn merge_and_unload(mut self) -> Result<Self, Error> {
        self.causal_lm_mut().merge_and_unload()?;
        Ok(self)
    }

    /// Writes the checkpoint that this model was loaded from with its adapter added into it, `W + s·B·A` in `f32` and
    /// rounded once to `dtype` ([`Dtype::Auto`]: what each tensor has), with the tokenizer's files.
    ///
    /// # Errors
    /// [`Error::Argument`] without an adapter, [`Error::Train`] when the system refuses.
    pub fn save_pretrained_merged(&self, dir: impl AsRef<Path>, dtype: Dtype) -> Result<(), Error> {
        let adapter = self.causal_lm().adapter();
        let adapter = adapter.ok_or_else(|| {
            Error::Argument("there is no adapter to merge; save_pretrained writes the model as it is".to_owned())
        })?;
        let base = Checkpoint::open(self.path())?;
        let (rows, had) = (self.causal_lm().config().vocab_size, ModelConfig::from_checkpoint(&base)?.vocab_size);
        if rows != had {
            return Err(Error::Argument(format!(
                "the checkpoint has {had} token ids and this model {rows} (resize_model_vocab); call merge_and_unload, \
                 then save_pretrained"
            )));
        }
        if self.causal_lm().is_merged() {
            return Err(Error::Argument(
                "an earlier adapter was merged into this model, and its checkpoint has it not; call merge_and_unload, \
                 then save_pretrained"
                    .to_owned(),
            ));
        }
        let positions = self.causal_lm().widened().map(|widened| &widened.positions);
        write_merged(&base, &adapter, positions, &self.companions(), dtype, dir.as_ref(), &mut |_, _| ())
    }
}

fn write_merged(
    base: &Checkpoint,
    adapter: &Adapter,
    positions: Option<&Positions>,
    companions: &[PathBuf],
    dtype: Dtype,
    out: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), Error> {
    let same = out.canonicalize().is_ok_and(|out| base.path().canonicalize().is_ok_and(|base| base == out));
    if same {
        return Err(Error::Argument(format!("{} is the base itself; give another directory", out.display())));
    }
    if std::fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(Error::Argument(format!("{} is not empty; give a new directory", out.display())));
    }
    let dtype = match dtype {
        Dtype::Auto => None,
        Dtype::F32 => Some(rekindle_hub::Dtype::F32),
        Dtype::Bf16 => Some(rekindle_hub::Dtype::BF16),
        Dtype::F16 => Some(rekindle_hub::Dtype::F16),
    };
    let (mut done, total) = (0, base.total_bytes());
    write_result(out, false, companions, |dir| {
        Ok(rekindle_models::merge(base, adapter, positions, dtype, dir, &mut |bytes| {
            done += bytes;
            progress(done.min(total), total);
        })?)
    })?;
    progress(total, total);
    Ok(())
}

/// Rows and tokens that are compared.
const ROWS: u32 = 4;
const TOKENS: usize = 64;

fn losses(model: &Model) -> Result<Vec<f32>, Error> {
    let (vocab, length) =
        (model.causal_lm().config().vocab_size as u64, TOKENS.min(model.causal_lm().max_seq_length()));
    // Knuth's multiplicative hash: any tokens will do, as long as they are the same for both.
    let token =
        |row: u32, t: usize| ((u64::from(row) * 1009 + t as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20) % vocab;
    let rows: Vec<Vec<u32>> = (0..ROWS).map(|row| (0..length).map(|t| token(row, t) as u32).collect()).collect();
    let labels: Vec<Vec<i32>> = rows.iter().map(|row| row.iter().map(|&id| id as i32).collect()).collect();
    let batch = Batch::from_rows(rows.iter().map(Vec::as_slice).zip(labels.iter().map(Vec::as_slice)), 0);
    Ok(model.causal_lm().nll(&batch)?)
}

/// What one rounding of every weight may move the mean loss by. Measured on the tiny models of the tests: at most 1.3e-6
/// in f32, 2.3e-3 in f16 and 1.9e-2 in bf16.
fn bound(merged: &Path) -> Result<f64, Error> {
    let checkpoint = Checkpoint::open(merged)?;
    let is = |dtype| checkpoint.names().filter_map(|name| checkpoint.get(name)).any(|view| view.dtype == dtype);
    Ok(match () {
        () if is(rekindle_hub::Dtype::BF16) => 5e-2,
        () if is(rekindle_hub::Dtype::F16) => 1e-2,
        () => 1e-4,
    })
}
