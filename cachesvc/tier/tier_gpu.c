/*
 * tier_gpu.c: values in the spare memory of a GPU, under one hard cap.
 *
 * A BLOCKING tier: host threads reach device memory through staging buffers. Thread kvs-gpu-w makes
 * segments and copies values to the device, one by one; reads run on their callers' threads, each
 * with a lane (a stream and a pinned buffer) of its own. Row sums stay in host memory, and what is
 * read is held against them. Invariants: no call of CUDA is made under the lock; once the device
 * has failed, every write and read is IO, and releases go on. Nothing here survives the process, so
 * durable means no more than written.
 */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/log.h"
#include "base/sum.h"
#include "base/thread.h"
#include "gpu_arena.h"
#include "tier_registry.h"

#define N_LANES    4u   /* reads at once */
#define MAX_QUEUED 256u /* writes */
#define FEW_RANGES 8u   /* more are cheaper read as the one run of rows around them */

typedef struct lane {
    kvk_stream *stream;
    void *pinned; /* [lane_bytes] */
    bool busy;
} lane;

struct kvs_tier {
    kvc_mutex lock; /* rank TIER; guards all below but the lanes' buffers */
    kvc_cond work, lane_free;
    kvk_cuda *cuda;
    kvsi_gpu_arena arena;
    uint64_t capacity_bytes, lane_bytes;
    uint64_t bytes_read, bytes_written;
    atomic_bool failed;
    bool closing, told_full;
    kvs_tier_write *head, *tail;
    uint32_t n_queued;
    lane lanes[N_LANES], writers;
    kvc_thread writer;
};

/* A status of CUDA's as a tier's; the first failure is the last thing that the device did. */
static kvc_status judge(kvs_tier *tier, kvc_status status)
{
    if (status == KVC_OK || status == KVC_AGAIN)
        return status;
    if (!atomic_exchange(&tier->failed, true))
        KVC_LOG_ERROR(TIER, "gpu: the device failed (%s): the tier is not used until a restart",
                      kvc_status_name(status));
    return KVC_IO;
}

/* ---- write ----------------------------------------------------------------------------------- */

/* Under the lock, left while the device is asked for memory. */
static kvc_status find_segment(kvs_tier *tier, const kvs_tier_write *write, uint64_t class_bytes,
                               kvsi_gpu_segment **segment_p)
{
    kvsi_gpu_arena *arena = &tier->arena;
    *segment_p = kvsi_gpu_arena_find(arena, &write->key.tenant, class_bytes);
    if (*segment_p != NULL)
        return KVC_OK;
    bool grows = arena->n_created < arena->n_max;
    kvsi_gpu_segment *spare = grows ? NULL : kvsi_gpu_arena_spare(arena);
    if (!grows && spare == NULL)
        return KVC_AGAIN;
    kvc_mutex_unlock(&tier->lock);
    kvc_status status =
        judge(tier, kvsi_gpu_arena_make(arena, tier->writers.stream, spare, segment_p));
    if (status == KVC_AGAIN && grows && !tier->told_full) {
        tier->told_full = true;
        KVC_LOG_WARN(TIER, "gpu: the device has no memory for more than %u of %u segments",
                     arena->n_created, arena->n_max);
    }
    kvc_mutex_lock(&tier->lock);
    if (status == KVC_OK)
        kvsi_gpu_arena_adopt(arena, *segment_p);
    return status;
}

static kvc_status reserve(kvs_tier *tier, kvs_tier_write *write, uint8_t **at_p)
{
    uint64_t class_bytes = kvsi_gpu_class_bytes(write->row_bytes, write->n_rows);
    size_t sums_bytes = write->n_rows * sizeof(uint32_t);
    kvsi_gpu_record *record = malloc(sizeof(*record) + sums_bytes);
    kvsi_gpu_segment *segment;
    if (record == NULL)
        return KVC_AGAIN;
    record->row_bytes = write->row_bytes;
    record->n_rows = write->n_rows;
    memcpy(record->sums, write->row_sums, sums_bytes);
    kvc_mutex_lock(&tier->lock);
    kvc_status status = find_segment(tier, write, class_bytes, &segment);
    if (status == KVC_OK && !kvsi_gpu_arena_place(&tier->arena, segment, &write->key.tenant,
                                                  class_bytes, record, &write->slot))
        status = KVC_AGAIN;
    if (status == KVC_OK)
        *at_p = segment->slots.base + (uint32_t)write->slot.b * class_bytes;
    kvc_mutex_unlock(&tier->lock);
    if (status != KVC_OK)
        free(record);
    return status;
}

static kvc_status store(kvs_tier *tier, kvs_tier_write *write)
{
    size_t bytes = (size_t)write->row_bytes * write->n_rows;
    uint8_t *at;
    if (atomic_load(&tier->failed))
        return KVC_IO;
    kvc_status status = reserve(tier, write, &at);
    if (status != KVC_OK)
        return status;
    memcpy(tier->writers.pinned, write->rows, bytes);
    status = kvk_cuda_copy(tier->cuda, at, tier->writers.pinned, bytes, tier->writers.stream);
    if (status == KVC_OK)
        status = kvk_cuda_stream_sync(tier->cuda, tier->writers.stream);
    kvc_mutex_lock(&tier->lock);
    if (status == KVC_OK)
        tier->bytes_written += bytes;
    else
        kvsi_gpu_arena_release(&tier->arena, write->slot);
    kvc_mutex_unlock(&tier->lock);
    return judge(tier, status);
}

static void writer_main(void *arg)
{
    kvs_tier *tier = arg;
    kvc_mutex_lock(&tier->lock);
    for (;;) {
        while (tier->head == NULL && !tier->closing)
            kvc_cond_wait(&tier->work, &tier->lock);
        kvs_tier_write *write = tier->head;
        if (write == NULL)
            break;
        tier->head = write->next;
        if (tier->head == NULL)
            tier->tail = NULL;
        tier->n_queued--;
        kvc_mutex_unlock(&tier->lock);
        write->status = store(tier, write);
        write->done(write);
        kvc_mutex_lock(&tier->lock);
    }
    kvc_mutex_unlock(&tier->lock);
}

static kvc_status gpu_write(kvs_tier *tier, kvs_tier_write *write)
{
    uint64_t bytes = (uint64_t)write->row_bytes * write->n_rows;
    kvc_status status = KVC_OK;
    if (bytes == 0 || bytes > tier->lane_bytes || bytes > tier->arena.segment_bytes)
        return KVC_INVALID;
    kvc_mutex_lock(&tier->lock);
    if (atomic_load(&tier->failed))
        status = KVC_IO;
    else if (tier->n_queued == MAX_QUEUED)
        status = KVC_AGAIN;
    if (status == KVC_OK) {
        write->next = NULL;
        if (tier->tail != NULL)
            tier->tail->next = write;
        else
            tier->head = write;
        tier->tail = write;
        tier->n_queued++;
        kvc_cond_signal(&tier->work);
    }
    kvc_mutex_unlock(&tier->lock);
    return status;
}

/* ---- read ------------------------------------------------------------------------------------ */

/* A read of one value: where it lies and what is known of it; both stay until it is released. */
typedef struct reading {
    const uint8_t *base;
    const kvsi_gpu_record *record;
    const kvs_row_range *ranges;
    uint32_t n_ranges;
} reading;

static lane *take_lane(kvs_tier *tier)
{
    lane *found = NULL;
    kvc_mutex_lock(&tier->lock);
    for (;;) {
        for (uint32_t i = 0; found == NULL && i < N_LANES; i++)
            found = tier->lanes[i].busy ? NULL : &tier->lanes[i];
        if (found != NULL)
            break;
        kvc_cond_wait(&tier->lane_free, &tier->lock);
    }
    found->busy = true;
    kvc_mutex_unlock(&tier->lock);
    return found;
}

static void give_lane(kvs_tier *tier, lane *l, uint64_t bytes)
{
    kvc_mutex_lock(&tier->lock);
    l->busy = false;
    tier->bytes_read += bytes;
    kvc_cond_signal(&tier->lane_free);
    kvc_mutex_unlock(&tier->lock);
}

/* Rows [first, first + n) to the lane's buffer at off. */
static kvc_status fetch(kvs_tier *tier, const lane *l, const reading *r, uint32_t first, uint32_t n,
                        uint64_t off)
{
    size_t row_bytes = r->record->row_bytes;
    return kvk_cuda_copy(tier->cuda, (uint8_t *)l->pinned + off, r->base + first * row_bytes,
                         n * row_bytes, l->stream);
}

/* From the lane's buffer, if the rows are what was written. */
static kvc_status deliver(const reading *r, const kvs_row_range *range, const uint8_t *from)
{
    size_t row_bytes = r->record->row_bytes;
    for (uint32_t i = 0; i < range->n; i++)
        if (kvc_row_sum(from + i * row_bytes, row_bytes) != r->record->sums[range->first + i])
            return KVC_CORRUPT;
    memcpy(range->dst, from, range->n * row_bytes);
    return KVC_OK;
}

/* All ranges, each for itself or as part of the rows from the first to the last. */
static kvc_status copy_rows(kvs_tier *tier, const lane *l, const reading *r, uint64_t *bytes_p)
{
    uint32_t first = UINT32_MAX, end = 0, n_rows = 0;
    uint64_t row_bytes = r->record->row_bytes, off = 0;
    kvc_status status = KVC_OK;
    for (uint32_t i = 0; i < r->n_ranges; i++) {
        const kvs_row_range *range = &r->ranges[i];
        first = range->first < first ? range->first : first;
        end = range->first + range->n > end ? range->first + range->n : end;
        n_rows += range->n;
    }
    bool apart = r->n_ranges <= FEW_RANGES && n_rows <= r->record->n_rows;
    if (!apart && end > first)
        status = fetch(tier, l, r, first, end - first, 0);
    for (uint32_t i = 0; apart && status == KVC_OK && i < r->n_ranges; i++) {
        status = fetch(tier, l, r, r->ranges[i].first, r->ranges[i].n, off);
        off += r->ranges[i].n * row_bytes;
    }
    if (status == KVC_OK)
        status = kvk_cuda_stream_sync(tier->cuda, l->stream);
    status = judge(tier, status);
    off = 0;
    for (uint32_t i = 0; status == KVC_OK && i < r->n_ranges; i++) {
        const uint8_t *from =
            (uint8_t *)l->pinned + (apart ? off : (r->ranges[i].first - first) * row_bytes);
        status = deliver(r, &r->ranges[i], from);
        off += r->ranges[i].n * row_bytes;
    }
    *bytes_p = n_rows * row_bytes;
    return status;
}

static kvc_status check_ranges(const reading *r, uint32_t row_bytes, uint32_t n_rows)
{
    if (r->record->row_bytes != row_bytes || r->record->n_rows != n_rows)
        return KVC_INVALID;
    for (uint32_t i = 0; i < r->n_ranges; i++)
        if (r->ranges[i].first > n_rows || r->ranges[i].n > n_rows - r->ranges[i].first)
            return KVC_INVALID;
    return KVC_OK;
}

static kvc_status gpu_read(kvs_tier *tier, const kvs_value_key *key, kvs_slot slot,
                           uint32_t row_bytes, uint32_t n_rows, const kvs_row_range *ranges,
                           uint32_t n_ranges)
{
    reading r = {.ranges = ranges, .n_ranges = n_ranges};
    uint32_t number;
    uint64_t bytes = 0;
    (void)key;
    kvc_mutex_lock(&tier->lock);
    const kvsi_gpu_segment *segment = kvsi_gpu_arena_at(&tier->arena, slot, &number);
    if (segment != NULL) {
        r.base = segment->slots.base + number * segment->slots.class_bytes;
        r.record = segment->records[number];
    }
    kvc_mutex_unlock(&tier->lock);
    if (r.record == NULL)
        return KVC_NOT_FOUND;
    kvc_status status = check_ranges(&r, row_bytes, n_rows);
    if (status != KVC_OK)
        return status;
    lane *l = take_lane(tier);
    status = atomic_load(&tier->failed) ? KVC_IO : copy_rows(tier, l, &r, &bytes);
    give_lane(tier, l, bytes);
    return status;
}

static void gpu_read_each(kvs_tier *tier, const kvs_tier_reads *reads)
{
    kvs_tier_read read;
    while (reads->next(reads->arg, &read)) {
        read.status = gpu_read(tier, &read.key, read.slot, read.row_bytes, read.n_rows, read.ranges,
                               read.n_ranges);
        reads->done(reads->arg, &read);
    }
}

/* ---- the rest of the table ------------------------------------------------------------------- */

static void gpu_release(kvs_tier *tier, const kvs_value_key *key, kvs_slot slot)
{
    (void)key;
    kvc_mutex_lock(&tier->lock);
    kvsi_gpu_arena_release(&tier->arena, slot);
    kvc_mutex_unlock(&tier->lock);
}

static kvc_status gpu_sync(kvs_tier *tier, const kvs_slot *slots, uint32_t n, int8_t *status)
{
    (void)slots;
    for (uint32_t i = 0; status != NULL && i < n; i++)
        status[i] = KVC_OK;
    return atomic_load(&tier->failed) ? KVC_IO : KVC_OK;
}

/* Nothing is back after a restart. */
static kvc_status gpu_sync_releases(kvs_tier *tier, const kvs_tier_shape *shapes, uint32_t n)
{
    (void)tier;
    (void)shapes;
    (void)n;
    return KVC_OK;
}

static void gpu_usage(kvs_tier *tier, kvs_tier_usage *usage_p)
{
    kvc_mutex_lock(&tier->lock);
    *usage_p = (kvs_tier_usage){
        .capacity_bytes = tier->capacity_bytes,
        .used_bytes = tier->arena.used_bytes,
        .values = tier->arena.values,
        .bytes_read = tier->bytes_read,
        .bytes_written = tier->bytes_written,
        .failed = atomic_load(&tier->failed),
    };
    kvc_mutex_unlock(&tier->lock);
}

static kvc_status gpu_locate(kvs_tier *tier, kvs_slot slot, kvs_tier_place *place_p)
{
    uint32_t number;
    kvc_status status = KVC_OK;
    kvc_mutex_lock(&tier->lock);
    const kvsi_gpu_segment *segment = kvsi_gpu_arena_at(&tier->arena, slot, &number);
    if (segment == NULL)
        status = KVC_INVALID;
    else if (!segment->shared || atomic_load(&tier->failed))
        status = KVC_UNSUPPORTED;
    else
        *place_p = (kvs_tier_place){.segment = segment->slots.number,
                                    .len_bytes = segment->slots.len_bytes,
                                    .off_bytes = number * segment->slots.class_bytes,
                                    .handle = segment->handle};
    kvc_mutex_unlock(&tier->lock);
    return status;
}

static uint32_t gpu_count_mapping(kvs_tier *tier, uint32_t segment, bool more,
                                  uint64_t *len_bytes_p)
{
    kvc_mutex_lock(&tier->lock);
    KVC_ASSERT(segment < tier->arena.n_created);
    kvsi_segment *slots = &tier->arena.segments[segment]->slots;
    KVC_ASSERT(more || slots->n_mappings > 0);
    slots->n_mappings = more ? slots->n_mappings + 1 : slots->n_mappings - 1;
    uint32_t n = slots->n_mappings;
    *len_bytes_p = slots->len_bytes;
    kvc_mutex_unlock(&tier->lock);
    return n;
}

static const void *gpu_device_rows(kvs_tier *tier, kvs_slot slot)
{
    uint32_t number;
    kvc_mutex_lock(&tier->lock);
    const kvsi_gpu_segment *segment = kvsi_gpu_arena_at(&tier->arena, slot, &number);
    const void *rows = segment == NULL || atomic_load(&tier->failed)
                           ? NULL
                           : segment->slots.base + number * segment->slots.class_bytes;
    kvc_mutex_unlock(&tier->lock);
    return rows;
}

static void close_lane(kvs_tier *tier, lane *l)
{
    kvk_cuda_stream_destroy(tier->cuda, l->stream);
    kvk_cuda_free(tier->cuda, KVK_CUDA_PINNED, l->pinned);
}

static void gpu_close(kvs_tier *tier)
{
    if (tier == NULL)
        return;
    kvc_mutex_lock(&tier->lock);
    tier->closing = true;
    kvc_cond_signal(&tier->work);
    kvc_mutex_unlock(&tier->lock);
    kvc_thread_join(&tier->writer);
    kvsi_gpu_arena_fini(&tier->arena);
    for (uint32_t i = 0; i < N_LANES; i++)
        close_lane(tier, &tier->lanes[i]);
    close_lane(tier, &tier->writers);
    kvk_cuda_close(tier->cuda);
    kvc_cond_fini(&tier->work);
    kvc_cond_fini(&tier->lane_free);
    kvc_mutex_fini(&tier->lock);
    free(tier);
}

static kvc_status open_lane(kvs_tier *tier, lane *l)
{
    kvc_status status =
        kvk_cuda_alloc(tier->cuda, KVK_CUDA_PINNED, (size_t)tier->lane_bytes, &l->pinned);
    return status == KVC_OK ? kvk_cuda_stream_create(tier->cuda, &l->stream) : status;
}

static kvc_status start(kvs_tier *tier, const kvs_tier_opts *opts)
{
    kvc_status status = kvk_cuda_open(opts->device, &tier->cuda);
    tier->capacity_bytes = opts->capacity_bytes;
    tier->lane_bytes = kvsi_gpu_class_bytes(opts->max_value_bytes, 1);
    if (status == KVC_OK)
        status = kvsi_gpu_arena_init(&tier->arena, tier->cuda, opts->capacity_bytes,
                                     opts->max_value_bytes);
    for (uint32_t i = 0; status == KVC_OK && i < N_LANES; i++)
        status = open_lane(tier, &tier->lanes[i]);
    if (status == KVC_OK)
        status = open_lane(tier, &tier->writers);
    if (status == KVC_OK)
        status = kvc_thread_start(&tier->writer, "kvs-gpu-w", writer_main, tier);
    return status;
}

static kvc_status gpu_open(const kvs_tier_opts *opts, kvs_tier **tier_p)
{
    *tier_p = NULL;
    if (opts->size_bytes != sizeof(*opts))
        return KVC_INVALID;
    kvs_tier *tier = calloc(1, sizeof(*tier));
    if (tier == NULL)
        return KVC_NO_MEMORY;
    kvc_mutex_init(&tier->lock, KVC_RANK_TIER);
    kvc_cond_init(&tier->work);
    kvc_cond_init(&tier->lane_free);
    kvc_status status = start(tier, opts);
    if (status != KVC_OK) {
        gpu_close(tier);
        return status;
    }
    *tier_p = tier;
    return KVC_OK;
}

const kvs_tier_ops kvsi_gpu_ops = {
    .name = "gpu",
    .caps = KVS_TIER_BLOCKING,
    .open = gpu_open,
    .close = gpu_close,
    .usage = gpu_usage,
    .release = gpu_release,
    .write = gpu_write,
    .read = gpu_read,
    .read_each = gpu_read_each,
    .sync = gpu_sync,
    .sync_releases = gpu_sync_releases,
    .locate = gpu_locate,
    .count_mapping = gpu_count_mapping,
    .device_rows = gpu_device_rows,
};
