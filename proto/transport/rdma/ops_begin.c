/*
 * ops_begin.c: transfers set going: the memory that they need at the client, and their request.
 *
 * With the loop's mutex held, on any thread. What needs memory that is not registered yet is begun
 * by the loop's thread, with the mutex free while it registers: links and transfers are destroyed
 * by that thread alone, but a transfer may be ended meanwhile, and others submitted.
 */
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/sum.h"
#include "client.h"

void kvtr_plan_places(kvtr_rop *op, const kvt_xfer *xfer)
{
    kvtr_run runs[KVTI_MAX_RUNS];
    uint64_t bytes = KVC_FRAME_BYTES + KVTI_ENV_BYTES;
    uint32_t n = kvtr_rooms_runs(xfer->rooms, xfer->n_rooms, runs);
    for (uint32_t i = 0; i < n; i++)
        bytes += (uint64_t)runs[i].n_rows * runs[i].row_bytes;
    if (n == 0 || bytes <= KVTI_FRAG_BYTES) /* such a reply comes in one fragment */
        return;
    op->runs = calloc(n, sizeof(*op->runs));
    if (op->runs == NULL)
        return; /* they are copied */
    memcpy(op->runs, runs, n * sizeof(*runs));
    op->n_runs = n;
}

static void copy_data(uint8_t *at, const kvc_request *req)
{
    for (uint32_t i = 0; i < req->n_data; i++) {
        if (req->data[i].iov_len > 0)
            memcpy(at, req->data[i].iov_base, req->data[i].iov_len);
        at += req->data[i].iov_len;
    }
}

/* With the mutex held. NULL: there is none; or only the thread may make one, and begin_due says so.
 */
static kvtr_buf *get_buf(kvtr_rop *op, kvtr_link *link, uint32_t len_bytes, bool on_thread)
{
    bool full;
    if (on_thread)
        return kvtr_buf_get(link->domain, len_bytes, &full);
    kvtr_buf *buf = kvtr_buf_find(link->domain, len_bytes);
    if (buf == NULL) {
        op->conn->begin_due = true;
        kvtr_loop_wake(&op->conn->loop);
    }
    return buf;
}

static bool may_stage(const kvtr_link *link, const kvc_frame *frame, const kvc_request *req)
{
    return req->data_bytes > 0 && link->peer_reads &&
           !kvtr_fits_fragment(link, frame->head_bytes + (size_t)req->data_bytes);
}

bool kvtr_stage(kvtr_rop *op, kvtr_link *link, kvc_frame *frame, const kvc_request *req,
                bool on_thread)
{
    if (!may_stage(link, frame, req))
        return false;
    kvtr_buf_put(op->staging); /* of the message before, which the server has taken */
    op->staging = NULL;
    op->staging = get_buf(op, link, (uint32_t)req->data_bytes, on_thread);
    if (op->staging == NULL)
        return false;
    copy_data(op->staging->bytes, req);
    frame->flags |= KVC_FRAME_ELSEWHERE;
    frame->spare[0] = (uintptr_t)op->staging->bytes;
    frame->spare[1] = op->staging->mr->rkey;
    return true;
}

/* With the mutex held. False: it has to wait for a buffer. */
static bool take_landing(kvtr_rop *op, kvtr_link *link, bool on_thread)
{
    kvt_conn *conn = op->conn;
    if (op->landing != NULL || !(kvc_method_flags(op->frame.method) & KVC_METHOD_BULK_REPLY))
        return true;
    if (conn->n_landings >= KVTI_LANDINGS)
        return false;
    conn->n_landings++;
    op->landing = get_buf(op, link, conn->max_message_bytes, on_thread);
    if (op->landing == NULL) {
        conn->n_landings--;
        return on_thread; /* the reply comes in fragments */
    }
    op->frame.spare[0] = (uintptr_t)op->landing->bytes;
    op->frame.spare[1] = op->landing->mr->rkey | (uint64_t)conn->max_message_bytes << 32;
    return true;
}

/* With the mutex held: the server is to write the rows where they belong; what it is told is in
 * table_p. False: that memory is not registered, or the server cannot. */
static bool take_places(kvtr_rop *op, kvtr_link *link, uint8_t *table_p)
{
    uint64_t begin = UINT64_MAX, end = 0;
    for (uint32_t i = 0; i < op->n_runs; i++) {
        const kvtr_run *run = &op->runs[i];
        uint64_t run_end = run->addr + (uint64_t)run->n_rows * run->row_bytes;
        begin = run->addr < begin ? run->addr : begin;
        end = run_end > end ? run_end : end;
    }
    if (op->n_runs == 0 || !link->peer_places ||
        (op->frame.method != KVC_FETCH_ROWS && !link->peer_stream_places))
        return false;
    struct ibv_mr *mr = kvtr_range_use(link->domain, (const void *)(uintptr_t)begin,
                                       (size_t)(end - begin), op->conn->sums, &op->placing);
    if (mr == NULL)
        return false;
    kvtr_runs_encode(op->runs, op->n_runs, table_p);
    op->frame.flags |= KVTI_PLACED;
    op->frame.data_bytes = op->n_runs * KVTI_RUN_BYTES;
    op->frame.spare[1] = mr->rkey;
    if ((op->frame.flags & KVTI_SUMMED) != 0) {
        struct iovec piece = {table_p, op->frame.data_bytes};
        op->frame.spare[2] = kvc_pieces_sum(&piece, 1);
    }
    return true;
}

/* With the mutex held: the request goes out. table: of its places. */
static void send_request(kvtr_rop *op, kvtr_link *link, bool staged, uint8_t *table)
{
    kvc_frame *frame = &op->frame;
    const kvc_request *req = op->xfer->req;
    struct iovec places = {table, frame->data_bytes};
    uint64_t now_ns = kvc_now_ns();
    frame->call = op->id;
    if (op->deadline_ns != 0)
        frame->deadline_ns = op->deadline_ns > now_ns ? op->deadline_ns - now_ns : 1;
    if (frame->deadline_ns > KVC_FRAME_MAX_DEADLINE_NS)
        frame->deadline_ns = 0;
    kvtr_out *out = op->placing != NULL
                        ? kvtr_out_create(frame, op->head, NULL, &places, 1)
                        : kvtr_out_create(frame, op->head, NULL, req->data,
                                          staged || req->data_bytes == 0 ? 0 : req->n_data);
    kvtr_op_leave(op);
    kvc_arena_reset(&op->arena);
    op->head = NULL;
    kvtr_op_keep(op, link);
    if (out == NULL) {
        kvtr_op_forget(op);
        kvtr_op_drop_memory(op);
        kvtr_end_op(op, KVC_NO_MEMORY, "out of memory");
        return;
    }
    kvtr_send(link, out);
}

/* With the mutex held: the request goes out, unless it has to wait, or has ended while the mutex
 * was free. */
static void begin_op(kvtr_rop *op, kvtr_link *link, bool on_thread)
{
    uint8_t table[KVTI_MAX_RUNS * KVTI_RUN_BYTES];
    const kvc_request *req = op->xfer->req;
    bool staged = false, ready = true;
    if (op->beginning) /* the thread is at it */
        return;
    op->beginning = true;
    if (!take_places(op, link, table)) {
        ready = take_landing(op, link, on_thread) && !op->ended;
        staged = ready && kvtr_stage(op, link, &op->frame, req, on_thread);
        ready = ready && !op->ended && (staged || on_thread || !may_stage(link, &op->frame, req));
    }
    op->beginning = false;
    if (ready)
        send_request(op, link, staged, table);
}

void kvtr_begin_ops(kvtr_channel *channel, bool on_thread)
{
    kvtr_link *link = channel->link;
    if (link == NULL || link->state != KVTI_LINK_UP || link->broken)
        return;
    kvtr_rop *next;
    for (kvtr_rop *op = channel->first; op != NULL; op = next) {
        next = op->waits; /* one that waits for a landing does not stop those that need none */
        begin_op(op, link, on_thread);
        if (on_thread && !op->waiting)
            next = channel->first; /* others may have left while the mutex was free */
    }
}
