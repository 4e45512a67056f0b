use rekindle_serve::ServerConfig;
use serde_json::{Value, json};

use crate::client::{Response, chat_body, serve};

fn tools() -> Value {
    json!([{"type": "function", "function": {"name": "add", "parameters": {
        "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"], "additionalProperties": false}}}])
}

#[test]
fn an_answer() {
    let served = serve(ServerConfig::default());
    let answer = served.chat("say grüße", json!({"max_tokens": 50, "return_token_ids": true}));
    assert_eq!(answer.status, 200);
    let answer = answer.json();
    assert_eq!((&answer["object"], &answer["model"]), (&json!("chat.completion"), &json!("base/model")));
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"), "{answer}");
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": "grüße", "refusal": null}));
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &Value::Null));
    assert_eq!(choice["token_ids"].as_array().unwrap().len(), 8, "7 bytes and the end token");
    let prompt = "user: say grüße\nassistant: ".len();
    assert_eq!(answer["prompt_token_ids"].as_array().unwrap().len(), prompt);
    assert_eq!(
        answer["usage"],
        json!({"prompt_tokens": prompt, "completion_tokens": 8, "total_tokens": prompt + 8,
            "prompt_tokens_details": {"cached_tokens": 3}})
    );
}

#[test]
fn length_stops_and_samples() {
    let served = serve(ServerConfig::default());
    let choice = |fields: Value, user: &str| served.chat(user, fields).json()["choices"][0].clone();
    let cut = choice(json!({"max_completion_tokens": 3}), "say hello");
    assert_eq!((&cut["message"]["content"], &cut["finish_reason"]), (&json!("hel"), &json!("length")));
    let stopped = choice(json!({"stop": ["x", "lo"]}), "say hello");
    assert_eq!((&stopped["message"]["content"], &stopped["finish_reason"]), (&json!("hel"), &json!("stop")));
    assert_eq!(stopped["stop_reason"], "lo");
    let three = served.chat("say hi", json!({"n": 3})).json();
    let contents: Vec<&Value> = three["choices"].as_array().unwrap().iter().map(|c| &c["message"]["content"]).collect();
    assert_eq!(contents, ["hi", "hi", "hi"]);
    assert_eq!(three["usage"]["completion_tokens"], 9);
    // Without a limit the answer may take all that the prompt leaves.
    let letters = choice(json!({}), "letters");
    let length = letters["message"]["content"].as_str().unwrap().len();
    assert_eq!(length, crate::engine::MAX_LEN - "user: letters\nassistant: ".len());
}

#[test]
fn parameters_reach_the_engine() {
    let served = serve(ServerConfig::default());
    let fields = json!({"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": -1, "frequency_penalty": 2, "logit_bias": {"65": -100}, "seed": -3, "n": 2,
        "stop_token_ids": [66], "ignore_eos": true, "min_tokens": 1, "max_tokens": 9, "user": "me", "store": false});
    assert_eq!(served.chat("say hi", fields).status, 200);
    let request = served.engine.requests.lock().unwrap().pop().unwrap();
    for part in [
        "n: 2,",
        "max_tokens: 9",
        "temperature: 0.5",
        "top_k: 7",
        "top_p: 0.9",
        "min_p: 0.1",
        "repetition_penalty: 1.1",
        "presence_penalty: -1.0",
        "frequency_penalty: 2.0",
        "logit_bias: [(65, -100.0)]",
        "seed: Some(18446744073709551613)",
        "ids: [66]",
        "ignore_eos: true",
        "min_tokens: 1",
        "adapter: None",
        "logprobs: None",
    ] {
        assert!(request.contains(part), "{part} is not in {request}");
    }
}

#[test]
fn a_stream_begins_with_the_role_and_ends_with_the_usage() {
    let served = serve(ServerConfig::default());
    let fields = json!({"stream": true, "stream_options": {"include_usage": true}, "n": 2});
    let chunks = served.chat("say hey", fields).chunks();
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert!(chunks.iter().all(|chunk| chunk["object"] == "chat.completion.chunk" && chunk["id"] == chunks[0]["id"]));
    let (last, others) = chunks.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 8);
    assert!(others.iter().all(|chunk| chunk["usage"].is_null()));
    for index in 0..2 {
        let choices: Vec<&Value> =
            others.iter().map(|chunk| &chunk["choices"][0]).filter(|choice| choice["index"] == index).collect();
        let text: String = choices.iter().filter_map(|choice| choice["delta"]["content"].as_str()).collect();
        assert_eq!(text, "hey");
        assert_eq!(choices[0]["delta"]["role"], "assistant");
        let reasons: Vec<&Value> = choices.iter().map(|choice| &choice["finish_reason"]).collect();
        assert_eq!(*reasons[reasons.len() - 1], "stop");
        assert!(reasons[..reasons.len() - 1].iter().all(|reason| reason.is_null()));
        assert_eq!(choices[choices.len() - 1]["delta"], json!({}));
    }
    assert_eq!(
        served.chat("say hey", json!({"stream": true})).chunks().last().unwrap()["choices"][0]["delta"],
        json!({})
    );
}

#[test]
fn reasoning_is_apart_from_the_content() {
    let served = serve(ServerConfig::default());
    let message = served.chat("think", json!({})).json()["choices"][0]["message"].clone();
    assert_eq!((&message["reasoning_content"], &message["content"]), (&json!("hm"), &json!("yes")));
    let chunks = served.chat("think", json!({"stream": true})).chunks();
    let text = |field: &str| -> String {
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"][field].as_str()).collect()
    };
    assert_eq!((text("reasoning_content"), text("content")), ("hm".to_owned(), "yes".to_owned()));
    // A prompt that ends with the tag has begun the reasoning.
    let open = json!({"chat_template_kwargs": {"open_thinking": true}});
    let message = served.chat("say hm</think>yes", open).json()["choices"][0]["message"].clone();
    assert_eq!((&message["reasoning_content"], &message["content"]), (&json!("hm"), &json!("yes")));
}

#[test]
fn tool_calls() {
    let served = serve(ServerConfig::default());
    let choice = served.chat("call", json!({"tools": tools()})).json()["choices"][0].clone();
    assert_eq!((&choice["finish_reason"], &choice["message"]["content"]), (&json!("tool_calls"), &Value::Null));
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(call["function"], json!({"name": "add", "arguments": "{\"a\":1,\"b\":2}"}));
    assert!(call["id"].as_str().unwrap().starts_with("call_"));
    let chunks = served.chat("call", json!({"tools": tools(), "stream": true})).chunks();
    let calls: Vec<&Value> = chunks
        .iter()
        .map(|chunk| &chunk["choices"][0]["delta"]["tool_calls"][0])
        .filter(|call| !call.is_null())
        .collect();
    assert_eq!((calls.len(), &calls[0]["index"], &calls[0]["function"]["name"]), (1, &json!(0), &json!("add")));
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
    // The prompt shows the tools only if one may be called, and without them calls are text.
    let none = served.chat("call", json!({"tools": tools(), "tool_choice": "none"})).json();
    assert!(none["choices"][0]["message"]["content"].as_str().unwrap().starts_with("<tool_call>"));
    let shown = |fields| served.chat("say x", fields).json()["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(shown(json!({"tools": tools()})) > shown(json!({"tools": tools(), "tool_choice": "none"})));
}

#[test]
fn demanded_calls_are_valid() {
    let served = serve(ServerConfig::default());
    for (seed, choice) in
        [json!("required"), json!({"type": "function", "function": {"name": "add"}})].iter().enumerate()
    {
        let fields = json!({"tools": tools(), "tool_choice": choice, "seed": seed, "parallel_tool_calls": false});
        let answer = served.chat("say no", fields).json();
        let calls = answer["choices"][0]["message"]["tool_calls"].as_array().unwrap();
        let arguments: Value = serde_json::from_str(calls[0]["function"]["arguments"].as_str().unwrap()).unwrap();
        assert!(calls.len() == 1 && arguments["a"].is_i64() && arguments["b"].is_i64(), "{answer}");
    }
}

#[test]
fn json_answers_match_their_schema() {
    let served = serve(ServerConfig::default());
    let schema = json!({"type": "object", "properties": {
        "name": {"type": "string", "maxLength": 5}, "kind": {"enum": ["a", "b"]},
        "list": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3}},
        "required": ["name", "kind", "list"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": true}});
    for seed in 0..20 {
        let answer = served.chat("x", json!({"response_format": format, "seed": seed})).json();
        let value: Value = serde_json::from_str(answer["choices"][0]["message"]["content"].as_str().unwrap()).unwrap();
        assert!(value["name"].as_str().unwrap().chars().count() <= 5, "{value}");
        assert!(["a", "b"].contains(&value["kind"].as_str().unwrap()), "{value}");
        assert!(value["list"].as_array().unwrap().iter().all(|item| item.as_u64().unwrap() <= 99), "{value}");
        assert_eq!(value.as_object().unwrap().len(), 3);
    }
    let content = |fields: Value| served.chat("x", fields).json()["choices"][0]["message"]["content"].clone();
    let object = content(json!({"response_format": {"type": "json_object"}, "max_tokens": 500}));
    assert!(object.as_str().unwrap().starts_with('{'), "{object}");
    let choice = json!({"structured_outputs": {"choice": ["red", "blue \"sky\""]}});
    assert!(["red", "blue \"sky\""].contains(&content(choice).as_str().unwrap()));
    let regex = content(json!({"response_format": {"type": "regex", "regex": "[ab]{4}c"}}));
    assert!(regex.as_str().unwrap().len() == 5 && regex.as_str().unwrap().ends_with('c'), "{regex}");
    let lark = content(json!({"response_format": {"type": "grammar", "grammar": "start: \"x\" (\"y\" | \"z\")"}}));
    assert!(["xy", "xz"].contains(&lark.as_str().unwrap()), "{lark}");
}

#[test]
fn errors_name_the_field() {
    let served = serve(ServerConfig::default());
    let check = |answer: Response, status: u16, param: &str, part: &str| {
        let (found, message, field, _) = answer.error();
        assert!(found == status && message.contains(part), "{found} {message}");
        assert_eq!(field, if param.is_empty() { Value::Null } else { json!(param) }, "{message}");
    };
    let schema = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}});
    for (fields, param, part) in [
        (json!({"temperature": 3}), "temperature", "0 to 2"),
        (json!({"top_p": 0}), "top_p", "above 0"),
        (json!({"n": 0}), "n", "1 to 128"),
        (json!({"max_tokens": "9"}), "max_tokens", "an integer"),
        (json!({"max_tokens": 5000}), "messages", "maximum context length is 2000"),
        (json!({"max_tokens": 5, "max_completion_tokens": 6}), "max_tokens", "give one"),
        (json!({"stop": [""]}), "stop", "empty string"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias", "token ids below 261"),
        (json!({"top_logprobs": 3}), "top_logprobs", "without logprobs"),
        (json!({"stream_options": {}}), "stream_options", "without stream"),
        (json!({"guided_json": {}}), "guided_json", "use response_format"),
        (json!({"functions": []}), "functions", "use tools"),
        (json!({"foo": 1}), "foo", "unknown or unsupported field: foo"),
        (json!({"tool_choice": "required"}), "tool_choice", "there are no tools"),
        (
            json!({"tools": tools(), "tool_choice": {"type": "function", "function": {"name": "sub"}}}),
            "tool_choice",
            "none of the tools: add",
        ),
        (json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}), "tools[0].function.name", "letters"),
        (json!({"messages": []}), "messages", "empty list"),
        (json!({"messages": [{"role": "robot", "content": "x"}]}), "messages[0].role", "known: system"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "messages[0].content[0]",
            "only \"text\"",
        ),
        (json!({"response_format": {"type": "xml"}}), "response_format.type", "json_schema"),
        (schema(json!({"type": "strin"})), "response_format", "strin"),
        (schema(json!({"$ref": "http://example.com/x"})), "response_format", "response_format: "),
        (json!({"structured_outputs": {"regex": "("}}), "structured_outputs", "structured_outputs: "),
        (json!({"structured_outputs": {"regex": "a", "choice": ["b"]}}), "structured_outputs", "exactly one"),
        (
            json!({"tools": tools(), "tool_choice": "required", "response_format": {"type": "json_object"}}),
            "response_format",
            "demands a call",
        ),
        (json!({"continue_final_message": true}), "continue_final_message", "not the assistant's"),
    ] {
        check(served.chat("say x", fields), 400, param, part);
    }
    check(served.chat("refuse", json!({})), 400, "messages", "no refusals");
    check(served.chat(&"x".repeat(3000), json!({})), 400, "messages", "maximum context length is 2000");
    let (status, message, param, code) = served.chat("say x", json!({"model": "other"})).error();
    assert_eq!((status, param, code), (404, json!("model"), json!("model_not_found")));
    assert_eq!(message, "the model \"other\" does not exist; available: base/model");
    check(served.chat("say x", json!({"model": null})), 400, "model", "model is missing");
    // A number that is null is not given, and fields without an effect are ignored.
    assert_eq!(served.chat("say x", json!({"temperature": null, "metadata": {"a": "b"}})).status, 200);
}

#[test]
fn a_failure_before_and_during_the_answer() {
    let served = serve(ServerConfig::default());
    let (status, message, ..) = served.chat("fail hello", json!({})).error();
    assert_eq!((status, message.as_str()), (500, "the device failed"));
    let chunks = served.chat("fail hello", json!({"stream": true})).chunks();
    assert_eq!(chunks.last().unwrap()["error"]["message"], "the device failed");
    let busy = served.chat("reject", json!({"stream": true}));
    assert_eq!((busy.status, busy.header("retry-after")), (429, Some("1")));
}

#[test]
fn logprobs_of_each_token() {
    let served = serve(ServerConfig::default());
    let answer = served.chat("say é", json!({"logprobs": true, "top_logprobs": 2})).json();
    let tokens = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(tokens.len(), 3);
    assert_eq!(tokens[0]["bytes"], json!([0xc3]));
    assert_eq!((&tokens[0]["logprob"], tokens[0]["top_logprobs"].as_array().unwrap().len()), (&json!(-0.5), 2));
    let chunks = served.chat("say é", json!({"logprobs": true, "stream": true})).chunks();
    let streamed: usize =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array()).map(Vec::len).sum();
    assert_eq!(streamed, 3);
}

#[test]
fn adapters_are_chosen_by_model() {
    let served = serve(ServerConfig { runtime_adapters: true, ..ServerConfig::default() });
    served.post("/v1/load_lora_adapter", &json!({"lora_name": "sql", "lora_path": "/a"}));
    let answer = served.chat("say x", json!({"model": "sql"})).json();
    assert_eq!(answer["model"], "sql");
    assert!(served.engine.requests.lock().unwrap().pop().unwrap().contains("adapter: Some(\"sql\")"));
    let body = chat_body(
        "say x",
        json!({"messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function",
            "function": {"name": "add", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        {"role": "user", "content": "say done"}]}),
    );
    assert_eq!(served.post("/v1/chat/completions", &body).json()["choices"][0]["message"]["content"], "done");
}
