/*
 * opaque_model_test.c: random operations of several clients at once on opaque values, of none to
 * several pieces, against a plain map; the seed is printed.
 *
 * A key has two contents that clients try to put. What holds in any order of events, whatever is
 * evicted: a value that is found is one of them, whole, and somebody tried to put it; EXISTS only
 * where another put was tried. Without eviction from the last tier, of a key that nobody erases: a
 * put that was acknowledged is found from then on, what was found once is found again and never
 * the other content, and it outlives a stop that flushes; a value whose DURABLE put was taken
 * outlives one that does not. Every fourth key may be erased at any time.
 *
 * argv[1]: seed, argv[2]: operations of each client; KVASIR_MODEL_OPS replaces the latter's
 * default.
 */
#include "opaque_support.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define N_KEYS     40u
#define N_CONTENTS 2u
#define N_CLIENTS  4u
#define MIB        (1u << 20)
#define PATIENT_NS 60000000000ull
#define A_WHILE_NS 500000000ull /* for a put that is in another one's way; then it is given up */

static uint64_t seed0;
static uint32_t n_ops = 50;

typedef struct cell {
    atomic_uint tries[N_CONTENTS];
    atomic_uint found; /* 1 + the content */
    atomic_bool acked, durable;
} cell;

typedef struct model {
    o_rig *r;
    bool roomy; /* no value is ever evicted from its last tier */
    cell cells[N_KEYS];
    atomic_uint n_running, n_found;
    atomic_bool failed;
    char why[256]; /* the first failure's */
} model;

typedef struct client {
    model *m;
    kvc_thread thread;
    h_peer *peer;
    uint64_t seed;
} client;

static uint32_t below(client *c, uint32_t n)
{
    return (uint32_t)(h_random(&c->seed) % n);
}

static void fail_at(model *m, const char *what, uint32_t key, int status)
{
    if (!atomic_exchange(&m->failed, true))
        snprintf(m->why, sizeof(m->why), "key %u: %s (%d)", key, what, status);
}

static bool may_be_erased(uint32_t key)
{
    return key % 4 == 3;
}

/* Lengths at which something changes, and a few in between; the two contents of a key differ. */
static size_t length_of(uint32_t key, uint32_t content)
{
    uint64_t state = seed0 + key * 2 + content + 1;
    size_t len = o_lengths[h_random(&state) % O_N_LENGTHS];
    if (len < MIB)
        len += h_random(&state) % 3000;
    return len > 3 * MIB ? 3 * MIB : len;
}

/* ---- operations ------------------------------------------------------------------------------ */

static void op_put(client *c, uint32_t key)
{
    cell *at = &c->m->cells[key];
    uint32_t content = below(c, N_CONTENTS), n = o_pieces(length_of(key, content));
    bool durable = c->m->r->dir[0] && below(c, 4) == 0, patient = below(c, 3) == 0;
    atomic_fetch_add(&at->tries[content], 1);
    kvc_status status = o_put(c->peer, &c->m->r->schema, key, content, length_of(key, content),
                              durable ? KVC_PROMISE_DURABLE : KVC_PROMISE_MEMORY,
                              patient ? kvc_deadline_ns(A_WHILE_NS) : 0);
    if (status == KVC_AGAIN || (status == KVC_NO_SPACE && !c->m->roomy))
        return; /* a full lmdb has no room for another size class */
    if (status != KVC_OK && status != KVC_EXISTS) {
        fail_at(c->m, "the put failed", key, status);
        return;
    }
    if (status == KVC_EXISTS && atomic_load(&at->tries[0]) + atomic_load(&at->tries[1]) < 2)
        fail_at(c->m, "it exists, but nobody else tried to put it", key, status);
    atomic_store(&at->acked, true);
    if (durable && status == KVC_OK && n == 1) /* of more, others may have put some */
        atomic_store(&at->durable, true);
}

/* The first piece of some, and no more: others wait for the rest, or go on with it. */
static void op_tear(client *c, uint32_t key)
{
    uint32_t content = below(c, N_CONTENTS);
    size_t len = length_of(key, content);
    if (o_pieces(len) < 2 || !may_be_erased(key))
        return;
    atomic_fetch_add(&c->m->cells[key].tries[content], 1);
    kvc_status status =
        o_put_piece(c->peer, &c->m->r->schema, key, content, len, 0, KVC_PROMISE_MEMORY);
    if (status != KVC_OK && status != KVC_EXISTS && status != KVC_AGAIN)
        fail_at(c->m, "the piece was not taken", key, status);
}

/* Which of the contents it is; N_CONTENTS: none. */
static uint32_t content_of(uint32_t key, const uint8_t *value, size_t len_bytes)
{
    uint32_t found = N_CONTENTS;
    for (uint32_t i = 0; i < N_CONTENTS && found == N_CONTENTS; i++) {
        uint8_t *want = o_content(i, length_of(key, i));
        if (len_bytes == length_of(key, i) && memcmp(value, want, len_bytes) == 0)
            found = i;
        free(want);
    }
    return found;
}

static void judge_found(client *c, uint32_t key, uint32_t content)
{
    cell *at = &c->m->cells[key];
    uint32_t before = 0;
    atomic_fetch_add(&c->m->n_found, 1);
    if (content == N_CONTENTS)
        fail_at(c->m, "it has other bytes", key, 0);
    else if (atomic_load(&at->tries[content]) == 0 && content_of(key, NULL, 0) != content)
        fail_at(c->m, "it was found, but never put", key, 0);
    else if (c->m->roomy && !may_be_erased(key) &&
             !atomic_compare_exchange_strong(&at->found, &before, content + 1) &&
             before != content + 1)
        fail_at(c->m, "it is another value than before", key, 0);
}

static void op_get(client *c, uint32_t key)
{
    const cell *at = &c->m->cells[key];
    bool must =
        c->m->roomy && !may_be_erased(key) && (atomic_load(&at->acked) || atomic_load(&at->found));
    uint8_t *value;
    size_t len_bytes;
    kvc_status status = o_get(c->peer, &c->m->r->schema, key, &value, &len_bytes);
    if (status == KVC_OK)
        judge_found(c, key, content_of(key, value, len_bytes));
    else if (status != KVC_AGAIN && (status != KVC_NOT_FOUND || must))
        fail_at(c->m, "the get failed", key, status);
    free(value);
}

static void op_match(client *c, uint32_t key)
{
    const cell *at = &c->m->cells[key];
    bool must = c->m->roomy && !may_be_erased(key) && atomic_load(&at->acked);
    bool there = o_there(c->peer, &c->m->r->schema, key);
    if (must && !there)
        fail_at(c->m, "it was acknowledged and does not match", key, 0);
    if (there && atomic_load(&at->tries[0]) + atomic_load(&at->tries[1]) == 0)
        fail_at(c->m, "it matches, but was never put", key, 0);
}

/* Held values may be erased; half of the holds end by themselves. */
static void op_hold(client *c, uint32_t key)
{
    kvc_digest digest = o_key(&c->m->r->schema, key);
    kvc_request req = {.method = KVC_HOLD};
    req.u.hold.schema = c->m->r->schema.digest;
    req.u.hold.digests = &digest;
    req.u.hold.n_digests = 1;
    req.u.hold.ttl_ms = 20;
    kvc_status status = h_call(c->peer, &req);
    if (status != KVC_OK && status != KVC_NO_SPACE && status != KVC_AGAIN)
        fail_at(c->m, "Hold", key, status);
    if (status != KVC_OK || below(c, 2))
        return;
    uint64_t hold = c->peer->xfer.reply.u.hold.hold;
    req = (kvc_request){.method = KVC_RELEASE};
    req.u.release.hold = hold;
    status = h_call(c->peer, &req);
    if (status != KVC_OK && status != KVC_NOT_FOUND)
        fail_at(c->m, "Release", key, status);
}

static void op_prefetch(client *c, uint32_t key)
{
    kvc_digest digest = o_key(&c->m->r->schema, key);
    kvc_request req = {.method = KVC_PREFETCH};
    req.u.prefetch.schema = c->m->r->schema.digest;
    req.u.prefetch.digests = &digest;
    req.u.prefetch.n_digests = 1;
    req.u.prefetch.tier = KVC_TIER_DRAM;
    kvc_status status = h_call(c->peer, &req);
    if (status != KVC_OK && status != KVC_AGAIN)
        fail_at(c->m, "Prefetch", key, status);
}

static void op_erase(client *c, uint32_t key)
{
    kvc_digest digest = o_key(&c->m->r->schema, key);
    kvc_request req = {.method = KVC_ERASE};
    req.u.erase.schema = c->m->r->schema.digest;
    req.u.erase.digests = &digest;
    req.u.erase.n_digests = 1;
    kvc_status status = h_call(c->peer, &req);
    if (status != KVC_OK && status != KVC_AGAIN)
        fail_at(c->m, "Erase", key, status);
}

static void run_client(void *arg)
{
    client *c = arg;
    for (uint32_t i = 0; i < n_ops && !atomic_load(&c->m->failed); i++) {
        uint32_t op = below(c, 100), key = below(c, N_KEYS);
        if (op < 35)
            op_put(c, key);
        else if (op < 70)
            op_get(c, key);
        else if (op < 80)
            op_match(c, key);
        else if (op < 85)
            op_tear(c, key);
        else if (op < 90)
            op_hold(c, key);
        else if (op < 95)
            op_prefetch(c, key);
        else if (may_be_erased(key))
            op_erase(c, key);
    }
    atomic_fetch_sub(&c->m->n_running, 1);
}

/* ---- runs ------------------------------------------------------------------------------------ */

static void run_clients(model *m)
{
    static client clients[N_CLIENTS];
    struct timespec nap = {.tv_nsec = 5000000};
    atomic_store(&m->n_running, N_CLIENTS);
    for (uint32_t i = 0; i < N_CLIENTS; i++) {
        clients[i] = (client){.m = m, .seed = seed0 * 31 + i + 1};
        clients[i].peer = h_connect(kvs_server_uri(m->r->h.server, 0), "default");
        assert_int_equal(kvc_thread_start(&clients[i].thread, "client", run_client, &clients[i]),
                         KVC_OK);
    }
    while (atomic_load(&m->n_running)) {
        h_check_caps(&m->r->h);
        nanosleep(&nap, NULL);
    }
    for (uint32_t i = 0; i < N_CLIENTS; i++) {
        kvc_thread_join(&clients[i].thread);
        h_disconnect(clients[i].peer);
    }
    if (atomic_load(&m->failed))
        fail_msg("%s", m->why);
}

/* One client, and nobody besides: every status is known, and DURABLE holds for all pieces. */
static void put_durably(model *m)
{
    for (uint32_t i = 0; i < 4; i++)
        assert_int_equal(o_put(m->r->peer, &m->r->schema, N_KEYS + i, i, i * MIB + 77,
                               KVC_PROMISE_DURABLE, kvc_deadline_ns(PATIENT_NS)),
                         KVC_OK);
}

/* What a stop must have kept is there afterwards, bit for bit; what was never tried is not. */
static void check_restart(model *m, bool flush)
{
    client c = {.m = m};
    o_rig_stop(m->r, flush);
    o_rig_start(m->r);
    c.peer = m->r->peer;
    for (uint32_t key = 0; key < N_KEYS; key++) {
        cell *at = &m->cells[key];
        bool must = !may_be_erased(key) && atomic_load(flush ? &at->acked : &at->durable);
        bool there = o_there(c.peer, &m->r->schema, key);
        atomic_store(&at->acked, must);
        if (must && !there)
            fail_msg("key %u did not survive", key);
        if (there)
            op_get(&c, key);
    }
    for (uint32_t i = 0; i < 4; i++)
        o_get_equal(c.peer, &m->r->schema, N_KEYS + i, i, i * MIB + 77);
    if (atomic_load(&m->failed))
        fail_msg("after the restart: %s", m->why);
}

static void run_model(bool lmdb, uint64_t dram_bytes, uint64_t lmdb_bytes, bool roomy)
{
    model *m = calloc(1, sizeof(*m));
    assert_non_null(m);
    m->r = o_rig_create(lmdb);
    m->roomy = roomy;
    m->r->h.settings.dram_bytes = dram_bytes;
    if (lmdb)
        m->r->h.settings.lmdb_bytes = lmdb_bytes;
    o_rig_start(m->r);
    run_clients(m);
    printf("%u values found\n", atomic_load(&m->n_found));
    assert_true(atomic_load(&m->n_found) > 0);
    if (lmdb && roomy) {
        put_durably(m);
        check_restart(m, seed0 % 2);
    }
    o_rig_stop(m->r, false);
    o_rig_destroy(m->r);
    free(m);
}

static void test_dram_roomy(void **state)
{
    (void)state;
    run_model(false, 1024ull * MIB, 0, true);
}

static void test_dram_small(void **state)
{
    (void)state;
    run_model(false, 20 * MIB, 0, false);
}

static void test_both_roomy(void **state)
{
    (void)state;
    run_model(true, 24 * MIB, 1024ull * MIB, true);
}

static void test_both_small(void **state)
{
    (void)state;
    run_model(true, 20 * MIB, 20 * MIB, false);
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
