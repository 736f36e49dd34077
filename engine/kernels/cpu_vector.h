// Vectors of floats for the CPU kernels: GCC vector extensions, as wide as the target's registers, so that one source
// serves AVX-512, AVX2, SSE and NEON. bfloat16 is a storage type that is widened on load.
//
// Sums run in an order that only the values' own row decides (never the batch), and nothing here may be compiled with
// -ffast-math: the engine's bitwise guarantees rest on that.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#define QUIRE_LANES 16
#elif defined(__AVX__)
#define QUIRE_LANES 8
#else
#define QUIRE_LANES 4
#endif
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace quire {

constexpr int VL = QUIRE_LANES;  // floats in a vector
typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));
typedef float vf_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(VL * 2), aligned(2), may_alias));

struct bf16 {
    uint16_t bits;
};

inline vf splat(float x) { return x - vf{}; }

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, bf16* out) {  // to nearest even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    out->bits = x != x ? uint16_t(0x7FC0) : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
inline vf load(const bf16* p) {
    return (vf)(__builtin_convertvector(*reinterpret_cast<const vh_any*>(p), vu) << 16);
}
inline void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }
inline void store(bf16* p, vf x) {
    const vu bits = (vu)x;
    const vu rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const vu kept = x != x ? (vu{} + 0x7FC0) : rounded;
    *reinterpret_cast<vh_any*>(p) = __builtin_convertvector(kept, vh);
}

// The first n < VL values, the other lanes zero.
template <class T>
inline vf load_part(const T* p, int64_t n) {
    float lanes[VL] = {};
    for (int64_t i = 0; i < n; i++) lanes[i] = widen(p[i]);
    return load(lanes);
}
template <class T>
inline void store_part(T* p, vf x, int64_t n) {
    float lanes[VL];
    store(lanes, x);
    for (int64_t i = 0; i < n; i++) narrow(lanes[i], p + i);
}

// Applies f(offset, count) to [0, n) in whole vectors and one part; count == VL but for the last.
template <class F>
inline void in_vectors(int64_t n, F f) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) f(i, int64_t(VL));
    if (i < n) f(i, n - i);
}
template <class T>
inline vf load_some(const T* p, int64_t n) { return n == VL ? load(p) : load_part(p, n); }
template <class T>
inline void store_some(T* p, vf x, int64_t n) { n == VL ? store(p, x) : store_part(p, x, n); }

#if QUIRE_LANES == 16
constexpr vi LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr vi INTERLEAVE_LOW = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
#elif QUIRE_LANES == 8
constexpr vi LANE = {0, 1, 2, 3, 4, 5, 6, 7};
constexpr vi INTERLEAVE_LOW = {0, 8, 1, 9, 2, 10, 3, 11};
#else
constexpr vi LANE = {0, 1, 2, 3};
constexpr vi INTERLEAVE_LOW = {0, 4, 1, 5};
#endif
constexpr vi INTERLEAVE_HIGH = INTERLEAVE_LOW + VL / 2;

// Calls f(0) … f(N - 1) with numbers that are constants, so that arrays they index stay in registers.
template <class F, int... I>
inline __attribute__((always_inline)) void each_of(F f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
inline __attribute__((always_inline)) void each(F f) {
    each_of(f, std::make_integer_sequence<int, N>{});
}

// Lane j of the result is the sum over the lanes of x[j], for VL vectors at once; x is overwritten.
template <int HALF = VL / 2>
inline __attribute__((always_inline)) vf sum_each(vf (&x)[VL]) {
    each<HALF>([&](auto i) __attribute__((always_inline)) {
        x[i] = __builtin_shuffle(x[i], x[i + HALF], INTERLEAVE_LOW) + __builtin_shuffle(x[i], x[i + HALF], INTERLEAVE_HIGH);
    });
    if constexpr (HALF > 1)
        return sum_each<HALF / 2>(x);
    else
        return x[0];
}

inline float sum(vf x) {
#pragma GCC unroll 4
    for (int half = VL / 2; half >= 1; half /= 2) x += __builtin_shuffle(x, LANE ^ half);
    return x[0];
}

inline float largest(vf x) {
#pragma GCC unroll 4
    for (int half = VL / 2; half >= 1; half /= 2) {
        const vf other = __builtin_shuffle(x, LANE ^ half);
        x = other > x ? other : x;
    }
    return x[0];
}

// e^x, within 2 units in the last place; 0 below -87.3 (so for -infinity), NaN for NaN.
inline vf exp(vf x) {
    const vf low = splat(-87.33654f), high = splat(88.37626f);
    vf y = x > low ? x : low;
    y = y < high ? y : high;
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const vf shifted = y * splat(1.44269504f) + magic;
    const vf n = shifted - magic;
    const vf r = (y - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
    vf p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    const vi power = ((vi)shifted - (vi)magic + 127) << 23;
    const vf out = p * (vf)power;
    return x != x ? x : (x < low ? vf{} : out);
}

}  // namespace quire
