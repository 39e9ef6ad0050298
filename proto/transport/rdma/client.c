/*
 * client.c: the connecting end: a connection, its channels and their links.
 *
 * A channel makes its link when it has something to send and makes it anew when it was lost; what
 * waited for a link that could not be made fails. The loop's thread ("kvc-rdma") resolves, connects
 * and delivers; submit, push and cancel may come from any thread.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/sum.h"
#include "client.h"
#include "wire/wire.h"

#define MAX_CHANNELS 64u
#define POOL_BYTES   ((uint64_t)48 << 20) /* landings, and as much again for what is put */
#define HANDSHAKE_NS ((uint64_t)10 * 1000000000)
#define KEEPALIVE_NS ((uint64_t)15 * 1000000000)

/* ---- links ----------------------------------------------------------------------------------- */

static void fail_link(kvtr_link *link, const char *why)
{
    kvc_mutex_lock(&link->loop->mutex);
    kvtr_link_break(link, why);
    kvc_mutex_unlock(&link->loop->mutex);
}

void kvtr_start_link(kvtr_channel *channel)
{
    kvt_conn *conn = channel->conn;
    struct rdma_cm_id *id;
    if (kvtr_verbs_now->create_id(conn->loop.cm, &id, NULL) != 0) {
        kvc_mutex_lock(&conn->loop.mutex);
        kvtr_fail_waiting(channel, KVC_UNAVAILABLE, "no RDMA connection can be made here");
        kvc_mutex_unlock(&conn->loop.mutex);
        return;
    }
    kvtr_link *link = kvtr_link_create(&conn->loop, id);
    if (link == NULL) {
        (void)kvtr_verbs_now->destroy_id(id);
        return; /* tried again at the next turn */
    }
    id->context = link;
    link->owner = channel;
    kvc_mutex_lock(&conn->loop.mutex);
    link->state = KVTI_LINK_CONNECTING;
    channel->link = link;
    kvc_mutex_unlock(&conn->loop.mutex);
    if (kvtr_verbs_now->resolve_addr(id, (struct sockaddr *)&conn->addr, KVTI_RESOLVE_MS) != 0)
        fail_link(link, "no RDMA device has a route to that address");
}

static void on_route(kvtr_link *link)
{
    struct rdma_conn_param param;
    uint8_t intro[KVTI_INTRO_BYTES];
    if (kvtr_link_setup(link) != KVC_OK) {
        fail_link(link, "the RDMA device gives no connection; see the log");
        return;
    }
    kvtr_conn_param(link, intro, &param);
    if (kvtr_verbs_now->connect(link->id, &param) != 0)
        fail_link(link, "the RDMA device does not connect");
}

static void on_established(kvtr_link *link, const struct rdma_conn_param *theirs)
{
    if (!link->has_qp || !kvtr_intro_read(link, theirs->private_data, theirs->private_data_len)) {
        fail_link(link, "the peer is no server of ours");
        return;
    }
    kvc_mutex_lock(&link->loop->mutex);
    link->state = KVTI_LINK_UP;
    link->spoken = true;
    kvtr_begin_ops(link->owner, true);
    kvc_mutex_unlock(&link->loop->mutex);
}

static void on_cm(kvtr_loop *loop, struct rdma_cm_id *id, const struct rdma_cm_event *event)
{
    kvtr_link *link = id == NULL ? NULL : id->context;
    (void)loop;
    if (link == NULL || kvtr_is_broken(link))
        return;
    switch (event->event) {
    case RDMA_CM_EVENT_ADDR_RESOLVED:
        if (!link->has_qp && kvtr_verbs_now->resolve_route(id, KVTI_RESOLVE_MS) != 0)
            fail_link(link, "no RDMA route to that address");
        break;
    case RDMA_CM_EVENT_ROUTE_RESOLVED:
        if (!link->has_qp)
            on_route(link);
        break;
    case RDMA_CM_EVENT_ESTABLISHED:
        if (link->state == KVTI_LINK_CONNECTING)
            on_established(link, &event->param.conn);
        break;
    case RDMA_CM_EVENT_TIMEWAIT_EXIT:
    case RDMA_CM_EVENT_CONNECT_RESPONSE:
    case RDMA_CM_EVENT_CONNECT_REQUEST: /* these two are not for this end */
        break;
    default:
        kvtr_link_poll(link); /* what came before the end */
        fail_link(link, kvtr_cm_reason(event->event));
    }
}

static const kvtr_owner owner = {
    .on_begin = kvtr_client_begin,
    .on_frame = kvtr_client_frame,
    .on_read = NULL, /* a client reads nothing */
    .on_cm = on_cm,
    .on_down = kvtr_client_down,
    .on_turn = kvtr_client_turn,
};

/* ---- the connection -------------------------------------------------------------------------- */

/* A quarter of the limit on locked memory is for the regions of all connections together, unless
 * their options say otherwise: what is left is for links and buffers, without which nothing goes at
 * all. */
static void limit_regions(kvtr_loop *loop, uint64_t region_bytes)
{
    struct rlimit limit;
    loop->region_max_bytes = region_bytes == 0 ? KVTI_REGION_BYTES : region_bytes;
    if (region_bytes != 0 || getrlimit(RLIMIT_MEMLOCK, &limit) != 0 ||
        limit.rlim_cur == RLIM_INFINITY)
        return;
    loop->region_shared_bytes = limit.rlim_cur < 4 ? 1 : limit.rlim_cur / 4;
    if (loop->region_max_bytes > loop->region_shared_bytes)
        loop->region_max_bytes = loop->region_shared_bytes;
}

static kvt_conn *create_conn(const kvt_connect_opts *opts)
{
    kvt_conn *conn = calloc(1, sizeof(*conn));
    if (conn == NULL)
        return NULL;
    conn->n_channels = opts->n_channels == 0 ? 1 : opts->n_channels;
    if (conn->n_channels > MAX_CHANNELS)
        conn->n_channels = MAX_CHANNELS;
    conn->channels = calloc(conn->n_channels, sizeof(*conn->channels));
    if (conn->channels == NULL) {
        free(conn);
        return NULL;
    }
    for (uint32_t i = 0; i < conn->n_channels; i++) {
        conn->channels[i].conn = conn;
        conn->channels[i].last = &conn->channels[i].first;
    }
    conn->max_message_bytes = opts->max_message_bytes;
    if (conn->max_message_bytes == 0 || conn->max_message_bytes > KVC_MAX_VALUE_BYTES)
        conn->max_message_bytes = KVC_MAX_VALUE_BYTES;
    conn->sums = opts->sums;
    conn->told_last = &conn->told;
    conn->next_id = 1;
    conn->loop.owner = &owner;
    conn->loop.is_client = true;
    conn->loop.pool_max_bytes = POOL_BYTES;
    limit_regions(&conn->loop, opts->region_bytes);
    conn->loop.handshake_ns = HANDSHAKE_NS;
    conn->loop.keepalive_ns = KEEPALIVE_NS;
    return conn;
}

kvc_status kvtr_rdma_connect(const kvt_connect_opts *opts, kvt_conn **conn_p)
{
    struct sockaddr_storage addr;
    *conn_p = NULL;
    kvt_init();
    if (opts->size_bytes != sizeof(*opts))
        return KVC_INVALID;
    kvc_status status = kvtr_rdma_address(opts->uri, &addr);
    if (status != KVC_OK)
        return status;
    kvt_conn *conn = create_conn(opts);
    if (conn == NULL)
        return KVC_NO_MEMORY;
    conn->addr = addr;
    (void)snprintf(conn->uri, sizeof(conn->uri), "%s", opts->uri);
    status = kvtr_loop_init(&conn->loop, "kvc-rdma");
    if (status != KVC_OK) {
        free(conn->channels);
        free(conn);
        return status;
    }
    *conn_p = conn;
    return KVC_OK;
}

void kvtr_rdma_conn_close(kvt_conn *conn)
{
    if (conn == NULL)
        return;
    kvc_mutex_lock(&conn->loop.mutex);
    conn->closed = true;
    for (uint32_t i = 0; i < conn->n_channels; i++)
        kvtr_fail_waiting(&conn->channels[i], KVC_CANCELLED, "the connection was closed");
    for (kvtr_link *link = conn->loop.links; link != NULL; link = link->next)
        kvtr_link_break(link, "the connection was closed");
    kvtr_loop_wake(&conn->loop);
    while (conn->n_ops > 0)
        kvc_cond_wait(&conn->loop.changed, &conn->loop.mutex);
    kvc_mutex_unlock(&conn->loop.mutex);
    kvtr_loop_fini(&conn->loop);
    free(conn->channels);
    free(conn);
}

/* ---- requests -------------------------------------------------------------------------------- */

static kvc_status check_xfer(const kvt_xfer *xfer)
{
    if (xfer->req == NULL || xfer->done == NULL || xfer->req->n_data > KVT_MAX_SLICES ||
        kvt_streams_reply(xfer->req->method) != (xfer->message != NULL) ||
        kvt_streams_request(xfer->req->method) != (xfer->pushed != NULL) ||
        (xfer->rooms != NULL && !kvtr_has_places(xfer->req->method)))
        return KVC_INVALID;
    return KVC_OK;
}

/* Outside the mutex: it looks at every byte. req NULL: of no data. */
static void add_sum(const kvt_conn *conn, kvc_frame *frame, const kvc_request *req)
{
    if (!conn->sums)
        return;
    frame->flags |= KVTI_SUMMED;
    frame->spare[2] =
        req == NULL ? kvc_pieces_sum(NULL, 0) : kvc_pieces_sum(req->data, req->n_data);
}

static kvc_status create_op(kvt_conn *conn, kvt_xfer *xfer, kvtr_rop **op_p)
{
    size_t head_bytes;
    kvtr_rop *op = calloc(1, sizeof(*op));
    if (op == NULL)
        return KVC_NO_MEMORY;
    kvc_arena_init(&op->arena, KVTI_ARENA_BYTES);
    kvc_status status = kvc_wire_encode_request(xfer->req, &op->arena, &op->head, &head_bytes);
    if (status != KVC_OK) {
        kvtr_op_free(op);
        return status;
    }
    op->conn = conn;
    op->xfer = xfer;
    op->deadline_ns = xfer->deadline_ns;
    uint64_t now_ns = kvc_now_ns();
    op->patience_ns = kvtr_let_go_ns(op->deadline_ns == 0       ? UINT64_MAX
                                     : op->deadline_ns > now_ns ? op->deadline_ns - now_ns
                                                                : 0);
    op->pushing = xfer->pushed != NULL;
    op->frame = (kvc_frame){.kind = KVC_FRAME_REQUEST,
                            .method = xfer->req->method,
                            .head_bytes = (uint32_t)head_bytes,
                            .data_bytes = (uint32_t)xfer->req->data_bytes};
    add_sum(conn, &op->frame, xfer->req);
    if (xfer->rooms != NULL)
        kvtr_plan_places(op, xfer);
    *op_p = op;
    return KVC_OK;
}

/* With the mutex held. */
static void enqueue(kvt_conn *conn, kvtr_rop *op)
{
    kvtr_channel *channel = &conn->channels[op->xfer->channel % conn->n_channels];
    op->channel = channel;
    op->id = conn->next_id++;
    op->next = conn->ops;
    if (op->next != NULL)
        op->next->prev = op;
    conn->ops = op;
    conn->n_ops++;
    op->xfer->priv = op;
    op->waiting = true;
    *channel->last = op;
    channel->last = &op->waits;
    uint64_t deadline_ns = op->deadline_ns;
    if (deadline_ns != 0 && (conn->next_deadline_ns == 0 || deadline_ns < conn->next_deadline_ns)) {
        conn->next_deadline_ns = deadline_ns;
        kvtr_loop_wake(&conn->loop);
    }
    if (kvc_expired(deadline_ns))
        kvtr_end_op(op, KVC_TIMED_OUT, "the deadline passed");
    else if (channel->link != NULL && channel->link->state == KVTI_LINK_UP)
        kvtr_begin_ops(channel, false);
    else
        kvtr_loop_wake(&conn->loop);
}

kvc_status kvtr_rdma_submit(kvt_conn *conn, kvt_xfer *xfer)
{
    kvtr_rop *op = NULL;
    kvc_arena_init(&xfer->arena, KVTI_ARENA_BYTES);
    xfer->status = KVC_OK;
    xfer->detail[0] = '\0';
    xfer->retry_after_ms = 0;
    xfer->placed = false;
    xfer->priv = NULL;
    kvc_status status = check_xfer(xfer);
    if (status == KVC_OK)
        status = create_op(conn, xfer, &op);
    if (status != KVC_OK)
        return status;
    kvc_mutex_lock(&conn->loop.mutex);
    if (conn->closed)
        status = KVC_CLOSED;
    else if (conn->n_ops >= KVTI_MAX_XFERS)
        status = KVC_AGAIN;
    else
        enqueue(conn, op);
    kvc_mutex_unlock(&conn->loop.mutex);
    if (status != KVC_OK)
        kvtr_op_free(op);
    return status;
}

/* With the mutex held: the next message of a request that streams, or that there is none. */
static kvc_status push_frame(kvtr_rop *op, kvc_frame *frame, const void *head,
                             const kvc_request *req)
{
    kvtr_out *out;
    if (op == NULL || op->ended || op->link == NULL || op->link->broken)
        return KVC_CLOSED;
    if (op->pushing || op->pushed_due || op->half_closed)
        return KVC_INVALID;
    frame->call = op->id;
    if (req == NULL)
        frame->flags |= KVC_FRAME_LAST;
    bool staged = req != NULL && kvtr_stage(op, op->link, frame, req, true);
    if (op->ended || op->link == NULL || op->link->broken)
        return KVC_CLOSED;
    out = req == NULL || staged ? kvtr_out_create(frame, head, NULL, NULL, 0)
                                : kvtr_out_create(frame, head, NULL, req->data,
                                                  req->data_bytes > 0 ? req->n_data : 0);
    if (out == NULL)
        return KVC_NO_MEMORY;
    op->pushing = req != NULL;
    op->half_closed = req == NULL;
    kvtr_send(op->link, out);
    return KVC_OK;
}

kvc_status kvtr_rdma_push(kvt_conn *conn, kvt_xfer *xfer, const kvc_request *req)
{
    kvc_frame frame = {.kind = KVC_FRAME_MESSAGE, .method = KVC_PUT_BLOCKS_STREAM};
    const void *head = NULL;
    size_t head_bytes = 0;
    kvc_arena arena;
    if (xfer->pushed == NULL ||
        (req != NULL && (req->n_data > KVT_MAX_SLICES || req->method != xfer->req->method)))
        return KVC_INVALID;
    kvc_arena_init(&arena, KVTI_ARENA_BYTES);
    kvc_status status =
        req == NULL ? KVC_OK : kvc_wire_encode_request(req, &arena, &head, &head_bytes);
    if (status == KVC_OK) {
        frame.method = xfer->req->method;
        frame.head_bytes = (uint32_t)head_bytes;
        frame.data_bytes = req == NULL ? 0 : (uint32_t)req->data_bytes;
        add_sum(conn, &frame, req);
        kvc_mutex_lock(&conn->loop.mutex);
        status = push_frame(xfer->priv, &frame, head, req);
        kvc_mutex_unlock(&conn->loop.mutex);
    }
    kvc_arena_reset(&arena);
    return status;
}

void kvtr_rdma_cancel(kvt_conn *conn, kvt_xfer *xfer)
{
    kvc_mutex_lock(&conn->loop.mutex);
    kvtr_rop *op = xfer->priv;
    if (op != NULL)
        kvtr_end_op(op, KVC_CANCELLED, "cancelled by the caller");
    kvc_mutex_unlock(&conn->loop.mutex);
}
