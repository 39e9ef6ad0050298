/*
 * tier_conformance.c: what every tier must do, run over each registered one (and each of them
 * wrapped by the fault tier, without faults). A new tier is covered with no new line here.
 */
#include "tier_support.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Odd and even shapes in at most eight size classes, as a persistent tier may ask for. */
static const shape shapes[] = {
    {1, 1}, {100, 64}, {4099, 7}, {128, 1024}, {1000, 64}, {4096, 256}, {65536, 16}, {4096, 64},
};
#define N_SHAPES (sizeof(shapes) / sizeof(shapes[0]))

static int setup(void **state)
{
    tier_under_test *t = malloc(sizeof(*t));
    const kvs_tier_ops *ops = *state;

    tut_init(t, ops, NULL);
    *state = t;
    return t->opts.path == NULL && tut_open(t) == KVC_OK ? 0 : -1;
}

static void settle(tier_under_test *t)
{
    if (t->ops->sync != NULL)
        assert_int_equal(t->ops->sync(t->tier, NULL, 0, NULL), KVC_OK);
}

static void test_round_trip(void **state)
{
    tier_under_test *t = *state;
    kvs_slot slots[N_SHAPES][3];

    for (uint32_t i = 0; i < N_SHAPES; i++) {
        for (uint32_t j = 0; j < 3; j++) {
            kvs_value_key key = key_of(j % 2, i, j);
            put_result r = put_value(t, &key, 1, shapes[i], j == 0);
            assert_int_equal(r.status, KVC_OK);
            slots[i][j] = r.slot;
        }
    }
    assert_int_equal(value_count(t), 3 * N_SHAPES);
    for (uint32_t i = 0; i < N_SHAPES; i++) {
        for (uint32_t j = 0; j < 3; j++) {
            kvs_value_key key = key_of(j % 2, i, j);
            assert_value(t, &key, 1, shapes[i], slots[i][j]);
        }
    }
}

static void test_row_ranges(void **state)
{
    tier_under_test *t = *state;
    uint64_t seed = 7;

    for (uint32_t i = 0; i < N_SHAPES; i++) {
        shape s = shapes[i];
        kvs_value_key key = key_of(1, i, 9);
        put_result r = put_value(t, &key, 1, s, false);
        bool equal;
        assert_int_equal(r.status, KVC_OK);
        for (uint32_t k = 0; k < 40; k++) {
            uint32_t first = (uint32_t)(rng_next(&seed) % s.n_rows);
            uint32_t n = (uint32_t)(rng_next(&seed) % (s.n_rows - first)) + 1;
            assert_int_equal(check_rows(t, &key, 1, s, r.slot, first, n, &equal), KVC_OK);
            assert_true(equal);
        }
        assert_int_equal(check_rows(t, &key, 1, s, r.slot, s.n_rows - 1, 1, &equal), KVC_OK);
        assert_true(equal);
    }
}

static void test_many_ranges_in_one_read(void **state)
{
    tier_under_test *t = *state;
    shape s = {512, 256};
    kvs_value_key key = key_of(1, 5, 0);
    kvs_row_range ranges[64];
    uint8_t *want = malloc(512 * 256), *got = malloc(512 * 256);

    if (t->ops->read == NULL)
        goto out;
    put_result r = put_value(t, &key, 1, s, false);
    assert_int_equal(r.status, KVC_OK);
    fill_rows(&key, 1, s, want);
    for (uint32_t i = 0; i < 64; i++)
        ranges[i] = (kvs_row_range){(i * 37) % 253, 1 + i % 3, got + i * 3 * 512};
    assert_int_equal(t->ops->read(t->tier, &key, r.slot, 512, 256, ranges, 64), KVC_OK);
    for (uint32_t i = 0; i < 64; i++)
        assert_memory_equal(ranges[i].dst, want + ranges[i].first * 512, ranges[i].n * 512);

    /* A range that leaves the value, and shapes that are not the value's, are refused. */
    kvs_row_range bad = {255, 2, got};
    assert_int_equal(t->ops->read(t->tier, &key, r.slot, 512, 256, &bad, 1), KVC_INVALID);
    bad = (kvs_row_range){UINT32_MAX, 2, got};
    assert_int_equal(t->ops->read(t->tier, &key, r.slot, 512, 256, &bad, 1), KVC_INVALID);
out:
    free(want);
    free(got);
}

static void test_bad_shapes_are_refused(void **state)
{
    tier_under_test *t = *state;
    static const shape bad[] = {
        {0, 5}, {5, 0}, {1u << 20, 2}, {65536, 65536}, {1u << 31, 1u << 31}};
    uint32_t sums[1] = {0};

    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        kvs_value_key key = key_of(1, i, 0);
        kvs_slot slot;
        void *addr;
        if (t->ops->reserve != NULL) {
            if (bad[i].row_bytes == 1u << 20)
                continue; /* a segment may be longer than the longest value */
            assert_int_equal(
                t->ops->reserve(t->tier, &key, bad[i].row_bytes, bad[i].n_rows, 1, &slot, &addr),
                KVC_INVALID);
        } else {
            kvs_tier_write w = {.key = key,
                                .row_bytes = bad[i].row_bytes,
                                .n_rows = bad[i].n_rows,
                                .rows = sums,
                                .row_sums = sums};
            assert_int_equal(t->ops->write(t->tier, &w), KVC_INVALID);
        }
    }
    assert_int_equal(value_count(t), 0);
}

/* Fills the tier, checks its cap by the medium, frees a third, fills again; nothing is lost. */
static void test_full_then_room(void **state)
{
    tier_under_test *t = *state;
    shape s = {4096, 64};
    enum { MAX = 512 };
    kvs_slot slots[MAX];
    bool here[MAX] = {false};
    uint32_t n = 0, refills = 0;
    put_result r = {.status = KVC_OK};

    for (; n < MAX; n++) {
        kvs_value_key key = key_of(1, n, 0);
        r = put_value(t, &key, 1, s, false);
        if (r.status != KVC_OK)
            break;
        slots[n] = r.slot;
        here[n] = true;
        assert_true(used_bytes(t) <= t->opts.capacity_bytes);
        if (n % 32 == 0)
            assert_true(medium_bytes(t) <= t->opts.capacity_bytes);
    }
    assert_int_equal(r.status, KVC_AGAIN);
    /* At least 85 % of the cap holds payload. */
    assert_true(n * 262144ull * 100 >= t->opts.capacity_bytes * 85);
    assert_true(medium_bytes(t) <= t->opts.capacity_bytes);

    for (uint32_t round = 0; round < 6; round++) {
        uint32_t freed = 0;
        for (uint32_t i = round % 3; i < n; i += 3) {
            kvs_value_key key = key_of(1, i, 0);
            if (here[i])
                t->ops->release(t->tier, &key, slots[i]);
            freed += here[i];
            here[i] = false;
        }
        settle(t);
        refills = 0;
        for (uint32_t i = round % 3; i < n; i += 3) {
            kvs_value_key key = key_of(1, i, 0);
            r = put_value(t, &key, round + 2, s, i % 5 == 0);
            if (r.status != KVC_OK)
                break;
            assert_value(t, &key, round + 2, s, r.slot);
            slots[i] = r.slot;
            here[i] = true;
            refills++;
        }
        assert_true(refills * 10 >= freed * 9);
        assert_true(medium_bytes(t) <= t->opts.capacity_bytes);
        assert_true(used_bytes(t) <= t->opts.capacity_bytes);
    }
    uint32_t left = 0;
    for (uint32_t i = 0; i < n; i++)
        left += here[i];
    assert_int_equal(value_count(t), left);
}

/* A tier that is full to its cap, of several classes, opens again and is as it was. */
static void test_full_opens_again(void **state)
{
    tier_under_test *t = *state;
    static const shape some[] = {{4096, 64}, {4096, 16}, {4096, 2}};
    uint32_t n_full = 0, n = 0;

    if (!(t->ops->caps & KVS_TIER_PERSISTENT))
        return;
    /* A class after the other, so that the last ones get what is left of the budget. */
    for (uint32_t i = 0; i < 3; i++) {
        for (put_result r = {.status = KVC_OK}; r.status == KVC_OK; n++) {
            kvs_value_key key = key_of(1, n, i);
            r = put_value(t, &key, 1, some[i], false);
            n_full += r.status == KVC_OK;
        }
    }
    settle(t);
    assert_int_equal(value_count(t), n_full);
    for (uint32_t round = 0; round < 3; round++) {
        uint64_t used = used_bytes(t);
        tut_close(t);
        assert_true(medium_bytes(t) <= t->opts.capacity_bytes);
        assert_int_equal(tut_open(t), KVC_OK);
        assert_int_equal(value_count(t), n_full);
        assert_int_equal(used_bytes(t), used);
    }
}

typedef struct mix {
    tier_under_test *t;
    uint32_t who;
    atomic_int *wrong;
    uint32_t puts, agains;
} mix;

static void *mix_thread(void *arg)
{
    static const shape mix_shapes[] = {{4096, 16}, {100, 64}, {1024, 33}};
    mix *m = arg;
    uint64_t seed = 100 + m->who;
    struct {
        kvs_slot slot;
        uint32_t version;
        bool here;
    } mine[24] = {0};

    for (uint32_t step = 1; step <= 150; step++) {
        uint32_t i = (uint32_t)(rng_next(&seed) % 24);
        kvs_value_key key = key_of(m->who % 2, m->who * 1000 + i, 3);
        shape s = mix_shapes[i % 3];
        bool equal = true;
        if (mine[i].here) {
            uint32_t first = (uint32_t)(rng_next(&seed) % s.n_rows);
            kvc_status status =
                check_rows(m->t, &key, mine[i].version, s, mine[i].slot, first, 1, &equal);
            if (status != KVC_OK || !equal)
                atomic_fetch_add(m->wrong, 1);
            if (rng_next(&seed) % 3 == 0) {
                m->t->ops->release(m->t->tier, &key, mine[i].slot);
                mine[i].here = false;
            }
        } else {
            put_result r = put_value(m->t, &key, step, s, step % 7 == 0);
            if (r.status == KVC_OK) {
                mine[i].slot = r.slot;
                mine[i].version = step;
                mine[i].here = true;
                m->puts++;
            } else if (r.status == KVC_AGAIN) {
                m->agains++;
            } else {
                atomic_fetch_add(m->wrong, 1);
            }
        }
    }
    for (uint32_t i = 0; i < 24; i++) {
        kvs_value_key key = key_of(m->who % 2, m->who * 1000 + i, 3);
        if (mine[i].here)
            m->t->ops->release(m->t->tier, &key, mine[i].slot);
    }
    return NULL;
}

static void test_concurrent(void **state)
{
    tier_under_test *t = *state;
    enum { N = 6 };
    pthread_t threads[N];
    mix mixes[N];
    atomic_int wrong = 0;

    for (uint32_t i = 0; i < N; i++) {
        mixes[i] = (mix){.t = t, .who = i, .wrong = &wrong};
        assert_int_equal(pthread_create(&threads[i], NULL, mix_thread, &mixes[i]), 0);
    }
    for (uint32_t i = 0; i < N; i++)
        pthread_join(threads[i], NULL);
    assert_int_equal(wrong, 0);
    for (uint32_t i = 0; i < N; i++)
        assert_true(mixes[i].puts > 10);
    settle(t);
    assert_int_equal(value_count(t), 0);
    assert_true(medium_bytes(t) <= t->opts.capacity_bytes);
}

typedef struct watch {
    tier_under_test *t;
    kvs_slot slots[4];
    atomic_int *stop, *wrong;
    atomic_uint reads;
} watch;

static void *watch_thread(void *arg)
{
    watch *w = arg;

    for (uint32_t i = 0; !atomic_load(w->stop); i++) {
        kvs_value_key key = key_of(1, i % 4, 7);
        bool equal;
        if (check_rows(w->t, &key, 1, (shape){4096, 64}, w->slots[i % 4], 0, 64, &equal) !=
                KVC_OK ||
            !equal)
            atomic_fetch_add(w->wrong, 1);
        atomic_fetch_add(&w->reads, 1);
        usleep(100); /* the writer wants a turn too */
    }
    return NULL;
}

/* Values stay readable and right while the tier grows under the readers to its cap. */
static void test_reads_while_it_fills(void **state)
{
    tier_under_test *t = *state;
    enum { N = 3 };
    pthread_t threads[N];
    watch watches[N];
    atomic_int stop = 0, wrong = 0;
    kvs_slot slots[4];
    put_result r = {.status = KVC_OK};

    for (uint32_t i = 0; i < 4; i++) {
        kvs_value_key key = key_of(1, i, 7);
        r = put_value(t, &key, 1, (shape){4096, 64}, true);
        assert_int_equal(r.status, KVC_OK);
        slots[i] = r.slot;
    }
    for (uint32_t i = 0; i < N; i++) {
        watches[i] = (watch){.t = t, .stop = &stop, .wrong = &wrong};
        memcpy(watches[i].slots, slots, sizeof(slots));
        assert_int_equal(pthread_create(&threads[i], NULL, watch_thread, &watches[i]), 0);
    }
    for (uint32_t i = 4; r.status == KVC_OK; i++) {
        kvs_value_key key = key_of(1, i, 7);
        r = put_value(t, &key, 1, (shape){4096, 64}, false);
    }
    /* A tier that fills fast may be full before each of them had a turn. */
    for (uint32_t i = 0; i < N; i++)
        while (atomic_load(&watches[i].reads) == 0)
            usleep(1000);
    atomic_store(&stop, 1);
    for (uint32_t i = 0; i < N; i++)
        pthread_join(threads[i], NULL);
    assert_int_equal(r.status, KVC_AGAIN);
    assert_int_equal(wrong, 0);
}

/* --- persistence --- */

typedef struct found_set {
    uint32_t n, wrong;
    kvs_slot slots[N_SHAPES][4];
    bool seen[N_SHAPES][4];
} found_set;

static bool note_found(void *arg, const kvs_value_key *key, kvs_slot slot, uint32_t row_bytes,
                       uint32_t n_rows)
{
    found_set *set = arg;

    set->n++;
    for (uint32_t i = 0; i < N_SHAPES; i++) {
        for (uint32_t j = 0; j < 4; j++) {
            kvs_value_key want = key_of(2, i, j);
            if (memcmp(&want.block, &key->block, 32) != 0 || want.part != key->part)
                continue;
            if (memcmp(&want.tenant, &key->tenant, 32) != 0 ||
                memcmp(&want.schema, &key->schema, 32) != 0 || set->seen[i][j] ||
                shapes[i].row_bytes != row_bytes || shapes[i].n_rows != n_rows)
                set->wrong++;
            set->seen[i][j] = true;
            set->slots[i][j] = slot;
            return true;
        }
    }
    set->wrong++;
    return true;
}

static bool stop_at_once(void *arg, const kvs_value_key *key, kvs_slot slot, uint32_t row_bytes,
                         uint32_t n_rows)
{
    (void)key;
    (void)slot;
    (void)row_bytes;
    (void)n_rows;
    ++*(uint32_t *)arg;
    return false;
}

static void test_recover_lists_what_was_committed(void **state)
{
    tier_under_test *t = *state;
    found_set set = {0};
    uint32_t calls = 0;

    if (!(t->ops->caps & KVS_TIER_PERSISTENT))
        return;
    assert_int_equal(t->ops->recover(t->tier, note_found, &set), KVC_OK);
    assert_int_equal(set.n, 0);
    for (uint32_t i = 0; i < N_SHAPES; i++) {
        for (uint32_t j = 0; j < 4; j++) {
            kvs_value_key key = key_of(2, i, j);
            put_result r = put_value(t, &key, 1, shapes[i], true);
            assert_int_equal(r.status, KVC_OK);
            if (j == 3) /* released: must not come back */
                t->ops->release(t->tier, &key, r.slot);
        }
    }
    uint64_t used = 0;
    for (uint32_t round = 0; round < 2; round++) {
        settle(t);
        used = used_bytes(t);
        tut_close(t);
        assert_int_equal(tut_open(t), KVC_OK);
        memset(&set, 0, sizeof(set));
        assert_int_equal(t->ops->recover(t->tier, note_found, &set), KVC_OK);
        assert_int_equal(set.wrong, 0);
        assert_int_equal(set.n, 3 * N_SHAPES);
        assert_int_equal(value_count(t), 3 * N_SHAPES);
        assert_int_equal(used_bytes(t), used);
    }
    for (uint32_t i = 0; i < N_SHAPES; i++) {
        for (uint32_t j = 0; j < 3; j++) {
            kvs_value_key key = key_of(2, i, j);
            assert_true(set.seen[i][j]);
            assert_value(t, &key, 1, shapes[i], set.slots[i][j]);
        }
    }
    assert_int_equal(t->ops->recover(t->tier, stop_at_once, &calls), KVC_OK);
    assert_int_equal(calls, 1);
}

typedef struct meta_seen {
    uint32_t n, wrong;
} meta_seen;

static bool note_meta(void *arg, const char *name, const void *data, size_t len_bytes)
{
    meta_seen *seen = arg;
    uint32_t i = 0;
    const uint8_t *bytes = data;

    seen->n++;
    if (sscanf(name, "schema/%u", &i) != 1 || i >= 5 || len_bytes != i * 70000u + 1)
        seen->wrong++;
    for (size_t k = 0; seen->wrong == 0 && k < len_bytes; k++)
        seen->wrong += bytes[k] != (uint8_t)(k * 31 + i);
    return true;
}

/* Records by name and by prefix: those of schema/, and two that sort on either side of them. */
static void test_meta_by_name(void **state)
{
    tier_under_test *t = *state;
    meta_seen seen = {0};
    void *data;
    size_t len_bytes;

    if (!(t->ops->caps & KVS_TIER_PERSISTENT))
        return;
    assert_int_equal(t->ops->meta_get(t->tier, "schema/0", &data, &len_bytes), KVC_NOT_FOUND);
    assert_null(data);
    assert_int_equal(t->ops->meta_put(t->tier, "schema", "12", 2), KVC_OK);
    assert_int_equal(t->ops->meta_put(t->tier, "schema/0", "\0", 1), KVC_OK);
    assert_int_equal(t->ops->meta_put(t->tier, "schemb", "345", 3), KVC_OK);
    assert_int_equal(t->ops->meta_each(t->tier, "schema/", note_meta, &seen), KVC_OK);
    assert_int_equal(seen.n, 1);
    assert_int_equal(seen.wrong, 0);
    assert_int_equal(t->ops->meta_each(t->tier, "schema/0", note_meta, &seen), KVC_OK);
    assert_int_equal(t->ops->meta_each(t->tier, "x", note_meta, &seen), KVC_OK);
    assert_int_equal(seen.n, 1);
    tut_close(t);
    assert_int_equal(tut_open(t), KVC_OK);
    assert_int_equal(t->ops->meta_get(t->tier, "schemb", &data, &len_bytes), KVC_OK);
    assert_int_equal(len_bytes, 3);
    assert_memory_equal(data, "345", 3);
    free(data);
    assert_int_equal(t->ops->meta_get(t->tier, "schem", &data, &len_bytes), KVC_NOT_FOUND);
    assert_int_equal(t->ops->meta_get(t->tier, "", &data, &len_bytes), KVC_INVALID);
    assert_int_equal(t->ops->meta_put(t->tier, "schemb", NULL, 0), KVC_OK);
    assert_int_equal(t->ops->meta_get(t->tier, "schemb", &data, &len_bytes), KVC_NOT_FOUND);
}

static void test_meta(void **state)
{
    tier_under_test *t = *state;
    static uint8_t data[5 * 70000];
    char name[600];
    meta_seen seen = {0};

    if (!(t->ops->caps & KVS_TIER_PERSISTENT))
        return;
    for (uint32_t round = 0; round < 2; round++) {
        for (uint32_t i = 0; i < 5; i++) {
            for (size_t k = 0; k < sizeof(data); k++)
                data[k] = (uint8_t)(k * 31 + i);
            snprintf(name, sizeof(name), "schema/%u", i);
            assert_int_equal(t->ops->meta_put(t->tier, name, data, i * 70000u + 1), KVC_OK);
        }
    }
    memset(name, 'x', sizeof(name) - 1);
    name[sizeof(name) - 1] = '\0';
    assert_int_equal(t->ops->meta_put(t->tier, name, data, 5), KVC_INVALID);
    assert_int_equal(t->ops->meta_put(t->tier, "", data, 5), KVC_INVALID);
    assert_int_equal(t->ops->meta_put(t->tier, "gone", data, 5), KVC_OK);
    assert_int_equal(t->ops->meta_put(t->tier, "gone", NULL, 0), KVC_OK);
    assert_int_equal(t->ops->meta_put(t->tier, "never there", NULL, 0), KVC_OK);
    for (uint32_t round = 0; round < 2; round++) {
        seen = (meta_seen){0};
        assert_int_equal(t->ops->meta_each(t->tier, "", note_meta, &seen), KVC_OK);
        assert_int_equal(seen.n, 5);
        assert_int_equal(seen.wrong, 0);
        tut_close(t);
        assert_int_equal(tut_open(t), KVC_OK);
    }
    assert_true(medium_bytes(t) <= t->opts.capacity_bytes);
}

static int run_over(const kvs_tier_ops *ops)
{
    char group[64];
    void *initial = (void *)(uintptr_t)ops;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate_setup_teardown(test_round_trip, setup, tut_delete, initial),
        cmocka_unit_test_prestate_setup_teardown(test_row_ranges, setup, tut_delete, initial),
        cmocka_unit_test_prestate_setup_teardown(test_many_ranges_in_one_read, setup, tut_delete,
                                                 initial),
        cmocka_unit_test_prestate_setup_teardown(test_bad_shapes_are_refused, setup, tut_delete,
                                                 initial),
        cmocka_unit_test_prestate_setup_teardown(test_full_then_room, setup, tut_delete, initial),
        cmocka_unit_test_prestate_setup_teardown(test_full_opens_again, setup, tut_delete, initial),
        cmocka_unit_test_prestate_setup_teardown(test_concurrent, setup, tut_delete, initial),
        cmocka_unit_test_prestate_setup_teardown(test_reads_while_it_fills, setup, tut_delete,
                                                 initial),
        cmocka_unit_test_prestate_setup_teardown(test_recover_lists_what_was_committed, setup,
                                                 tut_delete, initial),
        cmocka_unit_test_prestate_setup_teardown(test_meta, setup, tut_delete, initial),
        cmocka_unit_test_prestate_setup_teardown(test_meta_by_name, setup, tut_delete, initial),
    };

    snprintf(group, sizeof(group), "tier %s", ops->name);
    return cmocka_run_group_tests_name(group, tests, NULL, NULL);
}

int main(void)
{
    const kvs_tier_ops *ops;
    int failed = 0;

    for (uint32_t i = 0; (ops = kvs_tier_at(i)) != NULL; i++)
        failed += run_over(ops);
    return failed;
}
