"""How far PyTorch's own bfloat16 run lands from the float32 trajectories, as the bound of ours.

Beside each `trajectory.json` named below it writes `bf16.json`: the largest relative differences of loss, gradient norm
and trained tensors. Base weights and activations are bfloat16, adapters float32, as PEFT keeps them on such a base.
"""

import json
import pathlib

import make
import torch
from safetensors.torch import load_file

RUNS = [("qwen3-tied", "lora"), ("llama3", "lora-fresh")]


def main():
    torch.set_num_threads(1)
    loader = make.load
    make.load = lambda directory, attention="eager": loader(directory, dtype=torch.bfloat16, attention=attention)
    for model, name in RUNS:
        directory = pathlib.Path(__file__).parent / model
        path = directory / "train" / name
        story = json.loads((path / "trajectory.json").read_text())
        final = load_file(path / "final.safetensors")
        furthest = {"loss": 0.0, "grad_norm": 0.0, "final": 0.0}
        for attention, padded in [("eager", True), ("sdpa", False)]:
            steps, other = make.train(directory, pathlib.Path(story["adapter"]).name, story["run"], attention, padded)
            for key in ("loss", "grad_norm"):
                distance = max(abs(a[key] / b[key] - 1) for a, b in zip(steps, story["steps"]))
                furthest[key] = max(furthest[key], distance)
            distance = max(((other[key] - final[key]).norm() / final[key].norm()).item() for key in final)
            furthest["final"] = max(furthest["final"], distance)
        print(model, name, furthest)
        make.write_json(path / "bf16.json", {"spread": furthest, **make.versions()})


if __name__ == "__main__":
    main()
