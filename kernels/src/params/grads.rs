//! Gradients of the trainable parameters, `f32`.

use core::ops::Range;

use burn::tensor::{DType, Tensor as BurnTensor};

use super::{part, zeros};
use crate::runtime::{Array, MemoryUse, elementwise, reduce};
use crate::{Backend, Device, ParamRef, Tensor, host, to_f32};

/// Gradients of [`Params`](crate::Params), summed over whatever is added before the optimizer reads them.
///
/// One buffer for all of them or, where they are applied as soon as they are there, one for each range that is being
/// worked on.
#[derive(Debug)]
pub struct Grads {
    parts: Vec<GradPart>,
}

/// The gradients of some elements.
#[derive(Debug)]
struct GradPart {
    range: Range<usize>,
    /// The gradients of the parameters from [`base`](Self::base) on.
    flat: Tensor<1>,
}

impl GradPart {
    fn zeros(range: Range<usize>, device: &Device) -> Self {
        let flat = zeros(range.end - range.start / 4 * 4, device, MemoryUse::Gradients);
        Self { range, flat }
    }

    /// The element that the buffer begins with: as far from 16 bytes as among all elements.
    fn base(&self) -> usize {
        self.range.start / 4 * 4
    }

    fn holds(&self, range: &Range<usize>) -> bool {
        self.range.start <= range.start && range.end <= self.range.end
    }
}

impl Grads {
    /// Zeros for some ranges of elements.
    pub(crate) fn zeros(ranges: impl IntoIterator<Item = Range<usize>>, device: &Device) -> Self {
        Self { parts: ranges.into_iter().map(|range| GradPart::zeros(range, device)).collect() }
    }

    /// Zeros for one matrix that belongs to no [`Params`](crate::Params), and its place.
    pub fn of_matrix([rows, cols]: [usize; 2], device: &Device) -> (Self, ParamRef) {
        let at = ParamRef { offset: 0, rows, cols };
        (Self::zeros([at.range()], device), at)
    }

    /// Returns a gradient as a matrix, sharing memory.
    pub fn matrix(&self, at: ParamRef) -> Tensor<2> {
        match self.of(at.range()) {
            Tensor::Burn(flat) => Tensor::Burn(flat.reshape(at.dims())),
            Tensor::Cuda(_) => self.array(at).into(),
            Tensor::Meta(flat) => flat.reshaped(at.dims()).into(),
        }
    }

    /// Adds a gradient.
    pub fn add(&mut self, at: ParamRef, grad: Tensor<2>) {
        assert_eq!(grad.dims(), at.dims(), "gradient and parameter shapes");
        match grad {
            Tensor::Meta(grad) => drop(grad.contiguous()),
            Tensor::Burn(grad) if Backend::of_burn(&grad) == Backend::Cpu => {
                let (flat, here) = self.part_mut(at);
                let flat = flat.burn_mut();
                let grad = host::View::of(&grad);
                host::with_mut(flat, |flat| {
                    flat[here.range()].iter_mut().zip(grad.as_slice()).for_each(|(sum, grad)| *sum += grad);
                });
            }
            Tensor::Burn(grad) => self.update(at, |old| old + grad.cast(DType::F32)),
            Tensor::Cuda(grad) => {
                let grad = elementwise::cast(&grad, crate::runtime::DType::F32, MemoryUse::Gradients).contiguous();
                elementwise::accumulate(&self.array(at).flattened(), &grad.flattened());
            }
        }
    }

    /// Adds the sum over the rows of `dy`, the gradient of a bias.
    pub fn add_row_sum(&mut self, at: ParamRef, dy: &Tensor<2>) {
        match dy {
            Tensor::Burn(dy) => self.add(at, dy.clone().cast(DType::F32).sum_dim(0).into()),
            Tensor::Cuda(dy) => reduce::add_column_sums(dy, &self.array(at)),
            Tensor::Meta(dy) => self.add(at, dy.clone().cast(DType::F32).f32_sized([1, at.dims()[1]]).into()),
        }
    }

    /// Copies a gradient to the host.
    pub fn values(&self, at: ParamRef) -> Vec<f32> {
        let (flat, here) = self.part(at);
        part(flat, here)
    }

    /// Copies all gradients to the host, in the order of the parameters.
    pub fn all_values(&self) -> Vec<f32> {
        self.parts.iter().flat_map(|part| to_f32(self.of(part.range.clone()))).collect()
    }

    /// Gives all gradients to `f`, in the order of the parameters. Returns `None` without a call where they are not in one
    /// buffer of [`Backend::Cpu`].
    pub fn with_values_mut<R>(&mut self, f: impl FnOnce(&mut [f32]) -> R) -> Option<R> {
        match &mut self.parts[..] {
            [GradPart { flat: Tensor::Burn(flat), .. }] if Backend::of_burn(flat) == Backend::Cpu => {
                Some(host::with_mut(flat, f))
            }
            _ => None,
        }
    }

    /// Returns all gradients, in the order of the parameters, where they are in one buffer on a CUDA device.
    pub fn cuda_values(&self) -> Option<&Array> {
        match &self.parts[..] {
            [GradPart { flat: Tensor::Cuda(flat), .. }] => Some(flat),
            _ => None,
        }
    }

    /// Returns the ranges that there are gradients of.
    pub fn ranges(&self) -> Vec<Range<usize>> {
        self.parts.iter().map(|part| part.range.clone()).collect()
    }

    /// All buffers.
    pub(crate) fn flats(&self) -> impl ExactSizeIterator<Item = &Tensor<1>> {
        self.parts.iter().map(|part| &part.flat)
    }

    /// The only buffer.
    pub(crate) fn flat(&self) -> &Tensor<1> {
        let [part] = &self.parts[..] else { panic!("gradients of {} ranges have no one buffer", self.parts.len()) };
        &part.flat
    }

    /// The gradients of some elements that lie in one buffer.
    pub(crate) fn of(&self, range: Range<usize>) -> Tensor<1> {
        let part = self.parts.iter().find(|part| part.holds(&range)).expect("one buffer holds the whole range");
        let local = range.start - part.base()..range.end - part.base();
        match &part.flat {
            whole if local.len() == whole.dims()[0] => whole.clone(),
            Tensor::Cuda(flat) => flat.part(local.start, [1, local.len()]).into(),
            Tensor::Meta(flat) => flat.part(local.start, [1, local.len()]).into(),
            Tensor::Burn(flat) => Tensor::Burn(flat.clone().slice([local])),
        }
    }

    /// The place of a gradient on a CUDA device.
    pub(crate) fn array(&self, at: ParamRef) -> Array {
        let (flat, here) = self.part(at);
        flat.cuda().part(here.range().start, at.dims())
    }

    /// Replaces the gradients of one of [`ranges`](Self::ranges) by zeros for another range, in the same memory where
    /// that is long enough.
    pub fn begin(&mut self, index: usize, range: Range<usize>) {
        let part = &mut self.parts[index];
        let device = part.flat.device();
        // The old ones go first.
        *part = GradPart::zeros(0..0, &device);
        *part = GradPart::zeros(range, &device);
    }

    /// The buffer with a parameter's gradient, and where in it that lies.
    fn part(&self, at: ParamRef) -> (&Tensor<1>, ParamRef) {
        let part = &self.parts[self.holder(at)];
        (&part.flat, at.from(part.base()))
    }

    pub(crate) fn part_mut(&mut self, at: ParamRef) -> (&mut Tensor<1>, ParamRef) {
        let index = self.holder(at);
        let part = &mut self.parts[index];
        let here = at.from(part.base());
        (&mut part.flat, here)
    }

    fn holder(&self, at: ParamRef) -> usize {
        let holder = self.parts.iter().position(|part| part.holds(&at.range()));
        holder.expect("gradients are added to ranges that are being worked on")
    }

    pub(crate) fn update(&mut self, at: ParamRef, f: impl FnOnce(BurnTensor<2>) -> BurnTensor<2>) {
        let (flat, at) = self.part_mut(at);
        let flat = flat.burn_mut();
        let old = flat.clone().slice([at.range()]).reshape(at.dims());
        let new = f(old).reshape([at.range().len()]);
        flat.inplace(|flat| flat.slice_assign([at.range()], new));
    }
}
