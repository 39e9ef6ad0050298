/*
 * store.h: a store in this process, over the inproc transport, that keeps what it is given and can
 * be told to misbehave. For the worker's tests; the real server has tests of its own.
 *
 * Calls come on transport threads; one lock guards all. Settings may change at any time through
 * store_set.
 */
#ifndef TESTS_WORKER_STORE_H
#define TESTS_WORKER_STORE_H

#include "support.h"

#include "base/thread.h"
#include "kvc/client.h"
#include "transport/transport.h"

#define STORE_MAX_LATE 64

typedef struct store_faults {
    uint32_t again_every;     /* each so-manieth value offered is AGAIN; 0: never */
    uint32_t again_calls;     /* so many put calls fail as a whole with AGAIN */
    kvc_status put_status;    /* every value gets this instead; 0: none */
    uint32_t lose_every;      /* kv rows of positions divisible by it are NOT_FOUND; 0: none */
    uint32_t lose_from_part;  /* ... of parts from this one on */
    uint32_t fetch_delay_ms;  /* answers to fetches come so late */
    uint32_t delay_calls;     /* ... this many of them; 0: all */
    uint32_t extend_failures; /* so many extends fail with IO */
    bool grow_fails;          /* contexts are neither opened nor extended: IO */
    uint32_t grow_delay_ms;   /* answers to opens and extends come so late */
} store_faults;

typedef struct store_value {
    kvc_digest digest;
    uint32_t part, row_bytes;
    uint8_t *bytes;
} store_value;

typedef struct store_context {
    kvc_digest *digests;
    uint32_t n;
} store_context;

typedef struct store {
    const kvt_ops *ops;
    kvt_listener *listener;
    kvc_mutex lock; /* LEAF; guards all below */
    kvc_cond cond;
    kvc_thread late_thread;
    bool stopping;
    kvc_schema *schema;
    store_value *values;
    uint32_t n_values, cap_values;
    store_context contexts[256];
    uint32_t n_contexts;
    store_faults faults;
    uint32_t n_puts, n_offered, n_again, n_fetches, n_rows, n_extends;
    kvt_call *late[STORE_MAX_LATE];
    uint64_t late_due_ns[STORE_MAX_LATE];
    uint32_t n_late;
} store;

/* Digests that stores which start from now on take in a message; KVC_MAX_DIGESTS until set. */
extern uint32_t store_max_digests;
/* Listens on uri ("inproc://name"). */
void store_start(store *s, const char *uri);
void store_stop(store *s);
void store_set(store *s, const store_faults *faults);
/* What is late is answered at once. */
void store_answer_late(store *s);
/* Forgets every value of index parts (part % 2000 >= 1000), or of kv parts. */
void store_forget(store *s, bool index_parts);
uint32_t store_count(store *s, const uint32_t *counter);
/* A client of it. */
kvc_client *store_client(const char *uri);

#endif
