/*
 * conn.c: the connecting end's thread: reads frames, watches deadlines, and tells the caller.
 *
 * Only this thread takes an op out of the table and frees it, so an op that it has found lives as
 * long as it works on it; others may only mark it to end.
 */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "shm_client.h"
#include "wire/wire.h"

#define NS_PER_MS 1000000ull

/* ---- the end of a transfer --------------------------------------------------------------------
 */

/* An END that has come for an op; NULL body: it ended otherwise. */
typedef struct answer {
    const kvc_frame *frame;
    uint8_t *body;
    int fds[KVT_MAX_FDS];
    uint32_t n_fds;
} answer;

/* Head and data as one message. */
static kvc_status decode(kvt_xfer *xfer, const kvc_frame *frame, uint8_t *body, const char **why_p)
{
    struct iovec *pieces = kvc_arena_alloc(&xfer->arena, 2 * sizeof(*pieces));
    *why_p = "memory for one message is out";
    if (pieces == NULL)
        return KVC_NO_MEMORY;
    pieces[0] = (struct iovec){body, frame->head_bytes};
    pieces[1] = (struct iovec){body + frame->head_bytes + frame->detail_bytes, frame->data_bytes};
    kvc_status status =
        kvc_wire_decode_reply(xfer->req->method, pieces, frame->data_bytes > 0 ? 2 : 1,
                              &xfer->arena, &xfer->reply, why_p);
    return status == KVC_INVALID ? KVC_PROTOCOL : status;
}

/* Takes the op out of the connection. True: a message that was pushed will never be taken. */
static bool leave(kvt_conn *conn, kvti_shmop *op, bool tell)
{
    kvti_out *over = NULL;
    kvc_mutex_lock(&conn->lock);
    const kvti_out *first = conn->pipe.first;
    bool begun = false, queued = false;
    for (const kvti_out *out = first; out != NULL; out = out->next) {
        if (out->owner == op && out->frame.kind == KVC_FRAME_REQUEST) {
            queued = true;
            begun = out->begun;
        }
    }
    kvti_pipe_drop(&conn->pipe, op, &over);
    if (tell && (!queued || begun))
        kvti_conn_tell(conn, KVC_FRAME_CANCEL, op->node.id, &over);
    op->xfer->priv = NULL;
    bool unpushed = op->pushing;
    kvc_mutex_unlock(&conn->lock);
    kvti_out_free(over);
    return unpushed;
}

/* The transfer is its caller's again once done has been called. */
static void finish(kvt_conn *conn, kvti_shmop *op, const answer *a)
{
    kvt_xfer *xfer = op->xfer;
    const kvc_frame *frame = a->frame;
    const char *detail = op->why;
    size_t len = detail == NULL ? 0 : strlen(detail);
    xfer->status = op->status;
    if (leave(conn, op, frame == NULL))
        xfer->pushed(xfer, false);
    xfer->reply = (kvc_reply){.method = op->method};
    if (frame != NULL) {
        detail = (const char *)a->body + frame->head_bytes;
        len = frame->detail_bytes;
        xfer->status = frame->status;
        xfer->retry_after_ms = frame->status == KVC_AGAIN ? frame->retry_after_ms : 0;
        xfer->fds = (int *)(uintptr_t)a->fds;
        xfer->n_fds = a->n_fds;
    }
    if (frame != NULL && xfer->status == KVC_OK && xfer->message == NULL) {
        xfer->status = decode(xfer, frame, a->body, &detail);
        len = xfer->status == KVC_OK ? 0 : strlen(detail);
    }
    if (xfer->status != KVC_OK && len > 0)
        (void)snprintf(xfer->detail, sizeof(xfer->detail), "%.*s", (int)len, detail);
    xfer->done(xfer);
    kvc_mutex_lock(&conn->lock);
    kvti_table_remove(&conn->ops, &op->node);
    if (conn->ops.n == 0)
        kvc_cond_broadcast(&conn->idle);
    kvc_mutex_unlock(&conn->lock);
    free(op);
}

/* Those that others have marked, or whose time is up. */
static void run_over(kvt_conn *conn)
{
    static const answer none = {0};
    for (;;) {
        kvc_mutex_lock(&conn->lock);
        kvti_shmop *op = conn->over;
        if (op != NULL) {
            conn->over = op->next_over;
            if (conn->over == NULL)
                conn->over_end = &conn->over;
        }
        kvc_mutex_unlock(&conn->lock);
        if (op == NULL)
            return;
        finish(conn, op, &none);
    }
}

static void run_late(kvt_conn *conn)
{
    uint64_t now_ns = kvc_now_ns(), first_ns = 0;
    kvc_mutex_lock(&conn->lock);
    if (conn->next_late_ns == 0 || now_ns < conn->next_late_ns) {
        kvc_mutex_unlock(&conn->lock);
        return;
    }
    for (kvti_node *node = conn->ops.all; node != NULL; node = node->next) {
        kvti_shmop *op = (kvti_shmop *)node;
        uint64_t deadline_ns = op->xfer->deadline_ns;
        if (deadline_ns == 0 || op->over)
            continue;
        if (deadline_ns <= now_ns)
            kvti_shmop_end(conn, op, KVC_TIMED_OUT, "the deadline passed");
        else if (first_ns == 0 || deadline_ns < first_ns)
            first_ns = deadline_ns;
    }
    conn->next_late_ns = first_ns;
    kvc_mutex_unlock(&conn->lock);
}

/* Looks at the ring when it is time, and says when to look again. */
static void run_rest(kvt_conn *conn)
{
    kvc_mutex_lock(&conn->lock);
    if (conn->next_rest_ns != 0 || kvti_ring_holds_pages(&conn->ring)) {
        uint64_t now_ns = kvc_now_ns();
        bool looks = conn->next_rest_ns != 0 && now_ns >= conn->next_rest_ns;
        if (looks)
            kvti_ring_rest(&conn->ring);
        if (!kvti_ring_holds_pages(&conn->ring))
            conn->next_rest_ns = 0;
        else if (looks || conn->next_rest_ns == 0)
            conn->next_rest_ns = now_ns + kvti_shm_rest_ns;
    }
    kvc_mutex_unlock(&conn->lock);
}

/* ---- frames -----------------------------------------------------------------------------------
 */

/* The op of a frame that has come, unless it is to end anyway. */
static kvti_shmop *find_op(kvt_conn *conn, uint64_t id)
{
    kvc_mutex_lock(&conn->lock);
    kvti_shmop *op = (kvti_shmop *)kvti_table_find(&conn->ops, id);
    if (op != NULL && op->over)
        op = NULL;
    kvc_mutex_unlock(&conn->lock);
    return op;
}

static bool begin_frame(void *arg, const kvc_frame *frame, bool *keep_p)
{
    kvt_conn *conn = arg;
    *keep_p = false;
    if ((frame->flags & KVC_FRAME_ELSEWHERE) != 0 &&
        !kvti_ring_holds(&conn->reply_ring, frame->spare[0], frame->data_bytes))
        return false;
    switch (frame->kind) {
    case KVC_FRAME_HELLO:
        *keep_p = true;
        return !conn->greeted && frame->head_bytes <= KVTI_SHM_HELLO_MAX;
    case KVC_FRAME_MESSAGE:
    case KVC_FRAME_END:
        *keep_p =
            frame->data_bytes <= conn->opts.max_message_bytes && find_op(conn, frame->call) != NULL;
        return conn->greeted;
    case KVC_FRAME_CREDIT:
    case KVC_FRAME_GOAWAY:
        return conn->greeted;
    default:
        return false;
    }
}

static bool take_hello(kvt_conn *conn, const kvc_frame *frame, const uint8_t *body)
{
    kvc_hello hello;
    int fds[2] = {-1, -1};
    if (kvc_hello_decode(body, frame->head_bytes, &hello) != KVC_OK)
        return false;
    conn->greeted = true;
    if (hello.spare[0] == 0)
        return true;
    if (!kvti_pipe_take_fds(&conn->pipe, fds, 2))
        return false;
    /* Without the ring of replies, what comes through it could not be read. */
    bool good = kvti_ring_map(fds[1], hello.spare[1], &conn->reply_ring) == KVC_OK;
    kvc_mutex_lock(&conn->lock);
    if (good && kvti_ring_map(fds[0], hello.spare[0], &conn->ring) == KVC_OK)
        conn->pipe.ring = &conn->ring;
    kvc_mutex_unlock(&conn->lock);
    (void)close(fds[0]);
    (void)close(fds[1]);
    return good;
}

/* One message of a stream. Then its sender may send the next; a bad message ends the transfer. */
static void take_message(kvt_conn *conn, kvti_shmop *op, const kvc_frame *frame, uint8_t *body)
{
    kvt_xfer *xfer = op->xfer;
    const char *why = "the server's message is longer than this end takes";
    kvc_status status = KVC_PROTOCOL;
    kvti_out *over = NULL;
    if (body != NULL && xfer->message != NULL)
        status = decode(xfer, frame, body, &why);
    if (status == KVC_OK)
        xfer->message(xfer);
    kvc_arena_reset(&xfer->arena);
    kvc_mutex_lock(&conn->lock);
    if (status != KVC_OK)
        kvti_shmop_end(conn, op, status, why);
    else if (!op->over)
        kvti_conn_tell(conn, KVC_FRAME_CREDIT, op->node.id, &over);
    kvc_mutex_unlock(&conn->lock);
    kvti_out_free(over);
}

/* False: the connection ends, also where descriptors came for a call that is over: the server
 * believes that this end has them. */
static bool take_end(kvt_conn *conn, kvti_shmop *op, const kvc_frame *frame, uint8_t *body)
{
    answer a = {.frame = frame, .body = body};
    bool taken = false;
    if ((frame->flags & KVTI_SHM_HAS_FDS) != 0) {
        if (frame->spare[1] == 0 || frame->spare[1] > KVT_MAX_FDS ||
            !kvti_pipe_take_fds(&conn->pipe, a.fds, (uint32_t)frame->spare[1]))
            return false;
        a.n_fds = (uint32_t)frame->spare[1];
    }
    if (op != NULL && body == NULL) {
        kvc_mutex_lock(&conn->lock);
        kvti_shmop_end(conn, op, KVC_PROTOCOL, "the server's answer is longer than this end takes");
        kvc_mutex_unlock(&conn->lock);
    } else if (op != NULL) {
        kvc_mutex_lock(&conn->lock);
        bool mine = !op->over; /* else the list has it */
        op->over = true;
        kvc_mutex_unlock(&conn->lock);
        if (mine)
            finish(conn, op, &a);
        taken = mine;
    }
    for (uint32_t i = 0; i < a.n_fds; i++) {
        if (a.fds[i] >= 0)
            (void)close(a.fds[i]);
    }
    return taken || a.n_fds == 0;
}

static void take_credit(kvt_conn *conn, kvti_shmop *op)
{
    kvc_mutex_lock(&conn->lock);
    bool due = op->pushing && !op->over;
    op->pushing = op->pushing && !due;
    kvc_mutex_unlock(&conn->lock);
    if (due)
        op->xfer->pushed(op->xfer, true);
}

static bool end_frame(void *arg, const kvc_frame *frame, uint8_t *body)
{
    kvt_conn *conn = arg;
    kvti_shmop *op = find_op(conn, frame->call);
    bool right = true;
    if ((frame->flags & KVC_FRAME_ELSEWHERE) != 0)
        kvti_ring_take(&conn->reply_ring, frame->spare[0], frame->data_bytes,
                       body == NULL ? NULL : body + frame->head_bytes + frame->detail_bytes);
    switch (frame->kind) {
    case KVC_FRAME_HELLO:
        right = take_hello(conn, frame, body);
        break;
    case KVC_FRAME_MESSAGE:
        if (op != NULL)
            take_message(conn, op, frame, body);
        break;
    case KVC_FRAME_END:
        right = take_end(conn, op, frame, body);
        break;
    case KVC_FRAME_CREDIT:
        if (op != NULL)
            take_credit(conn, op);
        break;
    default:
        break;
    }
    free(body);
    return right;
}

/* ---- the thread -------------------------------------------------------------------------------
 */

/* Everything under way ends; the next submit connects anew. */
static void disconnect(kvt_conn *conn, kvc_status status, const char *why)
{
    kvti_out *over = NULL;
    kvc_mutex_lock(&conn->lock);
    for (kvti_node *node = conn->ops.all; node != NULL; node = node->next)
        kvti_shmop_end(conn, (kvti_shmop *)node, status, why);
    kvti_pipe_drop_all(&conn->pipe, &over);
    kvti_pipe_close(&conn->pipe);
    kvti_ring_unmap(&conn->ring);
    kvti_ring_unmap(&conn->reply_ring);
    kvc_mutex_unlock(&conn->lock);
    kvti_out_free(over);
}

/* Waits for what comes next. False: the connection is being closed. */
static bool wait_event(kvt_conn *conn, bool *readable_p)
{
    struct pollfd fds[2] = {{.fd = conn->wake_fd, .events = POLLIN}, {.fd = -1}};
    int timeout_ms = -1;
    kvc_mutex_lock(&conn->lock);
    bool stopping = conn->stopping;
    fds[1].fd = conn->pipe.fd;
    fds[1].events = (short)(POLLIN | (conn->pipe.blocked ? POLLOUT : 0));
    uint64_t next_ns = conn->next_late_ns;
    if (next_ns == 0 || (conn->next_rest_ns != 0 && conn->next_rest_ns < next_ns))
        next_ns = conn->next_rest_ns;
    if (next_ns != 0) {
        uint64_t now_ns = kvc_now_ns();
        uint64_t left_ns = next_ns > now_ns ? next_ns - now_ns : 0;
        timeout_ms =
            left_ns > 60000 * NS_PER_MS ? 60000 : (int)((left_ns + NS_PER_MS - 1) / NS_PER_MS);
    }
    kvc_mutex_unlock(&conn->lock);
    *readable_p = false;
    if (stopping)
        return false;
    (void)poll(fds, 2, timeout_ms);
    if (fds[0].revents != 0) {
        uint64_t n;
        while (read(conn->wake_fd, &n, sizeof(n)) > 0)
            continue;
    }
    *readable_p = fds[1].fd >= 0 && (fds[1].revents & ~POLLOUT) != 0;
    return true;
}

static void run_socket(kvt_conn *conn, bool readable)
{
    const kvti_reader reader = {begin_frame, end_frame, conn};
    const char *why = "the connection broke";
    kvti_out *over = NULL;
    if (readable && !kvti_pipe_read(&conn->pipe, &reader, &why)) {
        disconnect(conn, KVC_UNAVAILABLE, why);
        return;
    }
    kvc_mutex_lock(&conn->lock);
    kvti_pipe_flush(&conn->pipe, &over);
    bool broken = conn->pipe.broken;
    kvc_mutex_unlock(&conn->lock);
    kvti_out_free(over);
    if (broken)
        disconnect(conn, KVC_UNAVAILABLE, why);
}

void kvti_conn_run(void *arg)
{
    kvt_conn *conn = arg;
    bool readable;
    while (wait_event(conn, &readable)) {
        run_late(conn);
        run_over(conn);
        run_socket(conn, readable);
        run_over(conn);
        run_rest(conn);
    }
    disconnect(conn, KVC_CANCELLED, "the connection was closed");
}
