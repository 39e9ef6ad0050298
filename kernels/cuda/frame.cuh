/*
 * frame.cuh: what the beginnings of ESA's and TokenSelect's steps share: elements of a query, its
 * rotation, and index rows. Device code, for blocks of FRAME_THREADS or half as many.
 */
#ifndef KVKI_CUDA_FRAME_CUH
#define KVKI_CUDA_FRAME_CUH

#include "encode.cuh"
#include "kvk/cuda_frame.h"

#define FRAME_THREADS 256u /* at most; a dimension each */

__device__ static inline float load_one(const void *in, size_t i, kvk_dtype dtype)
{
    return dtype == KVK_BF16 ? kvki_bf16(((const uint16_t *)in)[i])
                             : __half2float(((const __half *)in)[i]);
}

/* x and y, a pair of one head, rotated by a position's angle. */
__device__ static inline float2 rotated(float2 x, double angle)
{
    double s = 0, c = 0;

    sincos(angle, &s, &c);
    return make_float2(x.x * (float)c - x.y * (float)s, x.y * (float)c + x.x * (float)s);
}

/* A sequence's new token to shared memory, by one load of a warp, since it may be the host's. All
 * threads call. */
__device__ static inline void read_token(const kvk_cuda_frame_args *a, uint32_t seq,
                                         kvk_cuda_token *shared)
{
    static_assert(sizeof(kvk_cuda_token) % 8 == 0 && sizeof(kvk_cuda_token) <= 32 * 8, "");
    if (a->tokens && threadIdx.x < sizeof(*shared) / 8)
        ((unsigned long long *)shared)[threadIdx.x] =
            ((const unsigned long long *)(a->tokens + seq))[threadIdx.x];
    if (!a->tokens && threadIdx.x == 0)
        *shared = a->token;
    __syncthreads();
}

/* Where K and V of a sequence's new token lie, which is asked of the token only where the arguments
 * do not say it. False, in all threads: it was asked, and there is none. All threads call. */
__device__ static inline bool find_token(const kvk_cuda_frame_args *a, uint32_t seq,
                                         kvk_cuda_token *shared, const void **k_p, const void **v_p)
{
    if (a->kv) {
        *k_p = a->kv;
        *v_p = (const uint16_t *)a->kv + (size_t)a->n_kv_heads * a->head_dim;
        return true;
    }
    read_token(a, seq, shared);
    *k_p = shared->k;
    *v_p = shared->v;
    return shared->row != NULL;
}

/* The greatest |y| over the block's threads; +Inf where one is not finite. All threads call. */
__device__ static inline float widest(float y)
{
    __shared__ float most[FRAME_THREADS / 32u];
    float own = isfinite(y) ? fabsf(y) : INFINITY;
    uint32_t warps = blockDim.x / 32u; /* a power of two */

    own = kvki_lanes_max(own, 32);
    if ((threadIdx.x & 31u) == 0)
        most[threadIdx.x / 32u] = own;
    __syncthreads();
    return kvki_lanes_max(most[threadIdx.x % warps], warps);
}

/* Head `head` of an index row; y: of the thread's dimension. *bad (NULL: not) becomes 1 where one
 * is not finite. All threads call. */
__device__ static inline void write_index_row(float y, uint32_t dims, uint32_t head,
                                              uint32_t n_heads, uint8_t *row, uint32_t *bad)
{
    uint32_t d = threadIdx.x;
    float all = widest(d < dims ? y : 0.0f);
    uint32_t bits = all > 0 && all < INFINITY ? kvki_scale_bits(all, 127.0) : 0;
    float scale = kvki_bf16(bits);

    if (d < dims)
        row[head * dims + d] = (uint8_t)(int8_t)(scale > 0 ? rintf(__fdiv_rn(y, scale)) : 0.0f);
    if (d < 2)
        row[n_heads * dims + 2u * head + d] = (uint8_t)(bits >> (8 * d));
    if (d == 0 && bad && all == INFINITY)
        *bad = 1;
}

/* kvk_cuda_frame with per_head; its arguments were looked at. */
kvc_status kvki_frame_heads(kvk_cuda *cuda, const kvk_cuda_frame_args *args, kvk_stream *stream);

#endif
