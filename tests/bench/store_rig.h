/*
 * store_rig.h: one cachesvc, one client of it, and the values of four shapes that the store
 * benchmark moves. All memory is allocated once; a rig may be started and stopped many times.
 */
#ifndef KVASIR_BENCH_STORE_RIG_H
#define KVASIR_BENCH_STORE_RIG_H

#include <stdbool.h>

#include "daemon.h"
#include "kvc/client.h"

enum { RIG_N_ROWS = 2048 };

/* 1 MiB = 256 rows of 4 KiB; 192 KiB = 256 of 768 B; 64 KiB = 64 of 1 KiB; 4 KiB = 64 of 64 B. */
typedef enum rig_shape { RIG_1M, RIG_192K, RIG_64K, RIG_4K, RIG_SHAPES } rig_shape;

typedef struct store_rig {
    uint32_t blocks, channels,
        threads;        /* blocks of RIG_1M; threads: the server's, 0: its default */
    const char *listen; /* the server's address; NULL: gRPC on loopback */
    char folder[256];
    support_daemon daemon;
    kvc_client *client;
    kvc_digest schemas[2];
    kvc_digest *digests[RIG_SHAPES]; /* of the last put, or the next one */
    kvc_context *context;
    rig_shape context_shape;
    uint8_t *memory, *out; /* [blocks MiB] what is put, where rows land */
    kvc_region *region, *out_region;
    uint32_t *picks; /* of the last fetch */
    uint32_t n_picks, row_bytes;
    bool from_lmdb;  /* where rows must come from */
    uint32_t seed;   /* of the next blocks' names */
    uint64_t random; /* where the picks fall */
} store_rig;

/* blocks, channels and threads are set. 0 on success, as everywhere here; else stderr says why. */
int rig_init(store_rig *rig);
void rig_fini(store_rig *rig); /* stopped */
/* lmdb_bytes NULL: no lmdb tier. */
int rig_start(store_rig *rig, const char *dram_bytes, const char *lmdb_bytes);
void rig_stop(store_rig *rig);
/* Stops and starts with nothing in dram; cold: the page cache of the data files is emptied too,
   else what was put is still there. */
int rig_restart(store_rig *rig, bool cold);

uint32_t rig_values(const store_rig *rig, rig_shape shape); /* how many one put moves */
uint32_t rig_value_bytes(rig_shape shape);
uint32_t rig_row_bytes(rig_shape shape);
/* New names for the values of a shape, which the next put uses: not its work, so not in its time.
 */
void rig_name(store_rig *rig, rig_shape shape);
/* Puts the values of a shape. */
int rig_put(store_rig *rig, rig_shape shape, kvc_promise promise, double *bytes_p);
/* Opens the context of the values of a shape that were put last. */
int rig_open_context(store_rig *rig, rig_shape shape);
/* Every row of every value of the context, in order. */
int rig_get(store_rig *rig, double *bytes_p);
/* RIG_N_ROWS distinct random rows to rig->picks, ascending, as a selector picks them. */
void rig_pick(store_rig *rig, rig_shape shape);
/* Fetches rows that rig_pick picks. */
int rig_rows(store_rig *rig, double *bytes_p);
/* Whether the last fetch brought the bytes that were put. */
int rig_check(const store_rig *rig);

#endif
