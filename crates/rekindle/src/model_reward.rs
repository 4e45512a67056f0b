//! `[[rewards]]` of type `model`: completions scored by a reward model.

use rekindle_data::{ChatPrompt, Message, PromptEnd, Tokenizer};
use rekindle_kernels::DeviceKind;
use rekindle_models::{Batch, IGNORED};
use rekindle_rewards::{ModelRewardConfig, Reward, RewardError, RewardSet, Sample};

use crate::run::{ModelArguments, RunConfig, RunObserver};
use crate::{Error, Loader, Model};

/// The number of documents of a pass.
const ROWS: usize = 8;

/// The scores of a reward model.
///
/// A document is the prompt and the completion as the policy sampled it, token by token. After a completion of a conversation
/// that has ended comes the rest of the turn in the chat template, as in the rows that `method = "reward"` trains on.
struct ModelReward {
    name: String,
    model: Model,
    /// The tokens of the chat template after the end token of a turn.
    rest_of_turn: Vec<u32>,
}

impl Reward for ModelReward {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, samples: &[Sample]) -> Result<Vec<Option<f64>>, RewardError> {
        let documents: Vec<Vec<u32>> = samples.iter().map(|sample| self.document(sample)).collect();
        let mut scores = Vec::with_capacity(samples.len());
        for part in documents.chunks(ROWS) {
            let labels: Vec<Vec<i32>> = part.iter().map(|ids| vec![IGNORED; ids.len()]).collect();
            let batch = Batch::from_rows(part.iter().zip(&labels).map(|(ids, labels)| (&ids[..], &labels[..])), 0);
            let found = self.model.causal_lm().scores(&batch);
            scores.extend(found.map_err(|error| RewardError::failed(&self.name, error.to_string()))?);
        }
        Ok(scores.into_iter().map(Some).collect())
    }
}

impl ModelReward {
    fn document(&self, sample: &Sample) -> Vec<u32> {
        let mut ids = [sample.prompt_ids, sample.completion_ids].concat();
        if sample.messages.is_some() && !sample.truncated {
            ids.extend(&self.rest_of_turn);
        }
        ids
    }
}

impl RunConfig {
    /// Returns the rewards of `[[rewards]]`. Commands are started here, and reward models are loaded onto the CPU.
    /// `tokenizer` is that of the model that samples.
    ///
    /// # Errors
    /// [`Error::Reward`] for a reward that cannot work, among them a reward model with another tokenizer.
    pub fn reward_set(&self, tokenizer: Option<&Tokenizer>, observer: &dyn RunObserver) -> Result<RewardSet, Error> {
        let load = &mut |name: &str, config: &ModelRewardConfig| -> Result<Box<dyn Reward>, RewardError> {
            let failed = |error: Error| RewardError::failed(name, format!("model = {:?}: {error}", config.model));
            let (model, own) = self.load_reward_model(config, observer).map_err(failed)?;
            let refused =
                |problem: &str| Err(RewardError::config(name, format!("model = {:?} {problem}", config.model)));
            if !model.causal_lm().has_score_head() {
                return refused(
                    "has no score head; name an adapter or a checkpoint that method = \"reward\" has trained",
                );
            }
            if let (Some(ours), Some(own)) = (tokenizer, &own)
                && !has_same_vocabulary(ours, own)
            {
                return refused(
                    "has another tokenizer than the model that is trained; use a reward model on the same base, or run \
                     it as a command or a service",
                );
            }
            let rest_of_turn = rest_of_turn(&model, own.as_ref().or(tokenizer)).map_err(failed)?;
            Ok(Box::new(ModelReward { name: name.to_owned(), model, rest_of_turn }))
        };
        Ok(RewardSet::from_configs_with(&self.rewards, load)?)
    }

    fn load_reward_model(
        &self,
        config: &ModelRewardConfig,
        observer: &dyn RunObserver,
    ) -> Result<(Model, Option<Tokenizer>), Error> {
        let arguments = ModelArguments {
            name_or_path: config.model.clone().into(),
            max_seq_length: self.model.max_seq_length,
            load_in_4bit: config.load_in_4bit,
            ..ModelArguments::default()
        };
        let mut loader = Loader::new(arguments)
            .device(DeviceKind::Cpu)
            .on_download(|done, total| observer.downloading(done, total))
            .on_progress(|done, total| observer.loading(done, total));
        let tokenizer = loader.fetch()?.load_tokenizer()?;
        Ok((loader.load_model()?, tokenizer))
    }
}

/// Returns true if all ids are the same tokens.
fn has_same_vocabulary(a: &Tokenizer, b: &Tokenizer) -> bool {
    let size = a.vocab_size();
    size == b.vocab_size() && (0..size as u32).all(|id| a.id_to_token(id) == b.id_to_token(id))
}

/// Returns the tokens that the chat template writes after the end token of the assistant's turn; none without a template.
fn rest_of_turn(model: &Model, tokenizer: Option<&Tokenizer>) -> Result<Vec<u32>, Error> {
    let Some(tokenizer) = tokenizer.filter(|tokenizer| tokenizer.has_chat_template()) else { return Ok(Vec::new()) };
    let mut prompt = ChatPrompt { end: PromptEnd::Turn, ..ChatPrompt::new(None, "a") };
    prompt.messages.push(Message::new("assistant", "b"));
    let ids = prompt.encode(tokenizer)?;
    let ends = model.end_tokens(Some(tokenizer))?;
    let last = ids.iter().rposition(|id| ends.contains(id));
    Ok(last.map_or_else(Vec::new, |last| ids[last + 1..].to_vec()))
}
