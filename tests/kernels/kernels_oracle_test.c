/*
 * kernels_oracle_test.c: the reference and the fast backends against brute force written here from
 * the formulas, sharing no code with either. Formulas: ESA 2502.14477, TokenSelect 2411.02886.
 */
#include <complex.h>

#include "attend_support.h"

/* ---- heads ---- */

/*
 * Each kv head holds one value everywhere, so an output names the kv head that a query head met:
 * h mod n_kv_heads instead of h div group would show at once.
 */
static void check_head_mapping(const subject *s, void *arg)
{
    enum { HQ = 9, HKV = 3, D = 8, N = 5 };
    float keys[N][HKV][D], kv[N][2][HKV][D], q[HQ][D], scores[HQ][N], o[HQ][D], lse[HQ];
    float sums[HKV][D];
    const void *rows[N];

    (void)arg;
    for (size_t j = 0; j < N; j++) {
        rows[j] = kv[j];
        for (size_t h = 0; h < HKV; h++) {
            for (size_t t = 0; t < D; t++) {
                keys[j][h][t] = kv[j][0][h][t] = t == 0 ? (float)(h + 1) : 0;
                kv[j][1][h][t] = (float)(10 * (h + 1));
            }
        }
    }
    for (size_t h = 0; h < HQ; h++) {
        for (size_t t = 0; t < D; t++)
            q[h][t] = t == 0;
    }
    CALL(s, score_keys, &q[0][0], 1, HQ, HKV, D, {keys, sizeof(keys[0]), KVK_F32}, N, &scores[0][0],
         N);
    CALL(s, attend, .q = &q[0][0], .n_q = 1, .n_q_heads = HQ, .n_kv_heads = HKV, .head_dim = D,
         .rows = rows, .n_kv = N, .v_off_bytes = sizeof(kv[0][0]), .dtype = KVK_F32, .scale = 1,
         .o = &o[0][0], .lse = lse);
    CALL(s, group_sum, {q, sizeof(q), KVK_F32}, 1, HQ, HKV, D, &sums[0][0]);
    for (size_t h = 0; h < HQ; h++) {
        size_t kv_head = h / 3;
        double wanted = (double)kv_head + 1;
        assert_near(s, "score", h, (double)scores[h][N - 1], wanted, 0);
        assert_near(s, "o", h, (double)o[h][D - 1], 10.0 * wanted, 1e-5);
        assert_near(s, "lse", h, (double)lse[h], wanted + log(N), 1e-6);
    }
    for (size_t h = 0; h < HKV; h++)
        assert_near(s, "group_sum", h, (double)sums[h][0], 3, 0);
}

static void check_index_head_mapping(const subject *s, void *arg)
{
    enum { HQ = 8, HKV = 2, DIMS = 4 };
    float in[HKV][DIMS] = {{1, 1, 1, 1}, {3, 3, 3, 3}}, q[HQ][DIMS], out[HQ];
    char index[HKV * (DIMS + 2)];

    (void)arg;
    for (size_t h = 0; h < HQ * DIMS; h++)
        q[h / DIMS][h % DIMS] = 1;
    CALL(s, quantize, &in[0][0], 1, HKV, DIMS, index, sizeof(index));
    CALL(s, score_index, &q[0][0], 1, HQ, HKV, DIMS, index, sizeof(index), 1, out, 1);
    for (size_t h = 0; h < HQ; h++)
        assert_near(s, "index score", h, (double)out[h], h < 4 ? 4 : 12, 0.1);
}

/* ---- rotary ---- */

static void check_rope(const subject *s, void *arg)
{
    enum { D = 128, HEADS = 2 };
    static const int32_t positions[] = {0, 1, 4096, 1000000, 16777217, -5};
    double freq[D / 2];
    float x[HEADS][D], out[HEADS][D];
    support_random random = {77};

    (void)arg;
    fill_floats(&random, &x[0][0], (size_t)HEADS * D);
    assert_ok(kvk_rope_inv_freq(&(kvk_rope_params){.theta = 500000}, D, freq));
    for (size_t p = 0; p < sizeof(positions) / sizeof(positions[0]); p++) {
        CALL(s, rope, {x, sizeof(x), KVK_F32}, 1, HEADS, D, freq, &positions[p], 0, &out[0][0]);
        for (size_t i = 0; i < HEADS * D / 2; i++) {
            size_t h = i / (D / 2), t = i % (D / 2);
            double complex z = (double)x[h][t] + I * (double)x[h][t + D / 2];
            double complex w = z * cexp(I * (positions[p] * freq[t]));
            assert_near(s, "real", i, (double)out[h][t], creal(w), 1e-6);
            assert_near(s, "imaginary", i, (double)out[h][t + D / 2], cimag(w), 1e-6);
        }
    }
}

/* Values worked out by hand from the definition; 8 dims, so inv_freq = theta^(-i/4). */
static void test_inv_freq(void **state)
{
    kvk_rope_params plain = {.theta = 10000};
    kvk_rope_params llama = {1, 500000, 8, 1, 4, 8192};
    double f[64], g[64];

    (void)state;
    assert_ok(kvk_rope_inv_freq(&plain, 8, f));
    for (int i = 0; i < 4; i++)
        assert_true(fabs(f[i] - pow(10, -i)) < 1e-15);
    assert_ok(kvk_rope_inv_freq(&llama, 128, f));
    llama.type = 0;
    assert_ok(kvk_rope_inv_freq(&llama, 128, g));
    for (int i = 0; i < 64; i++) {
        double wave = 2 * acos(-1) / g[i];
        double smooth = (8192 / wave - 1) / 3;
        double want = wave < 2048   ? g[i]
                      : wave > 8192 ? g[i] / 8
                                    : (1 - smooth) * g[i] / 8 + smooth * g[i];
        assert_true(fabs(f[i] - want) <= 1e-15 * want + 1e-18);
    }
    assert_true(f[0] == 1 && f[63] == g[63] / 8 && f[30] != g[30] && f[30] != g[30] / 8);
}

static void test_inv_freq_refuses(void **state)
{
    kvk_rope_params bad[] = {{.theta = 0},         {.theta = -1},          {.theta = NAN},
                             {2, 1e4, 8, 1, 4, 8}, {1, 1e4, 0.5, 1, 4, 8}, {1, 1e4, 8, 4, 4, 8},
                             {1, 1e4, 8, 0, 4, 8}, {1, 1e4, 8, 1, 4, 0},   {1, 1e4, NAN, 1, 4, 8}};
    kvk_rope_params good = {.theta = 1e4};
    double f[4] = {7};

    (void)state;
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        assert_status(kvk_rope_inv_freq(&bad[i], 8, f), KVC_INVALID);
    assert_status(kvk_rope_inv_freq(&good, 7, f), KVC_INVALID);
    assert_status(kvk_rope_inv_freq(&good, 0, f), KVC_INVALID);
    assert_status(kvk_rope_inv_freq(NULL, 8, f), KVC_INVALID);
    assert_status(kvk_rope_inv_freq(&good, 8, NULL), KVC_INVALID);
    assert_true(f[0] == 7);
}

/* ---- attention ---- */

/* One query head in long double, straight from the definition. */
static void attend_brute(const kvk_attend_args *a, size_t query, size_t head, long double *o,
                         long double *lse_p)
{
    size_t d = a->head_dim, kv = head / (a->n_q_heads / a->n_kv_heads);
    size_t n = a->visible ? a->visible[query] : a->n_kv;
    const float *q = a->q + (query * a->n_q_heads + head) * d;
    long double total = 0;

    for (size_t t = 0; t < d; t++)
        o[t] = 0;
    for (size_t j = 0; j < n; j++) {
        const char *k = (const char *)a->rows[j] + a->k_off_bytes;
        const char *v = (const char *)a->rows[j] + a->v_off_bytes;
        long double logit = 0, weight;
        for (size_t t = 0; t < d / 2; t++) {
            double complex z = (double)decoded(k, a->dtype, kv * d + t) +
                               I * (double)decoded(k, a->dtype, kv * d + t + d / 2);
            if (a->inv_freq)
                z *= cexp(I * (a->k_positions[j] * a->inv_freq[t]));
            logit += (long double)q[t] * creal(z) + (long double)q[t + d / 2] * cimag(z);
        }
        weight = expl(logit * (long double)a->scale); /* small logits: no shift needed */
        total += weight;
        for (size_t t = 0; t < d; t++)
            o[t] += weight * (long double)decoded(v, a->dtype, kv * d + t);
    }
    for (size_t t = 0; t < d && n > 0; t++)
        o[t] /= total;
    *lse_p = logl(total);
}

static void check_attend(const subject *s, void *arg)
{
    problem_shape shape = {6, 6, 3, 32, 150, KVK_BF16, true, true, 0};
    support_random random = {5};
    problem p = make_problem(&random, &shape);
    float *o = get_floats((size_t)6 * 6 * 32), *lse = get_floats((size_t)6 * 6);

    (void)arg;
    for (size_t r = 0; r < 36; r++) {
        long double exact[32] = {0}, exact_lse;
        attend_brute(&p.a, r / 6, r % 6, exact, &exact_lse);
        lse[r] = (float)exact_lse;
        for (size_t t = 0; t < 32; t++)
            o[r * 32 + t] = (float)exact[t];
    }
    assert_ok(s->ops->attend(s->be, &p.a, NULL));
    compare_attend(s, &p.a, p.a.o, p.a.lse, o, lse);
    free_all();
}

/* Partials over a cut of the rows, merged, are the attention over all of them. */
static void check_merge_of_partials(const subject *s, void *arg)
{
    static const uint32_t cuts[] = {0, 1, 128, 200, 399, 400};
    problem_shape shape = {3, 8, 2, 64, 400, KVK_BF16, true, false, 0};
    support_random random = {6};
    size_t n = 24, width = 64;

    (void)arg;
    for (size_t c = 0; c < 6; c++) {
        problem p = make_problem(&random, &shape);
        kvk_attend_args left = p.a, right = p.a;
        left.n_kv = cuts[c];
        left.o = get_floats(n * width);
        left.lse = get_floats(n);
        right.n_kv = 400 - cuts[c];
        right.rows += cuts[c];
        right.k_positions += cuts[c];
        right.o = get_floats(n * width);
        right.lse = get_floats(n);
        assert_ok(s->ops->attend(s->be, &p.a, NULL));
        assert_ok(s->ops->attend(s->be, &left, NULL));
        assert_ok(s->ops->attend(s->be, &right, NULL));
        CALL(s, merge, left.o, left.lse, right.o, right.lse, (uint32_t)n, (uint32_t)width);
        compare_attend(s, &p.a, left.o, left.lse, p.a.o, p.a.lse);
        free_all();
    }
}

/* ---- the index ---- */

/* The scale is the least bf16 that brings the largest value to 127 or below. */
static void check_quantize(const subject *s, void *arg)
{
    enum { DIMS = 22, ROWS = 300 };
    support_random random = {8};
    float in[DIMS];
    char out[DIMS + 2];

    (void)arg;
    for (int r = 0; r < ROWS; r++) {
        double max = 0;
        uint16_t bits;
        fill_floats(&random, in, DIMS);
        if (r == 0) /* max / 127 is a bf16 already */
            in[3] = 127 * 0.5f;
        for (size_t i = 0; r == 1 && i < DIMS; i++) /* max / 127 is below the least float */
            in[i] *= 0x1p-146f;
        for (size_t i = 0; i < DIMS; i++)
            max = fmax(max, fabs((double)in[i]));
        CALL(s, quantize, in, 1, 1, DIMS, out, DIMS + 2);
        memcpy(&bits, out + DIMS, 2);
        double scale = (double)decoded(&bits, KVK_BF16, 0);
        bits--;
        assert_true(scale * 127 >= max && (double)decoded(&bits, KVK_BF16, 0) * 127 < max);
        for (size_t i = 0; i < DIMS; i++)
            assert_near(s, "x", i, (signed char)out[i] * scale, (double)in[i], scale * 0.5000002);
    }
}

/* The compressed score is near q . x: both roundings bounded. */
static void check_score_index(const subject *s, void *arg)
{
    enum { DIMS = 126, N = 90, M = 5 };
    support_random random = {9};
    float *x = random_floats(&random, (size_t)N * DIMS),
          *q = random_floats(&random, (size_t)M * DIMS);
    float *out = get_floats((size_t)M * N);
    char *index = get((size_t)N * (DIMS + 2));

    (void)arg;
    CALL(s, quantize, x, N, 1, DIMS, index, DIMS + 2);
    CALL(s, score_index, q, M, 1, 1, DIMS, index, DIMS + 2, N, out, N);
    for (size_t r = 0; r < (size_t)M * N; r++) {
        const float *qi = q + r / N * DIMS, *xj = x + r % N * DIMS;
        double dot = 0, q_sum = 0, x_sum = 0, q_max = 0;
        uint16_t bits;
        memcpy(&bits, index + r % N * (DIMS + 2) + DIMS, 2);
        for (size_t t = 0; t < DIMS; t++) {
            dot += (double)qi[t] * (double)xj[t];
            q_sum += fabs((double)qi[t]);
            x_sum += fabs((double)xj[t]);
            q_max = fmax(q_max, fabs((double)qi[t]));
        }
        double scale = (double)decoded(&bits, KVK_BF16, 0);
        double bound = q_sum * scale * 0.51 + (x_sum + DIMS * scale) * q_max / 65534 + 1e-5;
        assert_near(s, "score", r, (double)out[r], dot, bound);
    }
    free_all();
}

/* ---- selection ---- */

static int descending(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return x > y ? -1 : x < y;
}

/* The k-th sorted score bounds what is in and what is out; ties go by position. */
static void check_topk(const subject *s, void *arg)
{
    enum { N = 100003, K = 777 };
    support_random random = {10};
    float *x = get_floats(N), *sorted = get_floats(N);
    uint32_t *ids = get(K * sizeof(uint32_t)), n_out = 0, next_tie = 0;
    size_t bytes = kvk_topk_workspace_bytes(N, K), above = 0;

    (void)arg;
    for (size_t j = 0; j < N; j++)
        x[j] = (float)support_below(&random, 400); /* about 250 of each */
    memcpy(sorted, x, N * sizeof(float));
    qsort(sorted, N, sizeof(float), descending);
    CALL(s, topk, x, N, K, 5, ids, NULL, &n_out, get(bytes), bytes);
    assert_int_equal(n_out, K);
    for (uint32_t i = 0; i < K; i++) {
        uint32_t j = ids[i] - 5;
        assert_true(j < N && x[j] == sorted[i]);
        if (i > 0 && x[j] == sorted[i - 1])
            assert_true(ids[i] > ids[i - 1]);
        above += x[j] > sorted[K - 1];
    }
    for (size_t i = above; i < K; i++) { /* the ties taken are the first ones */
        while (x[next_tie] != sorted[K - 1])
            next_tie++;
        assert_int_equal(ids[i] - 5, next_tie++);
    }
    free_all();
}

/* A sample that misleads: every sampled place is high, or every one low. */
static void check_topk_bad_sample(const subject *s, void *arg)
{
    enum { N = 262144, K = 2048 };
    float *x = get_floats(N);
    uint32_t *ids = get(K * sizeof(uint32_t)), n_out = 0;
    size_t bytes = kvk_topk_workspace_bytes(N, K);
    void *work = get(bytes);

    (void)arg;
    for (int flip = 0; flip < 2; flip++) {
        for (uint32_t j = 0; j < N; j++)
            x[j] = (j % 256 < 64) == flip ? (float)j : -(float)j;
        CALL(s, topk, x, N, K, 0, ids, NULL, &n_out, work, bytes);
        assert_int_equal(n_out, K);
        for (uint32_t i = 0, j = N; i < K; i++) {
            do
                j--;
            while (x[j] < 0);
            assert_int_equal(ids[i], j);
        }
    }
    /* fewer than k above the sample's bound: the high ones are exactly those sampled */
    for (uint32_t j = 0; j < N; j++)
        x[j] = j % 256 < 16 ? 1e6f + (float)j : 0;
    for (uint32_t j = 300 * 256; j < N; j++)
        x[j] = 0;
    CALL(s, topk, x, N, K, 0, ids, NULL, &n_out, work, bytes);
    assert_int_equal(ids[0], 299 * 256 + 15);
    assert_int_equal(ids[K - 1], 172 * 256);
    free_all();
}

static void check_vote(const subject *s, void *arg)
{
    enum { HEADS = 4, N = 1000 };
    support_random random = {12};
    float *x = random_floats(&random, (size_t)HEADS * N), *out = get_floats(N), max[HEADS],
          sum[HEADS];
    double weights[N] = {0}, total = 0;

    (void)arg;
    for (size_t h = 0; h < HEADS; h++) {
        double all = 0;
        max[h] = -INFINITY;
        sum[h] = 0;
        for (size_t j = 0; j < N; j++)
            all += exp((double)x[h * N + j]);
        for (size_t j = 0; j < N; j++)
            weights[j] += exp((double)x[h * N + j]) / all;
    }
    for (uint32_t from = 0; from < N; from += 300) /* in pieces: the statistics stream */
        CALL(s, softmax_stats, x + from, N, HEADS, from + 300 < N ? 300 : N - from, max, sum);
    CALL(s, vote, x, N, HEADS, N, max, sum, out);
    for (size_t j = 0; j < N; j++) {
        assert_near(s, "vote", j, (double)out[j], weights[j], weights[j] * 4e-6);
        total += (double)out[j];
    }
    assert_near(s, "all votes", 0, total, HEADS, 1e-4);
    free_all();
}

/* One head with max 0 and sum 1 shows the exponential itself: 2 ulp, exact at 0, 0 far below. */
static void check_exp(const subject *s, void *arg)
{
    enum { N = 20000 };
    float *x = get_floats(N), *out = get_floats(N), max = 0, sum = 1;

    (void)arg;
    for (size_t j = 0; j < N; j++)
        x[j] = -87.0f * (float)j / N;
    x[1] = -INFINITY;
    x[2] = -200;
    x[3] = NAN;
    CALL(s, vote, x, N, 1, N, &max, &sum, out);
    assert_true(out[0] == 1 && out[1] == 0 && out[2] < 1e-38f && isnan(out[3]));
    for (size_t j = 4; j < N; j++) {
        double want = exp((double)x[j]);
        assert_near(s, "exp", j, (double)out[j], want, want * 2 * 0x1p-23);
    }
    free_all();
}

/* Eq. 4 in pieces equals eq. 4 written out. */
static void check_eq4(const subject *s, void *arg)
{
    enum { M = 7, N = 500 };
    support_random random = {13};
    float *f = random_floats(&random, (size_t)M * N), max[M], *out = get_floats(N);

    (void)arg;
    for (size_t i = 0; i < M; i++)
        max[i] = -INFINITY;
    for (size_t j = 0; j < N; j++)
        out[j] = -INFINITY;
    for (uint32_t from = 0; from < N; from += 170)
        CALL(s, row_max, f + from, N, M, from + 170 < N ? 170 : N - from, max);
    for (uint32_t i = 0; i < M; i += 3)
        CALL(s, chunk_fold, f + (size_t)i * N, N, i + 3 < M ? 3 : M - i, N, max + i, out);
    for (size_t j = 0; j < N; j++) {
        float want = -INFINITY;
        for (size_t i = 0; i < M; i++) {
            float best = -INFINITY;
            for (size_t t = 0; t < N; t++)
                best = fmaxf(best, f[i * N + t]);
            want = fmaxf(want, f[i * N + j] - best);
        }
        assert_near(s, "F(m; C)", j, (double)out[j], (double)want, 0);
    }
    free_all();
}

static void check_window(const subject *s, void *arg)
{
    float in[9] = {1, 9, 2, 3, 8, 0, -4, -5, 7}, out[9];
    static const float one[9] = {9, 9, 9, 8, 8, 8, 0, 7, 7};
    static const float three[9] = {9, 9, 9, 9, 9, 8, 8, 8, 7};

    (void)arg;
    CALL(s, window_max, in, 9, 1, out);
    assert_same_bits(s, "eps 1", out, one, sizeof(one));
    CALL(s, window_max, in, 9, 3, out);
    assert_same_bits(s, "eps 3", out, three, sizeof(three));
    CALL(s, window_max, in, 1, 7, out);
    assert_true(out[0] == 1);
}

#define OVER_SUBJECTS(name)                                                                        \
    static void test_##name(void **state)                                                          \
    {                                                                                              \
        (void)state;                                                                               \
        for_each_subject(check_##name, NULL);                                                      \
    }
OVER_SUBJECTS(head_mapping)
OVER_SUBJECTS(index_head_mapping)
OVER_SUBJECTS(rope)
OVER_SUBJECTS(attend)
OVER_SUBJECTS(merge_of_partials)
OVER_SUBJECTS(quantize)
OVER_SUBJECTS(score_index)
OVER_SUBJECTS(topk)
OVER_SUBJECTS(topk_bad_sample)
OVER_SUBJECTS(vote)
OVER_SUBJECTS(exp)
OVER_SUBJECTS(eq4)
OVER_SUBJECTS(window)

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_head_mapping),
        cmocka_unit_test(test_index_head_mapping),
        cmocka_unit_test(test_rope),
        cmocka_unit_test(test_inv_freq),
        cmocka_unit_test(test_inv_freq_refuses),
        cmocka_unit_test(test_attend),
        cmocka_unit_test(test_merge_of_partials),
        cmocka_unit_test(test_quantize),
        cmocka_unit_test(test_score_index),
        cmocka_unit_test(test_topk),
        cmocka_unit_test(test_topk_bad_sample),
        cmocka_unit_test(test_vote),
        cmocka_unit_test(test_exp),
        cmocka_unit_test(test_eq4),
        cmocka_unit_test(test_window),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
