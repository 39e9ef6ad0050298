/*
 * xfer.c: one transfer at the client, from submit to done.
 *
 * n_refs counts the batch and every slice of the caller's memory that gRPC still holds, so that
 * done never runs while a socket may yet read that memory: after a cancel or a deadline, bytes
 * already queued for a stalled peer keep the transfer until they are written or keepalive gives the
 * connection up. The call is let go as soon as its batch has ended, since its stream may hold
 * slices too. Whoever drops the last reference ends up on the thread of the transfer's lane: the
 * batch's own event does, and a slice's destructor posts an empty batch on the lane's poster.
 */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/clock.h"
#include "grpc_internal.h"
#include "wire/wire.h"

struct kvti_xfer {
    kvti_xfer *next, *prev; /* the connection's list */
    kvt_conn *conn;
    kvti_lane *lane;
    kvt_xfer *xfer;
    grpc_call *call; /* until the batch has ended; then NULL, under the connection's mutex */
    atomic_uint n_refs;
    bool late;         /* the deadline had passed at submit: nothing is sent */
    bool cancel_asked; /* by us; guarded by the connection's mutex while call is not NULL */
    kvti_tag ended, last_slice;
    grpc_byte_buffer *request, *reply;
    grpc_metadata_array initial, trailing;
    grpc_status_code code;
    grpc_slice details;
    kvti_pull pull; /* of a reply that streams; a reference of its own */
    /* Of requests that stream: the message under way, with a reference, or the end (no message). */
    kvti_tag pushed;
    grpc_byte_buffer *part;
    bool pushing;
};

static void finish(kvti_xfer *op);

static void on_last_slice(kvti_tag *tag, bool ok)
{
    (void)ok;
    finish(KVTI_CONTAINER(tag, kvti_xfer, last_slice));
}

/* gRPC has let go of one slice of the caller's memory. Any thread of gRPC. */
static void on_slice_free(void *arg)
{
    kvti_xfer *op = arg;
    if (atomic_fetch_sub(&op->n_refs, 1) == 1)
        kvti_start(op->lane->poster, NULL, 0, &op->last_slice);
}

static void on_ended(kvti_tag *tag, bool ok)
{
    kvti_xfer *op = KVTI_CONTAINER(tag, kvti_xfer, ended);
    kvt_conn *conn = op->conn;
    (void)ok;
    kvc_mutex_lock(&conn->mutex);
    grpc_call *call = op->call;
    op->call = NULL;
    kvc_mutex_unlock(&conn->mutex);
    if (op->request != NULL)
        grpc_byte_buffer_destroy(op->request);
    op->request = NULL;
    grpc_call_unref(call);
    if (atomic_fetch_sub(&op->n_refs, 1) == 1)
        finish(op);
}

static void on_pull_over(kvti_pull *pull)
{
    kvti_xfer *op = KVTI_CONTAINER(pull, kvti_xfer, pull);
    if (atomic_fetch_sub(&op->n_refs, 1) == 1)
        finish(op);
}

/* The text of a slice, cut to fit. */
static void copy_text(char *text, size_t size_bytes, grpc_slice slice)
{
    size_t len_bytes = GRPC_SLICE_LENGTH(slice);
    if (len_bytes > size_bytes - 1)
        len_bytes = size_bytes - 1;
    memcpy(text, GRPC_SLICE_START_PTR(slice), len_bytes);
    text[len_bytes] = '\0';
}

/* A trailer's value as a number up to max; 0 if it is absent or none. */
static uint32_t trailer(const kvti_xfer *op, const char *key, uint32_t max)
{
    for (size_t i = 0; i < op->trailing.count; i++) {
        const grpc_metadata *entry = &op->trailing.metadata[i];
        char text[16], *end;
        if (grpc_slice_str_cmp(entry->key, key) != 0)
            continue;
        copy_text(text, sizeof(text), entry->value);
        unsigned long value = strtoul(text, &end, 10);
        return *end == '\0' && value <= max ? (uint32_t)value : 0;
    }
    return 0;
}

/* Status, detail and hint of a call that failed. */
static void take_error(kvti_xfer *op)
{
    kvt_xfer *xfer = op->xfer;
    char text[KVT_DETAIL_BYTES + 32];
    copy_text(text, sizeof(text), op->details);
    if (op->late) {
        op->code = GRPC_STATUS_DEADLINE_EXCEEDED;
        (void)snprintf(text, sizeof(text), "the deadline had passed at submit");
    }
    const char *detail = text;
    uint32_t number = trailer(op, KVTI_STATUS_KEY, KVC_STATUS_COUNT - 1);
    xfer->status = number != 0 ? (kvc_status) - (int)number : kvti_from_grpc(op->code, text);
    /* So gRPC ends, without a word, calls that reach a server while it sends its clients away. */
    if (number == 0 && op->code == GRPC_STATUS_CANCELLED && !op->cancel_asked)
        xfer->status = KVC_UNAVAILABLE;
    if (number != 0) {
        const char *name = kvc_status_name(xfer->status);
        size_t len = strlen(name);
        if (strncmp(text, name, len) == 0 && strncmp(text + len, ": ", 2) == 0)
            detail = text + len + 2;
    }
    (void)snprintf(xfer->detail, sizeof(xfer->detail), "%.*s", KVT_DETAIL_BYTES - 1, detail);
    xfer->retry_after_ms = trailer(op, KVTI_RETRY_KEY, UINT32_MAX);
}

static void take_reply(kvti_xfer *op)
{
    kvt_xfer *xfer = op->xfer;
    const char *why = "the reply has no message";
    xfer->status = KVC_PROTOCOL;
    if (op->reply != NULL && op->reply->data.raw.compression == GRPC_COMPRESS_NONE) {
        uint32_t n_pieces;
        struct iovec *pieces = kvti_byte_buffer_pieces(op->reply, &xfer->arena, &n_pieces);
        xfer->status = KVC_NO_MEMORY;
        why = "memory for one message is out";
        if (pieces != NULL)
            xfer->status = kvc_wire_decode_reply(xfer->req->method, pieces, n_pieces, &xfer->arena,
                                                 &xfer->reply, &why);
    }
    if (xfer->status == KVC_OK)
        return;
    /* A reply that breaks the limits is the server's fault, not the caller's argument. */
    if (xfer->status == KVC_INVALID)
        xfer->status = KVC_PROTOCOL;
    (void)snprintf(xfer->detail, sizeof(xfer->detail), "%s", why);
}

/* A stream that ended well, or whose messages made no sense. */
static void take_end(kvti_xfer *op)
{
    kvt_xfer *xfer = op->xfer;
    xfer->reply = (kvc_reply){.method = xfer->req->method};
    xfer->status = op->pull.status;
    if (xfer->status != KVC_OK)
        (void)snprintf(xfer->detail, sizeof(xfer->detail), "%s", op->pull.why);
}

static void free_op(kvti_xfer *op)
{
    if (op->request != NULL)
        grpc_byte_buffer_destroy(op->request);
    if (op->reply != NULL)
        grpc_byte_buffer_destroy(op->reply);
    grpc_metadata_array_destroy(&op->initial);
    grpc_metadata_array_destroy(&op->trailing);
    grpc_slice_unref(op->details);
    if (op->call != NULL)
        grpc_call_unref(op->call);
    free(op);
}

static void insert(kvt_conn *conn, kvti_xfer *op)
{
    op->next = conn->xfers;
    if (op->next != NULL)
        op->next->prev = op;
    conn->xfers = op;
    op->xfer->priv = op;
}

static void unlink_op(kvt_conn *conn, kvti_xfer *op)
{
    if (op->prev != NULL)
        op->prev->next = op->next;
    else
        conn->xfers = op->next;
    if (op->next != NULL)
        op->next->prev = op->prev;
    op->xfer->priv = NULL;
}

/* Takes a place among the transfers, which keeps the connection and its channels. AGAIN, CLOSED. */
static kvc_status take_place(kvt_conn *conn)
{
    kvc_status status = KVC_OK;
    kvc_mutex_lock(&conn->mutex);
    if (conn->closed)
        status = KVC_CLOSED;
    else if (conn->n_xfers >= KVTI_MAX_XFERS)
        status = KVC_AGAIN;
    if (status == KVC_OK) {
        conn->n_xfers++;
        conn->n_starting++;
    }
    kvc_mutex_unlock(&conn->mutex);
    return status;
}

static void leave_place(kvt_conn *conn)
{
    kvc_mutex_lock(&conn->mutex);
    conn->n_xfers--;
    if (conn->n_xfers == 0)
        kvc_cond_broadcast(&conn->idle);
    kvc_mutex_unlock(&conn->mutex);
}

/* On the lane's thread. The transfer is its caller's again once done has been called. */
static void finish(kvti_xfer *op)
{
    kvt_conn *conn = op->conn;
    kvt_xfer *xfer = op->xfer;
    kvc_mutex_lock(&conn->mutex);
    unlink_op(conn, op);
    kvc_mutex_unlock(&conn->mutex);
    if (op->pull.status != KVC_OK || (op->pull.call != NULL && op->code == GRPC_STATUS_OK))
        take_end(op);
    else if (op->code == GRPC_STATUS_OK)
        take_reply(op);
    else
        take_error(op);
    xfer->done(xfer);
    free_op(op);
    leave_place(conn);
}

/* Header and the caller's pieces as one message; every piece counts as a reference. */
static grpc_byte_buffer *build_request(kvti_xfer *op, const kvc_request *req, const void *head,
                                       size_t head_bytes)
{
    grpc_slice list[KVT_MAX_SLICES + 1];
    uint32_t n = 0;
    list[n++] = grpc_slice_from_copied_buffer(head, head_bytes);
    for (uint32_t i = 0; i < req->n_data && req->data_bytes > 0; i++) {
        if (req->data[i].iov_len == 0)
            continue;
        atomic_fetch_add(&op->n_refs, 1);
        list[n++] = grpc_slice_new_with_user_data(req->data[i].iov_base, req->data[i].iov_len,
                                                  on_slice_free, op);
    }
    grpc_byte_buffer *request = grpc_raw_byte_buffer_create(list, n);
    for (uint32_t i = 0; i < n; i++)
        grpc_slice_unref(list[i]);
    return request;
}

static kvc_status encode(kvti_xfer *op, const kvc_request *req, grpc_byte_buffer **bb_p)
{
    const void *head;
    size_t head_bytes;
    kvc_arena arena; /* not the transfer's, which is the reply's */
    kvc_arena_init(&arena, KVTI_ARENA_BYTES);
    kvc_status status = kvc_wire_encode_request(req, &arena, &head, &head_bytes);
    if (status == KVC_OK)
        *bb_p = build_request(op, req, head, head_bytes);
    kvc_arena_reset(&arena);
    return status;
}

static void on_pushed(kvti_tag *tag, bool ok)
{
    kvti_xfer *op = KVTI_CONTAINER(tag, kvti_xfer, pushed);
    bool message = op->part != NULL;
    op->pushing = false;
    if (message) {
        grpc_byte_buffer_destroy(op->part);
        op->part = NULL;
        op->xfer->pushed(op->xfer, ok);
    }
    if (atomic_fetch_sub(&op->n_refs, 1) == 1)
        finish(op);
}

/* Sends op->part, or the end where it is NULL. The reference was taken, and the stream is not over.
 */
static void start_push(kvti_xfer *op)
{
    grpc_op ops = {.op = op->part ? GRPC_OP_SEND_MESSAGE : GRPC_OP_SEND_CLOSE_FROM_CLIENT};
    if (op->part != NULL)
        ops.data.send_message.send_message = op->part;
    op->pushing = true;
    kvti_start(op->pull.call, &ops, 1, &op->pushed);
}

/* On the lane's thread, as message and pushed are: so nothing here changes meanwhile. */
kvc_status kvti_push(kvt_conn *conn, kvt_xfer *xfer, const kvc_request *req)
{
    kvc_mutex_lock(&conn->mutex);
    kvti_xfer *op = xfer->priv;
    kvc_mutex_unlock(&conn->mutex);
    if (op == NULL || op->pull.ended)
        return KVC_CLOSED;
    if (xfer->pushed == NULL || op->pushing ||
        (req != NULL && (req->n_data > KVT_MAX_SLICES || req->method != xfer->req->method)))
        return KVC_INVALID;
    kvc_status status = req == NULL ? KVC_OK : encode(op, req, &op->part);
    if (status != KVC_OK)
        return status;
    atomic_fetch_add(&op->n_refs, 1);
    start_push(op);
    return KVC_OK;
}

static kvti_xfer *create_op(kvt_conn *conn, kvt_xfer *xfer)
{
    kvti_xfer *op = calloc(1, sizeof(*op));
    if (op == NULL)
        return NULL;
    op->conn = conn;
    op->xfer = xfer;
    op->ended.fn = on_ended;
    op->last_slice.fn = on_last_slice;
    op->pushed.fn = on_pushed;
    op->details = grpc_empty_slice();
    atomic_init(&op->n_refs, 1);
    grpc_metadata_array_init(&op->initial);
    grpc_metadata_array_init(&op->trailing);
    return op;
}

static void start(kvti_xfer *op)
{
    grpc_op ops[6] = {
        {.op = GRPC_OP_SEND_INITIAL_METADATA},  {.op = GRPC_OP_RECV_INITIAL_METADATA},
        {.op = GRPC_OP_RECV_STATUS_ON_CLIENT},  {.op = GRPC_OP_SEND_MESSAGE},
        {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT}, {.op = GRPC_OP_RECV_MESSAGE},
    };
    bool streams = op->pull.call != NULL, pushes = op->xfer->pushed != NULL;
    ops[1].data.recv_initial_metadata.recv_initial_metadata = &op->initial;
    ops[2].data.recv_status_on_client.trailing_metadata = &op->trailing;
    ops[2].data.recv_status_on_client.status = &op->code;
    ops[2].data.recv_status_on_client.status_details = &op->details;
    ops[3].data.send_message.send_message = op->request;
    ops[5].data.recv_message.recv_message = &op->reply;
    if (pushes) {
        op->part = op->request;
        op->request = NULL;
        atomic_fetch_add(&op->n_refs, 1);
    }
    kvti_start(op->call, ops, pushes ? 3 : streams ? 5 : 6, &op->ended);
    if (pushes)
        start_push(op); /* before the pull, whose end lets go of its call */
    if (streams)
        kvti_pull_begin(&op->pull);
}

/* Its messages are taken one by one, and it is not over before the last. */
static void prepare_pull(kvti_xfer *op)
{
    op->pull.xfer = op->xfer;
    op->pull.over = on_pull_over;
    op->pull.call = op->call;
    grpc_call_ref(op->call);
    atomic_fetch_add(&op->n_refs, 1);
}

/* From here on cancel and close find the transfer, if there is one. CLOSED: they have looked. */
static kvc_status publish(kvt_conn *conn, kvti_xfer *op)
{
    kvc_mutex_lock(&conn->mutex);
    kvc_status status = conn->closed ? KVC_CLOSED : KVC_OK;
    conn->n_starting--;
    if (conn->n_starting == 0)
        kvc_cond_broadcast(&conn->idle);
    if (status == KVC_OK && op != NULL)
        insert(conn, op);
    kvc_mutex_unlock(&conn->mutex);
    return status;
}

kvc_status kvti_submit(kvt_conn *conn, kvt_xfer *xfer)
{
    const kvc_request *req = xfer->req;
    kvc_arena_init(&xfer->arena, KVTI_ARENA_BYTES);
    xfer->status = KVC_OK;
    xfer->detail[0] = '\0';
    xfer->retry_after_ms = 0;
    xfer->priv = NULL;
    if (req == NULL || xfer->done == NULL || req->n_data > KVT_MAX_SLICES ||
        kvt_streams_reply(req->method) != (xfer->message != NULL) ||
        kvt_streams_request(req->method) != (xfer->pushed != NULL))
        return KVC_INVALID;
    kvc_status status = take_place(conn);
    if (status != KVC_OK)
        return status;
    kvti_xfer *op = create_op(conn, xfer);
    status = KVC_NO_MEMORY;
    if (op == NULL)
        goto err_start;
    status = encode(op, req, &op->request);
    if (status != KVC_OK)
        goto err_start;
    uint32_t number = xfer->channel % conn->n_channels;
    kvti_channel *channel = &conn->channels[number];
    op->lane = &conn->lanes[number % conn->n_lanes];
    op->call = grpc_channel_create_registered_call(channel->channel, NULL, GRPC_PROPAGATE_DEFAULTS,
                                                   op->lane->cq, channel->methods[req->method],
                                                   kvti_to_timespec(xfer->deadline_ns), NULL);
    status = publish(conn, op);
    if (status != KVC_OK)
        goto err_op;
    if (xfer->message != NULL)
        prepare_pull(op);
    op->late = kvc_expired(xfer->deadline_ns);
    if (op->late) /* gRPC may answer before its timer notices */
        (void)grpc_call_cancel(op->call, NULL);
    start(op);
    return KVC_OK;

err_start:
    (void)publish(conn, NULL);
err_op:
    if (op != NULL)
        free_op(op);
    leave_place(conn);
    return status;
}

void kvti_cancel(kvt_conn *conn, kvt_xfer *xfer)
{
    kvc_mutex_lock(&conn->mutex);
    kvti_xfer *op = xfer->priv;
    grpc_call *call = op == NULL ? NULL : op->call;
    if (op != NULL)
        op->cancel_asked = true;
    if (call != NULL)
        grpc_call_ref(call);
    kvc_mutex_unlock(&conn->mutex);
    if (call == NULL)
        return;
    (void)grpc_call_cancel(call, NULL);
    grpc_call_unref(call);
}

void kvti_cancel_all(kvt_conn *conn)
{
    for (;;) {
        grpc_call *call = NULL;
        kvc_mutex_lock(&conn->mutex);
        KVC_ASSERT(conn->closed);
        for (kvti_xfer *op = conn->xfers; op != NULL && call == NULL; op = op->next) {
            if (op->cancel_asked)
                continue;
            op->cancel_asked = true;
            call = op->call;
            if (call != NULL)
                grpc_call_ref(call);
        }
        kvc_mutex_unlock(&conn->mutex);
        if (call == NULL)
            return;
        (void)grpc_call_cancel(call, NULL);
        grpc_call_unref(call);
    }
}
