/*
 * attend_near.cu: attention over a list and, in the same launch, over the newest tokens with a
 * query of their own.
 *
 * The tiles of near come first and need nothing of the ops that make the list, so they run while
 * those still rank and resolve: kernels before this one let it start early, and only the list's
 * tiles wait, where the caller says that what near reads was there before.
 * Keys are rotated as kTurned says: of both, of near alone, or of none.
 */
#include "attend_mma.cuh"
#include "attend_split.cuh"

/* Where the rows of a tile of near are; gives how many. All threads call. */
__device__ static uint32_t find_near(const kvk_cuda_attend_args *a, uint32_t seq, uint32_t first,
                                     struct attend_rows *rows)
{
    uint32_t r = threadIdx.x, n = min(__ldcg(a->near.n + seq), a->near.n_max);

    n = first < n ? min(n - first, ATTEND_TILE) : 0;
    if (r < ATTEND_TILE) {
        uint32_t slot = (a->near.first[seq] + first + r) % a->near.ring_rows;
        rows->from[r] =
            r < n ? (const char *)a->near.ring[seq].slots + (size_t)slot * a->row_bytes : NULL;
        rows->keep[r] = NULL;
    }
    if (r == 0) {
        rows->there = (1u << n) - 1u;
        rows->fetched = 0;
    }
    __syncthreads();
    return n;
}

enum turned { TURNED_NONE, TURNED_NEAR, TURNED_BOTH };

template <typename Row, int kDim, turned kTurned, bool kFew>
__global__ void __launch_bounds__(ATTEND_THREADS, 2)
    attend_near_kernel(const struct attend_params p)
{
    extern __shared__ __align__(16) char tile[];
    __shared__ struct attend_rows rows;
    const kvk_cuda_attend_args *a = &p.a;
    const struct attend_layout l = attend_layout_of(a);
    uint32_t seq = 0, n_near = p.n_tiles - p.n_far, at = blockIdx.x;
    float2 *rotation = (float2 *)(tile + l.rotation);

    if (attend_resolves(&p, tile, &seq))
        return;
    size_t q_at = (size_t)seq * a->n_q_heads * kDim;
    attend_begin(&rows);
    if (at < n_near) {
        kvki_let_next_start();
        if (!a->near.early)
            kvki_wait_for_previous();
        uint32_t first = at * ATTEND_TILE, n = find_near(a, seq, first, &rows);
        if (n == 0)
            return;
        attend_load_tile(a, &l, &rows, tile);
        for (uint32_t i = threadIdx.x; kTurned != TURNED_NONE && i < n * (kDim / 2);
             i += ATTEND_THREADS)
            rotation[i] =
                attend_turn((int32_t)(first + i / (kDim / 2)), a->near.inv_freq[i % (kDim / 2)]);
        attend_split<Row, kDim, kTurned != TURNED_NONE, kFew>(
            &p, &l, seq, p.n_far + at, a->near.q + q_at, &rows, tile, rotation);
        return;
    }
    at -= n_near;
    kvki_wait_for_previous();
    kvki_let_next_start(); /* behind the wait: order_of in attend.cu */
    uint32_t first = at * ATTEND_TILE, n = attend_find_rows(a, seq, first, &rows);
    if (first >= n)
        return;
    attend_load_tile(a, &l, &rows, tile);
    const struct attend_places places = attend_ask_places(a, &rows, seq, first);
    if constexpr (kTurned == TURNED_BOTH)
        attend_find_rotation(a, seq, first, min(n - first, ATTEND_TILE), rotation);
    if constexpr (Row::coded || kTurned == TURNED_BOTH)
        attend_split<Row, kDim, kTurned == TURNED_BOTH, kFew>(&p, &l, seq, at, a->q + q_at, &rows,
                                                              tile, rotation);
    else
        attend_bf16<kDim, kFew>(&p, &l, seq, at, &rows, tile);
    attend_put_away(&p, &l, &rows, places, seq, first, tile);
}

template <typename Row, int kDim, bool kFew> static attend_fn kernel_of_turned(bool near, bool list)
{
    if (list)
        return near ? attend_near_kernel<Row, kDim, TURNED_BOTH, kFew> : NULL;
    return near ? attend_near_kernel<Row, kDim, TURNED_NEAR, kFew>
                : attend_near_kernel<Row, kDim, TURNED_NONE, kFew>;
}

template <typename Row, bool kFew>
static attend_fn kernel_of_dim(uint32_t head_dim, bool near, bool list)
{
    return head_dim == 128  ? kernel_of_turned<Row, 128, kFew>(near, list)
           : head_dim == 64 ? kernel_of_turned<Row, 64, kFew>(near, list)
                            : NULL;
}

template <typename Row>
static attend_fn kernel_of(uint32_t head_dim, bool near, bool list, bool few)
{
    return few ? kernel_of_dim<Row, true>(head_dim, near, list)
               : kernel_of_dim<Row, false>(head_dim, near, list);
}

attend_fn kvki_attend_near(kvk_dtype dtype, uint32_t head_dim, bool near_rotated, bool rotated,
                           bool few)
{
    switch (dtype) {
    case KVK_BF16:
        return kernel_of<bf16_row>(head_dim, near_rotated, rotated, few);
    case KVK_E4M3_SCALED:
        return kernel_of<e4m3_row>(head_dim, near_rotated, rotated, few);
    case KVK_I8_SCALED:
        return kernel_of<i8_row>(head_dim, near_rotated, rotated, few);
    default:
        return NULL;
    }
}
