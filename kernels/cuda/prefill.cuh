/*
 * prefill.cuh: what packing the keys of a chunk's attention (prefill_pack.cu) and the attention
 * (prefill.cu) share. Device code, and the launch of the one by the other.
 */
#ifndef KVKI_CUDA_PREFILL_CUH
#define KVKI_CUDA_PREFILL_CUH

#include "mma.cuh"

#define PREFILL_KEYS 64u /* of a tile; packed keys are a multiple of it */

struct prefill_params {
    kvk_cuda_prefill_args a;
    __nv_bfloat16 *packed; /* [n_seqs, n_kv_heads, pieces of K then of V, keys_max, head_dim] */
    uint32_t keys_max;     /* a multiple of PREFILL_KEYS */
    uint32_t pieces;       /* 1 or 2 */
    uint32_t splits;       /* of the keys of a block of rows, if that alone would be few blocks */
    float *part_o;         /* [splits, n_seqs, n_q, n_q_heads, head_dim], if splits > 1 */
    float2 *part_sums;     /* [splits, n_seqs, n_q, n_q_heads]: maximum, total */
    bool coded;
};

__host__ __device__ static inline size_t prefill_piece_elems(const struct prefill_params *p)
{
    return (size_t)p->keys_max * p->a.head_dim;
}

__host__ __device__ static inline size_t prefill_part_rows(const kvk_cuda_prefill_args *a)
{
    return (size_t)a->n_seqs * a->n_q * a->n_q_heads;
}

__device__ static inline uint32_t prefill_queries_of(const kvk_cuda_prefill_args *a, uint32_t seq)
{
    return a->n_queries ? min(a->n_queries[seq], a->n_q) : a->n_q;
}

/* How many rows of its own a chunk has behind the list. */
__device__ static inline uint32_t prefill_own_of(const kvk_cuda_prefill_args *a, uint32_t seq)
{
    return a->own == KVK_CUDA_OWN_CHUNK ? prefill_queries_of(a, seq) : 0;
}

/* How many keys query i of n_queries sees; they are a prefix of all. */
__device__ static inline int32_t prefill_seen(const kvk_cuda_prefill_args *a, uint32_t n_list,
                                              uint32_t n_queries, uint32_t i)
{
    int32_t own = a->own == KVK_CUDA_OWN_CHUNK    ? (int32_t)i + 1
                  : a->own == KVK_CUDA_OWN_LISTED ? (int32_t)i + 1 - (int32_t)n_queries
                                                  : 0;
    return max((int32_t)n_list + own, 0);
}

/* Fills p.packed. */
kvc_status kvki_prefill_pack(const struct prefill_params &p, kvk_stream *stream);

#endif
