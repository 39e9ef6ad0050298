/*
 * fake_cuda_vote.c: the fake's ops of TokenSelect. See fake_cuda.h. Ops run on the caller's thread.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "fake_cuda_internal.h"

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
    return (size_t)n_seqs * rows_max * sizeof(float) + FAKE_CUDA_TAG_BYTES;
}

/* The votes of a sequence's n candidates. */
static kvc_status vote(kvk_cuda *cuda, const kvk_cuda_select_vote_args *a, uint32_t seq, uint32_t n,
                       float *out)
{
    uint32_t heads = a->n_q_heads;
    float *logits = malloc(((size_t)heads * n + 2u * heads) * sizeof(*logits));
    float *max = logits + (size_t)heads * n, *sum = max + heads;
    const kvk_score_index_args score = {.q = a->q + (size_t)seq * heads * a->dims,
                                        .m = 1,
                                        .n_q_heads = heads,
                                        .n_kv_heads = a->n_kv_heads,
                                        .dims = a->dims,
                                        .index = a->cands[seq].index,
                                        .index_stride_bytes =
                                            kvk_index_row_bytes(a->n_kv_heads, a->dims),
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
    float *votes = a->workspace;
    votes += FAKE_CUDA_TAG_BYTES / sizeof(*votes);
    kvk_topk_args top = {.scores = votes,
                         .n = n,
                         .k = a->k,
                         .base = c->base,
                         .workspace_bytes = kvk_topk_workspace_bytes(n, a->k),
                         .ids = a->picks + (size_t)seq * a->k,
                         .n_out_p = a->n_picks + seq};
    kvc_status st = vote(cuda, a, seq, n, votes);
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
