"""Runs the job of `cargo xtask bench train` in Unsloth or PEFT, with the same weights, shapes and step sizes."""

import argparse
import json
import os
import sys
import time

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHECKPOINTING = {"off": False, "block": True, "host": "unsloth"}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights")
    parser.add_argument("--peer", choices=["unsloth", "peft"], default="unsloth")
    parser.add_argument("--loss", choices=["sft", "dpo", "grpo"], default="sft")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--mode", choices=["lora", "qlora", "full"], default="lora")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--checkpointing", choices=list(CHECKPOINTING), default="block")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--bias", choices=["none", "all"], default="none")
    parser.add_argument("--use-dora", action="store_true")
    return parser.parse_args()


def write_tokenizer(path):
    """Writes a tokenizer, without which Unsloth does not load a model."""
    if os.path.exists(os.path.join(path, "tokenizer.json")):
        return
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>"] + [f"w{i}" for i in range(2000)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(path)


def unsloth_model(job):
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        job.weights,
        max_seq_length=job.seq,
        dtype=torch.bfloat16,
        load_in_4bit=job.mode == "qlora",
        load_in_16bit=job.mode == "lora",
        full_finetuning=job.mode == "full",
    )
    if job.mode == "full":
        return model
    return FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        bias=job.bias,
        use_dora=job.use_dora,
        target_modules=TARGETS,
        use_gradient_checkpointing=CHECKPOINTING[job.checkpointing],
        random_state=3407,
    )


def peft_model(job):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = dict(dtype=torch.bfloat16, attn_implementation="sdpa", device_map={"": 0})
    if job.mode == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(job.weights, **options)
    if job.mode != "full":
        # transformers stacks the experts of a layer into parameters, which are not linears.
        experts = dict(
            target_modules=TARGETS[:4],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        )
        targets = experts if getattr(model.config, "num_experts", None) else dict(target_modules=TARGETS)
        config = LoraConfig(
            r=16, lora_alpha=32, bias=job.bias, use_dora=job.use_dora, task_type="CAUSAL_LM", **targets
        )
        model = get_peft_model(model, config)
    if job.checkpointing != "off":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def token_log_probs(model, ids, prompt):
    """Returns the log-probabilities of the tokens after the prompt. Logits exist for 1,024 tokens at a time."""
    from torch.utils.checkpoint import checkpoint

    base = model.get_base_model()
    hidden = base.model(input_ids=ids).last_hidden_state[:, prompt - 1 : -1]
    targets = ids[:, prompt:]

    def of_chunk(h, t):
        logits = (h @ base.lm_head.weight.T).float()
        return logits.gather(-1, t.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)

    chunks = zip(hidden.reshape(-1, hidden.shape[-1]).split(1024), targets.reshape(-1).split(1024))
    found = [checkpoint(of_chunk, h, t, use_reentrant=False) for h, t in chunks]
    return torch.cat(found).view(targets.shape)


def reference_log_probs(model, ids, prompt):
    with torch.no_grad(), model.disable_adapter():
        return token_log_probs(model, ids, prompt)


def sft_step(model, job, generator):
    ids = torch.randint(4, 2000, (job.batch, job.seq), generator=generator).cuda()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss


def dpo_step(model, job, generator):
    """A step of DPO, written by hand: the loss and reference of TRL's trainer without its data loader."""
    prompts = torch.randint(4, 2000, (job.batch // 2, job.prompt), generator=generator).repeat_interleave(2, 0)
    answers = torch.randint(4, 2000, (job.batch, job.seq - job.prompt), generator=generator)
    ids = torch.cat([prompts, answers], 1).cuda()
    reference = reference_log_probs(model, ids, job.prompt).sum(1)
    difference = token_log_probs(model, ids, job.prompt).sum(1) - reference
    loss = -torch.nn.functional.logsigmoid(0.1 * (difference[0::2] - difference[1::2])).mean()
    loss.backward()
    return loss


def grpo_step(model, job, generator, parts, new):
    """A step of GRPO, written by hand, with a constant reward; transformers' generate samples."""
    began = time.perf_counter()

    def lap(name):
        nonlocal began
        torch.cuda.synchronize()
        now = time.perf_counter()
        parts.setdefault(name, []).append(1e3 * (now - began))
        began = now

    prompts = torch.randint(4, 2000, (job.batch // job.generations, job.prompt), generator=generator)
    prompts = prompts.repeat_interleave(job.generations, 0).cuda()
    model.eval()
    with torch.no_grad():
        ids = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
            use_cache=True,
        )
    model.train()
    lap("sampling")
    rewards = torch.ones(job.batch // job.generations, job.generations)
    advantages = ((rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-4)).view(-1, 1).cuda()
    lap("scoring")
    micro = ids.split(job.batch // job.passes)
    references = [reference_log_probs(model, part, job.prompt) if job.beta else None for part in micro]
    lap("log-probabilities")
    total = 0.0
    for part, advantage, reference in zip(micro, advantages.split(job.batch // job.passes), references):
        log_probs = token_log_probs(model, part, job.prompt)
        loss = -(log_probs - log_probs.detach()).exp() * advantage
        if reference is not None:
            loss = loss + job.beta * ((reference - log_probs).exp() - (reference - log_probs) - 1)
        loss = loss.mean() / job.passes
        loss.backward()
        total = total + loss.detach()
    lap("update")
    return total


def main():
    global torch
    job = arguments()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    # Redirects the peers' output, so that stdout has only the line of JSON.
    out, sys.stdout = sys.stdout, sys.stderr
    if job.peer == "unsloth":
        import unsloth  # noqa: F401  (must precede torch and transformers)
    import torch

    write_tokenizer(job.weights)
    model = unsloth_model(job) if job.peer == "unsloth" else peft_model(job)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    generator = torch.Generator().manual_seed(1)
    times, losses, parts = [], [], {}
    if job.loss == "grpo":
        # A step of short completions warms up.
        grpo_step(model, job, generator, {}, 8)
        optimizer.zero_grad(set_to_none=True)
        job.warmup = 0
    for _ in range(job.warmup + job.steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        if job.loss == "grpo":
            loss = grpo_step(model, job, generator, parts, job.seq - job.prompt)
        else:
            loss = (dpo_step if job.loss == "dpo" else sft_step)(model, job, generator)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        losses.append(round(float(loss.detach()), 4))
    counted = sorted(times[job.warmup :])
    median = counted[len(counted) // 2]
    free, total = torch.cuda.mem_get_info()
    report = {
        "tokens_per_second": job.batch * job.seq / median,
        "ms_per_step": median * 1e3,
        "ms_fastest_step": counted[0] * 1e3,
        "device_gib": (total - free) / 2**30,
        "allocator_gib": torch.cuda.max_memory_allocated() / 2**30,
        "losses": losses,
        "parts_ms": {name: sorted(of_steps)[len(of_steps) // 2] for name, of_steps in parts.items()} or None,
    }
    print(json.dumps(report), file=out)


if __name__ == "__main__":
    main()
