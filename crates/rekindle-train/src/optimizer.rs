//! One optimizer step over given micro-batches.

use core::ops::Range;

use rekindle_dist::Communicator;
use rekindle_kernels::optimizer::{
    Clip, LearningRates, OptimizerState, StateBytes, StateError, StateFormat, StateTensor, UpdateRule, UpdateStep,
    apply, apply_shard, clipped_range_step,
};
use rekindle_kernels::{DType, Device, Grads, Params};
use rekindle_models::objective::{Metric, PendingLoss};
use rekindle_models::spec::FeedForwardSpec;
use rekindle_models::{Batch, CausalLm, Objective, StepKey};

use crate::world::{gather_losses, gather_state};
use crate::{Error, LossScaler, SftConfig, TensorWorld, show_bytes};

/// The configuration of an optimizer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OptimizerConfig {
    /// The update rule.
    pub rule: UpdateRule,
    /// The format of the optimizer's state.
    pub format: StateFormat,
    /// Weight decay, on matrices only.
    pub weight_decay: f64,
    /// The maximum global norm; 0 for no clipping.
    pub max_grad_norm: f64,
    /// NEFTune's α; 0 for no noise.
    pub neftune_noise_alpha: f64,
    /// The coefficient of the auxiliary loss of mixtures; 0 for none.
    pub router_aux_loss_coef: f64,
    /// If true, parameters are updated block by block as soon as their gradients are complete, and each block is
    /// clipped by its own norm.
    pub optimizer_in_bwd: bool,
    /// True if the optimizer's state is divided among several ranks; `None` for full fine-tuning in f32 only.
    pub shard_optimizer: Option<bool>,
}

impl OptimizerConfig {
    /// Returns the bytes of the optimizer's state for the parameters of `model`.
    pub fn state_bytes(&self, model: &CausalLm) -> StateBytes {
        self.format.bytes(self.rule, model.params().infos().iter().map(|info| info.at.range().len()))
    }

    /// Returns notices about formats that are slower than expected or stored elsewhere, one sentence each.
    pub fn notes(&self, model: &CausalLm) -> Vec<String> {
        let paged = Self { format: StateFormat::Host8, ..*self }.state_bytes(model).host;
        let mut notes = Vec::new();
        match (self.format, model.device()) {
            (StateFormat::F32, _) => {}
            _ if paged == 0 => {
                notes.push("no optimizer state has 8 bits: that needs parameters of at least 4,096 elements".to_owned())
            }
            (StateFormat::Host8, Device::Cuda(_)) => notes.push(format!(
                "the optimizer state is in page-locked host memory: each step copies {} to the device and back",
                show_bytes(paged)
            )),
            (_, Device::Cuda(_)) => {}
            (format, device) => {
                if format == StateFormat::Host8 {
                    notes.push(
                        "a paged optimizer makes no difference here: the optimizer state is in host memory \
                         anyway"
                            .to_owned(),
                    );
                }
                if !device.is_cpu() {
                    let moved = show_bytes(4 * model.params().numel());
                    notes.push(format!(
                        "parameters with 8-bit optimizer state are updated on the host: each step copies up to \
                         {moved} of gradients and as much of parameters to it, and the parameters back"
                    ));
                }
            }
        }
        notes
    }
}

impl From<&SftConfig> for OptimizerConfig {
    fn from(config: &SftConfig) -> Self {
        Self {
            rule: config.optim.rule(config),
            format: config.optim.format(),
            weight_decay: config.weight_decay,
            max_grad_norm: config.max_grad_norm,
            neftune_noise_alpha: config.neftune_noise_alpha.unwrap_or(0.0),
            router_aux_loss_coef: config.router_aux_loss_coef,
            optimizer_in_bwd: config.optimizer_in_bwd,
            shard_optimizer: config.shard_optimizer,
        }
    }
}

/// The result of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepResult {
    /// The loss of the step before the update, as its [`Objective`] defines it, plus the auxiliary loss of mixtures times
    /// its coefficient.
    pub loss: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens that the loss covers.
    pub counted: usize,
    /// Tokens of the step.
    pub tokens: usize,
    /// The objective's other means, by name, the auxiliary loss of mixtures (`aux_loss`) if it is on, and for an f16 model
    /// the scale of this step's loss (`loss_scale`) and the steps skipped so far (`skipped_steps`).
    pub metrics: Vec<(&'static str, f64)>,
}

/// The micro-batches of a step with several ranks.
#[derive(Clone, Copy, Debug)]
pub struct StepBatches<'a> {
    /// Those of this rank; there may be none.
    pub own: &'a [Batch],
    /// All rows of the step, as one rank would split them. Every rank has the same.
    pub all: &'a [Batch],
}

/// An optimizer with its state.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    state: OptimizerState,
    t: u64,
    seed: u64,
    world: TensorWorld,
    /// The elements that each rank updates, if the state is divided among the ranks.
    shards: Option<Vec<Range<usize>>>,
    /// The scale of the loss, for a model in f16.
    loss_scaler: Option<LossScaler>,
}

impl Optimizer {
    /// Returns an optimizer with a zero state for the parameters of `model`. `seed` is the seed of dropout. The loss of a
    /// model in f16 is scaled ([`LossScaler`]).
    ///
    /// # Errors
    /// [`Error::NothingToTrain`], and [`Error::Config`] for a model that cannot be trained in its dtype,
    /// `optimizer_in_bwd` with an adapter, or `router_aux_loss_coef` where it does not apply.
    pub fn new(model: &CausalLm, config: OptimizerConfig, seed: u64) -> Result<Self, Error> {
        Self::on_ranks(model, config, seed, TensorWorld::default())
    }

    /// Returns the optimizer of a rank. With [`shard_optimizer`](OptimizerConfig::shard_optimizer), it holds the state of
    /// its share of the elements (ZeRO stage 1, arXiv:1910.02054).
    ///
    /// # Errors
    /// As [`new`](Self::new); [`Error::Config`] for several ranks with `optimizer_in_bwd`, or a divided state of parameters
    /// that are trained in place.
    pub fn on_ranks(model: &CausalLm, config: OptimizerConfig, seed: u64, world: TensorWorld) -> Result<Self, Error> {
        let (rank, ranks) = (world.ranks().rank(), world.ranks().size());
        Self::of_rank(model, config, seed, world, (rank, ranks))
    }

    /// Returns the optimizer of one of several ranks on a device without values, whose collectives do nothing.
    ///
    /// # Errors
    /// As [`on_ranks`](Self::on_ranks).
    pub(crate) fn planned(model: &CausalLm, config: OptimizerConfig, ranks: usize) -> Result<Self, Error> {
        Self::of_rank(model, config, 0, TensorWorld::planned(), (0, ranks))
    }

    fn of_rank(
        model: &CausalLm,
        config: OptimizerConfig,
        seed: u64,
        world: TensorWorld,
        (rank, ranks): (usize, usize),
    ) -> Result<Self, Error> {
        if model.params().numel() == 0 {
            return Err(Error::NothingToTrain);
        }
        let is_f16 = model.dtype() == DType::F16;
        if is_f16 {
            check_f16(model, &config)?;
        }
        if config.optimizer_in_bwd && model.lora().is_some() {
            let problem = "optimizer_in_bwd saves memory only with full_finetuning, because an adapter's gradients \
                 are small; remove it, or set full_finetuning = true";
            return Err(Error::Config(vec![problem.to_owned()]));
        }
        if config.router_aux_loss_coef > 0.0 {
            check_router_aux_loss(model)?;
        }
        let (infos, device) = (model.params().infos(), model.device());
        let shards = shards(model, &config, ranks)?;
        let shard = shards.as_ref().map_or(0..model.params().numel(), |shards| shards[rank].clone());
        let state = OptimizerState::of_shard(infos, shard, device, config.rule, config.format);
        let loss_scaler = is_f16.then(LossScaler::default);
        Ok(Self { config, state, t: 0, seed, world, shards, loss_scaler })
    }

    /// Returns the ranks that take the steps.
    pub fn world(&self) -> &TensorWorld {
        &self.world
    }

    /// Returns true if each rank holds a part of the state.
    pub fn is_sharded(&self) -> bool {
        self.shards.is_some()
    }

    /// Returns the scale of the loss, for a model in f16.
    pub fn loss_scaler(&self) -> Option<&LossScaler> {
        self.loss_scaler.as_ref()
    }

    /// Replaces the scale of the loss, for example by that of a checkpoint. Does nothing unless the model is in f16.
    pub fn set_loss_scaler(&mut self, scaler: LossScaler) {
        if let Some(own) = &mut self.loss_scaler {
            *own = scaler;
        }
    }

    /// Returns the number of steps done: those with finite gradients. As in transformers, the learning rate follows this number.
    pub fn steps(&self) -> u64 {
        self.t
    }

    /// Returns the key of the random numbers of the next step.
    pub fn key(&self) -> StepKey {
        let neftune_noise_alpha = self.config.neftune_noise_alpha as f32;
        StepKey { seed: self.seed, step: self.t as u32, neftune_noise_alpha }
    }

    /// Returns the state.
    pub fn state(&self) -> &OptimizerState {
        &self.state
    }

    /// Returns the whole state on rank 0, and `None` on the others. If the state is divided, every rank calls it.
    ///
    /// # Errors
    /// [`Error::Model`] if the device fails, [`Error::Ranks`] if another rank failed.
    pub fn gather_state(&self) -> Result<Option<Vec<StateTensor>>, Error> {
        let own = self.state.tensors().map(|tensor| tensor.map_err(|error| rekindle_models::Error::from(error).into()));
        match self.world.ranks() {
            ranks if self.is_sharded() => gather_state(ranks, own),
            ranks if ranks.is_first() => own.collect::<Result<_, _>>().map(Some),
            _ => Ok(None),
        }
    }

    /// Restores the whole state after `steps` steps, of which a divided one keeps its part.
    ///
    /// # Errors
    /// An error if the state does not match the parameters; nothing changes then.
    pub fn resume(&mut self, steps: u64, state: impl IntoIterator<Item = StateTensor>) -> Result<(), StateError> {
        self.state.load(state)?;
        self.t = steps;
        Ok(())
    }

    /// Accumulates the gradient of the mean loss of `objective` over all of `batches`, clips it by its global norm (times
    /// min(1, max_grad_norm / (norm + 1e-6)), as in PyTorch), and updates the parameters.
    ///
    /// For a model in f16, the gradient is that of the scaled loss, and is divided by the scale before it is clipped.
    ///
    /// If the norm is not finite, the parameters do not change, and the result contains the norm. With
    /// [`optimizer_in_bwd`](OptimizerConfig::optimizer_in_bwd), blocks with finite gradients are already updated by
    /// then.
    ///
    /// # Errors
    /// [`Error::Model`] if a batch does not fit the model, or the device fails.
    pub fn step(
        &mut self,
        model: &mut CausalLm,
        objective: &dyn Objective,
        batches: &[Batch],
        rates: impl Into<LearningRates>,
    ) -> Result<StepResult, Error> {
        self.step_on_ranks(model, objective, StepBatches { own: batches, all: batches }, rates.into())
    }

    /// [`step`](Self::step) of all ranks together: each computes the gradient of its own micro-batches, and all clip and
    /// apply their sum. The loss is the mean over the rows of all ranks.
    ///
    /// # Errors
    /// As [`step`](Self::step); [`Error::Ranks`] if another rank failed.
    pub fn step_on_ranks(
        &mut self,
        model: &mut CausalLm,
        objective: &dyn Objective,
        batches: StepBatches<'_>,
        rates: LearningRates,
    ) -> Result<StepResult, Error> {
        let StepBatches { own, all } = batches;
        let counted = all.iter().map(Batch::counted).sum();
        let tokens: usize = all.iter().map(Batch::tokens).sum();
        let scale = step_scale(objective, all);
        let OptimizerConfig { weight_decay, optimizer_in_bwd, .. } = self.config;
        let step = UpdateStep { t: self.t + 1, rates, weight_decay };
        model.params_mut().set_rounding_seed(self.seed);
        let router_aux_loss_coef = self.config.router_aux_loss_coef;
        let loss_scale = self.loss_scaler.map_or(1.0, |scaler| scaler.scale());
        let grad_factor = (scale * loss_scale) as f32;
        model.set_router_aux_loss((router_aux_loss_coef * loss_scale / tokens.max(1) as f64) as f32);
        let (losses, clips) = if optimizer_in_bwd {
            self.move_in_backward(model, objective, own, grad_factor, &step)?
        } else {
            let key = Some(self.key());
            let terms = model.step_terms(objective, all, key)?;
            let mut grads = model.params().zero_grads();
            let mut losses = Vec::with_capacity(own.len());
            for batch in own {
                losses.push(model.objective_backward(objective, batch, &terms, grad_factor, &mut grads, key)?);
            }
            let clip = self.apply(model, &mut grads, &step, 1.0 / loss_scale)?;
            (losses, vec![clip])
        };
        // Everything is queued; from here on the host waits.
        let (mut loss, mut metrics) = (0.0, Vec::new());
        for (sum, more) in losses.into_iter().map(PendingLoss::wait) {
            loss += sum;
            Metric::add(&mut metrics, more);
        }
        let mut grad_norm = match &clips[..] {
            [clip] => clip.norm(),
            clips => clips.iter().map(|clip| clip.norm().powi(2)).sum::<f64>().sqrt(),
        };
        // Before the other ranks are waited for: after an error of its device, this rank has not taken part in their sums.
        model.device().check().map_err(rekindle_models::Error::from)?;
        let (loss, metrics) = sum_of_ranks(self.world.ranks(), loss, metrics)?;
        let mut metrics = Metric::means(&metrics);
        let aux_loss = metrics.iter().find(|(name, _)| *name == "aux_loss").map_or(0.0, |(_, mean)| *mean);
        let loss = loss * scale + router_aux_loss_coef * aux_loss;
        if let Some(scaler) = &mut self.loss_scaler {
            scaler.update(grad_norm.is_finite());
            grad_norm = if grad_norm.is_finite() { grad_norm } else { f64::INFINITY };
            metrics.extend([("loss_scale", loss_scale), ("skipped_steps", scaler.skipped() as f64)]);
        }
        if grad_norm.is_finite() {
            self.t += 1;
        }
        Ok(StepResult { loss, grad_norm, counted, tokens, metrics })
    }

    /// Sums the gradients of all ranks, multiplies them by `grad_scale`, which is 1 where the state is divided, clips and
    /// applies them.
    fn apply(
        &mut self,
        model: &mut CausalLm,
        grads: &mut Grads,
        step: &UpdateStep,
        grad_scale: f64,
    ) -> Result<Clip, Error> {
        let max_grad_norm = self.config.max_grad_norm;
        let device = model.device().clone();
        let params = model.params_mut();
        let Some(shards) = &self.shards else {
            if self.world.ranks().size() > 1 {
                self.world.all_reduce(grads)?;
            }
            let clip = Clip::of(grads, grad_scale, max_grad_norm);
            apply(params, grads, &mut self.state, step, &clip);
            return Ok(clip);
        };
        self.world.reduce_scatter(grads, shards)?;
        let clip = self.world.clip(grads, shards, max_grad_norm, &device)?;
        apply_shard(params, grads, &mut self.state, step, &clip);
        self.world.all_gather(params, shards)?;
        Ok(clip)
    }

    /// Updates each block's parameters as soon as its gradients are complete, clipped by the block's own norm.
    fn move_in_backward(
        &mut self,
        model: &mut CausalLm,
        objective: &dyn Objective,
        batches: &[Batch],
        scale: f32,
        step: &UpdateStep,
    ) -> Result<(Vec<PendingLoss>, Vec<Clip>), Error> {
        let [batch] = batches else {
            return Err(Error::Config(vec![format!(
                "optimizer_in_bwd = true updates parameters during the backward pass, so a step must be one batch, \
                 not {}",
                batches.len()
            )]));
        };
        let (key, max_grad_norm, state) = (Some(self.key()), self.config.max_grad_norm, &mut self.state);
        let terms = model.step_terms(objective, core::slice::from_ref(batch), key)?;
        let mut clips = Vec::new();
        let mut apply = |params: &mut Params, grads: &Grads, index: usize| {
            let range = grads.ranges().swap_remove(index);
            if !range.is_empty() {
                clips.push(clipped_range_step(params, range, grads, state, step, max_grad_norm));
            }
        };
        let loss = model.objective_backward_applying(objective, batch, &terms, scale, key, &mut apply)?;
        Ok((vec![loss], clips))
    }
}

/// Returns the sums over all ranks.
fn sum_of_ranks(world: &dyn Communicator, loss: f64, metrics: Vec<Metric>) -> Result<(f64, Vec<Metric>), Error> {
    let (mut loss_of_all, mut metrics_of_all) = (0.0, Vec::new());
    for (loss, metrics) in gather_losses(world, vec![(loss, metrics)])?.into_iter().flatten() {
        loss_of_all += loss;
        Metric::add(&mut metrics_of_all, metrics);
    }
    Ok((loss_of_all, metrics_of_all))
}

/// Returns the elements that each of `ranks` updates, if the state of the optimizer is divided among them.
fn shards(model: &CausalLm, config: &OptimizerConfig, ranks: usize) -> Result<Option<Vec<Range<usize>>>, Error> {
    if ranks == 1 {
        return Ok(None);
    }
    let refuse = |problem: &str| Err(Error::Config(vec![problem.to_owned()]));
    if config.optimizer_in_bwd {
        return refuse(
            "optimizer_in_bwd = true applies gradients before all ranks have theirs; remove it, or train with one rank",
        );
    }
    let is_in_place = model.params().are_in_place();
    if is_in_place && config.shard_optimizer == Some(true) {
        return refuse(
            "shard_optimizer = true needs weights in f32; remove it, or remove stochastic_rounding, load_in_8bit and \
             load_in_4bit",
        );
    }
    let is_f16 = model.dtype() == DType::F16;
    if is_f16 && config.shard_optimizer == Some(true) {
        return refuse("shard_optimizer = true needs dtype \"bf16\" or \"f32\"; remove it, or use one of them");
    }
    if is_f16 {
        return Ok(None);
    }
    if !config.shard_optimizer.unwrap_or(model.lora().is_none() && !is_in_place) {
        return Ok(None);
    }
    let shards = OptimizerState::shards(model.params().infos(), config.rule, config.format, ranks);
    // A few values are not worth it.
    Ok(shards.iter().all(|shard| !shard.is_empty()).then_some(shards))
}

/// Refuses what cannot be trained in f16.
fn check_f16(model: &CausalLm, config: &OptimizerConfig) -> Result<(), Error> {
    let refuse = |problem: String| Err(Error::Config(vec![problem]));
    if let Some(reason) = model.config().f16_training_obstacle() {
        let architecture = &model.config().architecture;
        return refuse(format!("{architecture} cannot be trained in f16: {reason}; use dtype \"bf16\" or \"f32\""));
    }
    if config.optimizer_in_bwd {
        return refuse(
            "optimizer_in_bwd = true applies gradients before it is known whether all are finite, which f16 needs; \
             remove it, or use dtype \"bf16\""
                .to_owned(),
        );
    }
    if model.params().are_in_place() {
        return refuse(
            "weights that are trained in 16, 8 or 4 bits without an f32 copy need dtype \"bf16\"; use it, or train \
             with an f32 copy"
                .to_owned(),
        );
    }
    Ok(())
}

/// Refuses the auxiliary loss of mixtures where there is none.
fn check_router_aux_loss(model: &CausalLm) -> Result<(), Error> {
    if model.config().spec.layers.iter().any(|layer| matches!(layer.feed_forward, FeedForwardSpec::Moe(_))) {
        return Ok(());
    }
    Err(Error::Config(vec![
        "router_aux_loss_coef balances the experts of a mixture, and this model has none; remove it".to_owned(),
    ]))
}

/// The factor that makes the summed loss of micro-batches the loss of their step.
pub(crate) fn step_scale(objective: &dyn Objective, batches: &[Batch]) -> f64 {
    1.0 / batches.iter().map(|batch| objective.count(batch)).sum::<usize>().max(1) as f64
}
