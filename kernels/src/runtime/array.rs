//! Matrices of device memory.

use std::sync::Arc;

use super::limits::ROW_MULTIPLE;
use super::{Buffer, Cuda, CudaError, DType, MemoryUse, Operand, ReadBack};
use super::{elementwise, reduce};

/// A row-major matrix on the device, or a view of one; a vector has one row. Cloning gives another handle of the same
/// memory.
#[derive(Clone, Debug)]
pub struct Array {
    buffer: Arc<Buffer>,
    /// Elements of `dtype` before the first one.
    offset: usize,
    rows: usize,
    cols: usize,
    /// Elements from row to row.
    ld: usize,
    /// Spare columns: elements behind each row that belong to this matrix and hold nothing yet.
    pad_cols: usize,
    dtype: DType,
    /// The rows as codes, where the operation that made them left them.
    codes: Option<Arc<Fp8Rows>>,
}

/// Rows of a matrix as e4m3 codes with a scale each; see `fp8_rows.cu`.
#[derive(Debug)]
pub(crate) struct Fp8Rows {
    /// Rows begin at multiples of 16 bytes.
    pub(crate) codes: Buffer,
    /// f32.
    pub(crate) scales: Buffer,
    pub(crate) dims: [usize; 2],
}

/// The layout of an [`Array`] in its memory.
#[derive(Clone, Copy, Debug)]
pub struct ArrayShape {
    offset: usize,
    rows: usize,
    cols: usize,
    ld: usize,
    pad_cols: usize,
    dtype: DType,
}

impl Array {
    /// The memory, if no other handle reaches it, and how the matrix lies there.
    ///
    /// # Errors
    /// The matrix, when another handle or another library reaches its memory.
    pub fn into_buffer(self) -> Result<(Buffer, ArrayShape), Self> {
        if self.buffer.is_foreign() {
            return Err(self);
        }
        let Self { buffer, offset, rows, cols, ld, pad_cols, dtype, codes } = self;
        let shape = ArrayShape { offset, rows, cols, ld, pad_cols, dtype };
        match Arc::try_unwrap(buffer) {
            Ok(buffer) => Ok((buffer, shape)),
            Err(buffer) => Err(Self { buffer, offset, rows, cols, ld, pad_cols, dtype, codes }),
        }
    }

    /// A matrix that lies as another one did in memory as long as its.
    pub fn from_buffer(buffer: Buffer, ArrayShape { offset, rows, cols, ld, pad_cols, dtype }: ArrayShape) -> Self {
        Self { buffer: Arc::new(buffer), offset, rows, cols, ld, pad_cols, dtype, codes: None }
    }

    /// A matrix that is not initialized; nothing reads what lies between its rows.
    pub fn empty(cuda: &Cuda, dims: [usize; 2], dtype: DType, usage: MemoryUse) -> Self {
        Self::padded(cuda, dims, 0, dtype, usage)
    }

    /// A matrix that is not initialized, with `pad_cols` spare columns behind each row.
    pub fn padded(cuda: &Cuda, dims: [usize; 2], pad_cols: usize, dtype: DType, usage: MemoryUse) -> Self {
        let whole = Self::strided(cuda, dims, (dims[1] + pad_cols).next_multiple_of(ROW_MULTIPLE), dtype, usage);
        Self { pad_cols, ..whole }
    }

    /// A matrix that is not initialized and has nothing between its rows.
    pub fn dense(cuda: &Cuda, dims: [usize; 2], dtype: DType, usage: MemoryUse) -> Self {
        Self::strided(cuda, dims, dims[1], dtype, usage)
    }

    /// A matrix of zeros.
    pub fn zeros(cuda: &Cuda, dims: [usize; 2], dtype: DType, usage: MemoryUse) -> Self {
        let array = Self::empty(cuda, dims, dtype, usage);
        cuda.fill(&array.buffer, 0, array.buffer.bytes(), 0);
        array
    }

    /// A matrix with these values, row after row, rounded to `dtype`.
    ///
    /// # Panics
    /// If there are not as many values as `dims` say.
    pub fn from_f32(cuda: &Cuda, values: &[f32], dims: [usize; 2], dtype: DType, usage: MemoryUse) -> Self {
        if cuda.is_planned() {
            assert_eq!(values.len(), dims[0] * dims[1], "values of a matrix of {} × {}", dims[0], dims[1]);
            return elementwise::cast(&Self::unfilled(cuda, dims, DType::F32, usage), dtype, usage);
        }
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        elementwise::cast(&Self::from_bytes(cuda, &bytes, dims, DType::F32, usage), dtype, usage)
    }

    /// A matrix with these values, row after row, each as `dtype` in little-endian order.
    ///
    /// # Panics
    /// If there are not as many bytes as `dims` and `dtype` say.
    pub fn from_bytes(cuda: &Cuda, bytes: &[u8], dims: [usize; 2], dtype: DType, usage: MemoryUse) -> Self {
        let [rows, cols] = dims;
        assert_eq!(bytes.len(), rows * cols * dtype.bytes(), "bytes of a matrix of {rows} × {cols} {}", dtype.name());
        let dense = Self::dense(cuda, dims, dtype, usage);
        cuda.upload(&dense.buffer, bytes);
        dense.for_use(usage)
    }

    /// The memory of [`Array::from_bytes`], whatever it holds.
    pub fn unfilled(cuda: &Cuda, dims: [usize; 2], dtype: DType, usage: MemoryUse) -> Self {
        Self::dense(cuda, dims, dtype, usage).for_use(usage)
    }

    /// [`Array::aligned`], under a usage.
    fn for_use(self, usage: MemoryUse) -> Self {
        if self.is_aligned() { self } else { elementwise::copy_for(&self, usage) }
    }

    /// The values, row after row, after waiting for everything queued so far.
    ///
    /// # Errors
    /// The first error of the device since the last one that was taken.
    pub fn to_f32(&self) -> Result<Vec<f32>, CudaError> {
        let dense = Self::dense(self.cuda(), self.dims(), DType::F32, MemoryUse::Scratch);
        elementwise::copy_into(self, &dense);
        let mut bytes = vec![0; dense.buffer.bytes()];
        self.cuda().download(&dense.buffer, &mut bytes)?;
        Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    /// `[rows, cols]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Elements from row to row.
    pub fn ld(&self) -> usize {
        self.ld
    }

    /// Returns the dtype.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The address of the first element.
    pub fn ptr(&self) -> u64 {
        self.buffer.ptr() + (self.offset * self.dtype.bytes()) as u64
    }

    /// The device that the memory is on.
    pub fn cuda(&self) -> &Cuda {
        self.buffer.cuda()
    }

    /// The use of the memory.
    pub fn usage(&self) -> MemoryUse {
        self.buffer.usage()
    }

    /// The matrix for a product.
    pub fn operand(&self) -> Operand {
        Operand { ptr: self.ptr(), ld: self.ld, dtype: self.dtype }
    }

    /// `n` columns from `first` on, in the same memory.
    pub fn columns(&self, first: usize, n: usize) -> Self {
        assert!(first + n <= self.cols, "columns {first}..{} of {}", first + n, self.cols);
        let pad_cols = if first + n == self.cols { self.pad_cols } else { 0 };
        let codes = self.codes.clone().filter(|_| n == self.cols);
        Self { offset: self.offset + first, cols: n, pad_cols, codes, ..self.clone() }
    }

    /// Keeps the rows as codes beside the values. Views of other sizes do not have them.
    pub(crate) fn with_codes(self, codes: Fp8Rows) -> Self {
        Self { codes: Some(Arc::new(codes)), ..self }
    }

    /// Returns the rows as codes, if an operation left them.
    pub(crate) fn codes(&self) -> Option<Arc<Fp8Rows>> {
        self.codes.clone().filter(|codes| codes.dims == self.dims())
    }

    /// Returns the number of spare columns behind each row.
    pub fn pad_cols(&self) -> usize {
        self.pad_cols
    }

    /// Returns the matrix with `n` of its spare columns, whatever they hold.
    pub fn with_padding(&self, n: usize) -> Self {
        assert!(n <= self.pad_cols, "{n} more columns of {} spare ones", self.pad_cols);
        let codes = self.codes.clone().filter(|_| n == 0);
        Self { cols: self.cols + n, pad_cols: self.pad_cols - n, codes, ..self.clone() }
    }

    /// Matrices that lie side by side in one memory as one matrix, and otherwise copies of them in a new one; with
    /// `pad_cols` spare columns behind each row.
    pub fn side_by_side(parts: &[Self], pad_cols: usize) -> Self {
        let (first, last) = parts.first().zip(parts.last()).expect("there is something to put side by side");
        let touch = |[a, b]: &[&Self; 2]| {
            Arc::ptr_eq(&a.buffer, &b.buffer) && a.offset + a.cols == b.offset && a.ld == b.ld && a.dtype == b.dtype
        };
        let pairs = parts.iter().zip(&parts[1..]).map(|(a, b)| [a, b]);
        let cols = parts.iter().map(|part| part.cols).sum();
        if pairs.into_iter().all(|pair| touch(&pair)) && last.pad_cols >= pad_cols {
            return Self { cols, pad_cols: last.pad_cols, ..first.clone() };
        }
        let whole = Self::padded(first.cuda(), [first.rows, cols], pad_cols, first.dtype, MemoryUse::Activations);
        let mut column = 0;
        for part in parts {
            elementwise::copy_into(part, &whole.columns(column, part.cols));
            column += part.cols;
        }
        whole
    }

    /// `n` rows from `first` on, in the same memory.
    pub fn row_range(&self, first: usize, n: usize) -> Self {
        assert!(first + n <= self.rows, "rows {first}..{} of {}", first + n, self.rows);
        let codes = self.codes.clone().filter(|_| n == self.rows);
        Self { offset: self.offset + first * self.ld, rows: n, codes, ..self.clone() }
    }

    /// A part of a vector as a matrix without gaps, in the same memory: how a named weight lies in a flat buffer.
    pub fn part(&self, first: usize, [rows, cols]: [usize; 2]) -> Self {
        assert!(
            self.rows == 1 && first + rows * cols <= self.cols,
            "{rows} × {cols} from {first} of {:?}",
            self.dims()
        );
        Self { offset: self.offset + first, rows, cols, ld: cols, pad_cols: 0, codes: None, ..self.clone() }
    }

    /// All rows as one vector, in the same memory.
    ///
    /// # Panics
    /// If something lies between the rows.
    pub fn flattened(self) -> Self {
        assert!(self.is_contiguous(), "rows of {} elements begin every {}", self.cols, self.ld);
        let n = self.rows * self.cols;
        Self { rows: 1, cols: n, ld: n, pad_cols: 0, codes: None, ..self }
    }

    /// Returns whether no other handle refers to this memory, so that it can be overwritten.
    pub fn is_unique(&self) -> bool {
        Self::are_unique(&[self])
    }

    /// Returns whether no handles but these refer to their memory, for example columns of one matrix, and no other library.
    pub fn are_unique(arrays: &[&Self]) -> bool {
        arrays.iter().all(|array| {
            if array.buffer.is_foreign() {
                return false;
            }
            let here = arrays.iter().filter(|other| Arc::ptr_eq(&array.buffer, &other.buffer)).count();
            Arc::strong_count(&array.buffer) == here
        })
    }

    /// Returns whether the memory holds nothing but this matrix and its spare columns.
    pub fn is_whole(&self) -> bool {
        self.buffer.bytes() < (self.rows * (self.cols + self.pad_cols + ROW_MULTIPLE)).max(1) * self.dtype.bytes()
    }

    /// Returns whether the rows are adjacent.
    pub fn is_contiguous(&self) -> bool {
        self.rows <= 1 || self.ld == self.cols
    }

    /// The same values with nothing between the rows, in the same memory where that is so already.
    pub fn contiguous(&self) -> Self {
        if self.is_contiguous() {
            return self.clone();
        }
        let dense = Self::dense(self.cuda(), self.dims(), self.dtype, MemoryUse::Activations);
        elementwise::copy_into(self, &dense);
        dense
    }

    /// The sum of every column, f32 `[1, cols]`: the gradient of a bias.
    pub fn column_sums(&self) -> Self {
        reduce::column_sums(self)
    }

    /// Returns whether every row is 16-byte aligned, as kernels with wide accesses need.
    pub(crate) fn is_aligned(&self) -> bool {
        self.ptr().is_multiple_of(16) && (self.rows <= 1 || self.ld.is_multiple_of(ROW_MULTIPLE))
    }

    /// The same values where every row begins at 16 bytes, in the same memory where that is so already.
    pub fn aligned(&self) -> Self {
        if self.is_aligned() { self.clone() } else { elementwise::copy(self) }
    }

    /// The ends of the rows as a dtype that takes no more space, in the same memory.
    pub(crate) fn row_ends_as(&self, dtype: DType) -> Self {
        assert!(dtype.bytes() <= self.dtype.bytes(), "{} over {}", dtype.name(), self.dtype.name());
        let times = self.dtype.bytes() / dtype.bytes();
        let offset = self.offset * times + (times - 1) * self.ld;
        Self { offset, ld: self.ld * times, pad_cols: 0, dtype, codes: None, ..self.clone() }
    }

    fn strided(cuda: &Cuda, [rows, cols]: [usize; 2], ld: usize, dtype: DType, usage: MemoryUse) -> Self {
        Self::in_buffer(cuda.alloc(rows * ld * dtype.bytes(), usage), [rows, cols], ld, dtype)
    }

    /// A matrix at the beginning of a buffer.
    pub(super) fn in_buffer(buffer: Buffer, [rows, cols]: [usize; 2], ld: usize, dtype: DType) -> Self {
        Self { buffer: Arc::new(buffer), offset: 0, rows, cols, ld, pad_cols: 0, dtype, codes: None }
    }
}

/// A list of 32-bit integers on the device.
#[derive(Clone, Debug)]
pub struct Ints {
    buffer: Arc<Buffer>,
    /// Elements of the buffer before the first one.
    first: usize,
    len: usize,
}

/// An element of [`Ints`].
pub trait Word: Copy {
    /// Its little-endian bytes.
    fn bytes(self) -> [u8; 4];
}

impl Ints {
    /// Uploads a list, which may change as soon as this returns.
    pub fn from_slice<W: Word>(cuda: &Cuda, values: &[W], usage: MemoryUse) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.bytes()).collect();
        Self { buffer: Arc::new(cuda.uploaded(&bytes, usage)), first: 0, len: values.len() }
    }

    /// A list that is not initialized.
    pub fn unfilled(cuda: &Cuda, len: usize, usage: MemoryUse) -> Self {
        Self { buffer: Arc::new(cuda.alloc(4 * len, usage)), first: 0, len }
    }

    /// The elements, after waiting for everything queued so far.
    ///
    /// # Errors
    /// The first error of the device since the last one that was taken.
    pub fn to_vec(&self) -> Result<Vec<u32>, CudaError> {
        let mut bytes = vec![0; 4 * self.len];
        self.buffer.cuda().download_at(&self.buffer, 4 * self.first, &mut bytes)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect())
    }

    /// Begins to copy the elements to the host, behind everything queued so far.
    pub fn read_back(&self) -> ReadBack {
        self.cuda().read_back(&self.buffer, 4 * self.first, self.len)
    }

    /// The device.
    pub fn cuda(&self) -> &Cuda {
        self.buffer.cuda()
    }

    /// Writes values over the first elements, in the order of the stream.
    ///
    /// # Panics
    /// If there are more values than elements.
    pub fn write(&self, values: &[u32]) {
        assert!(values.len() <= self.len, "{} values over {} elements", values.len(), self.len);
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.buffer.cuda().upload_at(&self.buffer, 4 * self.first, &bytes);
    }

    /// `len` elements from `first` on, in the same memory.
    pub fn part(&self, first: usize, len: usize) -> Self {
        assert!(first + len <= self.len, "elements {first}..{} of {}", first + len, self.len);
        Self { buffer: Arc::clone(&self.buffer), first: self.first + first, len }
    }

    /// Returns the number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether the list is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address of the first.
    pub fn ptr(&self) -> u64 {
        self.ptr_at(0)
    }

    /// The address of one of them.
    pub fn ptr_at(&self, index: usize) -> u64 {
        self.buffer.ptr() + 4 * (self.first + index) as u64
    }
}

impl Word for u32 {
    fn bytes(self) -> [u8; 4] {
        self.to_le_bytes()
    }
}

impl Word for i32 {
    fn bytes(self) -> [u8; 4] {
        self.to_le_bytes()
    }
}
