/*
 * tier_dram.c: values in host RAM, in memfd segments under one hard cap.
 *
 * Thread: any; one lock guards everything but map, which reads only what a held slot keeps still.
 * Invariants: segments are counted as they are created and n_max * segment_bytes <= the cap. A
 * segment holds slots of one (tenant, size class); it is in its owner's list while it has room, in
 * the tier's empty list while nothing is in it, and in none while it is full or closed. An empty
 * segment that goes to another tenant is replaced by a fresh memfd, so no tenant's bytes outlive
 * it.
 */
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/log.h"
#include "base/thread.h"
#include "dram_segment.h"
#include "tier_dram.h"
#include "tier_registry.h"

#define MIN_SEGMENTS      16u          /* small caps are cut finer, so that size classes share */
#define SEGMENT_ROUND     (2ull << 20) /* huge page */
#define EMPTY_SCAN        8u           /* empty segments looked at for one of the same tenant */
#define NO_OWNER          UINT32_MAX
#define SLOT_OF(b)        ((uint32_t)(b))
#define GENERATION_OF(b)  ((uint32_t)((b) >> 32))
#define PACK(gener, slot) ((uint64_t)(gener) << 32 | (slot))

struct kvsi_owner {
    kvc_digest tenant;
    uint64_t class_bytes;
    kvsi_segment *with_room;
    uint32_t n_segments; /* 0: this record is free */
    uint32_t next;       /* in its bucket or in the free list */
};

struct kvs_tier {
    kvc_mutex lock; /* rank TIER; guards all below but map's reads, see the top */
    uint64_t capacity_bytes, segment_bytes;
    uint32_t n_max, n_created;
    kvsi_segment **segments; /* [n_max] */
    kvsi_segment *empty;
    kvsi_owner *owners; /* [n_max] */
    uint32_t *buckets;  /* [n_buckets] */
    uint32_t n_buckets, free_owner;
    uint64_t used_bytes, values, bytes_written;
};

static uint64_t round_down(uint64_t x, uint64_t to)
{
    return x - x % to;
}

static uint64_t round_up(uint64_t x, uint64_t to)
{
    return round_down(x + to - 1, to);
}

/*
 * As long as 64 MiB where the cap has room for 16 of those; else a 16th of the cap, but long
 * enough for the largest value; one segment when even that does not fit.
 */
uint64_t kvs_dram_segment_bytes(uint64_t capacity_bytes, uint64_t max_value_bytes)
{
    uint64_t len = capacity_bytes / MIN_SEGMENTS;

    if (len > KVS_DRAM_SEGMENT_BYTES)
        len = KVS_DRAM_SEGMENT_BYTES;
    len = round_down(len, len >= 4 * SEGMENT_ROUND ? SEGMENT_ROUND : KVS_DRAM_PAGE_BYTES);
    uint64_t longest = round_up(max_value_bytes, KVS_DRAM_PAGE_BYTES);
    if (longest > KVS_DRAM_SEGMENT_BYTES)
        longest = KVS_DRAM_SEGMENT_BYTES;
    if (len < longest)
        len = longest;
    if (len > capacity_bytes)
        len = round_down(capacity_bytes, KVS_DRAM_PAGE_BYTES);
    return len;
}

static void list_push(kvsi_segment **head, kvsi_segment *segment)
{
    segment->prev = NULL;
    segment->next = *head;
    if (*head != NULL)
        (*head)->prev = segment;
    *head = segment;
}

static void list_remove(kvsi_segment **head, kvsi_segment *segment)
{
    if (segment->prev != NULL)
        segment->prev->next = segment->next;
    else
        *head = segment->next;
    if (segment->next != NULL)
        segment->next->prev = segment->prev;
    segment->prev = segment->next = NULL;
}

/* --- owners: (tenant, size class) -> its segments with room --- */

static uint32_t *owner_bucket(kvs_tier *tier, const kvc_digest *tenant, uint64_t class_bytes)
{
    uint64_t h;

    memcpy(&h, tenant->bytes, sizeof(h)); /* a SHA-256: already mixed */
    h = (h ^ class_bytes / KVS_DRAM_PAGE_BYTES) * UINT64_C(0x9E3779B97F4A7C15);
    return &tier->buckets[(h >> 32) & (tier->n_buckets - 1)];
}

static kvsi_owner *owner_find(kvs_tier *tier, const kvc_digest *tenant, uint64_t class_bytes)
{
    uint32_t i = *owner_bucket(tier, tenant, class_bytes);

    for (; i != NO_OWNER; i = tier->owners[i].next) {
        kvsi_owner *owner = &tier->owners[i];
        if (owner->class_bytes == class_bytes &&
            memcmp(&owner->tenant, tenant, sizeof(*tenant)) == 0)
            return owner;
    }
    return NULL;
}

/* There is a free record whenever a segment is about to get a new owner: each used one has one. */
static kvsi_owner *owner_add(kvs_tier *tier, const kvc_digest *tenant, uint64_t class_bytes)
{
    uint32_t *bucket = owner_bucket(tier, tenant, class_bytes);
    uint32_t i = tier->free_owner;

    KVC_ASSERT(i != NO_OWNER);
    kvsi_owner *owner = &tier->owners[i];
    tier->free_owner = owner->next;
    *owner = (kvsi_owner){.tenant = *tenant, .class_bytes = class_bytes, .next = *bucket};
    *bucket = i;
    return owner;
}

static void owner_remove(kvs_tier *tier, kvsi_owner *owner)
{
    uint32_t i = (uint32_t)(owner - tier->owners);
    uint32_t *link = owner_bucket(tier, &owner->tenant, owner->class_bytes);

    while (*link != i)
        link = &tier->owners[*link].next;
    *link = owner->next;
    owner->next = tier->free_owner;
    tier->free_owner = i;
}

/* --- segments --- */

static kvsi_segment *find_empty_of(kvs_tier *tier, const kvc_digest *tenant)
{
    kvsi_segment *segment = tier->empty;

    for (uint32_t i = 0; segment != NULL && i < EMPTY_SCAN; i++, segment = segment->next) {
        if (memcmp(&segment->tenant, tenant, sizeof(*tenant)) == 0)
            return segment;
    }
    return NULL;
}

/* One that may go to another tenant. */
static kvsi_segment *find_unmapped(kvs_tier *tier)
{
    kvsi_segment *segment = tier->empty;

    while (segment != NULL && segment->n_mappings > 0)
        segment = segment->next;
    return segment;
}

static kvc_status create_segment(kvs_tier *tier, uint32_t number, kvsi_segment **segment_p)
{
    kvc_status status = kvsi_segment_create(tier->segment_bytes, number, segment_p);

    if (status != KVC_OK)
        return status;
    tier->segments[number] = *segment_p;
    return KVC_OK;
}

/* The old memory goes before the new can be touched, so the cap holds throughout. */
static kvc_status replace_segment(kvs_tier *tier, kvsi_segment *old, kvsi_segment **segment_p)
{
    uint32_t generation = old->generation;
    kvc_status status = kvsi_segment_create(tier->segment_bytes, old->number, segment_p);

    if (status != KVC_OK)
        return status;
    list_remove(&tier->empty, old);
    (*segment_p)->generation = generation;
    tier->segments[old->number] = *segment_p;
    kvsi_segment_destroy(old);
    return KVC_OK;
}

/* An empty segment for this tenant, in no list: its own, a new one, or another's, replaced. */
static kvc_status get_segment(kvs_tier *tier, const kvc_digest *tenant, kvsi_segment **segment_p)
{
    kvc_status status = KVC_OK;

    *segment_p = find_empty_of(tier, tenant);
    if (*segment_p != NULL) {
        list_remove(&tier->empty, *segment_p);
    } else if (tier->n_created < tier->n_max) {
        status = create_segment(tier, tier->n_created, segment_p);
        if (status == KVC_OK)
            tier->n_created++;
    } else {
        kvsi_segment *other = find_unmapped(tier);
        status = other != NULL ? replace_segment(tier, other, segment_p) : KVC_AGAIN;
    }
    if (status == KVC_OK)
        (*segment_p)->tenant = *tenant;
    return status;
}

static kvc_status segment_with_room(kvs_tier *tier, const kvc_digest *tenant, uint64_t class_bytes,
                                    kvsi_segment **segment_p)
{
    kvsi_owner *owner = owner_find(tier, tenant, class_bytes);

    if (owner != NULL && owner->with_room != NULL) {
        *segment_p = owner->with_room;
        return KVC_OK;
    }
    kvc_status status = get_segment(tier, tenant, segment_p);
    if (status != KVC_OK)
        return status;
    if (owner == NULL)
        owner = owner_add(tier, tenant, class_bytes);
    kvsi_segment_layout(*segment_p, class_bytes);
    (*segment_p)->owner = owner;
    owner->n_segments++;
    list_push(&owner->with_room, *segment_p);
    return KVC_OK;
}

static void segment_emptied(kvs_tier *tier, kvsi_segment *segment)
{
    kvsi_owner *owner = segment->owner;

    if (!segment->closed)
        list_remove(&owner->with_room, segment);
    segment->closed = false;
    segment->owner = NULL;
    list_push(&tier->empty, segment);
    if (--owner->n_segments == 0)
        owner_remove(tier, owner);
}

/* The segment of a held slot, or NULL. */
static kvsi_segment *segment_of(kvs_tier *tier, kvs_slot slot)
{
    kvsi_segment *segment = slot.a < tier->n_created ? tier->segments[slot.a] : NULL;

    if (segment == NULL || segment->generation != GENERATION_OF(slot.b) ||
        !kvsi_segment_is_used(segment, SLOT_OF(slot.b)))
        return NULL;
    return segment;
}

/* --- the table --- */

static void dram_close(kvs_tier *tier)
{
    if (tier == NULL)
        return;
    if (tier->values > 0)
        KVC_LOG_DEBUG(TIER, "dram: closed with %llu values in it",
                      (unsigned long long)tier->values);
    for (uint32_t i = 0; i < tier->n_created; i++)
        kvsi_segment_destroy(tier->segments[i]);
    free(tier->segments);
    free(tier->owners);
    free(tier->buckets);
    kvc_mutex_fini(&tier->lock);
    free(tier);
}

static kvc_status alloc_tables(kvs_tier *tier)
{
    tier->n_buckets = 1;
    while (tier->n_buckets < 2 * tier->n_max)
        tier->n_buckets *= 2;
    tier->segments = calloc(tier->n_max, sizeof(kvsi_segment *));
    tier->owners = calloc(tier->n_max, sizeof(*tier->owners));
    tier->buckets = malloc(tier->n_buckets * sizeof(*tier->buckets));
    if (tier->segments == NULL || tier->owners == NULL || tier->buckets == NULL)
        return KVC_NO_MEMORY;
    for (uint32_t i = 0; i < tier->n_max; i++)
        tier->owners[i].next = i + 1 < tier->n_max ? i + 1 : NO_OWNER;
    for (uint32_t i = 0; i < tier->n_buckets; i++)
        tier->buckets[i] = NO_OWNER;
    return KVC_OK;
}

static kvc_status dram_open(const kvs_tier_opts *opts, kvs_tier **tier_p)
{
    *tier_p = NULL;
    if (opts->size_bytes != sizeof(*opts) || opts->capacity_bytes < KVS_DRAM_PAGE_BYTES) {
        KVC_LOG_ERROR(TIER, "dram: a capacity of %llu bytes is less than one page",
                      (unsigned long long)opts->capacity_bytes);
        return KVC_INVALID;
    }
    kvs_tier *tier = calloc(1, sizeof(*tier));
    if (tier == NULL)
        return KVC_NO_MEMORY;
    kvc_mutex_init(&tier->lock, KVC_RANK_TIER);
    tier->capacity_bytes = opts->capacity_bytes;
    tier->segment_bytes = kvs_dram_segment_bytes(opts->capacity_bytes, opts->max_value_bytes);
    uint64_t n_max = opts->capacity_bytes / tier->segment_bytes;
    kvc_status status = KVC_INVALID;
    if (n_max < NO_OWNER / 4) {
        tier->n_max = (uint32_t)n_max;
        status = alloc_tables(tier);
    }
    if (status != KVC_OK) {
        dram_close(tier);
        return status;
    }
    *tier_p = tier;
    return KVC_OK;
}

static void dram_usage(kvs_tier *tier, kvs_tier_usage *usage_p)
{
    kvc_mutex_lock(&tier->lock);
    *usage_p = (kvs_tier_usage){
        .capacity_bytes = tier->capacity_bytes,
        .used_bytes = tier->used_bytes,
        .values = tier->values,
        .bytes_written = tier->bytes_written,
    };
    kvc_mutex_unlock(&tier->lock);
}

/* Takes up to n slots of a segment that has one; gives the pages that nobody has touched yet. */
static struct iovec take_slots(kvs_tier *tier, kvsi_segment *segment, uint32_t n, kvs_slot *slots,
                               void **addrs)
{
    uint32_t room = segment->n_slots - segment->n_used, last = 0;

    if (n > room)
        n = room;
    for (uint32_t i = 0; i < n; i++) { /* they ascend */
        last = kvsi_segment_take(segment);
        slots[i] = (kvs_slot){segment->number, PACK(segment->generation, last)};
        addrs[i] = segment->base + last * segment->class_bytes;
    }
    if (n == room)
        list_remove(&segment->owner->with_room, segment);
    tier->used_bytes += n * segment->class_bytes;
    return kvsi_segment_untouched(segment, last);
}

static kvc_status dram_reserve(kvs_tier *tier, const kvs_value_key *key, uint32_t row_bytes,
                               uint32_t n_rows, uint32_t n, kvs_slot *slots, void **addrs)
{
    uint64_t class_bytes = round_up((uint64_t)row_bytes * n_rows, KVS_DRAM_PAGE_BYTES);
    struct iovec untouched = {NULL, 0};
    kvsi_segment *segment;

    KVC_ASSERT(n > 0);
    memset(slots, 0, n * sizeof(*slots));
    memset(addrs, 0, n * sizeof(*addrs));
    if (class_bytes == 0 || class_bytes > tier->segment_bytes)
        return KVC_INVALID;
    kvc_mutex_lock(&tier->lock);
    kvc_status status = segment_with_room(tier, &key->tenant, class_bytes, &segment);
    if (status == KVC_OK)
        untouched = take_slots(tier, segment, n, slots, addrs);
    kvc_mutex_unlock(&tier->lock);
    kvsi_segment_populate(untouched); /* the slots keep the segment where it is */
    return status;
}

static void dram_commit(kvs_tier *tier, const kvs_slot *slots, uint32_t n)
{
    kvc_mutex_lock(&tier->lock);
    for (uint32_t i = 0; i < n; i++) {
        kvsi_segment *segment = segment_of(tier, slots[i]);
        KVC_ASSERT(segment != NULL);
        KVC_ASSERT(kvsi_segment_mark(segment, SLOT_OF(slots[i].b)));
        tier->values++;
        tier->bytes_written += segment->class_bytes;
    }
    kvc_mutex_unlock(&tier->lock);
}

/* Lock-free: a held slot keeps its segment's number, mapping and layout as they are. */
static const void *dram_map(kvs_tier *tier, kvs_slot slot)
{
    const kvsi_segment *segment = tier->segments[slot.a];

    KVC_ASSERT(segment->generation == GENERATION_OF(slot.b));
    return segment->base + SLOT_OF(slot.b) * segment->class_bytes;
}

static void dram_release(kvs_tier *tier, const kvs_value_key *key, kvs_slot slot)
{
    kvc_mutex_lock(&tier->lock);
    kvsi_segment *segment = segment_of(tier, slot);
    KVC_ASSERT(segment != NULL);
    KVC_ASSERT(memcmp(&segment->tenant, &key->tenant, sizeof(key->tenant)) == 0);
    if (segment->n_used == segment->n_slots && !segment->closed)
        list_push(&segment->owner->with_room, segment);
    if (kvsi_segment_give(segment, SLOT_OF(slot.b)))
        tier->values--;
    tier->used_bytes -= segment->class_bytes;
    if (segment->n_used == 0)
        segment_emptied(tier, segment);
    kvc_mutex_unlock(&tier->lock);
}

static uint32_t dram_segments(kvs_tier *tier, uint32_t *used, uint32_t max)
{
    kvc_mutex_lock(&tier->lock);
    uint32_t n = tier->n_created;
    for (uint32_t i = 0; i < n && i < max; i++)
        used[i] = tier->segments[i]->n_used;
    kvc_mutex_unlock(&tier->lock);
    return n;
}

static uint32_t dram_close_segment(kvs_tier *tier, uint64_t a, uint32_t generation, bool yes)
{
    kvc_mutex_lock(&tier->lock);
    kvsi_segment *segment = a < tier->n_created ? tier->segments[a] : NULL;
    bool same = segment != NULL && segment->owner != NULL && segment->generation == generation;
    uint32_t n_used = same ? segment->n_used : 0;
    if (same && segment->closed != yes) {
        segment->closed = yes;
        if (segment->n_used < segment->n_slots && yes)
            list_remove(&segment->owner->with_room, segment);
        else if (segment->n_used < segment->n_slots)
            list_push(&segment->owner->with_room, segment);
    }
    kvc_mutex_unlock(&tier->lock);
    return n_used;
}

/* --- for transports --- */

static kvs_dram_segment describe(const kvsi_segment *segment)
{
    return (kvs_dram_segment){
        .number = segment->number,
        .generation = segment->generation,
        .fd = segment->fd,
        .base = segment->base,
        .len_bytes = segment->len_bytes,
        .class_bytes = segment->owner != NULL ? segment->class_bytes : 0,
        .tenant = segment->tenant,
    };
}

void kvs_dram_segments(kvs_tier *tier, kvs_dram_segment *segments, uint32_t max, uint32_t *n_p)
{
    kvc_mutex_lock(&tier->lock);
    for (uint32_t i = 0; i < tier->n_created && i < max; i++)
        segments[i] = describe(tier->segments[i]);
    *n_p = tier->n_created;
    kvc_mutex_unlock(&tier->lock);
}

uint32_t kvs_dram_count_mapping(kvs_tier *tier, uint32_t number, bool more, uint64_t *len_bytes_p)
{
    kvc_mutex_lock(&tier->lock);
    kvsi_segment *segment = tier->segments[number];
    KVC_ASSERT(more || segment->n_mappings > 0);
    segment->n_mappings = more ? segment->n_mappings + 1 : segment->n_mappings - 1;
    uint32_t n = segment->n_mappings;
    *len_bytes_p = segment->len_bytes;
    kvc_mutex_unlock(&tier->lock);
    return n;
}

kvc_status kvs_dram_locate(kvs_tier *tier, kvs_slot slot, kvs_dram_segment *segment_p,
                           uint64_t *off_bytes_p)
{
    kvc_mutex_lock(&tier->lock);
    const kvsi_segment *segment = segment_of(tier, slot);
    if (segment != NULL) {
        *segment_p = describe(segment);
        *off_bytes_p = SLOT_OF(slot.b) * segment->class_bytes;
    }
    kvc_mutex_unlock(&tier->lock);
    return segment != NULL ? KVC_OK : KVC_INVALID;
}

const kvs_tier_ops kvsi_dram_ops = {
    .name = "dram",
    .caps = KVS_TIER_ADDRESSABLE,
    .open = dram_open,
    .close = dram_close,
    .usage = dram_usage,
    .release = dram_release,
    .reserve = dram_reserve,
    .commit = dram_commit,
    .map = dram_map,
    .segments = dram_segments,
    .close_segment = dram_close_segment,
};
