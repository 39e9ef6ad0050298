/*
 * put.c: whole values to the server.
 *
 * A batch is cut into messages that hold max_batch_values, max_message_bytes and KVCI_MAX_IOVECS at
 * most; the cut is walked twice, to count and to fill. The payload stays in the caller's region
 * until the op is complete. Each message writes the statuses of its own values.
 */
#include <string.h>

#include "internal.h"

typedef struct cut {
    uint32_t max_values, max_pieces, target_bytes;
    const kvc_value *values;
    uint32_t n;
} cut;

/* Values from first on that go into one message; at least one. */
static uint32_t cut_next(const cut *c, uint32_t first)
{
    uint64_t bytes = 0, end_off_bytes = UINT64_MAX;
    uint32_t pieces = 0, i = first;
    for (; i < c->n && i - first < c->max_values; i++) {
        const kvc_value *value = &c->values[i];
        pieces += value->src_off_bytes != end_off_bytes;
        bytes += value->len_bytes;
        if (i > first && (bytes > c->target_bytes || pieces > c->max_pieces))
            break;
        end_off_bytes = value->src_off_bytes + value->len_bytes;
    }
    return i - first;
}

kvc_status kvci_put_check(const kvc_client *client, const char *name, kvc_promise promise,
                          const kvc_value *values, uint32_t n, const kvc_region *src,
                          const kvc_limits *limits, uint64_t *bytes_p)
{
    uint64_t bytes = 0;
    if (promise != KVC_PROMISE_MEMORY && promise != KVC_PROMISE_DURABLE)
        return kvci_fail(KVC_INVALID, "%s: promise %d is neither MEMORY nor DURABLE", name,
                         (int)promise);
    if (src == NULL || src->client != client)
        return kvci_fail(KVC_INVALID, "%s: the region is NULL or another client's", name);
    kvc_status host = kvci_region_check_host(src, name);
    if (host != KVC_OK)
        return host;
    uint32_t max_bytes = limits->max_value_bytes < limits->max_message_bytes
                             ? limits->max_value_bytes
                             : limits->max_message_bytes;
    for (uint32_t i = 0; i < n; i++) {
        const kvc_value *value = &values[i];
        if (value->len_bytes == 0 || value->len_bytes > max_bytes)
            return kvci_fail(KVC_INVALID, "%s: value %u has %u bytes, allowed are 1 to %u", name, i,
                             value->len_bytes, max_bytes);
        if (value->src_off_bytes > src->len_bytes ||
            value->len_bytes > src->len_bytes - value->src_off_bytes)
            return kvci_fail(KVC_INVALID, "%s: value %u lies outside its region", name, i);
        bytes += value->len_bytes;
    }
    *bytes_p = bytes;
    return KVC_OK;
}

static kvc_status put_take(kvci_msg *msg, const kvc_reply *reply, const char **why_p)
{
    if (reply->u.put_blocks.n_values != msg->n_items) {
        *why_p = "the number of statuses is not that of the values";
        return KVC_PROTOCOL;
    }
    memcpy(msg->call->u.put.status + msg->first, reply->u.put_blocks.status, msg->n_items);
    return KVC_OK;
}

static void put_fail(kvci_msg *msg, kvc_status status)
{
    memset(msg->call->u.put.status + msg->first, (int8_t)status, msg->n_items);
}

static const kvci_kind put_kind = {
    .name = "put",
    .bulk_lane = true,
    .names_schema = true,
    .take = put_take,
    .fail = put_fail,
};

/* Fills one message; pieces that follow each other in memory become one iovec. */
static void fill(kvci_msg *msg, const kvc_digest *schema, kvc_promise promise,
                 const kvc_value *values, uint8_t *base, kvc_put_value *out, struct iovec *iov)
{
    uint32_t n_iov = 0;
    for (uint32_t i = 0; i < msg->n_items; i++) {
        const kvc_value *value = &values[msg->first + i];
        uint8_t *start = base + value->src_off_bytes;
        out[i] = (kvc_put_value){
            .digest = value->digest, .part = value->part, .len_bytes = value->len_bytes};
        if (n_iov > 0 && (uint8_t *)iov[n_iov - 1].iov_base + iov[n_iov - 1].iov_len == start)
            iov[n_iov - 1].iov_len += value->len_bytes;
        else
            iov[n_iov++] = (struct iovec){.iov_base = start, .iov_len = value->len_bytes};
        msg->req.data_bytes += value->len_bytes;
    }
    /* A DURABLE put waits for a group commit, and the group for many of them. */
    msg->flight_bytes = promise == KVC_PROMISE_MEMORY ? (uint32_t)msg->req.data_bytes : 0;
    msg->req.method = KVC_PUT_BLOCKS;
    msg->req.u.put_blocks.schema = *schema;
    msg->req.u.put_blocks.promise = promise;
    msg->req.u.put_blocks.n_values = msg->n_items;
    msg->req.u.put_blocks.values = out;
    msg->req.data = iov;
    msg->req.n_data = n_iov;
}

kvc_status kvc_put(kvc_client *client, const kvc_digest *schema, kvc_promise promise,
                   const kvc_value *values, uint32_t n, const kvc_region *src, int8_t *status,
                   uint64_t deadline_ns, kvc_op *op)
{
    uint64_t bytes = 0;
    kvc_limits limits = kvci_limits(client);
    kvc_status checked = kvci_put_check(client, "put", promise, values, n, src, &limits, &bytes);
    if (checked != KVC_OK)
        return checked;
    cut c = {
        .max_values = limits.max_batch_values,
        .max_pieces = KVCI_MAX_IOVECS,
        .target_bytes = kvci_target_bytes(client, bytes, limits.max_message_bytes),
        .values = values,
        .n = n,
    };
    uint32_t n_msgs = 0;
    for (uint32_t first = 0; first < n; first += cut_next(&c, first))
        n_msgs++;
    size_t extra_bytes =
        kvci_carve_bytes(n, sizeof(kvc_put_value)) + kvci_carve_bytes(n, sizeof(struct iovec));
    kvci_call *call = kvci_call_new(client, &put_kind, n_msgs, extra_bytes, deadline_ns);
    if (call == NULL)
        return kvci_fail(KVC_NO_MEMORY, "put: no memory");
    kvc_put_value *out = kvci_carve(call, n, sizeof(*out));
    struct iovec *iov = kvci_carve(call, n, sizeof(*iov));
    call->region = (kvc_region *)src; /* counts its users only */
    call->u.put.status = status;
    for (uint32_t i = 0, first = 0; i < n_msgs; first += call->msgs[i++].n_items) {
        call->msgs[i].first = first;
        call->msgs[i].n_items = cut_next(&c, first);
        fill(&call->msgs[i], schema, promise, values, src->base, out + first, iov + first);
    }
    return kvci_call_start(call, op);
}
