//! `rekindle train`.

use std::cell::{Cell, RefCell};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rekindle::dist::{Communicator, Launch, supervise};
use rekindle::run::{RunConfig, RunObserver, TrainOptions, TrainingRun};
use rekindle::{EncodedRows, MemoryPlan, Model, Resume, TrainEnd, TrainEvent, TrainReport, counted, show_bytes};

use crate::args::TrainArgs;
use crate::failure::Failure;
use crate::progress::{Progress, duration};
use crate::ranks::{self, QuietObserver, TrainRole};
use crate::{dry_run, open, output, progress, signals};

pub(crate) fn run(args: &TrainArgs) -> Result<(), Failure> {
    let launch = Launch::from_env()?;
    let role = TrainRole::of(args, &launch)?;
    let config = RunConfig::load(&args.run_file, &args.overrides)?;
    if args.gpus.is_some() && config.device == "cpu" {
        return Err(Failure::Configuration(
            "--gpus: the run file has device = \"cpu\"; remove one of them, or train with --ranks N".to_owned(),
        ));
    }
    if let TrainRole::Launcher(node) = role {
        return ranks::start(&node);
    }
    let mut options =
        TrainOptions { resume: args.resume.clone(), overwrite: args.overwrite, ..TrainOptions::default() };
    if launch.restarts > 0 && options.resume.is_none() {
        // The launcher has started a run again that it had started before.
        options.resume = Some(Resume::Latest);
        options.overwrite = false;
    }
    if args.dry_run {
        let refusal = config.check_output_dir(&options).err();
        let options = TrainOptions { overwrite: true, ..options };
        let run = TrainingRun::open(config, options, &TerminalObserver::default())?;
        return dry_run::print(&run, refusal.as_ref());
    }
    let world = ranks::connect(&launch, &options.stop)?;
    options.world = Arc::clone(&world);
    let ended = supervise(&*world, || {
        #[cfg(feature = "serve")]
        if let Some(address) = args.dashboard.filter(|_| world.is_first()) {
            crate::dashboard::start(&config.output_dir, address)?;
        }
        match train(config, options, &*world) {
            // An interruption is no failure: all ranks end after the same step.
            Err(Failure::Interrupted(text)) => Ok(Err(Failure::Interrupted(text))),
            other => other.map(Ok),
        }
    });
    ended.flatten().map_err(|failure| ranks::report(&launch, failure))
}

/// Trains as one of the ranks of `world`.
fn train(config: RunConfig, options: TrainOptions, world: &dyn Communicator) -> Result<(), Failure> {
    if !world.is_first() {
        let observer = QuietObserver { stop: Arc::clone(&options.stop) };
        return match config.train(options, &observer)?.end {
            TrainEnd::Interrupted => Err(Failure::Interrupted(String::new())),
            _ => Ok(()),
        };
    }
    let observer = TerminalObserver { stops: Some(Arc::clone(&options.stop)), ..TerminalObserver::default() };
    if world.size() > 1 {
        eprintln!("{} ranks", world.size());
    }
    let mut run = TrainingRun::open(config, options, &observer)?;
    eprintln!("{}", dry_run::trainable(&run));
    let report = run.train(&observer)?;
    if let Some(error) = observer.signals_failed.take() {
        return Err(Failure::Signals(error));
    }
    if report.end == TrainEnd::Interrupted {
        return Err(Failure::Interrupted(interruption(&report)));
    }
    summarize(&report, &run.config.output_dir, &observer.written.take());
    match &report.saved {
        Some(path) => output::line(&path.display().to_string()),
        None => Ok(()),
    }
}

/// A display of the bytes done and the bytes in total.
type ByteProgress = Box<dyn FnMut(u64, u64)>;

/// An observer that prints the progress of a run to stderr.
pub(crate) struct TerminalObserver {
    progress: RefCell<Progress>,
    downloading: RefCell<ByteProgress>,
    loading: RefCell<Option<ByteProgress>>,
    /// The flag that signals set from the first step on; `None` leaves signals alone.
    stops: Option<Arc<AtomicBool>>,
    /// The error if signals cannot be handled.
    signals_failed: Cell<Option<io::Error>>,
    /// The file with the resolved configuration.
    written: Cell<PathBuf>,
}

impl Default for TerminalObserver {
    fn default() -> Self {
        Self {
            progress: RefCell::new(Progress::new()),
            downloading: RefCell::new(Box::new(progress::downloading())),
            loading: RefCell::default(),
            stops: None,
            signals_failed: Cell::default(),
            written: Cell::default(),
        }
    }
}

impl RunObserver for TerminalObserver {
    fn notice(&self, text: &str) {
        eprintln!("{text}");
    }

    fn downloading(&self, done: u64, total: u64) {
        (self.downloading.borrow_mut())(done, total);
    }

    fn planned(&self, plan: &MemoryPlan, available: Option<usize>) {
        let peak = show_bytes(plan.peak);
        let available = available.map_or_else(String::new, |bytes| format!(" of {} available", show_bytes(bytes)));
        let mapped = match plan.mapped {
            0 => String::new(),
            mapped => format!("; resident memory also counts up to {} of mapped checkpoint files", show_bytes(mapped)),
        };
        eprintln!("memory: peak {peak}{available} for {} in a pass{mapped}", counted(plan.tokens, "token"));
    }

    fn encoded(&self, rows: &EncodedRows) {
        eprintln!("{rows}");
    }

    fn loading(&self, done: u64, total: u64) {
        let mut loading = self.loading.borrow_mut();
        loading.get_or_insert_with(|| Box::new(progress::reading("loading")))(done, total);
    }

    fn loaded(&self, model: &Model) {
        open::describe(model);
    }

    fn started(&self, _: &RunConfig, written: &Path) {
        self.written.set(written.to_owned());
        let Some(stops) = &self.stops else { return };
        if let Err(error) = signals::raise(stops) {
            stops.store(true, Ordering::Relaxed);
            self.signals_failed.set(Some(error));
        }
    }

    fn event(&self, event: &TrainEvent<'_>) {
        self.progress.borrow_mut().event(event);
    }
}

/// Returns the message for a run that a signal ended.
fn interruption(report: &TrainReport) -> String {
    let done = report.steps.last().map_or(0, |step| step.step);
    match &report.checkpoint {
        Some(path) => format!(
            "interrupted after step {done}; saved {}; run the same command with --resume to continue",
            path.display()
        ),
        None => "interrupted before the first step; nothing was saved".to_owned(),
    }
}

fn summarize(report: &TrainReport, dir: &Path, resolved: &Path) {
    eprintln!("{}", summary(report));
    if report.end == TrainEnd::EarlyStopping {
        eprintln!("the run ended early because the evaluation loss stopped falling (early_stopping_patience)");
    }
    let [metrics, page] = ["metrics.jsonl", "report.html"].map(|name| dir.join(name));
    eprintln!("report {}  numbers {}  configuration {}", page.display(), metrics.display(), resolved.display());
}

/// Summarizes a run in a line: its length, and both losses or rewards at its start and end.
fn summary(report: &TrainReport) -> String {
    let Some((first, last)) = report.steps.first().zip(report.steps.last()) else { return "no steps".to_owned() };
    let mut text = format!("{} in {}", counted(last.step, "step"), duration(last.seconds));
    let sampled: Vec<f64> = report.steps.iter().filter_map(|step| step.metrics.get("reward")).collect();
    if let (Some(first), Some(last)) = (sampled.first(), sampled.last()) {
        text += &format!(", training reward {first:.3} -> {last:.3}");
        let evals: Vec<f64> = report.evals.iter().filter_map(|eval| eval.metrics.get("eval_reward")).collect();
        if let (Some(first), Some(last)) = (evals.first(), evals.last()) {
            text += &format!(", evaluation reward {first:.3} -> {last:.3}");
        }
        return text;
    }
    text += &format!(", training loss {:.3} -> {:.3}", first.loss, last.loss);
    match &report.evals[..] {
        [] => {}
        [only] => text += &format!(", evaluation loss {:.3}", only.eval_loss),
        [first, .., last] => text += &format!(", evaluation loss {:.3} -> {:.3}", first.eval_loss, last.eval_loss),
    }
    text
}
