/*
 * ttl.c: the TTLs of puts, the first that is due on top of a heap; see ttl.h.
 *
 * Any thread; the ticker sweeps. Invariant: an entry in the heap holds its block once in the index,
 * as a context's and as a hold's, and its schema.
 */
#include "ttl.h"

#include <stdlib.h>

#include "base/clock.h"
#include "base/metrics.h"

typedef struct entry {
    uint64_t due_ns;
    const kvs_schema *schema;
    uint32_t block;
} entry;

struct kvs_ttls {
    kvs_index *index;
    kvs_schemas *schemas;
    uint64_t max, max_ttl_ns;
    kvc_mutex lock; /* rank CONTEXT; guards all below; never held with a context's */
    entry *heap;    /* [n], room for n_room */
    uint64_t n, n_room;
};

kvs_ttls *kvs_ttls_create(kvs_index *index, kvs_schemas *schemas, uint64_t max, uint64_t max_ttl_ns)
{
    kvs_ttls *ttls = calloc(1, sizeof(*ttls));
    if (!ttls)
        return NULL;
    ttls->index = index;
    ttls->schemas = schemas;
    ttls->max = max;
    ttls->max_ttl_ns = max_ttl_ns;
    kvc_mutex_init(&ttls->lock, KVC_RANK_CONTEXT);
    return ttls;
}

void kvs_ttls_destroy(kvs_ttls *ttls)
{
    if (!ttls)
        return;
    kvs_ttls_sweep(ttls, UINT64_MAX);
    free(ttls->heap);
    kvc_mutex_fini(&ttls->lock);
    free(ttls);
}

static void let_go(kvs_ttls *ttls, const entry *e)
{
    kvs_index_unhold(ttls->index, &e->block, 1);
    kvs_index_drop_blocks(ttls->index, &e->block, 1);
    kvs_schemas_put(ttls->schemas, e->schema);
}

/* False: no memory, or too many. */
static bool push(kvs_ttls *ttls, const entry *e)
{
    kvc_mutex_lock(&ttls->lock);
    bool room = ttls->n < ttls->max;
    if (room && ttls->n == ttls->n_room) {
        uint64_t n_room = ttls->n_room ? 2 * ttls->n_room : 64;
        entry *heap = realloc(ttls->heap, n_room * sizeof(*heap));
        room = heap != NULL;
        if (heap) {
            ttls->heap = heap;
            ttls->n_room = n_room;
        }
    }
    if (room) {
        uint64_t at = ttls->n++;
        for (; at && ttls->heap[(at - 1) / 2].due_ns > e->due_ns; at = (at - 1) / 2)
            ttls->heap[at] = ttls->heap[(at - 1) / 2];
        ttls->heap[at] = *e;
    }
    kvc_mutex_unlock(&ttls->lock);
    return room;
}

/* The first, if it is due. */
static bool pop(kvs_ttls *ttls, uint64_t now_ns, entry *e)
{
    kvc_mutex_lock(&ttls->lock);
    bool due = ttls->n && ttls->heap[0].due_ns <= now_ns;
    if (due) {
        entry last = ttls->heap[--ttls->n];
        uint64_t at = 0;
        *e = ttls->heap[0];
        for (uint64_t child; (child = 2 * at + 1) < ttls->n; at = child) {
            child += child + 1 < ttls->n && ttls->heap[child + 1].due_ns < ttls->heap[child].due_ns;
            if (last.due_ns <= ttls->heap[child].due_ns)
                break;
            ttls->heap[at] = ttls->heap[child];
        }
        ttls->heap[at] = last;
    }
    kvc_mutex_unlock(&ttls->lock);
    return due;
}

uint64_t kvs_ttl_keep(kvs_ttls *ttls, const kvs_schema *schema, uint16_t part,
                      const kvc_digest *digest, uint64_t ttl_ns)
{
    entry e = {.schema = schema};
    uint32_t hits = 0;
    uint64_t held_bytes;
    if (ttl_ns > ttls->max_ttl_ns)
        ttl_ns = ttls->max_ttl_ns;
    if (kvs_index_hold_blocks(ttls->index, schema, digest, 1, &e.block) != KVC_OK)
        return 0;
    if (kvs_index_hold(ttls->index, schema, &e.block, 1, &held_bytes) != KVC_OK) {
        kvs_index_drop_blocks(ttls->index, &e.block, 1);
        return 0;
    }
    kvs_schemas_hold(ttls->schemas, schema);
    e.due_ns = kvc_deadline_ns(ttl_ns);
    kvc_status status =
        kvs_index_match(ttls->index, schema, &part, 1, false, digest, 1, 0, NULL, &hits);
    if (status != KVC_OK || hits == 0 || !push(ttls, &e)) {
        let_go(ttls, &e);
        return 0;
    }
    KVC_GAUGE_ADD(ttl_values, 1);
    return ttl_ns;
}

void kvs_ttls_sweep(kvs_ttls *ttls, uint64_t now_ns)
{
    entry e;
    while (pop(ttls, now_ns, &e)) {
        let_go(ttls, &e);
        KVC_GAUGE_SUB(ttl_values, 1);
    }
}
