//! Reading: memory-mapped files with validated headers.

use std::fmt;
use std::path::{Path, PathBuf};

use rekindle_hub::MappedFile;

use crate::header::{GgufHeader, TensorEntry};
use crate::{Error, GgmlType, MetadataValue};

/// The number of this file among those of a split model, from 0.
pub(crate) const SPLIT_NO: &str = "split.no";
/// The number of files of a split model.
pub(crate) const SPLIT_COUNT: &str = "split.count";
/// The number of tensors in all files of a split model.
pub(crate) const SPLIT_TENSORS: &str = "split.tensors.count";

/// A tensor of a GGUF file, borrowed from its memory map.
#[derive(Clone, Copy)]
pub struct GgufTensor<'a> {
    /// The name in the file.
    pub name: &'a str,
    /// The element type.
    pub kind: GgmlType,
    /// The dimensions, outermost first as in PyTorch; a file stores them in reverse order.
    pub shape: &'a [u64],
    /// The elements or blocks, row-major.
    pub data: &'a [u8],
}

impl GgufTensor<'_> {
    /// Returns the elements as f32, row-major.
    ///
    /// # Errors
    /// [`Error::Codec`] for a type without a decoder.
    pub fn to_f32(&self) -> Result<Vec<f32>, Error> {
        self.kind.decode(self.data)
    }
}

impl fmt::Debug for GgufTensor<'_> {
    /// Omits the elements.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, kind, shape, .. } = self;
        write!(formatter, "GgufTensor({name:?}, {kind}, {shape:?})")
    }
}

/// A GGUF model: one file, or all files of a split model.
///
/// Headers are validated when it is opened; tensors are read from disk when their bytes are accessed. The files must not
/// be modified in place while they are open (see [`MappedFile`]).
#[derive(Debug)]
pub struct GgufModel {
    files: Vec<(MappedFile, GgufHeader)>,
}

impl GgufModel {
    /// Opens the file at `path`. Of a split model this is any of its files, whose names end in `-00001-of-00003.gguf`;
    /// the others are opened too.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a damaged file, or files that do not belong together; [`Error::File`] if a file cannot
    /// be opened.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let first = open_one(path)?;
        let count = split_number(path, &first.1, SPLIT_COUNT)?.unwrap_or(1);
        if count <= 1 {
            return Ok(Self { files: vec![first] });
        }
        let stem = SplitName::parse(path).filter(|name| name.count == count).ok_or_else(|| {
            Error::malformed(
                path,
                format!("it is one of {count} files, whose names must end in -00001-of-{count:05}.gguf and so on"),
            )
        })?;
        let mut files = Vec::new();
        for number in 1..=count {
            let path = stem.file(number);
            let file = open_one(&path)?;
            let stored = (split_number(&path, &file.1, SPLIT_NO)?, split_number(&path, &file.1, SPLIT_COUNT)?);
            if stored != (Some(number - 1), Some(count)) {
                let (no, of) = (stored.0.map(|no| no + 1).unwrap_or_default(), stored.1.unwrap_or_default());
                return Err(Error::malformed(&path, format!("its header says that it is file {no} of {of}")));
            }
            files.push(file);
        }
        let model = Self { files };
        model.check_split_tensors(path)?;
        Ok(model)
    }

    fn check_split_tensors(&self, path: &Path) -> Result<(), Error> {
        let found: u64 = self.files.iter().map(|(_, header)| header.tensors.len() as u64).sum();
        let announced = self.metadata(SPLIT_TENSORS).and_then(MetadataValue::as_u64);
        if let Some(announced) = announced.filter(|announced| *announced != found) {
            return Err(Error::malformed(path, format!("its files have {found} tensors instead of {announced}")));
        }
        let mut names: Vec<&str> = self.tensors().map(|tensor| tensor.name).collect();
        names.sort_unstable();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(Error::malformed(path, format!("tensor {:?} is in two of its files", pair[0]))),
            None => Ok(()),
        }
    }

    /// Returns the path of the first file.
    pub fn path(&self) -> &Path {
        self.files[0].0.path()
    }

    /// Returns the value of a metadata key.
    pub fn metadata(&self, key: &str) -> Option<&MetadataValue> {
        self.files[0].1.metadata.get(key)
    }

    /// Returns all metadata, sorted by key; of a split model that of the first file.
    pub fn all_metadata(&self) -> impl Iterator<Item = (&str, &MetadataValue)> {
        self.files[0].1.metadata.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Returns the tensor named `name`.
    pub fn tensor(&self, name: &str) -> Option<GgufTensor<'_>> {
        self.files.iter().find_map(|(file, header)| {
            let &index = header.by_name.get(name)?;
            Some(view(file, &header.tensors[index]))
        })
    }

    /// Returns all tensors in the order of the files.
    pub fn tensors(&self) -> impl Iterator<Item = GgufTensor<'_>> {
        self.files.iter().flat_map(|(file, header)| header.tensors.iter().map(move |entry| view(file, entry)))
    }
}

fn view<'a>(file: &'a MappedFile, entry: &'a TensorEntry) -> GgufTensor<'a> {
    let TensorEntry { name, kind, shape, range } = entry;
    GgufTensor { name, kind: *kind, shape, data: &file.bytes()[range.clone()] }
}

fn open_one(path: &Path) -> Result<(MappedFile, GgufHeader), Error> {
    let file = MappedFile::open(path)?;
    let header = GgufHeader::parse(file.bytes()).map_err(|reason| Error::malformed(path, reason))?;
    Ok((file, header))
}

/// Returns a number of the metadata of split files, at most 65535.
fn split_number(path: &Path, header: &GgufHeader, key: &str) -> Result<Option<u64>, Error> {
    let Some(value) = header.metadata.get(key) else { return Ok(None) };
    match value.as_u64().filter(|number| *number <= u64::from(u16::MAX)) {
        Some(number) => Ok(Some(number)),
        None => Err(Error::malformed(path, format!("{key} is {value}; a number up to 65535 is required"))),
    }
}

/// The names of the files of a split model.
pub(crate) struct SplitName {
    directory: PathBuf,
    stem: String,
    count: u64,
}

impl SplitName {
    /// Returns the names of `count` files that together are the model at `path`.
    pub(crate) fn of(path: &Path, count: u64) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let stem = name.strip_suffix(".gguf").unwrap_or(&name).to_owned();
        Self { directory: path.parent().unwrap_or(Path::new("")).to_path_buf(), stem, count }
    }

    fn parse(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, count) = name.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let digits = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        (digits(count) && digits(number)).then_some(())?;
        let directory = path.parent()?.to_path_buf();
        Some(Self { directory, stem: stem.to_owned(), count: count.parse().ok()? })
    }

    /// Returns the path of a file, numbered from 1.
    pub(crate) fn file(&self, number: u64) -> PathBuf {
        self.directory.join(format!("{}-{number:05}-of-{:05}.gguf", self.stem, self.count))
    }
}
