/*
 * stream.h: a reply that streams, made of pieces.
 *
 * A piece is a call that the server makes itself: a handler answers it as it would answer a peer's,
 * and its answer becomes one message of the stream. At most two pieces exist at a time, one on its
 * way to the client and one being made, so a stream takes the memory of two messages, however long
 * it is and however slowly its client reads; of one while reply buffers are short.
 */
#ifndef KVS_STREAM_H
#define KVS_STREAM_H

#include "request.h"

#define KVS_STREAM_PIECES     2u
#define KVS_PIECE_ARENA_BYTES ((size_t)4 << 20)

typedef struct kvs_stream kvs_stream;

/* What differs between the streams; all slots REQ, on any transport or disk thread, one at a time.
 */
typedef struct kvs_stream_kind {
    /* Starts the next piece: fills in its request and hands it to a handler. False: there is
     * nothing left, and piece was not touched. */
    bool (*make)(kvs_stream *stream, kvt_call *piece, uint32_t slot);
    /* The piece's answer, before it is sent as a message of the stream. */
    void (*adjust)(kvs_stream *stream, uint32_t slot, kvc_reply *reply);
    /* The stream is over; frees it. */
    void (*close)(kvs_stream *stream);
} kvs_stream_kind;

typedef struct kvs_piece {
    kvt_call call;
    kvs_stream *stream;
    kvc_reply reply; /* once it is ready */
    kvt_slice slices[KVT_MAX_SLICES];
    uint32_t n_slices;
} kvs_piece;

/* Embedded at the start of each kind's own struct. */
struct kvs_stream {
    const kvs_stream_kind *kind;
    kvs_server *server;
    kvt_call *call; /* the peer's */
    kvc_digest tenant;
    kvs_piece pieces[KVS_STREAM_PIECES];

    kvc_mutex lock;    /* rank LEAF; guards all below */
    bool running;      /* a thread is in the loop of stream.c; others leave the work to it */
    uint32_t n_made;   /* pieces; the next one takes slot n_made % KVS_STREAM_PIECES */
    uint32_t n_sent;   /* messages handed to the transport */
    bool making;       /* a piece is with its handler */
    bool ready;        /* a piece waits to be sent */
    bool sending;      /* a message is with the transport */
    bool exhausted;    /* there are no more pieces */
    kvc_status status; /* why the stream ends before that */
    char detail[KVT_DETAIL_BYTES];
};

/* Takes the call and a zeroed stream. */
void kvs_stream_begin(kvs_stream *stream, const kvs_stream_kind *kind, kvs_server *server,
                      kvt_call *call, const kvc_digest *tenant);

#endif
