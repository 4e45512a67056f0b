//! The instruction set that `rekindle quickstart` fine-tunes on: the base model's own questions, answered in JSON.

use std::collections::HashSet;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::scene::{Kind, Scene};

/// Training rows per [`Kind`].
const TRAIN_PER_KIND: usize = 80;
/// Held-out rows per [`Kind`].
const HELD_OUT_PER_KIND: usize = 12;

/// A question and the facts that answer it.
pub(super) struct Instruction {
    pub(super) scene: Scene,
    pub(super) question: String,
}

impl Instruction {
    /// Returns the row as stored in the file; the answer is compact JSON.
    pub(super) fn row(&self) -> Value {
        let answer = Value::Object(self.scene.record()).to_string();
        json!({"messages": [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": answer},
        ]})
    }
}

/// The two sets, each cycling through the kinds. No scene of the second occurs in the first in any wording.
pub(super) struct Sets {
    pub(super) train: Vec<Instruction>,
    pub(super) held_out: Vec<Instruction>,
}

impl Sets {
    /// Generates the sets; the same seed gives the same sets.
    pub(super) fn new(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut reserved = HashSet::new();
        let held_out = Kind::ALL.map(|kind| distinct_scenes(kind, &mut reserved, &mut rng));
        let train = Kind::ALL.map(|kind| distinct_questions(kind, &reserved, &mut rng));
        Self { train: in_turn(train), held_out: in_turn(held_out) }
    }

    /// Returns the scenes of the held-out rows.
    pub(super) fn held_out_scenes(&self) -> HashSet<Scene> {
        self.held_out.iter().map(|instruction| instruction.scene.clone()).collect()
    }
}

/// Draws distinct scenes and adds them to `reserved`.
fn distinct_scenes(kind: Kind, reserved: &mut HashSet<Scene>, rng: &mut ChaCha8Rng) -> Vec<Instruction> {
    let mut drawn = Vec::new();
    while drawn.len() < HELD_OUT_PER_KIND {
        let scene = Scene::draw(kind, rng);
        if reserved.insert(scene.clone()) {
            drawn.push(Instruction { question: scene.question(rng), scene });
        }
    }
    drawn
}

/// Draws distinct questions about scenes outside `reserved`. Because animals and sums are few, a scene may recur in
/// another wording.
fn distinct_questions(kind: Kind, reserved: &HashSet<Scene>, rng: &mut ChaCha8Rng) -> Vec<Instruction> {
    let (mut drawn, mut asked) = (Vec::new(), HashSet::new());
    while drawn.len() < TRAIN_PER_KIND {
        let scene = Scene::draw(kind, rng);
        let question = scene.question(rng);
        if !reserved.contains(&scene) && asked.insert(question.clone()) {
            drawn.push(Instruction { scene, question });
        }
    }
    drawn
}

fn in_turn<const N: usize>(lists: [Vec<Instruction>; N]) -> Vec<Instruction> {
    let mut lists = lists.map(Vec::into_iter);
    let mut merged = Vec::new();
    loop {
        let round: Vec<Instruction> = lists.iter_mut().filter_map(Iterator::next).collect();
        if round.is_empty() {
            return merged;
        }
        merged.extend(round);
    }
}

#[cfg(test)]
mod tests {
    use super::super::world::{ANIMALS, NUMBERS};
    use super::*;

    fn sets() -> Sets {
        Sets::new(super::super::SEED)
    }

    /// Returns the answer parsed from the row.
    fn answer(instruction: &Instruction) -> Value {
        let row = instruction.row();
        let text = row["messages"][1]["content"].as_str().expect("the answer is a string").to_owned();
        serde_json::from_str(&text).expect("the answer is JSON")
    }

    #[test]
    fn held_out_scenes_and_questions_are_not_in_train() {
        let Sets { train, held_out } = sets();
        let scenes: HashSet<&Scene> = train.iter().map(|row| &row.scene).collect();
        let questions: HashSet<&str> = train.iter().map(|row| row.question.as_str()).collect();
        assert_eq!((train.len(), held_out.len()), (5 * TRAIN_PER_KIND, 5 * HELD_OUT_PER_KIND));
        assert_eq!(questions.len(), train.len(), "a question of train is asked twice");
        for row in &held_out {
            assert!(!scenes.contains(&row.scene), "{:?}", row.scene);
            assert!(!questions.contains(row.question.as_str()), "{}", row.question);
        }
    }

    #[test]
    fn stories_can_be_read_off_the_question() {
        let Sets { train, held_out } = sets();
        for row in train.iter().chain(&held_out) {
            let (answer, question) = (answer(row), &row.question);
            let stands = |value: &Value| {
                let word = value.as_str().expect("a word");
                assert!(question.split(|c: char| !c.is_alphabetic()).any(|part| part == word), "{word}: {question}");
            };
            match &row.scene {
                Scene::Purchase { .. } => {
                    stands(&answer["who"]);
                    stands(&answer["place"]);
                    for item in answer["items"].as_array().expect("a list of items") {
                        let count = item["count"].as_u64().expect("a number") as usize;
                        let words = [NUMBERS[count], item["colour"].as_str().expect("a word"), ""].join(" ");
                        let lot = words + item["thing"].as_str().expect("a word");
                        assert!(question.contains(&lot), "{lot}: {question}");
                    }
                }
                Scene::Trip { .. } => {
                    ["who", "how", "from", "to", "day"].iter().for_each(|&key| stands(&answer[key]));
                    for key in ["from", "to"] {
                        let leg = format!("{key} the {}", answer[key].as_str().expect("a word"));
                        assert!(question.contains(&leg), "{leg}: {question}");
                    }
                }
                Scene::Fact(_) => stands(&answer["animal"]),
                Scene::Sizes { .. } => ["bigger", "smaller"].iter().for_each(|&key| stands(&answer[key])),
                Scene::Sum { .. } => {}
            }
        }
    }

    #[test]
    fn sums_sizes_and_facts_are_true() {
        let Sets { train, held_out } = sets();
        let animal = |name: &Value| {
            *ANIMALS.iter().find(|animal| Some(animal.name) == name.as_str()).expect("an animal of this world")
        };
        for row in train.iter().chain(&held_out) {
            let answer = answer(row);
            match &row.scene {
                Scene::Sum { .. } => {
                    let sum = answer["sum"].as_str().expect("a sum in words");
                    let is = answer["is"].as_u64().expect("a number") as usize;
                    let value = |word: &str| NUMBERS.iter().position(|&number| number == word).expect("a number word");
                    match sum.split(' ').collect::<Vec<_>>()[..] {
                        [a, "plus", b] => assert_eq!(value(a) + value(b), is, "{sum}"),
                        [a, "minus", b] => assert_eq!(value(a), is + value(b), "{sum}"),
                        _ => panic!("{sum}"),
                    }
                    assert!(row.question.ends_with(&format!("{sum}?")), "{}", row.question);
                }
                Scene::Sizes { .. } => {
                    assert!(animal(&answer["bigger"]).size > animal(&answer["smaller"]).size, "{answer}");
                }
                Scene::Fact(_) => {
                    let truth = animal(&answer["animal"]);
                    let told = ["size", "colour", "kind", "home", "food"].map(|key| answer[key].as_str());
                    let known = [truth.size_word(), truth.colour, truth.kind, truth.home, truth.food].map(Some);
                    assert_eq!(told, known);
                }
                Scene::Purchase { .. } | Scene::Trip { .. } => {}
            }
        }
    }
}
