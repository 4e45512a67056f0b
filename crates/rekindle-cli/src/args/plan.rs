//! `rekindle plan`.

use std::path::PathBuf;

use rekindle::run::ConfigOverride;

const PLAN: &str = "\
Prints the peak of memory by use, the longest rows and the largest batch that fit and, if the run does not fit, settings
to change, with exit code 4. Of a name on the hub, only the configuration is downloaded. device=cuda with --device-memory
plans for a GPU that need not exist.

Examples:
  rekindle plan run.toml
  rekindle plan run.toml --device-memory 24GiB device=cuda model.load_in_4bit=true --json";

#[derive(Debug, clap::Args)]
#[command(after_help = PLAN)]
pub(crate) struct PlanArgs {
    /// The run file
    #[arg(value_name = "RUN.toml")]
    pub(crate) run_file: PathBuf,
    /// Sets a key of the run file; the value is TOML, or else plain text
    #[arg(value_name = "section.key=value")]
    pub(crate) overrides: Vec<ConfigOverride>,
    /// Memory of the device, such as 24GiB [default: its free memory]; the device need not exist then
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub(crate) device_memory: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// Parses a number of bytes with a unit: powers of 1,000 (GB) or of 1,024 (GiB, and G alone).
fn bytes(text: &str) -> Result<usize, String> {
    const UNITS: [(&str, f64); 11] = [
        ("", 1.0),
        ("B", 1.0),
        ("KB", 1e3),
        ("MB", 1e6),
        ("GB", 1e9),
        ("KiB", 1024.0),
        ("MiB", 1048576.0),
        ("GiB", 1073741824.0),
        ("K", 1024.0),
        ("M", 1048576.0),
        ("G", 1073741824.0),
    ];
    let unit_at = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = (&text[..unit_at], text[unit_at..].trim());
    let factor = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).map(|(_, factor)| factor);
    match (number.parse::<f64>(), factor) {
        (Ok(number), Some(factor)) if number > 0.0 => Ok((number * factor) as usize),
        _ => Err(format!("\"{text}\" is not a size; write it like 24GiB, 24GB or 512MiB")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, expected) in
            [("24GiB", 24 << 30), ("24g", 24 << 30), ("1.5MB", 1_500_000), ("7", 7), ("2 KiB", 2048)]
        {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
        for text in ["", "GiB", "-1GiB", "24 GiBs", "0"] {
            assert!(bytes(text).unwrap_err().contains("24GiB"), "{text}");
        }
    }
}
