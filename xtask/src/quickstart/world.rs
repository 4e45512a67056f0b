//! The closed world of all sentences: people, things, places, and facts about forty animals.
//!
//! The word lists are deliberately short. Each word becomes one token of a vocabulary of about a thousand, so copying a
//! word from the question to the answer takes one attention step, which two million weights learn in minutes.

/// A person of the stories.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Person {
    pub(super) name: &'static str,
    /// `She` or `He`, capitalized for the start of a sentence.
    pub(super) pronoun: &'static str,
}

/// An animal and the facts about it that the base model memorizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Animal {
    pub(super) name: &'static str,
    pub(super) kind: &'static str,
    /// Index into [`SIZES`].
    pub(super) size: usize,
    pub(super) colour: &'static str,
    pub(super) home: &'static str,
    pub(super) food: &'static str,
}

impl Animal {
    /// `tiny`, `small`, `big` or `huge`.
    pub(super) fn size_word(&self) -> &'static str {
        SIZES[self.size]
    }
}

const fn she(name: &'static str) -> Person {
    Person { name, pronoun: "She" }
}

const fn he(name: &'static str) -> Person {
    Person { name, pronoun: "He" }
}

pub(super) const PEOPLE: [Person; 16] = [
    she("Anna"),
    she("Ella"),
    she("Ida"),
    she("Lucy"),
    she("Mia"),
    she("Nora"),
    she("Rosa"),
    she("Vera"),
    he("Ben"),
    he("Dan"),
    he("Finn"),
    he("Jack"),
    he("Leo"),
    he("Oscar"),
    he("Sam"),
    he("Tom"),
];

/// Things to buy, in the plural.
pub(super) const GOODS: [&str; 16] = [
    "apples", "bags", "balls", "books", "boxes", "caps", "cups", "hats", "kites", "lamps", "pears", "pens", "plums",
    "ropes", "shirts", "toys",
];

pub(super) const COLOURS: [&str; 9] = ["black", "blue", "brown", "green", "grey", "pink", "red", "white", "yellow"];

/// Places to buy things.
pub(super) const SHOPS: [&str; 6] = ["fair", "farm", "harbour", "market", "school", "shop"];

/// Destinations.
pub(super) const PLACES: [&str; 12] = [
    "beach", "bridge", "castle", "farm", "forest", "garden", "harbour", "lake", "market", "river", "school", "village",
];

pub(super) const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// Verbs of travel in the past tense.
pub(super) const MOVES: [&str; 3] = ["walked", "ran", "rode"];

pub(super) const WEATHER: [&str; 6] = ["cold", "rainy", "sunny", "warm", "wet", "windy"];

pub(super) const TIMES: [&str; 3] = ["morning", "afternoon", "evening"];

/// Number words from zero; the index is the value.
pub(super) const NUMBERS: [&str; 10] = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"];

/// Sizes in ascending order.
pub(super) const SIZES: [&str; 4] = ["tiny", "small", "big", "huge"];

const TINY: usize = 0;
const SMALL: usize = 1;
const BIG: usize = 2;
const HUGE: usize = 3;

const fn animal(
    name: &'static str,
    kind: &'static str,
    size: usize,
    colour: &'static str,
    home: &'static str,
    food: &'static str,
) -> Animal {
    Animal { name, kind, size, colour, home, food }
}

pub(super) const ANIMALS: [Animal; 40] = [
    animal("ant", "insect", TINY, "black", "garden", "seeds"),
    animal("bat", "mammal", TINY, "black", "cave", "insects"),
    animal("bear", "mammal", HUGE, "brown", "forest", "honey"),
    animal("bee", "insect", TINY, "yellow", "garden", "honey"),
    animal("beetle", "insect", TINY, "green", "forest", "leaves"),
    animal("camel", "mammal", HUGE, "brown", "desert", "leaves"),
    animal("carp", "fish", SMALL, "yellow", "lake", "worms"),
    animal("cat", "mammal", SMALL, "grey", "house", "fish"),
    animal("cow", "mammal", BIG, "brown", "farm", "grass"),
    animal("crow", "bird", SMALL, "black", "field", "seeds"),
    animal("deer", "mammal", BIG, "brown", "forest", "leaves"),
    animal("duck", "bird", SMALL, "brown", "lake", "grass"),
    animal("eagle", "bird", BIG, "brown", "mountain", "meat"),
    animal("elephant", "mammal", HUGE, "grey", "jungle", "leaves"),
    animal("fox", "mammal", SMALL, "red", "forest", "meat"),
    animal("goat", "mammal", BIG, "white", "mountain", "grass"),
    animal("gull", "bird", SMALL, "white", "sea", "fish"),
    animal("hare", "mammal", SMALL, "brown", "field", "grass"),
    animal("hen", "bird", SMALL, "white", "farm", "seeds"),
    animal("heron", "bird", BIG, "grey", "river", "fish"),
    animal("horse", "mammal", BIG, "black", "farm", "grass"),
    animal("lion", "mammal", BIG, "yellow", "desert", "meat"),
    animal("lizard", "reptile", SMALL, "green", "desert", "insects"),
    animal("monkey", "mammal", SMALL, "brown", "jungle", "fruit"),
    animal("moth", "insect", TINY, "white", "field", "leaves"),
    animal("mouse", "mammal", TINY, "grey", "field", "seeds"),
    animal("otter", "mammal", SMALL, "brown", "river", "fish"),
    animal("owl", "bird", SMALL, "white", "forest", "meat"),
    animal("parrot", "bird", SMALL, "green", "jungle", "nuts"),
    animal("pig", "mammal", BIG, "pink", "farm", "fruit"),
    animal("robin", "bird", TINY, "red", "garden", "worms"),
    animal("seal", "mammal", BIG, "grey", "sea", "fish"),
    animal("shark", "fish", HUGE, "grey", "sea", "meat"),
    animal("sheep", "mammal", BIG, "white", "farm", "grass"),
    animal("snake", "reptile", BIG, "green", "jungle", "meat"),
    animal("swan", "bird", BIG, "white", "lake", "grass"),
    animal("trout", "fish", SMALL, "brown", "river", "insects"),
    animal("whale", "mammal", HUGE, "blue", "sea", "fish"),
    animal("wolf", "mammal", BIG, "grey", "forest", "meat"),
    animal("wren", "bird", TINY, "brown", "forest", "insects"),
];

/// Returns `a` or `an` for a word.
pub(super) fn article(word: &str) -> &'static str {
    if word.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" }
}

/// Returns the word with its first letter in upper case.
pub(super) fn capitalized(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_list_holds_distinct_words() {
        let animals: Vec<&str> = ANIMALS.iter().map(|animal| animal.name).collect();
        let people: Vec<&str> = PEOPLE.iter().map(|person| person.name).collect();
        for list in [&animals[..], &people, &GOODS, &COLOURS, &SHOPS, &PLACES, &DAYS, &NUMBERS] {
            assert_eq!(list.iter().collect::<HashSet<_>>().len(), list.len(), "{list:?}");
        }
    }

    #[test]
    fn articles_and_capitals() {
        assert_eq!((article("owl"), article("bear")), ("an", "a"));
        assert_eq!((capitalized("three"), capitalized("")), ("Three".to_owned(), String::new()));
    }
}
