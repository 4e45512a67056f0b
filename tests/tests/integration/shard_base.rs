//! A base whose frozen weights several ranks hold together, against whole ones.

use std::sync::Arc;

use rekindle_data::{Dataset, EncodeOptions};
use rekindle_dist::Communicator;
use rekindle_kernels::{DType, ShardExchange};
use rekindle_lora::{InitLoraWeights, LoraConfig};
use rekindle_models::objective::Dpo;
use rekindle_models::{
    CausalLm, GenerationConfig, GradientCheckpointing, LoadIn, LoadOptions, MemoryClass, MemoryLine, open_checkpoint,
};
use rekindle_quant::{QuantConfig, QuantType};
use rekindle_tests::{Golden, goldens, on_ranks};
use rekindle_train::{Error, Method, SftConfig, ShardRanks, StepCount, Trainer};

/// A job with a whole and with a divided base.
struct ShardJob {
    golden: &'static str,
    load: fn(&mut LoadOptions),
    lora: fn() -> LoraConfig,
    config: SftConfig,
}

/// The name of a format, and the options that load it.
type Format = (&'static str, fn(&mut LoadOptions));

/// Losses and gradient norms of all steps, losses of all evaluations, and the trained values, in bits.
#[derive(Debug, PartialEq)]
struct Bits {
    steps: Vec<[u64; 2]>,
    evals: Vec<u64>,
    values: Vec<u32>,
}

impl ShardJob {
    /// Four steps of five rows: ranks have different numbers of passes, or none.
    fn new(golden: &'static str) -> Self {
        let config = SftConfig {
            per_device_train_batch_size: 1,
            gradient_accumulation_steps: 5,
            max_steps: Some(4),
            learning_rate: Some(1e-3),
            eval_steps: Some(StepCount::Steps(2)),
            per_device_eval_batch_size: 2,
            ..SftConfig::default()
        };
        Self { golden, load: |_| (), lora: || LoraConfig::new(4).lora_dropout(0.1), config }
    }

    fn model(&self, shard_base: Option<Arc<dyn ShardExchange>>) -> CausalLm {
        let mut model = Golden::open(self.golden).load_with(|options| {
            (self.load)(options);
            options.shard_base = shard_base;
        });
        model.add_adapter(&(self.lora)()).expect("a valid configuration");
        model
    }

    fn train(&self, world: Arc<dyn Communicator>, is_divided: bool) -> Result<Bits, Error> {
        let shard_base = is_divided.then(|| exchange(&world));
        let mut model = self.model(shard_base);
        let name = match &self.config.method {
            Method::Sft => format!("{}/rows.jsonl", self.golden),
            _ => "preferences/pairs.jsonl".to_owned(),
        };
        let options =
            EncodeOptions { max_seq_length: 128, task: self.config.method.task(), ..EncodeOptions::default() };
        let rows = Dataset::load(&goldens().join(name), None, &options).expect("golden rows load").0;
        let eval = Some(rows.clone());
        let trainer = Trainer { eval, world, ..Trainer::new(&mut model, rows, self.config.clone()) };
        let report = trainer.train()?;
        Ok(Bits {
            steps: report.steps.iter().map(|step| [step.loss.to_bits(), step.grad_norm.to_bits()]).collect(),
            evals: report.evals.iter().map(|eval| eval.eval_loss.to_bits()).collect(),
            values: model.params().all_values().into_iter().map(f32::to_bits).collect(),
        })
    }

    /// Compares the runs of these numbers of ranks.
    fn check(&self, what: &str, ranks: &[usize]) {
        for &ranks in ranks {
            let run = |is_divided: bool| -> Vec<Bits> {
                let outcomes = on_ranks(ranks, |world| self.train(world, is_divided));
                outcomes.into_iter().map(|outcome| outcome.expect("the run finishes")).collect()
            };
            assert!(run(true) == run(false), "{what}, {ranks} ranks");
        }
    }
}

fn exchange(world: &Arc<dyn Communicator>) -> Arc<dyn ShardExchange> {
    Arc::new(ShardRanks::Connected(Arc::clone(world)))
}

#[test]
fn dense_bases_have_the_bits_of_whole_ones() {
    ShardJob::new("qwen3-tied").check("f32", &[2, 3, 8]);
    let checkpointed = ShardJob {
        config: SftConfig {
            use_gradient_checkpointing: GradientCheckpointing::Block,
            neftune_noise_alpha: Some(5.0),
            ..ShardJob::new("llama3").config
        },
        load: |options| options.dtype = DType::BF16,
        ..ShardJob::new("qwen3-tied")
    };
    checkpointed.check("bf16, gradient checkpointing", &[3]);
    ShardJob { lora: || LoraConfig::new(4).use_dora(true), ..ShardJob::new("qwen2") }.check("DoRA", &[2]);
}

#[test]
fn quantized_bases_have_the_bits_of_whole_ones() {
    fn four_bit(options: &mut LoadOptions, quant_type: QuantType, double_quant: bool) {
        let config = QuantConfig { quant_type, double_quant, ..QuantConfig::default() };
        options.load_in = Some(LoadIn::FourBit(Some(config)));
    }
    let formats: [Format; 3] = [
        ("nf4", |options| four_bit(options, QuantType::Nf4, true)),
        ("fp4", |options| four_bit(options, QuantType::Fp4, false)),
        ("int8", |options| options.load_in = Some(LoadIn::EightBit)),
    ];
    for (what, load) in formats {
        ShardJob { load, ..ShardJob::new("qwen3-tied") }.check(what, &[3]);
    }
    ShardJob { lora: experts, ..ShardJob::new("families/gpt-oss/mxfp4") }.check("mxfp4", &[2]);
}

fn experts() -> LoraConfig {
    let targets = ["q_proj", "o_proj"];
    LoraConfig::new(3).target_modules(targets).init_lora_weights(InitLoraWeights::Random)
}

/// Layers of other kinds: mixtures with a shared expert, gated delta layers, fused linears, windows.
#[test]
fn other_layers_have_the_bits_of_whole_ones() {
    for golden in ["families/qwen3_5-moe", "families/phi3", "families/gemma3"] {
        ShardJob { lora: || LoraConfig::new(2), ..ShardJob::new(golden) }.check(golden, &[2]);
    }
}

/// A pass of the reference model comes between those of the policy.
#[test]
fn preferences_have_the_bits_of_whole_ones() {
    let mut job = ShardJob::new("qwen3-tied");
    job.config.method = Dpo::default().into();
    job.config.gradient_accumulation_steps = 3;
    job.check("dpo", &[2, 4]);
}

/// Rank 0 alone answers a prompt and writes the whole model, while the others wait.
#[test]
fn one_rank_generates_and_saves() {
    let job = ShardJob { load: |options| options.load_in = Some(LoadIn::FourBit(None)), ..ShardJob::new("qwen3-tied") };
    let generate = |model: &CausalLm| {
        let config = GenerationConfig { max_new_tokens: 6, ..GenerationConfig::default() };
        model.generate(&[1, 2, 3], &config, |_| true).expect("a valid prompt").0
    };
    let save = |model: &CausalLm| {
        let dir = tempfile::tempdir().expect("a directory");
        model.save(dir.path(), model.trained_dtype()).expect("it is written");
        ["config.json", "model.safetensors"].map(|file| std::fs::read(dir.path().join(file)).expect("it was written"))
    };
    let whole = job.model(None);
    let expected = (generate(&whole), save(&whole));
    let found = on_ranks(3, |world| {
        let model = job.model(Some(exchange(&world)));
        let found = world.is_first().then(|| (generate(&model), save(&model)));
        model.decoder().shards().expect("a divided base").finish();
        Ok(found)
    });
    let mut found = found.into_iter().map(|found| found.expect("no rank fails"));
    assert!(found.next().flatten() == Some(expected));
}

/// Each rank holds its share of the matrices of the blocks, and all of the rest.
#[test]
fn a_rank_holds_a_share_of_the_blocks() {
    for load in [|_: &mut LoadOptions| (), |options: &mut LoadOptions| options.load_in = Some(LoadIn::FourBit(None))] {
        let job = ShardJob { load, ..ShardJob::new("qwen3-tied") };
        let bytes = |model: &CausalLm| {
            let report = model.memory_report();
            let is_vocabulary = |line: &&MemoryLine| line.class == MemoryClass::EmbeddingsAndHead;
            let vocabulary = report.lines.iter().find(is_vocabulary).map_or(0, |line| line.bytes);
            (report.bytes() - vocabulary, vocabulary)
        };
        let adapter = |model: &CausalLm| 4 * model.params().numel() as u64;
        let whole = job.model(None);
        let (blocks, vocabulary) = bytes(&whole);
        let blocks = blocks - adapter(&whole);
        for (ranks, held) in [2, 4].map(|ranks| {
            (
                ranks,
                on_ranks(ranks, |world| {
                    let model = job.model(Some(exchange(&world)));
                    let (blocks, vocabulary) = bytes(&model);
                    Ok((blocks - adapter(&model), vocabulary))
                }),
            )
        }) {
            for held in held {
                let (held, same) = held.expect("no rank fails");
                assert_eq!(same, vocabulary);
                // Norms are whole.
                assert!(held <= blocks / ranks as u64 + blocks / 20, "{held} of {blocks} bytes, {ranks} ranks");
            }
        }
    }
}

#[test]
fn what_needs_a_whole_base_is_refused() {
    let job = ShardJob::new("qwen3-tied");
    let errors = on_ranks(2, |world| {
        let mut model = job.model(Some(exchange(&world)));
        let merged = model.merge_and_unload().expect_err("it is refused").to_string();
        let pissa = LoraConfig::new(4).init_lora_weights(InitLoraWeights::Pissa);
        let mut model = Golden::open(job.golden).load_with(|options| options.shard_base = Some(exchange(&world)));
        let pissa = model.add_adapter(&pissa).expect_err("it is refused").to_string();
        let full = |options: &mut LoadOptions| {
            options.full_finetuning = true;
            options.shard_base = Some(exchange(&world));
        };
        let mut options = LoadOptions::new(rekindle_kernels::Device::cpu(), DType::F32, 64);
        full(&mut options);
        let checkpoint = open_checkpoint(&goldens().join(job.golden)).expect("a golden");
        let full = CausalLm::load(&checkpoint, &options, &mut |_| ()).expect_err("it is refused").to_string();
        Ok([merged, pissa, full])
    });
    for errors in errors {
        let [merged, pissa, full] = errors.expect("no rank fails");
        assert!(merged.contains("(shard_base)"), "{merged}");
        assert!(pissa.contains("shard_base divides them"), "{pissa}");
        assert!(full.contains("use shard_optimizer"), "{full}");
    }
}
