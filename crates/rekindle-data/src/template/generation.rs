/// Replaces `{% generation %}` … `{% endgeneration %}` by `{% with %}` … `{% endwith %}`: the engine lacks the tag, whose
/// only visible effects are a scope and the white space that its delimiters control.
pub(super) fn neutralize(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let (before, tag) = rest.split_at(open);
        out.push_str(before);
        match generation_tag(tag) {
            Some((replacement, len)) => {
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
    out
}

/// The replacement of the tag at the beginning of `text` and the tag's length, if it is one of the two.
fn generation_tag(text: &str) -> Option<(String, usize)> {
    let len = text.find("%}")? + 2;
    let inner = &text[2..len - 2];
    let (open, inner) = control(inner.chars().next()).map_or(("", inner), |sign| (sign, &inner[1..]));
    let (close, inner) = control(inner.chars().last()).map_or(("", inner), |sign| (sign, &inner[..inner.len() - 1]));
    let word = match inner.trim() {
        "generation" => "with",
        "endgeneration" => "endwith",
        _ => return None,
    };
    Some((format!("{{%{open} {word} {close}%}}"), len))
}

/// The white-space control beside a delimiter.
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
            neutralize("{% if x %}{%- generation -%} a {%+endgeneration%}{% endif %}{{ generation }}"),
            "{% if x %}{%- with -%} a {%+ endwith %}{% endif %}{{ generation }}"
        );
        assert_eq!(neutralize("{% unclosed generation"), "{% unclosed generation");
        assert_eq!(neutralize("{%%}"), "{%%}");
    }
}
