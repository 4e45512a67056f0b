//! Formatting of numbers and texts.

/// Escapes text for HTML, between tags and in attributes.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Formats three or four significant digits; powers of ten below a thousandth.
pub(super) fn significant(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    match value.abs() {
        size if !size.is_finite() => value.to_string(),
        size if size < 1e-3 => format!("{value:.2e}"),
        size if size < 0.01 => format!("{value:.5}"),
        size if size < 0.1 => format!("{value:.4}"),
        size if size < 10.0 => format!("{value:.3}"),
        size if size < 100.0 => format!("{value:.2}"),
        size if size < 1000.0 => format!("{value:.1}"),
        _ => group(value),
    }
}

/// Formats a whole number with separators of thousands.
pub(super) fn group(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        let left = digits.len() - i;
        if i > 0 && left.is_multiple_of(3) && !text.ends_with('-') {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Formats a count; from a hundred thousand on, with three or four digits.
pub(super) fn count(count: usize) -> String {
    let count = count as f64;
    match count {
        0.0..1e5 => group(count),
        1e5..1e6 => format!("{:.0} k", count / 1e3),
        1e6..1e9 => format!("{:.1} M", count / 1e6),
        _ => format!("{:.2} G", count / 1e9),
    }
}

/// Formats bytes in powers of 1,024.
pub(super) fn bytes(bytes: u64) -> String {
    let (unit, name) = byte_unit(bytes as f64);
    format!("{:.*} {name}", if name == "GiB" { 2 } else { 1 }, bytes as f64 / unit)
}

/// Returns the unit for bytes up to `most`.
pub(super) fn byte_unit(most: f64) -> (f64, &'static str) {
    const GIB: f64 = (1 << 30) as f64;
    if most >= GIB { (GIB, "GiB") } else { (GIB / 1024.0, "MiB") }
}

/// Formats seconds as `12 s`, `3 m 04 s` or `2 h 05 m`.
pub(super) fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} m {s:02} s"),
        (h, m, _) => format!("{h} h {m:02} m"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        let texts = [0.0, 2e-4, 0.00403, 0.017249, 1.23456, 12.3456, 123.456, 28_224.4].map(significant);
        assert_eq!(texts, ["0", "2.00e-4", "0.00403", "0.0172", "1.235", "12.35", "123.5", "28,224"]);
        assert_eq!(
            [7.0, 999.0, 1000.0, 1_234_567.0, -123_456.0].map(group),
            ["7", "999", "1,000", "1,234,567", "-123,456"]
        );
        let counts = [99_999, 123_456, 16_384_000, 2_500_000_000].map(count);
        assert_eq!(counts, ["99,999", "123 k", "16.4 M", "2.50 G"]);
        assert_eq!(significant(f64::NAN), "NaN");
        assert_eq!([bytes(300_000), bytes(12_340_000), bytes(2_345_000_000)], ["0.3 MiB", "11.8 MiB", "2.18 GiB"]);
        assert_eq!([0.4, 59.6, 184.0, 7500.0].map(duration), ["0 s", "1 m 00 s", "3 m 04 s", "2 h 05 m"]);
    }

    #[test]
    fn nothing_ends_a_tag_or_an_attribute() {
        assert_eq!(escape("<a b=\"c\"> & d"), "&lt;a b=&quot;c&quot;&gt; &amp; d");
    }
}
