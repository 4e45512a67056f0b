//! `cargo xtask bench quantize`: measures time and memory of quantizing a 16-bit checkpoint to 4 and 8 bits.

use std::error::Error;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use rekindle_hub::Checkpoint;
use rekindle_kernels::DType;
use rekindle_kernels::Device;
use rekindle_models::{CausalLm, LoadIn, LoadOptions, MemoryReport, quantize};
use serde_json::{Value, json};

use super::shape::Shape;
use super::{name, resident_kib, result};
use crate::random_checkpoint;

/// The measured jobs, each in a separate process.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Job {
    /// Loading with `load_in_4bit`.
    #[value(name = "load_in_4bit")]
    LoadIn4Bit,
    /// Loading with `load_in_8bit`.
    #[value(name = "load_in_8bit")]
    LoadIn8Bit,
    /// `rekindle quantize --to nf4`.
    #[value(name = "quantize-nf4")]
    ToNf4,
    /// `rekindle quantize --to int8`.
    #[value(name = "quantize-int8")]
    ToInt8,
}

/// Memory allowed for loading in addition to the packed model and one tensor of the file.
const ALLOWANCE: f64 = 256e6;

/// Writes a checkpoint of `shape` below `dir`, measures every job on it, and deletes it even if a job fails.
pub(crate) fn run(shape: Shape, dir: &Path) -> Result<(), Box<dyn Error>> {
    std::fs::create_dir_all(dir)?;
    let config = shape.config();
    let model = rekindle_models::ModelConfig::from_json(&config).map_err(|problems| problems.join("; "))?;
    let weights: u64 = model.parameters().iter().map(|tensor| tensor.numel() as u64).sum();
    // 16 bits, and at the same time 8 bits of the largest result and some room.
    let (needed, free) = (3 * weights + (1 << 30), free_bytes(dir)?);
    if free < needed {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        let at = dir.display();
        return Err(
            format!("{at} has {:.1} GB free and {:.1} are needed; give another --dir", gb(free), gb(needed)).into()
        );
    }
    let scratch = tempfile::Builder::new().prefix("bench-quantize-").tempdir_in(dir)?;
    random_checkpoint::write_bf16(scratch.path(), &config, 1)?;
    settle(scratch.path())?;

    let threads = std::thread::available_parallelism()?;
    println!(
        "{}: {weights} weights, {:.2} GB in bf16, {threads} threads, the file in the page cache",
        name(shape),
        2e-9 * weights as f64
    );
    println!(
        "{:<14}{:>7}{:>7}{:>9}{:>11}{:>11}{:>11}{:>11}{:>6}{:>13}{:>8}",
        "", "s", "CPU s", "GB/s in", "packed MB", "peak anon", "bound", "VmHWM MB", "held", "bits/weight", "saved"
    );
    let mut broken = Vec::new();
    for job in Job::value_variants() {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["bench", "quantize", "--worker"]).arg(scratch.path()).args(["--job", &name(*job)]);
        if !row(&name(*job), &result(&mut command)?) {
            broken.push(name(*job));
        }
    }
    println!("bound: packed + the largest tensor of the file + {:.0} MB, of anonymous memory", ALLOWANCE / 1e6);
    println!("in memory the embedding is f32, in a file bf16");
    if broken.is_empty() { Ok(()) } else { Err(format!("above the bound: {}", broken.join(", ")).into()) }
}

/// Flushes the files and reads them once, so that the disk is not measured.
fn settle(dir: &Path) -> Result<(), Box<dyn Error>> {
    for entry in std::fs::read_dir(dir)? {
        let mut file = std::fs::File::open(entry?.path())?;
        file.sync_all()?;
        std::io::copy(&mut file, &mut std::io::sink())?;
    }
    Ok(())
}

/// Prints one line of the table and returns whether the bound held.
fn row(name: &str, r: &Value) -> bool {
    let number = |key: &str| r[key].as_f64().unwrap_or(f64::NAN);
    let megabytes = |key: &str| number(key) / 1e6;
    let bound = number("packed") + number("largest") + ALLOWANCE;
    // Written so that NaN fails.
    let held = number("peak_anonymous") <= bound;
    println!(
        "{name:<14}{:>7.1}{:>7.1}{:>9.2}{:>11.0}{:>11.0}{:>11.0}{:>11.0}{:>6}{:>13.3}{:>6.1} %",
        number("seconds"),
        number("cpu_seconds"),
        1e-9 * number("read") / number("seconds"),
        megabytes("packed"),
        megabytes("peak_anonymous"),
        bound / 1e6,
        megabytes("peak_resident"),
        if held { "yes" } else { "NO" },
        number("bits"),
        100.0 * number("saving"),
    );
    held
}

/// Runs `job` with the checkpoint in this process and prints one JSON line.
pub(crate) fn worker(dir: &Path, job: Job) -> Result<(), Box<dyn Error>> {
    let began = Instant::now();
    let (made, peak) = peak_anonymous(|| job.run(dir));
    let (seconds, cpu_seconds) = (began.elapsed().as_secs_f64(), cpu_seconds());
    // The model is dropped after the clock has stopped.
    let (_model, report) = made?;
    let checkpoint = Checkpoint::open(dir)?;
    let sizes = checkpoint.names().filter_map(|name| checkpoint.get(name)).map(|view| view.data.len());
    let line = json!({
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "read": checkpoint.total_bytes(),
        "largest": sizes.max(),
        "packed": report.bytes(),
        "bits": report.bits_per_quantized_weight(),
        "saving": report.saving(),
        "peak_anonymous": peak,
        "peak_resident": 1024.0 * resident_kib("VmHWM"),
    });
    println!("{line}");
    Ok(())
}

impl Job {
    fn run(self, dir: &Path) -> Result<(Option<CausalLm>, MemoryReport), Box<dyn Error>> {
        let checkpoint = Checkpoint::open(dir)?;
        let load_in = match self {
            Self::LoadIn4Bit | Self::ToNf4 => LoadIn::FourBit(None),
            Self::LoadIn8Bit | Self::ToInt8 => LoadIn::EightBit,
        };
        match self {
            Self::LoadIn4Bit | Self::LoadIn8Bit => {
                let options =
                    LoadOptions { load_in: Some(load_in), ..LoadOptions::new(Device::cpu(), DType::F32, 2048) };
                let model = CausalLm::load(&checkpoint, &options, &mut |_| ())?;
                let report = model.memory_report();
                Ok((Some(model), report))
            }
            Self::ToNf4 | Self::ToInt8 => {
                let out = tempfile::tempdir_in(dir)?;
                Ok((None, quantize(&checkpoint, load_in, None, out.path(), &mut |_| ())?))
            }
        }
    }
}

/// Returns the result of `work` and the peak resident anonymous memory, sampled every millisecond.
fn peak_anonymous<T>(work: impl FnOnce() -> T) -> (T, f64) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sampler = scope.spawn(|| {
            let mut peak = resident_kib("RssAnon");
            while !done.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
                peak = peak.max(resident_kib("RssAnon"));
            }
            1024.0 * peak
        });
        let result = work();
        done.store(true, Ordering::Relaxed);
        (result, sampler.join().unwrap_or(f64::NAN))
    })
}

/// Returns the CPU time of all threads of this process, which depends less on other programs than wall-clock time. NaN
/// if it is not available.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Fields 14 and 15 are `utime` and `stime` in hundredths of a second; field 2 is a name in parentheses.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: Vec<f64> = fields.skip(11).take(2).filter_map(|field| field.parse().ok()).collect();
    if let [user, system] = ticks[..] { (user + system) / 100.0 } else { f64::NAN }
}

/// Returns the free space of the file system of `dir`, from `df`.
fn free_bytes(dir: &Path) -> Result<u64, Box<dyn Error>> {
    let output = Command::new("df").args(["--output=avail", "--block-size=1"]).arg(dir).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let number = text.lines().last().and_then(|line| line.trim().parse().ok());
    number.ok_or_else(|| format!("df does not say what {} has free", dir.display()).into())
}
