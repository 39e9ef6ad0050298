/*
 * worker_servers_test.c: a worker whose blocks are spread over several real servers, beside the
 * same worker over one and over none: the bits of `exact` and the picks do not depend on their
 * number; who finds whose prefixes; and what each server is asked.
 */
#include "attend.h"
#include "internal.h"
#include "servers.h"

#include "base/clock.h"
#include "base/place.h"

/* Outputs and picks of a run. */
typedef struct taken {
    rig_record record;
    uint32_t *picks; /* [steps][k + 1]: how many, and which */
    uint32_t n_steps, k;
} taken;

static void take_step(void *arg, const rig *r, const rig_step *step)
{
    taken *t = arg;
    const uint32_t *picks = NULL;
    uint32_t n = 0, *at = t->picks + (size_t)t->n_steps++ * (t->k + 1);
    assert_ok(kvw_last_picks(step->seq, step->layer, &picks, &n));
    assert_true(n <= t->k);
    *at = n;
    memcpy(at + 1, picks, n * sizeof(*picks));
    rig_record_step(&t->record, r, step);
}

static void taken_init(taken *t, const rig *r)
{
    *t = (taken){.k = r->opts.k};
    rig_record_init(&t->record, r);
    t->picks = calloc((size_t)r->opts.n_layers * r->n_tokens * (t->k + 1), sizeof(uint32_t));
    assert_non_null(t->picks);
}

static void taken_fini(taken *t)
{
    rig_record_fini(&t->record);
    free(t->picks);
}

static kvw_seq *open_seq(rig *r, uint32_t n_known, uint32_t *reused_p)
{
    kvw_seq *seq = NULL;
    kvc_status st = kvw_seq_create(r->worker, r->tokens, n_known, &seq, reused_p);
    if (st != KVC_OK)
        print_error("kvw_seq_create: %s\n", kvw_last_error());
    assert_ok(st);
    return seq;
}

/* What is not reused prefilled to 660 and decoded to 700; blocks are all put before the decode, so
 * that what is fetched does not depend on the put thread. The caller destroys the sequence. */
static kvw_seq *run_seq(rig *r, taken *t, uint32_t n_known, uint32_t *reused_p)
{
    kvw_seq *seq = open_seq(r, n_known, reused_p);
    uint32_t half = *reused_p > 448 ? *reused_p : 448;
    taken_init(t, r);
    rig_prefill(r, seq, *reused_p, half, take_step, t);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    rig_prefill(r, seq, half, 660, take_step, t);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    rig_decode(r, seq, 660, 700, take_step, t);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    return seq;
}

static void same(const rig *r, const taken *a, const taken *b, uint32_t first)
{
    rig_record_equal(r, &a->record, &b->record, first, 700);
    assert_int_equal(a->n_steps, b->n_steps);
    size_t bytes = (size_t)a->n_steps * (a->k + 1) * sizeof(uint32_t);
    assert_memory_equal(a->picks, b->picks, bytes);
}

/* Every server has its own blocks and no others, and every row came from one of them. */
static void check_shares(servers *s, kvw_seq *seq, uint32_t n)
{
    kvw_stats all = stats_of(seq);
    uint64_t blocks = 0, rows = 0, bytes = 0;
    for (uint32_t i = 0; i < n; i++) {
        kvw_server_stats own = server_stats_of(seq, i);
        char name[16];
        (void)snprintf(name, sizeof(name), "%u", i);
        assert_string_equal(own.name, name);
        assert_int_equal(own.rows_missing, 0);
        assert_int_equal(own.lost, 0);
        assert_int_equal(kvc_context_blocks(seq->servers[i].context), own.blocks);
        blocks += own.blocks;
        rows += own.rows;
        bytes += own.bytes;
    }
    assert_int_equal(blocks, 10);
    assert_int_equal(rows, all.rows_dram);
    assert_int_equal(bytes, all.bytes_fetched);
    for (uint32_t b = 0; b < 10; b++) {
        uint32_t owner = kvc_place_owner(seq->worker->servers.keys, n, &seq->blocks[b].digest);
        for (uint32_t i = 0; i < n; i++) {
            uint32_t hits = 9;
            kvc_op op;
            kvc_op_init(&op, NULL, NULL);
            assert_ok(kvc_match(s->clients[i], kvw_schema_digest(seq->worker),
                                &seq->blocks[b].digest, 1, NULL, 0, &hits, 0, &op));
            assert_ok(kvc_op_wait(&op, 0));
            assert_int_equal(hits, i == owner ? 1 : 0);
        }
    }
}

/* A run over n servers cold, then again over what that one has put; `alone` is one over none. */
static void over(servers *s, rig *r, const taken *alone, uint32_t n)
{
    taken cold, warm;
    uint32_t reused = 0;
    char revision[32];
    (void)snprintf(revision, sizeof(revision), "over %u", n);
    r->opts.revision = revision; /* no blocks of other runs */
    servers_use(s, r, n);
    rig_open(r);
    kvw_seq *seq = run_seq(r, &cold, 700, &reused);
    assert_int_equal(reused, 0);
    assert_true(stats_of(seq).misses > 1000);
    same(r, alone, &cold, 0);
    check_shares(s, seq, n);
    kvw_seq_destroy(seq);
    kvw_close(r->worker);
    rig_open(r); /* as another process with the same list */
    seq = run_seq(r, &warm, 700, &reused);
    assert_int_equal(reused, 640);
    bool rebuilt = r->opts.index == KVW_INDEX_EXACT;
    assert_int_equal(stats_of(seq).index_rows_rebuilt, rebuilt ? 2 * 640 : 0);
    rig_record_equal(r, &alone->record, &warm.record, 640, 700);
    check_shares(s, seq, n);
    kvw_seq_destroy(seq);
    kvw_close(r->worker);
    taken_fini(&cold);
    taken_fini(&warm);
}

static void over_any(servers *s, const char *selector, kvw_index_kind index)
{
    rig r;
    taken alone;
    uint32_t reused = 0;
    store_rig(&r, selector, index, NULL);
    rig_open(&r);
    kvw_seq_destroy(run_seq(&r, &alone, 0, &reused));
    kvw_close(r.worker);
    for (uint32_t n = 1; n <= 3; n++)
        over(s, &r, &alone, n);
    taken_fini(&alone);
    r.worker = NULL;
    rig_close(&r);
}

static int open_servers(void **state)
{
    servers *s = malloc(sizeof(*s));
    assert_non_null(s);
    servers_start(s, 3);
    *state = s;
    return 0;
}

static int close_servers(void **state)
{
    servers_stop(*state);
    free(*state);
    return 0;
}

static void any_number_of_servers_gives_the_same_bits(void **state)
{
    over_any(*state, "esa", KVW_INDEX_COMPRESSED);
    over_any(*state, "tokenselect", KVW_INDEX_RERANKED);
    over_any(*state, "tokenselect", KVW_INDEX_EXACT);
}

/* One fetch for each server that has misses, in one step. */
static void a_step_asks_each_server_once(void **state)
{
    servers *s = *state;
    rig r;
    uint32_t reused = 0;
    store_rig(&r, "tokenselect", KVW_INDEX_EXACT, NULL);
    servers_use(s, &r, 3);
    rig_open(&r);
    kvw_seq *seq = open_seq(&r, 0, &reused);
    rig_prefill(&r, seq, 0, 640, NULL, NULL);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    rig_decode(&r, seq, 640, 641, NULL, NULL);
    for (uint32_t p = 641; p < 660; p++) {
        uint64_t before[3], steps = stats_of(seq).steps, all = 0;
        for (uint32_t i = 0; i < 3; i++)
            before[i] = server_stats_of(seq, i).requests;
        rig_decode(&r, seq, p, p + 1, NULL, NULL);
        steps = stats_of(seq).steps - steps;
        assert_int_equal(steps, r.opts.n_layers);
        for (uint32_t i = 0; i < 3; i++) {
            uint64_t asked = server_stats_of(seq, i).requests - before[i];
            assert_true(asked <= steps);
            all += asked;
        }
        assert_true(all > 0);
    }
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* ---- near data ---- */

static kvw_seq *run_near(servers *s, rig *r, const char *selector, kvk_dtype dtype, const char *way,
                         taken *t)
{
    static uint32_t revision;
    static char name[16];
    uint32_t reused = 0;
    store_rig(r, selector, KVW_INDEX_EXACT, NULL);
    servers_use(s, r, 3);
    (void)snprintf(name, sizeof(name), "near %u", revision++);
    r->opts.revision = name;
    r->opts.exact = 0;
    r->opts.dtype = dtype;
    r->opts.way = way;
    rig_name_servers(r);
    rig_open(r);
    return run_seq(r, t, 0, &reused);
}

static void near_is_near(const rig *r, const taken *rows, const taken *near)
{
    double diff = rig_record_diff(r, &rows->record, &near->record, 0, 700);
    if (!(diff > 0 && diff <= near_bound(r)))
        fail_msg("%s, dtype %d: %g apart, bound %g", r->opts.selector, (int)r->opts.dtype, diff,
                 near_bound(r));
}

/* One partial from each of three servers, merged. */
static void partials_of_servers_merge(void **state)
{
    static const kvk_dtype dtypes[] = {KVK_F32, KVK_BF16};
    servers *s = *state;
    for (uint32_t i = 0; i < 2; i++) {
        for (uint32_t d = 0; d < 2; d++) {
            const char *selector = i == 0 ? "esa" : "tokenselect";
            rig r, q;
            taken rows, near;
            kvw_seq_destroy(run_near(s, &r, selector, dtypes[d], "rows", &rows));
            kvw_seq *seq = run_near(s, &q, selector, dtypes[d], "near", &near);
            uint64_t all = 0;
            for (uint32_t j = 0; j < 3; j++) {
                assert_true(server_stats_of(seq, j).rows_near > 50);
                all += server_stats_of(seq, j).rows_near;
            }
            assert_int_equal(all, stats_of(seq).rows_near);
            assert_int_equal(stats_of(seq).way_fallbacks, 0);
            near_is_near(&r, &rows, &near);
            kvw_seq_destroy(seq);
            taken_fini(&rows);
            taken_fini(&near);
            rig_close(&r);
            rig_close(&q);
        }
    }
}

/* One that attends too much already sends its rows; the others attend. */
static void a_busy_server_sends_rows_and_others_attend(void **state)
{
    servers *s = *state;
    kvs_attender *attender = s->h[1].server->attender;
    rig r, q;
    taken rows, near;
    kvw_seq_destroy(run_near(s, &r, "tokenselect", KVK_BF16, "rows", &rows));
    atomic_fetch_add(&attender->n_calls, attender->max_calls);
    kvw_seq *seq = run_near(s, &q, "tokenselect", KVK_BF16, "near", &near);
    atomic_fetch_sub(&attender->n_calls, attender->max_calls);
    assert_int_equal(server_stats_of(seq, 1).rows_near, 0);
    assert_true(stats_of(seq).way_fallbacks > 10);
    assert_true(server_stats_of(seq, 0).rows_near > 50 && server_stats_of(seq, 2).rows_near > 50);
    near_is_near(&r, &rows, &near);
    kvw_seq_destroy(seq);
    taken_fini(&rows);
    taken_fini(&near);
    rig_close(&r);
    rig_close(&q);
}

/* A run of steps by one way after the server of a block that is not its first has forgotten it. */
static kvw_stats run_with_a_hole(servers *s, rig *r, const char *way, rig_record *record)
{
    uint32_t reused = 0, hole = 9;
    kvc_op op;
    store_rig(r, "tokenselect", KVW_INDEX_EXACT, NULL);
    servers_use(s, r, 3);
    r->opts.revision = "a hole";
    r->opts.exact = 0;
    r->opts.policy = KVW_DROP;
    r->opts.way = way;
    rig_name_servers(r);
    rig_open(r);
    rig_record_init(record, r);
    kvw_seq *seq = open_seq(r, 0, &reused);
    rig_prefill(r, seq, 0, 660, NULL, NULL);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    while (hole > 1 && (seq->blocks[hole].local == 0 || hole * 64 + 64 > 560))
        hole--;
    const kvwi_seq_block *b = &seq->blocks[hole];
    assert_true(b->local > 0); /* before its picks there are others of the same server */
    kvc_op_init(&op, NULL, NULL);
    assert_ok(kvc_erase(s->clients[b->server], kvw_schema_digest(r->worker), &b->digest, 1, NULL, 0,
                        NULL, 0, &op));
    assert_ok(kvc_op_wait(&op, 0));
    for (uint32_t p = 660; p < 700; p++) {
        for (uint32_t i = 0; i < r->opts.n_layers; i++)
            for (uint32_t row = 0; row < 660; row++)
                kvwi_residency_drop(&seq->layers[i].residency, row);
        rig_decode(r, seq, p, p + 1, rig_record_step, record);
    }
    for (uint32_t i = 0; i < 3; i++)
        assert_true((server_stats_of(seq, i).rows_missing > 0) == (i == b->server));
    kvw_stats stats = stats_of(seq);
    kvw_seq_destroy(seq);
    return stats;
}

/* What a server did not attend is fetched by its names there, and no other row in its place. */
static void what_is_left_over_keeps_its_name(void **state)
{
    servers *s = *state;
    rig r, q;
    rig_record rows, near;
    kvw_stats by_rows = run_with_a_hole(s, &r, "rows", &rows);
    kvw_stats by_near = run_with_a_hole(s, &q, "near", &near);
    assert_true(by_near.rows_near > 200);
    assert_true(by_rows.rows_dropped > 20);
    assert_int_equal(by_near.rows_dropped, by_rows.rows_dropped);
    double diff = rig_record_diff(&r, &rows, &near, 660, 700);
    if (!(diff <= near_bound(&r)))
        fail_msg("%g apart, bound %g", diff, near_bound(&r));
    rig_record_fini(&rows);
    rig_record_fini(&near);
    rig_close(&r);
    rig_close(&q);
}

/* A step may be given up with a request to each of them in flight, or before. */
static void abandoned_steps_leave_nothing(void **state)
{
    servers *s = *state;
    for (uint32_t way = 0; way < 2; way++) {
        rig r;
        taken t;
        uint16_t first[64], again[64];
        kvw_seq *seq = run_near(s, &r, "esa", KVK_BF16, way == 0 ? "near" : "rows", &t);
        assert_true(sizeof(first) >= rig_q_width(&r) * sizeof(uint16_t));
        void *q = rig_bytes(&r, r.q, rig_q_width(&r), 0, 300, 1);
        assert_ok(kvw_tokens(seq, r.tokens, 1));
        assert_ok(kvw_append(seq, 0, q, q, 1)); /* any keys will do */
        for (uint32_t i = 0; i < 30; i++) {
            kvw_step *step = NULL;
            for (uint32_t p = 0; p < 640; p++)
                kvwi_residency_drop(&seq->layers[0].residency, p);
            assert_ok(kvw_step_begin(seq, 0, q, 1, &step));
            if (i % 2 == 0)
                assert_ok(kvw_step_attend(step, q));
            if (i == 10 || i == 28)
                assert_ok(kvw_step_finish(step, q, i == 10 ? first : again, NULL));
            else
                kvw_step_abandon(step);
        }
        assert_memory_equal(first, again, rig_q_width(&r) * sizeof(uint16_t));
        free(q);
        kvw_seq_destroy(seq);
        taken_fini(&t);
        rig_close(&r);
    }
}

/* The order of a list is nobody's business; the names are. */
static void names_decide_and_not_the_order(void **state)
{
    static const char *const names[] = {"east", "west", "north"};
    static const char *const turned[] = {"north", "east", "west"};
    servers *s = *state;
    kvc_client *others[] = {s->clients[2], s->clients[0], s->clients[1]};
    rig r;
    taken first, second;
    uint32_t reused = 0;
    store_rig(&r, "esa", KVW_INDEX_COMPRESSED, NULL);
    r.opts.revision = "named";
    servers_use(s, &r, 3);
    r.opts.server_names = names;
    rig_open(&r);
    kvw_seq_destroy(run_seq(&r, &first, 700, &reused));
    assert_int_equal(reused, 0);
    kvw_close(r.worker);
    r.opts.clients = others;
    r.opts.server_names = turned;
    rig_open(&r);
    kvw_seq *seq = run_seq(&r, &second, 700, &reused);
    assert_int_equal(reused, 640);
    assert_string_equal(server_stats_of(seq, 0).name, "north");
    rig_record_equal(&r, &first.record, &second.record, 640, 700);
    kvw_seq_destroy(seq);
    kvw_close(r.worker);
    r.opts.server_names = names; /* on other servers now */
    rig_open(&r);
    seq = open_seq(&r, 700, &reused);
    assert_true(reused < 640);
    kvw_seq_destroy(seq);
    taken_fini(&first);
    taken_fini(&second);
    rig_close(&r);
}

/* A prefix ends at the first block that its server lacks, whatever the others have. */
static void a_prefix_ends_where_a_server_lacks_a_block(void **state)
{
    servers *s = *state;
    for (uint32_t hole = 0; hole < 10; hole += 3) {
        rig r;
        uint32_t reused = 0;
        kvc_op op;
        char revision[32];
        (void)snprintf(revision, sizeof(revision), "hole %u", hole);
        store_rig(&r, "tokenselect", KVW_INDEX_EXACT, NULL);
        r.opts.revision = revision;
        servers_use(s, &r, 3);
        rig_open(&r);
        kvw_seq *seq = open_seq(&r, 0, &reused);
        rig_prefill(&r, seq, 0, 660, NULL, NULL);
        assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
        const kvwi_seq_block *b = &seq->blocks[hole];
        kvc_op_init(&op, NULL, NULL);
        assert_ok(kvc_erase(s->clients[b->server], kvw_schema_digest(r.worker), &b->digest, 1, NULL,
                            0, NULL, 0, &op));
        assert_ok(kvc_op_wait(&op, 0));
        kvw_seq_destroy(seq);
        seq = open_seq(&r, 660, &reused);
        assert_int_equal(reused, hole * 64);
        rig_prefill(&r, seq, reused, 660, NULL, NULL);
        kvw_seq_destroy(seq);
        seq = open_seq(&r, 660, &reused);
        assert_int_equal(reused, 640);
        kvw_seq_destroy(seq);
        rig_close(&r);
    }
}

/* ---- options ---- */

static void refused(rig *r, const char *word)
{
    kvw_worker *worker = NULL;
    assert_status(kvw_open(&r->opts, &worker), KVC_INVALID);
    assert_null(worker);
    if (strstr(kvw_last_error(), word) == NULL)
        fail_msg("\"%s\" does not name %s", kvw_last_error(), word);
}

static void lists_have_rules(void **state)
{
    static const char *const twice[] = {"a", "b", "a"};
    static const char *const empty[] = {"a", "", "b"};
    static const char *const none[] = {"a", NULL, "b"};
    servers *s = *state;
    rig r;
    rig_init(&r, "tokenselect", 10);
    rig_fill(&r);
    servers_use(s, &r, 3);
    r.opts.server_names = twice;
    refused(&r, "server_names");
    r.opts.server_names = empty;
    refused(&r, "server_names");
    r.opts.server_names = none;
    refused(&r, "server_names");
    r.opts.server_names = NULL;
    r.opts.client = s->clients[0];
    refused(&r, "clients");
    r.opts.client = NULL;
    r.opts.n_clients = KVW_MAX_SERVERS + 1;
    refused(&r, "n_clients");
    r.opts.n_clients = 0;
    refused(&r, "n_clients");
    r.opts.n_clients = 3;
    r.opts.clients = NULL;
    refused(&r, "clients");
    rig_close(&r);
}

static void servers_are_counted_from_0(void **state)
{
    rig r;
    uint32_t reused = 0;
    kvw_server_stats stats = {.size_bytes = sizeof(stats)};
    store_rig(&r, "tokenselect", KVW_INDEX_EXACT, NULL);
    servers_use(*state, &r, 2);
    rig_open(&r);
    kvw_seq *seq = open_seq(&r, 0, &reused);
    assert_status(kvw_seq_server_stats(seq, 2, &stats), KVC_INVALID);
    stats.size_bytes = 9;
    assert_status(kvw_seq_server_stats(seq, 1, &stats), KVC_INVALID);
    stats = (kvw_server_stats){.size_bytes = offsetof(kvw_server_stats, blocks), .blocks = 77};
    assert_ok(kvw_seq_server_stats(seq, 1, &stats));
    assert_string_equal(stats.name, "1");
    assert_int_equal(stats.blocks, 77);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(any_number_of_servers_gives_the_same_bits),
        cmocka_unit_test(a_step_asks_each_server_once),
        cmocka_unit_test(partials_of_servers_merge),
        cmocka_unit_test(a_busy_server_sends_rows_and_others_attend),
        cmocka_unit_test(what_is_left_over_keeps_its_name),
        cmocka_unit_test(abandoned_steps_leave_nothing),
        cmocka_unit_test(names_decide_and_not_the_order),
        cmocka_unit_test(a_prefix_ends_where_a_server_lacks_a_block),
        cmocka_unit_test(lists_have_rules),
        cmocka_unit_test(servers_are_counted_from_0),
    };
    return cmocka_run_group_tests(tests, open_servers, close_servers);
}
