// What Python calls of products and blocks (`kernels.py`). NUMBER: the model's type; WEIGHT: that of its matrices.

#include "blocks.hpp"

extern "C" void pack(const WEIGHT* from, WEIGHT* to, int64_t inner, int64_t outer) { pack_panels(from, to, inner, outer); }

extern "C" void product(const NUMBER* x, const WEIGHT* w, NUMBER* y, int64_t rows, int64_t inner, int64_t outer, int64_t stride) {
  std::vector<Given<NUMBER>::type> copy;
  const auto* given = as_given(x, rows, inner, stride, copy);
#pragma omp parallel if (rows * inner * outer > (1 << 18))
  multiply(given, w, y, rows, inner, outer, stride);
}

extern "C" int64_t parts(const Model* model, const Block* blocks, int64_t first, int64_t end, const Step* step, const float* cos,
                         const float* sin, NUMBER* x, NUMBER* out, float* scratch, Sum* sum) {
  return parts_of_blocks<NUMBER, WEIGHT>(*model, blocks, first, end, *step, cos, sin, x, out, scratch, sum);
}
