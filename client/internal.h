/*
 * internal.h: what the files of the client library share.
 *
 * A kvc_op becomes a kvci_call, which is cut into kvci_msg: one message each, retried on its own. A
 * message is in one list, that of its state; client->lock guards the lists, the states, calls,
 * contexts and the current link. Replies are checked and scattered on transport threads without the
 * lock: a message that is SENT belongs to the transport until its done has run.
 *
 * Threads: kvc-prog runs callbacks and timers; kvc-link connects, reconnects and reopens contexts.
 */
#ifndef KVCI_INTERNAL_H
#define KVCI_INTERNAL_H

#include <stdatomic.h>
#include <stdbool.h>

#include "base/lent.h"
#include "base/thread.h"
#include "kvc/client.h"
#include "list.h"
#include "transport/transport.h"

#define KVCI_MAX_INFLIGHT       128u /* messages of one client in flight; the rest is queued */
#define KVCI_MAX_INFLIGHT_PUT   96u  /* of them puts, so that bulk writes leave room for reads */
#define KVCI_MAX_IOVECS         256u /* pieces of one put message */
#define KVCI_MAX_REOPENS        8u   /* of a fetch message's contexts before it gives up */
#define KVCI_MAX_URIS           16u
#define KVCI_MAX_SEGMENTS       (1u << 20) /* of a server's memory, mapped */
#define KVCI_MAX_SCHEMAS        64u /* registered here and made known again after a restart */
#define KVCI_POOL_CALLS         32u
#define KVCI_POOL_BYTES         ((size_t)512 << 10) /* scratch that a pooled call may keep */
#define KVCI_STRIPE_MIN_BYTES   (256u << 10)        /* below it one message beats two channels */
#define KVCI_WINDOW_BYTES       (2u << 20)          /* for each lane and channel: under way */
#define KVCI_REPLY_ARENA_BYTES  ((size_t)16 << 20)
#define KVCI_DEFAULT_TIMEOUT_NS (30ull * 1000000000)
#define KVCI_CONNECT_TIMEOUT_NS (5ull * 1000000000)
#define KVCI_PROBE_TIMEOUT_NS   (2ull * 1000000000)
#define KVCI_REOPEN_TIMEOUT_NS  (5ull * 1000000000)
#define KVCI_CLOSE_TIMEOUT_NS   (1ull * 1000000000)

typedef struct kvci_call kvci_call;
typedef struct kvci_msg kvci_msg;
typedef struct kvci_upload kvci_upload;

/* ---- link.c: one connection ---------------------------------------------------------------- */

typedef struct kvci_link {
    const char *uri; /* of the client's list */
    const kvt_ops *ops;
    kvt_conn *conn;
    bool sums;           /* rdma, and asked for */
    uint32_t submitting; /* threads inside submit; the link lives until it is 0 */
    uint64_t boot_id;
    kvc_limits limits;
} kvci_link;

/* Reads a reply on a transport thread while it is valid. PROTOCOL when it makes no sense. */
typedef kvc_status kvci_take_fn(void *arg, const kvc_reply *reply);

/*
 * Finds a server: the current link if it still answers, else the URIs in order. Publishes the link
 * and makes the known schemas known to a server of another boot. Blocks up to deadline_ns. Only
 * kvc-link, or the opener before that thread runs.
 */
kvc_status kvci_relink(kvc_client *client, uint64_t deadline_ns);
/* One transfer on a link, past the queue and without retries. Blocks. */
kvc_status kvci_link_call(kvci_link *link, const kvc_request *req, uint64_t deadline_ns,
                          kvci_take_fn *take, void *take_arg, uint32_t *retry_after_ms_p);
void kvci_link_close(kvci_link *link);
/* The link, if there is one, is ended and made anew: both ends forget what they think the other
 * knows. What is in flight on it is sent again where it may be. Any thread, without the lock. */
void kvci_link_end(kvc_client *client, const char *why);
/* The thread kvc-link; arg is the client. */
void kvci_keeper_main(void *arg);

/* ---- calls and messages --------------------------------------------------------------------- */

typedef enum kvci_msg_state {
    KVCI_QUEUED = 0,   /* in client->lanes */
    KVCI_SENDING,      /* in no list; a thread is inside submit */
    KVCI_SENT,         /* in no list; the transport has it */
    KVCI_TIMED,        /* in client->timed until due_ns */
    KVCI_WAIT_LINK,    /* in client->wait_link until kvc-link found a server */
    KVCI_WAIT_CONTEXT, /* in client->wait_context until its contexts are open again */
    KVCI_DONE,
} kvci_msg_state;

/* Rows of one group that travel in one message. */
typedef struct kvci_seg {
    kvc_context *context;
    uint64_t gen; /* of the handle it was sent with */
    uint8_t *base;
    const uint32_t *slots; /* [n], or NULL: first_slot, first_slot + 1, ... */
    uint32_t first_slot, n, row_bytes;
} kvci_seg;

struct kvci_msg {
    kvci_node node;
    kvci_call *call;
    kvci_msg_state state;
    kvci_link *link;   /* while SENDING or SENT */
    uint32_t sends;    /* submits so far; tells one flight from the next */
    uint32_t failures; /* in a row; sets the backoff */
    uint32_t reopens;
    bool reregistered; /* an unknown schema was already made known again for it */
    kvc_status last;   /* of the last attempt; OK before the first */
    uint64_t due_ns;
    uint32_t first, n_items; /* the op's items (values, picks, digests) that it carries */
    uint32_t flight_bytes;   /* of the window that it takes while in flight */
    uint32_t n_segs;
    kvci_seg *segs; /* fetch only, as row_groups */
    kvc_row_group *row_groups;
    uint64_t *handle_p; /* in req: where the handle of segs[0] goes; NULL: row_groups have them */
    kvc_request req;
    kvt_xfer xfer;
    /* Of a reply that streams; transport thread. */
    uint32_t n_taken;         /* items answered so far in this attempt */
    kvc_status stream_status; /* not OK: a message of it made no sense */
    const char *stream_why;   /* static */
    kvci_seg *window;         /* [n_segs] the rows of one message */
    kvci_upload *upload;      /* put_stream.c */
    kvc_fetch_info info;      /* of the rows answered so far */
};

/* What differs between the kinds of calls. */
typedef struct kvci_kind {
    const char *name;
    bool bulk_lane;     /* waits behind everything else */
    bool names_schema;  /* NOT_FOUND may mean that a restarted server forgot the schema */
    bool stop_on_error; /* the first failed message ends those not yet sent */
    bool again_ends;    /* AGAIN is an answer: there is another way than to wait */
    bool not_twice;     /* carried out twice it does harm: no retry where the outcome is unknown */
    /* Checks and copies a good reply; transport thread, no lock. why_p gets a static text. */
    kvc_status (*take)(kvci_msg *msg, const kvc_reply *reply, const char **why_p);
    /* Of a reply that streams, else NULL: as take, for each message of it; take then sees the end.
     * The stream starts again from its first message where the attempt is repeated. */
    kvc_status (*message)(kvci_msg *msg, const kvc_reply *reply, const char **why_p);
    /* Of requests that stream, else NULL: the last message has gone; as message. */
    kvc_status (*pushed)(kvci_msg *msg, const char **why_p);
    /* An attempt begins: fills in req; under the lock. NULL: nothing to do. */
    void (*begin)(kvci_msg *msg);
    /* The message failed for good; under the lock. NULL: nothing to do. */
    void (*fail)(kvci_msg *msg, kvc_status status);
    /* Every message is done; under the lock. NULL: nothing to do. */
    void (*finish)(kvci_call *call);
} kvci_kind;

struct kvci_call {
    kvci_node node; /* in client->calls, then client->finished, then the pool */
    kvc_client *client;
    const kvci_kind *kind;
    kvc_op *op;
    kvc_region *region; /* in use by it; may be NULL */
    uint64_t deadline_ns, began_ns;
    uint32_t refs; /* 1 while incomplete, plus one per thread inside submit */
    uint32_t n_msgs, n_left;
    bool cancelled, once; /* once: no retries */
    bool resent;          /* an attempt ended with the outcome unknown and was repeated */
    kvc_status status;
    char detail[KVT_DETAIL_BYTES];
    kvci_msg *msgs;
    uint8_t *scratch; /* msgs and what kvci_carve gave */
    size_t scratch_bytes, used_bytes;
    union {
        struct {
            int8_t *status;
            /* of kvc_opaque_put: the values [n] and what is said of them */
            int8_t *whole_status;
            const uint32_t *n_pieces;
            uint32_t n;
        } put;
        struct {
            uint8_t *base; /* of the region */
            kvc_opaque_value *values;
            struct kvci_gather *gathers; /* [n]; opaque.c */
            int8_t *status;
        } opaque;
        struct {
            int8_t *status;
            kvc_fetch_info *info_p;
            kvc_fetch_info info;
            struct kvci_left *left; /* what the maps did not serve; NULL: all of it */
        } fetch;
        struct {
            const kvc_attend_group *groups;
            int8_t *status;
            kvc_fetch_info *info_p;
            kvc_fetch_info info;
        } attend;
        struct {
            uint8_t *base; /* of the region */
            const kvc_block_part *parts;
            uint32_t n_parts;
            int8_t *status;
            uint8_t *tiers;
        } blocks;
        struct {
            uint32_t *hits_p;
            uint32_t *hits; /* [n_msgs] */
            uint8_t *tiers; /* [digests]; may be NULL */
        } match;
        struct {
            kvci_take_fn *take;
            void *arg;
            bool *resent_p;
        } rpc;
        struct {
            kvc_erase_info *info_p;
            kvc_erase_info *infos; /* [n_msgs] */
        } erase;
        struct {
            void *info_p; /* as the kind's take wants it */
        } keep;
    } u;
};

/* ---- put_stream.c, for opaque.c ---- */

/* What is to be put; borrowed until kvci_upload_new returns, but for src's bytes and the outputs.
 */
typedef struct kvci_put {
    const kvc_digest *schema;
    kvc_promise promise;
    uint64_t ttl_ms;
    const kvc_value *values; /* [n] */
    const kvc_whole *wholes; /* [n]; NULL: no pieces */
    uint32_t n;
    uint64_t bytes; /* of all values */
    const kvc_region *src;
    int8_t *status;       /* [n]; NULL: the call has its own */
    uint64_t *granted_ms; /* [n]; may be NULL */
    size_t extra_bytes;   /* to carve */
} kvci_put;
/* A call that puts them by streams. NULL: no memory. */
kvci_call *kvci_upload_new(kvc_client *client, const kvci_put *put, uint64_t deadline_ns);
/* Folds the statuses of pieces; as kvci_kind.finish. */
void kvci_opaque_put_finish(kvci_call *call);

/* Bytes that kvci_carve takes for n things of a size. */
size_t kvci_carve_bytes(size_t n, size_t size_bytes);
/*
 * A call with n_msgs zeroed messages and extra_bytes to carve. deadline_ns 0: the client's default.
 * NULL: no memory. Ends with kvci_call_start or kvci_call_drop.
 */
kvci_call *kvci_call_new(kvc_client *client, const kvci_kind *kind, uint32_t n_msgs,
                         size_t extra_bytes, uint64_t deadline_ns);
/* 16-byte aligned, zeroed; within what kvci_call_new was asked for. */
void *kvci_carve(kvci_call *call, size_t n, size_t size_bytes);
/* Takes a call that was not started. */
void kvci_call_drop(kvci_call *call);
/* Takes the call and puts it in flight for op. CLOSED, INVALID (op in flight): never calls back. */
kvc_status kvci_call_start(kvci_call *call, kvc_op *op);
/* Under the lock, where a call's last reference may go. */
void kvci_call_put(kvci_call *call);

/* put.c: what both kinds of puts refuse, under this name; *bytes_p: of all values. INVALID, said.
 */
kvc_status kvci_put_check(const kvc_client *client, const char *name, kvc_promise promise,
                          const kvc_value *values, uint32_t n, const kvc_region *src,
                          const kvc_limits *limits, uint64_t *bytes_p);

/* way.c: what a way was found to cost. */
typedef struct kvci_way_state {
    double fixed_ns, byte_ns;
    uint64_t n_small, n_large; /* samples of each */
} kvci_way_state;

void kvci_ways_init(kvc_client *client);
/* Under the lock: a request about so many bytes of rows went well and took so long. near: the
 * server attended, and so many bytes of queries and results crossed. */
void kvci_way_learn(kvc_client *client, bool near, uint64_t bytes, uint64_t qo_bytes,
                    uint64_t took_ns);

/* fetch.c: the statuses of what the maps left go where they belong; under the lock. */
void kvci_fetch_settle(kvci_call *call);
/* fetch_stream.c: what kvc_fetch_stream does differently. */
extern const kvci_kind kvci_fetch_stream_kind;

/* ---- send.c, expire.c: under client->lock ---------------------------------------------------- */

/* Sends what may be sent; drops and retakes the lock around each submit. */
void kvci_pump(kvc_client *client);
/* An attempt ended with this status: finishes the message or says when it is tried again. */
void kvci_settle(kvc_client *client, kvci_msg *msg, kvc_status status, const char *why,
                 uint32_t retry_after_ms);
/* Ends a message for good. detail may be NULL. */
void kvci_msg_finish(kvc_client *client, kvci_msg *msg, kvc_status status, const char *detail);
/* Ends those messages of the call that no transport holds. */
void kvci_call_abort(kvc_client *client, kvci_call *call, kvc_status status, const char *detail);
/* Cancels every message of the call. */
void kvci_call_cancel(kvc_client *client, kvci_call *call);
/* Puts a message back where it waits to be sent. */
void kvci_msg_requeue(kvc_client *client, kvci_msg *msg);
/* Makes kvc-prog wake at due_ns at the latest. */
void kvci_wake_at(kvc_client *client, uint64_t due_ns);
/* Due timers to the queue, expired calls to their end. */
void kvci_expire(kvc_client *client, uint64_t now_ns);
/* Messages that waited for a server go back to the queue, with backoff where they failed often. */
void kvci_link_restored(kvc_client *client);

/* ---- retry.c: pure -----------------------------------------------------------------------------
 */

typedef enum kvci_verdict {
    KVCI_FINISH,
    KVCI_RETRY,  /* after a pause */
    KVCI_RELINK, /* once kvc-link has found a server */
    KVCI_REOPEN, /* once the contexts are open again */
} kvci_verdict;

kvci_verdict kvci_judge(const kvci_msg *msg, kvc_status status);
/* Pause before the next attempt: first_ns doubling up to max_ns, the upper half of it random. */
uint64_t kvci_backoff_ns(uint32_t failures, uint64_t first_ns, uint64_t max_ns, uint64_t *seed_p);

/* ---- op.c -------------------------------------------------------------------------------------
 */

/* The call is complete: under the lock. */
void kvci_call_complete(kvc_client *client, kvci_call *call);
/* Under the lock: it has been submitted and its callback has not been called. */
bool kvci_op_in_flight(const kvc_op *op);
/* The thread kvc-prog; arg is the client. */
void kvci_progress_main(void *arg);

/* ---- rpc.c: one blocking message ----------------------------------------------------------------
 */

typedef struct kvci_rpc_opts {
    uint64_t deadline_ns;
    kvci_take_fn *take; /* may be NULL */
    void *take_arg;
    bool once;      /* no retries */
    bool *resent_p; /* may be NULL; true: an earlier attempt may have been carried out */
} kvci_rpc_opts;

/* Sets kvc_last_error on failure. Not from a callback. */
kvc_status kvci_rpc(kvc_client *client, const kvc_request *req, const kvci_rpc_opts *opts);

/* ---- context.c, reopen.c ------------------------------------------------------------------------
 */

struct kvc_context {
    kvci_node node; /* in client->reopens while queued */
    kvc_client *client;
    kvc_digest schema;
    uint64_t ttl_ms;
    kvc_digest *blocks; /* owned by whoever holds busy */
    uint32_t capacity;
    _Atomic uint32_t n_blocks;
    /* under client->lock */
    uint64_t handle, gen;
    bool busy;            /* an extend or a reopen owns blocks */
    bool reopening;       /* the handle is stale; fetches wait */
    struct kvci_map *map; /* see map.h; NULL: none */
    atomic_bool has_map;
    uint32_t n_cuts; /* truncates so far */
    bool closing;    /* its owner waits for busy: not queued again */
    bool suspect;    /* the server may hold more blocks than we do: reopen before the next extend */
};

/* A context over blocks [n], copied, without a handle; NULL after kvci_fail. */
kvc_context *kvci_context_new(kvc_client *client, const kvc_digest *schema,
                              const kvc_digest *blocks, uint32_t n, uint64_t ttl_ms);
void kvci_context_free(kvc_context *context);
/* Waits for whoever else works on the context and becomes its busy owner. TIMED_OUT, said. */
kvc_status kvci_context_take(kvc_context *context, uint64_t deadline_ns);
/*
 * Ends that: OK publishes n_blocks and, where it is another, the new handle, and lets waiting
 * fetches go on. ambiguous: after a failure the server's length is not known.
 */
void kvci_context_give(kvc_context *context, kvc_status status, bool ambiguous, uint64_t handle,
                       uint32_t n_blocks);
/* The busy owner's: whether the handle must be opened anew before it is used. */
bool kvci_context_is_stale(kvc_context *context);
/* Tells the server to forget a handle, best effort. Waits a second at most, and after that not
 * again before the server has answered one. */
void kvci_handle_close(kvc_client *client, uint64_t handle);
/* deadline_ns, or that of the client's default. */
uint64_t kvci_deadline(const kvc_client *client, uint64_t deadline_ns);

typedef kvc_status kvci_send_fn(void *arg, const kvc_request *req, uint64_t deadline_ns,
                                kvci_take_fn *take, void *take_arg);

/* A kvci_send_fn through the queue, with its retries; arg is the client. */
kvci_send_fn kvci_send_rpc;
/* OpenContext and as many ExtendContext as n blocks need. *handle_p is set on OK. */
kvc_status kvci_open_chain(const kvc_context *context, uint32_t n, uint32_t max_digests,
                           kvci_send_fn *send, void *send_arg, uint64_t deadline_ns,
                           uint64_t *handle_p);
/* Under the lock: the context of this generation is stale; kvc-link shall reopen it. */
void kvci_context_stale(kvc_context *context, uint64_t gen);
/* Under the lock, held again on return: reopens the next queued context. Only kvc-link. */
void kvci_reopen_next(kvc_client *client);
/* Under the lock: messages that waited for the context go on, or end with status. */
void kvci_context_settled(kvc_context *context, kvc_status status, const char *detail);
/* Under the lock: some context of the message is being reopened. */
bool kvci_msg_waits(const kvci_msg *msg);

/* ---- scatter.c: pure ------------------------------------------------------------------------ */

/*
 * Checks a FetchRows reply against segs and copies its rows to their slots. Nothing is written
 * unless all of it makes sense. status [picks] may be NULL. PROTOCOL, with *why_p static; or what
 * writing to a GPU ended with.
 */
kvc_status kvci_scatter(const kvc_region *dst, const kvci_seg *segs, uint32_t n_segs,
                        const kvc_reply *reply, int8_t *status, const char **why_p);

/* The same for rows that the transport has put into their slots. */
kvc_status kvci_take_placed(const kvc_region *dst, const kvci_seg *segs, uint32_t n_segs,
                            const kvc_reply *reply, int8_t *status, const char **why_p);

/* The checks on the missing rows alone; *bytes_p: what the others have by their row_bytes. */
kvc_status kvci_check_missing(const kvci_seg *segs, uint32_t n_segs, const kvc_reply *reply,
                              uint64_t *bytes_p, const char **why_p);
/* After that: OK for each of n picks, and the missing ones' own statuses. */
void kvci_put_statuses(const kvc_reply *reply, int8_t *status, uint32_t n);
uint64_t kvci_iov_bytes(const struct iovec *iov, uint32_t n_iov);

/* A place in a reply's payload. */
typedef struct kvci_cursor {
    const struct iovec *iov;
    uint32_t i;
    size_t off_bytes;
    const kvc_region *dst; /* that it is copied to; NULL: memory of the host */
    kvc_status status;     /* the first failure to write to a GPU's */
} kvci_cursor;

/* Copies the next len_bytes, which must be there. */
void kvci_copy_out(kvci_cursor *cur, uint8_t *dst, size_t len_bytes);
/* Goes on behind them. */
void kvci_skip(kvci_cursor *cur, size_t len_bytes);

/* ---- region.c, schema.c, error.c ------------------------------------------------------------- */

struct kvc_region {
    kvc_client *client;
    uint8_t *base;
    size_t len_bytes;
    bool lent;                    /* rows may be written there by the transport */
    kvc_region_gpu gpu;           /* of a GPU's memory; else copy_in is NULL */
    const kvc_lent_gpu *lent_gpu; /* what transports say of it; NULL: nothing */
    uint32_t refs;                /* calls that use it; under client->lock */
};

static inline bool kvci_region_on_gpu(const kvc_region *region)
{
    return region->gpu.copy_in != NULL;
}

/* What a device has written there can be read from now on. DEVICE, whatever the caller's function
   says: other statuses are answers of a server, which are judged and perhaps asked for again. */
static inline kvc_status kvci_region_flush(const kvc_region *region)
{
    return region->gpu.flush == NULL || region->gpu.flush(region->gpu.arg) == KVC_OK ? KVC_OK
                                                                                     : KVC_DEVICE;
}

/* UNSUPPORTED, said, where it is a GPU's: for calls that read or sum what is there. */
kvc_status kvci_region_check_host(const kvc_region *region, const char *name);

typedef struct kvci_schema {
    kvc_digest digest;
    kvc_schema *schema;
} kvci_schema;

/* Makes every known schema known to the server of a link. Best effort; blocks. */
void kvci_schemas_restore(kvc_client *client, kvci_link *link, uint64_t deadline_ns);

/* Copies a caller's struct that begins with its size_bytes to one of `now` bytes, of which `first`
 * were there when it was first published; what it lacks is 0. False: its size cannot be. */
bool kvci_take_sized(void *struct_p, const void *callers, size_t first_bytes, size_t now_bytes);
/* Sets kvc_last_error and returns status. */
kvc_status kvci_fail(kvc_status status, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Keeps a text that another thread may load later by its ticket; texts of old tickets are lost. */
uintptr_t kvci_error_store(const char *text);
/* Loads it into kvc_last_error, or the status's name where it is lost. */
void kvci_error_load(uintptr_t ticket, kvc_status status);

/* ---- the client -------------------------------------------------------------------------------
 */

enum { KVCI_LANE_URGENT = 0, KVCI_LANE_BULK, KVCI_LANES };

struct kvc_client {
    kvc_limits limits_at_open; /* fixed */
    uint64_t connect_timeout_ns, default_timeout_ns, reopen_timeout_ns;
    uint32_t n_channels, n_uris;
    bool sums; /* over rdma; likewise the next */
    uint64_t region_bytes;
    char *uri_text; /* uris point into it */
    const char *uris[KVCI_MAX_URIS];
    int8_t uri_sums[KVCI_MAX_URIS]; /* what the URI itself asks for: 1 sums, -1 none, 0 nothing */

    kvc_mutex lock; /* KVC_RANK_CLIENT; guards all that follows */
    kvc_limits limits;
    kvci_link *link;   /* NULL: none */
    bool link_suspect; /* a transfer failed on it: nothing is sent until kvc-link looked */
    bool link_over;    /* kvc-link is to end it, whether it answers or not */
    uint64_t boot_id;
    kvci_node lanes[KVCI_LANES], timed, wait_link, wait_context, reopens;
    kvci_node calls, finished, pool;
    uint32_t n_pooled, inflight, inflight_put, next_channel;
    uint64_t inflight_bytes[KVCI_LANES]; /* flight_bytes of those in flight */
    uint32_t live;                       /* calls whose completion has not been seen yet */
    uint32_t waiters, pumpers;
    uint64_t next_due_ns, seed;
    bool closing, stopping;
    kvci_schema schemas[KVCI_MAX_SCHEMAS];
    uint32_t n_schemas;
    kvci_way_state ways[KVC_WAY_COUNT];
    uint32_t n_choices;
    bool mapping;             /* a thread maps, which owns the two that follow */
    uint32_t n_mapping;       /* who must end it before the next one may */
    struct kvci_epoch *epoch; /* what the server has passed; NULL: nothing */
    kvc_map_opts map_opts;
    bool maps_wanted, maps_refused; /* contexts map themselves; this link cannot */
    bool closes_hang; /* the last handle's close was not answered: others are not waited for */
    uint64_t maps_pause_ns; /* memory was short: none maps itself until then */
    uint64_t sweep_due_ns;  /* segments may be without a map; UINT64_MAX: none */
    struct kvci_left *left; /* memory for the next fetch of mapped rows */
    kvc_cond prog_cond, keeper_cond;
    kvc_cond done_cond; /* an op completed, a context settled, a count of the above fell to 0 */
    kvc_thread prog, keeper;
};

/* Limits that hold now. */
kvc_limits kvci_limits(kvc_client *client);
/* Payload of one message of a call that moves bytes in all: an even share of each channel, within
 * max_bytes, and not below KVCI_STRIPE_MIN_BYTES. */
uint32_t kvci_target_bytes(const kvc_client *client, uint64_t bytes, uint32_t max_bytes);

#endif
