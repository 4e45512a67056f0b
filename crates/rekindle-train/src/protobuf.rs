//! Protocol buffers, encoded by hand: TensorBoard's events and Weights & Biases' records.
//!
//! A field is a key, `number << 3 | wire type`, and its value: wire type 0 a varint, 1 eight bytes, 2 a length and as
//! many bytes, 5 four bytes.

/// A message of a protocol buffer, with fields in the order of their numbers. A number that is 0 is left out.
#[derive(Clone, Debug, Default)]
pub struct ProtobufMessage(Vec<u8>);

impl ProtobufMessage {
    /// Adds a number as a varint.
    pub fn varint(&mut self, field: u64, value: u64) -> &mut Self {
        if value != 0 {
            self.raw(field << 3);
            self.raw(value);
        }
        self
    }

    /// Adds a number of 64 bits.
    pub fn double(&mut self, field: u64, value: f64) -> &mut Self {
        self.raw(field << 3 | 1);
        self.0.extend(value.to_le_bytes());
        self
    }

    /// Adds a number of 32 bits.
    pub fn float(&mut self, field: u64, value: f32) -> &mut Self {
        self.raw(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
        self
    }

    /// Adds bytes.
    pub fn bytes(&mut self, field: u64, value: &[u8]) -> &mut Self {
        self.raw(field << 3 | 2);
        self.raw(value.len() as u64);
        self.0.extend(value);
        self
    }

    /// Adds a message.
    pub fn message(&mut self, field: u64, value: &Self) -> &mut Self {
        self.bytes(field, &value.0)
    }

    /// Adds a text.
    pub fn text(&mut self, field: u64, value: &str) -> &mut Self {
        self.bytes(field, value.as_bytes())
    }

    /// Returns the encoded message.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    /// Writes seven bits per byte, the lowest first; all but the last have the eighth bit set.
    fn raw(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}
