/*
 * tokenselect.c: the selector of TokenSelect (arXiv 2411.02886), over exact or compressed keys.
 *
 * Score of a token: the soft vote (eq. 7): per query head a softmax of q.k over all candidates,
 * without 1/sqrt(d), summed over heads. Query head h meets kv head h / group. Queries are rotated
 * at positions n_recent onwards and meet raw keys; a chunk votes with the mean of its rotated
 * queries. Compressed, q and k are projected per kv head.
 *
 * In a tensor-parallel group each worker holds whole heads, so its softmax is its own and only the
 * votes are summed. Re-ranking runs the softmax over the candidates.
 */
#include <math.h>
#include <string.h>

#include "internal.h"
#include "selectors.h"

/* Logits are kept between the two passes up to this size, else computed twice. */
#define LOGITS_BYTES (256u << 20)

/* The mean over the chunk of the rotated queries: out [n_q_heads, head_dim] f32. */
static kvc_status mean_query(kvw_select_ctx *ctx, const void *q, uint32_t n_q, float **out_p)
{
    const kvw_worker *w = ctx->worker;
    const kvw_opts *o = &w->opts;
    size_t width = (size_t)o->n_q_heads * o->head_dim, bytes = n_q * width * sizeof(float);
    kvwi_buf *rot = &ctx->buf[KVW_SCRATCH_TMP], *out = &ctx->buf[KVW_SCRATCH_Q];
    kvc_status st = kvwi_buf_need(rot, bytes + n_q * sizeof(int32_t));
    if (st == KVC_OK) {
        st = kvwi_buf_need(out, width * sizeof(float));
    }
    if (st != KVC_OK) {
        return st;
    }
    bool raw = w->projection != NULL && w->projection->rope == KVWI_PROJECTION_RAW;
    int32_t *positions = (int32_t *)((char *)rot->p + bytes);
    for (uint32_t i = 0; i < n_q; i++) {
        positions[i] = (int32_t)(o->n_recent + i);
    }
    const kvk_rope_args rope = {
        .in = {q, width * w->elem_bytes, o->dtype},
        .n = n_q,
        .n_heads = o->n_q_heads,
        .head_dim = o->head_dim,
        .inv_freq = raw ? NULL : w->inv_freq,
        .positions = positions,
        .out = rot->p,
    };
    const kvk_mean_args mean = {.in = {rot->p, width * sizeof(float), KVK_F32},
                                .n = n_q,
                                .width = (uint32_t)width,
                                .out = out->p};
    st = w->ops->rope(w->be, &rope, NULL);
    *out_p = out->p;
    return st != KVC_OK ? st : w->ops->mean(w->be, &mean, NULL);
}

/* in [outer, inner, width] -> out [inner, outer, width]. */
static void swap_axes(const float *in, uint32_t outer, uint32_t inner, uint32_t width, float *out)
{
    for (uint32_t i = 0; i < outer; i++) {
        for (uint32_t j = 0; j < inner; j++) {
            memcpy(out + ((size_t)j * outer + i) * width, in + ((size_t)i * inner + j) * width,
                   width * sizeof(float));
        }
    }
}

/*
 * Each query head by the matrix of its kv head. The op projects rows of n_kv_heads heads, so the
 * heads [n_kv_heads, group] are swapped to [group, n_kv_heads] and back.
 */
static kvc_status project_query(kvw_select_ctx *ctx, const float *q, uint32_t i,
                                const float **out_p)
{
    const kvw_worker *w = ctx->worker;
    const kvwi_level *level = &w->level[i];
    uint32_t kv = level->heads, group = w->opts.n_q_heads / kv;
    size_t n_in = (size_t)kv * group * level->d_in, n_out = (size_t)kv * group * level->dims;
    kvwi_buf *buf = &ctx->buf[KVW_SCRATCH_Q_LEVEL0 + i];
    kvc_status st = kvwi_buf_need(buf, (n_in + 2u * n_out) * sizeof(float));
    if (st != KVC_OK) {
        return st;
    }
    float *out = buf->p, *swapped = out + n_out, *projected = swapped + n_in;
    swap_axes(q, kv, group, level->d_in, swapped);
    const kvk_project_args args = {
        .in = {swapped, (size_t)kv * level->d_in * sizeof(float), KVK_F32},
        .n = group,
        .n_heads = kv,
        .dim_in = level->d_in,
        .dim_out = level->dims,
        .proj = level->a + (size_t)ctx->layer * kv * level->d_in * level->dims,
        .out = projected,
    };
    st = w->ops->project(w->be, &args, NULL);
    if (st == KVC_OK) {
        swap_axes(projected, group, kv, level->dims, out);
    }
    *out_p = out;
    return st;
}

static kvc_status prepare(kvw_select_ctx *ctx, const void *q, uint32_t n_q, kvw_query *query_p)
{
    const kvw_worker *w = ctx->worker;
    float *mean = NULL;
    *query_p = (kvw_query){.m = 1, .heads = w->opts.n_q_heads};
    kvc_status st = mean_query(ctx, q, n_q, &mean);
    for (uint32_t i = 0; st == KVC_OK && i < w->n_levels; i++) {
        if (w->level[i].exact) {
            query_p->q[i] = mean;
        } else {
            st = project_query(ctx, mean, i, &query_p->q[i]);
        }
    }
    return st;
}

static kvc_status stats_of(const kvw_worker *w, const float *logits, uint32_t n, float *max,
                           float *sumexp)
{
    const kvk_softmax_stats_args args = {.logits = logits,
                                         .stride = n,
                                         .n_heads = w->opts.n_q_heads,
                                         .n = n,
                                         .max = max,
                                         .sumexp = sumexp};
    return w->ops->softmax_stats(w->be, &args, NULL);
}

static kvc_status vote_of(const kvw_worker *w, const float *logits, uint32_t n, const float *max,
                          const float *sumexp, float *out)
{
    const kvk_vote_args args = {.logits = logits,
                                .stride = n,
                                .n_heads = w->opts.n_q_heads,
                                .n = n,
                                .max = max,
                                .sumexp = sumexp,
                                .out = out};
    return w->ops->vote(w->be, &args, NULL);
}

/* All logits at once. */
static kvc_status vote_whole(kvw_select_ctx *ctx, const float *q, const kvw_source *source,
                             float *logits, float *max, float *sumexp, float *out)
{
    const kvw_worker *w = ctx->worker;
    kvc_status st = kvwi_score(ctx, q, 1, w->opts.n_q_heads, source, logits, source->n);
    if (st == KVC_OK) {
        st = stats_of(w, logits, source->n, max, sumexp);
    }
    return st != KVC_OK ? st : vote_of(w, logits, source->n, max, sumexp, out);
}

/* Piece by piece, twice: first the statistics of every head, then the votes. */
static kvc_status vote_pieces(kvw_select_ctx *ctx, const float *q, const kvw_source *source,
                              uint32_t piece, float *logits, float *max, float *sumexp, float *out)
{
    const kvw_worker *w = ctx->worker;
    kvc_status st = KVC_OK;
    for (int pass = 0; pass < 2; pass++) {
        for (uint32_t done = 0; st == KVC_OK && done < source->n; done += piece) {
            kvw_source part = *source;
            part.first += source->pages != NULL ? done : 0;
            part.dense = source->pages != NULL
                             ? NULL
                             : (const uint8_t *)source->dense + done * source->level->row_bytes;
            part.n = kvwi_min_u32(piece, source->n - done);
            st = kvwi_score(ctx, q, 1, w->opts.n_q_heads, &part, logits, part.n);
            if (st == KVC_OK) {
                st = pass == 0 ? stats_of(w, logits, part.n, max, sumexp)
                               : vote_of(w, logits, part.n, max, sumexp, out + done);
            }
        }
    }
    return st;
}

static kvc_status aggregate(kvw_select_ctx *ctx, const kvw_query *query, const kvw_source *source,
                            float *out)
{
    const kvw_worker *w = ctx->worker;
    const float *q = query->q[source->level_i];
    uint32_t heads = w->opts.n_q_heads;
    size_t all = (size_t)heads * source->n;
    uint32_t piece = LOGITS_BYTES / (uint32_t)sizeof(float) / heads;
    bool whole = all * sizeof(float) <= LOGITS_BYTES;
    kvwi_buf *logits = &ctx->buf[KVW_SCRATCH_SCORES], *stats = &ctx->buf[KVW_SCRATCH_STATS];
    kvc_status st = kvwi_buf_need(logits, whole ? all * sizeof(float) : LOGITS_BYTES);
    if (st == KVC_OK) {
        st = kvwi_buf_need(stats, 2u * heads * sizeof(float));
    }
    if (st != KVC_OK) {
        return st;
    }
    float *max = stats->p, *sumexp = max + heads;
    for (uint32_t h = 0; h < heads; h++) {
        max[h] = -INFINITY;
        sumexp[h] = 0;
    }
    st = whole ? vote_whole(ctx, q, source, logits->p, max, sumexp, out)
               : vote_pieces(ctx, q, source, piece, logits->p, max, sumexp, out);
    if (st == KVC_OK && w->opts.all_reduce != NULL) {
        st = w->opts.all_reduce(w->opts.all_reduce_arg, "sum", out, source->n);
    }
    return st;
}

const kvw_selector_ops kvw_selector_tokenselect = {
    .name = "tokenselect",
    .default_index = KVW_INDEX_EXACT,
    .default_recent = 512,
    .form = KVWI_PER_HEAD,
    .positions = KVW_RENUMBER,
    .recent_holds_new = true,
    .reuses = true,
    .prepare = prepare,
    .aggregate = aggregate,
};
