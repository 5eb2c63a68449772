// y = x W^T on a CPU with tiles (Intel's AMX): 16 rows of x, 32 columns and a panel of W in one instruction.
//
// A tile of W is read where it lies, since a panel's columns go in pairs (`products.hpp`); 8-bit numbers of W are widened first,
// which bfloat16 does without rounding. Every row is formed by the same instructions in the same order, whatever its company.

#pragma once
#include "vectors.hpp"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t TALL = 16, DEPTH = 32;  // rows and columns of a tile of x
constexpr int64_t TILE = PANEL * DEPTH;   // numbers of a tile of W

inline bool tiles_allowed() {  // the kernel saves their state for processes that have asked
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;
  static const bool allowed = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return allowed;
}

class Tiles {  // a thread's: 0 to 3 are sums, 4 and 5 of x, 6 and 7 of W
  struct alignas(64) { uint8_t palette = 1, start = 0, reserved[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } shapes;

 public:
  explicit Tiles(int64_t tall) {
    for (int tile = 0; tile < 8; tile++) shapes.bytes[tile] = 64, shapes.rows[tile] = tile < 6 ? tall : TALL;
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
};

// A tile of sums, times scales where there are any, to `left` columns of y.
template <class Y>
inline void put(const float* sums, const float* scales, Y* y, int64_t tall, int64_t y_stride, int64_t left) {
  for (int64_t m = 0; m < tall && left > 0; m++, y += y_stride, sums += PANEL) {
    const Floats x = load(sums);
    store(y, scales ? x * load(scales) : x, left);
  }
}

// Rows of x from `a` and from `b` on with two panels that lie `panel` numbers apart. `next`: read after this, `lines` of the cache
// are asked for with each tile.
inline void two_by_two(const bfloat16* a, const bfloat16* b, int64_t x_stride, const bfloat16* w, int64_t panel, int64_t inner,
                       float* sums, const char* next, int64_t lines) {
  std::atomic_signal_fence(std::memory_order_seq_cst);  // compilers don't know that tiles are read from memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < inner; i += DEPTH, w += TILE) {
    _tile_loadd(4, a + i, 2 * x_stride);
    _tile_loadd(6, w, 64);
    _tile_loadd(7, w + panel, 64);
    _tile_loadd(5, b + i, 2 * x_stride);
    for (int64_t line = 0; line < lines; line++, next += 64) __builtin_prefetch(next, 0, 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + TALL * PANEL, 64);
  _tile_stored(2, sums + 2 * TALL * PANEL, 64);
  _tile_stored(3, sums + 3 * TALL * PANEL, 64);
}

// A panel of 8-bit numbers, column by column, as pairs of bfloat16.
inline void widen(const int8_t* from, bfloat16* to, int64_t inner) {
  for (int64_t i = 0; i < inner; i += 2, from += 2 * PANEL, to += 2 * PANEL) {
    const auto bits = [&](int64_t column) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + column * PANEL));
      return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
    };
    _mm512_storeu_si512(to, _mm512_or_si512(_mm512_srli_epi32(bits(0), 16), bits(1)));  // whose lower halves are zero
  }
}

// A tile of W where it lies, or widened to `room`.
inline const bfloat16* tile_of(const bfloat16* w, bfloat16*) { return w; }
inline const bfloat16* tile_of(const int8_t* w, bfloat16* room) {
  widen(w, room, DEPTH);
  return room;
}

template <class W>
inline void one_by_two(const bfloat16* a, int64_t x_stride, const W* w, int64_t panel, int64_t inner, float* sums) {
  alignas(64) bfloat16 room[2][2][TILE];
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t i = 0; i < inner; i += DEPTH, w += TILE) {
    for (int64_t line = 0; line < TILE; line += 64 / sizeof(W))  // of the next tiles: few rows leave no time to wait for them
      __builtin_prefetch(w + TILE + line), __builtin_prefetch(w + panel + TILE + line);
    const bfloat16 *first = tile_of(w, room[i / DEPTH % 2][0]), *second = tile_of(w + panel, room[i / DEPTH % 2][1]);
    std::atomic_signal_fence(std::memory_order_seq_cst);
    _tile_loadd(4, a + i, 2 * x_stride);
    _tile_loadd(6, first, 64);
    _tile_loadd(7, second, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + TALL * PANEL, 64);
}

// On each thread of a team, as `multiply`. `scales`: columns' worth of numbers behind a panel. `inner`: a multiple of DEPTH.
template <class W, class Y, int scales>
void by_tiles(const bfloat16* x, const W* w, Y* y, int64_t rows, int64_t inner, int64_t outer, int64_t x_stride) {
  const int64_t panels = (outer + PANEL - 1) / PANEL, panel = (inner + scales) * PANEL, tall = std::min(rows, TALL);
  const int64_t passes = (rows + 2 * TALL - 1) / (2 * TALL), lines = (2 * TILE * sizeof(W) / 64 + passes - 1) / passes;
  const Tiles tiles(tall);
  alignas(64) float sums[4][TALL * PANEL];
  std::vector<bfloat16> widened(scales && rows > TALL ? 2 * inner * PANEL : 0);
#pragma omp for schedule(static) nowait
  for (int64_t p = 0; p < panels; p += 2) {
    const bool alone = p + 1 == panels;
    const W* own = w + p * panel;
    const float* factors[2] = {};
    if constexpr (scales > 0)
      for (int n = 0; n < 2 - alone; n++) factors[n] = reinterpret_cast<const float*>(own + n * panel + inner * PANEL);
    const auto told = [&](int64_t m, int which) {
      for (int n = 0; n < 2; n++)
        put(sums[which + n], factors[n], y + m * outer + (p + n) * PANEL, tall, outer, outer - (p + n) * PANEL);
    };
    if (rows <= TALL) {
      one_by_two(x, x_stride, own, alone ? 0 : panel, inner, sums[0]);
      told(0, 0);
      continue;
    }
    const bfloat16* tile;
    int64_t apart = alone ? 0 : panel;
    if constexpr (scales > 0) {
      for (int n = 0; n < 2 - alone; n++) widen(own + n * panel, widened.data() + n * inner * PANEL, inner);
      tile = widened.data(), apart = alone ? 0 : inner * PANEL;
    } else
      tile = own;
    const char* next = reinterpret_cast<const char*>(own + 2 * panel);
    for (int64_t m = 0; m < rows; m += 2 * TALL) {
      const int64_t last = rows - TALL;  // rows near the end are formed twice, alike
      if (m >= last) {
        one_by_two(x + last * x_stride, x_stride, tile, apart, inner, sums[0]);
        told(last, 0);
      } else {
        const int64_t second = std::min(m + TALL, last);
        two_by_two(x + m * x_stride, x + second * x_stride, x_stride, tile, apart, inner, sums[0], next, lines);
        next += lines * 64 * (inner / DEPTH);
        told(m, 0), told(second, 2);
      }
    }
  }
}

}  // namespace
#endif
