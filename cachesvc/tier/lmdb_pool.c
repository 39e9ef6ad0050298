/*
 * lmdb_pool.c: slabs of equal cells; see lmdb_pool.h.
 *
 * Its owner's lock. Invariants: a slab is in empty with no cell out, in partial of its size with
 * some out and some free, and in no list while full; cells behind its n_cut were never handed out.
 */
#include "lmdb_pool.h"

#include <string.h>
#include <sys/mman.h>

#include "base/assert.h"

#define SLAB_MIN_BYTES 4096u
#define SLAB_MAX_BYTES 65536u
#define SLABS_WANTED   16u /* with fewer, few sizes have room at once */

typedef struct cell_head {
    struct cell_head *next;
} cell_head;

struct kvsi_slab {
    kvsi_slab *next, *prev; /* in partial; next alone in empty */
    cell_head *free;
    uint32_t cell_bytes, n_cells, n_cut, n_out;
};

#define HEAD_BYTES ((sizeof(kvsi_slab) + KVSI_POOL_STEP - 1) / KVSI_POOL_STEP * KVSI_POOL_STEP)

kvc_status kvsi_pool_init(kvsi_pool *pool, uint64_t max_bytes)
{
    memset(pool, 0, sizeof(*pool));
    pool->slab_bytes = SLAB_MIN_BYTES;
    while (pool->slab_bytes < SLAB_MAX_BYTES && max_bytes / (2 * pool->slab_bytes) >= SLABS_WANTED)
        pool->slab_bytes *= 2;
    uint64_t n_slabs = max_bytes / pool->slab_bytes;
    if (n_slabs == 0)
        return KVC_OK;
    pool->n_slabs = n_slabs < UINT32_MAX ? (uint32_t)n_slabs : UINT32_MAX;
    pool->base = mmap(NULL, (size_t)pool->n_slabs * pool->slab_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pool->base != MAP_FAILED)
        return KVC_OK;
    memset(pool, 0, sizeof(*pool));
    return KVC_NO_MEMORY;
}

void kvsi_pool_fini(kvsi_pool *pool)
{
    if (pool->base != NULL)
        (void)munmap(pool->base, (size_t)pool->n_slabs * pool->slab_bytes);
    memset(pool, 0, sizeof(*pool));
}

int kvsi_pool_has(const kvsi_pool *pool, const void *cell)
{
    uintptr_t at = (uintptr_t)cell, base = (uintptr_t)pool->base;
    return pool->base != NULL && at >= base &&
           at - base < (uintptr_t)pool->n_slabs * pool->slab_bytes;
}

static kvsi_slab *slab_of(const kvsi_pool *pool, const void *p)
{
    size_t off = (size_t)((const char *)p - pool->base);
    return (kvsi_slab *)(void *)(pool->base + off / pool->slab_bytes * pool->slab_bytes);
}

static kvsi_slab **list_of(kvsi_pool *pool, uint32_t cell_bytes)
{
    return &pool->partial[cell_bytes / KVSI_POOL_STEP - 1];
}

static void link_partial(kvsi_pool *pool, kvsi_slab *slab)
{
    kvsi_slab **list = list_of(pool, slab->cell_bytes);
    slab->prev = NULL;
    slab->next = *list;
    if (slab->next != NULL)
        slab->next->prev = slab;
    *list = slab;
}

static void unlink_partial(kvsi_pool *pool, kvsi_slab *slab)
{
    if (slab->prev != NULL)
        slab->prev->next = slab->next;
    else
        *list_of(pool, slab->cell_bytes) = slab->next;
    if (slab->next != NULL)
        slab->next->prev = slab->prev;
}

/* A slab with nothing in it, now for cells of this size; NULL: there is none. */
static kvsi_slab *open_slab(kvsi_pool *pool, uint32_t cell_bytes)
{
    kvsi_slab *slab = pool->empty;
    if (slab != NULL)
        pool->empty = slab->next;
    else if (pool->n_open < pool->n_slabs)
        slab = (kvsi_slab *)(void *)(pool->base + (size_t)pool->n_open++ * pool->slab_bytes);
    else
        return NULL;
    memset(slab, 0, sizeof(*slab));
    slab->cell_bytes = cell_bytes;
    slab->n_cells = (uint32_t)((pool->slab_bytes - HEAD_BYTES) / cell_bytes);
    link_partial(pool, slab);
    return slab;
}

size_t kvsi_pool_max(const kvsi_pool *pool)
{
    size_t most = (size_t)KVSI_POOL_CLASSES * KVSI_POOL_STEP;
    if (pool->base == NULL)
        return 0;
    return pool->slab_bytes - HEAD_BYTES < most ? pool->slab_bytes - HEAD_BYTES : most;
}

void *kvsi_pool_alloc(kvsi_pool *pool, size_t len_bytes)
{
    KVC_ASSERT(len_bytes > 0);
    if (len_bytes > kvsi_pool_max(pool))
        return NULL;
    uint32_t cell_bytes =
        (uint32_t)((len_bytes + KVSI_POOL_STEP - 1) / KVSI_POOL_STEP * KVSI_POOL_STEP);
    kvsi_slab *slab = *list_of(pool, cell_bytes);
    if (slab == NULL && (slab = open_slab(pool, cell_bytes)) == NULL)
        return NULL;
    void *p = slab->free;
    if (p != NULL)
        slab->free = slab->free->next;
    else
        p = (char *)slab + HEAD_BYTES + (size_t)slab->n_cut++ * cell_bytes;
    if (++slab->n_out == slab->n_cells)
        unlink_partial(pool, slab);
    return p;
}

void kvsi_pool_free(kvsi_pool *pool, void *cell)
{
    kvsi_slab *slab = slab_of(pool, cell);
    cell_head *freed = cell;
    KVC_ASSERT(slab->n_out > 0);
    if (slab->n_out == slab->n_cells)
        link_partial(pool, slab);
    freed->next = slab->free;
    slab->free = freed;
    if (--slab->n_out > 0)
        return;
    unlink_partial(pool, slab);
    slab->next = pool->empty;
    pool->empty = slab;
}
