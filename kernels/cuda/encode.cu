/*
 * encode.cu: K and V of new tokens into coded rows, one warp a head of K or V.
 *
 * The bytes are those of the table's encode: the scale in double, the quotient in f32, rounded to
 * nearest even by the conversion. A lane holds the elements that it writes.
 */
#include "device.cuh"

#define THREADS 256u
#define DIM_MAX 256u
#define HELD    (DIM_MAX / 32u)

__device__ static inline uint8_t code_of(float x, kvk_dtype dtype)
{
    return dtype == KVK_I8_SCALED ? (uint8_t)(int8_t)rintf(x)
                                  : __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}

__global__ void __launch_bounds__(THREADS) encode_kernel(const kvk_cuda_encode_args a)
{
    uint32_t warp = blockIdx.x * (THREADS / 32u) + threadIdx.x / 32u, lane = threadIdx.x & 31u;
    uint32_t head = warp % a.n_heads, row = warp / a.n_heads / 2u, bits = 0;
    bool is_v = warp / a.n_heads % 2u != 0;
    const __nv_bfloat16 *in =
        (const __nv_bfloat16 *)(is_v ? a.v : a.k) + ((size_t)row * a.n_heads + head) * a.head_dim;
    uint8_t *slice =
        (uint8_t *)a.out + (size_t)row * a.row_bytes + (is_v ? a.v_off_bytes : a.k_off_bytes);
    float x[HELD], most = 0;

    if (row >= a.n)
        return;
#pragma unroll
    for (uint32_t i = 0; i < HELD; i++) {
        x[i] = lane + i * 32u < a.head_dim ? __bfloat162float(in[lane + i * 32u]) : 0.0f;
        most = fmaxf(most, isfinite(x[i]) ? fabsf(x[i]) : INFINITY);
    }
    for (int step = 1; step < 32; step *= 2)
        most = fmaxf(most, __shfl_xor_sync(KVKI_FULL_WARP, most, step));
    if (most > 0 && most < INFINITY)
        bits = kvki_scale_bits(most, a.dtype == KVK_I8_SCALED ? 127.0 : 448.0);
#pragma unroll
    for (uint32_t i = 0; i < HELD; i++) {
        if (lane + i * 32u < a.head_dim)
            slice[head * a.head_dim + lane + i * 32u] =
                bits ? code_of(__fdiv_rn(x[i], kvki_bf16(bits)), a.dtype) : 0;
    }
    bits = most < INFINITY ? bits : 0x7fc0u;
    if (lane < 2)
        slice[a.n_heads * a.head_dim + 2u * head + lane] = (uint8_t)(bits >> (8u * lane));
}

static bool args_ok(const kvk_cuda_encode_args *a)
{
    size_t slice = kvk_slice_bytes(a->dtype, a->n_heads, a->head_dim);

    return kvk_is_coded(a->dtype) && a->n_heads && a->head_dim && a->head_dim <= DIM_MAX &&
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
