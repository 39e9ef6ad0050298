/*
 * call.c: one request at the server, from its frame until the server has it, and its messages.
 *
 * A call is admitted by count and bytes before its payload is read from the client's memory. It is
 * the server's from on_call to reply; the client may have gone meanwhile, then the answer is
 * dropped. Callbacks run on the loop's thread with the mutex free.
 */
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/metrics.h"
#include "server.h"
#include "wire/wire.h"

static const char too_long[] = "the message's data is longer than max_message_bytes";
static const char too_many_bytes[] = "too many request bytes in flight";

static kvtr_rcall **bucket_of(kvtr_link *link, uint64_t id)
{
    return (kvtr_rcall **)&link->calls[id % KVTI_CALL_BUCKETS];
}

static kvtr_rcall *find_call(kvtr_link *link, uint64_t id)
{
    kvtr_rcall *call = *bucket_of(link, id);
    while (call != NULL && call->id != id)
        call = call->same;
    return call;
}

void kvtr_forget(kvtr_rcall *call)
{
    if (call->link == NULL)
        return;
    kvtr_rcall **at = bucket_of(call->link, call->id);
    while (*at != call)
        at = &(*at)->same;
    *at = call->same;
    call->link = NULL;
}

void kvtr_leave(kvtr_rcall *call)
{
    kvt_listener *listener = call->listener;
    kvtr_forget(call);
    kvtr_drop_bytes(call);
    if (call->prev != NULL)
        call->prev->next = call->next;
    else
        listener->calls = call->next;
    if (call->next != NULL)
        call->next->prev = call->prev;
    listener->n_calls--;
    kvc_cond_broadcast(&listener->loop.changed);
}

void kvtr_drop_bytes(kvtr_rcall *call)
{
    kvtr_buf_put(call->data);
    call->data = NULL;
    kvti_budget_give(call->listener->budget, call->charged_bytes);
    call->charged_bytes = 0;
}

void kvtr_rcall_free(kvtr_rcall *call)
{
    kvc_arena_reset(&call->base.arena);
    free(call->next_bytes);
    free(call->bytes);
    free(call);
}

void kvtr_queue_call(kvtr_rcall *call)
{
    kvt_listener *listener = call->listener;
    if (call->in_queue)
        return;
    call->in_queue = true;
    call->queued = NULL;
    *listener->queue_end = call;
    listener->queue_end = &call->queued;
    kvtr_loop_wake(&listener->loop);
}

void kvtr_feed(kvtr_rcall *call)
{
    if (kvtr_has_news(call))
        kvtr_queue_call(call);
}

/* With the mutex held: the server hears that nobody waits any more. */
static void set_gone(kvtr_rcall *call)
{
    call->gone = true;
    __atomic_store_n(&call->base.cancelled, 1, __ATOMIC_RELEASE);
    if (call->sending) {
        call->sending = false;
        call->sent_due = true;
        call->sent_ok = false;
        kvtr_queue_call(call);
    }
    kvtr_feed(call);
}

void kvtr_end_early(kvtr_rcall *call, kvc_status status, const char *why)
{
    if (call->gone)
        return;
    if (call->reading) { /* the client's memory is read until then */
        call->early_status = status;
        call->early_why = why;
    } else if (call->link != NULL) {
        kvtr_send_end(call->link, call->id, call->method, status, why, 0);
        kvtr_forget(call);
    }
    set_gone(call);
}

/* ---- a request arrives ----------------------------------------------------------------------- */

/* OK: the bytes are charged. */
static kvc_status admit_bytes(kvt_listener *listener, const kvc_frame *frame, const char **why_p)
{
    uint64_t len_bytes = (uint64_t)frame->head_bytes + frame->data_bytes;
    *why_p = too_long;
    if (frame->data_bytes > listener->opts.max_message_bytes)
        return KVC_INVALID;
    *why_p = too_many_bytes;
    return kvti_budget_take(listener->budget, len_bytes) ? KVC_OK : KVC_AGAIN;
}

static void give_bytes(kvt_listener *listener, const kvc_frame *frame)
{
    kvti_budget_give(listener->budget, (uint64_t)frame->head_bytes + frame->data_bytes);
}

/* With the mutex held: the call has the charged bytes from now on, or they are given back; sees to
 * the READ, if there is one to be. */
static kvc_status take_bytes(kvtr_rcall *call, const kvc_frame *frame, const char **why_p)
{
    kvtr_read *read = NULL;
    bool full;
    call->data_bytes = frame->data_bytes;
    if ((frame->flags & KVC_FRAME_ELSEWHERE) != 0 && frame->data_bytes > 0) {
        *why_p = too_many_bytes;
        call->data = kvtr_buf_get(call->link->domain, frame->data_bytes, &full);
        if (call->data == NULL) {
            give_bytes(call->listener, frame);
            return KVC_AGAIN;
        }
        read = calloc(1, sizeof(*read));
        *why_p = "out of memory";
        if (read == NULL) {
            give_bytes(call->listener, frame);
            kvtr_buf_put(call->data);
            call->data = NULL;
            return KVC_NO_MEMORY;
        }
        *read = (kvtr_read){.buf = call->data,
                            .len_bytes = frame->data_bytes,
                            .remote_addr = frame->spare[0],
                            .remote_key = (uint32_t)frame->spare[1],
                            .arg = call};
    }
    call->charged_bytes = (uint64_t)frame->head_bytes + frame->data_bytes;
    call->reading = read != NULL;
    if (read != NULL)
        kvtr_start_read(call->link, read);
    return KVC_OK;
}

/* With the mutex held: in the tables of listener and link, or refused. */
static kvc_status admit(kvtr_rcall *call, kvtr_link *link, const kvc_frame *frame,
                        const char **why_p)
{
    kvt_listener *listener = call->listener;
    *why_p = "the server is draining";
    if (listener->draining)
        return KVC_CLOSED;
    *why_p = "too many calls in flight";
    if (listener->n_calls >= listener->opts.max_calls)
        return KVC_AGAIN;
    kvc_status status = admit_bytes(listener, frame, why_p);
    if (status != KVC_OK)
        return status;
    call->link = link;
    status = take_bytes(call, frame, why_p);
    if (status != KVC_OK)
        return status;
    call->same = *bucket_of(link, call->id);
    *bucket_of(link, call->id) = call;
    call->next = listener->calls;
    if (call->next != NULL)
        call->next->prev = call;
    listener->calls = call;
    listener->n_calls++;
    link->used_ns = kvc_now_ns();
    uint64_t deadline_ns = call->base.deadline_ns;
    if (listener->next_deadline_ns == 0 || deadline_ns < listener->next_deadline_ns)
        listener->next_deadline_ns = deadline_ns;
    return KVC_OK;
}

static kvtr_rcall *create_call(kvt_listener *listener, const kvc_frame *frame, const uint8_t *body)
{
    kvtr_rcall *call = calloc(1, sizeof(*call));
    size_t len_bytes = kvc_frame_body_bytes(frame);
    uint8_t *bytes = malloc(len_bytes + 1);
    if (call == NULL || bytes == NULL) {
        free(call);
        free(bytes);
        return NULL;
    }
    memcpy(bytes, body, len_bytes);
    call->bytes = bytes;
    call->len_bytes = len_bytes;
    call->listener = listener;
    call->id = frame->call;
    call->method = call->base.req.method = frame->method;
    call->base.ops = &kvt_rdma_ops;
    call->base.tenant = "default";
    uint64_t left_ns = listener->opts.max_deadline_ns;
    if (frame->deadline_ns != 0 && frame->deadline_ns < left_ns)
        left_ns = frame->deadline_ns;
    call->base.deadline_ns = kvc_now_ns() + left_ns;
    if ((frame->flags & KVC_FRAME_ELSEWHERE) == 0) {
        call->landing_addr = frame->spare[0];
        call->landing_key = (uint32_t)frame->spare[1];
        call->landing_bytes = (uint32_t)(frame->spare[1] >> 32);
    }
    kvc_arena_init(&call->base.arena, KVTI_ARENA_BYTES);
    return call;
}

static kvc_status decode(kvtr_rcall *call, const char **why_p)
{
    struct iovec pieces[2] = {{call->bytes, call->len_bytes}};
    uint32_t n_pieces = 1;
    if (call->data != NULL)
        pieces[n_pieces++] = (struct iovec){call->data->bytes, call->data_bytes};
    kvc_status status = kvc_wire_decode_request(call->method, pieces, n_pieces, &call->base.arena,
                                                &call->base.req, why_p);
    if (status == KVC_OK && call->base.req.data_bytes > call->listener->opts.max_message_bytes) {
        *why_p = too_long;
        return KVC_INVALID;
    }
    return status;
}

/* All of a request is here. */
static void dispatch(kvtr_rcall *call)
{
    const char *why = NULL;
    kvc_mutex_lock(&call->listener->loop.mutex);
    call->dispatched = true;
    bool gone = call->gone;
    if (gone)
        kvtr_leave(call);
    else if (kvt_streams_request(call->method))
        kvtr_send_plain(call->link, KVC_FRAME_CREDIT, call->id);
    kvc_mutex_unlock(&call->listener->loop.mutex);
    if (gone) {
        kvtr_rcall_free(call);
        return;
    }
    kvc_status status = decode(call, &why);
    if (status == KVC_OK) {
        call->listener->opts.on_call(call->listener->opts.arg, &call->base);
        return;
    }
    kvti_count_refusal(status);
    kvtr_rdma_reply(&call->base, status, why, 0, NULL, NULL, 0);
}

static bool on_request(kvtr_link *link, const kvc_frame *frame, const uint8_t *body)
{
    kvt_listener *listener = (kvt_listener *)link->loop;
    const char *why = "out of memory";
    kvc_status status = KVC_NO_MEMORY;
    kvtr_rcall *call = create_call(listener, frame, body);
    kvc_mutex_lock(&listener->loop.mutex);
    bool twice = frame->call == 0 || find_call(link, frame->call) != NULL;
    if (!twice && call != NULL)
        status = admit(call, link, frame, &why);
    bool reading = call != NULL && call->reading;
    if (status != KVC_OK && !twice) {
        kvti_count_refusal(status); /* before the client can have heard of it */
        kvtr_send_end(link, frame->call, frame->method, status, why,
                      status == KVC_AGAIN ? KVTI_RETRY_MS : 0);
    }
    kvc_mutex_unlock(&listener->loop.mutex);
    if (status != KVC_OK) {
        if (call != NULL)
            kvtr_rcall_free(call);
    } else if (!reading) {
        dispatch(call);
    }
    return !twice;
}

/* ---- further messages ------------------------------------------------------------------------ */

/* With the mutex held. */
static bool on_message(kvtr_rcall *call, const kvc_frame *frame, const uint8_t *body)
{
    size_t len_bytes = kvc_frame_body_bytes(frame);
    if (!kvt_streams_request(call->method) || call->half_closed || call->has_next)
        return false;
    if ((frame->flags & KVC_FRAME_LAST) != 0) {
        call->half_closed = true;
    } else {
        call->next_bytes = malloc(len_bytes + 1);
        if (call->next_bytes == NULL)
            return false;
        memcpy(call->next_bytes, body, len_bytes);
        call->next_frame = *frame;
        call->has_next = true;
    }
    kvtr_feed(call);
    return true;
}

static void on_credit(kvtr_rcall *call)
{
    if (!call->sending)
        return;
    call->sending = false;
    call->sent_due = call->sent_ok = true;
    kvtr_queue_call(call);
}

bool kvtr_on_frame(kvtr_link *link, const kvc_frame *frame, uint8_t *body)
{
    bool ok = true;
    if (frame->kind == KVC_FRAME_REQUEST)
        return on_request(link, frame, body);
    kvc_mutex_lock(&link->loop->mutex);
    kvtr_rcall *call = find_call(link, frame->call); /* NULL: answered already */
    if (frame->kind == KVC_FRAME_MESSAGE)
        ok = call == NULL || on_message(call, frame, body);
    else if (frame->kind == KVC_FRAME_CREDIT && call != NULL)
        on_credit(call);
    else if (frame->kind == KVC_FRAME_CANCEL && call != NULL)
        kvtr_end_early(call, KVC_CANCELLED, "cancelled by the client");
    else if (frame->kind != KVC_FRAME_CREDIT && frame->kind != KVC_FRAME_CANCEL)
        ok = false;
    kvc_mutex_unlock(&link->loop->mutex);
    return ok;
}

/* A message of a stream is here; the client may push the next. */
static void deliver_got(kvtr_rcall *call)
{
    const char *why;
    kvc_status status = decode(call, &why);
    if (status != KVC_OK)
        kvti_count_refusal(status);
    call->base.got(&call->base, status, why);
}

/* With the mutex held: the message that was pushed becomes the call's. */
static kvc_status take_next(kvtr_rcall *call, const char **why_p)
{
    kvc_status status = admit_bytes(call->listener, &call->next_frame, why_p);
    free(call->bytes);
    call->bytes = call->next_bytes;
    call->len_bytes = kvc_frame_body_bytes(&call->next_frame);
    call->next_bytes = NULL;
    call->has_next = false;
    if (status == KVC_OK)
        status = take_bytes(call, &call->next_frame, why_p);
    return status;
}

static void tell_next(kvtr_rcall *call)
{
    const char *why = "there are no more messages";
    kvc_status status = KVC_CLOSED;
    kvc_mutex_lock(&call->listener->loop.mutex);
    if (call->has_next && !call->gone) {
        status = take_next(call, &why);
        if (status == KVC_OK && !call->reading)
            kvtr_send_plain(call->link, KVC_FRAME_CREDIT, call->id);
        if (status != KVC_OK)
            kvti_count_refusal(status);
    }
    bool reading = call->reading;
    if (!reading)
        call->receiving = false;
    kvc_mutex_unlock(&call->listener->loop.mutex);
    if (reading)
        return;
    if (status == KVC_OK)
        deliver_got(call);
    else
        call->base.got(&call->base, status, why);
}

void kvtr_on_read(kvtr_link *link, kvtr_read *read)
{
    kvtr_rcall *call = read->arg;
    free(read);
    kvc_mutex_lock(&link->loop->mutex);
    call->reading = false;
    if (call->gone && call->link != NULL) {
        kvtr_send_end(link, call->id, call->method, call->early_status, call->early_why, 0);
        kvtr_forget(call);
    } else if (call->dispatched && !call->gone) {
        kvtr_send_plain(link, KVC_FRAME_CREDIT, call->id);
    }
    bool first = !call->dispatched, gone = call->gone;
    if (!first)
        call->receiving = false;
    kvc_mutex_unlock(&link->loop->mutex);
    if (first)
        dispatch(call);
    else if (gone)
        call->base.got(&call->base, KVC_CLOSED, "the client has gone");
    else
        deliver_got(call);
}

/* ---- ends ------------------------------------------------------------------------------------ */

/* With the mutex held. A READ that will never end; true: the call is nobody's. */
static bool lose_read(kvtr_rcall *call)
{
    call->reading = false;
    if (call->dispatched) {
        kvtr_feed(call);
        return false;
    }
    kvtr_leave(call);
    return true;
}

void kvtr_on_down(kvtr_link *link, kvtr_read *reads)
{
    kvtr_rcall *calls = NULL;
    kvc_mutex_lock(&link->loop->mutex);
    for (uint32_t b = 0; b < KVTI_CALL_BUCKETS; b++) {
        for (kvtr_rcall *call; (call = link->calls[b]) != NULL;) {
            kvtr_forget(call);
            set_gone(call);
        }
    }
    while (reads != NULL) {
        kvtr_read *read = reads;
        kvtr_rcall *call = read->arg;
        reads = read->next;
        free(read);
        if (lose_read(call)) {
            call->same = calls;
            calls = call;
        }
    }
    kvc_mutex_unlock(&link->loop->mutex);
    while (calls != NULL) {
        kvtr_rcall *call = calls;
        calls = call->same;
        kvtr_rcall_free(call);
    }
}

/* With the mutex held: ends what is late. */
static void end_late(kvt_listener *listener)
{
    uint64_t now_ns = kvc_now_ns(), first_ns = 0;
    if (listener->next_deadline_ns == 0 || now_ns < listener->next_deadline_ns)
        return;
    for (kvtr_rcall *call = listener->calls; call != NULL; call = call->next) {
        if (call->gone)
            continue;
        if (call->base.deadline_ns <= now_ns)
            kvtr_end_early(call, KVC_TIMED_OUT, "the deadline passed");
        else if (first_ns == 0 || call->base.deadline_ns < first_ns)
            first_ns = call->base.deadline_ns;
    }
    listener->next_deadline_ns = first_ns;
}

uint64_t kvtr_on_turn(kvtr_loop *loop)
{
    kvt_listener *listener = (kvt_listener *)loop;
    for (;;) {
        kvc_mutex_lock(&loop->mutex);
        end_late(listener);
        kvtr_rcall *call = listener->queue;
        uint64_t next_ns = listener->next_deadline_ns;
        if (call == NULL) {
            kvc_mutex_unlock(&loop->mutex);
            return next_ns;
        }
        listener->queue = call->queued;
        if (listener->queue == NULL)
            listener->queue_end = &listener->queue;
        call->in_queue = false;
        bool sent = call->sent_due, ok = call->sent_ok, news = kvtr_has_news(call);
        call->sent_due = false;
        kvc_mutex_unlock(&loop->mutex);
        if (sent)
            call->base.sent(&call->base, ok);
        if (news) /* then the call lives, for nobody may answer before */
            tell_next(call);
    }
}
