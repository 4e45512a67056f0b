"""Two linears over one input with adapters, multiplied in fp8 with PyTorch's casts; written as linear.json.

The recipe is row-wise: x is rounded with one scale a row, the weight has one a row, and the gradient to x rounds the rows
of dy * scale of the weight's row, both linears' columns together. Products are exact (f64); the adapter's are not rounded.
"""
import json
import pathlib

import torch

TOKENS, INPUT, OUTPUTS, R, SCALES = 7, 48, [32, 16], 4, [0.5, 2.0]
torch.manual_seed(20260)


def rounded(rows):
    largest = rows.abs().amax(1, keepdim=True).clamp_min(2.0**-100)
    codes = (rows * (448 / largest)).to(torch.float8_e4m3fn)
    return codes, (largest / 448)


def numbers(x):
    return [float(f"{v:.9g}") for v in x.float().flatten().tolist()]


x = torch.randn(TOKENS, INPUT) * torch.exp(2 * torch.randn(TOKENS, 1))
x[2] = 0
codes, scales = rounded(x)
xq = codes.double() * scales.double()
linears, dys, scaled, raw = [], [], [], []
dx = torch.zeros(TOKENS, INPUT, dtype=torch.float64)
for out, s in zip(OUTPUTS, SCALES):
    w, w_scales = rounded(torch.randn(out, INPUT) * 0.1 * torch.exp(torch.randn(out, 1)))
    a, b, dy = torch.randn(R, INPUT) * 0.2, torch.randn(out, R) * 0.2, torch.randn(TOKENS, out)
    bias = torch.randn(out)
    ad, bd, dyd, xd = a.double(), b.double(), dy.double(), x.double()
    y = xq @ (w.double() * w_scales.double()).T + bias.double() + s * (xd @ ad.T) @ bd.T
    dx += s * (dyd @ bd) @ ad
    linears.append({
        "scale": s, "codes": w.view(torch.uint8).flatten().tolist(), "scales": numbers(w_scales), "bias": numbers(bias),
        "a": numbers(a), "b": numbers(b), "dy": numbers(dy), "y": numbers(y),
        "da": numbers(s * (dyd @ bd).T @ xd), "db": numbers(s * dyd.T @ (xd @ ad.T)),
    })
    dys.append(dy)
    scaled.append(dy * w_scales.T)
    raw.append(w.double())
codes, scales = rounded(torch.cat(scaled, 1))
dx_base = (codes.double() * scales.double()) @ torch.cat(raw)
forward_only = sum(dy.double() @ (w * torch.tensor(l["scales"], dtype=torch.float64)[:, None]) for dy, w, l in zip(dys, raw, linears))
golden = {
    "torch": torch.__version__, "tokens": TOKENS, "input": INPUT, "outputs": OUTPUTS, "r": R, "x": numbers(x), "linears": linears,
    "dx": numbers(dx + dx_base), "dx_forward_only": numbers(dx + forward_only),
}
pathlib.Path(__file__).with_name("linear.json").write_text(json.dumps(golden) + "\n")
