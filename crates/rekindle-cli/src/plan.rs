//! `rekindle plan`, and the same plan before a run is loaded.

use std::path::PathBuf;

use rekindle::run::RunConfig;
use rekindle::{Error, GradientCheckpointing, Loader, Rows, RunPlanner, counted, parse_device, show_bytes};

use crate::args::PlanArgs;
use crate::failure::Failure;
use crate::{fetch, output, progress};

pub(crate) fn run(args: &PlanArgs) -> Result<(), Failure> {
    let config = RunConfig::load(&args.run_file, &args.overrides)?;
    let (loader, _) = loader(&config)?;
    let mut planner = planner(&config, &loader, args.device_memory)?;
    let decided = planner.decide(&planner.rows());
    let fit = match &decided {
        Err(Error::DoesNotFit(fit)) => (**fit).clone(),
        _ => planner.fit(&planner.rows())?,
    };
    if args.json {
        output::line(&serde_json::to_string(&fit).expect("a plan is plain numbers"))?;
    } else {
        let on = planner.card().map_or_else(|| planner.device().to_string(), str::to_owned);
        let (rows, tokens) = (counted(fit.plan.rows, "row"), counted(fit.plan.tokens, "token"));
        let rows = format!("{rows}, {tokens} in a pass");
        output::line(&format!("{on}; {rows}\n{fit}"))?;
        if let Some(time) = planner.token_time(fit.plan.use_gradient_checkpointing)? {
            let passes = config.train.gradient_accumulation_steps;
            let tokens = (passes * fit.plan.tokens) as f64;
            output::line(&format!("a step of {tokens} tokens takes {}", time.of(tokens)))?;
            if let Some(steps) = config.train.max_steps {
                output::line(&format!("{} take up to {}", counted(steps, "step"), time.of(steps as f64 * tokens)))?;
            }
        }
    }
    decided.map(|_| ()).map_err(Failure::from)
}

/// Refuses a run that does not fit before anything is loaded, and decides what `"auto"` stands for.
///
/// The plan is first for rows as long as they can be. Only where that does not fit, or something is to be decided, the
/// rows are looked at.
pub(crate) fn check(config: &mut RunConfig, loader: &mut Loader) -> Result<(), Failure> {
    let mut planner = planner(config, loader, None)?;
    let plan = match planner.decide(&planner.rows()) {
        Err(Error::DoesNotFit(_)) => planner.decide(&rows(config, loader, &planner)?)?,
        Ok(plan) if is_auto(config) && plan.use_gradient_checkpointing.recomputes() => {
            planner.decide(&rows(config, loader, &planner)?)?
        }
        decided => decided?,
    };
    let most = show_bytes(plan.peak);
    let available =
        planner.available().map_or_else(String::new, |bytes| format!(" of {} available", show_bytes(bytes)));
    let mapped = match plan.mapped {
        0 => String::new(),
        mapped => format!("; resident memory also counts up to {} of mapped checkpoint files", show_bytes(mapped)),
    };
    eprintln!("memory: peak {most}{available} for {} in a pass{mapped}", counted(plan.tokens, "token"));
    if is_auto(config) {
        let decided = plan.use_gradient_checkpointing;
        for place in [
            Some(&mut config.model.use_gradient_checkpointing),
            config.lora.as_mut().map(|lora| &mut lora.config.use_gradient_checkpointing),
        ] {
            if let Some(place) = place.filter(|place| **place == GradientCheckpointing::Auto) {
                *place = decided;
            }
        }
        eprintln!("use_gradient_checkpointing = \"auto\" is {}", serde_json::to_string(&decided).expect("a word"));
    }
    Ok(())
}

/// The loader of a run, for the adapter that it goes on with, and where that lies.
pub(crate) fn loader(config: &RunConfig) -> Result<(Loader, Option<PathBuf>), Failure> {
    let loader = config.model.loader(parse_device(&config.device).map_err(Error::from)?)?;
    let mut loader = loader.on_download(progress::downloading());
    let start = config.lora.as_ref().and_then(|lora| lora.init_from.as_ref());
    let start = start.map(|name| fetch::directory(config.model.source(name))).transpose()?;
    if let Some(dir) = &start {
        loader = loader.for_adapter(dir);
    }
    Ok((loader, start))
}

fn planner(config: &RunConfig, loader: &Loader, memory: Option<usize>) -> Result<RunPlanner, Failure> {
    let lora = config.lora.as_ref().map(|lora| lora.config.clone());
    let planner = loader.planner(lora, config.train.clone(), memory)?;
    Ok(if config.data.eval.is_some() { planner.with_evaluation() } else { planner })
}

/// The longest rows that can meet in a pass.
fn rows(config: &RunConfig, loader: &mut Loader, planner: &RunPlanner) -> Result<Rows, Failure> {
    let tokenizer = loader.fetch()?.load_tokenizer()?;
    Ok(planner.rows_of(tokenizer.as_ref(), &config.data.train_source(&config.model))?)
}

fn is_auto(config: &RunConfig) -> bool {
    let lora = config.lora.as_ref().map_or(GradientCheckpointing::Off, |lora| lora.config.use_gradient_checkpointing);
    match lora {
        GradientCheckpointing::Off => config.model.use_gradient_checkpointing == GradientCheckpointing::Auto,
        asked => asked == GradientCheckpointing::Auto,
    }
}
