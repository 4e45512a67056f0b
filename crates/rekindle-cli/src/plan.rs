//! `rekindle plan`.

use core::fmt;

use rekindle::run::RunConfig;
use rekindle::{Error, MemoryFit, RankShares, RunPlanner, counted, show_bytes};
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
    let nodes = args.nodes.unwrap_or(1);
    let gpus = args.gpus.map(|gpus| gpus * nodes);
    if let Some(gpus) = gpus {
        if planner.card().is_none() {
            return Err(Failure::Configuration(format!(
                "--gpus: the device of the run is {}; set device=cuda, and --device-memory if there is no GPU here",
                planner.device()
            )));
        }
        planner = planner.on_ranks(gpus, RankShares::default())?;
    }
    let decided = planner.decide(&planner.rows());
    let fit = match &decided {
        Err(Error::DoesNotFit(fit)) => (**fit).clone(),
        _ => planner.fit(&planner.rows())?,
    };
    let ranks = gpus.map(|gpus| RankPlan::of(&planner, gpus, nodes)).transpose()?;
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
            let passes = config.train.rows_per_step().div_ceil(gpus.unwrap_or(1) * fit.plan.rows.max(1));
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
    /// GPUs of all machines.
    gpus: usize,
    nodes: usize,
    /// True if the optimizer's state is divided among them, as the run does it.
    shard_optimizer: bool,
    /// The peak of each GPU with the whole state, and with a part of it where that is possible.
    peak_whole_state: usize,
    peak_divided_state: Option<usize>,
    /// The peak of each GPU with a part of the frozen weights of the blocks and the smaller state, where there are frozen ones.
    peak_divided_base: Option<usize>,
    /// Bytes of gradients and parameters that each GPU sends in a step, and receives as well.
    bytes_per_step: usize,
    /// Bytes of frozen weights that each GPU receives in a step if they are divided.
    gathered_bytes_per_step: Option<usize>,
    /// The fastest of these that fits; `None` if none does.
    choice: Option<RankChoice>,
}

/// The parts of a model that ranks divide.
#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum RankChoice {
    Replicate,
    ShardOptimizer,
    ShardBase,
}

impl RankPlan {
    fn of(planner: &RunPlanner, gpus: usize, nodes: usize) -> Result<Self, Failure> {
        let peak = |shares: RankShares| {
            let mut planner = planner.on_ranks(gpus, shares)?;
            planner.plan(&planner.rows()).map(|plan| (plan.peak, planner.gathered_bytes_per_step()))
        };
        let state = |divided: bool| peak(RankShares { optimizer: Some(divided), base: false });
        let (peak_whole_state, _) = state(false)?;
        // Weights that are trained in place cannot divide it.
        let peak_divided_state = state(true).ok().map(|(peak, _)| peak);
        let base = peak(RankShares { optimizer: None, base: true }).ok().filter(|(_, gathered)| *gathered > 0);
        let (peak_divided_base, gathered_bytes_per_step) = base.unzip();
        let fits = |peak: Option<usize>| peak.zip(planner.available_memory()).is_some_and(|(peak, free)| peak <= free);
        let choice = match () {
            () if fits(Some(peak_whole_state)) => Some(RankChoice::Replicate),
            () if fits(peak_divided_state) => Some(RankChoice::ShardOptimizer),
            () if fits(peak_divided_base) => Some(RankChoice::ShardBase),
            () => None,
        };
        Ok(Self {
            gpus,
            nodes,
            shard_optimizer: planner.is_sharded(),
            peak_whole_state,
            peak_divided_state,
            peak_divided_base,
            bytes_per_step: planner.bytes_per_step(),
            gathered_bytes_per_step,
            choice,
        })
    }
}

impl fmt::Display for RankPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { gpus, shard_optimizer, peak_whole_state, peak_divided_state, bytes_per_step, .. } = self;
        let chosen = |is_chosen: bool| if is_chosen { ", as this run does" } else { "" };
        let peak = show_bytes(*peak_whole_state);
        let nodes = if self.nodes > 1 { format!(" on {} machines", self.nodes) } else { String::new() };
        let whole = chosen(!shard_optimizer);
        writeln!(f, "peak of each of {gpus} GPUs{nodes} with the whole optimizer state: {peak}{whole}")?;
        if let Some(peak) = peak_divided_state {
            let peak = show_bytes(*peak);
            writeln!(f, "with 1/{gpus} of it (shard_optimizer = true): {peak}{}", chosen(*shard_optimizer))?;
        }
        let base = self.peak_divided_base.zip(self.gathered_bytes_per_step);
        if let Some((peak, gathered)) = base {
            let (peak, gathered) = (show_bytes(peak), show_bytes(gathered));
            writeln!(
                f,
                "with 1/{gpus} of the frozen weights (shard_base = true, so far only on CPUs): {peak}, and {gathered} of \
                 weights received in a step"
            )?;
        }
        writeln!(f, "each GPU sends {} in a step and receives as much", show_bytes(*bytes_per_step))?;
        f.write_str(match self.choice {
            Some(RankChoice::Replicate) => "fits with everything on each GPU",
            Some(RankChoice::ShardOptimizer) => "fits with shard_optimizer = true",
            Some(RankChoice::ShardBase) => "fits only with shard_base = true",
            None => "does not fit, whatever is divided",
        })
    }
}
