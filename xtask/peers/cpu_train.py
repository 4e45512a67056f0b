"""LoRA training on the CPU with PyTorch, transformers and PEFT: the peer of `cargo xtask bench cpu`.

    python xtask/peers/cpu_train.py [--steps 8] [--warmup 2] [--threads 2]

A Qwen3 shape with random weights and random tokens, float32, LoRA on the seven linears of every block, AdamW, no
recomputation, fused (sdpa) attention. Prints one JSON line: tokens/s and ms of the median step after the warm-up,
ms of the fastest, peak resident memory, losses, versions.
"""

import argparse
import json
import platform
import resource
import statistics
import time

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config

BATCH, TOKENS, VOCAB_SIZE = 4, 256, 8192


def main():
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    model = build()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    losses, seconds = [], []
    for _ in range(arguments.warmup + arguments.steps):
        # New tokens each step, as from a data loader.
        ids = torch.randint(VOCAB_SIZE, (BATCH, TOKENS))
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[arguments.warmup :])
    print(json.dumps({
        "tokens_per_second": round(BATCH * TOKENS / median, 1),
        "ms_per_step": round(1e3 * median, 1),
        "ms_fastest_step": round(1e3 * min(seconds[arguments.warmup :]), 1),
        "peak_rss_mib": round(peak_rss_mib(), 1),
        "losses": losses,
        "threads": torch.get_num_threads(),
        "steps": arguments.steps,
        "warmup": arguments.warmup,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }))


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8, help="measured steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the measurement")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def build():
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
    return model.train()


def peak_rss_mib():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return peak / 2**20 if platform.system() == "Darwin" else peak / 2**10


if __name__ == "__main__":
    main()
