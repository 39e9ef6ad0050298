/*
 * worker_chunks_ways_test.c: how chosen chunks come: as whole blocks where a chunk is one, as rows
 * else, the same bits; and by `auto` near the data or fetched, as a retrieval's queries and the
 * server's link have it.
 *
 * Servers in this process. Their handlers are wrapped to count requests, and the answers of one of
 * them to be slow in proportion to their bytes, as over a slow link.
 */
#include <math.h>
#include <stdatomic.h>
#include <time.h>

#include "base/metrics.h"
#include "chunk_rig.h"
#include "internal.h"
#include "request.h"
#include "servers.h"

enum { OUT = 64 };
#define LINK_NS  5000000u /* of an answer */
#define BYTE_NS  2000u    /* and of each of its bytes */
#define ATTEMPTS 4u       /* each over a link four times as slow */

static atomic_uint n_rows_asked, n_blocks_asked;
static _Atomic(const kvs_server *) slow;
static atomic_uint slowness = 1;

#define WRAP(name, counter)                                                                        \
    void __real_##name(kvs_server *server, kvt_call *call, const kvc_digest *tenant);              \
    void __wrap_##name(kvs_server *server, kvt_call *call, const kvc_digest *tenant);              \
    void __wrap_##name(kvs_server *server, kvt_call *call, const kvc_digest *tenant)               \
    {                                                                                              \
        atomic_fetch_add(&(counter), 1);                                                           \
        __real_##name(server, call, tenant);                                                       \
    }
WRAP(kvs_on_fetch_rows, n_rows_asked)
WRAP(kvs_on_fetch_blocks, n_blocks_asked)

void __real_kvs_answer(kvt_call *call, const kvc_reply *reply, const kvt_slice *slices,
                       uint32_t n_slices);
void __wrap_kvs_answer(kvt_call *call, const kvc_reply *reply, const kvt_slice *slices,
                       uint32_t n_slices);
void __wrap_kvs_answer(kvt_call *call, const kvc_reply *reply, const kvt_slice *slices,
                       uint32_t n_slices)
{
    uint64_t ns = LINK_NS;
    for (uint32_t i = 0; i < n_slices; i++)
        ns += slices[i].len_bytes * BYTE_NS;
    ns *= atomic_load(&slowness);
    const struct timespec nap = {.tv_sec = (time_t)(ns / 1000000000u),
                                 .tv_nsec = (long)(ns % 1000000000u)};
    if (call->user == atomic_load(&slow))
        (void)nanosleep(&nap, NULL);
    __real_kvs_answer(call, reply, slices, n_slices);
}

static int start(void **state)
{
    servers *s = calloc(1, sizeof(*s));
    assert_non_null(s);
    servers_start(s, 3);
    *state = s;
    return 0;
}

static int stop(void **state)
{
    atomic_store(&slow, NULL);
    servers_stop(*state);
    free(*state);
    return 0;
}

/* A worker over the first n servers (0: none), and a sequence whose chunks are there. */
static kvw_seq *open_over(chunk_rig *c, servers *s, uint32_t n, const char *way, uint32_t tokens)
{
    open_rig_by(c, "gca", KVK_F32, NULL, way);
    kvw_close(c->r.worker);
    c->r.opts.block_tokens = tokens;
    servers_use(s, &c->r, n);
    if (n != 0)
        rig_name_servers(&c->r);
    assert_ok(kvw_open(&c->r.opts, &c->r.worker));
    return offloaded(c);
}

/* What a worker that has all rows says of a query, over chunks that may leave others. */
static void resident_outputs(float out[CHUNKS][OUT])
{
    chunk_rig c;
    kvw_retriever *x = NULL;
    kvw_seq *seq = open_over(&c, NULL, 0, NULL, S);
    float q[OUT] = {1, -2};
    assert_ok(kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &x));
    for (uint32_t t = 0; t < CHUNKS; t++) {
        assert_ok(kvw_retrieve(x, c.queries[t], CHUNKS - 2));
        assert_ok(kvw_retriever_attend(x, q, 1, out[t]));
    }
    kvw_seq_destroy(seq);
    rig_close(&c.r);
}

/* One retrieval and so many calls; the result within a bound of the resident one. */
static void retrieve(const chunk_rig *c, kvw_retriever *x, uint32_t t, uint32_t calls,
                     const float want[OUT], double bound)
{
    float q[OUT] = {1, -2}, out[OUT];
    assert_ok(kvw_retrieve(x, c->queries[t], CHUNKS - 2));
    for (uint32_t i = 0; i < calls; i++) {
        assert_ok(kvw_retriever_attend(x, q, 1, out));
        for (uint32_t j = 0; j < OUT; j++)
            if (!(fabs((double)out[j] - (double)want[j]) <= bound))
                fail_msg("query %u, element %u: %g, not %g", t, j, (double)out[j], (double)want[j]);
    }
}

/* ---- whole blocks ---- */

static void blocks_are_the_rows(void **state)
{
    static const uint32_t counts[] = {1, 2, 3};
    float want[CHUNKS][OUT];
    resident_outputs(want);
    for (uint32_t i = 0; i < 6; i++) {
        uint32_t tokens = i < 3 ? S : 2 * S;
        chunk_rig c;
        kvw_retriever *x = NULL;
        kvw_seq *seq = open_over(&c, *state, counts[i % 3], "rows", tokens);
        assert_ok(kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &x));
        atomic_store(&n_rows_asked, 0);
        atomic_store(&n_blocks_asked, 0);
        for (uint32_t t = 0; t < CHUNKS; t++)
            retrieve(&c, x, t, 1, want[t], 0);
        /* a chunk that is a block comes as such, one that is half of one does not */
        assert_true((atomic_load(&n_blocks_asked) > 5) == (tokens == S));
        assert_true((atomic_load(&n_rows_asked) > 5) == (tokens != S));
        kvw_stats stats = stats_of(seq);
        assert_true(stats.misses > 5 * S);
        assert_int_equal(stats.rows_dram, stats.misses);
        assert_int_equal(stats.bytes_fetched, stats.misses * 256);
        kvw_seq_destroy(seq);
        rig_close(&c.r);
    }
}

static void a_block_that_is_gone_is_named(void **state)
{
    servers *s = *state;
    chunk_rig c;
    kvw_retriever *x = NULL;
    float q[OUT] = {1}, out[OUT];
    kvc_op op;
    kvw_seq *seq = open_over(&c, s, 1, "rows", S);
    assert_ok(kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &x));
    assert_ok(kvw_retrieve(x, c.queries[9], CHUNKS - 2));
    uint32_t lost = UINT32_MAX, n = 0;
    const uint32_t *ids = NULL;
    const float *scores = NULL, *weights = NULL;
    assert_ok(kvw_retriever_attend(x, q, 1, out));
    assert_ok(kvw_retrieved(x, &ids, &scores, &weights, &n));
    for (uint32_t i = 0; i < n; i++)
        lost = seq->blocks[ids[i]].buf == NULL ? ids[i] : lost;
    assert_int_not_equal(lost, UINT32_MAX);
    assert_ok(kvw_retrieve(x, c.queries[2], 1)); /* nothing of it stays */
    kvc_op_init(&op, NULL, NULL);
    assert_ok(kvc_erase(s->clients[0], kvw_schema_digest(c.r.worker), &seq->blocks[lost].digest, 1,
                        NULL, 0, NULL, 0, &op));
    assert_ok(kvc_op_wait(&op, 0));
    assert_ok(kvw_retrieve(x, c.queries[9], CHUNKS - 2));
    assert_status(kvw_retriever_attend(x, q, 1, out), KVC_NOT_FOUND);
    assert_non_null(strstr(kvw_last_error(), "64 of "));
    assert_status(kvw_retriever_attend(x, q, 1, out), KVC_INVALID);
    kvw_seq_destroy(seq);
    rig_close(&c.r);
}

/* Over shm: mapped blocks are read as rows, without a request; others come whole. */
static void mapped_chunks_need_no_request(void **state)
{
    static char listen[300];
    char dir[256];
    float want[CHUNKS][OUT];
    (void)state;
    resident_outputs(want);
    h_temp_dir(dir);
    (void)snprintf(listen, sizeof(listen), "shm://%s/chunks", dir);
    h_listen = listen;
    for (uint32_t mapped = 0; mapped < 2; mapped++) {
        servers s;
        chunk_rig c;
        kvw_retriever *x = NULL;
        servers_start(&s, 1);
        const kvc_map_opts opts = {.size_bytes = sizeof(opts), .all = mapped != 0};
        assert_ok(kvc_client_map_contexts(s.clients[0], &opts));
        kvw_seq *seq = open_over(&c, &s, 1, "shm", S);
        assert_ok(kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &x));
        atomic_store(&n_rows_asked, 0);
        atomic_store(&n_blocks_asked, 0);
        for (uint32_t t = 0; t < CHUNKS; t++)
            retrieve(&c, x, t, 1, want[t], 0);
        assert_true((atomic_load(&n_blocks_asked) > 5) == (mapped == 0));
        assert_int_equal(atomic_load(&n_rows_asked), 0);
        assert_int_equal(stats_of(seq).rows_dram, stats_of(seq).misses);
        kvw_seq_destroy(seq);
        rig_close(&c.r);
        servers_stop(&s);
    }
    h_listen = NULL;
    h_remove_dir(dir);
}

/* ---- auto ---- */

/* Retrievals until one has misses of the server; by which way they came. */
static bool goes_near(const chunk_rig *c, kvw_seq *seq, kvw_retriever *x, uint32_t server,
                      uint32_t calls, float want[CHUNKS][OUT])
{
    static uint32_t t;
    for (uint32_t i = 0; i < 2 * CHUNKS; i++) {
        kvw_server_stats before = server_stats_of(seq, server);
        t = (t + 7) % CHUNKS;
        retrieve(c, x, t, calls, want[t], 2e-5);
        kvw_server_stats now = server_stats_of(seq, server);
        assert_true(now.rows == before.rows || now.rows_near == before.rows_near);
        if (now.rows != before.rows || now.rows_near != before.rows_near)
            return now.rows_near != before.rows_near;
    }
    fail_msg("no chunk of server %u was ever missing", server);
    return false;
}

/* Whether retrievals go as `near` says, of whose queries the worker knows. */
static bool known_queries(servers *s, uint32_t n, float want[CHUNKS][OUT])
{
    static const bool near[] = {false, false, false, true, true, true, false};
    chunk_rig c;
    kvw_retriever *x = NULL;
    uint32_t server = n / 2, i = 0;
    atomic_store(&slow, s->h[server].server);
    kvw_seq *seq = open_over(&c, s, n, NULL, n == 1 ? S : 2 * S);
    assert_ok(kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &x));
    for (bool as_said = true; as_said && i < 7; i += as_said) {
        c.r.worker->opts.retrieval_queries = near[i] ? 1 : 64;
        as_said = goes_near(&c, seq, x, server, 1, want) == near[i];
    }
    kvw_seq_destroy(seq);
    rig_close(&c.r);
    return i == 7;
}

/* Unless they are known, they are those of the retrieval before: at first GCA's 64. */
static bool queries_before(servers *s, uint32_t n, float want[CHUNKS][OUT])
{
    static const uint32_t calls[] = {64, 64, 1, 1, 64, 1};
    static const bool near[] = {false, false, false, true, true, false};
    chunk_rig c;
    kvw_retriever *x = NULL;
    uint32_t i = 0;
    atomic_store(&slow, s->h[0].server);
    kvw_seq *seq = open_over(&c, s, n, NULL, S);
    assert_ok(kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &x));
    for (bool as_said = true; as_said && i < 6; i += as_said)
        as_said = goes_near(&c, seq, x, 0, calls[i], want) == near[i];
    kvw_seq_destroy(seq);
    rig_close(&c.r);
    return i == 6;
}

/* On a busy machine what is quick may be learnt as slow: then again, over a slower link. */
static void check_auto(uint32_t n, bool attempt(servers *s, uint32_t n, float want[CHUNKS][OUT]))
{
    float want[CHUNKS][OUT];
    bool good = false;
    resident_outputs(want);
    for (uint32_t i = 0; !good && i < ATTEMPTS; i++) {
        servers s;
        servers_start(&s, n);
        good = attempt(&s, n, want);
        atomic_store(&slow, NULL);
        servers_stop(&s);
        atomic_store(&slowness, atomic_load(&slowness) * 4);
    }
    atomic_store(&slowness, 1);
    assert_true(good);
}

static void known_queries_decide(void **state)
{
    (void)state;
    check_auto(1, known_queries);
    check_auto(3, known_queries); /* one of them slow */
}

static void the_last_retrieval_decides(void **state)
{
    (void)state;
    check_auto(1, queries_before);
}

/* Where partials may not be, it is said why. */
static void exact_chunks_are_fetched(void **state)
{
    servers *s = *state;
    float want[CHUNKS][OUT];
    chunk_rig c;
    kvw_retriever *x = NULL;
    resident_outputs(want);
    kvw_seq *seq = open_over(&c, s, 1, NULL, S);
    c.r.worker->opts.exact = 1;
    c.r.worker->opts.retrieval_queries = 1;
    assert_ok(kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &x));
    uint64_t why = kvc_metric_get(KVC_M_way_rows_exact);
    uint64_t all = kvc_metric_get(KVC_M_way_rows_requests);
    for (uint32_t t = 0; t < CHUNKS; t++)
        retrieve(&c, x, t, 1, want[t], 0);
    assert_int_equal(stats_of(seq).rows_near, 0);
    assert_true(kvc_metric_get(KVC_M_way_rows_exact) - why > 5);
    assert_int_equal(kvc_metric_get(KVC_M_way_rows_exact) - why,
                     kvc_metric_get(KVC_M_way_rows_requests) - all);
    kvw_seq_destroy(seq);
    rig_close(&c.r);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(blocks_are_the_rows, start, stop),
        cmocka_unit_test_setup_teardown(a_block_that_is_gone_is_named, start, stop),
        cmocka_unit_test(mapped_chunks_need_no_request),
        cmocka_unit_test(known_queries_decide),
        cmocka_unit_test(the_last_retrieval_decides),
        cmocka_unit_test_setup_teardown(exact_chunks_are_fetched, start, stop),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
