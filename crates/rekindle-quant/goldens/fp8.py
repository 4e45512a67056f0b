"""Writes the fp8 goldens of rekindle-quant from PyTorch's casts to and from float8_e4m3fn.

    python fp8.py [OUT_DIR]

Needs torch, numpy and safetensors; no GPU. Every input is stored with PyTorch's output, so that the tests do not depend on a
random generator. The values come from numpy's PCG64 with the seeds below; running it again with the same versions writes the
same bytes.

Files: fp8.safetensors (tensors "<case>.<field>" and "input.<name>"), fp8.json (versions and the list of cases).
"""

import json
import pathlib
import platform
import sys

import numpy as np
import torch
from safetensors.torch import save_file

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
FP8 = torch.float8_e4m3fn
MAX = torch.finfo(FP8).max
BLOCK = 128


def normal(shape, seed, scale=0.02):
    """Returns weights of a magnitude typical of language models."""
    values = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape) * scale
    return torch.from_numpy(values.astype(np.float32))


def specials():
    """Rows of zeros, of numbers near the ends of the format, and of ties between two codes."""
    codes = torch.arange(0, 127, dtype=torch.uint8).view(FP8).float()
    ties = torch.cat([(codes[1:] + codes[:-1]) / 2, torch.tensor([MAX, -MAX])])
    rows = torch.zeros(6, 128)
    rows[1] = -0.0
    rows[2] = ties
    rows[3] = -ties
    rows[4] = torch.linspace(-1, 1, 128) * 1e-7
    rows[5, :3] = torch.tensor([448.0, 2.0**-10, 1.5 * 2.0**-9])
    return rows


def spread(x, shape, scaling):
    """Returns the scales `x` with one for each element of a weight of `shape`."""
    rows, cols = shape
    if scaling == "block":
        return x.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :cols]
    return x.expand(rows, cols)


def largest(w, scaling):
    if scaling == "tensor":
        return w.abs().max().reshape(1, 1)
    if scaling == "row":
        return w.abs().amax(1, keepdim=True)
    rows, cols = w.shape
    padded = torch.nn.functional.pad(w.abs(), (0, -cols % BLOCK, 0, -rows % BLOCK))
    return padded.reshape(-(-rows // BLOCK), BLOCK, -(-cols // BLOCK), BLOCK).amax((1, 3))


def main():
    out = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).parent
    inputs = {"small": normal((5, 31), 1), "edges": normal((130, 140), 2), "specials": specials()}
    inputs["wide"] = normal((3, 300), 3, scale=1.0) ** 3
    inputs["f32_only"] = normal((4, 257), 4) * torch.exp2(torch.arange(4.0)[:, None] * 12 - 30)
    tensors, cases = {}, []
    for name, values in inputs.items():
        for short, dtype in DTYPES.items():
            if name == "f32_only" and short == "f16" or name == "edges" and short != "bf16":
                continue
            w = values.to(dtype)
            tensors[f"input.{name}_{short}"] = w
            for scaling in ("tensor", "row", "block"):
                if name in ("small", "wide") and scaling == "block" and short != "f32":
                    continue
                amax = largest(w.float(), scaling)
                scales = torch.where(amax == 0, 1.0, (amax / MAX).clamp(min=torch.finfo(torch.float32).tiny))
                each = spread(scales, w.shape, scaling)
                codes = (w.float() / each).clamp(-MAX, MAX).to(FP8)
                case = f"{name}_{short}_{scaling}"
                tensors[f"{case}.scales"] = scales.contiguous()
                tensors[f"{case}.codes"] = codes.view(torch.uint8)
                tensors[f"{case}.decoded"] = (codes.float() * each).to(dtype)
                cases.append({"name": case, "input": f"{name}_{short}", "scaling": scaling})
    # All codes, with scale 1: the decoded values are PyTorch's casts.
    codes = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8)
    for short, dtype in DTYPES.items():
        exact = codes.view(FP8).to(dtype).reshape(1, -1)
        tensors[f"input.codes_{short}"] = exact
        tensors[f"codes_{short}_tensor.scales"] = torch.ones(1, 1)
        tensors[f"codes_{short}_tensor.codes"] = codes.reshape(1, -1)
        tensors[f"codes_{short}_tensor.decoded"] = exact
        cases.append({"name": f"codes_{short}_tensor", "input": f"codes_{short}", "scaling": "tensor"})
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, out / "fp8.safetensors")
    index = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(), "fp8": cases}
    (out / "fp8.json").write_text(json.dumps(index, indent=1) + "\n")
    print(len(cases), "cases")


if __name__ == "__main__":
    main()
