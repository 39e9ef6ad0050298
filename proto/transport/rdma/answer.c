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
    free(out->places);
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

/* The slices of a message, and where they go. */
typedef struct payload {
    const kvt_slice *slices;
    uint32_t n_slices;
    kvtr_place *places; /* [n_places] NULL: nowhere but behind the frame; out's once it has them */
    uint32_t n_places;
    kvtr_buf *copy; /* of the slices, where they cannot be gathered; likewise */
    bool kept;      /* out has the slices */
} payload;

/* The places of the client's that data_bytes go to: its landing, or rooms for rows. Mutex free. */
static void find_places(kvtr_rcall *call, const kvc_reply *reply, uint32_t data_bytes, payload *p)
{
    if (call->runs != NULL) {
        (void)kvtr_reply_cut(call->method, reply, call->n_items, data_bytes, call->runs,
                             call->n_runs, &p->places, &p->n_places);
        call->n_items += kvtr_reply_items(call->method, reply);
    } else if (data_bytes <= call->landing_bytes) {
        p->places = calloc(1, sizeof(*p->places));
        p->n_places = p->places == NULL ? 0 : 1;
        if (p->places != NULL)
            *p->places = (kvtr_place){call->landing_addr, data_bytes};
    }
}

/* The most work requests of a chain. One to many places is as long as it is; others are copied
 * rather than that they take all of the queue. */
static uint32_t max_chain(const kvtr_link *link, const payload *p)
{
    bool long_one = p->n_places > 1 && link->sq_depth > 4 * KVTI_MAX_READS;
    return long_one ? link->sq_depth - KVTI_MAX_READS - 1 : link->sq_depth / 2;
}

/* With the mutex held: slices can be written from where they are. */
static bool can_gather(kvtr_link *link, const payload *p)
{
    uint32_t n = kvtr_chain_wrs(link, p->slices, p->n_slices, p->places, p->n_places);
    return n > 0 && n <= max_chain(link, p);
}

/* Mutex free; others may break the link meanwhile. A payload that cannot be gathered is copied to
 * one buffer, if there is one. */
static void copy_payload(const kvtr_rcall *call, uint32_t whole_bytes, uint32_t data_bytes,
                         payload *p)
{
    kvtr_loop *loop = &call->listener->loop;
    bool full;
    kvc_mutex_lock(&loop->mutex);
    kvtr_link *link = call->link;
    if (link != NULL && data_bytes > 0 && p->n_places > 0 && p->n_places <= max_chain(link, p) &&
        !kvtr_fits_fragment(link, whole_bytes) && !can_gather(link, p))
        p->copy = kvtr_buf_get(link->domain, data_bytes, &full);
    kvc_mutex_unlock(&loop->mutex);
    uint8_t *at = p->copy == NULL ? NULL : p->copy->bytes;
    for (uint32_t i = 0; at != NULL && i < p->n_slices; i++) {
        if (p->slices[i].len_bytes > 0)
            memcpy(at, p->slices[i].base, p->slices[i].len_bytes);
        at += p->slices[i].len_bytes;
    }
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
static kvtr_out *create_small(const kvc_frame *frame, const void *head, const kvt_slice *slices,
                              uint32_t n_slices)
{
    struct iovec data[KVT_MAX_SLICES];
    for (uint32_t i = 0; i < n_slices; i++)
        data[i] = (struct iovec){(void *)(uintptr_t)slices[i].base, slices[i].len_bytes};
    return kvtr_out_create(frame, head, NULL, data, n_slices);
}

/* With the mutex held: the frame with its payload in fragments, which are copied from the slices as
 * they leave: so what waits for the client is the server's to bound. */
static kvtr_out *create_whole(kvtr_rcall *call, const kvc_frame *frame, const void *head,
                              payload *p)
{
    kvtr_out *out = kvtr_out_create(frame, head, NULL, NULL, 0);
    if (out != NULL && out->tail_bytes > 0 && !keep_slices(call, out, p->slices, p->n_slices)) {
        kvtr_out_free(out);
        return NULL;
    }
    p->kept = out != NULL && out->tail_bytes > 0;
    return out;
}

/* With the mutex held: the frame and the WRITEs that go before it. */
static kvtr_out *create_chain(kvtr_rcall *call, kvc_frame *frame, const void *head, payload *p)
{
    bool gather = p->copy == NULL && can_gather(call->link, p);
    if (!gather && p->copy == NULL)
        return create_whole(call, frame, head, p);
    frame->flags |= KVC_FRAME_ELSEWHERE;
    if (call->runs != NULL)
        frame->flags |= KVTI_PLACED;
    else
        frame->spare[0] = call->landing_addr;
    kvtr_out *out = kvtr_out_create(frame, head, NULL, NULL, 0);
    if (out == NULL || (gather && !keep_slices(call, out, p->slices, p->n_slices))) {
        if (out != NULL)
            kvtr_out_free(out);
        return NULL;
    }
    out->chain = true;
    out->data_bytes = frame->data_bytes;
    out->places = p->places;
    out->n_places = p->n_places;
    out->remote_key = call->landing_key;
    out->buf = p->copy;
    p->places = NULL;
    p->copy = NULL;
    p->kept = gather;
    return out;
}

/* With the mutex held: sends a frame with its payload, or breaks the link for want of memory. */
static void send_frame(kvtr_rcall *call, kvc_frame *frame, const void *head, payload *p)
{
    size_t whole_bytes = (size_t)frame->head_bytes + frame->data_bytes;
    kvtr_out *out;
    if (kvtr_fits_fragment(call->link, whole_bytes))
        out = create_small(frame, head, p->slices, p->n_slices);
    else if (frame->data_bytes == 0 || p->n_places == 0)
        out = create_whole(call, frame, head, p);
    else
        out = create_chain(call, frame, head, p);
    send_of(call, out, frame->kind);
}

/* With the mutex held: what out did not take. */
static void drop_payload(payload *p)
{
    kvtr_buf_put(p->copy);
    free(p->places);
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

/* Mutex free: where the payload of an encoded frame goes, and a copy of it where there has to be.
 */
static void prepare(kvtr_rcall *call, const kvc_reply *reply, const kvc_frame *frame, payload *p)
{
    static const kvc_reply empty;
    find_places(call, reply == NULL ? &empty : reply, frame->data_bytes, p);
    copy_payload(call, frame->head_bytes + frame->data_bytes, frame->data_bytes, p);
}

void kvtr_rdma_reply(kvt_call *base, kvc_status status, const char *detail, uint32_t retry_after_ms,
                     const kvc_reply *reply, const kvt_slice *slices, uint32_t n_slices)
{
    kvtr_rcall *call = (kvtr_rcall *)base;
    kvtr_loop *loop = &call->listener->loop;
    kvc_frame frame = {.kind = KVC_FRAME_END, .method = call->method, .call = call->id};
    const void *head = NULL;
    payload p = {.slices = slices, .n_slices = n_slices};
    kvc_arena arena;
    KVC_ASSERT(n_slices <= KVT_MAX_SLICES && !call->sending);
    kvc_arena_init(&arena, KVTI_ARENA_BYTES);
    bool whole = status == KVC_OK && !kvt_streams_reply(call->method);
    if (whole && encode(call, reply, slices, n_slices, &arena, &head, &frame) != KVC_OK) {
        whole = false;
        status = KVC_IO;
        detail = "the server's answer is beyond the protocol's limits";
    }
    if (whole)
        prepare(call, reply, &frame, &p);
    kvc_mutex_lock(&loop->mutex);
    if (call->link != NULL && whole)
        send_frame(call, &frame, head, &p);
    else if (call->link != NULL)
        send_of(call,
                create_end(call->id, call->method, status, detail, retry_after_ms, call->summed),
                KVC_FRAME_END);
    drop_payload(&p);
    /* Slices that stay ours are released below, and the listener must not go before. */
    call->listener->n_lent += p.kept ? 0 : n_slices;
    kvt_listener *listener = call->listener;
    kvtr_leave(call);
    kvc_mutex_unlock(&loop->mutex);
    if (!p.kept && n_slices > 0) {
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
    payload p = {.slices = slices, .n_slices = n_slices};
    kvc_arena arena;
    KVC_ASSERT(n_slices <= KVT_MAX_SLICES && !call->sending && base->sent != NULL);
    kvc_arena_init(&arena, KVTI_ARENA_BYTES);
    kvc_status status = encode(call, reply, slices, n_slices, &arena, &head, &frame);
    if (status == KVC_OK)
        prepare(call, reply, &frame, &p);
    kvc_mutex_lock(&loop->mutex);
    kvt_listener *listener = call->listener;
    if (status == KVC_OK && !call->gone && call->link != NULL) {
        call->sending = true;
        send_frame(call, &frame, head, &p);
    } else if (status == KVC_OK) {
        call->sent_due = true;
        call->sent_ok = false;
        kvtr_queue_call(call);
    }
    drop_payload(&p);
    listener->n_lent += p.kept ? 0 : n_slices;
    kvc_mutex_unlock(&loop->mutex);
    if (!p.kept && n_slices > 0) {
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
