/*
 * attend_load_test.c: AttendRows under load: what is refused, who is served beside it, and what
 * becomes of work that nobody waits for.
 *
 * Clients have threads and peers of their own.
 */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "attend_rig.h"
#include "base/metrics.h"

static uint32_t picks[MAX_PICKS], ranks[MAX_PICKS];

static bool idle(a_server *f)
{
    uint64_t deadline_ns = kvc_deadline_ns(60000000000ull);
    struct timespec nap = {.tv_nsec = 1000000};
    while (atomic_load(&f->h.server->attender->n_calls) && !kvc_expired(deadline_ns))
        nanosleep(&nap, NULL);
    return atomic_load(&f->h.server->attender->n_calls) == 0;
}

/* Whether every buffer came back; that of the answer does so once it has left. */
static bool all_back(a_server *f)
{
    uint64_t deadline_ns = kvc_deadline_ns(60000000000ull);
    struct timespec nap = {.tv_nsec = 1000000};
    while (atomic_load(&f->h.server->buffers.out_bytes) && !kvc_expired(deadline_ns))
        nanosleep(&nap, NULL);
    return atomic_load(&f->h.server->buffers.out_bytes) == 0;
}

typedef struct client {
    a_server *f;
    kvc_thread thread;
    atomic_bool *enough;
    atomic_uint *n_again, *n_ok;
} client;

static void client_main(void *arg)
{
    client *c = arg;
    static const uint32_t zeros[20000];
    a_ask a;
    h_peer *peer = h_connect(kvs_server_uri(c->f->h.server, 0), "default");
    a_ask_init(&a, c->f, &a_plain, zeros, NULL, 20000);
    while (!atomic_load(c->enough)) {
        kvc_status status = h_call(peer, &a.req);
        if (status == KVC_AGAIN && peer->xfer.retry_after_ms > 0)
            atomic_fetch_add(c->n_again, 1);
        else if (status == KVC_OK)
            atomic_fetch_add(c->n_ok, 1);
    }
    free(a.q);
    h_disconnect(peer);
}

/* One thread and one place: most of six clients are told to fetch instead, and fetches are served.
 */
static void test_load(void **state)
{
    a_server *f = *state;
    atomic_bool enough = false;
    atomic_uint n_again = 0, n_ok = 0;
    client clients[6];
    f->h.settings.attend_threads = 1;
    f->h.settings.attend_queue = 1;
    a_start(f, &a_plain, N_BLOCKS);
    a_choose(&a_plain, picks, ranks);
    uint64_t refused_before = kvc_metric_get(KVC_M_attends_refused);
    for (int i = 0; i < 6; i++) {
        clients[i] = (client){.f = f, .enough = &enough, .n_again = &n_again, .n_ok = &n_ok};
        assert_int_equal(kvc_thread_start(&clients[i].thread, "client", client_main, &clients[i]),
                         KVC_OK);
    }
    uint64_t deadline_ns = kvc_deadline_ns(60000000000ull);
    uint32_t n_fetches = 0;
    while (!kvc_expired(deadline_ns) &&
           (atomic_load(&n_again) < 20 || atomic_load(&n_ok) < 5 || n_fetches < 20)) {
        assert_int_equal(h_fetch(f->peer, f->context, 7, picks, 200), KVC_OK);
        assert_int_equal(f->peer->n_missing, 0);
        n_fetches++;
    }
    atomic_store(&enough, true);
    for (int i = 0; i < 6; i++)
        kvc_thread_join(&clients[i].thread);
    assert_true(atomic_load(&n_again) >= 20 && atomic_load(&n_ok) >= 5 && n_fetches >= 20);
    assert_true(kvc_metric_get(KVC_M_attends_refused) - refused_before >= 20);
    assert_true(idle(f));
    a_stop(f);
}

/* Queries, results and lists of rows are counted among the buffers: with those in use, AGAIN. */
static void test_memory(void **state)
{
    enum { PICKS = 20000 }; /* 12 bytes each; the answer takes some 100 KiB less */
    static const uint32_t many[PICKS];
    a_server *f = *state;
    a_ask a;
    kvs_buffer *held[1024];
    uint32_t n = 0;
    a_start(f, &a_plain, N_BLOCKS);
    kvs_buffers *pool = &f->h.server->buffers;
    a_ask_init(&a, f, &a_plain, many, NULL, PICKS);
    assert_int_equal(h_call(f->peer, &a.req), KVC_OK);
    assert_true(idle(f));
    /* All but some 128 KiB, which is enough for the answer. */
    while (n < 1024 && kvs_buffer_get(pool, 1u << 20, &held[n]) == KVC_OK)
        n++;
    while (n < 1024 && kvs_buffer_get(pool, 16u << 10, &held[n]) == KVC_OK)
        n++;
    assert_true(n > 8 && n < 1024);
    for (int i = 0; i < 8; i++)
        kvs_buffer_release(held[--n]);
    assert_int_equal(h_call(f->peer, &a.req), KVC_AGAIN);
    assert_non_null(strstr(f->peer->xfer.detail, "to attend with"));
    while (n > 0)
        kvs_buffer_release(held[--n]);
    assert_true(idle(f));
    assert_int_equal(h_call(f->peer, &a.req), KVC_OK);
    free(a.q);
    a_stop(f);
}

/* So is what the arithmetic takes for itself: what is let go first would do for all but that. */
static void test_scratch(void **state)
{
    enum { PICKS = 20000 };
    static const uint32_t many[PICKS];
    a_server *f = *state;
    a_shape s = a_plain;
    a_ask a;
    kvs_buffer *held[8192];
    uint32_t n = 0, n_big;
    s.n_q = 4;
    a_start(f, &s, N_BLOCKS);
    kvs_buffers *pool = &f->h.server->buffers;
    a_ask_init(&a, f, &s, many, NULL, PICKS);
    assert_int_equal(h_call(f->peer, &a.req), KVC_OK);
    assert_true(all_back(f));
    while (n < 4096 && kvs_buffer_get(pool, 1u << 20, &held[n]) == KVC_OK)
        n++;
    n_big = n;
    kvs_buffer_release(held[--n]);
    n_big = n;
    while (n < 8192 && kvs_buffer_get(pool, 16u << 10, &held[n]) == KVC_OK)
        n++;
    assert_true(n_big > 8 && n > n_big + 8 && n < 8192);
    kvs_buffer_release(held[0]); /* for the lists; 128 KiB for the answer */
    for (int i = 0; i < 8; i++)
        kvs_buffer_release(held[--n]);
    assert_int_equal(h_call(f->peer, &a.req), KVC_AGAIN);
    assert_non_null(strstr(f->peer->xfer.detail, "to attend with"));
    assert_true(idle(f));
    kvs_buffer_release(held[1]);
    kvs_buffer_release(held[2]);
    kvs_buffer_release(held[3]);
    assert_int_equal(h_call(f->peer, &a.req), KVC_OK);
    while (n > 4)
        kvs_buffer_release(held[--n]);
    free(a.q);
    a_stop(f);
}

/* Who has gone is noticed between two groups: what is left of the work is not done. How long all of
 * it takes is measured, so that the deadline passes in the middle on any machine. */
static void test_deadline(void **state)
{
    enum { GROUPS = 15, PICKS = 4096 };
    static const uint32_t many[PICKS];
    static kvc_row_group groups[GROUPS];
    static kvc_attend_query queries[GROUPS];
    a_server *f = *state;
    a_shape s = a_plain;
    a_ask a;
    s.n_q = KVC_MAX_ATTEND_QUERIES;
    s.o_dtype = KVC_DTYPE_BF16;
    a_start(f, &s, N_BLOCKS);
    a_ask_init(&a, f, &s, many, NULL, PICKS);
    for (uint32_t g = 0; g < GROUPS; g++) {
        groups[g] = a.groups[0];
        queries[g] = a.queries[0];
        queries[g].same_q = g > 0;
    }
    a.req.u.fetch_rows.n_groups = GROUPS;
    a.req.u.fetch_rows.groups = groups;
    a.req.u.fetch_rows.queries = queries;
    uint64_t attended = kvc_metric_get(KVC_M_rows_attended), began_ns = kvc_now_ns();
    assert_int_equal(h_call(f->peer, &a.req), KVC_OK);
    uint64_t most_ns = kvc_now_ns() - began_ns;
    attended += GROUPS * PICKS;
    assert_int_equal(kvc_metric_get(KVC_M_rows_attended), attended);
    kvc_status status = KVC_OK;
    for (uint64_t part = 4; status == KVC_OK && part <= 4096; part *= 2) {
        f->peer->timeout_ns = most_ns / part + 1;
        status = h_call(f->peer, &a.req);
        attended += status == KVC_OK ? GROUPS * PICKS : 0;
    }
    assert_int_equal(status, KVC_TIMED_OUT);
    assert_true(idle(f));
    assert_int_equal(kvc_metric_get(KVC_M_rows_attended), attended);
    free(a.q);
    a_stop(f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_load, a_setup, a_teardown),
        cmocka_unit_test_setup_teardown(test_scratch, a_setup, a_teardown),
        cmocka_unit_test_setup_teardown(test_memory, a_setup, a_teardown),
        cmocka_unit_test_setup_teardown(test_deadline, a_setup, a_teardown),
    };
    return cmocka_run_group_tests_name("attend load", tests, NULL, NULL);
}
