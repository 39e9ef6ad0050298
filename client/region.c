/*
 * region.c: memory that rows land in and values leave from.
 *
 * Host memory only. A region is its bounds, a count of the calls that use it, and a word in the
 * process's table of lent memory, so that a transport which writes rows there by itself (rdma)
 * prepares it once it is used. Any thread; refs is guarded by the client's lock. Invariant: memory
 * that a call names to a transport stays lent until the call is over.
 */
#include <stdlib.h>

#include "base/lent.h"

#include "internal.h"

kvc_status kvc_region_register(kvc_client *client, const kvc_region_desc *desc,
                               kvc_region **region_p)
{
    *region_p = NULL;
    if (desc->size_bytes != sizeof(*desc))
        return kvci_fail(KVC_INVALID, "region: size_bytes is %zu, expected %zu", desc->size_bytes,
                         sizeof(*desc));
    if (desc->kind != KVC_MEMORY_HOST && desc->kind != KVC_MEMORY_CUDA)
        return kvci_fail(KVC_INVALID, "region: kind %d is neither HOST nor CUDA", (int)desc->kind);
    if (desc->kind == KVC_MEMORY_CUDA)
        return kvci_fail(KVC_UNSUPPORTED, "region: this client moves host memory only; stage it");
    if (desc->base == NULL || desc->len_bytes == 0)
        return kvci_fail(KVC_INVALID, "region: base is NULL or len_bytes is 0");
    kvc_region *region = calloc(1, sizeof(*region));
    if (region == NULL)
        return kvci_fail(KVC_NO_MEMORY, "region: no memory");
    region->client = client;
    region->base = desc->base;
    region->len_bytes = desc->len_bytes;
    /* Where it overlaps another region that is not the same, its rows are copied. */
    region->lent = kvc_lent_add(desc->base, desc->len_bytes) == KVC_OK;
    *region_p = region;
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
