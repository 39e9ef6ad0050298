/*
 * attend_mma.cu: attention of a tile on the tensor cores, for bf16 rows that are not rotated.
 *
 * A warp takes a kv head with its group of query heads (at most 8), a block all heads of 16 rows.
 * The products must be those of f32 queries and weights, so each such number is split into three
 * bf16 pieces that add up to it exactly (8 + 8 + 8 bits), which are rows of one matrix product, or
 * of two for more than four heads (mma.cuh). Weights come out of the first product just where the
 * second one wants its left operand, so they never leave registers. A listed row that holds Inf
 * gives NaN where the exact sum might be Inf.
 */
#include "attend_mma.cuh"

template <int kDim, bool kFew>
__global__ void __launch_bounds__(ATTEND_THREADS, 2) attend_mma_kernel(const struct attend_params p)
{
    extern __shared__ __align__(16) char tile[];
    __shared__ struct attend_rows rows;
    const struct attend_layout l = attend_layout_of(&p.a);
    uint32_t seq = 0, first = blockIdx.x * ATTEND_TILE;

    if (attend_resolves(&p, tile, &seq))
        return;
    attend_begin(&rows);
    kvki_wait_for_previous();
    kvki_let_next_start(); /* behind the wait: order_of in attend.cu */
    if (first >= attend_find_rows(&p.a, seq, first, &rows))
        return;
    attend_load_tile(&p.a, &l, &rows, tile);
    const struct attend_places places = attend_ask_places(&p.a, &rows, seq, first);
    attend_bf16<kDim, kFew>(&p, &l, seq, blockIdx.x, &rows, tile);
    attend_put_away(&p, &l, &rows, places, seq, first, tile);
}

template <bool kFew> static attend_fn kernel_of(uint32_t head_dim)
{
    return head_dim == 128  ? attend_mma_kernel<128, kFew>
           : head_dim == 64 ? attend_mma_kernel<64, kFew>
                            : NULL;
}

attend_fn kvki_attend_mma(uint32_t head_dim, bool few)
{
    return few ? kernel_of<true>(head_dim) : kernel_of<false>(head_dim);
}
