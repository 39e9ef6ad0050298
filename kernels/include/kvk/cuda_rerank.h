/*
 * cuda_rerank.h: the second stage of a selection on a CUDA device: the candidates that
 * kvk_cuda_select_vote left by a small index, ranked again by a finer one. Rules: those of cuda.h.
 */
#ifndef KVK_CUDA_RERANK_H
#define KVK_CUDA_RERANK_H

#include "kvk/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/*
 * The k best positions of each sequence's list by the soft vote (2411.02886 eq. 7) over a finer
 * index of each kv head: as kvk_cuda_select_vote does, but the candidates, of which every query
 * head takes its softmax, are those of the list alone. With eps > 0 a candidate's score is the best
 * vote of those on the list that are at most eps positions away. Row p - base of finer is that of
 * position p; one that finer does not have weighs nothing, has the score -1, also within a window,
 * and comes after all but votes that are NaN. Bound of a vote, heads and dims: as there; sums are
 * taken in list order, so equal lists give equal bits. k <= KVK_CUDA_K_MAX, n_max <=
 * KVK_CUDA_WIDE_MAX. The workspace needs no clearing.
 */
typedef struct kvk_cuda_rerank_args {
    uint32_t n_seqs, n_q_heads, n_kv_heads, dims, k, eps, n_max;
    const float *q;                   /* [n_seqs, n_q_heads, dims] */
    const kvk_cuda_candidates *finer; /* [n_seqs] rows of kvk_index_row_bytes(n_kv_heads, dims) */
    const uint32_t *list;             /* [n_seqs, n_max] positions, no two the same */
    const uint32_t *n_list;           /* [n_seqs], above n_max cut to it */
    uint32_t *picks;                  /* [n_seqs, k] positions, score descending, then ascending */
    float *scores;                    /* [n_seqs, k] or NULL */
    uint32_t *n_picks;                /* [n_seqs] = min(k, n_list) */
    void *workspace;
    size_t workspace_bytes;
    const uint32_t *keep; /* [n_seqs] or NULL: where not 0, nothing is done for the sequence */
} kvk_cuda_rerank_args;
/* 0: out of range. */
size_t kvk_cuda_rerank_workspace_bytes(uint32_t n_seqs, uint32_t n_max, uint32_t n_q_heads);
kvc_status kvk_cuda_rerank(kvk_cuda *cuda, const kvk_cuda_rerank_args *args,
                           kvk_stream *stream) KVC_MUST_CHECK;

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
