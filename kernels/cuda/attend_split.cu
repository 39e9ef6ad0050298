/*
 * attend_split.cu: attention of a tile on the tensor cores for rows that are not bf16 as they lie:
 * coded ones (e4m3, int8), and keys that are rotated on the way.
 *
 * A byte of a coded row is a bf16 exactly, so K and V go through the same products as bf16 rows
 * (attend_mma.cu); a row's scales meet its logits and its weights, not its elements. A rotated key
 * is f32: it is split into two bf16 pieces, which leaves an error of 2^-18 of it, within the bound.
 * Elements are dealt to lanes in runs, low and high half of a head alike, so that a lane holds both
 * numbers of a rotary pair and reads words; the queries are loaded in the same order.
 */
#include "attend_split.cuh"

template <typename Row, int kDim, bool kRotated, bool kFew>
__global__ void __launch_bounds__(ATTEND_THREADS, 2)
    attend_split_kernel(const struct attend_params p)
{
    extern __shared__ __align__(16) char tile[];
    __shared__ struct attend_rows rows;
    const kvk_cuda_attend_args *a = &p.a;
    const struct attend_layout l = attend_layout_of(a);
    uint32_t seq = 0, first = blockIdx.x * ATTEND_TILE, n = 0;
    float2 *rotation = (float2 *)(tile + l.rotation);

    if (attend_resolves(&p, tile, &seq))
        return;
    attend_begin(&rows);
    kvki_wait_for_previous();
    kvki_let_next_start(); /* behind the wait: order_of in attend.cu */
    n = attend_find_rows(a, seq, first, &rows);
    if (first >= n)
        return;
    attend_load_tile(a, &l, &rows, tile);
    const struct attend_places places = attend_ask_places(a, &rows, seq, first);
    if (kRotated)
        attend_find_rotation(a, seq, first, min(n - first, ATTEND_TILE), rotation);
    attend_split<Row, kDim, kRotated, kFew>(
        &p, &l, seq, blockIdx.x, a->q + (size_t)seq * a->n_q_heads * kDim, &rows, tile, rotation);
    attend_put_away(&p, &l, &rows, places, seq, first, tile);
}

template <typename Row, int kDim> static attend_fn kernel_of_dim(bool rotated, bool few)
{
    if (rotated)
        return few ? attend_split_kernel<Row, kDim, true, true>
                   : attend_split_kernel<Row, kDim, true, false>;
    return few ? attend_split_kernel<Row, kDim, false, true>
               : attend_split_kernel<Row, kDim, false, false>;
}

template <typename Row> static attend_fn kernel_of(uint32_t head_dim, bool rotated, bool few)
{
    return head_dim == 128  ? kernel_of_dim<Row, 128>(rotated, few)
           : head_dim == 64 ? kernel_of_dim<Row, 64>(rotated, few)
                            : NULL;
}

attend_fn kvki_attend_split(kvk_dtype dtype, uint32_t head_dim, bool rotated, bool few)
{
    switch (dtype) {
    case KVK_BF16:
        return kernel_of<bf16_row>(head_dim, rotated, few);
    case KVK_E4M3_SCALED:
        return kernel_of<e4m3_row>(head_dim, rotated, few);
    case KVK_I8_SCALED:
        return kernel_of<i8_row>(head_dim, rotated, few);
    default:
        return NULL;
    }
}
