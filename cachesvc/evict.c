/*
 * evict.c: the order in which values give way; see evict.h.
 *
 * Any thread; list keeping runs with the index lock held. Invariants: a clean value of dram is in
 * the queue that KVS_MAIN names; a victim is invisible (gone) or WRITING until kvs_evict_finish, so
 * nobody can put or write the same value between its leaving the index and its slot's release.
 */
#include "evict.h"

#include <string.h>

#include "base/assert.h"
#include "base/sum.h"

/* ---- the queues of dram ---------------------------------------------------------------------- */

static kvs_queue *queue_of(kvs_class *cls, const kvs_value *value)
{
    return value->flags & KVS_MAIN ? &cls->main : &cls->small;
}

/* At the head of the queue that its flags name. */
static void enter(kvs_index *index, kvs_class *cls, uint32_t id)
{
    kvs_value *value = kvs_value_at(index, id);
    kvs_queue *queue = queue_of(cls, value);
    value->dram_prev = KVS_NIL;
    value->dram_next = queue->head;
    if (queue->head)
        kvs_value_at(index, queue->head)->dram_prev = id;
    else
        queue->tail = id;
    queue->head = id;
    queue->n++;
}

static void leave(kvs_index *index, kvs_class *cls, uint32_t id)
{
    kvs_value *value = kvs_value_at(index, id);
    kvs_queue *queue = queue_of(cls, value);
    if (value->dram_prev)
        kvs_value_at(index, value->dram_prev)->dram_next = value->dram_next;
    else
        queue->head = value->dram_next;
    if (value->dram_next)
        kvs_value_at(index, value->dram_next)->dram_prev = value->dram_prev;
    else
        queue->tail = value->dram_prev;
    value->dram_prev = value->dram_next = KVS_NIL;
    queue->n--;
}

static uint64_t ghost_name(const kvs_index *index, const kvs_value *value)
{
    const kvs_block *block = kvs_block_at(index, value->block);
    struct {
        kvc_digest digest;
        uint32_t schema, part;
    } name = {block->digest, block->schema, value->part};
    return kvc_seeded_sum(&name, sizeof(name), index->seed);
}

void kvs_evict_dram_add(kvs_index *index, uint32_t id)
{
    kvs_value *value = kvs_value_at(index, id);
    kvs_class *cls = kvs_value_class(index, value);
    uint32_t max_age = cls->n_dram < UINT32_MAX ? (uint32_t)cls->n_dram : UINT32_MAX;
    if (kvs_ghost_take(&index->ghosts, ghost_name(index, value), cls->clock, max_age))
        value->flags |= KVS_MAIN;
    enter(index, cls, id);
    cls->n_dram++;
    cls->dram_bytes += kvs_value_part(index, value)->value_bytes;
}

void kvs_evict_dram_remove(kvs_index *index, uint32_t id)
{
    kvs_value *value = kvs_value_at(index, id);
    kvs_class *cls = kvs_value_class(index, value);
    leave(index, cls, id);
    cls->n_dram--;
    cls->dram_bytes -= kvs_value_part(index, value)->value_bytes;
}

void kvs_evict_lmdb_add(kvs_index *index, uint32_t id)
{
    kvs_value *value = kvs_value_at(index, id);
    kvs_class *cls = kvs_value_class(index, value);
    value->lmdb_prev = KVS_NIL;
    value->lmdb_next = cls->lmdb_head;
    if (cls->lmdb_head)
        kvs_value_at(index, cls->lmdb_head)->lmdb_prev = id;
    else
        cls->lmdb_tail = id;
    cls->lmdb_head = id;
    cls->n_lmdb++;
}

void kvs_evict_lmdb_remove(kvs_index *index, uint32_t id)
{
    kvs_value *value = kvs_value_at(index, id);
    kvs_class *cls = kvs_value_class(index, value);
    if (value->lmdb_prev)
        kvs_value_at(index, value->lmdb_prev)->lmdb_next = value->lmdb_next;
    else
        cls->lmdb_head = value->lmdb_next;
    if (value->lmdb_next)
        kvs_value_at(index, value->lmdb_next)->lmdb_prev = value->lmdb_prev;
    else
        cls->lmdb_tail = value->lmdb_prev;
    value->lmdb_prev = value->lmdb_next = KVS_NIL;
    cls->n_lmdb--;
}

static void victim_fill(kvs_index *index, uint32_t id, kvs_slot slot, kvs_victim *victim_p)
{
    const kvs_value *value = kvs_value_at(index, id);
    victim_p->value = id;
    victim_p->slot = slot;
    victim_p->value_bytes = kvs_value_part(index, value)->value_bytes;
    kvs_key_locked(index, id, &victim_p->key);
}

/* The value loses one tier. Where it was the last, it stays claimed until finish. */
static void victim_leave(kvs_index *index, kvs_value *value, uint16_t tier_flags,
                         kvs_victim *victim_p)
{
    value->flags &= (uint16_t)~tier_flags;
    victim_p->gone = !(value->flags & (KVS_DRAM | KVS_LMDB));
    victim_p->from_lmdb = tier_flags & KVS_LMDB;
    if (victim_p->gone) {
        kvs_gpu_forget_locked(index, victim_p->value);
        value->flags = KVS_FILLING | KVS_LEAVING;
        index->n_visible--;
    }
}

/* Which queue gives way next; NULL: neither, since skipped [2] of them, in a row, may not. */
static kvs_queue *whose_turn(kvs_class *cls, const uint32_t skipped[2])
{
    bool on_trial = cls->small.n > skipped[0] && skipped[0] < KVS_EVICT_SKIPPED;
    bool proven = cls->main.n > skipped[1] && skipped[1] < KVS_EVICT_SKIPPED;
    if (on_trial && (!proven || cls->small.n * KVS_EVICT_SMALL >= cls->n_dram))
        return &cls->small;
    return proven ? &cls->main : NULL;
}

bool kvs_evict_may_locked(const kvs_index *index, const kvs_value *value, bool safe)
{
    return !value->refs && (value->flags & KVS_LMDB || !(safe || value->flags & KVS_HELD ||
                                                         kvs_opaque_coming_locked(index, value)));
}

void kvs_evict_take_locked(kvs_index *index, uint32_t id, kvs_victim *victim_p)
{
    kvs_value *value = kvs_value_at(index, id);
    kvs_class *cls = kvs_value_class(index, value);
    if (!(value->flags & KVS_MAIN))
        kvs_ghost_note(&index->ghosts, ghost_name(index, value), cls->clock++, cls->n_dram);
    kvs_evict_dram_remove(index, id);
    victim_fill(index, id, value->dram, victim_p);
    victim_leave(index, value, KVS_DRAM | KVS_MAIN | KVS_READS, victim_p);
}

/* safe: only what is in lmdb too; but: nothing of that segment, unless NULL. *steps_p: how many
   values may still be looked at. What may not go counts as new, so that the next call meets others.
 */
static bool dram_from(kvs_index *index, kvs_class *cls, bool safe, const kvs_segment *but,
                      uint32_t *steps_p, kvs_victim *victim_p)
{
    uint32_t skipped[2] = {0, 0}, spared = 0;
    for (; *steps_p > 0; (*steps_p)--) {
        kvs_queue *queue = whose_turn(cls, skipped);
        if (!queue && spared > 0 && spared < KVS_EVICT_SPARED) {
            spared = KVS_EVICT_SPARED; /* only what was read is left: once more, without mercy */
            skipped[0] = skipped[1] = 0;
            queue = whose_turn(cls, skipped);
        }
        if (!queue)
            return false;
        uint32_t id = queue->tail;
        kvs_value *value = kvs_value_at(index, id);
        bool may =
            kvs_evict_may_locked(index, value, safe) && !(but && kvs_evict_in_segment(value, but));
        if (may && (!(value->flags & KVS_READS) || spared >= KVS_EVICT_SPARED)) {
            kvs_evict_take_locked(index, id, victim_p);
            return true;
        }
        leave(index, cls, id);
        if (!may) {
            skipped[queue == &cls->main]++;
        } else {
            spared++;
            value->flags = (uint16_t)(queue == &cls->main ? value->flags - KVS_READ
                                                          : (value->flags & ~KVS_READS) | KVS_MAIN);
        }
        enter(index, cls, id);
    }
    return false;
}

/* A value in use goes to the young end, so that the next call does not meet it again. *steps_p: how
   many values may still be looked at. */
static bool lmdb_from(kvs_index *index, kvs_class *cls, uint32_t *steps_p, kvs_victim *victim_p)
{
    for (uint64_t left = cls->n_lmdb; left > 0 && *steps_p > 0; left--, (*steps_p)--) {
        uint32_t id = cls->lmdb_tail;
        kvs_value *value = kvs_value_at(index, id);
        if (value->refs || value->flags & (KVS_WRITING | KVS_LOADING | KVS_HELD)) {
            kvs_evict_lmdb_remove(index, id);
            kvs_evict_lmdb_add(index, id);
            continue;
        }
        kvs_evict_lmdb_remove(index, id);
        victim_fill(index, id, value->lmdb, victim_p);
        victim_leave(index, value, KVS_LMDB | KVS_SYNCED, victim_p);
        if (!victim_p->gone) {
            kvs_evict_dram_remove(index, id);
            value->flags |= KVS_WRITING;
        }
        return true;
    }
    return false;
}

/* The class with most bytes in dram, and what all have together. */
uint32_t kvs_evict_largest_locked(const kvs_index *index, uint64_t *total_p)
{
    uint32_t best = 0;
    *total_p = 0;
    for (uint32_t i = 0; i < index->n_classes; i++) {
        *total_p += index->classes[i].dram_bytes;
        if (index->classes[i].dram_bytes > index->classes[best].dram_bytes)
            best = i;
    }
    return best;
}

/* A class that came when another had filled dram would turn over its one segment for ever. */
bool kvs_evict_starved(kvs_index *index, uint32_t cls)
{
    uint64_t total;
    kvc_mutex_lock(&index->lock);
    uint32_t largest = kvs_evict_largest_locked(index, &total);
    bool starved = index->classes[cls].dram_bytes < total / KVS_EVICT_STARVED &&
                   index->classes[largest].dram_bytes > total / 2;
    kvc_mutex_unlock(&index->lock);
    return starved;
}

/* Tries the class with most bytes in dram first, then every other. */
static bool dram_from_any(kvs_index *index, uint32_t *steps_p, kvs_victim *victim_p)
{
    uint64_t total;
    uint32_t best = kvs_evict_largest_locked(index, &total);
    if (dram_from(index, &index->classes[best], false, NULL, steps_p, victim_p))
        return true;
    for (uint32_t i = 0; i < index->n_classes; i++)
        if (i != best && dram_from(index, &index->classes[i], false, NULL, steps_p, victim_p))
            return true;
    return false;
}

uint32_t kvs_evict_dram_each(kvs_index *index, uint32_t cls, kvs_victim *victims, uint32_t max)
{
    uint32_t n = 0, steps = KVS_EVICT_SCAN;
    kvc_mutex_lock(&index->lock);
    while (n < max && (cls == KVS_ANY_CLASS ? dram_from_any(index, &steps, &victims[n])
                                            : dram_from(index, &index->classes[cls], false, NULL,
                                                        &steps, &victims[n])))
        n++;
    kvc_mutex_unlock(&index->lock);
    return n;
}

bool kvs_evict_dram_beside(kvs_index *index, uint32_t cls, const kvs_segment *segment,
                           kvs_victim *victim_p)
{
    uint32_t steps = KVS_EVICT_SCAN;
    kvc_mutex_lock(&index->lock);
    bool found = dram_from(index, &index->classes[cls], false, segment, &steps, victim_p);
    kvc_mutex_unlock(&index->lock);
    return found;
}

bool kvs_evict_dram_copy(kvs_index *index, uint32_t cls, kvs_victim *victim_p)
{
    uint32_t steps = KVS_EVICT_SCAN;
    kvc_mutex_lock(&index->lock);
    bool found = dram_from(index, &index->classes[cls], true, NULL, &steps, victim_p);
    kvc_mutex_unlock(&index->lock);
    return found;
}

bool kvs_evict_lmdb(kvs_index *index, uint32_t cls, kvs_victim *victim_p)
{
    uint32_t steps = KVS_EVICT_SCAN;
    kvc_mutex_lock(&index->lock);
    bool found = lmdb_from(index, &index->classes[cls], &steps, victim_p);
    uint32_t pages = index->classes[cls].record_pages;
    for (uint32_t i = 0; !found && pages && i < index->n_classes; i++)
        found = index->classes[i].record_pages == pages &&
                lmdb_from(index, &index->classes[i], &steps, victim_p);
    kvc_mutex_unlock(&index->lock);
    return found;
}

bool kvs_evict_lmdb_pages(kvs_index *index, uint32_t pages, kvs_victim *victim_p)
{
    uint32_t steps = KVS_EVICT_SCAN;
    bool found = false;
    kvc_mutex_lock(&index->lock);
    for (uint32_t i = 0; !found && i < index->n_classes; i++)
        found = index->classes[i].record_pages == pages &&
                lmdb_from(index, &index->classes[i], &steps, victim_p);
    kvc_mutex_unlock(&index->lock);
    return found;
}

bool kvs_evict_dead(kvs_index *index, kvs_victim *victim_p)
{
    kvc_mutex_lock(&index->lock);
    uint32_t id = index->dead_head;
    if (id != KVS_NIL) {
        kvs_value *value = kvs_value_at(index, id);
        bool in_dram = value->flags & KVS_DRAM, in_lmdb = value->flags & KVS_LMDB;
        victim_fill(index, id, in_dram ? value->dram : value->lmdb, victim_p);
        victim_p->gone = !(in_dram && in_lmdb);
        victim_p->from_lmdb = !in_dram;
        value->flags &= (uint16_t) ~(KVS_DRAM | KVS_MAIN); /* its other copy waits at the head */
        if (victim_p->gone) {
            index->dead_head = value->chain;
            value->chain = KVS_NIL;
            value->flags = KVS_FILLING | KVS_LEAVING;
        }
    }
    kvc_mutex_unlock(&index->lock);
    return id != KVS_NIL;
}

/* The caller holds the lock. A victim that stays in lmdb is no longer ours: only its dram slot was.
 */
static void finish_one(kvs_index *index, const kvs_victim *victim)
{
    kvs_value *value = kvs_value_at(index, victim->value);
    if (victim->gone) {
        KVC_ASSERT((value->flags & ~KVS_ERASED) == (KVS_FILLING | KVS_LEAVING));
        kvs_value_free_locked(index, victim->value);
    } else if (victim->from_lmdb) {
        KVC_ASSERT(value->flags & KVS_WRITING);
        value->flags &= (uint16_t)~KVS_WRITING;
        kvs_evict_dram_add(index, victim->value);
        kvs_index_erased_locked(index, victim->value);
    }
}

void kvs_evict_finish_each(kvs_index *index, const kvs_victim *victims, uint32_t n)
{
    kvc_mutex_lock(&index->lock);
    for (uint32_t i = 0; i < n; i++)
        finish_one(index, &victims[i]);
    kvc_mutex_unlock(&index->lock);
}
