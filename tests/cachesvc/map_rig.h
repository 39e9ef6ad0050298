/*
 * map_rig.h: what the tests of maps share: a server over shm, and what one connection has mapped.
 *
 * The test is client and server in one process; what was mapped is read through the passed
 * descriptors, never through the server's own mapping.
 */
#ifndef MAP_RIG_H
#define MAP_RIG_H

#include "harness.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/metrics.h"

#define ROW_BYTES   512u
#define VALUE_BYTES (ROW_BYTES * H_TOKENS) /* 32 KiB */
#define SEGMENTS    512u
#define MIB         (1u << 20) /* of a segment */
#define PART_IDS    ((const uint32_t[]){0, 10})

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

/* What one connection has mapped. */
typedef struct view {
    h_peer *peer;
    const uint8_t *segments[SEGMENTS]; /* by id */
    uint64_t len_bytes[SEGMENTS];
    int fds[SEGMENTS];
    const _Atomic uint64_t *lease;
    uint64_t lease_bytes, map;
    uint32_t slot;
} view;

typedef struct map_rig {
    h_server h;
    char dir[256];
    h_schema schema;
    view v;
} map_rig;

int map_setup(void **state);
int map_teardown(void **state); /* forgets r->v, disconnects */
void map_start(map_rig *r);
/* Blocks of both parts. */
void map_put_blocks(map_rig *r, uint64_t first, uint32_t n);
/* Asks and maps what comes. The table is in peer->data. */
kvc_status call_map(view *v, uint64_t context, uint64_t map, uint32_t first, uint32_t n);
/* Where the table of the last reply says that a value lies; NULL: by request. */
const uint8_t *map_entry(const view *v, uint32_t block, uint32_t part);
bool map_is_good(const view *v);
void map_assert_value(const uint8_t *value, uint64_t block, uint32_t part);
void map_release(view *v);
void map_close_fds(view *v);
/* The segments that the test has mapped are mapped no more, and the server is told. */
void map_give_back(view *v);
void map_forget(view *v); /* unmaps all, tells nobody */
/* Waits for what happens off the test's thread. */
void map_wait_gauge(kvc_metric metric, uint64_t want);

#endif
