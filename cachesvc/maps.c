/*
 * maps.c: the table of connections and their maps; see maps.h.
 *
 * Any thread. Invariants: a map's word in the lease holds its number exactly while the map is in
 * its connection's list, and is cleared before a value of it is let go; tenants' pinned bytes are
 * the sum over their maps and what is reserved.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/assert.h"
#include "base/digest.h"
#include "base/log.h"
#include "base/metrics.h"
#include "cascade.h"
#include "files.h"
#include "maps_internal.h"

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

#define LEASE_WORDS 4096u /* maps that one connection may have */
#define LEASE_BYTES (LEASE_WORDS * sizeof(uint64_t))

typedef kvsi_map map;
typedef kvsi_map_peer peer;

kvs_maps *kvs_maps_create(kvs_server *server)
{
    const kvs_settings *s = &server->settings;
    kvs_maps *maps = calloc(1, sizeof(*maps));
    if (!maps)
        return NULL;
    maps->server = server;
    maps->max_bytes = server->limits.max_map_pin_bytes;
    maps->max_mapped_bytes[KVSI_DRAM] = server->limits.max_mapped_bytes;
    maps->max_mapped_bytes[KVSI_GPU] = s->gpu_bytes / 4 * 3;
    maps->max_total = maps->max_total_mapped[KVSI_DRAM] = s->dram_bytes / 10 * 9;
    maps->max_total_mapped[KVSI_GPU] = s->gpu_bytes / 10 * 9;
    maps->next_number = server->boot_id << 32;
    kvc_mutex_init(&maps->lock, KVC_RANK_CONTEXT);
    return maps;
}

void kvs_maps_destroy(kvs_maps *maps)
{
    if (!maps)
        return;
    KVC_ASSERT(!maps->peers);
    kvc_mutex_lock(&maps->lock);
    kvsi_map_forget_processes(maps);
    kvc_mutex_unlock(&maps->lock);
    kvc_mutex_fini(&maps->lock);
    free(maps);
}

uint64_t kvs_map_max_bytes(const kvs_maps *maps)
{
    return maps->max_bytes;
}

/* ---- with the lock held ---------------------------------------------------------------------- */

kvsi_map_tenant *kvsi_map_tenant_of(kvs_maps *maps, const kvc_digest *tenant)
{
    for (uint32_t i = 0; i < maps->n_tenants; i++)
        if (kvc_digest_equal(&maps->tenants[i].tenant, tenant))
            return &maps->tenants[i];
    if (maps->n_tenants < KVSI_MAP_TENANTS)
        maps->tenants[maps->n_tenants++].tenant = *tenant;
    return &maps->tenants[maps->n_tenants - 1];
}

static void unreserve(kvs_maps *maps, const kvc_digest *tenant, uint64_t bytes)
{
    kvsi_map_tenant_of(maps, tenant)->bytes -= bytes;
    maps->total_bytes -= bytes;
}

kvsi_map_peer *kvsi_map_peer_of(kvs_maps *maps, uint64_t id)
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

static uint32_t hash(const map *m, uint32_t value)
{
    return (value * UINT32_C(2654435769)) >> 7 & (m->n_set - 1);
}

/* Where the value is in the map's set, or would be. */
static uint32_t *place_in(const map *m, uint32_t value)
{
    uint32_t i = hash(m, value);
    while (m->set[i] != 0 && m->set[i] != value)
        i = (i + 1) & (m->n_set - 1);
    return &m->set[i];
}

bool kvsi_map_has(kvsi_map_peer *p, uint64_t number, uint32_t value)
{
    const map *m = find_map(p, number);
    return m && m->n_set > 0 && *place_in(m, value) == value;
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
        free(list->set);
        free(list);
        list = next;
    }
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
    if (p)
        kvsi_map_forget_segments(maps, p);
    kvc_mutex_unlock(&maps->lock);
    free_maps(maps, list);
    if (!p)
        return;
    (void)munmap(p->lease, LEASE_BYTES);
    (void)close(p->lease_fd);
    free(p);
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
    peer *p = kvsi_map_peer_of(maps, id);
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
        return errno == EMFILE || errno == ENFILE ? KVC_AGAIN : KVC_UNSUPPORTED;
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
    bool there = kvsi_map_peer_of(maps, id) != NULL;
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
    peer *p = kvsi_map_peer_of(maps, id);
    if (!p->lease_passed)
        lease_p->fd = kvs_files_pass(p->lease_fd);
    bool has_lease = p->lease_passed || lease_p->fd >= 0;
    map *m = !has_lease ? NULL : fresh ? add_map(maps, p) : find_map(p, *map_p);
    if (m) {
        *map_p = m->number;
        lease_p->slot = m->slot;
    }
    if (m && lease_p->fd >= 0) {
        lease_p->lease_bytes = LEASE_BYTES;
        p->lease_passed = true;
    }
    kvc_mutex_unlock(&maps->lock);
    if (m)
        return KVC_OK;
    if (lease_p->fd >= 0)
        (void)close(lease_p->fd);
    lease_p->fd = -1;
    if (!has_lease)
        return KVC_AGAIN;
    return fresh ? KVC_NO_SPACE : KVC_NOT_FOUND;
}

uint64_t kvs_map_reserve(kvs_maps *maps, const kvc_digest *tenant, uint64_t want_bytes)
{
    kvc_mutex_lock(&maps->lock);
    kvsi_map_tenant *pins = kvsi_map_tenant_of(maps, tenant);
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
    uint64_t bytes = kvsi_map_tenant_of(maps, tenant)->bytes;
    kvc_mutex_unlock(&maps->lock);
    return bytes;
}

/* Room for n more values in the list and, at most half full, in the set. */
static bool grow(map *m, uint32_t n)
{
    uint32_t have = m->values ? 64 : 0, want = 64;
    KVC_ASSERT(m->values || m->n == 0);
    while (have > 0 && have < m->n)
        have *= 2;
    while (want < m->n + n)
        want *= 2;
    if (have < want) {
        uint32_t *more = realloc(m->values, want * sizeof(*more));
        if (!more)
            return false;
        m->values = more;
    }
    if (m->n_set >= 2 * want)
        return true;
    uint32_t *set = calloc(2 * (size_t)want, sizeof(*set));
    if (!set)
        return false;
    free(m->set);
    m->set = set;
    m->n_set = 2 * want;
    for (uint32_t i = 0; i < m->n; i++)
        *place_in(m, m->values[i]) = m->values[i];
    return true;
}

/* Takes those that it has not; the others move to the end of the list. Gives how many it took. */
static uint32_t take_values(map *m, uint32_t *values, uint32_t n)
{
    uint32_t i = 0, end = n;
    while (i < end) {
        uint32_t value = values[i], *place = place_in(m, value);
        if (*place == 0) {
            *place = m->values[m->n++] = value;
            i++;
        } else {
            values[i] = values[--end];
            values[end] = value;
        }
    }
    return end;
}

kvc_status kvs_map_add(kvs_maps *maps, uint64_t id, uint64_t number, uint32_t *values,
                       uint32_t *n_p, uint64_t used_bytes, uint64_t reserved_bytes)
{
    kvc_mutex_lock(&maps->lock);
    peer *p = kvsi_map_peer_of(maps, id);
    map *m = find_map(p, number);
    kvc_status status = m ? KVC_OK : KVC_NOT_FOUND;
    if (m && !grow(m, *n_p))
        status = KVC_NO_MEMORY;
    unreserve(maps, &p->tenant, status == KVC_OK ? reserved_bytes - used_bytes : reserved_bytes);
    if (status == KVC_OK) {
        *n_p = take_values(m, values, *n_p);
        m->bytes += used_bytes;
        KVC_GAUGE_ADD(map_pins, *n_p);
        KVC_GAUGE_ADD(map_pinned_bytes, used_bytes);
    }
    kvc_mutex_unlock(&maps->lock);
    return status;
}
