"""Writes small checkpoints with random weights that llama.cpp computes: those in ../families of these types have sizes or
constants that it does not.

    python checkpoints.py

Each directory has config.json and model.safetensors in bf16; gpt-oss has experts in MXFP4. Needs torch and transformers.
"""

import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import save_file

here = pathlib.Path(__file__).resolve().parent
sys.path.append(str(here.parent / "families"))
import gpt_oss  # noqa: E402

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
DELTA = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.5,
    },
}
MIXTURE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA = {"num_hidden_layers": 6, "query_pre_attn_scalar": 16, "sliding_window": 12}
CHECKPOINTS = {
    "gemma2": ("Gemma2", {**GEMMA, "num_hidden_layers": 4}),
    "gemma3": ("Gemma3Text:Gemma3", GEMMA),
    "exaone4": ("Exaone4", {"num_hidden_layers": 2, "sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "glm": ("Glm", {"num_hidden_layers": 2}),
    "qwen35": ("Qwen3_5Text:Qwen3_5", DELTA),
    "qwen35-moe": ("Qwen3_5MoeText:Qwen3_5Moe", {**DELTA, **MIXTURE, "shared_expert_intermediate_size": 32}),
    "gpt-oss": (
        "GptOss",
        {
            "num_hidden_layers": 2,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "sliding_window": 12,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": True,
            },
        },
    ),
}


def build(name, classes, values):
    config_name, _, model_name = classes.partition(":")
    config = getattr(transformers, f"{config_name}Config")(**{**COMMON, **values})
    torch.manual_seed(20)
    model = getattr(transformers, f"{model_name or config_name}ForCausalLM")(config)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=weight.shape[-1] ** -0.5)
            elif not key.endswith(("A_log", "dt_bias")):
                weight.add_(0.1 * torch.randn_like(weight))
    directory = here / name
    model.to(torch.bfloat16).save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    if name == "gpt-oss":
        to_mxfp4(directory, model)
    if name == "exaone4":
        # Without a window, transformers writes an interval of 0.
        edit(directory, lambda config: config.pop("sliding_window_pattern"))
    print(name, sum(weight.numel() for weight in model.parameters()))


def edit(directory, change):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def to_mxfp4(directory, model):
    tensors = {}
    for key, weight in model.state_dict().items():
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed, scales = gpt_oss.quantize(weight.float().transpose(1, 2))
            tensors |= {f"{key}_blocks": packed.contiguous(), f"{key}_scales": scales.contiguous()}
        else:
            tensors[key] = weight.contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    edit(directory, lambda config: config.update(quantization_config=gpt_oss.QUANTIZATION))


for name, (classes, values) in CHECKPOINTS.items():
    build(name, classes, values)
