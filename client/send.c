/*
 * send.c: messages to the transport and back.
 *
 * Everything here runs under client->lock except submit itself and a reply's check and copy.
 * Bounds: KVCI_MAX_INFLIGHT messages in flight, KVCI_MAX_INFLIGHT_PUT of them bulk puts, and
 * KVCI_WINDOW_BYTES for each lane and channel, since what is under way and not yet worked on only
 * falls out of the caches at both ends; the rest waits in the lanes and is sent from completions.
 * Invariant: inflight counts the messages that are SENDING or SENT, inflight_bytes their
 * flight_bytes.
 */
#include <stdio.h>
#include <string.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/metrics.h"
#include "internal.h"

#define AGAIN_FIRST_NS (2ull * 1000000)
#define AGAIN_MAX_NS   (100ull * 1000000)
#define NS_PER_MS      1000000ull

static bool in_flight(const kvci_msg *msg)
{
    return msg->state == KVCI_SENDING || msg->state == KVCI_SENT;
}

static int lane_of(const kvci_msg *msg)
{
    return msg->call->kind->bulk_lane ? KVCI_LANE_BULK : KVCI_LANE_URGENT;
}

static void move_to(kvci_msg *msg, kvci_node *list, kvci_msg_state state)
{
    kvci_list_remove(&msg->node);
    msg->state = state;
    kvci_list_push(list, &msg->node);
    kvci_wake_at(msg->call->client, msg->call->deadline_ns);
}

void kvci_msg_requeue(kvc_client *client, kvci_msg *msg)
{
    kvci_list_remove(&msg->node);
    msg->state = KVCI_QUEUED;
    kvci_list_push_front(&client->lanes[lane_of(msg)], &msg->node);
    kvci_wake_at(client, msg->call->deadline_ns);
}

void kvci_wake_at(kvc_client *client, uint64_t due_ns)
{
    if (due_ns >= client->next_due_ns)
        return;
    client->next_due_ns = due_ns;
    kvc_cond_signal(&client->prog_cond);
}

void kvci_msg_finish(kvc_client *client, kvci_msg *msg, kvc_status status, const char *detail)
{
    kvci_call *call = msg->call;
    KVC_ASSERT(msg->state != KVCI_DONE && !in_flight(msg));
    kvci_list_remove(&msg->node);
    msg->state = KVCI_DONE;
    if (status != KVC_OK) {
        if (call->kind->fail != NULL)
            call->kind->fail(msg, status);
        if (call->status == KVC_OK) {
            call->status = status;
            (void)snprintf(call->detail, sizeof(call->detail), "%s", detail != NULL ? detail : "");
        }
    }
    if (--call->n_left == 0)
        kvci_call_complete(client, call);
}

void kvci_call_abort(kvc_client *client, kvci_call *call, kvc_status status, const char *detail)
{
    /* The last message's end may recycle the call. */
    call->refs++;
    for (uint32_t i = 0; i < call->n_msgs; i++) {
        kvci_msg *msg = &call->msgs[i];
        if (msg->state != KVCI_DONE && !in_flight(msg))
            kvci_msg_finish(client, msg, status, detail);
    }
    kvci_call_put(call);
}

void kvci_call_cancel(kvc_client *client, kvci_call *call)
{
    call->cancelled = true;
    /* The lock is held on purpose: a message that is SENT cannot leave the transport's done while
       it is, so what cancel is given is alive. */
    for (uint32_t i = 0; i < call->n_msgs; i++) {
        kvci_msg *msg = &call->msgs[i];
        if (msg->state == KVCI_SENT)
            msg->link->ops->cancel(msg->link->conn, &msg->xfer);
    }
    kvci_call_abort(client, call, KVC_CANCELLED, "by the caller");
}

/* AGAIN: waits for the hint or the backoff, where the deadline leaves room for it. */
static void retry_later(kvc_client *client, kvci_msg *msg, kvc_status status, const char *why,
                        uint32_t retry_after_ms)
{
    uint64_t pause_ns = kvci_backoff_ns(msg->failures, AGAIN_FIRST_NS, AGAIN_MAX_NS, &client->seed);
    if (pause_ns < retry_after_ms * NS_PER_MS)
        pause_ns = retry_after_ms * NS_PER_MS;
    msg->due_ns = kvc_now_ns() + pause_ns;
    if (msg->due_ns >= msg->call->deadline_ns) {
        kvci_msg_finish(client, msg, status, why);
        return;
    }
    move_to(msg, &client->timed, KVCI_TIMED);
    kvci_wake_at(client, msg->due_ns);
}

static void wait_for_link(kvc_client *client, kvci_msg *msg, kvc_status status)
{
    if (status == KVC_NOT_FOUND)
        msg->reregistered = true;
    else
        msg->call->resent = true;
    /* Of a link that was replaced meanwhile, nothing new is learnt. */
    if (msg->link == client->link && !client->link_suspect) {
        client->link_suspect = true;
        kvc_cond_signal(&client->keeper_cond);
    }
    if (client->link != NULL && !client->link_suspect)
        kvci_msg_requeue(client, msg);
    else
        move_to(msg, &client->wait_link, KVCI_WAIT_LINK);
}

static void wait_for_contexts(kvc_client *client, kvci_msg *msg)
{
    msg->reopens++;
    for (uint32_t i = 0; i < msg->n_segs; i++)
        kvci_context_stale(msg->segs[i].context, msg->segs[i].gen);
    if (kvci_msg_waits(msg))
        move_to(msg, &client->wait_context, KVCI_WAIT_CONTEXT);
    else
        kvci_msg_requeue(client, msg);
}

void kvci_settle(kvc_client *client, kvci_msg *msg, kvc_status status, const char *why,
                 uint32_t retry_after_ms)
{
    kvci_call *call = msg->call;
    msg->last = status;
    msg->failures = status == KVC_OK ? 0 : msg->failures + 1;
    msg->state = KVCI_QUEUED; /* in no list yet */
    kvci_verdict verdict = kvci_judge(msg, status);
    /* What would have been tried again ends as what the caller asked for. */
    if (verdict != KVCI_FINISH && call->cancelled) {
        verdict = KVCI_FINISH;
        status = KVC_CANCELLED;
    }
    if (verdict != KVCI_FINISH && kvc_now_ns() >= call->deadline_ns)
        verdict = KVCI_FINISH;
    if (verdict != KVCI_FINISH)
        KVC_COUNT(client_retries);
    if (verdict == KVCI_FINISH && status != KVC_OK && call->kind->stop_on_error) {
        call->refs++;
        kvci_msg_finish(client, msg, status, why);
        kvci_call_abort(client, call, status, why);
        kvci_call_put(call);
    } else if (verdict == KVCI_FINISH) {
        kvci_msg_finish(client, msg, status, why);
    } else if (verdict == KVCI_RETRY) {
        retry_later(client, msg, status, why, retry_after_ms);
    } else if (verdict == KVCI_RELINK) {
        wait_for_link(client, msg, status);
    } else {
        wait_for_contexts(client, msg);
    }
}

static void leave_flight(kvc_client *client, const kvci_msg *msg)
{
    client->inflight--;
    client->inflight_bytes[lane_of(msg)] -= msg->flight_bytes;
    if (msg->call->kind->bulk_lane)
        client->inflight_put--;
}

/* One message of a reply that streams. On a transport thread, no lock held. */
static void msg_message(kvt_xfer *xfer)
{
    kvci_msg *msg = xfer->arg;
    if (msg->stream_status != KVC_OK)
        return;
    msg->stream_status = msg->call->kind->message(msg, &xfer->reply, &msg->stream_why);
    if (msg->stream_status != KVC_OK)
        msg->link->ops->cancel(msg->link->conn, xfer);
}

/* One message of requests that stream has gone; likewise. */
static void msg_pushed(kvt_xfer *xfer, bool ok)
{
    kvci_msg *msg = xfer->arg;
    if (!ok || msg->stream_status != KVC_OK)
        return;
    msg->stream_status = msg->call->kind->pushed(msg, &msg->stream_why);
    if (msg->stream_status != KVC_OK)
        msg->link->ops->cancel(msg->link->conn, xfer);
}

/* On a transport thread, no lock held. */
static void msg_done(kvt_xfer *xfer)
{
    kvci_msg *msg = xfer->arg;
    kvci_call *call = msg->call;
    kvc_client *client = call->client;
    kvc_status status = xfer->status;
    const char *why = xfer->detail;
    if (msg->stream_status != KVC_OK) {
        status = msg->stream_status;
        why = msg->stream_why;
    }
    if (status == KVC_OK)
        status = call->kind->take(msg, &xfer->reply, &why);
    if (status != KVC_OK && why != xfer->detail) {
        (void)snprintf(xfer->detail, sizeof(xfer->detail), "%s", why);
        why = xfer->detail;
    }
    uint32_t retry_after_ms = xfer->retry_after_ms;
    kvc_arena_reset(&xfer->arena);
    kvc_mutex_lock(&client->lock);
    leave_flight(client, msg);
    kvci_settle(client, msg, status, why, retry_after_ms);
    kvci_pump(client);
    kvc_mutex_unlock(&client->lock);
}

/* One message always fits, and one that takes nothing of the window too. */
static bool window_has_room(const kvc_client *client, const kvci_msg *msg)
{
    uint64_t room_bytes = (uint64_t)client->n_channels * KVCI_WINDOW_BYTES;
    uint64_t taken_bytes = client->inflight_bytes[lane_of(msg)];
    return taken_bytes == 0 || msg->flight_bytes == 0 ||
           taken_bytes + msg->flight_bytes <= room_bytes;
}

/* The first of a lane whose contexts are open, or NULL. */
static kvci_msg *head_of(kvc_client *client, int lane)
{
    kvci_msg *msg;
    while ((msg = (kvci_msg *)kvci_list_first(&client->lanes[lane])) != NULL && kvci_msg_waits(msg))
        move_to(msg, &client->wait_context, KVCI_WAIT_CONTEXT);
    return msg;
}

/* The first message that may be sent now, or NULL. */
static kvci_msg *next_sendable(kvc_client *client)
{
    if (client->link == NULL || client->link_suspect || client->closing)
        return NULL;
    for (int lane = 0; lane < KVCI_LANES; lane++) {
        if (client->inflight >= KVCI_MAX_INFLIGHT)
            return NULL;
        if (lane == KVCI_LANE_BULK && client->inflight_put >= KVCI_MAX_INFLIGHT_PUT)
            return NULL;
        kvci_msg *msg = head_of(client, lane);
        if (msg != NULL && window_has_room(client, msg))
            return msg;
    }
    return NULL;
}

/* Fills in what may have changed since the message was planned: handles, deadline, channel. */
static void prepare(kvc_client *client, kvci_msg *msg)
{
    for (uint32_t i = 0; i < msg->n_segs; i++) {
        uint64_t *handle_p = msg->handle_p ? msg->handle_p : &msg->row_groups[i].context;
        *handle_p = msg->segs[i].context->handle;
        msg->segs[i].gen = msg->segs[i].context->gen;
    }
    kvt_xfer *xfer = &msg->xfer;
    xfer->req = &msg->req;
    xfer->deadline_ns = msg->call->deadline_ns;
    xfer->channel = client->next_channel++;
    xfer->done = msg_done;
    xfer->message = msg->call->kind->message != NULL ? msg_message : NULL;
    xfer->pushed = msg->call->kind->pushed != NULL ? msg_pushed : NULL;
    if (msg->call->kind->begin != NULL)
        msg->call->kind->begin(msg);
    msg->n_taken = 0;
    msg->stream_status = KVC_OK;
    xfer->arg = msg;
    xfer->status = KVC_OK;
    xfer->placed = false;
    xfer->detail[0] = '\0';
    xfer->retry_after_ms = 0;
}

static void send_one(kvc_client *client, kvci_msg *msg)
{
    kvci_link *link = client->link;
    kvci_call *call = msg->call;
    kvci_list_remove(&msg->node);
    prepare(client, msg);
    msg->state = KVCI_SENDING;
    msg->link = link;
    uint32_t flight = ++msg->sends;
    KVC_COUNT(client_requests);
    client->inflight++;
    client->inflight_bytes[lane_of(msg)] += msg->flight_bytes;
    if (call->kind->bulk_lane)
        client->inflight_put++;
    link->submitting++;
    call->refs++;
    kvc_mutex_unlock(&client->lock);
    kvc_status status = link->ops->submit(link->conn, &msg->xfer);
    kvc_mutex_lock(&client->lock);
    if (--link->submitting == 0 && link != client->link)
        kvc_cond_broadcast(&client->keeper_cond);
    if (status != KVC_OK) {
        leave_flight(client, msg);
        kvci_settle(client, msg, status, "the transport refused the message", 0);
    } else if (msg->state == KVCI_SENDING && msg->sends == flight) {
        msg->state = KVCI_SENT;
        if (call->cancelled)
            link->ops->cancel(link->conn, &msg->xfer);
    }
    kvci_call_put(call);
}

void kvci_pump(kvc_client *client)
{
    kvci_msg *msg;
    client->pumpers++;
    while ((msg = next_sendable(client)) != NULL)
        send_one(client, msg);
    if (--client->pumpers == 0 && client->closing)
        kvc_cond_broadcast(&client->done_cond);
}
