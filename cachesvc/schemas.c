/*
 * schemas.c: the table of schemas; see schemas.h.
 *
 * Any thread. Lookups scan linearly: a server holds a handful of schemas, and a request looks one
 * up once. Invariant: an entry that is held is neither retired nor removed.
 */
#include "schemas.h"

#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/digest.h"
#include "opaque.h"

int kvs_schema_part(const kvs_schema *schema, uint32_t part_id)
{
    uint32_t lo = 0, hi = schema->n_parts;
    if (part_id < hi && schema->parts[part_id].id == part_id)
        return (int)part_id;
    while (lo < hi) {
        uint32_t mid = (lo + hi) / 2;
        if (schema->parts[mid].id < part_id)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo < schema->n_parts && schema->parts[lo].id == part_id ? (int)lo : -1;
}

kvs_schemas *kvs_schemas_create(void)
{
    kvs_schemas *schemas = calloc(1, sizeof(*schemas));
    if (!schemas)
        return NULL;
    schemas->piece_bytes = KVC_MAX_VALUE_BYTES;
    kvc_mutex_init(&schemas->lock, KVC_RANK_SCHEMA);
    return schemas;
}

static void entry_free(kvs_schema *entry)
{
    if (!entry)
        return;
    free(entry->parts);
    free(entry->schema);
    free(entry);
}

void kvs_schemas_destroy(kvs_schemas *schemas)
{
    if (!schemas)
        return;
    for (uint32_t i = 1; i <= schemas->n_top; i++)
        entry_free(schemas->by_id[i]);
    kvc_mutex_fini(&schemas->lock);
    free(schemas);
}

static kvs_schema *find_locked(kvs_schemas *schemas, const kvc_digest *tenant,
                               const kvc_digest *digest)
{
    for (uint32_t i = 1; i <= schemas->n_top; i++) {
        kvs_schema *entry = schemas->by_id[i];
        if (entry && kvc_digest_equal(&entry->digest, digest) &&
            kvc_digest_equal(&entry->tenant, tenant))
            return entry;
    }
    return NULL;
}

const kvs_schema *kvs_schemas_find(kvs_schemas *schemas, const kvc_digest *tenant,
                                   const kvc_digest *digest)
{
    kvc_mutex_lock(&schemas->lock);
    const kvs_schema *entry = find_locked(schemas, tenant, digest);
    if (entry && schemas->use[entry->id].retired)
        entry = NULL;
    if (entry)
        schemas->use[entry->id].users++;
    kvc_mutex_unlock(&schemas->lock);
    return entry;
}

void kvs_schemas_hold(kvs_schemas *schemas, const kvs_schema *schema)
{
    kvc_mutex_lock(&schemas->lock);
    KVC_ASSERT(!schemas->use[schema->id].retired);
    schemas->use[schema->id].users++;
    kvc_mutex_unlock(&schemas->lock);
}

void kvs_schemas_put(kvs_schemas *schemas, const kvs_schema *schema)
{
    if (!schema)
        return;
    kvc_mutex_lock(&schemas->lock);
    KVC_ASSERT(schemas->use[schema->id].users > 0);
    schemas->use[schema->id].users--;
    schemas->use[schema->id].used_ns = kvc_now_ns();
    kvc_mutex_unlock(&schemas->lock);
}

const kvs_schema *kvs_schemas_retire(kvs_schemas *schemas, uint64_t idle_ns,
                                     bool (*in_use)(void *arg, uint32_t id), void *arg)
{
    const kvs_schema *found = NULL;
    kvc_mutex_lock(&schemas->lock);
    for (uint32_t i = 1; !found && i <= schemas->n_top; i++) {
        if (!schemas->by_id[i] || schemas->use[i].users || schemas->use[i].retired ||
            schemas->use[i].used_ns >= idle_ns || in_use(arg, i))
            continue;
        schemas->use[i].retired = true;
        found = schemas->by_id[i];
    }
    kvc_mutex_unlock(&schemas->lock);
    return found;
}

void kvs_schemas_remove(kvs_schemas *schemas, const kvs_schema *schema)
{
    kvc_mutex_lock(&schemas->lock);
    kvs_schema *entry = schemas->by_id[schema->id];
    KVC_ASSERT(entry == schema && schemas->use[schema->id].retired);
    schemas->by_id[schema->id] = NULL;
    schemas->n--;
    kvc_mutex_unlock(&schemas->lock);
    entry_free(entry);
}

void kvs_schemas_keep(kvs_schemas *schemas, const kvs_schema *schema)
{
    kvc_mutex_lock(&schemas->lock);
    KVC_ASSERT(schemas->use[schema->id].retired);
    schemas->use[schema->id].retired = false;
    schemas->use[schema->id].used_ns = kvc_now_ns(); /* the next attempt is a while off */
    kvc_mutex_unlock(&schemas->lock);
}

static int part_order(const void *a, const void *b)
{
    uint32_t x = ((const kvs_part *)a)->id, y = ((const kvs_part *)b)->id;
    return (x > y) - (x < y);
}

static void part_fill(kvs_part *out, const kvc_part *part, uint32_t block_tokens)
{
    out->id = part->part;
    out->info = part;
    out->row_bytes = part->row_bytes;
    out->n_rows = block_tokens;
    out->value_bytes = part->row_bytes * block_tokens;
    out->is_index = part->kind == KVC_PART_INDEX;
    out->window_blocks = part->window / block_tokens + (part->window % block_tokens != 0);
}

/* An opaque schema's table has the rooms of pieces. */
static void fill_parts(kvs_schema *entry)
{
    if (entry->piece_bytes) {
        kvs_opaque_rooms(entry->piece_bytes, entry->parts);
        return;
    }
    for (uint32_t i = 0; i < entry->n_parts; i++)
        part_fill(&entry->parts[i], &entry->schema->parts[i], entry->block_tokens);
    qsort(entry->parts, entry->n_parts, sizeof(*entry->parts), part_order);
}

static kvc_status entry_create(uint32_t piece_bytes, const kvc_digest *tenant,
                               const kvc_schema *schema, kvs_schema **entry_p)
{
    kvc_status status = KVC_NO_MEMORY;
    kvs_schema *entry = calloc(1, sizeof(*entry));
    if (!entry)
        return status;
    entry->tenant = *tenant;
    entry->block_tokens = schema->block_tokens;
    entry->n_parts = schema->opaque ? KVS_OPAQUE_CODES : schema->n_parts;
    entry->piece_bytes = schema->opaque ? piece_bytes : 0;
    entry->schema = kvc_schema_copy(schema);
    entry->parts = calloc(entry->n_parts, sizeof(*entry->parts));
    if (!entry->schema || !entry->parts)
        goto err_entry;
    status = kvc_schema_digest(schema, &entry->digest);
    if (status != KVC_OK)
        goto err_entry;
    fill_parts(entry);
    *entry_p = entry;
    return KVC_OK;
err_entry:
    entry_free(entry);
    return status;
}

/* Gives the entry a free id and holds it; there is one. */
static void insert_locked(kvs_schemas *schemas, kvs_schema *entry)
{
    uint32_t id = 1;
    while (id <= schemas->n_top && schemas->by_id[id])
        id++;
    if (id > schemas->n_top)
        schemas->n_top = id;
    entry->id = id;
    schemas->by_id[id] = entry;
    schemas->use[id].users = 1;
    schemas->use[id].retired = false;
    schemas->n++;
}

kvc_status kvs_schemas_add(kvs_schemas *schemas, const kvc_digest *tenant, const kvc_schema *schema,
                           uint32_t (*class_of)(void *arg, const kvc_digest *tenant,
                                                uint32_t value_bytes, uint32_t n_rows),
                           void *arg, const kvs_schema **schema_p, bool *new_p)
{
    *schema_p = NULL;
    kvs_schema *entry = NULL;
    kvc_status status = entry_create(schemas->piece_bytes, tenant, schema, &entry);
    if (status != KVC_OK)
        return status;
    for (uint32_t i = 0; i < entry->n_parts; i++)
        entry->parts[i].cls =
            class_of(arg, tenant, entry->parts[i].value_bytes, entry->parts[i].n_rows);
    kvc_mutex_lock(&schemas->lock);
    kvs_schema *old = find_locked(schemas, tenant, &entry->digest);
    if (!old && schemas->n == KVS_MAX_SCHEMAS) {
        status = KVC_NO_SPACE;
    } else if (!old) {
        insert_locked(schemas, entry);
    } else if (schemas->use[old->id].retired) {
        status = KVC_AGAIN;
        old = NULL;
    } else {
        schemas->use[old->id].users++;
    }
    kvc_mutex_unlock(&schemas->lock);
    if (new_p)
        *new_p = !old && status == KVC_OK;
    if (old || status != KVC_OK)
        entry_free(entry);
    *schema_p = old ? old : (status == KVC_OK ? entry : NULL);
    return status;
}

uint32_t kvs_schemas_list(kvs_schemas *schemas, const kvc_digest *tenant, kvc_digest *out,
                          uint8_t *opaque, uint32_t max)
{
    uint32_t n = 0;
    kvc_mutex_lock(&schemas->lock);
    for (uint32_t i = 1; i <= schemas->n_top && n < max; i++) {
        if (!schemas->by_id[i] || !kvc_digest_equal(&schemas->by_id[i]->tenant, tenant))
            continue;
        opaque[n] = schemas->by_id[i]->piece_bytes != 0;
        out[n++] = schemas->by_id[i]->digest;
    }
    kvc_mutex_unlock(&schemas->lock);
    return n;
}

uint32_t kvs_schemas_count(kvs_schemas *schemas)
{
    kvc_mutex_lock(&schemas->lock);
    uint32_t n = schemas->n;
    kvc_mutex_unlock(&schemas->lock);
    return n;
}
