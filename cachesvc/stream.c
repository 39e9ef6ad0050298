/*
 * stream.c: one stream, from its first piece to its status; see stream.h.
 *
 * Whatever happens (a piece answered, a message passed on) is noted under the stream's lock; then
 * one thread at a time does what follows from it, with no lock held. Invariants: a slot is made
 * again only after its message was handed to the transport; the peer's call is answered once no
 * piece and no message is outstanding, so nobody else can reach the stream then.
 */
#include "stream.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/metrics.h"

#define PAUSE_NS 20000000

typedef enum stream_step { STEP_WAIT, STEP_MAKE, STEP_SEND, STEP_END } stream_step;

/* With the lock held: what to do next; it counts as begun. */
static stream_step next_step(kvs_stream *stream)
{
    if (stream->status == KVC_OK && kvt_call_cancelled(stream->call)) {
        stream->status = KVC_CANCELLED;
        (void)snprintf(stream->detail, sizeof(stream->detail), "the client has gone");
    }
    bool idle = !stream->making && !stream->sending;
    if (stream->status != KVC_OK)
        return idle ? STEP_END : STEP_WAIT;
    if (stream->ready && !stream->sending) {
        stream->ready = false;
        stream->sending = true;
        return STEP_SEND;
    }
    /* A reader that stands still keeps one message while memory for them is short, not two. */
    bool patient = stream->sending && kvs_buffers_are_short(&stream->server->buffers);
    if (!stream->making && !stream->ready && !stream->exhausted && !patient) {
        stream->making = true;
        return STEP_MAKE;
    }
    return stream->exhausted && idle && !stream->ready ? STEP_END : STEP_WAIT;
}

static void release_slices(kvs_piece *piece)
{
    for (uint32_t i = 0; i < piece->n_slices; i++)
        if (piece->slices[i].release)
            piece->slices[i].release(piece->slices[i].arg);
    piece->n_slices = 0;
}

/* With the lock held. */
static void set_failed(kvs_stream *stream, kvc_status status, const char *detail)
{
    if (stream->status != KVC_OK)
        return;
    stream->status = status;
    (void)snprintf(stream->detail, sizeof(stream->detail), "%s", detail ? detail : "");
}

static void make(kvs_stream *stream)
{
    uint32_t slot = stream->n_made % KVS_STREAM_PIECES;
    kvs_piece *piece = &stream->pieces[slot];
    kvc_arena_reset(&piece->call.arena);
    piece->call.cancelled = 0;
    piece->call.began_ns = kvc_now_ns();
    atomic_fetch_add(&stream->server->n_calls, 1);
    KVC_GAUGE_ADD(requests_in_flight, 1);
    stream->n_made++;
    if (stream->kind->make(stream, &piece->call, slot))
        return;
    atomic_fetch_sub(&stream->server->n_calls, 1);
    KVC_GAUGE_SUB(requests_in_flight, 1);
    kvc_mutex_lock(&stream->lock);
    stream->making = false;
    stream->exhausted = true;
    kvc_mutex_unlock(&stream->lock);
}

static void send_piece(kvs_stream *stream)
{
    kvs_piece *piece = &stream->pieces[stream->n_sent % KVS_STREAM_PIECES];
    uint32_t n_slices = piece->n_slices;
    stream->n_sent++;
    piece->n_slices = 0;
    KVC_COUNT(stream_messages);
    kvc_status status = kvt_call_send(stream->call, &piece->reply, piece->slices, n_slices);
    if (status == KVC_OK)
        return;
    kvc_mutex_lock(&stream->lock);
    stream->sending = false;
    set_failed(stream, KVC_IO, "a message is beyond the protocol's limits");
    kvc_mutex_unlock(&stream->lock);
}

static void end(kvs_stream *stream)
{
    kvt_call *call = stream->call;
    kvc_status status = stream->status;
    char detail[KVT_DETAIL_BYTES];
    memcpy(detail, stream->detail, sizeof(detail));
    for (uint32_t i = 0; i < KVS_STREAM_PIECES; i++) {
        release_slices(&stream->pieces[i]);
        kvc_arena_reset(&stream->pieces[i].call.arena);
    }
    kvc_mutex_fini(&stream->lock);
    call->user = stream->server;
    stream->kind->close(stream);
    KVC_GAUGE_SUB(streams_open, 1);
    if (status == KVC_OK)
        kvs_answer(call, NULL, NULL, 0);
    else
        kvs_fail(call, status, "%s", detail);
}

/*
 * Does what can be done now. Called with the lock held, in which the caller noted what happened,
 * and leaves it: once another thread can see the note, the stream is that thread's to end, so who
 * does not run it may not touch it again. The stream may be gone afterwards.
 */
static void run_locked(kvs_stream *stream)
{
    if (stream->running) {
        kvc_mutex_unlock(&stream->lock);
        return;
    }
    stream->running = true;
    for (;;) {
        stream_step step = next_step(stream);
        if (step == STEP_WAIT)
            break;
        kvc_mutex_unlock(&stream->lock);
        if (step == STEP_END) {
            end(stream);
            return;
        }
        if (step == STEP_SEND)
            send_piece(stream);
        else
            make(stream);
        kvc_mutex_lock(&stream->lock);
    }
    stream->running = false;
    kvc_mutex_unlock(&stream->lock);
}

/* kvt_ops.reply of a piece. */
static void piece_reply(kvt_call *call, kvc_status status, const char *detail,
                        uint32_t retry_after_ms, const kvc_reply *reply, const kvt_slice *slices,
                        uint32_t n_slices)
{
    kvs_piece *piece = (kvs_piece *)call;
    kvs_stream *stream = piece->stream;
    (void)retry_after_ms; /* the stream's own answer has the hint again */
    if (status == KVC_OK) {
        KVC_ASSERT(reply && n_slices <= KVT_MAX_SLICES);
        piece->reply = *reply;
        piece->n_slices = n_slices;
        if (n_slices)
            memcpy(piece->slices, slices, n_slices * sizeof(*slices));
        stream->kind->adjust(stream, (uint32_t)(piece - stream->pieces), &piece->reply);
    }
    kvc_mutex_lock(&stream->lock);
    KVC_ASSERT(stream->making);
    stream->making = false;
    stream->ready = status == KVC_OK;
    if (status != KVC_OK)
        set_failed(stream, status, detail);
    if (KVC_FAULT("stream.noted")) /* others come by meanwhile, and must find the lock taken */
        nanosleep(&(struct timespec){.tv_nsec = PAUSE_NS}, NULL);
    run_locked(stream);
}

static void message_sent(kvt_call *call, bool ok)
{
    kvs_stream *stream = call->user;
    kvc_mutex_lock(&stream->lock);
    KVC_ASSERT(stream->sending);
    stream->sending = false;
    if (!ok)
        set_failed(stream, KVC_CANCELLED, "the client has gone");
    run_locked(stream);
}

static const kvt_ops piece_ops = {.name = "piece", .reply = piece_reply};

void kvs_stream_begin(kvs_stream *stream, const kvs_stream_kind *kind, kvs_server *server,
                      kvt_call *call, const kvc_digest *tenant)
{
    stream->kind = kind;
    stream->server = server;
    stream->call = call;
    stream->tenant = *tenant;
    kvc_mutex_init(&stream->lock, KVC_RANK_LEAF);
    for (uint32_t i = 0; i < KVS_STREAM_PIECES; i++) {
        kvs_piece *piece = &stream->pieces[i];
        piece->stream = stream;
        piece->call = (kvt_call){
            .ops = &piece_ops,
            .deadline_ns = call->deadline_ns,
            .tenant = call->tenant,
            .user = server,
            .within = call,
        };
        kvc_arena_init(&piece->call.arena, KVS_PIECE_ARENA_BYTES);
    }
    call->sent = message_sent;
    call->user = stream;
    KVC_GAUGE_ADD(streams_open, 1);
    kvc_mutex_lock(&stream->lock);
    run_locked(stream);
}
