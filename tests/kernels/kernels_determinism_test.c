/*
 * kernels_determinism_test.c: an op's bits do not depend on the number of threads, on how a batch
 * is cut into calls, or on earlier calls. (That score_index and quantize have the same bits on
 * every backend is part of the conformance program.)
 */
#include "attend_support.h"

static const char *const isas[] = {SUBJECT_ISAS};

#define N_ISAS (sizeof(isas) / sizeof(isas[0]))

/* A cpu backend; false where this machine or backend lacks the isa. */
static bool open_cpu(const char *isa, uint32_t threads, subject *s)
{
    kvk_backend_opts opts = {.size_bytes = sizeof(opts), .n_threads = threads, .isa = isa};
    kvc_status st = kvk_backend_open("cpu", &opts, &s->be);

    if (st == KVC_UNSUPPORTED || st == KVC_INVALID)
        return false;
    assert_ok(st);
    s->ops = kvk_backend_ops(s->be);
    (void)snprintf(s->label, sizeof(s->label), "cpu/%s/%u threads", isa, threads);
    return true;
}

static void attend_to(const subject *s, const kvk_attend_args *a, float *o, float *lse)
{
    kvk_attend_args mine = *a;

    mine.o = o;
    mine.lse = lse;
    assert_ok(s->ops->attend(s->be, &mine, NULL));
}

/* The same queries, `step` to a call. */
static void attend_in_steps(const subject *s, const problem *p, uint32_t step, float *o, float *lse)
{
    size_t width = (size_t)p->a.n_q_heads * p->a.head_dim;

    for (uint32_t i = 0; i < p->a.n_q; i += step) {
        kvk_attend_args part = p->a;
        part.q += i * width;
        part.n_q = p->a.n_q - i < step ? p->a.n_q - i : step;
        if (part.visible)
            part.visible += i;
        attend_to(s, &part, o + i * width, lse + (size_t)i * p->a.n_q_heads);
    }
}

static void check_attend(const char *isa, const problem_shape *shape)
{
    static const uint32_t steps[] = {1000, 7, 17, 2, 1};
    size_t n_steps = SUBJECT_BRIEF ? 3 : 5;
    support_random random = {21};
    problem p = make_problem(&random, shape);
    size_t rows = (size_t)shape->n_q * shape->n_q_heads, n = rows * shape->head_dim;
    float *o = get_floats(n), *lse = get_floats(rows);
    bool first = true;

    for (uint32_t threads = 1; threads <= 5; threads += SUBJECT_BRIEF ? 4 : 2) {
        subject s;
        if (!open_cpu(isa, threads, &s))
            break;
        for (size_t t = 0; t < n_steps; t++) {
            attend_in_steps(&s, &p, steps[t], o, lse);
            if (first) {
                memcpy(p.a.o, o, n * sizeof(float));
                memcpy(p.a.lse, lse, rows * sizeof(float));
                first = false;
            }
            assert_same_bits(&s, "o", o, p.a.o, n * sizeof(float));
            assert_same_bits(&s, "lse", lse, p.a.lse, rows * sizeof(float));
        }
        kvk_backend_close(s.be);
    }
    free_all();
}

static void test_attend(void **state)
{
    static const problem_shape shapes[] = {
        {50, 9, 3, 64, 333, KVK_BF16, true, true, 0},
        {20, 4, 4, 22, 150, KVK_F16, true, false, 0},
        {20, 8, 2, 128, 140, KVK_F32, false, true, 20},
        {37, 2, 1, 64, 30, KVK_BF16, true, true, 0},
        {9, 4, 2, 64, 300, KVK_E4M3_SCALED, true, true, 0},
        /* Keys of more runs on one thread than on three: by tiles, by blocks. */
        {49, 2, 2, 512, 900, KVK_BF16, true, true, 0},
        {2, 16, 16, 64, 5000, KVK_F16, true, true, 0},
    };

    (void)state;
    for (size_t i = 0; i < N_ISAS; i++) {
        for (size_t t = 0; t < sizeof(shapes) / sizeof(shapes[0]); t++)
            check_attend(isas[i], &shapes[t]);
    }
}

/* Every score of m queries at once equals the score of one query and of a part of the keys. */
static void check_scores(const subject *s)
{
    enum { M = 13, HQ = 6, HKV = 2, D = 66, N = 700 };
    support_random random = {22};
    float *q = random_floats(&random, (size_t)M * HQ * D), *out = get_floats((size_t)M * HQ * N);
    float *one = get_floats((size_t)HQ * N);
    size_t stride = (size_t)HKV * D * 2;
    char *keys = encode_rows(random_floats(&random, (size_t)N * HKV * D), N, (size_t)HKV * D,
                             stride, KVK_BF16);

    CALL(s, score_keys, q, M, HQ, HKV, D, {keys, stride, KVK_BF16}, N, out, N);
    for (size_t i = 0; i < M; i++) {
        for (uint32_t from = 0; from < N; from += 331) {
            uint32_t n = N - from < 331 ? N - from : 331;
            CALL(s, score_keys, q + i * HQ * D, 1, HQ, HKV, D,
                 {keys + from * stride, stride, KVK_BF16}, n, one + from, N);
        }
        assert_same_bits(s, "score_keys", one, out + i * HQ * N, (size_t)HQ * N * sizeof(float));
    }
    free_all();
}

static void check_project(const subject *s)
{
    enum { N = 100, DIN = 200, DOUT = 126 };
    support_random random = {23};
    float *in = random_floats(&random, (size_t)N * DIN);
    float *proj = random_floats(&random, (size_t)DIN * DOUT);
    float *all = get_floats((size_t)N * DOUT), *one = get_floats((size_t)N * DOUT);

    CALL(s, project, {in, DIN * 4, KVK_F32}, N, 1, DIN, DOUT, proj, all);
    for (size_t i = 0; i < N; i++)
        CALL(s, project, {in + i * DIN, DIN * 4, KVK_F32}, 1, 1, DIN, DOUT, proj, one + i * DOUT);
    assert_same_bits(s, "project", one, all, (size_t)N * DOUT * sizeof(float));
    free_all();
}

static void over_isas(void (*check)(const subject *s))
{
    for (size_t i = 0; i < N_ISAS; i++) {
        for (uint32_t threads = 1; threads <= 3; threads++) {
            subject s;
            if (!open_cpu(isas[i], threads, &s))
                break;
            check(&s);
            kvk_backend_close(s.be);
        }
    }
}

static void test_batches(void **state)
{
    (void)state;
    over_isas(check_scores);
    over_isas(check_project);
}

/* Runs the elementwise and streaming ops once and gives their bytes end to end. */
static size_t run_rest(const subject *s, float *out)
{
    enum { N = 30000, HEADS = 5, WIN = 3 };
    support_random random = {24};
    float *x = random_floats(&random, (size_t)N * HEADS), *at = out;
    float max[HEADS], sum[HEADS];

    for (size_t h = 0; h < HEADS; h++) {
        max[h] = -INFINITY;
        sum[h] = 0;
    }
    CALL(s, softmax_stats, x, N, HEADS, N, max, sum);
    CALL(s, vote, x, N, HEADS, N, max, sum, at);
    at += N;
    memcpy(at, sum, sizeof(sum));
    at += HEADS;
    CALL(s, mean, {x, N * 4 / 100, KVK_F32}, HEADS * 100, N / 100, at);
    at += N / 100;
    CALL(s, group_sum, {x, 6 * 50 * 4, KVK_F32}, 400, 6, 3, 50, at);
    at += 400 * 150;
    CALL(s, window_max, x, N, WIN, at);
    at += N;
    for (size_t j = 0; j < N; j++)
        at[j] = -INFINITY;
    CALL(s, chunk_fold, x, N, HEADS, N, max, at);
    return (size_t)(at + N - out);
}

static void test_threads(void **state)
{
    float *first = malloc(1000000 * sizeof(float)), *again = malloc(1000000 * sizeof(float));

    (void)state;
    assert_non_null(first);
    assert_non_null(again);
    for (size_t i = 0; i < N_ISAS; i++) {
        for (uint32_t threads = 1; threads <= 4; threads++) {
            subject s;
            if (!open_cpu(isas[i], threads, &s))
                break;
            if (threads == 1)
                (void)run_rest(&s, first);
            size_t n = run_rest(&s, again); /* with one thread, on used scratch memory */
            assert_same_bits(&s, "ops", again, first, n * sizeof(float));
            kvk_backend_close(s.be);
            free_all();
        }
    }
    free(first);
    free(again);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_attend),
        cmocka_unit_test(test_batches),
        cmocka_unit_test(test_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
