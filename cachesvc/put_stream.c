/*
 * put_stream.c: PutBlocksStream: values that are offered first, their bodies asked for one by one.
 *
 * Every offer is looked up, and later stored, by a PutBlocks of one value that the server makes to
 * itself, so what a put means is put.c's alone. Whatever happens (a message, a piece answered, a
 * message passed on) is noted under the stream's lock; then one thread at a time does what follows
 * from it, with no lock held. Invariants: a body lies in a buffer until all of it has come, so a
 * torn stream leaves nothing; an entry is in use until its last answer was handed to the transport;
 * the peer's call is answered once no piece, message or wish for one is outstanding.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/metrics.h"
#include "request.h"

#define WINDOW            KVC_PUT_WINDOW_VALUES
#define PIECE_ARENA_BYTES ((size_t)1 << 20)

typedef enum entry_state {
    ENTRY_FREE,
    ENTRY_OFFERED, /* to be looked up */
    ENTRY_WAITS,   /* not there: for room for its body */
    ENTRY_BODY,
    ENTRY_FULL, /* its body is complete: to be stored */
    ENTRY_OUT,  /* a piece is with put.c */
    ENTRY_SETTLED,
} entry_state;

typedef struct put_stream put_stream;

typedef struct entry {
    kvt_call piece; /* first */
    put_stream *stream;
    entry_state state;
    bool probing;    /* the piece that is OUT looks it up */
    bool tell_send;  /* the answer that asks for the body is due */
    uint64_t number; /* of the offer */
    kvc_put_offer offer;
    kvc_put_value value;
    kvs_buffer *body;
    struct iovec data; /* the body's bytes so far */
    kvc_put_answer last;
} entry;

struct put_stream {
    kvs_server *server;
    kvt_call *call; /* the peer's */
    kvc_digest tenant;

    kvc_mutex lock;    /* rank LEAF; guards all below */
    bool running;      /* a thread is in run_locked; others leave the work to it */
    bool receiving;    /* the next message has been asked for */
    bool stopping;     /* that was to be taken back */
    bool sending;      /* a message is with the transport */
    bool ended;        /* the client has sent its last message */
    uint32_t n_out;    /* pieces with put.c */
    uint64_t n_offers; /* so far */
    uint64_t body_bytes;
    kvc_status status; /* why the stream fails */
    char detail[KVT_DETAIL_BYTES];
    kvc_put_answer answers[2 * WINDOW]; /* of the message under way */
    entry entries[WINDOW];
};

static void run_locked(put_stream *stream);

/* With the lock held. The first reason counts. */
static void set_failed(put_stream *stream, kvc_status status, uint64_t value, const char *why)
{
    if (stream->status != KVC_OK)
        return;
    stream->status = status;
    if (value == UINT64_MAX)
        (void)snprintf(stream->detail, sizeof(stream->detail), "%s", why);
    else
        (void)snprintf(stream->detail, sizeof(stream->detail), "offer %llu: %s",
                       (unsigned long long)value, why);
}

/* ---- bodies ---------------------------------------------------------------------------------- */

static void body_free(entry *e)
{
    if (!e->body)
        return;
    atomic_fetch_sub(&e->stream->server->streamed_bytes, e->body->total_bytes);
    kvs_buffer_release(e->body);
    e->body = NULL;
}

/* Reserves room for a body, so that half of the buffers stay for answers. AGAIN, NO_MEMORY. */
static kvc_status body_get(entry *e)
{
    kvs_server *server = e->stream->server;
    kvc_status status = kvs_buffer_get(&server->buffers, e->offer.len_bytes, &e->body);
    if (status != KVC_OK)
        return status;
    uint64_t bytes = e->body->total_bytes;
    if (atomic_fetch_add(&server->streamed_bytes, bytes) + bytes > server->buffers.cap_bytes / 2) {
        body_free(e);
        return KVC_AGAIN;
    }
    e->data = (struct iovec){e->body->bytes, 0};
    return KVC_OK;
}

/* ---- pieces ---------------------------------------------------------------------------------- */

/* With the lock held: the last answer of an entry is due. */
static void settle(entry *e, kvc_status status, uint64_t ttl_ns)
{
    e->state = ENTRY_SETTLED;
    e->last = (kvc_put_answer){.value = (uint32_t)e->number,
                               .status = status,
                               .retry_after_ms = status == KVC_AGAIN ? KVS_RETRY_MS : 0,
                               .ttl_ms = ttl_ns / 1000000};
}

/* The TTL of a value that is there; 0: none. */
static uint64_t keep(const entry *e)
{
    kvs_server *server = e->stream->server;
    if (!e->offer.ttl_ms)
        return 0;
    const kvs_schema *schema =
        kvs_schemas_find(server->schemas, &e->stream->tenant, &e->offer.schema);
    if (!schema)
        return 0;
    int place = schema->piece_bytes
                    ? kvs_opaque_place(schema, e->offer.whole.total_bytes, e->offer.part)
                    : kvs_schema_part(schema, e->offer.part);
    uint64_t ttl_ns = kvs_ttl_keep(server->ttls, schema, (uint16_t)place, &e->offer.digest,
                                   kvs_ttl_ns(e->offer.ttl_ms));
    kvs_schemas_put(server->schemas, schema);
    return ttl_ns;
}

/* kvt_ops.reply of a piece. */
static void piece_reply(kvt_call *call, kvc_status status, const char *detail,
                        uint32_t retry_after_ms, const kvc_reply *reply, const kvt_slice *slices,
                        uint32_t n_slices)
{
    entry *e = (entry *)call;
    put_stream *stream = e->stream;
    kvc_status item = KVC_OK;
    uint64_t ttl_ns = 0;
    (void)retry_after_ms;
    (void)slices;
    (void)n_slices;
    if (status == KVC_OK) {
        item = (kvc_status)reply->u.put_blocks.status[0];
        if (item == KVC_OK || item == KVC_EXISTS)
            ttl_ns = keep(e);
    }
    bool wanted = status == KVC_OK && e->probing && item == KVC_NOT_FOUND;
    kvc_arena_reset(&call->arena);
    if (!e->probing)
        body_free(e);
    kvc_mutex_lock(&stream->lock);
    KVC_ASSERT(e->state == ENTRY_OUT);
    stream->n_out--;
    if (!e->probing)
        stream->body_bytes -= e->offer.len_bytes;
    if (wanted)
        e->state = ENTRY_WAITS;
    else
        settle(e, item, ttl_ns);
    if (status != KVC_OK)
        set_failed(stream, status, e->number, detail ? detail : "");
    run_locked(stream);
}

/* kvt_ops.drop_data: the value is in dram, and waits for its commit. */
static void piece_drop_data(kvt_call *call)
{
    call->req.data = NULL;
    call->req.n_data = 0;
    body_free((entry *)call);
}

static const kvt_ops piece_ops = {
    .name = "put piece", .reply = piece_reply, .drop_data = piece_drop_data};

/* Looks an offer up, or stores the value. The entry is OUT. */
static void make_piece(put_stream *stream, entry *e)
{
    kvs_server *server = stream->server;
    e->piece = (kvt_call){.ops = &piece_ops,
                          .deadline_ns = stream->call->deadline_ns,
                          .tenant = stream->call->tenant,
                          .user = server,
                          .within = stream->call};
    kvc_arena_init(&e->piece.arena, PIECE_ARENA_BYTES);
    e->value = (kvc_put_value){e->offer.digest, e->offer.part, e->offer.len_bytes, e->offer.whole};
    e->piece.req = (kvc_request){.method = KVC_PUT_BLOCKS};
    e->piece.req.u.put_blocks.schema = e->offer.schema;
    e->piece.req.u.put_blocks.promise = e->offer.promise;
    e->piece.req.u.put_blocks.n_values = 1;
    e->piece.req.u.put_blocks.values = &e->value;
    e->piece.req.u.put_blocks.probe = e->probing;
    if (!e->probing) {
        e->piece.req.data = &e->data;
        e->piece.req.n_data = 1;
        e->piece.req.data_bytes = e->data.iov_len;
    }
    atomic_fetch_add(&server->n_calls, 1);
    KVC_GAUGE_ADD(requests_in_flight, 1);
    kvs_on_put_blocks(server, &e->piece, &stream->tenant);
}

/* ---- messages -------------------------------------------------------------------------------- */

static entry *find_entry(put_stream *stream, uint32_t number)
{
    for (uint32_t i = 0; i < WINDOW; i++)
        if (stream->entries[i].state != ENTRY_FREE && (uint32_t)stream->entries[i].number == number)
            return &stream->entries[i];
    return NULL;
}

static void take_offer(put_stream *stream, const kvc_put_offer *offer)
{
    for (uint32_t i = 0; i < WINDOW; i++) {
        entry *e = &stream->entries[i];
        if (e->state != ENTRY_FREE)
            continue;
        *e = (entry){.stream = stream,
                     .state = ENTRY_OFFERED,
                     .number = stream->n_offers++,
                     .offer = *offer};
        KVC_COUNT(put_offers);
        return;
    }
    set_failed(stream, KVC_INVALID, stream->n_offers,
               "more than 32 values without their last answer");
}

/* The entry whose body goes on with these bytes; NULL after set_failed. With the lock held. */
static entry *body_entry(put_stream *stream, const kvc_request *req)
{
    entry *e = find_entry(stream, req->u.put_stream.value);
    if (!e || e->state != ENTRY_BODY) {
        set_failed(stream, KVC_INVALID, req->u.put_stream.value,
                   "bytes of a body that was not asked for");
        return NULL;
    }
    if (req->data_bytes > e->offer.len_bytes - e->data.iov_len) {
        set_failed(stream, KVC_INVALID, e->number, "its body is longer than len_bytes");
        return NULL;
    }
    return e;
}

/* Notes a message. Only one is there at a time, so nobody else touches a body meanwhile. */
static void take_message(put_stream *stream, const kvc_request *req)
{
    entry *e = NULL;
    kvc_mutex_lock(&stream->lock);
    if (stream->status == KVC_OK && req->data_bytes)
        e = body_entry(stream, req);
    for (uint32_t i = 0; i < req->u.put_stream.n_offers && stream->status == KVC_OK; i++)
        take_offer(stream, &req->u.put_stream.offers[i]);
    kvc_mutex_unlock(&stream->lock);
    if (!e)
        return;
    for (uint32_t i = 0; i < req->n_data; i++) {
        memcpy((char *)e->data.iov_base + e->data.iov_len, req->data[i].iov_base,
               req->data[i].iov_len);
        e->data.iov_len += req->data[i].iov_len;
    }
    if (e->data.iov_len < e->offer.len_bytes)
        return;
    kvc_mutex_lock(&stream->lock);
    e->state = ENTRY_FULL;
    kvc_mutex_unlock(&stream->lock);
}

/* kvt_call.got. */
static void message_got(kvt_call *call, kvc_status status, const char *why)
{
    put_stream *stream = call->user;
    if (status == KVC_OK)
        take_message(stream, &call->req);
    kvc_mutex_lock(&stream->lock);
    stream->receiving = false;
    if (status == KVC_CLOSED)
        stream->ended = true;
    else if (status != KVC_OK)
        set_failed(stream, status, UINT64_MAX, why);
    run_locked(stream);
}

/* kvt_call.sent. */
static void message_sent(kvt_call *call, bool ok)
{
    put_stream *stream = call->user;
    kvc_mutex_lock(&stream->lock);
    KVC_ASSERT(stream->sending);
    stream->sending = false;
    if (!ok)
        set_failed(stream, KVC_CANCELLED, UINT64_MAX, "the client has gone");
    run_locked(stream);
}

/* With the lock held: moves the answers that are due to stream->answers; gives their number. */
static uint32_t collect_answers(put_stream *stream)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < WINDOW; i++) {
        entry *e = &stream->entries[i];
        if (e->tell_send)
            stream->answers[n++] = (kvc_put_answer){.value = (uint32_t)e->number, .send = true};
        e->tell_send = false;
        if (e->state != ENTRY_SETTLED)
            continue;
        stream->answers[n++] = e->last;
        e->state = ENTRY_FREE;
    }
    return n;
}

static void send_answers(put_stream *stream, uint32_t n)
{
    kvc_reply reply = {.method = KVC_PUT_BLOCKS_STREAM};
    reply.u.put_stream.n_answers = n;
    reply.u.put_stream.answers = stream->answers;
    KVC_COUNT(stream_messages);
    if (kvt_call_send(stream->call, &reply, NULL, 0) == KVC_OK)
        return;
    kvc_mutex_lock(&stream->lock);
    stream->sending = false;
    set_failed(stream, KVC_NO_MEMORY, UINT64_MAX, "no memory for a message");
    kvc_mutex_unlock(&stream->lock);
}

/* ---- the stream ------------------------------------------------------------------------------ */

typedef enum step {
    STEP_WAIT,
    STEP_SEND,
    STEP_PIECE,
    STEP_ACCEPT,
    STEP_RECV,
    STEP_STOP,
    STEP_END
} step;

/* With the lock held: the entry to go on with, if there is one: *accept: room for its body is to
   be reserved, else a piece made. The oldest first, so that none waits for ever. */
static entry *next_entry(put_stream *stream, bool *accept)
{
    entry *waits = NULL;
    for (uint32_t i = 0; i < WINDOW; i++) {
        entry *e = &stream->entries[i];
        *accept = false;
        if (e->state == ENTRY_OFFERED || e->state == ENTRY_FULL)
            return e;
        if (e->state == ENTRY_WAITS && (!waits || e->number < waits->number))
            waits = e;
    }
    *accept = true;
    if (waits && stream->body_bytes &&
        stream->body_bytes + waits->offer.len_bytes > KVC_PUT_WINDOW_BYTES)
        return NULL;
    return waits;
}

/* With the lock held: the client has sent all: whose body is still wanted. */
static void check_end(put_stream *stream)
{
    for (uint32_t i = 0; i < WINDOW && stream->ended; i++) {
        const entry *e = &stream->entries[i];
        if (e->state == ENTRY_BODY || e->state == ENTRY_WAITS)
            set_failed(stream, KVC_INVALID, e->number, "the stream ended before its body");
    }
}

static bool all_free(const put_stream *stream)
{
    for (uint32_t i = 0; i < WINDOW; i++)
        if (stream->entries[i].state != ENTRY_FREE)
            return false;
    return true;
}

/* With the lock held: what to do next; it counts as begun. */
static step next_step(put_stream *stream, entry **entry_p, uint32_t *n_answers_p)
{
    bool accept;
    if (stream->status == KVC_OK && kvt_call_cancelled(stream->call))
        set_failed(stream, KVC_CANCELLED, UINT64_MAX, "the client has gone");
    check_end(stream);
    bool busy = stream->sending || stream->n_out;
    if (stream->status != KVC_OK)
        return busy || (stream->receiving && stream->stopping) ? STEP_WAIT
               : stream->receiving                             ? STEP_STOP
                                                               : STEP_END;
    if (!stream->sending && (*n_answers_p = collect_answers(stream)) > 0) {
        stream->sending = true;
        return STEP_SEND;
    }
    if ((*entry_p = next_entry(stream, &accept)) != NULL) {
        (*entry_p)->probing = (*entry_p)->state == ENTRY_OFFERED;
        stream->n_out += !accept;
        if (accept)
            stream->body_bytes += (*entry_p)->offer.len_bytes;
        else
            (*entry_p)->state = ENTRY_OUT;
        return accept ? STEP_ACCEPT : STEP_PIECE;
    }
    if (!stream->receiving && !stream->ended) {
        stream->receiving = true;
        return STEP_RECV;
    }
    return stream->ended && !busy && all_free(stream) ? STEP_END : STEP_WAIT;
}

static void accept_body(put_stream *stream, entry *e)
{
    kvc_status status = body_get(e);
    kvc_mutex_lock(&stream->lock);
    if (status == KVC_OK) {
        e->state = e->offer.len_bytes ? ENTRY_BODY : ENTRY_FULL; /* nothing is to be sent */
        e->tell_send = e->offer.len_bytes > 0;
    } else {
        stream->body_bytes -= e->offer.len_bytes;
        settle(e, KVC_AGAIN, 0);
    }
    kvc_mutex_unlock(&stream->lock);
}

/* The stream failed while it waits for a message. Where one is about to come, it goes on then. */
static void stop_receiving(put_stream *stream)
{
    bool stopped = kvt_call_unrecv(stream->call);
    kvc_mutex_lock(&stream->lock);
    stream->stopping = true;
    if (stopped)
        stream->receiving = false;
    kvc_mutex_unlock(&stream->lock);
}

static void end(put_stream *stream)
{
    kvt_call *call = stream->call;
    kvc_status status = stream->status;
    char detail[KVT_DETAIL_BYTES];
    memcpy(detail, stream->detail, sizeof(detail));
    for (uint32_t i = 0; i < WINDOW; i++)
        body_free(&stream->entries[i]);
    call->user = stream->server;
    kvc_mutex_fini(&stream->lock);
    free(stream);
    KVC_GAUGE_SUB(streams_open, 1);
    if (status == KVC_OK)
        kvs_answer(call, NULL, NULL, 0);
    else
        kvs_fail(call, status, "%s", detail);
}

/*
 * Does what can be done now. Called with the lock held, in which the caller noted what happened,
 * and leaves it: once another thread sees the note, the stream is that thread's to end. The stream
 * may be gone afterwards.
 */
static void run_locked(put_stream *stream)
{
    if (stream->running) {
        kvc_mutex_unlock(&stream->lock);
        return;
    }
    stream->running = true;
    for (;;) {
        entry *e = NULL;
        uint32_t n_answers = 0;
        step next = next_step(stream, &e, &n_answers);
        if (next == STEP_WAIT)
            break;
        kvc_mutex_unlock(&stream->lock);
        if (next == STEP_END) {
            end(stream);
            return;
        }
        if (next == STEP_SEND)
            send_answers(stream, n_answers);
        else if (next == STEP_PIECE)
            make_piece(stream, e);
        else if (next == STEP_ACCEPT)
            accept_body(stream, e);
        else if (next == STEP_RECV)
            kvt_call_recv(stream->call);
        else
            stop_receiving(stream);
        kvc_mutex_lock(&stream->lock);
    }
    stream->running = false;
    kvc_mutex_unlock(&stream->lock);
}

void kvs_on_put_blocks_stream(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    put_stream *stream = calloc(1, sizeof(*stream));
    if (!stream) {
        kvs_fail(call, KVC_NO_MEMORY, "no memory for a stream");
        return;
    }
    stream->server = server;
    stream->call = call;
    stream->tenant = *tenant;
    for (uint32_t i = 0; i < WINDOW; i++)
        stream->entries[i].stream = stream;
    kvc_mutex_init(&stream->lock, KVC_RANK_LEAF);
    call->sent = message_sent;
    call->got = message_got;
    call->user = stream;
    KVC_GAUGE_ADD(streams_open, 1);
    take_message(stream, &call->req);
    kvc_mutex_lock(&stream->lock);
    run_locked(stream);
}
