/*
 * shm_internal.h: what the files of the shared-memory transport share.
 *
 * One unix stream socket per connection carries the frames of wire/frame.h. Bodies of puts travel
 * through a staging ring, a memfd that the server made; descriptors (the ring, segments of the dram
 * tier) travel beside the frames. A pipe is what both ends have of a socket: its input is read by
 * one thread, its output is guarded by the lock of whose it is.
 */
#ifndef KVTI_SHM_INTERNAL_H
#define KVTI_SHM_INTERNAL_H

#include <stdatomic.h>
#include <sys/un.h>

#include "base/thread.h"
#include "transport/transport.h"
#include "transport/transport_internal.h"
#include "wire/frame.h"

#define KVTI_SHM_PATH_BYTES sizeof(((struct sockaddr_un *)0)->sun_path)
#define KVTI_SHM_URI_BYTES  (KVTI_SHM_PATH_BYTES + 8)
#define KVTI_SHM_MAX_PEERS  4096u       /* connections of a listener without kvt_peers */
#define KVTI_SHM_IN_BYTES   (64u << 10) /* of input read at once */
#define KVTI_SHM_MAX_FDS    KVT_MAX_FDS /* that go with one frame */
#define KVTI_SHM_BUCKETS    256u        /* of a connection's calls by id */
#define KVTI_SHM_RING_FROM  (16u << 10) /* shorter bodies go through the socket */
#define KVTI_SHM_HELLO_MAX  4096u       /* of a later version's, of which the rest is skipped */
#define KVTI_SHM_RING_SHARE 4u          /* of max_inflight_bytes: all rings of a listener */
#define KVTI_SHM_RING_BYTES (2u << 20)  /* unless the listener says otherwise */
#define KVTI_SHM_RING_MAX   (1u << 30)

/* Flags of frames: how many descriptors came with it, in units of 256. */
#define KVTI_SHM_HAS_FDS 0x0100u /* spare[1] says how many */

/* ---- calls and transfers by their ids -------------------------------------------------------- */

typedef struct kvti_node {
    uint64_t id;
    struct kvti_node *chain, *next, *prev;
} kvti_node;

typedef struct kvti_table {
    kvti_node *buckets[KVTI_SHM_BUCKETS];
    kvti_node *all;
    uint32_t n;
} kvti_table;

kvti_node *kvti_table_find(const kvti_table *table, uint64_t id); /* NULL: not there */
void kvti_table_add(kvti_table *table, kvti_node *node);
void kvti_table_remove(kvti_table *table, kvti_node *node);

/* ---- the staging ring ------------------------------------------------------------------------ */

/* The first page of a ring's memfd. */
typedef struct kvti_ring_page {
    _Atomic uint64_t taken; /* position up to which the reading end has copied out */
} kvti_ring_page;

/* Positions count bytes since the start and never fall; a body lies whole, at position modulo
 * len_bytes, from data on. Guarded like its pipe's output at the writing end, its input at the
 * other.
 */
typedef struct kvti_ring {
    int fd; /* the server's until it has been passed */
    kvti_ring_page *page;
    uint8_t *data;
    uint64_t len_bytes; /* 0: there is none */
    uint64_t at;        /* writer: next free position; reader: copied out up to here */
    /* Writer: `at` when it was looked at last, and when its pages were given back. */
    uint64_t seen_at, rested_at;
} kvti_ring;

/* How long a ring rests before its pages go back to the system; to be set before anything runs. */
extern uint64_t kvti_shm_rest_ns;

/* Makes a sealed memfd of len_bytes (rounded to pages) and maps it. NO_MEMORY, UNSUPPORTED. */
kvc_status kvti_ring_create(uint64_t len_bytes, kvti_ring *ring_p) KVC_MUST_CHECK;
/* Maps what the server passed; borrows fd. INVALID: it is not len_bytes long or not sealed. */
kvc_status kvti_ring_map(int fd, uint64_t len_bytes, kvti_ring *ring_p) KVC_MUST_CHECK;
void kvti_ring_unmap(kvti_ring *ring);
/* Writer: copies data in. False: there is no room now. */
bool kvti_ring_put(kvti_ring *ring, const struct iovec *data, uint32_t n_data, uint32_t len_bytes,
                   uint64_t *at_p);
/* Writer: whether it holds pages, and is to be looked at every kvti_shm_rest_ns. */
bool kvti_ring_holds_pages(const kvti_ring *ring);
/* That look: gives the pages back where all is taken and nothing was put since the last one. */
void kvti_ring_rest(kvti_ring *ring);
/* Reader: whether the peer may have put len_bytes at position at. */
bool kvti_ring_holds(const kvti_ring *ring, uint64_t at, uint32_t len_bytes);
/* Reader: copies them out (dst NULL: not), and lets the peer have the room again. */
void kvti_ring_take(kvti_ring *ring, uint64_t at, uint32_t len_bytes, uint8_t *dst);

/* ---- a socket's two directions --------------------------------------------------------------- */

typedef struct kvti_out kvti_out;

/* A frame on its way out: one allocation, with what head, detail, data and fds need behind it. */
struct kvti_out {
    kvti_out *next;
    const void *owner; /* the call or transfer that may take it back; NULL: nobody */
    kvc_frame frame;
    uint8_t wire[KVC_FRAME_BYTES];
    uint8_t *text; /* [head_bytes + detail_bytes] */
    struct iovec *data;
    kvt_slice *slices; /* [n_slices] to be released; data points at the same memory */
    int *fds;          /* [n_fds] closed once sent */
    uint8_t *copy;     /* malloc'd: the rest of data that was taken back half way */
    uint32_t n_data, n_slices, n_fds;
    size_t sent_bytes, total_bytes; /* total: once it has begun */
    bool begun, ends;               /* ends: of a call's answer */
};

/* What a frame is made of; all borrowed but slices and fds, which the frame takes on success. */
typedef struct kvti_parts {
    const void *owner;
    const void *head;
    const char *detail;
    const struct iovec *data;
    const kvt_slice *slices; /* instead of data */
    const int *fds;
    uint32_t n_data, n_slices, n_fds;
} kvti_parts;

typedef struct kvti_pipe {
    int fd; /* -1: none */
    /* input */
    uint8_t *in; /* [KVTI_SHM_IN_BYTES] malloc'd; NULL while nothing is in it */
    size_t in_from, in_to;
    bool in_body; /* frame is the header of the body that is being read */
    kvc_frame frame;
    uint8_t *body; /* malloc'd; NULL: the body is skipped, or empty */
    size_t body_got, body_bytes;
    int fds[2 * KVT_MAX_FDS];
    uint32_t n_fds;
    bool takes_fds;
    /* output */
    kvti_out *first, **last;
    uint32_t n_out; /* in that list */
    bool blocked;   /* the socket is full: flush when it is writable */
    bool broken;    /* writing failed: the reader will find the end */
    kvti_ring *ring;
} kvti_pipe;

/* Called for each frame. begin: its header has come; true: keep its body, in memory that begin may
 * have put to *body_p (body_bytes of the frame follow in it), false: skip it. end: all has come;
 * takes body, which is NULL where it was skipped. Both: false ends the connection. */
typedef struct kvti_reader {
    bool (*begin)(void *arg, const kvc_frame *frame, bool *keep_p);
    bool (*end)(void *arg, const kvc_frame *frame, uint8_t *body);
    void *arg;
} kvti_reader;

/* Takes fd. */
void kvti_pipe_open(kvti_pipe *pipe, int fd, bool takes_fds);
/* Closes what is left; the output must be empty. */
void kvti_pipe_close(kvti_pipe *pipe);
/* Reads what there is, at most some 100 frames' worth. False: the connection is over, and *why_p
 * (static) says why. */
bool kvti_pipe_read(kvti_pipe *pipe, const kvti_reader *reader, const char **why_p);
/* Takes n descriptors that came with the frame whose end is being called. False: fewer came. */
bool kvti_pipe_take_fds(kvti_pipe *pipe, int *fds, uint32_t n);

/* A frame with room for its parts, or NULL. data_bytes and the lengths in frame are filled in. */
kvti_out *kvti_out_create(const kvc_frame *frame, const kvti_parts *parts);
/* Releases slices, closes fds, frees; a list of them, not with a lock held. */
void kvti_out_free(kvti_out *list);
void kvti_pipe_queue(kvti_pipe *pipe, kvti_out *out);
/* Sends what the socket takes; what has gone is put in front of *over_p. Does not block. */
void kvti_pipe_flush(kvti_pipe *pipe, kvti_out **over_p);
/* Takes back what belongs to owner: frames not begun go to *over_p; of one that has begun, the rest
 * is copied, so that the owner's memory is free. Where descriptors are among it the pipe is broken:
 * who passed them believes that the other end has them, so both start anew. */
void kvti_pipe_drop(kvti_pipe *pipe, const void *owner, kvti_out **over_p);
/* Takes everything back. */
void kvti_pipe_drop_all(kvti_pipe *pipe, kvti_out **over_p);

/* ---- names ----------------------------------------------------------------------------------- */

/* The address of shm:///path. INVALID: no such URI, or too long. */
kvc_status kvti_shm_address(const char *uri, struct sockaddr_un *address_p) KVC_MUST_CHECK;

/* ---- the table's slots ----------------------------------------------------------------------- */
kvc_status kvti_shm_listen(const kvt_listen_opts *opts, kvt_listener **listener_p);
const char *kvti_shm_listener_uri(const kvt_listener *listener);
void kvti_shm_set_serving(kvt_listener *listener, bool serving);
void kvti_shm_drain(kvt_listener *listener, uint64_t deadline_ns);
void kvti_shm_listener_close(kvt_listener *listener);
void kvti_shm_recv(kvt_call *base);
bool kvti_shm_unrecv(kvt_call *base);
void kvti_shm_drop_data(kvt_call *base);
void kvti_shm_reply(kvt_call *base, kvc_status status, const char *detail, uint32_t retry_after_ms,
                    const kvc_reply *reply, const kvt_slice *slices, uint32_t n_slices);
kvc_status kvti_shm_send(kvt_call *base, const kvc_reply *reply, const kvt_slice *slices,
                         uint32_t n_slices);
kvc_status kvti_shm_connect(const kvt_connect_opts *opts, kvt_conn **conn_p);
kvc_status kvti_shm_submit(kvt_conn *conn, kvt_xfer *xfer);
kvc_status kvti_shm_push(kvt_conn *conn, kvt_xfer *xfer, const kvc_request *req);
void kvti_shm_cancel(kvt_conn *conn, kvt_xfer *xfer);
void kvti_shm_conn_close(kvt_conn *conn);

#endif
