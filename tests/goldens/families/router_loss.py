"""Writes router/ of every mixture: transformers' auxiliary loss over all rows, and its gradients.

    python tests/goldens/families/router_loss.py [name ...]

Rows are computed one by one, and the logits of each router concatenated: no padding takes part. aux.json has the loss,
gradients.safetensors its gradients to routers, norms and the last linears of attention, for a coefficient of 1.
"""

import importlib
import json
import re
import sys

import torch
from safetensors.torch import save_file

import make
from make import HERE, base, moe

KEPT = re.compile(r"\.(gate|router)\.|o_proj|out_proj|layernorm")


def main():
    base.deterministic()
    for directory in sorted(path.parent for path in HERE.glob("*/config.json")):
        config = moe.read_config(directory)
        if moe.is_mixture_json(config) and "vision_config" not in config and (
            not sys.argv[1:] or directory.name in sys.argv[1:]
        ):
            make_loss(directory, config)


def make_loss(directory, config):
    model = base.load(directory)
    modeling = importlib.import_module(type(model).__module__)
    rows = [json.loads(line) for line in (directory / "rows.jsonl").read_text().splitlines()]
    outputs = [
        model(input_ids=torch.tensor([row["input_ids"]]), output_router_logits=True, use_cache=False) for row in rows
    ]
    logits = tuple(torch.cat(layer) for layer in zip(*(output.router_logits for output in outputs)))
    experts = logits[0].shape[-1]
    loss = modeling.load_balancing_loss_func(logits, experts, model.config.num_experts_per_tok)
    loss.backward()
    named = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    named = moe.router_names({name: grad.contiguous() for name, grad in named.items() if KEPT.search(name)}, config)
    target = directory / "router"
    target.mkdir(exist_ok=True)
    save_file(named, target / "gradients.safetensors")
    base.write_json(target / "aux.json", {**base.versions(), "layers": len(logits), "aux_loss": loss.item()})
    print(f"{directory.name}: {loss.item():.6f} over {len(logits)} layers, {len(named)} gradients")


if __name__ == "__main__":
    main()
