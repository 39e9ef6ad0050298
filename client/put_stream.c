/*
 * put_stream.c: values whose bytes are sent only where the server wants them.
 *
 * The values are shared out over streams, one message of the op each. A stream offers as many as
 * its window holds, sends the bodies that are asked for from the caller's region, and takes the
 * answers as they come; all of that runs in the transfer's callbacks, one after the other. An
 * attempt that is repeated offers only what has no answer yet.
 */
#include <string.h>

#include "internal.h"

struct kvci_upload {
    kvc_digest schema;
    kvc_promise promise;
    uint64_t ttl_ms;
    uint8_t *base;           /* of the region */
    const kvc_value *values; /* [n_items], ours */
    const kvc_whole *wholes; /* [n_items], ours; NULL: they are no pieces */
    uint64_t *granted_ms;    /* [n_items]; may be NULL */
    bool *settled;           /* [n_items] */
    uint32_t *item_of;       /* [n_items] of this attempt's offers */
    uint32_t n_items, next;  /* next: the first item that may not have been offered yet */
    uint32_t n_offers, n_open, n_settled;   /* n_open: without their last answer */
    uint32_t wanted[KVC_PUT_WINDOW_VALUES]; /* offers whose bodies are to be sent, a ring */
    uint32_t first_wanted, n_wanted;
    bool pushing, ended;
    kvc_put_offer offers[KVC_PUT_WINDOW_VALUES];
    struct iovec data;
    kvc_request req; /* after the first */
};

static void fill_offers(kvci_upload *up, kvc_request *req)
{
    uint32_t n = 0;
    for (; up->next < up->n_items && up->n_open < KVC_PUT_WINDOW_VALUES; up->next++) {
        const kvc_value *value = &up->values[up->next];
        kvc_whole whole = up->wholes ? up->wholes[up->next] : (kvc_whole){0};
        if (up->settled[up->next])
            continue;
        up->item_of[up->n_offers++] = up->next;
        up->n_open++;
        up->offers[n++] = (kvc_put_offer){.schema = up->schema,
                                          .digest = value->digest,
                                          .part = value->part,
                                          .len_bytes = value->len_bytes,
                                          .promise = up->promise,
                                          .ttl_ms = up->ttl_ms,
                                          .whole = whole};
    }
    *req = (kvc_request){.method = KVC_PUT_BLOCKS_STREAM};
    req->u.put_stream.n_offers = n;
    req->u.put_stream.offers = up->offers;
}

static void fill_body(kvci_upload *up, kvc_request *req)
{
    uint32_t number = up->wanted[up->first_wanted % KVC_PUT_WINDOW_VALUES];
    const kvc_value *value = &up->values[up->item_of[number]];
    up->first_wanted++;
    up->n_wanted--;
    up->data = (struct iovec){up->base + value->src_off_bytes, value->len_bytes};
    req->u.put_stream.value = number;
    req->data = &up->data;
    req->n_data = 1;
    req->data_bytes = value->len_bytes;
}

/* Sends what there is to send, if nothing is under way. */
static kvc_status advance(kvci_msg *msg, const char **why_p)
{
    kvci_upload *up = msg->upload;
    if (up->pushing || up->ended)
        return KVC_OK;
    fill_offers(up, &up->req);
    if (up->n_wanted)
        fill_body(up, &up->req);
    up->ended = up->n_open == 0;
    if (!up->ended && !up->req.u.put_stream.n_offers && !up->req.n_data)
        return KVC_OK;
    up->pushing = !up->ended;
    kvc_status status =
        msg->link->ops->push(msg->link->conn, &msg->xfer, up->ended ? NULL : &up->req);
    *why_p = "a message of the stream could not be sent";
    return status == KVC_CLOSED ? KVC_OK : status; /* then done follows, and says more */
}

static kvc_status upload_pushed(kvci_msg *msg, const char **why_p)
{
    msg->upload->pushing = false;
    return advance(msg, why_p);
}

static kvc_status take_answer(kvci_msg *msg, const kvc_put_answer *answer, const char **why_p)
{
    kvci_upload *up = msg->upload;
    *why_p = "an answer is to no offer, or one too many";
    if (answer->value >= up->n_offers || up->settled[up->item_of[answer->value]])
        return KVC_PROTOCOL;
    uint32_t item = up->item_of[answer->value];
    if (answer->send) {
        if (up->n_wanted == KVC_PUT_WINDOW_VALUES)
            return KVC_PROTOCOL;
        up->wanted[(up->first_wanted + up->n_wanted++) % KVC_PUT_WINDOW_VALUES] = answer->value;
        return KVC_OK;
    }
    up->settled[item] = true;
    up->n_settled++;
    up->n_open--;
    msg->call->u.put.status[msg->first + item] = (int8_t)answer->status;
    if (up->granted_ms)
        up->granted_ms[item] = answer->ttl_ms;
    return KVC_OK;
}

static kvc_status upload_message(kvci_msg *msg, const kvc_reply *reply, const char **why_p)
{
    for (uint32_t i = 0; i < reply->u.put_stream.n_answers; i++) {
        kvc_status status = take_answer(msg, &reply->u.put_stream.answers[i], why_p);
        if (status != KVC_OK)
            return status;
    }
    return advance(msg, why_p);
}

static kvc_status upload_end(kvci_msg *msg, const kvc_reply *reply, const char **why_p)
{
    (void)reply;
    *why_p = "the stream ended before its last answer";
    return msg->upload->n_settled == msg->upload->n_items ? KVC_OK : KVC_PROTOCOL;
}

static void upload_begin(kvci_msg *msg)
{
    kvci_upload *up = msg->upload;
    up->next = up->n_offers = up->n_open = 0;
    up->first_wanted = up->n_wanted = 0;
    up->ended = false;
    up->pushing = true; /* the first message */
    fill_offers(up, &msg->req);
}

static void upload_fail(kvci_msg *msg, kvc_status status)
{
    for (uint32_t i = 0; i < msg->n_items; i++)
        if (!msg->upload->settled[i])
            msg->call->u.put.status[msg->first + i] = (int8_t)status;
}

static const kvci_kind upload_kind = {
    .name = "put stream",
    .bulk_lane = true,
    .names_schema = true,
    .begin = upload_begin,
    .message = upload_message,
    .pushed = upload_pushed,
    .take = upload_end,
    .fail = upload_fail,
};

static const kvci_kind pieces_kind = {
    .name = "opaque put",
    .bulk_lane = true,
    .names_schema = true,
    .begin = upload_begin,
    .message = upload_message,
    .pushed = upload_pushed,
    .take = upload_end,
    .fail = upload_fail,
    .finish = kvci_opaque_put_finish,
};

kvci_call *kvci_upload_new(kvc_client *client, const kvci_put *put, uint64_t deadline_ns)
{
    uint32_t n = put->n;
    uint64_t wanted = put->bytes / KVCI_STRIPE_MIN_BYTES + 1;
    uint32_t n_msgs = wanted < client->n_channels ? (uint32_t)wanted : client->n_channels;
    uint32_t per_msg = (n + n_msgs - 1) / n_msgs;
    n_msgs = per_msg == 0 ? 0 : (n + per_msg - 1) / per_msg;
    size_t extra_bytes = kvci_carve_bytes(n, sizeof(*put->values)) +
                         kvci_carve_bytes(n, sizeof(*put->wholes)) + kvci_carve_bytes(n, 1) +
                         kvci_carve_bytes(n, sizeof(bool)) + kvci_carve_bytes(n, sizeof(uint32_t)) +
                         kvci_carve_bytes(n_msgs, sizeof(kvci_upload)) + put->extra_bytes;
    kvci_call *call = kvci_call_new(client, put->wholes ? &pieces_kind : &upload_kind, n_msgs,
                                    extra_bytes, deadline_ns);
    if (call == NULL)
        return NULL;
    kvc_value *own = kvci_carve(call, n, sizeof(*own));
    kvc_whole *wholes = kvci_carve(call, n, sizeof(*wholes));
    bool *settled = kvci_carve(call, n, sizeof(*settled));
    uint32_t *item_of = kvci_carve(call, n, sizeof(*item_of));
    kvci_upload *uploads = kvci_carve(call, n_msgs, sizeof(*uploads));
    if (n > 0)
        memcpy(own, put->values, n * sizeof(*own));
    if (n > 0 && put->wholes)
        memcpy(wholes, put->wholes, n * sizeof(*wholes));
    call->region = (kvc_region *)put->src; /* counts its users only */
    call->u.put.status = put->status ? put->status : kvci_carve(call, n, 1);
    for (uint32_t i = 0; i < n_msgs; i++) {
        kvci_msg *msg = &call->msgs[i];
        uint32_t first = i * per_msg, left = n - first;
        msg->first = first;
        msg->n_items = left < per_msg ? left : per_msg;
        msg->upload = &uploads[i];
        uploads[i] = (kvci_upload){.schema = *put->schema,
                                   .promise = put->promise,
                                   .ttl_ms = put->ttl_ms,
                                   .base = put->src->base,
                                   .values = own + first,
                                   .wholes = put->wholes ? wholes + first : NULL,
                                   .granted_ms = put->granted_ms ? put->granted_ms + first : NULL,
                                   .settled = settled + first,
                                   .item_of = item_of + first,
                                   .n_items = msg->n_items};
        msg->req.method = KVC_PUT_BLOCKS_STREAM;
    }
    return call;
}

kvc_status kvc_put_stream(kvc_client *client, const kvc_digest *schema, kvc_promise promise,
                          uint64_t ttl_ms, const kvc_value *values, uint32_t n,
                          const kvc_region *src, int8_t *status, uint64_t *granted_ms,
                          uint64_t deadline_ns, kvc_op *op)
{
    uint64_t bytes = 0;
    kvc_limits limits = kvci_limits(client);
    kvc_status checked =
        kvci_put_check(client, "put stream", promise, values, n, src, &limits, &bytes);
    if (checked != KVC_OK)
        return checked;
    kvci_put put = {.schema = schema,
                    .promise = promise,
                    .ttl_ms = ttl_ms,
                    .values = values,
                    .n = n,
                    .bytes = bytes,
                    .src = src,
                    .status = status,
                    .granted_ms = granted_ms};
    kvci_call *call = kvci_upload_new(client, &put, deadline_ns);
    if (call == NULL)
        return kvci_fail(KVC_NO_MEMORY, "put stream: no memory");
    return kvci_call_start(call, op);
}
