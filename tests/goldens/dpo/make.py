"""Makes the golden of DPO: the loss of three pairs of rows of qwen3-tied, and its gradients by PyTorch's autograd.

    python tests/goldens/dpo/make.py

The policy is the model with adapters/all-linear, the reference model is the same with the adapter disabled. Needs torch,
transformers and peft; expect.json has the versions used. ../README.md describes the files.
"""

import json
import platform
import re
from pathlib import Path

import peft
import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

BETA = 0.3
# Rows of rows.jsonl: chosen and rejected.
PAIRS = [[0, 2], [3, 5], [6, 4]]
IGNORED = -100
HERE = Path(__file__).parent
MODEL = HERE.parent / "qwen3-tied"


def main():
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in (MODEL / "rows.jsonl").read_text().splitlines()]
    result, gradients = run(rows, torch.float32, "eager")
    others = [run(rows, torch.float32, "sdpa"), run(rows, torch.float64, "eager")]
    result["spread"] = {
        "loss": max(abs(other["loss"] / result["loss"] - 1) for other, _ in others),
        "gradients": max(
            ((other[name] - value.double()).norm() / value.double().norm()).item()
            for _, other in others
            for name, value in gradients.items()
        ),
    }
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__, "peft": peft.__version__}
    text = json.dumps({**result, "versions": versions}, indent=1)
    # A list of numbers on one line.
    text = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda found: "[" + re.sub(r"\s+", " ", found[1]) + "]", text)
    (HERE / "expect.json").write_text(text + "\n")
    save_file({name: value.float().contiguous() for name, value in sorted(gradients.items())},
              HERE / "gradients.safetensors")
    print(json.dumps({key: result[key] for key in ("loss", "metrics", "spread")}))


def run(rows, dtype, attention):
    """Returns the loss with what it is made of, and the gradient of every parameter of the adapter."""
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype, attn_implementation=attention)
    model = PeftModel.from_pretrained(base, MODEL / "adapters" / "all-linear", is_trainable=True)
    model.to(dtype).eval()
    losses, listed = [], []
    sums = {"rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0, "rewards/accuracies": 0.0}
    for pair in PAIRS:
        rewards = []
        for row in pair:
            policy = token_log_probs(model, rows[row])
            with torch.no_grad(), model.disable_adapter():
                reference = token_log_probs(model, rows[row])
            rewards.append(BETA * (policy[0].sum() - reference[0].sum()))
            listed.append({
                "row": row,
                "log_probs": policy[0].tolist(),
                "entropy": policy[1].tolist(),
                "is_argmax": policy[2].tolist(),
                "reference": reference[0].tolist(),
            })
        margin = rewards[0] - rewards[1]
        losses.append(-torch.nn.functional.logsigmoid(margin))
        for name, value in zip(sums, [*rewards, margin, (margin > 0).double()]):
            sums[name] += value.item() / len(PAIRS)
    loss = torch.stack(losses).mean()
    loss.backward()
    gradients = {
        name.replace(".default.", ".").removeprefix("base_model.model."): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"beta": BETA, "pairs": PAIRS, "loss": loss.item(), "metrics": sums, "rows": listed}, gradients


def token_log_probs(model, row):
    """Log-probability, entropy and arg-max flag of each label that is not ignored; the softmax is in float64."""
    logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0].double()
    labels = torch.tensor(row["labels"][1:])
    counted = labels != IGNORED
    logits, labels = logits[:-1][counted], labels[counted]
    log_p = torch.log_softmax(logits, dim=-1)
    at_labels = log_p.gather(1, labels[:, None])[:, 0]
    return at_labels, -(log_p.exp() * log_p).sum(-1).detach(), logits.argmax(-1) == labels


if __name__ == "__main__":
    main()
