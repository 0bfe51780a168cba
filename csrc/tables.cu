// Table rows on CUDA, one thread per (factor, row, pair), by the same reduction as on the host. No warp
// intrinsics, so that the kernel also runs thread by thread on a CPU.
#include "tables.h"

namespace clex {

// out [T, rows, 2, R].
template <class T>
__global__ void fill_table_kernel(TableSpec spec, T* out) {
  const int64_t count = spec.factors * spec.rows * spec.pairs;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += stride) {
    const int64_t pair = at % spec.pairs, row = at / spec.pairs % spec.rows;
    const int64_t factor = at / spec.pairs / spec.rows;
    const double freq = spec.freq[factor * spec.pairs + pair];
    const double position = table_position(spec, factor, row);
    double sine, cosine;
    if (fabs(position * freq) > FARTHEST_ANGLE) {
      sincos_far(position, freq, sine, cosine);
    } else {
      sincos_near(position, freq, sine, cosine);
    }
    T* const out_row = out + (factor * spec.rows + row) * 2 * spec.pairs;
    out_row[pair] = static_cast<T>(spec.amplitude * cosine);
    out_row[spec.pairs + pair] = static_cast<T>(spec.amplitude * sine);
  }
}

#ifdef __CUDACC__

template <class T>
const char* launch_fill_table(const TableSpec& spec, T* out, void* stream) {
  const int64_t count = spec.factors * spec.rows * spec.pairs;
  if (count == 0) return nullptr;
  constexpr int64_t threads = 256, most_blocks = 65536;
  const int64_t blocks = (count + threads - 1) / threads;
  fill_table_kernel<<<static_cast<unsigned>(blocks < most_blocks ? blocks : most_blocks), threads, 0,
                      static_cast<cudaStream_t>(stream)>>>(spec, out);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template const char* launch_fill_table(const TableSpec&, float*, void*);
template const char* launch_fill_table(const TableSpec&, double*, void*);

#endif

}  // namespace clex
