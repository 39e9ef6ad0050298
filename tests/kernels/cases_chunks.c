/* cases_chunks.c: chunk_weights, chunk_fuse. */
#include "cases.h"

/* Scores with the spread of real ones, some at -INFINITY; ids are a shuffle with gaps. */
static float *scores_of(support_random *random, uint32_t n, uint32_t k, uint32_t *ids)
{
    float *x = random_floats(random, (size_t)n * k);

    for (size_t i = 0; i < (size_t)n * k; i++) {
        x[i] = support_below(random, 9) == 0 ? -INFINITY : x[i] * 20;
        ids[i] = (uint32_t)(i % k) * 7 + (uint32_t)support_below(random, 7);
    }
    for (size_t i = 0; i < (size_t)n * k; i++) {
        size_t row = i / k * k, j = row + support_below(random, k);
        uint32_t id = ids[i];
        ids[i] = ids[j];
        ids[j] = id;
    }
    return x;
}

void case_chunk_weights(const subject *s, support_random *random)
{
    static const uint32_t shapes[][2] = {{1, 1}, {3, 8}, {64, 8}, {2, 64}, {1, KVK_CHUNKS_MAX}};
    float x[2] = {1, 2}, out[2] = {5, 5};
    uint32_t twice[2] = {4, 4};

    for (size_t t = 0; t < 5; t++) {
        uint32_t n = shapes[t][0], k = shapes[t][1], *ids = get((size_t)n * k * sizeof(*ids));
        float *scores = scores_of(random, n, k, ids), *got = get_floats((size_t)n * k);
        float *want = get_floats((size_t)n * k);
        for (int fusion = KVK_FUSE_SOFTMAX; fusion <= KVK_FUSE_STICK; fusion++) {
            CALL(s, chunk_weights, scores, ids, n, k, (kvk_fusion)fusion, 0.25f, got);
            CALL(reference(), chunk_weights, scores, ids, n, k, (kvk_fusion)fusion, 0.25f, want);
            assert_same_bits(s, "weights", got, want, (size_t)n * k * sizeof(float));
        }
        free_all();
    }
    CALL(s, chunk_weights, NULL, NULL, 0, 8, KVK_FUSE_STICK, 1, NULL);
    CALL(s, chunk_weights, NULL, NULL, 8, 0, KVK_FUSE_STICK, 1, NULL);
    REFUSE(s, chunk_weights, x, NULL, 1, 2, KVK_FUSE_STICK, 1, out);
    REFUSE(s, chunk_weights, x, twice, 1, 2, KVK_FUSE_STICK, 1, out);
    REFUSE(s, chunk_weights, x, twice, 1, 2, (kvk_fusion)3, 1, out);
    REFUSE(s, chunk_weights, x, twice, 1, 2, KVK_FUSE_SOFTMAX, 0, out);
    REFUSE(s, chunk_weights, x, twice, 1, 2, KVK_FUSE_SOFTMAX, NAN, out);
    REFUSE(s, chunk_weights, x, twice, 1, KVK_CHUNKS_MAX + 1, KVK_FUSE_SOFTMAX, 1, out);
    REFUSE(s, chunk_weights, NULL, twice, 1, 2, KVK_FUSE_SOFTMAX, 1, out);
    REFUSE(s, chunk_weights, x, twice, 1, 2, KVK_FUSE_SOFTMAX, 1, NULL);
    assert_true(out[0] == 5);
    CALL(s, chunk_weights, x, twice, 1, 2, KVK_FUSE_SOFTMAX, 1, out); /* does not read ids */
    x[0] = -INFINITY;
    CALL(s, chunk_weights, x, twice, 1, 2, KVK_FUSE_STICK, 1, out); /* one of the two is none */
    assert_true(out[0] == 0 && out[1] > 0.8f);
    x[1] = NAN;
    CALL(s, chunk_weights, x, NULL, 1, 2, KVK_FUSE_SOFTMAX, 1, out);
    assert_true(isnan(out[0]) && isnan(out[1]));
    CALL(s, chunk_weights, x, twice, 1, 2, KVK_FUSE_STICK, 1, out);
    assert_true(isnan(out[0]) && isnan(out[1]));
}

void case_chunk_fuse(const subject *s, support_random *random)
{
    static const uint32_t dims[] = {1, 32, 66, 257};
    enum { CHUNKS = 8, N = 130 };
    float o[1] = {1}, out[1] = {5};

    for (size_t t = 0; t < 8; t++) {
        uint32_t d = dims[t / 2], off_by_one = t % 2;
        size_t rows = (size_t)CHUNKS * N;
        float *in = random_floats(random, rows * d), *lse = random_floats(random, rows);
        float w[CHUNKS], *got = get_floats((size_t)N * d), *want = get_floats((size_t)N * d);
        for (size_t c = 0; c < CHUNKS; c++)
            w[c] = c == 2 ? 0 : 1.0f / (float)(c + 1);
        for (size_t i = 0; i < rows; i++)
            lse[i] = i % 17 == 3 ? -INFINITY : lse[i] * 10;
        for (size_t i = 0; i < rows * d; i++) /* what must not be read */
            in[i] = i / d / N == 2 || lse[i / d] == -INFINITY ? NAN : in[i];
        CALL(s, chunk_fuse, in, lse, w, CHUNKS, N, d, off_by_one, got);
        CALL(reference(), chunk_fuse, in, lse, w, CHUNKS, N, d, off_by_one, want);
        for (size_t i = 0; i < (size_t)N * d; i++) {
            double sum = 0;
            for (size_t c = 0; c < CHUNKS; c++) {
                size_t at = c * N * d + i;
                sum += isnan(in[at]) ? 0 : fabs((double)w[c] * (double)in[at]);
            }
            assert_near(s, "fused", i, (double)got[i], (double)want[i],
                        (CHUNKS + 3) * 0x1p-24 * sum);
        }
        free_all();
    }
    CALL(s, chunk_fuse, NULL, NULL, NULL, 3, 0, 4, 1, NULL);
    REFUSE(s, chunk_fuse, o, o, o, 1, 1, 0, 1, out);
    REFUSE(s, chunk_fuse, o, o, o, 1, 1, 1, 2, out);
    REFUSE(s, chunk_fuse, o, NULL, o, 1, 1, 1, 0, out);
    REFUSE(s, chunk_fuse, o, o, NULL, 1, 1, 1, 0, out);
    REFUSE(s, chunk_fuse, o, o, o, 1, 1, 1, 0, NULL);
    REFUSE(s, chunk_fuse, o, o, o, KVK_CHUNKS_MAX + 1, 1, 1, 0, out);
    assert_true(out[0] == 5);
    CALL(s, chunk_fuse, NULL, NULL, NULL, 0, 1, 1, 1, out); /* the first chunk retrieves nothing */
    assert_true(out[0] == 0);
}
