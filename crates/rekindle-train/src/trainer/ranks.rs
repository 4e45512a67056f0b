//! The start of a run with several ranks.

use rekindle_kernels::optimizer::StateTensor;
use rekindle_models::CausalLm;

use super::Trainer;
use super::resume_compatibility::{RecordedSettings, first_difference};
use crate::checkpoint::TrainerState;
use crate::world::{share, share_optimizer, share_parameters};
use crate::{Error, Optimizer};

impl Trainer<'_> {
    /// Refuses settings or rows that differ from those of rank 0.
    pub(super) fn check_ranks(&self, total: usize) -> Result<(), Error> {
        if self.world.size() == 1 {
            return Ok(());
        }
        let own = RecordedSettings::for_ranks(self, total)?;
        let first = share(&*self.world, own.clone())?;
        match first_difference(&first, &own) {
            None => Ok(()),
            Some(difference) => Err(Error::Config(vec![format!(
                "rank {} differs from rank 0: {difference}; start all ranks with the same run file, rows and model",
                self.world.rank()
            )])),
        }
    }
}

/// Gives all ranks the state of rank 0: the progress of the checkpoint that it resumes from, the parameters, and the
/// optimizer, whose whole state `saved` is. Returns the progress.
pub(super) fn share_start(
    model: &mut CausalLm,
    optimizer: &mut Optimizer,
    progress: Option<TrainerState>,
    saved: Vec<StateTensor>,
) -> Result<Option<TrainerState>, Error> {
    let progress = share(optimizer.world().ranks(), progress)?;
    share_parameters(optimizer.world(), model)?;
    if let Some(progress) = &progress {
        share_optimizer(optimizer, saved)?;
        if let Some(scaler) = progress.loss_scaler {
            optimizer.set_loss_scaler(scaler);
        }
    }
    Ok(progress)
}
