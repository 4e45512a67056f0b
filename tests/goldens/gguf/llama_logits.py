"""Compares the logits of llama.cpp for exported files with those of transformers.

    python llama_logits.py REKINDLE LLAMA_CPP_PYTHON LIBRARIES [CHECKPOINT ...]

REKINDLE is the built command, LLAMA_CPP_PYTHON the source distribution of the PyPI package llama-cpp-python 0.3.36, and
LIBRARIES the directory with libllama, built from its vendor/llama.cpp. Needs torch, transformers and numpy.

Every checkpoint beside this directory that `rekindle export gguf` takes is exported as f32, f16 and q8_0. For a row of its
rows.jsonl, the largest difference of logits and the share of positions with the same most probable token are printed. The
adapter GGUF of lora-options/qwen3-tied/adapters/plain is compared with the merged model.
"""

import ctypes
import glob
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import torch
import transformers

root = pathlib.Path(__file__).resolve().parent.parent
rekindle, package, libraries = sys.argv[1:4]
os.environ["LLAMA_CPP_LIB_PATH"] = libraries
sys.path.insert(0, package)
import llama_cpp.llama_cpp as llama  # noqa: E402

llama.llama_backend_init()


@llama.llama_log_callback
def quiet(level, text, data):
    if level >= 4:
        sys.stderr.write(text.decode(errors="replace"))


llama.llama_log_set(quiet, ctypes.c_void_p(0))


def logits(path, ids, adapter=None):
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path}")
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(256, len(ids))
    params.flash_attn_type = 0
    params.type_k = params.type_v = 0  # keys and values in f32
    context = llama.llama_init_from_model(model, params)
    if adapter is not None:
        handle = llama.llama_adapter_lora_init(model, str(adapter).encode())
        assert handle, "llama.cpp cannot load the adapter"
        llama.llama_set_adapters_lora(context, (ctypes.c_void_p * 1)(handle), 1, (ctypes.c_float * 1)(1.0))
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for at, token in enumerate(ids):
        batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = int(token), at, 1, 1
        batch.seq_id[at][0] = 0
    assert llama.llama_decode(context, batch) == 0
    width = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    rows = [np.ctypeslib.as_array(llama.llama_get_logits_ith(context, at), shape=(width,)).copy() for at in range(len(ids))]
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return np.stack(rows)


def export(checkpoint, out, *more):
    command = [rekindle, "export", "gguf", str(checkpoint), "--out", str(out), "--name", "tiny", *more]
    return subprocess.run(command, capture_output=True, text=True)


def longest_row(directory):
    rows = [json.loads(line)["input_ids"] for line in (directory / "rows.jsonl").read_text().splitlines()]
    return max(rows, key=len)[:60]


def reference(directory, ids):
    config = json.loads((directory / "config.json").read_text())
    model = getattr(transformers, config["architectures"][0]).from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def compare(name):
    directory = root / name
    ids = longest_row(directory)
    with tempfile.TemporaryDirectory() as out:
        done = export(directory, out, "--quant", "f32,f16,q8_0")
        if done.returncode:
            return print(f"| {name} | refused: {done.stderr.strip().splitlines()[-1][:90]} |")
        expected = reference(directory, ids)
        cells = []
        for kind in ["F32", "F16", "Q8_0"]:
            ours = logits(pathlib.Path(out) / f"tiny-{kind}.gguf", ids)
            same = (ours.argmax(-1) == expected.argmax(-1)).mean()
            cells.append(f"{np.abs(ours - expected).max():.1e} {100 * same:.1f} %")
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def compare_adapter():
    base = root / "qwen3-tied"
    adapter = root / "lora-options/qwen3-tied/adapters/plain"
    ids = longest_row(base)
    with tempfile.TemporaryDirectory() as out:
        for done in [
            export(base, out, "--quant", "f32"),
            export(adapter, f"{out}/merged", "--quant", "f32", "--base", str(base)),
            export(adapter, out, "--adapter-only", "--base", str(base)),
        ]:
            assert done.returncode == 0, done.stderr
        beside = logits(f"{out}/tiny-F32.gguf", ids, glob.glob(f"{out}/*adapter*.gguf")[0])
        merged = logits(f"{out}/merged/tiny-F32.gguf", ids)
    same = (beside.argmax(-1) == merged.argmax(-1)).mean()
    print(f"adapter beside its base and merged: {np.abs(beside - merged).max():.1e} {100 * same:.1f} %")


names = sys.argv[4:] or sorted(
    str(path.parent.relative_to(root))
    for pattern in ["families/*/config.json", "*/config.json"]
    for path in root.glob(pattern)
    if (path.parent / "rows.jsonl").exists()
)
for name in names:
    try:
        compare(name)
    except RuntimeError as error:
        print(f"| {name} | {error} |", flush=True)
compare_adapter()
