/*
 * worker_device_test.c: steps on a device, of one query and of many: alone, over a real cachesvc
 * through shared memory and by requests, and over a store that loses rows; against the brute-force
 * oracle and against the CPU worker on the same inputs.
 *
 * Links with CUDA (SKIPPED where there is no GPU), or with a fake of it (tests/support).
 */
#include "bench.h"
#include "oracle.h"

#include <signal.h>

#include "base/clock.h"
#include "daemon.h"

#define N_TOKENS 900u
#define PREFILL  832u
#define DIMS     30u

static void device_rig(rig *r, kvc_client *client, const char *backend)
{
    rig_init(r, "esa", N_TOKENS);
    r->opts.client = client;
    r->opts.way = rig_rows_way(client);
    r->opts.backend = backend;
    r->opts.dtype = KVK_BF16;
    r->opts.head_dim = 64;
    r->opts.n_q_heads = 8;
    r->opts.n_kv_heads = 4;
    r->opts.index = KVW_INDEX_COMPRESSED;
    r->opts.residency_slots = 96;
    r->opts.max_tokens = 512; /* it outgrows them */
    rig_project(r, DIMS);
}

/* Sums are exact whatever their order, so both backends see the same scores. */
static void exact_rig(rig *r, kvc_client *client, const char *backend)
{
    device_rig(r, client, backend);
    r->opts.rope.theta = 0;
    r->grain = 0.125;
    rig_project(r, DIMS);
}

static kvw_seq *open_seq(rig *r, uint32_t n_known, uint32_t *reused_p)
{
    kvw_seq *seq = NULL;
    assert_ok(kvw_seq_create(r->worker, r->tokens, n_known, &seq, reused_p));
    return seq;
}

static void flush(kvw_seq *seq)
{
    assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
}

/* Prefilled and decoded on the device, against the oracle; all of its steps are the device's. */
static kvw_stats decode_all(rig *r)
{
    uint32_t reused = 0, dims = DIMS, chunk = r->opts.chunk_tokens;
    kvw_seq *seq = open_seq(r, 0, &reused);
    rig_prefill(r, seq, 0, 2 * chunk, oracle_check_step, &dims);
    rig_prefill(r, seq, 2 * chunk, PREFILL - chunk, NULL, NULL); /* the oracle takes its time */
    rig_prefill(r, seq, PREFILL - chunk, PREFILL, oracle_check_step, &dims);
    assert_int_equal(stats_of(seq).steps_device, 2 * ((PREFILL + chunk - 1u) / chunk));
    flush(seq);
    rig_decode(r, seq, PREFILL, N_TOKENS, oracle_check_step, &dims);
    kvw_stats stats = stats_of(seq);
    assert_int_equal(stats.steps_device, stats.steps);
    flush(seq);
    kvw_seq_destroy(seq);
    return stats;
}

static void steps_are_the_oracles(void **state)
{
    (void)state;
    rig r;
    device_rig(&r, NULL, "cuda");
    rig_open(&r);
    kvw_stats stats = decode_all(&r);
    assert_true(stats.hits > 0 && stats.misses > 0 && stats.bytes_device > 0);
    assert_true(stats.host_syncs < stats.steps_device + 70); /* a chunk's result is one more */
    rig_close(&r);
}

/* Windows of every size against the chunk: fewer tokens than sinks, a recent window that is shorter
 * than a pass, passes that are no chunk, single tokens over a context that is attended whole. */
static void windows_of_any_size(void **state)
{
    (void)state;
    static const struct {
        uint32_t n_sink, n_recent, k, chunk, head_dim;
    } shapes[] = {{8, 40, 48, 64, 64},
                  {8, 1, 16, 128, 64},
                  {40, 8, 48, 16, 128},
                  {72, 4, 300, 64, 64},
                  {8, 300, 48, 256, 64}};
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        rig r;
        uint32_t reused = 0, dims = DIMS;
        device_rig(&r, NULL, "cuda");
        r.opts.n_sink = shapes[i].n_sink;
        r.opts.n_recent = shapes[i].n_recent;
        r.opts.k = shapes[i].k;
        r.opts.chunk_tokens = shapes[i].chunk;
        r.opts.head_dim = shapes[i].head_dim;
        r.opts.residency_slots = shapes[i].k + 5u;
        r.opts.eps = i % 2;
        rig_project(&r, DIMS);
        rig_open(&r);
        kvw_seq *seq = open_seq(&r, 0, &reused);
        rig_decode(&r, seq, 0, 10, oracle_check_step, &dims);
        rig_pass(&r, seq, 10, shapes[i].chunk / 2u, oracle_check_step, &dims);
        rig_prefill(&r, seq, 10 + shapes[i].chunk / 2u, 190, oracle_check_step, &dims);
        rig_decode(&r, seq, 190, 192, oracle_check_step, &dims);
        rig_pass(&r, seq, 192, 3, oracle_check_step, &dims);
        kvw_stats stats = stats_of(seq);
        assert_true(stats.full_steps > 0 && stats.steps_device == stats.steps);
        kvw_seq_destroy(seq);
        rig_close(&r);
    }
}

static void the_window_is_widened(void **state)
{
    (void)state;
    rig r;
    uint32_t reused = 0;
    const uint32_t *a = NULL, *b = NULL;
    uint32_t n_a = 0, n_b = 0, picks[2][96];
    for (int i = 0; i < 2; i++) {
        exact_rig(&r, NULL, i == 0 ? "cpu" : "cuda");
        r.opts.eps = 2;
        rig_open(&r);
        kvw_seq *seq = open_seq(&r, 0, &reused);
        rig_prefill(&r, seq, 0, PREFILL, NULL, NULL);
        rig_decode(&r, seq, PREFILL, PREFILL + 2, NULL, NULL);
        assert_ok(kvw_last_picks(seq, 1, i == 0 ? &a : &b, i == 0 ? &n_a : &n_b));
        memcpy(picks[i], i == 0 ? a : b, sizeof(uint32_t) * r.opts.k);
        kvw_seq_destroy(seq);
        rig_close(&r);
    }
    assert_int_equal(n_a, 48);
    assert_int_equal(n_a, n_b);
    assert_memory_equal(picks[0], picks[1], n_a * sizeof(uint32_t));
}

/* Picks of every step of a run, [layer][token][k], and its outputs. */
typedef struct taken {
    rig_record record;
    uint32_t *picks;
} taken;

static void take(void *arg, const rig *r, const rig_step *step)
{
    taken *t = arg;
    const uint32_t *picks = NULL;
    uint32_t n = 0;
    rig_record_step(&t->record, r, step);
    assert_ok(kvw_last_picks(step->seq, step->layer, &picks, &n));
    assert_true(n == r->opts.k || n == 0); /* where everything is attended */
    memcpy(t->picks + ((size_t)step->layer * r->n_tokens + step->first) * r->opts.k, picks,
           n * sizeof(*picks));
}

static void take_run(taken *t, kvc_client *client, const char *backend)
{
    rig r;
    uint32_t reused = 0;
    exact_rig(&r, client, backend);
    rig_open(&r);
    rig_record_init(&t->record, &r);
    t->picks = calloc((size_t)r.opts.n_layers * r.n_tokens * r.opts.k, sizeof(*t->picks));
    assert_non_null(t->picks);
    kvw_seq *seq = open_seq(&r, 0, &reused);
    rig_prefill(&r, seq, 0, PREFILL, take, t);
    flush(seq);
    rig_decode(&r, seq, PREFILL, N_TOKENS, take, t);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

static void check_like_the_cpu(kvc_client *client)
{
    taken cpu, device;
    rig r;
    take_run(&cpu, NULL, "cpu");
    take_run(&device, client, "cuda");
    exact_rig(&r, NULL, "cpu");
    size_t n = (size_t)r.opts.n_layers * r.n_tokens * r.opts.k;
    assert_memory_equal(cpu.picks, device.picks, n * sizeof(uint32_t));
    /* one rounding to bf16 of the same sums in another order; values are below 2 */
    assert_true(rig_record_diff(&r, &cpu.record, &device.record, 0, N_TOKENS) <= 0x1p-7);
    rig_close(&r);
    rig_record_fini(&cpu.record);
    rig_record_fini(&device.record);
    free(cpu.picks);
    free(device.picks);
}

static void picks_are_the_cpus(void **state)
{
    (void)state;
    check_like_the_cpu(NULL);
}

/* ---- a server of its own ---- */

typedef struct served {
    char folder[256], shm[300], grpc[256];
    support_daemon daemon;
    kvc_client *client;
} served;

static void connect_to(served *s, const char *uri)
{
    const kvc_client_opts opts = {
        .size_bytes = sizeof(opts), .uris = uri, .connect_timeout_ns = SUPPORT_PATIENCE_NS};
    kvc_client_close(s->client);
    s->client = NULL;
    assert_ok(kvc_client_open(&opts, &s->client));
}

static int open_served(void **state)
{
    char listen[600];
    served *s = calloc(1, sizeof(*s));
    assert_non_null(s);
    support_make_folder(s->folder, sizeof(s->folder));
    char *whole = realpath(s->folder, NULL); /* of a socket that others find */
    assert_non_null(whole);
    (void)snprintf(s->shm, sizeof(s->shm), "shm://%s/shm.sock", whole);
    free(whole);
#ifdef KVASIR_GRPC
    (void)snprintf(listen, sizeof(listen), "grpc://127.0.0.1:0,%s", s->shm);
#else
    (void)snprintf(listen, sizeof(listen), "%s", s->shm);
#endif
    const char *args[] = {"--listen", listen, "--dram-bytes", "256MiB", NULL};
    assert_true(support_daemon_start(&s->daemon, s->folder, args));
    (void)snprintf(s->grpc, sizeof(s->grpc), "%s", s->daemon.uri);
    connect_to(s, s->shm);
    *state = s;
    return 0;
}

static int close_served(void **state)
{
    served *s = *state;
    kvc_client_close(s->client);
    (void)support_daemon_stop(&s->daemon, SIGTERM);
    support_remove_folder(s->folder);
    free(s);
    return 0;
}

static void rows_come_over_shm(void **state)
{
    served *s = *state;
    rig r;
    device_rig(&r, s->client, "cuda");
    rig_open(&r);
    kvw_stats stats = decode_all(&r);
    assert_true(stats.full_steps > 0 && stats.misses > 100 && stats.rows_dram == stats.misses);
    /* once a step, and a few times where a block was put or the context mapped anew */
    assert_true(stats.host_syncs < stats.steps_device + 90);
    rig_close(&r);
    check_like_the_cpu(s->client);
}

#ifdef KVASIR_GRPC
static void rows_come_by_request(void **state)
{
    served *s = *state;
    rig r;
    connect_to(s, s->grpc);
    device_rig(&r, s->client, "cuda");
    rig_open(&r);
    kvw_stats stats = decode_all(&r);
    assert_true(stats.misses > 100 && stats.requests > 50);
    assert_true(stats.host_syncs < 2 * stats.steps_device + 90);
    rig_close(&r);
    check_like_the_cpu(s->client);
}
#endif

/* A second worker finds the first one's blocks and index; its steps are the same. */
static void a_prefix_is_brought_to_the_device(void **state)
{
    served *s = *state;
    rig r;
    rig_record cold, warm;
    uint32_t reused = 0;
    device_rig(&r, s->client, "cuda");
    rig_open(&r);
    rig_record_init(&cold, &r);
    rig_record_init(&warm, &r);
    for (int i = 0; i < 2; i++) {
        kvw_seq *seq = open_seq(&r, N_TOKENS, &reused);
        assert_int_equal(reused, i == 0 ? 0 : PREFILL);
        rig_prefill(&r, seq, reused, PREFILL, NULL, NULL);
        flush(seq);
        rig_decode(&r, seq, PREFILL, N_TOKENS, rig_record_step, i == 0 ? &cold : &warm);
        flush(seq);
        assert_int_equal(stats_of(seq).index_rows_rebuilt, 0);
        kvw_seq_destroy(seq);
    }
    rig_record_equal(&r, &cold, &warm, PREFILL, N_TOKENS);
    rig_record_fini(&cold);
    rig_record_fini(&warm);
    rig_close(&r);
}

/* ---- steps in parts, and what is taken back ---- */

typedef struct parts {
    void *k, *v, *q, *other, *out;
    float lse[8];
} parts;

static parts parts_of(const rig *r, uint32_t layer, uint32_t at)
{
    parts p = {.k = rig_bytes(r, r->k, rig_kv_width(r), layer, at, 1),
               .v = rig_bytes(r, r->v, rig_kv_width(r), layer, at, 1),
               .q = rig_bytes(r, r->q, rig_q_width(r), layer, at, 1),
               .other = rig_bytes(r, r->q, rig_q_width(r), layer, at - 7u, 1),
               .out = malloc(rig_q_width(r) * sizeof(float))};
    assert_non_null(p.out);
    return p;
}

static void parts_fini(parts *p)
{
    free(p->k);
    free(p->v);
    free(p->q);
    free(p->other);
    free(p->out);
}

/* In parts, with an abandoned step before and the layers' steps open at once. */
static void pass_in_parts(rig *r, kvw_seq *seq, uint32_t at)
{
    uint32_t dims = DIMS;
    parts p[2];
    kvw_step *step[2];
    assert_ok(kvw_tokens(seq, r->tokens + at, 1));
    for (uint32_t layer = 0; layer < 2; layer++) {
        p[layer] = parts_of(r, layer, at);
        assert_ok(kvw_append(seq, layer, p[layer].k, p[layer].v, 1));
        assert_ok(kvw_step_begin(seq, layer, p[layer].other, 1, &step[layer]));
        kvw_step_abandon(step[layer]);
        assert_ok(kvw_step_begin(seq, layer, p[layer].q, 1, &step[layer]));
    }
    assert_ok(kvw_step_attend(step[1], p[1].q));
    for (uint32_t layer = 0; layer < 2; layer++) {
        assert_ok(kvw_step_finish(step[layer], p[layer].q, p[layer].out, p[layer].lse));
        const rig_step done = {.seq = seq,
                               .layer = layer,
                               .first = at,
                               .n = 1,
                               .out = p[layer].out,
                               .lse = p[layer].lse};
        oracle_check_step(&dims, r, &done);
        parts_fini(&p[layer]);
    }
}

static void steps_go_in_parts(void **state)
{
    served *s = *state;
    rig r;
    uint32_t reused = 0, dims = DIMS;
    device_rig(&r, s->client, "cuda");
    rig_open(&r);
    kvw_seq *seq = open_seq(&r, 0, &reused);
    rig_prefill(&r, seq, 0, 700, NULL, NULL);
    flush(seq);
    for (uint32_t at = 700; at < 720; at++)
        pass_in_parts(&r, seq, at);
    kvw_stats stats = stats_of(seq);
    assert_true(stats.rows_ahead > 0 && stats.rows_ahead <= stats.misses);
    /* taken back, prefilled over, and decoded again */
    rig_pass(&r, seq, 720, 1, NULL, NULL);
    assert_ok(kvw_truncate(seq, 720));
    rig_pass(&r, seq, 720, 30, NULL, NULL);
    assert_ok(kvw_truncate(seq, 731));
    rig_decode(&r, seq, 731, 800, oracle_check_step, &dims);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* A long pass of which one query was asked in each layer. */
static void pass_of_one_query(const rig *r, kvw_seq *seq, uint32_t at, uint32_t n)
{
    assert_ok(kvw_tokens(seq, r->tokens + at, n));
    for (uint32_t layer = 0; layer < 2; layer++) {
        void *k = rig_bytes(r, r->k, rig_kv_width(r), layer, at, n);
        void *v = rig_bytes(r, r->v, rig_kv_width(r), layer, at, n);
        parts p = parts_of(r, layer, at + n - 1u);
        assert_ok(kvw_append(seq, layer, k, v, n));
        kvw_step *step = NULL;
        assert_ok(kvw_step_begin(seq, layer, p.q, 1, &step));
        assert_ok(kvw_step_finish(step, p.q, p.out, p.lse));
        parts_fini(&p);
        free(k);
        free(v);
    }
}

/* Rows that were picked and are then taken back are not those of the tokens that follow. */
static void rows_taken_back_are_forgotten(void **state)
{
    (void)state;
    rig r;
    uint32_t reused = 0, dims = DIMS;
    device_rig(&r, NULL, "cuda");
    r.opts.chunk_tokens = 256;
    r.opts.block_tokens = 64;
    rig_open(&r);
    kvw_seq *seq = open_seq(&r, 0, &reused);
    rig_prefill(&r, seq, 0, 256, NULL, NULL);
    pass_of_one_query(&r, seq, 600, 256); /* at 256 */
    assert_int_equal(stats_of(seq).steps_device, 2 + 2);
    assert_ok(kvw_truncate(seq, 256));
    rig_prefill(&r, seq, 256, 512, NULL, NULL);
    rig_decode(&r, seq, 512, 700, oracle_check_step, &dims);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* ---- a store that loses rows ---- */

/* The same in a pass of 8 tokens. */
static void lose_in_a_chunk(const rig *r, kvw_seq *seq, uint32_t at)
{
    uint64_t dropped = stats_of(seq).rows_dropped;
    assert_ok(kvw_tokens(seq, r->tokens + at, 8));
    for (uint32_t layer = 0; layer < 2; layer++) {
        void *k = rig_bytes(r, r->k, rig_kv_width(r), layer, at, 8);
        void *v = rig_bytes(r, r->v, rig_kv_width(r), layer, at, 8);
        void *q = rig_bytes(r, r->q, rig_q_width(r), layer, at, 8);
        kvc_status st = kvw_forward(seq, layer, q, k, v, 8, q, NULL);
        assert_int_equal(st, r->opts.policy == KVW_FAIL ? KVC_NOT_FOUND : KVC_OK);
        free(k);
        free(v);
        free(q);
    }
    assert_true((stats_of(seq).rows_dropped > dropped) == (r->opts.policy == KVW_DROP));
}

static void lost_rows_fail_or_are_dropped(void **state)
{
    bench *b = *state;
    for (kvw_policy policy = KVW_FAIL; policy <= KVW_DROP; policy++) {
        rig r;
        uint32_t reused = 0, dims = DIMS;
        device_rig(&r, b->client, "cuda");
        r.opts.policy = policy;
        r.opts.revision = policy == KVW_FAIL ? "fail" : "drop";
        rig_open(&r);
        kvw_seq *seq = open_seq(&r, 0, &reused);
        rig_prefill(&r, seq, 0, PREFILL, NULL, NULL);
        flush(seq);
        store_set(&b->store, &(store_faults){.lose_every = 3});
        assert_ok(kvw_tokens(seq, r.tokens + PREFILL, 1));
        for (uint32_t layer = 0; layer < 2; layer++) {
            parts p = parts_of(&r, layer, PREFILL);
            assert_ok(kvw_append(seq, layer, p.k, p.v, 1));
            kvw_step *step = NULL;
            assert_ok(kvw_step_begin(seq, layer, p.q, 1, &step));
            kvc_status st = kvw_step_finish(step, p.q, p.out, p.lse);
            assert_int_equal(st, policy == KVW_FAIL ? KVC_NOT_FOUND : KVC_OK);
            parts_fini(&p);
        }
        assert_true((stats_of(seq).rows_dropped > 0) == (policy == KVW_DROP));
        lose_in_a_chunk(&r, seq, PREFILL + 1);
        store_set(&b->store, &(store_faults){0});
        /* what was lost is not taken for resident */
        rig_pass(&r, seq, PREFILL + 9, 3, oracle_check_step, &dims);
        rig_decode(&r, seq, PREFILL + 12, PREFILL + 20, oracle_check_step, &dims);
        kvw_seq_destroy(seq);
        rig_close(&r);
    }
}

static void what_it_cannot_do_is_refused(void **state)
{
    (void)state;
    static const char *const want[] = {"index",
                                       "dtype",
                                       "head_dim",
                                       "k:",
                                       "device_memory",
                                       "backend",
                                       "n_kv_heads: times head_dim: 16 rows",
                                       "n_kv_heads: times head_dim must",
                                       "residency_slots"};
    for (uint32_t i = 0; i < 9; i++) {
        rig r;
        device_rig(&r, NULL, "cuda");
        r.opts.index = i == 0 ? KVW_INDEX_EXACT : r.opts.index;
        r.opts.selector = i == 0 ? "tokenselect" : r.opts.selector;
        r.opts.projection_path = i == 0 ? NULL : r.opts.projection_path;
        r.opts.dtype = i == 1 ? KVK_F16 : r.opts.dtype;
        r.opts.k = i == 3 ? 5000 : r.opts.k;
        r.opts.residency_slots = i == 3 ? 0 : r.opts.residency_slots;
        r.opts.device_memory = i == 4;
        r.opts.backend = i == 4 ? "cpu" : i == 5 ? "cuda:99" : "cuda";
        r.opts.head_dim = i == 2 ? 32 : i == 6 || i == 7 ? 128 : r.opts.head_dim;
        r.opts.n_kv_heads = i == 6 ? 32 : i == 7 ? 65 : r.opts.n_kv_heads;
        r.opts.n_q_heads = i == 6 ? 32 : i == 7 ? 65 : r.opts.n_q_heads;
        r.opts.residency_slots = i == 8 ? (1u << 20) : r.opts.residency_slots;
        if (i == 2 || i == 6 || i == 7)
            rig_project(&r, DIMS);
        kvc_status st = kvw_open(&r.opts, &r.worker);
        assert_int_equal(st, i == 4 ? KVC_INVALID : KVC_UNSUPPORTED);
        assert_true(strncmp(kvw_last_error(), want[i], strlen(want[i])) == 0);
        rig_close(&r);
    }
}

static int find_device(void)
{
    rig r;
    device_rig(&r, NULL, "cuda");
    return rig_find_device(&r);
}

/* An argument is a pattern of tests ("steps*"). */
int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(steps_are_the_oracles),
        cmocka_unit_test(windows_of_any_size),
        cmocka_unit_test(picks_are_the_cpus),
        cmocka_unit_test(the_window_is_widened),
        cmocka_unit_test(what_it_cannot_do_is_refused),
        cmocka_unit_test(rows_taken_back_are_forgotten),
        cmocka_unit_test_setup_teardown(lost_rows_fail_or_are_dropped, bench_open, bench_close),
        cmocka_unit_test_setup_teardown(rows_come_over_shm, open_served, close_served),
#ifdef KVASIR_GRPC
        cmocka_unit_test_setup_teardown(rows_come_by_request, open_served, close_served),
#endif
        cmocka_unit_test_setup_teardown(a_prefix_is_brought_to_the_device, open_served,
                                        close_served),
        cmocka_unit_test_setup_teardown(steps_go_in_parts, open_served, close_served),
    };
    int absent = find_device();
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    return absent != 0 ? absent : cmocka_run_group_tests(tests, NULL, NULL);
}
