/*
 * attend.c: attention beside the data, one message for each op.
 *
 * The queries leave from where the caller has them; the reply is checked whole and copied out on
 * the transport thread that brought it. Handles are filled in and reopened as for a fetch.
 */
#include <string.h>

#include "base/clock.h"
#include "internal.h"

static uint32_t elem_bytes(kvc_dtype dtype)
{
    return dtype == KVC_DTYPE_F32 ? 4 : dtype == KVC_DTYPE_F16 || dtype == KVC_DTYPE_BF16 ? 2 : 0;
}

static uint64_t numbers(const kvc_attend_group *group)
{
    return (uint64_t)group->n_q * group->n_q_heads * group->dim;
}

static size_t lse_bytes(const kvc_attend_group *group)
{
    return (size_t)group->n_q * group->n_q_heads * sizeof(float);
}

static uint64_t results_bytes(const kvc_attend_group *groups, uint32_t n_groups)
{
    uint64_t bytes = 0;
    for (uint32_t g = 0; g < n_groups; g++)
        bytes += numbers(&groups[g]) * elem_bytes(groups[g].o_dtype) + lse_bytes(&groups[g]);
    return bytes;
}

typedef struct totals {
    uint64_t n_picks, q_bytes, out_bytes;
} totals;

static kvc_status check_group(const kvc_client *client, const kvc_attend_group *group, uint32_t g,
                              const kvc_limits *limits)
{
    if (group->context == NULL || group->context->client != client)
        return kvci_fail(KVC_INVALID, "attend: group %u has no context of this client", g);
    if (group->n_q == 0 || group->n_q > limits->max_attend_queries)
        return kvci_fail(KVC_INVALID, "attend: group %u has %u queries, allowed are 1 to %u", g,
                         group->n_q, limits->max_attend_queries);
    if (group->n_q_heads == 0 || group->n_q_heads > KVC_MAX_ATTEND_HEADS || group->dim == 0 ||
        group->dim > limits->max_message_bytes)
        return kvci_fail(KVC_INVALID, "attend: group %u has no heads, or too many or too wide", g);
    if (elem_bytes(group->q_dtype) == 0 || elem_bytes(group->o_dtype) == 0)
        return kvci_fail(KVC_INVALID, "attend: group %u: dtypes must be F32, F16 or BF16", g);
    if ((group->q == NULL && g == 0) || group->o == NULL || group->lse == NULL)
        return kvci_fail(KVC_INVALID, "attend: group %u: q, o or lse is NULL", g);
    return KVC_OK;
}

static kvc_status check(const kvc_client *client, const kvc_attend_group *groups, uint32_t n_groups,
                        const kvc_limits *limits, totals *sum_p)
{
    if (limits->max_attend_queries == 0)
        return kvci_fail(KVC_UNSUPPORTED, "attend: this server does not attend");
    if (n_groups == 0 || n_groups > limits->max_groups)
        return kvci_fail(KVC_INVALID, "attend: %u groups, allowed are 1 to %u", n_groups,
                         limits->max_groups);
    for (uint32_t g = 0; g < n_groups; g++) {
        kvc_status status = check_group(client, &groups[g], g, limits);
        if (status != KVC_OK)
            return status;
        sum_p->n_picks += groups[g].n_picks;
        sum_p->q_bytes +=
            groups[g].q != NULL ? numbers(&groups[g]) * elem_bytes(groups[g].q_dtype) : 0;
    }
    sum_p->out_bytes = results_bytes(groups, n_groups);
    if (sum_p->n_picks > limits->max_picks)
        return kvci_fail(KVC_INVALID, "attend: %llu picks, allowed are %u",
                         (unsigned long long)sum_p->n_picks, limits->max_picks);
    if (sum_p->q_bytes > limits->max_message_bytes || sum_p->out_bytes > limits->max_message_bytes)
        return kvci_fail(KVC_INVALID, "attend: queries or results above %u bytes",
                         limits->max_message_bytes);
    return KVC_OK;
}

static kvc_status attend_take(kvci_msg *msg, const kvc_reply *reply, const char **why_p)
{
    kvci_call *call = msg->call;
    const kvc_attend_group *groups = call->u.attend.groups;
    uint64_t rows_bytes, bytes = results_bytes(groups, msg->n_segs);
    kvc_status status = kvci_check_missing(msg->segs, msg->n_segs, reply, &rows_bytes, why_p);
    if (status == KVC_OK &&
        (bytes != reply->data_bytes || bytes != kvci_iov_bytes(reply->data, reply->n_data))) {
        *why_p = "the results' length does not fit the request (is dim the part's?)";
        status = KVC_PROTOCOL;
    }
    if (status != KVC_OK)
        return status;
    kvci_cursor cur = {.iov = reply->data};
    for (uint32_t g = 0; g < msg->n_segs; g++) {
        kvci_copy_out(&cur, groups[g].o, numbers(&groups[g]) * elem_bytes(groups[g].o_dtype));
        kvci_copy_out(&cur, (uint8_t *)groups[g].lse, lse_bytes(&groups[g]));
    }
    if (call->u.attend.status != NULL)
        kvci_put_statuses(reply, call->u.attend.status, msg->n_items);
    call->u.attend.info = (kvc_fetch_info){
        .rows_gpu = reply->u.fetch_rows.rows_gpu,
        .rows_dram = reply->u.fetch_rows.rows_dram,
        .rows_lmdb = reply->u.fetch_rows.rows_lmdb,
        .rows_missing = reply->u.fetch_rows.n_missing,
    };
    return KVC_OK;
}

static void attend_fail(kvci_msg *msg, kvc_status status)
{
    if (msg->call->u.attend.status != NULL)
        memset(msg->call->u.attend.status, (int8_t)status, msg->n_items);
}

static void attend_finish(kvci_call *call)
{
    const kvci_msg *msg = &call->msgs[0];
    const kvc_attend_group *groups = call->u.attend.groups;
    uint32_t n_rows = msg->n_items - call->u.attend.info.rows_missing;
    if (call->status == KVC_OK && msg->sends == 1)
        kvci_way_learn(call->client, true, (uint64_t)n_rows * groups[0].row_bytes,
                       msg->req.data_bytes + results_bytes(groups, msg->n_segs),
                       kvc_now_ns() - call->began_ns);
    call->u.attend.info.requests = call->msgs[0].sends;
    if (call->u.attend.info_p != NULL)
        *call->u.attend.info_p = call->u.attend.info;
}

static const kvci_kind attend_kind = {
    .name = "attend",
    .again_ends = true,
    .take = attend_take,
    .fail = attend_fail,
    .finish = attend_finish,
};

static void fill(kvci_call *call, const kvc_attend_group *groups, uint32_t n_groups)
{
    kvci_msg *msg = &call->msgs[0];
    kvc_attend_group *own = kvci_carve(call, n_groups, sizeof(*own));
    kvc_attend_query *queries = kvci_carve(call, n_groups, sizeof(*queries));
    struct iovec *data = kvci_carve(call, n_groups, sizeof(*data));
    msg->segs = kvci_carve(call, n_groups, sizeof(*msg->segs));
    msg->row_groups = kvci_carve(call, n_groups, sizeof(*msg->row_groups));
    msg->n_segs = n_groups;
    msg->req.method = KVC_ATTEND_ROWS;
    for (uint32_t g = 0; g < n_groups; g++) {
        const kvc_attend_group *group = &groups[g];
        own[g] = *group;
        msg->segs[g] = (kvci_seg){.context = group->context, .n = group->n_picks};
        msg->row_groups[g] =
            (kvc_row_group){.part = group->part, .n_picks = group->n_picks, .picks = group->picks};
        queries[g] = (kvc_attend_query){.n_q = group->n_q,
                                        .n_q_heads = group->n_q_heads,
                                        .q_dtype = group->q_dtype,
                                        .o_dtype = group->o_dtype,
                                        .same_q = group->q == NULL,
                                        .ranks = group->n_picks != 0 ? group->ranks : NULL,
                                        .q_positions = group->q_positions};
        msg->n_items += group->n_picks;
        if (group->q == NULL)
            continue;
        size_t len_bytes = (size_t)numbers(group) * elem_bytes(group->q_dtype);
        data[msg->req.n_data++] = (struct iovec){(void *)(uintptr_t)group->q, len_bytes};
        msg->req.data_bytes += len_bytes;
    }
    msg->req.data = data;
    msg->req.u.fetch_rows.n_groups = n_groups;
    msg->req.u.fetch_rows.groups = msg->row_groups;
    msg->req.u.fetch_rows.queries = queries;
    call->u.attend.groups = own;
}

kvc_status kvc_attend(kvc_client *client, const kvc_attend_group *groups, uint32_t n_groups,
                      int8_t *status, kvc_fetch_info *info_p, uint64_t deadline_ns, kvc_op *op)
{
    totals sum = {0};
    kvc_limits limits = kvci_limits(client);
    kvc_status checked = check(client, groups, n_groups, &limits, &sum);
    if (checked != KVC_OK)
        return checked;
    size_t extra_bytes = kvci_carve_bytes(n_groups, sizeof(kvc_attend_group)) +
                         kvci_carve_bytes(n_groups, sizeof(kvc_attend_query)) +
                         kvci_carve_bytes(n_groups, sizeof(struct iovec)) +
                         kvci_carve_bytes(n_groups, sizeof(kvci_seg)) +
                         kvci_carve_bytes(n_groups, sizeof(kvc_row_group));
    kvci_call *call = kvci_call_new(client, &attend_kind, 1, extra_bytes, deadline_ns);
    if (call == NULL)
        return kvci_fail(KVC_NO_MEMORY, "attend: no memory");
    call->u.attend.status = status;
    call->u.attend.info_p = info_p;
    fill(call, groups, n_groups);
    return kvci_call_start(call, op);
}
