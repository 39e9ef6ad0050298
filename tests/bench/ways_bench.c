/*
 * ways_bench.c: every way to a row in one table: 2,048 random rows of 4 KiB and of 768 B, and
 * eight chunks of 64 tokens, from one server on this host, by each way, from the dram tier and from
 * lmdb (through the page cache), beside a plain memcpy of the same rows: time, rows a second, CPU
 * seconds of both ends for a GiB of rows, bytes on the wire both ways. Then attention near the data
 * for 1 to 2,048 misses beside fetching them, and one core's attention beside its reads. What the
 * client does with fetched rows is in nobody's time; near the data the attention is. Where the
 * server has a GPU, once more near the data by that, over PCIe and in its own memory.
 *
 * --quick: one short turn; --short: a few, for emulated machines; --gpu: near the data alone, by
 * the server's CPU and by its GPU. RDMA where KVASIR_RDMA_ADDRESS is the address of a device. Every
 * way's first answer is checked.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "bench.h"
#include "ways_rig.h"

enum { MAX_WAYS = 16, SHAPES = 3 };

static ways_shape shapes[SHAPES] = {
    {"4 KiB rows", 4096, 256, 192, 2048, 32, 8, 128, false},
    {"768 B rows", 768, 256, 192, 2048, 9, 3, 64, false},
    {"8 chunks of 256 KiB", 4096, 64, 256, 512, 32, 8, 128, true},
};

typedef struct line {
    ways_way way;
    bench_series us, ratio;
    double cpu_s, bytes;
} line;

static uint32_t rounds = 15;
static bool only_gpu; /* --gpu */
static const char *const tiers[] = {"dram", "lmdb", "dram, GPU", "gpu, GPU"};

/* ---- the table ------------------------------------------------------------------------------- */

/* Whether the server's GPU attends: all that is timed then. */
static bool by_gpu(const ways_rig *rig)
{
    return rig->tier == WAYS_GPU_DRAM || rig->tier == WAYS_GPU_TIER;
}

static uint32_t list_ways(ways_rig *rig, line *lines)
{
    const bool chunks = rig->shape->chunks;
    const struct {
        const char *name, *uri;
        ways_kind kind;
        bool mapped, framed, wanted;
    } all[] = {
        {"memcpy", NULL, WAYS_COPY, false, false, true},
        {"shm, mapped", rig->shm_uri, WAYS_ROWS, true, true, rig->tier == WAYS_DRAM},
        {"shm, by request", rig->shm_uri, WAYS_ROWS, false, true, true},
        {"shm, whole blocks", rig->shm_uri, WAYS_BLOCKS, false, true, chunks},
#ifdef KVASIR_GRPC
        {"gRPC, unix socket", rig->unix_uri, WAYS_ROWS, false, false, true},
        {"gRPC, unix, blocks", rig->unix_uri, WAYS_BLOCKS, false, false, chunks},
        {"gRPC, TCP", rig->daemon.uri, WAYS_ROWS, false, false, true},
        {"gRPC, TCP, blocks", rig->daemon.uri, WAYS_BLOCKS, false, false, chunks},
        {"near, gRPC, TCP", rig->daemon.uri, WAYS_NEAR, false, false, true},
#endif
        {"near, shm", rig->shm_uri, WAYS_NEAR, false, true, true},
        {"rdma", rig->rdma_uri, WAYS_ROWS, false, true, rig->has_rdma},
        {"near, rdma", rig->rdma_uri, WAYS_NEAR, false, true, rig->has_rdma},
    };
    uint32_t n = 0;
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
        bool few = by_gpu(rig) || only_gpu;
        if (all[i].wanted && (!few || all[i].kind == WAYS_COPY || all[i].kind == WAYS_NEAR))
            lines[n++] = (line){.way = {.name = all[i].name,
                                        .uri = all[i].uri,
                                        .kind = all[i].kind,
                                        .mapped = all[i].mapped,
                                        .framed = all[i].framed}};
    }
    return n;
}

static int take_turn(ways_rig *rig, line *l, double *us_p, double *cpu_s_p)
{
    int pid = l->way.uri == NULL ? 0 : rig->daemon.pid;
    ways_choose(rig);
    double cpu_s = bench_cpu_s() + bench_cpu_of_s(pid);
    uint64_t start_ns = kvc_now_ns();
    for (uint32_t i = 0; i < rig->repeats; i++) {
        if (ways_ask(&l->way, rig->picks[i], rig->shape->n_rows) != 0)
            return 1;
    }
    *us_p = (double)(kvc_now_ns() - start_ns) / 1e3 / rig->repeats;
    *cpu_s_p = bench_cpu_s() + bench_cpu_of_s(pid) - cpu_s;
    return 0;
}

static int take_round(ways_rig *rig, line *lines, uint32_t n, bool counts)
{
    double copy_us = 0;
    for (uint32_t i = 0; i < n; i++) {
        double us = 0, cpu_s = 0;
        if (take_turn(rig, &lines[i], &us, &cpu_s) != 0)
            return 1;
        copy_us = i == 0 ? us : copy_us;
        if (!counts)
            continue;
        bench_add(&lines[i].us, us);
        bench_add(&lines[i].ratio, copy_us / us);
        lines[i].cpu_s += cpu_s;
        lines[i].bytes += (double)rig->repeats * rig->shape->n_rows * rig->shape->row_bytes;
    }
    return 0;
}

/* A counter of the server's. */
static uint64_t server_count(kvc_client *client, const char *name)
{
    kvc_server_stats *stats;
    uint64_t value = 0;
    if (kvc_stats(client, 0, &stats) != KVC_OK)
        bench_die(kvc_last_error());
    for (uint32_t i = 0; i < stats->n_counters; i++)
        if (strcmp(stats->counters[i].name, name) == 0)
            value = stats->counters[i].value;
    kvc_stats_free(stats);
    return value;
}

/* What one request costs the server's RDMA device, once memory is registered. */
static int count_rdma(ways_rig *rig, kvc_client *other, ways_way *way)
{
    static const char *const names[] = {"rdma_work_requests", "rdma_signals", "rdma_written_bytes",
                                        "rdma_sent_bytes"};
    uint64_t before[4];
    for (uint32_t i = 0; i < 4; i++)
        before[i] = server_count(other, names[i]);
    if (ways_ask(way, rig->picks[0], rig->shape->n_rows) != 0)
        return 1;
    (void)printf("%s, %s, at the server:", rig->shape->name, way->name);
    for (uint32_t i = 0; i < 4; i++)
        (void)printf(" %llu %s%s", (unsigned long long)(server_count(other, names[i]) - before[i]),
                     names[i], i < 3 ? "," : "\n");
    return 0;
}

static void print_line(const ways_rig *rig, line *l)
{
    uint64_t out = 0, in = 0;
    double us = bench_median(&l->us), bytes = (double)rig->shape->n_rows * rig->shape->row_bytes;
    if (l->way.uri != NULL)
        ways_count_bytes(&l->way, rig->picks[0], rig->shape->n_rows, l->way.n_requests, false, &out,
                         &in);
    (void)printf(
        "| %-9s | %-19s | %-18s | %7.0f | %6.0fk | %5.2f | %4.2f | %6.3f | %7llu | %8llu |\n",
        tiers[rig->tier], rig->shape->name, l->way.name, us, rig->shape->n_rows / us * 1e3,
        bytes / us / 1e3, bench_median(&l->ratio), l->cpu_s / (l->bytes / (1 << 30)),
        (unsigned long long)out, (unsigned long long)in);
}

/* Of the whole connection: HTTP/2's own, and acknowledgements of it, too. */
static int print_tcp(ways_rig *rig, ways_way *way)
{
    uint64_t out[2], in[2];
    ways_tcp_bytes(&out[0], &in[0]);
    for (uint32_t i = 0; i < rig->repeats; i++) {
        if (ways_ask(way, rig->picks[i], rig->shape->n_rows) != 0)
            return 1;
    }
    ways_tcp_bytes(&out[1], &in[1]);
    if (in[1] != in[0])
        (void)printf("%s, %s: %.0f bytes out and %.0f in a request, as the kernel counts them\n",
                     rig->shape->name, way->name, (double)(out[1] - out[0]) / rig->repeats,
                     (double)(in[1] - in[0]) / rig->repeats);
    return 0;
}

/* Until the server's GPU attends over every row: segments of dram are pinned as they are met. */
static int wait_for_gpu(ways_rig *rig, ways_way *way)
{
    for (uint32_t i = 0; i < 2000; i++) {
        uint64_t before = server_count(way->client, "rows_attended_gpu");
        ways_choose(rig);
        if (ways_ask(way, rig->picks[0], rig->shape->n_rows) != 0)
            return 1;
        if (server_count(way->client, "rows_attended_gpu") - before == rig->shape->n_rows)
            return 0;
    }
    (void)fprintf(stderr, "ways_bench: the server's GPU does not attend over all rows\n");
    return 1;
}

static int run_lines(ways_rig *rig, line *lines, uint32_t n)
{
    int bad = 0;
    for (uint32_t i = 0; i < n && !bad; i++)
        bad = ways_open(&lines[i].way, rig);
    if (by_gpu(rig) && !bad)
        bad = wait_for_gpu(rig, &lines[n - 1].way);
    for (uint32_t i = 0; i <= rounds && !bad; i++)
        bad = take_round(rig, lines, n, i > 0);
    for (uint32_t i = 0; i < n && !bad; i++)
        print_line(rig, &lines[i]);
    for (uint32_t i = 0; i < n && !bad; i++) {
        if (by_gpu(rig) || only_gpu)
            break;
        if (lines[i].way.uri == rig->daemon.uri)
            bad = print_tcp(rig, &lines[i].way);
        else if (lines[i].way.uri == rig->rdma_uri)
            bad = count_rdma(rig, lines[1].way.client, &lines[i].way);
    }
    (void)fflush(stdout);
    return bad;
}

/* ---- misses, near and far ---------------------------------------------------------------------
 */

/* core: attends over what came, as a worker would; NULL: nobody does. */
static double time_of(ways_way *way, ways_core *core, uint32_t n, uint32_t runs)
{
    static uint32_t picks[WAYS_MAX_ROWS];
    bench_series us = {0};
    for (uint32_t i = 0; i <= runs; i++) {
        ways_pick(way->rig, picks, n);
        uint64_t start_ns = kvc_now_ns();
        if (ways_ask(way, picks, n) != 0)
            exit(1);
        if (core != NULL)
            ways_core_attend(core, way->rig->out, n);
        if (i > 0)
            bench_add(&us, (double)(kvc_now_ns() - start_ns) / 1e3);
    }
    return bench_median(&us);
}

static uint64_t moved(const ways_way *way, const uint32_t *picks, uint32_t n, bool ranked)
{
    uint64_t out, in, rows = (1u << 20) / way->rig->shape->row_bytes;
    ways_count_bytes(way, picks, n, (uint32_t)((n + rows - 1) / rows), ranked, &out, &in);
    return out + in;
}

static void print_bytes(ways_rig *rig, const ways_way *rows, const ways_way *near)
{
    uint32_t from = 1, n = rig->shape->n_rows;
    ways_pick(rig, rig->picks[0], n);
    while (moved(near, rig->picks[0], from, false) >= moved(rows, rig->picks[0], from, false))
        from++;
    uint64_t far = moved(rows, rig->picks[0], n, false);
    uint64_t here = moved(near, rig->picks[0], n, false),
             ranked = moved(near, rig->picks[0], n, true);
    (void)printf("bytes of 2,048 misses, both ways: rows %llu, near %llu (1/%.0f), with ranks %llu "
                 "(1/%.0f); fewer from %u misses on\n",
                 (unsigned long long)far, (unsigned long long)here, (double)far / (double)here,
                 (unsigned long long)ranked, (double)far / (double)ranked, from);
}

static int compare_misses(ways_rig *rig, const char *uri, bool framed, ways_core *core)
{
    static const uint32_t sizes[] = {1, 4, 16, 64, 256, 1024, 2048};
    ways_way rows = {.name = "rows", .uri = uri, .kind = WAYS_ROWS, .framed = framed};
    ways_way near = {.name = "near", .uri = uri, .kind = WAYS_NEAR, .framed = framed};
    uint32_t from = 0;
    int bad = ways_open(&rows, rig) || ways_open(&near, rig);
    (void)printf("%-8s %10s %10s %8s   (%s, dram, 4 KiB)\n", "misses", "rows us", "near us",
                 "ratio", framed ? "shm by request" : "gRPC, TCP");
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]) && !bad; i++) {
        double rows_us = time_of(&rows, NULL, sizes[i], 2 * rounds);
        double both_us = time_of(&rows, core, sizes[i], 2 * rounds);
        double near_us = time_of(&near, NULL, sizes[i], 2 * rounds);
        from = near_us >= both_us ? 0 : from == 0 ? sizes[i] : from;
        (void)printf("%-8u %8.0f %14.0f %8.0f %6.2f\n", sizes[i], rows_us, both_us, near_us,
                     both_us / near_us);
    }
    if (from != 0)
        (void)printf("near takes less time than rows and attention from %u misses on\n", from);
    if (!bad)
        print_bytes(rig, &rows, &near);
    ways_close(&rows);
    ways_close(&near);
    return bad;
}

/* How long the server attends, by what it attends over: where its GPU begins to be worth it. */
static int print_sizes(ways_rig *rig)
{
    static const uint32_t sizes[] = {64, 128, 256, 512, 1024, 2048};
    ways_way near = {.name = "near", .uri = rig->shm_uri, .kind = WAYS_NEAR, .framed = true};
    int bad = ways_open(&near, rig);
    (void)printf("near, shm, %s, us by rows of 4 KiB:", tiers[rig->tier]);
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]) && !bad; i++)
        (void)printf(" %u: %.0f%s", sizes[i], time_of(&near, NULL, sizes[i], 2 * rounds),
                     sizes[i] < 2048 ? "," : "\n");
    ways_close(&near);
    return bad;
}

/* ---- all of it ------------------------------------------------------------------------------- */

static int run_shape(ways_rig *rig, const ways_shape *shape)
{
    line *lines = calloc(MAX_WAYS, sizeof(*lines));
    int bad = lines == NULL || ways_fill(rig, shape) != 0;
    uint32_t n = bad ? 0 : list_ways(rig, lines);
    bad = bad || run_lines(rig, lines, n);
    for (uint32_t i = 0; i < n; i++)
        ways_close(&lines[i].way);
    free(lines);
    ways_empty(rig);
    return bad;
}

/* Whether the server has a GPU that attends. */
static bool has_gpu(const ways_rig *rig)
{
    kvc_client *client = NULL;
    const kvc_client_opts opts = {.size_bytes = sizeof(opts), .uris = rig->shm_uri};
    if (kvc_client_open(&opts, &client) != KVC_OK)
        bench_die(kvc_last_error());
    bool yes = server_count(client, "attend_gpu") != 0;
    kvc_client_close(client);
    return yes;
}

static int run_tier(ways_rig *rig, ways_tier tier, ways_core *core)
{
    int bad = ways_start(rig, tier);
    bool all = bad || !by_gpu(rig) || has_gpu(rig);
    for (uint32_t i = 0; i < SHAPES && !bad && all; i++)
        bad = run_shape(rig, &shapes[i]);
    if (!bad && all && tier != WAYS_LMDB) {
        bad = ways_fill(rig, &shapes[0]) || print_sizes(rig);
        ways_empty(rig);
    }
    if (!bad && tier == WAYS_DRAM && !only_gpu) {
        bad = ways_fill(rig, &shapes[0]);
#ifdef KVASIR_GRPC
        bad = bad || compare_misses(rig, rig->daemon.uri, false, core);
#else
        bad = bad || compare_misses(rig, rig->shm_uri, true, core);
#endif
        ways_empty(rig);
    }
    ways_stop(rig);
    return bad;
}

static void print_head(void)
{
    (void)printf("%s; medians of %u turns\n\n", bench_machine(), rounds);
    (void)printf(
        "| tier | what | way | us | rows/s | GB/s | of memcpy | CPU s/GiB | bytes out | bytes "
        "in |\n|---|---|---|---|---|---|---|---|---|---|\n");
}

static int prepare(ways_rig *rig, bool quick, bool brief)
{
    const char *address = getenv("KVASIR_RDMA_ADDRESS"), *base = getenv("TMPDIR");
    rig->dram_bytes = "1GiB";
    rig->random = 1;
    rig->repeats = quick || brief ? 1 : WAYS_REPEATS;
    rounds = quick ? 1 : brief ? 3 : rounds;
    for (uint32_t i = 0; i < SHAPES && (quick || brief); i++)
        shapes[i].n_blocks = shapes[i].chunks ? 64 : 24;
    (void)snprintf(rig->folder, sizeof(rig->folder), "%s/kvasir-ways-bench-XXXXXX",
                   base != NULL ? base : "/tmp");
    if (mkdtemp(rig->folder) == NULL)
        bench_die("mkdtemp");
    (void)snprintf(rig->shm_uri, sizeof(rig->shm_uri), "shm://%s/shm.sock", rig->folder);
    (void)snprintf(rig->unix_uri, sizeof(rig->unix_uri), "grpc+unix://%s/grpc.sock", rig->folder);
#ifdef KVASIR_RDMA
    rig->has_rdma = address != NULL;
    if (address != NULL)
        (void)snprintf(rig->rdma_uri, sizeof(rig->rdma_uri), "rdma://%s:7897", address);
#else
    (void)address;
#endif
    return 0;
}

int main(int argc, char **argv)
{
    static ways_rig rig;
    bool quick = argc > 1 && strcmp(argv[1], "--quick") == 0;
    bool brief = argc > 1 && strcmp(argv[1], "--short") == 0;
    only_gpu = argc > 1 && strcmp(argv[1], "--gpu") == 0;
    if (argc > 2 || (argc == 2 && !quick && !brief && !only_gpu)) {
        (void)fprintf(stderr, "usage: ways_bench [--quick | --short | --gpu]\n");
        return 2;
    }
    kvc_log_set_level(KVC_LOG_LEVEL_ERROR);
    int bad = prepare(&rig, quick, brief);
    print_head();
    ways_core *core = ways_core_open();
    bad = bad || run_tier(&rig, WAYS_DRAM, core);
    bad = bad || run_tier(&rig, WAYS_GPU_DRAM, core); /* nothing where the server has no GPU */
    bad = bad || run_tier(&rig, WAYS_GPU_TIER, core);
#ifdef KVASIR_LMDB
    bad = bad || (!only_gpu && run_tier(&rig, WAYS_LMDB, core));
#endif
    bench_remove_tree(rig.folder);
    if (!bad && !only_gpu)
        ways_core_compare(core, quick || brief ? 16 : 512, quick ? 1 : 31);
    ways_core_close(core);
    return bad;
}
