"""Writes codec.safetensors: blocks of llama.cpp's quantizers and the values of its decoders.

    python make.py LIBGGML_BASE [OUT] [ROWS_OF_EACH_KIND]

LIBGGML_BASE is libggml-base.so, built from the llama.cpp sources in the source distribution of the PyPI package
llama-cpp-python (vendor/llama.cpp, target ggml-base, x86-64 without -march flags, so that no multiply-add is fused).
Needs numpy and safetensors. Values come from numpy's PCG64 with a fixed seed; the same versions write the same bytes.

Tensors: "input" [rows, 512] f32; "importance" [512] f32; TYPE u8: the quantized rows; TYPE.importance u8: those with
importances; TYPE.decoded f32 [2, 512]: the decoded first rows; TYPE.random u8 and TYPE.random_decoded f32: blocks of
random bytes with finite factors.
"""

import ctypes
import pathlib
import sys

import numpy as np
from safetensors.numpy import save_file

COLUMNS = 512
VERSIONS = {"llama-cpp-python": "0.3.36"}
# Number, elements and bytes of a block, offsets of f16 factors, True if importances have an effect.
TYPES = {
    "F16": (1, 1, 2, [0], False),
    "BF16": (30, 1, 2, [], False),
    "Q8_0": (8, 32, 34, [0], False),
    "Q4_0": (2, 32, 18, [0], True),
    "Q4_1": (3, 32, 20, [0, 2], True),
    "Q5_0": (6, 32, 22, [0], True),
    "Q5_1": (7, 32, 24, [0, 2], True),
    "Q2_K": (10, 256, 84, [80, 82], True),
    "Q3_K": (11, 256, 110, [108], True),
    "Q4_K": (12, 256, 144, [0, 2], True),
    "Q5_K": (13, 256, 176, [0, 2], True),
    "Q6_K": (14, 256, 210, [208], True),
    "IQ4_NL": (20, 32, 18, [0], True),
    "MXFP4": (39, 32, 17, [], False),
}


class Traits(ctypes.Structure):
    """The beginning of ggml_type_traits."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


def rows(generator, count):
    """Rows that reach every branch of the quantizers."""
    normal = lambda: generator.standard_normal(COLUMNS)
    ramp = np.linspace(-1, 1, COLUMNS)
    blocks = np.repeat(np.arange(16), 32)
    kinds = [
        lambda: normal() * 0.02,
        lambda: normal() ** 3 * 0.01,
        lambda: np.abs(normal()) * 0.05,
        lambda: -np.abs(normal()) - 0.5,
        lambda: np.where(generator.random(COLUMNS) < 0.02, normal() * 20, normal() * 0.01),
        lambda: normal() * 3e-7,
        lambda: normal() * np.where(blocks % 3 == 0, 0, 10.0 ** (blocks % 8 - 6)),
        lambda: np.round(ramp * 32) * generator.choice([0.25, 0.1, 3.0]),
        lambda: np.concatenate([[0.5] * 32, [-0.25] * 32, [0, 1] * 16, [1, -1] * 16, ramp[:384] ** 9]),
        lambda: np.ldexp(1.0, blocks % 8 - 4) * np.where(np.arange(COLUMNS) % 32 == 5, 1 - 2.0**-24, normal() * 0.2),
    ]
    return np.stack([kind() for kind in kinds for _ in range(count)]).astype(np.float32)


def main():
    library = ctypes.CDLL(sys.argv[1])
    out = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else pathlib.Path(__file__).parent / "codec.safetensors"
    count = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    library.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]

    generator = np.random.Generator(np.random.PCG64(20))
    values = rows(generator, count)
    importance = (generator.random(COLUMNS) ** 4 * 10).astype(np.float32)
    importance[::37] = 0
    tensors = {"input": values, "importance": importance}

    def decode(number, data, elements):
        decoded = np.empty(elements, np.float32)
        library.ggml_get_type_traits(number).contents.to_float(data.ctypes.data, decoded.ctypes.data, elements)
        return decoded

    for name, (number, block, size, factors, weighted) in TYPES.items():
        row = COLUMNS // block * size

        def quantize(weights):
            data = np.empty(len(values) * row, np.uint8)
            written = library.ggml_quantize_chunk(
                number, values.ctypes.data, data.ctypes.data, 0, len(values), COLUMNS, weights
            )
            assert written == data.size
            return data

        tensors[name] = quantize(None)
        if weighted:
            tensors[f"{name}.importance"] = quantize(importance.ctypes.data)
        tensors[f"{name}.decoded"] = decode(number, tensors[name][: 2 * row], 2 * COLUMNS)
        blocks = max(1, 256 // block)
        random = generator.integers(0, 256, (blocks, size), dtype=np.uint8)
        for at in factors:
            random[:, at : at + 2] = (generator.standard_normal(blocks) * 0.1).astype(np.float16).view(np.uint8).reshape(-1, 2)
        if name == "BF16":
            random[:, 1] &= 0xBF
        if name == "MXFP4":
            random[:, 0] = np.arange(blocks) * 31
        tensors[f"{name}.random"] = random.reshape(-1)
        tensors[f"{name}.random_decoded"] = decode(number, tensors[f"{name}.random"], blocks * block)
    save_file(tensors, out, metadata=VERSIONS)


main()
