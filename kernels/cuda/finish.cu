/* finish.cu: two partials merged into what the engine wants: rounded to its dtype. */
#include "device.cuh"

#define THREADS     256u
#define FINISH_ROWS (THREADS / 32u)

__device__ static inline void store_one(void *out, size_t i, float x, kvk_dtype dtype)
{
    if (dtype == KVK_BF16)
        ((__nv_bfloat16 *)out)[i] = __float2bfloat16_rn(x);
    else
        ((__half *)out)[i] = __float2half_rn(x);
}

__global__ void __launch_bounds__(THREADS) finish_kernel(const kvk_cuda_finish_args a)
{
    uint32_t row = blockIdx.x * FINISH_ROWS + threadIdx.x / 32u, lane = threadIdx.x & 31u;
    double share_a = 1, share_b = 0;
    float lse = 0;

    kvki_wait_for_previous();
    if (row >= a.n)
        return;
    float lse_a = a.lse_a[row], lse_b = a.lse_b[row];
    lse = lse_a;
    if (lse_a == -INFINITY) {
        share_a = 0;
        share_b = lse_b == -INFINITY ? 0 : 1;
        lse = lse_b;
    } else if (lse_b != -INFINITY) {
        double top = lse_a > lse_b ? (double)lse_a : (double)lse_b;
        double x = exp((double)lse_a - top), y = exp((double)lse_b - top);
        share_a = x / (x + y);
        share_b = y / (x + y);
        lse = (float)(top + log(x + y));
    }
    for (uint32_t d = lane; d < a.dim; d += 32) {
        size_t at = (size_t)row * a.dim + d;
        double x = share_a != 0 ? (double)a.o_a[at] * share_a : 0;
        double y = share_b != 0 ? (double)a.o_b[at] * share_b : 0;
        store_one(a.out, at, (float)(x + y), a.dtype);
    }
    if (lane == 0 && a.lse)
        a.lse[row] = lse;
}

extern "C" kvc_status kvk_cuda_finish(kvk_cuda *cuda, const kvk_cuda_finish_args *args,
                                      kvk_stream *stream)
{
    kvc_status st = KVC_OK;

    if (args->n == 0)
        return KVC_OK;
    if (!args->o_a || !args->lse_a || !args->o_b || !args->lse_b || !args->dim || !args->out ||
        (args->dtype != KVK_BF16 && args->dtype != KVK_F16))
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    return kvki_cuda_launch_next(cuda, finish_kernel,
                                 dim3((args->n + FINISH_ROWS - 1) / FINISH_ROWS), THREADS, 0,
                                 stream, *args);
}
