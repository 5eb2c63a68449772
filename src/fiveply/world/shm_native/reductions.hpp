// Reductions of arrays, in rank order: all ranks get the same bits, and so does the next run.
//
// Notable: 16-bit floats are accumulated in float32 and rounded once.
//
// What it does not know: ranks, steps, shared memory.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace shm {

using i64 = int64_t;
using u32 = uint32_t;

enum Reduction : int32_t { SUM, AVG, PRODUCT, MIN, MAX, BAND, BOR, BXOR };
enum Dtype : int32_t { F32, F64, BF16, F16, I8, U8, I16, I32, I64 };

struct Bf16 {
    uint16_t bits;
    operator float() const {
        u32 wide = u32(bits) << 16;
        float x;
        memcpy(&x, &wide, 4);
        return x;
    }
    static Bf16 from(float x) {  // to nearest, ties to even; a NaN stays one
        u32 wide;
        memcpy(&wide, &x, 4);
        u32 rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
        return {uint16_t(x != x ? 0x7fc0 : rounded)};
    }
};

struct F16bits {
    uint16_t bits;
    operator float() const {
        u32 magnitude = u32(bits & 0x7fff) << 13, sign = u32(bits & 0x8000) << 16;
        float x, scale = 0x1p112f;  // the product also normalises subnormal numbers
        memcpy(&x, &magnitude, 4);
        x *= scale;
        u32 wide;
        memcpy(&wide, &x, 4);
        wide = (magnitude >= 0x0f800000 ? (magnitude | 0x7f800000) : wide) | sign;
        memcpy(&x, &wide, 4);
        return x;
    }
    static F16bits from(float x) {
        u32 wide;
        memcpy(&wide, &x, 4);
        u32 sign = (wide >> 16) & 0x8000, magnitude = wide & 0x7fffffff;
        if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
        if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65,520 and above round to infinity
        if (magnitude < 0x38800000) {                                   // subnormal: let an addition round to 2^-24
            float small, half = 0.5f;
            memcpy(&small, &magnitude, 4);
            small += half;
            u32 shifted, base;
            memcpy(&shifted, &small, 4);
            memcpy(&base, &half, 4);
            return {uint16_t(sign | (shifted - base))};
        }
        u32 rounded = magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1);
        return {uint16_t(sign | (rounded >> 13))};
    }
};

template <class T> struct Wide { using type = T; };
template <> struct Wide<Bf16> { using type = float; };
template <> struct Wide<F16bits> { using type = float; };

template <class T, class A> T narrow(A x) {
    if constexpr (std::is_same_v<T, A>) return x;
    else return T::from(x);
}

// out[i] = in[0][i] . in[1][i] . ..., in this order; accumulated wide and rounded once. `out` may be one of `in`.
template <class T, class F> void fold(char* out, const std::vector<const char*>& in, i64 count, bool average, F f) {
    using A = typename Wide<T>::type;
    constexpr i64 BLOCK = 1024;
    A sums[BLOCK];
    const int n = int(in.size());
    for (i64 low = 0; low < count; low += BLOCK) {
        const i64 size = std::min(BLOCK, count - low);
        const T* first = reinterpret_cast<const T*>(in[0]) + low;
        if (n == 1) for (i64 i = 0; i < size; i++) sums[i] = A(first[i]);
        for (int q = 1; q < n; q++) {
            const T* next = reinterpret_cast<const T*>(in[q]) + low;
            if (q == 1) for (i64 i = 0; i < size; i++) sums[i] = f(A(first[i]), A(next[i]));
            else for (i64 i = 0; i < size; i++) sums[i] = f(sums[i], A(next[i]));
        }
        if (average) for (i64 i = 0; i < size; i++) sums[i] = A(sums[i] / A(n));
        T* to = reinterpret_cast<T*>(out) + low;
        for (i64 i = 0; i < size; i++) to[i] = narrow<T, A>(sums[i]);
    }
}

template <class T> void reduce_as(int reduction, char* out, const std::vector<const char*>& in, i64 bytes) {
    using A = typename Wide<T>::type;
    const i64 count = bytes / i64(sizeof(T));
    switch (reduction) {
        case SUM: case AVG: return fold<T>(out, in, count, reduction == AVG, [](A a, A b) { return A(a + b); });
        case PRODUCT: return fold<T>(out, in, count, false, [](A a, A b) { return A(a * b); });
        case MIN: return fold<T>(out, in, count, false, [](A a, A b) { return b < a ? b : a; });
        case MAX: return fold<T>(out, in, count, false, [](A a, A b) { return a < b ? b : a; });
    }
    if constexpr (std::is_integral_v<T>) switch (reduction) {
        case BAND: return fold<T>(out, in, count, false, [](A a, A b) { return A(a & b); });
        case BOR: return fold<T>(out, in, count, false, [](A a, A b) { return A(a | b); });
        case BXOR: return fold<T>(out, in, count, false, [](A a, A b) { return A(a ^ b); });
    }
}

inline void reduce(int dtype, int reduction, char* out, const std::vector<const char*>& in, i64 bytes) {
    switch (dtype) {
        case F32: return reduce_as<float>(reduction, out, in, bytes);
        case F64: return reduce_as<double>(reduction, out, in, bytes);
        case BF16: return reduce_as<Bf16>(reduction, out, in, bytes);
        case F16: return reduce_as<F16bits>(reduction, out, in, bytes);
        case I8: return reduce_as<int8_t>(reduction, out, in, bytes);
        case U8: return reduce_as<uint8_t>(reduction, out, in, bytes);
        case I16: return reduce_as<int16_t>(reduction, out, in, bytes);
        case I32: return reduce_as<int32_t>(reduction, out, in, bytes);
        case I64: return reduce_as<int64_t>(reduction, out, in, bytes);
    }
}

}  // namespace shm
