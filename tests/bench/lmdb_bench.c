/*
 * lmdb_bench.c: the lmdb tier beside bare LMDB and the bare disk, in one run.
 *
 *   lmdb_bench [--quick] [--mib N] [--runs N] [--dir FOLDER] [--only writes|rows]
 *
 * Values of 1 MiB (256 rows of 4 KiB). Writes: a plain preallocated file with an fdatasync each
 * 16 MiB, LMDB alone with full sync and 16 or 64 MiB a transaction, the tier with durable and with
 * lazy writes (a sync at the end counted). Rows: warm and cold, from LMDB alone (looked up and
 * copied, no sums) and from the tier (sums verified). Cold means: everything closed, the file
 * written back and dropped from the page cache by posix_fadvise(DONTNEED), opened again; the sums
 * cache is empty then, so the tier also reads a prefix page per value. The disk's random reads
 * are O_DIRECT. Figures are medians of the runs, with the smallest and the largest.
 */
#include <fcntl.h>
#include <lmdb.h>
#include <malloc.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/sum.h"
#include "bench.h"
#include "tier.h"

#define ROW_BYTES   4096u
#define N_ROWS      256u
#define VALUE_BYTES (ROW_BYTES * N_ROWS)
#define PREFIX      4080u
#define IN_FLIGHT   64u
#define MAX_THREADS 64u
#define CALL_ROWS   64u /* rows of one value that one read asks for */

typedef struct setup {
    char dir[256];
    uint32_t n_values, runs;
    bool no_writes, no_rows;
    uint64_t read_ns; /* how long each read case runs */
    uint8_t *rows;    /* one value */
    uint32_t sums[N_ROWS];
} setup;

static setup all = {.n_values = 1024, .runs = 3, .read_ns = 2000000000ull};

static void path_of(char out[320], const char *name)
{
    snprintf(out, 320, "%s/%s", all.dir, name);
}

/* All values have the same bytes; only their keys differ. */
static kvs_value_key key_of(uint32_t i)
{
    kvs_value_key key = {.part = 1};
    uint64_t seed = i;

    for (uint32_t k = 0; k < KVC_DIGEST_BYTES; k += 8) {
        uint64_t x = bench_random(&seed);
        memcpy(key.block.bytes + k, &x, 8);
    }
    return key;
}

static double gbps(uint64_t start_ns)
{
    return (double)all.n_values * VALUE_BYTES / (double)(kvc_now_ns() - start_ns);
}

/* --- writes --- */

static double write_plain(void)
{
    char path[320];

    path_of(path, "plain");
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0 || fallocate(fd, 0, 0, (off_t)all.n_values * VALUE_BYTES) != 0)
        bench_die(path);
    uint64_t start = kvc_now_ns();
    for (uint32_t i = 0; i < all.n_values; i++) {
        if (pwrite(fd, all.rows, VALUE_BYTES, (off_t)i * VALUE_BYTES) != VALUE_BYTES)
            bench_die("pwrite");
        if ((i + 1) % 16 == 0 && fdatasync(fd) != 0)
            bench_die("fdatasync");
    }
    if (fdatasync(fd) != 0)
        bench_die("fdatasync");
    double result = gbps(start);
    close(fd);
    return result;
}

static void lmdb_check(int rc, const char *what)
{
    if (rc != MDB_SUCCESS) {
        fprintf(stderr, "%s: %s\n", what, mdb_strerror(rc));
        exit(1);
    }
}

static MDB_env *lmdb_start(const char *name, unsigned flags, MDB_dbi *dbi_p)
{
    char path[320];
    MDB_env *env;
    MDB_txn *txn;

    path_of(path, name);
    mkdir(path, 0700);
    lmdb_check(mdb_env_create(&env), "mdb_env_create");
    lmdb_check(mdb_env_set_mapsize(env, (size_t)all.n_values * VALUE_BYTES * 2 + (64u << 20)),
               "mdb_env_set_mapsize");
    lmdb_check(mdb_env_open(env, path, MDB_NORDAHEAD | MDB_NOTLS | flags, 0600), "mdb_env_open");
    lmdb_check(mdb_txn_begin(env, NULL, flags & MDB_RDONLY, &txn), "mdb_txn_begin");
    lmdb_check(mdb_dbi_open(txn, NULL, 0, dbi_p), "mdb_dbi_open");
    lmdb_check(mdb_txn_commit(txn), "mdb_txn_commit");
    return env;
}

/* LMDB with its own full sync, per_txn values a transaction; what it writes is left as "bare". */
static double write_lmdb(uint32_t per_txn)
{
    char path[320];
    MDB_dbi dbi;

    path_of(path, "bare");
    bench_remove_tree(path);
    MDB_env *env = lmdb_start("bare", 0, &dbi);
    uint64_t start = kvc_now_ns();
    for (uint32_t i = 0; i < all.n_values;) {
        MDB_txn *txn;
        lmdb_check(mdb_txn_begin(env, NULL, 0, &txn), "mdb_txn_begin");
        for (uint32_t k = 0; k < per_txn && i < all.n_values; k++, i++) {
            kvs_value_key name = key_of(i);
            MDB_val key = {sizeof(name), &name}, data = {PREFIX + VALUE_BYTES, NULL};
            lmdb_check(mdb_put(txn, dbi, &key, &data, MDB_RESERVE), "mdb_put");
            memset(data.mv_data, 0, PREFIX);
            memcpy((uint8_t *)data.mv_data + PREFIX, all.rows, VALUE_BYTES);
        }
        lmdb_check(mdb_txn_commit(txn), "mdb_txn_commit");
    }
    double result = gbps(start);
    mdb_env_close(env);
    return result;
}

typedef struct window {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    kvs_tier_write *idle;
    uint32_t n_done;
} window;

static void write_done(kvs_tier_write *write)
{
    window *w = write->arg;

    if (write->status != KVC_OK) {
        fprintf(stderr, "write: %s\n", kvc_status_name(write->status));
        exit(1);
    }
    pthread_mutex_lock(&w->lock);
    write->next = w->idle;
    w->idle = write;
    w->n_done++;
    pthread_cond_signal(&w->cond);
    pthread_mutex_unlock(&w->lock);
}

static kvs_tier *tier_start(const kvs_tier_ops *ops)
{
    char path[320];
    kvs_tier *tier;

    path_of(path, "tier");
    kvs_tier_opts opts = {
        .size_bytes = sizeof(opts),
        .capacity_bytes = (uint64_t)all.n_values * VALUE_BYTES * 5 / 4 + (64u << 20),
        .path = path,
        .max_value_bytes = VALUE_BYTES,
        .group_commit_ns = 20000000,
        .group_commit_bytes = 32u << 20,
        .row_sums_bytes = 64u << 20,
    };
    if (ops->open(&opts, &tier) != KVC_OK) {
        fprintf(stderr, "the tier does not open\n");
        exit(1);
    }
    return tier;
}

/* The tier with a window of writes; what it writes is left as "tier". */
static double write_tier(const kvs_tier_ops *ops, bool durable)
{
    static kvs_tier_write writes[IN_FLIGHT];
    window w = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, NULL, 0};
    char path[320];

    path_of(path, "tier");
    bench_remove_tree(path);
    kvs_tier *tier = tier_start(ops);
    for (uint32_t i = 0; i < IN_FLIGHT; i++) {
        writes[i].next = w.idle;
        w.idle = &writes[i];
    }
    uint64_t start = kvc_now_ns();
    for (uint32_t i = 0; i < all.n_values; i++) {
        pthread_mutex_lock(&w.lock);
        while (w.idle == NULL)
            pthread_cond_wait(&w.cond, &w.lock);
        kvs_tier_write *write = w.idle;
        w.idle = write->next;
        pthread_mutex_unlock(&w.lock);
        *write = (kvs_tier_write){.key = key_of(i),
                                  .row_bytes = ROW_BYTES,
                                  .n_rows = N_ROWS,
                                  .rows = all.rows,
                                  .row_sums = all.sums,
                                  .durable = durable,
                                  .done = write_done,
                                  .arg = &w};
        if (ops->write(tier, write) != KVC_OK)
            bench_die("write");
    }
    pthread_mutex_lock(&w.lock);
    while (w.n_done < all.n_values)
        pthread_cond_wait(&w.cond, &w.lock);
    pthread_mutex_unlock(&w.lock);
    if (!durable && ops->sync(tier, NULL, 0, NULL) != KVC_OK)
        bench_die("sync");
    double result = gbps(start);
    ops->close(tier);
    return result;
}

/* --- rows --- */

typedef struct reader {
    pthread_t thread;
    uint64_t seed, until_ns, rows, max_rows;
    uint32_t call_rows;
    const kvs_tier_ops *ops; /* the tier's, or NULL: LMDB alone, or the disk when fd >= 0 */
    kvs_tier *tier;
    MDB_env *env;
    MDB_dbi dbi;
    int fd;
    uint8_t *buffer; /* CALL_ROWS rows, page-aligned */
} reader;

static void read_tier(reader *r, uint32_t value)
{
    kvs_row_range ranges[CALL_ROWS];
    kvs_value_key key = key_of(value);
    kvs_slot slot = {0, (uint64_t)ROW_BYTES << 32 | N_ROWS};

    for (uint32_t i = 0; i < r->call_rows; i++)
        ranges[i] = (kvs_row_range){(uint32_t)(bench_random(&r->seed) % N_ROWS), 1,
                                    r->buffer + (size_t)i * ROW_BYTES};
    kvc_status status = r->ops->read(r->tier, &key, slot, ROW_BYTES, N_ROWS, ranges, r->call_rows);
    if (status != KVC_OK) {
        fprintf(stderr, "read: %s\n", kvc_status_name(status));
        exit(1);
    }
}

static void read_lmdb(reader *r, MDB_txn *txn, uint32_t value)
{
    kvs_value_key name = key_of(value);
    MDB_val key = {sizeof(name), &name}, data;

    lmdb_check(mdb_txn_renew(txn), "mdb_txn_renew");
    lmdb_check(mdb_get(txn, r->dbi, &key, &data), "mdb_get");
    for (uint32_t i = 0; i < r->call_rows; i++)
        memcpy(r->buffer + (size_t)i * ROW_BYTES,
               (uint8_t *)data.mv_data + PREFIX + bench_random(&r->seed) % N_ROWS * ROW_BYTES,
               ROW_BYTES);
    mdb_txn_reset(txn);
}

static void *read_loop(void *arg)
{
    reader *r = arg;
    MDB_txn *txn = NULL;

    if (r->env != NULL) {
        lmdb_check(mdb_txn_begin(r->env, NULL, MDB_RDONLY, &txn), "mdb_txn_begin");
        mdb_txn_reset(txn);
    }
    while (r->rows < r->max_rows && kvc_now_ns() < r->until_ns) {
        uint32_t value = (uint32_t)(bench_random(&r->seed) % all.n_values);
        if (r->ops != NULL)
            read_tier(r, value);
        else if (r->env != NULL)
            read_lmdb(r, txn, value);
        else if (pread(r->fd, r->buffer, ROW_BYTES,
                       (off_t)(value * (uint64_t)VALUE_BYTES +
                               bench_random(&r->seed) % N_ROWS * ROW_BYTES)) != ROW_BYTES)
            bench_die("pread");
        r->rows += r->call_rows;
    }
    if (txn != NULL)
        mdb_txn_abort(txn);
    return NULL;
}

/*
 * Rows a second over n threads that are all like this one. Cold readers stop once an eighth of the
 * rows were read, before many of them are warm.
 */
static double read_rows(reader like, bool cold, uint32_t n)
{
    static reader readers[MAX_THREADS];
    uint64_t rows = 0, start = kvc_now_ns();

    for (uint32_t i = 0; i < n; i++) {
        readers[i] = like;
        readers[i].seed = start + i * 7919;
        readers[i].until_ns = start + all.read_ns;
        readers[i].max_rows = cold ? (uint64_t)all.n_values * N_ROWS / 8 / n : UINT64_MAX;
        if (posix_memalign((void **)&readers[i].buffer, 4096, CALL_ROWS * ROW_BYTES) != 0)
            bench_die("posix_memalign");
        if (pthread_create(&readers[i].thread, NULL, read_loop, &readers[i]) != 0)
            bench_die("pthread_create");
    }
    for (uint32_t i = 0; i < n; i++) {
        pthread_join(readers[i].thread, NULL);
        rows += readers[i].rows;
        free(readers[i].buffer);
    }
    return (double)rows * 1e9 / (double)(kvc_now_ns() - start);
}

static void drop_file(const char *name)
{
    char path[320];

    path_of(path, name);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0 || fdatasync(fd) != 0 || posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) != 0)
        bench_die(path);
    close(fd);
}

static void warm_file(const char *name)
{
    char path[320];
    uint8_t *buffer = malloc(VALUE_BYTES);

    path_of(path, name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        bench_die(path);
    while (read(fd, buffer, VALUE_BYTES) > 0)
        ;
    close(fd);
    free(buffer);
}

static double disk_rows(uint32_t threads)
{
    char path[320];

    path_of(path, "plain");
    reader r = {.fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC), .call_rows = 1};
    if (r.fd < 0)
        bench_die(path);
    double result = read_rows(r, false, threads);
    close(r.fd);
    return result;
}

static double lmdb_rows(bool cold, uint32_t threads, uint32_t call_rows)
{
    MDB_dbi dbi;

    (cold ? drop_file : warm_file)("bare/data.mdb");
    MDB_env *env = lmdb_start("bare", MDB_RDONLY, &dbi);
    double result =
        read_rows((reader){.env = env, .dbi = dbi, .call_rows = call_rows}, cold, threads);
    mdb_env_close(env);
    return result;
}

static double tier_rows(const kvs_tier_ops *ops, bool cold, uint32_t threads, uint32_t call_rows)
{
    (cold ? drop_file : warm_file)("tier/class-257/data.mdb");
    kvs_tier *tier = tier_start(ops);
    double result =
        read_rows((reader){.ops = ops, .tier = tier, .call_rows = call_rows}, cold, threads);
    ops->close(tier);
    return result;
}

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
    [R_WARM_LMDB1] = {"warm, LMDB, 64 rows a call, 1 thread", "krows/s", 1e-3, {{0}, 0}},
    [R_WARM_TIER1] = {"warm, tier, 64 rows a call, 1 thread", "krows/s", 1e-3, {{0}, 0}},
    [R_WARM_LMDB4] = {"warm, LMDB, 64 rows a call, 4 threads", "krows/s", 1e-3, {{0}, 0}},
    [R_WARM_TIER4] = {"warm, tier, 64 rows a call, 4 threads", "krows/s", 1e-3, {{0}, 0}},
    [R_DISK1] = {"disk, O_DIRECT 4 KiB, 1 thread", "krows/s", 1e-3, {{0}, 0}},
    [R_DISK32] = {"disk, O_DIRECT 4 KiB, 32 threads", "krows/s", 1e-3, {{0}, 0}},
    [R_DISK64] = {"disk, O_DIRECT 4 KiB, 64 threads", "krows/s", 1e-3, {{0}, 0}},
    [R_COLD_LMDB1] = {"cold, LMDB, 1 row a call, 1 thread", "krows/s", 1e-3, {{0}, 0}},
    [R_COLD_TIER1] = {"cold, tier, 1 row a call, 1 thread", "krows/s", 1e-3, {{0}, 0}},
    [R_COLD_LMDB32] = {"cold, LMDB, 1 row a call, 32 threads", "krows/s", 1e-3, {{0}, 0}},
    [R_COLD_TIER32] = {"cold, tier, 1 row a call, 32 threads", "krows/s", 1e-3, {{0}, 0}},
    [R_COLD_LMDB_CALL] = {"cold, LMDB, 64 rows a call, 2 threads", "krows/s", 1e-3, {{0}, 0}},
    [R_COLD_TIER_CALL] = {"cold, tier, 64 rows a call, 2 threads", "krows/s", 1e-3, {{0}, 0}},
    [R_COLD_LMDB_CALL8] = {"cold, LMDB, 64 rows a call, 8 threads", "krows/s", 1e-3, {{0}, 0}},
    [R_COLD_TIER_CALL8] = {"cold, tier, 64 rows a call, 8 threads", "krows/s", 1e-3, {{0}, 0}},
};

static double write_case(const kvs_tier_ops *ops, uint32_t which)
{
    switch (which) {
    case W_PLAIN:
        return write_plain();
    case W_LMDB16:
        return write_lmdb(16);
    case W_LMDB64:
        return write_lmdb(64);
    default:
        return write_tier(ops, which == W_DURABLE);
    }
}

/* Each run starts with another case and lets the disk rest before each: what came before tells. */
static void run_writes(const kvs_tier_ops *ops, uint32_t run)
{
    enum { N = W_LAZY + 1 };

    for (uint32_t i = 0; i < N; i++) {
        uint32_t which = (run * 2 + i) % N;
        sync();
        usleep((useconds_t)(all.read_ns / 500)); /* virtual disks have a budget for bursts */
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

    bench_add(&table[R_DISK1].series, disk_rows(1));
    bench_add(&table[R_DISK32].series, disk_rows(32));
    bench_add(&table[R_DISK64].series, disk_rows(64));
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        bool cold = cases[i].cold;
        uint32_t threads = cases[i].threads, rows = cases[i].call_rows;
        bench_add(&table[cases[i].lmdb].series, lmdb_rows(cold, threads, rows));
        bench_add(&table[cases[i].tier].series, tier_rows(ops, cold, threads, rows));
    }
}

static void print_table(void)
{
    double best = 0, durable = bench_median(&table[W_DURABLE].series);

    printf("%s\n%u values of 1 MiB, %u runs: median (min .. max)\n", bench_machine(), all.n_values,
           all.runs);
    for (int i = 0; i < N_CASES; i++) {
        row *r = &table[i];
        if (r->series.n == 0)
            continue;
        printf("  %-40s %9.2f (%.2f .. %.2f) %s\n", r->name, r->scale * bench_median(&r->series),
               r->scale * bench_min(&r->series), r->scale * bench_max(&r->series), r->unit);
    }
    for (int i = W_LMDB16; i <= W_LMDB64; i++)
        best = bench_median(&table[i].series) > best ? bench_median(&table[i].series) : best;
    if (!all.no_writes)
        printf("  durable writes: %.2f of LMDB's best with full sync (goal 0.80)\n",
               durable / best);
    best = 0;
    for (int i = R_DISK1; i <= R_DISK64; i++)
        best = bench_median(&table[i].series) > best ? bench_median(&table[i].series) : best;
    if (all.no_rows)
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
            all.n_values = 32;
            all.runs = 1;
            all.read_ns = 20000000;
        } else if (strcmp(argv[i], "--mib") == 0 && value != NULL) {
            all.n_values = (uint32_t)strtoul(argv[++i], NULL, 10);
        } else if (strcmp(argv[i], "--runs") == 0 && value != NULL) {
            all.runs = (uint32_t)strtoul(argv[++i], NULL, 10);
        } else if (strcmp(argv[i], "--only") == 0 && value != NULL) {
            all.no_writes = strcmp(value, "rows") == 0;
            all.no_rows = !all.no_writes;
            i++;
        } else if (strcmp(argv[i], "--dir") == 0 && value != NULL) {
            base = argv[++i];
        } else {
            fprintf(stderr,
                    "usage: %s [--quick] [--mib N] [--runs N] [--dir FOLDER] "
                    "[--only writes|rows]\n",
                    argv[0]);
            exit(2);
        }
    }
    if (all.n_values == 0 || all.runs == 0 || all.runs > BENCH_MAX_RUNS)
        exit(2);
    snprintf(all.dir, sizeof(all.dir), "%s/lmdb-bench-XXXXXX", base != NULL ? base : "/var/tmp");
    if (mkdtemp(all.dir) == NULL)
        bench_die(all.dir);
}

int main(int argc, char **argv)
{
    const kvs_tier_ops *ops = kvs_tier_find("lmdb");

    /* As the daemon does: without it, each transaction faults its pages in again. */
    (void)mallopt(M_TRIM_THRESHOLD, 64 << 20);
    (void)mallopt(M_TOP_PAD, 64 << 20);
    parse(argc, argv);
    all.rows = malloc(VALUE_BYTES);
    if (all.rows == NULL || ops == NULL)
        bench_die("start");
    for (uint32_t i = 0; i < VALUE_BYTES; i++)
        all.rows[i] = (uint8_t)(i * 2654435761u >> 13);
    kvc_row_sums(all.rows, ROW_BYTES, N_ROWS, all.sums);
    for (uint32_t run = 0; run < all.runs; run++) {
        if (!all.no_writes) {
            run_writes(ops, run);
        } else if (run == 0) { /* what is read */
            (void)write_plain();
            (void)write_lmdb(64);
            (void)write_tier(ops, false);
        }
        if (!all.no_rows)
            run_reads(ops);
    }
    print_table();
    bench_remove_tree(all.dir);
    free(all.rows);
    return 0;
}
