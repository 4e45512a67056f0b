//! Trainable parameters: a flat `f32` buffer with named views.
//!
//! One buffer for all values and one for all gradients ([`Grads`]) make the optimizer, the global norm and
//! the reduction over ranks one pass each. Layers keep [`ParamRef`]s, not tensors: a view is made where
//! it is read and gone before the optimizer writes, so that the write happens in place.
//!
//! Parameters trained *in place* have no f32 buffer: each has a storage of its own, bf16 or quantized, as it computes, and
//! updates are rounded into it stochastically ([`stochastic`]). A [`ParamRef`] is then a place in the gradients alone.

mod copies;
mod grads;
pub mod quantized;
mod sharded;
pub mod stochastic;
mod storage;
mod update;
mod weight;

pub use grads::Grads;
pub use quantized::QuantizedWeight;
pub use sharded::{BlockPass, FrozenShards, ShardExchange, ShardedWeight};
pub use weight::Weight;

use core::fmt;
use core::ops::Range;
use std::sync::Arc;

use burn::tensor::DType;

use self::copies::{ParamCopies, ParamCopy};
use self::storage::ParamStorage;
use crate::runtime::{Array, MemoryUse};
use crate::tensor::MetaTensor;
use crate::{Device, Tensor, from_f32, to_f32};

/// The place of a parameter: a row-major matrix in the flat buffers. Vectors have one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParamRef {
    offset: usize,
    rows: usize,
    cols: usize,
}

impl ParamRef {
    /// Returns rows and columns.
    pub fn dims(self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// Returns the range of its elements in the flat buffers.
    pub fn range(self) -> Range<usize> {
        self.offset..self.offset + self.rows * self.cols
    }

    /// Some of its rows.
    ///
    /// # Panics
    /// If it has fewer.
    #[must_use]
    pub fn row_range(self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.rows, "rows {first}..{} of {}", first + count, self.rows);
        Self { offset: self.offset + first * self.cols, rows: count, ..self }
    }

    /// The same among the elements from `base` on.
    pub(crate) fn from(self, base: usize) -> Self {
        Self { offset: self.offset - base, ..self }
    }

    /// `self` and `next` as one matrix with the rows of both, if they touch and are equally wide.
    pub fn join(self, next: Self) -> Option<Self> {
        (self.range().end == next.offset && self.cols == next.cols)
            .then_some(Self { rows: self.rows + next.rows, ..self })
    }
}

/// A parameter's name and properties.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamInfo {
    /// Full name, such as `layers.0.q_proj.lora_A.weight`.
    pub name: String,
    /// Shape as saved; one or two axes.
    pub shape: Vec<usize>,
    /// Its place.
    pub at: ParamRef,
    /// True if weight decay applies.
    pub decays: bool,
    /// Whose learning rate it has.
    pub group: Group,
}

/// Parameters that share a learning rate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Group {
    /// All but those of another group.
    #[default]
    Default,
    /// The embedding table and the output layer.
    Embedding,
}

/// Values on a CUDA device that are computed from parameters, and again whenever those change.
pub(crate) trait DerivedValues: fmt::Debug + Send + Sync {
    /// Returns the elements of the flat buffer that the values depend on.
    fn reads(&self) -> Range<usize>;

    /// Computes the values from the flat buffer, after its copies are up to date.
    fn update(&self, values: &Array);
}

/// Collects parameters before the flat buffer is made.
#[derive(Debug)]
pub struct ParamsBuilder {
    device: Device,
    dtype: DType,
    infos: Vec<ParamInfo>,
    /// None on a planned device, where they do not matter.
    values: Vec<f32>,
    numel: usize,
    param_copies: Vec<ParamCopy>,
    derived: Vec<Arc<dyn DerivedValues>>,
    /// Instead of `values`.
    in_place: Option<Vec<ParamStorage>>,
}

impl ParamsBuilder {
    /// Returns a builder of parameters on `device`, whose views are in `dtype`.
    pub fn new(device: &Device, dtype: DType) -> Self {
        let (infos, values, param_copies, derived) = Default::default();
        Self { device: device.clone(), dtype, infos, values, numel: 0, param_copies, derived, in_place: None }
    }

    /// Returns a builder of parameters that are stored in place, without an f32 buffer.
    pub fn in_place(device: &Device, dtype: DType) -> Self {
        Self { in_place: Some(Vec::new()), ..Self::new(device, dtype) }
    }

    /// Returns the dtype that views are read in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Appends a parameter of one or two axes to [`Group::Default`].
    ///
    /// # Panics
    /// If `values` do not fill `shape`.
    pub fn push(&mut self, name: impl Into<String>, shape: &[usize], decays: bool, values: &[f32]) -> ParamRef {
        self.push_in(Group::Default, name, shape, decays, values)
    }

    /// Appends a parameter of one or two axes to a group.
    ///
    /// # Panics
    /// If `values` do not fill `shape`.
    pub fn push_in(
        &mut self,
        group: Group,
        name: impl Into<String>,
        shape: &[usize],
        decays: bool,
        values: &[f32],
    ) -> ParamRef {
        let at = self.describe(group, name, shape, decays);
        assert_eq!(values.len(), at.range().len(), "values of shape {shape:?}");
        match &mut self.in_place {
            Some(in_place) => in_place.push(ParamStorage::f32(values, at.dims(), &self.device)),
            None if self.device.is_planned() => {}
            None => self.values.extend_from_slice(values),
        }
        at
    }

    /// Appends a matrix that is kept in bf16, given as its bits in little-endian order.
    ///
    /// # Panics
    /// If `bytes` do not fill `shape`, or parameters are not kept in place.
    pub fn push_bf16(&mut self, group: Group, name: impl Into<String>, shape: &[usize], bytes: &[u8]) -> ParamRef {
        let at = self.describe(group, name, shape, true);
        assert_eq!(bytes.len(), 2 * at.range().len(), "bytes of shape {shape:?}");
        let storage = ParamStorage::bf16(bytes, at.dims(), &self.device);
        self.in_place.as_mut().expect("parameters are kept in place").push(storage);
        at
    }

    /// Appends a matrix that is kept in codes.
    ///
    /// # Panics
    /// If the codes cannot be trained, or parameters are not kept in place.
    pub fn push_quantized(&mut self, name: impl Into<String>, weight: QuantizedWeight) -> ParamRef {
        assert!(weight.can_be_trained(), "codes whose scales are in codes do not change");
        let at = self.describe(Group::Default, name, &weight.dims(), true);
        let storage = ParamStorage::quantized(weight, &self.device);
        self.in_place.as_mut().expect("parameters are kept in place").push(storage);
        at
    }

    fn describe(&mut self, group: Group, name: impl Into<String>, shape: &[usize], decays: bool) -> ParamRef {
        let (rows, cols) = match *shape {
            [n] => (1, n),
            // The weight of a depthwise convolution has an axis of 1 between them.
            [rows, cols] | [rows, 1, cols] => (rows, cols),
            _ => panic!("a parameter has one or two axes, not {shape:?}"),
        };
        let at = ParamRef { offset: self.numel, rows, cols };
        self.numel += at.range().len();
        self.infos.push(ParamInfo { name: name.into(), shape: shape.to_vec(), at, decays, group });
        at
    }

    /// Returns whether the values of parameters do not matter, on a device without values.
    pub fn is_planned(&self) -> bool {
        self.device.is_planned()
    }

    /// Returns whether nothing was pushed.
    pub fn is_empty(&self) -> bool {
        self.infos.is_empty()
    }

    /// Keeps `scale` times a parameter in `target` too, on a CUDA device.
    pub(crate) fn copy_to(&mut self, at: ParamRef, scale: f32, target: &Array) {
        self.param_copies.push(ParamCopy { first: at.offset, scale, target: target.clone() });
    }

    /// Keeps values that are computed from parameters up to date.
    pub(crate) fn derive(&mut self, derived: Arc<dyn DerivedValues>) {
        self.derived.push(derived);
    }

    /// Moves everything to the device.
    pub fn build(self) -> Params {
        let Self { device, dtype, infos, mut values, numel, param_copies, derived, in_place } = self;
        let numel = if in_place.is_some() { 0 } else { numel };
        values.shrink_to_fit();
        let values = match &device {
            Device::Cuda(cuda) if cuda.is_planned() => {
                Array::unfilled(cuda, [1, numel], crate::runtime::DType::F32, MemoryUse::Parameters).into()
            }
            Device::Cuda(cuda) => {
                Array::from_f32(cuda, &values, [1, numel], crate::runtime::DType::F32, MemoryUse::Parameters).into()
            }
            Device::Burn(_) => from_f32(values, [numel], &device, DType::F32),
            Device::Meta(meta) => MetaTensor::new(meta, [1, numel], DType::F32, MemoryUse::Parameters).into(),
        };
        let param_copies = match &device {
            Device::Burn(_) | Device::Meta(_) => None,
            Device::Cuda(cuda) => (!param_copies.is_empty()).then(|| ParamCopies::new(cuda, param_copies)),
        };
        let mut params = Params { infos, values, in_place, seed: 0, dtype, compute: None, param_copies, derived };
        params.sync();
        params
    }
}

/// The trainable parameters of a model, `f32` or kept in place.
#[derive(Clone, Debug)]
pub struct Params {
    infos: Vec<ParamInfo>,
    /// Empty if parameters are trained in place.
    values: Tensor<1>,
    /// One for each of `infos`, where parameters are kept in place.
    in_place: Option<Vec<ParamStorage>>,
    /// Seed of stochastic rounding.
    seed: u64,
    dtype: DType,
    /// The values in the compute dtype, on CUDA and unless that is `f32`; views of it are free.
    compute: Option<Array>,
    /// The copies of some values elsewhere, on CUDA.
    param_copies: Option<ParamCopies>,
    /// Values that follow from the copies, on CUDA.
    derived: Vec<Arc<dyn DerivedValues>>,
}

impl Params {
    /// Makes an empty set of parameters.
    pub fn none(device: &Device, dtype: DType) -> Self {
        ParamsBuilder::new(device, dtype).build()
    }

    /// Returns names, shapes and places, in order.
    pub fn infos(&self) -> &[ParamInfo] {
        &self.infos
    }

    /// Returns the dtype that views are read in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Returns the number of trainable scalars.
    pub fn numel(&self) -> usize {
        self.infos.last().map_or(0, |last| last.at.range().end)
    }

    /// Returns whether parameters are trained in place, without an f32 buffer.
    pub fn are_in_place(&self) -> bool {
        self.in_place.is_some()
    }

    /// Returns the bytes of the values, with copies in the compute dtype.
    pub fn bytes(&self) -> usize {
        let copies = self.compute.as_ref().map_or(0, |copy| copy.rows() * copy.cols() * copy.dtype().bytes());
        let in_place = self.in_place.iter().flatten().map(ParamStorage::size).sum::<usize>();
        4 * self.values.dims()[0] + copies + in_place
    }

    /// Returns the bytes of a parameter's values, without copies.
    pub fn bytes_of(&self, at: ParamRef) -> usize {
        self.storage(at).map_or(4 * at.range().len(), ParamStorage::size)
    }

    /// Returns the quantized weight of a parameter, if it is one.
    pub fn quantized(&self, at: ParamRef) -> Option<&QuantizedWeight> {
        self.storage(at)?.as_quantized()
    }

    /// Returns a parameter as a matrix in the compute dtype.
    pub fn matrix(&self, at: ParamRef) -> Tensor<2> {
        if let Some(storage) = self.storage(at) {
            return storage.matrix(self.dtype);
        }
        match (&self.values, &self.compute) {
            (Tensor::Burn(values), _) => values.clone().slice([at.range()]).reshape(at.dims()).cast(self.dtype).into(),
            (Tensor::Meta(values), _) => values.part(at.range().start, at.dims()).cast(self.dtype).into(),
            (Tensor::Cuda(values), compute) => {
                compute.as_ref().unwrap_or(values).part(at.range().start, at.dims()).into()
            }
        }
    }

    /// Copies the values of a parameter to the host.
    pub fn values(&self, at: ParamRef) -> Vec<f32> {
        self.storage(at).map_or_else(|| part(&self.values, at), ParamStorage::values)
    }

    /// Copies all values to the host, in order.
    pub fn all_values(&self) -> Vec<f32> {
        match &self.in_place {
            Some(in_place) => in_place.iter().flat_map(ParamStorage::values).collect(),
            None => to_f32(self.values.clone()),
        }
    }

    /// The bytes that stand for every parameter, bit for bit, in order: what [`restore`](Self::restore) takes.
    pub fn to_bytes(&self) -> Vec<Vec<u8>> {
        match &self.in_place {
            Some(in_place) => in_place.iter().map(ParamStorage::bytes).collect(),
            None => {
                let values = self.all_values();
                let bytes = |info: &ParamInfo| values[info.at.range()].iter().flat_map(|v| v.to_le_bytes()).collect();
                self.infos.iter().map(bytes).collect()
            }
        }
    }

    /// Puts back what [`to_bytes`](Self::to_bytes) gave; `false`, and no change, when it was of other parameters.
    pub fn restore(&mut self, bytes: &[Vec<u8>]) -> bool {
        if bytes.len() != self.infos.len() {
            return false;
        }
        if let Some(in_place) = &self.in_place {
            let mut in_place = in_place.clone();
            let fits = in_place.iter_mut().zip(bytes).all(|(storage, bytes)| storage.restore(bytes));
            if fits {
                self.in_place = Some(in_place);
            }
            return fits;
        }
        let fits = self.infos.iter().zip(bytes).all(|(info, bytes)| bytes.len() == 4 * info.at.range().len());
        if fits {
            let words = bytes.iter().flat_map(|bytes| bytes.as_chunks::<4>().0);
            self.set_all_values(words.map(|word| f32::from_le_bytes(*word)).collect());
        }
        fits
    }

    /// Replaces all values; `values` has [`numel`](Self::numel) elements.
    ///
    /// # Panics
    /// If there are more or fewer, or they are kept in place.
    pub fn set_all_values(&mut self, values: Vec<f32>) {
        let numel = self.numel();
        assert!(!self.are_in_place(), "values that are kept in place are restored from their bytes");
        assert_eq!(values.len(), numel, "one value for every parameter");
        self.values = from_f32(values, [numel], &self.values.device(), DType::F32);
        self.sync();
    }

    /// Makes zero gradients for every parameter.
    pub fn zero_grads(&self) -> Grads {
        self.zero_grads_of(core::iter::once(0..self.numel()))
    }

    /// Zero gradients for the parameters of some ranges, which the others must not be added to.
    pub fn zero_grads_of(&self, ranges: impl IntoIterator<Item = Range<usize>>) -> Grads {
        let device = self.values.device();
        Grads::zeros(ranges, &device)
    }

    fn storage(&self, at: ParamRef) -> Option<&ParamStorage> {
        self.in_place.as_ref().map(|in_place| &in_place[self.index(at)])
    }

    fn index(&self, at: ParamRef) -> usize {
        let index = self.infos.partition_point(|info| info.at.offset < at.offset);
        assert_eq!(self.infos[index].at, at, "a parameter that is kept in place is read whole");
        index
    }
}

/// A flat buffer of zeros.
pub(crate) fn zeros(numel: usize, device: &Device, usage: MemoryUse) -> Tensor<1> {
    match device {
        // Not Burn's own zeros, whose memory cannot be written in place on the CPU: the first writer would copy it.
        Device::Burn(_) => from_f32(vec![0.0; numel], [numel], device, DType::F32),
        Device::Cuda(cuda) => Array::zeros(cuda, [1, numel], crate::runtime::DType::F32, usage).into(),
        Device::Meta(device) => MetaTensor::new(device, [1, numel], DType::F32, usage).into(),
    }
}

/// Some elements of a flat buffer on the host.
pub(crate) fn part(flat: &Tensor<1>, at: ParamRef) -> Vec<f32> {
    to_f32(match flat {
        Tensor::Burn(flat) => Tensor::<1>::Burn(flat.clone().slice([at.range()])),
        Tensor::Cuda(flat) => Tensor::Cuda(flat.part(at.range().start, [1, at.range().len()])),
        Tensor::Meta(flat) => Tensor::Meta(flat.part(at.range().start, [1, at.range().len()])),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_add_up_where_they_belong() {
        let device = Device::cpu();
        let mut builder = ParamsBuilder::new(&device, DType::F32);
        let a = builder.push("a", &[2, 3], true, &[0.0; 6]);
        let b = builder.push("b", &[1, 3], true, &[1.0; 3]);
        let c = builder.push("c", &[3], false, &[2.0; 3]);
        assert_eq!(a.join(b).map(ParamRef::dims), Some([3, 3]));
        assert_eq!(a.join(c), None, "they do not touch");
        let params = builder.build();
        let mut grads = params.zero_grads();
        let dy = from_f32(vec![1.0, 2.0, 3.0, 4.0], [2, 2], &device, DType::F32);
        let x = from_f32(vec![1.0, 0.0, 1.0, 0.0, 1.0, 1.0], [2, 3], &device, DType::F32);
        grads.add_tn(a, 2.0, &dy, &x);
        grads.add_row_sum(c, &x);
        grads.add_row_sum(c, &x);
        assert_eq!(grads.all_values(), [2.0, 6.0, 8.0, 4.0, 8.0, 12.0, 0.0, 0.0, 0.0, 2.0, 2.0, 4.0]);
        assert!((grads.norm() - 352f64.sqrt()).abs() < 1e-12);
        assert_eq!(params.values(b), [1.0; 3]);
    }
}
