use super::*;
use serde_json::json;

fn error(value: Value) -> String {
    RowContent::from_json(value).expect_err("a broken row")
}

#[test]
fn shapes_are_told_apart_by_their_keys() {
    let of = |value| RowContent::read(object(value).expect("an object"), true).expect("valid").0;
    let turns = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]);
    assert_eq!(of(json!({"messages": turns, "prompt": "unused", "id": 3})), RowFormat::Messages);
    assert_eq!(of(json!({"prompt": "a", "completion": "b"})), RowFormat::PromptCompletion);
    assert_eq!(of(json!({"prompt": [turns[0]], "completion": [turns[1]]})), RowFormat::PromptCompletion);
    assert_eq!(of(json!({"text": "a"})), RowFormat::Text);
    assert_eq!(of(json!({"input_ids": [1], "text": "a"})), RowFormat::InputIds);
    let said = json!([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]);
    assert_eq!(of(json!({"conversations": said, "text": "a"})), RowFormat::Conversations);
    assert_eq!(of(json!({"conversations": turns})), RowFormat::Conversations);
    assert_eq!(of(json!({"instruction": "a", "input": "", "output": "b", "text": "a b"})), RowFormat::Alpaca);
    // Columns of other rows in the same table are null in this one.
    assert_eq!(of(json!({"messages": null, "prompt": null, "text": "a"})), RowFormat::Text);
    assert_eq!(of(json!({"prompt": "a", "text": "a b"})), RowFormat::Text);
}

#[test]
fn errors_say_what_was_found_and_what_is_known() {
    let cases = [
        (json!([1]), "expected a JSON object, found a list"),
        (
            json!({"question": "a", "answer": "b"}),
            "unknown kind of row; its keys: \"question\", \"answer\"; known: \"messages\", \"conversations\", \
             \"prompt\" with \"completion\", \"instruction\" with \"output\", \"text\", \"input_ids\" (with or \
             without \"labels\"); other names can be mapped, as in [data] columns = { instruction = \"question\", \
             output = \"answer\" }",
        ),
        (json!({"instruction": "a"}), "has \"instruction\" but no \"output\""),
        (json!({"conversations": [], "id": 1}), "\"conversations\" is an empty list"),
        (
            json!({"messages": [{"role": "assistant", "content": "a"}], "tools": "get_time"}),
            "\"tools\" is a string, but not the JSON of a list of tools: expected value at line 1 column 1",
        ),
        (
            json!({"messages": [{"role": "assistant", "content": "a"}], "tools": {"name": "x"}}),
            "\"tools\" is an object, not a list of tools",
        ),
        (
            json!({"conversations": [{"from": "system", "value": "s"}, {"from": "gpt", "value": "a"}], "system": "t"}),
            "has \"system\" beside \"conversations\", which begin with a system turn; keep one",
        ),
        (json!({"prompt": "a"}), "has \"prompt\" but no \"completion\""),
        (json!({"completion": "a"}), "has \"completion\" but no \"prompt\""),
        (json!({"prompt": "a", "completion": ""}), "\"completion\" is empty"),
        (
            json!({"prompt": "a", "completion": []}),
            "\"prompt\" is a string and \"completion\" is a list; both must be strings, or both lists of messages",
        ),
        (json!({"messages": []}), "\"messages\" is an empty list"),
        (json!({"messages": "hi"}), "\"messages\" is a string, not a list of messages"),
        (
            json!({"messages": [{"role": "user", "content": "q"}]}),
            "\"messages\" has no assistant turn, so it has no token to train on",
        ),
        (json!({"text": 1}), "\"text\" is a number, not a string"),
        (json!({"text": ""}), "\"text\" is empty"),
        (json!({"input_ids": "1 2"}), "\"input_ids\" is a string, not a list of integers"),
        (json!({"input_ids": []}), "\"input_ids\" is an empty list"),
        (json!({"input_ids": [1, -2]}), "input_ids[1] is -2; expected an integer from 0 to 2147483647"),
        (json!({"input_ids": [1.5]}), "input_ids[0] is 1.5; expected an integer from 0 to 2147483647"),
        (json!({"input_ids": [1, 2], "labels": [1]}), "\"labels\" has 1 elements, \"input_ids\" 2"),
        (
            json!({"input_ids": [1, 2], "labels": [1, -1]}),
            "\"labels\" holds -1; only token ids and -100 (ignored) are allowed",
        ),
        (
            json!({"input_ids": [1, 0], "attention_mask": [1, 0]}),
            "\"attention_mask\" hides tokens; remove the padding from \"input_ids\"",
        ),
    ];
    for (row, message) in cases {
        assert_eq!(error(row), message);
    }
}

#[test]
fn columns_are_proposed_that_go_through_the_chat_template() {
    let error = |row: Value, has_template| {
        RowContent::read(object(row).expect("an object"), has_template).expect_err("of no shape")
    };
    let qa = json!({"Query": "a", "response": "b", "id": "3"});
    assert!(
        error(qa.clone(), true).ends_with("[data] columns = { instruction = \"Query\", output = \"response\" }"),
        "{}",
        error(qa, true)
    );
    let qa = json!({"question": "a", "answer": "b"});
    assert!(error(qa, false).ends_with("[data] columns = { prompt = \"question\", completion = \"answer\" }"));
    let turns = json!({"dialog": [{"role": "user", "content": "q"}], "source": "x"});
    assert!(error(turns, true).ends_with("[data] columns = { messages = \"dialog\" }"));
    let turns = json!({"chat": [{"from": "human", "value": "q"}]});
    assert!(error(turns, true).ends_with("[data] columns = { conversations = \"chat\" }"));
    assert!(error(json!({"body": "x"}), true).ends_with("{ instruction = \"question\", output = \"answer\" }"));
    // One key of a shape is there.
    assert_eq!(
        error(json!({"prompt": "a", "response": "b"}), true),
        "has \"prompt\" but no \"completion\"; its keys: \"prompt\", \"response\"; map them, as in [data] columns = { \
         instruction = \"prompt\", output = \"response\" }"
    );
    assert_eq!(
        error(json!({"prompt": "a", "response": "b"}), false),
        "has \"prompt\" but no \"completion\"; its keys: \"prompt\", \"response\"; map them, as in [data] columns = { \
         completion = \"response\" }"
    );
    assert!(error(json!({"input": "a", "output": "b"}), true).ends_with("columns = { instruction = \"input\" }"));
}

#[test]
fn what_stands_beside_the_turns_goes_along() {
    let row = json!({"conversations": [{"from": "gpt", "value": "a"}], "system": "s", "tools": "[{\"name\": \"t\"}]"});
    let RowContent::Messages { messages, tools, trained_from: 0, .. } = RowContent::from_json(row).expect("valid")
    else {
        panic!("a conversation")
    };
    assert_eq!(messages, [Message::new("system", "s"), Message::new("assistant", "a")]);
    assert_eq!(tools, Some(json!([{"name": "t"}])));
}

#[test]
fn a_null_is_shown_as_one() {
    assert!(
        error(json!({"text": null, "id": 4})).starts_with("unknown kind of row; its keys: \"text\" (null), \"id\";")
    );
}
