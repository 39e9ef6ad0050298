/*
 * server.c: the listening end: one thread ("kvt-inproc") hands out requests in their order.
 *
 * A call belongs to the server from on_call to reply; its op may be let go meanwhile, then the
 * answer is dropped. Everything but a call's own request is guarded by the transport's mutex.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/log.h"
#include "inproc_internal.h"
#include "wire/wire.h"

/* What a call in the queue is there for. */
typedef struct event {
    kvti_incall *call;
    bool arrived, sent, sent_ok, got;
    bool message; /* with got: its next message is in bytes */
} event;

/* With the mutex held: the server takes the message that was pushed, if there is one. */
static void take_pushed(event *e)
{
    kvti_incall *call = e->call;
    call->receiving = false;
    e->message = call->next_bytes != NULL;
    if (!e->message)
        return;
    call->bytes = call->next_bytes;
    call->len_bytes = call->next_len_bytes;
    call->next_bytes = NULL;
    if (call->op != NULL)
        kvti_inproc_pushed(call->op, true);
}

/* False: the listener is being closed. */
static bool next_event(kvt_listener *listener, event *e)
{
    *e = (event){0};
    kvti_inproc_lock();
    while (listener->queue == NULL && !listener->stopping)
        kvc_cond_wait(&listener->work, kvti_inproc_mutex());
    kvti_incall *call = listener->queue;
    if (call != NULL) {
        listener->queue = call->queued;
        if (listener->queue == NULL)
            listener->queue_end = &listener->queue;
        call->in_queue = false;
        e->call = call;
        e->arrived = !call->dispatched;
        e->sent = call->sent_due;
        e->sent_ok = call->sent_ok;
        e->got = kvti_inproc_has_next(call);
        call->dispatched = true;
        call->sent_due = false;
        if (e->got)
            take_pushed(e);
        if (e->arrived && call->op != NULL && call->op->pushing)
            kvti_inproc_pushed(call->op, true);
    }
    kvti_inproc_unlock();
    return call != NULL;
}

static kvc_status decode(kvt_listener *listener, kvti_incall *call, const char **why_p)
{
    struct iovec piece = {call->bytes, call->len_bytes};
    kvc_status status =
        kvc_wire_decode_request(call->method, &piece, 1, &call->base.arena, &call->base.req, why_p);
    if (status != KVC_OK || call->base.req.data_bytes <= listener->opts.max_message_bytes)
        return status;
    *why_p = "the message's data is longer than max_message_bytes";
    return KVC_INVALID;
}

/* Counts the message that came against the listener's limit. AGAIN: it is reached. */
static kvc_status charge(kvt_listener *listener, kvti_incall *call, const char **why_p)
{
    kvti_inproc_lock();
    bool room = kvti_budget_take(listener->budget, call->len_bytes);
    if (!room)
        call->len_bytes = 0;
    kvti_inproc_unlock();
    *why_p = "too many request bytes in flight";
    return room ? KVC_OK : KVC_AGAIN;
}

static void deliver_got(kvt_listener *listener, kvti_incall *call, bool message)
{
    const char *why = "there are no more messages";
    kvc_status status = KVC_CLOSED;
    if (message) {
        status = charge(listener, call, &why);
        if (status == KVC_OK)
            status = decode(listener, call, &why);
        if (status != KVC_OK)
            kvti_count_refusal(status);
    }
    call->base.got(&call->base, status, why);
}

static void dispatch(kvt_listener *listener, const event *e)
{
    kvti_incall *call = e->call;
    const char *why = NULL;
    if (e->sent)
        call->base.sent(&call->base, e->sent_ok);
    if (e->got) /* then the call lives, for nobody may answer before */
        deliver_got(listener, call, e->message);
    if (!e->arrived)
        return;
    kvc_status status = decode(listener, call, &why);
    if (status == KVC_OK) {
        listener->opts.on_call(listener->opts.arg, &call->base);
    } else {
        kvti_count_refusal(status);
        kvti_inproc_reply(&call->base, status, why, 0, NULL, NULL, 0);
    }
}

static void run_listener(void *arg)
{
    kvt_listener *listener = arg;
    event e;
    while (next_event(listener, &e))
        dispatch(listener, &e);
}

kvc_status kvti_inproc_listen(const kvt_listen_opts *opts, kvt_listener **listener_p)
{
    *listener_p = NULL;
    kvt_init();
    if (opts->size_bytes != sizeof(*opts) || opts->on_call == NULL ||
        opts->max_message_bytes > KVC_MAX_VALUE_BYTES || kvti_inproc_check_uri(opts->uri) != KVC_OK)
        return KVC_INVALID;
    kvt_listener *listener = calloc(1, sizeof(*listener));
    if (listener == NULL)
        return KVC_NO_MEMORY;
    listener->opts = *opts;
    (void)snprintf(listener->uri, sizeof(listener->uri), "%s", opts->uri);
    listener->opts.uri = listener->uri;
    listener->queue_end = &listener->queue;
    if (listener->opts.max_message_bytes == 0)
        listener->opts.max_message_bytes = KVC_MAX_VALUE_BYTES;
    if (listener->opts.max_calls == 0)
        listener->opts.max_calls = KVTI_MAX_CALLS;
    if (listener->opts.max_inflight_bytes == 0)
        listener->opts.max_inflight_bytes = KVTI_MAX_INFLIGHT_BYTES;
    listener->budget = kvti_budget(&listener->opts, &listener->own_budget);
    if (listener->opts.max_deadline_ns == 0)
        listener->opts.max_deadline_ns = KVTI_MAX_DEADLINE_NS;
    kvc_cond_init(&listener->work);
    kvc_cond_init(&listener->changed);
    kvc_status status = kvc_thread_start(&listener->thread, "kvt-inproc", run_listener, listener);
    if (status != KVC_OK)
        goto err_listener;
    kvti_inproc_lock();
    bool taken = kvti_inproc_find(listener->uri) != NULL;
    if (!taken) {
        listener->next = *kvti_inproc_listeners();
        *kvti_inproc_listeners() = listener;
    }
    listener->stopping = taken;
    kvc_cond_signal(&listener->work);
    kvti_inproc_unlock();
    status = KVC_IO;
    if (taken)
        goto err_thread;
    *listener_p = listener;
    return KVC_OK;

err_thread:
    KVC_LOG_WARN(INPROC, "cannot listen on %s: the name is taken", opts->uri);
    kvc_thread_join(&listener->thread);
err_listener:
    kvc_cond_fini(&listener->changed);
    kvc_cond_fini(&listener->work);
    free(listener);
    return status;
}

const char *kvti_inproc_listener_uri(const kvt_listener *listener)
{
    return listener->uri;
}

void kvti_inproc_set_serving(kvt_listener *listener, bool serving)
{
    kvti_inproc_lock();
    listener->serving = serving && !listener->draining;
    kvti_inproc_unlock();
}

kvc_status kvti_inproc_enqueue(kvt_listener *listener, kvti_incall *call, const char **why_p)
{
    *why_p = "the server is draining";
    if (listener->draining)
        return KVC_CLOSED;
    *why_p = "too many calls in flight";
    if (listener->n_calls >= listener->opts.max_calls)
        return KVC_AGAIN;
    *why_p = "too many request bytes in flight";
    if (!kvti_budget_take(listener->budget, call->len_bytes))
        return KVC_AGAIN;
    uint64_t give_up_ns = kvc_now_ns() + listener->opts.max_deadline_ns;
    uint64_t deadline_ns = call->base.deadline_ns;
    call->base.deadline_ns =
        deadline_ns == 0 || deadline_ns > give_up_ns ? give_up_ns : deadline_ns;
    listener->n_calls++;
    call->listener = listener;
    call->next = listener->calls;
    if (call->next != NULL)
        call->next->prev = call;
    listener->calls = call;
    call->in_queue = true;
    *listener->queue_end = call;
    listener->queue_end = &call->queued;
    kvc_cond_signal(&listener->work);
    return KVC_OK;
}

/* With the mutex held. */
static void leave_listener(kvti_incall *call)
{
    kvt_listener *listener = call->listener;
    if (call->prev != NULL)
        call->prev->next = call->next;
    else
        listener->calls = call->next;
    if (call->next != NULL)
        call->next->prev = call->prev;
    listener->n_calls--;
    kvti_budget_give(listener->budget, call->len_bytes);
    kvc_cond_broadcast(&listener->changed);
}

static kvc_status build_answer(kvti_incall *call, const kvc_reply *reply, const kvt_slice *slices,
                               uint32_t n_slices, kvti_answer *answer_p)
{
    kvc_arena arena; /* not the call's, which would grow with a stream */
    kvc_reply whole = reply == NULL ? (kvc_reply){0} : *reply;
    const void *head;
    size_t head_bytes;
    whole.method = call->method;
    whole.data = NULL;
    whole.data_bytes = 0;
    for (uint32_t i = 0; i < n_slices; i++)
        whole.data_bytes += slices[i].len_bytes;
    kvc_arena_init(&arena, KVTI_ARENA_BYTES);
    kvc_status status = kvc_wire_encode_reply(&whole, &arena, &head, &head_bytes);
    if (status == KVC_OK) {
        answer_p->head = malloc(head_bytes + 1);
        answer_p->slices = calloc(n_slices + 1, sizeof(*slices));
        if (answer_p->head == NULL || answer_p->slices == NULL)
            status = KVC_NO_MEMORY;
    }
    if (status == KVC_OK) {
        memcpy(answer_p->head, head, head_bytes);
        answer_p->head_bytes = head_bytes;
        if (n_slices > 0)
            memcpy(answer_p->slices, slices, n_slices * sizeof(*slices));
        answer_p->n_slices = n_slices;
        answer_p->lender = call->listener;
    } else {
        kvti_answer_free(answer_p);
        KVC_LOG_ERROR(INPROC, "the server's answer to %s does not encode: %s",
                      kvc_method_name(whole.method), kvc_status_name(status));
    }
    kvc_arena_reset(&arena);
    return status;
}

/* Slices that the caller has handed over, from here until they are released. */
static void lend(kvt_listener *listener, uint32_t n_slices)
{
    kvti_inproc_lock();
    listener->n_lent += n_slices;
    kvti_inproc_unlock();
}

kvc_status kvti_inproc_send(kvt_call *base, const kvc_reply *reply, const kvt_slice *slices,
                            uint32_t n_slices)
{
    kvti_incall *call = (kvti_incall *)base;
    kvti_answer answer = {0};
    KVC_ASSERT(n_slices <= KVT_MAX_SLICES && !call->sending && base->sent != NULL);
    lend(call->listener, n_slices);
    kvc_status status = build_answer(call, reply, slices, n_slices, &answer);
    if (status != KVC_OK) {
        kvti_inproc_release(call->listener, slices, n_slices);
        return status;
    }
    kvti_inproc_lock();
    bool gone = call->op == NULL;
    if (gone) {
        kvti_inproc_sent(call, false);
    } else {
        call->sending = true;
        call->op->answer = answer;
        kvti_inproc_list(call->op);
    }
    kvti_inproc_unlock();
    if (gone)
        kvti_answer_free(&answer);
    return KVC_OK;
}

void kvti_inproc_recv(kvt_call *base)
{
    kvti_incall *call = (kvti_incall *)base;
    KVC_ASSERT(base->got != NULL && !call->receiving);
    kvc_arena_reset(&base->arena);
    free(call->bytes);
    call->bytes = NULL;
    base->req = (kvc_request){.method = call->method};
    kvti_inproc_lock();
    kvti_budget_give(call->listener->budget, call->len_bytes);
    call->len_bytes = 0;
    call->receiving = true;
    kvti_inproc_feed(call);
    kvti_inproc_unlock();
}

bool kvti_inproc_unrecv(kvt_call *base)
{
    kvti_incall *call = (kvti_incall *)base;
    kvti_inproc_lock();
    bool taken = call->receiving && !kvti_inproc_has_next(call);
    if (taken)
        call->receiving = false;
    kvti_inproc_unlock();
    return taken;
}

/* What else the request says lies in the call's arena. */
void kvti_inproc_drop_data(kvt_call *base)
{
    kvti_incall *call = (kvti_incall *)base;
    base->req.data = NULL;
    base->req.n_data = 0;
    free(call->bytes);
    call->bytes = NULL;
    kvti_inproc_lock();
    kvti_budget_give(call->listener->budget, call->len_bytes);
    call->len_bytes = 0;
    kvti_inproc_unlock();
}

void kvti_inproc_reply(kvt_call *base, kvc_status status, const char *detail,
                       uint32_t retry_after_ms, const kvc_reply *reply, const kvt_slice *slices,
                       uint32_t n_slices)
{
    kvti_incall *call = (kvti_incall *)base;
    kvt_listener *listener = call->listener;
    kvti_answer answer = {0};
    KVC_ASSERT(n_slices <= KVT_MAX_SLICES && !call->sending);
    lend(listener, n_slices);
    if (status == KVC_OK && !kvt_streams_reply(call->method)) {
        status = build_answer(call, reply, slices, n_slices, &answer);
        if (status != KVC_OK) {
            status = KVC_IO;
            detail = "the server's answer is beyond the protocol's limits";
        }
    }
    bool kept = answer.head != NULL;
    kvti_inproc_lock();
    kvti_inop *op = call->op;
    if (op != NULL) {
        op->call = NULL;
        op->answer = answer;
        kvti_inproc_finish(op, status, detail, status == KVC_AGAIN ? retry_after_ms : 0);
    }
    leave_listener(call);
    kvti_inproc_unlock();
    /* Without slices of its own, the call no longer keeps the listener. */
    if (!kept && n_slices > 0)
        kvti_inproc_release(listener, slices, n_slices);
    else if (op == NULL)
        kvti_answer_free(&answer);
    kvti_incall_free(call);
}

/* With the mutex held. New transfers find nobody; who still waits is told. */
static void leave_registry(kvt_listener *listener)
{
    kvt_listener **at = kvti_inproc_listeners();
    while (*at != NULL && *at != listener)
        at = &(*at)->next;
    if (*at == listener)
        *at = listener->next;
    for (kvti_incall *call = listener->calls; call != NULL; call = call->next) {
        if (call->op != NULL)
            kvti_inproc_finish(call->op, KVC_UNAVAILABLE, "the server has shut down", 0);
    }
}

void kvti_inproc_drain(kvt_listener *listener, uint64_t deadline_ns)
{
    kvti_inproc_lock();
    listener->draining = true;
    listener->serving = false;
    while (listener->n_calls > 0 && !kvc_expired(deadline_ns))
        (void)kvc_cond_wait_until(&listener->changed, kvti_inproc_mutex(), deadline_ns);
    leave_registry(listener);
    kvti_inproc_unlock();
}

void kvti_inproc_listener_close(kvt_listener *listener)
{
    if (listener == NULL)
        return;
    kvti_inproc_drain(listener, 1);
    kvti_inproc_lock();
    while (listener->n_calls > 0 || listener->n_lent > 0)
        kvc_cond_wait(&listener->changed, kvti_inproc_mutex());
    listener->stopping = true;
    kvc_cond_signal(&listener->work);
    kvti_inproc_unlock();
    kvc_thread_join(&listener->thread);
    kvc_cond_fini(&listener->changed);
    kvc_cond_fini(&listener->work);
    free(listener);
}
