/*
 * streams.c: the messages of the methods whose replies stream.
 *
 * Pure, any thread. A message of a stream is checked on its own: its counts and lengths within the
 * protocol's limits, the lengths of its values against its payload.
 */
#include "wire_internal.h"

kvc_status kvci_put_fetch_rows_stream_request(const kvc_request *req, const kvci_out *out)
{
    Kvasir__V1__FetchRowsStreamRequest msg = KVASIR__V1__FETCH_ROWS_STREAM_REQUEST__INIT;
    kvc_status status = kvci_put_groups(req, out->arena, &msg.groups);
    if (status != KVC_OK)
        return status;
    msg.n_groups = req->u.fetch_rows.n_groups;
    return kvci_pack(&msg.base, 0, out->arena, out->head_p, out->head_bytes_p);
}

kvc_status kvci_get_fetch_rows_stream_request(kvci_job *job, kvc_request *req)
{
    const Kvasir__V1__FetchRowsStreamRequest *msg =
        (const Kvasir__V1__FetchRowsStreamRequest *)job->msg;
    return kvci_get_groups(job, msg->groups, msg->n_groups, req);
}

kvc_status kvci_put_fetch_rows_stream_reply(const kvc_reply *reply, const kvci_out *out)
{
    Kvasir__V1__FetchRowsStreamReply msg = KVASIR__V1__FETCH_ROWS_STREAM_REPLY__INIT;
    kvc_status status = kvci_put_missing(reply, out->arena, &msg.missing);
    if (status != KVC_OK)
        return status;
    if (reply->u.fetch_rows.n_picks > KVC_MAX_PICKS)
        return KVC_INVALID;
    msg.n_missing = reply->u.fetch_rows.n_missing;
    msg.n_picks = reply->u.fetch_rows.n_picks;
    msg.rows_gpu = reply->u.fetch_rows.rows_gpu;
    msg.rows_dram = reply->u.fetch_rows.rows_dram;
    msg.rows_lmdb = reply->u.fetch_rows.rows_lmdb;
    return kvci_pack(&msg.base, reply->data_bytes, out->arena, out->head_p, out->head_bytes_p);
}

kvc_status kvci_get_fetch_rows_stream_reply(kvci_job *job, kvc_reply *reply)
{
    const Kvasir__V1__FetchRowsStreamReply *msg =
        (const Kvasir__V1__FetchRowsStreamReply *)job->msg;
    if (msg->n_picks > KVC_MAX_PICKS)
        return kvci_refuse(job, "a message answers more picks than max_picks");
    reply->u.fetch_rows.n_picks = msg->n_picks;
    reply->u.fetch_rows.rows_gpu = msg->rows_gpu;
    reply->u.fetch_rows.rows_dram = msg->rows_dram;
    reply->u.fetch_rows.rows_lmdb = msg->rows_lmdb;
    return kvci_get_missing(job, msg->missing, msg->n_missing, reply);
}

kvc_status kvci_put_fetch_blocks_request(const kvc_request *req, const kvci_out *out)
{
    Kvasir__V1__FetchBlocksRequest msg = KVASIR__V1__FETCH_BLOCKS_REQUEST__INIT;
    if (req->u.fetch_blocks.n_digests > KVC_MAX_DIGESTS ||
        req->u.fetch_blocks.n_parts > KVC_MAX_PARTS)
        return KVC_INVALID;
    msg.schema = kvci_put_digest(&req->u.fetch_blocks.schema);
    msg.digests = kvci_put_digests(req->u.fetch_blocks.digests, req->u.fetch_blocks.n_digests);
    msg.n_parts = req->u.fetch_blocks.n_parts;
    msg.parts = (uint32_t *)(uintptr_t)req->u.fetch_blocks.parts;
    return kvci_pack(&msg.base, 0, out->arena, out->head_p, out->head_bytes_p);
}

kvc_status kvci_get_fetch_blocks_request(kvci_job *job, kvc_request *req)
{
    const Kvasir__V1__FetchBlocksRequest *msg = (const Kvasir__V1__FetchBlocksRequest *)job->msg;
    if (kvci_get_digest(&msg->schema, &req->u.fetch_blocks.schema) != KVC_OK)
        return kvci_refuse(job, kvci_bad_schema);
    if (kvci_get_digests(&msg->digests, &req->u.fetch_blocks.n_digests,
                         &req->u.fetch_blocks.digests) != KVC_OK)
        return kvci_refuse(job, kvci_bad_digests);
    if (msg->n_parts > KVC_MAX_PARTS)
        return kvci_refuse(job, "more parts than a schema can have");
    req->u.fetch_blocks.n_parts = (uint32_t)msg->n_parts;
    req->u.fetch_blocks.parts = msg->parts;
    return KVC_OK;
}

kvc_status kvci_put_fetch_blocks_reply(const kvc_reply *reply, const kvci_out *out)
{
    uint32_t n = reply->u.fetch_blocks.n_values;
    if (n > KVC_MAX_BATCH_VALUES || !kvci_data_fits(reply->data, reply->n_data, reply->data_bytes))
        return KVC_INVALID;
    Kvasir__V1__BlockValue *values = kvc_arena_alloc(out->arena, n * sizeof(*values));
    Kvasir__V1__BlockValue **list = kvc_arena_alloc(out->arena, n * sizeof(*list));
    if (values == NULL || list == NULL)
        return KVC_NO_MEMORY;
    for (uint32_t i = 0; i < n; i++) {
        const kvc_block_value *value = &reply->u.fetch_blocks.values[i];
        values[i] = (Kvasir__V1__BlockValue)KVASIR__V1__BLOCK_VALUE__INIT;
        values[i].block = value->block;
        values[i].part = value->part;
        values[i].tier = (Kvasir__V1__Tier)value->tier;
        values[i].len_bytes = value->len_bytes;
        values[i].total_bytes = value->whole.total_bytes;
        values[i].sum = value->whole.sum;
        kvc_status status = kvci_put_status(value->status, &values[i].status);
        if (status != KVC_OK)
            return status;
        list[i] = &values[i];
    }
    Kvasir__V1__FetchBlocksReply msg = KVASIR__V1__FETCH_BLOCKS_REPLY__INIT;
    msg.n_values = n;
    msg.values = list;
    return kvci_pack(&msg.base, reply->data_bytes, out->arena, out->head_p, out->head_bytes_p);
}

/* One value, and what it adds to the payload. */
static kvc_status get_value(kvci_job *job, const Kvasir__V1__BlockValue *msg,
                            kvc_block_value *value, uint64_t *data_bytes)
{
    if (msg->block >= KVC_MAX_DIGESTS || msg->part > KVC_MAX_PART_ID)
        return kvci_refuse(job, "a value's block or part is beyond the protocol's limits");
    if ((int)msg->status < 0 || (int)msg->status >= KVC_STATUS_COUNT)
        return kvci_refuse(job, "a value's status is not one of the protocol's");
    if ((int)msg->tier < 0 || (int)msg->tier > KVC_TIER_LMDB)
        return kvci_refuse(job, "a value's tier is not one of the protocol's");
    bool may_be_empty = msg->sum != 0 && msg->total_bytes == 0;
    if ((int)msg->status == 0 ? msg->len_bytes == 0 && !may_be_empty : msg->len_bytes > 0)
        return kvci_refuse(job, "a value has bytes if and only if its status is OK");
    *value = (kvc_block_value){
        .block = msg->block,
        .part = msg->part,
        .status = (kvc_status) - (int)msg->status,
        .tier = (kvc_tier)msg->tier,
        .len_bytes = msg->len_bytes,
        .whole = {msg->total_bytes, msg->sum},
    };
    *data_bytes += msg->len_bytes;
    return KVC_OK;
}

kvc_status kvci_get_fetch_blocks_reply(kvci_job *job, kvc_reply *reply)
{
    const Kvasir__V1__FetchBlocksReply *msg = (const Kvasir__V1__FetchBlocksReply *)job->msg;
    if (msg->n_values > KVC_MAX_BATCH_VALUES)
        return kvci_refuse(job, "more values than max_batch_values");
    kvc_block_value *values = kvc_arena_alloc(job->arena, msg->n_values * sizeof(*values));
    if (values == NULL)
        return kvci_no_memory(job);
    uint64_t data_bytes = 0;
    for (size_t i = 0; i < msg->n_values; i++) {
        kvc_status status = get_value(job, msg->values[i], &values[i], &data_bytes);
        if (status != KVC_OK)
            return status;
    }
    if (data_bytes != job->data_bytes)
        return kvci_refuse(job, "the values' lengths do not sum up to the data's");
    reply->u.fetch_blocks.n_values = (uint32_t)msg->n_values;
    reply->u.fetch_blocks.values = values;
    return KVC_OK;
}
