//! Learning-rate schedules against `transformers.get_scheduler`.

use rekindle_tests::{goldens, read_json};
use rekindle_train::{LrSchedulerType, lr_factor};

#[test]
fn every_factor_of_every_schedule() {
    let golden = read_json(&goldens().join("schedules.json"));
    let total = golden["max_steps"].as_u64().expect("a count") as usize;
    let schedules = golden["schedules"].as_array().expect("a list");
    assert_eq!(schedules.len(), 12, "four kinds with three warm-ups each");
    for schedule in schedules {
        let kind: LrSchedulerType =
            serde_json::from_value(schedule["lr_scheduler_type"].clone()).expect("a known schedule");
        let warmup = schedule["warmup_steps"].as_u64().expect("a count") as usize;
        let factors = schedule["factors"].as_array().expect("a list");
        assert_eq!(factors.len(), total + 1);
        for (step, want) in factors.iter().enumerate() {
            let (got, want) = (lr_factor(kind, step, warmup, total), want.as_f64().expect("a number"));
            // The same formula in the same precision: a rounding or two of numbers up to 1.
            assert!((got - want).abs() <= 1e-15, "{kind:?}, warm-up {warmup}, step {step}: {got}, not {want}");
        }
    }
}
