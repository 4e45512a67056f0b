use serde_json::json;

use super::*;
use crate::test_support::{BRACKETS, CHATML, DEFAULT_SYSTEM, HEADERS, MARKED, THINKING};

fn left_out(source: &str, messages: Value, tools: Value) -> Vec<String> {
    let special = [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(name, text)| (name.to_owned(), text.to_owned()));
    let template = ChatTemplate::with_special_tokens(source, &special.into()).expect("valid");
    let values = messages.as_array().expect("a list").clone();
    let messages: Vec<Message> =
        values.into_iter().map(|value| Message::from_json(value, "m").expect("valid")).collect();
    let options = RenderOptions { tools: Some(tools).filter(|tools| !tools.is_null()), ..RenderOptions::default() };
    let text = template.render(&messages, &options).expect("renders");
    let trained: Vec<usize> = (0..messages.len()).filter(|&turn| messages[turn].is_assistant()).collect();
    super::left_out(&template, &messages, &trained, &options, &text)
}

fn turn(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

fn call(content: Value, arguments: Value) -> Value {
    json!({"role": "assistant", "content": content, "tool_calls": [{"function": {"name": "locate", "arguments": arguments}}]})
}

fn tools() -> Value {
    json!([{"type": "function", "function": {"name": "locate", "parameters": {}}}])
}

#[test]
fn a_template_that_shows_all_leaves_nothing_out() {
    let chat = json!([turn("user", "a"), turn("assistant", "b"), turn("user", "<b> \"q\" \n"), turn("assistant", "7")]);
    for source in [CHATML, DEFAULT_SYSTEM, HEADERS, BRACKETS, THINKING, MARKED] {
        assert_eq!(left_out(source, chat.clone(), json!(null)), Vec::<String>::new(), "{source}");
    }
    let with_tools = json!([
        turn("system", "s"),
        turn("user", "where?"),
        call(json!(""), json!({"unit": 7, "deep": [{"a": "x"}]})),
        turn("tool", "Rome"),
        turn("assistant", "In Rome."),
    ]);
    assert_eq!(left_out(DEFAULT_SYSTEM, with_tools, tools()), Vec::<String>::new());
    // Texts of JSON, and results that a template encodes.
    let text = json!([
        turn("user", "q"),
        call(json!(""), json!("{\"unit\": 7}")),
        turn("tool", "\"R\"\n"),
        turn("assistant", "a")
    ]);
    let source =
        "{% for m in messages %}{{ m.content | tojson }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}";
    assert_eq!(left_out(source, text, json!(null)), Vec::<String>::new());
}

#[test]
fn every_part_can_be_missing() {
    let chat = |call| json!([turn("user", "where?"), call, turn("tool", "Rome"), turn("assistant", "Rome")]);
    let calls = ["messages[1].tool_calls[0]"];
    // No calls at all, though their words are in other turns.
    assert_eq!(left_out(CHATML, chat(call(json!("where? locate 7"), json!({"unit": 7}))), json!(null)), calls);
    // The name and not the arguments, of any kind.
    let names = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{% endfor %}";
    for arguments in
        [json!({"unit": 7}), json!({"u": "x"}), json!({"u": 1.5}), json!({"u": true}), json!("{\"u\": 7}"), json!("x")]
    {
        assert_eq!(left_out(names, chat(call(json!(""), arguments)), json!(null)), calls);
    }
    assert_eq!(left_out(names, chat(call(json!(""), json!({}))), json!(null)), Vec::<String>::new());
    // The arguments and not the name, which a template for one function need not show.
    let values = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{% for k, v in c.function.arguments|items %}\
                  {{ v }}{% endfor %}{% endfor %}{% endfor %}";
    assert_eq!(left_out(values, chat(call(json!(""), json!({"unit": 7}))), json!(null)), Vec::<String>::new());
    let first = values.replace("{{ v }}", "{{ v if loop.first }}");
    assert_eq!(left_out(&first, chat(call(json!(""), json!({"unit": 7, "u": "x"}))), json!(null)), calls);
    assert_eq!(left_out(values, chat(call(json!(""), json!({}))), json!(null)), calls);
    // Content beside calls, and calls beside content.
    let either = "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls|tojson }}{% else %}{{ m.content }}{% endif %}{% endfor %}";
    assert_eq!(
        left_out(either, chat(call(json!("hm"), json!({"unit": 7}))), json!(null)),
        ["messages[1].content (assistant)"]
    );
    let content = "{% for m in messages %}{% if m.content %}{{ m.content }}{% else %}{{ m.tool_calls|tojson }}{% endif %}{% endfor %}";
    assert_eq!(left_out(content, chat(call(json!("hm"), json!({"unit": 7}))), json!(null)), calls);
    assert_eq!(left_out(content, chat(call(json!(null), json!({"unit": 7}))), json!(null)), Vec::<String>::new());
    // Tools.
    assert_eq!(left_out(CHATML, json!([turn("user", "a"), turn("assistant", "b")]), tools()), ["tools[0]"]);
    // Turns of other roles.
    let only = "{% for m in messages if m.role in ['user', 'assistant'] %}{{ m.content }}{% endfor %}";
    let roles = json!([
        turn("system", "7"),
        turn("developer", "7"),
        turn("user", "7"),
        turn("tool", "7"),
        turn("assistant", "7")
    ]);
    assert_eq!(
        left_out(only, roles, json!(null)),
        ["messages[0].content (system)", "messages[1].content (developer)", "messages[3].content (tool)"]
    );
    // An empty system prompt says nothing.
    let empty = json!([turn("system", ""), turn("user", "7"), turn("assistant", "7")]);
    assert_eq!(left_out(only, empty, json!(null)), Vec::<String>::new());
}

#[test]
fn reasoning_of_earlier_turns_may_be_dropped() {
    let chat = json!([
        turn("user", "Q"),
        turn("assistant", "<think>\nwhy\n</think>\n\nA"),
        turn("user", "R"),
        json!({"role": "assistant", "content": "B", "reasoning_content": "so"}),
    ]);
    assert_eq!(left_out(THINKING, chat.clone(), json!(null)), Vec::<String>::new());
    // This template never renders the reasoning of a turn with content.
    assert_eq!(left_out(CHATML, chat.clone(), json!(null)), ["messages[3].reasoning_content"]);
    // And this one none, as that of R1's distillations, which would train answers without their reasoning.
    let answers = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}";
    assert_eq!(left_out(answers, chat, json!(null)), ["the reasoning of messages[1]", "messages[3].reasoning_content"]);
    for name in REASONING {
        let chat = json!([turn("user", "Q"), {"role": "assistant", "content": "B", name: "so"}]);
        assert_eq!(left_out(CHATML, chat.clone(), json!(null)), [format!("messages[1].{name}")]);
        assert_eq!(left_out(THINKING, chat, json!(null)), Vec::<String>::new());
    }
}

/// A template that branches on a text may refuse the marks.
#[test]
fn texts_that_decide_are_looked_for_themselves() {
    let source = "{% for m in messages %}{% if m.role == 'system' and m.content != 'brief' %}{{ raise_exception('no') }}{% endif %}\
                  {% if m.role != 'tool' %}{{ m.content }}{% endif %};{% endfor %}";
    let chat = json!([turn("system", "brief"), turn("user", "a"), turn("tool", "zzz"), turn("assistant", "b")]);
    assert_eq!(left_out(source, chat, json!(null)), ["messages[2].content (tool)"]);
    let source = "{% for m in messages %}{% if m.content == 'You are a helpful assistant.' %}{{ m.content }}{% elif m.role != 'system' %}\
                  {{ m.content }}{% endif %}{% endfor %}";
    let chat = json!([turn("system", "You are a helpful assistant."), turn("user", "a"), turn("assistant", "b")]);
    assert_eq!(left_out(source, chat, json!(null)), Vec::<String>::new());
}

#[test]
fn marks_keep_what_templates_look_at() {
    assert_eq!(insert("<tool_response>\nrain\n</tool_response>", "M"), "<tool_response>\nraMin\n</tool_response>");
    assert_eq!(insert(" ab ", "M"), " aMb ");
    assert_eq!(insert("7", "M"), "M7");
    assert_eq!(insert("grüße", "M"), "grüMße");
    assert_eq!(insert("a < b", "M"), "a M< b");
}
