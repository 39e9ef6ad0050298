/*
 * no_cuda.c: the CUDA kind of device in a build without CUDA: it does not open, and says why.
 * Stateless.
 */
#include "internal.h"

static kvc_status open_none(kvw_worker *worker, uint32_t number, kvwi_device **device_p)
{
    (void)number;
    *device_p = NULL;
    return kvwi_fail(KVC_UNSUPPORTED, "backend: \"%s\": this build has no CUDA (KVASIR_CUDA)",
                     worker->opts.backend);
}

const kvwi_device_ops kvwi_device_cuda = {.name = "cuda", .open = open_none};
const kvwi_device_ops kvwi_device_cuda_chunks = {.name = "cuda", .chunks = true, .open = open_none};
