/*
 * index.c: value records and their states; see index.h. Blocks are in blocks.c, reads in
 * index_read.c.
 *
 * Any thread; the one lock is taken and left inside each public function. Invariants: a value is in
 * its class's dram list exactly if it has DRAM and not WRITING, in the lmdb list exactly if it has
 * LMDB; a block lives while it has values or stands in a context.
 */
#include "index.h"

#include <stdlib.h>

#include "base/assert.h"
#include "base/digest.h"
#include "evict.h"

#define CLASS_ROUND      4096u /* as the tiers cut their size classes */
#define RECORD_HEAD      144u  /* lmdb keeps this much, ... */
#define RECORD_ROW_BYTES 4u    /* ... a sum for each row and padding in front of the rows */

_Static_assert(sizeof(kvs_value) == 64, "memory per value is promised");
_Static_assert(sizeof(kvs_block) == 64, "and per block");

/* ---- life ------------------------------------------------------------------------------------ */

kvs_index *kvs_index_create(kvs_schema *const *schemas)
{
    kvs_index *index = calloc(1, sizeof(*index));
    if (!index)
        return NULL;
    if (!kvs_blocks_init(index)) {
        free(index);
        return NULL;
    }
    index->schemas = schemas;
    index->n_classes = 1;
    kvs_slab_init(&index->values, sizeof(kvs_value));
    kvs_slab_init(&index->gpu, sizeof(kvs_gpu_entry));
    kvc_mutex_init(&index->lock, KVC_RANK_INDEX);
    return index;
}

void kvs_index_destroy(kvs_index *index)
{
    uint32_t *sums;
    kvs_slot slot;
    if (!index)
        return;
    while (kvs_index_next_dirty(index, &slot, &sums) != KVS_NIL)
        free(sums);
    kvs_blocks_fini(index);
    kvs_ghosts_fini(&index->ghosts);
    kvs_slab_fini(&index->values);
    kvs_slab_fini(&index->gpu);
    kvc_mutex_fini(&index->lock);
    free(index);
}

static uint32_t pages_of(uint32_t bytes)
{
    return (uint32_t)(((uint64_t)bytes + CLASS_ROUND - 1) / CLASS_ROUND);
}

uint32_t kvs_index_class(void *arg, const kvc_digest *tenant, uint32_t value_bytes, uint32_t n_rows)
{
    kvs_index *index = arg;
    uint32_t pages = pages_of(value_bytes);
    uint32_t record_pages = pages + pages_of(RECORD_HEAD + RECORD_ROW_BYTES * n_rows);
    if (n_rows == KVS_PIECE_ROWS)
        record_pages = kvs_piece_pages(value_bytes / n_rows, record_pages);
    value_bytes = pages * CLASS_ROUND;
    kvc_mutex_lock(&index->lock);
    uint32_t cls = 1;
    while (cls < index->n_classes && (index->classes[cls].value_bytes != value_bytes ||
                                      index->classes[cls].record_pages != record_pages ||
                                      !kvc_digest_equal(&index->classes[cls].tenant, tenant)))
        cls++;
    if (cls == KVS_MAX_CLASSES) {
        cls = 0;
    } else if (cls == index->n_classes) {
        index->classes[cls].tenant = *tenant;
        index->classes[cls].value_bytes = value_bytes;
        index->classes[cls].record_pages = record_pages;
        index->n_classes++;
    }
    kvc_mutex_unlock(&index->lock);
    return cls;
}

/* ---- values ---------------------------------------------------------------------------------- */

uint32_t kvs_value_create_locked(kvs_index *index, const kvs_schema *schema, uint32_t part,
                                 const kvc_digest *digest)
{
    uint32_t block_id = kvs_block_get(index, schema->id, digest);
    if (block_id == KVS_NIL)
        return KVS_NIL;
    uint32_t id = kvs_slab_alloc(&index->values);
    if (id != KVS_NIL && !kvs_block_add_value(kvs_block_at(index, block_id), part, id)) {
        kvs_slab_free(&index->values, id);
        id = KVS_NIL;
    }
    if (id == KVS_NIL) {
        kvs_block_settle(index, block_id);
        return KVS_NIL;
    }
    kvs_value *value = kvs_value_at(index, id);
    value->block = block_id;
    value->part = (uint16_t)part;
    return id;
}

void kvs_value_free_locked(kvs_index *index, uint32_t id)
{
    kvs_value *value = kvs_value_at(index, id);
    uint32_t block_id = value->block;
    KVC_ASSERT(value->refs == 0 && kvs_value_find(index, block_id, value->part) == id);
    KVC_ASSERT(!(value->flags & KVS_GPU));
    kvs_block_remove_value(kvs_block_at(index, block_id), value->part);
    kvs_slab_free(&index->values, id);
    kvs_block_settle(index, block_id);
}

const kvs_part *kvs_value_part(const kvs_index *index, const kvs_value *value)
{
    const kvs_schema *schema = index->schemas[kvs_block_at(index, value->block)->schema];
    return kvs_part_at(schema, value->part);
}

kvs_class *kvs_value_class(kvs_index *index, const kvs_value *value)
{
    return &index->classes[kvs_value_part(index, value)->cls];
}

void kvs_key_locked(kvs_index *index, uint32_t id, kvs_value_key *key_p)
{
    const kvs_value *value = kvs_value_at(index, id);
    const kvs_block *block = kvs_block_at(index, value->block);
    const kvs_schema *schema = index->schemas[block->schema];
    key_p->tenant = schema->tenant;
    key_p->schema = schema->digest;
    key_p->block = block->digest;
    key_p->part = schema->piece_bytes ? kvs_opaque_key_part(kvs_block_tag(block), value->part)
                                      : schema->parts[value->part].id;
}

void kvs_index_key(kvs_index *index, uint32_t id, kvs_value_key *key_p)
{
    kvc_mutex_lock(&index->lock);
    kvs_key_locked(index, id, key_p);
    kvc_mutex_unlock(&index->lock);
}

const kvs_schema *kvs_index_schema(kvs_index *index, uint32_t id, uint32_t *part_p)
{
    kvc_mutex_lock(&index->lock);
    const kvs_value *value = kvs_value_at(index, id);
    const kvs_schema *schema = index->schemas[kvs_block_at(index, value->block)->schema];
    *part_p = value->part;
    kvc_mutex_unlock(&index->lock);
    return schema;
}

/* The put that claimed it has ended, whether or not it was erased meanwhile. */
static void end_claim(kvs_index *index, uint32_t id)
{
    KVC_ASSERT((kvs_value_at(index, id)->flags & ~KVS_ERASED) == KVS_FILLING);
    kvs_block_coming(index, id, false);
}

/* A value has been published; erased: an erase met it before. */
static void become_visible(kvs_index *index, uint32_t id, uint16_t erased)
{
    if (!erased) {
        index->n_visible++;
        kvs_hold_admit_locked(index, id);
        return;
    }
    kvs_value_at(index, id)->flags |= KVS_ERASED;
    kvs_index_erased_locked(index, id);
}

/* ---- put ------------------------------------------------------------------------------------- */

kvs_claim kvs_claim_old_locked(kvs_index *index, uint32_t id, bool durable, kvs_slot *slot_p)
{
    kvs_value *value = kvs_value_at(index, id);
    if (value->flags & (KVS_FILLING | KVS_DOOMED | KVS_ERASED))
        return KVS_CLAIM_BUSY;
    if (!durable || (value->flags & (KVS_LMDB | KVS_SYNCED)) == (KVS_LMDB | KVS_SYNCED))
        return KVS_CLAIM_EXISTS;
    if (value->flags & KVS_WRITING || value->refs == UINT16_MAX)
        return KVS_CLAIM_BUSY;
    if (value->flags & KVS_LMDB) {
        value->refs++;
        *slot_p = value->lmdb;
        return KVS_CLAIM_SYNC;
    }
    kvs_evict_dram_remove(index, id);
    value->flags |= KVS_WRITING;
    *slot_p = value->dram;
    return KVS_CLAIM_WRITE;
}

/* The caller holds the lock. */
static void claim_one(kvs_index *index, const kvs_schema *schema, kvs_want *want, bool durable,
                      bool only_old)
{
    uint32_t block = kvs_block_find(index, schema->id, want->digest);
    uint32_t id = block == KVS_NIL ? KVS_NIL : kvs_value_find(index, block, want->part);
    if (id != KVS_NIL) {
        want->claim = kvs_claim_old_locked(index, id, durable, &want->slot);
    } else if (only_old) {
        want->claim = KVS_CLAIM_ABSENT;
    } else if ((id = kvs_value_create_locked(index, schema, want->part, want->digest)) != KVS_NIL) {
        kvs_value_at(index, id)->flags = KVS_FILLING;
        kvs_block_coming(index, id, true);
        want->claim = KVS_CLAIM_MINE;
    } else {
        want->claim = KVS_CLAIM_NO_MEMORY;
    }
    want->value = id;
}

uint32_t kvs_index_claim_each(kvs_index *index, const kvs_schema *schema, kvs_want *wants,
                              uint32_t n, bool durable, bool only_old)
{
    bool any_mine = false;
    uint32_t i = 0, end = n < KVS_INDEX_STEP ? n : KVS_INDEX_STEP;
    kvc_mutex_lock(&index->lock);
    for (; i < end; i++) {
        claim_one(index, schema, &wants[i], durable, only_old);
        if (any_mine && wants[i].claim == KVS_CLAIM_BUSY)
            break;
        any_mine |= wants[i].claim == KVS_CLAIM_MINE;
    }
    kvc_mutex_unlock(&index->lock);
    return i;
}

void kvs_index_abandon(kvs_index *index, uint32_t id)
{
    kvc_mutex_lock(&index->lock);
    end_claim(index, id);
    kvs_value_free_locked(index, id);
    kvc_mutex_unlock(&index->lock);
}

void kvs_index_dirty_locked(kvs_index *index, uint32_t id)
{
    kvs_value_at(index, id)->dram_prev = index->dirty_tail;
    if (index->dirty_tail)
        kvs_value_at(index, index->dirty_tail)->dram_next = id;
    else
        index->dirty_head = id;
    index->dirty_tail = id;
    index->n_dirty++;
}

bool kvs_index_undirty_locked(kvs_index *index, uint32_t id, uint32_t **sums_p)
{
    kvs_value *value = kvs_value_at(index, id);
    *sums_p = NULL;
    if (index->dirty_head != id && value->dram_prev == KVS_NIL)
        return false;
    if (value->dram_prev)
        kvs_value_at(index, value->dram_prev)->dram_next = value->dram_next;
    else
        index->dirty_head = value->dram_next;
    if (value->dram_next)
        kvs_value_at(index, value->dram_next)->dram_prev = value->dram_prev;
    else
        index->dirty_tail = value->dram_prev;
    value->dram_prev = value->dram_next = KVS_NIL;
    index->n_dirty--;
    /* Nothing but a slot of lmdb stands there once it is written. */
    *sums_p = (uint32_t *)(uintptr_t)value->lmdb.a;
    index->sums_bytes -= value->lmdb.b;
    value->lmdb = (kvs_slot){0, 0};
    return true;
}

/* The caller holds the lock. */
static void publish_dram(kvs_index *index, uint32_t id, kvs_slot slot, bool dirty)
{
    kvs_value *value = kvs_value_at(index, id);
    uint16_t erased = value->flags & KVS_ERASED;
    end_claim(index, id);
    value->dram = slot;
    value->lmdb = (kvs_slot){0, 0};
    value->flags = KVS_DRAM;
    if (dirty && !erased) {
        value->flags |= KVS_WRITING;
        kvs_index_dirty_locked(index, id);
    } else {
        kvs_evict_dram_add(index, id);
    }
    become_visible(index, id, erased);
}

/* Gives a queued value its row sums, if there is room for them. The caller holds the lock. */
static void keep_sums(kvs_index *index, kvs_filled *filled)
{
    kvs_value *value = kvs_value_at(index, filled->value);
    uint64_t bytes = (uint64_t)filled->n_rows * sizeof(*filled->sums);
    if (!(value->flags & KVS_WRITING) || index->sums_bytes + bytes > KVS_DIRTY_SUMS)
        return;
    value->lmdb = (kvs_slot){(uintptr_t)filled->sums, bytes};
    index->sums_bytes += bytes;
    filled->sums = NULL;
}

void kvs_index_publish_each(kvs_index *index, kvs_filled *filled, uint32_t n, bool dirty)
{
    for (uint32_t i = 0; i < n;) {
        kvc_mutex_lock(&index->lock);
        for (uint32_t end = i + KVS_INDEX_STEP; i < n && i < end; i++) {
            publish_dram(index, filled[i].value, filled[i].slot, dirty);
            if (filled[i].sums)
                keep_sums(index, &filled[i]);
        }
        kvc_mutex_unlock(&index->lock);
    }
    for (uint32_t i = 0; i < n; i++)
        free(filled[i].sums);
}

void kvs_index_publish_lmdb(kvs_index *index, uint32_t id, kvs_slot lmdb, bool synced,
                            const kvs_slot *dram)
{
    kvc_mutex_lock(&index->lock);
    kvs_value *value = kvs_value_at(index, id);
    uint16_t erased = value->flags & KVS_ERASED;
    end_claim(index, id);
    value->lmdb = lmdb;
    value->flags = synced ? KVS_LMDB | KVS_SYNCED : KVS_LMDB;
    kvs_evict_lmdb_add(index, id);
    if (dram) {
        value->dram = *dram;
        value->flags |= KVS_DRAM;
        kvs_evict_dram_add(index, id);
    }
    become_visible(index, id, erased);
    kvc_mutex_unlock(&index->lock);
}

void kvs_index_wrote(kvs_index *index, uint32_t id, bool ok, kvs_slot lmdb, bool synced)
{
    kvc_mutex_lock(&index->lock);
    kvs_value *value = kvs_value_at(index, id);
    KVC_ASSERT((value->flags & (KVS_WRITING | KVS_DRAM)) == (KVS_WRITING | KVS_DRAM));
    value->flags &= (uint16_t)~KVS_WRITING;
    if (ok) {
        value->lmdb = lmdb;
        value->flags |= synced ? KVS_LMDB | KVS_SYNCED : KVS_LMDB;
        kvs_evict_lmdb_add(index, id);
        kvs_hold_release_segment_locked(index, id);
    }
    kvs_evict_dram_add(index, id);
    kvs_index_erased_locked(index, id);
    kvc_mutex_unlock(&index->lock);
}

void kvs_index_synced(kvs_index *index, uint32_t id, bool ok)
{
    kvc_mutex_lock(&index->lock);
    kvs_value *value = kvs_value_at(index, id);
    if (ok && value->flags & KVS_LMDB)
        value->flags |= KVS_SYNCED;
    kvs_value_unref_locked(index, id);
    kvc_mutex_unlock(&index->lock);
}

uint32_t kvs_index_next_dirty(kvs_index *index, kvs_slot *dram_p, uint32_t **sums_p)
{
    *sums_p = NULL;
    kvc_mutex_lock(&index->lock);
    uint32_t id = index->dirty_head;
    if (id != KVS_NIL) {
        *dram_p = kvs_value_at(index, id)->dram;
        (void)kvs_index_undirty_locked(index, id, sums_p);
    }
    kvc_mutex_unlock(&index->lock);
    return id;
}

void kvs_index_write_used(kvs_index *index, bool yes)
{
    kvc_mutex_lock(&index->lock);
    index->write_used = yes;
    kvc_mutex_unlock(&index->lock);
}

uint64_t kvs_index_dirty_count(kvs_index *index)
{
    kvc_mutex_lock(&index->lock);
    uint64_t n = index->n_dirty;
    kvc_mutex_unlock(&index->lock);
    return n;
}

kvc_status kvs_recovered_locked(kvs_index *index, const kvs_schema *schema, uint32_t part,
                                const kvc_digest *digest, kvs_slot lmdb)
{
    uint32_t id = KVS_NIL;
    uint32_t block = kvs_block_find(index, schema->id, digest);
    bool there = block != KVS_NIL && kvs_value_find(index, block, part) != KVS_NIL;
    if (!there)
        id = kvs_value_create_locked(index, schema, part, digest);
    if (id != KVS_NIL) {
        kvs_value *value = kvs_value_at(index, id);
        value->lmdb = lmdb;
        value->flags = KVS_LMDB | KVS_SYNCED;
        kvs_evict_lmdb_add(index, id);
        index->n_visible++;
    }
    if (there)
        return KVC_EXISTS;
    return id != KVS_NIL ? KVC_OK : KVC_NO_MEMORY;
}

kvc_status kvs_index_recovered(kvs_index *index, const kvs_schema *schema, uint32_t part,
                               const kvc_digest *digest, kvs_slot lmdb)
{
    kvc_mutex_lock(&index->lock);
    kvc_status status = kvs_recovered_locked(index, schema, part, digest, lmdb);
    kvc_mutex_unlock(&index->lock);
    return status;
}
