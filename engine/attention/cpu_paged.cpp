// Paged attention on a CPU: KV store and causal attention over a block table, for prefill, decode and mixed steps.
//
// Cache layout: [num_blocks, K, block_size, D], one head's block contiguous. Values are float32 or bfloat16; sums are
// float32. A task is one tile of a row's queries and one KV head: its K and V are read once for the whole group of
// query heads. Keys are walked in tiles of TILE positions anchored at position 0 with an online softmax, and every query
// keeps its own state; so a query's result depends on its position and the cached values alone: not on the batch, the
// chunking, the block size, the number of threads, or on being computed as prefill or decode.
#include <algorithm>
#include <vector>

#include "../kernels/cpu_team.h"
#include "../kernels/cpu_vector.h"

namespace quire {

constexpr int TILE = 32;         // keys of a tile: K and V of D = 64 in float32 are 16 KiB, half of an L1 cache
constexpr int QUERY_ROWS = 16;   // queries times heads of a task, about
constexpr float LOWEST = -1e30f;  // below any score; finite, so that a difference of two is never NaN

struct Paging {
    const int32_t* query_start;   // [S + 1]
    const int32_t* seq_lens;      // [S]
    const int32_t* block_tables;  // [S, max_blocks]
    const int64_t* slots;         // [T]
    int64_t num_rows, max_blocks;
    int64_t block_size;  // a power of two
};

struct Heads {
    int64_t query, kv, size;  // H, K, D
    float scale;
    int64_t window;  // 0: unlimited
};

struct QueryTile {
    int32_t row, begin, end;  // tokens begin … end - 1 of the row's share of the step
};

// All tiles, those of prefill rows (the largest tasks) first.
inline void list_tiles(const Paging& p, int64_t group, std::vector<QueryTile>& tiles) {
    const int32_t step = int32_t(std::max<int64_t>(1, QUERY_ROWS / group));
    tiles.clear();
    for (int32_t row = int32_t(p.num_rows) - 1; row >= 0; row--) {
        const int32_t tokens = p.query_start[row + 1] - p.query_start[row];
        for (int32_t end = tokens; end > 0; end -= std::min(step, end))
            tiles.push_back({row, std::max(0, end - step), end});
    }
}

template <class T, class C>
inline void store_token(const T* k, const T* v, C* k_cache, C* v_cache, int64_t slot, const Heads& h, int64_t block_size) {
    const int64_t block = slot / block_size, offset = slot % block_size;
    for (int64_t head = 0; head < h.kv; head++) {
        const int64_t at = ((block * h.kv + head) * block_size + offset) * h.size;
        in_vectors(h.size, [&](int64_t i, int64_t n) {
            store_some(k_cache + at + i, load_some(k + head * h.size + i, n), n);
            store_some(v_cache + at + i, load_some(v + head * h.size + i, n), n);
        });
    }
}

// Scores of one query with VL keys of N vectors.
template <int N, class C>
inline vf score_vectors(const float* q, const C* const* keys) {
    vf sums[VL];
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) {
        const vf a = load(q + i * VL);
#pragma GCC unroll 16
        for (int j = 0; j < VL; j++) sums[j] = (i ? sums[j] : vf{}) + a * load(keys[j] + i * VL);
    }
    return sum_each(sums);
}

// The same for any head size; q is padded with zeros to whole vectors.
template <class C>
inline vf score(const float* q, const C* const* keys, int64_t size) {
    if (size == 4 * VL) return score_vectors<4>(q, keys);
    if (size == 8 * VL) return score_vectors<8>(q, keys);
    vf sums[VL] = {};
    in_vectors(size, [&](int64_t i, int64_t n) {
        const vf a = load(q + i);
        for (int j = 0; j < VL; j++) sums[j] += a * load_some(keys[j] + i, n);
    });
    return sum_each(sums);
}

#if defined(__AVX512BF16__)
constexpr bool MULTIPLIES_BF16 = true;
inline vf score(const bf16* q, const bf16* const* keys, int64_t size) {  // size is a multiple of 32
    vf sums[VL] = {};
    for (int64_t i = 0; i < size; i += 32) {
        const __m512bh a = (__m512bh)_mm512_loadu_si512(q + i);
#pragma GCC unroll 16
        for (int j = 0; j < VL; j++)
            sums[j] = (vf)_mm512_dpbf16_ps((__m512)sums[j], a, (__m512bh)_mm512_loadu_si512(keys[j] + i));
    }
    return sum_each(sums);
}
#else
constexpr bool MULTIPLIES_BF16 = false;
#endif

// out[0 … N vectors) = out * decay + Σ_j weight[j] * value[j]; even and odd positions in sums of their own, which
// halves the chain of dependent additions.
template <int N, class C>
inline void weighted(const float* weight, const C* const* values, int64_t begin, int64_t end, int64_t at, float decay,
                     float* out) {
    vf even[N], odd[N] = {};
#pragma GCC unroll 4
    for (int c = 0; c < N; c++) even[c] = load(out + at + c * VL) * splat(decay);
    int64_t j = begin;
    for (; j + 2 <= end; j += 2) {
        const vf a = splat(weight[j]), b = splat(weight[j + 1]);
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) {
            even[c] += a * load(values[j] + at + c * VL);
            odd[c] += b * load(values[j + 1] + at + c * VL);
        }
    }
    if (j < end)
        for (int c = 0; c < N; c++) even[c] += splat(weight[j]) * load(values[j] + at + c * VL);
#pragma GCC unroll 4
    for (int c = 0; c < N; c++) store(out + at + c * VL, even[c] + odd[c]);
}

template <class C>
inline void accumulate(const float* weight, const C* const* values, int64_t begin, int64_t end, int64_t size, float decay,
                       float* out) {
    int64_t at = 0;
    for (; at + 4 * VL <= size; at += 4 * VL) weighted<4>(weight, values, begin, end, at, decay, out);
    for (; at + VL <= size; at += VL) weighted<1>(weight, values, begin, end, at, decay, out);
    for (; at < size; at++) {  // a head size that is no multiple of the vector
        float sum = out[at] * decay;
        for (int64_t j = begin; j < end; j++) sum += weight[j] * widen(values[j][at]);
        out[at] = sum;
    }
}

// One query head's running softmax over the keys seen so far.
struct State {
    float peak;  // largest score
    vf total;    // Σ exp(score - peak), by lane
};

template <class Q, class C>
inline void see_tile(const Q* q, const C* const* keys, const C* const* values, int64_t begin, int64_t end, const Heads& h,
                     State& state, float* out) {
    float scores[TILE];
    vf best = splat(LOWEST);
    const int64_t first = begin / VL * VL;
    for (int64_t g = first; g < end; g += VL) {
        vf s = score(q, keys + g, h.size) * splat(h.scale);
        if (g < begin || g + VL > end) {
            float lanes[VL];
            store(lanes, s);
            for (int64_t j = 0; j < VL; j++)
                if (g + j < begin || g + j >= end) lanes[j] = -__builtin_inff();
            s = load(lanes);
        }
        best = s > best ? s : best;
        store(scores + g, s);
    }
    const float peak = std::max(state.peak, largest(best));
    const float decay = exp(splat(state.peak - peak))[0];
    vf total = state.total * splat(decay);
    for (int64_t g = first; g < end; g += VL) {
        const vf e = exp(load(scores + g) - splat(peak));
        store(scores + g, e);
        total += e;
    }
    state = {peak, total};
    accumulate(scores, values, begin, end, h.size, decay, out);
}

// A thread's working memory, kept between tasks.
template <class Q>
struct Work {
    std::vector<Q> queries;   // [rows, width]
    std::vector<float> sums;  // [rows, width]
    std::vector<State> states;
};

// Attention of one tile of queries over one KV head, with queries of type S in the scores. q and out are [T, …] with the
// given strides of a token.
template <class S, class Q, class C, class O>
void attend_as(const QueryTile& tile, int64_t kv_head, const Paging& p, const Heads& h, const Q* q, int64_t q_stride,
               const C* k_cache, const C* v_cache, O* out, int64_t out_stride) {
    const int64_t group = h.query / h.kv, rows = (tile.end - tile.begin) * group;
    const int64_t width = (h.size + VL - 1) / VL * VL;
    thread_local Work<S> work;
    work.queries.assign(rows * width, S{});
    work.sums.assign(rows * width, 0.0f);
    work.states.assign(rows, State{LOWEST, vf{}});

    const int64_t first_token = p.query_start[tile.row] + tile.begin;
    for (int64_t r = 0; r < rows; r++) {
        const Q* from = q + (first_token + r / group) * q_stride + (kv_head * group + r % group) * h.size;
        for (int64_t i = 0; i < h.size; i++) narrow(widen(from[i]), &work.queries[r * width + i]);
    }

    const int64_t row_tokens = p.query_start[tile.row + 1] - p.query_start[tile.row];
    const int64_t first_position = p.seq_lens[tile.row] - row_tokens + tile.begin;
    const int64_t num_keys = first_position + (tile.end - tile.begin);
    const int64_t oldest = h.window ? std::max<int64_t>(0, first_position - h.window + 1) : 0;
    const int32_t* table = p.block_tables + tile.row * p.max_blocks;
    const int block_bits = __builtin_ctzll(p.block_size);
    for (int64_t start = oldest / TILE * TILE; start < num_keys; start += TILE) {
        const C *keys[TILE], *values[TILE];
        // Outside the visible range: any valid key, its score is masked.
        for (int64_t j = 0; j < TILE;) {
            const int64_t at = std::min(std::max(start + j, oldest), num_keys - 1), offset = at & (p.block_size - 1);
            const int64_t run = start + j == at ? std::min({p.block_size - offset, num_keys - at, TILE - j}) : 1;
            const int64_t head = int64_t(table[at >> block_bits]) * h.kv + kv_head;
            const C *key = k_cache + (head * p.block_size + offset) * h.size, *value = v_cache + (key - k_cache);
            for (const int64_t end = j + run; j < end; j++, key += h.size, value += h.size) keys[j] = key, values[j] = value;
        }
        for (int64_t r = 0; r < rows; r++) {
            const int64_t position = first_position + r / group;
            const int64_t begin = h.window ? std::max<int64_t>(0, position - h.window + 1 - start) : 0;
            const int64_t end = std::min<int64_t>(TILE, position + 1 - start);
            if (begin < end)
                see_tile(&work.queries[r * width], keys, values, begin, end, h, work.states[r], &work.sums[r * width]);
        }
    }

    for (int64_t r = 0; r < rows; r++) {
        const float share = 1.0f / sum(work.states[r].total);
        O* to = out + (first_token + r / group) * out_stride + (kv_head * group + r % group) * h.size;
        in_vectors(h.size, [&](int64_t i, int64_t n) {
            store_some(to + i, load(&work.sums[r * width + i]) * splat(share), n);
        });
    }
}

template <class Q, class C, class O>
void attend(const QueryTile& tile, int64_t kv_head, const Paging& p, const Heads& h, const Q* q, int64_t q_stride,
            const C* k_cache, const C* v_cache, O* out, int64_t out_stride) {
    if constexpr (MULTIPLIES_BF16 && sizeof(C) == 2)
        if (h.size % 32 == 0)
            return attend_as<bf16>(tile, kv_head, p, h, q, q_stride, k_cache, v_cache, out, out_stride);
    attend_as<float>(tile, kv_head, p, h, q, q_stride, k_cache, v_cache, out, out_stride);
}

// A step's attention, by all threads that call it with the same phase.
template <class Q, class C, class O>
void attention(Phase& phase, const std::vector<QueryTile>& tiles, const Paging& p, const Heads& h, const Q* q,
               int64_t q_stride, const C* k_cache, const C* v_cache, O* out, int64_t out_stride) {
    phase.run(int64_t(tiles.size()) * h.kv, [&](int64_t task) {
        attend(tiles[task / h.kv], task % h.kv, p, h, q, q_stride, k_cache, v_cache, out, out_stride);
    });
}

template <class T>
void store_all(const T* k, const T* v, int64_t stride, T* k_cache, T* v_cache, const int64_t* slots, int64_t tokens,
               const Heads& h, int64_t block_size) {
    for (int64_t t = 0; t < tokens; t++)
        store_token(k + t * stride, v + t * stride, k_cache, v_cache, slots[t], h, block_size);
}

template <class T>
void attention_all(const Paging& p, const Heads& h, const T* q, int64_t q_stride, const T* k_cache, const T* v_cache, T* out,
                   int64_t num_threads) {
    std::vector<QueryTile> tiles;
    list_tiles(p, h.query / h.kv, tiles);
    on_team(num_threads, [=, tiles = std::move(tiles), phases = std::vector<Phase>(1)]() mutable {
        attention(phases[0], tiles, p, h, q, q_stride, k_cache, v_cache, out, h.query * h.size);
    });
}

}  // namespace quire

extern "C" {

void quire_store_kv(const void* k, const void* v, int64_t stride, void* k_cache, void* v_cache, const int64_t* slots,
                    int64_t tokens, const quire::Heads* h, int64_t block_size, int64_t narrow) {
    using quire::bf16;
    if (narrow)
        quire::store_all((const bf16*)k, (const bf16*)v, stride, (bf16*)k_cache, (bf16*)v_cache, slots, tokens, *h,
                         block_size);
    else
        quire::store_all((const float*)k, (const float*)v, stride, (float*)k_cache, (float*)v_cache, slots, tokens, *h,
                         block_size);
}

void quire_attention(const quire::Paging* p, const quire::Heads* h, const void* q, int64_t q_stride, const void* k_cache,
                     const void* v_cache, void* out, int64_t narrow, int64_t num_threads) {
    using quire::bf16;
    if (narrow)
        quire::attention_all(*p, *h, (const bf16*)q, q_stride, (const bf16*)k_cache, (const bf16*)v_cache, (bf16*)out,
                             num_threads);
    else
        quire::attention_all(*p, *h, (const float*)q, q_stride, (const float*)k_cache, (const float*)v_cache, (float*)out,
                             num_threads);
}
}
