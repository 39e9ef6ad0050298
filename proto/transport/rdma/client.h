/*
 * client.h: what the files of the connecting end share: client.c, ops.c.
 *
 * Everything is guarded by the loop's mutex but what says otherwise.
 */
#ifndef KVTI_RDMA_CLIENT_H
#define KVTI_RDMA_CLIENT_H

#include "rdma_internal.h"

typedef struct kvtr_rop kvtr_rop;
typedef struct kvtr_channel kvtr_channel;

/*
 * A transfer. It waits at its channel until the link is up and the memory it needs is there, then
 * it is under way in its link's table by its id. Its caller may be told of its end before the
 * server's END has come: the rest then stays in the table until it has, since until then the server
 * may write to its landing.
 */
struct kvtr_rop {
    kvt_conn *conn;
    kvtr_channel *channel;
    kvtr_link *link;       /* under way on it; NULL: waits, or ended */
    kvt_xfer *xfer;        /* NULL: done has been called */
    kvtr_rop *next, *prev; /* of the connection, while xfer is not NULL */
    kvtr_rop *waits;       /* next at the channel */
    kvtr_rop *same;        /* next in the link's bucket */
    kvtr_rop *told;        /* next with something to deliver */
    uint64_t id;
    uint64_t deadline_ns; /* 0: none */
    const void *head;     /* of the request, in arena */
    kvc_frame frame;      /* of the request */
    kvc_arena arena;      /* until it is under way */
    kvtr_buf *landing;    /* where replies are written to */
    kvtr_buf *staging;    /* what the server reads */
    bool waiting;         /* at the channel */
    bool listed;          /* to be told */
    bool ended;           /* status is final; done is about to run */
    bool pushing;         /* a message has not been taken by the server yet */
    bool pushed_due, pushed_ok;
    bool half_closed;
    kvc_status status;
    char detail[KVT_DETAIL_BYTES];
};

struct kvtr_channel {
    kvt_conn *conn;
    kvtr_link *link; /* NULL: none at present */
    kvtr_rop *first, **last;
};

struct kvt_conn {
    kvtr_loop loop; /* first */
    char uri[KVTI_URI_BYTES];
    struct sockaddr_storage addr;
    kvtr_channel *channels;
    uint32_t n_channels;
    uint32_t max_message_bytes;
    bool sums;
    kvtr_rop *ops;               /* those whose done has not run */
    kvtr_rop *told, **told_last; /* to be delivered */
    uint32_t n_ops;
    uint32_t n_landings;
    uint64_t next_id;
    uint64_t next_deadline_ns; /* no op's is earlier; 0: none */
    bool closed;
};

/* ops.c */
bool kvtr_client_begin(kvtr_link *link, const kvc_frame *frame, bool *keep_p);
bool kvtr_client_frame(kvtr_link *link, const kvc_frame *frame, uint8_t *body);
void kvtr_client_down(kvtr_link *link, kvtr_read *reads);
uint64_t kvtr_client_turn(kvtr_loop *loop);
/* With the mutex held. Begins what waits at the channel and can begin. */
void kvtr_begin_ops(kvtr_channel *channel);
/* With the mutex held: everything that waits at the channel ends so. */
void kvtr_fail_waiting(kvtr_channel *channel, kvc_status status, const char *why);
/* With the mutex held: ends an op for its caller; done runs on the loop's thread. */
void kvtr_end_op(kvtr_rop *op, kvc_status status, const char *detail);
void kvtr_list_op(kvtr_rop *op);
/* With the mutex held: copies a payload where the server can read it; false: not now, and full_p
 * says whether later. Sets frame. */
bool kvtr_stage(kvtr_rop *op, kvtr_link *link, kvc_frame *frame, const kvc_request *req);
/* Mutex free: the thread, with a channel that has work and no link. */
void kvtr_start_link(kvtr_channel *channel);

#endif
