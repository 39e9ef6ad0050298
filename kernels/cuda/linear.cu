/*
 * linear.cu: a product of f32 rows and a weight matrix in f32 (kvk/cuda_layers.h). A block makes 64
 * rows of 64 outputs, a thread eight by four of them, from tiles of 16 inputs in shared memory; the
 * next tile is on its way in registers meanwhile. Inputs are added in ascending order, one chain an
 * output, whatever else the block makes.
 */
#include "device.cuh"
#include "kvk/cuda_layers.h"

#define THREADS         128u
#define ROWS            64u
#define COLS            64u
#define DEPTH           16u
#define SIZE_MAX_IN_OUT 65536u

struct tiles {
    float in[DEPTH][ROWS + 4]; /* turned, so that a thread's eight rows lie side by side */
    float weight[DEPTH][COLS];
};

/* What a thread carries from global to shared memory: two quarters of a row of each tile. */
struct carried {
    float4 in[2], weight[2];
};

__device__ static inline float4 load4(const float *p, bool there)
{
    return there ? *(const float4 *)p : make_float4(0, 0, 0, 0);
}

__device__ static inline struct carried load(const kvk_cuda_linear_args *a, uint32_t row0,
                                             uint32_t col0, uint32_t k0)
{
    struct carried c;

#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        uint32_t at = threadIdx.x + i * THREADS;
        uint32_t row = row0 + at / (DEPTH / 4), k = k0 + at % (DEPTH / 4) * 4;
        uint32_t w_k = k0 + at / (COLS / 4), col = col0 + at % (COLS / 4) * 4;
        c.in[i] = load4(a->in + (size_t)row * a->n_in + k, row < a->n && k < a->n_in);
        c.weight[i] =
            load4(a->weight + (size_t)w_k * a->n_out + col, w_k < a->n_in && col < a->n_out);
    }
    return c;
}

__device__ static inline void store(struct tiles *t, const struct carried *c)
{
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        uint32_t at = threadIdx.x + i * THREADS, row = at / (DEPTH / 4), k = at % (DEPTH / 4) * 4;
        t->in[k][row] = c->in[i].x;
        t->in[k + 1][row] = c->in[i].y;
        t->in[k + 2][row] = c->in[i].z;
        t->in[k + 3][row] = c->in[i].w;
        *(float4 *)&t->weight[at / (COLS / 4)][at % (COLS / 4) * 4] = c->weight[i];
    }
}

__device__ static inline void multiply(const struct tiles *t, uint32_t ty, uint32_t tx,
                                       float (&sum)[8][4])
{
#pragma unroll
    for (uint32_t k = 0; k < DEPTH; k++) {
        float4 lo = *(const float4 *)&t->in[k][ty * 8], hi = *(const float4 *)&t->in[k][ty * 8 + 4];
        float4 w = *(const float4 *)&t->weight[k][tx * 4];
        float x[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {
            sum[i][0] = fmaf(x[i], w.x, sum[i][0]);
            sum[i][1] = fmaf(x[i], w.y, sum[i][1]);
            sum[i][2] = fmaf(x[i], w.z, sum[i][2]);
            sum[i][3] = fmaf(x[i], w.w, sum[i][3]);
        }
    }
}

/* x / 2 (1 + tanh z) = x sigmoid(2 z) */
__device__ static inline float gelu(float x)
{
    return x / (1.0f + expf(-1.5957691216f * (x + 0.044715f * x * x * x)));
}

__device__ static inline float formed(kvk_cuda_linear_form form, float sum, float before)
{
    return form == KVK_CUDA_GELU ? gelu(sum) : form == KVK_CUDA_ADD ? before + sum : sum;
}

__global__ void __launch_bounds__(THREADS) linear_kernel(const kvk_cuda_linear_args a)
{
    __shared__ struct tiles t;
    uint32_t row0 = blockIdx.x * ROWS, col0 = blockIdx.y * COLS;
    uint32_t ty = threadIdx.x / (COLS / 4), tx = threadIdx.x % (COLS / 4), col = col0 + tx * 4;
    struct carried next = load(&a, row0, col0, 0);
    float sum[8][4] = {};

    for (uint32_t k0 = 0; k0 < a.n_in; k0 += DEPTH) {
        __syncthreads();
        store(&t, &next);
        __syncthreads();
        next = load(&a, row0, col0, k0 + DEPTH);
        multiply(&t, ty, tx, sum);
    }
#pragma unroll
    for (uint32_t i = 0; i < 8; i++) {
        uint32_t row = row0 + ty * 8 + i;
        float4 *out = (float4 *)(a.out + (size_t)row * a.n_out + col);
        float4 was = make_float4(0, 0, 0, 0);
        if (row >= a.n || col >= a.n_out)
            continue;
        if (a.form == KVK_CUDA_ADD)
            was = *out;
        *out = make_float4(formed(a.form, sum[i][0], was.x), formed(a.form, sum[i][1], was.y),
                           formed(a.form, sum[i][2], was.z), formed(a.form, sum[i][3], was.w));
    }
}

extern "C" kvc_status kvk_cuda_linear(kvk_cuda *cuda, const kvk_cuda_linear_args *args,
                                      kvk_stream *stream)
{
    dim3 grid(args->n / ROWS + (args->n % ROWS != 0), (args->n_out + COLS - 1) / COLS);
    kvc_status st = KVC_OK;

    if (args->n_in == 0 || args->n_in % 4 != 0 || args->n_out == 0 || args->n_out % 4 != 0 ||
        args->n_in > SIZE_MAX_IN_OUT || args->n_out > SIZE_MAX_IN_OUT ||
        (uint32_t)args->form > KVK_CUDA_ADD)
        return KVC_INVALID;
    if (args->n == 0)
        return KVC_OK;
    if (!args->in || !args->weight || !args->out || args->in == args->out ||
        !kvki_aligned(args->in) || !kvki_aligned(args->weight) || !kvki_aligned(args->out))
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    linear_kernel<<<grid, THREADS, 0, kvki_cuda_stream(stream)>>>(*args);
    return kvki_cuda_launched();
}
