//! Detection of a file's format.

use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, Read};
use std::path::Path;

use flate2::read::MultiGzDecoder;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::{arrow, find, foreign};
use crate::error::{Error, Result};

/// A file at its beginning, with its format.
pub(super) enum Opened {
    Lines(Box<dyn BufRead>),
    Json(Box<dyn BufRead>),
    Parquet(File),
    /// Delimited text; without a delimiter, it is detected from the header.
    Delimited {
        reader: Box<dyn BufRead>,
        delimiter: Option<u8>,
    },
    Arrow {
        reader: Box<dyn BufRead>,
        /// True for a file with a footer; false for a stream.
        is_file: bool,
    },
}

/// The maximum length of a first line; a longer one is a whole document.
const LONGEST_FIRST_LINE: u64 = 1 << 26;
const BUFFER: usize = 1 << 16;
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// Opens a file. Its first bytes determine JSON, Parquet and Arrow; the ending of its name determines CSV, and JSON
/// lines.
pub(super) fn open(path: &Path) -> Result<Opened> {
    let failed = |source| Error::Read { path: path.to_owned(), source };
    let (mut reader, head) = uncompressed(path).map_err(failed)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    if head == *b"PAR1" {
        return File::open(path).map(Opened::Parquet).map_err(failed);
    }
    if name.ends_with(".parquet") {
        return Err(Error::dataset(path, "is not a Parquet file: it does not begin with \"PAR1\""));
    }
    let mut first = Vec::new();
    reader.by_ref().take(BUFFER as u64).read_to_end(&mut first).map_err(failed)?;
    if let Some(sentence) = foreign::refusal(&first) {
        return Err(Error::dataset(path, sentence));
    }
    if first.starts_with(b"PAR1") {
        return Err(Error::dataset(path, "is Parquet under gzip or zstd; unpack it, Parquet is compressed by itself"));
    }
    // Some editors begin a file with a byte-order mark.
    if first.starts_with(BYTE_ORDER_MARK) {
        first.drain(..BYTE_ORDER_MARK.len());
    }
    let (is_file, is_stream) = (first.starts_with(arrow::FILE_MAGIC), first.starts_with(&arrow::CONTINUATION));
    let kind = first.trim_ascii_start().first().copied();
    let reader: Box<dyn BufRead> = Box::new(Cursor::new(first).chain(reader));
    if is_file || is_stream {
        return Ok(Opened::Arrow { reader, is_file });
    }
    match (kind, find::kind_of(&name)) {
        // No row is a list, so this is a list of rows.
        (Some(b'['), _) => Ok(Opened::Json(reader)),
        (Some(b'{'), Some(find::Kind::Json)) => object_or_lines(reader).map_err(failed),
        (Some(b'{') | None, _) => Ok(Opened::Lines(reader)),
        (_, Some(find::Kind::Csv)) => Ok(Opened::Delimited { reader, delimiter: None }),
        (_, Some(find::Kind::Tsv)) => Ok(Opened::Delimited { reader, delimiter: Some(b'\t') }),
        (_, Some(find::Kind::Arrow)) => {
            Err(Error::dataset(path, "is not an Arrow file: it begins like neither an Arrow file nor an Arrow stream"))
        }
        (_, Some(find::Kind::Json | find::Kind::JsonLines | find::Kind::Parquet)) => Ok(Opened::Lines(reader)),
        (_, None) => Err(Error::dataset(
            path,
            "does not begin as JSON, Parquet or Arrow does, and its name does not end as that of CSV; name CSV *.csv or \
             *.tsv, and write plain text as JSON lines, {\"text\": \"…\"} each",
        )),
    }
}

/// Returns the decompressed contents, with the first bytes on disk.
fn uncompressed(path: &Path) -> std::io::Result<(Box<dyn BufRead>, Vec<u8>)> {
    // Opening a directory succeeds on Unix; its metadata tells before the first read fails obscurely.
    if std::fs::metadata(path)?.is_dir() {
        return Err(std::io::Error::other("it is a directory"));
    }
    let mut file = File::open(path)?;
    let mut head = Vec::new();
    file.by_ref().take(4).read_to_end(&mut head)?;
    let whole = Cursor::new(head.clone()).chain(file);
    let reader: Box<dyn BufRead> = if head.starts_with(&[0x1f, 0x8b]) {
        Box::new(BufReader::with_capacity(BUFFER, MultiGzDecoder::new(whole)))
    } else if head == [0x28, 0xb5, 0x2f, 0xfd] {
        Box::new(BufReader::with_capacity(BUFFER, zstd::Decoder::new(whole)?))
    } else {
        Box::new(BufReader::with_capacity(BUFFER, whole))
    };
    Ok((reader, head))
}

/// Detects the format of a `*.json` that begins with an object: `{"data": [...]}`, or JSON lines.
fn object_or_lines(mut reader: Box<dyn BufRead>) -> std::io::Result<Opened> {
    #[derive(Deserialize)]
    struct Document {
        #[serde(rename = "data")]
        _data: Vec<IgnoredAny>,
    }
    let mut first = Vec::new();
    while first.trim_ascii().is_empty() {
        if reader.by_ref().take(LONGEST_FIRST_LINE).read_until(b'\n', &mut first)? == 0 {
            break;
        }
    }
    let is_document = serde_json::from_slice::<Document>(&first).is_ok();
    let is_row = !is_document && serde_json::from_slice::<IgnoredAny>(&first).is_ok();
    let whole = Box::new(Cursor::new(first).chain(reader));
    Ok(if is_row { Opened::Lines(whole) } else { Opened::Json(whole) })
}
