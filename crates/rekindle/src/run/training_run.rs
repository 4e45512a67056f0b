//! A training run from its configuration: checks, loading, training.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rekindle_dist::{Communicator, OneRank, RankPosition};
use rekindle_kernels::{DeviceKind, parse_device, runtime};
use rekindle_train::{
    OptimizerConfig, Preflight, Resume, ShardRanks, Timetable, TrainReport, TrainerArguments, check_output_dir,
};

use super::adapter::{attach, continued_adapter};
use super::{RunConfig, RunObserver, ShardBase};
use crate::preflight::check_run;
use crate::{
    DataSource, EncodedRows, Error, GradientCheckpointing, Loader, Model, ModelSource, RankShares, RowEncoder,
    RunPlanner, SftTrainer, Tokenizer, TrainEvent, write_atomic,
};

/// The name of a file that ends a running run when it appears in the output directory, as [`TrainOptions::stop`] does.
/// The run removes it.
pub const STOP_FILE: &str = "stop";

/// The options of a training run that are not part of its configuration.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// The checkpoint to resume from. Default: none.
    pub resume: Option<Resume>,
    /// If true, checkpoints and the result of an earlier run in the output directory are replaced. Default false: the
    /// run is refused.
    pub overwrite: bool,
    /// If true, a run that does not fit into memory is refused before anything is loaded. Default true. Without the
    /// check, [`GradientCheckpointing::Auto`] is as `true`.
    pub check_memory: bool,
    /// The ranks that train together, each with the same configuration. Rank 0 alone writes. Default: this process alone.
    pub world: Arc<dyn Communicator>,
    /// Set it to true to end the run after the current step, with a checkpoint to resume from.
    pub stop: Arc<AtomicBool>,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self { resume: None, overwrite: false, check_memory: true, world: Arc::new(OneRank), stop: Arc::default() }
    }
}

/// A run that is ready to train: its rows are encoded, its model is loaded, and its configuration is resolved.
#[derive(Debug)]
pub struct TrainingRun {
    /// The configuration, with every default that depends on the model filled in.
    pub config: RunConfig,
    /// The model, with its adapter.
    pub model: Model,
    /// The tokenizer, if the checkpoint has one.
    pub tokenizer: Option<Tokenizer>,
    /// The rows to train on.
    pub train_rows: EncodedRows,
    /// The rows to evaluate, if there are any.
    pub eval_rows: Option<EncodedRows>,
    options: TrainOptions,
}

impl RunConfig {
    /// Runs the whole training: checks the configuration, loads the model, trains it and writes the result.
    ///
    /// ```no_run
    /// use rekindle::run::{RunConfig, TrainOptions};
    ///
    /// # fn main() -> Result<(), rekindle::Error> {
    /// let report = RunConfig::load("run.toml", &[])?.train(TrainOptions::default(), &())?;
    /// println!("{:?}", report.saved);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of [`TrainingRun::open`] and [`TrainingRun::train`].
    pub fn train(self, options: TrainOptions, observer: &dyn RunObserver) -> Result<TrainReport, Error> {
        TrainingRun::open(self, options, observer)?.train(observer)
    }

    /// Refuses a method that samples completions without a reward for them, and rewards that nothing uses.
    fn check_rewards(&self) -> Result<(), Error> {
        let method = self.train.method.name();
        let problem = match (self.train.method.has_rollouts(), self.rewards.is_empty()) {
            (true, true) => format!(
                "method = \"{method}\" needs a reward: add a section [[rewards]] with a type, such as type = \"exact\""
            ),
            (false, false) => format!(
                "[[rewards]] has no effect with method = \"{method}\"; remove it, or set method = \"grpo\" or \"rloo\" in \
                 [train]"
            ),
            _ => return Ok(()),
        };
        let name = self.path.as_ref().map_or_else(|| "run file".to_owned(), |path| path.display().to_string());
        Err(Error::RunFile { name, problems: vec![problem] })
    }

    /// Refuses an output directory with checkpoints or a result that the run would replace.
    ///
    /// # Errors
    /// [`Error::Train`].
    pub fn check_output_dir(&self, options: &TrainOptions) -> Result<(), Error> {
        Ok(check_output_dir(&self.trainer_arguments(options), self.lora.is_none())?)
    }

    /// Returns the arguments of the trainer.
    pub(crate) fn trainer_arguments(&self, options: &TrainOptions) -> TrainerArguments {
        TrainerArguments {
            shuffle: self.data.shuffle,
            seed: self.seed,
            output_dir: Some(self.output_dir.clone()),
            resume: options.resume.clone(),
            overwrite: options.overwrite,
        }
    }

    /// Returns the loader of the model, prepared for the adapter of `init_from`, and the directory of that adapter.
    ///
    /// # Errors
    /// [`Error::Argument`] for the device, [`Error::File`] for an adapter that is not found.
    pub fn loader<'a>(&self, observer: &'a dyn RunObserver) -> Result<(Loader<'a>, Option<PathBuf>), Error> {
        let mut loader = Loader::new(self.model.clone())
            .device(parse_device(&self.device)?)
            .on_download(|done, total| observer.downloading(done, total))
            .on_progress(|done, total| observer.loading(done, total));
        if self.train.method.has_score_head() {
            loader = loader.score_head(self.seed);
        }
        let start = self.lora.as_ref().and_then(|lora| lora.init_from.as_ref());
        let start = start.map(|name| fetch(self.model.adapter(name), observer)).transpose()?;
        if let Some(dir) = &start {
            loader = loader.for_adapter(dir);
        }
        Ok((loader, start))
    }

    /// Returns the rows to train on, read as the training method needs them.
    pub fn train_source(&self) -> DataSource {
        self.data.train_source(&self.model).task(self.train.method.task())
    }

    /// Returns the rows to evaluate, read likewise.
    pub fn eval_source(&self) -> Option<DataSource> {
        Some(self.data.eval_source(&self.model)?.task(self.train.method.task()))
    }

    /// Returns the memory planner of the run. `memory` replaces the free memory of the device.
    ///
    /// # Errors
    /// Those of [`Loader::planner`].
    pub fn planner(&self, loader: &Loader<'_>, memory: Option<usize>) -> Result<RunPlanner, Error> {
        let lora = self.lora.as_ref().map(|lora| lora.config.clone());
        let planner = loader.planner(lora, self.train.clone(), memory)?;
        Ok(if self.data.eval.is_some() { planner.with_evaluation() } else { planner })
    }

    /// Chooses the device of one of several ranks: among the GPUs of a host, the one with the number of the rank there.
    fn choose_rank_device(&mut self, position: RankPosition) -> Result<(), Error> {
        if position.world_size == 1 {
            return Ok(());
        }
        let device = match parse_device(&self.device)? {
            DeviceKind::Auto if runtime::first().map_err(rekindle_kernels::DeviceError::from)?.is_none() => {
                DeviceKind::Cpu
            }
            DeviceKind::Auto => DeviceKind::Cuda(rank_gpu(position, runtime::count()).map_err(Error::Argument)?),
            DeviceKind::Cuda(0) => DeviceKind::Cuda(rank_gpu(position, runtime::count()).map_err(Error::Argument)?),
            DeviceKind::Cuda(index) => {
                return Err(Error::Argument(format!(
                    "device = \"cuda:{index}\" is one GPU, and this host has {} ranks; set device = \"cuda\", and each rank \
                     takes the GPU of its number on the host; CUDA_VISIBLE_DEVICES chooses among the GPUs",
                    position.local_world_size
                )));
            }
            device => device,
        };
        self.device = device.to_string();
        Ok(())
    }

    /// Gives all ranks what `"auto"` became on rank 0.
    fn share_choices(&mut self, world: &dyn Communicator) -> Result<(), Error> {
        if world.size() > 1 {
            let own = (self.train.use_gradient_checkpointing, self.model.shard_base);
            let shared = world.broadcast(serde_json::to_vec(&own).expect("two words"))?;
            let other_version = |error| Error::Argument(format!("rank 0 is another version of Rekindle: {error}"));
            (self.train.use_gradient_checkpointing, self.model.shard_base) =
                serde_json::from_slice(&shared).map_err(other_version)?;
        }
        Ok(())
    }

    /// Refuses a run in which a rank at this position does not fit into memory, and chooses the gradient checkpointing of
    /// `"auto"`.
    ///
    /// The first plan is for rows of the maximum length. Only if that does not fit, or if `"auto"` would recompute, the
    /// rows are read.
    fn check_memory(
        &mut self,
        loader: &mut Loader<'_>,
        ranks: RankPosition,
        observer: &dyn RunObserver,
    ) -> Result<(), Error> {
        let is_auto = self.train.use_gradient_checkpointing == GradientCheckpointing::Auto;
        let mut planner = self.planner(loader, None)?;
        // Ranks on the CPU share its memory.
        let sharing = if planner.device() == DeviceKind::Cpu { ranks.local_world_size } else { 1 };
        if let Some(available) = planner.available().filter(|_| sharing > 1) {
            planner = self.planner(loader, Some(available / sharing))?;
        }
        let several = ranks.world_size > 1;
        let divided = RankShares { base: several, ..RankShares::default() };
        let is_divided = several && self.model.shard_base == ShardBase::On;
        planner = planner.on_ranks(ranks.world_size, if is_divided { divided } else { RankShares::default() })?;
        if several && self.model.shard_base == ShardBase::Auto {
            let fits = planner.decide(&planner.rows()).is_ok();
            self.model.shard_base = ShardBase::from(!fits);
            if !fits {
                planner = planner.on_ranks(ranks.world_size, divided)?;
            }
            observer.notice(&format!("shard_base = \"auto\" is {}", !fits));
        }
        let mut for_rows = |planner: &mut RunPlanner| {
            let tokenizer = loader.fetch()?.load_tokenizer()?;
            let rows = planner.rows_of(tokenizer.as_ref(), &self.train_source())?;
            planner.decide(&rows)
        };
        let plan = match planner.decide(&planner.rows()) {
            Err(Error::DoesNotFit(_)) => for_rows(&mut planner)?,
            Ok(plan) if is_auto && plan.use_gradient_checkpointing.recomputes() => for_rows(&mut planner)?,
            decided => decided?,
        };
        observer.planned(&plan, planner.available());
        if is_auto {
            let chosen = plan.use_gradient_checkpointing;
            self.train.use_gradient_checkpointing = chosen;
            let chosen = serde_json::to_string(&chosen).expect("a word");
            observer.notice(&format!("use_gradient_checkpointing = \"auto\" is {chosen}"));
        }
        Ok(())
    }

    /// Writes the configuration to `run.toml` in the output directory, or to `run.resolved.toml` if that is the run
    /// file itself. Returns the path.
    fn write_resolved(&self) -> Result<PathBuf, Error> {
        let dir = &self.output_dir;
        let failed = |source| rekindle_train::Error::Io { path: dir.clone(), source };
        std::fs::create_dir_all(dir).map_err(failed)?;
        let is_run_file = |path: &Path| {
            let file = self.path.as_ref().and_then(|file| file.canonicalize().ok());
            file.is_some_and(|file| path.canonicalize().is_ok_and(|path| path == file))
        };
        let mut path = dir.join("run.toml");
        if is_run_file(&path) {
            path = dir.join("run.resolved.toml");
        }
        write_atomic(&path, self.to_toml().as_bytes())?;
        Ok(path)
    }
}

impl TrainingRun {
    /// Checks everything that needs no weights, then loads the model and attaches its adapter.
    ///
    /// The checks are the output directory, the memory plan, the adapter to continue, the rows, the schedule, prompts
    /// and the checkpoint to resume from. With several ranks, the first of each host does this before the others, which
    /// then find downloads and encoded rows in the caches.
    ///
    /// # Errors
    /// [`Error::DoesNotFit`] for a run that does not fit into memory, [`Error::Train`] for an output directory or a
    /// checkpoint of another run, [`Error::Data`] for rows, and those of [`Loader::load`].
    pub fn open(mut config: RunConfig, mut options: TrainOptions, observer: &dyn RunObserver) -> Result<Self, Error> {
        config.check_rewards()?;
        let world = Arc::clone(&options.world);
        let RankPosition { local_rank, .. } = world.position();
        config.choose_rank_device(world.position())?;
        if !world.is_first() {
            // The output directory is that of rank 0, which has checked it.
            options.resume = None;
            options.overwrite = true;
        }
        if local_rank > 0 {
            world.barrier()?;
        }
        config.check_output_dir(&options)?;
        let (mut loader, start) = config.loader(observer)?;
        if options.check_memory && local_rank == 0 {
            config.check_memory(&mut loader, world.position(), observer)?;
        }
        let files = loader.fetch()?.clone();
        files.notices.iter().for_each(|notice| observer.notice(notice));
        let continued = continued_adapter(&config, &mut loader, start.as_deref())?;
        let encoder = loader.row_encoder()?;
        let encode = |source: DataSource| {
            let rows = encoder.encode_rows(source)?;
            observer.encoded(&rows);
            Ok::<_, Error>(rows)
        };
        let train_rows = encode(config.train_source())?;
        let eval_rows = config.eval_source().map(encode).transpose()?;
        if local_rank == 0 {
            world.barrier()?;
        }
        config.share_choices(&*world)?;
        let times = config.preflight(&encoder, &train_rows, eval_rows.as_ref(), &options)?;
        if let Some(notice) = config.steps_notice(&times) {
            observer.notice(&notice);
        }
        let tokenizer = encoder.into_tokenizer();
        if world.size() > 1 && config.model.shard_base == ShardBase::On {
            loader = loader.shard_base(Arc::new(ShardRanks::Connected(Arc::clone(&world))));
        }
        let mut model = loader.load_model()?;
        if let Some(adapter) = &files.adapter {
            observer.notice(&format!("adapter {} on {}", adapter.display(), files.model.display()));
            model.notices().iter().for_each(|notice| observer.notice(notice));
        }
        observer.loaded(&model);
        let continues = continued.is_some();
        if let Some(lora) = &mut config.lora {
            model = attach(model, lora, start, continued, observer)?;
            model.causal_lm().slower_on_cuda().iter().for_each(|slower| observer.notice(slower));
        }
        config.resolve(&model, continues);
        Ok(Self { config, model, tokenizer, train_rows, eval_rows, options })
    }

    /// Trains until the end, until [`TrainOptions::stop`] is set, or until [`STOP_FILE`] appears in `output_dir`, and
    /// writes the result there.
    ///
    /// # Errors
    /// [`Error::Train`] for a loss that is not finite, or when a result cannot be written.
    pub fn train(&mut self, observer: &dyn RunObserver) -> Result<TrainReport, Error> {
        let Self { config, model, tokenizer, train_rows, eval_rows, options } = self;
        let notes = OptimizerConfig::from(&config.train).notes(model.causal_lm());
        notes.iter().for_each(|note| observer.notice(&format!("[train] optim: {note}")));
        let mut written = Ok(());
        let stop_file = config.output_dir.join(STOP_FILE);
        let mut trainer = SftTrainer::new(model, tokenizer.as_ref(), train_rows.clone(), config.train.clone())
            .arguments(config.trainer_arguments(options))
            .check_memory(false)
            .run_file(config.to_toml())
            .world(Arc::clone(&options.world))
            .stop_flag(Arc::clone(&options.stop))
            .on_event(|event| {
                observer.event(&event);
                // Usually there is no such file. A file from before the start belongs to an earlier run.
                if std::fs::remove_file(&stop_file).is_ok() && !matches!(event, TrainEvent::Started { .. }) {
                    observer.notice("stopping after this step: the output directory has a file named \"stop\"");
                    options.stop.store(true, Ordering::Relaxed);
                }
                if let TrainEvent::Started { .. } = event {
                    let path =
                        if options.world.is_first() { config.write_resolved() } else { Ok(config.output_dir.clone()) };
                    match path {
                        Ok(path) => observer.started(config, &path),
                        Err(error) => {
                            options.stop.store(true, Ordering::Relaxed);
                            written = Err(error);
                        }
                    }
                }
            });
        if let Some(eval) = eval_rows {
            trainer = trainer.eval_dataset(eval.clone());
        }
        if config.train.method.has_rollouts() {
            trainer = trainer.rewards(config.reward_set(tokenizer.as_ref(), observer)?);
        }
        let report = trainer.train()?;
        written?;
        Ok(report)
    }
}

impl RunConfig {
    /// Checks what can be checked before the weights are loaded, and returns the number of steps.
    fn preflight(
        &self,
        encoder: &RowEncoder,
        train_rows: &EncodedRows,
        eval_rows: Option<&EncodedRows>,
        options: &TrainOptions,
    ) -> Result<Timetable, Error> {
        let arguments = self.trainer_arguments(options);
        let run = Preflight {
            config: &self.train,
            train: train_rows.dataset(),
            max_seq_length: encoder.max_seq_length(),
            full_finetuning: self.lora.is_none(),
            arguments: &arguments,
        };
        check_run(&run, encoder, eval_rows)
    }

    /// Returns a notice if `max_steps` overrides `num_train_epochs`.
    fn steps_notice(&self, times: &Timetable) -> Option<String> {
        let (steps, epochs) = self.train.max_steps.zip(self.train.num_train_epochs)?;
        let made = steps as f64 / times.steps_per_epoch as f64;
        Some(format!("[train] max_steps = {steps} overrides num_train_epochs = {epochs}: the run has {made:.2} epochs"))
    }

    /// Fills in the defaults that depend on the model. `continues` is true if the run continues an adapter.
    fn resolve(&mut self, model: &Model, continues: bool) {
        self.device = model.device().to_string();
        self.model.dtype = model.dtype();
        self.model.max_seq_length = Some(model.causal_lm().max_seq_length());
        // An adapter that the run continues records its own extension, with a window that a table could not express.
        let from_adapter = self.model.rope_scaling.is_none() && continues;
        if let Some(extension) = model.causal_lm().context_extension().filter(|_| !from_adapter) {
            self.model.rope_scaling = Some(extension.request.clone().into());
        }
        self.model.resolve_quant_config(model);
        self.train.resolve(self.lora.is_none(), self.data.has_eval());
    }
}

/// Returns the index of the GPU of a rank on a host with `found` of them, of which a launcher may show each rank only its own.
fn rank_gpu(position: RankPosition, found: usize) -> Result<usize, String> {
    match found {
        1 => Ok(0),
        _ if position.local_rank < found => Ok(position.local_rank),
        _ => Err(format!(
            "rank {} is number {} on its host, which has {found} GPUs; start one rank for each GPU",
            position.rank, position.local_rank
        )),
    }
}

/// Finds the files of `source`, and reports downloads and notices.
fn fetch(source: ModelSource<'_>, observer: &dyn RunObserver) -> Result<PathBuf, Error> {
    let found = source.on_download(|done, total| observer.downloading(done, total)).fetch()?;
    found.notice.iter().for_each(|notice| observer.notice(notice));
    Ok(found.path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_take_the_gpus_of_their_host() {
        let of = |local_rank, found| {
            rank_gpu(RankPosition { rank: 8 + local_rank, world_size: 16, local_rank, local_world_size: 8 }, found)
        };
        assert_eq!((of(0, 8), of(7, 8), of(3, 1)), (Ok(0), Ok(7), Ok(0)));
        assert!(of(4, 4).unwrap_err().contains("rank 12 is number 4 on its host, which has 4 GPUs"));
    }
}
