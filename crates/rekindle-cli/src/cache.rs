//! `rekindle cache`: listing and pruning of downloads.

use std::path::PathBuf;

use rekindle::Error;
use rekindle::cache::{CachedModel, CachedRevision, Prune, default_dir, list, prune};
use serde_json::json;

use crate::args::{CacheCommand, CacheDir, ListArgs, PruneArgs};
use crate::failure::Failure;
use crate::output;

pub(crate) fn run(command: &CacheCommand) -> Result<(), Failure> {
    match command {
        CacheCommand::Ls(args) => ls(args),
        CacheCommand::Prune(args) => remove(args),
    }
}

fn ls(args: &ListArgs) -> Result<(), Failure> {
    let dir = dir(&args.place);
    let models = list(&dir).map_err(Error::from)?;
    if args.json {
        return models.iter().try_for_each(|model| output::line(&to_json(model).to_string()));
    }
    models.iter().try_for_each(|model| output::line(&table(model)))?;
    let bytes = bytes(models.iter().map(|model| model.bytes).sum());
    let noun = if models.len() == 1 { "model" } else { "models" };
    output::line(&format!("{bytes}  {} {noun} in {}", models.len(), dir.display()))
}

fn remove(args: &PruneArgs) -> Result<(), Failure> {
    let what = args.model.as_deref().map_or(Prune::Unreferenced, Prune::Model);
    let pruned = prune(&dir(&args.place), what).map_err(Error::from)?;
    for name in &pruned.busy {
        eprintln!("{name} is being downloaded and is not removed");
    }
    pruned.models.iter().try_for_each(|name| output::line(name))?;
    output::line(&format!("{} are free now", bytes(pruned.bytes).trim_start()))
}

fn dir(place: &CacheDir) -> PathBuf {
    place.cache_dir.clone().unwrap_or_else(default_dir)
}

/// Formats a line for the model and one for each revision.
fn table(model: &CachedModel) -> String {
    let incomplete = match model.incomplete_bytes {
        0 => String::new(),
        rest => format!(", {} of them incomplete", bytes(rest).trim_start()),
    };
    let mut text = format!("{}  {}{incomplete}", bytes(model.bytes), model.name);
    for CachedRevision { commit, references, files, bytes: size } in &model.revisions {
        let references = if references.is_empty() { "no branch or tag".to_owned() } else { references.join(", ") };
        text += &format!("\n{}    {commit}  {files} files  {references}", bytes(*size));
    }
    text
}

fn to_json(model: &CachedModel) -> serde_json::Value {
    let revision = |revision: &CachedRevision| {
        let CachedRevision { commit, references, files, bytes } = revision;
        json!({"commit": commit, "references": references, "files": files, "bytes": bytes})
    };
    json!({
        "name": model.name,
        "path": model.path,
        "bytes": model.bytes,
        "incomplete_bytes": model.incomplete_bytes,
        "revisions": model.revisions.iter().map(revision).collect::<Vec<_>>(),
    })
}

/// Formats a number in ten characters.
fn bytes(count: u64) -> String {
    let units = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    let count = count as f64;
    match units.iter().find(|(unit, _)| count >= *unit) {
        Some((unit, name)) => format!("{:>7.1} {name}", count / unit),
        None => format!("{count:>8} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_and_its_revisions() {
        let revision = |commit: &str, references: &[&str]| CachedRevision {
            commit: commit.to_owned(),
            references: references.iter().map(ToString::to_string).collect(),
            files: 2,
            bytes: 1010,
        };
        let model = CachedModel {
            name: "org/model".to_owned(),
            path: PathBuf::new(),
            revisions: vec![revision("1111", &[]), revision("2222", &["main", "v1"])],
            bytes: 3_510_000_000,
            incomplete_bytes: 500,
            last_used: None,
        };
        let expected = "    3.5 GB  org/model, 500 B of them incomplete\n    1.0 kB    1111  2 files  no branch or tag\n    \
                        1.0 kB    2222  2 files  main, v1";
        assert_eq!(table(&model), expected);
    }
}
