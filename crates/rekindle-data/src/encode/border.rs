//! The border between what is given and what is learned, where a token would span both.

use crate::tokenizer::{Tokenized, Tokenizer};

/// The tokens of `text`, which is already encoded as a whole, with what stands before and after each border encoded apart
/// where a token spans it; and whether one does.
///
/// A model is given the text up to the border and makes the rest. So the tokens of "It is " and "the" are what it will see
/// and what it has to make, and " the" is a token that it could not. Where a tokenizer writes the parts otherwise than the
/// whole (some put a space before every text), the whole stays.
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
