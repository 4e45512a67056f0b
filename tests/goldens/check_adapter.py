"""Loads an adapter that Rekindle wrote into PEFT and records what the adapted model gives.

    python tests/goldens/check_adapter.py ADAPTER_DIR MODEL_DIR ROWS.jsonl OUT.json

Fails on any missing, unexpected or misshaped key, and when the adapter changes nothing. Prints the loss of every row
and writes OUT.json, whose rows read like those of expect.json.
"""

import json
import sys
from pathlib import Path

from make import deterministic, evaluate, load, versions, write_json
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file


def main():
    if len(sys.argv) != 5:
        raise SystemExit(__doc__)
    adapter, base, rows_file, out = map(Path, sys.argv[1:])
    deterministic()
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    without = evaluate(load(base), rows)
    losses = evaluate(load_strictly(adapter, base), rows)
    assert losses != without, f"{adapter} changes no loss: is every lora_B zero?"

    for index, (before, after) in enumerate(zip(without, losses)):
        print(f"row {index}: {after['tokens']} tokens, nll {before['sum']:.6f} -> {after['sum']:.6f}")
    write_json(out, {"versions": versions(), "rows": losses})


def load_strictly(adapter, base):
    model = PeftModel(load(base), PeftConfig.from_pretrained(adapter))
    result = model.load_adapter(adapter, "default")
    assert not result.missing_keys, f"missing: {result.missing_keys}"
    assert not result.unexpected_keys, f"unexpected: {result.unexpected_keys}"

    # PEFT's report leaves out what it could rename or ignore: hold the file itself against what PEFT would save.
    stored = {key: tuple(weight.shape) for key, weight in load_file(adapter / "adapter_model.safetensors").items()}
    wanted = {key: tuple(weight.shape) for key, weight in get_peft_model_state_dict(model).items()}
    differing = set(stored.items()) ^ set(wanted.items())
    assert not differing, f"keys or shapes differ: {sorted(differing)}"
    return model.eval()


if __name__ == "__main__":
    main()
