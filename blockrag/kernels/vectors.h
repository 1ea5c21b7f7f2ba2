/* Vectors of floats as wide as the processor's, with what the kernels do to them, and the size of their inner blocks.
 *
 * The vector extensions of GCC and Clang: the same code becomes AVX-512, AVX2, SSE or NEON.
 */

#ifndef BLOCKRAG_VECTORS_H
#define BLOCKRAG_VECTORS_H

#include <math.h>
#include <stdint.h>

#if defined(__AVX__)
#include <immintrin.h>
#endif

/* ROWS x WIDE accumulators fit the registers beside what they are made from. */
#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 8 };
#elif defined(__AVX__)
enum { LANES = 8, ROWS = 4 };
#else
enum { LANES = 4, ROWS = 4 };
#endif
enum { WIDE = 3 };

/* Floats that memory brings at a time. */
enum { LINE = 16 };

#ifdef _OPENMP
enum { PARALLEL = 1 };
int omp_get_thread_num(void); /* omp.h may be missing where the runtime is torch's */
#else
enum { PARALLEL = 0 };
static inline int omp_get_thread_num(void) { return 0; }
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))
/* Loops over registers; their bounds are constants wherever they are inlined. */
#define UNROLL _Pragma("GCC unroll 16")

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

INLINE vec load(const float *from) { return *(const loose_vec *)from; }
INLINE void store(float *to, vec x) { *(loose_vec *)to = x; }
INLINE vec all(float x) { return x - (vec){0}; }
INLINE vec choose(ivec condition, vec yes, vec no) { return (vec)((condition & (ivec)yes) | (~condition & (ivec)no)); }

/* The second where either is not a number. */
INLINE vec larger(vec x, vec y) {
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)x, (__m512)y);
#elif defined(__AVX__)
    return (vec)_mm256_max_ps((__m256)x, (__m256)y);
#else
    return choose(x > y, x, y);
#endif
}

/* 2^x for x <= 0, to 2e-7 of it; 0 below 2^-126; not a number stays so. */
INLINE vec exp2_of(vec x) {
    const float magic = 12582912.0f + 127.0f; /* 1.5 * 2^23: adding it rounds, and leaves the biased exponent below */
    x = larger(all(-127.0f), x);
    vec rounded = x + magic, f = x - (rounded - magic);
    /* Least largest relative error on [-1/2, 1/2] among the polynomials that are 1 at 0: 9e-8. */
    vec p = all(1.32647285e-3f);
    p = p * f + 9.67151299e-3f;
    p = p * f + 5.55073358e-2f;
    p = p * f + 2.40222424e-1f;
    p = p * f + 6.93147004e-1f;
    p = p * f + 1.0f;
    return p * (vec)((ivec)rounded << 23);
}

INLINE float sum_of(vec x) {
    float lanes[LANES];
    store(lanes, x);
    UNROLL for (int half = LANES / 2; half; half /= 2)
        UNROLL for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

INLINE float largest_of(vec x) {
    float lanes[LANES];
    store(lanes, x);
    UNROLL for (int half = LANES / 2; half; half /= 2)
        UNROLL for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}

/* Lane i is the sum of the lanes of x[i], for LANES vectors, which are overwritten. */
INLINE vec sums_of(vec *x) {
    ivec lane;
    UNROLL for (int i = 0; i < LANES; i++) lane[i] = i;
    /* Lanes whose number has the bit come from the second vector of a pair; each is added to its neighbour by that bit. */
    UNROLL for (int bit = 1; bit < LANES; bit *= 2)
        UNROLL for (int i = 0; i < LANES; i += 2 * bit) {
            ivec own = lane + (((lane & bit) != 0) & (LANES - bit)), other = own + bit;
#if defined(__clang__)
            vec low, high;
            UNROLL for (int j = 0; j < LANES; j++) {
                low[j] = j & bit ? x[i + bit][j - bit] : x[i][j];
                high[j] = j & bit ? x[i + bit][j] : x[i][j + bit];
            }
            (void)own, (void)other;
#else
            vec low = __builtin_shuffle(x[i], x[i + bit], own), high = __builtin_shuffle(x[i], x[i + bit], other);
#endif
            x[i] = low + high;
        }
    return x[0];
}

#endif
