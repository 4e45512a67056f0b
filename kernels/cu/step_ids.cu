// The ids of a step of decoding that the host does not know yet; kernels/src/ops/decode_step.
//
// A row that continues row s of the step before it takes the token which that step chose there; the id of any other row
// stays what the host wrote.
//
// Layout: tokens int4 [rows], w = s + 1, or 0 for an id of the host. ids u32 [rows]. previous: the address of the results
// of the step before, uint4 [rows of that step], x the id; unread where no row continues one.
//
// Launch: step_ids(tokens, ids, previous, i32 rows), grid ceil(rows / 256), block 256
// Tests: the engine's in tests/tests/cuda.rs.

extern "C" __global__ void __launch_bounds__(256)
step_ids(const int4* tokens, u32* ids, const u64* previous, int rows) {
    const int row = blockIdx.x * 256 + threadIdx.x;
    if (row >= rows) return;
    const int source = tokens[row].w;
    if (source > 0) ids[row] = reinterpret_cast<const uint4*>(*previous)[source - 1].x;
}
