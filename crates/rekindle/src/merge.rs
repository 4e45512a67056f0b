//! Merging of adapters into their base, from files to files.

use std::path::{Path, PathBuf};

use rekindle_data::Tokenizer;
use rekindle_hub::{AdapterBase, Checkpoint, read_config};
use rekindle_kernels::DeviceKind;
use rekindle_lora::peft::AdapterConfig;
use rekindle_lora::{Adapter, Combination, saved_rows, weighted};
use rekindle_models::{Batch, MergeOptions, ModelConfig, Positions, open_checkpoint, saved_positions};
use rekindle_train::{Companion, write_result};

use crate::end_tokens::companions;
use crate::model_source::{FetchedFiles, OnDownload, find};
use crate::pretrained::base_directory;
use crate::{Dtype, Error, FastLanguageModel, HubAccess, Model, ModelFiles};

/// A merge of adapters into their base.
#[derive(Clone, Debug)]
pub struct Merge {
    /// The adapters with their weights.
    adapters: Vec<(PathBuf, f64)>,
    combination: Combination,
    base: Option<PathBuf>,
    dtype: Dtype,
    revision: Option<String>,
    access: HubAccess,
}

/// The parts of a merge.
pub(crate) struct LoadedMerge {
    pub(crate) checkpoint: Checkpoint,
    /// The adapter, or the combination of several.
    pub(crate) adapter: Adapter,
    /// The positions that it was trained with.
    pub(crate) positions: Option<Positions>,
    /// Rows of the embedding and the head, if the adapter was trained with other ones.
    pub(crate) rows: Option<usize>,
    /// The files of base and adapter.
    pub(crate) files: ModelFiles,
}

/// The difference between the losses of a merged model and those of its base with the adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verified {
    /// The mean over tokens of |Δ nll|.
    pub mean: f64,
    /// The largest |Δ nll|.
    pub largest: f64,
    /// The bound for the mean.
    pub bound: f64,
}

impl Merge {
    /// Returns a merge of one adapter: a directory in PEFT's format, the output directory of a run that trained one, or
    /// a name on the hub.
    pub fn new(adapter: impl Into<PathBuf>) -> Self {
        Self::weighted([(adapter, 1.0)], Combination::default())
    }

    /// Returns a merge of a weighted combination of adapters ([`weighted`]), named as for [`new`](Self::new). The first
    /// one determines the base.
    pub fn weighted(adapters: impl IntoIterator<Item = (impl Into<PathBuf>, f64)>, combination: Combination) -> Self {
        let adapters = adapters.into_iter().map(|(adapter, weight)| (of_run(adapter.into()), weight)).collect();
        let (base, revision) = (None, None);
        Self { adapters, combination, base, dtype: Dtype::Auto, revision, access: HubAccess::default() }
    }

    /// Sets the base's directory or name. Default: the base that the adapter was trained on. A 4-bit or 8-bit base is
    /// decoded, since the adapter was trained on it; set the 16-bit original to merge onto that instead.
    #[must_use]
    pub fn base(mut self, base: impl Into<PathBuf>) -> Self {
        self.base = Some(base.into());
        self
    }

    /// Sets the dtype of the result. Default: that of each tensor of the base.
    #[must_use]
    pub fn dtype(mut self, dtype: Dtype) -> Self {
        self.dtype = dtype;
        self
    }

    /// Sets the branch, tag or commit of the first adapter, if it is a name on the hub. Default `main`. The adapter
    /// records that of its base.
    #[must_use]
    pub fn revision(mut self, revision: impl Into<String>) -> Self {
        self.revision = Some(revision.into());
        self
    }

    /// Sets the token, the cache and the use of the network.
    #[must_use]
    pub fn hub(mut self, access: HubAccess) -> Self {
        self.access = access;
        self
    }

    /// Finds the adapters and their base; downloads missing files. The other methods begin with this. `on_download`
    /// receives the bytes downloaded so far, and those of all files to download, for one model or adapter after the
    /// other.
    ///
    /// Returns notices for the user: the hub could not be reached and the cache was used; the first adapter's tokenizer
    /// or chat template, which the result gets, differs from the base's.
    ///
    /// # Errors
    /// [`Error::File`] for missing files, and for an adapter that does not name its base, [`Error::Argument`] without
    /// an adapter, [`Error::AdapterBase`] if the base cannot be loaded.
    pub fn fetch(&mut self, on_download: OnDownload<'_>) -> Result<Vec<String>, Error> {
        let (mut notices, mut elsewhere) = (Vec::new(), Vec::new());
        let mut revision = self.revision.take();
        let access = &self.access;
        let mut bring = |name: &Path, revision: Option<&str>| -> Result<(PathBuf, Option<String>), Error> {
            let FetchedFiles { path, notice, commit } = find(name, revision, access, on_download)?;
            notices.extend(notice);
            Ok((path, commit))
        };
        let given = self.adapters.first().map(|(first, _)| first.clone());
        let mut commit = None;
        for (number, (adapter, _)) in self.adapters.iter_mut().enumerate() {
            let (path, found) = bring(adapter, revision.take().as_deref())?;
            commit = if number == 0 { found } else { commit };
            *adapter = path;
        }
        let (Some(given), Some((first, _))) = (given, self.adapters.first()) else {
            return Err(Error::Argument("no adapter to merge; pass at least one".to_owned()));
        };
        let base = match &self.base {
            Some(base) => bring(base, None)?.0,
            None => {
                let base = AdapterBase::read(first)?;
                let name = base_directory(&base, first, commit.as_deref(), &mut elsewhere);
                let found = bring(&name, base.revision.as_deref());
                found.map_err(|error| Error::AdapterBase { adapter: given, source: Box::new(error) })?.0
            }
        };
        notices.extend(elsewhere);
        notices.extend(tokens_without_rows(&base, first)?);
        let mut files = ModelFiles::of(&base, first);
        notices.extend(files.notice());
        notices.extend(self.adapters[1..].iter().filter_map(|(other, _)| files.put_adapter(other, false)));
        self.base = Some(base);
        Ok(notices)
    }

    /// Writes the merged checkpoint to `out`, with the tokenizer's files. One tensor is in memory at a time. `progress`
    /// receives the bytes read so far and in total.
    ///
    /// The vocabulary size is that of the adapter if it was trained with `resize_model_vocab`. `out` is written
    /// atomically and must not exist.
    ///
    /// # Errors
    /// [`Error::File`] and [`Error::Model`] for an adapter or a base that is missing, invalid or does not match,
    /// [`Error::Train`] if the result cannot be written.
    pub fn write(&self, out: impl AsRef<Path>, progress: &mut dyn FnMut(u64, u64)) -> Result<(), Error> {
        let LoadedMerge { checkpoint, adapter, positions, rows, files } = self.load()?;
        let options =
            MergeOptions { positions: positions.as_ref(), resize_model_vocab: rows, dtype: self.dtype.stored() };
        let companions = companions(&files, files.load_tokenizer().ok().flatten().as_ref())?;
        write_merged(&checkpoint, &adapter, options, &companions, out.as_ref(), progress)
    }

    /// Reads the adapters, and opens their base.
    ///
    /// # Errors
    /// Those of [`write`](Self::write) for an adapter or a base.
    pub(crate) fn load(&self) -> Result<LoadedMerge, Error> {
        let (base, adapters) = self.directories()?;
        let checkpoint = open_checkpoint(&base)?;
        let mut config = ModelConfig::from_checkpoint(&checkpoint)?;
        let first = &adapters[0].0;
        let lora = rekindle_models::Error::from;
        let rows = saved_rows(first).map_err(lora)?.filter(|rows| *rows != config.vocab_size());
        if let Some(rows) = rows {
            config = config.resized(rows)?;
        }
        if AdapterConfig::open(first).map_err(lora)?.is_reward_model() {
            config = config.with_score_head()?;
        }
        let modules = config.modules();
        let positions = saved_positions(first)?;
        let mut loaded = Vec::new();
        for (dir, weight) in &adapters {
            if saved_positions(dir)? != positions {
                return Err(Error::Argument(format!(
                    "the adapters in {} and {} were trained with other positions (rope_scaling); merge them one by one",
                    first.display(),
                    dir.display()
                )));
            }
            loaded.push((dir.display().to_string(), Adapter::load(dir, &modules).map_err(lora)?, *weight));
        }
        let adapter = match &mut loaded[..] {
            [(_, alone, 1.0)] => alone.clone(),
            all => {
                let all: Vec<_> = all.iter().map(|(name, adapter, weight)| (name.as_str(), adapter, *weight)).collect();
                weighted(&all, self.combination, &modules).map_err(lora)?
            }
        };
        let files = ModelFiles::of(&base, first);
        Ok(LoadedMerge { checkpoint, adapter, positions, rows, files })
    }

    /// Compares the losses of the checkpoint in `merged` with those of the base with the adapter, on rows of
    /// pseudo-random tokens in `f32`.
    ///
    /// # Errors
    /// [`Error::Argument`] if the mean difference exceeds the effect of rounding once to the dtype, [`Error::Model`]
    /// for losses that are not finite, and those of loading.
    pub fn verify(&self, merged: impl AsRef<Path>, device: DeviceKind) -> Result<Verified, Error> {
        let load = |dir: &Path| FastLanguageModel::from_pretrained(dir).dtype(Dtype::F32).device(device);
        let (base, adapters) = self.directories()?;
        // One model in memory at a time.
        let base = load(&base).for_adapter(&adapters[0].0).load_model()?;
        let adapted = base.load_weighted_adapters(&adapters, self.combination)?;
        let expected = losses(&adapted, "the base with the adapter")?;
        drop(adapted);
        let got = losses(&load(merged.as_ref()).load_model()?, "the merged model")?;
        let differences: Vec<f64> = expected.iter().zip(&got).map(|(a, b)| f64::from((a - b).abs())).collect();
        let mean = differences.iter().sum::<f64>() / differences.len().max(1) as f64;
        let largest = differences.iter().copied().fold(0.0, f64::max);
        let bound = bound(merged.as_ref())?;
        let verified = Verified { mean, largest, bound };
        if mean <= bound {
            return Ok(verified);
        }
        Err(Error::Argument(format!(
            "the merged model's losses differ from the adapter's by {mean:.2e} on average, more than rounding \
             explains ({bound:.0e}); merge in a wider dtype, or into the base that the adapter was trained on"
        )))
    }

    /// Returns the directories of the base and of the weighted adapters.
    fn directories(&self) -> Result<(PathBuf, Vec<(PathBuf, f64)>), Error> {
        let mut found = self.clone();
        found.fetch(&mut |_, _| ())?;
        Ok((found.base.expect("fetch finds it"), found.adapters))
    }
}

/// Returns a notice for a merge whose result has fewer rows than its tokenizer has token ids.
fn tokens_without_rows(base: &Path, adapter: &Path) -> Result<Option<String>, Error> {
    let files = ModelFiles::of(base, adapter);
    let dir = files.tokenizer();
    if !dir.join("tokenizer.json").is_file() {
        return Ok(None);
    }
    let tokens = Tokenizer::from_dir(dir)?.vocab_size();
    let saved = saved_rows(adapter).map_err(rekindle_models::Error::from)?;
    let stored = || Some(ModelConfig::from_json(&read_config(base).ok()?).ok()?.vocab_size() as u64);
    let rows = saved.map(|rows| rows as u64).or_else(stored).filter(|rows| *rows < tokens as u64);
    Ok(rows.map(|rows| {
        format!(
            "the merged model has {rows} token ids, but its tokenizer, {}, has {tokens}; train the adapter with \
             resize_model_vocab = {tokens} to add the missing rows",
            dir.display()
        )
    }))
}

/// Returns the adapter in a run's output directory, or the given path.
pub(crate) fn of_run(adapter: PathBuf) -> PathBuf {
    let inside = adapter.join("adapter");
    if inside.join(rekindle_lora::peft::CONFIG_FILE).exists() { inside } else { adapter }
}

impl Model {
    /// Returns the model with its adapter merged into the weights.
    ///
    /// # Errors
    /// [`Error::Model`] if the device fails, for example for lack of memory.
    pub fn merge_and_unload(mut self) -> Result<Self, Error> {
        self.causal_lm_mut().merge_and_unload()?;
        Ok(self)
    }

    /// Writes the checkpoint that this model was loaded from with its adapter merged into it, `W + s·B·A` in `f32` and
    /// rounded once to `dtype` ([`Dtype::Auto`]: that of each tensor), with the tokenizer's files.
    ///
    /// # Errors
    /// [`Error::Argument`] without an adapter, [`Error::Train`] if the files cannot be written.
    pub fn save_pretrained_merged(&self, dir: impl AsRef<Path>, dtype: Dtype) -> Result<(), Error> {
        let adapter = self.causal_lm().adapter();
        let adapter = adapter.ok_or_else(|| {
            Error::Argument("this model has no adapter to merge; call save_pretrained to write it as it is".to_owned())
        })?;
        if self.causal_lm().is_merged() {
            return Err(Error::Argument(
                "an earlier adapter was merged into this model's weights, which its checkpoint does not contain; call \
                 merge_and_unload, then save_pretrained"
                    .to_owned(),
            ));
        }
        let base = open_checkpoint(self.path())?;
        let rows = self.causal_lm().config().vocab_size();
        let options = MergeOptions {
            positions: self.causal_lm().context_extension().map(|extension| &extension.positions),
            resize_model_vocab: Some(rows)
                .filter(|rows| ModelConfig::from_json(base.config()).is_ok_and(|stored| stored.vocab_size() != *rows)),
            dtype: dtype.stored(),
        };
        write_merged(&base, &adapter, options, &self.companions(None)?, dir.as_ref(), &mut |_, _| ())
    }
}

fn write_merged(
    base: &Checkpoint,
    adapter: &Adapter,
    options: MergeOptions<'_>,
    companions: &[Companion],
    out: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), Error> {
    let same = out.canonicalize().is_ok_and(|out| base.path().canonicalize().is_ok_and(|base| base == out));
    if same {
        return Err(Error::Argument(format!("{} is the base model's own directory; choose another", out.display())));
    }
    if std::fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(Error::Argument(format!("{} is not empty; choose a new directory", out.display())));
    }
    let (mut done, total) = (0, base.total_bytes());
    write_result(out, false, companions, |dir| {
        Ok(rekindle_models::merge(base, adapter, options, dir, &mut |bytes| {
            done += bytes;
            progress(done.min(total), total);
        })?)
    })?;
    progress(total, total);
    Ok(())
}

/// The number of rows and tokens to compare.
const ROWS: u32 = 4;
const TOKENS: usize = 64;

/// Returns the losses of `model`, called `name` in errors; of a reward model, its scores.
fn losses(model: &Model, name: &str) -> Result<Vec<f32>, Error> {
    let (vocab, length) =
        (model.causal_lm().config().vocab_size() as u64, TOKENS.min(model.causal_lm().max_seq_length()));
    // Knuth's multiplicative hash: any tokens will do, as long as they are the same for both.
    let token =
        |row: u32, t: usize| ((u64::from(row) * 1009 + t as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20) % vocab;
    let rows: Vec<Vec<u32>> = (0..ROWS).map(|row| (0..length).map(|t| token(row, t) as u32).collect()).collect();
    let labels: Vec<Vec<i32>> = rows.iter().map(|row| row.iter().map(|&id| id as i32).collect()).collect();
    let batch = Batch::from_rows(rows.iter().map(Vec::as_slice).zip(labels.iter().map(Vec::as_slice)), 0);
    let losses = match model.causal_lm().has_score_head() {
        true => model.causal_lm().scores(&batch)?.into_iter().map(|score| score as f32).collect(),
        false => model.causal_lm().nll(&batch)?,
    };
    if losses.iter().all(|loss| loss.is_finite()) {
        return Ok(losses);
    }
    let found = model.causal_lm().first_non_finite_output(&[batch], None)?;
    Err(rekindle_models::Error::NonFinite { what: format!("a loss of {name} is not finite"), found }.into())
}

/// Returns the bound for the mean difference of the losses after rounding every weight once. Measured on the tiny
/// models of the tests: at most 1.3e-6 in f32, 2.3e-3 in f16 and 1.9e-2 in bf16.
fn bound(merged: &Path) -> Result<f64, Error> {
    let checkpoint = Checkpoint::open(merged)?;
    let is = |dtype| checkpoint.names().filter_map(|name| checkpoint.get(name)).any(|view| view.dtype == dtype);
    Ok(match () {
        () if is(rekindle_hub::Dtype::BF16) => 5e-2,
        () if is(rekindle_hub::Dtype::F16) => 1e-2,
        () => 1e-4,
    })
}
