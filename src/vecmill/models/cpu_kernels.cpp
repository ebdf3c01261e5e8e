// Steps between the matrix products of a forward pass on a CPU, each in one pass over its values.
//
// Each runs in the calling thread. `cpu_kernels.py` compiles this file where it runs, and calls what is below. Values
// are bfloat16, rounded to the nearest, the even one of two; between loading and storing they are float32. Strides count
// values. Vectors are written with the extensions that GCC and Clang share, whatever the processor's own are like.

#include <cstdint>
#include <cstring>
#if defined __AVX512BW__
#include <immintrin.h>
#endif

namespace {

using bfloat16 = uint16_t;
#if defined __AVX512BW__  // as many as a register of the processor holds
constexpr int PAIRS = 16;
#elif defined __AVX2__
constexpr int PAIRS = 8;
#else
constexpr int PAIRS = 4;
#endif
using Floats = float __attribute__((vector_size(4 * PAIRS)));
using Words = uint32_t __attribute__((vector_size(4 * PAIRS)));
using Ints = int32_t __attribute__((vector_size(4 * PAIRS)));
constexpr int64_t LANES = 2 * PAIRS;  // values that are computed at a time

// Neighbours are in one word, the first in its lower half. Apart they need no shuffling to become float32, or to get
// back.
struct Values {
    Floats even, odd;
};

inline Ints even_lanes() {
    Ints lanes = {};
    for (int pair = 0; pair < PAIRS; pair++) lanes[pair] = 2 * pair;
    return lanes;
}

inline Values operator+(Values a, Values b) { return {a.even + b.even, a.odd + b.odd}; }
inline Values operator-(Values a, Values b) { return {a.even - b.even, a.odd - b.odd}; }
inline Values operator*(Values a, Values b) { return {a.even * b.even, a.odd * b.odd}; }
inline Values operator+(Values a, float b) { return {a.even + b, a.odd + b}; }
inline Values operator-(Values a, float b) { return {a.even - b, a.odd - b}; }
inline Values operator*(Values a, float b) { return {a.even * b, a.odd * b}; }

inline Values apart(Words both) { return {(Floats)(both << 16), (Floats)(both & 0xffff0000)}; }

inline Values load(const bfloat16 *from) {
    Words both;
    std::memcpy(&both, from, sizeof both);
    return apart(both);
}

// The first `count` values; the others are 0. Nothing beyond them is read.
inline Values load(const bfloat16 *from, int64_t count) {
    if (count == LANES) return load(from);
#if defined __AVX512BW__
    return apart((Words)_mm512_maskz_loadu_epi16((1u << count) - 1, from));
#else
    Words both = {};
    std::memcpy(&both, from, count * 2);
    return apart(both);
#endif
}

// In the upper half of each word.
inline Words rounded(Floats values) {
    Words bits = (Words)values;
    return bits + 0x7fff + (bits >> 16 & 1);
}

inline void store(bfloat16 *into, Values values, int64_t count = LANES) {
#if defined __AVX512BF16__
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const Words both = (Words)_mm512_permutexvar_epi16(
        order, (__m512i)_mm512_cvtne2ps_pbh((__m512)values.odd, (__m512)values.even));
#else
    const Words both = rounded(values.even) >> 16 | (rounded(values.odd) & 0xffff0000);
#endif
#if defined __AVX512BW__
    if (count < LANES) return _mm512_mask_storeu_epi16(into, (1u << count) - 1, (__m512i)both);
#endif
    std::memcpy(into, &both, count == LANES ? sizeof both : count * 2);
}

inline float sum_of(Values values) {
    float each[PAIRS];
    const Floats pairs = values.even + values.odd;
    std::memcpy(each, &pairs, sizeof each);
    for (int count = PAIRS / 2; count; count /= 2)
        for (int lane = 0; lane < count; lane++) each[lane] += each[lane + count];
    return each[0];
}

// 2 to the power of each, with a relative error below 3e-6 from 2^-126 to 2^127. Smaller powers become subnormal or 0,
// larger ones up to infinity. NaN stays NaN, and -infinity gives 0 or NaN.
inline Floats exp2_of(Floats x) {
#if defined __AVX512BW__
    const Floats whole = (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    constexpr float ROUND = 0x1.8p23f;  // a sum with it has no digits after the point, and ends in the whole number
    x = x < -127.0f ? -127.0f - (Floats){} : x;
    x = x > 128.0f ? 128.0f - (Floats){} : x;
    const Floats shifted = x + ROUND, whole = shifted - ROUND;
#endif
    const Floats rest = x - whole;  // from -1/2 to 1/2, where the terms of Taylor's series that are left out are small
    Floats power = rest * 1.3333558e-3f + 9.6181291e-3f;
    power = power * rest + 5.5504109e-2f;
    power = power * rest + 2.4022651e-1f;
    power = power * rest + 6.9314718e-1f;
    power = power * rest + 1.0f;
#if defined __AVX512BW__
    return (Floats)_mm512_scalef_ps((__m512)power, (__m512)whole);
#else
    return power * (Floats)(((Words)shifted << 23) + 0x3f800000);
#endif
}

inline int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls `step(at, count)` for each LANES of `width` values, and for those that are left over.
template <class Step>
inline void in_steps(int64_t width, Step step) {
    int64_t at = 0;
    for (; at + LANES <= width; at += LANES) step(at, LANES);
    if (at < width) step(at, width - at);
}

// Scores of one query to weights, 0 for keys that are not seen: those before `low`, and from `high` on. BIASED: `factor`
// times a bias is added, which has values up to `high`. Returns the sum of the weights.
template <bool BIASED>
inline float weigh_line(bfloat16 *line, int64_t keys, int64_t low, int64_t high, const bfloat16 *bias, float factor) {
    const int64_t end = high > 0 ? least_of(keys, (high + LANES - 1) / LANES * LANES) : 0;
    const int64_t begin = low > 0 ? least_of(end, low / LANES * LANES) : 0;
    if (begin > 0) std::memset(line, 0, begin * 2);
    if (end < keys) std::memset(line + end, 0, (keys - end) * 2);
    Values sum = {};
    in_steps(end - begin, [&](int64_t at, int64_t count) {
        at += begin;
        Values weights = load(line + at, count);
        if (BIASED) weights = weights + load(bias + at, least_of(count, high - at)) * factor;
        weights = {exp2_of(weights.even), exp2_of(weights.odd)};
        if (at < low || at + LANES > high) {
            const Ints key = even_lanes() + (int32_t)at;
            const int32_t from = low > 0 ? (int32_t)low : 0, to = (int32_t)high;
            weights.even = (key >= from) & (key < to) ? weights.even : (Floats){};
            weights.odd = (key + 1 >= from) & (key + 1 < to) ? weights.odd : (Floats){};
        }
        store(line + at, weights, count);
        sum = sum + weights;
    });
    return sum_of(sum);
}

// Adds `factor` times a bias to the scores of several queries, up to LANES: `bias` has the queries' values next to each
// other, and the next key's after `stride`. Scores of one query have `width` values, of which `keys` have a bias.
void add_across(bfloat16 *lines, int64_t width, const bfloat16 *bias, int64_t stride, int64_t queries, int64_t keys,
                float factor) {
    bfloat16 turned[LANES][LANES];
    in_steps(keys, [&](int64_t at, int64_t count) {
        for (int64_t key = 0; key < count; key++)
            for (int64_t query = 0; query < queries; query++) turned[query][key] = bias[(at + key) * stride + query];
        for (int64_t query = 0; query < queries; query++) {
            bfloat16 *line = lines + query * width + at;
            store(line, load(line, count) + load(turned[query], count) * factor, count);
        }
    });
}

}  // namespace

extern "C" {

// Tokens to rows: (T, heads * each, width) -> (heads, rows, each, slots, width).
//
// Row r gets `counts[r]` tokens from `tokens[r]` on, in its slots from 0 on; those up to `cleared` are set to zero.
void gather(bfloat16 *into, const bfloat16 *from, int64_t of_token, int64_t of_head, int64_t heads, int64_t rows,
            int64_t each, int64_t slots, int64_t width, const int64_t *tokens, const int64_t *counts, int64_t cleared) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++)
            for (int64_t one = 0; one < each; one++) {
                bfloat16 *to = into + ((head * rows + row) * each + one) * slots * width;
                const bfloat16 *source = from + tokens[row] * of_token + (head * each + one) * of_head;
                for (int64_t slot = 0; slot < counts[row]; slot++)
                    in_steps(width, [&](int64_t at, int64_t count) {
                        std::memcpy(to + slot * width + at, source + slot * of_token + at, count * 2);
                    });
                if (counts[row] && cleared > counts[row])
                    std::memset(to + counts[row] * width, 0, (cleared - counts[row]) * width * 2);
            }
}

// Scores to weights: of (heads, rows, each, queries, keys), 2 to the power of what they and the biases add up to.
//
// Row r has `counts[r]` queries and `seen[r]` keys; its query q sees those from `first + q` to `last + q`. What is not
// seen gets the weight 0; scores of further queries stay as they are. `sums` are of weights before they are rounded.
// A bias is added `factor` times where it is not null: one whose keys lie next to each other, and one whose queries do.
//
// Returns how many rows have a sum that is not from `least` to `most`; each is set in `out_of_range`.
int64_t weigh(bfloat16 *scores, float *sums, uint8_t *out_of_range, int64_t heads, int64_t rows, int64_t each,
              int64_t queries, int64_t keys, const int64_t *counts, const int64_t *seen, int64_t first, int64_t last,
              float least, float most, float factor, const bfloat16 *by_query, int64_t query_of_head,
              int64_t query_of_row, int64_t query_of_query, const bfloat16 *by_key, int64_t key_of_head,
              int64_t key_of_row, int64_t key_of_key) {
    int64_t found = 0;
    for (int64_t row = 0; row < rows; row++) {
        bool bad = false;
        for (int64_t head = 0; head < heads; head++)
            for (int64_t one = 0; one < each; one++) {
                const int64_t place = ((head * rows + row) * each + one) * queries;
                const bfloat16 *of_query = by_query + head * query_of_head + row * query_of_row;
                const bfloat16 *of_key = by_key + head * key_of_head + row * key_of_row;
                for (int64_t query = 0; query < counts[row]; query++) {
                    bfloat16 *line = scores + (place + query) * keys;
                    if (by_key && query % LANES == 0)
                        add_across(line, keys, of_key + query, key_of_key, least_of(LANES, counts[row] - query),
                                   seen[row], factor);
                    const int64_t low = first + query, high = least_of(seen[row], last + query + 1);
                    const bfloat16 *bias = of_query + query * query_of_query;
                    const float sum = by_query ? weigh_line<true>(line, keys, low, high, bias, factor)
                                               : weigh_line<false>(line, keys, low, high, nullptr, 0.0f);
                    sums[place + query] = sum;
                    bad |= !(sum >= least && sum <= most);
                }
            }
        out_of_range[row] |= bad;
        found += bad;
    }
    return found;
}

// The opposite of `gather`, each value divided by its query's sum: (heads, rows, each, queries, width) of which each
// has one in `sums` -> (T, heads * each, width).
void scatter(bfloat16 *into, int64_t of_token, int64_t of_head, const bfloat16 *from, const float *sums, int64_t heads,
             int64_t rows, int64_t each, int64_t queries, int64_t width, const int64_t *tokens, const int64_t *counts) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++)
            for (int64_t one = 0; one < each; one++) {
                const int64_t place = ((head * rows + row) * each + one) * queries;
                bfloat16 *to = into + tokens[row] * of_token + (head * each + one) * of_head;
                for (int64_t query = 0; query < counts[row]; query++) {
                    const float scale = 1.0f / sums[place + query];
                    in_steps(width, [&](int64_t at, int64_t count) {
                        const Values value = load(from + (place + query) * width + at, count);
                        store(to + query * of_token + at, value * scale, count);
                    });
                }
            }
}

// (rows, width) -> (rows, width), of a width in multiples of LANES: each row, with the same of `other` added to it unless
// that is null, less its mean, divided by its standard deviation, times the weight, plus the bias unless that is null.
void layer_norm(bfloat16 *into, const bfloat16 *from, const bfloat16 *other, const bfloat16 *weight,
                const bfloat16 *bias, int64_t rows, int64_t width, float epsilon) {
    for (int64_t row = 0; row < rows; row++, from += width, into += width) {
        const auto value = [&](int64_t at) { return other ? load(from + at) + load(other + at) : load(from + at); };
        Values sum = {}, squares = {};
        for (int64_t at = 0; at < width; at += LANES) sum = sum + value(at);
        const float mean = sum_of(sum) / (float)width;
        for (int64_t at = 0; at < width; at += LANES) {
            const Values off = value(at) - mean;
            squares = squares + off * off;
        }
        const float scale = 1.0f / __builtin_sqrtf(sum_of(squares) / (float)width + epsilon);
        for (int64_t at = 0; at < width; at += LANES) {
            const Values normed = (value(at) - mean) * scale * load(weight + at);
            store(into + at, bias ? normed + load(bias + at) : normed);
        }
        if (other) other += width;
    }
}

// (T, heads, width) -> (T, heads, width), of a width in multiples of LANES: each row divided by its root mean square, and
// rounded where `rounds` says so, times `offset` plus the weight. Heads of a token are next to each other.
void rms_norm(bfloat16 *into, const bfloat16 *from, int64_t of_token, const bfloat16 *weight, int64_t tokens,
              int64_t heads, int64_t width, float epsilon, float offset, int64_t rounds) {
    for (int64_t row = 0; row < tokens * heads; row++, into += width) {
        const bfloat16 *values = from + row / heads * of_token + row % heads * width;
        Values squares = {};
        for (int64_t at = 0; at < width; at += LANES) squares = squares + load(values + at) * load(values + at);
        const float scale = 1.0f / __builtin_sqrtf(sum_of(squares) / (float)width + epsilon);
        for (int64_t at = 0; at < width; at += LANES) {
            Values normed = load(values + at) * scale;
            if (rounds) {
                store(into + at, normed);
                normed = load(into + at);
            }
            store(into + at, normed * (load(weight + at) + offset));
        }
    }
}

// (T, heads, width), in place: the halves of each head rotated against each other by (T, width) cosines and sines.
void rotate(bfloat16 *values, int64_t of_token, int64_t of_head, const bfloat16 *cos, const bfloat16 *sin,
            int64_t tokens, int64_t heads, int64_t width) {
    const int64_t half = width / 2;
    for (int64_t token = 0; token < tokens; token++, cos += width, sin += width)
        for (int64_t head = 0; head < heads; head++) {
            bfloat16 *first = values + token * of_token + head * of_head, *second = first + half;
            in_steps(half, [&](int64_t at, int64_t count) {
                const Values one = load(first + at, count), other = load(second + at, count);
                const bfloat16 *cos_of_second = cos + half, *sin_of_second = sin + half;
                store(first + at, one * load(cos + at, count) - other * load(sin + at, count), count);
                store(second + at, other * load(cos_of_second + at, count) + one * load(sin_of_second + at, count),
                      count);
            });
        }
}

}  // extern "C"
