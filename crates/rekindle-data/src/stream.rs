use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// A decoder of a growing sequence of ids, in pieces that together are the text of the whole.
///
/// A token may end within a character, and a decoder may treat the first token of a text differently. Therefore ids are
/// decoded in a window that begins with tokens already returned, and a piece with an incomplete character is held back.
#[derive(Debug)]
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    /// Ids of the window; `ids[..context]` were returned before and only give context.
    ids: Vec<u32>,
    context: usize,
    /// Bytes of the window's text that were returned.
    shown: usize,
}

impl<'a> StreamDecoder<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> Self {
        StreamDecoder { tokenizer, skip_special, ids: Vec::new(), context: 0, shown: 0 }
    }

    /// Adds an id; returns the new text that is complete, if any.
    ///
    /// # Errors
    /// An error if the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids, self.skip_special)?;
        let certain = text.trim_end_matches(char::REPLACEMENT_CHARACTER);
        let piece = self.show(certain);
        if !text.is_empty() && certain.len() == text.len() {
            self.ids.drain(..self.context);
            self.context = self.ids.len();
            self.shown = self.tokenizer.decode(&self.ids, self.skip_special)?.len();
        }
        Ok(piece)
    }

    /// Returns the remaining text, with `U+FFFD` for incomplete characters.
    ///
    /// # Errors
    /// An error if the tokenizer's decoder fails.
    pub fn finish(mut self) -> Result<Option<String>> {
        let text = self.tokenizer.decode(&self.ids, self.skip_special)?;
        Ok(self.show(&text))
    }

    fn show(&mut self, text: &str) -> Option<String> {
        // If a decoder revises earlier text, `shown` can be inside a character.
        let from = (self.shown..text.len()).find(|&at| text.is_char_boundary(at))?;
        self.shown = text.len();
        Some(text[from..].to_owned())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::Tokenizer;
    use crate::test_support::{CHATML, tokenizer, write_json};

    /// Returns the pieces and the rest of a stream over `ids`.
    fn stream(ids: &[u32], skip_special: bool) -> (Vec<Option<String>>, Option<String>) {
        let (_dir, tokenizer) = tokenizer(CHATML);
        let mut decoder = tokenizer.stream_decoder(skip_special);
        let pieces = ids.iter().map(|&id| decoder.push(id).expect("decodable")).collect();
        (pieces, decoder.finish().expect("decodable"))
    }

    #[test]
    fn pieces_make_up_the_text() {
        let (_dir, tokenizer) = tokenizer(CHATML);
        for text in ["", "hello  world", "grüße 🦀🦀!", "日本語\n<|im_end|> x", "a\u{fffd}b"] {
            let ids = tokenizer.encode(text, false).expect("encodable");
            let (pieces, rest) = stream(&ids, false);
            assert_eq!(pieces.into_iter().chain([rest]).flatten().collect::<String>(), text);
        }
    }

    #[test]
    fn a_character_waits_for_its_last_byte() {
        let (_dir, tokenizer) = tokenizer(CHATML);
        let ids = tokenizer.encode("🦀", false).expect("encodable");
        assert_eq!(ids.len(), 4);
        let (pieces, rest) = stream(&ids, false);
        assert_eq!((pieces, rest), (vec![None, None, None, Some("🦀".to_owned())], None));
        let (pieces, rest) = stream(&ids[..3], false);
        assert_eq!((pieces, rest), (vec![None; 3], Some("\u{fffd}".to_owned())));
    }

    #[test]
    fn special_tokens_are_shown_or_not() {
        let (_dir, tokenizer) = tokenizer(CHATML);
        let ids = tokenizer.encode("a<|im_end|>b", false).expect("encodable");
        let text = |skip| stream(&ids, skip).0.into_iter().flatten().collect::<Vec<_>>();
        assert_eq!(text(true), ["a", "b"]);
        assert_eq!(text(false), ["a", "<|im_end|>", "b"]);
    }

    /// The decoder of a Llama 2 checkpoint: words include their space, which the first word loses; unknown characters
    /// are bytes.
    #[test]
    fn words_keep_their_spaces_and_bytes_wait() {
        let vocab = json!({"<unk>": 0, "▁a": 1, "b": 2, "<0xC3>": 3, "<0xA9>": 4, "<0x62>": 5});
        let decoders = json!([
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]);
        let dir = tempfile::tempdir().expect("a directory");
        let file = json!({
            "version": "1.0", "added_tokens": [],
            "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>", "byte_fallback": true},
            "decoder": {"type": "Sequence", "decoders": decoders},
        });
        write_json(dir.path(), "tokenizer.json", &file);
        let tokenizer = Tokenizer::from_dir(dir.path()).expect("valid");
        let pieces = |ids: &[u32]| {
            let mut decoder = tokenizer.stream_decoder(true);
            ids.iter().map(|&id| decoder.push(id).expect("decodable").unwrap_or_default()).collect::<Vec<_>>()
        };
        assert_eq!(pieces(&[1, 1, 2, 3, 4, 1]), ["a", " a", "b", "", "é", " a"]);
        assert_eq!(pieces(&[2, 3, 2]), ["b", "", "\u{fffd}b"]);
        // A returned byte becomes part of invalid UTF-8: text that was returned is not revised.
        assert_eq!(pieces(&[5, 3, 5, 1]), ["b", "", "", "\u{fffd}\u{fffd} a"]);
    }
}
