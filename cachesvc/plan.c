/*
 * plan.c: from the groups of a FetchRows to the values that it reads.
 *
 * Transport threads. Invariants: the contexts stay referenced until every value is, since block
 * ids are valid only while a context or a value holds the block; a failed plan holds nothing.
 */
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "cascade.h"
#include "fetch.h"
#include "gpu.h"

/* From a block's place in the context to its read, within one group; all zero is empty. */
typedef struct block_slot {
    uint32_t key;  /* place + 1 */
    uint32_t read; /* number + 1 */
} block_slot;

typedef struct block_map {
    block_slot *slots;
    uint32_t mask;
} block_map;

static uint32_t map_size(uint32_t n_places)
{
    uint32_t size = 16;
    while (size < 2 * n_places)
        size *= 2;
    return size;
}

/* Empties as much of the map as n places need, so that a small group costs little. */
static void map_clear(block_map *map, uint32_t n_places)
{
    map->mask = map_size(n_places) - 1;
    memset(map->slots, 0, ((size_t)map->mask + 1) * sizeof(*map->slots));
}

/* The slot of a place; its read is 0 the first time. */
static block_slot *map_find(block_map *map, uint32_t place)
{
    uint32_t i = (place * 2654435761u >> 7) & map->mask;
    while (map->slots[i].key != place + 1 && map->slots[i].key != 0)
        i = (i + 1) & map->mask;
    map->slots[i].key = place + 1;
    return &map->slots[i];
}

kvc_status kvs_fetch_check_limits(kvs_server *server, kvt_call *call, uint32_t *n_picks_p)
{
    const kvc_request *req = &call->req;
    const kvc_limits *limits = &server->limits;
    uint64_t n_picks = 0;
    if (req->u.fetch_rows.n_groups > limits->max_groups) {
        kvs_fail(call, KVC_INVALID, "%u groups; max_groups is %u", req->u.fetch_rows.n_groups,
                 limits->max_groups);
        return KVC_INVALID;
    }
    for (uint32_t g = 0; g < req->u.fetch_rows.n_groups; g++)
        n_picks += req->u.fetch_rows.groups[g].n_picks;
    if (n_picks > limits->max_picks) {
        kvs_fail(call, KVC_INVALID, "%llu picks; max_picks is %u", (unsigned long long)n_picks,
                 limits->max_picks);
        return KVC_INVALID;
    }
    *n_picks_p = (uint32_t)n_picks;
    return KVC_OK;
}

static kvc_status alloc_tables(kvs_fetch *fetch)
{
    size_t n = fetch->n_picks ? fetch->n_picks : 1;
    uint32_t n_groups = fetch->n_groups;
    /* Room for a read of every pick, though most have fewer: only what is added is written. */
    fetch->reads = malloc(n * sizeof(*fetch->reads));
    fetch->extra = malloc(n * sizeof(*fetch->extra));
    fetch->pick_read = malloc(4 * n * sizeof(*fetch->pick_read));
    fetch->pick_row = malloc(n * sizeof(*fetch->pick_row));
    fetch->contexts = calloc(n_groups ? n_groups : 1, sizeof(kvs_context *));
    if (!fetch->reads || !fetch->extra || !fetch->pick_read || !fetch->pick_row ||
        !fetch->contexts) {
        kvs_fail(fetch->call, KVC_NO_MEMORY, "no memory for %u picks", fetch->n_picks);
        return KVC_NO_MEMORY;
    }
    fetch->pick_next = fetch->pick_read + n;
    fetch->pick_off = fetch->pick_next + n;
    fetch->lmdb_reads = fetch->pick_off + n;
    return KVC_OK;
}

kvc_status kvs_fetch_group(kvs_server *server, kvt_call *call, const kvc_digest *tenant, uint32_t g,
                           kvs_context **context_p, uint32_t *part_p)
{
    const kvc_row_group *group = &call->req.u.fetch_rows.groups[g];
    kvc_status status = kvs_context_get(server->contexts, tenant, group->context, context_p);
    if (status != KVC_OK) {
        kvs_fail(call, status, "group %u: context %016llx is not open here: open it again", g,
                 (unsigned long long)group->context);
        return status;
    }
    int part = kvs_schema_part((*context_p)->schema, group->part);
    if (part < 0) {
        kvs_context_put(server->contexts, *context_p);
        *context_p = NULL;
        kvs_fail(call, KVC_INVALID, "group %u: part %u is not in the schema", g, group->part);
        return KVC_INVALID;
    }
    *part_p = (uint32_t)part;
    return KVC_OK;
}

/* References each group's context and checks its part; data_bytes: if every row is there. */
static kvc_status find_contexts(kvs_fetch *fetch)
{
    const kvc_request *req = &fetch->call->req;
    uint64_t data_bytes = 0;
    for (uint32_t g = 0; g < req->u.fetch_rows.n_groups; g++) {
        uint32_t part;
        kvc_status status = kvs_fetch_group(fetch->server, fetch->call, fetch->tenant, g,
                                            &fetch->contexts[g], &part);
        if (status == KVC_OK && fetch->look)
            status = fetch->look(fetch, g, fetch->contexts[g]->schema->parts[part].info);
        if (status != KVC_OK)
            return status;
        data_bytes += (uint64_t)req->u.fetch_rows.groups[g].n_picks *
                      fetch->contexts[g]->schema->parts[part].row_bytes;
    }
    if (!fetch->look && data_bytes > fetch->server->limits.max_message_bytes) {
        kvs_fail(fetch->call, KVC_INVALID,
                 "the rows asked for have %llu bytes; max_message_bytes is %u",
                 (unsigned long long)data_bytes, fetch->server->limits.max_message_bytes);
        return KVC_INVALID;
    }
    return KVC_OK;
}

static uint32_t add_read(kvs_fetch *fetch, const kvs_context *context, uint32_t part,
                         uint32_t place)
{
    uint32_t read = fetch->n_reads++;
    fetch->reads[read] = (kvs_read){.block = kvs_context_block(context, place), .raise = true};
    fetch->extra[read] = (kvs_fetch_read){.schema = context->schema,
                                          .part = part,
                                          .first_pick = KVS_NO_READ,
                                          .last_pick = KVS_NO_READ,
                                          .status = KVC_NOT_FOUND};
    return read;
}

static void add_pick(kvs_fetch *fetch, uint32_t pick, uint32_t read, uint32_t row)
{
    kvs_fetch_read *extra = &fetch->extra[read];
    fetch->pick_read[pick] = read;
    fetch->pick_row[pick] = (uint16_t)row;
    fetch->pick_next[pick] = KVS_NO_READ;
    if (extra->first_pick == KVS_NO_READ) /* NOLINT: add_read wrote it */
        extra->first_pick = pick;
    else
        fetch->pick_next[extra->last_pick] = pick;
    extra->last_pick = pick;
    fetch->reads[read].n_rows++;
}

/* One group's picks; first: number of its first pick. */
static void plan_group(kvs_fetch *fetch, const kvc_row_group *group, kvs_context *context,
                       uint32_t first, block_map *map)
{
    uint32_t n_blocks = atomic_load(&context->n_blocks);
    uint32_t block_tokens = context->schema->block_tokens;
    uint32_t part = (uint32_t)kvs_schema_part(context->schema, group->part);
    uint32_t last_place = UINT32_MAX, last_read = KVS_NO_READ;
    map_clear(map, group->n_picks < n_blocks ? group->n_picks : n_blocks);
    for (uint32_t i = 0; i < group->n_picks; i++) {
        uint32_t place = group->picks[i] / block_tokens;
        if (place >= n_blocks) {
            fetch->pick_read[first + i] = KVS_NO_READ;
            continue;
        }
        if (place != last_place) {
            block_slot *slot = map_find(map, place);
            if (slot->read == 0)
                slot->read = add_read(fetch, context, part, place) + 1;
            last_place = place;
            last_read = slot->read - 1;
        }
        add_pick(fetch, first + i, last_read, group->picks[i] - place * block_tokens);
    }
}

/* References the reads [first, n_reads), all of one group, and starts promotions. */
static void ref_group(kvs_fetch *fetch, const kvs_schema *schema, uint32_t part, uint32_t first)
{
    kvs_server *server = fetch->server;
    uint64_t percent = server->settings.promote_percent;
    uint32_t rows = (uint32_t)((schema->block_tokens * percent + 99) / 100);
    kvs_index_ref(server->index, schema, part, rows, atomic_load(&server->window),
                  fetch->reads + first, fetch->n_reads - first);
    for (uint32_t r = first; r < fetch->n_reads; r++) {
        const kvs_read *read = &fetch->reads[r];
        kvs_fetch_read *extra = &fetch->extra[r];
        if (read->where == KVS_NOWHERE)
            continue;
        extra->status = read->where == KVS_BUSY ? KVC_AGAIN : KVC_OK;
        if (read->where == KVS_IN_DRAM)
            extra->base = server->dram.ops->map(server->dram.tier, read->slot);
        if (read->where == KVS_IN_LMDB)
            fetch->lmdb_reads[fetch->n_lmdb++] = r;
        if (read->promote)
            kvs_cascade_promote(server, schema, part, read->value, read->slot);
        if (read->raise)
            kvs_gpu_raise(server, schema, part, read);
    }
}

static kvc_status plan_groups(kvs_fetch *fetch)
{
    const kvc_request *req = &fetch->call->req;
    uint32_t first = 0, most = 0;
    block_map map = {0};
    for (uint32_t g = 0; g < req->u.fetch_rows.n_groups; g++)
        if (req->u.fetch_rows.groups[g].n_picks > most)
            most = req->u.fetch_rows.groups[g].n_picks;
    map.slots = malloc(map_size(most) * sizeof(*map.slots));
    if (!map.slots) {
        kvs_fail(fetch->call, KVC_NO_MEMORY, "no memory for %u picks", fetch->n_picks);
        return KVC_NO_MEMORY;
    }
    for (uint32_t g = 0; g < req->u.fetch_rows.n_groups; g++) {
        const kvc_row_group *group = &req->u.fetch_rows.groups[g];
        kvs_context *context = fetch->contexts[g];
        uint32_t first_read = fetch->n_reads;
        plan_group(fetch, group, context, first, &map);
        if (fetch->n_reads > first_read)
            ref_group(fetch, context->schema, fetch->extra[first_read].part, first_read);
        first += group->n_picks;
    }
    free(map.slots);
    return KVC_OK;
}

kvc_status kvs_fetch_plan(kvs_fetch *fetch)
{
    kvc_status status = kvs_fetch_check_limits(fetch->server, fetch->call, &fetch->n_picks);
    if (status != KVC_OK)
        return status;
    fetch->n_groups = fetch->call->req.u.fetch_rows.n_groups;
    status = alloc_tables(fetch);
    if (status != KVC_OK)
        return status;
    status = find_contexts(fetch);
    if (status == KVC_OK)
        status = plan_groups(fetch);
    for (uint32_t g = 0; g < fetch->n_groups; g++)
        if (fetch->contexts[g])
            kvs_context_put(fetch->server->contexts, fetch->contexts[g]);
    return status;
}
