//! Training steps of a model of Qwen3-0.6B's shape with random weights: LoRA of rank 16 on all linears, with our layers or in
//! operations of Burn.

use std::time::Instant;

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig};
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, activation};
use burn_optim::{AdamWConfig, GradientsParams};
use rekindle_burn::{
    Checkpointed, FlashAttention, FlashAttentionConfig, LinearCrossEntropy, LinearCrossEntropyConfig, LoraLinear,
    LoraLinearConfig, RmsNorm, RmsNormConfig, RotaryEmbedding, RotaryEmbeddingConfig, SwiGlu, SwiGluConfig, wrap,
};
use rekindle_kernels::runtime::Cuda;
use rekindle_lora::LoraConfig;

use crate::formulas;

const VOCAB: usize = 151_936;
const HIDDEN: usize = 1024;
const HEADS: usize = 16;
const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
const INTERMEDIATE: usize = 3072;
const WARM_UP: usize = 3;
const STEPS: usize = 6;

#[derive(Module, Debug)]
struct Block {
    input_layernorm: RmsNorm,
    q_proj: LoraLinear,
    k_proj: LoraLinear,
    v_proj: LoraLinear,
    q_norm: RmsNorm,
    k_norm: RmsNorm,
    rope: RotaryEmbedding,
    attention: FlashAttention,
    o_proj: LoraLinear,
    post_attention_layernorm: RmsNorm,
    gate_proj: LoraLinear,
    up_proj: LoraLinear,
    down_proj: LoraLinear,
    swiglu: SwiGlu,
}

#[derive(Module, Debug)]
struct Model {
    embed_tokens: Embedding,
    layers: Vec<Checkpointed<Block>>,
    norm: RmsNorm,
    loss: LinearCrossEntropy,
}

/// The tables and the mask of plain attention, the same for every block.
#[derive(Clone)]
struct Shared {
    tables: [Tensor<4>; 2],
    mask: Tensor<4>,
}

impl Block {
    fn new(device: &Device) -> Self {
        let linear = |input, out| LoraLinearConfig::new(input, out).with_bias(false).init(device);
        let norm = |width| RmsNormConfig::new(width).init(device);
        Self {
            input_layernorm: norm(HIDDEN),
            q_proj: linear(HIDDEN, HEADS * HEAD_DIM),
            k_proj: linear(HIDDEN, KV_HEADS * HEAD_DIM),
            v_proj: linear(HIDDEN, KV_HEADS * HEAD_DIM),
            q_norm: norm(HEAD_DIM),
            k_norm: norm(HEAD_DIM),
            rope: RotaryEmbeddingConfig::new(HEAD_DIM).with_theta(1e6).init(),
            attention: FlashAttentionConfig::new(HEADS, KV_HEADS, HEAD_DIM).init(),
            o_proj: linear(HEADS * HEAD_DIM, HIDDEN),
            post_attention_layernorm: norm(HIDDEN),
            gate_proj: linear(HIDDEN, INTERMEDIATE),
            up_proj: linear(HIDDEN, INTERMEDIATE),
            down_proj: linear(INTERMEDIATE, HIDDEN),
            swiglu: SwiGluConfig::new().init(),
        }
    }

    fn ours(&self, x: Tensor<3>) -> Tensor<3> {
        let h = self.input_layernorm.forward(x.clone());
        let head = |linear: &LoraLinear, norm: &RmsNorm| {
            let y = linear.forward(h.clone());
            let shape @ [batch, seq, width] = y.dims();
            let y = norm.forward(y.reshape([batch, seq * width / HEAD_DIM, HEAD_DIM])).reshape(shape);
            self.rope.forward(y)
        };
        let (q, k) = (head(&self.q_proj, &self.q_norm), head(&self.k_proj, &self.k_norm));
        let x = x + self.o_proj.forward(self.attention.forward(q, k, self.v_proj.forward(h)));
        let h = self.post_attention_layernorm.forward(x.clone());
        x + self.down_proj.forward(self.swiglu.forward(self.gate_proj.forward(h.clone()), self.up_proj.forward(h)))
    }

    fn plain(&self, x: Tensor<3>, shared: Shared) -> Tensor<3> {
        let norm = |norm: &RmsNorm, x| formulas::rms_norm(x, norm.gamma.val());
        let h = norm(&self.input_layernorm, x.clone());
        let head = |linear: &LoraLinear, of: &RmsNorm| {
            let y = plain_linear(linear, h.clone());
            let shape @ [batch, seq, width] = y.dims();
            let y = norm(of, y.reshape([batch, seq * width / HEAD_DIM, HEAD_DIM])).reshape(shape);
            formulas::rotate(y, HEAD_DIM, shared.tables.clone())
        };
        let (q, k) = (head(&self.q_proj, &self.q_norm), head(&self.k_proj, &self.k_norm));
        let v = plain_linear(&self.v_proj, h);
        let x = x + plain_linear(&self.o_proj, formulas::attend([q, k, v], HEAD_DIM, shared.mask));
        let h = norm(&self.post_attention_layernorm, x.clone());
        let gate = activation::silu(plain_linear(&self.gate_proj, h.clone()));
        x + plain_linear(&self.down_proj, gate * plain_linear(&self.up_proj, h))
    }
}

/// x·W + s·(x·A)·B.
fn plain_linear(linear: &LoraLinear, x: Tensor<3>) -> Tensor<3> {
    let ([batch, seq, width], adapter) = (x.dims(), linear.adapter().unwrap());
    let x = x.reshape([batch * seq, width]);
    let [a, b] = [&adapter.a, &adapter.b].map(|param| param.val().cast(x.dtype()));
    let y = x.clone().matmul(linear.weight.base()) + x.matmul(a).matmul(b) * adapter.scale;
    let [_, out] = y.dims();
    y.reshape([batch, seq, out])
}

pub(crate) fn measure(kind: &str, [batch, seq]: [usize; 2], layers: usize, device: &Device) {
    let (mut device, cuda) = (device.clone(), Cuda::open(0).unwrap());
    let (free_before, _) = cuda.device_memory();
    device.configure(FloatDType::BF16).unwrap();
    let device = device.autodiff();
    device.seed(3407);
    let model = Model {
        embed_tokens: EmbeddingConfig::new(VOCAB, HIDDEN).init(&device),
        layers: (0..layers).map(|_| Checkpointed::new(Block::new(&device))).collect(),
        norm: RmsNormConfig::new(HIDDEN).init(&device),
        loss: LinearCrossEntropyConfig::new().init(),
    };
    let mut model = wrap(model, &LoraConfig::new(16).target_modules("all-linear")).unwrap();
    let ids: Vec<i32> = (0..batch * (seq + 1)).map(|at| ((at * 7919 + at / 13) % VOCAB) as i32).collect();
    let ids = Tensor::<1, Int>::from_ints(ids.as_slice(), &device).reshape([batch, seq + 1]);
    let (inputs, targets) = (ids.clone().narrow(1, 0, seq), ids.narrow(1, 1, seq).reshape([batch * seq]));
    let shared = (kind == "plain").then(|| Shared {
        tables: formulas::tables(seq, HEAD_DIM, 1e6, &device, DType::BF16),
        mask: formulas::causal(seq, &device, DType::BF16),
    });
    let mut optimizer = AdamWConfig::new().init();
    let (mut losses, mut passes, mut steps) = (Vec::new(), Vec::new(), Vec::new());
    for step in 0..WARM_UP + STEPS {
        let begin = Instant::now();
        let x = model.embed_tokens.forward(inputs.clone());
        let x = model.layers.iter().fold(x, |x, layer| match &shared {
            Some(shared) => layer.plain(x, shared.clone()),
            None if kind == "checkpointed" => layer.forward(x, Block::ours),
            None => layer.ours(x),
        });
        let (table, norm) = (model.embed_tokens.weight.val(), &model.norm);
        let loss = match &shared {
            Some(_) => formulas::cross_entropy(formulas::rms_norm(x, norm.gamma.val()), table, targets.clone()),
            None => model.loss.forward(norm.forward(x), table, targets.clone()),
        };
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        device.sync().unwrap();
        let pass = begin.elapsed();
        model = optimizer.step(1e-4, model, grads);
        losses.push(loss.into_scalar::<f32>());
        device.sync().unwrap();
        if step >= WARM_UP {
            passes.push(pass.as_secs_f64());
            steps.push(begin.elapsed().as_secs_f64());
        } else {
            println!("{kind} warm-up step {step}: {:.3} s, loss {:.4}", begin.elapsed().as_secs_f64(), losses[step]);
        }
    }
    let median = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let (pass, step, tokens) = (median(&mut passes), median(&mut steps), (batch * seq) as f64);
    let used = free_before.saturating_sub(cuda.device_memory().0) as f64 / f64::from(1 << 30);
    println!(
        "{kind} {batch} x {seq}, {layers} layers: forward and backward {:.1} ms, {:.0} tokens/s; with AdamW {:.1} ms, \
         {:.0} tokens/s; memory {used:.2} GiB; losses {:.4} to {:.4}",
        1e3 * pass,
        tokens / pass,
        1e3 * step,
        tokens / step,
        losses[0],
        losses[losses.len() - 1],
    );
    assert!(losses.iter().all(|loss| loss.is_finite()), "{losses:?}");
}
