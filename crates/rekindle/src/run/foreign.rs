//! Keys of other trainers: their names here, or the reason that there is no such key.

use toml::Value;

/// Keys without a counterpart, each with advice.
const ADVICE: [(&str, &str); 54] = [
    ("max_prompt_length", "write max_seq_length in [model]; a prompt is not cut alone"),
    ("truncation_mode", "write overlong = \"truncate\" in [data], which keeps the beginning of a row"),
    ("rpo_alpha", "write loss_type = [\"sigmoid\", \"sft\"] with loss_weights = [1.0, ALPHA]"),
    ("reference_free", "use a method without a reference model: method = \"cpo\", \"simpo\" or \"orpo\""),
    ("force_use_ref_model", "the reference is always the model before training; remove it"),
    ("ref_adapter_name", "an adapter that the run continues (init_from in [lora]) is its own reference; remove it"),
    ("model_adapter_name", "a run trains one adapter; remove it"),
    ("precompute_ref_batch_size", "reference log-probabilities are computed in batches of training; remove it"),
    ("disable_dropout", "dropout is lora_dropout in [lora]; set it to 0 there, as TRL does for preference losses"),
    ("reward_weights", "write weight in each section [[rewards]]"),
    ("reward_funcs", "write a section [[rewards]] for each reward"),
    ("use_vllm", SAME_PROCESS),
    ("vllm_mode", SAME_PROCESS),
    (
        "vllm_gpu_memory_utilization",
        "write max_sequences in [train], which the size of the key/value cache follows from",
    ),
    ("vllm_enable_sleep_mode", SAME_PROCESS),
    ("use_transformers_paged", SAME_PROCESS),
    ("use_transformers_continuous_batching", SAME_PROCESS),
    ("entropy_coef", "a bonus for entropy is not supported; remove it"),
    ("use_adaptive_entropy", "a bonus for entropy is not supported; remove it"),
    ("generation_kwargs", "write temperature, top_p, top_k, min_p and repetition_penalty in [train]"),
    ("cast_lm_head_to_fp32", "logits are always computed in f32; remove it"),
    ("log_completions", "write eval_samples in [train] for samples in report.html"),
    ("token_level_kl", "the penalty of a completion is the sum over its tokens; remove it"),
    ("max_tool_calling_iterations", "tools are not called while completions are sampled; remove it"),
    ("bnb_4bit_quant_type", "write quant_type = \"nf4\" or \"fp4\" in [model]"),
    ("bnb_4bit_use_double_quant", "write double_quant in [model]"),
    ("bnb_4bit_compute_dtype", "quantized weights are decoded to dtype in [model]"),
    ("bf16", "write dtype = \"bf16\" in [model]"),
    ("fp16", "write dtype = \"f16\" in [model]"),
    ("tf32", "the compute dtype is dtype in [model]; remove it"),
    ("dataset_text_field", "plain text is read from the column \"text\"; rename columns with columns in [data]"),
    ("gradient_checkpointing", "write use_gradient_checkpointing in [train]"),
    ("logging_dir", "TensorBoard's files are written to tensorboard/ in output_dir"),
    ("logging_strategy", "a log line is printed every logging_steps; metrics.jsonl has every step"),
    ("trust_remote_code", "code in a checkpoint is never run; unknown architectures are refused"),
    ("device_map", "a model is on one device; write device at the top of the file"),
    ("gpu_memory_utilization", "memory is allocated on demand; nothing is reserved for an engine"),
    ("max_lora_rank", "the rank of an adapter is r in [lora]; there is no engine to reserve memory in"),
    ("use_exact_model_name", "names are always used as written"),
    (
        "max_length",
        "write max_seq_length in [model], and overlong = \"truncate\" in [data] to cut longer rows as TRL does",
    ),
    ("group_by_length", "rows are never padded, so grouping them by length saves nothing; remove it"),
    ("train_sampling_strategy", "rows are shuffled by default; set shuffle = false in [data] to keep their order"),
    ("label_smoothing_factor", "the loss is cross-entropy without label smoothing; remove it"),
    ("metric_for_best_model", "the best model is the one with the lowest evaluation loss; remove it"),
    ("greater_is_better", "the best model is the one with the lowest evaluation loss; remove it"),
    ("resume_from_checkpoint", "pass --resume, or --resume=DIR, to `rekindle train`"),
    ("overwrite_output_dir", "pass --overwrite to `rekindle train`"),
    ("completion_only_loss", "the loss covers the completion of a prompt; change it with train_on in [data]"),
    ("assistant_only_loss", "the loss covers the assistant's turns; change it with train_on in [data]"),
    ("train_on_inputs", "write train_on = \"all\" in [data] to train prompts too"),
    ("min_lr", "write lr_scheduler_type = \"cosine_with_min_lr\" with lr_scheduler_kwargs = { min_lr = … } in [train]"),
    ("push_to_hub", "`rekindle push RUN --to user/name` uploads the result of a run"),
    ("torch_compile", "there is nothing to compile; remove it"),
    ("dataloader_num_workers", "rows are encoded once, on all cores, before training; remove it"),
];

/// The reason why options of a sampling server are not needed.
const SAME_PROCESS: &str = "completions are sampled in the same process, on the same weights; remove it";

/// Values, as TOML, that request what Rekindle always does.
const NEUTRAL: [(&str, &[&str]); 12] = [
    ("group_by_length", &["false"]),
    ("label_smoothing_factor", &["0", "0.0"]),
    ("metric_for_best_model", &["\"eval_loss\"", "\"loss\""]),
    ("greater_is_better", &["false"]),
    ("trust_remote_code", &["false"]),
    ("push_to_hub", &["false"]),
    ("torch_compile", &["false"]),
    ("bf16", &["false"]),
    ("fp16", &["false"]),
    ("use_vllm", &["false"]),
    ("entropy_coef", &["0", "0.0"]),
    ("use_adaptive_entropy", &["false"]),
];

/// Sections and names of keys, each with its names in other trainers.
const SYNONYMS: [(&str, &str, &[&str]); 49] = [
    ("", "output_dir", &["output", "out_dir", "save_dir", "save_path"]),
    ("", "seed", &["data_seed", "random_seed"]),
    (
        "model",
        "name_or_path",
        &[
            "model_name",
            "model_name_or_path",
            "pretrained_model_name_or_path",
            "base_model",
            "model_id",
            "model_path",
            "repo_id",
        ],
    ),
    (
        "model",
        "max_seq_length",
        &[
            "max_seq_len",
            "seq_len",
            "sequence_len",
            "sequence_length",
            "cutoff_len",
            "context_length",
            "block_size",
            "model_max_length",
        ],
    ),
    ("model", "dtype", &["torch_dtype", "precision", "compute_dtype", "mixed_precision"]),
    ("model", "load_in_4bit", &["load_4bit", "qlora", "use_4bit", "quantization_bit"]),
    ("model", "load_in_8bit", &["load_8bit", "use_8bit"]),
    ("model", "load_in_fp8", &["load_fp8", "use_fp8"]),
    ("model", "full_finetuning", &["full_finetune", "full"]),
    ("model", "token", &["hf_token", "use_auth_token", "hub_token"]),
    ("model", "revision", &["model_revision"]),
    ("lora", "r", &["rank", "lora_r", "lora_rank", "lora_dim"]),
    ("lora", "lora_alpha", &["alpha", "scale"]),
    ("lora", "lora_dropout", &["dropout"]),
    ("lora", "target_modules", &["targets", "lora_target", "lora_target_modules", "target_layers"]),
    ("lora", "random_state", &["lora_seed"]),
    ("lora", "use_dora", &["dora"]),
    ("lora", "use_rslora", &["rslora"]),
    (
        "data",
        "train",
        &[
            "dataset",
            "datasets",
            "dataset_name",
            "train_file",
            "train_data",
            "train_dataset",
            "data_path",
            "data_files",
            "train_path",
        ],
    ),
    (
        "data",
        "eval",
        &[
            "eval_file",
            "eval_data",
            "eval_dataset",
            "validation",
            "validation_file",
            "valid",
            "val",
            "val_data",
            "dev",
            "test",
            "heldout",
        ],
    ),
    ("data", "train_on", &["train_on_responses_only", "mask_prompt"]),
    ("data", "subset", &["dataset_config", "dataset_config_name"]),
    ("data", "overlong", &["truncation", "truncate"]),
    (
        "train",
        "per_device_train_batch_size",
        &["batch_size", "train_batch_size", "micro_batch_size", "per_gpu_train_batch_size", "per_device_batch_size"],
    ),
    ("train", "per_device_eval_batch_size", &["eval_batch_size", "val_batch_size", "per_gpu_eval_batch_size"]),
    (
        "train",
        "gradient_accumulation_steps",
        &["grad_accum", "grad_accumulation_steps", "accumulation_steps", "accumulate_grad_batches"],
    ),
    ("train", "num_train_epochs", &["epochs", "num_epochs", "n_epochs", "max_epochs"]),
    ("train", "max_steps", &["steps", "iters", "max_iters", "num_steps", "num_train_steps", "total_steps"]),
    ("train", "learning_rate", &["lr", "peak_lr", "max_lr"]),
    ("train", "lr_scheduler_type", &["scheduler", "lr_scheduler", "schedule", "lr_schedule"]),
    ("train", "warmup_steps", &["warmup", "num_warmup_steps", "warmup_iters"]),
    ("train", "optim", &["optimizer", "optimizer_type"]),
    ("train", "max_grad_norm", &["grad_clip", "gradient_clipping", "clip_grad_norm", "gradient_clip_val", "max_norm"]),
    ("train", "logging_steps", &["log_steps", "log_every", "log_interval", "steps_per_report", "log_every_n_steps"]),
    ("train", "eval_strategy", &["evaluation_strategy"]),
    ("train", "eval_steps", &["eval_every", "eval_interval", "steps_per_eval", "val_steps", "evaluation_steps"]),
    ("train", "save_steps", &["save_every", "save_interval", "checkpoint_steps", "ckpt_interval"]),
    ("train", "early_stopping_patience", &["patience"]),
    ("train", "num_generations", &["rloo_k", "num_sample_generations", "group_size", "num_rollouts"]),
    ("train", "epsilon", &["cliprange", "clip_range", "epsilon_low"]),
    ("train", "beta", &["kl_coef", "kl_coeff"]),
    ("train", "num_iterations", &["num_ppo_epochs"]),
    ("train", "max_completion_length", &["response_length", "max_response_length"]),
    ("train", "normalize_advantages", &["normalize_reward"]),
    ("train", "scale_rewards", &["scale_reward"]),
    ("train", "importance_sampling_correction", &["vllm_importance_sampling_correction"]),
    ("train", "importance_sampling_mode", &["vllm_importance_sampling_mode"]),
    ("train", "importance_sampling_clip_max", &["vllm_importance_sampling_clip_max", "vllm_importance_sampling_cap"]),
    ("train", "importance_sampling_clip_min", &["vllm_importance_sampling_clip_min"]),
];

/// Returns the advice for a `key` without a counterpart.
pub(super) fn advice(key: &str) -> Option<&'static str> {
    ADVICE.iter().find(|(name, _)| *name == key).map(|(_, advice)| *advice)
}

/// Returns true if `key = value` requests what Rekindle always does.
pub(super) fn is_neutral(key: &str, value: &Value) -> bool {
    let value = value.to_string();
    NEUTRAL.iter().any(|(name, values)| *name == key && values.contains(&value.as_str()))
}

/// Returns the section and the name of `key` here; a match in `section` comes first.
pub(super) fn synonym(section: &str, key: &str) -> Option<(&'static str, &'static str)> {
    let meant = || SYNONYMS.iter().filter(|(_, _, others)| others.contains(&key));
    meant().find(|(home, ..)| *home == section).or_else(|| meant().next()).map(|(home, name, _)| (*home, *name))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use crate::LoraConfig;

    use super::*;
    use crate::run::sections::fields_of;
    use crate::run::{DataArguments, ModelArguments};

    #[test]
    fn synonyms_are_of_keys_that_exist_and_are_no_keys_themselves() {
        let sections = [
            ("", vec!["output_dir", "seed", "device"]),
            ("model", fields_of::<ModelArguments>()),
            ("lora", fields_of::<LoraConfig>()),
            ("data", fields_of::<DataArguments>()),
            ("train", crate::run::method::train_keys()),
        ];
        let keys: BTreeSet<&str> = sections.iter().flat_map(|(_, keys)| keys.iter().copied()).collect();
        for (home, name, others) in SYNONYMS {
            let (_, known) = sections.iter().find(|(section, _)| *section == home).unwrap();
            assert!(known.contains(&name), "[{home}] {name}");
            for other in others {
                assert!(!keys.contains(other) && advice(other).is_none(), "{other}");
            }
        }
        for (name, _) in ADVICE {
            assert!(!keys.contains(name), "{name}");
        }
        for (name, _) in NEUTRAL {
            assert!(advice(name).is_some(), "{name}: other values are answered");
        }
    }
}
