/*
 * model_test.c: random operations against one server and a plain map; the seed is printed.
 *
 * The model says what must hold whatever is evicted: a row that is found has the right bytes; a
 * value that was never put (or acknowledged) is never found; EXISTS only for what was put; a value
 * that fits both tiers is not lost. argv[1]: seed, argv[2]: operations.
 */
#include "harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define ROW       256u
#define N_BLOCKS  120u
#define N_PARTS   3u
#define N_HANDLES 8u

static uint64_t seed, seed0;
static uint32_t n_ops = 3000;

typedef struct model {
    h_server h;
    h_peer *peer;
    h_schema schema;
    char dir[256];
    bool lmdb, roomy; /* roomy: everything fits, so nothing may be lost */
    bool put[N_BLOCKS][N_PARTS];
    bool durable[N_BLOCKS][N_PARTS];
    struct {
        uint64_t handle;
        uint32_t first, n;
    } contexts[N_HANDLES];
} model;

static uint32_t below(uint32_t n)
{
    return (uint32_t)(h_random(&seed) % n);
}

static void connect_model(model *m)
{
    h_server_start(&m->h);
    m->peer = h_connect(kvs_server_uri(m->h.server, 0), "default");
    assert_int_equal(h_register(m->peer, &m->schema), KVC_OK);
}

static void op_put(model *m)
{
    uint32_t parts[N_PARTS], n = 1 + below(N_PARTS), b = below(N_BLOCKS), at = below(N_PARTS);
    kvc_promise promise = m->lmdb && below(8) == 0 ? KVC_PROMISE_DURABLE : KVC_PROMISE_MEMORY;
    for (uint32_t i = 0; i < n; i++)
        parts[i] = 10 * ((at + i) % N_PARTS);
    assert_int_equal(h_put(m->peer, &m->schema, b, parts, n, promise), KVC_OK);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t p = parts[i] / 10;
        int8_t status = m->peer->status[i];
        if (status == KVC_EXISTS && !m->put[b][p])
            fail_msg("block %u part %u exists, but was never put", b, p);
        if (status == KVC_OK && m->put[b][p] && m->roomy)
            fail_msg("block %u part %u was lost", b, p);
        if (status != KVC_OK && status != KVC_EXISTS && status != KVC_AGAIN)
            fail_msg("put: status %d", status);
        if (status == KVC_OK || status == KVC_EXISTS) {
            m->put[b][p] = true;
            m->durable[b][p] = m->durable[b][p] || promise == KVC_PROMISE_DURABLE;
        }
    }
}

static void op_open(model *m)
{
    uint32_t i = below(N_HANDLES);
    if (m->contexts[i].handle)
        assert_int_equal(h_close(m->peer, m->contexts[i].handle), KVC_OK);
    m->contexts[i].first = below(N_BLOCKS);
    m->contexts[i].n = below(N_BLOCKS - m->contexts[i].first) + 1;
    assert_int_equal(h_open(m->peer, &m->schema, m->contexts[i].first, m->contexts[i].n, 0,
                            &m->contexts[i].handle),
                     KVC_OK);
}

static void op_extend(model *m)
{
    uint32_t i = below(N_HANDLES);
    uint32_t end = m->contexts[i].first + m->contexts[i].n;
    if (!m->contexts[i].handle || end == N_BLOCKS)
        return;
    uint32_t n = 1 + below(N_BLOCKS - end);
    assert_int_equal(h_extend(m->peer, m->contexts[i].handle, m->contexts[i].n, end, n), KVC_OK);
    m->contexts[i].n += n;
}

static bool is_missing(const model *m, uint32_t i)
{
    for (uint32_t k = 0; k < m->peer->n_missing; k++)
        if (m->peer->missing[k].index == i)
            return true;
    return false;
}

static void op_fetch(model *m)
{
    uint32_t i = below(N_HANDLES), picks[256], n = 1 + below(256), p = below(N_PARTS), at = 0;
    if (!m->contexts[i].handle)
        return;
    uint32_t tokens = m->contexts[i].n * H_TOKENS, run = below(4) == 0;
    for (uint32_t k = 0; k < n; k++)
        picks[k] = run && k ? (picks[k - 1] + 1) % tokens : below(tokens + 3);
    kvc_status status = h_fetch(m->peer, m->contexts[i].handle, 10 * p, picks, n);
    if (status != KVC_OK)
        fail_msg("fetch: %s %s", kvc_status_name(status), m->peer->xfer.detail);
    for (uint32_t k = 0; k < n; k++) {
        uint32_t b = m->contexts[i].first + picks[k] / H_TOKENS;
        bool inside = picks[k] < tokens;
        if (is_missing(m, k)) {
            if (inside && m->put[b][p] && m->roomy)
                fail_msg("block %u part %u was lost", b, p);
            continue;
        }
        if (!inside || !m->put[b][p])
            fail_msg("pick %u of block %u part %u was never put", picks[k], b, p);
        if (!h_row_is(b, 10 * p, picks[k] % H_TOKENS, ROW, m->peer->data + at))
            fail_msg("pick %u of block %u part %u has other bytes", picks[k], b, p);
        at += ROW;
    }
    assert_int_equal(at, m->peer->data_bytes);
}

static void op_match(model *m)
{
    uint32_t first = below(N_BLOCKS), n = below(N_BLOCKS - first) + 1, hits, want = 0;
    assert_int_equal(h_match(m->peer, &m->schema, first, n, NULL, 0, &hits), KVC_OK);
    while (want < n && m->put[first + want][0] && m->put[first + want][1] &&
           m->put[first + want][2])
        want++;
    if (m->roomy ? hits != want : hits > want)
        fail_msg("match from %u: %u hits, the model has %u", first, hits, want);
}

static void op_restart(model *m)
{
    bool flush = below(2);
    h_disconnect(m->peer);
    h_server_stop(&m->h, flush);
    connect_model(m);
    memset(m->contexts, 0, sizeof(m->contexts));
    for (uint32_t b = 0; b < N_BLOCKS; b++) {
        for (uint32_t p = 0; p < N_PARTS; p++) {
            uint32_t hits, part = 10 * p;
            assert_int_equal(h_match(m->peer, &m->schema, b, 1, &part, 1, &hits), KVC_OK);
            if (hits && !m->put[b][p])
                fail_msg("block %u part %u appeared", b, p);
            if (!hits && m->put[b][p] && m->roomy && (flush || m->durable[b][p]))
                fail_msg("block %u part %u did not survive", b, p);
            m->put[b][p] = hits;
            m->durable[b][p] = hits;
        }
    }
}

static void run_model(bool lmdb, uint64_t dram_bytes, bool roomy)
{
    model *m = calloc(1, sizeof(*m));
    seed = seed0;
    h_server_init(&m->h);
    h_schema_init(&m->schema, "model", N_PARTS, ROW, false);
    m->lmdb = lmdb;
    m->roomy = roomy;
    m->h.settings.dram_bytes = dram_bytes;
    if (lmdb) {
        h_temp_dir(m->dir);
        m->h.settings.lmdb_path = m->dir;
        m->h.settings.lmdb_bytes = 64u << 20;
    }
    connect_model(m);
    for (uint32_t i = 0; i < n_ops; i++) {
        uint32_t op = below(100);
        if (op < 40)
            op_put(m);
        else if (op < 48)
            op_open(m);
        else if (op < 55)
            op_extend(m);
        else if (op < 60)
            op_match(m);
        else if (op == 60 && lmdb && below(10) == 0)
            op_restart(m);
        else
            op_fetch(m);
        if (i % 16 == 0)
            h_check_caps(&m->h);
    }
    h_disconnect(m->peer);
    h_server_fini(&m->h);
    if (lmdb)
        h_remove_dir(m->dir);
    free(m);
}

static void test_dram_roomy(void **state)
{
    (void)state;
    run_model(false, 64u << 20, true);
}

static void test_dram_small(void **state)
{
    (void)state;
    run_model(false, 40u * H_TOKENS * ROW, false);
}

static void test_both_tiers(void **state)
{
    (void)state;
    run_model(true, 40u * H_TOKENS * ROW, true);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_dram_roomy),
        cmocka_unit_test(test_dram_small),
#ifdef KVASIR_LMDB
        cmocka_unit_test(test_both_tiers),
#endif
    };
    (void)test_both_tiers;
    seed0 = argc > 1 ? strtoull(argv[1], NULL, 0) : (uint64_t)time(NULL) * 2654435761u + 1;
    if (argc > 2)
        n_ops = (uint32_t)strtoul(argv[2], NULL, 0);
    printf("seed %llu\n", (unsigned long long)seed0);
    fflush(stdout);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
