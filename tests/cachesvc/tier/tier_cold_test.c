/*
 * tier_cold_test.c: rows that are on the disk only. Files are dropped from the page cache before
 * reads of all kinds of shapes and ranges; with io_uring, completions are held back, so that read
 * transactions grow old, the map grows and values go away under a read.
 */
#include "tier_support.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "base/metrics.h"
#include "lmdb_tier.h"

#define N_SHAPES   6u
#define MAX_RANGES 700u

static const shape shapes[N_SHAPES] = {{4096, 200}, {768, 300},  {100, 64},
                                       {65536, 9},  {200000, 4}, {4096, 1}};
static const unsigned classes[N_SHAPES] = {201, 58, 3, 145, 197, 2};

static int setup(void **state)
{
    tier_under_test *t = malloc(sizeof(*t));

    tut_init(t, kvs_tier_find("lmdb"), NULL);
    *state = t;
    return 0;
}

static void drop_class(const tier_under_test *t, unsigned pages)
{
    char path[256];

    snprintf(path, sizeof(path), "%s/class-%u/data.mdb", t->dir, pages);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    assert_true(fd >= 0);
    assert_int_equal(fsync(fd), 0);
    assert_int_equal(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED), 0);
    close(fd);
}

static kvs_value_key shape_key(uint32_t i)
{
    return key_of(1, i, i);
}

static void put_shapes(tier_under_test *t, kvs_slot *slots)
{
    assert_int_equal(tut_open(t), KVC_OK);
    for (uint32_t i = 0; i < N_SHAPES; i++) {
        kvs_value_key key = shape_key(i);
        put_result r = put_value(t, &key, 1, shapes[i], true);
        assert_int_equal(r.status, KVC_OK);
        slots[i] = r.slot;
    }
}

static bool note_slot(void *arg, const kvs_value_key *key, kvs_slot slot, uint32_t row_bytes,
                      uint32_t n_rows)
{
    (void)row_bytes;
    (void)n_rows;
    ((kvs_slot *)arg)[key->part] = slot;
    return true;
}

/* Closed, dropped, opened: neither pages nor sums are in RAM. */
static void make_cold(tier_under_test *t, kvs_slot *slots)
{
    tut_close(t);
    for (uint32_t i = 0; i < N_SHAPES; i++)
        drop_class(t, classes[i]);
    assert_int_equal(tut_open(t), KVC_OK);
    assert_int_equal(t->ops->recover(t->tier, note_slot, slots), KVC_OK);
}

/* Reads n random ranges of one value in one call and compares every byte. */
static kvc_status read_some(tier_under_test *t, uint32_t i, kvs_slot slot, uint32_t n,
                            uint32_t max_rows, uint64_t *seed)
{
    static _Thread_local kvs_row_range ranges[MAX_RANGES];
    kvs_value_key key = shape_key(i);
    shape s = shapes[i];
    uint8_t *want = malloc((size_t)s.row_bytes * s.n_rows);
    uint8_t *got = malloc((size_t)n * max_rows * s.row_bytes + n);
    size_t at = 0;

    fill_rows(&key, 1, s, want);
    for (uint32_t k = 0; k < n; k++) {
        uint32_t first = (uint32_t)(rng_next(seed) % s.n_rows);
        uint32_t rows = 1 + (uint32_t)(rng_next(seed) % max_rows);
        rows = rows > s.n_rows - first ? s.n_rows - first : rows;
        ranges[k] = (kvs_row_range){first, rows, got + at};
        at += (size_t)rows * s.row_bytes + k % 2; /* not all aligned */
    }
    kvc_status status = t->ops->read(t->tier, &key, slot, s.row_bytes, s.n_rows, ranges, n);
    for (uint32_t k = 0; k < n && status == KVC_OK; k++) {
        if (memcmp(ranges[k].dst, want + (size_t)ranges[k].first * s.row_bytes,
                   (size_t)ranges[k].n * s.row_bytes) != 0)
            status = KVC_PROTOCOL; /* wrong bytes */
    }
    free(want);
    free(got);
    return status;
}

static void test_cold_rows_are_right(void **state)
{
    static const uint32_t counts[] = {1, 2, 7, 64, MAX_RANGES}, lengths[] = {1, 3, 40};
    uint64_t direct = kvc_metric_get(KVC_M_lmdb_direct_bytes), seed = 11;
    tier_under_test *t = *state;
    kvs_slot slots[N_SHAPES];

    put_shapes(t, slots);
    for (uint32_t c = 0; c < 5; c++) {
        for (uint32_t m = 0; m < 3; m++) {
            make_cold(t, slots);
            for (uint32_t i = 0; i < N_SHAPES; i++) {
                uint32_t n = shapes[i].row_bytes > 4096 && counts[c] > 64 ? 64 : counts[c];
                assert_int_equal(read_some(t, i, slots[i], n, lengths[m], &seed), KVC_OK);
                /* Part of it may be in RAM now, by reads past the cache or not. */
                assert_int_equal(read_some(t, i, slots[i], n, lengths[m], &seed), KVC_OK);
            }
        }
    }
    uint64_t read_direct = kvc_metric_get(KVC_M_lmdb_direct_bytes) - direct;
#ifdef KVSI_WITH_URING
    assert_true(read_direct > 20u << 20);
#else
    assert_int_equal(read_direct, 0);
#endif
}

/* What was just written is in RAM, and dirty: it is right from there, and also once it is not. */
static void test_warm_then_cold(void **state)
{
    tier_under_test *t = *state;
    kvs_slot slots[N_SHAPES];
    uint64_t seed = 3;

    put_shapes(t, slots);
    uint64_t direct = kvc_metric_get(KVC_M_lmdb_direct_bytes);
    for (uint32_t i = 0; i < N_SHAPES; i++)
        assert_int_equal(read_some(t, i, slots[i], 64, 2, &seed), KVC_OK);
    assert_int_equal(kvc_metric_get(KVC_M_lmdb_direct_bytes), direct);
    for (uint32_t i = 0; i < N_SHAPES; i++)
        drop_class(t, classes[i]);
    for (uint32_t i = 0; i < N_SHAPES; i++)
        assert_int_equal(read_some(t, i, slots[i], 64, 2, &seed), KVC_OK);
}

/* --- many values in one call --- */

#define EACH_READS  60u
#define EACH_RANGES 24u

/* What one read of a run asks for, and what it got. */
typedef struct wanted {
    uint32_t shape;
    kvs_slot slot;
    kvs_row_range ranges[EACH_RANGES];
    uint8_t *got;
    size_t got_bytes;
    bool unknown, outside;
    uint32_t n_done;
    kvc_status status;
} wanted;

typedef struct run {
    const kvs_slot *slots;
    uint32_t n, next;
    uint64_t seed;
    uint32_t only; /* shape; N_SHAPES: all of them */
    wanted reads[EACH_READS];
} run;

static bool next_of_run(void *arg, kvs_tier_read *read_p)
{
    run *all = arg;
    if (all->next == all->n)
        return false;
    wanted *w = &all->reads[all->next++];
    w->shape = all->only < N_SHAPES ? all->only : (uint32_t)(rng_next(&all->seed) % N_SHAPES);
    shape s = shapes[w->shape];
    w->got_bytes = (size_t)EACH_RANGES * s.row_bytes;
    w->got = malloc(w->got_bytes);
    for (uint32_t k = 0; k < EACH_RANGES; k++)
        w->ranges[k] = (kvs_row_range){(uint32_t)(rng_next(&all->seed) % s.n_rows), 1,
                                       w->got + (size_t)k * s.row_bytes};
    w->outside = rng_next(&all->seed) % 16 == 0;
    if (w->outside)
        w->ranges[3].first = s.n_rows;
    w->unknown = !w->outside && rng_next(&all->seed) % 16 == 0;
    *read_p = (kvs_tier_read){.key = shape_key(w->shape),
                              .slot = all->slots[w->shape],
                              .row_bytes = s.row_bytes,
                              .n_rows = s.n_rows,
                              .n_ranges = EACH_RANGES,
                              .ranges = w->ranges,
                              .arg = w};
    if (w->unknown)
        read_p->key.part = 77;
    return true;
}

static void done_of_run(void *arg, const kvs_tier_read *read)
{
    wanted *w = read->arg;
    (void)arg;
    w->n_done++;
    w->status = read->status;
}

/* OK: every read ended once and with what it should. damaged: a shape whose values are; N_SHAPES:
 * none. */
static void check_run(run *all, uint32_t damaged)
{
    for (uint32_t i = 0; i < all->n; i++) {
        wanted *w = &all->reads[i];
        shape s = shapes[w->shape];
        kvs_value_key key = shape_key(w->shape);
        uint8_t *want = malloc((size_t)s.row_bytes * s.n_rows);
        kvc_status status = w->outside            ? KVC_INVALID
                            : w->unknown          ? KVC_NOT_FOUND
                            : w->shape == damaged ? KVC_CORRUPT
                                                  : KVC_OK;
        fill_rows(&key, 1, s, want);
        assert_int_equal(w->n_done, 1);
        assert_int_equal(w->status, status);
        for (uint32_t k = 0; k < EACH_RANGES && status == KVC_OK; k++)
            assert_memory_equal(w->ranges[k].dst, want + (size_t)w->ranges[k].first * s.row_bytes,
                                s.row_bytes);
        free(want);
        free(w->got);
    }
}

static void run_each(tier_under_test *t, run *all, const kvs_slot *slots, uint32_t n, uint64_t seed)
{
    kvs_tier_reads reads = {.next = next_of_run, .done = done_of_run, .arg = all};
    all->slots = slots;
    all->n = n;
    all->next = 0;
    all->seed = seed;
    memset(all->reads, 0, sizeof(all->reads));
    t->ops->read_each(t->tier, &reads);
    assert_int_equal(all->next, n);
}

/* All of them cold, some of them, none; few and many; some that are not there or ask too much. */
static void test_each_is_right(void **state)
{
    static const uint32_t counts[] = {0, 1, 3, 4, 5, EACH_READS};
    tier_under_test *t = *state;
    kvs_slot slots[N_SHAPES];
    run *all = calloc(1, sizeof(*all));

    all->only = N_SHAPES;
    put_shapes(t, slots);
    for (uint32_t c = 0; c < sizeof(counts) / sizeof(counts[0]); c++) {
        make_cold(t, slots);
        run_each(t, all, slots, counts[c], c);
        check_run(all, N_SHAPES);
        drop_class(t, classes[c % N_SHAPES]);
        run_each(t, all, slots, counts[c], c + 100);
        check_run(all, N_SHAPES);
    }
    t->opts.reader_ns = 1; /* every transaction is too old at once */
    make_cold(t, slots);
    run_each(t, all, slots, EACH_READS, 1000);
    check_run(all, N_SHAPES);
    free(all);
}

/* Every row of a value changed on the disk: its reads say so, the others do not. */
static void test_each_sees_damage(void **state)
{
    tier_under_test *t = *state;
    kvs_slot slots[N_SHAPES];
    kvs_value_key key = shape_key(0);
    shape s = shapes[0];
    run *all = calloc(1, sizeof(*all));
    uint8_t *rows = malloc((size_t)s.row_bytes * s.n_rows), *file = malloc(8u << 20);
    char path[256];

    put_shapes(t, slots);
    make_cold(t, slots);
    fill_rows(&key, 1, s, rows);
    snprintf(path, sizeof(path), "%s/class-%u/data.mdb", t->dir, classes[0]);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    ssize_t n = pread(fd, file, 8u << 20, 0);
    assert_true(n > 0);
    for (uint32_t i = 0; i < s.n_rows; i++) {
        uint8_t *at = memmem(file, (size_t)n, rows + (size_t)i * s.row_bytes, s.row_bytes);
        assert_non_null(at);
        *at ^= 1;
        assert_int_equal(pwrite(fd, at, 1, at - file), 1);
    }
    close(fd);
    drop_class(t, classes[0]);
    all->only = N_SHAPES;
    kvc_log_set_level(KVC_LOG_LEVEL_OFF);
    run_each(t, all, slots, EACH_READS, 5);
    kvc_log_set_level(KVC_LOG_LEVEL_WARN);
    check_run(all, 0);
    free(rows);
    free(file);
    free(all);
}

/* --- reads from the map and their transactions --- */

static kvsi_env *gated; /* its gate closes as a read looks its record up, until the read lets go */
static uint32_t n_lookups;

int __real_mdb_get(MDB_txn *txn, MDB_dbi dbi, MDB_val *key, MDB_val *data);
int __wrap_mdb_get(MDB_txn *txn, MDB_dbi dbi, MDB_val *key, MDB_val *data);
void __real_mdb_txn_reset(MDB_txn *txn);
void __wrap_mdb_txn_reset(MDB_txn *txn);

/* The linker puts these two between the tier and LMDB. */
int __wrap_mdb_get(MDB_txn *txn, MDB_dbi dbi, MDB_val *key, MDB_val *data)
{
    if (n_lookups++ == 0 && gated != NULL)
        atomic_store(&gated->gate, true);
    return __real_mdb_get(txn, dbi, key, data);
}

void __wrap_mdb_txn_reset(MDB_txn *txn)
{
    if (gated != NULL)
        atomic_store(&gated->gate, false);
    __real_mdb_txn_reset(txn);
}

/* Warm: how many transactions a read of the value takes. */
static uint32_t lookups_of(tier_under_test *t, uint32_t i, kvs_slot slot)
{
    kvs_value_key key = shape_key(i);

    n_lookups = 0;
    assert_value(t, &key, 1, shapes[i], slot);
    gated = NULL;
    return n_lookups;
}

static void test_map_reads_let_go(void **state)
{
    tier_under_test *t = *state;
    kvs_slot slots[N_SHAPES];

    put_shapes(t, slots);
    assert_int_equal(lookups_of(t, 0, slots[0]), 1);
    gated = &t->tier->classes[slots[0].a].env; /* the writer wants the map for itself */
    assert_int_equal(lookups_of(t, 0, slots[0]), 2);
    tut_close(t);
    t->opts.reader_ns = 1; /* every transaction is too old at once, and goes on nevertheless */
    assert_int_equal(tut_open(t), KVC_OK);
    assert_int_equal(t->ops->recover(t->tier, note_slot, slots), KVC_OK);
    assert_int_equal(lookups_of(t, 0, slots[0]), 4096 * 200 / 65536 + 1);
    assert_int_equal(lookups_of(t, 5, slots[5]), 1);
}

#ifdef KVSI_WITH_URING
#include <liburing.h>

static atomic_bool held, waiting; /* completions are held back; a read waits for one */

int __real_io_uring_submit_and_wait_timeout(struct io_uring *ring, struct io_uring_cqe **cqe_p,
                                            unsigned n, struct __kernel_timespec *ts,
                                            sigset_t *mask);
int __wrap_io_uring_submit_and_wait_timeout(struct io_uring *ring, struct io_uring_cqe **cqe_p,
                                            unsigned n, struct __kernel_timespec *ts,
                                            sigset_t *mask);

/* The linker puts this between the tier and liburing: a disk that takes its time. */
int __wrap_io_uring_submit_and_wait_timeout(struct io_uring *ring, struct io_uring_cqe **cqe_p,
                                            unsigned n, struct __kernel_timespec *ts,
                                            sigset_t *mask)
{
    if (!atomic_load(&held))
        return __real_io_uring_submit_and_wait_timeout(ring, cqe_p, n, ts, mask);
    atomic_store(&waiting, true);
    usleep(1000);
    return -ETIME;
}

int __real_io_uring_submit(struct io_uring *ring);
int __wrap_io_uring_submit(struct io_uring *ring);

int __wrap_io_uring_submit(struct io_uring *ring)
{
    return atomic_load(&held) ? 0 : __real_io_uring_submit(ring);
}

static bool old_kernel;

int __real_io_uring_queue_init(unsigned depth, struct io_uring *ring, unsigned flags);
int __wrap_io_uring_queue_init(unsigned depth, struct io_uring *ring, unsigned flags);

int __wrap_io_uring_queue_init(unsigned depth, struct io_uring *ring, unsigned flags)
{
    int rc = __real_io_uring_queue_init(depth, ring, flags);
    if (rc == 0 && old_kernel)
        ring->features &= ~(unsigned)IORING_FEAT_EXT_ARG;
    return rc;
}

/* Where waits with a timeout are not what they are taken for, cold rows come through the map. */
static void test_old_kernel(void **state)
{
    tier_under_test *t = *state;
    kvs_slot slots[N_SHAPES];
    uint64_t seed = 9, direct = kvc_metric_get(KVC_M_lmdb_direct_bytes);

    old_kernel = true;
    put_shapes(t, slots);
    make_cold(t, slots);
    old_kernel = false;
    assert_null(t->tier->lanes);
    for (uint32_t i = 0; i < N_SHAPES; i++)
        assert_int_equal(read_some(t, i, slots[i], 64, 2, &seed), KVC_OK);
    assert_int_equal(kvc_metric_get(KVC_M_lmdb_direct_bytes), direct);
}

typedef struct slow_read {
    tier_under_test *t;
    uint32_t shape;
    const kvs_slot *slots;
    run *all; /* many values of all shapes; NULL: one of shape */
    kvc_status status;
    atomic_bool done;
} slow_read;

static void *read_slowly(void *arg)
{
    slow_read *r = arg;
    uint64_t seed = 5;

    if (r->all != NULL)
        run_each(r->t, r->all, r->slots, EACH_READS, seed);
    else
        r->status = read_some(r->t, r->shape, r->slots[r->shape], 64, 1, &seed);
    atomic_store(&r->done, true);
    return NULL;
}

static void start_slow(slow_read *r, pthread_t *thread)
{
    atomic_store(&waiting, false);
    atomic_store(&held, true);
    assert_int_equal(pthread_create(thread, NULL, read_slowly, r), 0);
    while (!atomic_load(&waiting) && !atomic_load(&r->done))
        usleep(100);
    assert_false(atomic_load(&r->done));
}

/* The writer needs the map for itself (it grows) while a read waits for the disk. */
static void growth(tier_under_test *t, run *all)
{
    kvs_slot slots[N_SHAPES];
    pthread_t thread;

    put_shapes(t, slots);
    make_cold(t, slots);
    slow_read r = {.t = t, .shape = 0, .slots = slots, .all = all};
    start_slow(&r, &thread);
    uint64_t before = medium_bytes(t);
    for (uint32_t i = 0; i < 12; i++) {
        kvs_value_key key = key_of(2, i, 0);
        assert_int_equal(put_value(t, &key, 1, shapes[0], true).status, KVC_OK);
    }
    assert_true(medium_bytes(t) > before);
    assert_false(atomic_load(&r.done)); /* all that while the read was waiting */
    atomic_store(&held, false);
    pthread_join(thread, NULL);
    assert_int_equal(r.status, KVC_OK);
}

static void test_growth_during_a_slow_read(void **state)
{
    growth(*state, NULL);
}

static void test_growth_during_slow_reads(void **state)
{
    run *all = calloc(1, sizeof(*all));
    all->only = N_SHAPES;
    growth(*state, all);
    check_run(all, N_SHAPES);
    free(all);
}

/* An old read transaction is let go: pages that are freed can be used again, by and by. */
static void reader_ns(tier_under_test *t, run *all)
{
    kvs_slot slots[N_SHAPES];
    pthread_t thread;

    t->opts.capacity_bytes = 16u << 20;
    t->opts.reader_ns = 5000000;
    put_shapes(t, slots);
    make_cold(t, slots);
    slow_read r = {.t = t, .shape = 1, .slots = slots, .all = all};
    start_slow(&r, &thread);
    usleep(20000);
    for (uint32_t i = 0; i < 200; i++) { /* far more than the cap, one after the other */
        kvs_value_key key = key_of(2, i, 0);
        put_result put = put_value(t, &key, 1, shapes[1], i % 8 == 0);
        assert_int_equal(put.status, KVC_OK);
        t->ops->release(t->tier, &key, put.slot);
    }
    assert_false(atomic_load(&r.done));
    atomic_store(&held, false);
    pthread_join(thread, NULL);
    assert_int_equal(r.status, KVC_OK);
}

static void test_reader_ns(void **state)
{
    reader_ns(*state, NULL);
}

static void test_reader_ns_of_many(void **state)
{
    run *all = calloc(1, sizeof(*all));
    all->only = N_SHAPES;
    reader_ns(*state, all);
    check_run(all, N_SHAPES);
    free(all);
}

/* Against the contract, a value goes away under its reader: it is gone, not damaged or wrong. */
static void test_value_goes_away_during_a_slow_read(void **state)
{
    tier_under_test *t = *state;
    kvs_slot slots[N_SHAPES];
    pthread_t thread;
    uint64_t corrupt = 0;

    t->opts.capacity_bytes = 16u << 20;
    t->opts.reader_ns = 1;
    put_shapes(t, slots);
    make_cold(t, slots);
    slow_read r = {.t = t, .shape = 1, .slots = slots};
    kvs_value_key gone = shape_key(1);
    start_slow(&r, &thread);
    usleep(10000);
    t->ops->release(t->tier, &gone, slots[1]);
    for (uint32_t i = 0; i < 60; i++) {
        kvs_value_key key = key_of(2, i, 0);
        put_result put = put_value(t, &key, 1, shapes[1], false);
        corrupt += put.status != KVC_OK;
    }
    atomic_store(&held, false);
    pthread_join(thread, NULL);
    assert_true(corrupt < 30);
    assert_int_equal(r.status, KVC_NOT_FOUND);
}
#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_cold_rows_are_right, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_warm_then_cold, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_each_is_right, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_each_sees_damage, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_map_reads_let_go, setup, tut_delete),
#ifdef KVSI_WITH_URING
        cmocka_unit_test_setup_teardown(test_old_kernel, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_growth_during_a_slow_read, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_growth_during_slow_reads, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_reader_ns, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_reader_ns_of_many, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_value_goes_away_during_a_slow_read, setup, tut_delete),
#endif
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
