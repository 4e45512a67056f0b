"""Writes adamw_8bit.safetensors and its adamw_8bit.json from bitsandbytes' CUDA backend.

    python make.py OUT_DIR

Needs a CUDA device, torch, safetensors and bitsandbytes. Parameters and gradients come from the generator below, which
the reader has too, so that only results are stored: parameters and states after some steps, as "<step>/<tensor>/<field>".
"""

import json
import pathlib
import platform
import sys

import bitsandbytes as bnb
import torch
from safetensors.torch import save_file

# Whole blocks; blocks of which the last is short; below the 4,096 elements from which states have 8 bits.
SIZES = {"whole": 4096, "ragged": 5100, "small": 1000}
STEPS = 30
KEPT = [1, 2, 10, 30]
LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.1
SCALES = [1.0, 1e-3, 1e-6, 0.0, 30.0]


def noise(seed, n):
    """Numbers in [-1, 1) of a 64-bit linear congruential generator."""
    mask = (1 << 64) - 1
    state = (seed * 0x9E3779B97F4A7C15 & mask) ^ 0xD1B54A32D192ED03
    values = []
    for _ in range(n):
        state = (state * 6364136223846793005 + 1442695040888963407) & mask
        values.append((state >> 40) / (1 << 24) * 2 - 1)
    return torch.tensor(values, dtype=torch.float32)


def grad(index, name, step):
    """Sizes that change from element to element in "whole", and from block to block elsewhere."""
    n = SIZES[name]
    scale = torch.tensor([SCALES[(i if name == "whole" else i // 256) % 5] for i in range(n)], dtype=torch.float32)
    return noise(1000 * (index + 1) + step, n) * scale


def main(out):
    params = {}
    for index, (name, n) in enumerate(SIZES.items()):
        params[name] = torch.nn.Parameter((noise(index + 1, n) * 0.05).cuda())
    optimizer = bnb.optim.AdamW8bit(list(params.values()), lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    kept = {}
    for step in range(1, STEPS + 1):
        for index, (name, p) in enumerate(params.items()):
            p.grad = grad(index, name, step).cuda()
        optimizer.step()
        torch.cuda.synchronize()
        if step not in KEPT:
            continue
        for name, p in params.items():
            state = optimizer.state[p]
            kept[f"{step}/{name}/p"] = p.detach().clone()
            for field in ["state1", "state2", "absmax1", "absmax2"]:
                if field in state:
                    kept[f"{step}/{name}/{field}"] = state[field].clone()
    kept = {key: value.cpu().contiguous() for key, value in kept.items()}
    save_file(kept, out / "adamw_8bit.safetensors")
    about = {
        "bitsandbytes": bnb.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "sizes": SIZES,
        "steps": KEPT,
        "lr": LR,
        "betas": BETAS,
        "eps": EPS,
        "weight_decay": WEIGHT_DECAY,
    }
    (out / "adamw_8bit.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
