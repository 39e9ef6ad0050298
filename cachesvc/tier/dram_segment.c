/*
 * dram_segment.c: memfd segments and their slot bitmaps.
 *
 * No thread of its own: the caller holds the dram tier's lock. A segment's length never changes
 * (sealed), its mapping lives as long as it does. The server maps before it seals, since
 * FUTURE_WRITE refuses writable mappings made after it.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/assert.h"
#include "base/lent.h"
#include "base/log.h"
#include "dram_segment.h"

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define POPULATE_BYTES (UINT64_C(256) << 10) /* at least so much at once */

static kvc_status map_sealed(kvsi_segment *segment)
{
    size_t len = (size_t)segment->len_bytes;

    segment->fd = memfd_create("kvasir-dram", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (segment->fd < 0) {
        KVC_LOG_ERROR(TIER, "dram: memfd_create: %s", strerror(errno));
        return KVC_NO_MEMORY;
    }
    if (ftruncate(segment->fd, (off_t)len) != 0) {
        KVC_LOG_ERROR(TIER, "dram: cannot size a segment of %zu bytes: %s", len, strerror(errno));
        goto err_close;
    }
    segment->base = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, segment->fd, 0);
    if (segment->base == MAP_FAILED) {
        KVC_LOG_ERROR(TIER, "dram: cannot map a segment of %zu bytes: %s", len, strerror(errno));
        goto err_close;
    }
    /* Fewer page faults where the system allows huge shmem pages; no matter where it does not. */
    (void)madvise(segment->base, len, MADV_HUGEPAGE);
    if (fcntl(segment->fd, F_ADD_SEALS,
              F_SEAL_FUTURE_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) != 0) {
        KVC_LOG_ERROR(TIER, "dram: cannot seal a segment: %s", strerror(errno));
        goto err_unmap;
    }
    /* Where memory for the note is out, a transport copies what it would else have registered. */
    (void)!kvc_lent_add(segment->base, len);
    return KVC_OK;

err_unmap:
    munmap(segment->base, len);
err_close:
    close(segment->fd);
    return KVC_NO_MEMORY;
}

kvc_status kvsi_segment_create(uint64_t len_bytes, uint32_t number, kvsi_segment **segment_p)
{
    kvsi_segment *segment;

    *segment_p = NULL;
    segment = calloc(1, sizeof(*segment));
    if (segment == NULL)
        return KVC_NO_MEMORY;
    segment->len_bytes = len_bytes;
    segment->number = number;
    kvc_status status = map_sealed(segment);
    if (status != KVC_OK) {
        free(segment);
        return status;
    }
    *segment_p = segment;
    return KVC_OK;
}

void kvsi_segment_destroy(kvsi_segment *segment)
{
    if (segment == NULL)
        return;
    kvc_lent_remove(segment->base);
    munmap(segment->base, (size_t)segment->len_bytes);
    close(segment->fd);
    free(segment);
}

void kvsi_segment_layout(kvsi_segment *segment, uint64_t class_bytes)
{
    uint64_t n = segment->len_bytes / class_bytes;

    KVC_ASSERT(segment->n_used == 0);
    KVC_ASSERT(n >= 1 && n <= KVSI_SEGMENT_MAX_SLOTS);
    segment->class_bytes = class_bytes;
    segment->n_slots = (uint32_t)n;
    segment->generation++;
    memset(segment->summary, 0, sizeof(segment->summary));
    memset(segment->free, 0, sizeof(segment->free));
    memset(segment->committed, 0, sizeof(segment->committed));
    for (uint32_t i = 0; i < n; i++) {
        segment->free[i / 64] |= UINT64_C(1) << (i % 64);
        segment->summary[i / 4096] |= UINT64_C(1) << (i / 64 % 64);
    }
}

uint32_t kvsi_segment_take(kvsi_segment *segment)
{
    uint32_t s = 0;

    KVC_ASSERT(segment->n_used < segment->n_slots);
    while (segment->summary[s] == 0)
        s++;
    uint32_t word = s * 64 + (uint32_t)__builtin_ctzll(segment->summary[s]);
    uint32_t slot = word * 64 + (uint32_t)__builtin_ctzll(segment->free[word]);
    segment->free[word] &= segment->free[word] - 1;
    if (segment->free[word] == 0)
        segment->summary[s] &= segment->summary[s] - 1;
    segment->n_used++;
    return slot;
}

struct iovec kvsi_segment_untouched(kvsi_segment *segment, uint32_t slot)
{
    uint64_t from = segment->touched_bytes;
    uint64_t end = (slot + UINT64_C(1)) * segment->class_bytes;

    if (end <= from)
        return (struct iovec){NULL, 0};
    end = (end + POPULATE_BYTES - 1) / POPULATE_BYTES * POPULATE_BYTES;
    segment->touched_bytes = end < segment->len_bytes ? end : segment->len_bytes;
    return (struct iovec){segment->base + from, (size_t)(segment->touched_bytes - from)};
}

void kvsi_segment_populate(struct iovec pages)
{
    /* A kernel without it (before 5.14) faults the pages in one by one, as they are written. */
    if (pages.iov_len > 0)
        (void)madvise(pages.iov_base, pages.iov_len, MADV_POPULATE_WRITE);
}

bool kvsi_segment_is_used(const kvsi_segment *segment, uint32_t slot)
{
    return slot < segment->n_slots && !(segment->free[slot / 64] >> (slot % 64) & 1);
}

bool kvsi_segment_give(kvsi_segment *segment, uint32_t slot)
{
    uint64_t bit = UINT64_C(1) << (slot % 64);
    bool committed = segment->committed[slot / 64] & bit;

    KVC_ASSERT(kvsi_segment_is_used(segment, slot));
    segment->committed[slot / 64] &= ~bit;
    segment->free[slot / 64] |= bit;
    segment->summary[slot / 4096] |= UINT64_C(1) << (slot / 64 % 64);
    segment->n_used--;
    return committed;
}

bool kvsi_segment_mark(kvsi_segment *segment, uint32_t slot)
{
    uint64_t bit = UINT64_C(1) << (slot % 64);
    bool first = !(segment->committed[slot / 64] & bit);

    KVC_ASSERT(kvsi_segment_is_used(segment, slot));
    segment->committed[slot / 64] |= bit;
    return first;
}
