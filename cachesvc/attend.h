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
#include "tier/gpu_attend.h"

/* The most bytes of rows that one call reads from lmdb; what is beyond answers AGAIN, row by row.
 */
#define KVS_ATTEND_COLD_BYTES (16u << 20)
/* The least that is worth a GPU: bytes of rows that it reaches, times the queries over them. */
#define KVS_ATTEND_GPU_BYTES  (512u << 10)
/* Shapes that a GPU refused, of which so many, the last ones, are remembered. */
#define KVS_ATTEND_REFUSED    16u

/* Threads of their own and a bound on the calls that have or await one. */
typedef struct kvs_attender {
    kvs_disk *threads;
    kvk_backend *backend;
    atomic_uint n_calls;
    uint32_t max_calls;
    const kvs_gpu_attend_ops *gpu_ops;
    kvs_gpu_attender *gpu; /* NULL: there is none */
    atomic_bool gpu_works; /* there is one, and it has not failed */
    kvs_disk *pins;        /* its one thread pins segments of dram; NULL without */
    /* Shapes of groups that it refused, though it had said that it takes them; 0: none yet. */
    _Atomic uint64_t refused[KVS_ATTEND_REFUSED];
    atomic_uint n_refused;
} kvs_attender;

/* One group as the arithmetic needs it; the part's schema may be gone by then. */
typedef struct kvs_attend_group {
    const kvc_attend_query *query;
    const uint32_t *ranks; /* NULL: keys as they are stored */
    uint32_t first_pick, n_picks;
    uint32_t kv_heads, dim, row_bytes;
    size_t k_off_bytes, v_off_bytes;
    kvk_dtype dtype;
    kvc_rope rope;
    float scale, softcap;
    size_t q_bytes; /* in the payload; 0: those of the group before */
    size_t o_bytes, lse_bytes;
    bool on_gpu;             /* a GPU takes it, and a lane has room for it */
    kvs_gpu_partial partial; /* where a GPU has a part in it: n is not 0 */
    char *out;               /* its place in the answer */
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
 * before each group), AGAIN (no buffer is left), NO_MEMORY, INVALID (numbers that the backend
 * refuses).
 */
kvc_status kvs_attend_compute(kvs_attend *attend, char *out) KVC_MUST_CHECK;

/* attend_gpu.c: the GPU, if the settings want one, there is one and it can reach anything; says so
   in one line if not. */
void kvs_attend_gpu_open(kvs_server *server);
/* Once no call is left. */
void kvs_attend_gpu_close(kvs_server *server);
/* After the plan: which rows a GPU is to attend over (fetch.extra[].device), none of a small call;
   has segments of dram pinned that it would have needed. */
void kvs_attend_gpu_choose(kvs_attend *attend);
/* A lane for a call that has such rows; NULL: it has none, or the CPU is as good, since every lane
   is taken, or is so until the call's deadline. Then nothing is left to a GPU, and what is nowhere
   else answers AGAIN. */
kvs_gpu_lane *kvs_attend_gpu_take(kvs_attend *attend);
/* It refused a group: no call asks it for such a one again. */
void kvs_attend_gpu_refused(kvs_attender *attender, const kvs_attend_group *group);
/* The device, or one of its calls, failed: as if it had not been chosen. */
void kvs_attend_gpu_failed(kvs_attend *attend, kvc_status why);
/* The result is there: counts the rows. */
void kvs_attend_gpu_count(const kvs_attend *attend);

#endif
