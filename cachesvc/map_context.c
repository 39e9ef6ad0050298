/*
 * map_context.c: MapContext.
 *
 * On the connection's transport thread, start to end: it waits for nothing but short locks, and a
 * reply's table is bounded. Invariant: what was referenced is in the map when the reply leaves, or
 * was let go.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/le.h"
#include "base/metrics.h"
#include "gpu.h"
#include "maps.h"
#include "request.h"
#include "tier/tier_dram.h"

#define ENTRY_BYTES 8u

typedef struct mapping {
    kvs_server *server;
    kvt_call *call;
    kvs_context *context;
    const uint16_t *parts;
    uint32_t n_parts, first, n_blocks;
    kvs_read *reads;  /* [n_parts * n_blocks], part after part */
    uint32_t *values; /* [as many] pinned, in the table's order; then those to be let go */
    uint8_t *table;   /* [n_blocks * n_parts] entries */
    uint32_t n_pinned, n_dropped;
    uint64_t reserved_bytes, used_bytes;
    int fds[KVT_MAX_FDS];
    uint32_t n_fds;
    kvc_map_segment segments[KVC_MAX_MAP_SEGMENTS];
    kvc_reply reply;
} mapping;

/* False after kvs_fail: whoever it is may not map, or this server cannot. */
static bool may_map(kvs_server *server, kvt_call *call)
{
    const kvt_peer *peer = call->peer;
    const kvs_settings *s = &server->settings;
    if (!peer || server->dram.ops != kvs_tier_find("dram")) {
        kvs_fail(call, KVC_UNSUPPORTED, "MapContext works over shm:// only");
        return false;
    }
    if (peer->uid == geteuid() || kvs_ids_have(s->shm_map_uids, peer->uid) ||
        kvs_ids_have(s->shm_map_gids, peer->gid))
        return true;
    KVC_COUNT(maps_refused);
    kvs_fail(call, KVC_DENIED,
             "user %u, group %u may not map: see the server's shm_map_uids and shm_map_gids",
             peer->uid, peer->gid);
    return false;
}

/* Whether it is given places in the GPU: what opens them can write there, and is to be watched. */
static bool may_map_gpu(const mapping *m)
{
    const kvt_peer *peer = m->call->peer;
    return m->call->req.u.map_context.gpu && kvs_gpu_works(m->server) &&
           (peer->uid == geteuid() ||
            kvs_ids_have(m->server->settings.shm_map_gpu_uids, peer->uid)) &&
           kvs_map_watch(m->server->maps, peer->id, peer->pid);
}

/* The blocks asked for, as many as a reply's table has room for. False after kvs_fail. */
static bool choose(mapping *m, const kvc_digest *tenant)
{
    const kvc_request *req = &m->call->req;
    uint32_t n_parts = req->u.map_context.n_parts;
    if (n_parts == 0) {
        kvs_fail(m->call, KVC_INVALID, "name the parts to map");
        return false;
    }
    m->context = kvs_want_context(m->server, m->call, tenant, req->u.map_context.context);
    if (!m->context)
        return false;
    m->parts = kvs_named_parts(m->call, m->context->schema, req->u.map_context.parts, n_parts);
    if (!m->parts)
        return false;
    uint32_t have = atomic_load(&m->context->n_blocks);
    m->n_parts = n_parts;
    m->first = req->u.map_context.first_block;
    if (m->first > have) {
        kvs_fail(m->call, KVC_INVALID, "block %u; the context has %u", m->first, have);
        return false;
    }
    uint32_t want = req->u.map_context.n_blocks;
    m->n_blocks = want == 0 || want > have - m->first ? have - m->first : want;
    if (m->n_blocks > KVS_MAP_ENTRIES / n_parts)
        m->n_blocks = KVS_MAP_ENTRIES / n_parts;
    size_t n = (size_t)m->n_blocks * n_parts;
    m->reads = calloc(n + 1, sizeof(*m->reads));
    m->values = calloc(n + 1, sizeof(*m->values));
    m->table = calloc(n + 1, ENTRY_BYTES);
    if (!m->reads || !m->values || !m->table) {
        kvs_fail(m->call, KVC_NO_MEMORY, "no memory for a table of %zu entries", n);
        return false;
    }
    return true;
}

static void reference(mapping *m)
{
    const kvs_schema *schema = m->context->schema;
    bool gpu = may_map_gpu(m);
    for (uint32_t p = 0; p < m->n_parts; p++) {
        kvs_read *reads = m->reads + (size_t)p * m->n_blocks;
        for (uint32_t b = 0; b < m->n_blocks; b++)
            reads[b] =
                (kvs_read){.block = kvs_context_block(m->context, m->first + b), .raise = gpu};
        kvs_index_ref(m->server->index, schema, m->parts[p], 0, 0, reads, m->n_blocks);
        for (uint32_t b = 0; b < m->n_blocks; b++) {
            if (reads[b].raise)
                kvs_gpu_raise(m->server, schema, m->parts[p], &reads[b]);
            reads[b].gpu = reads[b].gpu && gpu;
        }
        m->reserved_bytes += (uint64_t)m->n_blocks * schema->parts[m->parts[p]].value_bytes;
    }
    m->reserved_bytes = kvs_map_reserve(m->server->maps, &schema->tenant, m->reserved_bytes);
}

/* Values that stay unpinned gather at the end of the list. */
static void drop(mapping *m, uint32_t value)
{
    size_t n = (size_t)m->n_blocks * m->n_parts;
    m->values[n - ++m->n_dropped] = value;
}

/* The reply can name no further segment. The lease took a descriptor of a connection's first. */
static bool is_full(const mapping *m, bool gpu)
{
    return (m->n_fds == KVT_MAX_FDS && !gpu) ||
           m->reply.u.map_context.n_segments == KVC_MAX_MAP_SEGMENTS;
}

/* Where a value lies. */
typedef struct lying {
    kvs_map_segment segment;
    uint64_t len_bytes, off_bytes; /* of the segment, in it */
    kvc_gpu_handle handle;
} lying;

/* False: the tier cannot tell others. */
static bool locate(const mapping *m, const kvs_read *read, bool gpu, lying *l)
{
    const kvs_store *store = &m->server->gpu;
    kvs_dram_segment segment;
    kvs_tier_place place;
    if (gpu) {
        if (!store->ops->locate ||
            store->ops->locate(store->tier, read->gpu_slot, &place) != KVC_OK)
            return false;
        *l = (lying){{.gpu = true, .number = place.segment, .fd = -1},
                     place.len_bytes,
                     place.off_bytes,
                     place.handle};
        return true;
    }
    if (kvs_dram_locate(m->server->dram.tier, read->slot, &segment, &l->off_bytes) != KVC_OK)
        return false;
    l->segment = (kvs_map_segment){.number = segment.number, .fd = segment.fd};
    l->len_bytes = segment.len_bytes;
    return true;
}

/* Finds the value's place in one of its tiers. */
static kvs_map_place look_up(mapping *m, const kvs_read *read, bool gpu, bool fits, lying *l)
{
    kvs_map_place at = {.fd = -1, .capped = gpu};
    if (locate(m, read, gpu, l))
        kvs_map_place_value(m->server->maps, m->call->peer->id, m->reply.u.map_context.map,
                            read->value, &l->segment, is_full(m, gpu), fits, &at);
    return at;
}

/* The segment is new to the connection: it goes with the reply. */
static void bring(mapping *m, const kvs_map_place *at, const lying *l)
{
    kvc_map_segment *segment = &m->segments[m->reply.u.map_context.n_segments++];
    *segment = (kvc_map_segment){
        .id = at->id, .gpu = l->segment.gpu, .len_bytes = l->len_bytes, .handle = l->handle};
    if (at->fd >= 0)
        m->fds[m->n_fds++] = at->fd;
}

/* One value's entry. False: its segment cannot be passed in this reply. */
static bool place(mapping *m, const kvs_read *read, uint32_t value_bytes, uint8_t *entry)
{
    lying l = {0};
    if (read->where != KVS_IN_DRAM && !read->gpu) {
        if (read->where == KVS_IN_LMDB)
            drop(m, read->value);
        return true;
    }
    bool fits = m->used_bytes + value_bytes <= m->reserved_bytes;
    kvs_map_place at = look_up(m, read, read->gpu, fits, &l);
    if (read->gpu && at.id == 0 && at.capped && read->where == KVS_IN_DRAM)
        at = look_up(m, read, false, fits, &l);
    if (!fits && !at.again) { /* what the map has already needs no room */
        m->reply.u.map_context.unpinned++;
        drop(m, read->value);
        return true;
    }
    if (at.id == 0 && !at.capped)
        return false;
    if (at.fresh)
        bring(m, &at, &l);
    if (at.id > 0) {
        kvc_le_put(entry, at.id, 4);
        kvc_le_put(entry + 4, (uint32_t)(l.off_bytes / KVS_DRAM_PAGE_BYTES), 4);
    }
    m->reply.u.map_context.unpinned += at.capped;
    if (at.capped || at.again) {
        drop(m, read->value);
        return true;
    }
    m->values[m->n_pinned++] = read->value;
    m->used_bytes += value_bytes;
    return true;
}

/* One block's entries. False: there was no room for all of its segments, and nothing of it or of
 * what follows is pinned. */
static bool fill_block(mapping *m, uint32_t block)
{
    uint32_t n_before = m->n_pinned, unpinned_before = m->reply.u.map_context.unpinned, p = 0;
    uint64_t used_before = m->used_bytes;
    for (; p < m->n_parts; p++) {
        size_t at = (size_t)block * m->n_parts + p;
        uint32_t bytes = m->context->schema->parts[m->parts[p]].value_bytes;
        if (!place(m, &m->reads[(size_t)p * m->n_blocks + block], bytes,
                   m->table + at * ENTRY_BYTES))
            break;
    }
    if (p == m->n_parts)
        return true;
    m->used_bytes = used_before;
    m->reply.u.map_context.unpinned = unpinned_before; /* they are asked for again */
    while (m->n_pinned > n_before) {
        uint32_t value = m->values[--m->n_pinned];
        drop(m, value);
    }
    for (uint32_t b = block; b < m->n_blocks; b++) {
        for (uint32_t k = b == block ? p : 0; k < m->n_parts; k++) {
            const kvs_read *read = &m->reads[(size_t)k * m->n_blocks + b];
            if (read->where == KVS_IN_DRAM || read->where == KVS_IN_LMDB)
                drop(m, read->value);
        }
    }
    return false;
}

/* The table, block after block. Where a reply can bring no more segments it ends before that block,
 * whose values are let go, with all behind it. */
static void fill(mapping *m)
{
    uint32_t b = 0;
    while (b < m->n_blocks && fill_block(m, b))
        b++;
    m->reply.u.map_context.n_blocks = b;
    size_t n = (size_t)m->n_blocks * m->n_parts;
    kvs_index_unref(m->server->index, m->values + n - m->n_dropped, m->n_dropped);
    KVC_COUNT_N(map_unpinned_values, m->reply.u.map_context.unpinned);
}

static void answer(mapping *m)
{
    size_t n = (size_t)m->reply.u.map_context.n_blocks * m->n_parts;
    kvt_slice slice = {m->table, n * ENTRY_BYTES, free, m->table};
    m->reply.u.map_context.segments = m->segments;
    m->reply.u.map_context.max_bytes = kvs_map_max_bytes(m->server->maps);
    m->reply.u.map_context.pinned_bytes =
        kvs_map_pinned(m->server->maps, &m->context->schema->tenant);
    m->call->fds = m->fds;
    m->call->n_fds = m->n_fds;
    m->table = NULL;
    kvs_context_put(m->server->contexts, m->context);
    m->context = NULL;
    m->n_fds = 0; /* the reply's */
    kvs_answer(m->call, &m->reply, &slice, 1);
}

static void run(mapping *m)
{
    uint64_t peer = m->call->peer->id, number = m->call->req.u.map_context.map;
    const kvc_digest *tenant = &m->context->schema->tenant;
    kvs_lease_at lease;
    kvc_status status = kvs_map_begin(m->server->maps, peer, tenant, &number, &lease);
    if (status != KVC_OK) {
        kvs_fail(m->call, status,
                 status == KVC_NOT_FOUND ? "the map was taken back: begin another"
                                         : "no map can be begun on this connection");
        return;
    }
    m->reply = (kvc_reply){.method = KVC_MAP_CONTEXT};
    m->reply.u.map_context.map = number;
    m->reply.u.map_context.lease_slot = lease.slot;
    m->reply.u.map_context.lease_bytes = lease.lease_bytes;
    if (lease.fd >= 0)
        m->fds[m->n_fds++] = lease.fd;
    reference(m);
    fill(m);
    uint32_t n_taken = m->n_pinned;
    status = kvs_map_add(m->server->maps, peer, number, m->values, &n_taken, m->used_bytes,
                         m->reserved_bytes);
    if (status == KVC_OK) {
        kvs_index_unref(m->server->index, m->values + n_taken, m->n_pinned - n_taken);
        answer(m);
        return;
    }
    kvs_index_unref(m->server->index, m->values, m->n_pinned);
    uint32_t ids[KVC_MAX_MAP_SEGMENTS], n_ids = m->reply.u.map_context.n_segments;
    for (uint32_t i = 0; i < n_ids; i++)
        ids[i] = m->segments[i].id;
    kvs_map_unpass(m->server->maps, peer, ids, n_ids, lease.fd >= 0);
    if (m->call->req.u.map_context.map == 0) /* nobody will hear of it */
        kvs_map_release(m->server->maps, peer, number);
    kvs_fail(m->call, status, "the map was taken back while it grew, or memory is out");
}

void kvs_on_map_context(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    if (!may_map(server, call))
        return;
    if (call->req.u.map_context.n_unmapped > 0)
        kvs_map_unpass(server->maps, call->peer->id, call->req.u.map_context.unmapped,
                       call->req.u.map_context.n_unmapped, false);
    if (call->req.u.map_context.release) {
        kvc_reply reply = {.method = KVC_MAP_CONTEXT};
        kvs_map_release(server->maps, call->peer->id, call->req.u.map_context.map);
        kvs_answer(call, &reply, NULL, 0);
        return;
    }
    mapping *m = calloc(1, sizeof(*m));
    if (!m) {
        kvs_fail(call, KVC_NO_MEMORY, "no memory");
        return;
    }
    m->server = server;
    m->call = call;
    if (choose(m, tenant))
        run(m);
    if (m->context)
        kvs_context_put(server->contexts, m->context);
    for (uint32_t i = 0; i < m->n_fds; i++)
        (void)close(m->fds[i]);
    free(m->reads);
    free(m->values);
    free(m->table);
    free(m);
}
