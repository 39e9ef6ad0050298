/*
 * map_call.c: maps of contexts, from the first table to the last, and the interface to them.
 *
 * Caller's threads, which block. Invariant: a table is put in place only if the context has not
 * been cut since it was asked for.
 */
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/le.h"
#include "map.h"

#define ENTRY_BYTES 8u
#define PAGE_BYTES  4096u
#define ATTEMPTS    3

/* An entry as an address, *gpu_p: of a GPU's; NULL: by request, also where the segment is not known
 * here. */
static const uint8_t *place_of(kvci_map *map, const uint8_t *entry, uint64_t value_bytes,
                               bool *gpu_p)
{
    const kvci_epoch *epoch = map->epoch;
    uint32_t id = (uint32_t)kvc_le_get(entry, 4);
    uint64_t off_bytes = (uint64_t)(uint32_t)kvc_le_get(entry + 4, 4) * PAGE_BYTES;
    kvci_segment *segment = id == 0 || id >= epoch->n_segments ? NULL : epoch->segments[id];
    if (segment == NULL || off_bytes + value_bytes > segment->len_bytes ||
        (segment->gpu_close != NULL && map->gpu == NULL) || !kvci_map_uses(map, segment))
        return NULL;
    *gpu_p = segment->gpu_close != NULL;
    return segment->base + off_bytes;
}

/* Adds a reply's table behind what the map has. False: it is not the table that was asked for. */
static bool add_table(kvci_map *map, const kvci_map_answer *a, uint32_t room)
{
    uint32_t n = a->reply.u.map_context.n_blocks, first = atomic_load(&map->n_blocks);
    if (n > room - first || a->table_bytes != (uint64_t)n * map->n_parts * ENTRY_BYTES)
        return false;
    for (size_t i = 0; i < (size_t)n * map->n_parts; i++) {
        uint64_t bytes = (uint64_t)map->row_bytes[i % map->n_parts] * map->block_tokens;
        bool gpu = false;
        const uint8_t *at = place_of(map, a->table + i * ENTRY_BYTES, bytes, &gpu);
        (gpu ? map->gpu : map->values)[(size_t)first * map->n_parts + i] = at;
        map->info.values += at != NULL;
        map->info.by_request += at == NULL;
    }
    atomic_store(&map->n_blocks, first + n);
    map->info.pinned_bytes = a->reply.u.map_context.pinned_bytes;
    map->info.max_bytes = a->reply.u.map_context.max_bytes;
    return true;
}

/* ---- a map from its first reply to its last ----------------------------------------------------
 */

typedef struct plan {
    kvc_context *context;
    const uint32_t *parts; /* [n_parts] */
    const uint32_t *row_bytes;
    uint32_t n_parts, block_tokens, n_blocks, n_cuts;
    uint64_t deadline_ns;
} plan;

/* Asks for what is behind the first n_old blocks, until all is answered. NOT_FOUND: the server
 * knows the old map no more. */
static kvc_status extend(const plan *p, const kvci_map *old, kvci_map **map_p)
{
    kvc_client *client = p->context->client;
    kvci_map *map = NULL;
    kvc_status status = KVC_OK;
    uint32_t first = old != NULL ? atomic_load(&old->n_blocks) : 0;
    uint64_t number = old != NULL ? old->number : 0;
    KVC_ASSERT(p->parts != NULL && p->row_bytes != NULL);
    *map_p = NULL;
    do {
        kvci_map_answer a = {0};
        kvc_request req = {.method = KVC_MAP_CONTEXT};
        req.u.map_context.map = number;
        req.u.map_context.n_parts = p->n_parts;
        req.u.map_context.parts = p->parts;
        req.u.map_context.first_block = first;
        req.u.map_context.n_blocks = p->n_blocks - first;
        req.u.map_context.gpu = client->map_opts.gpu_open != NULL;
        status = kvci_map_ask(p->context, &req, p->deadline_ns, &a, &number);
        if (status == KVC_OK && map == NULL) {
            map = kvci_map_create(client->epoch, old, first, p->n_blocks, p->n_parts,
                                  client->map_opts.gpu_open != NULL);
            status = map != NULL ? KVC_OK : kvci_fail(KVC_NO_MEMORY, "map: no memory");
        }
        if (map != NULL)
            map->client = client;
        if (status == KVC_OK && map != NULL && old == NULL && first == 0) {
            map->number = number;
            map->slot = a.reply.u.map_context.lease_slot;
            map->block_tokens = p->block_tokens;
            memcpy(map->parts, p->parts, p->n_parts * sizeof(*p->parts));
            memcpy(map->row_bytes, p->row_bytes, p->n_parts * sizeof(*p->row_bytes));
        }
        if (status == KVC_OK && map != NULL && !add_table(map, &a, p->n_blocks))
            status = kvci_fail(KVC_PROTOCOL, "map: the table makes no sense");
        bool more = a.reply.u.map_context.n_blocks + a.reply.u.map_context.n_segments > 0;
        kvci_map_answer_fini(&a);
        if (status != KVC_OK || map == NULL || !more)
            break;
        first = atomic_load(&map->n_blocks);
    } while (first < p->n_blocks);
    if (status != KVC_OK && old == NULL && number != 0)
        kvci_map_release(client, number, false);
    if (status != KVC_OK) {
        kvci_map_unref(map);
        return status;
    }
    *map_p = map;
    return KVC_OK;
}

/* Puts it in the place of the old one, unless the context was cut meanwhile. */
static kvc_status put_in_place(const plan *p, kvci_map *map, uint64_t boot_id, kvc_map_info *info_p)
{
    kvc_context *context = p->context;
    kvc_client *client = context->client;
    kvc_mutex_lock(&client->lock);
    kvci_map *old = context->map;
    uint64_t old_number = old != NULL ? old->number : 0;
    bool fits = context->n_cuts == p->n_cuts && client->boot_id == boot_id;
    if (fits) {
        map->boot_id = boot_id;
        context->map = map;
        atomic_store(&context->has_map, true);
        if (info_p != NULL)
            *info_p = map->info;
    }
    kvc_mutex_unlock(&client->lock);
    if (!fits) {
        if (old_number != map->number)
            kvci_map_release(client, map->number, false);
        kvci_map_unref(map);
        return kvci_fail(KVC_AGAIN, "map: the context changed meanwhile");
    }
    if (old_number != 0 && old_number != map->number && kvci_map_holds(old))
        kvci_map_release(client, old_number, true);
    kvci_map_unref(old);
    return KVC_OK;
}

static bool covers(const kvci_map *map, const plan *p)
{
    KVC_ASSERT(p->parts != NULL);
    return map != NULL && map->n_parts == p->n_parts && !atomic_load(&map->was_cut) &&
           kvci_map_holds(map) && memcmp(map->parts, p->parts, p->n_parts * sizeof(*p->parts)) == 0;
}

/* Grows the context's map where it has these parts, else makes another. */
static kvc_status map_planned(plan *p, kvc_map_info *info_p)
{
    kvc_client *client = p->context->client;
    kvc_status status = KVC_NOT_FOUND;
    for (int i = 0; i < ATTEMPTS && status == KVC_NOT_FOUND; i++) {
        kvci_map *old = i == 0 ? kvci_map_of(p->context) : NULL, *map = NULL;
        kvc_mutex_lock(&client->lock);
        p->n_cuts = p->context->n_cuts;
        p->n_blocks = atomic_load(&p->context->n_blocks);
        uint64_t boot_id = client->boot_id;
        kvc_mutex_unlock(&client->lock);
        bool grows = covers(old, p);
        /* The server's map still pins what was cut off: it goes first, so that its pins are free
         * for the one that takes its place. */
        if (old != NULL && atomic_load(&old->was_cut) && kvci_map_holds(old))
            kvci_map_release(client, old->number, true);
        if (grows && atomic_load(&old->n_blocks) >= p->n_blocks) {
            if (info_p != NULL)
                *info_p = old->info;
            status = KVC_OK;
        } else {
            status = extend(p, grows ? old : NULL, &map);
            if (status == KVC_OK)
                status = put_in_place(p, map, boot_id, info_p);
        }
        kvci_map_unref(old);
    }
    return status;
}

static const kvc_part *find_part(const kvc_schema *schema, uint32_t number)
{
    for (uint32_t k = 0; k < schema->n_parts; k++)
        if (schema->parts[k].part == number)
            return &schema->parts[k];
    return NULL;
}

/* The schema's view of the parts; n 0: all but compressed keys. Gives *parts_p, [2 * n]. */
static kvc_status find_parts(kvc_context *context, const uint32_t *parts, uint32_t n,
                             uint64_t deadline_ns, plan *p, uint32_t **parts_p)
{
    kvc_schema *schema;
    kvc_status status = kvc_schema_get(context->client, &context->schema, deadline_ns, &schema);
    *parts_p = NULL;
    if (status != KVC_OK)
        return status;
    if (n == 0)
        parts = NULL;
    uint32_t n_want = parts != NULL ? n : schema->n_parts, n_found = 0;
    uint32_t *list = calloc(2 * (size_t)n_want, sizeof(*list));
    for (uint32_t i = 0; list != NULL && i < n_want; i++) {
        const kvc_part *part = parts == NULL ? &schema->parts[i] : find_part(schema, parts[i]);
        if (part == NULL || (parts == NULL && part->kind == KVC_PART_INDEX))
            continue;
        list[n_found] = part->part;
        list[n_want + n_found++] = part->row_bytes;
    }
    *p = (plan){.context = context,
                .parts = list,
                .row_bytes = list == NULL ? NULL : list + n_want,
                .n_parts = n_found,
                .block_tokens = schema->block_tokens,
                .deadline_ns = deadline_ns};
    free(schema);
    *parts_p = list;
    if (list == NULL)
        return kvci_fail(KVC_NO_MEMORY, "map: no memory");
    return n_found > 0 && (n == 0 || n_found == n)
               ? KVC_OK
               : kvci_fail(KVC_INVALID, "map: a part is not in the schema, or there is none");
}

kvc_status kvc_context_map(kvc_context *context, const uint32_t *parts, uint32_t n_parts,
                           uint64_t deadline_ns, kvc_map_info *info_p)
{
    kvc_client *client = context->client;
    plan p;
    uint32_t *list = NULL;
    deadline_ns = kvci_deadline(client, deadline_ns);
    if (n_parts > KVC_MAX_PARTS)
        return kvci_fail(KVC_INVALID, "map: %u parts, at most %u", n_parts, KVC_MAX_PARTS);
    kvc_status status = kvci_mapping_begin(client, deadline_ns);
    if (status != KVC_OK)
        return status;
    status = find_parts(context, parts, n_parts, deadline_ns, &p, &list);
    if (status == KVC_OK)
        status = map_planned(&p, info_p);
    free(list);
    kvci_mapping_end(client);
    return status;
}

void kvci_map_follow(kvc_context *context, uint64_t deadline_ns)
{
    kvc_client *client = context->client;
    kvc_mutex_lock(&client->lock);
    kvci_map *map = context->map;
    bool wanted = ((client->maps_wanted && !client->maps_refused) || map != NULL) &&
                  kvc_now_ns() >= client->maps_pause_ns;
    if (map != NULL && wanted)
        atomic_fetch_add(&map->refs, 1);
    kvc_mutex_unlock(&client->lock);
    if (!wanted)
        return;
    kvc_status status = kvc_context_map(context, map == NULL ? NULL : map->parts,
                                        map == NULL ? 0 : map->n_parts, deadline_ns, NULL);
    kvci_map_unref(map);
    if (status != KVC_UNSUPPORTED && status != KVC_DENIED)
        return;
    kvc_mutex_lock(&client->lock);
    client->maps_refused = true; /* until there is another link */
    kvc_mutex_unlock(&client->lock);
}

void kvci_map_cut(kvc_context *context, uint32_t n)
{
    kvc_client *client = context->client;
    kvc_mutex_lock(&client->lock);
    context->n_cuts++;
    if (context->map != NULL && atomic_load(&context->map->n_blocks) > n) {
        atomic_store(&context->map->n_blocks, n);
        atomic_store(&context->map->was_cut, true);
    }
    kvc_mutex_unlock(&client->lock);
}

static void drop(kvc_context *context, bool wait)
{
    kvc_client *client = context->client;
    kvc_mutex_lock(&client->lock);
    kvci_map *map = context->map;
    /* A suspect link may stay: the release waits for that. To a new one it says nothing. */
    bool connected = client->link != NULL && !client->closing;
    context->map = NULL;
    atomic_store(&context->has_map, false);
    kvc_mutex_unlock(&client->lock);
    if (map != NULL && connected)
        kvci_map_release(client, map->number, wait);
    kvci_map_unref(map);
}

void kvci_map_drop(kvc_context *context)
{
    drop(context, false);
}

void kvc_context_unmap(kvc_context *context)
{
    drop(context, true);
}

kvc_status kvc_client_map_contexts(kvc_client *client, const kvc_map_opts *opts)
{
    kvc_map_opts taken;
    if (!kvci_take_sized(&taken, opts, offsetof(kvc_map_opts, keep_ns), sizeof(taken)))
        return kvci_fail(KVC_INVALID, "map: size_bytes is not that of kvc_map_opts");
    if ((taken.gpu_open != NULL) != (taken.gpu_close != NULL))
        return kvci_fail(KVC_INVALID, "map: gpu_open and gpu_close go together");
    kvc_status status = kvci_mapping_begin(client, kvci_deadline(client, 0));
    if (status != KVC_OK)
        return status;
    client->map_opts = taken;
    kvc_mutex_lock(&client->lock);
    client->maps_wanted = taken.all;
    kvc_mutex_unlock(&client->lock);
    kvci_mapping_end(client);
    return KVC_OK;
}

kvc_status kvc_context_locate(kvc_context *context, uint32_t part, uint32_t block,
                              kvc_mapped_value *value_p)
{
    kvci_map *map = kvci_map_of(context);
    int i = map == NULL ? -1 : kvci_map_part(map, part);
    *value_p = (kvc_mapped_value){0};
    if (i >= 0 && block < atomic_load(&map->n_blocks)) {
        size_t at = (size_t)block * map->n_parts + (uint32_t)i;
        value_p->rows = map->values[at];
        value_p->device_rows = map->gpu != NULL ? map->gpu[at] : NULL;
        value_p->row_bytes = map->row_bytes[i];
        value_p->stamp = map->number;
    }
    bool found = (value_p->rows != NULL || value_p->device_rows != NULL) && kvci_map_holds(map);
    kvci_map_unref(map);
    return found ? KVC_OK
                 : kvci_fail(KVC_NOT_FOUND, "map: part %u of block %u is not mapped", part, block);
}

bool kvc_context_is_mapped(kvc_context *context, uint64_t stamp)
{
    kvci_map *map = kvci_map_of(context);
    bool holds = map != NULL && map->number == stamp && kvci_map_holds(map);
    kvci_map_unref(map);
    return holds;
}

kvc_map_hold *kvc_context_hold_map(kvc_context *context, uint64_t stamp)
{
    kvci_map *map = kvci_map_of(context);
    if (map != NULL && map->number == stamp && kvci_map_holds(map))
        return (kvc_map_hold *)map;
    kvci_map_unref(map);
    return NULL;
}

void kvc_map_let_go(kvc_map_hold *hold)
{
    kvci_map_unref((kvci_map *)hold);
}
