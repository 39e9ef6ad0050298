/*
 * evict_segment.c: a whole segment of dram gives way, since a class can only have room that another
 * class left altogether; held values of it move to others of their class. See evict.h.
 *
 * Any thread. Invariants: no value is taken from a segment in which another could not follow, as
 * far as one look can tell; the lock is left after every STEP values, so nobody waits long for it.
 * Ids stay in their place, so a walk over them needs no more than the next one.
 */
#include <stdlib.h>

#include "evict.h"

#define STEP 1024u

#define BUSY (KVS_FILLING | KVS_WRITING | KVS_LOADING | KVS_DOOMED)

/* What one walk found out about a segment. */
typedef struct tally {
    uint32_t n, reads; /* values that may give way, and how often they were read */
    uint32_t n_held;   /* that may move */
    uint32_t cls, generation;
} tally;

static bool may_go(const kvs_index *index, const kvs_value *value)
{
    return value->flags & KVS_DRAM && !(value->flags & BUSY) &&
           kvs_evict_may_locked(index, value, false);
}

static bool may_move(const kvs_value *value)
{
    return (value->flags & (KVS_DRAM | KVS_HELD | BUSY)) == (KVS_DRAM | KVS_HELD) && !value->refs;
}

/* Of two lives of one segment, met in one walk, the later counts. */
static void count_one(kvs_index *index, const kvs_value *value, bool goes, tally *t)
{
    uint32_t generation = kvs_slot_generation(value->dram);
    if (t->n + t->n_held > 0 && (int32_t)(generation - t->generation) < 0)
        return;
    if (t->generation != generation)
        *t = (tally){.generation = generation};
    t->n += goes;
    t->n_held += !goes;
    t->reads += goes ? (value->flags & KVS_READS) / KVS_READ : 0;
    t->cls = kvs_value_part(index, value)->cls;
}

static void count(kvs_index *index, tally *tallies, uint32_t n)
{
    uint32_t id = 1, end;
    do {
        kvc_mutex_lock(&index->lock);
        end = index->values.next - id < STEP ? index->values.next : id + STEP;
        for (; id < end; id++) {
            const kvs_value *value = kvs_value_at(index, id);
            bool goes = may_go(index, value);
            if ((goes || may_move(value)) && value->dram.a < n)
                count_one(index, value, goes, &tallies[value->dram.a]);
        }
        end = index->values.next;
        kvc_mutex_unlock(&index->lock);
    } while (id < end);
}

/* How many values in the other segments of its class would give way for what is held in one;
   UINT64_MAX: all of them would not do. */
static uint64_t wanted_elsewhere(const kvs_index *index, const tally *tallies, const uint32_t *used,
                                 uint32_t n, uint32_t segment)
{
    const tally *from = &tallies[segment];
    uint64_t slots = kvs_class_slots(index, &index->classes[from->cls]), n_free = 0, n_values = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (i == segment || tallies[i].cls != from->cls || tallies[i].n + tallies[i].n_held == 0)
            continue;
        n_values += tallies[i].n;
        n_free += slots > used[i] ? slots - used[i] : 0;
    }
    uint64_t wanted = from->n_held > n_free ? from->n_held - n_free : 0;
    return wanted <= n_values ? wanted : UINT64_MAX;
}

bool kvs_evict_find_segment(kvs_index *index, uint32_t cls, const uint32_t *used, uint32_t n,
                            kvs_segment *segment_p)
{
    uint64_t total, best = UINT64_MAX;
    tally *tallies = calloc(n ? n : 1, sizeof(*tallies));
    if (!tallies)
        return false;
    count(index, tallies, n);
    kvc_mutex_lock(&index->lock);
    uint32_t largest = kvs_evict_largest_locked(index, &total);
    kvc_mutex_unlock(&index->lock);
    for (uint32_t i = 0; i < n; i++) {
        const tally *t = &tallies[i];
        uint64_t cost = (t->cls == largest ? 0 : 1ull << 40) + t->n + t->reads;
        cost += (uint64_t)t->n_held << 44;
        if (t->n + t->n_held == 0 || t->n + t->n_held != used[i] || t->cls == cls || cost >= best)
            continue;
        uint64_t wanted = t->n_held ? wanted_elsewhere(index, tallies, used, n, i) : 0;
        cost += wanted != UINT64_MAX ? 2 * wanted : 0; /* they go first, perhaps in vain */
        if (wanted == UINT64_MAX || cost >= best)
            continue;
        best = cost;
        *segment_p = (kvs_segment){i, t->generation};
    }
    free(tallies);
    return best != UINT64_MAX;
}

/* What a walk looks for: values that may give way, or that may move, of a segment (cls
   KVS_ANY_CLASS), or of a class in all segments but that one. */
typedef struct search {
    const kvs_segment *segment;
    uint32_t cls;
    bool held;
} search;

static bool fits(const kvs_index *index, const search *s, const kvs_value *value)
{
    if (!(s->held ? may_move(value) : may_go(index, value)))
        return false;
    bool inside = kvs_evict_in_segment(value, s->segment);
    return s->cls == KVS_ANY_CLASS ? inside
                                   : !inside && kvs_value_part(index, value)->cls == s->cls;
}

/* The next value after *cursor_p, taken as a victim or referred to as a move. */
static bool walk(kvs_index *index, const search *s, uint32_t *cursor_p, kvs_victim *victim_p,
                 kvs_move *move_p)
{
    bool found = false;
    uint32_t id = *cursor_p + 1, end;
    do {
        kvc_mutex_lock(&index->lock);
        end = index->values.next - id < STEP ? index->values.next : id + STEP;
        for (; id < end && !found; id++) {
            kvs_value *value = kvs_value_at(index, id);
            found = fits(index, s, value);
            if (found && victim_p)
                kvs_evict_take_locked(index, id, victim_p);
            if (!found || !move_p)
                continue;
            value->refs++;
            *move_p = (kvs_move){.value = id, .part = value->part, .from = value->dram};
            move_p->schema = index->schemas[kvs_block_at(index, value->block)->schema];
            kvs_key_locked(index, id, &move_p->key);
        }
        end = index->values.next;
        kvc_mutex_unlock(&index->lock);
    } while (!found && id < end);
    *cursor_p = id - 1;
    return found;
}

uint32_t kvs_evict_count_segment(kvs_index *index, const kvs_segment *segment)
{
    const search s = {.segment = segment, .cls = KVS_ANY_CLASS};
    uint32_t n = 0, id = 1, end;
    do {
        kvc_mutex_lock(&index->lock);
        end = index->values.next - id < STEP ? index->values.next : id + STEP;
        for (; id < end; id++)
            n += fits(index, &s, kvs_value_at(index, id));
        end = index->values.next;
        kvc_mutex_unlock(&index->lock);
    } while (id < end);
    return n;
}

bool kvs_evict_from_segment(kvs_index *index, const kvs_segment *segment, uint32_t *cursor_p,
                            kvs_victim *victim_p)
{
    const search s = {.segment = segment, .cls = KVS_ANY_CLASS};
    return walk(index, &s, cursor_p, victim_p, NULL);
}

bool kvs_evict_beside_segment(kvs_index *index, uint32_t cls, const kvs_segment *segment,
                              uint32_t *cursor_p, kvs_victim *victim_p)
{
    const search s = {.segment = segment, .cls = cls};
    return walk(index, &s, cursor_p, victim_p, NULL);
}

bool kvs_evict_next_held(kvs_index *index, const kvs_segment *segment, uint32_t *cursor_p,
                         kvs_move *move_p)
{
    const search s = {.segment = segment, .cls = KVS_ANY_CLASS, .held = true};
    return walk(index, &s, cursor_p, NULL, move_p);
}

bool kvs_evict_moved(kvs_index *index, const kvs_move *move, const kvs_slot *to)
{
    kvc_mutex_lock(&index->lock);
    kvs_value *value = kvs_value_at(index, move->value);
    bool moved = to && value->refs == 1 && value->flags & KVS_DRAM && !(value->flags & BUSY);
    if (moved)
        value->dram = *to;
    kvs_value_unref_locked(index, move->value);
    kvc_mutex_unlock(&index->lock);
    return moved;
}
