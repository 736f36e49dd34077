// Matrix product with a weight packed once: y[M, N] = x[M, K] · Wᵀ (+ bias), W [N, K].
//
// Packing: panels of NR outputs; within a panel the NR values of each k lie side by side. float32 panels are
// [K][NR]; bfloat16 panels are [K / 2][NR][2], the layout of the CPU's bf16 dot product, which also widens with one
// operation a vector. K must be even for bfloat16. Outputs past N are zero columns.
//
// Each output sums over k in ascending order, whatever M is and whoever shares the batch: results are bitwise
// independent of the batch. Threads take panels and row tiles, never parts of k.
#include <algorithm>
#include <type_traits>

#include "cpu_team.h"
#include "cpu_vector.h"

namespace quire {

constexpr int NV = QUIRE_LANES == 16 ? 4 : 2;  // vectors of a panel; NV * MR accumulators fill the register file
constexpr int MR = QUIRE_LANES == 16 ? 6 : 4;
constexpr int NR = NV * VL;
constexpr int64_t ROW_TILE = 48;  // rows whose inputs stay in the L2 cache while the panels stream by

enum Epilogue : int64_t { STORE = 0, ADD = 1, GATED_SILU = 2 };

struct Packed {
    const void* data;
    const float* bias;  // [N] or null; laid out as the outputs are packed
    int64_t in, out;    // K and N
    int64_t narrow;     // 1: bfloat16 panels
};

// What is added to the outputs of some rows before GATED_SILU.
struct Addend {
    const float* values;   // [M, N]: for gates, then for what they gate; null: nothing
    const int32_t* slots;  // [M]: rows below zero get nothing
};

inline int64_t num_panels(const Packed& w) { return (w.out + NR - 1) / NR; }

// Products of R rows with one panel of float32 values.
template <int R, class A>
inline void multiply(const A* x, int64_t stride, const float* w, int64_t in, vf (&sums)[R][NV]) {
    for (int64_t k = 0; k < in; k++, w += NR) {
        vf b[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) b[j] = load(w + j * VL);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const vf a = splat(widen(x[r * stride + k]));
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) sums[r][j] += a * b[j];
        }
    }
}

// The same with a bfloat16 panel, widened: bitwise what a float32 panel of the same values gives.
template <int R, class A>
inline void multiply(const A* x, int64_t stride, const bf16* w, int64_t in, vf (&sums)[R][NV]) {
    for (int64_t k = 0; k < in; k += 2, w += 2 * NR) {
        vf even[NV], odd[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) {
            const vu pair = *reinterpret_cast<const vu_any*>(w + 2 * j * VL);
            even[j] = (vf)(pair << 16);
            odd[j] = (vf)(pair & 0xFFFF0000u);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const vf a = splat(widen(x[r * stride + k])), b = splat(widen(x[r * stride + k + 1]));
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) sums[r][j] = (sums[r][j] + a * even[j]) + b * odd[j];
        }
    }
}

#if defined(__AVX512BF16__)
// bfloat16 inputs on a CPU that multiplies them: two products an operation, summed in float32.
template <int R>
inline void multiply(const bf16* x, int64_t stride, const bf16* w, int64_t in, vf (&sums)[R][NV]) {
    for (int64_t k = 0; k < in; k += 2, w += 2 * NR) {
        __m512bh b[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) b[j] = (__m512bh)_mm512_loadu_si512(w + 2 * j * VL);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            int32_t pair;
            std::memcpy(&pair, x + r * stride + k, 4);
            const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) sums[r][j] = (vf)_mm512_dpbf16_ps((__m512)sums[r][j], a, b[j]);
        }
    }
}
#endif

template <class O>
inline void finish(const vf* sums, const float* bias, O* y, int64_t columns, Epilogue epilogue, const float* gates,
                   const float* ups) {
    if (epilogue == GATED_SILU) {  // the panel's first half are gates, its second half the values they gate
        const int64_t half = NR / 2;
        for (int j = 0; j < NV / 2; j++) {
            vf gate = sums[j], up = sums[j + NV / 2];
            if (bias) gate += load(bias + j * VL), up += load(bias + half + j * VL);
            const int64_t count = std::min<int64_t>(VL, columns / 2 - j * VL);
            if (gates && count > 0) gate += load_some(gates + j * VL, count), up += load_some(ups + j * VL, count);
            if (count > 0) store_some(y + j * VL, gate / (exp(-gate) + splat(1.0f)) * up, count);
        }
        return;
    }
    for (int j = 0; j < NV && j * VL < columns; j++) {
        const int64_t count = std::min<int64_t>(VL, columns - j * VL);
        vf value = sums[j];
        if (bias) value += load_some(bias + j * VL, count);
        if (epilogue == ADD) value += load_some(y + j * VL, count);
        store_some(y + j * VL, value, count);
    }
}

template <int R, class A, class W, class O>
void tile(const Packed& w, int64_t panel, const A* x, int64_t x_stride, O* y, int64_t y_stride, Epilogue epilogue,
          Addend addend) {
    vf sums[R][NV] = {};
    multiply<R>(x, x_stride, static_cast<const W*>(w.data) + panel * w.in * NR, w.in, sums);
    const int64_t width = epilogue == GATED_SILU ? NR / 2 : NR;
    const float* bias = w.bias ? w.bias + panel * NR : nullptr;
    for (int r = 0; r < R; r++) {
        const bool adds = addend.values && addend.slots[r] >= 0;
        const float* gates = adds ? addend.values + r * w.out + panel * width : nullptr;
        finish(sums[r], bias, y + r * y_stride + panel * width, w.out - panel * NR, epilogue, gates,
               gates ? gates + w.out / 2 : nullptr);
    }
}

template <int R, class A, class W, class O>
void some_rows(int64_t rows, const Packed& w, int64_t panel, const A* x, int64_t x_stride, O* y, int64_t y_stride,
               Epilogue epilogue, Addend addend) {
    if constexpr (R > 0) {
        if (rows == R) return tile<R, A, W, O>(w, panel, x, x_stride, y, y_stride, epilogue, addend);
        some_rows<R - 1, A, W, O>(rows, w, panel, x, x_stride, y, y_stride, epilogue, addend);
    }
}

template <class A, class W, class O>
void task_of(const Packed& w, const A* x, int64_t x_stride, int64_t rows, O* y, int64_t y_stride, Epilogue epilogue,
             int64_t task, Addend addend) {
    const int64_t panel = task % num_panels(w), first = task / num_panels(w) * ROW_TILE;
    const int64_t count = std::min(ROW_TILE, rows - first), parts = (count + MR - 1) / MR;
    for (int64_t part = 0; part < parts; part++) {
        const int64_t begin = first + count * part / parts, end = first + count * (part + 1) / parts;
        const Addend own = addend.values ? Addend{addend.values + begin * w.out, addend.slots + begin} : Addend{};
        some_rows<MR, A, W, O>(end - begin, w, panel, x + begin * x_stride, x_stride, y + begin * y_stride, y_stride,
                               epilogue, own);
    }
}

// y = x · Wᵀ, by all threads that call it with the same phase. y must not be x.
template <class A, class O>
void linear(Phase& phase, const Packed& w, const A* x, int64_t x_stride, int64_t rows, O* y, int64_t y_stride,
            Epilogue epilogue, Addend addend = {}) {
    phase.run(num_panels(w) * ((rows + ROW_TILE - 1) / ROW_TILE), [&](int64_t task) {
        if (w.narrow)
            task_of<A, bf16>(w, x, x_stride, rows, y, y_stride, epilogue, task, addend);
        else
            task_of<A, float>(w, x, x_stride, rows, y, y_stride, epilogue, task, addend);
    });
}

// Position of weight[n][k] in the packed array, in values.
inline int64_t packed_index(int64_t n, int64_t k, int64_t in, bool narrow) {
    const int64_t start = n / NR * in * NR, column = n % NR;
    return narrow ? start + k / 2 * 2 * NR + column * 2 + k % 2 : start + k * NR + column;
}

// The weight's row whose values fill column c of a panel; -1: none, past the last output. `gated`: the weight is [gates; values],
// and a panel holds gates in its first half and what they gate in its second.
inline int64_t row_of(int64_t panel, int64_t c, int64_t out, bool gated) {
    const int64_t width = gated ? NR / 2 : NR, rows = gated ? out / 2 : out;
    const int64_t row = panel * width + c % width;
    return row >= rows ? -1 : c < width ? row : rows + row;
}

// One panel of values D from a weight [out, in] of S. A few inputs of all columns at a time: the piece of the panel that they
// fill stays in the L1 cache, and each line of the weight is read once.
template <class S, class D>
void pack_panel(const S* weight, D* packed, int64_t out, int64_t in, bool gated, int64_t panel) {
    constexpr int64_t INPUTS = 64 / sizeof(S), PAIR = sizeof(D) == 2 ? 2 : 1;
    for (int64_t first = 0; first < in; first += INPUTS) {
        const int64_t end = std::min(first + INPUTS, in);
        for (int64_t c = 0; c < NR; c++) {
            const int64_t row = row_of(panel, c, out, gated);
            const S* from = weight + row * in;
            D* to = packed + packed_index(panel * NR + c, first, in, PAIR == 2);
            for (int64_t k = first; k < end; k += PAIR, to += PAIR * NR)
                for (int64_t i = 0; i < PAIR; i++) {
                    if constexpr (std::is_same_v<S, D>)
                        to[i] = row < 0 ? D{} : from[k + i];
                    else
                        narrow(row < 0 ? 0.0f : widen(from[k + i]), to + i);
                }
        }
    }
}

template <class S, class D>
void pack(const void* weight, void* packed, int64_t out, int64_t in, bool gated, int64_t num_threads) {
    on_team(num_threads, [=, phases = std::vector<Phase>(1)]() mutable {
        phases[0].run((out + NR - 1) / NR, [&](int64_t panel) {
            pack_panel(static_cast<const S*>(weight), static_cast<D*>(packed), out, in, gated, panel);
        });
    });
}

}  // namespace quire

extern "C" {

int64_t quire_panel_width() { return quire::NR; }

// weight [N, K] of float32 (weight_narrow 0) or bfloat16 -> whole panels of float32 (narrow 0) or bfloat16.
void quire_pack(const void* weight, void* packed, int64_t out, int64_t in, int64_t weight_narrow, int64_t narrow,
                int64_t gated, int64_t num_threads) {
    using quire::bf16;
    const auto pack = weight_narrow ? (narrow ? quire::pack<bf16, bf16> : quire::pack<bf16, float>)
                                    : (narrow ? quire::pack<float, bf16> : quire::pack<float, float>);
    pack(weight, packed, out, in, gated, num_threads);
}

// y [M, N] = x [M, K] · Wᵀ + bias; x and y of float32 (x_narrow 0) or bfloat16.
void quire_linear(const quire::Packed* w, const void* x, void* y, int64_t rows, int64_t x_narrow, int64_t y_stride,
                  int64_t num_threads) {
    using namespace quire;
    on_team(num_threads, [=, w = *w, phases = std::vector<Phase>(1)]() mutable {
        if (x_narrow)
            linear(phases[0], w, static_cast<const bf16*>(x), w.in, rows, static_cast<bf16*>(y), y_stride, STORE);
        else
            linear(phases[0], w, static_cast<const float*>(x), w.in, rows, static_cast<float*>(y), y_stride, STORE);
    });
}
}
