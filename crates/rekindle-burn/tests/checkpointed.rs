//! Modules that recompute their activations: bits, gradients, calls, records.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::{Linear, LinearConfig};
use burn::store::ModuleRecord;
use burn::tensor::{DType, Device, Gradients, Tensor};
use burn_optim::{AdamWConfig, GradientsParams};
use common::{bits, device, noise, plain};
use rekindle_burn::{Checkpointed, LoraLinear, LoraLinearConfig, RmsNorm, RmsNormConfig, wrap};
use rekindle_lora::LoraConfig;

const WIDTH: usize = 12;

/// A block of our layers and Burn's.
#[derive(Module, Debug)]
struct Block {
    norm: RmsNorm,
    up_proj: LoraLinear,
    down_proj: Linear,
}

impl Block {
    fn new(device: &Device) -> Self {
        Self {
            norm: RmsNormConfig::new(WIDTH).init(device),
            up_proj: LoraLinearConfig::new(WIDTH, 20).init(device),
            down_proj: LinearConfig::new(20, WIDTH).init(device),
        }
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let h = self.up_proj.forward(self.norm.forward(x.clone())).tanh();
        x + self.down_proj.forward(h)
    }
}

fn input(device: &Device) -> Tensor<2> {
    common::tensor(&noise(1, 5 * WIDTH), [5, WIDTH], device, DType::F32)
}

/// The bits of the gradients of all parameters that have one.
fn gradients<M: Module>(model: &M, grads: &Gradients) -> Vec<Vec<u32>> {
    struct Collect<'a>(&'a Gradients, Vec<Vec<u32>>);
    impl ModuleVisitor for Collect<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.1.extend(param.base().grad(self.0).map(bits));
        }
    }
    let mut collect = Collect(grads, Vec::new());
    model.visit(&mut collect);
    collect.1
}

/// y, dx and the gradients of the parameters, of a loss that is not linear in y.
fn run<M: Module>(model: &M, device: &Device, forward: impl Fn(Tensor<2>) -> Tensor<2>) -> Vec<Vec<u32>> {
    let x = input(device).require_grad();
    let y = forward(x.clone().exp());
    let grads = y.clone().powi_scalar(2).sum().backward();
    let mut all = vec![bits(y), bits(x.grad(&grads).unwrap())];
    all.extend(gradients(model, &grads));
    all
}

#[test]
fn a_checkpointed_block_has_the_bits_of_the_block() {
    for device in [device(), device().gradient_checkpointing()] {
        let block = Block::new(&device);
        let checkpointed = Checkpointed::new(block.clone());
        let want = run(&block, &device, |x| block.forward(x));
        // y, dx, gamma and two linears with biases.
        assert_eq!(want.len(), 7);
        assert_eq!(run(&checkpointed, &device, |x| checkpointed.forward(x, Block::forward)), want);
        // Blocks after each other, also the same one twice.
        let want = run(&block, &device, |x| block.forward(block.forward(x)));
        let twice = |x| checkpointed.forward(checkpointed.forward(x, Block::forward), Block::forward);
        assert_eq!(run(&checkpointed, &device, twice), want);
    }
}

/// A network with more parameters than a node of Burn has inputs here.
#[derive(Module, Debug)]
struct Deep {
    layers: Vec<Linear>,
}

impl Deep {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.layers.iter().fold(x, |x, layer| layer.forward(x).tanh())
    }
}

#[test]
fn any_number_of_parameters_gets_its_gradients() {
    // 31 and 32 inputs of a node with x, one more, and several nodes.
    for layers in [15, 16, 17, 50] {
        let linear = LinearConfig::new(WIDTH, WIDTH);
        let deep = Deep { layers: (0..layers).map(|_| linear.init(&device())).collect() };
        let checkpointed = Checkpointed::new(deep.clone());
        let want = run(&deep, &device(), |x| deep.forward(x));
        assert_eq!(want.len(), 2 + 2 * layers);
        assert_eq!(run(&checkpointed, &device(), |x| checkpointed.forward(x, Deep::forward)), want);
    }
}

#[test]
fn the_block_is_computed_once_more_in_the_backward() {
    let calls = Arc::new(AtomicUsize::new(0));
    let block = Checkpointed::new(Block::new(&device()));
    let forward = |x| {
        let calls = Arc::clone(&calls);
        block.forward(x, move |block: &Block, x| {
            calls.fetch_add(1, Ordering::Relaxed);
            block.forward(x)
        })
    };
    let y = forward(input(&device()));
    assert_eq!(calls.load(Ordering::Relaxed), 1);
    y.sum().backward();
    assert_eq!(calls.load(Ordering::Relaxed), 2);
    // Nothing to differentiate, so nothing to keep.
    let frozen = block.clone().no_grad();
    let y = frozen.forward(input(&device()), Block::forward);
    assert!(!y.is_tracked());
}

/// The input of the first block of a network with frozen embeddings has no gradient; the adapters have.
#[test]
fn adapters_in_a_checkpointed_block_train_alone() {
    let block = wrap(Block::new(&device()), &LoraConfig::new(2).target_modules("all-linear")).unwrap();
    let checkpointed = Checkpointed::new(block.clone());
    let grads = |y: Tensor<2>| gradients(&block, &y.powi_scalar(2).sum().backward());
    let want = grads(block.forward(input(&device())));
    assert_eq!(want.len(), 4);
    assert_eq!(grads(checkpointed.forward(input(&device()), Block::forward)), want);
}

#[test]
fn several_inputs_and_parameters_without_use() {
    let block = Checkpointed::new(Block::new(&device()));
    let [a, b] = [plain(1, [5, WIDTH]), plain(2, [5, WIDTH])].map(|x| x.autodiff().require_grad());
    // The norm alone, of the first input; the second is the result of an operation and not read.
    let y = block.forward_all([a.clone(), b.clone() * 2.0], |block: &Block, [a, _]| block.norm.forward(a));
    let grads = y.sum().backward();
    assert!(a.grad(&grads).is_some());
    assert!(bits(b.grad(&grads).unwrap()).iter().all(|&bits| f32::from_bits(bits) == 0.0));
    assert_eq!(GradientsParams::from_grads(grads, &block).len(), 1, "gamma");
}

#[test]
fn a_wrapper_is_not_part_of_paths_and_records() {
    let (block, other) = (Block::new(&device()), Checkpointed::new(Block::new(&device())));
    assert_eq!(other.num_params(), block.num_params());
    let bytes = block.clone().into_record().into_bytes().unwrap();
    let loaded = other.load_record(ModuleRecord::from_bytes(bytes).unwrap());
    let x = input(&device());
    assert_eq!(bits(loaded.forward(x.clone(), Block::forward)), bits(block.forward(x.clone())));
    let back = Block::new(&device()).load_record(loaded.into_record());
    assert_eq!(bits(back.forward(x.clone())), bits(block.forward(x)));
}

#[test]
fn an_optimizer_trains_it_like_the_block() {
    let train = |forward: fn(&Checkpointed<Block>, Tensor<2>) -> Tensor<2>, block: Block| {
        let (mut model, mut optimizer) = (Checkpointed::new(block), AdamWConfig::new().init());
        for _ in 0..3 {
            let loss = forward(&model, input(&device())).powi_scalar(2).mean();
            let grads = GradientsParams::from_grads(loss.backward(), &model);
            model = optimizer.step(1e-2, model, grads);
        }
        bits(model.forward(input(&device()), Block::forward))
    };
    let block = Block::new(&device());
    let plain = train(|model, x| Block::forward(model, x), block.clone());
    assert_eq!(train(|model, x| model.forward(x, Block::forward), block), plain);
}
