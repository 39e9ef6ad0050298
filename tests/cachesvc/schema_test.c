/*
 * schema_test.c: schemas that nobody uses go, those that somebody uses stay, also over a restart
 * and while clients register, put and open at once. Over inproc.
 */
#include "harness.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/metrics.h"

#define ROW       256u
#define N_CLIENTS 4u
#define N_SCHEMAS 6u

typedef struct fixture {
    h_server h;
    h_peer *peer;
    h_schema used, idle;
    char dir[256];
} fixture;

static void open_server(fixture *f)
{
    h_server_start(&f->h);
    f->peer = h_connect(kvs_server_uri(f->h.server, 0), "default");
}

static int setup(void **state)
{
    fixture *f = calloc(1, sizeof(*f));
    h_server_init(&f->h);
    f->h.settings.schema_grace_ns = 1;
#ifdef KVASIR_LMDB
    h_temp_dir(f->dir);
    f->h.settings.lmdb_path = f->dir;
    f->h.settings.lmdb_bytes = 64u << 20;
#endif
    h_schema_init(&f->used, "used", 1, ROW, false);
    h_schema_init(&f->idle, "idle", 1, ROW, false);
    open_server(f);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;
    h_disconnect(f->peer);
    h_server_fini(&f->h);
    if (f->dir[0])
        h_remove_dir(f->dir);
    free(f);
    return 0;
}

static bool is_known(fixture *f, const h_schema *schema)
{
    uint32_t hits;
    kvc_status status = h_match(f->peer, schema, 0, 1, NULL, 0, &hits);
    assert_true(status == KVC_OK || status == KVC_NOT_FOUND);
    return status == KVC_OK;
}

/* The server's own ticker may drop the schema between the two calls. */
static void register_and_put(fixture *f, const h_schema *schema)
{
    kvc_status status = KVC_NOT_FOUND;
    for (int i = 0; i < 100 && status == KVC_NOT_FOUND; i++) {
        assert_int_equal(h_register(f->peer, schema), KVC_OK);
        status = h_put1(f->peer, schema, 1, 0, KVC_PROMISE_MEMORY);
    }
    assert_int_equal(status, KVC_OK);
}

static void tick(fixture *f)
{
    struct timespec t = {.tv_nsec = 2000000};
    nanosleep(&t, NULL);
    kvs_server_tick(f->h.server);
}

static void test_idle_goes(void **state)
{
    fixture *f = *state;
    uint64_t before = kvc_metric_get(KVC_M_schemas_collected);
    register_and_put(f, &f->used);
    assert_int_equal(h_register(f->peer, &f->idle), KVC_OK);
    tick(f);
    assert_false(is_known(f, &f->idle));
    assert_true(is_known(f, &f->used));
    assert_true(kvc_metric_get(KVC_M_schemas_collected) > before);
    assert_int_equal(kvs_schemas_count(f->h.server->schemas), 1);
    assert_int_equal(h_put1(f->peer, &f->idle, 1, 0, KVC_PROMISE_MEMORY), KVC_NOT_FOUND);
    /* It can come back, under an id that was given before. */
    register_and_put(f, &f->idle);
    tick(f);
    assert_true(is_known(f, &f->idle));
    assert_int_equal(kvs_schemas_count(f->h.server->schemas), 2);
    h_disconnect(f->peer);
    h_server_stop(&f->h, true);
    open_server(f);
    assert_int_equal(is_known(f, &f->idle), f->dir[0] != 0);
}

static void test_stays_gone_after_a_restart(void **state)
{
    fixture *f = *state;
    assert_int_equal(h_register(f->peer, &f->idle), KVC_OK);
    tick(f);
    f->h.settings.schema_grace_ns = 0;
    h_disconnect(f->peer);
    h_server_stop(&f->h, true);
    open_server(f);
    assert_int_equal(kvs_schemas_count(f->h.server->schemas), 0);
    assert_int_equal(h_register(f->peer, &f->idle), KVC_OK); /* 0: never */
    tick(f);
    assert_true(is_known(f, &f->idle));
}

static void test_context_keeps_it(void **state)
{
    fixture *f = *state;
    uint64_t context;
    f->h.settings.schema_grace_ns = 1000000000;
    h_disconnect(f->peer);
    h_server_stop(&f->h, true);
    open_server(f);
    assert_int_equal(h_register(f->peer, &f->idle), KVC_OK);
    assert_int_equal(h_open(f->peer, &f->idle, 0, 0, 0, &context), KVC_OK); /* no block at all */
    struct timespec t = {.tv_sec = 1, .tv_nsec = 200000000};
    nanosleep(&t, NULL);
    kvs_server_tick(f->h.server);
    assert_int_equal(kvs_schemas_count(f->h.server->schemas), 1);
    assert_int_equal(h_extend(f->peer, context, 0, 0, 3), KVC_OK);
    assert_int_equal(h_close(f->peer, context), KVC_OK);
    kvs_server_tick(f->h.server);
    assert_int_equal(kvs_schemas_count(f->h.server->schemas), 1); /* it was in use a moment ago */
    nanosleep(&t, NULL);
    kvs_server_tick(f->h.server);
    assert_int_equal(kvs_schemas_count(f->h.server->schemas), 0);
}

/* ---- many at once ---------------------------------------------------------------------------- */

typedef struct crowd {
    fixture *f;
    h_schema schemas[N_SCHEMAS];
    atomic_uint n_running, n_wrong, n_put;
} crowd;

typedef struct client {
    crowd *c;
    kvc_thread thread;
    uint64_t seed;
} client;

/* Registers, puts and opens; each may find that the schema has just gone. */
static void run_client(void *arg)
{
    client *me = arg;
    crowd *c = me->c;
    h_peer *peer = h_connect(kvs_server_uri(c->f->h.server, 0), "default");
    for (uint32_t i = 0; i < 150; i++) {
        const h_schema *schema = &c->schemas[h_random(&me->seed) % N_SCHEMAS];
        bool put = schema == &c->schemas[0] && h_random(&me->seed) % 8 == 0;
        uint64_t b = h_random(&me->seed) % 32, context;
        uint32_t pick = 3;
        kvc_status status = h_register(peer, schema);
        if (status == KVC_OK && put) {
            status = h_put1(peer, schema, b, 0, KVC_PROMISE_MEMORY);
            atomic_fetch_add(&c->n_put, status == KVC_OK);
            status = status == KVC_EXISTS ? KVC_OK : status;
        }
        if (status == KVC_OK)
            status = h_open(peer, schema, b, 1, 0, &context);
        if (status == KVC_OK) {
            status = h_fetch(peer, context, 0, &pick, 1);
            if (status == KVC_OK && peer->n_missing == 0 && !h_row_is(b, 0, 3, ROW, peer->data))
                status = KVC_CORRUPT;
            if (h_close(peer, context) != KVC_OK)
                status = KVC_STALE_HANDLE;
        }
        if (status != KVC_OK && status != KVC_NOT_FOUND && status != KVC_AGAIN)
            atomic_fetch_add(&c->n_wrong, 1);
    }
    h_disconnect(peer);
    atomic_fetch_sub(&c->n_running, 1);
}

static void test_collected_in_use(void **state)
{
    fixture *f = *state;
    static crowd c;
    client clients[N_CLIENTS];
    uint64_t before = kvc_metric_get(KVC_M_schemas_collected);
    memset(&c, 0, sizeof(c));
    c.f = f;
    for (uint32_t i = 0; i < N_SCHEMAS; i++) {
        h_schema_init(&c.schemas[i], "crowd", 1, ROW, false);
        c.schemas[i].schema.tp_size = 1 + i;
        assert_int_equal(kvc_schema_digest(&c.schemas[i].schema, &c.schemas[i].digest), KVC_OK);
    }
    atomic_store(&c.n_running, N_CLIENTS);
    for (uint32_t i = 0; i < N_CLIENTS; i++) {
        clients[i] = (client){.c = &c, .seed = 99 + i};
        assert_int_equal(kvc_thread_start(&clients[i].thread, "client", run_client, &clients[i]),
                         KVC_OK);
    }
    while (atomic_load(&c.n_running))
        tick(f);
    for (uint32_t i = 0; i < N_CLIENTS; i++)
        kvc_thread_join(&clients[i].thread);
    assert_int_equal(atomic_load(&c.n_wrong), 0);
    assert_true(atomic_load(&c.n_put) > 0);
    assert_true(kvc_metric_get(KVC_M_schemas_collected) > before);
    tick(f);
    assert_int_equal(kvs_schemas_count(f->h.server->schemas), 1); /* the one with values */
    assert_true(is_known(f, &c.schemas[0]));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_idle_goes, setup, teardown),
        cmocka_unit_test_setup_teardown(test_stays_gone_after_a_restart, setup, teardown),
        cmocka_unit_test_setup_teardown(test_context_keeps_it, setup, teardown),
        cmocka_unit_test_setup_teardown(test_collected_in_use, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
