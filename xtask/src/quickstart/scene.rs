//! A set of facts in three forms: a question, a plain sentence that answers it, and the same as a JSON record.

use rand::RngExt;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

use super::world::{
    ANIMALS, Animal, COLOURS, DAYS, GOODS, MOVES, NUMBERS, PEOPLE, PLACES, Person, SHOPS, article, capitalized,
};

/// The facts behind a question.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Scene {
    /// Someone bought one or two lots of things.
    Purchase { who: Person, lots: Vec<Lot>, place: &'static str },
    /// Someone went from one place to another.
    Trip { who: Person, how: &'static str, from: &'static str, to: &'static str, day: &'static str },
    /// The properties of an animal; the question contains no part of the answer.
    Fact(Animal),
    /// Two animals of different size.
    Sizes { bigger: Animal, smaller: Animal },
    /// `a + b` or `a − b`, with all three numbers from 1 to 9.
    Sum { a: usize, plus: bool, b: usize },
}

/// A number of things of one colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Lot {
    /// The number of things, 2 to 9.
    pub(super) count: usize,
    pub(super) colour: &'static str,
    pub(super) thing: &'static str,
}

impl Lot {
    /// Returns for example `three red apples`.
    pub(super) fn words(&self) -> String {
        format!("{} {} {}", NUMBERS[self.count], self.colour, self.thing)
    }
}

/// The kinds of [`Scene`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Purchase,
    Trip,
    Fact,
    Sizes,
    Sum,
}

impl Kind {
    pub(super) const ALL: [Self; 5] = [Self::Purchase, Self::Trip, Self::Fact, Self::Sizes, Self::Sum];
}

impl Scene {
    /// Draws a scene of `kind` with uniform choices.
    pub(super) fn draw(kind: Kind, rng: &mut ChaCha8Rng) -> Self {
        match kind {
            Kind::Purchase => {
                let lots = rng.random_range(1..=2);
                let [thing, other] = two(&GOODS, rng);
                let lots = [thing, other][..lots]
                    .iter()
                    .map(|&thing| Lot { count: rng.random_range(2..=9), colour: pick(&COLOURS, rng), thing })
                    .collect();
                Self::Purchase { who: pick(&PEOPLE, rng), lots, place: pick(&SHOPS, rng) }
            }
            Kind::Trip => {
                let [from, to] = two(&PLACES, rng);
                Self::Trip { who: pick(&PEOPLE, rng), how: pick(&MOVES, rng), from, to, day: pick(&DAYS, rng) }
            }
            Kind::Fact => Self::Fact(pick(&ANIMALS, rng)),
            Kind::Sizes => loop {
                let [bigger, smaller] = two(&ANIMALS, rng);
                if bigger.size > smaller.size {
                    return Self::Sizes { bigger, smaller };
                }
            },
            Kind::Sum => {
                let most = rng.random_range(2..=9);
                let least = rng.random_range(1..most);
                if rng.random_bool(0.5) {
                    Self::Sum { a: most - least, plus: true, b: least }
                } else {
                    Self::Sum { a: most, plus: false, b: least }
                }
            }
        }
    }

    /// Returns the user's question in one of several wordings.
    pub(super) fn question(&self, rng: &mut ChaCha8Rng) -> String {
        match self {
            Self::Purchase { who: Person { name, pronoun }, lots, place } => {
                let ask = pick(&[pronoun.to_lowercase(), (*name).to_owned()], rng);
                let told = pick(
                    &[
                        format!("{name} bought {} at the {place}.", listed(lots)),
                        format!("{name} went to the {place} and bought {}.", listed(lots)),
                        format!("At the {place} {name} bought {}.", listed(lots)),
                    ],
                    rng,
                );
                format!("{told} What did {ask} buy?")
            }
            Self::Trip { who: Person { name, pronoun }, how, from, to, day } => {
                let ask = pick(&[pronoun.to_lowercase(), (*name).to_owned()], rng);
                let told = pick(
                    &[
                        format!("On {day} {name} {how} from the {from} to the {to}."),
                        format!("{name} {how} to the {to} from the {from} on {day}."),
                    ],
                    rng,
                );
                format!("{told} Where did {ask} go?")
            }
            Self::Fact(Animal { name, .. }) => {
                let a = article(name);
                pick(
                    &[
                        format!("What is {a} {name}?"),
                        format!("Tell me about the {name}."),
                        format!("What do you know about the {name}?"),
                    ],
                    rng,
                )
            }
            Self::Sizes { bigger, smaller } => {
                let (first, second) = if rng.random_bool(0.5) { (bigger, smaller) } else { (smaller, bigger) };
                let [first, second] = [first, second].map(|animal| format!("{} {}", article(animal.name), animal.name));
                pick(
                    &[
                        format!("Which is bigger, {first} or {second}?"),
                        format!("Which is smaller, {first} or {second}?"),
                    ],
                    rng,
                )
            }
            Self::Sum { a, plus, b } => {
                let (a, sign, b) = (NUMBERS[*a], sign(*plus), NUMBERS[*b]);
                pick(&[format!("What is {a} {sign} {b}?"), format!("How much is {a} {sign} {b}?")], rng)
            }
        }
    }

    /// Returns the answer in one plain sentence.
    pub(super) fn sentence(&self) -> String {
        match self {
            Self::Purchase { who, lots, place } => {
                format!("{} bought {} at the {place}.", who.name, listed(lots))
            }
            Self::Trip { who, how, from, to, day } => {
                format!("{} {how} from the {from} to the {to} on {day}.", who.name)
            }
            Self::Fact(animal) => {
                let Animal { name, kind, colour, home, food, .. } = animal;
                let a = capitalized(article(name));
                let size = animal.size_word();
                format!("{a} {name} is a {size} {colour} {kind}. Its home is the {home} and it eats {food}.")
            }
            Self::Sizes { bigger, smaller } => {
                let a = capitalized(article(bigger.name));
                format!("{a} {} is bigger than {} {}.", bigger.name, article(smaller.name), smaller.name)
            }
            Self::Sum { a, plus, b } => {
                let result = NUMBERS[result(*a, *plus, *b)];
                format!("{} {} {} is {result}.", capitalized(NUMBERS[*a]), sign(*plus), NUMBERS[*b])
            }
        }
    }

    /// Returns the answer as a record, with keys in the order of the sentence.
    pub(super) fn record(&self) -> Map<String, Value> {
        let record = match self {
            Self::Purchase { who, lots, place } => {
                let items: Vec<Value> = lots
                    .iter()
                    .map(|Lot { count, colour, thing }| json!({"count": count, "colour": colour, "thing": thing}))
                    .collect();
                json!({"who": who.name, "items": items, "place": place})
            }
            Self::Trip { who, how, from, to, day } => {
                json!({"who": who.name, "how": how, "from": from, "to": to, "day": day})
            }
            Self::Fact(animal) => {
                let Animal { name, kind, colour, home, food, .. } = animal;
                let size = animal.size_word();
                json!({"animal": name, "size": size, "colour": colour, "kind": kind, "home": home, "food": food})
            }
            Self::Sizes { bigger, smaller } => json!({"bigger": bigger.name, "smaller": smaller.name}),
            Self::Sum { a, plus, b } => {
                let sum = format!("{} {} {}", NUMBERS[*a], sign(*plus), NUMBERS[*b]);
                json!({"sum": sum, "is": result(*a, *plus, *b)})
            }
        };
        match record {
            Value::Object(fields) => fields,
            _ => unreachable!("every arm builds an object"),
        }
    }
}

/// Returns a random element of a non-empty list.
pub(super) fn pick<T: Clone>(list: &[T], rng: &mut ChaCha8Rng) -> T {
    list.choose(rng).expect("the lists of this module are not empty").clone()
}

/// Returns two different indices of a list in random order.
pub(super) fn two<T: Copy>(list: &[T], rng: &mut ChaCha8Rng) -> [T; 2] {
    let first = rng.random_range(0..list.len());
    let second = (first + rng.random_range(1..list.len())) % list.len();
    [list[first], list[second]]
}

/// Returns for example `three red apples and two green pears`.
pub(super) fn listed(lots: &[Lot]) -> String {
    lots.iter().map(Lot::words).collect::<Vec<_>>().join(" and ")
}

fn result(a: usize, plus: bool, b: usize) -> usize {
    if plus { a + b } else { a - b }
}

fn sign(plus: bool) -> &'static str {
    if plus { "plus" } else { "minus" }
}
