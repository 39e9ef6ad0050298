/*
 * server_test.c: one server in this process, over inproc and, where it is built, gRPC: puts,
 * matches, contexts and fetches from dram, and the answer to each kind of bad request.
 */
#include "harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/metrics.h"
#include "request.h"

#define ROW 512u

static const char *const uris[] = {NULL, "grpc://127.0.0.1:0"}; /* NULL: inproc */

typedef struct fixture {
    h_server h;
    h_peer *peer;
    h_schema schema;
} fixture;

static int start(void **state, const char *uri, uint64_t dram_bytes)
{
    fixture *f = calloc(1, sizeof(*f));
    h_server_init(&f->h);
    if (uri)
        f->h.settings.listen = uri;
    f->h.settings.dram_bytes = dram_bytes;
    f->h.settings.max_contexts = 3;
    h_server_start(&f->h);
    f->peer = h_connect(kvs_server_uri(f->h.server, 0), "default");
    h_schema_init(&f->schema, "model", 3, ROW, true);
    assert_int_equal(h_register(f->peer, &f->schema), KVC_OK);
    *state = f;
    return 0;
}

static int setup(void **state)
{
    return start(state, uris[*state == NULL ? 0 : (uintptr_t)*state], 64u << 20);
}

static int setup_small(void **state)
{
    return start(state, NULL, 256u << 10); /* eight values of 32 KiB */
}

static int teardown(void **state)
{
    fixture *f = *state;
    h_disconnect(f->peer);
    h_server_fini(&f->h);
    free(f);
    return 0;
}

static void put_all(fixture *f, uint64_t first, uint32_t n)
{
    const uint32_t parts[] = {0, 10, 20};
    for (uint32_t b = 0; b < n; b++) {
        assert_int_equal(h_put(f->peer, &f->schema, first + b, parts, 3, KVC_PROMISE_MEMORY),
                         KVC_OK);
        for (uint32_t i = 0; i < 3; i++)
            assert_int_equal(f->peer->status[i], KVC_OK);
    }
}

static void test_put_fetch(void **state)
{
    fixture *f = *state;
    uint64_t context, seed = 42;
    uint32_t hits, picks[512];
    put_all(f, 0, 20);
    assert_int_equal(h_match(f->peer, &f->schema, 0, 25, NULL, 0, &hits), KVC_OK);
    assert_int_equal(hits, 20);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 20, 0, &context), KVC_OK);
    assert_int_equal(f->peer->xfer.reply.u.open_context.n_tokens, 20 * H_TOKENS);
    for (uint32_t i = 0; i < 512; i++)
        picks[i] = (uint32_t)(h_random(&seed) % (20 * H_TOKENS));
    h_fetch_equal(f->peer, &f->schema, context, 0, 10, picks, 512);
    assert_int_equal(f->peer->xfer.reply.u.fetch_rows.rows_dram, 512);
    for (uint32_t i = 0; i < 512; i++)
        picks[i] = 100 + i; /* one long run over nine blocks: slices of dram */
    h_fetch_equal(f->peer, &f->schema, context, 0, 0, picks, 512);
    h_fetch_equal(f->peer, &f->schema, context, 0, 0, picks, 1);
    assert_int_equal(h_fetch(f->peer, context, 0, NULL, 0), KVC_OK);
    assert_int_equal(f->peer->data_bytes, 0);
}

static void test_fetch_groups_and_missing(void **state)
{
    fixture *f = *state;
    const uint32_t some[] = {5, 5, 64 + 1, 9999, 2 * 64 + 3}, other[] = {0, 63};
    uint64_t context;
    const uint32_t part0 = 0;
    assert_int_equal(h_put(f->peer, &f->schema, 0, &part0, 1, KVC_PROMISE_MEMORY), KVC_OK);
    assert_int_equal(h_put(f->peer, &f->schema, 2, &part0, 1, KVC_PROMISE_MEMORY), KVC_OK);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 3, 0, &context), KVC_OK);
    kvc_row_group groups[] = {
        {context, 0, 5, some}, {context, 10, 2, other}, {context, 0, 2, other}};
    kvc_request req = {.method = KVC_FETCH_ROWS};
    req.u.fetch_rows.groups = groups;
    req.u.fetch_rows.n_groups = 3;
    assert_int_equal(h_call(f->peer, &req), KVC_OK);
    const uint32_t missing[] = {2, 3, 5, 6};
    assert_int_equal(f->peer->n_missing, 4);
    for (uint32_t i = 0; i < 4; i++) {
        assert_int_equal(f->peer->missing[i].index, missing[i]);
        assert_int_equal(f->peer->missing[i].status, KVC_NOT_FOUND);
    }
    assert_int_equal(f->peer->data_bytes, 5 * ROW);
    assert_true(h_row_is(0, 0, 5, ROW, f->peer->data));
    assert_true(h_row_is(0, 0, 5, ROW, f->peer->data + ROW));
    assert_true(h_row_is(2, 0, 3, ROW, f->peer->data + 2 * ROW));
    assert_true(h_row_is(0, 0, 0, ROW, f->peer->data + 3 * ROW));
    assert_true(h_row_is(0, 0, 63, ROW, f->peer->data + 4 * ROW));
    /* A value put later is found through the same context. */
    assert_int_equal(h_put1(f->peer, &f->schema, 1, 0, KVC_PROMISE_MEMORY), KVC_OK);
    h_fetch_equal(f->peer, &f->schema, context, 0, 0, &some[2], 1);
}

static void test_first_put_wins(void **state)
{
    fixture *f = *state;
    assert_int_equal(h_put1(f->peer, &f->schema, 7, 0, KVC_PROMISE_MEMORY), KVC_OK);
    assert_int_equal(h_put1(f->peer, &f->schema, 7, 0, KVC_PROMISE_MEMORY), KVC_EXISTS);
    const uint32_t parts[] = {0, 10, 10};
    assert_int_equal(h_put(f->peer, &f->schema, 7, parts, 3, KVC_PROMISE_MEMORY), KVC_OK);
    assert_int_equal(f->peer->status[0], KVC_EXISTS);
    assert_int_equal(f->peer->status[1], KVC_OK);
    assert_int_equal(f->peer->status[2], KVC_EXISTS);
}

static void test_match(void **state)
{
    fixture *f = *state;
    uint32_t hits;
    const uint32_t part0 = 0, part20 = 20, kv[] = {0, 10};
    for (uint32_t b = 0; b < 5; b++) {
        assert_int_equal(h_put1(f->peer, &f->schema, b, 0, KVC_PROMISE_MEMORY), KVC_OK);
        if (b != 3)
            assert_int_equal(h_put1(f->peer, &f->schema, b, 10, KVC_PROMISE_MEMORY), KVC_OK);
    }
    assert_int_equal(h_match(f->peer, &f->schema, 0, 9, NULL, 0, &hits), KVC_OK);
    assert_int_equal(hits, 3); /* part 20 is an index: not asked for by default */
    assert_int_equal(h_match(f->peer, &f->schema, 0, 9, &part0, 1, &hits), KVC_OK);
    assert_int_equal(hits, 5);
    assert_int_equal(h_match(f->peer, &f->schema, 0, 9, &part20, 1, &hits), KVC_OK);
    assert_int_equal(hits, 0);
    assert_int_equal(h_match(f->peer, &f->schema, 4, 1, kv, 2, &hits), KVC_OK);
    assert_int_equal(hits, 1);
    assert_int_equal(h_match(f->peer, &f->schema, 0, 0, NULL, 0, &hits), KVC_OK);
    assert_int_equal(hits, 0);
    const uint32_t unknown = 11;
    assert_int_equal(h_match(f->peer, &f->schema, 0, 1, &unknown, 1, &hits), KVC_INVALID);
    const uint32_t twice[] = {0, 10, 0, 10};
    uint32_t n_hits;
    assert_int_equal(h_match(f->peer, &f->schema, 0, 1, twice, 4, &n_hits), KVC_INVALID);
    assert_string_equal(f->peer->xfer.detail, "4 parts; the schema has 3");
    assert_int_equal(h_match(f->peer, &f->schema, 0, 1, twice, 3, &n_hits), KVC_INVALID);
    assert_string_equal(f->peer->xfer.detail, "part 0 is named twice");
}

/* The least time of a few tries to fetch groups: one of n_large picks, and n_small of one pick. */
static uint64_t fetch_ns(fixture *f, uint64_t context, uint32_t n_large, uint32_t n_small)
{
    static uint32_t picks[60000];
    static kvc_row_group groups[KVC_MAX_GROUPS];
    kvc_request req = {.method = KVC_FETCH_ROWS};
    uint64_t least = UINT64_MAX;
    for (uint32_t i = 0; i < n_large; i++)
        picks[i] = i % (4 * H_TOKENS);
    groups[0] = (kvc_row_group){.context = context, .n_picks = n_large, .picks = picks};
    for (uint32_t i = 0; i < n_small; i++)
        groups[1 + i] = (kvc_row_group){.context = context, .n_picks = 1, .picks = picks};
    req.u.fetch_rows.groups = n_large ? groups : groups + 1;
    req.u.fetch_rows.n_groups = (n_large > 0) + n_small;
    for (int i = 0; i < 5; i++) {
        uint64_t start = kvc_now_ns();
        assert_int_equal(h_call(f->peer, &req), KVC_OK);
        uint64_t took = kvc_now_ns() - start;
        least = took < least ? took : least;
    }
    return least;
}

/* Small groups beside a large one cost what they cost alone, not a large table each. */
static void test_small_groups_are_cheap(void **state)
{
    fixture *f = *state;
    uint64_t context;
    h_schema_init(&f->schema, "narrow", 1, 16, false);
    assert_int_equal(h_register(f->peer, &f->schema), KVC_OK);
    for (uint64_t b = 0; b < 4; b++)
        assert_int_equal(h_put1(f->peer, &f->schema, b, 0, KVC_PROMISE_MEMORY), KVC_OK);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 4, 0, &context), KVC_OK);
    uint64_t large = 0, small = 0, both = 1;
    for (int i = 0; i < 20 && both > 3 * (large + small); i++) { /* others may take the cores */
        large = fetch_ns(f, context, 60000, 0);
        small = fetch_ns(f, context, 0, 1000);
        both = fetch_ns(f, context, 60000, 1000);
    }
    if (both > 3 * (large + small))
        fail_msg("%llu us and %llu us alone, %llu us together", (unsigned long long)large / 1000,
                 (unsigned long long)small / 1000, (unsigned long long)both / 1000);
}

static void test_bad_puts_leave_nothing(void **state)
{
    fixture *f = *state;
    uint32_t hits;
    char bytes[2 * H_TOKENS * ROW] = {0};
    struct iovec iov = {.iov_base = bytes, .iov_len = H_TOKENS * ROW};
    kvc_put_value values[2] = {{h_digest(1), 0, H_TOKENS * ROW, {0, 0}},
                               {h_digest(1), 10, H_TOKENS * ROW, {0, 0}}};
    kvc_request req = {.method = KVC_PUT_BLOCKS, .data = &iov, .n_data = 1};
    req.data_bytes = iov.iov_len;
    req.u.put_blocks.schema = f->schema.digest;
    req.u.put_blocks.promise = KVC_PROMISE_MEMORY;
    req.u.put_blocks.n_values = 2;
    req.u.put_blocks.values = values;
    assert_int_equal(h_call(f->peer, &req), KVC_INVALID); /* half of the payload is missing */
    iov.iov_len = req.data_bytes = 2 * H_TOKENS * ROW;
    values[1].part = 11;
    assert_int_equal(h_call(f->peer, &req), KVC_INVALID);
    assert_non_null(strstr(f->peer->xfer.detail, "part 11"));
    values[1].part = 10;
    values[1].len_bytes--;
    assert_int_equal(h_call(f->peer, &req), KVC_INVALID);
    values[1].len_bytes++;
    req.u.put_blocks.promise = KVC_PROMISE_DURABLE; /* no lmdb tier here */
    assert_int_equal(h_call(f->peer, &req), KVC_UNSUPPORTED);
    req.u.put_blocks.promise = KVC_PROMISE_MEMORY;
    req.u.put_blocks.schema = h_digest(99);
    assert_int_equal(h_call(f->peer, &req), KVC_NOT_FOUND);
    const uint32_t part0 = 0;
    assert_int_equal(h_match(f->peer, &f->schema, 1, 1, &part0, 1, &hits), KVC_OK);
    assert_int_equal(hits, 0);
    req.u.put_blocks.schema = f->schema.digest;
    assert_int_equal(h_call(f->peer, &req), KVC_OK);
}

static uint32_t blocks_used(fixture *f)
{
    kvs_index *index = f->h.server->index;
    kvc_mutex_lock(&index->lock);
    uint32_t used = index->blocks.used;
    kvc_mutex_unlock(&index->lock);
    return used;
}

static void test_contexts(void **state)
{
    fixture *f = *state;
    uint64_t a, b, c, d;
    uint32_t pick = 0;
    assert_int_equal(h_open(f->peer, &f->schema, 0, 100, 0, &a), KVC_OK);
    assert_int_equal(h_extend(f->peer, a, 100, 100, 200), KVC_OK);
    assert_int_equal(f->peer->xfer.reply.u.extend_context.n_tokens, 300 * H_TOKENS);
    assert_int_equal(h_extend(f->peer, a, 100, 100, 200), KVC_OK); /* a retry */
    assert_int_equal(f->peer->xfer.reply.u.extend_context.n_tokens, 300 * H_TOKENS);
    assert_int_equal(h_extend(f->peer, a, 100, 101, 200), KVC_INVALID);
    assert_int_equal(h_extend(f->peer, a, 200, 200, 101), KVC_INVALID);
    assert_int_equal(h_extend(f->peer, a, 301, 301, 1), KVC_INVALID);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 1, 0, &b), KVC_OK);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 1, 0, &c), KVC_OK);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 1, 0, &d), KVC_NO_SPACE); /* max_contexts 3 */
    assert_int_equal(h_close(f->peer, b), KVC_OK);
    assert_int_equal(h_close(f->peer, b), KVC_STALE_HANDLE);
    assert_int_equal(h_fetch(f->peer, b, 0, &pick, 1), KVC_STALE_HANDLE);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 1, 0, &d), KVC_OK);
    assert_true(d != b);
    assert_int_equal(h_fetch(f->peer, d ^ (1ull << 63), 0, &pick, 1), KVC_STALE_HANDLE);
    assert_int_equal(h_fetch(f->peer, 0, 0, &pick, 1), KVC_STALE_HANDLE);
    assert_int_equal(h_fetch(f->peer, d, 11, &pick, 1), KVC_INVALID);
    assert_int_equal(h_fetch(f->peer, c, 0, &pick, 1), KVC_OK);
    /* Nothing holds their blocks once they are closed. */
    assert_int_equal(blocks_used(f), 300);
    assert_int_equal(h_close(f->peer, a), KVC_OK);
    assert_int_equal(h_close(f->peer, c), KVC_OK);
    assert_int_equal(blocks_used(f), 1);
    assert_int_equal(h_close(f->peer, d), KVC_OK);
    assert_int_equal(blocks_used(f), 0);
}

static void test_ttl(void **state)
{
    fixture *f = *state;
    uint64_t short_one, used;
    uint32_t pick = 0, n_uses = 0;
    /* A busy machine may not come to use it within the first times. */
    for (uint32_t ttl_ms = 200; n_uses < 8 && ttl_ms < 60000; ttl_ms *= 4) {
        assert_int_equal(h_open(f->peer, &f->schema, 0, 1, ttl_ms, &short_one), KVC_OK);
        assert_int_equal(f->peer->xfer.reply.u.open_context.ttl_ms, ttl_ms);
        assert_int_equal(h_open(f->peer, &f->schema, 0, 1, ttl_ms, &used), KVC_OK);
        kvc_status status = KVC_OK;
        for (n_uses = 0; status == KVC_OK && n_uses < 8; n_uses += status == KVC_OK) {
            usleep(ttl_ms * 250);
            status = h_fetch(f->peer, used, 0, &pick, 1);
        }
        assert_true(status == KVC_OK || status == KVC_STALE_HANDLE);
    }
    assert_int_equal(n_uses, 8);
    assert_int_equal(h_fetch(f->peer, short_one, 0, &pick, 1), KVC_STALE_HANDLE);
    kvs_server_tick(f->h.server);
    assert_int_equal(kvc_metric_get(KVC_M_contexts_open), 1);
}

static void test_limits(void **state)
{
    fixture *f = *state;
    uint64_t context;
    assert_int_equal(h_open(f->peer, &f->schema, 0, 100, 0, &context), KVC_OK);
    uint32_t n = KVC_MAX_VALUE_BYTES / ROW + 1;
    uint32_t *picks = calloc(KVC_MAX_PICKS + 1, sizeof(*picks));
    assert_int_equal(h_fetch(f->peer, context, 0, picks, n), KVC_INVALID);
    assert_non_null(strstr(f->peer->xfer.detail, "max_message_bytes"));
    assert_int_equal(h_fetch(f->peer, context, 0, picks, n - 1), KVC_OK);
    assert_int_equal(f->peer->n_missing, n - 1);
    assert_int_not_equal(h_fetch(f->peer, context, 0, picks, KVC_MAX_PICKS + 1), KVC_OK);
    free(picks);
}

static void test_schemas(void **state)
{
    fixture *f = *state;
    h_schema bad;
    assert_int_equal(h_register(f->peer, &f->schema), KVC_OK);
    h_schema_init(&bad, "model", 2, ROW, false);
    bad.parts[1].part = bad.parts[0].part;
    assert_int_equal(h_register(f->peer, &bad), KVC_INVALID);
    assert_true(strlen(f->peer->xfer.detail) > 10);
    h_schema_init(&bad, "model", 2, ROW, false);
    bad.parts[1].row_bytes = 1u << 20;
    assert_int_equal(h_register(f->peer, &bad), KVC_INVALID);
    kvc_request req = {.method = KVC_DESCRIBE};
    assert_int_equal(h_call(f->peer, &req), KVC_OK);
    assert_int_equal(f->peer->xfer.reply.u.describe.n_schemas, 1);
    assert_int_equal(f->peer->n_opaque, 0);
    assert_int_equal(f->peer->xfer.reply.u.describe.n_tiers, 1);
    assert_int_equal(f->peer->xfer.reply.u.describe.boot_id, f->h.server->boot_id);
    const kvc_limits *limits = &f->peer->xfer.reply.u.describe.limits;
    assert_int_equal(limits->max_contexts, 3);
    assert_int_equal(limits->max_hold_bytes, f->h.settings.dram_bytes / 2);
    assert_int_equal(limits->max_connections, f->h.settings.max_connections);
    assert_true(limits->max_attend_calls > f->h.settings.attend_queue);
#define X(name)                                                                                    \
    if (limits->name == 0)                                                                         \
        fail_msg("%s is not told", #name);
#include "wire/limits.def"
#undef X
}

/* One schema more than a Describe can list is refused, and Describe goes on. */
static void test_many_schemas(void **state)
{
    fixture *f = *state;
    h_schema schema;
    char model[32];
    kvc_request req = {.method = KVC_DESCRIBE};
    for (uint32_t i = 1; i <= KVS_MAX_SCHEMAS; i++) {
        snprintf(model, sizeof(model), "model-%u", i);
        h_schema_init(&schema, model, 1, ROW, false);
        assert_int_equal(h_register(f->peer, &schema), i < KVS_MAX_SCHEMAS ? KVC_OK : KVC_NO_SPACE);
    }
    assert_int_equal(h_call(f->peer, &req), KVC_OK);
    assert_int_equal(f->peer->xfer.reply.u.describe.n_schemas, KVS_MAX_SCHEMAS);
    assert_int_equal(h_register(f->peer, &f->schema), KVC_OK);
}

/* ---- calls without a transport, to choose tenant and deadline ---------------------------------
 */

typedef struct fake_call {
    kvt_call call;
    kvc_status status;
    kvc_reply reply;
    uint32_t n_replies;
} fake_call;

static void fake_reply(kvt_call *call, kvc_status status, const char *detail,
                       uint32_t retry_after_ms, const kvc_reply *reply, const kvt_slice *slices,
                       uint32_t n_slices)
{
    (void)detail;
    (void)retry_after_ms;
    fake_call *fake = (fake_call *)call;
    fake->status = status;
    if (reply)
        fake->reply = *reply;
    fake->n_replies++;
    for (uint32_t i = 0; i < n_slices; i++)
        slices[i].release(slices[i].arg);
}

static const kvt_ops fake_ops = {.name = "fake", .reply = fake_reply};

static kvc_status fake(fixture *f, fake_call *fake, const kvc_request *req, const char *tenant,
                       uint64_t deadline_ns)
{
    memset(fake, 0, sizeof(*fake));
    fake->call.ops = &fake_ops;
    fake->call.req = *req;
    fake->call.tenant = tenant;
    fake->call.deadline_ns = deadline_ns;
    kvc_arena_init(&fake->call.arena, 1u << 20);
    kvs_on_call(f->h.server, &fake->call);
    assert_int_equal(fake->n_replies, 1);
    kvc_arena_reset(&fake->call.arena);
    return fake->status;
}

static void test_tenants_apart(void **state)
{
    fixture *f = *state;
    fake_call call;
    uint64_t context;
    const kvc_digest digest = h_digest(0);
    put_all(f, 0, 1);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 1, 0, &context), KVC_OK);

    kvc_request close = {.method = KVC_CLOSE_CONTEXT};
    close.u.close_context.context = context;
    assert_int_equal(fake(f, &call, &close, "other", 0), KVC_STALE_HANDLE);
    kvc_request match = {.method = KVC_MATCH_PREFIX};
    match.u.match_prefix.schema = f->schema.digest;
    match.u.match_prefix.digests = &digest;
    match.u.match_prefix.n_digests = 1;
    assert_int_equal(fake(f, &call, &match, "other", 0), KVC_NOT_FOUND);
    kvc_request reg = {.method = KVC_REGISTER_SCHEMA};
    reg.u.register_schema.schema = &f->schema.schema;
    assert_int_equal(fake(f, &call, &reg, "other", 0), KVC_OK);
    assert_int_equal(fake(f, &call, &match, "other", 0), KVC_OK);
    assert_int_equal(call.reply.u.match_prefix.hits, 0);
    assert_int_equal(fake(f, &call, &match, "default", 0), KVC_OK);
    assert_int_equal(call.reply.u.match_prefix.hits, 1);
    assert_int_equal(fake(f, &call, &match, "", 0), KVC_DENIED);
    assert_int_equal(fake(f, &call, &close, "default", 0), KVC_OK);
}

static void test_deadline(void **state)
{
    fixture *f = *state;
    fake_call call;
    kvc_request req = {.method = KVC_DESCRIBE};
    assert_int_equal(fake(f, &call, &req, "default", kvc_now_ns() - 1), KVC_TIMED_OUT);
    assert_int_equal(fake(f, &call, &req, "default", kvc_deadline_ns(1000000000)), KVC_OK);
    req.method = KVC_METHOD_COUNT;
    assert_int_equal(fake(f, &call, &req, "default", 0), KVC_UNSUPPORTED);
}

static void test_stats(void **state)
{
    fixture *f = *state;
    put_all(f, 0, 2);
    kvc_tier_stats tiers[2];
    uint64_t puts = kvc_metric_get(KVC_M_put_values);
    assert_true(puts >= 6);
    kvc_request req = {.method = KVC_STATS};
    assert_int_equal(h_call(f->peer, &req), KVC_OK);
    assert_int_equal(f->peer->xfer.reply.u.stats.n_counters, KVC_METRIC_COUNT);
    kvs_tier_usage usage;
    f->h.server->dram.ops->usage(f->h.server->dram.tier, &usage);
    assert_int_equal(usage.values, 6);
    assert_true(usage.used_bytes >= 6 * H_TOKENS * ROW);
    (void)tiers;
}

/* dram alone: old values give way, the cap holds, and what is there is right. */
static void test_eviction(void **state)
{
    fixture *f = *state;
    uint32_t hits, found = 0;
    const uint32_t part0 = 0, pick = 3;
    uint64_t context;
    for (uint32_t b = 0; b < 50; b++) {
        assert_int_equal(h_put1(f->peer, &f->schema, b, 0, KVC_PROMISE_MEMORY), KVC_OK);
        kvs_tier_usage usage;
        f->h.server->dram.ops->usage(f->h.server->dram.tier, &usage);
        assert_true(usage.used_bytes <= f->h.settings.dram_bytes);
        assert_int_equal(h_match(f->peer, &f->schema, b, 1, &part0, 1, &hits), KVC_OK);
        assert_int_equal(hits, 1);
    }
    for (uint32_t b = 0; b < 50; b++) {
        assert_int_equal(h_open(f->peer, &f->schema, b, 1, 0, &context), KVC_OK);
        assert_int_equal(h_fetch(f->peer, context, 0, &pick, 1), KVC_OK);
        if (f->peer->n_missing == 0) {
            found++;
            assert_true(h_row_is(b, 0, 3, ROW, f->peer->data));
        }
        assert_int_equal(h_close(f->peer, context), KVC_OK);
    }
    assert_int_equal(found, 8);
    assert_true(atomic_load(&f->h.server->dram.evictions) == 42);
}

/* Another size class gets room too, though the first one holds every segment. */
static void test_classes_share(void **state)
{
    fixture *f = *state;
    h_schema small;
    for (uint32_t b = 0; b < 20; b++)
        assert_int_equal(h_put1(f->peer, &f->schema, b, 0, KVC_PROMISE_MEMORY), KVC_OK);
    h_schema_init(&small, "small", 1, 64, false);
    assert_int_equal(h_register(f->peer, &small), KVC_OK);
    assert_int_equal(h_put1(f->peer, &small, 1, 0, KVC_PROMISE_MEMORY), KVC_OK);
}

/* A value that is being read does not give way; with all of them read, a put gets AGAIN. */
static void test_again(void **state)
{
    fixture *f = *state;
    kvs_server *server = f->h.server;
    const kvs_schema *schema = server->schemas->by_id[1];
    kvs_read reads[8];
    uint32_t values[8];
    for (uint32_t b = 0; b < 8; b++) {
        kvc_digest digest = h_digest(b);
        assert_int_equal(h_put1(f->peer, &f->schema, b, 0, KVC_PROMISE_MEMORY), KVC_OK);
        assert_int_equal(kvs_index_hold_blocks(server->index, schema, &digest, 1, &reads[b].block),
                         KVC_OK);
    }
    kvs_index_ref(server->index, schema, 0, 0, 0, reads, 8);
    assert_int_equal(h_put1(f->peer, &f->schema, 8, 0, KVC_PROMISE_MEMORY), KVC_AGAIN);
    for (uint32_t b = 0; b < 8; b++) {
        assert_int_equal(reads[b].where, KVS_IN_DRAM);
        values[b] = reads[b].value;
    }
    kvs_index_unref(server->index, values, 8);
    assert_int_equal(h_put1(f->peer, &f->schema, 8, 0, KVC_PROMISE_MEMORY), KVC_OK);
    for (uint32_t b = 0; b < 8; b++)
        kvs_index_drop_blocks(server->index, &reads[b].block, 1);
}

#ifdef KVASIR_GRPC
#define BOTH(t)                                                                                    \
    {#t " inproc", t, setup, teardown, NULL},                                                      \
    {                                                                                              \
#t " grpc", t, setup, teardown, (void *)1                                                  \
    }
#else
#define BOTH(t)                                                                                    \
    {                                                                                              \
#t " inproc", t, setup, teardown, NULL                                                     \
    }
#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        BOTH(test_put_fetch),
        BOTH(test_fetch_groups_and_missing),
        BOTH(test_first_put_wins),
        BOTH(test_match),
        BOTH(test_bad_puts_leave_nothing),
        cmocka_unit_test_setup_teardown(test_small_groups_are_cheap, setup, teardown),
        BOTH(test_contexts),
        BOTH(test_limits),
        BOTH(test_schemas),
        BOTH(test_many_schemas),
        {"test_ttl", test_ttl, setup, teardown, NULL},
        {"test_tenants_apart", test_tenants_apart, setup, teardown, NULL},
        {"test_deadline", test_deadline, setup, teardown, NULL},
        {"test_stats", test_stats, setup, teardown, NULL},
        {"test_eviction", test_eviction, setup_small, teardown, NULL},
        {"test_classes_share", test_classes_share, setup_small, teardown, NULL},
        {"test_again", test_again, setup_small, teardown, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
