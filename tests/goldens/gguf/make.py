"""Writes converted.json: the GGUF files that llama.cpp's converter makes of the small checkpoints in ../families, beside
and here (checkpoints.py).

    python make.py LLAMA_CPP

LLAMA_CPP is the source tree of llama.cpp in the source distribution of the PyPI package llama-cpp-python 0.3.36
(vendor/llama.cpp); its convert_hf_to_gguf.py is used with f32 output and without a vocabulary. Needs torch,
transformers and the requirements of the converter.

For each checkpoint: "metadata" (numbers, strings and lists by key) and "tensors" (shape and SHA-256 of the data by name:
of the values in f32, or of the blocks of MXFP4), or "refused" with the converter's error.
"""

import hashlib
import json
import pathlib
import shutil
import sys
import tempfile

root = pathlib.Path(__file__).resolve().parent.parent
llama_cpp = pathlib.Path(sys.argv[1]).resolve()
sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]

import gguf  # noqa: E402
import conversion.base as base  # noqa: E402
from conversion import get_model_class  # noqa: E402

VERSION = "llama-cpp-python 0.3.36"
# Keys that depend on the vocabulary, the directory's name or the version of the converter.
SKIPPED = ("general.", "tokenizer.", "GGUF.")


def value_of(field):
    value = field.contents()
    return value if not hasattr(value, "tolist") else value.tolist()


def digest(tensor):
    is_float = tensor.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
    data = tensor.data.astype("float32") if is_float else tensor.data
    return hashlib.sha256(data.tobytes()).hexdigest()


def convert(directory, out):
    hparams = base.ModelBase.load_hparams(directory, False)
    architecture = base.get_model_architecture(hparams, base.ModelType.TEXT)
    cls = get_model_class(architecture)
    if getattr(cls, "supports_mtp_export", False):
        # The layers that predict further tokens are not exported.
        cls.no_mtp = True
    model = cls(directory, gguf.LlamaFileType.ALL_F32, out)
    for part in (model, getattr(model, "impl", model)):
        part.set_vocab = lambda: None
    model.write()


def main():
    result = {"version": VERSION, "checkpoints": {}}
    directories = [*sorted(root.glob("families/*")), *sorted(root.glob("*")), *sorted(root.glob("gguf/*"))]
    for directory in directories:
        if not (directory / "config.json").exists() or not list(directory.glob("*.safetensors")):
            continue
        name = str(directory.relative_to(root))
        with tempfile.TemporaryDirectory() as scratch:
            out = pathlib.Path(scratch) / "model.gguf"
            copy = pathlib.Path(scratch) / directory.name
            shutil.copytree(directory, copy)
            # The converter counts the tokens of Gemma 3.
            config = json.loads((copy / "config.json").read_text())
            text = config.get("text_config") or config
            if text["model_type"].startswith("qwen3_5"):
                # Text takes the rotary pairs of the three axes in turn.
                pairs = int(text["head_dim"] * text["rope_parameters"]["partial_rotary_factor"]) // 2
                text["rope_parameters"]["mrope_section"] = [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3]
                (copy / "config.json").write_text(json.dumps(config))
            rows = text["vocab_size"]
            vocabulary = {str(i): i for i in range(rows)}
            (copy / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
            try:
                convert(copy, out)
            except Exception as error:
                result["checkpoints"][name] = {"refused": type(error).__name__}
                print(name, "refused", repr(error)[:150])
                continue
            reader = gguf.GGUFReader(out)
            metadata = {k: value_of(f) for k, f in reader.fields.items() if not k.startswith(SKIPPED)}
            tensors = {t.name: [[int(n) for n in reversed(t.shape)], digest(t)] for t in reader.tensors}
            result["checkpoints"][name] = {
                "architecture": value_of(reader.fields["general.architecture"]),
                "metadata": metadata,
                "tensors": tensors,
            }
            print(name, len(tensors))
    path = pathlib.Path(__file__).parent / "converted.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


main()
