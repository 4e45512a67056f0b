"""Compares the logits of llama.cpp for exported files with those of transformers.

    python llama_logits.py [--trained] REKINDLE LLAMA_CPP_PYTHON LIBRARIES [CHECKPOINT ...]

REKINDLE is the built command, LLAMA_CPP_PYTHON the source distribution of the PyPI package llama-cpp-python 0.3.36, and
LIBRARIES the directory with libllama, built from its vendor/llama.cpp. Needs torch, transformers, peft and numpy.

Every checkpoint beside this directory and in it that `rekindle export gguf` takes is exported and run on one row of 60
tokens, or of as many as a window that llama.cpp ignores. A line of the table has

- f32: the largest difference of logits, and the share of positions with the same most probable token;
- greedy: the number of equal greedy tokens among 20;
- adapter: the largest difference for a GGUF adapter with factors in f32 beside the base: rsLoRA, and ranks and alphas that
  differ between linears;
- f16, q8_0: the largest difference and the share of equal most probable tokens; where tokens differ, the largest gap
  between the logits of both. llama.cpp rounds activations in products with these types. Therefore the losses of tokens
  that Rekindle computes from the file follow, against llama.cpp's from the same weights decoded to f32: the largest
  difference.

Of a checkpoint with experts in MXFP4, a copy with dense experts follows.

With --trained, each checkpoint is first trained by transformers to follow a permutation of its tokens, since the logits of
random weights are nearly flat. The table then has, over 4 rows of 60 tokens, the largest difference of logits in f32 and the
share of positions with the same most probable token in f32, f16 and q8_0.

llama.cpp runs in a process of its own, and without its kernels for AMX.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

root = pathlib.Path(__file__).resolve().parent.parent
is_trained = "--trained" in sys.argv
arguments = [argument for argument in sys.argv[1:] if argument != "--trained"]
rekindle, package, libraries = arguments[:3]
LENGTH, NEW, ROWS, STEPS = 60, 20, 4, 300


def llama_worker():
    """Answers lines of JSON (path, ids, adapter) with files of logits."""
    import ctypes

    os.environ["LLAMA_CPP_LIB_PATH"] = libraries
    sys.path.insert(0, package)
    import llama_cpp.llama_cpp as llama

    llama.llama_backend_init()

    @llama.llama_log_callback
    def quiet(level, text, data):
        if level == 4:
            sys.stderr.write(text.decode(errors="replace"))

    llama.llama_log_set(quiet, ctypes.c_void_p(0))

    def logits(path, ids, adapter):
        options = llama.llama_model_default_params()
        # On CPUs with AMX, its products (ggml_backend_amx_mul_mat) end in a segmentation fault for some small matrices.
        options.use_extra_bufts = False
        model = llama.llama_model_load_from_file(path.encode(), options)
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 256
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = 0
        params.type_k = params.type_v = 0  # keys and values in f32
        context = llama.llama_init_from_model(model, params)
        if adapter:
            handle = llama.llama_adapter_lora_init(model, adapter.encode())
            if not handle:
                raise RuntimeError("llama.cpp cannot load the adapter")
            llama.llama_set_adapters_lora(context, (type(handle) * 1)(handle), 1, (ctypes.c_float * 1)(1.0))
        batch = llama.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for at, token in enumerate(ids):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = int(token), at, 1, 1
            batch.seq_id[at][0] = 0
        assert llama.llama_decode(context, batch) == 0
        width = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        at = range(len(ids))
        rows = [np.ctypeslib.as_array(llama.llama_get_logits_ith(context, i), shape=(width,)).copy() for i in at]
        llama.llama_batch_free(batch)
        llama.llama_free(context)
        llama.llama_model_free(model)
        return np.stack(rows)

    for line in sys.stdin:
        job = json.loads(line)
        try:
            np.save(job["out"], logits(job["path"], job["ids"], job["adapter"]))
            print("ok", flush=True)
        except RuntimeError as error:
            print(error, flush=True)


if os.environ.get("LLAMA_WORKER"):
    llama_worker()
    sys.exit()

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

transformers.utils.logging.disable_progress_bar()
worker = subprocess.Popen(
    [sys.executable, sys.argv[0], *arguments[:3]],
    env={**os.environ, "LLAMA_WORKER": "1"},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
)


def logits(path, ids, adapter=None):
    out = str(pathlib.Path(path).with_suffix(".npy"))
    job = {"path": str(path), "ids": [int(token) for token in ids], "adapter": adapter and str(adapter), "out": out}
    worker.stdin.write(json.dumps(job) + "\n")
    worker.stdin.flush()
    answer = worker.stdout.readline().strip()
    if answer != "ok":
        raise RuntimeError(answer or "llama.cpp crashed")
    return np.load(out)


def export(checkpoint, out, *more):
    command = [rekindle, "export", "gguf", str(checkpoint), "--out", str(out), "--name", "tiny", *more]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError("refused: " + done.stderr.strip().splitlines()[-1])
    return done.stderr


def reference(model, ids):
    with torch.no_grad():
        return model(torch.tensor([[int(token) for token in ids]])).logits[0].float().numpy()


def load(directory):
    config = json.loads((directory / "config.json").read_text())
    options = {}
    if config.get("quantization_config", {}).get("quant_method") == "mxfp4":
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    model = getattr(transformers, config["architectures"][0]).from_pretrained(directory, dtype=torch.float32, **options)
    return model.float().eval(), config


def save_dense(model, directory):
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)


def greedy(predict, ids):
    ids = list(ids)
    for _ in range(NEW):
        ids.append(int(predict(ids)[-1].argmax()))
    return ids[-NEW:]


def make_adapter(model, directory):
    """A random adapter with rsLoRA, and a rank and an alpha of their own for some linears."""
    torch.manual_seed(20)
    names = {name.rsplit(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    targets = sorted(names - {"lm_head", "gate", "router", "shared_expert_gate"})
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=targets,
        rank_pattern={targets[0]: 8},
        alpha_pattern={targets[-1]: 3},
        init_lora_weights=False,
    )
    model = peft.get_peft_model(model, config)
    model.save_pretrained(directory)
    return model


def nll(logits, ids):
    """The loss of every token but the first."""
    losses = torch.nn.functional.cross_entropy(
        torch.tensor(logits[:-1]).double(), torch.tensor([int(token) for token in ids[1:]]), reduction="none"
    )
    return losses.numpy()


def our_nll(path, ids, scratch):
    rows = scratch / "rows.jsonl"
    rows.write_text(json.dumps({"input_ids": [int(token) for token in ids]}) + "\n")
    command = [rekindle, "eval", "--model", str(path), "--data", str(rows), "--json", "--per-token"]
    command += ["--max-seq-length", str(len(ids))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return np.array([token["nll"] for token in json.loads(done.stdout)["rows"][0]["token_nll"]])


def largest(a, b):
    return f"{np.abs(a - b).max():.1e}"


def agreement(a, b):
    same = a.argmax(-1) == b.argmax(-1)
    other = np.flatnonzero(~same)
    gap = max((float(b[at].max() - b[at, a[at].argmax()]) for at in other), default=None)
    return f"{100 * same.mean():.1f} %" + (f" (gap {gap:.1e})" if len(other) else "")


def train(model, permutation):
    """Trains a model to answer each token with the next one of the permutation."""
    torch.manual_seed(20)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(STEPS):
        tokens = [torch.randint(len(permutation), (8,))]
        for _ in range(31):
            tokens.append(permutation[tokens[-1]])
        ids = torch.stack(tokens, dim=1)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / STEPS)
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def compare_trained(name):
    model, config = load(root / name)
    config = config.get("text_config") or config
    torch.manual_seed(21)
    permutation = torch.randperm(config["vocab_size"])
    train(model, permutation)
    with tempfile.TemporaryDirectory() as out:
        out = pathlib.Path(out)
        save_dense(model, out / "trained")
        length = LENGTH
        if "ignores the attention window" in export(out / "trained", out, "--quant", "f32,f16,q8_0"):
            length = config["sliding_window"]
        rows = []
        for start in range(ROWS):
            row = [start * 7 % len(permutation)]
            while len(row) < length:
                row.append(int(permutation[row[-1]]))
            rows.append(row)
        expected = np.concatenate([reference(model, row) for row in rows])
        cells = []
        for kind in ["F32", "F16", "Q8_0"]:
            ours = np.concatenate([logits(out / f"tiny-{kind}.gguf", row) for row in rows])
            cells.append(f"{largest(ours, expected)} {agreement(ours, expected)}")
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def compare(name, directory=None):
    directory = directory or root / name
    model, config = load(directory)
    is_mxfp4 = "quantization_config" in config
    config = config.get("text_config") or config
    ids = np.random.default_rng(20).integers(0, config["vocab_size"], LENGTH)
    with tempfile.TemporaryDirectory() as out:
        out = pathlib.Path(out)
        if "ignores the attention window" in export(directory, out, "--quant", "f32,f16,q8_0"):
            ids = ids[: config["sliding_window"]]
        expected = reference(model, ids)
        f32 = out / "tiny-F32.gguf"
        ours = logits(f32, ids)
        cells = [f"{largest(ours, expected)} {agreement(ours, expected)}"]
        if len(ids) == LENGTH:
            pairs = zip(greedy(lambda ids: reference(model, ids), ids), greedy(lambda ids: logits(f32, ids), ids))
            cells.append(str(sum(a == b for a, b in pairs)))
        else:
            cells.append("")
        quantized = []
        for kind in ["F16", "Q8_0"]:
            path = out / f"tiny-{kind}.gguf"
            rounded = logits(path, ids)
            cell = f"{largest(rounded, expected)} {agreement(rounded, expected)}"
            try:
                export(path, out / kind, "--quant", "f32")
                decoded = nll(logits(out / kind / "tiny-F32.gguf", ids), ids)
                cell += f"; {largest(decoded, our_nll(path, ids, out))}"
            except RuntimeError as error:
                cell += f"; {str(error)[:60]}"
            quantized.append(cell)
        try:
            adapted = make_adapter(model, out / "adapter")
            export(out / "adapter", out, "--adapter-only", "--quant", "f32", "--base", str(directory))
            ours = logits(f32, ids, out / "tiny-adapter-F32.gguf")
            changed = reference(adapted, ids)
            cells.append(f"{largest(ours, changed)} {agreement(ours, changed)} (changes logits by {largest(changed, expected)})")
        except RuntimeError as error:
            cells.append(str(error)[:80])
        print(f"| {name} | " + " | ".join([*cells, *quantized]) + " |", flush=True)
        if is_mxfp4:
            save_dense(load(directory)[0], out / "dense")
            compare(f"{name}, dense", out / "dense")


columns = ["f32", "f16", "q8_0"] if is_trained else ["f32", "greedy", "adapter", "f16", "q8_0"]
print("| checkpoint | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
names = arguments[3:] or sorted(
    str(path.parent.relative_to(root))
    for pattern in ["families/*/config.json", "*/config.json", "gguf/*/config.json"]
    for path in root.glob(pattern)
    if (path.parent / "model.safetensors").exists()
)
for name in names:
    try:
        compare_trained(name) if is_trained else compare(name)
    except RuntimeError as error:
        print(f"| {name} | {error} |", flush=True)
