/*
 * device.cuh: what the files of the CUDA backend share: the device object, CUDA errors as
 * kvc_status, launches, and small device functions. Included by .cu files only.
 *
 * kvk_cuda is read-only after open, so any thread may use it. Nothing here allocates after open.
 */
#ifndef KVKI_CUDA_DEVICE_CUH
#define KVKI_CUDA_DEVICE_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#include "kvk/cuda.h"

struct kvk_cuda {
    int device;
    kvk_cuda_info info;
    int smem_block_max; /* bytes of shared memory that one block may ask for */
};

/* The status of a CUDA result; clears what is not sticky, so that a later launch is not blamed. */
kvc_status kvki_cuda_status(cudaError_t error);

/* The status of the launch just made. */
static inline kvc_status kvki_cuda_launched(void)
{
    return kvki_cuda_status(cudaGetLastError());
}

/* Makes the object's device current for the calling thread. */
static inline kvc_status kvki_cuda_use(const kvk_cuda *cuda)
{
    return kvki_cuda_status(cudaSetDevice(cuda->device));
}

static inline cudaStream_t kvki_cuda_stream(kvk_stream *stream)
{
    return (cudaStream_t)stream;
}

static inline size_t kvki_round_up(size_t n, size_t unit)
{
    return (n + unit - 1) / unit * unit;
}

static inline bool kvki_aligned(const void *p)
{
    return ((uintptr_t)p & 15u) == 0;
}

/* Grid of a kernel whose blocks wait for each other: as many as run at once, at most `blocks`. */
kvc_status kvki_cuda_resident_grid(const kvk_cuda *cuda, const void *kernel, int threads,
                                   size_t smem_bytes, int blocks_max, int *blocks_p);

/* Launches a kernel that waits for the one before it by itself (kvki_wait_for_previous), so that
 * the two launches overlap where the device can do that. */
template <typename Params>
static inline kvc_status kvki_cuda_launch_next(const kvk_cuda *cuda, void (*kernel)(const Params),
                                               dim3 grid, unsigned threads, size_t smem_bytes,
                                               kvk_stream *stream, const Params &params)
{
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute overlap = {};

    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = smem_bytes;
    config.stream = kvki_cuda_stream(stream);
    config.attrs = &overlap;
    config.numAttrs = cuda->info.sm >= 90 ? 1 : 0;
    return kvki_cuda_status(cudaLaunchKernelEx(&config, kernel, params));
}

/* The same, that wait too, for a grid resident as a whole: its blocks wait for each other. */
template <typename Params>
static inline kvc_status kvki_cuda_launch_whole(const kvk_cuda *cuda, void (*kernel)(const Params),
                                                dim3 grid, unsigned threads, size_t smem_bytes,
                                                kvk_stream *stream, const Params &params)
{
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attrs[2] = {};

    attrs[0].id = cudaLaunchAttributeCooperative;
    attrs[0].val.cooperative = 1;
    attrs[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attrs[1].val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = smem_bytes;
    config.stream = kvki_cuda_stream(stream);
    config.attrs = attrs;
    config.numAttrs = cuda->info.sm >= 90 ? 2 : 1;
    return kvki_cuda_status(cudaLaunchKernelEx(&config, kernel, params));
}

#define KVKI_FULL_WARP 0xffffffffu

/* bf16 bits as a float. */
__device__ static inline float kvki_bf16(uint32_t bits)
{
    return __uint_as_float(bits << 16);
}

/* The least bf16 that is not below most / largest, as the table's quantize and encode find it. */
__device__ static inline uint32_t kvki_scale_bits(float most, double largest)
{
    double exact = (double)most / largest;
    uint32_t bits = __float_as_uint((float)exact);

    if ((bits & 0xffffu) != 0 || (double)__uint_as_float(bits) < exact)
        bits = (bits & 0xffff0000u) + 0x10000u;
    return bits >> 16;
}

__device__ static inline float kvki_e4m3(uint8_t byte)
{
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(byte, __NV_E4M3)));
}

/* x / scale as an int16 of a quantised query. */
__device__ static inline int kvki_quantized(float x, float scale)
{
    float v = rintf(__fdiv_rn(x, scale));
    v = v > 32767.0f ? 32767.0f : v < -32767.0f ? -32767.0f : v;
    return (int)v;
}

/* Largest |x| of a warp's lanes, in groups of n_lanes. */
__device__ static inline float kvki_lanes_max(float x, uint32_t n_lanes)
{
    for (uint32_t step = 1; step < n_lanes; step *= 2)
        x = fmaxf(x, __shfl_xor_sync(KVKI_FULL_WARP, x, step));
    return x;
}

/* 16 bytes that are read once: they do not displace what is used again. */
__device__ static inline uint4 kvki_load_once(const void *p)
{
    return __ldcs((const uint4 *)p);
}

__device__ static inline uint32_t kvki_load_acquire(const uint32_t *p)
{
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

/* The line at p on its way to L2. */
__device__ static inline void kvki_prefetch(const void *p)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

/* 16 bytes from global to shared memory without a register; see kvki_async_wait. */
__device__ static inline void kvki_async_copy(void *shared, const void *global)
{
    uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

/* The same, of whose 16 bytes the first `there` are read; the others become 0. */
__device__ static inline void kvki_async_copy_part(void *shared, const void *global, uint32_t there)
{
    uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(there)
                 : "memory");
}

/* The same for 4 bytes, and for 8. */
__device__ static inline void kvki_async_copy_4(void *shared, const void *global)
{
    uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(global) : "memory");
}

__device__ static inline void kvki_async_copy_8(void *shared, const void *global)
{
    uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(global) : "memory");
}

/* Closes a batch of the thread's copies; wait_but returns when all but the last kPending have come.
 */
__device__ static inline void kvki_async_commit(void)
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kPending> __device__ static inline void kvki_async_wait_but(void)
{
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ static inline void kvki_async_wait(void)
{
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/*
 * A kernel launched by kvki_cuda_launch_next or _whole may start while the one before it ends; it
 * must call wait_for_previous before it reads what that one wrote, or writes what it reads.
 * let_next_start says that the next kernel may be brought in now.
 */
__device__ static inline void kvki_wait_for_previous(void)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ static inline void kvki_let_next_start(void)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/*
 * A barrier of a grid that is resident as a whole, in two halves: arrive says that this block's
 * writes so far are done, wait returns when all blocks have arrived; between them a block may work
 * on what needs no other. counter was 0 when the kernel began; arrivals is the caller's own count,
 * kept by thread 0. What was written before is seen after, if read past L1 (__ldcg) or for the
 * first time. All threads call.
 */
__device__ static inline void kvki_grid_arrive(uint32_t *counter, uint32_t *arrivals)
{
    __syncthreads();
    if (threadIdx.x == 0) {
        *arrivals += gridDim.x;
        __threadfence();
        atomicAdd(counter, 1u);
    }
}

__device__ static inline void kvki_grid_wait(uint32_t *counter, const uint32_t *arrivals)
{
    if (threadIdx.x == 0) {
        while (kvki_load_acquire(counter) < *arrivals) {
        }
    }
    __syncthreads();
}

__device__ static inline void kvki_grid_barrier(uint32_t *counter, uint32_t *arrivals)
{
    kvki_grid_arrive(counter, arrivals);
    kvki_grid_wait(counter, arrivals);
}

#endif
