// What Python calls of attention (`kernels.py`). NUMBER: the type of queries, keys, values and cache.

#include "paged_attention.hpp"

extern "C" void attend(const Shape* shape, const Step* step, const NUMBER* q, const NUMBER* k, const NUMBER* v, NUMBER* out,
                       NUMBER* keys, NUMBER* values) {
  run(*shape, *step, q, k, v, out, keys, values);
}
