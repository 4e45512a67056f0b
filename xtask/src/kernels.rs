//! `cargo xtask kernels`: compiles every CUDA kernel for every architecture, without a GPU.

use std::collections::BTreeMap;
use std::error::Error;
use std::time::{Duration, Instant};

use rekindle_kernels::runtime::{Arch, Checked, CudaError, Usage, compile_check};

/// Compute capabilities: Turing, Ampere, Ada, Hopper and both Blackwell variants.
const ARCHITECTURES: [u32; 7] = [75, 80, 86, 89, 90, 100, 120];

/// Compiles for the compute capabilities `only`, or for all if there are none.
pub(crate) fn check(only: &[u32], require: bool) -> Result<(), Box<dyn Error>> {
    let began = Instant::now();
    let capabilities = if only.is_empty() { &ARCHITECTURES } else { only };
    let architectures: Vec<Arch> = capabilities.iter().map(|&sm| Arch { sm }).collect();
    let checked = match compile_check(&architectures) {
        Ok(checked) => checked,
        Err(error @ CudaError::LibraryMissing { .. }) if !require => {
            println!("not run: {error}");
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    let mut rows: BTreeMap<(&str, Arch), Row> = BTreeMap::new();
    for variant in &checked {
        rows.entry((variant.file, variant.arch)).or_default().add(variant);
    }
    println!("{:<24}{:<8}{:>9}{:>11}{:>8}{:>9}", "file", "arch", "variants", "registers", "spills", "seconds");
    for ((file, arch), Row { variants, registers, spills, time }) in &rows {
        let (arch, seconds) = (arch.to_string(), time.as_secs_f64());
        println!("{file:<24}{arch:<8}{variants:>9}{registers:>11}{spills:>8}{seconds:>9.1}");
    }
    let problems: Vec<String> = checked.iter().flat_map(problems).collect();
    let (count, seconds) = (checked.len(), began.elapsed().as_secs_f64());
    println!("{count} variants in {seconds:.0} s, {} problems", problems.len());
    if problems.is_empty() { Ok(()) } else { Err(problems.join("\n       ").into()) }
}

/// A kernel file on an architecture, with the maximum resources over entry points and variants.
#[derive(Default)]
struct Row {
    variants: usize,
    registers: u32,
    spills: u32,
    time: Duration,
}

impl Row {
    fn add(&mut self, variant: &Checked) {
        self.variants += 1;
        self.time += variant.time;
        for usage in variant.result.iter().flatten() {
            self.registers = self.registers.max(usage.registers);
            self.spills = self.spills.max(spilled(usage));
        }
    }
}

/// Returns the problems of a variant: errors, warnings and register spills.
fn problems(variant: &Checked) -> Vec<String> {
    let Checked { file, arch, defines, result, warnings, unmatched, .. } = variant;
    let place = format!("{file} for {arch} with {}", defines.join(" "));
    let usages = match result {
        Ok(usages) => usages,
        Err(error) => return vec![error.to_string()],
    };
    let spills = usages.iter().filter(|usage| spilled(usage) > allowed_spill(file));
    let spills = spills.map(|usage| format!("{place}: {} spills {} bytes", usage.entry, spilled(usage)));
    let others = warnings.iter().chain(unmatched).map(|problem| format!("{place}: {problem}"));
    spills.chain(others).collect()
}

/// Returns the bytes that kernels of a file may spill. Those of the gated delta rule keep more tiles than they have
/// registers for, the forward only in f32. Rows of more than 32,768 values in f16 leave `fp8_rows.cu` two registers short.
fn allowed_spill(file: &str) -> u32 {
    match file {
        "fp8_rows.cu" => 8,
        "gated_delta.cu" => 64,
        "gated_delta_bwd.cu" => 1024,
        _ => 0,
    }
}

/// Returns the bytes of registers that a thread spills to memory.
fn spilled(usage: &Usage) -> u32 {
    usage.spill_stores.max(usage.spill_loads)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variant(spill_loads: u32) -> Checked {
        let usage = Usage { entry: "swiglu_fwd".into(), registers: 64, spill_loads, ..Usage::default() };
        Checked {
            file: "a.cu",
            arch: Arch { sm: 90 },
            defines: vec!["T=bf16".into()],
            result: Ok(vec![usage]),
            warnings: Vec::new(),
            unmatched: Vec::new(),
            time: Duration::ZERO,
        }
    }

    #[test]
    fn spills_are_problems() {
        assert!(problems(&variant(0)).is_empty());
        assert_eq!(problems(&variant(4)), ["a.cu for sm_90a with T=bf16: swiglu_fwd spills 4 bytes"]);
    }

    #[test]
    fn entry_points_that_do_not_match_are_problems() {
        let variant = Checked { unmatched: vec!["swiglu_fwd is not listed in sources.rs".into()], ..variant(0) };
        assert_eq!(problems(&variant), ["a.cu for sm_90a with T=bf16: swiglu_fwd is not listed in sources.rs"]);
    }
}
