//! Tests of the scheduler without a model: every step is taken as computed, and every text gets made-up tokens.

use super::*;

fn id(request: u64, sample: usize) -> SampleId {
    SampleId { request: RequestId(request), sample }
}

/// A prompt of this many tokens that no other `seed` shares.
fn prompt(seed: u32, length: usize) -> Vec<u32> {
    (0..length as u32).map(|i| seed * 10_000 + i).collect()
}

/// Takes a step as computed; every sample whose tokens are all computed gets a new one. Returns the parts.
fn step(scheduler: &mut Scheduler) -> Vec<Part> {
    let plan = scheduler.schedule();
    for part in &plan.parts {
        scheduler.computed(part);
        if scheduler.missing(part.id) == 0 {
            let next = scheduler.samples[&part.id].tokens.len() as u32;
            scheduler.push(part.id, 5_000_000 + next);
        }
    }
    plan.parts
}

/// (request, start, count) of each part.
fn shape(parts: &[Part]) -> Vec<(u64, usize, usize)> {
    parts.iter().map(|part| (part.id.request.0, part.start, part.count)).collect()
}

#[test]
fn prompts_are_split_and_texts_come_first() {
    let mut scheduler = Scheduler::new(20, 4, 100);
    let root = scheduler.pool.root();
    scheduler.add(id(0, 0), &prompt(0, 5), root, true);
    scheduler.add(id(1, 0), &prompt(1, 50), root, true);
    scheduler.add(id(2, 0), &prompt(2, 3), root, true);
    assert_eq!(shape(&step(&mut scheduler)), [(0, 0, 5), (1, 0, 15)]);
    assert_eq!(shape(&step(&mut scheduler)), [(0, 5, 1), (1, 15, 19)]);
    assert_eq!(shape(&step(&mut scheduler)), [(0, 6, 1), (1, 34, 16), (2, 0, 3)]);
    assert_eq!(shape(&step(&mut scheduler)), [(0, 7, 1), (1, 50, 1), (2, 3, 1)]);
}

#[test]
fn no_more_samples_run_than_may() {
    let mut scheduler = Scheduler::new(20, 2, 100);
    let root = scheduler.pool.root();
    (0..3).for_each(|i| scheduler.add(id(i, 0), &prompt(i as u32, 3), root, true));
    assert_eq!(shape(&step(&mut scheduler)), [(0, 0, 3), (1, 0, 3)]);
    assert_eq!((scheduler.running(), scheduler.waiting()), (2, 1));
    scheduler.remove(id(0, 0));
    assert_eq!(shape(&step(&mut scheduler)), [(1, 3, 1), (2, 0, 3)]);
}

#[test]
fn a_prefix_is_computed_once() {
    let mut scheduler = Scheduler::new(200, 4, 100);
    let [root, other] = [scheduler.pool.root(), scheduler.pool.root()];
    let whole = prompt(0, 48);
    scheduler.add(id(0, 0), &whole, root, true);
    step(&mut scheduler);
    scheduler.add(id(1, 0), &[&whole[..40], &prompt(1, 5)].concat(), root, true);
    scheduler.add(id(2, 0), &whole, root, true);
    scheduler.add(id(3, 0), &whole, other, true);
    // The last token of a prompt is computed even if it fills a known page.
    assert_eq!(shape(&step(&mut scheduler)), [(0, 48, 1), (1, 32, 13), (2, 32, 16), (3, 0, 48)]);
    assert_eq!((scheduler.counts.looked_up, scheduler.counts.found), (48 + 45 + 48 + 48, 64));
    // Pages stay known when nobody holds them.
    (0..4).for_each(|i| scheduler.remove(id(i, 0)));
    assert_eq!(scheduler.pool.available(), 100);
    scheduler.add(id(4, 0), &whole, root, true);
    scheduler.add(id(5, 0), &whole, root, false);
    assert_eq!(shape(&step(&mut scheduler)), [(4, 32, 16), (5, 0, 48)]);
    scheduler.restart();
    assert_eq!(shape(&step(&mut scheduler)), [(4, 0, 49), (5, 0, 49)]);
}

#[test]
fn the_youngest_gives_up_its_pages() {
    // Three texts of 30 tokens fit into 6 pages, but not when they grow beyond 32.
    let mut scheduler = Scheduler::new(100, 4, 6);
    let root = scheduler.pool.root();
    (0..3).for_each(|i| scheduler.add(id(i, 0), &prompt(i as u32, 30), root, true));
    assert_eq!(step(&mut scheduler).len(), 3);
    assert_eq!(step(&mut scheduler).len(), 3);
    assert_eq!(step(&mut scheduler).len(), 3);
    assert_eq!(shape(&step(&mut scheduler)), [(0, 32, 1), (1, 32, 1)]);
    assert_eq!((scheduler.counts.preemptions, scheduler.running(), scheduler.waiting()), (1, 2, 1));
    assert_eq!(step(&mut scheduler).len(), 2, "no page is free for the third");
    scheduler.remove(id(0, 0));
    // It comes back with all of its tokens; what is left of its pages is not computed again.
    let parts = step(&mut scheduler);
    let back = parts.iter().find(|part| part.id == id(2, 0)).unwrap();
    assert_eq!(back.start + back.count, 33);
    scheduler.remove(id(1, 0));
    scheduler.remove(id(2, 0));
    assert_eq!(scheduler.pool.available(), 6);
}

#[test]
fn pages_are_reserved_before_a_token_is_known() {
    let mut scheduler = Scheduler::new(100, 2, 4);
    let root = scheduler.pool.root();
    (0..2).for_each(|i| scheduler.add(id(i, 0), &prompt(i as u32, 15), root, true));
    assert!(!scheduler.can_run_ahead(), "both wait");
    step(&mut scheduler);
    assert!(scheduler.can_run_ahead());
    // The next step computes token 16 of 16, and the one after it begins a page.
    let plan = scheduler.schedule();
    assert_eq!(shape(&plan.parts), [(0, 15, 1), (1, 15, 1)]);
    assert!(scheduler.reserve_ahead(&[id(0, 0), id(1, 0)]));
    assert_eq!((scheduler.samples[&id(0, 0)].pages.len(), scheduler.pool.available()), (2, 0));
    assert!(scheduler.reserve_ahead(&[id(0, 0)]), "the page is there");
    // What was reserved is not reserved again, and comes back with the rest.
    plan.parts.iter().for_each(|part| scheduler.computed(part));
    (0..2).for_each(|i| scheduler.push(id(i, 0), 7));
    assert_eq!(shape(&step(&mut scheduler)), [(0, 16, 1), (1, 16, 1)]);
    scheduler.samples.get_mut(&id(0, 0)).unwrap().tokens.extend([1; 15]);
    assert!(!scheduler.reserve_ahead(&[id(0, 0)]), "no page is free");
    scheduler.add(id(2, 0), &prompt(2, 3), root, true);
    assert!(scheduler.can_run_ahead(), "two may run");
    scheduler.remove(id(1, 0));
    assert!(!scheduler.can_run_ahead(), "the third can start");
    (0..3).for_each(|i| scheduler.remove(id(i, 0)));
    assert_eq!(scheduler.pool.available(), 4);
}

#[test]
fn one_sample_can_fill_the_cache() {
    let mut scheduler = Scheduler::new(8, 4, 2);
    let root = scheduler.pool.root();
    (0..2).for_each(|i| scheduler.add(id(i, 0), &prompt(i as u32, 20), root, true));
    let mut length = 20;
    while length < 32 {
        step(&mut scheduler);
        length = scheduler.samples[&id(0, 0)].tokens.len();
    }
    scheduler.remove(id(0, 0));
    step(&mut scheduler);
    assert_eq!((scheduler.running(), scheduler.waiting()), (1, 0));
}

#[test]
fn samples_share_the_pages_of_their_prompt() {
    let mut scheduler = Scheduler::new(100, 3, 20);
    let root = scheduler.pool.root();
    (0..4).for_each(|sample| scheduler.add(id(0, sample), &prompt(0, 40), root, true));
    let plan = scheduler.schedule();
    assert_eq!(shape(&plan.parts), [(0, 0, 40)], "the others wait for the prompt");
    scheduler.computed(&plan.parts[0]);
    assert!(scheduler.fork(id(0, 0), id(0, 1)) && scheduler.fork(id(0, 0), id(0, 2)));
    assert!(!scheduler.fork(id(0, 0), id(0, 3)), "three may run");
    assert_eq!(scheduler.pool.available(), 17);
    (0..3).for_each(|sample| scheduler.push(id(0, sample), sample as u32));
    // The last page of the prompt is copied for all but the last holder.
    let plan = scheduler.schedule();
    let pages = |sample| scheduler.samples[&id(0, sample)].pages.clone();
    assert_eq!(plan.copies, [(pages(2)[2], pages(0)[2]), (pages(2)[2], pages(1)[2])]);
    assert_eq!((pages(0)[..2].to_vec(), scheduler.pool.available()), (pages(1)[..2].to_vec(), 15));
    plan.parts.iter().for_each(|part| scheduler.computed(part));
    scheduler.remove(id(0, 0));
    let last = scheduler.schedule().parts.into_iter().find(|part| part.id == id(0, 3)).unwrap();
    assert_eq!((last.start, last.count), (32, 8), "full pages are shared");
    (1..4).for_each(|sample| scheduler.remove(id(0, sample)));
    assert_eq!(scheduler.pool.available(), 20);
}
