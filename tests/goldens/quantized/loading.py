"""Quantized checkpoints through transformers and bitsandbytes, for the scripts beside this file."""

import hashlib
import json
import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with this
GOLDENS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(GOLDENS))  # so that `make` below is the script of the dense goldens

import bitsandbytes
import bitsandbytes.functional as F
import make as dense
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

DEVICE = "cuda"


def load_quantized(directory, attention="eager"):
    """The model on the device; fails on any key that is missing, unexpected or misshaped."""
    model, info = open_quantized(directory, attention)
    assert not any(info.values()), f"{directory}: {info}"
    return model


def open_quantized(directory, attention="eager"):
    """The model on the device and what transformers says of keys that it missed or did not expect."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation=attention, device_map=DEVICE, output_loading_info=True
    )
    return model.eval(), info


def quantized_linears(model):
    return {name: part for name, part in model.named_modules() if isinstance(part, (Linear4bit, Linear8bitLt))}


def dequantized(model, dtype=None):
    """The quantized weights as bitsandbytes decodes them: 4-bit in the dtype that was quantized, int8 in float32."""
    weights = {}
    for name, linear in quantized_linears(model).items():
        weight = linear.weight
        if isinstance(linear, Linear8bitLt):
            scb = weight.SCB if weight.SCB is not None else linear.state.SCB
            decoded = F.int8_vectorwise_dequant(weight.data, scb)
        else:
            kept = weight.quant_state.dtype
            weight.quant_state.dtype = dtype or kept
            decoded = F.dequantize_4bit(weight.data, weight.quant_state)
            weight.quant_state.dtype = kept
        assert decoded.shape == (linear.out_features, linear.in_features)
        weights[name] = decoded.detach().cpu().contiguous()
    return weights


def describe(weight):
    """Enough to see whether a decoded weight is right and, if not, where it starts to differ."""
    as_float = weight.float()
    return {
        "decoded": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
        "sha256": hashlib.sha256(as_float.numpy().tobytes()).hexdigest(),
        "starts": as_float.flatten()[:4].tolist(),
        "ends": as_float.flatten()[-4:].tolist(),
    }


def decoded_model(directory, stored, weights):
    """The same model without quantization, in float32 on the CPU: what is not quantized is taken as it is stored."""
    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in plain.named_parameters():
            linear = key.removesuffix(".weight")
            parameter.copy_(weights[linear] if linear in weights else stored[key])
    return plain


def stored_weights(directory):
    """Every tensor of the checkpoint as it lies in the files."""
    files = sorted(Path(directory).glob("*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def evaluate_on_device(model, rows):
    with torch.device(DEVICE):
        return dense.evaluate(model, rows)


def apart(want, got):
    """The largest |Δnll| / max(1, |nll|)."""
    return max(
        abs(a - b) / max(1.0, abs(a))
        for row, twin in zip(want, got)
        for a, b in zip(row["nll"], twin["nll"])
    )


def read_rows(directory):
    return [json.loads(line) for line in (directory / "rows.jsonl").read_text().splitlines()]


def deterministic():
    dense.deterministic()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says for each layer that int8 computes in float16


def versions():
    return {
        **dense.versions(),
        "bitsandbytes": bitsandbytes.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
