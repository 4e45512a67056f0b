"""How far PyTorch's own float16 run lands from the float32 trajectories, as the bound of ours.

    python -B tests/goldens/f16.py [DIRECTORY ...]        all models and families that train in f16 without one

Beside each `trajectory.json` it writes `f16.json`: the largest relative differences of loss, gradient norm and trained
tensors. The run is that of transformers' `fp16=True`: `torch.autocast` to float16 and `torch.amp.GradScaler` with its
defaults. Under an adapter the base weights are float16 and the adapter float32, as PEFT keeps it on such a base; if all
weights are trained, they are float32, and one run starts from weights that were rounded to float16. `scale` has the scale after each step; no step of these runs overflows.
"""

import json
import pathlib
import sys
import tempfile

import make
import torch
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).parent
# Families that Rekindle refuses to train in f16, and checkpoints that the loader of make.py does not read.
LEFT_OUT = ("gemma3", "gemma4", "gpt-oss", "qwen3_5", "multimodal")
NF4 = "quantized/qwen3-tied-nf4-double"


def main():
    torch.set_num_threads(1)
    named = [HERE / name for name in sys.argv[1:]]
    everything = [HERE / name for name in ("qwen3-tied", "llama3", "qwen2", NF4)] + sorted((HERE / "families").iterdir())
    for directory in named or everything:
        if any(part in directory.name for part in LEFT_OUT):
            continue
        for path in sorted((directory / "train").glob("*/trajectory.json")) if directory.is_dir() else []:
            measure(directory, path)


def measure(directory, path):
    if path.parent.name == "full" and "_experts" in (directory / "config.json").read_text():
        return  # PyTorch's parameters hold all experts at once
    story, final = json.loads(path.read_text()), load_file(path.parent / "final.safetensors")
    adapter = story["adapter"] and pathlib.Path(story["adapter"]).name
    furthest, scales = {"loss": 0.0, "grad_norm": 0.0, "final": 0.0}, []
    runs = [("eager", True, False), (make.other_attention(directory), False, False)]
    for attention, padded, rounds in runs if adapter else [*runs, ("eager", True, True)]:
        with tempfile.TemporaryDirectory() as temporary:
            plain = decoded(directory, pathlib.Path(temporary)) if str(directory).endswith(NF4) else directory
            steps, other = train(plain, adapter, story["run"], attention, padded, rounds)
        scales.append([step["scale"] for step in steps])
        for key in ("loss", "grad_norm"):
            distance = max(abs(a[key] / b[key] - 1) for a, b in zip(steps, story["steps"]))
            furthest[key] = max(furthest[key], distance)
        distance = max(((other[key] - final[key]).norm() / final[key].norm()).item() for key in final)
        furthest["final"] = max(furthest["final"], distance)
    assert all(scale == scales[0] for scale in scales) and len(set(scales[0])) == 1, f"{path}: {scales}"
    print(path.relative_to(HERE).parent, furthest)
    make.write_json(path.parent / "f16.json", {"spread": furthest, "scale": scales[0], **make.versions()})


def train(directory, adapter, run, attention, padded, rounds):
    """The loop of make.train as transformers' Trainer runs it with fp16=True."""
    model = make.load(directory, dtype=torch.float16 if adapter or rounds else torch.float32, attention=attention)
    if rounds:
        model = model.float()
    model.set_experts_implementation("eager")
    if adapter:
        model = make.PeftModel.from_pretrained(model, directory / "adapters" / adapter, is_trainable=True)
    model.train()
    optimizer = torch.optim.AdamW(
        make.parameter_groups(model, run["weight_decay"]),
        lr=run["learning_rate"], betas=(run["adam_beta1"], run["adam_beta2"]), eps=run["adam_epsilon"],
    )
    schedule = make.get_scheduler(run["lr_scheduler_type"], optimizer, run["warmup_steps"], run["max_steps"])
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    rows = [json.loads(line) for line in (directory / "rows.jsonl").read_text().splitlines()]
    size, accumulation = run["per_device_train_batch_size"], run["gradient_accumulation_steps"]
    scaler = torch.amp.GradScaler("cpu")

    steps, cursor = [], 0
    for _ in range(run["max_steps"]):
        order = [(cursor + i) % len(rows) for i in range(size * accumulation)]
        cursor += len(order)
        micro_batches = [order[i : i + size] for i in range(0, len(order), size)] if padded else [[i] for i in order]
        tokens = sum(label != make.IGNORED for i in order for label in rows[i]["labels"][1:])
        loss = 0.0
        for batch in micro_batches:
            with torch.autocast("cpu", dtype=torch.float16):
                part = model(**make.collate([rows[i] for i in batch]), num_items_in_batch=tokens, use_cache=False).loss
            scaler.scale(part).backward()
            loss += part.item()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, run["max_grad_norm"]).item()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()
        steps.append({"loss": loss, "grad_norm": grad_norm, "scale": scaler.get_scale()})
    if adapter:
        final = make.get_peft_model_state_dict(model)
    else:
        final = {make.stored_name(directory, key): weight for key, weight in model.named_parameters()}
    return steps, {key: weight.detach().float().contiguous() for key, weight in final.items()}


def decoded(directory, plain):
    """The checkpoint with its NF4 weights decoded."""
    stored, dense = load_file(directory / "model.safetensors"), {}
    for name in [key.removesuffix(".weight.quant_map") for key in stored if key.endswith(".weight.quant_map")]:
        def part(key):
            return stored[f"{name}.weight.{key}"]

        state = json.loads(bytes(part("quant_state.bitsandbytes__nf4").tolist()))
        absmax = part("nested_quant_map")[part("absmax").int()]
        nested = part("nested_absmax").repeat_interleave(state["nested_blocksize"])[: len(absmax)]
        packed = stored[f"{name}.weight"].view(torch.uint8).flatten()
        codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().int()
        scales = (absmax * nested + state["nested_offset"]).repeat_interleave(state["blocksize"])[: len(codes)]
        dense[f"{name}.weight"] = (part("quant_map")[codes] * scales).reshape(state["shape"])
    others = {key: value for key, value in stored.items() if ".weight." not in key and key not in dense}
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    save_file({**others, **dense}, plain / "model.safetensors", metadata={"format": "pt"})
    for name in ("rows.jsonl", "adapters"):
        (plain / name).symlink_to((directory / name).resolve())
    return plain


if __name__ == "__main__":
    main()
