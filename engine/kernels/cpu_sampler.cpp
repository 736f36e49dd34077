// Choosing tokens on a CPU: one call for all rows of a step, one pass over a row's logits where nothing is filtered.
//
// Semantics and random numbers are engine/runner/sampler.py's, which is the oracle. A row depends on nothing but its own
// logits and settings. A token's noise is bounded from the exponent of its uniform number, which costs a few instructions
// a vector; only tokens whose bound beats the best sum so far are computed, and they are few. Filters look at
// the most likely tokens first and never sort a whole row.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu_team.h"
#include "cpu_vector.h"

namespace quire {

constexpr int64_t FEW = 256;                // most likely tokens that top_p looks at first
constexpr int64_t WORTH_A_THREAD = 1 << 16;  // logits of a step from which threads share its rows
constexpr int64_t NO_TOKEN = -1;            // engine/runner/sampler.py's
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// How one row's logits change before anything else; engine/runner/sampler.py's LogitEdits.
struct Edit {
    int64_t row;
    const float* bias;     // [vocab], or none
    const int16_t* marks;  // [vocab], or none: bit 0 for the prompt, above it the count of the output
    double repetition, frequency, presence;
    const int64_t* banned;  // [num_banned]
    int64_t num_banned;
};

struct Sampling {
    const float* logits;  // [rows, vocab]
    int64_t rows, vocab;
    const double *temperature, *top_p, *min_p, *typical_p;  // [rows]; a temperature of 0 is greedy
    const int64_t *top_k, *seed, *position;        // [rows]; a top_k of 0 keeps all
    const Edit* edits;                             // [num_edits], at most one a row
    int64_t num_edits;
    const int64_t* masked;  // [num_masks], ascending: rows with a mask
    const int32_t* masks;   // [num_masks, ceil(vocab / 32)]: bit j % 32 of word j / 32 is token j's, 0 where it must not come
    int64_t num_masks, num_threads;
    int64_t* chosen;  // [rows]; NO_TOKEN where the logits are none
};

struct Wanted {
    const float* logits;        // [*, vocab]
    const int64_t *rows, *ids;  // [n]: of which rows, and the tokens chosen there
    int64_t n, vocab, num_top;
    float* logprobs;       // [n]
    int64_t* rank;         // [n]
    int64_t* top_ids;      // [n, num_top]
    float* top_logprobs;   // [n, num_top]
};

struct Candidate {
    float value;
    int32_t id;
};

inline bool is_before(const Candidate& a, const Candidate& b) {  // the more likely, then the lower id
    return a.value > b.value || (a.value == b.value && a.id < b.id);
}

inline bool any(vi mask) {
#pragma GCC unroll 4
    for (int half = VL / 2; half >= 1; half /= 2) mask |= __builtin_shuffle(mask, LANE ^ half);
    return mask[0] != 0;
}

template <class U>
inline U mix(U x) {
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    return x ^ (x >> 16);
}

struct NoiseKeys {
    uint32_t first, second;

    NoiseKeys(int64_t seed, int64_t position) {
        const uint32_t low = uint32_t(uint64_t(seed)), high = uint32_t(uint64_t(seed) >> 32), at = uint32_t(position);
        const uint32_t mixed = mix(low + 0x9E3779B9u);
        first = mix(mixed ^ at);
        second = mix(mix(high ^ mixed) ^ mix(at + 0x85EBCA6Bu));
    }
};

// The first n <= VL values, the other lanes below any.
inline vf load_or_nothing(const float* x, int64_t n) {
    if (n == VL) return load(x);
    vf found = splat(NOTHING);
    for (int64_t lane = 0; lane < n; lane++) found[lane] = x[lane];
    return found;
}

inline float highest(const float* x, int64_t size) {
    vf best = splat(NOTHING);
    in_vectors(size, [&](int64_t i, int64_t n) {
        const vf v = load_or_nothing(x + i, n);
        best = v > best ? v : best;
    });
    return largest(best);
}

inline int64_t first_of(const float* x, int64_t size, float value) {
    for (int64_t i = 0; i < size; i++)
        if (x[i] == value) return i;
    return 0;
}

// Whether no logit is NaN or +infinity: what follows orders numbers.
inline bool has_numbers(const float* x, int64_t size) {
    vf wrong{};
    in_vectors(size, [&](int64_t i, int64_t n) {
        const vf v = load_or_nothing(x + i, n);
        wrong += v == splat(NOTHING) ? vf{} : v * splat(0.0f);
    });
    return sum(wrong) == 0.0f;
}

// Σ exp(x - peak) over the values that are at least `floor`.
inline double exp_sum(const float* x, int64_t size, float peak, float floor) {
    double total = 0;
    for (int64_t begin = 0; begin < size; begin += 64 * VL) {
        vf part{};
        in_vectors(std::min<int64_t>(64 * VL, size - begin), [&](int64_t i, int64_t n) {
            const vf v = load_or_nothing(x + begin + i, n);
            part += v >= splat(floor) ? exp(v - splat(peak)) : vf{};
        });
        total += sum(part);
    }
    return total;
}

// The `count` most likely tokens in their order; fewer where the row has fewer.
inline void most_likely(const float* x, int64_t size, int64_t count, std::vector<Candidate>& found) {
    count = std::min(count, size);
    const size_t room = size_t(count) * 2 + VL;
    float least = NOTHING;  // below every value while fewer than `count` are found
    bool is_full = false;
    found.clear();
    const auto shrink = [&] {
        std::nth_element(found.begin(), found.begin() + (count - 1), found.end(), is_before);
        found.resize(size_t(count));
        least = found.back().value;
        is_full = true;
    };
    for (int64_t i = 0; count && i < size; i += VL) {
        const int64_t n = std::min<int64_t>(VL, size - i);
        if (is_full && n == VL && !any(load(x + i) > splat(least))) continue;
        for (int64_t lane = i; lane < i + n; lane++)
            if (!is_full || x[lane] > least) found.push_back({x[lane], int32_t(lane)});
        if (found.size() >= room) shrink();
    }
    if (int64_t(found.size()) > count) shrink();
    std::sort(found.begin(), found.end(), is_before);
}

// What a row keeps: its tokens up to and including `last` in the order of is_before, none of a distance above `reach`.
struct Kept {
    Candidate last{NOTHING, std::numeric_limits<int32_t>::max()};
    float peak = 0, mean = 0, reach = std::numeric_limits<float>::infinity();

    float distance(float value) const { return std::abs(peak - value - mean); }  // from the mean difference to the peak
    bool has(float value, int64_t id) const {
        return (value > last.value || (value == last.value && id <= last.id)) && distance(value) <= reach;
    }
};

inline Kept keep_likely(const float* scaled, int64_t size, int64_t top_k, double top_p, double min_p,
                        std::vector<Candidate>& found) {
    Kept kept;
    const bool limited = top_k > 0 && top_k < size;
    if (!limited && top_p >= 1.0 && min_p <= 0.0) return kept;
    const float peak = highest(scaled, size);
    float floor = min_p > 0.0 ? peak + float(std::log(min_p)) : NOTHING;
    if (limited) {
        most_likely(scaled, size, top_k, found);
        floor = std::max(floor, found.back().value);
    }
    kept.last.value = floor;
    if (top_p >= 1.0) return kept;
    const double enough = top_p * exp_sum(scaled, size, peak, floor);
    for (int64_t count = FEW;; count *= 8) {
        most_likely(scaled, size, count, found);
        double before = 0;
        for (size_t i = 0; i < found.size() && found[i].value >= floor; i++) {
            if (i && before >= enough) return {found[i - 1]};
            before += std::exp(double(found[i].value) - peak);
        }
        if (count >= size || found.back().value < floor) return kept;
    }
}

// Of what is kept, only the tokens nearest to their mean value that reach typical_p of the probability together, and those
// as near as the last of them: the weighted order statistic of their distances, by halves.
inline void keep_typical(const float* scaled, int64_t size, double typical_p, Kept& kept, std::vector<Candidate>& found) {
    const float peak = highest(scaled, size);
    double total = 0, weighted = 0;
    found.clear();
    for (int64_t i = 0; i < size; i++) {
        if (!(scaled[i] > NOTHING) || !kept.has(scaled[i], i)) continue;
        const double below = double(peak) - scaled[i], weight = std::exp(-below);
        total += weight;
        weighted += weight * below;
        found.push_back({scaled[i], int32_t(i)});
    }
    if (!std::isfinite(peak) || found.empty()) return;
    kept.peak = peak;
    kept.mean = float(weighted / total);
    const auto nearer = [&](const Candidate& a, const Candidate& b) {
        return kept.distance(a.value) < kept.distance(b.value) || (kept.distance(a.value) == kept.distance(b.value) && a.id < b.id);
    };
    double left = typical_p * total;  // of the weight, beyond what is before `low`
    size_t low = 0, high = found.size();
    while (high - low > 1) {
        const size_t middle = low + (high - low) / 2;
        std::nth_element(found.begin() + low, found.begin() + middle, found.begin() + high, nearer);
        double before = 0;
        for (size_t i = low; i < middle; i++) before += std::exp(double(found[i].value) - peak);
        if (before >= left) {
            high = middle;
        } else {
            left -= before;
            low = middle;
        }
    }
    kept.reach = kept.distance(found[low].value);
}

inline int64_t draw(const float* scaled, int64_t size, const NoiseKeys& keys, const Kept& kept) {
    float best = NOTHING;
    int64_t chosen = 0;
    const vu first = vu{} + keys.first, second = vu{} + keys.second;
    for (int64_t i = 0; i < size; i += VL) {
        const int64_t n = std::min<int64_t>(VL, size - i);
        const vf value = load_or_nothing(scaled + i, n);
        const vu hash = mix(mix((vu)(LANE + int32_t(i)) ^ first) + second);
        vf u = (__builtin_convertvector(hash, vf) + splat(0.5f)) * splat(0x1p-32f);
        u = u < splat(1.0f - 0x1p-24f) ? u : splat(1.0f - 0x1p-24f);
        // 2^e <= u, so the noise is at most -e log 2, and a little more for the rounding of what is computed below
        const vf bound = __builtin_convertvector(127 - ((vi)u >> 23), vf) * splat(0.6931472f) + splat(1e-4f);
        const vi open = (value + bound > splat(best)) & (value >= splat(kept.last.value));
        if (!any(open)) continue;
        for (int64_t lane = 0; lane < n; lane++) {
            if (!open[lane] || !kept.has(value[lane], i + lane)) continue;
            const float sum = value[lane] - std::log(-std::log1p(-u[lane]));
            if (sum > best) best = sum, chosen = i + lane;
        }
    }
    return chosen;
}

inline void apply(const Edit& edit, float* x, int64_t size) {
    if (edit.bias)
        for (int64_t i = 0; i < size; i++) x[i] += edit.bias[i];
    if (edit.marks) {
        const float repetition = float(edit.repetition), frequency = float(edit.frequency);
        const float presence = float(edit.presence);
        for (int64_t i = 0; i < size; i++) {
            const int mark = edit.marks[i];
            if (!mark) continue;
            x[i] = x[i] > 0 ? x[i] / repetition : x[i] * repetition;
            if (mark >> 1) x[i] = x[i] - frequency * float(mark >> 1) - presence;
        }
    }
    for (int64_t i = 0; i < edit.num_banned; i++) x[edit.banned[i]] = NOTHING;
}

// A bit a token, 0 where it must not come.
inline void apply(const int32_t* mask, float* x, int64_t size) {
    for (int64_t begin = 0; begin < size; begin += 32) {
        const uint32_t word = uint32_t(mask[begin >> 5]);
        const int64_t end = std::min<int64_t>(32, size - begin);
        if (word == ~0u) continue;
        if (!word) {
            std::fill(x + begin, x + begin + end, NOTHING);
            continue;
        }
        for (int64_t bit = 0; bit < end; bit++) x[begin + bit] = word >> bit & 1 ? x[begin + bit] : NOTHING;
    }
}

inline void sample_row(const Sampling& s, int64_t row, std::vector<float>& scratch, std::vector<Candidate>& found) {
    const float* logits = s.logits + row * s.vocab;
    if (!has_numbers(logits, s.vocab)) {
        s.chosen[row] = NO_TOKEN;
        return;
    }
    const double temperature = s.temperature[row];
    bool is_copied = false;
    const auto copy = [&] {
        if (!is_copied) scratch.assign(logits, logits + s.vocab);
        is_copied = true;
    };
    for (int64_t i = 0; i < s.num_edits; i++) {
        if (s.edits[i].row != row) continue;
        copy();
        apply(s.edits[i], scratch.data(), s.vocab);
    }
    const int64_t* masked = std::lower_bound(s.masked, s.masked + s.num_masks, row);
    if (masked != s.masked + s.num_masks && *masked == row) {
        copy();
        apply(s.masks + (masked - s.masked) * ((s.vocab + 31) / 32), scratch.data(), s.vocab);
    }
    if (temperature <= 0.0) {
        const float* x = is_copied ? scratch.data() : logits;
        s.chosen[row] = first_of(x, s.vocab, highest(x, s.vocab));
        return;
    }
    copy();
    const vf divisor = splat(float(std::max(temperature, 1e-5)));
    float* x = scratch.data();
    in_vectors(s.vocab, [&](int64_t i, int64_t n) { store_some(x + i, load_some(x + i, n) / divisor, n); });
    Kept kept = keep_likely(x, s.vocab, s.top_k[row], s.top_p[row], s.min_p[row], found);
    if (s.typical_p[row] < 1.0) keep_typical(x, s.vocab, s.typical_p[row], kept, found);
    s.chosen[row] = draw(x, s.vocab, NoiseKeys(s.seed[row], s.position[row]), kept);
}

inline void describe(const Wanted& w, int64_t i, std::vector<Candidate>& found) {
    const float* logits = w.logits + w.rows[i] * w.vocab;
    const float peak = highest(logits, w.vocab), own = logits[w.ids[i]];
    const double total = peak + std::log(exp_sum(logits, w.vocab, peak, NOTHING));
    int64_t above = 0;
    for (int64_t j = 0; j < w.vocab; j++) above += logits[j] > own;
    w.logprobs[i] = float(own - total);
    w.rank[i] = above + 1;
    most_likely(logits, w.vocab, w.num_top, found);
    for (int64_t j = 0; j < w.num_top; j++) {
        w.top_ids[i * w.num_top + j] = found[size_t(j)].id;
        w.top_logprobs[i * w.num_top + j] = float(found[size_t(j)].value - total);
    }
}

}  // namespace quire

extern "C" {

// One token a row.
void quire_sample(const quire::Sampling* s) {
    using namespace quire;
    const int64_t num_threads = s->rows * s->vocab < WORTH_A_THREAD ? 1 : std::min(s->num_threads, s->rows);
    on_team(num_threads, [s = *s, phases = std::vector<Phase>(1)]() mutable {
        std::vector<float> scratch;
        std::vector<Candidate> found;
        phases[0].run(s.rows, [&](int64_t row) { sample_row(s, row, scratch, found); });
    });
}

// Log-probabilities under the raw logits; num_top is at most vocab.
void quire_logprobs(const quire::Wanted* w) {
    std::vector<quire::Candidate> found;
    for (int64_t i = 0; i < w->n; i++) quire::describe(*w, i, found);
}
}
