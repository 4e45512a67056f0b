//! The pages of the cache: who holds them, and which of them can be shared.
//!
//! A full page is known by the page before it and its own 16 tokens, so a chain of pages is a prefix of a text under one
//! adapter. Pages that nobody holds stay known until their memory is needed; the one that was released first goes first.

use std::collections::{BTreeMap, HashMap};

use rekindle_kernels::paged_attention::PAGE;

/// The end of a chain of full pages. Numbers are never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Node(u64);

/// The key of a full page in the lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    parent: Node,
    ids: [u32; PAGE],
}

/// The state of one page.
#[derive(Clone, Copy, Debug, Default)]
struct Page {
    holders: u32,
    /// Its key and node, if it can be shared.
    known: Option<(Key, Node)>,
    /// Its place in the order of eviction, if nobody holds it and it can be shared.
    released: u64,
}

/// The pages of a cache.
#[derive(Debug)]
pub(crate) struct PagePool {
    pages: Vec<Page>,
    /// Pages without a holder and without a key.
    free: Vec<u32>,
    known: HashMap<Key, u32>,
    /// Pages without a holder but with a key, by the time of their release.
    evictable: BTreeMap<u64, u32>,
    clock: u64,
    nodes: u64,
}

impl PagePool {
    /// Returns a pool of free pages.
    pub(crate) fn new(count: usize) -> Self {
        let free = (0..count as u32).rev().collect();
        let pages = vec![Page::default(); count];
        Self { pages, free, known: HashMap::new(), evictable: BTreeMap::new(), clock: 0, nodes: 0 }
    }

    /// Returns the number of pages.
    pub(crate) fn len(&self) -> usize {
        self.pages.len()
    }

    /// Returns the number of pages that nobody holds.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.evictable.len()
    }

    /// Returns the number of pages that nobody holds and that can be shared.
    pub(crate) fn cached(&self) -> usize {
        self.evictable.len()
    }

    /// Returns the beginning of a chain of its own.
    pub(crate) fn root(&mut self) -> Node {
        self.nodes += 1;
        Node(self.nodes)
    }

    /// Takes a page for one holder; evicts one if necessary.
    pub(crate) fn allocate(&mut self) -> Option<u32> {
        let page = match self.free.pop() {
            Some(page) => page,
            None => {
                let (_, page) = self.evictable.pop_first()?;
                self.forget(page);
                page
            }
        };
        self.pages[page as usize].holders = 1;
        Some(page)
    }

    /// Adds a holder to a page that has one or that was found by [`find`](Self::find).
    pub(crate) fn hold(&mut self, page: u32) {
        let state = &mut self.pages[page as usize];
        if state.holders == 0 {
            self.evictable.remove(&state.released);
        }
        state.holders += 1;
    }

    /// Removes a holder.
    pub(crate) fn release(&mut self, page: u32) {
        let state = &mut self.pages[page as usize];
        state.holders = state.holders.checked_sub(1).expect("a page has at most as many releases as holders");
        if state.holders > 0 {
            return;
        }
        if state.known.is_some() {
            self.clock += 1;
            state.released = self.clock;
            self.evictable.insert(self.clock, page);
        } else {
            self.free.push(page);
        }
    }

    /// Returns true if a page has more than one holder.
    pub(crate) fn is_shared(&self, page: u32) -> bool {
        self.pages[page as usize].holders > 1
    }

    /// Returns true if nobody holds the page.
    pub(crate) fn is_unheld(&self, page: u32) -> bool {
        self.pages[page as usize].holders == 0
    }

    /// Returns the page that holds these tokens after the chain `parent`, with the end of the longer chain.
    pub(crate) fn find(&self, parent: Node, ids: &[u32]) -> Option<(u32, Node)> {
        let key = Key { parent, ids: ids.try_into().expect("the tokens of a full page") };
        let page = *self.known.get(&key)?;
        self.pages[page as usize].known.map(|(_, node)| (page, node))
    }

    /// Records that a page is full with these tokens after the chain `parent`. Returns the end of the longer chain. If
    /// another page is known for the same tokens, that one continues to be shared.
    pub(crate) fn register(&mut self, page: u32, parent: Node, ids: &[u32]) -> Node {
        if let Some((_, node)) = self.find(parent, ids) {
            return node;
        }
        let key = Key { parent, ids: ids.try_into().expect("the tokens of a full page") };
        let node = self.root();
        self.pages[page as usize].known = Some((key, node));
        self.known.insert(key, page);
        node
    }

    /// Forgets what pages hold, so that nothing is shared with later sequences.
    pub(crate) fn forget_all(&mut self) {
        self.known.clear();
        self.pages.iter_mut().for_each(|page| page.known = None);
        self.free.extend(std::mem::take(&mut self.evictable).into_values());
    }

    fn forget(&mut self, page: u32) {
        if let Some((key, _)) = self.pages[page as usize].known.take() {
            self.known.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(first: u32) -> Vec<u32> {
        (first..first + PAGE as u32).collect()
    }

    #[test]
    fn pages_are_free_again_after_their_last_holder() {
        let mut pool = PagePool::new(2);
        let [a, b] = [pool.allocate().unwrap(), pool.allocate().unwrap()];
        assert_eq!((pool.allocate(), pool.available()), (None, 0));
        pool.hold(a);
        assert!(pool.is_shared(a));
        pool.release(a);
        assert_eq!(pool.available(), 0);
        pool.release(a);
        pool.release(b);
        assert_eq!((pool.available(), pool.cached()), (2, 0));
    }

    #[test]
    fn chains_are_found_by_their_tokens_and_their_root() {
        let mut pool = PagePool::new(4);
        let (base, adapter) = (pool.root(), pool.root());
        let [a, b] = [pool.allocate().unwrap(), pool.allocate().unwrap()];
        let first = pool.register(a, base, &ids(0));
        let second = pool.register(b, first, &ids(16));
        assert_eq!(pool.find(base, &ids(0)), Some((a, first)));
        assert_eq!(pool.find(first, &ids(16)), Some((b, second)));
        assert_eq!(pool.find(adapter, &ids(0)), None, "another adapter");
        assert_eq!(pool.find(base, &ids(16)), None, "another place");
        // The same tokens in a second page: the first stays the one that is shared.
        let c = pool.allocate().unwrap();
        assert_eq!(pool.register(c, base, &ids(0)), first);
        pool.release(c);
        assert_eq!((pool.cached(), pool.available()), (0, 2));
    }

    #[test]
    fn the_page_released_first_is_evicted_first() {
        let mut pool = PagePool::new(2);
        let root = pool.root();
        let [a, b] = [pool.allocate().unwrap(), pool.allocate().unwrap()];
        let node = pool.register(a, root, &ids(0));
        pool.register(b, node, &ids(16));
        // A sequence releases its last page first, so the end of a chain goes before its beginning.
        pool.release(b);
        pool.release(a);
        assert_eq!((pool.cached(), pool.available()), (2, 2));
        assert_eq!(pool.allocate(), Some(b));
        assert_eq!(pool.find(node, &ids(16)), None);
        let (page, _) = pool.find(root, &ids(0)).unwrap();
        pool.hold(page);
        assert_eq!((page, pool.available()), (a, 0));
        pool.release(a);
        pool.forget_all();
        assert_eq!((pool.find(root, &ids(0)), pool.cached(), pool.available()), (None, 0, 1));
    }
}
