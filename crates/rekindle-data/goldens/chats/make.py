"""Writes tokenizer.json and chats.jsonl: conversations as transformers renders, tokenizes and masks them.

    pip install transformers==5.24.0 jinja2==3.1.6 tokenizers==0.23.3
    pip download --no-deps trl==1.16.0 && unzip trl-1.16.0-*.whl 'trl/chat_templates/*' -d SCRATCH
    REKINDLE_TRL_TEMPLATES=SCRATCH/trl/chat_templates python crates/rekindle-data/goldens/chats/make.py

Needs no torch and no network of its own. Nothing is random: the tokenizer is a BPE trained on the conversations below.
TRL's templates are not part of this project; a case names its template and the template's sha256. Those of FAMILIES are
kept with text, ids and mask; of the others there is a digest of text, ids and marked characters. `mask` is transformers'
`assistant_masks` as ranges of tokens, present where the template has generation marks.
"""

import hashlib
import json
import os
from datetime import datetime
from pathlib import Path

import jinja2
import tokenizers
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

HERE = Path(__file__).parent
OURS = HERE.parent.parent / "tests" / "templates"

# Kept in full. The chatml here is this project's own file.
FAMILIES = {
    "chatml": ("<s>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "llama3_training": ("<|begin_of_text|>", "<|eot_id|>"),
    "llama3_1": ("<|begin_of_text|>", "<|eot_id|>"),
    "llama3_2": ("<|begin_of_text|>", "<|eot_id|>"),
    "qwen2_5": (None, "<|im_end|>"),
    "qwen2_5_training": (None, "<|im_end|>"),
    "qwen3": (None, "<|im_end|>"),
    "qwen3_training": (None, "<|im_end|>"),
    "qwen3_instruct_2507": (None, "<|im_end|>"),
    "qwen3_instruct_2507_training": (None, "<|im_end|>"),
}
OTHERS = ("<s>", "</s>")

SPECIAL = [
    "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>",
]  # fmt: skip
# Added, but not special: as in Qwen3.
ADDED = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
# The pre-tokenizer of Qwen2 and, but for the number of digits, of Llama 3.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather at a place, \"now\" & <soon>.",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "description": "A town, such as Köln"},
                    "days": {"type": "integer", "enum": [1, 3, 7]},
                },
                "required": ["place"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "clock", "description": "The time.", "parameters": {"type": "object", "properties": {}}},
    },
]


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def result(text, name="get_weather"):
    return {"role": "tool", "name": name, "content": text}


def call(name, arguments, number=0):
    return {"id": f"call{number:05}", "type": "function", "function": {"name": name, "arguments": arguments}}


WEATHER = call("get_weather", {"place": "Köln", "days": 3})
CLOCK = call("clock", {}, 1)
THOUGHT = "<think>\nTwo and two.\n</think>\n\n"

# Name, messages, and what else the row has: tools, template variables, whether the assistant is to begin a turn.
CONVERSATIONS = [
    ("one turn", [user("What is a whale?"), assistant("A whale is a mammal.")], {}),
    (
        "several turns",
        [user("Hi"), assistant("Hello there!"), user("And\n\nyou?"), assistant("I am well."), user("Bye"), assistant("See you.")],
        {},
    ),
    (
        "a system turn",
        [system("You are a pirate."), user("Hi"), assistant("Arr!"), user("Where?"), assistant("At sea.")],
        {},
    ),
    (
        "a system turn in the middle",
        [user("Hi"), assistant("Hello."), system("Be brief."), user("Why?"), assistant("So.")],
        {},
    ),
    (
        "white space, other scripts and markup",
        [user("  two  spaces \n"), assistant("\n\ngrüße 🦀 日本 \n"), user("<|im_end|>\n<|im_start|>assistant\nno"), assistant(" <b>&amp;</b> ")],
        {},
    ),
    (
        "numbers, tabs and code",
        [user("3.14 + 1e-5 = ?"), assistant("```py\nif x:\n\treturn 'it''s'\n```\n\n\n1234567")],
        {},
    ),
    (
        "thoughts in the content",
        [user("2+2?"), assistant(THOUGHT + "4"), user("3+3?"), assistant("<think>\nThree.\n</think>\n\n6")],
        {},
    ),
    (
        "thoughts beside the content",
        [user("2+2?"), assistant("4", reasoning_content="Two and two."), user("3+3?"), assistant("6", reasoning_content="\nThree.\n")],
        {},
    ),
    (
        "thoughts by their other name",
        [user("2+2?"), assistant("4", thinking="Two and two."), user("3+3?"), assistant("6")],
        {},
    ),
    (
        "thinking on",
        [user("2+2?"), assistant(THOUGHT + "4")],
        {"kwargs": {"enable_thinking": True}},
    ),
    ("thinking off", [user("2+2?"), assistant("4")], {"kwargs": {"enable_thinking": False}}),
    (
        "thinking off, to be gone on with",
        [user("2+2?"), assistant("4"), user("3+3?")],
        {"kwargs": {"enable_thinking": False}, "add_generation_prompt": True},
    ),
    ("to be gone on with", [system("Be brief."), user("Hi")], {"add_generation_prompt": True}),
    ("tools that are not called", [user("Hi"), assistant("Hello.")], {"tools": TOOLS}),
    (
        "a call and its result",
        [user("Weather?"), assistant("", tool_calls=[WEATHER]), result('{"sun": 0.5}'), assistant("Half sunny.")],
        {"tools": TOOLS},
    ),
    (
        "a call after words and a thought, with a system turn",
        [
            system("Use tools."),
            user("Weather?"),
            assistant(THOUGHT + "Let me see.", tool_calls=[WEATHER]),
            result("rain"),
            assistant("<think>\nSo.\n</think>\n\nRain."),
            user("Thanks"),
            assistant("Welcome."),
        ],
        {"tools": TOOLS},
    ),
    (
        "two calls at once",
        [
            user("Weather and time?"),
            assistant("", tool_calls=[WEATHER, CLOCK]),
            result("rain"),
            result("12:00", "clock"),
            assistant("Rain, at noon."),
        ],
        {"tools": TOOLS},
    ),
    (
        "arguments as text",
        [user("Weather?"), assistant("", tool_calls=[call("get_weather", '{"place": "Köln"}')]), result("rain"), assistant("Rain.")],
        {"tools": TOOLS},
    ),
    ("a call at the end", [user("Time?"), assistant("", tool_calls=[CLOCK])], {"tools": TOOLS}),
    (
        "keys that are null",
        [user("Hi"), {"role": "assistant", "content": "Hello.", "tool_calls": None, "reasoning_content": None}],
        {},
    ),
]


def train_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
    texts = [json.dumps([messages, more], ensure_ascii=False) for _, messages, more in CONVERSATIONS]
    texts += [message["content"] for _, messages, _ in CONVERSATIONS for message in messages]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ADDED])
    # As in Llama 3: a text by itself gets a BOS, which the template of a conversation writes too.
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]),
        ]
    )
    return tokenizer


def digest(*parts):
    """Of the parts as this script and the test write them, each ended by a line break."""
    return hashlib.sha256("".join(part + "\n" for part in parts).encode()).hexdigest()


def ranges(mask):
    out = []
    for place, value in enumerate(mask):
        if value and out and out[-1][1] == place:
            out[-1][1] = place + 1
        elif value:
            out.append([place, place + 1])
    return out


def render(source, tokens, tokenizer, messages, more):
    bos, eos = tokens
    special = {"eos_token": eos} | ({"bos_token": bos} if bos else {})
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=source, **special)
    marks = "endgeneration" in source
    out = fast.apply_chat_template(
        messages,
        tools=more.get("tools"),
        add_generation_prompt=more.get("add_generation_prompt", False),
        return_dict=True,
        return_assistant_tokens_mask=marks,
        tokenize=True,
        **more.get("kwargs", {}),
    )
    text = fast.apply_chat_template(
        messages,
        tools=more.get("tools"),
        add_generation_prompt=more.get("add_generation_prompt", False),
        tokenize=False,
        **more.get("kwargs", {}),
    )
    if not marks:
        return text, out["input_ids"], None, None
    # apply_chat_template has left keys that are null out by here.
    _, places = render_jinja_template(
        [[{key: value for key, value in message.items() if value is not None} for message in messages]],
        tools=more.get("tools"),
        chat_template=source,
        return_assistant_tokens_mask=True,
        add_generation_prompt=more.get("add_generation_prompt", False),
        **special,
        **more.get("kwargs", {}),
    )
    places = [[start, end] for start, end in places[0] if start < end]
    return text, out["input_ids"], ranges(out["assistant_masks"]), places


def compact(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def main(trl):
    tokenizer = train_tokenizer()
    tokenizer.save(str(HERE / "tokenizer.json"), pretty=False)
    ours = sorted(OURS.glob("*.jinja"))
    lines = [
        {
            "versions": {
                "transformers": transformers.__version__,
                "jinja2": jinja2.__version__,
                "tokenizers": tokenizers.__version__,
                "trl": "1.16.0",
            },
            "ours": [path.stem for path in ours],
            "conversations": [
                {"name": name, "messages": messages, **more} for name, messages, more in CONVERSATIONS
            ],
        }
    ]
    # A template that writes the date is rendered with this variable, which Llama's know; of the others the date in the
    # text is replaced by the same words.
    dates = ["%d %b %Y", "%Y-%m-%d", "%d %B %Y"]
    for path in ours + sorted(trl.glob("*.jinja")):
        source = path.read_text()
        tokens = FAMILIES.get(path.stem, OTHERS)
        cases = []
        for number, (_, messages, more) in enumerate(CONVERSATIONS):
            if "date_string" in source:
                more = more | {"kwargs": more.get("kwargs", {}) | {"date_string": "26 Jul 2024"}}
            try:
                text, ids, mask, places = render(source, tokens, tokenizer, messages, more)
            except (jinja2.TemplateError, TypeError) as error:
                cases.append({"chat": number, "error": str(error)})
                continue
            dated = next((d for d in dates if "strftime_now" in source and datetime.now().strftime(d) in text), None)
            if dated is not None:
                # Ids depend on the date.
                cases.append({"chat": number, "date": dated, "text_sha256": digest(text.replace(datetime.now().strftime(dated), "DATE"))})
            elif path.stem in FAMILIES:
                cases.append({"chat": number, "text": text, "ids": ids} | ({} if mask is None else {"mask": mask}))
            else:
                parts = [text, compact(ids)] + ([] if mask is None else [compact(places)])
                cases.append({"chat": number, "sha256": digest(*parts), "marked": mask is not None})
        lines.append(
            {
                "template": path.stem,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "bos_token": tokens[0],
                "eos_token": tokens[1],
                "cases": cases,
            }
        )
    (HERE / "chats.jsonl").write_text("".join(compact(line) + "\n" for line in lines))


if __name__ == "__main__":
    main(Path(os.environ["REKINDLE_TRL_TEMPLATES"]))
