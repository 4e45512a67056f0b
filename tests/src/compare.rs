//! Comparison of numbers with tolerances.

use rekindle_models::{Batch, IGNORED};

use crate::RowLosses;

/// The tolerance for a token, times max(1, |nll|), and for a row's sum, relative. The goldens' own spread between two
/// summation orders is up to 1.5e-6; the largest measured difference is 2.6e-6.
const TOLERANCE: f64 = 1e-5;

/// Asserts that `nll`, one number per target of `batch`, equals `expected` for these rows.
pub fn assert_nll(what: &str, batch: &Batch, nll: &[f32], expected: &[RowLosses]) {
    assert_eq!(nll.len(), batch.tokens(), "{what}: expected one nll per target");
    for (document, &row) in batch.documents().zip(&batch.rows) {
        let got = counted(batch, document, nll);
        let want = &expected[row as usize];
        assert_eq!(got.len(), want.nll.len(), "{what}, row {row}: counted labels");
        for (i, (got, want)) in got.iter().zip(&want.nll).enumerate() {
            let error = (got - want).abs() / want.abs().max(1.0);
            // Written so that NaN fails.
            assert!(error <= TOLERANCE, "{what}, row {row}, label {i}: nll {got}, expected {want}: off by {error:e}");
        }
        let sum: f64 = got.iter().sum();
        let error = (sum / want.sum - 1.0).abs();
        assert!(error <= TOLERANCE, "{what}, row {row}: sum {sum}, expected {}: off by {error:e}", want.sum);
    }
    for (i, (nll, target)) in nll.iter().zip(&batch.targets).enumerate() {
        assert!(*target != IGNORED || *nll == 0.0, "{what}: target {i} is ignored, but its nll is {nll}");
    }
}

/// Returns the largest |Δnll| / max(1, |nll|) over the targets that are not ignored.
pub fn worst_nll(batch: &Batch, nll: &[f32], expected: &[RowLosses]) -> f64 {
    let rows = batch.documents().zip(&batch.rows);
    let errors = rows.flat_map(|(document, &row)| {
        let pairs = counted(batch, document, nll).into_iter().zip(&expected[row as usize].nll);
        pairs.map(|(got, want)| (got - want).abs() / want.abs().max(1.0)).collect::<Vec<_>>()
    });
    errors.fold(0.0, f64::max)
}

/// Returns ‖a − b‖₂ / ‖b‖₂, or 0 if both are zero.
pub fn relative_distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "different lengths");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let distance = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    if distance == 0.0 { 0.0 } else { distance / norm(&mut b.iter().map(|b| f64::from(*b))) }
}

fn counted(batch: &Batch, document: core::ops::Range<usize>, nll: &[f32]) -> Vec<f64> {
    document.filter(|&i| batch.targets[i] != IGNORED).map(|i| f64::from(nll[i])).collect()
}
