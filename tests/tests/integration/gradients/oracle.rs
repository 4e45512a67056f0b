//! A plain implementation of the whole model, one row and one head at a time, without fusion, with gradients from
//! Burn's autodiff. It shares no code with the crates except the safetensors reader.

use std::collections::BTreeMap;
use std::f64::consts::TAU;

use burn::tensor::{DType, Device, Tensor, TensorData};
use rekindle_hub::{Checkpoint, SafetensorsFile};
use rekindle_tests::{Golden, Row};
use serde_json::Value;

/// Gradients by the tensor's name in its file, without PEFT's prefix.
pub(crate) type Gradients = BTreeMap<String, Vec<f64>>;

pub(crate) struct Oracle {
    config: Value,
    device: Device,
    dtype: DType,
    weights: BTreeMap<String, Tensor<2>>,
    /// The factors and scale of the adapter, which are trained instead of the weights.
    adapter: Option<(BTreeMap<String, Tensor<2>>, f64)>,
}

impl Oracle {
    pub(crate) fn new(golden: &Golden, adapter: Option<&str>, dtype: DType) -> Self {
        let checkpoint = Checkpoint::open(&golden.dir).expect("a golden checkpoint opens");
        let device = Device::flex().autodiff();
        let leaf = |view: rekindle_hub::TensorView<'_>, trained: bool| {
            let [rows, cols] = match *view.shape {
                [n] => [1, n],
                [rows, cols] => [rows, cols],
                _ => panic!("{}: one or two axes", view.name),
            };
            let data = TensorData::new(view.to_f32().expect("floats"), [rows, cols]).try_cast(dtype).expect("floats");
            let tensor = Tensor::<2>::from_data(data, (&device, dtype));
            if trained { tensor.require_grad() } else { tensor }
        };
        let weight = |name: &str| {
            let view = checkpoint.get(name).expect("a listed tensor is there");
            (name.to_owned(), leaf(view, adapter.is_none()))
        };
        let weights = checkpoint.names().map(weight).collect();
        let adapter = adapter.map(|name| {
            let dir = golden.dir.join("adapters").join(name);
            let file = SafetensorsFile::open(&dir.join("adapter_model.safetensors")).expect("it opens");
            let factor = |key: &str| {
                let name = key.strip_prefix("base_model.model.").expect("PEFT's prefix");
                (name.to_owned(), leaf(file.get(key).expect("a listed tensor is there"), true))
            };
            let settings = rekindle_tests::read_json(&dir.join("adapter_config.json"));
            let (r, alpha) = (float(&settings["r"]), float(&settings["lora_alpha"]));
            let scale = if settings["use_rslora"] == true { alpha / r.sqrt() } else { alpha / r };
            (file.names().map(factor).collect(), scale)
        });
        Self { config: checkpoint.config().clone(), device, dtype, weights, adapter }
    }

    /// Returns the nll of every label that is not ignored, row by row.
    pub(crate) fn losses(&self, rows: &[Row]) -> Vec<Vec<f64>> {
        let counted = |row: &Row| row.labels[1..].iter().map(|&label| label >= 0).collect::<Vec<_>>();
        let row = |row: &Row| {
            let nll = values(self.row(row)).into_iter().zip(counted(row));
            nll.filter_map(|(nll, counts)| counts.then_some(nll)).collect()
        };
        rows.iter().map(row).collect()
    }

    /// Returns `scale` · Σ nll and its gradients.
    pub(crate) fn gradients(&self, rows: &[Row], scale: f64) -> (f64, Gradients) {
        let sums: Vec<Tensor<1>> = rows.iter().map(|row| self.row(row).sum()).collect();
        let loss = Tensor::cat(sums, 0).sum() * scale;
        let total = loss.clone().into_data_as::<f64>().try_into_vec().expect("cast to f64 just before")[0];
        let grads = loss.backward();
        let trained = self.adapter.as_ref().map_or(&self.weights, |(factors, _)| factors);
        let gradient = |(name, leaf): (&String, &Tensor<2>)| {
            (name.clone(), values(leaf.grad(&grads).expect("every trained tensor takes part")))
        };
        (total, trained.iter().map(gradient).collect())
    }

    /// Returns the nll of every label after the first, 0 if ignored, `[tokens - 1, 1]`.
    fn row(&self, row: &Row) -> Tensor<2> {
        let tokens = row.input_ids.len();
        let embed = &self.weights["model.embed_tokens.weight"];
        let vocab = embed.dims()[0];
        let ids: Vec<Option<usize>> = row.input_ids.iter().map(|&id| Some(id as usize)).collect();
        let mut h = self.one_hot(&ids, vocab).matmul(embed.clone());
        for layer in 0..self.size("num_hidden_layers") {
            h = self.block(&format!("model.layers.{layer}"), h);
        }
        let n = self.norm("model.norm.weight", h).narrow(0, 0, tokens - 1);
        let head = self.weights.get("lm_head.weight").unwrap_or(embed);
        let logits = n.matmul(head.clone().transpose());
        let max = logits.clone().max_dim(1).detach();
        let lse = (logits.clone() - max.clone()).exp().sum_dim(1).log() + max;
        let labels: Vec<Option<usize>> = row.labels[1..].iter().map(|&l| usize::try_from(l).ok()).collect();
        let picked = self.one_hot(&labels, vocab);
        let counts = picked.clone().sum_dim(1);
        lse * counts - (logits * picked).sum_dim(1)
    }

    fn block(&self, name: &str, x: Tensor<2>) -> Tensor<2> {
        let n = self.norm(&format!("{name}.input_layernorm.weight"), x.clone());
        let h = x + self.attention(&format!("{name}.self_attn"), n);
        let n = self.norm(&format!("{name}.post_attention_layernorm.weight"), h.clone());
        let gate = self.linear(&format!("{name}.mlp.gate_proj"), n.clone());
        let up = self.linear(&format!("{name}.mlp.up_proj"), n);
        let silu = gate.clone() / (gate.neg().exp() + 1.0);
        h + self.linear(&format!("{name}.mlp.down_proj"), silu * up)
    }

    fn attention(&self, name: &str, n: Tensor<2>) -> Tensor<2> {
        let tokens = n.dims()[0];
        let [q, k, v] = ["q", "k", "v"].map(|part| self.linear(&format!("{name}.{part}_proj"), n.clone()));
        let heads = self.size("num_attention_heads");
        let head_dim = q.dims()[1] / heads;
        let group = heads / (k.dims()[1] / head_dim);
        let (cos, sin) = self.angles(tokens, head_dim);
        let head = |t: &Tensor<2>, at: usize| t.clone().slice([0..tokens, at * head_dim..(at + 1) * head_dim]);
        let turned = |t: &Tensor<2>, at: usize, norm: &str| {
            let norm = format!("{name}.{norm}.weight");
            let x = head(t, at);
            let x = if self.weights.contains_key(&norm) { self.norm(&norm, x) } else { x };
            let half = head_dim / 2;
            let (a, b) = (x.clone().slice([0..tokens, 0..half]), x.slice([0..tokens, half..head_dim]));
            let first = a.clone() * cos.clone() - b.clone() * sin.clone();
            Tensor::cat(vec![first, b * cos.clone() + a * sin.clone()], 1)
        };
        let hidden = (0..tokens * tokens).map(|i| if i % tokens > i / tokens { f64::NEG_INFINITY } else { 0.0 });
        let hidden = self.constant(hidden.collect(), [tokens, tokens]);
        let outs = (0..heads).map(|at| {
            let scores = turned(&q, at, "q_norm").matmul(turned(&k, at / group, "k_norm").transpose());
            let scores = scores / (head_dim as f64).sqrt() + hidden.clone();
            let exp = (scores.clone() - scores.max_dim(1).detach()).exp();
            (exp.clone() / exp.sum_dim(1)).matmul(head(&v, at / group))
        });
        self.linear(&format!("{name}.o_proj"), Tensor::cat(outs.collect(), 1))
    }

    /// Returns x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ.
    fn linear(&self, name: &str, x: Tensor<2>) -> Tensor<2> {
        let mut y = x.clone().matmul(self.weights[&format!("{name}.weight")].clone().transpose());
        if let Some(bias) = self.weights.get(&format!("{name}.bias")) {
            y = y + bias.clone();
        }
        let factor = |kind: &str| {
            let (factors, scale) = self.adapter.as_ref()?;
            Some((factors.get(&format!("{name}.lora_{kind}.weight"))?.clone().transpose(), *scale))
        };
        match (factor("A"), factor("B")) {
            (Some((a, scale)), Some((b, _))) => y + x.matmul(a).matmul(b) * scale,
            _ => y,
        }
    }

    /// Returns x / √(mean(x²) + eps) ∘ w.
    fn norm(&self, name: &str, x: Tensor<2>) -> Tensor<2> {
        let rms = (x.clone().powi_scalar(2).mean_dim(1) + float(&self.config["rms_norm_eps"])).sqrt();
        x / rms * self.weights[name].clone()
    }

    /// Returns cosines and sines, `[tokens, head_dim / 2]`.
    fn angles(&self, tokens: usize, head_dim: usize) -> (Tensor<2>, Tensor<2>) {
        let half = head_dim / 2;
        // Supports both layouts: `rope_parameters`, or `rope_theta` next to `rope_scaling`.
        let rope = self.config.get("rope_parameters").unwrap_or(&self.config);
        let theta = float(&rope["rope_theta"]);
        let frequency = |i: usize| {
            let f = theta.powf(-2.0 * i as f64 / head_dim as f64);
            if rope["rope_type"] == "llama3" { llama3(f, rope) } else { f }
        };
        let angles: Vec<f64> = (0..tokens * half).map(|i| (i / half) as f64 * frequency(i % half)).collect();
        let table = |f: fn(f64) -> f64| self.constant(angles.iter().map(|&a| f(a)).collect(), [tokens, half]);
        (table(f64::cos), table(f64::sin))
    }

    fn one_hot(&self, ids: &[Option<usize>], width: usize) -> Tensor<2> {
        let mut values = vec![0.0; ids.len() * width];
        for (row, id) in ids.iter().enumerate() {
            if let Some(id) = id {
                values[row * width + id] = 1.0;
            }
        }
        self.constant(values, [ids.len(), width])
    }

    fn constant(&self, values: Vec<f64>, shape: [usize; 2]) -> Tensor<2> {
        let data = TensorData::new(values, shape).try_cast(self.dtype).expect("floats cast to floats");
        Tensor::from_data(data, (&self.device, self.dtype))
    }

    fn size(&self, key: &str) -> usize {
        self.config[key].as_u64().expect("a count") as usize
    }
}

/// Divides low frequencies by `factor`, keeps high ones, and blends those in between.
fn llama3(frequency: f64, rope: &Value) -> f64 {
    let number = |key: &str| float(&rope[key]);
    let (factor, low, high) = (number("factor"), number("low_freq_factor"), number("high_freq_factor"));
    let turns = number("original_max_position_embeddings") * frequency / TAU;
    let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
    kept * frequency + (1.0 - kept) * frequency / factor
}

fn float(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data_as::<f64>().try_into_vec().expect("cast to f64 just before")
}
