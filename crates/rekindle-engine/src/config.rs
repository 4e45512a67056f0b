//! The configuration of an engine.

use rekindle_kernels::Device;
use rekindle_kernels::paged_attention::PAGE;
use rekindle_models::CausalLm;

use crate::Error;

/// The limits of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// The maximum number of tokens of a step; longer prompts are split. At least `max_sequences`. Default 512.
    pub max_batch_tokens: usize,
    /// The maximum number of samples that run at once. Default 64.
    pub max_sequences: usize,
    /// The maximum number of samples that wait. Default 65,536.
    pub max_waiting: usize,
    /// The size of the key/value cache. Default [`CacheSize::Auto`].
    pub cache: CacheSize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self { max_batch_tokens: 512, max_sequences: 64, max_waiting: 65_536, cache: CacheSize::Auto }
    }
}

/// The size of a key/value cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheSize {
    /// 1 GiB, or on CUDA nine tenths of the free memory; but at least one sequence and at most `max_sequences` sequences of
    /// the model's `max_seq_length`.
    Auto,
    /// This number of pages, each of which holds 16 tokens.
    Pages(usize),
    /// As many pages as fit into this number of bytes.
    Bytes(usize),
}

impl EngineConfig {
    /// Returns the default limits of a device: steps of at most 4,096 tokens and 256 samples on CUDA, and
    /// [`EngineConfig::default`] elsewhere.
    pub fn for_device(device: &Device) -> Self {
        match device {
            Device::Cuda(_) => Self { max_batch_tokens: 4096, max_sequences: 256, ..Self::default() },
            Device::Burn(_) | Device::Meta(_) => Self::default(),
        }
    }

    /// Checks the limits against each other.
    ///
    /// # Errors
    /// [`Error::Argument`].
    pub(crate) fn check(&self) -> Result<(), Error> {
        let Self { max_batch_tokens, max_sequences, .. } = *self;
        if max_sequences == 0 {
            return Err(Error::Argument("max_sequences is 0; it must be at least 1".to_owned()));
        }
        if max_batch_tokens < max_sequences {
            return Err(Error::Argument(format!(
                "max_batch_tokens is {max_batch_tokens} and max_sequences {max_sequences}; a step computes a token of \
                 every running sequence, so max_batch_tokens must be at least max_sequences"
            )));
        }
        Ok(())
    }

    /// Returns the number of pages for `model`.
    ///
    /// # Errors
    /// [`Error::Argument`] if there would be none.
    pub(crate) fn pages(&self, model: &CausalLm) -> Result<usize, Error> {
        // A model without attention keeps nothing in pages.
        let page_bytes = model.decoder().page_bytes().max(1);
        let longest = model.max_seq_length().div_ceil(PAGE);
        let pages = match self.cache {
            CacheSize::Auto => (auto_bytes(model.device()) / page_bytes).clamp(longest, longest * self.max_sequences),
            CacheSize::Pages(pages) => pages,
            CacheSize::Bytes(bytes) => bytes / page_bytes,
        };
        if pages == 0 {
            return Err(Error::Argument(format!(
                "the key/value cache has no page: {:?} and a page of 16 tokens takes {page_bytes} bytes; make it larger",
                self.cache
            )));
        }
        Ok(pages)
    }
}

/// Returns the size of a cache that nobody chose: on CUDA, activations get the tenth that is left.
fn auto_bytes(device: &Device) -> usize {
    const ELSEWHERE: usize = 1 << 30;
    match device {
        Device::Cuda(_) => device.free_memory().map_or(ELSEWHERE, |free| free / 10 * 9),
        Device::Burn(_) | Device::Meta(_) => ELSEWHERE,
    }
}
