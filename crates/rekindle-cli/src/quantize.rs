//! `rekindle quantize`.

use rekindle::{Blocksize, Error, LoadIn, QuantConfig, QuantType};

use crate::args::QuantizeArgs;
use crate::failure::Failure;
use crate::{fetch, output, progress};

pub(crate) fn run(args: &QuantizeArgs) -> Result<(), Failure> {
    let load_in = format(args)?;
    let model = fetch::directory(args.hub.source(&args.model))?;
    let skip = args.skip_modules.as_deref();
    let report = rekindle::quantize(&model, load_in, skip, &args.out, &mut progress::reading("quantizing"))?;
    eprintln!("{report}");
    output::line(&args.out.display().to_string())
}

fn format(args: &QuantizeArgs) -> Result<LoadIn, Failure> {
    let by_row = match args.to.as_str() {
        "int8" => Some(LoadIn::EightBit),
        "fp8" => Some(LoadIn::Fp8),
        _ => None,
    };
    if let Some(load_in) = by_row {
        if args.blocksize.is_some() || args.double_quant.is_some() {
            return Err(Failure::Configuration(format!(
                "--to {} has one scale per row; omit --blocksize and --double-quant, or use --to nf4",
                args.to
            )));
        }
        return Ok(load_in);
    }
    let quant_type = args
        .to
        .parse::<QuantType>()
        .map_err(|_| Failure::Configuration(format!("--to {} is unknown; use one of nf4, fp4, int8, fp8", args.to)))?;
    let mut config = QuantConfig { quant_type, ..QuantConfig::default() };
    if let Some(size) = args.blocksize {
        config.blocksize = Blocksize::new(size).map_err(|error| Error::Argument(error.to_string()))?;
    }
    config.double_quant = args.double_quant.unwrap_or(config.double_quant);
    Ok(LoadIn::FourBit(Some(config)))
}
