//! Tests of the sampler: filters, penalties and draws.

use super::*;

fn sampling() -> SamplingParams {
    SamplingParams { temperature: 1.0, ..SamplingParams::default() }
}

/// A sampler of the first stream, for a vocabulary of 100 tokens.
fn sampler(params: &SamplingParams, prompt: &[u32]) -> Sampler {
    Sampler::new(params, prompt, 0, 100).unwrap()
}

/// The next token without limits.
fn next(sampler: &mut Sampler, logits: &[f32]) -> Result<u32, Unsampled> {
    sampler.next(logits, TokenLimits::default()).map(|sampled| sampled.id)
}

/// The filtered distribution by id, of the tokens that are left.
fn distribution(config: &SamplingParams, prompt: &[u32], logits: &[f32]) -> Vec<(u32, f64)> {
    let sampler = sampler(config, prompt);
    let mut tokens = sampler.candidates(&sampler.changed(logits, TokenLimits::default())).tokens;
    let total: f64 = tokens.iter().map(|(_, weight)| weight).sum();
    tokens.sort_unstable_by_key(|(id, _)| *id);
    tokens.into_iter().map(|(id, weight)| (id, weight / total)).collect()
}

/// Logits are rounded to f32, so probabilities are right to 1e-6.
fn assert_is(got: &[(u32, f64)], expected: &[(u32, f64)]) {
    let ids = |list: &[(u32, f64)]| list.iter().map(|(id, _)| *id).collect::<Vec<_>>();
    assert_eq!(ids(got), ids(expected));
    for ((id, got), (_, expected)) in got.iter().zip(expected) {
        assert!((got - expected).abs() < 1e-6, "token {id}: {got} for {expected}");
    }
}

/// Probabilities 1/2, 1/4, 1/8, 1/16 and 1/16, not in order.
fn halves() -> Vec<f32> {
    [0.125f32, 0.5, 0.0625, 0.25, 0.0625].map(f32::ln).to_vec()
}

#[test]
fn cuts_and_shares() {
    let config = SamplingParams { temperature: 1.0, top_k: 2, seed: 1, ..SamplingParams::default() };
    let logits = [0.0, 3f32.ln(), 0.5f32.ln(), 0.0];
    let mut sampler = sampler(&config, &[]);
    let draws: Vec<u32> = (0..4000).map(|_| next(&mut sampler, &logits).unwrap()).collect();
    let count = |id| draws.iter().filter(|&&d| d == id).count();
    assert_eq!(count(2) + count(3), 0, "outside the top 2 (ties go to the lower id)");
    // 4,000 draws with p = 3/4: standard deviation 27; five of them.
    assert!(count(1).abs_diff(3000) < 137, "{}", count(1));
    let nucleus = |weights: &[f64], top_p| Ranked::new((0..).zip(weights.iter().copied()).collect()).nucleus(top_p);
    assert_eq!(nucleus(&[0.5, 0.3, 0.2], 0.5), 1);
    assert_eq!(nucleus(&[0.5, 0.3, 0.2], 0.51), 2);
    assert_eq!(nucleus(&[0.5, 0.3, 0.2], 1.0), 3);
    let mut greedy = self::sampler(&SamplingParams::default(), &[]);
    assert_eq!(next(&mut greedy, &[1.0, 2.0, 2.0]), Ok(1));
    assert!(SamplingParams { top_p: 0.0, ..config }.check(4).is_err());
}

#[test]
fn temperature_divides_logits() {
    let config = SamplingParams { temperature: 0.5, ..sampling() };
    // Squares of 2, 4, 1 and 1, in twenty-seconds.
    let logits = [2f32.ln(), 4f32.ln(), 0.0, 0.0];
    let expected = [(0, 4.0 / 22.0), (1, 16.0 / 22.0), (2, 1.0 / 22.0), (3, 1.0 / 22.0)];
    assert_is(&distribution(&config, &[], &logits), &expected);
}

#[test]
fn top_k_and_top_p_renormalize_what_they_keep() {
    let top_k = SamplingParams { top_k: 3, ..sampling() };
    assert_is(&distribution(&top_k, &[], &halves()), &[(0, 1.0 / 7.0), (1, 4.0 / 7.0), (3, 2.0 / 7.0)]);
    // 1/2 + 1/4 are not yet 0.8.
    let top_p = SamplingParams { top_p: 0.8, ..sampling() };
    assert_is(&distribution(&top_p, &[], &halves()), &[(0, 1.0 / 7.0), (1, 4.0 / 7.0), (3, 2.0 / 7.0)]);
    // The share is of what top_k left: 4/7 + 2/7 reach 0.8, of all tokens they would not.
    let both = SamplingParams { top_k: 3, top_p: 0.8, ..sampling() };
    assert_is(&distribution(&both, &[], &halves()), &[(1, 2.0 / 3.0), (3, 1.0 / 3.0)]);
}

#[test]
fn min_p_is_a_share_of_the_most_likely_token() {
    let with = |min_p| SamplingParams { min_p, ..sampling() };
    // The bounds are 0.5 · 0.3 = 0.15 and 0.5 · 0.2 = 0.1: below 1/4 and 1/8.
    assert_is(&distribution(&with(0.3), &[], &halves()), &[(1, 2.0 / 3.0), (3, 1.0 / 3.0)]);
    assert_is(&distribution(&with(0.2), &[], &halves()), &[(0, 1.0 / 7.0), (1, 4.0 / 7.0), (3, 2.0 / 7.0)]);
    assert_is(&distribution(&with(1.0), &[], &halves()), &[(1, 1.0)]);
    // After the temperature: squares of the shares, 1, 1/4, 1/16 and 1/64 twice.
    let hot = SamplingParams { temperature: 0.5, ..with(0.1) };
    assert_is(&distribution(&hot, &[], &halves()), &[(1, 0.8), (3, 0.2)]);
    for wrong in [-0.1, 1.1, f32::NAN] {
        assert!(with(wrong).check(4).is_err_and(|e| e.to_string().contains("min_p")), "{wrong}");
    }
}

#[test]
fn the_repetition_penalty_counts_each_token_once() {
    let config = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::default() };
    let mut sampler = sampler(&config, &[0, 3, 3]);
    let changed = |sampler: &Sampler, logits: &[f32]| sampler.changed(logits, TokenLimits::default()).into_owned();
    let logits = [4.0, 3.0, -1.0, -3.0];
    assert_eq!(changed(&sampler, &logits), [2.0, 3.0, -1.0, -6.0]);
    assert_eq!(next(&mut sampler, &logits), Ok(1), "4 became 2");
    let logits = [4.0, 3.0, 2.5, -3.0];
    assert_eq!(changed(&sampler, &logits), [2.0, 1.5, 2.5, -6.0]);
    assert_eq!(next(&mut sampler, &logits), Ok(2), "what was chosen is penalized too");
    // Before the temperature: 2 · ln 2 becomes ln 2, divided by 1/2 twice that.
    let warm = SamplingParams { temperature: 0.5, ..config.clone() };
    assert_is(&distribution(&warm, &[0], &[4f32.ln(), 0.0]), &[(0, 0.8), (1, 0.2)]);
    for wrong in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let config = SamplingParams { repetition_penalty: wrong, ..config.clone() };
        assert!(config.check(4).is_err_and(|e| e.to_string().contains("repetition_penalty")), "{wrong}");
    }
}

#[test]
fn nothing_is_drawn_from_what_is_not_finite() {
    for config in [SamplingParams::default(), sampling()] {
        let mut sampler = sampler(&config, &[]);
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(next(&mut sampler, &[0.0, wrong, 1.0]), Err(Unsampled::NonFinite));
        }
        assert!(next(&mut sampler, &[f32::MAX, f32::MIN]).is_ok());
    }
}

/// A vocabulary that is sorted in parts: ranks are those of a whole sort.
#[test]
fn ranks_are_those_of_a_sort() {
    let tokens: Vec<(u32, f64)> = (0..1000).map(|id| (id, f64::from(id * 7919 % 101))).collect();
    let mut sorted = tokens.clone();
    sorted.sort_by(|a, b| b.1.total_cmp(&a.1));
    let mut ranked = Ranked::new(tokens);
    for (rank, expected) in sorted.iter().enumerate() {
        assert_eq!(ranked.get(rank), *expected, "{rank}");
    }
}

#[test]
fn presence_and_frequency_count_the_text_without_the_prompt() {
    let params = SamplingParams { presence_penalty: 1.0, frequency_penalty: 0.5, ..SamplingParams::default() };
    let mut sampler = sampler(&params, &[1]);
    let changed = |sampler: &Sampler| sampler.changed(&[4.0, 3.0, 3.5], TokenLimits::default()).into_owned();
    assert_eq!(changed(&sampler), [4.0, 3.0, 3.5]);
    assert_eq!(next(&mut sampler, &[4.0, 3.0, 3.5]), Ok(0));
    assert_eq!(changed(&sampler), [2.5, 3.0, 3.5]);
    sampler.counts.insert(0, 3);
    assert_eq!(changed(&sampler), [1.5, 3.0, 3.5]);
    for wrong in [f32::NAN, f32::INFINITY] {
        let presence = SamplingParams { presence_penalty: wrong, ..SamplingParams::default() };
        let frequency = SamplingParams { frequency_penalty: wrong, ..SamplingParams::default() };
        assert!(presence.check(4).is_err_and(|e| e.to_string().contains("presence_penalty")));
        assert!(frequency.check(4).is_err_and(|e| e.to_string().contains("frequency_penalty")));
    }
}

#[test]
fn limits_and_biases() {
    let greedy = SamplingParams::default();
    let mut allowed = TokenMask::none(4);
    fn choose(params: &SamplingParams, limits: TokenLimits<'_>) -> Result<u32, Unsampled> {
        sampler(params, &[]).next(&[1.0, 2.0, 3.0, 4.0], limits).map(|sampled| sampled.id)
    }
    for params in [&greedy, &SamplingParams { temperature: 1.0, top_k: 1, ..sampling() }] {
        assert_eq!(choose(params, TokenLimits { banned: &[3, 99], ..TokenLimits::default() }), Ok(2));
        let none = TokenMask::none(4);
        let nothing = TokenLimits { allowed: Some(&none), banned: &[] };
        assert_eq!(choose(params, nothing), Err(Unsampled::NothingAllowed));
    }
    allowed.set(0);
    allowed.set(1);
    allowed.set(4);
    assert_eq!(choose(&greedy, TokenLimits { allowed: Some(&allowed), banned: &[] }), Ok(1));
    assert_eq!(choose(&greedy, TokenLimits { allowed: Some(&allowed), banned: &[1] }), Ok(0));
    let bias = SamplingParams { logit_bias: vec![(0, 3.5), (3, -100.0)], ..SamplingParams::default() };
    assert_eq!(choose(&bias, TokenLimits::default()), Ok(0));
    assert!(bias.check(3).is_err_and(|e| e.to_string().contains("token 3")));
}

#[test]
fn masks_are_bits_of_words() {
    let mask = TokenMask::from_words(vec![0b101, u32::MAX], 34);
    let allowed: Vec<u32> = (0..70).filter(|&id| mask.allows(id)).collect();
    assert_eq!(allowed, [0, 2, 32, 33]);
    assert_eq!(
        (TokenMask::all(64), TokenMask::none(64)),
        (TokenMask::from_words(vec![u32::MAX; 2], 64), TokenMask::from_words(vec![], 64))
    );
    assert!(TokenMask::from_words(vec![0, 0b100], 34).is_empty());
}

/// A draw is a function of seed, stream and index, whatever was drawn before.
#[test]
fn draws_are_named_by_seed_stream_and_index() {
    let params = SamplingParams { seed: 11, ..sampling() };
    let logits = [0.0; 64];
    let draws = |params: &SamplingParams, stream| {
        let mut sampler = Sampler::new(params, &[], stream, 100).unwrap();
        (0..32).map(|_| next(&mut sampler, &logits).unwrap()).collect::<Vec<_>>()
    };
    let first = draws(&params, 0);
    assert_eq!(draws(&params, 0), first);
    assert_ne!(draws(&params, 1), first);
    assert_ne!(draws(&SamplingParams { seed: 12, ..params.clone() }, 0), first);
    let mut late = sampler(&params, &[]);
    late.index = 30;
    assert_eq!(next(&mut late, &logits).unwrap(), first[30]);
}

/// The distribution that a filter leaves, by a sort and plain sums.
fn exact(params: &SamplingParams, logits: &[f64]) -> Vec<f64> {
    let mut p: Vec<f64> = logits.iter().map(|x| (x / f64::from(params.temperature)).exp()).collect();
    let normalize = |p: &mut Vec<f64>| {
        let sum: f64 = p.iter().sum();
        p.iter_mut().for_each(|p| *p /= sum);
    };
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| p[b].total_cmp(&p[a]).then(a.cmp(&b)));
    normalize(&mut p);
    if params.top_k > 0 {
        order.drain(params.top_k.min(order.len())..).for_each(|id| p[id] = 0.0);
        normalize(&mut p);
    }
    if params.top_p < 1.0 {
        let mut sum = 0.0;
        for &id in &order {
            if sum >= f64::from(params.top_p) {
                p[id] = 0.0;
            }
            sum += p[id];
        }
        normalize(&mut p);
    }
    let least = p.iter().copied().fold(0.0, f64::max) * f64::from(params.min_p);
    p.iter_mut().filter(|p| **p < least).for_each(|p| *p = 0.0);
    normalize(&mut p);
    p
}

/// Pearson's χ² of 20,000 draws with each filter. For d degrees of freedom its mean is d and its standard deviation √2d.
#[test]
fn draws_follow_the_exact_probabilities() {
    const DRAWS: usize = 20_000;
    // Probabilities that fall by 0.8 from token to token, in no order.
    let logits: Vec<f32> = (0..40).map(|id: i32| -0.22 * (id * 7 % 40) as f32).collect();
    let wide: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
    let filters = [
        sampling(),
        SamplingParams { temperature: 0.6, ..sampling() },
        SamplingParams { temperature: 1.7, ..sampling() },
        SamplingParams { top_k: 7, ..sampling() },
        SamplingParams { top_p: 0.83, ..sampling() },
        SamplingParams { min_p: 0.13, ..sampling() },
        SamplingParams { top_k: 20, top_p: 0.9, min_p: 0.05, temperature: 1.3, ..sampling() },
    ];
    for (seed, params) in filters.into_iter().enumerate() {
        let params = SamplingParams { seed: seed as u64, ..params };
        let p = exact(&params, &wide);
        let mut counts = vec![0usize; p.len()];
        let mut sampler = sampler(&params, &[]);
        for _ in 0..DRAWS {
            let sampled = sampler.next(&logits, TokenLimits::default()).unwrap();
            assert!((f64::from(sampled.log_prob) - p[sampled.id as usize].ln()).abs() < 1e-5, "{params:?} {sampled:?}");
            counts[sampled.id as usize] += 1;
        }
        let (mut chi, mut cells) = (0.0, 0usize);
        for (&count, &p) in counts.iter().zip(&p) {
            if p == 0.0 {
                assert_eq!(count, 0, "{params:?}: a token outside of the filter");
                continue;
            }
            let expected = p * DRAWS as f64;
            chi += (count as f64 - expected).powi(2) / expected;
            cells += 1;
        }
        let degrees = (cells - 1) as f64;
        assert!(cells > 1 && chi < degrees + 5.0 * (2.0 * degrees).sqrt(), "{params:?}: χ² {chi} of {degrees}");
    }
}
