/*
 * fake_stream.c: the fake server's replies that stream: a few items to a message, by the formulas,
 * or a lie in the second message.
 *
 * A stream belongs to its call; its messages are sent one after the other.
 */
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "fake_server.h"

#define ITEMS 50u /* of one message */

typedef struct stream {
    fake_server *fake;
    fake_action action;
    void (*over)(fake_server *fake, kvt_call *call, kvc_status status);
    uint32_t next, n_messages;
} stream;

static uint32_t count_items(const kvc_request *req)
{
    uint32_t n = 0;
    if (req->method == KVC_FETCH_BLOCKS)
        return req->u.fetch_blocks.n_digests * req->u.fetch_blocks.n_parts;
    for (uint32_t g = 0; g < req->u.fetch_rows.n_groups; g++)
        n += req->u.fetch_rows.groups[g].n_picks;
    return n;
}

/* The row of pick number i: gives its bytes, 0 where it is missing. */
static uint32_t make_row(const stream *s, const kvc_request *req, uint32_t i, uint8_t *row)
{
    uint32_t g = 0;
    for (; i >= req->u.fetch_rows.groups[g].n_picks; g++)
        i -= req->u.fetch_rows.groups[g].n_picks;
    const kvc_row_group *group = &req->u.fetch_rows.groups[g];
    uint32_t token = group->picks[i];
    if (s->fake->missing_every != 0 && token % s->fake->missing_every == 0)
        return 0;
    for (uint32_t b = 0; b < s->fake->row_bytes[group->part]; b++)
        row[b] = fake_byte(group->part, token, b);
    return s->fake->row_bytes[group->part];
}

/* The value of number v, of 64 rows; none of a digest whose first byte is 0. */
static uint32_t make_value(const stream *s, const kvc_request *req, uint32_t v, uint8_t *bytes,
                           kvc_block_value *value)
{
    uint32_t n_parts = req->u.fetch_blocks.n_parts;
    const kvc_digest *digest = &req->u.fetch_blocks.digests[v / n_parts];
    uint32_t part = req->u.fetch_blocks.parts[v % n_parts];
    *value = (kvc_block_value){.block = v / n_parts, .part = part, .status = KVC_NOT_FOUND};
    if (digest->bytes[0] == 0)
        return 0;
    value->status = KVC_OK;
    value->tier = KVC_TIER_DRAM;
    value->len_bytes = 64 * s->fake->row_bytes[part];
    for (uint32_t b = 0; b < value->len_bytes; b++)
        bytes[b] = fake_value_byte(digest, part, b);
    return value->len_bytes;
}

static void send_message(kvt_call *call, stream *s);

static void sent(kvt_call *call, bool ok)
{
    stream *s = call->user;
    bool lies = s->action == FAKE_FEW_STATUS && s->n_messages == 2;
    if (ok && s->next < count_items(&call->req) && !lies) {
        send_message(call, s);
        return;
    }
    kvc_status status = !ok ? KVC_CANCELLED : s->action == FAKE_STATUS_LATER ? KVC_AGAIN : KVC_OK;
    fake_server *fake = s->fake;
    void (*over)(fake_server *, kvt_call *, kvc_status) = s->over;
    free(s);
    over(fake, call, status);
}

static void fill_rows(stream *s, kvt_call *call, kvc_reply *reply, uint8_t *bytes, size_t *len)
{
    kvc_missing_row *missing = kvc_arena_calloc(&call->arena, ITEMS + 1, sizeof(*missing));
    KVC_ASSERT(missing != NULL);
    uint32_t n = 0, end = s->next + ITEMS, all = count_items(&call->req);
    end = end < all ? end : all;
    reply->u.fetch_rows.n_picks = end - s->next;
    for (; s->next < end; s->next++) {
        uint32_t row_bytes = make_row(s, &call->req, s->next, bytes + *len);
        *len += row_bytes;
        if (row_bytes == 0)
            missing[n++] = (kvc_missing_row){.index = s->next, .status = KVC_NOT_FOUND};
    }
    if (s->action == FAKE_WILD_MISSING && s->n_messages == 1)
        missing[n++] = (kvc_missing_row){.index = s->next, .status = KVC_NOT_FOUND};
    reply->u.fetch_rows.missing = missing;
    reply->u.fetch_rows.n_missing = n;
    reply->u.fetch_rows.rows_dram = reply->u.fetch_rows.n_picks - n;
}

static void fill_values(stream *s, kvt_call *call, kvc_reply *reply, uint8_t *bytes, size_t *len)
{
    kvc_block_value *values = kvc_arena_calloc(&call->arena, ITEMS, sizeof(*values));
    KVC_ASSERT(values != NULL);
    uint32_t n = 0, all = count_items(&call->req);
    for (; n < ITEMS && s->next < all && *len < (512u << 10); n++, s->next++)
        *len += make_value(s, &call->req, s->next, bytes + *len, &values[n]);
    if (s->action == FAKE_WILD_MISSING && s->n_messages == 1)
        values[n - 1].block++;
    reply->u.fetch_blocks.values = values;
    reply->u.fetch_blocks.n_values = n;
}

static void send_message(kvt_call *call, stream *s)
{
    kvc_reply reply = {.method = call->req.method};
    size_t len = 0;
    uint8_t *bytes = malloc(2u << 20);
    KVC_ASSERT(bytes != NULL);
    if (reply.method == KVC_FETCH_BLOCKS)
        fill_values(s, call, &reply, bytes, &len);
    else
        fill_rows(s, call, &reply, bytes, &len);
    if (s->n_messages == 1 && s->action == FAKE_SHORT)
        len--;
    if (s->n_messages == 1 && s->action == FAKE_LONG)
        len++;
    s->n_messages++;
    kvt_slice slice = {.base = bytes, .len_bytes = len, .release = free, .arg = bytes};
    KVC_ASSERT(kvt_call_send(call, &reply, &slice, 1) == KVC_OK);
}

void fake_stream_answer(fake_server *fake, kvt_call *call, fake_action action,
                        void (*over)(fake_server *fake, kvt_call *call, kvc_status status))
{
    stream *s = calloc(1, sizeof(*s));
    KVC_ASSERT(s != NULL);
    *s = (stream){.fake = fake, .action = action, .over = over};
    call->user = s;
    call->sent = sent;
    if (count_items(&call->req) > 0)
        send_message(call, s);
    else
        sent(call, true);
}
