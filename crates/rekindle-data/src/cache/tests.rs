use super::*;
use crate::error::Result;
use crate::test_support::{CHATML, tokenizer, write, write_rows};
use crate::{DataFiles, EncodeOptions, Overlong, Tokenizer};

const ROWS: &str = "{\"text\": \"hello\"}\n{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"text\": \"much longer\"}\n\
                    {\"messages\": [{\"role\": \"user\", \"content\": \"Q\"}, {\"role\": \"assistant\", \"content\": \"A\"}]}\n";

struct Machine {
    _checkpoint: tempfile::TempDir,
    tokenizer: Tokenizer,
    _rows: tempfile::TempDir,
    path: PathBuf,
    cache: tempfile::TempDir,
}

impl Machine {
    fn new() -> Self {
        let (checkpoint, tokenizer) = tokenizer(CHATML);
        let (rows, path) = write_rows(ROWS);
        Self { _checkpoint: checkpoint, tokenizer, _rows: rows, path, cache: tempfile::tempdir().expect("a directory") }
    }

    fn load(&self, max_seq_length: usize) -> Result<(Dataset, LoadReport)> {
        let options = EncodeOptions { max_seq_length, overlong: Overlong::Split, ..EncodeOptions::default() };
        DataFiles::find([&self.path])?.cache_dir(self.cache.path()).load(Some(&self.tokenizer), &options)
    }

    fn files(&self) -> Vec<PathBuf> {
        fs::read_dir(self.cache.path()).expect("there").map(|entry| entry.expect("readable").path()).collect()
    }
}

/// Returns everything observable of a dataset.
fn seen(dataset: &Dataset) -> Vec<(Vec<u32>, Vec<i32>, String)> {
    let one = |example: crate::Example<'_>| {
        (example.input_ids.to_vec(), example.labels.to_vec(), format!("{} {}", example.path.display(), example.row))
    };
    dataset.examples().map(one).collect()
}

#[test]
fn the_second_time_is_the_same_from_the_file() {
    let machine = Machine::new();
    let (first, made) = machine.load(8).expect("loads");
    let (second, mut read) = machine.load(8).expect("loads");
    let file = machine.files();
    assert_eq!(
        (made.cache.clone(), read.cache.clone()),
        (CacheUse::Written(file[0].clone()), CacheUse::Read(file[0].clone()))
    );
    assert_eq!((first.fingerprint(), seen(&first)), (second.fingerprint(), seen(&second)));
    assert!(file[0].ends_with(format!("{}.safetensors", first.fingerprint())));
    assert!(read.to_string().ends_with("; from the cache"), "{read}");
    read.cache = made.cache.clone();
    assert_eq!(read, made);
    assert!(made.split > 0 && !made.first_changed.is_empty());
}

#[test]
fn whatever_changes_the_examples_changes_the_fingerprint() {
    let machine = Machine::new();
    let fingerprint = || machine.load(8).expect("loads").0.fingerprint().to_owned();
    let first = fingerprint();
    assert_eq!(first.len(), 64);
    assert_ne!(machine.load(9).expect("loads").0.fingerprint(), first);
    let mapped = DataFiles::find([&machine.path]).and_then(|files| {
        files
            .columns([("text".to_owned(), "completion".to_owned())].into())?
            .load(Some(&machine.tokenizer), &EncodeOptions::default())
    });
    assert!(mapped.is_err(), "not every row has a completion");
    fs::write(&machine.path, format!("{ROWS}\n")).expect("written");
    let longer = fingerprint();
    assert_ne!(longer, first);
    write(machine._checkpoint.path(), "chat_template.jinja", &format!("{CHATML} "));
    assert_ne!(fingerprint(), longer);
    // Another place is the same dataset.
    fs::write(&machine.path, ROWS).expect("written");
    write(machine._checkpoint.path(), "chat_template.jinja", CHATML);
    let moved = machine.path.with_file_name("moved.jsonl");
    fs::rename(&machine.path, &moved).expect("moved");
    let (dataset, report) = Machine { path: moved.clone(), ..machine }.load(8).expect("loads");
    assert_eq!((dataset.fingerprint(), dataset.example(0).path), (first.as_str(), moved.as_path()));
    assert!(matches!(report.cache, CacheUse::Read(_)));
}

#[test]
fn a_damaged_file_is_made_again() {
    let machine = Machine::new();
    let (dataset, made) = machine.load(8).expect("loads");
    let mut written = 0;
    let file = machine.files().remove(0);
    let whole = fs::read(&file).expect("there");
    let mut damages: Vec<Vec<u8>> = (0..whole.len()).step_by(97).map(|len| whole[..len].to_vec()).collect();
    damages.extend((0..whole.len()).step_by(13).map(|at| {
        let mut damaged = whole.clone();
        damaged[at] ^= 4;
        damaged
    }));
    let count = damages.len();
    for damaged in damages {
        fs::write(&file, &damaged).expect("written");
        let (again, report) = machine.load(8).expect("loads");
        assert_eq!(seen(&again), seen(&dataset));
        // What pads the header may be anything.
        assert_eq!(LoadReport { cache: made.cache.clone(), ..report.clone() }, made);
        written += usize::from(matches!(report.cache, CacheUse::Written(_)));
    }
    assert!(written * 10 > count * 9, "{written} of {count}");
}

#[test]
fn a_cache_that_cannot_be_written_is_told_of_and_no_error() {
    let machine = Machine::new();
    let blocked = machine.cache.path().join("file");
    fs::write(&blocked, "").expect("written");
    let files = DataFiles::find([&machine.path]).expect("there").cache_dir(blocked.join("below"));
    let (_, report) = files.load(Some(&machine.tokenizer), &EncodeOptions::default()).expect("loads all the same");
    assert!(report.to_string().contains("; not cached: "), "{report}");
}
