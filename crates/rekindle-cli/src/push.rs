//! `rekindle push`.

use indicatif::DecimalBytes;
use rekindle::{Push, counted};

use crate::args::PushArgs;
use crate::failure::Failure;
use crate::{fetch, output, progress};

pub(crate) fn run(args: &PushArgs) -> Result<(), Failure> {
    let mut push = Push::new(&args.run, &args.to).private(args.private).merge(args.merge).gguf(args.gguf.clone());
    if let Some(base) = &args.base_model {
        push = push.base_model(base);
    }
    if let Some(message) = &args.message {
        push = push.message(message);
    }
    if !args.dry_run {
        // A merge takes long, and a missing token is known before it.
        push.check()?;
    }
    let verb = if args.merge { "merging" } else { "exporting" };
    let prepared = push.prepare(&mut progress::reading(verb))?;
    fetch::say(prepared.notices());
    let files = prepared.files();
    let total = files.iter().map(|(_, bytes)| bytes).sum();
    let what = format!("{}, {}", counted(files.len(), "file"), DecimalBytes(total));
    if args.dry_run {
        for (path, bytes) in files {
            output::line(&format!("{path}  {}", DecimalBytes(bytes)))?;
        }
        let visibility = if args.private { " (private)" } else { "" };
        eprintln!("{what} for {}{visibility}; nothing was sent (--dry-run)", args.to);
        return Ok(());
    }
    eprintln!("uploading {what} to {}", args.to);
    let pushed = prepared.send(progress::reading("uploading"))?;
    if pushed.created {
        eprintln!("created {}", args.to);
    }
    if !pushed.ignored.is_empty() {
        eprintln!("the repository's .gitignore excludes {}", pushed.ignored.join(", "));
    }
    match pushed.changed.len() {
        0 => eprintln!("the repository has all files already"),
        changed => eprintln!("commit {}: {} changed", pushed.commit, counted(changed, "file")),
    }
    output::line(&pushed.url)
}
