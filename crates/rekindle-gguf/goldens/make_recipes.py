"""Writes recipes.json: the tensor types that llama-quantize chooses for small models.

    python make_recipes.py LLAMA_CPP_PYTHON LIBRARIES

LLAMA_CPP_PYTHON is the unpacked source distribution of the PyPI package llama-cpp-python 0.3.36, and LIBRARIES the
directory with libllama.so built from its vendor/llama.cpp. Needs numpy, gguf 0.19.0 and the requirements of the
package.

For each model, its properties and for each file type the types of its tensors by name without "blk.N.": one word
"TYPE*COUNT" for each run of layers of the same type. "shapes" are those of one layer.
"""

import ctypes
import itertools
import json
import os
import pathlib
import sys
import tempfile

os.environ["LLAMA_CPP_LIB_PATH"] = sys.argv[2]
sys.path.insert(0, sys.argv[1])

import gguf  # noqa: E402
import llama_cpp.llama_cpp as llama  # noqa: E402
import numpy as np  # noqa: E402

MODELS = [
    {"layers": 8, "heads": 8, "kv_heads": 2, "tied": True},
    {"layers": 20, "heads": 8, "kv_heads": 4, "tied": False},
    {"layers": 33, "heads": 4, "kv_heads": 4, "tied": False},
    {"layers": 80, "heads": 8, "kv_heads": 1, "tied": False},
    {"layers": 9, "heads": 8, "kv_heads": 2, "tied": False, "width": 96},
    {"layers": 3, "heads": 8, "kv_heads": 2, "tied": True, "width": 40},
]
FILE_TYPES = {
    "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12,
    "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25, "bf16": 32,
}  # fmt: skip


def write(path, model):
    width, ff = model.get("width", 256), model.get("width", 256)
    heads, kv = model["heads"], model["kv_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(model["layers"])
    writer.add_feed_forward_length(ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(32)
    random = np.random.default_rng(0)
    matrix = lambda rows, columns: (random.standard_normal((rows, columns)) * 0.02).astype(np.float32)
    shapes = {"token_embd.weight": (8, width), "output_norm.weight": (width,)}
    if not model["tied"]:
        shapes["output.weight"] = (8, width)
    for i in range(model["layers"]):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (width,),
            f"blk.{i}.attn_q.weight": (8, width),
            f"blk.{i}.attn_k.weight": (8, width),
            f"blk.{i}.attn_v.weight": (8, width),
            f"blk.{i}.attn_output.weight": (8, width),
            f"blk.{i}.ffn_norm.weight": (width,),
            f"blk.{i}.ffn_gate.weight": (8, width),
            f"blk.{i}.ffn_up.weight": (8, width),
            f"blk.{i}.ffn_down.weight": (8, ff),
        }
    for name, shape in shapes.items():
        writer.add_tensor(name, matrix(*shape) if len(shape) == 2 else np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return shapes


def runs(types, tensor, layers):
    if tensor in types:
        return types[tensor]
    of_layers = [types[f"blk.{i}.{tensor}"] for i in range(layers)]
    return " ".join(f"{kind}*{len(list(group))}" for kind, group in itertools.groupby(of_layers))


def main():
    llama.llama_backend_init()
    result = {"version": "llama-cpp-python 0.3.36", "models": []}
    for model in MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            source, target = os.path.join(scratch, "f32.gguf"), os.path.join(scratch, "out.gguf")
            shapes = write(source, model)
            once = {name.removeprefix("blk.0."): list(shape) for name, shape in shapes.items() if "blk." not in name or "blk.0." in name}
            entry = {**model, "shapes": once, "types": {}}
            for name, number in FILE_TYPES.items():
                params = llama.llama_model_quantize_default_params()
                params.ftype, params.nthread = number, 1
                status = llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
                assert status == 0, (model, name)
                types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(target).tensors}
                entry["types"][name] = {tensor: runs(types, tensor, model["layers"]) for tensor in once}
            result["models"].append(entry)
    path = pathlib.Path(__file__).parent / "recipes.json"
    path.write_text(json.dumps(result, separators=(",", ":")) + "\n")


main()
