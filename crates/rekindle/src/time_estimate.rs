//! Estimates of the duration of a run.

use core::fmt;
use std::time::{Duration, Instant};

use rekindle_data::Dataset;
use rekindle_kernels::runtime::DeviceProps;
use rekindle_kernels::{Device, from_f32, matmul};
use rekindle_models::ModelConfig;
use rekindle_train::{Batches, SftConfig, Timetable};

use crate::{Error, Model};

/// A range of seconds, and its basis.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct TimeEstimate {
    /// The lower end.
    pub low: f64,
    /// The upper end.
    pub high: f64,
    /// The basis of the estimate.
    pub basis: String,
}

/// Seconds per token of training, at least and at most.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenTime {
    low: f64,
    high: f64,
    basis: String,
}

/// The cost of an evaluation pass relative to a training pass with the same tokens: 2 of 4 products per weight.
const EVALUATION: f64 = 0.5;

/// The arithmetic of a training run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work<'a> {
    pub(crate) config: &'a ModelConfig,
    /// True if all weights are trained.
    pub(crate) full: bool,
    /// True if blocks are recomputed in the backward pass.
    pub(crate) recomputes: bool,
}

impl Work<'_> {
    /// Returns the FLOPs of the products for a token: 2 per weight forward, 2 for the gradient to the input, 2 for that
    /// of a trained weight, and 2 for recomputing. Attention scores and small products are covered by the range.
    fn flops(&self) -> f64 {
        let linears = self.config.parameters().into_iter().filter(|parameter| parameter.role.is_linear());
        let blocks: f64 = linears.map(|linear| linear.numel() as f64 * self.config.active_share(linear.role)).sum();
        let head = (self.config.vocab_size() * self.config.hidden_size()) as f64;
        let trained = if self.full { 2.0 } else { 0.0 };
        (4.0 + trained) * (blocks + head) + if self.recomputes { 2.0 * blocks } else { 0.0 }
    }

    /// Estimates from the speed of a product of f32 matrices of the model's size, which is timed here.
    ///
    /// Most of a step on a CPU is products; the upper end covers attention, norms and small products, which matter most
    /// in small models (docs/training.md has measured runs).
    pub(crate) fn on_cpu(&self) -> TokenTime {
        let speed = cpu_flops(self.config.hidden_size(), self.config.intermediate_size());
        let time = self.flops() / speed;
        let basis = format!("a product of its matrices runs at {:.0} GFLOP/s here", speed / 1e9);
        TokenTime { low: time, high: 2.5 * time, basis }
    }

    /// Estimates from a GPU's multiprocessors: a step reaches 20 % (small batches) to 60 % (large ones) of the peak in
    /// 16 bits, as measured on an H200 (docs/benchmarks.md).
    pub(crate) fn on_card(&self, props: &DeviceProps) -> Option<TokenTime> {
        let peak = card_flops(props)?;
        let time = |share: f64| self.flops() / (share * peak);
        let basis = format!("{} has about {:.0} TFLOP/s in 16 bits", props.name, peak / 1e12);
        Some(TokenTime { low: time(0.6), high: time(0.2), basis })
    }
}

/// Estimates the time of a token on `device`; `None` for devices without figures.
pub(crate) fn token_time(work: &Work<'_>, device: &Device) -> Option<TokenTime> {
    match device {
        Device::Cuda(cuda) => work.on_card(cuda.props()),
        device if device.is_cpu() => Some(work.on_cpu()),
        _ => None,
    }
}

impl TokenTime {
    /// Times a training pass of `model` over the first rows of `data`. No parameter changes. On a GPU, a pass before it
    /// compiles kernels.
    ///
    /// # Errors
    /// [`Error::Model`] if the device fails.
    pub fn measure(model: &Model, data: &Dataset, config: &SftConfig) -> Result<Self, Error> {
        let lm = model.causal_lm();
        let is_cpu = lm.device().is_cpu();
        let rows = config.rows(data, lm.max_seq_length());
        let examples = rows.iter().take(config.per_device_train_batch_size).flatten().copied();
        let examples: Vec<usize> = examples.collect();
        let mut batch = Batches::new(data, config, lm.max_seq_length()).batch(&examples, 0);
        // A reference that is computed before training takes no time in a step.
        if !lm.adapter_changes_nothing() {
            let mismatched = batch.mismatched.iter_mut().flat_map(|batch| &mut batch.answers);
            mismatched.chain(&mut batch.answers).for_each(|answer| answer.reference = Some(0.0));
        }
        let objective = config.method.objective();
        let scale = 1.0 / objective.count(&batch).max(1) as f32;
        let mut seconds = 0.0;
        for _ in 0..if is_cpu { 1 } else { 2 } {
            let mut grads = lm.params().zero_grads();
            let began = Instant::now();
            let terms = lm.step_terms(&*objective, core::slice::from_ref(&batch), None)?;
            lm.objective_backward(&*objective, &batch, &terms, scale, &mut grads, None)?.wait();
            lm.device().check().map_err(rekindle_models::Error::from)?;
            seconds = began.elapsed().as_secs_f64();
        }
        let time = seconds / batch.tokens().max(1) as f64;
        Ok(Self {
            low: 0.7 * time,
            high: 1.5 * time,
            basis: format!("a pass of {} tokens took {seconds:.2} s", batch.tokens()),
        })
    }

    /// Estimates a run over a training set of `tokens` tokens, with an evaluation set of `eval_tokens`.
    pub fn run(&self, config: &SftConfig, times: &Timetable, tokens: usize, eval_tokens: usize) -> TimeEstimate {
        let epochs = times.total as f64 / times.steps_per_epoch as f64;
        let evaluations = match eval_tokens {
            0 => 0,
            _ => times.evaluations() + usize::from(config.evaluates_on_start()),
        };
        self.of(epochs * tokens as f64 + EVALUATION * (evaluations * eval_tokens) as f64)
    }

    /// Estimates the training time of a number of tokens.
    pub fn of(&self, tokens: f64) -> TimeEstimate {
        TimeEstimate { low: self.low * tokens, high: self.high * tokens, basis: self.basis.clone() }
    }
}

impl fmt::Display for TimeEstimate {
    /// Formats the range as "12 to 40 s (estimate: …)".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, name) = match self.high {
            0.0..120.0 => (1.0, "s"),
            120.0..7200.0 => (60.0, "min"),
            _ => (3600.0, "h"),
        };
        let digits = if self.high / unit < 10.0 { 1 } else { 0 };
        let [low, high] = [self.low, self.high].map(|seconds| format!("{:.digits$}", seconds / unit));
        let range = if low == high { format!("about {high}") } else { format!("{low} to {high}") };
        write!(f, "{range} {name} (estimate: {})", self.basis)
    }
}

/// Returns the FLOP/s of an f32 product of a block's size, timed for a tenth of a second after a first one.
fn cpu_flops(hidden: usize, inner: usize) -> f64 {
    const TOKENS: usize = 256;
    const TIME: Duration = Duration::from_millis(100);
    let (hidden, inner) = (hidden.clamp(16, 2048), inner.clamp(16, 4096));
    let device = Device::cpu();
    let ones =
        |rows, columns| from_f32(vec![1.0; rows * columns], [rows, columns], &device, rekindle_kernels::DType::F32);
    let (x, w) = (ones(TOKENS, hidden), ones(inner, hidden));
    drop(matmul::nt(&x, &w));
    let (began, mut count) = (Instant::now(), 0);
    while count == 0 || began.elapsed() < TIME {
        drop(matmul::nt(&x, &w));
        count += 1;
    }
    (count * 2 * TOKENS * hidden * inner) as f64 / began.elapsed().as_secs_f64()
}

/// Returns the peak of dense 16-bit products with f32 sums, from NVIDIA's data sheets: FLOPs per multiprocessor and
/// cycle, at 1.7 GHz, a typical clock under load.
fn card_flops(props: &DeviceProps) -> Option<f64> {
    let per_cycle = match (props.major, props.minor) {
        (7, 5) => 1024.0,
        (8, 0) => 2048.0,
        (8 | 12, _) => 512.0,
        (9, _) => 4096.0,
        (10, _) => 8192.0,
        _ => return None,
    };
    Some(f64::from(props.sm_count) * per_cycle * 1.7e9)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suggest::tests::qwen3_4b_json;

    fn card(name: &str, capability: (u32, u32), sm_count: u32) -> DeviceProps {
        let (major, minor) = capability;
        DeviceProps { name: name.into(), major, minor, sm_count, shared_per_block: 0, total_memory: 0 }
    }

    #[test]
    fn peaks_are_those_of_data_sheets() {
        // TFLOP/s of dense 16-bit products with f32 sums that NVIDIA names.
        for (props, peak) in [
            (card("T4", (7, 5), 40), 65.0),
            (card("A100", (8, 0), 108), 312.0),
            (card("H200", (9, 0), 132), 989.0),
            (card("RTX 4090", (8, 9), 128), 165.0),
            (card("B200", (10, 0), 148), 2250.0),
        ] {
            let ours = card_flops(&props).unwrap() / 1e12;
            assert!((0.65..1.35).contains(&(ours / peak)), "{}: {ours} for {peak}", props.name);
        }
        assert_eq!(card_flops(&card("older", (7, 0), 80)), None);
    }

    /// Tokens per second of docs/benchmarks.md.
    #[test]
    fn steps_measured_on_an_h200_are_in_the_range() {
        let config = ModelConfig::from_json(&qwen3_4b_json()).unwrap();
        let props = card("H200", (9, 0), 132);
        for (recomputes, measured) in [(true, 22_148.0), (false, 28_224.0)] {
            let time = Work { config: &config, full: false, recomputes }.on_card(&props).unwrap();
            assert!(time.low < 1.0 / measured && 1.0 / measured < time.high, "{time:?} for {measured}");
        }
    }

    #[test]
    fn a_run_is_its_tokens_and_evaluations() {
        let time = TokenTime { low: 1e-3, high: 2e-3, basis: "measured".into() };
        let config = SftConfig {
            max_steps: Some(30),
            eval_steps: Some(rekindle_train::StepCount::Steps(15)),
            ..SftConfig::default()
        };
        let times = config.timetable(80);
        assert_eq!((times.steps_per_epoch, times.evaluations()), (10, 2));
        let run = time.run(&config, &times, 1000, 0);
        assert!((run.low - 3.0).abs() < 1e-9 && (run.high - 6.0).abs() < 1e-9, "{run:?}");
        assert_eq!(run.to_string(), "3.0 to 6.0 s (estimate: measured)");
        // Two evaluations and the one before the first step, half as long for each token.
        let run = time.run(&config, &times, 1000, 200);
        assert!((run.low - 3.3).abs() < 1e-9, "{run:?}");
        assert_eq!(time.of(1e6).to_string(), "17 to 33 min (estimate: measured)");
    }

    #[test]
    fn the_speed_of_this_machine_is_a_number() {
        let speed = cpu_flops(64, 128);
        assert!(speed.is_finite() && speed > 1e7, "{speed}");
    }
}
