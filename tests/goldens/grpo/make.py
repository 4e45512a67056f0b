"""Makes the goldens of policy gradients: advantages, losses, metrics and gradient norms of TRL's GRPO and RLOO trainers.

    python tests/goldens/grpo/make.py

The policy is qwen3-tied with adapters/all-linear, the reference its base model. Completions and rewards are given in place of
sampling. Needs torch, transformers, peft and trl; expect.json has the versions used. ../README.md describes the files.
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
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

HERE = Path(__file__).parent
MODEL = HERE.parent / "qwen3-tied"
VOCAB = 131
EOS = 130
SEED = 9104
GENERATIONS = 4
WEIGHTS = [1.0, 0.5]

# Our arguments of each case, which are TRL's without "vllm_". "old" and "sampler" are true where the log-probabilities of the
# sampling model and of the sampler differ from the policy's by the noise in rollouts.json.
OFF = {"old": True}
CASES = [
    *({"loss_type": loss} for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "sapo")),
    *({"loss_type": loss, **OFF} for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "vespo")),
    {"loss_type": "cispo", "epsilon_high": 5.0},
    {"loss_type": "cispo", "epsilon_high": 1.1, **OFF},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03, **OFF},
    {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.02, **OFF},
    {"loss_type": "luspo", **OFF},
    {"loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated_completions": True, **OFF},
    {"loss_type": "grpo", "mask_truncated_completions": True, "importance_sampling_level": "sequence", **OFF},
    {"loss_type": "grpo", "delta": 1.3, **OFF},
    {"loss_type": "grpo", "beta": 0.04},
    {"loss_type": "grpo", "beta": 0.04, **OFF},
    {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False, **OFF},
    {"loss_type": "grpo", "beta": 0.04, "importance_sampling_level": "sequence", **OFF},
    {"loss_type": "dapo", "temperature": 0.7, "beta": 0.1, **OFF},
    {"loss_type": "dapo", "scale_rewards": "batch", **OFF},
    {"loss_type": "dr_grpo", "scale_rewards": "none", **OFF},
    {"loss_type": "dapo", "multi_objective_aggregation": "normalize_then_sum", **OFF},
    {"loss_type": "dapo", "top_entropy_quantile": 0.4, **OFF},
    {"loss_type": "grpo", "off_policy_mask_threshold": 0.01, **OFF},
    *({"loss_type": "grpo", "importance_sampling_mode": mode, "importance_sampling_clip_max": high,
       "importance_sampling_clip_min": low, "old": True, "sampler": True} for mode, low, high in (
        ("token_truncate", 0.9, 1.1), ("token_mask", 0.9, 1.1), ("sequence_truncate", 0.8, 1.2),
        ("sequence_mask", 0.8, 1.2))),
    {"loss_type": "dapo", "importance_sampling_mode": "token_mask", "sampler": True, "beta": 0.04,
     "importance_sampling_clip_max": 1.1, "importance_sampling_level": "sequence"},
    {"loss_type": "vespo", "importance_sampling_mode": "token_truncate", "sampler": True, **OFF},
    {"loss_type": "grpo", "off_policy_mask_threshold": 0.01, "sampler": True},
    # The first half of completions that are sampled together.
    {"loss_type": "dapo", "rows": 6, **OFF},
    {"loss_type": "bnpo", "rows": 6, **OFF},
    {"method": "rloo", "beta": 0.0},
    {"method": "rloo", "beta": 0.1, **OFF},
    {"method": "rloo", "beta": 0.1, "normalize_advantages": True, "reward_clip_range": [-0.5, 0.8], **OFF},
    {"method": "rloo", "epsilon": 0.02, "mask_truncated_completions": True, **OFF},
]


def main():
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    rollouts = make_rollouts()
    (HERE / "rollouts.json").write_text(compact(rollouts))
    cases = []
    for arguments in CASES:
        cases.append({"arguments": arguments, **run(dict(arguments), rollouts)})
        print(arguments, cases[-1]["loss"], cases[-1]["grad_norm"])
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
                "peft": peft.__version__, "trl": trl.__version__}
    (HERE / "expect.json").write_text(compact({"weights": WEIGHTS, "cases": cases, "versions": versions}))


def compact(value):
    """JSON with small lists and maps on one line."""
    text = json.dumps(value, indent=1)
    return re.sub(r"([\[{])\s+([^][{}]*?)\s+([\]}])", lambda m: m[1] + re.sub(r"\s+", " ", m[2]) + m[3], text) + "\n"


def make_rollouts():
    """Four completions for each of three prompts, some without an end token; rewards of two functions; and noise on
    log-probabilities.

    The rewards of the second prompt are all equal. Of the third, one completion has no reward at all and one only the second.
    """
    generator = torch.Generator().manual_seed(SEED)
    length = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))
    ids = lambda count: torch.randint(0, EOS, (count,), generator=generator).tolist()
    noise = lambda count, scale: [round(x, 4) for x in (scale * torch.randn(count, generator=generator)).tolist()]
    prompts = [ids(length(3, 9)) for _ in range(3)]
    rows = []
    for index in range(len(prompts) * GENERATIONS):
        completion = ids(length(2, 9)) + ([] if index in (2, 5, 8) else [EOS])
        rows.append({"prompt": index // GENERATIONS, "completion_ids": completion,
                     "old_noise": noise(len(completion), 0.25), "sampler_noise": noise(len(completion), 0.1)})
    first = [1.0, 0.0, 0.5, 1.0, 0.25, 0.25, 0.25, 0.25, None, 1.0, None, 0.75]
    second = [0.2, -0.4, 1.0, 0.1, 0.5, 0.5, 0.5, 0.5, None, 0.3, -1.0, 0.6]
    return {"prompts": prompts, "rows": [{**row, "rewards": [a, b]} for row, a, b in zip(rows, first, second)]}


def tokenizer():
    """Words are ids. The letter keeps special tokens, which are found inside of words, out of other ids."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{EOS}", pad_token=f"w{EOS}")


def run(arguments, rollouts):
    rows, is_rloo = rollouts["rows"], arguments.pop("method", "grpo") == "rloo"
    off_policy, sampler = arguments.pop("old", False), arguments.pop("sampler", False)
    part = arguments.pop("rows", len(rows))
    # With two steps for each generation, TRL computes log-probabilities of the sampling model.
    parts = len(rows) // part
    for name in [name for name in arguments if name.startswith("importance_sampling") and not name.endswith("level")]:
        arguments[f"vllm_{name}"] = arguments.pop(name)
    trainer_class, config_class = (RLOOTrainer, RLOOConfig) if is_rloo else (GRPOTrainer, GRPOConfig)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, MODEL / "adapters" / "all-linear", is_trainable=True)
    prompts = [" ".join(f"w{i}" for i in ids) for ids in rollouts["prompts"]]
    config = config_class(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        per_device_train_batch_size=part, steps_per_generation=parts, num_generations=GENERATIONS, max_steps=1,
        save_strategy="no", max_completion_length=9, reward_weights=WEIGHTS, disable_tqdm=True, **arguments,
    )
    # Reward functions are named by their __name__.
    functions = [lambda completions, index=index, **_: [row["rewards"][index] for row in rows] for index in (0, 1)]
    for name, function in zip(("first", "second"), functions):
        function.__name__ = name
    trainer = trainer_class(model=model, args=config, processing_class=tokenizer(), reward_funcs=functions,
                            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]))
    trainer.current_gradient_accumulation_steps = 1
    # The adapter is the policy, and the model without it the reference, as for a new adapter: drop the copy of its start.
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
    trainer.model.train()
    completions = [row["completion_ids"] for row in rows]
    sampled = None
    if sampler:
        trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
        exact = [log_probs(model, rollouts["prompts"][row["prompt"]], row["completion_ids"], config.temperature)
                 for row in rows]
        old = [row["old_noise"] if off_policy else [0.0] * len(row["old_noise"]) for row in rows]
        sampled = [[a + b + c for a, b, c in zip(exact, o, row["sampler_noise"])] for exact, o, row in
                   zip(exact, old, rows)]
    trainer._generate_single_turn = lambda *_, **__: completions if is_rloo else (completions, sampled)
    if off_policy:
        add_old_noise(trainer, rows)
    inputs = trainer._generate_and_score_completions([{"prompt": prompts[row["prompt"]]} for row in rows])
    if is_rloo and off_policy:
        # Of whole completions.
        mask = inputs["completion_mask"]
        inputs["old_logps"] = inputs["old_logps"] + (padded(rows, "old_noise", mask) * mask).sum(1)
    if not sampler and not off_policy and not is_rloo:
        inputs.pop("old_per_token_logps", None)
    advantages = inputs["advantages"].tolist()
    inputs = {name: value[:part] if torch.is_tensor(value) and value.dim() > 0 else value for name, value in inputs.items()}
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    squares = [p.grad.double().square().sum() for p in trainer.model.parameters() if p.requires_grad and p.grad is not None]
    metrics = {name: float(values[-1]) for name, values in trainer._metrics["train"].items() if name != "num_tokens"}
    result = {"loss": loss.item(), "grad_norm": torch.stack(squares).sum().sqrt().item(), "advantages": advantages,
              "metrics": metrics}
    if is_rloo and config.beta != 0:
        masks = arguments.get("mask_truncated_completions", False)
        of_row = lambda row: log_probs(model, rollouts["prompts"][row["prompt"]], row["completion_ids"], 1.0)
        policy = [sum(of_row(row)) for row in rows]
        with model.disable_adapter():
            reference = [sum(of_row(row)) for row in rows]
        result["divergences"] = [0.0 if masks and row["completion_ids"][-1] != EOS else a - b
                                 for row, a, b in zip(rows, policy, reference)]
    return result


def log_probs(model, prompt, completion, temperature):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1:-1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()


def padded(rows, name, like):
    values = torch.zeros(like.shape)
    for index, row in enumerate(rows):
        values[index, :len(row[name])] = torch.tensor(row[name])
    return values


def add_old_noise(trainer, rows):
    """Adds the noise to the log-probabilities of the sampling model, without a gradient and before they are used."""
    if isinstance(trainer, RLOOTrainer):
        return
    generate, compute = trainer._generate_and_score_completions, trainer._get_per_token_logps_and_entropies
    calls = []

    def first_with_noise(*args, **kwargs):
        log_probs, *rest = compute(*args, **kwargs)
        calls.append(log_probs)
        # The second call is that of the reference.
        return (log_probs + padded(rows, "old_noise", log_probs) if len(calls) == 1 else log_probs, *rest)

    def generate_off_policy(inputs):
        # Any value that does not divide the number of accumulation steps makes TRL compute them.
        steps, trainer.args.steps_per_generation = trainer.args.steps_per_generation, 2
        trainer._get_per_token_logps_and_entropies = first_with_noise
        result = generate(inputs)
        trainer._get_per_token_logps_and_entropies = compute
        trainer.args.steps_per_generation = steps
        return result

    trainer._generate_and_score_completions = generate_off_policy


if __name__ == "__main__":
    main()
