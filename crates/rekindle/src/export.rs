//! Export of checkpoints and adapters to GGUF, the format of llama.cpp, Ollama and LM Studio.

use std::path::{Path, PathBuf};

use rekindle_data::{Tokenizer, chat_template_sources};
use rekindle_gguf::{GgufFileType, GgufTokenizer, MetadataValue, read_importance};
use rekindle_hub::{Checkpoint, read_json, write_atomic};
use rekindle_lora::Adapter;
use rekindle_models::{GgufOptions, ModelConfig, Positions, export_gguf, export_gguf_adapter, open_checkpoint};
use serde_json::Value;

use crate::end_tokens::end_tokens;
use crate::merge::{LoadedMerge, of_run};
use crate::model_source::{FetchedFiles, OnDownload, find};
use crate::modelfile::modelfile;
use crate::{Error, HubAccess, Merge, ModelFiles};

/// An export of a checkpoint, or of an adapter merged into its base, to GGUF files.
///
/// Weights go from the checkpoint to quantized blocks without a 16-bit file between; memory holds a piece of a tensor.
///
/// ```no_run
/// # fn main() -> Result<(), rekindle::Error> {
/// use rekindle::{GgufExport, GgufFileType};
///
/// let mut export = GgufExport::new("outputs/first");
/// export.fetch(&mut |_, _| ())?;
/// for file in export.write("models/first-gguf", &[GgufFileType::Q4_K_M, GgufFileType::Q8_0], &mut |_, _| ())? {
///     println!("{} {:.2} bits per weight", file.paths[0].display(), file.bits_per_weight());
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct GgufExport {
    model: PathBuf,
    merge: Option<Merge>,
    base: Option<PathBuf>,
    name: Option<String>,
    importance: Option<PathBuf>,
    max_file_bytes: Option<u64>,
    pre: Option<String>,
    revision: Option<String>,
    access: HubAccess,
}

/// A written GGUF model.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufFile {
    /// The file, or all files of a split model.
    pub paths: Vec<PathBuf>,
    /// The precision.
    pub file_type: GgufFileType,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Number of weights.
    pub weights: u64,
    /// Notices for the user: differences in llama.cpp's computation, and parts that the file lacks.
    pub notices: Vec<String>,
}

impl GgufFile {
    /// Returns the mean number of bits that a weight takes.
    pub fn bits_per_weight(&self) -> f64 {
        8.0 * self.bytes as f64 / self.weights.max(1) as f64
    }
}

/// The weights and files of an export.
struct Loaded {
    checkpoint: Checkpoint,
    adapter: Option<Adapter>,
    positions: Option<Positions>,
    rows: Option<usize>,
    files: ModelFiles,
}

impl GgufExport {
    /// Returns an export of a checkpoint, an adapter, or the result of a run: a directory, or a name on the hub.
    pub fn new(model: impl Into<PathBuf>) -> Self {
        let given = model.into();
        let trained = given.join("model");
        // A run of full fine-tuning writes model/, one of LoRA adapter/.
        let model = if trained.join("config.json").exists() { trained } else { of_run(given.clone()) };
        Self {
            model,
            merge: None,
            base: None,
            name: name_of(&given),
            importance: None,
            max_file_bytes: None,
            pre: None,
            revision: None,
            access: HubAccess::default(),
        }
    }

    /// Sets the base of an adapter: a directory or a name on the hub. Default: the base that it was trained on.
    #[must_use]
    pub fn base(mut self, base: impl Into<PathBuf>) -> Self {
        self.base = Some(base.into());
        self
    }

    /// Sets the name of the model, with which file names begin. Default: that of the directory or on the hub.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Sets an importance matrix, a file of `llama-imatrix`.
    #[must_use]
    pub fn importance(mut self, path: impl Into<PathBuf>) -> Self {
        self.importance = Some(path.into());
        self
    }

    /// Sets the bytes of tensors in a file at most; larger models are split. Default: one file.
    #[must_use]
    pub fn max_file_bytes(mut self, bytes: u64) -> Self {
        self.max_file_bytes = Some(bytes);
        self
    }

    /// Sets the name of the pre-tokenizer (`tokenizer.ggml.pre`), for a tokenizer whose own is not recognized.
    #[must_use]
    pub fn pre_tokenizer(mut self, name: impl Into<String>) -> Self {
        self.pre = Some(name.into());
        self
    }

    /// Sets the branch, tag or commit of a name on the hub. Default `main`.
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

    /// Finds the model, and the base of an adapter; downloads missing files. `on_download` receives the bytes downloaded
    /// so far, and those of all files to download. Returns notices for the user.
    ///
    /// # Errors
    /// [`Error::File`] for missing files, [`Error::AdapterBase`] if the base of an adapter cannot be loaded.
    pub fn fetch(&mut self, on_download: OnDownload<'_>) -> Result<Vec<String>, Error> {
        let FetchedFiles { path, notice, .. } =
            find(&self.model, self.revision.as_deref(), &self.access, &mut *on_download)?;
        let mut notices: Vec<String> = notice.into_iter().collect();
        self.model = path;
        if !self.model.join(rekindle_lora::peft::CONFIG_FILE).exists() {
            return match &self.base {
                None => Ok(notices),
                Some(_) => Err(Error::Argument(format!("{} is no adapter; leave out its base", self.model.display()))),
            };
        }
        let mut merge = Merge::new(self.model.clone()).hub(self.access.clone());
        if let Some(base) = &self.base {
            merge = merge.base(base);
        }
        notices.extend(merge.fetch(on_download)?);
        self.merge = Some(merge);
        Ok(notices)
    }

    /// Writes a GGUF model of each precision into the directory `out`, and a `Modelfile` for the first one. Files are
    /// named `NAME-Q4_K_M.gguf` and so on; each appears complete, and replaces one of the same name. `progress` receives
    /// the bytes of weights read so far and in total.
    ///
    /// # Errors
    /// [`Error::Model`] for a model that llama.cpp does not compute, and weights that are not finite; [`Error::Gguf`] for
    /// a tokenizer that it does not have; [`Error::File`] if the result cannot be written.
    pub fn write(
        &self,
        out: impl AsRef<Path>,
        file_types: &[GgufFileType],
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Vec<GgufFile>, Error> {
        let out = out.as_ref();
        let loaded = self.load()?;
        let importance = self.importance.as_deref().map(read_importance).transpose()?;
        let tokenizer = loaded.files.load_tokenizer()?;
        let mut notices = Vec::new();
        let mut metadata = self.general();
        match &tokenizer {
            Some(tokenizer) => metadata.extend(self.tokenizer(&loaded, tokenizer)?),
            None => {
                metadata.push(("tokenizer.ggml.model".to_owned(), "none".into()));
                notices.push("there is no tokenizer.json: the GGUF file has no tokenizer".to_owned());
            }
        }
        create_directory(out)?;
        let total = loaded.checkpoint.total_bytes() * file_types.len() as u64;
        let mut done = 0;
        let mut written = Vec::new();
        for &file_type in file_types {
            let path = out.join(format!("{}-{}.gguf", self.stem(), file_type.name().to_uppercase()));
            let options = GgufOptions {
                positions: loaded.positions.as_ref(),
                resize_model_vocab: loaded.rows,
                metadata: &metadata,
                importance: importance.as_ref(),
                max_file_bytes: self.max_file_bytes,
            };
            let adapter = loaded.adapter.as_ref();
            let totals = export_gguf(&loaded.checkpoint, adapter, file_type, options, &path, &mut |bytes| {
                done += bytes;
                progress(done.min(total), total);
            })?;
            let mut file = GgufFile {
                paths: totals.files,
                file_type,
                bytes: totals.bytes,
                weights: totals.weights,
                notices: totals.notices,
            };
            if written.is_empty() {
                file.notices.append(&mut notices);
                file.notices.extend(self.modelfile(out, &file.paths[0], &loaded, tokenizer.as_ref())?);
            }
            written.push(file);
        }
        Ok(written)
    }

    /// Writes the adapter alone into the directory `out`, for llama.cpp's `--lora`, with factors in f32, f16 or bf16. The
    /// file is named `NAME-adapter-F16.gguf` and so on. A `Modelfile-adapter` beside it applies the adapter to its base in
    /// Ollama. Returns the path.
    ///
    /// # Errors
    /// [`Error::Argument`] if the model is no adapter, and for a quantized precision; [`Error::Model`] for an adapter with
    /// more than factors of linears.
    pub fn write_adapter(&self, out: impl AsRef<Path>, precision: GgufFileType) -> Result<PathBuf, Error> {
        let kind = precision.default_type();
        if kind.is_quantized() {
            return Err(Error::Argument(format!(
                "the factors of a GGUF adapter cannot be {precision}; use f16, f32 or bf16"
            )));
        }
        let loaded = self.load()?;
        let Some(adapter) = &loaded.adapter else {
            return Err(Error::Argument(format!("{} is no adapter", self.model.display())));
        };
        create_directory(out.as_ref())?;
        let path = out.as_ref().join(format!("{}-adapter-{kind}.gguf", self.stem()));
        export_gguf_adapter(&loaded.checkpoint, adapter, kind, &self.general(), &path)?;
        if let Some(tokenizer) = loaded.files.load_tokenizer()? {
            let named = self.base.clone().or_else(|| adapter.config.base_model_name_or_path().map(PathBuf::from));
            // A checkpoint of a GGUF file is a directory of the cache.
            let base = named.filter(|base| base.is_file()).unwrap_or_else(|| loaded.checkpoint.path().to_owned());
            let base = base.canonicalize().unwrap_or(base);
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let weights = format!("FROM {}\nADAPTER ./{name}\n", base.display());
            let ends = end_tokens(&loaded.files.model, Some(&tokenizer))?;
            // Without a template, Ollama uses the base's.
            let (text, _) = modelfile(&weights, &tokenizer, &ends)?;
            write_atomic(&out.as_ref().join("Modelfile-adapter"), text.as_bytes())?;
        }
        Ok(path)
    }

    fn load(&self) -> Result<Loaded, Error> {
        if let Some(merge) = &self.merge {
            let LoadedMerge { checkpoint, adapter, positions, rows, files } = merge.load()?;
            return Ok(Loaded { checkpoint, adapter: Some(adapter), positions, rows, files });
        }
        if self.model.join(rekindle_lora::peft::CONFIG_FILE).exists() || !self.model.is_dir() {
            let mut found = self.clone();
            found.fetch(&mut |_, _| ())?;
            return found.load();
        }
        let files = ModelFiles::of_model(&self.model);
        Ok(Loaded { checkpoint: open_checkpoint(&self.model)?, adapter: None, positions: None, rows: None, files })
    }

    /// Returns the beginning of file names.
    fn stem(&self) -> &str {
        self.name.as_deref().unwrap_or("model")
    }

    fn general(&self) -> Vec<(String, MetadataValue)> {
        vec![("general.name".to_owned(), self.stem().into())]
    }

    fn tokenizer(&self, loaded: &Loaded, tokenizer: &Tokenizer) -> Result<Vec<(String, MetadataValue)>, Error> {
        let dir = loaded.files.tokenizer();
        let json: Value = read_json(&dir.join("tokenizer.json"))?;
        let rows = match loaded.rows {
            Some(rows) => rows,
            None => ModelConfig::from_checkpoint(&loaded.checkpoint)?.vocab_size(),
        };
        let templates = chat_template_sources(dir)?;
        let (plain, framed) = (tokenizer.encode("a", false)?, tokenizer.encode("a", true)?);
        let bos = tokenizer.bos_id();
        let adds_bos = framed.first() != plain.first() && framed.first().copied() == bos;
        let adds_eos = framed.last() != plain.last() && framed.last().copied() == tokenizer.eos_id();
        let described = GgufTokenizer {
            json: &json,
            vocab_size: rows,
            bos,
            eos: tokenizer.eos_id(),
            eot: tokenizer.end_of_turn(),
            padding: padding(dir, tokenizer),
            adds_bos,
            adds_eos,
            chat_template: templates.get("default").or_else(|| templates.values().next()).map(String::as_str),
            pre: self.pre.as_deref(),
        };
        Ok(described.metadata()?)
    }

    /// Writes the `Modelfile` beside a file. Returns a notice if it lacks a template.
    fn modelfile(
        &self,
        out: &Path,
        gguf: &Path,
        loaded: &Loaded,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<Option<String>, Error> {
        let Some(tokenizer) = tokenizer else { return Ok(None) };
        let name = gguf.file_name().unwrap_or_default().to_string_lossy();
        let ends = end_tokens(&loaded.files.model, Some(tokenizer))?;
        let (text, notice) = modelfile(&format!("FROM ./{name}\n"), tokenizer, &ends)?;
        write_atomic(&out.join("Modelfile"), text.as_bytes())?;
        Ok(notice)
    }
}

/// Returns the last part of a path or of a name on the hub.
fn name_of(model: &Path) -> Option<String> {
    let last = model.file_name().or_else(|| model.parent()?.file_name())?;
    Some(last.to_string_lossy().into_owned())
}

/// Returns the padding token that `tokenizer_config.json` names.
fn padding(dir: &Path, tokenizer: &Tokenizer) -> Option<u32> {
    let config: Value = read_json(&dir.join("tokenizer_config.json")).ok()?;
    let token = &config["pad_token"];
    tokenizer.token_to_id(token.as_str().or_else(|| token["content"].as_str())?)
}

fn create_directory(path: &Path) -> Result<(), Error> {
    let created = std::fs::create_dir_all(path);
    Ok(created.map_err(|source| rekindle_hub::Error::Io { path: path.to_owned(), source })?)
}
