/*
 * attend_gpu_fail_test.c: AttendRows on a server's GPU that is lost, refuses what it is asked for,
 * cannot pin dram, or has no lane left.
 *
 * Over a fake of kvk/cuda.h. What a thread of the server's does is waited for, 60 s at most.
 */
#include <string.h>

#include "attend_gpu_rig.h"
#include "base/log.h"

/* The CPU does the whole call again, whatever the GPU was at, and the GPU is asked no more. */
static void test_a_gpu_that_fails(void **state)
{
    a_server *f = *state;
    for (uint32_t n = 0; n < 2; n++) { /* what is sent, what comes back */
        start_pinned(f, &large);
        uint64_t failed = metric(KVC_M_attend_gpu_failures);
        fake_cuda_copies(n);
        a_attend(f, &large, picks, NULL, large.n_picks, &got);
        a_check_equal(&large, &got, &want, "the GPU fails");
        assert_int_equal(f->peer->n_missing, 0);
        assert_int_equal(metric(KVC_M_attend_gpu_failures), failed + 1);
        assert_int_equal(metric(KVC_M_attend_gpu), 0);
        fake_cuda_copies(UINT32_MAX);
        assert_int_equal(ask(f, &large, "it is not asked again"), 0);
        assert_int_equal(metric(KVC_M_attend_gpu_failures), failed + 1);
        a_stop(f);
    }
}

/* Pinning tells, too, that the GPU is lost; memory that cannot be locked now is not asked for by
 * every call, and costs nothing else. */
static void test_pinning_fails(void **state)
{
    a_server *f = *state;
    uint64_t failed = metric(KVC_M_attend_gpu_failures);
    f->h.settings.attend_gpu_bytes = 64u << 20;
    fake_cuda_registers(KVC_NO_MEMORY);
    a_start(f, &large, N_BLOCKS);
    a_choose(&large, picks, ranks);
    uint32_t asked = fake_cuda_asked_to_register();
    for (uint32_t i = 0; i < 60000 && fake_cuda_asked_to_register() == asked; i++) {
        assert_int_equal(ask(f, &large, "no memory to pin"), 0);
        usleep(1000);
    }
    assert_int_equal(fake_cuda_asked_to_register(), asked + 1);
    assert_int_equal(metric(KVC_M_attend_gpu), 1);
    a_stop(f);
    assert_int_equal(metric(KVC_M_attend_gpu_failures), failed);
    fake_cuda_registers(KVC_DEVICE);
    a_start(f, &large, N_BLOCKS);
    a_choose(&large, picks, ranks);
    assert_int_equal(metric(KVC_M_attend_gpu), 1);
    assert_int_equal(ask(f, &large, "lost while it is pinned"), 0);
    wait_metric(KVC_M_attend_gpu, 0);
    assert_int_equal(metric(KVC_M_attend_gpu_failures), failed + 1);
    fake_cuda_registers(KVC_OK);
    asked = fake_cuda_asked_to_register();
    assert_int_equal(ask(f, &large, "and not asked again"), 0);
    a_stop(f);
    assert_int_equal(fake_cuda_asked_to_register(), asked);
}

/* The GPU has the second group before the CPU is at its share of the first: the second thing that
 * it is asked for is attention, not a merge. */
static void test_the_gpu_begins_first(void **state)
{
    a_server *f = *state;
    a_ask a;
    f->h.settings.dram_bytes = 16u << 20;
    f->h.settings.attend_gpu_bytes = 1u << 20;
    a_start(f, &large, N_BLOCKS);
    a_choose(&large, picks, ranks);
    (void)ask(f, &large, "while it is pinned");
    wait_metric(KVC_M_attend_gpu_pinned_bytes, 1u << 20);
    a_ask_init(&a, f, &large, picks, NULL, 300);
    a.groups[1] = a.groups[0];
    a.queries[1] = a.queries[0];
    a.queries[1].same_q = true;
    a.req.u.fetch_rows.n_groups = 2;
    fake_cuda_ops(1);
    assert_int_equal(h_call(f->peer, &a.req), KVC_OK);
    fake_cuda_ops(UINT32_MAX);
    free(a.q);
    assert_int_equal(ask(f, &large, "what was refused was attention"), 0);
    a_stop(f);
}

/* What it refuses though it said that it takes it costs one call, and no more; others it has. */
static void test_an_op_is_refused(void **state)
{
    a_server *f = *state;
    start_pinned(f, &large);
    uint64_t failed = metric(KVC_M_attend_gpu_failures), read = rows_read();
    fake_cuda_ops(0);
    a_attend(f, &large, picks, NULL, large.n_picks, &got);
    fake_cuda_ops(UINT32_MAX);
    a_check_equal(&large, &got, &want, "refused");
    assert_int_equal(rows_read(), read);
    assert_int_equal(metric(KVC_M_attend_gpu_failures), failed + 1);
    assert_int_equal(ask(f, &large, "the next one"), 0);
    assert_int_equal(metric(KVC_M_attend_gpu_failures), failed + 1);
    a_shape s = large;
    s.n_q = 3;
    assert_int_equal(ask(f, &s, "another shape"), s.n_picks);
    a_stop(f);
}

/* A device of 99 KiB for a block has no room for several queries over heads of 128. */
static void test_a_small_device(void **state)
{
    a_server *f = *state;
    uint64_t failed = metric(KVC_M_attend_gpu_failures);
    fake_cuda_shared(99u << 10);
    start_pinned(f, &large);
    assert_int_equal(ask(f, &large, "one query"), large.n_picks);
    a_shape s = large;
    s.n_q = 3;
    assert_int_equal(ask(f, &s, "three"), 0);
    a_stop(f);
    s.dim = 64;
    start_pinned(f, &s);
    assert_int_equal(ask(f, &s, "heads of 64"), s.n_picks);
    a_stop(f);
    assert_int_equal(metric(KVC_M_attend_gpu_failures), failed);
}

/* What the server's log has said. */
typedef struct log_text {
    kvc_mutex lock;
    char text[1 << 16];
    size_t len_bytes;
} log_text;

static void log_sink(void *arg, const char *line, size_t len_bytes)
{
    log_text *l = arg;
    kvc_mutex_lock(&l->lock);
    if (len_bytes < sizeof(l->text) - l->len_bytes) {
        memcpy(l->text + l->len_bytes, line, len_bytes);
        l->len_bytes += len_bytes;
    }
    l->text[l->len_bytes] = 0;
    kvc_mutex_unlock(&l->lock);
}

/* A server with that many bytes of either, and calls that may wait: whether a GPU attends, and what
 * is said of it. */
static void check_setting(a_server *f, uint64_t gpu_bytes, uint64_t attend_bytes, uint64_t queue,
                          bool attends, const char *says)
{
    static log_text log;
    log.len_bytes = 0;
    kvc_mutex_init(&log.lock, KVC_RANK_LEAF);
    f->h.settings.gpu_bytes = gpu_bytes;
    f->h.settings.attend_gpu_bytes = attend_bytes;
    f->h.settings.attend_queue = queue;
    assert_int_equal(setenv("KVASIR_TEST_LOG", "1", 1), 0); /* h_server_start sets the level */
    kvc_log_set_sink(log_sink, &log);
    h_server_start(&f->h);
    uint32_t held = fake_cuda_held();
    uint64_t works = metric(KVC_M_attend_gpu);
    h_server_stop(&f->h, true);
    kvc_log_set_sink(NULL, NULL);
    assert_int_equal(unsetenv("KVASIR_TEST_LOG"), 0);
    kvc_log_set_level(KVC_LOG_LEVEL_ERROR);
    kvc_mutex_fini(&log.lock);
    assert_int_equal(works, attends);
    assert_true(attends || gpu_bytes || held == 0);
    if (strstr(log.text, says) == NULL)
        fail_msg("it does not say: %s", says);
}

/* A setting that cannot do what it is for takes nothing of the GPU, and says so. */
static void test_settings_without_effect(void **state)
{
    a_server *f = *state;
    f->h.settings.dram_bytes = 16u << 20; /* segments of 1 MiB */
    check_setting(f, 0, 1, 64, false, "attend_gpu_bytes is less than a segment of dram");
    check_setting(f, 0, 1u << 20, 0, false, "attend_queue is 0");
    check_setting(f, 0, 3u << 20, 64, true, "over up to 3.00 MiB of dram");
    check_setting(f, 32u << 20, 1, 64, true, "over the gpu tier\"");
    check_setting(f, 32u << 20, 1u << 30, 64, true, "over the gpu tier and up to 16.0 MiB of dram");
}

static void test_no_gpu(void **state)
{
    a_server *f = *state;
    fake_cuda_absent(true);
    f->h.settings.attend_gpu_bytes = 64u << 20;
    a_start(f, &large, N_BLOCKS);
    a_choose(&large, picks, ranks);
    assert_int_equal(metric(KVC_M_attend_gpu), 0);
    for (int i = 0; i < 2; i++)
        assert_int_equal(ask(f, &large, "no GPU"), 0);
    a_stop(f);
}

#ifdef KVASIR_LMDB

/* Values that have copies in the gpu tier and in lmdb, and no more in dram. */
static void start_without_dram(a_server *f)
{
    h_temp_dir(f->dir);
    f->h.settings.lmdb_path = f->dir;
    f->h.settings.lmdb_bytes = 256u << 20;
    f->h.settings.promote_percent = 0;
    f->h.settings.gpu_bytes = 32u << 20;
    f->h.settings.attend_gpu_bytes = 1;
    f->h.settings.max_value_bytes = 256u << 10;
    f->h.settings.dram_bytes = 4u << 20;
    a_start(f, &large, N_BLOCKS);
    prefetch(f);
    h_schema schema;
    const uint32_t part = 0;
    h_schema_init(&schema, "other", 1, 4096, false);
    assert_int_equal(h_register(f->peer, &schema), KVC_OK);
    for (uint32_t b = 0; b < 40; b++) { /* they push the others out of dram */
        static const uint32_t row = 3;
        uint64_t context;
        assert_int_equal(h_put1(f->peer, &schema, b, part, KVC_PROMISE_DURABLE), KVC_OK);
        assert_int_equal(h_open(f->peer, &schema, b, 1, 0, &context), KVC_OK);
        h_fetch_equal(f->peer, &schema, context, b, part, &row, 1);
    }
    a_choose(&large, picks, ranks);
}

/* Rows that only the gpu tier and lmdb have: lmdb is not read while the GPU works; where it fails,
 * they answer AGAIN, and then come from lmdb. */
static void test_what_dram_lacks(void **state)
{
    a_server *f = *state;
    uint32_t n_gpu = 0;
    start_without_dram(f);
    uint64_t lmdb_rows = atomic_load(&f->h.server->lmdb.rows_read);
    assert_int_equal(ask(f, &large, "the gpu and lmdb have them"), large.n_picks);
    assert_int_equal(f->peer->xfer.reply.u.fetch_rows.rows_gpu, large.n_picks);
    assert_int_equal(atomic_load(&f->h.server->lmdb.rows_read), lmdb_rows);
    fake_cuda_copies(0);
    a_attend(f, &large, picks, NULL, large.n_picks, &got);
    for (uint32_t m = 0; m < f->peer->n_missing; m++)
        n_gpu += f->peer->missing[m].status == KVC_AGAIN;
    assert_true(n_gpu > 0 && n_gpu == f->peer->n_missing);
    a_attend(f, &large, picks, NULL, large.n_picks, &got);
    assert_int_equal(f->peer->n_missing, 0);
    assert_int_equal(f->peer->xfer.reply.u.fetch_rows.rows_lmdb, n_gpu);
    a_check_equal(&large, &got, &want, "from lmdb");
    a_stop(f);
}

enum { LANES = 4 };

static kvc_mutex gate_lock;
static kvc_cond gate_moved;
static uint32_t n_inside;
static bool gate_open;

/* Where calls of several queries are stopped, each with a lane. */
static void gate(void *arg)
{
    (void)arg;
    kvc_mutex_lock(&gate_lock);
    n_inside++;
    while (!gate_open)
        kvc_cond_wait(&gate_moved, &gate_lock);
    kvc_mutex_unlock(&gate_lock);
}

static uint32_t inside(void)
{
    kvc_mutex_lock(&gate_lock);
    uint32_t n = n_inside;
    kvc_mutex_unlock(&gate_lock);
    return n;
}

static void open_gate(void)
{
    kvc_mutex_lock(&gate_lock);
    gate_open = true;
    kvc_cond_broadcast(&gate_moved);
    kvc_mutex_unlock(&gate_lock);
}

typedef struct waiter {
    a_server *f;
    kvc_thread thread;
    uint64_t timeout_ns;
    kvc_status status;
    uint32_t n_missing;
} waiter;

static void waiter_main(void *arg)
{
    waiter *w = arg;
    a_shape s = large;
    a_ask a;
    a_server view = *w->f;
    view.peer = h_connect(kvs_server_uri(w->f->h.server, 0), "default");
    view.peer->timeout_ns = w->timeout_ns;
    s.n_q = 3;
    a_ask_init(&a, &view, &s, picks, NULL, s.n_picks);
    w->status = h_call(view.peer, &a.req);
    w->n_missing = view.peer->n_missing;
    free(a.q);
    h_disconnect(view.peer);
}

static void start_waiter(waiter *w, a_server *f, uint64_t timeout_ns)
{
    *w = (waiter){.f = f, .timeout_ns = timeout_ns};
    assert_int_equal(kvc_thread_start(&w->thread, "waiter", waiter_main, w), KVC_OK);
}

static void wait_calls(a_server *f, uint32_t n)
{
    for (uint32_t i = 0; i < 60000 && atomic_load(&f->h.server->attender->n_calls) != n; i++)
        usleep(1000);
    assert_int_equal(atomic_load(&f->h.server->attender->n_calls), n);
}

/* Calls that must have a lane wait for one, until their deadline and no longer: then their thread
 * is free again, though no lane is. */
static void test_waiting_for_a_lane(void **state)
{
    static waiter w[LANES + 2];
    a_server *f = *state;
    f->h.settings.attend_threads = LANES + 2;
    start_without_dram(f);
    kvc_mutex_init(&gate_lock, KVC_RANK_LEAF);
    kvc_cond_init(&gate_moved);
    n_inside = 0;
    gate_open = false;
    fake_cuda_before_launch(gate, NULL);
    for (uint32_t i = 0; i < LANES; i++) {
        start_waiter(&w[i], f, 300000000000ull);
        for (uint32_t k = 0; k < 60000 && inside() != i + 1; k++)
            usleep(1000);
        assert_int_equal(inside(), i + 1);
    }
    start_waiter(&w[LANES], f, 200000000ull);
    kvc_thread_join(&w[LANES].thread);
    wait_calls(f, LANES);
    start_waiter(&w[LANES + 1], f, 300000000000ull);
    wait_calls(f, LANES + 1);
    assert_int_equal(inside(), LANES);
    open_gate();
    for (uint32_t i = 0; i < LANES + 2; i++) {
        if (i != LANES)
            kvc_thread_join(&w[i].thread);
        assert_int_equal(w[i].status, i == LANES ? KVC_TIMED_OUT : KVC_OK);
        assert_int_equal(w[i].n_missing, 0);
    }
    assert_int_equal(inside(), LANES + 1);
    fake_cuda_before_launch(NULL, NULL);
    a_stop(f);
    kvc_cond_fini(&gate_moved);
    kvc_mutex_fini(&gate_lock);
}

#endif

#define TEST(name) cmocka_unit_test_setup_teardown(name, gpu_setup, gpu_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_a_gpu_that_fails),        TEST(test_pinning_fails),
        TEST(test_the_gpu_begins_first),    TEST(test_an_op_is_refused),
        TEST(test_a_small_device),          TEST(test_no_gpu),
        TEST(test_settings_without_effect),
#ifdef KVASIR_LMDB
        TEST(test_what_dram_lacks),         TEST(test_waiting_for_a_lane),
#endif
    };
    return cmocka_run_group_tests_name("attend_gpu_fail", tests, NULL, NULL);
}
