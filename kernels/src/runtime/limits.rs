//! Sizes that the kernels take.

/// The widest row that one block of the RMSNorm kernels holds in its registers.
pub(crate) const MAX_NORM_WIDTH: usize = 16_384;

/// The widest row that one block of the kernel for fp8 rows holds in its registers.
pub(crate) const MAX_FP8_ROW: usize = 65_536;

/// The most channels of an attention head.
pub(crate) const MAX_HEAD_DIM: usize = 256;

/// Channels of an attention head are a multiple of this.
pub(crate) const HEAD_DIM_MULTIPLE: usize = 8;

/// Rows of matrices begin a multiple of this many elements apart, 16 bytes of a 16-bit dtype.
pub(crate) const ROW_MULTIPLE: usize = 8;
