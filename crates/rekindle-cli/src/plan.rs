//! `rekindle plan`.

use rekindle::run::RunConfig;
use rekindle::{Error, counted};

use crate::args::PlanArgs;
use crate::failure::Failure;
use crate::output;
use crate::train::TerminalObserver;

pub(crate) fn run(args: &PlanArgs) -> Result<(), Failure> {
    let config = RunConfig::load(&args.run_file, &args.overrides)?;
    let observer = TerminalObserver::default();
    let (loader, _) = config.loader(&observer)?;
    let mut planner = config.planner(&loader, args.device_memory)?;
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
