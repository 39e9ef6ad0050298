/*
 * device.cu: the device object, memory, streams, events and graphs behind kvk/cuda.h.
 *
 * Everything here is a thin edge: CUDA's handles are the caller's opaque types, CUDA's errors
 * become kvc_status. Only open, close and the memory calls may block.
 */
#include <stdlib.h>
#include <string.h>

#include "device.cuh"

kvc_status kvki_cuda_status(cudaError_t error)
{
    if (error == cudaSuccess)
        return KVC_OK;
    (void)cudaGetLastError();
    switch (error) {
    case cudaErrorMemoryAllocation:
        return KVC_NO_MEMORY;
    case cudaErrorNoDevice:
    case cudaErrorInvalidDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorNotSupported:
        return KVC_UNSUPPORTED;
    default:
        return KVC_DEVICE;
    }
}

kvc_status kvki_cuda_resident_grid(const kvk_cuda *cuda, const void *kernel, int threads,
                                   size_t smem_bytes, int blocks_max, int *blocks_p)
{
    int per_sm = 0;
    kvc_status st = kvki_cuda_status(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads, smem_bytes));

    if (st != KVC_OK)
        return st;
    if (per_sm < 1)
        return KVC_UNSUPPORTED;
    *blocks_p = per_sm * (int)cuda->info.n_multiprocessors;
    if (*blocks_p > blocks_max)
        *blocks_p = blocks_max;
    return KVC_OK;
}

extern "C" kvc_status kvk_cuda_open(uint32_t device, kvk_cuda **cuda_p)
{
    cudaDeviceProp prop;
    kvk_cuda *cuda = NULL;
    int n = 0;
    kvc_status st = KVC_OK;

    if (!cuda_p)
        return KVC_INVALID;
    *cuda_p = NULL;
    if (cudaGetDeviceCount(&n) != cudaSuccess || device >= (uint32_t)n) {
        (void)cudaGetLastError();
        return KVC_UNSUPPORTED;
    }
    st = kvki_cuda_status(cudaGetDeviceProperties(&prop, (int)device));
    if (st != KVC_OK)
        return st;
    if (prop.major < 8)
        return KVC_UNSUPPORTED;
    cuda = (kvk_cuda *)calloc(1, sizeof(*cuda));
    if (!cuda)
        return KVC_NO_MEMORY;
    cuda->device = (int)device;
    cuda->smem_block_max = (int)prop.sharedMemPerBlockOptin;
    memcpy(cuda->info.name, prop.name, sizeof(cuda->info.name) - 1);
    cuda->info.sm = (uint32_t)(prop.major * 10 + prop.minor);
    cuda->info.n_multiprocessors = (uint32_t)prop.multiProcessorCount;
    cuda->info.memory_bytes = prop.totalGlobalMem;
    cuda->info.l2_bytes = (size_t)prop.l2CacheSize;
    memcpy(cuda->info.uuid, prop.uuid.bytes, sizeof(cuda->info.uuid));
    *cuda_p = cuda;
    return KVC_OK;
}

extern "C" void kvk_cuda_close(kvk_cuda *cuda)
{
    free(cuda);
}

extern "C" void kvk_cuda_describe(const kvk_cuda *cuda, kvk_cuda_info *info_p)
{
    *info_p = cuda->info;
}

extern "C" kvc_status kvk_cuda_alloc(kvk_cuda *cuda, kvk_cuda_memory kind, size_t len_bytes,
                                     void **memory_p)
{
    kvc_status st = KVC_OK;

    if (!cuda || !memory_p)
        return KVC_INVALID;
    *memory_p = NULL;
    if (len_bytes == 0 || (kind != KVK_CUDA_DEVICE && kind != KVK_CUDA_PINNED))
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    return kvki_cuda_status(kind == KVK_CUDA_DEVICE
                                ? cudaMalloc(memory_p, len_bytes)
                                : cudaHostAlloc(memory_p, len_bytes, cudaHostAllocMapped));
}

extern "C" void kvk_cuda_free(kvk_cuda *cuda, kvk_cuda_memory kind, void *memory)
{
    if (!memory || kvki_cuda_use(cuda) != KVC_OK)
        return;
    (void)kvki_cuda_status(kind == KVK_CUDA_DEVICE ? cudaFree(memory) : cudaFreeHost(memory));
}

extern "C" kvc_status kvk_cuda_register(kvk_cuda *cuda, void *host, size_t len_bytes, int read_only,
                                        void **device_p)
{
    unsigned flags = cudaHostRegisterMapped | (read_only ? cudaHostRegisterReadOnly : 0u);
    kvc_status st = KVC_OK;

    if (!cuda || !host || !len_bytes || !device_p)
        return KVC_INVALID;
    *device_p = NULL;
    st = kvki_cuda_use(cuda);
    if (st == KVC_OK)
        st = kvki_cuda_status(cudaHostRegister(host, len_bytes, flags));
    if (st != KVC_OK)
        return st;
    st = kvki_cuda_status(cudaHostGetDevicePointer(device_p, host, 0));
    if (st != KVC_OK)
        (void)kvki_cuda_status(cudaHostUnregister(host));
    return st;
}

extern "C" void kvk_cuda_unregister(kvk_cuda *cuda, void *host)
{
    if (host && kvki_cuda_use(cuda) == KVC_OK)
        (void)kvki_cuda_status(cudaHostUnregister(host));
}

extern "C" kvc_status kvk_cuda_copy(kvk_cuda *cuda, void *to, const void *from, size_t len_bytes,
                                    kvk_stream *stream)
{
    kvc_status st = kvki_cuda_use(cuda);

    if (st != KVC_OK || len_bytes == 0)
        return st;
    return kvki_cuda_status(
        cudaMemcpyAsync(to, from, len_bytes, cudaMemcpyDefault, kvki_cuda_stream(stream)));
}

extern "C" kvc_status kvk_cuda_fill(kvk_cuda *cuda, void *to, uint8_t byte, size_t len_bytes,
                                    kvk_stream *stream)
{
    kvc_status st = kvki_cuda_use(cuda);

    if (st != KVC_OK || len_bytes == 0)
        return st;
    return kvki_cuda_status(cudaMemsetAsync(to, byte, len_bytes, kvki_cuda_stream(stream)));
}

extern "C" kvc_status kvk_cuda_memory_info(kvk_cuda *cuda, size_t *free_bytes_p,
                                           size_t *total_bytes_p)
{
    kvc_status st = kvki_cuda_use(cuda);

    *free_bytes_p = *total_bytes_p = 0;
    return st != KVC_OK ? st : kvki_cuda_status(cudaMemGetInfo(free_bytes_p, total_bytes_p));
}

/* CUDA says so for what it cannot share or open: another driver, a container, no peer access. */
static kvc_status share_status(cudaError_t error)
{
    switch (error) {
    case cudaErrorMapBufferObjectFailed:
    case cudaErrorPeerAccessUnsupported:
    case cudaErrorTooManyPeers:
    case cudaErrorDeviceUninitialized:
        (void)cudaGetLastError();
        return KVC_UNSUPPORTED;
    case cudaErrorInvalidResourceHandle:
    case cudaErrorInvalidValue:
        (void)cudaGetLastError();
        return KVC_INVALID;
    default:
        return kvki_cuda_status(error);
    }
}

extern "C" kvc_status kvk_cuda_share(kvk_cuda *cuda, void *memory, kvk_cuda_shared *shared_p)
{
    static_assert(sizeof(cudaIpcMemHandle_t) == KVK_CUDA_SHARE_BYTES, "as kvk/cuda.h says");
    cudaIpcMemHandle_t handle;

    if (!cuda || !memory || !shared_p)
        return KVC_INVALID;
    kvc_status st = kvki_cuda_use(cuda);
    if (st == KVC_OK)
        st = share_status(cudaIpcGetMemHandle(&handle, memory));
    if (st == KVC_OK)
        memcpy(shared_p->bytes, &handle, sizeof(handle));
    return st;
}

extern "C" kvc_status kvk_cuda_share_open(kvk_cuda *cuda, const kvk_cuda_shared *shared,
                                          void **memory_p)
{
    cudaIpcMemHandle_t handle;

    if (!cuda || !shared || !memory_p)
        return KVC_INVALID;
    *memory_p = NULL;
    memcpy(&handle, shared->bytes, sizeof(handle));
    kvc_status st = kvki_cuda_use(cuda);
    if (st == KVC_OK)
        st = share_status(cudaIpcOpenMemHandle(memory_p, handle, cudaIpcMemLazyEnablePeerAccess));
    if (st != KVC_OK)
        *memory_p = NULL;
    return st;
}

extern "C" void kvk_cuda_share_close(kvk_cuda *cuda, void *memory)
{
    if (memory && kvki_cuda_use(cuda) == KVC_OK)
        (void)kvki_cuda_status(cudaIpcCloseMemHandle(memory));
}

extern "C" kvc_status kvk_cuda_stream_create(kvk_cuda *cuda, kvk_stream **stream_p)
{
    kvc_status st = kvki_cuda_use(cuda);

    *stream_p = NULL;
    if (st != KVC_OK)
        return st;
    return kvki_cuda_status(
        cudaStreamCreateWithFlags((cudaStream_t *)stream_p, cudaStreamNonBlocking));
}

extern "C" void kvk_cuda_stream_destroy(kvk_cuda *cuda, kvk_stream *stream)
{
    if (stream && kvki_cuda_use(cuda) == KVC_OK)
        (void)kvki_cuda_status(cudaStreamDestroy(kvki_cuda_stream(stream)));
}

extern "C" kvc_status kvk_cuda_stream_sync(kvk_cuda *cuda, kvk_stream *stream)
{
    kvc_status st = kvki_cuda_use(cuda);

    return st != KVC_OK ? st : kvki_cuda_status(cudaStreamSynchronize(kvki_cuda_stream(stream)));
}

extern "C" kvc_status kvk_cuda_event_create(kvk_cuda *cuda, kvk_cuda_event **event_p)
{
    kvc_status st = kvki_cuda_use(cuda);

    *event_p = NULL;
    return st != KVC_OK ? st : kvki_cuda_status(cudaEventCreate((cudaEvent_t *)event_p));
}

extern "C" void kvk_cuda_event_destroy(kvk_cuda *cuda, kvk_cuda_event *event)
{
    if (event && kvki_cuda_use(cuda) == KVC_OK)
        (void)kvki_cuda_status(cudaEventDestroy((cudaEvent_t)event));
}

extern "C" kvc_status kvk_cuda_event_record(kvk_cuda *cuda, kvk_cuda_event *event,
                                            kvk_stream *stream)
{
    kvc_status st = kvki_cuda_use(cuda);

    if (st != KVC_OK)
        return st;
    return kvki_cuda_status(cudaEventRecord((cudaEvent_t)event, kvki_cuda_stream(stream)));
}

extern "C" kvc_status kvk_cuda_stream_wait(kvk_cuda *cuda, kvk_stream *stream,
                                           const kvk_cuda_event *event)
{
    kvc_status st = kvki_cuda_use(cuda);

    if (st != KVC_OK)
        return st;
    return kvki_cuda_status(cudaStreamWaitEvent(kvki_cuda_stream(stream), (cudaEvent_t)event, 0));
}

extern "C" kvc_status kvk_cuda_event_elapsed(kvk_cuda *cuda, const kvk_cuda_event *from,
                                             const kvk_cuda_event *to, float *elapsed_ms_p)
{
    (void)cuda;
    return kvki_cuda_status(cudaEventElapsedTime(elapsed_ms_p, (cudaEvent_t)from, (cudaEvent_t)to));
}

extern "C" kvc_status kvk_cuda_graph_begin(kvk_cuda *cuda, kvk_stream *stream)
{
    kvc_status st = kvki_cuda_use(cuda);

    if (st != KVC_OK)
        return st;
    return kvki_cuda_status(
        cudaStreamBeginCapture(kvki_cuda_stream(stream), cudaStreamCaptureModeThreadLocal));
}

extern "C" kvc_status kvk_cuda_graph_end(kvk_cuda *cuda, kvk_stream *stream,
                                         kvk_cuda_graph **graph_p)
{
    cudaGraph_t graph = NULL;
    kvc_status st = kvki_cuda_use(cuda);

    *graph_p = NULL;
    if (st == KVC_OK)
        st = kvki_cuda_status(cudaStreamEndCapture(kvki_cuda_stream(stream), &graph));
    if (st != KVC_OK)
        return st;
    st = kvki_cuda_status(cudaGraphInstantiate((cudaGraphExec_t *)graph_p, graph, 0));
    (void)kvki_cuda_status(cudaGraphDestroy(graph));
    return st;
}

extern "C" kvc_status kvk_cuda_graph_launch(kvk_cuda *cuda, kvk_cuda_graph *graph,
                                            kvk_stream *stream)
{
    kvc_status st = kvki_cuda_use(cuda);

    if (st != KVC_OK)
        return st;
    return kvki_cuda_status(cudaGraphLaunch((cudaGraphExec_t)graph, kvki_cuda_stream(stream)));
}

extern "C" void kvk_cuda_graph_destroy(kvk_cuda *cuda, kvk_cuda_graph *graph)
{
    if (graph && kvki_cuda_use(cuda) == KVC_OK)
        (void)kvki_cuda_status(cudaGraphExecDestroy((cudaGraphExec_t)graph));
}
