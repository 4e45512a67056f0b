//! Rewards that are programs.

mod worker;

use core::time::Duration;

use serde::{Deserialize, Serialize};

use crate::exchange::{ScoreRequest, read_reply};
use crate::{Reward, RewardError, Sample};
use worker::{Worker, WorkerFailure};

/// A program that scores completions: it reads one JSON object a line and answers each with one line.
///
/// A request is `{"id": 1, "samples": [{"prompt", "completion", "completion_ids", "truncated", "messages", "row"}]}`, its
/// reply `{"id": 1, "rewards": [0.5, null]}` with one number or null for each sample, or `{"id": 1, "error": "…"}`. The
/// program stays alive between requests; its input is closed when the run ends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommandRewardConfig {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// The number of processes; a batch is divided among them. Default 1.
    #[serde(default = "one")]
    pub workers: usize,
    /// The longest time for a reply, in seconds. Default 60.
    #[serde(default = "default_timeout")]
    pub timeout: f64,
    /// The number of times in a run that a process which died or hung is started again, with the same request. Default 2.
    #[serde(default = "default_restarts")]
    pub restarts: usize,
}

fn one() -> usize {
    1
}

pub(crate) fn default_timeout() -> f64 {
    60.0
}

fn default_restarts() -> usize {
    2
}

impl CommandRewardConfig {
    /// Returns the default options of a program.
    pub fn new(command: impl IntoIterator<Item = impl Into<String>>) -> Self {
        let command = command.into_iter().map(Into::into).collect();
        Self { command, workers: one(), timeout: default_timeout(), restarts: default_restarts() }
    }

    pub(crate) fn problem(&self) -> Option<String> {
        if self.command.first().is_none_or(String::is_empty) {
            return Some("command is empty; write the program and its arguments as a list".to_owned());
        }
        if self.workers == 0 {
            return Some("workers = 0; it must be at least 1".to_owned());
        }
        timeout_problem(self.timeout)
    }
}

pub(crate) fn timeout_problem(timeout: f64) -> Option<String> {
    let valid = timeout > 0.0 && Duration::try_from_secs_f64(timeout).is_ok();
    (!valid).then(|| format!("timeout = {timeout}; it must be a number of seconds above 0"))
}

/// A [`CommandRewardConfig`] with its processes.
pub struct CommandReward {
    name: String,
    config: CommandRewardConfig,
    timeout: Duration,
    workers: Vec<Worker>,
    /// The number of restarts that are left.
    restarts: usize,
    /// The number of the last request.
    last_id: u64,
}

impl CommandReward {
    /// Starts the processes.
    ///
    /// # Errors
    ///
    /// [`RewardError::Config`] for an option that cannot work, [`RewardError::Failed`] for a program that does not start.
    pub fn start(name: impl Into<String>, config: &CommandRewardConfig) -> Result<Self, RewardError> {
        let name = name.into();
        if let Some(problem) = config.problem() {
            return Err(RewardError::config(name, problem));
        }
        let workers = (0..config.workers).map(|_| Worker::start(&config.command));
        let workers = workers.collect::<Result<_, _>>().map_err(|problem| RewardError::failed(&*name, problem))?;
        Ok(Self {
            name,
            timeout: Duration::from_secs_f64(config.timeout),
            config: config.clone(),
            workers,
            restarts: config.restarts,
            last_id: 0,
        })
    }

    /// Waits for a worker's reply. A process that died or hung is started again with the same request.
    fn receive(&mut self, worker: usize, request: &str) -> Result<String, RewardError> {
        loop {
            let failure = match self.workers[worker].receive(self.timeout) {
                Ok(line) => return Ok(line),
                Err(failure) => failure,
            };
            let problem = match failure {
                WorkerFailure::Died(status) => format!("the command ended without a reply ({status})"),
                WorkerFailure::TimedOut => format!(
                    "the command did not reply within {} s; raise timeout, or score fewer completions at once",
                    self.config.timeout
                ),
            };
            let problem = format!("{problem}{}", self.stderr_of(worker));
            if self.restarts == 0 {
                let again = match self.config.restarts {
                    0 => String::new(),
                    1 => " after 1 restart".to_owned(),
                    count => format!(" after {count} restarts"),
                };
                return Err(RewardError::failed(&*self.name, format!("{}{again}: {problem}", self.config.command[0])));
            }
            self.restarts -= 1;
            self.workers[worker] = Worker::start(&self.config.command)
                .map_err(|again| RewardError::failed(&*self.name, format!("{again}, after {problem}")))?;
            self.workers[worker].send(request);
        }
    }

    /// Returns the end of a process's standard error for a message.
    fn stderr_of(&self, worker: usize) -> String {
        match self.workers[worker].stderr() {
            text if text.is_empty() => "; its standard error is empty".to_owned(),
            text => format!("; the end of its standard error:\n{text}"),
        }
    }
}

impl Reward for CommandReward {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, samples: &[Sample]) -> Result<Vec<Option<f64>>, RewardError> {
        if samples.is_empty() {
            return Ok(Vec::new());
        }
        let share = samples.len().div_ceil(self.workers.len());
        let mut requests = Vec::new();
        // All processes have their shares before the first reply is awaited.
        for (worker, part) in samples.chunks(share).enumerate() {
            self.last_id += 1;
            let line = ScoreRequest::new(self.last_id, part).to_line();
            self.workers[worker].send(&line);
            requests.push((self.last_id, part.len(), line));
        }
        let mut scores = Vec::with_capacity(samples.len());
        for (worker, (id, count, line)) in requests.into_iter().enumerate() {
            let reply = self.receive(worker, &line)?;
            let part = read_reply(&self.name, "the command", &reply, id, count).map_err(|error| match error {
                RewardError::Failed { reward, problem } => {
                    RewardError::Failed { problem: problem + &self.stderr_of(worker), reward }
                }
                other => other,
            })?;
            scores.extend(part);
        }
        Ok(scores)
    }
}

#[cfg(test)]
mod tests;
