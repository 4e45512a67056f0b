"""Adapters that start from the weights they adapt: pissa, olora and loftq. Run by make.py."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import make as dense
import torch
from peft import LoraConfig, PeftModel, get_peft_model

TARGETS = ["q_proj", "k_proj", "up_proj", "down_proj"]
R, ALPHA = 4, 6
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
BLOCK = 64


def make(directory, base, seed):
    """By method, what PEFT starts from and what comes of it; loftq by hand, since PEFT's needs a CUDA device."""
    rows = read_rows(base)
    found = {}
    for method in ("pissa", "pissa_niter_4", "olora"):
        found[method] = make_residual(directory, base, method, rows, seed)
    exact, fast = found["pissa"]["residual"], found["pissa_niter_4"]["residual"]
    for method, iterations in (("loftq", 1), ("loftq-5-iterations", 5)):
        found[method] = make_loftq(directory, base, method, iterations, rows)
    worst = max(abs(a - b) for key in exact for a, b in zip(exact[key]["first"], fast[key]["first"]))
    print(f"pissa_niter_4: first rows of the residuals are within {worst:.1e} of pissa's")
    return found


def make_residual(directory, base, method, rows, seed):
    """pissa and olora: the base loses what the adapter starts with."""
    torch.manual_seed(seed)
    settings = LoraConfig(
        r=R, lora_alpha=ALPHA, task_type="CAUSAL_LM", target_modules=TARGETS, init_lora_weights=method
    )
    model = get_peft_model(dense.load(base), settings).eval()
    start = dense.evaluate(model, rows)
    residual = {
        key.replace("base_model.model.", "").replace(".base_layer", ""): describe(weight)
        for key, weight in model.state_dict().items()
        if key.endswith(("0.self_attn.q_proj.base_layer.weight", "2.mlp.down_proj.base_layer.weight"))
    }
    adapters = directory / "adapters"
    # As PEFT's guide says: the start is stored as a plain adapter, or loading it would decompose the weights again.
    model.peft_config["default"].init_lora_weights = True
    save(model, adapters / f"{method}-start", base.name)
    model.peft_config["default"].init_lora_weights = method

    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for key, weight in sorted(model.named_parameters()):
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    trained = dense.evaluate(model, rows)
    save(model, adapters / method, base.name)
    convert(model, adapters / f"{method}-start", adapters / f"{method}-converted", base.name)

    torch.manual_seed(seed)  # pissa_niter_4 draws
    loaded = dense.evaluate(PeftModel.from_pretrained(dense.load(base), adapters / method).eval(), rows)
    plain = PeftModel.from_pretrained(dense.load(base), adapters / f"{method}-converted").eval()
    converted = dense.evaluate(plain, rows)
    from_base = apart(dense.evaluate(dense.load(base), rows), start)
    print(f"{method}: start {from_base:.1e} from the base, loaded {apart(trained, loaded):.1e}, "
          f"converted {apart(trained, converted):.1e} from the trained one")
    assert max(from_base, apart(trained, loaded), apart(trained, converted)) < 1e-5
    return {
        "start": {"adapter": f"adapters/{method}-start", "apart_from_base": from_base, "rows": start},
        "residual": residual,
        "trained": {"adapter": f"adapters/{method}", "rows": trained},
        "converted": {"adapter": f"adapters/{method}-converted", "rows": converted},
    }


def convert(model, start, path, base_name):
    """`path_initial_model_for_weight_conversion` writes a configuration into the directory that it is given."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "start"
        shutil.copytree(start, copy)
        save(model, path, base_name, path_initial_model_for_weight_conversion=copy)


def make_loftq(directory, base, method, iterations, rows):
    """Alternates between the codes of W − B·A and the best B·A of rank r for what they miss (arXiv:2310.08659)."""
    settings = LoraConfig(r=R, lora_alpha=R, task_type="CAUSAL_LM", target_modules=dense.SEVEN)
    codes = json.loads((base.parent / "quantized" / f"{base.name}-nf4" / "expect.json").read_text())["linears"]
    model = get_peft_model(dense.load(base), settings).eval()
    before, decoded, errors = dense.load(base), {}, [0.0, 0.0]
    with torch.no_grad():
        for name, linear in model.base_model.model.named_modules():
            if not hasattr(linear, "lora_A"):
                continue
            weight = linear.base_layer.weight.clone()
            plain = round_to_nf4(weight)
            checksum = hashlib.sha256(plain.numpy().tobytes()).hexdigest()
            assert checksum == codes[name]["sha256"], f"{name} is not what bitsandbytes decodes"
            missing = weight
            for _ in range(iterations):
                quantized = round_to_nf4(missing)
                left, singular, right = torch.linalg.svd(weight - quantized, full_matrices=False)
                root = singular[:R].sqrt()
                b, a = left[:, :R] * root, root[:, None] * right[:R]
                missing = weight - b @ a
            linear.base_layer.weight.copy_(quantized)
            linear.lora_A.default.weight.copy_(a)
            linear.lora_B.default.weight.copy_(b)
            decoded[name] = describe(quantized)
            before.get_submodule(name).weight.copy_(plain)
            errors[0] += (weight - plain).square().sum().item()
            errors[1] += (weight - quantized - b @ a).square().sum().item()
    save(model, directory / "adapters" / method, base.name)
    dense_rows, plain_rows = dense.evaluate(dense.load(base), rows), dense.evaluate(before, rows)
    losses = dense.evaluate(model, rows)
    found = {
        "adapter": f"adapters/{method}", "iterations": iterations,
        "weight_error": {"plain": errors[0] ** 0.5, "loftq": errors[1] ** 0.5},
        "mean_distance_from_base": {
            "plain": mean_distance(dense_rows, plain_rows), "loftq": mean_distance(dense_rows, losses),
        },
        "decoded": {key: decoded[key] for key in ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj")},
        "rows": losses,
    }
    print(f"{method}: {found['weight_error']} {found['mean_distance_from_base']}")
    return found


def round_to_nf4(weight):
    """Each block of 64 numbers, in the order of memory, to the nearest code times the largest of their magnitudes."""
    flat = weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    middles = (NF4[1:] + NF4[:-1]) / 2
    return (NF4[torch.bucketize(blocks / largest, middles)] * largest).flatten()[: len(flat)].reshape(weight.shape)


# ---- what make.py needs too ------------------------------------------------------------------------------------------


def save(model, path, base_name, **others):
    """`save_pretrained`, without what differs from machine to machine."""
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(path, **others)
    (path / "README.md").unlink()  # an empty model card
    settings = json.loads((path / "adapter_config.json").read_text())
    # PEFT keeps sets here, whose order differs from run to run.
    for key in ("target_modules", "exclude_modules"):
        if isinstance(settings[key], list):
            settings[key] = sorted(settings[key])
    dense.write_json(path / "adapter_config.json", settings)


def read_rows(base):
    return [json.loads(line) for line in (base / "rows.jsonl").read_text().splitlines()]


def describe(weight):
    """No checksum: another order of summation gives other last bits."""
    weight = weight.detach()
    rows = weight if weight.dim() == 2 else weight[None]
    return {
        "shape": list(weight.shape), "norm": weight.double().norm().item(),
        "first": rows[0].tolist(), "last": rows[-1].tolist(),
    }


def apart(want, got):
    """The largest |Δnll| / max(1, |nll|)."""
    return max(
        abs(a - b) / max(1.0, abs(a))
        for row, twin in zip(want, got)
        for a, b in zip(row["nll"], twin["nll"])
    )


def mean_distance(want, got):
    """The mean |Δnll|."""
    moved = [abs(a - b) for row, twin in zip(want, got) for a, b in zip(row["nll"], twin["nll"])]
    return sum(moved) / len(moved)
