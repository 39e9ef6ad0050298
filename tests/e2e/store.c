/*
 * store.c: see store.h.
 */
#include "store.h"

#include <signal.h>

#define BATCH_BLOCKS 16u
#define MS           1000000ull

const uint32_t store_row_bytes[STORE_PARTS] = {4096, 512, 128};

uint8_t store_byte(uint32_t part, uint32_t token, uint32_t b)
{
    uint32_t x = token * 2654435761u ^ part * 40503u ^ b * 97u;
    return (uint8_t)(x ^ x >> 8 ^ x >> 16);
}

static void fill_schema(kvc_schema *schema_p, kvc_part parts[STORE_PARTS])
{
    static const uint32_t heads[STORE_PARTS] = {8, 1, 0};
    for (uint32_t p = 0; p < STORE_PARTS; p++) {
        uint32_t half = store_row_bytes[p] / 2;
        parts[p] = (kvc_part){
            .part = p,
            .kind = p == 2 ? KVC_PART_INDEX : KVC_PART_KV,
            .dtype = p == 2 ? KVC_DTYPE_I8 : KVC_DTYPE_BF16,
            .layer = p,
            .kv_head_count = heads[p],
            .row_bytes = store_row_bytes[p],
            .rope = {.type = KVC_ROPE_NONE},
            .codec = p == 2 ? "esa d=124 sha256=0" : NULL,
        };
        if (p == 2) {
            parts[p].k_len_bytes = store_row_bytes[p];
            continue;
        }
        parts[p].k_len_bytes = half;
        parts[p].v_off_bytes = half;
        parts[p].v_len_bytes = half;
        parts[p].q_dim = parts[p].v_dim = half / 2 / heads[p];
    }
    *schema_p = (kvc_schema){
        .model = "e2e",
        .revision = "1",
        .recipe = "full",
        .tp_size = 1,
        .block_tokens = STORE_BLOCK_TOKENS,
        .n_parts = STORE_PARTS,
        .parts = parts,
    };
}

static void fill_digests(store *s)
{
    uint32_t tokens[STORE_BLOCK_TOKENS];
    for (uint32_t i = 0; i < STORE_MAX_BLOCKS; i++) {
        for (uint32_t t = 0; t < STORE_BLOCK_TOKENS; t++)
            tokens[t] = i * STORE_BLOCK_TOKENS + t;
        assert_ok(kvc_block_digest(&s->schema, i == 0 ? NULL : &s->digests[i - 1], tokens,
                                   STORE_BLOCK_TOKENS, NULL, 0, &s->digests[i]));
    }
}

static bool start(store *s, bool wait)
{
    char listen[640];
    const char *args[16] = {"--listen", listen, "--dram-bytes", s->dram_bytes, "--drain", "2s"};
    int n = 6;
    (void)snprintf(s->unix_uri, sizeof(s->unix_uri), "grpc+unix://%s/sock", s->folder);
    if (s->tcp_uri[0] == '\0')
        support_daemon_address(s->tcp_uri, sizeof(s->tcp_uri));
    (void)snprintf(listen, sizeof(listen), "%s,%s", s->tcp_uri, s->unix_uri);
    if (s->has_lmdb) {
        args[n++] = "--lmdb-path";
        args[n++] = s->lmdb_path;
        args[n++] = "--lmdb-bytes";
        args[n++] = "1GiB";
    }
    if (!support_daemon_spawn(&s->daemon, s->folder, args))
        return false;
    if (!wait)
        return true;
    return support_daemon_wait(&s->daemon);
}

bool store_try_start(store *s)
{
    return start(s, true);
}

bool store_spawn(store *s)
{
    return start(s, false);
}

void store_start(store *s)
{
    assert_true(store_try_start(s));
}

void store_end(store *s, int signal)
{
    int status = support_daemon_stop(&s->daemon, signal);
    if (signal == SIGKILL)
        assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    else
        assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

kvc_client *store_connect(const char *uris)
{
    kvc_client *client = NULL;
    kvc_client_opts opts = {.size_bytes = sizeof(opts),
                            .uris = uris,
                            .n_channels = 2,
                            .connect_timeout_ns = SUPPORT_PATIENCE_NS,
                            .default_timeout_ns = SUPPORT_PATIENCE_NS};
    kvc_status status = kvc_client_open(&opts, &client);
    if (status != KVC_OK)
        print_error("connect to %s: %s\n", uris, kvc_last_error());
    assert_ok(status);
    return client;
}

void store_make(store *s, const char *dram_bytes, const char *lmdb_path)
{
    kvc_schema schema;
    kvc_part parts[STORE_PARTS];
    memset(s, 0, sizeof(*s));
    char relative[256];
    support_make_folder(relative, sizeof(relative));
    /* A unix address needs the whole path. */
    char *whole = realpath(relative, NULL);
    assert_non_null(whole);
    (void)snprintf(s->folder, sizeof(s->folder), "%s", whole);
    free(whole);
    s->dram_bytes = dram_bytes;
    s->has_lmdb = true;
    if (lmdb_path != NULL)
        (void)snprintf(s->lmdb_path, sizeof(s->lmdb_path), "%s", lmdb_path);
    else
        (void)snprintf(s->lmdb_path, sizeof(s->lmdb_path), "%s/values", s->folder);
    fill_schema(&schema, parts);
    assert_ok(kvc_schema_digest(&schema, &s->schema));
    fill_digests(s);
}

kvc_status store_register(store *s)
{
    kvc_schema schema;
    kvc_part parts[STORE_PARTS];
    kvc_digest digest;
    if (s->client == NULL)
        s->client = store_connect(s->tcp_uri);
    fill_schema(&schema, parts);
    kvc_status status = kvc_schema_register(s->client, &schema, 0, &digest);
    if (status == KVC_OK)
        assert_memory_equal(&digest, &s->schema, sizeof(digest));
    return status;
}

static void open_made(store *s)
{
    store_start(s);
    kvc_status status = store_register(s);
    if (status != KVC_OK)
        print_error("schema: %s\n", kvc_last_error());
    assert_ok(status);
}

void store_open(store *s, const char *dram_bytes, bool has_lmdb)
{
    store_make(s, dram_bytes, NULL);
    s->has_lmdb = has_lmdb;
    open_made(s);
}

void store_open_at(store *s, const char *dram_bytes, const char *lmdb_path)
{
    store_make(s, dram_bytes, lmdb_path);
    open_made(s);
}

void store_close(store *s)
{
    kvc_client_close(s->client);
    if (support_daemon_is_alive(&s->daemon))
        store_end(s, SIGTERM);
    support_remove_folder(s->folder);
}

static uint8_t *make_values(uint32_t first, uint32_t n)
{
    size_t row_sum = store_row_bytes[0] + store_row_bytes[1] + store_row_bytes[2];
    uint8_t *bytes = malloc(n * STORE_BLOCK_TOKENS * row_sum), *at = bytes;
    assert_non_null(bytes);
    for (uint32_t i = first; i < first + n; i++)
        for (uint32_t p = 0; p < STORE_PARTS; p++)
            for (uint32_t t = 0; t < STORE_BLOCK_TOKENS; t++)
                for (uint32_t b = 0; b < store_row_bytes[p]; b++)
                    *at++ = store_byte(p, i * STORE_BLOCK_TOKENS + t, b);
    return bytes;
}

/* Puts what is not answered yet; returns how many values are left. */
static uint32_t put_round(store *s, kvc_promise promise, kvc_value *values, uint32_t n,
                          const kvc_region *region, uint32_t *n_stored_p)
{
    int8_t status[BATCH_BLOCKS * STORE_PARTS];
    kvc_op op;
    uint32_t left = 0;
    kvc_op_init(&op, NULL, NULL);
    if (s->streams)
        assert_ok(kvc_put_stream(s->client, &s->schema, promise, 0, values, n, region, status, NULL,
                                 0, &op));
    else
        assert_ok(kvc_put(s->client, &s->schema, promise, values, n, region, status, 0, &op));
    kvc_status waited = kvc_op_wait(&op, 0);
    if (waited != KVC_OK)
        print_error("put: %s\n", kvc_last_error());
    assert_ok(waited);
    for (uint32_t i = 0; i < n; i++) {
        assert_true(status[i] == KVC_OK || status[i] == KVC_EXISTS || status[i] == KVC_AGAIN);
        *n_stored_p += status[i] == KVC_OK;
        if (status[i] == KVC_AGAIN)
            values[left++] = values[i];
    }
    return left;
}

static uint32_t put_batch(store *s, uint32_t first, uint32_t n, kvc_promise promise)
{
    kvc_value values[BATCH_BLOCKS * STORE_PARTS];
    uint8_t *bytes = make_values(first, n);
    uint32_t n_values = 0, n_stored = 0;
    size_t off = 0;
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t p = 0; p < STORE_PARTS; p++) {
            uint32_t len = STORE_BLOCK_TOKENS * store_row_bytes[p];
            values[n_values++] = (kvc_value){
                .digest = s->digests[first + i], .part = p, .len_bytes = len, .src_off_bytes = off};
            off += len;
        }
    }
    kvc_region *region = NULL;
    kvc_region_desc desc = {
        .size_bytes = sizeof(desc), .base = bytes, .len_bytes = off, .kind = KVC_MEMORY_HOST};
    assert_ok(kvc_region_register(s->client, &desc, &region));
    uint64_t end_ns = kvc_now_ns() + SUPPORT_PATIENCE_NS;
    while ((n_values = put_round(s, promise, values, n_values, region, &n_stored)) > 0) {
        assert_true(kvc_now_ns() < end_ns);
        usleep(5000);
    }
    assert_ok(kvc_region_deregister(s->client, region));
    free(bytes);
    return n_stored;
}

uint32_t store_put(store *s, uint32_t first, uint32_t n, kvc_promise promise)
{
    uint32_t stored = 0;
    for (uint32_t i = 0; i < n; i += BATCH_BLOCKS)
        stored += put_batch(s, first + i, n - i < BATCH_BLOCKS ? n - i : BATCH_BLOCKS, promise);
    return stored;
}

kvc_context *store_context(store *s, kvc_client *client, uint32_t n_blocks)
{
    kvc_context *context = NULL;
    assert_ok(kvc_context_open(client, &s->schema, s->digests, n_blocks, 0, 0, &context));
    return context;
}

uint32_t store_match(store *s, uint32_t n_blocks)
{
    uint32_t hits = 0;
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    assert_ok(kvc_match(s->client, &s->schema, s->digests, n_blocks, NULL, 0, &hits, 0, &op));
    assert_ok(kvc_op_wait(&op, 0));
    return hits;
}

/* A row that was fetched, or one that was not and must be as it was. */
static bool row_is_wrong(const uint8_t *row, uint32_t part, uint32_t token, int8_t status)
{
    for (uint32_t b = 0; b < store_row_bytes[part]; b++) {
        uint8_t wanted = status == KVC_OK ? store_byte(part, token, b) : 0xa5;
        if (row[b] != wanted)
            return true;
    }
    return status != KVC_OK && status != KVC_NOT_FOUND;
}

kvc_status store_check(kvc_client *client, kvc_context *context, uint32_t part, uint32_t n,
                       uint32_t n_tokens, uint64_t seed, kvc_fetch_info *info_p, bool *wrong_p)
{
    uint32_t row_bytes = store_row_bytes[part];
    support_random random = {seed};
    uint32_t *picks = malloc(n * sizeof(*picks));
    int8_t *status = malloc(n);
    uint8_t *rows = malloc((size_t)n * row_bytes);
    kvc_region *region = NULL;
    kvc_region_desc desc = {.size_bytes = sizeof(desc),
                            .base = rows,
                            .len_bytes = (size_t)n * row_bytes,
                            .kind = KVC_MEMORY_HOST};
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    memset(rows, 0xa5, (size_t)n * row_bytes);
    memset(status, 0, n);
    for (uint32_t i = 0; i < n; i++)
        picks[i] = (uint32_t)support_below(&random, n_tokens);
    kvc_pick_group group = {
        .context = context, .part = part, .row_bytes = row_bytes, .n_picks = n, .picks = picks};
    kvc_status result = kvc_region_register(client, &desc, &region);
    if (result == KVC_OK)
        result = kvc_fetch(client, &group, 1, region, status, info_p, 0, &op);
    if (result == KVC_OK)
        result = kvc_op_wait(&op, 0);
    for (uint32_t i = 0; result == KVC_OK && i < n && !*wrong_p; i++)
        *wrong_p = row_is_wrong(rows + (size_t)i * row_bytes, part, picks[i], status[i]);
    (void)kvc_region_deregister(client, region);
    free(rows);
    free(status);
    free(picks);
    return result;
}

void store_expect(store *s, kvc_context *context, uint32_t n_tokens, kvc_fetch_info *info_p)
{
    kvc_fetch_info sum = {0};
    for (uint32_t part = 0; part < STORE_PARTS; part++) {
        kvc_fetch_info info = {0};
        bool wrong = false;
        kvc_status status =
            store_check(s->client, context, part, 2048, n_tokens, part + 17, &info, &wrong);
        if (status != KVC_OK)
            print_error("fetch: %s\n", kvc_last_error());
        assert_ok(status);
        assert_false(wrong);
        assert_int_equal(info.rows_missing, 0);
        assert_int_equal(info.rows_dram + info.rows_lmdb, 2048);
        sum.rows_dram += info.rows_dram;
        sum.rows_lmdb += info.rows_lmdb;
        sum.requests += info.requests;
    }
    if (info_p != NULL)
        *info_p = sum;
}

uint64_t store_counter(store *s, const char *name)
{
    kvc_server_stats *stats = NULL;
    uint64_t value = UINT64_MAX;
    assert_ok(kvc_stats(s->client, 0, &stats));
    for (uint32_t i = 0; i < stats->n_counters; i++)
        if (strcmp(stats->counters[i].name, name) == 0)
            value = stats->counters[i].value;
    kvc_stats_free(stats);
    return value;
}

void store_write_schema(const char *path)
{
    kvc_schema schema;
    kvc_part parts[STORE_PARTS];
    char *text = NULL;
    size_t len_bytes = 0;
    fill_schema(&schema, parts);
    assert_ok(kvc_schema_text(&schema, &text, &len_bytes));
    support_write_file(path, text);
    free(text);
}
