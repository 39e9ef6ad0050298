/*
 * put_batch_test.c: PutBlocks of many values: what a batch does to each of them is what one by one
 * would have done, whoever else puts the same values meanwhile. Over shm, whose server has several
 * threads.
 */
#include "harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/fault.h"
#include "base/thread.h"

#define ROW         64u
#define VALUE_BYTES (H_TOKENS * ROW)
#define MANY        150u /* more than the server claims at once */

enum { THREADS = 4, ROUNDS = 12 };

typedef struct fixture {
    h_server h;
    h_peer *peer;
    h_schema schema;
    char dir[256], socket_dir[256];
} fixture;

static void open_server(fixture *f)
{
    h_server_start(&f->h);
    f->peer = h_connect(kvs_server_uri(f->h.server, 0), "default");
    assert_int_equal(h_register(f->peer, &f->schema), KVC_OK);
}

static void close_server(fixture *f)
{
    h_disconnect(f->peer);
    h_server_stop(&f->h, false);
}

static int setup(void **state)
{
    fixture *f = calloc(1, sizeof(*f));
    h_server_init(&f->h);
    h_temp_dir(f->dir);
    h_temp_dir(f->socket_dir);
    snprintf(f->h.listen, sizeof(f->h.listen), "shm://%s/socket", f->socket_dir);
    f->h.settings.transport_threads = THREADS;
    f->h.settings.dram_bytes = 8u << 20;
    h_schema_init(&f->schema, "model", 3, ROW, true);
    f->schema.parts[2].row_bytes = 3 * ROW;
    assert_int_equal(kvc_schema_digest(&f->schema.schema, &f->schema.digest), KVC_OK);
    open_server(f);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;
    assert_int_equal(kvc_fault_arm(NULL), KVC_OK);
    close_server(f);
    h_server_fini(&f->h);
    h_remove_dir(f->dir);
    h_remove_dir(f->socket_dir);
    free(f);
    return 0;
}

/* Part 0 of n blocks in one request. */
static void put_blocks(fixture *f, const uint64_t *blocks, uint32_t n, kvc_promise promise)
{
    const uint32_t parts[H_MAX_BATCH] = {0};
    assert_int_equal(h_put_each(f->peer, &f->schema, blocks, parts, n, promise), KVC_OK);
}

static void put_range(fixture *f, uint64_t first, uint32_t n, uint32_t step, kvc_promise promise)
{
    uint64_t blocks[H_MAX_BATCH];
    for (uint32_t i = 0; i < n; i++)
        blocks[i] = first + (uint64_t)i * step;
    put_blocks(f, blocks, n, promise);
}

static uint32_t count(const fixture *f, uint32_t n, kvc_status status)
{
    uint32_t found = 0;
    for (uint32_t i = 0; i < n; i++)
        found += f->peer->status[i] == status;
    return found;
}

/* The rows of n blocks, every one that is there bit-equal; returns how many blocks are. */
static uint32_t check_rows(fixture *f, uint64_t first, uint32_t n, uint32_t part)
{
    uint64_t context;
    uint32_t there = 0;
    assert_int_equal(h_open(f->peer, &f->schema, first, n, 0, &context), KVC_OK);
    for (uint32_t b = 0; b < n; b++) {
        const uint32_t picks[3] = {b * H_TOKENS, b * H_TOKENS + 7, (b + 1) * H_TOKENS - 1};
        const uint32_t rows[3] = {0, 7, H_TOKENS - 1};
        assert_int_equal(h_fetch(f->peer, context, part, picks, 3), KVC_OK);
        if (f->peer->n_missing == 3)
            continue;
        assert_int_equal(f->peer->n_missing, 0);
        there++;
        for (uint32_t i = 0; i < 3; i++)
            assert_true(h_row_is(first + b, part, rows[i], (uint32_t)(f->peer->data_bytes / 3),
                                 f->peer->data + i * (f->peer->data_bytes / 3)));
    }
    assert_int_equal(h_close(f->peer, context), KVC_OK);
    return there;
}

/* A value that stands in a request more than once is put once. */
static void test_twice_in_one(void **state)
{
    fixture *f = *state;
    const uint64_t blocks[] = {1, 2, 1, 3, 1, 2, 4};
    const int8_t status[] = {KVC_OK, KVC_OK, KVC_EXISTS, KVC_OK, KVC_EXISTS, KVC_EXISTS, KVC_OK};
    put_blocks(f, blocks, 7, KVC_PROMISE_MEMORY);
    assert_memory_equal(f->peer->status, status, sizeof(status));
    assert_int_equal(check_rows(f, 1, 4, 0), 4);
}

static void test_some_are_there(void **state)
{
    fixture *f = *state;
    put_range(f, 0, MANY / 2, 2, KVC_PROMISE_MEMORY);
    assert_int_equal(count(f, MANY / 2, KVC_OK), MANY / 2);
    put_range(f, 0, MANY, 1, KVC_PROMISE_MEMORY);
    for (uint32_t i = 0; i < MANY; i++)
        assert_int_equal(f->peer->status[i], i % 2 == 0 ? KVC_EXISTS : KVC_OK);
    assert_int_equal(check_rows(f, 0, MANY, 0), MANY);
}

/* Values of several shapes in turn, each where it belongs. */
static void test_mixed_shapes(void **state)
{
    fixture *f = *state;
    uint64_t blocks[MANY];
    uint32_t parts[MANY];
    for (uint32_t i = 0; i < MANY; i++) {
        blocks[i] = i / 3;
        parts[i] = i % 3 * 10;
    }
    assert_int_equal(h_put_each(f->peer, &f->schema, blocks, parts, MANY, KVC_PROMISE_MEMORY),
                     KVC_OK);
    assert_int_equal(count(f, MANY, KVC_OK), MANY);
    for (uint32_t part = 0; part < 3; part++)
        assert_int_equal(check_rows(f, 0, MANY / 3, part * 10), MANY / 3);
}

/* A request of more values than dram holds: the first give way to the last, as one by one. */
static void test_more_than_fits(void **state)
{
    fixture *f = *state;
    close_server(f);
    f->h.settings.dram_bytes = 40 * VALUE_BYTES;
    open_server(f);
    for (uint32_t round = 0; round < 4; round++) {
        put_range(f, round * MANY, MANY, 1, KVC_PROMISE_MEMORY);
        assert_int_equal(count(f, MANY, KVC_OK), MANY);
        h_check_caps(&f->h);
    }
    assert_int_equal(check_rows(f, 0, MANY, 0), 0);
    uint32_t there = check_rows(f, 3 * MANY, MANY, 0);
    assert_true(there >= 32 && there <= 40);
}

/* What was there as a request came, and gave way to its first values, is put again. */
static void test_gives_way_to_the_same(void **state)
{
    fixture *f = *state;
    uint64_t blocks[32];
    close_server(f);
    f->h.settings.dram_bytes = 40 * VALUE_BYTES;
    open_server(f);
    put_range(f, 0, 40, 1, KVC_PROMISE_MEMORY);
    for (uint32_t i = 0; i < 16; i++) {
        blocks[i] = 1000 + i;
        blocks[16 + i] = i; /* the oldest */
    }
    put_blocks(f, blocks, 32, KVC_PROMISE_MEMORY);
    assert_int_equal(count(f, 32, KVC_OK), 32);
    assert_int_equal(check_rows(f, 1000, 16, 0), 16);
    assert_int_equal(check_rows(f, 0, 16, 0), 16);
}

/* Room that is refused fails the values that it was for, and no other. */
static void test_no_room_for_one(void **state)
{
    fixture *f = *state;
    assert_int_equal(kvc_fault_arm("put.reserve=once"), KVC_OK);
    put_range(f, 0, MANY, 1, KVC_PROMISE_MEMORY);
    assert_int_equal(f->peer->status[0], KVC_AGAIN);
    assert_int_equal(count(f, MANY, KVC_OK), MANY - 1);
    assert_int_equal(check_rows(f, 0, MANY, 0), MANY - 1);
    put_range(f, 0, MANY, 1, KVC_PROMISE_MEMORY);
    assert_int_equal(f->peer->status[0], KVC_OK);
    assert_int_equal(count(f, MANY, KVC_EXISTS), MANY - 1);
    assert_int_equal(kvc_fault_arm("put.reserve=always"), KVC_OK);
    put_range(f, 1000, MANY, 1, KVC_PROMISE_MEMORY);
    assert_int_equal(count(f, MANY, KVC_AGAIN), MANY);
    assert_int_equal(check_rows(f, 1000, MANY, 0), 0);
}

/* ---- at the same time ------------------------------------------------------------------------ */

typedef struct rival {
    fixture *f;
    uint32_t number, ok[ROUNDS * MANY]; /* ok: of each value, how often this one put it */
    kvc_promise promise;
    kvc_thread thread;
} rival;

/* The same values as all others, in an order of its own, until none of them is AGAIN. */
static void put_round(rival *r, h_peer *peer, uint64_t first)
{
    uint64_t blocks[MANY];
    const uint32_t parts[MANY] = {0};
    uint32_t n = MANY;
    for (uint32_t i = 0; i < MANY; i++)
        blocks[i] = first + (i * (2 * r->number + 7)) % MANY;
    while (n > 0) {
        uint32_t left = 0;
        assert_int_equal(h_put_each(peer, &r->f->schema, blocks, parts, n, r->promise), KVC_OK);
        for (uint32_t i = 0; i < n; i++) {
            if (peer->status[i] == KVC_AGAIN)
                blocks[left++] = blocks[i];
            else if (peer->status[i] == KVC_OK)
                r->ok[blocks[i]]++;
            else
                assert_int_equal(peer->status[i], KVC_EXISTS);
        }
        n = left;
    }
}

static void rival_main(void *arg)
{
    rival *r = arg;
    h_peer *peer = h_connect(kvs_server_uri(r->f->h.server, 0), "default");
    for (uint32_t round = 0; round < ROUNDS; round++)
        put_round(r, peer, (uint64_t)round * MANY);
    h_disconnect(peer);
}

/* Each value is put by one of them, and whole. */
static void contend(fixture *f, kvc_promise promise)
{
    rival *rivals = calloc(THREADS, sizeof(*rivals));
    for (uint32_t i = 0; i < THREADS; i++) {
        rivals[i].f = f;
        rivals[i].number = i;
        rivals[i].promise = promise;
        assert_int_equal(kvc_thread_start(&rivals[i].thread, "rival", rival_main, &rivals[i]),
                         KVC_OK);
    }
    for (uint32_t i = 0; i < THREADS; i++)
        kvc_thread_join(&rivals[i].thread);
    for (uint32_t b = 0; b < ROUNDS * MANY; b++) {
        uint32_t ok = 0;
        for (uint32_t i = 0; i < THREADS; i++)
            ok += rivals[i].ok[b];
        assert_int_equal(ok, 1);
    }
    assert_int_equal(check_rows(f, 0, ROUNDS * MANY, 0), ROUNDS * MANY);
    free(rivals);
}

static void test_rivals(void **state)
{
    fixture *f = *state;
    close_server(f);
    f->h.settings.dram_bytes = 4 * ROUNDS * MANY * VALUE_BYTES;
    open_server(f);
    contend(f, KVC_PROMISE_MEMORY);
}

#ifdef KVASIR_LMDB
static void with_lmdb(fixture *f, uint64_t dram_bytes)
{
    close_server(f);
    f->h.settings.lmdb_path = f->dir;
    f->h.settings.lmdb_bytes = 128u << 20;
    f->h.settings.dram_bytes = dram_bytes;
    open_server(f);
}

static void test_durable_rivals(void **state)
{
    fixture *f = *state;
    with_lmdb(f, 4 * ROUNDS * MANY * VALUE_BYTES);
    contend(f, KVC_PROMISE_DURABLE);
    close_server(f);
    open_server(f);
    assert_int_equal(check_rows(f, 0, ROUNDS * MANY, 0), ROUNDS * MANY);
}

/* Until the first is durable nobody can say that the second is there. */
static void test_durable_twice_in_one(void **state)
{
    fixture *f = *state;
    const uint64_t blocks[] = {1, 2, 1, 3};
    const int8_t status[] = {KVC_OK, KVC_OK, KVC_AGAIN, KVC_OK};
    with_lmdb(f, 1u << 20);
    put_blocks(f, blocks, 4, KVC_PROMISE_DURABLE);
    assert_memory_equal(f->peer->status, status, sizeof(status));
    put_blocks(f, blocks, 4, KVC_PROMISE_DURABLE);
    assert_int_equal(count(f, 4, KVC_EXISTS), 4);
    assert_int_equal(check_rows(f, 1, 3, 0), 3);
}

/* dram has room for a part of a DURABLE request: the rest goes straight to lmdb. */
static void test_durable_more_than_fits(void **state)
{
    fixture *f = *state;
    with_lmdb(f, 40 * VALUE_BYTES);
    put_range(f, 0, MANY, 1, KVC_PROMISE_DURABLE);
    assert_int_equal(count(f, MANY, KVC_OK), MANY);
    h_check_caps(&f->h);
    assert_int_equal(check_rows(f, 0, MANY, 0), MANY);
    close_server(f);
    open_server(f);
    assert_int_equal(check_rows(f, 0, MANY, 0), MANY);
}
#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_twice_in_one, setup, teardown),
        cmocka_unit_test_setup_teardown(test_some_are_there, setup, teardown),
        cmocka_unit_test_setup_teardown(test_mixed_shapes, setup, teardown),
        cmocka_unit_test_setup_teardown(test_more_than_fits, setup, teardown),
        cmocka_unit_test_setup_teardown(test_gives_way_to_the_same, setup, teardown),
        cmocka_unit_test_setup_teardown(test_no_room_for_one, setup, teardown),
        cmocka_unit_test_setup_teardown(test_rivals, setup, teardown),
#ifdef KVASIR_LMDB
        cmocka_unit_test_setup_teardown(test_durable_rivals, setup, teardown),
        cmocka_unit_test_setup_teardown(test_durable_twice_in_one, setup, teardown),
        cmocka_unit_test_setup_teardown(test_durable_more_than_fits, setup, teardown),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
