"""Times the steps of TRL's DPO and GRPO trainers, on a model of PEFT or Unsloth, in the job of `cargo xtask bench train --loss`."""

import argparse
import json
import os
import random
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import gpu_train


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights")
    parser.add_argument("--peer", choices=["unsloth", "peft"], default="peft")
    parser.add_argument("--loss", choices=["dpo", "grpo"], default="dpo")
    parser.add_argument("--mode", choices=["lora", "qlora"], default="lora")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step; two of a pair")
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--checkpointing", choices=list(gpu_train.CHECKPOINTING), default="block")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    return parser.parse_args()


def words(count, source):
    """Returns text whose tokens are `count` random words."""
    return " ".join(f"w{source.randrange(2000)}" for _ in range(count))


def rows(job, count):
    """Returns the rows of a data set, whose answers become one token longer by the token that ends a turn."""
    source = random.Random(1)
    answer = job.seq - job.prompt - 1
    for _ in range(count):
        row = {"prompt": words(job.prompt, source)}
        if job.loss == "dpo":
            row |= {"chosen": " " + words(answer, source), "rejected": " " + words(answer, source)}
        yield row


def trainer(job, model, tokenizer, callback):
    import trl
    from datasets import Dataset

    steps = job.warmup + job.steps
    common = dict(
        output_dir="/tmp/trl-out",
        max_steps=steps,
        gradient_accumulation_steps=job.passes,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused" if job.cuda else "adamw_torch",
        bf16=job.cuda,
        use_cpu=not job.cuda,
        # The model already has it.
        gradient_checkpointing=job.peer == "peft" and job.checkpointing != "off",
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    if job.loss == "dpo":
        config = trl.DPOConfig(
            per_device_train_batch_size=job.batch // 2 // job.passes, max_length=job.seq, beta=0.1, **common
        )
        data = Dataset.from_list(list(rows(job, steps * job.batch // 2)))
        kind, extra = trl.DPOTrainer, {}
    else:
        new = job.seq - job.prompt
        config = trl.GRPOConfig(
            per_device_train_batch_size=job.batch // job.passes,
            num_generations=job.generations,
            max_completion_length=new,
            temperature=1.0,
            beta=job.beta,
            generation_kwargs={"min_new_tokens": new},
            **common,
        )
        data = Dataset.from_list(list(rows(job, steps * job.batch // job.generations)))
        kind, extra = trl.GRPOTrainer, {"reward_funcs": [lambda completions, **_: [1.0] * len(completions)]}
    return kind(model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[callback], **extra)


def main():
    job = arguments()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    # Redirects the trainers' output, so that stdout has only the line of JSON.
    out, sys.stdout = sys.stdout, sys.stderr
    if job.peer == "unsloth":
        import unsloth  # noqa: F401  (must precede torch, transformers and trl)
    import torch
    from transformers import AutoTokenizer, TrainerCallback

    gpu_train.torch = torch
    job.cuda = torch.cuda.is_available()
    job.bias, job.use_dora = "none", False
    gpu_train.write_tokenizer(job.weights)
    model = gpu_train.unsloth_model(job) if job.peer == "unsloth" else gpu_train.peft_model(job)
    tokenizer = AutoTokenizer.from_pretrained(job.weights)
    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            if job.cuda:
                torch.cuda.synchronize()
            times.append([time.perf_counter()])

        def on_step_end(self, *_, **__):
            if job.cuda:
                torch.cuda.synchronize()
            times[-1].append(time.perf_counter())

    built = trainer(job, model, tokenizer, Clock())
    began = time.perf_counter()
    built.train()
    # From the end of one step to the end of the next: GRPO samples before the step that the trainer announces.
    ends = [began] + [end for _, end in times]
    counted = sorted([b - a for a, b in zip(ends, ends[1:])][job.warmup :])
    median = counted[len(counted) // 2]
    report = {"tokens_per_second": job.batch * job.seq / median, "ms_per_step": median * 1e3}
    if job.cuda:
        free, total = torch.cuda.mem_get_info()
        report |= {"device_gib": (total - free) / 2**30, "allocator_gib": torch.cuda.max_memory_allocated() / 2**30}
    print(json.dumps(report), file=out)


if __name__ == "__main__":
    main()
