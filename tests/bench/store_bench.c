/*
 * store_bench.c: what the service moves through the client library, beside a raw TCP loop.
 *
 * Runs a real cachesvc on loopback and, in the same minute and interleaved with every case, a plain
 * send/recv loop of the same sizes. One table: median, spread, ratio to raw TCP, CPU of both ends.
 * Values are 1 MiB (256 tokens of 4 KiB) or 192 KiB (256 tokens of 768 B).
 */
#include <fcntl.h>
#include <ftw.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/digest.h"
#include "bench.h"
#include "daemon.h"
#include "kvc/client.h"
#include "raw_tcp.h"

enum {
    BLOCK_TOKENS = 256,
    BIG_ROW = 4096,
    SMALL_ROW = 768,
    N_ROWS = 2048,
    PART_BIG = 0,
    PART_SMALL = 1,
};

typedef struct bench {
    bool quick;
    uint32_t runs, blocks;
    char folder[256];
    support_daemon daemon;
    kvc_client *client;
    kvc_digest schema;
    kvc_digest *digests; /* [blocks] */
    kvc_context *context;
    uint8_t *memory, *out; /* [blocks of 1 MiB] what is put, where rows land */
    kvc_region *region, *out_region;
    uint32_t *picks; /* [blocks * BLOCK_TOKENS] of the last fetch */
    uint32_t n_picks, row;
    bool from_lmdb; /* where rows must come from */
    raw_tcp *tcp;
    uint32_t seed;   /* of the next blocks' names */
    uint64_t random; /* where the picks fall */
} bench;

/* One case: moves bytes once; 0 on success. */
typedef struct bench_case {
    const char *name;
    int (*once)(bench *b, double *bytes_p);
    bool is_put;      /* which raw loop stands beside it */
    uint32_t row;     /* row bytes where rows/s is of interest; 0: not */
    size_t raw_bytes; /* message size of the raw loop */
    bench_series gbps, raw, ratio;
    double cpu_s, bytes;
} bench_case;

static int complain(const char *what, kvc_status status)
{
    fprintf(stderr, "store_bench: %s: %s: %s\n", what, kvc_status_name(status), kvc_last_error());
    return 1;
}

static const kvc_part parts[] = {
    {.part = PART_BIG, .kind = KVC_PART_STATE, .dtype = KVC_DTYPE_RAW, .row_bytes = BIG_ROW},
    {.part = PART_SMALL, .kind = KVC_PART_STATE, .dtype = KVC_DTYPE_RAW, .row_bytes = SMALL_ROW},
};

static void name_blocks(bench *b)
{
    for (uint32_t i = 0; i < b->blocks; i++) {
        uint32_t name[2] = {b->seed, i};
        if (kvc_sha256(name, sizeof name, &b->digests[i]) != KVC_OK) {
            abort();
        }
    }
    b->seed++;
}

static int put_blocks(bench *b, uint32_t part, kvc_promise promise)
{
    kvc_value *values = calloc(b->blocks, sizeof *values);
    int8_t *status = calloc(b->blocks, 1);
    uint32_t len_bytes = BLOCK_TOKENS * (part == PART_BIG ? BIG_ROW : SMALL_ROW);
    int result = values && status ? 0 : 1;
    for (uint32_t i = 0; i < b->blocks && result == 0; i++) {
        values[i] = (kvc_value){.digest = b->digests[i],
                                .part = part,
                                .len_bytes = len_bytes,
                                .src_off_bytes = (size_t)i * len_bytes};
    }
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    if (result == 0) {
        kvc_status got = kvc_put(b->client, &b->schema, promise, values, b->blocks, b->region,
                                 status, kvc_deadline_ns(120000000000u), &op);
        got = got == KVC_OK ? kvc_op_wait(&op, 0) : got;
        result = got == KVC_OK ? 0 : complain("put", got);
    }
    for (uint32_t i = 0; i < b->blocks && result == 0; i++) {
        result = status[i] == KVC_OK ? 0 : complain("put of a value", (kvc_status)status[i]);
    }
    free(values);
    free(status);
    return result;
}

static int put_once(bench *b, kvc_promise promise, double *bytes_p)
{
    name_blocks(b);
    *bytes_p = (double)b->blocks * BLOCK_TOKENS * BIG_ROW;
    return put_blocks(b, PART_BIG, promise);
}

static int put_memory(bench *b, double *bytes_p)
{
    return put_once(b, KVC_PROMISE_MEMORY, bytes_p);
}

static int put_durable(bench *b, double *bytes_p)
{
    return put_once(b, KVC_PROMISE_DURABLE, bytes_p);
}

/* Fetches b->picks of a part to b->out; every row must come from the tier that the case names. */
static int fetch(bench *b, uint32_t part, uint32_t row, uint32_t n)
{
    kvc_pick_group group = {
        .context = b->context, .part = part, .row_bytes = row, .n_picks = n, .picks = b->picks};
    kvc_fetch_info info;
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    kvc_status status = kvc_fetch(b->client, &group, 1, b->out_region, NULL, &info,
                                  kvc_deadline_ns(60000000000u), &op);
    status = status == KVC_OK ? kvc_op_wait(&op, 0) : status;
    if (status != KVC_OK) {
        return complain("fetch", status);
    }
    b->n_picks = n;
    b->row = row;
    if ((b->from_lmdb ? info.rows_lmdb : info.rows_dram) != n) {
        fprintf(stderr, "store_bench: of %u rows %u came from dram, %u from lmdb, %u are missing\n",
                n, info.rows_dram, info.rows_lmdb, info.rows_missing);
        return 1;
    }
    return 0;
}

/* Whether the last fetch brought the bytes that were put. */
static int check_rows(const bench *b)
{
    for (uint32_t i = 0; i < b->n_picks; i++) {
        if (memcmp(b->out + (size_t)i * b->row, b->memory + (size_t)b->picks[i] * b->row, b->row) !=
            0) {
            fprintf(stderr, "store_bench: row %u is not what was put\n", b->picks[i]);
            return 1;
        }
    }
    return 0;
}

/* Distinct random rows, as a selector picks them: ascending. */
static int fetch_random(bench *b, uint32_t part, uint32_t row, double *bytes_p)
{
    uint32_t n_tokens = b->blocks * BLOCK_TOKENS, stride = n_tokens / N_ROWS;
    for (uint32_t i = 0; i < N_ROWS; i++) {
        b->random = b->random * 6364136223846793005u + 1442695040888963407u;
        b->picks[i] = i * stride + (uint32_t)(b->random >> 33) % stride;
    }
    *bytes_p = (double)N_ROWS * row;
    return fetch(b, part, row, N_ROWS);
}

static int rows_big(bench *b, double *bytes_p)
{
    return fetch_random(b, PART_BIG, BIG_ROW, bytes_p);
}

static int rows_small(bench *b, double *bytes_p)
{
    return fetch_random(b, PART_SMALL, SMALL_ROW, bytes_p);
}

static int get_values(bench *b, double *bytes_p)
{
    uint32_t n = b->blocks * BLOCK_TOKENS;
    for (uint32_t i = 0; i < n; i++) {
        b->picks[i] = i;
    }
    *bytes_p = (double)n * BIG_ROW;
    return fetch(b, PART_BIG, BIG_ROW, n);
}

static int drop_file(const char *path, const struct stat *stat, int type, struct FTW *walk)
{
    (void)stat;
    (void)walk;
    int fd = type == FTW_F ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd >= 0) {
        (void)posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        close(fd);
    }
    return 0;
}

static int remove_file(const char *path, const struct stat *stat, int type, struct FTW *walk)
{
    (void)stat;
    (void)type;
    (void)walk;
    return remove(path);
}

static double raw_gbps(bench *b, const bench_case *c, double bytes)
{
    uint64_t start_ns = kvc_now_ns();
    size_t n = ((size_t)bytes + c->raw_bytes - 1) / c->raw_bytes;
    for (size_t i = 0; i < n; i++) {
        kvc_status status = c->is_put ? raw_tcp_put(b->tcp, b->memory, c->raw_bytes)
                                      : raw_tcp_get(b->tcp, b->out, c->raw_bytes);
        if (status != KVC_OK) {
            return 0;
        }
    }
    return (double)(n * c->raw_bytes) / (double)(kvc_now_ns() - start_ns);
}

static int start_daemon(bench *b, const char *dram, const char *promote)
{
    char values[300];
    snprintf(values, sizeof values, "%s/values", b->folder);
    const char *args[] = {"--dram-bytes",
                          dram,
                          "--lmdb-path",
                          values,
                          "--lmdb-bytes",
                          "8GiB",
                          "--promote-percent",
                          promote,
                          "--log-level",
                          "warn",
                          NULL};
    if (!support_daemon_start(&b->daemon, b->folder, args)) {
        return 1;
    }
    kvc_client_opts opts = {.size_bytes = sizeof opts, .uris = b->daemon.uri, .n_channels = 2};
    kvc_status status = kvc_client_open(&opts, &b->client);
    kvc_schema schema = {.model = "bench",
                         .revision = "",
                         .recipe = "bench",
                         .tp_size = 1,
                         .block_tokens = BLOCK_TOKENS,
                         .n_parts = 2,
                         .parts = parts};
    if (status == KVC_OK) {
        status = kvc_schema_register(b->client, &schema, 0, &b->schema);
    }
    kvc_region_desc desc = {.size_bytes = sizeof desc,
                            .base = b->memory,
                            .len_bytes = (size_t)b->blocks * BLOCK_TOKENS * BIG_ROW,
                            .kind = KVC_MEMORY_HOST};
    if (status == KVC_OK) {
        status = kvc_region_register(b->client, &desc, &b->region);
    }
    desc.base = b->out;
    if (status == KVC_OK) {
        status = kvc_region_register(b->client, &desc, &b->out_region);
    }
    return status == KVC_OK ? 0 : complain("start", status);
}

static void stop_daemon(bench *b)
{
    kvc_context_close(b->context);
    b->context = NULL;
    if (b->client && kvc_region_deregister(b->client, b->region) == KVC_OK &&
        kvc_region_deregister(b->client, b->out_region) == KVC_OK) {
        kvc_client_close(b->client);
    }
    b->client = NULL;
    (void)support_daemon_stop(&b->daemon, SIGTERM);
}

static int open_context(bench *b)
{
    kvc_status status =
        kvc_context_open(b->client, &b->schema, b->digests, b->blocks, 0, 0, &b->context);
    return status == KVC_OK ? 0 : complain("open context", status);
}

/*
 * Empties the page cache of the data files, so that the next rows come from the disk. Pages that a
 * process maps stay, so the server is started again.
 */
static int make_cold(bench *b)
{
    stop_daemon(b);
    sync();
    (void)nftw(b->folder, drop_file, 16, FTW_PHYS);
    return start_daemon(b, "64MiB", "0") || open_context(b);
}

static int run_case(bench *b, bench_case *c, bool cold)
{
    for (uint32_t i = 0; i <= b->runs; i++) {
        double bytes = 0;
        if (cold && make_cold(b) != 0) {
            return 1;
        }
        double cpu_s = bench_cpu_s() + bench_cpu_of_s(b->daemon.pid);
        uint64_t start_ns = kvc_now_ns();
        if (c->once(b, &bytes) != 0) {
            return 1;
        }
        double gbps = bytes / (double)(kvc_now_ns() - start_ns);
        cpu_s = bench_cpu_s() + bench_cpu_of_s(b->daemon.pid) - cpu_s;
        if (i == 0 && !c->is_put && check_rows(b) != 0) {
            return 1;
        }
        double raw = raw_gbps(b, c, bytes);
        if (i == 0) {
            continue; /* warm-up */
        }
        bench_add(&c->gbps, gbps);
        bench_add(&c->raw, raw);
        bench_add(&c->ratio, gbps / raw);
        c->cpu_s += cpu_s;
        c->bytes += bytes;
    }
    double median = bench_median(&c->gbps);
    char rows[32] = "";
    if (c->row != 0) {
        snprintf(rows, sizeof rows, "%.0fk", median * 1e6 / c->row);
    }
    printf("| %-34s | %6.3f | %.3f-%.3f | %8s | %6.2f | %5.2f | %6.0f |\n", c->name, median,
           bench_min(&c->gbps), bench_max(&c->gbps), rows, bench_median(&c->raw),
           bench_median(&c->ratio), c->cpu_s * 1e9 / (c->bytes / 1024));
    (void)fflush(stdout);
    return 0;
}

static int run_dram(bench *b)
{
    bench_case cases[] = {
        {.name = "put 1 MiB values, MEMORY",
         .once = put_memory,
         .is_put = true,
         .raw_bytes = 1u << 20},
        {.name = "put 1 MiB values, DURABLE",
         .once = put_durable,
         .is_put = true,
         .raw_bytes = 1u << 20},
    };
    bench_case reads[] = {
        {.name = "get 1 MiB values, dram", .once = get_values, .raw_bytes = 1u << 20},
        {.name = "2,048 rows of 4 KiB, dram",
         .once = rows_big,
         .row = BIG_ROW,
         .raw_bytes = 1u << 20},
        {.name = "2,048 rows of 768 B, dram",
         .once = rows_small,
         .row = SMALL_ROW,
         .raw_bytes = 1u << 20},
    };
    int result = start_daemon(b, "4GiB", "25");
    for (uint32_t i = 0; i < 2 && result == 0; i++) {
        result = run_case(b, &cases[i], false);
    }
    if (result == 0) {
        result = put_blocks(b, PART_SMALL, KVC_PROMISE_MEMORY) || open_context(b);
    }
    for (uint32_t i = 0; i < 3 && result == 0; i++) {
        result = run_case(b, &reads[i], false);
    }
    stop_daemon(b);
    return result;
}

/* A restarted server has everything in lmdb and nothing in dram; promotion is off. */
static int run_lmdb(bench *b)
{
    bench_case warm = {.name = "2,048 rows of 4 KiB, lmdb warm",
                       .once = rows_big,
                       .row = BIG_ROW,
                       .raw_bytes = 1u << 20};
    bench_case cold = {.name = "2,048 rows of 4 KiB, lmdb cold",
                       .once = rows_big,
                       .row = BIG_ROW,
                       .raw_bytes = 1u << 20};
    b->from_lmdb = true;
    int result = start_daemon(b, "64MiB", "0") || open_context(b);
    if (result == 0) {
        double bytes;
        result = get_values(b, &bytes) || run_case(b, &warm, false) || run_case(b, &cold, true);
    }
    stop_daemon(b);
    return result;
}

int main(int argc, char **argv)
{
    bench b = {.quick = argc == 2 && strcmp(argv[1], "--quick") == 0, .seed = 1};
    if (argc > 1 && !b.quick) {
        fputs("Usage: store_bench [--quick]\n"
              "Times puts and row reads through a real cachesvc beside a raw TCP loop; prints one\n"
              "table. --quick: a smoke test of about a second.\n",
              strcmp(argv[1], "--help") == 0 ? stdout : stderr);
        return strcmp(argv[1], "--help") == 0 ? 0 : 2;
    }
    b.runs = b.quick ? 1 : 9;
    b.blocks = b.quick ? 16 : 128;
    const char *base = getenv("TMPDIR");
    snprintf(b.folder, sizeof b.folder, "%s/kvasir-bench-XXXXXX", base ? base : ".");
    b.digests = calloc(b.blocks, sizeof *b.digests);
    b.memory = calloc(b.blocks, (size_t)BLOCK_TOKENS * BIG_ROW);
    b.out = calloc(b.blocks, (size_t)BLOCK_TOKENS * BIG_ROW);
    b.picks = calloc((size_t)b.blocks * BLOCK_TOKENS, sizeof *b.picks);
    int result = 1;
    if (!b.digests || !b.memory || !b.out || !b.picks || !mkdtemp(b.folder) ||
        raw_tcp_open(&b.tcp) != KVC_OK) {
        goto out;
    }
    for (size_t i = 0; i < (size_t)b.blocks * BLOCK_TOKENS * BIG_ROW; i += 8) {
        memcpy(b.memory + i, &i, 8);
    }
    printf("%s; %u values, %u runs each, 2 channels\n\n", bench_machine(), b.blocks, b.runs);
    printf("| case | GB/s | min-max | rows/s | raw TCP GB/s | ratio | CPU ns/KiB |\n");
    printf("|---|---|---|---|---|---|---|\n");
    result = run_dram(&b) || run_lmdb(&b);
    raw_tcp_close(b.tcp);
    (void)nftw(b.folder, remove_file, 16, FTW_DEPTH | FTW_PHYS);
out:
    free(b.digests);
    free(b.memory);
    free(b.out);
    free(b.picks);
    return result;
}
