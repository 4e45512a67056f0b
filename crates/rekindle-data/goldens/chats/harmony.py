"""Writes harmony.json: conversations with the tokens of the assistant, as transformers masks them for gpt-oss.

    pip install transformers==5.24.0 jinja2==3.1.6 tokenizers==0.23.3
    pip download --no-deps trl==1.16.0 && unzip trl-1.16.0-*.whl 'trl/chat_templates/*' -d SCRATCH
    REKINDLE_TRL_TEMPLATES=SCRATCH/trl/chat_templates python crates/rekindle-data/goldens/chats/harmony.py

The template is TRL's gptoss_training.jinja, which marks the assistant's tokens; the tokenizer is this directory's
tokenizer.json with harmony's special tokens. `trained` has the text of every run of tokens in `assistant_masks`. It
does not depend on the date that the template writes.
"""

import hashlib
import json
import os
from itertools import groupby
from pathlib import Path

import transformers
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
SPECIAL = ["<|return|>", "<|call|>", "<|end|>", "<|start|>", "<|channel|>", "<|message|>"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather at a place.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(place, **more):
    function = {"name": "get_weather", "arguments": {"place": place}}
    return assistant("", tool_calls=[{"type": "function", "function": function}], **more)


def result(text):
    return {"role": "tool", "name": "get_weather", "content": text}


CONVERSATIONS = [
    ("one turn", [user("Hi"), assistant("Hello there!")], None),
    ("one turn with reasoning", [user("Hi"), assistant("Hello!", thinking="A greeting.")], None),
    (
        "several turns",
        [user("Hi"), assistant("Hello!"), user("And you?"), assistant("Well."), user("Bye"), assistant("See you.")],
        None,
    ),
    (
        "several turns with reasoning",
        [
            {"role": "system", "content": "Be brief."},
            user("One and one?"),
            assistant("Two.", thinking="1 + 1 = 2."),
            user("And one?"),
            assistant("Three.", thinking="2 + 1 = 3."),
        ],
        None,
    ),
    (
        "a call and its answer",
        [user("Rain in Köln?"), call("Köln", thinking="Look it up."), result("wet"), assistant("Yes.", thinking="Wet.")],
        TOOLS,
    ),
    (
        "calls, an answer and another turn",
        [
            user("Rain in Köln or Bonn?"),
            call("Köln", thinking="First Köln."),
            result("wet"),
            call("Bonn", thinking="Now Bonn."),
            result("dry"),
            assistant("In Köln."),
            user("Thanks"),
            assistant("My pleasure."),
        ],
        TOOLS,
    ),
    ("a call at the end", [user("Rain in Köln?"), call("Köln", thinking="Look it up.")], TOOLS),
    (
        "a call after an answer",
        [user("Hi"), assistant("Hello!"), user("Rain?"), call("Köln"), result("wet"), call("Bonn")],
        TOOLS,
    ),
]


def main(trl):
    source = (trl / "gptoss_training.jinja").read_text()
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=source, eos_token="<|return|>")
    conversations = []
    for name, messages, tools in CONVERSATIONS:
        out = fast.apply_chat_template(
            messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        tokens = zip(out["assistant_masks"], out["input_ids"])
        runs = [[i for _, i in run] for mask, run in groupby(tokens, lambda token: token[0]) if mask]
        trained = [tokenizer.decode(run, skip_special_tokens=False) for run in runs]
        conversations.append({"name": name, "messages": messages, "tools": tools, "trained": trained})
    golden = {
        "versions": {"transformers": transformers.__version__, "trl": "1.16.0"},
        "special": SPECIAL,
        "sha256": {
            name: hashlib.sha256((trl / f"{name}.jinja").read_bytes()).hexdigest()
            for name in ["gptoss", "gptoss_training"]
        },
        "conversations": conversations,
    }
    (HERE / "harmony.json").write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(os.environ["REKINDLE_TRL_TEMPLATES"]))
