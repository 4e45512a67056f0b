//! This project's own chat templates against transformers: text, ids and masks.

mod chats;

use std::path::Path;

use chats::Goldens;

#[test]
fn own_templates_equal_transformers() {
    let goldens = Goldens::read();
    let mut checked = Vec::new();
    for golden in &goldens.templates {
        let name = golden["template"].as_str().expect("a name");
        if goldens.ours.iter().any(|ours| ours == name) {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/templates/{name}.jinja"));
            let source = std::fs::read_to_string(path).expect("there");
            assert_eq!(goldens.check(golden, &source), Vec::<String>::new());
            checked.push(name);
        }
    }
    assert_eq!(checked, ["brackets", "chatml", "default_system", "headers", "marked", "thinking"]);
}
