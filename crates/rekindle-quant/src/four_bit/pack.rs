//! The loops over the blocks of one task.

use super::codebook::Codebook;
use crate::Blocksize;
use crate::absmax::largest_magnitude;
use crate::reciprocal::{flush, reciprocal};

/// Number of elements encoded together; divides every block size.
const GROUP: usize = 32;

/// Encodes a sequence of blocks, of which the last may be short.
#[inline(always)]
pub(super) fn encode<T, C: Codebook>(
    values: &[T],
    to_f32: impl Fn(&[T], &mut [f32]),
    blocksize: Blocksize,
    codes: &mut [u8],
    absmax: &mut [f32],
) {
    let mut wide = [0.0; 4096];
    let blocks = values.chunks(blocksize.get()).zip(codes.chunks_mut(blocksize.get() / 2)).zip(absmax);
    for ((values, codes), absmax) in blocks {
        let block = &mut wide[..values.len()];
        to_f32(values, block);
        // A short block is padded with zeros, which take part in its maximum.
        let floor = if block.len() == blocksize.get() { -f32::MAX } else { 0.0 };
        *absmax = largest_magnitude(block, floor);
        encode_block::<C>(block, reciprocal(*absmax), codes);
    }
}

#[inline(always)]
fn encode_block<C: Codebook>(block: &[f32], inverse: f32, codes: &mut [u8]) {
    let (groups, rest) = block.as_chunks::<GROUP>();
    let (packed, tail) = codes.split_at_mut(groups.len() * GROUP / 2);
    for (group, packed) in groups.iter().zip(packed.as_chunks_mut().0) {
        *packed = encode_group::<C>(group, inverse);
    }
    if !rest.is_empty() {
        let mut padded = [0.0; GROUP];
        padded[..rest.len()].copy_from_slice(rest);
        let packed = encode_group::<C>(&padded, inverse);
        tail.copy_from_slice(&packed[..tail.len()]);
    }
}

#[inline(always)]
fn encode_group<C: Codebook>(group: &[f32; GROUP], inverse: f32) -> [u8; GROUP / 2] {
    let mut codes = [0; GROUP];
    for (code, &x) in codes.iter_mut().zip(group) {
        *code = C::code(flush(x) * inverse);
    }
    let mut packed = [0; GROUP / 2];
    for (byte, pair) in packed.iter_mut().zip(codes.as_chunks::<2>().0) {
        *byte = (pair[0] << 4 | pair[1]) as u8;
    }
    packed
}

/// Decodes one block with a table of its 16 scaled values.
#[inline(always)]
pub(super) fn decode<T: Copy>(codes: &[u8], table: &[T; 16], out: &mut [T]) {
    let (pairs, last) = out.as_chunks_mut::<2>();
    for (pair, &byte) in pairs.iter_mut().zip(codes) {
        *pair = [table[usize::from(byte >> 4)], table[usize::from(byte & 15)]];
    }
    if let ([last], Some(&byte)) = (last, codes.last()) {
        *last = table[usize::from(byte >> 4)];
    }
}
