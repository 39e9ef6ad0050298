/*
 * ways_rig.h: one cachesvc on this host and every way to its rows, for ways_bench: what is put
 * there, a client of each way, and requests that move a known number of bytes. One thread.
 */
#ifndef KVASIR_BENCH_WAYS_RIG_H
#define KVASIR_BENCH_WAYS_RIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "daemon.h"
#include "kvc/client.h"

enum { WAYS_PART = 7, WAYS_MAX_ROWS = 2048, WAYS_CHUNK_TOKENS = 64, WAYS_REPEATS = 24 };

/* What is put, and what a request asks for of it. */
typedef struct ways_shape {
    const char *name;
    uint32_t row_bytes, block_tokens, n_blocks, n_rows;
    uint32_t n_q_heads, n_kv_heads, dim; /* bf16 */
    bool chunks;                         /* n_rows are whole chunks, which are blocks */
} ways_shape;

/* Where the server has the rows; the last two: its GPU attends over them, in dram, in its tier. */
typedef enum ways_tier { WAYS_DRAM, WAYS_LMDB, WAYS_GPU_DRAM, WAYS_GPU_TIER } ways_tier;

typedef enum ways_kind { WAYS_COPY, WAYS_ROWS, WAYS_BLOCKS, WAYS_NEAR } ways_kind;

struct ways_rig;
typedef struct ways_way {
    struct ways_rig *rig;
    const char *name;
    const char *uri; /* NULL: a plain memcpy */
    ways_kind kind;
    bool mapped, framed; /* no request is made; messages are in frames of shm or RDMA */
    kvc_client *client;
    kvc_region *region;
    kvc_context *context;
    uint32_t n_requests; /* of the last one that was asked */
} ways_way;

typedef struct ways_rig {
    char folder[256], shm_uri[300], unix_uri[300], rdma_uri[128];
    support_daemon daemon;
    const char *dram_bytes;
    ways_tier tier;   /* lmdb: through the page cache */
    bool has_rdma;    /* rdma_uri is that of a device here */
    uint32_t repeats; /* requests of a turn */
    const ways_shape *shape;
    uint32_t n_fills;
    uint8_t *values; /* [n_blocks * block_tokens * row_bytes] what was put */
    uint8_t *out;    /* [n_rows * row_bytes] */
    kvc_digest schema, *digests;
    uint32_t picks[WAYS_REPEATS][WAYS_MAX_ROWS];
    uint64_t random;
} ways_rig;

/* 0 on success, as everywhere here; else stderr says why. */
int ways_start(ways_rig *rig, ways_tier tier);
void ways_stop(ways_rig *rig);
/* Values of a shape, put; with lmdb the server is started again, so that dram has none of them;
   with a gpu tier copies are made there. */
int ways_fill(ways_rig *rig, const ways_shape *shape);
void ways_empty(ways_rig *rig);
int ways_open(ways_way *way, ways_rig *rig);
void ways_close(ways_way *way);

/* Picks for one turn. */
void ways_choose(ways_rig *rig);
/* n distinct rows, ascending, as a selector picks them; or whole chunks. */
void ways_pick(ways_rig *rig, uint32_t picks[WAYS_MAX_ROWS], uint32_t n);
/* One request for n picks (whole chunks of a shape of chunks); its way must have been taken. */
int ways_ask(ways_way *way, const uint32_t *picks, uint32_t n);
/* Whether a request brings what was put; of attention, that rows were attended. */
int ways_check(ways_way *way);

/* ways_bytes.c: what the messages of such a request take, both ways, as they are encoded. */
void ways_count_bytes(const ways_way *way, const uint32_t *picks, uint32_t n, uint32_t n_requests,
                      bool ranked, uint64_t *out_p, uint64_t *in_p);
/* Bytes that this process's TCP sockets have sent and received, as the kernel counts them. */
void ways_tcp_bytes(uint64_t *out_p, uint64_t *in_p);

/* ways_core.c: attention of one core over rows of 4 KiB of Llama-3-8B's heads. */
typedef struct ways_core ways_core;
ways_core *ways_core_open(void);
void ways_core_close(ways_core *core);
void ways_core_attend(ways_core *core, const uint8_t *rows, uint32_t n);
/* Prints how it attends over random rows out of n_mib beside the same core reading such rows. */
void ways_core_compare(ways_core *core, uint32_t n_mib, uint32_t n_runs);

#endif
