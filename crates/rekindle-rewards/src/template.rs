//! Programs to start from.

/// A Python program for [`CommandRewardConfig`](crate::CommandRewardConfig) around a reward function with TRL's signature.
pub const PYTHON_TEMPLATE: &str = include_str!("template.py");
