/*
 * attend.c: the messages of AttendRows.
 *
 * Pure, any thread. A group is a RowGroup with its queries; the rows go through the conversions of
 * FetchRows. Counts, dtypes and ranks are checked here; how long the queries are follows from the
 * parts, so their length is the server's to judge.
 */
#include "wire_internal.h"

static bool is_float(kvc_dtype dtype)
{
    return dtype == KVC_DTYPE_F32 || dtype == KVC_DTYPE_F16 || dtype == KVC_DTYPE_BF16;
}

kvc_status kvci_put_attend_rows_request(const kvc_request *req, const kvci_out *out)
{
    Kvasir__V1__AttendRowsRequest msg = KVASIR__V1__ATTEND_ROWS_REQUEST__INIT;
    Kvasir__V1__RowGroup **rows;
    uint32_t n = req->u.fetch_rows.n_groups;
    kvc_status status = kvci_put_groups(req, out->arena, &rows);
    if (status != KVC_OK)
        return status;
    if (!kvci_data_fits(req->data, req->n_data, req->data_bytes))
        return KVC_INVALID;
    Kvasir__V1__AttendGroup *groups = kvc_arena_alloc(out->arena, n * sizeof(*groups));
    msg.groups = kvc_arena_alloc(out->arena, n * sizeof(*msg.groups));
    if (groups == NULL || msg.groups == NULL)
        return KVC_NO_MEMORY;
    for (uint32_t i = 0; i < n; i++) {
        const kvc_attend_query *query = &req->u.fetch_rows.queries[i];
        groups[i] = (Kvasir__V1__AttendGroup)KVASIR__V1__ATTEND_GROUP__INIT;
        groups[i].rows = rows[i];
        groups[i].n_q = query->n_q;
        groups[i].n_q_heads = query->n_q_heads;
        groups[i].q_dtype = (Kvasir__V1__Dtype)query->q_dtype;
        groups[i].o_dtype = (Kvasir__V1__Dtype)query->o_dtype;
        groups[i].same_q = query->same_q;
        groups[i].n_ranks = query->ranks != NULL ? rows[i]->n_picks : 0;
        groups[i].ranks = (uint32_t *)(uintptr_t)query->ranks;
        groups[i].n_q_positions = query->q_positions != NULL ? query->n_q : 0;
        groups[i].q_positions = (uint32_t *)(uintptr_t)query->q_positions;
        msg.groups[i] = &groups[i];
    }
    msg.n_groups = n;
    return kvci_put(out, &msg.base, req->data_bytes);
}

static bool below_max(const uint32_t *positions, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (positions[i] >= KVC_MAX_RANK)
            return false;
    return true;
}

static kvc_status get_query(kvci_job *job, const Kvasir__V1__AttendGroup *msg, bool first,
                            kvc_attend_query *query_p)
{
    if (msg->n_q == 0 || msg->n_q > KVC_MAX_ATTEND_QUERIES)
        return kvci_refuse(job, "n_q must be 1 to max_attend_queries");
    if (msg->n_q_heads == 0 || msg->n_q_heads > KVC_MAX_ATTEND_HEADS)
        return kvci_refuse(job, "n_q_heads must be 1 to 1024");
    if (!is_float((kvc_dtype)msg->q_dtype) || !is_float((kvc_dtype)msg->o_dtype))
        return kvci_refuse(job, "q_dtype and o_dtype must be F32, F16 or BF16");
    if (msg->same_q && first)
        return kvci_refuse(job, "the first group has no group before it whose queries to take");
    if (msg->n_ranks != 0 && msg->n_ranks != msg->rows->n_picks)
        return kvci_refuse(job, "a group has one rank for each pick, or none");
    if (msg->n_q_positions != 0 && msg->n_q_positions != msg->n_q)
        return kvci_refuse(job, "a group has one position for each query, or none");
    if (!below_max(msg->ranks, msg->n_ranks) || !below_max(msg->q_positions, msg->n_q_positions))
        return kvci_refuse(job, "a rank or position is 2^30 or above");
    *query_p = (kvc_attend_query){
        .n_q = msg->n_q,
        .n_q_heads = msg->n_q_heads,
        .q_dtype = (kvc_dtype)msg->q_dtype,
        .o_dtype = (kvc_dtype)msg->o_dtype,
        .same_q = msg->same_q != 0,
        .ranks = msg->n_ranks != 0 ? msg->ranks : NULL,
        .q_positions = msg->n_q_positions != 0 ? msg->q_positions : NULL,
    };
    return KVC_OK;
}

kvc_status kvci_get_attend_rows_request(kvci_job *job, kvc_request *req)
{
    const Kvasir__V1__AttendRowsRequest *msg = (const Kvasir__V1__AttendRowsRequest *)job->msg;
    size_t n = msg->n_groups;
    if (n > KVC_MAX_GROUPS)
        return kvci_refuse(job, "more groups than max_groups");
    Kvasir__V1__RowGroup **rows = kvc_arena_alloc(job->arena, n * sizeof(Kvasir__V1__RowGroup *));
    kvc_attend_query *queries = kvc_arena_alloc(job->arena, n * sizeof(*queries));
    if (rows == NULL || queries == NULL)
        return kvci_no_memory(job);
    for (size_t i = 0; i < n; i++) {
        if (msg->groups[i]->rows == NULL)
            return kvci_refuse(job, "a group names no rows");
        rows[i] = msg->groups[i]->rows;
        kvc_status status = get_query(job, msg->groups[i], i == 0, &queries[i]);
        if (status != KVC_OK)
            return status;
    }
    req->u.fetch_rows.queries = queries;
    return kvci_get_groups(job, rows, n, req);
}

kvc_status kvci_put_attend_rows_reply(const kvc_reply *reply, const kvci_out *out)
{
    Kvasir__V1__AttendRowsReply msg = KVASIR__V1__ATTEND_ROWS_REPLY__INIT;
    kvc_status status = kvci_put_missing(reply, out->arena, &msg.missing);
    if (status != KVC_OK)
        return status;
    msg.n_missing = reply->u.fetch_rows.n_missing;
    msg.rows_gpu = reply->u.fetch_rows.rows_gpu;
    msg.rows_dram = reply->u.fetch_rows.rows_dram;
    msg.rows_lmdb = reply->u.fetch_rows.rows_lmdb;
    return kvci_put(out, &msg.base, reply->data_bytes);
}

kvc_status kvci_get_attend_rows_reply(kvci_job *job, kvc_reply *reply)
{
    const Kvasir__V1__AttendRowsReply *msg = (const Kvasir__V1__AttendRowsReply *)job->msg;
    reply->u.fetch_rows.rows_gpu = msg->rows_gpu;
    reply->u.fetch_rows.rows_dram = msg->rows_dram;
    reply->u.fetch_rows.rows_lmdb = msg->rows_lmdb;
    return kvci_get_missing(job, msg->missing, msg->n_missing, reply);
}
