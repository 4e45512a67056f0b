//! Writes the rows of the base corpus: plain paragraphs, and chats whose answers are plain sentences.

use std::collections::HashSet;

use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

use super::drill;
use super::prose;
use super::scene::{Kind, Lot, Scene, pick, two};
use super::world::{DAYS, NUMBERS, PEOPLE, Person};

/// A seeded generator of rows that avoids the scenes of the held-out set.
pub(super) struct Author {
    pub(super) rng: ChaCha8Rng,
    held_out: HashSet<Scene>,
}

impl Author {
    /// Creates a generator; the same seed and `held_out` scenes give the same rows.
    pub(super) fn new(seed: u64, held_out: HashSet<Scene>) -> Self {
        Self { rng: ChaCha8Rng::seed_from_u64(seed), held_out }
    }

    /// Returns one row: `{"text": …}` or `{"messages": […]}`.
    pub(super) fn row(&mut self) -> Value {
        match self.rng.random_range(0..100) {
            0..25 => json!({"text": prose::paragraph(self)}),
            25..45 => json!({"text": self.words_and_json()}),
            _ => json!({"messages": self.chat()}),
        }
    }

    /// Returns a scene of `kind`. Stories of the held-out set are redrawn; animals and sums are not, because the base
    /// model must learn these facts.
    pub(super) fn scene(&mut self, kind: Kind) -> Scene {
        loop {
            let scene = Scene::draw(kind, &mut self.rng);
            let story = matches!(kind, Kind::Purchase | Kind::Trip);
            if !(story && self.held_out.contains(&scene)) {
                return scene;
            }
        }
    }

    /// Returns words followed by the same in JSON: a list, or a scene and its record with shuffled and missing keys.
    /// The base model thus sees JSON in plain text, as large models do, but never as an answer in a chat.
    fn words_and_json(&mut self) -> String {
        match self.rng.random_range(0..100) {
            0..30 => drill::quoted(&mut self.rng),
            30..40 => drill::counted(&mut self.rng),
            told => {
                // Facts need more repetitions than stories, which can be copied from the line above.
                let kind = pick(
                    &[Kind::Purchase, Kind::Trip, Kind::Sizes, Kind::Fact, Kind::Fact, Kind::Sum, Kind::Sum],
                    &mut self.rng,
                );
                let scene = self.scene(kind);
                let record = self.loose(scene.record());
                match told {
                    40..65 => format!("{}\n{record}", scene.sentence()),
                    65..90 => format!("{}\n{record}", scene.question(&mut self.rng)),
                    _ => format!("{record}\n{}", scene.sentence()),
                }
            }
        }
    }

    fn loose(&mut self, record: Map<String, Value>) -> Value {
        let mut fields: Vec<(String, Value)> = record.into_iter().collect();
        fields.shuffle(&mut self.rng);
        let kept = self.rng.random_range(fields.len().div_ceil(2)..=fields.len());
        Value::Object(fields.into_iter().take(kept).collect())
    }

    /// Returns one to three questions with their answers.
    fn chat(&mut self) -> Vec<Value> {
        let turns = pick(&[1, 1, 1, 2, 2, 3], &mut self.rng);
        (0..turns)
            .flat_map(|_| {
                let (question, answer) = self.exchange();
                [json!({"role": "user", "content": question}), json!({"role": "assistant", "content": answer})]
            })
            .collect()
    }

    fn exchange(&mut self) -> (String, String) {
        match self.rng.random_range(0..100) {
            0..65 => {
                let kind = pick(&Kind::ALL, &mut self.rng);
                let scene = self.scene(kind);
                (scene.question(&mut self.rng), scene.sentence())
            }
            65..80 => drill::repeated(&mut self.rng),
            80..86 => self.what_is_left(),
            86..91 => self.one_detail(),
            91..95 => self.next_day(),
            _ => self.manners(),
        }
    }

    fn what_is_left(&mut self) -> (String, String) {
        let (who, Lot { count, thing, .. }) = self.possession();
        let given = self.rng.random_range(1..count);
        let (had, given, left) = (NUMBERS[count], NUMBERS[given], NUMBERS[count - given]);
        // "one apples" would be wrong, so the noun is omitted.
        let left = if left == "one" { "only one".to_owned() } else { format!("{left} {thing}") };
        let (name, they) = (who.name, who.pronoun.to_lowercase());
        let question = format!("{name} had {had} {thing} and gave away {given}. How many does {they} have now?");
        (question, format!("{name} has {left} left."))
    }

    fn one_detail(&mut self) -> (String, String) {
        let (who, Lot { count, colour, thing }) = self.possession();
        let (name, count) = (who.name, NUMBERS[count]);
        let told = format!("{name} has {count} {colour} {thing}.");
        if self.rng.random_bool(0.5) {
            (format!("{told} What colour are the {thing}?"), format!("The {thing} are {colour}."))
        } else {
            (format!("{told} How many {thing} does {name} have?"), format!("{name} has {count} {thing}."))
        }
    }

    fn next_day(&mut self) -> (String, String) {
        let today = self.rng.random_range(0..DAYS.len());
        let (next, before) = (DAYS[(today + 1) % 7], DAYS[(today + 6) % 7]);
        let today = DAYS[today];
        pick(
            &[
                (format!("What day comes after {today}?"), format!("After {today} comes {next}.")),
                (format!("What day comes before {today}?"), format!("Before {today} comes {before}.")),
                (format!("Today is {today}. What day is tomorrow?"), format!("Tomorrow is {next}.")),
            ],
            &mut self.rng,
        )
    }

    fn manners(&mut self) -> (String, String) {
        let [me, you] = two(&PEOPLE, &mut self.rng);
        let answer = |text: &str| text.to_owned();
        pick(
            &[
                (answer("Hello!"), answer("Hello! What do you want to know?")),
                (answer("Thank you."), answer("You are welcome.")),
                (
                    answer("Who are you?"),
                    answer("I am a small model. I know a little about animals, trips and numbers."),
                ),
                (answer("What do you know?"), answer("I know forty animals, the days and small numbers.")),
                (format!("Hello, I am {}.", me.name), format!("Hello, {}! What do you want to know?", me.name)),
                (format!("Say hello to {}.", you.name), format!("Hello, {}!", you.name)),
            ],
            &mut self.rng,
        )
    }

    /// Returns a person and a lot of things from a purchase outside the held-out set.
    pub(super) fn possession(&mut self) -> (Person, Lot) {
        match self.scene(Kind::Purchase) {
            Scene::Purchase { who, lots, .. } => (who, lots[0]),
            other => unreachable!("asked for a purchase, drew {other:?}"),
        }
    }
}
