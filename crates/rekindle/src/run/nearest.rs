//! Suggestions for misspelled names.

/// Returns the candidate that `word` probably means: the nearest misspelling, or the only candidate that contains all
/// of its parts. Returns `None` if a suggestion would be a guess.
///
/// The distance of a misspelling is at most a quarter of its length (insertions, deletions, substitutions and swapped
/// neighbours). Parts are separated by underscores: "scheduler_type" means "lr_scheduler_type".
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let candidates: Vec<&str> = candidates.into_iter().collect();
    misspelt(word, &candidates).or_else(|| abbreviated(word, &candidates))
}

fn misspelt<'a>(word: &str, candidates: &[&'a str]) -> Option<&'a str> {
    let word = word.to_lowercase();
    let allowed = ((word.chars().count() + 2) / 4).max(1);
    let measured = candidates.iter().map(|candidate| (strsim::osa_distance(&word, candidate), *candidate));
    // One letter of two is another word, not a slip.
    let near =
        measured.filter(|(distance, candidate)| *distance <= allowed && 2 * distance < candidate.chars().count());
    near.min_by_key(|(distance, _)| *distance).map(|(_, candidate)| candidate)
}

fn abbreviated<'a>(word: &str, candidates: &[&'a str]) -> Option<&'a str> {
    let has_all = |candidate: &&&str| {
        let parts: Vec<&str> = candidate.split('_').collect();
        word.split('_').all(|part| parts.contains(&part))
    };
    // One part alone may be part of anything.
    let mut found = candidates.iter().filter(|candidate| word.contains('_') && has_all(candidate));
    match (found.next(), found.next()) {
        (Some(only), None) => Some(only),
        _ => None,
    }
}

/// Returns `; nearest: "…"`, or all candidates if none is near.
pub(super) fn hint(word: &str, candidates: &[&str]) -> String {
    match nearest(word, candidates.iter().copied()) {
        Some(name) => format!("; nearest: \"{name}\""),
        None => format!("; known: {}", candidates.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: [&str; 8] = [
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "max_steps",
        "eval_steps",
        "save_total_limit",
        "per_device_train_batch_size",
        "r",
    ];

    #[test]
    fn finds_what_was_meant() {
        for (word, meant) in [
            ("learning_rat", "learning_rate"),
            ("maxsteps", "max_steps"),
            ("Max_Steps", "max_steps"),
            ("warmpu_steps", "warmup_steps"),
            ("scheduler_type", "lr_scheduler_type"),
            ("train_batch_size", "per_device_train_batch_size"),
        ] {
            assert_eq!(nearest(word, KEYS), Some(meant), "{word}");
        }
        assert_eq!(hint("zzz", &["a", "b"]), "; known: a, b");
    }

    #[test]
    fn does_not_guess() {
        for word in
            ["zzz", "steps", "group_by_length", "label_smoothing_factor", "metric_for_best_model", "lr", "x", "tf32"]
        {
            assert_eq!(nearest(word, KEYS), None, "{word}");
        }
    }
}
