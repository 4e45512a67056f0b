//! The part of TensorBoard's protocol buffers that a run needs, encoded by hand.
//!
//! A field is a key, `number << 3 | wire type`, and its value: wire type 0 a varint, 1 eight bytes, 2 a length and as
//! many bytes, 5 four bytes. Fields stand in the order of their numbers, and a number that is 0 is left out, as
//! protobuf itself does. The numbers are those of `event.proto`, `summary.proto` and `tensor.proto`:
//!
//! - `Event`: wall_time 1 (double), step 2, file_version 3, summary 5, session_log 7
//! - `Summary`: value 1, repeated; `Value`: tag 1, simple_value 2 (float), tensor 8, metadata 9
//! - `SummaryMetadata`: plugin_data 1, with plugin_name 1
//! - `TensorProto`: dtype 1, tensor_shape 2 (dim 2, size 1), string_val 8
//! - `SessionLog`: status 1

use crate::protobuf::ProtobufMessage;

/// An event with its time and step.
pub(super) struct Event<'a> {
    /// Seconds since 1970.
    pub(super) wall_time: f64,
    pub(super) step: u64,
    pub(super) what: What<'a>,
}

/// The content of an event.
pub(super) enum What<'a> {
    /// The version of the format; first in every file.
    Version,
    /// Values under their tags.
    Scalars(&'a [(&'a str, f64)]),
    /// A text for the text plugin.
    Text { tag: &'a str, text: &'a str },
    /// The start of a run: events of this step and later ones in earlier files are invalid.
    Start,
}

/// `SessionLog.START`.
const START: u64 = 1;
/// `DT_STRING`.
const STRING: u64 = 7;

impl Event<'_> {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut event = ProtobufMessage::default();
        event.double(1, self.wall_time).varint(2, self.step);
        match self.what {
            What::Version => event.bytes(3, b"brain.Event:2"),
            What::Scalars(scalars) => {
                let mut summary = ProtobufMessage::default();
                for (tag, value) in scalars {
                    summary.message(1, ProtobufMessage::default().bytes(1, tag.as_bytes()).float(2, *value as f32));
                }
                event.message(5, &summary)
            }
            What::Text { tag, text } => {
                let mut value = ProtobufMessage::default();
                value.bytes(1, tag.as_bytes()).message(8, &text_tensor(text));
                value.message(9, ProtobufMessage::default().message(1, ProtobufMessage::default().bytes(1, b"text")));
                event.message(5, ProtobufMessage::default().message(1, &value))
            }
            What::Start => event.message(7, ProtobufMessage::default().varint(1, START)),
        };
        event.into_bytes()
    }
}

/// Returns a tensor of shape `[1]` with the text.
fn text_tensor(text: &str) -> ProtobufMessage {
    let mut tensor = ProtobufMessage::default();
    let mut shape = ProtobufMessage::default();
    shape.message(2, ProtobufMessage::default().varint(1, 1));
    tensor.varint(1, STRING).message(2, &shape).bytes(8, text.as_bytes());
    tensor
}
