//! Loading a model with what lies beside it.

use std::path::{Path, PathBuf};

use rekindle::{Loader, Model, Tokenizer, show_bytes};

use crate::args::ModelArgs;
use crate::failure::Failure;
use crate::{fetch, progress};

/// The model that the command line names, with its adapter.
pub(crate) fn open(args: &ModelArgs) -> Result<(Model, Option<Tokenizer>), Failure> {
    let section = args.section();
    let mut loader = section.loader(args.device)?;
    let dirs = args.adapter.iter().map(|name| fetch::directory(section.source(name)));
    let dirs: Vec<PathBuf> = dirs.collect::<Result<_, Failure>>()?;
    let adapters = args.combine.weighted(dirs)?;
    if let Some((first, _)) = adapters.first() {
        loader = loader.for_adapter(first);
    }
    let (model, tokenizer) = load(loader)?;
    if adapters.is_empty() {
        return Ok((model, tokenizer));
    }
    if model.causal_lm().lora().is_some() {
        return Err(Failure::Configuration(format!(
            "--model {} is an adapter, which stands for its base with it; leave --adapter out, or give the base",
            args.model.display()
        )));
    }
    let model = match (&args.adapter[..], &adapters[..]) {
        ([name], [(dir, 1.0)]) => load_adapter(model, name, dir)?,
        _ => {
            let model = model.load_weighted_adapters(&adapters, args.combine.combine)?;
            say(&model);
            model
        }
    };
    Ok((model, tokenizer))
}

/// The model with the adapter called `name`, which lies in `dir`.
pub(crate) fn load_adapter(model: Model, name: &Path, dir: &Path) -> Result<Model, Failure> {
    let model = model.load_adapter(dir)?;
    say(&model);
    name_unknown(&model, name);
    Ok(model)
}

/// Prints the library's notices about the adapters of a model.
pub(crate) fn say(model: &Model) {
    model.notices().iter().for_each(|notice| eprintln!("{notice}"));
}

/// Names what an adapter's configuration says that has no effect here.
fn name_unknown(model: &Model, adapter: &Path) {
    for field in model.causal_lm().adapter_config().into_iter().flat_map(|config| config.unknown_fields()) {
        eprintln!("{}: \"{field}\" is not known and has no effect", adapter.display());
    }
}

/// The model of `loader`. A checkpoint without `tokenizer.json` will do for token ids.
pub(crate) fn load(loader: Loader) -> Result<(Model, Option<Tokenizer>), Failure> {
    let mut loader = loader.on_download(progress::downloading());
    // The tokenizer is read first: it is the quicker of the two to fail.
    let files = loader.fetch()?;
    fetch::say(&files.notices);
    let tokenizer = files.load_tokenizer()?;
    Ok((load_model(loader)?, tokenizer))
}

/// The model of `loader` alone.
pub(crate) fn load_model(mut loader: Loader) -> Result<Model, Failure> {
    let files = loader.fetch()?.clone();
    let model = loader.on_progress(progress::reading("loading")).load_model()?;
    if let Some(adapter) = &files.adapter {
        eprintln!("adapter {} on {}", adapter.display(), files.model.display());
        say(&model);
        name_unknown(&model, adapter);
    }
    eprintln!("device {}, dtype {:?}", model.device(), model.causal_lm().dtype());
    if let Some(extension) = model.causal_lm().context_extension() {
        eprintln!("rope_scaling {extension}");
    }
    eprintln!("weights {}", weights(&model));
    Ok(model)
}

/// Returns the table of memory used by the weights, which `inspect` and `train --dry-run` print.
fn weights(model: &Model) -> String {
    let memory = model.memory_report();
    let bits = memory
        .bits_per_quantized_weight()
        .map_or_else(String::new, |bits| format!(", {bits:.2} bits a quantized weight"));
    format!("{}{bits}", show_bytes(memory.bytes() as usize))
}
