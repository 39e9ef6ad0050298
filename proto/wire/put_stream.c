/*
 * put_stream.c: the messages of PutBlocksStream.
 *
 * Pure, any thread. Counts, fixed lengths and enums are checked here; whether a value was offered,
 * and how much of its body has come, is the server's to judge.
 */
#include "wire_internal.h"

kvc_status kvci_put_put_blocks_stream_request(const kvc_request *req, const kvci_out *out)
{
    uint32_t n = req->u.put_stream.n_offers;
    if (n > KVC_PUT_WINDOW_VALUES || !kvci_data_fits(req->data, req->n_data, req->data_bytes))
        return KVC_INVALID;
    Kvasir__V1__PutOffer *offers = kvc_arena_alloc(out->arena, n * sizeof(*offers));
    Kvasir__V1__PutOffer **list = kvc_arena_alloc(out->arena, n * sizeof(*list));
    if (offers == NULL || list == NULL)
        return KVC_NO_MEMORY;
    for (uint32_t i = 0; i < n; i++) {
        const kvc_put_offer *offer = &req->u.put_stream.offers[i];
        offers[i] = (Kvasir__V1__PutOffer)KVASIR__V1__PUT_OFFER__INIT;
        offers[i].schema = kvci_put_digest(&offer->schema);
        offers[i].digest = kvci_put_digest(&offer->digest);
        offers[i].part = offer->part;
        offers[i].len_bytes = offer->len_bytes;
        offers[i].promise = (Kvasir__V1__Promise)offer->promise;
        offers[i].ttl_ms = offer->ttl_ms;
        offers[i].total_bytes = offer->whole.total_bytes;
        offers[i].sum = offer->whole.sum;
        list[i] = &offers[i];
    }
    Kvasir__V1__PutBlocksStreamRequest msg = KVASIR__V1__PUT_BLOCKS_STREAM_REQUEST__INIT;
    msg.n_offers = n;
    msg.offers = list;
    msg.value = req->u.put_stream.value;
    return kvci_pack(&msg.base, req->data_bytes, out->arena, out->head_p, out->head_bytes_p);
}

static kvc_status get_offer(kvci_job *job, const Kvasir__V1__PutOffer *msg, kvc_put_offer *offer)
{
    if (kvci_get_digest(&msg->schema, &offer->schema) != KVC_OK)
        return kvci_refuse(job, kvci_bad_schema);
    if (kvci_get_digest(&msg->digest, &offer->digest) != KVC_OK)
        return kvci_refuse(job, "a value's digest must have 32 bytes");
    if ((int)msg->promise != KVC_PROMISE_MEMORY && (int)msg->promise != KVC_PROMISE_DURABLE)
        return kvci_refuse(job, "promise must be MEMORY or DURABLE");
    offer->part = msg->part;
    offer->len_bytes = msg->len_bytes;
    offer->promise = (kvc_promise)msg->promise;
    offer->ttl_ms = msg->ttl_ms;
    offer->whole = (kvc_whole){msg->total_bytes, msg->sum};
    return KVC_OK;
}

kvc_status kvci_get_put_blocks_stream_request(kvci_job *job, kvc_request *req)
{
    const Kvasir__V1__PutBlocksStreamRequest *msg =
        (const Kvasir__V1__PutBlocksStreamRequest *)job->msg;
    if (msg->n_offers > KVC_PUT_WINDOW_VALUES)
        return kvci_refuse(job, "more offers than the window of 32 values");
    kvc_put_offer *offers = kvc_arena_alloc(job->arena, msg->n_offers * sizeof(*offers));
    if (offers == NULL)
        return kvci_no_memory(job);
    for (size_t i = 0; i < msg->n_offers; i++) {
        kvc_status status = get_offer(job, msg->offers[i], &offers[i]);
        if (status != KVC_OK)
            return status;
    }
    req->u.put_stream.n_offers = (uint32_t)msg->n_offers;
    req->u.put_stream.offers = offers;
    req->u.put_stream.value = msg->value;
    return KVC_OK;
}

kvc_status kvci_put_put_blocks_stream_reply(const kvc_reply *reply, const kvci_out *out)
{
    uint32_t n = reply->u.put_stream.n_answers;
    if (n > 2 * KVC_PUT_WINDOW_VALUES)
        return KVC_INVALID;
    Kvasir__V1__PutAnswer *answers = kvc_arena_alloc(out->arena, n * sizeof(*answers));
    Kvasir__V1__PutAnswer **list = kvc_arena_alloc(out->arena, n * sizeof(*list));
    if (answers == NULL || list == NULL)
        return KVC_NO_MEMORY;
    for (uint32_t i = 0; i < n; i++) {
        const kvc_put_answer *answer = &reply->u.put_stream.answers[i];
        answers[i] = (Kvasir__V1__PutAnswer)KVASIR__V1__PUT_ANSWER__INIT;
        answers[i].value = answer->value;
        answers[i].send = answer->send;
        answers[i].retry_after_ms = answer->retry_after_ms;
        answers[i].ttl_ms = answer->ttl_ms;
        kvc_status status = kvci_put_status(answer->status, &answers[i].status);
        if (status != KVC_OK)
            return status;
        list[i] = &answers[i];
    }
    Kvasir__V1__PutBlocksStreamReply msg = KVASIR__V1__PUT_BLOCKS_STREAM_REPLY__INIT;
    msg.n_answers = n;
    msg.answers = list;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_get_put_blocks_stream_reply(kvci_job *job, kvc_reply *reply)
{
    const Kvasir__V1__PutBlocksStreamReply *msg =
        (const Kvasir__V1__PutBlocksStreamReply *)job->msg;
    if (msg->n_answers > 2 * KVC_PUT_WINDOW_VALUES)
        return kvci_refuse(job, "more answers than the window has");
    kvc_put_answer *answers = kvc_arena_alloc(job->arena, msg->n_answers * sizeof(*answers));
    if (answers == NULL)
        return kvci_no_memory(job);
    for (size_t i = 0; i < msg->n_answers; i++) {
        const Kvasir__V1__PutAnswer *in = msg->answers[i];
        if ((int)in->status < 0 || (int)in->status >= KVC_STATUS_COUNT)
            return kvci_refuse(job, "an answer's status is not one of the protocol's");
        answers[i] = (kvc_put_answer){
            .value = in->value,
            .send = in->send != 0,
            .status = (kvc_status) - (int)in->status,
            .retry_after_ms = in->retry_after_ms,
            .ttl_ms = in->ttl_ms,
        };
    }
    reply->u.put_stream.n_answers = (uint32_t)msg->n_answers;
    reply->u.put_stream.answers = answers;
    return KVC_OK;
}
