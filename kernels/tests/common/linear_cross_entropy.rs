//! The head and the loss together.

use burn::tensor::DType;
use rekindle_kernels::linear_cross_entropy::{self, IGNORED};
use rekindle_kernels::{ParamsBuilder, to_f32};

use super::{Case, Oracle, Place, Results, grad, noise, rounded, values, widened};

pub(crate) struct LinearCrossEntropy {
    vocab: usize,
    hidden: usize,
    targets: Vec<i32>,
    h: Vec<f32>,
    weight: Vec<f32>,
}

const GRAD_SCALE: f32 = 0.3;

impl LinearCrossEntropy {
    /// Targets spread over the vocabulary where `counts` says so. Logits reach past ±8.
    pub(crate) fn new([tokens, hidden, vocab]: [usize; 3], dtype: DType, counts: impl Fn(usize) -> bool) -> Self {
        let targets =
            (0..tokens).map(|t| if counts(t) { ((t * 7919 + vocab - 1) % vocab) as i32 } else { IGNORED }).collect();
        let h = noise(1, tokens * hidden).iter().map(|x| 4.0 * x).collect();
        Self { vocab, hidden, targets, h: rounded(h, dtype), weight: rounded(noise(2, vocab * hidden), dtype) }
    }
}

impl Case for LinearCrossEntropy {
    fn naive(&self, dtype: DType) -> Results {
        let (tokens, vocab) = (self.targets.len(), self.vocab);
        let oracle = Oracle::new(dtype);
        let (mut one_hot, mut counted) = (vec![0.0; tokens * vocab], vec![0.0; tokens]);
        for (t, &target) in self.targets.iter().enumerate().filter(|(_, target)| **target != IGNORED) {
            one_hot[t * vocab + target as usize] = 1.0;
            counted[t] = 1.0;
        }
        let h = oracle.leaf(&self.h, [tokens, self.hidden]);
        let weight = oracle.leaf(&self.weight, [vocab, self.hidden]);
        let logits = h.clone().matmul(weight.clone().transpose());
        let max = logits.clone().max_dim(1).detach();
        let lse = (logits.clone() - max.clone()).exp().sum_dim(1).log() + max;
        let logit = (logits * oracle.constant(&one_hot, [tokens, vocab])).sum_dim(1);
        let nll = (lse - logit) * oracle.constant(&counted, [tokens, 1]);
        let grads = (nll.clone().sum() * GRAD_SCALE).backward();
        vec![("nll", values(nll)), ("dh", grad(&h, &grads)), ("dw", grad(&weight, &grads))]
    }

    fn ours(&self, place: &Place) -> Results {
        let h = place.matrix(&self.h, [self.targets.len(), self.hidden]);
        let weight = place.matrix(&self.weight, [self.vocab, self.hidden]);
        let mut builder = ParamsBuilder::new(&place.device, place.dtype);
        builder.push("before", &[3], true, &[0.0; 3]);
        let at = builder.push("lm_head.weight", &[self.vocab, self.hidden], true, &self.weight);
        let mut grads = builder.build().zero_grads();
        let alone = linear_cross_entropy::forward(&h, &weight, &self.targets).values();
        let (nll, dh) =
            linear_cross_entropy::forward_backward(&h, &weight, &self.targets, GRAD_SCALE, Some((&mut grads, at)));
        let frozen = linear_cross_entropy::forward_backward(&h, &weight, &self.targets, GRAD_SCALE, None);
        let nll = nll.values();
        let frozen = (frozen.0.values(), to_f32(frozen.1));
        assert_eq!((&nll, to_f32(dh.clone())), (&frozen.0, frozen.1), "a frozen head changes nothing else");
        for (t, _) in self.targets.iter().enumerate().filter(|(_, target)| **target == IGNORED) {
            let row = to_f32(dh.rows(t, 1));
            assert!(nll[t] == 0.0 && row.iter().all(|&g| g == 0.0), "row {t} does not count");
        }
        vec![("nll", widened(alone)), ("nll", widened(nll)), ("dh", values(dh)), ("dw", widened(grads.values(at)))]
    }
}

impl std::fmt::Debug for LinearCrossEntropy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let counted = self.targets.iter().filter(|&&target| target != IGNORED).count();
        let (tokens, hidden, vocab) = (self.targets.len(), self.hidden, self.vocab);
        write!(f, "linear_cross_entropy {tokens} × {hidden} × {vocab}, {counted} counted")
    }
}
