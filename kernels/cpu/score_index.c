/*
 * score_index.c: scores of int8 index rows.
 *
 * The query is quantised to int16 by the same code in both forms and the dot is exact, so every
 * backend gives the same bits. One item is a run of index rows; its blocks stay in L1 while all
 * queries meet them. Above KVKI_I8_DIM_MAX dims a sum may leave int32: those go through int64.
 */
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "elem.h"
#include "internal.h"
#include "isa.h"

#define ITEM_BYTES  262144u
#define BLOCK_BYTES 32768u
#define BLOCK_MIN   4u

typedef struct job {
    const kvk_score_index_args *a;
    const kvki_isa *isa;
    const int16_t *q;     /* [m, n_q_heads, padded] */
    const float *q_scale; /* [m, n_q_heads] */
    size_t padded;        /* dims rounded up to KVKI_I8_PAD */
    size_t keys_per_item, block;
} job;

static bool finite_rows(const float *x, size_t n)
{
    uint32_t bad = 0;

    for (size_t i = 0; i < n; i++)
        bad |= (kvki_bits_of_f32(x[i]) & 0x7f800000u) == 0x7f800000u;
    return bad == 0;
}

kvc_status kvki_check_score_index(const kvk_score_index_args *a)
{
    size_t rows = (size_t)a->m * a->n_q_heads;

    if (!kvki_heads_ok(a->n_q_heads, a->n_kv_heads) || a->dims == 0 || a->dims > UINT32_MAX - 64)
        return KVC_INVALID;
    if (!kvki_shape_ok(a->m, a->n_q_heads, a->dims) || !kvki_shape_ok(a->n, a->n_kv_heads, a->dims))
        return KVC_INVALID;
    if (a->m == 0 || a->n == 0)
        return KVC_OK;
    if (!a->q || !a->index || !kvki_matrix_ok(a->out, rows, a->n, a->out_stride) ||
        !kvki_stride_ok(a->n, a->index_stride_bytes, kvk_index_row_bytes(a->n_kv_heads, a->dims)))
        return KVC_INVALID;
    return finite_rows(a->q, rows * a->dims) ? KVC_OK : KVC_INVALID;
}

static void quantize_query(const float *q, uint32_t dims, size_t padded, int16_t *out,
                           float *scale_p)
{
    float max = 0;

    for (uint32_t i = 0; i < dims; i++)
        max = fabsf(q[i]) > max ? fabsf(q[i]) : max;
    *scale_p = max / 32767.0f;
    memset(out, 0, padded * sizeof(int16_t));
    if (*scale_p == 0)
        return;
    for (uint32_t i = 0; i < dims; i++) {
        float v = rintf(q[i] / *scale_p);
        v = v > 32767.0f ? 32767.0f : v < -32767.0f ? -32767.0f : v;
        out[i] = (int16_t)v;
    }
}

/* Fills q and q_scale from one buffer of query_bytes(). */
static size_t query_bytes(const kvk_score_index_args *a, size_t padded)
{
    return (size_t)a->m * a->n_q_heads * (padded * sizeof(int16_t) + sizeof(float));
}

static void quantize_queries(job *w, void *buf)
{
    const kvk_score_index_args *a = w->a;
    size_t rows = (size_t)a->m * a->n_q_heads;
    float *scale = buf;
    int16_t *q = (int16_t *)(void *)(scale + rows);

    for (size_t r = 0; r < rows; r++)
        quantize_query(a->q + r * a->dims, a->dims, w->padded, q + r * w->padded, &scale[r]);
    w->q = q;
    w->q_scale = scale;
}

static size_t padded_dims(uint32_t dims)
{
    return ((size_t)dims + KVKI_I8_PAD - 1) / KVKI_I8_PAD * KVKI_I8_PAD;
}

static float score_one(const job *w, size_t row, size_t kv_head, size_t j)
{
    const kvk_score_index_args *a = w->a;
    const char *key = (const char *)a->index + j * a->index_stride_bytes;
    uint16_t bits = 0;
    int64_t dot = 0;

    for (size_t t = 0; t < a->dims; t++) {
        int8_t v = 0;
        memcpy(&v, key + kv_head * a->dims + t, sizeof(v));
        dot += (int64_t)w->q[row * w->padded + t] * v;
    }
    memcpy(&bits, key + (size_t)a->n_kv_heads * a->dims + 2 * kv_head, sizeof(bits));
    return ((float)dot * kvki_f32_of_bf16(bits)) * w->q_scale[row];
}

/* Every query against the index rows [from, to), one product at a time. */
static void score_plain(const job *w, size_t from, size_t to)
{
    const kvk_score_index_args *a = w->a;
    size_t group = a->n_q_heads / a->n_kv_heads;

    for (size_t row = 0; row < (size_t)a->m * a->n_q_heads; row++) {
        for (size_t j = from; j < to; j++)
            a->out[row * a->out_stride + j] = score_one(w, row, row % a->n_q_heads / group, j);
    }
}

kvc_status kvki_ref_score_index(const kvk_score_index_args *a)
{
    job w = {.a = a, .padded = padded_dims(a->dims)};
    void *buf = NULL;

    if (a->m == 0 || a->n == 0)
        return KVC_OK;
    buf = malloc(query_bytes(a, w.padded));
    if (!buf)
        return KVC_NO_MEMORY;
    quantize_queries(&w, buf);
    score_plain(&w, 0, a->n);
    free(buf);
    return KVC_OK;
}

/* All queries of one kv head against the n rows from j0 on. */
static void score_head(const job *w, size_t kv_head, size_t j0, size_t n)
{
    const kvk_score_index_args *a = w->a;
    size_t group = a->n_q_heads / a->n_kv_heads, row = kvk_index_row_bytes(a->n_kv_heads, a->dims);
    const char *index = a->index;
    kvki_score_i8 s = {.q = w->q,
                       .q_scale = w->q_scale,
                       .out = a->out + j0,
                       .q_stride = w->padded,
                       .out_stride = a->out_stride,
                       .n_rows = a->m * group,
                       .group = group,
                       .n_q_heads = a->n_q_heads,
                       .first_head = kv_head * group,
                       .dim = a->dims,
                       .n = n,
                       .index = index + j0 * a->index_stride_bytes,
                       .end = index + (a->n - 1) * a->index_stride_bytes + row,
                       .stride_bytes = a->index_stride_bytes,
                       .v_off_bytes = kv_head * a->dims,
                       .scale_off_bytes = (size_t)a->n_kv_heads * a->dims + 2 * kv_head};

    w->isa->score_i8(&s);
}

static void run_item(void *arg, size_t item, uint32_t worker)
{
    const job *w = arg;
    const kvk_score_index_args *a = w->a;
    size_t j = item * w->keys_per_item;
    size_t end = a->n - j < w->keys_per_item ? a->n : j + w->keys_per_item;

    (void)worker;
    if (a->dims > KVKI_I8_DIM_MAX) {
        score_plain(w, j, end);
        return;
    }
    for (; j < end; j += w->block) {
        size_t n = end - j < w->block ? end - j : w->block;
        for (size_t kv_head = 0; kv_head < a->n_kv_heads; kv_head++)
            score_head(w, kv_head, j, n);
    }
}

kvc_status kvki_fast_score_index(kvk_backend *be, const kvk_score_index_args *a)
{
    size_t row_bytes = kvk_index_row_bytes(a->n_kv_heads, a->dims);
    job w = {.a = a, .isa = be->isa, .padded = padded_dims(a->dims)};
    void *buf = NULL;

    if (a->m == 0 || a->n == 0)
        return KVC_OK;
    buf = kvki_scratch_take(be->scratch, query_bytes(a, w.padded));
    if (!buf)
        return KVC_NO_MEMORY;
    quantize_queries(&w, buf);
    w.block = BLOCK_BYTES / row_bytes < BLOCK_MIN ? BLOCK_MIN : BLOCK_BYTES / row_bytes;
    w.keys_per_item = (ITEM_BYTES / row_bytes / w.block + 1) * w.block;
    kvki_pool_run(be->pool, (a->n + w.keys_per_item - 1) / w.keys_per_item, run_item, &w);
    kvki_scratch_give(be->scratch, buf);
    return KVC_OK;
}
