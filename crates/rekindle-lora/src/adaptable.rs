//! The parts of a layer that adapters can be on.

use rekindle_kernels::{ParamRef, Params, ParamsBuilder, Weight};

use crate::{ExpertLinear, LinearGroup, LoraInit};

/// A part of a layer that adapters can be on.
#[derive(Clone, Copy, Debug)]
pub enum Adaptable<'a> {
    /// Linears that read the same input.
    Linears(&'a LinearGroup),
    /// A projection of all experts.
    Experts(&'a ExpertLinear),
}

/// As [`Adaptable`], to be changed.
#[derive(Debug)]
pub enum AdaptableMut<'a> {
    /// Linears that read the same input.
    Linears(&'a mut LinearGroup),
    /// A projection of all experts.
    Experts(&'a mut ExpertLinear),
}

impl<'a> Adaptable<'a> {
    /// The linears, unless they are experts'.
    pub fn linears(self) -> Option<&'a LinearGroup> {
        match self {
            Self::Linears(group) => Some(group),
            Self::Experts(_) => None,
        }
    }

    /// Returns the current trained parameters of every linear, by the linear's name.
    pub fn trained(self, params: &Params) -> Vec<(String, LoraInit)> {
        match self {
            Self::Linears(group) => group.trained(params),
            Self::Experts(experts) => experts.trained(params),
        }
    }

    /// Every trained parameter: weights, biases and adapters.
    pub fn trained_params(self) -> Vec<ParamRef> {
        match self {
            Self::Linears(group) => group.trained_params().collect(),
            Self::Experts(experts) => experts.trained_params().collect(),
        }
    }
}

impl<'a> AdaptableMut<'a> {
    /// As [`Adaptable::linears`].
    pub fn linears(self) -> Option<&'a mut LinearGroup> {
        match self {
            Self::Linears(group) => Some(group),
            Self::Experts(_) => None,
        }
    }

    /// The experts, if they are.
    pub fn experts(self) -> Option<&'a mut ExpertLinear> {
        match self {
            Self::Linears(_) => None,
            Self::Experts(experts) => Some(experts),
        }
    }

    /// Returns the weights, to be replaced by others of the same shape.
    pub fn weights_mut(self) -> Vec<&'a mut Weight> {
        match self {
            Self::Linears(group) => group.weights_mut().collect(),
            Self::Experts(experts) => vec![&mut experts.weight],
        }
    }

    /// Gives each linear what `adaptation` returns for its name, replacing what it had. `site` tells the dropout masks of
    /// linears from all others.
    pub fn adapt(self, params: &mut ParamsBuilder, site: u32, mut adaptation: impl FnMut(&str) -> LoraInit) {
        match self {
            Self::Linears(group) => group.adapt(params, site, |linear| adaptation(&linear.name)),
            Self::Experts(experts) => experts.adapt(params, adaptation),
        }
    }
}
