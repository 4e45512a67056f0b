//! Loading of a model with its tokenizer and adapters.

use std::path::{Path, PathBuf};

use rekindle::{Error, Loader, Model, Tokenizer, show_bytes};

use crate::args::{LoadArgs, ModelArgs, NamedAdapter};
use crate::failure::Failure;
use crate::{fetch, progress};

/// Loads the model of the command line, with its adapter.
pub(crate) fn open(args: &ModelArgs) -> Result<(Model, Option<Tokenizer>), Failure> {
    let arguments = args.load.arguments(&args.model);
    let dirs = args.adapter.iter().map(|name| fetch::directory(arguments.adapter(name)));
    let dirs: Vec<PathBuf> = dirs.collect::<Result<_, Failure>>()?;
    let adapters = args.combine.weighted(dirs)?;
    let mut loader = Loader::new(arguments).device(args.load.device);
    if let Some((first, _)) = adapters.first() {
        loader = loader.for_adapter(first);
    }
    let (model, tokenizer) = load(loader)?;
    if adapters.is_empty() {
        return Ok((model, tokenizer));
    }
    if model.causal_lm().lora().is_some() {
        return Err(Failure::Configuration(format!(
            "--model {} is an adapter, which also loads its base; omit --adapter, or pass the base as --model",
            args.model.display()
        )));
    }
    let model = model.load_weighted_adapters(&adapters, args.combine.combine)?;
    say(&model);
    Ok((model, tokenizer))
}

/// Loads a model with adapters by name; the last one is active.
pub(crate) fn open_named(
    model: &Path,
    adapters: &[NamedAdapter],
    args: &LoadArgs,
) -> Result<(Model, Option<Tokenizer>), Failure> {
    let arguments = args.arguments(model);
    let dirs = adapters.iter().map(|adapter| fetch::directory(arguments.adapter(&adapter.path)));
    let dirs: Vec<PathBuf> = dirs.collect::<Result<_, Failure>>()?;
    let mut loader = Loader::new(arguments).device(args.device);
    if let Some(first) = dirs.first() {
        loader = loader.for_adapter(first);
    }
    let (mut model, tokenizer) = load(loader)?;
    let noted = model.notices().len();
    for (adapter, dir) in adapters.iter().zip(&dirs) {
        model.load_adapter_as(&adapter.name, dir)?;
    }
    model.notices()[noted..].iter().for_each(|notice| eprintln!("{notice}"));
    Ok((model, tokenizer))
}

/// Returns the tokenizer, or an error that says what the checkpoint lacks.
pub(crate) fn need_tokenizer(model: &Model, tokenizer: Option<Tokenizer>) -> Result<Tokenizer, Failure> {
    match tokenizer {
        Some(tokenizer) => Ok(tokenizer),
        None => Ok(Tokenizer::from_dir(model.path()).map_err(Error::from)?),
    }
}

/// Prints the library's notices about the adapters of a model.
pub(crate) fn say(model: &Model) {
    model.notices().iter().for_each(|notice| eprintln!("{notice}"));
}

/// Loads the model of `loader` and its tokenizer, which may be missing.
pub(crate) fn load(loader: Loader<'_>) -> Result<(Model, Option<Tokenizer>), Failure> {
    let mut loader = loader.on_download(progress::downloading());
    // The tokenizer is read first because it fails faster.
    let files = loader.fetch()?;
    fetch::say(&files.notices);
    let tokenizer = files.load_tokenizer()?;
    Ok((load_model(loader)?, tokenizer))
}

/// Loads the model of `loader`.
fn load_model(mut loader: Loader<'_>) -> Result<Model, Failure> {
    let files = loader.fetch()?.clone();
    let model = loader.on_progress(progress::reading("loading")).load_model()?;
    if let Some(adapter) = &files.adapter {
        eprintln!("adapter {} on {}", adapter.display(), files.model.display());
        say(&model);
    }
    describe(&model);
    Ok(model)
}

/// Prints the device, the dtype, the context extension and the memory of a model's weights.
pub(crate) fn describe(model: &Model) {
    eprintln!("device {}, dtype {:?}", model.device(), model.causal_lm().dtype());
    if let Some(extension) = model.causal_lm().context_extension() {
        eprintln!("rope_scaling {extension}");
    }
    let memory = model.memory_report();
    let bits = memory.bits_per_quantized_weight();
    let bits = bits.map_or_else(String::new, |bits| format!(", {bits:.2} bits per quantized weight"));
    eprintln!("weights {}{bits}", show_bytes(memory.bytes() as usize));
}
