/*
 * fetch.h: one FetchRows in flight, shared by its plan (plan.c), its rows (gather.c) and the
 * request itself (fetch.c).
 *
 * A read is one value of one group, whatever number of its rows were picked; it is looked up and
 * referenced once. Picks keep the request's order; row bytes lie dense in that order.
 */
#ifndef KVS_FETCH_H
#define KVS_FETCH_H

#include "request.h"

#define KVS_NO_READ UINT32_MAX

typedef enum kvs_fetch_state {
    KVS_FETCH_PLAN,  /* contexts, limits, reads */
    KVS_FETCH_PLACE, /* where rows go; rows of dram only are answered from here */
    KVS_FETCH_READ,  /* disk threads read what is in lmdb only */
    KVS_FETCH_COPY,  /* rows of dram into the buffer */
    KVS_FETCH_REPLY,
    KVS_FETCH_DONE,
} kvs_fetch_state;

/* Beside each kvs_read: what its rows need. */
typedef struct kvs_fetch_read {
    const kvs_schema *schema;
    const char *base; /* rows in dram; NULL: not there */
    /* AttendRows: where a GPU reads them, in the gpu tier (hbm) or in dram; NULL: nowhere. */
    const char *device;
    bool hbm;
    uint32_t part;
    uint32_t first_pick, last_pick; /* chain of its picks through pick_next */
    kvs_row_range *ranges;          /* of one in lmdb: room for as many as it has picks */
    kvc_status status;
} kvs_fetch_read;

struct kvs_fetch;
/* Looks at group g, whose context is referenced, before any value is. Anything but OK: it has
   failed the call. */
typedef kvc_status kvs_fetch_look(struct kvs_fetch *fetch, uint32_t g, const kvc_part *part);
typedef struct kvs_fetch_worker {
    kvs_job job; /* first */
    struct kvs_fetch *fetch;
} kvs_fetch_worker;

#define KVS_FETCH_WORKERS 16u

typedef struct kvs_fetch {
    kvs_server *server;
    kvt_call *call;
    kvs_fetch_state state;
    const kvc_digest *tenant; /* while planning */
    kvs_fetch_look *look;     /* AttendRows: at each group; NULL: the rows must fit a message */
    void (*resume)(struct kvs_fetch *fetch); /* the last disk thread, once the rows are read */
    uint32_t n_groups, n_picks, n_reads, n_lmdb;
    uint64_t data_bytes, lent_bytes;
    kvs_read *reads;        /* [n_reads] */
    kvs_fetch_read *extra;  /* [n_reads] */
    uint32_t *lmdb_reads;   /* [n_lmdb] numbers of the reads that disk threads do */
    kvs_row_range *ranges;  /* of all of these; NULL: there are none */
    uint32_t *pick_read;    /* [n_picks] number of its read, or KVS_NO_READ */
    uint32_t *pick_next;    /* [n_picks] next pick of the same read, or KVS_NO_READ */
    uint32_t *pick_off;     /* [n_picks] bytes from the start of the answer */
    uint16_t *pick_row;     /* [n_picks] row inside its value */
    kvs_context **contexts; /* [n_groups] referenced while planning */
    kvs_buffer *buffer;
    uint32_t rows_gpu, rows_dram, rows_lmdb, rows_missing;
    atomic_uint next_lmdb, n_working, n_slices_out;
    uint32_t n_workers;
    kvs_fetch_worker workers[KVS_FETCH_WORKERS];
} kvs_fetch;

/*
 * Checks the request and fills in reads, picks and references. Anything but OK: nothing is
 * referenced, the call has been failed.
 */
kvc_status kvs_fetch_plan(kvs_fetch *fetch) KVC_MUST_CHECK;
/* Lets go of the values and frees the tables; not fetch itself. */
void kvs_fetch_unref(kvs_fetch *fetch);
void kvs_fetch_fini(kvs_fetch *fetch);
/* Disk threads read lmdb_reads into the buffer; the last of them calls fetch->resume. AGAIN: not
   even one of them could be had, and resume is not called. */
kvc_status kvs_fetch_read_cold(kvs_fetch *fetch) KVC_MUST_CHECK;
static inline uint32_t kvs_fetch_row_bytes(const kvs_fetch *fetch, uint32_t read)
{
    const kvs_fetch_read *extra = &fetch->extra[read];
    return extra->schema->parts[extra->part].row_bytes;
}

/* Where the rows came from, once they are there: the fetch's counts, and the tiers'. */
void kvs_fetch_count(kvs_fetch *fetch);
/* The group and pick limits of the request; INVALID: the call has been failed. */
kvc_status kvs_fetch_check_limits(kvs_server *server, kvt_call *call,
                                  uint32_t *n_picks_p) KVC_MUST_CHECK;
/* References the context of group g and finds the place of its part. Anything but OK: nothing is
 * referenced, the call has been failed. */
kvc_status kvs_fetch_group(kvs_server *server, kvt_call *call, const kvc_digest *tenant, uint32_t g,
                           kvs_context **context_p, uint32_t *part_p) KVC_MUST_CHECK;

/* Sets pick_off and data_bytes, leaving out the rows known to be missing. */
void kvs_gather_place(kvs_fetch *fetch);
/* Slices for rows in dram where runs are long: count, or 0 where copying is better. All reads must
   be in dram or missing. slices [KVT_MAX_SLICES]; base and length only are set. */
uint32_t kvs_gather_slices(kvs_fetch *fetch, kvt_slice *slices);
/* Copies the rows of dram to their places in the buffer. */
void kvs_gather_copy(kvs_fetch *fetch);
/* Memory for the ranges of what is in lmdb. False: none. */
bool kvs_gather_prepare(kvs_fetch *fetch);
/* Takes part in the lmdb reads until none is left, or nobody waits any more: rows into the buffer,
   and their statuses. Disk threads, several at once. */
void kvs_gather_read(kvs_fetch *fetch);
/* Closes the gaps of reads that failed after kvs_gather_place. */
void kvs_gather_compact(kvs_fetch *fetch);
/* The rows that are missing, ascending; in the call's arena. False: no memory. */
bool kvs_gather_missing(kvs_fetch *fetch, const kvc_missing_row **missing_p, uint32_t *n_p);

#endif
