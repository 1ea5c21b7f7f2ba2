/* Attention of few queries over many tokens: softmax(scale * Q K^T + mask) V in float32.
 *
 * The query rows lie in the lanes of the vectors, so that keys and values are read as they lie in the cache, a number
 * of K or a row of V at a time, and the softmax needs no sums across lanes. The tokens come in tiles; a running maximum
 * and sum per row make the softmax of the whole from those of the tiles (Milakov and Gimelshein, arXiv 1805.02867).
 * All rows that share a key head (grouped queries) are one matrix. Rows that would leave most of a vector empty, as in
 * decoding, have the tokens in the lanes instead. Where there are too few heads for the threads, the tokens are split
 * as well, and the parts are merged by their maxima and sums.
 *
 * What is computed depends on the number of threads, never on their timing.
 */

#include <string.h>

#include "vectors.h"

enum {
    TILE = 64,         /* tokens at a time: their keys and values stay in the first-level cache */
    FEW = LANES / 2,   /* rows that have the tokens in the lanes; more cost less than a vector of them */
    MOST_ROWS = 512,   /* query rows of a unit of work: queries and outputs stay in the second-level cache */
    LEAST_SPLIT = 256, /* tokens that are worth a unit of their own */
    LEAST_FLOATS = 1 << 14, /* keys and values whose reading is worth a thread */
    LEAST_PRODUCTS = 1 << 18, /* products that are worth a thread */
};

typedef uint64_t mask_tile __attribute__((vector_size(TILE), aligned(1), may_alias));

/* What to compute; blockrag/kernels/attention.py has the same fields. Strides count elements; rows are contiguous. */
struct attention {
    const float *query;  /* batch, heads, queries, dim */
    const float *key;    /* batch, kv_heads, tokens, dim */
    const float *value;  /* batch, kv_heads, tokens, value_dim */
    const uint8_t *mask; /* batch, heads, queries, tokens of 0 or 1; null for none */
    float *output;       /* batch, queries, heads, value_dim, contiguous */
    float *scratch;      /* of blockrag_attention_scratch floats */
    int64_t query_strides[3], key_strides[3], value_strides[3], mask_strides[3];
    int64_t batch, heads, kv_heads, queries, tokens, dim, value_dim;
    int32_t causal; /* the last query sees every token, the one before it all but the last, and so on */
    int32_t threads; /* at most; few tokens are not worth waking them */
    float scale; /* above 0 */
};

/* How the work is cut into units, and the lengths of what the scratch holds, in floats. */
struct plan {
    int64_t rows, row_blocks, block_rows; /* of a key head, and in units */
    int64_t threads, splits, split_tokens, units;
    int64_t width;   /* value_dim in whole vectors */
    int64_t lanes;   /* block_rows in whole vectors */
    int64_t private; /* of a thread: weights, values, queries */
    int64_t partial; /* of a unit, or of a thread where nothing is merged: outputs, maxima, sums */
};

/* Where a unit works. */
struct unit {
    int64_t batch, kv_head, first_row, rows, first_token, last_token;
    float *weights;                 /* scores, then their exponentials: tile x lanes of a panel, or few x tile */
    float *values;                  /* tile x width, where value_dim is no whole number of vectors */
    float *queries;                 /* per panel dim x lanes, or few x dim */
    float *outputs, *maxima, *sums; /* lanes x width, lanes, lanes; the maxima as exponents of two */
};

static struct plan plan_of(const struct attention *a) {
    struct plan plan = {.rows = a->heads / a->kv_heads * a->queries};
    plan.row_blocks = ceil_div(plan.rows, MOST_ROWS);
    plan.block_rows = plan.rows;
    if (plan.row_blocks > 1) {
        plan.block_rows = round_up(ceil_div(plan.rows, plan.row_blocks), WIDE * LANES);
        plan.row_blocks = ceil_div(plan.rows, plan.block_rows);
    }
    int64_t heads = a->batch * a->kv_heads * plan.row_blocks;
    int64_t floats = a->batch * a->kv_heads * a->tokens * (a->dim + a->value_dim), products = floats * plan.rows;
    int64_t worth = at_least(floats / LEAST_FLOATS, products / LEAST_PRODUCTS);
    plan.threads = at_least(1, at_most(a->threads, worth));
    int64_t most = at_most(a->tokens / LEAST_SPLIT, plan.threads);
    /* The fewest splits that keep the threads busy for 95 % of the time; failing that, the busiest. */
    double best = 0;
    for (int64_t splits = 1; best < 0.95 && (splits == 1 || splits <= most); splits++) {
        int64_t units = heads * splits;
        double busy = (double)units / (double)round_up(units, plan.threads);
        if (busy > best) best = busy, plan.splits = splits;
    }
    plan.split_tokens = round_up(ceil_div(a->tokens, plan.splits), TILE);
    plan.splits = ceil_div(a->tokens, plan.split_tokens);
    plan.units = heads * plan.splits;
    plan.width = round_up(a->value_dim, LANES);
    plan.lanes = round_up(plan.block_rows, LANES);
    plan.private = TILE * WIDE * LANES + TILE * plan.width + plan.lanes * a->dim;
    plan.partial = plan.lanes * (plan.width + 2);
    return plan;
}

static struct unit unit_of(const struct attention *a, const struct plan *plan, int64_t index) {
    int64_t split = index % plan->splits, block = index / plan->splits % plan->row_blocks;
    int64_t head = index / plan->splits / plan->row_blocks;
    struct unit u = {.batch = head / a->kv_heads, .kv_head = head % a->kv_heads};
    u.first_row = block * plan->block_rows;
    u.rows = at_most(plan->rows - u.first_row, plan->block_rows);
    u.first_token = split * plan->split_tokens;
    u.last_token = at_most(u.first_token + plan->split_tokens, a->tokens);
    return u;
}

/* Vectors of the next panel when `rows` rows are left; 0 for few rows. */
static int panel_of(int64_t rows) {
    if (rows >= WIDE * LANES) return WIDE;
    int whole = (int)(rows / LANES), more = (int)(rows % LANES);
    return whole + (more > FEW);
}

static int64_t rows_of(int panel, int64_t left) { return panel ? at_most(left, panel * LANES) : left; }

static int64_t head_of(const struct attention *a, const struct unit *u, int64_t row) {
    return u->kv_head * (a->heads / a->kv_heads) + row / a->queries;
}

static const float *key_of(const struct attention *a, const struct unit *u, int64_t token) {
    return a->key + u->batch * a->key_strides[0] + u->kv_head * a->key_strides[1] + token * a->key_strides[2];
}

static const float *value_of(const struct attention *a, const struct unit *u, int64_t token) {
    return a->value + u->batch * a->value_strides[0] + u->kv_head * a->value_strides[1] + token * a->value_strides[2];
}

static const uint8_t *mask_of(const struct attention *a, const struct unit *u, int64_t row, int64_t token) {
    return a->mask + u->batch * a->mask_strides[0] + head_of(a, u, row) * a->mask_strides[1] +
           row % a->queries * a->mask_strides[2] + token;
}

/* Tokens that a row sees from the first on, the mask aside. */
static int64_t horizon(const struct attention *a, int64_t row) {
    return a->causal ? a->tokens - a->queries + 1 + row % a->queries : a->tokens;
}

enum sight { NOTHING, SOMETHING, EVERYTHING };

/* What `rows` rows from `row` on see of `tokens` tokens from `token` on. */
static enum sight sight_of(const struct attention *a, const struct unit *u, int64_t row, int64_t rows, int64_t token,
                           int64_t tokens) {
    int some = 1, every = 1;
    if (token + tokens > horizon(a, 0)) {
        some = 0;
        for (int64_t r = row; r < row + rows; r++) {
            some |= horizon(a, r) > token;
            every &= horizon(a, r) >= token + tokens;
        }
    }
    if (!some || !a->mask) return !some ? NOTHING : every ? EVERYTHING : SOMETHING;
    mask_tile either = {0}, both = ~either;
    for (int64_t r = row; r < row + rows; r++) {
        const uint8_t *mask = mask_of(a, u, r, token);
        mask_tile seen;
        if (tokens < TILE) memset(&seen, *mask, sizeof seen);
        memcpy(&seen, mask, (size_t)tokens);
        either |= seen;
        both &= seen;
    }
    uint64_t any = 0, whole = ~(uint64_t)0;
    for (int i = 0; i < TILE / 8; i++) any |= either[i], whole &= both[i];
    if (!any) return NOTHING;
    return every && whole == 0x0101010101010101u ? EVERYTHING : SOMETHING;
}

/* What is not to be seen scores -infinity. */
static void hide(const struct attention *a, const struct unit *u, int64_t row, int64_t rows, int64_t token,
                 int64_t tokens, float *scores, int64_t row_step, int64_t token_step) {
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *mask = a->mask ? mask_of(a, u, row + r, token) : 0;
        int64_t seen = horizon(a, row + r) - token;
        for (int64_t t = 0; t < tokens; t++)
            if (t >= seen || (mask && !mask[t])) scores[r * row_step + t * token_step] = -INFINITY;
    }
}

/* Ask for keys and values of the next tile, while there is this one to work on. Inlined, because GCC drops the call of a
 * function that does nothing else. */
INLINE void fetch(const struct attention *a, const struct unit *u, int64_t token, int64_t tokens) {
    const float *key = key_of(a, u, token), *value = value_of(a, u, token);
    for (int64_t left = at_most(tokens, u->last_token - token); left > 0; left--) {
        for (int64_t d = 0; d < a->dim; d += LINE) __builtin_prefetch(key + d, 0, 2);
        for (int64_t d = 0; d < a->value_dim; d += LINE) __builtin_prefetch(value + d, 0, 2);
        key += a->key_strides[2];
        value += a->value_strides[2];
    }
}

/* Scores of a few tokens for a panel, and the maximum of each row so far. */
INLINE void score(const float *key, int64_t stride, const float *query, int64_t dim, float *scores, vec *maxima,
                  const int tokens, const int wide) {
    vec sum[ROWS][WIDE];
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int w = 0; w < wide; w++) sum[t][w] = (vec){0};
    for (int64_t d = 0; d < dim; d++, query += wide * LANES) {
        vec q[WIDE];
        UNROLL for (int w = 0; w < wide; w++) q[w] = load(query + w * LANES);
        UNROLL for (int t = 0; t < tokens; t++) {
            vec k = all(key[t * stride + d]);
            UNROLL for (int w = 0; w < wide; w++) sum[t][w] += k * q[w];
        }
    }
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int w = 0; w < wide; w++) {
            store(scores + (t * wide + w) * LANES, sum[t][w]);
            maxima[w] = larger(maxima[w], sum[t][w]);
        }
}

INLINE void score_tile(const struct attention *a, const struct unit *u, int64_t lane, int64_t token, int64_t tokens,
                       vec *maxima, const int wide) {
    const float *query = u->queries + lane * a->dim;
    float *scores = u->weights;
    int64_t t = 0;
    for (; t + ROWS <= tokens; t += ROWS, scores += ROWS * wide * LANES) {
        if (!lane) fetch(a, u, token + t + TILE, ROWS);
        score(key_of(a, u, token + t), a->key_strides[2], query, a->dim, scores, maxima, ROWS, wide);
    }
    for (; t < tokens; t++, scores += wide * LANES)
        score(key_of(a, u, token + t), a->key_strides[2], query, a->dim, scores, maxima, 1, wide);
}

/* What a score is multiplied by to be an exponent of two. */
static float exponent_scale(const struct attention *a) { return a->scale * 1.44269504088896341f; }

/* Scores to weights relative to the new maxima; `factors` bring what was summed so far to the new maxima. */
INLINE void weigh_tile(const struct unit *u, int64_t lane, int64_t tokens, float scale, const vec *tile_maxima,
                       float *factors, const int wide) {
    vec shift[WIDE], sum[WIDE];
    UNROLL for (int w = 0; w < wide; w++) {
        float *maximum = u->maxima + lane + w * LANES;
        vec before = load(maximum), now = larger(before, tile_maxima[w] * scale);
        store(maximum, now);
        /* A row that has seen nothing yet has no finite maximum, and its weights must become 0. */
        shift[w] = choose(now == -INFINITY, (vec){0}, now);
        vec factor = exp2_of(before - shift[w]);
        store(factors + w * LANES, factor);
        sum[w] = load(u->sums + lane + w * LANES) * factor;
    }
    for (int64_t t = 0; t < tokens; t++)
        UNROLL for (int w = 0; w < wide; w++) {
            float *at = u->weights + (t * wide + w) * LANES;
            vec weight = exp2_of(load(at) * scale - shift[w]);
            store(at, weight);
            sum[w] += weight;
        }
    UNROLL for (int w = 0; w < wide; w++) store(u->sums + lane + w * LANES, sum[w]);
}

/* Add weighted values of a tile to some columns of some rows. */
INLINE void add(float *output, int64_t width, const float *weights, int64_t row_step, int64_t token_step,
                const float *value, int64_t stride, int64_t tokens, const float *factors, const int rows,
                const int wide) {
    vec sum[ROWS][WIDE];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int w = 0; w < wide; w++) sum[r][w] = load(output + r * width + w * LANES) * factors[r];
    for (int64_t t = 0; t < tokens; t++, value += stride, weights += token_step) {
        vec v[WIDE];
        UNROLL for (int w = 0; w < wide; w++) v[w] = load(value + w * LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            vec p = all(weights[r * row_step]);
            UNROLL for (int w = 0; w < wide; w++) sum[r][w] += p * v[w];
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int w = 0; w < wide; w++) store(output + r * width + w * LANES, sum[r][w]);
}

INLINE void add_columns(float *output, int64_t width, const float *weights, int64_t row_step, int64_t token_step,
                        const float *value, int64_t stride, int64_t tokens, const float *factors, int64_t rows,
                        const int wide) {
    int64_t r = 0;
#define ADD(COUNT)                                                                                                     \
    for (; rows - r >= COUNT; r += COUNT)                                                                              \
        add(output + r * width, width, weights + r * row_step, row_step, token_step, value, stride, tokens,            \
            factors + r, COUNT, wide);
    ADD(ROWS)
    ADD(4)
    ADD(2)
    ADD(1)
#undef ADD
}

INLINE void add_rows(float *output, int64_t width, const float *weights, int64_t row_step, int64_t token_step,
                     const float *value, int64_t stride, int64_t tokens, const float *factors, int64_t rows) {
    for (int64_t left = width / LANES, wide; left > 0; left -= wide) {
        /* Four are two and two rather than three and one: an even cut keeps more accumulators busy. */
        wide = ceil_div(left, ceil_div(left, WIDE));
        if (wide == 1)
            add_columns(output, width, weights, row_step, token_step, value, stride, tokens, factors, rows, 1);
        else if (wide == 2)
            add_columns(output, width, weights, row_step, token_step, value, stride, tokens, factors, rows, 2);
        else
            add_columns(output, width, weights, row_step, token_step, value, stride, tokens, factors, rows, 3);
        output += wide * LANES;
        value += wide * LANES;
    }
}

static void add_tile(float *output, int64_t width, const float *weights, int64_t lanes, const float *value,
                     int64_t stride, int64_t tokens, const float *factors, int64_t rows) {
    add_rows(output, width, weights, 1, lanes, value, stride, tokens, factors, rows);
}

static void add_few(float *output, int64_t width, const float *weights, const float *value, int64_t stride,
                    int64_t tokens, const float *factors, int64_t rows) {
    add_rows(output, width, weights, TILE, 1, value, stride, tokens, factors, rows);
}

INLINE void panel(const struct attention *a, const struct unit *u, int64_t width, int64_t lane, int64_t rows,
                  int64_t token, int64_t tokens, const float *value, int64_t stride, const int wide) {
    enum sight sight = sight_of(a, u, u->first_row + lane, rows, token, tokens);
    if (sight == NOTHING) return;
    vec maxima[WIDE];
    UNROLL for (int w = 0; w < wide; w++) maxima[w] = all(-INFINITY);
    score_tile(a, u, lane, token, tokens, maxima, wide);
    if (sight == SOMETHING) {
        hide(a, u, u->first_row + lane, rows, token, tokens, u->weights, 1, wide * LANES);
        UNROLL for (int w = 0; w < wide; w++) maxima[w] = all(-INFINITY);
        for (int64_t t = 0; t < tokens; t++)
            UNROLL for (int w = 0; w < wide; w++)
                maxima[w] = larger(maxima[w], load(u->weights + (t * wide + w) * LANES));
    }
    float factors[WIDE * LANES];
    weigh_tile(u, lane, tokens, exponent_scale(a), maxima, factors, wide);
    add_tile(u->outputs + lane * width, width, u->weights, wide * LANES, value, stride, tokens, factors, rows);
}

/* Scores of one row for as many tokens as there are lanes. */
INLINE vec score_row(const float *key, int64_t stride, const float *query, int64_t dim) {
    int64_t whole = dim / LANES * LANES;
    vec sum[LANES] = {{0}};
    /* ROWS tokens at a time: more would not have their addresses in registers. */
    UNROLL for (int first = 0; first < LANES; first += ROWS) {
        const float *keys = key + first * stride;
        for (int64_t d = 0; d < whole; d += LANES) {
            vec q = load(query + d);
            UNROLL for (int i = 0; i < ROWS; i++) sum[first + i] += q * load(keys + i * stride + d);
        }
    }
    vec dots = sums_of(sum);
    for (int64_t d = whole; d < dim; d++) {
        vec k;
        UNROLL for (int i = 0; i < LANES; i++) k[i] = key[i * stride + d];
        dots += k * query[d];
    }
    return dots;
}

/* Scores of a tile for few rows, the tokens in the lanes; -infinity behind the last token. */
static void score_few(const struct attention *a, const struct unit *u, int64_t lane, int64_t rows, int64_t token,
                      int64_t tokens) {
    const float *query = u->queries + lane * a->dim;
    int64_t stride = a->key_strides[2], t = 0;
    for (; t + LANES <= tokens; t += LANES) {
        for (int64_t r = 0; r < rows; r++) {
            /* A share with each row: what is asked for all at once, beyond what can be under way, is dropped. */
            int64_t from = r * LANES / rows, to = (r + 1) * LANES / rows;
            if (!lane) fetch(a, u, token + TILE + t + from, to - from);
            store(u->weights + r * TILE + t, score_row(key_of(a, u, token + t), stride, query + r * a->dim, a->dim));
        }
    }
    for (; t < TILE; t++)
        for (int64_t r = 0; r < rows; r++) {
            float dot = t < tokens ? 0 : -INFINITY;
            for (int64_t d = 0; t < tokens && d < a->dim; d++) dot += query[r * a->dim + d] * key_of(a, u, token + t)[d];
            u->weights[r * TILE + t] = dot;
        }
}

/* As weigh_tile, for one row with the tokens in the lanes. */
static float weigh_row(float scale, float *scores, float *maximum, float *sum) {
    vec largest = load(scores);
    for (int t = LANES; t < TILE; t += LANES) largest = larger(largest, load(scores + t));
    float before = *maximum, now = largest_of(largest * scale);
    if (before > now) now = before;
    *maximum = now;
    float shift = now == -INFINITY ? 0 : now, factor = exp2_of(all(before - shift))[0];
    vec total = {0};
    for (int t = 0; t < TILE; t += LANES) {
        vec weight = exp2_of(load(scores + t) * scale - shift);
        store(scores + t, weight);
        total += weight;
    }
    *sum = *sum * factor + sum_of(total);
    return factor;
}

static void few(const struct attention *a, const struct unit *u, int64_t width, int64_t lane, int64_t rows,
                int64_t token, int64_t tokens, const float *value, int64_t stride) {
    enum sight sight = sight_of(a, u, u->first_row + lane, rows, token, tokens);
    if (sight == NOTHING) return;
    score_few(a, u, lane, rows, token, tokens);
    if (sight == SOMETHING) hide(a, u, u->first_row + lane, rows, token, tokens, u->weights, TILE, 1);
    float factors[FEW];
    for (int64_t r = 0; r < rows; r++)
        factors[r] = weigh_row(exponent_scale(a), u->weights + r * TILE, u->maxima + lane + r, u->sums + lane + r);
    add_few(u->outputs + lane * width, width, u->weights, value, stride, tokens, factors, rows);
}

static void pack_queries(const struct attention *a, const struct unit *u) {
    for (int64_t lane = 0, rows; lane < u->rows; lane += rows) {
        int wide = panel_of(u->rows - lane);
        rows = rows_of(wide, u->rows - lane);
        float *to = u->queries + lane * a->dim;
        memset(to, 0, (size_t)(wide * LANES * a->dim) * sizeof(float));
        for (int64_t r = 0; r < rows; r++) {
            int64_t row = u->first_row + lane + r;
            const float *from = a->query + u->batch * a->query_strides[0] + head_of(a, u, row) * a->query_strides[1] +
                                row % a->queries * a->query_strides[2];
            for (int64_t d = 0; d < a->dim; d++) to[wide ? d * wide * LANES + r : r * a->dim + d] = from[d];
        }
    }
}

/* Values of a tile with their columns filled up to whole vectors. */
static const float *padded_values(const struct attention *a, const struct unit *u, int64_t width, int64_t token,
                                  int64_t tokens) {
    for (int64_t t = 0; t < tokens; t++) {
        float *to = u->values + t * width;
        memcpy(to, value_of(a, u, token + t), (size_t)a->value_dim * sizeof(float));
        memset(to + a->value_dim, 0, (size_t)(width - a->value_dim) * sizeof(float));
    }
    return u->values;
}

static void attend(const struct attention *a, const struct plan *plan, const struct unit *u) {
    pack_queries(a, u);
    memset(u->outputs, 0, (size_t)(plan->lanes * plan->width) * sizeof(float));
    memset(u->sums, 0, (size_t)plan->lanes * sizeof(float));
    for (int64_t r = 0; r < plan->lanes; r++) u->maxima[r] = -INFINITY;
    int whole = a->value_dim == plan->width;
    int64_t width = plan->width, stride = whole ? a->value_strides[2] : width;
    for (int64_t token = u->first_token; token < u->last_token; token += TILE) {
        int64_t tokens = at_most(u->last_token - token, TILE);
        const float *value = whole ? value_of(a, u, token) : padded_values(a, u, width, token, tokens);
        for (int64_t lane = 0, rows; lane < u->rows; lane += rows) {
            int wide = panel_of(u->rows - lane);
            rows = rows_of(wide, u->rows - lane);
            switch (wide) {
            case 0: few(a, u, width, lane, rows, token, tokens, value, stride); break;
            case 1: panel(a, u, width, lane, rows, token, tokens, value, stride, 1); break;
            case 2: panel(a, u, width, lane, rows, token, tokens, value, stride, 2); break;
            default: panel(a, u, width, lane, rows, token, tokens, value, stride, 3); break;
            }
        }
    }
}

/* A row of all splits to its place in the output. A row that saw nothing is 0, as torch has it. */
static void merge_row(const struct attention *a, const struct plan *plan, const float *partial, int64_t row,
                      float *output) {
    const float *maxima = partial + plan->lanes * plan->width + row, *sums = maxima + plan->lanes;
    float maximum = -INFINITY, sum = 0;
    for (int64_t s = 0; s < plan->splits; s++)
        if (maxima[s * plan->partial] > maximum) maximum = maxima[s * plan->partial];
    if (maximum == -INFINITY) maximum = 0;
    memset(output, 0, (size_t)a->value_dim * sizeof(float));
    for (int64_t s = 0; s < plan->splits; s++) {
        const float *from = partial + s * plan->partial + row * plan->width;
        float factor = exp2_of(all(maxima[s * plan->partial] - maximum))[0];
        sum += factor * sums[s * plan->partial];
        for (int64_t d = 0; d < a->value_dim; d++) output[d] += factor * from[d];
    }
    for (int64_t d = 0; d < a->value_dim; d++) output[d] = sum == 0 ? 0 : output[d] / sum;
}

static void merge(const struct attention *a, const struct plan *plan, int64_t index, const float *partial) {
    struct unit u = unit_of(a, plan, index);
    for (int64_t r = 0; r < u.rows; r++) {
        int64_t row = u.first_row + r, place = (u.batch * a->queries + row % a->queries) * a->heads + head_of(a, &u, row);
        merge_row(a, plan, partial, r, a->output + place * a->value_dim);
    }
}

/* Whether this build can beat torch's kernels: vectors of four were measured to lose, and so does one thread to many. */
int blockrag_attention_pays(int32_t threads) { return LANES >= 8 && (PARALLEL || threads == 1); }

/* Floats of scratch that the attention needs. */
int64_t blockrag_attention_scratch(const struct attention *a) {
    struct plan plan = plan_of(a);
    return plan.threads * plan.private + (plan.splits > 1 ? plan.units : plan.threads) * plan.partial;
}

void blockrag_attention(const struct attention *a) {
    const struct plan plan = plan_of(a);
    float *partials = a->scratch + plan.threads * plan.private;
#pragma omp parallel for num_threads(plan.threads) schedule(dynamic, 1)
    for (int64_t index = 0; index < plan.units; index++) {
        int64_t thread = omp_get_thread_num();
        struct unit u = unit_of(a, &plan, index);
        u.weights = a->scratch + thread * plan.private;
        u.values = u.weights + TILE * WIDE * LANES;
        u.queries = u.values + TILE * plan.width;
        u.outputs = partials + (plan.splits > 1 ? index : thread) * plan.partial;
        u.maxima = u.outputs + plan.lanes * plan.width;
        u.sums = u.maxima + plan.lanes;
        attend(a, &plan, &u);
        if (plan.splits == 1) merge(a, &plan, index, u.outputs);
    }
    if (plan.splits == 1) return;
#pragma omp parallel for num_threads(plan.threads) schedule(static)
    for (int64_t index = 0; index < plan.units; index += plan.splits) merge(a, &plan, index, partials + index * plan.partial);
}
