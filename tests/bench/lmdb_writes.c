/*
 * lmdb_writes.c: how fast values of 1 MiB are written, and what all of lmdb_bench shares; see
 * lmdb_cases.h.
 */
#include <fcntl.h>
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
#include "lmdb_cases.h"

#define IN_FLIGHT 64u

void case_path(char out[320], const char *name)
{
    snprintf(out, 320, "%s/%s", lmdb_case.dir, name);
}

kvs_value_key case_key(uint32_t i)
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
    return (double)lmdb_case.n_values * VALUE_BYTES / (double)(kvc_now_ns() - start_ns);
}

double case_write_plain(void)
{
    char path[320];

    case_path(path, "plain");
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0 || fallocate(fd, 0, 0, (off_t)lmdb_case.n_values * VALUE_BYTES) != 0)
        bench_die(path);
    uint64_t start = kvc_now_ns();
    for (uint32_t i = 0; i < lmdb_case.n_values; i++) {
        if (pwrite(fd, lmdb_case.rows, VALUE_BYTES, (off_t)i * VALUE_BYTES) != VALUE_BYTES)
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

void case_check(int rc, const char *what)
{
    if (rc != MDB_SUCCESS) {
        fprintf(stderr, "%s: %s\n", what, mdb_strerror(rc));
        exit(1);
    }
}

MDB_env *case_lmdb(const char *name, unsigned flags, MDB_dbi *dbi_p)
{
    char path[320];
    MDB_env *env;
    MDB_txn *txn;

    case_path(path, name);
    mkdir(path, 0700);
    case_check(mdb_env_create(&env), "mdb_env_create");
    case_check(mdb_env_set_mapsize(env, (size_t)lmdb_case.n_values * VALUE_BYTES * 2 + (64u << 20)),
               "mdb_env_set_mapsize");
    case_check(mdb_env_open(env, path, MDB_NORDAHEAD | MDB_NOTLS | flags, 0600), "mdb_env_open");
    case_check(mdb_txn_begin(env, NULL, flags & MDB_RDONLY, &txn), "mdb_txn_begin");
    case_check(mdb_dbi_open(txn, NULL, 0, dbi_p), "mdb_dbi_open");
    case_check(mdb_txn_commit(txn), "mdb_txn_commit");
    return env;
}

double case_write_lmdb(uint32_t per_txn)
{
    char path[320];
    MDB_dbi dbi;

    case_path(path, "bare");
    bench_remove_tree(path);
    MDB_env *env = case_lmdb("bare", 0, &dbi);
    uint64_t start = kvc_now_ns();
    for (uint32_t i = 0; i < lmdb_case.n_values;) {
        MDB_txn *txn;
        case_check(mdb_txn_begin(env, NULL, 0, &txn), "mdb_txn_begin");
        for (uint32_t k = 0; k < per_txn && i < lmdb_case.n_values; k++, i++) {
            kvs_value_key name = case_key(i);
            MDB_val key = {sizeof(name), &name}, data = {PREFIX + VALUE_BYTES, NULL};
            case_check(mdb_put(txn, dbi, &key, &data, MDB_RESERVE), "mdb_put");
            memset(data.mv_data, 0, PREFIX);
            memcpy((uint8_t *)data.mv_data + PREFIX, lmdb_case.rows, VALUE_BYTES);
        }
        case_check(mdb_txn_commit(txn), "mdb_txn_commit");
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

kvs_tier *case_tier(const kvs_tier_ops *ops)
{
    char path[320];
    kvs_tier *tier;

    case_path(path, "tier");
    kvs_tier_opts opts = {
        .size_bytes = sizeof(opts),
        .capacity_bytes = (uint64_t)lmdb_case.n_values * VALUE_BYTES * 5 / 4 + (64u << 20),
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
double case_write_tier(const kvs_tier_ops *ops, bool durable)
{
    static kvs_tier_write writes[IN_FLIGHT];
    window w = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, NULL, 0};
    char path[320];

    case_path(path, "tier");
    bench_remove_tree(path);
    kvs_tier *tier = case_tier(ops);
    for (uint32_t i = 0; i < IN_FLIGHT; i++) {
        writes[i].next = w.idle;
        w.idle = &writes[i];
    }
    uint64_t start = kvc_now_ns();
    for (uint32_t i = 0; i < lmdb_case.n_values; i++) {
        pthread_mutex_lock(&w.lock);
        while (w.idle == NULL)
            pthread_cond_wait(&w.cond, &w.lock);
        kvs_tier_write *write = w.idle;
        w.idle = write->next;
        pthread_mutex_unlock(&w.lock);
        *write = (kvs_tier_write){.key = case_key(i),
                                  .row_bytes = ROW_BYTES,
                                  .n_rows = N_ROWS,
                                  .rows = lmdb_case.rows,
                                  .row_sums = lmdb_case.sums,
                                  .durable = durable,
                                  .done = write_done,
                                  .arg = &w};
        if (ops->write(tier, write) != KVC_OK)
            bench_die("write");
    }
    pthread_mutex_lock(&w.lock);
    while (w.n_done < lmdb_case.n_values)
        pthread_cond_wait(&w.cond, &w.lock);
    pthread_mutex_unlock(&w.lock);
    if (!durable && ops->sync(tier, NULL, 0, NULL) != KVC_OK)
        bench_die("sync");
    double result = gbps(start);
    ops->close(tier);
    return result;
}
