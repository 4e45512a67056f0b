// Rows without their mean; kernels/src/ops/center.
//
// y = x − mean(x), the mean in f32 and y rounded to T. It is its own backward.
//
// Layout: x, y [rows, width] of T, row-major with row strides in elements, rows 16-byte aligned; any width. y may
// be the same matrix as x with the same stride.
//
// Launch: grid (rows), block 256, dynamic shared memory 0.
//   center(x, y, i32 width, ldx, ldy)
//
// Bytes: a row is read twice, the second time from the caches. Not measured on a card.

static const int N = Vec<T>::N;
static const int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
center(const T* x, T* y, int width, int ldx, int ldy) {
    __shared__ f32 sums[THREADS / 32];
    const u32 row = blockIdx.x;
    f32 v[N], sum = 0.0f;
    for (int col = threadIdx.x * N; col < width; col += THREADS * N) {
        unpack16<T>(load_part(at(x, row, ldx, col), width - col), v);
#pragma unroll
        for (int e = 0; e < N; e++) sum += v[e];
    }
    for (int o = 16; o > 0; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    f32 mean = 0.0f;
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) mean += sums[i];
    mean /= (f32)width;
    for (int col = threadIdx.x * N; col < width; col += THREADS * N) {
        unpack16<T>(load_part(at(x, row, ldx, col), width - col), v);
#pragma unroll
        for (int e = 0; e < N; e++) v[e] -= mean;
        store_part(at(y, row, ldy, col), width - col, pack16<T>(v));
    }
}
