// One portable body, compiled for several instruction sets; the widest that this processor has is chosen at run time.
#pragma once

#define CLEX_INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__)
#define CLEX_AVX512 \
  __attribute__((noinline, target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,prefer-vector-width=512")))
#define CLEX_AVX2 __attribute__((noinline, target("avx2,fma,f16c")))
// for intrinsics: conversions and dot products of bf16 beside the rest.
#define CLEX_AVX512_BF16 \
  __attribute__((        \
      target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")))
#else
#define CLEX_AVX512
#define CLEX_AVX2
#endif

namespace clex {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };

inline Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  return bf16 ? Isa::avx512_bf16 : avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

// set by the tests alone, to reach the narrower bodies on a wide processor.
inline Isa& active_isa() {
  static Isa isa = detect_isa();
  return isa;
}

inline bool has_avx512_bf16() { return active_isa() == Isa::avx512_bf16; }

}  // namespace clex

// Defines NAME<T> PARAMS, which calls the always-inlined NAME_body<T> ARGS compiled for the active instruction set.
#define CLEX_MULTIVERSION(NAME, PARAMS, ARGS)                                      \
  template <class T>                                                               \
  CLEX_AVX512 void NAME##_avx512 PARAMS { NAME##_body<T> ARGS; }                   \
  template <class T>                                                               \
  CLEX_AVX2 void NAME##_avx2 PARAMS { NAME##_body<T> ARGS; }                       \
  template <class T>                                                               \
  void NAME PARAMS {                                                               \
    switch (active_isa()) {                                                        \
      case Isa::avx512_bf16:                                                       \
      case Isa::avx512: return NAME##_avx512<T> ARGS;                              \
      case Isa::avx2: return NAME##_avx2<T> ARGS;                                  \
      case Isa::baseline: return NAME##_body<T> ARGS;                              \
    }                                                                              \
  }
