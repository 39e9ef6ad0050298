/*
 * samples.c: see samples.h.
 *
 * Every field gets a value of its own, so that two fields swapped show.
 */
#include "samples.h"

#include <string.h>

#define PIECES 5u

static void *zeroed(kvc_arena *arena, size_t n, size_t size_bytes)
{
    void *piece = kvc_arena_calloc(arena, n, size_bytes);
    if (piece == NULL)
        __builtin_trap();
    return piece;
}

kvc_digest sample_digest(uint32_t seed)
{
    kvc_digest digest;
    for (uint32_t i = 0; i < KVC_DIGEST_BYTES; i++)
        digest.bytes[i] = (uint8_t)((seed + 1) * 37 + i * 11);
    return digest;
}

static const kvc_digest *sample_digests(uint32_t n, kvc_arena *arena)
{
    kvc_digest *digests = zeroed(arena, n, sizeof(*digests));
    for (uint32_t i = 0; i < n; i++)
        digests[i] = sample_digest(i);
    return digests;
}

/* data_bytes in PIECES pieces of unequal length, one of them empty. */
static const struct iovec *sample_data(size_t data_bytes, kvc_arena *arena)
{
    uint8_t *bytes = zeroed(arena, data_bytes + 1, 1);
    struct iovec *data = zeroed(arena, PIECES, sizeof(*data));
    size_t at = 0;
    for (size_t i = 0; i < data_bytes; i++)
        bytes[i] = (uint8_t)(i * 131 + (i >> 8));
    for (uint32_t i = 0; i < PIECES; i++) {
        size_t len_bytes = i == PIECES - 1 ? data_bytes - at : (data_bytes - at) * i / 7;
        data[i] = (struct iovec){bytes + at, len_bytes};
        at += len_bytes;
    }
    return data;
}

static kvc_part sample_part(uint32_t i)
{
    return (kvc_part){
        .part = 100 + i,
        .kind = KVC_PART_KV,
        .dtype = KVC_DTYPE_BF16,
        .layer = 7 + i,
        .kv_head_first = 8,
        .kv_head_count = 2,
        .row_bytes = 512,
        .k_off_bytes = 1,
        .k_len_bytes = 256,
        .v_off_bytes = 256,
        .v_len_bytes = 255,
        .q_dim = 64,
        .v_dim = 63,
        .window = 4096,
        .rope = {KVC_ROPE_LLAMA3, 1, 500000.0, 8.0, 1.25, 4.5, 8192},
        .attention_scale = 0.125,
        .softcap = 30.5,
        .sinks = 1,
        .codec = i == 0 ? NULL : "esa d=24",
    };
}

static const kvc_schema *sample_schema(kvc_arena *arena)
{
    kvc_schema *schema = zeroed(arena, 1, sizeof(*schema));
    kvc_part *parts = zeroed(arena, 3, sizeof(*parts));
    for (uint32_t i = 0; i < 3; i++)
        parts[i] = sample_part(i);
    parts[2].rope = (kvc_rope){0};
    *schema = (kvc_schema){"a model", "rev-1", "full attention", 2, 128, 3, parts, 1};
    return schema;
}

static const kvc_row_group *sample_groups(uint32_t n, kvc_arena *arena)
{
    kvc_row_group *groups = zeroed(arena, n, sizeof(*groups));
    for (uint32_t i = 0; i < n; i++) {
        uint32_t *picks = zeroed(arena, i * 100 + 1, sizeof(*picks));
        for (uint32_t j = 0; j < i * 100; j++)
            picks[j] = j * 977 + (i << 20);
        groups[i] = (kvc_row_group){0xfedcba9876543210ull + i, 5 + i, i * 100, picks};
    }
    return groups;
}

/* Of the groups of the same number; group 0 has no picks, so it has no ranks either. */
static const kvc_attend_query *sample_queries(uint32_t n, kvc_arena *arena)
{
    kvc_attend_query *queries = zeroed(arena, n, sizeof(*queries));
    for (uint32_t i = 0; i < n; i++) {
        uint32_t *ranks = zeroed(arena, i * 100 + 1, sizeof(*ranks));
        for (uint32_t j = 0; j < i * 100; j++)
            ranks[j] = j * 10 + (i << 9);
        queries[i] = (kvc_attend_query){1 + i,
                                        32 * (i + 1),
                                        i % 2 ? KVC_DTYPE_BF16 : KVC_DTYPE_F16,
                                        i % 2 ? KVC_DTYPE_F32 : KVC_DTYPE_BF16,
                                        i == 2,
                                        i == 0 || i == 2 ? NULL : ranks,
                                        i % 2 ? ranks + 3 : NULL};
    }
    return queries;
}

static void fill_attend_request(kvc_request *req, size_t data_bytes, kvc_arena *arena)
{
    req->u.fetch_rows.n_groups = 4;
    req->u.fetch_rows.groups = sample_groups(4, arena);
    req->u.fetch_rows.queries = sample_queries(4, arena);
    req->data = sample_data(data_bytes, arena);
    req->n_data = PIECES;
    req->data_bytes = data_bytes;
}

static const kvc_put_value *sample_values(uint32_t n, kvc_arena *arena)
{
    kvc_put_value *values = zeroed(arena, n, sizeof(*values));
    for (uint32_t i = 0; i < n; i++)
        values[i] =
            (kvc_put_value){sample_digest(i), i * 3, 1000 + i, {(1ull << 42) + i, ~0ull - i}};
    return values;
}

static const kvc_put_offer *sample_offers(uint32_t n, kvc_arena *arena)
{
    kvc_put_offer *offers = zeroed(arena, n, sizeof(*offers));
    for (uint32_t i = 0; i < n; i++)
        offers[i] = (kvc_put_offer){sample_digest(i),
                                    sample_digest(i + 50),
                                    i * 3,
                                    1000 + i,
                                    i % 2 ? KVC_PROMISE_DURABLE : KVC_PROMISE_MEMORY,
                                    (1ull << 40) + i,
                                    {(1ull << 43) + i, ~9ull - i}};
    return offers;
}

static const uint32_t sample_parts[] = {0, 1, 300, 70000};

/* The methods about what stays and what goes. */
static void fill_keep_request(kvc_request *req, kvc_arena *arena)
{
    switch (req->method) {
    case KVC_CLOSE_CONTEXT:
        req->u.close_context.context = 77;
        break;
    case KVC_TRUNCATE_CONTEXT:
        req->u.truncate_context.context = 78;
        req->u.truncate_context.n_blocks = 79;
        break;
    case KVC_FORK_CONTEXT:
        req->u.fork_context.context = 80;
        req->u.fork_context.n_blocks = 81;
        req->u.fork_context.ttl_ms = 82;
        break;
    case KVC_ERASE:
        req->u.erase.schema = sample_digest(93);
        req->u.erase.n_digests = 7;
        req->u.erase.digests = sample_digests(7, arena);
        req->u.erase.n_parts = 4;
        req->u.erase.parts = sample_parts;
        break;
    case KVC_HOLD:
        req->u.hold.context = 83;
        req->u.hold.hold = 84;
        req->u.hold.ttl_ms = 85;
        req->u.hold.schema = sample_digest(99);
        req->u.hold.n_digests = 3;
        req->u.hold.digests = sample_digests(3, arena);
        break;
    case KVC_RELEASE:
        req->u.release.hold = 86;
        break;
    case KVC_PREFETCH:
        req->u.prefetch.context = 87;
        req->u.prefetch.n_parts = 4;
        req->u.prefetch.parts = sample_parts;
        req->u.prefetch.first_block = 88;
        req->u.prefetch.n_blocks = 89;
        req->u.prefetch.tier = KVC_TIER_DRAM;
        req->u.prefetch.schema = sample_digest(100);
        req->u.prefetch.n_digests = 5;
        req->u.prefetch.digests = sample_digests(5, arena);
        break;
    case KVC_MAP_CONTEXT:
        req->u.map_context.context = (1ull << 63) + 187;
        req->u.map_context.map = 188;
        req->u.map_context.n_parts = 3;
        req->u.map_context.parts = sample_parts;
        req->u.map_context.first_block = 189;
        req->u.map_context.n_blocks = 190;
        req->u.map_context.release = true;
        req->u.map_context.gpu = true;
        req->u.map_context.n_unmapped = 2;
        req->u.map_context.unmapped = sample_parts;
        break;
    default:
        break;
    }
}

static const kvc_saved_context *sample_saved(uint32_t n, kvc_arena *arena)
{
    static const char *const names[] = {"!", "chat/42~", "a-long-name.2026:x"};
    kvc_saved_context *list = zeroed(arena, n, sizeof(*list));
    for (uint32_t i = 0; i < n; i++)
        list[i] = (kvc_saved_context){
            .name = names[i % 3],
            .schema = sample_digest(94 + i),
            .promise = i % 2 == 0 ? KVC_PROMISE_DURABLE : KVC_PROMISE_MEMORY,
            .n_blocks = KVC_MAX_CONTEXT_BLOCKS - i,
            .n_ids = 5000 + i,
            .n_tail = KVC_BLOCK_TOKENS_MAX - 1 - i,
            .n_tail_parts = 4,
            .tail_parts = sample_parts,
            .piece_bytes = 5010 + i,
            .generation = (1ull << 63) + i,
            .upload = ~0ull - i,
            .body_bytes = (1ull << 40) + i,
            .saved_unix_ms = 5020 + i,
        };
    return list;
}

/* The methods about contexts saved by name. */
static void fill_saved_request(kvc_request *req, size_t data_bytes, kvc_arena *arena)
{
    switch (req->method) {
    case KVC_PUT_CONTEXT:
        req->u.put_context.context = *sample_saved(1, arena);
        req->u.put_context.upload = 1ull << 62;
        req->u.put_context.offset = 1ull << 33;
        req->u.put_context.if_generation = 5030;
        req->data = sample_data(data_bytes, arena);
        req->n_data = PIECES;
        req->data_bytes = data_bytes;
        break;
    case KVC_GET_CONTEXT:
        req->u.get_context.name = "chat/42~";
        req->u.get_context.generation = 5031;
        req->u.get_context.offset = 1ull << 34;
        break;
    case KVC_LIST_CONTEXTS:
        req->u.list_contexts.after = "chat/42~";
        req->u.list_contexts.max = 5032;
        break;
    case KVC_DELETE_CONTEXT:
        req->u.delete_context.name = "~";
        req->u.delete_context.if_generation = 5033;
        break;
    default:
        req->u.get_schema.schema = sample_digest(98);
        break;
    }
}

static void fill_put_request(kvc_request *req, size_t data_bytes, kvc_arena *arena)
{
    req->u.put_blocks.schema = sample_digest(90);
    req->u.put_blocks.promise = KVC_PROMISE_DURABLE;
    req->u.put_blocks.n_values = 3;
    req->u.put_blocks.values = sample_values(3, arena);
    req->data = sample_data(data_bytes, arena);
    req->n_data = PIECES;
    req->data_bytes = data_bytes;
}

static void fill_put_stream_request(kvc_request *req, size_t data_bytes, kvc_arena *arena)
{
    req->u.put_stream.n_offers = 3;
    req->u.put_stream.offers = sample_offers(3, arena);
    req->u.put_stream.value = 4321;
    req->data = sample_data(data_bytes, arena);
    req->n_data = PIECES;
    req->data_bytes = data_bytes;
}

static void fill_match_request(kvc_request *req, kvc_arena *arena)
{
    req->u.match_prefix.schema = sample_digest(91);
    req->u.match_prefix.n_digests = 20;
    req->u.match_prefix.digests = sample_digests(20, arena);
    req->u.match_prefix.n_parts = 4;
    req->u.match_prefix.parts = sample_parts;
    req->u.match_prefix.want_tiers = true;
    req->u.match_prefix.want_each = true;
}

kvc_request sample_request(kvc_method method, size_t data_bytes, kvc_arena *arena)
{
    kvc_request req = {.method = method};
    switch (method) {
    case KVC_REGISTER_SCHEMA:
        req.u.register_schema.schema = sample_schema(arena);
        break;
    case KVC_PUT_BLOCKS:
        fill_put_request(&req, data_bytes, arena);
        break;
    case KVC_PUT_BLOCKS_STREAM:
        fill_put_stream_request(&req, data_bytes, arena);
        break;
    case KVC_MATCH_PREFIX:
        fill_match_request(&req, arena);
        break;
    case KVC_OPEN_CONTEXT:
        req.u.open_context.schema = sample_digest(92);
        req.u.open_context.n_digests = 9;
        req.u.open_context.digests = sample_digests(9, arena);
        req.u.open_context.ttl_ms = 1ull << 40;
        break;
    case KVC_EXTEND_CONTEXT:
        req.u.extend_context.context = 0x8000000000000001ull;
        req.u.extend_context.n_blocks_before = 12;
        req.u.extend_context.n_digests = 2;
        req.u.extend_context.digests = sample_digests(2, arena);
        break;
    case KVC_CLOSE_CONTEXT:
    case KVC_TRUNCATE_CONTEXT:
    case KVC_FORK_CONTEXT:
    case KVC_ERASE:
    case KVC_HOLD:
    case KVC_RELEASE:
    case KVC_PREFETCH:
    case KVC_MAP_CONTEXT:
        fill_keep_request(&req, arena);
        break;
    case KVC_PUT_CONTEXT:
    case KVC_GET_CONTEXT:
    case KVC_LIST_CONTEXTS:
    case KVC_DELETE_CONTEXT:
    case KVC_GET_SCHEMA:
        fill_saved_request(&req, data_bytes, arena);
        break;
    case KVC_FETCH_ROWS:
    case KVC_FETCH_ROWS_STREAM:
        req.u.fetch_rows.n_groups = method == KVC_FETCH_ROWS ? 4 : 3;
        req.u.fetch_rows.groups = sample_groups(req.u.fetch_rows.n_groups, arena);
        break;
    case KVC_ATTEND_ROWS:
        fill_attend_request(&req, data_bytes, arena);
        break;
    case KVC_FETCH_BLOCKS:
        req.u.fetch_blocks.schema = sample_digest(93);
        req.u.fetch_blocks.n_digests = 7;
        req.u.fetch_blocks.digests = sample_digests(7, arena);
        req.u.fetch_blocks.n_parts = 3;
        req.u.fetch_blocks.parts = sample_parts;
        break;
    default: /* those without fields */
        break;
    }
    return req;
}

static const kvc_tier_stats *sample_tiers(kvc_arena *arena)
{
    kvc_tier_stats *tiers = zeroed(arena, 2, sizeof(*tiers));
    tiers[0] = (kvc_tier_stats){"dram", 1ull << 33, 2, 3, 4, 5, 6, 7};
    tiers[1] = (kvc_tier_stats){"lmdb", 1ull << 43, 12, 13, 14, 15, 16, 17};
    return tiers;
}

static void fill_fetch_reply(kvc_reply *reply, size_t data_bytes, kvc_arena *arena)
{
    kvc_missing_row *missing = zeroed(arena, 3, sizeof(*missing));
    missing[0] = (kvc_missing_row){0, KVC_NOT_FOUND};
    missing[1] = (kvc_missing_row){17, KVC_CORRUPT};
    missing[2] = (kvc_missing_row){KVC_MAX_PICKS - 1, KVC_IO};
    reply->u.fetch_rows.n_missing = 3;
    reply->u.fetch_rows.missing = missing;
    reply->u.fetch_rows.rows_gpu = 1;
    reply->u.fetch_rows.rows_dram = 22;
    reply->u.fetch_rows.rows_lmdb = 333;
    reply->data = sample_data(data_bytes, arena);
    reply->n_data = PIECES;
    reply->data_bytes = data_bytes;
}

static void fill_map_reply(kvc_reply *reply)
{
    static const kvc_map_segment segments[] = {
        {.id = 1, .len_bytes = 1ull << 26},
        {.id = UINT32_MAX, .len_bytes = 1ull << 40, .gpu = true, .handle = {"share", "device"}},
        {.id = 7, .len_bytes = 1}};
    reply->u.map_context.map = (1ull << 63) + 5;
    reply->u.map_context.lease_bytes = 65536;
    reply->u.map_context.lease_slot = 8191;
    reply->u.map_context.n_blocks = 6001;
    reply->u.map_context.n_segments = 3;
    reply->u.map_context.segments = segments;
    reply->u.map_context.pinned_bytes = 1ull << 41;
    reply->u.map_context.max_bytes = 1ull << 42;
    reply->u.map_context.unpinned = 6002;
}

static void fill_blocks_reply(kvc_reply *reply, size_t data_bytes, kvc_arena *arena)
{
    kvc_block_value *values = zeroed(arena, 3, sizeof(*values));
    values[0] = (kvc_block_value){.block = 4, .part = 10, .status = KVC_NOT_FOUND};
    values[1] = (kvc_block_value){.block = KVC_MAX_DIGESTS - 1,
                                  .part = KVC_MAX_PART_ID,
                                  .tier = KVC_TIER_LMDB,
                                  .len_bytes = (uint32_t)data_bytes,
                                  .whole = {1ull << 44, 1ull << 45}};
    values[2] = (kvc_block_value){.block = 5, .part = 11, .status = KVC_CORRUPT};
    if (data_bytes == 0)
        values[1].status = KVC_AGAIN;
    if (reply->method == KVC_MAP_CONTEXT) {
        fill_map_reply(reply);
    } else {
        reply->u.fetch_blocks.n_values = 3;
        reply->u.fetch_blocks.values = values;
    }
    reply->data = sample_data(data_bytes, arena);
    reply->n_data = PIECES;
    reply->data_bytes = data_bytes;
}

static void fill_stats_reply(kvc_reply *reply, kvc_arena *arena)
{
    kvc_counter *counters = zeroed(arena, 2, sizeof(*counters));
    counters[0] = (kvc_counter){"puts", 1ull << 50};
    counters[1] = (kvc_counter){"rows", 9};
    reply->u.stats.uptime_ms = 123456789;
    reply->u.stats.boot_id = 0xabcdefull;
    reply->u.stats.n_tiers = 2;
    reply->u.stats.tiers = sample_tiers(arena);
    reply->u.stats.n_counters = 2;
    reply->u.stats.counters = counters;
}

static void fill_put_stream_reply(kvc_reply *reply)
{
    static const kvc_put_answer answers[] = {
        {.value = 5, .send = true},
        {.value = 6, .status = KVC_AGAIN, .retry_after_ms = 77},
        {.value = 7, .status = KVC_EXISTS, .ttl_ms = 1ull << 41},
    };
    reply->u.put_stream.n_answers = 3;
    reply->u.put_stream.answers = answers;
}

static void fill_keep_reply(kvc_reply *reply)
{
    switch (reply->method) {
    case KVC_TRUNCATE_CONTEXT:
        reply->u.truncate_context.n_tokens = 4243;
        break;
    case KVC_FORK_CONTEXT:
        reply->u.fork_context.context = 4244;
        reply->u.fork_context.ttl_ms = 4245;
        reply->u.fork_context.n_tokens = 4246;
        break;
    case KVC_ERASE:
        reply->u.erase.values = 4247;
        reply->u.erase.bytes = 4248;
        break;
    case KVC_HOLD:
        reply->u.hold.hold = 4249;
        reply->u.hold.ttl_ms = 4250;
        reply->u.hold.n_blocks = 4251;
        reply->u.hold.tenant_bytes = 4252;
        reply->u.hold.max_bytes = 4253;
        break;
    case KVC_PREFETCH:
        reply->u.prefetch.there = 4254;
        reply->u.prefetch.moved = 4255;
        reply->u.prefetch.missing = 4256;
        reply->u.prefetch.left = 4257;
        reply->u.prefetch.moved_bytes = 4258;
        break;
    case KVC_PUT_BLOCKS_STREAM:
        fill_put_stream_reply(reply);
        break;
    default:
        break;
    }
}

static void fill_saved_reply(kvc_reply *reply, size_t data_bytes, kvc_arena *arena)
{
    switch (reply->method) {
    case KVC_PUT_CONTEXT:
        reply->u.put_context.received = 1ull << 35;
        reply->u.put_context.generation = 5034;
        reply->u.put_context.promise = KVC_PROMISE_DURABLE;
        break;
    case KVC_GET_CONTEXT:
        reply->u.get_context.context = *sample_saved(1, arena);
        reply->data = sample_data(data_bytes, arena);
        reply->n_data = PIECES;
        reply->data_bytes = data_bytes;
        break;
    case KVC_LIST_CONTEXTS:
        reply->u.list_contexts.n_contexts = 3;
        reply->u.list_contexts.contexts = sample_saved(3, arena);
        reply->u.list_contexts.more = true;
        break;
    default:
        reply->u.get_schema.schema = sample_schema(arena);
        break;
    }
}

static void fill_describe_reply(kvc_reply *reply, kvc_arena *arena)
{
    reply->u.describe.version = "0.1.0";
    reply->u.describe.boot_id = 1ull << 63;
    uint32_t limit = 0;
#define X(name) reply->u.describe.limits.name = ++limit;
#include "wire/limits.def"
#undef X
    reply->u.describe.n_tiers = 2;
    reply->u.describe.tiers = sample_tiers(arena);
    reply->u.describe.n_schemas = 3;
    reply->u.describe.schemas = sample_digests(3, arena);
    static const uint8_t opaque[] = {0, 1, 0};
    reply->u.describe.opaque = opaque;
}

kvc_reply sample_reply(kvc_method method, size_t data_bytes, kvc_arena *arena)
{
    static const uint8_t tiers[] = {KVC_TIER_DRAM, KVC_TIER_LMDB, KVC_TIER_GPU};
    static const int8_t status[] = {KVC_OK, KVC_EXISTS, KVC_AGAIN, KVC_DENIED};
    kvc_reply reply = {.method = method};
    switch (method) {
    case KVC_DESCRIBE:
        fill_describe_reply(&reply, arena);
        break;
    case KVC_REGISTER_SCHEMA:
        reply.u.register_schema.digest = sample_digest(5);
        break;
    case KVC_PUT_BLOCKS:
        reply.u.put_blocks.n_values = 4;
        reply.u.put_blocks.status = status;
        break;
    case KVC_MATCH_PREFIX:
        reply.u.match_prefix.hits = 3;
        reply.u.match_prefix.n_tiers = 3;
        reply.u.match_prefix.tiers = tiers;
        break;
    case KVC_OPEN_CONTEXT:
        reply.u.open_context.context = 0xffffffffffffffffull;
        reply.u.open_context.ttl_ms = 60000;
        reply.u.open_context.n_tokens = 1 << 20;
        break;
    case KVC_EXTEND_CONTEXT:
        reply.u.extend_context.n_tokens = 4242;
        break;
    case KVC_TRUNCATE_CONTEXT:
    case KVC_FORK_CONTEXT:
    case KVC_ERASE:
    case KVC_HOLD:
    case KVC_PREFETCH:
    case KVC_PUT_BLOCKS_STREAM:
        fill_keep_reply(&reply);
        break;
    case KVC_PUT_CONTEXT:
    case KVC_GET_CONTEXT:
    case KVC_LIST_CONTEXTS:
    case KVC_GET_SCHEMA:
        fill_saved_reply(&reply, data_bytes, arena);
        break;
    case KVC_FETCH_ROWS:
    case KVC_ATTEND_ROWS:
        fill_fetch_reply(&reply, data_bytes, arena);
        break;
    case KVC_STATS:
        fill_stats_reply(&reply, arena);
        break;
    case KVC_FETCH_ROWS_STREAM:
        fill_fetch_reply(&reply, data_bytes, arena);
        reply.u.fetch_rows.n_picks = 4321;
        break;
    case KVC_FETCH_BLOCKS:
    case KVC_MAP_CONTEXT:
        fill_blocks_reply(&reply, data_bytes, arena);
        break;
    case KVC_DELETE_CONTEXT:
    case KVC_RELEASE:
    case KVC_CLOSE_CONTEXT:
    case KVC_METHOD_COUNT:
        break;
    }
    return reply;
}
