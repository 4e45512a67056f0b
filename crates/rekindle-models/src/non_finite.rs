//! Search for the first value of a step that is not finite: the step is repeated and checked module by module.

use rekindle_hub::{Dtype, TensorView};
use rekindle_kernels::{Grads, Tensor, Weight, linear_cross_entropy, to_f32};

use crate::objective::StepTerms;
use crate::{Batch, CausalLm, Error, IGNORED, Objective, Role, StepKey};

/// The first place of a step, in the order of computation, with a value that is infinite or NaN.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum NonFinite {
    /// A weight, before anything is computed with it.
    Weight {
        /// The name in the checkpoint or among the trained parameters.
        name: String,
        /// True if it is trained.
        trained: bool,
        /// The affected rows of the step.
        rows: Vec<u32>,
    },
    /// The output of a module with finite inputs and weights.
    Output {
        /// The module's name; `lm_head` for logits and loss.
        module: String,
        /// The largest magnitude of its inputs.
        largest_input: f32,
        /// The affected rows of the step.
        rows: Vec<u32>,
    },
    /// A gradient of a finite loss.
    Gradient {
        /// The parameter, the first that the backward pass reaches.
        parameter: String,
        /// The rows of the step that it comes from; empty when it overflows only as their sum.
        rows: Vec<u32>,
    },
    /// The norm of gradients that are all finite.
    Norm {
        /// The parameter with the largest gradient.
        parameter: String,
        /// The magnitude of its gradient.
        largest: f32,
    },
}

impl NonFinite {
    /// Returns the rows of the step that cause it, if they were found.
    pub fn rows(&self) -> &[u32] {
        match self {
            Self::Weight { rows, .. } | Self::Output { rows, .. } | Self::Gradient { rows, .. } => rows,
            Self::Norm { .. } => &[],
        }
    }
}

impl core::fmt::Display for NonFinite {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Weight { name, trained: true, .. } => write!(f, "the trained weight \"{name}\" is not finite"),
            Self::Weight { name, .. } => write!(f, "the weight \"{name}\" is not finite"),
            Self::Output { module, largest_input, .. } => {
                write!(
                    f,
                    "the output of \"{module}\" is the first that is not finite; its inputs reach {largest_input:.2e}"
                )
            }
            Self::Gradient { parameter, .. } => {
                write!(f, "all outputs are finite; the gradient of \"{parameter}\" is the first that is not")
            }
            Self::Norm { parameter, largest } => {
                write!(
                    f,
                    "all gradients are finite, but their norm is not; that of \"{parameter}\" reaches {largest:.2e}"
                )
            }
        }
    }
}

/// The first output of a batch's forward pass that is not finite.
struct BrokenOutput {
    /// 0 for the embedding, then the layers, the final norm and the head.
    depth: usize,
    rows: Vec<u32>,
    largest_input: f32,
}

impl CausalLm {
    /// Goes through the micro-batches of a step again, with the same dropout, until something is not finite; `None` when
    /// everything is. Much slower than the step: every output is read back, and rows are gone through one by one.
    ///
    /// # Errors
    /// As [`objective_backward`](Self::objective_backward).
    pub fn first_non_finite(
        &self,
        objective: &dyn Objective,
        batches: &[Batch],
        grad_scale: f32,
        key: Option<StepKey>,
    ) -> Result<Option<NonFinite>, Error> {
        match self.first_non_finite_output(batches, key)? {
            Some(found) => Ok(Some(found)),
            None => self.broken_gradient(objective, batches, grad_scale, key),
        }
    }

    /// The forward half of [`first_non_finite`](Self::first_non_finite), for evaluation and generation: returns a
    /// [`NonFinite::Weight`] or [`NonFinite::Output`], or `None` when every output and loss is finite.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn first_non_finite_output(&self, batches: &[Batch], key: Option<StepKey>) -> Result<Option<NonFinite>, Error> {
        let mut broken = Vec::new();
        for batch in batches {
            broken.extend(self.broken_output(batch, key)?);
        }
        let Some(first) = broken.iter().map(|b| b.depth).min() else { return Ok(None) };
        let rows = broken.iter().flat_map(|b| b.rows.iter().copied()).collect();
        let largest_input = broken.iter().filter(|b| b.depth == first).map(|b| b.largest_input).fold(0.0, f32::max);
        Ok(Some(match self.broken_weight(first) {
            Some((name, trained)) => NonFinite::Weight { name, trained, rows },
            None => NonFinite::Output { module: self.module_at(first), largest_input, rows },
        }))
    }

    /// Returns the error for logits after `ids` that are not finite, which would have given the new token of this number.
    pub fn non_finite_logits(&self, ids: &[u32], number: usize) -> Error {
        let mut batch = Batch::from_rows([(ids, &*vec![IGNORED; ids.len()])], 0);
        // The loss of any token after the last one depends on all of its logits.
        if let Some(target) = batch.targets.last_mut() {
            *target = 0;
        }
        match self.first_non_finite_output(&[batch], None) {
            Ok(found) => Error::NonFinite { what: format!("the logits of new token {number} are not finite"), found },
            Err(error) => error,
        }
    }

    /// The forward pass, up to the first output that is not finite.
    fn broken_output(&self, batch: &Batch, key: Option<StepKey>) -> Result<Option<BrokenOutput>, Error> {
        /// The end of the walk: a broken output, or a device that failed.
        enum Stop {
            Broken(BrokenOutput),
            Failed(Error),
        }
        let pass = self.prepare(batch, key);
        let mut largest_input = 0.0;
        let look = |depth: usize, h: &Tensor<2>| {
            let values = to_f32(h.clone());
            self.device().check().map_err(|error| Stop::Failed(error.into()))?;
            let rows = rows_with(batch, |token| {
                let width = values.len() / batch.tokens();
                values[token * width..(token + 1) * width].iter().all(|x| x.is_finite())
            });
            let input = core::mem::replace(&mut largest_input, largest(&values));
            if rows.is_empty() {
                return Ok(());
            }
            Err(Stop::Broken(BrokenOutput { depth, rows, largest_input: input }))
        };
        let n = match self.decoder.hidden(pass.context(&self.params, true), &pass, look) {
            Ok(n) => n,
            Err(Stop::Broken(broken)) => return Ok(Some(broken)),
            Err(Stop::Failed(error)) => return Err(error),
        };
        if self.has_score_head() {
            let scores = self.scores(batch)?;
            let rows = batch.rows.iter().zip(&scores).filter(|(_, score)| !score.is_finite()).map(|(&row, _)| row);
            let (rows, depth): (Vec<u32>, _) = (rows.collect(), self.depth(Role::Head));
            return Ok((!rows.is_empty()).then_some(BrokenOutput { depth, rows, largest_input }));
        }
        let head = self.decoder.lm_head(&self.params, true);
        let nll = linear_cross_entropy::forward(&n, &head, &batch.targets).values();
        let rows = rows_with(batch, |token| nll[token].is_finite());
        let depth = self.depth(Role::Head);
        Ok((!rows.is_empty()).then_some(BrokenOutput { depth, rows, largest_input }))
    }

    /// The place of a tensor in the order of the forward pass: 0 for the embedding, then the layers, the final norm and
    /// the head.
    fn depth(&self, role: Role) -> usize {
        match role {
            Role::Embedding => 0,
            Role::Layer(layer, _) => layer + 1,
            Role::FinalNorm => self.decoder.layers.len() + 1,
            Role::Head => self.decoder.layers.len() + 2,
        }
    }

    /// The module whose output has this depth.
    fn module_at(&self, depth: usize) -> String {
        let names = &self.config.names;
        match depth {
            0 => names.module(Role::Embedding),
            d if d <= self.decoder.layers.len() => names.layer(d - 1),
            d if d == self.depth(Role::FinalNorm) => names.module(Role::FinalNorm),
            _ => names.module(Role::Head),
        }
    }

    /// The first weight of that module that is not finite, and whether it is trained.
    fn broken_weight(&self, depth: usize) -> Option<(String, bool)> {
        // The table may be the head.
        let is_tied = self.decoder.vocabulary.head.is_none() && depth == self.depth(Role::Head);
        let depth = if is_tied { 0 } else { depth };
        for needed in self.config.parameters().into_iter().filter(|needed| self.depth(needed.role) == depth) {
            let part = self.weight(&needed);
            let is_finite = |rows: &Tensor<2>| to_f32(rows.clone()).iter().all(|w| w.is_finite());
            let rows = part.rows();
            let broken = match &*part.weight.whole() {
                Weight::Trained(_) | Weight::Sharded(_) => false,
                Weight::Frozen(whole) => !is_finite(&whole.rows(rows.start, rows.len())),
                Weight::Quantized(codes) => !is_finite(&codes.decode_rows(rows.start, rows.len())),
            };
            if broken {
                return Some((needed.name, false));
            }
        }
        let module = format!("{}.", self.module_at(depth));
        let broken = self.params.infos().iter().filter(|info| info.name.starts_with(&module));
        let mut broken = broken.filter(|info| !self.params.values(info.at).iter().all(|w| w.is_finite()));
        broken.next().map(|info| (info.name.clone(), true))
    }

    /// The backward pass of each row alone, if the loss is a sum over rows, then of all together.
    fn broken_gradient(
        &self,
        objective: &dyn Objective,
        batches: &[Batch],
        grad_scale: f32,
        key: Option<StepKey>,
    ) -> Result<Option<NonFinite>, Error> {
        let mut all = self.params.zero_grads();
        let (mut first, mut rows) = (None, Vec::new());
        let by_row = batches.iter().filter(|batch| objective.fixed_weights(batch).is_some());
        for document in by_row.flat_map(Batch::split) {
            let mut grads = self.params.zero_grads();
            self.objective_backward(objective, &document, &StepTerms::default(), grad_scale, &mut grads, key)?;
            if let Some(found) = self.deepest_broken(&grads) {
                rows.extend(document.rows);
                first = first.max(Some(found));
            }
        }
        if first.is_none() {
            let terms = self.step_terms(objective, batches, key)?;
            for batch in batches {
                self.objective_backward(objective, batch, &terms, grad_scale, &mut all, key)?;
            }
            first = self.deepest_broken(&all);
        }
        if let Some((_, index)) = first {
            return Ok(Some(NonFinite::Gradient { parameter: self.params.infos()[index].name.clone(), rows }));
        }
        if all.norm().is_finite() {
            return Ok(None);
        }
        let sizes = self.params.infos().iter().map(|info| (largest(&all.values(info.at)), &info.name));
        let most = sizes.max_by(|a, b| a.0.total_cmp(&b.0));
        Ok(most.map(|(largest, name)| NonFinite::Norm { parameter: name.clone(), largest }))
    }

    /// Returns the depth and the number of the first parameter in backward order whose gradient is not finite.
    fn deepest_broken(&self, grads: &Grads) -> Option<(usize, usize)> {
        let infos = self.params.infos().iter().enumerate();
        let broken = infos.filter(|(_, info)| !grads.values(info.at).iter().all(|g| g.is_finite()));
        broken.map(|(index, info)| (self.depth_of(&info.name), index)).max()
    }

    /// The depth of the module that a trained parameter belongs to. A tied table counts as the head.
    fn depth_of(&self, name: &str) -> usize {
        let modules = (0..=self.depth(Role::Head)).map(|depth| format!("{}.", self.module_at(depth)));
        let depth = modules.enumerate().find(|(_, module)| name.starts_with(module)).map(|(depth, _)| depth);
        match depth {
            Some(0) if self.decoder.vocabulary.head.is_none() => self.depth(Role::Head),
            Some(depth) => depth,
            None => self.depth(Role::Head),
        }
    }
}

/// Returns the text of an error after "… is not finite": the origin, and what to do.
pub(crate) fn explain(found: Option<&NonFinite>) -> String {
    let advice = match found {
        None => return String::new(),
        Some(NonFinite::Weight { trained: false, .. }) => "the checkpoint is damaged there: download or save it again",
        Some(NonFinite::Weight { trained: true, .. }) => "use a checkpoint from before its training diverged",
        Some(_) => "if the model is in f16 or bf16, load it in f32",
    };
    found.map_or_else(String::new, |found| format!(": {found}; {advice}"))
}

/// Refuses a stored tensor with an element that is infinite or not a number: codes and casts would hide it.
///
/// # Errors
/// [`Error::NonFinite`] with the tensor's name.
pub(crate) fn check_view(view: &TensorView<'_>) -> Result<(), Error> {
    fn finite<const N: usize>(data: &[u8], is_finite: impl Fn([u8; N]) -> bool) -> bool {
        data.as_chunks::<N>().0.iter().all(|bytes| is_finite(*bytes))
    }
    // All bits of the exponent are set in infinities and NaN, and in nothing else.
    let is_fine = |data: &[u8]| match view.dtype {
        Dtype::F32 => finite(data, |bytes| f32::from_le_bytes(bytes).is_finite()),
        Dtype::F16 => finite(data, |bytes| u16::from_le_bytes(bytes) & 0x7c00 != 0x7c00),
        Dtype::BF16 => finite(data, |bytes| u16::from_le_bytes(bytes) & 0x7f80 != 0x7f80),
        Dtype::Blocks(format) => format.to_f32(data).is_none_or(|values| values.iter().all(|x| x.is_finite())),
        _ => true,
    };
    if is_fine(view.data) && view.odd_rows.is_none_or(is_fine) {
        return Ok(());
    }
    let found = NonFinite::Weight { name: view.name.to_owned(), trained: false, rows: Vec::new() };
    Err(Error::NonFinite { what: "the checkpoint has a number that is not finite".to_owned(), found: Some(found) })
}

/// The rows of `batch` with a token that is not `fine`.
fn rows_with(batch: &Batch, fine: impl Fn(usize) -> bool) -> Vec<u32> {
    let documents = batch.documents().zip(&batch.rows);
    documents.filter(|(document, _)| !document.clone().all(&fine)).map(|(_, row)| *row).collect()
}

/// The largest finite magnitude.
fn largest(values: &[f32]) -> f32 {
    values.iter().filter(|x| x.is_finite()).fold(0.0, |most, x| most.max(x.abs()))
}
