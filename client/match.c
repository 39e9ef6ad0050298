/*
 * match.c: how many leading blocks the server holds.
 *
 * A long list is cut into messages of max_digests, all in flight at once; the answer is the hits of
 * the leading messages up to the first that is not full. Caller's thread, then transport threads;
 * each message writes its own counter.
 */
#include <string.h>

#include "internal.h"

static kvc_status match_take(kvci_msg *msg, const kvc_reply *reply, const char **why_p)
{
    if (reply->u.match_prefix.hits > msg->n_items) {
        *why_p = "more hits than digests";
        return KVC_PROTOCOL;
    }
    uint8_t *tiers = msg->call->u.match.tiers;
    uint32_t n_tiers =
        msg->req.u.match_prefix.want_each ? msg->n_items : reply->u.match_prefix.hits;
    if (tiers != NULL && reply->u.match_prefix.n_tiers != n_tiers) {
        *why_p = "the tiers are missing";
        return KVC_PROTOCOL;
    }
    if (tiers != NULL && n_tiers > 0)
        memcpy(tiers + msg->first, reply->u.match_prefix.tiers, n_tiers);
    msg->call->u.match.hits[msg - msg->call->msgs] = reply->u.match_prefix.hits;
    return KVC_OK;
}

static void match_finish(kvci_call *call)
{
    uint32_t hits = 0;
    for (uint32_t i = 0; i < call->n_msgs && call->status == KVC_OK; i++) {
        hits += call->u.match.hits[i];
        if (call->u.match.hits[i] < call->msgs[i].n_items)
            break;
    }
    if (call->u.match.hits_p != NULL)
        *call->u.match.hits_p = hits;
}

static const kvci_kind match_kind = {
    .name = "match",
    .names_schema = true,
    .stop_on_error = true,
    .take = match_take,
    .finish = match_finish,
};

/* each: of an opaque schema, tiers of all digests; then hits_p may be NULL. */
static kvc_status match(kvc_client *client, const kvc_digest *schema, const kvc_digest *digests,
                        uint32_t n, const uint32_t *parts, uint32_t n_parts, bool each,
                        uint8_t *tiers, uint32_t *hits_p, uint64_t deadline_ns, kvc_op *op)
{
    if (n_parts > KVC_MAX_PARTS)
        return kvci_fail(KVC_INVALID, "match: %u parts, at most %u", n_parts, KVC_MAX_PARTS);
    uint32_t per_msg = kvci_limits(client).max_digests;
    uint32_t n_msgs = n / per_msg + (n % per_msg != 0);
    size_t extra_bytes = kvci_carve_bytes(n, sizeof(*digests)) +
                         kvci_carve_bytes(n_parts, sizeof(*parts)) +
                         kvci_carve_bytes(n_msgs, sizeof(uint32_t));
    kvci_call *call = kvci_call_new(client, &match_kind, n_msgs, extra_bytes, deadline_ns);
    if (call == NULL)
        return kvci_fail(KVC_NO_MEMORY, "match: no memory");
    kvc_digest *own_digests = kvci_carve(call, n, sizeof(*digests));
    uint32_t *own_parts = kvci_carve(call, n_parts, sizeof(*parts));
    if (n > 0)
        memcpy(own_digests, digests, n * sizeof(*digests));
    if (n_parts > 0)
        memcpy(own_parts, parts, n_parts * sizeof(*parts));
    call->u.match.hits_p = hits_p;
    call->u.match.tiers = tiers;
    call->u.match.hits = kvci_carve(call, n_msgs, sizeof(uint32_t));
    for (uint32_t i = 0; i < n_msgs; i++) {
        kvci_msg *msg = &call->msgs[i];
        msg->first = i * per_msg;
        msg->n_items = n - msg->first < per_msg ? n - msg->first : per_msg;
        msg->req.method = KVC_MATCH_PREFIX;
        msg->req.u.match_prefix.schema = *schema;
        msg->req.u.match_prefix.n_digests = msg->n_items;
        msg->req.u.match_prefix.digests = own_digests + msg->first;
        msg->req.u.match_prefix.n_parts = n_parts;
        msg->req.u.match_prefix.parts = own_parts;
        msg->req.u.match_prefix.want_tiers = tiers != NULL;
        msg->req.u.match_prefix.want_each = each;
    }
    return kvci_call_start(call, op);
}

kvc_status kvc_match(kvc_client *client, const kvc_digest *schema, const kvc_digest *digests,
                     uint32_t n, const uint32_t *parts, uint32_t n_parts, uint32_t *hits_p,
                     uint64_t deadline_ns, kvc_op *op)
{
    return kvc_match_tiers(client, schema, digests, n, parts, n_parts, NULL, hits_p, deadline_ns,
                           op);
}

kvc_status kvc_match_tiers(kvc_client *client, const kvc_digest *schema, const kvc_digest *digests,
                           uint32_t n, const uint32_t *parts, uint32_t n_parts, uint8_t *tiers,
                           uint32_t *hits_p, uint64_t deadline_ns, kvc_op *op)
{
    *hits_p = 0;
    return match(client, schema, digests, n, parts, n_parts, false, tiers, hits_p, deadline_ns, op);
}

kvc_status kvc_opaque_match(kvc_client *client, const kvc_digest *schema, const kvc_digest *digests,
                            uint32_t n, uint8_t *tiers, uint64_t deadline_ns, kvc_op *op)
{
    return match(client, schema, digests, n, NULL, 0, true, tiers, NULL, deadline_ns, op);
}
