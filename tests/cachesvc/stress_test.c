/*
 * stress_test.c: many threads put, read, extend and drop the same few blocks at once, in a server
 * whose dram is far too small; made for the thread sanitizer. Over inproc.
 */
#include "harness.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ROW       256u
#define N_THREADS 6u
#define N_BLOCKS  64u

typedef struct shared {
    h_server h;
    h_schema schema;
    char dir[256];
    uint32_t n_ops;
    atomic_uint wrong, failed, puts_ok, exist, again, rows;
} shared;

typedef struct worker {
    shared *s;
    uint64_t seed;
    kvc_thread thread;
    h_peer *peer;
} worker;

static void put_some(worker *w, uint64_t b)
{
    const uint32_t parts[] = {0, 10};
    kvc_promise promise =
        w->s->dir[0] && h_random(&w->seed) % 4 == 0 ? KVC_PROMISE_DURABLE : KVC_PROMISE_MEMORY;
    if (h_put(w->peer, &w->s->schema, b, parts, 2, promise) != KVC_OK) {
        atomic_fetch_add(&w->s->failed, 1);
        return;
    }
    for (uint32_t i = 0; i < 2; i++) {
        if (w->peer->status[i] == KVC_OK)
            atomic_fetch_add(&w->s->puts_ok, 1);
        else if (w->peer->status[i] == KVC_EXISTS)
            atomic_fetch_add(&w->s->exist, 1);
        else if (w->peer->status[i] == KVC_AGAIN)
            atomic_fetch_add(&w->s->again, 1);
        else
            atomic_fetch_add(&w->s->failed, 1);
    }
}

static void fetch_some(worker *w, uint64_t context, uint64_t first, uint32_t n_blocks)
{
    uint32_t picks[128], at = 0, part = h_random(&w->seed) % 2 ? 10 : 0, k = 0;
    bool run = h_random(&w->seed) % 2;
    for (uint32_t i = 0; i < 128; i++)
        picks[i] =
            run && i ? picks[i - 1] + 1 : (uint32_t)(h_random(&w->seed) % (n_blocks * H_TOKENS));
    kvc_status status = h_fetch(w->peer, context, part, picks, 128);
    if (status != KVC_OK) {
        if (status != KVC_AGAIN)
            atomic_fetch_add(&w->s->failed, 1);
        return;
    }
    for (uint32_t i = 0; i < 128; i++) {
        if (k < w->peer->n_missing && w->peer->missing[k].index == i) {
            k++;
            continue;
        }
        if (!h_row_is(first + picks[i] / H_TOKENS, part, picks[i] % H_TOKENS, ROW,
                      w->peer->data + at))
            atomic_fetch_add(&w->s->wrong, 1);
        atomic_fetch_add(&w->s->rows, 1);
        at += ROW;
    }
}

static void work(void *arg)
{
    worker *w = arg;
    uint64_t context = 0, first = 0;
    uint32_t n = 0, hits;
    for (uint32_t i = 0; i < w->s->n_ops; i++) {
        switch (h_random(&w->seed) % 8) {
        case 0:
        case 1:
        case 2:
            put_some(w, h_random(&w->seed) % N_BLOCKS);
            break;
        case 3:
            if (context)
                (void)h_close(w->peer, context);
            first = h_random(&w->seed) % (N_BLOCKS - 10);
            n = 5;
            if (h_open(w->peer, &w->s->schema, first, n, 0, &context) != KVC_OK)
                atomic_fetch_add(&w->s->failed, 1);
            break;
        case 4:
            if (context && n < 10 && h_extend(w->peer, context, n, first + n, 1) == KVC_OK)
                n++;
            (void)h_match(w->peer, &w->s->schema, 0, N_BLOCKS, NULL, 0, &hits);
            break;
        default:
            if (context)
                fetch_some(w, context, first, n);
        }
    }
    if (context)
        (void)h_close(w->peer, context);
}

static void run_stress(bool lmdb, uint32_t n_ops)
{
    shared *s = calloc(1, sizeof(*s));
    worker workers[N_THREADS] = {0};
    h_server_init(&s->h);
    h_schema_init(&s->schema, "model", 2, ROW, false);
    s->n_ops = n_ops;
    s->h.settings.dram_bytes = 20u * H_TOKENS * ROW;
    s->h.settings.disk_threads = 3;
    if (lmdb) {
        h_temp_dir(s->dir);
        s->h.settings.lmdb_path = s->dir;
        s->h.settings.lmdb_bytes = 64u << 20;
    }
    h_server_start(&s->h);
    for (uint32_t i = 0; i < N_THREADS; i++) {
        workers[i] = (worker){.s = s, .seed = 77 + i};
        workers[i].peer = h_connect(kvs_server_uri(s->h.server, 0), "default");
    }
    assert_int_equal(h_register(workers[0].peer, &s->schema), KVC_OK);
    for (uint32_t i = 0; i < N_THREADS; i++)
        assert_int_equal(kvc_thread_start(&workers[i].thread, "worker", work, &workers[i]), KVC_OK);
    for (uint32_t i = 0; i < N_THREADS; i++)
        kvc_thread_join(&workers[i].thread);
    for (uint32_t i = 0; i < N_THREADS; i++)
        h_disconnect(workers[i].peer);
    printf("puts %u, exist %u, again %u, rows %u\n", s->puts_ok, s->exist, s->again, s->rows);
    assert_int_equal(s->wrong, 0);
    assert_int_equal(s->failed, 0);
    assert_true(s->rows > 0 && s->puts_ok > 0);
    h_server_stop(&s->h, true);
    h_server_fini(&s->h);
    if (lmdb)
        h_remove_dir(s->dir);
    free(s);
}

static void test_dram(void **state)
{
    (void)state;
    run_stress(false, 2000);
}

static void test_both_tiers(void **state)
{
    (void)state;
    run_stress(true, 1000);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_dram),
#ifdef KVASIR_LMDB
        cmocka_unit_test(test_both_tiers),
#endif
    };
    (void)test_both_tiers;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
