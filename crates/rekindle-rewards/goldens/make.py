"""Makes trl.json: scores of TRL's own reward functions.

    python crates/rekindle-rewards/goldens/make.py

Needs trl and math_verify; the file has their versions.
"""

import json
from importlib.metadata import version
from pathlib import Path

from trl.rewards import accuracy_reward, get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward

FORMATS = [
    "<think>\nThis is my reasoning.\n</think>\nThis is my answer.",
    "<think>\nThis is my reasoning.\nThis is my answer.",
    "<think></think>",
    " <think>a</think>b",
    "x<think>a</think>b",
    "<think>a</think>b<think>c</think>",
    "<think>a<think>b</think>c",
    "<think>a</think>b</think>c",
    "a</think>b",
    "first line\n<think>a</think>b",
    "<think>a</think>\n\n<answer>4</answer>\n",
    "",
]
IDS = [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 1, 2, 3, 1, 2, 3], [7] * 20, list(range(30)), [1, 1, 2, 2, 1, 1, 2, 2, 3]]
LENGTHS = [0, 79, 80, 81, 90, 99, 100, 101, 500]
# Numbers alone: what accuracy_reward decides by symbolic algebra is not a number's business.
SOLUTIONS = [
    (r"My answer is \boxed{42}", "42"),
    (r"My answer is \boxed{41}", "42"),
    (r"My answer is \boxed{\frac{1}{3}}", r"\frac{1}{3}"),
    (r"My answer is \boxed{\frac{1}{2}}", r"\frac{1}{3}"),
    (r"so \boxed{0.5}", r"$\frac{1}{2}$"),
    (r"so \boxed{-7}", r"\boxed{-7}"),
    (r"so \boxed{1,000}", "1000"),
    (r"so \boxed{1000}", "1,000"),
    (r"so \boxed{3.50}", "3.5"),
    (r"so \boxed{-\frac{3}{4}}", "-0.75"),
    (r"so \boxed{\dfrac{10}{4}}", "2.5"),
    (r"so \boxed{ 12 }.", "12"),
    (r"\boxed{8} apples", "$8$"),
    ("no answer", "42"),
    (r"\boxed{42", "42"),
    (r"My answer is \boxed{42}", "no number here"),
    (r"My answer is \boxed{42}", ""),
]


def messages(text):
    return [{"role": "assistant", "content": text}]


def main():
    cases = {
        "think_format": {"completions": FORMATS, "scores": think_format_reward([messages(text) for text in FORMATS])},
        "repetition": [
            {"ngram_size": n, "max_penalty": p, "ids": IDS, "scores": get_repetition_penalty_reward(n, p)(IDS)}
            for n, p in ((3, -1.0), (2, -0.5), (1, -2.0))
        ],
        "soft_overlong": [
            {"max_completion_len": most, "soft_punish_cache": cache, "lengths": LENGTHS,
             "scores": get_soft_overlong_punishment(most, cache)([[1] * length for length in LENGTHS])}
            for most, cache in ((100, 20), (100, 0), (80, 80))
        ],
        "accuracy": {
            "completions": [completion for completion, _ in SOLUTIONS],
            "solutions": [solution for _, solution in SOLUTIONS],
            "scores": accuracy_reward([messages(completion) for completion, _ in SOLUTIONS],
                                      [solution for _, solution in SOLUTIONS]),
        },
        "versions": {"trl": version("trl"), "math_verify": version("math-verify")},
    }
    path = Path(__file__).parent / "trl.json"
    path.write_text(json.dumps(cases, indent=1) + "\n")
    print(cases["accuracy"]["scores"])


main()
