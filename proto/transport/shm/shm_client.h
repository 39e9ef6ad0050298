/*
 * shm_client.h: what the files of the connecting end share.
 *
 * A connection has one thread, "kvc-shm", which alone reads the socket and alone runs pushed,
 * message and done. Who submits also sends, as far as the socket takes it. The socket is opened by
 * the first submit and, after it broke, by the next.
 */
#ifndef KVTI_SHM_CLIENT_H
#define KVTI_SHM_CLIENT_H

#include "shm_internal.h"

typedef struct kvti_shmop kvti_shmop;

/* A transfer under way: in the connection's table until its thread ends it. Guarded by the
 * connection's lock, but for xfer, which is the thread's. */
struct kvti_shmop {
    kvti_node node;
    kvt_xfer *xfer;
    kvc_method method;
    bool pushing;          /* a message has not been taken by the server yet */
    bool half_closed;      /* the last one has been pushed */
    bool over;             /* it shall end, with what follows */
    kvti_shmop *next_over; /* in the connection's list of those */
    kvc_status status;
    const char *why;
};

struct kvt_conn {
    kvt_connect_opts opts;
    struct sockaddr_un address;
    kvc_thread thread;
    int wake_fd;
    kvc_mutex lock; /* rank TRANSPORT; guards all below but the pipe's input */
    kvc_cond idle;  /* n of ops fell to 0 */
    kvti_pipe pipe;
    kvti_ring ring;       /* bodies of requests, of the server's hello */
    kvti_ring reply_ring; /* payloads of replies; the thread's */
    kvti_table ops;
    kvti_shmop *over, **over_end;
    uint64_t next_id;
    uint64_t next_late_ns; /* the first deadline, or sooner; 0: none */
    uint64_t next_rest_ns; /* when to look whether the ring rests; 0: it does */
    bool greeted;          /* the server's hello has come; the thread's */
    bool closed, stopping;
    /* The frame being read, the thread's: whose it is; NULL: nobody's. */
    kvti_shmop *reading;
    const char *why; /* it cannot be taken; NULL: it can */
};

/* ---- client.c: with the lock held ---- */
/* Ends an op early; the thread will. Nothing where it is to end already. */
void kvti_shmop_end(kvt_conn *conn, kvti_shmop *op, kvc_status status, const char *why);
/* Queues a frame without a body and sends it. */
void kvti_conn_tell(kvt_conn *conn, kvc_frame_kind kind, uint64_t call, kvti_out **over_p);
void kvti_conn_wake(kvt_conn *conn); /* any thread */
/* ---- conn.c */
void kvti_conn_run(void *arg); /* the thread */

#endif
