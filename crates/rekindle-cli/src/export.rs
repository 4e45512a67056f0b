//! `rekindle export`.

use rekindle::{GgufExport, GgufFileType, export_metrics};

use crate::args::{ExportCommand, GgufArgs, MetricsArgs};
use crate::failure::Failure;
use crate::{fetch, output, progress};

pub(crate) fn run(command: &ExportCommand) -> Result<(), Failure> {
    match command {
        ExportCommand::Gguf(args) => gguf(args),
        ExportCommand::Metrics(args) => metrics(args),
    }
}

fn metrics(args: &MetricsArgs) -> Result<(), Failure> {
    let written = export_metrics(&args.run, args.to, args.out.as_deref())?;
    output::line(&written.display().to_string())
}

fn gguf(args: &GgufArgs) -> Result<(), Failure> {
    let mut export = GgufExport::new(&args.model).hub(args.hub.access());
    if let Some(revision) = &args.hub.revision {
        export = export.revision(revision);
    }
    if let Some(base) = &args.base {
        export = export.base(base);
    }
    if let Some(name) = &args.name {
        export = export.name(name);
    }
    if let Some(path) = &args.imatrix {
        export = export.importance(path);
    }
    if let Some(bytes) = args.split_max_size {
        export = export.max_file_bytes(bytes as u64);
    }
    if let Some(name) = &args.pre_tokenizer {
        export = export.pre_tokenizer(name);
    }
    fetch::say(&export.fetch(&mut progress::downloading())?);
    // clap refuses both.
    if args.adapter_only && !args.merge_adapters {
        let precisions = if args.quant.is_empty() { &[GgufFileType::F16][..] } else { &args.quant };
        for &precision in precisions {
            output::line(&export.write_adapter(&args.out, precision)?.display().to_string())?;
        }
        return Ok(());
    }
    let file_types = if args.quant.is_empty() { &[GgufFileType::Q4_K_M][..] } else { &args.quant };
    for file in export.write(&args.out, file_types, &mut progress::reading("exporting"))? {
        fetch::say(&file.notices);
        let (megabytes, bits) = (file.bytes as f64 / 1e6, file.bits_per_weight());
        eprintln!("{}: {megabytes:.1} MB, {bits:.2} bits per weight", file.file_type);
        for path in &file.paths {
            output::line(&path.display().to_string())?;
        }
    }
    Ok(())
}
