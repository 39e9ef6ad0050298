/*
 * encode_reply.c: plain reply structs -> header bytes.
 *
 * Pure, any thread. The payload's own bytes are not looked at here: data_bytes alone decides on
 * the bulk field's tag and length, so that a server may keep its rows in slices of any kind.
 */
#include "wire_internal.h"

/* tiers [n] as a list that protobuf-c takes, in the arena. INVALID: too many, or a long name. */
static kvc_status put_tiers(kvc_arena *arena, const kvc_tier_stats *tiers, uint32_t n,
                            Kvasir__V1__TierStats ***list_p)
{
    if (n > KVCI_TIERS_MAX)
        return KVC_INVALID;
    Kvasir__V1__TierStats *msgs = kvc_arena_alloc(arena, n * sizeof(*msgs));
    Kvasir__V1__TierStats **list = kvc_arena_alloc(arena, n * sizeof(*list));
    if (msgs == NULL || list == NULL)
        return KVC_NO_MEMORY;
    for (uint32_t i = 0; i < n; i++) {
        msgs[i] = (Kvasir__V1__TierStats)KVASIR__V1__TIER_STATS__INIT;
        msgs[i].name = kvci_put_text(tiers[i].name);
        if (!kvci_fits(msgs[i].name, KVC_MAX_NAME_BYTES))
            return KVC_INVALID;
        msgs[i].capacity_bytes = tiers[i].capacity_bytes;
        msgs[i].used_bytes = tiers[i].used_bytes;
        msgs[i].values = tiers[i].values;
        msgs[i].rows_read = tiers[i].rows_read;
        msgs[i].bytes_read = tiers[i].bytes_read;
        msgs[i].bytes_written = tiers[i].bytes_written;
        msgs[i].evictions = tiers[i].evictions;
        list[i] = &msgs[i];
    }
    *list_p = list;
    return KVC_OK;
}

static Kvasir__V1__Limits put_limits(const kvc_limits *limits)
{
    Kvasir__V1__Limits msg = KVASIR__V1__LIMITS__INIT;
#define X(name) msg.name = limits->name;
#include "wire/limits.def"
#undef X
    return msg;
}

kvc_status kvci_put_describe_reply(const kvc_reply *reply, const kvci_out *out)
{
    uint32_t n = reply->u.describe.n_schemas;
    Kvasir__V1__DescribeReply msg = KVASIR__V1__DESCRIBE_REPLY__INIT;
    msg.version = kvci_put_text(reply->u.describe.version);
    if (n > KVCI_SCHEMAS_MAX || !kvci_fits(msg.version, KVC_MAX_NAME_BYTES))
        return KVC_INVALID;
    kvc_status status =
        put_tiers(out->arena, reply->u.describe.tiers, reply->u.describe.n_tiers, &msg.tiers);
    if (status != KVC_OK)
        return status;
    msg.schemas = kvc_arena_alloc(out->arena, n * sizeof(*msg.schemas));
    if (msg.schemas == NULL)
        return KVC_NO_MEMORY;
    for (uint32_t i = 0; i < n; i++)
        msg.schemas[i] = kvci_put_digest(&reply->u.describe.schemas[i]);
    if (reply->u.describe.opaque != NULL) {
        msg.opaque = kvc_arena_alloc(out->arena, n * sizeof(*msg.opaque));
        if (msg.opaque == NULL)
            return KVC_NO_MEMORY;
        for (uint32_t i = 0; i < n; i++)
            msg.opaque[i] = reply->u.describe.opaque[i] != 0;
        msg.n_opaque = n;
    }
    Kvasir__V1__Limits limits = put_limits(&reply->u.describe.limits);
    msg.boot_id = reply->u.describe.boot_id;
    msg.limits = &limits;
    msg.n_tiers = reply->u.describe.n_tiers;
    msg.n_schemas = n;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_put_register_schema_reply(const kvc_reply *reply, const kvci_out *out)
{
    Kvasir__V1__RegisterSchemaReply msg = KVASIR__V1__REGISTER_SCHEMA_REPLY__INIT;
    msg.digest = kvci_put_digest(&reply->u.register_schema.digest);
    return kvci_put(out, &msg.base, 0);
}

/* A status as the wire has it: without the sign. INVALID for a number that is no status. */
kvc_status kvci_put_status(int status, Kvasir__V1__ItemStatus *item_p)
{
    if (status > 0 || -status >= KVC_STATUS_COUNT)
        return KVC_INVALID;
    *item_p = (Kvasir__V1__ItemStatus)-status;
    return KVC_OK;
}

kvc_status kvci_put_put_blocks_reply(const kvc_reply *reply, const kvci_out *out)
{
    uint32_t n = reply->u.put_blocks.n_values;
    if (n > KVC_MAX_BATCH_VALUES)
        return KVC_INVALID;
    Kvasir__V1__PutBlocksReply msg = KVASIR__V1__PUT_BLOCKS_REPLY__INIT;
    msg.n_status = n;
    msg.status = kvc_arena_alloc(out->arena, n * sizeof(*msg.status));
    if (msg.status == NULL)
        return KVC_NO_MEMORY;
    for (uint32_t i = 0; i < n; i++) {
        kvc_status status = kvci_put_status(reply->u.put_blocks.status[i], &msg.status[i]);
        if (status != KVC_OK)
            return status;
    }
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_put_match_prefix_reply(const kvc_reply *reply, const kvci_out *out)
{
    Kvasir__V1__MatchPrefixReply msg = KVASIR__V1__MATCH_PREFIX_REPLY__INIT;
    uint32_t n = reply->u.match_prefix.n_tiers;
    if (n != 0 && (n < reply->u.match_prefix.hits || n > KVC_MAX_DIGESTS))
        return KVC_INVALID;
    msg.tiers = kvc_arena_alloc(out->arena, n * sizeof(*msg.tiers));
    if (msg.tiers == NULL)
        return KVC_NO_MEMORY;
    for (uint32_t i = 0; i < n; i++)
        msg.tiers[i] = (Kvasir__V1__Tier)reply->u.match_prefix.tiers[i];
    msg.n_tiers = n;
    msg.hits = reply->u.match_prefix.hits;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_put_open_context_reply(const kvc_reply *reply, const kvci_out *out)
{
    Kvasir__V1__OpenContextReply msg = KVASIR__V1__OPEN_CONTEXT_REPLY__INIT;
    msg.context = reply->u.open_context.context;
    msg.ttl_ms = reply->u.open_context.ttl_ms;
    msg.n_tokens = reply->u.open_context.n_tokens;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_put_extend_context_reply(const kvc_reply *reply, const kvci_out *out)
{
    Kvasir__V1__ExtendContextReply msg = KVASIR__V1__EXTEND_CONTEXT_REPLY__INIT;
    msg.n_tokens = reply->u.extend_context.n_tokens;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_put_close_context_reply(const kvc_reply *reply, const kvci_out *out)
{
    Kvasir__V1__CloseContextReply msg = KVASIR__V1__CLOSE_CONTEXT_REPLY__INIT;
    (void)reply;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_put_missing(const kvc_reply *reply, kvc_arena *arena,
                            Kvasir__V1__MissingRow ***list_p)
{
    uint32_t n = reply->u.fetch_rows.n_missing;
    if (n > KVC_MAX_PICKS || !kvci_data_fits(reply->data, reply->n_data, reply->data_bytes))
        return KVC_INVALID;
    Kvasir__V1__MissingRow *rows = kvc_arena_alloc(arena, n * sizeof(*rows));
    Kvasir__V1__MissingRow **list = kvc_arena_alloc(arena, n * sizeof(*list));
    if (rows == NULL || list == NULL)
        return KVC_NO_MEMORY;
    for (uint32_t i = 0; i < n; i++) {
        rows[i] = (Kvasir__V1__MissingRow)KVASIR__V1__MISSING_ROW__INIT;
        rows[i].index = reply->u.fetch_rows.missing[i].index;
        kvc_status status = kvci_put_status(reply->u.fetch_rows.missing[i].status, &rows[i].status);
        if (status != KVC_OK)
            return status;
        list[i] = &rows[i];
    }
    *list_p = list;
    return KVC_OK;
}

kvc_status kvci_put_fetch_rows_reply(const kvc_reply *reply, const kvci_out *out)
{
    Kvasir__V1__FetchRowsReply msg = KVASIR__V1__FETCH_ROWS_REPLY__INIT;
    kvc_status status = kvci_put_missing(reply, out->arena, &msg.missing);
    if (status != KVC_OK)
        return status;
    msg.n_missing = reply->u.fetch_rows.n_missing;
    msg.rows_gpu = reply->u.fetch_rows.rows_gpu;
    msg.rows_dram = reply->u.fetch_rows.rows_dram;
    msg.rows_lmdb = reply->u.fetch_rows.rows_lmdb;
    return kvci_put(out, &msg.base, reply->data_bytes);
}

kvc_status kvci_put_stats_reply(const kvc_reply *reply, const kvci_out *out)
{
    uint32_t n = reply->u.stats.n_counters;
    Kvasir__V1__StatsReply msg = KVASIR__V1__STATS_REPLY__INIT;
    if (n > KVCI_COUNTERS_MAX)
        return KVC_INVALID;
    kvc_status status =
        put_tiers(out->arena, reply->u.stats.tiers, reply->u.stats.n_tiers, &msg.tiers);
    if (status != KVC_OK)
        return status;
    Kvasir__V1__Counter *counters = kvc_arena_alloc(out->arena, n * sizeof(*counters));
    msg.counters = kvc_arena_alloc(out->arena, n * sizeof(*msg.counters));
    if (counters == NULL || msg.counters == NULL)
        return KVC_NO_MEMORY;
    for (uint32_t i = 0; i < n; i++) {
        counters[i] = (Kvasir__V1__Counter)KVASIR__V1__COUNTER__INIT;
        counters[i].name = kvci_put_text(reply->u.stats.counters[i].name);
        if (!kvci_fits(counters[i].name, KVC_MAX_NAME_BYTES))
            return KVC_INVALID;
        counters[i].value = reply->u.stats.counters[i].value;
        msg.counters[i] = &counters[i];
    }
    msg.uptime_ms = reply->u.stats.uptime_ms;
    msg.boot_id = reply->u.stats.boot_id;
    msg.n_tiers = reply->u.stats.n_tiers;
    msg.n_counters = n;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvc_wire_encode_reply(const kvc_reply *reply, kvc_arena *arena, const void **head_p,
                                 size_t *head_bytes_p)
{
    typedef kvc_status put_fn(const kvc_reply *, const kvci_out *);
    static put_fn *const table[KVC_METHOD_COUNT] = {
#define KVC_METHOD(upper, lower, name, flags) kvci_put_##lower##_reply,
#include "wire/methods.def"
#undef KVC_METHOD
    };
    kvci_out out = {arena, head_p, head_bytes_p};
    *head_p = NULL;
    *head_bytes_p = 0;
    if ((int)reply->method < 0 || reply->method >= KVC_METHOD_COUNT)
        return KVC_INVALID;
    if (reply->data_bytes != 0 && !(kvc_method_flags(reply->method) & KVC_METHOD_BULK_REPLY))
        return KVC_INVALID;
    return table[reply->method](reply, &out);
}
