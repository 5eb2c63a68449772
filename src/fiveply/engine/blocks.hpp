// The blocks of a Llama-like decoder on a CPU: root-mean-square norm, attention over the paged cache, gated MLP with SiLU.
//
// A block is two parts, each a norm, products and what lies between them; what a part gives is added to the residual stream by
// the part after it, so that ranks which share a block can sum in between. All threads go through the parts together. Within
// a part numbers are float32 whatever the type of matrices (W), and of other weights, cache and residual stream (T); what is
// multiplied by matrices is of the type that products take.

#pragma once
#include "paged_attention.hpp"
#include "products.hpp"

namespace {

struct Model { int64_t hidden, heads, kv_heads, head_dim, padded, ffn; double eps; };  // this rank's heads and MLP columns

struct Block {  // packed matrices; null where the model has no such thing
  const void *attention_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *o, *mlp_norm, *gate_up, *down;
  void *keys, *values;
  int64_t window;
};

template <class T>
void add(T* to, const T* added, int64_t size) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) store(to + i, load(to + i) + load(added + i));
  for (; i < size; i++) store(to + i, number(to[i]) + number(added[i]));
}

template <class X, class T, class Y>
void normed(const X* x, const T* weight, Y* out, int64_t size, double eps) {  // `out` may be `x`
  Floats squares[4][PARTS] = {};
  int64_t i = 0;
  for (; i + 4 * PANEL <= size; i += 4 * PANEL)
    for (int c = 0; c < 4 * PARTS; c++) squares[c / PARTS][c % PARTS] += load(x + i + c * LANES) * load(x + i + c * LANES);
  float sum = 0;
  for (int p = 0; p < PARTS; p++) {
    const Floats all = (squares[0][p] + squares[1][p]) + (squares[2][p] + squares[3][p]);
    for (int c = 0; c < LANES; c++) sum += all[c];
  }
  for (; i < size; i++) sum += number(x[i]) * number(x[i]);
  const float scale = 1 / std::sqrt(sum / float(size) + float(eps));
  for (i = 0; i + LANES <= size; i += LANES) store(out + i, load(x + i) * scale * load(weight + i));
  for (; i < size; i++) store(out + i, number(x[i]) * scale * number(weight[i]));
}

// The pairs (column i, column i + head_dim / 2) of one head; `cos` and `sin` of its token.
inline void rotated(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

template <class T, class X>
void add_and_norm(const Model& m, T* x, const T* added, const T* weight, X* out, int64_t tokens, Barrier& all) {
#pragma omp for schedule(static) nowait
  for (int64_t t = 0; t < tokens; t++) {
    T* row = x + t * m.hidden;
    if (added)
      add(row, added + t * m.hidden, m.hidden);
    normed(row, weight, out + t * m.hidden, m.hidden, m.eps);
  }
  all.wait();
}

template <class T, class W>
void attention_part(const Model& m, const Block& b, const Step& step, const float* cos, const float* sin, T* x,
                    const T* added, T* out, float* scratch, Barrier& all) {
  typedef typename Given<T>::type X;
  const int64_t tokens = step.tokens, d = m.head_dim, own = (m.heads + 2 * m.kv_heads) * d;
  const Shape shape{m.heads, m.kv_heads, d, m.padded, b.window, own, own, own};
  float* qkv = scratch;
  X *h = reinterpret_cast<X*>(qkv + tokens * own), *mixed = h + tokens * m.hidden;
  add_and_norm(m, x, added, static_cast<const T*>(b.attention_norm), h, tokens, all);
  multiply(h, static_cast<const W*>(b.qkv), qkv, tokens, m.hidden, own, m.hidden);
  all.wait();
#pragma omp for schedule(static) nowait
  for (int64_t item = 0; item < tokens * (m.heads + m.kv_heads); item++) {
    const int64_t t = item / (m.heads + m.kv_heads), head = item % (m.heads + m.kv_heads);
    const bool key = head >= m.heads;
    float *y = qkv + t * own + head * d, *v = y + m.kv_heads * d;
    if (b.qkv_bias) {
      const T* bias = static_cast<const T*>(b.qkv_bias) + head * d;
      for (int64_t i = 0; i < d; i++) y[i] += number(bias[i]);
      for (int64_t i = 0; key && i < d; i++) v[i] += number(bias[m.kv_heads * d + i]);
    }
    if (b.q_norm) normed(y, static_cast<const T*>(key ? b.k_norm : b.q_norm), y, d, m.eps);
    rotated(y, cos + t * (d / 2), sin + t * (d / 2), d / 2);
    if (key) keep(shape, step.slots[t], head - m.heads, y, v, static_cast<T*>(b.keys), static_cast<T*>(b.values));
  }
  all.wait();
  attend_all(shape, step, qkv, mixed, static_cast<const T*>(b.keys), static_cast<const T*>(b.values));
  all.wait();
  multiply(mixed, static_cast<const W*>(b.o), out, tokens, m.heads * d, m.hidden, m.heads * d);
  all.wait();
}

template <class T, class W>
void mlp_part(const Model& m, const Block& b, const Step& step, T* x, const T* added, T* out, float* scratch, Barrier& all) {
  typedef typename Given<T>::type X;
  const int64_t tokens = step.tokens;
  float* both = scratch;
  X *h = reinterpret_cast<X*>(both + tokens * 2 * m.ffn), *gated = h + tokens * m.hidden;
  add_and_norm(m, x, added, static_cast<const T*>(b.mlp_norm), h, tokens, all);
  multiply(h, static_cast<const W*>(b.gate_up), both, tokens, m.hidden, 2 * m.ffn, m.hidden);
  all.wait();
  const int64_t pieces = (m.ffn + LANES - 1) / LANES;
#pragma omp for schedule(static) nowait
  for (int64_t item = 0; item < tokens * pieces; item++) {
    const int64_t first = item % pieces * LANES;
    const float* gate = both + item / pieces * 2 * m.ffn + first;
    X* to = gated + item / pieces * m.ffn + first;
    const Floats g = load(gate), zero = {}, e = exponential(g > 0 ? -g : g);
    const Floats y = g * (g > 0 ? zero + 1 : e) / (1 + e) * load(gate + m.ffn);
    store(to, y, m.ffn - first);
  }
  all.wait();
  multiply(gated, static_cast<const W*>(b.down), out, tokens, m.ffn, m.hidden, m.ffn);
  all.wait();
}

// How ranks that share the blocks sum, in place (`Channel.compiled_sum` of `world/shm.py`).
struct Sum {
  void* (*start)(void* group, int kind, int dtype, int reduction, int root, int64_t bytes, const void* in, void* out,
                 const void* parts, int64_t limit_ns);  // null once it is done
  void* group;
  int64_t kind, dtype, reduction, limit_ns;
  void* pending;  // one that has not ended in time
};

// Parts [first, end) of the blocks, an even one a block's attention, an odd one its MLP. `x`: the residual stream. `out`: what
// the part before gave, unless `first` is the very first one, and then what the last part gives, summed if there is a `sum`.
// Returns the part to go on with: `end`, or the one after a sum that is pending. `scratch` is read up to a vector beyond its end.
template <class T, class W>
int64_t parts_of_blocks(const Model& m, const Block* blocks, int64_t first, int64_t end, const Step& step, const float* cos,
                        const float* sin, T* x, T* out, float* scratch, Sum* sum) {
  const int64_t layer = m.hidden * ((m.heads + m.kv_heads) * 2 * m.head_dim + 3 * m.ffn);
  const int64_t bytes = step.tokens * m.hidden * sizeof(T);
  Barrier all;
  bool stopped = false;
  int64_t next = end;
#pragma omp parallel if (step.tokens * layer > (1 << 18))
  for (int64_t part = first; part < end && !stopped; part++) {
    const T* added = part ? out : nullptr;
    if (part % 2)
      mlp_part<T, W>(m, blocks[part / 2], step, x, added, out, scratch, all);
    else
      attention_part<T, W>(m, blocks[part / 2], step, cos, sin, x, added, out, scratch, all);
    if (!sum) continue;
#pragma omp master
    if ((sum->pending = sum->start(sum->group, sum->kind, sum->dtype, sum->reduction, 0, bytes, out, out, nullptr, sum->limit_ns)))
      stopped = true, next = part + 1;
    all.wait();
  }
  return next;
}

}  // namespace
