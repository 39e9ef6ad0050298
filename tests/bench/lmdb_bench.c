/*
 * lmdb_bench.c: the lmdb tier beside bare LMDB and the bare disk, in one run.
 *
 *   lmdb_bench [--quick] [--mib N] [--runs N] [--ms N] [--dir FOLDER] [--only writes|rows]
 *
 * --ms: how long each kind of read is measured (2,000).
 *
 * Values of 1 MiB (256 rows of 4 KiB). Writes: a plain preallocated file with an fdatasync each
 * 16 MiB, LMDB alone with full sync and 16 or 64 MiB a transaction, the tier with durable and with
 * lazy writes (a sync at the end counted). Rows: warm and cold, from LMDB alone (looked up and
 * copied, no sums) and from the tier (sums verified). Cold means: everything closed, the file
 * written back and dropped from the page cache by posix_fadvise(DONTNEED), opened again; the sums
 * cache is empty then, so the tier also reads a prefix page per value. The disk's random reads
 * are O_DIRECT. Figures are medians of the runs, with the smallest and the largest.
 */
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/sum.h"
#include "bench.h"
#include "lmdb_cases.h"

lmdb_case_setup lmdb_case = {.n_values = 1024, .runs = 3, .read_ns = 2000000000ull};

/* --- the table --- */

typedef struct row {
    const char *name, *unit;
    double scale;
    bench_series series;
} row;

enum {
    W_PLAIN,
    W_LMDB16,
    W_LMDB64,
    W_DURABLE,
    W_LAZY,
    R_WARM_LMDB1,
    R_WARM_TIER1,
    R_WARM_LMDB4,
    R_WARM_TIER4,
    R_DISK1,
    R_DISK32,
    R_DISK64,
    R_DISK256,
    R_COLD_LMDB1,
    R_COLD_TIER1,
    R_COLD_LMDB32,
    R_COLD_TIER32,
    R_COLD_LMDB_CALL,
    R_COLD_TIER_CALL,
    R_COLD_LMDB_CALL8,
    R_COLD_TIER_CALL8,
    N_CASES,
};

static row table[N_CASES] = {
    [W_PLAIN] = {"plain file, fdatasync each 16 MiB", "GB/s", 1, {{0}, 0}},
    [W_LMDB16] = {"LMDB, full sync, 16 MiB a txn", "GB/s", 1, {{0}, 0}},
    [W_LMDB64] = {"LMDB, full sync, 64 MiB a txn", "GB/s", 1, {{0}, 0}},
    [W_DURABLE] = {"tier, durable, 64 in flight", "GB/s", 1, {{0}, 0}},
    [W_LAZY] = {"tier, lazy + one sync", "GB/s", 1, {{0}, 0}},
    [R_WARM_LMDB1] = {"warm, LMDB, 64 rows a value, 1 thread", "krows/s", 1e-3, {{0}, 0}},
    [R_WARM_TIER1] = {"warm, tier, 64 rows a value, 1 thread", "krows/s", 1e-3, {{0}, 0}},
    [R_WARM_LMDB4] = {"warm, LMDB, 64 rows a value, 4 threads", "krows/s", 1e-3, {{0}, 0}},
    [R_WARM_TIER4] = {"warm, tier, 64 rows a value, 4 threads", "krows/s", 1e-3, {{0}, 0}},
    [R_DISK1] = {"disk, O_DIRECT 4 KiB, 1 thread", "krows/s", 1e-3, {{0}, 0}},
    [R_DISK32] = {"disk, O_DIRECT 4 KiB, 32 threads", "krows/s", 1e-3, {{0}, 0}},
    [R_DISK64] = {"disk, O_DIRECT 4 KiB, 64 threads", "krows/s", 1e-3, {{0}, 0}},
    [R_DISK256] = {"disk, O_DIRECT 4 KiB, 256 threads", "krows/s", 1e-3, {{0}, 0}},
    [R_COLD_LMDB1] = {"cold, LMDB, 1 row a call, 1 thread", "krows/s", 1e-3, {{0}, 0}},
    [R_COLD_TIER1] = {"cold, tier, 1 row a call, 1 thread", "krows/s", 1e-3, {{0}, 0}},
    [R_COLD_LMDB32] = {"cold, LMDB, 1 row a call, 32 threads", "krows/s", 1e-3, {{0}, 0}},
    [R_COLD_TIER32] = {"cold, tier, 1 row a call, 32 threads", "krows/s", 1e-3, {{0}, 0}},
    [R_COLD_LMDB_CALL] = {"cold, LMDB, 64 rows a value, 2 threads", "krows/s", 1e-3, {{0}, 0}},
    [R_COLD_TIER_CALL] = {"cold, tier, 64 rows a value, 2 threads", "krows/s", 1e-3, {{0}, 0}},
    [R_COLD_LMDB_CALL8] = {"cold, LMDB, 64 rows a value, 8 threads", "krows/s", 1e-3, {{0}, 0}},
    [R_COLD_TIER_CALL8] = {"cold, tier, 64 rows a value, 8 threads", "krows/s", 1e-3, {{0}, 0}},
};

static double write_case(const kvs_tier_ops *ops, uint32_t which)
{
    switch (which) {
    case W_PLAIN:
        return case_write_plain();
    case W_LMDB16:
        return case_write_lmdb(16);
    case W_LMDB64:
        return case_write_lmdb(64);
    default:
        return case_write_tier(ops, which == W_DURABLE);
    }
}

/* Each run starts with another case and lets the disk rest before each: what came before tells. */
static void run_writes(const kvs_tier_ops *ops, uint32_t run)
{
    enum { N = W_LAZY + 1 };

    for (uint32_t i = 0; i < N; i++) {
        uint32_t which = (run * 2 + i) % N;
        sync();
        usleep((useconds_t)(lmdb_case.read_ns / 500)); /* virtual disks have a budget for bursts */
        bench_add(&table[which].series, write_case(ops, which));
    }
}

static void run_reads(const kvs_tier_ops *ops)
{
    static const struct {
        int lmdb, tier;
        bool cold;
        uint32_t threads, call_rows;
    } cases[] = {
        {R_WARM_LMDB1, R_WARM_TIER1, false, 1, 64},
        {R_WARM_LMDB4, R_WARM_TIER4, false, 4, 64},
        {R_COLD_LMDB1, R_COLD_TIER1, true, 1, 1},
        {R_COLD_LMDB32, R_COLD_TIER32, true, 32, 1},
        {R_COLD_LMDB_CALL, R_COLD_TIER_CALL, true, 2, 64},
        {R_COLD_LMDB_CALL8, R_COLD_TIER_CALL8, true, 8, 64},
    };

    bench_add(&table[R_DISK1].series, case_disk_rows(1));
    bench_add(&table[R_DISK32].series, case_disk_rows(32));
    bench_add(&table[R_DISK64].series, case_disk_rows(64));
    bench_add(&table[R_DISK256].series, case_disk_rows(256));
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        bool cold = cases[i].cold;
        uint32_t threads = cases[i].threads, rows = cases[i].call_rows;
        bench_add(&table[cases[i].lmdb].series, case_lmdb_rows(cold, threads, rows));
        bench_add(&table[cases[i].tier].series, case_tier_rows(ops, cold, threads, rows));
    }
}

static void print_table(void)
{
    double best = 0, durable = bench_median(&table[W_DURABLE].series);

    printf("%s\n%u values of 1 MiB, %u runs: median (min .. max)\n", bench_machine(),
           lmdb_case.n_values, lmdb_case.runs);
    for (int i = 0; i < N_CASES; i++) {
        row *r = &table[i];
        if (r->series.n == 0)
            continue;
        printf("  %-40s %9.2f (%.2f .. %.2f) %s\n", r->name, r->scale * bench_median(&r->series),
               r->scale * bench_min(&r->series), r->scale * bench_max(&r->series), r->unit);
    }
    for (int i = W_LMDB16; i <= W_LMDB64; i++)
        best = bench_median(&table[i].series) > best ? bench_median(&table[i].series) : best;
    if (!lmdb_case.no_writes)
        printf("  durable writes: %.2f of LMDB's best with full sync (goal 0.80)\n",
               durable / best);
    best = 0;
    for (int i = R_DISK1; i <= R_DISK256; i++)
        best = bench_median(&table[i].series) > best ? bench_median(&table[i].series) : best;
    if (lmdb_case.no_rows)
        return;
    printf(
        "  cold rows: %.2f of the disk's best with 1 row a call; with 64, %.2f from 2 threads and "
        "%.2f from 8 (goal 0.80)\n",
        bench_median(&table[R_COLD_TIER32].series) / best,
        bench_median(&table[R_COLD_TIER_CALL].series) / best,
        bench_median(&table[R_COLD_TIER_CALL8].series) / best);
}

static void parse(int argc, char **argv)
{
    const char *base = getenv("TMPDIR");

    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(argv[i], "--quick") == 0) {
            lmdb_case.n_values = 32;
            lmdb_case.runs = 1;
            lmdb_case.read_ns = 20000000;
        } else if (strcmp(argv[i], "--mib") == 0 && value != NULL) {
            lmdb_case.n_values = (uint32_t)strtoul(argv[++i], NULL, 10);
        } else if (strcmp(argv[i], "--runs") == 0 && value != NULL) {
            lmdb_case.runs = (uint32_t)strtoul(argv[++i], NULL, 10);
        } else if (strcmp(argv[i], "--ms") == 0 && value != NULL) {
            lmdb_case.read_ns = strtoull(argv[++i], NULL, 10) * 1000000;
        } else if (strcmp(argv[i], "--only") == 0 && value != NULL) {
            lmdb_case.no_writes = strcmp(value, "rows") == 0;
            lmdb_case.no_rows = !lmdb_case.no_writes;
            i++;
        } else if (strcmp(argv[i], "--dir") == 0 && value != NULL) {
            base = argv[++i];
        } else {
            fprintf(stderr,
                    "usage: %s [--quick] [--mib N] [--runs N] [--ms N] [--dir FOLDER] "
                    "[--only writes|rows]\n",
                    argv[0]);
            exit(2);
        }
    }
    if (lmdb_case.n_values == 0 || lmdb_case.runs == 0 || lmdb_case.read_ns == 0 ||
        lmdb_case.runs > BENCH_MAX_RUNS)
        exit(2);
    snprintf(lmdb_case.dir, sizeof(lmdb_case.dir), "%s/lmdb-bench-XXXXXX",
             base != NULL ? base : "/var/tmp");
    if (mkdtemp(lmdb_case.dir) == NULL)
        bench_die(lmdb_case.dir);
}

int main(int argc, char **argv)
{
    const kvs_tier_ops *ops = kvs_tier_find("lmdb");

    /* As the daemon does: without it, each transaction faults its pages in again. */
    (void)mallopt(M_TRIM_THRESHOLD, 64 << 20);
    (void)mallopt(M_TOP_PAD, 64 << 20);
    parse(argc, argv);
    lmdb_case.rows = malloc(VALUE_BYTES);
    if (lmdb_case.rows == NULL || ops == NULL)
        bench_die("start");
    for (uint32_t i = 0; i < VALUE_BYTES; i++)
        lmdb_case.rows[i] = (uint8_t)(i * 2654435761u >> 13);
    kvc_row_sums(lmdb_case.rows, ROW_BYTES, N_ROWS, lmdb_case.sums);
    for (uint32_t run = 0; run < lmdb_case.runs; run++) {
        if (!lmdb_case.no_writes) {
            run_writes(ops, run);
        } else if (run == 0) { /* what is read */
            (void)case_write_plain();
            (void)case_write_lmdb(64);
            (void)case_write_tier(ops, false);
        }
        if (!lmdb_case.no_rows)
            run_reads(ops);
    }
    print_table();
    bench_remove_tree(lmdb_case.dir);
    free(lmdb_case.rows);
    return 0;
}
