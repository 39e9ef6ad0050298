/*
 * peer.c: a connection at the server: its frames become calls and what happens to them.
 *
 * On its loop's thread, which alone reads the socket and alone tells the server (on_call, sent,
 * got), with no lock held. What a frame may do is checked before a byte of its body is kept.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/metrics.h"
#include "shm_server.h"
#include "wire/wire.h"

/* ---- frames that the transport sends by itself ------------------------------------------------
 */

/* With the peer's lock held. False: memory is out, so the connection ends; parts are the caller's.
 */
static bool queue_own(kvti_peer *peer, const kvc_frame *frame, const kvti_parts *parts)
{
    kvti_out *out = peer->closed ? NULL : kvti_out_create(frame, parts);
    if (out == NULL) {
        peer->pipe.broken = true;
        return false;
    }
    kvti_pipe_queue(&peer->pipe, out);
    kvti_peer_wake(peer);
    return true;
}

void kvti_peer_tell(kvti_peer *peer, kvc_frame_kind kind, uint64_t call)
{
    kvc_frame frame = {.kind = kind, .call = call};
    kvti_parts none = {0};
    (void)queue_own(peer, &frame, &none);
}

void kvti_peer_end(kvti_peer *peer, uint64_t call, kvc_method method, kvc_status status,
                   const char *why)
{
    kvti_parts parts = {.detail = why};
    kvc_frame frame = {.kind = KVC_FRAME_END,
                       .call = call,
                       .method = method,
                       .status = status,
                       .retry_after_ms = status == KVC_AGAIN ? KVTI_RETRY_MS : 0,
                       .detail_bytes = (uint32_t)strlen(why)};
    (void)queue_own(peer, &frame, &parts);
}

/* Two rings, as long as all rings of the listener together stay within their share of the bytes of
 * requests that it may hold: else the connection works without. */
static void make_rings(kvti_peer *peer)
{
    kvt_listener *listener = peer->loop->listener;
    const kvt_listen_opts *opts = &listener->opts;
    kvc_mutex_lock(&listener->lock);
    bool room = listener->ring_bytes + 2 * opts->ring_bytes <=
                listener->budget->max_bytes / KVTI_SHM_RING_SHARE;
    if (room)
        listener->ring_bytes += peer->ring_bytes = 2 * opts->ring_bytes;
    kvc_mutex_unlock(&listener->lock);
    if (!room || kvti_ring_create(opts->ring_bytes, &peer->ring) != KVC_OK)
        return;
    if (kvti_ring_create(opts->ring_bytes, &peer->reply_ring) != KVC_OK)
        kvti_ring_unmap(&peer->ring);
}

/* The server's hello, with the rings where there are any. */
static bool greet(kvti_peer *peer, const uint8_t *body, size_t body_bytes)
{
    const kvt_listen_opts *opts = &peer->loop->listener->opts;
    uint8_t bytes[KVC_HELLO_BYTES];
    kvc_hello theirs, ours = {.version = KVC_FRAME_VERSION,
                              .max_message_bytes = opts->max_message_bytes,
                              .max_calls = opts->max_calls};
    if (peer->greeted || kvc_hello_decode(body, body_bytes, &theirs) != KVC_OK)
        return false;
    peer->greeted = true;
    make_rings(peer);
    const int fds[2] = {peer->ring.fd, peer->reply_ring.fd};
    ours.spare[0] = peer->ring.len_bytes;
    ours.spare[1] = peer->reply_ring.len_bytes;
    kvc_hello_encode(&ours, bytes);
    kvc_frame frame = {.kind = KVC_FRAME_HELLO, .head_bytes = sizeof(bytes)};
    kvti_parts parts = {.head = bytes, .fds = fds, .n_fds = ours.spare[0] > 0 ? 2 : 0};
    kvc_mutex_lock(&peer->lock);
    bool queued = queue_own(peer, &frame, &parts);
    if (queued && ours.spare[1] > 0)
        peer->pipe.ring = &peer->reply_ring;
    kvc_mutex_unlock(&peer->lock);
    if (queued)
        peer->ring.fd = peer->reply_ring.fd = -1; /* the frame closes them */
    return queued;
}

/* ---- what a frame may do ----------------------------------------------------------------------
 */

static kvc_status admit(kvti_peer *peer, const kvc_frame *frame, const char **why_p)
{
    kvt_listener *listener = peer->loop->listener;
    uint64_t len_bytes = (uint64_t)frame->head_bytes + frame->data_bytes;
    kvc_status status = KVC_OK;
    kvc_mutex_lock(&listener->lock);
    if (listener->draining) {
        *why_p = "the server is draining";
        status = KVC_CLOSED;
    } else if (listener->n_calls >= listener->opts.max_calls) {
        *why_p = "too many calls in flight";
        status = KVC_AGAIN;
    } else if (frame->data_bytes > listener->opts.max_message_bytes) {
        *why_p = "the message's data is longer than max_message_bytes";
        status = KVC_INVALID;
    } else if (!kvti_charge(listener, len_bytes)) {
        *why_p = "too many request bytes in flight";
        status = KVC_AGAIN;
    } else {
        listener->n_calls++;
        peer->charged_bytes = len_bytes;
    }
    kvc_mutex_unlock(&listener->lock);
    return status;
}

/* When the call of a request that comes now is over. */
static uint64_t deadline_of(const kvti_peer *peer, const kvc_frame *frame)
{
    uint64_t give_up_ns = peer->loop->listener->opts.max_deadline_ns;
    uint64_t left_ns = frame->deadline_ns;
    return kvc_now_ns() + (left_ns == 0 || left_ns > give_up_ns ? give_up_ns : left_ns);
}

/* The body of the frame that has begun is charged already, so it may not take for ever. A client
 * that has given the call up owes the rest of it: hence the time of a handshake beside. */
static void await_body(kvti_peer *peer, uint64_t deadline_ns)
{
    kvti_loop *loop = peer->loop;
    peer->body_late_ns = deadline_ns + loop->listener->opts.handshake_ns;
    if (loop->next_late_ns == 0 || peer->body_late_ns < loop->next_late_ns)
        loop->next_late_ns = peer->body_late_ns;
}

static kvti_shmcall *find_call(kvti_peer *peer, uint64_t id)
{
    kvti_node *node = kvti_table_find(&peer->calls, id);
    return node == NULL ? NULL : (kvti_shmcall *)((uint8_t *)node - offsetof(kvti_shmcall, node));
}

/* A further message of a call. False: it may not come now. */
static bool admit_message(kvti_peer *peer, const kvc_frame *frame)
{
    kvc_mutex_lock(&peer->lock);
    const kvti_shmcall *call = find_call(peer, frame->call);
    bool dead = call == NULL || call->gone || call->answered;
    bool right = dead || (kvt_streams_request(call->method) && !call->has_next &&
                          !call->half_closed && call->method == frame->method);
    uint64_t deadline_ns = dead ? kvc_now_ns() : call->base.deadline_ns;
    kvc_mutex_unlock(&peer->lock);
    await_body(peer, deadline_ns);
    bool last = (frame->flags & KVC_FRAME_LAST) != 0;
    uint64_t len_bytes = (uint64_t)frame->head_bytes + frame->data_bytes;
    if (!right || (last && len_bytes > 0))
        return false;
    peer->refused = KVC_OK;
    if (dead) {
        peer->refused = KVC_CANCELLED;
    } else if (frame->data_bytes > peer->loop->listener->opts.max_message_bytes) {
        peer->why = "the message's data is longer than max_message_bytes";
        peer->refused = KVC_INVALID;
    } else if (!kvti_charge(peer->loop->listener, len_bytes)) {
        peer->why = "too many request bytes in flight";
        peer->refused = KVC_AGAIN;
    } else {
        peer->charged_bytes = len_bytes;
    }
    return true;
}

static bool begin_frame(void *arg, const kvc_frame *frame, bool *keep_p)
{
    kvti_peer *peer = arg;
    peer->refused = KVC_OK;
    peer->charged_bytes = 0;
    *keep_p = false;
    if ((frame->flags & KVTI_SHM_HAS_FDS) != 0 ||
        ((frame->flags & KVC_FRAME_ELSEWHERE) != 0 &&
         !kvti_ring_holds(&peer->ring, frame->spare[0], frame->data_bytes)))
        return false;
    switch (frame->kind) {
    case KVC_FRAME_HELLO:
        *keep_p = true;
        return !peer->greeted && frame->head_bytes <= KVTI_SHM_HELLO_MAX;
    case KVC_FRAME_REQUEST: {
        kvc_mutex_lock(&peer->lock);
        bool known = find_call(peer, frame->call) != NULL;
        kvc_mutex_unlock(&peer->lock);
        if (!peer->greeted || known || frame->call == 0)
            return false;
        await_body(peer, deadline_of(peer, frame));
        peer->refused = admit(peer, frame, &peer->why);
        *keep_p = peer->refused == KVC_OK;
        return true;
    }
    case KVC_FRAME_MESSAGE:
        if (!admit_message(peer, frame))
            return false;
        *keep_p = peer->refused == KVC_OK;
        return true;
    case KVC_FRAME_CANCEL:
    case KVC_FRAME_CREDIT:
        return true;
    default:
        return false;
    }
}

/* ---- what a frame does ------------------------------------------------------------------------
 */

static kvc_status decode(kvti_shmcall *call, size_t len_bytes, const char **why_p)
{
    struct iovec piece = {call->bytes, len_bytes};
    return kvc_wire_decode_request(call->method, &piece, 1, &call->base.arena, &call->base.req,
                                   why_p);
}

static kvti_shmcall *create_call(kvti_peer *peer, const kvc_frame *frame, uint8_t *body)
{
    kvti_shmcall *call = calloc(1, sizeof(*call));
    if (call == NULL)
        return NULL;
    call->base.ops = &kvt_shm_ops;
    call->base.tenant = "default";
    call->base.peer = &peer->base;
    call->base.deadline_ns = deadline_of(peer, frame);
    call->method = call->base.req.method = frame->method;
    call->node.id = frame->call;
    call->peer = peer;
    call->bytes = body;
    call->len_bytes = peer->charged_bytes;
    kvc_arena_init(&call->base.arena, KVTI_ARENA_BYTES);
    atomic_fetch_add(&peer->refs, 1);
    kvc_mutex_lock(&peer->lock);
    kvti_table_add(&peer->calls, &call->node);
    if (kvt_streams_request(call->method))
        kvti_peer_tell(peer, KVC_FRAME_CREDIT, call->node.id);
    kvc_mutex_unlock(&peer->lock);
    if (peer->loop->next_late_ns == 0 || call->base.deadline_ns < peer->loop->next_late_ns)
        peer->loop->next_late_ns = call->base.deadline_ns;
    if (peer->loop->next_rest_ns == 0) /* its answer may go through the ring */
        peer->loop->next_rest_ns = kvc_now_ns() + kvti_shm_rest_ns;
    return call;
}

/* A call that the server does not see. */
static void refuse(kvti_peer *peer, const kvc_frame *frame, kvc_status status, const char *why)
{
    kvti_count_refusal(status);
    kvc_mutex_lock(&peer->lock);
    kvti_peer_end(peer, frame->call, frame->method, status, why);
    kvc_mutex_unlock(&peer->lock);
}

/* A message that was counted in, but will not be kept; of_call: with its call. */
static void count_out(kvti_peer *peer, bool of_call)
{
    kvt_listener *listener = peer->loop->listener;
    kvti_uncharge(listener, peer->charged_bytes);
    peer->charged_bytes = 0;
    if (!of_call)
        return;
    kvc_mutex_lock(&listener->lock);
    listener->n_calls--;
    kvc_cond_broadcast(&listener->changed);
    kvc_mutex_unlock(&listener->lock);
}

static void take_request(kvti_peer *peer, const kvc_frame *frame, uint8_t *body)
{
    kvt_listener *listener = peer->loop->listener;
    const char *why = NULL;
    if (peer->refused != KVC_OK) {
        refuse(peer, frame, peer->refused, peer->why);
        return;
    }
    kvti_shmcall *call = create_call(peer, frame, body);
    if (call == NULL) {
        free(body);
        count_out(peer, true);
        refuse(peer, frame, KVC_AGAIN, "memory for a call is out");
        return;
    }
    peer->charged_bytes = 0; /* the call's now */
    kvc_status status = decode(call, (size_t)frame->head_bytes + frame->data_bytes, &why);
    if (status == KVC_OK) {
        listener->opts.on_call(listener->opts.arg, &call->base);
    } else {
        kvti_count_refusal(status);
        kvti_shm_reply(&call->base, status, why, 0, NULL, NULL, 0);
    }
}

static void take_message(kvti_peer *peer, const kvc_frame *frame, uint8_t *body)
{
    kvc_mutex_lock(&peer->lock);
    kvti_shmcall *call = find_call(peer, frame->call);
    bool dead = call == NULL || call->gone || call->answered || peer->refused == KVC_CANCELLED;
    if (!dead && (frame->flags & KVC_FRAME_LAST) != 0) {
        call->half_closed = true;
    } else if (!dead) {
        call->has_next = true;
        call->next_bytes = body;
        call->next_len_bytes = peer->charged_bytes;
        call->next_head_bytes = (uint64_t)frame->head_bytes + frame->data_bytes;
        call->next_status = peer->refused;
        call->next_why = peer->why;
        peer->charged_bytes = 0;
        body = NULL;
    }
    if (!dead && kvti_call_has_next(call))
        kvti_call_list(call);
    kvc_mutex_unlock(&peer->lock);
    free(body);
    count_out(peer, false);
}

/* False: it is for a message that has not left, with which a stream would run ahead of a client
 * that does not read. */
static bool take_credit(kvti_peer *peer, const kvc_frame *frame)
{
    kvc_mutex_lock(&peer->lock);
    kvti_shmcall *call = find_call(peer, frame->call);
    bool sending = call != NULL && call->sending, waits = false;
    for (const kvti_out *out = peer->pipe.first; sending && out != NULL && !waits; out = out->next)
        waits = out->owner == call;
    if (sending && !waits) {
        call->sending = false;
        call->sent_due = call->sent_ok = true;
        kvti_call_list(call);
    }
    kvc_mutex_unlock(&peer->lock);
    return !waits;
}

static void take_cancel(kvti_peer *peer, const kvc_frame *frame)
{
    kvti_out *over = NULL;
    kvc_mutex_lock(&peer->lock);
    kvti_shmcall *call = find_call(peer, frame->call);
    if (call != NULL)
        kvti_call_gone(call, &over);
    kvc_mutex_unlock(&peer->lock);
    kvti_shm_over(over);
}

static bool end_frame(void *arg, const kvc_frame *frame, uint8_t *body)
{
    kvti_peer *peer = arg;
    if ((frame->flags & KVC_FRAME_ELSEWHERE) != 0) {
        kvti_ring_take(&peer->ring, frame->spare[0], frame->data_bytes,
                       body == NULL ? NULL : body + frame->head_bytes);
        KVC_COUNT_N(staged_bytes, frame->data_bytes);
    }
    bool right = true;
    switch (frame->kind) {
    case KVC_FRAME_HELLO:
        right = greet(peer, body, frame->head_bytes);
        free(body);
        break;
    case KVC_FRAME_REQUEST:
        take_request(peer, frame, body);
        break;
    case KVC_FRAME_MESSAGE:
        take_message(peer, frame, body);
        break;
    case KVC_FRAME_CREDIT:
        right = take_credit(peer, frame);
        break;
    default:
        take_cancel(peer, frame);
    }
    return right;
}

/* ---- what the loop asks for -------------------------------------------------------------------
 */

kvti_peer *kvti_peer_create(kvti_loop *loop, int fd)
{
    struct ucred cred = {0};
    socklen_t cred_bytes = sizeof(cred);
    kvti_peer *peer = calloc(1, sizeof(*peer));
    if (peer == NULL)
        return NULL;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &cred_bytes) != 0) {
        free(peer);
        return NULL;
    }
    kvti_pipe_open(&peer->pipe, fd, false);
    peer->base = (kvt_peer){.uid = cred.uid, .gid = cred.gid, .pid = cred.pid};
    peer->loop = loop;
    peer->ring.fd = peer->reply_ring.fd = -1;
    peer->events_end = &peer->events;
    peer->began_ns = kvc_now_ns();
    atomic_init(&peer->refs, 1);
    kvc_mutex_init(&peer->lock, KVC_RANK_TRANSPORT);
    return peer;
}

void kvti_peer_unref(kvti_peer *peer)
{
    kvt_listener *listener = peer->loop->listener;
    if (atomic_fetch_sub(&peer->refs, 1) > 1)
        return;
    if (listener->opts.peer_gone != NULL && peer->greeted)
        listener->opts.peer_gone(listener->opts.arg, peer->base.id);
    uint64_t ring_bytes = peer->ring_bytes;
    kvti_ring_unmap(&peer->ring);
    kvti_ring_unmap(&peer->reply_ring);
    kvc_mutex_fini(&peer->lock);
    free(peer);
    kvc_mutex_lock(&listener->lock);
    listener->ring_bytes -= ring_bytes;
    listener->n_peers--;
    kvti_peers_give(listener->opts.peers, 1);
    kvc_cond_broadcast(&listener->changed);
    kvc_mutex_unlock(&listener->lock);
}

void kvti_peer_gone(kvti_peer *peer, const char *why)
{
    kvti_out *over = NULL;
    if (peer->closed)
        return;
    KVC_LOG_DEBUG(SHM, "connection %llu of process %d ends: %s", (unsigned long long)peer->base.id,
                  (int)peer->base.pid, why);
    bool in_request = peer->pipe.in_body && peer->pipe.frame.kind == KVC_FRAME_REQUEST;
    if (peer->pipe.in_body && peer->refused == KVC_OK)
        count_out(peer, in_request && peer->greeted);
    kvc_mutex_lock(&peer->lock);
    peer->closed = true;
    for (kvti_node *node = peer->calls.all; node != NULL; node = node->next)
        kvti_call_gone((kvti_shmcall *)((uint8_t *)node - offsetof(kvti_shmcall, node)), &over);
    kvti_pipe_drop_all(&peer->pipe, &over);
    /* By hand: closed alone, it would stay in the epoll set while a forked process has it too. */
    if (peer->pipe.fd >= 0)
        (void)epoll_ctl(peer->loop->epoll_fd, EPOLL_CTL_DEL, peer->pipe.fd, NULL);
    kvti_pipe_close(&peer->pipe);
    kvc_mutex_unlock(&peer->lock);
    kvti_shm_over(over);
}

void kvti_peer_readable(kvti_peer *peer)
{
    const kvti_reader reader = {begin_frame, end_frame, peer};
    const char *why = "";
    if (!peer->closed && !kvti_pipe_read(&peer->pipe, &reader, &why))
        kvti_peer_gone(peer, why);
}

/* What is due to a call. */
typedef struct event {
    kvti_shmcall *call;
    bool sent, sent_ok, got, message;
} event;

static bool next_event(kvti_peer *peer, event *e)
{
    *e = (event){0};
    kvc_mutex_lock(&peer->lock);
    kvti_shmcall *call = peer->events;
    if (call != NULL) {
        peer->events = call->event;
        if (peer->events == NULL)
            peer->events_end = &peer->events;
        call->listed = false;
        *e = (event){call, call->sent_due, call->sent_ok, kvti_call_has_next(call), false};
        call->sent_due = false;
    }
    if (e->got) {
        call->receiving = false;
        e->message = call->has_next;
        if (e->message) {
            call->bytes = call->next_bytes;
            call->len_bytes = call->next_len_bytes;
            call->next_bytes = NULL;
            call->next_len_bytes = 0;
            call->has_next = false;
            if (!call->gone)
                kvti_peer_tell(peer, KVC_FRAME_CREDIT, call->node.id);
        }
    }
    kvc_mutex_unlock(&peer->lock);
    return call != NULL;
}

static void deliver_got(kvti_shmcall *call, bool message)
{
    const char *why = "there are no more messages";
    kvc_status status = KVC_CLOSED;
    if (message) {
        status = call->next_status;
        why = call->next_why;
        if (status == KVC_OK)
            status = decode(call, (size_t)call->next_head_bytes, &why);
        if (status != KVC_OK)
            kvti_count_refusal(status);
    }
    call->base.got(&call->base, status, why);
}

void kvti_peer_work(kvti_peer *peer)
{
    event e;
    while (next_event(peer, &e)) {
        if (e.sent)
            e.call->base.sent(&e.call->base, e.sent_ok);
        if (e.got) /* then the call lives, for nobody may answer before */
            deliver_got(e.call, e.message);
    }
    kvti_out *over = NULL;
    kvc_mutex_lock(&peer->lock);
    kvti_pipe_flush(&peer->pipe, &over);
    bool broken = peer->pipe.broken && !peer->closed;
    kvc_mutex_unlock(&peer->lock);
    kvti_shm_over(over);
    if (broken)
        kvti_peer_gone(peer, "writing failed");
}

/* With the lock held: time is up. The client hears it, unless half of its answer is out. */
static void end_late(kvti_peer *peer, kvti_shmcall *call, kvti_out **over_p)
{
    const kvti_out *first = peer->pipe.first;
    bool told = first != NULL && first->owner == call && first->begun && first->ends;
    kvti_call_gone(call, over_p);
    if (!told)
        kvti_peer_end(peer, call->node.id, call->method, KVC_TIMED_OUT, "the deadline passed");
}

uint64_t kvti_peer_late(kvti_peer *peer, uint64_t now_ns)
{
    uint64_t first_ns = 0, hand_ns = peer->began_ns + peer->loop->listener->opts.handshake_ns;
    kvti_out *over = NULL;
    if (!peer->greeted && !peer->closed && now_ns >= hand_ns)
        kvti_peer_gone(peer, "it has not spoken");
    if (!peer->greeted)
        first_ns = hand_ns;
    bool half = peer->greeted && !peer->closed && peer->pipe.in_body;
    if (half && now_ns >= peer->body_late_ns)
        kvti_peer_gone(peer, "half a message came, and no more in time");
    else if (half)
        first_ns = peer->body_late_ns;
    kvc_mutex_lock(&peer->lock);
    for (kvti_node *node = peer->calls.all; node != NULL; node = node->next) {
        kvti_shmcall *call = (kvti_shmcall *)((uint8_t *)node - offsetof(kvti_shmcall, node));
        if (call->gone)
            continue;
        if (call->base.deadline_ns <= now_ns)
            end_late(peer, call, &over);
        else if (first_ns == 0 || call->base.deadline_ns < first_ns)
            first_ns = call->base.deadline_ns;
    }
    kvc_mutex_unlock(&peer->lock);
    kvti_shm_over(over);
    return first_ns;
}
