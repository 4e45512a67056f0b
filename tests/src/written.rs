//! The adapter that this project writes and PEFT reads.

use rekindle_lora::peft::AdapterConfig;
use rekindle_lora::{Adapter, InitLoraWeights, LoraConfig};
use rekindle_models::Sft;
use rekindle_train::{Optimizer, OptimizerConfig, SftConfig};

use crate::Golden;

/// Trains a new adapter for `qwen3-tied` on its rows: the content of `qwen3-tied/written-here`.
///
/// Its settings occur in no golden adapter: an odd rank, three of the seven linears, two of the three blocks, and
/// dropout.
pub fn train_written_adapter() -> Adapter {
    let golden = Golden::open("qwen3-tied");
    let mut model = golden.load();
    let lora = LoraConfig::new(5)
        .lora_alpha(12.5)
        .lora_dropout(0.05)
        .target_modules(["k_proj", "o_proj", "down_proj"])
        .layers_to_transform([0, 2])
        .random_state(20260);
    model.add_adapter(&lora).expect("the configuration is valid");
    // Steps this large change every loss by far more than the tolerance.
    let config = SftConfig::default();
    let mut optimizer = Optimizer::new(&model, OptimizerConfig::from(&config), 20260).expect("the adapter is trained");
    for _ in 0..3 {
        optimizer.step(&mut model, &Sft, &[golden.packed()], 0.02).expect("golden rows fit");
    }
    let trained = model.adapter().expect("it was just added");
    let modules: Vec<String> = trained.factors.keys().cloned().collect();
    // Records the name instead of the path on this machine.
    Adapter { config: AdapterConfig::new(&lora, Some(&golden.name), &modules), ..trained }
}

/// Makes an adapter on attention and on every linear of the experts of `families/mixtral`, with random A and B: the content
/// of `families/mixtral/written-here`.
pub fn random_expert_adapter() -> Adapter {
    let golden = Golden::open("families/mixtral");
    let mut model = golden.load();
    let lora = LoraConfig::new(3)
        .lora_alpha(5.0)
        .target_modules(["q_proj", "gate_proj", "up_proj", "down_proj"])
        .init_lora_weights(InitLoraWeights::Random)
        .random_state(77);
    model.add_adapter(&lora).expect("the configuration is valid");
    let made = model.adapter().expect("it was just added");
    let modules: Vec<String> = made.factors.keys().cloned().collect();
    // PEFT reads `init_lora_weights` of a file that it loads, and has none that means random B.
    let plain = LoraConfig { init_lora_weights: InitLoraWeights::Default, ..lora };
    Adapter { config: AdapterConfig::new(&plain, Some(&golden.name), &modules), ..made }
}
