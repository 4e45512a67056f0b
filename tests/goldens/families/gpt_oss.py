"""What gpt-oss needs beyond make.py: a checkpoint whose experts are in MXFP4.

`mxfp4/` in the family's directory is the family's checkpoint with the experts quantized by the rule of the OCP
Microscaling specification, in the layout of the published checkpoints. transformers decodes it; `expect.json` and the
trajectory hold what it computes with the decoded experts.
"""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

BLOCK = 32
# The magnitudes of E2M1; a code's high bit is the sign.
MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
LARGEST_EXPONENT = 2
BIAS = 127
QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
}


def quantize(weight):
    """Codes and scales of `[..., in]` in blocks of 32: the scale's exponent is that of the largest magnitude less 2."""
    blocks = weight.unflatten(-1, (-1, BLOCK))
    exponent = torch.floor(torch.log2(blocks.abs().amax(-1, keepdim=True).clamp_min(2.0**-126))) - LARGEST_EXPONENT
    scaled = blocks / torch.exp2(exponent)
    # Ties go to the code with an even mantissa, whose number is even.
    distance = (scaled.abs().unsqueeze(-1) - MAGNITUDES).abs()
    odd = torch.arange(8) % 2
    codes = (distance + 1e-6 * odd).argmin(-1) + 8 * (scaled < 0)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return packed.to(torch.uint8), (exponent.squeeze(-1) + BIAS).to(torch.uint8)


def make_mxfp4(directory, rows, base, run):
    """Writes `mxfp4/`; `run(path)` returns the settings of a trajectory there."""
    target = directory / "mxfp4"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    tensors = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            # Files have [experts, in, out]; blocks run along the input.
            packed, scales = quantize(tensor.transpose(1, 2))
            tensors |= {f"{name}_blocks": packed.contiguous(), f"{name}_scales": scales.contiguous()}
        else:
            tensors[name] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    base.write_json(target / "config.json", {**config, "quantization_config": QUANTIZATION})
    shutil.copy(directory / "generation_config.json", target)
    shutil.copy(directory / "rows.jsonl", target)
    shutil.copytree(directory / "adapters" / "experts", target / "adapters" / "experts")

    model = base.load(target)
    decoded = {name: weight for name, weight in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))}
    save_file({name: weight.detach().contiguous() for name, weight in decoded.items()}, target / "decoded.safetensors")
    expect = {"rows": base.evaluate(model, rows), "spread": base.evaluation_spread(target, rows)}
    adapted = base.PeftModel.from_pretrained(base.load(target), target / "adapters" / "experts")
    expect["adapters"] = {"experts": {"rows": base.evaluate(adapted, rows)}}
    base.write_json(target / "expect.json", expect)
    base.make_trajectory(target, "experts", "experts", run(target))
