"""Makes the fp8 goldens in this directory with PyTorch, transformers and PEFT.

    python -B tests/goldens/fp8/make.py [OUT]        OUT defaults to this file's directory

Needs no GPU. A tiny Qwen3 whose sides are no multiples of 128 is quantized by PyTorch's casts to float8_e4m3fn and stored in
every layout of an fp8 checkpoint. What is expected is transformers' and PEFT's result for the decoded weights in float32;
README.md describes every file.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

GOLDENS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(GOLDENS))  # so that `make` below is the script of the dense goldens

import make as dense
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

SEED = 61_000
FP8 = torch.float8_e4m3fn
MAX = torch.finfo(FP8).max
BLOCK = 128
CONFIG = Qwen3Config(
    vocab_size=71, hidden_size=132, intermediate_size=140, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=40, max_position_embeddings=256, rms_norm_eps=1e-6, tie_word_embeddings=True,
    rope_parameters=dense.rope(1e6), **dense.NO_SPECIAL_TOKENS,
)
ADAPTER = dense.LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", target_modules=dense.SEVEN)
LINEARS = {"self_attn": ["q_proj", "k_proj", "v_proj", "o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]}
MODULES = [f"model.layers.{i}.{part}.{name}" for i in range(2) for part, names in LINEARS.items() for name in names]


def group(strategy, **more):
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False, **more}
    activations = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    return {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}


def compressed(strategy, ignore, **more):
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group(strategy, **more)}, "ignore": ignore, "kv_cache_scheme": None,
    }


# name: (quantization_config, scales, key of the scales, their dtype, modules that stay dense)
LAYOUTS = {
    "block": (
        {
            "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "model.layers.1.mlp"],
        },
        "block", "weight_scale_inv", torch.float32, [f"model.layers.1.mlp.{name}" for name in LINEARS["mlp"]],
    ),
    "block-ue8m0": (
        {
            "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "scale_fmt": "ue8m0",
            "modules_to_not_convert": None,
        },
        "block", "weight_scale_inv", torch.float8_e8m0fnu, [],
    ),
    "tensor-static": (
        {
            "quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None, "dequantize": False,
            "modules_to_not_convert": ["lm_head"],
        },
        "tensor", "weight_scale_inv", torch.bfloat16, [],
    ),
    "fbgemm": (
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
        "row", "weight_scale", torch.float32, [],
    ),
    "channel": (
        compressed("channel", ["lm_head", "re:.*layers\\.0\\.mlp\\.down_proj$"]),
        "row", "weight_scale", torch.bfloat16, ["model.layers.0.mlp.down_proj"],
    ),
    "compressed-block": (
        compressed("block", ["lm_head"], block_structure=[128, 128]), "block", "weight_scale", torch.float32, [],
    ),
}
TRAJECTORIES = {"block": 2.15, "channel": 2.11}


def grid(w, scales):
    """The matrix of the largest magnitudes of the elements that share a scale."""
    if scales == "tensor":
        return w.abs().max().reshape(1, 1)
    if scales == "row":
        return w.abs().amax(1, keepdim=True)
    rows, cols = w.shape
    padded = torch.nn.functional.pad(w.abs(), (0, -cols % BLOCK, 0, -rows % BLOCK))
    return padded.reshape(-(-rows // BLOCK), BLOCK, -(-cols // BLOCK), BLOCK).amax((1, 3))


def each(scale, shape, scales):
    """A scale for each element."""
    if scales == "block":
        return scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: shape[0], : shape[1]]
    return scale.expand(shape)


def quantize(w, scales, dtype):
    scale = grid(w, scales) / MAX
    if dtype == torch.float8_e8m0fnu:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    scale = scale.to(dtype)
    codes = (w / each(scale.float(), w.shape, scales)).clamp(-MAX, MAX).to(FP8)
    decoded = codes.float() * each(scale.float(), w.shape, scales)
    if all(side % count == 0 for side, count in zip(w.shape, scale.shape)) and scales != "block":
        theirs = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
        assert torch.equal(theirs, decoded)
    return codes, scale, decoded


def make_layout(directory, plain, generator, name):
    config, scales, key, dtype, kept = LAYOUTS[name]
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    tensors = load_file(plain / "model.safetensors")
    stored, decoded = {}, dict(tensors)
    for tensor, w in tensors.items():
        module = tensor.removesuffix(".weight")
        if module not in MODULES or module in kept:
            stored[tensor] = w
            continue
        codes, scale, decoded[tensor] = quantize(w, scales, dtype)
        stored[tensor] = codes
        stored[f"{module}.{key}"] = scale.reshape(()) if name == "tensor-static" else scale
        if name == "tensor-static":
            stored[f"{module}.activation_scale"] = torch.tensor(0.05, dtype=torch.bfloat16)
    stored = {tensor: w.contiguous().clone() for tensor, w in stored.items()}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((plain / "config.json").read_text())
    dense.write_json(directory / "config.json", {**settings, "quantization_config": config})
    shutil.copy(plain / "rows.jsonl", directory)

    rows = [json.loads(line) for line in (plain / "rows.jsonl").read_text().splitlines()]
    with tempfile.TemporaryDirectory() as temporary:
        twin = Path(temporary) / name
        shutil.copytree(plain, twin)
        save_file({t: w.contiguous().clone() for t, w in decoded.items()}, twin / "model.safetensors", {"format": "pt"})
        expect = {"rows": dense.evaluate(dense.load(twin), rows), "spread": dense.evaluation_spread(twin, rows)}
        if name in TRAJECTORIES:
            adapted = dense.make_adapter(twin, name, "all-linear", ADAPTER, rows, generator)
            expect["adapters"] = {"all-linear": {"rows": adapted}}
            shutil.copytree(twin / "adapters", directory / "adapters")
            run = {**dense.LORA_RUN, "max_grad_norm": TRAJECTORIES[name], "weight_decay": 0.3}
            dense.make_trajectory(twin, "lora", "all-linear", run)
            shutil.copytree(twin / "train", directory / "train")
    dense.write_json(directory / "expect.json", expect)
    print(f"{name}: spread {expect['spread']:.1e}, mean nll {dense.mean_nll(expect['rows']):.2f}")


def main():
    out = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    dense.deterministic()
    dense.CONFIGS["fp8"] = CONFIG
    generator = torch.Generator().manual_seed(SEED)
    with tempfile.TemporaryDirectory() as temporary:
        plain = Path(temporary) / "fp8"
        plain.mkdir()
        dense.save_checkpoint(plain, "fp8", generator)
        rows = dense.make_rows(CONFIG.vocab_size, generator)
        (plain / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name in LAYOUTS:
            make_layout(out / name, plain, generator, name)
    dense.write_json(out / "versions.json", {"seed": SEED, **dense.versions()})


if __name__ == "__main__":
    main()
