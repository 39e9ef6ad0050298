/*
 * describe.c: Describe, Stats and RegisterSchema.
 *
 * Transport threads; RegisterSchema with lmdb moves to a disk thread, since the schema is durable
 * before it is answered. Invariant: a schema whose values may be durable is durable itself.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/digest.h"
#include "base/log.h"
#include "base/metrics.h"
#include "request.h"
#include "schema_record.h"

#define KVS_TIERS 3u

static uint32_t store_stats(kvs_store *store, kvc_tier_stats *stats)
{
    kvs_tier_usage usage;
    if (!store->ops)
        return 0;
    store->ops->usage(store->tier, &usage);
    *stats = (kvc_tier_stats){
        .name = store->ops->name,
        .capacity_bytes = usage.capacity_bytes,
        .used_bytes = usage.used_bytes,
        .values = usage.values,
        .rows_read = atomic_load(&store->rows_read),
        .bytes_read = atomic_load(&store->bytes_read),
        .bytes_written = usage.bytes_written,
        .evictions = atomic_load(&store->evictions),
    };
    return 1;
}

/* Sizes of the tiers, the fastest first; how many there are (at most KVS_TIERS). */
static uint32_t tier_stats(kvs_server *server, kvc_tier_stats *stats)
{
    uint32_t n = store_stats(&server->gpu, stats);
    n += store_stats(&server->dram, stats + n);
    return n + store_stats(&server->lmdb, stats + n);
}

void kvs_on_describe(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    kvc_tier_stats tiers[KVS_TIERS];
    uint32_t max = kvs_schemas_count(server->schemas);
    kvc_reply reply = {.method = KVC_DESCRIBE};
    if (max > server->limits.max_digests)
        max = server->limits.max_digests;
    kvc_digest *schemas = kvc_arena_calloc(&call->arena, max ? max : 1, sizeof(*schemas));
    uint8_t *opaque = kvc_arena_calloc(&call->arena, max ? max : 1, sizeof(*opaque));
    if (!schemas || !opaque) {
        kvs_fail(call, KVC_NO_MEMORY, "no memory for the list of schemas");
        return;
    }
    reply.u.describe.version = KVS_VERSION;
    reply.u.describe.boot_id = server->boot_id;
    reply.u.describe.limits = server->limits;
    reply.u.describe.tiers = tiers;
    reply.u.describe.n_tiers = tier_stats(server, tiers);
    reply.u.describe.schemas = schemas;
    reply.u.describe.opaque = opaque;
    reply.u.describe.n_schemas = kvs_schemas_list(server->schemas, tenant, schemas, opaque, max);
    kvs_answer(call, &reply, NULL, 0);
}

void kvs_on_stats(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    (void)tenant;
    kvc_tier_stats tiers[KVS_TIERS];
    kvc_metric_value values[KVC_METRIC_COUNT];
    kvc_counter counters[KVC_METRIC_COUNT];
    kvc_metrics_snapshot(values);
    for (uint32_t i = 0; i < KVC_METRIC_COUNT; i++)
        counters[i] = (kvc_counter){.name = values[i].name, .value = values[i].value};
    kvc_reply reply = {.method = KVC_STATS};
    reply.u.stats.uptime_ms = (kvc_now_ns() - server->start_ns) / 1000000;
    reply.u.stats.boot_id = server->boot_id;
    reply.u.stats.tiers = tiers;
    reply.u.stats.n_tiers = tier_stats(server, tiers);
    reply.u.stats.counters = counters;
    reply.u.stats.n_counters = KVC_METRIC_COUNT;
    kvs_answer(call, &reply, NULL, 0);
}

/* ---- RegisterSchema -------------------------------------------------------------------------- */

typedef struct register_job {
    kvs_job job;
    kvs_server *server;
    kvt_call *call;
    kvc_digest tenant;
} register_job;

static void register_finish(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    const kvs_schema *schema;
    bool is_new;
    kvc_status status = kvs_schemas_add(server->schemas, tenant, call->req.u.register_schema.schema,
                                        kvs_index_class, server->index, &schema, &is_new);
    if (status == KVC_NO_SPACE) {
        kvs_fail(call, status, "the server holds %u schemas, its limit", KVS_MAX_SCHEMAS);
        return;
    }
    if (status != KVC_OK) {
        kvs_fail(call, status, "the schema could not be added");
        return;
    }
    kvs_schemas_put(server->schemas, call->held); /* not before: it might go meanwhile */
    call->held = schema;
    if (is_new) {
        char hex[KVC_DIGEST_HEX_BYTES];
        kvc_digest_hex(&schema->digest, hex);
        if (schema->piece_bytes)
            KVC_LOG_INFO(SERVER, "schema %.16s registered: model %s, opaque", hex,
                         schema->schema->model);
        else
            KVC_LOG_INFO(SERVER, "schema %.16s registered: model %s, %u parts, blocks of %u tokens",
                         hex, schema->schema->model, schema->n_parts, schema->block_tokens);
    }
    kvc_reply reply = {.method = KVC_REGISTER_SCHEMA};
    reply.u.register_schema.digest = schema->digest;
    kvs_answer(call, &reply, NULL, 0);
}

static void register_run(kvs_job *job)
{
    register_job *r = (register_job *)job;
    kvt_call *call = r->call;
    kvc_status status = kvs_given_up(call);
    if (status != KVC_OK) {
        kvs_fail(call, status, "nobody waited any more when a disk thread was free");
        free(r);
        return;
    }
    kvc_mutex_lock(&r->server->record_lock);
    status =
        kvs_schema_record_put(&r->server->lmdb, &r->tenant, call->req.u.register_schema.schema);
    if (status == KVC_OK)
        register_finish(r->server, call, &r->tenant);
    else
        kvs_fail(call, status, "the schema could not be written to lmdb");
    kvc_mutex_unlock(&r->server->record_lock);
    free(r);
}

void kvs_on_register_schema(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    const kvc_schema *schema = call->req.u.register_schema.schema;
    const char *why = "";
    kvc_digest digest;
    kvc_status status = kvc_schema_check(schema, server->limits.max_value_bytes, &why);
    if (status == KVC_OK)
        status = kvc_schema_digest(schema, &digest);
    if (status != KVC_OK) {
        kvs_fail(call, status, "schema: %s", why);
        return;
    }
    if (schema->opaque && !server->limits.max_pieces) {
        kvs_fail(call, KVC_NO_SPACE,
                 "a piece of %u bytes and its page do not fit into a sixteenth of dram_bytes, as "
                 "opaque values want",
                 server->limits.max_value_bytes);
        return;
    }
    call->held = kvs_schemas_find(server->schemas, tenant, &digest);
    if (!server->lmdb.ops || call->held) {
        register_finish(server, call, tenant);
        return;
    }
    register_job *r = malloc(sizeof(*r));
    if (!r) {
        kvs_fail(call, KVC_NO_MEMORY, "no memory");
        return;
    }
    *r = (register_job){.job.run = register_run, .server = server, .call = call, .tenant = *tenant};
    status = kvs_disk_submit(server->disk, &r->job);
    if (status != KVC_OK) {
        free(r);
        kvs_fail(call, status, "the disk threads have too much to do");
    }
}
