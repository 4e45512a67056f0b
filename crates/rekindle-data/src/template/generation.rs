//! `{% generation %}` blocks, with which a template marks the assistant's text.

use std::ops::Range;

/// The filter that replaces a block.
pub(super) const FILTER: &str = "__generation";
/// The marks at the beginning and end of a block: private-use characters, which no template rewrites.
const OPEN: &str = "\u{f5a3}\u{f1c8}\u{f5a3}";
const CLOSE: &str = "\u{f5a3}\u{f1c9}\u{f5a3}";

/// Returns the source with `{% filter … %}{% with %}` … `{% endwith %}{% endfilter %}` for `{% generation %}` … `{%
/// endgeneration %}`, which the engine does not support, and true if there are any. A block has its own scope and
/// white-space control, like any tag.
pub(super) fn as_filters(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let mut found = false;
    while let Some(open) = rest.find("{%") {
        let (before, tag) = rest.split_at(open);
        out.push_str(before);
        match generation_tag(tag) {
            Some((replacement, len)) => {
                found = true;
                out.push_str(&replacement);
                rest = &tag[len..];
            }
            None => {
                out.push_str("{%");
                rest = &tag[2..];
            }
        }
    }
    out.push_str(rest);
    (out, found)
}

/// Encloses the output of a block in marks.
pub(super) fn enclose(text: &str) -> String {
    format!("{OPEN}{text}{CLOSE}")
}

/// Returns the text without the marks, and the marked ranges. A mark without a counterpart is kept.
pub(super) fn extract(marked: &str) -> (String, Vec<Range<usize>>) {
    let (mut text, mut spans) = (String::with_capacity(marked.len()), Vec::new());
    let mut rest = marked;
    while let Some((before, block)) = rest.split_once(OPEN)
        && let Some((inside, after)) = block.split_once(CLOSE)
    {
        text.push_str(before);
        let start = text.len();
        text.push_str(inside);
        if !inside.is_empty() {
            spans.push(start..text.len());
        }
        rest = after;
    }
    text.push_str(rest);
    (text, spans)
}

/// Returns the replacement of the tag at the beginning of `text` and the tag's length, if it is one of the two.
fn generation_tag(text: &str) -> Option<(String, usize)> {
    let len = text.find("%}")? + 2;
    let inner = &text[2..len - 2];
    let (open, inner) = control(inner.chars().next()).map_or(("", inner), |sign| (sign, &inner[1..]));
    let (close, inner) = control(inner.chars().last()).map_or(("", inner), |sign| (sign, &inner[..inner.len() - 1]));
    let tags = match inner.trim() {
        "generation" => format!("{{%{open} filter {FILTER} %}}{{% with {close}%}}"),
        "endgeneration" => format!("{{%{open} endwith %}}{{% endfilter {close}%}}"),
        _ => return None,
    };
    Some((tags, len))
}

/// Returns the white-space control next to a delimiter.
fn control(sign: Option<char>) -> Option<&'static str> {
    match sign {
        Some('-') => Some("-"),
        Some('+') => Some("+"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_two_tags_change() {
        assert_eq!(
            as_filters("{% if x %}{%- generation -%} a {%+endgeneration%}{% endif %}{{ generation }}"),
            (
                "{% if x %}{%- filter __generation %}{% with -%} a {%+ endwith %}{% endfilter %}{% endif %}\
                 {{ generation }}"
                    .to_owned(),
                true
            )
        );
        for source in ["{% unclosed generation", "{%%}", "{% generations %}"] {
            assert_eq!(as_filters(source), (source.to_owned(), false));
        }
    }

    #[test]
    fn marks_leave_the_text_as_it_was() {
        let marked = format!("a{OPEN}bä{CLOSE}{OPEN}{CLOSE}c{OPEN}d{CLOSE}");
        assert_eq!(extract(&marked), ("abäcd".to_owned(), vec![1..4, 5..6]));
        let broken = format!("a{OPEN}b");
        assert_eq!(extract(&broken), (broken.clone(), vec![]));
    }
}
