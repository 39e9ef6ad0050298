/*
 * tier_dram.h: the dram tier's segments, for a transport that passes them to another process.
 *
 * The arena is a set of memfd segments of one length (64 MiB, less where the cap is small). Each
 * is owned by one (tenant, size class) at a time. A segment's fd carries the seals FUTURE_WRITE,
 * GROW, SHRINK and SEAL, so a peer can only map it PROT_READ. A segment that goes to another
 * tenant gets a fresh memfd: whoever still maps the old one never sees the new tenant's bytes.
 * Slot i of a segment starts at i * class_bytes; rows are dense from there.
 */
#ifndef KVS_TIER_DRAM_H
#define KVS_TIER_DRAM_H

#include "tier.h"

#define KVS_DRAM_SEGMENT_BYTES (64u << 20)
#define KVS_DRAM_PAGE_BYTES    4096u

/* The length of the segments that a tier of so many bytes has, for values up to so many. */
uint64_t kvs_dram_segment_bytes(uint64_t capacity_bytes, uint64_t max_value_bytes);

typedef struct kvs_dram_segment {
    uint32_t number;     /* stable; below the tier's segment count */
    uint32_t generation; /* another value: another fd or another layout */
    int fd;              /* borrowed: dup it to keep it */
    const void *base;    /* the server's own mapping */
    uint64_t len_bytes;
    uint64_t class_bytes; /* slot length; 0 while the segment is empty and unowned */
    kvc_digest tenant;    /* the last owner */
} kvs_dram_segment;

/*
 * Copies up to max descriptions of the segments that exist; *n_p is how many there are. What is
 * said about a segment stays true while one of its slots is held. Any thread, does not block.
 */
void kvs_dram_segments(kvs_tier *tier, kvs_dram_segment *segments, uint32_t max, uint32_t *n_p);

/*
 * One process more (or less) maps the segment: while any does, it goes to no other tenant, since
 * its memory would stay taken beside that of the memfd that replaced it. To be counted in while a
 * slot of it is held. Gives how many do now, and how long it is. Any thread, does not block.
 */
uint32_t kvs_dram_count_mapping(kvs_tier *tier, uint32_t number, bool more, uint64_t *len_bytes_p);

/*
 * Where a held slot lies: its segment's description and the byte offset in it. INVALID: slot is
 * not one of this tier's held slots. Any thread, does not block.
 */
kvc_status kvs_dram_locate(kvs_tier *tier, kvs_slot slot, kvs_dram_segment *segment_p,
                           uint64_t *off_bytes_p) KVC_MUST_CHECK;

#endif
