//! Copying exercises with random words of the world.
//!
//! Every answer of the instruction set copies words from its question. In stories one word predicts the next, so a
//! small model is slow to learn copying instead of guessing. Random words cannot be guessed.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use super::scene::pick;
use super::world::{ANIMALS, COLOURS, DAYS, GOODS, MOVES, NUMBERS, PEOPLE, PLACES, SHOPS};

/// Returns `Say: kites Monday river` and `kites Monday river`.
pub(super) fn repeated(rng: &mut ChaCha8Rng) -> (String, String) {
    let words = words(rng).join(" ");
    (format!("Say: {words}"), words)
}

/// Returns `kites, Monday, river` and, on the next line, the same as a JSON list.
pub(super) fn quoted(rng: &mut ChaCha8Rng) -> String {
    let words = words(rng);
    format!("{}\n{}", words.join(", "), json!(words))
}

/// Returns `three, nine, two` and, on the next line, `[3,9,2]`.
pub(super) fn counted(rng: &mut ChaCha8Rng) -> String {
    let values: Vec<usize> = (0..rng.random_range(3..=7)).map(|_| rng.random_range(1..NUMBERS.len())).collect();
    let words: Vec<&str> = values.iter().map(|&value| NUMBERS[value]).collect();
    format!("{}\n{}", words.join(", "), json!(values))
}

fn words(rng: &mut ChaCha8Rng) -> Vec<&'static str> {
    (0..rng.random_range(3..=7)).map(|_| word(rng)).collect()
}

/// Draws a list and then a word from it, so that the seven days occur as often as the forty animals.
fn word(rng: &mut ChaCha8Rng) -> &'static str {
    let animal = pick(&ANIMALS, rng);
    match rng.random_range(0..10) {
        0 => pick(&PEOPLE, rng).name,
        1 => pick(&COLOURS, rng),
        2 => pick(&DAYS, rng),
        3 => pick(&PLACES, rng),
        4 => pick(&SHOPS, rng),
        5 => pick(&MOVES, rng),
        6 => pick(&[animal.home, animal.food, animal.kind, animal.size_word()], rng),
        7 => animal.name,
        _ => pick(&GOODS, rng),
    }
}
