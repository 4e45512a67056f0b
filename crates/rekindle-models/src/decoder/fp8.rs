//! The choice of products in fp8.

use rekindle_kernels::fp8::{self, Fp8Products};
use rekindle_kernels::{DType, Device};
use rekindle_lora::AdaptableMut;

use crate::{Decoder, Error};

impl Decoder {
    /// Multiplies with the frozen weights of all linears of layers in fp8. The head and the embedding stay in `dtype`.
    ///
    /// # Errors
    /// [`Error::Argument`] for a device or dtype without such products, and for a linear that is trained, not kept in fp8 with a
    /// scale for each row, or an expert's.
    pub(crate) fn multiply_in_fp8(&mut self, products: Fp8Products, dtype: DType) -> Result<(), Error> {
        if let Device::Cuda(cuda) = &self.device {
            if !fp8::is_on(&self.device) {
                return Err(Error::Argument(format!(
                    "fp8 products need a GPU of compute capability 9.0 (H100, H200), and this is {}; set fp8 = false",
                    cuda.props()
                )));
            }
            if dtype == DType::F32 {
                let message = "fp8 products on CUDA need dtype = \"bfloat16\" or \"float16\", not \"float32\"";
                return Err(Error::Argument(message.to_owned()));
            }
        }
        for part in self.adaptable_mut() {
            let group = match part {
                AdaptableMut::Linears(group) => group,
                AdaptableMut::Experts(_) => {
                    let message = "fp8 products are not supported for mixtures of experts; set fp8 = false";
                    return Err(Error::Argument(message.to_owned()));
                }
            };
            group
                .multiply_in_fp8(products)
                .map_err(|(name, reason)| Error::Argument(format!("fp8 products: \"{name}\" {reason}")))?;
        }
        Ok(())
    }

    /// Returns the products that are in fp8.
    pub(crate) fn fp8(&self) -> Option<Fp8Products> {
        self.adaptable().find_map(|part| part.linears()?.fp8())
    }
}
