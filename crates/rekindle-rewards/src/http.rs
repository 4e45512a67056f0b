//! Rewards that are services.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::command::{default_timeout, timeout_problem};
use crate::{Reward, RewardError};

#[cfg(feature = "http")]
mod service;

/// A service that scores completions: it answers each POST of a batch as JSON with scores as JSON.
///
/// Requests and replies are those of [`CommandRewardConfig`](crate::CommandRewardConfig). A reply with status 429, 502, 503
/// or 504, and a connection that fails, are tried again after 1 s, 2 s, 4 s, …; any other status is an error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpRewardConfig {
    /// The address, `http://` or `https://`.
    pub url: String,
    /// Headers of every request.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    /// The environment variable with a token, which requests carry as `Authorization: Bearer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_env: Option<String>,
    /// The number of requests at once; a batch is divided among them. Default 1.
    #[serde(default = "one")]
    pub concurrency: usize,
    /// The longest time for a reply, in seconds. Default 60.
    #[serde(default = "default_timeout")]
    pub timeout: f64,
    /// The number of times that a request is tried again. Default 3.
    #[serde(default = "three")]
    pub retries: usize,
}

fn one() -> usize {
    1
}

fn three() -> usize {
    3
}

impl HttpRewardConfig {
    /// Returns the default options of a service.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            headers: BTreeMap::new(),
            token_env: None,
            concurrency: one(),
            timeout: default_timeout(),
            retries: three(),
        }
    }

    pub(crate) fn problem(&self) -> Option<String> {
        if !self.url.starts_with("http://") && !self.url.starts_with("https://") {
            return Some(format!("url = {:?}; it must begin with http:// or https://", self.url));
        }
        if self.concurrency == 0 {
            return Some("concurrency = 0; it must be at least 1".to_owned());
        }
        timeout_problem(self.timeout)
    }
}

/// Returns the reward of a service. No request is sent yet.
#[cfg(feature = "http")]
pub(crate) fn connect(name: String, config: &HttpRewardConfig) -> Result<Box<dyn Reward>, RewardError> {
    Ok(Box::new(service::HttpReward::new(name, config)?))
}

/// Refuses a service in a build without network access.
#[cfg(not(feature = "http"))]
pub(crate) fn connect(name: String, config: &HttpRewardConfig) -> Result<Box<dyn Reward>, RewardError> {
    Err(RewardError::config(
        name,
        format!("{} cannot be reached: this program was built without the feature network", config.url),
    ))
}
