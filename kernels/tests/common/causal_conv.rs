//! The causal convolution over several documents.

use burn::tensor::activation::sigmoid;
use burn::tensor::{DType, Tensor as BurnTensor};
use rekindle_kernels::gated_delta::Sequences;
use rekindle_kernels::{Device, causal_conv, from_f32};

use super::{Case, Oracle, Place, Results, grad, noise, rounded, values};

pub(crate) struct CausalConv {
    cu_seqlens: Vec<u32>,
    shape: [usize; 2],
    width: usize,
    x: Vec<f32>,
    weight: Vec<f32>,
    dy: Vec<f32>,
}

impl CausalConv {
    pub(crate) fn new(lengths: &[usize], channels: usize, width: usize, dtype: DType) -> Self {
        let tokens: usize = lengths.iter().sum();
        let mut cu_seqlens = vec![0];
        cu_seqlens.extend(lengths.iter().scan(0, |end, length| {
            *end += *length as u32;
            Some(*end)
        }));
        let input = |seed, n, by: f32| rounded(noise(seed, n).iter().map(|x| x * by).collect(), dtype);
        let n = tokens * channels;
        let (x, weight, dy) = (input(1, n, 2.0), input(2, channels * width, 2.0), input(3, n, 1.0));
        Self { cu_seqlens, shape: [tokens, channels], width, x, weight, dy }
    }

    fn graph(&self, dtype: DType, conv: impl Fn(&BurnTensor<2>, &BurnTensor<2>) -> BurnTensor<2>) -> Results {
        let oracle = Oracle::new(dtype);
        let (x, weight) = (oracle.leaf(&self.x, self.shape), oracle.leaf(&self.weight, [self.shape[1], self.width]));
        let y = conv(&x, &weight);
        let grads = (y.clone() * oracle.constant(&self.dy, self.shape)).sum().backward();
        vec![("y", values(y)), ("dx", grad(&x, &grads)), ("dw", grad(&weight, &grads))]
    }

    fn plain(&self, x: &BurnTensor<2>, weight: &BurnTensor<2>) -> BurnTensor<2> {
        let [_, channels] = self.shape;
        let outs = self.cu_seqlens.windows(2).map(|w| {
            let (start, length) = (w[0] as usize, (w[1] - w[0]) as usize);
            let before = BurnTensor::zeros([self.width - 1, channels], (&x.device(), x.dtype()));
            let rows = BurnTensor::cat(vec![before, x.clone().narrow(0, start, length)], 0);
            let taps = (0..self.width).map(|i| {
                let tap = weight.clone().narrow(1, i, 1).reshape([1, channels]);
                rows.clone().narrow(0, i, length) * tap
            });
            let p = taps.reduce(|a, b| a + b).expect("a tap");
            p.clone() * sigmoid(p)
        });
        BurnTensor::cat(outs.collect(), 0)
    }

    fn sequences(&self, device: &Device) -> Sequences {
        Sequences::new(&self.cu_seqlens, device)
    }
}

impl Case for CausalConv {
    fn naive(&self, dtype: DType) -> Results {
        self.graph(dtype, |x, weight| self.plain(x, weight))
    }

    fn ours(&self, place: &Place) -> Results {
        let x = place.matrix(&self.x, self.shape);
        let weight = from_f32(self.weight.clone(), [self.shape[1], self.width], &place.device, place.dtype);
        let sequences = self.sequences(&place.device);
        let y = causal_conv::forward(&x, &weight, &sequences);
        let dy = place.matrix(&self.dy, self.shape);
        let (dx, dw) = causal_conv::backward(&dy, &x, &weight, &sequences, true);
        let (again, none) = causal_conv::backward(&dy, &x, &weight, &sequences, false);
        assert!(none.is_none(), "no gradient to a frozen weight");
        vec![
            ("y", values(y)),
            ("dx", values(dx)),
            ("dx", values(again)),
            ("dw", values(dw.expect("a gradient to the weight"))),
        ]
    }

    fn differentiated(&self) -> Option<Results> {
        let sequences = self.sequences(&Device::cpu());
        Some(self.graph(DType::F32, |x, weight| {
            causal_conv::forward(&x.clone().into(), &weight.clone().into(), &sequences).into()
        }))
    }
}

impl std::fmt::Debug for CausalConv {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ends = &self.cu_seqlens[1..];
        write!(f, "causal convolution of {} channels, width {}, documents to {ends:?}", self.shape[1], self.width)
    }
}

/// The rows of a document behind some of its rows are those of the whole document, bit for bit.
pub(crate) fn rows_continue_a_document(device: &Device, dtype: DType) {
    let case = CausalConv::new(&[20], 40, 4, dtype);
    let place = Place::new(device.clone(), dtype, super::Layout::Owned);
    let x = place.matrix(&case.x, case.shape);
    let weight = from_f32(case.weight.clone(), [40, 4], device, dtype);
    let whole = values(causal_conv::forward(&x, &weight, &case.sequences(device)));
    let zeros = place.matrix(&[0.0; 120], [3, 40]);
    assert_eq!(values(causal_conv::forward_cached(&x, &weight, &zeros)), whole);
    for split in [3, 4, 17, 19] {
        let part = |first: usize, rows| place.matrix(&case.x[first * 40..][..rows * 40], [rows, 40]);
        let y = causal_conv::forward_cached(&part(split, 20 - split), &weight, &part(split - 3, 3));
        assert_eq!(values(y), whole[split * 40..], "from token {split}");
    }
}
