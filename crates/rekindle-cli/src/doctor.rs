//! `rekindle doctor`.

use crate::failure::Failure;
use crate::output;

pub(crate) fn run() -> Result<(), Failure> {
    let report = rekindle::cuda_report();
    output::line(&report.to_string())?;
    if report.is_complete() {
        return Ok(());
    }
    Err(Failure::Missing("device \"cuda\" cannot be used on this machine; device \"cpu\" can".to_owned()))
}
