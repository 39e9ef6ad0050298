/*
 * slab.h: fixed-size records in pages, named by 32-bit ids.
 *
 * Ids halve the links of the index and stay valid while pages are added. Id 0 is "none". Records
 * never move, pages are never given back before fini. Not thread-safe: the owner locks.
 */
#ifndef KVS_SLAB_H
#define KVS_SLAB_H

#include <stddef.h>
#include <stdint.h>

#define KVS_NIL             0u
#define KVS_SLAB_PAGE_SHIFT 10u
#define KVS_SLAB_PAGE_ELEMS (1u << KVS_SLAB_PAGE_SHIFT)

typedef struct kvs_slab {
    char **pages;
    uint32_t n_pages, cap_pages;
    uint32_t elem_bytes;
    uint32_t next;      /* first id never used */
    uint32_t free_head; /* list through the first 4 bytes of freed records */
    uint32_t used;
} kvs_slab;

/* elem_bytes >= 4. Allocates nothing yet. */
void kvs_slab_init(kvs_slab *slab, uint32_t elem_bytes);
void kvs_slab_fini(kvs_slab *slab);
/* A zeroed record; KVS_NIL when memory is out. */
uint32_t kvs_slab_alloc(kvs_slab *slab);
void kvs_slab_free(kvs_slab *slab, uint32_t id);

static inline void *kvs_slab_at(const kvs_slab *slab, uint32_t id)
{
    return slab->pages[id >> KVS_SLAB_PAGE_SHIFT] +
           (size_t)(id & (KVS_SLAB_PAGE_ELEMS - 1)) * slab->elem_bytes;
}

#endif
