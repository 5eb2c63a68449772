// y = x W^T in float32 for few rows of x, as decoding has them: W is read once, from where it lies.
//
// Libraries pack W at each call, which takes longer than the product, or keep a packed copy, which is slower than this for one
// row. A number of y is formed the same way whatever the number of rows, so a row's bits do not depend on its company.

#include <cstdint>
#include <cstring>

namespace {

typedef float V __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int64_t LANES = 16;
#ifdef __AVX512F__
constexpr int TILE = 4;  // rows of W, and of x, whose sums stay in registers
#else
constexpr int TILE = 2;
#endif

template <class Half, class Whole> inline Half halves_added(const Whole& v) {
  Half low, high;
  std::memcpy(&low, &v, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
  return low + high;
}

inline float total(const V& v) {
  typedef float V8 __attribute__((vector_size(32)));
  typedef float V4 __attribute__((vector_size(16)));
  const V4 four = halves_added<V4>(halves_added<V8>(v));
  return (four[0] + four[2]) + (four[1] + four[3]);
}

template <int R, int C>
inline void tile(const float* w, const float* x, float* y, int64_t inner, int64_t x_stride, int64_t outer) {
  V sums[R][C] = {};
  int64_t i = 0;
  for (; i + LANES <= inner; i += LANES) {
    V from_x[C];
    for (int c = 0; c < C; c++) from_x[c] = *reinterpret_cast<const V*>(x + c * x_stride + i);
    for (int r = 0; r < R; r++) {
      const V from_w = *reinterpret_cast<const V*>(w + r * inner + i);
      for (int c = 0; c < C; c++) sums[r][c] += from_w * from_x[c];
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) {
      float rest = 0;
      for (int64_t k = i; k < inner; k++) rest += w[r * inner + k] * x[c * x_stride + k];
      y[c * outer + r] = total(sums[r][c]) + rest;
    }
}

template <int R>
inline void rows_of_w(const float* w, const float* x, float* y, int64_t rows, int64_t inner, int64_t x_stride, int64_t outer) {
  int64_t m = 0;
  for (; m + TILE <= rows; m += TILE) tile<R, TILE>(w, x + m * x_stride, y + m * outer, inner, x_stride, outer);
  for (; m < rows; m++) tile<R, 1>(w, x + m * x_stride, y + m * outer, inner, x_stride, outer);
}

}  // namespace

extern "C" void few_rows(const float* x, const float* w, float* y, int64_t rows, int64_t inner, int64_t outer, int64_t x_stride) {
  const int64_t whole = outer / TILE;
#pragma omp parallel for schedule(static) if (rows * inner * outer > (1 << 18))
  for (int64_t block = 0; block <= whole; block++) {
    const int64_t o = block * TILE;
    if (block < whole)
      rows_of_w<TILE>(w + o * inner, x, y + o, rows, inner, x_stride, outer);
    else
      for (int64_t last = o; last < outer; last++) rows_of_w<1>(w + last * inner, x, y + last, rows, inner, x_stride, outer);
  }
}
