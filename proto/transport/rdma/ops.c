/*
 * ops.c: transfers at the client: begun, told of what came, ended.
 *
 * Deliveries run on the loop's thread with the mutex free. Invariant: a landing or staging buffer
 * goes back to the pool only once the server's END has come or its link is gone, whatever the
 * caller has been told.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/metrics.h"
#include "client.h"
#include "wire/wire.h"

/* ---- tables ---------------------------------------------------------------------------------- */

static kvtr_rop **bucket_of(kvtr_link *link, uint64_t id)
{
    return (kvtr_rop **)&link->calls[id % KVTI_CALL_BUCKETS];
}

static kvtr_rop *find_op(kvtr_link *link, uint64_t id)
{
    kvtr_rop *op = *bucket_of(link, id);
    while (op != NULL && op->id != id)
        op = op->same;
    return op;
}

void kvtr_op_drop_memory(kvtr_rop *op)
{
    if (op->landing != NULL)
        op->conn->n_landings--;
    kvtr_buf_put(op->landing);
    kvtr_buf_put(op->staging);
    op->landing = op->staging = NULL;
}

void kvtr_op_keep(kvtr_rop *op, kvtr_link *link)
{
    op->link = link;
    op->same = *bucket_of(link, op->id);
    *bucket_of(link, op->id) = op;
}

void kvtr_op_forget(kvtr_rop *op)
{
    kvtr_rop **at = bucket_of(op->link, op->id);
    while (*at != op)
        at = &(*at)->same;
    *at = op->same;
    if (op->placing != NULL)
        kvtr_range_leave(op->link->domain, op->placing);
    op->placing = NULL;
    op->link = NULL;
}

void kvtr_op_leave(kvtr_rop *op)
{
    kvtr_channel *channel = op->channel;
    kvtr_rop **at = &channel->first;
    while (*at != op)
        at = &(*at)->waits;
    *at = op->waits;
    if (op->waits == NULL)
        channel->last = at;
    op->waiting = false;
}

void kvtr_list_op(kvtr_rop *op)
{
    kvt_conn *conn = op->conn;
    if (op->listed || op->xfer == NULL)
        return;
    op->listed = true;
    op->told = NULL;
    *conn->told_last = op;
    conn->told_last = &op->told;
    kvtr_loop_wake(&conn->loop);
}

void kvtr_end_op(kvtr_rop *op, kvc_status status, const char *detail)
{
    if (op->ended)
        return;
    op->ended = true;
    op->status = status;
    (void)snprintf(op->detail, sizeof(op->detail), "%s", detail);
    if (op->pushing) {
        op->pushing = false;
        op->pushed_due = true;
        op->pushed_ok = false;
    }
    if (op->waiting)
        kvtr_op_leave(op);
    else if (op->link != NULL && op->link->state == KVTI_LINK_UP)
        kvtr_send_plain(op->link, KVC_FRAME_CANCEL, op->id);
    if (op->link == NULL || op->placing == NULL) {
        kvtr_list_op(op);
        return;
    }
    /* The server may write to its caller's memory until it says that it is done. */
    kvt_conn *conn = op->conn;
    op->let_go_ns = kvc_deadline_ns(op->patience_ns);
    if (conn->next_deadline_ns == 0 || op->let_go_ns < conn->next_deadline_ns)
        conn->next_deadline_ns = op->let_go_ns;
    kvtr_loop_wake(&conn->loop);
}

void kvtr_fail_waiting(kvtr_channel *channel, kvc_status status, const char *why)
{
    while (channel->first != NULL)
        kvtr_end_op(channel->first, status, why);
}

/* With the mutex held: a buffer may have come back. */
static void begin_all(kvt_conn *conn)
{
    for (uint32_t i = 0; i < conn->n_channels; i++)
        kvtr_begin_ops(&conn->channels[i], true);
}

/* ---- what comes ------------------------------------------------------------------------------ */

/* Where the payload lies, and whether it and the rest are what was summed: CORRUPT. */
static kvc_status find_data(const kvtr_rop *op, const kvc_frame *frame, uint8_t *body,
                            uint8_t **data_p, const char **why_p)
{
    bool elsewhere = (frame->flags & KVC_FRAME_ELSEWHERE) != 0;
    bool summed = (frame->flags & KVTI_SUMMED) != 0;
    *why_p = "a reply whose payload is nowhere";
    if (elsewhere && (op->landing == NULL || frame->data_bytes > op->conn->max_message_bytes))
        return KVC_PROTOCOL;
    *data_p = elsewhere ? op->landing->bytes : body + frame->head_bytes + frame->detail_bytes;
    *why_p = "a reply without the sum that was asked for";
    if (op->conn->sums && !summed)
        return KVC_CORRUPT;
    struct iovec piece = {*data_p, frame->data_bytes};
    return kvtr_check_sum(frame, body, &piece, 1, why_p);
}

/* The same for rows in their places [n]. */
static kvc_status check_places(const kvtr_rop *op, const kvc_frame *frame, const uint8_t *body,
                               const kvtr_place *places, uint32_t n, const char **why_p)
{
    bool summed = (frame->flags & KVTI_SUMMED) != 0;
    *why_p = summed ? "a sum that was not asked for" : "a reply without the sum that was asked for";
    if (!op->conn->sums) /* where the places may be a GPU's, which nobody here can sum */
        return summed ? KVC_PROTOCOL : KVC_OK;
    if (!summed)
        return KVC_CORRUPT;
    *why_p = "out of memory";
    struct iovec *pieces = calloc(n + 1u, sizeof(*pieces));
    if (pieces == NULL)
        return KVC_NO_MEMORY;
    for (uint32_t i = 0; i < n; i++)
        pieces[i] = (struct iovec){(void *)(uintptr_t)places[i].addr, places[i].len_bytes};
    kvc_status status = kvtr_check_sum(frame, body, pieces, n, why_p);
    free(pieces);
    return status;
}

/* The header of rows in their places, which is not summed yet: what does not decode has changed
 * under way, where there are sums. */
static kvc_status decode_placed(const kvtr_rop *op, kvt_xfer *xfer, const kvc_frame *frame,
                                uint8_t *body, const char **why_p)
{
    /* A payload goes with it, of which the decoder looks at the length alone: any place will do. */
    struct iovec pieces[2] = {{body, frame->head_bytes},
                              {(void *)(uintptr_t)op->runs[0].addr, frame->data_bytes}};
    kvc_status status =
        kvc_wire_decode_reply(xfer->req->method, pieces, 2, &xfer->arena, &xfer->reply, why_p);
    if (status == KVC_OK || status == KVC_NO_MEMORY)
        return status;
    if (!op->conn->sums)
        return KVC_PROTOCOL;
    KVC_COUNT(rdma_sums_wrong);
    return KVC_CORRUPT;
}

/* Rows that the server has written to their places: which are missing is in the header. */
static kvc_status take_placed(const kvtr_rop *op, kvt_xfer *xfer, const kvc_frame *frame,
                              uint8_t *body, const char **why_p)
{
    uint32_t n;
    kvtr_place *places;
    *why_p = "rows that were written to no place of theirs";
    if ((op->frame.flags & KVTI_PLACED) == 0 || (frame->flags & KVC_FRAME_ELSEWHERE) == 0)
        return KVC_PROTOCOL;
    kvc_status status = decode_placed(op, xfer, frame, body, why_p);
    if (status != KVC_OK)
        return status;
    status = kvtr_reply_cut(xfer->req->method, &xfer->reply, op->n_items, frame->data_bytes,
                            op->runs, op->n_runs, &places, &n);
    *why_p =
        status == KVC_NO_MEMORY
            ? "out of memory"
            : "the length of rows or values does not fit their places (is row_bytes the part's?)";
    if (status != KVC_OK)
        return status == KVC_NO_MEMORY ? status : KVC_PROTOCOL;
    status = check_places(op, frame, body, places, n, why_p);
    free(places);
    xfer->reply.data = NULL;
    xfer->reply.n_data = 0;
    xfer->placed = status == KVC_OK;
    if (xfer->placed)
        KVC_COUNT_N(rdma_placed_bytes, frame->data_bytes);
    return status;
}

/* A message where it lies: header in body, payload behind it, in the landing or in its places. */
static kvc_status take_message(kvtr_rop *op, kvt_xfer *xfer, const kvc_frame *frame, uint8_t *body,
                               const char **why_p)
{
    uint8_t *data;
    if ((frame->flags & KVTI_PLACED) != 0)
        return take_placed(op, xfer, frame, body, why_p);
    kvc_status status = find_data(op, frame, body, &data, why_p);
    if (status != KVC_OK)
        return status;
    struct iovec pieces[2] = {{body, frame->head_bytes}, {data, frame->data_bytes}};
    status = kvc_wire_decode_reply(xfer->req->method, pieces, 2, &xfer->arena, &xfer->reply, why_p);
    return status == KVC_INVALID ? KVC_PROTOCOL : status;
}

/* With the mutex held: op is the thread's alone from here. */
static void unlist_op(kvtr_rop *op)
{
    kvt_conn *conn = op->conn;
    if (op->prev != NULL)
        op->prev->next = op->next;
    else
        conn->ops = op->next;
    if (op->next != NULL)
        op->next->prev = op->prev;
    op->xfer->priv = NULL;
}

void kvtr_op_free(kvtr_rop *op)
{
    kvc_arena_reset(&op->arena);
    free(op->runs);
    free(op);
}

/* The last that is heard of it. With the mutex free; the op is out of the link's table, or stays
 * there as the server's. */
static void deliver_end(kvtr_rop *op, kvt_xfer *xfer, kvc_status status, const char *detail)
{
    kvt_conn *conn = op->conn;
    if (op->pushed_due)
        xfer->pushed(xfer, op->pushed_ok);
    xfer->status = status;
    if (status != KVC_OK)
        (void)snprintf(xfer->detail, sizeof(xfer->detail), "%s", detail);
    xfer->done(xfer);
    kvc_mutex_lock(&conn->loop.mutex);
    op->xfer = NULL;
    bool over = op->link == NULL;
    if (over)
        kvtr_op_drop_memory(op);
    conn->n_ops--;
    begin_all(conn);
    kvc_cond_broadcast(&conn->loop.changed);
    kvc_mutex_unlock(&conn->loop.mutex);
    if (over)
        kvtr_op_free(op);
}

static bool on_end(kvtr_rop *op, const kvc_frame *frame, uint8_t *body)
{
    kvt_conn *conn = op->conn;
    kvt_xfer *xfer = op->xfer;
    char text[KVC_FRAME_DETAIL_BYTES + 1];
    const char *detail = text, *why;
    uint8_t *unused;
    kvc_status status = frame->status;
    kvc_mutex_lock(&conn->loop.mutex);
    kvtr_op_forget(op);
    bool late = op->ended; /* its caller hears, or has heard, something else */
    if (late && xfer == NULL) {
        kvtr_op_drop_memory(op);
        begin_all(conn);
    } else if (late) {
        kvtr_list_op(op); /* where it was held back until now */
    }
    if (!late) {
        op->ended = true;
        op->pushed_due = op->pushing; /* a message that the server did not take */
        op->pushing = false;
        unlist_op(op);
    }
    kvc_mutex_unlock(&conn->loop.mutex);
    if (late) {
        if (xfer == NULL)
            kvtr_op_free(op);
        return true;
    }
    memcpy(text, body + frame->head_bytes, frame->detail_bytes);
    text[frame->detail_bytes] = '\0';
    xfer->reply = (kvc_reply){.method = xfer->req->method};
    xfer->retry_after_ms = frame->retry_after_ms;
    if (status == KVC_OK && xfer->message == NULL) {
        status = take_message(op, xfer, frame, body, &detail);
    } else if (find_data(op, frame, body, &unused, &why) != KVC_OK) {
        status = KVC_CORRUPT;
        detail = why;
    }
    deliver_end(op, xfer, status, detail);
    return true;
}

/* One message of a stream. Then its sender may send the next; a bad message ends the transfer. */
static bool on_message(kvtr_rop *op, const kvc_frame *frame, uint8_t *body)
{
    kvt_conn *conn = op->conn;
    const char *why;
    kvc_mutex_lock(&conn->loop.mutex);
    kvt_xfer *xfer = op->ended ? NULL : op->xfer;
    kvc_mutex_unlock(&conn->loop.mutex);
    if (xfer == NULL)
        return true;
    if (xfer->message == NULL)
        return false;
    xfer->placed = false;
    kvc_status status = take_message(op, xfer, frame, body, &why);
    if (status == KVC_OK) {
        op->n_items += kvtr_reply_items(xfer->req->method, &xfer->reply);
        xfer->message(xfer);
    }
    kvc_arena_reset(&xfer->arena);
    kvc_mutex_lock(&conn->loop.mutex);
    if (status != KVC_OK)
        kvtr_end_op(op, status, why);
    else if (!op->ended && op->link != NULL && !op->link->broken)
        kvtr_send_plain(op->link, KVC_FRAME_CREDIT, op->id);
    kvc_mutex_unlock(&conn->loop.mutex);
    return true;
}

/* The server has taken the message that was pushed. */
static void on_credit(kvtr_rop *op)
{
    kvt_conn *conn = op->conn;
    kvc_mutex_lock(&conn->loop.mutex);
    bool due = op->pushing && !op->ended;
    if (due) {
        op->pushing = false;
        kvtr_buf_put(op->staging);
        op->staging = NULL;
    }
    kvc_mutex_unlock(&conn->loop.mutex);
    if (due)
        op->xfer->pushed(op->xfer, true);
}

/* Bodies for those who hear of the end from elsewhere are not kept. */
bool kvtr_client_begin(kvtr_link *link, const kvc_frame *frame, bool *keep_p)
{
    kvc_mutex_lock(&link->loop->mutex);
    kvtr_rop *op = find_op(link, frame->call);
    *keep_p = op != NULL && !op->ended;
    kvc_mutex_unlock(&link->loop->mutex);
    return op != NULL || frame->kind == KVC_FRAME_GOAWAY || frame->kind == KVC_FRAME_CREDIT;
}

bool kvtr_client_frame(kvtr_link *link, const kvc_frame *frame, uint8_t *body)
{
    kvc_mutex_lock(&link->loop->mutex);
    kvtr_rop *op = find_op(link, frame->call); /* only this thread takes one out */
    kvc_mutex_unlock(&link->loop->mutex);
    if (frame->kind == KVC_FRAME_GOAWAY || (op == NULL && frame->kind == KVC_FRAME_CREDIT))
        return true;
    if (op == NULL)
        return false;
    switch (frame->kind) {
    case KVC_FRAME_END:
        return on_end(op, frame, body);
    case KVC_FRAME_MESSAGE:
        return on_message(op, frame, body);
    case KVC_FRAME_CREDIT:
        on_credit(op);
        return true;
    default:
        return false;
    }
}

/* ---- ends ------------------------------------------------------------------------------------ */

void kvtr_client_down(kvtr_link *link, kvtr_read *reads)
{
    kvt_conn *conn = (kvt_conn *)link->loop;
    kvtr_channel *channel = link->owner;
    kvtr_rop *over = NULL;
    KVC_ASSERT(reads == NULL);
    kvc_mutex_lock(&link->loop->mutex);
    kvc_status status = conn->closed ? KVC_CANCELLED : KVC_UNAVAILABLE;
    const char *why = link->why == NULL ? "the connection was closed" : link->why;
    for (uint32_t b = 0; b < KVTI_CALL_BUCKETS; b++) {
        for (kvtr_rop *op; (op = link->calls[b]) != NULL;) {
            kvtr_op_forget(op);
            kvtr_end_op(op, status, why);
            kvtr_list_op(op); /* where it had ended, and was held back until now */
            if (op->xfer == NULL) {
                kvtr_op_drop_memory(op);
                op->told = over;
                over = op;
            }
        }
    }
    if (channel != NULL && channel->link == link) {
        channel->link = NULL;
        kvtr_fail_waiting(channel, status, why);
    }
    kvc_mutex_unlock(&link->loop->mutex);
    while (over != NULL) {
        kvtr_rop *op = over;
        over = op->told;
        kvtr_op_free(op);
    }
}

/* With the mutex held: only without its queue pair can the server write no more. */
static void give_up(kvtr_link *link)
{
    if (link->broken)
        return;
    KVC_COUNT(rdma_let_go_late);
    kvtr_link_break(link, "the server did not let go of a caller's memory");
}

/* With the mutex held: ends what is late. */
static void end_late(kvt_conn *conn)
{
    uint64_t now_ns = kvc_now_ns(), first_ns = 0;
    if (conn->next_deadline_ns == 0 || now_ns < conn->next_deadline_ns)
        return;
    for (kvtr_rop *op = conn->ops; op != NULL; op = op->next) {
        if (!op->ended && op->deadline_ns != 0 && op->deadline_ns <= now_ns)
            kvtr_end_op(op, KVC_TIMED_OUT, "the deadline passed");
        uint64_t due_ns = op->ended ? op->let_go_ns : op->deadline_ns;
        if (op->ended && op->link != NULL && due_ns != 0 && due_ns <= now_ns)
            give_up(op->link);
        else if (due_ns > now_ns && (first_ns == 0 || due_ns < first_ns))
            first_ns = due_ns;
    }
    conn->next_deadline_ns = first_ns;
}

/* A channel that wants a link; NULL: none does. */
static kvtr_channel *without_link(kvt_conn *conn)
{
    for (uint32_t i = 0; i < conn->n_channels && !conn->loop.stopping; i++) {
        if (conn->channels[i].link == NULL && conn->channels[i].first != NULL)
            return &conn->channels[i];
    }
    return NULL;
}

uint64_t kvtr_client_turn(kvtr_loop *loop)
{
    kvt_conn *conn = (kvt_conn *)loop;
    for (;;) {
        kvc_mutex_lock(&loop->mutex);
        end_late(conn);
        if (conn->begin_due) {
            conn->begin_due = false;
            begin_all(conn);
        }
        uint64_t next_ns = conn->next_deadline_ns;
        kvtr_channel *channel = without_link(conn);
        kvtr_rop *op = conn->told;
        kvt_xfer *xfer = NULL;
        if (op != NULL) {
            conn->told = op->told;
            if (conn->told == NULL)
                conn->told_last = &conn->told;
            op->listed = false;
            xfer = op->xfer;
            unlist_op(op);
        }
        kvc_mutex_unlock(&loop->mutex);
        if (op != NULL) {
            xfer->reply = (kvc_reply){.method = xfer->req->method};
            deliver_end(op, xfer, op->status, op->detail);
        } else if (channel != NULL) {
            kvtr_start_link(channel);
        } else {
            return next_ns;
        }
    }
}
