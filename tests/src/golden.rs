//! One golden model: its checkpoint, its rows and what is expected of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::DType;
use rekindle_hub::{Checkpoint, SafetensorsFile};
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
    /// Its directory's name.
    pub name: String,
    /// Its directory.
    pub dir: PathBuf,
    /// `rows.jsonl`.
    pub rows: Vec<Row>,
    /// `expect.json`.
    pub expect: Value,
}

/// One line of `rows.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// What stands beside them, −100 where nothing counts.
    pub labels: Vec<i32>,
}

/// What transformers computed for a row.
#[derive(Clone, Debug, PartialEq)]
pub struct RowLosses {
    /// One number for every counted label, in order.
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

    /// The model in `f32` on the CPU, all weights frozen.
    pub fn load(&self) -> CausalLm {
        self.load_with(|_| ())
    }

    /// The model with all weights trained.
    pub fn load_full(&self) -> CausalLm {
        self.load_with(|options| options.full_finetuning = true)
    }

    /// The model with a golden adapter.
    pub fn load_adapted(&self, adapter: &str) -> CausalLm {
        let mut model = self.load();
        model.load_adapter(&self.dir.join("adapters").join(adapter)).expect("a golden adapter loads");
        model
    }

    /// The model with options other than `f32` on the CPU, frozen.
    pub fn load_with(&self, change: impl FnOnce(&mut LoadOptions)) -> CausalLm {
        let mut options = LoadOptions::new(Device::cpu(), DType::F32, MAX_SEQ_LENGTH);
        change(&mut options);
        let checkpoint = Checkpoint::open(&self.dir).expect("a golden checkpoint opens");
        CausalLm::load(&checkpoint, &options, &mut |_| ()).expect("a golden checkpoint loads")
    }

    /// Names of the golden adapters.
    pub fn adapters(&self) -> Vec<String> {
        let adapters = self.expect["adapters"].as_object();
        adapters.into_iter().flat_map(|found| found.keys().cloned()).collect()
    }

    /// What transformers computes for the rows without an adapter.
    pub fn base_losses(&self) -> Vec<RowLosses> {
        RowLosses::list(&self.expect["rows"])
    }

    /// What PEFT computes for the rows with the adapter `name`.
    pub fn adapter_losses(&self, name: &str) -> Vec<RowLosses> {
        RowLosses::list(&self.expect["adapters"][name]["rows"])
    }

    /// These rows one after another. A row's number in the optimizer step is its number in the file.
    pub fn batch(&self, which: &[usize]) -> Batch {
        let rows = which.iter().map(|&i| (self.rows[i].input_ids.as_slice(), self.rows[i].labels.as_slice()));
        Batch { rows: which.iter().map(|&i| i as u32).collect(), ..Batch::from_rows(rows, 0) }
    }

    /// All rows as one batch.
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
    /// Reads a list of rows as `expect.json` has them.
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

/// The directory of the goldens: `REKINDLE_GOLDENS`, for a machine without the repository, or that of this crate.
pub fn goldens() -> PathBuf {
    let elsewhere = std::env::var_os("REKINDLE_GOLDENS").map(PathBuf::from);
    elsewhere.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens"))
}

/// The content of a JSON file.
pub fn read_json(path: &Path) -> Value {
    rekindle_hub::read_json(path).expect("a golden file is JSON")
}

/// Shape and values of every tensor of a safetensors file.
pub fn tensors(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let file = SafetensorsFile::open(path).expect("a safetensors file opens");
    let tensor = |name: &str| {
        let view = file.get(name).expect("a listed tensor is there");
        (name.to_owned(), (view.shape.to_vec(), view.to_f32().expect("floats")))
    };
    file.names().map(tensor).collect()
}
