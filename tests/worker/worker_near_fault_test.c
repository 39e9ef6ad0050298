/*
 * worker_near_fault_test.c: attention beside the data that breaks in the middle of a step: the step
 * is finished by rows within its deadline, each miss counts once, the result is that of resident
 * rows within the stated bound, and the next step goes near again.
 *
 * A server in this process on a shm socket, whose AttendRows is wrapped: it is refused as it
 * arrives, never answered in time, or its connection breaks as it arrives or as its answer leaves.
 */
#include <math.h>
#include <stdatomic.h>
#include <unistd.h>

#include "base/metrics.h"
#include "base/thread.h"
#include "bench.h"
#include "harness.h"
#include "internal.h"
#include "request.h"

enum { WIDTH = 64, HEADS = 4, MAX_KEPT = 16, POSITION = 640 };

typedef enum fault { HONEST, REFUSES, KEEPS, BREAKS_ON_ARRIVAL, BREAKS_ON_ANSWER } fault;

typedef struct rig_near {
    h_server h;
    kvc_client *client;
    char dir[256], path[300];
} rig_near;

static atomic_int fault_now;
static atomic_uint n_struck; /* AttendRows that met the fault */
static char broken_path[300];

/* What KEEPS keeps. */
static struct {
    kvc_mutex lock;
    kvs_server *server;
    kvt_call *calls[MAX_KEPT];
    kvc_digest tenants[MAX_KEPT];
    uint32_t n;
} kept;

static void keep(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    kvc_mutex_lock(&kept.lock);
    assert_true(kept.n < MAX_KEPT);
    kept.server = server;
    kept.calls[kept.n] = call;
    kept.tenants[kept.n++] = *tenant;
    kvc_mutex_unlock(&kept.lock);
}

void __real_kvs_on_attend_rows(kvs_server *server, kvt_call *call, const kvc_digest *tenant);
void __wrap_kvs_on_attend_rows(kvs_server *server, kvt_call *call, const kvc_digest *tenant);
void __wrap_kvs_on_attend_rows(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    int what = atomic_load(&fault_now);
    if (what != HONEST && what != BREAKS_ON_ANSWER)
        atomic_fetch_add(&n_struck, 1);
    if (what == KEEPS) {
        keep(server, call, tenant);
        return;
    }
    if (what == REFUSES) {
        kvs_fail(call, KVC_IO, "as the test says");
        return;
    }
    if (what == BREAKS_ON_ARRIVAL)
        h_break_shm(broken_path);
    __real_kvs_on_attend_rows(server, call, tenant);
}

void __real_kvs_answer(kvt_call *call, const kvc_reply *reply, const kvt_slice *slices,
                       uint32_t n_slices);
void __wrap_kvs_answer(kvt_call *call, const kvc_reply *reply, const kvt_slice *slices,
                       uint32_t n_slices);
void __wrap_kvs_answer(kvt_call *call, const kvc_reply *reply, const kvt_slice *slices,
                       uint32_t n_slices)
{
    if (call->req.method == KVC_ATTEND_ROWS && atomic_load(&fault_now) == BREAKS_ON_ANSWER) {
        atomic_fetch_add(&n_struck, 1);
        h_break_shm(broken_path);
    }
    __real_kvs_answer(call, reply, slices, n_slices);
}

/* Late answers, to whoever may still listen. */
static void let_go(void)
{
    for (uint32_t i = 0; i < kept.n; i++)
        __real_kvs_on_attend_rows(kept.server, kept.calls[i], &kept.tenants[i]);
    kept.n = 0;
}

static int open_near(void **state)
{
    rig_near *b = calloc(1, sizeof(*b));
    assert_non_null(b);
    kvc_mutex_init(&kept.lock, KVC_RANK_LEAF);
    h_server_init(&b->h);
    h_temp_dir(b->dir);
    (void)snprintf(b->path, sizeof(b->path), "%s/near", b->dir);
    (void)snprintf(broken_path, sizeof(broken_path), "%s", b->path);
    (void)snprintf(b->h.listen, sizeof(b->h.listen), "shm://%s", b->path);
    h_server_start(&b->h);
    b->client = store_client(kvs_server_uri(b->h.server, 0));
    *state = b;
    return 0;
}

static int close_near(void **state)
{
    rig_near *b = *state;
    kvc_client_close(b->client);
    h_server_fini(&b->h);
    h_remove_dir(b->dir);
    kvc_mutex_fini(&kept.lock);
    free(b);
    return 0;
}

/* A sequence of 640 tokens by way near, or one that has all rows here. */
static kvw_seq *prefilled(rig *r, const char *selector, kvc_client *client)
{
    static uint32_t n;
    static char revision[16];
    kvw_seq *seq = NULL;
    uint32_t reused = 0;
    store_rig(r, selector, KVW_INDEX_EXACT, client);
    r->opts.exact = 0;
    r->opts.way = client != NULL ? "near" : NULL;
    (void)snprintf(revision, sizeof(revision), "%u", n++);
    r->opts.revision = revision;
    rig_open(r);
    assert_int_equal(rig_q_width(r), WIDTH);
    assert_ok(kvw_seq_create(r->worker, NULL, 0, &seq, &reused));
    rig_prefill(r, seq, 0, POSITION, NULL, NULL);
    if (client != NULL)
        assert_ok(kvw_flush(seq, kvc_deadline_ns(60000000000ull)));
    return seq;
}

/* One more token on both, of whose rows in the store the one has none. */
static kvc_status step(const rig *r, kvw_seq *seq, const rig *all, kvw_seq *resident, uint32_t pos)
{
    float out[WIDTH], lse[HEADS], want[WIDTH], want_lse[HEADS];
    for (uint32_t p = 0; p < POSITION; p++)
        kvwi_residency_drop(&seq->layers[0].residency, p);
    kvc_status st = rig_one_step(r, seq, pos, out, lse);
    assert_ok(rig_one_step(all, resident, pos, want, want_lse));
    if (st != KVC_OK)
        return st;
    for (uint32_t i = 0; i < WIDTH; i++)
        if (!(fabsf(out[i] - want[i]) <= (float)near_bound(r)))
            fail_msg("position %u, element %u: %g, resident %g", pos, i, (double)out[i],
                     (double)want[i]);
    for (uint32_t i = 0; i < HEADS; i++)
        assert_true(fabsf(lse[i] - want_lse[i]) <= 1e-4F);
    return KVC_OK;
}

/* One turn. False: the deadline passed before the rows came, as it may on a busy machine. */
static bool try_once(rig_near *b, const char *selector, fault what, uint64_t timeout_ns)
{
    rig r, all;
    kvw_seq *seq = prefilled(&r, selector, b->client);
    kvw_seq *resident = prefilled(&all, selector, NULL);
    assert_ok(step(&r, seq, &all, resident, POSITION));
    kvw_stats before = stats_of(seq);
    assert_true(before.rows_near > 0 && before.way_fallbacks == 0);
    uint64_t broken = kvc_metric_get(KVC_M_way_shm_broken);
    uint64_t full_ns = r.worker->opts.fetch_timeout_ns;
    r.worker->opts.fetch_timeout_ns = timeout_ns;
    atomic_store(&n_struck, 0);
    atomic_store(&fault_now, what);
    kvc_status st = step(&r, seq, &all, resident, POSITION + 1);
    atomic_store(&fault_now, HONEST);
    r.worker->opts.fetch_timeout_ns = full_ns;
    assert_true(atomic_load(&n_struck) > 0);
    let_go();
    if (st == KVC_OK) {
        kvw_stats after = stats_of(seq);
        assert_true(after.misses > before.misses);
        /* each miss came once, as a row, and none is in a partial */
        assert_int_equal(after.rows_dram - before.rows_dram, after.misses - before.misses);
        assert_int_equal(after.bytes_fetched - before.bytes_fetched,
                         (after.misses - before.misses) * r.worker->row_bytes);
        assert_int_equal(after.rows_near, before.rows_near);
        assert_int_equal(after.way_fallbacks, before.way_fallbacks + 1);
        assert_int_equal(after.rows_dropped, 0);
        assert_int_equal(kvc_metric_get(KVC_M_way_shm_broken), broken + 1);
        if (what == KEEPS) /* it had its share of the deadline, and left the rest to the rows */
            assert_true(after.ns_fetch_wait - before.ns_fetch_wait >= timeout_ns / 4);
        before = after;
        assert_ok(step(&r, seq, &all, resident, POSITION + 2));
        after = stats_of(seq);
        assert_int_equal(after.rows_near - before.rows_near, after.misses - before.misses);
        assert_int_equal(after.rows_dram, before.rows_dram + after.rows_near - before.rows_near);
    }
    kvw_seq_destroy(seq);
    kvw_seq_destroy(resident);
    rig_close(&r);
    rig_close(&all);
    return st == KVC_OK;
}

static void check(rig_near *b, fault what)
{
    static const char *const selectors[] = {"esa", "tokenselect"};
    for (size_t i = 0; i < 2; i++) {
        uint64_t timeout_ns = 800000000ull;
        while (!try_once(b, selectors[i], what, timeout_ns)) {
            timeout_ns *= 4;
            assert_true(timeout_ns < 300000000000ull);
        }
    }
}

static void refused(void **state)
{
    check(*state, REFUSES);
}

static void never_answered(void **state)
{
    check(*state, KEEPS);
}

static void broken_as_it_arrives(void **state)
{
    check(*state, BREAKS_ON_ARRIVAL);
}

static void broken_as_it_is_answered(void **state)
{
    check(*state, BREAKS_ON_ANSWER);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(refused, open_near, close_near),
        cmocka_unit_test_setup_teardown(never_answered, open_near, close_near),
        cmocka_unit_test_setup_teardown(broken_as_it_arrives, open_near, close_near),
        cmocka_unit_test_setup_teardown(broken_as_it_is_answered, open_near, close_near),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
