//! Compares learning-rate schedules with `transformers.get_scheduler`.

use rekindle_tests::{goldens, read_json};
use rekindle_train::{LrSchedulerKwargs, LrSchedulerType, Schedule};

#[test]
fn every_factor_of_every_schedule_equals_transformers() {
    let golden = read_json(&goldens().join("schedules.json"));
    let total = golden["max_steps"].as_u64().expect("a count") as usize;
    let schedules = golden["schedules"].as_array().expect("a list");
    assert_eq!(schedules.len(), 45, "15 schedules with three warm-ups each");
    let mut worst = 0.0f64;
    for schedule in schedules {
        let read = |key: &str| schedule[key].clone();
        let kind: LrSchedulerType = serde_json::from_value(read("lr_scheduler_type")).expect("a known schedule");
        let kwargs: LrSchedulerKwargs = serde_json::from_value(read("lr_scheduler_kwargs")).expect("known arguments");
        let warmup = schedule["warmup_steps"].as_u64().expect("a count") as usize;
        // The goldens' optimizer has a learning rate of 1.
        let ours = Schedule::new(kind, &kwargs, 1.0, warmup, total).expect("valid arguments");
        let factors = schedule["factors"].as_array().expect("a list");
        assert_eq!(factors.len(), total + 1);
        for (step, want) in factors.iter().enumerate() {
            let (got, want) = (ours.factor(step), want.as_f64().expect("a number"));
            worst = worst.max((got - want).abs());
            // The same formula in the same precision differs by a rounding or two of numbers up to 1.
            assert!((got - want).abs() <= 1e-15, "{kind:?} {kwargs:?}, {warmup}, step {step}: {got}, not {want}");
        }
    }
    println!("largest difference of a factor: {worst:.1e}");
}
