//! Five steps of an optimizer against the loop of its paper or of PyTorch, scalar by scalar.

use burn::tensor::DType;
use rekindle_kernels::optimizer::{self, Clip, OptimizerState, StateFormat, StateTensor, UpdateRule, UpdateStep};
use rekindle_kernels::{Device, Grads, Group, ParamRef, Params, ParamsBuilder, Tensor, from_f32, to_f32};

use super::{Case, Place, Results, noise, widened};

/// Parameters of these sizes; those marked take part in weight decay.
#[derive(Debug)]
pub(crate) struct Steps {
    pub(crate) rule: UpdateRule,
    pub(crate) params: &'static [(usize, bool)],
    pub(crate) weight_decay: f64,
    /// Gradients are clipped to this norm.
    pub(crate) max_grad_norm: Option<f64>,
}

const STEPS: u64 = 5;

pub(crate) const ADAMW: UpdateRule = UpdateRule::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 };

pub(crate) const LION: UpdateRule = UpdateRule::Lion { beta1: 0.9, beta2: 0.99 };

pub(crate) const MOMENTUM: UpdateRule = UpdateRule::Sgd { momentum: 0.9 };

/// Every rule, SGD also without momentum.
pub(crate) const RULES: [UpdateRule; 4] = [ADAMW, LION, MOMENTUM, UpdateRule::Sgd { momentum: 0.0 }];

impl Steps {
    fn numel(&self) -> usize {
        self.params.iter().map(|(n, _)| n).sum()
    }

    /// Small beside the updates, so that these are what the tolerance measures.
    fn values(&self) -> Vec<f32> {
        noise(1, self.numel()).iter().map(|x| 0.05 * x).collect()
    }

    /// Gradients of step `t`: of very different sizes, some of them zero.
    fn grads(&self, t: u64) -> Vec<f32> {
        let sizes = [1.0, 1e-3, 1e-6, 0.0, 30.0];
        noise(10 + t, self.numel()).iter().enumerate().map(|(i, g)| g * sizes[i % 5]).collect()
    }

    fn step(&self, t: u64) -> UpdateStep {
        UpdateStep { t, rates: (1e-2 / t as f64).into(), weight_decay: self.weight_decay }
    }

    fn grad_scale(&self, t: u64) -> f64 {
        if t.is_multiple_of(2) { 0.125 } else { 1.0 }
    }
}

impl Case for Steps {
    /// The lines of `torch.optim.AdamW` and `SGD` and of Lion's paper, each result rounded to `dtype` (f32 or f64).
    fn naive(&self, dtype: DType) -> Results {
        let r = |x: f64| if dtype == DType::F32 { f64::from(x as f32) } else { x };
        let decays = self.params.iter().flat_map(|&(n, decays)| std::iter::repeat_n(decays, n));
        let mut p: Vec<f64> = self.values().into_iter().map(f64::from).collect();
        let (mut m, mut v) = (vec![0.0; p.len()], vec![0.0; p.len()]);
        let decays: Vec<bool> = decays.collect();
        for t in 1..=STEPS {
            let UpdateStep { rates, weight_decay, .. } = self.step(t);
            let (lr, grad_scale) = (rates.default, self.grad_scale(t));
            let clip = self.max_grad_norm.map_or(1.0, |max| {
                let norm = self.grads(t).iter().map(|&g| (f64::from(g) * grad_scale).powi(2)).sum::<f64>().sqrt();
                (max / (r(norm) + 1e-6)).min(1.0)
            });
            let grad_scale = r(grad_scale * clip);
            for (i, g) in self.grads(t).into_iter().enumerate() {
                let g = r(f64::from(g) * grad_scale);
                let decay = if decays[i] { weight_decay } else { 0.0 };
                match self.rule {
                    UpdateRule::AdamW { beta1, beta2, eps } => {
                        let bias_correction1 = 1.0 - beta1.powi(t as i32);
                        let bias_correction2_sqrt = (1.0 - beta2.powi(t as i32)).sqrt();
                        p[i] = r(p[i] * r(1.0 - lr * decay));
                        m[i] = r(m[i] + r(r(g - m[i]) * r(1.0 - beta1)));
                        v[i] = r(r(v[i] * r(beta2)) + r(r(g * g) * r(1.0 - beta2)));
                        let denom = r(r(r(v[i].sqrt()) / r(bias_correction2_sqrt)) + r(eps));
                        p[i] = r(p[i] - r(r(lr / bias_correction1) * r(m[i] / denom)));
                    }
                    UpdateRule::Lion { beta1, beta2 } => {
                        let update = r(r(r(beta1) * m[i]) + r(r(1.0 - beta1) * g));
                        let direction = if update == 0.0 { 0.0 } else { update.signum() };
                        p[i] = r(r(p[i] * r(1.0 - lr * decay)) - r(lr) * direction);
                        m[i] = r(r(r(beta2) * m[i]) + r(r(1.0 - beta2) * g));
                    }
                    UpdateRule::Sgd { momentum } => {
                        let g = r(g + r(r(decay) * p[i]));
                        m[i] = r(r(r(momentum) * m[i]) + g);
                        p[i] = r(p[i] - r(r(lr) * m[i]));
                    }
                }
            }
        }
        vec![("p", p)]
    }

    fn ours(&self, place: &Place) -> Results {
        let start = self.values();
        let mut builder = ParamsBuilder::new(&place.device, DType::F32);
        let mut offset = 0;
        let places: Vec<ParamRef> = self
            .params
            .iter()
            .map(|&(n, decays)| {
                offset += n;
                builder.push(format!("p{offset}"), &[n], decays, &start[offset - n..offset])
            })
            .collect();
        let mut params = builder.build();
        let mut state = OptimizerState::new(params.infos(), &place.device, self.rule, StateFormat::F32);
        for t in 1..=STEPS {
            let grads = filled(&params, &places, &place.device, &self.grads(t));
            let clip = Clip::of(&grads, self.grad_scale(t), self.max_grad_norm.unwrap_or(0.0));
            optimizer::apply(&mut params, &grads, &mut state, &self.step(t), &clip);
        }
        vec![("p", widened(params.all_values()))]
    }
}

fn filled(params: &Params, places: &[ParamRef], device: &Device, values: &[f32]) -> Grads {
    let mut grads = params.zero_grads();
    for &at in places {
        grads.add(at, from_f32(values[at.range()].to_vec(), at.dims(), device, DType::F32));
    }
    grads
}

/// The values of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// All at once, in the flat buffer.
    All,
    /// Those of one parameter after another, in tensors of their own.
    Parameter,
}

/// Values and state after some steps. Parameters begin on 16 bytes and not, their last blocks are full and not, some are
/// too small for blocks, and they are of both groups, with weight decay and without.
pub(crate) fn some_steps(
    device: &Device,
    rule: UpdateRule,
    format: StateFormat,
    by: By,
) -> (Vec<f32>, Vec<StateTensor>) {
    let mut builder = ParamsBuilder::new(device, DType::F32);
    let sizes = [(4096, true), (9000, false), (33, true), (5001, true), (256 * 40, false), (4100, true)];
    for (i, (n, decays)) in sizes.into_iter().enumerate() {
        let group = if i % 3 == 1 { Group::Embedding } else { Group::Default };
        let values: Vec<f32> = noise(i as u64, n).iter().map(|x| 0.05 * x).collect();
        builder.push_in(group, format!("p{i}"), &[n], decays, &values);
    }
    let mut params = builder.build();
    let places: Vec<ParamRef> = params.infos().iter().map(|info| info.at).collect();
    let mut state = OptimizerState::new(params.infos(), device, rule, format);
    // By element in some blocks, and by block in others, of which some have no gradient.
    let scale = |i: usize| [1.0, 1e-3, 1e-6, 0.0, 30.0][if i % 8192 < 4096 { i % 5 } else { i / 256 % 5 }];
    for t in 1..=4 {
        let values: Vec<f32> = noise(100 + t, params.numel()).iter().enumerate().map(|(i, g)| g * scale(i)).collect();
        let grads = filled(&params, &places, device, &values);
        let step =
            UpdateStep { t, rates: optimizer::LearningRates { default: 1e-2, embedding: 1e-3 }, weight_decay: 0.1 };
        let clip = Clip::of_norm(1.0, 0.5, 0.0, device);
        if by == By::All {
            optimizer::apply(&mut params, &grads, &mut state, &step, &clip);
            continue;
        }
        let mut all = Vec::new();
        for at in &places {
            let own = |values: Vec<f32>| from_f32(values, [at.range().len()], device, DType::F32);
            let mut p: Tensor<1> = own(params.values(*at));
            state.apply(at.range(), &mut p, &own(values[at.range()].to_vec()), &step, &clip);
            all.extend(to_f32(p));
        }
        params.set_all_values(all);
    }
    (params.all_values(), state.tensors().map(|tensor| tensor.expect("the device works")).collect())
}
