/*
 * gpu_arena.c: see gpu_arena.h.
 *
 * Invariants: n_created * segment_bytes of the device are taken, never more than n_max of them. A
 * segment that goes to another tenant gets fresh memory, cleared, so nobody finds another's bytes
 * there; the old is given back first, so the cap holds throughout.
 */
#include "gpu_arena.h"

#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/digest.h"

#define MIN_SEGMENTS      16u /* small caps are cut finer, so that size classes share */
#define MAX_SEGMENT_BYTES (64ull << 20)
#define PAGE_BYTES        4096ull
#define PACK(gener, slot) ((uint64_t)(gener) << 32 | (slot))

static uint64_t round_down(uint64_t x, uint64_t to)
{
    return x - x % to;
}

/* A 16th of the cap, 64 MiB at most, but long enough for the largest value; of whole units that
 * other processes can open, where the cap allows. */
static uint64_t choose_segment_bytes(uint64_t capacity, uint64_t max_value)
{
    uint64_t len = capacity / MIN_SEGMENTS;
    max_value = round_down(max_value + PAGE_BYTES - 1, PAGE_BYTES);
    if (len > MAX_SEGMENT_BYTES)
        len = MAX_SEGMENT_BYTES;
    if (len < max_value)
        len = max_value;
    if (len >= KVK_CUDA_SHARE_UNIT)
        len = round_down(len + KVK_CUDA_SHARE_UNIT - 1, KVK_CUDA_SHARE_UNIT);
    if (len > MAX_SEGMENT_BYTES)
        len = MAX_SEGMENT_BYTES;
    return round_down(len < capacity ? len : capacity, PAGE_BYTES);
}

kvc_status kvsi_gpu_arena_init(kvsi_gpu_arena *arena, kvk_cuda *cuda, uint64_t capacity_bytes,
                               uint32_t max_value_bytes)
{
    kvk_cuda_info info;
    if (capacity_bytes < PAGE_BYTES)
        return KVC_INVALID;
    kvk_cuda_describe(cuda, &info);
    memcpy(arena->device, info.uuid, sizeof(arena->device));
    arena->cuda = cuda;
    arena->segment_bytes = choose_segment_bytes(capacity_bytes, max_value_bytes);
    uint64_t n_max = capacity_bytes / arena->segment_bytes;
    arena->n_max = n_max < UINT32_MAX ? (uint32_t)n_max : UINT32_MAX;
    arena->segments = calloc(arena->n_max, sizeof(kvsi_gpu_segment *));
    return arena->segments != NULL ? KVC_OK : KVC_NO_MEMORY;
}

static void free_records(kvsi_gpu_segment *segment)
{
    for (uint32_t i = 0; segment->records != NULL && i < segment->slots.n_slots; i++)
        free(segment->records[i]);
    free(segment->records);
    segment->records = NULL;
}

static void destroy(kvsi_gpu_arena *arena, kvsi_gpu_segment *segment)
{
    if (segment == NULL)
        return;
    free_records(segment);
    kvk_cuda_free(arena->cuda, KVK_CUDA_DEVICE, segment->slots.base);
    free(segment);
}

void kvsi_gpu_arena_fini(kvsi_gpu_arena *arena)
{
    for (uint32_t i = 0; i < arena->n_created; i++)
        destroy(arena, arena->segments[i]);
    free(arena->segments);
    arena->segments = NULL;
}

static bool is_of(const kvsi_gpu_segment *segment, const kvc_digest *tenant)
{
    return kvc_digest_equal(&segment->slots.tenant, tenant);
}

kvsi_gpu_segment *kvsi_gpu_arena_find(kvsi_gpu_arena *arena, const kvc_digest *tenant,
                                      uint64_t class_bytes)
{
    kvsi_gpu_segment *empty = NULL;
    for (uint32_t i = 0; i < arena->n_created; i++) {
        kvsi_gpu_segment *segment = arena->segments[i];
        if (segment->slots.base == NULL || !is_of(segment, tenant))
            continue;
        if (segment->slots.n_used == 0)
            empty = segment;
        else if (segment->slots.class_bytes == class_bytes &&
                 segment->slots.n_used < segment->slots.n_slots)
            return segment;
    }
    return empty;
}

kvsi_gpu_segment *kvsi_gpu_arena_spare(const kvsi_gpu_arena *arena)
{
    for (uint32_t i = 0; i < arena->n_created; i++) {
        kvsi_gpu_segment *segment = arena->segments[i];
        if (segment->slots.n_used == 0 && segment->slots.n_mappings == 0)
            return segment;
    }
    return NULL;
}

/* Memory for a segment that has none. */
static kvc_status fill(kvsi_gpu_arena *arena, kvk_stream *stream, kvsi_gpu_segment *segment)
{
    kvk_cuda_shared shared;
    void *base;
    kvc_status status =
        kvk_cuda_alloc(arena->cuda, KVK_CUDA_DEVICE, (size_t)arena->segment_bytes, &base);
    if (status != KVC_OK)
        return status == KVC_NO_MEMORY ? KVC_AGAIN : status;
    segment->slots.base = base;
    status = kvk_cuda_fill(arena->cuda, base, 0, (size_t)arena->segment_bytes, stream);
    if (status == KVC_OK)
        status = kvk_cuda_stream_sync(arena->cuda, stream);
    if (status == KVC_OK && arena->segment_bytes % KVK_CUDA_SHARE_UNIT == 0 &&
        kvk_cuda_share(arena->cuda, base, &shared) == KVC_OK) {
        memcpy(segment->handle.share, shared.bytes, sizeof(segment->handle.share));
        memcpy(segment->handle.device, arena->device, sizeof(segment->handle.device));
        segment->shared = true;
    }
    return status;
}

kvc_status kvsi_gpu_arena_make(kvsi_gpu_arena *arena, kvk_stream *stream, kvsi_gpu_segment *spare,
                               kvsi_gpu_segment **segment_p)
{
    kvsi_gpu_segment *segment = spare != NULL ? spare : calloc(1, sizeof(*segment));
    *segment_p = NULL;
    if (segment == NULL)
        return KVC_AGAIN;
    if (spare == NULL) {
        segment->slots.fd = -1;
        segment->slots.len_bytes = arena->segment_bytes;
        segment->slots.number = arena->n_created;
    }
    kvk_cuda_free(arena->cuda, KVK_CUDA_DEVICE, segment->slots.base);
    segment->slots.base = NULL;
    segment->shared = false;
    kvc_status status = fill(arena, stream, segment);
    if (status == KVC_OK)
        *segment_p = segment;
    else if (spare == NULL)
        destroy(arena, segment);
    return status;
}

void kvsi_gpu_arena_adopt(kvsi_gpu_arena *arena, kvsi_gpu_segment *segment)
{
    if (segment->slots.number == arena->n_created)
        arena->segments[arena->n_created++] = segment;
}

/* Cuts an empty segment into slots of the class. False: no memory. */
static bool lay_out(kvsi_gpu_segment *segment, const kvc_digest *tenant, uint64_t class_bytes)
{
    uint64_t n = segment->slots.len_bytes / class_bytes;
    kvsi_gpu_record **records = calloc(n, sizeof(*records));
    if (records == NULL)
        return false;
    free_records(segment);
    kvsi_segment_layout(&segment->slots, class_bytes);
    segment->slots.tenant = *tenant;
    segment->records = records;
    return true;
}

bool kvsi_gpu_arena_place(kvsi_gpu_arena *arena, kvsi_gpu_segment *segment,
                          const kvc_digest *tenant, uint64_t class_bytes, kvsi_gpu_record *record,
                          kvs_slot *slot_p)
{
    if (segment->slots.n_used == 0 && !lay_out(segment, tenant, class_bytes))
        return false;
    uint32_t number = kvsi_segment_take(&segment->slots);
    segment->records[number] = record;
    arena->used_bytes += class_bytes;
    arena->values++;
    *slot_p = (kvs_slot){segment->slots.number, PACK(segment->slots.generation, number)};
    return true;
}

kvsi_gpu_segment *kvsi_gpu_arena_at(const kvsi_gpu_arena *arena, kvs_slot slot, uint32_t *number_p)
{
    kvsi_gpu_segment *segment = slot.a < arena->n_created ? arena->segments[slot.a] : NULL;
    *number_p = (uint32_t)slot.b;
    if (segment == NULL || segment->slots.generation != (uint32_t)(slot.b >> 32) ||
        !kvsi_segment_is_used(&segment->slots, *number_p))
        return NULL;
    return segment;
}

void kvsi_gpu_arena_release(kvsi_gpu_arena *arena, kvs_slot slot)
{
    uint32_t number;
    kvsi_gpu_segment *segment = kvsi_gpu_arena_at(arena, slot, &number);
    KVC_ASSERT(segment != NULL);
    (void)kvsi_segment_give(&segment->slots, number);
    free(segment->records[number]);
    segment->records[number] = NULL;
    arena->used_bytes -= segment->slots.class_bytes;
    arena->values--;
}
