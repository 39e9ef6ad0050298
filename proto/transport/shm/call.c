/*
 * call.c: a request at the server, from the handler's side: answers and messages of streams.
 *
 * Any thread. A call is freed once it was answered and the answer has left, or was taken back
 * because its client has gone; until then it counts as under way, so that a drain lets answers out.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/assert.h"
#include "base/log.h"
#include "shm_server.h"
#include "wire/wire.h"

bool kvti_charge(kvt_listener *listener, uint64_t len_bytes)
{
    return kvti_budget_take(listener->budget, len_bytes);
}

void kvti_uncharge(kvt_listener *listener, uint64_t len_bytes)
{
    kvti_budget_give(listener->budget, len_bytes);
}

static void drop_bytes(kvti_shmcall *call)
{
    kvti_uncharge(call->peer->loop->listener, call->len_bytes);
    call->len_bytes = 0;
    free(call->bytes);
    call->bytes = NULL;
}

/* It was answered, and nothing of it is queued. */
static void free_call(kvti_shmcall *call)
{
    kvti_peer *peer = call->peer;
    kvt_listener *listener = peer->loop->listener;
    kvc_mutex_lock(&peer->lock);
    kvti_table_remove(&peer->calls, &call->node);
    KVC_ASSERT(!call->listed);
    kvc_mutex_unlock(&peer->lock);
    drop_bytes(call);
    kvti_uncharge(listener, call->next_len_bytes);
    kvc_arena_reset(&call->base.arena);
    free(call->next_bytes);
    free(call);
    kvc_mutex_lock(&listener->lock);
    listener->n_calls--;
    kvc_cond_broadcast(&listener->changed);
    kvc_mutex_unlock(&listener->lock);
    kvti_peer_unref(peer);
}

void kvti_shm_over(kvti_out *over)
{
    while (over != NULL) {
        kvti_out *next = over->next;
        kvti_shmcall *ended = over->ends ? (kvti_shmcall *)(uintptr_t)over->owner : NULL;
        over->next = NULL;
        kvti_out_free(over);
        if (ended != NULL)
            free_call(ended);
        over = next;
    }
}

void kvti_call_list(kvti_shmcall *call)
{
    kvti_peer *peer = call->peer;
    if (call->listed)
        return;
    call->listed = true;
    call->event = NULL;
    *peer->events_end = call;
    peer->events_end = &call->event;
    kvti_peer_wake(peer);
}

void kvti_call_gone(kvti_shmcall *call, kvti_out **over_p)
{
    if (call->gone)
        return;
    call->gone = true;
    __atomic_store_n(&call->base.cancelled, 1, __ATOMIC_RELEASE);
    kvti_pipe_drop(&call->peer->pipe, call, over_p);
    if (call->peer->pipe.broken && !call->peer->closed)
        kvti_peer_wake(call->peer);
    if (call->sending) {
        call->sending = false;
        call->sent_due = true;
        call->sent_ok = false;
        kvti_call_list(call);
    }
    if (kvti_call_has_next(call))
        kvti_call_list(call);
}

/* Queues and sends; with the peer's lock held. */
static void queue_out(kvti_peer *peer, kvti_out *out, kvti_out **over_p)
{
    kvti_pipe_queue(&peer->pipe, out);
    if (!peer->pipe.blocked)
        kvti_pipe_flush(&peer->pipe, over_p);
    if (peer->pipe.blocked || peer->pipe.broken)
        kvti_peer_wake(peer);
}

/* A message's frame, which takes slices; NULL: *status_p says why, and slices are the caller's. */
static kvti_out *build(kvti_shmcall *call, kvc_frame *frame, const kvc_reply *reply,
                       const char *detail, const kvt_slice *slices, uint32_t n_slices,
                       kvc_status *status_p)
{
    kvc_arena arena; /* not the call's, which would grow with a stream */
    kvc_reply whole = reply == NULL ? (kvc_reply){0} : *reply;
    kvti_parts parts = {.owner = call, .slices = slices, .n_slices = n_slices, .detail = detail};
    const void *head = NULL;
    size_t head_bytes = 0;
    kvti_out *out = NULL;
    kvc_arena_init(&arena, KVTI_ARENA_BYTES);
    frame->method = whole.method = call->method;
    frame->call = call->node.id;
    whole.data = NULL;
    whole.data_bytes = 0;
    for (uint32_t i = 0; i < n_slices; i++)
        whole.data_bytes += slices[i].len_bytes;
    *status_p = kvc_wire_encode_reply(&whole, &arena, &head, &head_bytes);
    if (*status_p == KVC_OK && whole.data_bytes > KVC_FRAME_DATA_BYTES)
        *status_p = KVC_INVALID;
    if (*status_p == KVC_OK) {
        frame->head_bytes = (uint32_t)head_bytes;
        frame->data_bytes = (uint32_t)whole.data_bytes;
        parts.head = head;
        parts.fds = call->base.fds;
        parts.n_fds = frame->kind == KVC_FRAME_END ? call->base.n_fds : 0;
        out = kvti_out_create(frame, &parts);
        *status_p = out != NULL ? KVC_OK : KVC_NO_MEMORY;
    }
    if (*status_p != KVC_OK)
        KVC_LOG_ERROR(SHM, "the server's answer to %s does not encode: %s",
                      kvc_method_name(call->method), kvc_status_name(*status_p));
    kvc_arena_reset(&arena);
    return out;
}

static void release(const kvt_slice *slices, uint32_t n_slices)
{
    for (uint32_t i = 0; i < n_slices; i++) {
        if (slices[i].release != NULL)
            slices[i].release(slices[i].arg);
    }
}

kvc_status kvti_shm_send(kvt_call *base, const kvc_reply *reply, const kvt_slice *slices,
                         uint32_t n_slices)
{
    kvti_shmcall *call = (kvti_shmcall *)base;
    kvti_peer *peer = call->peer;
    kvc_frame frame = {.kind = KVC_FRAME_MESSAGE};
    kvti_out *over = NULL;
    kvc_status status;
    KVC_ASSERT(n_slices <= KVT_MAX_SLICES && !call->sending && base->sent != NULL);
    kvti_out *out = build(call, &frame, reply, NULL, slices, n_slices, &status);
    if (out == NULL) {
        release(slices, n_slices);
        return status;
    }
    kvti_peer_ref(peer); /* once it is unlocked, the call may end */
    kvc_mutex_lock(&peer->lock);
    if (call->gone) {
        call->sent_due = true;
        call->sent_ok = false;
        out->next = NULL;
        over = out;
        kvti_call_list(call);
    } else {
        call->sending = true;
        queue_out(peer, out, &over);
    }
    kvc_mutex_unlock(&peer->lock);
    kvti_shm_over(over);
    kvti_peer_unref(peer);
    return KVC_OK;
}

/* The frame that ends a call, whatever becomes of its reply. NULL: memory is out. */
static kvti_out *build_end(kvti_shmcall *call, kvc_status status, const char *detail,
                           uint32_t retry_after_ms, const kvc_reply *reply, const kvt_slice *slices,
                           uint32_t n_slices)
{
    kvc_frame frame = {.kind = KVC_FRAME_END};
    kvti_out *out = NULL;
    if (status == KVC_OK && !kvt_streams_reply(call->method)) {
        out = build(call, &frame, reply, NULL, slices, n_slices, &status);
        if (out != NULL)
            return out;
        status = KVC_IO;
        detail = "the server's answer is beyond the protocol's limits";
    }
    release(slices, n_slices);
    for (uint32_t i = 0; i < call->base.n_fds; i++)
        (void)close(call->base.fds[i]);
    size_t len = detail == NULL ? 0 : strlen(detail);
    kvti_parts parts = {.owner = call, .detail = detail};
    frame = (kvc_frame){
        .kind = KVC_FRAME_END,
        .method = call->method,
        .call = call->node.id,
        .status = status,
        .retry_after_ms = status == KVC_AGAIN ? retry_after_ms : 0,
        .detail_bytes = (uint32_t)(len > KVC_FRAME_DETAIL_BYTES ? KVC_FRAME_DETAIL_BYTES : len),
    };
    return kvti_out_create(&frame, &parts);
}

void kvti_shm_reply(kvt_call *base, kvc_status status, const char *detail, uint32_t retry_after_ms,
                    const kvc_reply *reply, const kvt_slice *slices, uint32_t n_slices)
{
    kvti_shmcall *call = (kvti_shmcall *)base;
    kvti_peer *peer = call->peer;
    kvti_out *over = NULL;
    KVC_ASSERT(n_slices <= KVT_MAX_SLICES && !call->sending);
    kvti_out *out = build_end(call, status, detail, retry_after_ms, reply, slices, n_slices);
    drop_bytes(call);
    kvc_arena_reset(&base->arena);
    kvti_peer_ref(peer);
    kvc_mutex_lock(&peer->lock);
    call->answered = true;
    bool gone = call->gone || out == NULL;
    bool lost = base->n_fds > 0 && (gone || out->n_fds == 0); /* see kvti_pipe_drop */
    if (!gone) {
        out->ends = true;
        queue_out(peer, out, &over);
    }
    if (lost || out == NULL) { /* without an answer its client would wait for ever */
        peer->pipe.broken = true;
        kvti_peer_wake(peer);
    }
    kvc_mutex_unlock(&peer->lock);
    if (gone) {
        kvti_out_free(out);
        free_call(call);
    } else {
        kvti_shm_over(over);
    }
    kvti_peer_unref(peer);
}

void kvti_shm_recv(kvt_call *base)
{
    kvti_shmcall *call = (kvti_shmcall *)base;
    KVC_ASSERT(base->got != NULL && !call->receiving);
    kvc_arena_reset(&base->arena);
    drop_bytes(call);
    base->req = (kvc_request){.method = call->method};
    kvti_peer *peer = call->peer;
    kvti_peer_ref(peer);
    kvc_mutex_lock(&peer->lock);
    call->receiving = true;
    if (kvti_call_has_next(call))
        kvti_call_list(call);
    kvc_mutex_unlock(&peer->lock);
    kvti_peer_unref(peer);
}

bool kvti_shm_unrecv(kvt_call *base)
{
    kvti_shmcall *call = (kvti_shmcall *)base;
    kvc_mutex_lock(&call->peer->lock);
    bool taken = call->receiving && !kvti_call_has_next(call);
    if (taken)
        call->receiving = false;
    kvc_mutex_unlock(&call->peer->lock);
    return taken;
}

/* What else the request says lies in the call's arena. */
void kvti_shm_drop_data(kvt_call *base)
{
    base->req.data = NULL;
    base->req.n_data = 0;
    drop_bytes((kvti_shmcall *)base);
}
