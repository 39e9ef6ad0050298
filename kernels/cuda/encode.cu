/* encode.cu: K and V of new tokens into coded rows, one warp a head of K or V. */
#include "encode.cuh"

#define THREADS 256u

__global__ void __launch_bounds__(THREADS) encode_kernel(const kvk_cuda_encode_args a)
{
    uint32_t warp = blockIdx.x * (THREADS / 32u) + threadIdx.x / 32u;
    uint32_t head = warp % a.n_heads, row = warp / a.n_heads / 2u;
    bool is_v = warp / a.n_heads % 2u != 0;
    const __nv_bfloat16 *in =
        (const __nv_bfloat16 *)(is_v ? a.v : a.k) + ((size_t)row * a.n_heads + head) * a.head_dim;
    uint8_t *slice =
        (uint8_t *)a.out + (size_t)row * a.row_bytes + (is_v ? a.v_off_bytes : a.k_off_bytes);

    if (row < a.n)
        encode_head(in, a.n_heads, a.head_dim, head, a.dtype, slice, NULL, NULL);
}

static bool args_ok(const kvk_cuda_encode_args *a)
{
    size_t slice = kvk_slice_bytes(a->dtype, a->n_heads, a->head_dim);

    return kvk_is_coded(a->dtype) && a->n_heads && a->head_dim && a->head_dim <= ENCODE_DIM_MAX &&
           a->k_off_bytes + slice <= a->row_bytes && a->v_off_bytes + slice <= a->row_bytes &&
           (a->k_off_bytes + slice <= a->v_off_bytes || a->v_off_bytes + slice <= a->k_off_bytes) &&
           a->n <= UINT32_MAX / 2u / a->n_heads && (a->n == 0 || (a->k && a->v && a->out));
}

extern "C" kvc_status kvk_cuda_encode(kvk_cuda *cuda, const kvk_cuda_encode_args *args,
                                      kvk_stream *stream)
{
    size_t warps = (size_t)args->n * args->n_heads * 2u, each = THREADS / 32u;
    kvc_status st = KVC_OK;

    if (!args_ok(args))
        return KVC_INVALID;
    if (args->n == 0)
        return KVC_OK;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    encode_kernel<<<(unsigned)((warps + each - 1) / each), THREADS, 0, kvki_cuda_stream(stream)>>>(
        *args);
    return kvki_cuda_launched();
}
