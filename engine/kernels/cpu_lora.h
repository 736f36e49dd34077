// LoRA over a batch of many adapters, token by token: y += scale · B (A x), as engine/kernels/lora.py defines it.
//
// A token's sums have one fixed order and read nothing of other tokens: its bits do not depend on the batch.
#pragma once

#include "packed_linear.cpp"

namespace quire {

constexpr int64_t MAX_COLUMNS = 3 * 256;  // parts times the highest rank

struct Delta {            // one linear layer's place in slot 0
    const void *a, *b;    // A [parts · rank, in], B [out, rank], of the activations' type
    const float* scales;  // [parts]
    int64_t in, num_parts, ends[3];  // where each part's outputs end
};

struct Adapters {
    const int32_t* slots;  // [T], each token's slot, -1: none; null: no token uses one
    const Delta* deltas;   // [layers][4]: qkv, out, gate_up, down
    float* gate_up;        // [T, 2 I]: what is added before the activation
    int64_t rank, slot_values, slot_scales;  // the last two: from one slot to the next
};

template <class A, class B>
inline float dot(const A* a, const B* b, int64_t size) {
    vf total{};
    in_vectors(size, [&](int64_t i, int64_t n) { total += load_some(a + i, n) * load_some(b + i, n); });
    return sum(total);
}

// What the adapter of token t makes of its input x, added to y.
template <class A>
void add_delta(const Adapters& adapters, const Delta& delta, int64_t t, const A* x, float* y) {
    const int64_t slot = adapters.slots[t], rank = adapters.rank;
    if (slot < 0) return;
    const A* a = static_cast<const A*>(delta.a) + slot * adapters.slot_values;
    const A* b = static_cast<const A*>(delta.b) + slot * adapters.slot_values;
    const float* scales = delta.scales + slot * adapters.slot_scales;
    A low[MAX_COLUMNS];
    for (int64_t i = 0; i < delta.num_parts * rank; i++)
        narrow(dot(a + i * delta.in, x, delta.in) * scales[i / rank], low + i);
    for (int64_t part = 0, o = 0; part < delta.num_parts; part++)
        for (; o < delta.ends[part]; o++) y[o] += dot(b + o * rank, low + part * rank, rank);
}

// The same for all tokens, by all threads that call it with the same phase.
template <class A>
void add_deltas(Phase& phase, const Adapters& adapters, const Delta& delta, int64_t tokens, const A* x, float* y,
                int64_t y_stride) {
    phase.run(tokens, [&](int64_t t) { add_delta(adapters, delta, t, x + t * delta.in, y + t * y_stride); });
}

}  // namespace quire
