/*
 * grpc_internal.h: what the files of the gRPC transport share; the only place, with them, that sees
 * grpc/ headers.
 *
 * Every completion queue has one thread. Its events carry a kvti_tag, whose function runs on that
 * thread with no lock held.
 */
#ifndef KVTI_GRPC_INTERNAL_H
#define KVTI_GRPC_INTERNAL_H

#include <stdatomic.h>

#include <grpc/byte_buffer.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/slice.h>
#include <grpc/support/time.h>

#include "base/thread.h"
#include "transport/transport.h"
#include "transport/transport_internal.h"

#define KVTI_TARGET_BYTES        256
/* Beyond the payload: header, tags, and room to answer an overlong message with a reason. */
#define KVTI_MESSAGE_SLACK_BYTES KVC_MAX_HEADER_BYTES
#define KVTI_METADATA_BYTES      (16 << 10)
#define KVTI_MAX_WATCHES         256u
#define KVTI_MAX_REFLECTIONS     64u
/* Flags of methods with a payload, which many calls at a time want. */
#define KVTI_BULK                (KVC_METHOD_BULK_REQUEST | KVC_METHOD_BULK_REPLY)

#define KVTI_STATUS_KEY "kvc-status"
#define KVTI_RETRY_KEY  "retry-after-ms"

#define KVTI_CONTAINER(ptr, type, member) ((type *)(void *)((char *)(ptr)-offsetof(type, member)))

/*
 * What a completion queue hands back. ok is false for a request slot that shutdown returned.
 * gRPC orders the giving of a tag before its return; turn says the same in a way that the thread
 * sanitizer, which cannot see into gRPC, understands.
 */
typedef struct kvti_tag {
    void (*fn)(struct kvti_tag *tag, bool ok);
    atomic_uint turn;
} kvti_tag;

/* Before every call that gives tag to gRPC. */
static inline void kvti_give(kvti_tag *tag)
{
    atomic_fetch_add_explicit(&tag->turn, 1, memory_order_release);
}

/* ---- common.c ------------------------------------------------------------------------------- */

/* gRPC's name for a URI ("host:port", "unix:/path"). INVALID: not one of ours. */
kvc_status kvti_grpc_target(const char *uri, char target_p[KVTI_TARGET_BYTES]) KVC_MUST_CHECK;
/* "/kvasir.v1.KvCache/FetchRows" and so on. */
const char *kvti_method_path(kvc_method method);
grpc_status_code kvti_to_grpc(kvc_status status);
/* The nearest status for a code that came without kvc-status; message decides where needed. */
kvc_status kvti_from_grpc(grpc_status_code code, const char *message);
gpr_timespec kvti_to_timespec(uint64_t deadline_ns);
/* 0: none; UINT64_MAX: beyond what nanoseconds can say. */
uint64_t kvti_from_timespec(gpr_timespec deadline);
grpc_arg kvti_arg(const char *key, int value);
/* Slices of bb as iovecs in arena; NULL when memory is out. They live as long as bb. */
struct iovec *kvti_byte_buffer_pieces(grpc_byte_buffer *bb, kvc_arena *arena, uint32_t *n_p);
/* Runs the events of cq until it is shut down and empty. */
void kvti_run_queue(grpc_completion_queue *cq);
/* Runs one event, waiting for it until deadline_ns (0: for ever). False: shut down and empty. */
bool kvti_run_one(grpc_completion_queue *cq, uint64_t deadline_ns);
void kvti_start(grpc_call *call, const grpc_op *ops, size_t n_ops, kvti_tag *tag);

/* ---- socket.c ------------------------------------------------------------------------------- */

/* An argument of channels whose target is on this machine: what connections need that stay on it.
 * The caller ends it once the channel is made, which has a reference of its own. */
grpc_arg kvti_sockets_arg(void);
void kvti_sockets_arg_end(grpc_arg *arg);
/* The same of a server, whose peers the system asks after keepalive_s of silence and whose
 * connections count in peers (may be NULL). The caller ends it once the server has gone. */
grpc_arg kvti_server_sockets_arg(int keepalive_s, kvt_peers *peers);
/* Of that argument: its connections, which are looked at. */
void kvti_server_sockets_look(const grpc_arg *arg);
/* Whether gRPC's name for an address says that it is on this machine. */
bool kvti_target_is_local(const char *target);

/* ---- peers.c -------------------------------------------------------------------------------- */

typedef struct kvti_accepted kvti_accepted;

/* The connections of a listener. */
typedef struct kvti_sockets {
    kvc_mutex lock; /* rank LEAF; guards the rest; taken under gRPC's own */
    kvt_peers *peers;
    kvti_accepted *accepted;
    uint32_t n, max;
    uint64_t looked_ns;
    bool over;
} kvti_sockets;

/* Borrows peers until over. */
void kvti_sockets_init(kvti_sockets *sockets, kvt_peers *peers);
/* gRPC has accepted fd: it is counted, or shut down. */
void kvti_sockets_come(kvti_sockets *sockets, int fd);
/* Those that have ended count no more. */
void kvti_sockets_look(kvti_sockets *sockets);
/* None counts any more, and none that comes will. */
void kvti_sockets_over(kvti_sockets *sockets);
void kvti_sockets_fini(kvti_sockets *sockets);

/* ---- the server end ------------------------------------------------------------------------- */

typedef struct kvti_queue {
    kvt_listener *listener;
    grpc_completion_queue *cq;
    kvc_thread thread;
    struct kvti_call *oldest, *newest; /* calls in flight; only the queue's thread */
} kvti_queue;

/* Slots beyond kvc_method of a listener's table. */
enum {
    KVTI_HEALTH_CHECK = KVC_METHOD_COUNT,
    KVTI_HEALTH_WATCH,
    KVTI_REFLECT_V1,
    KVTI_REFLECT_V1ALPHA,
    KVTI_UNKNOWN,
    KVTI_SLOTS,
};

/* Calls that live outside call.c, under a limit of their own. */
static inline bool kvti_is_side_call(int slot)
{
    return slot == KVTI_HEALTH_WATCH || slot == KVTI_REFLECT_V1 || slot == KVTI_REFLECT_V1ALPHA;
}

/* A message that was asked for is on its way, or the asking was taken back. */
enum { KVTI_ASK_NONE = 0, KVTI_ASKED, KVTI_ASK_OVER };

/* One request at the server; call.c has its life. */
struct kvti_call {
    kvt_call base; /* first, so that the server's pointer is ours */
    kvti_queue *queue;
    int slot;
    grpc_call *call;
    grpc_call_details details; /* KVTI_UNKNOWN only */
    grpc_metadata_array metadata;
    gpr_timespec deadline;
    grpc_byte_buffer *request, *answer;
    grpc_byte_buffer *part; /* stream.c: the message under way */
    grpc_byte_buffer *next; /* stream.c: the message that was asked for */
    atomic_int asking;      /* KVTI_ASK_*: whose turn that is */
    bool greeted;           /* initial metadata has been sent */
    kvti_tag arrived, closed, sent, part_sent, got;
    atomic_int n_refs;
    uint64_t give_up_ns; /* 0: not among the queue's calls any more */
    struct kvti_call *older, *newer;
    int cancelled;
    uint64_t charged_bytes;
    grpc_slice details_text;
    grpc_metadata trailers[2];
    char trailer_texts[2][12];
};

typedef struct kvti_watch kvti_watch;

struct kvt_listener {
    kvt_listen_opts opts; /* uri points to uri below */
    char uri[KVTI_TARGET_BYTES + 16];
    grpc_server *server;
    grpc_arg sockets; /* kvti_server_sockets_arg */
    void *methods[KVTI_SLOTS];
    kvti_queue *queues;
    uint32_t n_queues;
    kvti_tag shutdown_tag;
    kvt_budget own_budget, *budget; /* of request bytes: the one that is charged */

    /* rank TRANSPORT; guards the rest; nothing is called under it */
    kvc_mutex mutex;
    kvc_cond changed; /* n_calls, n_arriving or n_reflections fell to 0, or gone was set */
    uint32_t n_calls;
    uint32_t n_arriving; /* calls handed over by gRPC and not counted in n_calls yet */
    bool closed;         /* the queues are being shut down: nothing may be started on them */
    bool draining, serving;
    bool gone; /* the server has let go of every call and connection */
    kvti_watch *watches;
    uint32_t n_watches;
    uint32_t n_reflections;
};

/* Runs the queue's events until it is shut down and empty; cancels calls past max_deadline_ns. */
void kvti_serve_queue(kvti_queue *queue);
/* Offers one slot of a method to the queue. */
void kvti_arm(kvti_queue *queue, int slot);
void kvti_call_drop_data(kvt_call *base);
void kvti_call_reply(kvt_call *base, kvc_status status, const char *detail, uint32_t retry_after_ms,
                     const kvc_reply *reply, const kvt_slice *slices, uint32_t n_slices);

/* Header and slices as one message. Takes the slices' memory. */
grpc_byte_buffer *kvti_build_answer(const void *head, size_t head_bytes, const kvt_slice *slices,
                                    uint32_t n_slices);
void kvti_release_all(const kvt_slice *slices, uint32_t n_slices);
/* stream.c */
kvc_status kvti_call_send(kvt_call *base, const kvc_reply *reply, const kvt_slice *slices,
                          uint32_t n_slices);
void kvti_on_part_sent(kvti_tag *tag, bool ok);
void kvti_call_recv(kvt_call *base);
bool kvti_call_unrecv(kvt_call *base);
void kvti_on_got(kvti_tag *tag, bool ok);
/* call.c, for stream.c: drops a reference, on the queue's thread. */
void kvti_unref_call(struct kvti_call *call);
/* Lets go of what the request points at. */
void kvti_free_request(struct kvti_call *call);
/* Decodes call->request, which is not NULL; as kvc_wire_decode_request. */
kvc_status kvti_decode_request(struct kvti_call *call, const char **why_p) KVC_MUST_CHECK;

/* Body of the answer to Check, and its status. The caller gives bb to gRPC and destroys it. */
kvc_status kvti_health_check(kvt_listener *listener, grpc_byte_buffer *request,
                             grpc_byte_buffer **bb_p, const char **why_p) KVC_MUST_CHECK;
/* Takes call and request, and answers until the client or the server ends it. False: too many
 * watchers or no memory; nothing was taken. */
bool kvti_watch_begin(kvti_queue *queue, grpc_call *call, grpc_byte_buffer *request);
/* The same for a reflection (reflect.c). False also while draining. */
bool kvti_reflect_begin(kvti_queue *queue, grpc_call *call, grpc_byte_buffer *request);
/* Tells every watcher what serving is now. */
void kvti_watch_publish(kvt_listener *listener);

/* ---- the client end ------------------------------------------------------------------------- */

typedef struct kvti_xfer kvti_xfer;

/* pull.c: the messages of a reply that streams, taken one after the other. On the connection's
 * thread. */
typedef struct kvti_pull {
    kvt_xfer *xfer;
    grpc_call *call; /* referenced until over */
    kvti_tag got;
    grpc_byte_buffer *message;
    bool ended;        /* call is not referenced any more */
    kvc_status status; /* why no more is taken; OK: the server's status decides */
    const char *why;   /* static */
    void (*over)(struct kvti_pull *pull); /* once, after the last message */
} kvti_pull;

/* Takes the first message. call must have its other batches started. */
void kvti_pull_begin(kvti_pull *pull);

typedef struct kvti_channel {
    grpc_channel *channel;
    void *methods[KVC_METHOD_COUNT];
} kvti_channel;

/* One completion queue of a connection and its thread; channel i belongs to lane i % n_lanes. */
typedef struct kvti_lane {
    grpc_completion_queue *cq;
    kvc_thread thread;
    grpc_call *poster; /* never started: only for empty batches, which wake the thread with a tag */
} kvti_lane;

struct kvt_conn {
    kvti_channel *channels;
    uint32_t n_channels;
    kvti_lane *lanes;
    uint32_t n_lanes;

    /* rank TRANSPORT; guards the rest and every xfer->priv; nothing is called under it */
    kvc_mutex mutex;
    kvc_cond idle; /* n_xfers or n_starting fell to 0 */
    kvti_xfer *xfers;
    uint32_t n_xfers;    /* being started, in the list, or on the way out of done */
    uint32_t n_starting; /* of these: not yet in the list, and using the channels */
    bool closed;
};

kvc_status kvti_connect(const kvt_connect_opts *opts, kvt_conn **conn_p) KVC_MUST_CHECK;
void kvti_conn_close(kvt_conn *conn);
kvc_status kvti_submit(kvt_conn *conn, kvt_xfer *xfer) KVC_MUST_CHECK;
kvc_status kvti_push(kvt_conn *conn, kvt_xfer *xfer, const kvc_request *req) KVC_MUST_CHECK;
void kvti_cancel(kvt_conn *conn, kvt_xfer *xfer);
/* Cancels every transfer that is in flight. closed must be set. */
void kvti_cancel_all(kvt_conn *conn);

#endif
