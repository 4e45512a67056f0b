"""Compares the token ids of llama.cpp for exported tokenizers with those of the package tokenizers.

    python llama_tokens.py REKINDLE LLAMA_CPP_PYTHON LIBRARIES TOKENIZER ...

REKINDLE, LLAMA_CPP_PYTHON and LIBRARIES are those of llama_logits.py. Each TOKENIZER is a directory with tokenizer.json, and
tokenizer_config.json if it has one. The 200 texts of tokenizers.json are encoded. Needs tokenizers, torch and transformers.
"""

import ctypes
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unicodedata

import tokenizers
import transformers

rekindle, package, libraries = sys.argv[1:4]
os.environ["LLAMA_CPP_LIB_PATH"] = libraries
sys.path.insert(0, package)
import llama_cpp.llama_cpp as llama  # noqa: E402

texts = json.loads((pathlib.Path(__file__).parent / "tokenizers.json").read_text())["texts"]


@llama.llama_log_callback
def quiet(level, text, data):
    if level == 4:
        sys.stderr.write(text.decode(errors="replace"))


llama.llama_log_set(quiet, ctypes.c_void_p(0))


def export(directory, scratch):
    """A model of a few weights with the tokenizer, as GGUF."""
    model = scratch / "model"
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    rows = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    sizes = {"hidden_size": 8, "intermediate_size": 8, "head_dim": 8}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = transformers.Qwen3Config(vocab_size=rows, tie_word_embeddings=True, **sizes, **heads)
    transformers.Qwen3ForCausalLM(config).save_pretrained(model)
    for name in ["tokenizer.json", "tokenizer_config.json"]:
        if (directory / name).exists():
            shutil.copy(directory / name, model / name)
    command = [rekindle, "export", "gguf", str(model), "--quant", "f16", "--out", str(scratch), "--name", "vocabulary"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tokenizer, scratch / "vocabulary-F16.gguf"


for directory in map(pathlib.Path, sys.argv[4:]):
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer, path = export(directory, pathlib.Path(scratch))
        options = llama.llama_model_default_params()
        options.vocab_only = True
        model = llama.llama_model_load_from_file(str(path).encode(), options)
        assert model, path
        vocabulary = llama.llama_model_get_vocab(model)
        differing = []
        for text in texts:
            data = text.encode()
            ids = (ctypes.c_int32 * (2 * len(data) + 16))()
            count = llama.llama_tokenize(vocabulary, data, len(data), ids, len(ids), False, True)
            if list(ids[:count]) != tokenizer.encode(text, add_special_tokens=False).ids:
                differing.append(text)
        composed = sum(unicodedata.normalize("NFC", text) == text for text in differing)
        print(f"{directory.name}: {len(texts) - len(differing)} of {len(texts)} equal; {composed} others are in NFC")
        for text in differing[:3]:
            print("   ", repr(text[:70]))
