"""Measures PyTorch for the rows of `cargo xtask bench kernels`; prints milliseconds as one line of JSON.

An argument names the part to measure. The gated delta rule is that of flash-linear-attention, where it is installed.
"""

import json
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

TOKENS, HIDDEN, INTERMEDIATE, VOCAB = 8192, 2560, 9728, 151936
PRODUCTS = [
    (TOKENS, 2 * INTERMEDIATE, HIDDEN),
    (TOKENS, HIDDEN, INTERMEDIATE),
    (TOKENS, 6144, HIDDEN),
    (TOKENS, HIDDEN, 4096),
    (512, VOCAB, HIDDEN),
    (8192, 8192, 8192),
]

EXPERTS = [(128, 1536, 2048), (128, 2048, 768), (32, 5760, 2880)]
EXPERT_ROWS = 65536


def milliseconds(run, runs=20):
    for _ in range(3):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(runs):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / runs


def kernel_milliseconds(run, runs=20):
    """Returns the time in kernels alone, which the host queues more slowly than they run."""
    for _ in range(3):
        run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(runs):
            run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / runs / 1e3


def noise(*shape):
    return torch.rand(*shape, device="cuda", dtype=torch.bfloat16) * 2 - 1


def attention(report):
    """Returns the faster of cuDNN's attention and FlashAttention 2."""
    shapes = [("", 32, 8, 128, 4, 2048), ("", 32, 8, 128, 1, 8192), ("", 32, 8, 128, 1, 32768)]
    shapes += [(", Gemma-3-4B full", 8, 4, 256, 4, 2048)]
    for model, heads, kv_heads, head_dim, documents, length in shapes:
        q = noise(documents, heads, length, head_dim).requires_grad_()
        k, v = (noise(documents, kv_heads, length, head_dim).requires_grad_() for _ in range(2))
        d_o = noise(documents, heads, length, head_dim)
        forward, backward = [], []
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            with sdpa_kernel(backend):

                def run():
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

                with torch.no_grad():
                    forward.append(milliseconds(run))
                o = run()
                backward.append(milliseconds(lambda: torch.autograd.grad(o, (q, k, v), d_o, retain_graph=True)))
        report[f"attention forward {documents} x {length}{model}"] = min(forward)
        report[f"attention backward {documents} x {length}{model}"] = min(backward)


def experts(report):
    for experts, n, k in EXPERTS:
        hashes = torch.arange(EXPERT_ROWS) * 2654435761 % 2**32 // 2**16
        ends = torch.bincount(hashes % experts, minlength=experts).cumsum(0).to("cuda", torch.int32)
        x, w, dy = noise(EXPERT_ROWS, k), noise(experts, n, k), noise(EXPERT_ROWS, n)
        name = f"{experts} experts"
        nt = milliseconds(lambda: torch._grouped_mm(x, w.transpose(1, 2), offs=ends))
        report[f"grouped nt {n} x {k}, {name}"] = nt
        report[f"grouped nn {k} x {n}, {name}"] = milliseconds(lambda: torch._grouped_mm(dy, w, offs=ends))
        report[f"grouped tn {n} x {k}, {name}"] = milliseconds(lambda: torch._grouped_mm(dy.t(), x, offs=ends))


def products(report):
    for m, n, k in PRODUCTS:
        x, w, dy = noise(m, k), noise(n, k), noise(m, n)
        report[f"product nt {m} x {n} x {k}"] = milliseconds(lambda: x @ w.t())
        report[f"product nn {m} x {k} x {n}"] = milliseconds(lambda: dy @ w)


def bandwidth(report):
    large = noise(8 * TOKENS, 16 * 1024)
    target = torch.empty_like(large)
    report["copy"] = milliseconds(lambda: target.copy_(large))


def delta(report):
    """The chunked kernels, with the gates and the norms of queries and keys in them."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return
    key_heads, value_heads, channels = 16, 32, 128
    q, k = (noise(1, TOKENS, key_heads, channels).requires_grad_() for _ in range(2))
    v = noise(1, TOKENS, value_heads, channels).requires_grad_()
    a, b = (noise(1, TOKENS, value_heads).requires_grad_() for _ in range(2))
    a_log, dt_bias = (noise(value_heads).float().requires_grad_() for _ in range(2))
    ends = torch.arange(5, device="cuda") * (TOKENS // 4)
    ends_on_host = ends.cpu()
    d_o = noise(1, TOKENS, value_heads, channels)

    def run():
        return chunk_gated_delta_rule(
            q, k, v, a, b, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, A_log=a_log, dt_bias=dt_bias,
            use_beta_sigmoid_in_kernel=True, cu_seqlens=ends, cu_seqlens_cpu=ends_on_host,
        )[0]

    with torch.no_grad():
        report["gated delta rule forward 4 x 2048"] = kernel_milliseconds(run)
    o = run()
    operands = (q, k, v, a, b, a_log, dt_bias)
    backward = kernel_milliseconds(lambda: torch.autograd.grad(o, operands, d_o, retain_graph=True))
    report["gated delta rule backward 4 x 2048"] = backward


PARTS = [attention, products, experts, bandwidth, delta]


def main():
    report = {}
    for part in PARTS:
        if not sys.argv[1:] or part.__name__ == sys.argv[1]:
            part(report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
