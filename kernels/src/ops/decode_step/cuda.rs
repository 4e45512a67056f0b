//! The choice of tokens as a kernel.

use super::{DRAW, DRAWN, Draw, Drawn};
use crate::linear_cross_entropy::LmHead;
use crate::runtime::op::{blocks, int};
use crate::runtime::{Array, Ints, args, entry};

/// Returns a draw as the kernel reads it.
pub(super) fn draw_words(draw: &Draw) -> [u32; DRAW] {
    let &Draw { temperature, top_k, top_p, min_p, uniform } = draw;
    let top_k = u32::try_from(top_k).unwrap_or(u32::MAX);
    let uniform = uniform.to_bits();
    [temperature.to_bits(), top_p.to_bits(), min_p.to_bits(), top_k, uniform as u32, (uniform >> 32) as u32, 0, 0]
}

/// Returns results from the words that the kernel wrote.
pub(super) fn drawn(words: &[u32]) -> Vec<Drawn> {
    let one = |&[id, log_prob, sampling_log_prob, is_finite]: &[u32; DRAWN]| Drawn {
        id,
        log_prob: f32::from_bits(log_prob),
        sampling_log_prob: f32::from_bits(sampling_log_prob),
        is_finite: is_finite == 1,
    };
    words.as_chunks().0.iter().map(one).collect()
}

/// Takes the ids that the step before chose; `ids` and `previous` are the first words of these parts.
pub(super) fn step_ids(words: &Ints, ids: usize, previous: usize, rows: usize) {
    words.cuda().kernel(entry!("step_ids.cu", "step_ids"), &[("T", "f32")]).launch(
        [blocks(rows.div_ceil(256)), 1, 1],
        [256, 1, 1],
        0,
        args![words.ptr(), words.ptr_at(ids), words.ptr_at(previous), int(rows)],
    );
}

/// Chooses a token from each row of logits; `draws` is the address of the draws.
pub(super) fn sample(logits: &Array, head: &LmHead, draws: u64, drawn: &Ints) {
    let logits = logits.aligned();
    let mut defines = vec![("T", logits.dtype().name())];
    defines.extend(head.softcap.map(|_| ("SOFTCAP", "")));
    logits.cuda().kernel(entry!("sample.cu", "sample"), &defines).early().launch(
        [blocks(logits.rows()), 1, 1],
        [1024, 1, 1],
        0,
        args![
            logits.ptr(),
            draws,
            drawn.ptr(),
            int(logits.cols()),
            int(logits.ld()),
            head.multiplier,
            head.softcap.unwrap_or(1.0)
        ],
    );
}
