/*
 * map.c: the memory of a server of this host, mapped read-only, and tables of what lies where.
 *
 * Any thread; see map.h. Segments and the lease are unmapped once no map and no client names their
 * epoch. Lengths and offsets were checked by whoever filled a table in.
 */
#include "map.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define SEALS (F_SEAL_GROW | F_SEAL_SHRINK)

/* Read-only; MAP_FAILED also where it is not as long as the server says, for good: reading behind
 * its end would be a SIGBUS. Takes fd. */
static void *map_sealed(int fd, size_t len_bytes, int flags)
{
    struct stat info;
    int seals = fcntl(fd, F_GET_SEALS);
    bool good = len_bytes > 0 && seals >= 0 && (seals & SEALS) == SEALS && fstat(fd, &info) == 0 &&
                (uint64_t)info.st_size >= len_bytes;
    void *base = good ? mmap(NULL, len_bytes, PROT_READ, MAP_SHARED | flags, fd, 0) : MAP_FAILED;
    (void)close(fd);
    return base;
}

kvci_epoch *kvci_epoch_create(const kvc_map_opts *opts, int lease_fd, size_t lease_bytes)
{
    kvci_epoch *epoch = calloc(1, sizeof(*epoch));
    void *lease = map_sealed(lease_fd, lease_bytes, 0);
    if (epoch == NULL || lease == MAP_FAILED) {
        if (lease != MAP_FAILED)
            (void)munmap(lease, lease_bytes);
        free(epoch);
        return NULL;
    }
    atomic_init(&epoch->refs, 1);
    epoch->opts = *opts;
    epoch->lease = lease;
    epoch->lease_bytes = lease_bytes;
    return epoch;
}

static bool grow(kvci_epoch *epoch, uint32_t id)
{
    uint32_t n = epoch->n_segments == 0 ? 64 : epoch->n_segments;
    while (n <= id)
        n *= 2;
    kvci_segment **more = realloc(epoch->segments, n * sizeof(*more));
    if (more == NULL)
        return false;
    memset(more + epoch->n_segments, 0, (n - epoch->n_segments) * sizeof(*more));
    epoch->segments = more;
    epoch->n_segments = n;
    return true;
}

/* A record for a segment with this free id. NULL: no memory, or the id is not free. */
static kvci_segment *new_segment(kvci_epoch *epoch, uint32_t id, size_t len_bytes)
{
    if (id >= KVCI_MAX_SEGMENTS || (id >= epoch->n_segments && !grow(epoch, id)) ||
        epoch->segments[id] != NULL)
        return NULL;
    kvci_segment *segment = calloc(1, sizeof(*segment));
    if (segment != NULL) {
        segment->id = id;
        segment->len_bytes = len_bytes;
    }
    return segment;
}

kvc_status kvci_epoch_add(kvci_epoch *epoch, uint32_t id, int fd, size_t len_bytes)
{
    kvci_segment *segment = new_segment(epoch, id, len_bytes);
    void *base = MAP_FAILED;
    if (segment != NULL)
        base = map_sealed(fd, len_bytes, epoch->opts.populate ? MAP_POPULATE : 0);
    else
        (void)close(fd);
    if (base == MAP_FAILED) {
        free(segment);
        return KVC_NO_MEMORY;
    }
    segment->base = base;
    epoch->segments[id] = segment;
    if (epoch->opts.on_segment != NULL)
        epoch->opts.on_segment(epoch->opts.arg, base, len_bytes, true);
    return KVC_OK;
}

kvc_status kvci_epoch_add_gpu(kvci_epoch *epoch, const kvc_map_opts *opts,
                              const kvc_map_segment *passed)
{
    kvci_segment *segment = new_segment(epoch, passed->id, (size_t)passed->len_bytes);
    void *base = NULL;
    kvc_status status = KVC_NO_MEMORY;
    if (segment != NULL && opts->gpu_open != NULL)
        status = opts->gpu_open(opts->arg, &passed->handle, (size_t)passed->len_bytes, &base);
    if (status != KVC_OK) {
        free(segment);
        return status;
    }
    segment->base = base;
    segment->gpu_close = opts->gpu_close;
    segment->gpu_arg = opts->arg;
    epoch->segments[passed->id] = segment;
    return KVC_OK;
}

static void unmap(kvci_epoch *epoch, uint32_t id)
{
    kvci_segment *segment = epoch->segments[id];
    epoch->segments[id] = NULL;
    if (segment->gpu_close != NULL) {
        segment->gpu_close(segment->gpu_arg, (void *)(uintptr_t)segment->base);
        free(segment);
        return;
    }
    if (epoch->opts.on_segment != NULL)
        epoch->opts.on_segment(epoch->opts.arg, segment->base, segment->len_bytes, false);
    (void)munmap((void *)(uintptr_t)segment->base, segment->len_bytes);
    free(segment);
}

uint32_t kvci_epoch_sweep(kvci_epoch *epoch, bool gpu, uint32_t *ids, uint32_t max)
{
    uint32_t n = 0;
    for (uint32_t id = 0; epoch != NULL && id < epoch->n_segments && n < max; id++) {
        const kvci_segment *segment = epoch->segments[id];
        if (segment == NULL || atomic_load(&segment->users) > 0 ||
            (gpu && segment->gpu_close == NULL))
            continue;
        unmap(epoch, id);
        ids[n++] = id;
    }
    return n;
}

void kvci_epoch_unref(kvci_epoch *epoch)
{
    if (epoch == NULL || atomic_fetch_sub(&epoch->refs, 1) > 1)
        return;
    for (uint32_t id = 0; id < epoch->n_segments; id++)
        if (epoch->segments[id] != NULL)
            unmap(epoch, id);
    (void)munmap((void *)(uintptr_t)epoch->lease, epoch->lease_bytes);
    free(epoch->segments);
    free(epoch);
}

bool kvci_map_uses(kvci_map *map, kvci_segment *segment)
{
    /* Neighbours lie together, so the last ones are the likely ones. */
    for (uint32_t i = map->n_used; i > 0; i--)
        if (map->used[i - 1] == segment)
            return true;
    if (map->n_used == map->room_used) {
        uint32_t room = map->room_used == 0 ? 16 : 2 * map->room_used;
        kvci_segment **more = realloc(map->used, room * sizeof(*more));
        if (more == NULL)
            return false;
        map->used = more;
        map->room_used = room;
    }
    map->used[map->n_used++] = segment;
    atomic_fetch_add(&segment->users, 1);
    return true;
}

/* False: no memory. */
static bool use_all(kvci_map *map, const kvci_map *old)
{
    map->used = old->n_used > 0 ? calloc(old->n_used, sizeof(*map->used)) : NULL;
    if (map->used == NULL)
        return old->n_used == 0;
    map->n_used = map->room_used = old->n_used;
    memcpy(map->used, old->used, old->n_used * sizeof(*map->used));
    for (uint32_t i = 0; i < map->n_used; i++)
        atomic_fetch_add(&map->used[i]->users, 1);
    return true;
}

kvci_map *kvci_map_create(kvci_epoch *epoch, const kvci_map *old, uint32_t n_old, uint32_t n_blocks,
                          uint32_t n_parts, bool gpu)
{
    kvci_map *map = calloc(1, sizeof(*map));
    if (map == NULL)
        return NULL;
    atomic_init(&map->refs, 1);
    atomic_init(&map->n_blocks, n_old);
    map->n_parts = n_parts;
    map->parts = calloc(2 * (size_t)n_parts, sizeof(*map->parts));
    map->values = calloc((size_t)n_blocks * n_parts + 1, sizeof(*map->values));
    gpu = gpu || (old != NULL && old->gpu != NULL);
    if (gpu)
        map->gpu = calloc((size_t)n_blocks * n_parts + 1, sizeof(*map->gpu));
    if (map->parts == NULL || map->values == NULL || (gpu && map->gpu == NULL) ||
        (old != NULL && !use_all(map, old))) {
        free(map->parts);
        free(map->values);
        free(map->gpu);
        free(map);
        return NULL;
    }
    map->row_bytes = map->parts + n_parts;
    map->epoch = epoch;
    atomic_fetch_add(&epoch->refs, 1);
    if (old != NULL) {
        map->number = old->number;
        map->boot_id = old->boot_id;
        map->slot = old->slot;
        map->block_tokens = old->block_tokens;
        map->info = old->info;
        memcpy(map->parts, old->parts, 2 * (size_t)n_parts * sizeof(*map->parts));
        memcpy(map->values, old->values, (size_t)n_old * n_parts * sizeof(*map->values));
        if (old->gpu != NULL)
            memcpy(map->gpu, old->gpu, (size_t)n_old * n_parts * sizeof(*map->gpu));
    }
    return map;
}

void kvci_map_unref(kvci_map *map)
{
    if (map == NULL || atomic_fetch_sub(&map->refs, 1) > 1)
        return;
    for (uint32_t i = 0; i < map->n_used; i++)
        atomic_fetch_sub(&map->used[i]->users, 1);
    if (map->client != NULL) {
        kvc_mutex_lock(&map->client->lock);
        kvci_map_left(map->client);
        kvc_mutex_unlock(&map->client->lock);
    }
    kvci_epoch_unref(map->epoch);
    free(map->used);
    free(map->parts);
    free(map->values);
    free(map->gpu);
    free(map);
}

kvci_map *kvci_map_of(kvc_context *context)
{
    kvc_client *client = context->client;
    kvc_mutex_lock(&client->lock);
    kvci_map *map = context->map;
    if (map != NULL && map->boot_id != client->boot_id)
        map = NULL; /* of a server that is no more */
    if (map != NULL)
        atomic_fetch_add(&map->refs, 1);
    kvc_mutex_unlock(&client->lock);
    return map;
}

bool kvci_map_holds(const kvci_map *map)
{
    atomic_thread_fence(memory_order_acquire); /* what was read, was read before this */
    return atomic_load_explicit(&map->epoch->lease[map->slot], memory_order_relaxed) == map->number;
}

int kvci_map_part(const kvci_map *map, uint32_t part)
{
    for (uint32_t i = 0; i < map->n_parts; i++)
        if (map->parts[i] == part)
            return (int)i;
    return -1;
}
