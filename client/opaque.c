/*
 * opaque.c: values of opaque schemas: cut into pieces on their way out, put together on their way
 * in.
 *
 * A put is a put stream of pieces whose statuses are folded when the last one is known. A get
 * shares the keys out over the channels, a stream each; its messages are checked and copied as they
 * come, and a value is OK once its last piece was copied and the sum of the whole is right.
 */
#include <stdlib.h>
#include <string.h>

#include "base/digest.h"
#include "base/sum.h"
#include "internal.h"

kvc_status kvc_opaque_key(const kvc_digest *schema, const void *key, size_t key_bytes,
                          kvc_digest *digest_p)
{
    return kvc_key_digest(schema, key, key_bytes, digest_p);
}

static uint64_t whole_sum(const void *bytes, uint64_t len_bytes)
{
    uint64_t sum = kvc_value_sum(bytes, (size_t)len_bytes);
    return sum != 0 ? sum : 1;
}

/* ---- put ------------------------------------------------------------------------------------- */

/* The status of a value is that of its worst piece; EXISTS only where each was there. */
void kvci_opaque_put_finish(kvci_call *call)
{
    const int8_t *piece = call->u.put.status;
    for (uint32_t i = 0; i < call->u.put.n; i++) {
        kvc_status status = KVC_EXISTS;
        for (uint32_t p = 0; p < call->u.put.n_pieces[i]; p++, piece++) {
            bool good = status == KVC_OK || status == KVC_EXISTS;
            if (good && *piece != KVC_EXISTS)
                status = (kvc_status)*piece;
        }
        call->u.put.whole_status[i] = (int8_t)status;
    }
}

/* Pieces of one value; 0: too many. */
static uint32_t pieces_of(const kvc_opaque_value *value, uint32_t piece_bytes)
{
    uint64_t n = value->len_bytes / piece_bytes + (value->len_bytes % piece_bytes != 0);
    return n > KVC_MAX_PIECES ? 0 : n > 0 ? (uint32_t)n : 1;
}

static kvc_status check_places(const kvc_client *client, const char *name,
                               const kvc_opaque_value *values, uint32_t n, const kvc_region *region)
{
    if (region == NULL || region->client != client)
        return kvci_fail(KVC_INVALID, "%s: the region is NULL or another client's", name);
    kvc_status host = kvci_region_check_host(region, name);
    if (host != KVC_OK)
        return host;
    for (uint32_t i = 0; i < n; i++)
        if (values[i].off_bytes > region->len_bytes ||
            values[i].len_bytes > region->len_bytes - values[i].off_bytes)
            return kvci_fail(KVC_INVALID, "%s: value %u lies outside its region", name, i);
    return KVC_OK;
}

/* Cuts the values; pieces and wholes have room for them. */
static void cut(const kvc_opaque_value *values, uint32_t n, uint32_t piece_bytes,
                const uint8_t *base, kvc_value *pieces, kvc_whole *wholes, uint32_t *n_pieces)
{
    for (uint32_t i = 0; i < n; i++) {
        const kvc_opaque_value *value = &values[i];
        kvc_whole whole = {value->len_bytes, whole_sum(base + value->off_bytes, value->len_bytes)};
        n_pieces[i] = pieces_of(value, piece_bytes);
        for (uint32_t p = 0; p < n_pieces[i]; p++) {
            uint64_t at = (uint64_t)p * piece_bytes, left = value->len_bytes - at;
            *wholes++ = whole;
            *pieces++ = (kvc_value){
                .digest = value->digest,
                .part = p,
                .len_bytes = left < piece_bytes ? (uint32_t)left : piece_bytes,
                .src_off_bytes = value->off_bytes + (size_t)at,
            };
        }
    }
}

static kvc_status put_pieces(kvc_client *client, kvci_put *put, const kvc_opaque_value *values,
                             uint32_t n, uint32_t piece_bytes, int8_t *status, uint64_t deadline_ns,
                             kvc_op *op)
{
    kvc_value *pieces = calloc((size_t)put->n + 1, sizeof(*pieces));
    kvc_whole *wholes = calloc((size_t)put->n + 1, sizeof(*wholes));
    uint32_t *n_pieces = calloc((size_t)n + 1, sizeof(*n_pieces));
    kvci_call *call = NULL;
    if (pieces != NULL && wholes != NULL && n_pieces != NULL) {
        cut(values, n, piece_bytes, put->src->base, pieces, wholes, n_pieces);
        put->values = pieces;
        put->wholes = wholes;
        put->extra_bytes = kvci_carve_bytes(n, sizeof(*n_pieces));
        call = kvci_upload_new(client, put, deadline_ns);
    }
    if (call != NULL) {
        uint32_t *own = kvci_carve(call, n, sizeof(*own));
        if (n > 0)
            memcpy(own, n_pieces, n * sizeof(*own));
        call->u.put.whole_status = status;
        call->u.put.n_pieces = own;
        call->u.put.n = n;
    }
    free(pieces);
    free(wholes);
    free(n_pieces);
    return call != NULL ? kvci_call_start(call, op)
                        : kvci_fail(KVC_NO_MEMORY, "opaque put: no memory");
}

kvc_status kvc_opaque_put(kvc_client *client, const kvc_digest *schema, kvc_promise promise,
                          uint64_t ttl_ms, const kvc_opaque_value *values, uint32_t n,
                          const kvc_region *src, int8_t *status, uint64_t deadline_ns, kvc_op *op)
{
    uint32_t piece_bytes = kvci_limits(client).max_value_bytes;
    uint64_t n_pieces = 0;
    kvci_put put = {.schema = schema, .promise = promise, .ttl_ms = ttl_ms, .src = src};
    if (promise != KVC_PROMISE_MEMORY && promise != KVC_PROMISE_DURABLE)
        return kvci_fail(KVC_INVALID, "opaque put: promise %d is neither MEMORY nor DURABLE",
                         (int)promise);
    kvc_status checked = check_places(client, "opaque put", values, n, src);
    for (uint32_t i = 0; i < n && checked == KVC_OK; i++) {
        uint32_t more = pieces_of(&values[i], piece_bytes);
        if (more == 0)
            checked = kvci_fail(KVC_INVALID, "opaque put: value %u has more than %u pieces of %u",
                                i, KVC_MAX_PIECES, piece_bytes);
        n_pieces += more;
        put.bytes += values[i].len_bytes;
    }
    if (checked == KVC_OK && n_pieces > UINT32_MAX / 2)
        checked = kvci_fail(KVC_INVALID, "opaque put: too many pieces at once");
    if (checked != KVC_OK)
        return checked;
    put.n = (uint32_t)n_pieces;
    return put_pieces(client, &put, values, n, piece_bytes, status, deadline_ns, op);
}

/* ---- get ------------------------------------------------------------------------------------- */

/* One value while its pieces come. */
typedef struct kvci_gather {
    uint64_t room_bytes, at_bytes;
    kvc_whole whole;
    uint32_t next;
    bool failed;
} kvci_gather;

static void get_begin(kvci_msg *msg)
{
    for (uint32_t i = 0; i < msg->n_items; i++) {
        kvci_gather *g = &msg->call->u.opaque.gathers[msg->first + i];
        *g = (kvci_gather){.room_bytes = g->room_bytes};
    }
}

static void end_value(kvci_msg *msg, uint32_t v, kvc_status status)
{
    kvci_call *call = msg->call;
    call->u.opaque.gathers[v].failed = status != KVC_OK;
    call->u.opaque.status[v] = (int8_t)status;
    msg->n_taken++;
}

/* The piece that is next, with bytes: copied where the value has room. */
static kvc_status take_piece(kvci_msg *msg, uint32_t v, const kvc_block_value *value,
                             kvci_cursor *cur, const char **why_p)
{
    kvc_opaque_value *out = &msg->call->u.opaque.values[v];
    kvci_gather *g = &msg->call->u.opaque.gathers[v];
    uint8_t *dst = msg->call->u.opaque.base + out->off_bytes;
    if (g->next == 0)
        g->whole = value->whole;
    *why_p = "a piece is of another value than the one before it, or too long";
    if (value->whole.sum != g->whole.sum || value->whole.total_bytes != g->whole.total_bytes ||
        value->len_bytes > g->whole.total_bytes - g->at_bytes)
        return KVC_PROTOCOL;
    bool fits = g->whole.total_bytes <= g->room_bytes;
    if (fits)
        kvci_copy_out(cur, dst + g->at_bytes, value->len_bytes);
    else
        kvci_skip(cur, value->len_bytes);
    g->next++;
    g->at_bytes += value->len_bytes;
    if (g->at_bytes < g->whole.total_bytes)
        return KVC_OK;
    out->len_bytes = g->whole.total_bytes;
    bool right = fits && whole_sum(dst, g->whole.total_bytes) == g->whole.sum;
    end_value(msg, v, right ? KVC_OK : fits ? KVC_CORRUPT : KVC_NO_SPACE);
    return KVC_OK;
}

static kvc_status get_message(kvci_msg *msg, const kvc_reply *reply, const char **why_p)
{
    kvci_cursor cur = {.iov = reply->data};
    for (uint32_t i = 0; i < reply->u.fetch_blocks.n_values; i++) {
        const kvc_block_value *value = &reply->u.fetch_blocks.values[i];
        const kvci_gather *gathers = msg->call->u.opaque.gathers + msg->first;
        uint32_t now = msg->n_taken;
        /* What comes behind a piece that failed says no more. */
        if (now > 0 && value->block == now - 1 && gathers[now - 1].failed &&
            value->status != KVC_OK)
            continue;
        *why_p = "a message has pieces that were not asked for, or another order";
        if (now >= msg->n_items || value->block != now ||
            (value->status == KVC_OK && value->part != gathers[now].next))
            return KVC_PROTOCOL;
        if (value->status != KVC_OK) {
            end_value(msg, msg->first + now, value->status);
            continue;
        }
        kvc_status status = take_piece(msg, msg->first + now, value, &cur, why_p);
        if (status != KVC_OK)
            return status;
    }
    return KVC_OK;
}

static kvc_status get_end(kvci_msg *msg, const kvc_reply *reply, const char **why_p)
{
    (void)reply;
    *why_p = "the stream ended before its last value";
    return msg->n_taken == msg->n_items ? KVC_OK : KVC_PROTOCOL;
}

static void get_fail(kvci_msg *msg, kvc_status status)
{
    memset(msg->call->u.opaque.status + msg->first, (int8_t)status, msg->n_items);
}

static const kvci_kind get_kind = {
    .name = "opaque get",
    .names_schema = true,
    .stop_on_error = true,
    .begin = get_begin,
    .message = get_message,
    .take = get_end,
    .fail = get_fail,
};

kvc_status kvc_opaque_get(kvc_client *client, const kvc_digest *schema, kvc_opaque_value *values,
                          uint32_t n, const kvc_region *dst, int8_t *status, uint64_t deadline_ns,
                          kvc_op *op)
{
    kvc_status checked = check_places(client, "opaque get", values, n, dst);
    if (checked != KVC_OK)
        return checked;
    uint32_t max_digests = kvci_limits(client).max_digests;
    uint32_t per_msg = n / client->n_channels + (n % client->n_channels != 0);
    per_msg = per_msg > max_digests ? max_digests : per_msg;
    uint32_t n_msgs = n > 0 ? n / per_msg + (n % per_msg != 0) : 0;
    kvc_digest *digests;
    size_t extra_bytes =
        kvci_carve_bytes(n, sizeof(*digests)) + kvci_carve_bytes(n, sizeof(kvci_gather));
    kvci_call *call = kvci_call_new(client, &get_kind, n_msgs, extra_bytes, deadline_ns);
    if (call == NULL)
        return kvci_fail(KVC_NO_MEMORY, "opaque get: no memory");
    digests = kvci_carve(call, n, sizeof(*digests));
    call->region = (kvc_region *)dst; /* counts its users only */
    call->u.opaque.base = dst->base;
    call->u.opaque.values = values;
    call->u.opaque.status = status;
    call->u.opaque.gathers = kvci_carve(call, n, sizeof(kvci_gather));
    for (uint32_t i = 0; i < n; i++) {
        digests[i] = values[i].digest;
        call->u.opaque.gathers[i].room_bytes = values[i].len_bytes;
    }
    for (uint32_t i = 0; i < n_msgs; i++) {
        kvci_msg *msg = &call->msgs[i];
        msg->first = i * per_msg;
        msg->n_items = n - msg->first < per_msg ? n - msg->first : per_msg;
        msg->req.method = KVC_FETCH_BLOCKS;
        msg->req.u.fetch_blocks.schema = *schema;
        msg->req.u.fetch_blocks.digests = digests + msg->first;
        msg->req.u.fetch_blocks.n_digests = msg->n_items;
    }
    return kvci_call_start(call, op);
}
