/*
 * shm_server.h: what the files of the listening end share.
 *
 * A listener has a few loops, threads with an epoll set each; a peer (a connection) belongs to one
 * of them, which reads its frames and tells the server what has happened to its calls. Answers are
 * sent by whoever gives them, and by the loop once a full socket has room again.
 */
#ifndef KVTI_SHM_SERVER_H
#define KVTI_SHM_SERVER_H

#include "shm_internal.h"

#define KVTI_SHM_LOOPS_MAX 16u
#define KVTI_SHM_OUT_MAX   1024u /* frames that wait for a reader before we stop to read from it */

typedef struct kvti_peer kvti_peer;
typedef struct kvti_shmcall kvti_shmcall;
typedef struct kvti_loop kvti_loop;

/* A request at the server. Guarded by its peer's lock, but for base, bytes and method, which are
 * the server's between on_call (or got) and recv (or reply). */
struct kvti_shmcall {
    kvt_call base; /* first, so that the server's pointer is ours */
    kvti_node node;
    kvti_peer *peer;
    kvc_method method;
    uint8_t *bytes;      /* the message; NULL once its data was dropped */
    uint64_t len_bytes;  /* charged to the budget */
    uint8_t *next_bytes; /* sent by the client before the server asked; NULL: none, or refused */
    uint64_t next_len_bytes;
    uint64_t next_head_bytes; /* what of the message the decoder is given */
    kvc_status next_status;
    const char *next_why;
    kvti_shmcall *event; /* next in the peer's list of those with something to tell */
    bool listed;
    bool has_next, half_closed;
    bool receiving; /* the server has asked for the next message */
    bool sending;   /* a message is under way */
    bool sent_due, sent_ok;
    bool gone;     /* the client hears nothing of it any more, but for an answer already queued */
    bool answered; /* the server has; freed once the answer has left or was taken back */
};

struct kvti_peer {
    kvt_peer base;          /* what the server is told of it */
    kvti_peer *next, *prev; /* of the loop; its thread's */
    kvti_loop *loop;
    kvc_mutex lock; /* rank TRANSPORT; guards the pipe's output, calls, events, refs, closed */
    kvti_pipe pipe;
    kvti_ring ring;       /* bodies of requests; the loop's */
    kvti_ring reply_ring; /* payloads of replies; of the pipe's output */
    uint64_t ring_bytes;  /* of both, counted at the listener */
    kvti_table calls;
    kvti_shmcall *events, **events_end;
    atomic_uint refs; /* the loop's, its ready list's, and one for each call */
    bool greeted;     /* its hello has come; the loop's */
    bool closed;
    bool joined;    /* the loop has it in its list and its epoll set; the loop's */
    uint32_t polls; /* what the loop waits for; the loop's */
    bool ready;     /* in the loop's list; guarded by the loop's lock */
    kvti_peer *next_ready;
    uint64_t began_ns;
    /* The message being read; the loop's. */
    uint64_t body_late_ns; /* its body is to be there by then */
    uint64_t charged_bytes;
    kvc_status refused; /* OK: it is kept */
    const char *why;
};

struct kvti_loop {
    kvt_listener *listener;
    kvc_thread thread;
    int epoll_fd, wake_fd;
    kvti_peer *peers;              /* the thread's */
    uint64_t next_late_ns;         /* the thread's: the first deadline among its calls, or sooner */
    uint64_t next_rest_ns;         /* ... when to look which rings rest; 0: all do */
    kvc_mutex lock;                /* rank QUEUE; guards what follows */
    kvti_peer *ready, **ready_end; /* with something to do, or new */
    uint32_t n_ready;
    bool stopping, kill;
    bool killed;      /* no peer is left, and none will be */
    kvc_cond changed; /* killed */
};

struct kvt_listener {
    kvt_listen_opts opts;
    char uri[KVTI_SHM_URI_BYTES];
    struct sockaddr_un address;
    uint64_t inode; /* of the socket's name */
    kvti_loop loops[KVTI_SHM_LOOPS_MAX];
    uint32_t n_loops, next_loop;
    kvt_budget own_budget, *budget; /* of request bytes: the one that is charged */
    kvc_mutex lock;                 /* rank QUEUE; guards what follows */
    kvc_cond changed;               /* n_calls or n_peers fell */
    int fd;                         /* of the listening socket; -1: closed */
    uint32_t n_calls, n_peers;
    uint64_t ring_bytes; /* of all peers' rings */
    bool draining, serving;
};

/* ---- listen.c */
/* The loop shall look at the peer. Any thread, also with the peer's lock held. */
void kvti_peer_wake(kvti_peer *peer);
/* ---- peer.c: all on the loop's thread, no lock held */
/* Takes fd; NULL: no memory. */
kvti_peer *kvti_peer_create(kvti_loop *loop, int fd);
void kvti_peer_readable(kvti_peer *peer);
/* Sends what waits, tells the server what is due. */
void kvti_peer_work(kvti_peer *peer);
void kvti_peer_gone(kvti_peer *peer, const char *why);
/* Ends the calls whose deadline has passed; gives the next one (0: none). */
uint64_t kvti_peer_late(kvti_peer *peer, uint64_t now_ns);
void kvti_peer_unref(kvti_peer *peer); /* any thread */
static inline void kvti_peer_ref(kvti_peer *peer)
{
    atomic_fetch_add(&peer->refs, 1);
}
/* ---- call.c */
/* Frees what has left or was taken back, with the calls whose answers are among it. Any thread, no
 * lock held. */
void kvti_shm_over(kvti_out *over);
/* With the peer's lock held: the client has gone or given up, or time is up. */
void kvti_call_gone(kvti_shmcall *call, kvti_out **over_p);
/* With the peer's lock held: something is due; the loop will tell. */
void kvti_call_list(kvti_shmcall *call);
static inline bool kvti_call_has_next(const kvti_shmcall *call)
{
    return call->receiving && (call->has_next || call->half_closed || call->gone);
}
/* With the peer's lock held: queues a frame without a body. */
void kvti_peer_tell(kvti_peer *peer, kvc_frame_kind kind, uint64_t call);
/* With the peer's lock held: queues the end of a call that nobody answers (any more). */
void kvti_peer_end(kvti_peer *peer, uint64_t call, kvc_method method, kvc_status status,
                   const char *why);
/* Counts a message in or out. False: the limit is reached. */
bool kvti_charge(kvt_listener *listener, uint64_t len_bytes);
void kvti_uncharge(kvt_listener *listener, uint64_t len_bytes);

#endif
