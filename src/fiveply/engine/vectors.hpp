// Numbers and vectors of a CPU: types, how they are read and written, and where a team's threads wait for one another.

#pragma once
#include <omp.h>
#include <sched.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

constexpr int PANEL = 16;  // rows of W in a panel
// Numbers of a vector, as long as the processor's own (of longer ones some compilers keep no sums in registers).
#ifdef __AVX512F__
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int PARTS = PANEL / LANES;  // vectors of a panel's column

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

// Who waits long lets others have its core: on a busy machine OpenMP's own barrier spins until its turn is over, while the
// thread that it waits for has none.
class Barrier {
  static constexpr int SPINS = 4000;  // some ten microseconds
  std::atomic<int> waiting{0}, round{0};

 public:
  void wait() {
    const int size = omp_get_num_threads(), own = round.load();
    if (size == 1) return;
    if (waiting.fetch_add(1) + 1 == size) {
      waiting.store(0);
      round.store(own + 1);
      return;
    }
    for (int spins = 0; round.load() == own; spins++)
      if (spins > SPINS) sched_yield();
  }
};

struct bfloat16 { uint16_t bits; };

inline float number(float x) { return x; }
inline double number(double x) { return x; }
inline float number(bfloat16 x) {
  uint32_t word = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &word, 4);
  return y;
}
inline void store(float* to, float x) { *to = x; }
inline void store(double* to, double x) { *to = x; }
inline void store(bfloat16* to, float x) {  // to the nearest, ties to even
  uint32_t word;
  std::memcpy(&word, &x, 4);
  to->bits = x != x ? 0x7fc0 : uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}
inline Floats load(const float* x) { return *reinterpret_cast<const Floats*>(x); }
inline Floats load(const bfloat16* x) {
#ifdef __AVX512F__  // which compilers make two halves of by themselves
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))), 16);
#else
  typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
  const Words wide = __builtin_convertvector(*reinterpret_cast<const Halves*>(x), Words) << 16;
  return reinterpret_cast<const Floats&>(wide);
#endif
}

// A vector of numbers, or the first `count` of one.
inline void store(float* to, Floats x) { *reinterpret_cast<Floats*>(to) = x; }
inline void store(bfloat16* to, Floats x) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  for (int r = 0; r < LANES; r++) store(to + r, x[r]);
#endif
}
template <class T>
inline void store(T* to, Floats x, int64_t count) {
  if (count >= LANES) return store(to, x);
  for (int64_t r = 0; r < count; r++) store(to + r, x[r]);
}

// What products take of x: float32, and where the processor multiplies tiles of bfloat16, the model's own bfloat16.
template <class T> struct Given { typedef float type; };
#ifdef __AMX_BF16__
template <> struct Given<bfloat16> { typedef bfloat16 type; };
#endif

}  // namespace
