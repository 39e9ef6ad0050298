/*
 * esa.c: the selector of ESA (arXiv 2502.14477), over exact or compressed keys.
 *
 * Score of a token: the sum over heads of q.k (eq. 3), which with grouped queries is the dot of the
 * group-summed query with the concatenated keys; compressed, both are projected to d' dims (eq. 5,
 * 6). A chunk scores a token by eq. 4: each query's scores are shifted so that its best token is 0,
 * then the best query counts. Keys are raw; queries are scored as rotated at far_position, where
 * the far attention has them, unless the projection was calibrated on raw ones.
 *
 * In a tensor-parallel group each worker holds some heads: projected queries are partial sums and
 * are all-reduced (over exact keys, the scores are).
 */
#include <math.h>
#include <string.h>

#include "internal.h"
#include "selectors.h"

/* Score planes of at most this many bytes: chunk queries are scored in sub-batches. */
#define PLANE_BYTES (64u << 20)

static kvc_status sum_over_group(const kvw_worker *w, float *x, uint32_t n)
{
    return w->opts.all_reduce == NULL ? KVC_OK
                                      : w->opts.all_reduce(w->opts.all_reduce_arg, "sum", x, n);
}

static bool scores_raw(const kvw_worker *w)
{
    return w->inv_freq == NULL ||
           (w->projection != NULL && w->projection->rope == KVWI_PROJECTION_RAW);
}

/* Group-summed queries [n_q, n_kv_heads, head_dim], rotated where scoring wants it. */
static kvc_status collapse(kvw_select_ctx *ctx, const void *q, uint32_t n_q, float **out_p)
{
    const kvw_worker *w = ctx->worker;
    const kvw_opts *o = &w->opts;
    size_t width = (size_t)o->n_kv_heads * o->head_dim;
    kvwi_buf *sum = &ctx->buf[KVW_SCRATCH_TMP], *rot = &ctx->buf[KVW_SCRATCH_Q];
    kvc_status st = kvwi_buf_need(sum, n_q * width * sizeof(float));
    if (st == KVC_OK) {
        st = kvwi_buf_need(rot, n_q * width * sizeof(float));
    }
    if (st != KVC_OK) {
        return st;
    }
    const kvk_group_sum_args args = {
        .in = {q, (size_t)o->n_q_heads * o->head_dim * w->elem_bytes, o->dtype},
        .n = n_q,
        .n_q_heads = o->n_q_heads,
        .n_kv_heads = o->n_kv_heads,
        .head_dim = o->head_dim,
        .out = sum->p,
    };
    st = w->ops->group_sum(w->be, &args, NULL);
    *out_p = sum->p;
    if (st != KVC_OK || scores_raw(w)) {
        return st;
    }
    const kvk_rope_args rope = {
        .in = {sum->p, width * sizeof(float), KVK_F32},
        .n = n_q,
        .n_heads = o->n_kv_heads,
        .head_dim = o->head_dim,
        .inv_freq = w->inv_freq,
        .const_position = (int32_t)o->far_position,
        .out = rot->p,
    };
    *out_p = rot->p;
    return w->ops->rope(w->be, &rope, NULL);
}

static kvc_status project_query(kvw_select_ctx *ctx, const float *q, uint32_t n_q, uint32_t i,
                                const float **out_p)
{
    const kvw_worker *w = ctx->worker;
    const kvwi_level *level = &w->level[i];
    kvwi_buf *buf = &ctx->buf[KVW_SCRATCH_Q_LEVEL0 + i];
    kvc_status st = kvwi_buf_need(buf, (size_t)n_q * level->dims * sizeof(float));
    if (st != KVC_OK) {
        return st;
    }
    const kvk_project_args args = {
        .in = {q, level->d_in * sizeof(float), KVK_F32},
        .n = n_q,
        .n_heads = 1,
        .dim_in = level->d_in,
        .dim_out = level->dims,
        .proj = level->a + (size_t)ctx->layer * level->d_in * level->dims,
        .out = buf->p,
    };
    st = w->ops->project(w->be, &args, NULL);
    *out_p = buf->p;
    return st != KVC_OK ? st : sum_over_group(w, buf->p, n_q * level->dims);
}

static kvc_status prepare(kvw_select_ctx *ctx, const void *q, uint32_t n_q, kvw_query *query_p)
{
    const kvw_worker *w = ctx->worker;
    float *sum = NULL;
    *query_p = (kvw_query){.m = n_q, .heads = 1};
    kvc_status st = collapse(ctx, q, n_q, &sum);
    for (uint32_t i = 0; st == KVC_OK && i < w->n_levels; i++) {
        if (w->level[i].exact) {
            query_p->q[i] = sum;
        } else {
            st = project_query(ctx, sum, n_q, i, &query_p->q[i]);
        }
    }
    return st;
}

/* Scores of m queries, agreed by the group. */
static kvc_status score_plane(kvw_select_ctx *ctx, const float *q, uint32_t m,
                              const kvw_source *source, float *plane)
{
    kvc_status st = kvwi_score(ctx, q, m, 1, source, plane, source->n);
    if (st != KVC_OK || !source->level->exact) {
        return st;
    }
    for (uint32_t i = 0; st == KVC_OK && i < m; i++) {
        st = sum_over_group(ctx->worker, plane + (size_t)i * source->n, source->n);
    }
    return st;
}

/* Folds one sub-batch of queries into out (eq. 4). */
static kvc_status fold(kvw_select_ctx *ctx, const float *q, uint32_t m, const kvw_source *source,
                       float *plane, float *row_max, float *out)
{
    const kvw_worker *w = ctx->worker;
    const kvk_row_max_args max_args = {
        .scores = plane, .stride = source->n, .m = m, .n = source->n, .row_max = row_max};
    const kvk_chunk_fold_args fold_args = {.scores = plane,
                                           .stride = source->n,
                                           .m = m,
                                           .n = source->n,
                                           .row_max = row_max,
                                           .out = out};
    for (uint32_t i = 0; i < m; i++) {
        row_max[i] = -INFINITY;
    }
    kvc_status st = score_plane(ctx, q, m, source, plane);
    if (st == KVC_OK) {
        st = w->ops->row_max(w->be, &max_args, NULL);
    }
    return st != KVC_OK ? st : w->ops->chunk_fold(w->be, &fold_args, NULL);
}

static kvc_status aggregate(kvw_select_ctx *ctx, const kvw_query *query, const kvw_source *source,
                            float *out)
{
    const float *q = query->q[source->level_i];
    kvwi_buf *planes = &ctx->buf[KVW_SCRATCH_SCORES], *maxima = &ctx->buf[KVW_SCRATCH_STATS];
    size_t plane_bytes = source->n * sizeof(float);
    if (query->m == 1) {
        /* one row: the shift of eq. 4 changes no order, only rounding */
        return score_plane(ctx, q, 1, source, out);
    }
    uint32_t batch = (uint32_t)(PLANE_BYTES / plane_bytes);
    batch = kvwi_max_u32(1, kvwi_min_u32(batch, query->m));
    kvc_status st = kvwi_buf_need(planes, batch * plane_bytes);
    if (st == KVC_OK) {
        st = kvwi_buf_need(maxima, batch * sizeof(float));
    }
    for (uint32_t j = 0; j < source->n; j++) {
        out[j] = -INFINITY;
    }
    for (uint32_t i = 0; st == KVC_OK && i < query->m; i += batch) {
        uint32_t m = kvwi_min_u32(batch, query->m - i);
        st = fold(ctx, q + (size_t)i * source->level->dims, m, source, planes->p, maxima->p, out);
    }
    return st;
}

const kvw_selector_ops kvw_selector_esa = {
    .name = "esa",
    .default_index = KVW_INDEX_COMPRESSED,
    .default_recent = 4096,
    .form = KVWI_SHARED,
    .positions = KVW_FAR_NEAR,
    .recent_holds_new = false,
    .reuses = false,
    .prepare = prepare,
    .aggregate = aggregate,
};
