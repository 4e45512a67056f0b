//! Loading a model with what lies beside it.

use std::path::Path;

use rekindle::{Error, Loader, Model, Tokenizer};

use crate::args::ModelArgs;
use crate::failure::Failure;
use crate::progress;

/// The model that the command line names, with its adapter.
pub(crate) fn open(args: &ModelArgs) -> Result<(Model, Option<Tokenizer>), Failure> {
    let (model, tokenizer) = load(args.section().loader(args.device)?, &args.model)?;
    let model = match &args.adapter {
        Some(adapter) => load_adapter(model, adapter)?,
        None => model,
    };
    Ok((model, tokenizer))
}

/// The model with the adapter in `dir`; names what its configuration says that has no effect here.
pub(crate) fn load_adapter(model: Model, dir: &Path) -> Result<Model, Failure> {
    let model = model.load_adapter(dir)?;
    for field in model.causal_lm().adapter_config().into_iter().flat_map(|config| config.unknown_fields()) {
        eprintln!("{}: \"{field}\" is not known and has no effect", dir.display());
    }
    Ok(model)
}

/// The model of `loader`, which reads `path`. A checkpoint without `tokenizer.json` will do for token ids.
pub(crate) fn load(loader: Loader, path: &Path) -> Result<(Model, Option<Tokenizer>), Failure> {
    let has_tokenizer = path.join("tokenizer.json").is_file();
    // The tokenizer is read first: it is the quicker of the two to fail.
    let tokenizer = has_tokenizer.then(|| Tokenizer::from_dir(path)).transpose().map_err(Error::from)?;
    let model = loader.on_progress(progress::reading("loading")).load_model()?;
    eprintln!("device {}, dtype {:?}", model.device(), model.causal_lm().dtype());
    eprintln!("{}", model.memory_report());
    Ok((model, tokenizer))
}
