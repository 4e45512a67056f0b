//! Tile sizes of the attention kernels on `mma.sync`, by card; measured and held against spills in their files.

use super::{Arch, Defines};

/// A kernel that has tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionKernel {
    /// `attention_fwd`.
    Fwd,
    /// `attention_bwd_dq`.
    BwdDq,
    /// `attention_bwd_dkdv`.
    BwdDkdv,
}

/// The tile sizes of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// Queries of a tile.
    pub block_m: u32,
    /// Keys of a tile.
    pub block_n: u32,
    /// Warps of a block.
    pub warps: u32,
    words: [(&'static str, &'static str); 4],
}

macro_rules! tiles {
    ($m:literal, $n:literal, $warps:literal, $blocks:literal) => {
        Tiles {
            block_m: $m,
            block_n: $n,
            warps: $warps,
            words: [
                ("BLOCK_M", stringify!($m)),
                ("BLOCK_N", stringify!($n)),
                ("WARPS", stringify!($warps)),
                ("BLOCKS", stringify!($blocks)),
            ],
        }
    };
}

impl Tiles {
    /// Returns the tiles for a card and a `head_dim` of 64, 128 or 256. `options` is true with any option of
    /// `attention_scores.cuh`; options need a few more registers.
    pub fn of(kernel: AttentionKernel, head_dim: u32, arch: Arch, options: bool) -> Self {
        use AttentionKernel::{BwdDkdv, BwdDq, Fwd};
        // In the order of the columns: what a card has of shared memory and registers decides.
        let column = match arch.sm {
            80 | 87 if options && (kernel, head_dim) == (BwdDq, 64) => 3,
            80 | 87 => 0,
            90 if options && kernel == Fwd && head_dim < 256 => 3,
            90 => 2,
            100 | 103 => 3,
            75 => return Self::of_75(kernel, head_dim),
            // 86, 89, 120: 99 KiB, the least that any card from 8.0 on has.
            _ => 1,
        };
        let row = match (kernel, head_dim) {
            (Fwd, 256) => [tiles!(128, 32, 8, 1), tiles!(64, 32, 4, 1), tiles!(128, 64, 8, 1), tiles!(128, 64, 8, 1)],
            (BwdDq, 256) => [tiles!(64, 32, 4, 1), tiles!(64, 16, 4, 1), tiles!(128, 32, 8, 1), tiles!(128, 32, 8, 1)],
            (BwdDkdv, 256) => [tiles!(32, 64, 8, 1), tiles!(16, 64, 8, 1), tiles!(64, 64, 8, 1), tiles!(64, 64, 8, 1)],
            (Fwd, 128) => [tiles!(128, 32, 4, 2), tiles!(128, 64, 8, 1), tiles!(128, 64, 4, 2), tiles!(128, 32, 4, 2)],
            (Fwd, _) => [tiles!(128, 64, 4, 2), tiles!(128, 64, 4, 2), tiles!(128, 128, 4, 2), tiles!(128, 64, 4, 2)],
            (BwdDq, 128) => {
                [tiles!(128, 64, 8, 1), tiles!(128, 32, 8, 1), tiles!(128, 32, 4, 2), tiles!(128, 32, 4, 2)]
            }
            (BwdDq, _) => [tiles!(128, 64, 4, 2), tiles!(128, 64, 8, 1), tiles!(128, 64, 4, 2), tiles!(128, 48, 4, 2)],
            (BwdDkdv, 128) => [tiles!(64, 128, 8, 1), tiles!(32, 64, 8, 1), tiles!(64, 64, 4, 2), tiles!(64, 64, 4, 2)],
            (BwdDkdv, _) => [tiles!(64, 64, 4, 2), tiles!(64, 128, 8, 1), tiles!(64, 64, 4, 3), tiles!(64, 64, 4, 2)],
        };
        row[column]
    }

    /// Returns the tiles for compute capability 7.5: 64 KiB of shared memory a block, whatever the options are.
    fn of_75(kernel: AttentionKernel, head_dim: u32) -> Self {
        use AttentionKernel::{BwdDkdv, BwdDq, Fwd};
        match (kernel, head_dim) {
            (Fwd, 256) => tiles!(64, 16, 4, 1),
            (Fwd, 128) => tiles!(64, 32, 4, 1),
            (Fwd, _) => tiles!(128, 64, 4, 1),
            (BwdDq, 256) => tiles!(32, 16, 2, 1),
            (BwdDq, 128) => tiles!(64, 32, 4, 1),
            (BwdDq, _) => tiles!(64, 64, 4, 1),
            (BwdDkdv, 256) => tiles!(16, 16, 2, 1),
            (BwdDkdv, 128) => tiles!(16, 64, 8, 1),
            (BwdDkdv, _) => tiles!(32, 64, 4, 1),
        }
    }

    /// The definitions to compile with.
    pub fn defines(&self, dtype: &'static str, head_dim: u32) -> Defines {
        [("T", dtype), ("HEAD_DIM", digits(head_dim))].into_iter().chain(self.words).collect()
    }

    /// Bytes of dynamic shared memory.
    pub fn shared(&self, kernel: AttentionKernel, head_dim: u32) -> u32 {
        let (m, n, row) = (self.block_m, self.block_n, 2 * head_dim);
        match kernel {
            AttentionKernel::Fwd => (m + 4 * n) * row,
            AttentionKernel::BwdDq => (2 * m + 4 * n) * row,
            AttentionKernel::BwdDkdv => (2 * n + 4 * m) * row + 2 * m * n + 16 * m,
        }
    }
}

/// The tile sizes of the kernels of attention over pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagedTiles {
    /// Warps of a block.
    pub warps: u32,
    /// Pages that a decoding warp has space for.
    stages: u32,
    /// Keys that a block of a prompt's part takes at a time.
    block_n: u32,
    words: [(&'static str, &'static str); 3],
}

impl PagedTiles {
    /// Returns the tiles for a card and a `head_dim` of 64, 128 or 256.
    pub fn of(head_dim: u32, arch: Arch) -> Self {
        macro_rules! tiles {
            ($warps:literal, $stages:literal, $n:literal) => {
                Self {
                    warps: $warps,
                    stages: $stages,
                    block_n: $n,
                    words: [
                        ("WARPS", stringify!($warps)),
                        ("STAGES", stringify!($stages)),
                        ("BLOCK_N", stringify!($n)),
                    ],
                }
            };
        }
        // What a card has of shared memory decides.
        match (head_dim, arch.sm) {
            (64, 75) => tiles!(4, 3, 64),
            (128, 75) => tiles!(2, 3, 32),
            (_, 75) => tiles!(1, 2, 16),
            (64, _) => tiles!(4, 4, 64),
            (128, 80 | 87 | 90 | 100 | 103) => tiles!(4, 3, 64),
            (128, _) => tiles!(4, 2, 64),
            (_, 90 | 100 | 103) => tiles!(4, 3, 32),
            (_, 80 | 87) => tiles!(4, 2, 32),
            _ => tiles!(2, 2, 32),
        }
    }

    /// The definitions to compile with.
    pub fn defines(&self, dtype: &'static str, head_dim: u32) -> Defines {
        [("T", dtype), ("HEAD_DIM", digits(head_dim))].into_iter().chain(self.words).collect()
    }

    /// Rows of a tile of a prompt's part.
    pub fn rows(&self) -> usize {
        16 * self.warps as usize
    }

    /// Bytes of dynamic shared memory for single tokens.
    pub fn decode_shared(&self, head_dim: u32) -> u32 {
        (16 + 32 * self.warps * self.stages) * head_dim * 2
    }

    /// Bytes of dynamic shared memory for parts of prompts.
    pub fn chunk_shared(&self, head_dim: u32) -> u32 {
        (16 * self.warps + 4 * self.block_n) * head_dim * 2
    }
}

/// The size of a head that the tensor cores take, in digits.
pub(super) fn digits(head_dim: u32) -> &'static str {
    match head_dim {
        64 => "64",
        128 => "128",
        256 => "256",
        _ => panic!("heads of {head_dim} channels; the tensor cores take 64, 128 and 256"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_fit_every_card() {
        use AttentionKernel::BwdDkdv;
        // Opt-in shared memory of a block, KiB.
        let cards = [
            (75, 64),
            (80, 163),
            (86, 99),
            (87, 163),
            (89, 99),
            (90, 227),
            (100, 227),
            (103, 227),
            (120, 99),
            (999, 99),
        ];
        for (sm, kib) in cards {
            for kernel in [AttentionKernel::Fwd, AttentionKernel::BwdDq, AttentionKernel::BwdDkdv] {
                for head_dim in [64, 128, 256] {
                    let [plain, optioned] =
                        [false, true].map(|options| Tiles::of(kernel, head_dim, Arch { sm }, options));
                    for tiles in [plain, optioned] {
                        let shared = tiles.shared(kernel, head_dim);
                        assert!(shared <= kib << 10, "sm_{sm} {kernel:?} {head_dim}: {tiles:?}");
                    }
                    let rows = |tiles: Tiles| if kernel == BwdDkdv { tiles.block_n } else { tiles.block_m };
                    assert_eq!(rows(plain), rows(optioned), "sm_{sm} {kernel:?} {head_dim}: the same table");
                }
            }
            for head_dim in [64, 128, 256] {
                let tiles = PagedTiles::of(head_dim, Arch { sm });
                let shared = tiles.decode_shared(head_dim).max(tiles.chunk_shared(head_dim));
                assert!(shared <= kib << 10, "sm_{sm} {head_dim}: {tiles:?}");
            }
        }
    }

    #[test]
    fn definitions() {
        let tiles = Tiles::of(AttentionKernel::BwdDkdv, 64, Arch { sm: 90 }, false);
        assert_eq!(
            tiles.defines("f16", 64),
            [("T", "f16"), ("HEAD_DIM", "64"), ("BLOCK_M", "64"), ("BLOCK_N", "64"), ("WARPS", "4"), ("BLOCKS", "3")]
        );
    }
}
