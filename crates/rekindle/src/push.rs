//! Uploads of results to the Hugging Face hub.

use std::fs;
use std::path::{Path, PathBuf};

use rekindle_hub::{AtomicDir, UploadContent, UploadFile, UploadOptions, check_upload, is_companion, upload};
use rekindle_lora::peft::{CONFIG_FILE, TENSORS_FILE};
use rekindle_models::Positions;
use rekindle_train::{PublishedCard, PublishedForm};
use serde_json::Value;

pub use rekindle_hub::Uploaded as Pushed;

use crate::merge::of_run;
use crate::{Error, GgufExport, GgufFileType, HubAccess, Merge};

/// An upload of a run's result to the Hugging Face hub: the adapter or model, the merged model, or GGUF files, with the
/// model card and the plot of the losses.
///
/// [`prepare`](Self::prepare) collects the files and sends nothing; [`PreparedPush::send`] uploads them in one commit.
///
/// ```no_run
/// # fn main() -> Result<(), rekindle::Error> {
/// let prepared = rekindle::Push::new("outputs/first", "ada/first").private(true).prepare(&mut |_, _| ())?;
/// for (path, bytes) in prepared.files() {
///     println!("{path} {bytes}");
/// }
/// println!("{}", prepared.send(|_, _| ())?.url);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Push {
    run: PathBuf,
    to: String,
    private: bool,
    merge: bool,
    gguf: Vec<GgufFileType>,
    base: Option<String>,
    message: Option<String>,
    access: HubAccess,
}

/// The files of an upload. Merged models and GGUF files are in a temporary directory, which is removed with this value.
#[derive(Debug)]
pub struct PreparedPush {
    push: Push,
    files: Vec<UploadFile>,
    notices: Vec<String>,
    /// The directory of generated files.
    _scratch: Option<AtomicDir>,
}

impl Push {
    /// Returns an upload of the result of a run, given by its output directory, or of an adapter or a checkpoint in a
    /// directory, to the repository `to` (`organization/name`).
    pub fn new(run: impl Into<PathBuf>, to: impl Into<String>) -> Self {
        let (run, to, access) = (run.into(), to.into(), HubAccess::default());
        Self { run, to, private: false, merge: false, gguf: Vec::new(), base: None, message: None, access }
    }

    /// If true, the repository is created as a private one, and a public repository is refused.
    #[must_use]
    pub fn private(mut self, private: bool) -> Self {
        self.private = private;
        self
    }

    /// If true, an adapter is merged into its base, and the whole model is uploaded.
    #[must_use]
    pub fn merge(mut self, merge: bool) -> Self {
        self.merge = merge;
        self
    }

    /// Sets the precisions of GGUF files, which are uploaded instead of an adapter or a checkpoint.
    #[must_use]
    pub fn gguf(mut self, file_types: impl Into<Vec<GgufFileType>>) -> Self {
        self.gguf = file_types.into();
        self
    }

    /// Sets the name on the hub of a base model that was trained from a directory.
    #[must_use]
    pub fn base_model(mut self, name: impl Into<String>) -> Self {
        self.base = Some(name.into());
        self
    }

    /// Sets the message of the commit. Default: the kind of result.
    #[must_use]
    pub fn message(mut self, message: impl Into<String>) -> Self {
        self.message = Some(message.into());
        self
    }

    /// Sets the token, and the cache for the base of an adapter to merge.
    #[must_use]
    pub fn hub(mut self, access: HubAccess) -> Self {
        self.access = access;
        self
    }

    /// Checks the name of the repository, the presence of a token, and that the network is not disabled. Sends nothing.
    ///
    /// # Errors
    /// [`Error::File`] of the kind [`ErrorKind::Hub`](crate::ErrorKind::Hub).
    pub fn check(&self) -> Result<(), Error> {
        Ok(check_upload(&self.to, &self.options())?)
    }

    fn options(&self) -> UploadOptions<'static> {
        let what = match (self.gguf.is_empty(), self.merge) {
            (false, _) => "GGUF files",
            (true, true) => "merged model",
            (true, false) => "result of training",
        };
        UploadOptions {
            token: self.access.token.as_ref().map(|token| token.as_str().to_owned()),
            private: self.private,
            message: self.message.clone().unwrap_or_else(|| format!("Upload {what} with Rekindle")),
            ..UploadOptions::default()
        }
    }

    /// Collects the files to upload; merges and exports if that was asked for. Nothing is sent. `progress` receives the
    /// bytes of weights read so far and in total.
    ///
    /// # Errors
    /// [`Error::Argument`] for a directory without a result, and for an adapter whose base is a directory without
    /// [`base_model`](Self::base_model); the errors of [`Merge`] and [`GgufExport`].
    pub fn prepare(self, progress: &mut dyn FnMut(u64, u64)) -> Result<PreparedPush, Error> {
        let result = self.result()?;
        let is_adapter = result.join(CONFIG_FILE).exists();
        if self.merge && !is_adapter {
            return Err(Error::Argument(format!("{} is no adapter; leave out the merge", result.display())));
        }
        let generates = self.merge || !self.gguf.is_empty();
        let scratch = generates.then(|| AtomicDir::create(&result.with_file_name("push"))).transpose()?;
        let mut notices = Vec::new();
        let mut files = match &scratch {
            Some(scratch) => self.generated(&result, scratch.path(), &mut notices, progress)?,
            None => files_of(&result, is_adapter, &mut notices)?,
        };
        let base = self.base_name(&result, is_adapter)?;
        if base.is_none() && is_adapter && !generates {
            return Err(Error::Argument(format!(
                "the adapter in {} was trained on a directory of this machine; pass the base's name on the hub \
                 (--base-model organization/name)",
                result.display()
            )));
        }
        if base.is_none() {
            notices.push("the model card names no base model; pass its name on the hub with --base-model".to_owned());
        }
        if self.base.is_some() && is_adapter && !generates {
            let config = files.iter_mut().find(|file| file.path == CONFIG_FILE);
            if let (Some(config), Some(base)) = (config, &base) {
                config.content = with_base(&result.join(CONFIG_FILE), base)?;
            }
        }
        self.add_card(&result, base, &mut files, &mut notices)?;
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(PreparedPush { push: self, files, notices, _scratch: scratch })
    }

    /// Returns the directory of the adapter or model.
    fn result(&self) -> Result<PathBuf, Error> {
        let model = self.run.join("model");
        let found = if model.join("config.json").exists() { model } else { of_run(self.run.clone()) };
        if found.join(CONFIG_FILE).exists() || found.join("config.json").exists() {
            return Ok(found);
        }
        Err(Error::Argument(format!(
            "{} holds no adapter and no model; pass the output directory of a finished run, or the directory of an \
             adapter or a checkpoint",
            self.run.display()
        )))
    }

    /// Writes the merged model or GGUF files into `scratch`.
    fn generated(
        &self,
        result: &Path,
        scratch: &Path,
        notices: &mut Vec<String>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Vec<UploadFile>, Error> {
        if self.gguf.is_empty() {
            let mut merge = Merge::new(result).hub(self.access.clone());
            notices.extend(merge.fetch(&mut |_, _| ())?);
            let merged = scratch.join("model");
            merge.write(&merged, progress)?;
            return files_of(&merged, false, notices);
        }
        let name = self.to.rsplit('/').next().unwrap_or_default();
        let mut export = GgufExport::new(result).name(name).hub(self.access.clone());
        notices.extend(export.fetch(&mut |_, _| ())?);
        for file in export.write(scratch, &self.gguf, progress)? {
            notices.extend(file.notices);
        }
        Ok(entries(scratch)?.into_iter().map(|(path, file)| on_disk(path, file)).collect())
    }

    /// Returns the name of the base on the hub: the given one, or the recorded one unless it is a path.
    fn base_name(&self, result: &Path, is_adapter: bool) -> Result<Option<String>, Error> {
        if let Some(base) = &self.base {
            return Ok(Some(base.clone()));
        }
        let recorded = if is_adapter {
            let config: Value = rekindle_hub::read_json(&result.join(CONFIG_FILE))?;
            config["base_model_name_or_path"].as_str().map(str::to_owned)
        } else {
            let card = fs::read_to_string(result.join(README)).unwrap_or_default();
            card.lines().find_map(|line| Some(line.strip_prefix("base_model: ")?.trim_matches('"').to_owned()))
        };
        Ok(recorded.filter(|name| is_hub_name(name)))
    }

    /// Adds the model card and the plot of the losses, if the result has a card.
    fn add_card(
        &self,
        result: &Path,
        base: Option<String>,
        files: &mut Vec<UploadFile>,
        notices: &mut Vec<String>,
    ) -> Result<(), Error> {
        let path = result.join(README);
        let Ok(card) = fs::read_to_string(&path) else {
            notices.push(format!("there is no model card: {} is missing", path.display()));
            return Ok(());
        };
        let plot = result.with_file_name(PLOT);
        let has_plot = plot.is_file();
        let gguf = || files.iter().filter(|file| file.path.ends_with(".gguf")).map(|file| file.path.clone()).collect();
        let form = match (self.gguf.is_empty(), self.merge || !result.join(CONFIG_FILE).exists()) {
            (false, _) => PublishedForm::Gguf(gguf()),
            (true, true) => PublishedForm::Model,
            (true, false) => PublishedForm::Adapter,
        };
        let text = PublishedCard { name: self.to.clone(), form, base, has_plot }.rewrite(&card);
        files.retain(|file| file.path != README);
        files.push(UploadFile { path: README.to_owned(), content: UploadContent::Bytes(text.into_bytes()) });
        if has_plot {
            files.push(on_disk(PLOT.to_owned(), plot));
        }
        Ok(())
    }
}

impl PreparedPush {
    /// Returns the path in the repository and the bytes of every file.
    pub fn files(&self) -> Vec<(&str, u64)> {
        let size = |content: &UploadContent| match content {
            UploadContent::File(path) => fs::metadata(path).map_or(0, |metadata| metadata.len()),
            UploadContent::Bytes(bytes) => bytes.len() as u64,
        };
        self.files.iter().map(|file| (file.path.as_str(), size(&file.content))).collect()
    }

    /// Returns notices for the user, such as files that are left out.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Creates the repository if it does not exist, and uploads the files in one commit. A repeated upload sends only
    /// large files that the hub does not have. `progress` receives the bytes of large files sent so far and in total.
    ///
    /// # Errors
    /// [`Error::File`] of the kind [`ErrorKind::Hub`](crate::ErrorKind::Hub): no token, no permission, no connection.
    pub fn send(&self, progress: impl FnMut(u64, u64)) -> Result<Pushed, Error> {
        let options = UploadOptions { on_progress: Some(Box::new(progress)), ..self.push.options() };
        Ok(upload(&self.push.to, &self.files, options)?)
    }
}

const README: &str = "README.md";

/// The plot of the losses in a run's output directory.
const PLOT: &str = "loss.svg";

fn on_disk(path: String, file: PathBuf) -> UploadFile {
    UploadFile { path, content: UploadContent::File(file) }
}

/// Returns the files of an adapter or a checkpoint; a notice lists the others, such as the state of a trainer.
fn files_of(dir: &Path, is_adapter: bool, notices: &mut Vec<String>) -> Result<Vec<UploadFile>, Error> {
    let is_weights = |name: &str| name.starts_with("model") && name.contains(".safetensors");
    let belongs = |name: &str| {
        is_companion(name)
            || name == README
            || match is_adapter {
                true => [CONFIG_FILE, TENSORS_FILE, Positions::FILE].contains(&name),
                false => name == "config.json" || is_weights(name),
            }
    };
    let (files, others): (Vec<_>, Vec<_>) = entries(dir)?.into_iter().partition(|(name, _)| belongs(name));
    if !others.is_empty() {
        let names: Vec<String> = others.into_iter().map(|(name, _)| name).collect();
        notices.push(format!("not uploaded: {}", names.join(", ")));
    }
    Ok(files.into_iter().map(|(path, file)| on_disk(path, file)).collect())
}

/// Lists the files of a directory and of its folders, by their path in it.
fn entries(dir: &Path) -> Result<Vec<(String, PathBuf)>, Error> {
    let failed = |source| rekindle_hub::Error::Io { path: dir.to_owned(), source };
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            files.extend(entries(&path)?.into_iter().map(|(inside, file)| (format!("{name}/{inside}"), file)));
        } else {
            files.push((name, path));
        }
    }
    files.sort();
    Ok(files)
}

/// Returns true if a recorded base is a name on the hub and not a path.
fn is_hub_name(name: &str) -> bool {
    name.matches('/').count() == 1
        && !name.starts_with(['/', '.', '~'])
        && !name.ends_with('/')
        && !Path::new(name).exists()
}

/// Returns an adapter's configuration with another base.
fn with_base(path: &Path, base: &str) -> Result<UploadContent, Error> {
    let mut config: Value = rekindle_hub::read_json(path)?;
    config["base_model_name_or_path"] = base.into();
    config["revision"] = Value::Null;
    Ok(UploadContent::Bytes(format!("{config:#}\n").into_bytes()))
}
