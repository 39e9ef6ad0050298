/*
 * worker_servers_fault_test.c: a worker over three stores of which one is slow, full, forgetful or
 * lost: what the others go on doing, and that texts name the one at fault.
 */
#include "oracle.h"

#include "base/clock.h"
#include "base/metrics.h"
#include "base/place.h"
#include "bench.h"
#include "internal.h"

enum { STORES = 3, BAD = 1 };

typedef struct three {
    store stores[STORES];
    kvc_client *clients[STORES];
} three;

static int open_three(void **state)
{
    three *t = calloc(1, sizeof(*t));
    assert_non_null(t);
    for (uint32_t i = 0; i < STORES; i++) {
        char uri[64];
        (void)snprintf(uri, sizeof(uri), "inproc://servers-test-%u", i);
        store_start(&t->stores[i], uri);
        t->clients[i] = store_client(uri);
    }
    *state = t;
    return 0;
}

static int close_three(void **state)
{
    three *t = *state;
    for (uint32_t i = 0; i < STORES; i++) {
        kvc_client_close(t->clients[i]);
        store_stop(&t->stores[i]);
    }
    free(t);
    return 0;
}

static void three_rig(rig *r, three *t, const char *selector)
{
    store_rig(r, selector, KVW_INDEX_EXACT, NULL);
    r->opts.clients = t->clients;
    r->opts.n_clients = STORES;
}

static kvw_seq *create(rig *r, uint32_t n_known, uint32_t *reused_p)
{
    kvw_seq *seq = NULL;
    assert_ok(kvw_seq_create(r->worker, r->tokens, n_known, &seq, reused_p));
    return seq;
}

static kvw_server_stats server_stats(const kvw_seq *seq, uint32_t server)
{
    kvw_server_stats stats = {.size_bytes = sizeof(stats)};
    assert_ok(kvw_seq_server_stats(seq, server, &stats));
    return stats;
}

/* Whether the last error names the bad store. */
static bool blames_bad(const rig *r)
{
    char name[48];
    (void)snprintf(name, sizeof(name), "(server %s)", r->server_names[BAD]);
    return strstr(kvw_last_error(), name) != NULL;
}

/* What layer 0 has fetched. */
static void forget_rows(kvw_seq *seq)
{
    for (uint32_t p = 0; p < 640; p++)
        kvwi_residency_drop(&seq->layers[0].residency, p);
}

/* Picks whose rows only the bad store has: not of block 0 (sinks), nor from 576 on (recent). */
static uint32_t picks_of_bad(const kvw_seq *seq, uint32_t *skip)
{
    const uint32_t *picks = NULL;
    uint32_t n = 0, n_skip = 0;
    assert_ok(kvw_last_picks(seq, 0, &picks, &n));
    for (uint32_t i = 0; i < n; i++)
        if (picks[i] >= 64 && picks[i] < 576 && seq->blocks[picks[i] / 64].server == BAD)
            skip[n_skip++] = picks[i];
    return n_skip;
}

static void check_without(const rig *r, const kvw_seq *seq, uint32_t pos, const uint32_t *skip,
                          uint32_t n_skip, const float *out, const float *lse)
{
    const uint32_t *picks = NULL;
    uint32_t n = 0;
    double want[64], want_lse[4];
    assert_ok(kvw_last_picks(seq, 0, &picks, &n));
    oracle_attend(r, 0, pos, 1, picks, n, oracle_near(r, pos + 1, 1), skip, n_skip, want, want_lse);
    const rig_step step = {.layer = 0, .first = pos, .n = 1, .out = out, .lse = lse};
    oracle_check_out(r, &step, want, want_lse);
}

/* The rows of one store are not there: DROP attends over those of the others, and says how many
 * went; FAIL says whose they were. Once they are there again they are used. */
static void rows_of_one_store_are_dropped_or_named(void **state)
{
    three *t = *state;
    for (uint32_t policy = KVW_FAIL; policy <= KVW_DROP; policy++) {
        rig r;
        uint32_t reused = 0, skip[64], n_skip = 0;
        float out[64], lse[4];
        three_rig(&r, t, "tokenselect");
        r.opts.policy = (kvw_policy)policy;
        r.opts.revision = policy == KVW_FAIL ? "fail" : "drop";
        rig_name_servers(&r);
        rig_open(&r);
        kvw_seq *seq = create(&r, 0, &reused);
        rig_prefill(&r, seq, 0, 640, NULL, NULL);
        assert_ok(kvw_flush(seq, 0));
        store_set(&t->stores[BAD], &(store_faults){.lose_every = 1});
        forget_rows(seq);
        kvw_stats before = stats_of(seq);
        uint64_t missing = server_stats(seq, BAD).rows_missing;
        kvc_status st = rig_one_step(&r, seq, 640, out, lse);
        n_skip = picks_of_bad(seq, skip);
        assert_true(n_skip > 0);
        assert_int_equal(server_stats(seq, BAD).rows_missing - missing, n_skip);
        assert_int_equal(server_stats(seq, 0).rows_missing + server_stats(seq, 2).rows_missing, 0);
        if (policy == KVW_FAIL) {
            assert_status(st, KVC_NOT_FOUND);
            assert_true(blames_bad(&r));
        } else {
            assert_ok(st);
            assert_int_equal(stats_of(seq).rows_dropped - before.rows_dropped, n_skip);
            check_without(&r, seq, 640, skip, n_skip, out, lse);
        }
        assert_int_equal(server_stats(seq, BAD).lost, 0); /* it answers */
        store_set(&t->stores[BAD], &(store_faults){0});
        assert_ok(rig_one_step(&r, seq, 641, out, lse));
        check_without(&r, seq, 641, NULL, 0, out, lse);
        kvw_seq_destroy(seq);
        rig_close(&r);
    }
}

/* Nobody asks a store that was given up, and its rows are dropped at once. */
static void a_lost_store_is_not_asked(void **state)
{
    three *t = *state;
    rig r;
    uint32_t reused = 0, skip[64];
    float out[64], lse[4];
    three_rig(&r, t, "tokenselect");
    r.opts.policy = KVW_DROP;
    rig_name_servers(&r);
    rig_open(&r);
    kvw_seq *seq = create(&r, 0, &reused);
    rig_prefill(&r, seq, 0, 640, NULL, NULL);
    assert_ok(kvw_flush(seq, 0));
    forget_rows(seq);
    atomic_store(&r.worker->servers.all[BAD].lost_until_ns, UINT64_MAX);
    kvw_server_stats before = server_stats(seq, BAD);
    uint32_t asked = store_count(&t->stores[BAD], &t->stores[BAD].n_fetches);
    for (uint32_t p = 640; p < 650; p++) {
        assert_ok(rig_one_step(&r, seq, p, out, lse));
        check_without(&r, seq, p, skip, picks_of_bad(seq, skip), out, lse);
    }
    assert_int_equal(store_count(&t->stores[BAD], &t->stores[BAD].n_fetches), asked);
    assert_int_equal(server_stats(seq, BAD).lost, 1);
    assert_int_equal(server_stats(seq, BAD).rows, before.rows);
    assert_true(server_stats(seq, BAD).rows_missing > before.rows_missing);
    assert_int_equal(server_stats(seq, 0).rows_missing + server_stats(seq, 2).rows_missing, 0);
    /* the time is over: it is asked, and answers */
    atomic_store(&r.worker->servers.all[BAD].lost_until_ns, 1);
    uint32_t p = 650;
    while (server_stats(seq, BAD).rows == before.rows && p < 700)
        assert_ok(rig_one_step(&r, seq, p++, out, lse));
    assert_true(p < 700);
    assert_int_equal(atomic_load(&r.worker->servers.all[BAD].lost_until_ns), 0);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* A store that does not answer in time is given up, for longer each time, and taken back. */
static void a_silent_store_is_given_up_and_taken_back(void **state)
{
    three *t = *state;
    rig r;
    uint32_t reused = 0, p = 640;
    float out[64], lse[4];
    three_rig(&r, t, "tokenselect");
    r.opts.policy = KVW_DROP;
    r.opts.fetch_timeout_ns = 50000000ull;
    rig_name_servers(&r);
    rig_open(&r);
    kvw_seq *seq = create(&r, 0, &reused);
    kvwi_server *bad = &r.worker->servers.all[BAD];
    rig_prefill(&r, seq, 0, 640, NULL, NULL);
    assert_ok(kvw_flush(seq, 0));
    uint64_t lost = kvc_metric_get(KVC_M_servers_lost);
    store_set(&t->stores[BAD], &(store_faults){.fetch_delay_ms = 1000000});
    atomic_store(&bad->n_losses, 0);
    atomic_store(&bad->lost_until_ns, 0);
    for (uint32_t n = 1; n <= 3; n++) {
        forget_rows(seq);
        uint64_t now_ns = kvc_now_ns();
        assert_ok(rig_one_step(&r, seq, p++, out, lse));
        assert_int_equal(atomic_load(&bad->n_losses), n);
        assert_true(atomic_load(&bad->lost_until_ns) >= now_ns + (500000000ull << n));
        atomic_store(&bad->lost_until_ns, 1); /* as if the time were over */
    }
    assert_true(kvc_metric_get(KVC_M_servers_lost) - lost >= 3);
    store_set(&t->stores[BAD], &(store_faults){0});
    for (int i = 0; atomic_load(&bad->n_losses) != 0 && i < 50; i++) {
        forget_rows(seq);
        atomic_store(&bad->lost_until_ns, 1);
        assert_ok(rig_one_step(&r, seq, p++, out, lse));
    }
    assert_int_equal(atomic_load(&bad->n_losses), 0);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* Both layers' steps are under way when the store falls silent: that is one loss. */
static void steps_in_flight_lose_a_store_once(void **state)
{
    three *t = *state;
    rig r;
    uint32_t reused = 0;
    kvw_step *steps[2];
    float out[64];
    three_rig(&r, t, "tokenselect");
    r.opts.policy = KVW_DROP;
    r.opts.fetch_timeout_ns = 200000000ull;
    r.opts.residency_slots = 120;
    rig_name_servers(&r);
    rig_open(&r);
    assert_int_equal(r.opts.n_layers, 2);
    kvw_seq *seq = create(&r, 0, &reused);
    kvwi_server *bad = &r.worker->servers.all[BAD];
    rig_prefill(&r, seq, 0, 640, NULL, NULL);
    assert_ok(kvw_flush(seq, 0));
    atomic_store(&bad->lost_until_ns, 0);
    atomic_store(&bad->n_losses, 0);
    store_set(&t->stores[BAD], &(store_faults){.fetch_delay_ms = 1000000});
    assert_ok(kvw_tokens(seq, r.tokens + 640, 1));
    void *q = rig_bytes(&r, r.q, rig_q_width(&r), 0, 640, 1);
    for (uint32_t layer = 0; layer < 2; layer++) {
        for (uint32_t p = 0; p < 640; p++)
            kvwi_residency_drop(&seq->layers[layer].residency, p);
        assert_ok(kvw_append(seq, layer, q, q, 1)); /* any keys will do */
        assert_ok(kvw_step_begin(seq, layer, q, 1, &steps[layer]));
        assert_true(steps[layer]->legs[BAD].n_misses > 0);
    }
    for (uint32_t layer = 0; layer < 2; layer++)
        assert_ok(kvw_step_finish(steps[layer], q, out, NULL));
    assert_int_equal(atomic_load(&bad->n_losses), 1);
    assert_true(atomic_load(&bad->lost_until_ns) <= kvc_now_ns() + 1000000000ull);
    free(q);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* ---- puts ---- */

/* A pass of a block, with keys only; the status of kvw_tokens. */
static kvc_status add_block(rig *r, kvw_seq *seq, uint32_t first)
{
    kvc_status st = kvw_tokens(seq, r->tokens + first, 64);
    for (uint32_t layer = 0; st == KVC_OK && layer < r->opts.n_layers; layer++) {
        void *k = rig_bytes(r, r->k, rig_kv_width(r), layer, first, 64);
        assert_ok(kvw_append(seq, layer, k, k, 64));
        free(k);
    }
    return st;
}

/* The engine waits for it and hears whom it waits for; in the end everything is where it belongs.
 */
static void a_full_store_is_named(void **state)
{
    three *t = *state;
    rig r;
    uint32_t reused = 0, first = 0, blocks = 0;
    kvc_status st = KVC_OK;
    three_rig(&r, t, "tokenselect");
    r.opts.put_window = 2;
    r.opts.put_timeout_ns = 50000000ull;
    rig_name_servers(&r);
    rig_open(&r);
    store_set(&t->stores[BAD], &(store_faults){.again_every = 1});
    kvw_seq *seq = create(&r, 0, &reused);
    /* also a store that is well may be slow on a busy machine */
    for (int i = 0; first < 640 && i < 200 && !(st == KVC_TIMED_OUT && blames_bad(&r)); i++) {
        st = add_block(&r, seq, first);
        first += st == KVC_OK ? 64 : 0;
        assert_true(st == KVC_OK || st == KVC_TIMED_OUT);
    }
    assert_status(st, KVC_TIMED_OUT);
    assert_true(blames_bad(&r));
    support_wait_for(kvw_flush(seq, kvc_deadline_ns(20000000)) == KVC_TIMED_OUT && blames_bad(&r));
    store_set(&t->stores[BAD], &(store_faults){0});
    for (int i = 0; first < 640 && i < 2000; i++) {
        st = add_block(&r, seq, first);
        first += st == KVC_OK ? 64 : 0;
    }
    assert_int_equal(first, 640);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    for (uint32_t i = 0; i < STORES; i++) {
        assert_int_equal(kvc_context_blocks(seq->servers[i].context), server_stats(seq, i).blocks);
        blocks += kvc_context_blocks(seq->servers[i].context);
    }
    assert_int_equal(blocks, 10);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* A put that can never succeed is an error of the sequence, with its store's name. */
static void a_store_that_refuses_is_named(void **state)
{
    three *t = *state;
    rig r;
    uint32_t reused = 0;
    three_rig(&r, t, "tokenselect");
    rig_name_servers(&r);
    rig_open(&r);
    store_set(&t->stores[BAD], &(store_faults){.put_status = KVC_DENIED});
    kvw_seq *seq = create(&r, 0, &reused);
    kvc_status st = KVC_OK;
    for (uint32_t first = 0; st == KVC_OK && first < 640; first += 64)
        st = add_block(&r, seq, first);
    st = st == KVC_OK ? kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)) : st;
    assert_status(st, KVC_DENIED);
    assert_true(blames_bad(&r));
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* Contexts that do not grow at once, of one store or of all: blocks count in their order, and every
 * store's context ends up with its own. */
static void contexts_grow_each_for_itself(void **state)
{
    three *t = *state;
    rig r;
    rig_record calm, storm;
    kvw_stats stats;
    uint32_t reused = 0;
    three_rig(&r, t, "esa");
    rig_name_servers(&r);
    rig_open(&r);
    run(&r, &calm, 0, &reused, &stats);
    for (uint32_t i = 0; i < STORES; i++) {
        store_forget(&t->stores[i], true);
        store_forget(&t->stores[i], false);
        store_set(&t->stores[i], &(store_faults){.extend_failures = i, .again_every = 5 - i});
    }
    run(&r, &storm, 0, &reused, &stats);
    assert_int_equal(stats.blocks_put, 10);
    assert_true(stats.put_retries >= 3);
    rig_record_equal(&r, &calm, &storm, 0, 700);
    for (uint32_t i = 0; i < STORES; i++)
        store_set(&t->stores[i], &(store_faults){0});
    rig_record_fini(&storm);
    run(&r, &storm, 700, &reused, &stats);
    assert_int_equal(reused, 640);
    rig_record_equal(&r, &calm, &storm, 640, 700);
    rig_record_fini(&calm);
    rig_record_fini(&storm);
    rig_close(&r);
}

static void add_blocks(rig *r, kvw_seq *seq, uint32_t first, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        assert_ok(add_block(r, seq, first + i * 64));
    /* sends the last one too, and does not wait */
    kvc_status st = kvw_flush(seq, kvc_deadline_ns(1000000));
    assert_true(st == KVC_OK || st == KVC_TIMED_OUT);
}

/* A store hangs as a context grows, for longer than the test takes: the contexts of the others,
 * also of other sequences, grow to their ends meanwhile. */
static void a_store_that_hangs_holds_up_no_other(void **state)
{
    three *t = *state;
    rig r;
    uint32_t reused = 0;
    uint64_t usual_ns = kvwi_put_extend_ns;
    kvwi_put_extend_ns = 600000000000ull;
    three_rig(&r, t, "tokenselect");
    r.opts.put_window = 16;
    rig_name_servers(&r);
    rig_open(&r);
    kvw_seq *first = create(&r, 0, &reused), *second = create(&r, 0, &reused);
    store_set(&t->stores[BAD], &(store_faults){.grow_delay_ms = 1000000});
    add_blocks(&r, first, 0, 10);
    support_wait_for(store_count(&t->stores[BAD], &t->stores[BAD].n_extends) == 1);
    add_blocks(&r, second, 0, 10);
    for (uint32_t i = 0; i < STORES; i++) {
        if (i == BAD)
            continue;
        support_wait_for(kvc_context_blocks(first->servers[i].context) ==
                         server_stats(first, i).blocks);
        support_wait_for(kvc_context_blocks(second->servers[i].context) ==
                         server_stats(second, i).blocks);
    }
    assert_int_equal(store_count(&t->stores[BAD], &t->stores[BAD].n_extends), 1);
    assert_int_equal(kvc_context_blocks(first->servers[BAD].context), 0);
    assert_int_equal(kvc_context_blocks(second->servers[BAD].context), 0);
    store_set(&t->stores[BAD], &(store_faults){0});
    store_answer_late(&t->stores[BAD]);
    assert_ok(kvw_flush(first, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    assert_ok(kvw_flush(second, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    assert_int_equal(stats_of(first).blocks_put + stats_of(second).blocks_put, 20);
    for (uint32_t i = 0; i < STORES; i++)
        assert_int_equal(kvc_context_blocks(second->servers[i].context),
                         server_stats(second, i).blocks);
    kvw_seq_destroy(first);
    kvw_seq_destroy(second);
    rig_close(&r);
    kvwi_put_extend_ns = usual_ns;
}

/* It gets so long to answer, then it is asked again; a sequence that ends meanwhile leaves it. */
static void a_sequence_ends_while_its_store_hangs(void **state)
{
    three *t = *state;
    rig r;
    uint32_t reused = 0;
    uint64_t usual_ns = kvwi_put_extend_ns;
    kvwi_put_extend_ns = 20000000ull;
    three_rig(&r, t, "tokenselect");
    r.opts.put_window = 16;
    r.opts.put_timeout_ns = 50000000ull;
    rig_name_servers(&r);
    rig_open(&r);
    kvw_seq *seq = create(&r, 0, &reused);
    store_set(&t->stores[BAD], &(store_faults){.grow_delay_ms = 1000000});
    add_blocks(&r, seq, 0, 10);
    support_wait_for(kvwi_put_look(seq).retries >= 3);
    kvw_seq_destroy(seq);
    rig_close(&r);
    kvwi_put_extend_ns = usual_ns;
}

/* Names by which the first of three blocks is the first server's and both others are the second's,
 * whatever digests they have on this machine. */
static void name_by_blocks(rig *r, const kvc_digest *digests)
{
    uint64_t keys[STORES];
    for (uint32_t i = 0; i < 10000; i++) {
        for (uint32_t j = 0; j < STORES; j++) {
            (void)snprintf(r->server_name[j], sizeof(r->server_name[j]), "%u of %u", j, i);
            r->server_names[j] = r->server_name[j];
            assert_ok(kvc_place_key(r->server_name[j], &keys[j]));
        }
        if (kvc_place_owner(keys, STORES, &digests[0]) == 0 &&
            kvc_place_owner(keys, STORES, &digests[1]) == 1 &&
            kvc_place_owner(keys, STORES, &digests[2]) == 1) {
            r->opts.server_names = r->server_names;
            return;
        }
    }
    fail_msg("no such names");
}

/* One store fails while another's context grows, then that one: only what it does not cover waits
 * for it. */
static void blocks_that_are_covered_do_not_wait(void **state)
{
    three *t = *state;
    rig r;
    uint32_t reused = 0;
    kvc_digest digests[3];
    three_rig(&r, t, "tokenselect");
    rig_open(&r);
    kvw_seq *seq = create(&r, 0, &reused);
    add_blocks(&r, seq, 0, 3);
    for (uint32_t i = 0; i < 3; i++)
        digests[i] = seq->blocks[i].digest;
    kvw_seq_destroy(seq);
    kvw_close(r.worker);
    name_by_blocks(&r, digests);
    rig_open(&r);
    seq = create(&r, 0, &reused);
    store_set(&t->stores[0], &(store_faults){.grow_fails = true});
    add_blocks(&r, seq, 0, 2);
    support_wait_for(kvc_context_blocks(seq->servers[1].context) == 1);
    store_set(&t->stores[1], &(store_faults){.grow_fails = true});
    add_blocks(&r, seq, 128, 1);
    store_set(&t->stores[0], &(store_faults){0});
    support_wait_for(kvwi_put_look(seq).n_acked == 2);
    store_set(&t->stores[1], &(store_faults){0});
    assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* ---- prefixes ---- */

/* Questions of two digests at a time come to the same prefix; and one that forgot all cuts it. */
static void small_questions_find_the_same_prefix(void **state)
{
    three *t = *state;
    rig r;
    uint32_t reused = 0, first = 0;
    three_rig(&r, t, "esa");
    rig_name_servers(&r);
    rig_open(&r);
    kvw_seq *seq = create(&r, 0, &reused);
    rig_prefill(&r, seq, 0, 640, NULL, NULL);
    assert_ok(kvw_flush(seq, 0));
    while (first < 10 && seq->blocks[first].server != BAD)
        first++;
    assert_true(first < 10);
    kvw_seq_destroy(seq);
    seq = create(&r, 700, &reused);
    assert_int_equal(reused, 640);
    kvw_seq_destroy(seq);
    store_forget(&t->stores[BAD], false);
    seq = create(&r, 700, &reused);
    assert_int_equal(reused, first * 64);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

static int open_with_small_messages(void **state)
{
    store_max_digests = 2;
    int rc = open_three(state);
    store_max_digests = KVC_MAX_DIGESTS;
    return rc;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(rows_of_one_store_are_dropped_or_named, open_three,
                                        close_three),
        cmocka_unit_test_setup_teardown(a_lost_store_is_not_asked, open_three, close_three),
        cmocka_unit_test_setup_teardown(a_silent_store_is_given_up_and_taken_back, open_three,
                                        close_three),
        cmocka_unit_test_setup_teardown(steps_in_flight_lose_a_store_once, open_three, close_three),
        cmocka_unit_test_setup_teardown(a_store_that_hangs_holds_up_no_other, open_three,
                                        close_three),
        cmocka_unit_test_setup_teardown(a_sequence_ends_while_its_store_hangs, open_three,
                                        close_three),
        cmocka_unit_test_setup_teardown(blocks_that_are_covered_do_not_wait, open_three,
                                        close_three),
        cmocka_unit_test_setup_teardown(a_full_store_is_named, open_three, close_three),
        cmocka_unit_test_setup_teardown(a_store_that_refuses_is_named, open_three, close_three),
        cmocka_unit_test_setup_teardown(contexts_grow_each_for_itself, open_three, close_three),
        cmocka_unit_test_setup_teardown(small_questions_find_the_same_prefix,
                                        open_with_small_messages, close_three),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
