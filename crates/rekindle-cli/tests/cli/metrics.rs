//! Metrics of a run for other programs.

use std::fs;

use crate::{Scratch, done};

#[test]
fn metrics_are_exported_in_every_format() {
    let scratch = Scratch::new();
    scratch.train(&[]).ok();
    let out = scratch.path("out").display().to_string();
    let export = |more: &[&str]| {
        let mut command = crate::command();
        done(command.current_dir(scratch.path("")).args(["export", "metrics", &out, "--to"]).args(more))
    };
    let table = export(&["csv"]).ok();
    assert_eq!(table.stdout, format!("{out}/metrics.csv\n"));
    let table = fs::read_to_string(scratch.path("out/metrics.csv")).unwrap();
    assert!(table.starts_with("step,seconds,train/loss,") && table.lines().count() == 3, "{table}");

    let run = export(&["mlflow"]).ok().stdout;
    assert!(run.starts_with("mlruns/"), "{run}");
    let run = scratch.path(run.trim());
    let losses = fs::read_to_string(run.join("metrics/train/loss")).unwrap();
    assert!(losses.lines().count() == 2 && losses.lines().all(|line| line.split(' ').count() == 3), "{losses}");
    assert_eq!(fs::read_to_string(run.join("params/lora.r")).unwrap(), "2");
    assert!(run.join("artifacts/report.html").exists());

    let run = export(&["wandb-offline", "--out", "elsewhere"]).ok().stdout;
    assert!(run.starts_with("elsewhere/offline-run-"), "{run}");
    let file = fs::read_dir(scratch.path(run.trim())).unwrap().next().unwrap().unwrap().path();
    assert!(fs::read(file).unwrap().starts_with(b":W&B"));

    export(&["excel"]).fails(2, &["csv, mlflow, wandb-offline"]);
    let empty = tempfile::tempdir().unwrap();
    crate::run(&format!("export metrics {} --to csv", empty.path().display())).fails(1, &["metrics.jsonl"]);
}
