//! Runs the tests one after another and prints a line for each.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::tensor::DType;
use rekindle_kernels::Device;
use rekindle_kernels::runtime::Cuda;

use crate::common::{self, Case, LOW_DTYPES, Layout, Place, judge};

/// The factor of the house rule.
const FACTOR: f64 = 2.0;

/// Twelve units in the last place of the largest value, instead of the CPU's four, in f32. NVIDIA's guide lets `expf` be
/// off by 2 units, a quotient by 2 and `rsqrtf` by 2; a gradient has up to three of them in a product, which doubles
/// where it is a difference of two.
pub(crate) const FLOOR: f64 = 3.0 * common::F32_FLOOR;

/// A fault that no later operation survives.
pub(crate) struct Lost;

/// The device, the filter of names, and the counts so far.
pub(crate) struct Suite {
    pub(crate) device: Device,
    pub(crate) cuda: Cuda,
    pub(crate) filter: String,
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
}

impl Suite {
    /// A case in every dtype and every layout.
    pub(crate) fn dtypes<C: Case>(&mut self, case: impl Fn(DType) -> C) -> Result<(), Lost> {
        self.case(&case(DType::F32), DType::F32, FLOOR, &Layout::ROW_MAJOR)?;
        for (dtype, rounding) in LOW_DTYPES {
            self.case(&case(dtype), dtype, rounding, &Layout::ROW_MAJOR)?;
        }
        Ok(())
    }

    pub(crate) fn case(&mut self, case: &impl Case, dtype: DType, floor: f64, layouts: &[Layout]) -> Result<(), Lost> {
        let device = self.device.clone();
        if !device.supports_dtype(dtype) {
            self.skipped += 1;
            return Ok(());
        }
        self.test(&format!("{case:?} {dtype:?}"), || {
            let (truth, naive) = (case.naive(DType::F64), case.naive(dtype));
            let mut worst = 0.0f64;
            for &layout in layouts {
                let place = Place::new(device.clone(), dtype, layout);
                let results = case.ours(&place);
                // Before the numbers are judged, which are not there after an error.
                device.check().unwrap_or_else(|error| panic!("{layout:?}: {error}"));
                worst = worst.max(judge(&format!("{layout:?}"), &results, &naive, &truth, FACTOR, floor));
                place.assert_unchanged();
            }
            format!("{worst:.2} × the plain error")
        })
    }

    pub(crate) fn property(&mut self, name: &str, holds: impl FnOnce(&Device)) -> Result<(), Lost> {
        let device = self.device.clone();
        self.test(name, || {
            holds(&device);
            String::from("holds")
        })
    }

    /// Runs a test and prints its line.
    fn test(&mut self, name: &str, test: impl FnOnce() -> String) -> Result<(), Lost> {
        if !name.contains(&self.filter) {
            self.skipped += 1;
            return Ok(());
        }
        let outcome = catch_unwind(AssertUnwindSafe(test));
        // The device may find something wrong later than the test does.
        let fault = self.cuda.synchronize().err();
        match (&outcome, &fault) {
            (Ok(said), None) => {
                println!("ok      {name}: {said}");
                self.passed += 1;
            }
            _ => {
                let said = outcome.err().map(message).unwrap_or_default();
                let fault = fault.map(|fault| fault.to_string()).filter(|fault| !said.contains(fault.as_str()));
                let reasons: Vec<String> =
                    [said].into_iter().chain(fault).filter(|reason| !reason.is_empty()).collect();
                println!("FAILED  {name}: {}", reasons.join("; "));
                self.failed += 1;
            }
        }
        self.cuda.take_error();
        // After a refusal the next operation runs; after a fault none does.
        self.cuda.synchronize().map_err(|error| {
            println!("the device is lost: {error}");
            Lost
        })
    }
}

/// Returns the message of a panic.
fn message(panic: Box<dyn std::any::Any + Send>) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}
