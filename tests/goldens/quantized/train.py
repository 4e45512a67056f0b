"""Trains adapters on the decoded weights of the quantized goldens and stores every step.

    python -B tests/goldens/quantized/train.py [OUT]        OUT defaults to this file's directory, after make.py

Needs no GPU: the weights are decoded here and held against the checksums of what bitsandbytes' CUDA backend decodes.
With a CUDA device it also records how far the same run on bitsandbytes' own layers lands.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from loading import (
    DEVICE, GOLDENS, decoded_model, dense, describe, deterministic, load_quantized, read_rows, stored_weights, versions
)
from safetensors.torch import load_file

# name: (checkpoint, dense golden with the adapter to start from, adapter, run)
TRAJECTORIES = {
    "lora": (
        "qwen3-tied-nf4-double", "qwen3-tied", "all-linear",
        {**dense.LORA_RUN, "max_grad_norm": 1.555, "weight_decay": 0.3},
    ),
}


def main():
    out = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    deterministic()
    for name, (checkpoint, base, adapter, run) in TRAJECTORIES.items():
        make_trajectory(out / checkpoint, GOLDENS / base / "adapters" / adapter, name, run)


def make_trajectory(directory, start, name, run):
    adapter = directory / "adapters" / start.name
    shutil.rmtree(adapter, ignore_errors=True)
    shutil.copytree(start, adapter)
    expect = json.loads((directory / "expect.json").read_text())
    stored = stored_weights(directory)
    with tempfile.TemporaryDirectory() as temporary:
        plain = Path(temporary) / directory.name
        decoded_model(directory, stored, decode(stored, expect["linears"])).save_pretrained(plain)
        shutil.copy(directory / "rows.jsonl", plain)
        shutil.copytree(start, plain / "adapters" / start.name)
        adapted = dense.PeftModel.from_pretrained(dense.load(plain), adapter)
        expect["adapters"] = {start.name: {"rows": dense.evaluate(adapted, read_rows(directory))}}
        dense.make_trajectory(plain, name, start.name, run)
        shutil.rmtree(directory / "train" / name, ignore_errors=True)
        shutil.copytree(plain / "train" / name, directory / "train" / name)
    dense.write_json(directory / "expect.json", expect)

    path = directory / "train" / name / "trajectory.json"
    story = {**json.loads(path.read_text()), "versions": versions()}
    if torch.cuda.is_available():
        story["bitsandbytes"] = on_quantized_layers(directory, start.name, run, story, path.parent)
        print(f"  bitsandbytes {story['bitsandbytes']}")
    dense.write_json(path, story)


def decode(stored, linears):
    """NF4 by its definition; the same bits as bitsandbytes on CUDA."""
    weights = {}
    for name, expected in linears.items():
        def part(key):
            return stored[f"{name}.weight.{key}"]

        state = json.loads(bytes(part("quant_state.bitsandbytes__nf4").tolist()))
        absmax = part("nested_quant_map")[part("absmax").int()]
        nested = part("nested_absmax").repeat_interleave(state["nested_blocksize"])[: len(absmax)]
        absmax = absmax * nested + state["nested_offset"]
        packed = stored[f"{name}.weight"].view(torch.uint8).flatten()
        codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().int()
        scales = absmax.repeat_interleave(state["blocksize"])[: len(codes)]
        weights[name] = (part("quant_map")[codes] * scales).reshape(state["shape"])
        assert describe(weights[name]) == expected, f"{name} is not what bitsandbytes decodes"
    return weights


def on_quantized_layers(directory, adapter, run, story, trained):
    """The same loop with the quantized layers and everything else on the device: the largest relative differences."""
    with patch.object(dense, "load", load_quantized), torch.device(DEVICE):
        steps, final = dense.train(directory, adapter, run)
    want = load_file(trained / "final.safetensors")
    assert want.keys() == final.keys()
    worst = {key: max(abs(a[key] / b[key] - 1) for a, b in zip(steps, story["steps"])) for key in ("loss", "grad_norm")}
    worst["final"] = max(((final[key].cpu() - want[key]).norm() / want[key].norm()).item() for key in want)
    return worst


if __name__ == "__main__":
    main()
