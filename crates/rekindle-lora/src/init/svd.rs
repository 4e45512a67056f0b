//! Leading singular triplets and orthonormal bases of a weight in `f32`.
//!
//! A matrix of a few long vectors is a `Vec` of them, in `f64`. Products with a large W are in `f32`, on all cores.

use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use rekindle_kernels::{DType, Device, Tensor, from_f32, matmul, to_f32};

use super::normal;

/// Long vectors.
pub(crate) type Vectors = Vec<Vec<f64>>;

/// The length of the shorter side up to which all triplets are computed.
const SMALL: usize = 128;
/// The number of vectors of a block of [`leading`] in addition to the rank.
const BEYOND: usize = 8;
/// The number of vectors of its whole basis, unless that is less than [`LEAST_BLOCKS`].
const BASIS: usize = 256;
const LEAST_BLOCKS: usize = 4;

/// W ≈ Σ s_i·u_i·v_iᵀ, with orthonormal u_i `[out]` and v_i `[in]`, s descending.
pub(crate) struct Triplets {
    pub(crate) u: Vectors,
    pub(crate) s: Vec<f64>,
    pub(crate) v: Vectors,
}

/// Returns the min(r, out, in) triplets with the largest singular values. W `[out, in]` is row-major and finite.
///
/// If a side is short, it uses one-sided Jacobi (Hestenes) in `f64`. Otherwise it uses a block Krylov space
/// (arXiv:1504.05477): the span of r + 8 random vectors and their products with powers of W·Wᵀ, of 256 dimensions or
/// 4·(r + 8) if that is more. It only partly separates singular values that are very close: of a random matrix of
/// 2,560 × 9,728 it captures 0.2 % less energy than 100 rounds of [`randomized`].
pub(crate) fn leading(w: &[f32], shape: [usize; 2], r: usize, rng: &mut ChaCha8Rng) -> Triplets {
    let short = shape[0].min(shape[1]);
    let block = r + BEYOND;
    if short <= SMALL || short < LEAST_BLOCKS * block {
        return exact(w, shape, r.min(short));
    }
    let w = Product::new(w, shape);
    let mut next = w.up(&w.random(block, rng));
    let (mut basis, mut images) = (Vectors::new(), Vectors::new());
    for _ in 0..(BASIS / block).max(LEAST_BLOCKS).min(short / block) {
        extend(&mut basis, next);
        let image = w.down(&basis[images.len()..]);
        next = w.up(&image);
        images.extend(image);
    }
    w.triplets(&basis, &images, r)
}

/// Returns the triplets of [`leading`] by `rounds` rounds of subspace iteration from r random vectors (arXiv:0909.4061,
/// algorithm 4.4), the method of `torch.svd_lowrank`.
///
/// The error in the direction of triplet i is of the order (σ_{r+1} / σ_i)^(2·rounds + 2).
pub(crate) fn randomized(w: &[f32], shape: [usize; 2], r: usize, rounds: usize, rng: &mut ChaCha8Rng) -> Triplets {
    let w = Product::new(w, shape);
    let start = w.random(r.min(shape[0]).min(shape[1]), rng);
    let mut basis = orthonormal(w.up(&start));
    for _ in 0..rounds {
        basis = orthonormal(w.up(&orthonormal(w.down(&basis))));
    }
    let images = w.down(&basis);
    w.triplets(&basis, &images, r)
}

/// Returns the min(r, out, in) triplets of B·A with the largest singular values, from the columns of B and the rows of A.
/// They are those of the small matrix Qᵀ·B·A·P, with orthonormal bases Q of the columns and P of the rows. All in `f64`.
pub(crate) fn of_product(b: &Vectors, a: &Vectors, r: usize) -> Triplets {
    // As many vectors as there are dimensions already span the whole space.
    let basis = |x: &Vectors| orthonormal(x.iter().take(x[0].len()).cloned().collect());
    let (q, p) = (basis(b), basis(a));
    let products = |basis: &Vectors, x: &Vectors| -> Vectors {
        basis.par_iter().map(|q| x.iter().map(|x| dot(q, x)).collect()).collect()
    };
    let (qb, pa) = (products(&q, b), products(&p, a));
    // Of Qᵀ·B·A·P the columns, or the rows where those are fewer.
    let is_tall = q.len() >= p.len();
    let (over, under) = if is_tall { (&pa, &qb) } else { (&qb, &pa) };
    let Triplets { u, mut s, v } = jacobi(products(over, under));
    let (u, v) = if is_tall { (u, v) } else { (v, u) };
    let turned = |basis: &Vectors, x: &Vectors| x.par_iter().take(r).map(|by| combination(basis, by)).collect();
    s.truncate(r);
    Triplets { u: turned(&q, &u), s, v: turned(&p, &v) }
}

/// An orthonormal basis of the vectors, in their order (modified Gram–Schmidt, twice), and where a vector lies in the
/// span of those before it, one of the directions that are left. There are no more vectors than dimensions.
pub(crate) fn orthonormal(x: Vectors) -> Vectors {
    let mut basis = Vectors::new();
    extend(&mut basis, x);
    basis
}

/// Adds what [`orthonormal`] would make of `x` after the vectors of `basis`.
fn extend(basis: &mut Vectors, x: Vectors) {
    let mut spare = 0;
    for mut x in x {
        let (length, axes) = (norm(&x), x.len() as f64);
        // What rounding leaves of a vector in the span is no direction.
        let mut found = project_out(basis, &mut x, length * 1e-10);
        while !found {
            x.fill(0.0);
            x[spare] = 1.0;
            spare += 1;
            // As long as there are fewer vectors than dimensions, some axis has this much of itself left.
            found = project_out(basis, &mut x, 0.5 / axes.sqrt());
        }
        basis.push(x);
    }
}

/// Wᵀ·x of every x `[out]`.
pub(crate) fn transposed_times(w: &[f32], shape: [usize; 2], x: &[Vec<f64>]) -> Vectors {
    vectors(&matmul::nn(&rows(x), &tensor(w, shape)))
}

/// The longer and the shorter side of W.
struct Product {
    w: Tensor<2>,
    /// True if the longer is `out`.
    tall: bool,
}

impl Product {
    fn new(w: &[f32], shape: [usize; 2]) -> Self {
        Self { w: tensor(w, shape), tall: shape[0] >= shape[1] }
    }

    /// Returns vectors of the longer side with normal elements.
    fn random(&self, count: usize, rng: &mut ChaCha8Rng) -> Vectors {
        let [out, input] = self.w.dims();
        (0..count).map(|_| (0..out.max(input)).map(|_| normal(rng)).collect()).collect()
    }

    /// Maps vectors of the shorter side to the longer.
    fn down(&self, x: &[Vec<f64>]) -> Vectors {
        let x = rows(x);
        vectors(&if self.tall { matmul::nt(&x, &self.w) } else { matmul::nn(&x, &self.w) })
    }

    /// Maps vectors of the longer side to the shorter.
    fn up(&self, x: &[Vec<f64>]) -> Vectors {
        let x = rows(x);
        vectors(&if self.tall { matmul::nn(&x, &self.w) } else { matmul::nt(&x, &self.w) })
    }

    /// Returns the first r triplets of W restricted to the span of `basis`, an orthonormal basis on the shorter side, with
    /// its `images`.
    ///
    /// The eigenvectors of the images' Gram matrix rotate both. Squaring loses half of `f64`'s 53 bits, which leaves more
    /// than the 24 bits of W.
    fn triplets(&self, basis: &Vectors, images: &Vectors, r: usize) -> Triplets {
        let gram = images.par_iter().map(|x| images.iter().map(|y| dot(x, y)).collect()).collect();
        let turns = jacobi(gram).v;
        let turned = |x: &Vectors| turns.par_iter().take(r).map(|by| combination(x, by)).collect();
        let (near, mut far): (Vectors, Vectors) = (turned(basis), turned(images));
        let s = far.iter_mut().map(|x| unit(x)).collect();
        if self.tall { Triplets { u: far, s, v: near } } else { Triplets { u: near, s, v: far } }
    }
}

fn tensor(w: &[f32], shape: [usize; 2]) -> Tensor<2> {
    from_f32(w.to_vec(), shape, &Device::cpu(), DType::F32)
}

fn rows(x: &[Vec<f64>]) -> Tensor<2> {
    let shape = [x.len(), x[0].len()];
    from_f32(x.iter().flatten().map(|&x| x as f32).collect(), shape, &Device::cpu(), DType::F32)
}

fn vectors(rows: &Tensor<2>) -> Vectors {
    let [_, length] = rows.dims();
    to_f32(rows.clone()).chunks_exact(length).map(|row| row.iter().map(|&x| f64::from(x)).collect()).collect()
}

/// Brings a vector to length 1 and returns what it was; zeros stay.
fn unit(x: &mut [f64]) -> f64 {
    let length = norm(x);
    if length > 0.0 {
        x.iter_mut().for_each(|x| *x /= length);
    }
    length
}

/// All triplets of W, and of these the first `k`.
fn exact(w: &[f32], [out, input]: [usize; 2], k: usize) -> Triplets {
    let row = |i: usize| w[i * input..][..input].iter().map(|&w| f64::from(w)).collect();
    let column = |j: usize| (0..out).map(|i| f64::from(w[i * input + j])).collect();
    let Triplets { mut u, mut s, mut v } = if input <= out {
        jacobi((0..input).map(column).collect())
    } else {
        let Triplets { u, s, v } = jacobi((0..out).map(row).collect());
        Triplets { u: v, s, v: u }
    };
    u.truncate(k);
    s.truncate(k);
    v.truncate(k);
    Triplets { u, s, v }
}

/// The triplets of the matrix with these columns, descending: pairs of columns are rotated until all are orthogonal.
/// Those of a symmetric matrix are its eigenvectors.
///
/// A singular value below 2⁻⁵⁰ of the largest is zero, and so is its u.
fn jacobi(mut columns: Vectors) -> Triplets {
    let n = columns.len();
    let mut v: Vectors = (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    let mut sq: Vec<f64> = columns.iter().map(|x| dot(x, x)).collect();
    // Each sweep squares what is left; ten have always been enough for sizes up to a thousand.
    for _ in 0..30 {
        let mut rotated = false;
        for i in 0..n {
            for j in i + 1..n {
                let (a, b, c) = (sq[i], sq[j], dot(&columns[i], &columns[j]));
                if c.abs() <= 1e-15 * (a * b).sqrt() {
                    continue;
                }
                rotated = true;
                let zeta = (b - a) / (2.0 * c);
                let t = zeta.signum() / (zeta.abs() + zeta.hypot(1.0));
                let cos = t.hypot(1.0).recip();
                rotate(&mut columns, [i, j], cos, cos * t);
                rotate(&mut v, [i, j], cos, cos * t);
                (sq[i], sq[j]) = (dot(&columns[i], &columns[i]), dot(&columns[j], &columns[j]));
            }
        }
        if !rotated {
            break;
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| sq[j].total_cmp(&sq[i]));
    let largest = order.first().map_or(0.0, |&i| sq[i].sqrt());
    let mut sorted = Triplets { u: Vec::new(), s: Vec::new(), v: Vec::new() };
    for i in order {
        let length = sq[i].sqrt();
        let (s, scale) = if length > largest * 2f64.powi(-50) { (length, length.recip()) } else { (0.0, 0.0) };
        sorted.u.push(columns[i].iter().map(|x| x * scale).collect());
        sorted.s.push(s);
        sorted.v.push(core::mem::take(&mut v[i]));
    }
    sorted
}

fn rotate(x: &mut Vectors, [i, j]: [usize; 2], cos: f64, sin: f64) {
    let (before, rest) = x.split_at_mut(j);
    for (a, b) in before[i].iter_mut().zip(&mut rest[0]) {
        (*a, *b) = (cos * *a - sin * *b, sin * *a + cos * *b);
    }
}

/// Takes the unit vectors `basis` out of `x` and makes it a unit vector; false if no more than `least` is left of it.
fn project_out(basis: &[Vec<f64>], x: &mut [f64], least: f64) -> bool {
    for _ in 0..2 {
        for q in basis {
            let along = dot(q, x);
            x.iter_mut().zip(q).for_each(|(x, q)| *x -= along * q);
        }
    }
    norm(x) > least && unit(x) > 0.0
}

fn combination(basis: &Vectors, by: &[f64]) -> Vec<f64> {
    let mut sum = vec![0.0; basis[0].len()];
    for (vector, by) in basis.iter().zip(by) {
        sum.iter_mut().zip(vector).for_each(|(sum, x)| *sum += by * x);
    }
    sum
}

fn norm(x: &[f64]) -> f64 {
    dot(x, x).sqrt()
}

/// Returns the dot product. Eight independent sums hide the latency of an addition.
fn dot(x: &[f64], y: &[f64]) -> f64 {
    let mut sums = [0f64; 8];
    let (x, x_rest) = x.as_chunks::<8>();
    let (y, y_rest) = y.as_chunks::<8>();
    for (x, y) in x.iter().zip(y) {
        for ((sum, x), y) in sums.iter_mut().zip(x).zip(y) {
            *sum += x * y;
        }
    }
    sums.iter().sum::<f64>() + x_rest.iter().zip(y_rest).map(|(x, y)| x * y).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn rng() -> ChaCha8Rng {
        ChaCha8Rng::seed_from_u64(7)
    }

    fn waves(count: usize, length: usize, step: f64) -> Vectors {
        (0..count)
            .map(|i| (0..length).map(|j| ((i * length + j) as f64 * step + (j * j) as f64).sin()).collect())
            .collect()
    }

    /// Σ s_i·u_i·v_iᵀ between orthonormal vectors.
    fn known([out, input]: [usize; 2], s: &[f64]) -> Vec<f32> {
        let (u, v) = (orthonormal(waves(s.len(), out, 0.7)), orthonormal(waves(s.len(), input, 1.3)));
        let w = |i: usize, j: usize| -> f64 { (0..s.len()).map(|k| s[k] * u[k][i] * v[k][j]).sum() };
        (0..out * input).map(|at| w(at / input, at % input) as f32).collect()
    }

    fn check_orthonormal(x: &Vectors, tolerance: f64) {
        for (i, a) in x.iter().enumerate() {
            for (j, b) in x.iter().enumerate() {
                let want = f64::from(u8::from(i == j));
                assert!((dot(a, b) - want).abs() < tolerance, "{i} · {j} is {}", dot(a, b));
            }
        }
    }

    #[test]
    fn known_triplets_are_found_by_every_method() {
        // 9 and 160 are on either side of SMALL, with few vectors and with many.
        for shape in [[9, 5], [5, 9], [160, 150], [150, 170]] {
            let w = known(shape, &[5.0, 3.0, 1.0]);
            for triplets in [leading(&w, shape, 3, &mut rng()), randomized(&w, shape, 3, 2, &mut rng())] {
                for (s, want) in triplets.s.iter().zip([5.0, 3.0, 1.0]) {
                    // W is known to 2⁻²⁴ of its elements, and products are sums in f32.
                    assert!((s - want).abs() < 3e-6, "{shape:?} {:?}", triplets.s);
                }
                check_orthonormal(&triplets.u, 3e-6);
                check_orthonormal(&triplets.v, 3e-6);
                for (at, w) in w.iter().enumerate() {
                    let (i, j) = (at / shape[1], at % shape[1]);
                    let sum: f64 = (0..3).map(|k| triplets.u[k][i] * triplets.s[k] * triplets.v[k][j]).sum();
                    assert!((sum - f64::from(*w)).abs() < 3e-6, "{sum} {w}");
                }
            }
        }
    }

    /// Values that fall slowly, as those of weights do; the truth is Jacobi's, in f64.
    #[test]
    fn iterating_finds_what_jacobi_finds() {
        let shape = [170, 150];
        let s: Vec<f64> = (0..140).map(|i| 2.0 * 0.95f64.powi(i)).collect();
        let w = known(shape, &s);
        let (found, exact) = (leading(&w, shape, 8, &mut rng()), exact(&w, shape, 8));
        for (i, want) in s.iter().enumerate().take(8) {
            let along = dot(&found.v[i], &exact.v[i]).abs();
            assert!((exact.s[i] / want - 1.0).abs() < 1e-6, "{} {want}", exact.s[i]);
            assert!((found.s[i] / want - 1.0).abs() < 1e-6, "{} {want}", found.s[i]);
            assert!(along > 1.0 - 1e-6, "v {i}: {along}");
        }
        assert!(found.s.is_sorted_by(|a, b| a >= b));
    }

    #[test]
    fn zeros_have_no_directions_to_divide_by() {
        let triplets = leading(&[0.0; 12], [4, 3], 2, &mut rng());
        assert_eq!(triplets.s, [0.0, 0.0]);
        assert!(triplets.u.iter().flatten().all(|&u| u == 0.0));
    }

    #[test]
    fn a_basis_is_complete_whatever_the_vectors() {
        let x = vec![vec![3.0, 4.0, 0.0, 0.0], vec![6.0, 8.0, 0.0, 0.0], vec![0.0; 4], vec![3.0, 4.0, 1.0, 0.0]];
        let q = orthonormal(x);
        check_orthonormal(&q, 1e-14);
        assert!((q[0][0] - 0.6).abs() < 1e-15 && (q[0][1] - 0.8).abs() < 1e-15);
    }
}
