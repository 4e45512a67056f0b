//! Golden models: checkpoint, rows and expected values.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rekindle_hub::{Checkpoint, SafetensorsFile};
use rekindle_kernels::DType;
use rekindle_kernels::Device;
use rekindle_models::{Batch, CausalLm, LoadOptions};
use serde_json::Value;

/// The directories of the golden models.
pub const MODELS: [&str; 6] = ["qwen3-tied", "qwen3-untied-sharded", "qwen2", "llama3", "llama2", "llama-bias"];

/// The longest golden row has 75 tokens, the longest generation 41.
const MAX_SEQ_LENGTH: usize = 128;

/// A golden model's directory and rows.
#[derive(Debug)]
pub struct Golden {
    /// The name of its directory.
    pub name: String,
    /// The directory.
    pub dir: PathBuf,
    /// The rows of `rows.jsonl`.
    pub rows: Vec<Row>,
    /// The content of `expect.json`.
    pub expect: Value,
}

/// One line of `rows.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// Labels, −100 where a token is ignored.
    pub labels: Vec<i32>,
}

/// The losses of a row as computed by transformers.
#[derive(Clone, Debug, PartialEq)]
pub struct RowLosses {
    /// One number per label that is not ignored, in order.
    pub nll: Vec<f64>,
    /// Their sum.
    pub sum: f64,
}

impl Golden {
    /// Reads rows and expectations of the model `name`.
    pub fn open(name: &str) -> Self {
        let dir = goldens().join(name);
        let text = std::fs::read_to_string(dir.join("rows.jsonl")).expect("every golden model has rows");
        let rows = text.lines().map(|line| Row::from_json(&serde_json::from_str(line).expect("a row is JSON")));
        Self { name: name.to_owned(), rows: rows.collect(), expect: read_json(&dir.join("expect.json")), dir }
    }

    /// Opens every model in `families`.
    pub fn families() -> Vec<Self> {
        let entries = std::fs::read_dir(goldens().join("families")).expect("there are goldens of families");
        let mut names: Vec<String> = entries
            .map(|entry| entry.expect("an entry").path())
            .filter(|path| path.is_dir())
            .map(|path| format!("families/{}", path.file_name().expect("a name").to_string_lossy()))
            .collect();
        names.sort_unstable();
        assert!(!names.is_empty());
        names.iter().map(|name| Self::open(name)).collect()
    }

    /// Loads the model in `f32` on the CPU with all weights frozen.
    pub fn load(&self) -> CausalLm {
        self.load_with(|_| ())
    }

    /// Loads the model with all weights trainable.
    pub fn load_full(&self) -> CausalLm {
        self.load_with(|options| options.full_finetuning = true)
    }

    /// Loads the model with a golden adapter.
    pub fn load_adapted(&self, adapter: &str) -> CausalLm {
        let mut model = self.load();
        model.load_adapter(&self.dir.join("adapters").join(adapter)).expect("a golden adapter loads");
        model
    }

    /// Loads the model with changed options.
    pub fn load_with(&self, change: impl FnOnce(&mut LoadOptions)) -> CausalLm {
        let mut options = LoadOptions::new(Device::cpu(), DType::F32, MAX_SEQ_LENGTH);
        change(&mut options);
        let checkpoint = Checkpoint::open(&self.dir).expect("a golden checkpoint opens");
        CausalLm::load(&checkpoint, &options, &mut |_| ()).expect("a golden checkpoint loads")
    }

    /// Returns the names of the golden adapters.
    pub fn adapters(&self) -> Vec<String> {
        let adapters = self.expect["adapters"].as_object();
        adapters.into_iter().flat_map(|found| found.keys().cloned()).collect()
    }

    /// Returns transformers' losses of the rows without an adapter.
    pub fn base_losses(&self) -> Vec<RowLosses> {
        RowLosses::list(&self.expect["rows"])
    }

    /// Returns PEFT's losses of the rows with the adapter `name`.
    pub fn adapter_losses(&self, name: &str) -> Vec<RowLosses> {
        RowLosses::list(&self.expect["adapters"][name]["rows"])
    }

    /// Returns a batch of these rows in order. A row's index in the optimizer step is its index in the file.
    pub fn batch(&self, which: &[usize]) -> Batch {
        let rows = which.iter().map(|&i| (self.rows[i].input_ids.as_slice(), self.rows[i].labels.as_slice()));
        Batch { rows: which.iter().map(|&i| i as u32).collect(), ..Batch::from_rows(rows, 0) }
    }

    /// Returns all rows as one batch.
    pub fn packed(&self) -> Batch {
        self.batch(&(0..self.rows.len()).collect::<Vec<_>>())
    }
}

impl Row {
    fn from_json(row: &Value) -> Self {
        let list = |key: &str| row[key].as_array().expect("a row has ids and labels").iter();
        let id = |value: &Value| value.as_u64().expect("an id is a number") as u32;
        let label = |value: &Value| value.as_i64().expect("a label is a number") as i32;
        Self { input_ids: list("input_ids").map(id).collect(), labels: list("labels").map(label).collect() }
    }
}

impl RowLosses {
    /// Reads a list of rows in the format of `expect.json`.
    pub fn list(rows: &Value) -> Vec<Self> {
        let float = |value: &Value| value.as_f64().expect("a loss is a number");
        let row = |row: &Value| {
            let nll: Vec<f64> = row["nll"].as_array().expect("a list of losses").iter().map(float).collect();
            assert_eq!(Some(nll.len() as u64), row["tokens"].as_u64());
            Self { nll, sum: float(&row["sum"]) }
        };
        rows.as_array().expect("a list of rows").iter().map(row).collect()
    }
}

/// Returns the directory of the goldens: `REKINDLE_GOLDENS`, for machines without the repository, or this crate's.
pub fn goldens() -> PathBuf {
    let elsewhere = std::env::var_os("REKINDLE_GOLDENS").map(PathBuf::from);
    elsewhere.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens"))
}

/// Reads a JSON file.
pub fn read_json(path: &Path) -> Value {
    rekindle_hub::read_json(path).expect("a golden file is JSON")
}

/// Reads the shape and values of every tensor of a safetensors file.
pub fn tensors(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let file = SafetensorsFile::open(path).expect("a safetensors file opens");
    let tensor = |name: &str| {
        let view = file.get(name).expect("a listed tensor is there");
        (name.to_owned(), (view.shape.to_vec(), view.to_f32().expect("floats")))
    };
    file.names().map(tensor).collect()
}
