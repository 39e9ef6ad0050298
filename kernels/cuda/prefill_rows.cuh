/*
 * prefill_rows.cuh: a warp's 16 query rows in a chunk's attention, whichever products it is made
 * of: what they are, which keys they see, the softmax as the maximum grows, the results. Device
 * code.
 *
 * A lane has rows lane / 4 and that + 8; scores x [kKeys / 8][4] of a tile and sums o are laid out
 * as the 16 x 8 results of mma.cuh. Logits are in units of log 2: queries are scaled as they are
 * loaded.
 */
#ifndef KVKI_CUDA_PREFILL_ROWS_CUH
#define KVKI_CUDA_PREFILL_ROWS_CUH

#include "exp2.cuh"
#include "prefill.cuh"

/* What a block takes: rows [first, first + PREFILL_ROWS) of those of a kv head, tiles [tile, end).
 */
struct prefill_block {
    uint32_t seq, part, kv_head, first, n_rows, n_list, n_queries, tile, end;
    uint32_t all_see;   /* keys that every row sees */
    const char *packed; /* of the kv head */
};

/* False: there is nothing to do. */
template <int kKeys>
__device__ static inline bool prefill_find_block(const struct prefill_params *p,
                                                 struct prefill_block *b)
{
    const kvk_cuda_prefill_args *a = &p->a;
    uint32_t group = a->n_q_heads / a->n_kv_heads;

    b->seq = blockIdx.z / p->splits;
    b->part = blockIdx.z % p->splits;
    b->kv_head = blockIdx.y;
    b->first = (gridDim.x - 1 - blockIdx.x) * PREFILL_ROWS; /* the longest first */
    b->n_list = min(a->n_list[b->seq], a->stride);
    b->n_queries = prefill_queries_of(a, b->seq);
    b->n_rows = b->n_queries * group;
    b->packed = prefill_packed(p, b->seq, b->kv_head);
    if (b->first >= b->n_rows)
        return false;
    uint32_t last = min(b->first + PREFILL_ROWS, b->n_rows) - 1;
    uint32_t any_sees = (uint32_t)prefill_seen(a, b->n_list, b->n_queries, last / group);
    uint32_t n_tiles = (any_sees + kKeys - 1) / kKeys;
    b->all_see = (uint32_t)prefill_seen(a, b->n_list, b->n_queries, b->first / group);
    b->tile = n_tiles * b->part / p->splits;
    b->end = n_tiles * (b->part + 1) / p->splits;
    return true;
}

/* What a warp keeps of its rows: the queries in pieces, sums, maxima, totals. */
template <int kDim, int kPieces> struct rows_state {
    uint32_t q[kPieces][kDim / 16][4];
    float o[kDim / 8][4];
    float most[2], total[2];
};

__device__ static inline uint32_t rest_pair(float x, float y, uint32_t high)
{
    float2 rest = rest_of(x, y, high);
    return bf16_pair(rest.x, rest.y);
}

/* first: the warp's first row. */
template <int kDim, int kPieces>
__device__ static inline void load_rows(const kvk_cuda_prefill_args *a,
                                        const struct prefill_block &b, uint32_t first,
                                        struct rows_state<kDim, kPieces> *s)
{
    uint32_t lane = threadIdx.x & 31u, group = a->n_q_heads / a->n_kv_heads;
    float by = a->scale * LOG2_E;

#pragma unroll
    for (uint32_t r = 0; r < 2; r++) {
        uint32_t row = first + lane / 4u + r * 8u;
        const float *q = a->q + ((size_t)(b.seq * a->n_q + row / group) * a->n_q_heads +
                                 b.kv_head * group + row % group) *
                                    kDim;
#pragma unroll
        for (int step = 0; step < kDim / 16; step++) {
#pragma unroll
            for (uint32_t part = 0; part < 2; part++) {
                float2 x = make_float2(0, 0);
                if (row < b.n_rows)
                    x = *(const float2 *)(q + step * 16 + part * 8u + lane % 4u * 2u);
                x = make_float2(x.x * by, x.y * by);
                uint32_t high = bf16_pair(x.x, x.y);
                s->q[0][step][part * 2 + r] = high;
                if (kPieces == 2)
                    s->q[kPieces - 1][step][part * 2 + r] = rest_pair(x.x, x.y, high);
            }
        }
        s->most[r] = -INFINITY;
        s->total[r] = 0;
    }
#pragma unroll
    for (int t = 0; t < kDim / 8; t++)
        s->o[t][0] = s->o[t][1] = s->o[t][2] = s->o[t][3] = 0;
}

template <int kKeys>
__device__ static inline void cap_scores(const kvk_cuda_prefill_args *a, float (&x)[kKeys / 8][4])
{
    float most = a->softcap * LOG2_E, by = 1.0f / most;

    if (!(a->softcap > 0))
        return;
#pragma unroll
    for (int t = 0; t < kKeys / 8; t++) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            x[t][i] = most * tanhf(x[t][i] * by);
    }
}

/* Takes out what the lane's two rows do not see of a tile. holes: keys that are not there. */
template <int kKeys>
__device__ static inline void
mask_scores(const kvk_cuda_prefill_args *a, const struct prefill_block &b, uint32_t first,
            uint32_t tile, const uint64_t (&holes)[kKeys / 64], float (&x)[kKeys / 8][4])
{
    uint32_t lane = threadIdx.x & 31u, group = a->n_q_heads / a->n_kv_heads;
    int32_t seen[2];

#pragma unroll
    for (uint32_t r = 0; r < 2; r++)
        seen[r] = prefill_seen(a, b.n_list, b.n_queries, (first + lane / 4u + r * 8u) / group) -
                  (int32_t)(tile * kKeys);
#pragma unroll
    for (int t = 0; t < kKeys / 8; t++) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            uint32_t key = (uint32_t)t * 8u + lane % 4u * 2u + i % 2;
            if ((int32_t)key >= seen[i / 2] || (holes[t / 8] >> key % 64u & 1u))
                x[t][i] = -INFINITY;
        }
    }
}

/* Logits to weights against the greatest so far; keep: by what the sums so far are to be scaled. */
template <int kDim, int kPieces, int kKeys>
__device__ static inline void weigh_scores(float (&x)[kKeys / 8][4],
                                           struct rows_state<kDim, kPieces> *s, float (&keep)[2])
{
#pragma unroll
    for (uint32_t r = 0; r < 2; r++) {
        float some[2] = {s->most[r], x[0][r * 2]}, sum[2] = {0, 0}; /* two short chains */
#pragma unroll
        for (int t = 0; t < kKeys / 8; t++)
            some[t % 2] = fmaxf(some[t % 2], fmaxf(x[t][r * 2], x[t][r * 2 + 1]));
        float most = fmaxf(some[0], some[1]), base = 0;
        most = fmaxf(most, __shfl_xor_sync(KVKI_FULL_WARP, most, 1));
        most = fmaxf(most, __shfl_xor_sync(KVKI_FULL_WARP, most, 2));
        base = most == -INFINITY ? 0.0f : most;
        keep[r] = exp2_of(s->most[r] - base);
#pragma unroll
        for (int t = 0; t < kKeys / 8; t++) {
            x[t][r * 2] = exp2_of(x[t][r * 2] - base);
            x[t][r * 2 + 1] = exp2_of(x[t][r * 2 + 1] - base);
            sum[t % 2] += x[t][r * 2] + x[t][r * 2 + 1];
        }
        s->total[r] = s->total[r] * keep[r] + (sum[0] + sum[1]);
        s->most[r] = most;
    }
}

/* Whether that is not 1 for a row of the warp. */
__device__ static inline bool sums_change(const float (&keep)[2])
{
    return __any_sync(KVKI_FULL_WARP, keep[0] != 1.0f || keep[1] != 1.0f);
}

template <int kDim, int kPieces>
__device__ static inline void scale_sums(const float (&keep)[2],
                                         struct rows_state<kDim, kPieces> *s)
{
#pragma unroll
    for (int t = 0; t < kDim / 8; t++) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            s->o[t][i] *= keep[i / 2];
    }
}

/* Weights as the left operand of a product, in pieces. */
template <int kPieces, int kKeys>
__device__ static inline void split_weights(const float (&x)[kKeys / 8][4],
                                            uint32_t (&w)[kPieces][kKeys / 16][4])
{
#pragma unroll
    for (int step = 0; step < kKeys / 16; step++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float a = x[step * 2 + i / 2][i % 2 * 2], b = x[step * 2 + i / 2][i % 2 * 2 + 1];
            w[0][step][i] = bf16_pair(a, b);
            if (kPieces == 2)
                w[kPieces - 1][step][i] = rest_pair(a, b, w[0][step][i]);
        }
    }
}

/* The rows' results; of one of several splits, sums that are divided when they are combined. */
template <int kDim, int kPieces>
__device__ static inline void store_rows(const struct prefill_params *p,
                                         const struct prefill_block &b, uint32_t first,
                                         const struct rows_state<kDim, kPieces> &s)
{
    const kvk_cuda_prefill_args *a = &p->a;
    uint32_t lane = threadIdx.x & 31u, group = a->n_q_heads / a->n_kv_heads;
    bool whole = p->splits == 1;

#pragma unroll
    for (uint32_t r = 0; r < 2; r++) {
        uint32_t row = first + lane / 4u + r * 8u;
        size_t at =
            (size_t)(b.seq * a->n_q + row / group) * a->n_q_heads + b.kv_head * group + row % group;
        float total = s.total[r], share = 1;
        float *o =
            whole ? a->o + at * kDim : p->part_o + (b.part * prefill_part_rows(a) + at) * kDim;
        total += __shfl_xor_sync(KVKI_FULL_WARP, total, 1);
        total += __shfl_xor_sync(KVKI_FULL_WARP, total, 2);
        if (row >= b.n_rows)
            continue;
        if (whole)
            share = total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
        for (int t = 0; t < kDim / 8; t++)
            *(float2 *)(o + t * 8 + lane % 4u * 2u) =
                make_float2(s.o[t][r * 2] * share, s.o[t][r * 2 + 1] * share);
        if (lane % 4u != 0)
            continue;
        if (whole)
            a->lse[at] = total == 0.0f ? -INFINITY : s.most[r] / LOG2_E + logf(total);
        else
            p->part_sums[b.part * prefill_part_rows(a) + at] = make_float2(s.most[r], total);
    }
}

/* A lane's keys of a tile, one of each 32: a bit says that it is listed, but not there. */
template <int kKeys>
__device__ static inline uint32_t look_for_holes(const kvk_cuda_prefill_args *a,
                                                 const struct prefill_block &b, uint32_t tile)
{
    const int32_t *list = a->list + (size_t)b.seq * a->stride;
    uint32_t found = 0;

#pragma unroll
    for (uint32_t i = 0; i < kKeys / 32; i++) {
        uint32_t j = tile * kKeys + i * 32u + (threadIdx.x & 31u);
        found |= (uint32_t)(j < b.n_list && list[j] < 0) << i;
    }
    return found;
}

template <int kKeys>
__device__ static inline void share_holes(uint32_t found, uint64_t (&holes)[kKeys / 64])
{
#pragma unroll
    for (uint32_t i = 0; i < kKeys / 64; i++) {
        uint32_t low = __ballot_sync(KVKI_FULL_WARP, found >> i * 2u & 1u);
        uint32_t high = __ballot_sync(KVKI_FULL_WARP, found >> (i * 2u + 1u) & 1u);
        holes[i] = (uint64_t)high << 32 | low;
    }
}

#endif
