//! Rewriting of operators whose operands need checks that the engine has no hook for.
//!
//! - `~` formats numbers as Rust does in the engine, and must format them as Python does. `a ~ b * 2` becomes
//!   `__text(a) ~ __text(b * 2)`.
//! - `+` of lists is lazy in the engine, so a list that is added to itself some forty times has too many elements to visit
//!   and takes no steps. `a + b` becomes `__list(a) + __list(b)`, which counts a step for each element. Sums with a string
//!   literal contain no lists.

use std::ops::Range;

/// The name of the function that returns the text of a value.
pub(super) const TEXT: &str = "__text";
/// The name of the function that counts steps for the elements of a list.
pub(super) const LIST: &str = "__list";

/// Returns the source with [`TEXT`] around every operand of `~` and [`LIST`] around those of `+`. Line numbers do not
/// change.
pub(super) fn as_calls(source: &str) -> String {
    if !source.contains(['~', '+']) {
        return source.to_owned();
    }
    let mut operands = Vec::new();
    let mut at = 0;
    while let Some((open, kind)) = next_delimiter(source, at) {
        let inside = open + 2;
        at = match kind {
            b'#' => source[inside..].find("#}").map_or(source.len(), |len| inside + len + 2),
            b'%' if tag_name(&source[inside..]) == "raw" => end_of_raw(source, inside),
            _ => Scanner::new(source, inside, kind == b'%').scan(&mut operands),
        };
    }
    insert(source, &operands)
}

/// The position of an operand, and the function for it.
type Operand = (Range<usize>, &'static str);

/// Writes the calls around the operands, which may be nested.
fn insert(source: &str, operands: &[Operand]) -> String {
    let mut places: Vec<(usize, Option<&str>)> = operands
        .iter()
        .flat_map(|(operand, function)| [(operand.start, Some(*function)), (operand.end, None)])
        .collect();
    // Where one ends and another begins, or encloses it.
    places.sort_by_key(|&(at, opens)| (at, opens.is_some()));
    let mut out = String::with_capacity(source.len() + places.len() * TEXT.len());
    let mut copied = 0;
    for (at, opens) in places {
        out.push_str(&source[copied..at]);
        copied = at;
        match opens {
            Some(function) => out.extend([function, "("]),
            None => out.push(')'),
        }
    }
    out.push_str(&source[copied..]);
    out
}

/// Returns the position of the next `{{`, `{%` or `{#`, and its second character.
fn next_delimiter(source: &str, from: usize) -> Option<(usize, u8)> {
    let bytes = source.as_bytes();
    let is_open = |at: &usize| bytes[*at] == b'{' && matches!(bytes.get(at + 1), Some(b'{' | b'%' | b'#'));
    (from..bytes.len()).find(is_open).map(|at| (at, bytes[at + 1]))
}

/// Returns the first word of a tag.
fn tag_name(inside: &str) -> &str {
    let rest = inside.trim_start_matches(['-', '+']).trim_start();
    &rest[..rest.find(|c: char| !c.is_alphanumeric()).unwrap_or(rest.len())]
}

fn end_of_raw(source: &str, from: usize) -> usize {
    let mut at = from;
    while let Some(len) = source[at..].find("{%") {
        at += len + 2;
        if tag_name(&source[at..]) == "endraw" {
            return at;
        }
    }
    source.len()
}

/// A scanner of the expressions between `{{` or `{%` and their end.
struct Scanner<'a> {
    source: &'a str,
    at: usize,
    /// The open groups: the region itself, and brackets in it.
    groups: Vec<Group>,
    /// The previous token.
    previous: Previous,
}

/// Expressions between two brackets.
#[derive(Default)]
struct Group {
    /// The current operand.
    operand: Option<Range<usize>>,
    /// The number of its tokens.
    tokens: usize,
    /// True if its only token is a string.
    is_string: bool,
    /// The operator before it.
    before: Join,
    /// The other operands of its sum.
    sum: Vec<Range<usize>>,
    /// True if the sum is a string.
    sum_is_string: bool,
}

/// The text between two operands.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Join {
    /// An operator with a lower precedence than `~`, or nothing.
    #[default]
    Other,
    Concat,
    Add,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Previous {
    /// The beginning, an operator or an opening bracket.
    Other,
    /// Something that a binary operator can follow.
    Operand,
    /// `.` or `|`, after which a name is never a keyword.
    Access,
    /// `is`, or `is not`.
    Is,
    /// The beginning of a tag, whose first word is its name.
    Tag,
}

impl<'a> Scanner<'a> {
    fn new(source: &'a str, at: usize, is_tag: bool) -> Self {
        let previous = if is_tag { Previous::Tag } else { Previous::Other };
        // A sign beside the delimiter controls white space.
        let at = at + usize::from(source[at..].starts_with(['-', '+']));
        Scanner { source, at, groups: vec![Group::default()], previous }
    }

    /// Adds the operands of `~`; returns the end of the region.
    fn scan(mut self, operands: &mut Vec<Operand>) -> usize {
        let bytes = self.source.as_bytes();
        while let Some(&byte) = bytes.get(self.at) {
            let next = bytes.get(self.at + 1).copied().unwrap_or_default();
            let start = self.at;
            match byte {
                b'%' | b'}' if next == b'}' && self.groups.len() == 1 => {
                    self.end_operand(operands, Join::Other);
                    return self.at + 2;
                }
                _ if byte.is_ascii_whitespace() => self.at += 1,
                b'"' | b'\'' => {
                    self.at = string_end(bytes, start);
                    self.token(start, true);
                    self.previous = Previous::Operand;
                }
                _ if byte == b'_' || byte.is_ascii_alphanumeric() || byte >= 0x80 => {
                    let is_part = |c: char| c == '_' || c.is_alphanumeric();
                    let word = &self.source[start..];
                    let word = &word[..word.find(|c| !is_part(c)).unwrap_or(word.len()).max(1)];
                    self.at += word.len();
                    // The sign of an exponent is no operator.
                    let is_number = |digits: &str| digits.bytes().all(|b| b.is_ascii_digit() || b == b'_');
                    if word.strip_suffix(['e', 'E']).is_some_and(|digits| !digits.is_empty() && is_number(digits)) {
                        let rest = &bytes[self.at..];
                        self.at += usize::from(matches!(rest, [b'+' | b'-', b'0'..=b'9', ..]));
                    }
                    self.word(word, start, operands);
                }
                b'(' | b'[' | b'{' => {
                    self.at += 1;
                    self.token(start, false);
                    self.groups.push(Group::default());
                    self.previous = Previous::Other;
                }
                b')' | b']' | b'}' => {
                    self.at += 1;
                    self.end_operand(operands, Join::Other);
                    if self.groups.len() > 1 {
                        self.groups.pop();
                    }
                    self.token(start, false);
                    self.previous = Previous::Operand;
                }
                b'.' | b'|' => {
                    self.at += 1;
                    self.token(start, false);
                    self.previous = Previous::Access;
                }
                b'~' => {
                    self.end_operand(operands, Join::Concat);
                    self.at += 1;
                    self.previous = Previous::Other;
                }
                // The end of the region controls white space.
                b'-' | b'+' if matches!(next, b'%' | b'}') && self.groups.len() == 1 => self.at += 1,
                // A sign is part of its operand; between two operands the same characters bind less than `~`.
                b'-' | b'+' if self.previous != Previous::Operand => self.operator(1, start),
                b'*' | b'/' if next == byte => self.operator(2, start),
                b'*' | b'/' | b'%' => self.operator(1, start),
                b'+' => {
                    self.end_operand(operands, Join::Add);
                    self.at += 1;
                    self.previous = Previous::Other;
                }
                // `-`, comparisons, `=`, `,`, `:`.
                _ => {
                    self.end_operand(operands, Join::Other);
                    self.at += self.source[start..].chars().next().map_or(1, char::len_utf8);
                    self.previous = Previous::Other;
                }
            }
        }
        self.source.len()
    }

    /// Handles an operator with a higher precedence than `~`.
    fn operator(&mut self, len: usize, start: usize) {
        self.at += len;
        self.token(start, false);
        self.previous = Previous::Other;
    }

    fn word(&mut self, word: &str, start: usize, operands: &mut Vec<Operand>) {
        let keyword = match self.previous {
            Previous::Tag => true,
            Previous::Access => false,
            Previous::Is => word == "and" || word == "or" || word == "if" || word == "else",
            _ => matches!(word, "and" | "or" | "not" | "in" | "if" | "else"),
        };
        if keyword {
            self.end_operand(operands, Join::Other);
            self.previous = Previous::Other;
            return;
        }
        self.token(start, false);
        self.previous = match word {
            "is" if self.previous == Previous::Operand => Previous::Is,
            "not" if self.previous == Previous::Is => Previous::Is,
            _ => Previous::Operand,
        };
    }

    /// Adds a token to the current operand, from `start` to the scanner's position.
    fn token(&mut self, start: usize, is_string: bool) {
        let group = self.groups.last_mut().expect("the region is always open");
        group.tokens += 1;
        group.is_string = is_string && group.tokens == 1;
        match &mut group.operand {
            Some(operand) => operand.end = self.at,
            None => group.operand = Some(start..self.at),
        }
    }

    /// Ends the current operand; `after` follows it.
    fn end_operand(&mut self, operands: &mut Vec<Operand>, after: Join) {
        let group = self.groups.last_mut().expect("the region is always open");
        let (before, is_string) = (group.before, group.is_string);
        let is = |join| before == join || after == join;
        if let Some(operand) = group.operand.take() {
            group.sum_is_string |= is_string || is(Join::Concat);
            if is(Join::Concat) && !is_string {
                operands.push((operand, TEXT));
            } else if is(Join::Add) && !is_string {
                group.sum.push(operand);
            }
        }
        if after == Join::Other {
            let sum = std::mem::take(&mut group.sum);
            if !group.sum_is_string {
                operands.extend(sum.into_iter().map(|operand| (operand, LIST)));
            }
            *group = Group::default();
        }
        (group.before, group.tokens, group.is_string) = (after, 0, false);
    }
}

fn string_end(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            byte if byte == bytes[start] => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calls(source: &str) -> String {
        as_calls(source).replace(TEXT, "T").replace(LIST, "L")
    }

    #[test]
    fn operands_are_those_of_jinja() {
        for (source, expected) in [
            ("{{ a ~ b }}", "{{ T(a) ~ T(b) }}"),
            ("{{- 'x' ~ a.b['c']|trim(' ') ~ \"~\" -}}", "{{- 'x' ~ T(a.b['c']|trim(' ')) ~ \"~\" -}}"),
            ("{{ a + b ~ c - d }}", "{{ a + T(b) ~ T(c) - d }}"),
            ("{{ a + b - c + f(d + 1) }}", "{{ L(a) + L(b) - L(c) + L(f(L(d) + L(1))) }}"),
            ("{{ 'x' + a + b }}{{ a + b + 'x' }}", "{{ 'x' + a + b }}{{ a + b + 'x' }}"),
            ("{%- set ns.x = ns.x + [m] +%}", "{%- set ns.x = L(ns.x) + L([m]) +%}"),
            ("{{ 1e-5 ~ 1.5E+3 ~ 2e3 ~ e-1 }}", "{{ T(1e-5) ~ T(1.5E+3) ~ T(2e3) ~ T(e)-1 }}"),
            ("{{ -a + +b }}{{+ a }}", "{{ L(-a) + L(+b) }}{{+ a }}"),
            ("{{ a * 2 ~ -b ** 2 ~ c // d % e }}", "{{ T(a * 2) ~ T(-b ** 2) ~ T(c // d % e) }}"),
            ("{{ a ~ b == c ~ d and not e ~ f }}", "{{ T(a) ~ T(b) == T(c) ~ T(d) and not T(e) ~ T(f) }}"),
            ("{{ a ~ b if c ~ d else e ~ f }}", "{{ T(a) ~ T(b) if T(c) ~ T(d) else T(e) ~ T(f) }}"),
            ("{{ f(a ~ b, x=c ~ d)[e ~ f] ~ g }}", "{{ T(f(T(a) ~ T(b), x=T(c) ~ T(d))[T(e) ~ T(f)]) ~ T(g) }}"),
            ("{{ {'k': a ~ b} }}{{ (a ~ b) ~ c }}", "{{ {'k': T(a) ~ T(b)} }}{{ T((T(a) ~ T(b))) ~ T(c) }}"),
            ("{{ x is not none ~ y is in [1] ~ z }}", "{{ T(x is not none) ~ T(y is in [1]) ~ T(z) }}"),
            ("{{ m.in ~ m.not|if ~ 1.5 }}", "{{ T(m.in) ~ T(m.not|if) ~ T(1.5) }}"),
            ("{%- set x = a ~ b -%}", "{%- set x = T(a) ~ T(b) -%}"),
            ("{% if a ~ b in c ~ d %}", "{% if T(a) ~ T(b) in T(c) ~ T(d) %}"),
            ("{% for x in a ~ b if x ~ y %}", "{% for x in T(a) ~ T(b) if T(x) ~ T(y) %}"),
            ("{% elif not a ~ 'b' %}", "{% elif not T(a) ~ 'b' %}"),
        ] {
            assert_eq!(calls(source), expected);
        }
    }

    #[test]
    fn what_is_no_expression_stays() {
        for source in [
            "~ a ~ b {# a ~ b #} {{ '~ }}' }}",
            "{% raw %}{{ a ~ b }}{% endraw %}",
            "{%- raw -%}{{ a ~ b }}{% if %}{%- endraw %}",
            "{{ a",
            "{{ '~",
            "{# ~",
            "{% raw %}~",
        ] {
            assert_eq!(calls(source), source);
        }
        assert_eq!(
            calls("{% raw %}{{ a ~ b }}{% endraw %}{{ a ~ b }}"),
            "{% raw %}{{ a ~ b }}{% endraw %}{{ T(a) ~ T(b) }}"
        );
        assert_eq!(
            calls("{{ '}}' ~ a }} ~ {{ b ~ {'c': {'d': 1}} }}"),
            "{{ '}}' ~ T(a) }} ~ {{ T(b) ~ T({'c': {'d': 1}}) }}"
        );
    }
}
