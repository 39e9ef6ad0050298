/*
 * map_segments.c: which segments of dram and gpu have been passed to which connection; see maps.h.
 *
 * Any thread. Invariants: their tier counts a segment's connections, and while there are any it
 * goes to no other tenant; a tenant's mapped bytes are those of its segments with connections.
 * Whether a client has let go of memory cannot be seen: it is believed, as it is when it leaves,
 * but for memory of the GPU, for which its process must have ended (map_processes.c).
 */
#include <stdlib.h>
#include <string.h>

#include "base/metrics.h"
#include "files.h"
#include "maps_internal.h"
#include "tier/tier_dram.h"

/* Makes *list hold more than i, filled up with fill. */
static bool make_room(uint32_t **list, uint32_t *n, uint32_t i, uint32_t fill)
{
    uint32_t room = *n ? *n : 16;
    while (room <= i)
        room *= 2;
    if (room == *n)
        return true;
    uint32_t *more = realloc(*list, room * sizeof(*more));
    if (!more)
        return false;
    for (uint32_t k = *n; k < room; k++)
        more[k] = fill;
    *list = more;
    *n = room;
    return true;
}

static uint32_t name_of(int kind, uint32_t number)
{
    return 2 * number + (uint32_t)kind;
}

/* One connection more or less has the segment; gives how many have. */
static uint32_t count_mapping(kvs_maps *maps, int kind, uint32_t number, bool more,
                              uint64_t *len_bytes_p)
{
    kvs_server *server = maps->server;
    return kind == KVSI_GPU
               ? server->gpu.ops->count_mapping(server->gpu.tier, number, more, len_bytes_p)
               : kvs_dram_count_mapping(server->dram.tier, number, more, len_bytes_p);
}

static void count_bytes(kvs_maps *maps, const kvc_digest *tenant, int kind, uint64_t len_bytes,
                        bool more)
{
    kvsi_map_tenant *t = kvsi_map_tenant_of(maps, tenant);
    uint64_t by = more ? len_bytes : 0 - len_bytes;
    t->mapped_bytes[kind] += by;
    maps->total_mapped_bytes[kind] += by;
    if (more)
        KVC_GAUGE_ADD(mapped_bytes, len_bytes);
    else
        KVC_GAUGE_SUB(mapped_bytes, len_bytes);
}

void kvsi_map_uncount(kvs_maps *maps, const kvc_digest *tenant, int kind, uint32_t number)
{
    uint64_t len_bytes;
    if (count_mapping(maps, kind, number, false, &len_bytes) == 0)
        count_bytes(maps, tenant, kind, len_bytes, false);
    KVC_GAUGE_SUB(mapped_segments, 1);
}

/* One connection less has the segment. */
static void take_back(kvs_maps *maps, kvsi_map_peer *p, uint32_t id)
{
    uint32_t number = p->names[id - 1] / 2;
    int kind = (int)(p->names[id - 1] % 2);
    p->names[id - 1] = KVSI_NO_SEGMENT;
    p->of[kind].ids[number] = 0;
    p->n_passed--;
    kvsi_map_uncount(maps, &p->tenant, kind, number);
}

static bool fits_caps(kvs_maps *maps, const kvc_digest *tenant, int kind, uint64_t len_bytes)
{
    return kvsi_map_tenant_of(maps, tenant)->mapped_bytes[kind] + len_bytes <=
               maps->max_mapped_bytes[kind] &&
           maps->total_mapped_bytes[kind] + len_bytes <= maps->max_total_mapped[kind];
}

/* Gives a segment, of which a slot is held, a free id of the connection. */
static void pass(kvs_maps *maps, kvsi_map_peer *p, const kvs_map_segment *segment,
                 kvs_map_place *place)
{
    int kind = segment->gpu ? KVSI_GPU : KVSI_DRAM;
    uint32_t at = p->n_passed;
    for (uint32_t i = 0; i < p->n_names && p->n_passed < p->n_names; i++) {
        at = i;
        if (p->names[i] == KVSI_NO_SEGMENT)
            break;
    }
    if (!make_room(&p->of[kind].ids, &p->of[kind].n, segment->number, 0) ||
        !make_room(&p->names, &p->n_names, at, KVSI_NO_SEGMENT))
        return;
    uint64_t len_bytes;
    bool first = count_mapping(maps, kind, segment->number, true, &len_bytes) == 1;
    place->capped = first && !fits_caps(maps, &p->tenant, kind, len_bytes);
    if (!place->capped && !segment->gpu) {
        place->fd = kvs_files_pass(segment->fd);
        place->capped = place->fd < 0;
    }
    if (place->capped) {
        (void)count_mapping(maps, kind, segment->number, false, &len_bytes);
        return;
    }
    if (first)
        count_bytes(maps, &p->tenant, kind, len_bytes, true);
    p->names[at] = name_of(kind, segment->number);
    p->of[kind].ids[segment->number] = place->id = at + 1;
    place->fresh = true;
    p->n_passed++;
    KVC_GAUGE_ADD(mapped_segments, 1);
}

void kvs_map_place_value(kvs_maps *maps, uint64_t id, uint64_t number, uint32_t value,
                         const kvs_map_segment *segment, bool full, bool fits,
                         kvs_map_place *place_p)
{
    int kind = segment->gpu ? KVSI_GPU : KVSI_DRAM;
    *place_p = (kvs_map_place){.fd = -1};
    kvc_mutex_lock(&maps->lock);
    kvsi_map_peer *p = kvsi_map_peer_of(maps, id);
    place_p->again = kvsi_map_has(p, number, value);
    place_p->id = segment->number < p->of[kind].n ? p->of[kind].ids[segment->number] : 0;
    if (place_p->id == 0 && !full && (fits || place_p->again))
        pass(maps, p, segment, place_p);
    kvc_mutex_unlock(&maps->lock);
}

void kvs_map_unpass(kvs_maps *maps, uint64_t id, const uint32_t *ids, uint32_t n, bool lease)
{
    kvc_mutex_lock(&maps->lock);
    kvsi_map_peer *p = kvsi_map_peer_of(maps, id);
    if (p)
        p->lease_passed = p->lease_passed && !lease;
    for (uint32_t i = 0; p && i < n; i++)
        if (ids[i] > 0 && ids[i] <= p->n_names && p->names[ids[i] - 1] != KVSI_NO_SEGMENT)
            take_back(maps, p, ids[i]);
    kvc_mutex_unlock(&maps->lock);
}

void kvsi_map_forget_segments(kvs_maps *maps, kvsi_map_peer *p)
{
    for (uint32_t id = 1; id <= p->n_names; id++)
        if (p->names[id - 1] != KVSI_NO_SEGMENT &&
            (!p->process || p->names[id - 1] % 2 != KVSI_GPU))
            take_back(maps, p, id);
    kvsi_map_leave_open(maps, p);
    for (int kind = 0; kind < KVSI_KINDS; kind++)
        free(p->of[kind].ids);
    free(p->names);
}
