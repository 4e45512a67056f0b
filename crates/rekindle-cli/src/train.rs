//! `rekindle train`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rekindle::{
    BLOCK_LINEARS, DeviceKind, End, Error, Event, LoraConfig, Model, OptimizerConfig, Report, Resume, SftTrainer,
    TargetModules, Tokenizer, write_atomic,
};
use toml::{Table, Value};

use crate::args::TrainArgs;
use crate::failure::Failure;
use crate::progress::{Progress, duration};
use crate::run_file::{LoraSection, ModelSection, RunConfig};
use crate::{dry_run, open, output, plan, signals};

pub(crate) fn run(args: &TrainArgs) -> Result<(), Failure> {
    let config = RunConfig::load(&args.run_file, &args.overrides)?;
    let mut job = Job::open(config)?;
    if args.dry_run {
        return dry_run::print(&job);
    }
    eprintln!("{}", dry_run::trainable(&job));
    let notes = OptimizerConfig::from(&job.config.train).notes(job.model.causal_lm());
    notes.iter().for_each(|note| eprintln!("[train] optim: {note}"));
    let stop = Arc::<AtomicBool>::default();
    let mut resolved = Ok(None);
    let report = job.fit(args.resume.clone(), &stop, &mut |config| {
        let begun =
            signals::raise(&stop).map_err(Failure::Signals).and_then(|()| write_resolved(config, &args.run_file));
        if begun.is_err() {
            stop.store(true, Ordering::Relaxed);
        }
        resolved = begun.map(Some);
    })?;
    let resolved = resolved?.unwrap_or_default();
    if report.end == End::Interrupted {
        return Err(Failure::Interrupted(interruption(&report)));
    }
    summarize(&report, &job.config.output_dir, &resolved);
    match &report.saved {
        Some(path) => output::line(&path.display().to_string()),
        None => Ok(()),
    }
}

/// A model that is ready to be trained, with the configuration completed by what the model says.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) config: RunConfig,
    pub(crate) model: Model,
    pub(crate) tokenizer: Option<Tokenizer>,
}

impl Job {
    pub(crate) fn open(mut config: RunConfig) -> Result<Self, Failure> {
        let (mut loader, start) = plan::loader(&config)?;
        plan::check(&mut config, &mut loader)?;
        // With what was decided.
        let loader = loader.use_gradient_checkpointing(config.model.use_gradient_checkpointing);
        let (mut model, tokenizer) = open::load(loader)?;
        let starts_from_adapter = start.is_some() || model.causal_lm().lora().is_some();
        if let Some(lora) = &mut config.lora {
            model = adapt(model, &config.model, lora, start.as_deref())?;
            if let DeviceKind::Cuda(_) = model.device() {
                lora.config.slower_on_cuda().iter().for_each(|slower| eprintln!("[lora] {slower}"));
            }
        }
        config.device = model.device().to_string();
        config.model.dtype = model.dtype();
        config.model.max_seq_length = Some(model.causal_lm().max_seq_length());
        // An adapter that is gone on with says it itself, with a window that a table could not give.
        let from_adapter = config.model.rope_scaling.is_none() && starts_from_adapter;
        if let Some(widened) = model.causal_lm().widened().filter(|_| !from_adapter) {
            config.model.rope_scaling = Some(widened.request.clone().into());
        }
        config.model.fill_quant_config(&model);
        config.train.learning_rate = Some(config.train.resolved_learning_rate(config.lora.is_none()));
        Ok(Self { config, model, tokenizer })
    }

    /// Trains until the end or until `stop` is raised, and writes into `output_dir`; `on_start` is called when nothing
    /// stands in the way of the first step.
    pub(crate) fn fit(
        &mut self,
        resume: Option<Resume>,
        stop: &Arc<AtomicBool>,
        on_start: &mut dyn FnMut(&RunConfig),
    ) -> Result<Report, Failure> {
        let Self { config, model, tokenizer } = self;
        let mut progress = Progress::new(config.train.logging_steps);
        let mut trainer =
            SftTrainer::new(model, tokenizer.as_ref(), config.data.train_source(&config.model), config.train.clone())
                .shuffle(config.data.shuffle)
                .seed(config.seed)
                .output_dir(&config.output_dir)
                .run_file(config.to_toml())
                .stop_flag(Arc::clone(stop))
                .on_data(|source, report| eprintln!("{source}: {report}"))
                .on_event(|event| {
                    progress.event(&event);
                    if let Event::Started { .. } = event {
                        on_start(config);
                    }
                });
        if let Some(eval) = config.data.eval_source(&config.model) {
            trainer = trainer.eval_dataset(eval);
        }
        if let Some(resume) = resume {
            trainer = trainer.resume(resume);
        }
        Ok(trainer.train()?)
    }
}

/// Puts a new adapter on the model, or goes on with one: that of `init_from`, which lies in `start`, or the one that was
/// given as the model. `lora` then says what that adapter is.
fn adapt(model: Model, section: &ModelSection, lora: &mut LoraSection, start: Option<&Path>) -> Result<Model, Failure> {
    let given = model.causal_lm().lora().is_some().then_some(&*section.name_or_path);
    let (mut model, name) = match (given, lora.init_from.as_deref().zip(start)) {
        (None, None) => {
            lora.config.advice().iter().for_each(|advice| eprintln!("[lora] {advice}"));
            return Ok(model.get_peft_model(lora.config.clone())?);
        }
        (None, Some((name, dir))) => (open::load_adapter(model, name, dir)?, name),
        (Some(name), None) => (model, name),
        (Some(name), Some(_)) => {
            return Err(Failure::Configuration(format!(
                "[model] name_or_path {} is an adapter, which is gone on with; leave init_from out, or give the base",
                name.display()
            )));
        }
    };
    let loaded = model.causal_lm().lora().expect("an adapter was just loaded").clone();
    let problems = contradictions(lora, &loaded);
    if !problems.is_empty() {
        return Err(Failure::Configuration(format!(
            "[lora] contradicts the adapter in {}: {}; leave these keys out to go on with it, or {} to begin a new one",
            name.display(),
            problems.join(", "),
            if given.is_some() { "give its base as the model" } else { "init_from" }
        )));
    }
    model.causal_lm_mut().set_gradient_checkpointing(lora.config.use_gradient_checkpointing);
    lora.config = LoraConfig {
        random_state: lora.config.random_state,
        use_gradient_checkpointing: lora.config.use_gradient_checkpointing,
        ..loaded
    };
    Ok(model)
}

/// Keys that the run file gives and the adapter has otherwise.
fn contradictions(asked: &LoraSection, loaded: &LoraConfig) -> Vec<String> {
    let (ours, theirs) = (comparable(&asked.config), comparable(loaded));
    let show = |value: Option<&Value>| value.map_or_else(|| "none".to_owned(), Value::to_string);
    let differing = asked.given.iter().filter(|key| ours.get(*key) != theirs.get(*key));
    differing.map(|key| format!("{key} = {} but it has {}", show(ours.get(key)), show(theirs.get(key)))).collect()
}

/// What an adapter is, without what is chosen anew by each run, and with one order and spelling of the targets.
fn comparable(config: &LoraConfig) -> Table {
    let mut config = config.clone();
    match &mut config.target_modules {
        TargetModules::Names(names) => names.sort_unstable(),
        TargetModules::AllLinear => {
            let mut names = BLOCK_LINEARS;
            names.sort_unstable();
            config.target_modules = names.into();
        }
        TargetModules::Regex(_) => {}
    }
    let mut table = Table::try_from(config).expect("a configuration is a table");
    for key in ["random_state", "use_gradient_checkpointing"] {
        table.remove(key);
    }
    table
}

/// Writes the resolved configuration before anything is trained; the run file itself is never written over.
fn write_resolved(config: &RunConfig, run_file: &Path) -> Result<PathBuf, Failure> {
    let dir = &config.output_dir;
    std::fs::create_dir_all(dir).map_err(|source| Failure::File { path: dir.clone(), source })?;
    let same =
        |path: &Path| path.canonicalize().is_ok_and(|path| run_file.canonicalize().is_ok_and(|file| file == path));
    let mut path = dir.join("run.toml");
    if same(&path) {
        path = dir.join("run.resolved.toml");
    }
    write_atomic(&path, config.to_toml().as_bytes()).map_err(Error::from)?;
    Ok(path)
}

/// What is said of a run that a signal ended.
fn interruption(report: &Report) -> String {
    let done = report.steps.last().map_or(0, |step| step.step);
    match &report.checkpoint {
        Some(path) => format!(
            "interrupted after step {done}; {} has all of it: the same command with --resume goes on from there",
            path.display()
        ),
        None => "interrupted before the first step; nothing was saved".to_owned(),
    }
}

fn summarize(report: &Report, dir: &Path, resolved: &Path) {
    if let (Some(first), Some(last)) = (report.steps.first(), report.steps.last()) {
        let time = duration(last.seconds);
        eprintln!(
            "{} steps in {time}, loss {:.3} at the first and {:.3} at the last",
            last.step, first.loss, last.loss
        );
    }
    if report.end == End::EarlyStopping {
        eprintln!("the evaluation loss fell no further: the run ended early (early_stopping_patience)");
    }
    let [metrics, page] = ["metrics.jsonl", "report.html"].map(|name| dir.join(name));
    eprintln!("report {}  numbers {}  configuration {}", page.display(), metrics.display(), resolved.display());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(text: &str) -> LoraSection {
        let text = format!("[model]\nname_or_path = \"m\"\n[data]\ntrain = \"t\"\n[lora]\ninit_from = \"a\"\n{text}");
        RunConfig::parse(&text, "run", &[]).unwrap().lora.unwrap()
    }

    #[test]
    fn only_what_is_given_can_contradict() {
        let loaded = LoraConfig::new(8).lora_alpha(32.0).target_modules(["v_proj", "q_proj"]);
        assert_eq!(contradictions(&section(""), &loaded), Vec::<String>::new());
        let agrees =
            "r = 8\ntarget_modules = [\"q_proj\", \"v_proj\"]\nrandom_state = 9\nuse_gradient_checkpointing = true";
        assert_eq!(contradictions(&section(agrees), &loaded), Vec::<String>::new());
        assert_eq!(
            contradictions(&section("r = 4\nlora_alpha = 16\ntarget_modules = [\"q_proj\"]"), &loaded),
            [
                "lora_alpha = 16.0 but it has 32.0",
                "r = 4 but it has 8",
                "target_modules = [\"q_proj\"] but it has [\"q_proj\", \"v_proj\"]",
            ]
        );
    }
}
