/*
 * scores.c: exact scores, shared by score_keys and score_rows.
 *
 * One item is a run of keys. Within it keys go in blocks that stay in cache while every query head
 * of their group meets them; with few queries the blocks are short, so that memory is read in
 * order.
 */
#include "scores.h"

#include "check.h"
#include "elem.h"
#include "isa.h"

#define ITEM_BYTES 262144u
#define BLOCK_KEYS 64u
#define SHORT_KEYS 8u
#define AHEAD      2u /* blocks between asking for a key and using it */

bool kvki_scores_ok(const kvki_scores *s)
{
    if (!kvki_heads_ok(s->n_q_heads, s->n_kv_heads) || s->head_dim == 0 || !kvki_dtype_ok(s->dtype))
        return false;
    if (!kvki_shape_ok(s->m, s->n_q_heads, s->head_dim) ||
        !kvki_shape_ok(s->n, s->n_kv_heads, s->head_dim))
        return false;
    if (s->m == 0 || s->n == 0)
        return true;
    return s->q && kvki_matrix_ok(s->out, (size_t)s->m * s->n_q_heads, s->n, s->out_stride);
}

static const void *key_at(const kvki_scores *s, size_t j)
{
    return s->rows ? s->rows[j] : s->data + j * s->stride_bytes;
}

static float score_one(const kvki_scores *s, const float *q, size_t kv_head, size_t j)
{
    double sum = 0;

    for (size_t t = 0; t < s->head_dim; t++) {
        float k = kvki_elem(key_at(s, j), s->dtype, kv_head * s->head_dim + t);
        sum += (double)q[t] * (double)k;
    }
    return (float)sum;
}

void kvki_scores_ref(const kvki_scores *s)
{
    size_t group = s->n_q_heads / s->n_kv_heads;

    for (size_t r = 0; r < (size_t)s->m * s->n_q_heads; r++) {
        size_t kv_head = r % s->n_q_heads / group;
        for (size_t j = 0; j < s->n; j++)
            s->out[r * s->out_stride + j] = score_one(s, s->q + r * s->head_dim, kv_head, j);
    }
}

typedef struct job {
    const kvki_scores *s;
    const kvki_isa *isa;
    size_t keys_per_item, key_bytes;
    uint32_t block;
} job;

/* All queries of one kv head against the keys of d, which start at key j0. */
static void score_head(const job *w, kvki_dot *d, size_t kv_head, size_t j0)
{
    const kvki_scores *s = w->s;
    size_t group = s->n_q_heads / s->n_kv_heads;
    size_t n_rows = s->m * group;

    d->off_bytes = kv_head * s->head_dim * kvk_dtype_bytes(s->dtype);
    for (size_t first = 0; first < n_rows; first += KVKI_DOT_QUERIES) {
        d->nq = (uint32_t)(n_rows - first < KVKI_DOT_QUERIES ? n_rows - first : KVKI_DOT_QUERIES);
        for (size_t t = 0; t < d->nq; t++) {
            size_t i = (first + t) / group, g = (first + t) % group;
            size_t row = i * s->n_q_heads + kv_head * group + g;
            d->q[t] = s->q + row * s->head_dim;
            d->out[t] = s->out + row * s->out_stride + j0;
        }
        w->isa->dot(d);
    }
}

/* Asks for keys [j, j + n): pointers lead anywhere, and even strided rows beat the prefetcher. */
static void fetch_ahead(const job *w, size_t j, size_t n)
{
    const kvki_scores *s = w->s;

    for (size_t t = j; t < s->n && t < j + n; t++) {
        const char *key = key_at(s, t);
        for (size_t at = 0; at < w->key_bytes; at += 64)
            __builtin_prefetch(key + at);
    }
}

static void run_item(void *arg, size_t item, uint32_t worker)
{
    const job *w = arg;
    const kvki_scores *s = w->s;
    const void *keys[BLOCK_KEYS];
    size_t j = item * w->keys_per_item;
    size_t end = s->n - j < w->keys_per_item ? s->n : j + w->keys_per_item;

    (void)worker;
    while (j < end) {
        uint32_t n = (uint32_t)(end - j < w->block ? end - j : w->block);
        kvki_dot d = {.dim = s->head_dim, .n = n, .rows = keys, .dtype = s->dtype};
        for (uint32_t t = 0; t < n; t++)
            keys[t] = key_at(s, j + t);
        fetch_ahead(w, j + AHEAD * w->block, n);
        for (size_t kv_head = 0; kv_head < s->n_kv_heads; kv_head++)
            score_head(w, &d, kv_head, j);
        j += n;
    }
}

void kvki_scores_fast(kvk_backend *be, const kvki_scores *s)
{
    size_t rows_per_head = (size_t)s->m * (s->n_q_heads / s->n_kv_heads);
    job w = {.s = s, .isa = be->isa, .block = rows_per_head > 8 ? BLOCK_KEYS : SHORT_KEYS};

    if (s->m == 0 || s->n == 0)
        return;
    w.key_bytes = (size_t)s->n_kv_heads * s->head_dim * kvk_dtype_bytes(s->dtype);
    w.keys_per_item = (ITEM_BYTES / w.key_bytes + BLOCK_KEYS) / BLOCK_KEYS * BLOCK_KEYS;
    kvki_pool_run(be->pool, (s->n + w.keys_per_item - 1) / w.keys_per_item, run_item, &w);
}
