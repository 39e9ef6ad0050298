/*
 * lmdb_pool.h: cells of a few sizes in one mapping under one cap, for what lives long and is small.
 * Private to the lmdb tier.
 *
 * In malloc's heap such cells come to lie between the large blocks of requests that come and go,
 * and the holes that these leave fit nothing any more. Here they have slabs of their own, each of
 * one size at a time; an empty slab serves any size.
 *
 * Owner: whoever holds the lock of the structure that embeds it.
 */
#ifndef KVSI_LMDB_POOL_H
#define KVSI_LMDB_POOL_H

#include <stddef.h>
#include <stdint.h>

#include "kvc/status.h"

#define KVSI_POOL_STEP    64u  /* sizes are rounded up to it */
#define KVSI_POOL_CLASSES 256u /* so no cell is larger than 16 KiB */

typedef struct kvsi_slab kvsi_slab;

typedef struct kvsi_pool {
    char *base;                           /* NULL: there is no room for a slab */
    uint32_t slab_bytes, n_slabs, n_open; /* n_open: slabs ever used, the first ones */
    kvsi_slab *empty;
    kvsi_slab *partial[KVSI_POOL_CLASSES]; /* by size: slabs with a free cell */
} kvsi_pool;

/* Maps max_bytes or a little less; no page is touched yet. NO_MEMORY. */
kvc_status kvsi_pool_init(kvsi_pool *pool, uint64_t max_bytes) KVC_MUST_CHECK;
void kvsi_pool_fini(kvsi_pool *pool);
/* The largest cell that there can be. */
size_t kvsi_pool_max(const kvsi_pool *pool);
/* Aligned to 8, not zeroed; NULL: no slab has room for one of this size. */
void *kvsi_pool_alloc(kvsi_pool *pool, size_t len_bytes);
void kvsi_pool_free(kvsi_pool *pool, void *cell);
/* Whether a cell is one of this pool's. */
int kvsi_pool_has(const kvsi_pool *pool, const void *cell);

#endif
