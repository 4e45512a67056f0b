//! Checks of a run's configuration that need no file.

use rekindle_kernels::parse_device;

use super::{LoraArguments, RunConfig};
use crate::Error;
use crate::rewards::RewardSet;

impl RunConfig {
    /// Checks every value and every combination of values, as far as no file is needed for it.
    ///
    /// [`load`](Self::load) and [`from_toml`](Self::from_toml) include this check; call it after changing fields.
    ///
    /// # Errors
    /// [`Error::RunFile`] with one sentence for each problem.
    pub fn check(&self) -> Result<(), Error> {
        let mut problems = Vec::new();
        self.list_problems(&mut problems);
        if problems.is_empty() {
            return Ok(());
        }
        Err(Error::RunFile { name: "the run's configuration".to_owned(), problems })
    }

    pub(super) fn list_problems(&self, problems: &mut Vec<String>) {
        if self.model.name_or_path.as_os_str().is_empty() {
            problems.push(
                "[model] name_or_path is missing; set it to a checkpoint's directory or its name on the hub".to_owned(),
            );
        }
        self.data.list_problems(problems);
        if let Err(error) = parse_device(&self.device) {
            problems.push(error.to_string());
        } else if let Err(error) = self.model.check() {
            problems.push(format!("[model] {error}"));
        }
        match (&self.lora, self.model.full_finetuning) {
            (None, false) => problems.push(
                "nothing to train: add a section [lora] (for instance with r = 16) to train an adapter, or set \
                 full_finetuning = true in [model] to train all weights"
                    .to_owned(),
            ),
            (Some(_), true) => problems.push(
                "[lora] and full_finetuning = true exclude each other; remove [lora] to train all weights, or \
                 full_finetuning to train an adapter"
                    .to_owned(),
            ),
            _ => {}
        }
        if let Some(LoraArguments { init_from: None, config, .. }) = &self.lora
            && let Err(error) = config.validate()
        {
            problems.push(format!("[lora] {error}"));
        }
        if let Err(error) = self.train.validate() {
            problems.push(format!("[train] {error}"));
        }
        if let Err(error) = RewardSet::check(&self.rewards) {
            problems.push(format!("[[rewards]] {error}"));
        }
        self.list_adapter_problems(problems);
        self.list_evaluation_problems(problems);
    }

    /// Lists keys of `[train]` that a new adapter makes ineffective.
    fn list_adapter_problems(&self, problems: &mut Vec<String>) {
        let Some(LoraArguments { init_from: None, config, .. }) = &self.lora else { return };
        if self.train.embedding_learning_rate.is_some() && config.modules_to_save.is_empty() {
            problems.push(
                "[train] embedding_learning_rate needs an embedding table or output layer that is trained: modules_to_save \
                 = [\"embed_tokens\", \"lm_head\"] in [lora], or full_finetuning"
                    .to_owned(),
            );
        }
        if self.train.optimizer_in_bwd {
            problems.push(
                "[train] optimizer_in_bwd saves memory only with full_finetuning, because an adapter's gradients are \
                 small; remove it"
                    .to_owned(),
            );
        }
    }

    /// Lists keys of `[train]` that need rows to evaluate.
    fn list_evaluation_problems(&self, problems: &mut Vec<String>) {
        if self.data.has_eval() {
            return;
        }
        for (_, key) in self.train.needs_eval().iter().filter(|(wanted, _)| *wanted) {
            problems.push(format!(
                "[train] {key} needs evaluation rows; set eval = \"…\" or eval_fraction = 0.05 in [data]"
            ));
        }
        if self.train.eval_samples > 0 {
            problems.push(
                "[train] eval_samples takes its prompts from evaluation rows; set eval = \"…\" in [data], or \
                 sample_prompts"
                    .to_owned(),
            );
        }
    }
}
