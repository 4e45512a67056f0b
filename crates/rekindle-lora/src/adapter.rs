//! Adapters in memory and in PEFT's files.

mod stacked;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use rekindle_hub::{Dtype, SafetensorsFile, TensorSpec, open_adapter, write_atomic, write_f32, write_safetensors};

use crate::peft::{AdapterConfig, CONFIG_FILE, TENSORS_FILE, TensorKey};
use crate::{Bias, Error, ExpertProjection, LoraConfig, match_targets};

/// A `[r, in]` and B `[out, r]` of one adapted linear, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraFactors {
    /// The rank.
    pub r: usize,
    /// A's values.
    pub a: Vec<f32>,
    /// B's values.
    pub b: Vec<f32>,
    /// DoRA's magnitude of each row, `[out]`.
    pub magnitude: Option<Vec<f32>>,
}

/// An adapter: its configuration and everything that is trained with it, by module name.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// The contents of `adapter_config.json`.
    pub config: AdapterConfig,
    /// Factors by the full name of the linear.
    pub factors: BTreeMap<String, LoraFactors>,
    /// Trained biases by the full name of the linear.
    pub biases: BTreeMap<String, Vec<f32>>,
    /// Weights that are trained whole, with their shapes, by the full name of the module, such as `lm_head`.
    pub saved: BTreeMap<String, ([usize; 2], Vec<f32>)>,
    /// Frozen weights that replace the base's, by the full name of the module. PEFT saves the embedding table and the head
    /// with an adapter when their number of rows was changed (`save_embedding_layers`). If they are tied, there is one
    /// entry for both.
    pub tables: BTreeMap<String, EmbeddingTable>,
}

/// The weight of the embedding or of the head.
#[derive(Clone, Debug, PartialEq)]
pub struct EmbeddingTable {
    /// `[vocab_size, hidden_size]`.
    pub shape: [usize; 2],
    /// The dtype in the adapter's file.
    pub dtype: Dtype,
    /// Row-major.
    pub values: Vec<f32>,
}

/// The modules of a model that an adapter can adapt or save.
#[derive(Clone, Debug, Default)]
pub struct AdaptableModules {
    /// Every linear of the blocks, those of experts too.
    pub linears: Vec<LinearModule>,
    /// The modules that `modules_to_save` can name: full name and shape of the weight.
    pub savable: Vec<(String, [usize; 2])>,
    /// True if the embedding table and the head are one weight.
    pub tied: bool,
    /// The projections of experts, whose linears are among `linears`.
    pub experts: Vec<ExpertProjection>,
    /// The outputs of an expert taken together, where there are several: what adapters on `target_parameters` are on.
    pub joined: Vec<LinearModule>,
}

/// A linear of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearModule {
    /// Full name, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// The number of input features.
    pub input: usize,
    /// The number of output features.
    pub out: usize,
    /// True if it has a bias.
    pub has_bias: bool,
}

impl AdaptableModules {
    /// Returns the linear with this full name.
    pub fn linear(&self, name: &str) -> Option<&LinearModule> {
        self.linears.iter().find(|linear| linear.name == name)
    }

    /// Returns the names of the linears, in order.
    pub fn names(&self) -> Vec<&str> {
        self.linears.iter().map(|linear| linear.name.as_str()).collect()
    }

    /// Returns the full names of the modules that `config.modules_to_save` names, and of those tied to them.
    ///
    /// # Errors
    /// [`Error::Targets`] for a name that this model does not have.
    pub fn saved(&self, config: &LoraConfig) -> Result<Vec<String>, Error> {
        let modules_to_save = &config.modules_to_save;
        let find = |wanted: &String| {
            let is = |name: &&(String, _)| name.0 == *wanted || name.0.ends_with(&format!(".{wanted}"));
            self.savable.iter().find(is).map(|(name, _)| name.clone()).ok_or_else(|| {
                let known: Vec<&str> = self.savable.iter().map(|(name, _)| name.as_str()).collect();
                format!("modules_to_save \"{wanted}\" is not a module that can be saved; use {}", known.join(", "))
            })
        };
        let found: Vec<Result<String, String>> = modules_to_save.iter().map(find).collect();
        let problems: Vec<String> = found.iter().filter_map(|found| found.clone().err()).collect();
        let mut names: BTreeSet<String> = found.into_iter().flatten().collect();
        if !names.is_empty() && self.tied && config.ensure_weight_tying {
            names.extend(self.savable.iter().map(|(name, _)| name.clone()));
        }
        if problems.is_empty() { Ok(names.into_iter().collect()) } else { Err(Error::Targets { problems }) }
    }

    /// Returns the linears whose biases are trained. `adapted` is true for the name of an adapted linear.
    pub fn biased(&self, bias: Bias, adapted: impl Fn(&str) -> bool) -> Vec<&LinearModule> {
        let trained = |linear: &&LinearModule| match bias {
            Bias::None => false,
            Bias::All => linear.has_bias,
            Bias::LoraOnly => linear.has_bias && adapted(&linear.name),
        };
        self.linears.iter().filter(trained).collect()
    }
}

impl Adapter {
    /// Reads an adapter directory for a model with `modules`.
    ///
    /// The adapted linears are those that the tensors name.
    ///
    /// # Errors
    /// [`Error::File`] and [`Error::AdapterConfig`] for unreadable files; [`Error::Tensors`] that lists every tensor
    /// which is missing, unexpected or misshaped.
    pub fn load(dir: &Path, modules: &AdaptableModules) -> Result<Self, Error> {
        let config = AdapterConfig::open(dir)?;
        let path = dir.join(TENSORS_FILE);
        let file = open_adapter(dir)?;
        let adapted = adapted_modules(&file, &config, modules);
        let mut reader = TensorReader { file: &file, read: BTreeSet::new(), problems: Vec::new() };

        let mut factors = BTreeMap::new();
        reader.stacked(config.lora(), modules, &mut factors)?;
        let is_separate =
            |linear: &&LinearModule| adapted.contains(&linear.name) && !factors.contains_key(&linear.name);
        let separate: Vec<&LinearModule> = modules.linears.iter().filter(is_separate).collect();
        for linear in separate {
            let LinearModule { name, input, out, .. } = linear;
            let r = config.lora().rank_of(name);
            let a = reader.take(&TensorKey::A(name), &[r, *input])?;
            let b = reader.take(&TensorKey::B(name), &[*out, r])?;
            let magnitude =
                config.lora().use_dora.then(|| reader.take(&TensorKey::Magnitude(name), &[*out])).transpose()?;
            factors.insert(name.clone(), LoraFactors { r, a, b, magnitude });
        }
        let mut biases = BTreeMap::new();
        for linear in modules.biased(config.lora().bias, |name| factors.contains_key(name)) {
            let key = TensorKey::bias(&linear.name, factors.contains_key(&linear.name));
            biases.insert(linear.name.clone(), reader.take(&key, &[linear.out])?);
        }
        let mut saved = BTreeMap::new();
        for name in modules.saved(config.lora())? {
            let shape = modules.savable.iter().find(|(known, _)| *known == name).map_or([0, 0], |(_, shape)| *shape);
            let weight = reader.take(&TensorKey::Saved(&name), &shape)?;
            saved.insert(name, (shape, weight));
        }
        let mut tables = BTreeMap::new();
        for (name, shape) in modules.savable.iter().filter(|(name, _)| !saved.contains_key(name)) {
            let key = TensorKey::Saved(name);
            let Some(dtype) = file.get(&key.to_string()).map(|tensor| tensor.dtype) else { continue };
            let values = reader.take(&key, shape)?;
            tables.insert(name.clone(), EmbeddingTable { shape: *shape, dtype, values });
        }
        // Repetitions of a module that is trained whole, where PEFT saved the tables as well.
        let repeated = saved.keys().flat_map(|name| TensorKey::repeated(name));
        reader.read.extend(repeated.filter(|key| file.get(key).is_some()));
        let mut problems = reader.problems;
        let rows = saved.values().map(|(shape, _)| shape[0]).chain(tables.values().map(|table| table.shape[0])).next();
        if modules.tied && tables.len() > 1 {
            let first = tables.pop_first().map(|(_, table)| table.values);
            if first != tables.values().next().map(|table| table.values.clone()) {
                problems.push("its embedding table and head differ, but this model ties them".to_owned());
            }
        }
        if let (Some(rows), Some(has)) = (rows, rows_of(&file).filter(|has| Some(*has) != rows)) {
            problems.push(format!(
                "it was trained with {has} token ids, but this model has {rows}; load the base with \
                 resize_model_vocab = {has}"
            ));
        }
        let different = |(a, b): (&(_, Vec<f32>), &(_, Vec<f32>))| a.1 != b.1;
        if modules.tied
            && config.lora().ensure_weight_tying
            && saved.values().zip(saved.values().skip(1)).any(different)
        {
            problems.push("its saved tied weights differ, although ensure_weight_tying is true".to_owned());
        }
        let adapted: Vec<String> = factors.keys().cloned().collect();
        if let (Err(error), true) = (modules.check_experts(config.lora(), &adapted), problems.is_empty()) {
            problems.push(error.to_string());
        }
        for name in file.names().filter(|name| !reader.read.contains(*name)) {
            problems.push(format!("tensor \"{name}\" matches no adapted module of this model"));
        }
        if factors.is_empty() && problems.is_empty() {
            problems.push("it contains no adapter tensors".to_owned());
        }
        if problems.is_empty() {
            Ok(Self { config, factors, biases, saved, tables })
        } else {
            Err(Error::Tensors { path, problems })
        }
    }

    /// Returns true if every product B·A is zero, as in an untrained adapter.
    pub fn is_zero(&self) -> bool {
        let zero = |x: &[f32]| x.iter().all(|x| *x == 0.0);
        self.factors.values().all(|factors| zero(&factors.b) || zero(&factors.a))
    }

    /// Writes the files that PEFT reads into the existing directory `dir`, everything but [`tables`](Self::tables) in `f32`.
    ///
    /// # Errors
    /// [`Error::File`] if a file cannot be written. No incomplete file appears under a final name.
    pub fn save(&self, dir: &Path) -> Result<(), Error> {
        let mut tensors: Vec<(String, Vec<usize>, &[f32])> = Vec::new();
        let mut dtypes = BTreeMap::new();
        let stacked = self.stacked();
        for (module, [a_shape, b_shape], (a, b)) in &stacked.tensors {
            tensors.push((TensorKey::A(module).to_string(), a_shape.to_vec(), a));
            tensors.push((TensorKey::B(module).to_string(), b_shape.to_vec(), b));
        }
        let separate = self.factors.iter().filter(|(module, _)| !stacked.modules.contains(module.as_str()));
        for (module, LoraFactors { r, a, b, magnitude }) in separate {
            tensors.push((TensorKey::A(module).to_string(), vec![*r, a.len() / r], a));
            tensors.push((TensorKey::B(module).to_string(), vec![b.len() / r, *r], b));
            tensors
                .extend(magnitude.as_ref().map(|m| (TensorKey::Magnitude(module).to_string(), vec![m.len()], &m[..])));
        }
        for (module, bias) in &self.biases {
            let key = TensorKey::bias(module, self.factors.contains_key(module));
            tensors.push((key.to_string(), vec![bias.len()], bias));
        }
        for (module, (shape, weight)) in &self.saved {
            tensors.push((TensorKey::Saved(module).to_string(), shape.to_vec(), weight));
        }
        for (module, EmbeddingTable { shape, dtype, values }) in &self.tables {
            dtypes.insert(TensorKey::Saved(module).to_string(), *dtype);
            tensors.push((TensorKey::Saved(module).to_string(), shape.to_vec(), values));
        }
        let dtype = |key: &String| dtypes.get(key).copied().unwrap_or(Dtype::F32);
        let specs: Vec<TensorSpec> =
            tensors.iter().map(|(key, shape, _)| TensorSpec::new(key, dtype(key), shape.clone())).collect();
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        write_safetensors(&dir.join(TENSORS_FILE), &metadata, &specs, |i, out| {
            write_f32(out, specs[i].dtype, tensors[i].2)
        })?;
        write_atomic(&dir.join(CONFIG_FILE), self.config.to_json().as_bytes())?;
        Ok(())
    }
}

/// Returns the number of token ids of the embedding table or head that the adapter in `dir` saved, or `None` if it saved
/// neither.
///
/// # Errors
/// [`Error::File`] if its tensors cannot be read.
pub fn saved_rows(dir: &Path) -> Result<Option<usize>, Error> {
    Ok(rows_of(&open_adapter(dir)?))
}

/// The modules with a row for each token id.
const TABLES: [&str; 2] = ["embed_tokens", "lm_head"];

fn rows_of(file: &SafetensorsFile) -> Option<usize> {
    let rows = |name: &str| match TensorKey::parse(name)? {
        TensorKey::Saved(module) if TABLES.contains(&module.rsplit('.').next()?) => {
            file.get(name)?.shape.first().copied()
        }
        _ => None,
    };
    let mut found = file.names().filter_map(rows);
    let first = found.next()?;
    found.all(|rows| rows == first).then_some(first)
}

/// Returns the linears that the file has factors for, and those that the configuration requires.
fn adapted_modules(file: &SafetensorsFile, config: &AdapterConfig, modules: &AdaptableModules) -> BTreeSet<String> {
    let named = file.names().filter_map(TensorKey::parse).filter_map(|key| match key {
        TensorKey::A(module) | TensorKey::B(module) => Some(module.to_owned()),
        _ => None,
    });
    // A pattern that only Python's regular expressions understand cannot be checked; its tensors still are. Of a mixture
    // the file says what the adapter is on: PEFT leaves experts alone that are not linears there.
    let matched = if modules.experts.is_empty() {
        match_targets(config.lora(), &modules.names()).unwrap_or_default()
    } else {
        Vec::new()
    };
    named.chain(matched).collect()
}

/// Reads tensors of an adapter's file and collects what is wrong with them.
struct TensorReader<'a> {
    file: &'a SafetensorsFile,
    read: BTreeSet<String>,
    problems: Vec<String>,
}

impl TensorReader<'_> {
    /// Returns the values of a tensor, or none after recording a problem.
    fn take(&mut self, key: &TensorKey<'_>, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let key = key.to_string();
        match self.file.get(&key) {
            None => self.problems.push(format!("tensor \"{key}\" is missing")),
            Some(tensor) if tensor.shape != shape => {
                self.problems.push(format!("tensor \"{key}\" has shape {:?}, expected {shape:?}", tensor.shape));
                self.read.insert(key);
            }
            Some(tensor) => {
                let values = tensor.to_f32()?;
                self.read.insert(key);
                return Ok(values);
            }
        }
        Ok(Vec::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LoraConfig;

    fn adapter() -> Adapter {
        let module = "model.layers.0.self_attn.q_proj".to_owned();
        let factors =
            LoraFactors { r: 2, a: (0..6).map(|i| i as f32).collect(), b: vec![0.5; 8], magnitude: Some(vec![1.5; 4]) };
        let config = LoraConfig::new(2).use_dora(true).bias(crate::Bias::LoraOnly).modules_to_save(["lm_head"]);
        Adapter {
            config: AdapterConfig::new(&config.target_modules(["q_proj"]), Some("base"), std::slice::from_ref(&module)),
            factors: BTreeMap::from([(module.clone(), factors)]),
            biases: BTreeMap::from([(module, vec![0.25; 4])]),
            saved: BTreeMap::from([("lm_head".to_owned(), ([3, 2], vec![1.0; 6]))]),
            tables: BTreeMap::new(),
        }
    }

    fn modules(layer: usize, input: usize) -> AdaptableModules {
        let name = format!("model.layers.{layer}.self_attn.q_proj");
        let linears = vec![LinearModule { name, input, out: 4, has_bias: true }];
        AdaptableModules { linears, savable: vec![("lm_head".to_owned(), [3, 2])], ..AdaptableModules::default() }
    }

    #[test]
    fn what_was_saved_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        adapter().save(dir.path()).unwrap();
        let loaded = Adapter::load(dir.path(), &modules(0, 3)).unwrap();
        assert_eq!(
            (&loaded.factors, &loaded.biases, &loaded.saved),
            (&adapter().factors, &adapter().biases, &adapter().saved)
        );
        assert_eq!(loaded.config.lora().r, 2);
        assert!(!loaded.is_zero());
        let mut zero = loaded;
        zero.factors.values_mut().for_each(|factors| factors.b.fill(0.0));
        assert!(zero.is_zero());
    }

    #[test]
    fn another_vocabulary_is_named_with_the_way_out() {
        let dir = tempfile::tempdir().unwrap();
        adapter().save(dir.path()).unwrap();
        assert_eq!(saved_rows(dir.path()).unwrap(), Some(3));
        let other = AdaptableModules { savable: vec![("lm_head".to_owned(), [4, 2])], ..modules(0, 3) };
        let error = Adapter::load(dir.path(), &other).unwrap_err().to_string();
        assert!(error.contains("has shape [3, 2], expected [4, 2]"), "{error}");
        assert!(error.contains("trained with 3 token ids, but this model has 4; load the base with resize"), "{error}");
    }

    #[test]
    fn tables_come_along_with_their_rows_and_dtype() {
        let dir = tempfile::tempdir().unwrap();
        let table = |value: f32| EmbeddingTable { shape: [3, 2], dtype: Dtype::BF16, values: vec![value; 6] };
        let (embed, head) = ("model.embed_tokens".to_owned(), "lm_head".to_owned());
        let lora = LoraConfig::new(2).target_modules(["q_proj"]);
        let mut brought = Adapter {
            config: AdapterConfig::new(&lora, Some("base"), &[]),
            biases: BTreeMap::new(),
            saved: BTreeMap::new(),
            tables: BTreeMap::from([(embed.clone(), table(1.5)), (head.clone(), table(0.25))]),
            ..adapter()
        };
        brought.factors.values_mut().for_each(|factors| factors.magnitude = None);
        brought.save(dir.path()).unwrap();
        assert_eq!(saved_rows(dir.path()).unwrap(), Some(3));
        let savable = vec![(embed.clone(), [3, 2]), (head, [3, 2])];
        let untied = AdaptableModules { savable, ..modules(0, 3) };
        assert_eq!(Adapter::load(dir.path(), &untied).unwrap().tables, brought.tables);

        let tied = AdaptableModules { tied: true, ..untied.clone() };
        let error = Adapter::load(dir.path(), &tied).unwrap_err().to_string();
        assert!(error.contains("its embedding table and head differ"), "{error}");
        brought.tables.insert(embed, table(0.25));
        brought.save(dir.path()).unwrap();
        let tables = Adapter::load(dir.path(), &tied).unwrap().tables;
        assert_eq!(tables.into_values().collect::<Vec<_>>(), [table(0.25)], "one stands for both");

        let smaller = AdaptableModules {
            savable: untied.savable.iter().map(|(name, _)| (name.clone(), [2, 2])).collect(),
            ..untied
        };
        let error = Adapter::load(dir.path(), &smaller).unwrap_err().to_string();
        assert!(error.contains("trained with 3 token ids, but this model has 2; load the base with resize"), "{error}");
    }

    #[test]
    fn every_wrong_tensor_is_named() {
        let dir = tempfile::tempdir().unwrap();
        adapter().save(dir.path()).unwrap();
        let error = Adapter::load(dir.path(), &modules(0, 5)).unwrap_err().to_string();
        assert!(error.contains("q_proj.lora_A.weight\" has shape [2, 3], expected [2, 5]"), "{error}");
        let error = Adapter::load(dir.path(), &modules(1, 3)).unwrap_err().to_string();
        assert!(
            error.contains("layers.0.self_attn.q_proj.lora_A.weight\" matches no adapted module of this model"),
            "{error}"
        );
        assert!(error.contains("layers.1.self_attn.q_proj.lora_B.weight\" is missing"), "{error}");
    }
}
