/*
 * client.h: what the files of the connecting end share: client.c, ops.c, ops_begin.c.
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
    uint64_t patience_ns; /* that its server has to let go of its caller's memory */
    const void *head;     /* of the request, in arena */
    kvc_frame frame;      /* of the request */
    kvc_arena arena;      /* until it is under way */
    kvtr_buf *landing;    /* where replies are written to */
    kvtr_buf *staging;    /* what the server reads */
    kvtr_run *runs;       /* [n_runs] where its rows shall be written to; NULL: to a landing */
    uint32_t n_runs;
    uint64_t n_items;    /* that earlier messages were about; the thread's */
    const void *placing; /* the range that they lie in, while the server may write there */
    uint64_t let_go_ns;  /* it has ended, and the server has until then to say so; 0: no matter */
    bool waiting;        /* at the channel */
    bool beginning;      /* the thread registers memory for it */
    bool listed;         /* to be told */
    bool ended;          /* status is final; done is about to run */
    bool pushing;        /* a message has not been taken by the server yet */
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
    bool begin_due;            /* something waits for the thread to register memory for it */
    bool closed;
};

/* ops.c; with the mutex held. */
/* It is in the link's table from here, and no more: the server is done with it, or the queue pair
 * is gone. */
void kvtr_op_keep(kvtr_rop *op, kvtr_link *link);
void kvtr_op_forget(kvtr_rop *op);
void kvtr_op_leave(kvtr_rop *op); /* its channel */
void kvtr_op_drop_memory(kvtr_rop *op);

/* Of a request with so long to go when it was submitted; UINT64_MAX: it has no deadline. */
static inline uint64_t kvtr_let_go_ns(uint64_t timeout_ns)
{
    uint64_t patience_ns = timeout_ns / 4;
    if (patience_ns < KVTI_LET_GO_LEAST_NS)
        return KVTI_LET_GO_LEAST_NS;
    return patience_ns < KVTI_LET_GO_MOST_NS ? patience_ns : KVTI_LET_GO_MOST_NS;
}

bool kvtr_client_begin(kvtr_link *link, const kvc_frame *frame, bool *keep_p);
bool kvtr_client_frame(kvtr_link *link, const kvc_frame *frame, uint8_t *body);
void kvtr_client_down(kvtr_link *link, kvtr_read *reads);
uint64_t kvtr_client_turn(kvtr_loop *loop);
/* With the mutex held. Begins what waits at the channel and can begin. On the loop's thread, where
 * memory may be registered, with the mutex free meanwhile; elsewhere not. */
void kvtr_begin_ops(kvtr_channel *channel, bool on_thread);
/* With the mutex held: everything that waits at the channel ends so. */
void kvtr_fail_waiting(kvtr_channel *channel, kvc_status status, const char *why);
/* With the mutex held: ends an op for its caller; done runs on the loop's thread. */
void kvtr_end_op(kvtr_rop *op, kvc_status status, const char *detail);
void kvtr_list_op(kvtr_rop *op);
/* With the mutex held, which is free while memory is registered where this is the loop's thread:
 * copies a payload where the server can read it, and says so in frame; false: there is no such
 * place, or (not on the thread) the thread is to begin it, and begin_due is set. */
bool kvtr_stage(kvtr_rop *op, kvtr_link *link, kvc_frame *frame, const kvc_request *req,
                bool on_thread);
/* Before it is submitted: where the rows of the transfer shall be written to. */
void kvtr_plan_places(kvtr_rop *op, const kvt_xfer *xfer);
/* It is in no table and nobody's. */
void kvtr_op_free(kvtr_rop *op);
/* Mutex free: the thread, with a channel that has work and no link. */
void kvtr_start_link(kvtr_channel *channel);

#endif
