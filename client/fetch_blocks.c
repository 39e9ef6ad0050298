/*
 * fetch_blocks.c: whole values by digest, as the messages of streams, into the caller's region.
 *
 * The digests are shared out evenly over the channels, a stream each, within max_digests. Each
 * message is checked whole before a byte of it is copied, on the transport thread that brought it,
 * unless the transport has put its values into their places.
 */
#include <string.h>

#include "base/clock.h"
#include "internal.h"

/* The value that a reply's i-th answers; PROTOCOL unless it is the next one asked for. */
static kvc_status check_value(const kvci_msg *msg, const kvc_block_value *value, uint32_t i,
                              const char **why_p)
{
    const kvci_call *call = msg->call;
    uint32_t n_parts = call->u.blocks.n_parts, v = msg->n_taken + i;
    const kvc_block_part *part = &call->u.blocks.parts[v % n_parts];
    *why_p = "a message has values that were not asked for, or another order";
    if (v >= msg->n_items || value->block != v / n_parts || value->part != part->part)
        return KVC_PROTOCOL;
    *why_p = "a value has another length than the part's";
    return value->status == KVC_OK && value->len_bytes != part->value_bytes ? KVC_PROTOCOL : KVC_OK;
}

static size_t slot_of(const kvc_block_part *part, uint32_t block)
{
    return part->dst_slots != NULL ? part->dst_slots[block] : block;
}

static kvc_status blocks_message(kvci_msg *msg, const kvc_reply *reply, const char **why_p)
{
    kvci_call *call = msg->call;
    uint32_t n = reply->u.fetch_blocks.n_values, n_parts = call->u.blocks.n_parts;
    const kvc_block_value *values = reply->u.fetch_blocks.values;
    for (uint32_t i = 0; i < n; i++) {
        kvc_status status = check_value(msg, &values[i], i, why_p);
        if (status != KVC_OK)
            return status;
    }
    kvci_cursor cur = {.iov = reply->data, .dst = call->region};
    for (uint32_t i = 0; i < n; i++) {
        uint32_t v = msg->first + msg->n_taken + i;
        const kvc_block_part *part = &call->u.blocks.parts[v % n_parts];
        call->u.blocks.status[v] = (int8_t)values[i].status;
        if (call->u.blocks.tiers != NULL)
            call->u.blocks.tiers[v] = (uint8_t)values[i].tier;
        if (values[i].status == KVC_OK && !msg->xfer.placed)
            kvci_copy_out(&cur,
                          call->u.blocks.base + part->dst_off_bytes +
                              slot_of(part, v / n_parts) * part->stride_bytes,
                          part->value_bytes);
    }
    msg->n_taken += n;
    *why_p = "values could not be written to the GPU";
    return msg->xfer.placed ? kvci_region_flush(call->region) : cur.status;
}

static kvc_status blocks_end(kvci_msg *msg, const kvc_reply *reply, const char **why_p)
{
    (void)reply;
    *why_p = "the stream ended before its last value";
    return msg->n_taken == msg->n_items ? KVC_OK : KVC_PROTOCOL;
}

static void blocks_fail(kvci_msg *msg, kvc_status status)
{
    memset(msg->call->u.blocks.status + msg->first, (int8_t)status, msg->n_items);
}

/* Whole values teach what rows of the connection cost; not those that took another attempt. */
static void blocks_finish(kvci_call *call)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < call->n_msgs; i++) {
        const kvci_msg *msg = &call->msgs[i];
        if (msg->sends != 1)
            return;
        for (uint32_t v = msg->first; v < msg->first + msg->n_items; v++)
            bytes += call->u.blocks.status[v] == KVC_OK
                         ? call->u.blocks.parts[v % call->u.blocks.n_parts].value_bytes
                         : 0;
    }
    if (call->status == KVC_OK && bytes > 0)
        kvci_way_learn(call->client, false, bytes, 0, kvc_now_ns() - call->began_ns);
}

static const kvci_kind blocks_kind = {
    .name = "fetch blocks",
    .names_schema = true,
    .stop_on_error = true,
    .message = blocks_message,
    .take = blocks_end,
    .fail = blocks_fail,
    .finish = blocks_finish,
};

/* The highest slot of n blocks; 0 of none. */
static uint32_t last_slot(const kvc_block_part *part, uint32_t n)
{
    uint32_t last = n > 0 && part->dst_slots == NULL ? n - 1 : 0;
    for (uint32_t i = 0; part->dst_slots != NULL && i < n; i++)
        last = part->dst_slots[i] > last ? part->dst_slots[i] : last;
    return last;
}

/* Every value's place must lie inside the region; *value_bytes_p: of one block. */
static kvc_status check_parts(const kvc_client *client, const kvc_block_part *parts,
                              uint32_t n_parts, uint32_t n, const kvc_region *dst,
                              uint64_t *block_bytes_p)
{
    if (dst == NULL || dst->client != client)
        return kvci_fail(KVC_INVALID, "fetch blocks: the region is NULL or another client's");
    if (n_parts == 0 || n_parts > KVC_MAX_PARTS || (uint64_t)n * n_parts > UINT32_MAX)
        return kvci_fail(KVC_INVALID, "fetch blocks: %u parts of %u blocks", n_parts, n);
    *block_bytes_p = 0;
    for (uint32_t p = 0; p < n_parts; p++) {
        const kvc_block_part *part = &parts[p];
        uint64_t len_bytes = dst->len_bytes, off_bytes = part->dst_off_bytes;
        bool fits = part->value_bytes > 0 && part->value_bytes <= len_bytes &&
                    off_bytes <= len_bytes - part->value_bytes;
        if (fits && part->stride_bytes > 0)
            fits = (len_bytes - part->value_bytes - off_bytes) / part->stride_bytes >=
                   last_slot(part, n);
        if (n > 0 && !fits)
            return kvci_fail(KVC_INVALID, "fetch blocks: part %u lies outside its region",
                             part->part);
        *block_bytes_p += part->value_bytes;
    }
    return KVC_OK;
}

/* Digests of one stream. */
static uint32_t share(const kvc_client *client, uint32_t n, uint64_t block_bytes,
                      uint32_t max_digests)
{
    uint64_t least = KVCI_STRIPE_MIN_BYTES / (block_bytes + 1) + 1;
    uint64_t even = ((uint64_t)n + client->n_channels - 1) / client->n_channels;
    uint64_t per_msg = even > least ? even : least;
    return (uint32_t)(per_msg < max_digests ? per_msg : max_digests);
}

/* Where the transport may put the values of a message itself. */
static void name_rooms(kvci_msg *msg, kvt_room *rooms)
{
    const kvci_call *call = msg->call;
    uint32_t n_parts = call->u.blocks.n_parts;
    for (uint32_t i = 0; i < msg->n_items; i++) {
        uint32_t v = msg->first + i;
        const kvc_block_part *part = &call->u.blocks.parts[v % n_parts];
        rooms[i] = (kvt_room){.base = call->u.blocks.base + part->dst_off_bytes +
                                      slot_of(part, v / n_parts) * part->stride_bytes,
                              .n = 1,
                              .row_bytes = part->value_bytes};
    }
    msg->xfer.rooms = rooms;
    msg->xfer.n_rooms = msg->n_items;
}

/* rooms: [n * n_parts]; NULL: values are to be copied. */
static void fill(kvci_call *call, const kvc_digest *schema, kvc_digest *digests, uint32_t n,
                 uint32_t per_msg, const uint32_t *ids, kvt_room *rooms)
{
    uint32_t n_parts = call->u.blocks.n_parts;
    for (uint32_t i = 0; i < call->n_msgs; i++) {
        kvci_msg *msg = &call->msgs[i];
        uint32_t first = i * per_msg, left = n - first;
        uint32_t n_digests = left < per_msg ? left : per_msg;
        msg->first = first * n_parts;
        msg->n_items = n_digests * n_parts;
        if (rooms != NULL)
            name_rooms(msg, rooms + msg->first);
        msg->req.method = KVC_FETCH_BLOCKS;
        msg->req.u.fetch_blocks.schema = *schema;
        msg->req.u.fetch_blocks.digests = digests + first;
        msg->req.u.fetch_blocks.n_digests = n_digests;
        msg->req.u.fetch_blocks.parts = ids;
        msg->req.u.fetch_blocks.n_parts = n_parts;
    }
}

kvc_status kvc_fetch_blocks(kvc_client *client, const kvc_digest *schema, const kvc_digest *digests,
                            uint32_t n, const kvc_block_part *parts, uint32_t n_parts,
                            const kvc_region *dst, int8_t *status, uint8_t *tiers,
                            uint64_t deadline_ns, kvc_op *op)
{
    uint64_t block_bytes = 0;
    kvc_status checked = check_parts(client, parts, n_parts, n, dst, &block_bytes);
    if (checked != KVC_OK)
        return checked;
    uint32_t per_msg = share(client, n, block_bytes, kvci_limits(client).max_digests);
    uint32_t n_msgs = n / per_msg + (n % per_msg != 0);
    size_t extra_bytes = kvci_carve_bytes(n, sizeof(*digests)) +
                         kvci_carve_bytes(n_parts, sizeof(*parts)) +
                         kvci_carve_bytes(n_parts, sizeof(uint32_t)) +
                         (dst->lent ? kvci_carve_bytes((size_t)n * n_parts, sizeof(kvt_room)) : 0);
    kvci_call *call = kvci_call_new(client, &blocks_kind, n_msgs, extra_bytes, deadline_ns);
    if (call == NULL)
        return kvci_fail(KVC_NO_MEMORY, "fetch blocks: no memory");
    kvc_digest *own_digests = kvci_carve(call, n, sizeof(*digests));
    kvc_block_part *own_parts = kvci_carve(call, n_parts, sizeof(*parts));
    uint32_t *ids = kvci_carve(call, n_parts, sizeof(*ids));
    if (n > 0)
        memcpy(own_digests, digests, n * sizeof(*digests));
    memcpy(own_parts, parts, n_parts * sizeof(*parts));
    for (uint32_t p = 0; p < n_parts; p++)
        ids[p] = parts[p].part;
    call->region = (kvc_region *)dst; /* counts its users only */
    call->u.blocks.base = dst->base;
    call->u.blocks.parts = own_parts;
    call->u.blocks.n_parts = n_parts;
    call->u.blocks.status = status;
    call->u.blocks.tiers = tiers;
    fill(call, schema, own_digests, n, per_msg, ids,
         dst->lent ? kvci_carve(call, (size_t)n * n_parts, sizeof(kvt_room)) : NULL);
    return kvci_call_start(call, op);
}
