// Causal attention of packed tokens over a paged key-value cache, on CPUs.
//
// Each cached key and value is read once a step, where it lies: nothing is gathered, padded or masked in memory. Keys of a
// block are stored column by column (kv head, column, token), so that a vector holds one column of all its tokens; values
// are stored row by row, padded to whole vectors. A row's arithmetic goes through the cache in groups of blocks that begin at
// fixed positions, so it gives the same bits however its tokens are cut into chunks and whatever else is in the step.
// The softmax is the streaming one of Milakov and Gimelshein 2018.

#pragma once
#include <cmath>
#include <limits>

#include "vectors.hpp"

namespace {

constexpr int BLOCK = 16;  // tokens of a block
constexpr int GROUP = 8;   // blocks whose scores are formed together
constexpr int KEYS = BLOCK * GROUP;
constexpr int64_t ALONE = 1 << 17;  // products up to which one thread does all
constexpr int WIDE = 4;  // blocks of an accumulator that stay in registers

// Sums and scores in vectors as long as the processor's own, of which EACH make a BLOCK.
template <class A> constexpr int LONG = LANES * 4 / sizeof(A);
template <class A> constexpr int EACH = BLOCK / LONG<A>;
template <class A> struct Vector;
template <> struct Vector<float> { typedef Floats type; };
template <> struct Vector<double> { typedef double type __attribute__((vector_size(4 * LANES), aligned(8), may_alias)); };

inline Vector<double>::type load(const double* x) { return *reinterpret_cast<const Vector<double>::type*>(x); }
// exp(x) for x <= 0: 2^n times a polynomial in the rest (Cephes' coefficients); 0 below -87.
inline Vector<float>::type exponential(Vector<float>::type x) {
  typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
  const Vector<float>::type zero = {};
  auto small = x < -87.0f;  // -inf where a key is masked
  x = small ? zero : x;
  Vector<float>::type shifted = x * 1.44269504f + 12582912.0f;  // the sum rounds to a whole number
  Vector<float>::type n = shifted - 12582912.0f;
  Vector<float>::type r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector<float>::type p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Integers bits = (__builtin_convertvector(n, Integers) + 127) << 23;
  Vector<float>::type y = p * reinterpret_cast<Vector<float>::type&>(bits);
  return small ? zero : y;
}
inline Vector<double>::type exponential(Vector<double>::type x) {
  for (int j = 0; j < LONG<double>; j++) x[j] = std::exp(x[j]);
  return x;
}

struct Shape {
  int64_t heads, kv_heads, head_dim, padded, window;
  int64_t q_stride, k_stride, v_stride;  // numbers from token to token
};

// Tokens [first, first + count) of one sequence, at positions from `position` on; `row` of the tables is its own.
struct Tile { int64_t first, count, position, row; };

template <class A> inline A largest(const typename Vector<A>::type* v) {  // of a BLOCK
  A most = v[0][0];
  for (int j = 1; j < BLOCK; j++) most = std::max(most, A(v[j / LONG<A>][j % LONG<A>]));
  return most;
}
template <class A> inline A total_of(const typename Vector<A>::type* v) {
  A part[BLOCK];
  for (int j = 0; j < BLOCK; j++) part[j] = v[j / LONG<A>][j % LONG<A>];
  for (int half = BLOCK / 2; half; half /= 2)
    for (int j = 0; j < half; j++) part[j] += part[j + half];
  return part[0];
}

// sums * shrink + the values of keys [low, high] with weights p, W blocks of them. `blocks`: where each of the group's is.
template <int W, class T, class A>
inline void mix(A* sums, A shrink, const A* p, const T* const* blocks, int64_t low, int64_t high, int64_t padded) {
  typedef typename Vector<A>::type V;
  constexpr int N = W * EACH<A>, L = LONG<A>;
  V acc[N];
  for (int n = 0; n < N; n++) acc[n] = load(sums + n * L) * shrink;
  for (int64_t key = low; key <= high; key++) {
    const T* v = blocks[key / BLOCK] + key % BLOCK * padded;
    for (int n = 0; n < N; n++) acc[n] += load(v + n * L) * p[key];
  }
  for (int n = 0; n < N; n++) *reinterpret_cast<V*>(sums + n * L) = acc[n];
}

template <class A, class Q, class T, class O>
void attend(const Shape& s, const Tile& tile, int64_t kv_head, const Q* q, O* out, const T* keys, const T* values,
            const int32_t* table, double scale, std::vector<A>& scratch) {
  typedef typename Vector<A>::type V;
  constexpr int E = EACH<A>, L = LONG<A>;
  const A lowest = -std::numeric_limits<A>::infinity();
  const int64_t group = s.heads / s.kv_heads, rows = tile.count * group, d = s.head_dim, padded = s.padded;
  const int64_t key_numbers = d * BLOCK, value_numbers = BLOCK * padded;
  scratch.resize(rows * (d + padded + 2) + KEYS);
  A *query = scratch.data(), *sums = query + rows * d, *most = sums + rows * padded, *total = most + rows, *p = total + rows;
  for (int64_t m = 0; m < rows; m++) {
    const Q* from = q + (tile.first + m / group) * s.q_stride + (kv_head * group + m % group) * d;
    for (int64_t i = 0; i < d; i++) query[m * d + i] = number(from[i]) * A(scale);
    for (int64_t i = 0; i < padded; i++) sums[m * padded + i] = 0;
    most[m] = lowest;
    total[m] = 0;
  }
  V places[E];
  for (int j = 0; j < BLOCK; j++) places[j / L][j % L] = A(j);
  const int64_t oldest = s.window ? std::max<int64_t>(0, tile.position - s.window + 1) : 0;
  const int64_t newest = tile.position + tile.count - 1;
  for (int64_t base = oldest / KEYS * KEYS; base <= newest; base += KEYS) {
    const T *key_blocks[GROUP + 1], *value_blocks[GROUP];
    for (int64_t b = 0; b < GROUP && base + b * BLOCK <= newest; b++) {
      const int64_t at = table[base / BLOCK + b] * s.kv_heads + kv_head;
      key_blocks[b] = keys + at * key_numbers, value_blocks[b] = values + at * value_numbers;
      key_blocks[b + 1] = key_blocks[b];
    }
    for (int64_t m = 0; m < rows; m++) {
      const int64_t own = tile.position + m / group;
      const int64_t low = std::max<int64_t>(base, s.window ? own - s.window + 1 : 0) - base;
      const int64_t high = std::min<int64_t>(base + KEYS - 1, own) - base;
      if (low > high) continue;
      const A* x = query + m * d;
      V best[E], sum[E] = {};
      for (int e = 0; e < E; e++) best[e] = V{} + lowest;
      for (int64_t b = low / BLOCK; b <= high / BLOCK; b++) {
        const T *k = key_blocks[b], *next = key_blocks[b + 1], *soon = value_blocks[b];
        V part[4][E] = {};
        int64_t i = 0;
        for (; i + 4 <= d; i += 4)
          for (int c = 0; c < 4; c++) {
            for (int e = 0; e < E; e++) part[c][e] += load(k + (i + c) * BLOCK + e * L) * x[i + c];
            if (m == 0) __builtin_prefetch(next + (i + c) * BLOCK);
            if (m == 0) __builtin_prefetch(soon + (i + c) * BLOCK);
          }
        for (; i < d; i++)
          for (int e = 0; e < E; e++) part[0][e] += load(k + i * BLOCK + e * L) * x[i];
        const bool masked = b * BLOCK < low || b * BLOCK + BLOCK - 1 > high;
        const A first = A(low - b * BLOCK), last = A(high - b * BLOCK);
        for (int e = 0; e < E; e++) {
          V score = (part[0][e] + part[1][e]) + (part[2][e] + part[3][e]);
          if (masked) {
            score = places[e] < first ? V{} + lowest : score;
            score = places[e] > last ? V{} + lowest : score;
          }
          *reinterpret_cast<V*>(p + b * BLOCK + e * L) = score;
          best[e] = score > best[e] ? score : best[e];
        }
      }
      const A top = std::max(largest<A>(best), most[m]), shrink = std::exp(most[m] - top);
      for (int64_t b = low / BLOCK; b <= high / BLOCK; b++)
        for (int e = 0; e < E; e++) {
          const V weight = exponential(load(p + b * BLOCK + e * L) - top);
          *reinterpret_cast<V*>(p + b * BLOCK + e * L) = weight;
          sum[e] += weight;
        }
      most[m] = top;
      total[m] = total[m] * shrink + total_of<A>(sum);
      const T* from[GROUP];
      for (int64_t c = 0; c < padded; c += BLOCK * WIDE) {
        for (int64_t b = low / BLOCK; b <= high / BLOCK; b++) from[b] = value_blocks[b] + c;
        A* to = sums + m * padded + c;
        switch (std::min<int64_t>(WIDE, (padded - c) / BLOCK)) {
          case 4: mix<4>(to, shrink, p, from, low, high, padded); break;
          case 3: mix<3>(to, shrink, p, from, low, high, padded); break;
          case 2: mix<2>(to, shrink, p, from, low, high, padded); break;
          default: mix<1>(to, shrink, p, from, low, high, padded);
        }
      }
    }
  }
  for (int64_t m = 0; m < rows; m++) {
    O* to = out + ((tile.first + m / group) * s.heads + kv_head * group + m % group) * d;
    for (int64_t i = 0; i < d; i++) store(to + i, sums[m * padded + i] / total[m]);
  }
}

// The tokens of a step, and where their sequences lie in the cache.
struct Step {
  int64_t tokens, table_stride, tile_count;
  const int64_t* slots;
  const int32_t* tables;
  const Tile* tiles;
};

inline int64_t work_of(const Shape& s, const Step& step) {  // products of all tiles
  int64_t products = 0;
  for (int64_t t = 0; t < step.tile_count; t++) {
    const Tile& tile = step.tiles[t];
    const int64_t keys_each = tile.position + tile.count;
    products += tile.count * s.heads * s.head_dim * (s.window ? std::min(keys_each, s.window) : keys_each);
  }
  return products;
}

template <class Q, class T>
void keep(const Shape& s, int64_t slot, int64_t kv_head, const Q* k, const Q* v, T* keys, T* values) {
  const int64_t block = slot / BLOCK * s.kv_heads + kv_head, at = slot % BLOCK, d = s.head_dim;
  for (int64_t i = 0; i < d; i++) store(keys + (block * d + i) * BLOCK + at, number(k[i]));
  T* to = values + (block * BLOCK + at) * s.padded;
  for (int64_t i = 0; i < d; i++) store(to + i, number(v[i]));
  for (int64_t i = d; i < s.padded; i++) to[i] = T{};
}

// On each thread of a team: its part of the tiles; without a barrier.
template <class Q, class T, class O>
void attend_all(const Shape& s, const Step& step, const Q* q, O* out, const T* keys, const T* values) {
  typedef decltype(number(*q)) A;  // of sums
  std::vector<A> scratch;
  const double scale = 1 / std::sqrt(double(s.head_dim));
#pragma omp for schedule(dynamic) nowait
  for (int64_t item = 0; item < step.tile_count * s.kv_heads; item++) {
    const Tile& tile = step.tiles[item / s.kv_heads];
    attend<A>(s, tile, item % s.kv_heads, q, out, keys, values, step.tables + tile.row * step.table_stride, scale, scratch);
  }
}

template <class T>
void run(const Shape& s, const Step& step, const T* q, const T* k, const T* v, T* out, T* keys, T* values) {
#pragma omp parallel if (work_of(s, step) > ALONE)  // waking the other threads costs more than a little work
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < step.tokens; t++)
      for (int64_t h = 0; h < s.kv_heads; h++)
        keep(s, step.slots[t], h, k + t * s.k_stride + h * s.head_dim, v + t * s.v_stride + h * s.head_dim, keys, values);
    attend_all(s, step, q, out, keys, values);
  }
}

}  // namespace
