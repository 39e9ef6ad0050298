/*
 * map.c: MapContext.
 *
 * Pure, any thread; see wire_internal.h for what the functions of a method promise.
 */
#include <string.h>

#include "wire_internal.h"

static const char bad_segment[] = "a segment without an id or a length, or with half a handle";

kvc_status kvci_put_map_context_request(const kvc_request *req, const kvci_out *out)
{
    if (req->u.map_context.n_parts > KVC_MAX_PARTS ||
        req->u.map_context.n_unmapped > KVC_MAX_UNMAPPED)
        return KVC_INVALID;
    Kvasir__V1__MapContextRequest msg = KVASIR__V1__MAP_CONTEXT_REQUEST__INIT;
    msg.context = req->u.map_context.context;
    msg.map = req->u.map_context.map;
    msg.n_parts = req->u.map_context.n_parts;
    msg.parts = (uint32_t *)(uintptr_t)req->u.map_context.parts;
    msg.first_block = req->u.map_context.first_block;
    msg.n_blocks = req->u.map_context.n_blocks;
    msg.release = req->u.map_context.release;
    msg.gpu = req->u.map_context.gpu;
    msg.n_unmapped = req->u.map_context.n_unmapped;
    msg.unmapped = (uint32_t *)(uintptr_t)req->u.map_context.unmapped;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_get_map_context_request(kvci_job *job, kvc_request *req)
{
    const Kvasir__V1__MapContextRequest *msg = (const Kvasir__V1__MapContextRequest *)job->msg;
    if (msg->n_parts > KVC_MAX_PARTS)
        return kvci_refuse(job, "more parts than a schema can have");
    if (msg->n_unmapped > KVC_MAX_UNMAPPED)
        return kvci_refuse(job, "more segments than one request may give back");
    req->u.map_context.context = msg->context;
    req->u.map_context.map = msg->map;
    req->u.map_context.n_parts = (uint32_t)msg->n_parts;
    req->u.map_context.parts = msg->parts;
    req->u.map_context.first_block = msg->first_block;
    req->u.map_context.n_blocks = msg->n_blocks;
    req->u.map_context.release = msg->release;
    req->u.map_context.gpu = msg->gpu;
    req->u.map_context.n_unmapped = (uint32_t)msg->n_unmapped;
    req->u.map_context.unmapped = msg->unmapped;
    return KVC_OK;
}

static void put_handle(const kvc_gpu_handle *handle, Kvasir__V1__MapSegment *msg)
{
    msg->gpu_share.data = (uint8_t *)(uintptr_t)handle->share;
    msg->gpu_share.len = sizeof(handle->share);
    msg->gpu_device.data = (uint8_t *)(uintptr_t)handle->device;
    msg->gpu_device.len = sizeof(handle->device);
}

/* False: it is neither a handle nor none. */
static bool get_handle(const Kvasir__V1__MapSegment *msg, kvc_map_segment *segment)
{
    segment->gpu = msg->gpu_share.len > 0 || msg->gpu_device.len > 0;
    if (!segment->gpu)
        return true;
    if (msg->gpu_share.len != sizeof(segment->handle.share) ||
        msg->gpu_device.len != sizeof(segment->handle.device))
        return false;
    memcpy(segment->handle.share, msg->gpu_share.data, msg->gpu_share.len);
    memcpy(segment->handle.device, msg->gpu_device.data, msg->gpu_device.len);
    return true;
}

static kvc_status put_segments(const kvc_reply *reply, kvc_arena *arena,
                               Kvasir__V1__MapSegment ***list_p)
{
    uint32_t n = reply->u.map_context.n_segments;
    if (n > KVC_MAX_MAP_SEGMENTS)
        return KVC_INVALID;
    Kvasir__V1__MapSegment **list = kvc_arena_calloc(arena, n + 1, sizeof(*list));
    Kvasir__V1__MapSegment *msgs = kvc_arena_calloc(arena, n + 1, sizeof(*msgs));
    if (list == NULL || msgs == NULL)
        return KVC_NO_MEMORY;
    for (uint32_t i = 0; i < n; i++) {
        msgs[i] = (Kvasir__V1__MapSegment)KVASIR__V1__MAP_SEGMENT__INIT;
        msgs[i].id = reply->u.map_context.segments[i].id;
        msgs[i].len_bytes = reply->u.map_context.segments[i].len_bytes;
        if (reply->u.map_context.segments[i].gpu)
            put_handle(&reply->u.map_context.segments[i].handle, &msgs[i]);
        list[i] = &msgs[i];
    }
    *list_p = list;
    return KVC_OK;
}

kvc_status kvci_put_map_context_reply(const kvc_reply *reply, const kvci_out *out)
{
    Kvasir__V1__MapContextReply msg = KVASIR__V1__MAP_CONTEXT_REPLY__INIT;
    kvc_status status = put_segments(reply, out->arena, &msg.segments);
    if (status != KVC_OK)
        return status;
    msg.map = reply->u.map_context.map;
    msg.lease_bytes = reply->u.map_context.lease_bytes;
    msg.lease_slot = reply->u.map_context.lease_slot;
    msg.n_blocks = reply->u.map_context.n_blocks;
    msg.n_segments = reply->u.map_context.n_segments;
    msg.pinned_bytes = reply->u.map_context.pinned_bytes;
    msg.max_bytes = reply->u.map_context.max_bytes;
    msg.unpinned = reply->u.map_context.unpinned;
    return kvci_put(out, &msg.base, reply->data_bytes);
}

kvc_status kvci_get_map_context_reply(kvci_job *job, kvc_reply *reply)
{
    const Kvasir__V1__MapContextReply *msg = (const Kvasir__V1__MapContextReply *)job->msg;
    if (msg->n_segments > KVC_MAX_MAP_SEGMENTS)
        return kvci_refuse(job, "more segments than one reply may bring");
    kvc_map_segment *segments =
        kvc_arena_calloc(job->arena, msg->n_segments + 1, sizeof(*segments));
    if (segments == NULL)
        return kvci_no_memory(job);
    for (size_t i = 0; i < msg->n_segments; i++) {
        segments[i].id = msg->segments[i]->id;
        segments[i].len_bytes = msg->segments[i]->len_bytes;
        if (segments[i].id == 0 || segments[i].len_bytes == 0 ||
            !get_handle(msg->segments[i], &segments[i]))
            return kvci_refuse(job, bad_segment);
    }
    reply->u.map_context.map = msg->map;
    reply->u.map_context.lease_bytes = msg->lease_bytes;
    reply->u.map_context.lease_slot = msg->lease_slot;
    reply->u.map_context.n_blocks = msg->n_blocks;
    reply->u.map_context.n_segments = (uint32_t)msg->n_segments;
    reply->u.map_context.segments = segments;
    reply->u.map_context.pinned_bytes = msg->pinned_bytes;
    reply->u.map_context.max_bytes = msg->max_bytes;
    reply->u.map_context.unpinned = msg->unpinned;
    return KVC_OK;
}
