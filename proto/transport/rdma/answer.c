/*
 * answer.c: what the server sends: messages and answers, and where their payload goes.
 *
 * Any thread of the server. A payload goes with its frame if one fragment holds both. Else it is
 * written to where the client said: gathered from lent memory with as many pieces per WRITE as the
 * queue pair takes, or, where some of it is not registered, copied to one buffer first. Where the
 * client named no place, or no buffer is to be had, it follows its frame in fragments. A call
 * counts, and its slices stay, until the client has its END; one that does not take it in time
 * loses its link.
 */
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/sum.h"
#include "server.h"
#include "wire/wire.h"

void kvtr_out_free(kvtr_out *out)
{
    for (uint32_t i = 0; i < out->n_slices; i++) {
        if (out->slices[i].release != NULL)
            out->slices[i].release(out->slices[i].arg);
    }
    if (out->n_slices > 0)
        kvtr_lent_back(out->lender, out->n_slices);
    free(out->slices);
    free(out->bytes);
    free(out);
}

static void release_all(const kvt_slice *slices, uint32_t n_slices)
{
    for (uint32_t i = 0; i < n_slices; i++) {
        if (slices[i].release != NULL)
            slices[i].release(slices[i].arg);
    }
}

/* NULL: no memory. */
static kvtr_out *create_end(uint64_t id, kvc_method method, kvc_status status, const char *detail,
                            uint32_t retry_after_ms, bool summed)
{
    kvc_frame frame = {
        .kind = KVC_FRAME_END,
        .method = method,
        .call = id,
        .status = status,
        .retry_after_ms = status == KVC_AGAIN ? retry_after_ms : 0,
        .detail_bytes = detail == NULL ? 0 : (uint32_t)strnlen(detail, KVC_FRAME_DETAIL_BYTES),
    };
    if (summed) {
        frame.flags |= KVTI_SUMMED;
        frame.spare[2] = kvc_pieces_sum(NULL, 0);
    }
    return kvtr_out_create(&frame, NULL, detail, NULL, 0);
}

void kvtr_send_end(kvtr_link *link, uint64_t id, kvc_method method, kvc_status status,
                   const char *detail, uint32_t retry_after_ms, bool summed)
{
    kvtr_out *out = create_end(id, method, status, detail, retry_after_ms, summed);
    if (out == NULL) {
        kvtr_link_break(link, "out of memory");
        return;
    }
    out->late_ns = kvtr_late_of((kvt_listener *)link->loop, kvc_now_ns());
    kvtr_send(link, out);
}

/* With the mutex held: what a call has to say, out NULL for want of memory. The call counts until
 * its END has got there, and its link breaks where the client does not take it in time. */
static void send_of(kvtr_rcall *call, kvtr_out *out, kvc_frame_kind kind)
{
    kvt_listener *listener = call->listener;
    if (out == NULL) {
        kvtr_link_break(call->link, "out of memory");
        return;
    }
    out->late_ns = kvtr_late_of(listener, call->base.deadline_ns);
    if (kind == KVC_FRAME_END) {
        out->counted = &listener->n_calls;
        listener->n_calls++;
    } else {
        out->message_of = call->id;
    }
    kvtr_send(call->link, out);
}

/* ---- payloads -------------------------------------------------------------------------------- */

/* With the mutex held: a buffer with a copy of the slices; NULL: there is none. */
static kvtr_buf *copy_slices(kvtr_link *link, const kvt_slice *slices, uint32_t n_slices,
                             uint32_t data_bytes)
{
    bool full;
    kvtr_buf *buf = kvtr_buf_get(link->domain, data_bytes, &full);
    if (buf == NULL)
        return NULL;
    uint8_t *at = buf->bytes;
    for (uint32_t i = 0; i < n_slices; i++) {
        if (slices[i].len_bytes > 0)
            memcpy(at, slices[i].base, slices[i].len_bytes);
        at += slices[i].len_bytes;
    }
    return buf;
}

/* With the mutex held: the slices are out's from now on. */
static bool keep_slices(kvtr_rcall *call, kvtr_out *out, const kvt_slice *slices, uint32_t n_slices)
{
    out->slices = calloc(n_slices, sizeof(*out->slices));
    if (out->slices == NULL)
        return false;
    memcpy(out->slices, slices, n_slices * sizeof(*slices));
    out->n_slices = n_slices;
    out->lender = call->listener;
    call->listener->n_lent += n_slices;
    return true;
}

/* With the mutex held: the frame with its payload in one fragment. */
static kvtr_out *create_small(const kvc_frame *frame, const void *head, const char *detail,
                              const kvt_slice *slices, uint32_t n_slices)
{
    struct iovec data[KVT_MAX_SLICES];
    for (uint32_t i = 0; i < n_slices; i++)
        data[i] = (struct iovec){(void *)(uintptr_t)slices[i].base, slices[i].len_bytes};
    return kvtr_out_create(frame, head, detail, data, n_slices);
}

/* With the mutex held: the frame with its payload in fragments, which are copied from the slices as
 * they leave: so what waits for the client is the server's to bound. Takes slices if *kept_p. */
static kvtr_out *create_whole(kvtr_rcall *call, const kvc_frame *frame, const void *head,
                              const char *detail, const kvt_slice *slices, uint32_t n_slices,
                              bool *kept_p)
{
    kvtr_out *out = kvtr_out_create(frame, head, detail, NULL, 0);
    if (out != NULL && out->tail_bytes > 0 && !keep_slices(call, out, slices, n_slices)) {
        kvtr_out_free(out);
        return NULL;
    }
    *kept_p = out != NULL && out->tail_bytes > 0;
    return out;
}

/* With the mutex held: the frame and the WRITEs that go before it; takes slices if *kept_p. */
static kvtr_out *create_chain(kvtr_rcall *call, kvc_frame *frame, const void *head,
                              const char *detail, const kvt_slice *slices, uint32_t n_slices,
                              bool *kept_p)
{
    kvtr_link *link = call->link;
    uint32_t n_wrs = kvtr_chain_wrs(link, slices, n_slices);
    kvtr_buf *buf = NULL;
    bool gather = n_wrs > 0 && n_wrs <= link->sq_depth / 2;
    if (!gather)
        buf = copy_slices(link, slices, n_slices, frame->data_bytes);
    if (!gather && buf == NULL)
        return create_whole(call, frame, head, detail, slices, n_slices, kept_p);
    frame->flags |= KVC_FRAME_ELSEWHERE;
    frame->spare[0] = call->landing_addr;
    kvtr_out *out = kvtr_out_create(frame, head, detail, NULL, 0);
    if (out == NULL || (gather && !keep_slices(call, out, slices, n_slices))) {
        kvtr_buf_put(buf);
        free(out == NULL ? NULL : out->bytes);
        free(out);
        return NULL;
    }
    out->chain = true;
    out->data_bytes = frame->data_bytes;
    out->remote_addr = call->landing_addr;
    out->remote_key = call->landing_key;
    out->buf = buf;
    *kept_p = gather;
    return out;
}

/* With the mutex held: sends a frame with its payload, or breaks the link for want of memory. */
static void send_frame(kvtr_rcall *call, kvc_frame *frame, const void *head, const char *detail,
                       const kvt_slice *slices, uint32_t n_slices, bool *kept_p)
{
    kvtr_link *link = call->link;
    size_t whole_bytes = (size_t)frame->head_bytes + frame->detail_bytes + frame->data_bytes;
    kvtr_out *out;
    if (kvtr_fits_fragment(link, whole_bytes))
        out = create_small(frame, head, detail, slices, n_slices);
    else if (frame->data_bytes == 0 || frame->data_bytes > call->landing_bytes)
        out = create_whole(call, frame, head, detail, slices, n_slices, kept_p);
    else
        out = create_chain(call, frame, head, detail, slices, n_slices, kept_p);
    send_of(call, out, frame->kind);
}

/* ---- the table's slots ----------------------------------------------------------------------- */

static uint64_t slices_sum(const kvt_slice *slices, uint32_t n_slices)
{
    struct iovec pieces[KVT_MAX_SLICES];
    for (uint32_t i = 0; i < n_slices; i++)
        pieces[i] = (struct iovec){(void *)(uintptr_t)slices[i].base, slices[i].len_bytes};
    return kvc_pieces_sum(pieces, n_slices);
}

/* The header of a message and what its frame says of it. */
static kvc_status encode(const kvtr_rcall *call, const kvc_reply *reply, const kvt_slice *slices,
                         uint32_t n_slices, kvc_arena *arena, const void **head_p, kvc_frame *frame)
{
    kvc_method method = call->method;
    kvc_reply whole = reply == NULL ? (kvc_reply){0} : *reply;
    size_t head_bytes;
    whole.method = method;
    whole.data = NULL;
    whole.data_bytes = 0;
    for (uint32_t i = 0; i < n_slices; i++)
        whole.data_bytes += slices[i].len_bytes;
    kvc_status status = kvc_wire_encode_reply(&whole, arena, head_p, &head_bytes);
    if (status != KVC_OK) {
        KVC_LOG_ERROR(RDMA, "the server's answer to %s does not encode: %s",
                      kvc_method_name(method), kvc_status_name(status));
        return status;
    }
    frame->head_bytes = (uint32_t)head_bytes;
    frame->data_bytes = (uint32_t)whole.data_bytes;
    if (call->summed) {
        frame->flags |= KVTI_SUMMED;
        frame->spare[2] = slices_sum(slices, n_slices);
    }
    return KVC_OK;
}

void kvtr_rdma_reply(kvt_call *base, kvc_status status, const char *detail, uint32_t retry_after_ms,
                     const kvc_reply *reply, const kvt_slice *slices, uint32_t n_slices)
{
    kvtr_rcall *call = (kvtr_rcall *)base;
    kvtr_loop *loop = &call->listener->loop;
    kvc_frame frame = {.kind = KVC_FRAME_END, .method = call->method, .call = call->id};
    const void *head = NULL;
    bool kept = false;
    kvc_arena arena;
    KVC_ASSERT(n_slices <= KVT_MAX_SLICES && !call->sending);
    kvc_arena_init(&arena, KVTI_ARENA_BYTES);
    bool whole = status == KVC_OK && !kvt_streams_reply(call->method);
    if (whole && encode(call, reply, slices, n_slices, &arena, &head, &frame) != KVC_OK) {
        whole = false;
        status = KVC_IO;
        detail = "the server's answer is beyond the protocol's limits";
    }
    kvc_mutex_lock(&loop->mutex);
    if (call->link != NULL && whole)
        send_frame(call, &frame, head, NULL, slices, n_slices, &kept);
    else if (call->link != NULL)
        send_of(call,
                create_end(call->id, call->method, status, detail, retry_after_ms, call->summed),
                KVC_FRAME_END);
    /* Slices that stay ours are released below, and the listener must not go before. */
    call->listener->n_lent += kept ? 0 : n_slices;
    kvt_listener *listener = call->listener;
    kvtr_leave(call);
    kvc_mutex_unlock(&loop->mutex);
    if (!kept && n_slices > 0) {
        release_all(slices, n_slices);
        kvtr_lent_back(listener, n_slices);
    }
    kvc_arena_reset(&arena);
    kvtr_rcall_free(call);
}

kvc_status kvtr_rdma_send(kvt_call *base, const kvc_reply *reply, const kvt_slice *slices,
                          uint32_t n_slices)
{
    kvtr_rcall *call = (kvtr_rcall *)base;
    kvtr_loop *loop = &call->listener->loop;
    kvc_frame frame = {.kind = KVC_FRAME_MESSAGE, .method = call->method, .call = call->id};
    const void *head;
    bool kept = false;
    kvc_arena arena;
    KVC_ASSERT(n_slices <= KVT_MAX_SLICES && !call->sending && base->sent != NULL);
    kvc_arena_init(&arena, KVTI_ARENA_BYTES);
    kvc_status status = encode(call, reply, slices, n_slices, &arena, &head, &frame);
    kvc_mutex_lock(&loop->mutex);
    kvt_listener *listener = call->listener;
    if (status == KVC_OK && !call->gone && call->link != NULL) {
        call->sending = true;
        send_frame(call, &frame, head, NULL, slices, n_slices, &kept);
    } else if (status == KVC_OK) {
        call->sent_due = true;
        call->sent_ok = false;
        kvtr_queue_call(call);
    }
    listener->n_lent += kept ? 0 : n_slices;
    kvc_mutex_unlock(&loop->mutex);
    if (!kept && n_slices > 0) {
        release_all(slices, n_slices);
        kvtr_lent_back(listener, n_slices);
    }
    kvc_arena_reset(&arena);
    return status;
}

void kvtr_rdma_recv(kvt_call *base)
{
    kvtr_rcall *call = (kvtr_rcall *)base;
    KVC_ASSERT(base->got != NULL && !call->receiving);
    kvc_arena_reset(&base->arena);
    base->req = (kvc_request){.method = call->method};
    kvc_mutex_lock(&call->listener->loop.mutex);
    kvtr_drop_bytes(call);
    free(call->bytes);
    call->bytes = NULL;
    call->receiving = true;
    kvtr_feed(call);
    kvc_mutex_unlock(&call->listener->loop.mutex);
}

bool kvtr_rdma_unrecv(kvt_call *base)
{
    kvtr_rcall *call = (kvtr_rcall *)base;
    kvc_mutex_lock(&call->listener->loop.mutex);
    bool taken = call->receiving && !call->reading && !kvtr_has_news(call);
    if (taken)
        call->receiving = false;
    kvc_mutex_unlock(&call->listener->loop.mutex);
    return taken;
}

/* What else the request says lies in the call's arena. */
void kvtr_rdma_drop_data(kvt_call *base)
{
    kvtr_rcall *call = (kvtr_rcall *)base;
    base->req.data = NULL;
    base->req.n_data = 0;
    kvc_mutex_lock(&call->listener->loop.mutex);
    kvtr_drop_bytes(call);
    free(call->bytes);
    call->bytes = NULL;
    kvc_mutex_unlock(&call->listener->loop.mutex);
}
