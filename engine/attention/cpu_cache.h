// KV caches of a CPU: in the compute dtype, in bfloat16 beside float32, or quantized to one byte a value as
// engine/kernels/kv_quantization.py defines, to the bit.
#pragma once

#include "../kernels/cpu_vector.h"

namespace quire {

struct fp8 {  // e4m3, finite numbers only
    uint8_t bits;
};
struct int8 {  // a type of this namespace, whose functions the vectors' templates find
    int8_t value;
};

// One layer's, [num_blocks, K, block_size, D], as Python gives them.
struct Caches {
    void *k, *v;
    float *k_scale, *v_scale;  // fp8: [K]; int8: [num_blocks, K, block_size]; else null
    int64_t kind;              // 0: compute dtype, 1: fp8, 2: int8, 3: bfloat16
};

template <class C>
struct Cache {
    C *k, *v;
    float *k_scale, *v_scale;
};

// f(cache) with the type of what the cache holds; T in the compute dtype.
template <class T, class F>
inline void with_cache(const Caches& c, F f) {
    if (c.kind == 1) return f(Cache<fp8>{static_cast<fp8*>(c.k), static_cast<fp8*>(c.v), c.k_scale, c.v_scale});
    if (c.kind == 2) return f(Cache<int8>{static_cast<int8*>(c.k), static_cast<int8*>(c.v), c.k_scale, c.v_scale});
    if (c.kind == 3) return f(Cache<bf16>{static_cast<bf16*>(c.k), static_cast<bf16*>(c.v), nullptr, nullptr});
    f(Cache<T>{static_cast<T*>(c.k), static_cast<T*>(c.v), nullptr, nullptr});
}

template <class C>
constexpr bool QUANTIZED = sizeof(C) == 1;

typedef uint8_t vb_any __attribute__((vector_size(VL), aligned(1), may_alias));
typedef int8_t vs_any __attribute__((vector_size(VL), aligned(1), may_alias));

inline vf load(const int8* p) { return __builtin_convertvector(*reinterpret_cast<const vs_any*>(p), vf); }
inline float widen(int8 x) { return x.value; }

// Exponents are moved to float32's; below 2^-6, where they are 0, a number is the one that an exponent of 1 would give less
// 2^-6.
inline vf load(const fp8* p) {
    const vu bits = __builtin_convertvector(*reinterpret_cast<const vb_any*>(p), vu), magnitude = bits & 0x7F;
    const vf moved = (vf)((magnitude << 20) + (120u << 23));
    const vf value = magnitude < 8 ? moved + moved - splat(0x1p-6f) : moved;
    return (vf)((vu)value | (bits & 0x80) << 24);
}
inline float widen(fp8 x) {
    const fp8 lanes[VL] = {x};
    return load(lanes)[0];
}

inline vu absolute(vf x) { return (vu)x & 0x7FFFFFFF; }

// The bits of the e4m3 number nearest to each x, ties to even, saturated; as `_e4m3` of store_quantized_kv.py.
inline vu e4m3(vf x) {
    vu magnitude = absolute(x);
    magnitude = magnitude < 0x43E00000 ? magnitude : vu{} + 0x43E00000;  // 448
    const vu normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3);
    const vu small = (vu)((vf)magnitude + splat(16384.0f)) - 0x46800000;
    return (magnitude < 0x3C800000 ? small : normal) | ((vu)x >> 24 & 0x80);  // below 2^-6 numbers are 2^-9 apart
}

inline void store_bytes(void* to, vu codes, int64_t n) {
    const vb_any bytes = __builtin_convertvector(codes & 0xFF, vb_any);
    std::memcpy(to, &bytes, n);
}

// One head of a token to its place; `slot` counts heads of tokens: (block * K + head) * block_size + offset.
template <class T, class C>
inline void store_head(const T* x, C* cache, float*, int64_t, int64_t slot, int64_t size) {
    C* to = cache + slot * size;
    in_vectors(size, [&](int64_t i, int64_t n) { store_some(to + i, load_some(x + i, n), n); });
}

template <class T>
inline void store_head(const T* x, fp8* cache, float* scale, int64_t head, int64_t slot, int64_t size) {
    fp8* to = cache + slot * size;
    in_vectors(size, [&](int64_t i, int64_t n) { store_bytes(to + i, e4m3(load_some(x + i, n) / splat(scale[head])), n); });
}

template <class T>
inline void store_head(const T* x, int8* cache, float* scale, int64_t, int64_t slot, int64_t size) {
    vf peak{};
    in_vectors(size, [&](int64_t i, int64_t n) {
        const vf a = (vf)absolute(load_some(x + i, n));
        peak = a > peak ? a : peak;
    });
    const float top = largest(peak), inverse = top > 1e-30f ? 127.0f / top : 0.0f;
    int8* to = cache + slot * size;
    in_vectors(size, [&](int64_t i, int64_t n) {
        vf y = load_some(x + i, n) * splat(inverse);
        asm("" : "+m"(y));  // rounded before the addition, which would contract with the product
        store_bytes(to + i, (vu)(y + splat(12582912.0f)) - 0x4B400000, n);  // 1.5 * 2^23 rounds to a whole number
    });
    scale[slot] = top / 127.0f;
}

// One head of a token of a quantized cache, widened into `to` [size], which it returns.
template <class C>
inline const float* widen_head(const C* from, float scale, int64_t size, float* to) {
    in_vectors(size, [&](int64_t i, int64_t n) { store_some(to + i, load_some(from + i, n) * splat(scale), n); });
    return to;
}

}  // namespace quire
