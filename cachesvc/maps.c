/*
 * maps.c: the table of connections and their maps; see maps.h.
 *
 * Any thread. Invariants: a map's word in the lease holds its number exactly while the map is in
 * its connection's list, and is cleared before a value of it is let go; tenants' pinned bytes are
 * the sum over their maps and what is reserved.
 */
#include "maps.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/assert.h"
#include "base/digest.h"
#include "base/log.h"
#include "base/metrics.h"
#include "cascade.h"
#include "tier/tier_dram.h"

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

#define LEASE_WORDS  4096u /* maps that one connection may have */
#define LEASE_BYTES  (LEASE_WORDS * sizeof(uint64_t))
#define TENANT_SLOTS 64u

typedef struct map {
    struct map *next;
    uint64_t number, bytes;
    uint32_t slot;    /* in the lease */
    uint32_t *values; /* [n] referenced; room for a power of two */
    uint32_t n;
} map;

typedef struct passed {
    uint32_t number, generation;
} passed;

typedef struct peer {
    struct peer *next;
    uint64_t id;
    kvc_digest tenant;
    map *maps;
    int lease_fd;
    _Atomic uint64_t *lease; /* [LEASE_WORDS] */
    bool lease_passed;
    passed *segments; /* [room_segments]; id = place + 1 */
    uint32_t n_segments, room_segments;
} peer;

typedef struct tenant_pins {
    kvc_digest tenant;
    uint64_t bytes;
} tenant_pins;

struct kvs_maps {
    kvs_server *server;
    uint64_t max_bytes, max_total;
    kvc_mutex lock; /* rank CONTEXT; guards all below; never held with a context's */
    peer *peers;
    uint64_t next_number, total_bytes;
    tenant_pins tenants[TENANT_SLOTS]; /* beyond them, tenants share the last */
    uint32_t n_tenants;
};

kvs_maps *kvs_maps_create(kvs_server *server)
{
    const kvs_settings *s = &server->settings;
    kvs_maps *maps = calloc(1, sizeof(*maps));
    if (!maps)
        return NULL;
    maps->server = server;
    maps->max_bytes = s->max_map_pin_bytes ? s->max_map_pin_bytes : s->dram_bytes / 2;
    maps->max_total = s->dram_bytes / 10 * 9;
    maps->next_number = server->boot_id << 32;
    kvc_mutex_init(&maps->lock, KVC_RANK_CONTEXT);
    return maps;
}

void kvs_maps_destroy(kvs_maps *maps)
{
    if (!maps)
        return;
    KVC_ASSERT(!maps->peers);
    kvc_mutex_fini(&maps->lock);
    free(maps);
}

uint64_t kvs_map_max_bytes(const kvs_maps *maps)
{
    return maps->max_bytes;
}

/* ---- with the lock held ---------------------------------------------------------------------- */

static tenant_pins *pins_of(kvs_maps *maps, const kvc_digest *tenant)
{
    for (uint32_t i = 0; i < maps->n_tenants; i++)
        if (kvc_digest_equal(&maps->tenants[i].tenant, tenant))
            return &maps->tenants[i];
    if (maps->n_tenants < TENANT_SLOTS)
        maps->tenants[maps->n_tenants++].tenant = *tenant;
    return &maps->tenants[maps->n_tenants - 1];
}

static void unreserve(kvs_maps *maps, const kvc_digest *tenant, uint64_t bytes)
{
    pins_of(maps, tenant)->bytes -= bytes;
    maps->total_bytes -= bytes;
}

static peer *find_peer(kvs_maps *maps, uint64_t id)
{
    peer *p = maps->peers;
    while (p && p->id != id)
        p = p->next;
    return p;
}

static map *find_map(peer *p, uint64_t number)
{
    map *m = p ? p->maps : NULL;
    while (m && m->number != number)
        m = m->next;
    return m;
}

/* Takes a map out of its connection and clears its word: from here on its readers know. */
static void cut(kvs_maps *maps, peer *p, map *m)
{
    map **link = &p->maps;
    while (*link != m)
        link = &(*link)->next;
    *link = m->next;
    atomic_store(&p->lease[m->slot], 0);
    unreserve(maps, &p->tenant, m->bytes);
}

/* ---- without it ------------------------------------------------------------------------------ */

/* A list of maps that were cut: their values are let go. */
static void free_maps(kvs_maps *maps, map *list)
{
    while (list) {
        map *next = list->next;
        kvs_index_unref(maps->server->index, list->values, list->n);
        KVC_GAUGE_SUB(maps, 1);
        KVC_GAUGE_SUB(map_pins, list->n);
        KVC_GAUGE_SUB(map_pinned_bytes, list->bytes);
        free(list->values);
        free(list);
        list = next;
    }
}

static void free_peer(kvs_maps *maps, peer *p)
{
    for (uint32_t i = 0; i < p->n_segments; i++)
        kvs_dram_count_mapping(maps->server->dram.tier, p->segments[i].number, false);
    KVC_GAUGE_SUB(mapped_segments, p->n_segments);
    (void)munmap(p->lease, LEASE_BYTES);
    (void)close(p->lease_fd);
    free(p->segments);
    free(p);
}

void kvs_maps_peer_gone(void *arg, uint64_t id)
{
    kvs_maps *maps = ((kvs_server *)arg)->maps;
    map *list = NULL;
    kvc_mutex_lock(&maps->lock);
    peer **link = &maps->peers;
    while (*link && (*link)->id != id)
        link = &(*link)->next;
    peer *p = *link;
    if (p)
        *link = p->next;
    while (p && p->maps) {
        map *m = p->maps;
        cut(maps, p, m);
        m->next = list;
        list = m;
    }
    kvc_mutex_unlock(&maps->lock);
    free_maps(maps, list);
    if (p)
        free_peer(maps, p);
}

void kvs_maps_revoke_erased(kvs_maps *maps)
{
    map *list = NULL;
    kvc_mutex_lock(&maps->lock);
    for (peer *p = maps->peers; p; p = p->next) {
        for (map *m = p->maps, *next; m; m = next) {
            next = m->next;
            if (!kvs_index_any_doomed(maps->server->index, m->values, m->n))
                continue;
            cut(maps, p, m);
            m->next = list;
            list = m;
            KVC_COUNT(maps_revoked);
        }
    }
    kvc_mutex_unlock(&maps->lock);
    free_maps(maps, list);
}

void kvs_map_release(kvs_maps *maps, uint64_t id, uint64_t number)
{
    kvc_mutex_lock(&maps->lock);
    peer *p = find_peer(maps, id);
    map *m = find_map(p, number);
    if (m) {
        cut(maps, p, m);
        m->next = NULL;
    }
    kvc_mutex_unlock(&maps->lock);
    free_maps(maps, m);
}

/* The server's mapping is made before the seal, which lets no later one be writable. */
static kvc_status make_lease(peer *p)
{
    int seals = F_SEAL_FUTURE_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL;
    p->lease_fd = memfd_create("kvasir-lease", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (p->lease_fd < 0)
        return KVC_UNSUPPORTED;
    void *base = MAP_FAILED;
    if (ftruncate(p->lease_fd, LEASE_BYTES) == 0)
        base = mmap(NULL, LEASE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, p->lease_fd, 0);
    if (base != MAP_FAILED && fcntl(p->lease_fd, F_ADD_SEALS, seals) == 0) {
        p->lease = base;
        return KVC_OK;
    }
    KVC_LOG_WARN(SHM, "no lease, so no maps: %s", strerror(errno));
    if (base != MAP_FAILED)
        (void)munmap(base, LEASE_BYTES);
    (void)close(p->lease_fd);
    return KVC_UNSUPPORTED;
}

/* The connection's record, made where there is none: only its own calls do so, one by one. */
static kvc_status want_peer(kvs_maps *maps, uint64_t id, const kvc_digest *tenant)
{
    kvc_mutex_lock(&maps->lock);
    bool there = find_peer(maps, id) != NULL;
    kvc_mutex_unlock(&maps->lock);
    if (there)
        return KVC_OK;
    peer *p = calloc(1, sizeof(*p));
    if (!p)
        return KVC_NO_MEMORY;
    p->id = id;
    p->tenant = *tenant;
    kvc_status status = make_lease(p);
    if (status != KVC_OK) {
        free(p);
        return status;
    }
    kvc_mutex_lock(&maps->lock);
    p->next = maps->peers;
    maps->peers = p;
    kvc_mutex_unlock(&maps->lock);
    return KVC_OK;
}

/* With the lock held. NULL: the lease has no free word, or memory is out. */
static map *add_map(kvs_maps *maps, peer *p)
{
    uint32_t slot = 0;
    while (slot < LEASE_WORDS && atomic_load(&p->lease[slot]))
        slot++;
    map *m = slot < LEASE_WORDS ? calloc(1, sizeof(*m)) : NULL;
    if (!m)
        return NULL;
    m->number = ++maps->next_number;
    m->slot = slot;
    m->next = p->maps;
    p->maps = m;
    atomic_store(&p->lease[slot], m->number);
    KVC_GAUGE_ADD(maps, 1);
    return m;
}

kvc_status kvs_map_begin(kvs_maps *maps, uint64_t id, const kvc_digest *tenant, uint64_t *map_p,
                         kvs_lease_at *lease_p)
{
    bool fresh = *map_p == 0;
    *lease_p = (kvs_lease_at){.fd = -1};
    kvc_status status = want_peer(maps, id, tenant);
    if (status != KVC_OK)
        return status;
    kvc_mutex_lock(&maps->lock);
    peer *p = find_peer(maps, id);
    map *m = fresh ? add_map(maps, p) : find_map(p, *map_p);
    if (m) {
        *map_p = m->number;
        lease_p->slot = m->slot;
        if (!p->lease_passed)
            lease_p->fd = fcntl(p->lease_fd, F_DUPFD_CLOEXEC, 0);
        if (lease_p->fd >= 0) {
            lease_p->lease_bytes = LEASE_BYTES;
            p->lease_passed = true;
        }
    }
    kvc_mutex_unlock(&maps->lock);
    if (!m)
        return fresh ? KVC_NO_SPACE : KVC_NOT_FOUND;
    return KVC_OK;
}

uint64_t kvs_map_reserve(kvs_maps *maps, const kvc_digest *tenant, uint64_t want_bytes)
{
    kvc_mutex_lock(&maps->lock);
    tenant_pins *pins = pins_of(maps, tenant);
    uint64_t room = pins->bytes < maps->max_bytes ? maps->max_bytes - pins->bytes : 0;
    uint64_t all = maps->total_bytes < maps->max_total ? maps->max_total - maps->total_bytes : 0;
    uint64_t bytes = room < all ? room : all;
    if (bytes > want_bytes)
        bytes = want_bytes;
    pins->bytes += bytes;
    maps->total_bytes += bytes;
    kvc_mutex_unlock(&maps->lock);
    return bytes;
}

uint64_t kvs_map_pinned(kvs_maps *maps, const kvc_digest *tenant)
{
    kvc_mutex_lock(&maps->lock);
    uint64_t bytes = pins_of(maps, tenant)->bytes;
    kvc_mutex_unlock(&maps->lock);
    return bytes;
}

static bool room_for_segment(peer *p)
{
    if (p->n_segments < p->room_segments)
        return true;
    uint32_t room = p->room_segments ? 2 * p->room_segments : 16;
    passed *more = realloc(p->segments, room * sizeof(*more));
    if (!more)
        return false;
    p->segments = more;
    p->room_segments = room;
    return true;
}

/* Room for n more behind the first used, by powers of two from 64. */
static bool grow(uint32_t **list, uint32_t used, uint32_t n)
{
    uint32_t have = 64, want = 64;
    while (have < used)
        have *= 2;
    while (want < used + n)
        want *= 2;
    if (*list && have >= want)
        return true;
    uint32_t *more = realloc(*list, want * sizeof(*more));
    if (more)
        *list = more;
    return more != NULL;
}

kvc_status kvs_map_add(kvs_maps *maps, uint64_t id, uint64_t number, const uint32_t *values,
                       uint32_t n, uint64_t used_bytes, uint64_t reserved_bytes)
{
    kvc_mutex_lock(&maps->lock);
    peer *p = find_peer(maps, id);
    map *m = find_map(p, number);
    kvc_status status = m ? KVC_OK : KVC_NOT_FOUND;
    if (m && !grow(&m->values, m->n, n))
        status = KVC_NO_MEMORY;
    unreserve(maps, &p->tenant, status == KVC_OK ? reserved_bytes - used_bytes : reserved_bytes);
    if (status == KVC_OK && n > 0)
        memcpy(m->values + m->n, values, n * sizeof(*values));
    if (status == KVC_OK) {
        m->n += n;
        m->bytes += used_bytes;
        KVC_GAUGE_ADD(map_pins, n);
        KVC_GAUGE_ADD(map_pinned_bytes, used_bytes);
    }
    kvc_mutex_unlock(&maps->lock);
    return status;
}

void kvs_map_unpass(kvs_maps *maps, uint64_t id, uint32_t n_segments, bool lease)
{
    passed last[KVC_MAX_MAP_SEGMENTS];
    kvc_mutex_lock(&maps->lock);
    peer *p = find_peer(maps, id);
    KVC_ASSERT(n_segments <= KVC_MAX_MAP_SEGMENTS && n_segments <= p->n_segments);
    p->lease_passed = p->lease_passed && !lease;
    p->n_segments -= n_segments;
    if (n_segments > 0)
        memcpy(last, p->segments + p->n_segments, n_segments * sizeof(*last));
    kvc_mutex_unlock(&maps->lock);
    for (uint32_t i = 0; i < n_segments; i++)
        kvs_dram_count_mapping(maps->server->dram.tier, last[i].number, false);
    KVC_GAUGE_SUB(mapped_segments, n_segments);
}

uint32_t kvs_map_segment(kvs_maps *maps, uint64_t id, const void *dram_segment, bool no_fds,
                         int *fd_p)
{
    const kvs_dram_segment *segment = dram_segment;
    uint32_t i = 0;
    *fd_p = -1;
    kvc_mutex_lock(&maps->lock);
    peer *p = find_peer(maps, id);
    uint32_t n = p->n_segments;
    while (i < n && (p->segments[i].number != segment->number ||
                     p->segments[i].generation != segment->generation))
        i++;
    if (i == n && !no_fds) {
        if (room_for_segment(p))
            *fd_p = fcntl(segment->fd, F_DUPFD_CLOEXEC, 0);
        if (*fd_p >= 0)
            p->segments[p->n_segments++] = (passed){segment->number, segment->generation};
    }
    bool known = i < p->n_segments;
    kvc_mutex_unlock(&maps->lock);
    if (*fd_p >= 0) {
        kvs_dram_count_mapping(maps->server->dram.tier, segment->number, true);
        KVC_GAUGE_ADD(mapped_segments, 1);
    }
    return known ? i + 1 : 0;
}
