/*
 * transport.h: the table that carries requests, and its contract.
 *
 * A transport module holds both ends. The server end listens on URIs and hands each request to
 * on_call; the client end connects and submits transfers. Messages are the plain structs of
 * wire/msg.h; how they look on the medium is the transport's business. A URI's scheme is the
 * transport's name: "grpc://host:port", "grpc+unix:///path", "shm:///path", "inproc://name".
 *
 * Rules for every transport, checked by tests/transport/transport_conformance.c:
 * - A submit that fails never calls back. One that succeeds calls done exactly once, on a thread of
 *   the transport, with no lock held, also after cancel, deadline, or close.
 * - on_call may run on several transport threads at once and must not block. The server answers
 * each call exactly once, from any thread, with kvt_call_reply.
 * - Deadlines travel with the request. The listener gives calls without one, or with one too far
 *   away, its own; past it the call is cancelled, also while its answer waits for a client that
 *   does not read. A call whose client has gone away may still be answered; the
 *   answer is dropped, and its slices are released.
 * - A method that streams its reply (KVC_METHOD_STREAM_REPLY) sends any number of messages before
 * the answer, which then carries a status only. One message is under way at a time, at both ends:
 * the server may send the next once sent has run, and that waits for the peer, so a slow reader
 * slows the sender down and costs the memory of a few messages, however long the stream is.
 * - A method whose requests stream too (KVC_METHOD_STREAM_REQUEST) has its first message with the
 * call, and the server asks for each further one with recv; the client sends it with push. One is
 * under way at a time, at both ends, and pushed waits until the server has room for the next: so a
 * slow server slows the client down. The server answers when it has not asked, or took it back.
 * - Payloads are not copied. So done waits until the transport has let go of the request's data:
 *   normally by then it has; bytes queued for a stalled peer may hold it past a cancel or a
 * deadline until the connection is given up (seconds, never for ever).
 */
#ifndef KVT_TRANSPORT_H
#define KVT_TRANSPORT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

#include "base/arena.h"
#include "wire/msg.h"

#define KVT_DETAIL_BYTES    256
#define KVT_MAX_SLICES      260 /* payload slices of one reply */
#define KVT_MAX_FDS         64u /* descriptors that go with one reply (shm) */
/* What gRPC may hold, beyond the requests that its listeners were handed, for messages that arrive
 * and for connections that wait for one. */
#define KVT_GRPC_READ_BYTES ((uint64_t)32 << 20)

typedef struct kvt_ops kvt_ops;
typedef struct kvt_listener kvt_listener;
typedef struct kvt_conn kvt_conn;
typedef struct kvt_call kvt_call;
typedef struct kvt_xfer kvt_xfer;

/* ---- server end ---------------------------------------------------------------------------- */

/* A piece of a reply's payload. The transport keeps it until release(arg) has been called, once;
 * that may be within kvt_call_reply, so hold no lock there that release takes. */
typedef struct kvt_slice {
    const void *base;
    size_t len_bytes;
    void (*release)(void *arg); /* any thread, takes no long lock; NULL: static memory */
    void *arg;
} kvt_slice;

/* Who is at the other end of a socket of this host (shm), as the kernel says. */
typedef struct kvt_peer {
    uint64_t id; /* of the connection; no process gives one twice, and none is 0 */
    uint32_t uid, gid;
    int32_t pid;
} kvt_peer;

/*
 * A request at the server. Everything it points at lives until kvt_call_reply. Transports embed
 * this struct in their own. user is the server's to use.
 */
struct kvt_call {
    const kvt_ops *ops;
    kvc_request req;
    kvc_arena arena;      /* the server may allocate its reply here */
    uint64_t deadline_ns; /* CLOCK_MONOTONIC; never 0: within max_deadline_ns of the listener */
    const char *tenant;   /* identity of the peer; "default" without certificates;
                           * the server's to set where peer says more */
    void *user;
    const void *held;  /* the server's too */
    uint64_t began_ns; /* the server's too */
    /* Set by the server before its first kvt_call_send: the message was passed on (ok), or the
     * client has gone (not ok). A transport thread, no lock held, once for each send. */
    void (*sent)(kvt_call *call, bool ok);
    /* The same before its first kvt_call_recv, once for each: OK: req is the next message; CLOSED:
     * there is none, the client has sent its last or has gone; else the message was bad or too
     * much, and why (static) says it: to be answered with that. */
    void (*got)(kvt_call *call, kvc_status status, const char *why);
    const kvt_peer *peer; /* shm; else NULL, and fds cannot be passed */
    /* Set before reply: descriptors [n_fds <= KVT_MAX_FDS] that go with an OK. reply takes them
     * (they are closed once they have left); the array is borrowed until then. */
    int *fds;
    uint32_t n_fds;
    const kvt_call *within; /* of a call that the server makes itself: for which; else NULL */
    int cancelled;          /* set by the transport; read it with kvt_call_cancelled */
};

/* Request bytes that listeners hold together, whatever their transports. The server's; it outlives
 * them. */
typedef struct kvt_budget {
    uint64_t max_bytes;
    atomic_uint_least64_t used_bytes;
} kvt_budget;

/* Connections that listeners have together, whatever their transports; beyond max the next is
 * closed as it comes. The server's; it outlives them. gRPC closes connections without a word:
 * theirs count up to a second longer than they last. */
typedef struct kvt_peers {
    uint32_t max;
    atomic_uint n;
} kvt_peers;

/* Limits that are 0 get the transport's defaults: 1 MiB, 1,024 calls, 64 MiB, 10 minutes. */
typedef struct kvt_listen_opts {
    size_t size_bytes; /* of this struct */
    const char *uri;
    void (*on_call)(void *arg, kvt_call *call); /* must not block */
    void *arg;
    uint32_t max_message_bytes;  /* bulk payload of one message; larger ones are refused */
    uint32_t max_calls;          /* in flight at once; beyond: AGAIN */
    uint64_t max_inflight_bytes; /* of requests held at once; beyond: AGAIN */
    kvt_budget *inflight;        /* kept: the limit instead, shared with others; NULL: none */
    kvt_peers *peers;            /* kept: connections count here too; NULL: no limit of ours */
    uint32_t n_threads;          /* 0: min(cores, 4) */
    uint64_t handshake_ns;       /* a connection that has not spoken by then is closed; 0: 10 s */
    uint64_t keepalive_ns;       /* a silent one is asked whether it lives; 0: 30 s */
    uint64_t idle_ns;            /* one without calls is closed; 0: 30 minutes */
    uint64_t max_deadline_ns;    /* from arrival; calls without a nearer deadline get this one */
    uint64_t ring_bytes; /* shm: each staging ring, two a connection, for payloads; 0: 2 MiB */
    /* shm, may be NULL: a connection has ended, and so has every call of it; once. Any thread; may
     * be within kvt_call_reply. */
    void (*peer_gone)(void *arg, uint64_t peer);
} kvt_listen_opts;

/* ---- client end ---------------------------------------------------------------------------- */

typedef struct kvt_connect_opts {
    size_t size_bytes; /* of this struct */
    const char *uri;
    const char *tenant;
    uint32_t n_channels;        /* bulk is striped over them; 0: 1 */
    uint32_t max_message_bytes; /* largest reply payload to accept */
    uint32_t n_threads;         /* that replies arrive on, no more than channels; 0: by cores */
    /* rdma: both ends sum what they send with XXH3-64, and verify what they get; CORRUPT where it
     * differs. The others' media have sums of their own, or never leave the host. */
    bool sums;
    /* rdma: of lent memory registered at once, for rows; 0: 1 GiB, and at most a quarter of the
     * limit on locked memory, together with the process's other connections. */
    uint64_t region_bytes;
} kvt_connect_opts;

/* Where the rows of a group shall lie in the end: row i at base + slot * row_bytes. */
typedef struct kvt_room {
    uint8_t *base;
    const uint32_t *slots; /* [n]; NULL: first_slot, first_slot + 1 ... */
    uint32_t first_slot, n, row_bytes;
} kvt_room;

/*
 * One request in flight at the client. The caller allocates it, fills the first block, and keeps it
 * untouched until done has been called. In done, reply (if status is OK) and its data iovecs are
 * valid until done returns. submit initialises arena, which holds the reply's header; the caller
 * resets it with kvc_arena_reset once done has run and it has finished with the reply.
 */
struct kvt_xfer {
    const kvc_request *req; /* kept until done; its data iovecs too */
    uint64_t deadline_ns;
    uint32_t channel; /* stripe: taken modulo n_channels */
    /* Of FetchRows, FetchRowsStream and FetchBlocks, else NULL; rooms [n_rooms] and what they point
     * at are kept until done: for the rows, or values, of the request in turn. A transport that can
     * writes them there by itself, where the memory is lent (base/lent.h); then done waits until
     * nobody can any more, also past a cancel or the deadline: for a quarter of the time that it
     * had, 1 s at least and 4 s at most, or the connection is given up. What a transfer that failed
     * has left there is undefined. */
    const kvt_room *rooms;
    uint32_t n_rooms;
    void (*done)(kvt_xfer *xfer);
    /* Of a reply that streams, else NULL: called for each message before done, on done's thread;
     * reply is valid until it returns, and the next message is asked for then. */
    void (*message)(kvt_xfer *xfer);
    /* Of requests that stream, else NULL: called on done's thread and before done, once for req and
     * for each push of a message: the next may be pushed, or (not ok) the call is over. */
    void (*pushed)(kvt_xfer *xfer, bool ok);
    void *arg;
    /* result */
    kvc_status status;
    char detail[KVT_DETAIL_BYTES];
    uint32_t retry_after_ms; /* hint that came with AGAIN; 0: none */
    kvc_arena arena;
    kvc_reply reply;
    /* The rows of the reply, or of this message of it, lie in rooms, and reply has no data, only
     * their data_bytes; those of missing rows were not touched. Else they are the reply's data. */
    bool placed;
    /* shm: descriptors that came with the reply. They are closed after done, but for those that
     * done takes by putting -1 in their place. */
    int *fds;
    uint32_t n_fds;
    /* the transport's */
    void *priv;
};

/* ---- the table ------------------------------------------------------------------------------ */

/*
 * REQ: every slot. "Any thread" means the transport locks; none of them blocks unless it says so.
 */
struct kvt_ops {
    const char *name;           /* for logs and kvctl */
    const char *const *schemes; /* NULL-terminated URI schemes */
    /* Starts to listen; on_call may run before it returns. INVALID: bad URI; IO: cannot bind. */
    kvc_status (*listen)(const kvt_listen_opts *opts, kvt_listener **listener_p);
    /* The bound address as a URI that connect takes (the port chosen for port 0). */
    const char *(*listener_uri)(const kvt_listener *listener);
    /* Health as peers see it (grpc.health.v1 and the like); false until set, and from the start of
       a drain. */
    void (*set_serving)(kvt_listener *listener, bool serving);
    /* Takes no new calls (they get CLOSED, or UNAVAILABLE once the transport has told the client to
       go elsewhere, which it does when the answers are out), and blocks until all are answered or
       deadline_ns; what is left then is cancelled. gRPC: and until the clients have closed, for 2 s
       at most, and beyond deadline_ns for 200 ms. */
    void (*drain)(kvt_listener *listener, uint64_t deadline_ns);
    /* Blocks until every thread is gone and every slice released (inproc: also those that a client
       of this process still looks at in done). After drain only. */
    void (*listener_close)(kvt_listener *listener);
    /* Answers a call. status OK: reply (borrowed; may be NULL for an empty one) and slices (the
       array is borrowed, the memory kept until released). Else detail (may be NULL) says why, and
       retry_after_ms (0: none) goes with AGAIN. Any thread; takes the call. */
    void (*reply)(kvt_call *call, kvc_status status, const char *detail, uint32_t retry_after_ms,
                  const kvc_reply *reply, const kvt_slice *slices, uint32_t n_slices);
    /* Sends one message of a reply that streams; reply and slices as for reply, the slices being
       taken on failure too. OK: call->sent runs once, never from within send, and until then the
       call is neither sent to nor answered. INVALID, NO_MEMORY: it does not encode. Any thread. */
    kvc_status (*send)(kvt_call *call, const kvc_reply *reply, const kvt_slice *slices,
                       uint32_t n_slices);
    /* Of requests that stream: asks for the next message; lets go of the last, and of what is in
       arena. call->got runs once, never from within recv, and until then the call is neither
       asked again nor answered (it may be sent to). Any thread. */
    void (*recv)(kvt_call *call);
    /* Takes that back, so that the call can be answered, which is all that may follow. True: got
       will not run; false: it is about to. Any thread. */
    bool (*unrecv)(kvt_call *call);
    /* The server has read req.data for the last time: its memory goes early where it is the
       transport's, and counts no more against max_inflight_bytes; the rest of req stays. At most
       once, before reply. Any thread. */
    void (*drop_data)(kvt_call *call);
    /* Does not wait for the peer: a dead one shows up in the first transfer. */
    kvc_status (*connect)(const kvt_connect_opts *opts, kvt_conn **conn_p);
    /* Any thread. AGAIN: too many in flight; INVALID; CLOSED. */
    kvc_status (*submit)(kvt_conn *conn, kvt_xfer *xfer);
    /* Of requests that stream: sends the next message, or with req NULL says that there is none.
       From message and pushed only, and only once pushed has run for the one before. Borrows req;
       keeps its data until done. INVALID: it does not encode; CLOSED: the call is over; NO_MEMORY.
     */
    kvc_status (*push)(kvt_conn *conn, kvt_xfer *xfer, const kvc_request *req);
    /* Asks for an early end; done still comes, once, with CANCELLED or what happened before. */
    void (*cancel)(kvt_conn *conn, kvt_xfer *xfer);
    /* Cancels all, blocks until every done has run, closes. Never from done. */
    void (*conn_close)(kvt_conn *conn);
};

/* The transport for a URI by its scheme; NULL: none built in. */
const kvt_ops *kvt_find(const char *uri);
/* The i-th registered transport, NULL past the end; the conformance suite loops over it. */
const kvt_ops *kvt_at(uint32_t i);
/*
 * Process-wide set-up that must precede any other use (allocator settings, deadlock detector off);
 * idempotent, any thread. listen and connect call it themselves.
 */
void kvt_init(void);

static inline void kvt_call_reply(kvt_call *call, kvc_status status, const char *detail,
                                  uint32_t retry_after_ms, const kvc_reply *reply,
                                  const kvt_slice *slices, uint32_t n_slices)
{
    call->ops->reply(call, status, detail, retry_after_ms, reply, slices, n_slices);
}

static inline kvc_status KVC_MUST_CHECK kvt_call_send(kvt_call *call, const kvc_reply *reply,
                                                      const kvt_slice *slices, uint32_t n_slices)
{
    return call->ops->send(call, reply, slices, n_slices);
}

static inline bool kvt_streams_reply(kvc_method method)
{
    return (kvc_method_flags(method) & KVC_METHOD_STREAM_REPLY) != 0;
}

static inline bool kvt_streams_request(kvc_method method)
{
    return (kvc_method_flags(method) & KVC_METHOD_STREAM_REQUEST) != 0;
}

static inline void kvt_call_recv(kvt_call *call)
{
    call->ops->recv(call);
}

static inline bool KVC_MUST_CHECK kvt_call_unrecv(kvt_call *call)
{
    return call->ops->unrecv(call);
}

static inline void kvt_call_drop_data(kvt_call *call)
{
    call->ops->drop_data(call);
}

/* True once the client has gone away or given up: work for this call may be dropped, but the call
 * still has to be answered. Any thread. */
static inline bool kvt_call_cancelled(const kvt_call *call)
{
    if (call->within != NULL)
        call = call->within;
    return __atomic_load_n(&call->cancelled, __ATOMIC_ACQUIRE) != 0;
}

#endif
