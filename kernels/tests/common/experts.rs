//! The operations between the products of a mixture of experts: router, activation, sum over the experts of a token.

use burn::tensor::{DType, Tensor as BurnTensor};
use rekindle_kernels::expert_act::{self, ClampedSwiglu, ExpertActivation};
use rekindle_kernels::routing::{self, Dispatch, HostDispatch, RoutingForm};
use rekindle_kernels::{Device, ParamsBuilder, Tensor, from_f32, router_probabilities};

use super::{Case, Oracle, Place, Results, grad, noise, rounded, values};

/// Weights of the chosen experts.
pub(crate) struct Router {
    tokens: usize,
    experts: usize,
    top_k: usize,
    form: RoutingForm,
    logits: Vec<f32>,
    dweights: Vec<f32>,
    /// The experts of each token, by the logits.
    chosen: Vec<u32>,
}

impl Router {
    pub(crate) fn new(tokens: usize, experts: usize, top_k: usize, form: RoutingForm, dtype: DType) -> Self {
        // Numbers of 16 bits are often equal, and then the lower expert is chosen.
        let logits = rounded(noise(1, tokens * experts).iter().map(|x| x * 2.0).collect(), dtype);
        let chosen = logits.chunks_exact(experts).flat_map(|row| {
            let mut order: Vec<usize> = (0..experts).collect();
            order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
            order.into_iter().take(top_k).map(|expert| expert as u32)
        });
        let chosen = chosen.collect();
        Self { tokens, experts, top_k, form, dweights: noise(2, tokens * top_k), logits, chosen }
    }
}

impl Case for Router {
    fn naive(&self, dtype: DType) -> Results {
        let &Self { tokens, experts, top_k, .. } = self;
        // The router computes in f32 whatever the logits are.
        let oracle = Oracle::new(if dtype == DType::F64 { dtype } else { DType::F32 });
        let logits = oracle.leaf(&self.logits, [tokens, experts]);
        let pick = |all: BurnTensor<2>| {
            let cells = self.chosen.iter().enumerate().map(|(s, &e)| {
                let token = s / top_k;
                all.clone().slice([token..token + 1, e as usize..e as usize + 1])
            });
            BurnTensor::cat(cells.collect(), 0).reshape([tokens, top_k])
        };
        let softmax = |x: BurnTensor<2>| {
            let e = (x.clone() - x.max_dim(1)).exp();
            e.clone() / e.sum_dim(1)
        };
        let weights = match self.form {
            RoutingForm::SoftmaxTopK { normalize: false } => pick(softmax(logits.clone())),
            RoutingForm::SoftmaxTopK { normalize: true } => {
                let picked = pick(softmax(logits.clone()));
                picked.clone() / picked.sum_dim(1)
            }
            RoutingForm::TopKSoftmax => softmax(pick(logits.clone())),
            RoutingForm::Sigmoid => (pick(logits.clone()).neg().exp() + 1.0).recip(),
        };
        let grads = (weights.clone() * oracle.constant(&self.dweights, [tokens, top_k])).sum().backward();
        // Their gradient is rounded to the dtype of the logits.
        let dlogits = grad(&logits, &grads);
        let dlogits = match dtype {
            DType::F64 | DType::F32 => dlogits,
            _ => rounded(dlogits.iter().map(|&x| x as f32).collect(), dtype).into_iter().map(f64::from).collect(),
        };
        vec![("weights", values(weights)), ("dlogits", dlogits)]
    }

    fn ours(&self, place: &Place) -> Results {
        let &Self { tokens, experts, top_k, form, .. } = self;
        let logits = place.matrix(&self.logits, [tokens, experts]);
        let routing = routing::forward(logits, top_k, form);
        let host = routing.dispatch.to_host();
        assert_eq!(host, HostDispatch::of(&self.chosen, experts), "the choice");
        let dweights = in_f32(&self.dweights, [tokens, top_k], place);
        vec![("weights", values(routing.weights.clone())), ("dlogits", values(routing::backward(&routing, &dweights)))]
    }
}

impl std::fmt::Debug for Router {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { tokens, experts, top_k, form, .. } = self;
        write!(f, "router {tokens} tokens, {top_k} of {experts} experts, {form:?}")
    }
}

/// Sums of the probabilities of all experts.
pub(crate) struct Probabilities {
    tokens: usize,
    experts: usize,
    logits: Vec<f32>,
    coefficients: Vec<f32>,
}

impl Probabilities {
    pub(crate) fn new(tokens: usize, experts: usize, dtype: DType) -> Self {
        let logits = rounded(noise(1, tokens * experts).iter().map(|x| x * 6.0).collect(), dtype);
        Self { tokens, experts, logits, coefficients: noise(2, experts) }
    }
}

impl Case for Probabilities {
    fn naive(&self, dtype: DType) -> Results {
        let &Self { tokens, experts, .. } = self;
        // The softmax is in f32 whatever the logits are.
        let oracle = Oracle::new(if dtype == DType::F64 { dtype } else { DType::F32 });
        let logits = oracle.leaf(&self.logits, [tokens, experts]);
        let e = (logits.clone() - logits.clone().max_dim(1)).exp();
        let sums = (e.clone() / e.sum_dim(1)).sum_dim(0); // [1, experts]
        let grads = (sums.clone() * oracle.constant(&self.coefficients, [1, experts])).sum().backward();
        let dlogits = grad(&logits, &grads);
        let dlogits = match dtype {
            DType::F64 | DType::F32 => dlogits,
            _ => rounded(dlogits.iter().map(|&x| x as f32).collect(), dtype).into_iter().map(f64::from).collect(),
        };
        vec![("sums", values(sums)), ("dlogits", dlogits)]
    }

    fn ours(&self, place: &Place) -> Results {
        let logits = place.matrix(&self.logits, [self.tokens, self.experts]);
        let dlogits = router_probabilities::backward(&logits, &self.coefficients);
        vec![("sums", router_probabilities::forward(&logits)), ("dlogits", values(dlogits))]
    }
}

impl std::fmt::Debug for Probabilities {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "probabilities of {} experts for {} tokens", self.experts, self.tokens)
    }
}

/// The activation, and the sum over the experts of a token.
pub(crate) struct Activation {
    tokens: usize,
    experts: usize,
    top_k: usize,
    width: usize,
    chosen: Vec<u32>,
    gate_up: Vec<f32>,
    weights: Vec<f32>,
    dact: Vec<f32>,
    onto: Vec<f32>,
}

impl Activation {
    pub(crate) fn new(tokens: usize, experts: usize, top_k: usize, width: usize, dtype: DType) -> Self {
        let rows = tokens * top_k;
        let chosen = (0..rows).map(|s| ((s / top_k * 5 + s % top_k * 3) % experts) as u32).collect();
        let input = |seed, n, by: f32| rounded(noise(seed, n).iter().map(|x| x * by).collect(), dtype);
        Self {
            tokens,
            experts,
            top_k,
            width,
            chosen,
            // Gates where the sigmoid both bends and saturates.
            gate_up: input(1, rows * 2 * width, 6.0),
            weights: noise(2, rows).iter().map(|x| x.abs()).collect(),
            dact: input(3, rows * width, 1.0),
            onto: input(4, tokens * width, 1.0),
        }
    }
}

impl Case for Activation {
    fn naive(&self, dtype: DType) -> Results {
        let &Self { tokens, experts, top_k, width, .. } = self;
        let (rows, host) = (tokens * top_k, HostDispatch::of(&self.chosen, experts));
        let oracle = Oracle::new(dtype);
        let gate_up = oracle.leaf(&self.gate_up, [rows, 2 * width]);
        let w: Vec<f32> = host.sorted.iter().map(|&s| self.weights[s as usize]).collect();
        let w = oracle.leaf(&w, [rows, 1]);
        let (gate, up) = (gate_up.clone().narrow(1, 0, width), gate_up.clone().narrow(1, width, width));
        let act = gate.clone() / (gate.neg().exp() + 1.0) * up * w.clone();
        let grads = (act.clone() * oracle.constant(&self.dact, [rows, width])).sum().backward();
        let dw_sorted = grad(&w, &grads);
        let dw = host.rows.iter().map(|&row| dw_sorted[row as usize]).collect();
        let dact = oracle.constant(&self.dact, [rows, width]);
        let slots = (0..top_k).map(|slot| {
            let parts = (0..tokens).map(|token| {
                let row = host.rows[token * top_k + slot] as usize;
                dact.clone().narrow(0, row, 1)
            });
            BurnTensor::cat(parts.collect(), 0)
        });
        let slots: Vec<BurnTensor<2>> = slots.collect();
        let sum = slots.iter().fold(oracle.constant(&self.onto, [tokens, width]), |sum, slot| sum + slot.clone());
        let alone = slots.into_iter().reduce(|sum, slot| sum + slot).expect("there is a slot");
        vec![
            ("act", values(act)),
            ("dgate_up", grad(&gate_up, &grads)),
            ("dweights", dw),
            ("sum", values(sum)),
            ("sum alone", values(alone)),
        ]
    }

    fn ours(&self, place: &Place) -> Results {
        let &Self { tokens, experts, top_k, width, .. } = self;
        let rows = tokens * top_k;
        let dispatch = Dispatch::of(&self.chosen, experts, top_k, &place.device);
        let gate_up = place.matrix(&self.gate_up, [rows, 2 * width]);
        let weights = in_f32(&self.weights, [tokens, top_k], place);
        let act = expert_act::forward(&gate_up, &weights, &dispatch, ExpertActivation::Silu);
        let y = place.matrix(&self.dact, [rows, width]);
        let onto = place.matrix(&self.onto, [tokens, width]);
        let sum = routing::sum_slots(&y, &dispatch, Some(&onto));
        let alone = routing::sum_slots(&y, &dispatch, None);
        let grads = expert_act::backward(y, gate_up, &weights, &dispatch, ExpertActivation::Silu);
        vec![
            ("act", values(act)),
            ("act", values(grads.act)),
            ("dgate_up", values(grads.gate_up)),
            ("dweights", values(grads.weights)),
            ("sum", values(sum)),
            ("sum alone", values(alone)),
        ]
    }
}

impl std::fmt::Debug for Activation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { tokens, experts, top_k, width, .. } = self;
        write!(f, "expert activation {tokens} tokens × {width}, {top_k} of {experts} experts")
    }
}

/// gpt-oss: the activation with biases and clamps, and what experts add to each of their rows as a product.
pub(crate) struct Clamped {
    tokens: usize,
    experts: usize,
    top_k: usize,
    width: usize,
    chosen: Vec<u32>,
    gate_up: Vec<f32>,
    bias: Vec<f32>,
    weights: Vec<f32>,
    dact: Vec<f32>,
    all: Vec<f32>,
}

/// Below a third of the values, so that both clamps are reached and passed by.
const LIMIT: f32 = 2.5;
const ALPHA: f32 = 1.702;

impl Clamped {
    pub(crate) fn new(tokens: usize, experts: usize, top_k: usize, width: usize, dtype: DType) -> Self {
        let rows = tokens * top_k;
        // An expert in the middle has no rows.
        let expert = |s: usize| (s / top_k * 5 + s % top_k * 3) % experts;
        let skipped = |expert: usize| if experts > 2 * top_k && expert == experts / 2 { experts - 1 } else { expert };
        let mut chosen: Vec<u32> = (0..rows).map(|s| skipped(expert(s)) as u32).collect();
        for slots in chosen.chunks_exact_mut(top_k) {
            // No token has an expert twice.
            for slot in 1..slots.len() {
                while slots[..slot].contains(&slots[slot]) {
                    slots[slot] = (slots[slot] + 1) % experts as u32;
                }
            }
        }
        let input = |seed, n, by: f32| rounded(noise(seed, n).iter().map(|x| x * by).collect(), dtype);
        Self {
            tokens,
            experts,
            top_k,
            width,
            chosen,
            gate_up: input(1, rows * 2 * width, 4.0),
            bias: input(5, experts * 2 * width, 1.0),
            weights: noise(2, rows).iter().map(|x| x.abs()).collect(),
            dact: input(3, rows * width, 1.0),
            all: input(6, tokens * experts, 1.0),
        }
    }
}

impl Case for Clamped {
    fn naive(&self, dtype: DType) -> Results {
        let &Self { tokens, experts, top_k, width, .. } = self;
        let (rows, host) = (tokens * top_k, HostDispatch::of(&self.chosen, experts));
        let oracle = Oracle::new(dtype);
        let gate_up = oracle.leaf(&self.gate_up, [rows, 2 * width]);
        let bias = oracle.leaf(&self.bias, [experts, 2 * width]);
        let w: Vec<f32> = host.sorted.iter().map(|&s| self.weights[s as usize]).collect();
        let w = oracle.leaf(&w, [rows, 1]);
        let biases = (0..rows).map(|row| bias.clone().narrow(0, host.expert(row), 1));
        let pairs = (gate_up.clone() + BurnTensor::cat(biases.collect(), 0)).reshape([rows, width, 2]);
        let [gate, up] = [0, 1].map(|at| pairs.clone().narrow(2, at, 1).reshape([rows, width]));
        let (gate, up) = (gate.clamp_max(LIMIT), up.clamp(-LIMIT, LIMIT));
        let act = gate.clone() / ((gate * ALPHA).neg().exp() + 1.0) * (up + 1.0) * w.clone();
        let grads = (act.clone() * oracle.constant(&self.dact, [rows, width])).sum().backward();
        let dw_sorted = grad(&w, &grads);
        let dw = host.rows.iter().map(|&row| dw_sorted[row as usize]).collect();
        let mut spread = vec![0.0; tokens * experts];
        for (s, &expert) in self.chosen.iter().enumerate() {
            let wide = oracle.constant(&self.weights[s..=s], [1, 1]);
            spread[s / top_k * experts + expert as usize] = values(wide)[0];
        }
        let picked =
            self.chosen.iter().enumerate().map(|(s, &e)| f64::from(self.all[s / top_k * experts + e as usize]));
        vec![
            ("act", values(act)),
            ("dgate_up", grad(&gate_up, &grads)),
            ("dweights", dw),
            ("dbias", grad(&bias, &grads)),
            ("spread", spread),
            ("picked", picked.collect()),
        ]
    }

    fn ours(&self, place: &Place) -> Results {
        let &Self { tokens, experts, top_k, width, .. } = self;
        let rows = tokens * top_k;
        let dispatch = Dispatch::of(&self.chosen, experts, top_k, &place.device);
        let gate_up = place.matrix(&self.gate_up, [rows, 2 * width]);
        let bias = place.matrix(&self.bias, [experts, 2 * width]);
        let weights = in_f32(&self.weights, [tokens, top_k], place);
        let form = ExpertActivation::ClampedSwiglu(ClampedSwiglu { alpha: ALPHA, limit: LIMIT, bias: &bias });
        let act = expert_act::forward(&gate_up, &weights, &dispatch, form);
        let dact = place.matrix(&self.dact, [rows, width]);
        let grads = expert_act::backward(dact, gate_up, &weights, &dispatch, form);
        let mut builder = ParamsBuilder::new(&place.device, place.dtype);
        let before = builder.push("before", &[5], true, &[0.0; 5]);
        let at = builder.push("bias", &[experts, 2 * width], false, &self.bias);
        let mut sums = builder.build().zero_grads();
        sums.add_expert_rows(at, &grads.gate_up, &dispatch);
        assert_eq!(sums.values(before), vec![0.0; 5]);
        let all = place.matrix(&self.all, [tokens, experts]);
        vec![
            ("act", values(act)),
            ("act", values(grads.act)),
            ("dgate_up", values(grads.gate_up)),
            ("dweights", values(grads.weights)),
            ("dbias", sums.values(at).into_iter().map(f64::from).collect()),
            ("spread", values(routing::spread(&weights, &dispatch, place.dtype))),
            ("picked", values(routing::pick(&all, &dispatch))),
        ]
    }
}

impl std::fmt::Debug for Clamped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { tokens, experts, top_k, width, .. } = self;
        write!(f, "clamped expert activation {tokens} tokens × {width}, {top_k} of {experts} experts")
    }
}

/// The router's weights and their gradient are f32 in every place.
fn in_f32(values: &[f32], shape: [usize; 2], Place { device, .. }: &Place) -> Tensor<2> {
    let device: &Device = device;
    from_f32(values.to_vec(), shape, device, DType::F32)
}
