//! FlatBuffer tables, as far as Arrow's messages need them. Every access is checked; `None` means damage, or an absent
//! field.

/// A table.
#[derive(Clone, Copy)]
pub(super) struct Table<'a> {
    bytes: &'a [u8],
    at: usize,
    /// The offset of its fields' table, with 16-bit offsets from `at`.
    vtable: usize,
    vtable_len: usize,
}

/// A vector of tables, by their offsets, or of structs, by their bytes.
#[derive(Clone, Copy)]
pub(super) struct Vector<'a> {
    bytes: &'a [u8],
    at: usize,
    pub(super) len: usize,
}

fn read<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn offset(bytes: &[u8], at: usize) -> Option<usize> {
    at.checked_add(u32::from_le_bytes(read(bytes, at)?) as usize)
}

impl<'a> Table<'a> {
    /// Returns the root table of a buffer.
    pub(super) fn root(bytes: &'a [u8]) -> Option<Self> {
        Self::new(bytes, offset(bytes, 0)?)
    }

    fn new(bytes: &'a [u8], at: usize) -> Option<Self> {
        let back = i32::from_le_bytes(read(bytes, at)?);
        let vtable = usize::try_from(i64::try_from(at).ok()? - i64::from(back)).ok()?;
        let vtable_len = usize::from(u16::from_le_bytes(read(bytes, vtable)?));
        Some(Self { bytes, at, vtable, vtable_len })
    }

    /// Returns the position of field `number`; `None` if it has its default.
    fn field(&self, number: usize) -> Option<usize> {
        let slot = 4 + 2 * number;
        if slot + 2 > self.vtable_len {
            return None;
        }
        match u16::from_le_bytes(read(self.bytes, self.vtable + slot)?) {
            0 => None,
            offset => self.at.checked_add(usize::from(offset)),
        }
    }

    fn number<const N: usize>(&self, number: usize) -> Option<[u8; N]> {
        read(self.bytes, self.field(number)?)
    }

    pub(super) fn u8(&self, number: usize) -> Option<u8> {
        self.number::<1>(number).map(|[byte]| byte)
    }

    pub(super) fn i16(&self, number: usize) -> Option<i16> {
        self.number(number).map(i16::from_le_bytes)
    }

    pub(super) fn i32(&self, number: usize) -> Option<i32> {
        self.number(number).map(i32::from_le_bytes)
    }

    pub(super) fn i64(&self, number: usize) -> Option<i64> {
        self.number(number).map(i64::from_le_bytes)
    }

    pub(super) fn table(&self, number: usize) -> Option<Table<'a>> {
        Self::new(self.bytes, offset(self.bytes, self.field(number)?)?)
    }

    pub(super) fn vector(&self, number: usize) -> Option<Vector<'a>> {
        let at = offset(self.bytes, self.field(number)?)?;
        let len = u32::from_le_bytes(read(self.bytes, at)?) as usize;
        Some(Vector { bytes: self.bytes, at: at + 4, len })
    }

    pub(super) fn string(&self, number: usize) -> Option<&'a str> {
        let Vector { bytes, at, len } = self.vector(number)?;
        std::str::from_utf8(bytes.get(at..)?.get(..len)?).ok()
    }
}

impl<'a> Vector<'a> {
    /// Returns the table at `index`, below `len`.
    pub(super) fn table(&self, index: usize) -> Option<Table<'a>> {
        Table::new(self.bytes, offset(self.bytes, self.at.checked_add(4 * index)?)?)
    }

    /// Returns two 64-bit numbers of the struct at `index`.
    pub(super) fn pair(&self, index: usize) -> Option<(i64, i64)> {
        let [first, second] = [0, 8].map(|half| read(self.bytes, self.at.checked_add(16 * index + half)?));
        Some((i64::from_le_bytes(first?), i64::from_le_bytes(second?)))
    }

    /// Returns the 64-bit number at `index`.
    pub(super) fn i64(&self, index: usize) -> Option<i64> {
        read(self.bytes, self.at.checked_add(8 * index)?).map(i64::from_le_bytes)
    }
}
