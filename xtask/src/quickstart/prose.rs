//! Short paragraphs of plain English about the closed world.

use rand::RngExt;
use rand::seq::SliceRandom;

use super::author::Author;
use super::scene::{Kind, Scene, listed, pick, two};
use super::world::{ANIMALS, Animal, DAYS, NUMBERS, PEOPLE, PLACES, Person, TIMES, WEATHER, article, capitalized};

/// Returns one paragraph of two to six sentences.
pub(super) fn paragraph(author: &mut Author) -> String {
    match author.rng.random_range(0..100) {
        0..20 => portrait(author),
        20..40 => shopping(author),
        40..60 => walk(author),
        60..75 => comparison(author),
        75..95 => arithmetic(author),
        _ => week(author),
    }
}

/// Returns all facts about one animal in random order.
fn portrait(author: &mut Author) -> String {
    let animal = pick(&ANIMALS, &mut author.rng);
    let Animal { name, kind, colour, home, food, .. } = animal;
    let (size, a) = (animal.size_word(), article(name));
    let of_kind = article(kind);
    let mut facts = [
        pick(&[format!("It is {size}."), format!("It is a {size} animal.")], &mut author.rng),
        pick(&[format!("It is {colour}."), format!("Its colour is {colour}.")], &mut author.rng),
        pick(&[format!("It lives in the {home}."), format!("Its home is the {home}.")], &mut author.rng),
        pick(&[format!("It eats {food}."), format!("It likes to eat {food}.")], &mut author.rng),
    ];
    facts.shuffle(&mut author.rng);
    let opening = pick(
        &[
            format!("The {name} is {of_kind} {kind}."),
            format!("{} {name} is {of_kind} {kind}.", capitalized(a)),
            format!("This is {a} {name}. {} {name} is {of_kind} {kind}.", capitalized(a)),
            format!("Do you know the {name}? It is {of_kind} {kind}."),
        ],
        &mut author.rng,
    );
    let kept = author.rng.random_range(2..=facts.len());
    format!("{opening} {}", facts[..kept].join(" "))
}

fn shopping(author: &mut Author) -> String {
    let Scene::Purchase { who: Person { name, pronoun }, lots, place } = author.scene(Kind::Purchase) else {
        unreachable!("asked for a purchase")
    };
    let rng = &mut author.rng;
    let (day, time, weather) = (pick(&DAYS, rng), pick(&TIMES, rng), pick(&WEATHER, rng));
    let friend = loop {
        let friend = pick(&PEOPLE, rng);
        if friend.name != name {
            break friend;
        }
    };
    let opening = pick(
        &[
            format!("On {day} {time} {name} went to the {place}."),
            format!("It was a {weather} {time}, and {name} went to the {place}."),
            format!("{name} went to the {place} with {}.", friend.name),
            format!("On a {weather} {day} {name} was at the {place}."),
        ],
        rng,
    );
    let bought = pick(
        &[
            format!("{pronoun} bought {}.", listed(&lots)),
            format!("There {name} bought {}.", listed(&lots)),
            format!("A sign said \"{}\", so {name} bought {}.", lots[0].thing, listed(&lots)),
        ],
        rng,
    );
    let first = lots[0];
    let given = rng.random_range(1..first.count);
    let gave = format!("{pronoun} gave {} of the {} to {}.", NUMBERS[given], first.thing, friend.name);
    let kept = match first.count - given {
        1 => format!("Now {name} has only one left."),
        left => format!("Now {name} has {} {} left.", NUMBERS[left], first.thing),
    };
    let ending = pick(
        &[
            format!("{gave} {kept}"),
            format!("Then {} went home.", pronoun.to_lowercase()),
            format!("{name} wrote \"{}\" on the box.", first.thing),
            format!("{name} put the {} on the table.", first.thing),
        ],
        rng,
    );
    format!("{opening} {bought} {ending}")
}

fn walk(author: &mut Author) -> String {
    let Scene::Trip { who, how, from, to, day } = author.scene(Kind::Trip) else { unreachable!("asked for a trip") };
    let Person { name, pronoun } = who;
    let rng = &mut author.rng;
    let (weather, time, animal) = (pick(&WEATHER, rng), pick(&TIMES, rng), pick(&ANIMALS, rng));
    let (a, size) = (article(animal.name), animal.size_word());
    let opening = pick(
        &[
            format!("On {day} {name} {how} from the {from} to the {to}."),
            format!("It was {weather} on {day}. {name} {how} from the {from} to the {to}."),
            format!("{name} was at the {from} in the {time}. Then {} {how} to the {to}.", pronoun.to_lowercase()),
        ],
        rng,
    );
    let saw = pick(
        &[
            format!("{pronoun} saw {a} {} on the way.", animal.name),
            format!("On the way {} saw a {size} {} {}.", pronoun.to_lowercase(), animal.colour, animal.kind),
            format!("\"Look, {a} {}!\" said {name}.", animal.name),
        ],
        rng,
    );
    let after = pick(
        &[
            format!("It was {a} {}, and it was {}.", animal.name, animal.colour),
            format!("The {} was eating {}.", animal.name, animal.food),
            format!("The {} lives in the {}.", animal.name, animal.home),
            format!("At the {to} {name} was happy."),
        ],
        rng,
    );
    format!("{opening} {saw} {after}")
}

fn comparison(author: &mut Author) -> String {
    let Scene::Sizes { bigger, smaller } = author.scene(Kind::Sizes) else { unreachable!("asked for two sizes") };
    let [big, small] = [bigger, smaller].map(|animal| format!("{} {}", article(animal.name), animal.name));
    let mut sentences = [
        capitalized(&format!("{big} is bigger than {small}.")),
        capitalized(&format!("{small} is smaller than {big}.")),
        format!("The {} is {} and the {} is {}.", bigger.name, bigger.size_word(), smaller.name, smaller.size_word()),
    ];
    sentences.shuffle(&mut author.rng);
    sentences[..2].join(" ")
}

fn arithmetic(author: &mut Author) -> String {
    let sums = author.rng.random_range(2..=4);
    (0..sums).map(|_| author.scene(Kind::Sum).sentence()).collect::<Vec<_>>().join(" ")
}

fn week(author: &mut Author) -> String {
    let today = author.rng.random_range(0..DAYS.len());
    let [here, there] = two(&PLACES, &mut author.rng);
    let person = pick(&PEOPLE, &mut author.rng);
    let day = |offset: usize| DAYS[(today + offset) % DAYS.len()];
    pick(
        &[
            format!("After {} comes {}, and after {} comes {}.", day(0), day(1), day(1), day(2)),
            format!("Today is {}. Tomorrow is {}.", day(0), day(1)),
            format!("On {} {} is at the {here}, and on {} at the {there}.", day(0), person.name, day(1)),
        ],
        &mut author.rng,
    )
}
