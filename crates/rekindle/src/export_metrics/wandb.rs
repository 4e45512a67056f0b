//! Metrics as an offline run of Weights & Biases.
//!
//! `wandb/offline-run-DATE_TIME-ID/run-ID.wandb` begins with `:W&B`, the number 0xBEE1 and version 0. Protocol buffers
//! follow in the framing of LevelDB's logs: blocks of 32 KiB with pieces of records, each after its CRC-32, length and
//! kind. The messages are those of `wandb_internal.proto`: a header, the run with its configuration, a history record
//! and a summary for each step, and the exit.

use std::fs;
use std::path::{Path, PathBuf};

use rekindle_hub::AtomicDir;
use rekindle_train::protobuf::ProtobufMessage;
use serde_json::{Value, json};

use super::{ExportedRun, MetricRow, io_error};
use crate::Error;

/// The project of all exported runs.
const PROJECT: &str = "rekindle";

/// The oldest version of wandb that reads such files.
const READER: &str = "0.12.0";

/// Adds the run to the directory `out`, and returns the run's directory there.
pub(super) fn write(run: &ExportedRun, out: &Path) -> Result<PathBuf, Error> {
    let id = run.id(8);
    let dir = out.join(format!("offline-run-{}-{id}", timestamp(run.start.as_secs())));
    let target = AtomicDir::replace(&dir)?;
    let path = target.path().join(format!("run-{id}.wandb"));
    fs::write(&path, file(&records(run, &id))).map_err(io_error(&path))?;
    target.commit()?;
    Ok(dir)
}

/// Returns the records of the file.
fn records(run: &ExportedRun, id: &str) -> Vec<Vec<u8>> {
    let mut records = Vec::new();
    let mut push = |field: u64, message: &ProtobufMessage| {
        let mut record = ProtobufMessage::default();
        record.varint(1, records.len() as u64 + 1).message(field, message);
        records.push(record.into_bytes());
    };
    let mut version = ProtobufMessage::default();
    version.text(1, concat!("rekindle ", env!("CARGO_PKG_VERSION"))).text(2, READER);
    push(HEADER, ProtobufMessage::default().message(1, &version));

    let mut config = ProtobufMessage::default();
    for (key, value) in &run.parameters {
        config.message(1, ProtobufMessage::default().text(1, key).text(16, &json_of(value).to_string()));
    }
    let mut time = ProtobufMessage::default();
    time.varint(1, run.start.as_secs()).varint(2, run.start.subsec_nanos().into());
    let mut message = ProtobufMessage::default();
    message.text(1, id).text(3, PROJECT).message(4, &config).text(8, &run.name).message(17, &time);
    push(RUN, &message);

    for row in &run.rows {
        push(HISTORY, items(run, row, 2).message(2, ProtobufMessage::default().varint(1, row.step as u64)));
        push(SUMMARY, &items(run, row, 2));
    }
    let runtime = run.rows.iter().map(|row| row.seconds).fold(0.0, f64::max);
    push(EXIT, ProtobufMessage::default().varint(2, runtime as u64));
    records
}

/// Field numbers of `Record`.
const HISTORY: u64 = 2;
const SUMMARY: u64 = 3;
const RUN: u64 = 17;
const EXIT: u64 = 18;
const HEADER: u64 = 21;

fn json_of(value: &toml::Value) -> Value {
    match value {
        toml::Value::Float(number) => json!(number),
        toml::Value::Integer(number) => json!(number),
        toml::Value::Boolean(is_true) => json!(is_true),
        toml::Value::Array(values) => values.iter().map(json_of).collect(),
        toml::Value::String(text) => json!(text),
        other => json!(other.to_string()),
    }
}

/// Returns the metrics of a step with wandb's own keys: key paths in the field `key`, JSON values in the field 16.
fn items(run: &ExportedRun, row: &MetricRow, key: u64) -> ProtobufMessage {
    let mut message = ProtobufMessage::default();
    let own = [
        ("_step", json!(row.step)),
        ("_runtime", json!(row.seconds)),
        ("_timestamp", json!(run.start.as_secs_f64() + row.seconds)),
    ];
    let own = own.into_iter().map(|(name, value)| (name.to_owned(), value));
    let values = row.values.iter().map(|(name, value)| (name.clone(), json!(value)));
    for (name, value) in own.chain(values) {
        message.message(1, ProtobufMessage::default().text(key, &name).text(16, &value.to_string()));
    }
    message
}

const BLOCK: usize = 32 << 10;

/// Bytes before each piece: CRC-32 of the kind and the data, their length, the kind.
const PIECE_HEADER: usize = 7;

/// Returns the file of these records.
fn file(records: &[Vec<u8>]) -> Vec<u8> {
    let mut file = b":W&B".to_vec();
    file.extend(0xBEE1_u16.to_le_bytes());
    file.push(0);
    for record in records {
        let mut rest = record.as_slice();
        let mut is_first = true;
        loop {
            let left = BLOCK - file.len() % BLOCK;
            if left < PIECE_HEADER {
                file.resize(file.len() + left, 0);
                continue;
            }
            let length = rest.len().min(left - PIECE_HEADER);
            let (piece, after) = rest.split_at(length);
            // Whole, first, middle or last piece.
            let kind: u8 = match (is_first, after.is_empty()) {
                (true, true) => 1,
                (true, false) => 2,
                (false, false) => 3,
                (false, true) => 4,
            };
            file.extend(crc32(&[&[kind], piece]).to_le_bytes());
            file.extend((length as u16).to_le_bytes());
            file.push(kind);
            file.extend(piece);
            (rest, is_first) = (after, false);
            if rest.is_empty() {
                break;
            }
        }
    }
    file
}

/// Returns zlib's CRC-32 of the concatenated parts (polynomial 0x04C11DB7, reflected).
fn crc32(parts: &[&[u8]]) -> u32 {
    !parts.iter().flat_map(|part| part.iter()).fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 })
    })
}

/// Formats seconds since 1970 as `YYYYMMDD_HHMMSS` in UTC.
fn timestamp(seconds: u64) -> String {
    let (mut days, time) = (seconds / 86_400, seconds % 86_400);
    let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let length = |year| if is_leap(year) { 366 } else { 365 };
    let mut year = 1970;
    while days >= length(year) {
        days -= length(year);
        year += 1;
    }
    let february = length(year) - 337;
    let mut month = 1;
    for in_month in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < in_month {
            break;
        }
        days -= in_month;
        month += 1;
    }
    format!("{year}{month:02}{:02}_{:02}{:02}{:02}", days + 1, time / 3600, time / 60 % 60, time % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads the records of a file.
    fn read(file: &[u8]) -> Vec<Vec<u8>> {
        assert_eq!(file[..7], *b":W&B\xe1\xbe\x00");
        let (mut at, mut records, mut open) = (7, Vec::new(), Vec::new());
        while at < file.len() {
            let left = BLOCK - at % BLOCK;
            if left < PIECE_HEADER {
                at += left;
                continue;
            }
            let length = usize::from(u16::from_le_bytes([file[at + 4], file[at + 5]]));
            let (kind, data) = (file[at + 6], &file[at + 7..at + 7 + length]);
            assert_eq!(file[at..at + 4], crc32(&[&[kind], data]).to_le_bytes());
            open.extend_from_slice(data);
            if kind == 1 || kind == 4 {
                records.push(std::mem::take(&mut open));
            }
            at += PIECE_HEADER + length;
        }
        records
    }

    #[test]
    fn records_go_across_blocks() {
        assert_eq!(crc32(&[b"1234", b"56789"]), 0xCBF4_3926, "the check value of CRC-32");
        // Ends of records in every place near the end of a block.
        for size in BLOCK - 40..BLOCK + 10 {
            let records = vec![vec![1; size], vec![2; 3], vec![3; 3 * BLOCK], Vec::new(), vec![4]];
            assert_eq!(read(&file(&records)), records, "{size}");
        }
    }

    #[test]
    fn a_run_is_a_directory_that_wandb_reads() {
        let scratch = tempfile::tempdir().unwrap();
        let run = super::super::tests::run(scratch.path());
        let dir = write(&run, &scratch.path().join("wandb")).unwrap();
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        assert_eq!(name, format!("offline-run-20231114_221320-{}", run.id(8)));
        let bytes = fs::read(dir.join(format!("run-{}.wandb", run.id(8)))).unwrap();
        let records = read(&bytes);
        // Header, run, two for each step, exit.
        assert_eq!(records.len(), 2 + 2 * 2 + 1);
        let has = |record: usize, text: &str| {
            assert!(records[record].windows(text.len()).any(|part| part == text.as_bytes()), "{text}");
        };
        has(1, "train.learning_rate");
        has(1, "\"adamw\"");
        has(4, "eval/loss");
        has(4, "0.75");
        assert_eq!(records[6], [8, 7, 0x92, 1, 2, 16, 2], "record 7: exit after 2 seconds");
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        let cases = [(0, "19700101_000000"), (951_827_696, "20000229_123456"), (4_102_444_799, "20991231_235959")];
        for (seconds, expected) in cases {
            assert_eq!(timestamp(seconds), expected);
        }
    }
}
