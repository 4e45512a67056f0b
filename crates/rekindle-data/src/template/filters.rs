//! Filters and methods that convert values to text as Python does, unlike the engine.

use minijinja::filters;
use minijinja::value::{Kwargs, Rest, StringInput, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, State, Value};

use super::python::text;

pub(super) fn add(environment: &mut Environment<'static>) {
    environment.add_filter("string", text);
    environment.add_filter("upper", upper);
    environment.add_filter("lower", lower);
    environment.add_filter("trim", trim);
    environment.add_filter("join", join);
    environment.add_filter("format", format);
    environment.set_unknown_method_callback(method);
}

/// Counts a step for each element of a list.
pub(super) fn counted(state: &State<'_, '_>, value: &Value) -> Result<Value, Error> {
    if matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
        state.consume_fuel(value.len().unwrap_or_default() as u64)?;
    }
    Ok(value.clone())
}

fn upper(state: &State<'_, '_>, value: &Value) -> Result<Value, Error> {
    Ok(filters::upper(StringInput::new(state, &text(state, value)?)?))
}

fn lower(state: &State<'_, '_>, value: &Value) -> Result<Value, Error> {
    Ok(filters::lower(StringInput::new(state, &text(state, value)?)?))
}

fn trim(state: &State<'_, '_>, value: &Value, chars: Option<String>) -> Result<Value, Error> {
    Ok(filters::trim(StringInput::new(state, &text(state, value)?)?, chars.map(Into::into)))
}

fn join(
    state: &mut State<'_, '_>,
    value: &Value,
    joiner: Option<StringInput<'_>>,
    attribute: Option<&str>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let has_attribute = attribute.is_some() || kwargs.has("attribute");
    if has_attribute || !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
        return filters::join(state, value, joiner, attribute, kwargs);
    }
    let mut items = Vec::new();
    for item in value.try_iter()? {
        state.consume_fuel(1)?;
        items.push(text(state, &item)?);
    }
    filters::join(state, &Value::from(items), joiner, attribute, kwargs)
}

/// Implements `"%s"
/// format(value)`, with Python's text of lists and dicts.
fn format(state: &mut State<'_, '_>, format: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let names_values = format.as_str().is_some_and(|format| format.contains("%("));
    let texts = args.0.into_iter().map(|arg| match arg.as_object().is_some() && !arg.is_kwargs() && !names_values {
        true => text(state, &arg).map(ValueOrKwargs::from),
        false => Ok(arg),
    });
    let texts = texts.collect::<Result<_, Error>>()?;
    filters::format(state, format, Rest(texts))
}

/// Implements Python's methods. `"{}".format(value)` passes texts if the format requires nothing else.
fn method(state: &mut State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let format = value.as_str().filter(|_| name == "format");
    if let Some(format) = format {
        state.consume_fuel(width(format, args) / 64)?;
    }
    if format.is_none_or(|format| format.contains([':', '!', '.', '['])) {
        return minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args);
    }
    let texts = args.iter().map(|arg| if arg.is_kwargs() { Ok(arg.clone()) } else { text(state, arg) });
    let texts = texts.collect::<Result<Vec<_>, _>>()?;
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, &texts)
}

/// Returns the number of bytes that the widths and precisions of a format request: all its numbers, and the arguments
/// that are widths.
fn width(format: &str, args: &[Value]) -> u64 {
    let numbers = format.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    let of_format = numbers.map(|digits| digits.parse().unwrap_or(u64::MAX)).fold(0, u64::saturating_add);
    let is_nested =
        format.split(':').skip(1).any(|spec| spec.trim_start_matches(|c| c != '{' && c != '}').starts_with('{'));
    let of_args = args.iter().filter_map(Value::as_i64).map(i64::unsigned_abs).fold(0, u64::saturating_add);
    of_format.saturating_add(if is_nested { of_args } else { 0 })
}
