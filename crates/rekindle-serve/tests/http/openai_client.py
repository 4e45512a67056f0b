"""Checks a server with the openai package: python openai_client.py BASE_URL, with the scripted engine of this folder."""

import json
import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="secret", max_retries=0, timeout=30)
MODEL = "base/model"
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


def ask(text, **fields):
    return client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": text}], **fields)


def fails(kind, call, **expected):
    try:
        call()
    except kind as error:
        for name, value in expected.items():
            found = getattr(error, name)
            assert found == value, f"{name} is {found!r}, not {value!r}"
        return error
    raise AssertionError(f"no {kind.__name__}")


assert [model.id for model in client.models.list()] == [MODEL]
assert client.models.retrieve(MODEL).id == MODEL

answer = ask("say hello", n=2, seed=1, temperature=0.5, stop=["zzz"], user="me")
assert [choice.message.content for choice in answer.choices] == ["hello", "hello"]
assert answer.choices[0].finish_reason == "stop"
assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
assert answer.usage.prompt_tokens_details.cached_tokens == 3
assert ask("say hello", max_completion_tokens=2).choices[0].finish_reason == "length"

chunks = list(ask("say grüße", stream=True, stream_options={"include_usage": True}))
assert chunks[0].choices[0].delta.role == "assistant"
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "grüße"
assert chunks[-2].choices[0].finish_reason == "stop"
assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 8

message = ask("think").choices[0].message
assert (message.content, message.reasoning_content) == ("yes", "hm")

choice = ask("call", tools=[ADD]).choices[0]
assert choice.finish_reason == "tool_calls" and choice.message.content is None
assert json.loads(choice.message.tool_calls[0].function.arguments) == {"a": 1, "b": 2}
turn = choice.message.model_dump(exclude_none=True)
result = {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "3"}
history = [{"role": "user", "content": "call"}, turn, result, {"role": "user", "content": "say 3"}]
assert client.chat.completions.create(model=MODEL, messages=history, tools=[ADD]).choices[0].message.content == "3"
with client.chat.completions.stream(
    model=MODEL, messages=[{"role": "user", "content": "call"}], tools=[ADD]
) as stream:
    for _ in stream:
        pass
    call = stream.get_final_completion().choices[0].message.tool_calls[0]
assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1, "b": 2})
required = ask("say no", tools=[ADD], tool_choice="required", parallel_tool_calls=False).choices[0].message
assert set(json.loads(required.tool_calls[0].function.arguments)) == {"a", "b"}

schema = {
    "type": "object",
    "properties": {"kind": {"enum": ["x", "y"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
for seed in range(10):
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    value = json.loads(ask("x", response_format=form, seed=seed).choices[0].message.content)
    assert value["kind"] in ("x", "y") and value["count"] in range(10) and len(value) == 2, value

logprobs = ask("say hi", logprobs=True, top_logprobs=2).choices[0].logprobs.content
assert [token.token for token in logprobs[:2]] == ["h", "i"] and len(logprobs[0].top_logprobs) == 2
echo = client.completions.create(model=MODEL, prompt="say hi", echo=True, logprobs=1, max_tokens=1)
assert echo.choices[0].text == "say hih" and echo.choices[0].logprobs.token_logprobs[0] is None
assert len(echo.choices[0].logprobs.tokens) == 7
ids = client.completions.create(model=MODEL, prompt=[list(b"say a"), list(b"say b")], extra_body={"return_token_ids": True})
assert [choice.text for choice in ids.choices] == ["a", "b"]
assert ids.choices[0].token_ids == [97, 256]
streamed = client.completions.create(model=MODEL, prompt="say abc", stream=True)
assert "".join(chunk.choices[0].text for chunk in streamed) == "abc"

fails(openai.NotFoundError, lambda: client.completions.create(model="no", prompt="x"), code="model_not_found", param="model")
fails(openai.BadRequestError, lambda: ask("x" * 3000), code="context_length_exceeded", param="messages")
fails(openai.BadRequestError, lambda: ask("x", temperature=9), param="temperature")
fails(openai.BadRequestError, lambda: ask("x", extra_body={"nonsense": 1}), param="nonsense")
bad = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "strin"}}}
fails(openai.BadRequestError, lambda: ask("x", response_format=bad), param="response_format")
fails(openai.RateLimitError, lambda: ask("reject"))
fails(openai.InternalServerError, lambda: ask("fail x"))
fails(openai.APIError, lambda: list(ask("fail x", stream=True)))
fails(openai.AuthenticationError, lambda: client.with_options(api_key="wrong").models.list(), code="invalid_api_key")
print("openai", openai.__version__, "ok")
