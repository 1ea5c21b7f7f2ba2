/* A linear layer in float32, X W^T + bias, with the weights as they lie in the model.
 *
 * The rows of X lie in the lanes of the vectors, so X is transposed once, which is little beside W when X has few rows;
 * a number of W is then multiplied with a vector of rows at a time. A few rows behind the last vector are taken as dot
 * products. Each output is summed in the same order whatever the threads do.
 */

#include <string.h>

#include "vectors.h"

enum {
    FEW = WIDE,                /* rows for which dot products cost less than a vector of them */
    BLOCK = 128,               /* products added up before they join their total: bounds the rounding */
    STEP = 64,                 /* columns of X transposed at a time */
    CHUNK_FLOATS = 1 << 16,    /* weights of a unit of work: they stay in the second-level cache */
    LEAST_PRODUCTS = 1 << 18,  /* products that are worth a thread */
};

/* blockrag/kernels/linear.py has the same fields. All matrices are contiguous. */
struct linear {
    const float *input;  /* rows x in_features */
    const float *weight; /* out_features x in_features */
    const float *bias;   /* out_features; null for none */
    float *output;       /* rows x out_features */
    float *scratch;      /* of blockrag_linear_scratch floats */
    int64_t rows, in_features, out_features;
    int32_t threads; /* at most */
};

/* Vectors of rows, the last one perhaps not full; rows behind them are few. */
static int64_t vectors_of(const struct linear *l) { return l->rows / LANES + (l->rows % LANES > FEW); }

/* Vectors of the next panel: an even cut keeps more accumulators busy. */
static int64_t next_panel(int64_t vectors) { return ceil_div(vectors, ceil_div(vectors, WIDE)); }

/* Sums of one block of columns for some weights and a panel of rows, on top of `totals`. */
INLINE void multiply(const float *weight, int64_t stride, const float *input, int64_t columns, float *totals,
                     const int weights, const int wide) {
    vec sum[ROWS][WIDE];
    UNROLL for (int n = 0; n < weights; n++)
        UNROLL for (int w = 0; w < wide; w++) sum[n][w] = (vec){0};
    for (int64_t d = 0; d < columns; d++, input += wide * LANES) {
        /* The next weights, while there are these to work on. */
        if (weights == ROWS && d % LINE == 0)
            UNROLL for (int n = 0; n < weights; n++) __builtin_prefetch(weight + (n + ROWS) * stride + d, 0, 2);
        vec x[WIDE];
        UNROLL for (int w = 0; w < wide; w++) x[w] = load(input + w * LANES);
        UNROLL for (int n = 0; n < weights; n++) {
            vec k = all(weight[n * stride + d]);
            UNROLL for (int w = 0; w < wide; w++) sum[n][w] += k * x[w];
        }
    }
    UNROLL for (int n = 0; n < weights; n++)
        UNROLL for (int w = 0; w < wide; w++) {
            float *total = totals + (n * wide + w) * LANES;
            store(total, load(total) + sum[n][w]);
        }
}

INLINE void panel_of_weights(const struct linear *l, const float *packed, int64_t row, int64_t first,
                             const int weights, const int wide) {
    float totals[ROWS * WIDE * LANES] = {0};
    const float *weight = l->weight + first * l->in_features;
    for (int64_t d = 0; d < l->in_features; d += BLOCK)
        multiply(weight + d, l->in_features, packed + d * wide * LANES, at_most(l->in_features - d, BLOCK), totals,
                 weights, wide);
    for (int64_t r = 0; r < at_most(l->rows - row, wide * LANES); r++)
        for (int n = 0; n < weights; n++)
            l->output[(row + r) * l->out_features + first + n] =
                totals[n * wide * LANES + r] + (l->bias ? l->bias[first + n] : 0);
}

INLINE void panel(const struct linear *l, int64_t row, int64_t first, int64_t last, const int wide) {
    const float *packed = l->scratch + row * l->in_features;
    int64_t n = first;
    for (; n + ROWS <= last; n += ROWS) panel_of_weights(l, packed, row, n, ROWS, wide);
    for (; n < last; n++) panel_of_weights(l, packed, row, n, 1, wide);
}

/* Some rows by dot products. */
INLINE void dots(const struct linear *l, int64_t row, int64_t first, const int rows, const int weights) {
    int64_t stride = l->in_features, whole = stride / LANES * LANES;
    const float *input = l->input + row * stride, *weight = l->weight + first * stride;
    vec sum[WIDE * ROWS + LANES] = {{0}};
    for (int64_t d = 0; d < whole; d += LANES) {
        vec x[WIDE];
        UNROLL for (int r = 0; r < rows; r++) x[r] = load(input + r * stride + d);
        UNROLL for (int n = 0; n < weights; n++) {
            vec k = load(weight + n * stride + d);
            UNROLL for (int r = 0; r < rows; r++) sum[r * ROWS + n] += k * x[r];
        }
    }
    float totals[WIDE * ROWS + LANES];
    UNROLL for (int i = 0; i < rows * ROWS; i += LANES) store(totals + i, sums_of(sum + i));
    for (int n = 0; n < weights; n++)
        for (int r = 0; r < rows; r++) {
            float total = totals[r * ROWS + n];
            for (int64_t d = whole; d < stride; d++) total += input[r * stride + d] * weight[n * stride + d];
            l->output[(row + r) * l->out_features + first + n] = total + (l->bias ? l->bias[first + n] : 0);
        }
}

/* The few rows from `row` on. */
INLINE void rest(const struct linear *l, int64_t row, int64_t first, const int weights) {
    switch (l->rows - row) {
    case 1: dots(l, row, first, 1, weights); break;
    case 2: dots(l, row, first, 2, weights); break;
    case 3: dots(l, row, first, 3, weights); break;
    }
}

/* Some columns of X: per panel, columns x lanes. */
static void pack(const struct linear *l, int64_t first, int64_t last) {
    for (int64_t row = 0, wide, left = vectors_of(l); left > 0; row += wide * LANES, left -= wide) {
        wide = next_panel(left);
        int64_t lanes = wide * LANES, rows = at_most(l->rows - row, lanes);
        float *to = l->scratch + row * l->in_features;
        for (int64_t d = first; d < last; d++) {
            for (int64_t r = 0; r < rows; r++) to[d * lanes + r] = l->input[(row + r) * l->in_features + d];
            for (int64_t r = rows; r < lanes; r++) to[d * lanes + r] = 0;
        }
    }
}

/* All rows for some weights. */
static void chunk(const struct linear *l, int64_t first, int64_t last) {
    int64_t row = 0;
    for (int64_t wide, left = vectors_of(l); left > 0; row += wide * LANES, left -= wide) {
        wide = next_panel(left);
        if (wide == 1)
            panel(l, row, first, last, 1);
        else if (wide == 2)
            panel(l, row, first, last, 2);
        else
            panel(l, row, first, last, 3);
    }
    int64_t n = first;
    for (; n + ROWS <= last; n += ROWS) rest(l, row, n, ROWS);
    for (; n < last; n++) rest(l, row, n, 1);
}

/* Whether this build can beat oneDNN: with vectors of eight it was measured not to, and one thread loses to many. */
int blockrag_linear_pays(int32_t threads) { return LANES >= 16 && (PARALLEL || threads == 1); }

/* Floats of scratch that the product needs. */
int64_t blockrag_linear_scratch(const struct linear *l) { return vectors_of(l) * LANES * l->in_features; }

void blockrag_linear(const struct linear *l) {
    int64_t products = l->rows * l->in_features * l->out_features;
    int threads = (int)at_least(1, at_most(l->threads, products / LEAST_PRODUCTS));
    /* No more than fits, and several units to a thread. */
    int64_t fit = CHUNK_FLOATS / l->in_features, share = l->out_features / (4 * threads);
    int64_t weights = at_least(1, at_most(fit, share) / ROWS) * ROWS;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t d = 0; d < l->in_features; d += STEP) pack(l, d, at_most(d + STEP, l->in_features));
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < l->out_features; n += weights) chunk(l, n, at_most(n + weights, l->out_features));
    }
}
