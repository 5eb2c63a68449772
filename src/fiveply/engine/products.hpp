// y = x W^T on a CPU, with W packed once: panels of 16 rows of W, so that a vector holds one column of a panel.
//
// Libraries pack W at each call, which takes longer than the product where x has few rows, or keep a copy made for many rows.
// Here a number of x is multiplied with a vector of W, sums stay in registers and are never added across a vector. A number of
// y is formed in order of the columns whatever the number of rows, so a row's bits do not depend on its company.

#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int PANEL = 16;  // rows of W in a panel, numbers in a vector
#ifdef __AVX512F__
constexpr int MOST = 8, REGISTERS = 16;  // rows of x that are multiplied together, and vectors of sums in registers
#else
constexpr int MOST = 6, REGISTERS = 6;  // of half or a quarter of the length each
#endif
constexpr int AHEAD = 32;  // columns of W that are asked for before they are needed

typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));

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

// How columns are multiplied: DEEP of them by one instruction, `column` of a panel with `same` number of x in all places.
template <class T> struct Columns;
template <> struct Columns<float> {
  static constexpr int DEEP = 1;
  static Floats column(const float* w) { return *reinterpret_cast<const Floats*>(w); }
  static float same(const float* x) { return *x; }
  static void add(Floats& sum, Floats w, float x) { sum += w * x; }
  static void put(float* y, Floats sum) { *reinterpret_cast<Floats*>(y) = sum; }
};
#ifdef __AVX512BF16__
template <> struct Columns<bfloat16> {
  static constexpr int DEEP = 2;
  static __m512bh column(const bfloat16* w) { return (__m512bh)_mm512_loadu_si512(w); }
  static __m512bh same(const bfloat16* x) {
    int32_t pair;
    std::memcpy(&pair, x, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static void add(Floats& sum, __m512bh w, __m512bh x) { sum = (Floats)_mm512_dpbf16_ps((__m512)sum, w, x); }
  static void put(bfloat16* y, Floats sum) { _mm256_storeu_si256((__m256i*)y, (__m256i)_mm512_cvtneps_pbh((__m512)sum)); }
};
#endif

template <class T, int C, int P>
inline void tile(const T* w, const T* x, T* y, int64_t inner, int64_t x_stride, int64_t y_stride, int64_t left,
                 int64_t ahead) {
  typedef Columns<T> By;
  Floats sums[C][P] = {};
  for (int64_t i = 0; i < inner; i += By::DEEP) {
    decltype(By::column(w)) columns[P];
    for (int p = 0; p < P; p++) {
      columns[p] = By::column(w + (p * inner + i) * PANEL);
      __builtin_prefetch(w + (p * inner + i + ahead) * PANEL);
    }
    for (int c = 0; c < C; c++) {
      const auto same = By::same(x + c * x_stride + i);
      for (int p = 0; p < P; p++) By::add(sums[c][p], columns[p], same);
    }
  }
  for (int c = 0; c < C; c++)
    for (int p = 0; p < P; p++) {
      T* to = y + c * y_stride + p * PANEL;
      if (left - p * PANEL >= PANEL)
        By::put(to, sums[c][p]);
      else
        for (int64_t r = 0; r < left - p * PANEL; r++) store(to + r, sums[c][p][r]);
    }
}

// C rows of x with the panels [first, end). `last`: no other rows come after them, so that the next panels may be asked for.
template <class T, int C>
void rows_of_x(const T* w, const T* x, T* y, int64_t inner, int64_t outer, int64_t x_stride, int64_t first, int64_t end,
               bool last) {
  constexpr int P = 4 * C <= REGISTERS ? 4 : 2 * C <= REGISTERS ? 2 : 1;
  const int64_t ahead = last ? (end - first) * inner : AHEAD;
  int64_t p = first;
  for (; p + P <= end; p += P)
    tile<T, C, P>(w + p * PANEL * inner, x, y + p * PANEL, inner, x_stride, outer, outer - p * PANEL, ahead);
  for (; p < end; p++)
    tile<T, C, 1>(w + p * PANEL * inner, x, y + p * PANEL, inner, x_stride, outer, outer - p * PANEL, ahead);
}

template <class T, int... C, class... A>
void by_rows(std::integer_sequence<int, C...>, int64_t rows, A... a) {
  ((rows == C + 1 ? rows_of_x<T, C + 1>(a...) : void()), ...);
}

// On each thread of a team: its part of the panels, for all rows of x. `inner`: a multiple of DEEP.
template <class T>
void product(const T* x, const T* w, T* y, int64_t rows, int64_t inner, int64_t outer, int64_t x_stride) {
  const int64_t panels = (outer + PANEL - 1) / PANEL, together = rows > MOST / 2 ? 2 : 4;  // that stay in cache meanwhile
#pragma omp for schedule(static)
  for (int64_t first = 0; first < panels; first += together)
    for (int64_t m = 0; m < rows; m += MOST)
      by_rows<T>(std::make_integer_sequence<int, MOST>(), std::min<int64_t>(MOST, rows - m), w, x + m * x_stride, y + m * outer,
                 inner, outer, x_stride, first, std::min(panels, first + together), m > 0 && m + MOST >= rows);
}

// (outer, inner) by rows to panels; `inner` even where columns go in pairs.
template <class T>
void pack(const T* from, T* to, int64_t inner, int64_t outer) {
  constexpr int D = Columns<T>::DEEP;
  const int64_t panels = (outer + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < panels; p++)
    for (int64_t i = 0; i < inner; i++)
      for (int64_t r = 0; r < PANEL; r++) {
        const int64_t row = p * PANEL + r;
        to[(p * inner + i / D * D) * PANEL + r * D + i % D] = row < outer ? from[row * inner + i] : T{};
      }
}

}  // namespace
