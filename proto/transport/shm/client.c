/*
 * client.c: the connecting end, from the caller's side: connect, submit, push, cancel, close.
 *
 * Any thread; nothing here waits for the peer, but for conn_close. done and its like run on the
 * connection's thread only (conn.c).
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "shm_client.h"
#include "wire/wire.h"

void kvti_conn_wake(kvt_conn *conn)
{
    uint64_t one = 1;
    ssize_t n = write(conn->wake_fd, &one, sizeof(one)); /* full: it is awake already */
    (void)n;
}

void kvti_shmop_end(kvt_conn *conn, kvti_shmop *op, kvc_status status, const char *why)
{
    if (op->over)
        return;
    op->over = true;
    op->status = status;
    op->why = why;
    op->next_over = NULL;
    *conn->over_end = op;
    conn->over_end = &op->next_over;
    kvti_conn_wake(conn);
}

/* Sends what the socket takes. The thread goes on with the rest, or finds that it broke. */
static void send_out(kvt_conn *conn, kvti_out *out, kvti_out **over_p)
{
    kvti_pipe_queue(&conn->pipe, out);
    if (!conn->pipe.blocked)
        kvti_pipe_flush(&conn->pipe, over_p);
    if (conn->pipe.blocked || conn->pipe.broken)
        kvti_conn_wake(conn);
}

void kvti_conn_tell(kvt_conn *conn, kvc_frame_kind kind, uint64_t call, kvti_out **over_p)
{
    kvc_frame frame = {.kind = kind, .call = call};
    kvti_parts none = {0};
    if (conn->pipe.fd < 0)
        return;
    kvti_out *out = kvti_out_create(&frame, &none);
    if (out != NULL) {
        send_out(conn, out, over_p);
    } else { /* the server would wait for it */
        conn->pipe.broken = true;
        kvti_conn_wake(conn);
    }
}

/* ---- connecting -------------------------------------------------------------------------------
 */

/* With the lock held. NULL, or why there is no connection. */
static const char *open_socket(kvt_conn *conn, kvti_out **over_p)
{
    uint8_t bytes[KVC_HELLO_BYTES];
    kvc_hello hello = {.version = KVC_FRAME_VERSION,
                       .max_message_bytes = conn->opts.max_message_bytes};
    if (conn->pipe.fd >= 0)
        return conn->pipe.broken ? "the connection broke" : NULL;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return "no socket could be opened";
    if (connect(fd, (const struct sockaddr *)&conn->address, sizeof(conn->address)) != 0) {
        const char *why = errno == EAGAIN   ? "the server's queue of connections is full"
                          : errno == EACCES ? "no permission to write to the server's socket"
                          : errno == ENOENT ? "there is no socket of that name"
                                            : "nobody listens there";
        (void)close(fd);
        return why;
    }
    kvti_pipe_open(&conn->pipe, fd, true);
    kvc_hello_encode(&hello, bytes);
    kvc_frame frame = {.kind = KVC_FRAME_HELLO, .head_bytes = sizeof(bytes)};
    kvti_parts parts = {.head = bytes};
    kvti_out *out = kvti_out_create(&frame, &parts);
    if (out == NULL) {
        kvti_pipe_close(&conn->pipe);
        return "memory is out";
    }
    conn->greeted = false;
    send_out(conn, out, over_p);
    kvti_conn_wake(conn); /* there is a socket to read from */
    return NULL;
}

kvc_status kvti_shm_connect(const kvt_connect_opts *opts, kvt_conn **conn_p)
{
    struct sockaddr_un address;
    *conn_p = NULL;
    kvt_init();
    if (opts->size_bytes != sizeof(*opts) || opts->max_message_bytes > KVC_MAX_VALUE_BYTES ||
        kvti_shm_address(opts->uri, &address) != KVC_OK)
        return KVC_INVALID;
    kvt_conn *conn = calloc(1, sizeof(*conn));
    if (conn == NULL)
        return KVC_NO_MEMORY;
    conn->opts = *opts;
    conn->opts.uri = NULL;
    conn->opts.tenant = NULL;
    if (conn->opts.max_message_bytes == 0)
        conn->opts.max_message_bytes = KVC_MAX_VALUE_BYTES;
    conn->address = address;
    conn->pipe.fd = -1;
    conn->ring.fd = conn->reply_ring.fd = -1;
    conn->pipe.last = &conn->pipe.first;
    conn->over_end = &conn->over;
    kvc_status status = KVC_NO_MEMORY;
    conn->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (conn->wake_fd < 0)
        goto err_conn;
    kvc_mutex_init(&conn->lock, KVC_RANK_TRANSPORT);
    kvc_cond_init(&conn->idle);
    status = kvc_thread_start(&conn->thread, "kvc-shm", kvti_conn_run, conn);
    if (status != KVC_OK)
        goto err_thread;
    *conn_p = conn;
    return KVC_OK;

err_thread:
    kvc_cond_fini(&conn->idle);
    kvc_mutex_fini(&conn->lock);
    (void)close(conn->wake_fd);
err_conn:
    free(conn);
    return status;
}

/* ---- transfers --------------------------------------------------------------------------------
 */

/* A frame for req (NULL: there are no more messages), whose data stays where it is. */
static kvc_status build(const kvc_request *req, kvti_shmop *op, kvc_frame *frame, kvti_out **out_p)
{
    kvc_arena arena;
    const void *head = NULL;
    size_t head_bytes = 0;
    kvti_parts parts = {.owner = op};
    kvc_status status = KVC_OK;
    frame->method = op->method;
    kvc_arena_init(&arena, KVTI_ARENA_BYTES);
    if (req != NULL)
        status = kvc_wire_encode_request(req, &arena, &head, &head_bytes);
    if (status == KVC_OK && req != NULL) {
        frame->head_bytes = (uint32_t)head_bytes;
        frame->data_bytes = (uint32_t)req->data_bytes;
        parts.head = head;
        parts.data = req->data;
        parts.n_data = req->data_bytes > 0 ? req->n_data : 0;
    }
    if (status == KVC_OK) {
        *out_p = kvti_out_create(frame, &parts);
        status = *out_p != NULL ? KVC_OK : KVC_NO_MEMORY;
    }
    kvc_arena_reset(&arena);
    return status;
}

/* With the lock held: the op is under way from here on, and its end comes by the thread. */
static void hand_over(kvt_conn *conn, kvti_shmop *op, kvti_out *out, kvti_out **over_p)
{
    const kvt_xfer *xfer = op->xfer;
    uint64_t now_ns = kvc_now_ns();
    op->node.id = ++conn->next_id;
    op->pushing = xfer->pushed != NULL;
    op->xfer->priv = op;
    kvti_table_add(&conn->ops, &op->node);
    const char *why = NULL;
    kvc_status status = KVC_UNAVAILABLE;
    if (kvc_expired(xfer->deadline_ns)) {
        status = KVC_TIMED_OUT;
        why = "the deadline passed";
    } else {
        why = open_socket(conn, over_p);
    }
    if (why != NULL) {
        kvti_shmop_end(conn, op, status, why);
        out->next = *over_p;
        *over_p = out;
        return;
    }
    uint64_t left_ns = xfer->deadline_ns == 0 ? 0 : xfer->deadline_ns - now_ns;
    out->frame.call = op->node.id;
    out->frame.deadline_ns = left_ns > KVC_FRAME_MAX_DEADLINE_NS ? 0 : left_ns;
    if (xfer->deadline_ns != 0 &&
        (conn->next_late_ns == 0 || xfer->deadline_ns < conn->next_late_ns)) {
        conn->next_late_ns = xfer->deadline_ns;
        kvti_conn_wake(conn);
    }
    send_out(conn, out, over_p);
}

kvc_status kvti_shm_submit(kvt_conn *conn, kvt_xfer *xfer)
{
    kvc_frame frame = {.kind = KVC_FRAME_REQUEST};
    kvti_out *out = NULL, *over = NULL;
    kvc_arena_init(&xfer->arena, KVTI_ARENA_BYTES);
    xfer->status = KVC_OK;
    xfer->detail[0] = '\0';
    xfer->retry_after_ms = 0;
    xfer->priv = NULL;
    xfer->fds = NULL;
    xfer->n_fds = 0;
    if (xfer->req == NULL || xfer->done == NULL || xfer->req->n_data > KVT_MAX_SLICES ||
        kvt_streams_reply(xfer->req->method) != (xfer->message != NULL) ||
        kvt_streams_request(xfer->req->method) != (xfer->pushed != NULL))
        return KVC_INVALID;
    kvti_shmop *op = calloc(1, sizeof(*op));
    if (op == NULL)
        return KVC_NO_MEMORY;
    op->xfer = xfer;
    op->method = xfer->req->method;
    kvc_status status = build(xfer->req, op, &frame, &out);
    if (status != KVC_OK)
        goto err_op;
    kvc_mutex_lock(&conn->lock);
    if (conn->closed)
        status = KVC_CLOSED;
    else if (conn->ops.n >= KVTI_MAX_XFERS)
        status = KVC_AGAIN;
    else
        hand_over(conn, op, out, &over);
    kvc_mutex_unlock(&conn->lock);
    kvti_out_free(over);
    if (status != KVC_OK)
        goto err_out;
    return KVC_OK;

err_out:
    kvti_out_free(out);
err_op:
    free(op);
    return status;
}

kvc_status kvti_shm_push(kvt_conn *conn, kvt_xfer *xfer, const kvc_request *req)
{
    kvc_frame frame = {.kind = KVC_FRAME_MESSAGE, .flags = req == NULL ? KVC_FRAME_LAST : 0};
    kvti_out *out = NULL, *over = NULL;
    if (xfer->pushed == NULL ||
        (req != NULL && (req->n_data > KVT_MAX_SLICES || req->method != xfer->req->method)))
        return KVC_INVALID;
    kvc_mutex_lock(&conn->lock);
    kvti_shmop *op = xfer->priv;
    kvc_status status = op == NULL || op->over ? KVC_CLOSED : KVC_OK;
    if (status == KVC_OK && (op->pushing || op->half_closed))
        status = KVC_INVALID;
    if (status == KVC_OK)
        status = build(req, op, &frame, &out);
    if (status == KVC_OK) {
        out->frame.call = op->node.id;
        op->pushing = req != NULL;
        op->half_closed = req == NULL;
        send_out(conn, out, &over);
    }
    kvc_mutex_unlock(&conn->lock);
    kvti_out_free(over);
    return status;
}

void kvti_shm_cancel(kvt_conn *conn, kvt_xfer *xfer)
{
    kvc_mutex_lock(&conn->lock);
    kvti_shmop *op = xfer->priv;
    if (op != NULL)
        kvti_shmop_end(conn, op, KVC_CANCELLED, "cancelled by the caller");
    kvc_mutex_unlock(&conn->lock);
}

void kvti_shm_conn_close(kvt_conn *conn)
{
    if (conn == NULL)
        return;
    kvc_mutex_lock(&conn->lock);
    conn->closed = true;
    for (kvti_node *node = conn->ops.all; node != NULL; node = node->next)
        kvti_shmop_end(conn, (kvti_shmop *)node, KVC_CANCELLED, "the connection was closed");
    while (conn->ops.n > 0)
        kvc_cond_wait(&conn->idle, &conn->lock);
    conn->stopping = true;
    kvti_conn_wake(conn);
    kvc_mutex_unlock(&conn->lock);
    kvc_thread_join(&conn->thread);
    kvc_cond_fini(&conn->idle);
    kvc_mutex_fini(&conn->lock);
    (void)close(conn->wake_fd);
    free(conn);
}
