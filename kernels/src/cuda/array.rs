//! Matrices of device memory.

use std::sync::Arc;

use super::ops::{elementwise, reduce};
use super::{Buffer, Cuda, CudaError, DType, Operand};

/// New matrices have row strides that are multiples of this many elements, so that every row begins at 16 bytes.
const STRIDE: usize = 8;

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
    /// Elements behind each row that belong to this matrix and hold nothing yet.
    room: usize,
    dtype: DType,
}

/// How an [`Array`] lies in its memory.
#[derive(Clone, Copy, Debug)]
pub struct ArrayShape {
    offset: usize,
    rows: usize,
    cols: usize,
    ld: usize,
    room: usize,
    dtype: DType,
}

impl Array {
    /// The memory, if no other handle reaches it, and how the matrix lies there.
    ///
    /// # Errors
    /// The matrix, when another handle reaches its memory.
    pub fn into_buffer(self) -> Result<(Buffer, ArrayShape), Self> {
        let Self { buffer, offset, rows, cols, ld, room, dtype } = self;
        let shape = ArrayShape { offset, rows, cols, ld, room, dtype };
        match Arc::try_unwrap(buffer) {
            Ok(buffer) => Ok((buffer, shape)),
            Err(buffer) => Err(Self { buffer, offset, rows, cols, ld, room, dtype }),
        }
    }

    /// A matrix that lies as another one did in memory as long as its.
    pub fn from_buffer(buffer: Buffer, ArrayShape { offset, rows, cols, ld, room, dtype }: ArrayShape) -> Self {
        Self { buffer: Arc::new(buffer), offset, rows, cols, ld, room, dtype }
    }

    /// A matrix that is not initialized; nothing reads what lies between its rows.
    pub fn empty(cuda: &Cuda, dims: [usize; 2], dtype: DType, label: &'static str) -> Self {
        Self::with_room(cuda, dims, 0, dtype, label)
    }

    /// A matrix that is not initialized, with room for `room` more columns.
    pub fn with_room(cuda: &Cuda, dims: [usize; 2], room: usize, dtype: DType, label: &'static str) -> Self {
        let whole = Self::strided(cuda, dims, (dims[1] + room).next_multiple_of(STRIDE), dtype, label);
        Self { room, ..whole }
    }

    /// A matrix that is not initialized and has nothing between its rows.
    pub fn dense(cuda: &Cuda, dims: [usize; 2], dtype: DType, label: &'static str) -> Self {
        Self::strided(cuda, dims, dims[1], dtype, label)
    }

    /// A matrix of zeros.
    pub fn zeros(cuda: &Cuda, dims: [usize; 2], dtype: DType, label: &'static str) -> Self {
        let array = Self::empty(cuda, dims, dtype, label);
        cuda.fill(&array.buffer, 0, array.buffer.bytes(), 0);
        array
    }

    /// A matrix with these values, row after row, rounded to `dtype`.
    ///
    /// # Panics
    /// When there are not as many values as `dims` say.
    pub fn from_f32(cuda: &Cuda, values: &[f32], dims: [usize; 2], dtype: DType, label: &'static str) -> Self {
        if cuda.is_planned() {
            assert_eq!(values.len(), dims[0] * dims[1], "values of a matrix of {} × {}", dims[0], dims[1]);
            return elementwise::cast(&Self::unfilled(cuda, dims, DType::F32, label), dtype, label);
        }
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        elementwise::cast(&Self::from_bytes(cuda, &bytes, dims, DType::F32, label), dtype, label)
    }

    /// A matrix with these values, row after row, each as `dtype` in little-endian order.
    ///
    /// # Panics
    /// When there are not as many bytes as `dims` and `dtype` say.
    pub fn from_bytes(cuda: &Cuda, bytes: &[u8], dims: [usize; 2], dtype: DType, label: &'static str) -> Self {
        let [rows, cols] = dims;
        assert_eq!(bytes.len(), rows * cols * dtype.bytes(), "bytes of a matrix of {rows} × {cols} {}", dtype.name());
        let dense = Self::dense(cuda, dims, dtype, label);
        cuda.upload(&dense.buffer, bytes);
        dense.labelled(label)
    }

    /// The memory of [`Array::from_bytes`], whatever it holds.
    pub fn unfilled(cuda: &Cuda, dims: [usize; 2], dtype: DType, label: &'static str) -> Self {
        Self::dense(cuda, dims, dtype, label).labelled(label)
    }

    /// [`Array::aligned`], under a label.
    fn labelled(self, label: &'static str) -> Self {
        if self.is_aligned() { self } else { elementwise::copy_labelled(&self, label) }
    }

    /// The values, row after row, after waiting for everything queued so far.
    ///
    /// # Errors
    /// The first error of the device since the last one that was taken.
    pub fn to_f32(&self) -> Result<Vec<f32>, CudaError> {
        let dense = Self::dense(self.cuda(), self.dims(), DType::F32, "download");
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

    /// The dtype of the elements.
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

    /// The matrix for a product.
    pub fn operand(&self) -> Operand {
        Operand { ptr: self.ptr(), ld: self.ld, dtype: self.dtype }
    }

    /// `n` columns from `first` on, in the same memory.
    pub fn columns(&self, first: usize, n: usize) -> Self {
        assert!(first + n <= self.cols, "columns {first}..{} of {}", first + n, self.cols);
        let room = if first + n == self.cols { self.room } else { 0 };
        Self { offset: self.offset + first, cols: n, room, ..self.clone() }
    }

    /// How many columns there is room for behind the last one.
    pub fn room(&self) -> usize {
        self.room
    }

    /// The matrix with `n` columns of its room, whatever they hold.
    pub fn widened(&self, n: usize) -> Self {
        assert!(n <= self.room, "{n} more columns, and there is room for {}", self.room);
        Self { cols: self.cols + n, room: self.room - n, ..self.clone() }
    }

    /// Matrices that lie side by side in one memory as one matrix, and otherwise copies of them in a new one; with room
    /// for `room` more columns.
    pub fn side_by_side(parts: &[Self], room: usize) -> Self {
        let (first, last) = parts.first().zip(parts.last()).expect("there is something to put side by side");
        let touch = |[a, b]: &[&Self; 2]| {
            Arc::ptr_eq(&a.buffer, &b.buffer) && a.offset + a.cols == b.offset && a.ld == b.ld && a.dtype == b.dtype
        };
        let pairs = parts.iter().zip(&parts[1..]).map(|(a, b)| [a, b]);
        let cols = parts.iter().map(|part| part.cols).sum();
        if pairs.into_iter().all(|pair| touch(&pair)) && last.room >= room {
            return Self { cols, room: last.room, ..first.clone() };
        }
        let whole = Self::with_room(first.cuda(), [first.rows, cols], room, first.dtype, "activations");
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
        Self { offset: self.offset + first * self.ld, rows: n, ..self.clone() }
    }

    /// A part of a vector as a matrix without gaps, in the same memory: how a named weight lies in a flat buffer.
    pub fn part(&self, first: usize, [rows, cols]: [usize; 2]) -> Self {
        assert!(
            self.rows == 1 && first + rows * cols <= self.cols,
            "{rows} × {cols} from {first} of {:?}",
            self.dims()
        );
        Self { offset: self.offset + first, rows, cols, ld: cols, room: 0, ..self.clone() }
    }

    /// All rows as one vector, in the same memory.
    ///
    /// # Panics
    /// When something lies between the rows.
    pub fn flattened(self) -> Self {
        assert!(self.is_contiguous(), "rows of {} elements begin every {}", self.cols, self.ld);
        let n = self.rows * self.cols;
        Self { rows: 1, cols: n, ld: n, room: 0, ..self }
    }

    /// Whether no other handle reaches this memory, so that it can be written without anybody noticing.
    pub fn is_unique(&self) -> bool {
        Self::are_unique(&[self])
    }

    /// Whether these are all the handles that reach their memory: columns of one matrix, say.
    pub fn are_unique(arrays: &[&Self]) -> bool {
        arrays.iter().all(|array| {
            let here = arrays.iter().filter(|other| Arc::ptr_eq(&array.buffer, &other.buffer)).count();
            Arc::strong_count(&array.buffer) == here
        })
    }

    /// Whether the memory holds nothing but this matrix and its room.
    pub fn is_whole(&self) -> bool {
        self.buffer.bytes() < (self.rows * (self.cols + self.room + STRIDE)).max(1) * self.dtype.bytes()
    }

    /// Whether nothing lies between the rows.
    pub fn is_contiguous(&self) -> bool {
        self.rows <= 1 || self.ld == self.cols
    }

    /// The same values with nothing between the rows, in the same memory where that is so already.
    pub fn contiguous(&self) -> Self {
        if self.is_contiguous() {
            return self.clone();
        }
        let dense = Self::dense(self.cuda(), self.dims(), self.dtype, "activations");
        elementwise::copy_into(self, &dense);
        dense
    }

    /// The sum of every column, f32 `[1, cols]`: the gradient of a bias.
    pub fn column_sums(&self) -> Self {
        reduce::column_sums(self)
    }

    /// Whether every row begins at 16 bytes, as kernels with wide accesses ask for.
    pub(super) fn is_aligned(&self) -> bool {
        self.ptr().is_multiple_of(16) && (self.rows <= 1 || self.ld.is_multiple_of(STRIDE))
    }

    /// The same values where every row begins at 16 bytes, in the same memory where that is so already.
    pub(super) fn aligned(&self) -> Self {
        if self.is_aligned() { self.clone() } else { elementwise::copy(self) }
    }

    /// The ends of the rows as a dtype that takes no more room, in the same memory.
    pub(super) fn row_ends_as(&self, dtype: DType) -> Self {
        assert!(dtype.bytes() <= self.dtype.bytes(), "{} over {}", dtype.name(), self.dtype.name());
        let times = self.dtype.bytes() / dtype.bytes();
        let offset = self.offset * times + (times - 1) * self.ld;
        Self { offset, ld: self.ld * times, room: 0, dtype, ..self.clone() }
    }

    fn strided(cuda: &Cuda, [rows, cols]: [usize; 2], ld: usize, dtype: DType, label: &'static str) -> Self {
        let buffer = Arc::new(cuda.alloc(rows * ld * dtype.bytes(), label));
        Self { buffer, offset: 0, rows, cols, ld, room: 0, dtype }
    }
}

/// A list of 32-bit integers on the device.
#[derive(Clone, Debug)]
pub struct Ints {
    buffer: Arc<Buffer>,
    len: usize,
}

/// An element of [`Ints`].
pub trait Word: Copy {
    /// Its little-endian bytes.
    fn bytes(self) -> [u8; 4];
}

impl Ints {
    /// Uploads a list, which may change as soon as this returns.
    pub fn from_slice<W: Word>(cuda: &Cuda, values: &[W], label: &'static str) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.bytes()).collect();
        Self { buffer: Arc::new(cuda.uploaded(&bytes, label)), len: values.len() }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address of the first.
    pub fn ptr(&self) -> u64 {
        self.ptr_at(0)
    }

    /// The address of one of them.
    pub fn ptr_at(&self, index: usize) -> u64 {
        self.buffer.ptr() + 4 * index as u64
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
