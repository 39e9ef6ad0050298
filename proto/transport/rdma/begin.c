/*
 * begin.c: what a frame of a client may do, by its header, before a byte of its body is kept.
 *
 * The loop's thread, mutex free. What is admitted is counted and charged here, in link->begun,
 * until call.c makes a call or a message of it; a body that is refused is skipped. Whatever is
 * charged has a time by which the rest must have come.
 */
#include "base/clock.h"
#include "server.h"

const char kvtr_too_long[] = "the message's data is longer than max_message_bytes";
const char kvtr_too_many_bytes[] = "too many request bytes in flight";

/* When the call of a request that comes now is over. */
uint64_t kvtr_deadline_of(const kvt_listener *listener, const kvc_frame *frame)
{
    uint64_t left_ns = listener->opts.max_deadline_ns;
    if (frame->deadline_ns != 0 && frame->deadline_ns < left_ns)
        left_ns = frame->deadline_ns;
    return kvc_now_ns() + left_ns;
}

uint64_t kvtr_late_of(kvt_listener *listener, uint64_t deadline_ns)
{
    uint64_t late_ns = deadline_ns + listener->loop.handshake_ns;
    kvtr_note_late(listener, late_ns);
    return late_ns;
}

void kvtr_note_late(kvt_listener *listener, uint64_t ns)
{
    if (listener->next_deadline_ns == 0 || ns < listener->next_deadline_ns)
        listener->next_deadline_ns = ns;
}

/* With the mutex held: len_bytes are charged, or why not. */
static kvc_status charge(kvtr_link *link, const kvc_frame *frame, uint64_t len_bytes)
{
    kvt_listener *listener = (kvt_listener *)link->loop;
    link->begun.why = kvtr_too_long;
    if (frame->data_bytes > listener->opts.max_message_bytes)
        return KVC_INVALID;
    link->begun.why = kvtr_too_many_bytes;
    if (!kvti_budget_take(listener->budget, len_bytes))
        return KVC_AGAIN;
    link->begun.held_bytes = len_bytes;
    return KVC_OK;
}

/* With the mutex held: a request counts from here. */
static kvc_status admit(kvtr_link *link, const kvc_frame *frame)
{
    kvt_listener *listener = (kvt_listener *)link->loop;
    link->begun.why = "the server is draining";
    if (listener->draining)
        return KVC_CLOSED;
    link->begun.why = "too many calls in flight";
    if (listener->n_calls >= listener->opts.max_calls)
        return KVC_AGAIN;
    kvc_status status = charge(link, frame, (uint64_t)frame->head_bytes + frame->data_bytes);
    if (status != KVC_OK)
        return status;
    link->begun.counted = true;
    listener->n_calls++;
    return KVC_OK;
}

static bool begin_request(kvtr_link *link, const kvc_frame *frame)
{
    if (frame->call == 0 || kvtr_find_call(link, frame->call) != NULL)
        return false;
    link->begun.late_ns = kvtr_deadline_of((kvt_listener *)link->loop, frame);
    link->begun.refused = admit(link, frame);
    return true;
}

/* A further message. What is read from the client's memory is charged when it is read. */
static bool begin_message(kvtr_link *link, const kvc_frame *frame)
{
    const kvtr_rcall *call = kvtr_find_call(link, frame->call);
    bool last = (frame->flags & KVC_FRAME_LAST) != 0;
    bool dead = call == NULL || call->gone; /* answered already */
    if (last && frame->head_bytes + frame->data_bytes > 0)
        return false;
    if (!dead && (!kvt_streams_request(call->method) || call->method != frame->method ||
                  call->half_closed || call->has_next))
        return false;
    link->begun.late_ns = dead ? kvc_now_ns() : call->base.deadline_ns;
    link->begun.refused =
        dead ? KVC_CANCELLED : charge(link, frame, (uint64_t)kvc_frame_body_bytes(frame));
    return true;
}

/* Rows and values have places in a request for them alone, so many at most, and they come with it.
 */
static bool runs_fit(const kvc_frame *frame)
{
    if ((frame->flags & KVTI_PLACED) == 0)
        return true;
    return frame->kind == KVC_FRAME_REQUEST && kvtr_has_places(frame->method) &&
           (frame->flags & KVC_FRAME_ELSEWHERE) == 0 && frame->data_bytes % KVTI_RUN_BYTES == 0 &&
           frame->data_bytes <= KVTI_MAX_RUNS * KVTI_RUN_BYTES;
}

bool kvtr_on_begin(kvtr_link *link, const kvc_frame *frame, bool *keep_p)
{
    kvt_listener *listener = (kvt_listener *)link->loop;
    bool right = true;
    if ((frame->flags & KVC_FRAME_OWN_FLAGS & ~(KVTI_SUMMED | KVTI_PLACED)) != 0 ||
        ((frame->flags & KVTI_SUMMED) == 0 && frame->spare[2] != 0) || !runs_fit(frame))
        return false;
    /* A payload that is elsewhere is read from there, unless the client serves no READs. */
    if ((frame->flags & KVC_FRAME_ELSEWHERE) != 0 && link->max_reads == 0)
        return false;
    kvc_mutex_lock(&listener->loop.mutex);
    if (frame->kind == KVC_FRAME_REQUEST)
        right = begin_request(link, frame);
    else if (frame->kind == KVC_FRAME_MESSAGE)
        right = begin_message(link, frame);
    else
        right = frame->kind == KVC_FRAME_CANCEL || frame->kind == KVC_FRAME_CREDIT;
    if (right && link->begun.late_ns != 0)
        link->begun.late_ns = kvtr_late_of(listener, link->begun.late_ns);
    kvc_mutex_unlock(&listener->loop.mutex);
    *keep_p = link->begun.refused == KVC_OK;
    return right;
}

void kvtr_begun_drop(kvtr_link *link)
{
    kvt_listener *listener = (kvt_listener *)link->loop;
    kvti_budget_give(listener->budget, link->begun.held_bytes);
    link->begun.held_bytes = 0;
    if (!link->begun.counted)
        return;
    link->begun.counted = false;
    listener->n_calls--;
    kvc_cond_broadcast(&listener->loop.changed);
}
