/*
 * harness.c: see harness.h.
 *
 * Asserts with cmocka, so every helper runs on the test's thread. A peer's done callback runs on a
 * transport thread and only copies.
 */
#include "harness.h"

#include <dirent.h>
#include <ftw.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/log.h"

void h_schema_init(h_schema *schema, const char *model, uint32_t n_parts, uint32_t row_bytes,
                   bool with_index)
{
    memset(schema, 0, sizeof(*schema));
    assert_true(n_parts <= 16);
    for (uint32_t i = 0; i < n_parts; i++) {
        bool index = with_index && i + 1 == n_parts;
        schema->parts[i] = (kvc_part){
            .part = 10 * i,
            .kind = index ? KVC_PART_INDEX : KVC_PART_KV,
            .dtype = index ? KVC_DTYPE_RAW : KVC_DTYPE_F16,
            .layer = i,
            .kv_head_count = 1,
            .row_bytes = row_bytes,
            .q_dim = index ? 0 : row_bytes / 4,
            .v_dim = index ? 0 : row_bytes / 4,
            .k_len_bytes = index ? 0 : row_bytes / 2,
            .v_off_bytes = index ? 0 : row_bytes / 2,
            .v_len_bytes = index ? 0 : row_bytes / 2,
            .rope = {.type = index ? KVC_ROPE_NONE : KVC_ROPE_PLAIN, .theta = index ? 0 : 1e4},
            .codec = index ? "test" : NULL,
        };
    }
    schema->schema = (kvc_schema){.model = model,
                                  .revision = "r1",
                                  .recipe = "full",
                                  .tp_size = 1,
                                  .block_tokens = H_TOKENS,
                                  .n_parts = n_parts,
                                  .parts = schema->parts};
    const char *why = NULL;
    if (kvc_schema_check(&schema->schema, KVC_MAX_VALUE_BYTES, &why) != KVC_OK)
        fail_msg("schema: %s", why);
    assert_int_equal(kvc_schema_digest(&schema->schema, &schema->digest), KVC_OK);
}

kvc_digest h_digest(uint64_t b)
{
    kvc_digest digest;
    assert_int_equal(kvc_sha256(&b, sizeof(b), &digest), KVC_OK);
    return digest;
}

uint64_t h_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void fill_row(uint64_t b, uint32_t part, uint32_t row, uint32_t row_bytes, void *bytes)
{
    uint64_t state = (b + 1) * 0x9e3779b97f4a7c15ull ^ (uint64_t)(part + 1) << 40 ^
                     (uint64_t)(row + 1) << 16 ^ 0x5bd1e995;
    for (uint32_t i = 0; i < row_bytes; i += 8) {
        uint64_t x = h_random(&state);
        memcpy((char *)bytes + i, &x, row_bytes - i < 8 ? row_bytes - i : 8);
    }
}

void h_fill(uint64_t b, uint32_t part, uint32_t row_bytes, void *value)
{
    for (uint32_t row = 0; row < H_TOKENS; row++)
        fill_row(b, part, row, row_bytes, (char *)value + (size_t)row * row_bytes);
}

bool h_row_is(uint64_t b, uint32_t part, uint32_t row, uint32_t row_bytes, const void *bytes)
{
    char want[65536];
    assert_true(row_bytes <= sizeof(want));
    fill_row(b, part, row, row_bytes, want);
    return memcmp(want, bytes, row_bytes) == 0;
}

/* ---- what breaks ------------------------------------------------------------------------------
 */

void h_break_shm(const char *path)
{
    for (int fd = 0; fd < 4096; fd++) {
        struct sockaddr_un name = {0};
        socklen_t len = sizeof(name), listening_len = sizeof(int);
        int listening = 1;
        if (getsockname(fd, (struct sockaddr *)&name, &len) != 0 || name.sun_family != AF_UNIX ||
            strncmp(name.sun_path, path, sizeof(name.sun_path)) != 0)
            continue;
        if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &listening_len) == 0 &&
            !listening)
            (void)shutdown(fd, SHUT_RDWR);
    }
}

/* ---- server ---------------------------------------------------------------------------------- */

const char *h_listen;

void h_server_init(h_server *h)
{
    static atomic_uint number;
    memset(h, 0, sizeof(*h));
    assert_int_equal(kvs_settings_defaults(&h->settings, &h->config), KVC_OK);
    snprintf(h->listen, sizeof(h->listen), "inproc://test-%d-%u", (int)getpid(),
             atomic_fetch_add(&number, 1));
    if (h_listen != NULL)
        snprintf(h->listen, sizeof(h->listen), "%s", h_listen);
    h->settings.listen = h->listen;
    h->settings.dram_bytes = 64u << 20;
    h->settings.disk_threads = 2;
    h->settings.group_commit_ns = 2000000;
}

void h_server_start(h_server *h)
{
    kvc_log_set_level(getenv("KVASIR_TEST_LOG") ? KVC_LOG_LEVEL_DEBUG : KVC_LOG_LEVEL_ERROR);
    assert_int_equal(kvs_server_open(&h->settings, &h->server), KVC_OK);
    assert_int_equal(kvs_server_listen(h->server), KVC_OK);
}

void h_server_stop(h_server *h, bool flush)
{
    kvs_server_drain(h->server, kvc_deadline_ns(60000000000ull));
    kvs_server_close(h->server, flush);
    h->server = NULL;
}

void h_server_fini(h_server *h)
{
    if (h->server)
        h_server_stop(h, false);
    kvc_config_free(h->config);
}

void h_temp_dir(char path[256])
{
    const char *base = getenv("TMPDIR");
    snprintf(path, 256, "%s/kvasir-test-XXXXXX", base ? base : "/tmp");
    assert_non_null(mkdtemp(path));
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    (void)st;
    (void)type;
    (void)ftw;
    return remove(path);
}

void h_remove_dir(const char *path)
{
    nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

uint64_t h_segment_bytes(void)
{
    uint64_t bytes = 0;
    struct dirent *entry;
    DIR *dir = opendir("/proc/self/fd");
    assert_non_null(dir);
    while ((entry = readdir(dir)) != NULL) {
        char target[64] = "";
        struct stat st;
        ssize_t n = readlinkat(dirfd(dir), entry->d_name, target, sizeof(target) - 1);
        if (n > 0 && strncmp(target, "/memfd:kvasir-dram", 18) == 0 &&
            fstat((int)strtol(entry->d_name, NULL, 10), &st) == 0)
            bytes += (uint64_t)st.st_size;
    }
    closedir(dir);
    return bytes;
}

static _Thread_local uint64_t disk_bytes;

static int add_file(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    (void)path;
    (void)ftw;
    if (type == FTW_F)
        disk_bytes += (uint64_t)st->st_blocks * 512;
    return 0;
}

uint64_t h_disk_bytes(const char *path)
{
    disk_bytes = 0;
    assert_int_equal(nftw(path, add_file, 16, FTW_PHYS), 0);
    return disk_bytes;
}

void h_check_caps(const h_server *h)
{
    kvs_tier_usage usage;
    h->server->dram.ops->usage(h->server->dram.tier, &usage);
    uint64_t segments = h_segment_bytes();
    assert_true(segments >= usage.used_bytes); /* else it looks at the wrong thing */
    assert_true(segments <= h->settings.dram_bytes);
    if (h->settings.lmdb_path[0]) {
        uint64_t disk = h_disk_bytes(h->settings.lmdb_path);
        assert_true(disk > 0);
        assert_true(disk <= h->settings.lmdb_bytes);
    }
}

/* ---- peer ------------------------------------------------------------------------------------ */

h_peer *h_connect(const char *uri, const char *tenant)
{
    h_peer *peer = calloc(1, sizeof(*peer));
    assert_non_null(peer);
    peer->ops = kvt_find(uri);
    assert_non_null(peer->ops);
    kvc_mutex_init(&peer->lock, KVC_RANK_LEAF);
    kvc_cond_init(&peer->cond);
    peer->timeout_ns = 60000000000ull;
    kvt_connect_opts opts = {.size_bytes = sizeof(opts),
                             .uri = uri,
                             .tenant = tenant,
                             .n_channels = 1,
                             .max_message_bytes = KVC_MAX_VALUE_BYTES};
    assert_int_equal(peer->ops->connect(&opts, &peer->conn), KVC_OK);
    return peer;
}

void h_disconnect(h_peer *peer)
{
    peer->ops->conn_close(peer->conn);
    kvc_cond_fini(&peer->cond);
    kvc_mutex_fini(&peer->lock);
    free(peer->data);
    free(peer);
}

static void copy_message(h_peer *peer, const kvc_reply *reply)
{
    if (reply->method == KVC_FETCH_ROWS_STREAM) {
        memcpy(peer->missing + peer->n_missing, reply->u.fetch_rows.missing,
               reply->u.fetch_rows.n_missing * sizeof(peer->missing[0]));
        peer->n_missing += reply->u.fetch_rows.n_missing;
        peer->n_picks += reply->u.fetch_rows.n_picks;
        peer->rows_dram += reply->u.fetch_rows.rows_dram;
        peer->rows_lmdb += reply->u.fetch_rows.rows_lmdb;
    } else {
        assert_true(peer->n_values + reply->u.fetch_blocks.n_values <=
                    sizeof(peer->values) / sizeof(peer->values[0]));
        memcpy(peer->values + peer->n_values, reply->u.fetch_blocks.values,
               reply->u.fetch_blocks.n_values * sizeof(peer->values[0]));
        peer->n_values += reply->u.fetch_blocks.n_values;
    }
}

static void copy_map(h_peer *peer, const kvc_reply *reply)
{
    peer->n_fds = peer->xfer.n_fds;
    for (uint32_t i = 0; i < peer->n_fds; i++) {
        peer->fds[i] = peer->xfer.fds[i];
        peer->xfer.fds[i] = -1;
    }
    memcpy(peer->segments, reply->u.map_context.segments,
           reply->u.map_context.n_segments * sizeof(peer->segments[0]));
}

static void copy_reply(h_peer *peer)
{
    const kvc_reply *reply = &peer->xfer.reply;
    peer->data = realloc(peer->data, peer->data_bytes + reply->data_bytes + 1);
    assert_non_null(peer->data);
    if (reply->data_bytes > peer->max_data_bytes)
        peer->max_data_bytes = reply->data_bytes;
    for (uint32_t i = 0; i < reply->n_data; i++) {
        memcpy(peer->data + peer->data_bytes, reply->data[i].iov_base, reply->data[i].iov_len);
        peer->data_bytes += reply->data[i].iov_len;
    }
    if (reply->method == KVC_FETCH_ROWS || reply->method == KVC_ATTEND_ROWS) {
        peer->n_missing = reply->u.fetch_rows.n_missing;
        memcpy(peer->missing, reply->u.fetch_rows.missing,
               peer->n_missing * sizeof(peer->missing[0]));
    }
    if (reply->method == KVC_MATCH_PREFIX && peer->tiers && reply->u.match_prefix.n_tiers)
        memcpy(peer->tiers, reply->u.match_prefix.tiers, reply->u.match_prefix.n_tiers);
    for (uint32_t i = 0; reply->method == KVC_DESCRIBE && i < reply->u.describe.n_schemas; i++)
        peer->n_opaque += reply->u.describe.opaque[i] != 0;
    if (reply->method == KVC_MAP_CONTEXT)
        copy_map(peer, reply);
    if (reply->method == KVC_PUT_BLOCKS && reply->u.put_blocks.n_values <= H_MAX_BATCH)
        memcpy(peer->status, reply->u.put_blocks.status, reply->u.put_blocks.n_values);
}

static void on_message(kvt_xfer *xfer)
{
    h_peer *peer = xfer->arg;
    copy_reply(peer);
    copy_message(peer, &xfer->reply);
    peer->n_messages++;
    if (peer->on_message)
        peer->on_message(peer);
}

static void on_done(kvt_xfer *xfer)
{
    h_peer *peer = xfer->arg;
    if (xfer->status == KVC_OK && !xfer->message)
        copy_reply(peer);
    kvc_mutex_lock(&peer->lock);
    peer->done = true;
    kvc_cond_signal(&peer->cond);
    kvc_mutex_unlock(&peer->lock);
}

kvc_status h_call(h_peer *peer, const kvc_request *req)
{
    free(peer->data);
    peer->data = NULL;
    peer->data_bytes = 0;
    peer->n_opaque = peer->n_missing = peer->n_messages = peer->n_picks = peer->n_values = 0;
    peer->rows_dram = peer->rows_lmdb = peer->n_fds = 0;
    peer->max_data_bytes = 0;
    peer->done = false;
    memset(&peer->xfer, 0, sizeof(peer->xfer));
    peer->xfer.req = req;
    peer->xfer.deadline_ns = kvc_deadline_ns(peer->timeout_ns);
    peer->xfer.done = on_done;
    peer->xfer.message = kvt_streams_reply(req->method) ? on_message : NULL;
    peer->xfer.arg = peer;
    kvc_status status = peer->ops->submit(peer->conn, &peer->xfer);
    if (status != KVC_OK)
        return status;
    kvc_mutex_lock(&peer->lock);
    while (!peer->done)
        kvc_cond_wait(&peer->cond, &peer->lock);
    kvc_mutex_unlock(&peer->lock);
    kvc_arena_reset(&peer->xfer.arena);
    return peer->xfer.status;
}

/* ---- calls ----------------------------------------------------------------------------------- */

kvc_status h_register(h_peer *peer, const h_schema *schema)
{
    kvc_request req = {.method = KVC_REGISTER_SCHEMA};
    req.u.register_schema.schema = &schema->schema;
    kvc_status status = h_call(peer, &req);
    if (status == KVC_OK)
        assert_true(kvc_digest_equal(&peer->xfer.reply.u.register_schema.digest, &schema->digest));
    return status;
}

static uint32_t row_bytes_of(const h_schema *schema, uint32_t part)
{
    uint32_t i = part / 10;
    return part % 10 || i >= schema->schema.n_parts ? 64 : schema->parts[i].row_bytes;
}

kvc_status h_put_each(h_peer *peer, const h_schema *schema, const uint64_t *blocks,
                      const uint32_t *parts, uint32_t n, kvc_promise promise)
{
    kvc_put_value values[H_MAX_BATCH];
    struct iovec iov[H_MAX_BATCH];
    kvc_request req = {.method = KVC_PUT_BLOCKS, .data = iov, .n_data = n};
    assert_true(n <= H_MAX_BATCH);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t len = H_TOKENS * row_bytes_of(schema, parts[i]);
        values[i] =
            (kvc_put_value){.digest = h_digest(blocks[i]), .part = parts[i], .len_bytes = len};
        iov[i] = (struct iovec){.iov_base = malloc(len), .iov_len = len};
        h_fill(blocks[i], parts[i], len / H_TOKENS, iov[i].iov_base);
        req.data_bytes += len;
    }
    req.u.put_blocks.schema = schema->digest;
    req.u.put_blocks.promise = promise;
    req.u.put_blocks.n_values = n;
    req.u.put_blocks.values = values;
    kvc_status status = h_call(peer, &req);
    for (uint32_t i = 0; i < n; i++)
        free(iov[i].iov_base);
    return status;
}

kvc_status h_put(h_peer *peer, const h_schema *schema, uint64_t b, const uint32_t *parts,
                 uint32_t n, kvc_promise promise)
{
    uint64_t blocks[H_MAX_BATCH];
    assert_true(n <= H_MAX_BATCH);
    for (uint32_t i = 0; i < n; i++)
        blocks[i] = b;
    return h_put_each(peer, schema, blocks, parts, n, promise);
}

kvc_status h_put1(h_peer *peer, const h_schema *schema, uint64_t b, uint32_t part,
                  kvc_promise promise)
{
    kvc_status status = h_put(peer, schema, b, &part, 1, promise);
    return status == KVC_OK ? (kvc_status)peer->status[0] : status;
}

static kvc_digest *digests_of(uint64_t first, uint32_t n)
{
    kvc_digest *digests = calloc(n ? n : 1, sizeof(*digests));
    for (uint32_t i = 0; i < n; i++)
        digests[i] = h_digest(first + i);
    return digests;
}

kvc_status h_open(h_peer *peer, const h_schema *schema, uint64_t first, uint32_t n, uint64_t ttl_ms,
                  uint64_t *context_p)
{
    kvc_digest *digests = digests_of(first, n);
    kvc_request req = {.method = KVC_OPEN_CONTEXT};
    req.u.open_context.schema = schema->digest;
    req.u.open_context.digests = digests;
    req.u.open_context.n_digests = n;
    req.u.open_context.ttl_ms = ttl_ms;
    kvc_status status = h_call(peer, &req);
    *context_p = status == KVC_OK ? peer->xfer.reply.u.open_context.context : 0;
    free(digests);
    return status;
}

kvc_status h_extend(h_peer *peer, uint64_t context, uint32_t before, uint64_t first, uint32_t n)
{
    kvc_digest *digests = digests_of(first, n);
    kvc_request req = {.method = KVC_EXTEND_CONTEXT};
    req.u.extend_context.context = context;
    req.u.extend_context.n_blocks_before = before;
    req.u.extend_context.digests = digests;
    req.u.extend_context.n_digests = n;
    kvc_status status = h_call(peer, &req);
    free(digests);
    return status;
}

kvc_status h_close(h_peer *peer, uint64_t context)
{
    kvc_request req = {.method = KVC_CLOSE_CONTEXT};
    req.u.close_context.context = context;
    return h_call(peer, &req);
}

kvc_status h_match_tiers(h_peer *peer, const h_schema *schema, uint64_t first, uint32_t n,
                         const uint32_t *parts, uint32_t n_parts, uint8_t *tiers, uint32_t *hits_p)
{
    kvc_digest *digests = digests_of(first, n);
    kvc_request req = {.method = KVC_MATCH_PREFIX};
    req.u.match_prefix.schema = schema->digest;
    req.u.match_prefix.digests = digests;
    req.u.match_prefix.n_digests = n;
    req.u.match_prefix.parts = parts;
    req.u.match_prefix.n_parts = n_parts;
    req.u.match_prefix.want_tiers = tiers != NULL;
    peer->tiers = tiers;
    kvc_status status = h_call(peer, &req);
    peer->tiers = NULL;
    *hits_p = status == KVC_OK ? peer->xfer.reply.u.match_prefix.hits : 0;
    free(digests);
    return status;
}

kvc_status h_match(h_peer *peer, const h_schema *schema, uint64_t first, uint32_t n,
                   const uint32_t *parts, uint32_t n_parts, uint32_t *hits_p)
{
    return h_match_tiers(peer, schema, first, n, parts, n_parts, NULL, hits_p);
}

kvc_status h_fetch(h_peer *peer, uint64_t context, uint32_t part, const uint32_t *picks, uint32_t n)
{
    kvc_row_group group = {.context = context, .part = part, .n_picks = n, .picks = picks};
    kvc_request req = {.method = KVC_FETCH_ROWS};
    req.u.fetch_rows.groups = &group;
    req.u.fetch_rows.n_groups = 1;
    return h_call(peer, &req);
}

void h_fetch_equal(h_peer *peer, const h_schema *schema, uint64_t context, uint64_t first,
                   uint32_t part, const uint32_t *picks, uint32_t n)
{
    uint32_t row_bytes = row_bytes_of(schema, part);
    kvc_status status = h_fetch(peer, context, part, picks, n);
    if (status != KVC_OK)
        fail_msg("fetch: %s: %s", kvc_status_name(status), peer->xfer.detail);
    assert_int_equal(peer->n_missing, 0);
    assert_int_equal(peer->data_bytes, (uint64_t)n * row_bytes);
    for (uint32_t i = 0; i < n; i++)
        if (!h_row_is(first + picks[i] / H_TOKENS, part, picks[i] % H_TOKENS, row_bytes,
                      peer->data + (size_t)i * row_bytes))
            fail_msg("row %u (position %u) has other bytes", i, picks[i]);
}

pid_t h_start_again(const char *program, const char *mode, const char *listen)
{
    int ends[2];
    char said = 0;
    pid_t pid;
    char *argv[] = {(char *)(uintptr_t)program, (char *)(uintptr_t)mode, (char *)(uintptr_t)listen,
                    NULL};
    posix_spawn_file_actions_t actions;
    assert_int_equal(pipe(ends), 0);
    assert_int_equal(posix_spawn_file_actions_init(&actions), 0);
    assert_int_equal(posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO), 0);
    assert_int_equal(posix_spawn_file_actions_addclose(&actions, ends[0]), 0);
    assert_int_equal(posix_spawn(&pid, program, &actions, NULL, argv, environ), 0);
    (void)posix_spawn_file_actions_destroy(&actions);
    (void)close(ends[1]);
    assert_int_equal(read(ends[0], &said, 1), 1); /* 0: it failed, and said why */
    (void)close(ends[0]);
    return pid;
}
