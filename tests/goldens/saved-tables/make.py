"""Makes the goldens in this directory with PEFT: adapters that bring their base's embedding table and head along.

    python -B tests/goldens/saved-tables/make.py [OUT]        OUT defaults to this file's directory

Needs the packages in versions.json and no GPU. The models are the dense goldens beside this directory, which it only
reads. It replaces each model's directory in OUT.
"""

import json
import os
import shutil
import sys
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
GOLDENS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(GOLDENS))

import make as dense
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SEED = 20271
EMBED, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
# base: name: rows beyond the base's, tables that stay in the file (None: as PEFT wrote it), arguments of LoraConfig.
ADAPTERS = {
    "qwen3-tied": {
        "resized": (5, None, {}),
        "same-rows": (0, None, {}),
        "embed-alone": (0, [EMBED], {}),
        "head-alone": (5, [HEAD], {}),
        "beside-saved-embed": (5, None, {"modules_to_save": ["embed_tokens"]}),
    },
    "llama3": {
        "resized": (5, None, {}),
        "embed-alone": (0, [EMBED], {}),
        "head-alone": (0, [HEAD], {}),
        "beside-saved-embed": (5, None, {"modules_to_save": ["embed_tokens"]}),
    },
}


def main():
    out = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    dense.deterministic()
    warnings.filterwarnings("ignore")
    for base, adapters in ADAPTERS.items():
        shutil.rmtree(out / base, ignore_errors=True)
        expect = {name: make_adapter(out / base / name, base, *settings) for name, settings in adapters.items()}
        dense.write_json(out / base / "expect.json", expect)
    dense.write_json(out / "versions.json", {"seed": SEED, **dense.versions()})


@torch.no_grad()
def make_adapter(directory, base, more, keep, arguments):
    """Saves an adapter on a base with other tables, and returns what it gives on the base as it was."""
    generator = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    model = dense.load(GOLDENS / base)
    vocab_size = model.config.vocab_size
    if more:
        model.resize_token_embeddings(vocab_size + more, mean_resizing=False)
    for table in tables(model):
        table.add_(0.1 * torch.randn(table.shape, generator=generator))
    config = LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], **arguments)
    model = get_peft_model(model, config)
    for key, weight in sorted(model.named_parameters()):
        if weight.requires_grad:
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    # The default, "auto", saves tables of another number of rows.
    model.save_pretrained(directory, **({} if more else {"save_embedding_layers": True}))
    (directory / "README.md").unlink(missing_ok=True)
    config = json.loads((directory / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    if keep is not None:
        path = directory / "adapter_model.safetensors"
        kept = {key: value for key, value in load_file(path).items() if key in keep or ".lora_" in key}
        save_file(kept, path, metadata={"format": "pt"})

    rows = [json.loads(line) for line in (GOLDENS / base / "rows.jsonl").read_text().splitlines()][:3]
    if more:
        ids = [1, vocab_size, 7, vocab_size + more - 1, 9]
        rows.append({"input_ids": ids, "labels": ids})
    loaded = load(directory, base, vocab_size + more)
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        stored = {key: list(file.get_slice(key).get_shape()) for key in file.keys() if ".lora_" not in key}
    expect = {"rows": rows, "losses": dense.evaluate(loaded, rows), "tables": stored}
    expect["spread"] = max(
        apart(expect["losses"], dense.evaluate(other, rows))
        for other in (
            load(directory, base, vocab_size + more, attention="sdpa"),
            load(directory, base, vocab_size + more).double(),
        )
    )
    expect["merged"] = dense.evaluate(loaded.merge_and_unload(), rows)
    print(f"{base}/{directory.name}: {stored}, spread {expect['spread']:.1e}")
    if keep is None:
        assert apart(expect["losses"], dense.evaluate(model.eval(), rows)) == 0.0, "loading changes the model"
    return expect


def tables(model):
    found = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    return found[:1] if found[0].data_ptr() == found[1].data_ptr() else found


def load(directory, base, vocab_size, attention="eager"):
    model = dense.load(GOLDENS / base, attention=attention)
    if vocab_size != model.config.vocab_size:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    return PeftModel.from_pretrained(model, directory).eval()


def apart(want, got):
    pairs = ((a, b) for row, twin in zip(want, got) for a, b in zip(row["nll"], twin["nll"]))
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in pairs)


if __name__ == "__main__":
    main()
