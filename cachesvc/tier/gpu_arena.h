/*
 * gpu_arena.h: segments of device memory and the values in them. Private to the gpu tier.
 *
 * A segment belongs to one (tenant, size class) at a time, as in dram. The tier's lock guards every
 * field, and no function here locks; only the tier's writer places values and makes segments, so
 * what kvsi_gpu_arena_make does to an empty segment needs no lock.
 */
#ifndef KVSI_GPU_ARENA_H
#define KVSI_GPU_ARENA_H

#include "dram_segment.h"
#include "kvk/cuda.h"

/* What the host keeps of a value: its shape and the sums of its rows. */
typedef struct kvsi_gpu_record {
    uint32_t row_bytes, n_rows;
    uint32_t sums[]; /* [n_rows] */
} kvsi_gpu_record;

typedef struct kvsi_gpu_segment {
    kvsi_segment slots;        /* base: on the device */
    kvsi_gpu_record **records; /* [slots.n_slots] NULL: none */
    kvc_gpu_handle handle;
    bool shared; /* handle says how to open it */
} kvsi_gpu_segment;

typedef struct kvsi_gpu_arena {
    kvk_cuda *cuda;
    uint8_t device[KVC_GPU_DEVICE_BYTES];
    uint64_t segment_bytes;
    uint32_t n_max, n_created;
    kvsi_gpu_segment **segments; /* [n_max] */
    uint64_t used_bytes, values;
} kvsi_gpu_arena;

/* NO_MEMORY; INVALID: the capacity is less than a page. Takes nothing of the device yet. */
kvc_status kvsi_gpu_arena_init(kvsi_gpu_arena *arena, kvk_cuda *cuda, uint64_t capacity_bytes,
                               uint32_t max_value_bytes) KVC_MUST_CHECK;
void kvsi_gpu_arena_fini(kvsi_gpu_arena *arena); /* frees everything */

static inline uint64_t kvsi_gpu_class_bytes(uint32_t row_bytes, uint32_t n_rows)
{
    return ((uint64_t)row_bytes * n_rows + 4095) / 4096 * 4096;
}

/* A segment of the owner with a free slot, or one that it may take; NULL: there is none yet. */
kvsi_gpu_segment *kvsi_gpu_arena_find(kvsi_gpu_arena *arena, const kvc_digest *tenant,
                                      uint64_t class_bytes);
/* An empty segment that no client may have open, of whatever tenant; NULL: there is none. */
kvsi_gpu_segment *kvsi_gpu_arena_spare(const kvsi_gpu_arena *arena);
/*
 * The writer's, without the lock: new memory, all zero, for a segment more (spare NULL; there is
 * room for one), or in the place of a spare one's. To be adopted with the lock held. AGAIN: no
 * memory; DEVICE and others: the device failed.
 */
kvc_status kvsi_gpu_arena_make(kvsi_gpu_arena *arena, kvk_stream *stream, kvsi_gpu_segment *spare,
                               kvsi_gpu_segment **segment_p) KVC_MUST_CHECK;
void kvsi_gpu_arena_adopt(kvsi_gpu_arena *arena, kvsi_gpu_segment *segment);

/* A slot for a value of the segment's class, with the record that it takes. False: no memory. */
bool kvsi_gpu_arena_place(kvsi_gpu_arena *arena, kvsi_gpu_segment *segment,
                          const kvc_digest *tenant, uint64_t class_bytes, kvsi_gpu_record *record,
                          kvs_slot *slot_p);
/* The segment of a held slot, and the slot's number there; NULL: it is not held. */
kvsi_gpu_segment *kvsi_gpu_arena_at(const kvsi_gpu_arena *arena, kvs_slot slot, uint32_t *number_p);
void kvsi_gpu_arena_release(kvsi_gpu_arena *arena, kvs_slot slot);

#endif
