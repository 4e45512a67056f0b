use serde_json::json;

use super::*;
use crate::test_support::{BRACKETS, CHATML, DEFAULT_SYSTEM, HEADERS, THINKING};

fn render(source: &str, messages: &[Message], options: &RenderOptions) -> Result<String, String> {
    let special = [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(name, text)| (name.to_owned(), text.to_owned()));
    ChatTemplate::with_special_tokens(source, &special.into()).expect("valid").try_render(messages, options)
}

fn prompt() -> RenderOptions {
    RenderOptions { add_generation_prompt: true, ..RenderOptions::default() }
}

fn kwargs(name: &str, value: serde_json::Value) -> RenderOptions {
    RenderOptions { kwargs: Map::from_iter([(name.to_owned(), value)]), ..RenderOptions::default() }
}

fn message(value: serde_json::Value) -> Message {
    Message::from_json(value, "message").expect("valid")
}

fn call(content: &str) -> Message {
    let call = json!({"function": {"name": "clock", "arguments": {"zone": "<ä>", "at": [1, 2.5]}}});
    message(json!({"role": "assistant", "content": content, "tool_calls": [call]}))
}

fn system() -> Message {
    Message::new("system", "S")
}

fn user() -> Message {
    Message::new("user", "Q")
}

fn assistant() -> Message {
    Message::new("assistant", "A")
}

// The expected texts below are those of transformers 5's render_jinja_template for the same templates and messages.

#[test]
fn chatml() {
    assert_eq!(
        render(CHATML, &[system(), user(), assistant()], &RenderOptions::default()).expect("renders"),
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    );
    assert_eq!(
        render(CHATML, &[user()], &prompt()).expect("renders"),
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn headers_with_trimmed_contents_and_a_call() {
    let date = kwargs("date", json!("1 May 2025"));
    let messages = [Message::new("system", " S "), user(), Message::new("assistant", " A\n")];
    assert_eq!(
        render(HEADERS, &messages, &date).expect("renders"),
        "<s><|header|>system<|end_header|>\n\nToday: 1 May 2025\n\nS<|eot|><|header|>user<|end_header|>\n\nQ<|eot|>\
         <|header|>assistant<|end_header|>\n\nA<|eot|>"
    );
    let options = RenderOptions { add_generation_prompt: true, ..date };
    assert_eq!(
        render(HEADERS, &[user(), call(""), Message::new("tool", "5")], &options).expect("renders"),
        "<s><|header|>system<|end_header|>\n\nToday: 1 May 2025\n\n<|eot|><|header|>user<|end_header|>\n\nQ<|eot|>\
         <|header|>assistant<|end_header|>\n\n{\"name\": \"clock\", \"parameters\": {\"zone\": \"<ä>\", \"at\": [1, 2.5]}}\
         <|eot|><|header|>tool<|end_header|>\n\n5<|eot|><|header|>assistant<|end_header|>\n\n"
    );
}

#[test]
fn the_date_is_that_of_the_clock() {
    let text = render(HEADERS, &[user()], &RenderOptions::default()).expect("renders");
    let year = clock::strftime("%Y", SystemTime::now()).expect("known");
    let date = text.split_once("Today: ").and_then(|(_, rest)| rest.split_once('\n')).expect("a date").0;
    assert!(date.len() == "26 Jul 2024".len() && date.ends_with(&year), "{date}");
}

#[test]
fn a_default_system_prompt_and_tools() {
    assert_eq!(
        render(DEFAULT_SYSTEM, &[user(), assistant()], &RenderOptions::default()).expect("renders"),
        "<|im_start|>system\nHelp.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    );
    let tools = Some(json!([{"type": "function", "name": "clock"}]));
    let messages = [system(), user(), call(""), Message::new("tool", "5"), Message::new("tool", "6"), assistant()];
    assert_eq!(
        render(DEFAULT_SYSTEM, &messages, &RenderOptions { tools, ..RenderOptions::default() }).expect("renders"),
        "<|im_start|>system\nS\n\n# Tools\n\n{\"type\": \"function\", \"name\": \"clock\"}<|im_end|>\n\
         <|im_start|>user\nQ<|im_end|>\n\
         <|im_start|>assistant\n<call>clock {\"zone\": \"<ä>\", \"at\": [1, 2.5]}</call><|im_end|>\n\
         <|im_start|>user\n<result>5</result>\n<result>6</result><|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    );
    assert_eq!(
        render(DEFAULT_SYSTEM, &[system(), user(), call("see"), Message::new("tool", "5")], &prompt())
            .expect("renders"),
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n\
         <|im_start|>assistant\nsee\n<call>clock {\"zone\": \"<ä>\", \"at\": [1, 2.5]}</call><|im_end|>\n\
         <|im_start|>user\n<result>5</result><|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn thinking_of_earlier_questions_is_dropped() {
    let messages = [
        user(),
        Message::new("assistant", "<think>\nwhy\n</think>\n\nA"),
        Message::new("user", "R"),
        Message::new("assistant", "B"),
    ];
    assert_eq!(
        render(THINKING, &messages, &RenderOptions::default()).expect("renders"),
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n\
         <|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nB<|im_end|>\n"
    );
    let options = RenderOptions { add_generation_prompt: true, ..kwargs("enable_thinking", json!(false)) };
    assert_eq!(
        render(THINKING, &[user()], &options).expect("renders"),
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    );
}

#[test]
fn reasoning_goes_by_several_names() {
    let messages = [
        user(),
        message(json!({"role": "assistant", "content": "A", "reasoning_content": "why"})),
        Message::new("user", "<result>1</result>"),
        message(json!({"role": "assistant", "content": "B", "thinking": "so"})),
    ];
    assert_eq!(
        render(THINKING, &messages, &RenderOptions::default()).expect("renders"),
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\nwhy\n</think>\n\nA<|im_end|>\n\
         <|im_start|>user\n<result>1</result><|im_end|>\n<|im_start|>assistant\n<think>\nso\n</think>\n\nB<|im_end|>\n"
    );
}

#[test]
fn brackets_on_indented_lines() {
    let messages = [
        system(),
        Message::new("user", " Q "),
        assistant(),
        Message::new("user", "R"),
        Message::new("assistant", "B "),
    ];
    assert_eq!(
        render(BRACKETS, &messages, &RenderOptions::default()).expect("renders"),
        "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A </s><s>[INST] R [/INST] B </s>"
    );
}

#[test]
fn a_template_may_refuse() {
    let error =
        |source, messages: &[Message]| render(source, messages, &RenderOptions::default()).expect_err("refused");
    assert_eq!(error(BRACKETS, &[user(), user()]), "user and assistant must take turns (line 10 of the template)");
    assert_eq!(
        error(HEADERS, &[user(), Message::new("developer", "x")]),
        "cannot place role developer (line 15 of the template)"
    );
}

#[test]
fn undefined_is_empty_until_looked_into() {
    let render = |source: &str| render(source, &[user()], &RenderOptions::default());
    assert_eq!(render("[{{ nothing }}{{ messages[0].nothing }}]"), Ok("[]".to_owned()));
    assert_eq!(
        render("{% if nothing %}a{% else %}b{% endif %}{% for x in nothing %}c{% endfor %}"),
        Ok("b".to_owned())
    );
    assert!(render("{{ nothing.more }}").is_err());
}

#[test]
fn loops_can_be_left_and_lists_taken_apart() {
    let source = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.items()|list|length }}{% endfor %}\
                  {{ 'a-b'.split('-')[-1].upper() }}{{ none }}{{ true }}";
    assert_eq!(render(source, &[user(), user()], &RenderOptions::default()), Ok("2BNoneTrue".to_owned()));
}

#[test]
fn line_ends_of_the_source_do_not_matter() {
    let source = "{% if true %}\r\na\r\n{{ 'b\r\nc' }}{% endif %}\rd";
    assert_eq!(render(source, &[user()], &RenderOptions::default()), Ok("a\nb\ncd".to_owned()));
}

#[test]
fn a_template_that_does_not_parse_names_the_line() {
    let error = ChatTemplate::new("{% for m in messages %}\n{{ m }\n{% endfor %}").expect_err("broken");
    assert!(error.to_string().starts_with("chat template: ") && error.to_string().contains("line 2"), "{error}");
}

/// Numbers, and lists and dicts of them, are formatted as in Python. The expected texts are those of
/// `goldens/numbers/make.py`.
#[test]
fn numbers_are_pythons() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/numbers/numbers.json");
    let golden: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).expect("there")).expect("JSON");
    let mut wrong = Vec::new();
    let mut check = |source: &str, value: serde_json::Value, expected: &serde_json::Value| {
        let mut message = user();
        message.extra.insert("value".to_owned(), value);
        let source = format!("{{%- set v = messages[0].get('value') -%}}{source}");
        let text = render(&source, &[message], &RenderOptions::default());
        if text.as_deref().ok() != expected.as_str() {
            wrong.push(format!("{source}\n  here   {text:?}\n  Python {expected}"));
        }
    };
    let templates = golden["templates"].as_array().expect("a list");
    for value in golden["values"].as_array().expect("a list") {
        let json = value["json"].as_str().expect("a text");
        for (template, text) in templates.iter().zip(value["texts"].as_array().expect("a list")) {
            check(template.as_str().expect("a text"), crate::numbers::parse(json).expect("JSON"), text);
        }
    }
    for literal in golden["literals"].as_array().expect("a list") {
        check(literal["template"].as_str().expect("a text"), json!(null), &literal["text"]);
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn a_rendering_has_a_budget() {
    let limits = [
        "{% for i in range(20000) %}{% for j in range(20000) %}x{% endfor %}{% endfor %}",
        "{% for i in range(20000) %}{% for j in range(20000) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(99999) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x='x') %}{% for i in range(99999) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x='xy') %}{% for i in range(99) %}{% set ns.x = ns.x.replace('x', ns.x) %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(30) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(30) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x ~ '' }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x|length }}",
        "{% set ns = namespace(x=['x']) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x|join }}",
        "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}",
        "{% for x in [[1, 2]] recursive %}{{ loop([x, x, x]) }}{% endfor %}",
        "{{ 'x' * 10**9 }}",
        "{{ 10**9 * 'x' }}",
        "{{ ('x' * 10**7) ~ ('x' * 10**7) }}{{ ('x' * 10**8)|length }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ range(10**9)|list|length }}",
        "{{ ([1] * 10**9)|length }}{{ ([1] * 10**8)|tojson }}",
        "{% for i in [1] * 10**8 %}{% endfor %}",
        "{{ '%1000000000d'|format(1) }}",
        "{{ '{:>1000000000}'.format('x') }}",
        "{{ '{:>{}}'.format('x', 10**9) }}{{ '{:.1000000000f}'.format(1.5) }}",
        "{{ 'x'|indent(10**9) }}{{ ['x', 'y']|join('x' * 10**8) }}",
        "{{ [1]|tojson(indent=10**9) }}",
        "{{ messages|batch(10**9, 'x')|list|length }}",
        "{{ 9**9**9 }}{% for i in range(99999) %}{% for j in range(99999) %}{{ 9**99 }}{% endfor %}{% endfor %}",
        "{% set x %}{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}{% endset %}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ (messages[0].content * 10**6).replace('', 'x' * 10**6)|length }}",
    ];
    for source in limits {
        let started = std::time::Instant::now();
        let error = render(source, &[user()], &RenderOptions::default()).expect_err(source);
        assert!(started.elapsed().as_secs() < 20, "{source}: {:?}", started.elapsed());
        assert!(!error.is_empty());
    }
    let error = |source: &str| render(source, &[user()], &RenderOptions::default()).expect_err("stopped");
    assert_eq!(
        error(limits[1]),
        "it took more than 1,031,500 steps, the limit for a conversation of this size; does it loop for ever?"
    );
    assert_eq!(
        error("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}"),
        "it wrote more than 16,778,256 bytes, the limit for a conversation of this size; does it repeat itself?"
    );
}

/// Deep values are visited and freed recursively, which needs a large enough stack.
#[test]
fn deep_values_do_not_overflow_the_stack() {
    let deep = |times: usize, set: &str, then: &str| {
        let source = format!(
            "{{% set ns = namespace(x=[1]) %}}{{% for i in range({times}) %}}{{% set ns.x = {set} %}}{{% endfor %}}{then}"
        );
        render(&source, &[user()], &RenderOptions::default())
    };
    assert_eq!(deep(90_000, "[ns.x]", ""), Ok(String::new()));
    assert_eq!(deep(60_000, "{'a': ns.x}", ""), Ok(String::new()));
    assert_eq!(deep(9_000, "ns.x[0:]", "{% for x in ns.x %}{{ x }}{% endfor %}"), Ok("1".to_owned()));
    for then in ["{{ ns.x }}", "{{ ns.x ~ '' }}", "{{ ns.x|tojson }}"] {
        let error = deep(9_000, "[ns.x]", then).expect_err("too deep");
        assert!(error.contains("nested more than 200 levels deep"), "{error}");
    }
}

/// A usual template stays far below the limit for a long conversation.
#[test]
fn long_conversations_have_room() {
    let turns = 2_000;
    let messages: Vec<Message> = (0..turns).map(|i| if i % 2 == 0 { user() } else { assistant() }).collect();
    for source in [CHATML, DEFAULT_SYSTEM, HEADERS, THINKING, BRACKETS] {
        let text = render(source, &messages, &RenderOptions::default()).expect("within the limits");
        assert!(text.len() > turns * 5);
    }
    let long = [Message::new("user", "x".repeat(40 << 20)), assistant()];
    let text = render(CHATML, &long, &RenderOptions::default()).expect("within the limits");
    assert!(text.len() > 40 << 20);
}

#[test]
fn a_content_that_is_null_is_none() {
    let call = message(json!({"role": "assistant", "content": null, "tool_calls": [{"name": "clock"}]}));
    let source = "{{ messages[0].content is none }} {{ messages[0]['content'] is defined }}";
    assert_eq!(render(source, &[call], &RenderOptions::default()), Ok("True True".to_owned()));
}
