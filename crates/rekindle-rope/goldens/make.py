"""Writes rope.json: inverse frequencies and attention factors of transformers over a grid.

    python crates/rekindle-rope/goldens/make.py

Needs torch and transformers 5. The output is deterministic. Each case lists the same configuration in the layouts of
transformers 5 (`rope_parameters`) and transformers 4 (`rope_scaling` next to `rope_theta`); the script asserts that
transformers reads both alike. Sequence lengths with the same result share one entry of `results`.
"""

import json
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding

HEAD_DIMS = [80, 128]
THETAS = [10000.0, 1000000.0]
WINDOW = 2048  # max_position_embeddings
ORIGINAL = 512  # original_max_position_embeddings
SEQ_LENS = [256, 512, 513, 2048, 3001, 8192]


def ramp(count, first, last):
    """Returns made-up per-dimension factors like those in a longrope checkpoint."""
    return [round(first + (last - first) * i / (count - 1), 6) for i in range(count)]


def variants(head_dim):
    """Yields (name, rope parameters without theta, keys next to them in the configuration)."""
    half = head_dim // 2
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
    llama3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    longrope = {
        "rope_type": "longrope",
        "short_factor": ramp(half, 1.0, 1.5),
        "long_factor": ramp(half, 1.0, 24.0),
    }
    yield "default", {"rope_type": "default"}, {}
    yield "default, partial 0.5", {"rope_type": "default", "partial_rotary_factor": 0.5}, {}
    yield "linear", {"rope_type": "linear", "factor": 4.0}, {}
    yield "linear, partial 0.25", {"rope_type": "linear", "factor": 2.5, "partial_rotary_factor": 0.25}, {}
    yield "dynamic", {"rope_type": "dynamic", "factor": 4.0}, {}
    yield "dynamic, partial 0.5", {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.5}, {}
    yield "yarn", yarn, {}
    yield "yarn, original window not given", {"rope_type": "yarn", "factor": 4.0}, {}
    yield "yarn, factor from the windows", {**yarn, "factor": None}, {}
    yield "yarn, both mscales", {**yarn, "mscale": 1.0, "mscale_all_dim": 0.8}, {}
    yield "yarn, mscale alone", {**yarn, "mscale": 0.707}, {}
    yield "yarn, mscale zero", {**yarn, "mscale": 0.0, "mscale_all_dim": 1.0}, {}
    yield "yarn, not truncated", {**yarn, "truncate": False}, {}
    yield "yarn, attention_factor", {**yarn, "attention_factor": 1.3}, {}
    yield "yarn, betas", {**yarn, "beta_fast": 16, "beta_slow": 2}, {}
    yield "yarn, partial 0.5", {**yarn, "partial_rotary_factor": 0.5}, {}
    yield "llama3", {**llama3, "factor": 8.0, "original_max_position_embeddings": ORIGINAL}, {}
    yield "llama3, factor 32", {**llama3, "factor": 32.0, "original_max_position_embeddings": 1024}, {}
    yield "longrope", {**longrope, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}, {}
    yield "longrope, factor from the windows", longrope, {"original_max_position_embeddings": ORIGINAL}
    yield (
        "longrope, attention_factor",
        {**longrope, "attention_factor": 1.2, "original_max_position_embeddings": ORIGINAL},
        {},
    )


def spellings(parameters, beside, theta):
    window = {"max_position_embeddings": WINDOW, **beside}
    five = {**window, "rope_parameters": {**parameters, "rope_theta": theta}}
    scaling = dict(parameters)
    four = {**window, "rope_theta": theta}
    if "partial_rotary_factor" in scaling:
        four["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    scaling["type"] = scaling.pop("rope_type")
    four["rope_scaling"] = None if scaling == {"type": "default"} else scaling
    return [five, four]


def compute(spelling, rope_type, head_dim, seq_len):
    # A config keeps and modifies the dictionaries it is given.
    spelling = json.loads(json.dumps(spelling))
    config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, **spelling)
    if rope_type == "default":
        # Llama's function for the default type has no partial rotation; GLM's is the same with it.
        inv_freq, attention_factor = GlmRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](config, seq_len=seq_len)
    assert inv_freq.dtype == torch.float32
    # Nine significant digits identify a float32.
    return {"attention_factor": float(attention_factor), "inv_freq": [float(f"{x:.9g}") for x in inv_freq.tolist()]}


def case(name, parameters, beside, head_dim, theta):
    five, four = spellings(parameters, beside, theta)
    results = []
    for seq_len in SEQ_LENS:
        result = compute(five, parameters["rope_type"], head_dim, seq_len)
        assert result == compute(four, parameters["rope_type"], head_dim, seq_len), name
        if results and {k: results[-1][k] for k in result} == result:
            results[-1]["seq_lens"].append(seq_len)
        else:
            results.append({"seq_lens": [seq_len], **result})
    return {"name": name, "head_dim": head_dim, "configs": [five, four], "results": results}


def main():
    cases = [
        case(name, parameters, beside, head_dim, theta)
        for head_dim in HEAD_DIMS
        for theta in THETAS
        for name, parameters, beside in variants(head_dim)
    ]
    versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    lines = ",\n".join(json.dumps(c) for c in cases)
    path = Path(__file__).with_name("rope.json")
    path.write_text(f'{{"versions": {json.dumps(versions)},\n"cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
