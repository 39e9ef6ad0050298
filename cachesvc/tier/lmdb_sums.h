/*
 * lmdb_sums.h: the row sums of values read lately, kept in RAM under one cap. Private to the lmdb
 * tier. With them a cold row costs one disk read, not two, and a prefix is verified once.
 *
 * Any thread. Entries are immutable and counted: one that is in use outlives its eviction.
 */
#ifndef KVSI_LMDB_SUMS_H
#define KVSI_LMDB_SUMS_H

#include "lmdb_record.h"

typedef struct kvsi_sums kvsi_sums;

typedef struct kvsi_sums_entry {
    struct kvsi_sums_entry *chain, *newer, *older;
    uint64_t hash;
    uint32_t refs; /* the cache's own included */
    uint32_t n_rows;
    uint8_t key[KVSI_KEY_BYTES];
    uint32_t sums[];
} kvsi_sums_entry;

/* max_bytes 0: nothing is ever kept, entries live only while in use. NO_MEMORY. */
kvc_status kvsi_sums_create(uint64_t max_bytes, kvsi_sums **sums_p) KVC_MUST_CHECK;
void kvsi_sums_destroy(kvsi_sums *sums); /* no entry is in use; NULL is fine */

/* The entry of a key, held; NULL when it is not cached. Put it back after use. */
kvsi_sums_entry *kvsi_sums_find(kvsi_sums *sums, const uint8_t key[KVSI_KEY_BYTES]);
/* Copies row_sums [n_rows] into a held entry and caches it if it fits; NULL: memory is out. */
kvsi_sums_entry *kvsi_sums_add(kvsi_sums *sums, const uint8_t key[KVSI_KEY_BYTES],
                               const uint32_t *row_sums, uint32_t n_rows);
void kvsi_sums_put(kvsi_sums *sums, kvsi_sums_entry *entry);
/* Forgets a key: its value goes away or is rewritten. */
void kvsi_sums_drop(kvsi_sums *sums, const uint8_t key[KVSI_KEY_BYTES]);

#endif
