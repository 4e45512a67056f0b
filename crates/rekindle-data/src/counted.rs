/// Returns a number with its noun, in the plural unless it is 1.
///
/// ```
/// use rekindle_data::counted;
/// assert_eq!([counted(1, "step"), counted(400, "step")], ["1 step", "400 steps"]);
/// assert_eq!([counted(0, "pass"), counted(2, "batch")], ["0 passes", "2 batches"]);
/// ```
pub fn counted(count: usize, noun: &str) -> String {
    match count {
        1 => format!("1 {noun}"),
        _ if ["ss", "x", "tch"].iter().any(|end| noun.ends_with(end)) => format!("{count} {noun}es"),
        _ => format!("{count} {noun}s"),
    }
}
