/* cases_scores.c: score_keys, score_rows, score_index. */
#include "cases.h"

static const uint32_t shapes[][5] = {
    /* m, n_q_heads, n_kv_heads, dim, n */
    {0, 2, 1, 8, 3},     {1, 2, 1, 8, 0},   {1, 1, 1, 1, 1},     {1, 9, 3, 64, 203},
    {2, 32, 8, 128, 37}, {5, 4, 4, 22, 66}, {17, 6, 2, 66, 130}, {1, 9, 3, 64, 4000},
    {3, 1, 1, 126, 515}, {2, 8, 2, 33, 9}};

#define N_SHAPES (sizeof(shapes) / sizeof(shapes[0]))

static void check_scores(const subject *s, const kvk_score_keys_args *a, const float *got,
                         const float *want)
{
    size_t d = a->head_dim, group = a->n_q_heads / a->n_kv_heads;

    for (size_t r = 0; r < (size_t)a->m * a->n_q_heads; r++) {
        size_t head = r % a->n_q_heads / group;
        for (size_t j = 0; j < a->n; j++) {
            const char *row = (const char *)a->keys.data + j * a->keys.stride_bytes;
            double sum = 0;
            for (size_t t = 0; t < d; t++)
                sum += fabs((double)a->q[r * d + t] *
                            (double)decoded(row, a->keys.dtype, head * d + t));
            assert_near(s, "score", r * a->n + j, (double)got[r * a->out_stride + j],
                        (double)want[r * a->out_stride + j], (double)d * 0x1p-23 * sum);
        }
        for (size_t j = a->n; j < a->out_stride; j++)
            assert_true(got[r * a->out_stride + j] == 0); /* the padding is not ours */
    }
}

static kvk_score_keys_args keys_args(support_random *random, const uint32_t *p, kvk_dtype dtype)
{
    size_t width = (size_t)p[2] * p[3], stride = width * kvk_dtype_bytes(dtype) + 5;
    kvk_score_keys_args a = {.q = random_floats(random, (size_t)p[0] * p[1] * p[3]),
                             .m = p[0],
                             .n_q_heads = p[1],
                             .n_kv_heads = p[2],
                             .head_dim = p[3],
                             .keys = {NULL, stride, dtype},
                             .n = p[4],
                             .out_stride = p[4] + 3};
    a.keys.data = encode_rows(random_floats(random, p[4] * width), p[4], width, stride, dtype);
    return a;
}

void case_score_keys(const subject *s, support_random *random)
{
    float q[8] = {0}, out[8] = {5};
    kvk_rows keys = {q, 16, KVK_F32};

    for (size_t t = 0; t < N_SHAPES * 4; t++) {
        kvk_score_keys_args a = keys_args(random, shapes[t / 4], all_dtypes[t % 4]);
        size_t n = (size_t)a.m * a.n_q_heads * a.out_stride;
        float *got = a.out = get_floats(n);
        assert_ok(s->ops->score_keys(s->be, &a, NULL));
        float *want = a.out = get_floats(n);
        assert_ok(reference()->ops->score_keys(reference()->be, &a, NULL));
        check_scores(s, &a, got, want);
        free_all();
    }
    REFUSE(s, score_keys, q, 1, 3, 2, 2, keys, 1, out, 1);
    REFUSE(s, score_keys, q, 1, 1, 1, 0, keys, 1, out, 1);
    REFUSE(s, score_keys, q, 1, 1, 1, 4, keys, 2, out, 1); /* out rows would overlap */
    REFUSE(s, score_keys, NULL, 1, 1, 1, 4, keys, 1, out, 1);
    REFUSE(s, score_keys, q, 1, 1, 1, 4, keys, 1, NULL, 1);
    assert_true(out[0] == 5);
}

/* Rows in a shuffled order with repeats must give the columns of score_keys. */
void case_score_rows(const subject *s, support_random *random)
{
    float q[4] = {0}, out[8] = {5};
    const void *rows_bad[2] = {q, NULL};

    for (size_t t = 0; t < N_SHAPES * 4; t++) {
        kvk_score_keys_args a = keys_args(random, shapes[t / 4], all_dtypes[t % 4]);
        size_t r_max = (size_t)a.m * a.n_q_heads;
        const void **rows = get(a.n * sizeof(*rows));
        size_t *from = get(a.n * sizeof(*from));
        float *got = get_floats(r_max * a.n), *keys = a.out = get_floats(r_max * a.out_stride);
        for (size_t j = 0; j < a.n; j++) {
            from[j] = support_below(random, a.n);
            rows[j] = (const char *)a.keys.data + from[j] * a.keys.stride_bytes;
        }
        assert_ok(s->ops->score_keys(s->be, &a, NULL));
        CALL(s, score_rows, a.q, a.m, a.n_q_heads, a.n_kv_heads, a.head_dim, rows, a.keys.dtype,
             a.n, got, a.n);
        for (size_t i = 0; i < r_max * a.n; i++)
            assert_true(got[i] == keys[i / a.n * a.out_stride + from[i % a.n]]);
        free_all();
    }
    REFUSE(s, score_rows, q, 1, 1, 1, 4, rows_bad, KVK_F32, 2, out, 2);
    REFUSE(s, score_rows, q, 1, 1, 1, 4, NULL, KVK_F32, 2, out, 2);
    REFUSE(s, score_rows, q, 1, 1, 1, 4, rows_bad, (kvk_dtype)0, 1, out, 2);
    assert_true(out[0] == 5);
}

/* Same bits on every backend: any int8, any scale, rows at odd addresses. */
void case_score_index(const subject *s, support_random *random)
{
    static const uint32_t dims[] = {1, 8, 22, 31, 32, 33, 63, 64, 65, 126, 256, 257, 400};
    float q[4] = {1, NAN, 0, 0}, out[4] = {5};
    char index[64] = {0};

    for (size_t t = 0; t < N_SHAPES * 13; t++) {
        const uint32_t *p = shapes[t / 13];
        uint32_t d = dims[t % 13], n = p[4] > 600 ? 600 : p[4];
        size_t row = kvk_index_row_bytes(p[2], d), stride = row + t % 4, outs = p[0] * p[1] * n;
        char *rows = get(n ? (n - 1) * stride + row : 1);
        float *queries = random_floats(random, (size_t)p[0] * p[1] * d);
        float *got = get_floats(outs), *want = get_floats(outs);
        support_fill(random, rows, n ? (n - 1) * stride + row : 0);
        for (size_t j = 0; j < n * p[2]; j++) { /* finite scales */
            uint16_t scale = (uint16_t)(0x3c00 + support_below(random, 0x400));
            memcpy(rows + j / p[2] * stride + p[2] * d + 2 * (j % p[2]), &scale, 2);
        }
        if (p[0])
            memset(queries, 0, d * sizeof(float)); /* a zero query */
        CALL(s, score_index, queries, p[0], p[1], p[2], d, rows, stride, n, got, n);
        CALL(reference(), score_index, queries, p[0], p[1], p[2], d, rows, stride, n, want, n);
        assert_same_bits(s, "score_index", got, want, outs * sizeof(float));
        free_all();
    }
    REFUSE(s, score_index, q, 1, 1, 1, 4, index, 6, 1, out, 1); /* a NaN query */
    REFUSE(s, score_index, q + 2, 1, 1, 1, 2, index, 3, 2, out, 2);
    REFUSE(s, score_index, q + 2, 1, 3, 2, 2, index, 8, 1, out, 1);
    REFUSE(s, score_index, q + 2, 1, 1, 1, 0, index, 8, 1, out, 1);
    assert_true(out[0] == 5);
}
