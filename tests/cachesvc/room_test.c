/*
 * room_test.c: what emptying a segment of dram for another size costs everybody else: no more
 * values than that segment has, and no transport's time. One server in this process, without lmdb;
 * see hold_rig.h.
 */
#include "hold_rig.h"

#include <unistd.h>

#include "base/fault.h"
#include "base/metrics.h"
#include "cascade.h"

/* Held values that somebody meets keep their segment, and what nobody holds there stays, too: at
   most one value gives way, in vain, for where the held one was to go. */
static void test_met_values_cost_nothing(void **state)
{
    fixture *f = *state;
    uint64_t context;
    (void)hold_one_of_each(f, &context);
    for (uint32_t i = 0; i < 3; i++) {
        assert_int_equal(kvc_fault_arm("segment.met=always"), KVC_OK);
        atomic_store(&f->h.server->no_segment_until_ns, 0);
        assert_int_equal(h_put1(f->peer, &f->other, 1000, 0, KVC_PROMISE_MEMORY), KVC_AGAIN);
        assert_true(kvc_fault_failures("segment.met") > 1); /* it waited for who reads */
        assert_int_equal(evictions(f), 1);
        assert_int_equal(present(f, &f->schema, 0, N_ALL), N_ALL - 1);
    }
    assert_int_equal(kvc_fault_arm("segment.met=once"), KVC_OK);
    atomic_store(&f->h.server->no_segment_until_ns, 0);
    assert_int_equal(h_put1(f->peer, &f->other, 1000, 0, KVC_PROMISE_MEMORY), KVC_OK);
    assert_int_equal(evictions(f), PER_SEGMENT);
    assert_true(held_is_right(f->peer, context));
}

static uint32_t class_of(const fixture *f, const h_schema *schema)
{
    kvc_digest tenant;
    assert_int_equal(kvc_sha256("default", 7, &tenant), KVC_OK);
    return kvs_part_at(kvs_schemas_find(f->h.server->schemas, &tenant, &schema->digest), 0)->cls;
}

/* What came into a segment after it was empty is not taken for what was there before. */
static void test_other_lives_are_left_alone(void **state)
{
    fixture *f = *state;
    kvs_index *index = f->h.server->index;
    const kvs_segment now = {0, 1}, before = {0, 0};
    kvs_victim victim;
    uint32_t cursor = 0;
    put(f, &f->schema, 0, N_ALL);
    assert_int_equal(kvs_evict_count_segment(index, &now), PER_SEGMENT);
    assert_int_equal(kvs_evict_count_segment(index, &before), 0);
    assert_false(kvs_evict_from_segment(index, &before, &cursor, &victim));
    cursor = 0;
    for (uint32_t i = 0; i < PER_SEGMENT; i++) {
        assert_true(kvs_evict_from_segment(index, &now, &cursor, &victim));
        assert_int_equal(victim.slot.a, 0);
        kvs_cascade_release(f->h.server, &victim, 1);
    }
    put(f, &f->other, 1000, 1);
    cursor = 0;
    assert_false(kvs_evict_from_segment(index, &now, &cursor, &victim));
    assert_int_equal(kvs_evict_count_segment(index, &(kvs_segment){0, 2}), 1);
    /* Room for what moves is made in other segments. */
    uint32_t cls = class_of(f, &f->schema), n = 0;
    for (cursor = 0; kvs_evict_beside_segment(index, cls, &(kvs_segment){1, 1}, &cursor, &victim);
         n++) {
        assert_int_not_equal(victim.slot.a, 1);
        kvs_cascade_release(f->h.server, &victim, 1);
    }
    assert_int_equal(n, 6 * PER_SEGMENT);
    assert_false(kvs_evict_dram_beside(index, cls, &(kvs_segment){1, 1}, &victim));
    assert_true(kvs_evict_dram_beside(index, cls, &before, &victim));
    kvs_cascade_release(f->h.server, &victim, 1);
}

/* Keeps the room thread from everything else until it is told. */
typedef struct blocker {
    kvs_job job;
    kvc_mutex lock;
    kvc_cond cond;
    bool go, done;
} blocker;

static blocker *blocked; /* NULL: the room thread is free */

static void blocker_run(kvs_job *job)
{
    blocker *b = (blocker *)job;
    kvc_mutex_lock(&b->lock);
    while (!b->go)
        kvc_cond_wait(&b->cond, &b->lock);
    b->done = true;
    kvc_cond_signal(&b->cond);
    kvc_mutex_unlock(&b->lock);
}

static void block(fixture *f, blocker *b)
{
    *b = (blocker){.job.run = blocker_run};
    kvc_mutex_init(&b->lock, KVC_RANK_LEAF);
    kvc_cond_init(&b->cond);
    assert_int_equal(kvs_disk_submit(f->h.server->room_jobs, &b->job), KVC_OK);
    blocked = b;
}

/* Returns when the room thread has done all that was given to it before. */
static void unblock(blocker *b)
{
    kvc_mutex_lock(&b->lock);
    b->go = true;
    kvc_cond_signal(&b->cond);
    while (!b->done)
        kvc_cond_wait(&b->cond, &b->lock);
    kvc_mutex_unlock(&b->lock);
    kvc_cond_fini(&b->cond);
    kvc_mutex_fini(&b->lock);
    blocked = NULL;
}

/* After a test that failed, too. */
static int unblock_and_teardown(void **state)
{
    if (blocked)
        unblock(blocked);
    return teardown(state);
}

#define N_PUTTERS 8u

typedef struct putter {
    h_peer *peer;
    const h_schema *schema;
    kvc_thread thread;
    uint64_t block;
    kvc_status status;
} putter;

static void putter_main(void *arg)
{
    putter *p = arg;
    p->status = h_put1(p->peer, p->schema, p->block, 0, KVC_PROMISE_MEMORY);
}

/* Puts that need a segment wait for it off the transport's thread, which answers others meanwhile;
   and all who wait share the one that is emptied. */
static void test_transports_answer_meanwhile(void **state)
{
    fixture *f = *state;
    static putter putters[N_PUTTERS];
    static blocker b;
    uint64_t context, until = kvc_deadline_ns(60 * SECOND);
    uint64_t moved = kvc_metric_get(KVC_M_held_values_moved);
    (void)hold_one_of_each(f, &context);
    block(f, &b);
    for (uint32_t i = 0; i < N_PUTTERS; i++) {
        putters[i] = (putter){.schema = &f->other, .block = 1000 + i};
        putters[i].peer = h_connect(kvs_server_uri(f->h.server, 0), "default");
        assert_int_equal(kvc_thread_start(&putters[i].thread, "putter", putter_main, &putters[i]),
                         KVC_OK);
    }
    while (atomic_load(&f->h.server->n_calls) < N_PUTTERS) {
        assert_true(kvc_now_ns() < until);
        assert_int_equal(evictions(f), 0);
        usleep(1000);
    }
    assert_true(held_is_right(f->peer, context)); /* by the thread that has looked at the puts */
    while (atomic_load(&f->h.server->n_calls) != N_PUTTERS) { /* an answer comes before the count */
        assert_true(kvc_now_ns() < until);
        assert_int_equal(evictions(f), 0);
        usleep(1000);
    }
    assert_int_equal(evictions(f), 0);
    unblock(&b);
    for (uint32_t i = 0; i < N_PUTTERS; i++) {
        kvc_thread_join(&putters[i].thread);
        assert_int_equal(putters[i].status, KVC_OK);
        h_disconnect(putters[i].peer);
    }
    assert_int_equal(evictions(f), PER_SEGMENT);
    assert_int_equal(kvc_metric_get(KVC_M_held_values_moved) - moved, 1);
    assert_int_equal(present(f, &f->other, 1000, N_PUTTERS), N_PUTTERS);
}

/* Nothing gives way for a put that nobody waits for any more. */
static void test_who_gave_up_gets_no_segment(void **state)
{
    fixture *f = *state;
    static blocker first, last;
    uint64_t context;
    (void)hold_one_of_each(f, &context);
    block(f, &first);
    f->peer->timeout_ns = SECOND / 20;
    assert_int_equal(h_put1(f->peer, &f->other, 1000, 0, KVC_PROMISE_MEMORY), KVC_TIMED_OUT);
    f->peer->timeout_ns = 0;
    unblock(&first);
    block(f, &last);
    unblock(&last);
    assert_int_equal(evictions(f), 0);
    assert_int_equal(present(f, &f->schema, 0, N_ALL), N_ALL);
    put(f, &f->other, 1000, 1);
}

/* One request with values of both sizes, some of them twice and one that is there: what has room
   does not wait, and all of it is there afterwards, with the bytes that came. */
static void test_mixed_put(void **state)
{
    fixture *f = *state;
    h_schema mixed;
    enum { N = 20 };
    uint64_t blocks[N], context, handle;
    uint32_t parts[N], picks[N];
    h_schema_init(&mixed, "mixed", 2, ROW, true);
    mixed.parts[1].row_bytes = 2 * ROW;
    assert_int_equal(kvc_schema_digest(&mixed.schema, &mixed.digest), KVC_OK);
    assert_int_equal(h_register(f->peer, &mixed), KVC_OK);
    put(f, &f->schema, 0, N_ALL);
    assert_int_equal(present(f, &f->schema, 0, N_ALL), N_ALL);
    assert_int_equal(h_open(f->peer, &mixed, 5000, N / 4, 0, &context), KVC_OK);
    assert_int_equal(hold(f, context, &handle), KVC_OK); /* so that the first of them stay */
    for (uint32_t i = 0; i < N; i++) {
        blocks[i] = 5000 + i / 4;
        parts[i] = i % 4 == 3 ? 10 : 0;
    }
    assert_int_equal(h_put_each(f->peer, &mixed, blocks, parts, N, KVC_PROMISE_MEMORY), KVC_OK);
    for (uint32_t i = 0; i < N; i++)
        assert_int_equal(f->peer->status[i], i % 4 == 0 || i % 4 == 3 ? KVC_OK : KVC_EXISTS);
    for (uint32_t i = 0; i < N; i++)
        picks[i] = i / 4 * H_TOKENS + 3 * i;
    h_fetch_equal(f->peer, &mixed, context, 5000, 0, picks, N);
    h_fetch_equal(f->peer, &mixed, context, 5000, 10, picks, N);
    assert_true(evictions(f) <= 2 * PER_SEGMENT);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_met_values_cost_nothing, setup, teardown),
        cmocka_unit_test_setup_teardown(test_other_lives_are_left_alone, setup, teardown),
        cmocka_unit_test_setup_teardown(test_transports_answer_meanwhile, setup,
                                        unblock_and_teardown),
        cmocka_unit_test_setup_teardown(test_who_gave_up_gets_no_segment, setup,
                                        unblock_and_teardown),
        cmocka_unit_test_setup_teardown(test_mixed_put, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
