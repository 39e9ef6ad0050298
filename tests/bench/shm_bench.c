/*
 * shm_bench.c: 2,048 random rows of 4 KiB and of 768 B from one server on this host, by each way:
 * mapped over shm, by request over shm, gRPC on a unix socket, gRPC on loopback TCP, and RDMA where
 * KVASIR_RDMA_ADDRESS is the address of a device; beside a plain memcpy of the same rows. One table
 * per row length, with CPU time of both ends, and what RDMA posts for it.
 *
 * --quick: one short turn; --short: a few, for emulated machines. Everything is in dram, and every
 * byte of the first fetch is checked.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/digest.h"
#include "base/log.h"
#include "bench.h"
#include "daemon.h"
#include "kvc/client.h"

enum { N_ROWS = 2048, BLOCK_TOKENS = 256, N_BLOCKS = 192, WAYS = 6, REPEATS = 24 };

static const uint32_t shapes[] = {4096, 768};

typedef struct way {
    struct bench *bench;
    const char *name, *uri; /* NULL: a plain memcpy */
    bool map;
    kvc_client *client;
    kvc_region *region;
    kvc_context *context;
} way;

typedef struct bench {
    char folder[256], shm_uri[300], unix_uri[300], rdma_uri[128];
    support_daemon daemon;
    uint32_t row_bytes, repeats, rounds;
    uint8_t *values;                 /* [N_BLOCKS * BLOCK_TOKENS * row_bytes] what was put */
    uint8_t *out;                    /* [N_ROWS * row_bytes] */
    uint32_t picks[REPEATS][N_ROWS]; /* of one turn's fetches */
    uint64_t random;
    kvc_digest schema, digests[N_BLOCKS];
    way ways[WAYS];
} bench;

static int failed(const char *what)
{
    (void)fprintf(stderr, "shm_bench: %s: %s\n", what, kvc_last_error());
    return 1;
}

/* Distinct and ascending, as a selector gives them. */
static void choose(bench *b, uint32_t picks[N_ROWS])
{
    const uint32_t n_tokens = N_BLOCKS * BLOCK_TOKENS;
    uint32_t n = 0;
    for (uint32_t token = 0; token < n_tokens && n < N_ROWS; token++)
        if (bench_random(&b->random) % (n_tokens - token) < N_ROWS - n)
            picks[n++] = token;
}

static int fetch_once(way *w, const uint32_t picks[N_ROWS])
{
    bench *b = w->bench;
    kvc_pick_group group = {.context = w->context,
                            .part = 0,
                            .row_bytes = b->row_bytes,
                            .n_picks = N_ROWS,
                            .picks = picks};
    kvc_fetch_info info;
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    if (kvc_fetch(w->client, &group, 1, w->region, NULL, &info, 0, &op) != KVC_OK ||
        kvc_op_wait(&op, 0) != KVC_OK || info.rows_dram != N_ROWS)
        return failed(w->name);
    if (w->map != (info.requests == 0))
        return failed("the rows did not take the way they should");
    return 0;
}

static void copy_once(const bench *b, const uint32_t picks[N_ROWS])
{
    for (uint32_t i = 0; i < N_ROWS; i++)
        memcpy(b->out + (size_t)i * b->row_bytes, b->values + (size_t)picks[i] * b->row_bytes,
               b->row_bytes);
}

static int prepare(void *ctx, int *pid_p)
{
    way *w = ctx;
    (void)pid_p;
    for (uint32_t i = 0; i < w->bench->repeats; i++)
        choose(w->bench, w->bench->picks[i]);
    return 0;
}

/* As many fetches as make some milliseconds, each of other rows. */
static int run_once(void *ctx, double *bytes_p)
{
    way *w = ctx;
    bench *b = w->bench;
    for (uint32_t i = 0; i < b->repeats; i++) {
        if (w->uri == NULL)
            copy_once(b, b->picks[i]);
        else if (fetch_once(w, b->picks[i]) != 0)
            return 1;
    }
    *bytes_p = (double)b->repeats * N_ROWS * b->row_bytes;
    return 0;
}

static int check(way *w)
{
    bench *b = w->bench;
    choose(b, b->picks[0]);
    memset(b->out, 0, (size_t)N_ROWS * b->row_bytes);
    if (fetch_once(w, b->picks[0]) != 0)
        return 1;
    for (uint32_t i = 0; i < N_ROWS; i++)
        if (memcmp(b->out + (size_t)i * b->row_bytes,
                   b->values + (size_t)b->picks[0][i] * b->row_bytes, b->row_bytes) != 0)
            return failed("a row is not what was put");
    return 0;
}

static int open_way(way *w)
{
    bench *b = w->bench;
    kvc_client_opts opts = {.size_bytes = sizeof(opts), .uris = w->uri};
    kvc_region_desc desc = {.size_bytes = sizeof(desc),
                            .base = b->out,
                            .len_bytes = (size_t)N_ROWS * b->row_bytes,
                            .kind = KVC_MEMORY_HOST};
    if (kvc_client_open(&opts, &w->client) != KVC_OK ||
        kvc_region_register(w->client, &desc, &w->region) != KVC_OK)
        return failed(w->uri);
    return 0;
}

static int open_context(way *w)
{
    bench *b = w->bench;
    kvc_map_opts map = {.size_bytes = sizeof(map), .all = w->map, .populate = true};
    if (kvc_client_map_contexts(w->client, &map) != KVC_OK ||
        kvc_context_open(w->client, &b->schema, b->digests, N_BLOCKS, 0, 0, &w->context) != KVC_OK)
        return failed(w->name);
    return check(w);
}

static void close_way(way *w)
{
    kvc_context_close(w->context);
    if (w->client != NULL)
        (void)kvc_region_deregister(w->client, w->region);
    kvc_client_close(w->client);
    w->client = NULL;
    w->context = NULL;
}

/* The values of all blocks, over the first way that has a client. */
static int put_all(bench *b, way *w)
{
    size_t value_bytes = (size_t)BLOCK_TOKENS * b->row_bytes;
    kvc_part part = {.kind = KVC_PART_KV,
                     .dtype = KVC_DTYPE_F16,
                     .kv_head_count = 1,
                     .row_bytes = b->row_bytes,
                     .k_len_bytes = b->row_bytes / 2,
                     .v_off_bytes = b->row_bytes / 2,
                     .v_len_bytes = b->row_bytes / 2,
                     .q_dim = b->row_bytes / 4,
                     .v_dim = b->row_bytes / 4,
                     .rope = {.type = KVC_ROPE_PLAIN, .theta = 1e4}};
    kvc_schema schema = {.model = "shm_bench",
                         .revision = "",
                         .recipe = "full",
                         .tp_size = 1,
                         .block_tokens = BLOCK_TOKENS,
                         .n_parts = 1,
                         .parts = &part};
    static kvc_value values[N_BLOCKS];
    static int8_t status[N_BLOCKS];
    kvc_region_desc desc = {.size_bytes = sizeof(desc),
                            .base = b->values,
                            .len_bytes = N_BLOCKS * value_bytes,
                            .kind = KVC_MEMORY_HOST};
    kvc_region *src;
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    for (uint64_t i = 0; i < N_BLOCKS * value_bytes / 8; i++)
        ((uint64_t *)(void *)b->values)[i] = bench_random(&b->random);
    for (uint32_t i = 0; i < N_BLOCKS; i++) {
        if (kvc_sha256(&i, sizeof(i), &b->digests[i]) != KVC_OK)
            return failed("sha256");
        values[i] = (kvc_value){.digest = b->digests[i],
                                .len_bytes = (uint32_t)value_bytes,
                                .src_off_bytes = i * value_bytes};
    }
    if (kvc_schema_register(w->client, &schema, 0, &b->schema) != KVC_OK ||
        kvc_region_register(w->client, &desc, &src) != KVC_OK ||
        kvc_put(w->client, &b->schema, KVC_PROMISE_MEMORY, values, N_BLOCKS, src, status, 0, &op) !=
            KVC_OK ||
        kvc_op_wait(&op, 0) != KVC_OK)
        return failed("put");
    for (uint32_t i = 0; i < N_BLOCKS; i++)
        if (status[i] != KVC_OK)
            return failed("a value was not taken");
    return kvc_region_deregister(w->client, src) == KVC_OK ? 0 : failed("put");
}

/* A counter of the server's, read past the way that is counted. */
static uint64_t server_count(bench *b, const char *name)
{
    kvc_server_stats *stats;
    uint64_t value = 0;
    if (kvc_stats(b->ways[1].client, 0, &stats) != KVC_OK)
        bench_die(kvc_last_error());
    for (uint32_t i = 0; i < stats->n_counters; i++)
        if (strcmp(stats->counters[i].name, name) == 0)
            value = stats->counters[i].value;
    kvc_stats_free(stats);
    return value;
}

/* What one fetch of all rows costs the server's device, once its memory is registered. */
static int count_rdma(bench *b, way *w)
{
    static const char *const names[] = {"rdma_work_requests", "rdma_signals", "rdma_written_bytes",
                                        "rdma_sent_bytes"};
    uint64_t before[4];
    for (uint32_t i = 0; i < 4; i++)
        before[i] = server_count(b, names[i]);
    if (fetch_once(w, b->picks[0]) != 0)
        return 1;
    (void)printf("RDMA, %d rows of %u B, at the server:", N_ROWS, b->row_bytes);
    for (uint32_t i = 0; i < 4; i++)
        (void)printf(" %llu %s%s", (unsigned long long)(server_count(b, names[i]) - before[i]),
                     names[i], i < 3 ? "," : "\n");
    return 0;
}

static int run_shape(bench *b, uint32_t row_bytes)
{
    bench_entrant entrants[WAYS];
    char title[64];
    int bad = 0;
    b->row_bytes = row_bytes;
    b->values = malloc((size_t)N_BLOCKS * BLOCK_TOKENS * row_bytes);
    b->out = malloc((size_t)N_ROWS * row_bytes);
    if (b->values == NULL || b->out == NULL)
        return failed("memory");
    for (uint32_t i = 1; i < WAYS && !bad; i++)
        bad = b->ways[i].uri != NULL ? open_way(&b->ways[i]) : 0;
    bad = bad || put_all(b, &b->ways[1]);
    uint32_t n = 0;
    for (uint32_t i = 0; i < WAYS && !bad; i++) {
        if (i > 0 && b->ways[i].uri == NULL)
            continue; /* not in this build */
        bad = i > 0 && open_context(&b->ways[i]);
        entrants[n++] = (bench_entrant){.name = b->ways[i].name,
                                        .once = run_once,
                                        .prepare = prepare,
                                        .ctx = &b->ways[i],
                                        .pid = i == 0 ? 0 : b->daemon.pid,
                                        .ours = i == 1};
    }
    (void)snprintf(title, sizeof(title), "%d rows of %u B", N_ROWS, row_bytes);
    bad = bad || bench_contest(title, entrants, n, b->rounds, row_bytes);
    if (!bad && b->ways[5].uri != NULL)
        bad = count_rdma(b, &b->ways[5]);
    for (uint32_t i = 1; i < WAYS; i++)
        close_way(&b->ways[i]);
    free(b->values);
    free(b->out);
    return bad;
}

int main(int argc, char **argv)
{
    static bench b = {.random = 1};
    bool quick = argc > 1 && strcmp(argv[1], "--quick") == 0;
    bool brief = argc > 1 && strcmp(argv[1], "--short") == 0;
    const char *address = getenv("KVASIR_RDMA_ADDRESS");
    char listen[900];
    int bad = 0;
    b.repeats = quick ? 1 : brief ? 2 : REPEATS;
    b.rounds = quick ? 1 : brief ? 5 : 15;
    kvc_log_set_level(KVC_LOG_LEVEL_ERROR);
    (void)snprintf(b.folder, sizeof(b.folder), "/tmp/kvasir-shm-bench-XXXXXX");
    if (mkdtemp(b.folder) == NULL)
        bench_die("mkdtemp");
    (void)snprintf(b.shm_uri, sizeof(b.shm_uri), "shm://%s/shm.sock", b.folder);
    (void)snprintf(b.unix_uri, sizeof(b.unix_uri), "grpc+unix://%s/grpc.sock", b.folder);
    const char *names[WAYS] = {"memcpy",    "shm, mapped", "shm, by request", "gRPC, unix socket",
                               "gRPC, TCP", "RDMA"};
    for (uint32_t i = 0; i < WAYS; i++)
        b.ways[i] = (way){.bench = &b, .name = names[i], .map = i == 1};
    b.ways[1].uri = b.ways[2].uri = b.shm_uri;
    (void)snprintf(listen, sizeof(listen), "%s", b.shm_uri);
#ifdef KVASIR_GRPC
    (void)snprintf(listen, sizeof(listen), "grpc://127.0.0.1:0,%s,%s", b.unix_uri, b.shm_uri);
    b.ways[3].uri = b.unix_uri;
    b.ways[4].uri = b.daemon.uri;
#endif
#ifdef KVASIR_RDMA
    if (address != NULL) {
        (void)snprintf(b.rdma_uri, sizeof(b.rdma_uri), "rdma://%s:7897", address);
        size_t len = strlen(listen);
        (void)snprintf(listen + len, sizeof(listen) - len, ",%s", b.rdma_uri);
        b.ways[5].uri = b.rdma_uri;
    }
#else
    (void)address;
#endif
    const char *const args[] = {"--listen", listen, "--dram-bytes", "1GiB", NULL};
    if (!support_daemon_start(&b.daemon, b.folder, args))
        return 1;
    (void)printf("%s\n", bench_machine());
    bench_table_head();
    for (uint32_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]) && !bad; i++)
        bad = run_shape(&b, shapes[i]);
    (void)support_daemon_stop(&b.daemon, SIGTERM);
    bench_remove_tree(b.folder);
    return bad;
}
