/*
 * fake_cuda_chunks.c: retrieval of whole chunks without a GPU: the ops of kvk/cuda.h for one list,
 * by those of the CPU. None of them is in a graph.
 */
#include <math.h>
#include <stdlib.h>

#include "fake_cuda_internal.h"

size_t kvk_cuda_chunk_select_workspace_bytes(uint32_t n_seqs, uint32_t rows_max)
{
    return (size_t)n_seqs * rows_max * sizeof(float);
}

kvc_status kvk_cuda_chunk_select(kvk_cuda *cuda, const kvk_cuda_chunk_select_args *a,
                                 kvk_stream *stream)
{
    const kvk_cuda_candidates *c = a->cands;
    uint32_t n = c->n_rows < a->rows_max ? c->n_rows : a->rows_max;
    (void)stream;
    if (!fake_cuda_take_op())
        return KVC_UNSUPPORTED;
    if (a->workspace_bytes < kvk_cuda_chunk_select_workspace_bytes(1, a->rows_max))
        return KVC_INVALID;
    const kvk_score_keys_args score = {.q = a->q,
                                       .m = 1,
                                       .n_q_heads = 1,
                                       .n_kv_heads = 1,
                                       .head_dim = a->dims,
                                       .keys = {c->index, a->stride_bytes, a->dtype},
                                       .n = n,
                                       .out = a->workspace,
                                       .out_stride = n};
    kvk_topk_args top = {.scores = a->workspace,
                         .n = n,
                         .k = a->k,
                         .base = c->base,
                         .ids = a->picks,
                         .out_scores = a->scores,
                         .n_out_p = a->n_picks,
                         .workspace_bytes = kvk_topk_workspace_bytes(n, a->k)};
    top.workspace = malloc(top.workspace_bytes + 1u);
    kvc_status st = cuda->ops->score_keys(cuda->be, &score, NULL);
    if (st == KVC_OK)
        st = cuda->ops->topk(cuda->be, &top, NULL);
    free(top.workspace);
    for (uint32_t i = *a->n_picks; st == KVC_OK && i < a->k; i++) {
        a->picks[i] = UINT32_MAX;
        a->scores[i] = -INFINITY;
    }
    return st;
}

kvc_status kvk_cuda_chunk_weights(kvk_cuda *cuda, const kvk_chunk_weights_args *args,
                                  kvk_stream *stream)
{
    (void)stream;
    return fake_cuda_take_op() ? cuda->ops->chunk_weights(cuda->be, args, NULL) : KVC_UNSUPPORTED;
}

kvc_status kvk_cuda_chunk_attend(kvk_cuda *cuda, const kvk_cuda_chunk_attend_args *a,
                                 kvk_stream *stream)
{
    size_t heads = (size_t)a->n_q * a->n_q_heads;
    uint32_t elem = a->dtype == KVK_F32 ? 4 : 2;
    uint32_t off = (a->first_head != NULL ? *a->first_head : 0) * a->head_dim * elem;
    kvc_status st = KVC_OK;
    (void)stream;
    if (!fake_cuda_take_op())
        return KVC_UNSUPPORTED;
    for (size_t i = 0; st == KVC_OK && i < a->k; i++) {
        const void *rows[KVK_CUDA_CHUNK_ROWS];
        bool there = i < *a->n_list && a->list[i] >= 0;
        for (size_t j = 0; j < heads && !there; j++)
            a->lse[i * heads + j] = -INFINITY;
        if (!there)
            continue;
        for (size_t j = 0; j < a->n_rows; j++)
            rows[j] = (const uint8_t *)a->res->slots + (size_t)a->list[i] * a->chunk_bytes +
                      j * a->row_bytes;
        const kvk_attend_args attend = {.q = a->q,
                                        .n_q = a->n_q,
                                        .n_q_heads = a->n_q_heads,
                                        .n_kv_heads = a->n_kv_heads,
                                        .head_dim = a->head_dim,
                                        .rows = rows,
                                        .n_kv = a->n_rows,
                                        .k_off_bytes = a->k_off_bytes + off,
                                        .v_off_bytes = a->v_off_bytes + off,
                                        .dtype = a->dtype,
                                        .scale = a->scale,
                                        .o = a->o + i * heads * a->head_dim,
                                        .lse = a->lse + i * heads};
        st = cuda->ops->attend(cuda->be, &attend, NULL);
    }
    return st;
}

kvc_status kvk_cuda_chunk_fuse(kvk_cuda *cuda, const kvk_cuda_chunk_fuse_args *a,
                               kvk_stream *stream)
{
    const kvk_chunk_fuse_args args = {.o = a->o,
                                      .lse = a->lse,
                                      .weights = a->weights,
                                      .n_chunks = a->k,
                                      .n = a->n,
                                      .dim = a->dim,
                                      .off_by_one = a->off_by_one,
                                      .out = a->out};
    (void)stream;
    return fake_cuda_take_op() ? cuda->ops->chunk_fuse(cuda->be, &args, NULL) : KVC_UNSUPPORTED;
}

kvc_status kvk_cuda_mean(kvk_cuda *cuda, const kvk_cuda_mean_args *a, kvk_stream *stream)
{
    size_t bytes = (size_t)a->width * (a->dtype == KVK_F32 ? 4 : 2);
    kvc_status st = fake_cuda_take_op() ? KVC_OK : KVC_UNSUPPORTED;
    (void)stream;
    for (size_t i = 0; st == KVC_OK && i < a->n_seqs; i++) {
        const kvk_mean_args args = {
            .in = {(const uint8_t *)a->in + i * a->n * bytes, bytes, a->dtype},
            .n = a->n,
            .width = a->width,
            .out = a->out + i * a->width};
        st = cuda->ops->mean(cuda->be, &args, NULL);
    }
    return st;
}
