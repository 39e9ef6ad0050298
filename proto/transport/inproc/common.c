/*
 * common.c: the state that both ends of the in-process transport share, and its table.
 *
 * The mutex lives as long as the process.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "inproc_internal.h"

static pthread_once_t once = PTHREAD_ONCE_INIT;
static kvc_mutex mutex;
static kvt_listener *listeners;

static void init_mutex(void)
{
    kvc_mutex_init(&mutex, KVC_RANK_TRANSPORT);
}

kvc_mutex *kvti_inproc_mutex(void)
{
    (void)pthread_once(&once, init_mutex);
    return &mutex;
}

void kvti_inproc_lock(void)
{
    kvc_mutex_lock(kvti_inproc_mutex());
}

void kvti_inproc_unlock(void)
{
    kvc_mutex_unlock(&mutex);
}

kvt_listener **kvti_inproc_listeners(void)
{
    return &listeners;
}

kvc_status kvti_inproc_check_uri(const char *uri)
{
    static const char scheme[] = "inproc://";
    size_t len = uri == NULL ? 0 : strlen(uri);
    if (len < sizeof(scheme) || len >= KVTI_NAME_BYTES ||
        strncmp(uri, scheme, sizeof(scheme) - 1) != 0)
        return KVC_INVALID;
    return KVC_OK;
}

kvt_listener *kvti_inproc_find(const char *uri)
{
    kvt_listener *listener = listeners;
    while (listener != NULL && strcmp(listener->uri, uri) != 0)
        listener = listener->next;
    return listener;
}

void kvti_inproc_finish(kvti_inop *op, kvc_status status, const char *detail,
                        uint32_t retry_after_ms)
{
    kvt_conn *conn = op->conn;
    if (op->call != NULL) {
        op->call->op = NULL;
        __atomic_store_n(&op->call->base.cancelled, 1, __ATOMIC_RELEASE);
        if (op->call->sending)
            kvti_inproc_sent(op->call, false);
        kvti_inproc_feed(op->call);
        op->call = NULL;
    }
    if (op->pushing)
        kvti_inproc_pushed(op, false);
    op->waiting = false;
    op->status = status;
    op->retry_after_ms = retry_after_ms;
    (void)snprintf(op->detail, sizeof(op->detail), "%s", detail == NULL ? "" : detail);
    if (op->prev != NULL)
        op->prev->next = op->next;
    else
        conn->waiting = op->next;
    if (op->next != NULL)
        op->next->prev = op->prev;
    kvti_inproc_list(op);
}

void kvti_inproc_list(kvti_inop *op)
{
    kvt_conn *conn = op->conn;
    if (op->listed)
        return;
    op->listed = true;
    op->finished = NULL;
    *conn->finished_end = op;
    conn->finished_end = &op->finished;
    kvc_cond_signal(&conn->work);
}

static void queue_call(kvti_incall *call)
{
    kvt_listener *listener = call->listener;
    if (call->in_queue)
        return;
    call->in_queue = true;
    call->queued = NULL;
    *listener->queue_end = call;
    listener->queue_end = &call->queued;
    kvc_cond_signal(&listener->work);
}

void kvti_inproc_sent(kvti_incall *call, bool ok)
{
    call->sending = false;
    call->sent_due = true;
    call->sent_ok = ok;
    queue_call(call);
}

void kvti_inproc_feed(kvti_incall *call)
{
    if (kvti_inproc_has_next(call))
        queue_call(call);
}

void kvti_inproc_pushed(kvti_inop *op, bool ok)
{
    op->pushing = false;
    op->pushed_due = true;
    op->pushed_ok = ok;
    kvti_inproc_list(op);
}

void kvti_incall_free(kvti_incall *call)
{
    kvc_arena_reset(&call->base.arena);
    free(call->next_bytes);
    free(call->bytes);
    free(call);
}

void kvti_inproc_release(kvt_listener *listener, const kvt_slice *slices, uint32_t n_slices)
{
    for (uint32_t i = 0; i < n_slices; i++) {
        if (slices[i].release != NULL)
            slices[i].release(slices[i].arg);
    }
    kvti_inproc_lock();
    listener->n_lent -= n_slices;
    kvc_cond_broadcast(&listener->changed);
    kvti_inproc_unlock();
}

void kvti_answer_free(kvti_answer *answer)
{
    if (answer->n_slices > 0)
        kvti_inproc_release(answer->lender, answer->slices, answer->n_slices);
    free(answer->head);
    free(answer->slices);
    *answer = (kvti_answer){0};
}

static const char *const schemes[] = {"inproc", NULL};

const kvt_ops kvt_inproc_ops = {
    .name = "inproc",
    .schemes = schemes,
    .listen = kvti_inproc_listen,
    .listener_uri = kvti_inproc_listener_uri,
    .set_serving = kvti_inproc_set_serving,
    .drain = kvti_inproc_drain,
    .listener_close = kvti_inproc_listener_close,
    .reply = kvti_inproc_reply,
    .send = kvti_inproc_send,
    .recv = kvti_inproc_recv,
    .unrecv = kvti_inproc_unrecv,
    .drop_data = kvti_inproc_drop_data,
    .connect = kvti_inproc_connect,
    .submit = kvti_inproc_submit,
    .push = kvti_inproc_push,
    .cancel = kvti_inproc_cancel,
    .conn_close = kvti_inproc_conn_close,
};
