//! Parts of a flat f32 buffer kept as matrices elsewhere, scaled and rounded; all of them in one launch.

use crate::runtime::op::{blocks, kernel};
use crate::runtime::{Array, Cuda, DType, Ints, MemoryUse, args, entry};

/// Values that one block writes.
const TILE: usize = 2048;

/// A copy of one parameter outside the flat buffer.
#[derive(Clone, Debug)]
pub(crate) struct ParamCopy {
    /// Its first value in the flat buffer.
    pub(crate) first: usize,
    /// Factor of the values.
    pub(crate) scale: f32,
    /// The matrix, which the part fills row by row.
    pub(crate) target: Array,
}

/// All parts of a buffer that are kept elsewhere, in one dtype.
#[derive(Clone, Debug)]
pub(crate) struct ParamCopies {
    tiles: Ints,
    count: usize,
    dtype: DType,
    /// The memory that the tiles name.
    _targets: Vec<Array>,
}

impl ParamCopies {
    /// # Panics
    /// Without parts, or when their dtypes differ.
    pub(crate) fn new(cuda: &Cuda, copies: Vec<ParamCopy>) -> Self {
        let dtype = copies.first().expect("there is a part").target.dtype();
        let mut words = Vec::new();
        for ParamCopy { first, scale, target } in &copies {
            assert_eq!(target.dtype(), dtype, "dtype of a copy");
            let count = target.rows() * target.cols();
            for start in (0..count).step_by(TILE) {
                let halves = |n: u64| [n as u32, (n >> 32) as u32];
                words.extend(halves(target.ptr()));
                words.extend(halves(*first as u64));
                let small = |n: usize| u32::try_from(n).expect("a parameter has fewer than 2³² values");
                words.extend([start, TILE.min(count - start), target.cols(), target.ld()].map(small));
                words.extend([scale.to_bits(), 0]);
            }
        }
        let count = words.len() / WORDS;
        let targets = copies.into_iter().map(|copy| copy.target).collect();
        Self { tiles: Ints::from_slice(cuda, &words, MemoryUse::ParamCopies), count, dtype, _targets: targets }
    }

    /// Writes the current values.
    pub(crate) fn sync(&self, values: &Array) {
        kernel(values.cuda(), entry!("param_copies.cu", "param_copies"), self.dtype).launch(
            [blocks(self.count), 1, 1],
            [256, 1, 1],
            0,
            args![values.ptr(), self.tiles.ptr()],
        );
    }
}

/// Words of a tile.
const WORDS: usize = 10;
