"""Makes expect.json: losses of transformers at positions beyond the window, with every RoPE scaling.

    python -B tests/goldens/rope/make.py [OUT]        OUT defaults to this file's directory

The weights are those of ../qwen3-tied; each case gives its config.json another window, theta and scaling. A case has
`native`, what the model says of itself; `choice` and `length`, what is asked for; and what transformers computes

- in `asked`, with the parameters that the choice stands for and rows of exactly `length` tokens, where a scaling that
  looks at the batch (dynamic, longrope) sees that length;
- in `written`, with parameters that give the same for rows of every length, which is what a result's config.json needs.

Both sets of parameters are made here from the equations, not by Rekindle. Needs torch and transformers 5.
"""

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch  # noqa: E402
import transformers  # noqa: E402
from make import deterministic, evaluate, write_json  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen3Config  # noqa: E402

SEED = 20265
BASE = Path(__file__).parent.parent / "qwen3-tied"
WINDOW = 32
THETA = 5000.0
HEAD_DIM = 24
PLAIN = {"rope_type": "default", "rope_theta": THETA}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": THETA, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": THETA, "factor": 2.0, "original_max_position_embeddings": 16}
LONG_FACTOR = [1.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0, 2.0, 2.0, 2.5]
LONGROPE = {
    "rope_type": "longrope", "rope_theta": THETA, "factor": 2.0, "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 12, "long_factor": LONG_FACTOR,
}


def unscaled_base(theta):
    return {"rope_type": "default", "rope_theta": theta}


def dynamic_theta(factor, growth):
    return THETA * (factor * growth - (factor - 1)) ** (HEAD_DIM / (HEAD_DIM - 2))


def cases():
    """Yields native parameters, choice, length, what transformers is asked for, its window, what is to be written."""
    for growth in (2, 4):
        length, factor = growth * WINDOW, float(growth)
        linear = {**PLAIN, "rope_type": "linear", "factor": factor}
        yield PLAIN, "linear", length, linear, WINDOW, linear
        dynamic = {**PLAIN, "rope_type": "dynamic", "factor": factor}
        yield PLAIN, "dynamic", length, dynamic, WINDOW, unscaled_base(dynamic_theta(factor, growth))
        yarn = {**PLAIN, "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": WINDOW}
        yield PLAIN, "yarn", length, yarn, WINDOW, yarn
    length = 2 * WINDOW
    wider = {**LLAMA3, "factor": 8.0}
    yield LLAMA3, "auto", length, wider, length, wider
    wider = {**YARN, "factor": 4.0}
    yield YARN, "auto", length, wider, length, wider
    stretched = [x * 2 ** min(max(math.log(x) / math.log(2.0), 0.0), 1.0) for x in LONG_FACTOR]
    wider = {**LONGROPE, "factor": 4.0, "long_factor": stretched}
    yield LONGROPE, "auto", length, wider, length, {**wider, "short_factor": stretched}
    dynamic = {**PLAIN, "rope_type": "dynamic", "factor": 3.0}
    yield dynamic, "auto", length, dynamic, WINDOW, unscaled_base(dynamic_theta(3.0, 2))
    table = {"rope_type": "yarn", "factor": 6.0, "original_max_position_embeddings": 16, "beta_fast": 16.0}
    yield LLAMA3, table, length, {**table, "rope_theta": THETA}, length, {**table, "rope_theta": THETA}


def load(window, parameters):
    settings = json.loads((BASE / "config.json").read_text())
    # A config keeps and edits the dictionaries that it is given.
    parameters = json.loads(json.dumps(parameters))
    config = Qwen3Config(**{**settings, "max_position_embeddings": window, "rope_parameters": parameters})
    # Frequencies are made when a model is, so it is made anew for every case.
    return AutoModelForCausalLM.from_pretrained(
        BASE, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def rows(lengths, generator, vocab_size=131):
    drawn = [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def main():
    out = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    deterministic()
    generator = torch.Generator().manual_seed(SEED)
    found = []
    for native, choice, length, asked, asked_window, written in cases():
        whole, mixed = rows([length, length], generator), rows([length, 7, WINDOW - 5], generator)
        case = {"native": native, "window": WINDOW, "choice": choice, "length": length}
        for key, sample, window, parameters in (
            ("asked", whole, asked_window, asked), ("written", mixed, length, written)
        ):
            losses = [evaluate(load(window, parameters), [row])[0] for row in sample]
            inputs = [row["input_ids"] for row in sample]
            case[key] = {"rope_parameters": parameters, "input_ids": inputs, "rows": losses}
        # A reader that drops the scaling is far from this.
        plain = evaluate(load(length, PLAIN), whole)
        felt = max(abs(a - b) for x, y in zip(plain, case["asked"]["rows"]) for a, b in zip(x["nll"], y["nll"]))
        assert felt > 1e-2, (choice, felt)
        found.append(case)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    write_json(out / "expect.json", {"seed": SEED, "versions": versions, "cases": found})


if __name__ == "__main__":
    main()
