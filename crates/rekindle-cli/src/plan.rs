//! `rekindle plan`.

use core::fmt;

use rekindle::run::RunConfig;
use rekindle::{Error, MemoryFit, RunPlanner, counted, show_bytes};
use serde::Serialize;

use crate::args::PlanArgs;
use crate::failure::Failure;
use crate::output;
use crate::train::TerminalObserver;

pub(crate) fn run(args: &PlanArgs) -> Result<(), Failure> {
    let config = RunConfig::load(&args.run_file, &args.overrides)?;
    let observer = TerminalObserver::default();
    let (loader, _) = config.loader(&observer)?;
    let mut planner = config.planner(&loader, args.device_memory)?;
    if let Some(gpus) = args.gpus {
        if planner.card().is_none() {
            return Err(Failure::Configuration(format!(
                "--gpus: the device of the run is {}; set device=cuda, and --device-memory if there is no GPU here",
                planner.device()
            )));
        }
        planner = planner.on_ranks(gpus, None)?;
    }
    let decided = planner.decide(&planner.rows());
    let fit = match &decided {
        Err(Error::DoesNotFit(fit)) => (**fit).clone(),
        _ => planner.fit(&planner.rows())?,
    };
    let ranks = args.gpus.map(|gpus| RankPlan::of(&planner, gpus)).transpose()?;
    if args.json {
        let report = PlanReport { fit: &fit, ranks };
        output::line(&serde_json::to_string(&report).expect("a plan is plain numbers"))?;
    } else {
        let on = planner.card().map_or_else(|| planner.device().to_string(), str::to_owned);
        let (rows, tokens) = (counted(fit.plan.rows, "row"), counted(fit.plan.tokens, "token"));
        let rows = format!("{rows}, {tokens} in a pass");
        output::line(&format!("{on}; {rows}\n{fit}"))?;
        if let Some(ranks) = &ranks {
            output::line(&ranks.to_string())?;
        }
        if let Some(time) = planner.token_time(fit.plan.use_gradient_checkpointing)? {
            let passes = config.train.rows_per_step().div_ceil(args.gpus.unwrap_or(1) * fit.plan.rows.max(1));
            let tokens = (passes * fit.plan.tokens) as f64;
            output::line(&format!("a step of {tokens} tokens takes {}", time.of(tokens)))?;
            if let Some(steps) = config.train.max_steps {
                output::line(&format!("{} take up to {}", counted(steps, "step"), time.of(steps as f64 * tokens)))?;
            }
        }
    }
    decided.map(|_| ()).map_err(Failure::from)
}

/// A plan as JSON.
#[derive(Serialize)]
struct PlanReport<'a> {
    #[serde(flatten)]
    fit: &'a MemoryFit,
    #[serde(skip_serializing_if = "Option::is_none")]
    ranks: Option<RankPlan>,
}

/// The memory and the traffic of several GPUs.
#[derive(Serialize)]
struct RankPlan {
    gpus: usize,
    /// True if the optimizer's state is divided among them, as the run does it.
    shard_optimizer: bool,
    /// The peak of each GPU with the whole state, and with a part of it where that is possible.
    peak_whole_state: usize,
    peak_divided_state: Option<usize>,
    /// Bytes that each GPU sends in a step, and receives as well.
    bytes_per_step: usize,
}

impl RankPlan {
    fn of(planner: &RunPlanner, gpus: usize) -> Result<Self, Failure> {
        let peak = |shard_optimizer: bool| {
            let mut planner = planner.on_ranks(gpus, Some(shard_optimizer))?;
            planner.plan(&planner.rows()).map(|plan| plan.peak)
        };
        Ok(Self {
            gpus,
            shard_optimizer: planner.is_sharded(),
            peak_whole_state: peak(false)?,
            // Weights that are trained in place cannot divide it.
            peak_divided_state: peak(true).ok(),
            bytes_per_step: planner.bytes_per_step(),
        })
    }
}

impl fmt::Display for RankPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { gpus, shard_optimizer, peak_whole_state, peak_divided_state, bytes_per_step } = self;
        let chosen = |is_chosen: bool| if is_chosen { ", as this run does" } else { "" };
        let peak = show_bytes(*peak_whole_state);
        writeln!(f, "peak of each of {gpus} GPUs with the whole optimizer state: {peak}{}", chosen(!shard_optimizer))?;
        if let Some(peak) = peak_divided_state {
            let peak = show_bytes(*peak);
            writeln!(f, "with 1/{gpus} of it (shard_optimizer = true): {peak}{}", chosen(*shard_optimizer))?;
        }
        write!(f, "each GPU sends {} in a step and receives as much", show_bytes(*bytes_per_step))
    }
}
