/*
 * recover.c: what lmdb has, into the index, when a server starts; see recover.h.
 *
 * The starting thread, before there are others. Invariant: a value that no schema explains is
 * released only where every schema is known.
 */
#include "recover.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "base/digest.h"
#include "base/log.h"
#include "base/metrics.h"
#include "cascade.h"
#include "saved.h"
#include "schema_record.h"

typedef struct orphan {
    kvs_value_key key;
    kvs_slot slot;
} orphan;

/* A piece of an opaque value whose block has pieces of another. */
typedef struct rival {
    kvs_value_key key;
    kvs_slot slot;
    uint16_t place;
    uint32_t tag;
} rival;

typedef struct recovery {
    kvs_server *server;
    const kvs_schema *last;
    uint64_t n_values, n_orphans, n_listed;
    orphan *orphans; /* [n_listed] values that no schema explains: released after the walk */
    rival *rivals;   /* [n_rivals] */
    uint64_t n_rivals;
    kvc_status status;
} recovery;

static void add_orphan(recovery *r, const kvs_value_key *key, kvs_slot slot)
{
    r->n_orphans++;
    if ((r->n_listed & (r->n_listed - 1)) == 0) {
        uint64_t cap = r->n_listed ? 2 * r->n_listed : 1;
        orphan *more = realloc(r->orphans, cap * sizeof(*more));
        if (!more)
            return; /* it stays in lmdb until the next start */
        r->orphans = more;
    }
    r->orphans[r->n_listed++] = (orphan){.key = *key, .slot = slot};
}

/* The schema of a value, held until another one is asked for. */
static const kvs_schema *recovery_schema(recovery *r, const kvs_value_key *key)
{
    kvs_schemas_put(r->server->schemas, r->last);
    return r->last = kvs_schemas_find(r->server->schemas, &key->tenant, &key->schema);
}

/* Notes a piece for later, when all that there is has been seen. */
static kvc_status add_rival(recovery *r, const rival *piece)
{
    if ((r->n_rivals & (r->n_rivals - 1)) == 0) {
        uint64_t cap = r->n_rivals ? 2 * r->n_rivals : 1;
        rival *more = realloc(r->rivals, cap * sizeof(*more));
        if (!more)
            return KVC_NO_MEMORY;
        r->rivals = more;
    }
    r->rivals[r->n_rivals++] = *piece;
    return KVC_OK;
}

/* EXISTS: it is no piece that this schema can have now. */
static kvc_status found_piece(recovery *r, const kvs_schema *schema, const kvs_value_key *key,
                              kvs_slot slot, const kvs_tier_shape *shape)
{
    rival piece = {.key = *key, .slot = slot};
    if (!kvs_opaque_key_place(schema, key->part, shape->row_bytes, shape->n_rows, &piece.place,
                              &piece.tag))
        return KVC_EXISTS;
    kvc_status status = kvs_index_recovered_piece(r->server->index, schema, piece.place, piece.tag,
                                                  &key->block, slot);
    return status == KVC_INVALID ? add_rival(r, &piece) : status;
}

static int rival_order(const void *a, const void *b)
{
    const rival *x = a, *y = b;
    int order = memcmp(&x->key, &y->key, offsetof(kvs_value_key, part));
    return order ? order : (x->tag > y->tag) - (x->tag < y->tag);
}

/*
 * Pieces [n] of one value beside those that the index has of another: a crash came between a put
 * and the removal of what it replaced. What is whole stays.
 */
static kvc_status settle_rivals(recovery *r, const rival *pieces, uint64_t n)
{
    kvs_server *server = r->server;
    kvs_store *lmdb = &server->lmdb;
    kvs_erased erased = {0};
    kvc_status status = KVC_OK;
    const kvs_schema *schema = recovery_schema(r, &pieces->key);
    uint8_t tier;
    uint32_t hits;
    if (!schema || kvs_index_match_opaque(server->index, schema, &pieces->key.block, 1, false, 0,
                                          &tier, &hits) != KVC_OK)
        return KVC_OK;
    if (!hits)
        kvs_index_erase(server->index, schema, &pieces->key.block, NULL, 0, &erased);
    kvs_cascade_reap(server);
    for (uint64_t i = 0; i < n && status != KVC_NO_MEMORY; i++) {
        status =
            hits ? KVC_EXISTS
                 : kvs_index_recovered_piece(server->index, schema, pieces[i].place, pieces[i].tag,
                                             &pieces[i].key.block, pieces[i].slot);
        if (status == KVC_OK)
            r->n_values++;
        else
            lmdb->ops->release(lmdb->tier, &pieces[i].key, pieces[i].slot);
    }
    return status == KVC_NO_MEMORY ? status : KVC_OK;
}

static kvc_status settle_all_rivals(recovery *r)
{
    kvc_status status = KVC_OK;
    if (r->n_rivals)
        qsort(r->rivals, r->n_rivals, sizeof(*r->rivals), rival_order);
    for (uint64_t i = 0, n; i < r->n_rivals && status == KVC_OK; i += n) {
        for (n = 1; i + n < r->n_rivals && !rival_order(&r->rivals[i], &r->rivals[i + n]);)
            n++;
        status = settle_rivals(r, &r->rivals[i], n);
    }
    return status;
}

static bool found_value(void *arg, const kvs_value_key *key, kvs_slot slot, uint32_t row_bytes,
                        uint32_t n_rows)
{
    recovery *r = arg;
    kvs_server *server = r->server;
    const kvs_schema *schema = r->last;
    if (!schema || !kvc_digest_equal(&schema->digest, &key->schema) ||
        !kvc_digest_equal(&schema->tenant, &key->tenant))
        schema = recovery_schema(r, key);
    int part = schema && !schema->piece_bytes ? kvs_schema_part(schema, key->part) : -1;
    kvc_status status = KVC_EXISTS;
    if (schema && schema->piece_bytes)
        status = found_piece(r, schema, key, slot, &(kvs_tier_shape){row_bytes, n_rows});
    else if (part >= 0 && schema->parts[part].row_bytes == row_bytes &&
             schema->parts[part].n_rows == n_rows)
        status = kvs_index_recovered(server->index, schema, (uint32_t)part, &key->block, slot);
    if (status == KVC_OK)
        r->n_values++;
    else if (status == KVC_EXISTS)
        add_orphan(r, key, slot);
    else
        r->status = status; /* a value without a place in the index is not an orphan */
    return r->status == KVC_OK;
}

/* Values without a schema are garbage only where every schema is known. */
static void settle_orphans(recovery *r, bool all_schemas)
{
    kvs_store *lmdb = &r->server->lmdb;
    for (uint64_t i = 0; all_schemas && i < r->n_listed; i++)
        lmdb->ops->release(lmdb->tier, &r->orphans[i].key, r->orphans[i].slot);
    if (r->n_orphans && all_schemas)
        KVC_LOG_WARN(SERVER, "%llu values of lmdb fit no schema; released",
                     (unsigned long long)r->n_orphans);
    else if (r->n_orphans)
        KVC_LOG_ERROR(SERVER,
                      "%llu values of lmdb fit no schema, and schemas were lost: the values stay; "
                      "register the schemas again and restart to have them back",
                      (unsigned long long)r->n_orphans);
}

kvc_status kvs_recover(kvs_server *server)
{
    recovery r = {.server = server, .status = KVC_OK};
    kvc_status status = kvs_schema_records_load(server);
    bool all_schemas = status == KVC_OK; /* CORRUPT: some were logged and left out */
    if (status == KVC_OK || status == KVC_CORRUPT)
        status = server->lmdb.ops->recover(server->lmdb.tier, found_value, &r);
    if (status == KVC_OK)
        status = r.status;
    if (status == KVC_OK)
        settle_orphans(&r, all_schemas);
    if (status == KVC_OK)
        status = settle_all_rivals(&r);
    free(r.orphans);
    free(r.rivals);
    kvs_schemas_put(server->schemas, r.last);
    server->schemas_lost = !all_schemas;
    if (status == KVC_OK)
        status = kvs_saved_load(server->saved);
    if (status != KVC_OK) {
        KVC_LOG_ERROR(SERVER, "the lmdb tier does not recover: %s", kvc_status_name(status));
        return status;
    }
    KVC_COUNT_N(recovered_values, r.n_values);
    KVC_LOG_INFO(SERVER, "recovered %u schemas and %llu values from lmdb",
                 kvs_schemas_count(server->schemas), (unsigned long long)r.n_values);
    return KVC_OK;
}
