//! `rekindle completions`.

use crate::run;

#[test]
fn every_shell_completes_the_commands_and_their_options() {
    for (shell, registers) in [
        ("bash", "complete -F"),
        ("zsh", "#compdef rekindle"),
        ("fish", "complete -c rekindle"),
        ("elvish", "edit:completion:arg-completer[rekindle]"),
        ("powershell", "Register-ArgumentCompleter"),
    ] {
        let script = run(&format!("completions {shell}")).ok().stdout;
        for part in [registers, "quantize", "split-max-size"] {
            assert!(script.contains(part), "{shell}: {part}");
        }
    }
    run("completions tcsh").fails(2, &["tcsh", "bash"]);
}
