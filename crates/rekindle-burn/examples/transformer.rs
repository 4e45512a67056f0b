//! A transformer written with `burn::nn`, fine-tuned with LoRA: its attention, norms and loss are Rekindle's.
//!
//! `cargo run --release -p rekindle-burn --example transformer`

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::tensor::{Device, Int, Tensor};
use burn_optim::{AdamWConfig, GradientsParams};
use rekindle_burn::{
    FlashAttention, FlashAttentionConfig, LinearCrossEntropy, LinearCrossEntropyConfig, LoraLinear, LoraLinearConfig,
    RmsNorm, RmsNormConfig, RotaryEmbedding, RotaryEmbeddingConfig, load_adapter, save_adapter, wrap,
};
use rekindle_lora::LoraConfig;

const VOCAB: usize = 32;
const HIDDEN: usize = 32;

#[derive(Module, Debug)]
struct Block {
    norm: RmsNorm,
    q_proj: LoraLinear,
    k_proj: LoraLinear,
    v_proj: LoraLinear,
    rope: RotaryEmbedding,
    attention: FlashAttention,
    /// A linear of Burn, which takes adapters too.
    o_proj: Linear,
}

#[derive(Module, Debug)]
struct Transformer {
    embedding: Embedding,
    layers: Vec<Block>,
    norm: RmsNorm,
    loss: LinearCrossEntropy,
}

impl Block {
    /// Four query heads and two key/value heads of 8 channels.
    fn new(device: &Device) -> Self {
        let linear = |width| LoraLinearConfig::new(HIDDEN, width).with_bias(false).init(device);
        Self {
            norm: RmsNormConfig::new(HIDDEN).init(device),
            q_proj: linear(32),
            k_proj: linear(16),
            v_proj: linear(16),
            rope: RotaryEmbeddingConfig::new(8).init(),
            attention: FlashAttentionConfig::new(4, 2, 8).init(),
            o_proj: LinearConfig::new(32, HIDDEN).with_bias(false).init(device),
        }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let h = self.norm.forward(x.clone());
        let q = self.rope.forward(self.q_proj.forward(h.clone()));
        let k = self.rope.forward(self.k_proj.forward(h.clone()));
        x + self.o_proj.forward(self.attention.forward(q, k, self.v_proj.forward(h)))
    }
}

impl Transformer {
    fn new(device: &Device) -> Self {
        Self {
            embedding: EmbeddingConfig::new(VOCAB, HIDDEN).init(device),
            layers: (0..2).map(|_| Block::new(device)).collect(),
            norm: RmsNormConfig::new(HIDDEN).init(device),
            loss: LinearCrossEntropyConfig::new().init(),
        }
    }

    /// The loss of predicting each id from those before it. The table is also the output layer.
    fn forward(&self, ids: &Tensor<2, Int>) -> Tensor<1> {
        let [batch, seq] = ids.dims();
        let x = self.embedding.forward(ids.clone().narrow(1, 0, seq - 1));
        let x = self.layers.iter().fold(x, |x, block| block.forward(x));
        let targets = ids.clone().narrow(1, 1, seq - 1).reshape([batch, seq - 1]);
        self.loss.forward(self.norm.forward(x), self.embedding.weight.val(), targets)
    }
}

pub(crate) fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = Device::flex().autodiff();
    device.seed(3407);
    let base = Transformer::new(&device);
    let config = LoraConfig::new(8).target_modules(["q_proj", "k_proj", "v_proj", "o_proj"]);
    let mut model = wrap(base.clone(), &config)?;

    // Sequences that count up from each row's number, in steps of it.
    let ids = Tensor::<1, Int>::arange(0..64, &device).reshape([4, 16]);
    let rows = Tensor::<1, Int>::arange(1..5, &device).reshape([4, 1]);
    let ids = (ids % 16 * rows) % VOCAB as i64;

    let mut optimizer = AdamWConfig::new().init();
    let (mut first, mut last) = (None, 0.0);
    for step in 0..60 {
        let loss = model.forward(&ids);
        last = loss.clone().into_scalar::<f32>();
        first.get_or_insert(last);
        if step % 20 == 0 {
            println!("step {step}: loss {last:.3}");
        }
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(2e-2, model, grads);
    }
    assert!(last < 0.6 * first.unwrap_or(0.0), "the loss went from {first:?} to {last}");

    // The adapter is in PEFT's files, and the base is as it was.
    let dir = tempfile::tempdir()?;
    save_adapter(&model, &config, None, dir.path())?;
    let (loaded, _) = load_adapter(base, dir.path())?;
    assert_eq!(loaded.forward(&ids).into_scalar::<f32>(), model.forward(&ids).into_scalar::<f32>());
    Ok(())
}
