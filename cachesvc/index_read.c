/*
 * index_read.c: looking values up, referencing them, and what readers find out; see index.h.
 *
 * Any thread; long lists are worked off in steps, so that nobody waits long for the lock.
 * Invariant: a referenced value keeps its slots until its last reader leaves.
 */
#include <stdlib.h>

#include "base/assert.h"
#include "base/clock.h"
#include "evict.h"
#include "index.h"

#define HEAT_ROWS    0xfffu
#define HEAT_WINDOWS 0xfu

void kvs_value_unref_locked(kvs_index *index, uint32_t id)
{
    kvs_value *value = kvs_value_at(index, id);
    KVC_ASSERT(value->refs > 0);
    if (--value->refs == 0 && value->flags & KVS_DOOMED) {
        kvs_gpu_forget_locked(index, id);
        value->chain = index->dead_head;
        index->dead_head = id;
    }
}

/* ---- read ------------------------------------------------------------------------------------ */

/* Adds rows to the value's count in this window; true once it makes the value worth loading. */
static bool heat_add(kvs_value *value, uint32_t rows, uint32_t promote_rows, uint32_t window)
{
    uint32_t have = value->heat >> 12 == (window & HEAT_WINDOWS) ? value->heat & HEAT_ROWS : 0;
    have = have + rows > HEAT_ROWS ? HEAT_ROWS : have + rows;
    value->heat = (uint16_t)((window & HEAT_WINDOWS) << 12 | have);
    return promote_rows && have >= promote_rows;
}

/* A second use: the value is not clean any more, so it leaves the list of what may give way. */
static void want_write(kvs_index *index, uint32_t id)
{
    kvs_value *value = kvs_value_at(index, id);
    kvs_evict_dram_remove(index, id);
    value->flags |= KVS_WRITING;
    value->lmdb = (kvs_slot){0, 0}; /* the row sums are not kept */
    kvs_index_dirty_locked(index, id);
}

static void read_ref(kvs_index *index, uint32_t part, uint32_t promote_rows, uint32_t window,
                     kvs_read *read)
{
    bool raises = read->raise;
    read->where = KVS_NOWHERE;
    read->promote = read->raise = read->gpu = false;
    read->value = kvs_value_find(index, read->block, part);
    if (read->value == KVS_NIL)
        return;
    kvs_value *value = kvs_value_at(index, read->value);
    if (!kvs_value_visible(value))
        return;
    if (value->refs >= UINT16_MAX - 1) {
        read->where = KVS_BUSY;
        return;
    }
    value->refs++;
    read->gpu = kvs_gpu_used_locked(index, value, &read->gpu_slot);
    if (value->flags & KVS_DRAM) {
        if ((value->flags & KVS_READS) != KVS_READS)
            value->flags += KVS_READ;
        if (index->write_used && !(value->flags & (KVS_LMDB | KVS_WRITING)))
            want_write(index, read->value);
        read->where = KVS_IN_DRAM;
        read->slot = value->dram;
        read->raise = raises && kvs_gpu_hot_locked(index, value);
        return;
    }
    read->where = KVS_IN_LMDB;
    read->slot = value->lmdb;
    if (heat_add(value, read->n_rows, promote_rows, window) && !(value->flags & KVS_LOADING)) {
        value->flags |= KVS_LOADING;
        value->refs++;
        read->promote = true;
    }
}

void kvs_index_ref(kvs_index *index, const kvs_schema *schema, uint32_t part, uint32_t promote_rows,
                   uint32_t window, kvs_read *reads, uint32_t n)
{
    KVC_ASSERT(schema->piece_bytes || part < schema->n_parts);
    for (uint32_t i = 0; i < n;) {
        kvc_mutex_lock(&index->lock);
        for (uint32_t end = i + KVS_INDEX_STEP; i < n && i < end; i++)
            read_ref(index, part, promote_rows, window, &reads[i]);
        kvc_mutex_unlock(&index->lock);
    }
}

void kvs_index_ref_named(kvs_index *index, const kvs_schema *schema,
                         const kvc_digest *const *digests, const uint16_t *parts, kvs_read *reads,
                         uint32_t n)
{
    for (uint32_t i = 0; i < n;) {
        kvc_mutex_lock(&index->lock);
        for (uint32_t end = i + KVS_INDEX_STEP; i < n && i < end; i++) {
            KVC_ASSERT(schema->piece_bytes || parts[i] < schema->n_parts);
            reads[i] = (kvs_read){.block = kvs_block_find(index, schema->id, digests[i])};
            if (reads[i].block != KVS_NIL)
                read_ref(index, parts[i], 0, 0, &reads[i]);
        }
        kvc_mutex_unlock(&index->lock);
    }
}

bool kvs_index_ref_again(kvs_index *index, uint32_t value)
{
    kvc_mutex_lock(&index->lock);
    kvs_value *v = kvs_value_at(index, value);
    KVC_ASSERT(v->refs > 0);
    bool ok = v->refs < UINT16_MAX - 1;
    v->refs = (uint16_t)(v->refs + ok);
    kvc_mutex_unlock(&index->lock);
    return ok;
}

void kvs_index_unref(kvs_index *index, const uint32_t *values, uint32_t n)
{
    for (uint32_t i = 0; i < n;) {
        kvc_mutex_lock(&index->lock);
        for (uint32_t end = i + KVS_INDEX_STEP; i < n && i < end; i++)
            kvs_value_unref_locked(index, values[i]);
        kvc_mutex_unlock(&index->lock);
    }
}

bool kvs_index_any_doomed(kvs_index *index, const uint32_t *values, uint32_t n)
{
    bool any = false;
    for (uint32_t i = 0; i < n && !any;) {
        kvc_mutex_lock(&index->lock);
        for (uint32_t end = i + KVS_INDEX_STEP; i < n && i < end && !any; i++)
            any = kvs_value_at(index, values[i])->flags & (KVS_DOOMED | KVS_ERASED);
        kvc_mutex_unlock(&index->lock);
    }
    return any;
}

bool kvs_index_doom(kvs_index *index, uint32_t id)
{
    kvc_mutex_lock(&index->lock);
    kvs_value *value = kvs_value_at(index, id);
    KVC_ASSERT(value->refs > 0);
    /* A copy in dram was verified when it was loaded and keeps serving. */
    bool doomed = value->flags & KVS_LMDB && !(value->flags & (KVS_DRAM | KVS_DOOMED));
    if (doomed) {
        kvs_evict_lmdb_remove(index, id);
        kvs_hold_forget_locked(index, id);
        uint32_t kept = KVS_LOADING | KVS_GPU | KVS_RAISING;
        value->flags = (uint16_t)((value->flags & kept) | KVS_LMDB | KVS_DOOMED);
        index->n_visible--;
    }
    kvc_mutex_unlock(&index->lock);
    return doomed;
}

bool kvs_index_loaded(kvs_index *index, uint32_t id, const kvs_slot *slot)
{
    kvc_mutex_lock(&index->lock);
    kvs_value *value = kvs_value_at(index, id);
    KVC_ASSERT(value->flags & KVS_LOADING);
    value->flags &= (uint16_t)~KVS_LOADING;
    bool taken = slot && !(value->flags & (KVS_DRAM | KVS_DOOMED));
    if (taken) {
        value->dram = *slot;
        value->flags |= KVS_DRAM;
        kvs_evict_dram_add(index, id);
    }
    kvs_value_unref_locked(index, id);
    kvc_mutex_unlock(&index->lock);
    return taken;
}

/* ---- match ---------------------------------------------------------------------- */

/* The fastest tier that has it; 0: it is not there. */
static uint8_t value_tier(kvs_index *index, uint32_t block, uint32_t part)
{
    uint32_t id = block == KVS_NIL ? KVS_NIL : kvs_value_find(index, block, part);
    return id == KVS_NIL ? 0 : kvs_value_tier(index, kvs_value_at(index, id));
}

/* A prefix match under way. run [n_parts]: the lengths of the present runs that end here. */
typedef struct match {
    const kvs_schema *schema;
    const uint16_t *parts;
    uint32_t n_parts;
    bool windowed;
    uint32_t *run;
    uint8_t tier; /* of the block judged last */
} match;

/* Judges block i. False: a part without a window is missing, so no longer prefix can match.
 *good_p: i + 1 blocks match. */
static bool match_block(kvs_index *index, match *m, uint32_t block, uint32_t i, bool *good_p)
{
    *good_p = true;
    m->tier = 0;
    for (uint32_t p = 0; p < m->n_parts; p++) {
        uint32_t need = m->windowed ? m->schema->parts[m->parts[p]].window_blocks : 0;
        uint8_t tier = value_tier(index, block, m->parts[p]);
        if (!need && !tier)
            return false;
        m->tier = tier > m->tier ? tier : m->tier;
        m->run[p] = tier ? m->run[p] + 1 : 0;
        if (need && m->run[p] < (need < i + 1 ? need : i + 1))
            *good_p = false;
    }
    if (m->tier == 0) /* nothing of it is needed any more */
        m->tier = KVC_TIER_DRAM;
    return true;
}

kvc_status kvs_index_match(kvs_index *index, const kvs_schema *schema, const uint16_t *parts,
                           uint32_t n_parts, bool windowed, const kvc_digest *digests, uint32_t n,
                           uint64_t deadline_ns, uint8_t *tiers, uint32_t *hits_p)
{
    uint32_t hits = 0, step = n_parts < KVS_INDEX_STEP ? KVS_INDEX_STEP / (n_parts + 1) + 1 : 1;
    bool more = true, late = false;
    match m = {.schema = schema, .parts = parts, .n_parts = n_parts, .windowed = windowed};
    m.run = calloc(n_parts ? n_parts : 1, sizeof(*m.run));
    *hits_p = 0;
    if (!m.run)
        return KVC_NO_MEMORY;
    for (uint32_t i = 0; more && i < n;) {
        late = kvc_expired(deadline_ns);
        if (late)
            break;
        kvc_mutex_lock(&index->lock);
        for (uint32_t end = i + step; more && i < n && i < end; i++) {
            bool good;
            more = match_block(index, &m, kvs_block_find(index, schema->id, &digests[i]), i, &good);
            if (more && good)
                hits = i + 1;
            if (more && tiers)
                tiers[i] = m.tier;
        }
        kvc_mutex_unlock(&index->lock);
    }
    free(m.run);
    if (late)
        return KVC_TIMED_OUT;
    *hits_p = hits;
    return KVC_OK;
}
