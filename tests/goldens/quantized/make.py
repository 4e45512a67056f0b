"""Makes the quantized goldens in this directory with transformers and bitsandbytes on CUDA.

    python -B tests/goldens/quantized/make.py [OUT]        OUT defaults to this file's directory

Needs a CUDA device and the packages in versions.json. README.md describes every file and key. The dense goldens beside
this directory are the models that it quantizes. It replaces each checkpoint's directory: run train.py after it.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from loading import (
    DEVICE, GOLDENS, apart, decoded_model, dense, dequantized, describe, deterministic, evaluate_on_device,
    load_quantized, read_rows, stored_weights, versions,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def four_bit(quant_type, double_quant=False, **others):
    return {
        "load_in_4bit": True, "bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": double_quant, **others
    }


INT8 = {"load_in_8bit": True}
BFLOAT16 = {"bnb_4bit_compute_dtype": "bfloat16"}
# name: (dense golden, dtype of what is not quantized, arguments of BitsAndBytesConfig)
CHECKPOINTS = {
    "qwen3-tied-nf4-double": ("qwen3-tied", "float32", four_bit("nf4", True)),
    "qwen3-tied-nf4": ("qwen3-tied", "float32", four_bit("nf4")),
    "qwen3-tied-fp4-double": ("qwen3-tied", "float32", four_bit("fp4", True)),
    "qwen3-tied-fp4": ("qwen3-tied", "float32", four_bit("fp4")),
    "qwen3-tied-nf4-double-in-bfloat16": (
        "qwen3-tied", "float32", four_bit("nf4", True, bnb_4bit_quant_storage="bfloat16")
    ),
    "qwen3-tied-nf4-in-float32": ("qwen3-tied", "float32", four_bit("nf4", bnb_4bit_quant_storage="float32")),
    "qwen3-tied-bfloat16-nf4-double": ("qwen3-tied", "bfloat16", four_bit("nf4", True, **BFLOAT16)),
    "qwen3-tied-int8": ("qwen3-tied", "float32", INT8),
    "qwen2-nf4-double": ("qwen2", "float32", four_bit("nf4", True)),
    "qwen2-int8": ("qwen2", "float32", INT8),
    # A list of modules to skip replaces the default, which is the head.
    "llama3-nf4-double-skip": (
        "llama3", "float32", four_bit("nf4", True, llm_int8_skip_modules=["lm_head", "model.layers.1.mlp"])
    ),
    "llama3-int8": ("llama3", "float32", INT8),
    "llama-bias-fp4-double": ("llama-bias", "float32", four_bit("fp4", True)),
}


def main():
    out = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    deterministic()
    for name, (base, dtype, settings) in CHECKPOINTS.items():
        make_checkpoint(out / name, GOLDENS / base, dtype, settings)
    dense.write_json(out / "versions.json", versions())
    print(json.dumps(versions()))


def make_checkpoint(directory, base, dtype, settings):
    """Writes what `save_pretrained` writes, the rows, and the losses of the weights read back from it."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    shutil.copy(base / "rows.jsonl", directory)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=getattr(torch, dtype), quantization_config=BitsAndBytesConfig(**settings), device_map=DEVICE
    )
    model.save_pretrained(directory)

    rows = read_rows(directory)
    model = load_quantized(directory)
    stored, weights = stored_weights(directory), dequantized(model)
    expect = {"linears": {name: describe(weight) for name, weight in weights.items()}}
    expect["rows"] = dense.evaluate(decoded_model(directory, stored, weights), rows)
    with tempfile.TemporaryDirectory() as plain:
        decoded_model(directory, stored, weights).save_pretrained(plain)
        expect["spread"] = dense.evaluation_spread(plain, rows)
    if dtype != "float32":
        other = decoded_model(directory, stored, dequantized(model, torch.float32))
        expect["decoded_in_float32"] = {"rows": dense.evaluate(other, rows)}
    expect["bitsandbytes"] = {"rows": evaluate_on_device(model, rows)}
    expect["bitsandbytes"]["apart"] = apart(expect["rows"], expect["bitsandbytes"]["rows"])
    dense.write_json(directory / "expect.json", expect)
    print(f"{directory.name}: spread {expect['spread']:.1e}, apart {expect['bitsandbytes']['apart']:.1e},", end=" ")
    print(f"mean nll {dense.mean_nll(expect['rows']):.2f}, {(directory / 'model.safetensors').stat().st_size} bytes")


if __name__ == "__main__":
    main()
