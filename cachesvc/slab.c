/*
 * slab.c: pages of fixed-size records; see slab.h.
 *
 * Owner: whoever holds the lock of the structure that embeds it. Invariant: every id below `next`
 * is either in use or on the free list; id 0 is in neither.
 */
#include "slab.h"

#include <stdlib.h>
#include <string.h>

#include "base/assert.h"

void kvs_slab_init(kvs_slab *slab, uint32_t elem_bytes)
{
    KVC_ASSERT(elem_bytes >= sizeof(uint32_t));
    memset(slab, 0, sizeof(*slab));
    slab->elem_bytes = elem_bytes;
    slab->next = 1;
}

void kvs_slab_fini(kvs_slab *slab)
{
    for (uint32_t i = 0; i < slab->n_pages; i++)
        free(slab->pages[i]);
    free(slab->pages);
    memset(slab, 0, sizeof(*slab));
}

static int add_page(kvs_slab *slab)
{
    if (slab->n_pages == slab->cap_pages) {
        uint32_t cap = slab->cap_pages ? slab->cap_pages * 2 : 64;
        char **pages = realloc(slab->pages, cap * sizeof(*pages));
        if (!pages)
            return 0;
        slab->pages = pages;
        slab->cap_pages = cap;
    }
    char *page = aligned_alloc(64, (size_t)KVS_SLAB_PAGE_ELEMS * slab->elem_bytes);
    if (!page)
        return 0;
    slab->pages[slab->n_pages++] = page;
    return 1;
}

uint32_t kvs_slab_alloc(kvs_slab *slab)
{
    uint32_t id = slab->free_head;
    if (id != KVS_NIL) {
        memcpy(&slab->free_head, kvs_slab_at(slab, id), sizeof(uint32_t));
    } else {
        if (slab->next == UINT32_MAX)
            return KVS_NIL;
        if (slab->next >> KVS_SLAB_PAGE_SHIFT >= slab->n_pages && !add_page(slab))
            return KVS_NIL;
        id = slab->next++;
    }
    memset(kvs_slab_at(slab, id), 0, slab->elem_bytes);
    slab->used++;
    return id;
}

void kvs_slab_free(kvs_slab *slab, uint32_t id)
{
    KVC_ASSERT(id != KVS_NIL && id < slab->next && slab->used > 0);
    memcpy(kvs_slab_at(slab, id), &slab->free_head, sizeof(uint32_t));
    slab->free_head = id;
    slab->used--;
}
