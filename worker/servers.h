/*
 * servers.h: the servers that a worker's blocks are spread over.
 *
 * A block is on one server, its owner (base/place.h): a function of its digest and the servers'
 * names. A sequence has a context on each server, over the blocks that this server owns and no
 * others, in their order; so a row is named there by 4 bytes, `local` times block_tokens and its
 * place in the block. With one server `local` is the block's number and a pick is a position.
 * Immutable after kvw_open but for what is known of a lost server, which is atomic.
 */
#ifndef KVWI_SERVERS_H
#define KVWI_SERVERS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kvc/client.h"
#include "kvw/worker.h"

typedef struct kvwi_server {
    kvc_client *client;
    char *name;
    /* DROP only: until when nobody asks it; how many times in a row it was lost */
    atomic_uint_least64_t lost_until_ns;
    atomic_uint n_losses;
} kvwi_server;

typedef struct kvwi_servers {
    uint32_t n; /* 0: no store */
    kvwi_server *all;
    uint64_t *keys; /* [n] of base/place.h */
} kvwi_servers;

/* Memory as each server's client knows it; all NULL without a store. */
typedef struct kvwi_regions {
    kvc_region *of[KVW_MAX_SERVERS];
} kvwi_regions;

/* One server's share of a list of rows, on its way. */
typedef struct kvwi_flight {
    uint32_t first, n; /* of the list */
    bool near, whole;  /* a retriever's: the server attends over them; they come as blocks */
    kvc_status status;
    bool in_flight;
    kvc_op op;
    kvc_fetch_info info;
} kvwi_flight;

/* From worker->opts: takes client or clients; opts.client is that of the first one afterwards.
 * INVALID, naming the option. */
kvc_status kvwi_servers_open(kvw_worker *worker) KVC_MUST_CHECK;
void kvwi_servers_close(kvw_worker *worker);
/* The least of a limit over the servers; the protocol's own without a store. */
uint32_t kvwi_servers_max_value(const kvw_worker *worker);
/* " (server NAME)" where there are several, else "": for texts. buf has KVWI_SERVER_TEXT bytes. */
#define KVWI_SERVER_TEXT (KVC_MAX_NAME_BYTES + 16u)
const char *kvwi_server_text(const kvw_worker *worker, uint32_t server, char *buf);

/* All or none. The text of the failure is the client's. */
kvc_status kvwi_regions_open(const kvw_worker *worker, void *base, size_t len_bytes,
                             kvwi_regions *regions) KVC_MUST_CHECK;
/* AGAIN: one is still in use. */
kvc_status kvwi_regions_close(const kvw_worker *worker, kvwi_regions *regions);

/* Decides the block's server and its number there; its digest must be known. */
void kvwi_place(kvw_seq *seq, uint32_t block);
/* The block is there to stay: the next one of its server comes after it. */
void kvwi_place_keep(kvw_seq *seq, uint32_t block);
/* Only the first n_blocks are placed. */
void kvwi_place_cut(kvw_seq *seq, uint32_t n_blocks);

/* Whether the sequence has a context on every server, of which there is at least one. */
bool kvwi_contexts_open(const kvw_seq *seq);
void kvwi_contexts_close(kvw_seq *seq);

/* Sends a fetch of rows from a server; group's context is filled in here. A failure to submit is
 * the flight's status. */
void kvwi_flight_send(kvw_seq *seq, uint32_t server, kvwi_flight *flight, kvc_pick_group group,
                      const kvwi_regions *dst, int8_t *status, uint64_t deadline_ns);
/* Waits for its end, however it ends; its status. deadline_ns 0: the op's own. */
kvc_status kvwi_flight_land(kvwi_flight *flight, uint64_t deadline_ns);
/* The same after asking for an early end. */
void kvwi_flight_cancel(kvwi_flight *flight);
/* Adds what it did to the sequence's counters. n_rows arrived, of row_bytes. */
void kvwi_flight_count(kvw_seq *seq, uint32_t server, const kvc_fetch_info *info, uint32_t n_rows,
                       size_t row_bytes);

/* DROP: whether the server did not answer lately, so that nobody waits for it. */
bool kvwi_server_is_lost(const kvw_worker *worker, uint32_t server);
/* DROP: what an answer, or the lack of one, to what was asked at asked_ns says of a server. However
 * many were asked before it was lost, or at once after, it is lost once. */
void kvwi_server_answered(kvw_worker *worker, uint32_t server, kvc_status st, uint64_t asked_ns);

#endif
