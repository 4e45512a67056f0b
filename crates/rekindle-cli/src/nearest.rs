//! The name that someone probably meant.

/// The candidate that looks most like `word`, unless none looks like it at all.
pub(crate) fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // Below 0.7 the suggestions are noise: "embed" would be told "k_proj".
    let scored = candidates.into_iter().map(|candidate| (strsim::jaro_winkler(word, candidate), candidate));
    scored.filter(|(score, _)| *score >= 0.7).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, candidate)| candidate)
}

/// `; nearest: "…"`, or the whole choice where nothing is near.
pub(crate) fn hint(word: &str, candidates: &[&str]) -> String {
    match nearest(word, candidates.iter().copied()) {
        Some(name) => format!("; nearest: \"{name}\""),
        None => format!("; known: {}", candidates.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_was_meant() {
        let keys = ["learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps"];
        assert_eq!(nearest("learning_rat", keys), Some("learning_rate"));
        assert_eq!(nearest("maxsteps", keys), Some("max_steps"));
        assert_eq!(nearest("zzz", keys), None);
        assert_eq!(hint("zzz", &["a", "b"]), "; known: a, b");
    }
}
