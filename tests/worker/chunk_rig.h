/*
 * chunk_rig.h: a rig with landmarks, for tests of retrieval of whole chunks. Rows of landmarks are
 * zero; two landmarks are equal, and one query is like them. A test's own thread.
 */
#ifndef TESTS_WORKER_CHUNK_RIG_H
#define TESTS_WORKER_CHUNK_RIG_H

#include "rig.h"

enum { S = KVW_CHUNK_TOKENS, CHUNKS = 24, K = 3, DIM = 32 };

/* A rig with landmarks and a query for each chunk. */
typedef struct chunk_rig {
    rig r;
    float marks[CHUNKS][DIM], queries[CHUNKS][DIM];
} chunk_rig;

/* The rig with its options, which may then be changed; and its data and worker by them. */
void chunk_rig_init(chunk_rig *c, const char *selector, kvk_dtype dtype, kvc_client *client);
void chunk_rig_ready(chunk_rig *c);
/* Both; way: kvw_opts.way. */
void open_rig_by(chunk_rig *c, const char *selector, kvk_dtype dtype, kvc_client *client,
                 const char *way);
void open_rig(chunk_rig *c, const char *selector, kvk_dtype dtype, kvc_client *client);
/* A pass of chunks [first, first + n). */
kvc_status append(chunk_rig *c, kvw_seq *seq, uint32_t first, uint32_t n);
kvw_seq *create(chunk_rig *c, uint32_t n_known, uint32_t *reused_p);
/* A sequence of which only sinks and recent are on the worker. */
kvw_seq *offloaded(chunk_rig *c);

#endif
