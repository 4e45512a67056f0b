//! Commands that work, and every way in which one can fail.

use std::time::Instant;

use serde_json::{Map, Value, json};

use super::*;
use crate::PYTHON_TEMPLATE;

/// A Python program that answers each request with the expression `rewards`.
fn python(rewards: &str) -> Vec<String> {
    let program = format!(
        "import json, sys, os, time\n\
         for line in sys.stdin:\n    \
             request = json.loads(line)\n    \
             samples = request['samples']\n    \
             rewards = {rewards}\n    \
             print(json.dumps({{'id': request['id'], 'rewards': rewards}}), flush=True)\n"
    );
    vec!["python3".to_owned(), "-c".to_owned(), program]
}

fn shell(script: &str) -> Vec<String> {
    ["sh", "-c", script].map(str::to_owned).to_vec()
}

fn config(command: Vec<String>) -> CommandRewardConfig {
    CommandRewardConfig { timeout: 20.0, restarts: 0, ..CommandRewardConfig::new(command) }
}

fn score(reward: &mut CommandReward, completions: &[&str]) -> Result<Vec<Option<f64>>, String> {
    let row = Map::from_iter([("answer".to_owned(), json!(4))]);
    let sample = |completion: &&'static str| Sample {
        prompt: "p",
        completion,
        prompt_ids: &[],
        completion_ids: &[7],
        truncated: false,
        row: &row,
        messages: None,
    };
    let completions: Vec<&'static str> = completions.iter().map(|text| &*text.to_string().leak()).collect();
    let samples: Vec<Sample> = completions.iter().map(sample).collect();
    reward.score(&samples).map_err(|error| error.to_string())
}

/// Scores two completions with a new process; returns the error.
fn failure(config: &CommandRewardConfig) -> String {
    let mut reward = CommandReward::start("judge", config).unwrap();
    let error = score(&mut reward, &["a", "b"]).unwrap_err();
    assert!(error.starts_with("reward \"judge\""), "{error}");
    error
}

#[test]
fn processes_stay_and_divide_a_batch() {
    let mut options = config(python("[None if s['completion'] == 'x' else os.getpid() for s in samples]"));
    options.workers = 2;
    let mut reward = CommandReward::start("judge", &options).unwrap();
    let first = score(&mut reward, &["a", "b", "c"]).unwrap();
    let second = score(&mut reward, &["a", "x", "c"]).unwrap();
    assert_eq!((first[0], first[1]), (second[0], first[0]));
    assert_eq!((second[1], first[2]), (None, second[2]));
    assert_ne!(first[0], first[2]);
    assert_eq!(score(&mut reward, &[]), Ok(vec![]));
}

#[test]
fn too_few_and_too_many_scores_are_errors() {
    let few = failure(&config(python("[1.0]")));
    assert_eq!(few, "reward \"judge\" returned 1 score for 2 completions; return one number or null for each");
    let many = failure(&config(python("[1, 2, 3]")));
    assert!(many.contains("returned 3 scores for 2 completions"), "{many}");
}

#[test]
fn nonsense_is_an_error_with_standard_error() {
    let error = failure(&config(shell("echo loading >&2; while read line; do echo hello; done")));
    assert!(error.contains("the command answered \"hello\", which is not a reply such as"), "{error}");
    assert!(error.ends_with("the end of its standard error:\nloading"), "{error}");
    let nan = failure(&config(python("[float('nan'), 1]")));
    assert!(nan.contains("NaN") && nan.contains("which is not a reply"), "{nan}");
    let error = failure(&config(shell("read line; echo '{\"id\": 1, \"error\": \"no gold\"}'; read line")));
    assert!(error.contains("the command reported an error: no gold"), "{error}");
}

#[test]
fn an_extra_line_is_noticed_at_the_next_request() {
    let program = shell("while read line; do echo '{\"id\": 1, \"rewards\": [1]}'; done");
    let mut reward = CommandReward::start("judge", &config(program)).unwrap();
    assert_eq!(score(&mut reward, &["a"]), Ok(vec![Some(1.0)]));
    let error = score(&mut reward, &["a"]).unwrap_err();
    assert!(error.contains("answered request 2 with id 1"), "{error}");
}

#[test]
fn a_process_that_dies_is_an_error_with_its_status_and_standard_error() {
    let error = failure(&config(shell("read line; echo 'KeyError: answer' >&2; exit 3")));
    let expected =
        "sh: the command ended without a reply (exit status: 3); the end of its standard error:\nKeyError: answer";
    assert_eq!(error, format!("reward \"judge\": {expected}"));
    let error = failure(&config(shell("exit 0")));
    assert!(error.ends_with("(exit status: 0); its standard error is empty"), "{error}");
}

#[test]
fn a_process_that_hangs_is_ended_after_the_timeout() {
    let start = Instant::now();
    let options = CommandRewardConfig { timeout: 0.3, ..config(shell("exec sleep 60")) };
    let error = failure(&options);
    assert!(error.contains("did not reply within 0.3 s; raise timeout"), "{error}");
    assert!(start.elapsed().as_secs() < 20);
}

#[test]
fn a_process_that_died_is_started_again_with_the_same_request() {
    let dir = tempfile::tempdir().unwrap();
    let marker = dir.path().join("died");
    let again = python("[len(s['completion']) for s in samples]");
    let script = r#"if [ -e "$0" ]; then exec "$@"; fi; read line; touch "$0"; exit 1"#;
    let mut command = shell(script);
    command.push(marker.display().to_string());
    command.extend(again);
    let mut reward = CommandReward::start("judge", &CommandRewardConfig { restarts: 1, ..config(command) }).unwrap();
    assert_eq!(score(&mut reward, &["a", "bbb"]), Ok(vec![Some(1.0), Some(3.0)]));

    let error = failure(&CommandRewardConfig { restarts: 2, ..config(shell("exit 1")) });
    assert!(error.contains("sh after 2 restarts: the command ended without a reply"), "{error}");
}

#[test]
fn a_request_larger_than_a_pipe_reaches_a_slow_reader() {
    let text = "x".repeat(1 << 20);
    let mut reward = CommandReward::start("judge", &config(python("[len(s['completion']) for s in samples]"))).unwrap();
    assert_eq!(score(&mut reward, &[&text]), Ok(vec![Some(1_048_576.0)]));
    // A process that reads nothing does not block the run.
    let options = CommandRewardConfig { timeout: 0.3, ..config(shell("exec sleep 60")) };
    let mut reward = CommandReward::start("judge", &options).unwrap();
    assert!(score(&mut reward, &[&text]).unwrap_err().contains("did not reply within"));
}

#[test]
fn bad_options_are_refused() {
    for (options, expected) in [
        (config(vec![]), "command is empty"),
        (CommandRewardConfig { workers: 0, ..config(shell("")) }, "workers = 0"),
        (
            CommandRewardConfig { timeout: 0.0, ..config(shell("")) },
            "timeout = 0; it must be a number of seconds above 0",
        ),
        (CommandRewardConfig { timeout: f64::NAN, ..config(shell("")) }, "timeout = NaN"),
        (config(vec!["/nonexistent/judge".to_owned()]), "cannot start \"/nonexistent/judge\""),
    ] {
        let error = CommandReward::start("judge", &options).map(|_| ()).unwrap_err().to_string();
        assert!(error.starts_with("reward \"judge\"") && error.contains(expected), "{error}");
    }
}

#[test]
fn the_template_runs_a_function_with_the_signature_of_trl() {
    let template = |program: &str| vec!["python3".to_owned(), "-c".to_owned(), program.to_owned()];
    let mut reward = CommandReward::start("judge", &config(template(PYTHON_TEMPLATE))).unwrap();
    assert_eq!(score(&mut reward, &["it is 4", "it is 5"]), Ok(vec![Some(1.0), Some(0.0)]));

    // A function on conversations that prints, and leaves a completion out.
    let begin = PYTHON_TEMPLATE.find("def reward").unwrap();
    let end = PYTHON_TEMPLATE.find("replies, sys.stdout").unwrap();
    let function = "def reward(prompts, completions, completion_ids, level, **kwargs):\n    \
                    print('scoring', prompts[0][0]['content'])\n    \
                    return [None if l is None else l + len(c[0]['content']) + len(i)\n            \
                    for c, i, l in zip(completions, completion_ids, level)]\n";
    let program = format!("{}{function}{}", &PYTHON_TEMPLATE[..begin], &PYTHON_TEMPLATE[end..]);
    let mut reward = CommandReward::start("judge", &config(template(&program))).unwrap();
    let messages: Value = json!([{"role": "user", "content": "Hi"}]);
    let rows = [json!({"level": 0.5}), json!({"level": null})];
    let sample = |row: &'static Value| Sample {
        prompt: "<user>Hi",
        completion: "Hello",
        prompt_ids: &[],
        completion_ids: &[1, 2],
        truncated: false,
        row: row.as_object().unwrap(),
        messages: Some(Box::leak(Box::new(messages.clone()))),
    };
    let samples: Vec<Sample> = rows.map(|row| &*Box::leak(Box::new(row))).into_iter().map(sample).collect();
    assert_eq!(reward.score(&samples).unwrap(), [Some(7.5), None]);
}
