//! Sizes of memory and files on the command line.

/// Parses a number of bytes with a unit: powers of 1,000 (GB) or of 1,024 (GiB, and G alone).
pub(super) fn bytes(text: &str) -> Result<usize, String> {
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
        for text in ["", "GiB", "-1GiB", "24 GiBs", "0", "1TB"] {
            assert!(bytes(text).unwrap_err().contains("24GiB"), "{text}");
        }
    }
}
