/*
 * frame.h: the fixed frame that shm and rdma put around a message.
 *
 * A frame is a header of 64 bytes, little-endian, then head_bytes of a message's header as wire.h
 * encodes it, detail_bytes of text and data_bytes of payload, unless the payload goes elsewhere
 * (KVC_FRAME_ELSEWHERE). gRPC does not use it. Pure functions, any thread, no I/O, no memory.
 *
 * One call: REQUEST -> END; with streams, MESSAGE in either direction before END, one under way at
 * a time in each direction, and CREDIT from the receiver once it has taken one. REQUEST counts as
 * the first MESSAGE of a stream of requests. After CANCEL the client drops what still comes.
 */
#ifndef KVC_WIRE_FRAME_H
#define KVC_WIRE_FRAME_H

#include <stdbool.h>
#include <stddef.h>

#include "wire/msg.h"

#define KVC_FRAME_BYTES           64u
#define KVC_FRAME_VERSION         1u
#define KVC_FRAME_DETAIL_BYTES    255u                         /* text of an answer, no NUL */
#define KVC_FRAME_HEAD_BYTES      (KVC_MAX_HEADER_BYTES + 16u) /* with field 15's tag, length */
#define KVC_FRAME_DATA_BYTES      KVC_MAX_VALUE_BYTES          /* payload */
#define KVC_FRAME_MAX_DEADLINE_NS (7ull * 24 * 3600 * 1000 * 1000000) /* further away: none */
#define KVC_HELLO_BYTES           64u

typedef enum kvc_frame_kind {
    KVC_FRAME_HELLO = 1,   /* first in each direction; head: kvc_hello */
    KVC_FRAME_REQUEST = 2, /* begins a call; the client chooses its id */
    KVC_FRAME_MESSAGE = 3, /* a further message of a stream, or (LAST, empty) there are no more */
    KVC_FRAME_END = 4,     /* the answer: status, detail, and where OK a reply; ends the call */
    KVC_FRAME_CANCEL = 5,  /* the client has given up */
    KVC_FRAME_CREDIT = 6,  /* the peer's last message of this stream was taken: send the next */
    KVC_FRAME_GOAWAY = 7,  /* the server drains: calls under way end, new ones get CLOSED */
    KVC_FRAME_OWN_FIRST = 64, /* a transport's own kinds */
    KVC_FRAME_OWN_LAST = 127,
} kvc_frame_kind;

#define KVC_FRAME_LAST 1u /* of MESSAGE: none follows */
#define KVC_FRAME_ELSEWHERE                                                                        \
    2u /* data_bytes do not follow in the frame: spare says where they are */
#define KVC_FRAME_OWN_FLAGS 0xff00u /* a transport's own; the others must be 0 */

typedef struct kvc_frame {
    kvc_frame_kind kind;
    kvc_method method; /* REQUEST, MESSAGE and END; else 0 */
    uint32_t flags;
    kvc_status status;    /* of END; else OK */
    uint64_t call;        /* 0: of the connection */
    uint64_t deadline_ns; /* of REQUEST: time left, so that clocks may differ; 0: none */
    uint32_t retry_after_ms;
    uint32_t head_bytes, detail_bytes, data_bytes;
    uint64_t spare[3]; /* the transport's: a ring's offset, an address and its rkey, a sum */
} kvc_frame;

/* What the ends tell each other first, as the head of HELLO. 0 in a limit: none. */
typedef struct kvc_hello {
    uint32_t version;           /* the highest that the sender speaks */
    uint32_t max_message_bytes; /* payload that it takes in one message */
    uint32_t max_calls;         /* under way at once */
    uint32_t flags;             /* the transport's */
    uint64_t spare[4];          /* the transport's: a ring's size, a queue's depth */
    uint64_t boot_id;           /* of the server; 0 from clients */
} kvc_hello;

/* Writes the header. INVALID: a length, kind, flag, status or method beyond its limit. */
kvc_status kvc_frame_encode(const kvc_frame *frame, uint8_t out_p[KVC_FRAME_BYTES]) KVC_MUST_CHECK;

/*
 * Reads a header from in [in_bytes]. AGAIN: fewer than KVC_FRAME_BYTES. PROTOCOL: no frame of this
 * version, or a field beyond its limit; *why_p (may be NULL) gets a static text. The lengths are
 * within their limits then; that so many bytes are there is the caller's to see.
 */
kvc_status kvc_frame_decode(const void *in, size_t in_bytes, kvc_frame *frame_p,
                            const char **why_p) KVC_MUST_CHECK;

/* Bytes that follow the header in the frame. */
size_t kvc_frame_body_bytes(const kvc_frame *frame);

void kvc_hello_encode(const kvc_hello *hello, uint8_t out_p[KVC_HELLO_BYTES]);
/* PROTOCOL: shorter than KVC_HELLO_BYTES, or version 0. Longer ones are of later versions. */
kvc_status kvc_hello_decode(const void *in, size_t in_bytes, kvc_hello *hello_p) KVC_MUST_CHECK;

#endif
