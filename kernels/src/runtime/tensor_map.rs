//! Descriptions of tensors for the bulk copy engine (sm_90 and newer).

use cudarc::driver::sys;

use super::driver::driver;
use super::launch::{Arg, KernelArg};
use super::{Cuda, CudaError, DType};

/// Bytes within which the 16-byte pieces of a tile's rows are exchanged in shared memory, so that wgmma reads them without
/// bank conflicts. No row of a box is longer.
const SWIZZLED: usize = 128;

/// A tensor map, given to a kernel by value as a `const __grid_constant__` parameter of 128 bytes.
#[derive(Clone, Copy)]
pub struct TensorMap(sys::CUtensorMap);

impl Cuda {
    /// Describes a tensor of `sizes` `[planes, rows, columns]`, its planes and rows `strides` elements apart, copied in `boxes` whose
    /// rows are swizzled within 128 bytes. Elements beyond the tensor read as zero and are not written.
    pub fn tensor_map(
        &self,
        address: u64,
        dtype: DType,
        sizes: [usize; 3],
        strides: [usize; 2],
        boxes: [usize; 3],
    ) -> TensorMap {
        let element = match dtype {
            DType::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            DType::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            DType::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        };
        self.encode(address, element, dtype.bytes(), sizes, strides, boxes)
    }

    /// Describes a tensor of bytes as [`tensor_map`](Self::tensor_map) does.
    pub(crate) fn tensor_map_of_bytes(
        &self,
        address: u64,
        sizes: [usize; 3],
        strides: [usize; 2],
        boxes: [usize; 3],
    ) -> TensorMap {
        self.encode(address, sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, sizes, strides, boxes)
    }

    fn encode(
        &self,
        address: u64,
        element: sys::CUtensorMapDataType,
        bytes: usize,
        [planes, rows, columns]: [usize; 3],
        [plane_stride, row_stride]: [usize; 2],
        [box_planes, box_rows, box_columns]: [usize; 3],
    ) -> TensorMap {
        // The driver has the innermost axis first.
        let sizes = [columns, rows, planes];
        let strides = [row_stride, plane_stride];
        let boxes = [box_columns, box_rows, box_planes];
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        if self.has_failed() {
            return TensorMap(map);
        }
        let misplaced =
            (!address.is_multiple_of(16)).then(|| format!("the address {address:#x} is not a multiple of 16"));
        let stride = strides.iter().map(|stride| stride * bytes).find(|stride| !stride.is_multiple_of(16));
        let size = boxes.iter().find(|size| !(1..=256).contains(*size));
        let width = boxes[0] * bytes;
        let reason = misplaced
            .or((width > SWIZZLED)
                .then(|| format!("box rows of {width} bytes are longer than the {SWIZZLED} that are swizzled")))
            .or(stride.map(|stride| format!("a stride of {stride} bytes is not a multiple of 16")))
            .or(size.map(|size| format!("a box of {size} elements along an axis is not within 1..=256")));
        if let Some(reason) = reason {
            self.fail(CudaError::Usage { operation: "tensor map".into(), reason });
            return TensorMap(map);
        }
        let sizes = sizes.map(|size| size as u64);
        let strides = strides.map(|stride| (stride * bytes) as u64);
        let (boxes, steps) = (boxes.map(|size| size as u32), [1u32; 3]);
        self.run("tensor map", || {
            driver!(cuTensorMapEncodeTiled(
                &mut map,
                element,
                sizes.len() as u32,
                address as *mut core::ffi::c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            ))
        });
        TensorMap(map)
    }
}

impl KernelArg for TensorMap {
    fn arg(&self) -> Arg<'_> {
        Arg::of(&self.0)
    }
}
