/*
 * export.cu: device memory that devices of other makers write to.
 *
 * The driver's own call exports it, found at run time: nothing links the driver's library. Any
 * thread; may block.
 */
#include <cuda.h>
#include <unistd.h>

#include "device.cuh"

typedef CUresult export_fn(void *handle, CUdeviceptr memory, size_t len_bytes,
                           CUmemRangeHandleType type, unsigned long long flags);

/* The call since CUDA 11.7; NULL: the driver is older. */
static export_fn *find_export(void)
{
    void *found = NULL;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const char *name = "cuMemGetHandleForAddressRange";
#if CUDART_VERSION >= 12050
    cudaError_t error =
        cudaGetDriverEntryPointByVersion(name, &found, 11070, cudaEnableDefault, &result);
#else
    cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) {
        (void)cudaGetLastError();
        return NULL;
    }
    return (export_fn *)found;
}

extern "C" kvc_status kvk_cuda_export(kvk_cuda *cuda, void *memory, size_t len_bytes, int *fd_p,
                                      uint64_t *off_bytes_p)
{
    if (!cuda || !memory || !fd_p || !off_bytes_p)
        return KVC_INVALID;
    *fd_p = -1;
    *off_bytes_p = 0;
    kvc_status st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    size_t page_bytes = (size_t)sysconf(_SC_PAGESIZE);
    uintptr_t begin = (uintptr_t)memory & ~(uintptr_t)(page_bytes - 1);
    uintptr_t end = ((uintptr_t)memory + len_bytes + page_bytes - 1) & ~(uintptr_t)(page_bytes - 1);
    export_fn *get_handle = find_export();
    int fd = -1;
    if (!get_handle || get_handle(&fd, (CUdeviceptr)begin, end - begin,
                                  CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD, 0) != CUDA_SUCCESS)
        return KVC_UNSUPPORTED;
    *fd_p = fd;
    *off_bytes_p = (uintptr_t)memory - begin;
    return KVC_OK;
}

extern "C" void kvk_cuda_export_close(kvk_cuda *cuda, int fd)
{
    (void)cuda;
    if (fd >= 0)
        (void)close(fd);
}

/* Most devices order such writes by themselves before whatever comes later from their host. */
extern "C" kvc_status kvk_cuda_flush_writes(kvk_cuda *cuda)
{
    int device = 0, ordering = 0, options = 0;
    kvc_status st = kvki_cuda_use(cuda);

    if (st == KVC_OK)
        st = kvki_cuda_status(cudaGetDevice(&device));
    if (st == KVC_OK)
        st = kvki_cuda_status(
            cudaDeviceGetAttribute(&ordering, cudaDevAttrGPUDirectRDMAWritesOrdering, device));
    if (st != KVC_OK || ordering >= cudaGPUDirectRDMAWritesOrderingOwner)
        return st;
    st = kvki_cuda_status(
        cudaDeviceGetAttribute(&options, cudaDevAttrGPUDirectRDMAFlushWritesOptions, device));
    if (st == KVC_OK && !(options & cudaFlushGPUDirectRDMAWritesOptionHost))
        st = KVC_UNSUPPORTED;
    return st != KVC_OK ? st
                        : kvki_cuda_status(cudaDeviceFlushGPUDirectRDMAWrites(
                              cudaFlushGPUDirectRDMAWritesTargetCurrentDevice,
                              cudaFlushGPUDirectRDMAWritesToOwner));
}
