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
