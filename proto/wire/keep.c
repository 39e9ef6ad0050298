/*
 * keep.c: Erase, Hold, Release and Prefetch.
 *
 * Pure, any thread; see wire_internal.h for what the functions of a method promise.
 */
#include "wire_internal.h"

static const char too_many_parts[] = "more parts than a schema can have";

kvc_status kvci_put_erase_request(const kvc_request *req, const kvci_out *out)
{
    if (req->u.erase.n_digests > KVC_MAX_DIGESTS || req->u.erase.n_parts > KVC_MAX_PARTS)
        return KVC_INVALID;
    Kvasir__V1__EraseRequest msg = KVASIR__V1__ERASE_REQUEST__INIT;
    if (req->u.erase.context == 0)
        msg.schema = kvci_put_digest(&req->u.erase.schema);
    msg.context = req->u.erase.context;
    msg.digests = kvci_put_digests(req->u.erase.digests, req->u.erase.n_digests);
    msg.n_parts = req->u.erase.n_parts;
    msg.parts = (uint32_t *)(uintptr_t)req->u.erase.parts;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_get_erase_request(kvci_job *job, kvc_request *req)
{
    const Kvasir__V1__EraseRequest *msg = (const Kvasir__V1__EraseRequest *)job->msg;
    if (msg->context != 0 && (msg->schema.len != 0 || msg->digests.len != 0))
        return kvci_refuse(job, "either a context, or a schema and digests");
    if (msg->context == 0 && kvci_get_digest(&msg->schema, &req->u.erase.schema) != KVC_OK)
        return kvci_refuse(job, kvci_bad_schema);
    if (kvci_get_digests(&msg->digests, &req->u.erase.n_digests, &req->u.erase.digests) != KVC_OK)
        return kvci_refuse(job, kvci_bad_digests);
    if (msg->n_parts > KVC_MAX_PARTS)
        return kvci_refuse(job, too_many_parts);
    req->u.erase.context = msg->context;
    req->u.erase.n_parts = (uint32_t)msg->n_parts;
    req->u.erase.parts = msg->parts;
    return KVC_OK;
}

kvc_status kvci_put_erase_reply(const kvc_reply *reply, const kvci_out *out)
{
    Kvasir__V1__EraseReply msg = KVASIR__V1__ERASE_REPLY__INIT;
    msg.values = reply->u.erase.values;
    msg.bytes = reply->u.erase.bytes;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_get_erase_reply(kvci_job *job, kvc_reply *reply)
{
    const Kvasir__V1__EraseReply *msg = (const Kvasir__V1__EraseReply *)job->msg;
    reply->u.erase.values = msg->values;
    reply->u.erase.bytes = msg->bytes;
    return KVC_OK;
}

kvc_status kvci_put_hold_request(const kvc_request *req, const kvci_out *out)
{
    if (req->u.hold.n_digests > KVC_MAX_DIGESTS)
        return KVC_INVALID;
    Kvasir__V1__HoldRequest msg = KVASIR__V1__HOLD_REQUEST__INIT;
    if (req->u.hold.n_digests > 0) {
        msg.schema = kvci_put_digest(&req->u.hold.schema);
        msg.digests = kvci_put_digests(req->u.hold.digests, req->u.hold.n_digests);
    }
    msg.context = req->u.hold.context;
    msg.hold = req->u.hold.hold;
    msg.ttl_ms = req->u.hold.ttl_ms;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_get_hold_request(kvci_job *job, kvc_request *req)
{
    const Kvasir__V1__HoldRequest *msg = (const Kvasir__V1__HoldRequest *)job->msg;
    req->u.hold.context = msg->context;
    req->u.hold.hold = msg->hold;
    req->u.hold.ttl_ms = msg->ttl_ms;
    if (msg->digests.len == 0)
        return KVC_OK;
    if (kvci_get_digest(&msg->schema, &req->u.hold.schema) != KVC_OK)
        return kvci_refuse(job, kvci_bad_schema);
    if (kvci_get_digests(&msg->digests, &req->u.hold.n_digests, &req->u.hold.digests) != KVC_OK)
        return kvci_refuse(job, kvci_bad_digests);
    return KVC_OK;
}

kvc_status kvci_put_hold_reply(const kvc_reply *reply, const kvci_out *out)
{
    Kvasir__V1__HoldReply msg = KVASIR__V1__HOLD_REPLY__INIT;
    msg.hold = reply->u.hold.hold;
    msg.ttl_ms = reply->u.hold.ttl_ms;
    msg.n_blocks = reply->u.hold.n_blocks;
    msg.tenant_bytes = reply->u.hold.tenant_bytes;
    msg.max_bytes = reply->u.hold.max_bytes;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_get_hold_reply(kvci_job *job, kvc_reply *reply)
{
    const Kvasir__V1__HoldReply *msg = (const Kvasir__V1__HoldReply *)job->msg;
    reply->u.hold.hold = msg->hold;
    reply->u.hold.ttl_ms = msg->ttl_ms;
    reply->u.hold.n_blocks = msg->n_blocks;
    reply->u.hold.tenant_bytes = msg->tenant_bytes;
    reply->u.hold.max_bytes = msg->max_bytes;
    return KVC_OK;
}

kvc_status kvci_put_release_request(const kvc_request *req, const kvci_out *out)
{
    Kvasir__V1__ReleaseRequest msg = KVASIR__V1__RELEASE_REQUEST__INIT;
    msg.hold = req->u.release.hold;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_get_release_request(kvci_job *job, kvc_request *req)
{
    const Kvasir__V1__ReleaseRequest *msg = (const Kvasir__V1__ReleaseRequest *)job->msg;
    req->u.release.hold = msg->hold;
    return KVC_OK;
}

kvc_status kvci_put_release_reply(const kvc_reply *reply, const kvci_out *out)
{
    Kvasir__V1__ReleaseReply msg = KVASIR__V1__RELEASE_REPLY__INIT;
    (void)reply;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_get_release_reply(kvci_job *job, kvc_reply *reply)
{
    (void)job;
    (void)reply;
    return KVC_OK;
}

kvc_status kvci_put_prefetch_request(const kvc_request *req, const kvci_out *out)
{
    if (req->u.prefetch.n_parts > KVC_MAX_PARTS || req->u.prefetch.n_digests > KVC_MAX_DIGESTS)
        return KVC_INVALID;
    Kvasir__V1__PrefetchRequest msg = KVASIR__V1__PREFETCH_REQUEST__INIT;
    if (req->u.prefetch.n_digests > 0) {
        msg.schema = kvci_put_digest(&req->u.prefetch.schema);
        msg.digests = kvci_put_digests(req->u.prefetch.digests, req->u.prefetch.n_digests);
    }
    msg.context = req->u.prefetch.context;
    msg.n_parts = req->u.prefetch.n_parts;
    msg.parts = (uint32_t *)(uintptr_t)req->u.prefetch.parts;
    msg.first_block = req->u.prefetch.first_block;
    msg.n_blocks = req->u.prefetch.n_blocks;
    msg.tier = (Kvasir__V1__Tier)req->u.prefetch.tier;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_get_prefetch_request(kvci_job *job, kvc_request *req)
{
    const Kvasir__V1__PrefetchRequest *msg = (const Kvasir__V1__PrefetchRequest *)job->msg;
    if (msg->n_parts > KVC_MAX_PARTS)
        return kvci_refuse(job, too_many_parts);
    if ((int)msg->tier < KVC_TIER_GPU || (int)msg->tier > KVC_TIER_LMDB)
        return kvci_refuse(job, "tier must be one of the protocol's");
    req->u.prefetch.context = msg->context;
    req->u.prefetch.n_parts = (uint32_t)msg->n_parts;
    req->u.prefetch.parts = msg->parts;
    req->u.prefetch.first_block = msg->first_block;
    req->u.prefetch.n_blocks = msg->n_blocks;
    req->u.prefetch.tier = (kvc_tier)msg->tier;
    if (msg->digests.len == 0)
        return KVC_OK;
    if (kvci_get_digest(&msg->schema, &req->u.prefetch.schema) != KVC_OK)
        return kvci_refuse(job, kvci_bad_schema);
    if (kvci_get_digests(&msg->digests, &req->u.prefetch.n_digests, &req->u.prefetch.digests) !=
        KVC_OK)
        return kvci_refuse(job, kvci_bad_digests);
    return KVC_OK;
}

kvc_status kvci_put_prefetch_reply(const kvc_reply *reply, const kvci_out *out)
{
    Kvasir__V1__PrefetchReply msg = KVASIR__V1__PREFETCH_REPLY__INIT;
    msg.there = reply->u.prefetch.there;
    msg.moved = reply->u.prefetch.moved;
    msg.missing = reply->u.prefetch.missing;
    msg.left = reply->u.prefetch.left;
    msg.moved_bytes = reply->u.prefetch.moved_bytes;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_get_prefetch_reply(kvci_job *job, kvc_reply *reply)
{
    const Kvasir__V1__PrefetchReply *msg = (const Kvasir__V1__PrefetchReply *)job->msg;
    reply->u.prefetch.there = msg->there;
    reply->u.prefetch.moved = msg->moved;
    reply->u.prefetch.missing = msg->missing;
    reply->u.prefetch.left = msg->left;
    reply->u.prefetch.moved_bytes = msg->moved_bytes;
    return KVC_OK;
}
