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

static kvtr_rcall **bucket_of(kvtr_link *link, uint64_t id)
{
    return (kvtr_rcall **)&link->calls[id % KVTI_CALL_BUCKETS];
}

kvtr_rcall *kvtr_find_call(kvtr_link *link, uint64_t id)
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
    kvti_budget_give(listener->budget, call->next_charged_bytes);
    call->next_charged_bytes = 0;
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
    free(call->runs);
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

/* ---- a request arrives ----------------------------------------------------------------------- */

/* With the mutex held: the client hears of an end that came while its payload was awaited. */
static void end_held_back(kvtr_rcall *call)
{
    call->reading = false;
    if (!call->gone || call->link == NULL)
        return;
    kvtr_send_end(call->link, call->id, call->method, call->early_status, call->early_why, 0,
                  call->summed);
    kvtr_forget(call);
}

/* With the mutex held: there is no buffer to read to, or nobody who wants it read. */
static kvc_status lose_buf(kvtr_rcall *call, const char **why_p)
{
    bool gone = call->gone;
    end_held_back(call);
    *why_p = gone ? "the client has gone" : kvtr_too_many_bytes;
    return gone ? KVC_CLOSED : KVC_AGAIN;
}

/* On the thread with the mutex held, which is free while memory is registered: the call's payload
 * is what the frame says, and charged_bytes are charged for it; sees to the READ, if there is one
 * to be. */
static kvc_status take_bytes(kvtr_rcall *call, const kvc_frame *frame, const char **why_p)
{
    bool full;
    call->data_bytes = frame->data_bytes;
    if ((frame->flags & KVC_FRAME_ELSEWHERE) == 0 || frame->data_bytes == 0)
        return KVC_OK;
    call->reading = true; /* nobody takes it back while the mutex is free */
    call->data = kvtr_buf_get(call->link->domain, frame->data_bytes, &full);
    if (call->data == NULL || call->gone)
        return lose_buf(call, why_p);
    kvtr_read *read = calloc(1, sizeof(*read));
    if (read == NULL) {
        call->reading = false;
        *why_p = "out of memory";
        return KVC_NO_MEMORY;
    }
    *read = (kvtr_read){.buf = call->data,
                        .len_bytes = frame->data_bytes,
                        .remote_addr = frame->spare[0],
                        .remote_key = (uint32_t)frame->spare[1],
                        .arg = call};
    kvtr_start_read(call->link, read);
    return KVC_OK;
}

/* With the mutex held: what was counted for the frame is the call's, which is in the tables of
 * listener and link; or it is given back. */
static kvc_status admit(kvtr_rcall *call, kvtr_link *link, const kvc_frame *frame,
                        const char **why_p)
{
    kvt_listener *listener = call->listener;
    kvtr_begun *begun = &link->begun;
    call->link = link;
    kvc_status status = take_bytes(call, frame, why_p);
    if (status != KVC_OK) {
        kvtr_drop_bytes(call);
        kvtr_begun_drop(link);
        return status;
    }
    call->charged_bytes = begun->held_bytes;
    begun->held_bytes = 0;
    begun->counted = false;
    call->same = *bucket_of(link, call->id);
    *bucket_of(link, call->id) = call;
    call->next = listener->calls;
    if (call->next != NULL)
        call->next->prev = call;
    listener->calls = call;
    link->used_ns = kvc_now_ns();
    kvtr_note_late(listener, call->base.deadline_ns);
    return KVC_OK;
}

/* The runs that came with a request for rows. False: no memory. */
static bool take_runs(kvtr_rcall *call, const kvc_frame *frame)
{
    uint32_t n = frame->data_bytes / KVTI_RUN_BYTES;
    if ((frame->flags & KVTI_PLACED) == 0)
        return true;
    call->runs = calloc(n + 1u, sizeof(*call->runs));
    if (call->runs == NULL)
        return false;
    kvtr_runs_decode(call->bytes + frame->head_bytes, n, call->runs);
    call->n_runs = n;
    call->landing_key = (uint32_t)frame->spare[1];
    return true;
}

static kvtr_rcall *create_call(kvtr_link *link, const kvc_frame *frame, const uint8_t *body)
{
    kvtr_rcall *call = calloc(1, sizeof(*call));
    uint8_t *bytes = kvtr_take_body(link, body);
    if (call != NULL)
        call->bytes = bytes;
    if (call == NULL || bytes == NULL || !take_runs(call, frame)) {
        free(call);
        free(bytes);
        return NULL;
    }
    call->len_bytes = kvc_frame_body_bytes(frame);
    call->listener = (kvt_listener *)link->loop;
    call->frame = *frame;
    call->summed = (frame->flags & KVTI_SUMMED) != 0;
    call->id = frame->call;
    call->method = call->base.req.method = frame->method;
    call->base.ops = &kvt_rdma_ops;
    call->base.tenant = "default";
    call->base.deadline_ns = kvtr_deadline_of(call->listener, frame);
    if ((frame->flags & (KVC_FRAME_ELSEWHERE | KVTI_PLACED)) == 0) {
        call->landing_addr = frame->spare[0];
        call->landing_key = (uint32_t)frame->spare[1];
        call->landing_bytes = (uint32_t)(frame->spare[1] >> 32);
    }
    kvc_arena_init(&call->base.arena, KVTI_ARENA_BYTES);
    return call;
}

/* OK: the sum of the frame that has data is right, or the client asked for none; else CORRUPT. */
static kvc_status check_sum(const kvtr_rcall *call, const kvc_frame *frame, const void *head,
                            const void *data, const char **why_p)
{
    *why_p = "a message without the sum that its request has";
    if (call->summed && (frame->flags & KVTI_SUMMED) == 0)
        return KVC_CORRUPT;
    struct iovec piece = {(void *)(uintptr_t)data, frame->data_bytes};
    return kvtr_check_sum(frame, head, &piece, 1, why_p);
}

static kvc_status decode(kvtr_rcall *call, const char **why_p)
{
    struct iovec pieces[2] = {{call->bytes, call->len_bytes}};
    uint32_t n_pieces = 1;
    const void *data =
        call->data != NULL ? call->data->bytes : call->bytes + call->frame.head_bytes;
    if (check_sum(call, &call->frame, call->bytes, data, why_p) != KVC_OK)
        return KVC_CORRUPT;
    if (call->runs != NULL) /* the data are the transport's */
        pieces[0].iov_len = call->frame.head_bytes;
    if (call->data != NULL)
        pieces[n_pieces++] = (struct iovec){call->data->bytes, call->data_bytes};
    kvc_status status = kvc_wire_decode_request(call->method, pieces, n_pieces, &call->base.arena,
                                                &call->base.req, why_p);
    if (status == KVC_OK && call->base.req.data_bytes > call->listener->opts.max_message_bytes) {
        *why_p = kvtr_too_long; /* some of it went as header */
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

static void on_request(kvtr_link *link, const kvc_frame *frame, const uint8_t *body)
{
    kvt_listener *listener = (kvt_listener *)link->loop;
    kvc_status status = link->begun.refused;
    const char *why = link->begun.why;
    kvtr_rcall *call = NULL;
    if (status == KVC_OK) {
        call = create_call(link, frame, body);
        status = call == NULL ? KVC_NO_MEMORY : KVC_OK;
        why = "out of memory";
    }
    kvc_mutex_lock(&listener->loop.mutex);
    if (status == KVC_OK)
        status = admit(call, link, frame, &why);
    else
        kvtr_begun_drop(link);
    bool reading = call != NULL && call->reading;
    if (status != KVC_OK) {
        kvti_count_refusal(status); /* before the client can have heard of it */
        kvtr_send_end(link, frame->call, frame->method, status, why,
                      status == KVC_AGAIN ? KVTI_RETRY_MS : 0, (frame->flags & KVTI_SUMMED) != 0);
    }
    kvc_mutex_unlock(&listener->loop.mutex);
    if (status == KVC_OK && !reading)
        dispatch(call);
    else if (status != KVC_OK && call != NULL)
        kvtr_rcall_free(call);
}

/* ---- further messages ------------------------------------------------------------------------ */

/* With the mutex held. False: no memory. What was charged for it goes with it. */
static bool on_message(kvtr_link *link, kvtr_rcall *call, const kvc_frame *frame,
                       const uint8_t *body)
{
    kvtr_begun *begun = &link->begun;
    if (call->gone || begun->refused == KVC_CANCELLED)
        return true;
    bool last = (frame->flags & KVC_FRAME_LAST) != 0;
    if (last && check_sum(call, frame, body, body, &call->next_why) != KVC_OK) {
        call->next_status = KVC_CORRUPT; /* perhaps another stream's: no end, but none that is told
                                            of as a good one */
        call->next_frame = *frame;
        call->has_next = true;
    } else if (last) {
        call->half_closed = true;
    } else {
        call->next_status = begun->refused;
        call->next_why = begun->why;
        if (begun->refused == KVC_OK) {
            call->next_bytes = kvtr_take_body(link, body);
            if (call->next_bytes == NULL)
                return false;
            call->next_charged_bytes = begun->held_bytes;
            begun->held_bytes = 0;
        }
        call->next_frame = *frame;
        call->has_next = true;
    }
    kvtr_feed(call);
    return true;
}

/* With the mutex held. False: the message that it speaks of has not left yet: a stream would run
 * ahead of a client that does not read. */
static bool on_credit(kvtr_rcall *call)
{
    if (!call->sending)
        return true;
    for (const kvtr_out *out = call->link->out; out != NULL; out = out->next) {
        if (out->message_of == call->id)
            return false;
    }
    call->sending = false;
    call->sent_due = call->sent_ok = true;
    kvtr_queue_call(call);
    return true;
}

bool kvtr_on_frame(kvtr_link *link, const kvc_frame *frame, uint8_t *body)
{
    bool ok = true;
    if (frame->kind == KVC_FRAME_REQUEST) {
        on_request(link, frame, body);
        return true;
    }
    kvc_mutex_lock(&link->loop->mutex);
    kvtr_rcall *call = kvtr_find_call(link, frame->call); /* NULL: answered already */
    if (frame->kind == KVC_FRAME_MESSAGE && call != NULL)
        ok = on_message(link, call, frame, body);
    else if (frame->kind == KVC_FRAME_CREDIT && call != NULL)
        ok = on_credit(call);
    else if (frame->kind == KVC_FRAME_CANCEL && call != NULL)
        kvtr_end_early(call, KVC_CANCELLED, "cancelled by the client");
    kvtr_begun_drop(link);
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
    kvt_listener *listener = call->listener;
    const kvc_frame *frame = &call->next_frame;
    kvc_status status = call->next_status;
    *why_p = call->next_why;
    free(call->bytes);
    call->frame = *frame;
    call->bytes = call->next_bytes;
    call->len_bytes = call->next_bytes == NULL ? 0 : kvc_frame_body_bytes(frame);
    call->charged_bytes = call->next_charged_bytes;
    call->next_bytes = NULL;
    call->next_charged_bytes = 0;
    call->has_next = false;
    bool elsewhere = (frame->flags & KVC_FRAME_ELSEWHERE) != 0;
    if (status == KVC_OK && elsewhere && !kvti_budget_take(listener->budget, frame->data_bytes)) {
        *why_p = kvtr_too_many_bytes;
        return KVC_AGAIN;
    }
    if (status == KVC_OK && elsewhere)
        call->charged_bytes += frame->data_bytes;
    return status == KVC_OK ? take_bytes(call, frame, why_p) : status;
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
    end_held_back(call);
    if (call->dispatched && !call->gone)
        kvtr_send_plain(link, KVC_FRAME_CREDIT, call->id);
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

/* ---- the thread's turn ----------------------------------------------------------------------- */

uint64_t kvtr_on_turn(kvtr_loop *loop)
{
    kvt_listener *listener = (kvt_listener *)loop;
    for (;;) {
        kvc_mutex_lock(&loop->mutex);
        kvtr_end_late(listener);
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
