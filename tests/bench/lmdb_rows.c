/*
 * lmdb_rows.c: how fast random rows are read; see lmdb_cases.h. Each thread has a reader of its
 * own.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "bench.h"
#include "lmdb_cases.h"

#define MAX_THREADS 256u
#define CALL_ROWS   64u /* rows of one value that one read asks for */
#define AHEAD       8u  /* more values than the tier has under way at once */

typedef struct reader {
    pthread_t thread;
    uint64_t seed, until_ns, rows, max_rows;
    uint32_t call_rows;
    const kvs_tier_ops *ops; /* the tier's, or NULL: LMDB alone, or the disk when fd >= 0 */
    kvs_tier *tier;
    MDB_env *env;
    MDB_dbi dbi;
    int fd;
    uint8_t *buffer; /* AHEAD times CALL_ROWS rows, page-aligned */
    uint32_t turn;
    kvs_row_range ranges[AHEAD][CALL_ROWS];
} reader;

static bool goes_on(const reader *r)
{
    return r->rows < r->max_rows && kvc_now_ns() < r->until_ns;
}

/* Random rows of a random value, to the next part of the buffer: as many as may be under way at
 * once have one each. */
static bool next_value(void *arg, kvs_tier_read *read_p)
{
    reader *r = arg;
    uint32_t turn = r->turn++ % AHEAD;

    if (!goes_on(r))
        return false;
    for (uint32_t i = 0; i < r->call_rows; i++)
        r->ranges[turn][i] =
            (kvs_row_range){(uint32_t)(bench_random(&r->seed) % N_ROWS), 1,
                            r->buffer + (size_t)(turn * CALL_ROWS + i) * ROW_BYTES};
    r->rows += r->call_rows;
    *read_p =
        (kvs_tier_read){.key = case_key((uint32_t)(bench_random(&r->seed) % lmdb_case.n_values)),
                        .slot = {0, (uint64_t)ROW_BYTES << 32 | N_ROWS},
                        .row_bytes = ROW_BYTES,
                        .n_rows = N_ROWS,
                        .n_ranges = r->call_rows,
                        .ranges = r->ranges[turn]};
    return true;
}

static void value_done(void *arg, const kvs_tier_read *read)
{
    (void)arg;
    if (read->status != KVC_OK) {
        fprintf(stderr, "read: %s\n", kvc_status_name(read->status));
        exit(1);
    }
}

/* Single rows one after the other; of many of a value, some values at once. */
static void read_tier(reader *r)
{
    kvs_tier_reads reads = {.next = next_value, .done = value_done, .arg = r};
    kvs_tier_read read;

    if (r->call_rows > 1)
        r->ops->read_each(r->tier, &reads);
    while (next_value(r, &read)) {
        read.status =
            r->ops->read(r->tier, &read.key, read.slot, ROW_BYTES, N_ROWS, read.ranges, 1);
        value_done(r, &read);
    }
}

static void read_lmdb(reader *r, MDB_txn *txn, uint32_t value)
{
    kvs_value_key name = case_key(value);
    MDB_val key = {sizeof(name), &name}, data;

    case_check(mdb_txn_renew(txn), "mdb_txn_renew");
    case_check(mdb_get(txn, r->dbi, &key, &data), "mdb_get");
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
        case_check(mdb_txn_begin(r->env, NULL, MDB_RDONLY, &txn), "mdb_txn_begin");
        mdb_txn_reset(txn);
    }
    if (r->ops != NULL)
        read_tier(r);
    while (goes_on(r)) {
        uint32_t value = (uint32_t)(bench_random(&r->seed) % lmdb_case.n_values);
        if (r->env != NULL)
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
    uint64_t rows = 0, start = kvc_now_ns(), n_rows = (uint64_t)lmdb_case.n_values * N_ROWS;

    for (uint32_t i = 0; i < n; i++) {
        readers[i] = like;
        readers[i].seed = start + i * 7919;
        readers[i].until_ns = start + lmdb_case.read_ns;
        readers[i].max_rows = cold && like.ops == NULL ? n_rows / 8 / n : UINT64_MAX;
        if (posix_memalign((void **)&readers[i].buffer, 4096, AHEAD * CALL_ROWS * ROW_BYTES) != 0)
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

    case_path(path, name);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0 || fdatasync(fd) != 0 || posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) != 0)
        bench_die(path);
    close(fd);
}

static void warm_file(const char *name)
{
    char path[320];
    uint8_t *buffer = malloc(VALUE_BYTES);

    case_path(path, name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        bench_die(path);
    while (read(fd, buffer, VALUE_BYTES) > 0)
        ;
    close(fd);
    free(buffer);
}

double case_disk_rows(uint32_t threads)
{
    char path[320];

    case_path(path, "plain");
    reader r = {.fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC), .call_rows = 1};
    if (r.fd < 0)
        bench_die(path);
    double result = read_rows(r, false, threads);
    close(r.fd);
    return result;
}

double case_lmdb_rows(bool cold, uint32_t threads, uint32_t call_rows)
{
    MDB_dbi dbi;

    (cold ? drop_file : warm_file)("bare/data.mdb");
    MDB_env *env = case_lmdb("bare", MDB_RDONLY, &dbi);
    double result =
        read_rows((reader){.env = env, .dbi = dbi, .call_rows = call_rows}, cold, threads);
    mdb_env_close(env);
    return result;
}

double case_tier_rows(const kvs_tier_ops *ops, bool cold, uint32_t threads, uint32_t call_rows)
{
    (cold ? drop_file : warm_file)("tier/class-257/data.mdb");
    kvs_tier *tier = case_tier(ops);
    double result =
        read_rows((reader){.ops = ops, .tier = tier, .call_rows = call_rows}, cold, threads);
    ops->close(tier);
    return result;
}
