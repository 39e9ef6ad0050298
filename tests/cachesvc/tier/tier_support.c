/*
 * tier_support.c: see tier_support.h.
 */
#include "tier_support.h"

#include <errno.h>
#include <ftw.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/sum.h"
#include "tier_dram.h"

uint64_t rng_next(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9E3779B97F4A7C15));

    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *ftw)
{
    (void)st;
    (void)kind;
    (void)ftw;
    return remove(path);
}

void tut_init(tier_under_test *t, const kvs_tier_ops *ops, const char *faults)
{
    memset(t, 0, sizeof(*t));
    t->ops = ops;
    t->opts = (kvs_tier_opts){
        .size_bytes = sizeof(t->opts),
        .capacity_bytes = 32u << 20,
        .max_value_bytes = 1u << 20,
        .group_commit_ns = 2000000,
        .group_commit_bytes = 4u << 20,
        .row_sums_bytes = 64u << 10,
    };
    const char *inner = strchr(ops->name, ':');
    if (inner != NULL) {
        snprintf(t->fault, sizeof(t->fault), "%s%s%s", inner + 1, faults != NULL ? ":" : "",
                 faults != NULL ? faults : "");
        t->opts.fault = t->fault;
    }
}

int tut_delete(void **state)
{
    if (*state != NULL)
        tut_fini(*state);
    free(*state);
    return 0;
}

kvc_status tut_open(tier_under_test *t)
{
    if ((t->ops->caps & KVS_TIER_PERSISTENT) && t->dir[0] == '\0') {
        const char *base = getenv("TMPDIR");
        snprintf(t->dir, sizeof(t->dir), "%s/kvs-tier-XXXXXX", base != NULL ? base : "/tmp");
        if (mkdtemp(t->dir) == NULL)
            return KVC_IO;
    }
    t->opts.path = t->dir[0] != '\0' ? t->dir : NULL;
    return t->ops->open(&t->opts, &t->tier);
}

void tut_close(tier_under_test *t)
{
    t->ops->close(t->tier);
    t->tier = NULL;
}

void tut_fini(tier_under_test *t)
{
    if (t->tier != NULL)
        tut_close(t);
    if (t->dir[0] != '\0')
        nftw(t->dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

kvs_value_key key_of(uint64_t tenant, uint64_t block, uint32_t part)
{
    kvs_value_key key = {.part = part};
    uint64_t a = tenant, b = block ^ UINT64_C(0x1234567);

    for (unsigned i = 0; i < KVC_DIGEST_BYTES; i += 8) {
        uint64_t x = rng_next(&a), y = rng_next(&b);
        memcpy(key.tenant.bytes + i, &x, 8);
        memcpy(key.block.bytes + i, &y, 8);
        memset(key.schema.bytes + i, 0x5c, 8);
    }
    return key;
}

void fill_rows(const kvs_value_key *key, uint32_t version, shape s, void *rows)
{
    uint64_t state = key->part * UINT64_C(31) + version;
    size_t len = (size_t)s.row_bytes * s.n_rows;
    uint8_t *out = rows;

    for (unsigned i = 0; i < KVC_DIGEST_BYTES; i++)
        state = state * 257 + key->block.bytes[i] + key->tenant.bytes[i];
    for (size_t i = 0; i < len; i += 8) {
        uint64_t x = rng_next(&state);
        memcpy(out + i, &x, len - i < 8 ? len - i : 8);
    }
}

typedef struct waiter {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    bool done;
} waiter;

static void wake(kvs_tier_write *write)
{
    waiter *w = write->arg;

    pthread_mutex_lock(&w->lock);
    w->done = true;
    pthread_cond_signal(&w->cond);
    pthread_mutex_unlock(&w->lock);
}

static put_result put_blocking(tier_under_test *t, const kvs_value_key *key, shape s, void *rows,
                               bool durable)
{
    waiter w = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, false};
    uint32_t *sums = malloc(sizeof(*sums) * (s.n_rows + 1));
    kvs_tier_write write = {
        .key = *key,
        .row_bytes = s.row_bytes,
        .n_rows = s.n_rows,
        .rows = rows,
        .row_sums = sums,
        .durable = durable,
        .done = wake,
        .arg = &w,
    };

    kvc_row_sums(rows, s.row_bytes, s.n_rows, sums);
    put_result r = {.status = t->ops->write(t->tier, &write)};
    if (r.status == KVC_OK) {
        pthread_mutex_lock(&w.lock);
        while (!w.done)
            pthread_cond_wait(&w.cond, &w.lock);
        pthread_mutex_unlock(&w.lock);
        r.status = write.status;
        r.slot = write.slot;
    }
    free(sums);
    return r;
}

put_result put_value(tier_under_test *t, const kvs_value_key *key, uint32_t version, shape s,
                     bool durable)
{
    put_result r = {.status = KVC_OK};
    void *addr;

    if (t->ops->caps & KVS_TIER_ADDRESSABLE) {
        r.status = t->ops->reserve(t->tier, key, s.row_bytes, s.n_rows, 1, &r.slot, &addr);
        if (r.status == KVC_OK) {
            fill_rows(key, version, s, addr);
            t->ops->commit(t->tier, &r.slot, 1);
        }
        return r;
    }
    void *rows = malloc((size_t)s.row_bytes * s.n_rows + 1);
    fill_rows(key, version, s, rows);
    r = put_blocking(t, key, s, rows, durable);
    free(rows);
    return r;
}

kvc_status check_rows(tier_under_test *t, const kvs_value_key *key, uint32_t version, shape s,
                      kvs_slot slot, uint32_t first, uint32_t n, bool *equal_p)
{
    size_t all = (size_t)s.row_bytes * s.n_rows, off = (size_t)first * s.row_bytes,
           len = (size_t)n * s.row_bytes;
    uint8_t *want = malloc(all + 1), *got = malloc(len + 1);
    kvc_status status = KVC_OK;

    fill_rows(key, version, s, want);
    if (t->ops->caps & KVS_TIER_ADDRESSABLE) {
        memcpy(got, (const uint8_t *)t->ops->map(t->tier, slot) + off, len);
    } else {
        kvs_row_range range = {.first = first, .n = n, .dst = got};
        got[len] = 0x77;
        status = t->ops->read(t->tier, key, slot, s.row_bytes, s.n_rows, &range, 1);
        if (got[len] != 0x77)
            status = KVC_PROTOCOL; /* wrote past the end */
    }
    *equal_p = status == KVC_OK && memcmp(got, want + off, len) == 0;
    free(want);
    free(got);
    return status;
}

void assert_value(tier_under_test *t, const kvs_value_key *key, uint32_t version, shape s,
                  kvs_slot slot)
{
    bool equal;

    assert_int_equal(check_rows(t, key, version, s, slot, 0, s.n_rows, &equal), KVC_OK);
    assert_true(equal);
}

static _Thread_local uint64_t file_bytes;

static int add_file(const char *path, const struct stat *st, int kind, struct FTW *ftw)
{
    (void)path;
    (void)ftw;
    if (kind == FTW_F) {
        /* Whichever is more: what the file claims or what is allotted to it. */
        uint64_t allotted = (uint64_t)st->st_blocks * 512, size = (uint64_t)st->st_size;
        file_bytes += allotted > size ? allotted : size;
    }
    return 0;
}

uint64_t medium_bytes(tier_under_test *t)
{
    kvs_dram_segment segments[256];
    uint64_t total = 0;
    uint32_t n;

    if (t->dir[0] != '\0') {
        file_bytes = 0;
        nftw(t->dir, add_file, 16, FTW_PHYS);
        return file_bytes;
    }
    if (strcmp(t->ops->name, "dram") == 0) {
        kvs_dram_segments(t->tier, segments, 256, &n);
        assert_true(n <= 256);
        for (uint32_t i = 0; i < n; i++) {
            struct stat st;
            assert_int_equal(fstat(segments[i].fd, &st), 0);
            assert_true((uint64_t)st.st_blocks * 512 <= (uint64_t)st.st_size);
            total += (uint64_t)st.st_size;
        }
    }
    return total;
}

uint64_t used_bytes(tier_under_test *t)
{
    kvs_tier_usage usage;

    t->ops->usage(t->tier, &usage);
    return usage.used_bytes;
}

uint64_t value_count(tier_under_test *t)
{
    kvs_tier_usage usage;

    t->ops->usage(t->tier, &usage);
    return usage.values;
}

char tut_log[1 << 16];
static size_t log_len;
static pthread_mutex_t log_lock = PTHREAD_MUTEX_INITIALIZER;

void tut_log_clear(void)
{
    pthread_mutex_lock(&log_lock);
    log_len = 0;
    tut_log[0] = '\0';
    pthread_mutex_unlock(&log_lock);
}

void tut_log_keep(void *arg, const char *line, size_t len_bytes)
{
    (void)arg;
    pthread_mutex_lock(&log_lock);
    if (log_len + len_bytes < sizeof(tut_log)) {
        memcpy(tut_log + log_len, line, len_bytes);
        log_len += len_bytes;
        tut_log[log_len] = '\0';
    }
    pthread_mutex_unlock(&log_lock);
}
