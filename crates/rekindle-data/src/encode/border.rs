//! The border between prompt and completion, if a token would span it.

use crate::tokenizer::{Tokenized, Tokenizer};

/// Encodes the parts before and after each border separately if a token of `text`, encoded as a whole, spans the
/// border. Also returns true if one does.
///
/// A model receives the text up to the border and generates the rest: after the tokens of "It is " it generates "the",
/// and could not generate the token " the". If the tokenizer encodes the parts differently from the whole (some add a
/// space before every text), the encoding of the whole is kept.
pub(super) fn split(
    tokenizer: &Tokenizer,
    text: &str,
    whole: Tokenized,
    borders: impl IntoIterator<Item = usize>,
) -> Result<(Tokenized, bool), String> {
    let spans =
        |border: &usize| whole.places.iter().flatten().any(|place| place.start < *border && *border < place.end);
    let borders: Vec<usize> = borders.into_iter().filter(spans).collect();
    if borders.is_empty() {
        return Ok((whole, false));
    }
    // What the post-processor put around the text stays.
    let added = |tokens: &mut dyn Iterator<Item = &Option<_>>| tokens.take_while(|place| place.is_none()).count();
    let (before, after) = (added(&mut whole.places.iter()), added(&mut whole.places.iter().rev()));
    let end = whole.ids.len() - after;
    let (mut ids, mut places) = (whole.ids[..before].to_vec(), whole.places[..before].to_vec());
    let mut start = 0;
    for border in borders.into_iter().chain([text.len()]) {
        let piece = tokenizer.encode_with_places(&text[start..border], false).map_err(super::text_error)?;
        ids.extend(piece.ids);
        let moved = piece.places.into_iter().map(|place| place.map(|place| place.start + start..place.end + start));
        places.extend(moved);
        start = border;
    }
    let decode = |ids: &[u32]| tokenizer.decode(ids, false).map_err(super::text_error);
    if decode(&ids[before..])? != decode(&whole.ids[before..end])? {
        return Ok((whole, true));
    }
    ids.extend_from_slice(&whole.ids[end..]);
    places.extend_from_slice(&whole.places[end..]);
    Ok((Tokenized { ids, places }, true))
}
