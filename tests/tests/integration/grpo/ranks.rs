//! Runs of several ranks that sample completions, against the same run of one rank.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rekindle_dist::{Communicator, OneRank};
use rekindle_tests::on_ranks;
use rekindle_train::{
    Error, Resume, SftConfig, StepCount, TrainEnd, TrainEvent, TrainReport, Trainer, TrainerArguments,
};

use super::assert_close;
use super::runs::{config, even, fresh, grpo, numbers, prompts, rloo, task};

/// Ranks sample whole groups, and take the steps of one rank; a run of two ranks resumes on three while completions are in use.
#[test]
fn ranks_take_the_steps_of_one() {
    for (what, method) in [("grpo", grpo()), ("rloo", rloo())] {
        let train = |world: Arc<dyn Communicator>, dir: Option<&Path>, resume: bool, stop_at: usize| {
            let mut model = fresh();
            let stop = Arc::new(AtomicBool::new(false));
            let flag = Arc::clone(&stop);
            let is_asked = world.rank() + 1 == world.size();
            let resume = resume.then_some(Resume::Latest);
            let trainer = Trainer {
                arguments: TrainerArguments {
                    output_dir: dir.map(Path::to_owned),
                    resume,
                    ..TrainerArguments::default()
                },
                eval: Some(prompts()),
                rollouts: Some(task(even())),
                world,
                stop,
                on_event: Box::new(move |event| {
                    if let TrainEvent::Step { metrics, .. } = event
                        && is_asked
                        && metrics.step == stop_at
                    {
                        flag.store(true, Ordering::Relaxed);
                    }
                }),
                ..Trainer::new(
                    &mut model,
                    prompts(),
                    SftConfig {
                        eval_steps: Some(StepCount::Steps(3)),
                        learning_rate: Some(2e-4),
                        ..config(method.clone())
                    },
                )
            };
            let report = trainer.train()?;
            Ok((report, model.params().all_values()))
        };
        let expected = numbers(&train(Arc::new(OneRank), None, false, 0).expect("the run finishes").0);
        let check = |ranks: Vec<Result<(TrainReport, Vec<f32>), Error>>, what: &str| {
            let ranks: Vec<_> = ranks.into_iter().map(|rank| rank.expect("the run finishes")).collect();
            for (report, values) in &ranks {
                assert!(*values == ranks[0].1, "{what}: the ranks have the same parameters");
                let found = numbers(report);
                assert_eq!(found.len(), expected.len(), "{what}");
                let pairs = found.iter().zip(&expected).enumerate();
                for (index, ((loss, norm, metrics), (other_loss, other_norm, others))) in pairs {
                    // After the first step, the order of sums has changed the weights, and with them the differences of
                    // log-probabilities in the loss, whose f32 values are 5e-7 apart; gradients of a group cancel.
                    let tolerance = if index == 0 { 1e-6 } else { 1e-5 };
                    assert_close(what, *loss, *other_loss, tolerance);
                    assert_close(what, *norm, *other_norm, tolerance);
                    assert_eq!(metrics.0.len(), others.0.len(), "{what}");
                    for (name, value) in &metrics.0 {
                        assert_close(name, *value, others.0[name], 1e-5);
                    }
                }
            }
        };
        check(on_ranks(2, |world| train(world, None, false, 0)), what);
        check(on_ranks(5, |world| train(world, None, false, 0)), what);
        // Checkpoints need no shared file system.
        let dirs: Vec<_> = (0..3).map(|_| tempfile::tempdir().expect("a directory")).collect();
        let run = |world: Arc<dyn Communicator>, resume, stop_at| {
            train(Arc::clone(&world), Some(dirs[world.rank()].path()), resume, stop_at)
        };
        for stopped in on_ranks(2, |world| run(world, false, 3)) {
            assert_eq!(stopped.expect("it stops").0.end, TrainEnd::Interrupted, "{what}");
        }
        assert_eq!(dirs[0].path().join("checkpoint-3/rollouts.json").is_file(), what == "grpo");
        let resumed = on_ranks(3, |world| run(world, true, 0));
        let resumed: Vec<_> = resumed.into_iter().map(|rank| rank.expect("the run finishes")).collect();
        assert!(resumed.iter().all(|(_, values)| *values == resumed[0].1), "{what}");
        check(vec![Ok((resumed[0].0.clone(), resumed[0].1.clone()))], what);
    }
}
