// y0 = x0 cos - x1 sin, y1 = x1 cos + x0 sin for the pairs (x[i], x[R + i]); the rest of D passes through.
// Backward: dx is dy rotated by the conjugate, dangle = dy1 y0 - dy0 y1, dfreq = sum of position * dangle.
// A token's row of the table, the complex product of a coarse and a fine row, serves all heads of q and k.
#include "rotary.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "elements.h"
#include "isa.h"
#include "rotary_rows.h"

namespace clex {
namespace {

constexpr int64_t kChunk = 64;
constexpr std::align_val_t kAlignment{64};

// beyond this size an output leaves the caches before anybody reads it: write around them.
constexpr int64_t kStreamBytes = 16 << 20;

// Working memory of one range of tokens: 64-byte aligned rows.
template <class T>
class Scratch {
 public:
  explicit Scratch(const RotaryCall& call) : pairs_(round_up(call.pairs)) {
    const size_t bytes = 3 * pairs_ * sizeof(Real<T>) + round_up(call.dim) * sizeof(T);
    memory_.reset(static_cast<std::byte*>(::operator new(bytes, kAlignment)));
  }
  Real<T>* cosine() const { return reinterpret_cast<Real<T>*>(memory_.get()); }
  Real<T>* sine() const { return cosine() + pairs_; }
  Real<T>* dangle() const { return cosine() + 2 * pairs_; }
  T* head() const { return reinterpret_cast<T*>(cosine() + 3 * pairs_); }

  const bool native = has_avx512_bf16();

 private:
  struct Delete {
    void operator()(std::byte* memory) const { ::operator delete(memory, kAlignment); }
  };
  static int64_t round_up(int64_t count) { return (count + 31) / 32 * 32; }

  int64_t pairs_;
  std::unique_ptr<std::byte[], Delete> memory_;
};

template <class T>
CLEX_INLINE void rotate_head(const T* x, T* y, const Real<T>* cosine, const Real<T>* sine, int64_t pairs) {
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    const Real<T> x0 = widen(x[i]), x1 = widen(x[pairs + i]);
    narrow(x0 * cosine[i] - x1 * sine[i], y[i]);
    narrow(x1 * cosine[i] + x0 * sine[i], y[pairs + i]);
  }
}

template <class T>
CLEX_INLINE void add_dangle(const T* dy, const T* y, Real<T>* __restrict dangle, int64_t pairs) {
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    dangle[i] += widen(dy[pairs + i]) * widen(y[i]) - widen(dy[i]) * widen(y[pairs + i]);
  }
}

#if defined(__x86_64__)
// The portable loops by the processor's own conversions, which compilers don't reach from portable code: 17
// ns instead of 26 for a head of 128 channels in bf16, 12 instead of 36 in fp16 (Zen 4, one core).
template <class T>
CLEX_AVX512_BF16 void rotate_pairs_native(const T* x, T* y, const T* rotated, const Scratch<T>& scratch,
                                        int64_t pairs) {
  const float* cosine = scratch.cosine();
  const float* sine = scratch.sine();
  float* dangle = scratch.dangle();
  int64_t i = 0;
  for (; i + 16 <= pairs; i += 16) {
    const __m512 x0 = load16(x + i), x1 = load16(x + pairs + i);
    const __m512 c = _mm512_loadu_ps(cosine + i), s = _mm512_loadu_ps(sine + i);
    if (rotated) {
      __m512 sum = _mm512_fmadd_ps(x1, load16(rotated + i), _mm512_loadu_ps(dangle + i));
      sum = _mm512_fnmadd_ps(x0, load16(rotated + pairs + i), sum);
      _mm512_storeu_ps(dangle + i, sum);
    }
    store16(y + i, _mm512_fnmadd_ps(x1, s, _mm512_mul_ps(x0, c)));
    store16(y + pairs + i, _mm512_fmadd_ps(x0, s, _mm512_mul_ps(x1, c)));
  }
  for (; i < pairs; ++i) {
    const float x0 = widen(x[i]), x1 = widen(x[pairs + i]);
    if (rotated) dangle[i] += x1 * widen(rotated[i]) - x0 * widen(rotated[pairs + i]);
    narrow(x0 * cosine[i] - x1 * sine[i], y[i]);
    narrow(x1 * cosine[i] + x0 * sine[i], y[pairs + i]);
  }
}
#endif

// Rotates the pairs of one head; with its saved copy, also adds to dangle.
template <class T>
CLEX_INLINE void rotate_pairs(const T* x, T* y, const T* rotated, const Scratch<T>& scratch, int64_t pairs) {
#if defined(__x86_64__)
  if constexpr (sizeof(T) == 2) {
    if (scratch.native) return rotate_pairs_native(x, y, rotated, scratch, pairs);
  }
#endif
  if (rotated) add_dangle(x, rotated, scratch.dangle(), pairs);
  rotate_head(x, y, scratch.cosine(), scratch.sine(), pairs);
}

#if defined(__x86_64__)
CLEX_AVX512 void stream_lines(const void* from, void* to, size_t bytes) {
  const __m512i* source = static_cast<const __m512i*>(from);
  __m512i* target = static_cast<__m512i*>(to);
  for (size_t i = 0; i < bytes / 64; ++i) _mm512_stream_si512(target + i, _mm512_load_si512(source + i));
}
#endif

// Copies a finished head to memory, around the caches where the alignment allows it.
template <class T>
CLEX_INLINE void stream_head(const T* __restrict head, T* __restrict y, int64_t dim) {
  const size_t bytes = dim * sizeof(T);
#if defined(__x86_64__)
  const uintptr_t misaligned = reinterpret_cast<uintptr_t>(y) | bytes;
  if (misaligned % 64 == 0 && active_isa() >= Isa::avx512) return stream_lines(head, y, bytes);
  if (misaligned % 16 == 0) {
    const __m128i* source = reinterpret_cast<const __m128i*>(head);
    __m128i* target = reinterpret_cast<__m128i*>(y);
    for (size_t i = 0; i < bytes / 16; ++i) _mm_stream_si128(target + i, _mm_load_si128(source + i));
    return;
  }
#endif
  std::memcpy(y, head, bytes);
}

int64_t sequence_chunks(const RotaryCall& call) { return (call.length + kChunk - 1) / kChunk; }

int64_t total_heads(const RotaryCall& call) { return call.tensors[0].heads + call.tensors[1].heads; }

template <class T>
bool wants_streaming(const RotaryCall& call) {
  const bool in_place = call.tensors[0].source == call.tensors[0].target;
  const int64_t elements = call.batch * call.length * total_heads(call) * call.dim;
  return !in_place && elements * int64_t(sizeof(T)) >= kStreamBytes;
}

template <class T>
CLEX_INLINE void rotate_token(const RotaryCall& call, const Scratch<T>& scratch, int64_t b, int64_t l,
                              bool stream, bool want_dangle) {
  const int64_t pairs = call.pairs, rest = call.dim - 2 * pairs;
  for (const RotaryTensor& tensor : call.tensors) {
    const int64_t* from = tensor.source_strides;
    const int64_t* to = tensor.target_strides;
    const int64_t* saved = tensor.rotated_strides;
    for (int64_t h = 0; h < tensor.heads; ++h) {
      const T* x = static_cast<const T*>(tensor.source) + (b * from[0] + l * from[1] + h * from[2]);
      T* target = static_cast<T*>(tensor.target) + (b * to[0] + l * to[1] + h * to[2]);
      T* y = stream ? scratch.head() : target;
      const T* rotated = nullptr;
      if (want_dangle) {
        rotated = static_cast<const T*>(tensor.rotated) + (b * saved[0] + l * saved[1] + h * saved[2]);
      }
      rotate_pairs(x, y, rotated, scratch, pairs);
      if (x != y && rest > 0) std::memcpy(y + 2 * pairs, x + 2 * pairs, rest * sizeof(T));
      if (stream) stream_head(y, target, call.dim);
    }
  }
}

void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class T>
CLEX_INLINE void rotary_range_body(const RotaryCall& call, int64_t begin, int64_t end) {
  const Scratch<T> scratch(call);
  const bool stream = wants_streaming<T>(call);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / call.length, l = token % call.length;
    fill_row(call, b, l, scratch.cosine(), scratch.sine());
    rotate_token<T>(call, scratch, b, l, stream, false);
  }
  if (stream) finish_streaming();
}

// Heads are summed in the elements' arithmetic, tokens in fp64, since position * dangle outgrows fp32.
template <class T>
CLEX_INLINE void rotary_bwd_range_body(const RotaryCall& call, int64_t begin, int64_t end, double* partials) {
  const Scratch<T> scratch(call);
  const bool stream = wants_streaming<T>(call);
  const int64_t pairs = call.pairs, chunks = sequence_chunks(call);
  Real<T>* __restrict dangle = scratch.dangle();
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    double* __restrict partial = partials + chunk * pairs;
    std::fill_n(partial, pairs, 0.0);
    const int64_t b = chunk / chunks, first = chunk % chunks * kChunk;
    for (int64_t l = first; l < std::min(first + kChunk, call.length); ++l) {
      const double position = fill_row(call, b, l, scratch.cosine(), scratch.sine());
      std::fill_n(dangle, pairs, Real<T>(0));
      rotate_token<T>(call, scratch, b, l, stream, true);
#pragma omp simd
      for (int64_t i = 0; i < pairs; ++i) partial[i] += position * dangle[i];
    }
  }
  if (stream) finish_streaming();
}

CLEX_MULTIVERSION(rotary_range, (const RotaryCall& call, int64_t begin, int64_t end), (call, begin, end))
CLEX_MULTIVERSION(rotary_bwd_range, (const RotaryCall& call, int64_t begin, int64_t end, double* partials),
                  (call, begin, end, partials))

}  // namespace

void rotary(const RotaryCall& call, int64_t begin, int64_t end) {
  switch (call.element) {
    case Element::fp32: return rotary_range<float>(call, begin, end);
    case Element::fp16: return rotary_range<Fp16>(call, begin, end);
    case Element::bf16: return rotary_range<Bf16>(call, begin, end);
    case Element::fp64: return rotary_range<double>(call, begin, end);
  }
}

int64_t rotary_bwd_chunks(const RotaryCall& call) { return call.batch * sequence_chunks(call); }

void rotary_bwd(const RotaryCall& call, int64_t begin, int64_t end, double* partials) {
  switch (call.element) {
    case Element::fp32: return rotary_bwd_range<float>(call, begin, end, partials);
    case Element::fp16: return rotary_bwd_range<Fp16>(call, begin, end, partials);
    case Element::bf16: return rotary_bwd_range<Bf16>(call, begin, end, partials);
    case Element::fp64: return rotary_bwd_range<double>(call, begin, end, partials);
  }
}

void rotary_bwd_reduce(const RotaryCall& call, const double* partials, double* dfreq) {
  const int64_t chunks = sequence_chunks(call);
  for (int64_t chunk = 0; chunk < rotary_bwd_chunks(call); ++chunk) {
    const int64_t table = table_of(call, chunk / chunks);
    if (table < 0 || table >= call.tables) continue;
    double* row = dfreq + table * call.pairs;
    for (int64_t i = 0; i < call.pairs; ++i) row[i] += partials[chunk * call.pairs + i];
  }
}

void advise_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kHugePage * kHugePage;
  // advice only: refused where huge pages are off.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace clex
