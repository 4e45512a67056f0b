//! The trained parameters and the optimizer's state, stored exactly.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rekindle_hub::{
    Checkpoint as ModelFiles, Dtype, SafetensorsFile, TensorSpec, TensorView, write_f32, write_safetensors,
};
use rekindle_kernels::DType;
use rekindle_kernels::optimizer::StateTensor;
use rekindle_models::CausalLm;

use crate::Error;

/// The trained parameters of an adapter in f32, or the bytes of parameters that are stored in place.
pub(super) const MASTERS: &str = "master_weights.safetensors";
/// The optimizer's state of each parameter.
pub(super) const OPTIMIZER: &str = "optimizer.safetensors";

pub(super) fn write_masters(dir: &Path, model: &CausalLm) -> Result<(), Error> {
    let params = model.params();
    if params.are_in_place() {
        let bytes = params.to_bytes();
        let spec = |(info, bytes): (&rekindle_kernels::ParamInfo, &Vec<u8>)| {
            TensorSpec::new(&info.name, Dtype::U8, [bytes.len()])
        };
        let specs: Vec<TensorSpec> = params.infos().iter().zip(&bytes).map(spec).collect();
        model.device().check().map_err(rekindle_models::Error::from)?;
        let path = dir.join(MASTERS);
        return Ok(write_safetensors(&path, &BTreeMap::new(), &specs, |index, out| out.write_all(&bytes[index]))?);
    }
    let spec = |info: &rekindle_kernels::ParamInfo| TensorSpec::new(&info.name, Dtype::F32, info.shape.clone());
    let specs: Vec<TensorSpec> = params.infos().iter().map(spec).collect();
    write_safetensors(&dir.join(MASTERS), &BTreeMap::new(), &specs, |index, out| {
        write_f32(out, Dtype::F32, &params.values(params.infos()[index].at))
    })?;
    model.device().check().map_err(rekindle_models::Error::from)?;
    Ok(())
}

/// Replaces the trained parameters by those of the checkpoint in `dir`. Every problem is found before any parameter
/// changes.
pub(super) fn read_masters(dir: &Path, model: &mut CausalLm) -> Result<(), Error> {
    if model.params().are_in_place() {
        let path = dir.join(MASTERS);
        let file = SafetensorsFile::open(&path)?;
        let bytes = |info: &rekindle_kernels::ParamInfo| file.get(&info.name).map(|view| view.data.to_vec());
        let bytes: Option<Vec<Vec<u8>>> = model.params().infos().iter().map(bytes).collect();
        if !bytes.is_some_and(|bytes| model.params_mut().restore(&bytes)) {
            let problem = "its parameters are not those that the model trains".to_owned();
            return Err(Error::Checkpoint { path, problem });
        }
        return Ok(());
    }
    let values = if model.lora().is_some() {
        let path = dir.join(MASTERS);
        let file = SafetensorsFile::open(&path)?;
        let names: Vec<&str> = file.names().collect();
        gather(&path, model, names.len(), |name| file.get(name))?
    } else {
        let files = ModelFiles::open(dir)?;
        gather(dir, model, model.params().infos().len(), |name| files.get(name))?
    };
    model.params_mut().set_all_values(values);
    Ok(())
}

/// Returns the values of all trained parameters, in order, from `get`, which has `count` tensors.
fn gather<'a>(
    path: &Path,
    model: &CausalLm,
    count: usize,
    get: impl Fn(&str) -> Option<TensorView<'a>>,
) -> Result<Vec<f32>, Error> {
    let params = model.params();
    let mut problems = Vec::new();
    let mut values = Vec::with_capacity(params.numel());
    for info in params.infos() {
        match get(&info.name) {
            None => problems.push(format!("\"{}\" is missing", info.name)),
            Some(view) if view.shape != info.shape || view.dtype != Dtype::F32 => problems.push(format!(
                "\"{}\" is {:?} {:?}, and the model has F32 {:?}",
                info.name, view.dtype, view.shape, info.shape
            )),
            Some(view) => values.extend(view.to_f32()?),
        }
    }
    if count != params.infos().len() {
        problems.push(format!("it has {count} tensors, and the model trains {}", params.infos().len()));
    }
    if problems.is_empty() {
        return Ok(values);
    }
    Err(Error::Checkpoint { path: path.to_owned(), problem: problems.join("; ") })
}

pub(super) fn write_optimizer(dir: &Path, tensors: &[StateTensor]) -> Result<(), Error> {
    let path = dir.join(OPTIMIZER);
    let spec = |tensor: &StateTensor| TensorSpec::new(&tensor.name, stored(tensor.dtype), tensor.shape.clone());
    let specs: Vec<TensorSpec> = tensors.iter().map(spec).collect();
    Ok(write_safetensors(&path, &BTreeMap::new(), &specs, |index, out| out.write_all(&tensors[index].bytes))?)
}

/// Returns the path of the file and the tensors in it.
pub(super) fn read_optimizer(dir: &Path) -> Result<(PathBuf, Vec<StateTensor>), Error> {
    let path = dir.join(OPTIMIZER);
    let file = SafetensorsFile::open(&path)?;
    let tensors = file.names().filter_map(|name| file.get(name)).map(|view| StateTensor {
        name: view.name.to_owned(),
        dtype: computed(view.dtype),
        shape: view.shape.to_vec(),
        bytes: view.data.to_vec(),
    });
    let tensors = tensors.collect();
    Ok((path, tensors))
}

fn stored(dtype: DType) -> Dtype {
    match dtype {
        DType::U8 => Dtype::U8,
        _ => Dtype::F32,
    }
}

fn computed(dtype: Dtype) -> DType {
    match dtype {
        Dtype::U8 => DType::U8,
        _ => DType::F32,
    }
}
