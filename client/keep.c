/*
 * keep.c: erase, hold, release and prefetch.
 *
 * Caller's threads, then transport threads. A long erase is cut into messages of max_digests, all
 * in flight at once. Hold and prefetch name a context by one segment, so that a stale handle is
 * opened again as for a fetch.
 */
#include <string.h>

#include "internal.h"

/* ---- erase ----------------------------------------------------------------------------------- */

static kvc_status erase_take(kvci_msg *msg, const kvc_reply *reply, const char **why_p)
{
    kvc_erase_info *info = &msg->call->u.erase.infos[msg - msg->call->msgs];
    (void)why_p;
    info->values = reply->u.erase.values;
    info->bytes = reply->u.erase.bytes;
    return KVC_OK;
}

static void erase_finish(kvci_call *call)
{
    kvc_erase_info sum = {0};
    for (uint32_t i = 0; i < call->n_msgs; i++) {
        sum.values += call->u.erase.infos[i].values;
        sum.bytes += call->u.erase.infos[i].bytes;
    }
    if (call->u.erase.info_p != NULL)
        *call->u.erase.info_p = sum;
}

static const kvci_kind erase_kind = {
    .name = "erase",
    .names_schema = true,
    .take = erase_take,
    .finish = erase_finish,
};

kvc_status kvc_erase(kvc_client *client, const kvc_digest *schema, const kvc_digest *digests,
                     uint32_t n, const uint32_t *parts, uint32_t n_parts, kvc_erase_info *info_p,
                     uint64_t deadline_ns, kvc_op *op)
{
    if (n_parts > KVC_MAX_PARTS)
        return kvci_fail(KVC_INVALID, "erase: %u parts, at most %u", n_parts, KVC_MAX_PARTS);
    uint32_t per_msg = kvci_limits(client).max_digests;
    uint32_t n_msgs = n / per_msg + (n % per_msg != 0);
    size_t extra_bytes = kvci_carve_bytes(n, sizeof(*digests)) +
                         kvci_carve_bytes(n_parts, sizeof(*parts)) +
                         kvci_carve_bytes(n_msgs, sizeof(kvc_erase_info));
    kvci_call *call = kvci_call_new(client, &erase_kind, n_msgs, extra_bytes, deadline_ns);
    if (call == NULL)
        return kvci_fail(KVC_NO_MEMORY, "erase: no memory");
    kvc_digest *own_digests = kvci_carve(call, n, sizeof(*digests));
    uint32_t *own_parts = kvci_carve(call, n_parts, sizeof(*parts));
    if (n > 0)
        memcpy(own_digests, digests, n * sizeof(*digests));
    if (n_parts > 0)
        memcpy(own_parts, parts, n_parts * sizeof(*parts));
    call->u.erase.info_p = info_p;
    call->u.erase.infos = kvci_carve(call, n_msgs, sizeof(kvc_erase_info));
    for (uint32_t i = 0; i < n_msgs; i++) {
        kvci_msg *msg = &call->msgs[i];
        msg->first = i * per_msg;
        msg->n_items = n - msg->first < per_msg ? n - msg->first : per_msg;
        msg->req.method = KVC_ERASE;
        msg->req.u.erase.schema = *schema;
        msg->req.u.erase.n_digests = msg->n_items;
        msg->req.u.erase.digests = own_digests + msg->first;
        msg->req.u.erase.n_parts = n_parts;
        msg->req.u.erase.parts = own_parts;
    }
    return kvci_call_start(call, op);
}

/* ---- one message ----------------------------------------------------------------------------- */

/* Of what is in the message, copied: the caller's is its own again. */
typedef struct named {
    const uint32_t *parts;
    const kvc_digest *digests;
    uint32_t n_parts, n_digests;
} named;

/* A call of one message; what named has is carved and becomes the copy. */
static kvci_call *one_message(kvc_client *client, const kvci_kind *kind, kvc_context *context,
                              named *names, void *info_p, uint64_t deadline_ns)
{
    size_t extra_bytes = kvci_carve_bytes(1, sizeof(kvci_seg)) +
                         kvci_carve_bytes(names->n_parts, sizeof(*names->parts)) +
                         kvci_carve_bytes(names->n_digests, sizeof(*names->digests));
    kvci_call *call = kvci_call_new(client, kind, 1, extra_bytes, deadline_ns);
    if (call == NULL) {
        (void)kvci_fail(KVC_NO_MEMORY, "%s: no memory", kind->name);
        return NULL;
    }
    kvci_msg *msg = &call->msgs[0];
    msg->n_items = 1;
    if (context != NULL) {
        msg->segs = kvci_carve(call, 1, sizeof(kvci_seg));
        msg->segs[0].context = context;
        msg->n_segs = 1;
    }
    if (names->n_parts > 0)
        names->parts = memcpy(kvci_carve(call, names->n_parts, sizeof(*names->parts)), names->parts,
                              names->n_parts * sizeof(*names->parts));
    if (names->n_digests > 0)
        names->digests = memcpy(kvci_carve(call, names->n_digests, sizeof(*names->digests)),
                                names->digests, names->n_digests * sizeof(*names->digests));
    call->u.keep.info_p = info_p;
    return call;
}

static kvc_status hold_take(kvci_msg *msg, const kvc_reply *reply, const char **why_p)
{
    if (reply->u.hold.hold == 0) {
        *why_p = "a hold has no name";
        return KVC_PROTOCOL;
    }
    *(kvc_hold_info *)msg->call->u.keep.info_p = (kvc_hold_info){
        .hold = reply->u.hold.hold,
        .ttl_ms = reply->u.hold.ttl_ms,
        .tenant_bytes = reply->u.hold.tenant_bytes,
        .max_bytes = reply->u.hold.max_bytes,
        .n_blocks = reply->u.hold.n_blocks,
    };
    return KVC_OK;
}

/* A hold whose answer was lost has no name to release it by, and counts against the tenant's cap.
 */
static const kvci_kind hold_kind = {.name = "hold", .not_twice = true, .take = hold_take};
static const kvci_kind hold_blocks_kind = {
    .name = "hold", .names_schema = true, .not_twice = true, .take = hold_take};
static const kvci_kind renew_kind = {.name = "hold", .take = hold_take};

kvc_status kvc_hold(kvc_context *context, uint64_t ttl_ms, kvc_hold_info *info_p,
                    uint64_t deadline_ns, kvc_op *op)
{
    memset(info_p, 0, sizeof(*info_p));
    kvci_call *call =
        one_message(context->client, &hold_kind, context, &(named){0}, info_p, deadline_ns);
    if (call == NULL)
        return KVC_NO_MEMORY;
    kvci_msg *msg = &call->msgs[0];
    msg->req.method = KVC_HOLD;
    msg->req.u.hold.ttl_ms = ttl_ms;
    msg->handle_p = &msg->req.u.hold.context;
    return kvci_call_start(call, op);
}

static kvc_status check_names(kvc_client *client, const char *what, uint32_t n)
{
    uint32_t most = kvci_limits(client).max_digests;
    if (n == 0 || n > most)
        return kvci_fail(KVC_INVALID, "%s: %u names, 1 to %u", what, n, most);
    return KVC_OK;
}

kvc_status kvc_hold_blocks(kvc_client *client, const kvc_digest *schema, const kvc_digest *digests,
                           uint32_t n, uint64_t ttl_ms, kvc_hold_info *info_p, uint64_t deadline_ns,
                           kvc_op *op)
{
    named names = {.digests = digests, .n_digests = n};
    memset(info_p, 0, sizeof(*info_p));
    kvc_status status = check_names(client, "hold", n);
    if (status != KVC_OK)
        return status;
    kvci_call *call = one_message(client, &hold_blocks_kind, NULL, &names, info_p, deadline_ns);
    if (call == NULL)
        return KVC_NO_MEMORY;
    kvc_request *req = &call->msgs[0].req;
    req->method = KVC_HOLD;
    req->u.hold.ttl_ms = ttl_ms;
    req->u.hold.schema = *schema;
    req->u.hold.digests = names.digests;
    req->u.hold.n_digests = n;
    return kvci_call_start(call, op);
}

kvc_status kvc_hold_renew(kvc_client *client, uint64_t hold, uint64_t ttl_ms, kvc_hold_info *info_p,
                          uint64_t deadline_ns, kvc_op *op)
{
    memset(info_p, 0, sizeof(*info_p));
    if (hold == 0)
        return kvci_fail(KVC_INVALID, "hold: 0 names none");
    kvci_call *call = one_message(client, &renew_kind, NULL, &(named){0}, info_p, deadline_ns);
    if (call == NULL)
        return KVC_NO_MEMORY;
    call->msgs[0].req.method = KVC_HOLD;
    call->msgs[0].req.u.hold.hold = hold;
    call->msgs[0].req.u.hold.ttl_ms = ttl_ms;
    return kvci_call_start(call, op);
}

static kvc_status release_take(kvci_msg *msg, const kvc_reply *reply, const char **why_p)
{
    (void)msg;
    (void)reply;
    (void)why_p;
    return KVC_OK;
}

/* An attempt whose answer was lost may have released it: then not finding it is what was wanted. */
static void release_finish(kvci_call *call)
{
    if (call->status == KVC_NOT_FOUND && call->resent)
        call->status = KVC_OK;
}

static const kvci_kind release_kind = {
    .name = "release",
    .take = release_take,
    .finish = release_finish,
};

kvc_status kvc_release(kvc_client *client, uint64_t hold, uint64_t deadline_ns, kvc_op *op)
{
    kvci_call *call = one_message(client, &release_kind, NULL, &(named){0}, NULL, deadline_ns);
    if (call == NULL)
        return KVC_NO_MEMORY;
    call->msgs[0].req.method = KVC_RELEASE;
    call->msgs[0].req.u.release.hold = hold;
    return kvci_call_start(call, op);
}

static kvc_status prefetch_take(kvci_msg *msg, const kvc_reply *reply, const char **why_p)
{
    (void)why_p;
    *(kvc_prefetch_info *)msg->call->u.keep.info_p = (kvc_prefetch_info){
        .there = reply->u.prefetch.there,
        .moved = reply->u.prefetch.moved,
        .missing = reply->u.prefetch.missing,
        .left = reply->u.prefetch.left,
        .moved_bytes = reply->u.prefetch.moved_bytes,
    };
    return KVC_OK;
}

static const kvci_kind prefetch_kind = {.name = "prefetch", .take = prefetch_take};

kvc_status kvc_prefetch(kvc_context *context, const uint32_t *parts, uint32_t n_parts,
                        uint32_t first_block, uint32_t n_blocks, kvc_tier tier,
                        kvc_prefetch_info *info_p, uint64_t deadline_ns, kvc_op *op)
{
    named names = {.parts = parts, .n_parts = n_parts};
    memset(info_p, 0, sizeof(*info_p));
    if (n_parts > KVC_MAX_PARTS)
        return kvci_fail(KVC_INVALID, "prefetch: %u parts, at most %u", n_parts, KVC_MAX_PARTS);
    kvci_call *call =
        one_message(context->client, &prefetch_kind, context, &names, info_p, deadline_ns);
    if (call == NULL)
        return KVC_NO_MEMORY;
    kvci_msg *msg = &call->msgs[0];
    msg->req.method = KVC_PREFETCH;
    msg->req.u.prefetch.parts = names.parts;
    msg->req.u.prefetch.n_parts = n_parts;
    msg->req.u.prefetch.first_block = first_block;
    msg->req.u.prefetch.n_blocks = n_blocks;
    msg->req.u.prefetch.tier = tier;
    msg->handle_p = &msg->req.u.prefetch.context;
    return kvci_call_start(call, op);
}

static const kvci_kind prefetch_blocks_kind = {
    .name = "prefetch", .names_schema = true, .take = prefetch_take};

kvc_status kvc_prefetch_blocks(kvc_client *client, const kvc_digest *schema,
                               const kvc_digest *digests, uint32_t n, const uint32_t *parts,
                               uint32_t n_parts, kvc_tier tier, kvc_prefetch_info *info_p,
                               uint64_t deadline_ns, kvc_op *op)
{
    named names = {.parts = parts, .digests = digests, .n_parts = n_parts, .n_digests = n};
    memset(info_p, 0, sizeof(*info_p));
    kvc_status status = check_names(client, "prefetch", n);
    if (status == KVC_OK && n_parts > KVC_MAX_PARTS)
        status = kvci_fail(KVC_INVALID, "prefetch: %u parts, at most %u", n_parts, KVC_MAX_PARTS);
    if (status != KVC_OK)
        return status;
    kvci_call *call = one_message(client, &prefetch_blocks_kind, NULL, &names, info_p, deadline_ns);
    if (call == NULL)
        return KVC_NO_MEMORY;
    kvc_request *req = &call->msgs[0].req;
    req->method = KVC_PREFETCH;
    req->u.prefetch.parts = names.parts;
    req->u.prefetch.n_parts = n_parts;
    req->u.prefetch.tier = tier;
    req->u.prefetch.schema = *schema;
    req->u.prefetch.digests = names.digests;
    req->u.prefetch.n_digests = n;
    return kvci_call_start(call, op);
}
