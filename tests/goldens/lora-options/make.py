"""Makes the goldens in this directory with PEFT: adapters for every option of LoRA.

    python -B tests/goldens/lora-options/make.py [OUT]        OUT defaults to this file's directory

Needs the packages in versions.json and no GPU. README.md describes every file and key. The models are the dense goldens
beside this directory, which it only reads. It replaces each model's directory in OUT.
"""

import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # PEFT would look for the base models on the hub
GOLDENS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(GOLDENS))  # so that `make` below is the script of the dense goldens

import initial
import make as dense
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

SEED = 20262
SEVEN = dense.SEVEN
# base: name: arguments of LoraConfig beside the seven linears, r = 3 and lora_alpha = 6. PEFT writes the keys of
# patterns in alphabetical order and takes the first that matches, so they are in that order here.
ADAPTERS = {
    "qwen3-tied": {
        "plain": {},
        "rslora": {"lora_alpha": 4, "use_rslora": True},
        "dora": {"use_dora": True},
        "dora-rslora": {"r": 5, "lora_alpha": 4, "use_dora": True, "use_rslora": True, "target_modules": SEVEN[1:]},
        "gaussian": {"init_lora_weights": "gaussian", "target_modules": ["k_proj", "o_proj"], "r": 2},
        "exclude-names": {"r": 2, "exclude_modules": ["k_proj", "1.mlp.up_proj", "model.layers.2.self_attn.o_proj"]},
        "exclude-regex": {"r": 2, "exclude_modules": r"model\.layers\.[12]\.(mlp|self_attn\.q).*"},
        "regex": {
            "r": 2, "target_modules": r".*\.[02]\.(self_attn\.(q|v)_proj|mlp\.down_proj)", "lora_dropout": 0.25,
        },
        # A name in full is adapted in its layer, whatever layers_to_transform says.
        "layers": {
            "r": 2, "layers_to_transform": [0, 2],
            "target_modules": ["q_proj", "self_attn.v_proj", "gate_proj", "model.layers.1.mlp.down_proj"],
        },
        "layers-pattern": {"r": 2, "layers_to_transform": 1, "layers_pattern": ["blocks", "layers"]},
        # Ranks of 1 to 5 within q, k, v and within gate and up; two keys match q_proj of layer 0.
        "patterns": {
            "rank_pattern": {
                "layers.0.self_attn.q_proj": 1, r"layers\.[01]\.mlp\.(gate|down)_proj": 2,
                "model.layers.2.self_attn.k_proj": 4, "q_proj": 5,
            },
            "alpha_pattern": {".*1.self_attn.*": 9, "layers.2.mlp.up_proj": 1.5, "q_proj": 10},
        },
        "patterns-rslora": {
            "r": 2, "use_rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"up_proj": 3},
            "target_modules": ["q_proj", "k_proj", "up_proj", "gate_proj"],
        },
        # The head is the embedding; see README.md.
        "save-lm-head": {"r": 2, "modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
        "save-embed-tokens": {"r": 2, "modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
        "save-both": {"r": 2, "modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]},
        "save-embed-tokens-ensure-tying": {
            "r": 2, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "target_modules": ["q_proj"],
        },
        "save-lm-head-ensure-tying": {
            "r": 2, "modules_to_save": ["lm_head"], "ensure_weight_tying": True, "target_modules": ["q_proj"],
        },
    },
    "qwen2": {
        "bias-all": {"r": 2, "bias": "all", "target_modules": ["q_proj", "o_proj", "up_proj"]},
        "bias-lora-only": {"r": 2, "bias": "lora_only", "target_modules": ["q_proj", "o_proj", "up_proj"]},
    },
    "llama-bias": {
        "all-linear-word": {"r": 2, "target_modules": "all-linear"},
        "bias-all": {"r": 2, "bias": "all", "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "bias-lora-only": {"r": 2, "bias": "lora_only", "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "dora": {"use_dora": True},
        "dora-bias-all": {"r": 2, "use_dora": True, "bias": "all", "target_modules": ["q_proj", "o_proj", "up_proj"]},
        "everything": {
            "use_dora": True, "use_rslora": True, "bias": "all", "modules_to_save": ["lm_head"],
            "exclude_modules": ["0.mlp.gate_proj"], "rank_pattern": {"k_proj": 1, "up_proj": 4},
            "alpha_pattern": {"k_proj": 2}, "lora_dropout": 0.1,
        },
    },
    "llama3": {
        "save-lm-head": {"r": 2, "modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "save-embed-tokens": {
            "r": 2, "modules_to_save": ["embed_tokens"], "target_modules": ["q_proj", "v_proj", "down_proj"]
        },
        "save-both": {"r": 2, "modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["up_proj"]},
        # The end of the name counts, not whole segments: this is every norm.
        "save-norms": {"r": 2, "modules_to_save": ["norm"], "target_modules": ["up_proj"]},
        "target-lm-head": {"r": 2, "target_modules": ["q_proj", "lm_head"]},
        "target-embed-tokens": {"r": 2, "target_modules": ["q_proj", "embed_tokens"]},
    },
}
RUN = {**dense.LORA_RUN, "weight_decay": 0.3}
# base: adapter to start from: max_grad_norm, which clips some steps and leaves others alone.
TRAJECTORIES = {
    "qwen3-tied": {"rslora": 2.055, "dora": 1.807, "patterns": 2.059, "save-embed-tokens-ensure-tying": 1.395},
    "qwen2": {"bias-all": 1.805},
    "llama-bias": {"bias-all": 1.35, "bias-lora-only": 1.25, "dora-bias-all": 1.38},
    "llama3": {"save-lm-head": 2.355, "save-embed-tokens": 2.714, "save-both": 2.378, "save-norms": 1.48},
}
# Of these names expect.json has two rows where merging changes them.
WATCHED = [
    "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias",
    "model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.k_proj.bias",
    "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.bias", "model.norm.weight", "lm_head.weight",
]


def main():
    out = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    dense.deterministic()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers about itself
    warnings.filterwarnings("ignore", message="Could not find a config file")  # of the base model, on the hub
    warnings.filterwarnings("ignore", message=".* changes the base weights of the model")  # pissa and olora
    warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # printed once for each adapter
    for base, adapters in ADAPTERS.items():
        directory = out / base
        shutil.rmtree(directory, ignore_errors=True)
        expect = {"adapters": {}}
        for name, arguments in adapters.items():
            expect["adapters"][name] = make_adapter(directory, base, name, arguments)
        if base == "qwen3-tied":
            expect["combined"] = make_combined(directory)
            expect["initial"] = initial.make(directory, GOLDENS / base, SEED)
        dense.write_json(directory / "expect.json", expect)
        for name, max_grad_norm in TRAJECTORIES[base].items():
            make_trajectory(directory, base, name, {**RUN, "max_grad_norm": max_grad_norm})
    dense.write_json(out / "versions.json", {"seed": SEED, **dense.versions()})


# ---- adapters --------------------------------------------------------------------------------------------------------


def make_adapter(directory, base, name, arguments):
    """Saves an adapter whose every tensor is off its initial value, and returns what it gives when it is loaded."""
    seed = SEED + sum(map(ord, base + name))
    torch.manual_seed(seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = get_peft_model(dense.load(GOLDENS / base), config(**arguments))
    disturb(model, torch.Generator().manual_seed(seed))
    initial.save(model, directory / "adapters" / name, base)
    said = sorted({str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)})

    rows = initial.read_rows(GOLDENS / base)
    expect = {"rows": dense.evaluate(load(directory, base, name), rows)}
    expect["spread"] = max(
        initial.apart(expect["rows"], dense.evaluate(other, rows))
        for other in (load(directory, base, name, attention="sdpa"), load(directory, base, name).double())
    )
    expect["merged"] = merge(load(directory, base, name), base, rows, expect["rows"])
    parts = felt(lambda: load(directory, base, name, is_trainable=True), rows, expect["rows"])
    assert initial.apart(expect["rows"], dense.evaluate(model.eval(), rows)) == 0.0, "loading changes the model"
    print(f"{base}/{name}: spread {expect['spread']:.1e}, merged {expect['merged']['apart']:.1e}, felt {parts}")
    for text in said:
        print(f"  PEFT says: {text}")
    return expect


def config(**arguments):
    defaults = {"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": SEVEN}
    return LoraConfig(**{**defaults, **arguments})


@torch.no_grad()
def disturb(model, generator):
    """Adds noise to every trained tensor, so that a reader that leaves out a part of an adapter is caught."""
    for key, weight in sorted(model.named_parameters()):
        if not weight.requires_grad:
            continue
        noise = torch.randn(weight.shape, generator=generator)
        if "lora_magnitude_vector" in key:
            weight.mul_(1.0 + 0.1 * noise)
        elif "lora_embedding_B" in key:
            weight.copy_(0.3 * noise)
        else:
            weight.add_(0.1 * noise)


def load(directory, base, name, attention="eager", **others):
    return PeftModel.from_pretrained(
        dense.load(GOLDENS / base, attention=attention), directory / "adapters" / name, **others
    ).eval()


def felt(make_model, rows, want):
    """By kind of tensor, how far the losses move when all tensors of the kind grow by a tenth."""
    kinds = {
        "A": "lora_A", "B": "lora_B", "magnitude": "lora_magnitude_vector", "embedding A": "lora_embedding_A",
        "embedding B": "lora_embedding_B", "bias": ".bias", "saved": "modules_to_save",
    }
    moved = {}
    for kind, part in kinds.items():
        model = make_model()
        tensors = [weight for key, weight in model.named_parameters() if part in key and weight.requires_grad]
        with torch.no_grad():
            for weight in tensors:
                weight.mul_(1.1)
        if tensors:
            moved[kind] = round(initial.apart(want, dense.evaluate(model, rows)), 3)
            assert moved[kind] > 1e-2, f"{kind} hardly matters: {moved[kind]}"
    return moved


def merge(model, base, rows, unmerged):
    """What `merge_and_unload` gives."""
    before = dense.load(GOLDENS / base).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a head is no longer tied, which `tied` says
        model = model.merge_and_unload()
    losses = dense.evaluate(model, rows)
    after = model.state_dict()
    assert before.keys() == after.keys()
    changed = sorted(key for key in after if not torch.equal(before[key], after[key]))
    return {
        "apart": initial.apart(unmerged, losses),
        "tied": model.config.tie_word_embeddings,
        "changed": changed,
        "tensors": {key: initial.describe(after[key]) for key in WATCHED if key in changed},
        "rows": losses,
    }


# ---- several adapters ------------------------------------------------------------------------------------------------


def make_combined(directory):
    """Adapters by name on one model, and weighted sums of them."""
    base = "qwen3-tied"
    rows = initial.read_rows(GOLDENS / base)
    model = PeftModel.from_pretrained(dense.load(GOLDENS / base), directory / "adapters" / "plain", "plain")
    for name in ("rslora", "patterns", "exclude-names"):
        model.load_adapter(directory / "adapters" / name, name)
    model.eval()

    active = []
    for names in (["plain"], ["rslora"], ["patterns"], ["plain", "rslora", "exclude-names"], ["plain"]):
        model.base_model.set_adapter(names)
        active.append({"adapters": names, "rows": dense.evaluate(model, rows)})
    with model.disable_adapter():
        active.append({"adapters": [], "rows": dense.evaluate(model, rows)})

    weighted = []
    for kind, names, weights in (
        ("linear", ["plain", "rslora"], [0.7, 0.4]),
        ("linear", ["plain", "rslora"], [1.25, -0.5]),
        ("cat", ["plain", "rslora"], [0.7, 0.4]),
        ("cat", ["plain", "exclude-names", "patterns"], [0.5, -1.0, 0.25]),
        ("linear", ["plain"], [0.3]),
        # The sum of rsLoRA adapters keeps use_rslora of the first: its scale is √r, not 1.
        ("cat", ["rslora", "plain"], [0.4, 0.7]),
    ):
        name = f"weighted-{len(weighted)}"
        model.add_weighted_adapter(names, weights, name, combination_type=kind)
        model.set_adapter(name)
        entry = {"combination_type": kind, "adapters": names, "weights": weights}
        settings = model.peft_config[name]
        entry |= {"r": settings.r, "lora_alpha": settings.lora_alpha, "use_rslora": settings.use_rslora}
        first = model.base_model.model.model.layers[0].self_attn.q_proj
        entry["scale"] = first.scaling[name]
        entry["tensors"] = {
            "model.layers.0.self_attn.q_proj.lora_A.weight": initial.describe(first.lora_A[name].weight),
            "model.layers.0.self_attn.q_proj.lora_B.weight": initial.describe(first.lora_B[name].weight),
        }
        weighted.append({**entry, "rows": dense.evaluate(model, rows)})
    return {"active": active, "weighted": weighted}


# ---- training --------------------------------------------------------------------------------------------------------


def make_trajectory(directory, base, name, run):
    """The dense goldens' training loop, in a directory that looks like one of theirs."""
    with tempfile.TemporaryDirectory() as temporary:
        plain = Path(temporary) / base
        plain.mkdir()
        for file in (GOLDENS / base).iterdir():
            if file.is_file():
                (plain / file.name).symlink_to(file)
        (plain / "adapters").symlink_to((directory / "adapters").resolve())
        with patch.object(dense, "save_file", save_apart):
            dense.make_trajectory(plain, name, name, run)
        shutil.copytree(plain / "train" / name, directory / "train" / name)


def save_apart(tensors, path):
    """A tensor under two names is stored twice, as `save_pretrained` does."""
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path)


if __name__ == "__main__":
    main()
