//! The chat templates of real checkpoints, as the `trl` wheel brings them, against transformers: text, ids and masks.
//!
//! `REKINDLE_TRL_TEMPLATES` names the directory `trl/chat_templates` of the unpacked wheel; its version stands in
//! `goldens/chats/make.py`. The templates are not part of this project, so without the variable this is not run.

mod chats;
mod harmony;

use std::path::PathBuf;
use std::process::ExitCode;

use chats::Goldens;

fn main() -> ExitCode {
    let Some(dir) = std::env::var_os("REKINDLE_TRL_TEMPLATES").map(PathBuf::from) else {
        println!("trl_templates: not run: REKINDLE_TRL_TEMPLATES does not name trl/chat_templates of the trl wheel");
        return ExitCode::SUCCESS;
    };
    let goldens = Goldens::read();
    let (mut count, mut problems) = (0, Vec::new());
    for golden in &goldens.templates {
        let name = golden["template"].as_str().expect("a name");
        if goldens.ours.iter().any(|ours| ours == name) {
            continue;
        }
        count += 1;
        let path = dir.join(format!("{name}.jinja"));
        match std::fs::read_to_string(&path) {
            Ok(source) => problems.extend(goldens.check(golden, &source)),
            Err(error) => problems.push(format!("{}: {error}", path.display())),
        }
    }
    problems.extend(harmony::check(&dir));
    problems.iter().for_each(|problem| println!("{problem}"));
    println!("trl_templates: {count} templates, {} differences", problems.len());
    ExitCode::from(u8::from(count == 0 || !problems.is_empty()))
}
