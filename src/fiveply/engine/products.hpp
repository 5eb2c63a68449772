// y = x W^T on a CPU, with W packed once: panels of 16 rows of W, so that a vector holds one column of a panel.
//
// Libraries pack W at each call, which takes longer than the product where x has few rows, or keep a copy made for many rows.
// Here a number of x is multiplied with a vector of W, sums stay in registers and are never added across a vector. A number of
// y is formed in order of the columns whatever the number of rows, so a row's bits do not depend on its company. bfloat16
// numbers of W are widened on their way: half the bytes to read, and sums in float32 (the processor's own product of pairs
// is slower than that where it has no tiles; where it has, `tiles.hpp`). So are 8-bit ones (`int8.py`), whose sums are
// multiplied by their row's scale at the end.

#pragma once
#include "tiles.hpp"

namespace {

// MOST: rows of x that are multiplied together. SUMS: panels times rows whose sums are in registers.
#ifdef __AVX512F__
constexpr int MOST = 12, SUMS = 24;
#else
constexpr int MOST = 6, SUMS = 4;
#endif

// Columns of a panel that lie together, as float32: one, or a pair of 16-bit ones. `w`: where a vector of them begins.
template <class W> constexpr int DEEP = 1;
template <> constexpr int DEEP<bfloat16> = 2;
// Columns' worth of numbers behind those of a panel: the float32 scales of its rows, where it has any.
template <class W> constexpr int SCALES = 0;
template <> constexpr int SCALES<int8_t> = sizeof(float);
inline void columns_of(const float* w, Floats* columns) { *columns = *reinterpret_cast<const Floats*>(w); }
inline void columns_of(const bfloat16* w, Floats* columns) {
  const Words pairs = *reinterpret_cast<const Words*>(w), even = pairs << 16, odd = pairs & 0xffff0000u;
  columns[0] = reinterpret_cast<const Floats&>(even), columns[1] = reinterpret_cast<const Floats&>(odd);
}
inline void columns_of(const int8_t* w, Floats* columns) {
#if defined(__AVX512F__)  // compilers widen them one by one
  *columns = (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))));
#elif defined(__AVX2__)
  *columns = (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w))));
#else
  for (int r = 0; r < LANES; r++) (*columns)[r] = w[r];
#endif
}

// `next`: what is read after this, or null; asked for meanwhile, a panel's column at every `every`th of the own ones (a power of 2).
template <class X, class W, class Y, int C, int P>
inline void tile(const W* w, const X* x, Y* y, int64_t inner, int64_t x_stride, int64_t y_stride, int64_t left,
                 const W* next, int64_t every) {
  constexpr int D = DEEP<W>, V = P * PARTS;
  Floats sums[C][V] = {};
  const int64_t panel = (inner + SCALES<W>) * PANEL;
#pragma GCC unroll 4
  for (int64_t i = 0; i < inner; i += D) {
    Floats columns[V][D];
    for (int v = 0; v < V; v++) columns_of(w + v / PARTS * panel + i * PANEL + v % PARTS * LANES * D, columns[v]);
    if (next && (i & (D * every - D)) == 0) {
      for (int p = 0; p < P; p++) __builtin_prefetch(next + p * panel, 0, 2);
      next += D * PANEL;
    }
    for (int c = 0; c < C; c++)
      for (int d = 0; d < D; d++) {
        const float same = number(x[c * x_stride + i + d]);
        for (int v = 0; v < V; v++) sums[c][v] += columns[v][d] * same;
      }
  }
  for (int c = 0; c < C; c++)
    for (int v = 0; v < V; v++) {
      Y* to = y + c * y_stride + v * LANES;
      if constexpr (SCALES<W> > 0)
        sums[c][v] *= *reinterpret_cast<const Floats*>(w + v / PARTS * panel + inner * PANEL + v % PARTS * LANES * SCALES<W>);
      store(to, sums[c][v], left - v * LANES);
    }
}

// C rows of x with the panels [first, end), on one of several passes over them; each asks for a part of as many panels after them.
template <class X, class W, class Y, int C>
void rows_of_x(const W* w, const X* x, Y* y, int64_t inner, int64_t outer, int64_t x_stride, int64_t first, int64_t end,
               int64_t pass, int64_t passes) {
  constexpr int P = 4 * C <= SUMS ? 4 : 2 * C <= SUMS ? 2 : 1;
  const int64_t panel = (inner + SCALES<W>) * PANEL;
  int64_t every = 1;
  while (2 * every <= passes) every *= 2;
  const auto multiplied = [&](auto tile_of, int64_t p) {
    const W* next = w + (end + p - first) * panel + pass * inner / every / DEEP<W> * DEEP<W> * PANEL;
    tile_of(w + p * panel, x, y + p * PANEL, inner, x_stride, outer, outer - p * PANEL, pass < every ? next : nullptr, every);
  };
  int64_t p = first;
  for (; p + P <= end; p += P) multiplied(tile<X, W, Y, C, P>, p);
  for (; p < end; p++) multiplied(tile<X, W, Y, C, 1>, p);
}

template <class X, class W, class Y, int... C, class... A>
void by_rows(std::integer_sequence<int, C...>, int64_t rows, A... a) {
  ((rows == C + 1 ? rows_of_x<X, W, Y, C + 1>(a...) : void()), ...);
}

// On each thread of a team: its part of the panels, for all rows of x; without a barrier. `inner`: a multiple of DEEP.
template <class X, class W, class Y>
void multiply(const X* x, const W* w, Y* y, int64_t rows, int64_t inner, int64_t outer, int64_t x_stride) {
#ifdef __AMX_BF16__
  if constexpr (std::is_same_v<X, bfloat16>)
    if (inner % DEPTH == 0 && tiles_allowed()) return by_tiles<W, Y, SCALES<W>>(x, w, y, rows, inner, outer, x_stride);
#endif
  constexpr int most = std::is_same_v<X, float> ? MOST : MOST / 3;  // what tiles can't do is rare, and takes long to compile
  const int64_t panels = (outer + PANEL - 1) / PANEL, together = rows > MOST / 2 ? 2 : 4;  // that stay in cache meanwhile
  const int64_t passes = (rows + most - 1) / most;
#pragma omp for schedule(static) nowait
  for (int64_t first = 0; first < panels; first += together)
    for (int64_t pass = 0; pass < passes; pass++) {
      const int64_t m = rows * pass / passes, next = rows * (pass + 1) / passes;
      by_rows<X, W, Y>(std::make_integer_sequence<int, most>(), next - m, w, x + m * x_stride, y + m * outer, inner, outer,
                       x_stride, first, std::min(panels, first + together), pass, passes);
    }
}

// x as products take it: itself, or a copy without gaps, and its stride from then on.
template <class T>
const T* as_given(const T* x, int64_t, int64_t, int64_t&, std::vector<T>&) { return x; }
template <class T, class X>
const X* as_given(const T* x, int64_t rows, int64_t inner, int64_t& stride, std::vector<X>& copy) {
  copy.resize(rows * inner);
  for (int64_t m = 0; m < rows; m++)
    for (int64_t i = 0; i < inner; i++) copy[m * inner + i] = number(x[m * stride + i]);
  stride = inner;
  return copy.data();
}

// (outer, inner) by rows to panels; `inner` even where columns go in pairs.
template <class T>
void pack_panels(const T* from, T* to, int64_t inner, int64_t outer) {
  constexpr int D = DEEP<T>;
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
