// The whole decoder of the Llama-like families as one call: embedding, layers, and the logits of chosen rows.
//
// At a few million parameters a step is shorter than the dispatch of its operations one by one; here the threads of a
// team walk through all layers, phase by phase. Same arithmetic as engine/models/decoder.py,
// which is its oracle: the residual is float32, inputs of the products are of the activation type A (float32 or
// bfloat16), K and V of the cache's type C (A, or quantized).
#include <cmath>

#include "cpu_lora.h"
#include "cpu_sampler.cpp"
#include "cpu_team.h"

#include "../attention/cpu_paged.cpp"

namespace quire {

constexpr int64_t ROWS = 8;  // tokens of a task that works token by token

struct Layer {
    const float *input_norm, *post_norm;  // [hidden]
    const float *q_norm, *k_norm;         // [D] or null
    Packed qkv, out, gate_up, down;       // gate_up is packed with gates and values alternating by half panels
    Caches caches;
    int64_t window;  // 0: unlimited
};

struct Model {
    const Layer* layers;
    const void* embedding;  // [V, hidden], or null: the packed lm_head is the embedding
    Packed lm_head;
    const float* norm;    // [hidden]
    const float* rotary;  // [positions, D]: cosines, then sines
    int64_t num_layers, hidden, inner, num_heads, num_kv_heads, head_size;
    int64_t narrow;  // activations, unquantized caches and a plain embedding are bfloat16
    float eps, scale;
};

struct Step {
    const int32_t* token_ids;  // [T]
    const int64_t* positions;  // [T]
    int64_t num_tokens, num_threads;
    Paging paging;
    float* x;    // [T, hidden]: the residual, and the result
    float* qkv;  // [T, (H + 2 K) D]
    void* h;     // [T, hidden] of A
    void* wide;  // [T, max(inner, H D)] of A
    Adapters adapters;
};

template <class A, class O>
void rms_norm(const A* x, const float* weight, float eps, int64_t size, O* out) {
    vf squares{};
    in_vectors(size, [&](int64_t i, int64_t n) {
        const vf v = load_some(x + i, n);
        squares += v * v;
    });
    const vf factor = splat(1.0f / std::sqrt(sum(squares) / float(size) + eps));
    in_vectors(size, [&](int64_t i, int64_t n) {
        store_some(out + i, load_some(x + i, n) * factor * load_some(weight + i, n), n);
    });
}

// Value d of the head pairs with d + D/2; table: D/2 cosines, D/2 sines.
inline void rotate(float* head, const float* table, int64_t size) {
    const int64_t half = size / 2;
    in_vectors(half, [&](int64_t i, int64_t n) {
        const vf a = load_some(head + i, n), b = load_some(head + half + i, n);
        const vf cosine = load_some(table + i, n), sine = load_some(table + half + i, n);
        store_some(head + i, a * cosine - b * sine, n);
        store_some(head + half + i, b * cosine + a * sine, n);
    });
}

template <class A>
void embed(const Model& m, int64_t id, float* x) {
    if (m.embedding) {
        const A* row = static_cast<const A*>(m.embedding) + id * m.hidden;
        in_vectors(m.hidden, [&](int64_t i, int64_t n) { store_some(x + i, load_some(row + i, n), n); });
        return;
    }
    for (int64_t k = 0; k < m.hidden; k++) {
        const int64_t at = packed_index(id, k, m.lm_head.in, m.lm_head.narrow);
        x[k] = m.lm_head.narrow ? widen(static_cast<const bf16*>(m.lm_head.data)[at])
                                : static_cast<const float*>(m.lm_head.data)[at];
    }
}

// Head norms and rotation of one token's q and k, in place, and its K and V into the cache.
template <class C>
void place_token(const Model& m, const Layer& layer, const Heads& heads, const Step& s, int64_t t, const Cache<C>& cache) {
    const int64_t size = m.head_size, all = m.num_heads + m.num_kv_heads;
    float* token = s.qkv + t * (all + m.num_kv_heads) * size;
    const float* table = m.rotary + s.positions[t] * size;
    for (int64_t head = 0; head < all; head++) {
        const float* norm = head < m.num_heads ? layer.q_norm : layer.k_norm;
        if (norm) rms_norm(token + head * size, norm, m.eps, size, token + head * size);
        rotate(token + head * size, table, size);
    }
    store_token(token + m.num_heads * size, token + all * size, cache, s.paging.slots[t], heads, s.paging.block_size);
}

// One layer, by all threads that call it with the same phases. A: activations' type, and an unquantized cache's.
template <class A>
void run_layer(const Model& m, const Layer& layer, const Step& s, const std::vector<QueryTile>& tiles, const Delta* deltas,
               Phase* phase) {
    const int64_t T = s.num_tokens, hidden = m.hidden;
    const int64_t q_width = m.num_heads * m.head_size, qkv_width = q_width + 2 * m.num_kv_heads * m.head_size;
    const Heads heads{m.num_heads, m.num_kv_heads, m.head_size, m.scale, layer.window};
    A *h = static_cast<A*>(s.h), *wide = static_cast<A*>(s.wide);

    phase[0].run_chunks(T, ROWS, [&](int64_t t, int64_t end) {
        for (; t < end; t++) rms_norm(s.x + t * hidden, layer.input_norm, m.eps, hidden, h + t * hidden);
    });
    linear(phase[1], layer.qkv, h, hidden, T, s.qkv, qkv_width, STORE);
    if (deltas) add_deltas(phase[8], s.adapters, deltas[0], T, h, s.qkv, qkv_width);
    with_cache<A>(layer.caches, [&](auto cache) {
        phase[2].run_chunks(T, ROWS, [&](int64_t t, int64_t end) {
            for (; t < end; t++) place_token(m, layer, heads, s, t, cache);
        });
        attention(phase[3], tiles, s.paging, heads, s.qkv, qkv_width, cache, wide, q_width);
    });
    linear(phase[4], layer.out, wide, q_width, T, s.x, hidden, ADD);
    if (deltas) add_deltas(phase[9], s.adapters, deltas[1], T, wide, s.x, hidden);
    phase[5].run_chunks(T, ROWS, [&](int64_t t, int64_t end) {
        for (; t < end; t++) rms_norm(s.x + t * hidden, layer.post_norm, m.eps, hidden, h + t * hidden);
    });
    if (deltas)
        phase[10].run(T, [&](int64_t t) {
            float* row = s.adapters.gate_up + t * 2 * m.inner;
            std::fill(row, row + 2 * m.inner, 0.0f);
            add_delta(s.adapters, deltas[2], t, h + t * hidden, row);
        });
    linear(phase[6], layer.gate_up, h, hidden, T, wide, m.inner, GATED_SILU,
           deltas ? Addend{s.adapters.gate_up, s.adapters.slots} : Addend{});
    linear(phase[7], layer.down, wide, m.inner, T, s.x, hidden, ADD);
    if (deltas) add_deltas(phase[11], s.adapters, deltas[3], T, wide, s.x, hidden);
}
constexpr int64_t PHASES = 12, DELTAS = 4;

template <class A>
void forward(const Model& m, const Step& s) {
    std::vector<QueryTile> tiles;
    list_tiles(s.paging, m.num_heads / m.num_kv_heads, tiles);
    on_team(s.num_threads, [m, s, tiles = std::move(tiles), layers = std::vector<Layer>(m.layers, m.layers + m.num_layers),
                            phases = std::vector<Phase>(1 + PHASES * m.num_layers)]() mutable {
        phases[0].run_chunks(s.num_tokens, ROWS, [&](int64_t t, int64_t end) {
            for (; t < end; t++) embed<A>(m, s.token_ids[t], s.x + t * m.hidden);
        });
        for (int64_t i = 0; i < m.num_layers; i++)
            run_layer<A>(m, layers[i], s, tiles, s.adapters.slots ? s.adapters.deltas + DELTAS * i : nullptr,
                         &phases[1 + PHASES * i]);
    });
}

template <class A>
void logits(const Model& m, const float* x, A* h, float* out, int64_t rows, int64_t num_threads) {
    on_team(num_threads, [=, phases = std::vector<Phase>(2)]() mutable {
        phases[0].run_chunks(rows, ROWS, [&](int64_t r, int64_t end) {
            for (; r < end; r++) rms_norm(x + r * m.hidden, m.norm, m.eps, m.hidden, h + r * m.hidden);
        });
        linear(phases[1], m.lm_head, h, m.hidden, rows, out, m.lm_head.out, STORE);
    });
}

}  // namespace quire

extern "C" {

// Hidden states [T, hidden] of a step, before the final norm, into step->x; K and V into the caches.
void quire_forward(const quire::Model* model, const quire::Step* step) {
    if (model->narrow)
        quire::forward<quire::bf16>(*model, *step);
    else
        quire::forward<float>(*model, *step);
}

// out [rows, V] of hidden states x [rows, hidden]; h is scratch of [rows, hidden] activations.
void quire_logits(const quire::Model* model, const float* x, void* h, float* out, int64_t rows, int64_t num_threads) {
    if (model->narrow)
        quire::logits(*model, x, static_cast<quire::bf16*>(h), out, rows, num_threads);
    else
        quire::logits(*model, x, static_cast<float*>(h), out, rows, num_threads);
}
}
