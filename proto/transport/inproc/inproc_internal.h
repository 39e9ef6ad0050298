/*
 * inproc_internal.h: what the files of the in-process transport share.
 *
 * Requests and reply headers go through the wire format, so that this transport refuses what the
 * others refuse and neither side sees the other's memory change; a reply's payload slices are
 * handed over as they are. One mutex guards all of it: this transport is for tests and small
 * programs, not for speed.
 */
#ifndef KVTI_INPROC_INTERNAL_H
#define KVTI_INPROC_INTERNAL_H

#include "base/thread.h"
#include "transport/transport.h"
#include "transport/transport_internal.h"

#define KVTI_NAME_BYTES 128

typedef struct kvti_incall kvti_incall;
typedef struct kvti_inop kvti_inop;

/* A request at the server. */
struct kvti_incall {
    kvt_call base; /* first, so that the server's pointer is ours */
    kvt_listener *listener;
    kvc_method method;        /* as submitted: base.req is written anew with each message */
    kvti_incall *queued;      /* next to be dispatched */
    kvti_incall *next, *prev; /* in flight at the listener */
    kvti_inop *op;            /* who waits; NULL: gone */
    bool dispatched;          /* on_call has been called */
    bool in_queue;            /* of the listener: to be dispatched, or something has happened */
    bool sending;             /* a message is under way */
    bool sent_due, sent_ok;   /* it has ended, and how: the server has not heard yet */
    bool receiving;           /* the server has asked for the next message */
    bool half_closed;         /* the client has sent its last */
    uint8_t *next_bytes;      /* pushed by the client; NULL: none */
    size_t next_len_bytes;
    uint8_t *bytes; /* the message; NULL once its data was dropped */
    size_t len_bytes;
};

/* A message on its way to the client: its header and the payload's slices. */
typedef struct kvti_answer {
    uint8_t *head; /* malloc'd; NULL: there is none */
    size_t head_bytes;
    kvt_slice *slices; /* [n_slices] malloc'd; released once the client is done with them */
    uint32_t n_slices;
    kvt_listener *lender; /* whose slices they are */
} kvti_answer;

/* A transfer at the client. Waiting until it is put on the connection's finished list for good; a
 * message of a stream puts it there too. */
struct kvti_inop {
    kvt_conn *conn;
    kvt_xfer *xfer;
    kvti_inop *next, *prev; /* waiting at the connection */
    kvti_inop *finished;    /* next to be delivered */
    kvti_incall *call;      /* at the server; NULL: answered or let go */
    uint64_t deadline_ns;   /* the call's; 0: none */
    bool waiting;
    bool listed;                /* in the finished list */
    bool pushing;               /* a message has not been taken by the server yet */
    bool pushed_due, pushed_ok; /* it has been, or never will; the client has not heard yet */
    kvc_status status;
    char detail[KVT_DETAIL_BYTES];
    uint32_t retry_after_ms;
    kvti_answer answer; /* the reply, or the next message of a stream */
};

struct kvt_listener {
    kvt_listener *next;
    kvt_listen_opts opts;
    char uri[KVTI_NAME_BYTES];
    kvc_thread thread;
    kvc_cond work;    /* something queued, or stopping */
    kvc_cond changed; /* n_calls or n_lent fell */
    kvti_incall *queue, **queue_end;
    kvti_incall *calls;
    uint32_t n_calls;
    uint32_t n_lent;                /* slices of answers, not yet released */
    kvt_budget own_budget, *budget; /* of request bytes: the one that is charged */
    bool draining, stopping, serving;
};

struct kvt_conn {
    char uri[KVTI_NAME_BYTES];
    kvc_thread thread;
    kvc_cond work; /* something finished, a new deadline, or stopping */
    kvc_cond idle; /* n_ops fell to 0 */
    kvti_inop *waiting;
    kvti_inop *finished, **finished_end;
    uint32_t n_ops; /* waiting, finished, or in done */
    bool closed, stopping;
};

/* The mutex (rank TRANSPORT) and, under it, the listeners there are. */
void kvti_inproc_lock(void);
void kvti_inproc_unlock(void);
kvc_mutex *kvti_inproc_mutex(void);
kvt_listener **kvti_inproc_listeners(void);

/* INVALID unless uri is inproc://name and fits. */
kvc_status kvti_inproc_check_uri(const char *uri) KVC_MUST_CHECK;
/* All of these with the mutex held. */
kvt_listener *kvti_inproc_find(const char *uri);
/* Counts a call in and queues it; it keeps op's pointer. AGAIN, CLOSED; *why_p then says why. */
kvc_status kvti_inproc_enqueue(kvt_listener *listener, kvti_incall *call,
                               const char **why_p) KVC_MUST_CHECK;
/* Ends an op that waits: it goes to its connection's thread. The server's call, if any, is let go.
 */
void kvti_inproc_finish(kvti_inop *op, kvc_status status, const char *detail,
                        uint32_t retry_after_ms);

/* Puts an op that has something to deliver on the finished list, unless it is there. */
void kvti_inproc_list(kvti_inop *op);
/* The message under way has been taken, or its client has gone: the server's thread hears of it. */
void kvti_inproc_sent(kvti_incall *call, bool ok);
/* The server has asked for a message, and there is one or never will be. */
static inline bool kvti_inproc_has_next(const kvti_incall *call)
{
    return call->receiving && (call->next_bytes != NULL || call->half_closed || call->op == NULL);
}
/* If the server has asked for a message, and there is one or never will be: it hears of it. */
void kvti_inproc_feed(kvti_incall *call);
/* The message that the client pushed was taken, or never will be. */
void kvti_inproc_pushed(kvti_inop *op, bool ok);

void kvti_incall_free(kvti_incall *call);
/* Releases slices that were counted in listener->n_lent; not with the mutex held. */
void kvti_inproc_release(kvt_listener *listener, const kvt_slice *slices, uint32_t n_slices);
/* Releases the slices and frees the rest; empty afterwards. Not with the mutex held. */
void kvti_answer_free(kvti_answer *answer);

/* ---- the table's slots ----------------------------------------------------------------------- */
kvc_status kvti_inproc_listen(const kvt_listen_opts *opts, kvt_listener **listener_p);
const char *kvti_inproc_listener_uri(const kvt_listener *listener);
void kvti_inproc_set_serving(kvt_listener *listener, bool serving);
void kvti_inproc_drain(kvt_listener *listener, uint64_t deadline_ns);
void kvti_inproc_listener_close(kvt_listener *listener);
void kvti_inproc_recv(kvt_call *base);
bool kvti_inproc_unrecv(kvt_call *base);
void kvti_inproc_drop_data(kvt_call *base);
void kvti_inproc_reply(kvt_call *base, kvc_status status, const char *detail,
                       uint32_t retry_after_ms, const kvc_reply *reply, const kvt_slice *slices,
                       uint32_t n_slices);
kvc_status kvti_inproc_send(kvt_call *base, const kvc_reply *reply, const kvt_slice *slices,
                            uint32_t n_slices);
kvc_status kvti_inproc_connect(const kvt_connect_opts *opts, kvt_conn **conn_p);
kvc_status kvti_inproc_submit(kvt_conn *conn, kvt_xfer *xfer);
kvc_status kvti_inproc_push(kvt_conn *conn, kvt_xfer *xfer, const kvc_request *req);
void kvti_inproc_cancel(kvt_conn *conn, kvt_xfer *xfer);
void kvti_inproc_conn_close(kvt_conn *conn);

#endif
