/*
 * kernels_chunks_test.c: retrieval of whole chunks (GCA 2410.01651, HSA 2504.16795) out of the ops
 * that make it up, score_keys over landmarks, topk, chunk_weights, attend of each chunk and
 * chunk_fuse, against the formulas in long double, which share no code with any backend.
 */
#include <stdbool.h>

#include "attend_support.h"

enum { CHUNKS = 21, S = 64, HIDDEN = 48, HQ = 4, HKV = 2, D = 16, NQ = 5, K = 8 };

/* A memory: landmarks and chunks; row = K [HKV, D], V [HKV, D]; the landmark's row is zero. */
typedef struct memory {
    float marks[CHUNKS][HIDDEN];
    float rows[CHUNKS][S][2][HKV][D];
    float query[HIDDEN], q[NQ][HQ][D];
} memory;

typedef struct result {
    uint32_t ids[K], n;
    float scores[K], weights[K];
    float out[NQ][HQ][D];
} result;

static memory *make_memory(uint64_t seed)
{
    support_random random = {seed};
    memory *m = get(sizeof(*m));

    fill_floats(&random, &m->marks[0][0], (size_t)CHUNKS * HIDDEN);
    fill_floats(&random, &m->rows[0][0][0][0][0], sizeof(m->rows) / sizeof(float));
    fill_floats(&random, m->query, HIDDEN);
    fill_floats(&random, &m->q[0][0][0], (size_t)NQ * HQ * D);
    for (size_t c = 0; c < CHUNKS; c++)
        memset(m->rows[c][S - 1], 0, sizeof(m->rows[c][S - 1]));
    return m;
}

/* Chunk t retrieves among chunks i < t, through the ops. */
static void retrieve(const subject *s, const memory *m, uint32_t t, kvk_fusion fusion,
                     uint32_t off_by_one, result *r)
{
    float scores[CHUNKS], scale = 1.0f / sqrtf((float)HIDDEN);
    float *o = get_floats((size_t)K * NQ * HQ * D), *lse = get_floats((size_t)K * NQ * HQ);
    size_t workspace_bytes = kvk_topk_workspace_bytes(t, K);
    uint32_t n_rows = off_by_one ? S - 1 : S; /* a zero row, or 1 in the denominator */

    CALL(s, score_keys, m->query, 1, 1, 1, HIDDEN, {m->marks, sizeof(m->marks[0]), KVK_F32}, t,
         scores, CHUNKS);
    CALL(s, topk, scores, t, K, 0, r->ids, r->scores, &r->n, get(workspace_bytes), workspace_bytes);
    CALL(s, chunk_weights, r->scores, r->ids, 1, r->n, fusion, scale, r->weights);
    for (size_t c = 0; c < r->n; c++) {
        const void *rows[S];
        for (size_t j = 0; j < S; j++)
            rows[j] = m->rows[r->ids[c]][j];
        CALL(s, attend, .q = &m->q[0][0][0], .n_q = NQ, .n_q_heads = HQ, .n_kv_heads = HKV,
             .head_dim = D, .rows = rows, .n_kv = n_rows, .v_off_bytes = sizeof(m->rows[0][0][0]),
             .dtype = KVK_F32, .scale = 0.25f, .o = o + c * NQ * HQ * D, .lse = lse + c * NQ * HQ);
    }
    CALL(s, chunk_fuse, o, lse, r->weights, r->n, NQ * HQ, D, off_by_one, &r->out[0][0][0]);
}

static long double score_of(const memory *m, size_t i)
{
    long double x = 0;

    for (size_t t = 0; t < HIDDEN; t++)
        x += (long double)m->query[t] * (long double)m->marks[i][t];
    return x / sqrtl(HIDDEN);
}

/* The rank of chunk i among those before t: score descending, position ascending. */
static size_t rank_of(const memory *m, size_t t, size_t i)
{
    size_t rank = 0;

    for (size_t j = 0; j < t; j++) {
        long double x = score_of(m, j), y = score_of(m, i);
        rank += x > y || (x == y && j < i);
    }
    return rank;
}

static long double weight_of(const memory *m, size_t t, size_t i, kvk_fusion fusion)
{
    long double sum = 0, left = 1;

    for (size_t j = 0; j < t; j++) {
        if (rank_of(m, t, j) >= K)
            continue;
        sum += expl(score_of(m, j));
        if (j > i)
            left *= 1 - 1 / (1 + expl(-score_of(m, j)));
    }
    if (fusion == KVK_FUSE_SOFTMAX)
        return expl(score_of(m, i)) / sum;
    return left / (1 + expl(-score_of(m, i)));
}

/* Attention of one query head over one chunk, straight from the definition: over the rows that are
 * no landmark's, with 1 in the denominator. */
static void add_chunk(const memory *m, size_t chunk, size_t query, size_t head, long double weight,
                      long double out[D])
{
    size_t kv_head = head / (HQ / HKV);
    long double num[D] = {0}, den = 1;

    for (size_t j = 0; j < S - 1; j++) {
        const float(*row)[HKV][D] = m->rows[chunk][j];
        long double x = 0;
        for (size_t d = 0; d < D; d++)
            x += (long double)m->q[query][head][d] * (long double)row[0][kv_head][d];
        x = expl(x / 4);
        for (size_t d = 0; d < D; d++)
            num[d] += x * (long double)row[1][kv_head][d];
        den += x;
    }
    for (size_t d = 0; d < D; d++)
        out[d] += weight * num[d] / den;
}

static void check_output(const subject *s, const memory *m, uint32_t t, kvk_fusion fusion,
                         const result *r)
{
    long double worst = 0, weights[CHUNKS] = {0};

    for (size_t i = 0; i < t; i++) {
        if (rank_of(m, t, i) < K)
            weights[i] = weight_of(m, t, i, fusion);
    }
    for (size_t i = 0; i < r->n; i++) {
        assert_int_equal(rank_of(m, t, r->ids[i]), i);
        assert_near(s, "weight", i, (double)r->weights[i], (double)weights[r->ids[i]], 1e-5);
    }
    for (size_t row = 0; row < (size_t)NQ * HQ; row++) {
        long double want[D] = {0};
        for (size_t i = 0; i < t; i++) {
            if (weights[i] != 0)
                add_chunk(m, i, row / HQ, row % HQ, weights[i], want);
        }
        for (size_t d = 0; d < D; d++) {
            worst = fmaxl(worst, fabsl(want[d]));
            assert_near(s, "out", row * D + d, (double)r->out[row / HQ][row % HQ][d],
                        (double)want[d], 2e-5);
        }
    }
    assert_true(t == 0 ? worst == 0 : worst > 0.05L);
}

/* The first chunk has nothing to retrieve, the next ones fewer chunks than k, and the two ways to
 * say "off by one", a zero row and 1 in the denominator, are the same. */
static void check_einsum(const subject *s, void *arg)
{
    static const uint32_t times[] = {0, 1, 3, K, K + 1, CHUNKS};
    memory *m = make_memory(31);

    (void)arg;
    for (size_t i = 0; i < sizeof(times) / sizeof(times[0]); i++) {
        for (int fusion = KVK_FUSE_SOFTMAX; fusion <= KVK_FUSE_STICK; fusion++) {
            for (uint32_t off_by_one = 0; off_by_one <= 1; off_by_one++) {
                result r;
                retrieve(s, m, times[i], (kvk_fusion)fusion, off_by_one, &r);
                assert_int_equal(r.n, times[i] < K ? times[i] : K);
                check_output(s, m, times[i], (kvk_fusion)fusion, &r);
            }
        }
    }
    free_all();
}

/* Chunks with equal landmarks: the earlier one first, and equal weights by softmax. */
static void check_ties(const subject *s, void *arg)
{
    memory *m = make_memory(32);
    result r;

    (void)arg;
    for (size_t c = 0; c < CHUNKS; c++)
        memcpy(m->marks[c], m->marks[0], sizeof(m->marks[0]));
    retrieve(s, m, CHUNKS, KVK_FUSE_SOFTMAX, 1, &r);
    for (size_t i = 0; i < K; i++) {
        assert_int_equal(r.ids[i], i);
        assert_near(s, "weight", i, (double)r.weights[i], 1.0 / K, 1e-7);
    }
    check_output(s, m, CHUNKS, KVK_FUSE_SOFTMAX, &r);
    free_all();
}

/* Weights and output depend on the chosen only: what other landmarks and chunks hold, a later
 * chunk's among them, changes no bit. */
static void check_others(const subject *s, void *arg)
{
    memory *m = make_memory(33);
    enum { T = CHUNKS - 3 };
    result before, after;

    (void)arg;
    for (int fusion = KVK_FUSE_SOFTMAX; fusion <= KVK_FUSE_STICK; fusion++) {
        retrieve(s, m, T, (kvk_fusion)fusion, 1, &before);
        for (size_t c = 0; c < CHUNKS; c++) {
            if (c < T && rank_of(m, T, c) < K)
                continue;
            for (size_t t = 0; t < HIDDEN && c < T; t++) /* a worse score than any */
                m->marks[c][t] = m->query[t] * -3;
            for (size_t t = 0; t < HIDDEN && c >= T; t++) /* a better one, too late */
                m->marks[c][t] = m->query[t] * 3;
            memset(m->rows[c], 0xff, sizeof(m->rows[c]));
        }
        retrieve(s, m, T, (kvk_fusion)fusion, 1, &after);
        assert_same_bits(s, "ids", after.ids, before.ids, sizeof(before.ids));
        assert_same_bits(s, "weights", after.weights, before.weights, sizeof(before.weights));
        assert_same_bits(s, "out", after.out, before.out, sizeof(before.out));
        m = make_memory(34);
    }
    free_all();
}

/* Worked out by hand: scores 0 give sigma 1/2, so the newest takes a half, the next a quarter. */
static void check_stick(const subject *s, void *arg)
{
    static const float scores[] = {0, 0, -INFINITY, 0};
    static const uint32_t ids[] = {40, 90, 90, 7};
    static const float want[] = {0.25f, 0.5f, 0, 0.125f};
    float got[4];

    (void)arg;
    CALL(s, chunk_weights, scores, ids, 1, 4, KVK_FUSE_STICK, 1, got);
    assert_same_bits(s, "stick", got, want, sizeof(want));
}

/* Weights are the floats next to the true ones: the exponential behind them is our own. */
static void check_rounding(const subject *s, void *arg)
{
    enum { N = 50 };
    support_random random = {36};
    float *scores = get_floats((size_t)N * K), *got = get_floats((size_t)N * K);
    uint32_t *ids = get(sizeof(*ids) * N * K);

    (void)arg;
    fill_floats(&random, scores, (size_t)N * K);
    for (size_t i = 0; i < (size_t)N * K; i++) {
        size_t row = i / K;
        scores[i] *= (float)(1 + 2 * row); /* up to about 100: exponentials of all sizes */
        ids[i] = (uint32_t)(i % K);
    }
    for (int fusion = KVK_FUSE_SOFTMAX; fusion <= KVK_FUSE_STICK; fusion++) {
        CALL(s, chunk_weights, scores, ids, N, K, (kvk_fusion)fusion, 1, got);
        for (size_t i = 0; i < (size_t)N * K; i++) {
            const float *x = scores + i / K * K;
            long double sum = 0, want = 1 / (1 + expl(-(long double)scores[i]));
            for (size_t j = 0; j < K; j++) {
                sum += expl((long double)x[j] - (long double)scores[i]);
                want /= j > i % K ? 1 + expl((long double)x[j]) : 1;
            }
            want = fusion == KVK_FUSE_SOFTMAX ? 1 / sum : want;
            assert_near(s, "weight", i, (double)got[i], (double)want,
                        (double)want * 0x1.00001p-24 + 0x1p-149);
        }
    }
    free_all();
}

/* What n_shards servers find that have every n_shards-th landmark each: the k best of each, then
 * the k best of those in order of position. */
static void retrieve_sharded(const subject *s, const memory *m, uint32_t n_shards, result *r)
{
    float found[CHUNKS], scores[CHUNKS], best[K];
    bool is_found[CHUNKS] = {false};
    uint32_t ids[K], at[CHUNKS], n = 0, n_best;
    size_t workspace_bytes = kvk_topk_workspace_bytes(CHUNKS, K);
    void *workspace = get(workspace_bytes);

    for (uint32_t shard = 0; shard < n_shards; shard++) {
        uint32_t n_own = (CHUNKS - shard + n_shards - 1) / n_shards;
        CALL(s, score_keys, m->query, 1, 1, 1, HIDDEN,
             {m->marks[shard], n_shards * sizeof(m->marks[0]), KVK_F32}, n_own, scores, CHUNKS);
        CALL(s, topk, scores, n_own, K, 0, ids, best, &n_best, workspace, workspace_bytes);
        for (uint32_t i = 0; i < n_best; i++) {
            found[shard + ids[i] * n_shards] = best[i];
            is_found[shard + ids[i] * n_shards] = true;
        }
    }
    for (uint32_t c = 0; c < CHUNKS; c++) {
        if (is_found[c]) {
            scores[n] = found[c];
            at[n++] = c;
        }
    }
    CALL(s, topk, scores, n, K, 0, ids, r->scores, &r->n, workspace, workspace_bytes);
    for (uint32_t i = 0; i < r->n; i++)
        r->ids[i] = at[ids[i]];
    CALL(s, chunk_weights, r->scores, r->ids, 1, r->n, KVK_FUSE_SOFTMAX, 1.0f, r->weights);
}

/* Landmarks that are spread over servers give the same chunks, scores and weights bit for bit, ties
 * across servers included. */
static void check_shards(const subject *s, void *arg)
{
    static const uint32_t shards[] = {2, 3, 8, CHUNKS};
    memory *m = make_memory(35);

    (void)arg;
    for (size_t c = 5; c < CHUNKS; c += 4)
        memcpy(m->marks[c], m->marks[2], sizeof(m->marks[0]));
    memcpy(m->query, m->marks[2], sizeof(m->query)); /* so that those that tie are the best */
    result one, many;
    retrieve_sharded(s, m, 1, &one);
    assert_int_equal(one.n, K);
    for (uint32_t i = 0; i < 5; i++)
        assert_int_equal(one.ids[i], i == 0 ? 2 : 1 + 4 * i);
    for (size_t i = 0; i < sizeof(shards) / sizeof(shards[0]); i++) {
        retrieve_sharded(s, m, shards[i], &many);
        assert_int_equal(many.n, one.n);
        assert_same_bits(s, "ids", many.ids, one.ids, sizeof(one.ids));
        assert_same_bits(s, "scores", many.scores, one.scores, sizeof(one.scores));
        assert_same_bits(s, "weights", many.weights, one.weights, sizeof(one.weights));
    }
    free_all();
}

#define OVER_SUBJECTS(name)                                                                        \
    static void test_##name(void **state)                                                          \
    {                                                                                              \
        (void)state;                                                                               \
        for_each_subject(check_##name, NULL);                                                      \
    }
OVER_SUBJECTS(einsum)
OVER_SUBJECTS(ties)
OVER_SUBJECTS(others)
OVER_SUBJECTS(stick)
OVER_SUBJECTS(rounding)
OVER_SUBJECTS(shards)

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_einsum),   cmocka_unit_test(test_ties),
        cmocka_unit_test(test_others),   cmocka_unit_test(test_stick),
        cmocka_unit_test(test_rounding), cmocka_unit_test(test_shards),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
