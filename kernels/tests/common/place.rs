//! Where the crate's operations are run: a device, a dtype, and how operands lie in memory.

use std::cell::RefCell;

use burn::tensor::{DType, Device, Tensor};
use rekindle_kernels::{from_f32, to_f32};

/// How a matrix operand lies in memory. An operation may not care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Row-major, held by the operation alone, which may write over it.
    Owned,
    /// Row-major and also held by someone else, for whom it must stay as it is.
    Shared,
    /// Columns of a wider matrix.
    Columns,
    /// Rows of a taller matrix.
    Rows,
    /// Stored column by column.
    Transposed,
    /// Stored last row first.
    Flipped,
}

impl Layout {
    pub(crate) const ALL: [Self; 6] =
        [Self::Owned, Self::Shared, Self::Columns, Self::Rows, Self::Transposed, Self::Flipped];
}

/// A device, a dtype and a layout.
pub(crate) struct Place {
    pub(crate) device: Device,
    pub(crate) dtype: DType,
    layout: Layout,
    /// The second holders' view of shared operands, and what they must still see.
    held: RefCell<Vec<(Tensor<2>, Vec<f32>)>>,
}

impl Place {
    pub(crate) fn new(device: Device, dtype: DType, layout: Layout) -> Self {
        Self { device, dtype, layout, held: RefCell::default() }
    }

    /// A matrix in this place's layout.
    pub(crate) fn matrix(&self, values: &[f32], [rows, cols]: [usize; 2]) -> Tensor<2> {
        let packed = |values: Vec<f32>, shape| from_f32(values, shape, &self.device, self.dtype);
        /// Fills what the view must not read.
        const OUTSIDE: f32 = 3e4;
        match self.layout {
            Layout::Owned => packed(values.to_vec(), [rows, cols]),
            Layout::Shared => {
                let tensor = packed(values.to_vec(), [rows, cols]);
                self.held.borrow_mut().push((tensor.clone(), to_f32(tensor.clone())));
                tensor
            }
            Layout::Columns => {
                let mut wide = vec![OUTSIDE; rows * (cols + 3)];
                for (wide, row) in wide.chunks_exact_mut(cols + 3).zip(values.chunks_exact(cols)) {
                    wide[1..=cols].copy_from_slice(row);
                }
                packed(wide, [rows, cols + 3]).narrow(1, 1, cols)
            }
            Layout::Rows => {
                let outside = vec![OUTSIDE; 2 * cols];
                packed([&outside, values, &outside].concat(), [rows + 4, cols]).narrow(0, 2, rows)
            }
            Layout::Transposed => {
                let by_columns = (0..cols * rows).map(|i| values[i % rows * cols + i / rows]).collect();
                packed(by_columns, [cols, rows]).transpose()
            }
            Layout::Flipped => packed(values.rchunks_exact(cols).flatten().copied().collect(), [rows, cols]).flip([0]),
        }
    }

    /// A vector, packed.
    pub(crate) fn vector(&self, values: &[f32]) -> Tensor<1> {
        from_f32(values.to_vec(), [values.len()], &self.device, self.dtype)
    }

    /// Fails if an operation wrote over an operand that someone else holds.
    pub(crate) fn assert_unchanged(&self) {
        for (tensor, values) in self.held.borrow().iter() {
            assert_eq!(&to_f32(tensor.clone()), values, "a shared operand was written over");
        }
    }
}
