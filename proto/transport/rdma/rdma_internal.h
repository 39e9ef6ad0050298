/*
 * rdma_internal.h: what the files of the RDMA transport share.
 *
 * A loop is one thread with its event channels; a listener has one, a connection has one. A link is
 * one RC connection of a loop. A domain is a protection domain with what is registered in it. One
 * mutex per loop (rank TRANSPORT) guards everything of it; only the loop's thread polls, destroys
 * links and calls back, and it calls back with the mutex free.
 */
#ifndef KVTI_RDMA_INTERNAL_H
#define KVTI_RDMA_INTERNAL_H

#include "base/lent.h"
#include "base/thread.h"
#include "transport/transport_internal.h"
#include "verbs.h"
#include "wire/frame.h"

#define KVTI_FRAG_BYTES    4096u /* of one SEND, its envelope included */
#define KVTI_ENV_BYTES     8u    /* u32 bytes, u16 credits given back, u16 of 0 */
#define KVTI_N_RECV        32u   /* receives posted on a link, at most: 128 KiB */
#define KVTI_N_SEND        16u   /* fragments under way on a link, at most: 64 KiB */
#define KVTI_WIDE_LINKS    128u  /* of a listener; further ones get fewer: 48 KiB */
#define KVTI_N_RECV_FEW    8u
#define KVTI_N_SEND_FEW    4u
#define KVTI_SQ_DEPTH      320u     /* work requests asked for */
#define KVTI_READ_WR       0x10000u /* in a work request's id: a READ, else a fragment */
#define KVTI_MAX_READS     16u      /* outstanding READs of a link */
#define KVTI_INLINE_BYTES  256u     /* asked for */
#define KVTI_MAX_SGE       32u      /* used of what the device has */
#define KVTI_CALL_BUCKETS  64u
#define KVTI_URI_BYTES     300u
#define KVTI_LANDINGS      16u /* buffers of a connection that replies may be written to */
#define KVTI_MAX_CREDITS   UINT16_MAX
/* Beyond either, a client that does not take its answers is granted no more than it needs to give
 * credits back. */
#define KVTI_OUT_MAX       256u
#define KVTI_OUT_MAX_BYTES (1u << 20) /* of memory of ours; slices are the server's */

#define KVTI_RESOLVE_MS 2000
#define KVTI_TICK_NS    ((uint64_t)200 * 1000000)  /* how late a silent link is noticed */
#define KVTI_FLUSH_NS   ((uint64_t)2 * 1000000000) /* for answers on their way at a close */

/* How long the server has to let go of a caller's memory once the caller has given up: a quarter of
 * the request's own timeout, within these. */
#define KVTI_LET_GO_LEAST_NS ((uint64_t)1 * 1000000000)
#define KVTI_LET_GO_MOST_NS  ((uint64_t)4 * 1000000000)

/* Regions of callers that a connection has registered at once. */
#define KVTI_REGIONS        64u
#define KVTI_REGION_BYTES   ((uint64_t)1 << 30) /* unless its options say more or less */
/* A larger region is cut into windows of this part of what may be registered, each of which begins
 * in the middle of the one before: so rows that lie within half a window have one key. */
#define KVTI_WINDOWS        4u
#define KVTI_MAX_WINDOWS    4096u /* of a region; what would have more is never registered */
/* A region that was used this lately gives way to none: several that are used in turn and have no
 * room together would be registered and deregistered for ever. */
#define KVTI_REGION_REST_NS ((uint64_t)5 * 1000000000)
extern uint64_t kvtr_region_rest_ns; /* which tests set before the first connection */

/* A frame's flag: spare[2] is the sum of it and of what goes with it, wherever that is. */
#define KVTI_SUMMED    0x0100u
/* Of a REQUEST for rows or whole values: its data are runs (places.c), for these to be written to
 * by the key spare[1]. Of its END, or a MESSAGE: there they are. */
#define KVTI_PLACED    0x0200u
#define KVTI_MAX_RUNS  256u
#define KVTI_RUN_BYTES 16u

typedef struct kvtr_loop kvtr_loop;
typedef struct kvtr_link kvtr_link;
typedef struct kvtr_domain kvtr_domain;

/* ---- memory.c, ranges.c
 * -------------------------------------------------------------------------------- */

/* Memory of the pool, registered. */
typedef struct kvtr_buf {
    kvtr_domain *domain;
    struct kvtr_buf *next; /* free */
    uint8_t *bytes;
    struct ibv_mr *mr;
    uint32_t size_bytes, bin;
    uint64_t put_ns; /* free since then */
} kvtr_buf;

#define KVTI_BINS    29u                         /* 8 KiB to 1 MiB, four to an octave */
#define KVTI_KEEP_NS ((uint64_t)10 * 1000000000) /* for which a free buffer is kept */

/* A range of lent memory, or a window of one that is larger than a client may register; registered
 * after its first use. */
typedef struct kvtr_range {
    uint8_t *base;
    size_t len_bytes;
    uint8_t *whole; /* of which it is a window; its base where it is none */
    size_t whole_bytes;
    kvc_lent_gpu *gpu; /* whose memory it is; NULL: the host's */
    struct ibv_mr *mr;
    bool wanted;
    bool tried;      /* it is being registered, or was, well or not */
    bool told;       /* that the whole is too large */
    uint32_t n_used; /* clients: transfers that the server may write to it for */
    uint64_t used_ns;
} kvtr_range;

/* Guarded by its loop's mutex. */
struct kvtr_domain {
    kvtr_loop *loop;
    kvtr_domain *next;
    struct ibv_context *context;
    struct ibv_pd *pd;
    uint32_t n_links, n_lent; /* links that use it, buffers handed out */
    bool shared;              /* by the links of the loop; iWARP: one each */
    int access;               /* of the pool */
    kvtr_buf *free[KVTI_BINS];
    kvtr_range *ranges; /* ascending */
    uint32_t n_ranges, max_ranges;
    void *dropping; /* the range that is deregistered at the domain's end; NULL: none */
    kvc_lent_watch watch;
};

/* All with the loop's mutex free; they take it. */
kvc_status kvtr_domain_get(kvtr_loop *loop, struct ibv_context *context,
                           kvtr_domain **domain_p) KVC_MUST_CHECK;
void kvtr_domain_put(kvtr_domain *domain);
/* The loop's thread: frees the domains that nobody uses; shared ones at the loop's end only. */
void kvtr_domains_sweep(kvtr_loop *loop);
/* With the mutex held: one that is registered and free. NULL: there is none. */
kvtr_buf *kvtr_buf_find(kvtr_domain *domain, uint32_t len_bytes);
/* With the mutex held, which is free while one is registered: the domain stays meanwhile, and all
 * else may change. NULL: the pool's cap is reached, or it cannot be registered (*full_p false). */
kvtr_buf *kvtr_buf_get(kvtr_domain *domain, uint32_t len_bytes, bool *full_p);
void kvtr_buf_put(kvtr_buf *buf);
/* The loop's thread: gives back what was not used for a while. */
void kvtr_pool_trim(kvtr_loop *loop);
/* Watches lent memory for a new domain, and ends that. */
void kvtr_ranges_begin(kvtr_domain *domain);
void kvtr_ranges_end(kvtr_domain *domain);
/* The thread that registers; stop once stopping is set. */
kvc_status kvtr_ranges_start(kvtr_loop *loop, const char *thread_name) KVC_MUST_CHECK;
void kvtr_ranges_stop(kvtr_loop *loop);
/* With the mutex held: the registration that covers all of it; NULL: there is none, or not yet. */
struct ibv_mr *kvtr_range_find(kvtr_domain *domain, const void *base, size_t len_bytes);
/* The same, and until kvtr_range_leave of its base it stays registered and lent. summed: this
 * process is to read what is written there, which it cannot from a GPU's memory: NULL. */
struct ibv_mr *kvtr_range_use(kvtr_domain *domain, const void *base, size_t len_bytes, bool summed,
                              const void **base_p);
void kvtr_range_leave(kvtr_domain *domain, const void *base);
struct ibv_mr *kvtr_register(struct ibv_pd *pd, void *base, size_t len_bytes, int access);
/* What became of memory of a GPU; why: of COPIED, static, and what the device's calls said. */
typedef struct kvtr_gpu_result {
    kvc_lent_way way;
    const char *why;
    int error_dmabuf, error_peer;
} kvtr_gpu_result;
/* Memory of a GPU, that begins off_bytes behind the first byte of what was lent: by its dma-buf, or
 * by its address. */
struct ibv_mr *kvtr_register_gpu(struct ibv_pd *pd, void *base, size_t len_bytes, int access,
                                 const kvc_lent_gpu *gpu, uint64_t off_bytes,
                                 kvtr_gpu_result *result_p);
void kvtr_deregister(struct ibv_mr *mr);

/* ---- places.c; pure ---------------------------------------------------------------------------
 */

/* Neighbouring rows at the client. */
typedef struct kvtr_run {
    uint64_t addr;
    uint32_t n_rows, row_bytes;
} kvtr_run;

/* Where the next bytes of a payload go. */
typedef struct kvtr_place {
    uint64_t addr, len_bytes;
} kvtr_place;

/* Writes runs_p [KVTI_MAX_RUNS]; their number, 0 where it would be more. */
uint32_t kvtr_rooms_runs(const kvt_room *rooms, uint32_t n_rooms, kvtr_run *runs_p);
void kvtr_runs_encode(const kvtr_run *runs, uint32_t n_runs, uint8_t *out_p);
void kvtr_runs_decode(const uint8_t *in, uint32_t n_runs, kvtr_run *runs_p);
/* Whether what is fetched so may have places: rows, as one answer or a stream, and whole values. */
static inline bool kvtr_has_places(kvc_method method)
{
    return method == KVC_FETCH_ROWS || method == KVC_FETCH_ROWS_STREAM ||
           method == KVC_FETCH_BLOCKS;
}
/* Rows or values that an answer, or a message of it, says something of. */
uint64_t kvtr_reply_items(kvc_method method, const kvc_reply *reply);
/* The places of its data_bytes: those of the runs from item `first` on, but for missing ones. Given
 * to the caller: free(). INVALID: the bytes are not those of the items that are there; NO_MEMORY;
 * NULL then. */
kvc_status kvtr_reply_cut(kvc_method method, const kvc_reply *reply, uint64_t first,
                          uint64_t data_bytes, const kvtr_run *runs, uint32_t n_runs,
                          kvtr_place **places_p, uint32_t *n_p);

/* ---- link.c, send.c, chain.c, recv.c --------------------------------------------------------- */

/* Something to send: a chain of WRITEs or none, then a frame in one fragment or more. */
typedef struct kvtr_out {
    struct kvtr_out *next;
    uint8_t *bytes; /* [len_bytes] header and body */
    size_t len_bytes, tail_bytes, sent_bytes;
    kvt_slice *slices; /* [n_slices] released once it is sent */
    uint32_t n_slices;
    uint32_t slice_at; /* tail_bytes: the slices follow bytes; where the next fragment begins */
    size_t slice_off_bytes;
    bool chain; /* slices, or buf, are to be written to places first */
    uint32_t n_places;
    kvtr_place *places; /* [n_places] */
    uint32_t remote_key;
    uint32_t data_bytes;
    kvtr_buf *buf; /* copied payload */
    kvt_listener *lender;
    uint64_t message_of; /* the call whose MESSAGE it is; 0: none's */
    uint64_t late_ns;    /* when the link breaks if it has not got there; 0: no matter */
    uint32_t *counted;   /* one less once it has got there or never will; under the mutex */
} kvtr_out;

/* A READ into buf; done runs on the loop's thread with the mutex free. */
typedef struct kvtr_read {
    struct kvtr_read *next;
    kvtr_buf *buf;
    uint32_t len_bytes;
    uint64_t remote_addr;
    uint32_t remote_key;
    void *arg;
} kvtr_read;

/* A fragment under way, by its slot of the ring. */
typedef struct kvtr_posted {
    bool busy;
    uint32_t n_wrs; /* itself and the unsignalled WRITEs before it */
    kvtr_out *out;  /* whose last fragment it is */
} kvtr_posted;

/* A frame of which the header is here: what the owner made of it. The loop's thread alone. */
typedef struct kvtr_begun {
    bool in_body;        /* more of it is to come */
    bool counted;        /* a call of it counts already */
    kvc_status refused;  /* its body is skipped, and this is what its call hears */
    const char *why;     /* static */
    uint64_t late_ns;    /* when the link breaks if it is not whole; 0: no matter */
    uint64_t held_bytes; /* charged for it */
    uint8_t *body;       /* [body_bytes] put together here; NULL: in one fragment, or skipped */
    size_t body_bytes, got_bytes;
} kvtr_begun;

typedef enum kvtr_link_state {
    KVTI_LINK_NEW = 0,
    KVTI_LINK_CONNECTING, /* resolving, or waiting for the other end */
    KVTI_LINK_UP,
    KVTI_LINK_DOWN, /* nothing is posted any more; about to be destroyed */
} kvtr_link_state;

struct kvtr_link {
    kvtr_loop *loop;
    kvtr_link *next; /* of the loop */
    kvtr_link_state state;
    void *owner; /* the loop's owner's: a channel, or NULL */
    struct rdma_cm_id *id;
    kvtr_domain *domain;
    struct ibv_comp_channel *channel;
    struct ibv_cq *cq;
    uint32_t n_recv, n_send; /* of fragments */
    uint8_t *ring;           /* [n_recv + n_send][FRAG_BYTES] */
    struct ibv_mr *ring_mr;
    bool has_qp;
    bool spoken;     /* the peer has sent something, or the connection is known to stand */
    bool broken;     /* to be taken down by the loop's thread; see kvtr_is_broken */
    bool nudge;      /* the peer is to be asked whether it lives */
    bool closing;    /* to be taken down once all is sent */
    const char *why; /* static */
    uint32_t max_sge, max_inline_bytes, sq_depth, sq_used, sq_unsignalled;
    uint32_t max_reads, n_reads;
    uint32_t peer_frag_bytes, peer_max_message_bytes;
    bool peer_reads;         /* it can READ from us */
    bool peer_places;        /* it writes rows to where they belong */
    bool peer_stream_places; /* also those of streams, and whole values */
    uint32_t credits, owed;
    uint32_t granted; /* fragments that the peer may still send */
    uint32_t n_outs;  /* queued, and not all of it posted yet */
    size_t out_bytes; /* of these */
    uint32_t n_sends; /* fragments under way */
    uint32_t send_at; /* next slot of the ring */
    kvtr_out *out, **out_end;
    kvtr_read *read, **read_end;
    kvtr_posted posted[KVTI_N_SEND];
    kvtr_read *reading[KVTI_MAX_READS]; /* under way */
    kvc_frame frame;                    /* being put together */
    kvtr_begun begun;
    uint64_t heard_ns, said_ns, used_ns, born_ns;
    void *calls[KVTI_CALL_BUCKETS];
};

/* Frames that are about to be freed outside the mutex. */
typedef struct kvtr_junk {
    kvtr_out *outs;
    kvtr_read *reads; /* that will never be done */
} kvtr_junk;

/* What a loop's owner does. */
typedef struct kvtr_owner {
    /* The header of a frame has come; false: it breaks the protocol. *keep_p false: the body is
     * not wanted. Fills in refused, late_ns and what is counted of link->begun. Like on_frame. */
    bool (*on_begin)(kvtr_link *link, const kvc_frame *frame, bool *keep_p);
    /* A frame has come, with its body (NULL: not wanted); the thread, mutex free. False: it breaks
     * the protocol. */
    bool (*on_frame)(kvtr_link *link, const kvc_frame *frame, uint8_t *body);
    void (*on_read)(kvtr_link *link, kvtr_read *read);
    /* A copy of an event that was acknowledged; private data is in it. */
    void (*on_cm)(kvtr_loop *loop, struct rdma_cm_id *id, const struct rdma_cm_event *event);
    /* The link is down and about to be freed; nothing of it is in the device's hands. reads: those
     * that were not done. */
    void (*on_down)(kvtr_link *link, kvtr_read *reads);
    /* Delivers what is queued and looks after deadlines; when to come again (0: no matter). */
    uint64_t (*on_turn)(kvtr_loop *loop);
} kvtr_owner;

struct kvtr_loop {
    const kvtr_owner *owner;
    void *arg;
    kvc_mutex mutex;
    kvc_cond changed;
    kvc_thread thread;
    int epoll_fd, wake_fd;
    struct rdma_event_channel *cm;
    bool stopping;
    bool awake; /* wake_fd is written and not yet read */
    bool is_client;
    uint64_t pool_bytes, pool_max_bytes; /* of all domains, handed out or free */
    uint64_t pool_keep_ns, trimmed_ns;
    kvc_thread registrar;
    kvc_cond range_wanted;
    bool ranges_wanted;
    kvtr_domain *registering; /* a range of it, at registering_base; or deregistering */
    void *registering_base;
    uint32_t n_regions; /* clients: ranges that are registered, their bytes, and the most of them */
    uint64_t region_bytes, region_max_bytes;
    uint64_t
        region_shared_bytes; /* the most of all clients' regions in this process; 0: no limit */
    bool told_too_large;     /* a region that is larger than any that may be registered */
    uint64_t keepalive_ns, handshake_ns, idle_ns; /* 0: none */
    kvtr_link *links;
    kvtr_domain *domains;
    kvtr_junk junk;
};

/* loop.c */
kvc_status kvtr_loop_init(kvtr_loop *loop, const char *thread_name) KVC_MUST_CHECK;
/* Ends the thread, which takes every link down first. */
void kvtr_loop_fini(kvtr_loop *loop);
/* With the mutex held: the thread has something to do. */
void kvtr_loop_wake(kvtr_loop *loop);
/* Frees what was put aside; mutex free. */
void kvtr_junk_free(kvtr_junk *junk);
/* With the mutex held: gives what was put aside to the caller. */
kvtr_junk kvtr_junk_take(kvtr_loop *loop);

/* link.c; the loop's thread, mutex free. */
kvtr_link *kvtr_link_create(kvtr_loop *loop, struct rdma_cm_id *id);
/* Queue pair, completion queue, receives; id has its device. */
kvc_status kvtr_link_setup(kvtr_link *link) KVC_MUST_CHECK;
/* Takes it down and frees it. */
void kvtr_link_destroy(kvtr_link *link);
/* Handles what has completed. */
void kvtr_link_poll(kvtr_link *link);
/* With the mutex held: it is to be taken down; why is static. */
void kvtr_link_break(kvtr_link *link, const char *why);
/* What the ends tell each other in the private data of the handshake. */
#define KVTI_INTRO_BYTES 28u
void kvtr_intro_write(const kvtr_link *link, uint8_t out_p[KVTI_INTRO_BYTES]);
bool kvtr_intro_read(kvtr_link *link, const void *data, size_t len_bytes);
void kvtr_conn_param(kvtr_link *link, uint8_t *intro, struct rdma_conn_param *param_p);

/* send.c; with the mutex held. */
/* A frame and its body; with KVTI_SUMMED, spare[2] is the sum of its data. Where it has data here
 * and n_data is 0, slices are to follow. NULL: no memory. */
kvtr_out *kvtr_out_create(const kvc_frame *frame, const void *head, const char *detail,
                          const struct iovec *data, uint32_t n_data);
/* Takes out. Posts what can be posted. */
void kvtr_send(kvtr_link *link, kvtr_out *out);
/* A frame without a body; nothing where memory is out, but that breaks the link. */
void kvtr_send_plain(kvtr_link *link, kvc_frame_kind kind, uint64_t call);
void kvtr_start_read(kvtr_link *link, kvtr_read *read);
void kvtr_pump(kvtr_link *link);
void kvtr_out_free(kvtr_out *out);

/* chain.c; with the mutex held. Work requests that writing slices to places takes; 0: not all of
 * the slices is registered. */
uint32_t kvtr_chain_wrs(kvtr_link *link, const kvt_slice *slices, uint32_t n_slices,
                        const kvtr_place *places, uint32_t n_places);
/* True once the chain of out has been posted, or there is none; false: the queue is full, or the
 * link is broken now. */
bool kvtr_post_chain(kvtr_link *link, kvtr_out *out);
bool kvtr_post(kvtr_link *link, struct ibv_send_wr *wr);

/* sum.c; pure. */
/* Of a frame with KVTI_SUMMED; head: [head_bytes + detail_bytes], data_sum: kvc_pieces_sum of the
 * data. spare[2] does not matter. */
uint64_t kvtr_frame_sum(const kvc_frame *frame, const void *head, uint64_t data_sum);
/* OK: the sum is right, or there is none to be; else CORRUPT, counted. */
kvc_status kvtr_check_sum(const kvc_frame *frame, const void *head, const struct iovec *data,
                          uint32_t n_data, const char **why_p) KVC_MUST_CHECK;

/* recv.c; the loop's thread, mutex free. A fragment has come; false: the link is broken. */
bool kvtr_take_fragment(kvtr_link *link, uint8_t *bytes, uint32_t len_bytes);
/* In on_frame: its body as memory of the caller's own; NULL: no memory. */
uint8_t *kvtr_take_body(kvtr_link *link, const uint8_t *body);

/* Also without the mutex, on the loop's thread: others may break the link meanwhile. */
static inline bool kvtr_is_broken(const kvtr_link *link)
{
    return __atomic_load_n(&link->broken, __ATOMIC_ACQUIRE);
}

/* The most of a payload that goes with its frame. */
static inline bool kvtr_fits_fragment(const kvtr_link *link, size_t len_bytes)
{
    return KVC_FRAME_BYTES + len_bytes + KVTI_ENV_BYTES <= link->peer_frag_bytes;
}

/* ---- common.c -------------------------------------------------------------------------------- */

/* rdma://host:port -> an address; INVALID. */
kvc_status kvtr_rdma_address(const char *uri, struct sockaddr_storage *addr_p) KVC_MUST_CHECK;
/* A static text for an event that ends a connection. */
const char *kvtr_cm_reason(enum rdma_cm_event_type type);

/* ---- the table's slots ----------------------------------------------------------------------- */
kvc_status kvtr_rdma_listen(const kvt_listen_opts *opts, kvt_listener **listener_p);
const char *kvtr_rdma_listener_uri(const kvt_listener *listener);
void kvtr_rdma_set_serving(kvt_listener *listener, bool serving);
void kvtr_rdma_drain(kvt_listener *listener, uint64_t deadline_ns);
void kvtr_rdma_listener_close(kvt_listener *listener);
void kvtr_rdma_recv(kvt_call *base);
bool kvtr_rdma_unrecv(kvt_call *base);
void kvtr_rdma_drop_data(kvt_call *base);
void kvtr_rdma_reply(kvt_call *base, kvc_status status, const char *detail, uint32_t retry_after_ms,
                     const kvc_reply *reply, const kvt_slice *slices, uint32_t n_slices);
kvc_status kvtr_rdma_send(kvt_call *base, const kvc_reply *reply, const kvt_slice *slices,
                          uint32_t n_slices);
kvc_status kvtr_rdma_connect(const kvt_connect_opts *opts, kvt_conn **conn_p);
kvc_status kvtr_rdma_submit(kvt_conn *conn, kvt_xfer *xfer);
kvc_status kvtr_rdma_push(kvt_conn *conn, kvt_xfer *xfer, const kvc_request *req);
void kvtr_rdma_cancel(kvt_conn *conn, kvt_xfer *xfer);
void kvtr_rdma_conn_close(kvt_conn *conn);

#endif
