//! The tables that tell the kernels' blocks which rows of a batch are theirs.

use super::Engine;
use crate::runtime::{Arch, AttentionKernel, Tiles};

/// Query rows of a tile of [`Engine::Sm90`], and its keys but for dk and dv of 256 channels.
const SM90_ROWS: usize = 128;

/// Rows of a tile of [`Engine::Plain`].
const PLAIN_ROWS: usize = 16;

/// The rows of one document in q and in k, v.
#[derive(Clone, Copy, Debug)]
pub(super) struct Document {
    /// First row in q.
    pub(super) query: usize,
    /// First row in k and v.
    pub(super) key: usize,
    /// Rows in q.
    pub(super) queries: usize,
    /// Keys before the first query's own.
    pub(super) past: usize,
}

/// A part of the list of all tables: tiles of four numbers each.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    /// Index of its first number.
    pub(super) first: usize,
    /// Number of its tiles.
    pub(super) tiles: usize,
}

/// Rows of a tile: queries, for dk and dv keys.
pub(super) fn rows(kernel: AttentionKernel, engine: Engine, head_dim: usize, arch: Arch) -> usize {
    match engine {
        Engine::Sm90 if kernel == AttentionKernel::BwdDkdv && head_dim == 256 => SM90_ROWS / 2,
        Engine::Sm90 => SM90_ROWS,
        Engine::Plain => PLAIN_ROWS,
        Engine::MmaSync => {
            // Options change no table.
            let tiles = Tiles::of(kernel, head_dim as u32, arch, false);
            (if kernel == AttentionKernel::BwdDkdv { tiles.block_n } else { tiles.block_m }) as usize
        }
    }
}

impl Document {
    /// A document from a row on to another one, with all its keys.
    pub(super) fn whole(start: usize, end: usize) -> Self {
        assert!(start <= end, "cu_seqlens go up, not from {start} to {end}");
        Self { query: start, key: start, queries: end - start, past: 0 }
    }

    /// Its tiles, as the heads of the kernels' files define them.
    fn tiles(self, engine: Engine, rows: usize) -> impl Iterator<Item = [usize; 4]> {
        let Self { query, key, queries, past } = self;
        let end = query + queries;
        (0..queries).step_by(rows).map(move |t| match engine {
            Engine::Sm90 => [query + t, query, end, 0],
            Engine::MmaSync | Engine::Plain => [query + t, end, key, past + t],
        })
    }
}

impl Table {
    /// Adds the table of a kernel to the list, the longest work first.
    pub(super) fn append(
        words: &mut Vec<u32>,
        documents: &[Document],
        engine: Engine,
        rows: usize,
        kernel: AttentionKernel,
    ) -> Self {
        let mut tiles: Vec<_> = documents.iter().flat_map(|document| document.tiles(engine, rows)).collect();
        tiles.sort_by_key(|&[x, y, z, w]| {
            let work = match (engine, kernel) {
                (Engine::Sm90, AttentionKernel::Fwd | AttentionKernel::BwdDq) => x - y,
                // By documents, the rows of one in their order: its blocks wait for each other.
                (Engine::Sm90, AttentionKernel::BwdDkdv) if rows == SM90_ROWS => z - y,
                (Engine::Sm90, AttentionKernel::BwdDkdv) => z - x,
                (_, AttentionKernel::Fwd | AttentionKernel::BwdDq) => w,
                (_, AttentionKernel::BwdDkdv) => y - x,
            };
            core::cmp::Reverse(work)
        });
        let first = words.len();
        words
            .extend(tiles.as_flattened().iter().map(|&n| u32::try_from(n).expect("a batch has fewer than 2³² tokens")));
        Self { first, tiles: tiles.len() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(documents: &[Document], engine: Engine, rows: usize, kernel: AttentionKernel) -> Vec<[u32; 4]> {
        let mut words = vec![9; 3];
        let table = Table::append(&mut words, documents, engine, rows, kernel);
        assert_eq!(table.first, 3);
        let tiles: Vec<_> = words[3..].chunks_exact(4).map(|t| [t[0], t[1], t[2], t[3]]).collect();
        assert_eq!(tiles.len(), table.tiles);
        tiles
    }

    #[test]
    fn the_longest_work_comes_first() {
        let documents = [Document::whole(0, 3), Document::whole(3, 3), Document::whole(3, 40)];
        assert_eq!(
            table(&documents, Engine::Plain, 16, AttentionKernel::Fwd),
            [[35, 40, 3, 32], [19, 40, 3, 16], [0, 3, 0, 0], [3, 40, 3, 0]]
        );
        assert_eq!(
            table(&documents, Engine::Plain, 16, AttentionKernel::BwdDkdv),
            [[3, 40, 3, 0], [19, 40, 3, 16], [35, 40, 3, 32], [0, 3, 0, 0]]
        );
        let documents = [Document::whole(0, 3), Document::whole(3, 203), Document::whole(203, 403)];
        assert_eq!(
            table(&documents, Engine::Sm90, 128, AttentionKernel::BwdDkdv),
            [[3, 3, 203, 0], [131, 3, 203, 0], [203, 203, 403, 0], [331, 203, 403, 0], [0, 0, 3, 0]]
        );
    }

    #[test]
    fn wide_heads_have_shorter_tiles_of_keys() {
        let arch = Arch { sm: 90 };
        let rows = |kernel, head_dim| super::rows(kernel, Engine::Sm90, head_dim, arch);
        assert_eq!([128, 256].map(|head_dim| rows(AttentionKernel::BwdDkdv, head_dim)), [128, 64]);
        assert_eq!([128, 256].map(|head_dim| rows(AttentionKernel::BwdDq, head_dim)), [128, 128]);
        let documents = [Document::whole(0, 3), Document::whole(3, 103)];
        assert_eq!(
            table(&documents, Engine::Sm90, 64, AttentionKernel::BwdDkdv),
            [[3, 3, 103, 0], [67, 3, 103, 0], [0, 0, 3, 0]]
        );
    }

    #[test]
    fn a_cache_is_seen_by_every_query() {
        let cached = Document { query: 0, key: 0, queries: 20, past: 100 };
        assert_eq!(table(&[cached], Engine::MmaSync, 16, AttentionKernel::Fwd), [[16, 20, 0, 116], [0, 20, 0, 100]]);
    }
}
