/*
 * attend_mma.cuh: a tile of bf16 rows as they lie, on the tensor cores: queries and logits. Device
 * code.
 *
 * The queries' layout is that of the row's ldmatrix; attend_split.cuh's is another one.
 */
#ifndef KVKI_CUDA_ATTEND_MMA_CUH
#define KVKI_CUDA_ATTEND_MMA_CUH

#include "mma.cuh"

/* The group's queries, a lane's head each, in pieces. */
template <int kDim, bool kFew>
__device__ static inline void load_queries_bf16(const float *q, uint32_t group,
                                                struct pieces<kFew> (&p)[kDim / 16])
{
    uint32_t lane = threadIdx.x & 31u, head = piece_head<kFew>();

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

/* x[t][i]: logit of the lane's head and row t * 8 + lane % 4 * 2 + i, unscaled. */
template <int kDim, bool kFew>
__device__ static inline void find_logits_bf16(const struct pieces<kFew> (&q)[kDim / 16],
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
        float2 sums = head_sums<kFew>(c[t]);
        x[t][0] = sums.x;
        x[t][1] = sums.y;
    }
}

/*
 * Kv heads of a tile that has been asked for, dealt to the warps, which have their queries at hand
 * when the rows come. at: the tile's number in the workspace. All threads call.
 */
template <int kDim, bool kFew>
__device__ static inline void attend_bf16(const struct attend_params *p,
                                          const struct attend_layout *l, uint32_t seq, uint32_t at,
                                          struct attend_rows *rows, const char *tile)
{
    const kvk_cuda_attend_args *a = &p->a;
    uint32_t group = a->n_q_heads / a->n_kv_heads, own = piece_head<kFew>();
    uint32_t warp = threadIdx.x / 32u;
    const float *q = a->q + (size_t)seq * a->n_q_heads * kDim;
    struct pieces<kFew> queries[kDim / 16];

    if (warp < a->n_kv_heads)
        load_queries_bf16<kDim, kFew>(q + (size_t)warp * group * kDim, group, queries);
    attend_await_tile(rows);
    for (uint32_t kv_head = warp; kv_head < a->n_kv_heads; kv_head += ATTEND_WARPS) {
        uint32_t head = kv_head * group + own;
        const char *keys = tile + a->k_off_bytes + (size_t)kv_head * kDim * 2u;
        size_t row = ((size_t)seq * a->n_q_heads + head) * p->n_tiles + at;
        float x[2][2], most = 0, total = 0;
        if (kv_head != warp)
            load_queries_bf16<kDim, kFew>(q + (size_t)kv_head * group * kDim, group, queries);
        find_logits_bf16<kDim, kFew>(queries, keys, l->row_stride, x);
        find_weights(a, rows->there, x, &most, &total);
        if (threadIdx.x % 4u == 0 && piece_first<kFew>() && own < group) {
            p->most[row] = most;
            p->total[row] = total;
        }
        sum_bf16<kDim, kFew>(x, keys - a->k_off_bytes + a->v_off_bytes, l->row_stride, own < group,
                             p->o + (((size_t)seq * p->n_tiles + at) * a->n_q_heads + head) * kDim);
    }
}

#endif
