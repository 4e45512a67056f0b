"""Writes python.gguf: a file of the gguf package 0.19.0 with every type of metadata value.

    python make_file.py [OUT]
"""

import pathlib
import sys

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

out = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).parent / "python.gguf"
writer = GGUFWriter(out, "llama")
writer.add_uint8("a.u8", 200)
writer.add_int8("a.i8", -100)
writer.add_uint16("a.u16", 60000)
writer.add_int16("a.i16", -30000)
writer.add_uint32("a.u32", 4_000_000_000)
writer.add_int32("a.i32", -2_000_000_000)
writer.add_uint64("a.u64", 2**63)
writer.add_int64("a.i64", -(2**62))
writer.add_float32("a.f32", 0.1)
writer.add_float64("a.f64", 0.1)
writer.add_bool("a.bool", True)
writer.add_string("a.string", "Grüße, 世界")
writer.add_array("a.ints", [1, 2, 3])
writer.add_array("a.floats", [0.5, -1.5])
writer.add_array("a.bools", [True, False])
writer.add_array("a.strings", ["a", "", "ü"])
writer.add_key_value("a.nested", [[1, 2], [3]], GGUFValueType.ARRAY)
values = (np.arange(64, dtype=np.float32) - 20).reshape(2, 32)
writer.add_tensor("f32", values)
writer.add_tensor("f16.weight", values.astype(np.float16)[:, :3].copy())
blocks = np.zeros((2, 34), np.uint8)
blocks[:, :2] = np.array([[0.5], [2.0]], np.float16).view(np.uint8)
blocks[:, 2:] = np.arange(64, dtype=np.uint8).reshape(2, 32)
writer.add_tensor("q8", blocks, raw_dtype=GGMLQuantizationType.Q8_0)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
