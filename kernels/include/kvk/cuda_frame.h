/*
 * cuda_frame.h: how a decode step begins on a CUDA device, for a graph that is replayed while the
 * sequences grow: the queries and windows that the ops of cuda.h read are made here, from lengths
 * in memory. Rules: those of cuda.h.
 */
#ifndef KVK_CUDA_FRAME_H
#define KVK_CUDA_FRAME_H

#include "kvk/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/* A new token: k and v [n_kv_heads, head_dim] bf16 go one after the other to row and to copy (NULL:
 * not), as they are or coded as kvk_cuda_encode does, and its index row is written, as
 * kvk_cuda_digest makes it; fine_row: that of a finer index. row NULL: there is none. bad (pinned
 * or device; NULL: not) is set to 1 where the index row, or a coded head, had an element that is
 * not finite. */
typedef struct kvk_cuda_token {
    const void *k, *v;
    void *row, *copy, *index_row, *fine_row;
    uint32_t *bad;
} kvk_cuda_token;

/*
 * Begins a step (of ESA, unless per_head) of each sequence over n = n_tokens[s] tokens: queries in
 * f32 from q in dtype, and where candidates and the near window are:
 *   q_index [dims]: as kvk_cuda_query's, of q rotated by far_position, or with score_raw as it is
 *   q_far: rotated by far_position; q_near: rotated by n_near - 1
 *   n_near = min(n, n_recent + 1); near_first = n - n_near
 *   cands: n_rows = near_first - n_sink, base = n_sink; index is the caller's, and stays
 *
 * Rotation: as kvk_rope; without inv_freq none. q_index, q_far, q_near, n_near and cands may be
 * NULL. dims <= 256, n_kv_heads * head_dim <= 8192. expected (may be NULL): differs[s] is set to 1
 * where q is not those bytes. q NULL: only tokens. tokens, or else token for one sequence: what is
 * new; n_kv_heads * head_dim a multiple of 8 then. kv (NULL: not), for one sequence: where k and v
 * of its token lie, one behind the other, whatever that says, so that all are asked for at once.
 * Projections are sums of chains of 32 inputs. The workspace is cleared as kvk_cuda_select's.
 *
 * per_head 1: a step of TokenSelect, over an index of each kv head; head_dim <= 256, n_q_heads *
 * head_dim <= 16384, no q_far and no workspace. What is different:
 *   q_index [n_q_heads, dims]: as kvk_cuda_query's per head, of q rotated by n_recent
 *   n_near = min(n, n_recent); near_first NULL: n_near is what it was
 *   q_near: also for what lies before the near rows, at the positions -1, -2, ...
 * fine_dims, at least dims and at most 256 (0: there is none): a finer index beside it. Both
 * matrices have fine_dims columns then, of which the index has the first dims; q_fine [n_q_heads,
 * fine_dims] goes with q_index, and a token's fine_row with its index_row.
 * Its Selection Cache (last not NULL): where kept_first[s] is not UINT32_MAX and the cosine of q
 * and last[s], as kvk_cuda_keep's, is at least threshold, the picks are kept, and with them what
 * was near: keep[s] = kept[s] = 1 and near_first[s] = kept_first[s]. Else both are 0 and q becomes
 * last[s].
 */
typedef struct kvk_cuda_frame_args {
    uint32_t n_seqs, n_q_heads, n_kv_heads, head_dim, dims;
    const void *q;   /* [n_seqs, n_q_heads, head_dim] */
    kvk_dtype dtype; /* of q: BF16 or F16 */
    uint32_t score_raw;
    const double *inv_freq;
    const float *proj; /* [n_kv_heads * head_dim, dims] */
    float *q_index, *q_far, *q_near;
    const uint32_t *n_tokens; /* [n_seqs] */
    uint32_t n_sink, n_recent, far_position;
    uint32_t *n_near, *near_first; /* [n_seqs], both or none */
    kvk_cuda_candidates *cands;    /* [n_seqs] */
    const void *expected;          /* [n_seqs, n_q_heads, head_dim] */
    uint32_t *differs;             /* [n_seqs] */
    const kvk_cuda_token *tokens;  /* [n_seqs], device or pinned; or NULL */
    kvk_cuda_token token;
    const void *kv;        /* [2, n_kv_heads, head_dim] */
    kvk_dtype row_dtype;   /* of the tokens' rows: 0 or BF16, or coded (head_dim <= 256) */
    const float *key_proj; /* [n_kv_heads * head_dim, dims] */
    void *workspace;
    size_t workspace_bytes;
    uint32_t per_head; /* 0 or 1; then proj and key_proj are [n_kv_heads, head_dim, dims] */
    uint32_t fine_dims;
    float *q_fine;
    double threshold;
    float *last;                /* [n_seqs, n_q_heads, head_dim] */
    const uint32_t *kept_first; /* [n_seqs]; may be pinned */
    uint32_t *keep, *kept;      /* [n_seqs], for the selection and for the host */
} kvk_cuda_frame_args;
size_t kvk_cuda_frame_workspace_bytes(uint32_t n_seqs, uint32_t inputs, uint32_t dims);
kvc_status kvk_cuda_frame(kvk_cuda *cuda, const kvk_cuda_frame_args *args,
                          kvk_stream *stream) KVC_MUST_CHECK;

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
