//! The adapter that is written here and read by PEFT.

use rekindle_lora::peft::AdapterConfig;
use rekindle_lora::{Adapter, LoraConfig};
use rekindle_train::{Optimizer, OptimizerConfig, SftConfig};

use crate::Golden;

/// A fresh adapter on `qwen3-tied`, trained on its rows: the content of `qwen3-tied/written-here`.
///
/// The settings are those that no golden adapter has: an odd rank, three of the seven linears, two of the
/// three blocks, a dropout.
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
    // Steps as large as these make every loss move by far more than the tolerance.
    let config = SftConfig::default();
    let mut optimizer = Optimizer::new(&model, OptimizerConfig::from(&config), 20260).expect("the adapter is trained");
    for _ in 0..3 {
        optimizer.step(&mut model, &[golden.packed()], 0.02).expect("golden rows fit");
    }
    let trained = model.adapter().expect("it was just added");
    let modules: Vec<String> = trained.factors.keys().cloned().collect();
    // The name, not the path on this machine.
    Adapter { config: AdapterConfig::new(&lora, Some(&golden.name), &modules), ..trained }
}
