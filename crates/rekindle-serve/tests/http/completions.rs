use rekindle_serve::ServerConfig;
use serde_json::{Value, json};

use crate::client::serve;

#[test]
fn texts_and_ids() {
    let served = serve(ServerConfig::default());
    let answer = served.complete("say hello", json!({})).json();
    assert_eq!(answer["object"], "text_completion");
    assert_eq!((&answer["choices"][0]["text"], &answer["choices"][0]["index"]), (&json!("hello"), &json!(0)));
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!((&answer["usage"]["prompt_tokens"], &answer["usage"]["completion_tokens"]), (&json!(9), &json!(6)));
    // 16 tokens unless asked for more.
    assert_eq!(served.complete("letters", json!({})).json()["choices"][0]["text"], "a".repeat(16));

    let ids: Vec<u8> = b"say hi".to_vec();
    let answer = served.complete(ids.clone(), json!({"return_token_ids": true})).json();
    assert_eq!(answer["choices"][0]["text"], "hi");
    assert_eq!(answer["choices"][0]["token_ids"], json!([104, 105, 256]));
    assert_eq!(answer["choices"][0]["prompt_token_ids"], json!(ids));

    let several = served.complete(json!(["say a", "say b"]), json!({"n": 2})).json();
    let texts: Vec<&Value> = several["choices"].as_array().unwrap().iter().map(|choice| &choice["text"]).collect();
    assert_eq!(texts, ["a", "a", "b", "b"]);
    assert_eq!(several["usage"]["prompt_tokens"], 10);
    let mixed = served.complete(json!([b"say a", b"say b"]), json!({})).json();
    assert_eq!(mixed["choices"][1]["text"], "b");
}

/// The request of lm-eval's local-completions for a log-likelihood.
#[test]
fn the_prompt_is_echoed_with_its_logprobs() {
    let served = serve(ServerConfig::default());
    let fields = json!({"echo": true, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234});
    let choice = served.complete("say é", fields.clone()).json()["choices"][0].clone();
    assert!(choice["text"].as_str().unwrap().starts_with("say é"), "{choice}");
    let logprobs = &choice["logprobs"];
    let length = |name: &str| logprobs[name].as_array().unwrap().len();
    assert_eq!(["tokens", "token_logprobs", "top_logprobs", "text_offset"].map(length), [7; 4]);
    assert!(logprobs["token_logprobs"][0].is_null() && logprobs["top_logprobs"][0].is_null());
    assert_eq!(logprobs["token_logprobs"][1], -0.5);
    assert_eq!(logprobs["top_logprobs"][1], json!({"a": -0.5}));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2, 3, 4, 5, 6]));
    // No new token at all.
    let only = served.complete("say x", json!({"echo": true, "logprobs": 0, "max_tokens": 0})).json();
    assert_eq!(
        (&only["choices"][0]["text"], &only["choices"][0]["finish_reason"]),
        (&json!("say x"), &json!("length"))
    );
    assert_eq!(only["usage"]["completion_tokens"], 0);
    // Ids, batches and samples.
    let batch =
        served.complete(json!([b"say a", b"say bc"]), json!({"echo": true, "logprobs": 1, "n": 2, "max_tokens": 9}));
    let choices = batch.json()["choices"].as_array().unwrap().clone();
    let tokens: Vec<usize> =
        choices.iter().map(|choice| choice["logprobs"]["tokens"].as_array().unwrap().len()).collect();
    assert_eq!(tokens, [7, 7, 9, 9]);
    assert_eq!((&choices[1]["text"], &choices[3]["text"]), (&json!("say aa"), &json!("say bcbc")));
    assert_eq!(served.complete("say x", json!({"echo": true})).json()["choices"][0]["text"], "say xx");
}

#[test]
fn streams() {
    let served = serve(ServerConfig::default());
    let fields = json!({"stream": true, "echo": true, "logprobs": 0, "stream_options": {"include_usage": true}});
    let chunks = served.complete("say abc", fields).chunks();
    let (last, others) = chunks.split_last().unwrap();
    assert_eq!((&last["choices"], &last["usage"]["completion_tokens"]), (&json!([]), &json!(4)));
    let text: String = others.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, "say abcabc");
    let tokens: usize =
        others.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"]["tokens"].as_array()).map(Vec::len).sum();
    assert_eq!(tokens, 11);
    assert_eq!(others.last().unwrap()["choices"][0]["finish_reason"], "stop");
    assert!(others.iter().all(|chunk| chunk["usage"].is_null()));
    let continuous = json!({"stream": true, "stream_options": {"continuous_usage_stats": true}});
    let chunks = served.complete("say abc", continuous).chunks();
    assert!(chunks.iter().all(|chunk| chunk["usage"]["prompt_tokens"] == 7));
}

#[test]
fn errors_name_the_field() {
    let served = serve(ServerConfig::default());
    for (prompt, fields, param, part) in [
        (Value::Null, json!({}), "prompt", "prompt is missing"),
        (json!([]), json!({}), "prompt", "an empty list"),
        (json!(""), json!({}), "prompt", "has no tokens"),
        (json!([1, "a"]), json!({}), "prompt", "has a string, not a token id"),
        (json!([1, 261]), json!({}), "prompt", "token id 261; ids are below 261"),
        (json!([["a"]]), json!({}), "prompt", "not a token id"),
        (json!([true]), json!({}), "prompt", "has a boolean in it"),
        (json!({"a": 1}), json!({}), "prompt", "has an object in it"),
        (json!("x"), json!({"max_tokens": 0}), "max_tokens", "at least 1"),
        (json!("x"), json!({"suffix": "y"}), "suffix", "is not supported"),
        (json!("x"), json!({"logprobs": 50}), "logprobs", "0 to 20"),
        (json!("x"), json!({"best_of": 3}), "best_of", "is 3"),
        (json!("x"), json!({"messages": []}), "messages", "unknown or unsupported field"),
        (json!("x"), json!({"max_tokens": 2000}), "prompt", "maximum context length is 2000"),
    ] {
        let (status, message, field, _) = served.complete(prompt, fields).error();
        assert!(status == 400 && message.contains(part), "{part}: {status} {message}");
        assert_eq!(field, json!(param), "{message}");
    }
    let (_, _, _, code) = served.complete("x".repeat(2001), json!({})).error();
    assert_eq!(code, "context_length_exceeded");
    let limited = serve(ServerConfig { max_prompt_tokens: Some(5), ..ServerConfig::default() });
    assert_eq!(limited.complete("say x", json!({})).status, 200);
    let (_, message, _, code) = limited.complete("say xy", json!({})).error();
    assert_eq!((message.as_str(), code), ("the prompt has 6 tokens; the limit is 5", json!("context_length_exceeded")));
}

#[test]
fn a_constraint_for_every_sample() {
    let served = serve(ServerConfig::default());
    let fields = json!({"n": 4, "structured_outputs": {"regex": "[a-c]{3}"}, "seed": 5});
    let answer = served.complete(json!(["x", "y"]), fields).json();
    let texts: Vec<&str> = answer["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect();
    assert_eq!(texts.len(), 8);
    assert!(texts.iter().all(|text| text.len() == 3 && text.chars().all(|c| ('a'..='c').contains(&c))), "{texts:?}");
}
