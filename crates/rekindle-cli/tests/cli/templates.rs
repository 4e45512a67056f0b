//! Chat templates: which one is chosen, what it leaves out, and what it may cost.

use std::path::Path;

use crate::preview::chat;
use crate::{golden, rekindle};

const CALLS: &str = r#"{"messages": [{"role": "user", "content": "where am I?"}, {"role": "assistant", "content": null, "tool_calls": [{"type": "function", "function": {"name": "locate", "arguments": "{\"unit\": 7}"}}]}, {"role": "tool", "content": "Rome"}, {"role": "assistant", "content": "In Rome."}]}
{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}
"#;

#[test]
fn rows_that_are_not_shown_are_refused_dropped_or_counted() {
    let (scratch, run_file) = chat();
    scratch.write("chat.jsonl", CALLS);
    let preview = |more: &[&str]| rekindle(["data", "preview", &run_file].iter().chain(more));
    preview(&[])
        .fails(3, &["chat.jsonl:1", "chat_template.jinja does not render messages[1].tool_calls[0]", "not_shown"]);
    let dropped = preview(&["data.not_shown=drop"]).ok();
    assert!(
        dropped.stderr.contains("1 dropped because the chat template does not render them completely (line 1)"),
        "{}",
        dropped.stderr
    );
    assert!(dropped.stdout.starts_with("row 1 of 1, "), "{}", dropped.stdout);
    let allowed = preview(&["data.not_shown=allow"]).ok();
    assert!(
        allowed.stderr.contains("1 trained without the parts that the chat template does not render (line 1)"),
        "{}",
        allowed.stderr
    );
    assert!(allowed.stdout.starts_with("row 1 of 2, "), "{}", allowed.stdout);
    let stats = rekindle(["data", "stats", &run_file]).ok().stdout;
    assert!(
        stats.contains("1 row that the chat template does not render completely: training refuses such rows"),
        "{stats}"
    );
    scratch.write("chat.jsonl", CALLS.lines().next().unwrap());
    preview(&["data.not_shown=drop"]).fails(3, &["no row is left: the chat template renders none of them completely"]);
}

#[test]
fn a_template_is_chosen_by_name() {
    let (scratch, run_file) = chat();
    std::fs::create_dir(scratch.path("model/additional_chat_templates")).unwrap();
    let turns = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content }}<|im_end|>\n{% endfor %}";
    scratch.write("model/additional_chat_templates/short.jinja", turns);
    let preview = |name: &str| rekindle(["data", "preview", &run_file, &format!("data.chat_template={name}")]);
    let text = preview("short").ok().stdout;
    assert!(text.contains("user: Hi<|im_end|>"), "{text}");
    assert!(preview("default").ok().stdout.contains("<|im_start|>user"));
    preview("long").fails(2, &["no such template", "\"default\", \"short\""]);
}

#[test]
fn a_template_that_does_not_end_is_stopped_everywhere() {
    let (scratch, run_file) = chat();
    scratch.write(
        "model/chat_template.jinja",
        "{% for i in range(20000) %}{% for j in range(20000) %}x{% endfor %}{% endfor %}{{ messages[0].content }}",
    );
    let parts = ["chat_template.jinja", "steps, the limit for a conversation of this size"];
    rekindle(["data", "preview", &run_file]).fails(3, &parts);
    rekindle(["data", "stats", &run_file]).fails(3, &parts);
    let (base, model) = (golden("../../examples/quickstart/base"), scratch.path("model"));
    std::fs::copy(Path::new(&base).join("model.safetensors"), model.join("model.safetensors")).unwrap();
    rekindle(["train", &run_file, "device=cpu"]).fails(3, &parts);
    rekindle(["generate", "--model", &model.display().to_string(), "--chat", "hi", "--device", "cpu"]).fails(3, &parts);
}

#[test]
fn a_prompt_that_ends_in_a_space_is_counted() {
    let (scratch, run_file) = chat();
    let rows =
        "{\"prompt\": \"What is it? It is \", \"completion\": \"the\"}\n{\"prompt\": \"Q:\", \"completion\": \" a\"}\n";
    let rows = scratch.write("pairs.jsonl", rows);
    let preview = rekindle(["data", "preview", &run_file, &format!("data.train={rows}")]).ok();
    assert!(preview.stdout.contains("⟦the<|im_end|>⟧"), "{}", preview.stdout);
    assert!(preview.stderr.contains("1 encoded with prompt and answer separately"), "{}", preview.stderr);
}
