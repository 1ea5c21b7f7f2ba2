/* Placing one block into the caches of a prompt: read as it is at rest, convert, rotate, write; one pass over the bytes.
 *
 * A block's payload is read front to back, head after head, so that both sides are long runs of consecutive bytes. Where
 * sizes are multiples of eight, as in nearly all models, eight numbers at a time are converted, turned by the angle
 * table of their absolute position and written, without ever lying in between; all else goes through a small buffer.
 * The layout of the payload is that of blockrag/kv.py (float precisions) and blockrag/quantize.py (int8, int4).
 */

#include <stdint.h>
#include <string.h>

#if defined(__F16C__) || defined(__AVX__)
#include <immintrin.h>
#endif

enum { FLOAT32 = 1, BFLOAT16 = 2, FLOAT16 = 3, INT8 = 4, INT4 = 5 };
enum { ROPE_NONE = 0, ROPE_HALF = 1, ROPE_INTERLEAVED = 2 };

/* The widest head that is taken, and the tokens whose refinements are unpacked at a time. */
enum { MAX_DIM = 1024, TILE = 8 };

/* Where the keys, or the values, of one layer go; blockrag/kernels/place.py has the same fields. */
struct slot {
    float *rows;           /* heads x rows x dim; rows of a head are contiguous */
    int64_t head_stride;   /* floats from one head to the next */
    int64_t start;         /* absolute position of the first row */
    const float *cos;      /* positions x rope_dim / 2, from position 0 */
    const float *sin;
    int32_t heads;
    int32_t dim;
    int32_t rope;
    int32_t rope_start;    /* first rotated dimension */
    int32_t rope_dim;      /* rotated dimensions */
    int32_t group;         /* quantised: channels that share a scale of a token; 0 where each channel has one scale */
    int32_t streaming;     /* write past the processor's cache */
};

static float half_to_float(uint16_t half) {
#if defined(__F16C__)
    return _cvtsh_ss(half);
#endif
    /* Exponent and mantissa moved into place and rescaled, which is right for subnormal numbers too. */
    union { uint32_t bits; float value; } number = {(uint32_t)(half & 0x7fff) << 13}, scale = {(254u - 15u) << 23};
    number.value *= scale.value;
    if ((half & 0x7c00) == 0x7c00) number.bits |= 0x7f800000u;
    number.bits |= (uint32_t)(half & 0x8000) << 16;
    return number.value;
}

static void halves_to_floats(const uint16_t *restrict from, float *restrict to, int64_t count) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16)
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from + i))));
#elif defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
#endif
    for (; i < count; i++) to[i] = half_to_float(from[i]);
}

static void bfloats_to_floats(const uint16_t *restrict from, float *restrict to, int64_t count) {
    uint32_t *restrict bits = (uint32_t *)to;
    for (int64_t i = 0; i < count; i++) bits[i] = (uint32_t)from[i] << 16;
}

/* One row of four-bit numbers: byte j holds channel j in its low half and channel j + bytes in its high half. */
static void nibbles_to_floats(const uint8_t *restrict from, float *restrict to, int32_t dim) {
    int32_t bytes = (dim + 1) / 2;
    for (int32_t j = 0; j < bytes; j++) to[j] = (float)((int32_t)(from[j] & 15) - 8);
    for (int32_t j = 0; j < dim - bytes; j++) to[bytes + j] = (float)((int32_t)(from[j] >> 4) - 8);
}

static void rotate(float *restrict row, const struct slot *slot, const float *restrict cos, const float *restrict sin) {
    int32_t half = slot->rope_dim / 2;
    if (slot->rope == ROPE_HALF) {
        float *restrict first = row + slot->rope_start, *restrict second = first + half;
        for (int32_t i = 0; i < half; i++) {
            float x = first[i], y = second[i];
            first[i] = x * cos[i] - y * sin[i];
            second[i] = y * cos[i] + x * sin[i];
        }
    } else {
        float *restrict pairs = row + slot->rope_start;
        for (int32_t i = 0; i < half; i++) {
            float x = pairs[2 * i], y = pairs[2 * i + 1];
            pairs[2 * i] = x * cos[i] - y * sin[i];
            pairs[2 * i + 1] = y * cos[i] + x * sin[i];
        }
    }
}

/* Where the parts of one tensor lie in the payload. */
struct source {
    const uint8_t *scales, *elements;
    int64_t row_bytes, groups; /* groups of channels that share a scale of a token */
    /* Refined channels of keys, counted from the first channel of `heads` x `dim`, their zeros, their rows of nibbles. */
    const int32_t *refined, *zeros;
    const uint8_t *refinements;
    int64_t first_refined, end_refined, refined_before; /* refined_before: number of the tensor's first channel */
};

/* The scales that apply to one token of a head, as floats: one per channel, or one per group of channels. */
static void read_scales(const struct slot *slot, const struct source *source, int64_t tokens, int32_t head,
                        int64_t token, float *restrict scales) {
    const uint16_t *at = (const uint16_t *)source->scales;
    if (slot->group)
        halves_to_floats(at + (head * tokens + token) * source->groups, scales, source->groups);
    else
        halves_to_floats(at + (int64_t)head * slot->dim, scales, slot->dim);
}

/* What refinement adds to the numbers of `count` tokens of a head; zero where a channel is not refined.
 *
 * Several tokens at a time: a vector read right behind the single numbers written into it would have to wait. */
static void read_refinements(const struct slot *slot, const struct source *source, int64_t tokens, int32_t head,
                             int64_t token, int64_t count, int64_t first, int64_t end, float *restrict added) {
    int64_t bytes = (tokens + 1) / 2, before = source->refined_before + (int64_t)head * slot->dim;
    for (int64_t r = first; r < end; r++) {
        const uint8_t *pairs = source->refinements + r * bytes;
        float *column = added + (source->refined[r] - before);
        for (int64_t t = token; t < token + count; t++) {
            int32_t number = t < bytes ? pairs[t] & 15 : pairs[t - bytes] >> 4;
            column[(t - token) * slot->dim] = (float)source->zeros[r] + (float)(number - 8) * 0.0625f;
        }
    }
}

/* One token of one head, any sizes: `row` at rest to `to` in the cache. */
static void place_row(const struct slot *slot, int precision, const uint8_t *row, const float *scales,
                      const float *added, int64_t position, float *restrict to) {
    float numbers[MAX_DIM];
    int32_t dim = slot->dim;
    switch (precision) {
    case FLOAT32: memcpy(numbers, row, (size_t)dim * sizeof(float)); break;
    case BFLOAT16: bfloats_to_floats((const uint16_t *)row, numbers, dim); break;
    case FLOAT16: halves_to_floats((const uint16_t *)row, numbers, dim); break;
    case INT8: for (int32_t i = 0; i < dim; i++) numbers[i] = (float)((const int8_t *)row)[i]; break;
    case INT4: nibbles_to_floats(row, numbers, dim); break;
    }
    if (precision >= INT8)
        for (int32_t i = 0; i < dim; i++) {
            if (added) numbers[i] += added[i];
            numbers[i] *= scales[slot->group ? i / slot->group : i];
        }
    if (slot->rope != ROPE_NONE) {
        int64_t angle = position * (slot->rope_dim / 2);
        rotate(numbers, slot, slot->cos + angle, slot->sin + angle);
    }
    memcpy(to, numbers, (size_t)dim * sizeof(float));
}

typedef float eight __attribute__((vector_size(32)));
typedef float eight_anywhere __attribute__((vector_size(32), aligned(4)));
typedef int32_t eight_ints __attribute__((vector_size(32)));
#define INLINE static inline __attribute__((always_inline))

/* Eight integers of one or two bytes as 32-bit ones. Compilers widen vectors of half a register poorly. */
#if defined(__AVX2__)
INLINE eight_ints widen_signed(const uint8_t *from) {
    return (eight_ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from));
}
INLINE eight_ints widen_unsigned(const uint8_t *from) {
    return (eight_ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
}
INLINE eight_ints widen_halves(const uint8_t *from) {
    return (eight_ints)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
}
#else
#define WIDEN(name, type) \
    INLINE eight_ints name(const uint8_t *from) { \
        eight_ints numbers; \
        for (int k = 0; k < 8; k++) numbers[k] = ((const type *)from)[k]; \
        return numbers; \
    }
WIDEN(widen_signed, int8_t)
WIDEN(widen_unsigned, uint8_t)
WIDEN(widen_halves, uint16_t)
#undef WIDEN
#endif

/* Channels i to i + 7 of a row at rest, without scales. */
INLINE eight load(int precision, const uint8_t *row, int32_t i, int32_t dim) {
    if (precision == FLOAT32) return *(const eight_anywhere *)(row + 4 * i);
    if (precision == BFLOAT16) return (eight)(widen_halves(row + 2 * i) << 16);
    if (precision == FLOAT16) {
#if defined(__F16C__)
        return (eight)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(row + 2 * i)));
#else
        eight numbers;
        for (int k = 0; k < 8; k++) numbers[k] = half_to_float(((const uint16_t *)row)[i + k]);
        return numbers;
#endif
    }
    eight_ints numbers;
    if (precision == INT8) {
        numbers = widen_signed(row + i);
    } else {
        int32_t high = i >= dim / 2;
        eight_ints pairs = widen_unsigned(row + (high ? i - dim / 2 : i));
        numbers = (high ? pairs >> 4 : pairs & 15) - 8;
    }
    return __builtin_convertvector(numbers, eight);
}

INLINE void store(float *to, eight numbers, int streaming) {
#if defined(__AVX__)
    if (streaming) {
        _mm256_stream_ps(to, (__m256)numbers);
        return;
    }
#endif
    *(eight_anywhere *)to = numbers;
}

/* As place_row, for sizes that are multiples of eight and a rotation of halves, or none. */
INLINE void place_row_by_eights(const struct slot *slot, int precision, int streaming, const uint8_t *row,
                                const float *scales, const float *added, int64_t position, float *to) {
    int32_t dim = slot->dim, half = slot->rope_dim / 2, group_bits = slot->group ? __builtin_ctz(slot->group) : 0;
    int32_t first = slot->rope != ROPE_NONE ? slot->rope_start : dim, end = first + 2 * half;
#define SCALED(i) \
    (precision < INT8 ? load(precision, row, i, dim) \
     : slot->group    ? load(precision, row, i, dim) * scales[(i) >> group_bits] \
     : added ? (load(precision, row, i, dim) + *(const eight_anywhere *)(added + (i))) * EIGHT_SCALES(i) \
             : load(precision, row, i, dim) * EIGHT_SCALES(i))
#define EIGHT_SCALES(i) (*(const eight_anywhere *)(scales + (i)))
    for (int32_t i = 0; i < first; i += 8) store(to + i, SCALED(i), streaming);
    if (slot->rope == ROPE_NONE) return;
    const float *cosines = slot->cos + position * half, *sines = slot->sin + position * half;
    for (int32_t i = 0; i < half; i += 8) {
        eight x = SCALED(first + i), y = SCALED(first + half + i);
        eight cos = *(const eight_anywhere *)(cosines + i), sin = *(const eight_anywhere *)(sines + i);
        store(to + first + i, x * cos - y * sin, streaming);
        store(to + first + half + i, y * cos + x * sin, streaming);
    }
    for (int32_t i = end; i < dim; i += 8) store(to + i, SCALED(i), streaming);
#undef SCALED
#undef EIGHT_SCALES
}

static int by_eights(const struct slot *slot, int precision) {
    if (slot->dim % (precision == INT4 ? 16 : 8) || slot->rope == ROPE_INTERLEAVED) return 0;
    if (slot->rope == ROPE_HALF && (slot->rope_start % 8 || slot->rope_dim % 16)) return 0;
    /* Groups of a power of two, no less than eight, or none. */
    return precision < INT8 || (slot->group % 8 == 0 && (slot->group & (slot->group - 1)) == 0);
}

INLINE void place_tensor(const struct slot *slot, const struct source *source, int precision, int eights, int streaming,
                         int64_t tokens, int64_t position) {
    float scales[MAX_DIM], refinements[TILE * MAX_DIM];
    /* A windowed layer keeps only the tail of the prompt. */
    int64_t unseen = slot->start > position ? slot->start - position : 0;
    int64_t first = source->first_refined;
    for (int32_t head = 0; head < slot->heads; head++) {
        const uint8_t *row = source->elements + (head * tokens + unseen) * source->row_bytes;
        float *to = slot->rows + head * slot->head_stride + (position + unseen - slot->start) * slot->dim;
        int64_t end = first;
        while (end < source->end_refined &&
               source->refined[end] < source->refined_before + (int64_t)(head + 1) * slot->dim)
            end++;
        int refined = first < end;
        if (refined) memset(refinements, 0, (size_t)(TILE * slot->dim) * sizeof(float));
        for (int64_t t = unseen; t < tokens; t++, row += source->row_bytes, to += slot->dim) {
            if (precision >= INT8) {
                if (slot->group || t == unseen) read_scales(slot, source, tokens, head, t, scales);
                if (refined && (t - unseen) % TILE == 0) {
                    int64_t count = tokens - t < TILE ? tokens - t : TILE;
                    read_refinements(slot, source, tokens, head, t, count, first, end, refinements);
                }
            }
            const float *added = refined ? refinements + (t - unseen) % TILE * slot->dim : 0;
            if (eights)
                place_row_by_eights(slot, precision, streaming, row, scales, added, position + t, to);
            else
                place_row(slot, precision, row, scales, added, position + t, to);
        }
        first = end;
    }
}

/* Every combination that matters gets code of its own. */
static void place_slot(const struct slot *slot, const struct source *source, int precision, int64_t tokens,
                       int64_t position) {
    int streaming = slot->streaming && slot->head_stride % 8 == 0 && ((uintptr_t)slot->rows & 31) == 0;
#define CASE(code) \
    case code: \
        if (!by_eights(slot, code)) place_tensor(slot, source, code, 0, 0, tokens, position); \
        else if (streaming) place_tensor(slot, source, code, 1, 1, tokens, position); \
        else place_tensor(slot, source, code, 1, 0, tokens, position); \
        return;
    switch (precision) {
        CASE(FLOAT32)
        CASE(BFLOAT16)
        CASE(FLOAT16)
        CASE(INT8)
        CASE(INT4)
    }
#undef CASE
}

static int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }

/* Place a block of `tokens` tokens at `position` into the slots first, first + 1, ..., last - 1 of all `slots`.
 *
 * `slots` are in the order of the payload: keys, then values, layer after layer. `refined` is how many key channels of
 * a quantised block are refined, 0 for others. Returns 0, or -1 where a head is wider than this code takes or the
 * precision is unknown; then nothing was written. */
int blockrag_place(const struct slot *slots, int32_t first, int32_t last, const uint8_t *payload, int32_t precision,
                   int64_t refined, int64_t tokens, int64_t position) {
    static const int64_t bits[] = {0, 32, 16, 16, 8, 4};
    if (precision < FLOAT32 || precision > INT4) return -1;
    for (int32_t s = first; s < last; s++)
        if (slots[s].dim > MAX_DIM) return -1;
    const int32_t *channels = (const int32_t *)payload, *zeros = channels + refined;
    const uint8_t *refinements = payload + aligned(8 * refined);
    int64_t offset = aligned(aligned(8 * refined) + refined * ((tokens + 1) / 2));
    int64_t channel = 0, next = 0;
    for (int32_t s = 0; s < last; s++) {
        const struct slot *slot = &slots[s];
        struct source source = {0, 0, (slot->dim * bits[precision] + 7) / 8, 0, channels, zeros, refinements,
                                next, next, channel};
        if (s % 2 == 0) {
            channel += (int64_t)slot->heads * slot->dim;
            while (next < refined && channels[next] < channel) next++;
            source.end_refined = next;
        }
        if (precision >= INT8) {
            source.groups = slot->group ? (slot->dim + slot->group - 1) / slot->group : 0;
            source.scales = payload + offset;
            offset += aligned(2 * slot->heads * (slot->group ? tokens * source.groups : slot->dim));
        }
        source.elements = payload + offset;
        offset += slot->heads * tokens * source.row_bytes;
        if (precision >= INT8) offset = aligned(offset);
        if (s >= first) place_slot(slot, &source, precision, tokens, position);
    }
#if defined(__AVX__)
    _mm_sfence();
#endif
    return 0;
}
