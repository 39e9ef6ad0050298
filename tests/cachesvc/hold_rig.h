/*
 * hold_rig.h: a server in this process with 8 segments of 1 MiB, two schemas whose values have
 * different sizes, and one held value in every segment. One thread unless it says so.
 */
#ifndef KVS_TEST_HOLD_RIG_H
#define KVS_TEST_HOLD_RIG_H

#include "harness.h"

#define ROW         512u
#define VALUE       (H_TOKENS * ROW) /* 32 KiB */
#define N_SEGMENTS  8u
#define PER_SEGMENT ((1u << 20) / VALUE)
#define N_ALL       (N_SEGMENTS * PER_SEGMENT)
#define SECOND      1000000000ull

typedef struct fixture {
    h_server h;
    h_peer *peer;
    h_schema schema, other; /* values of one size and of twice that */
    char folder[256];
} fixture;

int start(void **state, bool has_lmdb);
int setup(void **state); /* without lmdb */
int teardown(void **state);

uint64_t evictions(const fixture *f);
kvc_status hold(fixture *f, uint64_t context, uint64_t *hold_p);
void put(fixture *f, const h_schema *schema, uint64_t first, uint32_t n);
uint32_t present(fixture *f, const h_schema *schema, uint64_t first, uint32_t n);
/* Block number i of those that are held, one of every segment. */
uint64_t held_block(uint32_t i);
/* Fills dram with values of the first size and holds one of every segment. */
uint64_t hold_one_of_each(fixture *f, uint64_t *context_p);
/* Whether rows of all that is held are there, as they were put. Any thread. */
bool held_is_right(h_peer *peer, uint64_t context);

#endif
