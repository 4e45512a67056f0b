//! The setting of an operation under test: device, dtype and memory layout of operands.

use std::cell::RefCell;

use burn::tensor::{DType, Tensor as BurnTensor};
use rekindle_kernels::{Device, Tensor, from_f32, to_f32};

/// The memory layout of a matrix operand. Operations must not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Row-major, held by the operation alone, which may write over it.
    Owned,
    /// Row-major and also held by someone else, for whom it must stay as it is.
    Shared,
    /// Columns of a wider matrix, from the second on.
    Columns,
    /// Columns of a wider matrix whose rows begin at 16 bytes, as q, k and v lie in the result of one product.
    Panel,
    /// Rows of a taller matrix.
    Rows,
    /// Stored column by column; only a tensor of Burn can be.
    Transposed,
    /// Stored last row first; only a tensor of Burn can be.
    Flipped,
}

impl Layout {
    /// Those of an array of the CUDA runtime.
    pub(crate) const ROW_MAJOR: [Self; 5] = [Self::Owned, Self::Shared, Self::Columns, Self::Panel, Self::Rows];

    /// Those of a tensor of Burn.
    pub(crate) const ALL: [Self; 7] =
        [Self::Owned, Self::Shared, Self::Columns, Self::Panel, Self::Rows, Self::Transposed, Self::Flipped];
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
    pub(crate) fn matrix(&self, values: &[f32], dims: [usize; 2]) -> Tensor<2> {
        self.matrix_of(values, dims, self.dtype)
    }

    /// A matrix of another dtype in this place's layout.
    pub(crate) fn matrix_of(&self, values: &[f32], [rows, cols]: [usize; 2], dtype: DType) -> Tensor<2> {
        let packed = |values: Vec<f32>, shape| from_f32(values, shape, &self.device, dtype);
        /// Fills what the view must not read.
        const OUTSIDE: f32 = 3e4;
        match self.layout {
            Layout::Owned => packed(values.to_vec(), [rows, cols]),
            Layout::Shared => {
                let tensor = packed(values.to_vec(), [rows, cols]);
                self.held.borrow_mut().push((tensor.clone(), to_f32(tensor.clone())));
                tensor
            }
            Layout::Columns | Layout::Panel => {
                let (left, width) = if self.layout == Layout::Columns { (1, cols + 3) } else { (8, cols + 17) };
                let mut wide = vec![OUTSIDE; rows * width];
                for (wide, row) in wide.chunks_exact_mut(width).zip(values.chunks_exact(cols)) {
                    wide[left..left + cols].copy_from_slice(row);
                }
                packed(wide, [rows, width]).columns(left, cols)
            }
            Layout::Rows => {
                let outside = vec![OUTSIDE; 2 * cols];
                packed([&outside, values, &outside].concat(), [rows + 4, cols]).rows(2, rows)
            }
            Layout::Transposed => {
                let by_columns = (0..cols * rows).map(|i| values[i % rows * cols + i / rows]).collect();
                BurnTensor::from(packed(by_columns, [cols, rows])).transpose().into()
            }
            Layout::Flipped => {
                let last_first = values.rchunks_exact(cols).flatten().copied().collect();
                BurnTensor::from(packed(last_first, [rows, cols])).flip([0]).into()
            }
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
