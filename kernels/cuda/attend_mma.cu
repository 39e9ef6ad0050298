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
#include "attend_mma.cuh"

template <int kDim>
__global__ void __launch_bounds__(ATTEND_THREADS, 2) attend_mma_kernel(const struct attend_params p)
{
    extern __shared__ __align__(16) char tile[];
    __shared__ struct attend_rows rows;
    const struct attend_layout l = attend_layout_of(&p.a);
    uint32_t seq = 0, first = blockIdx.x * ATTEND_TILE, there = 0;

    if (attend_resolves(&p, tile, &seq))
        return;
    kvki_wait_for_previous();
    kvki_let_next_start();
    if (first >= attend_find_rows(&p.a, seq, first, &rows))
        return;
    there = attend_load_tile(&p.a, &l, &rows, tile);
    const struct attend_places places = attend_ask_places(&p.a, &rows, seq, first);
    attend_bf16<kDim>(&p, &l, seq, blockIdx.x, there, tile);
    attend_put_away(&p, &l, &rows, places, seq, first, tile);
}

attend_fn kvki_attend_mma(uint32_t head_dim)
{
    return head_dim == 128 ? attend_mma_kernel<128> : head_dim == 64 ? attend_mma_kernel<64> : NULL;
}
