/* cases_select.c: softmax_stats, vote, row_max, chunk_fold, window_max, topk, resolve. */
#include "cases.h"

static const uint32_t sizes[] = {0, 1, 2, 15, 16, 17, 100, 4095, 8193, 20000, 70001};

#define N_SIZES (sizeof(sizes) / sizeof(sizes[0]))

/* Logits with the spread of real ones, some at -Inf. */
static float *logits_of(support_random *random, size_t n)
{
    float *x = random_floats(random, n);

    for (size_t i = 0; i < n; i++)
        x[i] = support_below(random, 50) == 0 ? -INFINITY : x[i] * 30;
    return x;
}

void case_softmax_stats(const subject *s, support_random *random)
{
    float x[1] = {0}, max[3] = {5}, sum[3] = {0};

    for (size_t t = 0; t < N_SIZES; t++) {
        uint32_t n = sizes[t], heads = 3;
        size_t stride = n + 2;
        float *logits = logits_of(random, heads * stride);
        float got[2][3], want[2][3];
        for (size_t h = 0; h < heads; h++) {
            got[0][h] = want[0][h] = -INFINITY;
            got[1][h] = want[1][h] = 0;
        }
        for (size_t j = 0; j < n; j++)
            logits[2 * stride + j] = -INFINITY; /* a head that sees nothing */
        for (int pass = 0; pass < 2; pass++) {  /* the second call goes on from the first */
            CALL(s, softmax_stats, logits, stride, heads, n, got[0], got[1]);
            CALL(reference(), softmax_stats, logits, stride, heads, n, want[0], want[1]);
        }
        for (size_t h = 0; h < heads; h++) {
            assert_near(s, "max", h, (double)got[0][h], (double)want[0][h], 0);
            assert_near(s, "sumexp", h, (double)got[1][h], (double)want[1][h],
                        (double)want[1][h] * 1e-5);
        }
        if (n > 1) { /* NaN shows in the sum and nowhere else */
            logits[n / 2] = NAN;
            CALL(s, softmax_stats, logits, stride, heads, n, got[0], got[1]);
            assert_true(isnan(got[1][0]) && !isnan(got[1][1]) && !isnan(got[0][0]));
        }
        free_all();
    }
    REFUSE(s, softmax_stats, x, 0, 1, 1, max, sum);
    REFUSE(s, softmax_stats, NULL, 1, 1, 1, max, sum);
    REFUSE(s, softmax_stats, x, 1, 1, 1, NULL, sum);
    assert_true(max[0] == 5);
}

void case_vote(const subject *s, support_random *random)
{
    float x[1] = {0}, out[1] = {5};

    for (size_t t = 0; t < N_SIZES; t++) {
        uint32_t n = sizes[t], heads = 9;
        float *logits = logits_of(random, heads * (size_t)n);
        float *got = get_floats(n), *want = get_floats(n), max[9], sum[9];
        for (size_t h = 0; h < heads; h++) {
            max[h] = -INFINITY;
            sum[h] = 0;
        }
        for (size_t j = 0; j < n; j++)
            logits[(size_t)4 * n + j] = -INFINITY; /* a head without candidates */
        CALL(reference(), softmax_stats, logits, n, heads, n, max, sum);
        CALL(s, vote, logits, n, heads, n, max, sum, got);
        CALL(reference(), vote, logits, n, heads, n, max, sum, want);
        for (size_t j = 0; j < n; j++) /* x - max is rounded once in f32 */
            assert_near(s, "vote", j, (double)got[j], (double)want[j],
                        (double)want[j] * 2e-5 + 1e-37);
        free_all();
    }
    REFUSE(s, vote, x, 1, 1, 1, NULL, x, out);
    REFUSE(s, vote, x, 1, 1, 1, x, x, NULL);
    assert_true(out[0] == 5);
}

void case_row_max(const subject *s, support_random *random)
{
    float x[1] = {0}, max[1] = {5};

    for (size_t t = 0; t < N_SIZES; t++) {
        uint32_t n = sizes[t], m = 3;
        size_t stride = n + 1;
        float *scores = logits_of(random, m * stride);
        float got[3] = {-INFINITY, 1e9f, -3}, want[3] = {-INFINITY, 1e9f, -3};
        if (n)
            scores[n - 1] = NAN;
        CALL(s, row_max, scores, stride, m, n, got);
        CALL(reference(), row_max, scores, stride, m, n, want);
        for (size_t i = 0; i < m; i++)
            assert_near(s, "row_max", i, (double)got[i], (double)want[i], 0);
        free_all();
    }
    REFUSE(s, row_max, x, 1, 1, 1, NULL);
    REFUSE(s, row_max, x, 1, 1, 2, max);
    assert_true(max[0] == 5);
}

void case_chunk_fold(const subject *s, support_random *random)
{
    float x[1] = {0}, out[1] = {5};

    for (size_t t = 0; t < N_SIZES; t++) {
        uint32_t n = sizes[t], m = 5;
        float *scores = logits_of(random, m * (size_t)n), max[5];
        float *got = get_floats(n), *want = get_floats(n);
        for (size_t i = 0; i < m; i++)
            max[i] = -INFINITY;
        if (n)
            scores[n - 1] = NAN;
        for (size_t j = 0; j < n; j++)
            got[j] = want[j] = -INFINITY;
        CALL(reference(), row_max, scores, n, m, n, max);
        for (int pass = 0; pass < 2; pass++) {
            CALL(s, chunk_fold, scores, n, m, n, max, got);
            CALL(reference(), chunk_fold, scores, n, m, n, max, want);
        }
        for (size_t j = 0; j < n; j++)
            assert_near(s, "chunk_fold", j, (double)got[j], (double)want[j], 0);
        free_all();
    }
    REFUSE(s, chunk_fold, x, 1, 1, 1, NULL, out);
    REFUSE(s, chunk_fold, x, 1, 1, 1, x, NULL);
    assert_true(out[0] == 5);
}

void case_window_max(const subject *s, support_random *random)
{
    static const uint32_t windows[] = {0, 1, 3, 5, 33, 5000, UINT32_MAX};
    float x[4] = {0};

    for (size_t t = 0; t < N_SIZES; t++) {
        for (size_t e = 0; e < 7; e++) {
            /* Wide windows once over more than a run, since the reference takes n times eps. */
            uint32_t wide = t == N_SIZES - 1 ? 9000 : 2000;
            uint32_t n = e > 4 && sizes[t] > wide ? wide : sizes[t];
            float *in = logits_of(random, n), *got = get_floats(n), *want = get_floats(n);
            if (n > 4)
                in[3] = NAN;
            CALL(s, window_max, in, n, windows[e], got);
            CALL(reference(), window_max, in, n, windows[e], want);
            for (size_t j = 0; j < n; j++)
                assert_near(s, "window_max", j, (double)got[j], (double)want[j], 0);
            free_all();
        }
    }
    REFUSE(s, window_max, x, 3, 1, x + 1); /* overlap */
    REFUSE(s, window_max, NULL, 3, 1, x);
    REFUSE(s, window_max, x, 3, 1, NULL);
}

/* kind 0: spread; 1: few values, so ties everywhere; 2: all equal; 3: rising; 4: specials. */
static float *scores_of(support_random *random, uint32_t n, int kind)
{
    static const float special[] = {0, -0.0f, NAN, INFINITY, -INFINITY, 1e-45f, -1e-45f, 3};
    float *x = random_floats(random, n);

    for (size_t j = 0; j < n && kind != 0; j++)
        x[j] = kind == 1   ? (float)support_below(random, 7)
               : kind == 2 ? 2.5f
               : kind == 3 ? (float)j
                           : special[support_below(random, 8)];
    return x;
}

static void compare_topk(const subject *s, const float *scores, uint32_t n, uint32_t k)
{
    size_t bytes = kvk_topk_workspace_bytes(n, k), room = k < n ? k : n;
    void *work = get(bytes);
    uint32_t *got = get((room + 1) * 4), *want = get((room + 1) * 4), n_got = 77, n_want = 77;
    float *values = get_floats(room + 1);

    CALL(s, topk, scores, n, k, 1000, got, values, &n_got, work, bytes);
    CALL(reference(), topk, scores, n, k, 1000, want, NULL, &n_want, work, bytes);
    assert_int_equal(n_got, room);
    assert_int_equal(n_want, room);
    assert_same_bits(s, "topk", got, want, room * 4);
    for (size_t i = 0; i < room; i++)
        assert_near(s, "topk score", i, (double)values[i], (double)scores[got[i] - 1000], 0);
}

void case_topk(const subject *s, support_random *random)
{
    static const uint32_t ks[] = {0, 1, 5, 256, 2048, 70000, 80000};
    static const uint32_t large = 400000;
    float x[4] = {1, 2, 3, 4};
    uint32_t ids[4] = {5}, n = 9;
    size_t bytes = kvk_topk_workspace_bytes(4, 2);
    void *work = get(bytes);

    REFUSE(s, topk, x, 4, 2, 0, ids, NULL, &n, work, bytes - 1);
    REFUSE(s, topk, x, 4, 2, 0, ids, NULL, NULL, work, bytes);
    REFUSE(s, topk, x, 4, 2, 0, NULL, NULL, &n, work, bytes);
    REFUSE(s, topk, x, 4, 2, UINT32_MAX - 1, ids, NULL, &n, work, bytes); /* positions overflow */
    assert_int_equal(ids[0], 5);
    for (size_t t = 0; t < N_SIZES * 7 * 5; t++) {
        uint32_t size = sizes[t / 35], k = ks[t / 5 % 7];
        compare_topk(s, scores_of(random, size, (int)(t % 5)), size, k);
        free_all();
    }
    for (int kind = 0; kind < 5; kind++) {
        compare_topk(s, scores_of(random, large, kind), large, 2048);
        compare_topk(s, scores_of(random, large, kind), large, 30000);
        free_all();
    }
}

void case_resolve(const subject *s, support_random *random)
{
    uint32_t n = 500, n_positions = 900, bad = 900, n_hits = 0, n_misses = 0;
    uint32_t *picks = get(n * 4), *hits = get(n * 4), *misses = get(n * 4);
    int32_t *slot = get(n_positions * 4);

    for (size_t i = 0; i < n; i++)
        picks[i] = (uint32_t)support_below(random, n_positions);
    for (size_t i = 0; i < n_positions; i++)
        slot[i] = (int32_t)support_below(random, 3) - 1;
    CALL(s, resolve, picks, n, slot, n_positions, hits, misses, &n_hits, &n_misses);
    assert_int_equal(n_hits + n_misses, n);
    for (uint32_t i = 0, h = 0, m = 0; i < n; i++) {
        if (slot[picks[i]] >= 0)
            assert_int_equal(hits[h++], i);
        else
            assert_int_equal(misses[m++], i);
    }
    REFUSE(s, resolve, &bad, 1, slot, n_positions, hits, misses, &n_hits, &n_misses);
    REFUSE(s, resolve, picks, n, slot, n_positions, NULL, misses, &n_hits, &n_misses);
    REFUSE(s, resolve, picks, n, slot, n_positions, hits, misses, NULL, &n_misses);
    assert_int_equal(n_hits + n_misses, n);
    CALL(s, resolve, NULL, 0, NULL, 0, NULL, NULL, &n_hits, &n_misses);
    assert_int_equal(n_hits + n_misses, 0);
}
