//! `rekindle train`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rekindle::run::{LoraArguments, RunConfig};
use rekindle::{
    BLOCK_LINEARS, DataSource, DeviceKind, EncodedRows, End, Error, Event, Loader, LoraConfig, Model, OptimizerConfig,
    Preflight, Report, Resume, RowEncoder, SftTrainer, TargetModules, Timetable, Tokenizer, check_output_dir,
    check_run, counted, saved_lora_config, write_atomic,
};
use toml::{Table, Value};

use crate::args::TrainArgs;
use crate::failure::Failure;
use crate::progress::{Progress, duration};
use crate::{dry_run, fetch, open, output, plan, signals};

pub(crate) fn run(args: &TrainArgs) -> Result<(), Failure> {
    let config = RunConfig::load(&args.run_file, &args.overrides)?;
    if args.dry_run {
        let refusal = Earlier { resume: None, overwrite: args.overwrite }.check(&config).err();
        let job = Job::open(config, &Earlier { resume: None, overwrite: true })?;
        return dry_run::print(&job, refusal.as_ref());
    }
    let mut job = Job::open(config, &Earlier { resume: args.resume.clone(), overwrite: args.overwrite })?;
    eprintln!("{}", dry_run::trainable(&job));
    let notes = OptimizerConfig::from(&job.config.train).notes(job.model.causal_lm());
    notes.iter().for_each(|note| eprintln!("[train] optim: {note}"));
    let stop = Arc::<AtomicBool>::default();
    let mut resolved = Ok(None);
    let report = job.fit(&stop, &mut |config| {
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

/// The handling of checkpoints and results of an earlier run in the output directory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Earlier {
    pub(crate) resume: Option<Resume>,
    pub(crate) overwrite: bool,
}

impl Earlier {
    /// Refuses an output directory with results that would be lost.
    fn check(&self, config: &RunConfig) -> Result<(), Failure> {
        let full = config.lora.is_none();
        let checked = check_output_dir(&config.output_dir, full, self.resume.as_ref(), self.overwrite);
        Ok(checked.map_err(Error::from)?)
    }
}

/// A model that is ready to be trained, with the configuration completed by what the model says.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) config: RunConfig,
    pub(crate) model: Model,
    pub(crate) tokenizer: Option<Tokenizer>,
    pub(crate) rows: JobRows,
    earlier: Earlier,
}

/// The rows of a job, encoded.
#[derive(Clone, Debug)]
pub(crate) struct JobRows {
    pub(crate) train: EncodedRows,
    pub(crate) eval: Option<EncodedRows>,
}

impl Job {
    /// Checks everything that needs no weights, then loads them.
    pub(crate) fn open(mut config: RunConfig, earlier: &Earlier) -> Result<Self, Failure> {
        earlier.check(&config)?;
        let (mut loader, start) = plan::loader(&config)?;
        plan::check(&mut config, &mut loader)?;
        // With what was decided.
        let mut loader = loader.use_gradient_checkpointing(config.model.use_gradient_checkpointing);
        fetch::say(&loader.fetch()?.notices);
        let loaded = starting_adapter(&config, &mut loader, start.as_deref())?;
        let encoder = loader.row_encoder()?;
        let rows = JobRows::encode(&config, &encoder)?;
        let times = rows.check(&config, &encoder, earlier)?;
        say_steps(&config, &times);

        let tokenizer = encoder.into_tokenizer();
        let mut model = open::load_model(loader)?;
        let starts_from_adapter = loaded.is_some();
        if let Some(lora) = &mut config.lora {
            model = adapt(model, lora, start.as_deref(), loaded)?;
            if let DeviceKind::Cuda(_) = model.device() {
                lora.config.slower_on_cuda().iter().for_each(|slower| eprintln!("[lora] {slower}"));
            }
        }
        config.device = model.device().to_string();
        config.model.dtype = model.dtype();
        config.model.max_seq_length = Some(model.causal_lm().max_seq_length());
        // An adapter that training continues says it itself, with a window that a table could not give.
        let from_adapter = config.model.rope_scaling.is_none() && starts_from_adapter;
        if let Some(extension) = model.causal_lm().context_extension().filter(|_| !from_adapter) {
            config.model.rope_scaling = Some(extension.request.clone().into());
        }
        config.model.resolve_quant_config(&model);
        config.train.resolve(config.lora.is_none(), config.data.has_eval());
        Ok(Self { config, model, tokenizer, rows, earlier: earlier.clone() })
    }

    /// Trains until the end or until `stop` is raised, and writes into `output_dir`; `on_start` is called when nothing
    /// stands in the way of the first step.
    pub(crate) fn fit(
        &mut self,
        stop: &Arc<AtomicBool>,
        on_start: &mut dyn FnMut(&RunConfig),
    ) -> Result<Report, Failure> {
        let Self { config, model, tokenizer, rows, earlier } = self;
        let JobRows { train, eval } = rows.clone();
        let mut progress = Progress::new();
        let mut trainer = SftTrainer::new(model, tokenizer.as_ref(), train, config.train.clone())
            .shuffle(config.data.shuffle)
            .seed(config.seed)
            .output_dir(&config.output_dir)
            .overwrite(earlier.overwrite)
            .run_file(config.to_toml())
            .stop_flag(Arc::clone(stop))
            .on_event(|event| {
                progress.event(&event);
                if let Event::Started { .. } = event {
                    on_start(config);
                }
            });
        if let Some(eval) = eval {
            trainer = trainer.eval_dataset(eval);
        }
        if let Some(resume) = &earlier.resume {
            trainer = trainer.resume(resume.clone());
        }
        Ok(trainer.train()?)
    }
}

impl JobRows {
    fn encode(config: &RunConfig, encoder: &RowEncoder) -> Result<Self, Failure> {
        let encode = |source: DataSource| {
            let rows = encoder.encode_rows(source)?;
            eprintln!("{rows}");
            Ok::<_, Error>(rows)
        };
        let train = encode(config.data.train_source(&config.model))?;
        let eval = config.data.eval_source(&config.model).map(encode).transpose()?;
        Ok(Self { train, eval })
    }

    fn check(&self, config: &RunConfig, encoder: &RowEncoder, earlier: &Earlier) -> Result<Timetable, Failure> {
        let run = Preflight {
            config: &config.train,
            train: self.train.dataset(),
            max_seq_length: encoder.max_seq_length(),
            full_finetuning: config.lora.is_none(),
            shuffle: config.data.shuffle,
            seed: config.seed,
            output_dir: Some(&config.output_dir),
            resume: earlier.resume.as_ref(),
            overwrite: earlier.overwrite,
        };
        Ok(check_run(&run, encoder, self.eval.as_ref())?)
    }
}

/// Says which of two keys for the length of the run counts.
fn say_steps(config: &RunConfig, times: &Timetable) {
    if let (Some(steps), Some(epochs)) = (config.train.max_steps, config.train.num_train_epochs) {
        let made = steps as f64 / times.steps_per_epoch as f64;
        eprintln!("[train] max_steps = {steps} overrides num_train_epochs = {epochs}: the run has {made:.2} epochs");
    }
}

/// Returns the configuration of the adapter that training continues: that of `init_from`, in the directory `start`, or
/// the one given as the model. Keys of `[lora]` that contradict it are an error.
fn starting_adapter(
    config: &RunConfig,
    loader: &mut Loader,
    start: Option<&Path>,
) -> Result<Option<LoraConfig>, Failure> {
    let Some(lora) = &config.lora else { return Ok(None) };
    let (model, given) = (&config.model.name_or_path, loader.fetch()?.adapter.clone());
    let (dir, name) = match (&given, start.zip(lora.init_from.as_ref())) {
        (None, None) => return Ok(None),
        (None, Some((dir, name))) => (dir, name),
        (Some(dir), None) => (dir.as_path(), model),
        (Some(_), Some(_)) => {
            return Err(Failure::Configuration(format!(
                "[model] name_or_path {} is an adapter, which the run continues; remove init_from, or set name_or_path to \
                 the adapter's base",
                model.display()
            )));
        }
    };
    let loaded = saved_lora_config(dir)?;
    let problems = contradictions(lora, &loaded);
    if problems.is_empty() {
        return Ok(Some(loaded));
    }
    Err(Failure::Configuration(format!(
        "[lora] contradicts the adapter in {}: {}; remove these keys to continue the adapter, or {} to start a new one",
        name.display(),
        problems.join(", "),
        if given.is_some() { "set name_or_path to its base" } else { "remove init_from" }
    )))
}

/// Puts a new adapter on the model, or the one that training continues (`loaded`). `lora` then says what that adapter is.
fn adapt(
    model: Model,
    lora: &mut LoraArguments,
    start: Option<&Path>,
    loaded: Option<LoraConfig>,
) -> Result<Model, Failure> {
    let Some(loaded) = loaded else {
        lora.config.advice().iter().for_each(|advice| eprintln!("[lora] {advice}"));
        let model = model.get_peft_model(lora.config.clone())?;
        open::say(&model);
        return Ok(model);
    };
    let mut model = match (start, &lora.init_from) {
        (Some(dir), Some(name)) => open::load_adapter(model, name, dir)?,
        _ => model,
    };
    model.causal_lm_mut().set_gradient_checkpointing(lora.config.use_gradient_checkpointing);
    lora.config = LoraConfig {
        random_state: lora.config.random_state,
        use_gradient_checkpointing: lora.config.use_gradient_checkpointing,
        ..loaded
    };
    Ok(model)
}

/// Keys that the run file gives and the adapter has otherwise.
fn contradictions(asked: &LoraArguments, loaded: &LoraConfig) -> Vec<String> {
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

/// The message for a run that a signal ended.
fn interruption(report: &Report) -> String {
    let done = report.steps.last().map_or(0, |step| step.step);
    match &report.checkpoint {
        Some(path) => format!(
            "interrupted after step {done}; saved {}; run the same command with --resume to continue",
            path.display()
        ),
        None => "interrupted before the first step; nothing was saved".to_owned(),
    }
}

fn summarize(report: &Report, dir: &Path, resolved: &Path) {
    eprintln!("{}", summary(report));
    if report.end == End::EarlyStopping {
        eprintln!("the evaluation loss stopped falling: the run ended early (early_stopping_patience)");
    }
    let [metrics, page] = ["metrics.jsonl", "report.html"].map(|name| dir.join(name));
    eprintln!("report {}  numbers {}  configuration {}", page.display(), metrics.display(), resolved.display());
}

/// A run in a line: its length, and both losses at its start and end.
fn summary(report: &Report) -> String {
    let Some((first, last)) = report.steps.first().zip(report.steps.last()) else { return "no steps".to_owned() };
    let mut text = format!("{} in {}", counted(last.step, "step"), duration(last.seconds));
    text += &format!(", training loss {:.3} -> {:.3}", first.loss, last.loss);
    match &report.evals[..] {
        [] => {}
        [only] => text += &format!(", evaluation loss {:.3}", only.eval_loss),
        [first, .., last] => text += &format!(", evaluation loss {:.3} -> {:.3}", first.eval_loss, last.eval_loss),
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(text: &str) -> LoraArguments {
        let text = format!("[model]\nname_or_path = \"m\"\n[data]\ntrain = \"t\"\n[lora]\ninit_from = \"a\"\n{text}");
        RunConfig::from_toml(&text, &[]).unwrap().lora.unwrap()
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
