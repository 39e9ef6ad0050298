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
    if (op->pushed_due)
        xfer->pushed(xfer, op->pushed_ok);
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

/* The client may push the next message. */
static void deliver_pushed(kvti_inop *op)
{
    kvti_inproc_lock();
    bool due = op->pushed_due, ok = op->pushed_ok;
    op->pushed_due = false;
    kvti_inproc_unlock();
    if (due)
        op->xfer->pushed(op->xfer, ok);
}

/* One message of a stream. Then its sender may send the next; a bad message ends the transfer. */
static void deliver_message(kvti_inop *op, kvti_answer *answer)
{
    kvt_xfer *xfer = op->xfer;
    const char *why;
    if (answer->head == NULL)
        return;
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
            deliver_pushed(op);
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
static kvc_status encode(const kvc_request *req, uint8_t **bytes_p, size_t *len_bytes_p)
{
    const void *head;
    size_t head_bytes;
    kvc_arena arena;
    kvc_arena_init(&arena, KVTI_ARENA_BYTES);
    kvc_status status = kvc_wire_encode_request(req, &arena, &head, &head_bytes);
    if (status != KVC_OK)
        goto err_encode;
    status = KVC_NO_MEMORY;
    uint8_t *bytes = malloc(head_bytes + (size_t)req->data_bytes + 1);
    if (bytes == NULL)
        goto err_encode;
    status = KVC_OK;
    memcpy(bytes, head, head_bytes);
    uint8_t *at = bytes + head_bytes;
    for (uint32_t i = 0; i < req->n_data && req->data_bytes > 0; i++) {
        if (req->data[i].iov_len > 0)
            memcpy(at, req->data[i].iov_base, req->data[i].iov_len);
        at += req->data[i].iov_len;
    }
    *bytes_p = bytes;
    *len_bytes_p = head_bytes + (size_t)req->data_bytes;

err_encode:
    kvc_arena_reset(&arena);
    return status;
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
    op->pushing = op->xfer->pushed != NULL;
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
    call->method = call->base.req.method = xfer->req->method;
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
        kvt_streams_reply(xfer->req->method) != (xfer->message != NULL) ||
        kvt_streams_request(xfer->req->method) != (xfer->pushed != NULL))
        return KVC_INVALID;
    kvti_incall *call = create_call(xfer);
    kvti_inop *op = calloc(1, sizeof(*op));
    kvc_status status = KVC_NO_MEMORY;
    if (call == NULL || op == NULL)
        goto err_memory;
    status = encode(xfer->req, &call->bytes, &call->len_bytes);
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

kvc_status kvti_inproc_push(kvt_conn *conn, kvt_xfer *xfer, const kvc_request *req)
{
    uint8_t *bytes = NULL;
    size_t len_bytes = 0;
    (void)conn;
    if (xfer->pushed == NULL ||
        (req != NULL && (req->n_data > KVT_MAX_SLICES || req->method != xfer->req->method)))
        return KVC_INVALID;
    kvc_status status = req == NULL ? KVC_OK : encode(req, &bytes, &len_bytes);
    if (status != KVC_OK)
        return status;
    kvti_inproc_lock();
    kvti_inop *op = xfer->priv;
    kvti_incall *call = op == NULL ? NULL : op->call;
    if (call == NULL)
        status = KVC_CLOSED;
    else if (op->pushing || op->pushed_due || call->half_closed)
        status = KVC_INVALID;
    if (status == KVC_OK) {
        op->pushing = req != NULL;
        call->next_bytes = bytes;
        call->next_len_bytes = len_bytes;
        call->half_closed = req == NULL;
        kvti_inproc_feed(call);
        bytes = NULL;
    }
    kvti_inproc_unlock();
    free(bytes);
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
