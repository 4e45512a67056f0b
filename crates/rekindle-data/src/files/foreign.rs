//! Detection of unsupported files by their first bytes.

/// First bytes, and the message about such a file.
const KINDS: [(&[u8], &str); 13] = [
    (b"PK\x03\x04", "is a ZIP archive or an Excel workbook, which is not read; unpack it, or save the sheet as CSV"),
    (b"\x80\x02", PICKLE),
    (b"\x80\x03", PICKLE),
    (b"\x80\x04", PICKLE),
    (b"\x80\x05", PICKLE),
    (b"BZh", "is compressed by bzip2, which is not read; unpack it, or compress it by gzip or zstd"),
    (b"\xfd7zXZ\0", "is compressed by xz, which is not read; unpack it, or compress it by gzip or zstd"),
    (b"\xff\xfe", UTF16),
    (b"\xfe\xff", UTF16),
    (b"FEA1", "is a Feather file of version 1, which is not read; write it again with a current pyarrow"),
    (b"Obj\x01", "is an Avro file, which is not read; write Parquet or JSON lines"),
    (b"SQLite format 3\0", "is an SQLite database, which is not read; write Parquet or JSON lines"),
    (b"\x89HDF", "is an HDF5 file, which is not read; write Parquet or JSON lines"),
];

const PICKLE: &str = "is a pickle, which can run code and is not read; write Parquet or JSON lines";
const UTF16: &str = "is UTF-16 text; save the file as UTF-8";

/// Beginnings of text files, in lower case.
const TEXTS: [(&[u8], &str); 3] = [
    (b"<!doctype html", PAGE),
    (b"<html", PAGE),
    (
        b"version https://git-lfs.github.com/spec/",
        "is a pointer of Git LFS, not the file it stands for; run `git lfs pull`",
    ),
];

const PAGE: &str = "is an HTML page, perhaps one that says why a download failed; download the file again";

/// The position of a tar archive's magic bytes.
const TAR: std::ops::Range<usize> = 257..262;

/// Returns the message about a file with these first bytes, if its format is known and unsupported.
pub(super) fn refusal(first: &[u8]) -> Option<&'static str> {
    if first.get(TAR) == Some(b"ustar".as_slice()) {
        return Some("is a tar archive, which is not read; unpack it");
    }
    let text = first.trim_ascii_start();
    let is_text =
        |begin: &&(&[u8], &str)| text.get(..begin.0.len()).is_some_and(|head| head.eq_ignore_ascii_case(begin.0));
    let of_text = TEXTS.iter().find(is_text);
    let of_bytes = || KINDS.iter().find(|(magic, _)| first.starts_with(magic));
    of_text.or_else(of_bytes).map(|(_, sentence)| *sentence)
}
