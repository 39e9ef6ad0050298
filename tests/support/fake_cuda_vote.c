/*
 * fake_cuda_vote.c: the fake's ops of TokenSelect. See fake_cuda.h. Ops run on the caller's thread.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "fake_cuda_internal.h"
#include "kvk/cuda_rerank.h"

/* What a device's takes, more or less. */
#define VOTE_BLOCK_BYTES 123000u

kvc_status kvk_cuda_select_vote_supports(const kvk_cuda *cuda,
                                         const kvk_cuda_select_vote_args *args)
{
    (void)cuda;
    bool known = args->n_q_heads <= 128 && args->n_q_heads * args->dims <= 16384u;
    return known && VOTE_BLOCK_BYTES <= fake_cuda_shared_bytes() ? KVC_OK : KVC_UNSUPPORTED;
}

size_t kvk_cuda_select_vote_workspace_bytes(uint32_t n_seqs, uint32_t rows_max)
{
    return (size_t)n_seqs * rows_max * 2u * sizeof(float) + FAKE_CUDA_TAG_BYTES;
}

/* Queries [heads, dims] and n rows that are scored by them. */
typedef struct voters {
    const float *q;
    uint32_t heads, kv_heads, dims, n;
    const void *rows;
} voters;

/* The votes of n candidates. */
static kvc_status vote(kvk_cuda *cuda, const voters *v, float *out)
{
    uint32_t heads = v->heads, n = v->n;
    float *logits = malloc(((size_t)heads * n + 2u * heads) * sizeof(*logits));
    float *max = logits + (size_t)heads * n, *sum = max + heads;
    const kvk_score_index_args score = {.q = v->q,
                                        .m = 1,
                                        .n_q_heads = heads,
                                        .n_kv_heads = v->kv_heads,
                                        .dims = v->dims,
                                        .index = v->rows,
                                        .index_stride_bytes =
                                            kvk_index_row_bytes(v->kv_heads, v->dims),
                                        .n = n,
                                        .out = logits,
                                        .out_stride = n};
    const kvk_softmax_stats_args stats = {
        .logits = logits, .stride = n, .n_heads = heads, .n = n, .max = max, .sumexp = sum};
    const kvk_vote_args votes = {.logits = logits,
                                 .stride = n,
                                 .n_heads = heads,
                                 .n = n,
                                 .max = max,
                                 .sumexp = sum,
                                 .out = out};
    for (uint32_t h = 0; h < heads; h++) {
        max[h] = -INFINITY;
        sum[h] = 0;
    }
    kvc_status st = cuda->ops->score_index(cuda->be, &score, NULL);
    if (st == KVC_OK)
        st = cuda->ops->softmax_stats(cuda->be, &stats, NULL);
    if (st == KVC_OK)
        st = cuda->ops->vote(cuda->be, &votes, NULL);
    free(logits);
    return st;
}

static kvc_status select_one(kvk_cuda *cuda, const kvk_cuda_select_vote_args *a, uint32_t seq)
{
    const kvk_cuda_candidates *c = a->cands + seq;
    uint32_t n = c->n_rows < a->rows_max ? c->n_rows : a->rows_max;
    float *votes = a->workspace, *wide = NULL;
    votes += FAKE_CUDA_TAG_BYTES / sizeof(*votes);
    wide = votes + a->rows_max;
    const voters v = {a->q + (size_t)seq * a->n_q_heads * a->dims,
                      a->n_q_heads,
                      a->n_kv_heads,
                      a->dims,
                      n,
                      c->index};
    const kvk_window_max_args window = {.in = votes, .n = n, .eps = a->eps, .out = wide};
    kvk_topk_args top = {.scores = a->eps != 0 ? wide : votes,
                         .n = n,
                         .k = a->k,
                         .base = c->base,
                         .workspace_bytes = kvk_topk_workspace_bytes(n, a->k),
                         .ids = a->picks + (size_t)seq * a->k,
                         .n_out_p = a->n_picks + seq};
    kvc_status st = vote(cuda, &v, votes);
    if (st == KVC_OK && a->eps != 0)
        st = cuda->ops->window_max(cuda->be, &window, NULL);
    top.workspace = malloc(top.workspace_bytes + 1u);
    if (st == KVC_OK)
        st = cuda->ops->topk(cuda->be, &top, NULL);
    free(top.workspace);
    return st;
}

FAKE_CUDA_OP(select_vote)
{
    const kvk_cuda_select_vote_args *a = args;
    kvc_status st = fake_cuda_is_clean(a->workspace, a->n_seqs) ? KVC_OK : KVC_INVALID;
    for (uint32_t s = 0; st == KVC_OK && s < a->n_seqs; s++) {
        if (a->keep == NULL || a->keep[s] == 0)
            st = select_one(cuda, a, s);
    }
    return st;
}

size_t kvk_cuda_rerank_workspace_bytes(uint32_t n_seqs, uint32_t n_max, uint32_t n_q_heads)
{
    return n_max <= KVK_CUDA_WIDE_MAX ? (size_t)n_seqs * n_max * n_q_heads : 0;
}

static int by_position(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* The best vote among those of list [n] that are at most eps away. */
static void widen(const uint32_t *list, const float *votes, uint32_t n, uint32_t eps, float *out)
{
    for (uint32_t i = 0; i < n; i++) {
        out[i] = votes[i];
        for (uint32_t j = 0; j < n; j++) {
            uint32_t apart = list[i] > list[j] ? list[i] - list[j] : list[j] - list[i];
            out[i] = apart <= eps && votes[j] > out[i] ? votes[j] : out[i];
        }
    }
}

/* Whether finer has all of list [n]; a device takes others as absent, a worker lists none. */
static bool all_there(const kvk_cuda_candidates *finer, const uint32_t *list, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        if (list[i] - finer->base >= finer->n_rows)
            return false;
    }
    return true;
}

/* Of a list in ascending order, so that the order of its rows is that of positions. */
static kvc_status rerank_list(kvk_cuda *cuda, const kvk_cuda_rerank_args *a, uint32_t seq,
                              const uint32_t *list, uint32_t n)
{
    size_t row = kvk_index_row_bytes(a->n_kv_heads, a->dims);
    const kvk_cuda_candidates *f = a->finer + seq;
    uint8_t *rows = malloc(n * row + 1u);
    float *votes = calloc(2u * (size_t)n + 1u, sizeof(*votes)), *wide = votes + n;
    uint32_t *picks = a->picks + (size_t)seq * a->k;
    kvk_topk_args top = {.scores = wide,
                         .n = n,
                         .k = a->k,
                         .workspace_bytes = kvk_topk_workspace_bytes(n, a->k),
                         .ids = picks,
                         .n_out_p = a->n_picks + seq};
    const voters v = {
        a->q + (size_t)seq * a->n_q_heads * a->dims, a->n_q_heads, a->n_kv_heads, a->dims, n, rows};
    top.workspace = malloc(top.workspace_bytes + 1u);
    bool room = rows != NULL && votes != NULL && top.workspace != NULL;
    kvc_status st = !room ? KVC_NO_MEMORY : all_there(f, list, n) ? KVC_OK : KVC_INVALID;
    for (uint32_t i = 0; st == KVC_OK && i < n; i++)
        memcpy(rows + i * row, (const uint8_t *)f->index + (list[i] - f->base) * row, row);
    if (st == KVC_OK)
        st = vote(cuda, &v, votes);
    if (st == KVC_OK) {
        widen(list, votes, n, a->eps, wide);
        st = cuda->ops->topk(cuda->be, &top, NULL);
    }
    for (uint32_t i = 0; st == KVC_OK && i < a->n_picks[seq]; i++)
        picks[i] = list[picks[i]];
    free(top.workspace);
    free(votes);
    free(rows);
    return st;
}

FAKE_CUDA_OP(rerank)
{
    const kvk_cuda_rerank_args *a = args;
    size_t bytes = kvk_cuda_rerank_workspace_bytes(a->n_seqs, a->n_max, a->n_q_heads);
    kvc_status st = bytes != 0 && bytes <= a->workspace_bytes ? KVC_OK : KVC_INVALID;
    for (uint32_t s = 0; st == KVC_OK && s < a->n_seqs; s++) {
        if (a->keep != NULL && a->keep[s] != 0)
            continue;
        uint32_t n = a->n_list[s] < a->n_max ? a->n_list[s] : a->n_max;
        uint32_t *list = malloc((n + 1u) * sizeof(*list));
        if (list == NULL)
            return KVC_NO_MEMORY;
        memcpy(list, a->list + (size_t)s * a->n_max, n * sizeof(*list));
        qsort(list, n, sizeof(*list), by_position);
        memset(a->workspace, 0xa5, bytes); /* it is nobody else's */
        st = rerank_list(cuda, a, s, list, n);
        free(list);
    }
    return st;
}

FAKE_CUDA_OP(order)
{
    const kvk_cuda_order_args *a = args;
    (void)cuda;
    for (uint32_t s = 0; s < a->n_seqs; s++) {
        const uint32_t *picks = a->picks + (size_t)s * a->k;
        for (uint32_t i = 0; i < a->n_picks[s]; i++) {
            uint32_t below = 0;
            for (uint32_t j = 0; j < a->n_picks[s]; j++)
                below += picks[j] < picks[i];
            a->ordered[(size_t)s * a->k + below] = picks[i];
        }
    }
    return KVC_OK;
}
