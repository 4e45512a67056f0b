//! Token embeddings.

use burn::tensor::DType;
use rekindle_kernels::{ParamsBuilder, embedding};

use super::{Case, Oracle, Place, Results, grad, noise, rounded, values, widened};

#[derive(Debug)]
pub(crate) struct Embedding {
    vocab: usize,
    hidden: usize,
    ids: Vec<u32>,
    dtype: DType,
}

impl Embedding {
    pub(crate) fn new(vocab: usize, hidden: usize, ids: &[u32], dtype: DType) -> Self {
        Self { vocab, hidden, ids: ids.to_vec(), dtype }
    }

    fn table(&self) -> Vec<f32> {
        rounded(noise(1, self.vocab * self.hidden), self.dtype)
    }

    fn dy(&self) -> Vec<f32> {
        rounded(noise(2, self.ids.len() * self.hidden), self.dtype)
    }
}

impl Case for Embedding {
    /// A product with one-hot rows.
    fn naive(&self, dtype: DType) -> Results {
        let oracle = Oracle::new(dtype);
        let mut one_hot = vec![0.0; self.ids.len() * self.vocab];
        for (row, &id) in one_hot.chunks_exact_mut(self.vocab).zip(&self.ids) {
            row[id as usize] = 1.0;
        }
        let table = oracle.leaf(&self.table(), [self.vocab, self.hidden]);
        let y = oracle.constant(&one_hot, [self.ids.len(), self.vocab]).matmul(table.clone());
        let dy = oracle.constant(&self.dy(), [self.ids.len(), self.hidden]);
        let grads = (y.clone() * dy).sum().backward();
        vec![("y", values(y)), ("dtable", grad(&table, &grads))]
    }

    fn ours(&self, place: &Place) -> Results {
        let table = place.matrix(&self.table(), [self.vocab, self.hidden]);
        let y = embedding::forward(&table, &self.ids);
        let dy = place.matrix(&self.dy(), [self.ids.len(), self.hidden]);
        let shape = [self.vocab, self.hidden];
        let mut builder = ParamsBuilder::new(&place.device, place.dtype);
        let before = builder.push("before", &[3], true, &[0.0; 3]);
        let at = builder.push("embed_tokens.weight", &shape, true, &self.table());
        let after = builder.push("after", &[2], true, &[0.0; 2]);
        let mut grads = builder.build().zero_grads();
        embedding::backward(dy, &self.ids, &mut grads, at);
        assert_eq!((grads.values(before), grads.values(after)), (vec![0.0; 3], vec![0.0; 2]));
        vec![("y", values(y)), ("dtable", widened(grads.values(at)))]
    }
}
