use serde_json::json;

use super::*;

/// Renders a conversation after [`settle`].
fn settled(source: &str, messages: Value) -> String {
    let template = ChatTemplate::new(source).expect("valid");
    let values = messages.as_array().expect("a list").clone();
    let mut messages: Vec<Message> =
        values.into_iter().map(|value| Message::from_json(value, "m").expect("valid")).collect();
    settle(&template, &mut messages, &RenderOptions::default());
    template.render(&messages, &RenderOptions::default()).expect("renders")
}

fn call(content: Value, arguments: Value) -> Value {
    json!([
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": content, "tool_calls": [{"function": {"name": "move", "arguments": arguments}}]},
    ])
}

#[test]
fn a_null_content_is_what_the_template_can_show() {
    let null = || call(json!(null), json!({"x": 0}));
    // A template that looks for none gets it; one that would write it, or fail, gets an empty text.
    let looks = "{% for m in messages %}{% if m.content is none %}{{ m.tool_calls[0].function.name }}{% else %}\
                 {{ m.content }}{% endif %};{% endfor %}";
    assert_eq!(settled(looks, null()), "go;move;");
    assert_eq!(settled("{% for m in messages %}{{ m.content }};{% endfor %}", null()), "go;;");
    assert_eq!(settled("{% for m in messages %}{{ m['content'] ~ ';' }}{% endfor %}", null()), "go;;");
    assert_eq!(settled("{% for m in messages %}{{ m.content + ';' }}{% endfor %}", null()), "go;;");
    assert_eq!(settled("{% for m in messages %}{{ m.content | trim }};{% endfor %}", null()), "go;;");
    assert_eq!(settled("{% for m in messages %}{{ m.content or 'call' }};{% endfor %}", null()), "go;call;");
    // An empty text stays one.
    assert_eq!(settled(looks, call(json!(""), json!({"x": 0}))), "go;;");
}

#[test]
fn arguments_are_what_the_template_needs() {
    let text = || call(json!(""), json!("{\"x\":  0, \"name\": \"Köln \\\"a\\\"\", \"wei\": 25000000000000000000}"));
    let all = |calls: &str| {
        format!("{{% for m in messages %}}{{% for c in m.tool_calls or [] %}}{calls}{{% endfor %}}{{% endfor %}}")
    };
    let parsed = "{\"x\": 0, \"name\": \"Köln \\\"a\\\"\", \"wei\": 25000000000000000000}";
    let as_it_is = "{\"x\":  0, \"name\": \"Köln \\\"a\\\"\", \"wei\": 25000000000000000000}";
    for (calls, expected) in [
        // The template needs an object: a text would be encoded twice, be omitted, or fail.
        ("{{ c.function.arguments | tojson }}", parsed.to_owned()),
        ("{{ c.function.arguments | tojson(ensure_ascii=true) }}", parsed.replace('ö', "\\u00f6")),
        ("{{ c.function | tojson }}", format!("{{\"name\": \"move\", \"arguments\": {parsed}}}")),
        (
            "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}",
            "x=0;name=Köln \"a\";wei=25000000000000000000;".to_owned(),
        ),
        ("{% for k, v in c.function.arguments | items %}{{ k }};{% endfor %}", "x;name;wei;".to_owned()),
        ("{% if c.function.arguments is mapping %}{{ c.function.arguments.x }}{% endif %}", "0".to_owned()),
        // Takes the text.
        ("{{ c.function.arguments }}", as_it_is.to_owned()),
        ("{{ '<' + c.function.arguments + '>' }}", format!("<{as_it_is}>")),
        ("{{ '<' ~ c.function.arguments ~ '>' }}", format!("<{as_it_is}>")),
        (
            "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}\
             {% endif %}",
            as_it_is.to_owned(),
        ),
    ] {
        assert_eq!(settled(&all(calls), text()), expected, "{calls}");
    }
    // Objects are kept, and text that is not the JSON of an object stays text.
    assert_eq!(settled(&all("{{ c.function.arguments | tojson }}"), call(json!(""), json!({"x": 0}))), "{\"x\": 0}");
    for other in ["[1]", "7", "\"a\"", "x = 0", ""] {
        let expected = json!(other).to_string();
        assert_eq!(settled(&all("{{ c.function.arguments | tojson }}"), call(json!(""), json!(other))), expected);
    }
    // Also where a call is not in "function", and where it has no arguments to speak of.
    let flat = json!([{"role": "assistant", "content": "", "tool_calls": [{"name": "move", "arguments": "{}"}]}]);
    assert_eq!(settled(&all("{{ c | tojson }}"), flat), "{\"name\": \"move\", \"arguments\": {}}");
}

/// Text of a user that looks like encoded arguments is not changed.
#[test]
fn escapes_in_other_text_do_not_matter() {
    let mut messages = call(json!(""), json!("{\"x\": 0}"));
    messages[0]["content"] = json!("\"{\\\"x\\\": 0}\"");
    let source = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments ~ '' }}\
                  {% endfor %}{% endfor %}";
    assert_eq!(settled(source, messages), "\"{\\\"x\\\": 0}\"{\"x\": 0}");
}
