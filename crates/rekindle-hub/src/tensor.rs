use std::borrow::Cow;
use std::fmt;
use std::io::{self, Write};

use half::{bf16, f16};

use crate::{Dtype, Error};

/// A stored tensor, borrowed from the memory map of its file.
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    /// The name in the file.
    pub name: &'a str,
    /// The stored dtype.
    pub dtype: Dtype,
    /// The dimensions, outermost first; empty for a scalar.
    pub shape: &'a [usize],
    /// The stored elements or blocks, little-endian, with any alignment: row-major unless they are
    /// [`transposed`](Self::transposed), and every second row if there are [`odd_rows`](Self::odd_rows).
    pub data: &'a [u8],
    /// True if the last two dimensions are stored in the other order.
    pub transposed: bool,
    /// The rows 1, 3, … if these are stored apart; `data` then has the rows 0, 2, ….
    pub odd_rows: Option<&'a [u8]>,
}

impl<'a> TensorView<'a> {
    /// Returns the elements as f32, row-major: F16 and BF16 exactly, F64 rounded to nearest, blocks decoded.
    ///
    /// # Errors
    /// [`Error::NotFloat`] for any other dtype, and for blocks without a decoder.
    pub fn to_f32(&self) -> Result<Vec<f32>, Error> {
        let data = self.row_major();
        match self.dtype {
            Dtype::F32 => Ok(decode(&data, f32::from_le_bytes)),
            Dtype::BF16 => Ok(decode(&data, |b| bf16::from_le_bytes(b).to_f32())),
            Dtype::F16 => Ok(decode(&data, |b| f16::from_le_bytes(b).to_f32())),
            Dtype::F64 => Ok(decode(&data, |b| f64::from_le_bytes(b) as f32)),
            dtype => {
                let decoded = match dtype {
                    Dtype::Blocks(format) => format.to_f32(&data),
                    _ => None,
                };
                decoded.ok_or_else(|| Error::NotFloat { name: self.name.to_owned(), dtype })
            }
        }
    }

    /// Returns the stored size in bytes.
    pub fn bytes(&self) -> usize {
        self.data.len() + self.odd_rows.map_or(0, <[u8]>::len)
    }

    /// Returns true if `data` has all elements, row-major.
    pub fn is_row_major(&self) -> bool {
        !self.transposed && self.odd_rows.is_none()
    }

    /// Returns the stored elements, row-major.
    pub fn row_major(&self) -> Cow<'a, [u8]> {
        if let Some(odd) = self.odd_rows {
            let rows = self.shape.iter().rev().skip(1).product::<usize>();
            let width = (self.bytes() / rows.max(1)).max(1);
            let pairs = self.data.chunks_exact(width).zip(odd.chunks_exact(width));
            return Cow::Owned(pairs.flat_map(|(even, odd)| [even, odd]).flatten().copied().collect());
        }
        let &[.., rows, cols] = self.shape else { return Cow::Borrowed(self.data) };
        if !self.transposed {
            return Cow::Borrowed(self.data);
        }
        let size = self.dtype.size();
        let mut out = vec![0; self.data.len()];
        for (from, to) in self.data.chunks_exact(rows * cols * size).zip(out.chunks_exact_mut(rows * cols * size)) {
            match size {
                2 => transpose::<2>(from.as_chunks().0, to.as_chunks_mut().0, rows, cols),
                4 => transpose::<4>(from.as_chunks().0, to.as_chunks_mut().0, rows, cols),
                _ => transpose_bytes(from, to, [rows, cols], size),
            }
        }
        Cow::Owned(out)
    }
}

/// Elements on a side of the squares that are transposed at a time.
const TILE: usize = 32;

/// Writes `from` `[cols, rows]` to `to` `[rows, cols]`.
fn transpose<const SIZE: usize>(from: &[[u8; SIZE]], to: &mut [[u8; SIZE]], rows: usize, cols: usize) {
    for first_row in (0..rows).step_by(TILE) {
        for first_col in (0..cols).step_by(TILE) {
            for row in first_row..rows.min(first_row + TILE) {
                for col in first_col..cols.min(first_col + TILE) {
                    to[row * cols + col] = from[col * rows + row];
                }
            }
        }
    }
}

/// As [`transpose`], for elements of any size.
fn transpose_bytes(from: &[u8], to: &mut [u8], [rows, cols]: [usize; 2], size: usize) {
    for row in 0..rows {
        for col in 0..cols {
            to[(row * cols + col) * size..][..size].copy_from_slice(&from[(col * rows + row) * size..][..size]);
        }
    }
}

impl fmt::Debug for TensorView<'_> {
    /// Omits the elements, of which there may be a billion.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("TensorView")
            .field("name", &self.name)
            .field("dtype", &self.dtype)
            .field("shape", &self.shape)
            .finish_non_exhaustive()
    }
}

/// Writes `values` as elements of `dtype`, rounded to nearest even; the inverse of [`TensorView::to_f32`].
///
/// # Errors
/// The errors of `out`, and [`io::ErrorKind::InvalidInput`] if `dtype` is not F64, F32, F16 or BF16.
pub fn write_f32(out: &mut (impl Write + ?Sized), dtype: Dtype, values: &[f32]) -> io::Result<()> {
    match dtype {
        Dtype::F32 => encode(out, values, f32::to_le_bytes),
        Dtype::BF16 => encode(out, values, |v| bf16::from_f32(v).to_le_bytes()),
        Dtype::F16 => encode(out, values, |v| f16::from_f32(v).to_le_bytes()),
        Dtype::F64 => encode(out, values, |v| f64::from(v).to_le_bytes()),
        dtype => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("floats are written as F64, F32, F16 or BF16, not as {dtype}"),
        )),
    }
}

/// Decodes via byte arrays, because the elements of a mapped file may be unaligned.
fn decode<const SIZE: usize>(data: &[u8], element: impl Fn([u8; SIZE]) -> f32) -> Vec<f32> {
    let (elements, _) = data.as_chunks::<SIZE>();
    elements.iter().map(|&bytes| element(bytes)).collect()
}

fn encode<const SIZE: usize>(
    out: &mut (impl Write + ?Sized),
    values: &[f32],
    element: impl Fn(f32) -> [u8; SIZE],
) -> io::Result<()> {
    const BLOCK: usize = 4096;
    let mut bytes = Vec::with_capacity(BLOCK.min(values.len()) * SIZE);
    for block in values.chunks(BLOCK) {
        bytes.clear();
        bytes.extend(block.iter().flat_map(|&value| element(value)));
        out.write_all(&bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(dtype: Dtype, data: &[u8]) -> TensorView<'_> {
        TensorView { name: "w", dtype, shape: &[2], data, transposed: false, odd_rows: None }
    }

    /// Uses the hand-written bit patterns of 1.5 and −2.
    #[test]
    fn every_float_type_is_read_little_endian() {
        let cases: [(Dtype, &[u8]); 4] = [
            (Dtype::F32, &[0, 0, 0xC0, 0x3F, 0, 0, 0, 0xC0]),
            (Dtype::BF16, &[0xC0, 0x3F, 0, 0xC0]),
            (Dtype::F16, &[0, 0x3E, 0, 0xC0]),
            (Dtype::F64, &[0, 0, 0, 0, 0, 0, 0xF8, 0x3F, 0, 0, 0, 0, 0, 0, 0, 0xC0]),
        ];
        for (dtype, bytes) in cases {
            assert_eq!(view(dtype, bytes).to_f32().unwrap(), [1.5, -2.0], "{dtype}");
            let mut written = Vec::new();
            write_f32(&mut written, dtype, &[1.5, -2.0]).unwrap();
            assert_eq!(written, bytes, "{dtype}");
        }
    }

    #[test]
    fn any_alignment_is_supported() {
        let mut bytes = [0; 16];
        for offset in 0..8 {
            bytes[offset..offset + 4].copy_from_slice(&1.5_f32.to_le_bytes());
            bytes[offset + 4..offset + 8].copy_from_slice(&(-2.0_f32).to_le_bytes());
            let values = view(Dtype::F32, &bytes[offset..offset + 8]).to_f32();
            assert_eq!(values.unwrap(), [1.5, -2.0], "offset {offset}");
        }
    }

    #[test]
    fn special_values_are_kept_and_rounding_is_to_even() {
        let bits = |dtype, value: f32| {
            let mut bytes = Vec::new();
            write_f32(&mut bytes, dtype, &[value]).unwrap();
            u16::from_le_bytes([bytes[0], bytes[1]])
        };
        // 1 + 2⁻⁸ is halfway between two BF16 values (8 significant bits); the even one is 1.
        assert_eq!(bits(Dtype::BF16, 1.0 + f32::powi(2.0, -8)), 0x3F80);
        assert_eq!(bits(Dtype::BF16, 1.0 + 3.0 * f32::powi(2.0, -8)), 0x3F82);
        // 65520 is halfway between the largest F16 and the next power of two.
        assert_eq!(bits(Dtype::F16, 65520.0), 0x7C00);
        assert_eq!(bits(Dtype::F16, f32::powi(2.0, -24)), 0x0001);

        let f16_bits = [0x7C00_u16, 0xFC00, 0x0001, 0x8000].map(u16::to_le_bytes);
        let values = view(Dtype::F16, f16_bits.as_flattened()).to_f32().unwrap();
        assert_eq!(values[..2], [f32::INFINITY, f32::NEG_INFINITY]);
        assert_eq!(values[2], f32::powi(2.0, -24));
        assert_eq!(values[3].to_bits(), (-0.0_f32).to_bits());
    }

    #[test]
    fn several_blocks_are_written() {
        let values: Vec<f32> = (0..10_001).map(|i| i as f32).collect();
        let mut bytes = Vec::new();
        write_f32(&mut bytes, Dtype::F32, &values).unwrap();
        assert_eq!(view(Dtype::F32, &bytes).to_f32().unwrap(), values);
    }

    #[test]
    fn integer_dtypes_are_refused() {
        let error = view(Dtype::I32, &[0; 8]).to_f32().unwrap_err();
        assert!(matches!(&error, Error::NotFloat { name, dtype: Dtype::I32 } if name == "w"), "{error}");
        let error = write_f32(&mut Vec::new(), Dtype::U8, &[1.0]).unwrap_err();
        assert!(error.to_string().contains("not as U8"), "{error}");
    }

    #[test]
    fn rows_that_are_stored_apart_take_turns() {
        let (even, odd) = ([1, 2, 5, 6], [3, 4, 7, 8]);
        let view = TensorView { odd_rows: Some(&odd), shape: &[4, 2], ..view(Dtype::U8, &even) };
        assert_eq!(*view.row_major(), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert!(view.bytes() == 8 && !view.is_row_major());
    }

    #[test]
    fn transposed_elements_come_back_in_rows() {
        // Two matrices [3, 40], stored as [40, 3]: more than one square.
        let value = |matrix: usize, row: usize, col: usize| (1000 * matrix + 100 * row + col) as f32;
        let stored = (0..2).flat_map(|m| (0..40).flat_map(move |col| (0..3).map(move |row| value(m, row, col))));
        let expected: Vec<f32> =
            (0..2).flat_map(|m| (0..3).flat_map(move |row| (0..40).map(move |col| value(m, row, col)))).collect();
        let stored: Vec<f32> = stored.collect();
        for dtype in [Dtype::F64, Dtype::F32, Dtype::F16] {
            let mut data = Vec::new();
            write_f32(&mut data, dtype, &stored).unwrap();
            let view =
                TensorView { name: "w", dtype, shape: &[2, 3, 40], data: &data, transposed: true, odd_rows: None };
            assert_eq!(view.to_f32().unwrap(), expected, "{dtype}");
        }
    }
}
