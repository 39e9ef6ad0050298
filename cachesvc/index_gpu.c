/*
 * index_gpu.c: copies of values in a GPU's memory, and the order in which they give way; index.h.
 *
 * Any thread; only the gpu thread (gpu.c) makes and evicts copies. A copy has an entry beside the
 * value's record, which the record's chain names while KVS_GPU is set. Invariants: a value with
 * KVS_GPU is in dram or lmdb too, so nothing is lost with the copy; its slot stays while the value
 * is referenced; an entry whose value went is an orphan until its slot is released.
 *
 * What comes here was read often in dram, which is the trial. The queue of a class is the main one
 * of S3-FIFO (evict.h): the oldest gives way, but each read, up to three, spares it once.
 */
#include "index.h"

#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "evict.h"

#define STEP      1024u
#define MOST_USES 3u
#define HOT_READS (2 * KVS_READ)

static kvs_gpu_entry *entry_at(const kvs_index *index, uint32_t entry)
{
    return kvs_slab_at(&index->gpu, entry);
}

/* ---- the queue of a class -------------------------------------------------------------------- */

static void enter(kvs_index *index, uint32_t id)
{
    kvs_gpu_entry *entry = entry_at(index, id);
    kvs_queue *queue = &index->classes[entry->cls].gpu;
    entry->prev = KVS_NIL;
    entry->next = queue->head;
    if (queue->head)
        entry_at(index, queue->head)->prev = id;
    else
        queue->tail = id;
    queue->head = id;
    queue->n++;
}

static void leave(kvs_index *index, uint32_t id)
{
    kvs_gpu_entry *entry = entry_at(index, id);
    kvs_queue *queue = &index->classes[entry->cls].gpu;
    if (entry->prev)
        entry_at(index, entry->prev)->next = entry->next;
    else
        queue->head = entry->next;
    if (entry->next)
        entry_at(index, entry->next)->prev = entry->prev;
    else
        queue->tail = entry->prev;
    entry->prev = entry->next = KVS_NIL;
    queue->n--;
}

/* The value and its entry know each other no more. */
static void part_from(kvs_index *index, uint32_t id)
{
    kvs_value *value = kvs_value_at(index, entry_at(index, id)->value);
    KVC_ASSERT(value->flags & KVS_GPU && value->chain == id);
    value->flags &= (uint16_t)~KVS_GPU;
    value->chain = KVS_NIL;
    entry_at(index, id)->value = KVS_NIL;
    leave(index, id);
}

/* ---- with the index lock held ---------------------------------------------------------------- */

void kvs_gpu_forget_locked(kvs_index *index, uint32_t id)
{
    kvs_value *value = kvs_value_at(index, id);
    if (!(value->flags & KVS_GPU))
        return;
    uint32_t entry = value->chain;
    part_from(index, entry);
    entry_at(index, entry)->next = index->gpu_orphans;
    index->gpu_orphans = entry;
}

bool kvs_gpu_used_locked(kvs_index *index, const kvs_value *value, kvs_slot *slot_p)
{
    if (!index->gpu_on || !(value->flags & KVS_GPU))
        return false;
    kvs_gpu_entry *entry = entry_at(index, value->chain);
    if (entry->bad)
        return false;
    if (entry->uses < MOST_USES)
        entry->uses++;
    *slot_p = entry->slot;
    return true;
}

/* Whether a copy of it may be made now; it is referenced once more then. */
static bool begin(const kvs_index *index, kvs_value *value)
{
    if (!index->gpu_on || !(value->flags & KVS_DRAM) || value->refs == UINT16_MAX ||
        value->flags & (KVS_GPU | KVS_RAISING | KVS_DOOMED | KVS_ERASED))
        return false;
    value->flags |= KVS_RAISING;
    value->refs++;
    return true;
}

bool kvs_gpu_hot_locked(const kvs_index *index, kvs_value *value)
{
    return (value->flags & KVS_READS) >= HOT_READS && begin(index, value);
}

/* ---- copies come ----------------------------------------------------------------------------- */

void kvs_gpu_on(kvs_index *index, bool yes)
{
    kvc_mutex_lock(&index->lock);
    index->gpu_on = yes;
    kvc_mutex_unlock(&index->lock);
}

bool kvs_gpu_want(kvs_index *index, uint32_t id, kvs_slot *dram_p)
{
    kvc_mutex_lock(&index->lock);
    kvs_value *value = kvs_value_at(index, id);
    bool mine = begin(index, value);
    *dram_p = value->dram;
    kvc_mutex_unlock(&index->lock);
    return mine;
}

/* An entry for the slot; false: no memory. */
static bool add(kvs_index *index, uint32_t id, kvs_slot slot)
{
    kvs_value *value = kvs_value_at(index, id);
    uint32_t entry = kvs_slab_alloc(&index->gpu);
    if (entry == KVS_NIL)
        return false;
    *entry_at(index, entry) = (kvs_gpu_entry){
        .slot = slot, .value = id, .cls = (uint16_t)kvs_value_part(index, value)->cls};
    value->flags |= KVS_GPU;
    value->chain = entry;
    enter(index, entry);
    return true;
}

bool kvs_gpu_raised(kvs_index *index, uint32_t id, const kvs_slot *slot)
{
    kvc_mutex_lock(&index->lock);
    kvs_value *value = kvs_value_at(index, id);
    KVC_ASSERT(value->flags & KVS_RAISING);
    value->flags &= (uint16_t)~KVS_RAISING;
    bool taken = slot && index->gpu_on && !(value->flags & (KVS_DOOMED | KVS_ERASED)) &&
                 add(index, id, *slot);
    kvs_value_unref_locked(index, id);
    kvc_mutex_unlock(&index->lock);
    return taken;
}

bool kvs_gpu_bad(kvs_index *index, uint32_t id)
{
    kvc_mutex_lock(&index->lock);
    const kvs_value *value = kvs_value_at(index, id);
    kvs_gpu_entry *entry = value->flags & KVS_GPU ? entry_at(index, value->chain) : NULL;
    bool is_new = entry && !entry->bad;
    if (is_new) {
        entry->bad = true;
        entry->uses = 0; /* it gives way in its turn: others may be reading it */
    }
    kvc_mutex_unlock(&index->lock);
    return is_new;
}

/* ---- copies go ------------------------------------------------------------------------------- */

bool kvs_gpu_orphan(kvs_index *index, kvs_slot *slot_p)
{
    kvc_mutex_lock(&index->lock);
    uint32_t entry = index->gpu_orphans;
    if (entry != KVS_NIL) {
        *slot_p = entry_at(index, entry)->slot;
        index->gpu_orphans = entry_at(index, entry)->next;
        entry_at(index, entry)->next = KVS_NIL;
        kvs_slab_free(&index->gpu, entry);
    }
    kvc_mutex_unlock(&index->lock);
    return entry != KVS_NIL;
}

/* The copy leaves the index. A value that dram has not is to be loaded there from it, unless it is
 * known to be damaged. */
static void take(kvs_index *index, uint32_t id, kvs_gpu_victim *victim_p)
{
    kvs_gpu_entry *entry = entry_at(index, id);
    kvs_value *value = kvs_value_at(index, entry->value);
    *victim_p = (kvs_gpu_victim){.value = entry->value, .slot = entry->slot};
    victim_p->demote = !(value->flags & (KVS_DRAM | KVS_LOADING | KVS_DOOMED | KVS_ERASED)) &&
                       index->gpu_on && !entry->bad;
    part_from(index, id);
    kvs_slab_free(&index->gpu, id);
    if (victim_p->demote) {
        value->flags |= KVS_LOADING;
        value->refs++;
    }
}

static bool may_go(const kvs_index *index, const kvs_gpu_entry *entry)
{
    return entry->value != KVS_NIL && kvs_value_at(index, entry->value)->refs == 0;
}

bool kvs_gpu_evict(kvs_index *index, uint32_t cls, kvs_gpu_victim *victim_p)
{
    const kvs_queue *queue = &index->classes[cls].gpu;
    bool found = false;
    kvc_mutex_lock(&index->lock);
    for (uint32_t steps = KVS_EVICT_SCAN; !found && steps > 0 && queue->tail; steps--) {
        uint32_t id = queue->tail;
        kvs_gpu_entry *entry = entry_at(index, id);
        found = may_go(index, entry) && entry->uses == 0;
        if (found) {
            take(index, id, victim_p);
            break;
        }
        entry->uses = (uint8_t)(entry->uses > 0 ? entry->uses - 1 : 0);
        leave(index, id);
        enter(index, id);
    }
    kvc_mutex_unlock(&index->lock);
    return found;
}

static uint64_t class_bytes(const kvs_class *cls)
{
    return cls->gpu.n * cls->value_bytes;
}

/* The class with the most bytes there; total_p: of all. With the lock held. */
static uint32_t largest_class(const kvs_index *index, uint64_t *total_p)
{
    uint32_t largest = 0;
    *total_p = 0;
    for (uint32_t i = 0; i < index->n_classes; i++) {
        *total_p += class_bytes(&index->classes[i]);
        if (class_bytes(&index->classes[i]) > class_bytes(&index->classes[largest]))
            largest = i;
    }
    return largest;
}

bool kvs_gpu_starved(kvs_index *index, uint32_t cls)
{
    uint64_t total;
    kvc_mutex_lock(&index->lock);
    uint32_t largest = largest_class(index, &total);
    bool starved = class_bytes(&index->classes[cls]) < total / KVS_EVICT_STARVED &&
                   class_bytes(&index->classes[largest]) > total / 2;
    kvc_mutex_unlock(&index->lock);
    return starved;
}

/* What one segment has. */
typedef struct tally {
    uint32_t n, uses;
    uint32_t cls;
    bool stays; /* a copy in it is in use */
} tally;

/* Lets visit see every entry that is a value's, some of them at a time, so that nobody waits long
 * for the lock. *cursor_p: 0 at first; false: visit said so, and the next call goes on behind. */
static bool walk(kvs_index *index, uint32_t *cursor_p,
                 bool (*visit)(kvs_index *index, uint32_t id, void *arg), void *arg)
{
    uint32_t id = *cursor_p + 1, end;
    bool more = true;
    do {
        kvc_mutex_lock(&index->lock);
        end = index->gpu.next - id < STEP ? index->gpu.next : id + STEP;
        for (; id < end && more; id++)
            more = entry_at(index, id)->value == KVS_NIL || visit(index, id, arg);
        end = index->gpu.next;
        kvc_mutex_unlock(&index->lock);
    } while (more && id < end);
    *cursor_p = id - 1;
    return more;
}

/* The segments met so far; NULL: no memory for one more. */
typedef struct tallies {
    tally *list;
    uint32_t n;
} tallies;

static bool count(kvs_index *index, uint32_t id, void *arg)
{
    tallies *all = arg;
    const kvs_gpu_entry *entry = entry_at(index, id);
    if (entry->slot.a >= all->n) {
        uint32_t n = 2 * (uint32_t)entry->slot.a + 16;
        tally *more = realloc(all->list, n * sizeof(*more));
        if (!more)
            return false;
        memset(more + all->n, 0, (n - all->n) * sizeof(*more));
        *all = (tallies){more, n};
    }
    tally *t = &all->list[entry->slot.a];
    t->n++;
    t->uses += entry->uses;
    t->cls = entry->cls;
    t->stays = t->stays || !may_go(index, entry);
    return true;
}

bool kvs_gpu_find_segment(kvs_index *index, uint32_t cls, uint32_t *segment_p)
{
    uint64_t best = UINT64_MAX, total;
    uint32_t cursor = 0;
    tallies all = {0};
    (void)walk(index, &cursor, count, &all);
    kvc_mutex_lock(&index->lock);
    uint32_t largest = largest_class(index, &total);
    kvc_mutex_unlock(&index->lock);
    for (uint32_t i = 0; i < all.n; i++) {
        const tally *t = &all.list[i];
        /* As in dram (evict_segment.c): of the largest class, or two small ones would take each
         * other's for ever. */
        uint64_t cost = (t->cls == largest ? 0 : 1ull << 40) + t->n + t->uses;
        if (t->n == 0 || t->stays || t->cls == cls || cost >= best)
            continue;
        best = cost;
        *segment_p = i;
    }
    free(all.list);
    return best != UINT64_MAX;
}

typedef struct emptying {
    uint32_t segment;
    kvs_gpu_victim *victim_p;
} emptying;

static bool take_from(kvs_index *index, uint32_t id, void *arg)
{
    const emptying *e = arg;
    const kvs_gpu_entry *entry = entry_at(index, id);
    if (entry->slot.a != e->segment || !may_go(index, entry))
        return true;
    take(index, id, e->victim_p);
    return false;
}

bool kvs_gpu_evict_from(kvs_index *index, uint32_t segment, uint32_t *cursor_p,
                        kvs_gpu_victim *victim_p)
{
    return !walk(index, cursor_p, take_from, &(emptying){segment, victim_p});
}

uint64_t kvs_gpu_count(kvs_index *index)
{
    uint64_t n = 0;
    kvc_mutex_lock(&index->lock);
    for (uint32_t i = 0; i < index->n_classes; i++)
        n += index->classes[i].gpu.n;
    kvc_mutex_unlock(&index->lock);
    return n;
}
