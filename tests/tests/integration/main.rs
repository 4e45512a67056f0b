//! Tests across crates: losses, gradients, files and runs compared with transformers, PEFT and bitsandbytes.
//!
//! They are one program, because linking one is faster than linking thirty. `cargo test --test integration losses::`
//! runs the tests of one module. Tests that replace the allocator (`memory_plan.rs`), change the working directory
//! (`readme.rs`) or need a GPU (`cuda.rs`) are programs of their own.

mod adapters;
mod diverged;
mod dropout;
mod engine;
mod errors;
mod f16;
mod families;
mod fp8;
mod fp8_products;
mod full;
mod generate;
mod generate_text;
mod gguf;
mod gguf_base;
mod gpt_oss;
mod gradients;
mod grpo;
mod initial;
mod layouts;
mod library_example;
mod lora_options;
mod losses;
mod merge;
mod moe;
mod named_adapters;
mod non_finite;
mod objectives;
mod optimizers;
mod portable;
mod preferences;
mod pretrained;
mod quantized;
mod ranks;
mod resume;
mod reward;
mod rope;
mod router_loss;
mod run;
mod saved_tables;
mod schedules;
mod shard_base;
mod smollm2;
mod splits;
mod tokenizers;
mod trajectory;
