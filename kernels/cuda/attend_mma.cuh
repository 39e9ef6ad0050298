/*
 * attend_mma.cuh: a tile of bf16 rows as they lie, on the tensor cores: queries and logits. Device
 * code.
 *
 * The queries' layout is that of the row's ldmatrix; attend_split.cuh's is another one.
 */
#ifndef KVKI_CUDA_ATTEND_MMA_CUH
#define KVKI_CUDA_ATTEND_MMA_CUH

#include "mma.cuh"

/* The group's queries, head lane / 4 a lane, in pieces. */
template <int kDim>
__device__ static inline void load_queries_bf16(const float *q, uint32_t group,
                                                struct pieces (&p)[kDim / 16])
{
    uint32_t lane = threadIdx.x & 31u, head = lane / 4u;

#pragma unroll
    for (int step = 0; step < kDim / 16; step++) {
#pragma unroll
        for (int part = 0; part < 2; part++) {
            float2 x = make_float2(0, 0);
            if (head < group)
                x = *(const float2 *)(q + head * kDim + step * 16 + part * 8 + lane % 4u * 2u);
            split(x.x, x.y, part, &p[step]);
        }
    }
}

/* x[t][i]: logit of head lane / 4 and row t * 8 + lane % 4 * 2 + i, unscaled. */
template <int kDim>
__device__ static inline void find_logits_bf16(const struct pieces (&q)[kDim / 16],
                                               const char *keys, uint32_t row_stride,
                                               float (&x)[2][2])
{
    uint32_t lane = threadIdx.x & 31u;
    const char *at =
        keys + (size_t)(lane / 16u * 8u + lane % 8u) * row_stride + lane / 8u % 2u * 16u;
    float c[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};

#pragma unroll
    for (int step = 0; step < kDim / 16; step++) {
        uint32_t k[4];
        load_matrices<false>(k, at + step * 32);
        multiply_pieces(c[0], &q[step], k[0], k[1]);
        multiply_pieces(c[1], &q[step], k[2], k[3]);
    }
#pragma unroll
    for (int t = 0; t < 2; t++) {
        x[t][0] = c[t][0] + c[t][2];
        x[t][1] = c[t][1] + c[t][3];
    }
}

/*
 * Kv heads of a tile that has been asked for, dealt to the warps: the first round waits for the
 * tile, with its queries at hand. at: the tile's number in the workspace. All threads call.
 */
template <int kDim>
__device__ static inline void attend_bf16(const struct attend_params *p,
                                          const struct attend_layout *l, uint32_t seq, uint32_t at,
                                          uint32_t there, const char *tile)
{
    const kvk_cuda_attend_args *a = &p->a;
    uint32_t lane = threadIdx.x & 31u, group = a->n_q_heads / a->n_kv_heads;
    const float *q = a->q + (size_t)seq * a->n_q_heads * kDim;
    struct pieces queries[kDim / 16];

    for (uint32_t kv_head = threadIdx.x / 32u; kv_head < a->n_kv_heads; kv_head += ATTEND_WARPS) {
        uint32_t head = kv_head * group + lane / 4u;
        const char *keys = tile + a->k_off_bytes + (size_t)kv_head * kDim * 2u;
        size_t row = ((size_t)seq * a->n_q_heads + head) * p->n_tiles + at;
        float x[2][2], most = 0, total = 0;
        load_queries_bf16<kDim>(q + (size_t)kv_head * group * kDim, group, queries);
        if (kv_head < ATTEND_WARPS) {
            kvki_async_wait();
            __syncthreads();
        }
        find_logits_bf16<kDim>(queries, keys, l->row_stride, x);
        find_weights(a, there, x, &most, &total);
        if (lane % 4u == 0 && lane / 4u < group) {
            p->most[row] = most;
            p->total[row] = total;
        }
        sum_bf16<kDim>(x, keys - a->k_off_bytes + a->v_off_bytes, l->row_stride, lane / 4u < group,
                       p->o + (((size_t)seq * p->n_tiles + at) * a->n_q_heads + head) * kDim);
    }
    if (threadIdx.x / 32u >= a->n_kv_heads) { /* warps without a head must meet the others too */
        kvki_async_wait();
        __syncthreads();
    }
}

#endif
