/*
 * model_threads_test.c: random operations of several clients at once against one server and a plain
 * map; the seed is printed.
 *
 * What holds in any order of events, whatever is evicted: a row that is found has the right bytes,
 * and somebody tried to put it before; EXISTS only where somebody else tried too; without eviction
 * from the last tier a value that nobody may erase is taken once, never lost after its
 * acknowledgement, and a durable one is there after a stop that writes nothing behind. Some calls
 * have deadlines too short to be met: they leave a try without an acknowledgement. Caps are
 * measured from outside meanwhile.
 *
 * argv[1]: seed, argv[2]: operations of each client; KVASIR_MODEL_OPS replaces the latter's
 * default.
 */
#include "harness.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define ROW       256u
#define N_BLOCKS  96u
#define N_PARTS   3u
#define N_CLIENTS 5u
#define N_PICKS   128u
#define SHORT_NS  300000u

static uint64_t seed0;
static uint32_t n_ops = 600;

typedef struct cell {
    atomic_uint tries, taken;
    atomic_bool acked, durable;
} cell;

typedef struct model {
    h_server h;
    h_schema schema;
    char dir[256];
    bool roomy; /* no value is ever evicted from its last tier */
    cell cells[N_BLOCKS][N_PARTS];
    uint64_t shared;             /* a context that all extend and read */
    atomic_uint shared_blocks;   /* it has at least so many */
    atomic_uint n_running;       /* clients */
    atomic_uint n_found, n_late; /* rows; calls that missed their deadline */
    atomic_bool failed;
    char why[256]; /* the first failure's */
} model;

typedef struct client {
    model *m;
    kvc_thread thread;
    h_peer *peer;
    uint64_t seed, long_ns;
    uint64_t context; /* its own; 0: none */
    uint32_t first, n;
} client;

static uint32_t below(client *c, uint32_t n)
{
    return (uint32_t)(h_random(&c->seed) % n);
}

static void fail_at(client *c, const char *what, uint32_t b, uint32_t p)
{
    if (!atomic_exchange(&c->m->failed, true))
        snprintf(c->m->why, sizeof(c->m->why), "block %u part %u: %s", b, p, what);
}

/* A status that is no answer to the question: too late, or come again. */
static bool no_answer(client *c, kvc_status status, const char *what)
{
    if (status == KVC_OK)
        return false;
    atomic_fetch_add(&c->m->n_late, status == KVC_TIMED_OUT);
    if (status != KVC_TIMED_OUT && status != KVC_AGAIN)
        fail_at(c, what, (uint32_t)-status, 0);
    return true;
}

/* Every eighth block may be erased at any time: of those nothing is sure but their bytes. */
static bool may_be_erased(uint32_t b)
{
    return b % 8 == 7;
}

/* ---- operations ------------------------------------------------------------------------------ */

static void judge_put(client *c, uint32_t b, uint32_t p, int8_t status, bool durable)
{
    cell *at = &c->m->cells[b][p];
    if (status == KVC_AGAIN)
        return;
    if (status != KVC_OK && status != KVC_EXISTS)
        fail_at(c, "the put failed", b, p);
    if (status == KVC_EXISTS && atomic_load(&at->tries) < 2)
        fail_at(c, "it exists, but nobody else tried to put it", b, p);
    if (status == KVC_OK && atomic_fetch_add(&at->taken, 1) > 0 && c->m->roomy && !may_be_erased(b))
        fail_at(c, "it was taken twice", b, p);
    atomic_store(&at->acked, true);
    if (durable)
        atomic_store(&at->durable, true);
}

static void op_put(client *c)
{
    uint32_t parts[N_PARTS], n = 1 + below(c, N_PARTS), b = below(c, N_BLOCKS);
    uint32_t at = below(c, N_PARTS);
    bool durable = c->m->dir[0] && below(c, 6) == 0;
    for (uint32_t i = 0; i < n; i++) {
        parts[i] = 10 * ((at + i) % N_PARTS);
        atomic_fetch_add(&c->m->cells[b][parts[i] / 10].tries, 1);
    }
    kvc_status status = h_put(c->peer, &c->m->schema, b, parts, n,
                              durable ? KVC_PROMISE_DURABLE : KVC_PROMISE_MEMORY);
    if (no_answer(c, status, "(a status) from PutBlocks"))
        return;
    for (uint32_t i = 0; i < n; i++)
        judge_put(c, b, parts[i] / 10, c->peer->status[i], durable);
}

/* picks are rows of blocks from first on, of part p; must: acknowledged before the fetch began. */
static void judge_rows(client *c, uint32_t first, uint32_t p, const uint32_t *picks,
                       const bool *must)
{
    uint32_t k = 0;
    uint64_t at = 0;
    for (uint32_t i = 0; i < N_PICKS; i++) {
        uint32_t b = first + picks[i] / H_TOKENS;
        if (k < c->peer->n_missing && c->peer->missing[k].index == i) {
            if (c->peer->missing[k++].status == KVC_NOT_FOUND && must[i])
                fail_at(c, "it was lost", b, p);
            continue;
        }
        if (b >= N_BLOCKS || atomic_load(&c->m->cells[b][p].tries) == 0)
            fail_at(c, "it was found, but never put", b, p);
        else if (!h_row_is(b, 10 * p, picks[i] % H_TOKENS, ROW, c->peer->data + at))
            fail_at(c, "it has other bytes", b, p);
        at += ROW;
        atomic_fetch_add(&c->m->n_found, 1);
    }
    if (at != c->peer->data_bytes)
        fail_at(c, "the rows do not add up", first, p);
}

static void op_fetch(client *c)
{
    bool shared = below(c, 2), run = below(c, 4) == 0, must[N_PICKS];
    uint32_t picks[N_PICKS], p = below(c, N_PARTS), first = shared ? 0 : c->first;
    uint32_t n = shared ? atomic_load(&c->m->shared_blocks) : c->n;
    uint64_t context = shared ? c->m->shared : c->context;
    if (!context || !n)
        return;
    for (uint32_t i = 0; i < N_PICKS; i++) {
        picks[i] = run && i ? (picks[i - 1] + 1) % (n * H_TOKENS) : below(c, n * H_TOKENS);
        must[i] = c->m->roomy && !may_be_erased(first + picks[i] / H_TOKENS) &&
                  atomic_load(&c->m->cells[first + picks[i] / H_TOKENS][p].acked);
    }
    kvc_status status = h_fetch(c->peer, context, 10 * p, picks, N_PICKS);
    if (!no_answer(c, status, "(a status) from FetchRows"))
        judge_rows(c, first, p, picks, must);
}

static bool all_acked(const model *m, uint32_t b)
{
    bool all = !may_be_erased(b);
    for (uint32_t p = 0; p < N_PARTS; p++)
        all = all && atomic_load(&m->cells[b][p].acked);
    return all;
}

static void op_match(client *c)
{
    uint32_t first = below(c, N_BLOCKS), n = below(c, N_BLOCKS - first) + 1, hits, least = 0;
    while (c->m->roomy && least < n && all_acked(c->m, first + least))
        least++;
    kvc_status status = h_match(c->peer, &c->m->schema, first, n, NULL, 0, &hits);
    if (no_answer(c, status, "(a status) from MatchPrefix"))
        return;
    if (hits < least)
        fail_at(c, "it was acknowledged and does not match", first + hits, 0);
    for (uint32_t b = first; b < first + hits; b++)
        for (uint32_t p = 0; p < N_PARTS; p++)
            if (atomic_load(&c->m->cells[b][p].tries) == 0)
                fail_at(c, "it matches, but was never put", b, p);
}

static void op_reopen(client *c)
{
    if (c->context && no_answer(c, h_close(c->peer, c->context), "(a status) from CloseContext"))
        return;
    c->first = below(c, N_BLOCKS);
    c->n = below(c, N_BLOCKS - c->first) + 1;
    kvc_status status = h_open(c->peer, &c->m->schema, c->first, c->n, 0, &c->context);
    (void)no_answer(c, status, "(a status) from OpenContext");
}

/* Two may append the same block at once: the second finds it there. */
static void op_extend(client *c)
{
    uint32_t have = atomic_load(&c->m->shared_blocks);
    if (have == N_BLOCKS)
        return;
    kvc_status status = h_extend(c->peer, c->m->shared, have, have, 1);
    if (!no_answer(c, status, "(a status) from ExtendContext"))
        atomic_compare_exchange_strong(&c->m->shared_blocks, &have, have + 1);
}

static void op_erase(client *c)
{
    kvc_digest digest = h_digest(below(c, N_BLOCKS / 8) * 8 + 7);
    kvc_request req = {.method = KVC_ERASE};
    req.u.erase.schema = c->m->schema.digest;
    req.u.erase.digests = &digest;
    req.u.erase.n_digests = 1;
    (void)no_answer(c, h_call(c->peer, &req), "(a status) from Erase");
}

static void op_hold(client *c)
{
    kvc_request req = {.method = KVC_HOLD};
    req.u.hold.context = c->context;
    req.u.hold.ttl_ms = 50; /* for where the release is too late */
    kvc_status status = h_call(c->peer, &req);
    if (status == KVC_NO_SPACE || no_answer(c, status, "(a status) from Hold"))
        return;
    uint64_t handle = c->peer->xfer.reply.u.hold.hold;
    req = (kvc_request){.method = KVC_RELEASE};
    req.u.release.hold = handle;
    status = h_call(c->peer, &req);
    if (status != KVC_NOT_FOUND)
        (void)no_answer(c, status, "(a status) from Release");
}

static void op_prefetch(client *c)
{
    kvc_request req = {.method = KVC_PREFETCH};
    req.u.prefetch.context = c->context;
    req.u.prefetch.tier = KVC_TIER_DRAM;
    (void)no_answer(c, h_call(c->peer, &req), "(a status) from Prefetch");
}

static void op_truncate(client *c)
{
    kvc_request req = {.method = KVC_TRUNCATE_CONTEXT};
    req.u.truncate_context.context = c->context;
    req.u.truncate_context.n_blocks = 1 + below(c, c->n);
    if (no_answer(c, h_call(c->peer, &req), "(a status) from TruncateContext"))
        c->context = 0; /* cut or not: it runs out by itself */
    c->n = req.u.truncate_context.n_blocks;
}

/* The twin is read from then on. */
static void op_fork(client *c)
{
    kvc_request req = {.method = KVC_FORK_CONTEXT};
    req.u.fork_context.context = c->context;
    if (no_answer(c, h_call(c->peer, &req), "(a status) from ForkContext"))
        return;
    uint64_t old = c->context;
    c->context = c->peer->xfer.reply.u.fork_context.context;
    (void)no_answer(c, h_close(c->peer, old), "(a status) from CloseContext");
}

static void op_stream(client *c)
{
    uint32_t picks[N_PICKS], p = below(c, N_PARTS);
    bool must[N_PICKS];
    kvc_row_group group = {
        .context = c->context, .part = 10 * p, .picks = picks, .n_picks = N_PICKS};
    kvc_request req = {.method = KVC_FETCH_ROWS_STREAM};
    req.u.fetch_rows.groups = &group;
    req.u.fetch_rows.n_groups = 1;
    for (uint32_t i = 0; i < N_PICKS; i++) {
        uint32_t b = (picks[i] = below(c, c->n * H_TOKENS)) / H_TOKENS + c->first;
        must[i] = c->m->roomy && !may_be_erased(b) && atomic_load(&c->m->cells[b][p].acked);
    }
    if (!no_answer(c, h_call(c->peer, &req), "(a status) from FetchRowsStream"))
        judge_rows(c, c->first, p, picks, must);
}

/* What is done to a context of one's own, or to blocks that anybody may erase. */
static void op_other(client *c)
{
    static void (*const ops[])(client *) = {op_hold, op_prefetch, op_truncate, op_fork, op_stream};
    uint32_t op = below(c, 8);
    if (op >= 5)
        op_erase(c);
    else if (c->context)
        ops[op](c);
}

static void op_reconnect(client *c)
{
    h_disconnect(c->peer);
    c->peer = h_connect(kvs_server_uri(c->m->h.server, 0), "default");
}

static void run_client(void *arg)
{
    client *c = arg;
    for (uint32_t i = 0; i < n_ops && !atomic_load(&c->m->failed); i++) {
        uint32_t op = below(c, 100);
        bool hurried = below(c, 10) == 0 && op < 85;
        c->peer->timeout_ns = hurried ? SHORT_NS : c->long_ns;
        if (op < 32)
            op_put(c);
        else if (op < 75)
            op_fetch(c);
        else if (op < 85)
            op_match(c);
        else if (op < 89)
            op_reopen(c);
        else if (op < 93)
            op_other(c);
        else if (op < 98)
            op_extend(c);
        else
            op_reconnect(c);
        c->peer->timeout_ns = c->long_ns;
    }
    atomic_fetch_sub(&c->m->n_running, 1);
}

/* ---- runs ------------------------------------------------------------------------------------ */

static void run_clients(model *m)
{
    static client clients[N_CLIENTS];
    struct timespec nap = {.tv_nsec = 5000000};
    h_peer *peer = h_connect(kvs_server_uri(m->h.server, 0), "default");
    assert_int_equal(h_register(peer, &m->schema), KVC_OK);
    assert_int_equal(h_open(peer, &m->schema, 0, 1, 0, &m->shared), KVC_OK);
    atomic_store(&m->shared_blocks, 1);
    atomic_store(&m->n_running, N_CLIENTS);
    for (uint32_t i = 0; i < N_CLIENTS; i++) {
        clients[i] = (client){.m = m, .seed = seed0 * 31 + i + 1};
        clients[i].peer = h_connect(kvs_server_uri(m->h.server, 0), "default");
        clients[i].long_ns = clients[i].peer->timeout_ns;
        assert_int_equal(kvc_thread_start(&clients[i].thread, "client", run_client, &clients[i]),
                         KVC_OK);
    }
    while (atomic_load(&m->n_running)) {
        h_check_caps(&m->h);
        nanosleep(&nap, NULL);
    }
    for (uint32_t i = 0; i < N_CLIENTS; i++) {
        kvc_thread_join(&clients[i].thread);
        h_disconnect(clients[i].peer);
    }
    h_disconnect(peer);
    if (atomic_load(&m->failed))
        fail_msg("%s", m->why);
}

/* What a stop must have kept is there afterwards, bit for bit; what was never tried is not. */
static void check_restart(model *m, bool flush)
{
    static uint32_t picks[H_TOKENS];
    uint64_t context;
    h_server_stop(&m->h, flush);
    h_server_start(&m->h);
    h_peer *peer = h_connect(kvs_server_uri(m->h.server, 0), "default");
    for (uint32_t i = 0; i < H_TOKENS; i++)
        picks[i] = i;
    for (uint32_t b = 0; b < N_BLOCKS; b++) {
        for (uint32_t p = 0; p < N_PARTS; p++) {
            const cell *at = &m->cells[b][p];
            uint32_t hits, part = 10 * p;
            assert_int_equal(h_match(peer, &m->schema, b, 1, &part, 1, &hits), KVC_OK);
            if (!hits && !may_be_erased(b) && atomic_load(flush ? &at->acked : &at->durable))
                fail_msg("block %u part %u did not survive", b, p);
            if (!hits)
                continue;
            assert_true(atomic_load(&at->tries) > 0);
            assert_int_equal(h_open(peer, &m->schema, b, 1, 0, &context), KVC_OK);
            h_fetch_equal(peer, &m->schema, context, b, part, picks, H_TOKENS);
            assert_int_equal(h_close(peer, context), KVC_OK);
        }
    }
    h_disconnect(peer);
}

static void run_model(bool lmdb, uint64_t dram_bytes, bool roomy)
{
    model *m = calloc(1, sizeof(*m));
    h_server_init(&m->h);
    h_schema_init(&m->schema, "model", N_PARTS, ROW, false);
    m->roomy = roomy;
    m->h.settings.dram_bytes = dram_bytes;
    if (lmdb) {
        h_temp_dir(m->dir);
        m->h.settings.lmdb_path = m->dir;
        m->h.settings.lmdb_bytes = roomy ? 64u << 20 : 4u << 20;
    }
    h_server_start(&m->h);
    run_clients(m);
    printf("%u rows found, %u calls too late\n", atomic_load(&m->n_found), atomic_load(&m->n_late));
    assert_true(atomic_load(&m->n_found) > 0);
    if (lmdb && roomy)
        check_restart(m, seed0 % 2);
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

static void test_both_roomy(void **state)
{
    (void)state;
    run_model(true, 40u * H_TOKENS * ROW, true);
}

static void test_both_small(void **state)
{
    (void)state;
    run_model(true, 40u * H_TOKENS * ROW, false);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_dram_roomy),
        cmocka_unit_test(test_dram_small),
#ifdef KVASIR_LMDB
        cmocka_unit_test(test_both_roomy),
        cmocka_unit_test(test_both_small),
#endif
    };
    (void)test_both_roomy;
    (void)test_both_small;
    const char *ops = argc > 2 ? argv[2] : getenv("KVASIR_MODEL_OPS");
    seed0 = argc > 1 ? strtoull(argv[1], NULL, 0) : (uint64_t)time(NULL) * 2654435761u + 1;
    if (ops)
        n_ops = (uint32_t)strtoul(ops, NULL, 0);
    printf("seed %llu, %u operations of each client\n", (unsigned long long)seed0, n_ops);
    fflush(stdout);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
