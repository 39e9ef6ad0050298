/*
 * chunk_weights.cu: fusion weights of retrieved chunks (GCA: softmax over the chosen; HSA: stick
 * breaking in descending position), with the bits of the table's op: the same sums in the same
 * order, in double, of the same exponential (exact_exp.h). One block a list; the exponentials are
 * shared out over its threads, a sum is one thread's.
 */
#include "device.cuh"
#include "exact_exp.h"

#define THREADS 128u

/* Shared memory of a block. */
struct chunk_list {
    double x[KVK_CHUNKS_MAX]; /* softmax: exp(x - max); stick: 1 - sigma(x) */
    uint32_t ids[KVK_CHUNKS_MAX];
    double max, sum;
};

/* True, to all threads, where a score is NaN; the greatest logit in list->max. */
__device__ static bool find_max(const kvk_chunk_weights_args *a, const float *scores,
                                struct chunk_list *list)
{
    double max = -INFINITY;
    int nan = 0;

    for (uint32_t i = threadIdx.x; i < a->k; i += THREADS) {
        double x = __dmul_rn((double)a->scale, (double)scores[i]);
        max = x > max ? x : max;
        nan |= x != x;
    }
    list->x[threadIdx.x] = max; /* not yet in use */
    nan = __syncthreads_or(nan);
    for (uint32_t i = 0; threadIdx.x == 0 && i < THREADS; i++)
        max = list->x[i] > max ? list->x[i] : max;
    if (threadIdx.x == 0)
        list->max = max;
    __syncthreads();
    return nan != 0;
}

__device__ static void softmax(const kvk_chunk_weights_args *a, const float *scores, bool nan,
                               struct chunk_list *list, float *weights)
{
    for (uint32_t i = threadIdx.x; i < a->k; i += THREADS) {
        double x = __dmul_rn((double)a->scale, (double)scores[i]);
        list->x[i] = list->max > -INFINITY ? kvki_exact_exp(__dadd_rn(x, -list->max)) : 0.0;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        double sum = 0;
        for (uint32_t i = 0; i < a->k; i++)
            sum = __dadd_rn(sum, list->x[i]);
        list->sum = sum;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < a->k; i += THREADS)
        weights[i] = nan                      ? NAN
                     : scores[i] == -INFINITY ? 0.0f
                                              : (float)__ddiv_rn(list->x[i], list->sum);
}

__device__ static void stick(const kvk_chunk_weights_args *a, const float *scores,
                             const uint32_t *ids, bool nan, struct chunk_list *list, float *weights)
{
    for (uint32_t i = threadIdx.x; i < a->k; i += THREADS) {
        list->ids[i] = scores[i] == -INFINITY ? 0 : ids[i]; /* 0 is above nobody */
        list->x[i] = kvki_exact_sigma(__dmul_rn(-(double)a->scale, (double)scores[i]));
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < a->k; i += THREADS) {
        double x = __dmul_rn((double)a->scale, (double)scores[i]), w = 0;
        if (scores[i] != -INFINITY) {
            w = kvki_exact_sigma(x);
            for (uint32_t j = 0; j < a->k; j++)
                w = list->ids[j] > ids[i] ? __dmul_rn(w, list->x[j]) : w;
        }
        weights[i] = nan ? NAN : (float)w;
    }
}

__global__ void __launch_bounds__(THREADS) weights_kernel(const kvk_chunk_weights_args a)
{
    __shared__ struct chunk_list list;
    size_t at = (size_t)blockIdx.x * a.k;
    bool nan = false;

    kvki_wait_for_previous();
    kvki_let_next_start();
    nan = find_max(&a, a.scores + at, &list);
    if (a.fusion == KVK_FUSE_SOFTMAX)
        softmax(&a, a.scores + at, nan, &list, a.weights + at);
    else
        stick(&a, a.scores + at, a.ids + at, nan, &list, a.weights + at);
}

extern "C" kvc_status kvk_cuda_chunk_weights(kvk_cuda *cuda, const kvk_chunk_weights_args *args,
                                             kvk_stream *stream)
{
    kvc_status st = KVC_OK;

    if ((args->fusion != KVK_FUSE_SOFTMAX && args->fusion != KVK_FUSE_STICK) ||
        !(args->scale > 0) || args->scale == INFINITY || args->k > KVK_CHUNKS_MAX ||
        args->n > INT32_MAX)
        return KVC_INVALID;
    if (args->n == 0 || args->k == 0)
        return KVC_OK;
    if (!args->scores || !args->weights || (args->fusion == KVK_FUSE_STICK && !args->ids))
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    return st != KVC_OK ? st
                        : kvki_cuda_launch_next(cuda, weights_kernel, dim3(args->n), THREADS, 0,
                                                stream, *args);
}
