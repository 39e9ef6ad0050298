/*
 * evict.h: what gives way.
 *
 * dram: S3-FIFO (Yang et al., SOSP 2023), tuned by tests/bench/evict_bench. Clean values (safe in
 * lmdb, or allowed to be dropped) of a class come to its small queue, on trial. There the oldest
 * gives way, or moves to the main queue if it was read meanwhile. Whoever comes back soon after it
 * gave way goes to the main queue at once. In the main queue the oldest gives way too, but each
 * read, up to three, sends it to the young end once instead. lmdb: oldest first. What is being read
 * gives way nowhere and counts as new when its turn comes. A call looks at no more than
 * KVS_EVICT_SCAN values.
 * A victim has left the index when it is handed out; the caller releases its slot, then finishes.
 */
#ifndef KVS_EVICT_H
#define KVS_EVICT_H

#include "index.h"

#define KVS_ANY_CLASS     UINT32_MAX
#define KVS_EVICT_STARVED 16u   /* below this share of what dram holds, others give way first */
#define KVS_EVICT_SCAN    1024u /* values that one call looks at; those in use go to the head */
#define KVS_EVICT_SKIPPED 256u  /* of one queue, that may not go, before the other has its turn */
#define KVS_EVICT_SPARED  64u   /* values that one call spares because they were read */
#define KVS_EVICT_SMALL   4u    /* the small queue has one of so many of its class's values */

typedef struct kvs_victim {
    uint32_t value;
    bool gone;      /* it was in no other tier: the value is lost */
    bool from_lmdb; /* and stays in dram if it is not gone */
    kvs_slot slot;
    kvs_value_key key;
    uint32_t value_bytes;
} kvs_victim;

/* Up to max victims; returns how many. cls KVS_ANY_CLASS: of the class with most bytes first. 0:
   nothing there can give way, or nothing of what one call looks at; the next looks at others. */
uint32_t kvs_evict_dram_each(kvs_index *index, uint32_t cls, kvs_victim *victims, uint32_t max);
static inline bool kvs_evict_dram(kvs_index *index, uint32_t cls, kvs_victim *victim_p)
{
    return kvs_evict_dram_each(index, cls, victim_p, 1) == 1;
}
/* Whether the class has less than 1/KVS_EVICT_STARVED of what dram holds while one has over half.
 */
bool kvs_evict_starved(kvs_index *index, uint32_t cls);
/* A value of the class that lmdb holds too: nothing is lost. */
bool kvs_evict_dram_copy(kvs_index *index, uint32_t cls, kvs_victim *victim_p);
/* From the class, else from others, of any tenant, that share its lmdb environment. False also
   where the first KVS_EVICT_SCAN values were all in use; the next call looks at others. */
bool kvs_evict_lmdb(kvs_index *index, uint32_t cls, kvs_victim *victim_p);
/* From any class whose values take so many pages of lmdb. */
bool kvs_evict_lmdb_pages(kvs_index *index, uint32_t pages, kvs_victim *victim_p);
/* After the slots of victims [n] were released. */
void kvs_evict_finish_each(kvs_index *index, const kvs_victim *victims, uint32_t n);
static inline void kvs_evict_finish(kvs_index *index, const kvs_victim *victim)
{
    kvs_evict_finish_each(index, victim, 1);
}
/* One copy of a doomed value that nobody reads any more: release its slot, then finish. */
bool kvs_evict_dead(kvs_index *index, kvs_victim *victim_p);

/* ---- evict_segment.c: a whole segment of dram, for another class; each looks at every value, some
        at a time: milliseconds a million ---- */

/* From when it was empty until it is empty again; what comes into it afterwards is in another. */
typedef struct kvs_segment {
    uint32_t number, generation;
} kvs_segment;

/*
 * The segment (of n; used: slots taken of each) in which every slot has a value that may give way,
 * or a held one that can go to its class's other segments: of the class with most bytes if it has
 * one, else of any but cls; the fewest to move, then the fewest and least read first. False: there
 * is none.
 */
bool kvs_evict_find_segment(kvs_index *index, uint32_t cls, const uint32_t *used, uint32_t n,
                            kvs_segment *segment_p);
/* How many values of the segment may give way now. */
uint32_t kvs_evict_count_segment(kvs_index *index, const kvs_segment *segment);
/* The segment's next value that may give way; *cursor_p: 0 at first. False: no more. */
bool kvs_evict_from_segment(kvs_index *index, const kvs_segment *segment, uint32_t *cursor_p,
                            kvs_victim *victim_p);
/* The next value of the class, in the other segments, as above. */
bool kvs_evict_beside_segment(kvs_index *index, uint32_t cls, const kvs_segment *segment,
                              uint32_t *cursor_p, kvs_victim *victim_p);
/* As kvs_evict_dram, but none of the segment's; looks at KVS_EVICT_SCAN values (evict.c). */
bool kvs_evict_dram_beside(kvs_index *index, uint32_t cls, const kvs_segment *segment,
                           kvs_victim *victim_p);

/* A held value on its way to another segment; referenced. */
typedef struct kvs_move {
    uint32_t value, part;
    const kvs_schema *schema;
    kvs_slot from;
    kvs_value_key key;
} kvs_move;

/* The segment's next held value that nobody uses, as above. */
bool kvs_evict_next_held(kvs_index *index, const kvs_segment *segment, uint32_t *cursor_p,
                         kvs_move *move_p);
/* Its bytes are at `to` as well (NULL: they are not). True: it is there from now on, and `from` is
   the caller's to release. False: somebody came meanwhile, and it stays. Drops the reference. */
bool kvs_evict_moved(kvs_index *index, const kvs_move *move, const kvs_slot *to);

/* ---- with the index lock held ---------------------------------------------------------------- */
static inline bool kvs_evict_in_segment(const kvs_value *value, const kvs_segment *segment)
{
    return value->dram.a == segment->number &&
           kvs_slot_generation(value->dram) == segment->generation;
}
uint32_t kvs_evict_largest_locked(const kvs_index *index, uint64_t *total_p);
/* Of a value in a dram queue; safe: only if lmdb has it. */
bool kvs_evict_may_locked(const kvs_index *index, const kvs_value *value, bool safe);
void kvs_evict_take_locked(kvs_index *index, uint32_t id, kvs_victim *victim_p);

/* ---- list keeping, with the index lock held -------------------------------------------------- */
void kvs_evict_dram_add(kvs_index *index, uint32_t id);
void kvs_evict_dram_remove(kvs_index *index, uint32_t id);
void kvs_evict_lmdb_add(kvs_index *index, uint32_t id);
void kvs_evict_lmdb_remove(kvs_index *index, uint32_t id);

#endif
