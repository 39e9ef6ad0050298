/*
 * server.h: what the files of the listening end share: listen.c, call.c, answer.c.
 *
 * Everything but a call's own request is guarded by the loop's mutex.
 */
#ifndef KVTI_RDMA_SERVER_H
#define KVTI_RDMA_SERVER_H

#include "rdma_internal.h"

typedef struct kvtr_rcall kvtr_rcall;

/* A request at the server. */
struct kvtr_rcall {
    kvt_call base; /* first, so that the server's pointer is ours */
    kvt_listener *listener;
    kvtr_link *link;         /* NULL: it is down */
    kvtr_rcall *same;        /* next in the link's bucket */
    kvtr_rcall *next, *prev; /* of the listener */
    kvtr_rcall *queued;      /* next with something to be told */
    uint64_t id;
    kvc_method method; /* as submitted: base.req is written anew with each message */
    bool in_queue;
    bool dispatched;         /* on_call has been called */
    bool gone;               /* the client has its answer, or went away */
    bool sending;            /* a message is under way */
    bool sent_due, sent_ok;  /* it has ended, and how: the server has not heard yet */
    bool receiving;          /* the server has asked for the next message */
    bool half_closed;        /* the client has sent its last */
    bool has_next;           /* a pushed message is in next_* */
    bool reading;            /* its data is being read from the client */
    kvc_status early_status; /* with which it was ended while reading */
    const char *early_why;
    bool summed;                 /* the client asked for sums */
    kvc_frame frame, next_frame; /* of req, and of the message in next_bytes */
    uint8_t *next_bytes;
    uint64_t landing_addr; /* where the client wants the reply's payload; landing_bytes 0: no place
                            */
    uint32_t landing_key, landing_bytes;
    kvtr_run *runs; /* [n_runs] where it wants the rows, by landing_key; NULL: nowhere */
    uint32_t n_runs;
    uint64_t n_items; /* that earlier messages were about; who sends has it */
    uint8_t *bytes;   /* [head_bytes and payload that came with it] */
    size_t len_bytes;
    kvtr_buf *data; /* payload that was read */
    uint32_t data_bytes;
    uint64_t charged_bytes;
    uint64_t next_charged_bytes; /* for next_bytes */
    kvc_status next_status;      /* not OK: it was refused, and next_bytes is NULL */
    const char *next_why;
};

struct kvt_listener {
    kvtr_loop loop; /* first */
    kvt_listen_opts opts;
    char uri[KVTI_URI_BYTES + 8];
    struct rdma_cm_id *id;
    kvtr_rcall *calls;
    kvtr_rcall *queue, **queue_end;
    uint32_t n_calls, n_lent;
    kvt_budget own_budget, *budget; /* of request bytes: the one that is charged */
    uint64_t next_deadline_ns;      /* no call's is earlier; 0: none */
    bool draining, serving;
};

/* The thread, mutex free. */
bool kvtr_on_begin(kvtr_link *link, const kvc_frame *frame, bool *keep_p);
bool kvtr_on_frame(kvtr_link *link, const kvc_frame *frame, uint8_t *body);
void kvtr_on_read(kvtr_link *link, kvtr_read *read);
void kvtr_on_down(kvtr_link *link, kvtr_read *reads);
uint64_t kvtr_on_turn(kvtr_loop *loop);

extern const char kvtr_too_long[], kvtr_too_many_bytes[];

/* begin.c; with the mutex held. Gives back what was charged for a frame that has begun. */
void kvtr_begun_drop(kvtr_link *link);
/* When a call that comes now is over; needs no mutex. */
uint64_t kvtr_deadline_of(const kvt_listener *listener, const kvc_frame *frame);
/* Until when the link is borne with after a deadline: what waits for the client holds memory. */
uint64_t kvtr_late_of(kvt_listener *listener, uint64_t deadline_ns);
/* The thread looks at what is late at ns, or earlier. */
void kvtr_note_late(kvt_listener *listener, uint64_t ns);

/* ends.c; with the mutex held. Ends what is late, and links whose clients take too long. */
void kvtr_end_late(kvt_listener *listener);

/* NULL: no such call, or it was answered. */
kvtr_rcall *kvtr_find_call(kvtr_link *link, uint64_t id);
/* With the mutex held: ends a call early: the client gets status, the server hears that it has
 * gone. why is static. */
void kvtr_end_early(kvtr_rcall *call, kvc_status status, const char *why);
/* With the mutex held: the call has something to be told. */
void kvtr_queue_call(kvtr_rcall *call);
/* The same, if the server has asked for a message, and there is one or never will be. */
void kvtr_feed(kvtr_rcall *call);
static inline bool kvtr_has_news(const kvtr_rcall *call)
{
    return call->receiving && !call->reading && (call->has_next || call->half_closed || call->gone);
}
/* With the mutex held: the call counts no more, and its link forgets it. */
void kvtr_leave(kvtr_rcall *call);
void kvtr_forget(kvtr_rcall *call);
/* With the mutex held: the payload's memory goes, and counts no more. */
void kvtr_drop_bytes(kvtr_rcall *call);
/* Mutex free; the call has left. */
void kvtr_rcall_free(kvtr_rcall *call);
/* An END without a reply; with the mutex held. */
void kvtr_send_end(kvtr_link *link, uint64_t id, kvc_method method, kvc_status status,
                   const char *detail, uint32_t retry_after_ms, bool summed);
/* Slices of answers that have been released. */
void kvtr_lent_back(kvt_listener *listener, uint32_t n);

#endif
