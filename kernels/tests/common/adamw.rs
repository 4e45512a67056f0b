//! Five steps of AdamW against PyTorch's loop, scalar by scalar.

use burn::tensor::DType;
use rekindle_kernels::adamw::{self, State, Step};
use rekindle_kernels::{Device, Grads, ParamRef, Params, ParamsBuilder, from_f32};

use super::{Case, Place, Results, noise, widened};

/// Parameters of these sizes; those marked take part in weight decay.
#[derive(Debug)]
pub(crate) struct AdamW {
    pub(crate) params: &'static [(usize, bool)],
    pub(crate) weight_decay: f64,
    /// Gradients are clipped to this norm.
    pub(crate) max_grad_norm: Option<f64>,
}

const STEPS: u64 = 5;

impl AdamW {
    /// Small beside the updates, so that these are what the tolerance measures.
    fn values(&self) -> Vec<f32> {
        noise(1, self.params.iter().map(|(n, _)| n).sum()).iter().map(|x| 0.05 * x).collect()
    }

    /// Gradients of step `t`: of very different sizes, some of them zero.
    fn grads(&self, t: u64) -> Vec<f32> {
        let sizes = [1.0, 1e-3, 1e-6, 0.0, 30.0];
        noise(10 + t, self.values().len()).iter().enumerate().map(|(i, g)| g * sizes[i % 5]).collect()
    }

    fn step(&self, t: u64) -> Step {
        Step {
            t,
            lr: 1e-2 / t as f64,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: self.weight_decay,
            grad_scale: if t.is_multiple_of(2) { 0.125 } else { 1.0 },
        }
    }
}

impl Case for AdamW {
    /// The lines of `torch.optim.AdamW`, each result rounded to `dtype` (f32 or f64).
    fn naive(&self, dtype: DType) -> Results {
        let r = |x: f64| if dtype == DType::F32 { f64::from(x as f32) } else { x };
        let decays = self.params.iter().flat_map(|&(n, decays)| std::iter::repeat_n(decays, n));
        let mut p: Vec<f64> = self.values().into_iter().map(f64::from).collect();
        let (mut m, mut v) = (vec![0.0; p.len()], vec![0.0; p.len()]);
        let decays: Vec<bool> = decays.collect();
        for t in 1..=STEPS {
            let Step { lr, beta1, beta2, eps, weight_decay, grad_scale, .. } = self.step(t);
            let clip = self.max_grad_norm.map_or(1.0, |max| {
                let norm = self.grads(t).iter().map(|&g| (f64::from(g) * grad_scale).powi(2)).sum::<f64>().sqrt();
                (max / (r(norm) + 1e-6)).min(1.0)
            });
            let grad_scale = r(grad_scale * clip);
            let bias_correction1 = 1.0 - beta1.powi(t as i32);
            let bias_correction2_sqrt = (1.0 - beta2.powi(t as i32)).sqrt();
            for (i, g) in self.grads(t).into_iter().enumerate() {
                let g = r(f64::from(g) * grad_scale);
                if decays[i] {
                    p[i] = r(p[i] * r(1.0 - lr * weight_decay));
                }
                m[i] = r(m[i] + r(r(g - m[i]) * r(1.0 - beta1)));
                v[i] = r(r(v[i] * r(beta2)) + r(r(g * g) * r(1.0 - beta2)));
                let denom = r(r(r(v[i].sqrt()) / r(bias_correction2_sqrt)) + r(eps));
                p[i] = r(p[i] - r(r(lr / bias_correction1) * r(m[i] / denom)));
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
        let mut state = State::new(params.numel(), &place.device);
        for t in 1..=STEPS {
            let grads = self.filled(&params, &places, &place.device, t);
            match self.max_grad_norm {
                None => adamw::step(&mut params, &grads, &mut state, &self.step(t)),
                Some(max) => drop(adamw::clipped_step(&mut params, &grads, &mut state, &self.step(t), max)),
            }
        }
        vec![("p", widened(params.all_values()))]
    }
}

impl AdamW {
    fn filled(&self, params: &Params, places: &[ParamRef], device: &Device, t: u64) -> Grads {
        let mut grads = params.zero_grads();
        let values = self.grads(t);
        for &at in places {
            grads.add(at, from_f32(values[at.range()].to_vec(), at.dims(), device, DType::F32));
        }
        grads
    }
}
