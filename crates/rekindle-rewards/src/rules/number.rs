//! Numbers in text.

use std::sync::LazyLock;

use regex::Regex;

/// A number as answers write it: a sign, thousands separated by commas or a comma within braces, decimals, an exponent.
static NUMBER: LazyLock<Regex> = LazyLock::new(|| {
    let number =
        r"[-+−]?(?:\d{1,3}(?:(?:,|\{,\}|\\,)\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+−]?\.\d+(?:[eE][-+]?\d+)?";
    Regex::new(number).expect("the expression is valid")
});

/// A fraction: `a/b`, `\frac{a}{b}`, `\dfrac{a}{b}` or `\tfrac{a}{b}` of numbers.
static FRACTION: LazyLock<Regex> = LazyLock::new(|| {
    let number = r"[-+−]?\d+(?:\.\d+)?";
    let latex = format!(r"([-+−]?)\\[dt]?frac\s*\{{\s*({number})\s*\}}\s*\{{\s*({number})\s*\}}");
    Regex::new(&format!(r"{latex}|({number})\s*/\s*({number})")).expect("the expression is valid")
});

/// Returns the last number in a text, fractions included.
pub(super) fn last_number(text: &str) -> Option<f64> {
    let fraction = FRACTION.captures_iter(text).last();
    let number = NUMBER.find_iter(text).last();
    // The parts of a fraction are numbers too: the fraction wins where it ends with or after the last number.
    if let Some(fraction) = fraction {
        let end = fraction.get(0).map_or(0, |whole| whole.end());
        if number.is_none_or(|number| number.end() <= end) {
            return fraction_value(&fraction);
        }
    }
    number.and_then(|number| parse(number.as_str()))
}

/// Returns the number that a text is, apart from currency, percent and math signs around it and a full stop at its end.
pub(super) fn whole_number(text: &str) -> Option<f64> {
    let mut text = text.trim().trim_end_matches('.');
    for (open, close) in [("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")] {
        if let Some(inside) = text.strip_prefix(open).and_then(|rest| rest.strip_suffix(close)) {
            text = inside.trim();
        }
    }
    let text = text.trim_start_matches(['$', '€', '£']).trim_start_matches("\\$");
    let text = text.trim_end_matches('%').trim_end_matches('\\').trim();
    let all = |found: Option<core::ops::Range<usize>>| found == Some(0..text.len());
    if let Some(fraction) = FRACTION.captures(text).filter(|found| all(found.get(0).map(|whole| whole.range()))) {
        return fraction_value(&fraction);
    }
    NUMBER.find(text).filter(|found| all(Some(found.range()))).and_then(|found| parse(found.as_str()))
}

fn fraction_value(captures: &regex::Captures) -> Option<f64> {
    let part = |group: usize| captures.get(group).and_then(|text| parse(text.as_str()));
    let negative = captures.get(1).is_some_and(|sign| matches!(sign.as_str(), "-" | "−"));
    let (over, under) = part(2).zip(part(3)).or_else(|| part(4).zip(part(5)))?;
    let value = over / under;
    value.is_finite().then_some(if negative { -value } else { value })
}

fn parse(text: &str) -> Option<f64> {
    let plain = text.replace("{,}", "").replace("\\,", "").replace(',', "").replace('−', "-");
    plain.parse::<f64>().ok().filter(|value| value.is_finite())
}

/// Returns the content of the last `\boxed{…}` or `\fbox{…}`; braces within it are matched.
pub(super) fn last_boxed(text: &str) -> Option<&str> {
    let start = ["\\boxed", "\\fbox"].iter().filter_map(|name| text.rfind(name).map(|at| at + name.len())).max()?;
    let rest = text[start..].trim_start();
    let inside = rest.strip_prefix('{')?;
    let mut depth = 1_usize;
    for (at, character) in inside.char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(inside[..at].trim());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_as_people_write_them() {
        for (text, number) in [
            ("42", Some(42.0)),
            ("about 1,234.5 euros", Some(1234.5)),
            ("12,345,678", Some(12_345_678.0)),
            ("1{,}000", Some(1000.0)),
            ("a list: 1, 2, 3", Some(3.0)),
            ("x = -7.", Some(-7.0)),
            ("x = −7", Some(-7.0)),
            ("it is 3/4", Some(0.75)),
            ("3/4 of 8 is 6", Some(6.0)),
            (r"\frac{1}{3}", Some(1.0 / 3.0)),
            (r"-\dfrac{3}{2}", Some(-1.5)),
            ("6.02e23", Some(6.02e23)),
            ("1/0", None),
            (".5", Some(0.5)),
            ("none", None),
        ] {
            assert_eq!(last_number(text), number, "{text}");
        }
    }

    #[test]
    fn a_whole_text_is_a_number_without_its_signs() {
        for (text, number) in [
            (" $1,000 ", Some(1000.0)),
            ("$\\frac{1}{2}$", Some(0.5)),
            ("25\\%", Some(25.0)),
            ("25%", Some(25.0)),
            ("12 apples", None),
            ("x = 3", None),
            ("3.", Some(3.0)),
            ("", None),
        ] {
            assert_eq!(whole_number(text), number, "{text}");
        }
    }

    #[test]
    fn the_last_box_is_read_with_its_braces() {
        assert_eq!(last_boxed(r"\boxed{1} then \boxed{\frac{1}{2}}."), Some(r"\frac{1}{2}"));
        assert_eq!(last_boxed(r"\fbox{ 7 }"), Some("7"));
        assert_eq!(last_boxed(r"\boxed{1"), None);
        assert_eq!(last_boxed("none"), None);
    }
}
