// Paged attention on a CPU: KV store and causal attention over a block table, for prefill, decode and mixed steps.
//
// Cache layout: [num_blocks, K, block_size, D], one head's block contiguous. Values are float32, bfloat16, or quantized
// (cpu_cache.h), which is widened tile by tile to float32; sums are float32. A task is one tile of a row's queries and one KV head: its K and V are read once for the whole group of
// query heads. Keys are walked in tiles of TILE positions anchored at position 0 with an online softmax, and every query
// keeps its own state; so a query's result depends on its position and the cached values alone: not on the batch, the
// chunking, the block size, the number of threads, or on being computed as prefill or decode.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "../kernels/cpu_team.h"
#include "../kernels/cpu_vector.h"
#include "cpu_cache.h"

namespace quire {

constexpr int TILE = 32;         // keys of a tile: K and V of D = 64 in float32 are 16 KiB, half of an L1 cache
constexpr int QUERY_ROWS = 16;   // queries times heads of a task, about
constexpr int MAX_QUERIES = 4;    // that share a read of K and V; their sums fill half of the registers
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
inline void store_token(const T* k, const T* v, const Cache<C>& cache, int64_t slot, const Heads& h, int64_t block_size) {
    const int64_t block = slot / block_size, offset = slot % block_size;
    for (int64_t head = 0; head < h.kv; head++) {
        const int64_t at = (block * h.kv + head) * block_size + offset;
        store_head(k + head * h.size, cache.k, cache.k_scale, head, at, h.size);
        store_head(v + head * h.size, cache.v, cache.v_scale, head, at, h.size);
    }
}

// 2 VL values of a key or a value row in two vectors. Of bfloat16 these are the even and the odd ones, which widen with
// one operation each; queries and sums that meet them are split alike.
constexpr int CHUNK = 2 * VL;

inline void load_chunk(const float* p, vf& a, vf& b) { a = load(p), b = load(p + VL); }
inline void load_chunk(const bf16* p, vf& a, vf& b) {
    const vu pairs = *reinterpret_cast<const vu_any*>(p);
    a = (vf)(pairs << 16), b = (vf)(pairs & 0xFFFF0000u);
}

// Whether queries in the scores' type S and sums meet split chunks of a cache of C.
template <class S, class C>
constexpr bool SPLITS = sizeof(S) == 4 && sizeof(C) == 2;

inline void split_chunks(float* p, int64_t size) {
    for (int64_t i = 0; i + CHUNK <= size; i += CHUNK) {
        const vf a = load(p + i), b = load(p + i + VL);
        store(p + i, __builtin_shuffle(a, b, 2 * LANE));
        store(p + i + VL, __builtin_shuffle(a, b, 2 * LANE + 1));
    }
}

inline void join_chunks(float* p, int64_t size) {
    for (int64_t i = 0; i + CHUNK <= size; i += CHUNK) {
        const vf even = load(p + i), odd = load(p + i + VL);
        store(p + i, __builtin_shuffle(even, odd, INTERLEAVE_LOW));
        store(p + i + VL, __builtin_shuffle(even, odd, INTERLEAVE_HIGH));
    }
}

template <class C>
inline void prefetch_chunk(const C* p) {
    for (int64_t i = 0; i < CHUNK; i += 64 / int64_t(sizeof(C))) __builtin_prefetch(p + i);
}

template <class S, class C>
struct KeyChunk {
    vf a, b;
    explicit KeyChunk(const C* key) { load_chunk(key, a, b); }
    void add_product(const S* q, vf& sum) const { sum = (sum + load(q) * a) + load(q + VL) * b; }
};

#if defined(__AVX512BF16__)
constexpr bool MULTIPLIES_BF16 = true;
template <>
struct KeyChunk<bf16, bf16> {
    __m512bh key;
    explicit KeyChunk(const bf16* from) : key((__m512bh)_mm512_loadu_si512(from)) {}
    void add_product(const bf16* q, vf& sum) const {
        sum = (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(q), key);
    }
};
#else
constexpr bool MULTIPLIES_BF16 = false;
#endif

// Of the values that fill no chunk.
template <class S, class C>
inline float rest_product(const S* q, const C* key, int64_t size) {
    vf products{};
    in_vectors(size, [&](int64_t i, int64_t n) { products += load(q + i) * load_some(key + i, n); });
    return sum(products);
}

// Scores of Q queries with VL / Q keys each: every key is read once for all of them. Queries are padded with zeros to
// whole vectors; query r's scores go to scores[r * TILE]. `next`: keys to ask the memory for meanwhile, or null.
template <int Q, class S, class C>
inline void score_some(const S* q, int64_t width, const C* const* keys, const C* const* next, int64_t size, float scale,
                       float* scores) {
    constexpr int KEYS = VL / Q;
    vf sums[VL];
    each<VL>([&](auto i) __attribute__((always_inline)) { sums[i] = vf{}; });
    int64_t i = 0;
    for (; i + CHUNK <= size; i += CHUNK)
        each<KEYS>([&](auto j) __attribute__((always_inline)) {
            const KeyChunk<S, C> key(keys[j] + i);
            if (next) prefetch_chunk(next[j] + i);
            each<Q>([&](auto r) __attribute__((always_inline)) { key.add_product(q + r * width + i, sums[r * KEYS + j]); });
        });
    float lanes[VL];
    store(lanes, sum_each(sums));
    if (i < size)
        for (int r = 0; r < Q; r++)
            for (int j = 0; j < KEYS; j++) lanes[r * KEYS + j] += rest_product(q + r * width + i, keys[j] + i, size - i);
    store(lanes, load(lanes) * splat(scale));
#pragma GCC unroll 4
    for (int r = 0; r < Q; r++) std::memcpy(scores + r * TILE, lanes + r * KEYS, KEYS * sizeof(float));
}

// out[r] = out[r] * decay[r] + Σ_j weights[r][j] * value[j] for Q queries and N vectors of their D values. `next` as above.
template <int Q, int N, class C>
inline void weigh_some(const float* weights, const C* const* values, const C* const* next, int64_t begin, int64_t end,
                       int64_t at, const float* decay, float* out, int64_t width) {
    vf sums[Q][N];
#pragma GCC unroll 4
    for (int r = 0; r < Q; r++)
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) sums[r][c] = load(out + r * width + at + c * VL) * splat(decay[r]);
    for (int64_t j = begin; j < end; j++) {
        vf value[N];
        if constexpr (N == 1)
            value[0] = load(values[j] + at);
        else
#pragma GCC unroll 2
            for (int c = 0; c < N; c += 2) {
                load_chunk(values[j] + at + c * VL, value[c], value[c + 1]);
                if (next) prefetch_chunk(next[j] + at + c * VL);
            }
#pragma GCC unroll 4
        for (int r = 0; r < Q; r++) {
            const vf weight = splat(weights[r * TILE + j]);
#pragma GCC unroll 4
            for (int c = 0; c < N; c++) sums[r][c] += weight * value[c];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Q; r++)
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) store(out + r * width + at + c * VL, sums[r][c]);
}

template <int Q, class C>
inline void weigh(const float* weights, const C* const* values, const C* const* next, int64_t begin, int64_t end,
                  int64_t size, const float* decay, float* out, int64_t width) {
    int64_t at = 0;
    for (; at + 2 * CHUNK <= size; at += 2 * CHUNK)
        weigh_some<Q, 4>(weights, values, next, begin, end, at, decay, out, width);
    for (; at + CHUNK <= size; at += CHUNK) weigh_some<Q, 2>(weights, values, next, begin, end, at, decay, out, width);
    for (; at + VL <= size; at += VL) weigh_some<Q, 1>(weights, values, next, begin, end, at, decay, out, width);
    for (; at < size; at++)  // a head size that is no multiple of the vector
        for (int r = 0; r < Q; r++) {
            float sum = out[r * width + at] * decay[r];
            for (int64_t j = begin; j < end; j++) sum += weights[r * TILE + j] * widen(values[j][at]);
            out[r * width + at] = sum;
        }
}

// One query head's running softmax over the keys seen so far.
struct State {
    float peak;  // largest score
    vf total;    // Σ exp(score - peak), by lane
};

struct Range {
    int64_t begin, end;  // keys of a tile that a query sees; none where begin >= end
};

// Scores into weights, those out of sight into 0; what the sums so far are to be multiplied with.
inline float soften(float* scores, Range all, Range seen, State& state) {
    vf best = splat(LOWEST);
    for (int64_t g = all.begin; g < all.end; g += VL) {
        vf s = load(scores + g);
        if (g < seen.begin || g + VL > seen.end) {
            const vi at = LANE + int32_t(g);
            s = (at >= int32_t(seen.begin)) & (at < int32_t(seen.end)) ? s : splat(-__builtin_inff());
            store(scores + g, s);
        }
        best = s > best ? s : best;
    }
    const float peak = std::max(state.peak, largest(best));
    const float decay = exp(splat(state.peak - peak))[0];
    vf total = state.total * splat(decay);
    for (int64_t g = all.begin; g < all.end; g += VL) {
        const vf e = exp(load(scores + g) - splat(peak));
        store(scores + g, e);
        total += e;
    }
    state = {peak, total};
    return decay;
}

// Where the keys and values of a tile lie, and which scales are theirs.
template <class C>
struct KeyTile {
    const C *keys[TILE], *values[TILE];
    int64_t scales[TILE];  // of a quantized cache
};

// A tile of a quantized cache widened to `values` [2, TILE, size]; meanwhile the memory is asked for `next`.
template <class C>
inline void widen_tile(const KeyTile<C>& tile, const KeyTile<C>* next, const Cache<C>& cache, int64_t size, float* values,
                       KeyTile<float>& widened) {
    for (int64_t j = 0; j < TILE; j++) {
        if (next) __builtin_prefetch(next->keys[j]), __builtin_prefetch(next->values[j]);
        const int64_t scale = tile.scales[j];
        widened.keys[j] = widen_head(tile.keys[j], cache.k_scale[scale], size, values + j * size);
        widened.values[j] = widen_head(tile.values[j], cache.v_scale[scale], size, values + (TILE + j) * size);
    }
}

// Q queries see a tile. A query's bits do not depend on Q, nor on what the others see: keys out of its sight weigh 0.
template <int Q, class S, class C>
inline void see_tile(const S* q, int64_t width, const KeyTile<C>& tile, const KeyTile<C>* next, const Range* seen,
                     const Heads& h, State* states, float* out) {
    Range some{TILE, 0};
    for (int r = 0; r < Q; r++)
        if (seen[r].begin < seen[r].end)
            some = {std::min(some.begin, seen[r].begin), std::max(some.end, seen[r].end)};
    if (some.begin >= some.end) return;
    const Range whole{some.begin / VL * VL, (some.end + VL - 1) / VL * VL};  // in vectors
    float scores[Q * TILE], decay[Q];
    for (int64_t g = whole.begin; g < whole.end; g += VL / Q)
        score_some<Q>(q, width, tile.keys + g, next ? next->keys + g : nullptr, h.size, h.scale, scores + g);
    for (int r = 0; r < Q; r++) decay[r] = soften(scores + r * TILE, whole, seen[r], states[r]);
    weigh<Q>(scores, tile.values, next ? next->values : nullptr, some.begin, some.end, h.size, decay, out, width);
}

// All queries of a task see a tile, as many at a time as the registers hold; the first ask the memory for the next tile.
template <int Q, class S, class C>
inline void see_all(int64_t rows, const S* q, int64_t width, const KeyTile<C>& tile, const KeyTile<C>* next,
                    const Range* seen, const Heads& h, State* states, float* out) {
    int64_t r = 0;
    for (; r + Q <= rows; r += Q, next = nullptr)
        see_tile<Q>(q + r * width, width, tile, next, seen + r, h, states + r, out + r * width);
    if constexpr (Q > 1)
        if (r < rows)
            see_all<Q / 2>(rows - r, q + r * width, width, tile, next, seen + r, h, states + r, out + r * width);
}

// A thread's working memory, kept between tasks.
template <class S>
struct Work {
    std::vector<S> queries;    // [rows, width]
    std::vector<float> sums;   // [rows, width]
    std::vector<State> states;
    std::vector<Range> seen;
    std::vector<float> widened;  // [2, TILE, D]: keys and values of a quantized tile
};

// Attention of one tile of queries over one KV head, with queries of type S in the scores. q and out are [T, …] with the
// given strides of a token.
template <class S, class Q, class C, class O>
void attend_as(const QueryTile& tile, int64_t kv_head, const Paging& p, const Heads& h, const Q* q, int64_t q_stride,
               const Cache<C>& cache, O* out, int64_t out_stride) {
    using W = std::conditional_t<QUANTIZED<C>, float, C>;  // what the sums read
    const int64_t group = h.query / h.kv, rows = (tile.end - tile.begin) * group;
    const int64_t width = (h.size + VL - 1) / VL * VL;
    thread_local Work<S> work;
    work.queries.assign(rows * width, S{});
    work.sums.assign(rows * width, 0.0f);
    work.states.assign(rows, State{LOWEST, vf{}});
    work.seen.resize(rows);
    if (QUANTIZED<C>) work.widened.resize(2 * TILE * h.size);

    const int64_t first_token = p.query_start[tile.row] + tile.begin;
    for (int64_t r = 0, t = first_token; r < rows; r += group, t++)
        for (int64_t head = 0; head < group; head++) {
            const Q* from = q + t * q_stride + (kv_head * group + head) * h.size;
            S* to = &work.queries[(r + head) * width];
            in_vectors(h.size, [&](int64_t i, int64_t n) { store_some(to + i, load_some(from + i, n), n); });
            if constexpr (SPLITS<S, C>) split_chunks(to, h.size);
        }

    const int64_t row_tokens = p.query_start[tile.row + 1] - p.query_start[tile.row];
    const int64_t first_position = p.seq_lens[tile.row] - row_tokens + tile.begin;
    const int64_t num_keys = first_position + (tile.end - tile.begin);
    const int64_t oldest = h.window ? std::max<int64_t>(0, first_position - h.window + 1) : 0;
    const int32_t* table = p.block_tables + tile.row * p.max_blocks;
    const int block_bits = __builtin_ctzll(p.block_size);
    const auto point_to = [&](int64_t start, KeyTile<C>& found) {
        // Outside the visible range: any valid key, its score is masked.
        for (int64_t j = 0; j < TILE;) {
            const int64_t at = std::min(std::max(start + j, oldest), num_keys - 1), offset = at & (p.block_size - 1);
            const int64_t run = start + j == at ? std::min({p.block_size - offset, num_keys - at, TILE - j}) : 1;
            const int64_t head = int64_t(table[at >> block_bits]) * h.kv + kv_head;
            int64_t slot = head * p.block_size + offset;
            for (const int64_t end = j + run; j < end; j++, slot++) {
                found.keys[j] = cache.k + slot * h.size, found.values[j] = cache.v + slot * h.size;
                if (QUANTIZED<C>) found.scales[j] = std::is_same_v<C, fp8> ? kv_head : slot;
            }
        }
    };
    KeyTile<C> key_tiles[2];
    const int64_t first = oldest / TILE * TILE;
    point_to(first, key_tiles[0]);
    for (int64_t start = first, turn = 0; start < num_keys; start += TILE, turn = 1 - turn) {
        const bool is_last = start + TILE >= num_keys;
        if (!is_last) point_to(start + TILE, key_tiles[1 - turn]);
        for (int64_t r = 0, position = first_position; r < rows; r += group, position++) {
            const int64_t begin = h.window ? std::max<int64_t>(0, position - h.window + 1 - start) : 0;
            std::fill_n(&work.seen[r], group, Range{begin, std::min<int64_t>(TILE, position + 1 - start)});
        }
        const KeyTile<W>*now, *next = nullptr;
        KeyTile<W> widened;
        if constexpr (QUANTIZED<C>) {
            widen_tile(key_tiles[turn], is_last ? nullptr : &key_tiles[1 - turn], cache, h.size, work.widened.data(), widened);
            now = &widened;
        } else {
            now = &key_tiles[turn], next = is_last ? nullptr : &key_tiles[1 - turn];
        }
        see_all<MAX_QUERIES>(rows, work.queries.data(), width, *now, next, work.seen.data(), h, work.states.data(),
                             work.sums.data());
    }

    for (int64_t r = 0, t = first_token; r < rows; r += group, t++)
        for (int64_t head = 0; head < group; head++) {
            const float share = 1.0f / sum(work.states[r + head].total);
            O* to = out + t * out_stride + (kv_head * group + head) * h.size;
            float* sums = &work.sums[(r + head) * width];
            if constexpr (SPLITS<float, C>) join_chunks(sums, h.size);
            in_vectors(h.size, [&](int64_t i, int64_t n) { store_some(to + i, load(sums + i) * splat(share), n); });
        }
}

template <class Q, class C, class O>
void attend(const QueryTile& tile, int64_t kv_head, const Paging& p, const Heads& h, const Q* q, int64_t q_stride,
            const Cache<C>& cache, O* out, int64_t out_stride) {
    if constexpr (MULTIPLIES_BF16 && sizeof(C) == 2 && sizeof(O) == 2)  // not float32 queries over a bfloat16 cache
        if (h.size % 32 == 0) return attend_as<bf16>(tile, kv_head, p, h, q, q_stride, cache, out, out_stride);
    attend_as<float>(tile, kv_head, p, h, q, q_stride, cache, out, out_stride);
}

// A step's attention, by all threads that call it with the same phase.
template <class Q, class C, class O>
void attention(Phase& phase, const std::vector<QueryTile>& tiles, const Paging& p, const Heads& h, const Q* q,
               int64_t q_stride, const Cache<C>& cache, O* out, int64_t out_stride) {
    phase.run(int64_t(tiles.size()) * h.kv, [&](int64_t task) {
        attend(tiles[task / h.kv], task % h.kv, p, h, q, q_stride, cache, out, out_stride);
    });
}

template <class T>
void store_all(const T* k, const T* v, int64_t stride, const Caches& caches, const int64_t* slots, int64_t tokens,
               const Heads& h, int64_t block_size) {
    with_cache<T>(caches, [&](auto cache) {
        for (int64_t t = 0; t < tokens; t++) store_token(k + t * stride, v + t * stride, cache, slots[t], h, block_size);
    });
}

template <class T>
void attention_all(const Paging& p, const Heads& h, const T* q, int64_t q_stride, const Caches& caches, T* out,
                   int64_t num_threads) {
    std::vector<QueryTile> tiles;
    list_tiles(p, h.query / h.kv, tiles);
    on_team(num_threads, [=, tiles = std::move(tiles), phases = std::vector<Phase>(1)]() mutable {
        with_cache<T>(caches, [&](auto cache) {
            attention(phases[0], tiles, p, h, q, q_stride, cache, out, h.query * h.size);
        });
    });
}

}  // namespace quire

extern "C" {

void quire_store_kv(const void* k, const void* v, int64_t stride, const quire::Caches* caches, const int64_t* slots,
                    int64_t tokens, const quire::Heads* h, int64_t block_size, int64_t narrow) {
    using quire::bf16;
    if (narrow)
        quire::store_all((const bf16*)k, (const bf16*)v, stride, *caches, slots, tokens, *h, block_size);
    else
        quire::store_all((const float*)k, (const float*)v, stride, *caches, slots, tokens, *h, block_size);
}

void quire_attention(const quire::Paging* p, const quire::Heads* h, const void* q, int64_t q_stride,
                     const quire::Caches* caches, void* out, int64_t narrow, int64_t num_threads) {
    using quire::bf16;
    if (narrow)
        quire::attention_all(*p, *h, (const bf16*)q, q_stride, *caches, (bf16*)out, num_threads);
    else
        quire::attention_all(*p, *h, (const float*)q, q_stride, *caches, (float*)out, num_threads);
}
}
