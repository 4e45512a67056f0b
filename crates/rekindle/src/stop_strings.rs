//! Texts that end a generation.

use rekindle_data::Tokenizer;

use crate::Error;

/// A search for stop strings in a text that arrives in pieces. It holds back a possible beginning of one.
#[derive(Clone, Debug, Default)]
pub(crate) struct StopStrings {
    stops: Vec<String>,
    held: String,
}

impl StopStrings {
    /// Returns a search for the stop strings that are texts, and the ids of those that are a single special token,
    /// which no text contains.
    ///
    /// # Errors
    /// [`Error::Argument`] for an empty string, and for one with a special token among other text.
    pub(crate) fn new(tokenizer: &Tokenizer, stops: &[String]) -> Result<(Self, Vec<u32>), Error> {
        let (mut texts, mut ids) = (Vec::new(), Vec::new());
        for stop in stops {
            if stop.is_empty() {
                return Err(Error::Argument("a stop string is empty; remove it".to_owned()));
            }
            if let Some(id) = tokenizer.token_to_id(stop).filter(|&id| tokenizer.is_special(id)) {
                ids.push(id);
                continue;
            }
            let special = tokenizer.encode(stop, false)?.into_iter().find(|&id| tokenizer.is_special(id));
            if let Some(token) = special.and_then(|id| tokenizer.id_to_token(id)) {
                return Err(Error::Argument(format!(
                    "stop string {stop:?} contains the special token {token}, which generated text does not include; \
                     pass the token alone"
                )));
            }
            texts.push(stop.clone());
        }
        Ok((Self { stops: texts, held: String::new() }, ids))
    }

    /// Adds the next piece of the text. Returns the text that certainly precedes any stop string, and the stop string
    /// if one is complete; of several, the one that begins first.
    pub(crate) fn push(&mut self, piece: &str) -> (String, Option<String>) {
        self.held.push_str(piece);
        let found = self.stops.iter().filter_map(|stop| Some((self.held.find(stop.as_str())?, stop)));
        if let Some((at, stop)) = found.min_by_key(|(at, _)| *at) {
            let stop = stop.clone();
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), Some(stop));
        }
        let may_begin = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let first = self.held.len().saturating_sub(longest.saturating_sub(1));
        let starts = (first..self.held.len()).filter(|&at| self.held.is_char_boundary(at));
        let certain = starts.into_iter().find(may_begin).unwrap_or(self.held.len());
        let rest = self.held.split_off(certain);
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// Returns the text that was held back, at the end of the generation.
    pub(crate) fn finish(self) -> String {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the pieces that were passed on, and the stop string that was found.
    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, Option<String>) {
        let stops = stops.iter().map(|&stop| stop.to_owned()).collect();
        let mut strings = StopStrings { stops, held: String::new() };
        let mut shown = Vec::new();
        for piece in pieces {
            let (certain, found) = strings.push(piece);
            shown.push(certain);
            if found.is_some() {
                return (shown, found);
            }
        }
        shown.push(strings.finish());
        (shown, None)
    }

    #[test]
    fn a_stop_string_is_cut_wherever_pieces_end() {
        let text = "one\n\nUser: two";
        for cut in 0..text.len() {
            for second in cut..text.len() {
                let pieces = [&text[..cut], &text[cut..second], &text[second..]];
                let (shown, found) = run(&["\nUser:"], &pieces);
                assert_eq!((shown.concat().as_str(), found.as_deref()), ("one\n", Some("\nUser:")), "{pieces:?}");
            }
        }
    }

    #[test]
    fn only_what_may_begin_one_is_held_back() {
        let (shown, found) = run(&["END"], &["a E", "N", "d E", "EN", "D"]);
        assert_eq!(shown, ["a ", "", "ENd ", "E", ""]);
        assert_eq!(found.as_deref(), Some("END"));
        let (shown, found) = run(&["END", "xyz"], &["a EN"]);
        assert_eq!((shown, found), (vec!["a ".to_owned(), "EN".to_owned()], None));
        assert_eq!(run(&[], &["a", "b"]).0, ["a", "b", ""]);
    }

    #[test]
    fn the_first_of_several_ends_the_text() {
        assert_eq!(run(&["later", "at"], &["it is at", " later"]), (vec!["it is ".to_owned()], Some("at".to_owned())));
        // One that begins another, and one inside of another.
        assert_eq!(run(&["abcd", "bc"], &["xab", "c"]), (vec!["x".to_owned(), "a".to_owned()], Some("bc".to_owned())));
    }

    #[test]
    fn characters_of_several_bytes() {
        assert_eq!(run(&["é!"], &["aé", "b", "é", "!"]).0, ["a", "éb", "", ""]);
        assert_eq!(
            run(&["日本"], &["日", "日", "本"]),
            (["", "日", ""].map(str::to_owned).to_vec(), Some("日本".to_owned()))
        );
    }
}
