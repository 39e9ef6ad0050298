/*
 * attend_gpu_test.c: AttendRows on the server's GPU against attention in double: rows of dram that
 * are pinned and rows of the gpu tier, groups that a GPU and the CPU share, and calls that stay on
 * the CPU.
 *
 * Over a fake of kvk/cuda.h, which counts the rows that it reads; with KVS_TEST_DEVICE on a GPU,
 * without what only a fake can do. What a thread of the server's does is waited for, 60 s at most.
 */
#include <math.h>
#include <stdio.h>

#include "attend_gpu_rig.h"

static void test_shapes_from_dram(void **state)
{
    static const a_shape shapes[] = {
        {1, 32, 8, 128, KVC_DTYPE_BF16, KVC_DTYPE_BF16, KVC_DTYPE_BF16, KVC_ROPE_PLAIN, 0, 0, false,
         300, true},
        {1, 32, 8, 128, KVC_DTYPE_F16, KVC_DTYPE_F32, KVC_DTYPE_F32, KVC_ROPE_PLAIN, 0.1, 0, true,
         200, false},
        {4, 18, 6, 64, KVC_DTYPE_BF16, KVC_DTYPE_F16, KVC_DTYPE_F16, KVC_ROPE_LLAMA3, 0, 5, true,
         129, true},
        {1, 32, 8, 128, KVC_DTYPE_E4M3, KVC_DTYPE_BF16, KVC_DTYPE_F32, KVC_ROPE_PLAIN, 0, 0, true,
         300, false},
        {3, 16, 8, 64, KVC_DTYPE_I8, KVC_DTYPE_F32, KVC_DTYPE_F32, KVC_ROPE_LLAMA3, 0, 0, false,
         200, true},
    };
    a_server *f = *state;
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        char what[32];
        snprintf(what, sizeof(what), "shape %zu", i);
        start_pinned(f, &shapes[i]);
        assert_int_equal(ask(f, &shapes[i], what), shapes[i].n_picks);
        assert_int_equal(f->peer->xfer.reply.u.fetch_rows.rows_dram, shapes[i].n_picks);
        a_stop(f);
        assert_int_equal(metric(KVC_M_attend_gpu_pinned_bytes), 0);
    }
}

/* What is small, what the device does not take, and a server without the setting stay as they
 * were. */
static void test_what_stays_on_the_cpu(void **state)
{
    a_server *f = *state;
    a_shape s = large;
    start_pinned(f, &s);
    s.n_picks = 100; /* 400 KiB */
    assert_int_equal(ask(f, &s, "few rows"), 0);
    s.n_picks = 128;
    assert_int_equal(ask(f, &s, "just enough"), 128);
    a_stop(f);
    s = (a_shape){.n_q = 2,
                  .n_q_heads = 32,
                  .kv_heads = 32,
                  .dim = 32,
                  .dtype = KVC_DTYPE_BF16,
                  .q_dtype = KVC_DTYPE_F32,
                  .o_dtype = KVC_DTYPE_F32,
                  .rope = KVC_ROPE_PLAIN,
                  .n_picks = 600};
    a_start(f, &s, N_BLOCKS); /* heads of 32 */
    a_choose(&s, picks, ranks);
    uint32_t asked = asked_to_pin();
    assert_int_equal(ask(f, &s, "another width"), 0);
    assert_int_equal(metric(KVC_M_attend_gpu_pinned_bytes), 0);
    a_stop(f); /* what was to be pinned has been by now */
    assert_int_equal(asked_to_pin(), asked);
    f->h.settings.attend_gpu_bytes = 0;
    a_start(f, &large, N_BLOCKS);
    a_choose(&large, picks, ranks);
    assert_int_equal(ask(f, &large, "not asked for"), 0);
    assert_int_equal(metric(KVC_M_attend_gpu), 0);
    a_stop(f);
}

/* Half of the blocks lie in a segment that may be pinned; the CPU has the rest of the group. */
static void test_shared_with_the_cpu(void **state)
{
    a_server *f = *state;
    a_ask a;
    uint64_t n = 0;
    f->h.settings.dram_bytes = 16u << 20;
    f->h.settings.attend_gpu_bytes = 1u << 20;
    a_start(f, &large, N_BLOCKS);
    a_choose(&large, picks, ranks);
    (void)ask(f, &large, "while it is pinned");
    wait_metric(KVC_M_attend_gpu_pinned_bytes, 1u << 20);
    for (uint32_t i = 0; i < large.n_picks; i++)
        n += picks[i] / H_TOKENS / 4 == picks[0] / H_TOKENS / 4;
    assert_true(n > 0 && n < large.n_picks);
    assert_int_equal(ask(f, &large, "shared"), n);
    a_ask_init(&a, f, &large, picks, NULL, 200);
    a.groups[1] = (kvc_row_group){f->context, 7, 100, picks + 200};
    a.queries[1] = a.queries[0];
    a.queries[1].same_q = true;
    a.req.u.fetch_rows.n_groups = 2;
    uint64_t before = metric(KVC_M_rows_attended_gpu);
    assert_int_equal(h_call(f->peer, &a.req), KVC_OK);
    assert_int_equal(metric(KVC_M_rows_attended_gpu) - before, n);
    for (uint32_t g = 0; g < 2; g++) {
        a_result(f, &large, g, &got);
        a_oracle(&large, a.groups[g].picks, NULL, a.groups[g].n_picks, NULL, &want);
        a_check_equal(&large, &got, &want, "one of two that are shared");
    }
    free(a.q);
    assert_int_equal(metric(KVC_M_attend_gpu_pinned_bytes), 1u << 20);
    a_stop(f);
}

/* Groups of one call, of which a GPU has several, with queries that are sent once. */
static void test_groups(void **state)
{
    a_server *f = *state;
    const a_shape *s = &large;
    a_ask a;
    start_pinned(f, s);
    a_ask_init(&a, f, s, picks, NULL, 150);
    for (uint32_t g = 1; g < 4; g++) {
        static const uint32_t first[] = {0, 150, 151, 151}, n[] = {150, 1, 0, 149};
        a.groups[g] = (kvc_row_group){f->context, 7, n[g], picks + first[g]};
        a.queries[g] = a.queries[0];
        a.queries[g].same_q = true;
    }
    a.req.u.fetch_rows.n_groups = 4;
    uint64_t before = metric(KVC_M_rows_attended_gpu);
    assert_int_equal(h_call(f->peer, &a.req), KVC_OK);
    assert_int_equal(metric(KVC_M_rows_attended_gpu) - before, 300);
    a_result(f, s, 0, &got);
    for (uint32_t g = 1; g < 4; g++) {
        a_result(f, s, g, &other);
        a_merge(s, &got, &other);
    }
    a_oracle(s, picks, NULL, 300, NULL, &want);
    a_check_equal(s, &got, &want, "four groups");
    free(a.q);
    a_stop(f);
}

/* As many queries as a call may have, and as many groups as a model has layers. */
static void test_the_largest_calls(void **state)
{
    enum { N_GROUPS = 80, N = 8 };
    static kvc_row_group groups[N_GROUPS];
    static kvc_attend_query queries[N_GROUPS];
    a_server *f = *state;
    a_shape s = large;
    a_ask a;
    s.n_q = KVC_MAX_ATTEND_QUERIES;
    s.o_dtype = KVC_DTYPE_BF16;
    s.n_picks = 40;
    start_pinned(f, &large);
    a_ask_init(&a, f, &s, picks, NULL, s.n_picks);
    uint64_t before = metric(KVC_M_rows_attended_gpu);
    assert_int_equal(h_call(f->peer, &a.req), KVC_OK);
    assert_int_equal(metric(KVC_M_rows_attended_gpu) - before, s.n_picks);
    free(a.q);
    s.n_q = 1;
    a_ask_init(&a, f, &s, picks, NULL, N);
    for (uint32_t g = 0; g < N_GROUPS; g++) {
        groups[g] = (kvc_row_group){f->context, 7, N, picks + g % 30 * N};
        queries[g] = a.queries[0];
        queries[g].same_q = g > 0;
    }
    a.req.u.fetch_rows.n_groups = N_GROUPS;
    a.req.u.fetch_rows.groups = groups;
    a.req.u.fetch_rows.queries = queries;
    before = metric(KVC_M_rows_attended_gpu);
    assert_int_equal(h_call(f->peer, &a.req), KVC_OK);
    assert_int_equal(metric(KVC_M_rows_attended_gpu) - before, N_GROUPS * N);
    a_result(f, &s, N_GROUPS - 1, &got);
    a_oracle(&s, picks + (N_GROUPS - 1) % 30 * N, NULL, N, NULL, &want);
    a_check_equal(&s, &got, &want, "the last of many groups");
    free(a.q);
    a_stop(f);
}

/* What a lane has no room for is the CPU's. */
static void test_groups_without_room(void **state)
{
    enum { N = 100 };
    static uint32_t of_block[4][N];
    a_server *f = *state;
    a_ask a;
    start_pinned(f, &large);
    kvs_attender *attender = f->h.server->attender;
    const kvs_gpu_attend_ops *ops = attender->gpu_ops;
    kvs_gpu_attend_ops small = *ops;
    small.lane_room.out_bytes = 40000; /* of two groups */
    attender->gpu_ops = &small;
    for (uint32_t g = 0; g < 4; g++)
        for (uint32_t i = 0; i < N; i++)
            of_block[g][i] = g * H_TOKENS + i % H_TOKENS;
    a_ask_init(&a, f, &large, of_block[0], NULL, N);
    for (uint32_t g = 1; g < 4; g++) {
        a.groups[g] = (kvc_row_group){f->context, 7, N, of_block[g]};
        a.queries[g] = a.queries[0];
        a.queries[g].same_q = true;
    }
    a.req.u.fetch_rows.n_groups = 4;
    uint64_t before = metric(KVC_M_rows_attended_gpu);
    assert_int_equal(h_call(f->peer, &a.req), KVC_OK);
    assert_int_equal(metric(KVC_M_rows_attended_gpu) - before, 2 * N);
    for (uint32_t g = 0; g < 4; g++) {
        a_result(f, &large, g, &got);
        a_oracle(&large, of_block[g], NULL, N, NULL, &want);
        a_check_equal(&large, &got, &want, "a group, with room or without");
    }
    free(a.q);
    attender->gpu_ops = ops;
    a_stop(f);
}

/* More rows than a piece has: partials of pieces merge on the device. */
static void test_pieces(void **state)
{
    enum { N = 9000 };
    static uint32_t many[N];
    a_server *f = *state;
    const a_shape *s = &large;
    a_ask a;
    start_pinned(f, s);
    for (uint32_t i = 0; i < N; i++) /* each as often as the others: the partial of all once */
        many[i] = picks[i % 300];
    a_ask_init(&a, f, s, many, NULL, N);
    uint64_t before = metric(KVC_M_rows_attended_gpu);
    assert_int_equal(h_call(f->peer, &a.req), KVC_OK);
    assert_int_equal(metric(KVC_M_rows_attended_gpu) - before, N);
    a_result(f, s, 0, &got);
    a_oracle(s, picks, NULL, 300, NULL, &want);
    for (uint32_t i = 0; i < s->n_q_heads; i++)
        want.lse[i] += 3.40119738166215537541; /* ln 30 */
    a_check_equal(s, &got, &want, "9,000 rows");
    free(a.q);
    a_stop(f);
}

/* Copies in the gpu tier are attended over there, and nothing is pinned for it. */
static void test_rows_of_the_gpu_tier(void **state)
{
    a_server *f = *state;
    f->h.settings.gpu_bytes = 32u << 20;
    f->h.settings.attend_gpu_bytes = 64u << 20;
    a_start(f, &large, N_BLOCKS);
    a_choose(&large, picks, ranks);
    uint32_t asked = asked_to_pin();
    prefetch(f);
    assert_int_equal(ask(f, &large, "copies"), large.n_picks);
    assert_int_equal(f->peer->xfer.reply.u.fetch_rows.rows_gpu, large.n_picks);
    assert_int_equal(metric(KVC_M_attend_gpu_pinned_bytes), 0);
#ifndef KVS_TEST_DEVICE
    fake_cuda_damage(); /* of every row: nobody holds them against sums here */
    a_attend(f, &large, picks, NULL, large.n_picks, &other);
    assert_true(other.lse[0] != got.lse[0]);
#endif
    a_stop(f); /* what was to be pinned has been by now */
    assert_int_equal(asked_to_pin(), asked);
}

typedef struct client {
    a_server *f;
    kvc_thread thread;
    a_partial want;
    uint32_t n_wrong;
} client;

static void client_main(void *arg)
{
    client *c = arg;
    a_partial *mine = malloc(sizeof(*mine));
    h_peer *peer = h_connect(kvs_server_uri(c->f->h.server, 0), "default");
    a_server view = *c->f;
    a_ask a;
    view.peer = peer;
    a_ask_init(&a, &view, &large, picks, NULL, large.n_picks);
    for (uint32_t i = 0; i < 12; i++) {
        kvc_status status = h_call(peer, &a.req);
        c->n_wrong += status != KVC_OK; /* so few may all wait */
        if (status != KVC_OK)
            continue;
        a_result(&view, &large, 0, mine);
        for (uint32_t h = 0; h < large.n_q_heads; h++)
            c->n_wrong += !(fabs(mine->lse[h] - c->want.lse[h]) < 1e-4 &&
                            fabs(mine->o[h * 128] - c->want.o[h * 128]) < 1e-4);
    }
    free(a.q);
    free(mine);
    h_disconnect(peer);
}

/* More calls at once than lanes: the others wait for nobody, and all have the same result. */
static void test_many_at_once(void **state)
{
    static client clients[8];
    a_server *f = *state;
    f->h.settings.attend_threads = 8;
    start_pinned(f, &large);
    uint64_t before = metric(KVC_M_rows_attended_gpu);
    for (int i = 0; i < 8; i++) {
        clients[i] = (client){.f = f, .want = want};
        assert_int_equal(kvc_thread_start(&clients[i].thread, "client", client_main, &clients[i]),
                         KVC_OK);
    }
    for (int i = 0; i < 8; i++) {
        kvc_thread_join(&clients[i].thread);
        assert_int_equal(clients[i].n_wrong, 0);
    }
    assert_true(metric(KVC_M_rows_attended_gpu) - before >= large.n_picks);
    a_stop(f);
}

/* A segment that another tenant gets is read by the GPU no more. */
static void test_a_segment_goes(void **state)
{
    a_server *f = *state;
    char both[600], tenants[32], uri[300];
    h_temp_dir(f->dir);
    snprintf(uri, sizeof(uri), "shm://%s/socket", f->dir);
    snprintf(both, sizeof(both), "%s,%s", f->h.settings.listen, uri);
    snprintf(tenants, sizeof(tenants), "%u:second", (unsigned)geteuid());
    f->h.settings.listen = both;
    f->h.settings.shm_tenants = tenants;
    start_pinned(f, &large);
    kvc_request req = {.method = KVC_ERASE};
    req.u.erase.context = f->context;
    assert_int_equal(h_call(f->peer, &req), KVC_OK);
    kvs_server_tick(f->h.server);
    /* Another tenant's values take every segment there is. */
    h_peer *second = h_connect(uri, NULL);
    h_schema schema;
    const uint32_t part = 0;
    h_schema_init(&schema, "other", 1, 4096, false);
    assert_int_equal(h_register(second, &schema), KVC_OK);
    for (uint32_t b = 0; b < 15 * 16 + 8; b++)
        assert_int_equal(h_put1(second, &schema, b, part, KVC_PROMISE_MEMORY), KVC_OK);
    assert_int_equal(metric(KVC_M_attend_gpu_pinned_bytes), 0);
    h_disconnect(second);
    a_stop(f);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, gpu_setup, gpu_teardown)

int main(int argc, char **argv)
{
#ifdef KVS_TEST_DEVICE
    kvk_cuda *cuda;
    if (kvk_cuda_open(0, &cuda) != KVC_OK) {
        printf("skipped: no CUDA device that this build can use\n");
        return 77;
    }
    kvk_cuda_close(cuda);
#endif
    const struct CMUnitTest tests[] = {
        TEST(test_shapes_from_dram),
        TEST(test_what_stays_on_the_cpu),
        TEST(test_shared_with_the_cpu),
        TEST(test_groups),
        TEST(test_pieces),
        TEST(test_the_largest_calls),
        TEST(test_groups_without_room),
        TEST(test_rows_of_the_gpu_tier),
        TEST(test_many_at_once),
        TEST(test_a_segment_goes),
    };
    if (argc > 1) /* some of them, for tools that are slow */
        cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests_name("attend_gpu", tests, NULL, NULL);
}
