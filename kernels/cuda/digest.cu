/*
 * digest.cu: index rows of new keys, and index queries: a projection, and for keys int8 with a bf16
 * scale as kvk_quantize makes them.
 *
 * One block takes one vector; a thread owns one output dimension (of one head at a time) and runs
 * one chain of fused multiply-adds over the inputs, so an output's bits depend on nothing else. The
 * projection's rows are read coalesced and stay in L2 over the tokens of a call.
 */
#include "device.cuh"

#define DIMS_MAX   256u
#define INPUTS_MAX 8192u /* inputs of a head, in shared memory */

/* Output d of x [dim_in] through proj [dim_in, dims]. */
__device__ static inline float project_one(const float *x, const float *proj, uint32_t dim_in,
                                           uint32_t dims, uint32_t d)
{
    float sum = 0;

#pragma unroll 8
    for (uint32_t i = 0; i < dim_in; i++)
        sum = fmaf(x[i], proj[(size_t)i * dims + d], sum);
    return sum;
}

/* Largest |x| over the block; a NaN or Inf in any thread gives +Inf. */
__device__ static float block_abs_max(float x)
{
    __shared__ float most[DIMS_MAX / 32u];
    float own = isfinite(x) ? fabsf(x) : INFINITY, all = 0;

    for (int step = 1; step < 32; step *= 2)
        own = fmaxf(own, __shfl_xor_sync(KVKI_FULL_WARP, own, step));
    __syncthreads(); /* the last head's maxima have been read */
    if ((threadIdx.x & 31u) == 0)
        most[threadIdx.x / 32u] = own;
    __syncthreads();
    for (uint32_t w = 0; w < blockDim.x / 32u; w++)
        all = fmaxf(all, most[w]);
    return all;
}

__global__ void __launch_bounds__(DIMS_MAX) digest_kernel(const kvk_cuda_digest_args a)
{
    extern __shared__ float x[];
    uint32_t width = a.n_heads_in * a.head_dim, dim_in = width / a.n_heads, d = threadIdx.x;
    size_t stride = a.in_stride_bytes ? a.in_stride_bytes : width * sizeof(__nv_bfloat16);
    const __nv_bfloat16 *in = (const __nv_bfloat16 *)((const char *)a.in + blockIdx.x * stride);
    uint8_t *row = (uint8_t *)a.out + (size_t)blockIdx.x * a.n_heads * (a.dims + 2u);

    for (uint32_t i = threadIdx.x; i < width; i += blockDim.x)
        x[i] = __bfloat162float(in[i]);
    __syncthreads();
    for (uint32_t head = 0; head < a.n_heads; head++) {
        const float *proj = a.proj + (size_t)head * dim_in * a.dims;
        float y = d < a.dims ? project_one(x + head * dim_in, proj, dim_in, a.dims, d) : 0.0f;
        float most = block_abs_max(y);
        uint32_t bits = most > 0 && most < INFINITY ? kvki_scale_bits(most, 127.0) : 0;
        float scale = kvki_bf16(bits);
        if (d < a.dims) {
            row[head * a.dims + d] =
                (uint8_t)(int8_t)(scale > 0 ? rintf(__fdiv_rn(y, scale)) : 0.0f);
            if (a.projected)
                a.projected[((size_t)blockIdx.x * a.n_heads + head) * a.dims + d] = y;
        }
        if (d < 2)
            row[a.n_heads * a.dims + 2 * head + d] = (uint8_t)(bits >> (8 * d));
    }
}

/* ESA: the sum of each group's query heads meets one projection, its inputs shared out over the
 * block's rows of threads; the rows' sums are added in order. */
#define QUERY_ROWS 4u

__global__ void __launch_bounds__(DIMS_MAX *QUERY_ROWS) query_kernel(const kvk_cuda_query_args a)
{
    extern __shared__ float x[];
    __shared__ float part[QUERY_ROWS][DIMS_MAX];
    uint32_t group = a.n_q_heads / a.n_kv_heads, width = a.n_kv_heads * a.head_dim;
    uint32_t thread = threadIdx.y * blockDim.x + threadIdx.x, d = threadIdx.x;
    uint32_t each = (width + QUERY_ROWS - 1) / QUERY_ROWS, from = min(threadIdx.y * each, width);
    const float *q = a.q + (size_t)blockIdx.x * a.n_q_heads * a.head_dim;

    for (uint32_t i = thread; i < width; i += blockDim.x * QUERY_ROWS) {
        const float *head = q + (size_t)(i / a.head_dim) * group * a.head_dim + i % a.head_dim;
        float sum = 0;
        for (uint32_t g = 0; g < group; g++)
            sum += head[g * a.head_dim];
        x[i] = sum;
    }
    __syncthreads();
    if (d < a.dims)
        part[threadIdx.y][d] = project_one(x + from, a.proj + (size_t)from * a.dims,
                                           min(each, width - from), a.dims, d);
    __syncthreads();
    if (threadIdx.y == 0 && d < a.dims) {
        float sum = part[0][d];
        for (uint32_t r = 1; r < QUERY_ROWS; r++)
            sum += part[r][d];
        a.out[(size_t)blockIdx.x * a.dims + d] = sum;
    }
}

/* TokenSelect: each query head by its kv head's matrix; a block a head. */
__global__ void __launch_bounds__(DIMS_MAX) query_head_kernel(const kvk_cuda_query_args a)
{
    extern __shared__ float x[];
    uint32_t head = blockIdx.x % a.n_q_heads, d = threadIdx.x;
    const float *proj =
        a.proj + (size_t)(head / (a.n_q_heads / a.n_kv_heads)) * a.head_dim * a.dims;

    for (uint32_t i = threadIdx.x; i < a.head_dim; i += blockDim.x)
        x[i] = a.q[(size_t)blockIdx.x * a.head_dim + i];
    __syncthreads();
    if (d < a.dims)
        a.out[(size_t)blockIdx.x * a.dims + d] = project_one(x, proj, a.head_dim, a.dims, d);
}

static uint32_t threads_of(uint32_t dims)
{
    return (dims + 31u) / 32u * 32u;
}

extern "C" kvc_status kvk_cuda_digest(kvk_cuda *cuda, const kvk_cuda_digest_args *args,
                                      kvk_stream *stream)
{
    size_t width = (size_t)args->n_heads_in * args->head_dim;
    kvc_status st = KVC_OK;

    if (args->n_heads_in == 0 || args->head_dim == 0 || width > INPUTS_MAX || args->dims == 0 ||
        args->dims > DIMS_MAX || args->in_stride_bytes % sizeof(__nv_bfloat16) ||
        (args->in_stride_bytes && args->in_stride_bytes < width * sizeof(__nv_bfloat16)) ||
        (args->n_heads != 1 && args->n_heads != args->n_heads_in))
        return KVC_INVALID;
    if (args->n == 0)
        return KVC_OK;
    if (!args->in || !args->proj || !args->out)
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    digest_kernel<<<args->n, threads_of(args->dims), width * sizeof(float),
                    kvki_cuda_stream(stream)>>>(*args);
    return kvki_cuda_launched();
}

extern "C" kvc_status kvk_cuda_query(kvk_cuda *cuda, const kvk_cuda_query_args *args,
                                     kvk_stream *stream)
{
    size_t width = (size_t)args->n_kv_heads * args->head_dim;
    kvc_status st = KVC_OK;

    if (args->n_kv_heads == 0 || args->n_q_heads == 0 || args->n_q_heads % args->n_kv_heads != 0 ||
        args->head_dim == 0 || width > INPUTS_MAX || args->dims == 0 || args->dims > DIMS_MAX ||
        args->per_head > 1 || args->n_q_heads > UINT16_MAX || args->n_seqs > UINT16_MAX)
        return KVC_INVALID;
    if (args->n_seqs == 0)
        return KVC_OK;
    if (!args->q || !args->proj || !args->out)
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    if (args->per_head)
        query_head_kernel<<<args->n_seqs * args->n_q_heads, threads_of(args->dims),
                            args->head_dim * sizeof(float), kvki_cuda_stream(stream)>>>(*args);
    else
        query_kernel<<<args->n_seqs, dim3(threads_of(args->dims), QUERY_ROWS),
                       width * sizeof(float), kvki_cuda_stream(stream)>>>(*args);
    return kvki_cuda_launched();
}
