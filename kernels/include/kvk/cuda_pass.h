/*
 * cuda_pass.h: more of kvk/cuda.h: passes of several tokens of one sequence, plain C11.
 *
 * Lengths are the host's here, so that ops go to the stream one by one. The rules of kvk/cuda.h
 * hold, and its ops digest, query, resolve, gather and prefill do the rest of a pass.
 */
#ifndef KVK_CUDA_PASS_H
#define KVK_CUDA_PASS_H

#include "kvk/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/* q of n tokens [n, n_heads, head_dim] bf16 -> f32 at out, token i rotated as by kvk_rope to
 * position first + i * step (step 0 or 1); without inv_freq as it is. head_dim <= 256, n <=
 * KVK_CUDA_CHUNK_MAX. */
typedef struct kvk_cuda_rope_args {
    const void *in;
    uint32_t n, n_heads, head_dim;
    const double *inv_freq;
    uint32_t first, step;
    float *out;
} kvk_cuda_rope_args;
kvc_status kvk_cuda_rope(kvk_cuda *cuda, const kvk_cuda_rope_args *args,
                         kvk_stream *stream) KVC_MUST_CHECK;

/* K and V of n tokens, slice_bytes (a multiple of 16) each, one after the other: token i to row
 * (first + i) % ring_rows of ring, n <= ring_rows, and to row i of copy (NULL: not; may be pinned).
 */
typedef struct kvk_cuda_rows_args {
    const void *k, *v; /* [n, slice_bytes] */
    uint32_t n, slice_bytes;
    void *ring; /* [ring_rows, 2 * slice_bytes] */
    uint32_t first, ring_rows;
    void *copy; /* [n, 2 * slice_bytes] */
} kvk_cuda_rows_args;
kvc_status kvk_cuda_rows(kvk_cuda *cuda, const kvk_cuda_rows_args *args,
                         kvk_stream *stream) KVC_MUST_CHECK;

/* Sets *bad (pinned or device) to 1 where one of len_bytes (a multiple of 16) of bf16 numbers is
 * not finite; else leaves it. */
typedef struct kvk_cuda_finite_args {
    const void *in;
    size_t len_bytes;
    uint32_t *bad;
} kvk_cuda_finite_args;
kvc_status kvk_cuda_finite(kvk_cuda *cuda, const kvk_cuda_finite_args *args,
                           kvk_stream *stream) KVC_MUST_CHECK;

/*
 * The k best candidates of a chunk of n_q queries together, as kvk_row_max, kvk_chunk_fold and,
 * with eps > 0, kvk_window_max have it (ESA eq. 4 and 8), on scores whose bits are
 * kvk_score_index's with n_q_heads = n_kv_heads = 1: from equal queries the picks are equal, and so
 * is every score of one. Rules as of kvk_cuda_select; the workspace is of
 * kvk_cuda_select_many_workspace_bytes for the n_q, dims and rows_max in args (0: out of range) and
 * cleared once. n_q <= KVK_CUDA_CHUNK_MAX.
 */
typedef struct kvk_cuda_select_many_args {
    uint32_t n_q, dims, k, eps, rows_max;
    const float *q;                   /* [n_q, dims] */
    const kvk_cuda_candidates *cands; /* one */
    uint32_t *picks;                  /* [k] positions */
    float *scores;                    /* [k] or NULL */
    uint32_t *n_picks;                /* one: min(k, n_rows) */
    void *workspace;
    size_t workspace_bytes;
} kvk_cuda_select_many_args;
size_t kvk_cuda_select_many_workspace_bytes(const kvk_cuda_select_many_args *args);
kvc_status kvk_cuda_select_many(kvk_cuda *cuda, const kvk_cuda_select_many_args *args,
                                kvk_stream *stream) KVC_MUST_CHECK;

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
