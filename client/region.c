/*
 * region.c: memory that rows land in and values leave from.
 *
 * A region is its bounds, a count of the calls that use it, and a word in the process's table of
 * lent memory, so that a transport which writes rows there by itself (rdma) prepares it once it is
 * used. Nothing here touches memory of a GPU: the caller's functions do. Any thread; refs is
 * guarded by the client's lock. Invariant: memory that a call names to a transport stays lent until
 * the call is over.
 */
#include <stdlib.h>

#include "base/lent.h"

#include "internal.h"

/* OK: desc is whole, and gpu what it says of a GPU's memory. */
static kvc_status check_desc(const kvc_region_desc *desc, kvc_region_gpu *gpu)
{
    if (desc->kind != KVC_MEMORY_HOST && desc->kind != KVC_MEMORY_CUDA)
        return kvci_fail(KVC_INVALID, "region: kind %d is neither HOST nor CUDA", (int)desc->kind);
    if (desc->base == NULL || desc->len_bytes == 0)
        return kvci_fail(KVC_INVALID, "region: base is NULL or len_bytes is 0");
    if (desc->kind == KVC_MEMORY_HOST)
        return KVC_OK;
    if (desc->gpu == NULL)
        return kvci_fail(KVC_UNSUPPORTED, "region: memory of a GPU without kvc_region_gpu, which "
                                          "says how to write there; stage it");
    if (!kvci_take_sized(gpu, desc->gpu, sizeof(*gpu), sizeof(*gpu)) || gpu->copy_in == NULL)
        return kvci_fail(KVC_INVALID, "region: kvc_region_gpu has another size, or no copy_in");
    return KVC_OK;
}

/* Where it overlaps another region that is not the same, its rows are copied. */
static bool lend(kvc_region *region)
{
    if (!kvci_region_on_gpu(region))
        return kvc_lent_add(region->base, region->len_bytes) == KVC_OK;
    return kvc_lent_add_gpu(region->base, region->len_bytes, (int)region->gpu.dmabuf_fd,
                            region->gpu.dmabuf_off_bytes, &region->lent_gpu) == KVC_OK;
}

kvc_status kvc_region_register(kvc_client *client, const kvc_region_desc *desc,
                               kvc_region **region_p)
{
    kvc_region_desc taken;
    kvc_region_gpu gpu = {0};
    *region_p = NULL;
    if (!kvci_take_sized(&taken, desc, offsetof(kvc_region_desc, gpu), sizeof(taken)))
        return kvci_fail(KVC_INVALID, "region: size_bytes is %zu, expected %zu", desc->size_bytes,
                         sizeof(*desc));
    kvc_status status = check_desc(&taken, &gpu);
    if (status != KVC_OK)
        return status;
    kvc_region *region = calloc(1, sizeof(*region));
    if (region == NULL)
        return kvci_fail(KVC_NO_MEMORY, "region: no memory");
    region->client = client;
    region->base = taken.base;
    region->len_bytes = taken.len_bytes;
    region->gpu = gpu;
    region->lent = lend(region);
    *region_p = region;
    return KVC_OK;
}

kvc_region_way kvc_region_gpu_way(const kvc_region *region, const char **why_p)
{
    static const kvc_region_way ways[] = {[KVC_LENT_NOT_YET] = KVC_REGION_NOT_YET,
                                          [KVC_LENT_DMABUF] = KVC_REGION_DMABUF,
                                          [KVC_LENT_PEER] = KVC_REGION_PEER,
                                          [KVC_LENT_COPIED] = KVC_REGION_COPIED};
    const char *why = "";
    kvc_region_way way = KVC_REGION_NOT_YET;
    if (kvci_region_on_gpu(region) && !region->lent) {
        way = KVC_REGION_COPIED;
        why = "it overlaps another region that is not the same";
    } else if (region->lent_gpu != NULL) {
        way = ways[atomic_load(&region->lent_gpu->way)];
        if (way == KVC_REGION_COPIED)
            why = atomic_load(&region->lent_gpu->why);
    }
    if (why_p != NULL)
        *why_p = why;
    return way;
}

kvc_status kvci_region_check_host(const kvc_region *region, const char *name)
{
    if (region != NULL && kvci_region_on_gpu(region))
        return kvci_fail(KVC_UNSUPPORTED,
                         "%s: the region is a GPU's, which takes rows and whole "
                         "values alone; stage it",
                         name);
    return KVC_OK;
}

kvc_status kvc_region_deregister(kvc_client *client, kvc_region *region)
{
    if (region == NULL)
        return KVC_OK;
    if (region->client != client)
        return kvci_fail(KVC_INVALID, "region: it belongs to another client");
    kvc_mutex_lock(&client->lock);
    uint32_t refs = region->refs;
    kvc_mutex_unlock(&client->lock);
    if (refs > 0)
        return kvci_fail(KVC_AGAIN, "region: %u calls still use it", refs);
    if (region->lent)
        kvc_lent_remove(region->base);
    free(region);
    return KVC_OK;
}
