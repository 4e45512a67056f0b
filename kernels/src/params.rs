//! Trainable parameters: a flat `f32` buffer with named views.
//!
//! One buffer for all values and one for all gradients ([`Grads`]) make the optimizer, the global norm and (later)
//! the reduction over ranks one pass each. Layers keep [`ParamRef`]s, not tensors: a view is made where
//! it is read and gone before the optimizer writes, so that the write happens in place.
//!
//! Parameters *in place* have no f32 buffer: each lies in a slot of its own, in bf16 or in codes, as it computes, and
//! changes are rounded into it stochastically ([`stochastic`](crate::stochastic)). A [`ParamRef`] is then a place in the
//! gradients alone.

use core::ops::Range;

use burn::tensor::DType;

use crate::cuda::{Array, ops};
use crate::slot::Slot;
use crate::stochastic::Draw;
use crate::tensor::cuda_dtype;
use crate::{Device, Grads, PackedWeight, Tensor, from_f32, to_f32};

/// Where a parameter lies: a row-major matrix in the flat buffers. Vectors have one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParamRef {
    offset: usize,
    rows: usize,
    cols: usize,
}

impl ParamRef {
    /// Rows and columns.
    pub fn dims(self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// The elements in the flat buffers.
    pub fn range(self) -> Range<usize> {
        self.offset..self.offset + self.rows * self.cols
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
    /// Where it lies.
    pub at: ParamRef,
    /// Whether weight decay applies.
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

/// Collects parameters before the flat buffer is made.
#[derive(Debug)]
pub struct ParamsBuilder {
    device: Device,
    dtype: DType,
    infos: Vec<ParamInfo>,
    /// None on a planned device, where they do not matter.
    values: Vec<f32>,
    numel: usize,
    mirrors: Vec<ops::mirror::Mirror>,
    /// Instead of `values`.
    slots: Option<Vec<Slot>>,
}

impl ParamsBuilder {
    /// For parameters on `device`, whose views are read in `dtype`.
    pub fn new(device: &Device, dtype: DType) -> Self {
        let (infos, values, mirrors) = Default::default();
        Self { device: device.clone(), dtype, infos, values, numel: 0, mirrors, slots: None }
    }

    /// For parameters that are kept in place, without an f32 buffer.
    pub fn in_place(device: &Device, dtype: DType) -> Self {
        Self { slots: Some(Vec::new()), ..Self::new(device, dtype) }
    }

    /// The dtype that views are read in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Appends a parameter of one or two axes to [`Group::Default`].
    ///
    /// # Panics
    /// When `values` do not fill `shape`.
    pub fn push(&mut self, name: impl Into<String>, shape: &[usize], decays: bool, values: &[f32]) -> ParamRef {
        self.push_in(Group::Default, name, shape, decays, values)
    }

    /// Appends a parameter of one or two axes to a group.
    ///
    /// # Panics
    /// When `values` do not fill `shape`.
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
        match &mut self.slots {
            Some(slots) => slots.push(Slot::f32(values, at.dims(), &self.device)),
            None if self.device.is_planned() => {}
            None => self.values.extend_from_slice(values),
        }
        at
    }

    /// Appends a matrix that is kept in bf16, given as its bits in little-endian order.
    ///
    /// # Panics
    /// When `bytes` do not fill `shape`, or parameters are not kept in place.
    pub fn push_bf16(&mut self, group: Group, name: impl Into<String>, shape: &[usize], bytes: &[u8]) -> ParamRef {
        let at = self.describe(group, name, shape, true);
        assert_eq!(bytes.len(), 2 * at.range().len(), "bytes of shape {shape:?}");
        let slot = Slot::bf16(bytes, at.dims(), &self.device);
        self.slots.as_mut().expect("parameters are kept in place").push(slot);
        at
    }

    /// Appends a matrix that is kept in codes.
    ///
    /// # Panics
    /// When the codes cannot be trained, or parameters are not kept in place.
    pub fn push_packed(&mut self, name: impl Into<String>, weight: PackedWeight) -> ParamRef {
        assert!(weight.can_be_trained(), "codes whose scales are in codes do not change");
        let at = self.describe(Group::Default, name, &weight.dims(), true);
        let slot = Slot::packed(weight, &self.device);
        self.slots.as_mut().expect("parameters are kept in place").push(slot);
        at
    }

    fn describe(&mut self, group: Group, name: impl Into<String>, shape: &[usize], decays: bool) -> ParamRef {
        let (rows, cols) = match *shape {
            [n] => (1, n),
            [rows, cols] => (rows, cols),
            _ => panic!("a parameter has one or two axes, not {shape:?}"),
        };
        let at = ParamRef { offset: self.numel, rows, cols };
        self.numel += at.range().len();
        self.infos.push(ParamInfo { name: name.into(), shape: shape.to_vec(), at, decays, group });
        at
    }

    /// Whether nothing was pushed.
    pub fn is_empty(&self) -> bool {
        self.infos.is_empty()
    }

    /// Keeps `scale` times a parameter in `target` too, on a CUDA device.
    pub(crate) fn mirror(&mut self, at: ParamRef, scale: f32, target: &Array) {
        self.mirrors.push(ops::mirror::Mirror { first: at.offset, scale, target: target.clone() });
    }

    /// Moves everything to the device.
    pub fn build(self) -> Params {
        let Self { device, dtype, infos, mut values, numel, mirrors, slots } = self;
        let numel = if slots.is_some() { 0 } else { numel };
        values.shrink_to_fit();
        let values = match &device {
            Device::Cuda(cuda) if cuda.is_planned() => {
                Array::unfilled(cuda, [1, numel], crate::cuda::DType::F32, PARAMETERS).into()
            }
            Device::Cuda(cuda) => {
                Array::from_f32(cuda, &values, [1, numel], crate::cuda::DType::F32, PARAMETERS).into()
            }
            Device::Burn(_) => from_f32(values, [numel], &device, DType::F32),
        };
        let mirrors = match &device {
            Device::Cuda(cuda) if !mirrors.is_empty() => Some(ops::mirror::Mirrors::new(cuda, mirrors)),
            _ => None,
        };
        let mut params = Params { infos, values, slots, seed: 0, dtype, compute: None, mirrors };
        params.refresh();
        params
    }
}

/// The trainable parameters of a model, `f32` or kept in place.
#[derive(Clone, Debug)]
pub struct Params {
    infos: Vec<ParamInfo>,
    /// Empty where there are slots.
    values: Tensor<1>,
    /// One for each of `infos`, where parameters are kept in place.
    slots: Option<Vec<Slot>>,
    /// Of what is rounded stochastically.
    seed: u64,
    dtype: DType,
    /// On CUDA, the values in the compute dtype where that is not `f32`: views of it cost nothing.
    compute: Option<Array>,
    /// On CUDA, where else some of them are kept.
    mirrors: Option<ops::mirror::Mirrors>,
}

impl Params {
    /// No parameters.
    pub fn none(device: &Device, dtype: DType) -> Self {
        ParamsBuilder::new(device, dtype).build()
    }

    /// Names, shapes and places, in order.
    pub fn infos(&self) -> &[ParamInfo] {
        &self.infos
    }

    /// The dtype that views are read in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of trainable scalars.
    pub fn numel(&self) -> usize {
        self.infos.last().map_or(0, |last| last.at.range().end)
    }

    /// Whether values lie in slots of their own, without an f32 buffer.
    pub fn are_in_place(&self) -> bool {
        self.slots.is_some()
    }

    /// Bytes that the values take, copies in the compute dtype included.
    pub fn bytes(&self) -> usize {
        let copies = self.compute.as_ref().map_or(0, |copy| copy.rows() * copy.cols() * copy.dtype().bytes());
        let slots = self.slots.iter().flatten().map(Slot::size).sum::<usize>();
        4 * self.values.dims()[0] + copies + slots
    }

    /// Bytes that the values of a parameter take, copies not included.
    pub fn bytes_of(&self, at: ParamRef) -> usize {
        self.slot(at).map_or(4 * at.range().len(), Slot::size)
    }

    /// The codes of a parameter, if it is kept so.
    pub fn codes(&self, at: ParamRef) -> Option<&PackedWeight> {
        self.slot(at)?.codes()
    }

    /// A parameter as a matrix in the compute dtype.
    pub fn matrix(&self, at: ParamRef) -> Tensor<2> {
        if let Some(slot) = self.slot(at) {
            return slot.matrix(self.dtype);
        }
        match (&self.values, &self.compute) {
            (Tensor::Burn(values), _) => values.clone().slice([at.range()]).reshape(at.dims()).cast(self.dtype).into(),
            (Tensor::Cuda(values), compute) => {
                compute.as_ref().unwrap_or(values).part(at.range().start, at.dims()).into()
            }
        }
    }

    /// The values of a parameter on the host.
    pub fn values(&self, at: ParamRef) -> Vec<f32> {
        self.slot(at).map_or_else(|| part(&self.values, at), Slot::values)
    }

    /// All values on the host, in order.
    pub fn all_values(&self) -> Vec<f32> {
        match &self.slots {
            Some(slots) => slots.iter().flat_map(Slot::values).collect(),
            None => to_f32(self.values.clone()),
        }
    }

    /// The bytes that stand for every parameter, bit for bit, in order: what [`restore`](Self::restore) takes.
    pub fn to_bytes(&self) -> Vec<Vec<u8>> {
        match &self.slots {
            Some(slots) => slots.iter().map(Slot::bytes).collect(),
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
        if let Some(slots) = &self.slots {
            let mut slots = slots.clone();
            let fits = slots.iter_mut().zip(bytes).all(|(slot, bytes)| slot.restore(bytes));
            if fits {
                self.slots = Some(slots);
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
    /// When there are more or fewer, or they are kept in place.
    pub fn set_all_values(&mut self, values: Vec<f32>) {
        let numel = self.numel();
        assert!(!self.are_in_place(), "values that are kept in place are restored from their bytes");
        assert_eq!(values.len(), numel, "one value for every parameter");
        self.values = from_f32(values, [numel], &self.values.device(), DType::F32);
        self.refresh();
    }

    /// Zero gradients for every parameter.
    pub fn zero_grads(&self) -> Grads {
        self.zero_grads_of(core::iter::once(0..self.numel()))
    }

    /// Zero gradients for the parameters of some ranges, which the others must not be added to.
    pub fn zero_grads_of(&self, ranges: impl IntoIterator<Item = Range<usize>>) -> Grads {
        let device = self.values.device();
        Grads::zeros(ranges, &device)
    }

    fn slot(&self, at: ParamRef) -> Option<&Slot> {
        self.slots.as_ref().map(|slots| &slots[self.index(at)])
    }

    fn index(&self, at: ParamRef) -> usize {
        let index = self.infos.partition_point(|info| info.at.offset < at.offset);
        assert_eq!(self.infos[index].at, at, "a parameter that is kept in place is read whole");
        index
    }

    /// The seed of what is rounded stochastically, where values lie in place. 0 until this is called.
    pub fn set_rounding_seed(&mut self, seed: u64) {
        self.seed = seed;
    }

    /// Gives the values of the parameters in `range` to `f`, in f32 and in one or more pieces, each with the elements that
    /// it holds, and keeps what `f` leaves there. Values in place are rounded with the random numbers of `step`.
    pub(crate) fn change(&mut self, range: Range<usize>, step: u32, mut f: impl FnMut(Range<usize>, &mut Tensor<1>)) {
        let seed = self.seed;
        if let Some(slots) = &mut self.slots {
            let first = self.infos.partition_point(|info| info.at.offset < range.start);
            let inside = self.infos.iter().zip(slots).enumerate().skip(first);
            for (site, (info, slot)) in inside.take_while(|(_, (info, _))| info.at.offset < range.end) {
                let mut values = slot.flat();
                f(info.at.range(), &mut values);
                slot.store(values, Draw { seed, step, site: site as u32 });
            }
            return;
        }
        if range.len() == self.numel() {
            f(range, &mut self.values);
            return self.refresh();
        }
        match &mut self.values {
            Tensor::Cuda(all) => f(range.clone(), &mut all.part(range.start, [1, range.len()]).into()),
            Tensor::Burn(all) => {
                let mut values = Tensor::Burn(all.clone().slice([range.clone()]));
                f(range.clone(), &mut values);
                all.inplace(|all| all.slice_assign([range.clone()], values.into_burn()));
            }
        }
        self.refresh_part(range);
    }

    /// [`refresh`](Self::refresh) for some of the values, where they have no mirrors.
    fn refresh_part(&mut self, range: Range<usize>) {
        match (&self.values, &self.compute, &self.mirrors) {
            (Tensor::Cuda(values), Some(compute), None) => {
                let part = |all: &Array| all.part(range.start, [1, range.len()]);
                ops::elementwise::copy_into(&part(values), &part(compute));
            }
            _ => self.refresh(),
        }
    }

    /// Brings the copies of the values up to date.
    pub(crate) fn refresh(&mut self) {
        let Tensor::Cuda(values) = &self.values else { return };
        if self.dtype != DType::F32 {
            match &self.compute {
                Some(compute) => ops::elementwise::copy_into(values, compute),
                None => {
                    let dtype = cuda_dtype(self.dtype);
                    self.compute = Some(ops::elementwise::cast(values, dtype, PARAMETERS));
                }
            }
        }
        if let Some(mirrors) = &self.mirrors {
            mirrors.refresh(values);
        }
    }
}

/// The label of parameters in the account of memory.
const PARAMETERS: &str = "parameters";

/// A flat buffer of zeros; `label` names its use in reports of a CUDA device's memory.
pub(crate) fn zeros(numel: usize, device: &Device, label: &'static str) -> Tensor<1> {
    match device {
        // Not Burn's own zeros, whose memory cannot be written in place on the CPU: the first writer would copy it.
        Device::Burn(_) => from_f32(vec![0.0; numel], [numel], device, DType::F32),
        Device::Cuda(cuda) => Array::zeros(cuda, [1, numel], crate::cuda::DType::F32, label).into(),
    }
}

/// Some elements of a flat buffer on the host.
pub(crate) fn part(flat: &Tensor<1>, at: ParamRef) -> Vec<f32> {
    to_f32(match flat {
        Tensor::Burn(flat) => Tensor::<1>::Burn(flat.clone().slice([at.range()])),
        Tensor::Cuda(flat) => Tensor::Cuda(flat.part(at.range().start, [1, at.range().len()])),
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
