/*
 * dram_segment.h: one memfd segment of the dram tier and the bitmap of its slots. Private to the
 * tier; the tier's lock guards every field, no function here locks.
 */
#ifndef KVSI_DRAM_SEGMENT_H
#define KVSI_DRAM_SEGMENT_H

#include "tier.h"

#define KVSI_SEGMENT_MAX_SLOTS 16384u /* 64 MiB / 4 KiB */
#define KVSI_SEGMENT_WORDS     (KVSI_SEGMENT_MAX_SLOTS / 64u)

typedef struct kvsi_owner kvsi_owner;

typedef struct kvsi_segment {
    struct kvsi_segment *prev, *next; /* in its owner's list of segments with room, or the tier's
                                         list of empty ones */
    kvsi_owner *owner;                /* NULL: empty */
    kvc_digest tenant;                /* whose bytes are in it */
    int fd;
    uint8_t *base;
    uint64_t len_bytes, class_bytes;
    uint64_t touched_bytes; /* from the start on: its pages are there */
    uint32_t number, generation, n_slots, n_used;
    uint32_t n_mappings; /* of other processes; see kvs_dram_count_mapping */
    bool closed;         /* in no list until it is empty or opened again: somebody empties it */
    uint64_t summary[KVSI_SEGMENT_WORDS / 64]; /* bit w: free[w] is not zero */
    uint64_t free[KVSI_SEGMENT_WORDS];         /* bit set: slot is free */
    uint64_t committed[KVSI_SEGMENT_WORDS];
} kvsi_segment;

/* A sealed memfd of len_bytes, mapped read-write. NO_MEMORY when the system gives none. */
kvc_status kvsi_segment_create(uint64_t len_bytes, uint32_t number,
                               kvsi_segment **segment_p) KVC_MUST_CHECK;
void kvsi_segment_destroy(kvsi_segment *segment); /* unmaps and closes; NULL is fine */

/* Cuts an empty segment into slots of class_bytes; all are free after. */
void kvsi_segment_layout(kvsi_segment *segment, uint64_t class_bytes);
/* Takes a free slot; the segment has one. O(1). */
uint32_t kvsi_segment_take(kvsi_segment *segment);
/*
 * The pages up to the end of a slot that nobody has touched yet (length 0: none); from now on they
 * count as touched. To be populated once the lock is left, while the slot is held: a page fault
 * for every 4 KiB costs more than the copy that follows.
 */
struct iovec kvsi_segment_untouched(kvsi_segment *segment, uint32_t slot);
void kvsi_segment_populate(struct iovec pages); /* no lock needed */
/* Gives a used slot back. True if it had been committed. */
bool kvsi_segment_give(kvsi_segment *segment, uint32_t slot);
bool kvsi_segment_is_used(const kvsi_segment *segment, uint32_t slot);
/* Marks a used slot; false if it was marked already. */
bool kvsi_segment_mark(kvsi_segment *segment, uint32_t slot);

#endif
