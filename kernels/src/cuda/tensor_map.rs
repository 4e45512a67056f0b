//! Descriptions of tensors for the bulk copy engine (sm_90 and newer).

use cudarc::driver::sys;

use super::driver::driver;
use super::launch::{Arg, KernelArg};
use super::{Cuda, CudaError, DType};

/// How a tile's rows of up to 128 bytes are laid out in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    /// As they are.
    None,
    /// 16-byte pieces exchanged within 32 bytes.
    B32,
    /// 16-byte pieces exchanged within 64 bytes.
    B64,
    /// 16-byte pieces exchanged within 128 bytes, which wgmma reads without conflicts.
    B128,
}

impl Swizzle {
    /// The bytes within which pieces are exchanged, the most that a box's rows may have.
    fn span(self) -> Option<usize> {
        match self {
            Swizzle::None => None,
            Swizzle::B32 => Some(32),
            Swizzle::B64 => Some(64),
            Swizzle::B128 => Some(128),
        }
    }
}

/// A tensor map, given to a kernel by value as a `const __grid_constant__` parameter of 128 bytes.
#[derive(Clone, Copy)]
pub struct TensorMap(sys::CUtensorMap);

impl Cuda {
    /// Describes a matrix `[rows, columns]` at an address, rows `stride` elements apart, copied in tiles of
    /// `[box_rows, box_columns]`. Elements beyond the matrix read as zero and are not written.
    pub fn tensor_map_2d(
        &self,
        address: u64,
        dtype: DType,
        [rows, columns]: [usize; 2],
        stride: usize,
        [box_rows, box_columns]: [usize; 2],
        swizzle: Swizzle,
    ) -> TensorMap {
        self.tensor_map(address, dtype, &[columns, rows], &[stride], &[box_columns, box_rows], swizzle)
    }

    /// Describes a tensor `[planes, rows, columns]`, its planes and rows `strides` elements apart.
    pub fn tensor_map_3d(
        &self,
        address: u64,
        dtype: DType,
        [planes, rows, columns]: [usize; 3],
        [plane_stride, row_stride]: [usize; 2],
        [box_planes, box_rows, box_columns]: [usize; 3],
        swizzle: Swizzle,
    ) -> TensorMap {
        let boxes = [box_columns, box_rows, box_planes];
        self.tensor_map(address, dtype, &[columns, rows, planes], &[row_stride, plane_stride], &boxes, swizzle)
    }

    /// Sizes, strides and boxes with the innermost axis first, as the driver has them.
    fn tensor_map(
        &self,
        address: u64,
        dtype: DType,
        sizes: &[usize],
        strides: &[usize],
        boxes: &[usize],
        swizzle: Swizzle,
    ) -> TensorMap {
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        if self.has_failed() {
            return TensorMap(map);
        }
        let bytes = dtype.bytes();
        let misplaced =
            (!address.is_multiple_of(16)).then(|| format!("the address {address:#x} is not a multiple of 16"));
        let stride = strides.iter().map(|stride| stride * bytes).find(|stride| !stride.is_multiple_of(16));
        let size = boxes.iter().find(|size| !(1..=256).contains(*size));
        let width = boxes[0] * bytes;
        let span = swizzle.span().filter(|&span| width > span);
        let reason = misplaced
            .or(span.map(|span| format!("box rows of {width} bytes are longer than the {span} that are swizzled")))
            .or(stride.map(|stride| format!("a stride of {stride} bytes is not a multiple of 16")))
            .or(size.map(|size| format!("a box of {size} elements along an axis is not within 1..=256")));
        if let Some(reason) = reason {
            self.fail(CudaError::Usage { operation: "tensor map".into(), reason });
            return TensorMap(map);
        }
        let sizes: Vec<u64> = sizes.iter().map(|&size| size as u64).collect();
        let strides: Vec<u64> = strides.iter().map(|&stride| (stride * bytes) as u64).collect();
        let boxes: Vec<u32> = boxes.iter().map(|&size| size as u32).collect();
        let steps = vec![1u32; sizes.len()];
        self.run("tensor map", || {
            driver!(cuTensorMapEncodeTiled(
                &mut map,
                match dtype {
                    DType::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                    DType::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                    DType::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
                },
                sizes.len() as u32,
                address as *mut core::ffi::c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                match swizzle {
                    Swizzle::None => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
                    Swizzle::B32 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
                    Swizzle::B64 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
                    Swizzle::B128 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                },
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
