"""Makes the goldens of reward models: losses, metrics and gradient norms of TRL's RewardTrainer, and trajectories.

    python tests/goldens/reward/make.py

`model` is qwen3-tied as transformers' sequence classification with one label, whose score head is random; `adapter` is an
adapter for it that PEFT wrote, with factors that are not zero and a score head of its own. Needs torch, transformers, peft
and trl; expect.json has the versions used. ../README.md describes the files.
"""

import json
import platform
import re
import shutil
import tempfile
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

import peft
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer

HERE = Path(__file__).parent
BASE = HERE.parent / "qwen3-tied"
PAIRS = HERE.parent / "preferences" / "pairs.jsonl"
MARGINS = [0.5, -0.25, 0.0, 1.5, 0.125, 2.0]
VOCAB, EOS, SEED, STEPS = 131, 130, 7401, 12
RUN = {"learning_rate": 2e-3, "lr_scheduler_type": "linear", "weight_decay": 0.3, "max_grad_norm": 1.0}
# The names of our arguments are those of TRL; "margins" says which rows there are.
LOSSES = [
    {"margins": False},
    {"margins": True},
    {"margins": False, "center_rewards_coefficient": 0.01},
    {"margins": True, "center_rewards_coefficient": 0.3},
]
TRAJECTORY = {"margins": True, "center_rewards_coefficient": 0.01}


def main():
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    margined = [{**row, "margin": margin} for row, margin in zip(rows, MARGINS, strict=True)]
    (HERE / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in margined))
    write_models()
    expect = {"scores": scores(rows), "losses": [], "trajectories": {}}
    for kind in ("adapter", "full"):
        for arguments in LOSSES:
            trainer = make_trainer(kind, arguments, rows, len(rows), 1)
            expect["losses"].append({"kind": kind, "arguments": arguments, **one_step(trainer)})
            print(expect["losses"][-1])
        trainer = make_trainer(kind, TRAJECTORY, rows, len(rows) // 2, STEPS)
        records = []
        record(trainer, records)
        trainer.train()
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        assert len(norms) == len(records) == STEPS
        expect["trajectories"][kind] = {"arguments": TRAJECTORY, "batch_size": len(rows) // 2, "run": RUN,
                                        "steps": [{**step, "grad_norm": n} for step, n in zip(records, norms)]}
        print(kind, [step["loss"] for step in records])
    expect["versions"] = {"python": platform.python_version(), "torch": torch.__version__,
                          "transformers": transformers.__version__, "peft": peft.__version__, "trl": trl.__version__}
    text = json.dumps(expect, indent=1)
    # Small lists and maps on one line.
    text = re.sub(r"([\[{])\s+([^][{}]*?)\s+([\]}])", lambda m: m[1] + re.sub(r"\s+", " ", m[2]) + m[3], text)
    (HERE / "expect.json").write_text(text + "\n")


def base(path=None):
    return AutoModelForSequenceClassification.from_pretrained(path or HERE / "model", num_labels=1, dtype=torch.float32,
                                                              attn_implementation="eager")


def write_models():
    torch.manual_seed(SEED)
    model = base(BASE)
    torch.nn.init.normal_(model.score.weight, std=0.2)
    model.save_pretrained(HERE / "model")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.base_model.peft_config["default"].base_model_name_or_path = "qwen3-tied"
    written = Path(tempfile.mkdtemp())
    adapted.save_pretrained(written)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (HERE / "adapter").mkdir(exist_ok=True)
        shutil.copy(written / name, HERE / "adapter" / name)


def model_of(kind):
    return base() if kind == "full" else PeftModel.from_pretrained(base(), HERE / "adapter", is_trainable=True)


def scores(rows):
    """The scores of each row's chosen and rejected answer."""
    found = {}
    for kind in ("adapter", "full"):
        model = model_of(kind).eval()
        with torch.no_grad():
            score = lambda ids: model(input_ids=torch.tensor([ids])).logits[0, 0].item()
            found[kind] = [score(row["prompt_ids"] + row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")]
    return found


def text(ids):
    return " ".join(f"w{i}" for i in ids)


def tokenizer():
    """Words are ids."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{EOS}", pad_token="w0")


def make_trainer(kind, arguments, rows, batch_size, steps):
    arguments = dict(arguments)
    margins = MARGINS if arguments.pop("margins") else [None] * len(rows)
    # Answers begin with a space, because prompt and answer are joined as text.
    texts = [{"prompt": text(row["prompt_ids"]), "chosen": " " + text(row["chosen_ids"]),
              "rejected": " " + text(row["rejected_ids"]), **({} if margin is None else {"margin": margin})}
             for row, margin in zip(rows, margins)]
    config = RewardConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        per_device_train_batch_size=batch_size, max_steps=steps, logging_steps=1, save_strategy="no", max_length=128,
        train_sampling_strategy="sequential", disable_tqdm=True, **RUN, **arguments,
    )
    return RewardTrainer(model=model_of(kind), args=config, train_dataset=Dataset.from_list(texts),
                         processing_class=tokenizer())


def record(trainer, records):
    compute_loss = trainer.compute_loss

    def wrapped(model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = compute_loss(model, inputs, return_outputs, num_items_in_batch)
        metrics = {name: float(values[-1]) for name, values in trainer._metrics["train"].items() if name != "num_tokens"}
        records.append({"loss": (loss[0] if return_outputs else loss).item(), "metrics": metrics})
        return loss

    trainer.compute_loss = wrapped


def one_step(trainer):
    """The loss of all rows at the start, with its gradient norm."""
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    records = []
    record(trainer, records)
    trainer.compute_loss(trainer.model, batch).backward()
    squares = [p.grad.double().square().sum() for p in trainer.model.parameters() if p.requires_grad and p.grad is not None]
    return {**records[0], "grad_norm": torch.stack(squares).sum().sqrt().item()}


if __name__ == "__main__":
    main()
