/*
 * ends.c: calls and links that end before their time: given up, late, or lost with their link.
 *
 * With the loop's mutex held, on its thread but where it says otherwise. What waits for a client
 * (an answer, a message, half a request, a payload to be read) has a time past which the link goes,
 * since nothing else lets go of memory that the device may still touch.
 */
#include <stdlib.h>

#include "base/clock.h"
#include "server.h"

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
        kvtr_send_end(call->link, call->id, call->method, status, why, 0, call->summed);
        kvtr_forget(call);
    }
    set_gone(call);
}

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

/* Mutex free. */
void kvtr_on_down(kvtr_link *link, kvtr_read *reads)
{
    kvtr_rcall *calls = NULL;
    kvti_peers_give(((kvt_listener *)link->loop)->opts.peers, 1);
    kvc_mutex_lock(&link->loop->mutex);
    kvtr_begun_drop(link);
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

static void note_first(uint64_t *first_p, uint64_t ns)
{
    if (ns != 0 && (*first_p == 0 || ns < *first_p))
        *first_p = ns;
}

/* Breaks the link once now_ns has passed the earliest time by which something of it is due. */
static void look_at_link(kvtr_link *link, uint64_t now_ns, uint64_t *first_p)
{
    uint64_t out_ns = 0, body_ns = link->begun.in_body ? link->begun.late_ns : 0;
    for (const kvtr_out *out = link->out; out != NULL; out = out->next)
        note_first(&out_ns, out->late_ns);
    for (uint32_t i = 0; i < KVTI_N_SEND; i++) {
        if (link->posted[i].out != NULL)
            note_first(&out_ns, link->posted[i].out->late_ns);
    }
    if (out_ns != 0 && out_ns <= now_ns)
        kvtr_link_break(link, "the client did not take its answers in time");
    else if (body_ns != 0 && body_ns <= now_ns)
        kvtr_link_break(link, "half a message came, and no more in time");
    note_first(first_p, out_ns);
    note_first(first_p, body_ns);
}

/* One that was ended while its payload is read stays until the READ has ended. */
static void look_at_read(kvtr_rcall *call, uint64_t now_ns, uint64_t *first_p)
{
    uint64_t late_ns = call->base.deadline_ns + call->listener->loop.handshake_ns;
    if (call->link == NULL || !call->reading)
        return;
    if (late_ns <= now_ns)
        kvtr_link_break(call->link, "the client's memory could not be read in time");
    note_first(first_p, late_ns);
}

void kvtr_end_late(kvt_listener *listener)
{
    uint64_t now_ns = kvc_now_ns(), first_ns = 0;
    if (listener->next_deadline_ns == 0 || now_ns < listener->next_deadline_ns)
        return;
    listener->next_deadline_ns = 0;
    for (kvtr_rcall *call = listener->calls; call != NULL; call = call->next) {
        uint64_t deadline_ns = call->base.deadline_ns;
        if (!call->gone && deadline_ns <= now_ns)
            kvtr_end_early(call, KVC_TIMED_OUT, "the deadline passed");
        if (!call->gone)
            note_first(&first_ns, deadline_ns);
        else
            look_at_read(call, now_ns, &first_ns);
    }
    for (kvtr_link *link = listener->loop.links; link != NULL; link = link->next) {
        if (!link->broken)
            look_at_link(link, now_ns, &first_ns);
    }
    if (first_ns != 0)
        kvtr_note_late(listener, first_ns);
}
