//! Properties that hold for any values on any device.

use burn::tensor::DType;
use rekindle_kernels::attention::AttentionGrads;
use rekindle_kernels::dropout::{self, Dropout, Token, Tokens};
use rekindle_kernels::neftune::{self, Noise};
use rekindle_kernels::optimizer::{self, Clip, OptimizerState, StateFormat, UpdateRule, UpdateStep};
use rekindle_kernels::quantized::{Absmax, QuantizedData, QuantizedFormat};
use rekindle_kernels::{Device, Group, Params, ParamsBuilder, QuantizedWeight, RngKey, from_f32, to_f32};

use super::attention::Attention;
use super::{Case, F32_FLOOR, LOW_DTYPES, Place, noise, values};

/// Changing one document changes no bit of another.
pub(crate) fn documents_do_not_reach_their_neighbours(place: impl Fn() -> Place, head_dim: usize) {
    let dtype = place().dtype;
    let before = Attention::new(&[40, 131, 1, 30], 4, 2, head_dim, dtype);
    let mut after = Attention::new(&[40, 131, 1, 30], 4, 2, head_dim, dtype);
    let changed = 40..171;
    let (wide, narrow) = before.shapes();
    for (values, width) in
        [(&mut after.q, wide[1]), (&mut after.k, narrow[1]), (&mut after.v, narrow[1]), (&mut after.d_o, wide[1])]
    {
        for value in &mut values[changed.start * width..changed.end * width] {
            *value = 1.0 - 3.0 * *value;
        }
    }
    let results = |case: &Attention| {
        let (saved, AttentionGrads { q: dq, k: dk, v: dv, .. }) = case.run(&place());
        let by_heads = to_f32(saved.lse);
        let lse = (0..by_heads.len()).map(|i| by_heads[i % 4 * case.tokens() + i / 4]).collect();
        let by_tokens = [saved.o, dq, dk, dv].map(|t| (t.dims()[1], to_f32(t)));
        by_tokens.into_iter().chain([(4, lse)])
    };
    // Numbers of 16 bits may be the same by chance, and the gradient to the only key of a query is zero.
    let same = if dtype == DType::F32 { 100 } else { 20 };
    for ((width, before), (_, after)) in results(&before).zip(results(&after)) {
        let (inside, outside): (Vec<usize>, Vec<usize>) =
            (0..before.len()).partition(|i| changed.contains(&(i / width)));
        assert!(outside.iter().all(|&i| before[i].to_bits() == after[i].to_bits()), "a neighbour changed");
        assert!(inside.iter().filter(|&&i| before[i] == after[i]).count() < inside.len() / same, "too few changed");
    }
}

/// Keys and values of later tokens do not change earlier results.
pub(crate) fn later_tokens_do_not_reach_earlier_ones(place: impl Fn() -> Place, head_dim: usize) {
    let dtype = place().dtype;
    let whole = Attention::new(&[200], 2, 1, head_dim, dtype);
    let mut cut = Attention::new(&[200], 2, 1, head_dim, dtype);
    let (wide, narrow) = whole.shapes();
    // Keys and values from token 150 on are others; the queries before that may not notice.
    cut.k[150 * narrow[1]..].fill(0.5);
    cut.v[150 * narrow[1]..].fill(-0.5);
    let o = |case: &Attention| to_f32(case.run(&place()).0.o);
    let (whole, cut) = (o(&whole), o(&cut));
    assert_eq!(whole[..150 * wide[1]], cut[..150 * wide[1]]);
    assert_ne!(whole[150 * wide[1]..], cut[150 * wide[1]..]);
}

/// Borders that coincide are no documents.
pub(crate) fn documents_without_tokens_change_nothing(place: impl Fn() -> Place, head_dim: usize) {
    let dtype = place().dtype;
    let plain = Attention::new(&[3, 2], 2, 1, head_dim, dtype).ours(&place());
    assert_eq!(Attention::new(&[0, 3, 0, 0, 2, 0], 2, 1, head_dim, dtype).ours(&place()), plain);
}

/// A token that is alone sees itself: o = v and dv = Σ dO over the heads that share v, whatever q and k are.
pub(crate) fn lonely_tokens_see_themselves(place: impl Fn() -> Place, head_dim: usize) {
    let place = place();
    let case = Attention::new(&[1; 37], 4, 2, head_dim, place.dtype);
    let low = LOW_DTYPES.into_iter().find(|(dtype, _)| *dtype == place.dtype);
    let (wide, narrow) = case.shapes();
    // The key/value head's channel that a query head's channel reads.
    let shared = |i: usize| {
        let (token, head, channel) = (i / wide[1], i % wide[1] / head_dim, i % head_dim);
        token * narrow[1] + head / 2 * head_dim + channel
    };
    let (saved, AttentionGrads { q: dq, k: dk, v: dv, .. }) = case.run(&place);
    for (i, o) in to_f32(saved.o).into_iter().enumerate() {
        let v = case.v[shared(i)];
        // A probability off 1 by roundings of f32 is lost in 16 bits.
        let bound = if low.is_some() { 0.0 } else { F32_FLOOR as f32 * v.abs() };
        assert!((o - v).abs() <= bound, "o[{i}] is {o}, not {v}");
    }
    let mut sums = vec![0.0; case.v.len()];
    for (i, &d_o) in case.d_o.iter().enumerate() {
        sums[shared(i)] += f64::from(d_o);
    }
    for (i, (dv, sum)) in values(dv).into_iter().zip(sums).enumerate() {
        // One rounding of a number below 2.
        let bound = 2.0 * low.map_or(F32_FLOOR, |(_, rounding)| rounding);
        assert!((dv - sum).abs() <= bound, "dv[{i}] is {dv}, not {sum}");
    }
    // dS is the difference of two equal dot products of numbers below 1, each off by head_dim roundings of at most
    // head_dim; it is multiplied with numbers below 4, for two heads.
    let bound = case.heads.scale * 4.0 * 2.0 * 2.0 * (head_dim * head_dim) as f32 * f32::EPSILON;
    for gradient in to_f32(dq).into_iter().chain(to_f32(dk)) {
        assert!(gradient.abs() <= bound, "a gradient of {gradient}, and at most {bound} is rounding");
    }
}

/// The mask is the one that the CPU makes, in every dtype.
pub(crate) fn dropout_masks_are_the_same_everywhere(device: &Device, dtype: DType) {
    let tokens: Vec<Token> = (0..67).map(|t| Token { row: t / 20, position: t % 20 }).collect();
    for (width, p) in [(1, 0.5), (29, 0.375), (128, 0.1), (1030, 0.05)] {
        let shape = [tokens.len(), width];
        let mask = |device: &Device| {
            let tokens = Tokens::new(tokens.clone(), device);
            let key = RngKey { seed: 0x0123_4567_89AB_CDEF, step: 3 };
            let dropout = Dropout { p, key, tokens: &tokens };
            to_f32(dropout::apply(&from_f32(vec![1.0; shape[0] * width], shape, device, dtype), dropout, 5))
        };
        let bits = |mask: Vec<f32>| mask.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(mask(device)), bits(mask(&Device::cpu())), "{width} channels, p {p}");
    }
}

/// The noise of NEFTune is keyed so too.
pub(crate) fn noise_is_the_same_everywhere(device: &Device, dtype: DType) {
    let tokens: Vec<Token> = (0..67).map(|t| Token { row: t / 20, position: t % 20 }).collect();
    let lengths: Vec<u32> = (0..67).map(|t| if t < 60 { 20 } else { 7 }).collect();
    for width in [1, 29, 128, 1030] {
        let shape = [tokens.len(), width];
        let noisy = |device: &Device| {
            let tokens = Tokens::new(tokens.clone(), device);
            let x = from_f32(noise(9, shape[0] * width), shape, device, dtype);
            let key = RngKey { seed: 0x0123_4567_89AB_CDEF, step: 3 };
            let noise = Noise { alpha: 5.0, key, tokens: &tokens, lengths: &lengths };
            to_f32(neftune::apply(x, noise))
        };
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(noisy(device)), bits(noisy(&Device::cpu())), "{width} channels");
    }
}

/// A step whose gradients are not finite does nothing, and says so; the next one goes on as if it had not been.
pub(crate) fn gradients_that_are_not_finite_change_nothing(device: &Device) {
    let numel = 5000;
    let rule = UpdateRule::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 };
    let trained = |bad: Option<f32>| -> (Vec<f32>, f64) {
        let mut builder = ParamsBuilder::new(device, DType::F32);
        builder.push("a", &[numel - 7], true, &noise(1, numel - 7));
        builder.push("b", &[7], false, &noise(2, 7));
        let mut params = builder.build();
        let mut state = OptimizerState::new(params.infos(), device, rule, StateFormat::F32);
        let clipped = |params: &mut Params, state: &mut OptimizerState, values: &[f32], t: u64| {
            let mut grads = params.zero_grads();
            for info in params.infos() {
                grads.add(info.at, from_f32(values[info.at.range()].to_vec(), info.at.dims(), device, DType::F32));
            }
            let clip = Clip::of(&grads, 0.5, 1.0);
            let step = UpdateStep { t, rates: 1e-2.into(), weight_decay: 0.1 };
            optimizer::apply(params, &grads, state, &step, &clip);
            clip.norm()
        };
        let good = noise(3, numel);
        let norm = clipped(&mut params, &mut state, &good, 1);
        if let Some(bad) = bad {
            let before = params.all_values();
            let norm = clipped(&mut params, &mut state, &[&good[..numel - 1], &[bad]].concat(), 2);
            assert!(!norm.is_finite(), "the norm of gradients with a {bad} is {norm}");
            assert_eq!(params.all_values(), before, "gradients with a {bad} changed parameters");
        }
        clipped(&mut params, &mut state, &noise(4, numel), 2);
        (params.all_values(), norm)
    };
    let (expected, norm) = trained(None);
    let truth = 0.5 * noise(3, numel).iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
    let naive = f64::from(0.5 * noise(3, numel).iter().map(|g| g * g).sum::<f32>().sqrt());
    let bound = 2.0 * (naive - truth).abs() + F32_FLOOR * truth;
    assert!((norm - truth).abs() <= bound, "a norm of {norm}, not {truth}");
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert_eq!(trained(Some(bad)).0, expected, "moments remember a {bad}");
    }
}

/// Parameters that are kept in bf16, in 8-bit and in 4-bit codes end in the CPU's bits, from the same gradients.
pub(crate) fn values_in_place_are_those_of_the_cpu(device: &Device) {
    let (dims, blocksize) = ([40, 96], 64);
    let n = dims[0] * dims[1];
    let rule = UpdateRule::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 };
    let trained = |device: &Device| -> Vec<Vec<u8>> {
        let mut builder = ParamsBuilder::in_place(device, DType::F32);
        let bits = noise(1, n).into_iter().flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect::<Vec<_>>();
        builder.push_bf16(Group::Embedding, "bf16", &dims, &bits);
        let bytes = |seed| noise(seed, n).into_iter().map(|x| (x * 127.0) as i8).collect::<Vec<_>>();
        let codes = |format| QuantizedWeight::new(QuantizedData { dims, format }, device);
        let int8 = QuantizedFormat::Int8 { codes: bytes(2), scales: noise(3, dims[0]), factor: 1.0 / 127.0 };
        builder.push_quantized("int8", codes(int8));
        let mut table: [f32; 16] = noise(4, 16).try_into().expect("16 values");
        (table[3], table[9]) = (-1.0, 1.0);
        builder.push_quantized(
            "four bits",
            codes(QuantizedFormat::FourBit {
                codes: bytes(5)[..n / 2].iter().map(|code| code.cast_unsigned()).collect(),
                table,
                blocksize,
                absmax: Absmax::Single(noise(6, n / blocksize).into_iter().map(f32::abs).collect()),
            }),
        );
        builder.push("vector", &[104], false, &noise(7, 104));
        let mut params = builder.build();
        params.set_rounding_seed(3407);
        let mut state = OptimizerState::new(params.infos(), device, rule, StateFormat::F32);
        for t in 1..5 {
            let mut grads = params.zero_grads();
            for (i, info) in params.infos().iter().enumerate() {
                let values = noise(10 * t + i as u64, info.at.range().len());
                grads.add(info.at, from_f32(values, info.at.dims(), device, DType::F32));
            }
            let step = UpdateStep { t, rates: 1e-2.into(), weight_decay: 0.1 };
            optimizer::clipped_step(&mut params, &grads, &mut state, &step, 0.0);
        }
        params.to_bytes()
    };
    for (i, (got, want)) in trained(device).iter().zip(&trained(&Device::cpu())).enumerate() {
        assert!(
            got == want,
            "parameter {i}: {} of {} bytes differ",
            got.iter().zip(want).filter(|(a, b)| a != b).count(),
            want.len()
        );
    }
}

/// Two runs of a case give the same bits.
pub(crate) fn the_same_input_gives_the_same_bits(case: &(impl Case + ?Sized), place: impl Fn() -> Place) {
    assert_eq!(case.ours(&place()), case.ours(&place()));
}
