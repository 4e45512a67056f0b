"""What mixtures of experts need beyond ../make.py: names as checkpoints have them, and adapters on the experts."""

import json
import re

from peft import LoraConfig

STACKED = re.compile(r"(.*)\.experts\.(gate_up_proj|down_proj)$")


def expert_adapters(config):
    """Adapters on the experts: PEFT puts one on each expert of a stacked parameter."""
    module = "block_sparse_moe" if config.model_type == "granitemoe" else "mlp"
    return {
        # Gate and up of an expert share one; the router is not among the targets.
        "experts": LoraConfig(
            r=3, lora_alpha=6, task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"],
            target_parameters=[f"{module}.experts.gate_up_proj", f"{module}.experts.down_proj"],
        ),
        "experts-rslora": LoraConfig(
            r=2, lora_alpha=3, task_type="CAUSAL_LM", target_modules=["v_proj"], use_rslora=True,
            target_parameters=["experts.down_proj"],
        ),
    }


def is_mixture(config):
    return hasattr(config, "num_experts_per_tok")


def is_mixture_json(config):
    return "num_experts_per_tok" in config


def disk_names(tensors, config):
    """Named parameters under the names of checkpoints: one tensor for each linear of each expert, or for all of a layer."""
    if config["model_type"] == "gpt_oss":
        return tensors
    if config["model_type"] == "granitemoe":
        return {granite_name(name): tensor for name, tensor in tensors.items()}
    mixtral = config["model_type"] == "mixtral"
    linears = {"gate_up_proj": ["w1", "w3"] if mixtral else ["gate_proj", "up_proj"]}
    linears["down_proj"] = ["w2"] if mixtral else ["down_proj"]
    stored = {}
    for name, tensor in tensors.items():
        if mixtral:
            name = name.replace(".mlp.", ".block_sparse_moe.")
        match = STACKED.match(name)
        if not match:
            stored[name] = tensor
            continue
        module, parameter = match.groups()
        for expert, weight in enumerate(tensor):
            for linear, part in zip(linears[parameter], weight.chunk(len(linears[parameter]))):
                stored[f"{module}.experts.{expert}.{linear}.weight"] = part.contiguous()
    return stored


def granite_name(name):
    """The name in a file of a parameter of Granite MoE."""
    for own, stored in (
        ("experts.gate_up_proj", "input_linear.weight"),
        ("experts.down_proj", "output_linear.weight"),
        ("router.weight", "router.layer.weight"),
    ):
        name = name.replace(f".block_sparse_moe.{own}", f".block_sparse_moe.{stored}")
    return name


def router_names(tensors, config):
    """Named parameters with Mixtral's router under the name that checkpoints have."""
    old, new = ".mlp.gate.", ".block_sparse_moe.gate."
    if config["model_type"] != "mixtral":
        return tensors
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


def by_output(tensors, config):
    """Experts as `[experts, out, in]`, where gpt-oss has `[experts, in, out]`."""
    if config.model_type != "gpt_oss":
        return tensors
    return {
        name: tensor.transpose(1, 2).contiguous() if STACKED.match(name) else tensor for name, tensor in tensors.items()
    }


def read_config(directory):
    return json.loads((directory / "config.json").read_text())


def main():
    """Loads mixtral/written-here into PEFT and records what the adapted model gives."""
    from make import base
    from peft import PeftModel, get_peft_model_state_dict

    directory = base.Path(__file__).resolve().parent / "mixtral"
    adapter = directory / "written-here"
    base.deterministic()
    rows = [json.loads(line) for line in (directory / "rows.jsonl").read_text().splitlines()]
    model = PeftModel.from_pretrained(base.load(directory), adapter)
    loaded = get_peft_model_state_dict(model)
    # One A and one B for attention's q_proj and for both projections of the experts, in each of two layers.
    assert len(loaded) == 2 * 3 * 2, sorted(loaded)
    assert all(tensor.abs().max() > 0 for tensor in loaded.values()), "PEFT left a factor at its start"
    losses = base.evaluate(model.eval(), rows)
    base.write_json(adapter / "peft.json", {"versions": base.versions(), "rows": losses})


if __name__ == "__main__":
    main()
