"""Makes the goldens in this directory with transformers and PEFT.

    python tests/goldens/make.py [OUT]        OUT defaults to this file's directory

Needs torch, transformers and peft; versions.json has the versions used. README.md describes every file and key.
"""

import json
import math
import platform
import re
import shutil
import sys
from pathlib import Path

import peft
import safetensors
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, Trainer, get_scheduler

SEED = 20260
IGNORED = -100
# Seven rows, six an optimizer step: every step sees another set.
ROW_LENGTHS = [19, 2, 75, 33, 7, 48, 26]
NEW_TOKENS = 24
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rope(theta):
    return {"rope_type": "default", "rope_theta": theta}


# theta = 500 with a head of 8 puts one frequency in the band that llama3 keeps, one in the blended band, two in the
# divided one; rows longer than original_max_position_embeddings feel it.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
CONFIGS = {
    "qwen3-tied": Qwen3Config(
        vocab_size=131, hidden_size=40, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, max_position_embeddings=256, rms_norm_eps=1e-6, tie_word_embeddings=True,
        rope_parameters=rope(1e6), **NO_SPECIAL_TOKENS,
    ),
    "qwen3-untied-sharded": Qwen3Config(
        vocab_size=97, hidden_size=36, intermediate_size=44, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=256, rms_norm_eps=1e-6, tie_word_embeddings=False,
        rope_parameters=rope(1e6), **NO_SPECIAL_TOKENS,
    ),
    # theta stays at 1e4: a key bias has almost no gradient where the rotation is slow, and AdamW would blow up its
    # rounding error.
    "qwen2": Qwen2Config(
        vocab_size=109, hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-6, tie_word_embeddings=True,
        rope_parameters=rope(1e4), **NO_SPECIAL_TOKENS,
    ),
    "llama3": LlamaConfig(
        vocab_size=113, hidden_size=45, intermediate_size=60, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, head_dim=8, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters=LLAMA3_ROPE, **NO_SPECIAL_TOKENS,
    ),
    "llama2": LlamaConfig(
        vocab_size=101, hidden_size=40, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters=rope(1e4), **NO_SPECIAL_TOKENS,
    ),
    "llama-bias": LlamaConfig(
        vocab_size=89, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=False,
        attention_bias=True, mlp_bias=True, rope_parameters=rope(1e4), **NO_SPECIAL_TOKENS,
    ),
}
ADAPTERS = {
    "all-linear": LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=SEVEN),
    "qv-rslora": LoraConfig(
        r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], use_rslora=True
    ),
}
LORA_RUN = {
    "max_steps": 12, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3,
    "learning_rate": 2e-3, "weight_decay": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,
    "lr_scheduler_type": "linear", "warmup_steps": 3,
}
# name: (model, adapter directory to start from, run); without an adapter all weights are trained.
# max_grad_norm clips some steps and leaves others alone; weight decay is large enough in two of them to be missed.
TRAJECTORIES = {
    "lora": ("qwen3-tied", "all-linear", {**LORA_RUN, "max_grad_norm": 1.46, "weight_decay": 0.3}),
    "lora-fresh": ("llama3", "fresh", {**LORA_RUN, "max_grad_norm": 1.7}),
    "full": ("qwen2", None, {
        **LORA_RUN, "max_steps": 6, "gradient_accumulation_steps": 2, "max_grad_norm": 4.6, "weight_decay": 0.5,
        "lr_scheduler_type": "cosine", "warmup_steps": 2,
    }),
}


def main():
    out = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    deterministic()
    for index, name in enumerate(CONFIGS):
        make_model(out / name, name, SEED + 1000 * index)
    for name, (model, adapter, run) in TRAJECTORIES.items():
        make_trajectory(out / model, name, adapter, run)
    write_json(out / "schedules.json", schedules())
    write_json(out / "versions.json", {"seed": SEED, **versions()})
    print(json.dumps(versions()))


# ---- one model -------------------------------------------------------------------------------------------------------


def make_model(directory, name, seed):
    """Writes a checkpoint, its rows and everything that is expected of it without training."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    save_checkpoint(directory, name, generator)
    rows = make_rows(CONFIGS[name].vocab_size, generator)
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    model = load(directory)
    expect = {"rows": evaluate(model, rows), "spread": evaluation_spread(directory, rows)}
    expect["generate"] = make_generations(directory, model, generator, stop_early=name == "qwen2")
    if name == "qwen3-tied":
        expect["bf16"] = {"rows": evaluate(load(directory, dtype=torch.bfloat16), rows)}
    if name in ("qwen3-tied", "qwen2", "llama3"):
        expect["adapters"] = {
            adapter: {"rows": make_adapter(directory, name, adapter, config, rows, generator)}
            for adapter, config in ADAPTERS.items()
        }
    if name == "llama3":  # PEFT's own initialization: B = 0
        expect["adapters"]["fresh"] = {
            "rows": make_adapter(directory, name, "fresh", ADAPTERS["all-linear"], rows, generator, zero_b=True)
        }
    write_json(directory / "expect.json", expect)
    print(f"{name}: spread {expect['spread']:.1e}, mean nll {mean_nll(expect['rows']):.2f}")


def save_checkpoint(directory, name, generator):
    """Random weights that leave the logits far from uniform, in the Hugging Face layout."""
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    # Gemma's and Qwen3.5's norms multiply with 1 + w, but for that of a gated delta layer's result.
    one = 0.0 if name.startswith(("gemma2", "gemma3", "qwen3_5")) else 1.0
    with torch.no_grad():
        for key, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if one == 0.0 and key.endswith(("model.norm.weight", "language_model.norm.weight")):
                # Signs of both kinds: a tied head would otherwise repeat what the scaled embedding puts in.
                weight.copy_(noise - 1.0)
            elif name == "gemma4" and key == "model.norm.weight":
                weight.copy_(noise)
            elif "norm" in key:
                weight.copy_((1.0 if "linear_attn" in key else one) + 0.1 * noise)
            elif key.endswith("bias"):
                weight.copy_(0.2 * noise)
            else:
                weight.copy_((0.3 if "embed" in key or "lm_head" in key else 0.2) * noise)
        for key, buffer in sorted(model.named_buffers()):
            if key.endswith("layer_scalar"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    if name == "llama2":
        model.to(torch.bfloat16)
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    shards = 3 if "sharded" in name else 1
    model.save_pretrained(directory, max_shard_size=size // shards * 13 // 10)
    assert len(list(directory.glob("*.safetensors"))) == shards

    if name == "llama2":
        config = transformers4_spelling(directory)
        for absent in ("head_dim", "mlp_bias"):  # Llama 2 is older than these keys
            del config[absent]
        write_json(directory / "config.json", config)
    if name == "llama3":
        check_llama3_bands()
        # The same model in the older spelling, for readers of both.
        write_json(directory / "config.transformers4.json", transformers4_spelling(directory))
        older = LlamaConfig.from_json_file(directory / "config.transformers4.json")
        assert older.rope_parameters == LLAMA3_ROPE


def transformers4_spelling(directory):
    """config.json with `rope_theta`, `rope_scaling` and `torch_dtype` at the top, as transformers 4 wrote it."""
    config = json.loads((directory / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.55.0"
    return dict(sorted(config.items()))


def check_llama3_bands():
    config = CONFIGS["llama3"]
    p = LLAMA3_ROPE
    waves = [2 * math.pi * p["rope_theta"] ** (2 * i / config.head_dim) for i in range(config.head_dim // 2)]
    low = p["original_max_position_embeddings"] / p["low_freq_factor"]
    high = p["original_max_position_embeddings"] / p["high_freq_factor"]
    bands = [sum(wave < high for wave in waves), sum(wave > low for wave in waves)]
    assert bands == [1, 2] and len(waves) == 4


def make_rows(vocab_size, generator):
    """Row 0 counts all it can, the others hide a prompt; row 2 has holes, one label of row 3 is not its input."""
    def draw(high, size):
        return torch.randint(high, (size,), generator=generator).tolist()

    rows = []
    for index, length in enumerate(ROW_LENGTHS):
        ids = draw(vocab_size, length)
        hidden = 0 if index == 0 else 1 + draw(max(1, length // 2), 1)[0]
        labels = [IGNORED] * hidden + ids[hidden:]
        if index == 2:
            labels = [IGNORED if hole == 0 else label for label, hole in zip(labels, draw(4, length))]
        if index == 3:
            labels[-2] = (labels[-2] + 1) % vocab_size
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def other_attention(directory):
    """Another implementation of attention: scaled_dot_product_attention, which has neither a soft cap nor sinks."""
    config = json.loads((directory / "config.json").read_text())
    is_plain = config.get("attn_logit_softcapping") is None and config["model_type"] != "gpt_oss"
    return "sdpa" if is_plain else "eager"


def load(directory, dtype=torch.float32, attention="eager"):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=attention).eval()


# ---- losses ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, rows):
    """Per row the nll of every counted label, in order, from the model's logits by a float64 log-softmax."""
    return [row_losses(model, row) for row in rows]


def row_losses(model, row):
    logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    # The label at i is predicted from the tokens before i, so the first has no prediction.
    nll = [-log_probs[i - 1, label].item() for i, label in enumerate(row["labels"]) if i > 0 and label != IGNORED]
    return {"nll": nll, "sum": math.fsum(nll), "tokens": len(nll)}


def evaluation_spread(directory, rows):
    """How far two other orders of the same arithmetic land: largest |Δnll| / max(1, |nll|)."""
    want = evaluate(load(directory), rows)
    sdpa = load(directory, attention=other_attention(directory))
    others = [evaluate(sdpa, rows), evaluate(load(directory).double(), rows)]
    return max(
        abs(a - b) / max(1.0, abs(a))
        for other in others
        for row, twin in zip(want, other)
        for a, b in zip(row["nll"], twin["nll"])
    )


def mean_nll(rows):
    return sum(row["sum"] for row in rows) / sum(row["tokens"] for row in rows)


# ---- generation ------------------------------------------------------------------------------------------------------


def make_generations(directory, model, generator, stop_early):
    """Greedy continuations of two random prompts, redrawn until they are varied and no step is close to a tie."""
    prompts = []
    for length in (5, 17):
        for _ in range(500):
            prompt = torch.randint(model.config.get_text_config().vocab_size, (length,), generator=generator).tolist()
            ids, margin = greedy(model, prompt)
            if margin > 1e-2 and len(set(ids)) >= 8:
                break
        else:
            raise SystemExit(f"{directory.name}: no prompt of {length} tokens continues clearly")
        prompts.append((prompt, ids, margin))
    if stop_early:
        set_end_tokens(directory, model, prompts)
    generations = []
    for prompt, ids, margin in prompts:
        # transformers' own generate, with its cache and its stopping rule; an end token is part of the ids.
        tokens = torch.tensor([prompt])
        # Without the mask it would take every 0 in the prompt for padding.
        settings = {"attention_mask": torch.ones_like(tokens), "pad_token_id": 0, "do_sample": False}
        got = model.generate(tokens, max_new_tokens=NEW_TOKENS, **settings)[0, len(prompt) :].tolist()
        assert got == ids[: len(got)] and (len(got) == NEW_TOKENS or stop_early)
        generations.append({"prompt": prompt, "ids": got, "min_margin": margin})
    if stop_early:
        assert len(generations[0]["ids"]) < NEW_TOKENS
    return generations


def set_end_tokens(directory, model, prompts):
    """generation_config.json lists a token that the first prompt reaches; config.json names only one it does not."""
    first = prompts[0][1]
    end = next(token for at, token in enumerate(first) if at >= 8 and first.index(token) == at)
    unused = next(t for t in range(model.config.vocab_size) if all(t not in ids for _, ids, _ in prompts))
    for name, value in (("config.json", unused), ("generation_config.json", [end, unused])):
        settings = json.loads((directory / name).read_text())
        write_json(directory / name, {**settings, "eos_token_id": value})
    model.generation_config.eos_token_id = [end, unused]


@torch.no_grad()
def greedy(model, prompt):
    ids, margin = list(prompt), math.inf
    for _ in range(NEW_TOKENS):
        top = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].topk(2)
        margin = min(margin, (top.values[0] - top.values[1]).item())
        ids.append(top.indices[0].item())
    return ids[len(prompt):], margin


# ---- adapters --------------------------------------------------------------------------------------------------------


def make_adapter(directory, base_name, name, config, rows, generator, zero_b=False):
    """Saves an adapter with PEFT, loads it again and returns what the adapted model gives for the rows."""
    path = directory / "adapters" / name
    torch.manual_seed(generator.initial_seed())
    model = get_peft_model(load(directory), config)
    with torch.no_grad():
        for key, weight in sorted(model.named_parameters()):
            if "lora_B" in key and not zero_b:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(path, save_embedding_layers=False)
    (path / "README.md").unlink()  # an empty model card
    settings = json.loads((path / "adapter_config.json").read_text())
    # PEFT keeps a set here, whose order differs from run to run.
    write_json(path / "adapter_config.json", {**settings, "target_modules": sorted(settings["target_modules"])})

    with_adapter = evaluate(PeftModel.from_pretrained(load(directory), path), rows)
    base = evaluate(load(directory), rows)
    moved = max(abs(a - b) for old, new in zip(base, with_adapter) for a, b in zip(old["nll"], new["nll"]))
    assert moved == 0.0 if zero_b else moved > 0.1
    return with_adapter


# ---- training --------------------------------------------------------------------------------------------------------


def make_trajectory(directory, name, adapter, run):
    """Trains in float32 and stores every step and the trained tensors; measures how much of it is rounding."""
    steps, final = train(directory, adapter, run)
    others = [
        train(directory, adapter, run, attention=other_attention(directory), padded=False),
        train(directory, adapter, run, double=True),
    ]
    clipped = [step["grad_norm"] > run["max_grad_norm"] for step in steps]
    print(f"{directory.name}/{name}:", *(f"{s['loss']:.3f}/{s['grad_norm']:.2f}" for s in steps))
    assert any(clipped) and not all(clipped)
    assert all(abs(step["grad_norm"] / run["max_grad_norm"] - 1) > 1e-2 for step in steps)

    def furthest(key):
        return max(abs(a[key] / b[key] - 1) for other, _ in others for a, b in zip(other, steps))

    spread = {
        "loss": furthest("loss"),
        "grad_norm": furthest("grad_norm"),
        "final": max(((o[key] - final[key]).norm() / final[key].norm()).item() for _, o in others for key in final),
    }
    print(f"  spread {spread}")
    path = directory / "train" / name
    path.mkdir(parents=True, exist_ok=True)
    save_file(final, path / "final.safetensors")
    start = f"adapters/{adapter}" if adapter else None
    story = {"adapter": start, "run": run, "order": ORDER, "steps": steps, "spread": spread}
    write_json(path / "trajectory.json", story)


ORDER = [
    "rows are taken in file order, starting again at row 0 after the last; steps[i].rows lists them by micro-batch",
    "loss of a step = sum of nll over its counted labels / their number (tokens), over all its micro-batches",
    "gradients of the micro-batches are added; grad_norm = L2 norm of all of them together, before clipping",
    "clipping multiplies by min(1, max_grad_norm / (grad_norm + 1e-6))",
    "then optimizer.step(), then scheduler.step(): step k (from 1) uses learning_rate * factor(k - 1)",
    "weight decay (decoupled) applies to every trained tensor but norms and biases",
]


def train(directory, adapter, run, attention="eager", padded=True, double=False):
    model = load(directory, attention=attention)
    if adapter:
        model = PeftModel.from_pretrained(model, directory / "adapters" / adapter, is_trainable=True)
    if double:
        model.double()
    model.train()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, run["weight_decay"]),
        lr=run["learning_rate"], betas=(run["adam_beta1"], run["adam_beta2"]), eps=run["adam_epsilon"],
    )
    schedule = get_scheduler(run["lr_scheduler_type"], optimizer, run["warmup_steps"], run["max_steps"])
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    rows = [json.loads(line) for line in (directory / "rows.jsonl").read_text().splitlines()]
    size, accumulation = run["per_device_train_batch_size"], run["gradient_accumulation_steps"]

    steps, cursor = [], 0
    for number in range(1, run["max_steps"] + 1):
        order = [(cursor + i) % len(rows) for i in range(size * accumulation)]
        cursor += len(order)
        micro_batches = [order[i : i + size] for i in range(0, len(order), size)]
        tokens = sum(label != IGNORED for i in order for label in rows[i]["labels"][1:])
        loss = 0.0
        for batch in micro_batches if padded else [[i] for i in order]:
            inputs = collate([rows[i] for i in batch])
            if model.config.model_type == "gemma3":  # no token is of an image
                inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
            part = model(**inputs, num_items_in_batch=tokens, use_cache=False).loss
            part.backward()
            loss += part.item()
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, run["max_grad_norm"]).item()
        learning_rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        steps.append({
            "step": number, "rows": micro_batches, "tokens": tokens, "loss": loss, "grad_norm": grad_norm,
            "learning_rate": learning_rate,
        })
    if adapter:
        final = get_peft_model_state_dict(model)
    else:
        final = {stored_name(directory, key): weight for key, weight in model.named_parameters()}
    return steps, {key: weight.detach().float().contiguous() for key, weight in final.items()}


def stored_name(directory, key):
    """The name of a weight in the checkpoint: multimodal ones keep those of older versions of transformers."""
    if not (directory / "config.json").read_text().count('"vision_config"'):
        return key
    for inside, stored in (("model.language_model.", "language_model.model."), ("model.", "")):
        if key.startswith(inside):
            return stored + key.removeprefix(inside)
    return key


def parameter_groups(model, weight_decay):
    """The Trainer's rule: no decay on norms and biases."""
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    return [
        {"params": [weight for name, weight in trained if name in decayed], "weight_decay": weight_decay},
        {"params": [weight for name, weight in trained if name not in decayed], "weight_decay": 0.0},
    ]


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(values, filler):
        return values + [filler] * (longest - len(values))

    return {
        "input_ids": torch.tensor([pad(row["input_ids"], 0) for row in rows]),
        "labels": torch.tensor([pad(row["labels"], IGNORED) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
    }


# ---- the rest --------------------------------------------------------------------------------------------------------


SCHEDULES = [
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.25}),
    ("cosine_with_restarts", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 7}),
    ("warmup_stable_decay", {"num_decay_steps": 6}),
    ("warmup_stable_decay", {"num_decay_steps": 15, "min_lr_ratio": 0.1, "decay_type": "linear"}),
    (
        "warmup_stable_decay",
        {"num_decay_steps": 4, "min_lr_ratio": 0.25, "decay_type": "1-sqrt", "warmup_type": "cosine"},
    ),
    ("warmup_stable_decay", {"num_decay_steps": 7, "warmup_type": "1-sqrt", "num_cycles": 0.75}),
    ("cosine_with_min_lr", {"min_lr": 0.3}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.125, "num_cycles": 1.5}),
]


def schedules(total=20):
    """Learning-rate factors at steps 0..=total."""
    found = []
    for name, kwargs in SCHEDULES:
        for warmup in (0, 3, 5):
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
            schedule = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=kwargs)
            factors = []
            for _ in range(total + 1):
                factors.append(schedule.get_last_lr()[0])
                optimizer.step()
                schedule.step()
            found.append(
                {"lr_scheduler_type": name, "lr_scheduler_kwargs": kwargs, "warmup_steps": warmup, "factors": factors}
            )
    return {"max_steps": total, "schedules": found}


def deterministic():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def versions():
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "safetensors": safetensors.__version__,
    }


def write_json(path, value):
    text = json.dumps(value, indent=1)
    # A list of numbers on one line.
    text = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda found: "[" + re.sub(r"\s+", " ", found[1]) + "]", text)
    path.write_text(text + "\n")


if __name__ == "__main__":
    main()
