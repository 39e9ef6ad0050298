/*
 * cascade.c: making room, promoting, dropping; see cascade.h.
 *
 * Any thread; promotions run on disk threads, segments are emptied on the room thread, since that
 * takes long. Invariants: a slot is released exactly once, by
 * whoever took it out of the index, before the value may be put again; a promotion holds one
 * reference from LOADING to loaded.
 */
#include "cascade.h"

#include <stdlib.h>

#include "base/clock.h"
#include "base/digest.h"
#include "base/fault.h"
#include "base/log.h"
#include "base/metrics.h"
#include "gpu.h"

#define MAX_TRIES     64u /* at room for one value; others may be faster to take what it freed */
#define MAX_PROMOTING 64u
#define MAX_EMPTIED   2u  /* segments for one value; another class may be faster here, too */
#define ROOM_STEP     32u /* values that give way at once, where as many are wanted */

static void count_lost(kvs_server *server, const kvs_victim *victim)
{
    KVC_COUNT(evicted_values);
    atomic_fetch_add(&server->lost_values, 1);
    atomic_fetch_add(&server->lost_bytes, victim->value_bytes);
}

void kvs_cascade_release(kvs_server *server, const kvs_victim *victims, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        server->dram.ops->release(server->dram.tier, &victims[i].key, victims[i].slot);
        if (victims[i].gone)
            count_lost(server, &victims[i]);
    }
    atomic_fetch_add(&server->dram.evictions, n);
    kvs_evict_finish_each(server->index, victims, n);
}

static void release_lmdb(kvs_server *server, const kvs_victim *victim)
{
    server->lmdb.ops->release(server->lmdb.tier, &victim->key, victim->slot);
    kvs_evict_finish(server->index, victim);
}

/* A segment of another class, by the room thread. */
static bool empty_other(kvs_server *server, uint32_t cls, kvs_room *room_p, uint32_t *n_emptied_p)
{
    if (*room_p == KVS_ROOM_ASK && kvs_cascade_may_empty(server))
        *room_p = KVS_ROOM_WANTED;
    return *room_p == KVS_ROOM_EMPTY && ++*n_emptied_p <= MAX_EMPTIED &&
           kvs_cascade_empty_segment(server, cls);
}

/* For n values, or fewer. */
static bool make_room(kvs_server *server, uint32_t cls, kvs_room *room_p, uint32_t *n_emptied_p,
                      uint32_t n)
{
    kvs_victim victims[ROOM_STEP];
    if (kvs_evict_starved(server->index, cls)) {
        if (empty_other(server, cls, room_p, n_emptied_p))
            return true;
        if (*room_p == KVS_ROOM_WANTED)
            return false;
    }
    n = kvs_evict_dram_each(server->index, cls, victims, n < ROOM_STEP ? n : ROOM_STEP);
    if (n == 0)
        return empty_other(server, cls, room_p, n_emptied_p);
    kvs_cascade_release(server, victims, n);
    return true;
}

/* A promotion moves a copy, so it takes no value that is nowhere else, and no segment. */
static bool drop_copy(kvs_server *server, uint32_t cls)
{
    kvs_victim victim;
    bool found = kvs_evict_dram_copy(server->index, cls, &victim);
    if (found)
        kvs_cascade_release(server, &victim, 1);
    return found;
}

/* Its own class first, since that frees a slot of the right size; only a class that has nothing
   to give, or next to nothing of dram, takes from another, and then a whole segment, since less is
   of no use to it. room_p NULL: for a promotion. */
static kvc_status reserve(kvs_server *server, const kvs_schema *schema, uint32_t part,
                          kvs_room *room_p, uint32_t n, kvs_slot *slots, void **addrs)
{
    uint32_t n_emptied = 0;
    const kvs_part *info = kvs_part_at(schema, part);
    const kvs_store *dram = &server->dram;
    const kvs_value_key key = {.tenant = schema->tenant};
    for (uint32_t i = 0; i <= MAX_TRIES; i++) {
        kvc_status status =
            dram->ops->reserve(dram->tier, &key, info->row_bytes, info->n_rows, n, slots, addrs);
        if (status != KVC_AGAIN)
            return status;
        if (!(room_p ? make_room(server, info->cls, room_p, &n_emptied, n)
                     : drop_copy(server, info->cls)))
            return KVC_AGAIN;
    }
    return KVC_AGAIN;
}

kvc_status kvs_cascade_reserve(kvs_server *server, const kvs_schema *schema, uint32_t part,
                               uint32_t n, kvs_room *room_p, kvs_slot *slots, void **addrs,
                               uint32_t *n_p)
{
    *n_p = 0;
    if (KVC_FAULT("put.reserve"))
        return KVC_AGAIN;
    kvc_status status = reserve(server, schema, part, room_p, n, slots, addrs);
    while (status == KVC_OK && *n_p < n && addrs[*n_p])
        ++*n_p;
    return status;
}

/* pages 0: of the class, else of all that take so many. */
static uint64_t evict_from_lmdb(kvs_server *server, uint32_t cls, uint32_t pages, uint64_t bytes)
{
    uint64_t freed = 0;
    kvs_victim victim;
    while (freed < bytes && (pages ? kvs_evict_lmdb_pages(server->index, pages, &victim)
                                   : kvs_evict_lmdb(server->index, cls, &victim))) {
        atomic_fetch_add(&server->lmdb.evictions, 1);
        if (victim.gone)
            count_lost(server, &victim);
        release_lmdb(server, &victim);
        freed += victim.value_bytes;
    }
    return freed;
}

uint64_t kvs_cascade_lmdb_room(kvs_server *server, uint32_t cls, const kvs_tier_shape *shape)
{
    const kvs_store *lmdb = &server->lmdb;
    uint64_t own = (uint64_t)shape->row_bytes * shape->n_rows, freed = 0, wanted;
    uint32_t own_pages = server->index->classes[cls].record_pages, pages;
    if (!lmdb->ops->donor)
        return evict_from_lmdb(server, cls, 0, own);
    for (uint32_t rank = 0; !freed && lmdb->ops->donor(lmdb->tier, shape, rank, &pages, &wanted);
         rank++)
        freed = evict_from_lmdb(server, cls, pages == own_pages ? 0 : pages,
                                wanted > own ? wanted : own);
    return freed;
}

void kvs_cascade_reap(kvs_server *server)
{
    kvs_victim victim;
    while (kvs_evict_dead(server->index, &victim)) {
        kvs_store *store = victim.from_lmdb ? &server->lmdb : &server->dram;
        store->ops->release(store->tier, &victim.key, victim.slot);
        kvs_evict_finish(server->index, &victim);
    }
    kvs_gpu_reap(server);
}

void kvs_cascade_bad(kvs_server *server, uint32_t value, kvc_status status)
{
    kvs_value_key key;
    char hex[KVC_DIGEST_HEX_BYTES];
    kvs_index_key(server->index, value, &key);
    if (!kvs_index_doom(server->index, value))
        return;
    kvc_digest_hex(&key.block, hex);
    KVC_LOG_WARN(STORE, "dropped block %.16s part %u: its lmdb copy is %s", hex, key.part,
                 status == KVC_CORRUPT ? "corrupt" : "gone");
    if (status == KVC_CORRUPT)
        KVC_COUNT(corrupt_values);
}

/* ---- promotion ------------------------------------------------------------------------------- */

typedef struct promotion {
    kvs_job job;
    kvs_server *server;
    const kvs_schema *schema;
    uint32_t part, value;
    kvs_slot lmdb;
} promotion;

/* Room, the rows, and the end of LOADING. */
static kvc_status load_from(kvs_server *server, const kvs_store *store, const kvs_schema *schema,
                            uint32_t part, uint32_t value, kvs_slot from)
{
    const kvs_part *info = kvs_part_at(schema, part);
    kvs_value_key key;
    kvs_slot slot;
    void *addr;
    kvs_index_key(server->index, value, &key);
    kvc_status status = reserve(server, schema, part, NULL, 1, &slot, &addr);
    if (status != KVC_OK) {
        kvs_index_loaded(server->index, value, NULL);
        return status;
    }
    kvs_row_range range = {.first = 0, .n = info->n_rows, .dst = addr};
    status = store->ops->read(store->tier, &key, from, info->row_bytes, info->n_rows, &range, 1);
    if (status == KVC_OK)
        server->dram.ops->commit(server->dram.tier, &slot, 1);
    else if (store == &server->lmdb && (status == KVC_CORRUPT || status == KVC_NOT_FOUND))
        kvs_cascade_bad(server, value, status);
    if (kvs_index_loaded(server->index, value, status == KVC_OK ? &slot : NULL))
        KVC_COUNT(promoted_values);
    else
        server->dram.ops->release(server->dram.tier, &key, slot);
    return status;
}

kvc_status kvs_cascade_load(kvs_server *server, const kvs_schema *schema, uint32_t part,
                            uint32_t value, kvs_slot lmdb)
{
    return load_from(server, &server->lmdb, schema, part, value, lmdb);
}

void kvs_cascade_demote(kvs_server *server, uint32_t value, kvs_slot gpu)
{
    uint32_t part;
    const kvs_schema *schema = kvs_index_schema(server->index, value, &part);
    if (load_from(server, &server->gpu, schema, part, value, gpu) == KVC_OK)
        KVC_COUNT(gpu_demoted_values);
}

static void promote_run(kvs_job *job)
{
    promotion *p = (promotion *)job;
    (void)kvs_cascade_load(p->server, p->schema, p->part, p->value, p->lmdb);
    atomic_fetch_sub(&p->server->n_promoting, 1);
    free(p);
}

void kvs_cascade_promote(kvs_server *server, const kvs_schema *schema, uint32_t part,
                         uint32_t value, kvs_slot lmdb)
{
    promotion *p = NULL;
    if (atomic_fetch_add(&server->n_promoting, 1) < MAX_PROMOTING)
        p = malloc(sizeof(*p));
    if (p) {
        *p = (promotion){.job.run = promote_run,
                         .server = server,
                         .schema = schema,
                         .part = part,
                         .value = value,
                         .lmdb = lmdb};
        if (kvs_disk_submit(server->disk, &p->job) == KVC_OK)
            return;
        free(p);
    }
    atomic_fetch_sub(&server->n_promoting, 1);
    kvs_index_loaded(server->index, value, NULL);
}
