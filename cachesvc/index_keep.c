/*
 * index_keep.c: values that may not be dropped (holds) and values that must be (erase); index.h.
 *
 * Any thread; long lists are worked off in steps. Invariants: a HELD value is visible and counted
 * once in held_bytes and held_total, and in its class's n_kept as long as lmdb has no copy; an
 * erased value is invisible at once, whoever has it in hands; once doomed it is in no eviction
 * list, keeps the flags of the slots that are still to be released, and is in the dead list as soon
 * as nobody reads it.
 */
#include <stdlib.h>

#include "base/assert.h"
#include "base/digest.h"
#include "evict.h"
#include "index.h"

/* ---- holds ----------------------------------------------------------------------------------- */

static const kvs_schema *schema_of(const kvs_index *index, const kvs_value *value)
{
    return index->schemas[kvs_block_at(index, value->block)->schema];
}

/* Only schemas of which something is held were met by the index, so only those are looked at. */
static uint64_t tenant_held(const kvs_index *index, const kvc_digest *tenant)
{
    uint64_t bytes = 0;
    for (uint32_t i = 1; i <= index->held_max_schema; i++)
        if (index->held_bytes[i] && kvc_digest_equal(&index->schemas[i]->tenant, tenant))
            bytes += index->held_bytes[i];
    return bytes;
}

/* Segments that the KEPT values of a tenant (NULL: of all) need at least. */
static uint64_t kept_segments(const kvs_index *index, const kvc_digest *tenant)
{
    uint64_t n = 0;
    for (uint32_t i = 0; i < index->n_classes; i++) {
        const kvs_class *cls = &index->classes[i];
        if (cls->n_kept && (!tenant || i == 0 || kvc_digest_equal(&cls->tenant, tenant)))
            n += kvs_class_segments(index, cls, cls->n_kept);
    }
    return n;
}

/* Whether one KEPT value more is within the caps. Only the first of a segment is looked at. */
static bool may_keep(const kvs_index *index, const kvs_class *cls)
{
    return !index->segment_bytes || cls->n_kept % kvs_class_slots(index, cls) != 0 ||
           (kept_segments(index, &cls->tenant) < index->max_kept &&
            kept_segments(index, NULL) < index->max_kept_total);
}

void kvs_hold_release_segment_locked(kvs_index *index, uint32_t id)
{
    kvs_value *value = kvs_value_at(index, id);
    if (!(value->flags & KVS_KEPT))
        return;
    KVC_ASSERT(kvs_value_class(index, value)->n_kept > 0);
    kvs_value_class(index, value)->n_kept--;
    value->flags &= (uint16_t)~KVS_KEPT;
}

static bool hold_value(kvs_index *index, uint32_t id)
{
    kvs_value *value = kvs_value_at(index, id);
    const kvs_schema *schema = schema_of(index, value);
    uint64_t bytes = kvs_part_at(schema, value->part)->value_bytes;
    if (!kvs_value_visible(value) || value->flags & KVS_HELD)
        return true;
    if (index->held_total + bytes > index->max_held_total ||
        tenant_held(index, &schema->tenant) + bytes > index->max_held)
        return false;
    kvs_class *cls = kvs_value_class(index, value);
    bool keeps = !(value->flags & KVS_LMDB);
    if (keeps && !may_keep(index, cls))
        return false;
    if (schema->id > index->held_max_schema)
        index->held_max_schema = schema->id;
    index->held_bytes[schema->id] += bytes;
    index->held_total += bytes;
    cls->n_kept += keeps;
    value->flags |= keeps ? KVS_HELD | KVS_KEPT : KVS_HELD;
    return true;
}

void kvs_hold_admit_locked(kvs_index *index, uint32_t id)
{
    if (kvs_block_at(index, kvs_value_at(index, id)->block)->holds)
        (void)hold_value(index, id);
}

void kvs_hold_forget_locked(kvs_index *index, uint32_t id)
{
    kvs_value *value = kvs_value_at(index, id);
    if (!(value->flags & KVS_HELD))
        return;
    const kvs_schema *schema = schema_of(index, value);
    uint64_t bytes = kvs_part_at(schema, value->part)->value_bytes;
    KVC_ASSERT(index->held_bytes[schema->id] >= bytes && index->held_total >= bytes);
    kvs_hold_release_segment_locked(index, id);
    index->held_bytes[schema->id] -= bytes;
    index->held_total -= bytes;
    value->flags &= (uint16_t)~KVS_HELD;
}

/* How many blocks one critical section covers. */
static uint32_t step_of(const kvs_index *index, uint32_t block)
{
    const kvs_schema *schema = index->schemas[kvs_block_at(index, block)->schema];
    uint32_t n_values = kvs_block_at(index, block)->n_values;
    uint32_t n_parts = schema->piece_bytes && n_values ? n_values : schema->n_parts;
    return n_parts < KVS_INDEX_STEP ? KVS_INDEX_STEP / n_parts : 1;
}

static void unhold_block(kvs_index *index, uint32_t id)
{
    kvs_block *block = kvs_block_at(index, id);
    KVC_ASSERT(block->holds > 0);
    if (--block->holds == 0)
        for (uint32_t i = 0; i < block->n_values; i++)
            kvs_hold_forget_locked(index, block->values[i]);
}

/* False: a cap is reached; the block is as it was. */
static bool hold_block(kvs_index *index, uint32_t id)
{
    kvs_block *block = kvs_block_at(index, id);
    bool good = true;
    block->holds++;
    for (uint32_t i = 0; good && i < block->n_values; i++)
        good = hold_value(index, block->values[i]);
    if (!good)
        unhold_block(index, id);
    return good;
}

void kvs_index_unhold(kvs_index *index, const uint32_t *blocks, uint32_t n)
{
    for (uint32_t i = 0; i < n;) {
        kvc_mutex_lock(&index->lock);
        for (uint32_t end = i + step_of(index, blocks[i]); i < n && i < end; i++)
            unhold_block(index, blocks[i]);
        kvc_mutex_unlock(&index->lock);
    }
}

kvc_status kvs_index_hold(kvs_index *index, const kvs_schema *schema, const uint32_t *blocks,
                          uint32_t n, uint64_t *tenant_bytes_p)
{
    bool good = true;
    uint32_t i = 0;
    while (good && i < n) {
        kvc_mutex_lock(&index->lock);
        for (uint32_t end = i + step_of(index, blocks[i]); good && i < n && i < end; i += good)
            good = hold_block(index, blocks[i]);
        kvc_mutex_unlock(&index->lock);
    }
    if (!good)
        kvs_index_unhold(index, blocks, i);
    *tenant_bytes_p = kvs_index_held(index, schema);
    return good ? KVC_OK : KVC_NO_SPACE;
}

uint64_t kvs_index_held(kvs_index *index, const kvs_schema *schema)
{
    kvc_mutex_lock(&index->lock);
    uint64_t bytes = tenant_held(index, &schema->tenant);
    kvc_mutex_unlock(&index->lock);
    return bytes;
}

/* ---- erase ----------------------------------------------------------------------------------- */

/* Of a value in the lists of those who may give way: from now on it is in none. */
static void doom(kvs_index *index, uint32_t id)
{
    kvs_value *value = kvs_value_at(index, id);
    if (value->flags & KVS_DRAM)
        kvs_evict_dram_remove(index, id);
    if (value->flags & KVS_LMDB)
        kvs_evict_lmdb_remove(index, id);
    uint32_t kept = KVS_DRAM | KVS_LMDB | KVS_LOADING | KVS_GPU | KVS_RAISING;
    value->flags = (uint16_t)((value->flags & kept) | KVS_DOOMED);
    if (value->refs == 0) { /* as a reader who leaves at once: the last hands it to the dead */
        value->refs = 1;
        kvs_value_unref_locked(index, id);
    }
}

void kvs_index_erased_locked(kvs_index *index, uint32_t id)
{
    if (kvs_value_at(index, id)->flags & KVS_ERASED)
        doom(index, id);
}

/* A value that a put fills or the writer has in its hands is only marked, and doomed by them. */
void kvs_erase_value_locked(kvs_index *index, uint32_t id, kvs_erased *erased)
{
    kvs_value *value = kvs_value_at(index, id);
    uint32_t *sums;
    erased->pending++;
    if (value->flags & (KVS_DOOMED | KVS_ERASED))
        return;
    if (kvs_value_visible(value)) {
        kvs_hold_forget_locked(index, id);
        index->n_visible--;
        erased->values++;
        erased->bytes += kvs_value_part(index, value)->value_bytes;
    }
    if (value->flags & KVS_WRITING && kvs_index_undirty_locked(index, id, &sums)) {
        free(sums);
        value->flags &= (uint16_t)~KVS_WRITING;
        kvs_evict_dram_add(index, id); /* clean enough to be dropped */
    }
    if (value->flags & (KVS_FILLING | KVS_WRITING))
        value->flags |= KVS_ERASED;
    else
        doom(index, id);
}

static void erase_block(kvs_index *index, uint32_t block, const uint16_t *parts, uint32_t n_parts,
                        kvs_erased *erased)
{
    const kvs_block *record = kvs_block_at(index, block);
    for (uint32_t i = 0; !parts && i < record->n_values; i++)
        kvs_erase_value_locked(index, record->values[i], erased);
    for (uint32_t p = 0; parts && p < n_parts; p++) {
        uint32_t id = kvs_value_find(index, block, parts[p]);
        if (id != KVS_NIL)
            kvs_erase_value_locked(index, id, erased);
    }
}

void kvs_index_erase(kvs_index *index, const kvs_schema *schema, const kvc_digest *digest,
                     const uint16_t *parts, uint32_t n_parts, kvs_erased *erased)
{
    kvc_mutex_lock(&index->lock);
    uint32_t block = kvs_block_find(index, schema->id, digest);
    if (block != KVS_NIL)
        erase_block(index, block, parts, n_parts, erased);
    kvc_mutex_unlock(&index->lock);
}

void kvs_index_erase_block(kvs_index *index, uint32_t block, const uint16_t *parts,
                           uint32_t n_parts, kvs_erased *erased)
{
    kvc_mutex_lock(&index->lock);
    erase_block(index, block, parts, n_parts, erased);
    kvc_mutex_unlock(&index->lock);
}
