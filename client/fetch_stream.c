/*
 * fetch_stream.c: rows that come as the messages of a stream.
 *
 * The planning is that of fetch.c, without its limit on bytes: one request for up to max_picks
 * rows. Each message answers the next picks and is checked and scattered by itself, on the
 * transport thread that brought it, unless the transport has put its rows into their slots. A
 * repeated attempt writes the same rows again.
 */
#include <string.h>

#include "internal.h"

/* The segments of the next n picks into msg->window; gives how many. */
static uint32_t window(kvci_msg *msg, uint32_t n)
{
    uint32_t n_window = 0, skip = msg->n_taken;
    for (uint32_t s = 0; s < msg->n_segs && n > 0; s++) {
        const kvci_seg *seg = &msg->segs[s];
        if (skip >= seg->n) {
            skip -= seg->n;
            continue;
        }
        kvci_seg *part = &msg->window[n_window++];
        *part = *seg;
        part->slots = seg->slots != NULL ? seg->slots + skip : NULL;
        part->first_slot = seg->first_slot + skip;
        part->n = seg->n - skip < n ? seg->n - skip : n;
        n -= part->n;
        skip = 0;
    }
    return n_window;
}

static kvc_status rows_message(kvci_msg *msg, const kvc_reply *reply, const char **why_p)
{
    kvci_call *call = msg->call;
    kvc_reply own = *reply;
    uint32_t n = reply->u.fetch_rows.n_picks;
    if (n == 0 || n > msg->n_items - msg->n_taken) {
        *why_p = "a message answers no picks, or more than were asked for";
        return KVC_PROTOCOL;
    }
    /* The list lies in the transfer's arena. */
    kvc_missing_row *missing = (kvc_missing_row *)(uintptr_t)reply->u.fetch_rows.missing;
    for (uint32_t i = 0; i < own.u.fetch_rows.n_missing; i++) {
        if (missing[i].index < msg->n_taken) {
            *why_p = "a missing row's index is that of an earlier message";
            return KVC_PROTOCOL;
        }
        missing[i].index -= msg->n_taken;
    }
    int8_t *status = call->u.fetch.status;
    if (status != NULL)
        status += msg->first + msg->n_taken;
    uint32_t n_window = window(msg, n);
    kvc_status taken =
        msg->xfer.placed
            ? kvci_take_placed(call->region, msg->window, n_window, &own, status, why_p)
            : kvci_scatter(call->region, msg->window, n_window, &own, status, why_p);
    if (taken != KVC_OK)
        return taken;
    if (msg->n_taken == 0)
        msg->info = (kvc_fetch_info){0};
    msg->info.rows_gpu += reply->u.fetch_rows.rows_gpu;
    msg->info.rows_dram += reply->u.fetch_rows.rows_dram;
    msg->info.rows_lmdb += reply->u.fetch_rows.rows_lmdb;
    msg->info.rows_missing += reply->u.fetch_rows.n_missing;
    msg->n_taken += n;
    return KVC_OK;
}

static kvc_status rows_end(kvci_msg *msg, const kvc_reply *reply, const char **why_p)
{
    (void)reply;
    *why_p = "the stream ended before its last row";
    return msg->n_taken == msg->n_items ? KVC_OK : KVC_PROTOCOL;
}

static void rows_fail(kvci_msg *msg, kvc_status status)
{
    if (msg->call->u.fetch.status != NULL)
        memset(msg->call->u.fetch.status + msg->first, (int8_t)status, msg->n_items);
}

static void rows_finish(kvci_call *call)
{
    kvc_fetch_info *info = &call->u.fetch.info;
    kvci_fetch_settle(call);
    for (uint32_t i = 0; i < call->n_msgs; i++) {
        const kvci_msg *msg = &call->msgs[i];
        info->rows_gpu += msg->info.rows_gpu;
        info->rows_dram += msg->info.rows_dram;
        info->rows_lmdb += msg->info.rows_lmdb;
        info->rows_missing += msg->info.rows_missing;
        info->requests += msg->sends;
    }
    if (call->u.fetch.info_p != NULL)
        *call->u.fetch.info_p = *info;
}

const kvci_kind kvci_fetch_stream_kind = {
    .name = "fetch stream",
    .stop_on_error = true,
    .message = rows_message,
    .take = rows_end,
    .fail = rows_fail,
    .finish = rows_finish,
};
