/* cuda_floor.cu: see cuda_floor.h. Single-threaded. */
#include "cuda_floor.h"

#include <cuda_runtime.h>
#include <stdint.h>

#define THREADS 1024u
#define BLOCKS  264u
#define FLIGHT  8u /* loads of a thread that are on their way */

__global__ void __launch_bounds__(THREADS) read_kernel(const uint4 *at, size_t n, uint32_t *sink)
{
    size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x, step = (size_t)gridDim.x * THREADS;
    uint32_t x = 0;

    for (; i + (FLIGHT - 1) * step < n; i += FLIGHT * step) {
        uint4 d[FLIGHT];
#pragma unroll
        for (uint32_t j = 0; j < FLIGHT; j++)
            d[j] = at[i + j * step];
#pragma unroll
        for (uint32_t j = 0; j < FLIGHT; j++)
            x ^= d[j].x ^ d[j].y ^ d[j].z ^ d[j].w;
    }
    for (; i < n; i += step)
        x ^= at[i].x ^ at[i].y ^ at[i].z ^ at[i].w;
    if (x == 0x12345u)
        *sink = x;
}

__global__ void nothing_kernel(uint32_t *sink)
{
    if (blockDim.x == 1)
        *sink = 0;
}

extern "C" int floor_read(const void *p, size_t len_bytes, void *sink, kvk_stream *stream)
{
    read_kernel<<<BLOCKS, THREADS, 0, (cudaStream_t)stream>>>((const uint4 *)p, len_bytes / 16,
                                                              (uint32_t *)sink);
    return (int)cudaGetLastError();
}

extern "C" int floor_launch(unsigned n, void *sink, kvk_stream *stream)
{
    void *params[] = {&sink};

    return (int)cudaLaunchCooperativeKernel((const void *)nothing_kernel, dim3(n), dim3(512),
                                            params, 0, (cudaStream_t)stream);
}
