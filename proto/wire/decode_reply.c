/*
 * decode_reply.c: received bytes -> plain reply structs.
 *
 * Pure, any thread. A client trusts a server no more than the other way round: counts, lengths and
 * the order of missing rows are checked, so that nobody indexes past an array by a reply.
 */
#include "wire_internal.h"

static kvc_status get_tiers(kvci_job *job, Kvasir__V1__TierStats **msgs, size_t n,
                            const kvc_tier_stats **tiers_p)
{
    if (n > KVCI_TIERS_MAX)
        return kvci_refuse(job, "more than 64 tiers");
    kvc_tier_stats *tiers = kvc_arena_alloc(job->arena, n * sizeof(*tiers));
    if (tiers == NULL)
        return kvci_no_memory(job);
    for (size_t i = 0; i < n; i++) {
        if (!kvci_fits(msgs[i]->name, KVC_MAX_NAME_BYTES))
            return kvci_refuse(job, "a tier's name has more than 255 bytes");
        tiers[i] = (kvc_tier_stats){
            .name = msgs[i]->name,
            .capacity_bytes = msgs[i]->capacity_bytes,
            .used_bytes = msgs[i]->used_bytes,
            .values = msgs[i]->values,
            .rows_read = msgs[i]->rows_read,
            .bytes_read = msgs[i]->bytes_read,
            .bytes_written = msgs[i]->bytes_written,
            .evictions = msgs[i]->evictions,
        };
    }
    *tiers_p = tiers;
    return KVC_OK;
}

static kvc_limits get_limits(const Kvasir__V1__Limits *msg)
{
    return (kvc_limits){
#define X(name) .name = msg->name,
#include "wire/limits.def"
#undef X
    };
}

/* Which schemas are opaque; older servers do not tell. */
static kvc_status get_opaque(kvci_job *job, const Kvasir__V1__DescribeReply *msg,
                             const uint8_t **opaque_p)
{
    *opaque_p = NULL;
    if (msg->n_opaque == 0)
        return KVC_OK;
    if (msg->n_opaque != msg->n_schemas)
        return kvci_refuse(job, "opaque must have one for each schema, or none");
    uint8_t *opaque = kvc_arena_alloc(job->arena, msg->n_opaque);
    if (opaque == NULL)
        return kvci_no_memory(job);
    for (size_t i = 0; i < msg->n_opaque; i++)
        opaque[i] = msg->opaque[i] != 0;
    *opaque_p = opaque;
    return KVC_OK;
}

kvc_status kvci_get_describe_reply(kvci_job *job, kvc_reply *reply)
{
    const Kvasir__V1__DescribeReply *msg = (const Kvasir__V1__DescribeReply *)job->msg;
    if (msg->limits == NULL)
        return kvci_refuse(job, "the limits are missing");
    if (msg->n_schemas > KVCI_SCHEMAS_MAX)
        return kvci_refuse(job, "more than 4096 schemas");
    if (!kvci_fits(msg->version, KVC_MAX_NAME_BYTES))
        return kvci_refuse(job, "the version has more than 255 bytes");
    kvc_status status = get_tiers(job, msg->tiers, msg->n_tiers, &reply->u.describe.tiers);
    if (status != KVC_OK)
        return status;
    kvc_digest *schemas = kvc_arena_alloc(job->arena, msg->n_schemas * sizeof(*schemas));
    if (schemas == NULL)
        return kvci_no_memory(job);
    for (size_t i = 0; i < msg->n_schemas; i++) {
        if (kvci_get_digest(&msg->schemas[i], &schemas[i]) != KVC_OK)
            return kvci_refuse(job, "a schema digest must have 32 bytes");
    }
    reply->u.describe.version = msg->version;
    reply->u.describe.boot_id = msg->boot_id;
    reply->u.describe.limits = get_limits(msg->limits);
    reply->u.describe.n_tiers = (uint32_t)msg->n_tiers;
    reply->u.describe.n_schemas = (uint32_t)msg->n_schemas;
    reply->u.describe.schemas = schemas;
    return get_opaque(job, msg, &reply->u.describe.opaque);
}

kvc_status kvci_get_register_schema_reply(kvci_job *job, kvc_reply *reply)
{
    const Kvasir__V1__RegisterSchemaReply *msg = (const Kvasir__V1__RegisterSchemaReply *)job->msg;
    if (kvci_get_digest(&msg->digest, &reply->u.register_schema.digest) != KVC_OK)
        return kvci_refuse(job, "the schema digest must have 32 bytes");
    return KVC_OK;
}

kvc_status kvci_get_put_blocks_reply(kvci_job *job, kvc_reply *reply)
{
    const Kvasir__V1__PutBlocksReply *msg = (const Kvasir__V1__PutBlocksReply *)job->msg;
    if (msg->n_status > KVC_MAX_BATCH_VALUES)
        return kvci_refuse(job, "more values than max_batch_values");
    int8_t *status = kvc_arena_alloc(job->arena, msg->n_status);
    if (status == NULL)
        return kvci_no_memory(job);
    for (size_t i = 0; i < msg->n_status; i++) {
        if ((int)msg->status[i] < 0 || (int)msg->status[i] >= KVC_STATUS_COUNT)
            return kvci_refuse(job, "a value's status is not one of the protocol's");
        status[i] = (int8_t) - (int)msg->status[i];
    }
    reply->u.put_blocks.n_values = (uint32_t)msg->n_status;
    reply->u.put_blocks.status = status;
    return KVC_OK;
}

kvc_status kvci_get_match_prefix_reply(kvci_job *job, kvc_reply *reply)
{
    const Kvasir__V1__MatchPrefixReply *msg = (const Kvasir__V1__MatchPrefixReply *)job->msg;
    if (msg->n_tiers != 0 && (msg->n_tiers < msg->hits || msg->n_tiers > KVC_MAX_DIGESTS))
        return kvci_refuse(job, "there must be one tier for each hit, or none");
    uint8_t *tiers = kvc_arena_alloc(job->arena, msg->n_tiers);
    if (tiers == NULL)
        return kvci_no_memory(job);
    for (size_t i = 0; i < msg->n_tiers; i++) {
        int none = i < msg->hits ? KVC_TIER_GPU : 0; /* behind the hits, a value may be missing */
        if ((int)msg->tiers[i] < none || (int)msg->tiers[i] > KVC_TIER_LMDB)
            return kvci_refuse(job, "a hit's tier is not one of the protocol's");
        tiers[i] = (uint8_t)msg->tiers[i];
    }
    reply->u.match_prefix.hits = msg->hits;
    reply->u.match_prefix.n_tiers = (uint32_t)msg->n_tiers;
    reply->u.match_prefix.tiers = tiers;
    return KVC_OK;
}

kvc_status kvci_get_open_context_reply(kvci_job *job, kvc_reply *reply)
{
    const Kvasir__V1__OpenContextReply *msg = (const Kvasir__V1__OpenContextReply *)job->msg;
    reply->u.open_context.context = msg->context;
    reply->u.open_context.ttl_ms = msg->ttl_ms;
    reply->u.open_context.n_tokens = msg->n_tokens;
    return KVC_OK;
}

kvc_status kvci_get_extend_context_reply(kvci_job *job, kvc_reply *reply)
{
    reply->u.extend_context.n_tokens = ((const Kvasir__V1__ExtendContextReply *)job->msg)->n_tokens;
    return KVC_OK;
}

kvc_status kvci_get_close_context_reply(kvci_job *job, kvc_reply *reply)
{
    (void)job;
    (void)reply;
    return KVC_OK;
}

kvc_status kvci_get_missing(kvci_job *job, Kvasir__V1__MissingRow **msgs, size_t n,
                            kvc_reply *reply)
{
    if (n > KVC_MAX_PICKS)
        return kvci_refuse(job, "more missing rows than max_picks");
    kvc_missing_row *missing = kvc_arena_alloc(job->arena, n * sizeof(*missing));
    if (missing == NULL)
        return kvci_no_memory(job);
    for (size_t i = 0; i < n; i++) {
        const Kvasir__V1__MissingRow *row = msgs[i];
        if (row->index >= KVC_MAX_PICKS || (i > 0 && row->index <= missing[i - 1].index))
            return kvci_refuse(job, "missing rows must come in ascending order");
        if ((int)row->status <= 0 || (int)row->status >= KVC_STATUS_COUNT)
            return kvci_refuse(job, "a missing row's status is not one of the protocol's");
        missing[i].index = row->index;
        missing[i].status = (kvc_status) - (int)row->status;
    }
    reply->u.fetch_rows.n_missing = (uint32_t)n;
    reply->u.fetch_rows.missing = missing;
    return KVC_OK;
}

kvc_status kvci_get_fetch_rows_reply(kvci_job *job, kvc_reply *reply)
{
    const Kvasir__V1__FetchRowsReply *msg = (const Kvasir__V1__FetchRowsReply *)job->msg;
    reply->u.fetch_rows.rows_gpu = msg->rows_gpu;
    reply->u.fetch_rows.rows_dram = msg->rows_dram;
    reply->u.fetch_rows.rows_lmdb = msg->rows_lmdb;
    return kvci_get_missing(job, msg->missing, msg->n_missing, reply);
}

kvc_status kvci_get_stats_reply(kvci_job *job, kvc_reply *reply)
{
    const Kvasir__V1__StatsReply *msg = (const Kvasir__V1__StatsReply *)job->msg;
    if (msg->n_counters > KVCI_COUNTERS_MAX)
        return kvci_refuse(job, "more than 4096 counters");
    kvc_status status = get_tiers(job, msg->tiers, msg->n_tiers, &reply->u.stats.tiers);
    if (status != KVC_OK)
        return status;
    kvc_counter *counters = kvc_arena_alloc(job->arena, msg->n_counters * sizeof(*counters));
    if (counters == NULL)
        return kvci_no_memory(job);
    for (size_t i = 0; i < msg->n_counters; i++) {
        if (!kvci_fits(msg->counters[i]->name, KVC_MAX_NAME_BYTES))
            return kvci_refuse(job, "a counter's name has more than 255 bytes");
        counters[i] = (kvc_counter){msg->counters[i]->name, msg->counters[i]->value};
    }
    reply->u.stats.uptime_ms = msg->uptime_ms;
    reply->u.stats.boot_id = msg->boot_id;
    reply->u.stats.n_tiers = (uint32_t)msg->n_tiers;
    reply->u.stats.n_counters = (uint32_t)msg->n_counters;
    reply->u.stats.counters = counters;
    return KVC_OK;
}

static kvc_status convert(kvc_method method, kvci_job *job, kvc_reply *reply)
{
    typedef kvc_status get_fn(kvci_job *, kvc_reply *);
    static get_fn *const table[KVC_METHOD_COUNT] = {
#define KVC_METHOD(upper, lower, name, flags) kvci_get_##lower##_reply,
#include "wire/methods.def"
#undef KVC_METHOD
    };
    return table[method](job, reply);
}

kvc_status kvc_wire_decode_reply(kvc_method method, const struct iovec *in, uint32_t n_in,
                                 kvc_arena *arena, kvc_reply *reply_p, const char **why_p)
{
    kvci_split split;
    ProtobufCMessage *msg;
    kvci_job job = {.arena = arena};
    *reply_p = (kvc_reply){.method = method};
    kvc_status status =
        kvci_unpack(kvci_reply_type(method), in, n_in, arena, &split, &msg, &job.why);
    if (status == KVC_OK) {
        job.msg = msg;
        job.data_bytes = split.data_bytes;
        status = convert(method, &job, reply_p);
    }
    if (status == KVC_OK) {
        reply_p->data = split.data;
        reply_p->n_data = split.n_data;
        reply_p->data_bytes = split.data_bytes;
    }
    if (why_p != NULL)
        *why_p = status == KVC_OK ? NULL : job.why;
    return status;
}
