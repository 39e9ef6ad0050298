/*
 * load.h: several clients that put (MEMORY and DURABLE), erase and read at once, and a ledger of
 * what the server has promised them, to be held against the server after a crash.
 *
 * Owned by the test's main thread; each client has a thread and blocks of its own, and all share
 * some. Invariant: the ledger never claims more than was acknowledged: a value whose put or erase
 * has not been answered may be there or not.
 */
#ifndef TESTS_E2E_LOAD_H
#define TESTS_E2E_LOAD_H

#include <stdatomic.h>

#include "base/thread.h"
#include "store.h"

#define LOAD_CLIENTS 4u
#define LOAD_SHARED  16u /* blocks 0 .. 15: any client puts them, nobody erases them */

/* What the server owes. */
typedef enum load_owed {
    LOAD_NOTHING, /* never put: not there */
    LOAD_UNKNOWN, /* in flight, or with MEMORY only: right bytes or none */
    LOAD_DURABLE, /* acknowledged: there, through any crash */
    LOAD_ERASED,  /* acknowledged: gone, through any crash */
} load_owed;

/* Of all clients, since load_open. */
typedef struct load_counts {
    atomic_uint puts, durable, erased, reads; /* values, but reads: requests */
    atomic_uint failed;                       /* requests or values that ended with an error */
    atomic_uint wrong, lost;                  /* wrong bytes; DURABLE values answered NOT_FOUND */
} load_counts;

typedef struct load load;

typedef struct load_client {
    load *load;
    uint32_t number;
    kvc_client *client;
    kvc_context *context; /* over all blocks */
    support_random random;
    kvc_thread thread;
    uint8_t *bytes;
    kvc_region *region;
} load_client;

struct load {
    store *store;
    uint32_t n_blocks; /* the first of the store's: all, unless set to fewer before load_begin */
    atomic_uchar owed[STORE_MAX_BLOCKS][STORE_PARTS];
    load_counts counts;
    /* How many errors and broken promises are printed; none unless set. */
    uint32_t failure_prints, prints;
    atomic_bool stop;
    load_client clients[LOAD_CLIENTS];
};

/* What a walk over everything found. */
typedef struct load_found {
    uint32_t there, lost, wrong, back; /* back: erased, or never put, and yet there */
} load_found;

/* Whether bytes are those of the value; and those bytes. */
bool load_is_right(const uint8_t *bytes, uint32_t part, uint32_t block);
void load_fill(uint8_t *bytes, uint32_t part, uint32_t block);
/* Connects the clients; the store serves. */
void load_open(load *l, store *s, uint64_t seed);
void load_begin(load *l);
/* What is under way is completed, so a server must be there. */
void load_end(load *l);
/* Reads every value, by whole values and by rows; only between load_end and load_begin. What is
 * owed must be there. */
load_found load_verify(load *l);
void load_close(load *l);

#endif
