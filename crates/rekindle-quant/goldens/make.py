"""Writes the goldens of rekindle-quant from bitsandbytes' CUDA backend.

    python make.py OUT_DIR

Needs a CUDA device, torch, numpy, safetensors and bitsandbytes 0.50.2. Every input is stored with the
output of bitsandbytes, so that the tests do not depend on a random generator. The values come from
numpy's PCG64 with the seeds below; running it again with the same versions writes the same bytes.

Files: four_bit.safetensors, dynamic.safetensors, int8.safetensors, int8_matmul.safetensors (tensors
"<case>.<field>" and "input.<name>"), goldens.json (versions and the list of cases).
"""

import json
import pathlib
import platform
import sys

import bitsandbytes as bnb
import bitsandbytes.functional as F
import numpy as np
import torch
from safetensors.torch import save_file

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
NF4_MIDPOINTS = [
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
    -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
    0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
]
FP4_MIDPOINTS = [1 / 384, 11 / 128, 5 / 24, 7 / 24, 5 / 12, 7 / 12, 5 / 6]


def normal(shape, seed, scale=0.02):
    """Returns weights of a magnitude typical of language models."""
    values = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape) * scale
    return torch.from_numpy(values.astype(np.float32))


def specials(dtype):
    """Blocks of 64 at the edges of the number format; the last one is short and odd."""
    info = torch.finfo(dtype)
    ramp = torch.linspace(-1, 1, 64, dtype=torch.float64)
    huge, tiny = (3e4, 1e-4) if dtype == torch.float16 else (1e30, 1e-30)
    blocks = [
        torch.zeros(64, dtype=torch.float64),
        -torch.zeros(64, dtype=torch.float64),
        ramp * huge,
        ramp * tiny,
        ramp * info.max,
        ramp * info.max / 4,
        ramp * info.tiny,
        ramp * info.tiny * 3,
        ramp * info.tiny / 8,
        torch.full((64,), 0.5, dtype=torch.float64),
        torch.full((64,), -info.tiny / 2, dtype=torch.float64),
        torch.cat([torch.tensor([1.0]), -torch.full((63,), float(info.tiny))]).double(),
        torch.cat([torch.tensor([1.0]), -torch.full((63,), 1e-7)]).double(),
        ramp**9 * 0.1,
        ramp[:23] * 0.3,
    ]
    return torch.cat(blocks).to(dtype)


def not_finite(dtype):
    """Returns blocks of 64 with infinities and NaNs among ordinary values."""
    base = torch.linspace(-1, 1, 64, dtype=torch.float64)
    rows = []
    for value in (float("inf"), float("-inf"), float("nan")):
        for at in (0, 37):
            row = base.clone()
            row[at] = value
            rows.append(row)
    rows.append(torch.full((64,), float("nan"), dtype=torch.float64))
    rows.append(torch.full((9,), float("nan"), dtype=torch.float64))
    return torch.cat(rows).to(dtype)


def threshold_sweep(midpoints, dtype):
    """Returns one block of 32 per mantissa of absmax, with values as close to the thresholds as the dtype allows."""
    if dtype == torch.float32:
        mantissa = np.random.Generator(np.random.PCG64(77)).integers(0, 2**23, 256) / 2.0**23
    else:
        bits = 10 if dtype == torch.float16 else 7
        mantissa = np.arange(2**bits) / 2.0**bits
    absmax = torch.from_numpy(1.0 + mantissa)
    points = torch.tensor([m * sign for m in midpoints for sign in (1, -1)], dtype=torch.float64)
    near = (absmax[:, None] * points[None, :]).to(dtype)
    after = torch.nextafter(near.float(), torch.tensor(float("inf"))) if dtype == torch.float32 else near
    rows = torch.cat([absmax[:, None].to(dtype), near, after.to(dtype)], dim=1)[:, :32]
    rows = torch.cat([rows, torch.zeros(rows.shape[0], 32 - rows.shape[1], dtype=dtype)], dim=1)
    return rows.contiguous()


def bytes_of(tensor):
    return tensor.detach().cpu().contiguous().view(torch.uint8).reshape(-1).clone()


class Golden:
    """The tensors of one file and its section of goldens.json."""

    def __init__(self):
        self.tensors, self.cases = {}, []

    def input(self, name, tensor):
        self.tensors[f"input.{name}"] = tensor.detach().cpu().contiguous().clone()
        return name, tensor

    def put(self, case, **fields):
        for field, tensor in fields.items():
            self.tensors[f"{case}.{field}"] = tensor.detach().cpu().contiguous().clone()


def four_bit():
    golden = Golden()

    def case(source, quant_type, blocksize, double, decoded, storage=torch.uint8):
        input_name, tensor = source
        name = f"{quant_type}_{blocksize}_{'double' if double else 'single'}_{input_name}_{str(storage)[6:]}"
        packed, state = F.quantize_4bit(
            tensor.cuda(), blocksize=blocksize, quant_type=quant_type, compress_statistics=double, quant_storage=storage
        )
        golden.put(name, packed=bytes_of(packed), absmax=state.absmax)
        parts = state.as_dict(packed=True)
        golden.put(name, quant_state=parts[f"quant_state.bitsandbytes__{quant_type}"], quant_map=parts["quant_map"])
        if double:
            golden.put(name, offset=state.offset.reshape(1), nested_absmax=state.state2.absmax)
            golden.tensors["nested_quant_map"] = parts["nested_quant_map"].cpu()
        if decoded:
            golden.put(name, decoded=F.dequantize_4bit(packed, state))
        golden.cases.append(
            {
                "name": name, "input": input_name, "quant_type": quant_type, "blocksize": blocksize,
                "double_quant": double, "quant_storage": str(storage)[6:], "packed_shape": list(packed.shape),
            }
        )

    for short, dtype in DTYPES.items():
        small = golden.input(f"small_{short}", normal((5, 311), 1).to(dtype))
        middle = golden.input(f"middle_{short}", normal((1, 2083), 2).to(dtype))
        large = golden.input(f"large_{short}", normal((3, 1375), 3).to(dtype))
        edge = golden.input(f"specials_{short}", specials(dtype))
        broken = golden.input(f"not_finite_{short}", not_finite(dtype))
        for quant_type in ("nf4", "fp4"):
            for blocksize in BLOCKSIZES:
                source = small if blocksize <= 1024 else middle if blocksize == 2048 else large
                for double in (False, True):
                    case(source, quant_type, blocksize, double, decoded=double or blocksize == 64)
            for blocksize in (32, 64, 128):
                case(edge, quant_type, blocksize, False, decoded=True)
                case(broken, quant_type, blocksize, False, decoded=True)
            midpoints = NF4_MIDPOINTS if quant_type == "nf4" else FP4_MIDPOINTS
            # Ratios of two f16 numbers lie on thresholds of FP4 but rarely on those of NF4, so fewer blocks suffice.
            rows = threshold_sweep(midpoints, dtype)[:: 4 if quant_type == "nf4" and short == "f16" else 1]
            sweep = golden.input(f"sweep_{quant_type}_{short}", rows.contiguous())
            case(sweep, quant_type, 32, False, decoded=False)

    # More than 256 block scales, hence several nested blocks, the last of them short.
    wide = golden.input("wide_bf16", normal((131, 137), 4).to(torch.bfloat16))
    case(wide, "nf4", 64, True, decoded=True)
    case(wide, "fp4", 32, True, decoded=False)
    even = golden.input("even_bf16", normal((6, 64), 5).to(torch.bfloat16))
    for storage in (torch.uint8, torch.bfloat16, torch.float16, torch.float32):
        case(even, "nf4", 64, True, decoded=True, storage=storage)
    return golden


def dynamic():
    golden = Golden()
    maps = {"signed": F.create_dynamic_map(signed=True), "unsigned": F.create_dynamic_map(signed=False)}
    for sign, code in maps.items():
        golden.tensors[f"map.{sign}"] = code

    def case(source, sign, blocksize, decoded):
        input_name, tensor = source
        name = f"{sign}_{blocksize}_{input_name}"
        codes, state = F.quantize_blockwise(tensor.cuda(), code=maps[sign].cuda(), blocksize=blocksize)
        golden.put(name, codes=codes.reshape(-1), absmax=state.absmax)
        if decoded:
            golden.put(name, decoded=F.dequantize_blockwise(codes, state))
        golden.cases.append({"name": name, "input": input_name, "map": sign, "blocksize": blocksize})

    for short, dtype in DTYPES.items():
        weights = golden.input(f"weights_{short}", normal((3, 1375), 6).to(dtype))
        squares = golden.input(f"squares_{short}", (normal((3, 1375), 7) ** 2).to(dtype))
        edge = golden.input(f"specials_{short}", specials(dtype))
        broken = golden.input(f"not_finite_{short}", not_finite(dtype))
        for blocksize in BLOCKSIZES[1:] if short == "f32" else (64, 256, 4096):
            decoded = blocksize == 256
            case(weights, "signed", blocksize, decoded)
            case(squares, "unsigned", blocksize, decoded)
        for sign in maps:
            case(edge, sign, 64, True)
            case(broken, sign, 64, True)
    # absmax = 1 makes the normalization exact, so that these values lie exactly on the midpoints.
    for sign, code in maps.items():
        ties = torch.cat([torch.ones(1), (code[1:] + code[:-1]) * 0.5])
        case(golden.input(f"midpoints_{sign}", ties), sign, 256, True)
    return golden


def int8():
    golden = Golden()

    def case(input_name, tensor, decoded=True):
        golden.input(input_name, tensor)
        half = tensor.cuda().to(torch.float16)
        codes, scb, _ = F.int8_vectorwise_quant(half)
        golden.put(input_name, codes=codes, SCB=scb)
        if decoded:
            golden.put(input_name, decoded=F.int8_vectorwise_dequant(codes, scb))
        golden.cases.append({"name": input_name, "input": input_name})

    for short, dtype in DTYPES.items():
        case(f"weights_{short}", normal((5, 311), 8).to(dtype))
        case(f"specials_{short}", torch.cat([specials(dtype), torch.zeros(41, dtype=dtype)]).reshape(-1, 32))
        case(f"not_finite_{short}", not_finite(dtype)[: 7 * 64].reshape(7, 64))
    # Half-integer codes: every mantissa of an f16 absmax against values at (k + 1/2) / 127 of it.
    halves = [(k + 0.5) / 127 for k in range(3, 127, 8)]
    case("sweep_f16", threshold_sweep(halves[:15], torch.float16), decoded=False)
    return golden


def activations(shape, seed, dtype, outliers=()):
    """Returns bell-shaped hidden states below 6 with the given `outliers` (row, column, value)."""
    values = normal(shape, seed, scale=1.0).clamp(-5.5, 5.5)
    for row, column, value in outliers:
        values[row, column] = value
    return values.to(dtype)


def int8_matmul():
    golden = Golden()

    def case(name, x, out_features, threshold=6.0, product=True):
        golden.input(name, x)
        x = x.cuda()
        weight = normal((out_features, x.shape[1]), 1000 + out_features).cuda().to(torch.float16)
        codes, scb, _ = F.int8_vectorwise_quant(weight)
        x_codes, x_scale, columns = F.int8_vectorwise_quant(x.to(torch.float16), threshold=threshold)
        golden.put(name, CB=codes, SCB=scb, CA=x_codes, SCA=x_scale)
        if columns is not None:
            golden.put(name, columns=columns)
        if product:
            state = bnb.MatmulLtState()
            state.CB, state.SCB, state.has_fp16_weights, state.is_training = codes, scb, False, False
            golden.put(name, out=bnb.matmul(x, codes, state=state, threshold=threshold))
        golden.cases.append({"name": name, "input": name, "threshold": threshold})

    few = [(0, 3, 7.25), (2, 40, -60.0), (4, 3, 6.0), (1, 17, -5.996), (3, 61, 30.0)]
    for short, dtype in DTYPES.items():
        case(f"plain_{short}", activations((7, 96), 11, dtype), 36)
        case(f"few_{short}", activations((5, 64), 12, dtype, few), 48)
        # A size that cuBLASLt does not support; bitsandbytes multiplies the codes in f32.
        case(f"odd_{short}", activations((5, 311), 13, dtype, [(4, 310, 9.5), (0, 0, -6.25)]), 17)
        case(f"no_decomposition_{short}", activations((4, 128), 14, dtype, [(1, 5, 20.0)]), 24, threshold=0.0)
    half = torch.float16
    case("one_token", activations((1, 1024), 15, half, [(0, c, 8.0 + c / 64) for c in range(5, 1024, 97)]), 40)
    case("every_column", activations((3, 160), 16, half, [(1, c, 6.0 + c / 16) for c in range(160)]), 32)
    case("low_threshold", activations((6, 256), 17, half), 32, threshold=2.5)
    # Sums of products beyond 2^24, which f32 rounds.
    case("wide", activations((3, 4096), 18, half, [(2, 4095, 31.0)]) * 0.25 + 3.0, 12)
    case("long", activations((70, 512), 19, half, [(r, 100, 50.0 - r) for r in range(70)]), 68)
    edges = activations((8, 64), 20, half, [(0, 9, 6.0), (0, 10, -6.0), (0, 11, 5.996)])
    edges[1] = 0.0
    edges[2] = -0.0
    edges[3] *= 2.0**-24
    edges[4, 7] = float("inf")
    edges[5, 8] = float("nan")
    edges[6] = float("nan")
    edges[7] = 6.5
    case("edges", edges[:7].contiguous(), 8, product=False)
    case("edges_every_column", edges.contiguous(), 8, product=False)
    case("edges_no_decomposition", edges.contiguous(), 8, threshold=0.0, product=False)
    return golden


def main():
    out = pathlib.Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    index = {
        "bitsandbytes": bnb.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    for name, make in (("four_bit", four_bit), ("dynamic", dynamic), ("int8", int8), ("int8_matmul", int8_matmul)):
        golden = make()
        save_file(golden.tensors, out / f"{name}.safetensors")
        index[name] = golden.cases
    (out / "goldens.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main()
