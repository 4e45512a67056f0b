/// The cosines and sines of every position and dimension pair, shared by all layers of a model.
///
/// `cos[p · half + i] = cos(p · inv_freq[i]) · attention_factor`, and `sin` likewise.
///
/// # Shapes
/// Both tables are `[seq_len, half]`, row-major, where `half` is half of the rotary dimensions.
///
/// # Dtypes
/// Frequencies are f32, the precision models are trained with. The angle (position times frequency) and its cosine are
/// computed in f64 and rounded to f32 once, so entries are as exact at position 1,000,000 as at position 1.
/// transformers also rounds the angle to f32, which changes it by up to `2⁻²⁴ · angle`: 1e-4 rad at position 2,000 and
/// 0.06 rad at a million.
#[derive(Debug, Clone, PartialEq)]
pub struct Tables {
    /// `[seq_len, half]`.
    pub cos: Vec<f32>,
    /// `[seq_len, half]`.
    pub sin: Vec<f32>,
    /// Number of positions.
    pub seq_len: usize,
    /// Number of pairs, half of the rotary dimensions.
    pub half: usize,
}

impl Tables {
    /// Builds the tables of positions `0 .. seq_len` from the given frequencies.
    ///
    /// [`RopeConfig::tables`](crate::RopeConfig::tables) derives the frequencies from the table's length. Use this
    /// function when the table must be longer or shorter than the length the frequencies were chosen for.
    pub fn new(inv_freq: &[f32], attention_factor: f64, seq_len: usize) -> Self {
        let half = inv_freq.len();
        let mut cos = Vec::with_capacity(seq_len * half);
        let mut sin = Vec::with_capacity(seq_len * half);
        for position in 0..seq_len {
            for &frequency in inv_freq {
                let (s, c) = (position as f64 * f64::from(frequency)).sin_cos();
                cos.push((c * attention_factor) as f32);
                sin.push((s * attention_factor) as f32);
            }
        }
        Self { cos, sin, seq_len, half }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_row_major_and_scaled() {
        let tables = Tables::new(&[1.0, 0.5], 2.0, 3);
        assert_eq!((tables.seq_len, tables.half), (3, 2));
        let expected_cos = [0.0, 0.0, 1.0, 0.5, 2.0, 1.0].map(|angle: f64| (2.0 * angle.cos()) as f32);
        let expected_sin = [0.0, 0.0, 1.0, 0.5, 2.0, 1.0].map(|angle: f64| (2.0 * angle.sin()) as f32);
        assert_eq!(tables.cos, expected_cos);
        assert_eq!(tables.sin, expected_sin);
    }

    /// 999,999 · 0.1f32 = 99,999.901490114629268646…, less 15,915 · 2π, is 3.0073263515104883803… in 60 decimal
    /// digits. The product rounded to f32 would give a cosine of -0.990587.
    #[test]
    fn positions_are_exact_at_a_million() {
        let tables = Tables::new(&[0.1], 1.0, 1_000_000);
        assert_eq!(tables.cos[999_999], -0.990_999_813_119_676_9_f64 as f32);
        assert_eq!(tables.sin[999_999], 0.133_863_252_600_425_91_f64 as f32);
    }
}
