"""Loads an adapter that Rekindle wrote, with any option of LoRA, into PEFT and records what the adapted model gives.

    python -B tests/goldens/lora-options/check_options.py ADAPTER_DIR BASE_DIR ROWS.jsonl OUT.json

Fails on any key that is missing, unexpected or misshaped, on a field of adapter_config.json that PEFT does not know,
when the adapter changes nothing, and when merging it changes a loss by more than 1e-5. Prints the losses of every row
and writes OUT.json, whose rows read like those of expect.json.
"""

import json
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts of the dense goldens

import make as dense
from initial import apart
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

TOLERANCE = 1e-5


def main():
    if len(sys.argv) != 5:
        raise SystemExit(__doc__)
    adapter, base, rows_file, out = map(Path, sys.argv[1:])
    dense.deterministic()
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    without = dense.evaluate(dense.load(base), rows)
    model = load_strictly(adapter, base)
    losses = dense.evaluate(model, rows)
    for index, (before, after) in enumerate(zip(without, losses)):
        print(f"row {index}: {after['tokens']} tokens, nll {before['sum']:.6f} -> {after['sum']:.6f}")
        print("  " + " ".join(f"{nll:.6f}" for nll in after["nll"]))
    if losses == without:
        raise SystemExit(f"{adapter} changes no loss: is every lora_B zero?")

    merged = dense.evaluate(model.merge_and_unload(), rows)
    moved = apart(losses, merged)
    print(f"merged: off by {moved:.1e}")
    dense.write_json(out, {"versions": dense.versions(), "rows": losses, "merged": {"apart": moved, "rows": merged}})
    if moved > TOLERANCE:
        raise SystemExit(f"merging moves a loss by {moved:.1e}, over {TOLERANCE}")


def load_strictly(adapter, base):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        settings = PeftConfig.from_pretrained(adapter)
        model = PeftModel(dense.load(base), settings)
        result = model.load_adapter(adapter, "default")
    said = sorted({str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)})
    for text in said:
        print(f"PEFT says: {text}")
    failures = [text for text in said if text.startswith("Unexpected keyword arguments")]

    # PEFT's report leaves out biases, saved modules and what it could rename or ignore: hold the file itself against
    # what PEFT would save. A base weight that PEFT would add to an adapter of an embedding may be left out.
    stored = {key: tuple(weight.shape) for key, weight in load_file(adapter / "adapter_model.safetensors").items()}
    wanted = {key: tuple(weight.shape) for key, weight in get_peft_model_state_dict(model).items()}
    missing = {key for key in wanted.keys() - stored.keys() if not key.endswith(".base_layer.weight")}
    failures += [f"missing: {key}" for key in sorted(missing | set(result.missing_keys))]
    failures += [f"unexpected: {key}" for key in sorted((stored.keys() - wanted.keys()) | set(result.unexpected_keys))]
    failures += [
        f"misshaped: {key} is {stored[key]}, not {wanted[key]}"
        for key in sorted(stored.keys() & wanted.keys())
        if stored[key] != wanted[key]
    ]
    if failures:
        raise SystemExit("\n".join(failures))
    print(f"{len(stored)} tensors, none missing, unexpected or misshaped")
    return model.eval()


if __name__ == "__main__":
    main()
