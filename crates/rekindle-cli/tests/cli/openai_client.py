"""Checks `rekindle serve` with the openai package: python openai_client.py ADDRESS, for the quickstart's base model."""

import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import openai

client = openai.OpenAI(base_url=f"http://{sys.argv[1]}/v1", api_key="any", max_retries=0, timeout=120)
MESSAGES = [{"role": "user", "content": "What is a whale?"}]


def ask(**fields):
    return client.chat.completions.create(**{"model": "base", "messages": MESSAGES, **fields})


def schema(rng, depth):
    """Returns a random schema whose values have a bounded length."""
    kinds = ["string", "integer", "boolean", "null", "enum", "const", "pattern"]
    if depth > 0:
        kinds += ["object", "object", "array", "anyOf"]
    match rng.choice(kinds):
        case "string":
            return {"type": "string", "maxLength": rng.randint(1, 6)}
        case "integer":
            low = rng.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 90)}
        case "enum":
            return {"enum": rng.sample(["red", "green", 3, True, None, "ä\"b"], rng.randint(1, 4))}
        case "const":
            return {"const": rng.choice(["x", 7, [1, 2], {"a": None}])}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(["^[a-c]{2}$", "^(yes|no)$", "^\\d{4}-\\d{2}$"])}
        case "object":
            names = rng.sample(["who", "what", "count", "place"], rng.randint(1, 3))
            required = [name for name in names if rng.random() < 0.7]
            properties = {name: schema(rng, depth - 1) for name in names}
            return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        case "array":
            return {"type": "array", "items": schema(rng, depth - 1), "maxItems": rng.randint(1, 2)}
        case "anyOf":
            return {"anyOf": [schema(rng, depth - 1), schema(rng, depth - 1)]}
        case kind:
            return {"type": kind}


def check_schema(seed):
    form = schema(random.Random(seed), 2)
    answer = ask(
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": form}}, seed=seed
    ).choices[0]
    assert answer.finish_reason == "stop", (form, answer)
    jsonschema.validate(json.loads(answer.message.content), form)


greedy = ask(temperature=0).choices[0].message.content
streamed = ask(temperature=0, stream=True)
assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == greedy
assert len({choice.message.content for choice in ask(n=4, seed=1, temperature=1.5).choices}) > 1

with ThreadPoolExecutor(16) as pool:
    assert {answer.choices[0].message.content for answer in pool.map(lambda _: ask(temperature=0), range(32))} == {greedy}
    list(pool.map(check_schema, range(100)))

# The log-probability of a token is the same in the answer and in the echo of a prompt.
text = "A whale is"
first = client.completions.create(model="base", prompt=text, max_tokens=8, temperature=0, logprobs=3)
tokens = first.choices[0].logprobs
again = client.completions.create(
    model="base", prompt=text + first.choices[0].text, max_tokens=1, temperature=0, logprobs=1, echo=True
).choices[0].logprobs
begin = len(again.tokens) - 1 - len(tokens.tokens)
assert again.tokens[begin:-1] == tokens.tokens, (again.tokens, tokens.tokens)
for one, other in zip(tokens.token_logprobs, again.token_logprobs[begin:-1]):
    assert abs(one - other) < 1e-4, (one, other)
assert all(max(top, key=top.get) == token for top, token in zip(tokens.top_logprobs, tokens.tokens))

banned = {str(token): -100 for token in client.post(
    "/../tokenize", body={"prompt": greedy}, cast_to=object)["tokens"]}
assert ask(temperature=0, logit_bias=banned, max_tokens=10).choices[0].message.content != greedy
assert ask(extra_body={"structured_outputs": {"choice": ["yes", "no"]}}).choices[0].message.content in ("yes", "no")
regex = ask(extra_body={"structured_outputs": {"regex": "[a-f]{6}"}}).choices[0].message.content
assert len(regex) == 6 and set(regex) <= set("abcdef"), regex

for fields, kind, code in [
    ({"model": "other"}, openai.NotFoundError, "model_not_found"),
    ({"messages": [{"role": "user", "content": "word " * 3000}]}, openai.BadRequestError, "context_length_exceeded"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, None),
]:
    try:
        ask(**fields)
    except kind as error:
        assert error.code == code, error
    else:
        raise AssertionError(f"no error for {fields}")
print("openai", openai.__version__, "ok")
