/*
 * server.h: one cachesvc, from its settings to its listeners.
 *
 * Starts in a fixed order, each step logged: tiers, schemas, index, disk threads, writer, ticker,
 * listeners. Stops in the reverse order. The rest of the folder reaches its parts through this
 * struct; only server.c changes the pointers, before the first and after the last request.
 */
#ifndef KVS_SERVER_H
#define KVS_SERVER_H

#include <stdatomic.h>

#include "admission.h"
#include "base/histogram.h"
#include "buffers.h"
#include "context.h"
#include "disk.h"
#include "hold.h"
#include "index.h"
#include "settings.h"
#include "tier/tier.h"
#include "transport/transport.h"
#include "ttl.h"

#define KVS_VERSION KVASIR_VERSION

typedef struct kvs_writer kvs_writer;
typedef struct kvs_saved kvs_saved;
typedef struct kvs_maps kvs_maps;

/* An open tier and what the server counts about it. */
typedef struct kvs_store {
    const kvs_tier_ops *ops; /* NULL: there is no such tier */
    kvs_tier *tier;
    atomic_uint_least64_t rows_read, bytes_read, evictions;
} kvs_store;

/* What peers and probes are told: only a server that is SERVING takes calls. */
typedef enum kvs_phase { KVS_STARTING = 0, KVS_SERVING, KVS_DRAINING } kvs_phase;

typedef struct kvs_server {
    kvs_settings settings;
    kvc_limits limits;
    uint64_t boot_id, start_ns;
    kvs_schemas *schemas;
    kvs_index *index;
    kvs_contexts *contexts;
    kvs_holds *holds;
    kvs_saved *saved;
    kvs_ttls *ttls;
    kvs_maps *maps;
    struct kvs_tenants *tenants;  /* of clients of this host */
    atomic_ullong streamed_bytes; /* of buffers for bodies that PutBlocksStream waits for */
    kvs_store dram, lmdb;
    kvs_store gpu;                 /* copies of what the others have; see gpu.h */
    kvs_disk *gpu_jobs;            /* its one thread; NULL without */
    atomic_bool gpu_works;         /* it has not failed */
    atomic_uint n_raising;         /* values to be copied there */
    struct kvs_attender *attender; /* NULL: AttendRows is not served */
    kvs_disk *disk;                /* NULL without lmdb */
    kvs_disk *room_jobs;           /* its one thread empties segments of dram; see cascade.h */
    kvs_writer *writer;            /* NULL without lmdb */
    kvs_admission admission;
    kvs_buffers buffers;
    atomic_int phase;                        /* kvs_phase */
    kvc_histogram latency[KVC_METHOD_COUNT]; /* from the handler's start to the answer */
    atomic_uint n_calls;                     /* taken and not yet answered */
    atomic_uint window;                      /* number of the promotion window */
    atomic_uint_least64_t lent_bytes; /* of dram values that slices on their way out point at */
    atomic_uint n_promoting;          /* values being loaded to dram */
    atomic_uint_least64_t no_segment_until_ns; /* none could be emptied: do not look before */
    atomic_uint n_slow_jobs;                   /* erases and prefetches with the disk threads */
    /* Since the ticker last logged them: evicted from the last tier; write-behind failed. */
    atomic_uint_least64_t lost_values, lost_bytes, unwritten_values;

    kvc_mutex record_lock; /* rank RECORD: a schema's record and its entry change together */
    bool schemas_lost;     /* at start: values may be waiting for them, so none is collected */

    kvt_budget inflight; /* of requests' bytes, whichever listener has them */
    kvt_peers peers;     /* their connections */
    uint32_t n_listeners;
    struct {
        const kvt_ops *ops;
        kvt_listener *listener;
    } listeners[KVS_MAX_LISTENERS];

    kvc_thread ticker;
    kvc_mutex ticker_lock; /* rank LEAF; guards stopping */
    kvc_cond ticker_cond;
    bool stopping;
    atomic_uint n_ticks;
} kvs_server;

/* Copies settings (its strings stay borrowed). Blocks: recovers lmdb. Errors are logged. */
kvc_status kvs_server_open(const kvs_settings *settings, kvs_server **server_p) KVC_MUST_CHECK;
/* Starts to listen on every URI of settings.listen. */
kvc_status kvs_server_listen(kvs_server *server) KVC_MUST_CHECK;
/* The i-th bound URI; NULL past the last. */
const char *kvs_server_uri(const kvs_server *server, uint32_t i);
/* Whether a call that comes now is taken; *why_p (static): why not, or "ready". Health checks of
   the transports say the same, but for tiers that failed. Any thread. */
bool kvs_server_ready(kvs_server *server, const char **why_p);
/* Takes no new calls and waits for those in flight, to deadline_ns at most. */
void kvs_server_drain(kvs_server *server, uint64_t deadline_ns);
/* After drain (or a failed listen). flush: write-behind is finished first. NULL is fine. */
void kvs_server_close(kvs_server *server, bool flush);
/* One turn of the ticker: expired contexts, dead values, log lines. Tests call it; else its thread.
 */
void kvs_server_tick(kvs_server *server);

#endif
