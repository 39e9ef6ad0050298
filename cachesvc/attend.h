/*
 * attend.h: attention beside the data: what a request (attend.c) and its arithmetic (attend_rows.c)
 * share.
 *
 * One kvs_attend is one AttendRows in flight. It begins on a transport thread, waits for disk
 * threads where rows are only in lmdb, and is computed by one of the attender's own threads. Rows
 * in dram are attended where they lie: their values are referenced until the result is there.
 */
#ifndef KVS_ATTEND_H
#define KVS_ATTEND_H

#include "fetch.h"
#include "kvk/compute.h"

/* The most bytes of rows that one call reads from lmdb; what is beyond answers AGAIN, row by row.
 */
#define KVS_ATTEND_COLD_BYTES (16u << 20)

/* Threads of their own and a bound on the calls that have or await one. */
typedef struct kvs_attender {
    kvs_disk *threads;
    kvk_backend *backend;
    atomic_uint n_calls;
    uint32_t max_calls;
} kvs_attender;

/* One group as the arithmetic needs it; the part's schema may be gone by then. */
typedef struct kvs_attend_group {
    const kvc_attend_query *query;
    const uint32_t *ranks; /* NULL: keys as they are stored */
    uint32_t first_pick, n_picks;
    uint32_t kv_heads, dim;
    size_t k_off_bytes, v_off_bytes;
    kvk_dtype dtype;
    kvc_rope rope;
    float scale, softcap;
    size_t q_bytes; /* in the payload; 0: those of the group before */
    size_t o_bytes, lse_bytes;
} kvs_attend_group;

typedef struct kvs_attend {
    kvs_fetch fetch; /* first */
    kvs_job job;
    kvs_attend_group *groups; /* [fetch.n_groups] */
    uint64_t q_bytes, out_bytes;
    uint32_t n_looked; /* picks of the groups looked at so far */
} kvs_attend;

/* Starts the threads where settings ask for them. Before the first request. */
kvc_status kvs_attend_open(kvs_server *server) KVC_MUST_CHECK;
/* After the last. */
void kvs_attend_close(kvs_server *server);

/*
 * Every group's o and lse to out [out_bytes]. On an attender's thread. CANCELLED, TIMED_OUT (asked
 * between groups), AGAIN (no buffer is left), NO_MEMORY, INVALID (numbers that the backend
 * refuses).
 */
kvc_status kvs_attend_compute(kvs_attend *attend, char *out) KVC_MUST_CHECK;

#endif
