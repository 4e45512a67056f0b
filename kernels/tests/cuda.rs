//! The CUDA path on the first GPU, forward and backward, in f32, bf16 and f16, against the same truth as the CPU's, and
//! what holds whatever the numbers are.
//!
//! A program of its own: it runs on a machine without Rust (`cargo xtask gpu-bundle`), and without a GPU it says so
//! instead of passing. `REKINDLE_REQUIRE_CUDA=1` makes that a failure. An argument runs only what has it in its name.

#[path = "cuda/attention.rs"]
mod attention;
mod common;
#[path = "cuda/experts.rs"]
mod decoded_experts;
#[path = "cuda/suite.rs"]
mod suite;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use burn::tensor::DType;
use common::attention::Attention;
use common::causal_conv::{self, CausalConv};
use common::center::Center;
use common::embedding::Embedding;
use common::experts::{Activation, Clamped, Probabilities, Router};
use common::fp8::Fp8Stack;
use common::gated_activation::{ACTIVATIONS, GatedActivation};
use common::gated_delta::{self, GatedDelta};
use common::gated_norm::GatedNorm;
use common::grouped::Grouped;
use common::linear::Linear;
use common::linear_cross_entropy::LinearCrossEntropy;
use common::optimizer::{By, RULES, Steps, some_steps};
use common::output_gate::OutputGate;
use common::quantized::{Kind, Packed};
use common::rms_norm::{AddedNorm, Form, RmsNorm};
use common::rope::Rope;
use common::stacked::Stack;
use common::{Case, Layout, Place, properties};
use rekindle_kernels::Device;
use rekindle_kernels::fp8::Fp8Products;
use rekindle_kernels::optimizer::StateFormat;
use rekindle_kernels::quantized::Fp8Scaling;
use rekindle_kernels::routing::RoutingForm;
use rekindle_kernels::runtime::Cuda;
use suite::{FLOOR, Lost, Suite};

const F32: DType = DType::F32;

fn main() -> ExitCode {
    let cuda = match Cuda::open(0) {
        Ok(cuda) => cuda,
        Err(reason) => {
            println!("not run: {reason}");
            let required = std::env::var_os("REKINDLE_REQUIRE_CUDA").is_some_and(|value| value == "1");
            return if required { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    println!("on {}", cuda.props());
    // What a test has to say is printed in its line.
    std::panic::set_hook(Box::new(|_| ()));
    let filter = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).unwrap_or_default();
    let mut suite = Suite { device: Device::Cuda(cuda.clone()), cuda, filter, passed: 0, failed: 0, skipped: 0 };
    let began = Instant::now();
    let ran = run(&mut suite);
    let Suite { passed, failed, skipped, .. } = suite;
    println!("{passed} passed, {failed} failed, {skipped} filtered out, {:.0} s", began.elapsed().as_secs_f64());
    if ran.is_ok() && failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Every test; ends early when the device is lost.
fn run(suite: &mut Suite) -> Result<(), Lost> {
    // Products begin with scratch memory that stays. Whether they are right is asked below.
    let _ = catch_unwind(AssertUnwindSafe(|| Linear::new([3, 5, 7], F32).ours(&owned(&suite.device, F32))));
    suite.cuda.take_error();
    let before = suite.cuda.memory();

    operations(suite)?;
    experts(suite)?;
    attention::attentions(suite)?;
    attention::paged_attentions(suite)?;
    gated_deltas(suite)?;
    losses(suite)?;
    optimizer(suite)?;
    suite.cuda.set_deterministic(true);
    determinism(suite)?;
    let cuda = suite.cuda.clone();
    suite.property("memory comes back", |_| {
        let after = cuda.memory();
        assert_eq!((after.in_use, after.by_use), (before.in_use, before.by_use), "everything was dropped");
    })
}

/// Tiles that end in the middle, sums of less than a stage and of several, ranks that take one stage and two, and a row of
/// each number of vectors a thread.
fn fp8_products(suite: &mut Suite) -> Result<(), Lost> {
    if !rekindle_kernels::fp8::is_on(&suite.device) {
        println!("not run: products in fp8, which need compute capability 9.0");
        return Ok(());
    }
    let cases: [(&[(usize, usize)], _); 8] = [
        (&[(16, 2)], [1, 16]),
        (&[(48, 8)], [3, 144]),
        (&[(272, 16)], [129, 640]),
        (&[(64, 16), (32, 5), (256, 3)], [130, 96]),
        (&[(256, 40), (256, 30)], [257, 272]),
        (&[(32, 16)], [17, 4128]),
        (&[(4096, 16), (4224, 8)], [9, 64]),
        (&[(16, 4)], [5, 33_024]),
    ];
    for (linears, size) in cases {
        for products in [Fp8Products::Forward, Fp8Products::ForwardAndBackward] {
            for (dtype, rounding) in common::LOW_DTYPES {
                suite.case(&Fp8Stack::new(size, linears, products, dtype), dtype, rounding, &Layout::ROW_MAJOR)?;
            }
        }
    }
    Ok(())
}

fn operations(suite: &mut Suite) -> Result<(), Lost> {
    // Rows that begin at 16 bytes and rows that do not, below and above a tile of the products.
    for sizes in [[1, 1, 1], [3, 5, 7], [1, 200, 40], [129, 33, 65], [64, 128, 256], [33, 250, 48], [200, 264, 136]] {
        suite.dtypes(|dtype| Linear::new(sizes, dtype))?;
    }
    // Up to eight rows: one piece of k and several for each warp, a last tile that is short, few columns and many.
    for sizes in [[1, 16, 8], [2, 33, 72], [8, 40, 2568], [5, 4100, 136], [1, 4096, 640]] {
        suite.dtypes(|dtype| Linear::new(sizes, dtype))?;
    }
    // Up to 16 rows with a weight of few: pieces of k for some warps, for all and several for each; short tiles.
    for sizes in [[1, 16, 512], [5, 33, 9728], [9, 48, 2560], [16, 7, 1000], [12, 100, 4096], [16, 256, 520]] {
        suite.dtypes(|dtype| Linear::new(sizes, dtype))?;
    }
    for kind in Kind::ALL {
        for sizes in [[1, 1, 1], [3, 5, 7], [4, 96, 130], [2, 33, 65], [33, 64, 40], [17, 256, 192]] {
            suite.dtypes(|dtype| Packed::new(sizes, kind, dtype))?;
        }
        // Up to 32 rows of whole blocks: warps without a block, with one step and with several; more tiles than blocks.
        for sizes in [[1, 16, 64], [8, 48, 1216], [9, 32, 640], [16, 16, 2560], [30, 48, 832], [3, 6512, 128]] {
            suite.dtypes(|dtype| Packed::new(sizes, kind, dtype))?;
        }
        // Up to 64 rows: short tiles of 128 rows, steps with one block, more steps than buffers, several blocks of a cluster.
        for sizes in [[64, 144, 832], [40, 272, 2560], [33, 128, 64], [17, 128, 4096], [5, 400, 1984]] {
            suite.dtypes(|dtype| Packed::new(sizes, kind, dtype))?;
        }
    }
    // Groups of one to three, ranks that fill the columns kept for them and that do not, a linear without factors.
    let groups: [&[(usize, usize)]; 4] = [&[(5, 2)], &[(40, 8)], &[(48, 3), (16, 0)], &[(64, 16), (24, 8), (24, 5)]];
    let sizes = [[3, 7], [33, 24], [17, 64], [130, 96]];
    // Few rows of whole blocks and tiles.
    let few: [(&[(usize, usize)], _); 5] = [
        (&[(48, 8)], [2, 128]),
        (&[(64, 16), (32, 0), (16, 5)], [12, 192]),
        (&[(300, 40), (20, 40)], [8, 1544]),
        (&[(136, 16), (120, 64)], [33, 640]),
        (&[(264, 72)], [64, 200]),
    ];
    // Weights alone; the 4-bit ones of the last two are adjacent, with one offset for each part of 32 and 16 rows.
    let alone: [(&[(usize, usize)], _); 4] = [
        (&[(5, 0)], [3, 7]),
        (&[(40, 0), (17, 0), (24, 0)], [130, 96]),
        (&[(96, 0), (32, 0)], [3, 128]),
        (&[(64, 0), (32, 0), (16, 0)], [12, 256]),
    ];
    for (linears, size) in groups.into_iter().zip(sizes).chain(few).chain(alone) {
        let fp8 = Kind::Fp8(Fp8Scaling::Block);
        for kind in [None, Some(Kind::FourBit), Some(Kind::FourBitDouble), Some(Kind::Int8), Some(fp8)] {
            for bias in [false, true] {
                suite.dtypes(|dtype| Stack::new(size, linears, kind, bias, dtype))?;
                for (magnitudes, biases) in [(true, false), (false, true), (true, true)] {
                    suite.dtypes(|dtype| Stack::new(size, linears, kind, bias, dtype).trained(magnitudes, biases))?;
                }
            }
        }
    }
    fp8_products(suite)?;
    // One warp, several, and the widest row that one block takes.
    for shape in [[1, 2], [3, 5], [33, 16], [64, 40], [70, 129], [9, 2048], [3, 16_384]] {
        for residual in [false, true] {
            suite.dtypes(|dtype| RmsNorm::new(shape, residual, dtype))?;
            for form in [Form::RoundedAfter, Form::OnePlus, Form::None] {
                suite.dtypes(|dtype| RmsNorm::with(form, shape, residual, dtype))?;
            }
        }
        for form in Form::ALL {
            suite.dtypes(|dtype| AddedNorm::new(form, shape, dtype))?;
        }
        for form in [Form::Plain, Form::RoundedAfter, Form::OnePlus] {
            for residual in [false, true] {
                suite.dtypes(|dtype| RmsNorm::with(form, shape, residual, dtype).wide())?;
            }
            suite.dtypes(|dtype| AddedNorm::new(form, shape, dtype).wide())?;
        }
    }
    // 64, 128 and 256 channels that all turn have kernels of their own.
    let ropes = [
        ([1, 1, 2], 2),
        ([5, 3, 6], 6),
        ([37, 2, 24], 16),
        ([33, 4, 64], 64),
        ([19, 3, 128], 128),
        ([6, 2, 256], 256),
        ([21, 2, 128], 64),
        ([7, 5, 10], 2),
    ];
    for (shape, rotary_dim) in ropes {
        for norm in [false, true] {
            suite.dtypes(|dtype| Rope::new(shape, rotary_dim, norm, dtype))?;
        }
        suite.dtypes(|dtype| Rope::new(shape, rotary_dim, true, dtype).form(Form::OnePlus))?;
        for norm in [false, true] {
            suite.dtypes(|dtype| Rope::new(shape, rotary_dim, norm, dtype).interleaved())?;
        }
        suite.dtypes(|dtype| Rope::new(shape, 0, true, dtype))?;
    }
    for shape in [[1, 1], [3, 7], [40, 33], [130, 127], [5, 3072]] {
        for activation in ACTIVATIONS {
            suite.dtypes(|dtype| GatedActivation::new(activation, shape, dtype))?;
        }
    }
    let spread: Vec<u32> = (0..70).map(|t| t * t % 50).collect();
    for (vocab, hidden, ids) in [(1, 1, &[0][..]), (11, 7, &[3, 10, 3, 0, 3, 9]), (50, 33, &spread), (50, 264, &spread)]
    {
        suite.dtypes(|dtype| Embedding::new(vocab, hidden, ids, dtype))?;
    }
    for dtype in ALL_DTYPES {
        suite.property(&format!("neftune: noise is the CPU's {dtype:?}"), |device| {
            properties::noise_is_the_same_everywhere(device, dtype);
        })?;
        suite.property(&format!("dropout masks are the CPU's {dtype:?}"), |device| {
            properties::dropout_masks_are_the_same_everywhere(device, dtype);
        })?;
    }
    Ok(())
}

fn experts(suite: &mut Suite) -> Result<(), Lost> {
    // Below a tile of 64 or 128 rows, at it and above it, alone and in pairs; no rows; adapters and whole tiles of columns.
    let rows: [&[usize]; 5] =
        [&[1], &[3, 0, 5], &[0, 127, 1, 128, 129, 0], &[64, 65, 63, 200, 256, 257, 0], &[0, 700, 0, 385]];
    for rows in rows {
        for sizes in [[5, 7], [16, 72], [72, 16], [264, 40], [328, 200]] {
            suite.dtypes(|dtype| Grouped::with_rows(rows, sizes, dtype))?;
        }
    }
    for (tokens, experts, top_k) in [(1, 3, 3), (37, 8, 3), (300, 5, 2)] {
        for sizes in [[5, 7], [16, 72], [72, 16], [264, 328]] {
            suite.dtypes(|dtype| Grouped::of_tokens(tokens, experts, top_k, sizes, dtype))?;
        }
    }
    let forms = [
        RoutingForm::SoftmaxTopK { normalize: false },
        RoutingForm::SoftmaxTopK { normalize: true },
        RoutingForm::TopKSoftmax,
        RoutingForm::Sigmoid,
    ];
    for form in forms {
        // More than one block of 1024 selections.
        for (tokens, experts, top_k) in [(3, 5, 2), (33, 8, 8), (300, 128, 8), (70, 512, 10)] {
            suite.dtypes(|dtype| Router::new(tokens, experts, top_k, form, dtype))?;
        }
    }
    for (tokens, experts) in [(3, 5), (70, 512)] {
        suite.dtypes(|dtype| Probabilities::new(tokens, experts, dtype))?;
    }
    for (tokens, experts, top_k, width) in [(1, 1, 1, 1), (3, 5, 2, 7), (37, 8, 3, 40), (130, 16, 8, 264)] {
        suite.dtypes(|dtype| Activation::new(tokens, experts, top_k, width, dtype))?;
        suite.dtypes(|dtype| Clamped::new(tokens, experts, top_k, width, dtype))?;
    }
    for dtype in ALL_DTYPES {
        suite.property(&format!("quantized experts, some at a time {dtype:?}"), |device| {
            decoded_experts::groups_compute_as_one(device, dtype);
        })?;
        suite.property(&format!("quantized experts of a few selections {dtype:?}"), |device| {
            decoded_experts::few_selections(device, dtype);
        })?;
    }
    Ok(())
}

fn gated_deltas(suite: &mut Suite) -> Result<(), Lost> {
    // A thread has 32 tokens of the convolution, a block 256; chunks of the rule have 64.
    for lengths in [&[1][..], &[2, 1, 3, 4, 5], &[32, 31, 33], &[250, 1, 300]] {
        for channels in [1, 40, 264] {
            suite.dtypes(|dtype| CausalConv::new(lengths, channels, 4, dtype))?;
        }
    }
    let batches: [(&[usize], [usize; 2], [usize; 2]); 6] = [
        (&[1, 63, 64, 65, 130, 2], [2, 4], [16, 16]),
        (&[1, 63, 64, 65, 130, 2], [1, 3], [32, 64]),
        (&[129, 64], [2, 2], [64, 32]),
        (&[1, 5, 70], [1, 2], [128, 128]),
        (&[200], [1, 1], [128, 128]),
        (&[70; 24], [2, 4], [64, 64]),
    ];
    for (lengths, heads, dims) in batches {
        suite.dtypes(|dtype| GatedDelta::new(lengths, heads, dims, dtype))?;
    }
    for shape in [[1, 1, 8], [3, 2, 40], [70, 3, 16], [33, 5, 128]] {
        suite.dtypes(|dtype| GatedNorm::new(shape, dtype))?;
    }
    for shape in [[1, 1, 8], [37, 4, 16], [9, 2, 256]] {
        suite.dtypes(|dtype| OutputGate::new(shape, dtype))?;
    }
    for shape in [[1, 1], [70, 129], [9, 5000]] {
        suite.dtypes(|dtype| Center::new(shape, dtype))?;
    }
    for (dtype, rounding) in [(F32, 1e-5), (DType::BF16, 1.0 / 64.0), (DType::F16, 1.0 / 512.0)] {
        suite.property(&format!("gated delta: states continue a document {dtype:?}"), |device| {
            gated_delta::states_continue_a_document(device, dtype, [16, 32], rounding);
            gated_delta::states_continue_a_document(device, dtype, [128, 128], rounding);
        })?;
        suite.property(&format!("causal convolution: rows continue a document {dtype:?}"), |device| {
            causal_conv::rows_continue_a_document(device, dtype);
        })?;
    }
    Ok(())
}

fn losses(suite: &mut Suite) -> Result<(), Lost> {
    let counted: [fn(usize) -> bool; 6] = [|_| true, |t| t >= 3, |t| t < 6, |t| t % 3 != 1, |t| t == 4, |_| false];
    for counts in counted {
        suite.dtypes(|dtype| LinearCrossEntropy::new([9, 5, 13], dtype, counts))?;
        suite.dtypes(|dtype| LinearCrossEntropy::new([41, 33, 70], dtype, counts))?;
        for (multiplier, softcap) in [(0.375, None), (1.0, Some(5.0)), (0.7, Some(3.0))] {
            let case = |dtype| LinearCrossEntropy::new([41, 33, 70], dtype, counts).capped(multiplier, softcap);
            suite.dtypes(|dtype| case(dtype).weighted())?;
        }
    }
    suite.dtypes(|dtype| LinearCrossEntropy::new([1, 1, 1], dtype, |_| true))?;
    suite.dtypes(|dtype| LinearCrossEntropy::new([300, 64, 1000], dtype, |t| t % 7 != 2))?;
    suite
        .dtypes(|dtype| LinearCrossEntropy::new([300, 64, 9001], dtype, |_| true).capped(1.0, Some(6.0)).weighted())?;
    for dtype in ALL_DTYPES {
        suite.property(&format!("log-probabilities of known logits {dtype:?}"), |device| {
            common::linear_cross_entropy::log_probs_of_known_logits(&owned(device, dtype));
        })?;
    }
    // From 327,681 entries on a chunk is 128 rows: two chunks, with and without rows that are left out.
    for counts in [|_| true, |t: usize| t != 5] {
        let case = LinearCrossEntropy::new([130, 8, 327_690], F32, counts);
        suite.case(&case, F32, FLOOR, &[Layout::Owned])?;
        let case = LinearCrossEntropy::new([130, 8, 327_690], F32, counts).capped(0.5, Some(4.0)).weighted();
        suite.case(&case, F32, FLOOR, &[Layout::Owned])?;
    }
    Ok(())
}

fn optimizer(suite: &mut Suite) -> Result<(), Lost> {
    let params: &[_] = &[(7, true), (1, true), (30, false), (9, true), (20_000, false), (17_000, true)];
    for rule in RULES {
        for weight_decay in [0.0, 0.1] {
            // Clipped, not clipped, and a norm below the limit.
            for max_grad_norm in [None, Some(1.0), Some(1e4)] {
                let case = Steps { rule, params, weight_decay, max_grad_norm };
                suite.case(&case, F32, FLOOR, &[Layout::Owned])?;
            }
        }
        for (format, by) in [
            (StateFormat::F32, By::All),
            (StateFormat::F32, By::Parameter),
            (StateFormat::Blockwise8, By::All),
            (StateFormat::Blockwise8, By::Parameter),
            (StateFormat::Host8, By::All),
        ] {
            suite.property(&format!("optimizer: the bits of the CPU, {rule:?} {format:?} {by:?}"), |device| {
                let (values, state) = some_steps(device, rule, format, by);
                let (cpu_values, cpu_state) = some_steps(&Device::cpu(), rule, format, By::All);
                for (ours, theirs) in state.iter().zip(&cpu_state) {
                    let differ = ours.bytes.iter().zip(&theirs.bytes).filter(|(a, b)| a != b).count();
                    assert_eq!((&ours.name, differ), (&theirs.name, 0), "bytes that differ");
                }
                assert_eq!(state.len(), cpu_state.len());
                let differ = values.iter().zip(&cpu_values).filter(|(a, b)| a != b).count();
                assert_eq!(differ, 0, "values that differ, of {}", values.len());
            })?;
        }
    }
    suite.property("optimizer: gradients that are not finite change nothing", |device| {
        properties::gradients_that_are_not_finite_change_nothing(device);
    })?;
    suite.property("optimizer: values in place are those of the CPU, bit for bit", |device| {
        properties::values_in_place_are_those_of_the_cpu(device);
    })
}

/// Tests that need equal calls to give equal bits.
fn determinism(suite: &mut Suite) -> Result<(), Lost> {
    for dtype in ALL_DTYPES {
        let place = |device: &Device| owned(device, dtype);
        for head_dim in [24, 64, 128, 256] {
            suite.property(
                &format!("attention: documents do not reach neighbours, heads of {head_dim} {dtype:?}"),
                |device| {
                    properties::documents_do_not_reach_their_neighbours(|| place(device), head_dim);
                },
            )?;
            suite.property(&format!("attention: the same bits, heads of {head_dim} {dtype:?}"), |device| {
                let case = || Attention::new(&[150, 61, 400], 4, 2, head_dim, dtype);
                for case in [case(), case().window(130).sinks()] {
                    properties::the_same_input_gives_the_same_bits(&case, || place(device));
                }
            })?;
        }
        suite.property(&format!("the same bits: products, norms, losses, embeddings {dtype:?}"), |device| {
            let ids: Vec<u32> = (0..300).map(|t| t * t % 11).collect();
            let cases: [&dyn Case; 4] = [
                &Linear::new([300, 129, 520], dtype),
                &RmsNorm::new([300, 129], true, dtype),
                &LinearCrossEntropy::new([290, 33, 70], dtype, |t| t % 4 != 2),
                &Embedding::new(11, 40, &ids, dtype),
            ];
            for case in cases {
                properties::the_same_input_gives_the_same_bits(case, || place(device));
            }
        })?;
    }
    Ok(())
}

const ALL_DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

fn owned(device: &Device, dtype: DType) -> Place {
    Place::new(device.clone(), dtype, Layout::Owned)
}
