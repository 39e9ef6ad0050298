/*
 * attend_mma.cu: attention of a tile on the tensor cores, for bf16 rows that are not rotated.
 *
 * A warp takes a kv head with its group of query heads (at most 8), a block all heads of 16 rows.
 * The products must be those of f32 queries and weights, so each such number is split into three
 * bf16 pieces that add up to it exactly (8 + 8 + 8 bits): the high and middle pieces are rows 0-7
 * and 8-15 of one matrix product, the low pieces a second one into the same sums. Weights come out
 * of the first product just where the second one wants its left operand, so they never leave
 * registers. A listed row that holds Inf gives NaN where the exact sum might be Inf.
 */
#include "mma.cuh"

/* The group's queries, head lane / 4 a lane, in pieces. */
template <int kDim>
__device__ static inline void load_queries(const float *q, uint32_t group,
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
__device__ static inline void find_logits(const struct pieces (&q)[kDim / 16], const char *keys,
                                          uint32_t row_stride, float (&x)[2][2])
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

template <int kDim>
__global__ void __launch_bounds__(ATTEND_THREADS, 2) attend_mma_kernel(const struct attend_params p)
{
    extern __shared__ __align__(16) char tile[];
    __shared__ struct attend_rows rows;
    const kvk_cuda_attend_args *a = &p.a;
    const struct attend_layout l = attend_layout_of(a);
    uint32_t seq = blockIdx.y, lane = threadIdx.x & 31u, first = blockIdx.x * ATTEND_TILE;
    uint32_t group = a->n_q_heads / a->n_kv_heads, there = 0, n = 0;
    const float *q = a->q + (size_t)seq * a->n_q_heads * kDim;
    struct pieces queries[kDim / 16];

    kvki_wait_for_previous();
    kvki_let_next_start();
    n = attend_find_rows(a, seq, first, &rows);
    if (first >= n)
        return;
    there = attend_load_tile(a, &l, &rows, tile);
    for (uint32_t kv_head = threadIdx.x / 32u; kv_head < a->n_kv_heads; kv_head += ATTEND_WARPS) {
        uint32_t head = kv_head * group + lane / 4u;
        const char *keys = tile + a->k_off_bytes + (size_t)kv_head * kDim * 2u;
        size_t at = ((size_t)seq * a->n_q_heads + head) * p.n_tiles + blockIdx.x;
        float x[2][2], most = 0, total = 0;
        load_queries<kDim>(q + (size_t)kv_head * group * kDim, group, queries);
        if (kv_head < ATTEND_WARPS) { /* the first round waits, with its queries at hand */
            kvki_async_wait();
            __syncthreads();
        }
        find_logits<kDim>(queries, keys, l.row_stride, x);
        find_weights(a, there, x, &most, &total);
        if (lane % 4u == 0 && lane / 4u < group) {
            p.most[at] = most;
            p.total[at] = total;
        }
        sum_bf16<kDim>(x, keys - a->k_off_bytes + a->v_off_bytes, l.row_stride, lane / 4u < group,
                       p.o + (((size_t)seq * p.n_tiles + blockIdx.x) * a->n_q_heads + head) * kDim);
    }
    if (a->n_kv_heads < ATTEND_WARPS) { /* warps without a head must meet the others too */
        if (threadIdx.x / 32u >= a->n_kv_heads) {
            kvki_async_wait();
            __syncthreads();
        }
    }
}

attend_fn kvki_attend_mma(uint32_t head_dim)
{
    return head_dim == 128 ? attend_mma_kernel<128> : head_dim == 64 ? attend_mma_kernel<64> : NULL;
}
