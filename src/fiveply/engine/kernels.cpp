// What Python calls (`kernels.py`): the compiled parts of inference on CPUs.

#include "blocks.hpp"

#define ATTENTION(NAME, T, A)                                                                                              \
  extern "C" void NAME(const Shape* shape, const Step* step, const T* q, const T* k, const T* v, T* out, T* keys, T* values) { \
    run<T, A>(*shape, *step, q, k, v, out, keys, values);                                                                  \
  }
ATTENTION(attend_float32, float, float)
ATTENTION(attend_float64, double, double)
ATTENTION(attend_bfloat16, bfloat16, float)

extern "C" void pack_float32(const float* from, float* to, int64_t inner, int64_t outer) { pack(from, to, inner, outer); }
extern "C" void pack_bfloat16(const bfloat16* from, bfloat16* to, int64_t inner, int64_t outer) { pack(from, to, inner, outer); }

#define PRODUCTS(NAME, W, T)                                                                                               \
  extern "C" void product_##NAME(const float* x, const W* w, T* y, int64_t rows, int64_t inner, int64_t outer, int64_t stride) { \
    _Pragma("omp parallel if (rows * inner * outer > (1 << 18))") product(x, w, y, rows, inner, outer, stride);           \
  }                                                                                                                        \
  extern "C" void parts_##NAME(const Model* model, const Block* blocks, int64_t first, int64_t end, const Step* step,      \
                               const float* cos, const float* sin, T* x, T* out, float* scratch) {                         \
    parts<T, W>(*model, blocks, first, end, *step, cos, sin, x, out, scratch);                                             \
  }
PRODUCTS(float32, float, float)
PRODUCTS(bfloat16, bfloat16, bfloat16)
PRODUCTS(int8_float32, int8_t, float)
PRODUCTS(int8_bfloat16, int8_t, bfloat16)
