"""Makes the goldens of preference training: losses, metrics and gradient norms of TRL's own trainers, and trajectories.

    python tests/goldens/preferences/make.py

The policy is qwen3-tied with adapters/all-linear. The reference is the base model, or in trajectories with "reference":
"start" the adapter at its start, with "moving" a copy of all weights, which are trained and which it follows. Needs torch, transformers, peft and trl; expect.json has the versions used. ../README.md
describes the files.
"""

import json
import os
import platform
import re
import tempfile
import warnings
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
warnings.filterwarnings("ignore")

import peft
import torch
import transformers
import trl
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

HERE = Path(__file__).parent
MODEL = HERE.parent / "qwen3-tied"
VOCAB = 131
EOS = 130
SEED = 7301
LABELLED_SEED = 7302
STEPS = 12
EPSILON = 0.1
RUN = {"learning_rate": 2e-3, "lr_scheduler_type": "linear", "weight_decay": 0.3, "max_grad_norm": 1.0}

# Our arguments of each loss, which are TRL's.
LOSSES = [
    *({"method": "dpo", "beta": 0.3, "loss_type": [loss]} for loss in (
        "sigmoid", "sigmoid_norm", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
        "sft")),
    *({"method": "dpo", "beta": 0.3, "loss_type": [loss], "label_smoothing": EPSILON} for loss in (
        "exo_pair", "robust", "aot", "aot_unpaired")),
    {"method": "dpo", "beta": 0.3, "loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"method": "dpo", "beta": 0.3, "ld_alpha": 0.4},
    {"method": "dpo", "beta": 0.3, "use_weighting": True},
    {"method": "dpo", "beta": 0.3, "loss_type": ["ipo"], "use_weighting": True},
    {"method": "dpo", "beta": 0.3, "f_divergence_type": "forward_kl"},
    {"method": "dpo", "beta": 0.3, "f_divergence_type": "js_divergence"},
    {"method": "dpo", "beta": 0.3, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    {"method": "kto", "beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.9},
    {"method": "kto", "beta": 0.3, "loss_type": "apo_zero_unpaired"},
    {"method": "orpo", "beta": 0.2},
    {"method": "cpo", "beta": 0.3, "label_smoothing": EPSILON},
    {"method": "cpo", "beta": 0.02, "loss_type": "hinge", "cpo_alpha": 0.5},
    {"method": "cpo", "beta": 0.3, "loss_type": "ipo"},
    {"method": "cpo", "beta": 2.0, "loss_type": "simpo", "simpo_gamma": 0.7, "cpo_alpha": 0.0},
    {"method": "cpo", "beta": 2.0, "loss_type": "simpo", "cpo_alpha": 0.0, "alphapo_alpha": 0.25},
]
# TRL moves the reference of full fine-tuning only.
MOVING = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 3}
TRAJECTORIES = {
    "dpo": ({"method": "dpo", "beta": 0.1}, "base"),
    "dpo-start": ({"method": "dpo", "beta": 0.1}, "start"),
    "ipo": ({"method": "dpo", "beta": 0.1, "loss_type": ["ipo"]}, "start"),
    "kto": ({"method": "kto", "beta": 0.1}, "base"),
    "kto-start": ({"method": "kto", "beta": 0.1}, "start"),
    "orpo": ({"method": "orpo", "beta": 0.1}, None),
    "dpo-moving": ({"method": "dpo", "beta": 0.1, **MOVING}, "moving"),
    "kto-moving": ({"method": "kto", "beta": 0.1, **MOVING}, "moving"),
    "simpo": ({"method": "cpo", "beta": 2.0, "loss_type": "simpo", "cpo_alpha": 0.0}, None),
}
CLASSES = {"dpo": (DPOTrainer, DPOConfig), "kto": (KTOTrainer, KTOConfig), "orpo": (ORPOTrainer, ORPOConfig),
           "cpo": (CPOTrainer, CPOConfig)}


def main():
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    pairs, labelled = make_rows()
    write_rows("pairs.jsonl", pairs)
    write_rows("labelled.jsonl", labelled)
    losses = []
    for arguments in LOSSES:
        rows = labelled if arguments["method"] == "kto" else pairs
        trainer, _ = make_trainer(arguments, "base", rows, len(rows), steps=1)
        losses.append({"arguments": arguments, **one_step(trainer)})
        print(arguments, losses[-1]["loss"], losses[-1]["grad_norm"])
    trajectories = {}
    for name, (arguments, reference) in TRAJECTORIES.items():
        rows = labelled if arguments["method"] == "kto" else pairs
        trainer, steps = make_trainer(arguments, reference, rows, len(rows) // 2, steps=STEPS)
        trainer.train()
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        assert len(norms) == len(steps) == STEPS, (len(norms), len(steps))
        steps = [{**step, "grad_norm": norm} for step, norm in zip(steps, norms)]
        trajectories[name] = {"arguments": arguments, "reference": reference, "batch_size": len(rows) // 2, "run": RUN,
                              "steps": steps}
        print(name, [step["loss"] for step in steps])
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
                "peft": peft.__version__, "trl": trl.__version__}
    text = json.dumps({"losses": losses, "trajectories": trajectories, "versions": versions}, indent=1)
    # Small lists and maps on one line.
    text = re.sub(r"([\[{])\s+([^][{}]*?)\s+([\]}])", lambda m: m[1] + re.sub(r"\s+", " ", m[2]) + m[3], text)
    (HERE / "expect.json").write_text(text + "\n")


def make_rows():
    """Rows of ids: six pairs, of which three answers differ in length much, and eight answers with labels."""
    generator = torch.Generator().manual_seed(SEED)
    ids = lambda low, high: torch.randint(0, EOS, (int(torch.randint(low, high, (1,), generator=generator)),),
                                          generator=generator).tolist()
    pairs = [{"prompt_ids": ids(3, 9), "chosen_ids": ids(2, 14) + [EOS], "rejected_ids": ids(2, 14) + [EOS]}
             for _ in range(6)]
    labels = [True, False, True, True, False, False, True, False]
    # With this seed the estimate of KL is above 0, where it has an effect.
    generator.manual_seed(LABELLED_SEED)
    labelled = [{"prompt_ids": ids(3, 9), "completion_ids": ids(2, 14) + [EOS], "label": label} for label in labels]
    return pairs, labelled


def write_rows(name, rows):
    (HERE / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def text(ids):
    return " ".join(f"w{i}" for i in ids)


def tokenizer():
    """Words are ids. The letter keeps special tokens, which are found inside of words, out of other ids."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{EOS}", pad_token="w0")


def make_trainer(arguments, reference, rows, batch_size, steps):
    """TRL's trainer, and the list that each loss of it is appended to with its metrics."""
    arguments = {"alpha" if name == "alphapo_alpha" else name: value for name, value in arguments.items()}
    trainer_class, config_class = CLASSES[arguments.pop("method")]
    base = lambda: AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager")
    model = base() if reference == "moving" else PeftModel.from_pretrained(
        base(), MODEL / "adapters" / "all-linear", is_trainable=True)
    rename = {"prompt_ids": "prompt", "chosen_ids": "chosen", "rejected_ids": "rejected", "completion_ids": "completion"}
    # Answers begin with a space, because prompt and answer are joined as text.
    texts = [{rename.get(key, key): value if key == "label" else (" " if key != "prompt_ids" else "") + text(value)
              for key, value in row.items()} for row in rows]
    config = config_class(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        per_device_train_batch_size=batch_size, max_steps=steps, logging_steps=1, save_strategy="no", max_length=128,
        train_sampling_strategy="sequential", disable_tqdm=True, **RUN, **arguments,
    )
    kwargs = {"ref_model": base()} if reference in ("base", "moving") and trainer_class in (DPOTrainer, KTOTrainer) else {}
    trainer = trainer_class(model=model, args=config, train_dataset=Dataset.from_list(texts), processing_class=tokenizer(),
                            **kwargs)
    records = []
    record(trainer, records)
    return trainer, records


def record(trainer, records):
    if isinstance(trainer, (ORPOTrainer, CPOTrainer)):
        compute = trainer.get_batch_loss_metrics

        def wrapped(model, batch, train_eval="train"):
            loss, metrics = compute(model, batch, train_eval)
            records.append({"loss": loss.item(), "metrics": clean(metrics)})
            return loss, metrics

        trainer.get_batch_loss_metrics = wrapped
        return
    compute_loss = trainer._compute_loss

    def wrapped_loss(model, inputs, return_outputs):
        loss = compute_loss(model, inputs, return_outputs)
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        records.append({"loss": loss.item(), "metrics": clean(metrics)})
        return loss

    trainer._compute_loss = wrapped_loss


def clean(metrics):
    """The metrics that Rekindle reports too: all but logits and counts."""
    return {name: float(value) for name, value in metrics.items() if not name.startswith("logits/") and name != "num_tokens"}


def one_step(trainer):
    """The loss of all rows at the start, with its gradient norm."""
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    records = []
    record(trainer, records)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    squares = [p.grad.double().square().sum() for p in trainer.model.parameters() if p.requires_grad and p.grad is not None]
    return {**records[0], "grad_norm": torch.stack(squares).sum().sqrt().item()}


if __name__ == "__main__":
    main()
