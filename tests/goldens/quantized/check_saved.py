"""Loads a quantized checkpoint that Rekindle wrote with transformers + bitsandbytes and prints what it gives.

    python -B tests/goldens/quantized/check_saved.py CHECKPOINT_DIR ROWS.jsonl [OUT.json] [--against EXPECT.json]

Needs a CUDA device. Stops if a key is missing, unexpected or misshaped, or nothing is quantized. Prints the losses
of every row, from bitsandbytes' own layers and from the weights that it decodes, and writes both to OUT.json, whose
rows read like those of expect.json. With --against a golden of the same weights it also prints how far they are from
it, and ends with 1 if the decoded losses are more than 1e-5 away.
"""

import argparse
import json
from pathlib import Path

from loading import (
    apart, decoded_model, dense, dequantized, describe, deterministic, evaluate_on_device, open_quantized,
    quantized_linears, stored_weights, versions,
)

TOLERANCE = 1e-5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--against", type=Path)
    arguments = parser.parse_args()
    deterministic()
    rows = [json.loads(line) for line in arguments.rows.read_text().splitlines()]

    model, info = open_quantized(arguments.checkpoint)
    failures = [f"{what}: {sorted(map(str, keys))}" for what, keys in info.items() if keys]
    linears = quantized_linears(model)
    kinds = sorted({type(linear).__name__ for linear in linears.values()})
    print(f"{arguments.checkpoint}: {len(linears)} quantized linears, {', '.join(kinds)}")
    if not linears:
        failures.append("nothing is quantized")
    if failures:
        raise SystemExit("\n".join(failures))
    print("no key missing, unexpected or misshaped")

    stored, weights = stored_weights(arguments.checkpoint), dequantized(model)
    found = {
        "versions": versions(),
        "linears": {name: describe(weight) for name, weight in weights.items()},
        "rows": dense.evaluate(decoded_model(arguments.checkpoint, stored, weights), rows),
        "bitsandbytes": {"rows": evaluate_on_device(model, rows)},
    }
    for index, (decoded, native) in enumerate(zip(found["rows"], found["bitsandbytes"]["rows"])):
        print(f"row {index}: {decoded['tokens']} tokens, nll {decoded['sum']:.6f}, bitsandbytes {native['sum']:.6f}")
        print("  " + " ".join(f"{nll:.6f}" for nll in decoded["nll"]))
    if arguments.against:
        failures = compare(found, json.loads(arguments.against.read_text()))
    if arguments.out:
        dense.write_json(arguments.out, found)
    raise SystemExit("\n".join(failures) or 0)


def compare(found, want):
    far = apart(want["rows"], found["rows"])
    native = apart(want["bitsandbytes"]["rows"], found["bitsandbytes"]["rows"])
    differing = [name for name in want["linears"] if found["linears"].get(name) != want["linears"][name]]
    print(f"from the golden: decoded losses {far:.1e}, bitsandbytes' losses {native:.1e},", end=" ")
    print(f"{len(differing)} of {len(want['linears'])} decoded linears differ")
    return [f"decoded losses are {far:.1e} from the golden's, over {TOLERANCE}"] if far > TOLERANCE else []


if __name__ == "__main__":
    main()
