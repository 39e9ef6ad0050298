/*
 * client.c: the connecting end: one thread ("kvt-inproc-c") delivers what has finished and looks
 * after deadlines.
 *
 * An op waits until it is answered, cancelled or late; whoever comes first puts it on the finished
 * list, under the transport's mutex, and the thread calls done with no lock held.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "inproc_internal.h"
#include "wire/wire.h"

/* Header and slices as one message; it is decoded as a message from a socket would be. */
static kvc_status take_message(kvt_xfer *xfer, const kvti_answer *answer, const char **why_p)
{
    struct iovec *pieces = kvc_arena_alloc(&xfer->arena, (answer->n_slices + 1) * sizeof(*pieces));
    *why_p = "memory for one message is out";
    if (pieces == NULL)
        return KVC_NO_MEMORY;
    pieces[0] = (struct iovec){answer->head, answer->head_bytes};
    for (uint32_t i = 0; i < answer->n_slices; i++)
        pieces[i + 1] =
            (struct iovec){(void *)(uintptr_t)answer->slices[i].base, answer->slices[i].len_bytes};
    kvc_status status = kvc_wire_decode_reply(xfer->req->method, pieces, answer->n_slices + 1,
                                              &xfer->arena, &xfer->reply, why_p);
    return status == KVC_INVALID ? KVC_PROTOCOL : status;
}

/* The transfer is its caller's again once done has been called. */
static void deliver_end(kvti_inop *op, kvti_answer *answer)
{
    kvt_xfer *xfer = op->xfer;
    const char *detail = op->detail;
    xfer->status = op->status;
    xfer->retry_after_ms = op->retry_after_ms;
    xfer->reply = (kvc_reply){.method = xfer->req->method};
    if (xfer->status == KVC_OK && xfer->message == NULL)
        xfer->status = take_message(xfer, answer, &detail);
    if (xfer->status != KVC_OK)
        (void)snprintf(xfer->detail, sizeof(xfer->detail), "%s", detail);
    xfer->done(xfer);
    kvti_answer_free(answer);
    free(op);
}

/* One message of a stream. Then its sender may send the next; a bad message ends the transfer. */
static void deliver_message(kvti_inop *op, kvti_answer *answer)
{
    kvt_xfer *xfer = op->xfer;
    const char *why;
    kvc_status status = take_message(xfer, answer, &why);
    if (status == KVC_OK)
        xfer->message(xfer);
    kvc_arena_reset(&xfer->arena);
    kvti_answer_free(answer);
    kvti_inproc_lock();
    if (op->waiting && status != KVC_OK)
        kvti_inproc_finish(op, status, why, 0);
    else if (op->call != NULL)
        kvti_inproc_sent(op->call, true);
    kvti_inproc_unlock();
}

/* With the mutex held: ends what is late, and gives the next deadline (0: none). */
static uint64_t end_late(kvt_conn *conn)
{
    uint64_t first_ns = 0, now_ns = kvc_now_ns();
    kvti_inop *next;
    for (kvti_inop *op = conn->waiting; op != NULL; op = next) {
        uint64_t deadline_ns = op->deadline_ns;
        next = op->next;
        if (deadline_ns == 0)
            continue;
        if (deadline_ns <= now_ns)
            kvti_inproc_finish(op, KVC_TIMED_OUT, "the deadline passed", 0);
        else if (first_ns == 0 || deadline_ns < first_ns)
            first_ns = deadline_ns;
    }
    return first_ns;
}

/* The next op to deliver, with what it has; NULL: the connection is being closed. */
static kvti_inop *next_finished(kvt_conn *conn, kvti_answer *answer_p, bool *ended_p)
{
    kvti_inproc_lock();
    uint64_t deadline_ns = end_late(conn);
    while (conn->finished == NULL && !conn->stopping) {
        (void)kvc_cond_wait_until(&conn->work, kvti_inproc_mutex(), deadline_ns);
        deadline_ns = end_late(conn);
    }
    kvti_inop *op = conn->finished;
    if (op != NULL) {
        conn->finished = op->finished;
        if (conn->finished == NULL)
            conn->finished_end = &conn->finished;
        op->listed = false;
        *answer_p = op->answer;
        op->answer = (kvti_answer){0};
        *ended_p = !op->waiting;
        if (*ended_p)
            op->xfer->priv = NULL;
    }
    kvti_inproc_unlock();
    return op;
}

static void run_conn(void *arg)
{
    kvt_conn *conn = arg;
    kvti_answer answer;
    bool ended;
    kvti_inop *op;
    while ((op = next_finished(conn, &answer, &ended)) != NULL) {
        if (!ended) {
            deliver_message(op, &answer);
            continue;
        }
        deliver_end(op, &answer);
        kvti_inproc_lock();
        conn->n_ops--;
        if (conn->n_ops == 0)
            kvc_cond_broadcast(&conn->idle);
        kvti_inproc_unlock();
    }
}

kvc_status kvti_inproc_connect(const kvt_connect_opts *opts, kvt_conn **conn_p)
{
    *conn_p = NULL;
    kvt_init();
    if (opts->size_bytes != sizeof(*opts) || kvti_inproc_check_uri(opts->uri) != KVC_OK)
        return KVC_INVALID;
    kvt_conn *conn = calloc(1, sizeof(*conn));
    if (conn == NULL)
        return KVC_NO_MEMORY;
    (void)snprintf(conn->uri, sizeof(conn->uri), "%s", opts->uri);
    conn->finished_end = &conn->finished;
    kvc_cond_init(&conn->work);
    kvc_cond_init(&conn->idle);
    kvc_status status = kvc_thread_start(&conn->thread, "kvt-inproc-c", run_conn, conn);
    if (status != KVC_OK) {
        kvc_cond_fini(&conn->idle);
        kvc_cond_fini(&conn->work);
        free(conn);
        return status;
    }
    *conn_p = conn;
    return KVC_OK;
}

/* The request's bytes, copied: the server may look at them after done. */
static kvc_status encode(kvt_xfer *xfer, kvti_incall *call)
{
    const kvc_request *req = xfer->req;
    const void *head;
    size_t head_bytes;
    kvc_status status = kvc_wire_encode_request(req, &call->base.arena, &head, &head_bytes);
    if (status != KVC_OK)
        return status;
    call->len_bytes = head_bytes + (size_t)req->data_bytes;
    call->bytes = malloc(call->len_bytes + 1);
    if (call->bytes == NULL)
        return KVC_NO_MEMORY;
    memcpy(call->bytes, head, head_bytes);
    uint8_t *at = call->bytes + head_bytes;
    for (uint32_t i = 0; i < req->n_data && req->data_bytes > 0; i++) {
        if (req->data[i].iov_len > 0)
            memcpy(at, req->data[i].iov_base, req->data[i].iov_len);
        at += req->data[i].iov_len;
    }
    kvc_arena_reset(&call->base.arena);
    return KVC_OK;
}

/* With the mutex held. True if the server's queue has taken the call. */
static bool hand_over(kvt_conn *conn, kvti_inop *op, kvti_incall *call)
{
    const char *why = "nobody listens there";
    kvt_listener *listener = kvti_inproc_find(conn->uri);
    op->next = conn->waiting;
    if (op->next != NULL)
        op->next->prev = op;
    conn->waiting = op;
    conn->n_ops++;
    op->waiting = true;
    op->xfer->priv = op;
    kvc_status status;
    if (kvc_expired(op->xfer->deadline_ns)) {
        status = KVC_TIMED_OUT;
        why = "the deadline passed";
    } else if (listener == NULL) {
        status = KVC_UNAVAILABLE;
    } else {
        status = kvti_inproc_enqueue(listener, call, &why);
        if (status != KVC_OK)
            kvti_count_refusal(status);
    }
    if (status != KVC_OK) {
        kvti_inproc_finish(op, status, why, status == KVC_AGAIN ? KVTI_RETRY_MS : 0);
        return false;
    }
    op->deadline_ns = call->base.deadline_ns;
    call->op = op;
    op->call = call;
    kvc_cond_signal(&conn->work); /* its deadline may be the first */
    return true;
}

static kvti_incall *create_call(kvt_xfer *xfer)
{
    kvti_incall *call = calloc(1, sizeof(*call));
    if (call == NULL)
        return NULL;
    call->base.ops = &kvt_inproc_ops;
    call->base.req.method = xfer->req->method;
    call->base.deadline_ns = xfer->deadline_ns;
    call->base.tenant = "default";
    kvc_arena_init(&call->base.arena, KVTI_ARENA_BYTES);
    return call;
}

kvc_status kvti_inproc_submit(kvt_conn *conn, kvt_xfer *xfer)
{
    kvc_arena_init(&xfer->arena, KVTI_ARENA_BYTES);
    xfer->status = KVC_OK;
    xfer->detail[0] = '\0';
    xfer->retry_after_ms = 0;
    xfer->priv = NULL;
    if (xfer->req == NULL || xfer->done == NULL || xfer->req->n_data > KVT_MAX_SLICES ||
        kvt_streams_reply(xfer->req->method) != (xfer->message != NULL))
        return KVC_INVALID;
    kvti_incall *call = create_call(xfer);
    kvti_inop *op = calloc(1, sizeof(*op));
    kvc_status status = KVC_NO_MEMORY;
    if (call == NULL || op == NULL)
        goto err_memory;
    status = encode(xfer, call);
    if (status != KVC_OK)
        goto err_memory;
    op->conn = conn;
    op->xfer = xfer;
    kvti_inproc_lock();
    status = conn->closed ? KVC_CLOSED : KVC_OK;
    if (status == KVC_OK && conn->n_ops >= KVTI_MAX_XFERS)
        status = KVC_AGAIN;
    bool taken = status == KVC_OK && hand_over(conn, op, call);
    kvti_inproc_unlock();
    if (status != KVC_OK)
        goto err_memory;
    if (!taken)
        kvti_incall_free(call);
    return KVC_OK;

err_memory:
    if (call != NULL)
        kvti_incall_free(call);
    free(op);
    return status;
}

void kvti_inproc_cancel(kvt_conn *conn, kvt_xfer *xfer)
{
    (void)conn;
    kvti_inproc_lock();
    kvti_inop *op = xfer->priv;
    if (op != NULL && op->waiting)
        kvti_inproc_finish(op, KVC_CANCELLED, "cancelled by the caller", 0);
    kvti_inproc_unlock();
}

void kvti_inproc_conn_close(kvt_conn *conn)
{
    if (conn == NULL)
        return;
    kvti_inproc_lock();
    conn->closed = true;
    while (conn->waiting != NULL)
        kvti_inproc_finish(conn->waiting, KVC_CANCELLED, "the connection was closed", 0);
    while (conn->n_ops > 0)
        kvc_cond_wait(&conn->idle, kvti_inproc_mutex());
    conn->stopping = true;
    kvc_cond_signal(&conn->work);
    kvti_inproc_unlock();
    kvc_thread_join(&conn->thread);
    kvc_cond_fini(&conn->idle);
    kvc_cond_fini(&conn->work);
    free(conn);
}
