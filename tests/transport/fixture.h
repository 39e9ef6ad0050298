/*
 * fixture.h: a server with a handler that each test sets, and a client that counts.
 *
 * The handler runs on the transport's threads; what it shares with the test is guarded by the
 * fixture's mutex or atomic. One fixture per test.
 */
#ifndef TESTS_TRANSPORT_FIXTURE_H
#define TESTS_TRANSPORT_FIXTURE_H

#include "support.h"

#include <stdatomic.h>

#include "base/clock.h"
#include "base/thread.h"
#include "samples.h"
#include "transport/transport.h"

#define MS          1000000ull
#define SECOND      (1000 * MS)
/* What must come is waited for so long; what must not, is given a deadline beyond it. */
#define PATIENCE_NS SUPPORT_PATIENCE_NS
#define HELD_MAX    2048u

typedef struct fixture fixture;
typedef void handler_fn(fixture *f, kvt_call *call);

/* One transfer with its request; done records and wakes. */
typedef struct job job;
struct job {
    kvt_xfer xfer; /* first */
    fixture *f;
    kvc_request req;
    atomic_uint n_messages;             /* of a reply that streams */
    void (*on_pushed)(job *j, bool ok); /* NULL: the request is the only message */
    void (*on_message)(job *j);         /* NULL: nothing; reply as in kvt_xfer.message */
    void *arg;
    atomic_uint n_done;
    kvc_status status;
    uint64_t done_ns;
    /* checked inside done, where the payload is still valid; NULL: nothing */
    const kvc_reply *want;
    const char *diff;
};

struct fixture {
    const kvt_ops *ops;
    kvt_listen_opts listen;
    kvt_listener *listener;
    char uri[300];         /* as the listener gives it */
    bool sums;             /* the client's option; or KVASIR_TEST_SUMS is set */
    uint64_t region_bytes; /* likewise */
    kvt_conn *conn;
    handler_fn *handler;
    kvc_arena arena; /* of the test's thread */
    kvc_mutex mutex; /* guards held; rank QUEUE */
    kvc_cond changed;
    kvt_call *held[HELD_MAX];
    uint32_t n_held;
    uint32_t n_done; /* over all jobs */
    atomic_uint n_released;
    atomic_uint n_calls;
};

/* The URI to listen on in this run of the suite, and its transport. */
extern const char *suite_uri;

/* Listens and connects with n_channels; the handler is echo_handler. */
void fixture_open(fixture *f, uint32_t n_channels);
/* The same with listen options that the test has changed in f->listen after fixture_init. */
void fixture_init(fixture *f);
void fixture_listen(fixture *f);
void fixture_connect(fixture *f, uint32_t n_channels);
/* Drains at once, closes both ends; held calls are answered first. */
void fixture_close(fixture *f);
void fixture_close_server(fixture *f);

/* Calls that arrive from now on go to handler. */
void fixture_handle(fixture *f, handler_fn *handler);
/* kvt_call_reply; what the handler did before it is ordered before done. A reply that streams: the
 * reply is its only message. */
void fixture_reply(fixture *f, kvt_call *call, kvc_status status, const char *detail,
                   uint32_t retry_after_ms, const kvc_reply *reply, const kvt_slice *slices,
                   uint32_t n_slices);
/* Answers with sample_reply of the method. */
void sample_handler(fixture *f, kvt_call *call);
/* Keeps the call in f->held. */
void hold_handler(fixture *f, kvt_call *call);
/* Blocks until n calls are held. */
void wait_held(fixture *f, uint32_t n);
/* Blocks until done has run n times in all. */
void wait_done(fixture *f, uint32_t n);
/* Answers every held call with NOT_FOUND; gives how many. */
uint32_t answer_held(fixture *f);

/* Fills in a job for req; timeout_ns 0: no deadline. */
void job_init(job *j, fixture *f, kvc_request req, uint64_t timeout_ns);
void job_submit(job *j);
/* Submits, waits, returns the status. */
kvc_status job_run(job *j);
void job_fini(job *j);

/* A slice of bytes that counts its release in f. */
kvt_slice counted_slice(fixture *f, const void *base, size_t len_bytes);

#endif
