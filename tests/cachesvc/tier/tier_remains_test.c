/*
 * tier_remains_test.c: the file of a size class that went is freed in pieces, and the writer works
 * between two. The program stands between the tier and the system, and keeps the first cut waiting.
 */
#include "tier_support.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/sum.h"

#define CAPACITY  (12u << 20)
#define CUT_BYTES (64u << 10)
#define VALUES    256u /* a third of the capacity */

static const shape rows_shape = {4096, 3};
static pthread_mutex_t books = PTHREAD_MUTEX_INITIALIZER;

/* Cuts of files that have no name any more: the first waits until it is let go. */
static pthread_cond_t let_go = PTHREAD_COND_INITIALIZER, landed = PTHREAD_COND_INITIALIZER;
static uint32_t n_landed, n_cuts, landed_at_second;
static bool keep_cut;
static off_t longest_cut;

int __real_ftruncate(int fd, off_t len);
int __wrap_ftruncate(int fd, off_t len);

int __wrap_ftruncate(int fd, off_t len)
{
    struct stat st;

    if (fstat(fd, &st) == 0 && st.st_nlink == 0 && len < st.st_size) {
        pthread_mutex_lock(&books);
        if (st.st_size - len > longest_cut)
            longest_cut = st.st_size - len;
        if (++n_cuts == 2)
            landed_at_second = n_landed;
        pthread_cond_broadcast(&let_go);
        while (n_cuts == 1 && keep_cut)
            pthread_cond_wait(&let_go, &books);
        pthread_mutex_unlock(&books);
    }
    return __real_ftruncate(fd, len);
}

static void land(kvs_tier_write *write)
{
    (void)write;
    pthread_mutex_lock(&books);
    n_landed++;
    pthread_cond_signal(&landed);
    pthread_mutex_unlock(&books);
}

static bool is_there(const tier_under_test *t)
{
    char path[128];

    snprintf(path, sizeof(path), "%s/class-4", t->dir);
    return access(path, F_OK) == 0;
}

/* A write under way when the first piece is cut is done before the second is. */
static void write_between_cuts(tier_under_test *t)
{
    static uint8_t rows[4096 * 3];
    uint32_t sums[3];
    kvs_tier_write write = {.key = key_of(2, 0, 0),
                            .row_bytes = rows_shape.row_bytes,
                            .n_rows = rows_shape.n_rows,
                            .rows = rows,
                            .row_sums = sums,
                            .done = land};

    kvc_row_sums(rows, rows_shape.row_bytes, rows_shape.n_rows, sums);
    pthread_mutex_lock(&books);
    while (n_cuts == 0)
        pthread_cond_wait(&let_go, &books);
    pthread_mutex_unlock(&books);
    assert_false(is_there(t)); /* a crash leaves nothing of it */
    assert_int_equal(t->ops->write(t->tier, &write), KVC_OK);
    pthread_mutex_lock(&books);
    keep_cut = false;
    pthread_cond_broadcast(&let_go);
    while (n_landed == 0)
        pthread_cond_wait(&landed, &books);
    while (n_cuts < 2)
        pthread_cond_wait(&let_go, &books);
    pthread_mutex_unlock(&books);
    assert_int_equal(landed_at_second, 1);
    assert_int_equal(write.status, KVC_OK);
}

static void test_file_goes_in_pieces(void **state)
{
    tier_under_test *t = *state;
    static kvs_slot slots[VALUES];
    uint32_t n = 0;

    assert_int_equal(tut_open(t), KVC_OK);
    for (uint32_t i = 0; i < VALUES; i++) {
        kvs_value_key key = key_of(1, i, 0);
        put_result r = put_value(t, &key, 1, rows_shape, false);
        assert_int_equal(r.status, KVC_OK);
        slots[i] = r.slot;
    }
    for (uint32_t i = 0; i < VALUES; i++) {
        kvs_value_key key = key_of(1, i, 0);
        t->ops->release(t->tier, &key, slots[i]);
    }
    write_between_cuts(t);
    for (kvc_status status = KVC_OK; status == KVC_OK; n += status == KVC_OK) {
        kvs_value_key key = key_of(3, n, 0);
        status = put_value(t, &key, 1, rows_shape, false).status;
    }
    /* The whole budget is there again. */
    assert_true(n * 4ull * 4096 > CAPACITY / 4 * 3);
    assert_true(n_cuts > 16);
    assert_true(longest_cut <= CUT_BYTES);
}

static int setup(void **state)
{
    tier_under_test *t = malloc(sizeof(*t));

    keep_cut = true;
    tut_init(t, kvs_tier_find("lmdb"), NULL);
    t->opts.capacity_bytes = CAPACITY;
    t->opts.cut_bytes = CUT_BYTES;
    *state = t;
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_file_goes_in_pieces, setup, tut_delete),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
