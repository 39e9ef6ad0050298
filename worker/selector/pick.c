/*
 * pick.c: from scores to picks, the same for every selector: proximity window, exact top-k, and
 * where there is a finer level, re-ranking of factor * k candidates by it.
 *
 * Runs on the sequence's thread; memory from the context's scratch. Candidates stay in ascending
 * position, so that the top-k's order (score descending, then index ascending) is the order by
 * position too.
 */
#include <math.h>
#include <string.h>

#include "internal.h"

static kvc_status need(kvw_select_ctx *ctx, enum kvw_scratch which, size_t n, size_t elem_bytes,
                       void *out_pp)
{
    kvc_status st = kvwi_buf_need(&ctx->buf[which], n * elem_bytes);
    memcpy(out_pp, &ctx->buf[which].p, sizeof(void *));
    return st;
}

void kvwi_sort_u32(uint32_t *values, uint32_t n, uint32_t *tmp)
{
    enum { BITS = 11, BUCKETS = 1 << BITS };
    uint32_t *src = values, *dst = tmp;
    for (uint32_t shift = 0; shift < 32; shift += BITS) {
        uint32_t at[BUCKETS] = {0}, sum = 0;
        for (uint32_t i = 0; i < n; i++) {
            at[(src[i] >> shift) & (BUCKETS - 1)]++;
        }
        for (uint32_t b = 0; b < BUCKETS; b++) {
            uint32_t count = at[b];
            at[b] = sum;
            sum += count;
        }
        for (uint32_t i = 0; i < n; i++) {
            dst[at[(src[i] >> shift) & (BUCKETS - 1)]++] = src[i];
        }
        uint32_t *swap = src;
        src = dst;
        dst = swap;
    }
    memcpy(values, src, n * sizeof(*values)); /* three passes: the result is in tmp */
}

/* The k best of scores [n] as ascending base + index; *n_p. out has room for 2 * k. */
static kvc_status top(kvw_select_ctx *ctx, const float *scores, uint32_t n, uint32_t k,
                      uint32_t base, uint32_t *out, uint32_t *tmp, uint32_t *n_p)
{
    const kvw_worker *w = ctx->worker;
    kvwi_buf *buf = &ctx->buf[KVW_SCRATCH_TOPK];
    size_t bytes = kvk_topk_workspace_bytes(n, k);
    kvc_status st = kvwi_buf_need(buf, bytes);
    if (st != KVC_OK) {
        return st;
    }
    const kvk_topk_args args = {
        .scores = scores,
        .n = n,
        .k = k,
        .base = base,
        .ids = out,
        .n_out_p = n_p,
        .workspace = buf->p,
        .workspace_bytes = bytes,
    };
    st = w->ops->topk(w->be, &args, NULL);
    if (st == KVC_OK) {
        kvwi_sort_u32(out, *n_p, tmp);
    }
    return st;
}

/* Scores of candidates begin .. begin + n - 1 by the first level, after the proximity window. */
static kvc_status scan(kvw_select_ctx *ctx, const kvwi_pages *pages, const kvw_query *query,
                       uint32_t begin, uint32_t n, const float **scores_p)
{
    const kvw_worker *w = ctx->worker;
    float *agg = NULL, *wide = NULL;
    const kvw_source source = {
        .level = &w->level[0], .pages = pages, .first = begin, .n = n, .level_i = 0};
    kvc_status st = need(ctx, KVW_SCRATCH_AGG, n, sizeof(float), &agg);
    if (st == KVC_OK) {
        st = w->selector->aggregate(ctx, query, &source, agg);
    }
    *scores_p = agg;
    if (st != KVC_OK || w->opts.eps == 0) {
        return st;
    }
    st = need(ctx, KVW_SCRATCH_WINDOW, n, sizeof(float), &wide);
    if (st != KVC_OK) {
        return st;
    }
    const kvk_window_max_args args = {.in = agg, .n = n, .eps = w->opts.eps, .out = wide};
    *scores_p = wide;
    return w->ops->window_max(w->be, &args, NULL);
}

/* The window over candidates that are not contiguous: the best score within eps positions. */
static void window_sparse(const uint32_t *pos, const float *in, uint32_t n, uint32_t eps,
                          float *out)
{
    uint32_t lo = 0, hi = 0;
    for (uint32_t i = 0; i < n; i++) {
        while (pos[i] - pos[lo] > eps) {
            lo++;
        }
        while (hi < n && (pos[hi] < pos[i] || pos[hi] - pos[i] <= eps)) {
            hi++;
        }
        float best = -INFINITY;
        for (uint32_t j = lo; j < hi; j++) {
            best = in[j] > best ? in[j] : best;
        }
        out[i] = best;
    }
}

/* Rows of positions pos [n], dense; their addresses lie in the same scratch, before them. */
static kvc_status gather(kvw_select_ctx *ctx, const kvwi_pages *pages, const uint32_t *pos,
                         uint32_t n, const uint8_t **rows_p)
{
    const kvw_worker *w = ctx->worker;
    const void **addresses = NULL;
    kvc_status st =
        need(ctx, KVW_SCRATCH_ROWS, n, sizeof(*addresses) + pages->row_bytes, &addresses);
    if (st != KVC_OK) {
        return st;
    }
    for (uint32_t i = 0; i < n; i++) {
        addresses[i] = kvwi_pages_row(pages, pos[i], NULL);
    }
    uint8_t *rows = (uint8_t *)(addresses + n);
    const kvk_gather_args args = {
        .rows = addresses, .n = n, .row_bytes = pages->row_bytes, .out = rows};
    *rows_p = rows;
    return w->ops->gather(w->be, &args, NULL);
}

/* The k best of candidates pos [n] (ascending) by the finer level. */
static kvc_status rerank(kvw_select_ctx *ctx, const kvwi_pages *pages, const kvw_query *query,
                         uint32_t *pos, uint32_t n, uint32_t *tmp, uint32_t *picks, uint32_t *n_p)
{
    const kvw_worker *w = ctx->worker;
    const uint8_t *rows = NULL;
    float *agg = NULL, *wide = NULL;
    kvc_status st = gather(ctx, pages, pos, n, &rows);
    if (st == KVC_OK) {
        st = need(ctx, KVW_SCRATCH_AGG, n, sizeof(float), &agg);
    }
    if (st == KVC_OK) {
        st = need(ctx, KVW_SCRATCH_WINDOW, n, sizeof(float), &wide);
    }
    if (st != KVC_OK) {
        return st;
    }
    const kvw_source source = {.level = &w->level[1], .dense = rows, .n = n, .level_i = 1};
    st = w->selector->aggregate(ctx, query, &source, agg);
    if (st != KVC_OK) {
        return st;
    }
    if (w->opts.eps != 0) {
        window_sparse(pos, agg, n, w->opts.eps, wide);
    }
    st = top(ctx, w->opts.eps != 0 ? wide : agg, n, w->opts.k, 0, picks, tmp, n_p);
    for (uint32_t i = 0; st == KVC_OK && i < *n_p; i++) {
        picks[i] = pos[picks[i]];
    }
    return st;
}

kvc_status kvwi_pick(kvw_select_ctx *ctx, const kvwi_pages *levels, const void *q, uint32_t n_q,
                     uint32_t begin, uint32_t end, uint32_t *picks, uint32_t *n_p)
{
    const kvw_worker *w = ctx->worker;
    uint32_t n = end - begin, n_found = 0;
    uint64_t wanted = (uint64_t)w->opts.k * (w->n_levels == 2 ? w->opts.rerank_factor : 1u);
    uint32_t k = wanted < n ? (uint32_t)wanted : n;
    const float *scores = NULL;
    uint32_t *candidates = NULL;
    kvw_query query = {0};
    kvc_status st = w->selector->prepare(ctx, q, n_q, &query);
    if (st == KVC_OK) {
        st = scan(ctx, &levels[0], &query, begin, n, &scores);
    }
    if (st == KVC_OK) {
        st = need(ctx, KVW_SCRATCH_CANDIDATES, 2u * (size_t)k + 1u, sizeof(uint32_t), &candidates);
    }
    if (st != KVC_OK) {
        return st;
    }
    if (w->n_levels == 1) {
        return top(ctx, scores, n, k, begin, picks, candidates, n_p);
    }
    st = top(ctx, scores, n, k, begin, candidates, candidates + k, &n_found);
    return st != KVC_OK
               ? st
               : rerank(ctx, &levels[1], &query, candidates, n_found, candidates + k, picks, n_p);
}
